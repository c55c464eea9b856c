/* The plan of `retort logits`: windows, passes, bytes, hours, and what memory and disk have to hold. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/pool.h"
#include "distill/logits.h"
#include "formats/manifest.h"
#include "teacher/feed.h"

/* A row of 64 entries is packed in 4 us by one core, a whole state of 7168 dimensions in about 130: more threads than this would wait
 * for the one that writes. */
enum { PACK_THREADS = 8, MOST_READERS = 16 };

/* Bytes that the shards will take: measured ratios of this format are near 5.5 bytes an entry. */
static double shard_bytes(const struct rt_logits_job *j)
{
    const double rows = (double)(j->so.completion_only ? j->survey.targets : j->survey.tokens);
    double token = 8;
    for (int i = 0; i < j->so.n_features; i++)
        token += j->so.feature[i].dim * (double)rt_dtype_size(j->so.feature[i].dtype);
    return rows * (5.5 * j->so.top_k + 4.0 * j->so.n_lse + 12) + (double)j->survey.tokens * token;
}

/* Bytes a token that features add to what a window holds in memory. */
static int64_t feature_bytes(const struct rt_logits_job *j)
{
    int64_t b = 0;
    for (int i = 0; i < j->so.n_features; i++)
        b += j->so.feature[i].dim * (int64_t)rt_dtype_size(j->so.feature[i].dtype);
    return b;
}

/* Threads that pack rows: what they hold is a small part of the memory. */
static uint64_t plan_packing(struct rt_logits_job *j)
{
    struct rt_row_identity id = {.n_ids = j->so.n_ids, .top_k = j->so.top_k, .n_lse = j->so.n_lse, .n_features = j->so.n_features, .boundary = j->so.boundary != NULL};
    const int cores = j->v->common.threads > 0 ? (int)j->v->common.threads : rt_cpu_count();
    memcpy(id.feature, j->so.feature, sizeof id.feature);
    j->put_threads = cores < PACK_THREADS ? cores : PACK_THREADS;
    while (j->put_threads > 1 && rt_shard_sink_pack_bytes(&id, j->survey.longest, j->put_threads) > (uint64_t)rt_command_memory(&j->v->common) / 16)
        j->put_threads--;
    return rt_shard_sink_pack_bytes(&id, j->survey.longest, j->put_threads);
}

/* One device's plan, with features held for the window or spilled to files. */
static enum rt_status plan_memory(struct rt_logits_job *j, const struct rt_teacher_sizes *sizes, bool spill, struct rt_teacher_plan *out,
                                  struct rt_err *err)
{
    struct rt_teacher_options o = j->to;
    j->so.keep.spill = spill;
    j->so.keep.dir = j->keep ? j->v->out : NULL; /* each window's own, later */
    const int windows = j->overlap ? 2 : 1;
    o.token_bytes = windows * (rt_score_token_bytes(&j->so) + 24); /* ids, masks, text of the window */
    o.memory -= windows * (int64_t)rt_score_fixed_bytes(&j->so, &j->config, j->survey.longest, o.device->be->own_memory);
    const enum rt_status st = rt_teacher_plan_sizes(&o, sizes, out, err);
    j->to.token_bytes = o.token_bytes;
    j->to.memory = o.memory;
    return st;
}

/* Features stay in memory where the window does not suffer, else they leave for files. Windows are made even where the plan chose them. */
static enum rt_status plan_windows(struct rt_logits_job *j, struct rt_err *err)
{
    struct rt_teacher_sizes sizes;
    struct rt_teacher_plan held, spilled;
    const int64_t memory = j->to.memory;
    struct rt_err why = {0};
    enum rt_status st;
    RT_TRY(rt_teacher_measure(&j->to, &sizes, err));
    const enum rt_status fits = plan_memory(j, &sizes, false, &held, &why);
    if (j->so.n_features == 0 && fits != RT_OK)
        RT_TRY(rt_fail(err, fits, "%s", why.msg));
    j->plan.teacher = held;
    if (j->so.n_features > 0) {
        j->to.memory = memory;
        const enum rt_status other = plan_memory(j, &sizes, true, &spilled, &why);
        if (fits != RT_OK && other != RT_OK)
            RT_TRY(rt_fail(err, fits, "%s", why.msg));
        if (fits != RT_OK || (other == RT_OK && spilled.window > held.window)) {
            j->plan.teacher = spilled;
        } else {
            j->to.memory = memory;
            RT_TRY(plan_memory(j, &sizes, false, &j->plan.teacher, err));
        }
    }
    if (j->to.window == 0) {
        j->to.window = rt_corpus_even_window(j->corpus, j->plan.teacher.window);
        RT_TRY(rt_teacher_plan_sizes(&j->to, &sizes, &j->plan.teacher, err));
    }
out:
    return st;
}

