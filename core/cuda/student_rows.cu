/* Rows of the student's backward: heads (norm and rotation), norms, silu.
 *
 * A thread holds eight neighbouring elements where rows allow it (16-byte accesses), else one. Gradients of norm weights are summed in float32 in
 * two steps of fixed order: each block over the rows that it takes, then column by column over the blocks.
 */
#include <cuda_bf16.h>

#include "core/cuda/cuda.h"
#include "core/cuda/student_rows.h"
#include "core/cuda/vec8.cuh"

namespace {

using vec8::aligned16;
using vec8::smaller;
typedef __nv_bfloat16 bf16;

/* ---- gradients of vectors ---- */

/* dw[c] += sum over rows of part [rows, cols]: 32 columns a block, 32 strands of rows. */
__global__ void add_columns_kernel(const float *__restrict__ part, int rows, int64_t cols, bf16 *__restrict__ dw)
{
    __shared__ float strand[32][33];
    const int64_t c = (int64_t)blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    for (int r = (int)threadIdx.y; r < rows && c < cols; r += 32)
        sum += part[(int64_t)r * cols + c];
    strand[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || c >= cols)
        return;
    for (int i = 1; i < 32; i++)
        sum += strand[i][threadIdx.x];
    dw[c] = __float2bfloat16_rn(__bfloat162float(dw[c]) + sum);
}

/* ---- heads ---- */

struct heads {
    const bf16 *x;       /* input of the forward */
    const bf16 *dy;      /* backward only */
    bf16 *out;           /* y, or dx */
    int64_t ldx, lddy, ldout, n;
    struct vec8::vector w;
    float *rstd;         /* forward: written or NULL */
    const float *saved;  /* backward: what forward wrote, or NULL */
    const float *cos, *sin;
    const int32_t *position;
    float *part;         /* backward: [blocks, d] or NULL */
    int heads, d, lanes; /* lanes of one head: a power of two */
    float eps;
};

/* Elements j and j + d/2 of a head, N of each: the pairs of the rotation. */
template <int N> struct halves {
    float lo[N], hi[N];
};

template <int N> __device__ void load_halves(const bf16 *p, int half, struct halves<N> *v)
{
    vec8::load<N>(p, v->lo);
    vec8::load<N>(p + half, v->hi);
}

template <int N> __device__ void store_halves(bf16 *p, int half, const struct halves<N> *v)
{
    vec8::store<N>(p, v->lo);
    vec8::store<N>(p + half, v->hi);
}

/* sign 1: by the angle; -1: back. */
template <int N> __device__ void turn(const struct heads &a, int64_t at, float sign, struct halves<N> *v)
{
    float c[N], s[N];
    vec8::load<N>(a.cos + at, c);
    vec8::load<N>(a.sin + at, s);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float u = v->lo[i], w = v->hi[i], si = sign * s[i];
        v->lo[i] = u * c[i] - w * si;
        v->hi[i] = u * si + w * c[i];
    }
}

template <int N> __device__ float dot(const struct halves<N> &a, const struct halves<N> &b)
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        sum += a.lo[i] * b.lo[i] + a.hi[i] * b.hi[i];
    return sum;
}

/* A group of a.lanes lanes takes a head at a time; with N = 8 the head lies in its registers, else it is walked. All lanes of a warp run the same
 * number of rounds (`live` says who has work), so that they meet in the shuffles. */
template <int N, bool NORM> __global__ void __launch_bounds__(256) heads_fwd_kernel(const struct heads a)
{
    const int half = a.d / 2, lane = (int)threadIdx.x % a.lanes;
    const int64_t groups = (int64_t)gridDim.x * (256 / a.lanes), all = a.n * a.heads;
    for (int64_t g = (int64_t)blockIdx.x * (256 / a.lanes) + threadIdx.x / a.lanes; g - threadIdx.x / a.lanes < all; g += groups) {
        const bool live = g < all;
        const int64_t t = live ? g / a.heads : 0, h = live ? g % a.heads : 0;
        const bf16 *x = a.x + t * a.ldx + h * a.d;
        struct halves<N> v;
        float rstd = 1;
        if (NORM) {
            float sum = 0;
            for (int j = lane * N; live && j < half; j += a.lanes * N) {
                load_halves<N>(x + j, half, &v);
                sum += dot<N>(v, v);
            }
            rstd = rsqrtf(vec8::warp_sum(sum, a.lanes) / (float)a.d + a.eps);
            if (live && lane == 0 && a.rstd != NULL)
                a.rstd[g] = rstd;
        }
        const int64_t turn_at = live ? (int64_t)a.position[t] * half : 0;
        for (int j = lane * N; live && j < half; j += a.lanes * N) {
            load_halves<N>(x + j, half, &v);
            if (NORM) {
                struct halves<N> w;
                vec8::load_vector<N>(a.w, j, w.lo);
                vec8::load_vector<N>(a.w, j + half, w.hi);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    v.lo[i] *= rstd * w.lo[i];
                    v.hi[i] *= rstd * w.hi[i];
                }
            }
            turn<N>(a, turn_at + j, 1, &v);
            store_halves<N>(a.out + t * a.ldout + h * a.d + j, half, &v);
        }
    }
}

