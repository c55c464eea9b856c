#include "distill/source.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "core/sha256.h"
#include "distill/source_rows.h"
#include "formats/dataset.h"

/* One sequence: what is known without decoding, and its arrays where they are kept. */
struct item {
    uint8_t key[RT_KEY_BYTES];
    uint32_t occurrence;
    int64_t line, n_tokens, n_targets; /* n_targets -1: not counted yet */
    int64_t at;          /* index in the shard set or source */
    struct rt_rows *kept;/* the block that the pointers lie in begins here */
};

struct rt_train_set {
    struct rt_train_set_options o;
    struct rt_train_info info;
    char path[4096];
    struct item *item;
    size_t cap;
    int64_t untargeted; /* lines without a target, left out */
    struct rt_shard_set *shards;
    struct rt_row_source source; /* of shards or memory; get NULL for lines */
    pthread_mutex_t lock; /* of kept_bytes, and of n_targets and kept of every item */
    size_t kept_bytes;
};

struct rt_train_reader {
    struct rt_train_set *s;
    struct rt_shard_set *shards; /* NULL for lines */
};

void rt_train_set_free(struct rt_train_set *s)
{
    if (s == NULL)
        return;
    for (int64_t i = 0; s->item != NULL && i < s->info.sequences; i++)
        rt_free(s->item[i].kept);
    rt_free(s->item);
    rt_shard_set_free(s->shards);
    pthread_mutex_destroy(&s->lock);
    rt_free(s);
}

const struct rt_train_info *rt_train_set_info(const struct rt_train_set *s)
{
    return &s->info;
}

void rt_train_set_cache(struct rt_train_set *s, size_t cache_bytes)
{
    s->o.cache_bytes = cache_bytes;
}

int64_t rt_train_set_length(const struct rt_train_set *s, int64_t i)
{
    return s->item[i].n_tokens;
}

void rt_train_set_key(const struct rt_train_set *s, int64_t i, uint8_t key[RT_KEY_BYTES], uint32_t *occurrence, int64_t *line)
{
    memcpy(key, s->item[i].key, RT_KEY_BYTES);
    *occurrence = s->item[i].occurrence;
    *line = s->item[i].line;
}

int rt_train_set_lse(const struct rt_train_set *s, double T)
{
    const struct rt_row_identity *id = s->info.identity;
    for (int i = 0; id != NULL && id->top_k > 0 && i < id->n_lse; i++)
        if (fabs(id->lse_temperature[i] - T) <= 1e-9 * T)
            return i;
    return -1;
}

static enum rt_status reserve(struct rt_train_set *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct item *bigger;
    if ((size_t)s->info.sequences < s->cap)
        return RT_OK;
    const size_t cap = s->cap > 0 ? 2 * s->cap : 256;
    RT_TRY(rt_alloc(cap, sizeof *bigger, "index of the training data", &bigger, err));
    if (s->item != NULL)
        memcpy(bigger, s->item, (size_t)s->info.sequences * sizeof *bigger);
    rt_free(s->item);
    s->item = bigger;
    s->cap = cap;
out:
    return st;
}

/* Adds what is known of a sequence, or counts it as left out. *added may be NULL. */
static enum rt_status add_item(struct rt_train_set *s, const struct item *it, bool *added, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (added != NULL)
        *added = false;
    if (it->n_tokens > s->o.max_length && !s->o.drop_long)
        RT_FAIL(err, REFUSED, "%s: sequence %ld (line %ld) has %ld tokens, the student takes %ld; --max-length %ld leaves longer ones out", s->path,
                (long)(s->info.sequences + s->info.left_out), (long)it->line, (long)it->n_tokens, (long)s->o.max_length, (long)s->o.max_length);
    if (it->n_tokens > s->o.max_length || it->n_tokens < 2) {
        s->info.left_out++;
        return RT_OK;
    }
    RT_TRY(reserve(s, err));
    s->item[s->info.sequences++] = *it;
    s->info.tokens += it->n_tokens;
    if (it->n_tokens > s->info.longest)
        s->info.longest = it->n_tokens;
    if (added != NULL)
        *added = true;
out:
    return st;
}

