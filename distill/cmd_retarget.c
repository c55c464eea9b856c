/* retort retarget: rewrites row shards into another tokenizer's vocabulary. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/command.h"
#include "distill/retarget_run.h"
#include "formats/rundir.h"
#include "student/config.h"

struct values {
    struct rt_common common;
    const char *shards, *student, *out, *mode, *teacher, *template_name, *teacher_template;
    int64_t rows_per_shard;
    double gamma;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"shards", RT_OPT_STRING, V(shards), NULL, 0, 0, NULL, "DIR", "row shards of a teacher", true, true},
    {"student", RT_OPT_STRING, V(student), NULL, 0, 0, NULL, "DIR", "model directory of the student: its tokenizer, chat template and vocabulary", true, false},
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "DIR", "where the student's shards go; the same command resumes", true, true},
    {"mode", RT_OPT_CHOICE, V(mode), "exact", 0, 0, "exact|strict|alm", NULL,
     "exact: every row that bytes decide; strict: one token against one token; alm: likelihoods of spans (`train --w-alm`)", false, false},
    {"gamma", RT_OPT_FLOAT, V(gamma), "0.1", 0, 1, NULL, "P",
     "alm: a span is cut only where the teacher's mass of a boundary coming next is above P; sets without `logits --boundary` wherever tokens end together",
     false, false},
    {"teacher", RT_OPT_STRING, V(teacher), NULL, 0, 0, NULL, "DIR", "where the teacher's tokenizer and template are; default: SHARDS/teacher, which `logits` leaves there", false, true},
    {"template", RT_OPT_STRING, V(template_name), NULL, 0, 0, NULL, "NAME", "chat template to use instead of the student's own", false, false},
    {"teacher-template", RT_OPT_STRING, V(teacher_template), NULL, 0, 0, NULL, "NAME", "the same for the teacher: where `logits` had --template", false, false},
    {"rows-per-shard", RT_OPT_INT, V(rows_per_shard), "0", 0, 1e9, NULL, "N", "cut shards after so many rows; 0 takes 65536, fewer where rows are wide or --memory is small (a shard is held in memory)", false, false},
    {0},
};

struct job {
    struct rt_context *ctx;
    const struct values *v;
    struct rt_model_dir teacher, student;
    struct rt_student_config config;
    struct rt_pool *pool;
    struct rt_retarget_run *run;
    struct rt_retarget_counts counts;
};

static enum rt_status open_teacher(struct job *j, struct rt_err *err)
{
    enum rt_status st;
    const struct values *v = j->v;
    struct rt_shard_set *set = NULL;
    char dir[4096], file[4096];
    if (v->teacher != NULL)
        return rt_model_dir_open(v->teacher, v->teacher_template, j->ctx->log, &j->teacher, err);
    RT_TRY(rt_path_join(dir, sizeof dir, v->shards, "teacher", err));
    RT_TRY(rt_path_join(file, sizeof file, dir, "tokenizer.json", err));
    if (!rt_path_exists(file)) {
        RT_TRY(rt_shard_set_open(v->shards, &set, err)); /* not a set at all? */
        RT_FAIL(err, USAGE, "%s holds no copy of the teacher's tokenizer (%s): --teacher DIR says where it is", v->shards, file);
    }
    RT_TRY(rt_model_dir_open(dir, v->teacher_template, j->ctx->log, &j->teacher, err));
out:
    rt_shard_set_free(set);
    return st;
}

static enum rt_status open_models(struct job *j, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(open_teacher(j, err));
    if (j->teacher.tok == NULL)
        RT_FAIL(err, FORMAT, "%s: has no tokenizer.json", j->teacher.path);
    RT_TRY(rt_model_dir_open(j->v->student, j->v->template_name, j->ctx->log, &j->student, err));
    if (j->student.tok == NULL)
        RT_FAIL(err, FORMAT, "%s: has no tokenizer.json", j->v->student);
    RT_TRY(rt_student_config_load(j->v->student, &j->config, err));
out:
    return st;
}

static enum rt_retarget_mode mode_of(const char *name)
{
    int m = 0;
    while (m + 1 < RT_RETARGET_MODES && strcmp(name, rt_retarget_mode_name((enum rt_retarget_mode)m)) != 0)
        m++;
    return (enum rt_retarget_mode)m;
}

