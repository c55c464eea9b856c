/* head_topk: logits of a block of rows by a product, then one kernel over each row. Contract: core/backend.h.
 *
 * A block of threads reads its row twice. First: running maximum and sums of exponentials (each thread rescales its sums when its maximum grows;
 * they are merged in a fixed tree), the rank of `next`, and the maximum of each thread's part. The k-th greatest of these maxima is a lower
 * bound of the k-th greatest logit. Second: logits that reach the bound go to shared memory, and are sorted there. Where too many do
 * (many equal logits) or k exceeds the threads, the bound is found exactly, digit by digit.
 *
 * Logits are compared as unsigned keys of the same order; a candidate is its key, then the complement of its id, so that equal logits come by
 * ascending id. */
#include <cfloat>

#include "core/cuda/gemm.h"

namespace {

enum {
    THREADS = 512, FAR = 4 /* vectors that a thread reads ahead */, SUMS = 9 /* temperatures and 1 */,
    CANDIDATES = 4096, MOST_ROWS = 2048, LARGEST_K = 2048
};

struct outputs {
    const int32_t *next;
    uint32_t *topk_ids, *next_rank;
    float *topk_logits, *lse, *next_logprob;
    int n_ids, k, n_lse;
    /* of sum i: 1/T, and log2(e)/T; sum n_lse and those behind are at T = 1 */
    float inv_temp[SUMS], rate[SUMS];
};

/* Order of floats as unsigned: -0 counts as 0. */
__device__ uint32_t key_of(float z)
{
    const uint32_t u = __float_as_uint(z + 0.0f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

__device__ float logit_of(uint32_t key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* Maximum of a part of the row, and sums of 2^((z - max) rate[i]). */
template <int S>
struct part {
    float max, sum[S];
};

__device__ float exp_2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <int S>
__device__ void raise(part<S> &p, const outputs &o, float max)
{
#pragma unroll
    for (int i = 0; i < S; i++)
        p.sum[i] *= exp_2((p.max - max) * o.rate[i]);
    p.max = max;
}

template <int S>
__device__ void add(part<S> &p, const outputs &o, float z)
{
#pragma unroll
    for (int i = 0; i < S; i++)
        p.sum[i] += exp_2((z - p.max) * o.rate[i]);
}

template <int S>
__device__ void merge(part<S> &p, const outputs &o, const part<S> &other)
{
    const float max = fmaxf(p.max, other.max);
#pragma unroll
    for (int i = 0; i < S; i++)
        p.sum[i] = p.sum[i] * exp_2((p.max - max) * o.rate[i]) + other.sum[i] * exp_2((other.max - max) * o.rate[i]);
    p.max = max;
}

/* Sorts v [n], n a power of two, in descending order. */
template <class T>
__device__ void sort_descending(T *v, int n)
{
    for (int size = 2; size <= n; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < n / 2; i += THREADS) {
                const int a = 2 * i - (i & (step - 1)), b = a + step;
                const bool descending = (a & size) == 0;
                const T x = v[a], y = v[b];
                if (descending ? x < y : x > y) {
                    v[a] = y;
                    v[b] = x;
                }
            }
        }
    __syncthreads();
}

/* The four logits from v on; those that do not exist are left out by the caller. Rows are 16-byte aligned and have room behind n_ids. */
__device__ float4 load4(const float *z, int v)
{
    return __ldcg(reinterpret_cast<const float4 *>(z + v));
}

struct shared {
    part<SUMS> warp[THREADS / 32];
    uint32_t rank[THREADS / 32];
    uint32_t best[THREADS]; /* key of each thread's greatest logit */
    uint32_t histogram[256];
    int count;
    uint32_t prefix, above; /* of the exact bound */
    uint64_t candidate[CANDIDATES];
};

/* Calls f(v, e) for this thread's share of the row: FAR vectors of four logits at a time, those of ids v + 4 THREADS u + j. Ids that do not exist
 * count as -inf, which adds nothing anywhere. */
template <class F>
__device__ void for_share(const float *z, int n_ids, F f)
{
    const int whole = n_ids / 4 * 4;
    for (int v = threadIdx.x * 4; v < n_ids; v += THREADS * 4 * FAR) {
        float e[FAR][4];
#pragma unroll
        for (int u = 0; u < FAR; u++) {
            const int at = v + THREADS * 4 * u;
            const float4 q = at < n_ids ? load4(z, at) : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
            e[u][0] = q.x;
            e[u][1] = q.y;
            e[u][2] = q.z;
            e[u][3] = q.w;
            if (at == whole) /* the last vector is not whole */
#pragma unroll
                for (int j = 1; j < 4; j++)
                    e[u][j] = at + j < n_ids ? e[u][j] : -INFINITY;
        }
        f(v, e);
    }
}

__device__ float greatest(const float (&e)[FAR][4])
{
    float max = -INFINITY;
#pragma unroll
    for (int u = 0; u < FAR; u++)
        max = fmaxf(max, fmaxf(fmaxf(e[u][0], e[u][1]), fmaxf(e[u][2], e[u][3])));
    return max;
}

/* First reading: p, and how many logits of this thread's share come before `next`. */
template <int S>
__device__ void read_row(const float *z, const outputs &o, int next, bool exists, part<S> &p, uint32_t &rank)
{
    /* a logit comes before by being greater; with a smaller id, by being greater than the float below */
    const float at = exists ? z[next] : INFINITY, below = exists ? nextafterf(at, -INFINITY) : INFINITY;
    for_share(z, o.n_ids, [&](int v, const float (&e)[FAR][4]) {
        const float max = greatest(e);
        if (max > p.max)
            raise(p, o, max);
#pragma unroll
        for (int u = 0; u < FAR; u++) {
            const float least = v + THREADS * 4 * u + 3 < next ? below : at;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                rank += e[u][j] > least;
                add(p, o, e[u][j]);
            }
        }
    });
    if (exists && threadIdx.x < next % 4) /* in the vector of next: equal logits of smaller ids */
        rank += z[next / 4 * 4 + threadIdx.x] == at;
}

/* Merges the threads' parts into p and rank of thread 0. */
template <int S>
__device__ void reduce(shared &s, const outputs &o, part<S> &p, uint32_t &rank)
{
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        part<S> other;
        other.max = __shfl_down_sync(~0u, p.max, step);
#pragma unroll
        for (int i = 0; i < S; i++)
            other.sum[i] = __shfl_down_sync(~0u, p.sum[i], step);
        merge(p, o, other);
        rank += __shfl_down_sync(~0u, rank, step);
    }
    if (threadIdx.x % 32 == 0) {
        part<SUMS> &mine = s.warp[threadIdx.x / 32];
        mine.max = p.max;
#pragma unroll
        for (int i = 0; i < S; i++)
            mine.sum[i] = p.sum[i];
        s.rank[threadIdx.x / 32] = rank;
    }
    __syncthreads();
    for (int w = 1; w < THREADS / 32 && threadIdx.x == 0; w++) {
        part<S> other;
        other.max = s.warp[w].max;
#pragma unroll
        for (int i = 0; i < S; i++)
            other.sum[i] = s.warp[w].sum[i];
        merge(p, o, other);
        rank += s.rank[w];
    }
}

template <int S>
__device__ void write_sums(const outputs &o, const part<S> &p, uint32_t rank, int64_t row, const float *z, int next, bool exists)
{
#pragma unroll
    for (int i = 0; i < S; i++) {
        if (i < o.n_lse)
            o.lse[row * o.n_lse + i] = p.max * o.inv_temp[i] + logf(p.sum[i]);
        else if (i == o.n_lse && o.next_logprob != NULL)
            o.next_logprob[row] = exists ? (z[next] - p.max) - logf(p.sum[i]) : -INFINITY;
    }
    if (o.next_rank != NULL)
        o.next_rank[row] = exists ? rank : (uint32_t)o.n_ids;
}

/* Logits of keys >= bound into s.candidate; s.count of them, of which the first CANDIDATES are kept. */
__device__ void collect(shared &s, const float *z, const outputs &o, uint32_t bound)
{
    const float least = logit_of(bound);
    if (threadIdx.x == 0)
        s.count = 0;
    __syncthreads();
    for_share(z, o.n_ids, [&](int v, const float (&e)[FAR][4]) {
        if (greatest(e) < least)
            return;
#pragma unroll
        for (int u = 0; u < FAR; u++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int id = v + THREADS * 4 * u + j;
                if (id < o.n_ids && e[u][j] >= least) {
                    const int at = atomicAdd(&s.count, 1);
                    if (at < CANDIDATES)
                        s.candidate[at] = (uint64_t)key_of(e[u][j]) << 32 | (uint32_t)~(uint32_t)id;
                }
            }
    });
    __syncthreads();
}

/* s.prefix = the key of the k-th greatest logit, s.above = how many are greater. */
__device__ void exact_bound(shared &s, const float *z, const outputs &o)
{
    uint32_t left = (uint32_t)o.k;
    uint32_t prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += THREADS)
            s.histogram[i] = 0;
        __syncthreads();
        const uint32_t mask = shift == 24 ? 0 : ~0u << (shift + 8);
        for (int v = threadIdx.x; v < o.n_ids; v += THREADS) {
            const uint32_t key = key_of(z[v]);
            if ((key & mask) == prefix)
                atomicAdd(&s.histogram[key >> shift & 255], 1);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255;
            uint32_t rest = left;
            while (s.histogram[digit] < rest && digit > 0)
                rest -= s.histogram[digit--];
            s.prefix = prefix | (uint32_t)digit << shift;
            s.above = rest;
        }
        __syncthreads();
        prefix = s.prefix;
        left = s.above;
        __syncthreads();
    }
    if (threadIdx.x == 0)
        s.above = (uint32_t)o.k - left;
    __syncthreads();
}

