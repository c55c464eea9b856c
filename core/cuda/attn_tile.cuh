/* Pieces of the attention kernels: tiles in shared memory, the tensor cores' fragments, and the list of sequences.
 *
 * A tile is rows of D elements, D + 8 apart: eight consecutive rows then start in eight different groups of four banks, so that ldmatrix and
 * 16-byte stores meet no conflict, and every offset inside a tile is a constant.
 */
#ifndef RT_CORE_CUDA_ATTN_TILE_CUH
#define RT_CORE_CUDA_ATTN_TILE_CUH

#include <cuda_bf16.h>
#include <stdint.h>

#include "core/cuda/attn.h"

namespace {

typedef __nv_bfloat16 bf16;

template <int D>
struct tile {
    enum { stride = D + 8, chunks = D / 8 };
    static constexpr int bytes(int rows) { return rows * stride * 2; }
};

/* One side of an attention call: rows of one head, `ld` apart; vec: 16-byte accesses are aligned. */
struct head_rows {
    const bf16 *data;
    int64_t ld;
    int d;
    bool vec;
};

__device__ __forceinline__ uint32_t shared_at(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy16(uint32_t dst, const void *src, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void copy4(uint32_t dst, const void *src, bool valid)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0));
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

/* ROWS rows from row0 into a tile; rows from `rows` on and columns from x.d on are 0. */
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void tile_load(bf16 *dst, const head_rows &x, int row0, int rows)
{
    const int left = rows - row0;
    const bf16 *src = x.data + row0 * x.ld;
    const uint32_t to = shared_at(dst);
    if (x.vec) {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * tile<D>::chunks; i += THREADS) {
            const int r = i / tile<D>::chunks, c = i % tile<D>::chunks * 8;
            const bool valid = r < left && c < x.d;
            copy16(to + (r * tile<D>::stride + c) * 2, valid ? src + r * x.ld + c : x.data, valid);
        }
    } else {
        for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
            const int r = i / D, c = i % D;
            dst[r * tile<D>::stride + c] = r < left && c < x.d ? src[r * x.ld + c] : __float2bfloat16_rn(0.0f);
        }
    }
}

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- fragments of mma.m16n8k16 ---- */

/* A: 16 rows from row, 16 columns from col of a tile. */
template <int D>
__device__ __forceinline__ uint32_t a_at(const bf16 *t, int row, int col, int lane)
{
    return shared_at(t + (row + (lane & 15)) * tile<D>::stride + col + (lane >> 4) * 8);
}
/* B (two of n 8): tile rows are the product's columns: 16 rows from row, 16 elements from col. */
template <int D>
__device__ __forceinline__ uint32_t bt_at(const bf16 *t, int row, int col, int lane)
{
    return shared_at(t + (row + (lane & 7) + (lane >> 4) * 8) * tile<D>::stride + col + (lane >> 3 & 1) * 8);
}
/* B (two of n 8): tile rows are the summed index: 16 rows from row, 16 columns from col; read transposed. */
template <int D>
__device__ __forceinline__ uint32_t bn_at(const bf16 *t, int row, int col, int lane)
{
    return a_at<D>(t, row, col, lane);
}

