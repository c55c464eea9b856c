/* Attention backward for compute capability 9.0: the two passes of attn_bwd.cu (there: what they compute) on asynchronous products.
 *
 * A block has two warpgroups that multiply, 64 rows of X each, and a warp that keeps a ring of tiles of Y filled by bulk copies. Neither
 * warpgroup waits for the other: one multiplies while the other takes exponentials. Nothing is in flight across a loop's end: the compiler would
 * serialise it. Rows of a tile beyond the sequence are rows of its neighbour: their weights are 0.
 */
#include "core/cuda/attn_sm90.cuh"
#include "core/cuda/attn_bwd.h"

namespace {

enum { CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1), ROWS = 64 * CONSUMERS };

struct params {
    struct rt_cuda_attn_grads g;
    int64_t n;
    const float *lse2, *delta; /* [nh, n]: lse / ln 2 */
    int n_tile, group, dqk, dv;
    float scale, scale_log2;
};
struct maps {
    CUtensorMap x1, x2, y1, y2;
};

/* Shared memory of a pass: X, then stages of Y, then lse and delta of each stage's rows, then barriers. */
template <int D, int COLS, int STAGES>
struct layout {
    enum {
        x = ROWS * D * 2, y = COLS * D * 2, stage = 2 * y, y_from = 2 * x, stat_from = y_from + STAGES * stage,
        bar_from = stat_from + STAGES * 2 * COLS * 4, bytes = bar_from + (2 * STAGES + 1) * 8 + 1024, /* room to align the start */
    };
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Which tile a block has, and which tiles of Y pass by: from .. to of each of the query heads hq .. hq + heads - 1. */
struct work {
    struct place at;
    int hq, hk, heads, from, to, per_head, steps;
};
template <int COLS, bool ByKey>
__device__ __forceinline__ struct work work_of(const params &p, const rt_cuda_seqs &seqs)
{
    struct work w;
    const int h = blockIdx.x / p.n_tile, t = blockIdx.x % p.n_tile;
    w.at = place_of(seqs, ByKey ? t : p.n_tile - 1 - t, ROWS);
    w.hq = ByKey ? h * p.group : h;
    w.hk = ByKey ? h : h / p.group;
    w.heads = ByKey ? p.group : 1;
    w.from = ByKey ? w.at.row : 0;
    w.to = ByKey ? w.at.len : min(w.at.row + ROWS, w.at.len);
    w.per_head = (w.to - w.from + COLS - 1) / COLS;
    w.steps = w.per_head * w.heads;
    return w;
}

template <int D, int COLS, int STAGES, bool ByKey>
__device__ __forceinline__ void produce(const params &p, const maps &m, const struct work &w, uint32_t base)
{
    typedef layout<D, COLS, STAGES> L;
    const int lane = threadIdx.x % 32;
    const uint32_t full = base + L::bar_from, empty = full + STAGES * 8, x_full = empty + STAGES * 8;
    if (lane == 0) {
        hopper::barrier_expect(x_full, 2 * L::x);
        load_tile<D, ROWS>(base, &m.x1, ByKey ? w.hk : w.hq, w.at.first + w.at.row, x_full);
        load_tile<D, ROWS>(base + L::x, &m.x2, ByKey ? w.hk : w.hq, w.at.first + w.at.row, x_full);
    }
    for (int step = 0; step < w.steps; step++) {
        const int stage = step % STAGES, head = step / w.per_head, col = w.from + step % w.per_head * COLS;
        const uint32_t y = base + L::y_from + stage * L::stage, bar = full + stage * 8;
        if (step >= STAGES)
            barrier_wait(empty + stage * 8, (step / STAGES - 1) & 1);
        if (ByKey) { /* the numbers of the queries, by the warp's own copies */
            const int64_t from = (w.hq + head) * p.n + w.at.first + col;
            for (int i = lane; i < 2 * COLS; i += 32) {
                const int c = i % COLS;
                const bool valid = col + c < w.at.len;
                copy4(base + L::stat_from + (stage * 2 * COLS + i) * 4, (i < COLS ? p.lse2 : p.delta) + (valid ? from + c : 0), valid);
            }
            barrier_arrive_copies(bar);
        }
        if (lane == 0) {
            hopper::barrier_expect(bar, L::stage);
            load_tile<D, COLS>(y, &m.y1, ByKey ? w.hq + head : w.hk, w.at.first + col, bar);
            load_tile<D, COLS>(y + L::y, &m.y2, ByKey ? w.hq + head : w.hk, w.at.first + col, bar);
        }
    }
}

/* s: scores to P. Accumulators as a product leaves them: element 4 j + 2 half + e is row + 8 half, column 8 j + e of the thread's. stat: lse2 of the
 * tile's columns (ByKey), own: of the thread's rows. */
template <int N, bool ByKey>
__device__ __forceinline__ void to_weights(float (&s)[N], const float *stat, const float (&own)[2], int row, int col0, int len, bool edge,
                                           float scale_log2, int lane)
{
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const float2 base = ByKey ? *(const float2 *)(stat + 8 * j + lane % 4 * 2) : make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float b = ByKey ? (i & 1 ? base.y : base.x) : own[i >> 1];
            float w = exp2_fast(fmaf(s[4 * j + i], scale_log2, -b));
            const int c = col0 + 8 * j + lane % 4 * 2 + (i & 1), r = row + (i >> 1) * 8;
            if (edge && (ByKey ? c < r || c >= len : c > r))
                w = 0;
            s[4 * j + i] = w;
        }
    }
}
/* dp: to dS = P (dp - delta), without scale. */
template <int N, bool ByKey>
__device__ __forceinline__ void to_ds(float (&dp)[N], const float (&p)[N], const float *stat, const float (&own)[2], int lane)
{
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const float2 delta = ByKey ? *(const float2 *)(stat + 8 * j + lane % 4 * 2) : make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < 4; i++)
            dp[4 * j + i] = p[4 * j + i] * (dp[4 * j + i] - (ByKey ? (i & 1 ? delta.y : delta.x) : own[i >> 1]));
    }
}