static enum rt_status check_identity(const struct rt_train_set *s, struct rt_err *err)
{
    const struct rt_row_identity *id = s->info.identity;
    const char *own = s->o.model->tok != NULL ? rt_tokenizer_sha256(s->o.model->tok) : "", *its = id->tokenizer_sha256;
    if (own[0] == '\0' && its[0] != '\0')
        return rt_fail(err, RT_REFUSED, "%s: its tokens are of the tokenizer %.16s.., the student has none (no tokenizer.json in %s): "
                       "--tokenizer DIR names the directory of its tokenizer", s->path, its, s->o.model->path);
    if (own[0] != '\0' && its[0] == '\0')
        return rt_fail(err, RT_REFUSED, "%s: names no tokenizer that its tokens are of, the student (%s) has %.16s..: "
                       "shards that were made with a tokenizer are needed", s->path, s->o.model->path, own);
    if (strcmp(its, own) != 0)
        return rt_fail(err, RT_REFUSED, "%s: its tokens are of the tokenizer %.16s.., the student (%s) has %.16s..; "
                       "`retort retarget` rewrites shards for another tokenizer", s->path, its, s->o.model->path, own);
    if (id->n_ids > s->o.vocab)
        return rt_fail(err, RT_REFUSED, "%s: has ids up to %ld, the student's vocabulary %ld rows", s->path, (long)id->n_ids - 1, (long)s->o.vocab);
    return RT_OK;
}

/* Both hashes, from what is known without reading a shard's rows. */
static enum rt_status hash(struct rt_train_set *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_json *json = NULL;
    struct rt_buf text = {0};
    struct rt_sha256 keys, content;
    rt_sha256_init(&keys);
    for (int64_t i = 0; i < s->info.sequences; i++) {
        rt_sha256_update(&keys, s->item[i].key, RT_KEY_BYTES);
        rt_sha256_update_u32(&keys, s->item[i].occurrence);
    }
    content = keys;
    if (s->shards != NULL) {
        struct rt_row_identity id = *s->info.identity;
        id.teacher_name[0] = '\0'; /* is for people */
        RT_TRY(rt_json_new_object(&json, err));
        RT_TRY(rt_row_identity_to_json(&id, json, err));
        RT_TRY(rt_json_dump(json, 0, &text, err));
        rt_sha256_update(&content, text.data, text.len);
    }
    for (int64_t i = 0; i < s->info.sequences; i++) {
        const struct item *it = &s->item[i];
        if (s->shards != NULL)
            rt_sha256_update_u32(&content, rt_shard_set_seq(s->shards, it->at)->crc);
        else if (it->kept != NULL)
            rt_sha256_update(&content, it->kept->loss_mask, (size_t)it->n_tokens);
    }
    rt_sha256_final_hex(&keys, s->info.sha256);
    rt_sha256_final_hex(&content, s->info.content_sha256);
out:
    rt_json_free(json);
    rt_buf_free(&text);
    return st;
}

static enum rt_status get_shard(void *self, int64_t i, struct rt_rows *out, bool *end, struct rt_err *err)
{
    *end = false;
    return rt_shard_set_get(self, i, out, err);
}

static enum rt_status open_shards(struct rt_train_set *s, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_shard_set_open(s->path, &s->shards, err));
    s->info.kind = RT_TRAIN_SHARDS;
    s->info.identity = rt_shard_set_identity(s->shards);
    s->info.shards = rt_shard_set_info(s->shards);
    s->source = (struct rt_row_source){.self = s->shards, .count = s->info.shards->sequences, .identity = s->info.identity, .get = get_shard};
    RT_TRY(check_identity(s, err));
    for (int64_t i = 0; i < s->info.shards->sequences; i++) {
        const struct rt_seq_info *q = rt_shard_set_seq(s->shards, i);
        struct item it = {.occurrence = q->occurrence, .line = q->source_line, .n_tokens = q->n_tokens, .n_targets = -1, .at = i};
        memcpy(it.key, q->key, RT_KEY_BYTES);
        RT_TRY(add_item(s, &it, NULL, err));
    }
out:
    return st;
}

