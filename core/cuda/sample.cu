/* sample: a token from each row of logits, by the rule of core/sampler.h. Contract: core/backend.h.
 *
 * A block has a row. Weights are whole numbers (2^42 for the greatest logit), so that sums do not depend on their order and atomics on them
 * change nothing. It reads its row: for the maximum and the sum at T = 1; for a histogram of weights by their distance from the maximum, in which top_p
 * ends somewhere; for a finer one of the bucket where it does. What is kept is mostly a few ids: these go to a list. Where they are too many, the
 * row itself is walked on. The last steps look for the place where a running sum passes a number: by sixteenths, a warp each.
 */
#include <cfloat>

#include "core/cuda/cuda.h"

namespace {

enum {
    THREADS = 512, WARPS = THREADS / 32, AHEAD = 4 /* vectors that a thread reads at once */,
    ONE = 42 /* the greatest weight is 2^ONE */,
    REACH = 32 /* a weight of e^-30 is 0 */, PER_UNIT = 64, BUCKETS = REACH * PER_UNIT, FINER = BUCKETS,
    LIST = 1024, LARGEST = 1 << 21 /* ids: their weights add up to less than 2^63 */
};

typedef unsigned long long u64;

struct work {
    const float *z;
    int64_t ld;
    int n_ids;
    bool wide; /* rows are 16-byte aligned */
    float steps; /* buckets for a unit of logits: PER_UNIT / T; 0: greedy */
    float rate;  /* log2(e) / T */
    double top_p;
    u64 seed;
    const uint64_t *stream;
    const int64_t *position;
    int32_t *id;
    float *logprob;
};

struct shared {
    u64 mass[BUCKETS];
    u64 warp[WARPS];
    float max[WARPS], sum[WARPS];
    int at[WARPS], bad[WARPS];
    int list[LIST];
    int count, found;
    u64 before, passed;
};

/* Where the kept ids end: a bucket, a finer one in it, and in that an id. */
struct cut {
    int bucket, finer, id; /* bucket BUCKETS: nowhere */
};

/* f(id, logit) for this thread's share of the row, ids ascending. */
template <class F>
__device__ __forceinline__ void for_share(const work &w, const float *z, F f)
{
    const int whole = w.wide ? w.n_ids / 4 * 4 : 0;
    for (int v = threadIdx.x * 4; v < whole; v += THREADS * 4 * AHEAD) {
        float4 q[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            if (v + THREADS * 4 * u < whole)
                q[u] = __ldcg((const float4 *)(const void *)(z + v + THREADS * 4 * u));
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int id = v + THREADS * 4 * u;
            if (id < whole) {
                f(id, q[u].x);
                f(id + 1, q[u].y);
                f(id + 2, q[u].z);
                f(id + 3, q[u].w);
            }
        }
    }
    for (int id = whole + threadIdx.x; id < w.n_ids; id += THREADS)
        f(id, z[id]);
}

/* Both follow from the logit and the maximum alone, the same in every pass. */
__device__ __forceinline__ u64 weight_of(const work &w, float z, float max)
{
    return __float2ull_rz(exp2f((z - max) * w.rate) * (float)(1ull << ONE));
}
__device__ __forceinline__ float place_of(const work &w, float z, float max)
{
    return (max - z) * w.steps;
}

/* Sum over the block, to all threads. */
__device__ u64 block_sum(shared &s, u64 x)
{
    for (int d = 16; d > 0; d /= 2)
        x += __shfl_xor_sync(~0u, x, d);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        s.warp[threadIdx.x / 32] = x;
    __syncthreads();
    u64 sum = 0;
    for (int i = 0; i < WARPS; i++)
        sum += s.warp[i];
    return sum;
}

/* This thread's x and those of the threads before it. s.warp is free again after the next barrier. */
__device__ u64 block_scan(shared &s, u64 x)
{
    const int lane = threadIdx.x % 32;
    for (int d = 1; d < 32; d *= 2) {
        const u64 y = __shfl_up_sync(~0u, x, d);
        x += lane >= d ? y : 0;
    }
    __syncthreads();
    if (lane == 31)
        s.warp[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < (int)threadIdx.x / 32; i++)
        x += s.warp[i];
    return x;
}

struct summary {
    float max, sum; /* sum of e^(z - max) */
    int at, bad;    /* of the maximum; of the first logit that is no number, or INT_MAX */
};

__device__ struct summary merge(const struct summary &a, const struct summary &b)
{
    struct summary r;
    const bool first = a.max > b.max || (a.max == b.max && a.at < b.at);
    r.max = first ? a.max : b.max;
    r.at = first ? a.at : b.at;
    r.bad = min(a.bad, b.bad);
    r.sum = a.sum * exp2f((a.max - r.max) * 1.44269504f) + b.sum * exp2f((b.max - r.max) * 1.44269504f);
    return r;
}

/* Threads in a fixed tree, warps in ascending order. */
__device__ struct summary summarise(const work &w, shared &s, const float *z)
{
    struct summary r = {-FLT_MAX, 0, INT_MAX, INT_MAX};
    for_share(w, z, [&](int id, float x) {
        if (!isfinite(x)) {
            r.bad = min(r.bad, id);
            return;
        }
        if (x > r.max) {
            r.sum *= exp2f((r.max - x) * 1.44269504f);
            r.max = x;
            r.at = id;
        }
        r.sum += exp2f((x - r.max) * 1.44269504f);
    });
    for (int d = 16; d > 0; d /= 2) {
        const struct summary other = {__shfl_down_sync(~0u, r.max, d), __shfl_down_sync(~0u, r.sum, d), __shfl_down_sync(~0u, r.at, d),
                                      __shfl_down_sync(~0u, r.bad, d)};
        r = merge(r, other);
    }
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
        s.max[warp] = r.max;
        s.sum[warp] = r.sum;
        s.at[warp] = r.at;
        s.bad[warp] = r.bad;
    }
    __syncthreads();
    r = {s.max[0], s.sum[0], s.at[0], s.bad[0]};
    for (int i = 1; i < WARPS; i++)
        r = merge(r, {s.max[i], s.sum[i], s.at[i], s.bad[i]});
    return r;
}

