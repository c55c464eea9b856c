#include "formats/shard_block.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { IDS, LOSS, TEXT, ENDS, POS, TOPK_IDS, TOPK_LOGITS, LSE, NEXT, NEXT_LOGPROB, NEXT_RANK, FEATURES };
enum stride { NONE, RUN, WHOLE }; /* differences: not taken, within an item, over the block */

struct spec {
    char name[24];
    bool per_token; /* an item a token, else a row */
    int width;
    int64_t elems; /* elements an item; 0 for the text, whose items are bytes */
    enum stride stride;
};

/* The columns of a set, in file order. */
static int columns(const struct rt_row_identity *id, struct spec out[RT_BLOCK_COLUMNS])
{
    const int64_t k = rt_row_identity_k(id);
    const struct spec fixed[FEATURES] = {
        [IDS] = {"ids", true, 4, 1, NONE},
        [LOSS] = {"loss", true, 1, 1, NONE},
        [TEXT] = {"text", true, 1, 0, NONE},
        [ENDS] = {"ends", true, 4, 1, WHOLE},
        [POS] = {"pos", false, 4, 1, WHOLE},
        [TOPK_IDS] = {"topk_ids", false, 4, k, NONE},
        [TOPK_LOGITS] = {"topk_logits", false, 4, k, RUN},
        [LSE] = {"lse", false, 4, id->n_lse, NONE},
        [NEXT] = {"next", false, 4, 1, NONE},
        [NEXT_LOGPROB] = {"next_logprob", false, 4, 1, NONE},
        [NEXT_RANK] = {"next_rank", false, 4, 1, NONE},
    };
    memcpy(out, fixed, sizeof fixed);
    for (int f = 0; f < id->n_features; f++) {
        struct spec *s = &out[FEATURES + 2 * f];
        s[0] = (struct spec){"", true, id->feature[f].dtype == RT_E4M3 ? 1 : 2, id->feature[f].dim, NONE};
        s[1] = (struct spec){"", true, 4, id->feature[f].dtype == RT_E4M3 ? 1 : 0, NONE};
        snprintf(s[0].name, sizeof s[0].name, "feature%d", f);
        snprintf(s[1].name, sizeof s[1].name, "scale%d", f);
    }
    int n = FEATURES + 2 * id->n_features;
    if (id->origin.mode[0] != '\0' && id->n_features > 0)
        out[n++] = (struct spec){"paired", true, 1, 1, NONE};
    if (rt_row_identity_spans(id)) {
        out[n++] = (struct spec){"span", false, 4, 1, NONE};
        out[n++] = (struct spec){"span_logp", false, 4, 1, NONE};
    } else if (id->boundary) {
        out[n++] = (struct spec){"boundary", false, 4, 1, NONE};
    }
    return n;
}

/* Is column c stored: text and ends where there is a text, scales where codes are FP8. */
static bool present(const struct spec *specs, int c, bool text)
{
    if (c == TEXT || c == ENDS)
        return text;
    return c < FEATURES || specs[c].elems > 0;
}

static uint64_t item_bytes(const struct rt_row_identity *id, bool per_token)
{
    struct spec specs[RT_BLOCK_COLUMNS];
    const int n = columns(id, specs);
    uint64_t sum = 0;
    for (int c = 0; c < n; c++)
        if (specs[c].per_token == per_token && c != ENDS)
            sum += (uint64_t)specs[c].elems * (uint64_t)specs[c].width;
    return sum;
}

uint64_t rt_block_token_bytes(const struct rt_row_identity *id)
{
    return item_bytes(id, true);
}

uint64_t rt_block_row_bytes(const struct rt_row_identity *id)
{
    return item_bytes(id, false);
}

static uint32_t text_at(const struct rt_rows *rows, int64_t token)
{
    return rows->byte_end != NULL && token > 0 ? rows->byte_end[token - 1] : 0;
}

enum rt_status rt_block_next(const struct rt_rows *rows, const struct rt_row_identity *id, struct rt_block_cut from,
                             struct rt_block_cut *to, struct rt_err *err)
{
    const uint64_t token_bytes = rt_block_token_bytes(id) + (rows->byte_end != NULL ? 4 : 0), row_bytes = rt_block_row_bytes(id);
    uint64_t sum = 0;
    *to = from;
    for (; to->token < rows->n_tokens; to->token++) {
        const bool row = to->row < rows->n_rows && rows->position[to->row] == to->token;
        sum += token_bytes + text_at(rows, to->token + 1) - text_at(rows, to->token) + (row ? row_bytes : 0);
        if (sum > RT_BLOCK_RAW)
            break;
        to->row += row;
    }
    if (to->token == from.token)
        return rt_fail(err, RT_USAGE, "one token of these rows takes %" PRIu64 " bytes, a block holds %d: use fewer or narrower features",
                       sum, RT_BLOCK_RAW);
    return RT_OK;
}

