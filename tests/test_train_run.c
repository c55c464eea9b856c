/* Training runs on disk: refusals before the first step, resume after an interrupt and after a kill, evaluation, experiments. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/io.h"
#include "distill/eval_run.h"
#include "distill/run_record.h"
#include "tests/train_command.h"

static void assert_same_file(const char *a, const char *b, const char *name)
{
    struct rt_buf x = tf_read(a, name), y = tf_read(b, name);
    assert_int_equal(x.len, y.len);
    assert_memory_equal(x.data, y.data, x.len);
    rt_buf_free(&x);
    rt_buf_free(&y);
}

/* metrics.jsonl without what a clock says. */
static void assert_same_metrics(const char *a, const char *b)
{
    struct rt_buf x = tf_read(a, "metrics.jsonl"), y = tf_read(b, "metrics.jsonl");
    static const char *const keys[] = {"step", "loss", "ce", "kl", "grad_norm", "lr", "tokens", "targets", "accuracy"};
    char *save_x = NULL, *save_y = NULL;
    char *p = strtok_r(x.data, "\n", &save_x), *q = strtok_r(y.data, "\n", &save_y);
    for (; p != NULL && q != NULL; p = strtok_r(NULL, "\n", &save_x), q = strtok_r(NULL, "\n", &save_y)) {
        struct rt_err err = {0};
        struct rt_json *u = NULL, *v = NULL;
        assert_ok(rt_json_parse(p, strlen(p), a, &u, &err));
        assert_ok(rt_json_parse(q, strlen(q), b, &v, &err));
        for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
            double s = 0, t = 0;
            assert_true(rt_json_as_double(rt_json_get(u, keys[i]), &s) && rt_json_as_double(rt_json_get(v, keys[i]), &t));
            assert_true(s == t);
        }
        rt_json_free(u);
        rt_json_free(v);
    }
    assert_true(p == NULL && q == NULL);
    rt_buf_free(&x);
    rt_buf_free(&y);
}

TF_FILES("run")

static void test_refusals(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *out = test_tmp("run-refused"), *file = test_tmp("run-file"), *longer = test_tmp("run-long.jsonl");
    char below[600];
    train_refused(ARGS("--student", files.student, "--data", files.shards, "--out", out, "--w-kl", "1", "--kd-temperature", "3"), RT_REFUSED, "T = 3 is not stored (stored: 1, 2)");
    train_refused(ARGS("--student", files.student, "--data", files.shards, "--out", out, "--w-kl", "1", "--teacher-temperature", "0.6"), RT_REFUSED, "T = 0.6 is not stored");
    train_refused(ARGS("--student", files.student, "--data", files.lines, "--out", out, "--w-kl", "0.5"), RT_REFUSED, "without teacher rows");
    train_refused(ARGS("--student", files.student, "--data", files.lines, "--out", out, "--w-feature", "0.5"), RT_REFUSED, "no hidden states");
    train_refused(ARGS("--student", files.student, "--data", files.shards, "--out", out, "--w-ce", "0"), RT_USAGE, "nothing would be learnt");
    train_refused(ARGS("--student", files.student, "--data", files.shards, "--data", files.lines, "--out", out, "--w-ce", "0", "--w-feature", "1",
                 "--layer-map", "1:1"), RT_REFUSED, "has none of the states that are trained on");
    train_refused(ARGS("--student", files.student, "--data", files.shards, "--out", out, "--memory", "10000"), RT_NOMEM, "training needs");
    train_refused(ARGS("--data", files.shards, "--out", out), RT_USAGE, "--init-config");
    assert_false(rt_path_exists(out));
    assert_ok(rt_publish_bytes(file, "x", 1, &err));
    snprintf(below, sizeof below, "%s/run", file);
    assert_int_not_equal(train_command(ARGS("--student", files.student, "--data", files.shards, "--out", below), 0, NULL, &err), RT_OK);
    rt_err_clear(&err);
    struct rt_buf b = {0};
    for (int i = 0; i < 70; i++)
        assert_ok(rt_buf_printf(&b, &err, "%s%d", i == 0 ? "{\"input_ids\": [" : ", ", i % 61));
    assert_ok(rt_buf_printf(&b, &err, "]}\n"));
    assert_ok(rt_publish_bytes(longer, b.data, b.len, &err));
    rt_buf_free(&b);
    train_refused(ARGS("--student", files.student, "--data", longer, "--out", out), RT_REFUSED, "has 70 tokens, the student takes 64");
    struct tf_data *other = malloc(sizeof *other);
    *other = *files.data;
    memset(other->id.tokenizer_sha256, 'b', 64);
    const char *foreign = tf_write_shards("run-foreign", other);
    train_refused(ARGS("--student", files.student, "--data", foreign, "--out", out), RT_REFUSED, "bbbbbbbb");
    train_refused(ARGS("--student", files.student, "--data", foreign, "--out", out), RT_REFUSED, "--tokenizer DIR"); /* the student has none */
    assert_ok(rt_publish_bytes(test_tmp("run-text.jsonl"), "{\"text\": \"x\"}\n", 14, &err));
    train_refused(ARGS("--student", files.student, "--data", test_tmp("run-text.jsonl"), "--out", out), RT_UNSUPPORTED, "--tokenizer DIR");
    *other = *files.data;
    other->id.vocab_size = other->id.n_ids = 62;
    foreign = tf_write_shards("run-wider", other);
    train_refused(ARGS("--student", files.student, "--data", foreign, "--out", out), RT_REFUSED, "ids up to 61");
    free(other);
}

