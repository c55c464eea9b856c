#include "formats/shard_pack.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ZLIB_BYTES = 1 << 20 }; /* more than what deflate holds a stream: 0.4 MiB */

/* Means over the rows: of the stored mass at each T, and of -log p of the realised tokens. */
static void statistics(const struct rt_rows *r, const struct rt_row_identity *id, struct rt_seq_info *out)
{
    double mass[RT_MAX_LSE] = {0}, nll = 0;
    for (int64_t i = 0; i < r->n_rows; i++) {
        nll -= (double)r->next_logprob[i];
        for (int t = 0; t < r->n_lse; t++)
            for (int j = 0; j < r->k; j++)
                mass[t] += exp(r->topk_logits[i * r->k + j] / id->lse_temperature[t] - r->lse[i * r->n_lse + t]);
    }
    for (int t = 0; t < r->n_lse; t++)
        out->mass[t] = r->n_rows > 0 ? (float)(mass[t] / (double)r->n_rows) : 0;
    out->nll = r->n_rows > 0 ? (float)(nll / (double)r->n_rows) : 0;
}

enum rt_status rt_pack_describe(const struct rt_rows *rows, const struct rt_row_identity *id, int64_t ordinal, struct rt_seq_info *info,
                                struct rt_err *err)
{
    enum rt_status st;
    char where[64];
    *info = (struct rt_seq_info){.ordinal = ordinal, .occurrence = rows->occurrence, .source_line = rows->source_line > 0 ? rows->source_line : 0,
                                 .n_tokens = rows->n_tokens, .n_rows = rows->n_rows};
    snprintf(where, sizeof where, "sequence %" PRId64 " (input line %" PRId64 ")", ordinal, rows->source_line);
    RT_TRY(rt_rows_check(rows, id, where, err));
    memcpy(info->key, rows->key, sizeof info->key);
    statistics(rows, id, info);
out:
    return st;
}

void rt_packer_free(struct rt_packer *p)
{
    for (int i = 0; p->codec != NULL && i < (p->pool != NULL ? rt_pool_threads(p->pool) : 1); i++)
        rt_codec_free(&p->codec[i]);
    for (int i = 0; p->block != NULL && i < RT_PACK_BLOCKS; i++)
        rt_buf_free(&p->block[i].bytes);
    rt_free(p->codec);
    rt_free(p->block);
    *p = (struct rt_packer){0};
}

/* Raw bytes of a block, its text left out. */
static uint64_t raw_bytes(const struct rt_row_identity *id, struct rt_block_cut from, struct rt_block_cut to)
{
    return (uint64_t)(to.token - from.token) * rt_block_token_bytes(id) + (uint64_t)(to.row - from.row) * rt_block_row_bytes(id);
}

uint64_t rt_pack_bytes(const struct rt_row_identity *id, int64_t longest, int threads)
{
    const uint64_t all = (uint64_t)longest * (rt_block_token_bytes(id) + rt_block_row_bytes(id) + 16), block = all < RT_BLOCK_RAW ? all : RT_BLOCK_RAW;
    const uint64_t most = (uint64_t)threads * RT_BLOCK_RAW, out = threads > 1 ? RT_PACK_BLOCKS * block : block;
    return (uint64_t)threads * (2 * block + ZLIB_BYTES) + 2 * (out < most ? out : most); /* buffers grow to twice what they held */
}

static void pack_item(void *ctx, int64_t item, int worker)
{
    struct rt_packer *p = ctx;
    struct rt_packed_block *b = &p->block[item];
    const struct rt_rows *rows = &p->rows[b->seq];
    struct rt_err err = {0};
    struct rt_pack out = {&b->bytes, RT_OK, &err};
    enum rt_status st = RT_OK;
    b->bytes.len = 0;
    if (b->from.token == 0)
        RT_TRY(rt_pack_describe(rows, p->id, p->ordinal + b->seq, &b->info, &err));
    if (b->st == RT_OK)
        RT_TRY(rt_block_pack(&p->codec[worker], p->level, rows, p->id, p->ordinal + b->seq, b->from, b->to, &out, &err));
out:
    if (st != RT_OK) { /* what is wrong with the rows goes before what made them hard to cut */
        b->st = st;
        b->err = err;
    }
}

static enum rt_status make_buffers(struct rt_packer *p, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (p->codec == NULL)
        RT_TRY(rt_alloc((size_t)(p->pool != NULL ? rt_pool_threads(p->pool) : 1), sizeof *p->codec, "packing of rows", &p->codec, err));
    if (p->block == NULL)
        RT_TRY(rt_alloc(RT_PACK_BLOCKS, sizeof *p->block, "packing of rows", &p->block, err));
out:
    return st;
}

enum rt_status rt_packer_run(struct rt_packer *p, int level, const struct rt_row_identity *id, const struct rt_rows *rows, int64_t n, int64_t ordinal,
                             struct rt_pack_place *at, struct rt_err *err)
{
    enum rt_status st;
    const int threads = p->pool != NULL ? rt_pool_threads(p->pool) : 1;
    const int64_t most = threads > 1 ? RT_PACK_BLOCKS : 1;
    uint64_t raw = 0;
    RT_TRY(make_buffers(p, err));
    p->id = id;
    p->rows = rows;
    p->ordinal = ordinal;
    p->level = level;
    for (p->n = 0; p->n < most && at->seq < n; p->n++) {
        struct rt_packed_block *b = &p->block[p->n];
        rt_err_clear(&b->err);
        b->seq = at->seq;
        b->from = b->to = at->cut;
        b->st = rt_block_next(&rows[at->seq], id, at->cut, &b->to, &b->err);
        raw += b->st == RT_OK ? raw_bytes(id, b->from, b->to) : 0;
        if (p->n > 0 && raw > (uint64_t)threads * RT_BLOCK_RAW)
            break;
        b->last = b->st != RT_OK || b->to.token == rows[at->seq].n_tokens;
        *at = b->last ? (struct rt_pack_place){at->seq + 1, {0, 0}} : (struct rt_pack_place){at->seq, b->to};
    }
    if (p->pool != NULL)
        rt_pool_run(p->pool, p->n, pack_item, p);
    else
        pack_item(p, 0, 0);
out:
    return st;
}
