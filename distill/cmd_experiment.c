/* retort experiment: the controlled comparison. Arms differ in their loss alone: one initialisation, the same tokens in the same order. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/eval_run.h"
#include "distill/run_record.h"
#include "distill/train_options.h"
#include "distill/train_run.h"

enum { MAX_ARMS = 32 };

struct values {
    struct rt_train_values train;
    struct rt_str_list verified_data;
    const char *arms, *verify;
    int64_t seeds, samples, max_tokens;
    double temperature, top_p, w_feature;
};

#define T(field) offsetof(struct values, train.field)
#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    RT_TRAIN_RECIPE_OPTIONS(T),
    {"data", RT_OPT_LIST, T(data), NULL, 0, 0, NULL, "PATH[:WEIGHT]", "what every arm but `verified` sees: shards, so that soft arms have rows", true, false},
    {"verified-data", RT_OPT_LIST, V(verified_data), NULL, 0, 0, NULL, "PATH[:WEIGHT]", "traces that passed a verifier, for arm `verified`", false, false},
    {"eval-data", RT_OPT_LIST, T(eval_data), NULL, 0, 0, NULL, "PATH", "shards, JSON lines, or prompts with answers; may be repeated", false, false},
    {"out", RT_OPT_STRING, T(out), NULL, 0, 0, NULL, "DIR", "where runs and experiment.json go; the same command resumes", true, true},
    {"arms", RT_OPT_STRING, V(arms), "hard,soft,half", 0, 0, NULL, "NAME,...", "hard, soft, half, feature, alm, verified, or NAME=CE/KL/FEATURE[/ALM] as in mix=0.3/0.7/0", false, false},
    {"seeds", RT_OPT_INT, V(seeds), "1", 1, 1000, NULL, "N", "runs of each arm, with seeds --seed, --seed + 1, ...", false, false},
    {"w-feature", RT_OPT_FLOAT, V(w_feature), "1", 0, 1e6, NULL, "W", "weight of the state loss in arm `feature`", false, false},
    {"samples", RT_OPT_INT, V(samples), "4", 1, 65536, NULL, "N", "completions of each prompt with an answer", false, false},
    {"temperature", RT_OPT_FLOAT, V(temperature), "0.6", 0, 100, NULL, "T", "of sampling", false, false},
    {"top-p", RT_OPT_FLOAT, V(top_p), "0.95", 0.0001, 1, NULL, "P", "nucleus of sampling", false, false},
    {"max-tokens", RT_OPT_INT, V(max_tokens), "32768", 1, 1e9, NULL, "N", "of a completion", false, false},
    {"verify", RT_OPT_CHOICE, V(verify), "boxed", 0, 0, "boxed|exact", NULL, "what is compared with the answer", false, false},
    {0},
};

struct arm {
    char name[48];
    const char *description;
    double ce, kl, feature, alm;
    bool verified;
};

struct job {
    struct rt_context *ctx;
    const struct values *v;
    struct arm arm[MAX_ARMS];
    int n_arms;
    const char **scored, **answered; /* --eval-data by what it holds */
    int n_scored, n_answered;
    bool *finished;                  /* [arms, seeds] */
    struct rt_rundir dir;
};

static const struct arm known[] = {
    {"hard", "cross-entropy on the teacher's tokens", 1, 0, 0, 0, false},
    {"soft", "KL to the teacher's distribution", 0, 1, 0, 0, false},
    {"half", "half cross-entropy, half KL", 0.5, 0.5, 0, 0, false},
    {"feature", "KL and the teacher's hidden states", 0, 1, 1, 0, false},
    {"alm", "the teacher's likelihoods of spans", 0, 0, 0, 1, false},
    {"verified", "cross-entropy on traces that passed a verifier", 1, 0, 0, 0, true},
};

/* "CE/KL/FEATURE" or "CE/KL/FEATURE/ALM" */
static bool read_weights(const char *text, struct arm *out)
{
    char tail;
    const int n = sscanf(text, "%lf/%lf/%lf/%lf%c", &out->ce, &out->kl, &out->feature, &out->alm, &tail);
    const bool three = sscanf(text, "%lf/%lf/%lf%c", &out->ce, &out->kl, &out->feature, &tail) == 3;
    return (n == 4 || three) && out->ce >= 0 && out->kl >= 0 && out->feature >= 0 && out->alm >= 0;
}

