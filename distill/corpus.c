#include "distill/corpus.h"

#include <string.h>

#include "core/mem.h"
#include "core/sha256.h"

/* Occurrences of keys: open addressing, at most half full. */
struct seen {
    uint8_t key[RT_KEY_BYTES];
    uint32_t count;
};

/* Offsets of a sequence's parts in the window's bytes; pointers are made when the window is complete. */
struct place {
    size_t ids, mask, text, byte_end;
};

struct rt_corpus {
    struct rt_corpus_options o;
    struct rt_dataset *data;
    struct seen *seen;
    size_t seen_cap, seen_n;
    int64_t ordinal;
    bool have; /* a sequence that did not fit into the last window is at the front of the next */
    struct rt_sample held;
    uint8_t held_key[RT_KEY_BYTES];
    uint32_t held_occurrence;
    struct rt_buf text, lengths; /* lengths: of the share's sequences, uint32_t, after a survey */
    struct rt_sha256 whole;      /* over all sequences so far, whatever the share */
    char surveyed[65];           /* what a survey found that to be at the end; "": none was made */
};

enum rt_status rt_corpus_open(const struct rt_corpus_options *o, struct rt_corpus **out, struct rt_err *err)
{
    struct rt_corpus *c = NULL;
    enum rt_status st;
    const struct rt_dataset_options d = {.tok = o->model->tok, .tmpl = o->model->tmpl, .n_ids = o->n_ids, .max_length = o->max_length,
                                         .overlong = o->overlong, .thinking = true};
    RT_TRY(rt_alloc(1, sizeof *c, "corpus", &c, err));
    c->o = *o;
    c->o.n_parts = o->n_parts > 0 ? o->n_parts : 1;
    rt_sha256_init(&c->whole);
    RT_TRY(rt_dataset_open(o->data, &d, &c->data, err));
    *out = c;
    c = NULL;
out:
    rt_corpus_close(c);
    return st;
}

void rt_corpus_close(struct rt_corpus *c)
{
    if (c == NULL)
        return;
    rt_dataset_close(c->data);
    rt_free(c->seen);
    rt_buf_free(&c->text);
    rt_buf_free(&c->lengths);
    rt_free(c);
}

/* How often the key was there before; counts it. */
static enum rt_status count_key(struct rt_corpus *c, const uint8_t key[RT_KEY_BYTES], uint32_t *before, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (2 * (c->seen_n + 1) > c->seen_cap) {
        const size_t cap = c->seen_cap > 0 ? 2 * c->seen_cap : 1024;
        struct seen *bigger;
        RT_TRY(rt_alloc(cap, sizeof *bigger, "keys of sequences", &bigger, err));
        for (size_t i = 0; i < c->seen_cap; i++) {
            if (c->seen[i].count == 0)
                continue;
            size_t at;
            memcpy(&at, c->seen[i].key, sizeof at);
            for (at &= cap - 1; bigger[at].count > 0; at = (at + 1) & (cap - 1))
                ;
            bigger[at] = c->seen[i];
        }
        rt_free(c->seen);
        c->seen = bigger;
        c->seen_cap = cap;
    }
    size_t at;
    memcpy(&at, key, sizeof at);
    for (at &= c->seen_cap - 1; c->seen[at].count > 0; at = (at + 1) & (c->seen_cap - 1))
        if (memcmp(c->seen[at].key, key, RT_KEY_BYTES) == 0) {
            *before = c->seen[at].count++;
            return RT_OK;
        }
    memcpy(c->seen[at].key, key, RT_KEY_BYTES);
    c->seen[at].count = 1;
    c->seen_n++;
    *before = 0;
out:
    return st;
}

/* The next sample of this share, with its key and occurrence. */
static enum rt_status next_sample(struct rt_corpus *c, struct rt_sample *s, uint8_t key[RT_KEY_BYTES], uint32_t *occurrence, bool *end,
                                  struct rt_err *err)
{
    enum rt_status st;
    *end = false;
    for (;;) {
        RT_TRY(rt_dataset_next(c->data, s, end, err));
        if (*end)
            return RT_OK;
        rt_rows_key(s->ids, s->n, key);
        RT_TRY(count_key(c, key, occurrence, err));
        rt_sha256_update(&c->whole, key, RT_KEY_BYTES);
        rt_sha256_update(&c->whole, s->loss_mask, (size_t)s->n); /* says which rows are stored */
        if (c->ordinal++ % c->o.n_parts == c->o.part)
            return RT_OK;
    }
out:
    return st;
}

