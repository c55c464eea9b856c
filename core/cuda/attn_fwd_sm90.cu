/* Attention forward for compute capability 9.0: what attn_fwd.cu computes, on asynchronous products.
 *
 * A block has warpgroups of 64 queries each, and a thread that keeps rings of tiles of keys and of values filled by bulk copies. A warpgroup
 * asks for the scores of the next tile before it asks for the sum over the values of this one, and takes the exponentials of the former while the
 * latter runs (Shah et al., FlashAttention-3, arXiv 2407.08608). Rows of a tile beyond the sequence are rows of its neighbour: their weights are 0.
 * Blocks stay and take work by a ticket, so that the next work's tiles come in while the last one's sums go out.
 */
#include "core/cuda/attn_sm90.cuh"

namespace {

struct params {
    int64_t n;
    bf16 *o;
    float *lse;
    int n_tile, nh, group, dv;
    float scale_log2; /* scale / ln 2 */
    int32_t *ticket;
    /* sequences of one length: of as many heads and sequences as L2 holds the keys and values of (pairs), the longest work first; 0: lengths differ */
    int len, tiles, pairs, all_pairs;
};
struct maps {
    CUtensorMap q, k, v;
};
/* Rows row .. of a sequence, for a head; -1: no more work. */
struct work {
    int32_t first, len, row, head;
};

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
struct layout {
    enum {
        rows = 64 * GROUPS, threads = 128 * (GROUPS + 1), /* with a warpgroup that loads */
        registers = GROUPS == 2 ? 240 : 160,              /* of a thread that multiplies */
        q = rows * DQK * 2, k = COLS * DQK * 2, v = COLS * DV * 2, k_from = q, v_from = k_from + STAGES * k, bar_from = v_from + STAGES * v,
        work_from = bar_from + (4 * STAGES + 6) * 8, bytes = work_from + 2 * sizeof(work),
    };
};
/* Barriers: a ring's stage is full, or empty again; of the keys, of the values; of the queries; and of the work. */
template <int STAGES>
struct barriers {
    uint32_t at;
    __device__ __forceinline__ uint32_t k_full(uint32_t i) const { return at + i % STAGES * 8; }
    __device__ __forceinline__ uint32_t k_empty(uint32_t i) const { return at + (STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t v_full(uint32_t i) const { return at + (2 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t v_empty(uint32_t i) const { return at + (3 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t q_full() const { return at + 4 * STAGES * 8; }
    __device__ __forceinline__ uint32_t q_empty() const { return at + (4 * STAGES + 1) * 8; }
    __device__ __forceinline__ uint32_t work_full(int it) const { return at + (4 * STAGES + 2 + it % 2) * 8; }
    __device__ __forceinline__ uint32_t work_empty(int it) const { return at + (4 * STAGES + 4 + it % 2) * 8; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Shared memory begins where tiles may (the kernel looks). */
extern __shared__ __align__(1024) char pool[];
__device__ __forceinline__ uint32_t pool_at() { return hopper::smem(pool); }

template <class L>
__device__ __forceinline__ struct work *work_at(int it) { return (struct work *)(pool + L::work_from) + it % 2; }

__device__ __forceinline__ struct work work_of(const params &p, const rt_cuda_seqs &seqs, int ticket, int rows)
{
    if (ticket >= p.n_tile * p.nh)
        return {0, 0, 0, -1};
    if (p.len > 0) {
        const int at = ticket / (p.pairs * p.tiles) * p.pairs, rest = ticket - at * p.tiles, many = min(p.pairs, p.all_pairs - at), pair = at + rest % many;
        return {pair / p.nh * p.len, p.len, (p.tiles - 1 - rest / many) * rows, pair % p.nh};
    }
    const struct place at = place_of(seqs, p.n_tile - 1 - ticket % p.n_tile, rows);
    return {(int32_t)at.first, at.len, at.row, ticket / p.n_tile};
}
template <int COLS>
__device__ __forceinline__ int tiles_of(const struct work &w, int rows) { return (min(w.row + rows, w.len) + COLS - 1) / COLS; }

/* One thread. */
template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ void produce(const params &p, const maps &m, const rt_cuda_seqs &seqs)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const uint32_t base = pool_at();
    const barriers<STAGES> bar = {base + L::bar_from};
    uint32_t i = 0; /* tiles of all work so far */
    for (int it = 0;; it++) {
        const struct work w = work_of(p, seqs, atomicAdd(p.ticket, 1), L::rows);
        if (it >= 2)
            barrier_wait(bar.work_empty(it), (it / 2 - 1) & 1);
        *work_at<L>(it) = w;
        barrier_arrive(bar.work_full(it));
        if (w.head < 0)
            break;
        if (it > 0)
            barrier_wait(bar.q_empty(), (it - 1) & 1);
        hopper::barrier_expect(bar.q_full(), L::q);
        load_tile<DQK, L::rows>(base, &m.q, w.head, w.first + w.row, bar.q_full());
        const int tiles = tiles_of<COLS>(w, L::rows), hk = w.head / p.group;
        for (int t = 0; t < tiles; t++, i++) {
            if (i >= STAGES)
                barrier_wait(bar.k_empty(i), (i / STAGES - 1) & 1);
            hopper::barrier_expect(bar.k_full(i), L::k);
            load_tile<DQK, COLS>(base + L::k_from + i % STAGES * L::k, &m.k, hk, w.first + t * COLS, bar.k_full(i));
            if (i >= STAGES)
                barrier_wait(bar.v_empty(i), (i / STAGES - 1) & 1);
            hopper::barrier_expect(bar.v_full(i), L::v);
            load_tile<DV, COLS>(base + L::v_from + i % STAGES * L::v, &m.v, hk, w.first + t * COLS, bar.v_full(i));
        }
    }
}

/* The warpgroups ask for products in turn: then the exponentials of one fall beside the products of the other. */
__device__ __forceinline__ void turn_take(int wg) { asm volatile("bar.sync %0, 256;" ::"r"(wg + 1) : "memory"); }
__device__ __forceinline__ void turn_give(int wg) { asm volatile("bar.arrive %0, 256;" ::"r"(wg + 1) : "memory"); }

/* Scores to weights relative to the running maximum; shrink: what earlier sums are to be multiplied by. Every row has a score in the first tile. */
template <int N>
__device__ __forceinline__ void softmax_step(float (&s)[N], float (&top)[2], float (&sum)[2], float (&shrink)[2], float scale_log2)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = top[half];
#pragma unroll
        for (int j = 0; j < N / 4; j++)
            m = fmaxf(m, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        shrink[half] = exp2_fast((top[half] - m) * scale_log2);
        top[half] = m;
        const float base = m * scale_log2;
        float add = 0;
#pragma unroll
        for (int j = 0; j < N / 4; j++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                s[4 * j + e] = exp2_fast(fmaf(s[4 * j + e], scale_log2, -base));
                add += s[4 * j + e];
            }
        sum[half] = sum[half] * shrink[half] + add;
    }
}

template <int N>
__device__ __forceinline__ void mask_causal(float (&s)[N], int row, int col0, int lane)
{
#pragma unroll
    for (int j = 0; j < N / 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (col0 + 8 * j + lane % 4 * 2 + (i & 1) > row + (i >> 1) * 8)
                s[4 * j + i] = -INFINITY;
}

/* A thread's rows, row and row + 8: the sums over the sum of the weights, and the log of that. */
template <int DV>
__device__ __forceinline__ void queries_out(const params &p, const struct work at, const float (&o)[DV / 2], const float (&top)[2], const float (&sum)[2],
                                            int row, int lane)
{
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factor[half] = 1.0f / total;
        if (p.lse != NULL && lane % 4 == 0 && row + 8 * half < at.len)
            p.lse[at.head * p.n + at.first + row + 8 * half] = (top[half] * p.scale_log2 + log2f(total)) * 0.6931471805599453f;
    }
    const int64_t ld = (int64_t)p.nh * p.dv;
    sums_out<DV>(o, factor, p.o + at.first * ld + (int64_t)at.head * p.dv, ld, p.dv, row, at.len, lane);
}

/* One piece of work of a warpgroup, the it-th of the block; n: tiles before it. Returns its tiles. */
template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ int queries(const params &p, int it, uint32_t n)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const uint32_t base = pool_at();
    const barriers<STAGES> bar = {base + L::bar_from};
    const int wg = uniform(threadIdx.x / 128), lane = threadIdx.x % 32, in_block = threadIdx.x / 32 * 16 + lane / 4;
    const int tiles = uniform(tiles_of<COLS>(*work_at<L>(it), L::rows)), first_row = uniform(work_at<L>(it)->row), row0 = first_row + 64 * wg,
              row = first_row + in_block;
    const uint32_t x = base + wg * 64 * 128, k0 = base + L::k_from, v0 = base + L::v_from;
    const bool frees = threadIdx.x % 128 == 0;
    float o[DV / 2] = {}, s[COLS / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shrink[2];
    uint32_t w[COLS / 16][4];

    barrier_wait(bar.q_full(), it & 1);
    barrier_wait(bar.k_full(n), n / STAGES & 1);
    hopper::mma_fence();
    scores<DQK, L::rows, COLS>(s, x, k0 + n % STAGES * L::k);
    hopper::mma_commit();
    hopper::mma_wait<0>();
    pin(s);
    if (frees)
        barrier_arrive(bar.k_empty(n));
    if (COLS > row0)
        mask_causal<COLS / 2>(s, row, 0, lane);
    softmax_step<COLS / 2>(s, top, sum, shrink, p.scale_log2);
    pack_all<COLS / 2>(w, s);
    constexpr bool turns = DQK <= 128; /* with more work in a product than in its exponentials they find their own rhythm */
    for (int t = 1; t < tiles; t++) {
        const uint32_t i = n + t;
        barrier_wait(bar.k_full(i), i / STAGES & 1);
        if (turns)
            turn_take(wg);
        hopper::mma_fence();
        scores<DQK, L::rows, COLS>(s, x, k0 + i % STAGES * L::k);
        hopper::mma_commit();
        barrier_wait(bar.v_full(i - 1), (i - 1) / STAGES & 1);
        hopper::mma_fence();
        weighted_sum<DV, COLS>(o, w, v0 + (i - 1) % STAGES * L::v);
        hopper::mma_commit();
        if (turns)
            turn_give((wg + 1) % GROUPS);
        hopper::mma_wait<1>();
        pin(s);
        if (frees)
            barrier_arrive(bar.k_empty(i));
        if ((t + 1) * COLS > row0)
            mask_causal<COLS / 2>(s, row, t * COLS, lane);
        softmax_step<COLS / 2>(s, top, sum, shrink, p.scale_log2);
        hopper::mma_wait<0>();
        pin(o);
        if (frees)
            barrier_arrive(bar.v_empty(i - 1));
#pragma unroll
        for (int j = 0; j < DV / 2; j++)
            o[j] *= shrink[j >> 1 & 1];
        pack_all<COLS / 2>(w, s);
    }
    if (frees)
        barrier_arrive(bar.q_empty());
    const uint32_t last = n + tiles - 1;
    barrier_wait(bar.v_full(last), last / STAGES & 1);
    hopper::mma_fence();
    weighted_sum<DV, COLS>(o, w, v0 + last % STAGES * L::v);
    hopper::mma_commit();
    hopper::mma_wait<0>();
    pin(o);
    if (frees)
        barrier_arrive(bar.v_empty(last));
    queries_out<DV>(p, *work_at<L>(it), o, top, sum, row, lane);
    return tiles;
}

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ void consume(const params &p)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const barriers<STAGES> bar = {pool_at() + L::bar_from};
    const int wg = uniform(threadIdx.x / 128);
    uint32_t n = 0;
    if (DQK <= 128 && wg == GROUPS - 1)
        turn_give(0);
    for (int it = 0;; it++) {
        barrier_wait(bar.work_full(it), it / 2 & 1);
        if (uniform(work_at<L>(it)->head) < 0)
            break;
        n += queries<DQK, DV, COLS, STAGES, GROUPS>(p, it, n);
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            barrier_arrive(bar.work_empty(it));
    }
    if (DQK <= 128 && wg == 0)
        turn_take(0); /* what the last one gave last */
}

#endif

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__global__ __launch_bounds__(128 * (GROUPS + 1), 1) void attn_fwd_sm90_kernel(const __grid_constant__ params p, const __grid_constant__ maps m,
                                                                              const __grid_constant__ rt_cuda_seqs seqs)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const barriers<STAGES> bar = {pool_at() + L::bar_from};
    if (threadIdx.x == 0) {
        if (pool_at() % 1024 != 0)
            __trap();
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(bar.k_full(i), 1);
            hopper::barrier_init(bar.v_full(i), 1);
            hopper::barrier_init(bar.k_empty(i), GROUPS);
            hopper::barrier_init(bar.v_empty(i), GROUPS);
        }
        for (int i = 0; i < 2; i++) {
            hopper::barrier_init(bar.work_full(i), 1);
            hopper::barrier_init(bar.work_empty(i), 4 * GROUPS); /* warps */
        }
        hopper::barrier_init(bar.q_full(), 1);
        hopper::barrier_init(bar.q_empty(), GROUPS);
        hopper::barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * GROUPS) {
        hopper::registers_fewer<24>();
        if (threadIdx.x == 128 * GROUPS)
            produce<DQK, DV, COLS, STAGES, GROUPS>(p, m, seqs);
    } else {
        hopper::registers_more<L::registers>();
        consume<DQK, DV, COLS, STAGES, GROUPS>(p);
    }
#endif
}

/* Tiles of 128 keys that all warpgroups of 64 queries go through where a block has `groups` of them. */
int64_t steps_with(const struct rt_attn_shape *s, int groups)
{
    int64_t steps = 0;
    for (int64_t i = 0; i < s->n_seq; i++) {
        const int64_t len = s->cu_seqlens[i + 1] - s->cu_seqlens[i];
        for (int64_t row = 0; row < len; row += 64 * groups)
            steps += groups * (((row + 64 * groups < len ? row + 64 * groups : len) + 127) / 128);
    }
    return steps;
}

/* Half of L2 for keys and values: queries and sums pass by once. */
void order_for(params *p, const struct rt_attn_shape *s, int rows, const struct rt_dev *dev)
{
    const int64_t len = s->cu_seqlens[1];
    for (int64_t i = 0; i < s->n_seq; i++)
        if (s->cu_seqlens[i + 1] - s->cu_seqlens[i] != len)
            return;
    const int64_t all = s->n_seq * s->nh, fit = (int64_t)(dev->l2_bytes / 2) / (len * (s->dqk + s->dv) * 2) * p->group;
    p->len = (int)len, p->tiles = (int)((len + rows - 1) / rows), p->all_pairs = (int)all;
    p->pairs = (int)(fit < 1 ? 1 : fit < all ? fit : all);
}

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
enum rt_status launch(struct rt_queue *q, const struct rt_attn_fwd_args *a, struct rt_err *err)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const struct rt_attn_shape *s = &a->s;
    struct rt_cuda_seqs seqs;
    maps m;
    params p = {};
    int64_t n_tile, blocks;
    enum rt_status st;
    seqs.dev = NULL;
    p.ticket = NULL;
    p.n = s->n, p.o = (bf16 *)a->o, p.lse = a->lse, p.nh = s->nh, p.group = s->nh / s->nkv, p.dv = s->dv;
    p.scale_log2 = (float)(s->scale * 1.4426950408889634);
    RT_TRY(attn_map(q, &m.q, a->q, s->n, s->nh, s->dqk, a->q_ld, a->q_head, L::rows, err));
    RT_TRY(attn_map(q, &m.k, a->k, s->n, s->nkv, s->dqk, a->k_ld, a->k_head, COLS, err));
    RT_TRY(attn_map(q, &m.v, a->v, s->n, s->nkv, s->dv, a->v_ld, a->v_head, COLS, err));
    RT_TRY(rt_cuda_seqs_make(q, s, L::rows, &seqs, &n_tile, err));
    p.n_tile = (int)n_tile;
    order_for(&p, s, L::rows, q->dev);
    RT_TRY(rt_cuda_temp(q, sizeof *p.ticket, &p.ticket, err));
    RT_CUDA_TRY(cudaMemsetAsync(p.ticket, 0, sizeof *p.ticket, q->stream));
    RT_TRY(rt_cuda_check(cudaFuncSetAttribute(attn_fwd_sm90_kernel<DQK, DV, COLS, STAGES, GROUPS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              L::bytes), "cudaFuncSetAttribute", err));
    blocks = n_tile * s->nh < q->dev->sm_count ? n_tile * s->nh : q->dev->sm_count;
    attn_fwd_sm90_kernel<DQK, DV, COLS, STAGES, GROUPS><<<(unsigned)blocks, L::threads, L::bytes, q->stream>>>(p, m, seqs);
    st = rt_cuda_launched("attn_fwd_sm90", err);
out:
    rt_cuda_temp_free(q, p.ticket);
    rt_cuda_temp_free(q, (void *)seqs.dev);
    return st;
}

}

enum rt_status rt_cuda_attn_fwd_hopper(struct rt_queue *q, const struct rt_attn_fwd_args *a, bool *done, struct rt_err *err)
{
    const struct rt_attn_shape *s = &a->s;
    *done = q->dev->encode_map != NULL && s->dqk <= 192 && s->dv <= 128 && aligned16(a->q, a->q_ld, a->q_head, s->dqk) &&
            aligned16(a->k, a->k_ld, a->k_head, s->dqk) && aligned16(a->v, a->v_ld, a->v_head, s->dv) && aligned16(a->o, 0, 0, s->dv);
    if (!*done)
        return RT_OK;
    /* Small heads: exponentials count for more, and there are registers for a third warpgroup; unless sequences are so short that its rows cost more
     * than it brings (taken to be 15 %; at 1,024 tokens they cost 33). */
    if (s->dqk <= 64 && s->dv <= 64)
        return steps_with(s, 2) * 20 < steps_with(s, 3) * 17 ? launch<64, 64, 128, 4, 2>(q, a, err) : launch<64, 64, 128, 3, 3>(q, a, err);
    if (s->dqk <= 128)
        return launch<128, 128, 128, 2, 2>(q, a, err);
    return launch<192, 128, 128, 2, 2>(q, a, err);
}
