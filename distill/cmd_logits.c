/* retort logits: teacher-forced scoring of a corpus into row shards. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "distill/logits.h"
#include "distill/spans.h"
#include "formats/row_identity.h"
#include "formats/rundir.h"

#define V(field) offsetof(struct rt_logits_values, field)
static const struct rt_opt options[] = {
    {"teacher", RT_OPT_STRING, V(teacher), NULL, 0, 0, NULL, "DIR", "checkpoint directory of the teacher", true, false},
    {"data", RT_OPT_STRING, V(data), NULL, 0, 0, NULL, "FILE|DIR", "JSON lines, or a directory of traces (accepted.jsonl is preferred to traces.jsonl)", true, false},
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "DIR", "where the shards go; the same command resumes", true, true},
    {"cache", RT_OPT_STRING, V(cache), "topk=64", 0, 0, NULL, "topk=K", "ids and logits kept a row (up to 8192 on the CPU, 2048 on a GPU); topk=0 keeps none, sums and realised tokens alone (with features or boundaries)", false, false},
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
    {"readers", RT_OPT_INT, V(readers), "0", 0, RT_WEIGHTS_MAX_THREADS, NULL, "N", "threads that read the checkpoint; 0 takes as many as its files were read fastest by in a second before the run where a GPU waits for them, else 1", false, true},
    {"save-state", RT_OPT_STRING, V(save_state), "auto", 0, 0, NULL, "WHEN", "when the window under way is saved, to go on within it after a crash: auto once a minute of work is at stake and saving takes under 2% of the time, layer after every layer, stop on an interrupt alone, never, or every so many minutes; costs one state of the window on disk each time", false, true},
    {"rows-per-shard", RT_OPT_INT, V(rows_per_shard), "0", 0, 1e9, NULL, "N", "cut shards after so many rows; 0 takes 65536", false, false},
    {0},
};

static enum rt_status read_data(struct rt_logits_job *j, struct rt_err *err)
{
    const struct rt_logits_values *v = j->v;
    enum rt_status st;
    const int64_t most = rt_length_limit(v->max_length, j->config.max_position);
    RT_TRY(rt_model_dir_open(v->teacher, v->template_name, j->ctx->log, &j->model, err));
    RT_TRY(rt_model_dir_n_ids(&j->model, j->config.vocab_size, &j->so.n_ids, err));
    if (j->so.top_k > j->so.n_ids)
        j->so.top_k = (int)j->so.n_ids;
    RT_TRY(rt_logits_check_head(j, err));
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
static void identify(struct rt_logits_job *j)
{
    struct rt_row_identity *id = &j->id;
    const char *base = strrchr(j->v->teacher, '/');
    *id = (struct rt_row_identity){.vocab_size = j->config.vocab_size, .teacher_layers = j->config.layers, .n_ids = j->so.n_ids, .top_k = j->so.top_k, .n_lse = j->so.n_lse,
                                   .completion_only = j->so.completion_only, .max_length = j->v->max_length,
                                   .projection_seed = j->so.projection_seed, .n_features = j->so.n_features, .boundary = j->so.boundary != NULL};
    snprintf(id->teacher_sha256, sizeof id->teacher_sha256, "%s", rt_teacher_sha256(j->lane[0].teacher));
    snprintf(id->teacher_name, sizeof id->teacher_name, "%s", base != NULL && base[1] != '\0' ? base + 1 : j->v->teacher);
    snprintf(id->mode, sizeof id->mode, "%s%s/%s/%s", j->v->numerics, j->to.w8a8 && j->config.ue8m0 ? "-ue8m0" : "", j->lane[0].device.be->act == RT_F32 ? "f32" : "bf16", j->lane[0].device.be->name);
    if (j->model.tok != NULL)
        snprintf(id->tokenizer_sha256, sizeof id->tokenizer_sha256, "%s", rt_tokenizer_sha256(j->model.tok));
    if (j->model.tmpl != NULL)
        snprintf(id->template_sha256, sizeof id->template_sha256, "%s", rt_template_sha256(j->model.tmpl));
    memcpy(id->lse_temperature, j->so.lse_temperature, sizeof id->lse_temperature);
    memcpy(id->feature, j->so.feature, sizeof id->feature);
}

/* Reads the window plan of an earlier run into the options, after comparing the arguments; *found says whether there was one. */
static enum rt_status load_plan(struct rt_logits_job *j, const struct rt_json *config, bool *found, struct rt_err *err)
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

