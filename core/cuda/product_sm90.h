/* Products of gemm.h by a kernel of our own on compute capability 9.0: sums in one pass over k, rounded once; += rounds the product, then the sum. Results are
 * those of equal arguments, whatever ran before. */
#ifndef RT_CORE_CUDA_PRODUCT_SM90_H
#define RT_CORE_CUDA_PRODUCT_SM90_H

#include "core/cuda/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The device has these instructions, and g is what the kernel does: BF16 (or FP16: a plain, b_t, no +=), no bias, nothing to add, no batch, not both
 * transposed, no float32 result; rows 16-byte aligned. Any m, n, k. */
bool rt_cuda_product_sm90_fits(const struct rt_dev *dev, const struct rt_cuda_gemm_args *g);
/* For arguments that fit. */
enum rt_status rt_cuda_product_sm90(struct rt_queue *q, const struct rt_cuda_gemm_args *g, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
