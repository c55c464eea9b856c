/* Add, normalise, quantise: norm_fwd.
 *
 * s is rounded to bf16 before it is normalised, whether it is stored or not, and the e4m3 codes are made of the bf16-rounded y (quant.cuh), so
 * that every output is the same whichever others are asked for, and a backward that recomputes y from the stored s gets the same bits. The sum
 * of squares is float32 in an order that depends on cols alone. Rows of yq from n to rt_act_rows(n) are zeros.
 *
 * A row is held in registers by the threads of one block (or of a part of it), 2 to 4 vectors each: x and add are read once. Between a row's loads and
 * its stores lie a sum over the block and the codes: where many rows get codes, blocks stay, and the next rows are on their way meanwhile.
 */
#include "core/cuda/cuda.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/quant.cuh"

namespace {

struct norm {
    const bf16 *x, *add;
    struct vec8::vector w; /* data NULL: ones, and f32 false */
    bf16 *sum, *y;
    uint8_t *code;
    float *scale, *rstd;
    int64_t n, rows, ldx, ldy; /* rows: n, or rt_act_rows(n) where codes are asked for */
    int cols;
    float eps, per_col; /* 1 / cols */
    bool pow2;
};

__device__ __forceinline__ float rstd_of(const struct norm &p, float squares)
{
    return rsqrtf(squares * p.per_col + p.eps);
}

/* Sum of v over the threads of a row: blockDim.x of them, a multiple of 32. Every thread of the block calls it, in turns with slot 0 and 1. */
__device__ float row_sum(float v, int slot = 0)
{
    __shared__ float parts[2][32];
    float *part = parts[slot];
    v = warp_sum(v);
    if (blockDim.x == 32)
        return v;
    const unsigned warps = blockDim.x / 32, first = threadIdx.y * warps;
    if (threadIdx.x % 32 == 0)
        part[first + threadIdx.x / 32] = v;
    __syncthreads();
    float total = 0;
    for (unsigned i = 0; i < warps; i++)
        total += part[first + i];
    return total;
}

/* Loads vector c of s; stores it where asked. */
__device__ __forceinline__ uint4 load_sum(const struct norm &p, int64_t row, int c)
{
    uint4 s = load_stream(p.x + row * p.ldx + (int64_t)c * VEC);
    if (p.add != NULL) {
        float a[VEC], b[VEC];
        unpack(s, a);
        unpack(load_stream(p.add + row * p.cols + (int64_t)c * VEC), b);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            a[i] += b[i];
        s = pack(a);
    }
    return s;
}

/* Vector c of the weight, packed; a float32 one is read where it is needed. */
__device__ __forceinline__ uint4 load_weight(const struct norm &p, int c, int nv)
{
    const bool narrow = p.w.data != NULL && !p.w.f32;
    return narrow && c < nv ? __ldg((const uint4 *)p.w.data + c) : vec8::ones();
}

__device__ __forceinline__ float squares_of(const uint4 &s, float squares)
{
    float x[VEC];
    unpack(s, x);
#pragma unroll
    for (int j = 0; j < VEC; j++)
        squares = fmaf(x[j], x[j], squares);
    return squares;
}

/* Vector c of y and of its codes. Every thread of a warp calls it. */
__device__ __forceinline__ void put_vector(const struct norm &p, int64_t row, int c, int nv, bool live, const uint4 &s, const uint4 &packed, float rstd)
{
    float x[VEC], w[VEC];
    unpack(s, x);
    unpack(packed, w);
    if (p.w.f32 && c < nv)
        vec8::load<VEC>((const float *)p.w.data + (int64_t)c * VEC, w);
#pragma unroll
    for (int j = 0; j < VEC; j++)
        x[j] *= rstd * w[j];
    const uint4 y = pack(x);
    if (p.y != NULL && live && c < nv)
        *(uint4 *)(p.y + row * p.ldy + (int64_t)c * VEC) = y;
    if (p.code == NULL)
        return;
    unpack(y, x);
    const struct qscale q = quant_scale(block_amax(vector_amax(x)), p.pow2);
    if (c < nv && row < p.rows) {
        *(uint2 *)(p.code + row * p.cols + (int64_t)c * VEC) = live ? code8(x, q) : make_uint2(0, 0);
        if (c % QLANES == 0)
            p.scale[(int64_t)(c / QLANES) * p.rows + row] = live ? q.s : 0.0f;
    }
}

/* The last rows first: they were written last and lie in the L2 still, as the first ones then do for who reads y. */
template <int EACH>
__global__ void __launch_bounds__(1024) norm_kernel(const __grid_constant__ struct norm p)
{
    const int64_t row = (int64_t)(gridDim.x - 1 - blockIdx.x) * blockDim.y + threadIdx.y;
    const bool live = row < p.n;
    const int nv = p.cols / VEC;
    uint4 s[EACH], packed[EACH];
    float squares = 0;
    launch_after();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = (int)(threadIdx.x + i * blockDim.x);
        s[i] = live && c < nv ? load_sum(p, row, c) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) /* a bf16 weight is there before the sum is */
        packed[i] = load_weight(p, (int)(threadIdx.x + i * blockDim.x), nv);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = (int)(threadIdx.x + i * blockDim.x);
        squares = squares_of(s[i], squares);
        if (p.sum != NULL && live && c < nv)
            *(uint4 *)(p.sum + row * p.cols + (int64_t)c * VEC) = s[i];
    }
    const float rstd = rstd_of(p, row_sum(squares));
    if (p.rstd != NULL && live && threadIdx.x == 0)
        p.rstd[row] = rstd;
    if (p.y == NULL && p.code == NULL)
        return;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        put_vector(p, row, (int)(threadIdx.x + i * blockDim.x), nv, live, s[i], packed[i], rstd);
}