static enum rt_status read_arm(const struct values *v, const char *text, size_t len, struct arm *out, struct rt_err *err)
{
    char name[128];
    snprintf(name, sizeof name, "%.*s", (int)(len < 120 ? len : 120), text);
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(known[i].name, name) == 0) {
            *out = known[i];
            out->feature *= v->w_feature;
            if (out->verified && v->verified_data.n == 0)
                return rt_fail(err, RT_USAGE, "--arms verified: give --verified-data");
            return RT_OK;
        }
    const char *eq = strchr(name, '=');
    *out = (struct arm){.description = "weights as given"};
    if (eq == NULL || eq == name || (size_t)(eq - name) >= sizeof out->name || strcspn(name, "/. ") < (size_t)(eq - name) ||
        !read_weights(eq + 1, out))
        return rt_fail(err, RT_USAGE, "--arms: '%s' is none of hard, soft, half, feature, alm, verified, nor NAME=CE/KL/FEATURE[/ALM]", name);
    snprintf(out->name, sizeof out->name, "%.*s", (int)(eq - name), name);
    return RT_OK;
}

static enum rt_status read_arms(struct job *j, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (const char *p = j->v->arms; *p != '\0';) {
        const size_t len = strcspn(p, ",");
        if (j->n_arms == MAX_ARMS)
            RT_FAIL(err, USAGE, "--arms: more than %d", MAX_ARMS);
        RT_TRY(read_arm(j->v, p, len, &j->arm[j->n_arms], err));
        for (int i = 0; i < j->n_arms; i++)
            if (strcmp(j->arm[i].name, j->arm[j->n_arms].name) == 0)
                RT_FAIL(err, USAGE, "--arms: '%s' is there twice", j->arm[i].name);
        j->n_arms++;
        p += len + (p[len] == ',');
    }
    if (j->n_arms == 0)
        RT_FAIL(err, USAGE, "--arms: none");
out:
    return st;
}

static enum rt_status sort_eval_data(struct job *j, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_train_values *t = &j->v->train;
    const struct rt_student_source source = {t->student, t->init_config, t->tokenizer, t->template_name};
    struct rt_loaded_student l = {0};
    const size_t n = (size_t)t->eval_data.n;
    RT_TRY(rt_alloc(n, sizeof *j->scored, "evaluation data", &j->scored, err));
    RT_TRY(rt_alloc(n, sizeof *j->answered, "evaluation data", &j->answered, err));
    RT_TRY(rt_loaded_student_open(&l, &source, NULL, err));
    for (size_t i = 0; i < n; i++) {
        bool losses, answers;
        RT_TRY(rt_eval_kind(t->eval_data.items[i], &l.model, &losses, &answers, err));
        if (losses)
            j->scored[j->n_scored++] = t->eval_data.items[i];
        else
            j->answered[j->n_answered++] = t->eval_data.items[i];
    }
out:
    rt_loaded_student_close(&l);
    return st;
}

/* The train command of one run. path holds its directory, name its name. */
static struct rt_train_values run_values(const struct job *j, int a, int64_t s, char *path, char *name)
{
    struct rt_train_values t = j->v->train;
    const struct arm *arm = &j->arm[a];
    snprintf(name, 96, "%s-seed%ld", arm->name, (long)(t.common.seed + s));
    snprintf(path, 4096, "%.3900s/arms/%s", j->v->train.out, name);
    t.out = path;
    t.name = name;
    t.arm = arm->name;
    t.common.seed += s;
    t.w_ce = arm->ce;
    t.w_kl = arm->kl;
    t.w_feature = arm->feature;
    t.w_alm = arm->alm;
    if (arm->verified)
        t.data = j->v->verified_data;
    t.eval_data = (struct rt_str_list){j->scored, j->n_scored};
    return t;
}

/* Every refusal of every arm, before the first is trained. */
static enum rt_status check_arms(struct job *j, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char path[4096], name[96];
    struct rt_context ctx = *j->ctx;
    ctx.log = NULL;
    for (int a = 0; a < j->n_arms; a++) {
        struct rt_train_values t = run_values(j, a, 0, path, name);
        st = rt_train_check(&ctx, &t, err);
        if (st != RT_OK)
            rt_err_context(err, "arm %s", j->arm[a].name);
        RT_TRY(st);
    }
out:
    return st;
}

