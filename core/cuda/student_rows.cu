/* Rows of the student's backward: norms and silu.
 *
 * A thread holds eight neighbouring elements where rows allow it (16-byte accesses), else one. Gradients of norm weights are summed
 * in float32 in two steps of fixed order: each block over the rows that it takes, then column by column over the blocks.
 */
#include <cuda_bf16.h>

#include "core/cuda/cuda.h"
#include "core/cuda/student_rows.h"
#include "core/cuda/vec8.cuh"

namespace {

using vec8::aligned16;
using vec8::blocks_for;
using vec8::resident;
typedef __nv_bfloat16 bf16;

/* ---- gradients of vectors ---- */

enum { COLUMNS = 8, STRANDS = 128 };

/* dw[c] += sum over rows of part [rows, cols]: a block takes a sector of columns, in strands of rows that are joined pairwise. */
__global__ void __launch_bounds__(COLUMNS * STRANDS) add_columns_kernel(const float *__restrict__ part, int rows, int64_t cols, bf16 *__restrict__ dw)
{
    __shared__ float strand[STRANDS][COLUMNS + 1];
    const int x = (int)threadIdx.x, y = (int)threadIdx.y;
    const int64_t c = (int64_t)blockIdx.x * COLUMNS + x;
    float sum = 0;
    for (int r = y; r < rows && c < cols; r += STRANDS)
        sum += part[(int64_t)r * cols + c];
    strand[y][x] = sum;
    for (int half = STRANDS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (y < half)
            strand[y][x] += strand[y + half][x];
    }
    if (y == 0 && c < cols)
        dw[c] = __float2bfloat16_rn(__bfloat162float(dw[c]) + strand[0][x]);
}

struct norm {
    const bf16 *dy, *x;
    bf16 *dx;
    struct vec8::vector w;
    const float *rstd;
    float *part; /* [blocks, cols] or NULL */
    int64_t n, cols;
    float eps;
    bool accumulate;
};

/* r of a row; saved by the forward, else from the sum of squares. */
__device__ float row_rstd(const struct norm &a, float saved, float xx)
{
    return a.rstd != NULL ? saved : rsqrtf(xx / (float)a.cols + a.eps);
}

/* What a thread holds of a row: the columns (threadIdx.x + k blockDim.x) * 8, as they lie in memory. */
template <int K> struct piece {
    uint4 x[K], dy[K], dx[K];
    float rstd; /* where it is saved */
};

__device__ inline int column(int k)
{
    return (int)(threadIdx.x + k * blockDim.x) * 8;
}

template <int K> __device__ void load_piece(const struct norm &a, int64_t t, struct piece<K> *p)
{
    p->rstd = a.rstd != NULL ? a.rstd[t] : 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int64_t at = t * a.cols + column(k);
        if (column(k) >= a.cols)
            continue;
        p->x[k] = *(const uint4 *)(const void *)(a.x + at);
        p->dy[k] = *(const uint4 *)(const void *)(a.dy + at);
        if (a.accumulate)
            p->dx[k] = *(const uint4 *)(const void *)(a.dx + at);
    }
}

enum { ONES = 0x3f803f80 }; /* two bf16 */

/* The weight of a thread's columns: held (bf16 or none), or read for each row (float32). */
template <int K> __device__ void hold_weight(const struct norm &a, uint4 held[K])
{
#pragma unroll
    for (int k = 0; k < K; k++) {
        held[k] = make_uint4(ONES, ONES, ONES, ONES);
        if (a.w.data != NULL && !a.w.f32 && column(k) < a.cols)
            held[k] = *(const uint4 *)((const bf16 *)a.w.data + column(k));
    }
}

__device__ inline void weight_of(const struct norm &a, const uint4 &held, int at, float w[8])
{
    if (a.w.f32)
        vec8::load<8>((const float *)a.w.data + at, w);
    else
        vec8::unpack(held, w);
}

/* Sums over the row of dy w x and, where there is no rstd, of x x, to all of its threads: blockDim.x of them. */
template <int K> __device__ float2 row_sums(const struct norm &a, const struct piece<K> &p, const uint4 held[K], float2 *slot)
{
    float gx = 0, xx = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        float x[8], dy[8], w[8];
        if (column(k) >= a.cols)
            continue;
        vec8::unpack(p.x[k], x);
        vec8::unpack(p.dy[k], dy);
        weight_of(a, held[k], column(k), w);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            gx += dy[i] * w[i] * x[i];
            xx += x[i] * x[i];
        }
    }
    gx = vec8::warp_sum(gx);
    if (a.rstd == NULL)
        xx = vec8::warp_sum(xx);
    if (blockDim.x == 32)
        return make_float2(gx, xx);
    if (threadIdx.x % 32 == 0)
        slot[threadIdx.x / 32] = make_float2(gx, xx);
    __syncthreads();
    gx = xx = 0;
    for (unsigned i = 0; i < blockDim.x / 32; i++) {
        gx += slot[i].x;
        xx += slot[i].y;
    }
    return make_float2(gx, xx);
}

/* dx of the row; sum += dy x r. */
template <int K> __device__ void finish_piece(const struct norm &a, int64_t t, const struct piece<K> &p, const uint4 held[K], float r, float c, float sum[K][8])
{
#pragma unroll
    for (int k = 0; k < K; k++) {
        float x[8], dy[8], w[8], dx[8] = {};
        if (column(k) >= a.cols)
            continue;
        vec8::unpack(p.x[k], x);
        vec8::unpack(p.dy[k], dy);
        weight_of(a, held[k], column(k), w);
        if (a.accumulate)
            vec8::unpack(p.dx[k], dx);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[k][i] += dy[i] * r * x[i];
            dx[i] += r * (dy[i] * w[i] - x[i] * c);
        }
        vec8::store<8>(a.dx + t * a.cols + column(k), dx);
    }
}

