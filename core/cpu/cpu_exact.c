/* Exact products: each element is summed in an order that depends on K alone, so a row's result is the same whoever shares the
 * call. Blocks of 4 x 4 results in registers; the block's shape changes which sums run side by side, never a sum.
 *
 *   nt: 16 lanes over K, added in a fixed tree; K in runs of KRUN, run after run.
 *   nn: one chain over k for each element.
 */
#include "core/cpu/cpu.h"
#include "core/cpu/simd.h"

enum { KRUN = 2048 }; /* 4 rows of b of this length stay in the first cache */

RT_INLINE void dot_block(const int mr, const int nr, int64_t k, const float *restrict a, int64_t lda, const float *restrict b,
                         int64_t ldb, bool accumulate, float *restrict c, int64_t ldc)
{
    rt_v16 acc[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nr; j++)
            acc[i][j] = (rt_v16){0};
    int64_t p = 0;
    for (; p + 16 <= k; p += 16) {
        rt_v16 y[4];
#pragma GCC unroll 4
        for (int j = 0; j < nr; j++)
            y[j] = rt_v16_load(b + j * ldb + p);
#pragma GCC unroll 4
        for (int i = 0; i < mr; i++) {
            const rt_v16 x = rt_v16_load(a + i * lda + p);
#pragma GCC unroll 4
            for (int j = 0; j < nr; j++)
                acc[i][j] += x * y[j];
        }
    }
    if (p < k)
        for (int i = 0; i < mr; i++)
            for (int j = 0; j < nr; j++)
                acc[i][j] += rt_v16_load_n(a + i * lda + p, k - p) * rt_v16_load_n(b + j * ldb + p, k - p);
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nr; j++) {
            const float s = rt_v16_sum(&acc[i][j]);
            c[i * ldc + j] = accumulate ? c[i * ldc + j] + s : s;
        }
}

RT_SIMD static void nt_run(int64_t m, int64_t n, int64_t k, const float *restrict a, int64_t lda, const float *restrict b, int64_t ldb,
                           bool accumulate, float *restrict c, int64_t ldc)
{
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        int64_t i = 0;
        for (; i + 4 <= m; i += 4)
            dot_block(4, 4, k, a + i * lda, lda, b + j * ldb, ldb, accumulate, c + i * ldc + j, ldc);
        for (; i < m; i++)
            dot_block(1, 4, k, a + i * lda, lda, b + j * ldb, ldb, accumulate, c + i * ldc + j, ldc);
    }
    for (; j < n; j++) {
        int64_t i = 0;
        for (; i + 4 <= m; i += 4)
            dot_block(4, 1, k, a + i * lda, lda, b + j * ldb, ldb, accumulate, c + i * ldc + j, ldc);
        for (; i < m; i++)
            dot_block(1, 1, k, a + i * lda, lda, b + j * ldb, ldb, accumulate, c + i * ldc + j, ldc);
    }
}

void rt_cpu_exact_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, bool accumulate,
                     float *c, int64_t ldc)
{
    for (int64_t p = 0; p == 0 || p < k; p += KRUN)
        nt_run(m, n, rt_min64(KRUN, k - p), a + p, lda, b + p, ldb, accumulate || p > 0, c, ldc);
}

/* nr vectors of 16 columns; the last holds `last` columns. */
RT_INLINE void chain_block(const int mr, const int nr, const int last, int64_t k, const float *restrict a, int64_t lda,
                           const float *restrict b, int64_t ldb, bool accumulate, float *restrict c, int64_t ldc)
{
    rt_v16 acc[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nr; j++) {
            const float *at = c + i * ldc + j * 16;
            acc[i][j] = !accumulate ? (rt_v16){0} : last == 16 ? rt_v16_load(at) : rt_v16_load_n(at, last);
        }
    for (int64_t p = 0; p < k; p++) {
        rt_v16 y[4];
#pragma GCC unroll 4
        for (int j = 0; j < nr; j++)
            y[j] = last == 16 ? rt_v16_load(b + p * ldb + j * 16) : rt_v16_load_n(b + p * ldb + j * 16, last);
#pragma GCC unroll 4
        for (int i = 0; i < mr; i++) {
            const float x = a[i * lda + p];
#pragma GCC unroll 4
            for (int j = 0; j < nr; j++)
                acc[i][j] += x * y[j];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nr; j++) {
            if (last == 16)
                rt_v16_store(c + i * ldc + j * 16, &acc[i][j]);
            else
                memcpy(c + i * ldc + j * 16, &acc[i][j], (size_t)last * sizeof *c);
        }
}

RT_SIMD static void nn_rows(int64_t m, int64_t n, int64_t k, const float *restrict a, int64_t lda, const float *restrict b,
                            int64_t ldb, bool accumulate, float *restrict c, int64_t ldc)
{
    for (int64_t j = 0; j < n;) {
        const int64_t left = n - j, step = left >= 64 ? 64 : left >= 16 ? 16 : left;
        int64_t i = 0;
        for (; i < m;) {
            const float *x = a + i * lda, *y = b + j;
            float *z = c + i * ldc + j;
            if (i + 4 <= m) {
                if (step == 64)
                    chain_block(4, 4, 16, k, x, lda, y, ldb, accumulate, z, ldc);
                else if (step == 16)
                    chain_block(4, 1, 16, k, x, lda, y, ldb, accumulate, z, ldc);
                else
                    chain_block(4, 1, (int)step, k, x, lda, y, ldb, accumulate, z, ldc);
                i += 4;
                continue;
            }
            if (step == 64)
                chain_block(1, 4, 16, k, x, lda, y, ldb, accumulate, z, ldc);
            else if (step == 16)
                chain_block(1, 1, 16, k, x, lda, y, ldb, accumulate, z, ldc);
            else
                chain_block(1, 1, (int)step, k, x, lda, y, ldb, accumulate, z, ldc);
            i++;
        }
        j += step;
    }
}

void rt_cpu_exact_nn(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, bool accumulate,
                     float *c, int64_t ldc)
{
    nn_rows(m, n, k, a, lda, b, ldb, accumulate, c, ldc);
}