/* The same sums and outputs, of x alone, for rows that the threads of a block share evenly: blocks that stay. A thread reads of the ring what it copied
 * itself, so that no barrier guards it. As many instructions as it takes and no more: with codes they are what a row costs. */
enum { STAGES = 3, STAY_THREADS = 256, STAY_WARPS = 8 };

/* row_sum with the warps' sums read four at a time; slots of warps that a row has not got hold 0, which changes no sum. */
__device__ __forceinline__ float stay_sum(float v, float (&part)[STAY_WARPS][STAY_WARPS])
{
    v = warp_sum(v);
    if (blockDim.x == 32)
        return v;
    if (threadIdx.x % 32 == 0)
        part[threadIdx.y][threadIdx.x / 32] = v;
    __syncthreads();
    const float4 a = *(const float4 *)part[threadIdx.y];
    float total = a.x;
    total += a.y;
    total += a.z;
    total += a.w;
    if (blockDim.x > 128) {
        const float4 b = *(const float4 *)(part[threadIdx.y] + 4);
        total += b.x;
        total += b.y;
        total += b.z;
        total += b.w;
    }
    return total;
}

/* 16 bytes to shared memory in the background; zeros where they are not `valid`. */
__device__ __forceinline__ void copy16(uint4 *dst, const void *src, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(dst)), "l"(src), "r"(valid ? 16 : 0) : "memory");
}

template <int EACH>
__device__ __forceinline__ void fetch(const struct norm &p, int64_t row, uint4 *stage)
{
    const int threads = (int)(blockDim.x * blockDim.y), me = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    const bool in = row < p.n;
    const bf16 *x = p.x + (in ? row * p.ldx : 0) + threadIdx.x * VEC;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        copy16(stage + i * threads + me, x + i * (blockDim.x * VEC), in);
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* The greatest absolute value of eight, as a float. */
__device__ __forceinline__ float packed_amax(const uint4 &v)
{
    const uint4 a = make_uint4(v.x & 0x7fff7fff, v.y & 0x7fff7fff, v.z & 0x7fff7fff, v.w & 0x7fff7fff);
    const __nv_bfloat162 *h = (const __nv_bfloat162 *)(const void *)&a;
    const __nv_bfloat162 m = __hmax2(__hmax2(h[0], h[1]), __hmax2(h[2], h[3]));
    const uint32_t u = *(const uint32_t *)(const void *)&m;
    return fmaxf(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u));
}