/* Where too many logits reach the bound: all above the exact one, then those that equal it by ascending id. */
__device__ void collect_exact(shared &s, const float *z, const outputs &o)
{
    exact_bound(s, z, o);
    const uint32_t bound = s.prefix;
    for (int i = threadIdx.x; i < o.k; i += THREADS)
        s.candidate[i] = 0; /* where logits are NaN, not all places are taken */
    if (bound != ~0u)
        collect(s, z, o, bound + 1);
    else if (threadIdx.x == 0)
        s.count = 0;
    __syncthreads();
    for (int base = 0, have = (int)s.above; base < o.n_ids && have < o.k; base += THREADS) {
        const int v = base + threadIdx.x;
        const bool equal = v < o.n_ids && key_of(z[v]) == bound;
        const uint32_t votes = __ballot_sync(~0u, equal);
        if (threadIdx.x % 32 == 0)
            s.rank[threadIdx.x / 32] = (uint32_t)__popc(votes);
        __syncthreads();
        int at = have + __popc(votes & ((1u << threadIdx.x % 32) - 1)), total = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            at += w < (int)threadIdx.x / 32 ? (int)s.rank[w] : 0;
            total += (int)s.rank[w];
        }
        if (equal && at < o.k)
            s.candidate[at] = (uint64_t)bound << 32 | (uint32_t)~(uint32_t)v;
        have += total;
        __syncthreads();
    }
    if (threadIdx.x == 0)
        s.count = o.k;
    __syncthreads();
}

