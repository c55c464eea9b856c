/* What a training run asks of its data: the same ones to go on with, whole sets, weights that give something. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/run_record.h"
#include "student/describe.h"
#include "tests/train_command.h"

TF_FILES("data")

/* Shards whose making was cut off are used, and what is missing is said. */
static void test_unfinished_shards(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *shards = tf_write_shards("data-unfinished", files.data);
    char *log, path[600], *last = NULL;
    struct rt_buf b = tf_read(shards, "manifest.jsonl");
    assert_ok(rt_buf_puts(&b, "", &err));
    for (int i = 0; i < 2; i++) {
        assert_ok(train_command(ARGS("--student", files.student, "--data", shards, "--out", test_tmp("data-none"), "--dry-run", "--quiet"), 0, &log, &err));
        assert_true((strstr(log, "the set is unfinished") != NULL) == (i == 1));
        free(log);
        for (char *p = strstr(b.data, "\n{"); p != NULL; p = strstr(p + 1, "\n{"))
            last = p;
        assert_non_null(last);
        snprintf(path, sizeof path, "%s/manifest.jsonl", shards);
        assert_ok(rt_publish_bytes(path, b.data, (size_t)(last - b.data) + 1, &err));
    }
    rt_buf_free(&b);
}

/* Weights that are too low for a set are told, and refused where they leave no step at all. What run.json counts goes by the documents that tokens lie in. */
static void test_small_weights(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_loaded_student l = {0};
    const struct rt_student_source source = {files.student, NULL, NULL, NULL};
    char *log, a[600], b[600], says[700];
    const char *out = test_tmp("data-weights");
    double tokens = 0, squares = 0, flops;
    snprintf(a, sizeof a, "%s:0.05", files.shards); /* 0.6 of a sequence */
    snprintf(b, sizeof b, "%s:0.05", files.lines);
    train_refused(ARGS("--student", files.student, "--data", a, "--data", b, "--out", out), RT_USAGE, "no set gives a sequence");
    assert_false(rt_path_exists(out));
    assert_ok(train_command(ARGS("--student", files.student, "--data", files.shards, "--data", b, "--out", out, "--batch-tokens", "80"), 0, &log, &err));
    snprintf(says, sizeof says, "%s: the run takes no sequence of it: weight 0.05, 12 sequences, 1 epochs", files.lines);
    assert_non_null(strstr(log, says));
    free(log);
    for (int s = 0; s < TF_SEQS; s++) {
        tokens += (double)files.data->len[s];
        squares += (double)(files.data->len[s] * files.data->len[s]);
    }
    assert_ok(rt_loaded_student_open(&l, &source, NULL, &err));
    struct rt_json *run = run_json(out, RT_RUN_FILE);
    assert_ok(rt_json_double(run, "flops", &flops, &err));
    const double want = tokens * rt_student_flops_per_token(&l.c, &l.p, squares / tokens);
    assert_true(fabs(flops - want) < 1e-9 * want);
    rt_json_free(run);
    rt_loaded_student_close(&l);
}

/* Lays the files of a set over those of another. */
static void replace_set(const char *from, const char *to)
{
    static const char *const names[] = {"identity.json", "manifest.jsonl", "rows-000000.msgpack"};
    struct rt_err err = {0};
    char path[4096];
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        struct rt_buf b = tf_read(from, names[i]);
        assert_ok(rt_path_join(path, sizeof path, to, names[i], &err));
        assert_ok(rt_publish_bytes(path, b.data, b.len, &err));
        rt_buf_free(&b);
    }
}

