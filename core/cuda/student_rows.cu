/* Rows of the student's backward: norms and silu.
 *
 * A thread holds eight neighbouring elements where rows allow it (16-byte accesses), else one. Gradients of norm weights are summed
 * in float32 in two steps of fixed order: each block over the rows that it takes, then column by column over the blocks.
 */
#include <cuda_bf16.h>

#include "core/cuda/cuda.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/student_rows.h"
#include "core/cuda/vec8.cuh"

namespace {

using vec8::aligned16;
using vec8::blocks_for;
using vec8::resident;
typedef __nv_bfloat16 bf16;

/* ---- gradients of vectors ---- */

enum { COLUMNS = 8, STRANDS = 128, WARPS = COLUMNS * STRANDS / 32 };

/* Level by level the sum of a lane and that `from` lanes above it, for from = half, half / 2, .. last. */
__device__ inline float join_lanes(float sum, int half, int last)
{
    for (int from = half; from >= last; from /= 2)
        sum += __shfl_down_sync(0xffffffffu, sum, (unsigned)from);
    return sum;
}

/* dw[c] += (or =) sum over rows of part [rows, cols]: a block takes a sector of columns, in strands of rows that are joined pairwise, s with s + 64, s + 32, .. s + 1:
 * four strands in a warp, then the warps' sums of a column in another. */
__global__ void __launch_bounds__(COLUMNS * STRANDS) add_columns_kernel(const float *part, int rows, int64_t cols, bf16 *dw, bool add)
{
    __shared__ float joined[WARPS][COLUMNS + 1];
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int64_t first = (int64_t)blockIdx.x * COLUMNS, c = first + lane % COLUMNS;
    float sum = 0, old = 0;
    launch_after();
    if (warp < COLUMNS && first + warp < cols && add)
        old = __bfloat162float(dw[first + warp]);
#pragma unroll 4
    for (int r = warp + lane / COLUMNS * WARPS; r < rows; r += STRANDS)
        sum += c < cols ? part[(int64_t)r * cols + c] : 0;
    sum = join_lanes(sum, 16, COLUMNS);
    if (lane < COLUMNS)
        joined[warp][lane] = sum;
    __syncthreads();
    if (warp >= COLUMNS)
        return;
    sum = join_lanes(joined[lane][warp], 16, 1);
    if (lane == 0 && first + warp < cols)
        dw[first + warp] = __float2bfloat16_rn(old + sum);
}

struct norm {
    const bf16 *dy, *x;
    bf16 *dx, *y;
    struct vec8::vector w;
    const float *rstd;
    float *part; /* [blocks, cols] or NULL */
    int64_t n, cols;
    float eps, per_col; /* 1 / cols */
    bool accumulate;
};

/* What a thread holds of a row: K vectors of eight, blockDim.x apart, as they lie in memory; the last one where the row has it. */
template <int K> struct piece {
    uint4 x[K], dy[K], dx[K]; /* dx: zeros, where it is not added to */
    float rstd; /* where it is saved */
};

/* Whether the thread has its last vector; the others it has. */
template <int K> __device__ inline bool has_last(const struct norm &a)
{
    return (int64_t)(threadIdx.x + (K - 1) * blockDim.x) * 8 < a.cols;
}

/* at: the thread's first vector, counted from the beginning of the tensor. */
template <int K, bool SAVED> __device__ void load_piece(const struct norm &a, uint32_t t, uint32_t at, bool last, struct piece<K> *p)
{
    p->rstd = SAVED ? a.rstd[t] : 0;
#pragma unroll
    for (int k = 0; k < K; k++, at += blockDim.x) {
        if (k == K - 1 && !last)
            break;
        p->x[k] = ((const uint4 *)(const void *)a.x)[at];
        p->dy[k] = ((const uint4 *)(const void *)a.dy)[at];
        if (a.accumulate)
            p->dx[k] = ((const uint4 *)(const void *)a.dx)[at];
    }
}

/* The weight of a thread's columns: held (bf16 or none), or read for each row (float32). */
template <int K, bool F32> __device__ void hold_weight(const struct norm &a, bool last, uint4 held[K])
{
#pragma unroll
    for (int k = 0; k < K; k++) {
        held[k] = vec8::ones();
        if (!F32 && a.w.data != NULL && (k < K - 1 || last))
            held[k] = ((const uint4 *)a.w.data)[threadIdx.x + k * blockDim.x];
    }
}

template <bool F32> __device__ inline void weight_of(const struct norm &a, const uint4 &held, int k, float w[8])
{
    if (F32)
        vec8::load<8>((const float *)a.w.data + (threadIdx.x + k * blockDim.x) * 8, w);
    else
        vec8::unpack(held, w);
}

/* A barrier of the threads of a row alone. */
__device__ inline void row_barrier()
{
    if (blockDim.y == 1)
        __syncthreads();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
}

enum { NORM_THREADS = 512, SLOTS = 32 }; /* 128 registers each: with fewer they are spilt. Slots: of rows of up to 16 warps in all, four at a time */

/* v over the row, to its threads, warps in ascending order. Slots of warps that a row has not got hold 0, which changes no sum. Behind a row_barrier. */
__device__ inline float sum_slots(const float *slot)
{
    float sum = 0;
#pragma unroll 1
    for (unsigned i = 0; i < blockDim.x / 32; i += 4) {
        const float4 v = *(const float4 *)(const void *)(slot + i);
        sum += v.x;
        sum += v.y;
        sum += v.z;
        sum += v.w;
    }
    return sum;
}

/* Sums over the row of dy w x and, where there is no rstd, of x x, to all of its threads: blockDim.x of them. */
template <int K, bool SAVED, bool F32>
__device__ float2 row_sums(const struct norm &a, const struct piece<K> &p, bool last, const uint4 held[K], float (&slot)[2][SLOTS])
{
    float gx = 0, xx = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        float x[8], dy[8], w[8];
        if (k == K - 1 && !last)
            break;
        vec8::unpack(p.x[k], x);
        vec8::unpack(p.dy[k], dy);
        weight_of<F32>(a, held[k], k, w);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            gx += dy[i] * w[i] * x[i];
            if (!SAVED)
                xx += x[i] * x[i];
        }
    }
    gx = vec8::warp_sum(gx);
    if (!SAVED)
        xx = vec8::warp_sum(xx);
    if (blockDim.x == 32)
        return make_float2(gx, xx);
    const unsigned first = threadIdx.y * ((blockDim.x / 32 + 3) / 4 * 4);
    if (threadIdx.x % 32 == 0) {
        slot[0][first + threadIdx.x / 32] = gx;
        if (!SAVED)
            slot[1][first + threadIdx.x / 32] = xx;
    }
    row_barrier();
    return make_float2(sum_slots(slot[0] + first), SAVED ? 0 : sum_slots(slot[1] + first));
}