/* Devices with memory of their own go on while the host writes rows, where it holds those of two windows and there is a next window; others have their
 * cores busy, and need the memory for the window. */
static enum rt_status plan_overlap(struct rt_logits_job *j, struct rt_err *err)
{
    const struct rt_teacher_options to = j->to;
    struct rt_err why = {0};
    j->overlap = to.device->be->own_memory;
    if (j->overlap && plan_windows(j, &why) == RT_OK && rt_corpus_windows(j->corpus, j->plan.teacher.window) > j->lanes)
        return RT_OK;
    j->overlap = false;
    j->to = to;
    return plan_windows(j, err);
}

static enum rt_status published_bytes(struct rt_logits_job *j, struct rt_err *err)
{
    struct rt_manifest m = {0};
    const enum rt_status st = rt_path_is_dir(j->v->out) ? rt_manifest_read(j->v->out, j->part, j->n_parts, &m, err) : RT_OK;
    j->plan.published = m.bytes;
    rt_manifest_free(&m);
    return st;
}

static enum rt_status check_disk(struct rt_logits_job *j, struct rt_err *err)
{
    const struct rt_logits_plan *p = &j->plan;
    char shards[32], states[32], have[32];
    uint64_t disk;
    enum rt_status st;
    RT_TRY(published_bytes(j, err));
    RT_TRY(rt_disk_free(j->v->out, &disk, err));
    const uint64_t left = p->shard_bytes > p->published ? p->shard_bytes - p->published : 0;
    if (disk < left + p->state_bytes)
        RT_FAIL(err, REFUSED, "%s: about %s of shards and %s for windows under way%s, but %s are free there", j->v->out, rt_human_bytes(shards, left),
                rt_human_bytes(states, p->state_bytes), j->keep ? " (--save-state never keeps no states)" : "", rt_human_bytes(have, disk));
out:
    return st;
}

/* How many threads read, and how fast. Devices of one machine share them; each needs some to copy from what others read. */
static void plan_reading(struct rt_logits_job *j)
{
    const struct rt_logits_values *v = j->v;
    const bool own = j->to.device->be->own_memory;
    struct rt_logits_rates *r = &j->plan.rates;
    int most = !own ? 1 : v->readers > 0 ? (int)v->readers : MOST_READERS;
    while (own && v->readers == 0 && most > 1 && rt_feed_staging(most) > (uint64_t)j->to.memory / 8)
        most /= 2;
    if (!v->common.quiet || own) /* there the plan depends on it */
        rt_logits_measure(j->to.device, j->to.w8a8, v->teacher, most, v->readers > 0, r);
    j->to.readers = v->readers > 0 ? (int)v->readers : r->readers > 0 ? r->readers : most < 8 ? most : 8;
    if (j->lanes > 1 && own) {
        j->to.devices = j->lanes;
        j->to.readers = (j->to.readers + j->lanes - 1) / j->lanes;
        j->to.readers = j->to.readers < 2 ? 2 : j->to.readers;
    }
    if (!own)
        j->to.readers = (int)v->readers;
}

static int at_once(const struct rt_logits_job *j)
{
    const int parts = rt_cpu_count() / j->to.threads;
    return j->to.device->be->own_memory || parts >= j->lanes ? j->lanes : parts > 0 ? parts : 1;
}

