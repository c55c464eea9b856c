/* Sums of columns, for gradients of norms and biases. */
#ifndef RT_CORE_CUDA_STUDENT_ROWS_H
#define RT_CORE_CUDA_STUDENT_ROWS_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* dw [cols] BF16 +=, or = with `first`, sum over the rows of part [rows, cols], in float32 and fixed order, rounded once. */
enum rt_status rt_cuda_add_columns(struct rt_queue *q, const float *part, int rows, int64_t cols, void *dw, bool first, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