/* dx and y of the row; sum += dy x r. dy w is not rounded by itself here, as it is in row_sums. */
template <int K, bool F32>
__device__ void finish_piece(const struct norm &a, uint32_t at, const struct piece<K> &p, bool last, const uint4 held[K], float r, float c, float sum[K][8])
{
#pragma unroll
    for (int k = 0; k < K; k++, at += blockDim.x) {
        float x[8], dy[8], w[8], dx[8];
        if (k == K - 1 && !last)
            break;
        vec8::unpack(p.x[k], x);
        vec8::unpack(p.dy[k], dy);
        weight_of<F32>(a, held[k], k, w);
        vec8::unpack(p.dx[k], dx);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[k][i] += dy[i] * r * x[i];
            dx[i] += r * fmaf(dy[i], w[i], -__fmul_rn(x[i], c));
        }
        ((uint4 *)(void *)a.dx)[at] = vec8::pack(dx);
        if (a.y == NULL)
            continue;
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] *= r * w[i]; /* as norm_fwd */
        ((uint4 *)(void *)a.y)[at] = vec8::pack(x);
    }
}

/* part [block, :] = the sums of the block's rows, in ascending order. total: [blockDim.y][blockDim.x * K * 8], where there are several. */
template <int K> __device__ void store_part(const struct norm &a, bool last, const float sum[K][8], float *total)
{
    const int wide = (int)blockDim.x * K * 8, cols = (int)a.cols;
    float *part = a.part + blockIdx.x * a.cols;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int at = (int)(threadIdx.x + k * blockDim.x) * 8;
        float4 *to = (float4 *)(void *)(blockDim.y > 1 ? total + (int)threadIdx.y * wide + at : part + at);
        if (k == K - 1 && !last)
            break;
        to[0] = make_float4(sum[k][0], sum[k][1], sum[k][2], sum[k][3]);
        to[1] = make_float4(sum[k][4], sum[k][5], sum[k][6], sum[k][7]);
    }
    if (blockDim.y == 1)
        return;
    __syncthreads();
