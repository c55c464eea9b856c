/* Rows of a group of experts: gathered from the tokens, gated, and added back. What moe_ffn puts around its products.
 *
 * A group is a list of experts whose runs of the sorted rows are contiguous: expert j has the rows perm[offset[j]] .. perm[offset[j+1] - 1]
 * (backend.h, moe_ffn). A group may begin or end inside an expert's run: its offsets then do. In the group's matrices expert j occupies
 *     padded(j) = count(j) rounded up to a multiple of `pad` rows, from row base[j] = padded(0) + .. + padded(j-1),
 * so that each expert is a matrix of its own: its codes at base[j] * cols bytes, and its scales as one block [cols/128][padded(j)] at
 * base[j] * (cols/128) floats. Rows behind count(j) are padding: codes, scales and elements 0. An empty expert has no rows.
 *
 * Each call enqueues on q and returns. The group's memory is of q's stream: use it on another stream only between events, and release it
 * on q after that stream's work.
 */
#ifndef RT_CORE_CUDA_MOE_ROWS_H
#define RT_CORE_CUDA_MOE_ROWS_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_CUDA_MOE_MAX_K = 32 }; /* experts of one token at most */

struct rt_cuda_moe_group {
    int64_t rows;     /* of the group's matrices, padding included; below 2^31 */
    int64_t n;        /* tokens */
    int k;
    void *row;        /* device, one of {flat index t*k+j or -1 for padding, base, padded, 0} of 4 int32 for each row */
    int32_t *inverse; /* device [n*k]: row of flat index t*k+j, or -1 outside the group; NULL where it was not asked for */
};

/* base [n_experts + 1] (may be NULL) as above, base[n_experts] = the group's rows, which is also the answer. */
int64_t rt_cuda_moe_place(const int32_t *offset, int n_experts, int pad, int64_t *base);
/* Device bytes that a group of `rows` rows over n tokens takes; those of its matrices are the caller's. */
size_t rt_cuda_moe_group_bytes(int64_t rows, int64_t n, int k, bool with_inverse);

/* Makes the group's tables with rt_cuda_temp. perm [n*k] is on the device, offset [n_experts + 1] on the host (read before the call returns);
 * pad: a multiple of 4. with_inverse: combine needs it (n * k * 4 bytes). UNSUPPORTED: k above RT_CUDA_MOE_MAX_K. */
enum rt_status rt_cuda_moe_group_make(struct rt_queue *q, const int32_t *perm, const int32_t *offset, int n_experts, int pad, int64_t n, int k,
                                      bool with_inverse, struct rt_cuda_moe_group *out, struct rt_err *err);
void rt_cuda_moe_group_release(struct rt_queue *q, struct rt_cuda_moe_group *g); /* a zeroed one is fine */

/* xg = rows of x, token = flat/k. x.scale given: codes [n, H] and scales [H/128][rt_act_rows(n)] to codes [rows, H] and the experts' blocks of
 * scales, or with xg.data NULL scales alone; H a multiple of 128. Else bf16 [n, H] to [rows, H], xg.scale unused; H a multiple of 8. */
enum rt_status rt_cuda_moe_gather(struct rt_queue *q, const struct rt_cuda_moe_group *g, struct rt_act x, struct rt_act xg, int H,
                                  struct rt_err *err);

/* h = silu(gate) * up; gate and up are bf16 [rows, I] at row distance ld (0: I). h.scale given: codes [rows, I] of the bf16-rounded h and the
 * experts' blocks of scales [I/128][padded], I a multiple of 128. Else bf16 [rows, I] dense, I a multiple of 8. ld is a multiple of 8; gate,
 * up and h lie at multiples of 16 bytes. Padding rows are written without reading gate and up. */
enum rt_status rt_cuda_moe_swiglu(struct rt_queue *q, const struct rt_cuda_moe_group *g, const void *gate, const void *up, int64_t ld,
                                  struct rt_act h, int I, bool pow2, struct rt_err *err);

/* y[t,:] += sum over the token's rows r in the group, in ascending order (ascending expert), of weight[t*k+j] * out[r,:]: products and sums
 * float32 beginning with y[t,:], rounded once. y [n, H] and out [rows, H] bf16 dense, weight [n*k] on the device; H a multiple of 8. Tokens
 * without a row in the group are not touched. The group must have its inverse. */
enum rt_status rt_cuda_moe_combine(struct rt_queue *q, const struct rt_cuda_moe_group *g, const void *out, const float *weight, void *y, int H,
                                   struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
