/* Pieces of the attention kernels of compute capability 9.0: bulk copies of one head's rows, and bfloat16 products of a warpgroup.
 *
 * A tile of shared memory is blocks of 64 columns, one behind the other, each rows of 128 bytes in the 128-byte swizzle: what a bulk copy with a box
 * of 64 columns writes. The same block serves as an operand whose columns are summed over, and (read transposed) as one whose rows are.
 */
#ifndef RT_CORE_CUDA_ATTN_SM90_CUH
#define RT_CORE_CUDA_ATTN_SM90_CUH

#include "core/cuda/attn_tile.cuh"
#include "core/cuda/hopper.cuh"
#include "core/cuda/tensor_map.cuh"

namespace {

enum { ATTN_BLOCK = 64 }; /* columns of a block */

/* Rows of all heads as [n, heads, d] for bulk copies of `rows` rows x 64 columns of one head; columns beyond d and rows beyond n come as 0. */
inline enum rt_status attn_map(struct rt_queue *q, CUtensorMap *map, const void *data, int64_t n, int heads, int d, int64_t ld, int64_t head,
                               int rows, struct rt_err *err)
{
    const cuuint64_t size[3] = {(cuuint64_t)d, (cuuint64_t)heads, (cuuint64_t)n}, stride[2] = {(cuuint64_t)head * 2, (cuuint64_t)ld * 2};
    const cuuint32_t box[3] = {ATTN_BLOCK, 1, (cuuint32_t)rows};
    return tensor_map(q->dev, map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, data, size, stride, box, CU_TENSOR_MAP_SWIZZLE_128B, err);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void load_rows(uint32_t dst, const CUtensorMap *map, int col, int head, int row, uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(col), "r"(head), "r"(row) : "memory");
}
/* ROWS rows x D columns of one head. */
template <int D, int ROWS>
__device__ __forceinline__ void load_tile(uint32_t dst, const CUtensorMap *map, int head, int64_t row, uint32_t bar)
{
#pragma unroll
    for (int b = 0; b < D / ATTN_BLOCK; b++)
        load_rows(dst + b * ROWS * 128, map, b * ATTN_BLOCK, head, (int)row, bar);
}

/* The same in all lanes, and the compiler knows it. */
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

/* The compiler may not read (or change) accumulators on the wrong side of a wait. */
template <int N>
__device__ __forceinline__ void pin(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

#define RT_R8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RT_0_31 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RT_D32 RT_0_31 "}"
#define RT_D64 \
    RT_0_31 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

/* d [64 x N] (+)= a [64 x 16] b [N x 16]^T from shared memory, columns of both contiguous. Lane l of warp w holds row 16 w + l/4 (d[4 j + 0, 1])
 * and row + 8 (d[4 j + 2, 3]), columns 8 j + 2 (l % 4) and the next. */
__device__ __forceinline__ void mma_ss(float (&d)[32], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " RT_D32 ", %32, %33, p, 1, 1, 0, 0;\n}"
                 : RT_R8(d, 0), RT_R8(d, 8), RT_R8(d, 16), RT_R8(d, 24) : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void mma_ss(float (&d)[64], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " RT_D64 ", %64, %65, p, 1, 1, 0, 0;\n}"
                 : RT_R8(d, 0), RT_R8(d, 8), RT_R8(d, 16), RT_R8(d, 24), RT_R8(d, 32), RT_R8(d, 40), RT_R8(d, 48), RT_R8(d, 56)
                 : "l"(a), "l"(b), "r"(add));
}
/* d [64 x 64] (+)= a^T b, both from shared memory and read transposed: tiles whose rows are summed over. */
__device__ __forceinline__ void mma_tt(float (&d)[32], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " RT_D32 ", %32, %33, p, 1, 1, 1, 1;\n}"
                 : RT_R8(d, 0), RT_R8(d, 8), RT_R8(d, 16), RT_R8(d, 24) : "l"(a), "l"(b), "r"(add));
}
/* d [64 x N] += a [64 x 16] b [16 x N]: a in registers, as a product leaves it and pack makes it; b read transposed. */
__device__ __forceinline__ void mma_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " RT_D32
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
                 : RT_R8(d, 0), RT_R8(d, 8), RT_R8(d, 16), RT_R8(d, 24) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void mma_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " RT_D64
                 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
                 : RT_R8(d, 0), RT_R8(d, 8), RT_R8(d, 16), RT_R8(d, 24), RT_R8(d, 32), RT_R8(d, 40), RT_R8(d, 48), RT_R8(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef RT_R8
#undef RT_0_31
#undef RT_D32
#undef RT_D64

/* s = X Y^T over D: X 64 rows at x of a tile of x_rows rows, Y a tile of y_rows rows (the columns of s). Enqueued, not committed. */
template <int D, int X_ROWS, int Y_ROWS>
__device__ __forceinline__ void scores(float (&s)[Y_ROWS / 2], uint32_t x, uint32_t y)
{
    const uint64_t dx = hopper::descriptor(x), dy = hopper::descriptor(y); /* whose lowest bits are the address in units of 16 bytes */
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        mma_ss(s, dx + (k / 4 * X_ROWS * 8 + k % 4 * 2), dy + (k / 4 * Y_ROWS * 8 + k % 4 * 2), k > 0);
}
/* acc += P Y: P [64 x ROWS] packed, Y a tile of ROWS rows. */
template <int D, int ROWS>
__device__ __forceinline__ void weighted_sum(float (&acc)[D / 2], const uint32_t (&p)[ROWS / 16][4], uint32_t y)
{
    const uint64_t dy = hopper::descriptor_t(y, ROWS * 128);
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++)
        mma_rs(acc, p[k], dy + k * 16 * 8);
}
template <int N>
__device__ __forceinline__ void pack_all(uint32_t (&p)[N / 8][4], const float (&s)[N])
{
#pragma unroll
    for (int k = 0; k < N / 8; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            p[k][i] = pack(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

/* Words of four lanes, transposed: lane q's word i becomes lane i's word q. */
__device__ __forceinline__ void transpose4(uint32_t (&w)[4], int q)
{
#pragma unroll
    for (int b = 1; b <= 2; b *= 2)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int lo = b == 1 ? 2 * i : i, hi = lo + b;
            const uint32_t got = __shfl_xor_sync(~0u, q & b ? w[lo] : w[hi], b);
            if (q & b)
                w[lo] = got;
            else
                w[hi] = got;
        }
}
/* A thread's accumulators of rows row and row + 8 of `rows`, times the factor of each, to rows of d columns in global memory, from `column` on; 16 bytes
 * at a time. */
template <int D>
__device__ __forceinline__ void sums_out(const float (&acc)[D / 2], const float (&factor)[2], bf16 *dst, int64_t ld, int d, int row, int rows, int lane,
                                         int column = 0)
{
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int j = 0; j < D / 8; j += 4) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                w[i] = pack(acc[4 * (j + i) + 2 * half] * factor[half], acc[4 * (j + i) + 2 * half + 1] * factor[half]);
            transpose4(w, lane % 4);
            const int r = row + 8 * half, c = column + 8 * j + 8 * (lane % 4);
            if (r < rows && c < d)
                *(uint4 *)(dst + r * ld + c) = make_uint4(w[0], w[1], w[2], w[3]);
        }
}

#endif

}

#endif