#pragma unroll 1
    for (int c = (int)(threadIdx.y * blockDim.x + threadIdx.x) * 4; c < cols; c += (int)(blockDim.x * blockDim.y) * 4) {
        float4 s = *(const float4 *)(const void *)(total + c);
#pragma unroll 4
        for (int y = 1; y < (int)blockDim.y; y++) {
            const float4 v = *(const float4 *)(const void *)(total + y * wide + c);
            s = make_float4(s.x + v.x, s.y + v.y, s.z + v.z, s.w + v.w);
        }
        *(float4 *)(void *)(part + c) = s;
    }
}

/* Blocks that stay, blockDim.y rows at a time, each by blockDim.x threads (a warp: no barriers). The next row is on its way while this one is summed,
 * where registers allow it. As few instructions as it takes: where products have brought the clock down they are what a row costs. SAVED: with rstd. */
template <int K, bool SAVED, bool F32> __global__ void __launch_bounds__(NORM_THREADS, 1) norm_bwd_kernel(const __grid_constant__ struct norm a)
{
    extern __shared__ float total[];
    __shared__ __align__(16) float slot[2][2][SLOTS];
    constexpr bool AHEAD = K < 4;
    const uint32_t step = gridDim.x * blockDim.y, vecs = (uint32_t)(a.cols / 8), n = (uint32_t)a.n, me = threadIdx.y * blockDim.x + threadIdx.x;
    const bool last = has_last<K>(a);
    struct piece<K> now = {}, next = {};
    uint4 held[K];
    float sum[K][8] = {};
    int turn = 0;
    uint32_t t = blockIdx.x * blockDim.y + threadIdx.y; /* from the end: what was written last lies in the L2 still */
    uint32_t at = (n - 1 - t) * vecs + threadIdx.x;
    launch_after();
    if (AHEAD && t < n)
        load_piece<K, SAVED>(a, n - 1 - t, at, last, &next);
    hold_weight<K, F32>(a, last, held);
    for (uint32_t i = me; i < 4 * SLOTS; i += blockDim.x * blockDim.y)
        (&slot[0][0][0])[i] = 0;
    __syncthreads();
    for (; t < n; t += step, at -= step * vecs, turn ^= 1) {
        if (AHEAD) {
            const uint32_t ahead = t + step < n ? step : 0; /* behind the last one the same again: a branch would cost more */
            now = next;
            load_piece<K, SAVED>(a, n - 1 - t - ahead, at - ahead * vecs, last, &next);
        } else {
            load_piece<K, SAVED>(a, n - 1 - t, at, last, &now);
        }
        const float2 s = row_sums<K, SAVED, F32>(a, now, last, held, slot[turn]);
        const float r = SAVED ? now.rstd : rsqrtf(s.y / (float)a.cols + a.eps);
        finish_piece<K, F32>(a, at, now, last, held, r, vec8::divided(r * r * s.x, (float)a.cols, a.per_col), sum);
    }
    if (a.part != NULL)
        store_part<K>(a, last, sum, total);
}

