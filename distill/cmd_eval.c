/* retort eval: loss, KL to the teacher, agreement, and answers that can be checked. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "distill/command.h"
#include "distill/eval_plan.h"
#include "distill/run_record.h"

struct values {
    struct rt_common common;
    const char *student, *tokenizer, *template_name, *verify, *pass_k;
    struct rt_str_list data;
    int64_t samples, max_tokens, max_length, micro_tokens;
    double temperature, top_p, kd_temperature;
    bool record;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"student", RT_OPT_STRING, V(student), NULL, 0, 0, NULL, "DIR|RUN", "model directory, or a finished run", true, false},
    {"data", RT_OPT_LIST, V(data), NULL, 0, 0, NULL, "FILE|DIR", "shards, JSON lines with completions, or prompts with an \"answer\"; may be repeated", true, false},
    {"tokenizer", RT_OPT_STRING, V(tokenizer), NULL, 0, 0, NULL, "DIR", "directory with tokenizer and template; default: the student's", false, false},
    {"template", RT_OPT_STRING, V(template_name), NULL, 0, 0, NULL, "NAME", "chat template to use instead of the directory's own", false, false},
    {"kd-temperature", RT_OPT_FLOAT, V(kd_temperature), "1", 0.01, 100, NULL, "T", "temperature of the KL (a stored one)", false, false},
    {"samples", RT_OPT_INT, V(samples), "1", 1, 65536, NULL, "N", "completions of each prompt", false, false},
    {"pass-k", RT_OPT_STRING, V(pass_k), NULL, 0, 0, NULL, "K,...", "unbiased pass@k of these; default: 1, 2, 4, .. up to --samples", false, false},
    {"temperature", RT_OPT_FLOAT, V(temperature), "0.6", 0, 100, NULL, "T", "of sampling; 0 takes the likeliest token", false, false},
    {"top-p", RT_OPT_FLOAT, V(top_p), "0.95", 0.0001, 1, NULL, "P", "nucleus of sampling", false, false},
    {"max-tokens", RT_OPT_INT, V(max_tokens), "32768", 1, 1e9, NULL, "N", "of a completion; the student's maximum limits too", false, false},
    {"verify", RT_OPT_CHOICE, V(verify), "boxed", 0, 0, "boxed|exact", NULL, "what is compared with the answer: the last \\boxed{}, or the text", false, false},
    {"max-length", RT_OPT_INT, V(max_length), "0", 0, 1e9, NULL, "N", "leave longer sequences out; 0: refuse those over the student's maximum", false, false},
    {"micro-tokens", RT_OPT_INT, V(micro_tokens), "0", 0, 1e9, NULL, "N", "tokens of a forward; 0: planned from memory", false, true},
    {"record", RT_OPT_FLAG, V(record), "true", 0, 0, NULL, NULL, "where --student is a run, add the result to its eval.jsonl; replaces the same measurement", false, true},
    {0},
};

/* False where nothing was measured (null in JSON). */
static bool get(const struct rt_json *line, const char *key, double *x)
{
    return rt_json_as_double(rt_json_get(line, key), x) && !isnan(*x);
}

static void print_interval(const struct rt_json *line, const char *label, const char *key, double scale, const char *unit)
{
    char ci[64];
    double x, lo, hi;
    snprintf(ci, sizeof ci, "%s_ci", key);
    if (!get(line, key, &x))
        return;
    const struct rt_json *list = rt_json_get(line, ci);
    if (rt_json_as_double(rt_json_at(list, 0), &lo) && rt_json_as_double(rt_json_at(list, 1), &hi))
        printf("  %-18s %9.4f   95 %% [%.4f, %.4f]%s\n", label, x * scale, lo * scale, hi * scale, unit);
    else
        printf("  %-18s %9.4f%s\n", label, x * scale, unit);
}

static void print_table(const struct rt_json *line)
{
    double x, y;
    const char *key;
    const struct rt_json *k;
    printf("%s\n", rt_json_as_string(rt_json_get(line, "data"), NULL));
    if (get(line, "n_tokens", &x) && get(line, "n_sequences", &y))
        printf("  %-18s %9.0f   in %.0f sequences\n", "targets", x, y);
    print_interval(line, "cross-entropy", "ce", 1, " nats a token");
    if (get(line, "perplexity", &x))
        printf("  %-18s %9.4g\n", "perplexity", x);
    print_interval(line, "accuracy", "accuracy", 100, " %");
    if (get(line, "kd_temperature", &x))
        printf("  %-18s %9g\n", "KL at T", x);
    print_interval(line, "KL (with T^2)", "kl", 1, " nats a row");
    print_interval(line, "agreement", "agreement", 100, " %");
    if (get(line, "n_problems", &x) && get(line, "samples", &y)) {
        printf("  %-18s %9.0f   %.0f samples each", "problems", x, y);
        if (get(line, "n_dropped", &x) && x > 0)
            printf("; %.0f more are left out: their prompts are too long", x);
        printf("\n");
    }
    print_interval(line, "pass@1", "pass1", 100, " %");
    for (size_t i = 0; rt_json_member(rt_json_get(line, "passk"), i, &key, &k); i++) {
        const struct rt_json *ci = rt_json_get(rt_json_get(line, "passk_ci"), key);
        double lo, hi;
        if (strcmp(key, "1") != 0 && rt_json_as_double(k, &x) && rt_json_as_double(rt_json_at(ci, 0), &lo) && rt_json_as_double(rt_json_at(ci, 1), &hi))
            printf("  pass@%-13s %9.4f   95 %% [%.4f, %.4f] %%\n", key, 100 * x, 100 * lo, 100 * hi);
    }
    if (get(line, "limit_share", &x) && get(line, "mean_tokens", &y))
        printf("  %-18s %9.4f %% of the samples; %.1f tokens a sample\n", "hit the limit", 100 * x, y);
}

