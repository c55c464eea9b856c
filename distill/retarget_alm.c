/* Mode alm: the teacher's log-probabilities of runs of bytes, in place of its distributions (distill/spans.h). */
#include "distill/retarget_alm.h"

#include <math.h>
#include <string.h>

#include "distill/spans.h"

/* Least logarithm of a boundary's mass: one that is not there at all leaves the span finite. */
static const float LEAST_BOUNDARY = -80;

struct work {
    const struct rt_retarget_in *in;
    struct rt_retarget_out *out;
    struct rt_retarget_counts *counts;
    float *logp, *boundary; /* [teacher.n] of each token; log mass of a boundary behind it, NAN: not known */
    uint8_t *stored;        /* [teacher.n] logp is known */
    struct rt_span *span;   /* [teacher.n] */
    int64_t *row;           /* [student.n] its row, -1: no target */
    struct rt_err *err;
};

static bool is_target(const struct rt_retarget_in *in, int64_t i)
{
    return i >= 1 && i < in->student.n && (in->student.target == NULL || in->student.target[i] != 0);
}

/* Cuts the arrays from the scratch. */
static enum rt_status begin(struct work *w)
{
    enum rt_status st;
    struct rt_retarget_out *o = w->out;
    const size_t t = (size_t)w->in->teacher.n, s = (size_t)w->in->student.n;
    struct rt_buf *const b[] = {&o->position, &o->topk_ids, &o->topk_logits, &o->lse, &o->next_id, &o->next_logprob, &o->next_rank, &o->span, &o->span_logp};
    o->n_rows = 0;
    o->k = 0;
    o->n_lse = 1;
    for (size_t i = 0; i < sizeof b / sizeof b[0]; i++) {
        b[i]->len = 0;
        RT_TRY(rt_buf_reserve(b[i], 64, w->err));
    }
    o->scratch.len = 0;
    RT_TRY(rt_buf_reserve(&o->scratch, t * (sizeof *w->span + 2 * sizeof(float) + 1) + s * sizeof *w->row + 64, w->err));
    w->span = (struct rt_span *)(void *)o->scratch.data;
    w->row = (int64_t *)(void *)(w->span + t);
    w->logp = (float *)(void *)(w->row + s);
    w->boundary = w->logp + t;
    w->stored = (uint8_t *)(void *)(w->boundary + t);
out:
    return st;
}

static void read_teacher(struct work *w)
{
    const struct rt_rows *r = w->in->rows;
    for (int64_t j = 0; j < w->in->teacher.n; j++) {
        w->boundary[j] = NAN;
        w->stored[j] = 0;
    }
    for (int64_t i = 0; i < r->n_rows; i++) {
        const int64_t p = r->position[i];
        if (p + 1 >= w->in->teacher.n)
            continue;
        w->logp[p + 1] = fminf(r->next_logprob[i], 0);
        w->stored[p + 1] = 1;
        if (r->boundary_logp != NULL)
            w->boundary[p] = fmaxf(fminf(r->boundary_logp[i], 0), LEAST_BOUNDARY);
    }
}

/* A row for each target, in no span yet. */
static enum rt_status put_targets(struct work *w)
{
    enum rt_status st = RT_OK;
    struct rt_retarget_out *o = w->out;
    const float zero = 0;
    const uint32_t none = 0;
    for (int64_t i = 0; i < w->in->student.n; i++) {
        const uint32_t position = (uint32_t)(i - 1);
        w->row[i] = -1;
        if (!is_target(w->in, i))
            continue;
        w->row[i] = o->n_rows++;
        if (i >= w->in->student.first)
            rt_retarget_count_target(w->in, i, w->counts);
        RT_TRY(rt_buf_append(&o->position, &position, sizeof position, w->err));
        RT_TRY(rt_buf_append(&o->next_id, &w->in->student.ids[i], sizeof(uint32_t), w->err));
        RT_TRY(rt_buf_append(&o->lse, &zero, sizeof zero, w->err));
        RT_TRY(rt_buf_append(&o->next_logprob, &zero, sizeof zero, w->err));
        RT_TRY(rt_buf_append(&o->next_rank, &none, sizeof none, w->err));
        RT_TRY(rt_buf_append(&o->span, &none, sizeof none, w->err));
        RT_TRY(rt_buf_append(&o->span_logp, &zero, sizeof zero, w->err));
    }
out:
    return st;
}

