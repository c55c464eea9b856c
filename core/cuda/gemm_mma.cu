/* Products of any shape, stride and alignment by mma.sync: where cuBLASLt is missing, or has no algorithm.
 *
 * A block makes a 128 x 128 tile of d with 8 warps of 64 x 32; operands pass through two stages of shared memory, 32 of k at a time, in the
 * orientation in which they are stored: ldmatrix transposes where it must. Rows in shared memory are padded by 16 bytes, so that the eight
 * 16-byte rows of an ldmatrix lie in different banks. */
#include <cuda_bf16.h>

#include "core/cuda/gemm_kernels.h"

namespace {

typedef __nv_bfloat16 bf16;

enum { TM = 128, TN = 128, TK = 32, THREADS = 256, PAD = 8, PITCH_K = TK + PAD, PITCH_MN = TM + PAD, STAGE = TM * PITCH_K };

struct operand {
    const bf16 *at; /* of this batch */
    int64_t ld, mn, k;
    bool wide; /* 16-byte loads are possible */
};

struct problem {
    const bf16 *a, *b;
    void *d;
    const void *bias;
    int64_t m, n, k, lda, ldb, ldd, a_stride, b_stride, d_stride;
    unsigned tiles_n;
    bool accumulate, d_f32, bias_f32, a_wide, b_wide;
};

__device__ void copy16(bf16 *dst, const bf16 *src)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(dst)), "l"(src));
}

__device__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

/* The tile that begins at (mn0, k0) into shared memory; what lies outside is 0. T: stored [k, mn], else [mn, k]. */
template <bool T>
__device__ void load_tile(bf16 *tile, const operand &o, int64_t mn0, int64_t k0)
{
    const int64_t rows = T ? o.k : o.mn, cols = T ? o.mn : o.k, r0 = T ? k0 : mn0, c0 = T ? mn0 : k0;
    const int in_row = (T ? TM : TK) / 8, pitch = T ? PITCH_MN : PITCH_K;
#pragma unroll
    for (int i = 0; i < TM * TK / 8 / THREADS; i++) {
        const int chunk = i * THREADS + threadIdx.x;
        const int64_t row = r0 + chunk / in_row, col = c0 + chunk % in_row * 8;
        bf16 *dst = tile + chunk / in_row * pitch + chunk % in_row * 8;
        if (o.wide && row < rows && col + 8 <= cols) {
            copy16(dst, o.at + row * o.ld + col);
        } else {
#pragma unroll 1
            for (int j = 0; j < 8; j++)
                dst[j] = row < rows && col + j < cols ? o.at[row * o.ld + col + j] : __float2bfloat16_rn(0.0f);
        }
    }
}

