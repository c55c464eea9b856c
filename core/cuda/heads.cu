/* Heads of the student: norm over a head and rotation, forward and backward.
 *
 * A group of lanes holds a head in registers, a pair of eights a lane (16-byte accesses), where its size allows it; else a warp walks it.
 * The gradient of the norm's weight: each lane sums over the heads that it takes, each block over its lanes, then the blocks' rows are
 * added, all in fixed order.
 */
#include <cuda_bf16.h>

#include "core/cuda/cuda.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/student_rows.h"
#include "core/cuda/turn.cuh"

namespace {

using vec8::aligned16;
using vec8::blocks_for;
using vec8::load_packed;
using vec8::packed;
using vec8::resident;

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

/* A thread's part of NORM_HEADS heads of a row: a pair of eights of each. The heads share angles and weights. All lanes of a warp meet in the shuffles,
 * those without work too. */
enum { NORM_HEADS = 2, NORM_BLOCKS = 3 /* an SM: what registers allow */ };

struct place {
    int64_t t;
    int first, j; /* head, column in it */
    bool live;
};

/* i: which group of lanes. */
__device__ inline struct place place_of(const struct heads &a, uint32_t i)
{
    const uint32_t groups = (uint32_t)(a.heads + NORM_HEADS - 1) / NORM_HEADS;
    struct place p;
    p.t = i / groups;
    p.first = (int)(i % groups) * NORM_HEADS;
    p.j = (int)(threadIdx.x & (unsigned)(a.lanes - 1)) * 8;
    p.live = p.t < a.n && p.j < a.d / 2;
    return p;
}

__device__ inline bool has(const struct heads &a, const struct place &p, int h)
{
    return p.live && p.first + h < a.heads;
}

__global__ void __launch_bounds__(256, NORM_BLOCKS) heads_fwd_kernel(const struct heads a)
{
    const int half = a.d / 2;
    const struct place p = place_of(a, ((gridDim.x - 1 - blockIdx.x) * 256 + threadIdx.x) / (unsigned)a.lanes);
    launch_after();
    struct packed<8> lo[NORM_HEADS] = {}, hi[NORM_HEADS] = {};
    struct angles<8> by = {};
    struct halves<8> w = {};
    const int position = p.live ? a.position[p.t] : 0;
#pragma unroll
    for (int h = 0; h < NORM_HEADS; h++)
        if (has(a, p, h)) {
            const bf16 *x = a.x + p.t * a.ldx + (p.first + h) * a.d + p.j;
            lo[h] = load_packed<8>(x);
            hi[h] = load_packed<8>(x + half);
        }
    if (p.live) {
        by = load_angles<8>(a, (int64_t)position * half + p.j, 1);
        vec8::load_vector<8>(a.w, p.j, w.lo);
        vec8::load_vector<8>(a.w, p.j + half, w.hi);
    }
#pragma unroll
    for (int h = 0; h < NORM_HEADS; h++) {
        struct halves<8> v;
        lo[h].unpack(v.lo);
        hi[h].unpack(v.hi);
        const float rstd = rsqrtf(vec8::warp_sum(dot<8>(v, v), a.lanes) / (float)a.d + a.eps);
        if (!has(a, p, h))
            continue;
        if (p.j == 0 && a.rstd != NULL)
            a.rstd[p.t * a.heads + p.first + h] = rstd;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v.lo[i] *= rstd * w.lo[i];
            v.hi[i] *= rstd * w.hi[i];
        }
        turn_by<8>(by, &v);
        store_halves<8>(a.out + p.t * a.ldout + (p.first + h) * a.d + p.j, half, &v);
    }
}

/* Heads of any size: a warp walks one. */
__global__ void __launch_bounds__(256) heads_fwd_any_kernel(const struct heads a)
{
    const int half = a.d / 2, lane = (int)threadIdx.x % 32;
    const int64_t groups = (int64_t)gridDim.x * 8, all = a.n * a.heads;
    for (int64_t g = (int64_t)blockIdx.x * 8 + threadIdx.x / 32; g < all; g += groups) {
        const int64_t t = g / a.heads, h = g % a.heads;
        const bf16 *x = a.x + t * a.ldx + h * a.d;
        struct halves<1> v;
        float sum = 0;
        for (int j = lane; j < half; j += 32) {
            load_halves<1>(x + j, half, &v);
            sum += dot<1>(v, v);
        }
        const float rstd = rsqrtf(vec8::warp_sum(sum) / (float)a.d + a.eps);
        if (lane == 0 && a.rstd != NULL)
            a.rstd[g] = rstd;
        const int64_t turn_at = (int64_t)a.position[t] * half;
        for (int j = lane; j < half; j += 32) {
            struct halves<1> w;
            load_halves<1>(x + j, half, &v);
            vec8::load_vector<1>(a.w, j, w.lo);
            vec8::load_vector<1>(a.w, j + half, w.hi);
            v.lo[0] *= rstd * w.lo[0];
            v.hi[0] *= rstd * w.hi[0];
            turn<1>(a, turn_at + j, 1, &v);
            store_halves<1>(a.out + t * a.ldout + h * a.d + j, half, &v);
        }
    }
}

