/* Attention on the GPU, internal: the paths behind rt_cuda_attn_fwd and rt_cuda_attn_bwd (attn.c), each with the whole contract of
 * core/backend.h or an UNSUPPORTED that says why.
 *
 *   own     kernels of this backend (attn_fwd.cu, attn_bwd.cu): shapes up to 256 elements a head, any strides; the base.
 *   hopper  those for compute capability 9.0 (attn_fwd_sm90.cu, attn_bwd_sm90.cu): up to 192/128 elements a head forward, 128 backward; aligned rows.
 *   cudnn   graphs of cuDNN (dnn.h): for GPUs and shapes that the former leave.
 */
#ifndef RT_CORE_CUDA_ATTN_H
#define RT_CORE_CUDA_ATTN_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_CUDA_ATTN_INLINE = 256 }; /* sequences that travel with the launch itself */

/* The sequences of a call as its kernels read them: cu [n_seq + 1], and tile [n_seq + 1]: how many tiles of a given number of rows the
 * sequences before each one have. In the launch's own parameters, or behind `dev` (cu, then tile) where there are many. */
struct rt_cuda_seqs {
    int32_t n_seq;
    const int32_t *dev;
    int32_t held[2 * (RT_CUDA_ATTN_INLINE + 1)];
};
/* Fills s for tiles of `rows` rows; *n_tile their number. What s->dev points at is freed with rt_cuda_temp_free. */
enum rt_status rt_cuda_seqs_make(struct rt_queue *q, const struct rt_attn_shape *shape, int rows, struct rt_cuda_seqs *s, int64_t *n_tile,
                                 struct rt_err *err);

/* k [n, nkv, dqk] dense = the keys of a forward that gives them in two parts (rope.cu). All strides given. */
enum rt_status rt_cuda_attn_keys(struct rt_queue *q, const struct rt_attn_fwd_args *a, void *k, struct rt_err *err);

/* SHAPE unless heads divide and the sequences lie from 0 to n; UNSUPPORTED where scale <= 0. Fills strides given as 0. */
enum rt_status rt_cuda_attn_check(const struct rt_attn_shape *s, const char *op, struct rt_err *err);
void rt_cuda_attn_dense(const struct rt_attn_shape *s, int64_t *q_ld, int64_t *q_head, int64_t *k_ld, int64_t *k_head, int64_t *v_ld,
                        int64_t *v_head);

/* Arguments with all strides given and checked; own and cudnn: keys in one part, queries rotated, no codes (attn.c gives them what they need). shared: bytes of shared memory that a block may take; UNSUPPORTED where a shape needs more. */
enum rt_status rt_cuda_attn_fwd_own(struct rt_queue *q, const struct rt_attn_fwd_args *a, int shared, struct rt_err *err);
enum rt_status rt_cuda_attn_bwd_own(struct rt_queue *q, const struct rt_attn_bwd_args *a, int shared, struct rt_err *err);
/* The kernels for compute capability 9.0; *done false where the device or the shape is another. */
enum rt_status rt_cuda_attn_fwd_hopper(struct rt_queue *q, const struct rt_attn_fwd_args *a, bool *done, struct rt_err *err);
enum rt_status rt_cuda_attn_bwd_hopper(struct rt_queue *q, const struct rt_attn_bwd_args *a, bool *done, struct rt_err *err);

/* Log-sum-exps of `heads` heads and n rows between the caller's array, heads lse_ld apart, and cuDNN's layout: [n / rows, heads, rows] for
 * sequences of `rows` rows, or [n, heads] with rows 0. */
struct rt_cuda_stats {
    float *lse, *packed;
    int64_t lse_ld, n, rows;
    int heads;
    bool to_lse;
};
enum rt_status rt_cuda_attn_stats(struct rt_queue *q, const struct rt_cuda_stats *s, struct rt_err *err);

/* One path for a call, UNSUPPORTED where it has not got the shape; AUTO is what rt_cuda_attn_* take. Tests and measurements name one. SMALL: the
 * own kernels as on a GPU whose blocks have 99 KiB of shared memory (compute capability 8.6, 8.9, 12.0). */
enum rt_cuda_attn_path { RT_CUDA_ATTN_AUTO, RT_CUDA_ATTN_OWN, RT_CUDA_ATTN_HOPPER, RT_CUDA_ATTN_CUDNN, RT_CUDA_ATTN_SMALL };
enum rt_status rt_cuda_attn_fwd_by(enum rt_cuda_attn_path path, struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_fwd_args *a,
                                   struct rt_err *err);
enum rt_status rt_cuda_attn_bwd_by(enum rt_cuda_attn_path path, struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_bwd_args *a,
                                   struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
