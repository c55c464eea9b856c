/* What kernels of compute capability 9.0 share that make a product tile by tile, d [m, n] = op(a) op(b) in BF16 or FP16 with float32 sums in one pass over k:
 * operands come by bulk copies, warpgroups multiply asynchronously.
 *
 * Tiles have 256 columns, and stages of the ring that brings operands 64 of k. Two blocks of a cluster take the same columns of neighbouring rows, and each
 * loads half of b's tile into both. Blocks stay, and walk over the tiles in bands of rows, so that a band's rows and the columns at hand stay in the L2.
 */
#ifndef RT_CORE_CUDA_TILES_SM90_CUH
#define RT_CORE_CUDA_TILES_SM90_CUH

#include <cuda_fp16.h>

#include "core/cuda/hopper.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "core/cuda/tensor_map.cuh"

namespace {

enum { BN = 256, BK = 64, CLUSTER = 2, STAGES = 3, B_BYTES = BN * BK * 2 };

/* The tiles of one product. */
struct walk {
    int rows, k_blocks, columns, pairs, tiles; /* rows that exist; blocks of columns; pairs of row blocks */
    int band;            /* pairs that run side by side over all columns */
    int b_step, b_apart; /* b^T in rows: block c of columns begins at row c b_step, and its second half b_apart behind that */
};
struct maps {
    CUtensorMap a, b, out;
};
struct place {
    int row, column; /* first row; block of columns */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

extern __shared__ __align__(1024) char pool[];

struct ring {
    int stage;
    uint32_t phase;
    __device__ __forceinline__ void next()
    {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        phase ^= stage == 0;
    }
};

/* A block's tiles are t = first_tile(), + tile_step(), ...; where tile t, of BM rows, lies for the cluster's block `rank`. */
__device__ __forceinline__ int first_tile() { return blockIdx.x / CLUSTER; }
__device__ __forceinline__ int tile_step() { return gridDim.x / CLUSTER; }
template <int BM> __device__ __forceinline__ place place_of(const walk &w, int t, uint32_t rank)
{
    const int of_band = w.band * w.columns, band = t / of_band, within = t - band * of_band, high = min(w.band, w.pairs - band * w.band);
    return {((band * w.band + within % high) * CLUSTER + (int)rank) * BM, within / high};
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
    static_assert(!(HALVES && F16), "");
    if (HALVES) {
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

/* The products so far are done; acc is not read before. */
__device__ __forceinline__ void mma_done(float (&acc)[128])
{
    hopper::mma_wait<0>();
#pragma unroll
    for (int i = 0; i < 128; i++)
        asm volatile("" : "+f"(acc[i])::"memory");
}
/* To both blocks of the cluster: the warpgroup has read the stage. empty: its barrier. */
__device__ __forceinline__ void stage_read(uint32_t empty)
{
    if (threadIdx.x % 128 < CLUSTER)
        hopper::barrier_arrive_at(empty, threadIdx.x % 128);
}

template <bool F16> __device__ __forceinline__ uint32_t pack_pair(float lo, float hi)
{
    if (!F16)
        return vec8::pack2(lo, hi);
    const __half2 h = __floats2half2_rn(lo, hi);
    return *(const uint32_t *)(const void *)&h;
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
/* All but the LEFT last ones have read what they take. */
template <int LEFT> __device__ __forceinline__ void boxes_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory"); }
__device__ __forceinline__ void boxes_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

#endif

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

/* Pairs of blocks of bm rows in a band, of the L2's bytes. Where the rows of about 4,096 stay there, so many: columns are then read least often. Else a band's rows
 * come from memory again for each turn of the clusters that it lasts: as many as make one turn of all columns, or, where those are many, about as many rows as
 * a turn then has columns. */
inline int product_band(const walk *w, int bm, int clusters, int64_t l2_bytes)
{
    const int many = (4096 + CLUSTER * bm - 1) / (CLUSTER * bm), some = 2048 / (CLUSTER * bm);
    const int64_t bytes = (int64_t)many * CLUSTER * bm * BK * 2 * w->k_blocks;
    return bytes <= l2_bytes / 3 ? many : w->columns * some <= clusters ? clusters / w->columns : some;
}

/* w->rows, k_blocks and columns are set; pairs, tiles and band now. *clusters = how many the device has room for. */
inline void walk_tiles(struct rt_queue *q, walk *w, int bm, int *clusters)
{
    *clusters = q->dev->sm_count / CLUSTER;
    w->pairs = (w->rows + CLUSTER * bm - 1) / (CLUSTER * bm);
    w->tiles = w->pairs * w->columns;
    w->band = product_band(w, bm, *clusters, (int64_t)q->dev->l2_bytes);
}

/* Blocks of so many threads in `clusters` clusters, with dynamic shared memory. They begin when the kernel ahead has ended: beginning earlier gains
 * nothing in training, where the GPU is at its power limit. */
template <class... P, class... A>
enum rt_status launch_clusters(struct rt_queue *q, void (*kernel)(P...), int clusters, int threads, int shared, const char *name, struct rt_err *err,
                               const A &...args)
{
    enum rt_status st;
    RT_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    RT_CUDA_TRY(launch_as(q, false, kernel, dim3((unsigned)(clusters * CLUSTER)), dim3((unsigned)threads), (size_t)shared, CLUSTER, args...));
    RT_TRY(rt_cuda_launched(name, err));
out:
    return st;
}

}

#endif
