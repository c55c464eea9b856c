/* From rows to the bytes of their blocks: checks, statistics, compression, by several threads. Internal to formats/. */
#ifndef RT_FORMATS_SHARD_PACK_H
#define RT_FORMATS_SHARD_PACK_H

#include "core/pool.h"
#include "formats/shard.h"
#include "formats/shard_block.h"

/* Checks the rows (rt_rows_check), and fills everything of info but where its bytes are. */
enum rt_status rt_pack_describe(const struct rt_rows *rows, const struct rt_row_identity *id, int64_t ordinal, struct rt_seq_info *info,
                                struct rt_err *err);

/* rt_shard_sink_pack_bytes. */
uint64_t rt_pack_bytes(const struct rt_row_identity *id, int64_t longest, int threads);

struct rt_pack_place {
    int64_t seq;                 /* index into rows */
    struct rt_block_cut cut;
};
/* A packed block of sequence seq: its tokens from..to. */
struct rt_packed_block {
    int64_t seq;
    struct rt_block_cut from, to;
    bool last;                   /* of its sequence */
    struct rt_seq_info info;     /* as rt_pack_describe leaves it, where the block is its sequence's first (from.token 0) */
    struct rt_buf bytes;         /* valid until the next run */
    enum rt_status st;           /* why there are no bytes */
    struct rt_err err;
};

/* A zeroed packer is ready for use by one thread. With a pool (set before the first run; borrowed) its threads pack blocks side by side: at most
 * RT_PACK_BLOCKS, and no more of them than hold RT_BLOCK_RAW raw bytes times the threads. */
enum { RT_PACK_BLOCKS = 64 };
struct rt_packer {
    struct rt_pool *pool;
    struct rt_codec *codec;        /* [threads] */
    struct rt_packed_block *block; /* [RT_PACK_BLOCKS], the first n of them of the last run */
    int64_t n;
    const struct rt_row_identity *id; /* what the last run packed */
    const struct rt_rows *rows;
    int64_t ordinal;
    int level;
};
void rt_packer_free(struct rt_packer *p); /* zeroes *p */
/* Packs blocks of rows [n] from *at on, of which there is one at least, and moves *at behind them; rows[0] is sequence `ordinal`. What is wrong with
 * a block is said in it: those before it are good, those behind it are not to be used. NOMEM. */
enum rt_status rt_packer_run(struct rt_packer *p, int level, const struct rt_row_identity *id, const struct rt_rows *rows, int64_t n, int64_t ordinal,
                             struct rt_pack_place *at, struct rt_err *err);

#endif
