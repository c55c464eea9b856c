/* retort logits: teacher-forced scoring of a corpus into row shards. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "distill/command.h"
#include "distill/corpus.h"
#include "distill/expert_load.h"
#include "distill/spans.h"
#include "formats/rundir.h"
#include "formats/shard.h"
#include "teacher/score.h"

struct values {
    struct rt_common common;
    const char *teacher, *data, *out, *cache, *lse, *features, *numerics, *overlong, *rows, *part, *template_name;
    int64_t max_length, window, rows_per_shard;
    bool boundary;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"teacher", RT_OPT_STRING, V(teacher), NULL, 0, 0, NULL, "DIR", "checkpoint directory of the teacher", true, false},
    {"data", RT_OPT_STRING, V(data), NULL, 0, 0, NULL, "FILE|DIR", "JSON lines, or a directory of traces (accepted.jsonl is preferred to traces.jsonl)", true, false},
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "DIR", "where the shards go; the same command resumes", true, true},
    {"cache", RT_OPT_STRING, V(cache), "topk=64", 0, 0, NULL, "topk=K", "ids and logits kept a row; topk=0 keeps none (features or boundaries alone)", false, false},
    {"lse", RT_OPT_STRING, V(lse), "1", 0, 0, NULL, "T,T,...", "temperatures whose log-sum-exp is stored; a student can train with exact tails at these; 1 always is", false, false},
    {"features", RT_OPT_STRING, V(features), NULL, 0, 0, NULL, "L,L,final[:DIM]", "hidden states to store: 0 embeddings, L after layer L, final after the last norm; with :DIM a seeded orthogonal projection in FP8, else whole states in BF16", false, false},
    {"boundary", RT_OPT_FLAG, V(boundary), NULL, 0, 0, NULL, NULL, "store how likely each next token begins at a boundary: what `retarget --mode alm` cuts its spans by", false, false},
    {"numerics", RT_OPT_CHOICE, V(numerics), "w8a16", 0, 0, "w8a16|w8a8", NULL, "w8a8 quantises activations to FP8 as the published FP8 model runs", false, false},
    {"max-length", RT_OPT_INT, V(max_length), "0", 0, 1e9, NULL, "N", "longest sequence in tokens; 0 takes the teacher's maximum", false, false},
    {"overlong", RT_OPT_CHOICE, V(overlong), "drop", 0, 0, "drop|split", NULL, "what to do with longer ones", false, false},
    {"rows", RT_OPT_CHOICE, V(rows), "completion", 0, 0, "completion|all", NULL, "completion: only rows whose next token is a target (all rows of plain text)", false, false},
    {"part", RT_OPT_STRING, V(part), "0/1", 0, 0, NULL, "I/N", "score one of N shares, I from 0; directories of all shares merge by copying them together", false, false},
    {"template", RT_OPT_STRING, V(template_name), NULL, 0, 0, NULL, "NAME", "chat template to use instead of the teacher's own", false, false},
    {"window", RT_OPT_INT, V(window), "0", 0, 1e9, NULL, "N", "tokens that go through a layer together; 0 plans it from memory", false, false},
    {"rows-per-shard", RT_OPT_INT, V(rows_per_shard), "0", 0, 1e9, NULL, "N", "cut shards after so many rows; 0 takes 65536", false, false},
    {0},
};

struct job {
    struct rt_context *ctx;
    const struct values *v;
    struct rt_device device;
    struct rt_model_dir model;
    struct rt_corpus *corpus;
    struct rt_corpus_survey survey;
    struct rt_teacher_config config;
    struct rt_teacher_options to;
    struct rt_teacher *teacher;
    struct rt_score_options so;
    struct rt_row_identity id;
    struct rt_shard_sink *shards;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_expert_load load;
    struct rt_progress progress;
    uint8_t *boundary;       /* [n_ids] NULL: not asked for */
    int64_t tokens_done, window_tokens;
    int part, n_parts;
    char plan_file[4096];
};

