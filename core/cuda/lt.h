/* cuBLASLt, opened at run time (libcublasLt.so.13 or .12). Matrices are column-major here, as the library has them; core/cuda/gemm.h turns
 * row-major products into these.
 *
 * The algorithm of a product is the first that the library's heuristic gives for its shape, with the token dimension rounded up to the end of
 * its bucket, so that it depends on shapes and alignments alone, never on what ran before. Split sums are added in float32 and in a fixed
 * order (no atomic reduction). Chosen algorithms are kept in a table; entries may be used by several threads.
 * After rt_cuda_tune (core/backend.h, tune) a large product takes the fastest of the heuristic's 8, of what won for other products and of our own
 * (product_sm90.h) instead, by the file of tune.h; the token dimension enters as the next power of two, and fewer tokens than were measured take the choice of more, so that
 * batches of mixed lengths are not measured again and again.
 */
#ifndef RT_CORE_CUDA_LT_H
#define RT_CORE_CUDA_LT_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* d[M,N] = op(a)[M,K] op(b)[K,N] + beta d, or + add (as d lies), column-major; op(a) = a^T where ta. a, b BF16, or with a_scale and b_scale e4m3: then
 * ta, not tb, a_scale [ceil(M/128)][K/128 rounded up to 4] of 128x128 blocks, b_scale [K/128][N] of runs of 128, M and N multiples of 4, everything 16-byte
 * aligned. bias [M] of d's type or NULL. bucket_n: N counts tokens; bucket_k: K does. f16: FP16 takes the place of BF16. */
struct rt_lt_call {
    const void *a, *b, *bias, *add;
    void *d;
    const float *a_scale, *b_scale;
    int64_t M, N, K, lda, ldb, ldd, batch, a_stride, b_stride, d_stride;
    bool ta, tb, accumulate, d_f32, bucket_n, bucket_k, f16;
};
/* The output may be written several times where the product is measured. *done false: the library is not there, or has no algorithm for this; nothing was enqueued. */
enum rt_status rt_cuda_lt_matmul(struct rt_queue *q, const struct rt_lt_call *c, bool *done, struct rt_err *err);

/* Can this device multiply e4m3 codes with block scales? */
bool rt_cuda_lt_block_scaled(const struct rt_dev *dev);

/* The upper end of the bucket that n > 0 lies in: eight buckets to an octave, multiples of 16. */
int64_t rt_cuda_lt_bucket(int64_t n);

#ifdef __cplusplus
}
#endif
#endif
