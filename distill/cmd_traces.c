/* retort traces: the teacher answers prompts; OUT/traces.jsonl holds what it said. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/sha256.h"
#include "distill/command.h"
#include "distill/filter.h"
#include "distill/generate.h"
#include "distill/trace_file.h"
#include "distill/trace_line.h"
#include "formats/dataset.h"
#include "formats/rundir.h"

struct values {
    struct rt_common common;
    const char *teacher, *prompts, *out, *verify, *drop, *template_name, *thinking, *numerics;
    double temperature, top_p;
    int64_t top_k, samples, max_tokens, slots;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"teacher", RT_OPT_STRING, V(teacher), NULL, 0, 0, NULL, "DIR", "checkpoint directory of the teacher", true, false},
    {"prompts", RT_OPT_STRING, V(prompts), NULL, 0, 0, NULL, "FILE|DIR", "JSON lines with \"prompt\", \"messages\", \"text\" or \"input_ids\"; other members are passed through", true, false},
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "DIR", "where traces.jsonl goes; the same command resumes", true, true},
    {"temperature", RT_OPT_FLOAT, V(temperature), "0.6", 0, 100, NULL, "T", "sampling temperature; 0 is greedy", false, false},
    {"top-p", RT_OPT_FLOAT, V(top_p), "0.95", 1e-6, 1, NULL, "P", "sample from the fewest ids whose share reaches P; 1: from all", false, false},
    {"top-k", RT_OPT_INT, V(top_k), "0", 0, 1e9, NULL, "K", "sample from the K most probable ids; 0: from all", false, false},
    {"samples", RT_OPT_INT, V(samples), "1", 1, 65536, NULL, "N", "traces of each prompt", false, false},
    {"max-tokens", RT_OPT_INT, V(max_tokens), "32768", 1, 1e9, NULL, "N", "longest completion in tokens", false, false},
    {"verify", RT_OPT_CHOICE, V(verify), "none", 0, 0, RT_VERIFY_CHOICES, NULL, "compare each conclusion with \"answer\": its last \\boxed{}, or all of it", false, false},
    {"drop", RT_OPT_STRING, V(drop), NULL, 0, 0, NULL, "REASON,...", "filter at the end into accepted.jsonl and rejected.jsonl, for these reasons (all, or as in retort filter --help)", false, false},
    {"template", RT_OPT_STRING, V(template_name), NULL, 0, 0, NULL, "NAME", "chat template to use instead of the teacher's own", false, false},
    {"thinking", RT_OPT_CHOICE, V(thinking), "auto", 0, 0, "auto|on|off", NULL, "whether prompts open a thought; on and off where the template can do that", false, false},
    {"numerics", RT_OPT_CHOICE, V(numerics), "w8a16", 0, 0, "w8a16|w8a8", NULL, "w8a8 quantises activations to FP8 as the published FP8 model runs", false, false},
    {"slots", RT_OPT_INT, V(slots), "0", 0, 65536, NULL, "N", "sequences at a time; 0 plans it from memory", false, true},
    {0},
};

enum { OPEN_PROMPTS = 64, SYNC_SECONDS = 10, POOL_IDS = 8192 };

/* A prompt that was started: what its lines are made of. */
struct open_prompt {
    struct rt_json *json; /* NULL: free */
    int64_t index, line;
    int left;             /* samples still to come */
};

struct job {
    struct rt_context *ctx;
    const struct values *v;
    struct rt_device device;
    struct rt_model_dir model;
    struct rt_teacher_config config;
    struct rt_generator gen;
    struct rt_dataset *data;
    struct rt_pool *pool;
    struct rt_rundir dir;
    struct rt_trace_file *file;
    struct rt_trace_format format;
    int64_t n_ids, n_prompts, longest, prompt_tokens, dropped;
    char sha256[65];
    enum rt_thinking thinking;
    struct open_prompt *open; /* [n_open] by index modulo n_open */
    int64_t n_open;
    int64_t next_index;       /* of the prompt that the dataset hands out next */
    struct rt_prompt at;      /* prompt next_index - 1, while samples of it are asked for */
    int at_sample;            /* -1: none */
    struct rt_progress progress;
    double t_start, t_sync;
    struct rt_buf line;
    int64_t tokens, finished, verdict[3]; /* of this run */
};

