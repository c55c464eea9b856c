/* product_sm90.h: tiles of 192 rows x 256 columns by three warpgroups, 64 rows each.
 *
 * Three warpgroups take every register there is, so there is no room for warps that bring operands or take tiles away: a thread of the last one to begin
 * with a stage brings the next operands as soon as all have read it, and each warpgroup rounds its own rows and sends them off, while the others multiply.
 * Of the tiles that a multiprocessor has room for this one needs the least of operands for its products.
 *
 * Tiles that are left over when all clusters had as many may be cut along k into `parts`: the sums of all but the last part go through memory, and are
 * added to the last part's in the order of the parts. A part only waits for parts with smaller numbers, whose clusters started before.
 */
#include "core/cuda/product_sm90.h"

#include "core/cuda/tiles_sm90.cuh"

namespace {

enum {
    GROUPS = 3, /* warpgroups */
    BM = 64 * GROUPS, THREADS = 128 * GROUPS,
    A_BYTES = BM * BK * 2, STAGE = A_BYTES + B_BYTES,
    OUT = 64 * 128, OUTS = 2, /* 64 rows and columns of a result on their way, rows of 128 bytes in the 128-byte swizzle; of each warpgroup */
    OUT_AT = STAGES * STAGE, BARS_AT = OUT_AT + GROUPS * OUTS * OUT, FEED_AT = BARS_AT + 2 * STAGES * 8, SHARED = FEED_AT + 32,
    PARTIAL = BM * BN / 4 /* float4s of a tile's sums */
};

struct work {
    walk w;
    int whole, parts, items; /* tiles that are made whole; parts of each other one; items of work in all */
    int columns;             /* that exist */
    bool accumulate;
    float4 *partial;         /* [tiles - whole][parts - 1][CLUSTER] sums of a tile, as the threads hold them */
    uint32_t *there;         /* [the same][GROUPS] zeros; 1: they are written */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint32_t full_bar(uint32_t base, int stage) { return base + BARS_AT + 8 * stage; }
__device__ __forceinline__ uint32_t empty_bar(uint32_t base, int stage) { return base + BARS_AT + 8 * (STAGES + stage); }

/* Item t of the work: a tile's blocks of k from k0 to k1, part `part` of it. */
struct item {
    place at;
    int k0, k1, part, slot; /* slot: of the tile's first part among the partial sums; -1: the tile is whole */
};
__device__ __forceinline__ item item_of(const work &o, int t, uint32_t rank)
{
    if (t < o.whole)
        return {place_of<BM>(o.w, t, rank), 0, o.w.k_blocks, o.parts - 1, -1};
    const int tile = (t - o.whole) / o.parts, part = (t - o.whole) % o.parts;
    return {place_of<BM>(o.w, o.whole + tile, rank), part * o.w.k_blocks / o.parts, (part + 1) * o.w.k_blocks / o.parts, part, tile * (o.parts - 1)};
}

/* What a thread brings next; in shared memory, for want of registers. */
struct feed {
    int t, k, k1;
    place at;
    ring r;

    __device__ __forceinline__ void begin(const work &o, uint32_t rank)
    {
        if (t >= o.items)
            return;
        const item it = item_of(o, t, rank);
        at = it.at;
        k = it.k0;
        k1 = it.k1;
    }
    /* A stage, when everybody has read what was in it. */
    template <bool TA, bool TB> __device__ __forceinline__ void bring(const work &o, const maps &m, uint32_t base, uint32_t rank)
    {
        if (t >= o.items)
            return;
        const uint32_t to = base + r.stage * STAGE, bar = full_bar(base, r.stage);
        hopper::wait_or_trap(empty_bar(base, r.stage), r.phase ^ 1);
        hopper::barrier_expect(bar, STAGE);
        if (TA) {
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                hopper::load_box(to + i * (A_BYTES / GROUPS), &m.a, at.row + i * 64, k * BK, bar);
        } else {
            hopper::load_box(to, &m.a, k * BK, at.row, bar);
        }
        load_b<TB>(o.w, m, to + A_BYTES, k, at.column, rank, bar);
        r.next();
        if (++k == k1) {
            t += tile_step();
            begin(o, rank);
        }
    }
};

static_assert(sizeof(feed) <= SHARED - FEED_AT, "");

__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

/* The warpgroup's sums to memory, and from there. at: the thread's first float4. */
__device__ __forceinline__ void sums_away(const float (&acc)[128], float4 *at, uint32_t *there, int group)
{
#pragma unroll
    for (int i = 0; i < 32; i++)
        __stcg(at + i * THREADS, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
    __threadfence();
    group_sync(group);
    if (threadIdx.x % 128 == 0)
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(there), "r"(1) : "memory");
}
__device__ __forceinline__ void sums_here(float (&acc)[128], const float4 *at, const uint32_t *there, int group)
{
    if (threadIdx.x % 128 == 0) {
        uint32_t yes = 0;
#pragma unroll 1
        for (uint32_t tries = 0; yes == 0; tries++) {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(yes) : "l"(there) : "memory");
            if (tries == 1u << 28) /* minutes: see hopper::wait_or_trap */
                __trap();
        }
    }
    group_sync(group);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float4 v = __ldcg(at + i * THREADS);
        acc[4 * i] += v.x;
        acc[4 * i + 1] += v.y;
        acc[4 * i + 2] += v.z;
        acc[4 * i + 3] += v.w;
    }
}