static enum rt_status print_line(const struct rt_json *line, bool json, struct rt_err *err)
{
    if (json)
        return rt_command_print_json(line, err);
    print_table(line);
    fflush(stdout);
    return RT_OK;
}

static struct rt_eval_run_options run_options(const struct rt_context *ctx, const struct values *v, const char *data, int64_t memory)
{
    return (struct rt_eval_run_options){
        .data = data, .T = v->kd_temperature, .max_length = v->max_length, .micro_tokens = v->micro_tokens, .memory = memory, .log = ctx->log,
        .stop = ctx->stop, .stop_self = ctx->stop_self,
        .sampling = {.samples = v->samples, .max_tokens = v->max_tokens, .temperature = v->temperature, .top_p = v->top_p,
                     .seed = (uint64_t)v->common.seed, .memory = memory, .exact = strcmp(v->verify, "exact") == 0}};
}

static enum rt_status cannot_record(const char *run, const char *so_far, const struct rt_err *e, struct rt_err *err)
{
    return rt_fail(err, e->status, "%s%s; with --no-record nothing is added to %s", so_far, e->msg, run);
}

/* Before anything is computed: a line of eval.jsonl, and what lies beside it, can be written. */
static enum rt_status check_writable(const char *run, struct rt_err *err)
{
    enum rt_status st;
    char path[4096], probe[4096] = {0};
    struct rt_err e = {0};
    RT_TRY(rt_path_join(path, sizeof path, run, RT_EVAL_FILE ".probe", err));
    st = rt_publish_bytes(path, probe, sizeof probe, &e);
    if (st != RT_OK)
        return cannot_record(run, "the result could not be recorded: ", &e, err);
    (void)unlink(path);
out:
    return st;
}

static enum rt_status evaluate(struct rt_context *ctx, const struct values *v, struct rt_loaded_student *l, const struct rt_device *d,
                               const char *data, int64_t step, struct rt_err *err)
{
    enum rt_status st, recorded = RT_OK;
    struct rt_json *line = NULL;
    struct rt_buf rows = {0};
    struct rt_err e = {0};
    int64_t memory;
    RT_TRY(rt_command_room(&v->common, d, &memory, err));
    struct rt_eval_run_options o = run_options(ctx, v, data, memory);
    RT_TRY(rt_eval_parse_k(v->pass_k, &o.sampling, err));
    RT_TRY(rt_json_new_object(&line, err));
    RT_TRY(rt_eval_run(l, d, &o, line, &rows, err));
    if (v->record && step >= 0)
        recorded = rt_eval_record(v->student, step, line, &rows, &e);
    RT_TRY(print_line(line, v->common.json, err)); /* recorded or not: it was paid for */
    if (recorded != RT_OK)
        st = cannot_record(v->student, "printed, but not recorded: ", &e, err);
out:
    rt_buf_free(&rows);
    rt_json_free(line);
    return st;
}

static void print_plan(const struct values *v, const char *data, const struct rt_eval_plan *p)
{
    printf("%s\n", data);
    if (p->score)
        printf("  to score      %ld sequences, %ld tokens\n", (long)p->sequences, (long)p->tokens);
    if (p->left_out > 0)
        printf("  left out      %ld longer sequences\n", (long)p->left_out);
    if (p->answer)
        printf("  to answer     %ld prompts, %ld tokens\n  samples       %ld (%ld each), at most %ld new tokens\n", (long)p->prompts, (long)p->prompt_tokens,
               (long)p->samples, (long)v->samples, (long)p->new_tokens);
    if (p->dropped > 0)
        printf("  left out      %ld prompts that the student cannot hold\n", (long)p->dropped);
    printf("  operations    at most %.3g\n", p->flops);
}