static enum rt_status open_data(struct job *j, struct rt_dataset **out, struct rt_err *err)
{
    const struct rt_dataset_options o = {.tok = j->model.tok, .tmpl = j->model.tmpl, .n_ids = j->n_ids, .max_length = j->config.max_position,
                                         .thinking = j->thinking};
    return rt_dataset_open(j->v->prompts, &o, out, err);
}

/* One reading: how many prompts, how long, and a hash over their ids and lines: all of a line comes out again. */
static enum rt_status survey(struct job *j, struct rt_err *err)
{
    struct rt_sha256 sha;
    struct rt_prompt p;
    struct rt_buf text = {0};
    bool end = false;
    enum rt_status st;
    rt_sha256_init(&sha);
    RT_TRY(open_data(j, &j->data, err));
    for (;;) {
        RT_TRY(rt_dataset_next_prompt(j->data, &p, &end, err));
        if (end)
            break;
        text.len = 0;
        RT_TRY(rt_json_dump(p.json, 0, &text, err));
        const uint64_t head[3] = {(uint64_t)p.line, (uint64_t)p.n, text.len};
        rt_sha256_update(&sha, head, sizeof head);
        rt_sha256_update(&sha, p.ids, (size_t)p.n * sizeof *p.ids);
        rt_sha256_update(&sha, text.data, text.len);
        j->n_prompts++;
        j->prompt_tokens += p.n;
        j->longest = p.n > j->longest ? p.n : j->longest;
    }
    rt_sha256_final_hex(&sha, j->sha256);
    j->dropped = rt_dataset_counts(j->data).dropped;
    if (j->dropped > 0)
        rt_warn(j->ctx->log, "%ld prompts of more than %ld tokens are left out", (long)j->dropped, (long)j->config.max_position);
    if (j->n_prompts == 0)
        RT_FAIL(err, FORMAT, "%s: no prompt that the teacher could hold (%ld tokens)", j->v->prompts, (long)j->config.max_position);
    RT_TRY(rt_dataset_rewind(j->data, err));
out:
    rt_buf_free(&text);
    return st;
}

static enum rt_status print_plan(struct job *j, struct rt_err *err)
{
    char a[32], b[32], c[32], d[32];
    uint64_t disk;
    enum rt_status st;
    const struct values *v = j->v;
    const int64_t traces = j->n_prompts * v->samples;
    const double most = (double)traces * (double)(j->gen.max_len - j->prompt_tokens / j->n_prompts);
    const double flops = most * rt_teacher_flops(&j->config, (double)j->gen.max_len / 2);
    const struct rt_teacher_plan *p = &j->gen.plan;
    rt_info(j->ctx->log, "plan: %ld prompts, %ld traces, %d at a time, %s of caches and states, %s of weights (%s)", (long)j->n_prompts, (long)traces, j->gen.slots,
            rt_human_bytes(a, p->window_bytes), rt_human_bytes(b, p->model_bytes), p->resident ? "kept in memory" : "read at every step");
    RT_TRY(rt_disk_free(v->out, &disk, err));
    if ((double)disk < 5 * most) /* some 5 bytes of text a token */
        rt_warn(j->ctx->log, "%s: %s are free; traces of full length would take %s", v->out, rt_human_bytes(c, disk), rt_human_bytes(d, (uint64_t)(5 * most)));
    if (!v->common.dry_run)
        return RT_OK;
    if (v->common.json)
        printf("{\"prompts\":%ld,\"traces\":%ld,\"prompt_tokens\":%ld,\"most_tokens\":%.0f,\"slots\":%d,\"max_length\":%ld,\"state_bytes\":%lu,\"weight_bytes\":%lu,"
               "\"resident\":%s,\"most_flops\":%.6g}\n", (long)j->n_prompts, (long)traces, (long)j->prompt_tokens, most, j->gen.slots, (long)j->gen.max_len,
               (unsigned long)p->window_bytes, (unsigned long)p->model_bytes, p->resident ? "true" : "false", flops);
    else
        printf("prompts       %ld, %ld tokens, the longest %ld\ntraces        %ld, at most %.4g new tokens\nat a time     %d sequences of up to %ld tokens\n"
               "memory        %s of caches and states\nweights       %s, %s\noperations    at most %.3g; %.1f hours at 100 GFLOP/s, %.3f at 500 TFLOP/s\n",
               (long)j->n_prompts, (long)j->prompt_tokens, (long)j->longest, (long)traces, most, j->gen.slots, (long)j->gen.max_len, a, b,
               p->resident ? "read once" : "read at every step", flops, flops / 1e11 / 3600, flops / 5e14 / 3600);
out:
    return st;
}