/* The mass of the stored ids is known: a treatment that loses says so before the first step, in numbers. */
static void test_tail_warning(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char *log, mass[32];
    struct rt_shard_set *set = NULL;
    assert_ok(rt_shard_set_open(files.shards, &set, &err));
    snprintf(mass, sizeof mass, "hold %.3f", rt_shard_set_info(set)->mass[1]);
    assert_true(rt_shard_set_info(set)->mass[1] < 0.95);
    rt_shard_set_free(set);
    assert_ok(train_command(ARGS("--student", files.student, "--data", files.shards, "--out", test_tmp("run-dry"), "--w-kl", "1",
                                 "--kd-temperature", "2", "--tail", "renorm", "--dry-run", "--quiet", "--json"), 0, &log, &err));
    assert_non_null(strstr(log, mass));
    assert_non_null(strstr(log, "renorm"));
    free(log);
    assert_false(rt_path_exists(test_tmp("run-dry")));
}

/* Shards and text in one run: text takes CE alone, everything is divided by all targets; weights say how often; refused where text would teach
 * nothing. */
static void test_mix(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char *log, a[600], b[600];
    double epoch = 0, targets = 0, kl_rows = 0;
    const char *out = test_tmp("run-mix");
    snprintf(a, sizeof a, "%s:.5", files.shards);
    snprintf(b, sizeof b, "%s:2", files.lines);
    train_refused(ARGS("--student", files.student, "--data", a, "--data", b, "--out", out, "--w-ce", "0", "--w-kl", "1"), RT_REFUSED, "nothing would be learnt from it");
    assert_ok(train_command(ARGS("--student", files.student, "--data", a, "--data", b, "--out", out, "--w-ce", "0.25", "--w-kl", "0.75",
                                 "--kd-temperature", "2", "--batch-tokens", "80", "--epochs", "2"), 0, &log, &err));
    assert_non_null(strstr(log, "take the cross-entropy alone"));
    assert_non_null(strstr(log, "(20.0 % of an epoch's tokens)")); /* 0.5 of 2.5 */
    free(log);
    for (int64_t i = 0; epoch < 2; i++) {
        const double n = run_metric(out, i, "targets"), rows = run_metric(out, i, "kl_rows");
        const double kl = rows > 0 ? run_metric(out, i, "kl") : 0;
        const double loss = (0.25 * run_metric(out, i, "ce") * n + 0.75 * kl * rows) / n;
        assert_true(fabs(loss - run_metric(out, i, "loss")) < 1e-9 * loss);
        targets += n;
        kl_rows += rows;
        epoch = run_metric(out, i, "epoch");
    }
    int64_t all = 0; /* all shards once in two epochs, all lines four times */
    for (int s = 0; s < TF_SEQS; s++)
        for (int64_t i = 1; i < files.data->len[s]; i++)
            all += files.data->mask[s][i];
    assert_true(kl_rows == (double)all && targets == 5.0 * (double)all);
}

