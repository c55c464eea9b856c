/* Conversions between element types on the device. */
#ifndef RT_CORE_CUDA_CONVERT_H
#define RT_CORE_CUDA_CONVERT_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* dst[i] = src[i] rounded to nearest even, n elements; from F32, F16, BF16 to F32 or BF16. */
enum rt_status rt_cuda_convert_dtype(struct rt_queue *q, const void *src, enum rt_dtype from, void *dst, enum rt_dtype to, int64_t n,
                                     struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
