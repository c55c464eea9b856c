/* Windows through the teacher, on one device or several; what is put, saved and shown on the way. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "core/pool.h"
#include "distill/logits.h"

/* ---- devices ---- */

enum rt_status rt_logits_open_devices(struct rt_logits_job *j, struct rt_err *err)
{
    struct rt_common common = j->v->common;
    enum rt_op ops[RT_OP_COUNT];
    int n_ops;
    enum rt_status st;
    const enum rt_op *score = rt_teacher_score_ops(&n_ops);
    memcpy(ops, score, (size_t)n_ops * sizeof *ops);
    ops[n_ops++] = RT_OP_sumsq;
    if (j->v->boundary)
        ops[n_ops++] = RT_OP_head_likelihood;
    j->lanes = (int)common.gpus;
    if (j->lanes > 1) /* devices that are the host share its cores */
        common.threads = ((common.threads > 0 ? common.threads : rt_cpu_count()) + j->lanes - 1) / j->lanes;
    RT_TRY(rt_alloc((size_t)j->lanes, sizeof *j->lane, "devices", &j->lane, err));
    RT_TRY(rt_command_device(j->ctx, &common, ops, n_ops, &j->lane[0].device, err));
    const struct rt_backend *be = j->lane[0].device.be;
    RT_TRY(rt_command_gpus(&common, be, err));
    for (int i = 0; i < j->lanes; i++) {
        j->lane[i].j = j;
        j->lane[i].index = i;
        if (i > 0)
            RT_TRY(rt_device_open(be, &(const struct rt_dev_options){.threads = (int)common.threads, .index = i}, &j->lane[i].device, err));
    }
    if (j->lanes > 1 && be->attach != NULL)
        RT_TRY(be->attach(j->lane[0].device.dev, err));
out:
    return st;
}

enum rt_status rt_logits_check_head(const struct rt_logits_job *j, struct rt_err *err)
{
    const struct rt_device *d = &j->lane[0].device;
    const struct rt_score_options *o = &j->so;
    struct rt_err why = {0};
    struct rt_weight *w = NULL;
    void *none = NULL; /* no row is asked for, so nothing is read */
    float inv[RT_MAX_LSE];
    enum rt_status st;
    for (int i = 0; i < o->n_lse; i++)
        inv[i] = (float)(1.0 / o->lse_temperature[i]);
    RT_TRY(d->be->alloc(d->dev, 64, &none, err));
    RT_TRY(d->be->weight_param(d->dev, none, o->n_ids, j->config.hidden, &w, err));
    st = RT_OP(d, head_topk, &why, .x = none, .w = w, .n = 0, .H = j->config.hidden, .n_ids = o->n_ids, .k = o->top_k, .n_lse = o->n_lse, .inv_temp = inv,
               .topk_ids = none, .topk_logits = none, .lse = none);
    if (st == RT_NOMEM || st == RT_DEVICE)
        RT_TRY(rt_fail(err, st, "%s", why.msg));
    if (st != RT_OK)
        RT_FAIL(err, USAGE, "--cache topk=%d: %s cannot keep so many ids a row: %s", o->top_k, d->be->name, why.msg);
out:
    d->be->weight_free(d->dev, w);
    if (none != NULL)
        d->be->free(d->dev, none);
    return st;
}

enum rt_status rt_logits_open_teachers(struct rt_logits_job *j, struct rt_err *err)
{
    const size_t loads = (size_t)j->config.layers * (size_t)j->config.experts;
    struct rt_teacher_options o = j->to;
    enum rt_status st = RT_OK;
    o.window = j->plan.teacher.window;
    o.chunk = j->plan.teacher.chunk;
    for (int i = 0; i < j->lanes; i++) {
        struct rt_logits_lane *lane = &j->lane[i];
        o.device = &lane->device;
        if (lane->device.be->attach != NULL)
            RT_TRY(lane->device.be->attach(lane->device.dev, err));
        o.with = i > 0 ? j->lane[0].teacher : NULL;
        RT_TRY(rt_teacher_open(&o, &lane->teacher, err));
        for (int k = 0; k < (j->overlap ? 2 : 1) && loads > 0; k++)
            RT_TRY(rt_alloc(loads, sizeof *lane->slot[k].load, "expert load", &lane->slot[k].load, err));
    }
    for (int i = 0; i < j->so.n_features; i++) {
        const struct rt_feature_spec *s = &j->so.feature[i];
        if (!s->projected)
            continue;
        RT_TRY(rt_alloc((size_t)s->dim * (size_t)j->config.hidden, sizeof(float), "projection", &j->projection[i], err));
        RT_TRY(rt_projection_matrix(j->so.projection_seed, s->layer, s->dim, j->config.hidden, j->projection[i], err));
        j->so.projection[i] = j->projection[i];
    }
out:
    return st;
}

