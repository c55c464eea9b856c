/* The row kernel of head_loss for logits of two bytes, on compute capability 9.0: a cluster of blocks holds a row in shared memory, so that it is read
 * once and written once. */
#ifndef RT_CORE_CUDA_LOSS_CLUSTER_H
#define RT_CORE_CUDA_LOSS_CLUSTER_H

#include "core/cuda/loss.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Logits of F16 or BF16 with a gradient, rows that eight blocks can hold. */
bool rt_cuda_loss_cluster_fits(const struct rt_dev *dev, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t);
/* As rt_cuda_loss_rows. */
enum rt_status rt_cuda_loss_cluster(struct rt_queue *q, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