/* Leaves the resolved arguments in OUT/retarget.json, or compares with those that are there. */
static enum rt_status record(struct job *j, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *config = NULL, *was = NULL;
    struct rt_buf text = {0}, diff = {0};
    char file[4096], identity[4096], sha[65];
    bool differ = false;
    RT_TRY(rt_command_config(j->ctx->command, j->v, &config, err));
    rt_retarget_run_sha256(j->run, sha);
    RT_TRY(rt_json_set_string(config, "data_sha256", sha, err));
    RT_TRY(rt_path_join(file, sizeof file, j->v->out, "retarget.json", err));
    RT_TRY(rt_path_join(identity, sizeof identity, j->v->out, "identity.json", err));
    if (rt_path_exists(file)) {
        RT_TRY(rt_json_load(file, 1 << 20, &was, err));
        RT_TRY(rt_config_diff(was, config, &differ, &diff, err));
        if (differ)
            RT_FAIL(err, REFUSED, "%s holds rows of another command; %.*s; use another --out", j->v->out, (int)(diff.len < 300 ? diff.len : 300), diff.data);
    } else if (rt_path_exists(identity)) {
        RT_FAIL(err, REFUSED, "%s holds rows of another command; use another --out", j->v->out);
    } else {
        RT_TRY(rt_mkdirs(j->v->out, err));
        RT_TRY(rt_json_dump(config, 2, &text, err));
        RT_TRY(rt_publish_bytes(file, text.data, text.len, err));
    }
out:
    rt_buf_free(&text);
    rt_buf_free(&diff);
    rt_json_free(was);
    rt_json_free(config);
    return st;
}

static enum rt_status report(struct job *j, struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_set *set = NULL;
    struct rt_json *v = NULL;
    struct rt_buf text = {0};
    char bytes[32];
    RT_TRY(rt_shard_set_open(j->v->out, &set, err));
    const struct rt_shard_info *info = rt_shard_set_info(set);
    rt_info(j->ctx->log, "%s: %ld sequences, %ld tokens, %ld rows in %ld shards, %s", j->v->out, (long)info->sequences, (long)info->tokens, (long)info->rows,
            (long)info->shards, rt_human_bytes(bytes, info->bytes));
    if (j->v->common.json) {
        RT_TRY(rt_json_new_object(&v, err));
        RT_TRY(rt_json_set_string(v, "mode", j->v->mode, err));
        RT_TRY(rt_json_set_int(v, "shards", info->shards, err));
        RT_TRY(rt_json_set_int(v, "tokens", info->tokens, err));
        RT_TRY(rt_json_set_int(v, "stored_rows", info->rows, err));
        RT_TRY(rt_json_set_int(v, "bytes", (int64_t)info->bytes, err));
        RT_TRY(rt_retarget_report_json(&j->counts, j->student.tok, v, err));
        RT_TRY(rt_command_print_json(v, err));
    } else {
        RT_TRY(rt_retarget_report_print(&j->counts, j->student.tok, &text, err));
        printf("%.*s", (int)text.len, text.data);
    }
out:
    rt_buf_free(&text);
    rt_json_free(v);
    rt_shard_set_free(set);
    return st;
}