/* What memory the set takes, and would. Of shards what their index says of a sequence is enough. */
static void count_bytes(struct rt_train_set *s)
{
    static const uint8_t some_mask;
    static const uint32_t some_span;
    static const float some_scale;
    const struct rt_row_identity *id = s->info.identity;
    s->info.held += s->cap * sizeof *s->item;
    if (s->shards == NULL)
        return;
    s->info.held += (size_t)s->info.shards->sequences * sizeof(struct rt_seq_info);
    for (int64_t i = 0; i < s->info.sequences; i++) {
        const struct rt_seq_info *q = rt_shard_set_seq(s->shards, s->item[i].at);
        struct rt_rows r = {.n_tokens = q->n_tokens, .n_rows = q->n_rows, .k = rt_row_identity_k(id), .n_lse = id->n_lse,
                            .n_features = id->n_features, .feature_mask = id->origin.mode[0] != '\0' ? &some_mask : NULL,
                            .span = rt_row_identity_spans(id) ? &some_span : NULL};
        struct rt_rows_layout l;
        for (int f = 0; f < id->n_features; f++)
            r.feature_scale[f] = id->feature[f].dtype == RT_E4M3 ? &some_scale : NULL;
        if (!rt_rows_lay_out(&r, s->info.identity, s->o.features, &l) || !rt_add_size(s->info.decoded, rt_rows_in_memory(&l), &s->info.decoded)) {
            s->info.decoded = SIZE_MAX;
            return;
        }
    }
}

static enum rt_status finish(struct rt_train_set *s, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(hash(s, err));
    count_bytes(s);
    if (s->info.sequences == 0)
        RT_FAIL(err, FORMAT, "%s: no sequence is left: %ld without anything to predict, %ld over %ld tokens (or of one token)", s->path,
                (long)s->untargeted, (long)s->info.left_out, (long)s->o.max_length);
out:
    return st;
}

/* The lines' ids and masks, in memory. */
static enum rt_status read_lines(struct rt_train_set *s, struct rt_log *log, struct rt_err *err)
{
    enum rt_status st;
    struct rt_dataset *d = NULL;
    struct rt_sample sample;
    bool end = false, added;
    const struct rt_dataset_options o = {.tok = s->o.model->tok, .tmpl = s->o.model->tmpl,
                                         .n_ids = s->o.model->tok != NULL ? (int64_t)rt_tokenizer_n_ids(s->o.model->tok) : s->o.vocab};
    s->info.kind = RT_TRAIN_LINES;
    RT_TRY(rt_dataset_open(s->path, &o, &d, err));
    for (;;) {
        RT_TRY(rt_dataset_next(d, &sample, &end, err));
        if (end)
            break;
        struct item it = {.line = sample.line, .n_tokens = sample.n, .n_targets = sample.n_targets};
        struct rt_rows r = {.source_line = sample.line, .n_tokens = sample.n, .ids = sample.ids, .loss_mask = sample.loss_mask};
        struct rt_rows_layout l;
        rt_rows_key(sample.ids, sample.n, it.key);
        memcpy(r.key, it.key, sizeof r.key);
        RT_TRY(add_item(s, &it, &added, err));
        if (!added)
            continue;
        if (!rt_rows_lay_out(&r, s->info.identity, s->o.features, &l))
            RT_FAIL(err, NOMEM, "%s: line %ld is too large", s->path, (long)sample.line);
        s->info.held += rt_rows_in_memory(&l);
        RT_TRY(rt_rows_copy(&r, s->info.identity, s->o.features, &l, &s->item[s->info.sequences - 1].kept, err));
    }
    const struct rt_dataset_counts c = rt_dataset_counts(d);
    s->untargeted = c.untargeted;
    if (c.untargeted > 0)
        rt_warn(log, "%s: %ld lines have no target and are left out", s->path, (long)c.untargeted);
    if (c.not_nfc > 0 && s->o.model->tok != NULL && rt_tokenizer_normalizes(s->o.model->tok))
        rt_warn(log, "%s: %ld lines are not in Unicode NFC: their tokens stand for other bytes than the text", s->path, (long)c.not_nfc);
out:
    rt_dataset_close(d);
    return st;
}

