#include "teacher/score.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/dtype.h"
#include "teacher/damage.h"
#include "teacher/features.h"
#include "teacher/score_state.h"

enum { HEAD_ROWS = 1024, HEAD_ROWS_GPU = 4096 /* between them it waits for the host, and each time it reads the head */ };

/* What the window's rows become before they are put. Host arrays over all stored rows, in input order. */
struct outputs {
    int64_t n_rows;
    int32_t *row_token;  /* flat token of each row, within the window */
    uint32_t *position;
    uint32_t *topk_ids, *next_id, *next_rank;
    float *topk_logits, *lse, *next_logprob, *boundary;
};

struct device_rows {
    int32_t *index, *next;
    uint32_t *topk_ids, *next_rank;
    float *topk_logits, *lse, *next_logprob;
    uint8_t *set;    /* NULL, or the boundary ids */
    double *set_logp;
    void *x, *block;
};

int64_t rt_score_token_bytes(const struct rt_score_options *o)
{
    int64_t b = 8 * o->top_k + 4 * o->n_lse + 20 + (o->boundary != NULL ? 4 : 0);
    for (int i = 0; i < o->n_features; i++)
        b += (o->keep.spill ? 0 : o->feature[i].dim * (int64_t)rt_dtype_size(o->feature[i].dtype)) + 4;
    return b;
}

uint64_t rt_score_keep_bytes(const struct rt_score_options *o, const struct rt_teacher_config *c, size_t act_size, int64_t n)
{
    uint64_t a_token = 2 * (uint64_t)c->hidden * act_size;
    for (int i = 0; i < o->n_features; i++)
        a_token += (uint64_t)o->feature[i].dim * rt_dtype_size(o->feature[i].dtype) + 4;
    return (uint64_t)n * a_token + (uint64_t)c->layers * (uint64_t)c->experts * 2 * sizeof(int64_t) + ((uint64_t)1 << 20);
}

void rt_score_reading(const struct rt_teacher *t, uint64_t *bytes, double *seconds, double *waited)
{
    *bytes = rt_weights_bytes_read(t->w);
    *seconds = rt_weights_read_seconds(t->w);
    *waited = rt_weights_waited(t->w);
}

static void free_outputs(struct outputs *r)
{
    rt_free(r->row_token);
    rt_free(r->position);
    rt_free(r->topk_ids);
    rt_free(r->next_id);
    rt_free(r->next_rank);
    rt_free(r->topk_logits);
    rt_free(r->lse);
    rt_free(r->next_logprob);
    rt_free(r->boundary);
}

static enum rt_status make_outputs(const struct rt_score_options *o, const struct rt_rows *seqs, int64_t n_seqs, struct outputs *r,
                                   struct rt_err *err)
{
    enum rt_status st;
    int64_t n = 0;
    for (int64_t s = 0; s < n_seqs; s++)
        for (int64_t i = 0; i + 1 < seqs[s].n_tokens; i++)
            n += !o->completion_only || seqs[s].loss_mask[i + 1];
    r->n_rows = n;
    const size_t N = (size_t)n, k = (size_t)o->top_k;
    RT_TRY(rt_alloc(N, sizeof(int32_t), "rows", &r->row_token, err));
    RT_TRY(rt_alloc(N, sizeof(uint32_t), "rows", &r->position, err));
    RT_TRY(rt_alloc(N * k, sizeof(uint32_t), "top-k ids", &r->topk_ids, err));
    RT_TRY(rt_alloc(N, sizeof(uint32_t), "rows", &r->next_id, err));
    RT_TRY(rt_alloc(N, sizeof(uint32_t), "rows", &r->next_rank, err));
    RT_TRY(rt_alloc(N * k, sizeof(float), "top-k logits", &r->topk_logits, err));
    RT_TRY(rt_alloc(N * (size_t)o->n_lse, sizeof(float), "log-sum-exps", &r->lse, err));
    RT_TRY(rt_alloc(N, sizeof(float), "rows", &r->next_logprob, err));
    if (o->boundary != NULL)
        RT_TRY(rt_alloc(N, sizeof(float), "rows", &r->boundary, err));
    int64_t at = 0, base = 0;
    for (int64_t s = 0; s < n_seqs; base += seqs[s++].n_tokens)
        for (int64_t i = 0; i + 1 < seqs[s].n_tokens; i++)
            if (!o->completion_only || seqs[s].loss_mask[i + 1]) {
                r->row_token[at] = (int32_t)(base + i);
                r->position[at] = (uint32_t)i;
                r->next_id[at++] = seqs[s].ids[i + 1];
            }
out:
    return st;
}