template <int EACH, bool Y>
__global__ void __launch_bounds__(STAY_THREADS, 4) norm_stay_kernel(const __grid_constant__ struct norm p)
{
    extern __shared__ uint4 ring[]; /* [STAGES][EACH][threads] */
    __shared__ __align__(16) float parts[2][STAY_WARPS][STAY_WARPS];
    const int threads = (int)(blockDim.x * blockDim.y), me = (int)(threadIdx.y * blockDim.x + threadIdx.x), each = (int)blockDim.x * VEC;
    const int step = (int)(gridDim.x * blockDim.y);
    const int64_t blocks_of = (int64_t)(blockDim.x / QLANES) * p.rows; /* from a thread's scale to that of its next vector */
    uint4 packed[EACH];
    int at = 0, slot = 0, row = (int)(blockIdx.x * blockDim.y + threadIdx.y);
#pragma unroll
    for (int a = 0; a < STAGES - 1; a++)
        fetch<EACH>(p, row + a * (int64_t)step, ring + a * EACH * threads);
#pragma unroll
    for (int i = 0; i < EACH; i++)
        packed[i] = load_weight(p, (int)(threadIdx.x + i * blockDim.x), p.cols / VEC);
    if (me < 2 * STAY_WARPS * STAY_WARPS)
        (&parts[0][0][0])[me] = 0;
    __syncthreads();
    for (int row0 = (int)(blockIdx.x * blockDim.y); row0 < p.rows; row0 += step, row += step, slot ^= 1) { /* the same turns for all threads of a block */
        const bool live = row < p.n;
        const uint4 *s = ring + at * EACH * threads + me; /* read twice: registers are for what is on its way */
        float squares = 0;
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
#pragma unroll
        for (int i = 0; i < EACH; i++)
            squares = squares_of(s[i * threads], squares);
        fetch<EACH>(p, row + (int64_t)(STAGES - 1) * step, ring + (at == 0 ? STAGES - 1 : at - 1) * EACH * threads);
        at = at == STAGES - 1 ? 0 : at + 1;
        const float rstd = rstd_of(p, stay_sum(squares, parts[slot]));
        if (p.rstd != NULL && live && threadIdx.x == 0)
            p.rstd[row] = rstd;
        uint8_t *code = p.code + (int64_t)row * p.cols + threadIdx.x * VEC;
        float *scale = p.scale + (int64_t)(threadIdx.x / QLANES) * p.rows + row;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float x[VEC], w[VEC];
            unpack(s[i * threads], x);
            unpack(packed[i], w);
#pragma unroll
            for (int j = 0; j < VEC; j++)
                x[j] *= rstd * w[j];
            const uint4 y = pack(x);
            if (Y && live)
                *(uint4 *)(p.y + row * p.ldy + threadIdx.x * VEC + i * each) = y;
            const struct qscale q = quant_scale(block_amax(packed_amax(y)), p.pow2);
            unpack(y, x);
            const uint2 c = code8(x, q);
            *(uint2 *)(code + i * each) = live ? c : make_uint2(0, 0);
            if (threadIdx.x % QLANES == 0)
                scale[i * blocks_of] = live ? q.s : 0.0f;
        }
    }
}

/* Rows of any length and alignment: one block a row, chunks of 128 columns by warps, four single elements a thread, two passes. */
enum { SLOW_THREADS = 256 };

__device__ float slow_sum(const struct norm &p, int64_t row, int j)
{
    const float x = __bfloat162float(p.x[row * p.ldx + j]);
    return p.add != NULL ? round_bf16(x + __bfloat162float(p.add[row * p.cols + j])) : x;
}

__device__ float slow_y(const struct norm &p, int64_t row, int j, float rstd)
{
    /* where the sum is stored it may lie over x or add, which are gone then */
    const float s = p.sum != NULL ? __bfloat162float(p.sum[row * p.cols + j]) : slow_sum(p, row, j);
    float w = 1.0f;
    if (p.w.data != NULL)
        vec8::load_vector<1>(p.w, j, &w);
    return round_bf16(s * (rstd * w));
}

__global__ void __launch_bounds__(SLOW_THREADS) norm_slow_kernel(const __grid_constant__ struct norm p)
{
    const int64_t row = blockIdx.x;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * QBLOCK, step = SLOW_THREADS / 32 * QBLOCK;
    const bool live = row < p.n;
    float squares = 0;
    for (int c = first; live && c < p.cols; c += step)
        for (int j = c + lane; j < c + QBLOCK && j < p.cols; j += 32) {
            const float s = slow_sum(p, row, j);
            squares = fmaf(s, s, squares);
            if (p.sum != NULL)
                p.sum[row * p.cols + j] = __float2bfloat16_rn(s);
        }
    const float rstd = rstd_of(p, row_sum(squares));
    if (p.rstd != NULL && live && threadIdx.x == 0)
        p.rstd[row] = rstd;
    for (int c = first; c < p.cols && (p.y != NULL || p.code != NULL); c += step) {
        float y[QBLOCK / 32], amax = 0;
#pragma unroll
        for (int i = 0; i < QBLOCK / 32; i++) {
            const int j = c + lane + 32 * i;
            y[i] = live && j < p.cols ? slow_y(p, row, j, rstd) : 0.0f;
            amax = fmaxf(amax, fabsf(y[i]));
            if (p.y != NULL && live && j < p.cols)
                p.y[row * p.ldy + j] = __float2bfloat16_rn(y[i]);
        }
        if (p.code == NULL)
            continue;
        const struct qscale q = quant_scale(warp_max(amax), p.pow2);
#pragma unroll
        for (int i = 0; i < QBLOCK / 32; i++)
            p.code[row * p.cols + c + lane + 32 * i] = live ? code1(y[i], q) : 0;
        if (lane == 0)
            p.scale[(int64_t)(c / QBLOCK) * p.rows + row] = live ? q.s : 0.0f;
    }
}