static void print_plan(const struct job *j)
{
    const struct rt_shard_info *in = rt_retarget_run_input(j->run);
    const struct rt_retarget_plan *p = rt_retarget_run_plan(j->run);
    char bytes[32], memory[32], shard[32];
    if (j->v->common.json)
        printf("{\"mode\":\"%s\",\"sequences\":%ld,\"tokens\":%ld,\"rows\":%ld,\"bytes\":%lu,\"rows_per_shard\":%ld,\"memory\":%ld}\n", j->v->mode, (long)in->sequences,
               (long)in->tokens, (long)in->rows, (unsigned long)in->bytes, (long)p->rows_per_shard, (long)p->needed);
    else
        printf("sequences     %ld\ntokens        %ld of the teacher\nrows          %ld of the teacher\nshards        about %s, of %ld rows\nmemory        at most %s, of which a "
               "shard %s\n", (long)in->sequences, (long)in->tokens, (long)in->rows, rt_human_bytes(bytes, in->bytes), (long)p->rows_per_shard,
               rt_human_bytes(memory, (uint64_t)p->needed), rt_human_bytes(shard, (uint64_t)p->shard_bytes));
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    struct job j = {.ctx = ctx, .v = values};
    enum rt_status st;
    (void)pos;
    RT_TRY(open_models(&j, err));
    RT_TRY(rt_pool_create((int)j.v->common.threads, &j.pool, err));
    const struct rt_retarget_options o = {.shards = j.v->shards, .out = j.v->out, .teacher = &j.teacher, .student = &j.student,
                                          .student_vocab = j.config.vocab_size, .mode = mode_of(j.v->mode), .gamma = j.v->gamma, .rows_per_shard = j.v->rows_per_shard,
                                          .memory = rt_command_memory(&j.v->common),
                                          .pool = j.pool, .log = ctx->log, .stop = ctx->stop, .stop_self = ctx->stop_self};
    RT_TRY(rt_retarget_run_open(&o, &j.run, err));
    if (!rt_retarget_run_input(j.run)->finished)
        rt_warn(ctx->log, "%s is not finished, or lacks parts: what comes later needs another --out", j.v->shards);
    if (o.mode == RT_RETARGET_ALM && !rt_retarget_run_identity(j.run)->boundary)
        rt_info(ctx->log, "%s was scored without --boundary: --gamma %g is not used, spans end wherever tokens of both sides do, inside words too", j.v->shards, j.v->gamma);
    if (j.v->common.dry_run) {
        print_plan(&j);
        goto out;
    }
    RT_TRY(record(&j, err));
    RT_TRY(rt_retarget_counts_init(&j.counts, rt_tokenizer_n_ids(j.student.tok), err));
    RT_TRY(rt_retarget_run_all(j.run, &j.counts, err));
    RT_TRY(report(&j, err));
out:
    rt_retarget_counts_free(&j.counts);
    rt_retarget_run_close(j.run);
    rt_pool_free(j.pool);
    rt_student_config_free(&j.config);
    rt_model_dir_close(&j.student);
    rt_model_dir_close(&j.teacher);
    return st;
}

const struct rt_command rt_cmd_retarget = {
    .name = "retarget",
    .synopsis = "--shards DIR --student DIR --out DIR [OPTIONS]",
    .summary = "rewrite row shards for a student with another tokenizer",
    .help = "Rows are rewritten by bytes, on the CPU, into ordinary shards that `train`, `eval`, `cat`, `inspect` and `doctor` take. The student's own template\n"
            "renders its prompt; only the completion's bytes are aligned; ends of turns, BOS, EOS and think tags map by role.\n"
            "  exact   a student token that begins where a teacher token does has the teacher's distribution over first tokens; one inside a teacher token\n"
            "          the same, given the bytes said already; what no listed token explains stays one residual\n"
            "  strict  only where one student token is one teacher token, over the tokens that both have\n"
            "  alm     no distributions: the teacher's log-probabilities of spans at whose ends both tokenizers meet, for `train --w-alm`; also of shards that\n"
            "          hold realised log-probabilities alone (top_k 0). With `logits --boundary` cut at whole words and debiased\n"
            "Student tokens that reach over the end of a teacher token, and white space alone, have no row: their labels stay for the cross-entropy\n"
            "(`train --ce rest`: which then takes no others).\n"
            "Rows hold at T = 1 and with `train --tail bucket` (the defaults): sums of probabilities cannot be tempered, and what no listed token explains is\n"
            "part of a row. It pays to store more entries than for a student of the teacher's tokenizer, because inside a teacher token only those count\n"
            "that agree with the bytes said: `logits --cache topk=256` or more where text has a heavy tail. In the crossing of examples/ (an almanac, KL to the\n"
            "teacher) top 64 did worse than hard labels, 1.017 against 0.979, top 256 better, 0.686; strict gave 0.976, and with --tail renorm 2.3.\n"
            "Text that is not in NFC, or that the tokens' bytes do not spell, is left out and counted. The report is printed, and stands in every shard's\n"
            "header for what was read for it.\n\n"
            "    retort retarget --shards shards/ --student Qwen2.5-1.5B --out shards-qwen/\n"
            "    retort train    --student Qwen2.5-1.5B --data shards-qwen/ --out soft --w-ce 0.5 --w-kl 0.5",
    .options = options,
    .takes = RT_TAKES_THREADS | RT_TAKES_MEMORY | RT_TAKES_JSON | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct values),
    .run = run,
};
