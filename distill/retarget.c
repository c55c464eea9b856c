#include "distill/retarget.h"

#include <math.h>
#include <string.h>

#include "distill/retarget_alm.h"
#include "distill/retarget_row.h"

const char *rt_retarget_mode_name(enum rt_retarget_mode mode)
{
    static const char *const names[RT_RETARGET_MODES] = {"exact", "strict", "alm"};
    return names[mode];
}

void rt_retarget_out_free(struct rt_retarget_out *o)
{
    struct rt_buf *const b[] = {&o->position, &o->topk_ids, &o->topk_logits, &o->lse, &o->next_id, &o->next_logprob, &o->next_rank, &o->span, &o->span_logp,
                                &o->feature_mask, &o->scratch};
    for (size_t i = 0; i < sizeof b / sizeof b[0]; i++)
        rt_buf_free(b[i]);
    for (int f = 0; f < RT_MAX_FEATURES; f++) {
        rt_buf_free(&o->feature[f]);
        rt_buf_free(&o->scale[f]);
    }
    *o = (struct rt_retarget_out){0};
}

void rt_retarget_identity(const struct rt_row_identity *id, const struct rt_model_dir *student, int64_t student_vocab, enum rt_retarget_mode mode,
                          bool same, struct rt_row_identity *out)
{
    struct rt_row_identity x = *id;
    const bool same_tokenizer = strcmp(id->tokenizer_sha256, rt_tokenizer_sha256(student->tok)) == 0;
    memcpy(x.origin.tokenizer_sha256, id->tokenizer_sha256, sizeof x.origin.tokenizer_sha256);
    memcpy(x.origin.template_sha256, id->template_sha256, sizeof x.origin.template_sha256);
    x.origin.vocab_size = id->vocab_size;
    x.origin.n_ids = id->n_ids;
    x.origin.completion_only = id->completion_only;
    memset(x.origin.mode, 0, sizeof x.origin.mode);
    strcpy(x.origin.mode, rt_retarget_mode_name(mode));
    memset(x.tokenizer_sha256, 0, sizeof x.tokenizer_sha256);
    memset(x.template_sha256, 0, sizeof x.template_sha256);
    strcpy(x.tokenizer_sha256, rt_tokenizer_sha256(student->tok));
    strcpy(x.template_sha256, student->tmpl != NULL ? rt_template_sha256(student->tmpl) : "");
    x.vocab_size = student_vocab;
    x.n_ids = rt_tokenizer_n_ids(student->tok);
    x.completion_only = id->completion_only || !same;
    if (mode == RT_RETARGET_ALM) {
        x.top_k = 0;
        x.completion_only = true;
    }
    x.boundary = id->boundary && (same || mode == RT_RETARGET_ALM);
    if (!same_tokenizer || mode == RT_RETARGET_ALM) {
        x.n_lse = 1;
        memset(x.lse_temperature, 0, sizeof x.lse_temperature);
        x.lse_temperature[0] = 1;
    }
    *out = x;
}

/* ---- one row ---- */

/* A target of the student and the teacher's row for it. */
struct spot {
    int64_t i, row;      /* student token; index of the teacher's row */
    const struct rt_place *place;
    uint32_t said, want; /* the realised tokens of both sides */
    int at1;             /* lse at T = 1 */
};

struct work {
    const struct rt_retarget_in *in;
    struct rt_retarget_out *out;
    struct rt_retarget_counts *counts;
    struct rt_row_work row;
    bool copy;           /* every token is itself: rows keep their bits */
    struct rt_err *err;
};

static int lse_at_one(const struct rt_row_identity *id)
{
    for (int i = 0; i < id->n_lse; i++)
        if (id->lse_temperature[i] == 1)
            return i;
    return 0;
}

/* Sum of the stored probabilities of the teacher's row. */
static double stored_mass(const struct rt_rows *r, int64_t row, double lse)
{
    double sum = 0;
    for (int j = 0; j < r->k; j++)
        sum += exp((double)r->topk_logits[row * r->k + j] - lse);
    return sum;
}

/* The mass outside the stored ids: none where every id is stored, whatever float32 makes of the sum. */
static double tail_mass(const struct rt_retarget_in *in, int64_t row, double lse)
{
    return in->rows->k >= in->id->n_ids ? 0 : fmax(0, 1 - stored_mass(in->rows, row, lse));
}