static int by_key(const void *a, const void *b)
{
    const struct item *const *x = a, *const *y = b;
    const int c = memcmp((*x)->key, (*y)->key, RT_KEY_BYTES);
    return c != 0 ? c : (*x > *y) - (*x < *y);
}

/* Occurrence numbers of lines with equal tokens, in the order of the file. */
static enum rt_status number_occurrences(struct rt_train_set *s, struct rt_err *err)
{
    enum rt_status st;
    struct item **sorted = NULL;
    RT_TRY(rt_alloc((size_t)s->info.sequences, sizeof *sorted, "keys", &sorted, err));
    for (int64_t i = 0; i < s->info.sequences; i++)
        sorted[i] = &s->item[i];
    qsort(sorted, (size_t)s->info.sequences, sizeof *sorted, by_key);
    for (int64_t i = 1; i < s->info.sequences; i++)
        if (memcmp(sorted[i]->key, sorted[i - 1]->key, RT_KEY_BYTES) == 0) {
            sorted[i]->occurrence = sorted[i - 1]->occurrence + 1;
            sorted[i]->kept->occurrence = sorted[i]->occurrence;
        }
out:
    rt_free(sorted);
    return st;
}

static bool is_shards(const char *path)
{
    const size_t n = strlen(path);
    if (rt_path_is_dir(path))
        return rt_path_has(path, "identity.json");
    return n > 8 && strcmp(path + n - 8, ".msgpack") == 0;
}

static enum rt_status create(const char *path, const struct rt_train_set_options *o, struct rt_train_set **out, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof **out, "training data", out, err));
    (*out)->o = *o;
    pthread_mutex_init(&(*out)->lock, NULL);
    snprintf((*out)->path, sizeof (*out)->path, "%s", path);
    (*out)->info.path = (*out)->path;
out:
    return st;
}

static void describe(struct rt_train_set *s)
{
    if (s->info.identity != NULL) {
        s->info.top_k = s->info.identity->top_k;
        s->info.n_lse = s->info.identity->top_k > 0 ? s->info.identity->n_lse : 0;
    }
}

enum rt_status rt_train_set_open(const char *path, const struct rt_train_set_options *o, struct rt_log *log, struct rt_train_set **out,
                                 struct rt_err *err)
{
    enum rt_status st;
    struct rt_train_set *s = NULL;
    RT_TRY(create(path, o, &s, err));
    if (!rt_path_exists(path))
        RT_FAIL(err, IO, "%s: no such file or directory", path);
    if (is_shards(path)) {
        RT_TRY(open_shards(s, err));
    } else {
        RT_TRY(read_lines(s, log, err));
        RT_TRY(number_occurrences(s, err));
    }
    describe(s);
    RT_TRY(finish(s, err));
    if (s->info.shards != NULL && s->info.shards->missing[0] != '\0')
        rt_warn(log, "%s: %s: the %ld sequences that are there are taken; the command that makes the shards goes on", path, s->info.shards->missing,
                (long)s->info.shards->sequences);
    if (s->info.left_out > 0)
        rt_warn(log, "%s: %ld sequences are longer than %ld tokens (or have one token) and are left out", path, (long)s->info.left_out,
                (long)o->max_length);
    *out = s;
    s = NULL;
out:
    rt_train_set_free(s);
    return st;
}

enum rt_status rt_train_set_memory(const struct rt_row_source *source, const struct rt_train_set_options *o, struct rt_train_set **out,
                                   struct rt_err *err)
{
    enum rt_status st;
    struct rt_train_set *s = NULL;
    RT_TRY(create("memory", o, &s, err));
    s->info.kind = RT_TRAIN_MEMORY;
    s->info.identity = source->identity;
    s->source = *source;
    RT_TRY(check_identity(s, err));
    for (int64_t i = 0; i < source->count; i++) {
        struct rt_rows r;
        bool end = false;
        RT_TRY(source->get(source->self, i, &r, &end, err));
        struct item it = {.occurrence = r.occurrence, .line = r.source_line, .n_tokens = r.n_tokens, .n_targets = -1, .at = i};
        memcpy(it.key, r.key, RT_KEY_BYTES);
        RT_TRY(add_item(s, &it, NULL, err));
    }
    describe(s);
    RT_TRY(finish(s, err));
    *out = s;
    s = NULL;
out:
    rt_train_set_free(s);
    return st;
}

