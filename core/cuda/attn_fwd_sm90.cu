/* Attention forward for compute capability 9.0: what attn_fwd.cu computes, on asynchronous products.
 *
 * A block has warpgroups of 64 queries each, and a thread that keeps rings of tiles of keys and of values filled by bulk copies. A warpgroup
 * asks for the scores of the next tile before it asks for the sum over the values of this one, and takes the exponentials of the former while the
 * latter runs (Shah et al., FlashAttention-3, arXiv 2407.08608). Rows of a tile beyond the sequence are rows of its neighbour: their weights are 0.
 */
#include "core/cuda/attn_sm90.cuh"

namespace {

struct params {
    int64_t n;
    bf16 *o;
    float *lse;
    int n_tile, nh, group, dv;
    float scale_log2; /* scale / ln 2 */
};
struct maps {
    CUtensorMap q, k, v;
};

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
struct layout {
    enum {
        rows = 64 * GROUPS, threads = 128 * (GROUPS + 1), /* with a warpgroup that loads */
        registers = GROUPS == 2 ? 240 : 160,              /* of a thread that multiplies */
        q = rows * DQK * 2, k = COLS * DQK * 2, v = COLS * DV * 2, k_from = q, v_from = k_from + STAGES * k, bar_from = v_from + STAGES * v,
        bytes = bar_from + (4 * STAGES + 1) * 8 + 1024, /* room to align the start */
    };
};
/* Barriers: a ring's stage is full, or empty again; of the keys, of the values; and of the queries. */
template <int STAGES>
struct barriers {
    uint32_t at;
    __device__ __forceinline__ uint32_t k_full(int i) const { return at + i % STAGES * 8; }
    __device__ __forceinline__ uint32_t k_empty(int i) const { return at + (STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t v_full(int i) const { return at + (2 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t v_empty(int i) const { return at + (3 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t q_full() const { return at + 4 * STAGES * 8; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ void produce(const maps &m, const struct place &at, int h, int hk, int tiles, uint32_t base)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const barriers<STAGES> bar = {base + L::bar_from};
    hopper::barrier_expect(bar.q_full(), L::q);
    load_tile<DQK, L::rows>(base, &m.q, h, at.first + at.row, bar.q_full());
    for (int i = 0; i < tiles; i++) {
        if (i >= STAGES)
            barrier_wait(bar.k_empty(i), (i / STAGES - 1) & 1);
        hopper::barrier_expect(bar.k_full(i), L::k);
        load_tile<DQK, COLS>(base + L::k_from + i % STAGES * L::k, &m.k, hk, at.first + (int64_t)i * COLS, bar.k_full(i));
        if (i >= STAGES)
            barrier_wait(bar.v_empty(i), (i / STAGES - 1) & 1);
        hopper::barrier_expect(bar.v_full(i), L::v);
        load_tile<DV, COLS>(base + L::v_from + i % STAGES * L::v, &m.v, hk, at.first + (int64_t)i * COLS, bar.v_full(i));
    }
}

/* The warpgroups ask for products in turn: then the exponentials of one fall beside the products of the other. (Barriers 1 to 3: warpgroup_sync.) */
__device__ __forceinline__ void turn_take(int wg) { asm volatile("bar.sync %0, 256;" ::"r"(wg + 4) : "memory"); }
__device__ __forceinline__ void turn_give(int wg) { asm volatile("bar.arrive %0, 256;" ::"r"(wg + 4) : "memory"); }

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

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ void consume(const params &p, const struct place &at, int h, int tiles, char *pool, uint32_t base)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const barriers<STAGES> bar = {base + L::bar_from};
    const int wg = threadIdx.x / 128, lane = threadIdx.x % 32, row0 = at.row + 64 * wg, row = row0 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const uint32_t x = base + wg * 64 * 128, k0 = base + L::k_from, v0 = base + L::v_from;
    const bool frees = threadIdx.x % 128 == 0;
    float o[DV / 2] = {}, s[COLS / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shrink[2];
    uint32_t w[COLS / 16][4];

    barrier_wait(bar.q_full(), 0);
    barrier_wait(bar.k_full(0), 0);
    hopper::mma_fence();
    scores<DQK, L::rows, COLS>(s, x, k0);
    hopper::mma_commit();
    hopper::mma_wait<0>();
    pin(s);
    if (frees)
        barrier_arrive(bar.k_empty(0));
    if (COLS > row0)
        mask_causal<COLS / 2>(s, row, 0, lane);
    softmax_step<COLS / 2>(s, top, sum, shrink, p.scale_log2);
    pack_all<COLS / 2>(w, s);
    constexpr bool turns = DQK <= 128; /* with more work in a product than in its exponentials they find their own rhythm */
    if (turns && wg == GROUPS - 1)
        turn_give(0);
    for (int i = 1; i < tiles; i++) {
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
        if ((i + 1) * COLS > row0)
            mask_causal<COLS / 2>(s, row, i * COLS, lane);
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
    if (turns && wg == 0)
        turn_take(0); /* what the last one gave last */
    barrier_wait(bar.v_full(tiles - 1), (tiles - 1) / STAGES & 1);
    hopper::mma_fence();
    weighted_sum<DV, COLS>(o, w, v0 + (tiles - 1) % STAGES * L::v);
    hopper::mma_commit();
    hopper::mma_wait<0>();
    pin(o);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factor[half] = 1.0f / total;
        if (p.lse != NULL && lane % 4 == 0 && row + 8 * half < at.len)
            p.lse[h * p.n + at.first + row + 8 * half] = (top[half] * p.scale_log2 + log2f(total)) * 0.6931471805599453f;
    }
    const int64_t ld = (int64_t)p.nh * p.dv;
    rows_out<DV, L::rows>((bf16 *)pool + wg * 64 * 64, o, factor, p.o + (at.first + row0) * ld + (int64_t)h * p.dv, ld, p.dv, at.len - row0, wg);
}

#endif

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__global__ __launch_bounds__(128 * (GROUPS + 1), 1) void attn_fwd_sm90_kernel(const __grid_constant__ params p, const __grid_constant__ maps m,
                                                                              const __grid_constant__ rt_cuda_seqs seqs)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    extern __shared__ char raw[];
    char *pool = raw + (1024 - hopper::smem(raw) % 1024) % 1024;
    const uint32_t base = hopper::smem(pool);
    const barriers<STAGES> bar = {base + L::bar_from};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(bar.k_full(i), 1);
            hopper::barrier_init(bar.v_full(i), 1);
            hopper::barrier_init(bar.k_empty(i), GROUPS);
            hopper::barrier_init(bar.v_empty(i), GROUPS);
        }
        hopper::barrier_init(bar.q_full(), 1);
        hopper::barrier_init_fence();
    }
    __syncthreads();
    const int h = blockIdx.x / p.n_tile;
    const struct place at = place_of(seqs, p.n_tile - 1 - blockIdx.x % p.n_tile, L::rows);
    const int tiles = (min(at.row + (int)L::rows, at.len) + COLS - 1) / COLS;
    if (threadIdx.x >= 128 * GROUPS) {
        hopper::registers_fewer<24>();
        if (threadIdx.x == 128 * GROUPS)
            produce<DQK, DV, COLS, STAGES, GROUPS>(m, at, h, h / p.group, tiles, base);
    } else {
        hopper::registers_more<L::registers>();
        consume<DQK, DV, COLS, STAGES, GROUPS>(p, at, h, tiles, pool, base);
    }
#endif
}

template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
enum rt_status launch(struct rt_queue *q, const struct rt_attn_fwd_args *a, struct rt_err *err)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const struct rt_attn_shape *s = &a->s;
    struct rt_cuda_seqs seqs;
    maps m;
    params p = {};
    int64_t n_tile;
    enum rt_status st;
    seqs.dev = NULL;
    p.n = s->n, p.o = (bf16 *)a->o, p.lse = a->lse, p.nh = s->nh, p.group = s->nh / s->nkv, p.dv = s->dv;
    p.scale_log2 = (float)(s->scale * 1.4426950408889634);
    RT_TRY(attn_map(q, &m.q, a->q, s->n, s->nh, s->dqk, a->q_ld, a->q_head, L::rows, err));
    RT_TRY(attn_map(q, &m.k, a->k, s->n, s->nkv, s->dqk, a->k_ld, a->k_head, COLS, err));
    RT_TRY(attn_map(q, &m.v, a->v, s->n, s->nkv, s->dv, a->v_ld, a->v_head, COLS, err));
    RT_TRY(rt_cuda_seqs_make(q, s, L::rows, &seqs, &n_tile, err));
    p.n_tile = (int)n_tile;
    RT_TRY(rt_cuda_check(cudaFuncSetAttribute(attn_fwd_sm90_kernel<DQK, DV, COLS, STAGES, GROUPS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              L::bytes), "cudaFuncSetAttribute", err));
    attn_fwd_sm90_kernel<DQK, DV, COLS, STAGES, GROUPS><<<(unsigned)(n_tile * s->nh), L::threads, L::bytes, q->stream>>>(p, m, seqs);
    st = rt_cuda_launched("attn_fwd_sm90", err);
out:
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
    /* small heads: exponentials count for more, and there are registers for a third warpgroup */
    if (s->dqk <= 64 && s->dv <= 64)
        return launch<64, 64, 128, 3, 3>(q, a, err);
    if (s->dqk <= 128)
        return launch<128, 128, 128, 2, 2>(q, a, err);
    return launch<192, 128, 128, 2, 2>(q, a, err);
}