/* The entries that begin a token: t(u) += q(w), u from `to`. *listed: the realised token is among them. */
static void collect_head(struct work *w, const struct spot *s, bool equal, bool *listed)
{
    const struct rt_vocab_map *m = w->in->map;
    const struct rt_rows *r = w->in->rows;
    const uint32_t *ids = r->topk_ids + s->row * r->k;
    const float *logit = r->topk_logits + s->row * r->k;
    const double lse = (double)r->lse[s->row * r->n_lse + s->at1];
    *listed = false;
    rt_row_begin(&w->row);
    for (int j = 0; j < r->k; j++) {
        if (ids[j] >= m->n_teacher)
            continue;
        *listed |= ids[j] == s->said;
        const uint32_t u = ids[j] == s->said ? s->want : equal ? m->equal[ids[j]] : rt_vocab_first(m, ids[j], 0);
        rt_row_add(&w->row, u, logit[j], exp((double)logit[j] - lse));
    }
}

/* The entries that extend the bytes said already. */
static void collect_inside(struct work *w, const struct spot *s, bool *listed)
{
    const struct rt_vocab_map *m = w->in->map;
    const struct rt_rows *r = w->in->rows;
    const uint32_t *ids = r->topk_ids + s->row * r->k;
    const float *logit = r->topk_logits + s->row * r->k;
    const double lse = (double)r->lse[s->row * r->n_lse + s->at1];
    const size_t said = s->place->offset;
    const char *prefix = "", *bytes;
    size_t len = 0;
    *listed = false;
    rt_tokenizer_bytes(m->teacher, s->said, &prefix, &len);
    rt_row_begin(&w->row);
    for (int j = 0; j < r->k; j++) {
        const uint32_t id = ids[j];
        if (id >= m->n_teacher || m->opaque[id] || !rt_tokenizer_bytes(m->teacher, id, &bytes, &len) || len <= said ||
            memcmp(bytes, prefix, said) != 0)
            continue;
        *listed |= id == s->said;
        rt_row_add(&w->row, id == s->said ? s->want : rt_vocab_first(m, id, (uint32_t)said), logit[j], exp((double)logit[j] - lse));
    }
}

static enum rt_status put_floats(struct rt_buf *b, const float *v, int n, struct rt_err *err)
{
    return rt_buf_append(b, v, (size_t)n * sizeof *v, err);
}

/* Position, next token and what the sink checks of it. */
static enum rt_status put_next(struct work *w, const struct spot *s, float logprob, uint32_t rank)
{
    enum rt_status st;
    const uint32_t position = (uint32_t)(s->i - 1);
    struct rt_retarget_out *o = w->out;
    RT_TRY(rt_buf_append(&o->position, &position, sizeof position, w->err));
    RT_TRY(rt_buf_append(&o->next_id, &s->want, sizeof s->want, w->err));
    RT_TRY(rt_buf_append(&o->next_logprob, &logprob, sizeof logprob, w->err));
    RT_TRY(rt_buf_append(&o->next_rank, &rank, sizeof rank, w->err));
    o->n_rows++;
out:
    return st;
}

static void count_row(struct work *w, const struct spot *s, double mass)
{
    mass = mass < 1 ? mass : 1; /* float32 logits: above 1 by rounding alone */
    w->counts->rows[s->place->kind]++;
    w->counts->mass[s->place->kind] += mass;
    w->counts->residual[s->place->kind] += 1 - mass;
    w->counts->digits_rows += w->in->map->digits[s->want];
}