static enum rt_status save_plan(struct rt_logits_job *j, const struct rt_json *config, struct rt_err *err)
{
    struct rt_json *root = NULL, *plan;
    struct rt_buf text = {0};
    enum rt_status st;
    RT_TRY(rt_json_new_object(&root, err));
    RT_TRY(rt_json_set_copy(root, "config", config, err));
    RT_TRY(rt_json_set_object(root, "plan", &plan, err));
    RT_TRY(rt_json_set_int(plan, "window", j->plan.teacher.window, err));
    RT_TRY(rt_json_set_int(plan, "chunk", j->plan.teacher.chunk, err));
    RT_TRY(rt_json_dump(root, 2, &text, err));
    RT_TRY(rt_publish_bytes(j->plan_file, text.data, text.len, err));
out:
    rt_buf_free(&text);
    rt_json_free(root);
    return st;
}

static enum rt_status report(struct rt_logits_job *j, struct rt_err *err)
{
    struct rt_shard_set *set = NULL;
    char bytes[32];
    enum rt_status st;
    RT_TRY(rt_shard_set_open(j->v->out, &set, err));
    const struct rt_shard_info *info = rt_shard_set_info(set);
    rt_info(j->ctx->log, "%s: %ld sequences, %ld rows in %ld shards, %s, %.1f bytes a row%s%s", j->v->out, (long)info->sequences, (long)info->rows,
            (long)info->shards, rt_human_bytes(bytes, info->bytes), info->rows > 0 ? (double)info->bytes / (double)info->rows : 0.0,
            info->missing[0] != '\0' ? "; " : "", info->missing);
    for (int i = 0; i < j->so.n_lse && j->so.top_k > 0; i++)
        rt_info(j->ctx->log, "top-%d mass at T=%g: mean %.4f, least sequence %.4f", j->so.top_k, j->so.lse_temperature[i], info->mass[i], info->mass_min[i]);
    if (j->v->common.json)
        printf("{\"sequences\":%ld,\"rows\":%ld,\"tokens\":%ld,\"shards\":%ld,\"bytes\":%lu,\"nll\":%.6f}\n", (long)info->sequences, (long)info->rows,
               (long)info->tokens, (long)info->shards, (unsigned long)info->bytes, info->nll);
out:
    rt_shard_set_free(set);
    return st;
}

/* Whole final states are logits with the head beside them alone. */
static enum rt_status keep_head(const struct rt_logits_job *j, struct rt_err *err)
{
    struct rt_tensors *model = NULL;
    struct rt_err why = {0};
    enum rt_status st;
    RT_TRY(rt_tensors_open(j->v->teacher, &model, err));
    st = rt_shard_keep_head(j->v->out, model, &why);
    if (st == RT_SHAPE) { /* scales of its own, say: the states are worth having without */
        rt_warn(j->ctx->log, "%s/head.safetensors is not written: %s", j->v->out, why.msg);
        st = RT_OK;
    }
    if (st != RT_OK)
        RT_TRY(rt_fail(err, st, "%s", why.msg));
out:
    rt_tensors_free(model);
    return st;
}