static const void *source(const struct rt_rows *r, const struct spec *s, int c)
{
    switch (c) {
    case IDS: return r->ids;
    case LOSS: return r->loss_mask;
    case TEXT: return r->text;
    case ENDS: return r->byte_end;
    case POS: return r->position;
    case TOPK_IDS: return r->topk_ids;
    case TOPK_LOGITS: return r->topk_logits;
    case LSE: return r->lse;
    case NEXT: return r->next_id;
    case NEXT_LOGPROB: return r->next_logprob;
    case NEXT_RANK: return r->next_rank;
    default:
        if (c >= FEATURES + 2 * r->n_features)
            return strcmp(s->name, "paired") == 0 ? (const void *)r->feature_mask : strcmp(s->name, "span") == 0 ? (const void *)r->span
                   : strcmp(s->name, "span_logp") == 0 ? r->span_logp : r->boundary_logp;
        return (c - FEATURES) % 2 == 0 ? r->feature[(c - FEATURES) / 2] : r->feature_scale[(c - FEATURES) / 2];
    }
}

enum rt_status rt_block_pack(struct rt_codec *c, int level, const struct rt_rows *rows, const struct rt_row_identity *id,
                             int64_t ordinal, struct rt_block_cut from, struct rt_block_cut to, struct rt_pack *out,
                             struct rt_err *err)
{
    struct spec specs[RT_BLOCK_COLUMNS];
    const int n = columns(id, specs);
    const int64_t tokens = to.token - from.token, n_rows = to.row - from.row;
    enum rt_status st = RT_OK;
    size_t stored = 0;
    for (int i = 0; i < n; i++)
        stored += present(specs, i, rows->text != NULL);
    rt_pack_map(out, 6);
    rt_pack_str(out, "seq");
    rt_pack_uint(out, (uint64_t)ordinal);
    rt_pack_str(out, "token0");
    rt_pack_uint(out, (uint64_t)from.token);
    rt_pack_str(out, "tokens");
    rt_pack_uint(out, (uint64_t)tokens);
    rt_pack_str(out, "row0");
    rt_pack_uint(out, (uint64_t)from.row);
    rt_pack_str(out, "rows");
    rt_pack_uint(out, (uint64_t)n_rows);
    rt_pack_str(out, "cols");
    rt_pack_map(out, stored);
    for (int i = 0; i < n; i++) {
        const struct spec *s = &specs[i];
        if (!present(specs, i, rows->text != NULL))
            continue;
        const int64_t first = i == TEXT ? text_at(rows, from.token) : (s->per_token ? from.token : from.row) * s->elems;
        const int64_t count = i == TEXT ? text_at(rows, to.token) - first : (s->per_token ? tokens : n_rows) * s->elems;
        const size_t stride = s->stride == WHOLE ? (size_t)count : s->stride == RUN ? (size_t)s->elems : 0;
        const uint8_t *data = source(rows, s, i);
        rt_pack_str(out, s->name);
        RT_TRY(rt_codec_pack(c, level, count > 0 ? data + first * s->width : (const uint8_t *)"", (size_t)count, s->width, stride, i == TEXT, out, err));
    }
    st = out->st;
out:
    return st;
}

void rt_block_store_free(struct rt_block_store *s)
{
    rt_codec_free(&s->codec);
    for (int i = 0; i < RT_BLOCK_COLUMNS; i++)
        rt_buf_free(&s->column[i]);
}

static enum rt_status count_of(struct rt_unpack *u, const char *key, int64_t max, int64_t *out, struct rt_err *err)
{
    uint64_t v;
    enum rt_status st = rt_unpack_key(u, key, err);
    if (st == RT_OK)
        st = rt_unpack_uint(u, (uint64_t)max, &v, err);
    if (st == RT_OK)
        *out = (int64_t)v;
    return st;
}

struct progress {
    int64_t ordinal, n_tokens, n_rows;
    struct rt_block_cut at;
    int text; /* -1: not known before the first block */
};

static enum rt_status unpack_columns(struct rt_block_store *s, const struct spec *specs, int n, struct progress *p, int64_t tokens,
                                     int64_t n_rows, struct rt_unpack *u, struct rt_err *err)
{
    enum rt_status st;
    size_t stored, with_text = 0, without = 0;
    char where[4200];
    uint64_t sum = 0;
    RT_TRY(rt_unpack_map(u, &stored, err));
    for (int i = 0; i < n; i++) {
        with_text += present(specs, i, true);
        without += present(specs, i, false);
    }
    if ((stored != with_text && stored != without) || (p->text >= 0 && p->text != (stored == with_text)))
        return rt_unpack_fail(u, "the columns of this kind of row", err);
    p->text = stored == with_text;
    for (int i = 0; i < n; i++) {
        const struct spec *c = &specs[i];
        struct rt_column col;
        if (!present(specs, i, p->text))
            continue;
        RT_TRY(rt_unpack_key(u, c->name, err));
        snprintf(where, sizeof where, "%s: byte %" PRIu64 ", column %s", u->path, u->base + (uint64_t)(u->at - u->start), c->name);
        RT_TRY(rt_column_read(u, &col, err));
        const size_t want = (size_t)(c->per_token ? tokens : n_rows) * (size_t)c->elems * (size_t)c->width;
        if (col.width != (size_t)c->width || (i != TEXT && col.raw != want))
            RT_FAIL(err, FORMAT, "%s: %zu bytes of %zu-byte elements, expected %zu of %d-byte ones", where, col.raw, col.width, want, c->width);
        sum += col.raw;
        if (sum > RT_BLOCK_RAW)
            return rt_unpack_fail(u, "at most 16 MiB in a block", err);
        RT_TRY(rt_buf_reserve(&s->column[i], col.raw + 1, err));
        RT_TRY(rt_codec_unpack(&s->codec, &col, s->column[i].data + s->column[i].len, where, err));
        s->column[i].len += col.raw;
    }
out:
    return st;
}

