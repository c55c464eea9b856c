/* Products of compute capability 9.0 by bulk copies and asynchronous products of a warpgroup, for kernels that do something with a tile of the
 * result: d [m, n] = op(a) op(b), BF16 or FP16 with float32 sums in one pass over k.
 *
 * A block makes tiles of 128 rows x 256 columns, one behind the other:
 *
 *   warpgroups 0, 1   multiply, 64 rows each; leave a tile, rounded, in shared memory, and go on with the next
 *   warps 9 ..        take it from there, while the next one is multiplied: three or seven warps, and what they do is the kernel's business (`taker`)
 *   one thread        keeps a ring of stages of 64 of k filled
 *
 * Two blocks of a cluster take the same columns of neighbouring rows, and each loads half of b's tile into both. Blocks stay, and walk over the
 * tiles in bands of rows, so that a band's rows and the columns at hand stay in the L2.
 *
 * Tiles that are left over when all clusters had as many may be cut along k into `parts` (a taker that is SPLIT): the sums of all but the last part go
 * through memory, and are added to the last part's in the order of the parts. A part only waits for parts with smaller numbers, whose clusters
 * started before.
 */
#ifndef RT_CORE_CUDA_PRODUCT_SM90_CUH
#define RT_CORE_CUDA_PRODUCT_SM90_CUH

#include <cuda_fp16.h>

#include "core/cuda/hopper.cuh"
#include "core/cuda/rows.cuh"
#include "core/cuda/tensor_map.cuh"

namespace {

enum {
    BM = 128, BN = 256, BK = 64, CLUSTER = 2,
    A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE = A_BYTES + B_BYTES, STAGES = 3,
    TILE = BM * BN * 2,     /* as the products leave it: 4 blocks of 64 columns, rows of 128 bytes in the 128-byte swizzle */
    BLOCK = BM * 128,       /* one of them */
    CONSUMERS = 2,          /* warpgroups */
    TILE_AT = STAGES * STAGE, BARS_AT = TILE_AT + TILE, PRODUCT_SHARED = BARS_AT + (2 * STAGES + 2) * 8,
};

/* The tiles of one product. */
struct walk {
    int rows, k_blocks, columns, pairs, tiles; /* rows that exist; blocks of columns; pairs of row blocks */
    int band;            /* pairs that run side by side over all columns */
    int b_step, b_apart; /* b^T in rows: block c of columns begins at row c b_step, and its second half b_apart behind that */
    int whole, parts, items; /* tiles that are made whole; parts of each other one; items of work in all */
    float4 *partial;     /* [tiles - whole][parts - 1][CLUSTER] sums of a tile, as the threads hold them */
    uint32_t *there;     /* [the same][CONSUMERS] zeros; 1: they are written */
};
struct maps {
    CUtensorMap a, b, out;
};
struct place {
    int row, column; /* first row; block of columns */
};

enum { PARTIAL = BM * BN / 4 }; /* float4s of a tile */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

extern __shared__ __align__(1024) char pool[];

struct barriers {
    uint32_t at;
    __device__ __forceinline__ uint32_t full(int stage) const { return at + 8 * stage; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return at + 8 * (STAGES + stage); }
    __device__ __forceinline__ uint32_t tile_full() const { return at + 16 * STAGES; }
    __device__ __forceinline__ uint32_t tile_empty() const { return at + 16 * STAGES + 8; }
};

struct ring {
    int stage;
    uint32_t phase;
    __device__ __forceinline__ void next()
    {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        phase ^= stage == 0;
    }
};

/* A block's tiles are t = first_tile(), + tile_step(), ...; where tile t lies for the cluster's block `rank`. */
__device__ __forceinline__ int first_tile() { return blockIdx.x / CLUSTER; }
__device__ __forceinline__ int tile_step() { return gridDim.x / CLUSTER; }
__device__ __forceinline__ place place_of(const walk &w, int t, uint32_t rank)
{
    const int of_band = w.band * w.columns, band = t / of_band, within = t - band * of_band, high = min(w.band, w.pairs - band * w.band);
    return {((band * w.band + within % high) * CLUSTER + (int)rank) * BM, within / high};
}

/* Item t of the work: a tile's blocks of k from k0 to k1, part `part` of it. */
struct item {
    place at;
    int k0, k1, part, slot; /* slot: of the tile's first part among the partial sums */
};
template <bool SPLIT>
__device__ __forceinline__ item item_of(const walk &w, int t, uint32_t rank)
{
    if (!SPLIT || t < w.whole)
        return {place_of(w, t, rank), 0, w.k_blocks, w.parts - 1, -1};
    const int tile = (t - w.whole) / w.parts, part = (t - w.whole) % w.parts;
    return {place_of(w, w.whole + tile, rank), part * w.k_blocks / w.parts, (part + 1) * w.k_blocks / w.parts, part, tile * (w.parts - 1)};
}

/* The cluster's block `rank` loads its half of b's tile into both. TB: b has its columns contiguous; boxes of 64. */
template <bool TB>
__device__ __forceinline__ void load_b(const walk &w, const maps &m, uint32_t dst, int k, int column, uint32_t rank, uint32_t bar)
{
    const uint32_t half = dst + rank * (B_BYTES / 2);
    if (TB) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            hopper::load_box_multicast(half + i * (B_BYTES / 4), &m.b, column * BN + ((int)rank * 2 + i) * 64, k * BK, bar, (1 << CLUSTER) - 1);
    } else {
        hopper::load_box_multicast(half, &m.b, k * BK, column * w.b_step + (int)rank * w.b_apart, bar, (1 << CLUSTER) - 1);
    }
}