/* The first bucket of s.mass at which the sum reaches `need` (which it does); *before: the sum of those before it. */
__device__ int reach(shared &s, u64 need, u64 *before)
{
    enum { EACH = BUCKETS / THREADS };
    u64 own[EACH], x = 0;
    __syncthreads();
    for (int i = 0; i < EACH; i++)
        x += own[i] = s.mass[threadIdx.x * EACH + i];
    u64 end = block_scan(s, x), at = end - x;
    if (at < need && end >= need)
        for (int i = 0; i < EACH; i++) {
            if (at + own[i] >= need) {
                s.found = threadIdx.x * EACH + i;
                s.before = at;
                break;
            }
            at += own[i];
        }
    __syncthreads();
    *before = s.before;
    return s.found;
}

__device__ void clear(shared &s)
{
    __syncthreads();
    for (int i = threadIdx.x; i < BUCKETS; i += THREADS)
        s.mass[i] = 0;
    if (threadIdx.x == 0)
        s.count = 0;
    __syncthreads();
}

__device__ __forceinline__ int finer_of(float place, int bucket)
{
    return min((int)((place - (float)bucket) * FINER), FINER - 1);
}

/* The smallest i below n at which the sum of weight(0) .. weight(i) passes `target` (which it does). *passed: that sum. */
template <class F>
__device__ int find(shared &s, int n, u64 target, F weight, u64 *passed)
{
    int lo = 0, hi = n;
    u64 base = 0;
    while (hi - lo > THREADS) {
        const int chunk = ((hi - lo + WARPS - 1) / WARPS + 127) / 128 * 128, warp = threadIdx.x / 32, from = lo + warp * chunk;
        const int to = min(from + chunk, hi);
        u64 x = 0;
#pragma unroll 8
        for (int i = from + threadIdx.x % 32; i < to; i += 32)
            x += weight(i);
        for (int d = 16; d > 0; d /= 2)
            x += __shfl_xor_sync(~0u, x, d);
        __syncthreads();
        if (threadIdx.x % 32 == 0)
            s.warp[warp] = x;
        __syncthreads();
        int k = 0;
        while (k < WARPS - 1 && base + s.warp[k] <= target)
            base += s.warp[k++];
        lo += k * chunk;
        hi = min(lo + chunk, hi);
    }
    const int i = lo + threadIdx.x;
    const u64 x = i < hi ? weight(i) : 0, end = base + block_scan(s, x);
    if (end > target && end - x <= target) {
        s.found = i;
        s.passed = end;
    }
    __syncthreads();
    *passed = s.passed;
    return s.found;
}

