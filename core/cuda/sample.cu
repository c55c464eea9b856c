/* sample: a token from each row of logits, by the rule of core/sampler.h. Contract: core/backend.h.
 *
 * Weights are whole numbers (2^42 for the greatest logit), rounded to some 16 bits, so that sums do not depend on
 * their order and atomics on them change nothing. A row is
 * shared out by the blocks of a cluster (where there are none, or few ids: one block has it), each of which holds its share in shared memory, if it
 * fits there: device memory is read once. It is walked along for the maximum; for the sum at T = 1 and a histogram of weights by their distance
 * from the maximum, in which top_p ends somewhere; for a finer one of the bucket where it does. The last steps look for the place where a running
 * sum passes a number: the blocks' sums say in whose share, and there it is found by sixteenths, a warp each.
 */
#include <cfloat>

#include "core/cuda/cuda.h"
#include "core/cuda/launch.cuh"

namespace {

enum {
    THREADS = 512, WARPS = THREADS / 32, AHEAD = 4 /* vectors that a thread reads at once */,
    ONE = 42 /* the greatest weight is 2^ONE */,
    REACH = 32 /* a weight of e^-30 is 0 */, PER_UNIT = 64, BUCKETS = REACH * PER_UNIT, FINER = BUCKETS,
    BLOCKS = 8 /* of a row, where it has MANY ids */, MANY = 8192,
    LARGEST = 1 << 21 /* ids: their weights add up to less than 2^63 */
};
static_assert(BUCKETS / BLOCKS <= THREADS && BUCKETS % THREADS == 0, "a thread has whole buckets of a slice");

typedef unsigned long long u64;

struct work {
    const float *z;
    int64_t ld;
    int n_ids, share; /* share: ids of a block, a multiple of 4 */
    int bits;
    bool wide; /* rows are 16-byte aligned */
    bool held; /* shares lie in shared memory */
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
    uint32_t mass[2][BUCKETS]; /* in units: by distance; the finer one of a bucket */
    /* what the other blocks of the row read */
    float top, sum; /* maximum; sum of e^(z - max) */
    int at;
    u64 all, kept, slice[2], before[2];
    int bucket[2];
    /* this block's */
    float warp_sum[WARPS];
    int warp_at[WARPS];
    u64 warp[WARPS];
    int found;
    u64 passed;
};

/* The same place in block `rank` of the row. */
template <int C, class T>
__device__ __forceinline__ const T *peer(const T *p, int rank)
{
#if __CUDA_ARCH__ >= 900
    if constexpr (C > 1)
        return (const T *)__cluster_map_shared_rank(p, rank);
#endif
    return p;
}

/* All blocks of the row. */
template <int C>
__device__ __forceinline__ void row_sync()
{
#if __CUDA_ARCH__ >= 900
    if constexpr (C > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

/* f(i, array of logits) for this thread's part of the block's share z [n], ascending, four at a time where that can be; and
 * a copy of it. */
template <class F>
__device__ __forceinline__ void for_groups(const float *z, int n, bool wide, F f, float *copy)
{
    const int whole = wide ? n / 4 * 4 : 0;
    for (int v = threadIdx.x * 4; v < whole; v += THREADS * 4 * AHEAD) {
        float4 q[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            if (v + THREADS * 4 * u < whole)
                q[u] = *(const float4 *)(const void *)(z + v + THREADS * 4 * u);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int i = v + THREADS * 4 * u;
            if (i < whole) {
                if (copy != NULL)
                    *(float4 *)(void *)(copy + i) = q[u];
                const float x[4] = {q[u].x, q[u].y, q[u].z, q[u].w};
                f(i, x);
            }
        }
    }
    for (int i = whole + threadIdx.x; i < n; i += THREADS) {
        const float x[1] = {z[i]};
        if (copy != NULL)
            copy[i] = x[0];
        f(i, x);
    }
}

/* f(i, logit) for each. */
template <class F>
__device__ __forceinline__ void for_share(const float *z, int n, bool wide, F f, float *copy = NULL)
{
    for_groups(z, n, wide, [&](int i, const auto &x) {
#pragma unroll
        for (int j = 0; j < (int)(sizeof x / sizeof x[0]); j++)
            f(i + j, x[j]);
    }, copy);
}

__device__ __forceinline__ float fmax_nan(float a, float b)
{
    return isnan(a) || isnan(b) ? NAN : fmaxf(a, b);
}

__device__ __forceinline__ float power2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* All of these follow from the distance of a logit from the maximum alone, the same in every pass. A weight is a multiple of 2^unit, of w.bits to w.bits + 2
 * bits, the unit being its bucket's: so a share's multiples add up to less than 2^32, which is what atomics in shared memory are fast at. */
__device__ __forceinline__ float place_of(const work &w, float below)
{
    return below * w.steps;
}
__device__ __forceinline__ int bucket_of(float place)
{
    return min((int)place, BUCKETS - 1); /* the weights of the last are 0 */
}
__device__ __forceinline__ int unit_of(const work &w, int bucket)
{
    return max(ONE - 1 - w.bits - ((bucket + 1) * 23638 >> 20), 0); /* 2^20 log2(e) / PER_UNIT, and a little */
}
__device__ __forceinline__ uint32_t multiple_of(const work &w, float below, int unit)
{
    return __float2uint_rn(power2(fmaf(below, -w.rate, (float)(ONE - unit))));
}
__device__ __forceinline__ u64 weight_of(const work &w, float below, int bucket)
{
    const int unit = unit_of(w, bucket);
    return (u64)multiple_of(w, below, unit) << unit;
}
__device__ __forceinline__ int finer_of(float place, int bucket)
{
    return min((int)((place - (float)bucket) * FINER), FINER - 1);
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

/* join over all threads of the row; of_warp, own: places of the block's, the latter read by the row's other blocks. */
template <int C, class T, class F>
__device__ __forceinline__ T over_row(T x, T *of_warp, T *own, F join)
{
    for (int d = 16; d > 0; d /= 2)
        x = join(x, __shfl_xor_sync(~0u, x, d));
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < WARPS; i++)
        x = join(x, of_warp[i]);
    if (threadIdx.x == 0)
        *own = x;
    row_sync<C>();
    for (int i = 0; i < C; i++)
        x = join(x, *peer<C>(own, i));
    return x;
}

/* The share to `held`, and its maximum to the row; in most rows that is all. NaN: the row has what is no number. */
template <int C>
__device__ float read_share(const work &w, shared &s, const float *z, int n, float *held)
{
    float top = -FLT_MAX, zero = 0; /* or NaN */
    for_share(z, n, w.wide, [&](int, float x) {
        top = fmaxf(top, x);
        zero = fmaf(x, 0.0f, zero);
    }, w.held ? held : NULL);
    return over_row<C>(top + zero, s.warp_sum, &s.top, [](float a, float b) { return fmax_nan(a, b); });
}

/* The row's first id of logit `top`, or where that is NaN the first that is no number. */
template <int C>
__device__ int first_of(shared &s, const float *z, int first, int n, bool wide, float top)
{
    int at = INT_MAX;
    for_share(z, n, wide, [&](int i, float x) {
        if (isnan(top) ? !isfinite(x) : x == top)
            at = min(at, first + i);
    });
    return over_row<C>(at, s.warp_at, &s.at, [](int a, int b) { return min(a, b); });
}

/* Sums of the share: s.sum of e^(z - max), in a fixed tree; s.all of weights; and its histogram. */
__device__ void weigh_share(const work &w, shared &s, const float *z, int n, bool wide, float max)
{
    float sum = 0;
    u64 all = 0;
    for_groups(z, n, wide, [&](int, const auto &x) {
        enum { N = sizeof x / sizeof x[0] };
#pragma unroll
        for (int j = 0; j < N; j++)
            sum += power2((max - x[j]) * -1.44269504f);
        if (w.steps == 0)
            return;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int bucket = bucket_of(place_of(w, max - x[j]));
            const int unit = unit_of(w, bucket);
            const uint32_t multiple = multiple_of(w, max - x[j], unit);
            if (w.top_p == 1)
                all += (u64)multiple << unit;
            else if (multiple > 0)
                atomicAdd(&s.mass[0][bucket], multiple);
        }
    }, NULL);
    for (int d = 16; d > 0; d /= 2)
        sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % 32 == 0)
        s.warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < BUCKETS && w.top_p < 1; i += THREADS)
        all += (u64)s.mass[0][i] << unit_of(w, i);
    all = block_sum(s, all);
    sum = 0;
    for (int i = 0; i < WARPS; i++)
        sum += s.warp_sum[i];
    if (threadIdx.x == 0) {
        s.sum = sum;
        s.all = all;
    }
}