static enum rt_status write_record(const struct job *j, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *root = NULL, *arms, *arm, *list, *w, *run, *config = NULL;
    const struct rt_train_values *t = &j->v->train;
    char path[160];
    bool all = true;
    for (int64_t i = 0; i < j->n_arms * j->v->seeds; i++)
        all &= j->finished[i];
    RT_TRY(rt_json_new_object(&root, err));
    RT_TRY(rt_json_set_int(root, "version", 1, err));
    RT_TRY(rt_json_set_bool(root, "finished", all, err));
    RT_TRY(rt_json_set_array(root, "arms", &arms, err));
    for (int a = 0; a < j->n_arms; a++) {
        const struct arm *it = &j->arm[a];
        const struct rt_str_list *data = it->verified ? &j->v->verified_data : &t->data;
        RT_TRY(rt_json_set_object(arms, NULL, &arm, err));
        RT_TRY(rt_json_set_string(arm, "name", it->name, err));
        RT_TRY(rt_json_set_string(arm, "description", it->description, err));
        RT_TRY(rt_json_set_object(arm, "weights", &w, err));
        RT_TRY(rt_json_set_double(w, "ce", it->ce, err));
        RT_TRY(rt_json_set_double(w, "kl", it->kl, err));
        RT_TRY(rt_json_set_double(w, "feature", it->feature, err));
        if (it->alm > 0)
            RT_TRY(rt_json_set_double(w, "alm", it->alm, err));
        RT_TRY(rt_json_set_array(arm, "data", &list, err));
        for (int i = 0; i < data->n; i++)
            RT_TRY(rt_json_set_string(list, NULL, data->items[i], err));
        RT_TRY(rt_json_set_array(arm, "runs", &list, err));
        for (int64_t s = 0; s < j->v->seeds; s++) {
            snprintf(path, sizeof path, "arms/%s-seed%ld", it->name, (long)(t->common.seed + s));
            RT_TRY(rt_json_set_object(list, NULL, &run, err));
            RT_TRY(rt_json_set_int(run, "seed", t->common.seed + s, err));
            RT_TRY(rt_json_set_string(run, "path", path, err));
            RT_TRY(rt_json_set_bool(run, "finished", j->finished[a * j->v->seeds + s], err));
        }
    }
    RT_TRY(rt_json_set_array(root, "eval_data", &list, err));
    for (int i = 0; i < t->eval_data.n; i++)
        RT_TRY(rt_json_set_string(list, NULL, t->eval_data.items[i], err));
    RT_TRY(rt_command_config(&rt_cmd_experiment, j->v, &config, err));
    RT_TRY(rt_json_set_copy(root, "options", rt_json_get(config, "options"), err));
    RT_TRY(rt_record_publish(t->out, RT_EXPERIMENT_FILE, root, err));
out:
    rt_json_free(config);
    rt_json_free(root);
    return st;
}

/* Answers of one finished run to each prompt file that eval.jsonl does not hold yet. */
static enum rt_status answer(struct job *j, const struct rt_train_values *t, struct rt_err *err)
{
    enum rt_status st;
    struct rt_loaded_student l = {0};
    struct rt_device d = {0};
    struct rt_json *line = NULL;
    struct rt_buf rows = {0};
    const struct rt_student_source source = {t->out, NULL, t->tokenizer, t->template_name};
    const struct values *v = j->v;
    int64_t memory;
    int n_ops;
    int64_t step;
    const enum rt_op *ops = rt_student_decode_ops(&n_ops);
    RT_TRY(rt_eval_run_step(t->out, &step, err));
    for (int i = 0; i < j->n_answered; i++) {
        bool there;
        RT_TRY(rt_eval_recorded(t->out, step, j->answered[i], &there, err));
        if (there)
            continue;
        if (l.d == NULL) {
            RT_TRY(rt_loaded_student_open(&l, &source, NULL, err));
            RT_TRY(rt_command_device(&(struct rt_context){0}, &t->common, ops, n_ops, &d, err));
        }
        RT_TRY(rt_command_room(&t->common, &d, &memory, err));
        const struct rt_eval_run_options o = {
            .data = j->answered[i], .T = t->kd_temperature, .memory = memory, .log = j->ctx->log, .stop = j->ctx->stop, .stop_self = j->ctx->stop_self,
            .sampling = {.samples = v->samples, .max_tokens = v->max_tokens, .temperature = v->temperature, .top_p = v->top_p,
                         .seed = (uint64_t)t->common.seed, .memory = memory, .exact = strcmp(v->verify, "exact") == 0}};
        double pass1;
        rt_json_free(line);
        line = NULL;
        rows.len = 0;
        RT_TRY(rt_json_new_object(&line, err));
        RT_TRY(rt_eval_run(&l, &d, &o, line, &rows, err));
        RT_TRY(rt_eval_record(t->out, step, line, &rows, err));
        if (rt_json_as_double(rt_json_get(line, "pass1"), &pass1))
            rt_info(j->ctx->log, "%s: %s: pass@1 %.3f", t->name, o.data, pass1);
    }
out:
    rt_json_free(line);
    rt_buf_free(&rows);
    rt_loaded_student_close(&l);
    rt_device_close(&d);
    return st;
}