/* One thread. */
template <bool SPLIT, bool TA, bool TB>
__device__ __forceinline__ void produce(const walk &w, const maps &m, uint32_t base, uint32_t rank)
{
    const barriers bar = {base + BARS_AT};
    ring r = {0, 0};
    for (int t = first_tile(); t < w.items; t += tile_step()) {
        const item it = item_of<SPLIT>(w, t, rank);
        const place at = it.at;
        for (int k = it.k0; k < it.k1; k++) {
            const uint32_t to = base + r.stage * STAGE;
            hopper::wait_or_trap(bar.empty(r.stage), r.phase ^ 1);
            hopper::barrier_expect(bar.full(r.stage), STAGE);
            if (TA) {
                hopper::load_box(to, &m.a, at.row, k * BK, bar.full(r.stage));
                hopper::load_box(to + A_BYTES / 2, &m.a, at.row + BM / 2, k * BK, bar.full(r.stage));
            } else {
                hopper::load_box(to, &m.a, k * BK, at.row, bar.full(r.stage));
            }
            load_b<TB>(w, m, to + A_BYTES, k, at.column, rank, bar.full(r.stage));
            r.next();
        }
    }
}

#define RT_R8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RT_R32(d, i) RT_R8(d, i), RT_R8(d, i + 8), RT_R8(d, i + 16), RT_R8(d, i + 24)
#define RT_MMA_256(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
                 "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
                 "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, " \
                 "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
                 "%126, %127}, %128, %129, p, 1, 1, %131, %132;\n}" \
                 : RT_R32(d, 0), RT_R32(d, 32), RT_R32(d, 64), RT_R32(d, 96) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB))
#define RT_MMA_128(type, at) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
                 "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
                 "%57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, %67, %68;\n}" \
                 : RT_R32(d, at), RT_R32(d, at + 32) : "l"(a), "l"(b + at * 16), "r"(add), "n"(TA), "n"(TB))
/* d [64 x 256] (+)= a [64 x 16] b, float32 sums; `add` 0: d begins at 0. a, or with TA a^T; b [256 x 16]^T, or with TB [16 x 256]. Lane l of warp w holds
 * row 16 w + l/4 (d[4 j + 0, 1]) and row + 8 (d[4 j + 2, 3]), columns 8 j + 2 (l % 4) and the next. HALVES: as two products of 128 columns, which a kernel
 * of more than 384 threads needs: the compiler takes no product whose registers the launch could not give to all. */
template <bool F16, int TA, int TB, bool HALVES>
__device__ __forceinline__ void mma(float (&d)[128], uint64_t a, uint64_t b, int add)
{
    if (HALVES && F16) {
        RT_MMA_128("f16", 0);
        RT_MMA_128("f16", 64);
    } else if (HALVES) {
        RT_MMA_128("bf16", 0);
        RT_MMA_128("bf16", 64);
    } else if (F16) {
        RT_MMA_256("f16");
    } else {
        RT_MMA_256("bf16");
    }
}
#undef RT_R8
#undef RT_R32
#undef RT_MMA_256
#undef RT_MMA_128

template <bool F16> __device__ __forceinline__ uint32_t pack_pair(float lo, float hi)
{
    if (!F16)
        return vec8::pack2(lo, hi);
    const __half2 h = __floats2half2_rn(lo, hi);
    return *(const uint32_t *)(const void *)&h;
}

/* The warpgroup's 64 rows, rounded, to the tile. */
template <bool F16>
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
            v[i] = pack_pair<F16>(acc[8 * j + 2 * i], acc[8 * j + 2 * i + 1]);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
    }
}