static int64_t head_rows(const struct rt_device *d)
{
    return d->be->own_memory ? HEAD_ROWS_GPU : HEAD_ROWS;
}

static enum rt_status make_device_rows(struct rt_teacher *t, const struct rt_score_options *o, struct device_rows *v, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    const size_t R = (size_t)head_rows(d), k = (size_t)o->top_k, L = (size_t)o->n_lse, H = (size_t)t->c.hidden * rt_device_act_size(d);
    const size_t set = o->boundary != NULL ? (size_t)o->n_ids : 0;
    const size_t size = rt_arena_round(R * H) + 2 * rt_arena_round(R * k * 4) + rt_arena_round(R * L * 4) + 4 * rt_arena_round(R * 4) +
                        rt_arena_round(set) + rt_arena_round(R * sizeof(double));
    struct rt_arena a;
    enum rt_status st;
    RT_TRY(d->be->alloc(d->dev, size, &v->block, err));
    rt_arena_init(&a, v->block, size, "head rows");
    RT_TRY(rt_arena_alloc(&a, R * H, &v->x, err));
    RT_TRY(rt_arena_alloc(&a, R * k * 4, &v->topk_ids, err));
    RT_TRY(rt_arena_alloc(&a, R * k * 4, &v->topk_logits, err));
    RT_TRY(rt_arena_alloc(&a, R * L * 4, &v->lse, err));
    RT_TRY(rt_arena_alloc(&a, R * 4, &v->index, err));
    RT_TRY(rt_arena_alloc(&a, R * 4, &v->next, err));
    RT_TRY(rt_arena_alloc(&a, R * 4, &v->next_logprob, err));
    RT_TRY(rt_arena_alloc(&a, R * 4, &v->next_rank, err));
    RT_TRY(rt_arena_alloc(&a, R * sizeof(double), &v->set_logp, err));
    if (set > 0) {
        RT_TRY(rt_arena_alloc(&a, set, &v->set, err));
        RT_TRY(rt_device_upload(d, v->set, o->boundary, set, err));
    }
out:
    return st;
}

/* Log mass of the boundary ids of n rows, into out. */
static enum rt_status boundaries(struct rt_teacher *t, const struct rt_score_options *o, const struct rt_part *p, const struct device_rows *v,
                                 int64_t n, float *out, struct rt_err *err)
{
    enum rt_status st;
    double host[HEAD_ROWS_GPU];
    RT_TRY(RT_OP(t->o.device, head_likelihood, err, .x = v->x, .w = p->w[RT_W_HEAD], .n = n, .H = t->c.hidden, .n_ids = o->n_ids, .in_set = v->set,
                 .set_logp = v->set_logp));
    RT_TRY(rt_device_download(t->o.device, host, v->set_logp, (size_t)n * sizeof *host, err));
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)host[i];
out:
    return st;
}