/* False: the sums of a part that others wait for are on their way. True: acc is the tile. */
__device__ __forceinline__ bool join_parts(const work &o, const item &it, float (&acc)[128], uint32_t rank, int group)
{
    const bool last = it.part == o.parts - 1;
    for (int part = last ? 0 : it.part; part < o.parts - 1; part++) {
        const int64_t slot = (int64_t)(it.slot + part) * CLUSTER + rank;
        float4 *at = o.partial + slot * PARTIAL + threadIdx.x;
        uint32_t *there = o.there + slot * GROUPS + group;
        if (!last) {
            sums_away(acc, at, there, group);
            return false;
        }
        sums_here(acc, at, there, group);
    }
    return true;
}

/* The warpgroup's 64 rows, rounded, by bulk copies of 64 columns; a place is free again when the copy before the last has read it. */
template <bool F16> __device__ __forceinline__ void leave(const work &o, const maps &m, const float (&acc)[128], const place &at, uint32_t base, int group)
{
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16, y = at.row + group * 64;
#pragma unroll
    for (int b = 0; b < BN / 64; b++) {
        const uint32_t from = base + OUT_AT + (group * OUTS + b % OUTS) * OUT, to = from + row * 128;
        const int x = at.column * BN + b * 64;
        if (threadIdx.x % 128 == 0)
            boxes_read<OUTS - 1>();
        group_sync(group);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                v[i] = pack_pair<F16>(acc[32 * b + 8 * j + 2 * i], acc[32 * b + 8 * j + 2 * i + 1]);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + ((2 * j + lane / 16) ^ (row & 7)) * 16), "r"(v[0]),
                         "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
        }
        hopper::fence_async(); /* the copy reads it */
        group_sync(group);
        if (threadIdx.x % 128 == 0) {
            if (y < o.w.rows && x < o.columns) {
                if (o.accumulate)
                    add_box(&m.out, from, x, y);
                else
                    store_box(&m.out, from, x, y);
            }
            boxes_commit();
        }
    }
}

#endif

template <bool F16, bool TA, bool TB>
__global__ __launch_bounds__(THREADS, 1) void product_sm90_kernel(const __grid_constant__ maps m, const __grid_constant__ work o)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const uint32_t base = hopper::smem(pool), rank = hopper::cluster_rank();
    if (threadIdx.x == 0) {
        if (base % 1024 != 0)
            __trap();
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(full_bar(base, i), 1);
            hopper::barrier_init(empty_bar(base, i), GROUPS * CLUSTER);
        }
        hopper::barrier_init_fence();
    }
    __syncthreads();
    hopper::cluster_sync();
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const bool brings = threadIdx.x == 128 * (GROUPS - 1);
    feed &f = *(feed *)(void *)(pool + FEED_AT);
    ring r = {0, 0};
    if (brings) {
        f = {first_tile(), 0, 0, {}, {0, 0}};
        f.begin(o, rank);
        for (int i = 0; i < STAGES; i++)
            f.bring<TA, TB>(o, m, base, rank);
    }
    for (int t = first_tile(); t < o.items; t += tile_step()) {
        const item it = item_of(o, t, rank);
        float acc[128];
        int before = 0;
#pragma unroll 1
        for (int k = it.k0; k < it.k1; k++) {
            const uint32_t at_a = base + r.stage * STAGE + group * (A_BYTES / GROUPS), at_b = base + r.stage * STAGE + A_BYTES;
            const uint64_t a = TA ? hopper::descriptor_t(at_a, BK * 128) : hopper::descriptor(at_a);
            const uint64_t b = TB ? hopper::descriptor_t(at_b, BK * 128) : hopper::descriptor(at_b);
            hopper::wait_or_trap(full_bar(base, r.stage), r.phase);
            hopper::mma_fence();
#pragma unroll
            for (int i = 0; i < BK / 16; i++)
                mma<F16, TA, TB, false>(acc, a + (TA ? 16 * 8 : 2) * i, b + (TB ? 16 * 8 : 2) * i, k > it.k0 || i > 0);
            hopper::mma_commit();
            hopper::mma_wait<1>(); /* the stage before is read */
            if (k > it.k0) {
                stage_read(empty_bar(base, before));
                if (brings)
                    f.bring<TA, TB>(o, m, base, rank);
            }
            before = r.stage;
            r.next();
        }
        mma_done(acc);
        stage_read(empty_bar(base, before));
        if (brings)
            f.bring<TA, TB>(o, m, base, rank);
        if (it.slot < 0 || join_parts(o, it, acc, rank, group))
            leave<F16>(o, m, acc, it.at, base, group);
    }
    if (threadIdx.x % 128 == 0)
        boxes_written();
    hopper::cluster_sync(); /* nobody leaves while the other may still write to it */