/* Any number of columns: single elements; the block's sums of dw lie in its row of part, which begins as zeros. */
__global__ void __launch_bounds__(256) norm_bwd_any_kernel(const struct norm a)
{
    __shared__ float2 slot[2][32];
    int turn = 0;
    launch_after();
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x, turn ^= 1) {
        float gx = 0, xx = 0;
        for (int64_t c = threadIdx.x; c < a.cols; c += 256) {
            float x[1], dy[1], w[1] = {1};
            vec8::load<1>(a.x + t * a.cols + c, x);
            vec8::load<1>(a.dy + t * a.cols + c, dy);
            if (a.w.data != NULL)
                vec8::load_vector<1>(a.w, c, w);
            gx += dy[0] * w[0] * x[0];
            xx += x[0] * x[0];
        }
        gx = vec8::warp_sum(gx);
        xx = vec8::warp_sum(xx);
        if (threadIdx.x % 32 == 0)
            slot[turn][threadIdx.x / 32] = make_float2(gx, xx);
        __syncthreads();
        gx = xx = 0;
        for (int i = 0; i < 8; i++) {
            gx += slot[turn][i].x;
            xx += slot[turn][i].y;
        }
        const float r = a.rstd != NULL ? a.rstd[t] : rsqrtf(xx / (float)a.cols + a.eps), k = r * r * gx / (float)a.cols;
        for (int64_t c = threadIdx.x; c < a.cols; c += 256) {
            float x[1], dy[1], w[1] = {1}, dx[1] = {0};
            vec8::load<1>(a.x + t * a.cols + c, x);
            vec8::load<1>(a.dy + t * a.cols + c, dy);
            if (a.w.data != NULL)
                vec8::load_vector<1>(a.w, c, w);
            if (a.accumulate)
                vec8::load<1>(a.dx + t * a.cols + c, dx);
            if (a.part != NULL)
                a.part[blockIdx.x * a.cols + c] += dy[0] * r * x[0];
            dx[0] += r * (dy[0] * w[0] - x[0] * k);
            vec8::store<1>(a.dx + t * a.cols + c, dx);
            x[0] *= r * w[0];
            if (a.y != NULL)
                vec8::store<1>(a.y + t * a.cols + c, x);
        }
    }
}

struct norm_launch {
    void (*kernel)(const struct norm);
    dim3 block;
    size_t shared;
    bool wide;
};

template <int K> void (*kernel_of(const struct norm *a))(const struct norm)
{
    if (a->w.f32)
        return a->rstd != NULL ? norm_bwd_kernel<K, true, true> : norm_bwd_kernel<K, false, true>;
    return a->rstd != NULL ? norm_bwd_kernel<K, true, false> : norm_bwd_kernel<K, false, false>;
}

/* Two vectors a thread as long as a block holds the row so, else four: of a row's vectors all but the last of a thread are there then. Rows beside each
 * other have barriers 1 to 15. Rows, a turn of the grid beyond the last too, and vectors are counted in 32 bits. */
struct norm_launch choose_norm(const struct norm *a)
{
    const int64_t vecs = a->cols / 8, each = vecs <= 64 * 16 ? 2 : 4;
    const unsigned warps = (unsigned)((vecs + 32 * each - 1) / (32 * each));
    struct norm_launch l = {norm_bwd_any_kernel, dim3(256), 0, false};
    if (a->cols % 8 != 0 || warps > 16 || !aligned16(a->dy) || !aligned16(a->x) || !aligned16(a->dx) || !aligned16(a->y) || !aligned16(a->w.data) ||
        (a->n + ((int64_t)1 << 16)) * vecs >= (int64_t)1 << 32)
        return l;
    const unsigned rows = NORM_THREADS / (32 * warps);
    const bool two = each == 2 && vecs > 32 * warps;
    l.kernel = each == 4 ? kernel_of<4>(a) : two ? kernel_of<2>(a) : kernel_of<1>(a);
    l.block = dim3(32 * warps, rows);
    l.shared = rows > 1 ? rows * (two ? 2 : 1) * 8 * 32 * warps * sizeof(float) : 0; /* 32 KiB at most */
    l.wide = true;
    return l;
}

/* ---- silu ---- */

struct swiglu {
    const bf16 *gate, *up, *dh;
    bf16 *dgate, *dup, *h;
    int64_t ld, n, I;
};

template <int N> __device__ void swiglu_bwd_at(const struct swiglu &a, int64_t t, int64_t j)
{
    float g[N], u[N], dh[N], h[N];
    const int64_t at = t * a.ld + j, dense = t * a.I + j;
    vec8::load<N>(a.gate + at, g);
    vec8::load<N>(a.up + at, u);
    vec8::load<N>(a.dh + dense, dh);
#pragma unroll
    for (int i = 0; i < N; i++) {
        /* silu as swiglu_fwd (quant.cu) has it: h comes out in the same bits */
        const float e = 1 + __expf(-g[i]), s = __fdividef(1, e), silu = __fdividef(g[i], e);
        h[i] = silu * u[i];
        u[i] = dh[i] * u[i] * s * (1 + g[i] * (1 - s));
        g[i] = dh[i] * silu;
    }
    vec8::store<N>(a.dgate + at, u);
    vec8::store<N>(a.dup + at, g);
    if (a.h != NULL)
        vec8::store<N>(a.h + dense, h);
}

