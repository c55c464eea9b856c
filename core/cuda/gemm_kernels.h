/* Kernels around products. Only gemm.c, linear.c, moe.c and head.c call these; core/cuda/gemm.h is the interface. */
#ifndef RT_CORE_CUDA_GEMM_KERNELS_H
#define RT_CORE_CUDA_GEMM_KERNELS_H

#include "core/cuda/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The product of gemm.h by mma.sync: any shape, stride and alignment; each element is one sum over k in ascending blocks of 16. */
enum rt_status rt_cuda_gemm_mma(struct rt_queue *q, const struct rt_cuda_gemm_args *g, struct rt_err *err);

/* dst[b*ld_dst + r] = src[b*ld_src + r] for r < rows, 0 for rows <= r < ld_dst; b < blocks. */
enum rt_status rt_cuda_copy_scales(struct rt_queue *q, const float *src, int64_t ld_src, float *dst, int64_t ld_dst, int64_t rows, int64_t blocks,
                                   struct rt_err *err);
/* y[i,j] = bias[j], or += with accumulate; y [n,N] with row distance ldy, BF16 or float32; bias BF16 or float32. */
enum rt_status rt_cuda_fill_bias(struct rt_queue *q, void *y, bool y_f32, int64_t ldy, int64_t n, int64_t N, const void *bias, bool bias_f32,
                                 bool accumulate, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