#endif
}

/* ---- the host's side ---- */

enum { SUMS = PARTIAL * 16 + 16 }; /* bytes of a tile's sums and what says that they are there */
/* In how many parts r tiles that are left over take the least time, that of a whole tile being 1. Bringing sums away and back takes as long as some 15 + 3
 * parts blocks of k: 192 KB a block of threads and part. */
int product_parts(int r, int clusters, int k_blocks)
{
    int best = 1;
    double least = 1;
    for (int parts = 2; parts <= 8 && k_blocks / parts >= 16 && r > 0 && (int64_t)r * (parts - 1) * CLUSTER * SUMS <= RT_CUDA_WORKSPACE; parts++) {
        const double takes = (double)((r * parts + clusters - 1) / clusters) / parts + (15.0 + 3 * parts) / k_blocks;
        if (takes < least) {
            least = takes;
            best = parts;
        }
    }
    return best;
}

template <bool F16, bool TA, bool TB>
enum rt_status run(struct rt_queue *q, const struct rt_cuda_gemm_args *g, struct rt_err *err)
{
    maps m;
    work o = {};
    const int64_t a_rows = TA ? g->k : g->m, a_cols = TA ? g->m : g->k, b_rows = TB ? g->k : g->n, b_cols = TB ? g->n : g->k;
    int most, clusters, rest;
    enum rt_status st;
    RT_TRY(product_map(q, &m.a, F16, g->a, a_rows, a_cols, g->lda > 0 ? g->lda : a_cols, TA ? +BK : +BM, err));
    RT_TRY(product_map(q, &m.b, F16, g->b, b_rows, b_cols, g->ldb > 0 ? g->ldb : b_cols, TB ? BK : BN / 2, err));
    RT_TRY(product_map(q, &m.out, F16, g->d, g->m, g->n, g->ldd > 0 ? g->ldd : g->n, 64, err));
    o.w.rows = (int)g->m;
    o.w.k_blocks = (int)((g->k + BK - 1) / BK);
    o.w.columns = (int)((g->n + BN - 1) / BN);
    o.w.b_step = BN;
    o.w.b_apart = BN / 2;
    o.columns = (int)g->n;
    o.accumulate = g->accumulate;
    walk_tiles(q, &o.w, BM, &most);
    rest = o.w.tiles % most;
    o.parts = product_parts(rest, most, o.w.k_blocks);
    o.whole = o.parts > 1 ? o.w.tiles - rest : o.w.tiles;
    o.items = o.whole + (o.w.tiles - o.whole) * o.parts;
    clusters = o.items < most ? o.items : most;
    if (o.parts > 1) {
        const size_t slots = (size_t)rest * (o.parts - 1) * CLUSTER;
        o.partial = (float4 *)q->workspace;
        o.there = (uint32_t *)(o.partial + slots * PARTIAL);
        RT_CUDA_TRY(cudaMemsetAsync(o.there, 0, slots * GROUPS * sizeof *o.there, q->stream));
    }
    st = launch_clusters(q, product_sm90_kernel<F16, TA, TB>, clusters, THREADS, SHARED, "product", err, m, o);
out:
    return st;
}

bool even_rows(const void *p, int64_t ld, int64_t cols)
{
    return aligned16(p) && (ld > 0 ? ld : cols) % 8 == 0;
}

}

bool rt_cuda_product_sm90_fits(const struct rt_dev *dev, const struct rt_cuda_gemm_args *g)
{
    const int64_t most = INT32_MAX - 1024;
    return dev->cc == 90 && dev->encode_map != NULL && g->bias == NULL && g->add == NULL && !g->d_f32 && g->batch <= 1 && g->m > 0 && g->n > 0 &&
           g->k > 0 && g->m < most && g->n < most && g->k < most && !(g->a_t && g->b_t) && (!g->f16 || (!g->a_t && g->b_t && !g->accumulate)) &&
           even_rows(g->a, g->lda, g->a_t ? g->m : g->k) && even_rows(g->b, g->ldb, g->b_t ? g->k : g->n) && even_rows(g->d, g->ldd, g->n);
}

enum rt_status rt_cuda_product_sm90(struct rt_queue *q, const struct rt_cuda_gemm_args *g, struct rt_err *err)
{
    if (g->f16)
        return run<true, false, false>(q, g, err);
    if (g->a_t)
        return run<false, true, true>(q, g, err);
    return g->b_t ? run<false, false, false>(q, g, err) : run<false, false, true>(q, g, err);
}
