/* `retort logits` over windows: how the input is cut into them, several devices, parts and their manifests. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/dtype.h"
#include "core/io.h"
#include "core/mem.h"
#include "distill/corpus.h"
#include "distill/logits.h"
#include "formats/safetensors.h"
#include "formats/shard.h"
#include "tests/run_command.h"
#include "tests/suite.h"

#define CASES "tests/data/cases/"

static const int lengths[] = {9, 3, 16, 8, 7, 12, 2, 2, 15, 4, 4, 4, 11, 6, 5, 13};
enum { LINES = sizeof lengths / sizeof *lengths };

/* Lines of so many ids each; the path stays. */
static const char *ids_file(void)
{
    static char path[512];
    struct rt_buf text = {0};
    struct rt_err err = {0};
    for (int i = 0; i < LINES; i++) {
        assert_ok(rt_buf_puts(&text, "{\"input_ids\": [", &err));
        for (int j = 0; j < lengths[i]; j++)
            assert_ok(rt_buf_printf(&text, &err, "%s%d", j > 0 ? ", " : "", (i * 13 + j * j + 1) % 96));
        assert_ok(rt_buf_puts(&text, "]}\n", &err));
    }
    snprintf(path, sizeof path, "%s", test_tmp("logits-run.jsonl"));
    assert_ok(rt_publish_bytes(path, text.data, text.len, &err));
    rt_buf_free(&text);
    return path;
}

/* ---- windows ---- */

/* The least number of windows of a size that runs of the input can be cut into, by trying every cut. */
static int64_t fewest(int from, int64_t window)
{
    int64_t best = from < LINES ? INT64_MAX - 1 : 0, sum = 0;
    for (int to = from; to < LINES && (sum += lengths[to]) <= window; to++) {
        const int64_t rest = 1 + fewest(to + 1, window);
        best = rest < best ? rest : best;
    }
    return best;
}

static struct rt_corpus *open_corpus(const char *data, int n_parts, struct rt_corpus_survey *survey)
{
    static const struct rt_model_dir model = {0};
    struct rt_err err = {0};
    struct rt_corpus *c;
    const struct rt_corpus_options o = {.data = data, .model = &model, .n_ids = 96, .max_length = 64, .n_parts = n_parts};
    assert_ok(rt_corpus_open(&o, &c, &err));
    assert_ok(rt_corpus_survey(c, survey, &err));
    return c;
}

static void windows_are_as_few_as_can_be_and_even(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_corpus_survey survey;
    struct rt_corpus_window w = {0};
    struct rt_corpus *c = open_corpus(ids_file(), 1, &survey);
    assert_int_equal(survey.sequences, LINES);
    for (int64_t tokens = 16; tokens <= survey.tokens; tokens += 3) {
        const int64_t n = rt_corpus_windows(c, tokens), even = rt_corpus_even_window(c, tokens);
        assert_int_equal(n, fewest(0, tokens));
        assert_true(even <= tokens);
        assert_int_equal(rt_corpus_windows(c, even), n);
        if (even > survey.longest)
            assert_true(rt_corpus_windows(c, even - 1) > n);
    }
    /* as they come: in input order, none too large, as many as were counted */
    int64_t seen = 0, windows = 0;
    for (;; windows++) {
        assert_ok(rt_corpus_next(c, 20, &w, &err));
        if (w.n == 0)
            break;
        int64_t sum = 0;
        for (int64_t i = 0; i < w.n; i++, seen++) {
            assert_int_equal(w.seqs[i].n_tokens, lengths[seen]);
            assert_int_equal(w.seqs[i].source_line, seen + 1);
            sum += lengths[seen];
        }
        assert_int_equal(sum, w.tokens);
        assert_true(sum <= 20);
    }
    assert_int_equal(seen, LINES);
    assert_int_equal(windows, rt_corpus_windows(c, 20));
    rt_corpus_window_free(&w);
    rt_corpus_close(c);
}

/* The file is written over between the survey and the windows. */
static void a_corpus_that_changes_is_noticed(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_corpus_survey survey;
    struct rt_corpus_window w = {0};
    const char *path = test_tmp("written-over.jsonl");
    static const char *const text[] = {"{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5, 6]}\n", "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5, 7]}\n"};
    assert_ok(rt_publish_bytes(path, text[0], strlen(text[0]), &err));
    struct rt_corpus *c = open_corpus(path, 2, &survey);
    FILE *f = fopen(path, "r+");
    fputs(text[1], f);
    fclose(f);
    assert_int_equal(rt_corpus_next(c, 20, &w, &err), RT_REFUSED);
    assert_non_null(strstr(err.msg, "changed while it was read"));
    rt_err_clear(&err);
    f = fopen(path, "r+");
    fputs(text[0], f);
    fclose(f);
    rt_corpus_close(c);
    c = open_corpus(path, 2, &survey);
    for (int i = 0; i < 3; i++) { /* and again behind the end */
        assert_ok(rt_corpus_next(c, 20, &w, &err));
        assert_int_equal(w.n, i == 0);
    }
    rt_corpus_window_free(&w);
    rt_corpus_close(c);
}