/* The queries' pass. While the exponentials of a tile are taken, its dP and the sum over the tile before are under way; a stage is free one tile
 * later. */
template <int D, int COLS, int STAGES>
__device__ __forceinline__ void consume_keys(const params &p, const struct work &w, char *pool, uint32_t base)
{
    typedef layout<D, COLS, STAGES> L;
    const int wg = threadIdx.x / 128, lane = threadIdx.x % 32, row0 = w.at.row + 64 * wg, row = row0 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const uint32_t full = base + L::bar_from, empty = full + STAGES * 8, x1 = base + wg * 64 * 128, x2 = x1 + L::x, y = base + L::y_from;
    static_assert(COLS >= 64 && STAGES >= 2, "");
    const int steps = min(w.steps, (row0 + 64 + COLS - 1) / COLS); /* a later tile is masked for all rows of this warpgroup */
    float acc[D / 2] = {}, s[COLS / 2], ds[COLS / 2], lse[2] = {0, 0}, delta[2] = {0, 0};
    uint32_t a[COLS / 16][4];
    for (int half = 0; half < 2; half++)
        if (row + 8 * half < w.at.len) {
            lse[half] = p.lse2[w.hq * p.n + w.at.first + row + 8 * half];
            delta[half] = p.delta[w.hq * p.n + w.at.first + row + 8 * half];
        }
    barrier_wait(empty + STAGES * 8, 0);
    barrier_wait(full, 0);
    hopper::mma_fence();
    scores<D, ROWS, COLS>(s, x1, y);
    hopper::mma_commit();
    scores<D, ROWS, COLS>(ds, x2, y + L::y);
    hopper::mma_commit();
    hopper::mma_wait<1>();
    pin(s);
    to_weights<COLS / 2, false>(s, NULL, lse, row, 0, w.at.len, COLS > row0, p.scale_log2, lane);
    hopper::mma_wait<0>();
    pin(ds);
    to_ds<COLS / 2, false>(ds, s, NULL, delta, lane);
    pack_all<COLS / 2>(a, ds);
    for (int step = 1; step < steps; step++) {
        const uint32_t now = y + step % STAGES * L::stage;
        barrier_wait(full + step % STAGES * 8, step / STAGES & 1);
        hopper::mma_fence();
        scores<D, ROWS, COLS>(s, x1, now);
        hopper::mma_commit();
        scores<D, ROWS, COLS>(ds, x2, now + L::y);
        hopper::mma_commit();
        weighted_sum<D, COLS>(acc, a, y + (step - 1) % STAGES * L::stage);
        hopper::mma_commit();
        hopper::mma_wait<2>();
        pin(s);
        to_weights<COLS / 2, false>(s, NULL, lse, row, step * COLS, w.at.len, (step + 1) * COLS > row0, p.scale_log2, lane);
        hopper::mma_wait<1>();
        pin(ds);
        to_ds<COLS / 2, false>(ds, s, NULL, delta, lane);
        hopper::mma_wait<0>();
        pin(acc);
        if (threadIdx.x % 128 == 0)
            barrier_arrive(empty + (step - 1) % STAGES * 8);
        pack_all<COLS / 2>(a, ds);
    }
    hopper::mma_fence();
    weighted_sum<D, COLS>(acc, a, y + (steps - 1) % STAGES * L::stage);
    hopper::mma_commit();
    hopper::mma_wait<0>();
    pin(acc);
    /* The last stages are not freed: nothing is loaded over the last two tiles, and a warpgroup leaves out one at most. */
    const float factor[2] = {p.scale, p.scale};
    rows_out<D, ROWS>((bf16 *)pool + wg * 64 * 64, acc, factor, p.g.dq + w.hq * p.g.q_head + (w.at.first + row0) * p.g.q_ld, p.g.q_ld, p.dqk,
                      w.at.len - row0, wg);
}

