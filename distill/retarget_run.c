#include "distill/retarget_run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/sha256.h"

enum { WINDOW_SEQUENCES = 1024 };

/* One sequence on its way through. */
struct slot {
    int64_t index;         /* in the input */
    struct rt_buf block;   /* copy of the input's arrays */
    struct rt_rows rows, made;
    struct rt_retarget_text text;
    struct rt_buf place;
    struct rt_retarget_out out;
    struct rt_retarget_counts counts; /* crossing NULL: added up by whoever adds the slot */
    enum rt_reject reject;
    enum rt_status st;
    struct rt_err err;
};

/* One sequence of the shard that is being filled. */
struct kept {
    struct rt_buf block;   /* what rows points into */
    struct rt_rows rows;
    struct rt_shard_packed packed;
    enum rt_status st;
    struct rt_err err;
};

/* How often each key was put. Open addressing, at most half full. */
struct seen {
    uint8_t key[RT_KEY_BYTES];
    uint32_t count;
};

struct rt_retarget_run {
    struct rt_retarget_options o;
    int threads;
    struct rt_shard_set **set; /* [threads] of the input */
    struct rt_row_identity id;
    struct rt_vocab_map map;
    struct rt_retarget_pair pair;
    bool same;                 /* one tokenizer and one template: sequences stay as they are */
    struct rt_shard_sink *shards;
    struct rt_row_sink sink;
    struct slot *window;       /* [WINDOW_SEQUENCES] */
    int64_t n_window;
    struct kept *batch;        /* of the shard that is being filled */
    int64_t n_batch, batch_cap, batch_rows, batch_bytes;
    struct rt_retarget_plan plan;
    struct rt_retarget_counts counts;
    struct seen *seen;
    size_t seen_cap, seen_n;
    struct rt_progress progress;
};

static void slot_free(struct slot *s)
{
    rt_buf_free(&s->block);
    rt_buf_free(&s->place);
    rt_retarget_text_free(&s->text);
    rt_retarget_out_free(&s->out);
    *s = (struct slot){0};
}

static void kept_free(struct kept *k)
{
    rt_buf_free(&k->block);
    rt_buf_free(&k->packed.bytes);
    *k = (struct kept){0};
}

void rt_retarget_run_close(struct rt_retarget_run *r)
{
    if (r == NULL)
        return;
    for (int i = r->threads; r->set != NULL && i-- > 0;) /* the first one holds the index of all */
        rt_shard_set_free(r->set[i]);
    for (int64_t i = 0; i < r->n_window; i++)
        slot_free(&r->window[i]);
    for (int64_t i = 0; i < r->n_batch; i++)
        kept_free(&r->batch[i]);
    rt_free(r->set);
    rt_free(r->window);
    rt_free(r->batch);
    rt_free(r->seen);
    rt_shard_sink_free(r->shards);
    rt_vocab_map_free(&r->map);
    rt_retarget_counts_free(&r->counts);
    rt_free(r);
}

const struct rt_shard_info *rt_retarget_run_input(const struct rt_retarget_run *r)
{
    return rt_shard_set_info(r->set[0]);
}

const struct rt_retarget_plan *rt_retarget_run_plan(const struct rt_retarget_run *r)
{
    return &r->plan;
}

const struct rt_row_identity *rt_retarget_run_identity(const struct rt_retarget_run *r)
{
    return &r->id;
}

void rt_retarget_run_sha256(const struct rt_retarget_run *r, char out[65])
{
    struct rt_sha256 h;
    rt_sha256_init(&h);
    for (int64_t i = 0; i < rt_retarget_run_input(r)->sequences; i++) {
        const struct rt_seq_info *q = rt_shard_set_seq(r->set[0], i);
        const uint32_t n[2] = {q->occurrence, q->crc};
        rt_sha256_update(&h, q->key, sizeof q->key);
        rt_sha256_update(&h, n, sizeof n);
    }
    rt_sha256_final_hex(&h, out);
}

/* ---- open ---- */

