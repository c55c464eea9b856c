/* Heads of the student: norm over a head and rotation, forward and backward.
 *
 * A group of lanes holds a head in registers, a pair of eights a lane (16-byte accesses), where its size allows it; else a warp walks it.
 * The gradient of the norm's weight: each lane sums over the heads that it takes, each block over its lanes, then the blocks' rows are
 * added, all in fixed order.
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

template <int N> struct angles {
    float cos[N], sin[N];
};

/* sign 1: by the angle; -1: back. */
template <int N> __device__ struct angles<N> load_angles(const struct heads &a, int64_t at, float sign)
{
    struct angles<N> by;
    vec8::load<N>(a.cos + at, by.cos);
    vec8::load<N>(a.sin + at, by.sin);
#pragma unroll
    for (int i = 0; i < N; i++)
        by.sin[i] *= sign;
    return by;
}

template <int N> __device__ void turn_by(const struct angles<N> &by, struct halves<N> *v)
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float u = v->lo[i], w = v->hi[i];
        v->lo[i] = u * by.cos[i] - w * by.sin[i];
        v->hi[i] = u * by.sin[i] + w * by.cos[i];
    }
}

template <int N> __device__ void turn(const struct heads &a, int64_t at, float sign, struct halves<N> *v)
{
    turn_by<N>(load_angles<N>(a, at, sign), v);
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
template <int N> __global__ void __launch_bounds__(256) heads_fwd_kernel(const struct heads a)
{
    const int half = a.d / 2, lane = (int)threadIdx.x % a.lanes;
    const int64_t groups = (int64_t)gridDim.x * (256 / a.lanes), all = a.n * a.heads;
    for (int64_t g = (int64_t)blockIdx.x * (256 / a.lanes) + threadIdx.x / a.lanes; g - threadIdx.x / a.lanes < all; g += groups) {
        const bool live = g < all;
        const int64_t t = live ? g / a.heads : 0, h = live ? g % a.heads : 0;
        const bf16 *x = a.x + t * a.ldx + h * a.d;
        struct halves<N> v;
        float sum = 0;
        for (int j = lane * N; live && j < half; j += a.lanes * N) {
            load_halves<N>(x + j, half, &v);
            sum += dot<N>(v, v);
        }
        const float rstd = rsqrtf(vec8::warp_sum(sum, a.lanes) / (float)a.d + a.eps);
        if (live && lane == 0 && a.rstd != NULL)
            a.rstd[g] = rstd;
        const int64_t turn_at = live ? (int64_t)a.position[t] * half : 0;
        for (int j = lane * N; live && j < half; j += a.lanes * N) {
            load_halves<N>(x + j, half, &v);
            struct halves<N> w;
            vec8::load_vector<N>(a.w, j, w.lo);
            vec8::load_vector<N>(a.w, j + half, w.hi);
#pragma unroll
            for (int i = 0; i < N; i++) {
                v.lo[i] *= rstd * w.lo[i];
                v.hi[i] *= rstd * w.hi[i];
            }
            turn<N>(a, turn_at + j, 1, &v);
            store_halves<N>(a.out + t * a.ldout + h * a.d + j, half, &v);
        }
    }
}

/* Without a norm: the rotation alone, by the angle (sign 1) or back (-1), of rows `from` into a.out. A thread takes the same pairs of several heads, whose
 * angles are the same. */
enum { TURN_HEADS = 4 };

template <int N, class Index>
__global__ void __launch_bounds__(256) heads_turn_kernel(const struct heads a, const bf16 *from, int64_t ld, float sign)
{
    const int half = a.d / 2;
    const Index per = (Index)(half / N), groups = (Index)((a.heads + TURN_HEADS - 1) / TURN_HEADS), all = (Index)a.n * groups * per;
    for (Index i = (Index)blockIdx.x * 256 + threadIdx.x; i < all; i += (Index)gridDim.x * 256) {
        const Index g = i / per;
        const int64_t t = g / groups;
        const int first = (int)(g % groups) * TURN_HEADS, j = (int)(i % per) * N;
        struct halves<N> v[TURN_HEADS];
#pragma unroll
        for (int h = 0; h < TURN_HEADS; h++)
            if (first + h < a.heads)
                load_halves<N>(from + t * ld + (first + h) * a.d + j, half, &v[h]);
        const struct angles<N> by = load_angles<N>(a, (int64_t)a.position[t] * half + j, sign);
#pragma unroll
        for (int h = 0; h < TURN_HEADS; h++)
            if (first + h < a.heads) {
                turn_by<N>(by, &v[h]);
                store_halves<N>(a.out + t * a.ldout + (first + h) * a.d + j, half, &v[h]);
            }
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

void launch_turn(const struct rt_dev *dev, struct rt_queue *q, const struct heads &k, bool wide, const bf16 *from, int64_t ld, float sign)
{
    const int64_t work = k.n * ((k.heads + TURN_HEADS - 1) / TURN_HEADS) * (k.d / (wide ? 16 : 2));
    const unsigned blocks = blocks_for(dev, work, 256, 16);
    const bool small = work < (int64_t)1 << 31; /* 32-bit division is several times faster */
    if (wide && small)
        heads_turn_kernel<8, uint32_t><<<blocks, 256, 0, q->stream>>>(k, from, ld, sign);
    else if (wide)
        heads_turn_kernel<8, uint64_t><<<blocks, 256, 0, q->stream>>>(k, from, ld, sign);
    else
        heads_turn_kernel<1, uint64_t><<<blocks, 256, 0, q->stream>>>(k, from, ld, sign);
}

enum rt_status check_heads(const char *op, int d, const struct rt_weight *w, struct rt_err *err)
{
    if (d < 2 || d % 2 != 0 || d > 1024)
        return rt_fail(err, RT_SHAPE, "%s: heads of %d elements, expected an even number up to 1024", op, d);
    if (w != NULL && (w->rows * w->cols != d || (w->dtype != RT_BF16 && w->dtype != RT_F32)))
        return rt_fail(err, RT_SHAPE, "%s: a norm of %ld x %ld (%s), expected %d of BF16 or F32", op, (long)w->rows, (long)w->cols, rt_dtype_name(w->dtype), d);
    return RT_OK;
}

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
    if (a->w == NULL)
        launch_turn(dev, q, k, wide, k.x, k.ldx, 1);
    else if (wide)
        heads_fwd_kernel<8><<<blocks, 256, 0, q->stream>>>(k);
    else
        heads_fwd_kernel<1><<<blocks, 256, 0, q->stream>>>(k);
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
        launch_turn(dev, q, k, wide, k.dy, k.lddy, -1);
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