/* The keys' pass, a tile of queries at a time: the sum over P runs while dS is made. Where there are registers for it (Late) a step leaves dS to the
 * next, which asks for its product with the queries beside the next scores. */
template <int D, int COLS, int STAGES>
struct queries_pass {
    typedef layout<D, COLS, STAGES> L;
    enum { Late = D <= 64 };
    const params &p;
    const struct work &w;
    const char *pool;
    uint32_t base;
    int wg, lane, row0, row;
    float dk[D / 2], dv[D / 2];
    uint32_t a[COLS / 16][4]; /* dS */

    /* before: the stage of the step before, unless this is the first. */
    template <bool First>
    __device__ __forceinline__ void step(int stage, int before, int col)
    {
        const uint32_t x1 = base + wg * 64 * 128, x2 = x1 + L::x, y = base + L::y_from, y1 = y + stage * L::stage, y2 = y1 + L::y;
        const float *stat = (const float *)(pool + L::stat_from) + stage * 2 * COLS;
        const float none[2] = {0, 0};
        float s[COLS / 2], ds[COLS / 2];
        uint32_t b[COLS / 16][4];
        hopper::mma_fence();
        scores<D, ROWS, COLS>(s, x1, y1);
        hopper::mma_commit();
        scores<D, ROWS, COLS>(ds, x2, y2);
        hopper::mma_commit();
        if constexpr (Late) {
            if constexpr (!First)
                weighted_sum<D, COLS>(dk, a, y + before * L::stage);
            hopper::mma_commit();
        }
        hopper::mma_wait<Late ? 2 : 1>();
        pin(s);
        to_weights<COLS / 2, true>(s, stat, none, row, col, w.at.len, col < row0 + 64 || col + COLS > w.at.len, p.scale_log2, lane);
        pack_all<COLS / 2>(b, s);
        hopper::mma_fence();
        weighted_sum<D, COLS>(dv, b, y2);
        hopper::mma_commit();
        hopper::mma_wait<Late ? 2 : 1>();
        pin(ds);
        to_ds<COLS / 2, true>(ds, s, stat + COLS, none, lane);
        if constexpr (Late) {
            hopper::mma_wait<0>();
            pin(dk);
            pack_all<COLS / 2>(a, ds);
        } else {
            pack_all<COLS / 2>(a, ds);
            hopper::mma_fence();
            weighted_sum<D, COLS>(dk, a, y1);
            hopper::mma_commit();
            hopper::mma_wait<0>();
            pin(dk);
        }
        pin(dv);
    }
    __device__ __forceinline__ void last(int stage)
    {
        if constexpr (Late) {
            hopper::mma_fence();
            weighted_sum<D, COLS>(dk, a, base + L::y_from + stage * L::stage);
            hopper::mma_commit();
            hopper::mma_wait<0>();
            pin(dk);
        }
    }
};