static enum rt_status check_input(const struct rt_retarget_run *r, struct rt_err *err)
{
    const struct rt_row_identity *id = rt_shard_set_identity(r->set[0]);
    const struct rt_model_dir *t = r->o.teacher;
    const char *own = rt_tokenizer_sha256(t->tok), *tmpl = t->tmpl != NULL ? rt_template_sha256(t->tmpl) : "";
    if (id->origin.mode[0] != '\0')
        return rt_fail(err, RT_REFUSED, "%s: is retargeted already (%s): start from the teacher's own shards", r->o.shards, id->origin.mode);
    if (id->top_k == 0 && r->o.mode != RT_RETARGET_ALM)
        return rt_fail(err, RT_REFUSED, "%s: holds no logits (top_k 0), so there are no rows to rewrite: `retort logits --cache topk=64` stores them; --mode alm needs none",
                       r->o.shards);
    if (id->tokenizer_sha256[0] == '\0')
        return rt_fail(err, RT_REFUSED, "%s: was made without a tokenizer: what bytes its ids stand for is not known", r->o.shards);
    if (strcmp(id->tokenizer_sha256, own) != 0)
        return rt_fail(err, RT_REFUSED, "%s: its tokens are of the tokenizer %.16s.., %s has %.16s..: --teacher DIR says where the teacher's is", r->o.shards,
                       id->tokenizer_sha256, t->path, own);
    if (id->n_ids > (int64_t)rt_tokenizer_n_ids(t->tok))
        return rt_fail(err, RT_REFUSED, "%s: its identity says %ld ids, the tokenizer that it names (%s) has %u: the set is damaged", r->o.shards, (long)id->n_ids, t->path,
                       rt_tokenizer_n_ids(t->tok));
    if (id->template_sha256[0] != '\0' && tmpl[0] != '\0' && strcmp(id->template_sha256, tmpl) != 0)
        return rt_fail(err, RT_REFUSED, "%s: was rendered by the template %.16s.., %s has %.16s..: --teacher-template NAME where `logits` had --template NAME",
                       r->o.shards, id->template_sha256, t->path, tmpl);
    return RT_OK;
}

static enum rt_status check_stop(const struct rt_retarget_run *r, struct rt_err *err)
{
    if (r->o.stop == NULL || !r->o.stop(r->o.stop_self))
        return RT_OK;
    return rt_fail(err, RT_INTERRUPTED, "interrupted: the same command goes on behind the last whole shard");
}

/* A template that is missing is said before anything is written: reads the input only where one is. */
static enum rt_status check_templates(const struct rt_retarget_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rows rows;
    struct rt_err bad = {0};
    const bool all = r->same || (r->o.teacher->tmpl != NULL && r->o.student->tmpl != NULL), targets = rt_shard_set_identity(r->set[0])->completion_only;
    for (int64_t i = 0; !all && i < rt_retarget_run_input(r)->sequences; i++) {
        const struct rt_seq_info *q = rt_shard_set_seq(r->set[0], i);
        RT_TRY(check_stop(r, err));
        if (targets && q->n_rows == q->n_tokens - 1) /* every token is one: no conversation, as the index says already */
            continue;
        if (rt_shard_set_get(r->set[0], i, &rows, &bad) == RT_OK) /* else it will be said where it is left out */
            RT_TRY(rt_retarget_text_templates(&r->pair, &rows, err));
        rt_err_clear(&bad);
    }
out:
    return st;
}

enum rt_status rt_retarget_run_open(const struct rt_retarget_options *o, struct rt_retarget_run **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_retarget_run *r = NULL;
    const struct rt_model_dir *t = o->teacher, *s = o->student;
    RT_TRY(rt_alloc(1, sizeof *r, "retargeting", &r, err));
    r->o = *o;
    r->threads = rt_pool_threads(o->pool);
    RT_TRY(rt_alloc((size_t)r->threads, sizeof *r->set, "retargeting", &r->set, err));
    RT_TRY(rt_alloc(WINDOW_SEQUENCES, sizeof *r->window, "retargeting", &r->window, err));
    RT_TRY(rt_shard_set_open(o->shards, &r->set[0], err));
    for (int i = 1; i < r->threads; i++)
        RT_TRY(rt_shard_set_again(r->set[0], &r->set[i], err));
    RT_TRY(check_input(r, err));
    if ((int64_t)rt_tokenizer_n_ids(s->tok) > o->student_vocab)
        RT_FAIL(err, FORMAT, "%s: tokenizer.json has ids up to %u, the model's vocabulary has %ld rows", s->path, rt_tokenizer_n_ids(s->tok) - 1,
                (long)o->student_vocab);
    const struct rt_row_identity *id = rt_shard_set_identity(r->set[0]);
    r->same = strcmp(rt_tokenizer_sha256(t->tok), rt_tokenizer_sha256(s->tok)) == 0 &&
              strcmp(id->template_sha256, s->tmpl != NULL ? rt_template_sha256(s->tmpl) : "") == 0;
    rt_retarget_identity(id, s, o->student_vocab, o->mode, r->same, &r->id);
    RT_TRY(rt_vocab_map_create(t, o->student, &r->map, err));
    r->pair = (struct rt_retarget_pair){t, o->student, &r->map};
    RT_TRY(check_templates(r, err));
    RT_TRY(rt_retarget_counts_init(&r->counts, r->map.n_student, err));
    RT_TRY(rt_retarget_plan(r->set[0], &r->id, o->out, o->rows_per_shard, o->memory > 0 ? o->memory : INT64_MAX / 2, r->threads, &r->plan, err));
    *out = r;
    r = NULL;
out:
    rt_retarget_run_close(r);
    return st;
}