/* Less memory: smaller micro-batches, more that is computed again, then a refusal that says what would help; the steps are the same. */
static void test_recompute(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *out[3] = {test_tmp("run-level0"), test_tmp("run-level3"), test_tmp("run-level-none")};
    char *log, need[32];
    bool level[4] = {false}, refused_once = false;
    const char *const asked[] = {"0", "3"};
    for (int i = 0; i < 2; i++) {
        assert_ok(train_command(ARGS("--student", files.student, "--data", files.shards, "--out", out[i], "--steps", "4",
                                     "--batch-tokens", "80", "--lr", "1e-2", "--recompute", asked[i]), 0, &log, &err));
        assert_non_null(strstr(log, i == 0 ? "nothing is computed again" : "layers are computed again"));
        free(log);
    }
    assert_same_file(out[0], out[1], "model/model.safetensors");
    for (int64_t memory = 4 << 20; memory > 100000; memory -= memory / 50) {
        snprintf(need, sizeof need, "%ld", (long)memory);
        const enum rt_status st = train_command(ARGS("--student", files.student, "--data", files.shards, "--out", out[2],
                                                     "--batch-tokens", "4000", "--dry-run", "--memory", need, "--threads", "1"), 0, &log, &err);
        if (st == RT_NOMEM)
            refused_once = strstr(err.msg, "training needs") != NULL;
        else
            assert_int_equal(st, RT_OK);
        assert_true(st == RT_NOMEM || !refused_once);
        for (int i = 0; i < 4 && st == RT_OK; i++) {
            char mark[16];
            snprintf(mark, sizeof mark, "[%d: ", i);
            level[i] |= strstr(log, mark) != NULL;
        }
        rt_err_clear(&err);
        free(log);
    }
    assert_true(!level[0] && level[1] && level[3] && refused_once);
    /* where micro-batches may not be smaller, some layers are a level below the others */
    const char *deep = tf_write_student("run-deep", TF_WIDE, 3);
    bool seen[2] = {false};
    for (int64_t memory = 64 << 20; memory > 28 << 20; memory -= memory / 50) {
        snprintf(need, sizeof need, "%ld", (long)memory);
        if (train_command(ARGS("--student", deep, "--data", files.lines, "--out", out[2],
                               "--batch-tokens", "4000", "--micro-tokens", "4000", "--dry-run", "--memory", need, "--threads", "1"), 0, &log, &err) == RT_OK) {
            seen[0] |= strstr(log, "; 1 of 3 layers at level 1: ") != NULL;
            seen[1] |= strstr(log, "; 1 of 3 layers at level 2: ") != NULL;
        }
        rt_err_clear(&err);
        free(log);
    }
    assert_true(seen[0] && seen[1]);
}

#define RECIPE "--student", files.student, "--data", files.shards, "--w-ce", "0.5", "--w-kl", "0.5", "--kd-temperature", "2", "--batch-tokens", "80", "--steps", "9", \
    "--lr", "1e-2", "--w-feature", "0.1", "--layer-map", "1:1,final:final", "--save-every", "2", "--eval-data", files.lines, "--eval-every", "4"

static const char *const compared[] = {"model/model.safetensors", "model/config.json", "ckpt-00000009/adam_v.safetensors",
                                       "ckpt-00000009/projector.safetensors", "eval/run-lines-4.jsonl", "eval/run-lines-9.jsonl"};

/* An interrupt during an evaluation that cannot save is a failure. */
static void test_unsaved(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char block[4096];
    const char *out = test_tmp("run-unsaved");
    assert_ok(rt_path_join(block, sizeof block, out, "ckpt-00000000", &err));
    assert_int_equal(test_command_with(&rt_cmd_train, ARGS(RECIPE, "--out", out), &(struct test_run){.stop_at = 1, .block = block}, &err), RT_IO);
    assert_non_null(strstr(err.msg, "ckpt-00000000"));
}

