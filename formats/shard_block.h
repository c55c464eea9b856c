/* Blocks: the tokens [token0, token0 + tokens) of one sequence and the rows at their positions, column by column. */
#ifndef RT_FORMATS_SHARD_BLOCK_H
#define RT_FORMATS_SHARD_BLOCK_H

#include "formats/rows.h"
#include "formats/shard_codec.h"

enum { RT_BLOCK_COLUMNS = 11 + 2 * RT_MAX_FEATURES + 3 };

/* Raw bytes of a token (text left out) and of a row. */
uint64_t rt_block_token_bytes(const struct rt_row_identity *id);
uint64_t rt_block_row_bytes(const struct rt_row_identity *id);

struct rt_block_cut {
    int64_t token, row; /* where a block starts or ends */
};
/* *to = the end of the block that starts at from: as many tokens as fit in RT_BLOCK_RAW. USAGE where one token does not. */
enum rt_status rt_block_next(const struct rt_rows *rows, const struct rt_row_identity *id, struct rt_block_cut from,
                             struct rt_block_cut *to, struct rt_err *err);
enum rt_status rt_block_pack(struct rt_codec *c, int level, const struct rt_rows *rows, const struct rt_row_identity *id,
                             int64_t ordinal, struct rt_block_cut from, struct rt_block_cut to, struct rt_pack *out,
                             struct rt_err *err);

/* A decoded sequence; its buffers are used again for the next. */
struct rt_block_store {
    struct rt_codec codec;
    struct rt_buf column[RT_BLOCK_COLUMNS];
};
void rt_block_store_free(struct rt_block_store *s);
/* data [n]: all blocks of sequence `ordinal`, which has n_tokens tokens and n_rows rows (their memory is justified by n: the
 * caller has checked). Fills *out, key, occurrence and source_line left out. */
enum rt_status rt_block_unpack(struct rt_block_store *s, const struct rt_row_identity *id, int64_t ordinal, int64_t n_tokens,
                               int64_t n_rows, const void *data, size_t n, const char *path, uint64_t offset, struct rt_rows *out,
                               struct rt_err *err);

#endif