/* Every teacher token under student token i has its row. */
static bool usable(const struct work *w, int64_t i)
{
    const struct rt_place *p = &w->in->place[i];
    if (p->kind == RT_PLACE_NONE || w->row[i] < 0)
        return false;
    for (int64_t j = p->teacher; j <= p->last; j++)
        if (w->stored[j] == 0)
            return false;
    return true;
}

/* The end of the run of usable tokens from i on, that leaves out no teacher token. */
static int64_t run_end(const struct work *w, int64_t i)
{
    const struct rt_place *p = w->in->place;
    for (; i + 1 < w->in->student.n && usable(w, i + 1); i++)
        if (p[i + 1].teacher != p[i].last + (p[i].ends ? 1 : 0))
            break;
    return i + 1;
}

/* Spans of student tokens [from, to). */
static void cut_run(struct work *w, int64_t from, int64_t to)
{
    const struct rt_retarget_in *in = w->in;
    struct rt_retarget_out *o = w->out;
    const int64_t first = in->place[from].teacher;
    const struct rt_span_side t = {in->place[to - 1].last + 1 - first, in->teacher.end + first}, s = {to - from, in->student.end + from};
    int64_t n = 0;
    for (int64_t i = from; i < to; i++) /* nothing of the student's behind it that could say the boundary */
        if (in->place[i].ends && !is_target(in, i + 1))
            w->boundary[in->place[i].last] = NAN;
    rt_spans_cut(&t, &s, w->logp + first, in->id->boundary ? w->boundary + first : NULL, in->gamma, w->span, &n);
    for (int64_t k = 0; k < n; k++) {
        const struct rt_span *x = &w->span[k];
        const int64_t last = from + x->student, row = w->row[last];
        const float logp = (float)x->logp, whole = x->boundary ? (float)(x->logp + (double)w->boundary[first + x->teacher]) : logp;
        const uint32_t rows = (uint32_t)x->rows;
        if (in->id->boundary && !x->boundary && is_target(in, last + 1))
            continue; /* a reader would take the boundary as counted, and the teacher does not say it */
        memcpy(o->span.data + row * (int64_t)sizeof rows, &rows, sizeof rows);
        memcpy(o->span_logp.data + row * (int64_t)sizeof whole, &whole, sizeof whole);
        memcpy(o->next_logprob.data + row * (int64_t)sizeof logp, &logp, sizeof logp);
        w->counts->spans++;
        for (int64_t i = last + 1 - x->rows; i <= last; i++) {
            w->counts->rows[in->place[i].kind]++;
            w->counts->digits_rows += in->map->digits[in->student.ids[i]];
            w->row[i] = -1; /* done */
        }
    }
}

enum rt_status rt_retarget_alm(const struct rt_retarget_in *in, struct rt_retarget_out *out, struct rt_retarget_counts *counts, struct rt_err *err)
{
    enum rt_status st;
    struct work w = {.in = in, .out = out, .counts = counts, .err = err};
    RT_TRY(begin(&w));
    read_teacher(&w);
    RT_TRY(put_targets(&w));
    for (int64_t i = in->student.first, to; i < in->student.n; i = to) {
        to = i + 1;
        if (!usable(&w, i) || in->place[i].offset > 0)
            continue;
        to = run_end(&w, i);
        cut_run(&w, i, to);
    }
    for (int64_t i = in->student.first > 0 ? in->student.first : 1; i < in->student.n; i++)
        if (w.row[i] >= 0)
            counts->masked[in->place[i].kind == RT_PLACE_NONE ? RT_MASK_FORCED : usable(&w, i) ? RT_MASK_CROSSING : RT_MASK_UNSTORED]++;
out:
    return st;
}
