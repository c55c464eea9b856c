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
    const int have = be->count != NULL ? be->count() : 1;
    if (be->own_memory && j->lanes > have)
        RT_FAIL(err, DEVICE, "--gpus %d: %d are here", j->lanes, have);
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
        RT_TRY(rt_teacher_open(&o, &lane->teacher, err));
        if (loads > 0)
            RT_TRY(rt_alloc(loads, sizeof *lane->load, "expert load", &lane->load, err));
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
    for (int i = 0; i < j->lanes && j->lane != NULL; i++) {
        struct rt_logits_lane *lane = &j->lane[i];
        if (lane->device.dev != NULL && lane->device.be->attach != NULL)
            (void)lane->device.be->attach(lane->device.dev, NULL);
        rt_teacher_close(lane->teacher);
        rt_corpus_window_free(&lane->w);
        rt_free(lane->load);
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
    const bool failed = j->failed;
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
        n += j->lane[i].w.tokens * j->lane[i].done / j->config.layers;
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
        snprintf(out, cap, ", %.0f%% of %sFLOP/s", 100 * share * p->seconds_flops / elapsed, rt_human_count(a, p->rates.flops * j->lanes));
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
        j->progress.first += lane->w.tokens * done / layers;
    lane->done = done;
    const int64_t all = j->tokens_done + under_way(j);
    share_of_limit(j, all, share, sizeof share);
    snprintf(text, sizeof text, "window %" PRId64 "/%" PRId64 ", layer %d/%d%s", lane->window + 1, j->plan.windows, done, layers, share);
    rt_progress_update(&j->progress, all, text);
    pthread_mutex_unlock(&j->lock);
}

/* ---- rows in input order ---- */

/* Waits until the windows before this one are put. */
static enum rt_status take_turn(struct rt_logits_lane *lane, struct rt_err *err)
{
    struct rt_logits_job *j = lane->j;
    pthread_mutex_lock(&j->lock);
    while (j->turn != lane->index && !j->failed)
        pthread_cond_wait(&j->changed, &j->lock);
    const bool mine = j->turn == lane->index;
    pthread_mutex_unlock(&j->lock);
    return mine ? RT_OK : rt_fail(err, RT_INTERRUPTED, "a window before it was not finished");
}

static enum rt_status lane_put(void *self, const struct rt_rows *rows, struct rt_err *err)
{
    struct rt_logits_lane *lane = self;
    const enum rt_status st = take_turn(lane, err);
    return st == RT_OK ? lane->j->sink.put(lane->j->sink.self, rows, err) : st;
}

/* The window's rows are put: they and its counts are made to last, then its state is not needed any more. */
static enum rt_status close_window(struct rt_logits_lane *lane, struct rt_err *err)
{
    struct rt_logits_job *j = lane->j;
    enum rt_status st;
    RT_TRY(take_turn(lane, err));
    if (j->load.window != NULL)
        memcpy(j->load.window, lane->load, (size_t)j->config.layers * (size_t)j->config.experts * sizeof *lane->load);
    RT_TRY(rt_expert_load_save(&j->load, lane->window, err));
    RT_TRY(rt_shard_sink_hold(j->shards, err));
    RT_TRY(rt_score_drop(lane->dir, err));
out:
    return st;
}