__device__ __forceinline__ void warpgroup_sync(int wg) { asm volatile("bar.sync %0, 128;" ::"r"(1 + wg) : "memory"); }

/* The warpgroup's sums to memory, and from there. at: the thread's first float4. */
__device__ __forceinline__ void sums_away(const float (&acc)[128], float4 *at, uint32_t *there, int wg)
{
#pragma unroll
    for (int i = 0; i < 32; i++)
        __stcg(at + i * (128 * CONSUMERS), make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
    __threadfence();
    warpgroup_sync(wg);
    if (threadIdx.x % 128 == 0)
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(there), "r"(1) : "memory");
}
__device__ __forceinline__ void sums_here(float (&acc)[128], const float4 *at, const uint32_t *there, int wg)
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
    warpgroup_sync(wg);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float4 v = __ldcg(at + i * (128 * CONSUMERS));
        acc[4 * i] += v.x;
        acc[4 * i + 1] += v.y;
        acc[4 * i + 2] += v.z;
        acc[4 * i + 3] += v.w;
    }
}

template <bool SPLIT, bool F16, bool TA, bool TB, bool HALVES>
__device__ __forceinline__ void multiply(const walk &w, uint32_t base, uint32_t rank, int wg)
{
    const barriers bar = {base + BARS_AT};
    ring r = {0, 0};
    uint32_t done = 0; /* tiles */
    for (int t = first_tile(); t < w.items; t += tile_step()) {
        const item it = item_of<SPLIT>(w, t, rank);
        float acc[128];
        int before = 0;
#pragma unroll 1
        for (int k = it.k0; k < it.k1; k++) {
            const uint32_t at_a = base + r.stage * STAGE + wg * (A_BYTES / 2), at_b = base + r.stage * STAGE + A_BYTES;
            const uint64_t a = TA ? hopper::descriptor_t(at_a, BK * 128) : hopper::descriptor(at_a), b = TB ? hopper::descriptor_t(at_b, BK * 128) : hopper::descriptor(at_b);
            hopper::wait_or_trap(bar.full(r.stage), r.phase);
            hopper::mma_fence();
#pragma unroll
            for (int i = 0; i < BK / 16; i++)
                mma<F16, TA, TB, HALVES>(acc, a + (TA ? 16 * 8 : 2) * i, b + (TB ? 16 * 8 : 2) * i, k > it.k0 || i > 0);
            hopper::mma_commit();
            hopper::mma_wait<1>(); /* the stage before is read */
            if (k > it.k0 && threadIdx.x % 128 < CLUSTER)
                hopper::barrier_arrive_at(bar.empty(before), threadIdx.x % 128);
            before = r.stage;
            r.next();
        }
        hopper::mma_wait<0>();
#pragma unroll
        for (int i = 0; i < 128; i++)
            asm volatile("" : "+f"(acc[i])::"memory"); /* not read before the wait */
        if (threadIdx.x % 128 < CLUSTER)
            hopper::barrier_arrive_at(bar.empty(before), threadIdx.x % 128);
        if (SPLIT && it.slot >= 0) {
            for (int part = it.part < w.parts - 1 ? it.part : 0; part < w.parts - 1; part++) {
                const int64_t slot = (int64_t)(it.slot + part) * CLUSTER + rank;
                float4 *at = w.partial + slot * PARTIAL + threadIdx.x;
                if (it.part < w.parts - 1) {
                    sums_away(acc, at, w.there + slot * CONSUMERS + wg, wg);
                    break;
                }
                sums_here(acc, at, w.there + slot * CONSUMERS + wg, wg);
            }
            if (it.part < w.parts - 1)
                continue;
        }
        hopper::wait_or_trap(bar.tile_empty(), (done++ & 1) ^ 1);
        leave<F16>(acc, base + TILE_AT, wg);
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
/* A block of the tile to column x, row y of the matrix; what lies outside is not written. */
__device__ __forceinline__ void store_box(const CUtensorMap *map, uint32_t from, int x, int y)
{
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void add_box(const CUtensorMap *map, uint32_t from, int x, int y)
{
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void boxes_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void boxes_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void boxes_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

#endif

/* TAKER: struct with WARPS, how many take tiles, 3 or 7; ARRIVALS, how many arrive on tile_empty when they have read a tile; SHARED, bytes of shared memory
 * of its own behind PRODUCT_SHARED; SPLIT, whether tiles may be cut (it sees them in the order of their items then, once each); `static void
 * init(base)`, which one thread calls to initialise barriers of its own; and `static void take(walk, maps, taker, base, rank, warp)`, which the WARPS
 * warps enter whole. */
template <class TAKER> struct shape {
    enum { THREADS = 32 * (4 * CONSUMERS + 1 + TAKER::WARPS), MANY = TAKER::WARPS > 3, TAKE = MANY ? 80 : 136, MULTIPLY = MANY ? 176 : 184 /* registers */ };
};
template <class TAKER, bool F16, bool TA, bool TB>
__global__ __launch_bounds__(shape<TAKER>::THREADS, 1) void product_sm90_kernel(const __grid_constant__ maps m, const __grid_constant__ walk w,
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
                produce<TAKER::SPLIT, TA, TB>(w, m, base, rank);
        } else {
            TAKER::take(w, m, taker, base, rank, warp - 4 * CONSUMERS - 1);
        }
        __syncwarp();
    } else {
        hopper::registers_more<shape<TAKER>::MULTIPLY>();
        multiply<TAKER::SPLIT, F16, TA, TB, shape<TAKER>::MANY>(w, base, rank, warp / 4);
    }
    hopper::cluster_sync(); /* nobody leaves while the other may still write to it */
#endif
}

/* ---- the host's side ---- */

/* A matrix [rows, cols] at row distance ld (elements) in boxes of box_rows x 64 columns, as the products take them. */
inline enum rt_status product_map(struct rt_queue *q, CUtensorMap *map, bool f16, const void *data, int64_t rows, int64_t cols, int64_t ld, int box_rows,
                                  struct rt_err *err)
{
    const cuuint64_t size[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)ld * 2};
    const cuuint32_t box[2] = {64, (cuuint32_t)box_rows};
    return tensor_map(q->dev, map, f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, size, stride, box,
                      CU_TENSOR_MAP_SWIZZLE_128B, err);
}

enum { SUMS = PARTIAL * 16 + 16 }; /* bytes of a tile's sums and what says that they are there */
/* In how many parts r tiles that are left over take the least time, that of a whole tile being 1. Bringing sums away and back takes as long as some 15 + 3
 * parts blocks of k: 128 KB a block of threads and part. */
inline int product_parts(int r, int clusters, int k_blocks)
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

/* Pairs in a band. Where the rows of sixteen stay in the L2, sixteen: columns are then read least often. Else a band's rows come from memory again for each
 * turn of the clusters that it lasts: as many as make one turn of all columns, or, where those are many, eight, about as many as a turn then has columns. */
inline int product_band(const walk *w, int clusters, int64_t l2_bytes)
{
    const int64_t sixteen = (int64_t)16 * CLUSTER * BM * BK * 2 * w->k_blocks;
    return sixteen <= l2_bytes / 3 ? 16 : w->columns * 8 <= clusters ? clusters / w->columns : 8;
}

/* w->rows, k_blocks, columns, b_step and b_apart are set. */
template <class TAKER, bool F16, bool TA, bool TB>
enum rt_status product_launch(struct rt_queue *q, const maps *m, walk *w, const TAKER *taker, const char *name, struct rt_err *err)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};
    enum rt_status st;
    w->pairs = (w->rows + CLUSTER * BM - 1) / (CLUSTER * BM);
    w->tiles = w->pairs * w->columns;
    const int most = q->dev->sm_count / CLUSTER, rest = w->tiles % most;
    w->band = product_band(w, most, (int64_t)q->dev->l2_bytes);
    w->parts = TAKER::SPLIT ? product_parts(rest, most, w->k_blocks) : 1;
    w->whole = w->parts > 1 ? w->tiles - rest : w->tiles;
    w->items = w->whole + (w->tiles - w->whole) * w->parts;
    const int clusters = w->items < most ? w->items : most;
    if (w->parts > 1) {
        const size_t slots = (size_t)rest * (w->parts - 1) * CLUSTER;
        w->partial = (float4 *)q->workspace;
        w->there = (uint32_t *)(w->partial + slots * PARTIAL);
        RT_CUDA_TRY(cudaMemsetAsync(w->there, 0, slots * CONSUMERS * sizeof *w->there, q->stream));
    }
    RT_CUDA_TRY(cudaFuncSetAttribute((product_sm90_kernel<TAKER, F16, TA, TB>), cudaFuncAttributeMaxDynamicSharedMemorySize, PRODUCT_SHARED + TAKER::SHARED));
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = CLUSTER;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3((unsigned)(clusters * CLUSTER));
    config.blockDim = dim3(shape<TAKER>::THREADS);
    config.dynamicSmemBytes = PRODUCT_SHARED + TAKER::SHARED;
    config.stream = q->stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    RT_CUDA_TRY(cudaLaunchKernelEx(&config, product_sm90_kernel<TAKER, F16, TA, TB>, *m, *w, *taker));
    RT_TRY(rt_cuda_launched(name, err));
out:
    return st;
}

}

#endif