static enum rt_status parse_features(const char *text, struct rt_score_options *o, int hidden, struct rt_err *err)
{
    long dim[RT_MAX_FEATURES];
    while (text != NULL && *text != '\0') {
        char *end;
        if (o->n_features == RT_MAX_FEATURES)
            return rt_fail(err, RT_USAGE, "--features: more than %d layers", RT_MAX_FEATURES);
        struct rt_feature_spec *s = &o->feature[o->n_features];
        if (strncmp(text, "final", 5) == 0) {
            s->layer = RT_LAYER_FINAL;
            end = (char *)(uintptr_t)text + 5;
        } else {
            s->layer = (int)strtol(text, &end, 10);
        }
        dim[o->n_features] = 0;
        if (end != text && *end == ':')
            dim[o->n_features] = strtol(end + 1, &end, 10);
        if (end == text || (*end != ',' && *end != '\0') || s->layer < RT_LAYER_FINAL || dim[o->n_features] < 0)
            return rt_fail(err, RT_USAGE, "--features: expected layers as in 20,40,final or 20,40:512, found '%s'", text);
        o->n_features++;
        text = *end == ',' ? end + 1 : end;
    }
    /* a dimension at the end is that of every layer that names none */
    for (int i = 0; i < o->n_features; i++) {
        const long d = dim[i] > 0 ? dim[i] : dim[o->n_features - 1];
        o->feature[i].projected = d > 0;
        o->feature[i].dim = d > 0 ? (int)d : hidden;
        o->feature[i].dtype = d > 0 ? RT_E4M3 : RT_BF16;
        if (d > hidden)
            return rt_fail(err, RT_USAGE, "--features: %ld dimensions of states of %d", d, hidden);
    }
    return RT_OK;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static enum rt_status parse_options(struct job *j, struct rt_err *err)
{
    const struct values *v = j->v;
    struct rt_score_options *o = &j->so;
    enum rt_status st;
    char tail;
    if (sscanf(v->cache, "topk=%d%c", &o->top_k, &tail) != 1 || o->top_k < 0 || o->top_k > 65536)
        RT_FAIL(err, USAGE, "--cache %s: expected topk=K with K from 0 to 65536", v->cache);
    if (sscanf(v->part, "%d/%d%c", &j->part, &j->n_parts, &tail) != 2 || j->n_parts < 1 || j->part < 0 || j->part >= j->n_parts)
        RT_FAIL(err, USAGE, "--part %s: expected I/N with 0 <= I < N", v->part);
    RT_TRY(rt_parse_doubles("lse", v->lse, o->lse_temperature, RT_MAX_LSE, &o->n_lse, err));
    bool one = false;
    for (int i = 0; i < o->n_lse; i++) {
        if (!(o->lse_temperature[i] >= 0.01 && o->lse_temperature[i] <= 100))
            RT_FAIL(err, USAGE, "--lse %g: temperatures go from 0.01 to 100", o->lse_temperature[i]);
        one |= o->lse_temperature[i] == 1;
    }
    if (!one && o->n_lse == RT_MAX_LSE)
        RT_FAIL(err, USAGE, "--lse: at most %d temperatures, 1 among them", RT_MAX_LSE);
    if (!one)
        o->lse_temperature[o->n_lse++] = 1;
    qsort(o->lse_temperature, (size_t)o->n_lse, sizeof(double), by_value);
    for (int i = 1; i < o->n_lse; i++)
        if (o->lse_temperature[i] == o->lse_temperature[i - 1])
            RT_FAIL(err, USAGE, "--lse: temperature %g is there twice", o->lse_temperature[i]);
    o->completion_only = strcmp(v->rows, "completion") == 0;
    o->projection_seed = (uint64_t)v->common.seed;
    RT_TRY(parse_features(v->features, o, j->config.hidden, err));
    if (o->top_k == 0 && o->n_features == 0 && !v->boundary)
        RT_FAIL(err, USAGE, "--cache topk=0 without --features or --boundary would store nothing");
out:
    return st;
}

static enum rt_status read_data(struct job *j, struct rt_err *err)
{
    const struct values *v = j->v;
    enum rt_status st;
    const int64_t most = v->max_length > 0 && v->max_length < j->config.max_position ? v->max_length : j->config.max_position;
    RT_TRY(rt_model_dir_open(v->teacher, v->template_name, j->ctx->log, &j->model, err));
    RT_TRY(rt_model_dir_n_ids(&j->model, j->config.vocab_size, &j->so.n_ids, err));
    if (j->so.top_k > j->so.n_ids)
        j->so.top_k = (int)j->so.n_ids;
    if (v->boundary) {
        if (j->model.tok == NULL)
            RT_FAIL(err, USAGE, "--boundary: %s has no tokenizer.json to tell boundaries by", v->teacher);
        RT_TRY(rt_alloc((size_t)j->so.n_ids, 1, "boundary ids", &j->boundary, err));
        rt_boundary_ids(j->model.tok, j->so.n_ids, j->boundary);
        j->so.boundary = j->boundary;
    }
    const struct rt_corpus_options co = {.data = v->data, .model = &j->model, .n_ids = j->so.n_ids, .max_length = most,
                                         .overlong = strcmp(v->overlong, "split") == 0 ? RT_OVERLONG_SPLIT : RT_OVERLONG_DROP,
                                         .part = j->part, .n_parts = j->n_parts};
    RT_TRY(rt_corpus_open(&co, &j->corpus, err));
    RT_TRY(rt_corpus_survey(j->corpus, &j->survey, err));
    const struct rt_dataset_counts *c = &j->survey.counts;
    rt_info(j->ctx->log, "data: %ld lines, %ld sequences, %ld tokens, %ld targets; longest %ld", (long)c->lines, (long)j->survey.sequences,
            (long)j->survey.tokens, (long)j->survey.targets, (long)j->survey.longest);
    if (c->dropped > 0)
        rt_warn(j->ctx->log, "%ld lines are longer than %ld tokens and are left out (--overlong split keeps them in pieces)", (long)c->dropped, (long)most);
    if (c->untargeted > 0)
        rt_warn(j->ctx->log, "%ld sequences have no target and are left out", (long)c->untargeted);
    if (c->not_nfc > 0 && j->model.tok != NULL && rt_tokenizer_normalizes(j->model.tok))
        rt_warn(j->ctx->log, "%ld lines are not in Unicode NFC: their tokens stand for other bytes than the text", (long)c->not_nfc);
    if (j->survey.sequences == 0)
        RT_FAIL(err, FORMAT, "%s: no sequence to score", v->data);
out:
    return st;
}

/* The identity of the rows. The teacher is open. */
static void identify(struct job *j)
{
    struct rt_row_identity *id = &j->id;
    const char *base = strrchr(j->v->teacher, '/');
    *id = (struct rt_row_identity){.vocab_size = j->config.vocab_size, .teacher_layers = j->config.layers, .n_ids = j->so.n_ids, .top_k = j->so.top_k, .n_lse = j->so.n_lse,
                                   .completion_only = j->so.completion_only, .max_length = j->v->max_length,
                                   .projection_seed = j->so.projection_seed, .n_features = j->so.n_features, .boundary = j->so.boundary != NULL};
    snprintf(id->teacher_sha256, sizeof id->teacher_sha256, "%s", rt_teacher_sha256(j->teacher));
    snprintf(id->teacher_name, sizeof id->teacher_name, "%s", base != NULL && base[1] != '\0' ? base + 1 : j->v->teacher);
    snprintf(id->mode, sizeof id->mode, "%s/%s/%s", j->v->numerics, j->device.be->act == RT_F32 ? "f32" : "bf16", j->device.be->name);
    if (j->model.tok != NULL)
        snprintf(id->tokenizer_sha256, sizeof id->tokenizer_sha256, "%s", rt_tokenizer_sha256(j->model.tok));
    if (j->model.tmpl != NULL)
        snprintf(id->template_sha256, sizeof id->template_sha256, "%s", rt_template_sha256(j->model.tmpl));
    memcpy(id->lse_temperature, j->so.lse_temperature, sizeof id->lse_temperature);
    memcpy(id->feature, j->so.feature, sizeof id->feature);
}

/* Reads the window plan of an earlier run into the options, after comparing the arguments; *found says whether there was one. */
static enum rt_status load_plan(struct job *j, const struct rt_json *config, bool *found, struct rt_err *err)
{
    struct rt_json *was = NULL;
    struct rt_buf diff = {0};
    bool differ;
    enum rt_status st = RT_OK;
    *found = rt_path_exists(j->plan_file);
    if (!*found)
        return RT_OK;
    RT_TRY(rt_json_load(j->plan_file, 1 << 20, &was, err));
    const struct rt_json *plan = rt_json_get(was, "plan"), *before = rt_json_get(was, "config");
    if (plan == NULL || before == NULL)
        RT_FAIL(err, FORMAT, "%s: expected members \"config\" and \"plan\"", j->plan_file);
    RT_TRY(rt_config_diff(before, config, &differ, &diff, err));
    if (differ)
        RT_FAIL(err, REFUSED, "%s holds rows of another command; %.*s; use another --out", j->v->out, (int)(diff.len < 300 ? diff.len : 300), diff.data);
    RT_TRY(rt_json_int(plan, "window", 1, INT64_MAX, &j->to.window, err));
    RT_TRY(rt_json_int(plan, "chunk", 1, INT64_MAX, &j->to.chunk, err));
out:
    rt_buf_free(&diff);
    rt_json_free(was);
    return st;
}

static enum rt_status save_plan(struct job *j, const struct rt_json *config, struct rt_err *err)
{
    struct rt_json *root = NULL, *plan;
    struct rt_buf text = {0};
    enum rt_status st;
    RT_TRY(rt_json_new_object(&root, err));
    RT_TRY(rt_json_set_copy(root, "config", config, err));
    RT_TRY(rt_json_set_object(root, "plan", &plan, err));
    RT_TRY(rt_json_set_int(plan, "window", rt_teacher_plan(j->teacher)->window, err));
    RT_TRY(rt_json_set_int(plan, "chunk", rt_teacher_plan(j->teacher)->chunk, err));
    RT_TRY(rt_json_dump(root, 2, &text, err));
    RT_TRY(rt_publish_bytes(j->plan_file, text.data, text.len, err));
out:
    rt_buf_free(&text);
    rt_json_free(root);
    return st;
}

/* Bytes that the shards will take: measured ratios of this format are near 5.5 bytes an entry. */
static double shard_bytes(const struct job *j)
{
    const double rows = (double)(j->so.completion_only ? j->survey.targets : j->survey.tokens);
    double token = 8;
    for (int i = 0; i < j->so.n_features; i++)
        token += j->so.feature[i].dim * (double)rt_dtype_size(j->so.feature[i].dtype);
    return rows * (5.5 * j->so.top_k + 4.0 * j->so.n_lse + 12) + (double)j->survey.tokens * token;
}

static enum rt_status print_plan(struct job *j, const struct rt_teacher_plan *p, struct rt_err *err)
{
    char a[32], b[32], c[32], d[32], slow[32], fast[32];
    uint64_t disk;
    enum rt_status st;
    const int64_t passes = (j->survey.tokens + p->window - 1) / p->window;
    const double flops = (double)j->survey.tokens * rt_teacher_flops(&j->config, (double)j->survey.tokens / (double)j->survey.sequences);
    rt_info(j->ctx->log, "plan: windows of %ld tokens, %ld pass%s over %s of weights (%s), %s of states, about %s of shards, %.3g floating-point operations",
            (long)p->window, (long)passes, passes == 1 ? "" : "es", rt_human_bytes(a, p->model_bytes), p->resident ? "kept in memory" : "streamed",
            rt_human_bytes(b, p->window_bytes), rt_human_bytes(c, (uint64_t)shard_bytes(j)), flops);
    RT_TRY(rt_disk_free(j->v->out, &disk, err));
    if ((double)disk < shard_bytes(j))
        RT_FAIL(err, REFUSED, "%s: about %s of shards, but %s are free there", j->v->out, c, rt_human_bytes(d, disk));
    if (!j->v->common.dry_run)
        return RT_OK;
    if (j->v->common.json)
        printf("{\"sequences\":%ld,\"tokens\":%ld,\"targets\":%ld,\"window\":%ld,\"passes\":%ld,\"weight_bytes\":%lu,\"bytes_read\":%lu,\"state_bytes\":%lu,"
               "\"shard_bytes\":%.0f,\"flops\":%.6g}\n", (long)j->survey.sequences, (long)j->survey.tokens, (long)j->survey.targets, (long)p->window,
               (long)passes, (unsigned long)p->model_bytes, (unsigned long)(p->resident ? p->model_bytes : (uint64_t)passes * p->model_bytes),
               (unsigned long)p->window_bytes, shard_bytes(j), flops);
    else
        printf("sequences     %ld\ntokens        %ld (%ld targets)\nwindow        %ld tokens, %ld pass%s\nweights       %s, %s\nstates        %s\n"
               "shards        about %s\noperations    %.3g: %s at 100 GFLOP/s, %s at 500 TFLOP/s\n", (long)j->survey.sequences,
               (long)j->survey.tokens, (long)j->survey.targets, (long)p->window, (long)passes, passes == 1 ? "" : "es", a,
               p->resident ? "read once" : "read each pass", b, c, flops, rt_human_time(slow, flops / 1e11), rt_human_time(fast, flops / 5e14));
out:
    return st;
}

static void on_layer(void *self, int done, int layers)
{
    struct job *j = self;
    char note[64];
    snprintf(note, sizeof note, "layer %d/%d", done, layers);
    rt_progress_update(&j->progress, j->tokens_done + j->window_tokens * done / layers, note);
}

/* Windows one after the other; those that are wholly published and counted are passed over. */
static enum rt_status score_all(struct job *j, struct rt_err *err)
{
    struct rt_rows *seqs;
    int64_t n, first = 0, index = 0;
    enum rt_status st;
    rt_progress_begin(&j->progress, j->ctx->log, "scoring", "tokens", j->survey.tokens);
    for (;; first += n, index++, j->tokens_done += j->window_tokens) {
        RT_TRY(rt_corpus_window(j->corpus, rt_teacher_plan(j->teacher)->window, &seqs, &n, &j->window_tokens, err));
        if (n == 0)
            break;
        const int64_t published = j->resume.sequences > first ? j->resume.sequences - first : 0, skip = published < n ? published : n;
        if (skip == n && (j->load.window == NULL || index < j->load.windows))
            continue;
        rt_expert_load_window(&j->load);
        RT_TRY(rt_teacher_score(j->teacher, &j->so, seqs, n, skip, &j->sink, err));
        RT_TRY(rt_expert_load_save(&j->load, index, err));
    }
    RT_TRY(j->sink.finish(j->sink.self, err));
out:
    rt_progress_end(&j->progress);
    return st;
}

static enum rt_status report(struct job *j, struct rt_err *err)
{
    struct rt_shard_set *set = NULL;
    char bytes[32];
    enum rt_status st;
    RT_TRY(rt_shard_set_open(j->v->out, &set, err));
    const struct rt_shard_info *info = rt_shard_set_info(set);
    rt_info(j->ctx->log, "%s: %ld sequences, %ld rows in %ld shards, %s, %.1f bytes a row%s", j->v->out, (long)info->sequences, (long)info->rows,
            (long)info->shards, rt_human_bytes(bytes, info->bytes), info->rows > 0 ? (double)info->bytes / (double)info->rows : 0.0,
            info->finished ? "" : "; other parts are still missing");
    for (int i = 0; i < j->so.n_lse && j->so.top_k > 0; i++)
        rt_info(j->ctx->log, "top-%d mass at T=%g: mean %.4f, least sequence %.4f", j->so.top_k, j->so.lse_temperature[i], info->mass[i], info->mass_min[i]);
    if (j->v->common.json)
        printf("{\"sequences\":%ld,\"rows\":%ld,\"tokens\":%ld,\"shards\":%ld,\"bytes\":%lu,\"nll\":%.6f}\n", (long)info->sequences, (long)info->rows,
               (long)info->tokens, (long)info->shards, (unsigned long)info->bytes, info->nll);
out:
    rt_shard_set_free(set);
    return st;
}

static enum rt_status open_teacher(struct job *j, bool plan_only, struct rt_err *err)
{
    struct rt_teacher_plan plan;
    enum rt_status st;
    j->to.dir = j->v->teacher;
    j->to.device = &j->device;
    j->to.w8a8 = strcmp(j->v->numerics, "w8a8") == 0;
    j->to.memory = rt_command_memory(&j->v->common);
    j->to.gpu_memory = j->v->common.gpu_memory;
    j->to.max_length = j->survey.longest;
    j->to.window = j->to.window > 0 ? j->to.window : j->v->window;
    j->to.data_tokens = j->survey.tokens;
    j->to.token_bytes = rt_score_token_bytes(&j->so) + 24; /* ids, masks, text of the window */
    RT_TRY(rt_teacher_plan_memory(&j->to, &plan, err));
    RT_TRY(print_plan(j, &plan, err));
    if (!plan_only)
        RT_TRY(rt_teacher_open(&j->to, &j->teacher, err));
out:
    return st;
}

static enum rt_status open_out(struct job *j, const struct rt_json *config, bool resumed, struct rt_err *err)
{
    const struct rt_shard_options so = {.rows_per_shard = j->v->rows_per_shard, .part = j->part, .n_parts = j->n_parts};
    enum rt_status st;
    identify(j);
    RT_TRY(rt_shard_sink_open(j->v->out, &j->id, &so, &j->shards, &j->sink, &j->resume, err));
    char kept[4096];
    RT_TRY(rt_path_join(kept, sizeof kept, j->v->out, "teacher", err));
    if (j->part == 0)
        RT_TRY(rt_model_dir_keep(&j->model, kept, err)); /* `retarget` needs the bytes of the ids */
    if (!resumed)
        RT_TRY(save_plan(j, config, err));
    RT_TRY(rt_expert_load_open(&j->load, j->v->out, j->part, j->n_parts, j->config.layers, j->config.experts, err));
    j->so.load = j->load.window;
    if (j->resume.sequences > 0)
        rt_info(j->ctx->log, "going on after %ld published sequences", (long)j->resume.sequences);
out:
    return st;
}

static void close_job(struct job *j)
{
    rt_shard_sink_free(j->shards);
    rt_teacher_close(j->teacher);
    rt_corpus_close(j->corpus);
    rt_model_dir_close(&j->model);
    rt_expert_load_close(&j->load);
    rt_free(j->boundary);
    rt_device_close(&j->device);
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    struct job j = {.ctx = ctx, .v = values};
    struct rt_json *config = NULL;
    enum rt_status st;
    int n_ops;
    bool resumed = false;
    (void)pos;
    RT_TRY(rt_teacher_config_load(j.v->teacher, &j.config, err));
    RT_TRY(parse_options(&j, err));
    enum rt_op ops[RT_OP_COUNT];
    const enum rt_op *score = rt_teacher_score_ops(&n_ops);
    memcpy(ops, score, (size_t)n_ops * sizeof *ops);
    if (j.v->boundary)
        ops[n_ops++] = RT_OP_head_likelihood;
    RT_TRY(rt_command_device(ctx, &j.v->common, ops, n_ops, &j.device, err));
    RT_TRY(read_data(&j, err));
    RT_TRY(rt_command_config(ctx->command, values, &config, err));
    RT_TRY(rt_json_set_string(config, "data_sha256", j.survey.sha256, err));
    char name[64];
    snprintf(name, sizeof name, j.n_parts > 1 ? "logits-%d-of-%d.json" : "logits.json", j.part, j.n_parts);
    RT_TRY(rt_path_join(j.plan_file, sizeof j.plan_file, j.v->out, name, err));
    RT_TRY(load_plan(&j, config, &resumed, err));
    RT_TRY(open_teacher(&j, j.v->common.dry_run, err));
    if (j.v->common.dry_run)
        goto out;
    j.so.stop = ctx->stop;
    j.so.stop_self = ctx->stop_self;
    j.so.progress = on_layer;
    j.so.progress_self = &j;
    RT_TRY(open_out(&j, config, resumed, err));
    if (j.resume.finished) {
        rt_info(ctx->log, "%s is complete already", j.v->out);
    } else {
        RT_TRY(score_all(&j, err));
    }
    RT_TRY(report(&j, err));
out:
    rt_json_free(config);
    close_job(&j);
    return st;
}

const struct rt_command rt_cmd_logits = {
    .name = "logits",
    .synopsis = "--teacher DIR --data FILE|DIR --out DIR [OPTIONS]",
    .summary = "score text with the teacher: top-k logits, log-sum-exps and hidden states into shards",
    .help = "Scoring is layer-major: a window of many sequences goes through a layer before the next layer's weights are read, so memory is\n"
            "bounded by --memory and the window, not by the checkpoint. Killed or interrupted, the same command goes on and yields the same bytes.\n\n"
            "    retort logits --teacher DeepSeek-R1 --data traces/ --out shards/ --cache topk=64 --lse 0.6,1,2 --features 20,40:512",
    .options = options,
    .values_size = sizeof(struct values),
    .run = run,
};