/* Sorts s.list [n] ascending; places up to the next power of two are written. */
__device__ void sort_list(shared &s, int n)
{
    int size = 1;
    while (size < n)
        size *= 2;
    for (int i = n + threadIdx.x; i < size; i += THREADS)
        s.list[i] = INT_MAX;
    for (int run = 2; run <= size; run *= 2)
        for (int step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                const int a = 2 * i - (i & (step - 1)), b = a + step;
                const int x = s.list[a], y = s.list[b];
                if ((a & run) == 0 ? x > y : x < y) {
                    s.list[a] = y;
                    s.list[b] = x;
                }
            }
        }
    __syncthreads();
}

/* 53 random bits of (seed, stream, counter): core/rng.h. */
__device__ u64 bits53(u64 seed, u64 stream, u64 counter)
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t x0 = (uint32_t)counter, x1 = (uint32_t)(counter >> 32), x2 = (uint32_t)stream, x3 = (uint32_t)(stream >> 32);
    for (int round = 0; round < 10; round++) {
        const u64 a = (u64)0xD2511F53u * x0, b = (u64)0xCD9E8D57u * x2;
        x0 = (uint32_t)(b >> 32) ^ x1 ^ k0;
        x1 = (uint32_t)b;
        x2 = (uint32_t)(a >> 32) ^ x3 ^ k1;
        x3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return ((u64)x1 << 32 | x0) >> 11;
}

/* What top_p keeps: the cut, and in s.list [*listed] all ids that may be kept, ascending; *listed -1: too many. */
__device__ struct cut nucleus(const work &w, shared &s, const float *z, float max, u64 total, u64 *kept, int *listed)
{
    struct cut c;
    u64 before, before2;
    const double exact = ceil(w.top_p * (double)total);
    const u64 need = exact < 1 ? 1 : exact > (double)total ? total : (u64)exact;
    c.bucket = reach(s, need, &before);
    clear(s);
    for_share(w, z, [&](int id, float x) {
        const float place = place_of(w, x, max);
        const int bucket = (int)place;
        if (bucket > c.bucket)
            return;
        const int at = atomicAdd(&s.count, 1);
        if (at < LIST)
            s.list[at] = id;
        if (bucket == c.bucket)
            atomicAdd(&s.mass[finer_of(place, bucket)], weight_of(w, x, max));
    });
    c.finer = reach(s, need - before, &before2);
    *listed = s.count <= LIST ? s.count : -1;
    if (*listed >= 0)
        sort_list(s, *listed);
    const int n = *listed >= 0 ? *listed : w.n_ids;
    const int i = find(s, n, need - before - before2 - 1, [&](int k) -> u64 {
        const float x = z[*listed >= 0 ? s.list[k] : k], place = place_of(w, x, max);
        return (int)place == c.bucket && finer_of(place, c.bucket) == c.finer ? weight_of(w, x, max) : 0;
    }, kept);
    c.id = *listed >= 0 ? s.list[i] : i;
    *kept += before + before2;
    return c;
}