template <int D, int COLS, int STAGES>
__device__ __forceinline__ void consume_queries(const params &p, const struct work &w, char *pool, uint32_t base)
{
    typedef layout<D, COLS, STAGES> L;
    const int wg = threadIdx.x / 128, lane = threadIdx.x % 32, row0 = w.at.row + 64 * wg, row = row0 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const uint32_t full = base + L::bar_from, empty = full + STAGES * 8;
    const bool frees = threadIdx.x % 128 == 0;
    const float f1[2] = {p.scale, p.scale}, f2[2] = {1, 1};
    queries_pass<D, COLS, STAGES> q = {p, w, pool, base, wg, lane, row0, row};
    int before = -1; /* stage of the last step that was not masked */
    barrier_wait(empty + STAGES * 8, 0);
    for (int step = 0; step < w.steps; step++) {
        const int stage = step % STAGES, col = w.from + step % w.per_head * COLS;
        barrier_wait(full + stage * 8, step / STAGES & 1);
        if (col + COLS <= row0) { /* masked for all rows of this warpgroup */
            if (frees)
                barrier_arrive(empty + stage * 8);
            continue;
        }
        if (q.Late && before < 0)
            q.template step<true>(stage, 0, col);
        else
            q.template step<false>(stage, before, col);
        const int free = q.Late ? before : stage;
        if (frees && free >= 0)
            barrier_arrive(empty + free * 8);
        before = stage;
    }
    if (before >= 0)
        q.last(before);
    const int64_t first = w.at.first + row0;
    bf16 *own = (bf16 *)pool + wg * 64 * 64;
    rows_out<D, ROWS>(own, q.dk, f1, p.g.dk + w.hk * p.g.k_head + first * p.g.k_ld, p.g.k_ld, p.dqk, w.at.len - row0, wg);
    rows_out<D, ROWS>(own + L::x / 2, q.dv, f2, p.g.dv + w.hk * p.g.v_head + first * p.g.v_ld, p.g.v_ld, p.dv, w.at.len - row0, wg);
}

#endif

template <int D, int COLS, int STAGES, bool ByKey>
__global__ __launch_bounds__(THREADS, 1) void attn_bwd_sm90_kernel(const __grid_constant__ params p, const __grid_constant__ maps m,
                                                                   const __grid_constant__ rt_cuda_seqs seqs)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    typedef layout<D, COLS, STAGES> L;
    extern __shared__ char raw[];
    char *pool = raw + (1024 - hopper::smem(raw) % 1024) % 1024;
    const uint32_t base = hopper::smem(pool), full = base + L::bar_from, empty = full + STAGES * 8;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(full + i * 8, ByKey ? 33 : 1);
            hopper::barrier_init(empty + i * 8, CONSUMERS);
        }
        hopper::barrier_init(empty + STAGES * 8, 1);
        hopper::barrier_init_fence();
    }
    __syncthreads();
    const struct work w = work_of<COLS, ByKey>(p, seqs);
    if (threadIdx.x >= 128 * CONSUMERS) {
        hopper::registers_fewer<24>();
        if (threadIdx.x < 128 * CONSUMERS + 32)
            produce<D, COLS, STAGES, ByKey>(p, m, w, base);
    } else {
        hopper::registers_more<240>();
        if constexpr (ByKey)
            consume_queries<D, COLS, STAGES>(p, w, pool, base);
        else
            consume_keys<D, COLS, STAGES>(p, w, pool, base);
    }
#endif
}

