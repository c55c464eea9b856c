/* Attention forward for compute capability 9.0: what attn_fwd.cu computes, on asynchronous products.
 *
 * A block has warpgroups of 64 queries each, and a thread that keeps rings of tiles of keys and of values filled by bulk copies. A warpgroup
 * asks for the scores of the next tile before it asks for the sum over the values of this one, and takes the exponentials of the former while the
 * latter runs (Shah et al., FlashAttention-3, arXiv 2407.08608). Rows of a tile beyond the sequence are rows of its neighbour: their weights are 0.
 * Blocks stay and take work by a ticket, so that the next work's tiles come in while the last one's sums go out.
 * MLA's keys come from two arrays, and sums go out as e4m3 codes where they are asked for: a head's 128 columns are a block of them.
 */
#include "core/cuda/attn_sm90.cuh"
#include "core/cuda/quant.cuh"

namespace {

struct params {
    int64_t n;
    bf16 *o;
    float *lse;
    int n_tile, nh, group, dv;
    float scale_log2; /* scale / ln 2 */
    int32_t *ticket;
    const float *cos, *sin; /* not NULL: of the rotation of queries' columns from 128 on */
    const int32_t *position;
    bool k_shared;     /* columns of keys from 128 on are the same for all heads */
    uint8_t *code;     /* not NULL: instead of o, codes and their scales [nh][scale_ld] */
    float *code_scale;
    int64_t scale_ld;
    bool pow2;
    /* sequences of one length: of as many heads and sequences as L2 holds the keys and values of (pairs), the longest work first; 0: lengths differ */
    int len, tiles, pairs, all_pairs;
};
struct maps {
    CUtensorMap q, k, v, k_last; /* k_last: columns of keys from 128 on */
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
/* Which kernels take keys in two parts, and give codes. */
template <int DQK>
constexpr bool in_parts = DQK > 128;
template <int DQK, int DV>
constexpr bool gives_codes = DQK > 128 && DV == QBLOCK;

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

/* A tile of keys of head hk: its columns up to 128, and those behind them, of head hk or of all heads. */
template <int DQK, int COLS>
__device__ __forceinline__ void load_keys(const params &p, const maps &m, uint32_t dst, int hk, int row, uint32_t bar)
{
    if constexpr (in_parts<DQK>) {
        load_tile<128, COLS>(dst, &m.k, hk, row, bar);
        load_rows(dst + 2 * COLS * 128, &m.k_last, 0, p.k_shared ? 0 : hk, row, bar);
    } else {
        load_tile<DQK, COLS>(dst, &m.k, hk, row, bar);
    }
}

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
            hopper::wait_or_trap(bar.work_empty(it), (it / 2 - 1) & 1);
        *work_at<L>(it) = w;
        hopper::barrier_arrive(bar.work_full(it));
        if (w.head < 0)
            break;
        if (it > 0)
            hopper::wait_or_trap(bar.q_empty(), (it - 1) & 1);
        hopper::barrier_expect(bar.q_full(), L::q);
        load_tile<DQK, L::rows>(base, &m.q, w.head, w.first + w.row, bar.q_full());
        const int tiles = tiles_of<COLS>(w, L::rows), hk = w.head / p.group;
        for (int t = 0; t < tiles; t++, i++) {
            if (i >= STAGES)
                hopper::wait_or_trap(bar.k_empty(i), (i / STAGES - 1) & 1);
            hopper::barrier_expect(bar.k_full(i), L::k);
            load_keys<DQK, COLS>(p, m, base + L::k_from + i % STAGES * L::k, hk, w.first + t * COLS, bar.k_full(i));
            if (i >= STAGES)
                hopper::wait_or_trap(bar.v_empty(i), (i / STAGES - 1) & 1);
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

/* The two bfloat16 of a word. */
__device__ __forceinline__ float low_of(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_of(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

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

/* A thread's sums of rows row and row + 8, times the factor of each, as the codes of what sums_out would have written. */
template <int DV>
__device__ __forceinline__ void codes_out(const params &p, const struct work at, const float (&o)[DV / 2], const float (&factor)[2], int row, int lane)
{
    const int64_t ld = (int64_t)p.nh * DV;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t x[DV / 8]; /* columns 8 j + 2 (lane % 4) and the next, rounded */
        float amax = 0;
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
            x[j] = pack(o[4 * j + 2 * half] * factor[half], o[4 * j + 2 * half + 1] * factor[half]);
            amax = fmaxf(amax, fmaxf(fabsf(low_of(x[j])), fabsf(high_of(x[j]))));
        }
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
        const struct qscale q = quant_scale(amax, p.pow2);
        const int r = row + 8 * half;
        const bool in = r < at.len;
        if (in && lane % 4 == 0)
            p.code_scale[at.head * p.scale_ld + at.first + r] = q.s;
#pragma unroll
        for (int m = 0; m < DV / 16; m += 4) {
            uint32_t c[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t a = x[2 * (m + i)], b = x[2 * (m + i) + 1];
                c[i] = code2(quotient(low_of(a), q), quotient(high_of(a), q)) | code2(quotient(low_of(b), q), quotient(high_of(b), q)) << 16;
            }
            transpose4(c, lane % 4); /* now columns 16 (m + lane % 4) + 2 i, the next, and both 8 further */
            if (in)
                *(uint4 *)(p.code + (at.first + r) * ld + at.head * DV + 16 * (m + lane % 4)) =
                    make_uint4(__byte_perm(c[0], c[1], 0x5410), __byte_perm(c[2], c[3], 0x5410), __byte_perm(c[0], c[1], 0x7632),
                               __byte_perm(c[2], c[3], 0x7632));
        }
    }
}

/* A thread's rows, row and row + 8: the sums over the sum of the weights, and the log of that. */
template <int DQK, int DV>
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
    if constexpr (gives_codes<DQK, DV>)
        if (p.code != NULL) {
            codes_out<DV>(p, at, o, factor, row, lane);
            return;
        }
    const int64_t ld = (int64_t)p.nh * p.dv;
    sums_out<DV>(o, factor, p.o + at.first * ld + (int64_t)at.head * p.dv, ld, p.dv, row, at.len, lane);
}

/* A warpgroup's share of a piece of work, the it-th of the block; n: tiles before it. */
struct piece {
    int it, tiles, row0, row; /* row0: of the warpgroup; row: of the thread */
    uint32_t n;
};

template <int COLS, class L>
__device__ __forceinline__ struct piece piece_of(int it, uint32_t n, int wg, int in_block)
{
    const int first = uniform(work_at<L>(it)->row);
    return {it, uniform(tiles_of<COLS>(*work_at<L>(it), L::rows)), first + 64 * wg, first + in_block, n};
}

/* Rotates columns 128 .. 191 of a warpgroup's queries of piece w where they lie: a thread takes half of a row. */
template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ void rotate_queries(const params &p, const struct piece &w, int wg)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const uint32_t base = pool_at(), r = threadIdx.x % 128 / 2, half = threadIdx.x % 2, at = base + 2 * L::rows * 128 + wg * 64 * 128 + r * 128;
    const int64_t token = (int64_t)work_at<L>(w.it)->first + w.row0 + r;
    const int64_t angle = (int64_t)__ldg(p.position + (token < p.n ? token : p.n - 1)) * 32 + half * 16; /* rows behind the sequence: any */
    float4 c[4], s[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        c[i] = __ldg((const float4 *)(p.cos + angle) + i);
        s[i] = __ldg((const float4 *)(p.sin + angle) + i);
    }
    hopper::wait_or_trap(barriers<STAGES>{base + L::bar_from}.q_full(), w.it & 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t x = at + ((half * 4 + i) ^ r % 8) * 16;
        const float cs[4] = {c[i].x, c[i].y, c[i].z, c[i].w}, sn[4] = {s[i].x, s[i].y, s[i].z, s[i].w};
        uint32_t v[4];
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(x) : "memory");
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = pack(fmaf(low_of(v[j]), cs[j], -(high_of(v[j]) * sn[j])), fmaf(low_of(v[j]), sn[j], high_of(v[j]) * cs[j]));
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(x), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;\nbar.sync %0, 128;" ::"r"(wg + 1) : "memory"); /* the tensor cores read what all threads wrote */
}

/* Asks for the scores of a piece's first tile; of none for those of what lies there, so that no path goes without. */
template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ void first_scores(float (&s)[COLS / 2], const struct piece &w, int wg, bool none)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const uint32_t base = pool_at();
    const barriers<STAGES> bar = {base + L::bar_from};
    if (!none) {
        hopper::wait_or_trap(bar.q_full(), w.it & 1);
        hopper::wait_or_trap(bar.k_full(w.n), w.n / STAGES & 1);
    }
    hopper::mma_fence();
    scores<DQK, L::rows, COLS>(s, base + wg * 64 * 128, base + L::k_from + w.n % STAGES * L::k);
    hopper::mma_commit();
}