/* ---- prompts out, traces in ---- */

static void close_prompt(struct open_prompt *o)
{
    rt_json_free(o->json);
    *o = (struct open_prompt){0};
}

/* The next samples of `at` that are not on the disk: a run of them. */
static bool next_samples(struct job *j, struct rt_generate_prompt *out)
{
    const int n = (int)j->v->samples;
    const int64_t index = j->next_index - 1;
    while (j->at_sample < n && rt_trace_file_has(j->file, index, j->at_sample))
        j->at_sample++;
    const int first = j->at_sample;
    while (j->at_sample < n && !rt_trace_file_has(j->file, index, j->at_sample))
        j->at_sample++;
    struct open_prompt *o = &j->open[index % j->n_open];
    if (first == j->at_sample) {
        j->at_sample = -1;
        if (o->left == 0)
            close_prompt(o);
        return false;
    }
    o->left += j->at_sample - first;
    *out = (struct rt_generate_prompt){.ids = j->at.ids, .n = j->at.n, .line = j->at.line, .first_sample = first, .n_samples = j->at_sample - first, .user = o};
    return true;
}

static enum rt_status next(void *self, struct rt_generate_prompt *out, bool *end, bool *wait, struct rt_err *err)
{
    struct job *j = self;
    enum rt_status st = RT_OK;
    for (;;) {
        if (j->at_sample >= 0 && next_samples(j, out))
            return RT_OK;
        *wait = !rt_trace_file_room(j->file, j->next_index);
        if (*wait)
            return RT_OK;
        RT_TRY(rt_dataset_next_prompt(j->data, &j->at, end, err));
        if (*end)
            return RT_OK;
        bool here = true;
        for (int s = 0; s < j->v->samples; s++)
            here = here && rt_trace_file_has(j->file, j->next_index, s);
        const int64_t index = j->next_index++;
        if (here)
            continue;
        struct open_prompt *o = &j->open[index % j->n_open];
        RT_ASSERT(o->json == NULL);
        *o = (struct open_prompt){.index = index, .line = j->at.line};
        RT_TRY(rt_json_new_object(&o->json, err));
        RT_TRY(rt_json_set_copy(o->json, "line", j->at.json, err));
        j->at_sample = 0;
    }
out:
    return st;
}

static enum rt_status done(void *self, const struct rt_generated *g, struct rt_err *err)
{
    struct job *j = self;
    struct open_prompt *o = g->user;
    enum rt_verdict verdict;
    bool verified;
    enum rt_status st;
    j->line.len = 0;
    RT_TRY(rt_trace_line(&j->format, rt_json_get(o->json, "line"), o->index, g, &j->line, &verdict, &verified, err));
    RT_TRY(rt_trace_file_put(j->file, o->index, g->sample, j->line.data, j->line.len, err));
    j->tokens += g->n;
    j->finished += g->finish == RT_FINISH_STOP;
    if (verified)
        j->verdict[verdict]++;
    /* samples of a prompt may be asked for in several runs; all have been asked for once the dataset is past it */
    if (--o->left == 0 && (o->index < j->next_index - 1 || j->at_sample < 0))
        close_prompt(o);
    if (rt_now() - j->t_sync > SYNC_SECONDS) {
        RT_TRY(rt_trace_file_sync(j->file, false, err));
        j->t_sync = rt_now();
    }
out:
    return st;
}