/* Rows of the head, head_rows at a time; final [window, H] are the normalised states. */
static enum rt_status head(struct rt_teacher *t, const struct rt_score_options *o, const struct rt_part *p, const void *final,
                           struct outputs *r, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    const int64_t most = head_rows(d);
    struct device_rows v = {0};
    float inv[RT_MAX_LSE];
    enum rt_status st;
    for (int i = 0; i < o->n_lse; i++)
        inv[i] = (float)(1.0 / o->lse_temperature[i]);
    RT_TRY(make_device_rows(t, o, &v, err));
    for (int64_t i = 0; i < r->n_rows; i += most) {
        const int64_t n = r->n_rows - i < most ? r->n_rows - i : most;
        const size_t N = (size_t)n, k = (size_t)o->top_k, L = (size_t)o->n_lse;
        RT_TRY(rt_device_upload(d, v.index, r->row_token + i, N * 4, err));
        RT_TRY(rt_device_upload(d, v.next, r->next_id + i, N * 4, err));
        RT_TRY(RT_OP(d, gather, err, .x = final, .index = v.index, .out = v.x, .n = n, .cols = t->c.hidden));
        RT_TRY(RT_OP(d, head_topk, err, .x = v.x, .w = p->w[RT_W_HEAD], .next = v.next, .n = n, .H = t->c.hidden, .n_ids = o->n_ids,
                     .k = o->top_k, .n_lse = o->n_lse, .inv_temp = inv, .topk_ids = k > 0 ? v.topk_ids : NULL, .topk_logits = k > 0 ? v.topk_logits : NULL,
                     .lse = v.lse, .next_logprob = v.next_logprob, .next_rank = v.next_rank));
        RT_TRY(d->be->download(d->dev, d->q, r->topk_ids + (size_t)i * k, v.topk_ids, N * k * 4, err));
        RT_TRY(d->be->download(d->dev, d->q, r->topk_logits + (size_t)i * k, v.topk_logits, N * k * 4, err));
        RT_TRY(d->be->download(d->dev, d->q, r->lse + (size_t)i * L, v.lse, N * L * 4, err));
        RT_TRY(d->be->download(d->dev, d->q, r->next_logprob + i, v.next_logprob, N * 4, err));
        RT_TRY(rt_device_download(d, r->next_rank + i, v.next_rank, N * 4, err));
        if (v.set != NULL)
            RT_TRY(boundaries(t, o, p, &v, n, r->boundary + i, err));
    }
out:
    if (v.block != NULL)
        d->be->free(d->dev, v.block);
    return st;
}

struct rt_scored {
    struct rt_score_options o;
    struct outputs r;
    struct rt_features f;
    struct rt_score_state state;
    struct rt_rows *seqs;
    int64_t n_seqs;
};

enum rt_status rt_scored_put(struct rt_scored *w, int64_t skip, struct rt_row_sink *sink, struct rt_err *err)
{
    const struct rt_score_options *o = &w->o;
    const struct outputs *r = &w->r;
    struct rt_rows *seqs = w->seqs;
    const bool all = sink != NULL && sink->put_all != NULL && !w->f.spill; /* spilled features are in memory for one sequence at a time */
    enum rt_status st = RT_OK;
    int64_t at = 0, base = 0;
    for (int64_t s = 0; s < w->n_seqs; base += seqs[s++].n_tokens) {
        struct rt_rows *q = &seqs[s];
        int64_t n = 0;
        while (at + n < r->n_rows && r->row_token[at + n] < base + q->n_tokens)
            n++;
        q->n_rows = n;
        q->k = o->top_k;
        q->n_lse = o->n_lse;
        q->position = r->position + at;
        q->topk_ids = r->topk_ids + at * o->top_k;
        q->topk_logits = r->topk_logits + at * o->top_k;
        q->lse = r->lse + at * o->n_lse;
        q->next_id = r->next_id + at;
        q->next_logprob = r->next_logprob + at;
        q->next_rank = r->next_rank + at;
        q->boundary_logp = r->boundary != NULL ? r->boundary + at : NULL;
        RT_TRY(rt_features_attach(&w->f, base, q, err));
        if (s >= skip && sink != NULL && !all)
            RT_TRY(sink->put(sink->self, q, err));
        at += n;
    }
    if (all && skip < w->n_seqs)
        RT_TRY(sink->put_all(sink->self, seqs + skip, w->n_seqs - skip, err));
out:
    return st;
}