/* Writes the closed row. scale: what probabilities are divided by (1 where nothing was left out). */
static enum rt_status put_row(struct work *w, const struct spot *s, double scale)
{
    enum rt_status st;
    const struct rt_rows *r = w->in->rows;
    struct rt_retarget_out *o = w->out;
    const struct rt_row_work *row = &w->row;
    const uint32_t none = RT_NO_ID;
    const float empty = -INFINITY, teacher_lse = r->lse[s->row * r->n_lse + s->at1];
    const float lse = scale == 1 ? teacher_lse : (float)(log(scale) + (double)teacher_lse);
    const int at = rt_row_find(row, s->want);
    /* where the next token is not listed, what is known of it at least: what the teacher gave its own realised token */
    const float said = scale == 1 ? r->next_logprob[s->row] : fminf((float)(r->next_logprob[s->row] - log(scale)), 0);
    const float logprob = at < 0 ? said : row->logit[at] - lse;
    RT_TRY(rt_buf_append(&o->topk_ids, row->id, (size_t)row->n * sizeof *row->id, w->err));
    RT_TRY(put_floats(&o->topk_logits, row->logit, row->n, w->err));
    for (int j = row->n; j < o->k; j++) {
        RT_TRY(rt_buf_append(&o->topk_ids, &none, sizeof none, w->err));
        RT_TRY(put_floats(&o->topk_logits, &empty, 1, w->err));
    }
    if (scale == 1 && o->n_lse == r->n_lse)
        RT_TRY(put_floats(&o->lse, r->lse + s->row * r->n_lse, r->n_lse, w->err));
    else
        for (int t = 0; t < o->n_lse; t++) /* other temperatures than 1 are there only where both sides have one tokenizer */
            RT_TRY(put_floats(&o->lse, &lse, 1, w->err));
    RT_TRY(put_next(w, s, logprob, at >= 0 ? (uint32_t)at : (uint32_t)row->n));
    count_row(w, s, row->kept / scale);
out:
    return st;
}

static enum rt_status copy_row(struct work *w, const struct spot *s)
{
    enum rt_status st;
    const struct rt_rows *r = w->in->rows;
    RT_TRY(rt_buf_append(&w->out->topk_ids, r->topk_ids + s->row * r->k, (size_t)r->k * sizeof *r->topk_ids, w->err));
    RT_TRY(put_floats(&w->out->topk_logits, r->topk_logits + s->row * r->k, r->k, w->err));
    RT_TRY(put_floats(&w->out->lse, r->lse + s->row * r->n_lse, r->n_lse, w->err));
    RT_TRY(put_next(w, s, r->next_logprob[s->row], r->next_rank[s->row]));
    count_row(w, s, stored_mass(r, s->row, (double)r->lse[s->row * r->n_lse + s->at1]));
out:
    return st;
}

/* ---- modes: the row of one target, or why there is none (*mask, RT_MASK_COUNT: there is) ---- */

static enum rt_status exact_row(struct work *w, const struct spot *s, enum rt_mask *mask)
{
    const struct rt_rows *r = w->in->rows;
    const double lse = (double)r->lse[s->row * r->n_lse + s->at1];
    double scale = 1;
    bool listed;
    if (s->place->kind == RT_PLACE_INSIDE) {
        collect_inside(w, s, &listed);
        *mask = !listed ? RT_MASK_UNLISTED : w->row.kept < RT_LITTLE_MASS ? RT_MASK_LITTLE : RT_MASK_COUNT;
        if (*mask != RT_MASK_COUNT)
            return RT_OK;
        const double tail = tail_mass(w->in, s->row, lse);
        *mask = tail > w->row.kept ? RT_MASK_LOOSE : RT_MASK_COUNT;
        if (*mask != RT_MASK_COUNT)
            return RT_OK;
        w->counts->evidence += w->row.kept;
        w->counts->bounded += tail > 1e-6; /* below it, float32 rounding of lse and logits */
        scale = w->row.kept + tail;
    } else {
        collect_head(w, s, false, &listed);
        *mask = w->row.n == 0 ? RT_MASK_LITTLE : RT_MASK_COUNT;
        if (*mask != RT_MASK_COUNT)
            return RT_OK;
    }
    rt_row_close(&w->row);
    return put_row(w, s, scale);
}

static enum rt_status strict_row(struct work *w, const struct spot *s, enum rt_mask *mask)
{
    const struct rt_rows *r = w->in->rows;
    bool listed;
    *mask = s->place->kind != RT_PLACE_WHOLE ? RT_MASK_SPLIT : RT_MASK_COUNT;
    if (*mask != RT_MASK_COUNT)
        return RT_OK;
    collect_head(w, s, true, &listed);
    *mask = w->row.kept < RT_LITTLE_MASS ? RT_MASK_LITTLE : RT_MASK_COUNT;
    if (*mask != RT_MASK_COUNT)
        return RT_OK;
    rt_row_close(&w->row);
    if (w->in->map->same) /* what little is not shared stays residual: the sums at other temperatures hold as they are */
        return put_row(w, s, 1);
    return put_row(w, s, w->row.kept + tail_mass(w->in, s->row, (double)r->lse[s->row * r->n_lse + s->at1]));
}