static void progress(void *self, const struct rt_batch_stats *stats)
{
    struct job *j = self;
    char note[96], rate[32];
    const double seconds = rt_now() - j->t_start;
    snprintf(note, sizeof note, "%s tokens/s, %ld running", rt_human_count(rate, seconds > 0 ? (double)stats->new_tokens / seconds : 0), (long)stats->running);
    rt_progress_update(&j->progress, rt_trace_file_kept(j->file), note);
}

/* ---- the run ---- */

static enum rt_status open_out(struct job *j, struct rt_err *err)
{
    struct rt_json *config = NULL;
    enum rt_status st;
    RT_TRY(rt_command_config(j->ctx->command, j->v, &config, err));
    RT_TRY(rt_json_set_string(config, "teacher_sha256", rt_teacher_sha256(j->gen.teacher), err));
    RT_TRY(rt_json_set_string(config, "tokenizer_sha256", j->model.tok != NULL ? rt_tokenizer_sha256(j->model.tok) : "", err));
    RT_TRY(rt_json_set_string(config, "template_sha256", j->model.tmpl != NULL ? rt_template_sha256(j->model.tmpl) : "", err));
    RT_TRY(rt_json_set_string(config, "prompts_sha256", j->sha256, err));
    RT_TRY(rt_json_set_string(config, "backend", j->device.be->name, err));
    RT_TRY(rt_rundir_open(j->v->out, config, &j->dir, err));
    j->ctx->log->copy = j->dir.log_file;
    j->n_open = OPEN_PROMPTS + 16 * (int64_t)j->gen.slots;
    RT_TRY(rt_alloc((size_t)j->n_open, sizeof *j->open, "prompts in work", &j->open, err));
    RT_TRY(rt_trace_file_open(j->v->out, (int)j->v->samples, j->n_open, &j->file, err));
    if (rt_trace_file_kept(j->file) > 0)
        rt_info(j->ctx->log, "going on with %ld traces that are there", (long)rt_trace_file_kept(j->file));
out:
    rt_json_free(config);
    return st;
}

static enum rt_status generate(struct job *j, struct rt_err *err)
{
    int32_t eos = (int32_t)j->config.eos, stops[RT_GENERATE_MAX_STOP];
    struct rt_generate_options o = {
        .seed = (uint64_t)j->v->common.seed,
        .sample = {.temperature = j->v->temperature, .top_k = j->v->top_k, .top_p = j->v->top_p},
        .max_new = j->v->max_tokens,
        .n_ids = j->n_ids,
        .stop_ids = stops,
        .n_stop = rt_generate_stop_ids(&j->model, &eos, 1, stops),
        .pool = j->pool,
        .next = next,
        .done = done,
        .progress = progress,
        .self = j,
        .stop = j->ctx->stop,
        .stop_self = j->ctx->stop_self,
    };
    enum rt_status st;
    j->at_sample = -1;
    j->t_start = j->t_sync = rt_now();
    rt_progress_begin(&j->progress, j->ctx->log, "sampling", "traces", j->n_prompts * j->v->samples);
    j->progress.first = rt_trace_file_kept(j->file);
    struct rt_err e = {0};
    st = rt_generate(&j->gen, &o, NULL, &e);
    rt_progress_update(&j->progress, rt_trace_file_kept(j->file), NULL);
    rt_progress_end(&j->progress);
    const enum rt_status saved = rt_trace_file_sync(j->file, st == RT_OK, &e);
    if (st == RT_INTERRUPTED)
        rt_fail(err, st, "interrupted: %ld of %ld traces are kept in %s; the same command goes on", (long)rt_trace_file_kept(j->file),
                (long)(j->n_prompts * j->v->samples), j->v->out);
    else if (st != RT_OK || saved != RT_OK)
        rt_fail(err, e.status, "%s", e.msg);
    return st != RT_OK ? st : saved;
}