enum rt_status rt_logits_make_plan(struct rt_logits_job *j, struct rt_err *err)
{
    struct rt_logits_plan *p = &j->plan;
    const struct rt_logits_values *v = j->v;
    enum rt_status st;
    j->to.dir = v->teacher;
    j->to.device = &j->lane[0].device;
    j->to.w8a8 = strcmp(v->numerics, "w8a8") == 0;
    j->to.memory = rt_command_memory(&v->common) / j->lanes;
    j->to.gpu_memory = v->common.gpu_memory;
    j->to.threads = ((v->common.threads > 0 ? (int)v->common.threads : rt_cpu_count()) + j->lanes - 1) / j->lanes;
    j->to.max_length = j->survey.longest;
    j->to.window = j->to.window > 0 ? j->to.window : v->window;
    j->to.data_tokens = j->survey.tokens;
    plan_reading(j);
    j->to.memory -= (int64_t)plan_packing(j) / j->lanes;
    RT_TRY(plan_overlap(j, err));
    const struct rt_teacher_plan *t = &p->teacher;
    p->windows = rt_corpus_windows(j->corpus, t->window);
    p->passes = (p->windows + j->lanes - 1) / j->lanes;
    p->fill = (double)j->survey.tokens / ((double)p->windows * (double)t->window);
    p->flops = (double)j->survey.tokens * rt_teacher_flops(&j->config, (double)j->survey.tokens / (double)j->survey.sequences);
    p->bytes_read = t->resident ? t->model_bytes : (uint64_t)(j->to.devices > 1 ? p->passes : p->windows) * t->model_bytes;
    p->shard_bytes = (uint64_t)shard_bytes(j);
    if (j->keep || j->so.keep.spill) {
        const uint64_t all = rt_score_keep_bytes(&j->so, &j->config, rt_device_act_size(&j->lane[0].device), t->window);
        const uint64_t features = (uint64_t)t->window * (uint64_t)feature_bytes(j);
        p->state_bytes = (uint64_t)(j->overlap ? 2 : 1) * (uint64_t)j->lanes * (j->keep ? all : features);
    }
    p->at_once = at_once(j);
    p->seconds_flops = p->rates.flops > 0 ? p->flops / (p->rates.flops * p->at_once) : 0;
    p->seconds_read = p->rates.read > 0 ? (double)p->bytes_read / p->rates.read : 0;
    RT_TRY(check_disk(j, err));
out:
    return st;
}

/* "at least 3h12m (arithmetic: 1.2e+15 operations at 103 GFLOP/s, a float32 product measured here)" into buf. */
static const char *time_text(const struct rt_logits_plan *p, char *buf, size_t cap)
{
    char t[32], a[32], b[32];
    if (p->seconds_flops <= 0 && p->seconds_read <= 0)
        snprintf(buf, cap, "not estimated");
    else if (p->seconds_flops >= p->seconds_read)
        snprintf(buf, cap, "at least %s (arithmetic: %.3g operations at %sFLOP/s, %s%s)", rt_human_time(t, p->seconds_flops), p->flops,
                 rt_human_count(a, p->rates.flops * p->at_once), p->rates.flops_name, p->at_once > 1 ? ", times the devices" : "");
    else
        snprintf(buf, cap, "at least %s (reading: %s at %s/s, %s)", rt_human_time(t, p->seconds_read), rt_human_bytes(a, p->bytes_read),
                 rt_human_bytes(b, (uint64_t)p->rates.read), p->rates.read_name);
    return buf;
}

void rt_logits_log_plan(struct rt_logits_job *j)
{
    const struct rt_logits_plan *p = &j->plan;
    const struct rt_teacher_plan *t = &p->teacher;
    char a[32], b[32], c[32], d[32], text[256];
    rt_info(j->ctx->log, "plan: %ld window%s of %ld tokens (%.0f%% full), %ld pass%s over %s of weights (%s), %s of memory, about %s of shards, %s for windows under way",
            (long)p->windows, p->windows == 1 ? "" : "s", (long)t->window, 100 * p->fill, (long)p->passes, p->passes == 1 ? "" : "es",
            rt_human_bytes(a, t->model_bytes), t->resident ? "kept in memory" : "streamed", rt_human_bytes(b, t->window_bytes),
            rt_human_bytes(c, p->shard_bytes), rt_human_bytes(d, p->state_bytes));
    if (t->gpu_bytes > 0)
        rt_info(j->ctx->log, "GPU memory: %s = %s of states, %s for operations, %s for weights%s", rt_human_bytes(a, t->gpu_bytes),
                rt_human_bytes(b, t->gpu_state), rt_human_bytes(c, t->gpu_scratch), rt_human_bytes(d, t->gpu_weight_budget),
                t->gpu_resident ? ", where all stay" : "");
    if (j->so.n_features > 0)
        rt_info(j->ctx->log, "features: %s a token, %s", rt_human_bytes(a, (uint64_t)feature_bytes(j)),
                j->so.keep.spill ? "in files until a window's rows are written: memory would make the window smaller" : "in memory until a window's rows are written");
    rt_info(j->ctx->log, "rows: packed by %d thread%s, %s", j->put_threads, j->put_threads > 1 ? "s" : "",
            j->overlap ? "while the next window is scored" : "before the next window begins");
    rt_info(j->ctx->log, "time: %s", time_text(p, text, sizeof text));
}