/* Other rows or masks of the same tokens are other data, of training and of evaluation. A directory of before contents were kept goes on. */
static void test_changed_data(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *out = test_tmp("data-changed"), *shards, *lines, *eval;
    struct tf_data *data = malloc(sizeof *data);
    *data = *files.data;
    shards = tf_write_shards("data-changed-shards", data);
    lines = tf_write_lines("data-changed-lines.jsonl", data);
    eval = tf_write_lines("data-changed-eval.jsonl", data);
#define CHANGED "--student", files.student, "--data", shards, "--data", lines, "--eval-data", eval, "--w-kl", "0.5", "--batch-tokens", "80", \
    "--steps", "8", "--out", out
    assert_status(train_command(ARGS(CHANGED), 4, NULL, &err), INTERRUPTED);
    data->mask[2][data->len[2] - 1] = 0;
    tf_write_lines("data-changed-lines.jsonl", data);
    train_refused(ARGS(CHANGED), RT_REFUSED, "content_sha256.data 2: was ");
    tf_write_lines("data-changed-lines.jsonl", files.data);
    tf_write_lines("data-changed-eval.jsonl", data);
    train_refused(ARGS(CHANGED), RT_REFUSED, "content_sha256.eval-data 1: was ");
    tf_write_lines("data-changed-eval.jsonl", files.data);
    data->logits[5][TF_K - 1] -= 0.5f; /* the least of its row still */
    replace_set(tf_write_shards("data-changed-rows", data), shards);
    train_refused(ARGS(CHANGED), RT_REFUSED, "content_sha256.data 1: was ");
    *data = *files.data;
    strcpy(data->id.teacher_name, "moved"); /* the same rows */
    replace_set(tf_write_shards("data-changed-name", data), shards);
    assert_status(train_command(ARGS(CHANGED), 2, NULL, &err), INTERRUPTED);
    char path[600];
    struct rt_buf text = {0};
    struct rt_json *config = run_json(out, "config.json"), *old;
    assert_ok(rt_json_new_object(&old, &err));
    static const char *const kept[] = {"command", "options", "runtime", "order_sha256", "init_sha256"};
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++)
        assert_ok(rt_json_set_copy(old, kept[i], rt_json_get(config, kept[i]), &err));
    snprintf(path, sizeof path, "%s/config.json", out);
    assert_ok(rt_json_dump(old, 2, &text, &err));
    assert_ok(rt_publish_bytes(path, text.data, text.len, &err));
    assert_ok(train_command(ARGS(CHANGED), 0, NULL, &err));
#undef CHANGED
    rt_buf_free(&text);
    rt_json_free(config);
    rt_json_free(old);
    free(data);
}

/* Sums over the lines of metrics.jsonl from step `first` on: of key times count, and of count. *differs: some count is not the line's targets. */
static void sums_of(const char *run, int64_t first, const char *key, const char *count, double *sum, double *n, bool *differs)
{
    struct rt_err err = {0};
    struct rt_buf b = tf_read(run, "metrics.jsonl");
    char *save = NULL;
    *sum = *n = 0;
    for (char *p = strtok_r(b.data, "\n", &save); p != NULL; p = strtok_r(NULL, "\n", &save)) {
        struct rt_json *v;
        int64_t step, rows, targets;
        double x = 0;
        assert_ok(rt_json_parse(p, strlen(p), run, &v, &err));
        assert_ok(rt_json_int(v, "step", 1, 1000, &step, &err));
        assert_ok(rt_json_int(v, "targets", 1, 1000, &targets, &err));
        assert_ok(rt_json_int(v, count, 0, targets, &rows, &err));
        assert_true(rt_json_as_double(rt_json_get(v, key), &x) == (rows > 0));
        if (step >= first) {
            *sum += x * (double)rows;
            *n += (double)rows;
            *differs |= rows != targets;
        }
        rt_json_free(v);
    }
    rt_buf_free(&b);
}

/* The means at the end of a run are over the rows that each of them is of: with --ce rest, and where not every set has states, steps have few or none. */
static void test_final_means(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *out = test_tmp("data-final");
    static const char *const mean[][2] = {{"ce", "ce_rows"}, {"accuracy", "ce_rows"}, {"feature", "feature_rows"}, {"kl", "kl_rows"}, {"loss", "targets"}};
    double sum, n, final;
    assert_ok(train_command(ARGS("--student", files.student, "--data", files.shards, "--data", files.lines, "--w-kl", "0.5", "--ce", "rest",
                         "--w-feature", "0.1", "--layer-map", "1:1", "--kd-temperature", "2", "--batch-tokens", "40",
                         "--steps", "40", "--lr", "1e-2", "--out", out), 0, NULL, &err));
    struct rt_json *run = run_json(out, RT_RUN_FILE);
    for (size_t i = 0; i < sizeof mean / sizeof mean[0]; i++) {
        bool differs = false;
        sums_of(out, 37, mean[i][0], mean[i][1], &sum, &n, &differs);
        assert_true(differs == (strcmp(mean[i][1], "targets") != 0));
        assert_ok(rt_json_double(rt_json_get(run, "final"), mean[i][0], &final, &err));
        assert_true(n > 0 && fabs(final - sum / n) <= 1e-12 * fabs(final));
    }
    rt_json_free(run);
}

