/* Add, normalise, quantise: norm_fwd.
 *
 * s is rounded to bf16 before it is normalised, whether it is stored or not, and the e4m3 codes are made of the bf16-rounded y (quant.cuh), so
 * that every output is the same whichever others are asked for, and a backward that recomputes y from the stored s gets the same bits. The sum
 * of squares is float32 in an order that depends on cols alone. Rows of yq from n to rt_act_rows(n) are zeros.
 *
 * A row is held in registers by the threads of one block (or of a part of it), 2 to 4 vectors each: x and add are read once.
 */
#include "core/cuda/cuda.h"
#include "core/cuda/quant.cuh"

namespace {

enum { ONES = 0x3f803f80 }; /* two bf16 */

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

/* Sum of v over the threads of a row: blockDim.x of them, a multiple of 32. Every thread of the block calls it. */
__device__ float row_sum(float v)
{
    __shared__ float part[32];
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

template <int EACH>
__global__ void __launch_bounds__(1024) norm_kernel(const __grid_constant__ struct norm p)
{
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    const bool live = row < p.n;
    const int nv = p.cols / VEC;
    const bool narrow = p.w.data != NULL && !p.w.f32; /* a bf16 weight is there before the sum is */
    uint4 s[EACH], packed[EACH];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = (int)(threadIdx.x + i * blockDim.x);
        s[i] = live && c < nv ? load_sum(p, row, c) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = (int)(threadIdx.x + i * blockDim.x);
        packed[i] = narrow && c < nv ? __ldg((const uint4 *)p.w.data + c) : make_uint4(ONES, ONES, ONES, ONES);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = (int)(threadIdx.x + i * blockDim.x);
        float x[VEC];
        unpack(s[i], x);
#pragma unroll
        for (int j = 0; j < VEC; j++)
            squares = fmaf(x[j], x[j], squares);
        if (p.sum != NULL && live && c < nv)
            *(uint4 *)(p.sum + row * p.cols + (int64_t)c * VEC) = s[i];
    }
    const float rstd = rstd_of(p, row_sum(squares));
    if (p.rstd != NULL && live && threadIdx.x == 0)
        p.rstd[row] = rstd;
    if (p.y == NULL && p.code == NULL)
        return;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = (int)(threadIdx.x + i * blockDim.x);
        float x[VEC], w[VEC];
        unpack(s[i], x);
        unpack(packed[i], w);
        if (p.w.f32 && c < nv)
            vec8::load<VEC>((const float *)p.w.data + (int64_t)c * VEC, w);
#pragma unroll
        for (int j = 0; j < VEC; j++)
            x[j] *= rstd * w[j];
        const uint4 y = pack(x);
        if (p.y != NULL && live && c < nv)
            *(uint4 *)(p.y + row * p.ldy + (int64_t)c * VEC) = y;
        if (p.code == NULL)
            continue;
        unpack(y, x);
        const struct qscale q = quant_scale(block_amax(vector_amax(x)), p.pow2);
        if (c < nv && row < p.rows) {
            *(uint2 *)(p.code + row * p.cols + (int64_t)c * VEC) = live ? code8(x, q) : make_uint2(0, 0);
            if (c % QLANES == 0)
                p.scale[(int64_t)(c / QLANES) * p.rows + row] = live ? q.s : 0.0f;
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

void launch(const struct norm &p, cudaStream_t stream)
{
    const struct row_shape shape = row_shape_of(p.cols / VEC, 1024);
    if (!fits_vectors(p) || shape.each == 0) {
        norm_slow_kernel<<<(unsigned)p.rows, SLOW_THREADS, 0, stream>>>(p);
        return;
    }
    const dim3 block(shape.lanes, shape.rows);
    const unsigned grid = (unsigned)((p.rows + shape.rows - 1) / shape.rows);
    switch (shape.each) {
    case 1: norm_kernel<1><<<grid, block, 0, stream>>>(p); break;
    case 2: norm_kernel<2><<<grid, block, 0, stream>>>(p); break;
    case 3: norm_kernel<3><<<grid, block, 0, stream>>>(p); break;
    default: norm_kernel<4><<<grid, block, 0, stream>>>(p); break;
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
    launch(p, q->stream);
    return rt_cuda_launched("norm_fwd", err);
}
