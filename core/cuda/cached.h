/* What both attentions over caches share: keys are cut at multiples of a fixed length, so that how a token's sum is cut depends on its position
 * alone; parts are merged in ascending order. */
#ifndef RT_CORE_CUDA_CACHED_H
#define RT_CORE_CUDA_CACHED_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Results of cut tokens: o float [n][splits][nh][dv], each softmax normalised by itself, and lse [n][splits][nh], the base-2 logarithm of the sum
 * of 2^(score log2 e). A token at pos has pos/length + 1 parts; with one, it is written where it belongs and has none here. */
struct rt_cached_parts {
    float *o, *lse;  /* NULL where splits is 1 */
    int splits, length;
};

/* parts.o and .lse in one block for n tokens (nothing for one split): the queue's workspace, or where that is too small a temporary one, *temp (else left alone). */
enum rt_status rt_cuda_cached_parts(struct rt_queue *q, int64_t n, int nh, int dv, struct rt_cached_parts *parts, void **temp, struct rt_err *err);
/* How many tokens at a time: so that the parts stay under a quarter of the scratch. */
int64_t rt_cuda_cached_chunk(const struct rt_dev *dev, int64_t n, int nh, int dv, int splits);
/* How many blocks share the parts of each of `rows` sums in turn: all parts have one of their own, unless there are so many rows that `waves` blocks
 * a multiprocessor are busy anyway (most parts of a large cache hold nothing, and a block that finds nothing to do costs a microsecond). */
int rt_cuda_cached_blocks(const struct rt_dev *dev, const struct rt_cached_parts *parts, int64_t rows, int waves);
/* o [n, nh*dv] BF16 = of the tokens that have parts. */
enum rt_status rt_cuda_cached_merge(struct rt_queue *q, const struct rt_cached_parts *parts, const int32_t *pos, void *o, int64_t n, int nh, int dv,
                                    struct rt_err *err);

/* Both operations for any sizes, by plain loops: a block for each token and head. A key row is [first d1 | second d2] of a row of k, a value row the
 * first dv of a row of v; rows of (slot, key) at (slot * capacity + key) * width, plus kv_head * head for heads that have their own. */
struct rt_cached_plain {
    const void *q1, *q2;              /* q1 [n, nh, d1] at distances q1_ld, q1_head; q2 likewise or NULL */
    int64_t q1_ld, q1_head, q2_ld, q2_head;
    const void *k, *v;
    int64_t capacity, width, head;
    struct rt_cache_pages pages;      /* table NULL: none */
    const int32_t *slot, *pos;
    void *o;                          /* [n, nh, dv] dense */
    int64_t n;
    int nh, nkv, d1, d2, dv;
    float scale;
};
enum rt_status rt_cuda_cached_plain(struct rt_queue *q, const struct rt_cached_plain *a, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