/* The first part of layer `layer` in the pass; layer == layers: the head. */
static int64_t pass_at(const struct rt_teacher *t, int layer)
{
    int64_t at = 0;
    for (int l = 0; l < layer; l++)
        at += rt_weights_layer_parts(&t->c, l, NULL);
    return at;
}

/* The error for states or logits that are no numbers: which tensor of where they were made is to blame. */
static enum rt_status not_finite(struct rt_teacher *t, int layer, const char *what, struct rt_err *err)
{
    char text[RT_DAMAGE_TEXT];
    if (layer == 0) {
        rt_damage_find_in(rt_weights_tensors(t->w), "model.embed_tokens.weight", text);
        return rt_fail(err, RT_NUMERIC, "%s: an embedding is not finite: %s", t->o.dir, text);
    }
    const int made = layer == RT_LAYER_FINAL ? t->c.layers : layer - 1;
    const int64_t at = pass_at(t, made), n = made == t->c.layers ? 1 : rt_weights_layer_parts(&t->c, made, NULL);
    rt_damage_find(rt_weights_tensors(t->w), &t->c, t->pass + at, n, text);
    if (layer == RT_LAYER_FINAL)
        return rt_fail(err, RT_NUMERIC, "%s: %s are not finite: %s", t->o.dir, what, text);
    return rt_fail(err, RT_NUMERIC, "%s: hidden states are not finite after layer %d: %s", t->o.dir, made, text);
}

/* States after `layer` layers: finite, offered to the tap, stored where they are features. */
static enum rt_status visit(struct rt_teacher *t, const struct rt_score_options *o, int layer, const void *x, int64_t n,
                            struct rt_features *f, struct rt_err *err)
{
    double sum;
    enum rt_status st;
    RT_TRY(RT_OP(t->o.device, sumsq, err, .x = x, .n = n * t->c.hidden, .out = &sum));
    if (!isfinite(sum))
        RT_TRY(not_finite(t, layer, "normalised states", err));
    if (o->tap != NULL)
        o->tap(o->tap_self, layer, x, n);
    RT_TRY(rt_features_take(f, layer, x, n, err));
out:
    return st;
}

static enum rt_status upload_positions(struct rt_teacher *t, const struct rt_rows *seqs, int64_t n_seqs, int32_t *cu, int64_t *n,
                                       struct rt_err *err)
{
    enum rt_status st;
    int32_t *pos = NULL;
    int64_t total = 0;
    for (int64_t s = 0; s < n_seqs; s++) {
        if (seqs[s].n_tokens < 1 || seqs[s].n_tokens > t->o.max_length)
            RT_FAIL(err, USAGE, "a sequence of %ld tokens; the teacher was opened for 1 to %ld", (long)seqs[s].n_tokens, (long)t->o.max_length);
        total += seqs[s].n_tokens;
    }
    RT_ASSERT(total <= t->plan.window);
    RT_TRY(rt_alloc((size_t)total, sizeof *pos, "positions", &pos, err));
    cu[0] = 0;
    for (int64_t s = 0, at = 0; s < n_seqs; s++) {
        for (int64_t i = 0; i < seqs[s].n_tokens; i++)
            pos[at++] = (int32_t)i;
        cu[s + 1] = (int32_t)at;
    }
    RT_TRY(rt_device_upload(t->o.device, t->position, pos, (size_t)total * sizeof *pos, err));
    RT_TRY(rt_device_sync(t->o.device, err));
    *n = total;
out:
    rt_free(pos);
    return st;
}

static enum rt_status embed_window(struct rt_teacher *t, const struct rt_rows *seqs, int64_t n_seqs, struct rt_err *err)
{
    const size_t row = (size_t)t->c.hidden * rt_device_act_size(t->o.device);
    enum rt_status st = RT_OK;
    for (int64_t s = 0, at = 0; s < n_seqs; at += seqs[s++].n_tokens)
        RT_TRY(rt_teacher_embed(t, -1, seqs[s].ids, seqs[s].n_tokens, (char *)t->hidden + (size_t)at * row, err));
out:
    return st;
}