/* ---- a window ---- */

static void *place_copy(struct rt_buf *b, const void *data, size_t bytes)
{
    char *at = b->data + b->len;
    if (data == NULL)
        return NULL;
    memcpy(at, data, bytes);
    b->len += (bytes + 7) / 8 * 8;
    return at;
}

/* *out = a copy of src, whose arrays will be used again; it points into b. */
static enum rt_status copy_rows(const struct rt_row_identity *id, const struct rt_rows *src, struct rt_buf *b, struct rt_rows *out, struct rt_err *err)
{
    enum rt_status st;
    const size_t n = (size_t)src->n_tokens, rows = (size_t)src->n_rows, k = (size_t)src->k, lse = (size_t)src->n_lse;
    size_t bytes = n * 9 + (size_t)src->text_len + rows * (28 + 8 * k + 4 * lse) + 8 * 16, width[RT_MAX_FEATURES];
    for (int f = 0; f < src->n_features; f++) {
        width[f] = (size_t)id->feature[f].dim * rt_dtype_size(id->feature[f].dtype);
        bytes += n * (width[f] + 5) + 24;
    }
    RT_TRY(rt_buf_reserve(b, bytes, err));
    *out = *src;
    out->ids = place_copy(b, src->ids, n * 4);
    out->loss_mask = place_copy(b, src->loss_mask, n);
    out->text = place_copy(b, src->text, (size_t)src->text_len);
    out->byte_end = place_copy(b, src->byte_end, n * 4);
    out->position = place_copy(b, src->position, rows * 4);
    out->topk_ids = place_copy(b, src->topk_ids, rows * k * 4);
    out->topk_logits = place_copy(b, src->topk_logits, rows * k * 4);
    out->lse = place_copy(b, src->lse, rows * lse * 4);
    out->next_id = place_copy(b, src->next_id, rows * 4);
    out->next_logprob = place_copy(b, src->next_logprob, rows * 4);
    out->next_rank = place_copy(b, src->next_rank, rows * 4);
    out->boundary_logp = place_copy(b, src->boundary_logp, rows * 4);
    out->span = place_copy(b, src->span, rows * 4);
    out->span_logp = place_copy(b, src->span_logp, rows * 4);
    out->feature_mask = place_copy(b, src->feature_mask, n);
    for (int f = 0; f < src->n_features; f++) {
        out->feature[f] = place_copy(b, src->feature[f], n * width[f]);
        out->feature_scale[f] = place_copy(b, src->feature_scale[f], n * 4);
    }
out:
    return st;
}

static void read_item(void *ctx, int64_t item, int worker)
{
    struct rt_retarget_run *r = ctx;
    struct slot *s = &r->window[item];
    struct rt_rows rows;
    s->st = rt_shard_set_get(r->set[worker], s->index, &rows, &s->err);
    s->reject = RT_REJECT_NONE;
    if (s->st == RT_FORMAT) {
        s->reject = RT_REJECT_DAMAGED;
        s->st = RT_OK;
    } else if (s->st == RT_OK) {
        s->st = copy_rows(rt_shard_set_identity(r->set[worker]), &rows, &s->block, &s->rows, &s->err);
    }
}