template <int N, class Index> __global__ void __launch_bounds__(256) swiglu_bwd_kernel(const struct swiglu a)
{
    const Index per = (Index)(a.I / N), all = (Index)a.n * per, step = (Index)gridDim.x * 256;
    for (Index i = (Index)blockIdx.x * 256 + threadIdx.x; i < all; i += step)
        swiglu_bwd_at<N>(a, i / per, (int64_t)(i % per) * N);
}

}

enum rt_status rt_cuda_add_columns(struct rt_queue *q, const float *part, int rows, int64_t cols, void *dw, bool first, struct rt_err *err)
{
    return rt_cuda_check(launch(q, add_columns_kernel, (unsigned)((cols + COLUMNS - 1) / COLUMNS), COLUMNS * STRANDS, 0, 1, part, rows, cols, (bf16 *)dw, !first),
                         "add_columns", err);
}

enum rt_status rt_cuda_norm_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_norm_bwd_args *a, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct norm k = {};
    struct norm_launch l;
    unsigned blocks;
    if (a->n <= 0)
        return RT_OK;
    if (a->w != NULL && (a->w->rows * a->w->cols != a->cols || (a->w->dtype != RT_BF16 && a->w->dtype != RT_F32)))
        RT_FAIL(err, SHAPE, "norm_bwd: a norm of %ld x %ld (%s), expected %ld of BF16 or F32", (long)a->w->rows, (long)a->w->cols,
                rt_dtype_name(a->w->dtype), (long)a->cols);
    k.dy = (const bf16 *)a->dy;
    k.x = (const bf16 *)a->x;
    k.dx = (bf16 *)a->dx;
    k.y = (bf16 *)a->y;
    k.w = vec8::vector_of(a->w);
    k.rstd = a->rstd;
    k.n = a->n;
    k.cols = a->cols;
    k.eps = a->eps;
    k.per_col = 1.0f / (float)a->cols;
    k.accumulate = a->accumulate;
    l = choose_norm(&k);
    blocks = blocks_for(dev, a->n, (int)l.block.y, resident((const void *)l.kernel, (int)(l.block.x * l.block.y), l.shared));
    if (a->dw != NULL) {
        RT_TRY(rt_cuda_temp(q, (size_t)blocks * (size_t)a->cols * sizeof(float), &k.part, err));
        if (!l.wide)
            RT_CUDA_TRY(cudaMemsetAsync(k.part, 0, (size_t)blocks * (size_t)a->cols * sizeof(float), q->stream));
    }
    RT_CUDA_TRY(launch(q, l.kernel, blocks, l.block, l.shared, 1, k));
    if (a->dw != NULL)
        RT_TRY(rt_cuda_add_columns(q, k.part, (int)blocks, a->cols, a->dw, a->first, err));
out:
    rt_cuda_temp_free(q, k.part);
    return st;
}

enum rt_status rt_cuda_swiglu_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_swiglu_bwd_args *a, struct rt_err *err)
{
    if (a->n <= 0 || a->I <= 0)
        return RT_OK;
    struct swiglu k = {};
    k.gate = (const bf16 *)a->gate;
    k.up = (const bf16 *)a->up;
    k.dh = (const bf16 *)a->dh;
    k.dgate = (bf16 *)a->dgate;
    k.dup = (bf16 *)a->dup;
    k.h = (bf16 *)a->h;
    k.ld = a->ld != 0 ? a->ld : a->I;
    k.n = a->n;
    k.I = a->I;
    const bool wide = k.ld % 8 == 0 && k.I % 8 == 0 && aligned16(k.gate) && aligned16(k.up) && aligned16(k.dh) && aligned16(k.dgate) &&
                      aligned16(k.dup) && aligned16(k.h);
    const int64_t work = a->n * (a->I / (wide ? 8 : 1));
    const unsigned blocks = blocks_for(dev, work, 256, 16);
    const bool small = work < (int64_t)1 << 31; /* 32-bit division is several times faster */
    if (wide && small)
        swiglu_bwd_kernel<8, uint32_t><<<blocks, 256, 0, q->stream>>>(k);
    else if (wide)
        swiglu_bwd_kernel<8, uint64_t><<<blocks, 256, 0, q->stream>>>(k);
    else
        swiglu_bwd_kernel<1, uint64_t><<<blocks, 256, 0, q->stream>>>(k);
    return rt_cuda_launched("swiglu_bwd", err);
}