/* The sums of a piece whose first scores were asked for. All but the last tile's values are summed when it returns; w holds the last one's weights. */
template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ void all_tiles(const params &p, const struct piece &at, int wg, float (&s)[COLS / 2], float (&o)[DV / 2],
                                          uint32_t (&w)[COLS / 16][4], float (&top)[2], float (&sum)[2])
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const uint32_t base = pool_at(), x = base + wg * 64 * 128, k0 = base + L::k_from, v0 = base + L::v_from;
    const barriers<STAGES> bar = {base + L::bar_from};
    const int lane = threadIdx.x % 32;
    const bool frees = threadIdx.x % 128 == 0;
    float shrink[2];
    hopper::mma_wait<0>();
    pin(s);
    if (frees) {
        hopper::barrier_arrive(bar.k_empty(at.n));
        if (at.tiles == 1)
            hopper::barrier_arrive(bar.q_empty());
    }
    if (COLS > at.row0)
        mask_causal<COLS / 2>(s, at.row, 0, lane);
    softmax_step<COLS / 2>(s, top, sum, shrink, p.scale_log2);
    pack_all<COLS / 2>(w, s);
    constexpr bool turns = DQK <= 128; /* with more work in a product than in its exponentials they find their own rhythm */
    for (int t = 1; t < at.tiles; t++) {
        const uint32_t i = at.n + t;
        hopper::wait_or_trap(bar.k_full(i), i / STAGES & 1);
        if (turns)
            turn_take(wg);
        hopper::mma_fence();
        scores<DQK, L::rows, COLS>(s, x, k0 + i % STAGES * L::k);
        hopper::mma_commit();
        hopper::wait_or_trap(bar.v_full(i - 1), (i - 1) / STAGES & 1);
        hopper::mma_fence();
        weighted_sum<DV, COLS>(o, w, v0 + (i - 1) % STAGES * L::v);
        hopper::mma_commit();
        if (turns)
            turn_give((wg + 1) % GROUPS);
        hopper::mma_wait<1>();
        pin(s);
        if (frees) {
            hopper::barrier_arrive(bar.k_empty(i));
            if (t + 1 == at.tiles) /* the next queries are on their way while the last exponentials are taken */
                hopper::barrier_arrive(bar.q_empty());
        }
        if ((t + 1) * COLS > at.row0)
            mask_causal<COLS / 2>(s, at.row, t * COLS, lane);
        softmax_step<COLS / 2>(s, top, sum, shrink, p.scale_log2);
        hopper::mma_wait<0>();
        pin(o);
        if (frees)
            hopper::barrier_arrive(bar.v_empty(i - 1));
#pragma unroll
        for (int j = 0; j < DV / 2; j++)
            o[j] *= shrink[j >> 1 & 1];
        pack_all<COLS / 2>(w, s);
    }
}

