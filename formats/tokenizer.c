#include "formats/tokenizer.h"

#include <string.h>

#include "formats/tokenizer_internal.h"
#include "formats/unicode.h"

static const size_t TEXT_MAX = (size_t)1 << 30;

uint32_t rt_tokenizer_n_ids(const struct rt_tokenizer *t)
{
    return t->vocab.n_ids;
}

const char *rt_tokenizer_sha256(const struct rt_tokenizer *t)
{
    return t->sha256;
}

const char *rt_tokenizer_path(const struct rt_tokenizer *t)
{
    return t->path;
}

bool rt_tokenizer_normalizes(const struct rt_tokenizer *t)
{
    return t->nfc;
}

static uint8_t flags_of(const struct rt_tokenizer *t, uint32_t id)
{
    return id < t->vocab.n_ids ? t->vocab.token[id].flags : 0;
}

bool rt_tokenizer_bytes(const struct rt_tokenizer *t, uint32_t id, const char **bytes, size_t *len)
{
    if (flags_of(t, id) == 0)
        return false;
    const struct rt_token *k = &t->vocab.token[id];
    *bytes = k->len > 0 ? t->vocab.pool.data + k->off : "";
    *len = k->len;
    return true;
}

bool rt_tokenizer_find(const struct rt_tokenizer *t, const char *bytes, size_t len, uint32_t *id)
{
    const struct rt_finder *const finders[] = {&t->raw, &t->normalized};
    for (int f = 0; f < 2 && len > 0; f++)
        for (uint32_t i = finders[f]->first[(uint8_t)bytes[0]]; i < finders[f]->first[(uint8_t)bytes[0] + 1]; i++) {
            const struct rt_token *k = &t->vocab.token[finders[f]->token[i].id];
            if (k->len == len && memcmp(t->vocab.pool.data + k->off, bytes, len) == 0) {
                *id = finders[f]->token[i].id;
                return true;
            }
        }
    return rt_vocab_find(&t->vocab, bytes, len, id);
}

bool rt_tokenizer_is_added(const struct rt_tokenizer *t, uint32_t id)
{
    return (flags_of(t, id) & RT_TOKEN_ADDED) != 0;
}

bool rt_tokenizer_is_special(const struct rt_tokenizer *t, uint32_t id)
{
    return (flags_of(t, id) & RT_TOKEN_SPECIAL) != 0;
}

int64_t rt_tokenizer_bos(const struct rt_tokenizer *t)
{
    return t->bos;
}

int64_t rt_tokenizer_eos(const struct rt_tokenizer *t)
{
    return t->eos;
}

int64_t rt_tokenizer_pad(const struct rt_tokenizer *t)
{
    return t->pad;
}

bool rt_tokenizer_add_bos(const struct rt_tokenizer *t)
{
    return t->add_bos;
}

void rt_encoding_free(struct rt_encoding *e)
{
    rt_free(e->ids);
    rt_free(e->byte_end);
    memset(e, 0, sizeof *e);
}

static enum rt_status room(struct rt_encoding *e, size_t extra, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    uint32_t *ids = NULL, *ends = NULL;
    if (e->cap - e->n >= extra)
        return RT_OK;
    size_t cap = e->cap * 2 > e->n + extra ? e->cap * 2 : e->n + extra;
    if (cap < 64)
        cap = 64;
    RT_TRY(rt_alloc(cap, sizeof *ids, "token ids", &ids, err));
    RT_TRY(rt_alloc(cap, sizeof *ends, "token ends", &ends, err));
    if (e->n > 0) {
        memcpy(ids, e->ids, e->n * sizeof *ids);
        memcpy(ends, e->byte_end, e->n * sizeof *ends);
    }
    rt_free(e->ids);
    rt_free(e->byte_end);
    e->ids = ids;
    e->byte_end = ends;
    e->cap = cap;
    ids = ends = NULL;
out:
    rt_free(ids);
    rt_free(ends);
    return st;
}

/* byte_end of the ids from `first` on. */
static enum rt_status fill_ends(struct rt_encoding *e, const struct rt_tokenizer *t, size_t first, struct rt_err *err)
{
    uint64_t end = first > 0 ? e->byte_end[first - 1] : 0;
    for (size_t i = first; i < e->n; i++) {
        end += t->vocab.token[e->ids[i]].len;
        if (end > UINT32_MAX)
            return rt_fail(err, RT_FORMAT, "%zu tokens hold more than 4 GiB of text", i);
        e->byte_end[i] = (uint32_t)end;
    }
    return RT_OK;
}

enum rt_status rt_encoding_push(struct rt_encoding *e, const struct rt_tokenizer *t, uint32_t id, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (flags_of(t, id) == 0)
        return rt_fail(err, RT_FORMAT, "%s has no token with the id %u", t->path, id);
    RT_TRY(room(e, 1, err));
    e->ids[e->n++] = id;
    st = fill_ends(e, t, e->n - 1, err);
    if (st != RT_OK)
        e->n--;
out:
    return st;
}