/* A warp a row and 4 rows a block where rows are short (blockDim {32, 4}: no barriers), else a block a row (blockDim {32 w, 1}). AHEAD: the next row is on
 * its way while this one is summed, where registers allow it. */
enum { NORM_ROWS = 4 };
template <int K, bool AHEAD> __global__ void __launch_bounds__(512, 1) norm_bwd_kernel(const struct norm a)
{
    __shared__ float2 slot[2][32];
    __shared__ float total[K * 32 * 8]; /* of a block's rows, where it has several */
    const int64_t step = (int64_t)gridDim.x * blockDim.y;
    struct piece<K> now, next = {};
    uint4 held[K];
    float sum[K][8] = {};
    int turn = 0;
    int64_t t = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    hold_weight<K>(a, held);
    if (AHEAD && t < a.n)
        load_piece<K>(a, t, &next);
    for (; t < a.n; t += step, turn ^= 1) {
        if (AHEAD) {
            now = next;
            if (t + step < a.n)
                load_piece<K>(a, t + step, &next);
        } else {
            load_piece<K>(a, t, &now);
        }
        const float2 s = row_sums<K>(a, now, held, slot[turn]);
        const float r = row_rstd(a, now.rstd, s.y);
        finish_piece<K>(a, t, now, held, r, r * r * s.x / (float)a.cols, sum);
    }
    if (a.part == NULL)
        return;
    for (unsigned y = 0; y + 1 < blockDim.y; y++) { /* rows of the block in ascending order; the last one keeps the sum */
        if (threadIdx.y == y)
            for (int k = 0; k < K; k++)
                for (int i = 0; i < 8; i++)
                    total[column(k) + i] = sum[k][i];
        __syncthreads();
        if (threadIdx.y == y + 1)
            for (int k = 0; k < K; k++)
                for (int i = 0; i < 8; i++)
                    sum[k][i] += total[column(k) + i];
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < K; k++)
        if (threadIdx.y + 1 == blockDim.y && column(k) < a.cols) {
            float4 *to = (float4 *)(void *)(a.part + blockIdx.x * a.cols + column(k));
            to[0] = make_float4(sum[k][0], sum[k][1], sum[k][2], sum[k][3]);
            to[1] = make_float4(sum[k][4], sum[k][5], sum[k][6], sum[k][7]);
        }
}

/* Any number of columns: single elements; the block's sums of dw lie in its row of part, which begins as zeros. */
__global__ void __launch_bounds__(256) norm_bwd_any_kernel(const struct norm a)
{
    __shared__ float2 slot[2][32];
    int turn = 0;
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
        const float r = row_rstd(a, a.rstd != NULL ? a.rstd[t] : 0, xx), k = r * r * gx / (float)a.cols;
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
        }
    }
}

struct norm_launch {
    void (*kernel)(const struct norm);
    dim3 block;
    bool wide;
};

/* Two vectors a thread as long as a block holds the row so, else four. */
struct norm_launch choose_norm(const struct norm *a)
{
    const int64_t vecs = a->cols / 8, each = vecs <= 64 * 16 ? 2 : 4;
    const unsigned warps = (unsigned)((vecs + 32 * each - 1) / (32 * each));
    struct norm_launch l = {norm_bwd_any_kernel, dim3(256), false};
    if (a->cols % 8 != 0 || warps > 16 || !aligned16(a->dy) || !aligned16(a->x) || !aligned16(a->dx) || !aligned16(a->w.data))
        return l;
    l.kernel = each == 4 ? norm_bwd_kernel<4, false> : vecs > 32 * warps ? norm_bwd_kernel<2, true> : norm_bwd_kernel<1, true>;
    l.block = dim3(32 * warps, warps == 1 ? NORM_ROWS : 1);
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

enum rt_status rt_cuda_add_columns(struct rt_queue *q, const float *part, int rows, int64_t cols, void *dw, struct rt_err *err)
{
    add_columns_kernel<<<(unsigned)((cols + COLUMNS - 1) / COLUMNS), dim3(COLUMNS, STRANDS), 0, q->stream>>>(part, rows, cols, (bf16 *)dw);
    return rt_cuda_launched("add_columns", err);
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
    k.w = vec8::vector_of(a->w);
    k.rstd = a->rstd;
    k.n = a->n;
    k.cols = a->cols;
    k.eps = a->eps;
    k.accumulate = a->accumulate;
    l = choose_norm(&k);
    blocks = blocks_for(dev, a->n, (int)l.block.y, resident((const void *)l.kernel, (int)(l.block.x * l.block.y), 0));
    if (a->dw != NULL) {
        RT_TRY(rt_cuda_temp(q, (size_t)blocks * (size_t)a->cols * sizeof(float), &k.part, err));
        if (!l.wide)
            RT_CUDA_TRY(cudaMemsetAsync(k.part, 0, (size_t)blocks * (size_t)a->cols * sizeof(float), q->stream));
    }
    l.kernel<<<blocks, l.block, 0, q->stream>>>(k);
    RT_TRY(rt_cuda_launched("norm_bwd", err));
    if (a->dw != NULL)
        RT_TRY(rt_cuda_add_columns(q, k.part, (int)blocks, a->cols, a->dw, err));
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