/* Without a norm: the rotation back. */
template <int N> __global__ void __launch_bounds__(256) heads_turn_back_kernel(const struct heads a)
{
    const int half = a.d / 2;
    const int64_t per = half / N, all = a.n * a.heads * per, step = (int64_t)gridDim.x * 256;
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < all; i += step) {
        const int64_t g = i / per, t = g / a.heads, h = g % a.heads;
        const int j = (int)(i % per) * N;
        struct halves<N> v;
        load_halves<N>(a.dy + t * a.lddy + h * a.d + j, half, &v);
        turn<N>(a, (int64_t)a.position[t] * half + j, -1, &v);
        store_halves<N>(a.out + t * a.ldout + h * a.d + j, half, &v);
    }
}

/* What a lane needs of the gradient at a head behind the rotation: dv turned back, and the sums over the head. */
template <int N> __device__ void head_pair(const struct heads &a, int64_t g, int j, struct halves<N> *v, struct halves<N> *dv, struct halves<N> *w)
{
    const int half = a.d / 2;
    const int64_t t = g / a.heads, h = g % a.heads;
    load_halves<N>(a.x + t * a.ldx + h * a.d + j, half, v);
    load_halves<N>(a.dy + t * a.lddy + h * a.d + j, half, dv);
    turn<N>(a, (int64_t)a.position[t] * half + j, -1, dv);
    vec8::load_vector<N>(a.w, j, w->lo);
    vec8::load_vector<N>(a.w, j + half, w->hi);
}

template <int N> __device__ float weighted(const struct halves<N> &v, const struct halves<N> &dv, const struct halves<N> &w)
{
    float gx = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        gx += dv.lo[i] * w.lo[i] * v.lo[i] + dv.hi[i] * w.hi[i] * v.hi[i];
    return gx;
}

/* sum += dy x r; dv becomes dx. */
template <int N>
__device__ void head_grad(float r, float c, const struct halves<N> &v, const struct halves<N> &w, struct halves<N> *dv, struct halves<N> *sum)
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        sum->lo[i] += dv->lo[i] * r * v.lo[i];
        sum->hi[i] += dv->hi[i] * r * v.hi[i];
        dv->lo[i] = r * (dv->lo[i] * w.lo[i] - v.lo[i] * c);
        dv->hi[i] = r * (dv->hi[i] * w.hi[i] - v.hi[i] * c);
    }
}

__device__ float head_rstd(const struct heads &a, int64_t g, bool live, float xx)
{
    return a.saved != NULL && live ? a.saved[g] : rsqrtf(xx / (float)a.d + a.eps);
}

/* part[block, :] = sums [rows, d + 1] (shared) over its rows. */
__device__ void store_part(const struct heads &a, const float *sums, int rows)
{
    __syncthreads();
    for (int j = (int)threadIdx.x; a.part != NULL && j < a.d; j += 256) {
        float s = sums[j];
        for (int i = 1; i < rows; i++)
            s += sums[i * (a.d + 1) + j];
        a.part[(int64_t)blockIdx.x * a.d + j] = s;
    }
}