void rt_logits_close(struct rt_logits_job *j)
{
    for (int i = j->lanes - 1; i >= 0 && j->lane != NULL; i--) { /* the first one's reader serves the others */
        struct rt_logits_lane *lane = &j->lane[i];
        if (lane->device.dev != NULL && lane->device.be->attach != NULL)
            (void)lane->device.be->attach(lane->device.dev, NULL);
        rt_teacher_close(lane->teacher);
        for (int k = 0; k < 2; k++) {
            rt_corpus_window_free(&lane->slot[k].w);
            rt_free(lane->slot[k].load);
        }
        rt_device_close(&lane->device);
    }
    rt_free(j->lane);
    j->lane = NULL;
    for (int i = 0; i < RT_MAX_FEATURES; i++)
        rt_free(j->projection[i]);
}

/* ---- what a window asks and tells while it goes through the layers: any lane, under the lock ---- */

static bool lane_stop(void *self)
{
    struct rt_logits_lane *lane = self;
    struct rt_logits_job *j = lane->j;
    pthread_mutex_lock(&j->lock);
    const bool failed = j->failed || j->writer.st != RT_OK;
    pthread_mutex_unlock(&j->lock);
    return failed || (j->ctx->stop != NULL && j->ctx->stop(j->ctx->stop_self));
}

static void lane_note(void *self, const char *text)
{
    struct rt_logits_lane *lane = self;
    pthread_mutex_lock(&lane->j->lock);
    rt_info(lane->j->ctx->log, "%s", text);
    pthread_mutex_unlock(&lane->j->lock);
}

/* Tokens times layers of the windows under way, in whole tokens. */
static int64_t under_way(const struct rt_logits_job *j)
{
    int64_t n = 0;
    for (int i = 0; i < j->lanes; i++)
        n += j->lane[i].tokens * j->lane[i].done / j->config.layers;
    return n;
}

/* ", 61% of 103 GFLOP/s": what was reached since the start beside the limit that binds. */
static void share_of_limit(const struct rt_logits_job *j, int64_t done, char *out, size_t cap)
{
    const struct rt_logits_plan *p = &j->plan;
    const struct rt_progress *g = &j->progress;
    const double elapsed = rt_now() - g->t_start, share = (double)(done - g->first) / (double)j->survey.tokens;
    char a[32];
    out[0] = '\0';
    if (elapsed <= 0 || share <= 0)
        return;
    if (p->seconds_flops >= p->seconds_read && p->seconds_flops > 0)
        snprintf(out, cap, ", %.0f%% of %sFLOP/s", 100 * share * p->seconds_flops / elapsed, rt_human_count(a, p->rates.flops * p->at_once));
    else if (p->seconds_read > 0)
        snprintf(out, cap, ", %.0f%% of reading at %s/s", 100 * share * p->seconds_read / elapsed, rt_human_bytes(a, (uint64_t)p->rates.read));
}

static void lane_progress(void *self, int done, int layers)
{
    struct rt_logits_lane *lane = self;
    struct rt_logits_job *j = lane->j;
    char text[160], share[64];
    pthread_mutex_lock(&j->lock);
    if (lane->done == 0 && lane->saved > 0 && done == lane->saved) /* it goes on from there: no work of this run */
        j->progress.first += lane->tokens * done / layers;
    lane->done = done;
    const int64_t all = j->tokens_done + under_way(j);
    share_of_limit(j, all, share, sizeof share);
    snprintf(text, sizeof text, "window %" PRId64 "/%" PRId64 ", layer %d/%d%s", lane->at->number + 1, j->plan.windows, done, layers, share);
    rt_progress_update(&j->progress, all, text);
    pthread_mutex_unlock(&j->lock);
}

/* ---- rows in input order ---- */

/* Waits until the windows before this one are handed over. */
static enum rt_status take_turn(struct rt_logits_lane *lane, struct rt_err *err)
{
    struct rt_logits_job *j = lane->j;
    pthread_mutex_lock(&j->lock);
    while (j->turn != lane->index && !j->failed && j->writer.st == RT_OK)
        pthread_cond_wait(&j->changed, &j->lock);
    const bool mine = j->turn == lane->index;
    pthread_mutex_unlock(&j->lock);
    return mine ? RT_OK : rt_fail(err, RT_INTERRUPTED, "a window before it was not finished");
}

/* Where the windows before it fail, the state after the last layer is kept: the teacher still holds it. */
static enum rt_status hand_over(struct rt_logits_lane *lane, bool kept, struct rt_err *err)
{
    struct rt_logits_window *w = lane->at;
    enum rt_status st = take_turn(lane, err);
    if (st == RT_OK)
        return rt_logits_put_push(lane->j, w, err);
    if (kept) {
        rt_err_clear(err);
        st = rt_scored_stop(w->scored, err);
    }
    rt_scored_free(w->scored);
    w->scored = NULL;
    return st;
}

