/* cuDNN (version 9), opened at run time: attention as graphs of its C backend interface, one plan for each shape.
 *
 * A plan is made when its shape is first met (tens of milliseconds to a second) and kept. Sequences of one length are a strided [batch, head,
 * row, element] view; others are a ragged one, whose number and greatest length are rounded up, so that few plans serve many calls.
 */
#ifndef RT_CORE_CUDA_DNN_H
#define RT_CORE_CUDA_DNN_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Arguments with all strides given, n > 0. *done says whether the call was enqueued. Not done is no error, unless `must`: then UNSUPPORTED
 * with the reason. Without `must`, calls too small to gain are left alone too. */
enum rt_status rt_cuda_dnn_attn_fwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_fwd_args *a, bool must, bool *done,
                                    struct rt_err *err);
enum rt_status rt_cuda_dnn_attn_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_bwd_args *a, bool must, bool *done,
                                    struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