/* Interrupted, or killed at any point, and started again: every byte of what an undisturbed run gives. */
static void test_resume(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *whole = test_tmp("run-whole"), *parts = test_tmp("run-parts"), *killed = test_tmp("run-killed");
    assert_ok(train_command(ARGS(RECIPE, "--out", whole, "--threads", "2"), 0, NULL, &err));
    assert_int_equal(train_command(ARGS(RECIPE, "--out", parts, "--threads", "1"), 6, NULL, &err), RT_INTERRUPTED);
    assert_non_null(strstr(err.msg, "the same command goes on"));
    rt_err_clear(&err);
    assert_status(train_command(ARGS(RECIPE, "--out", parts, "--clip", "2"), 0, NULL, &err), REFUSED);
    assert_ok(train_command(ARGS(RECIPE, "--out", parts), 0, NULL, &err));
    for (int at = 3; at < 30; at += 4) { /* more and more of it is done */
        const pid_t child = fork();
        if (child == 0)
            _exit(test_command_with(&rt_cmd_train, ARGS(RECIPE, "--out", killed, "--threads", "1"), &(struct test_run){.kill_at = at}, &err) == RT_OK ? 0 : 1);
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    }
    assert_ok(train_command(ARGS(RECIPE, "--out", killed), 0, NULL, &err));
    for (size_t i = 0; i < sizeof compared / sizeof compared[0]; i++) {
        assert_same_file(whole, parts, compared[i]);
        assert_same_file(whole, killed, compared[i]);
    }
    assert_same_metrics(whole, parts);
    assert_same_metrics(whole, killed);
    struct rt_json *run = run_json(killed, RT_RUN_FILE);
    int64_t steps;
    bool finished;
    double ce;
    assert_ok(rt_json_int(run, "steps", 9, 9, &steps, &err));
    assert_ok(rt_json_bool_or(run, "finished", false, &finished, &err));
    assert_true(finished);
    assert_ok(rt_json_double(rt_json_get(run, "final"), "ce", &ce, &err));
    assert_true(ce > 0);
    rt_json_free(run);
    struct rt_buf evals = tf_read(killed, RT_EVAL_FILE);
    int n = 0;
    for (size_t i = 0; i < evals.len; i++)
        n += evals.data[i] == '\n';
    assert_int_equal(n, 4); /* steps 0, 4, 8, 9 */
    rt_buf_free(&evals);
}

/* Whole numbers of the loss do not depend on where sequences come from. */
static void test_lines_and_shards(void **state)
{
    (void)state;
    struct rt_err err = {0};
    double ce[2], kl;
    for (int i = 0; i < 2; i++) {
        struct rt_loaded_student l = {0};
        struct rt_device d = {0};
        struct rt_json *line = NULL;
        struct rt_buf rows = {0};
        const struct rt_student_source source = {files.student, NULL, NULL, NULL};
        const struct rt_eval_run_options o = {.data = i == 0 ? files.lines : files.shards, .T = 2, .memory = 1 << 28, .micro_tokens = i == 0 ? 0 : 40};
        assert_ok(rt_device_open(&rt_backend_cpu, &(struct rt_dev_options){.threads = 2}, &d, &err));
        assert_ok(rt_loaded_student_open(&l, &source, NULL, &err));
        assert_ok(rt_json_new_object(&line, &err));
        assert_ok(rt_eval_run(&l, &d, &o, line, &rows, &err));
        assert_ok(rt_json_double(line, "ce", &ce[i], &err));
        if (i == 1)
            assert_ok(rt_json_double(line, "kl", &kl, &err));
        else
            assert_true(!rt_json_as_double(rt_json_get(line, "kl"), &kl) || isnan(kl));
        int n = 0;
        for (size_t c = 0; c < rows.len; c++)
            n += rows.data[c] == '\n';
        assert_int_equal(n, TF_SEQS);
        rt_json_free(line);
        rt_buf_free(&rows);
        rt_loaded_student_close(&l);
        rt_device_close(&d);
    }
    /* the same sequences, packed differently: the order of float32 sums */
    assert_true(fabs(ce[0] - ce[1]) < 1e-6 * ce[0]);
    assert_true(kl > 0);
}

/* `eval` of the student of a run, which records it; *logged (NULL is fine) is what it logged, to be freed. */
static void record(const char *run, const char *data, const char *T, char **logged)
{
    struct rt_err err = {0};
    assert_ok(test_command_logged(&rt_cmd_eval, ARGS("--student", run, "--data", data, "--kd-temperature", T, "--threads", "2"), 0, logged, &err));
}