/* ---- devices ---- */

/* more: behind these, and so instead of those given again. */
static enum rt_status logits(const char *out, const char *const *more, struct rt_err *err)
{
    const char *args[40] = {"--teacher", CASES "v3_fp8", "--data", ids_file(), "--out", out, "--cache", "topk=4", "--features", "1,final:128",
                            "--rows-per-shard", "20", "--memory", "400M", "--device", "cpu"};
    int n = 16;
    for (; more != NULL && *more != NULL; more++)
        args[n++] = *more;
    args[n] = NULL;
    return test_command(&rt_cmd_logits, args, err);
}

static void assert_same_set(const char *a, const char *b)
{
    char cmd[2200];
    snprintf(cmd, sizeof cmd, "diff -r -x .lock -x logits.json '%s' '%s'", a, b);
    assert_int_equal(system(cmd), 0);
}

/* Windows shared out to two and three devices give the set of one, with states of windows kept or not. */
static void devices_share_windows(void **state)
{
    (void)state;
    static const char *const runs[][10] = {
        {"--window", "20", "--threads", "2", NULL},
        {"--window", "20", "--gpus", "2", "--threads", "2", NULL},
        {"--window", "20", "--gpus", "3", "--threads", "4", "--save-state", "layer", NULL},
        {"--window", "20", "--gpus", "5", "--threads", "1", "--save-state", "never", NULL}, /* the last round has fewer windows */
    };
    struct rt_err err = {0};
    char first[512];
    snprintf(first, sizeof first, "%s", test_tmp("gpus-0"));
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        char name[32], out[512];
        snprintf(name, sizeof name, "gpus-%zu", i);
        snprintf(out, sizeof out, "%s", test_tmp(name));
        assert_ok(logits(out, runs[i], &err));
        if (i > 0)
            assert_same_set(first, out);
    }
}

/* One device's error ends all of them, and is the one that is told. */
static void an_error_on_one_device_stops_all(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char cmd[2200], dir[512], out[512];
    snprintf(dir, sizeof dir, "%s", test_tmp("gpus-bad-teacher"));
    snprintf(out, sizeof out, "%s", test_tmp("gpus-bad"));
    snprintf(cmd, sizeof cmd, "mkdir -p '%s' && cp '%s'/* '%s'/ && rm '%s'/expected.safetensors", dir, test_data(CASES "v3_fp8"), dir, dir);
    assert_int_equal(system(cmd), 0);
    struct rt_tensors *ts;
    assert_ok(rt_tensors_open(dir, &ts, &err));
    const struct rt_tensor *t = rt_tensors_find(ts, "model.layers.1.input_layernorm.weight");
    FILE *f = fopen(rt_tensors_file(ts, t->file), "r+b");
    fseek(f, (long)t->offset, SEEK_SET);
    fwrite("\xc0\x7f", 1, 2, f); /* a BF16 NaN */
    fclose(f);
    rt_tensors_free(ts);
    const char *args[] = {"--teacher", dir, "--data", ids_file(), "--out", out, "--window", "20", "--gpus", "3", "--device", "cpu", "--memory", "400M", "--save-state", "layer", NULL};
    assert_int_equal(test_command(&rt_cmd_logits, args, &err), RT_NUMERIC);
    assert_non_null(strstr(err.msg, "damaged tensor model.layers.1.input_layernorm.weight"));
    rt_err_clear(&err);
    /* the states before that layer are kept: of the first round's windows */
    snprintf(cmd, sizeof cmd, "test -s '%s'/.window-000000/state", out);
    assert_int_equal(system(cmd), 0);
}

/* What the device's head cannot do is said before the layers, not behind them. */
static void the_head_is_asked_first(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_logits_lane lane = {0};
    struct rt_logits_job j = {.lane = &lane, .lanes = 1, .config = {.hidden = 64}, .so = {.n_ids = 20000, .n_lse = 1, .lse_temperature = {1}}};
    const struct rt_dev_options o = {.threads = 1};
    assert_ok(rt_backend_select("cpu", NULL, 0, &lane.device.be, &err));
    assert_ok(rt_device_open(lane.device.be, &o, &lane.device, &err));
    j.so.top_k = 8192;
    assert_ok(rt_logits_check_head(&j, &err));
    j.so.top_k = 8193;
    assert_int_equal(rt_logits_check_head(&j, &err), RT_USAGE);
    assert_non_null(strstr(err.msg, "--cache topk=8193: cpu cannot keep so many"));
    assert_non_null(strstr(err.msg, "at most 8192"));
    rt_device_close(&lane.device);
}