static enum rt_status report(struct job *j, int64_t before, struct rt_err *err)
{
    const double seconds = rt_now() - j->t_start;
    const int64_t n = rt_trace_file_kept(j->file) - before;
    struct rt_json *m = NULL;
    enum rt_status st = RT_OK;
    if (n == 0 && !j->v->common.json)
        return RT_OK;
    if (n > 0)
        rt_info(j->ctx->log, "%s/traces.jsonl: %ld traces, %.1f tokens each, %.1f%% ended by themselves, %.0f tokens/s", j->v->out, (long)n, (double)j->tokens / (double)n,
                100.0 * (double)j->finished / (double)n, seconds > 0 ? (double)j->tokens / seconds : 0);
    const int64_t judged = j->verdict[0] + j->verdict[1] + j->verdict[2];
    if (judged > 0)
        rt_info(j->ctx->log, "answers: %.1f%% correct, %.1f%% wrong, %.1f%% unparsed", 100.0 * (double)j->verdict[RT_VERDICT_CORRECT] / (double)judged,
                100.0 * (double)j->verdict[RT_VERDICT_WRONG] / (double)judged, 100.0 * (double)j->verdict[RT_VERDICT_UNPARSED] / (double)judged);
    RT_TRY(rt_json_new_object(&m, err));
    RT_TRY(rt_json_set_int(m, "step", rt_trace_file_kept(j->file), err));
    RT_TRY(rt_json_set_int(m, "traces", n, err));
    RT_TRY(rt_json_set_int(m, "tokens", j->tokens, err));
    RT_TRY(rt_json_set_int(m, "stopped", j->finished, err));
    for (int i = 0; i < 3; i++)
        RT_TRY(rt_json_set_int(m, rt_verdict_name((enum rt_verdict)i), j->verdict[i], err));
    RT_TRY(rt_json_set_double(m, "seconds", seconds, err));
    RT_TRY(rt_json_set_double(m, "tokens_per_second", seconds > 0 ? (double)j->tokens / seconds : 0, err));
    if (n > 0)
        RT_TRY(rt_rundir_metric(&j->dir, m, err));
    if (j->v->common.json)
        RT_TRY(rt_command_print_json(m, err));
out:
    rt_json_free(m);
    return st;
}

static enum rt_status filter(struct job *j, unsigned drop, struct rt_err *err)
{
    char path[4096];
    struct rt_filter_counts counts;
    enum rt_status st;
    RT_TRY(rt_path_join(path, sizeof path, j->v->out, "traces.jsonl", err));
    const struct rt_filter_options o = {.data = path, .out = j->v->out, .drop = drop, .verify = rt_verify_mode_of(j->v->verify), .log = j->ctx->log,
                                        .stop = j->ctx->stop, .stop_self = j->ctx->stop_self};
    RT_TRY(rt_filter_run(&o, &counts, err));
    rt_filter_report(&counts, &o);
out:
    return st;
}

static void close_job(struct job *j)
{
    j->ctx->log->copy = NULL;
    for (int64_t i = 0; j->open != NULL && i < j->n_open; i++)
        rt_json_free(j->open[i].json);
    rt_free(j->open);
    rt_buf_free(&j->line);
    rt_trace_format_free(&j->format);
    rt_trace_file_close(j->file);
    rt_rundir_close(&j->dir);
    rt_pool_free(j->pool);
    rt_dataset_close(j->data);
    rt_generator_close(&j->gen);
    rt_model_dir_close(&j->model);
    rt_device_close(&j->device);
}

