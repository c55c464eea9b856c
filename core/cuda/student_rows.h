/* Sums of columns, for gradients of norms and biases. Internal to core/cuda. */
#ifndef RT_CORE_CUDA_STUDENT_ROWS_H
#define RT_CORE_CUDA_STUDENT_ROWS_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* dw [cols] BF16 +=, or = with `first`, sum over the rows of part [rows, cols], in float32 and fixed order, rounded once. */
enum rt_status rt_cuda_add_columns(struct rt_queue *q, const float *part, int rows, int64_t cols, void *dw, bool first, struct rt_err *err);

/* Rows that a block adds up of n rows whose columns take `across` blocks: of the shape alone, about a thousand blocks, 64 rows at least. */
static inline int64_t rt_cuda_sum_rows(int64_t n, int64_t across)
{
    const int64_t rows = (n * across + 1023) / 1024;
    return rows < 64 ? 64 : rows;
}

/* out[j] +=, or = with `first`, sum over i of x[i,j]; x [n,N] BF16 with row distance ldx, out BF16. Rows are added in a fixed order. */
enum rt_status rt_cuda_column_sums(struct rt_queue *q, const void *x, int64_t ldx, int64_t n, int64_t N, void *out, bool first, struct rt_err *err);

/* headnorm_rope_bwd without norms, with db, in one pass over the rows. For n > 0 rows and arguments that fit: heads of 16, 32, .. 256 elements, addresses and
 * distances of 16 bytes, whole heads in db and in dx's rows. */
bool rt_cuda_turn_sums_fits(const struct rt_headnorm_rope_bwd_args *a);
enum rt_status rt_cuda_turn_sums(struct rt_queue *q, const struct rt_headnorm_rope_bwd_args *a, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