/* Rows without entries say of the realised token, and of the sums, what rows with entries do. */
static void features_alone_have_whole_rows(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_shard_set *set[2];
    struct rt_rows a, b;
    char with[512], without[512];
    snprintf(with, sizeof with, "%s", test_tmp("alone-with"));
    snprintf(without, sizeof without, "%s", test_tmp("alone-without"));
    assert_ok(logits(with, (const char *const[]){"--lse", "0.5,1", NULL}, &err));
    assert_ok(logits(without, (const char *const[]){"--lse", "0.5,1", "--cache", "topk=0", NULL}, &err));
    assert_ok(rt_shard_set_open(with, &set[0], &err));
    assert_ok(rt_shard_set_open(without, &set[1], &err));
    assert_int_equal(rt_shard_set_info(set[1])->sequences, LINES);
    assert_true(rt_shard_set_info(set[1])->nll > 1);
    for (int64_t i = 0; i < LINES; i++) {
        assert_ok(rt_shard_set_get(set[0], i, &a, &err));
        assert_ok(rt_shard_set_get(set[1], i, &b, &err));
        assert_int_equal(b.k, 0);
        assert_int_equal(a.n_rows, b.n_rows);
        assert_memory_equal(a.lse, b.lse, (size_t)(2 * a.n_rows) * sizeof *a.lse);
        assert_memory_equal(a.next_logprob, b.next_logprob, (size_t)a.n_rows * sizeof *a.next_logprob);
        assert_memory_equal(a.next_rank, b.next_rank, (size_t)a.n_rows * sizeof *a.next_rank);
    }
    rt_shard_set_free(set[0]);
    rt_shard_set_free(set[1]);
}

/* Whole final states without entries are a dense set: the teacher's head lies beside them, and gives the realised logits. */
static void dense_sets_have_their_head(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_shard_set *set;
    struct rt_tensors *t;
    struct rt_rows r;
    char out[512], path[600];
    snprintf(out, sizeof out, "%s", test_tmp("dense"));
    assert_ok(logits(out, (const char *const[]){"--cache", "topk=0", "--features", "final", "--rows-per-shard", "0", NULL}, &err));
    snprintf(path, sizeof path, "%s/head.safetensors", out);
    assert_ok(rt_tensors_open(path, &t, &err));
    assert_ok(rt_shard_set_open(out, &set, &err));
    assert_ok(rt_shard_set_get(set, 0, &r, &err));
    const struct rt_tensor *head = rt_tensors_find(t, "lm_head.weight");
    const int64_t H = head->ne[1];
    float w[1024], x[1024];
    assert_true(H <= 1024 && head->ne[0] == rt_shard_set_identity(set)->vocab_size);
    for (int64_t i = 0; i < r.n_rows; i++) {
        double z = 0;
        assert_ok(rt_tensors_read_f32(t, head, r.next_id[i] * H, H, w, &err));
        assert_true(rt_to_f32(x, (const uint16_t *)r.feature[0] + r.position[i] * H, RT_BF16, H));
        for (int64_t c = 0; c < H; c++)
            z += (double)w[c] * x[c];
        assert_true(fabs(z - r.lse[i] - r.next_logprob[i]) < 0.05); /* states are rounded to BF16 */
    }
    rt_shard_set_free(set);
    rt_tensors_free(t);
}

/* ---- parts ---- */

static void parts_merge_and_a_missing_one_is_named(void **state)
{
    (void)state;
    static const char *const parts[] = {"0/3", "1/3", "2/3"};
    struct rt_err err = {0};
    struct rt_shard_set *set;
    char one[512], merged[512], cmd[2200];
    snprintf(one, sizeof one, "%s", test_tmp("parts-one"));
    snprintf(merged, sizeof merged, "%s", test_tmp("parts-merged"));
    assert_ok(logits(one, (const char *const[]){"--window", "20", NULL}, &err));
    for (int i = 2; i >= 0; i--) {
        char name[32], out[512];
        snprintf(name, sizeof name, "parts-%d", i);
        snprintf(out, sizeof out, "%s", test_tmp(name));
        assert_ok(logits(out, (const char *const[]){"--window", "20", "--part", parts[i], NULL}, &err));
        snprintf(cmd, sizeof cmd, "mkdir -p '%s' && cp -r '%s'/* '%s'/", merged, out, merged);
        assert_int_equal(system(cmd), 0);
        assert_ok(rt_shard_set_open(merged, &set, &err));
        const struct rt_shard_info *info = rt_shard_set_info(set);
        static const char *const missing[] = {"", "part 0 of 3 is missing", "part 0 of 3 is missing, part 1 is missing"};
        assert_string_equal(info->missing, missing[i]);
        assert_int_equal(info->finished, i == 0);
        rt_shard_set_free(set);
    }
    struct rt_shard_set *whole;
    assert_ok(rt_shard_set_open(merged, &set, &err));
    assert_ok(rt_shard_set_open(one, &whole, &err));
    assert_int_equal(rt_shard_set_info(set)->sequences, LINES);
    assert_int_equal(rt_shard_set_info(set)->rows, rt_shard_set_info(whole)->rows);
    snprintf(cmd, sizeof cmd, "sed -i '$d' '%s/manifest-0001-of-0003.jsonl'", merged);
    assert_int_equal(system(cmd), 0);
    rt_shard_set_free(set);
    assert_ok(rt_shard_set_open(merged, &set, &err));
    assert_string_equal(rt_shard_set_info(set)->missing, "part 1 of 3 is unfinished");
    rt_shard_set_free(set);
    rt_shard_set_free(whole);
}