/* A copy of r stays with the set where there is room; *out is that copy then. */
static enum rt_status keep(struct rt_train_set *s, struct item *it, struct rt_rows *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rows *copy = NULL;
    struct rt_rows_layout l;
    if (!rt_rows_lay_out(out, s->info.identity, s->o.features, &l))
        return RT_OK;
    pthread_mutex_lock(&s->lock);
    const bool room = rt_rows_in_memory(&l) <= s->o.cache_bytes - s->kept_bytes;
    s->kept_bytes += room ? rt_rows_in_memory(&l) : 0;
    pthread_mutex_unlock(&s->lock);
    if (!room)
        return RT_OK;
    st = rt_rows_copy(out, s->info.identity, s->o.features, &l, &copy, err);
    pthread_mutex_lock(&s->lock);
    if (copy == NULL || it->kept != NULL) /* another thread was quicker */
        s->kept_bytes -= rt_rows_in_memory(&l);
    if (it->kept == NULL && copy != NULL) {
        it->kept = copy;
        copy = NULL;
    }
    if (it->kept != NULL)
        *out = *it->kept;
    pthread_mutex_unlock(&s->lock);
    rt_free(copy);
    return st;
}

static enum rt_status get_from(struct rt_train_set *s, const struct rt_row_source *source, int64_t i, struct rt_rows *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct item *it = &s->item[i];
    int64_t n_targets = 0;
    bool end = false;
    pthread_mutex_lock(&s->lock);
    const struct rt_rows *kept = it->kept;
    pthread_mutex_unlock(&s->lock);
    if (kept != NULL) {
        *out = *kept;
        return RT_OK;
    }
    RT_TRY(source->get(source->self, it->at, out, &end, err));
    if (end || out->n_tokens != it->n_tokens)
        RT_FAIL(err, INTERNAL, "%s: sequence %ld changed under way", s->path, (long)i);
    for (int64_t t = 1; t < out->n_tokens; t++)
        n_targets += out->loss_mask[t] != 0;
    pthread_mutex_lock(&s->lock);
    it->n_targets = n_targets;
    pthread_mutex_unlock(&s->lock);
    RT_TRY(keep(s, it, out, err));
out:
    return st;
}

enum rt_status rt_train_set_get(struct rt_train_set *s, int64_t i, struct rt_rows *out, struct rt_err *err)
{
    return get_from(s, &s->source, i, out, err);
}

int64_t rt_train_set_known_targets(struct rt_train_set *s, int64_t i)
{
    pthread_mutex_lock(&s->lock);
    const int64_t n = s->item[i].n_targets;
    pthread_mutex_unlock(&s->lock);
    return n;
}

enum rt_status rt_train_set_targets(struct rt_train_set *s, int64_t i, int64_t *n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rows r;
    *n = rt_train_set_known_targets(s, i);
    if (*n < 0) {
        RT_TRY(rt_train_set_get(s, i, &r, err));
        *n = rt_train_set_known_targets(s, i);
    }
out:
    return st;
}

/* ---- readers ---- */

enum rt_status rt_train_reader_open(struct rt_train_set *s, struct rt_train_reader **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_train_reader *r = NULL;
    if (s->info.kind == RT_TRAIN_MEMORY)
        return rt_fail(err, RT_USAGE, "%s: a source in memory serves one thread", s->path);
    RT_TRY(rt_alloc(1, sizeof *r, "a reader of the training data", &r, err));
    r->s = s;
    if (s->shards != NULL)
        RT_TRY(rt_shard_set_again(s->shards, &r->shards, err));
    *out = r;
    r = NULL;
out:
    rt_train_reader_free(r);
    return st;
}

void rt_train_reader_free(struct rt_train_reader *r)
{
    if (r == NULL)
        return;
    rt_shard_set_free(r->shards);
    rt_free(r);
}

enum rt_status rt_train_reader_get(struct rt_train_reader *r, int64_t i, struct rt_rows *out, struct rt_err *err)
{
    const struct rt_row_source source = {.self = r->shards, .get = get_shard}; /* lines are all kept */
    return get_from(r->s, &source, i, out, err);
}