/* a.lanes lanes hold a head in registers, one pair of eights each. dx may be dy: a lane has read what it writes. */
__global__ void __launch_bounds__(256) heads_bwd_kernel(const struct heads a)
{
    extern __shared__ float sums[]; /* [groups of the block][d + 1] */
    const int half = a.d / 2, j = (int)threadIdx.x % a.lanes * 8, in_block = 256 / a.lanes, mine = (int)threadIdx.x / a.lanes;
    const int64_t all = a.n * a.heads;
    struct halves<8> v = {}, dv = {}, w = {}, sum = {};
    for (int64_t first = (int64_t)blockIdx.x * in_block; first < all; first += (int64_t)gridDim.x * in_block) {
        const int64_t g = first + mine;
        const bool live = g < all && j < half;
        float gx = 0, xx = 0;
        if (live) {
            head_pair<8>(a, g, j, &v, &dv, &w);
            gx = weighted<8>(v, dv, w);
            xx = dot<8>(v, v);
        }
        gx = vec8::warp_sum(gx, a.lanes);
        if (a.saved == NULL)
            xx = vec8::warp_sum(xx, a.lanes);
        if (!live)
            continue;
        const float r = head_rstd(a, g, live, xx);
        head_grad<8>(r, r * r * gx / (float)a.d, v, w, &dv, &sum);
        store_halves<8>(a.out + g / a.heads * a.ldout + g % a.heads * a.d + j, half, &dv);
    }
    for (int i = 0; i < 8 && j < half; i++) {
        sums[mine * (a.d + 1) + j + i] = sum.lo[i];
        sums[mine * (a.d + 1) + half + j + i] = sum.hi[i];
    }
    store_part(a, sums, in_block);
}

/* A warp walks a head twice, pair by pair; its sums lie in shared memory. */
__global__ void __launch_bounds__(256) heads_bwd_any_kernel(const struct heads a)
{
    extern __shared__ float sums[]; /* [8][d + 1] */
    const int half = a.d / 2, lane = (int)threadIdx.x % 32, mine = (int)threadIdx.x / 32;
    const int64_t all = a.n * a.heads;
    float *own = sums + mine * (a.d + 1);
    struct halves<1> v, dv, w;
    for (int j = lane; j < a.d; j += 32)
        own[j] = 0;
    __syncwarp();
    for (int64_t g = (int64_t)blockIdx.x * 8 + mine; g < all; g += (int64_t)gridDim.x * 8) {
        float gx = 0, xx = 0;
        for (int j = lane; j < half; j += 32) {
            head_pair<1>(a, g, j, &v, &dv, &w);
            gx += weighted<1>(v, dv, w);
            xx += dot<1>(v, v);
        }
        gx = vec8::warp_sum(gx);
        const float r = head_rstd(a, g, true, vec8::warp_sum(xx)), c = r * r * gx / (float)a.d;
        for (int j = lane; j < half; j += 32) {
            struct halves<1> sum = {};
            head_pair<1>(a, g, j, &v, &dv, &w);
            head_grad<1>(r, c, v, w, &dv, &sum);
            own[j] += sum.lo[0];
            own[j + half] += sum.hi[0];
            store_halves<1>(a.out + g / a.heads * a.ldout + g % a.heads * a.d + j, half, &dv);
        }
    }
    store_part(a, sums, 8);
}

bool heads_wide(const struct heads *a)
{
    const bool w = a->w.data == NULL || aligned16(a->w.data);
    return a->d % 16 == 0 && a->d <= 512 && w && aligned16(a->x) && aligned16(a->dy) && aligned16(a->out) && a->ldx % 8 == 0 &&
           a->lddy % 8 == 0 && a->ldout % 8 == 0 && aligned16(a->cos) && aligned16(a->sin);
}

/* Lanes of one head: a pair of eights a lane, or a warp that walks single pairs. */
void set_lanes(struct heads *a, bool wide)
{
    a->lanes = 32;
    if (wide)
        for (a->lanes = 1; a->lanes < a->d / 16; a->lanes *= 2)
            ;
}

enum rt_status check_heads(const char *op, int d, const struct rt_weight *w, struct rt_err *err)
{
    if (d < 2 || d % 2 != 0 || d > 1024)
        return rt_fail(err, RT_SHAPE, "%s: heads of %d elements, expected an even number up to 1024", op, d);
    if (w != NULL && (w->rows * w->cols != d || (w->dtype != RT_BF16 && w->dtype != RT_F32)))
        return rt_fail(err, RT_SHAPE, "%s: a norm of %ld x %ld (%s), expected %d of BF16 or F32", op, (long)w->rows, (long)w->cols, rt_dtype_name(w->dtype), d);
    return RT_OK;
}

/* Blocks that an SM holds at once: a grid of that many a SM runs in one wave, with one row of partial sums a block. */
int resident(const void *kernel, int threads, size_t shared)
{
    int n = 0;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, threads, shared) == cudaSuccess && n > 0 ? n : 1;
}

unsigned blocks_for(const struct rt_dev *dev, int64_t work, int per_block, int most_per_sm)
{
    const int64_t blocks = (work + per_block - 1) / per_block;
    return (unsigned)smaller(blocks, (int64_t)dev->sm_count * most_per_sm);
}

}

/* ---- norms ---- */