__device__ __forceinline__ void ldsm(uint32_t (&r)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ __forceinline__ void ldsm_t(uint32_t (&r)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t pack(float lo, float hi)
{
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *(const uint32_t *)&v;
}

/* s[i][j] += X Y^T: rows x_row + 16 i of X, rows 8 j of Y, over D. */
template <int D, int WM, int N8>
__device__ __forceinline__ void product_nt(float (&s)[WM][N8][4], const bf16 *x, int x_row, const bf16 *y, int lane)
{
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t a[WM][4];
#pragma unroll
        for (int i = 0; i < WM; i++)
            ldsm(a[i], a_at<D>(x, x_row + 16 * i, k, lane));
#pragma unroll
        for (int j = 0; j < N8; j += 2) {
            uint32_t b[4];
            ldsm(b, bt_at<D>(y, 8 * j, k, lane));
#pragma unroll
            for (int i = 0; i < WM; i++) {
                mma(s[i][j], a[i], b[0], b[1]);
                mma(s[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

/* acc += P Y: P as bf16 from the accumulators of another product, its columns the rows of Y. */
template <int D, int WM, int N8>
__device__ __forceinline__ void product_nn(float (&acc)[WM][D / 8][4], const float (&p)[WM][N8][4], const bf16 *y, int lane)
{
#pragma unroll
    for (int k = 0; k < N8; k += 2) {
        uint32_t a[WM][4];
#pragma unroll
        for (int i = 0; i < WM; i++) {
            a[i][0] = pack(p[i][k][0], p[i][k][1]);
            a[i][1] = pack(p[i][k][2], p[i][k][3]);
            a[i][2] = pack(p[i][k + 1][0], p[i][k + 1][1]);
            a[i][3] = pack(p[i][k + 1][2], p[i][k + 1][3]);
        }
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            uint32_t b[4];
            ldsm_t(b, bn_at<D>(y, 8 * k, 8 * j, lane));
#pragma unroll
            for (int i = 0; i < WM; i++) {
                mma(acc[i][j], a[i], b[0], b[1]);
                mma(acc[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

/* A warp's 16 WM rows of accumulators, times factor[i][half], through its own rows of a tile to rows of global memory. */
template <int D, int STRIDE, int WM>
__device__ __forceinline__ void rows_store(bf16 *own, const float (&acc)[WM][D / 8][4], const float (&factor)[WM][2], bf16 *dst, int64_t ld, int d,
                                           bool vec, int rows, int lane)
{
    __syncwarp();
#pragma unroll
    for (int i = 0; i < WM; i++)
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = 16 * i + 8 * half + lane / 4;
                *(uint32_t *)(own + r * STRIDE + 8 * j + lane % 4 * 2) =
                    pack(acc[i][j][2 * half] * factor[i][half], acc[i][j][2 * half + 1] * factor[i][half]);
            }
    __syncwarp();
    if (vec) {
        const int chunks = d / 8;
        for (int i = lane; i < 16 * WM * chunks; i += 32) {
            const int r = i / chunks, c = i % chunks * 8;
            if (r < rows)
                *(uint4 *)(dst + r * ld + c) = *(const uint4 *)(own + r * STRIDE + c);
        }
    } else {
        for (int i = lane; i < 16 * WM * d; i += 32)
            if (i / d < rows)
                dst[i / d * ld + i % d] = own[i / d * STRIDE + i % d];
    }
}

/* ---- sequences ---- */

struct place {
    int64_t first; /* row of the sequence's first token */
    int len, row;  /* its length; first row of the tile, inside the sequence */
};
/* Tile number t, rows rows each. */
__device__ __forceinline__ place place_of(const rt_cuda_seqs &s, int t, int rows)
{
    const int32_t *cu = s.dev != NULL ? s.dev : s.held, *first = cu + s.n_seq + 1;
    int lo = 0, hi = s.n_seq;
    while (hi - lo > 1) {
        const int mid = (lo + hi) / 2;
        if (first[mid] <= t)
            lo = mid;
        else
            hi = mid;
    }
    place p;
    p.first = cu[lo];
    p.len = cu[lo + 1] - cu[lo];
    p.row = (t - first[lo]) * rows;
    return p;
}

/* UNSUPPORTED unless a kernel's shared memory is there. */
inline enum rt_status shared_fits(const char *op, int bytes, int limit, const struct rt_attn_shape *s, struct rt_err *err)
{
    if (bytes <= limit)
        return RT_OK;
    return rt_fail(err, RT_UNSUPPORTED, "%s: heads of %d and %d elements need %d KiB of shared memory a block; the GPU has %d", op, s->dqk, s->dv,
                   (bytes + 1023) / 1024, limit / 1024);
}

inline bool aligned16(const void *p, int64_t ld, int64_t head, int d)
{
    return (uintptr_t)p % 16 == 0 && ld % 8 == 0 && head % 8 == 0 && d % 8 == 0;
}

}

#endif