/* A finished run of whose model a part is gone makes it again. */
static void test_model_gone(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *out = test_tmp("data-gone");
    static const char *const parts[] = {"model/model.safetensors", "model/config.json"};
    char *log, path[600];
#define GONE ARGS("--student", files.student, "--data", files.shards, "--batch-tokens", "80", "--steps", "3", "--out", out)
    assert_ok(train_command(GONE, 0, NULL, &err));
    struct rt_buf whole = tf_read(out, parts[0]), again;
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", out, parts[i]);
        assert_int_equal(remove(path), 0);
        assert_ok(train_command(GONE, 0, &log, &err));
        assert_non_null(strstr(log, "its model is gone"));
        free(log);
        again = tf_read(out, parts[0]);
        assert_true(rt_path_exists(path) && again.len == whole.len && memcmp(again.data, whole.data, whole.len) == 0);
        rt_buf_free(&again);
    }
    assert_ok(train_command(GONE, 0, &log, &err));
    assert_non_null(strstr(log, "finished already"));
#undef GONE
    free(log);
    rt_buf_free(&whole);
}

/* What the data take counts in --memory: lines, which are all kept, are refused where there is no room for them. */
static void test_lines_in_memory(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *out = test_tmp("data-none"), *many = test_tmp("data-many.jsonl");
    struct rt_buf b = {0};
    for (int i = 0; i < 4000; i++)
        assert_ok(rt_buf_printf(&b, &err, "{\"input_ids\": [%d, %d, 3]}\n", i % 61, i / 61 % 61));
    assert_ok(rt_publish_bytes(many, b.data, b.len, &err));
    rt_buf_free(&b);
    assert_ok(train_command(ARGS("--student", files.student, "--data", files.lines, "--out", out, "--dry-run", "--memory", "2M", "--threads", "1"), 0, NULL, &err));
    train_refused(ARGS("--student", files.student, "--data", many, "--out", out, "--dry-run", "--memory", "2M", "--threads", "1"), RT_NOMEM, "training needs");
    assert_ok(train_command(ARGS("--student", files.student, "--data", many, "--out", out, "--dry-run", "--memory", "6M", "--threads", "1"), 0, NULL, &err));
}

/* Of shards, `decoded` bytes of cache are what keeps every sequence, and no less. */
static void test_decoded_bytes(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_model_dir none = {0};
    for (int f = 0; f < 2; f++)
        for (int less = 0; less < 2; less++) {
            struct rt_train_set *set = NULL;
            const struct rt_train_set_options o = {.model = &none, .vocab = 61, .max_length = 64, .features = f != 0};
            struct rt_rows r, first[TF_SEQS];
            int kept = 0;
            assert_ok(rt_train_set_open(files.shards, &o, NULL, &set, &err));
            const struct rt_train_info *info = rt_train_set_info(set);
            assert_true(info->held >= TF_SEQS * sizeof(struct rt_seq_info));
            rt_train_set_cache(set, info->decoded - (size_t)less);
            for (int i = 0; i < TF_SEQS; i++)
                assert_ok(rt_train_set_get(set, i, &first[i], &err));
            for (int i = 0; i < TF_SEQS; i++) {
                assert_ok(rt_train_set_get(set, i, &r, &err));
                kept += r.ids == first[i].ids && r.text == NULL && r.next_id == NULL;
            }
            assert_int_equal(kept, TF_SEQS - less);
            rt_train_set_free(set);
        }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup(test_lines_in_memory, set_up), cmocka_unit_test_setup(test_decoded_bytes, set_up),
    cmocka_unit_test_setup(test_model_gone, set_up),
    cmocka_unit_test_setup(test_final_means, set_up),
    cmocka_unit_test_setup(test_unfinished_shards, set_up), cmocka_unit_test_setup(test_small_weights, set_up),
    cmocka_unit_test_setup_teardown(test_changed_data, set_up, tear_down),
};
RT_SUITE(train_data, tests)