typedef enum rt_status mode_row(struct work *w, const struct spot *s, enum rt_mask *mask);

/* ---- a sequence ---- */

static bool spot_mask(const struct work *w, const struct spot *s, enum rt_mask *mask)
{
    const struct rt_vocab_map *m = w->in->map;
    const enum rt_place_kind kind = s->place->kind;
    if (kind == RT_PLACE_NONE)
        *mask = RT_MASK_FORCED;
    else if (kind == RT_PLACE_CROSSING)
        *mask = RT_MASK_CROSSING;
    else if (m->blank[s->want] && !m->same)
        *mask = RT_MASK_BLANK;
    else if (m->same && kind != RT_PLACE_WHOLE)
        *mask = RT_MASK_SPLIT;
    else if (m->opaque[s->said] && (kind != RT_PLACE_WHOLE || m->equal[s->said] == RT_NO_ID))
        *mask = RT_MASK_SPECIAL;
    else if (s->row < 0)
        *mask = RT_MASK_UNSTORED;
    else
        return false;
    return true;
}

void rt_retarget_count_target(const struct rt_retarget_in *in, int64_t i, struct rt_retarget_counts *c)
{
    const struct rt_place *p = &in->place[i];
    const uint32_t id = in->student.ids[i];
    c->targets++;
    c->kind[p->kind]++;
    c->boundary += p->teacher >= 0 && p->offset == 0;
    c->digits += in->map->digits[id];
    c->digits_whole += in->map->digits[id] && p->kind == RT_PLACE_WHOLE;
    if (p->kind == RT_PLACE_CROSSING && c->crossing != NULL)
        c->crossing[id]++;
}

static enum rt_status begin(struct work *w)
{
    enum rt_status st;
    struct rt_retarget_out *o = w->out;
    const struct rt_retarget_in *in = w->in;
    struct rt_buf *const b[] = {&o->position, &o->topk_ids, &o->topk_logits, &o->lse, &o->next_id, &o->next_logprob, &o->next_rank};
    const size_t bytes = rt_row_work_bytes(in->rows->k);
    o->n_rows = 0;
    o->k = in->id->top_k < (int64_t)in->map->n_student ? in->id->top_k : (int)in->map->n_student;
    o->n_lse = in->map->same ? in->id->n_lse : 1;
    for (size_t i = 0; i < sizeof b / sizeof b[0]; i++) {
        b[i]->len = 0;
        RT_TRY(rt_buf_reserve(b[i], 64, w->err));
    }
    RT_TRY(rt_buf_reserve(&o->scratch, bytes, w->err));
    rt_row_work_init(&w->row, in->rows->k, o->scratch.data);
out:
    return st;
}

/* Row by row: what `mode` makes of each target. */
static enum rt_status make_rows(const struct rt_retarget_in *in, struct rt_retarget_out *out, mode_row *mode, struct rt_retarget_counts *counts,
                                struct rt_err *err)
{
    enum rt_status st;
    struct work w = {.in = in, .out = out, .counts = counts, .err = err};
    const struct rt_rows *r = in->rows;
    const int at1 = lse_at_one(in->id);
    int64_t next = 0; /* the teacher's rows, in step with its tokens */
    w.copy = in->map->same && in->map->teacher_end == in->map->student_end;
    RT_TRY(begin(&w));
    for (int64_t i = in->student.first > 0 ? in->student.first : 1; i < in->student.n; i++) {
        struct spot s = {.i = i, .row = -1, .place = &in->place[i], .want = in->student.ids[i], .at1 = at1};
        enum rt_mask mask = RT_MASK_COUNT;
        if (in->student.target != NULL && in->student.target[i] == 0)
            continue;
        if (s.place->teacher >= 0) {
            s.said = in->teacher.ids[s.place->teacher];
            while (next < r->n_rows && (int64_t)r->position[next] + 1 < s.place->teacher)
                next++;
            if (r->k > 0 && next < r->n_rows && (int64_t)r->position[next] + 1 == s.place->teacher)
                s.row = next;
        }
        rt_retarget_count_target(in, i, counts);
        if (!spot_mask(&w, &s, &mask))
            RT_TRY(w.copy ? copy_row(&w, &s) : mode(&w, &s, &mask));
        if (mask != RT_MASK_COUNT)
            counts->masked[mask]++;
    }
out:
    return st;
}