__device__ int draw(const work &w, shared &s, const float *z, const struct summary &r, int64_t row)
{
    struct cut c = {BUCKETS, 0, 0};
    int listed = -1;
    u64 sum = 0, passed;
    clear(s);
    for_share(w, z, [&](int, float x) {
        const u64 weight = weight_of(w, x, r.max);
        sum += weight;
        if (w.top_p < 1 && weight > 0)
            atomicAdd(&s.mass[(int)place_of(w, x, r.max)], weight);
    });
    sum = block_sum(s, sum);
    if (w.top_p < 1)
        c = nucleus(w, s, z, r.max, sum, &sum, &listed);
    const u64 target = __umul64hi(bits53(w.seed, w.stream[row], (u64)w.position[row]) << 11, sum);
    const int i = find(s, listed >= 0 ? listed : w.n_ids, target, [&](int k) -> u64 {
        const int id = listed >= 0 ? s.list[k] : k;
        const float x = z[id], place = place_of(w, x, r.max);
        const int bucket = (int)fminf(place, (float)BUCKETS - 1); /* beyond: the weight is 0 */
        const int finer = bucket == c.bucket ? finer_of(place, bucket) : 0;
        const bool keep = bucket < c.bucket || (bucket == c.bucket && (finer < c.finer || (finer == c.finer && id <= c.id)));
        return keep ? weight_of(w, x, r.max) : 0;
    }, &passed);
    return listed >= 0 ? s.list[i] : i;
}

__global__ void __launch_bounds__(THREADS, 2) sample_kernel(const __grid_constant__ work w)
{
    __shared__ shared s;
    const int64_t row = blockIdx.x;
    const float *z = w.z + row * w.ld;
    const struct summary r = summarise(w, s, z);
    int id = r.at;
    if (r.bad != INT_MAX)
        id = -1 - r.bad;
    else if (w.steps > 0)
        id = draw(w, s, z, r, row);
    if (threadIdx.x == 0) {
        w.id[row] = id;
        w.logprob[row] = id < 0 ? NAN : (z[id] - r.max) - logf(r.sum);
    }
}

}

enum rt_status rt_cuda_sample(struct rt_dev *, struct rt_queue *q, const struct rt_sample_args *a, struct rt_err *err)
{
    work w = {};
    if (a->n < 1)
        return RT_OK;
    if (a->params.top_k != 0 || a->n_ids > LARGEST)
        return rt_fail(err, RT_UNSUPPORTED, "sample: the best %ld of %ld ids; on the GPU without top-k and at most %d", (long)a->params.top_k, (long)a->n_ids,
                       (int)LARGEST);
    if (a->n_ids < 1 || a->n_ids > a->ld || a->n > INT32_MAX || !(a->params.temperature >= 0) || !(a->params.top_p > 0 && a->params.top_p <= 1))
        return rt_fail(err, RT_USAGE, "sample: %ld ids in rows of %ld at temperature %g with top-p %g", (long)a->n_ids, (long)a->ld, a->params.temperature,
                       a->params.top_p);
    w.z = a->z;
    w.ld = a->ld;
    w.n_ids = (int)a->n_ids;
    w.wide = a->ld % 4 == 0 && (uintptr_t)a->z % 16 == 0;
    /* a temperature so low that a step of floats is beyond reach: the greatest alone */
    w.steps = a->params.temperature > 1e-30 ? (float)(PER_UNIT / a->params.temperature) : 0.0f;
    w.rate = a->params.temperature > 1e-30 ? (float)(1.4426950408889634 / a->params.temperature) : 0.0f;
    w.top_p = a->params.top_p;
    w.seed = a->seed;
    w.stream = a->stream;
    w.position = a->position;
    w.id = a->id;
    w.logprob = a->logprob;
    sample_kernel<<<(unsigned)a->n, THREADS, 0, q->stream>>>(w);
    return rt_cuda_launched("sample", err);
}