static enum rt_status train_all(struct job *j, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char path[4096], name[96];
    /* seed by seed: a comparison that is cut short still has whole rounds */
    for (int64_t s = 0; s < j->v->seeds; s++)
        for (int a = 0; a < j->n_arms; a++) {
            struct rt_train_values t = run_values(j, a, s, path, name);
            rt_info(j->ctx->log, "---- %s (%s), seed %ld", j->arm[a].name, j->arm[a].description, (long)t.common.seed);
            RT_TRY(rt_train(j->ctx, &t, NULL, err));
            if (j->ctx->log != NULL)
                j->ctx->log->copy = j->dir.log_file;
            RT_TRY(answer(j, &t, err));
            j->finished[a * j->v->seeds + s] = true;
            RT_TRY(write_record(j, err));
        }
out:
    return st;
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    enum rt_status st;
    struct job j = {.ctx = ctx, .v = values, .dir = {.lock = -1, .metrics = -1}};
    struct rt_json *config = NULL;
    char path[4096];
    struct rt_rank rank;
    (void)pos;
    RT_TRY(rt_rank_from_env(&rank, err));
    if (rank.size > 1)
        RT_FAIL(err, USAGE, "an experiment is one process, this is rank %d of %d; `retort train` takes several, for each arm", rank.rank, rank.size);
    RT_TRY(read_arms(&j, err));
    RT_TRY(sort_eval_data(&j, err));
    RT_TRY(rt_alloc((size_t)(j.n_arms * j.v->seeds), sizeof *j.finished, "arms", &j.finished, err));
    RT_TRY(check_arms(&j, err));
    if (j.v->train.common.dry_run) {
        struct rt_train_values t = run_values(&j, 0, 0, path, (char[96]){0});
        printf("%d arms, %ld seeds: %ld runs; each:\n", j.n_arms, (long)j.v->seeds, (long)(j.n_arms * j.v->seeds));
        fflush(stdout);
        st = rt_train(ctx, &t, NULL, err);
        goto out;
    }
    RT_TRY(rt_command_config(ctx->command, values, &config, err));
    RT_TRY(rt_rundir_open(j.v->train.out, config, &j.dir, err));
    if (ctx->log != NULL)
        ctx->log->copy = j.dir.log_file;
    RT_TRY(rt_path_join(path, sizeof path, j.v->train.out, "arms", err));
    RT_TRY(rt_mkdirs(path, err));
    RT_TRY(write_record(&j, err));
    RT_TRY(train_all(&j, err));
    printf("%s/%s\n", j.v->train.out, RT_EXPERIMENT_FILE);
out:
    if (ctx->log != NULL)
        ctx->log->copy = NULL;
    rt_rundir_close(&j.dir);
    rt_json_free(config);
    rt_free(j.scored);
    rt_free(j.answered);
    rt_free(j.finished);
    return st;
}

const struct rt_command rt_cmd_experiment = {
    .name = "experiment",
    .synopsis = "--student DIR|--init-config FILE --data DIR --arms hard,soft,... --out DIR [OPTIONS]",
    .summary = "the controlled comparison: arms that differ in their loss alone, trained and evaluated",
    .help = "Every arm begins with the same parameters and sees the same sequences in the same order (order_sha256 of each run.json says so);\n"
            "`verified` has data of its own. `retort compare DIR` makes the report.\n\n"
            "    retort experiment --student tiny --data shards/ --arms hard,soft,half --seeds 3 --eval-data eval_shards/ --out exp",
    .options = options,
    .takes = RT_TAKES_ROOM | RT_TAKES_SEED | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct values),
    .run = run,
};