static enum rt_status rewind_corpus(struct rt_corpus *c, struct rt_err *err)
{
    if (c->seen != NULL)
        memset(c->seen, 0, c->seen_cap * sizeof *c->seen);
    c->seen_n = 0;
    c->ordinal = 0;
    c->have = false;
    rt_sha256_init(&c->whole);
    return rt_dataset_rewind(c->data, err);
}

static void digest_so_far(const struct rt_corpus *c, char hex[65])
{
    struct rt_sha256 sha = c->whole;
    rt_sha256_final_hex(&sha, hex);
}

enum rt_status rt_corpus_survey(struct rt_corpus *c, struct rt_corpus_survey *out, struct rt_err *err)
{
    uint8_t key[RT_KEY_BYTES];
    uint32_t occurrence;
    struct rt_sample s;
    bool end;
    enum rt_status st;
    *out = (struct rt_corpus_survey){0};
    c->lengths.len = 0;
    for (;;) {
        RT_TRY(next_sample(c, &s, key, &occurrence, &end, err));
        if (end)
            break;
        out->sequences++;
        out->tokens += s.n;
        out->targets += s.n_targets;
        out->longest = s.n > out->longest ? s.n : out->longest;
        const uint32_t length = (uint32_t)s.n;
        RT_TRY(rt_buf_append(&c->lengths, &length, sizeof length, err));
    }
    digest_so_far(c, out->sha256);
    memcpy(c->surveyed, out->sha256, sizeof c->surveyed);
    out->counts = rt_dataset_counts(c->data);
    RT_TRY(rewind_corpus(c, err));
out:
    return st;
}

/* Copies a sample into the window. Sizes are rounded to 8 so that every part is aligned. */
static enum rt_status append(struct rt_corpus *c, struct rt_corpus_window *w, const struct rt_sample *s, const uint8_t *key, uint32_t occurrence,
                             struct rt_err *err)
{
    static const char zeros[8];
    struct rt_rows r = {.occurrence = occurrence, .source_line = s->line, .n_tokens = s->n};
    struct place p = {0};
    uint32_t *ends = NULL;
    enum rt_status st;
    memcpy(r.key, key, RT_KEY_BYTES);
    p.ids = w->bytes.len;
    RT_TRY(rt_buf_append(&w->bytes, s->ids, (size_t)s->n * sizeof *s->ids, err));
    RT_TRY(rt_buf_append(&w->bytes, zeros, (8 - w->bytes.len % 8) % 8, err));
    p.mask = w->bytes.len;
    RT_TRY(rt_buf_append(&w->bytes, s->loss_mask, (size_t)s->n, err));
    RT_TRY(rt_buf_append(&w->bytes, zeros, (8 - w->bytes.len % 8) % 8, err));
    if (c->o.model->tok != NULL) {
        c->text.len = 0;
        RT_TRY(rt_tokenizer_decode(c->o.model->tok, s->ids, (size_t)s->n, false, &c->text, err));
        RT_TRY(rt_alloc((size_t)s->n, sizeof *ends, "ends of tokens", &ends, err));
        RT_TRY(rt_tokenizer_byte_ends(c->o.model->tok, s->ids, (size_t)s->n, ends, err));
        p.byte_end = w->bytes.len;
        RT_TRY(rt_buf_append(&w->bytes, ends, (size_t)s->n * sizeof *ends, err));
        p.text = w->bytes.len;
        RT_TRY(rt_buf_append(&w->bytes, c->text.data, c->text.len, err));
        RT_TRY(rt_buf_append(&w->bytes, zeros, 8 - w->bytes.len % 8, err));
        r.text_len = (int64_t)c->text.len;
    }
    RT_TRY(rt_buf_append(&w->rows, &r, sizeof r, err));
    RT_TRY(rt_buf_append(&w->places, &p, sizeof p, err));
    w->n++;
    w->tokens += s->n;
out:
    rt_free(ends);
    return st;
}