static void row_item(void *ctx, int64_t item, int worker)
{
    struct rt_retarget_run *r = ctx;
    struct slot *s = &r->window[item];
    (void)worker;
    if (s->st != RT_OK || s->reject != RT_REJECT_NONE)
        return;
    const struct rt_side *side = &s->text.student;
    s->st = rt_buf_reserve(&s->place, (size_t)side->n * sizeof(struct rt_place), &s->err);
    if (s->st != RT_OK)
        return;
    struct rt_place *place = (struct rt_place *)(void *)s->place.data;
    rt_align(&s->text.teacher, side, place);
    const struct rt_retarget_in in = {.map = &r->map, .id = rt_shard_set_identity(r->set[0]), .rows = &s->rows, .teacher = s->text.teacher, .student = *side,
                                      .place = place, .text = r->same ? s->rows.text : s->text.text.data,
                                      .text_len = r->same ? s->rows.text_len : (int64_t)s->text.text.len,
                                      .byte_end = r->same ? s->rows.byte_end : s->text.enc.byte_end, .gamma = r->o.gamma};
    s->counts.kept = 1;
    s->counts.earlier_turns = s->text.earlier;
    for (int64_t i = s->text.teacher.first > 0 ? s->text.teacher.first : 1; i < s->text.teacher.n; i++)
        s->counts.teacher_tokens += s->rows.loss_mask[i];
    for (int64_t i = 0; i < s->rows.n_rows; i++)
        s->counts.teacher_rows += s->rows.loss_mask[s->rows.position[i] + 1];
    s->st = rt_retarget_rows(&in, r->o.mode, &s->out, &s->made, &s->counts, &s->err);
    if (s->st != RT_OK || !r->same || r->o.mode == RT_RETARGET_ALM)
        return;
    const uint8_t *mask = s->made.feature_mask; /* the rows as they are, those of tokens that are no targets too */
    s->made = s->rows;
    s->made.feature_mask = mask;
    if (mask != NULL)
        memset(s->out.feature_mask.data, 1, (size_t)s->rows.n_tokens);
}

/* Sequences [from, *to) into the window's slots. */
static enum rt_status fill_window(struct rt_retarget_run *r, int64_t from, int64_t *to, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_row_identity *id = rt_shard_set_identity(r->set[0]);
    const int64_t n = rt_retarget_run_input(r)->sequences;
    int64_t bytes = 0;
    for (*to = from; *to < n && r->n_window < WINDOW_SEQUENCES; ++*to) {
        const struct rt_seq_info *q = rt_shard_set_seq(r->set[0], *to);
        bytes += rt_retarget_seq_bytes(id, q->n_tokens, 8 * q->n_tokens, q->n_rows);
        if (*to > from && bytes > r->plan.window_bytes)
            break;
        r->window[r->n_window++] = (struct slot){.index = *to};
    }
    rt_pool_run(r->o.pool, r->n_window, read_item, r);
    for (int64_t i = 0; i < r->n_window; i++) {
        struct slot *s = &r->window[i];
        if (s->st != RT_OK)
            RT_TRY(rt_fail(err, s->st, "%s", s->err.msg));
        if (s->reject == RT_REJECT_DAMAGED)
            rt_warn(r->o.log, "left out: %s", s->err.msg);
        else if (r->same)
            RT_TRY(rt_retarget_text_same(&r->pair, &s->rows, &s->text, &s->reject, err));
        else
            RT_TRY(rt_retarget_text_make(&r->pair, &s->rows, &s->text, &s->reject, err));
    }
    rt_pool_run(r->o.pool, r->n_window, row_item, r);
    for (int64_t i = 0; i < r->n_window; i++)
        if (r->window[i].st != RT_OK)
            RT_TRY(rt_fail(err, r->window[i].st, "%s", r->window[i].err.msg));
out:
    return st;
}

/* ---- output ---- */

static enum rt_status grow_seen(struct rt_retarget_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct seen *bigger;
    const size_t cap = r->seen_cap > 0 ? 2 * r->seen_cap : 1024;
    if (2 * (r->seen_n + 1) <= r->seen_cap)
        return RT_OK;
    RT_TRY(rt_alloc(cap, sizeof *bigger, "keys of sequences", &bigger, err));
    for (size_t i = 0; i < r->seen_cap; i++) {
        size_t at;
        if (r->seen[i].count == 0)
            continue;
        memcpy(&at, r->seen[i].key, sizeof at);
        for (at &= cap - 1; bigger[at].count > 0; at = (at + 1) & (cap - 1))
            ;
        bigger[at] = r->seen[i];
    }
    rt_free(r->seen);
    r->seen = bigger;
    r->seen_cap = cap;
out:
    return st;
}