/* A stop before layer `layer`. */
static enum rt_status stopped(struct rt_score_state *s, int layer, struct rt_err *err)
{
    struct rt_err why = {0};
    const int L = s->t->c.layers;
    if (s->o->keep.dir == NULL || layer == 0)
        return rt_fail(err, RT_INTERRUPTED, "interrupted before layer %d of %d; finished windows are kept", layer, L);
    if (rt_score_state_save(s, layer, &why) == RT_OK)
        return rt_fail(err, RT_INTERRUPTED, "interrupted after layer %d of %d of window %ld; the same command goes on from there", layer, L,
                       (long)s->o->keep.window + 1);
    return rt_fail(err, RT_INTERRUPTED, "interrupted after layer %d of %d of window %ld; the same command goes on after layer %d: %.300s", layer, L,
                   (long)s->o->keep.window + 1, s->saved, why.msg);
}

/* A state that cannot be saved is no reason to give up the window. */
static void save_if_due(struct rt_score_state *s, int layers)
{
    struct rt_err why = {0};
    char text[640];
    if (!rt_score_state_due(s) || rt_score_state_save(s, layers, &why) == RT_OK)
        return;
    s->since = rt_now(); /* not again at once */
    snprintf(text, sizeof text, "the state after layer %d could not be saved: %s", layers, why.msg);
    if (s->o->keep.note != NULL)
        s->o->keep.note(s->o->keep.note_self, text);
}

/* Layers `first` and on over the window. */
static enum rt_status run_layers(struct rt_teacher *t, const struct rt_score_options *o, const struct rt_layer_batch *b, int first,
                                 struct rt_score_state *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (first == 0)
        RT_TRY(visit(t, o, 0, t->hidden, b->n, s->f, err));
    for (int l = first; l <= t->c.layers; l++) {
        if (o->stop != NULL && o->stop(o->stop_self))
            RT_TRY(stopped(s, l, err));
        if (l == t->c.layers)
            break;
        RT_TRY(rt_layer_forward(&t->ctx, l, b, t->hidden, err));
        RT_TRY(visit(t, o, l + 1, t->hidden, b->n, s->f, err));
        if (o->progress != NULL)
            o->progress(o->progress_self, l + 1, t->c.layers);
        save_if_due(s, l + 1);
    }
out:
    return st;
}

static enum rt_status check_logits(struct rt_teacher *t, const struct rt_score_options *o, const struct outputs *r, struct rt_err *err)
{
    for (int64_t i = 0; i < r->n_rows * o->n_lse; i++)
        if (!isfinite(r->lse[i]))
            return not_finite(t, RT_LAYER_FINAL, "logits", err);
    return RT_OK;
}

/* The final norm and the head; hidden states stay as they are. */
static enum rt_status finish_window(struct rt_teacher *t, const struct rt_score_options *o, int64_t n, struct rt_features *f, struct outputs *r,
                                    struct rt_err *err)
{
    const struct rt_part *p;
    enum rt_status st;
    RT_TRY(rt_weights_next(t->w, &p, err));
    RT_TRY(RT_OP(t->o.device, norm_fwd, err, .x = t->hidden, .w = p->w[RT_W_NORM], .y = t->ctx.fx, .n = n, .cols = t->c.hidden,
                 .eps = (float)t->c.eps));
    RT_TRY(visit(t, o, RT_LAYER_FINAL, t->ctx.fx, n, f, err));
    if (o->n_lse > 0 || o->top_k > 0 || o->boundary != NULL) { /* else a caller looks at states alone */
        RT_TRY(head(t, o, p, t->ctx.fx, r, err));
        RT_TRY(check_logits(t, o, r, err));
    }
    RT_TRY(rt_weights_release(t->w, p, err));
    rt_weights_end(t->w);
out:
    if (st == RT_NOMEM || st == RT_DEVICE)
        rt_err_context(err, "head");
    return st;
}