template <bool TRANS>
__device__ void ldmatrix(uint32_t (&r)[4], const bf16 *p)
{
    const unsigned at = (unsigned)__cvta_generic_to_shared(p);
    if (TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}

/* 16 rows of mn from mn0 and 16 of k from k0 as the fragment of operand a (m16k16), or of two neighbouring operands b (k16n8 each). */
template <bool T, bool IS_A>
__device__ void fragment(uint32_t (&r)[4], const bf16 *tile, int mn0, int k0)
{
    const int lane = threadIdx.x % 32, low = lane % 8, mid = lane / 8 % 2, high = lane / 16;
    const int mn = mn0 + low * !T + (IS_A ? mid : high) * 8, k = k0 + low * T + (IS_A ? high : mid) * 8;
    ldmatrix<T>(r, T ? tile + k * PITCH_MN + mn : tile + mn * PITCH_K + k);
}

__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool TA, bool TB>
__device__ void multiply(float (&c)[4][4][4], const bf16 *a, const bf16 *b, int m0, int n0)
{
#pragma unroll
    for (int k = 0; k < TK; k += 16) {
        uint32_t fa[4][4], fb[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            fragment<TA, true>(fa[i], a, m0 + 16 * i, k);
#pragma unroll
        for (int j = 0; j < 2; j++)
            fragment<TB, false>(fb[j], b, n0 + 16 * j, k);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma(c[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
    }
}

__device__ void put(const problem &p, int64_t batch, int64_t row, int64_t col, float v)
{
    if (row >= p.m || col >= p.n)
        return;
    const int64_t at = batch * p.d_stride + row * p.ldd + col;
    if (p.bias != NULL)
        v += p.bias_f32 ? ((const float *)p.bias)[col] : __bfloat162float(((const bf16 *)p.bias)[col]);
    if (p.d_f32)
        ((float *)p.d)[at] = p.accumulate ? ((float *)p.d)[at] + v : v;
    else
        ((bf16 *)p.d)[at] = __float2bfloat16_rn(p.accumulate ? __bfloat162float(((bf16 *)p.d)[at]) + v : v);
}

/* TA: a stored [k,m]; TB: b stored [k,n] (so that "stored with k in the rows" is the same for both). */
template <bool TA, bool TB>
__global__ void __launch_bounds__(THREADS, 2) gemm_kernel(problem p)
{
    __shared__ __align__(16) bf16 sa[2][STAGE], sb[2][STAGE];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp / 4 * 64, wn = warp % 4 * 32;
    const int64_t m0 = (int64_t)(blockIdx.x / p.tiles_n) * TM, n0 = (int64_t)(blockIdx.x % p.tiles_n) * TN, steps = (p.k + TK - 1) / TK;
    const int64_t batch = blockIdx.y;
    const operand a = {p.a + batch * p.a_stride, p.lda, p.m, p.k, p.a_wide}, b = {p.b + batch * p.b_stride, p.ldb, p.n, p.k, p.b_wide};
    float c[4][4][4] = {};
    if (steps > 0) {
        load_tile<TA>(sa[0], a, m0, 0);
        load_tile<TB>(sb[0], b, n0, 0);
    }
    commit();
    for (int64_t s = 0; s < steps; s++) {
        if (s + 1 < steps) {
            load_tile<TA>(sa[(s + 1) % 2], a, m0, (s + 1) * TK);
            load_tile<TB>(sb[(s + 1) % 2], b, n0, (s + 1) * TK);
        }
        commit();
        wait<1>();
        __syncthreads();
        multiply<TA, TB>(c, sa[s % 2], sb[s % 2], wm, wn);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                put(p, batch, m0 + wm + 16 * i + lane / 4 + e / 2 * 8, n0 + wn + 8 * j + lane % 4 * 2 + e % 2, c[i][j][e]);
}

bool wide(const void *p, int64_t ld, int64_t stride)
{
    return ((uintptr_t)p % 16 | (uintptr_t)(ld % 8) | (uintptr_t)(stride % 8)) == 0;
}

}

enum rt_status rt_cuda_gemm_mma(struct rt_queue *q, const struct rt_cuda_gemm_args *g, struct rt_err *err)
{
    const int64_t lda = g->lda > 0 ? g->lda : g->a_t ? g->m : g->k, ldb = g->ldb > 0 ? g->ldb : g->b_t ? g->k : g->n, ldd = g->ldd > 0 ? g->ldd : g->n;
    const int64_t batch = g->batch > 0 ? g->batch : 1, tiles_m = (g->m + TM - 1) / TM, tiles_n = (g->n + TN - 1) / TN;
    problem p = {(const bf16 *)g->a, (const bf16 *)g->b, g->d, g->bias, g->m, g->n, g->k, lda, ldb, ldd, g->a_stride, g->b_stride, g->d_stride,
                 (unsigned)tiles_n, g->accumulate, g->d_f32, g->bias_f32, false, false};
    if (tiles_m * tiles_n > INT32_MAX || batch > 65535)
        return rt_fail(err, RT_UNSUPPORTED, "a product of %ld x %ld x %ld, %ld times, without cuBLASLt", (long)g->m, (long)g->n, (long)g->k,
                       (long)batch);
    p.a_wide = wide(g->a, lda, batch > 1 ? g->a_stride : 0);
    p.b_wide = wide(g->b, ldb, batch > 1 ? g->b_stride : 0);
    const dim3 grid((unsigned)(tiles_m * tiles_n), (unsigned)batch);
    if (g->a_t && !g->b_t)
        gemm_kernel<true, true><<<grid, THREADS, 0, q->stream>>>(p);
    else if (g->a_t)
        gemm_kernel<true, false><<<grid, THREADS, 0, q->stream>>>(p);
    else if (!g->b_t)
        gemm_kernel<false, true><<<grid, THREADS, 0, q->stream>>>(p);
    else
        gemm_kernel<false, false><<<grid, THREADS, 0, q->stream>>>(p);
    return rt_cuda_launched("gemm", err);
}