namespace {

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

/* r of row t; saved by the forward, else from the sum of squares. */
__device__ float row_rstd(const struct norm &a, int64_t t, float xx)
{
    return a.rstd != NULL ? a.rstd[t] : rsqrtf(xx / (float)a.cols + a.eps);
}

/* A block takes a row at a time; a thread keeps the columns (threadIdx + i blockDim) * 8 in registers, and their sums of dw. */
template <int K> __global__ void __launch_bounds__(512) norm_bwd_kernel(const struct norm a)
{
    __shared__ float2 slot[2][32];
    float sum[K][8] = {};
    int turn = 0;
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x, turn ^= 1) {
        uint4 px[K], pdy[K], pdx[K];
        float gx = 0, xx = 0;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64_t at = ((int64_t)threadIdx.x + k * blockDim.x) * 8;
            if (at >= a.cols)
                continue;
            px[k] = *(const uint4 *)(const void *)(a.x + t * a.cols + at);
            pdy[k] = *(const uint4 *)(const void *)(a.dy + t * a.cols + at);
            if (a.accumulate)
                pdx[k] = *(const uint4 *)(const void *)(a.dx + t * a.cols + at);
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64_t at = ((int64_t)threadIdx.x + k * blockDim.x) * 8;
            float x[8], dy[8], w[8];
            if (at >= a.cols)
                continue;
            vec8::unpack(px[k], x);
            vec8::unpack(pdy[k], dy);
#pragma unroll
            for (int i = 0; i < 8; i++)
                w[i] = 1;
            if (a.w.data != NULL)
                vec8::load_vector<8>(a.w, at, w);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                gx += dy[i] * w[i] * x[i];
                xx += x[i] * x[i];
            }
        }
        gx = vec8::warp_sum(gx);
        xx = vec8::warp_sum(xx);
        if (threadIdx.x % 32 == 0)
            slot[turn][threadIdx.x / 32] = make_float2(gx, xx);
        __syncthreads();
        gx = xx = 0;
        for (unsigned i = 0; i < blockDim.x / 32; i++) {
            gx += slot[turn][i].x;
            xx += slot[turn][i].y;
        }
        const float r = row_rstd(a, t, xx), c = r * r * gx / (float)a.cols;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int64_t at = ((int64_t)threadIdx.x + k * blockDim.x) * 8;
            float x[8], dy[8], w[8], dx[8];
            if (at >= a.cols)
                continue;
            vec8::unpack(px[k], x);
            vec8::unpack(pdy[k], dy);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                w[i] = 1;
                dx[i] = 0;
            }
            if (a.w.data != NULL)
                vec8::load_vector<8>(a.w, at, w);
            if (a.accumulate)
                vec8::unpack(pdx[k], dx);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum[k][i] += dy[i] * r * x[i];
                dx[i] += r * (dy[i] * w[i] - x[i] * c);
            }
            vec8::store<8>(a.dx + t * a.cols + at, dx);
        }
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int64_t at = ((int64_t)threadIdx.x + k * blockDim.x) * 8;
        for (int i = 0; i < 8 && a.part != NULL && at < a.cols; i++)
            a.part[blockIdx.x * a.cols + at + i] = sum[k][i];
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
        const float r = row_rstd(a, t, xx), k = r * r * gx / (float)a.cols;
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
    int threads;
    bool wide;
};

/* Few threads a row while eight columns each are enough: a short sum over warps. */
struct norm_launch choose_norm(const struct norm *a)
{
    const int64_t vecs = a->cols / 8;
    const bool wide = a->cols % 8 == 0 && vecs <= 4 * 512 && aligned16(a->dy) && aligned16(a->x) && aligned16(a->dx) &&
                      (a->w.data == NULL || aligned16(a->w.data));
    const int K = vecs <= 512 ? 1 : vecs <= 1024 ? 2 : 4;
    const struct norm_launch l = {!wide ? norm_bwd_any_kernel : K == 1 ? norm_bwd_kernel<1> : K == 2 ? norm_bwd_kernel<2> : norm_bwd_kernel<4>,
                                  wide ? (int)((vecs + K - 1) / K + 31) / 32 * 32 : 256, wide};
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
        const float s = __fdividef(1, 1 + __expf(-g[i])), silu = g[i] * s;
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
    add_columns_kernel<<<(unsigned)((cols + 31) / 32), dim3(32, 32), 0, q->stream>>>(part, rows, cols, (bf16 *)dw);
    return rt_cuda_launched("add_columns", err);
}