/* *before = how often key was there; counts it. */
static enum rt_status count_key(struct rt_retarget_run *r, const uint8_t key[RT_KEY_BYTES], uint32_t *before, struct rt_err *err)
{
    size_t at;
    const enum rt_status st = grow_seen(r, err);
    if (st != RT_OK)
        return st;
    memcpy(&at, key, sizeof at);
    for (at &= r->seen_cap - 1; r->seen[at].count > 0 && memcmp(r->seen[at].key, key, RT_KEY_BYTES) != 0;)
        at = (at + 1) & (r->seen_cap - 1);
    r->seen_n += r->seen[at].count == 0;
    memcpy(r->seen[at].key, key, RT_KEY_BYTES);
    *before = r->seen[at].count++;
    return RT_OK;
}

struct packing {
    struct rt_retarget_run *r;
    int64_t first;
};

static void pack_item(void *ctx, int64_t item, int worker)
{
    const struct packing *p = ctx;
    struct kept *k = &p->r->batch[p->first + item];
    (void)worker;
    k->st = rt_shard_sink_pack(p->r->shards, &k->rows, item, &k->packed, &k->err);
}

static int64_t kept_bytes(const struct rt_retarget_run *r, const struct rt_rows *rows)
{
    return rt_retarget_seq_bytes(&r->id, rows->n_tokens, rows->text_len, rows->n_rows);
}

/* Packs and puts the batch, as much at a time as a window is large. */
static enum rt_status put_batch(struct rt_retarget_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int64_t i = 0, to; i < r->n_batch; i = to) {
        int64_t bytes = kept_bytes(r, &r->batch[i].rows);
        for (to = i + 1; to < r->n_batch && bytes < r->plan.window_bytes; to++)
            bytes += kept_bytes(r, &r->batch[to].rows);
        struct packing p = {r, i};
        rt_pool_run(r->o.pool, to - i, pack_item, &p);
        for (int64_t j = i; j < to; j++) {
            struct kept *k = &r->batch[j];
            if (k->st != RT_OK)
                RT_TRY(rt_fail(err, k->st, "%s", k->err.msg));
            RT_TRY(rt_shard_sink_put_packed(r->shards, &k->packed, err));
            kept_free(k);
        }
    }
out:
    return st;
}

/* The batch becomes a shard, with its report in the header. */
static enum rt_status flush(struct rt_retarget_run *r, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    struct rt_buf text = {0};
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_retarget_report_json(&r->counts, r->o.student->tok, v, err));
    RT_TRY(rt_json_dump(v, 0, &text, err));
    RT_TRY(rt_shard_sink_report(r->shards, text.data, text.len, err));
    for (int64_t i = 0; i < r->n_batch; i++)
        RT_TRY(count_key(r, r->batch[i].rows.key, &r->batch[i].rows.occurrence, err));
    RT_TRY(put_batch(r, err));
    RT_TRY(rt_shard_sink_cut(r->shards, err));
    r->n_batch = r->batch_rows = r->batch_bytes = 0;
    rt_retarget_counts_clear(&r->counts);
out:
    rt_buf_free(&text);
    rt_json_free(v);
    return st;
}

/* Copies what was made of the slot's sequence into the batch. */
static enum rt_status keep(struct rt_retarget_run *r, struct slot *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct kept *bigger;
    if (r->n_batch == r->batch_cap) {
        const int64_t cap = r->batch_cap > 0 ? 2 * r->batch_cap : 256;
        RT_TRY(rt_alloc((size_t)cap, sizeof *bigger, "sequences of a shard", &bigger, err));
        if (r->n_batch > 0)
            memcpy(bigger, r->batch, (size_t)r->n_batch * sizeof *bigger);
        rt_free(r->batch);
        r->batch = bigger;
        r->batch_cap = cap;
    }
    struct kept *k = &r->batch[r->n_batch];
    *k = (struct kept){0};
    r->n_batch++;
    RT_TRY(copy_rows(&r->id, &s->made, &k->block, &k->rows, err));
    r->batch_rows += k->rows.n_rows;
    r->batch_bytes += kept_bytes(r, &k->rows);
out:
    return st;
}

static void count_crossing(struct rt_retarget_run *r, const struct slot *s)
{
    const struct rt_place *place = (const struct rt_place *)(const void *)s->place.data;
    for (int64_t i = s->text.student.first; i < s->text.student.n; i++)
        if (place[i].kind == RT_PLACE_CROSSING)
            r->counts.crossing[s->text.student.ids[i]]++;
}

