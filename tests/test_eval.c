/* Evaluation of a student: pass@k with its intervals, and losses and answers on the GPU. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "distill/eval_plan.h"
#include "distill/eval_run.h"
#include "tests/student_fixture.h"

enum { SAMPLES = 5, PROBLEMS = 6 };

static void pass_k_is_parsed(void **state)
{
    struct rt_err err = {0};
    struct rt_eval_sampling o = {.samples = 64};
    static const char *const bad[] = {"0", "65", "1,,8", "1,8x", "x", "-1", "1;8", "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17"};
    (void)state;
    assert_ok(rt_eval_parse_k("1,8,64", &o, &err));
    assert_int_equal(o.n_k, 3);
    assert_true(o.k[0] == 1 && o.k[1] == 8 && o.k[2] == 64);
    assert_ok(rt_eval_parse_k(NULL, &o, &err));
    assert_int_equal(o.n_k, 0);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_status(rt_eval_parse_k(bad[i], &o, &err), USAGE);
}

/* The first lines of a file of prompts. */
static const char *some_lines(const char *from, const char *name, int lines)
{
    char line[65536];
    const char *path = test_tmp(name);
    FILE *in = fopen(from, "r"), *out = fopen(path, "w");
    assert_true(in != NULL && out != NULL);
    for (int i = 0; i < lines && fgets(line, sizeof line, in) != NULL; i++)
        fputs(line, out);
    fclose(in);
    fclose(out);
    return path;
}

/* *line: members of eval.jsonl. */
static enum rt_status try_evaluate(const char *backend, const char *data, double temperature, struct rt_log *log, struct rt_json **line, struct rt_buf *rows,
                                   struct rt_err *why)
{
    enum rt_status st;
    struct rt_err err = {0};
    struct rt_loaded_student l = {0};
    struct rt_device d = {0};
    const struct rt_student_source source = {.student = "examples/tiny_student"};
    const int64_t memory = (int64_t)1 << 30;
    const struct rt_eval_run_options o = {.data = data, .T = 1, .memory = memory, .log = log,
                                          .sampling = {.samples = SAMPLES, .max_tokens = 10, .k = {1, 3}, .n_k = 2, .temperature = temperature, .top_p = 0.95,
                                                       .seed = 5, .memory = memory / 2}};
    assert_ok(rt_device_open(fx_backend(backend), &(struct rt_dev_options){.threads = 2}, &d, &err));
    assert_ok(rt_loaded_student_open(&l, &source, NULL, &err));
    assert_ok(rt_json_new_object(line, &err));
    rows->len = 0;
    st = rt_eval_run(&l, &d, &o, *line, rows, why);
    rt_loaded_student_close(&l);
    rt_device_close(&d);
    return st;
}

static void evaluate(const char *backend, const char *data, double temperature, struct rt_json **line, struct rt_buf *rows)
{
    struct rt_err err = {0};
    assert_ok(try_evaluate(backend, data, temperature, NULL, line, rows, &err));
}

static double number(const struct rt_json *v)
{
    double x;
    assert_true(rt_json_as_double(v, &x));
    return x;
}

/* pass@k of the line follows from the counts of each problem. */
static void check_answers(const struct rt_json *line, const struct rt_buf *rows)
{
    static const char *const keys[] = {"1", "3"};
    struct rt_err err = {0};
    double pass[2] = {0, 0}, limit = 0, tokens = 0, lo, hi;
    int n = 0;
    for (size_t at = 0; at < rows->len; n++) {
        struct rt_json *row = NULL;
        const char *end = memchr(rows->data + at, '\n', rows->len - at);
        assert_ok(rt_json_parse(rows->data + at, (size_t)(end - rows->data) - at, "rows", &row, &err));
        const int64_t correct = (int64_t)number(rt_json_get(row, "correct"));
        assert_true(number(rt_json_get(row, "samples")) == SAMPLES);
        pass[0] += rt_stats_pass_at_k(SAMPLES, correct, 1) / PROBLEMS;
        pass[1] += rt_stats_pass_at_k(SAMPLES, correct, 3) / PROBLEMS;
        limit += number(rt_json_get(row, "limit")) / (SAMPLES * PROBLEMS);
        tokens += number(rt_json_get(row, "tokens")) / (SAMPLES * PROBLEMS);
        rt_json_free(row);
        at = (size_t)(end - rows->data) + 1;
    }
    assert_int_equal(n, PROBLEMS);
    assert_true(number(rt_json_get(line, "n_problems")) == PROBLEMS && number(rt_json_get(line, "samples")) == SAMPLES);
    assert_true(fabs(number(rt_json_get(line, "pass1")) - pass[0]) < 1e-12);
    assert_true(fabs(number(rt_json_get(line, "limit_share")) - limit) < 1e-12);
    assert_true(fabs(number(rt_json_get(line, "mean_tokens")) - tokens) < 1e-9);
    for (int i = 0; i < 2; i++) {
        const struct rt_json *ci = rt_json_get(rt_json_get(line, "passk_ci"), keys[i]);
        const double mean = number(rt_json_get(rt_json_get(line, "passk"), keys[i]));
        lo = number(rt_json_at(ci, 0));
        hi = number(rt_json_at(ci, 1));
        assert_true(fabs(mean - pass[i]) < 1e-12);
        assert_true(lo <= mean && mean <= hi && lo >= 0 && hi <= 1);
    }
}