static void print_json(const struct rt_logits_job *j)
{
    const struct rt_logits_plan *p = &j->plan;
    const struct rt_teacher_plan *t = &p->teacher;
    printf("{\"sequences\":%ld,\"tokens\":%ld,\"targets\":%ld,\"window\":%ld,\"windows\":%ld,\"fill\":%.4f,\"devices\":%d,\"passes\":%ld,"
           "\"weight_bytes\":%" PRIu64 ",\"bytes_read\":%" PRIu64 ",\"state_bytes\":%" PRIu64 ",\"gpu_bytes\":%" PRIu64 ",\"shard_bytes\":%" PRIu64
           ",\"state_disk_bytes\":%" PRIu64 ",\"feature_token_bytes\":%" PRId64 ",\"features_spilled\":%s,\"flops\":%.6g,\"flops_per_second\":%.6g,"
           "\"read_bytes_per_second\":%.6g,\"seconds_arithmetic\":%.6g,\"seconds_reading\":%.6g}\n",
           (long)j->survey.sequences, (long)j->survey.tokens, (long)j->survey.targets, (long)t->window, (long)p->windows, p->fill, j->lanes,
           (long)p->passes, t->model_bytes, p->bytes_read, t->window_bytes, t->gpu_bytes, p->shard_bytes, p->state_bytes, feature_bytes(j),
           j->so.keep.spill ? "true" : "false", p->flops, p->rates.flops * p->at_once, p->rates.read, p->seconds_flops, p->seconds_read);
}

void rt_logits_print_plan(const struct rt_logits_job *j)
{
    const struct rt_logits_plan *p = &j->plan;
    const struct rt_teacher_plan *t = &p->teacher;
    char a[32], b[32], c[32], d[32], text[256];
    if (j->v->common.json) {
        print_json(j);
        return;
    }
    printf("sequences     %ld\ntokens        %ld (%ld targets)\nwindow        %ld tokens\nwindows       %ld, %.0f%% full\npasses        %ld%s\n",
           (long)j->survey.sequences, (long)j->survey.tokens, (long)j->survey.targets, (long)t->window, (long)p->windows, 100 * p->fill,
           (long)p->passes, j->lanes > 1 ? " by each device" : "");
    printf("weights       %s, %s\nread          %s\nmemory        %s for a window%s\n", rt_human_bytes(a, t->model_bytes),
           t->resident ? "kept in memory" : "streamed each pass", rt_human_bytes(b, p->bytes_read), rt_human_bytes(c, t->window_bytes),
           j->lanes > 1 ? ", on each device" : "");
    if (t->gpu_bytes > 0)
        printf("GPU memory    %s: %s of states, %s for operations, %s for weights\n", rt_human_bytes(a, t->gpu_bytes), rt_human_bytes(b, t->gpu_state),
               rt_human_bytes(c, t->gpu_scratch), rt_human_bytes(d, t->gpu_weight_budget));
    if (j->so.n_features > 0)
        printf("features      %s a token, %s\n", rt_human_bytes(a, (uint64_t)feature_bytes(j)), j->so.keep.spill ? "in files during a window" : "in memory during a window");
    printf("shards        about %s\nstates        %s on disk during a window\noperations    %.3g\n", rt_human_bytes(a, p->shard_bytes),
           rt_human_bytes(b, p->state_bytes), p->flops);
    printf("time          %s\n", time_text(p, text, sizeof text));
    if (p->seconds_flops > 0)
        printf("  arithmetic  %s at %sFLOP/s (%s)\n", rt_human_time(a, p->seconds_flops), rt_human_count(b, p->rates.flops * p->at_once), p->rates.flops_name);
    if (p->seconds_read > 0)
        printf("  reading     %s at %s/s (%s)\n", rt_human_time(a, p->seconds_read), rt_human_bytes(b, (uint64_t)p->rates.read), p->rates.read_name);
}