/* The first bucket of the row's histogram at which the sum reaches `need` (which it does); *before: the sum of those before it. Each block adds up the
 * blocks' sums of a slice of the buckets, which is what little can be had of the shared memory of others: it has a quarter of L2's rate. */
template <int C, class F>
__device__ int reach(shared &s, int which, F unit, u64 need, int rank, u64 *before)
{
    enum { SLICE = BUCKETS / C, EACH = SLICE > THREADS ? SLICE / THREADS : 1 };
    const int first = rank * SLICE + threadIdx.x * EACH;
    u64 own[EACH] = {}, x = 0, at = 0;
    if ((int)threadIdx.x * EACH < SLICE)
#pragma unroll
        for (int r = 0; r < C; r++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
                own[i] += (u64)*peer<C>(&s.mass[which][first + i], r) << unit(first + i);
#pragma unroll
    for (int i = 0; i < EACH; i++)
        x += own[i];
    const u64 end = block_scan(s, x);
    if (threadIdx.x == THREADS - 1)
        s.slice[which] = end;
    row_sync<C>();
    int owner = 0;
    for (; owner < C - 1; owner++) {
        const u64 slice = *peer<C>(&s.slice[which], owner);
        if (at + slice >= need)
            break;
        at += slice;
    }
    at += end - x;
    if (owner == rank && at < need && at + x >= need)
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (at < need && at + own[i] >= need) {
                s.bucket[which] = first + i;
                s.before[which] = at;
            }
            at += own[i];
        }
    row_sync<C>();
    *before = *peer<C>(&s.before[which], owner);
    return *peer<C>(&s.bucket[which], owner);
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

/* Where the kept ids end: a bucket, a finer one in it, and in that an id of the share. */
struct cut {
    int bucket, finer, last; /* bucket BUCKETS: nowhere */
};

/* Which block of the row has the place where the sum of part(rank) passes *target; *target becomes what is left of it there. */
template <int C, class F>
__device__ __forceinline__ int owner_of(u64 *target, F part)
{
    for (int r = 0; r < C - 1; r++) {
        const u64 x = part(r);
        if (*target < x)
            return r;
        *target -= x;
    }
    return C - 1;
}

/* What top_p keeps of the share; s.kept: its weight. need: of the row. */
template <int C>
__device__ struct cut nucleus(const work &w, shared &s, const float *z, int n, bool wide, float max, u64 need, int rank)
{
    struct cut c;
    u64 before, before2, passed = 0;
    c.bucket = reach<C>(s, 0, [&](int i) { return unit_of(w, i); }, need, rank, &before);
    const int unit = unit_of(w, c.bucket);
    for_share(z, n, wide, [&](int, float x) {
        const float place = place_of(w, max - x);
        if (bucket_of(place) == c.bucket)
            atomicAdd(&s.mass[1][finer_of(place, c.bucket)], multiple_of(w, max - x, unit));
    });
    row_sync<C>();
    c.finer = reach<C>(s, 1, [&](int) { return unit; }, need - before, rank, &before2);
    u64 target = need - before - before2 - 1;
    const int owner = owner_of<C>(&target, [&](int r) { return (u64)*peer<C>(&s.mass[1][c.finer], r) << unit; });
    c.last = rank < owner ? n - 1 : -1;
    if (rank < owner)
        passed = (u64)s.mass[1][c.finer] << unit;
    if (rank == owner)
        c.last = find(s, n, target, [&](int i) -> u64 {
            const float place = place_of(w, max - z[i]);
            return bucket_of(place) == c.bucket && finer_of(place, c.bucket) == c.finer ? weight_of(w, max - z[i], c.bucket) : 0;
        }, &passed);
    u64 kept = 0;
    for (int i = threadIdx.x; i < BUCKETS; i += THREADS) {
        kept += i < c.bucket ? (u64)s.mass[0][i] << unit_of(w, i) : 0;
        kept += i < c.finer ? (u64)s.mass[1][i] << unit : 0;
    }
    kept = block_sum(s, kept) + passed;
    if (threadIdx.x == 0)
        s.kept = kept;
    row_sync<C>();
    return c;
}

/* The drawn id, in the block that has it; INT_MAX elsewhere. The others are done with this block's sums then. */
template <int C>
__device__ int draw(const work &w, shared &s, const float *z, int n, bool wide, float max, int64_t row, int rank)
{
    struct cut c = {BUCKETS, 0, 0};
    u64 total = 0, passed;
    for (int r = 0; r < C; r++)
        total += *peer<C>(&s.all, r);
    if (w.top_p < 1) {
        const double exact = ceil(w.top_p * (double)total);
        c = nucleus<C>(w, s, z, n, wide, max, exact < 1 ? 1 : exact > (double)total ? total : (u64)exact, rank);
        total = 0;
        for (int r = 0; r < C; r++)
            total += *peer<C>(&s.kept, r);
    }
    u64 target = __umul64hi(bits53(w.seed, w.stream[row], (u64)w.position[row]) << 11, total);
    const int owner = owner_of<C>(&target, [&](int r) { return *peer<C>(w.top_p < 1 ? &s.kept : &s.all, r); });
    row_sync<C>();
    if (owner != rank)
        return INT_MAX;
    return find(s, n, target, [&](int i) -> u64 {
        const float place = place_of(w, max - z[i]);
        const int bucket = bucket_of(place), finer = bucket == c.bucket ? finer_of(place, bucket) : 0;
        const bool keep = bucket < c.bucket || (bucket == c.bucket && (finer < c.finer || (finer == c.finer && i <= c.last)));
        return keep ? weight_of(w, max - z[i], bucket) : 0;
    }, &passed);
}

template <int C>
__global__ void __launch_bounds__(THREADS, 2) sample_kernel(const __grid_constant__ work w)
{
    extern __shared__ __align__(16) float held[];
    __shared__ __align__(16) shared s;
    const int64_t row = blockIdx.x / C;
    const int rank = blockIdx.x % C, first = min(rank * w.share, w.n_ids), n = min(w.share, w.n_ids - first);
    const float *z = w.z + row * w.ld + first;
    for (int i = threadIdx.x; i < (int)(sizeof s.mass / 16); i += THREADS)
        ((uint4 *)(void *)s.mass)[i] = make_uint4(0, 0, 0, 0);
    launch_after();
    const float max = read_share<C>(w, s, z, n, held);
    const bool wide = w.held || w.wide;
    z = w.held ? held : z;
    if (isnan(max)) {
        const int bad = first_of<C>(s, z, first, n, wide, max);
        row_sync<C>();
        if (threadIdx.x == 0 && rank == 0) {
            w.id[row] = -1 - bad;
            w.logprob[row] = NAN;
        }
        return;
    }
    weigh_share(w, s, z, n, wide, max);
    row_sync<C>();
    float sum = 0;
    for (int i = 0; i < C; i++)
        sum += *peer<C>(&s.sum, i);
    int at;
    if (w.steps > 0) {
        at = draw<C>(w, s, z, n, wide, max, row, rank);
    } else {
        at = first_of<C>(s, z, first, n, wide, max) - first;
        row_sync<C>();
    }
    if (threadIdx.x == 0 && at >= 0 && at < n) {
        w.id[row] = first + at;
        w.logprob[row] = (z[at] - max) - logf(sum);
    }
}

template <int C>
enum rt_status start(struct rt_queue *q, work w, int64_t n, struct rt_err *err)
{
    enum rt_status st;
    w.share = (int)((w.n_ids + 4 * C - 1) / (4 * C) * 4);
    for (w.bits = 29; w.bits > 0 && w.share >> (30 - w.bits) > 0;)
        w.bits--;
    /* two blocks a multiprocessor hide each other's waits; a long row fills one, a longer one is read again and again */
    w.held = (int64_t)w.share * 4 + (int64_t)sizeof(shared) + 1024 <= q->dev->block_shared;
    const size_t bytes = w.held ? (size_t)w.share * 4 : 0;
    RT_CUDA_TRY(cudaFuncSetAttribute(sample_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    RT_CUDA_TRY(launch(q, sample_kernel<C>, dim3((unsigned)(n * C)), THREADS, bytes, C, w));
out:
    return st;
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
    if (a->n_ids < 1 || a->n_ids > a->ld || a->n > INT32_MAX / BLOCKS || !(a->params.temperature >= 0) || !(a->params.top_p > 0 && a->params.top_p <= 1))
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
    return q->dev->cc == 90 && a->n_ids >= MANY ? start<BLOCKS>(q, w, a->n, err) : start<1>(q, w, a->n, err);
}
