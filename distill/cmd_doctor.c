/* retort doctor: pre-flight checks of teacher, student, data and shards. */
#include <stdio.h>

#include "distill/command.h"
#include "distill/doctor.h"
#include "teacher/teacher.h"

struct values {
    struct rt_common common;
    const char *teacher, *student, *data, *shards, *out;
    int64_t max_length, batch_tokens, lines, top_k, rescore;
    bool forward;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"teacher", RT_OPT_STRING, V(teacher), NULL, 0, 0, NULL, "DIR", "checkpoint directory of the teacher", false, false},
    {"student", RT_OPT_STRING, V(student), NULL, 0, 0, NULL, "DIR|RUN", "student: a model directory or a finished run", false, false},
    {"data", RT_OPT_STRING, V(data), NULL, 0, 0, NULL, "FILE|DIR", "JSON lines, or a directory of traces", false, false},
    {"shards", RT_OPT_STRING, V(shards), NULL, 0, 0, NULL, "DIR", "what `retort logits` or `retort retarget` wrote", false, false},
    {"out", RT_OPT_STRING, V(out), ".", 0, 0, NULL, "DIR", "where runs and shards will go: its free space is looked at", false, true},
    {"max-length", RT_OPT_INT, V(max_length), "0", 0, 1e9, NULL, "N", "longest sequence in tokens that is planned for; 0 takes the models' maxima", false, false},
    {"batch-tokens", RT_OPT_INT, V(batch_tokens), "16384", 1, 1e12, NULL, "N", "tokens of a global batch of training", false, false},
    {"top-k", RT_OPT_INT, V(top_k), "64", 1, 65536, NULL, "K", "ids a row that will be stored", false, false},
    {"lines", RT_OPT_INT, V(lines), "0", 0, 1e15, NULL, "N", "lines of data whose rendering is checked one by one; 0: all", false, false},
    {"forward", RT_OPT_FLAG, V(forward), "true", 0, 0, NULL, NULL, "let models that fit into --memory score some of the data", false, false},
    {"rescore", RT_OPT_INT, V(rescore), "0", 0, 1e6, NULL, "N", "rows of --shards that --teacher computes again, on --device, against what is stored; 0: 64 where the teacher fits into --memory. Any teacher takes one pass over its weights", false, false},
    {0},
};

static enum rt_status print_json(const struct rt_checks *c, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *root = NULL, *list, *o;
    struct rt_buf text = {0};
    static const char *const key[] = {"passed", "warned", "failed"};
    RT_TRY(rt_json_new_object(&root, err));
    for (int i = 0; i < 3; i++)
        RT_TRY(rt_json_set_int(root, key[i], c->count[i], err));
    RT_TRY(rt_json_set_array(root, "checks", &list, err));
    for (int i = 0; i < c->n; i++) {
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_string(o, "level", rt_check_level_name(c->at[i].level), err));
        RT_TRY(rt_json_set_string(o, "name", c->at[i].name, err));
        RT_TRY(rt_json_set_string(o, "detail", c->at[i].detail, err));
    }
    RT_TRY(rt_json_dump(root, 2, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    fwrite(text.data, 1, text.len, stdout);
out:
    rt_buf_free(&text);
    rt_json_free(root);
    return st;
}

static void print_text(const struct rt_checks *c)
{
    for (int i = 0; i < c->n; i++) {
        char detail[sizeof c->at[i].detail];
        snprintf(detail, sizeof detail, "%s", c->at[i].detail);
        for (char *p = detail; *p != '\0'; p++)
            *p = (unsigned char)*p < 0x20 || *p == 0x7f ? '?' : *p;
        printf("%s %s: %s\n", rt_check_level_name(c->at[i].level), c->at[i].name, detail);
    }
    printf("%d passed, %d warned, %d failed\n", c->count[RT_CHECK_PASS], c->count[RT_CHECK_WARN], c->count[RT_CHECK_FAIL]);
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    const struct values *v = values;
    enum rt_status st;
    struct rt_doctor d = {.teacher = v->teacher, .student = v->student, .data = v->data, .shards = v->shards, .out = v->out, .max_length = v->max_length,
                          .batch_tokens = v->batch_tokens, .memory = rt_command_memory(&v->common), .lines = v->lines, .top_k = (int)v->top_k,
                          .gpus = (int)v->common.gpus, .threads = (int)v->common.threads, .forward = v->forward, .rescore = v->rescore, .log = ctx->log};
    int n_ops;
    const enum rt_op *ops = rt_teacher_score_ops(&n_ops);
    (void)pos;
    if (v->teacher == NULL && v->student == NULL && v->data == NULL && v->shards == NULL)
        RT_FAIL(err, USAGE, "nothing to check: give --teacher, --student, --data or --shards");
    if (v->rescore > 0 && (v->teacher == NULL || v->shards == NULL))
        RT_FAIL(err, USAGE, "--rescore %ld: needs --teacher and --shards, whose rows it computes again; %s missing", (long)v->rescore,
                v->teacher != NULL ? "--shards is" : v->shards != NULL ? "--teacher is" : "both are");
    RT_TRY(rt_command_device(ctx, &v->common, ops, n_ops, &d.device, err));
    if (d.device.be->own_memory)
        RT_TRY(rt_command_room(&v->common, &d.device, &d.room, err));
    RT_TRY(rt_doctor_run(&d, err));
    if (v->common.json)
        RT_TRY(print_json(&d.checks, err));
    else
        print_text(&d.checks);
    if (d.checks.count[RT_CHECK_FAIL] > 0)
        RT_FAIL(err, REFUSED, "%d of %d checks failed", d.checks.count[RT_CHECK_FAIL], d.checks.n);
out:
    rt_doctor_close(&d);
    rt_device_close(&d.device);
    return st;
}

const struct rt_command rt_cmd_doctor = {
    .name = "doctor",
    .synopsis = "--teacher DIR --student DIR|RUN --data FILE|DIR --shards DIR [OPTIONS]",
    .summary = "check vocabularies, templates, masks, shifts, shards, memory and disk before anything is spent",
    .help = "Any of the four may be left out: what needs it is then not checked. One line a check, PASS, WARN or FAIL, with what to do. The exit code\n"
            "is 1 where a check fails.\n\n"
            "    retort doctor --teacher DeepSeek-R1/ --student Qwen2.5-7B/ --data traces/\n"
            "    retort doctor --student Qwen2.5-7B/ --shards shards/ --memory 64G\n"
            "    retort doctor --teacher DeepSeek-R1/ --shards shards/ --device cpu --rescore 64 --max-length 256    (is the signal right?)",
    .options = options,
    .takes = RT_TAKES_ROOM | RT_TAKES_GPUS | RT_TAKES_JSON,
    .values_size = sizeof(struct values),
    .run = run,
};