static enum rt_status open_engine(struct job *j, struct rt_err *err)
{
    const struct values *v = j->v;
    struct rt_generator_options go = {.memory = rt_command_memory(&v->common), .gpu_memory = v->common.gpu_memory, .slots = (int)v->slots, .w8a8 = strcmp(v->numerics, "w8a8") == 0};
    enum rt_status st;
    go.max_len = j->longest + v->max_tokens;
    go.sequences = j->n_prompts * v->samples;
    RT_TRY(rt_generator_teacher(v->teacher, &j->device, &go, v->common.dry_run, &j->gen, err));
    RT_TRY(print_plan(j, err));
    if (!v->common.dry_run && j->n_ids > POOL_IDS)
        RT_TRY(rt_pool_create((int)v->common.threads, &j->pool, err));
out:
    return st;
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    struct job j = {.ctx = ctx, .v = values, .dir = {.lock = -1, .metrics = -1}};
    const struct values *v = values;
    unsigned drop;
    enum rt_status st;
    int n_ops;
    (void)pos;
    RT_TRY(rt_filter_parse_drop(v->drop, &drop, err));
    if (v->drop != NULL)
        RT_TRY(rt_filter_check(&(struct rt_filter_options){.drop = drop, .verify = rt_verify_mode_of(v->verify)}, v->drop, err));
    RT_TRY(rt_teacher_config_load(v->teacher, &j.config, err));
    j.thinking = strcmp(v->thinking, "on") == 0 ? RT_THINKING_ON : strcmp(v->thinking, "off") == 0 ? RT_THINKING_OFF : RT_THINKING_AUTO;
    const enum rt_op *ops = rt_teacher_decode_ops(&n_ops);
    RT_TRY(rt_command_device(ctx, &v->common, ops, n_ops, &j.device, err));
    RT_TRY(rt_model_dir_open(v->teacher, v->template_name, ctx->log, &j.model, err));
    if (j.thinking != RT_THINKING_AUTO && (j.model.tmpl == NULL || !rt_template_can(j.model.tmpl, j.thinking)))
        RT_FAIL(err, USAGE, "--thinking %s: %s%s cannot be asked for that; leave it at auto", v->thinking, j.model.tmpl != NULL ? "the template " : "no template",
                j.model.tmpl != NULL ? rt_template_name(j.model.tmpl) : "");
    RT_TRY(rt_model_dir_n_ids(&j.model, j.config.vocab_size, &j.n_ids, err));
    RT_TRY(survey(&j, err));
    RT_TRY(open_engine(&j, err));
    if (v->common.dry_run)
        goto out;
    j.format = (struct rt_trace_format){.tok = j.model.tok, .tmpl = j.model.tmpl, .thinking = j.thinking, .verify = rt_verify_mode_of(v->verify),
                                        .temperature = v->temperature, .top_p = v->top_p, .top_k = v->top_k, .seed = v->common.seed, .max_tokens = v->max_tokens};
    RT_TRY(open_out(&j, err));
    const int64_t before = rt_trace_file_kept(j.file);
    if (rt_trace_file_done(j.file) == j.n_prompts)
        rt_info(ctx->log, "%s is complete already", v->out);
    else
        RT_TRY(generate(&j, err));
    RT_TRY(rt_trace_file_sync(j.file, true, err));
    RT_TRY(report(&j, before, err));
    if (v->drop != NULL)
        RT_TRY(filter(&j, drop, err));
out:
    close_job(&j);
    return st;
}

const struct rt_command rt_cmd_traces = {
    .name = "traces",
    .synopsis = "--teacher DIR --prompts FILE --out DIR [OPTIONS]",
    .summary = "let the teacher answer prompts: reasoning traces as JSON lines",
    .help = "OUT/traces.jsonl has a line for each sample, in the order of the prompts: id, the prompt's form and the completion (whole, with the thought\n"
            "that the template opens), answer, finish_reason, sample, line, tokens, mean logprob, sampling, and the prompt's other members. A \"messages\"\n"
            "line gets the completion as its last message, \"text\" is continued, \"input_ids\" get a loss_mask. tokens.exact says whether reading the\n"
            "line gives the ids that were sampled.\n\n"
            "What a sample says depends on the seed, its line and its number alone (on cpu and ref). Killed or interrupted, the same command goes on\n"
            "and ends with the same bytes; only sequences that were running are sampled again.\n\n"
            "    retort traces --teacher DeepSeek-R1 --prompts problems.jsonl --out traces/ --samples 4 --max-tokens 16384 --verify boxed --drop all",
    .options = options,
    .takes = RT_TAKES_ROOM | RT_TAKES_SEED | RT_TAKES_JSON | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct values),
    .run = run,
};
