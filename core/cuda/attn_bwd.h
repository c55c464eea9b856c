/* The backward of attention for compute capability 9.0, internal: what its kernels (attn_bwd_sm90.cu) and those before and after them
 * (attn_bwd_sides.cu) share.
 *
 *   before   delta = rowsum(dO * O) and lse / ln 2, in rows padded to the tiles; the list of the work; counters
 *   main     a block for 128 keys of a query head: dK and dV of that head, and what these keys add to dQ
 *   after    dK and dV summed over the query heads of each key head
 *
 * Sums of dQ are float32 in device memory, 64 rows x 64 columns at a time as a product leaves them in registers ("part"): element e of float4 j of
 * thread t is row 16 (t / 32) + t % 32 / 4 + 8 (e / 2), column 8 j + 2 (t % 4) + e % 2, at (128 j + t) * 4 + e. A key block adds to a part after all
 * key blocks before it have, and the last one (of the same rows) rounds the sum: the order is fixed, and so are the bytes.
 *
 * dK and dV of a query head travel to the kernel after in BF16, as registers hold them, too: 64 keys x D a warpgroup, element e of 16-byte word v of
 * thread t is row 16 (t / 32) + t % 32 / 4 + 8 (e / 2 % 2), column 16 v + 8 (e / 4) + 2 (t % 4) + e % 2, at (128 v + t) * 8 + e.
 */
#ifndef RT_CORE_CUDA_ATTN_BWD_H
#define RT_CORE_CUDA_ATTN_BWD_H

#include <cuda_bf16.h>

#include "core/cuda/attn.h"

enum { RT_ATTN_BWD_ROWS = 128, RT_ATTN_BWD_PART = 64 * 64 }; /* keys of a block; elements of a part */

/* The work of a block: keys row .. row + 127 of a sequence, against the queries of a head from there on. */
struct rt_attn_bwd_item {
    int32_t first, len, row; /* the sequence's first row, its length */
    int32_t tile;            /* number of the sequence's first tile */
    int32_t head;            /* query head; -1: no more work */
    int32_t unused[3];
};

/* A call, or those of its heads that go together. D: elements of a head as the kernels have them, 64 or 128. */
struct rt_attn_bwd_call {
    int64_t n;
    int n_tile, nh, nkv, group, dqk, dv, D;
    float scale;
    const __nv_bfloat16 *q, *k, *v, *o, *dout;     /* o, dout: rows o_ld apart, heads dv */
    const float *lse;                              /* [nh, n] */
    __nv_bfloat16 *dq, *dk, *dv_out;
    int64_t q_ld, q_head, k_ld, k_head, v_ld, v_head, o_ld;
    /* scratch; rows: 128 n_tile */
    float *lse2, *delta, *sums;                    /* [nh, rows], [nh, rows], [nh, rows, D] in parts; lse2 of rows beyond a sequence is inf */
    int32_t *added, *ticket;                       /* [nh, rows D / PART]: key blocks that have added to a part; [1] */
    struct rt_attn_bwd_item *items;                /* [n_tile * nh] in the order in which blocks take them */
    uint4 *dk_head, *dv_head;                      /* [nh, rows, D] BF16, 64 rows at a time as above */
    /* The order: sequences that begin within `window` rows go together, `heads` heads at a time, so that what their blocks share stays in L2;
     * of those, first key blocks first: the longest. */
    int window, heads;
};

/* dq, dk_head and dv_head. After the kernel before. */
enum rt_status rt_cuda_attn_bwd_main(struct rt_queue *q, const struct rt_attn_bwd_call *c, struct rt_err *err);

#endif