/* The window's sequences in order: kept ones into the batch, which becomes a shard as soon as one more comes. */
static enum rt_status drain(struct rt_retarget_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int64_t i = 0; i < r->n_window; i++) {
        struct slot *s = &r->window[i];
        const bool good = s->reject == RT_REJECT_NONE;
        if (good && (r->batch_rows >= r->plan.rows_per_shard || r->batch_bytes >= r->plan.shard_bytes)) {
            RT_TRY(flush(r, err));
            RT_TRY(check_stop(r, err));
        }
        s->counts.sequences = 1;
        if (!good)
            s->counts.rejected[s->reject] = 1;
        rt_retarget_counts_add(&r->counts, &s->counts);
        if (good) {
            count_crossing(r, s);
            RT_TRY(keep(r, s, err));
        }
        slot_free(s);
    }
    r->n_window = 0;
out:
    return st;
}

enum rt_status rt_retarget_set_counts(const struct rt_shard_set *set, struct rt_retarget_counts *counts, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_json *v = NULL;
    for (int64_t i = 0; i < rt_shard_set_info(set)->shards; i++) {
        const char *text = rt_shard_set_report(set, (int)i);
        RT_TRY(rt_json_parse(text, strlen(text), rt_shard_set_file(set, (int)i), &v, err));
        RT_TRY(rt_retarget_report_read(v, counts, err));
        rt_json_free(v);
        v = NULL;
    }
out:
    rt_json_free(v);
    return st;
}

/* What is published: the input that it used up, and its keys. */
static enum rt_status resume(struct rt_retarget_run *r, struct rt_retarget_counts *counts, int64_t *used, bool *finished, struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_resume was;
    struct rt_shard_set *set = NULL;
    uint32_t before;
    const struct rt_shard_options so = {.rows_per_shard = r->plan.rows_per_shard};
    RT_TRY(rt_shard_sink_open(r->o.out, &r->id, &so, &r->shards, &r->sink, &was, err));
    *finished = was.finished;
    *used = 0;
    if (was.sequences == 0)
        goto out;
    RT_TRY(rt_shard_set_open(r->o.out, &set, err));
    RT_TRY(rt_retarget_set_counts(set, counts, err));
    for (int64_t i = 0; i < was.sequences; i++)
        RT_TRY(count_key(r, rt_shard_set_seq(set, i)->key, &before, err));
    *used = counts->sequences;
out:
    rt_shard_set_free(set);
    return st;
}

enum rt_status rt_retarget_run_all(struct rt_retarget_run *r, struct rt_retarget_counts *counts, struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_set *set = NULL;
    const int64_t n = rt_retarget_run_input(r)->sequences;
    int64_t at, to;
    bool finished;
    RT_TRY(resume(r, counts, &at, &finished, err));
    if (finished)
        goto out;
    rt_progress_begin(&r->progress, r->o.log, "retargeting", "sequences", n);
    r->progress.first = at;
    for (; at < n; at = to) {
        RT_TRY(check_stop(r, err));
        RT_TRY(fill_window(r, at, &to, err));
        RT_TRY(drain(r, err));
        rt_progress_update(&r->progress, to, NULL);
    }
    rt_retarget_counts_add(counts, &r->counts);
    if (r->n_batch > 0)
        RT_TRY(flush(r, err));
    if (counts->kept == 0)
        RT_FAIL(err, FORMAT, "%s: not one of %ld sequences could be retargeted (%ld damaged, %ld whose bytes do not agree, %ld not UTF-8, %ld not NFC, %ld with an "
                "unknown prompt, %ld changed by the template, %ld without a target)", r->o.shards, (long)counts->sequences,
                (long)counts->rejected[RT_REJECT_DAMAGED], (long)counts->rejected[RT_REJECT_BYTES], (long)counts->rejected[RT_REJECT_UTF8],
                (long)counts->rejected[RT_REJECT_NFC], (long)counts->rejected[RT_REJECT_PROMPT], (long)counts->rejected[RT_REJECT_RENDER],
                (long)counts->rejected[RT_REJECT_EMPTY]);
    RT_TRY(r->sink.finish(r->sink.self, err));
    rt_retarget_counts_clear(counts); /* from the shards themselves, so that a resumed run says the same */
    RT_TRY(rt_shard_set_open(r->o.out, &set, err));
    RT_TRY(rt_retarget_set_counts(set, counts, err));
out:
    rt_shard_set_free(set);
    rt_progress_end(&r->progress);
    return st;
}
