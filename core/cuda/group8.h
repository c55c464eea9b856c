/* Products of e4m3 codes with block-scaled e4m3 weights on compute capability 9.0: a group of experts in one launch, by the tensor cores'
 * asynchronous form (wgmma) fed by bulk tensor copies. Sums of 128 columns come from the tensor cores and are added in float32 with their scales.
 *
 * Rows lie as in moe_rows.h: expert j owns rows base[j] .. base[j+1] - 1 (multiples of 4), its codes dense [padded, K], its scales one block
 * [K/128][padded] at base[j] * (K/128) floats. One matrix alone is a group of one expert.
 */
#ifndef RT_CORE_CUDA_GROUP8_H
#define RT_CORE_CUDA_GROUP8_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_cuda_group8 {
    struct rt_act x;              /* codes and scales of all rows */
    /* gated alone: NULL, or the table of a group (moe_rows.h): x.data then holds codes of tokens, at a multiple of 16 bytes, of which row r takes
     * those of token row[r].x / k; x.scale is as ever */
    const void *row;
    int k;
    const int64_t *base;          /* [host] [n_experts + 1] */
    int n_experts;
    int64_t K, N;                 /* N: rows of each weight */
    const struct rt_weight *const *w;  /* [host] [n_experts] */
    const struct rt_weight *const *up; /* [host] [n_experts] for the gated form, else NULL */
    /* plain: y [rows, N] bf16 at row distance ldy (0: N) = x w^T, or += with accumulate */
    void *y;
    int64_t ldy, rows;            /* rows of y that exist, 0: base[n_experts] */
    bool accumulate;
    /* gated: hq = e4m3 form of bf16(silu(x w^T) * (x up^T)), codes [rows, N] and the experts' blocks of scales [N/128][padded] */
    struct rt_act hq;
    bool pow2;
};

/* What dev->encode_map is to hold: NULL where the device or the driver has no bulk tensor copies. */
void *rt_cuda_group8_driver(const struct rt_dev *dev);
/* The device has these instructions, and K and N suit them: K a multiple of 128, N one of 256 (gated: 128). */
bool rt_cuda_group8_fits(const struct rt_dev *dev, int64_t K, int64_t N, bool gated);
/* For arguments that fit. */
enum rt_status rt_cuda_group8(struct rt_queue *q, const struct rt_cuda_group8 *g, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
