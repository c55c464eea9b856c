/* Products of few rows with many weights, as generation needs them: bound by reading each weight once.
 *
 * Weights are the first operand of mma.sync (16 of their rows), tokens the second (8 at a time), so that 8 tokens cost no more than one.
 * E4M3 weights are read as they are and become BF16 (FP16 where the operand is e4m3 too) in registers, without rounding; scales are applied to
 * the float32 sums of each 128 columns. The order of every sum depends on the shape of the weight alone, not on the number of rows: results are
 * row_exact whatever n is.
 *
 * linear_fwd and moe_ffn ask `fits` and hand the whole call over where it says yes.
 */
#ifndef RT_CORE_CUDA_SKINNY_H
#define RT_CORE_CUDA_SKINNY_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows of one weight up to which these products are asked for: BF16 weights and e4m3 operands; act operands of E4M3 weights, which would have to be
 * dequantised otherwise; and in the mean over experts, whose weights are read by one launch. On an H100 an E4M3 weight of 7168 x 16384 takes
 * 56 us for 1 row, 60 us for 16 and 115 us for 64. */
enum { RT_CUDA_SKINNY_ROWS = 32, RT_CUDA_SKINNY_ROWS_W8A16 = 128, RT_CUDA_SKINNY_ROWS_EXPERTS = 64 };

/* Few enough rows, and types, strides and alignments that the kernels take (16-byte rows). */
bool rt_cuda_skinny_linear_fits(const struct rt_linear_fwd_args *a);
/* Also says yes where experts have few rows in the mean; those of many rows are cut. */
bool rt_cuda_skinny_moe_fits(const struct rt_moe_ffn_args *a);

/* linear_fwd and moe_ffn whole (core/backend.h), for arguments that fit. */
enum rt_status rt_cuda_skinny_linear(struct rt_dev *dev, struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err);
enum rt_status rt_cuda_skinny_moe(struct rt_dev *dev, struct rt_queue *q, const struct rt_moe_ffn_args *a, struct rt_err *err);

/* Compute capability 9.0 (skinny_sm90.cu): linear_fwd of up to so many rows with a BF16 weight, row_exact calls alone, since the weight is read while what
 * was enqueued before still runs. */
enum { RT_CUDA_SKINNY_ROWS_HOPPER = 64 };
bool rt_cuda_skinny_hopper_fits(const struct rt_dev *dev, const struct rt_linear_fwd_args *a);
enum rt_status rt_cuda_skinny_hopper(struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err);
/* The same product [n, N], gate before up, and of it y [n, N/2] = silu(gate) up of the float32 sums. accumulate false. */
enum rt_status rt_cuda_skinny_hopper_gated(struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err);
/* Or of it what rope_put makes: put->qkv and a->y are not used. Heads of 64 or 128 elements without norms. */
bool rt_cuda_skinny_hopper_heads_fit(const struct rt_dev *dev, const struct rt_linear_fwd_args *a, const struct rt_rope_put_args *put);
enum rt_status rt_cuda_skinny_hopper_heads(struct rt_queue *q, const struct rt_linear_fwd_args *a, const struct rt_rope_put_args *put, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
