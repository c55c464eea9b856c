/* rope_put: what lies between a decoder's projection and its attention, in one pass. Contract: core/backend.h.
 *
 * A block has one token; a group of lanes one head at a time, a piece of each half of it a lane. Queries go to q, keys and values to their
 * rows of the caches.
 */
#include <cuda_bf16.h>

#include "core/cuda/cached.h"
#include "core/cuda/cached_row.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum { THREADS = 128 };

struct work {
    const bf16 *qkv;
    struct vec8::vector q_norm, k_norm;
    bf16 *q, *k_cache, *v_cache;
    const float *cos, *sin;
    const int32_t *slot, *pos;
    struct rt_cache_pages pages;
    int64_t capacity;
    int nh, nkv, d, lanes; /* lanes of one head: a power of two */
    float eps;
};

/* A head from x to y; with N = 8 one turn of the loop holds it. All lanes of a warp call this together. */
template <int N>
__device__ __forceinline__ void head(const work &w, const bf16 *x, bf16 *y, const struct vec8::vector &norm, const float *cos, const float *sin,
                                     int lane, bool live)
{
    const int half = w.d / 2;
    float lo[N], hi[N], rstd = 1;
    if (norm.data != NULL) {
        float sum = 0;
        for (int j = lane * N; live && j < half; j += w.lanes * N) {
            vec8::load<N>(x + j, lo);
            vec8::load<N>(x + j + half, hi);
#pragma unroll
            for (int i = 0; i < N; i++)
                sum += lo[i] * lo[i] + hi[i] * hi[i];
        }
        rstd = rsqrtf(vec8::warp_sum(sum, w.lanes) / (float)w.d + w.eps);
    }
    for (int j = lane * N; live && j < half; j += w.lanes * N) {
        float a[N], b[N], c[N], s[N];
        vec8::load<N>(x + j, lo);
        vec8::load<N>(x + j + half, hi);
        if (norm.data != NULL) {
            vec8::load_vector<N>(norm, j, a);
            vec8::load_vector<N>(norm, j + half, b);
#pragma unroll
            for (int i = 0; i < N; i++) {
                lo[i] *= rstd * a[i];
                hi[i] *= rstd * b[i];
            }
        }
        vec8::load<N>(cos + j, c);
        vec8::load<N>(sin + j, s);
#pragma unroll
        for (int i = 0; i < N; i++) {
            a[i] = lo[i] * c[i] - hi[i] * s[i];
            b[i] = lo[i] * s[i] + hi[i] * c[i];
        }
        vec8::store<N>(y + j, a);
        vec8::store<N>(y + j + half, b);
    }
}

template <int N>
__global__ void __launch_bounds__(THREADS) rope_put_kernel(const __grid_constant__ work w)
{
    const int64_t t = blockIdx.x;
    const int pos = w.pos[t], lane = threadIdx.x % w.lanes, groups = THREADS / w.lanes, heads = w.nh + w.nkv;
    if (pos < 0) {
        launch_after();
        return;
    }
    const int64_t q = (int64_t)w.nh * w.d, kv = (int64_t)w.nkv * w.d;
    const int64_t row = cached_row(w.pages, w.capacity, w.slot[t], pos) * kv;
    const bf16 *x = w.qkv + t * (q + 2 * kv);
    const float *cos = w.cos + (int64_t)pos * (w.d / 2), *sin = w.sin + (int64_t)pos * (w.d / 2);
    launch_after(); /* entries and their pages come from the host */
    for (int first = 0; first < heads; first += groups) {
        const int h = first + threadIdx.x / w.lanes;
        const bool live = h < heads, key = h >= w.nh;
        bf16 *y = key ? w.k_cache + row + (int64_t)(h - w.nh) * w.d : w.q + t * q + (int64_t)h * w.d;
        /* a warp may hold queries and keys: norms are told apart by the lane, and both are there or neither */
        head<N>(w, x + (int64_t)h * w.d, y, key ? w.k_norm : w.q_norm, cos, sin, lane, live);
    }
    for (int64_t j = threadIdx.x * N; j < kv; j += THREADS * N) {
        if constexpr (N == 8)
            *(uint4 *)(void *)(w.v_cache + row + j) = *(const uint4 *)(const void *)(x + q + kv + j);
        else
            w.v_cache[row + j] = x[q + kv + j];
    }
}

}

enum rt_status rt_cuda_rope_put(struct rt_dev *, struct rt_queue *q, const struct rt_rope_put_args *a, struct rt_err *err)
{
    work w = {};
    if (a->n < 1)
        return RT_OK;
    if (a->d < 2 || a->d % 2 != 0 || a->nh < 1 || a->nkv < 1 || (a->q_norm != NULL) != (a->k_norm != NULL) || a->n > INT32_MAX)
        return rt_fail(err, RT_SHAPE, "rope_put: %d and %d heads of %d; expected an even size, and a norm of both queries and keys or of neither",
                       a->nh, a->nkv, a->d);
    w.qkv = (const bf16 *)a->qkv;
    w.q_norm = vec8::vector_of(a->q_norm);
    w.k_norm = vec8::vector_of(a->k_norm);
    w.q = (bf16 *)a->q;
    w.k_cache = (bf16 *)a->k_cache;
    w.v_cache = (bf16 *)a->v_cache;
    w.cos = a->cos;
    w.sin = a->sin;
    w.slot = a->slot;
    w.pos = a->pos;
    w.pages = a->pages;
    w.capacity = a->capacity;
    w.nh = a->nh;
    w.nkv = a->nkv;
    w.d = a->d;
    w.eps = a->eps;
    const bool wide = a->d % 16 == 0 && vec8::aligned16(a->qkv) && put_aligned(a) &&
                      (a->q_norm == NULL || (vec8::aligned16(w.q_norm.data) && vec8::aligned16(w.k_norm.data)));
    for (w.lanes = 1; w.lanes < 32 && w.lanes * (wide ? 8 : 1) < a->d / 2;)
        w.lanes *= 2;
    return rt_cuda_check(launch(q, wide ? rope_put_kernel<8> : rope_put_kernel<1>, (unsigned)a->n, THREADS, 0, 1, w), "rope_put", err);
}