template <int D, int COLS, int STAGES, bool ByKey>
enum rt_status launch(struct rt_queue *q, const struct rt_attn_bwd_args *a, params p, struct rt_err *err)
{
    typedef layout<D, COLS, STAGES> L;
    const struct rt_attn_shape *s = &a->s;
    struct rt_cuda_seqs seqs;
    maps m;
    int64_t n_tile;
    enum rt_status st;
    seqs.dev = NULL;
    RT_TRY(attn_map(q, ByKey ? &m.y1 : &m.x1, a->q, s->n, s->nh, s->dqk, a->q_ld, a->q_head, ByKey ? COLS : ROWS, err));
    RT_TRY(attn_map(q, ByKey ? &m.y2 : &m.x2, a->dout, s->n, s->nh, s->dv, (int64_t)s->nh * s->dv, s->dv, ByKey ? COLS : ROWS, err));
    RT_TRY(attn_map(q, ByKey ? &m.x1 : &m.y1, a->k, s->n, s->nkv, s->dqk, a->k_ld, a->k_head, ByKey ? ROWS : COLS, err));
    RT_TRY(attn_map(q, ByKey ? &m.x2 : &m.y2, a->v, s->n, s->nkv, s->dv, a->v_ld, a->v_head, ByKey ? ROWS : COLS, err));
    RT_TRY(rt_cuda_seqs_make(q, s, ROWS, &seqs, &n_tile, err));
    p.n_tile = (int)n_tile;
    RT_TRY(rt_cuda_check(cudaFuncSetAttribute(attn_bwd_sm90_kernel<D, COLS, STAGES, ByKey>, cudaFuncAttributeMaxDynamicSharedMemorySize, L::bytes),
                         "cudaFuncSetAttribute", err));
    attn_bwd_sm90_kernel<D, COLS, STAGES, ByKey><<<(unsigned)(n_tile * (ByKey ? s->nkv : s->nh)), THREADS, L::bytes, q->stream>>>(p, m, seqs);
    st = rt_cuda_launched("attn_bwd_sm90", err);
out:
    rt_cuda_temp_free(q, (void *)seqs.dev);
    return st;
}

}

bool rt_cuda_attn_bwd_sm90_fits(const struct rt_dev *dev, const struct rt_attn_bwd_args *a)
{
    const int d = a->s.dqk > a->s.dv ? a->s.dqk : a->s.dv;
    return dev->encode_map != NULL && d <= 128 && aligned16(a->q, a->q_ld, a->q_head, a->s.dqk) && aligned16(a->k, a->k_ld, a->k_head, a->s.dqk) &&
           aligned16(a->v, a->v_ld, a->v_head, a->s.dv) && aligned16(a->dout, 0, 0, a->s.dv) && aligned16(a->dq, 0, 0, 8) &&
           aligned16(a->dk, 0, 0, 8) && aligned16(a->dv, 0, 0, 8);
}

enum rt_status rt_cuda_attn_bwd_sm90(struct rt_queue *q, const struct rt_attn_bwd_args *a, const float *lse2, struct rt_err *err)
{
    const struct rt_attn_shape *s = &a->s;
    params p = {};
    enum rt_status st;
    p.g.dq = (bf16 *)a->dq, p.g.dk = (bf16 *)a->dk, p.g.dv = (bf16 *)a->dv;
    p.g.q_ld = a->q_ld, p.g.q_head = a->q_head, p.g.k_ld = a->k_ld, p.g.k_head = a->k_head, p.g.v_ld = a->v_ld, p.g.v_head = a->v_head;
    p.n = s->n, p.lse2 = lse2, p.delta = a->delta, p.group = s->nh / s->nkv, p.dqk = s->dqk, p.dv = s->dv;
    p.scale = s->scale, p.scale_log2 = (float)(s->scale * 1.4426950408889634);
    if (s->dqk <= 64 && s->dv <= 64) {
        RT_TRY((launch<64, 128, 4, false>(q, a, p, err)));
        RT_TRY((launch<64, 96, 5, true>(q, a, p, err)));
    } else {
        RT_TRY((launch<128, 96, 3, false>(q, a, p, err)));
        RT_TRY((launch<128, 64, 4, true>(q, a, p, err)));
    }
out:
    return st;
}
