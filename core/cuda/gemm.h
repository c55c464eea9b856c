/* Products of the cuda backend: what its files call. Everything is row-major; sums are float32 and are rounded at the store (once, but for
 * cuBLASLt's +=, add and bias into BF16: it rounds the product before it adds).
 *
 * BF16 products go through cuBLASLt where it was found, else through a kernel of our own (gemm.cu). Products of e4m3 codes with block scales go
 * through cuBLASLt (12.9 or later) on compute capability 9.0; elsewhere both operands are dequantised to BF16 first. The algorithm depends on
 * shapes and alignments alone (the number of rows enters as the upper end of its bucket), so equal calls give equal bits.
 */
#ifndef RT_CORE_CUDA_GEMM_H
#define RT_CORE_CUDA_GEMM_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* d[m,n] = op(a)[m,k] op(b)[k,n] (+ bias[n]) (+ add[m,n], at d's row distance and of its type), or += with accumulate (add NULL, batch 1).
 *   a: [m,k] with row distance lda; a_t: stored as [k,m].     b: [k,n] with row distance ldb; b_t: stored as [n,k] (a weight).
 *   a, b BF16; d BF16, or float32 with d_f32; bias BF16, or float32 with bias_f32; NULL: none.
 *   f16: a, b, and d without d_f32, are FP16; no bias. The library alone does that: else UNSUPPORTED (dev->lt NULL says so beforehand).
 *   lda, ldb, ldd 0: dense. batch 0 counts as 1: `batch` products at distances *_stride (elements; bias is the same for all).
 *   k == 0: the product is 0. m, n or batch of nothing: nothing happens. 16-byte aligned operands and row distances run fastest; 2 is enough. */
struct rt_cuda_gemm_args {
    const void *a, *b, *bias, *add;
    void *d;
    int64_t m, n, k, lda, ldb, ldd;
    bool a_t, b_t, accumulate, d_f32, bias_f32, f16;
    int64_t batch, a_stride, b_stride, d_stride;
};
enum rt_status rt_cuda_gemm(struct rt_queue *q, const struct rt_cuda_gemm_args *g, struct rt_err *err);

/* y[n,N] = x w^T, or += with accumulate: x e4m3 codes [n,K] dense with scales x.scale[K/128][x_scale_ld] (x_scale_ld >= n; 0: rt_act_rows(n)),
 * w E4M3 [N,K] with its 128x128 scales, K % 128 == 0. y BF16 with row distance ldy (0: dense), or float32 with y_f32.
 *   padded: rows n .. rt_act_rows(n)-1 of x, of its scales and of y exist and may be written (in y: anything). Saves a second product where
 *   n % 4 != 0. UNSUPPORTED never comes back: what the library refuses is dequantised. */
struct rt_cuda_gemm8_args {
    struct rt_act x;
    const struct rt_weight *w;
    void *y;
    int64_t n, K, N, x_scale_ld, ldy;
    bool accumulate, y_f32, padded;
};
enum rt_status rt_cuda_gemm8(struct rt_queue *q, const struct rt_cuda_gemm8_args *g, struct rt_err *err);

/* out[i,j] = bf16(code * scale) for rows row0 .. row0+rows-1 of an E4M3 weight (float32 product, rounded once). out [rows, w->cols] dense. */
enum rt_status rt_cuda_dequant(struct rt_queue *q, const struct rt_weight *w, int64_t row0, int64_t rows, void *out, struct rt_err *err);
/* out[i,j] = bf16(code * scale) of a quantised operand [n,K], scales [K/128][scale_ld]. out dense. */
enum rt_status rt_cuda_dequant_act(struct rt_queue *q, const struct rt_act *x, int64_t scale_ld, int64_t n, int64_t K, void *out,
                                   struct rt_err *err);
/* *data = the matrix as BF16: w->data itself, or a temporary with its elements converted or dequantised; the caller gives *temp back with
 * rt_cuda_temp_free once its work is enqueued (NULL where none was needed). */
enum rt_status rt_cuda_weight_bf16(struct rt_queue *q, const struct rt_weight *w, const void **data, void **temp, struct rt_err *err);

/* SHAPE unless w is N x K, and where `quantised`, UNSUPPORTED unless w is E4M3 and K % 128 == 0. op: name for messages. */
enum rt_status rt_cuda_weight_check(const struct rt_weight *w, const char *op, int64_t N, int64_t K, bool quantised, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