/* Text without added tokens, normalised. */
static enum rt_status encode_plain(struct rt_tokenizer *t, const char *text, size_t len, struct rt_encoding *e, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_pieces *words;
    RT_TRY(rt_pretokenizer_split(t->pre, text, len, &words, err));
    for (size_t i = 0; i < words->n; i++) {
        const size_t n = words->at[i].end - words->at[i].begin;
        size_t made;
        RT_TRY(room(e, n, err));
        RT_TRY(rt_bpe_encode(t->bpe, text + words->at[i].begin, n, e->ids + e->n, &made, err));
        e->n += made;
    }
out:
    return st;
}

/* Text between the tokens that are sought before normalising. */
static enum rt_status encode_section(struct rt_tokenizer *t, const char *text, size_t len, struct rt_encoding *e, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_found found;
    if (t->nfc && !rt_nfc_trivially(text, len)) {
        t->scratch.len = 0;
        RT_TRY(rt_nfc(text, len, &t->scratch, err));
        text = t->scratch.data;
        len = t->scratch.len;
    }
    struct rt_search s = {.finder = &t->normalized, .text = text, .len = len};
    while (rt_search_next(&s, &found)) {
        if (found.token == NULL) {
            RT_TRY(encode_plain(t, text + found.begin, found.end - found.begin, e, err));
        } else {
            RT_TRY(room(e, 1, err));
            e->ids[e->n++] = found.token->id;
        }
    }
out:
    return st;
}

enum rt_status rt_tokenizer_encode(struct rt_tokenizer *t, const char *text, size_t len, struct rt_encoding *e,
                                   struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t first = e->n;
    struct rt_found found;
    if (len > TEXT_MAX)
        return rt_fail(err, RT_FORMAT, "text of %zu bytes: at most 1 GiB can be encoded at once", len);
    const size_t valid = rt_utf8_prefix(text, len);
    if (valid < len)
        return rt_fail(err, RT_FORMAT, "text is not valid UTF-8 at byte %zu (0x%02x)", valid, (uint8_t)text[valid]);
    struct rt_search s = {.finder = &t->raw, .text = text, .len = len};
    while (rt_search_next(&s, &found)) {
        if (found.token == NULL) {
            RT_TRY(encode_section(t, text + found.begin, found.end - found.begin, e, err));
        } else {
            RT_TRY(room(e, 1, err));
            e->ids[e->n++] = found.token->id;
        }
    }
    RT_TRY(fill_ends(e, t, first, err));
out:
    if (st != RT_OK) {
        e->n = first;
        rt_err_context(err, "%s", t->path);
    }
    return st;
}

enum rt_status rt_tokenizer_encode_word(struct rt_tokenizer *t, const char *bytes, size_t len, struct rt_encoding *e,
                                        struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t first = e->n;
    size_t made;
    RT_TRY(room(e, len, err));
    RT_TRY(rt_bpe_encode(t->bpe, bytes, len, e->ids + e->n, &made, err));
    e->n += made;
    RT_TRY(fill_ends(e, t, first, err));
out:
    if (st != RT_OK)
        e->n = first;
    return st;
}

static enum rt_status unknown_id(const struct rt_tokenizer *t, uint32_t id, size_t i, struct rt_err *err)
{
    return rt_fail(err, RT_FORMAT, "id %u at index %zu: %s has no such token (%u ids)", id, i, t->path, t->vocab.n_ids);
}

enum rt_status rt_tokenizer_decode(const struct rt_tokenizer *t, const uint32_t *ids, size_t n, bool skip_special,
                                   struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t len = out->len;
    for (size_t i = 0; i < n; i++) {
        const char *bytes = NULL;
        size_t k = 0;
        if (!rt_tokenizer_bytes(t, ids[i], &bytes, &k))
            RT_TRY(unknown_id(t, ids[i], i, err));
        if (!skip_special || !rt_tokenizer_is_special(t, ids[i]))
            RT_TRY(rt_buf_append(out, bytes, k, err));
    }
out:
    if (st != RT_OK)
        out->len = len;
    return st;
}

enum rt_status rt_tokenizer_byte_ends(const struct rt_tokenizer *t, const uint32_t *ids, size_t n, uint32_t *byte_end,
                                      struct rt_err *err)
{
    uint64_t end = 0;
    for (size_t i = 0; i < n; i++) {
        if (flags_of(t, ids[i]) == 0)
            return unknown_id(t, ids[i], i, err);
        end += t->vocab.token[ids[i]].len;
        if (end > UINT32_MAX)
            return rt_fail(err, RT_FORMAT, "%zu tokens hold more than 4 GiB of text", i);
        byte_end[i] = (uint32_t)end;
    }
    return RT_OK;
}