bool fits_vectors(const struct norm &p)
{
    return p.cols % VEC == 0 && p.ldx % VEC == 0 && p.ldy % VEC == 0 && aligned16(p.x) && aligned16(p.add) && aligned16(p.w.data) &&
           aligned16(p.sum) && aligned16(p.y) && aligned16(p.code);
}

/* false: not for this call. The ring is to fit what a block has without asking; blocks that get one row have no next one to fetch. */
template <int EACH>
bool launch_stay(const struct norm &p, const struct row_shape &shape, struct rt_queue *q)
{
    const unsigned rows = shape.rows < 4 ? shape.rows : 4; /* which divides p.rows: no thread is without a row */
    const int threads = (int)(shape.lanes * rows);
    const size_t shared = (size_t)STAGES * EACH * threads * sizeof(uint4);
    if (p.code == NULL || p.add != NULL || p.sum != NULL || p.w.f32 || threads > STAY_THREADS || shared > 47 << 10 || p.cols != (int)shape.lanes * EACH * VEC)
        return false;
    const auto kernel = p.y != NULL ? norm_stay_kernel<EACH, true> : norm_stay_kernel<EACH, false>;
    const int64_t grid = (int64_t)q->dev->sm_count * vec8::resident((const void *)kernel, threads, shared);
    if (p.rows < 2 * grid * rows)
        return false;
    kernel<<<(unsigned)grid, dim3(shape.lanes, rows), shared, q->stream>>>(p);
    return true;
}

template <int EACH>
void launch_rows(const struct norm &p, const struct row_shape &shape, struct rt_queue *q)
{
    const unsigned grid = (unsigned)((p.rows + shape.rows - 1) / shape.rows);
    if (!launch_stay<EACH>(p, shape, q))
        (void)launch(q, norm_kernel<EACH>, grid, dim3(shape.lanes, shape.rows), 0, 1, p);
}

void launch(const struct norm &p, struct rt_queue *q)
{
    const struct row_shape shape = row_shape_of(p.cols / VEC, 1024);
    if (!fits_vectors(p) || shape.each == 0) {
        norm_slow_kernel<<<(unsigned)p.rows, SLOW_THREADS, 0, q->stream>>>(p);
        return;
    }
    switch (shape.each) {
    case 1: launch_rows<1>(p, shape, q); break;
    case 2: launch_rows<2>(p, shape, q); break;
    case 3: launch_rows<3>(p, shape, q); break;
    default: launch_rows<4>(p, shape, q); break;
    }
}

}

enum rt_status rt_cuda_norm_fwd(struct rt_dev *, struct rt_queue *q, const struct rt_norm_fwd_args *a, struct rt_err *err)
{
    const bool quantised = a->yq.data != NULL;
    if (quantised && a->cols % QBLOCK != 0)
        return rt_fail(err, RT_SHAPE, "norm_fwd: %lld columns; the e4m3 form needs a multiple of %d", (long long)a->cols, (int)QBLOCK);
    if (a->cols < 1 || a->cols > INT32_MAX / 2 || a->n > INT32_MAX - 4)
        return rt_fail(err, RT_SHAPE, "norm_fwd: %lld rows of %lld columns", (long long)a->n, (long long)a->cols);
    if (a->w != NULL && (a->w->rows * a->w->cols != a->cols || (a->w->dtype != RT_BF16 && a->w->dtype != RT_F32)))
        return rt_fail(err, RT_SHAPE, "norm_fwd: a weight of %lld x %lld %s; expected %lld of BF16 or F32", (long long)a->w->rows,
                       (long long)a->w->cols, rt_dtype_name(a->w->dtype), (long long)a->cols);
    if (a->n <= 0)
        return RT_OK;
    struct norm p = {};
    p.x = (const bf16 *)a->x;
    p.add = (const bf16 *)a->add;
    p.w = vec8::vector_of(a->w);
    p.sum = (bf16 *)a->sum;
    p.y = (bf16 *)a->y;
    p.code = (uint8_t *)a->yq.data;
    p.scale = a->yq.scale;
    p.pow2 = a->pow2;
    p.rstd = a->rstd;
    p.n = a->n;
    p.rows = quantised ? rt_act_rows(a->n) : a->n;
    p.ldx = ld_or(a->ldx, a->cols);
    p.ldy = ld_or(a->ldy, a->cols);
    p.cols = (int)a->cols;
    p.eps = a->eps;
    p.per_col = 1.0f / (float)a->cols;
    launch(p, q);
    return rt_cuda_launched("norm_fwd", err);
}