static void answers(void **state)
{
    struct rt_json *line = NULL;
    struct rt_buf rows = {0};
    const char *data = some_lines("examples/prompts/arithmetic_eval.jsonl", "eval-problems.jsonl", PROBLEMS);
    (void)state;
    evaluate(fx_backend("cpu") != NULL ? "cpu" : "ref", data, 0.6, &line, &rows);
    check_answers(line, &rows);
    rt_json_free(line);
    rt_buf_free(&rows);
}

static enum rt_status plan_of(const char *data, struct rt_eval_plan *p, struct rt_err *why)
{
    struct rt_err err = {0};
    struct rt_loaded_student l = {0};
    const struct rt_student_source source = {.student = "examples/tiny_student"};
    const struct rt_eval_run_options o = {.data = data, .T = 1, .sampling = {.samples = SAMPLES, .max_tokens = 10}};
    assert_ok(rt_loaded_student_open(&l, &source, NULL, &err));
    const enum rt_status st = rt_eval_make_plan(&l, &o, p, why);
    rt_loaded_student_close(&l);
    return st;
}

/* Problems that the student cannot hold are counted and said; where none is left, the error says so. */
static void too_long(void **state)
{
    struct rt_json *line = NULL;
    struct rt_buf rows = {0};
    struct rt_err err = {0};
    struct rt_log log;
    char *said = NULL;
    size_t n = 0;
    const char *backend = fx_backend("cpu") != NULL ? "cpu" : "ref", *data = some_lines("examples/prompts/arithmetic_eval.jsonl", "eval-some.jsonl", PROBLEMS),
               *all = test_tmp("eval-long.jsonl");
    (void)state;
    FILE *one = fopen(data, "a"), *two = fopen(all, "w");
    for (int i = 0; i < 2; i++) {
        FILE *f = i == 0 ? one : two;
        fputs("{\"prompt\":\"", f);
        for (int k = 0; k < 20000; k++)
            fputs("7 + ", f);
        fputs("?\",\"answer\":\"7\"}\n", f);
        fputs(i == 0 ? "{\"prompt\":\"none\"}\n" : "", f);
        fclose(f);
    }
    rt_log_init(&log, open_memstream(&said, &n), RT_LOG_INFO);
    assert_ok(try_evaluate(backend, data, 0.6, &log, &line, &rows, &err));
    check_answers(line, &rows);
    assert_true(number(rt_json_get(line, "n_dropped")) == 1);
    fclose(log.out);
    assert_non_null(strstr(said, "1 of 7 problems"));
    free(said);
    rt_json_free(line);
    line = NULL;
    struct rt_eval_plan p;
    assert_ok(plan_of(data, &p, &err));
    assert_true(p.prompts == PROBLEMS && p.dropped == 1 && p.samples == PROBLEMS * SAMPLES);
    assert_int_equal(plan_of(all, &p, &err), RT_USAGE);
    assert_non_null(strstr(err.msg, "too long"));
    rt_err_clear(&err);
    assert_int_equal(try_evaluate(backend, all, 0.6, NULL, &line, &rows, &err), RT_USAGE);
    assert_non_null(strstr(err.msg, "too long"));
    rt_json_free(line);
    rt_buf_free(&rows);
}

/* Losses as on the host, but for bfloat16; answers by the same rules, and the same again. */
static void on_the_gpu(void **state)
{
    struct rt_json *host = NULL, *gpu = NULL;
    struct rt_buf rows = {0}, again = {0};
    (void)state;
    if (fx_backend("cuda") == NULL)
        TEST_SKIP("no GPU");
    const char *text = some_lines("examples/prompts/almanac_eval.jsonl", "eval-text.jsonl", 3);
    evaluate(fx_backend("cpu") != NULL ? "cpu" : "ref", text, 0.6, &host, &rows);
    evaluate("cuda", text, 0.6, &gpu, &rows);
    const double want = number(rt_json_get(host, "ce")), got = number(rt_json_get(gpu, "ce"));
    print_message("    cross-entropy %.5f, on the host %.5f\n", got, want);
    assert_true(fabs(got - want) < 5e-3 * want); /* rounding of activations, over hundreds of tokens */
    rt_json_free(host);
    rt_json_free(gpu);
    const char *data = some_lines("examples/prompts/arithmetic_eval.jsonl", "eval-problems.jsonl", PROBLEMS);
    evaluate("cuda", data, 0.6, &gpu, &rows);
    check_answers(gpu, &rows);
    rt_json_free(gpu);
    evaluate("cuda", data, 0.6, &gpu, &again);
    assert_true(rows.len == again.len && memcmp(rows.data, again.data, rows.len) == 0);
    rt_json_free(gpu);
    rt_buf_free(&rows);
    rt_buf_free(&again);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(pass_k_is_parsed),
    cmocka_unit_test(answers),
    cmocka_unit_test(too_long),
    cmocka_unit_test(on_the_gpu),
};
RT_SUITE(eval, tests)