/* Lines of eval.jsonl; each has a per-sequence file of its own with as many lines as it says sequences. */
static int check_records(const char *run, int by_train)
{
    struct rt_err err = {0};
    struct rt_buf text = tf_read(run, RT_EVAL_FILE);
    char seen[16][256];
    int n = 0;
    for (size_t at = 0; at < text.len; n++) {
        struct rt_json *line = NULL;
        const char *end = memchr(text.data + at, '\n', text.len - at), *file;
        int64_t sequences, rows = 0;
        assert_true(end != NULL && n < 16);
        assert_ok(rt_json_parse(text.data + at, (size_t)(end - text.data) - at, "eval", &line, &err));
        assert_ok(rt_json_string(line, "per_sequence", &file, &err));
        assert_ok(rt_json_int(line, "n_sequences", 1, 1000, &sequences, &err));
        by_train -= strcmp(rt_json_as_string(rt_json_get(line, "by"), NULL), "train") == 0;
        struct rt_buf per = tf_read(run, file);
        for (size_t i = 0; i < per.len; i++)
            rows += per.data[i] == '\n';
        assert_int_equal(rows, sequences);
        for (int i = 0; i < n; i++)
            assert_true(strcmp(seen[i], file) != 0);
        snprintf(seen[n], sizeof seen[n], "%s", file);
        rt_buf_free(&per);
        rt_json_free(line);
        at = (size_t)(end - text.data) + 1;
    }
    assert_int_equal(by_train, 0);
    rt_buf_free(&text);
    return n;
}

/* Two data sets of one name, two temperatures, training and `eval`: each has its record; the same measurement again takes its place. */
static void test_records(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char a[4200], b[4200], out[4096], name[128], says[600];
    struct rt_buf all = {0};
    assert_ok(rt_file_read_all(files.lines, 1 << 24, &all, &err));
    const char *second = memchr(all.data, '\n', all.len);
    assert_non_null(second);
    snprintf(a, sizeof a, "%s/a.1", test_tmp("records"));
    snprintf(b, sizeof b, "%s/b.2", test_tmp("records"));
    snprintf(out, sizeof out, "%s/soft-0.5/", test_tmp("records"));
    assert_ok(rt_mkdirs(a, &err));
    assert_ok(rt_mkdirs(b, &err));
    rt_eval_name(a, name);
    assert_string_equal(name, "a.1"); /* a directory's */
    strcat(a, "/x.jsonl");
    strcat(b, "/x.jsonl");
    assert_ok(rt_publish_bytes(a, all.data, (size_t)(second + 1 - all.data), &err));
    assert_ok(rt_publish_bytes(b, second + 1, all.len - (size_t)(second + 1 - all.data), &err));
    rt_eval_name(a, name);
    assert_string_equal(name, "x");
    rt_eval_name("x-1.5", name);
    assert_string_equal(name, "x-1.5");
    assert_ok(train_command(ARGS("--student", files.student, "--data", files.shards, "--out", out, "--batch-tokens", "80", "--steps", "2",
                                 "--eval-data", a, "--eval-data", b, "--threads", "1"), 0, NULL, &err));
    struct rt_json *run = run_json(out, RT_RUN_FILE);
    assert_string_equal(rt_json_as_string(rt_json_get(run, "name"), NULL), "soft-0.5");
    rt_json_free(run);
    assert_int_equal(check_records(out, 4), 4);
    record(out, b, "1", NULL);
    record(out, a, "1", NULL);
    record(out, files.shards, "1", NULL);
    record(out, files.shards, "2", NULL);
    assert_int_equal(check_records(out, 4), 8);
    record(out, files.shards, "2", NULL);
    record(out, b, "1", NULL);
    assert_int_equal(check_records(out, 4), 8);
    bool there;
    assert_ok(rt_eval_recorded(out, 2, a, &there, &err));
    assert_true(there);
    assert_ok(rt_eval_recorded(out, 2, "elsewhere/x.jsonl", &there, &err));
    assert_false(there);
    char *text;
    record(out, files.shards, "3", &text);
    assert_non_null(strstr(text, "T = 3 is not stored (stored: 1, 2)"));
    snprintf(says, sizeof says, "warning: %s: the log-sum-exp at T = 3 is not stored", files.shards);
    assert_non_null(strstr(text, says));
    free(text);
    rt_buf_free(&all);
}

/* Batches below the longest sequence are said to grow; the rate of a step is the same number in log and metrics; --json prints the run's record, again
 * where it is finished already; data without anything to predict are told as that. */