/* Two inputs of the same ids: what is a target is a part of what the data are. */
static void other_targets_are_other_data(void **state)
{
    (void)state;
    static const char *const mask[] = {"0, 0, 1, 1", "0, 1, 1, 1"};
    struct rt_err err = {0};
    char data[512], out[512], text[600];
    const char *const more[] = {"--data", data, "--features", "", NULL}; /* rows alone */
    snprintf(data, sizeof data, "%s", test_tmp("masked.jsonl"));
    snprintf(out, sizeof out, "%s", test_tmp("masked"));
    for (int i = 0; i < 2; i++) {
        snprintf(text, sizeof text, "{\"input_ids\": [1, 2, 3, 4], \"loss_mask\": [%s]}\n", mask[i]);
        assert_ok(rt_publish_bytes(data, text, strlen(text), &err));
        if (i == 0)
            assert_ok(logits(out, more, &err));
        else
            assert_int_equal(logits(out, more, &err), RT_REFUSED);
    }
    assert_non_null(strstr(err.msg, "input_sha256"));
    rt_err_clear(&err);
    /* nor without the file that tells */
    snprintf(text, sizeof text, "%s/logits.json", out);
    assert_int_equal(remove(text), 0);
    assert_int_equal(logits(out, more, &err), RT_REFUSED);
    assert_non_null(strstr(err.msg, "logits.json, which says"));
}

/* Parts that were cut from different inputs are no set. */
static void parts_are_of_one_input(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char out[512], other[512], cmd[2200];
    snprintf(out, sizeof out, "%s", test_tmp("parts-mixed"));
    snprintf(other, sizeof other, "%s", test_tmp("parts-other"));
    assert_ok(logits(out, (const char *const[]){"--part", "0/2", NULL}, &err));
    assert_int_equal(logits(out, (const char *const[]){"--part", "1/2", "--max-length", "9", "--overlong", "split", NULL}, &err), RT_REFUSED);
    assert_non_null(strstr(err.msg, "logits-0-of-2.json: made of other data"));
    rt_err_clear(&err);
    assert_ok(logits(other, (const char *const[]){"--part", "1/2", NULL}, &err));
    snprintf(cmd, sizeof cmd, "cp '%s'/*1-of-2* '%s'/*1-of-0002* '%s'/", other, other, out);
    assert_int_equal(system(cmd), 0);
    assert_ok(rt_logits_parts_agree(out, 2, NULL, &err));
    snprintf(cmd, sizeof cmd, "sed -i 's/\"input_sha256\": \"..../\"input_sha256\": \"aaaa/' '%s/logits-1-of-2.json'", out);
    assert_int_equal(system(cmd), 0);
    const char *args[] = {"--shards", out, "--device", "cpu", NULL};
    assert_int_equal(test_command(&rt_cmd_doctor, args, &err), RT_REFUSED);
    rt_err_clear(&err);
    assert_status(rt_logits_parts_agree(out, 2, NULL, &err), REFUSED);
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(windows_are_as_few_as_can_be_and_even), cmocka_unit_test(a_corpus_that_changes_is_noticed),
                                          cmocka_unit_test(devices_share_windows),
                                          cmocka_unit_test(an_error_on_one_device_stops_all),
                                          cmocka_unit_test(the_head_is_asked_first), cmocka_unit_test(features_alone_have_whole_rows),
                                          cmocka_unit_test(dense_sets_have_their_head), cmocka_unit_test(parts_merge_and_a_missing_one_is_named),
                                          cmocka_unit_test(other_targets_are_other_data), cmocka_unit_test(parts_are_of_one_input)};
RT_SUITE(logits_run, tests)