__device__ void top_k(shared &s, const float *z, const outputs &o, int64_t row, uint32_t best)
{
    if (o.k <= THREADS) {
        s.best[threadIdx.x] = best;
        sort_descending(s.best, THREADS);
        collect(s, z, o, s.best[o.k - 1]);
    }
    if (o.k > THREADS || s.count > CANDIDATES || s.count < o.k) {
        __syncthreads();
        collect_exact(s, z, o);
    }
    int n = 1;
    while (n < s.count)
        n *= 2;
    for (int i = s.count + threadIdx.x; i < n; i += THREADS)
        s.candidate[i] = 0;
    sort_descending(s.candidate, n);
    for (int i = threadIdx.x; i < o.k; i += THREADS) {
        o.topk_ids[row * o.k + i] = ~(uint32_t)s.candidate[i];
        o.topk_logits[row * o.k + i] = logit_of((uint32_t)(s.candidate[i] >> 32));
    }
}

/* One row a block; row0: of the first row among the outputs. S sums: those wanted, or more. */
template <int S>
__global__ void __launch_bounds__(THREADS, 2) head_rows(const float *__restrict__ logits, int64_t ld, int64_t row0, outputs o)
{
    extern __shared__ __align__(16) unsigned char memory[];
    shared &s = *reinterpret_cast<shared *>(memory);
    const int64_t row = row0 + blockIdx.x;
    const float *z = logits + blockIdx.x * ld;
    const int next = o.next != NULL ? o.next[row] : -1;
    const bool exists = next >= 0 && next < o.n_ids;
    part<S> p;
    uint32_t rank = 0;
    p.max = -FLT_MAX;
#pragma unroll
    for (int i = 0; i < S; i++)
        p.sum[i] = 0.0f;
    read_row(z, o, next, exists, p, rank);
    const uint32_t best = p.max > -FLT_MAX ? key_of(p.max) : 0; /* 0: no logit, below all */
    reduce(s, o, p, rank);
    if (threadIdx.x == 0)
        write_sums(o, p, rank, row, z, next, exists);
    if (o.topk_ids != NULL && o.k > 0)
        top_k(s, z, o, row, best);
}