static void point(const struct rt_corpus *c, struct rt_corpus_window *w)
{
    struct rt_rows *r = (struct rt_rows *)(void *)w->rows.data;
    const struct place *p = (const struct place *)(const void *)w->places.data;
    for (int64_t i = 0; i < w->n; i++) {
        r[i].ids = (const uint32_t *)(const void *)(w->bytes.data + p[i].ids);
        r[i].loss_mask = (const uint8_t *)(w->bytes.data + p[i].mask);
        if (c->o.model->tok != NULL) {
            r[i].byte_end = (const uint32_t *)(const void *)(w->bytes.data + p[i].byte_end);
            r[i].text = w->bytes.data + p[i].text;
        }
    }
}

/* At the end: what was read is what the survey saw, and what the plan and a resume count on. */
static enum rt_status check_unchanged(const struct rt_corpus *c, struct rt_err *err)
{
    char found[65];
    digest_so_far(c, found);
    if (c->surveyed[0] == '\0' || strcmp(found, c->surveyed) == 0)
        return RT_OK;
    return rt_fail(err, RT_REFUSED, "%s: changed while it was read: its sequences have sha256 %.12s, those that the run began with %.12s; "
                   "put the file back, or score into another --out", rt_dataset_path(c->data), found, c->surveyed);
}

enum rt_status rt_corpus_next(struct rt_corpus *c, int64_t tokens, struct rt_corpus_window *w, struct rt_err *err)
{
    uint8_t key[RT_KEY_BYTES];
    uint32_t occurrence = 0;
    struct rt_sample s;
    bool end = false;
    enum rt_status st = RT_OK;
    w->bytes.len = w->rows.len = w->places.len = 0;
    w->n = w->tokens = 0;
    for (;;) {
        if (c->have) {
            s = c->held;
            memcpy(key, c->held_key, sizeof key);
            occurrence = c->held_occurrence;
            c->have = false;
        } else {
            RT_TRY(next_sample(c, &s, key, &occurrence, &end, err));
        }
        if (end) {
            RT_TRY(check_unchanged(c, err));
            break;
        }
        if (s.n > tokens)
            RT_FAIL(err, USAGE, "%s: line %ld has %ld tokens, a window holds %ld", rt_dataset_path(c->data), (long)s.line, (long)s.n, (long)tokens);
        if (w->tokens + s.n > tokens) {
            c->held = s; /* stays valid: the dataset is not asked again before it is taken */
            c->held_occurrence = occurrence;
            memcpy(c->held_key, key, sizeof key);
            c->have = true;
            break;
        }
        RT_TRY(append(c, w, &s, key, occurrence, err));
    }
    point(c, w);
    w->seqs = (struct rt_rows *)(void *)w->rows.data;
out:
    return st;
}

void rt_corpus_window_free(struct rt_corpus_window *w)
{
    rt_buf_free(&w->bytes);
    rt_buf_free(&w->rows);
    rt_buf_free(&w->places);
    *w = (struct rt_corpus_window){0};
}

int64_t rt_corpus_windows(const struct rt_corpus *c, int64_t tokens)
{
    const uint32_t *length = (const uint32_t *)(const void *)c->lengths.data;
    int64_t windows = 0, left = 0;
    for (size_t i = 0; i < c->lengths.len / sizeof *length; i++) {
        if (length[i] > left) {
            windows++;
            left = tokens;
        }
        left -= length[i];
    }
    return windows;
}

int64_t rt_corpus_even_window(const struct rt_corpus *c, int64_t tokens)
{
    const uint32_t *length = (const uint32_t *)(const void *)c->lengths.data;
    int64_t lo = 1, hi = tokens;
    for (size_t i = 0; i < c->lengths.len / sizeof *length; i++)
        lo = length[i] > lo ? length[i] : lo;
    const int64_t most = rt_corpus_windows(c, tokens);
    while (lo < hi) {
        const int64_t mid = lo + (hi - lo) / 2;
        if (rt_corpus_windows(c, mid) <= most)
            hi = mid;
        else
            lo = mid + 1;
    }
    return hi;
}
