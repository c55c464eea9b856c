/* Products whose tiles warps take and do something with while the next tile is multiplied (tiles_sm90.cuh): BF16, a as it lies.
 *
 * A block makes tiles of 128 rows x 256 columns, one behind the other:
 *
 *   warpgroups 0, 1   multiply, 64 rows each; leave a tile, rounded, in shared memory, and go on with the next
 *   warps 9 ..        take it from there, while the next one is multiplied: three or seven warps, and what they do is the kernel's business (`taker`)
 *   one thread        keeps the ring of stages filled
 */
#ifndef RT_CORE_CUDA_TAKEN_SM90_CUH
#define RT_CORE_CUDA_TAKEN_SM90_CUH

#include "core/cuda/tiles_sm90.cuh"

namespace {

enum {
    BM = 128, A_BYTES = BM * BK * 2, STAGE = A_BYTES + B_BYTES,
    TILE = BM * BN * 2,     /* as the products leave it: 4 blocks of 64 columns, rows of 128 bytes in the 128-byte swizzle */
    BLOCK = BM * 128,       /* one of them */
    CONSUMERS = 2,          /* warpgroups */
    TILE_AT = STAGES * STAGE, BARS_AT = TILE_AT + TILE, TAKEN_SHARED = BARS_AT + (2 * STAGES + 2) * 8,
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct barriers {
    uint32_t at;
    __device__ __forceinline__ uint32_t full(int stage) const { return at + 8 * stage; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return at + 8 * (STAGES + stage); }
    __device__ __forceinline__ uint32_t tile_full() const { return at + 16 * STAGES; }
    __device__ __forceinline__ uint32_t tile_empty() const { return at + 16 * STAGES + 8; }
};

/* One thread. */
template <bool TB>
__device__ __forceinline__ void produce(const walk &w, const maps &m, uint32_t base, uint32_t rank)
{
    const barriers bar = {base + BARS_AT};
    ring r = {0, 0};
    for (int t = first_tile(); t < w.tiles; t += tile_step()) {
        const place at = place_of<BM>(w, t, rank);
        for (int k = 0; k < w.k_blocks; k++) {
            const uint32_t to = base + r.stage * STAGE;
            hopper::wait_or_trap(bar.empty(r.stage), r.phase ^ 1);
            hopper::barrier_expect(bar.full(r.stage), STAGE);
            hopper::load_box(to, &m.a, k * BK, at.row, bar.full(r.stage));
            load_b<TB>(w, m, to + A_BYTES, k, at.column, rank, bar.full(r.stage));
            r.next();
        }
    }
}

/* The warpgroup's 64 rows, rounded, to the tile. */
__device__ __forceinline__ void leave(const float (&acc)[128], uint32_t tile, int wg)
{
    const int lane = threadIdx.x % 32, row = wg * 64 + threadIdx.x % 128 / 32 * 16 + lane % 16;
    const uint32_t to = tile + row * 128;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const uint32_t at = to + j / 4 * BLOCK + ((2 * (j % 4) + lane / 16) ^ (row & 7)) * 16;
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = pack_pair<false>(acc[8 * j + 2 * i], acc[8 * j + 2 * i + 1]);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
    }
}

template <bool TB, bool HALVES>
__device__ __forceinline__ void multiply(const walk &w, uint32_t base, uint32_t rank, int wg)
{
    const barriers bar = {base + BARS_AT};
    ring r = {0, 0};
    uint32_t done = 0; /* tiles */
    for (int t = first_tile(); t < w.tiles; t += tile_step()) {
        float acc[128];
        int before = 0;
#pragma unroll 1
        for (int k = 0; k < w.k_blocks; k++) {
            const uint32_t at_a = base + r.stage * STAGE + wg * (A_BYTES / 2), at_b = base + r.stage * STAGE + A_BYTES;
            const uint64_t a = hopper::descriptor(at_a), b = TB ? hopper::descriptor_t(at_b, BK * 128) : hopper::descriptor(at_b);
            hopper::wait_or_trap(bar.full(r.stage), r.phase);
            hopper::mma_fence();
#pragma unroll
            for (int i = 0; i < BK / 16; i++)
                mma<false, false, TB, HALVES>(acc, a + 2 * i, b + (TB ? 16 * 8 : 2) * i, k > 0 || i > 0);
            hopper::mma_commit();
            hopper::mma_wait<1>(); /* the stage before is read */
            if (k > 0)
                stage_read(bar.empty(before));
            before = r.stage;
            r.next();
        }
        mma_done(acc);
        stage_read(bar.empty(before));
        hopper::wait_or_trap(bar.tile_empty(), (done++ & 1) ^ 1);
        leave(acc, base + TILE_AT, wg);
        hopper::fence_async(); /* bulk copies read it */
        hopper::barrier_arrive_warp(bar.tile_full());
    }
}

/* 16 bytes of a tile: eight columns of a row. */
__device__ __forceinline__ uint4 from_tile(uint32_t tile, int row, int block, int chunk)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(tile + block * BLOCK + row * 128 + (chunk ^ (row & 7)) * 16) : "memory");
    return v;
}