static int64_t longest_of(const struct rt_rows *seqs, int64_t n_seqs)
{
    int64_t n = 0;
    for (int64_t s = 0; s < n_seqs; s++)
        n = seqs[s].n_tokens > n ? seqs[s].n_tokens : n;
    return n;
}

/* Everything but the putting: on success all that w still needs is on the host. */
static enum rt_status compute(struct rt_teacher *t, struct rt_scored *w, struct rt_err *err)
{
    const struct rt_score_options *o = &w->o;
    struct rt_layer_batch b = {.position = t->position, .n_seq = w->n_seqs};
    int32_t *cu = NULL;
    int first = 0;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)w->n_seqs + 1, sizeof *cu, "sequence ends", &cu, err));
    RT_TRY(upload_positions(t, w->seqs, w->n_seqs, cu, &b.n, err));
    b.cu_seqlens = cu;
    RT_TRY(make_outputs(o, w->seqs, w->n_seqs, &w->r, err));
    RT_TRY(rt_features_init(&w->f, t, o, b.n, longest_of(w->seqs, w->n_seqs), err));
    RT_TRY(rt_score_state_init(&w->state, t, o, &w->f, w->seqs, w->n_seqs, b.n, err));
    RT_TRY(rt_score_state_load(&w->state, &first, err));
    if (first == 0)
        RT_TRY(embed_window(t, w->seqs, w->n_seqs, err));
    else if (o->progress != NULL)
        o->progress(o->progress_self, first, t->c.layers);
    t->ctx.load = o->load;
    RT_TRY(rt_weights_begin(t->w, t->pass + pass_at(t, first), t->n_pass - pass_at(t, first), err));
    RT_TRY(run_layers(t, o, &b, first, &w->state, err));
    RT_TRY(finish_window(t, o, b.n, &w->f, &w->r, err));
    RT_TRY(rt_device_sync(t->o.device, err)); /* the last copies */
out:
    rt_weights_end(t->w);
    rt_free(cu);
    return st;
}

enum rt_status rt_teacher_score_window(struct rt_teacher *t, const struct rt_score_options *o, struct rt_rows *seqs, int64_t n_seqs,
                                       struct rt_scored **out, struct rt_err *err)
{
    struct rt_scored *w;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *w, "a window's rows", &w, err));
    w->o = *o;
    w->seqs = seqs;
    w->n_seqs = n_seqs;
    st = compute(t, w, err);
    if (st != RT_OK) {
        (void)rt_device_sync(t->o.device, NULL); /* copies into what is freed may be under way */
        rt_scored_free(w);
        goto out;
    }
    *out = w;
out:
    return st;
}

enum rt_status rt_scored_stop(struct rt_scored *w, struct rt_err *err)
{
    return stopped(&w->state, w->state.t->c.layers, err);
}

void rt_scored_free(struct rt_scored *w)
{
    if (w == NULL)
        return;
    rt_features_free(&w->f);
    free_outputs(&w->r);
    rt_free(w);
}

enum rt_status rt_teacher_score(struct rt_teacher *t, const struct rt_score_options *o, struct rt_rows *seqs, int64_t n_seqs, int64_t skip,
                                struct rt_row_sink *sink, struct rt_err *err)
{
    struct rt_scored *w = NULL;
    enum rt_status st;
    RT_TRY(rt_teacher_score_window(t, o, seqs, n_seqs, &w, err));
    st = rt_scored_put(w, skip, sink, err);
    if (st == RT_INTERRUPTED && o->keep.dir != NULL) {
        rt_err_clear(err);
        RT_TRY(rt_scored_stop(w, err));
    }
out:
    rt_scored_free(w);
    return st;
}