enum rt_status rt_cuda_headnorm_rope_fwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_headnorm_rope_fwd_args *a, struct rt_err *err)
{
    const int64_t dense = (int64_t)a->heads * a->d;
    const enum rt_status st = check_heads("headnorm_rope_fwd", a->d, a->w, err);
    if (st != RT_OK || a->n <= 0)
        return st;
    struct heads k = {};
    k.x = (const bf16 *)a->x;
    k.out = (bf16 *)a->y;
    k.ldx = a->ldx != 0 ? a->ldx : dense;
    k.ldout = a->ldy != 0 ? a->ldy : dense;
    k.n = a->n;
    k.w = vec8::vector_of(a->w);
    k.rstd = a->rstd;
    k.cos = a->cos;
    k.sin = a->sin;
    k.position = a->position;
    k.heads = a->heads;
    k.d = a->d;
    k.eps = a->eps;
    const bool wide = heads_wide(&k);
    set_lanes(&k, wide);
    const unsigned blocks = blocks_for(dev, a->n * a->heads, 256 / k.lanes, 32);
    if (wide && a->w != NULL)
        heads_fwd_kernel<8, true><<<blocks, 256, 0, q->stream>>>(k);
    else if (wide)
        heads_fwd_kernel<8, false><<<blocks, 256, 0, q->stream>>>(k);
    else if (a->w != NULL)
        heads_fwd_kernel<1, true><<<blocks, 256, 0, q->stream>>>(k);
    else
        heads_fwd_kernel<1, false><<<blocks, 256, 0, q->stream>>>(k);
    return rt_cuda_launched("headnorm_rope_fwd", err);
}

enum rt_status rt_cuda_headnorm_rope_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_headnorm_rope_bwd_args *a, struct rt_err *err)
{
    enum rt_status st;
    const int64_t dense = (int64_t)a->heads * a->d;
    struct heads k = {};
    bool wide;
    unsigned blocks;
    size_t shared;
    RT_TRY(check_heads("headnorm_rope_bwd", a->d, a->w, err));
    if (a->n <= 0)
        return RT_OK;
    k.x = (const bf16 *)a->x;
    k.dy = (const bf16 *)a->dy;
    k.out = (bf16 *)a->dx;
    k.ldx = a->ldx != 0 ? a->ldx : dense;
    k.lddy = a->lddy != 0 ? a->lddy : dense;
    k.ldout = a->lddx != 0 ? a->lddx : dense;
    k.n = a->n;
    k.w = vec8::vector_of(a->w);
    k.saved = a->rstd;
    k.cos = a->cos;
    k.sin = a->sin;
    k.position = a->position;
    k.heads = a->heads;
    k.d = a->d;
    k.eps = a->eps;
    wide = heads_wide(&k);
    set_lanes(&k, wide);
    if (a->w == NULL) {
        blocks = blocks_for(dev, a->n * dense / (wide ? 16 : 2), 256, 16);
        if (wide)
            heads_turn_back_kernel<8><<<blocks, 256, 0, q->stream>>>(k);
        else
            heads_turn_back_kernel<1><<<blocks, 256, 0, q->stream>>>(k);
        return rt_cuda_launched("headnorm_rope_bwd", err);
    }
    shared = (size_t)(256 / k.lanes) * (size_t)(a->d + 1) * sizeof(float);
    blocks = blocks_for(dev, a->n * a->heads, 256 / k.lanes, resident(wide ? (const void *)heads_bwd_kernel : (const void *)heads_bwd_any_kernel, 256, shared));
    if (a->dw != NULL)
        RT_TRY(rt_cuda_temp(q, (size_t)blocks * (size_t)a->d * sizeof(float), &k.part, err));
    if (wide)
        heads_bwd_kernel<<<blocks, 256, shared, q->stream>>>(k);
    else
        heads_bwd_any_kernel<<<blocks, 256, shared, q->stream>>>(k);
    RT_TRY(rt_cuda_launched("headnorm_rope_bwd", err));
    if (a->dw != NULL)
        RT_TRY(rt_cuda_add_columns(q, k.part, (int)blocks, a->d, a->dw, err));
out:
    rt_cuda_temp_free(q, k.part);
    return st;
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
    blocks = blocks_for(dev, a->n, 1, resident((const void *)l.kernel, l.threads, 0));
    if (a->dw != NULL) {
        RT_TRY(rt_cuda_temp(q, (size_t)blocks * (size_t)a->cols * sizeof(float), &k.part, err));
        if (!l.wide)
            RT_CUDA_TRY(cudaMemsetAsync(k.part, 0, (size_t)blocks * (size_t)a->cols * sizeof(float), q->stream));
    }
    l.kernel<<<blocks, l.threads, 0, q->stream>>>(k);
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