static enum rt_status score_window(struct rt_logits_lane *lane, struct rt_err *err)
{
    struct rt_logits_job *j = lane->j;
    struct rt_logits_window *w = lane->at;
    struct rt_score_options o = j->so;
    enum rt_status st;
    if (w->load != NULL)
        memset(w->load, 0, (size_t)j->config.layers * (size_t)j->config.experts * sizeof *w->load);
    o.load = w->load;
    o.stop = lane_stop;
    o.progress = lane_progress;
    o.stop_self = o.progress_self = lane;
    o.keep.dir = j->keep || o.keep.spill ? w->dir : NULL;
    o.keep.window = w->number;
    o.keep.every = j->keep ? j->save_every : INFINITY;
    o.keep.note = lane_note;
    o.keep.note_self = lane;
    RT_TRY(rt_teacher_score_window(lane->teacher, &o, w->w.seqs, w->w.n, &w->scored, err));
    RT_TRY(hand_over(lane, o.keep.dir != NULL, err));
out:
    return st;
}

static void *lane_main(void *self)
{
    struct rt_logits_lane *lane = self;
    struct rt_logits_job *j = lane->j;
    const struct rt_device *d = &lane->device;
    rt_err_clear(&lane->err);
    lane->st = d->be->attach != NULL ? d->be->attach(d->dev, &lane->err) : RT_OK;
    if (lane->st == RT_OK)
        lane->st = score_window(lane, &lane->err);
    rt_teacher_expect(lane->teacher, false);
    pthread_mutex_lock(&j->lock);
    if (lane->st == RT_OK)
        j->turn = lane->index + 1;
    else
        j->failed = true;
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

/* ---- rounds: as many windows as there are devices ---- */

static enum rt_status window_dir(const struct rt_logits_job *j, int64_t window, char out[4096], struct rt_err *err)
{
    char name[64];
    if (j->n_parts > 1)
        snprintf(name, sizeof name, ".window-%04d-of-%04d-%06" PRId64, j->part, j->n_parts, window);
    else
        snprintf(name, sizeof name, ".window-%06" PRId64, window);
    return rt_path_join(out, 4096, j->v->out, name, err);
}

/* The next windows that are not wholly put and counted; *n of them. first, index: sequences and windows before the next one. counted: windows whose load
 * was counted before the run began (the writer counts on). */
static enum rt_status fill_round(struct rt_logits_job *j, int64_t counted, int64_t *first, int64_t *index, int *n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *n = 0;
    for (int i = 0; i < j->lanes; i++) {
        struct rt_logits_lane *lane = &j->lane[i];
        lane->at = j->overlap && lane->at == &lane->slot[0] ? &lane->slot[1] : &lane->slot[0];
        RT_TRY(rt_logits_put_wait(j, lane->at, err));
    }
    while (*n < j->lanes) {
        struct rt_logits_lane *lane = &j->lane[*n];
        struct rt_logits_window *w = lane->at;
        RT_TRY(rt_corpus_next(j->corpus, j->plan.teacher.window, &w->w, err));
        if (w->w.n == 0)
            break;
        const int64_t put = j->resume.sequences > *first ? j->resume.sequences - *first : 0;
        w->skip = put < w->w.n ? put : w->w.n;
        w->number = (*index)++;
        *first += w->w.n;
        RT_TRY(window_dir(j, w->number, w->dir, err));
        if (w->skip == w->w.n && w->number < counted) {
            RT_TRY(rt_score_drop(w->dir, err)); /* ended between its rows and this */
            j->tokens_done += w->w.tokens;
            j->progress.first += w->w.tokens;
            continue;
        }
        lane->tokens = w->w.tokens;
        lane->done = 0;
        lane->saved = rt_score_saved_layer(w->dir);
        (*n)++;
    }
out:
    return st;
}

/* The first lane's error that is no mere stop; where states are kept it is said. */
static enum rt_status round_error(struct rt_logits_job *j, int n, struct rt_err *err)
{
    const struct rt_logits_lane *worst = NULL;
    for (int i = 0; i < n; i++) {
        const struct rt_logits_lane *lane = &j->lane[i];
        if (lane->st == RT_OK)
            continue;
        if (worst == NULL || (worst->st == RT_INTERRUPTED && lane->st != RT_INTERRUPTED))
            worst = lane;
        const int layer = j->keep && lane->st != RT_INTERRUPTED ? rt_score_saved_layer(lane->at->dir) : 0;
        if (layer > 0)
            rt_info(j->ctx->log, "window %" PRId64 ": the state after layer %d of %d is kept in %s; the same command goes on from there", lane->at->number + 1,
                    layer, j->config.layers, lane->at->dir);
    }
    return worst != NULL ? rt_fail(err, worst->st, "%s", worst->err.msg) : RT_OK;
}

static enum rt_status run_round(struct rt_logits_job *j, int n, struct rt_err *err)
{
    int started = 0;
    j->turn = 0;
    j->failed = false;
    for (int i = 0; i < n; i++)
        rt_teacher_expect(j->lane[i].teacher, true);
    if (n == 1) {
        lane_main(&j->lane[0]);
        return round_error(j, 1, err);
    }
    for (; started < n; started++)
        if (pthread_create(&j->lane[started].thread, NULL, lane_main, &j->lane[started]) != 0)
            break;
    if (started < n) {
        pthread_mutex_lock(&j->lock);
        j->failed = true;
        pthread_cond_broadcast(&j->changed);
        pthread_mutex_unlock(&j->lock);
    }
    for (int i = started; i < n; i++)
        rt_teacher_expect(j->lane[i].teacher, false);
    for (int i = 0; i < started; i++)
        pthread_join(j->lane[i].thread, NULL);
    const enum rt_status st = started < n ? rt_fail(err, RT_NOMEM, "cannot start a thread for device %d", started) : RT_OK;
    const enum rt_status worst = round_error(j, started, err);
    return st != RT_OK ? st : worst;
}

/* The rate is that of the time in which passes read: with enough memory only the first does. */
static void tell_reading(const struct rt_logits_job *j)
{
    char a[32], b[32], raw[64] = "";
    uint64_t bytes = 0, one;
    double waited = 0, reading = 0, seconds, wait;
    for (int i = 0; i < j->lanes; i++) {
        rt_score_reading(j->lane[i].teacher, &one, &seconds, &wait);
        bytes += one;
        waited += wait / j->lanes;
        reading = seconds > reading ? seconds : reading; /* side by side */
    }
    const double elapsed = rt_now() - j->progress.t_start, rate = reading > 0 ? (double)bytes / reading : 0;
    if (j->plan.rates.read > 0 && waited > 0.1 * elapsed) /* reading binds */
        snprintf(raw, sizeof raw, " (reading alone: %s/s before the run)", rt_human_bytes(b, (uint64_t)j->plan.rates.read));
    rt_info(j->ctx->log, "weights: %s read at %s/s%s; %.1f%% of the time was spent waiting for them", rt_human_bytes(a, bytes),
            rt_human_bytes(b, (uint64_t)rate), raw, elapsed > 0 ? 100 * waited / elapsed : 0.0);
}

static void tell_writing(const struct rt_logits_job *j)
{
    const struct rt_logits_writer *p = &j->writer;
    const double elapsed = rt_now() - j->progress.t_start;
    if (p->tokens > 0)
        rt_info(j->ctx->log, "rows: written in %.2f us a token by %d thread%s; %.1f%% of the time was spent waiting for that", p->busy / (double)p->tokens * 1e6,
                j->put_threads, j->put_threads > 1 ? "s" : "", elapsed > 0 ? 100 * p->waited / elapsed : 0.0);
}

/* Rows of windows that were scored are put whatever ended the run; the writer's error is the one that a stop of the lanes only follows. */
static enum rt_status end_writing(struct rt_logits_job *j, enum rt_status st, struct rt_err *err)
{
    struct rt_err why = {0};
    pthread_mutex_lock(&j->lock);
    if (st == RT_INTERRUPTED && j->writer.n > 0 && j->writer.st == RT_OK)
        rt_info(j->ctx->log, "stopping once the rows of windows that were scored are written");
    pthread_mutex_unlock(&j->lock);
    const enum rt_status put = rt_logits_put_end(j, &why);
    if (put == RT_OK || (st != RT_OK && st != RT_INTERRUPTED))
        return st;
    rt_err_clear(err);
    return rt_fail(err, put, "%s", why.msg);
}

enum rt_status rt_logits_score(struct rt_logits_job *j, struct rt_err *err)
{
    const int64_t counted = j->load.window != NULL ? j->load.windows : INT64_MAX;
    int64_t first = 0, index = 0;
    int n;
    enum rt_status st;
    rt_progress_begin(&j->progress, j->ctx->log, "scoring", "tokens", j->survey.tokens);
    RT_TRY(rt_logits_put_start(j, err));
    for (;;) {
        RT_TRY(fill_round(j, counted, &first, &index, &n, err));
        if (n == 0)
            break;
        RT_TRY(run_round(j, n, err));
        for (int i = 0; i < n; i++) {
            j->tokens_done += j->lane[i].tokens;
            j->lane[i].tokens = 0;
        }
        j->progress.done = j->tokens_done;
    }
out:
    st = end_writing(j, st, err);
    if (st == RT_OK)
        st = j->sink.finish(j->sink.self, err);
    rt_progress_end(&j->progress);
    tell_reading(j);
    tell_writing(j);
    return st;
}