static enum rt_status unpack_one(struct rt_block_store *s, const struct spec *specs, int n, struct progress *p, struct rt_unpack *u,
                                 struct rt_err *err)
{
    enum rt_status st;
    size_t members;
    int64_t ordinal, token0, tokens, row0, n_rows;
    RT_TRY(rt_unpack_map(u, &members, err));
    if (members != 6)
        return rt_unpack_fail(u, "the 6 members of a block", err);
    RT_TRY(count_of(u, "seq", INT64_MAX, &ordinal, err));
    RT_TRY(count_of(u, "token0", p->n_tokens, &token0, err));
    RT_TRY(count_of(u, "tokens", p->n_tokens - p->at.token, &tokens, err));
    RT_TRY(count_of(u, "row0", p->n_rows, &row0, err));
    RT_TRY(count_of(u, "rows", p->n_rows - p->at.row, &n_rows, err));
    if (ordinal != p->ordinal || token0 != p->at.token || row0 != p->at.row || tokens < 1)
        return rt_unpack_fail(u, "the next block of the same sequence", err);
    RT_TRY(rt_unpack_key(u, "cols", err));
    RT_TRY(unpack_columns(s, specs, n, p, tokens, n_rows, u, err));
    p->at.token += tokens;
    p->at.row += n_rows;
out:
    return st;
}

enum rt_status rt_block_unpack(struct rt_block_store *s, const struct rt_row_identity *id, int64_t ordinal, int64_t n_tokens,
                               int64_t n_rows, const void *data, size_t n, const char *path, uint64_t offset, struct rt_rows *out,
                               struct rt_err *err)
{
    struct spec specs[RT_BLOCK_COLUMNS];
    const int n_columns = columns(id, specs);
    struct progress p = {ordinal, n_tokens, n_rows, {0, 0}, -1};
    struct rt_unpack u;
    enum rt_status st = RT_OK;
    rt_unpack_init(&u, data, n, path, offset);
    for (int i = 0; i < n_columns; i++) {
        s->column[i].len = 0;
        RT_TRY(rt_buf_reserve(&s->column[i], 64, err));
    }
    while (u.at < u.end)
        RT_TRY(unpack_one(s, specs, n_columns, &p, &u, err));
    if (p.at.token != n_tokens || p.at.row != n_rows)
        return rt_unpack_fail(&u, "another block of this sequence", err);
    memset(out, 0, sizeof *out);
    out->n_tokens = n_tokens;
    out->n_rows = n_rows;
    out->k = (int)specs[TOPK_IDS].elems;
    out->n_lse = id->n_lse;
    out->ids = (const void *)s->column[IDS].data;
    out->loss_mask = (const void *)s->column[LOSS].data;
    if (p.text == 1) {
        out->text = s->column[TEXT].data;
        out->text_len = (int64_t)s->column[TEXT].len;
        out->byte_end = (const void *)s->column[ENDS].data;
    }
    out->position = (const void *)s->column[POS].data;
    out->topk_ids = (const void *)s->column[TOPK_IDS].data;
    out->topk_logits = (const void *)s->column[TOPK_LOGITS].data;
    out->lse = (const void *)s->column[LSE].data;
    out->next_id = (const void *)s->column[NEXT].data;
    out->next_logprob = (const void *)s->column[NEXT_LOGPROB].data;
    out->next_rank = (const void *)s->column[NEXT_RANK].data;
    out->n_features = id->n_features;
    for (int f = 0; f < id->n_features; f++) {
        out->feature[f] = s->column[FEATURES + 2 * f].data;
        if (id->feature[f].dtype == RT_E4M3)
            out->feature_scale[f] = (const void *)s->column[FEATURES + 2 * f + 1].data;
    }
    int extra = FEATURES + 2 * id->n_features;
    if (id->origin.mode[0] != '\0' && id->n_features > 0)
        out->feature_mask = (const void *)s->column[extra++].data;
    if (rt_row_identity_spans(id)) {
        out->span = (const void *)s->column[extra++].data;
        out->span_logp = (const void *)s->column[extra].data;
    } else if (id->boundary) {
        out->boundary_logp = (const void *)s->column[extra].data;
    }
out:
    return st;
}