static enum rt_status score_window(struct rt_logits_lane *lane, struct rt_err *err)
{
    struct rt_logits_job *j = lane->j;
    struct rt_score_options o = j->so;
    struct rt_row_sink sink = {lane, lane_put, NULL};
    enum rt_status st;
    if (lane->load != NULL)
        memset(lane->load, 0, (size_t)j->config.layers * (size_t)j->config.experts * sizeof *lane->load);
    o.load = lane->load;
    o.stop = lane_stop;
    o.progress = lane_progress;
    o.stop_self = o.progress_self = lane;
    o.keep.dir = j->keep || o.keep.spill ? lane->dir : NULL;
    o.keep.window = lane->window;
    o.keep.every = j->keep ? j->save_every : INFINITY;
    o.keep.note = lane_note;
    o.keep.note_self = lane;
    RT_TRY(rt_teacher_score(lane->teacher, &o, lane->w.seqs, lane->w.n, lane->skip, &sink, err));
    RT_TRY(close_window(lane, err));
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

/* The next windows that are not wholly put and counted; *n of them. first, index: sequences and windows before the next one. */
static enum rt_status fill_round(struct rt_logits_job *j, int64_t *first, int64_t *index, int *n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *n = 0;
    while (*n < j->lanes) {
        struct rt_logits_lane *lane = &j->lane[*n];
        RT_TRY(rt_corpus_next(j->corpus, j->plan.teacher.window, &lane->w, err));
        if (lane->w.n == 0)
            break;
        const int64_t put = j->resume.sequences > *first ? j->resume.sequences - *first : 0;
        lane->skip = put < lane->w.n ? put : lane->w.n;
        lane->window = (*index)++;
        lane->done = 0;
        *first += lane->w.n;
        RT_TRY(window_dir(j, lane->window, lane->dir, err));
        if (lane->skip == lane->w.n && (j->load.window == NULL || lane->window < j->load.windows)) {
            RT_TRY(rt_score_drop(lane->dir, err)); /* ended between its rows and this */
            j->tokens_done += lane->w.tokens;
            j->progress.first += lane->w.tokens;
            lane->w.tokens = 0;
            continue;
        }
        lane->saved = rt_score_saved_layer(lane->dir);
        (*n)++;
    }
    for (int i = *n; i < j->lanes; i++)
        j->lane[i].w.tokens = 0;
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
        const int layer = j->keep && lane->st != RT_INTERRUPTED ? rt_score_saved_layer(lane->dir) : 0;
        if (layer > 0)
            rt_info(j->ctx->log, "window %" PRId64 ": the state after layer %d of %d is kept in %s; the same command goes on from there", lane->window + 1,
                    layer, j->config.layers, lane->dir);
    }
    return worst != NULL ? rt_fail(err, worst->st, "%s", worst->err.msg) : RT_OK;
}

static enum rt_status run_round(struct rt_logits_job *j, int n, struct rt_err *err)
{
    int started = 0;
    j->turn = 0;
    j->failed = false;
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
    for (int i = 0; i < started; i++)
        pthread_join(j->lane[i].thread, NULL);
    const enum rt_status st = started < n ? rt_fail(err, RT_NOMEM, "cannot start a thread for device %d", started) : RT_OK;
    const enum rt_status worst = round_error(j, started, err);
    return st != RT_OK ? st : worst;
}

static void tell_reading(const struct rt_logits_job *j)
{
    char a[32];
    uint64_t bytes = 0, one;
    double waited = 0, seconds;
    for (int i = 0; i < j->lanes; i++) {
        rt_score_reading(j->lane[i].teacher, &one, &seconds);
        bytes += one;
        waited += seconds / j->lanes;
    }
    const double elapsed = rt_now() - j->progress.t_start;
    rt_info(j->ctx->log, "weights: %s read; %.1f%% of the time was spent waiting for them", rt_human_bytes(a, bytes),
            elapsed > 0 ? 100 * waited / elapsed : 0.0);
}

enum rt_status rt_logits_score(struct rt_logits_job *j, struct rt_err *err)
{
    int64_t first = 0, index = 0;
    int n;
    enum rt_status st;
    rt_progress_begin(&j->progress, j->ctx->log, "scoring", "tokens", j->survey.tokens);
    for (;;) {
        RT_TRY(fill_round(j, &first, &index, &n, err));
        if (n == 0)
            break;
        RT_TRY(run_round(j, n, err));
        for (int i = 0; i < n; i++) {
            j->tokens_done += j->lane[i].w.tokens;
            j->lane[i].w.tokens = 0;
        }
        j->progress.done = j->tokens_done;
    }
    RT_TRY(j->sink.finish(j->sink.self, err));
out:
    rt_progress_end(&j->progress);
    tell_reading(j);
    return st;
}