enum rt_status check(const struct rt_head_topk_args *a, struct rt_err *err)
{
    if (a->w->cols != a->H || a->n_ids <= 0 || a->n_ids > a->w->rows || a->n_ids > INT32_MAX / 2 || a->k < 0 || a->k > a->n_ids)
        return rt_fail(err, RT_SHAPE, "head_topk: the best %d of %ld ids from a head of %ld x %ld over states of %ld", a->k, (long)a->n_ids,
                       (long)a->w->rows, (long)a->w->cols, (long)a->H);
    if (a->n_lse >= SUMS || (a->topk_ids != NULL && a->k > LARGEST_K))
        return rt_fail(err, RT_UNSUPPORTED, "head_topk: %d temperatures and the best %d; on the GPU at most %d and %d", a->n_lse, a->k, SUMS - 1,
                       (int)LARGEST_K);
    return RT_OK;
}

outputs outputs_of(const struct rt_head_topk_args *a)
{
    outputs o = {};
    o.next = a->next;
    o.topk_ids = a->topk_logits != NULL ? a->topk_ids : NULL;
    o.topk_logits = a->topk_logits;
    o.lse = a->lse;
    o.next_logprob = a->next != NULL ? a->next_logprob : NULL;
    o.next_rank = a->next != NULL ? a->next_rank : NULL;
    o.n_ids = (int)a->n_ids;
    o.k = a->k;
    o.n_lse = a->n_lse;
    for (int i = 0; i < SUMS; i++) {
        o.inv_temp[i] = i < a->n_lse ? a->inv_temp[i] : 1.0f;
        o.rate[i] = (float)(o.inv_temp[i] * 1.4426950408889634);
    }
    return o;
}

template <int S>
enum rt_status launch(struct rt_queue *q, const float *z, int64_t ld, int64_t row0, int64_t rows, const outputs &o, struct rt_err *err)
{
    enum rt_status st;
    RT_CUDA_TRY(cudaFuncSetAttribute((const void *)head_rows<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(shared)));
    head_rows<S><<<(unsigned)rows, THREADS, sizeof(shared), q->stream>>>(z, ld, row0, o);
    RT_TRY(rt_cuda_launched("head_rows", err));
out:
    return st;
}

}

enum rt_status rt_cuda_head_topk(struct rt_dev *dev, struct rt_queue *q, const struct rt_head_topk_args *a, struct rt_err *err)
{
    const void *w = NULL;
    void *temp = NULL;
    float *z = NULL;
    enum rt_status st;
    RT_TRY(check(a, err));
    if (a->n <= 0)
        return RT_OK;
    {
        /* whole vectors of columns where the head has them: the product is faster, and nobody reads them */
        const int64_t ld = (a->n_ids + 7) / 8 * 8, cols = ld <= a->w->rows ? ld : a->n_ids;
        const int64_t fits = (int64_t)(dev->scratch / ((uint64_t)ld * sizeof(float)));
        int64_t rows = fits < MOST_ROWS ? fits : MOST_ROWS;
        rows = rows < 1 ? 1 : rows < a->n ? rows : a->n;
        const outputs o = outputs_of(a);
        const int sums = a->n_lse + (o.next_logprob != NULL);
        RT_TRY(rt_cuda_weight_bf16(q, a->w, &w, &temp, err));
        RT_TRY(rt_cuda_temp(q, (size_t)(rows * ld) * sizeof(float), &z, err));
        for (int64_t r = 0; r < a->n; r += rows) {
            struct rt_cuda_gemm_args g = {};
            g.a = (const char *)a->x + r * a->H * 2;
            g.b = w;
            g.d = z;
            g.m = rows < a->n - r ? rows : a->n - r;
            g.n = cols;
            g.k = a->H;
            g.ldd = ld;
            g.b_t = g.d_f32 = true;
            RT_TRY(rt_cuda_gemm(q, &g, err));
            RT_TRY(sums <= 2 ? launch<2>(q, z, ld, r, g.m, o, err) : sums <= 4 ? launch<4>(q, z, ld, r, g.m, o, err)
                                                                   : launch<SUMS>(q, z, ld, r, g.m, o, err));
        }
    }
out:
    rt_cuda_temp_free(q, z);
    rt_cuda_temp_free(q, temp);
    return st;
}