#endif

/* TAKER: struct with WARPS, how many take tiles, 3 or 7; ARRIVALS, how many arrive on tile_empty when they have read a tile; SHARED, bytes of shared memory
 * of its own behind TAKEN_SHARED; `static void init(base)`, which one thread calls to initialise barriers of its own; and `static void take(walk, maps,
 * taker, base, rank, warp)`, which the WARPS warps enter whole. */
template <class TAKER> struct shape {
    enum { THREADS = 32 * (4 * CONSUMERS + 1 + TAKER::WARPS), MANY = TAKER::WARPS > 3, TAKE = MANY ? 80 : 136, MULTIPLY = MANY ? 176 : 184 /* registers */ };
};
template <class TAKER, bool TB>
__global__ __launch_bounds__(shape<TAKER>::THREADS, 1) void taken_sm90_kernel(const __grid_constant__ maps m, const __grid_constant__ walk w,
                                                                        const __grid_constant__ TAKER taker)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const uint32_t base = hopper::smem(pool), rank = hopper::cluster_rank();
    const barriers bar = {base + BARS_AT};
    if (threadIdx.x == 0) {
        if (base % 1024 != 0)
            __trap();
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(bar.full(i), 1);
            hopper::barrier_init(bar.empty(i), CONSUMERS * CLUSTER);
        }
        hopper::barrier_init(bar.tile_full(), 4 * CONSUMERS); /* warps */
        hopper::barrier_init(bar.tile_empty(), TAKER::ARRIVALS);
        TAKER::init(base);
        hopper::barrier_init_fence();
    }
    __syncthreads();
    hopper::cluster_sync();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp >= 4 * CONSUMERS) {
        hopper::registers_fewer<shape<TAKER>::TAKE>();
        if (warp == 4 * CONSUMERS) {
            if (threadIdx.x % 32 == 0)
                produce<TB>(w, m, base, rank);
        } else {
            TAKER::take(w, m, taker, base, rank, warp - 4 * CONSUMERS - 1);
        }
        __syncwarp();
    } else {
        hopper::registers_more<shape<TAKER>::MULTIPLY>();
        multiply<TB, shape<TAKER>::MANY>(w, base, rank, warp / 4);
    }
    hopper::cluster_sync(); /* nobody leaves while the other may still write to it */
#endif
}

/* ---- the host's side ---- */

/* w->rows, k_blocks, columns, b_step and b_apart are set. */
template <class TAKER, bool TB>
enum rt_status taken_launch(struct rt_queue *q, const maps *m, walk *w, const TAKER *taker, const char *name, struct rt_err *err)
{
    int most;
    walk_tiles(q, w, BM, &most);
    return launch_clusters(q, taken_sm90_kernel<TAKER, TB>, w->tiles < most ? w->tiles : most, shape<TAKER>::THREADS, TAKEN_SHARED + TAKER::SHARED, name, err, *m,
                           *w, *taker);
}

}

#endif