static void test_told(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *out = test_tmp("run-told"), *bare = test_tmp("run-bare.jsonl");
    char printed[600], *log, rate[64];
    struct rt_json *v;
    snprintf(printed, sizeof printed, "%s", test_tmp("run-told.json"));
    for (int again = 0; again < 2; again++) {
        assert_ok(test_command_with(&rt_cmd_train, ARGS("--student", files.student, "--data", files.lines, "--batch-tokens", "5", "--micro-tokens", "6",
                                                        "--steps", "2", "--json", "--out", out),
                                    &(struct test_run){.prints = printed, .logged = &log}, &err));
        assert_non_null(strstr(log, "--batch-tokens 5: the longest sequence has "));
        assert_non_null(strstr(log, "--micro-tokens 6: the longest sequence has "));
        snprintf(rate, sizeof rate, "%.0f tokens/s", run_metric(out, 1, "tokens_per_second"));
        assert_true(again == 1 || strstr(strstr(log, "step 2/2"), rate) != NULL);
        free(log);
        int64_t steps = 0;
        v = run_json(test_tmp(""), "run-told.json");
        assert_ok(rt_json_int(v, "steps", 0, 10, &steps, &err));
        assert_int_equal(steps, 2);
        rt_json_free(v);
    }
    static const char line[] = "{\"input_ids\": [1, 2, 3], \"loss_mask\": [0, 0, 0]}\n";
    assert_ok(rt_publish_bytes(bare, line, strlen(line), &err));
    train_refused(ARGS("--student", files.student, "--data", bare, "--out", test_tmp("run-none")), RT_FORMAT, "no sequence is left: 1 without anything to predict");
}

/* Arms begin with the same parameters and see the same sequences in the same order; a second start finds everything done. */
static void test_experiment(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *out = test_tmp("run-experiment");
    struct rt_json *v[2];
    char path[600], *log;
    for (int again = 0; again < 2; again++) {
        assert_ok(test_command_logged(&rt_cmd_experiment, ARGS("--student", files.student, "--data", files.shards, "--arms", "hard,soft", "--seeds", "2",
                                                               "--kd-temperature", "2", "--steps", "3", "--batch-tokens", "60", "--lr", "1e-2",
                                                               "--eval-data", files.shards, "--out", out), 0, &log, &err));
        assert_true(again == 0 || strstr(log, "finished already") != NULL);
        free(log);
    }
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/arms/%s-seed1", out, i == 0 ? "hard" : "soft");
        v[i] = run_json(path, RT_RUN_FILE);
    }
    const char *a, *b;
    assert_ok(rt_json_string(v[0], "order_sha256", &a, &err));
    assert_ok(rt_json_string(v[1], "order_sha256", &b, &err));
    assert_string_equal(a, b);
    assert_ok(rt_json_string(rt_json_get(v[0], "init"), "sha256", &a, &err));
    assert_ok(rt_json_string(rt_json_get(v[1], "init"), "sha256", &b, &err));
    assert_string_equal(a, b);
    double ce = 1, kl = 0;
    assert_ok(rt_json_double(rt_json_get(v[1], "weights"), "ce", &ce, &err));
    assert_ok(rt_json_double(rt_json_get(v[1], "weights"), "kl", &kl, &err));
    assert_true(ce == 0 && kl == 1);
    rt_json_free(v[0]);
    rt_json_free(v[1]);
    v[0] = run_json(out, RT_EXPERIMENT_FILE);
    bool finished;
    assert_ok(rt_json_bool_or(v[0], "finished", false, &finished, &err));
    assert_true(finished);
    assert_int_equal(rt_json_len(rt_json_get(v[0], "arms")), 2);
    rt_json_free(v[0]);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup(test_refusals, set_up), cmocka_unit_test_setup(test_tail_warning, set_up), cmocka_unit_test_setup(test_mix, set_up),
    cmocka_unit_test_setup(test_recompute, set_up), cmocka_unit_test_setup(test_unsaved, set_up), cmocka_unit_test_setup(test_resume, set_up),
    cmocka_unit_test_setup(test_lines_and_shards, set_up), cmocka_unit_test_setup(test_told, set_up), cmocka_unit_test_setup(test_records, set_up),
    cmocka_unit_test_setup_teardown(test_experiment, set_up, tear_down),
};
RT_SUITE(train_run, tests)