static enum rt_status open_out(struct rt_logits_job *j, const struct rt_json *config, bool resumed, struct rt_err *err)
{
    const struct rt_shard_options so = {.rows_per_shard = j->v->rows_per_shard, .part = j->part, .n_parts = j->n_parts};
    enum rt_status st;
    identify(j);
    RT_TRY(rt_shard_sink_open(j->v->out, &j->id, &so, &j->shards, &j->sink, &j->resume, err));
    if (!resumed && (j->resume.sequences > 0 || j->resume.finished))
        RT_FAIL(err, REFUSED, "%s holds rows, but %s, which says of which data and options, was not there when this command began: "
                "restore it, or use another --out", j->v->out, j->plan_file);
    char kept[4096];
    RT_TRY(rt_path_join(kept, sizeof kept, j->v->out, "teacher", err));
    if (j->part == 0)
        RT_TRY(rt_model_dir_keep(&j->model, kept, err)); /* `retarget` needs the bytes of the ids */
    if (j->part == 0 && rt_row_identity_dense(&j->id))
        RT_TRY(keep_head(j, err));
    if (!resumed)
        RT_TRY(save_plan(j, config, err));
    RT_TRY(rt_expert_load_open(&j->load, j->v->out, j->part, j->n_parts, j->config.layers, j->config.experts, err));
    if (j->resume.sequences > 0)
        rt_info(j->ctx->log, "going on after %ld sequences", (long)j->resume.sequences);
out:
    return st;
}

static void close_job(struct rt_logits_job *j)
{
    rt_shard_sink_free(j->shards);
    rt_logits_close(j);
    rt_corpus_close(j->corpus);
    rt_model_dir_close(&j->model);
    rt_expert_load_close(&j->load);
    rt_free(j->boundary);
    pthread_mutex_destroy(&j->lock);
    pthread_cond_destroy(&j->changed);
}

/* Everything up to the plan; nothing is written. */
static enum rt_status prepare(struct rt_logits_job *j, struct rt_json **config, bool *resumed, struct rt_err *err)
{
    char name[64];
    enum rt_status st;
    RT_TRY(rt_teacher_config_load(j->v->teacher, &j->config, err));
    RT_TRY(rt_logits_options(j, err));
    RT_TRY(rt_logits_open_devices(j, err));
    RT_TRY(read_data(j, err));
    RT_TRY(rt_command_config(j->ctx->command, j->v, config, err));
    RT_TRY(rt_json_set_string(*config, "input_sha256", j->survey.sha256, err));
    rt_logits_plan_name(j->part, j->n_parts, name);
    RT_TRY(rt_path_join(j->plan_file, sizeof j->plan_file, j->v->out, name, err));
    RT_TRY(load_plan(j, *config, resumed, err));
    RT_TRY(rt_logits_parts_agree(j->v->out, j->n_parts, j->survey.sha256, err));
    RT_TRY(rt_logits_make_plan(j, err));
out:
    return st;
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    struct rt_logits_job j = {.ctx = ctx, .v = values};
    struct rt_json *config = NULL;
    enum rt_status st;
    bool resumed = false;
    (void)pos;
    pthread_mutex_init(&j.lock, NULL);
    pthread_cond_init(&j.changed, NULL);
    RT_TRY(prepare(&j, &config, &resumed, err));
    if (j.v->common.dry_run) {
        rt_logits_print_plan(&j);
        goto out;
    }
    rt_logits_log_plan(&j);
    RT_TRY(rt_logits_open_teachers(&j, err));
    RT_TRY(open_out(&j, config, resumed, err));
    if (j.resume.finished)
        rt_info(ctx->log, "%s is complete already", j.v->out);
    else
        RT_TRY(rt_logits_score(&j, err));
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
            "bounded by --memory and the window, not by the checkpoint. Killed or interrupted, the same command goes on and yields the same bytes:\n"
            "behind the last window, and within a window behind the last layer that was saved (--save-state). --dry-run prints the plan: windows,\n"
            "passes over the weights, bytes read, disk, memory, and the least time that this machine's measured rates allow.\n\n"
            "    retort logits --teacher DeepSeek-R1 --data traces/ --out shards/ --cache topk=64 --lse 0.6,1,2 --features 20,40:512",
    .options = options,
    .takes = RT_TAKES_ROOM | RT_TAKES_SEED | RT_TAKES_GPUS | RT_TAKES_JSON | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct rt_logits_values),
    .run = run,
};