/* Without a norm: the rotation alone, by the angle (sign 1) or back (-1), of rows `from` into a.out; N pairs a thread, and many blocks: memory is kept busy
 * by their number. The last rows first: they were written last and lie in the L2 still. */
enum { TURN_THREADS = 128, TURN_BLOCKS = 12 /* an SM: what registers allow */ };

template <int N, class Index>
__global__ void __launch_bounds__(TURN_THREADS, TURN_BLOCKS) heads_turn_kernel(const struct heads a, const bf16 *from, int64_t ld, float sign)
{
    const int half = a.d / 2;
    const Index per = (Index)(half / N), heads = (Index)a.heads, i = (Index)(gridDim.x - 1 - blockIdx.x) * TURN_THREADS + threadIdx.x, g = i / per;
    const int64_t t = g / heads;
    const int j = (int)(i % per) * N, column = (int)(g % heads) * a.d + j;
    struct halves<N> v;
    if (t >= a.n)
        return;
    launch_after();
    const int position = a.position[t];
    const struct packed<N> lo = load_packed<N>(from + t * ld + column), hi = load_packed<N>(from + t * ld + column + half);
    const struct angles<N> by = load_angles<N>(a, (int64_t)position * half + j, sign);
    lo.unpack(v.lo);
    hi.unpack(v.hi);
    turn_by<N>(by, &v);
    store_halves<N>(a.out + t * a.ldout + column, half, &v);
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

/* sum += dy x r; dv becomes dx (rounded the same wherever it stands). */
template <int N>
__device__ void head_grad(float r, float c, const struct halves<N> &v, const struct halves<N> &w, struct halves<N> *dv, struct halves<N> *sum)
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        sum->lo[i] += dv->lo[i] * r * v.lo[i];
        sum->hi[i] += dv->hi[i] * r * v.hi[i];
        dv->lo[i] = r * fmaf(dv->lo[i], w.lo[i], -__fmul_rn(v.lo[i], c));
        dv->hi[i] = r * fmaf(dv->hi[i], w.hi[i], -__fmul_rn(v.hi[i], c));
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

/* Heads as heads_fwd_kernel holds them, by blocks that stay. dx may be dy: a lane has read what it writes. */
__global__ void __launch_bounds__(256, 2) heads_bwd_kernel(const struct heads a)
{
    extern __shared__ float sums[]; /* [groups of the block][d + 1] */
    const int half = a.d / 2, mine = (int)threadIdx.x / a.lanes;
    const uint32_t all = (uint32_t)a.n * (uint32_t)((a.heads + NORM_HEADS - 1) / NORM_HEADS), in_block = 256u / (unsigned)a.lanes;
    struct halves<8> sum = {}, w = {};
    const int j = (int)(threadIdx.x & (unsigned)(a.lanes - 1)) * 8;
    launch_after();
    if (j < half) {
        vec8::load_vector<8>(a.w, j, w.lo);
        vec8::load_vector<8>(a.w, j + half, w.hi);
    }
    for (uint32_t first = blockIdx.x * in_block; first < all; first += gridDim.x * in_block) {
        const struct place p = place_of(a, first + (unsigned)mine);
        struct packed<8> x[NORM_HEADS][2] = {}, dy[NORM_HEADS][2] = {};
        float saved[NORM_HEADS] = {};
        struct angles<8> by = {};
        const int position = p.live ? a.position[p.t] : 0;
#pragma unroll
        for (int h = 0; h < NORM_HEADS; h++)
            if (has(a, p, h)) {
                const bf16 *from = a.x + p.t * a.ldx + (p.first + h) * a.d + j, *d = a.dy + p.t * a.lddy + (p.first + h) * a.d + j;
                x[h][0] = load_packed<8>(from);
                x[h][1] = load_packed<8>(from + half);
                dy[h][0] = load_packed<8>(d);
                dy[h][1] = load_packed<8>(d + half);
                if (a.saved != NULL)
                    saved[h] = a.saved[p.t * a.heads + p.first + h];
            }
        if (p.live)
            by = load_angles<8>(a, (int64_t)position * half + j, 1);
#pragma unroll
        for (int h = 0; h < NORM_HEADS; h++) {
            struct halves<8> v, dv;
            x[h][0].unpack(v.lo);
            x[h][1].unpack(v.hi);
            dy[h][0].unpack(dv.lo);
            dy[h][1].unpack(dv.hi);
            turn_back_by<8>(by, &dv);
            const float gx = vec8::warp_sum(weighted<8>(v, dv, w), a.lanes);
            const float r = a.saved != NULL ? saved[h] : rsqrtf(vec8::warp_sum(dot<8>(v, v), a.lanes) / (float)a.d + a.eps);
            if (!has(a, p, h))
                continue;
            head_grad<8>(r, r * r * gx / (float)a.d, v, w, &dv, &sum);
            store_halves<8>(a.out + p.t * a.ldout + (p.first + h) * a.d + j, half, &dv);
        }
    }
    for (int i = 0; i < 8 && j < half; i++) {
        sums[mine * (a.d + 1) + j + i] = sum.lo[i];
        sums[mine * (a.d + 1) + half + j + i] = sum.hi[i];
    }
    store_part(a, sums, (int)in_block);
}

/* A warp walks a head twice, pair by pair; its sums lie in shared memory. */
__global__ void __launch_bounds__(256) heads_bwd_any_kernel(const struct heads a)
{
    extern __shared__ float sums[]; /* [8][d + 1] */
    const int half = a.d / 2, lane = (int)threadIdx.x % 32, mine = (int)threadIdx.x / 32;
    const int64_t all = a.n * a.heads;
    float *own = sums + mine * (a.d + 1);
    struct halves<1> v, dv, w;
    launch_after();
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
           a->lddy % 8 == 0 && a->ldout % 8 == 0 && aligned16(a->cos) && aligned16(a->sin) &&
           (a->w.data == NULL || a->n * a->heads < (int64_t)1 << 26); /* 32 lanes of each are counted in 32 bits */
}

/* Groups of lanes that heads_fwd_kernel and heads_bwd_kernel need. */
int64_t norm_groups(const struct heads &a)
{
    return a.n * ((a.heads + NORM_HEADS - 1) / NORM_HEADS);
}

/* Lanes of one head: a pair of eights a lane, or a warp that walks single pairs. */
void set_lanes(struct heads *a, bool wide)
{
    a->lanes = 32;
    if (wide)
        for (a->lanes = 1; a->lanes < a->d / 16; a->lanes *= 2)
            ;
}

void launch_turn(struct rt_queue *q, const struct heads &k, bool wide, const bf16 *from, int64_t ld, float sign)
{
    const int64_t work = k.n * k.heads * (k.d / (wide ? 16 : 2));
    const unsigned blocks = (unsigned)((work + TURN_THREADS - 1) / TURN_THREADS);
    const bool small = work < (int64_t)1 << 31; /* 32-bit division is several times faster */
    if (wide && small)
        (void)launch(q, heads_turn_kernel<8, uint32_t>, blocks, TURN_THREADS, 0, 1, k, from, ld, sign);
    else if (wide)
        (void)launch(q, heads_turn_kernel<8, uint64_t>, blocks, TURN_THREADS, 0, 1, k, from, ld, sign);
    else
        (void)launch(q, heads_turn_kernel<1, uint64_t>, blocks, TURN_THREADS, 0, 1, k, from, ld, sign);
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
    if (a->w == NULL)
        launch_turn(q, k, wide, k.x, k.ldx, 1);
    else if (wide)
        (void)launch(q, heads_fwd_kernel, (unsigned)((norm_groups(k) + 256 / k.lanes - 1) / (256 / k.lanes)), 256, 0, 1, k);
    else
        heads_fwd_any_kernel<<<blocks_for(dev, a->n * a->heads, 8, 32), 256, 0, q->stream>>>(k);
    return rt_cuda_launched("headnorm_rope_fwd", err);
}

/* dx and dw. */
static enum rt_status heads_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_headnorm_rope_bwd_args *a, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const int64_t dense = (int64_t)a->heads * a->d;
    struct heads k = {};
    bool wide;
    unsigned blocks;
    size_t shared;
    void (*kernel)(const struct heads);
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
        launch_turn(q, k, wide, k.dy, k.lddy, -1);
        return rt_cuda_launched("headnorm_rope_bwd", err);
    }
    shared = (size_t)(256 / k.lanes) * (size_t)(a->d + 1) * sizeof(float);
    kernel = wide ? heads_bwd_kernel : heads_bwd_any_kernel;
    blocks = blocks_for(dev, wide ? norm_groups(k) : a->n * a->heads, 256 / k.lanes, resident((const void *)kernel, 256, shared));
    if (a->dw != NULL)
        RT_TRY(rt_cuda_temp(q, (size_t)blocks * (size_t)a->d * sizeof(float), &k.part, err));
    RT_CUDA_TRY(launch(q, kernel, blocks, 256, shared, 1, k));
    if (a->dw != NULL)
        RT_TRY(rt_cuda_add_columns(q, k.part, (int)blocks, a->d, a->dw, a->first, err));
out:
    rt_cuda_temp_free(q, k.part);
    return st;
}

enum rt_status rt_cuda_headnorm_rope_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_headnorm_rope_bwd_args *a, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(check_heads("headnorm_rope_bwd", a->d, a->w, err));
    if (a->n <= 0)
        return RT_OK;
    if (rt_cuda_turn_sums_fits(a))
        return rt_cuda_turn_sums(q, a, err);
    RT_TRY(heads_bwd(dev, q, a, err));
    if (a->db != NULL)
        RT_TRY(rt_cuda_column_sums(q, a->dx, a->lddx != 0 ? a->lddx : (int64_t)a->heads * a->d, a->n, a->n_db, a->db, a->first, err));
out:
    return st;
}