static enum rt_status exact(const struct rt_retarget_in *in, struct rt_retarget_out *out, struct rt_retarget_counts *counts, struct rt_err *err)
{
    return make_rows(in, out, exact_row, counts, err);
}

static enum rt_status strict(const struct rt_retarget_in *in, struct rt_retarget_out *out, struct rt_retarget_counts *counts, struct rt_err *err)
{
    return make_rows(in, out, strict_row, counts, err);
}

/* States of teacher tokens whose bytes end where a student token's do. */
static enum rt_status pair_states(const struct rt_retarget_in *in, struct rt_retarget_out *o, struct rt_retarget_counts *counts, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_rows *r = in->rows;
    const size_t n = (size_t)in->student.n;
    if (r->n_features == 0)
        return RT_OK;
    o->feature_mask.len = 0;
    RT_TRY(rt_buf_reserve(&o->feature_mask, n, err));
    for (int f = 0; f < r->n_features; f++) {
        const size_t bytes = (size_t)in->id->feature[f].dim * rt_dtype_size(in->id->feature[f].dtype);
        o->feature[f].len = o->scale[f].len = 0;
        RT_TRY(rt_buf_reserve(&o->feature[f], n * bytes, err));
        memset(o->feature[f].data, 0, n * bytes);
        RT_TRY(rt_buf_reserve(&o->scale[f], n * sizeof(float), err));
        memset(o->scale[f].data, 0, n * sizeof(float));
        for (size_t i = 0; i < n; i++) {
            const struct rt_place *p = &in->place[i];
            const bool paired = p->last >= 0 && p->ends;
            o->feature_mask.data[i] = (char)paired;
            if (!paired)
                continue;
            memcpy(o->feature[f].data + i * bytes, (const char *)r->feature[f] + (size_t)p->last * bytes, bytes);
            if (r->feature_scale[f] != NULL)
                memcpy(o->scale[f].data + i * sizeof(float), &r->feature_scale[f][p->last], sizeof(float));
        }
    }
    for (size_t i = 0; i < n; i++) {
        counts->states += in->place[i].last >= 0;
        counts->states_paired += o->feature_mask.data[i];
    }
out:
    return st;
}

static void point(const struct rt_retarget_in *in, const struct rt_retarget_out *o, struct rt_rows *rows)
{
    *rows = (struct rt_rows){.source_line = in->rows->source_line, .n_tokens = in->student.n, .ids = in->student.ids, .loss_mask = in->student.target,
                             .text = in->text, .text_len = in->text_len, .byte_end = in->byte_end, .n_rows = o->n_rows, .k = o->k, .n_lse = o->n_lse,
                             .n_features = in->rows->n_features};
    rt_rows_key(rows->ids, rows->n_tokens, rows->key);
    rows->position = (const void *)o->position.data;
    rows->topk_ids = (const void *)o->topk_ids.data;
    rows->topk_logits = (const void *)o->topk_logits.data;
    rows->lse = (const void *)o->lse.data;
    rows->next_id = (const void *)o->next_id.data;
    rows->next_logprob = (const void *)o->next_logprob.data;
    rows->next_rank = (const void *)o->next_rank.data;
    rows->span = (const void *)o->span.data;
    rows->span_logp = (const void *)o->span_logp.data;
    for (int f = 0; f < rows->n_features; f++) {
        rows->feature[f] = o->feature[f].data;
        rows->feature_scale[f] = in->rows->feature_scale[f] != NULL ? (const float *)(const void *)o->scale[f].data : NULL;
    }
    rows->feature_mask = rows->n_features > 0 ? (const uint8_t *)o->feature_mask.data : NULL;
}

enum rt_status rt_retarget_rows(const struct rt_retarget_in *in, enum rt_retarget_mode mode, struct rt_retarget_out *out, struct rt_rows *rows,
                                struct rt_retarget_counts *counts, struct rt_err *err)
{
    enum rt_status st;
    static rt_retarget_mode_fn *const modes[RT_RETARGET_MODES] = {exact, strict, rt_retarget_alm};
    RT_TRY(modes[mode](in, out, counts, err));
    RT_TRY(pair_states(in, out, counts, err));
    point(in, out, rows);
out:
    return st;
}
