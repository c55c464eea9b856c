/* Memory of retargeting: how large a window of the input and a shard of the output may be.
 *
 * A shard is held until its report is known, which stands in its header. It ends with the sequence that brings it to rows_per_shard rows,
 * or to shard_bytes in memory, whichever is first, so that sequences with few rows or none cannot grow it without end.
 *   needed = resident + index + shard_bytes + 4 window_bytes + 2 largest for each thread
 * (a window as it was read, what is made of it in buffers that double, and what is packed of a shard at a time; a sequence that a thread
 * decodes and its compressed bytes).
 */
#ifndef RT_DISTILL_RETARGET_PLAN_H
#define RT_DISTILL_RETARGET_PLAN_H

#include "formats/shard.h"

struct rt_retarget_plan {
    int64_t rows_per_shard, shard_bytes, window_bytes;
    int64_t resident;     /* of the process when it was planned: tokenizers, the map of vocabularies, the input's index */
    int64_t largest;      /* bytes of the largest sequence of the input */
    int64_t needed;
};

/* Bytes of a sequence in memory, an upper bound of its arrays: tokens, text (as long as text_len says), rows, states. */
int64_t rt_retarget_seq_bytes(const struct rt_row_identity *id, int64_t n_tokens, int64_t text_len, int64_t n_rows);

/* in: the input; made: identity of the output. rows_per_shard 0: that of the set in `dir`, where one was begun, else RT_SHARD_ROWS, fewer where
 * rows and states are so wide that they would take more than 256 MiB, or a quarter of memory. memory: bytes to stay within. NOMEM: what is
 * needed, of what it is made, and which rows_per_shard would do where one would. */
enum rt_status rt_retarget_plan(const struct rt_shard_set *in, const struct rt_row_identity *made, const char *dir, int64_t rows_per_shard, int64_t memory,
                                int threads, struct rt_retarget_plan *out, struct rt_err *err);

#endif