/* The scores of the next piece's first tile are computed while the sums of this one go out. */
template <int DQK, int DV, int COLS, int STAGES, int GROUPS>
__device__ __forceinline__ void consume(const params &p)
{
    typedef layout<DQK, DV, COLS, STAGES, GROUPS> L;
    const uint32_t base = pool_at();
    const barriers<STAGES> bar = {base + L::bar_from};
    const int wg = uniform(threadIdx.x / 128), lane = threadIdx.x % 32, in_block = threadIdx.x / 32 * 16 + lane / 4;
    float s[COLS / 2];
    if (DQK <= 128 && wg == GROUPS - 1)
        turn_give(0);
    hopper::wait_or_trap(bar.work_full(0), 0);
    bool more = uniform(work_at<L>(0)->head) >= 0;
    struct piece at = piece_of<COLS, L>(0, 0, wg, in_block);
    if (in_parts<DQK> && p.cos != NULL && more)
        rotate_queries<DQK, DV, COLS, STAGES, GROUPS>(p, at, wg);
    first_scores<DQK, DV, COLS, STAGES, GROUPS>(s, at, wg, !more);
    while (more) {
        float o[DV / 2] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
        uint32_t w[COLS / 16][4];
        all_tiles<DQK, DV, COLS, STAGES, GROUPS>(p, at, wg, s, o, w, top, sum);
        const uint32_t last = at.n + at.tiles - 1;
        hopper::wait_or_trap(bar.v_full(last), last / STAGES & 1);
        hopper::mma_fence();
        weighted_sum<DV, COLS>(o, w, base + L::v_from + last % STAGES * L::v);
        hopper::mma_commit();
        const struct work now = *work_at<L>(at.it);
        const int row = at.row;
        hopper::wait_or_trap(bar.work_full(at.it + 1), (at.it + 1) / 2 & 1);
        more = uniform(work_at<L>(at.it + 1)->head) >= 0;
        at = piece_of<COLS, L>(at.it + 1, last + 1, wg, in_block);
        if (in_parts<DQK> && p.cos != NULL && more)
            rotate_queries<DQK, DV, COLS, STAGES, GROUPS>(p, at, wg);
        hopper::mma_wait<0>();
        pin(o);
        if (threadIdx.x % 128 == 0)
            hopper::barrier_arrive(bar.v_empty(last));
        first_scores<DQK, DV, COLS, STAGES, GROUPS>(s, at, wg, !more);
        queries_out<DQK, DV>(p, now, o, top, sum, row, lane);
        hopper::barrier_arrive_warp(bar.work_empty(at.it - 1));
    }
    hopper::mma_wait<0>();
    pin(s);
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

/* Codes and scales of the rows that rt_act_rows adds. */
enum rt_status zero_added(struct rt_queue *q, const struct rt_attn_fwd_args *a, struct rt_err *err)
{
    const int64_t n = a->s.n, rows = rt_act_rows(n), cols = (int64_t)a->s.nh * a->s.dv;
    enum rt_status st = RT_OK;
    if (rows == n)
        return RT_OK;
    RT_CUDA_TRY(cudaMemsetAsync((char *)a->oq.data + n * cols, 0, (size_t)((rows - n) * cols), q->stream));
    RT_CUDA_TRY(cudaMemset2DAsync(a->oq.scale + n, (size_t)rows * sizeof(float), 0, (size_t)(rows - n) * sizeof(float), (size_t)(cols / QBLOCK), q->stream));
out:
    return st;
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
    p.cos = a->cos, p.sin = a->sin, p.position = a->position;
    p.code = (uint8_t *)a->oq.data, p.code_scale = a->oq.scale, p.scale_ld = rt_act_rows(s->n), p.pow2 = a->pow2;
    p.scale_log2 = (float)(s->scale * 1.4426950408889634);
    RT_TRY(attn_map(q, &m.q, a->q, s->n, s->nh, s->dqk, a->q_ld, a->q_head, L::rows, err));
    RT_TRY(attn_map(q, &m.k, a->k, s->n, s->nkv, in_parts<DQK> ? 128 : s->dqk, a->k_ld, a->k_head, COLS, err));
    if constexpr (in_parts<DQK>) {
        p.k_shared = a->k_pe != NULL;
        RT_TRY(p.k_shared ? attn_map(q, &m.k_last, a->k_pe, s->n, 1, a->dr, a->k_pe_ld, a->k_pe_ld, COLS, err)
                          : attn_map(q, &m.k_last, (const bf16 *)a->k + 128, s->n, s->nkv, s->dqk - 128, a->k_ld, a->k_head, COLS, err));
    }
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
    RT_TRY(rt_cuda_launched("attn_fwd_sm90", err));
    if (p.code != NULL)
        RT_TRY(zero_added(q, a, err));
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
    if (a->k_pe != NULL)
        *done = *done && s->dqk - a->dr == 128 && aligned16(a->k_pe, a->k_pe_ld, 0, a->dr);
    if (a->cos != NULL)
        *done = *done && s->dqk == 192 && a->dr == 64 && aligned16(a->cos, 0, 0, 0) && aligned16(a->sin, 0, 0, 0);
    if (a->oq.data != NULL)
        *done = *done && s->dqk > 128 && s->dv == QBLOCK && aligned16(a->oq.data, 0, 0, s->dv);
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
