#include "core/cuda/cached.h"

#include <cuda_bf16.h>
#include <math.h>

#include "core/cuda/cached_row.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum { THREADS = 128 };

/* A block: one token and head. */
__global__ void merge_kernel(const struct rt_cached_parts p, const int32_t *pos, bf16 *o, int nh, int dv)
{
    const int64_t t = blockIdx.x / nh, h = blockIdx.x % nh;
    const int count = pos[t] / p.length + 1;
    launch_after(); /* entries come from the host */
    if (count <= 1 || pos[t] < 0)
        return;
    const float *lse = p.lse + t * p.splits * nh + h, *from = p.o + (t * p.splits * nh + h) * dv;
    float top = -INFINITY, total = 0;
    for (int s = 0; s < count; s++)
        top = fmaxf(top, lse[(int64_t)s * nh]);
    for (int s = 0; s < count; s++)
        total += exp2f(lse[(int64_t)s * nh] - top);
    for (int d = threadIdx.x; d < dv; d += blockDim.x) {
        float sum = 0;
        for (int s = 0; s < count; s++)
            sum += exp2f(lse[(int64_t)s * nh] - top) * from[(int64_t)s * nh * dv + d];
        o[(t * nh + h) * dv + d] = __float2bfloat16_rn(sum / total);
    }
}

__device__ float dot(const bf16 *a, const bf16 *b, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++)
        sum += __bfloat162float(a[i]) * __bfloat162float(b[i]);
    return sum;
}

/* Maximum or sum over the block, to all threads, in fixed order. */
template <bool MAX>
__device__ float over_block(float x, float *slot)
{
    __syncthreads();
    slot[threadIdx.x] = x;
    __syncthreads();
    for (int d = THREADS / 2; d > 0; d /= 2) {
        if ((int)threadIdx.x < d)
            slot[threadIdx.x] = MAX ? fmaxf(slot[threadIdx.x], slot[threadIdx.x + d]) : slot[threadIdx.x] + slot[threadIdx.x + d];
        __syncthreads();
    }
    return slot[0];
}

/* THREADS keys at a time with a running maximum; acc [dv] in dynamic shared memory. */
__global__ void __launch_bounds__(THREADS) plain_kernel(const __grid_constant__ struct rt_cached_plain a)
{
    extern __shared__ float acc[];
    __shared__ float p[THREADS], slot[THREADS];
    const int64_t t = blockIdx.x / a.nh;
    const int h = blockIdx.x % a.nh, keys = a.pos[t] + 1;
    const int64_t base = h / (a.nh / a.nkv) * a.head;
    const bf16 *k = (const bf16 *)a.k + base, *v = (const bf16 *)a.v + base, *q1 = (const bf16 *)a.q1 + t * a.q1_ld + h * a.q1_head,
               *q2 = (const bf16 *)a.q2 + (a.d2 > 0 ? t * a.q2_ld + h * a.q2_head : 0);
    float top = -INFINITY, total = 0;
    if (keys < 1)
        return;
    for (int d = threadIdx.x; d < a.dv; d += THREADS)
        acc[d] = 0;
    for (int first = 0; first < keys; first += THREADS) {
        const int key = first + threadIdx.x, here = min(keys - first, (int)THREADS);
        const bf16 *row = k + cached_row(a.pages, a.capacity, a.slot[t], min(key, keys - 1)) * a.width;
        const float s = key < keys ? a.scale * (dot(q1, row, a.d1) + dot(q2, row + a.d1, a.d2)) : -INFINITY;
        const float now = fmaxf(top, over_block<true>(s, slot)), factor = expf(top - now);
        p[threadIdx.x] = key < keys ? expf(s - now) : 0.0f;
        total = total * factor + over_block<false>(p[threadIdx.x], slot);
        top = now;
        for (int d = threadIdx.x; d < a.dv; d += THREADS) {
            float sum = acc[d] * factor;
            for (int j = 0; j < here; j++)
                sum += p[j] * __bfloat162float(v[cached_row(a.pages, a.capacity, a.slot[t], first + j) * a.width + d]);
            acc[d] = sum;
        }
    }
    for (int d = threadIdx.x; d < a.dv; d += THREADS)
        ((bf16 *)a.o)[(t * a.nh + h) * a.dv + d] = __float2bfloat16_rn(acc[d] / total);
}

}

int64_t rt_cuda_cached_chunk(const struct rt_dev *dev, int64_t n, int nh, int dv, int splits)
{
    const int64_t token = (int64_t)splits * nh * (dv + 1) * (int64_t)sizeof(float), fit = (int64_t)(dev->scratch / 4) / token;
    return splits == 1 || fit >= n ? n : fit > 1 ? fit : 1;
}

int rt_cuda_cached_blocks(const struct rt_dev *dev, const struct rt_cached_parts *parts, int64_t rows, int waves)
{
    const int64_t blocks = ((int64_t)waves * dev->sm_count + rows - 1) / rows;
    return blocks < parts->splits ? (int)blocks : parts->splits;
}

enum rt_status rt_cuda_cached_parts(struct rt_queue *q, int64_t n, int nh, int dv, struct rt_cached_parts *parts, void **temp, struct rt_err *err)
{
    const int64_t rows = n * parts->splits * nh;
    if (parts->splits == 1)
        return RT_OK;
    const size_t bytes = (size_t)(rows * (dv + 1)) * sizeof(float);
    if (bytes <= RT_CUDA_WORKSPACE) { /* of the queue: no product of the library runs meanwhile, and in recorded work a block of memory is a step */
        parts->o = (float *)q->workspace;
    } else {
        const enum rt_status st = rt_cuda_temp(q, bytes, temp, err);
        if (st != RT_OK)
            return st;
        parts->o = (float *)*temp;
    }
    parts->lse = parts->o + rows * dv;
    return RT_OK;
}

enum rt_status rt_cuda_cached_merge(struct rt_queue *q, const struct rt_cached_parts *parts, const int32_t *pos, void *o, int64_t n, int nh, int dv,
                                    struct rt_err *err)
{
    if (parts->splits == 1)
        return RT_OK;
    return rt_cuda_check(launch(q, merge_kernel, (unsigned)(n * nh), dv < 128 ? 32 : 128, 0, 1, *parts, pos, (bf16 *)o, nh, dv), "merge of parts", err);
}

enum rt_status rt_cuda_cached_plain(struct rt_queue *q, const struct rt_cached_plain *a, struct rt_err *err)
{
    const size_t bytes = (size_t)a->dv * sizeof(float);
    if (bytes > 40 << 10)
        return rt_fail(err, RT_UNSUPPORTED, "attention over a cache with values of %d elements; at most 10240", a->dv);
    plain_kernel<<<(unsigned)(a->n * a->nh), THREADS, bytes, q->stream>>>(*a);
    return rt_cuda_launched("attention over a cache", err);
}