static enum rt_status plan_json(const struct rt_eval_plan *p, const char *data, struct rt_json *list, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *o;
    RT_TRY(rt_json_set_object(list, NULL, &o, err));
    RT_TRY(rt_json_set_string(o, "data", data, err));
    RT_TRY(rt_json_set_int(o, "sequences", p->sequences, err));
    RT_TRY(rt_json_set_int(o, "tokens", p->tokens, err));
    RT_TRY(rt_json_set_int(o, "left_out", p->left_out, err));
    RT_TRY(rt_json_set_int(o, "prompts", p->prompts, err));
    RT_TRY(rt_json_set_int(o, "n_dropped", p->dropped, err));
    RT_TRY(rt_json_set_int(o, "prompt_tokens", p->prompt_tokens, err));
    RT_TRY(rt_json_set_int(o, "samples", p->samples, err));
    RT_TRY(rt_json_set_int(o, "most_new_tokens", p->new_tokens, err));
    RT_TRY(rt_json_set_double(o, "most_flops", p->flops, err));
out:
    return st;
}

/* --dry-run: what all of it would take; nothing is computed, nothing written. */
static enum rt_status plan(const struct rt_context *ctx, const struct values *v, const struct rt_loaded_student *l, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *root = NULL, *list;
    RT_TRY(rt_json_new_object(&root, err));
    RT_TRY(rt_json_set_string(root, "student", l->path, err));
    RT_TRY(rt_json_set_int(root, "parameters", l->p.count, err));
    RT_TRY(rt_json_set_array(root, "data", &list, err));
    if (!v->common.json)
        printf("student         %s, %ld parameters, context %ld\n", l->path, (long)l->p.count, (long)l->c.max_position);
    for (int i = 0; i < v->data.n; i++) {
        const struct rt_eval_run_options o = run_options(ctx, v, v->data.items[i], 0);
        struct rt_eval_plan p;
        RT_TRY(rt_eval_make_plan(l, &o, &p, err));
        if (v->common.json)
            RT_TRY(plan_json(&p, o.data, list, err));
        else
            print_plan(v, o.data, &p);
    }
    if (v->common.json)
        RT_TRY(rt_command_print_json(root, err));
out:
    rt_json_free(root);
    return st;
}

/* Every data argument is there and can be told what it is, before the first one is answered. */
static enum rt_status check_data(const struct values *v, const struct rt_loaded_student *l, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    bool score, answer;
    for (int i = 0; i < v->data.n; i++) {
        if (!rt_path_exists(v->data.items[i]))
            RT_FAIL(err, IO, "%s: no such file or directory", v->data.items[i]);
        RT_TRY(rt_eval_kind(v->data.items[i], &l->model, &score, &answer, err));
    }
out:
    return st;
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    enum rt_status st;
    const struct values *v = values;
    struct rt_loaded_student l = {0};
    struct rt_device d = {0};
    const struct rt_student_source source = {v->student, NULL, v->tokenizer, v->template_name};
    int n_train, n_decode;
    int64_t step;
    enum rt_op ops[RT_OP_COUNT * 2];
    (void)pos;
    const enum rt_op *train = rt_student_train_ops(&n_train), *decode = rt_student_decode_ops(&n_decode);
    memcpy(ops, train, (size_t)n_train * sizeof *ops);
    memcpy(ops + n_train, decode, (size_t)n_decode * sizeof *ops);
    RT_TRY(rt_eval_parse_k(v->pass_k, &(struct rt_eval_sampling){.samples = v->samples}, err)); /* before anything is read */
    RT_TRY(rt_loaded_student_open(&l, &source, ctx->log, err));
    RT_TRY(check_data(v, &l, err));
    if (v->common.dry_run) {
        st = plan(ctx, v, &l, err);
        goto out;
    }
    RT_TRY(rt_eval_run_step(v->student, &step, err));
    if (v->record && step >= 0)
        RT_TRY(check_writable(v->student, err));
    RT_TRY(rt_command_device(ctx, &v->common, ops, n_train + n_decode, &d, err));
    for (int i = 0; i < v->data.n; i++)
        RT_TRY(evaluate(ctx, v, &l, &d, v->data.items[i], step, err));
out:
    rt_loaded_student_close(&l);
    rt_device_close(&d);
    return st;
}

const struct rt_command rt_cmd_eval = {
    .name = "eval",
    .synopsis = "--student DIR|RUN --data FILE|DIR [--data ...] [OPTIONS]",
    .summary = "measure a student: loss, KL to the teacher, agreement, pass@1 on prompts with answers",
    .help = "Intervals are 95 %, clustered by sequence for losses and by problem for pass@1 and pass@k: normal for losses, Wilson's for shares;\n"
            "`compare` shows the same. Problems whose prompts the student cannot hold are left out and counted (n_dropped). Each --data is\n"
            "printed, and recorded where --student is a run, when it is through; of one that is interrupted nothing is kept, and the same\n"
            "command begins again.\n\n"
            "    retort eval --student runs/soft --data shards_eval/ --kd-temperature 2\n"
            "    retort eval --student runs/soft --data math500.jsonl --samples 64 --pass-k 1,8,64",
    .options = options,
    .takes = RT_TAKES_ROOM | RT_TAKES_SEED | RT_TAKES_JSON | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct values),
    .run = run,
};
