/* The own backward's kernels for compute capability 9.0. */
#ifndef RT_CORE_CUDA_ATTN_BWD_H
#define RT_CORE_CUDA_ATTN_BWD_H

#include <cuda_bf16.h>

#include "core/cuda/cuda.h"

struct rt_cuda_attn_grads {
    __nv_bfloat16 *dq, *dk, *dv;
    int64_t q_ld, q_head, k_ld, k_head, v_ld, v_head;
};

/* Has the device these kernels, and do they take the call: up to 128 elements a head, rows aligned for bulk copies? */
bool rt_cuda_attn_bwd_sm90_fits(const struct rt_dev *dev, const struct rt_attn_bwd_args *a);
/* dq, dk, dv. a->delta is filled; lse2 [nh, n] = lse / ln 2. */
enum rt_status rt_cuda_attn_bwd_sm90(struct rt_queue *q, const struct rt_attn_bwd_args *a, const float *lse2, struct rt_err *err);

#endif
