/* The losses of the head: one kernel over rows of logits, called by core/cuda/head_loss.c tile by tile. */
#ifndef RT_CORE_CUDA_LOSS_H
#define RT_CORE_CUDA_LOSS_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Logits z of rows [row0, row0 + rows): row i of the tile at z + i * ldz, ldz a multiple of 8, z 16-byte aligned; of type F32, F16 or BF16. Elements V ..
 * ldz-1 of a row are never used. z is overwritten. dz NULL: no gradient; else [rows] rows of BF16 at distance ldz, dL/dz = ; it may be z itself
 * where z has two bytes an element. Likelihoods take F32 alone. */
struct rt_cuda_logits {
    void *z, *dz;
    int64_t ldz, row0, rows;
    enum rt_dtype type;
    int threads; /* of a row, by one block: 512 or 1024; 0: as it is best */
};

/* Outputs of the rows and dz, as the contract of head_loss says. k up to RT_CUDA_LOSS_IDS. */
enum { RT_CUDA_LOSS_IDS = 4096 };
enum rt_status rt_cuda_loss_rows(struct rt_queue *q, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t, struct rt_err *err);
enum rt_status rt_cuda_likelihood_rows(struct rt_queue *q, const struct rt_head_likelihood_args *a, const struct rt_cuda_logits *t, struct rt_err *err);

/* dw [n] BF16 += sum [n], rounded once. */
enum rt_status rt_cuda_add_f32(struct rt_queue *q, const float *sum, void *dw, int64_t n, struct rt_err *err);

/* out [n] FP16 = x [n] BF16, saturated. */
enum rt_status rt_cuda_bf16_to_f16(struct rt_queue *q, const void *x, void *out, int64_t n, struct rt_err *err);

/* head_loss with logits rounded to F32, F16 (UNSUPPORTED without cuBLASLt) or BF16 before anything is made of them: for tests and measurements. */
enum rt_status rt_cuda_head_loss_as(struct rt_dev *dev, struct rt_queue *q, const struct rt_head_loss_args *a, enum rt_dtype logits, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
