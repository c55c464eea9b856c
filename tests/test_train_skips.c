/* Steps that are left out: losses that are no numbers, spikes of the gradient, and what a run says and leaves then. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/run_record.h"
#include "student/save.h"
#include "tests/train_command.h"

TF_FILES("skips")

/* A learning rate that bursts everything: skipped steps end the run, --on-nan stop at once; the good checkpoint stays. */
static void test_nan(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_ckpt at;
    const char *out = test_tmp("run-nan");
    char *log;
    const char *const argv[] = {"--student", files.student, "--data", files.shards, "--batch-tokens", "80", "--steps", "30", "--lr", "10", "--eps", "1e-20", "--clip", "0",
                                "--schedule", "constant", "--warmup", "0", "--save-every", "1", "--weight-decay", "10", "--beta1", "0", "--out", out, NULL};
    const enum rt_status st = train_command(argv, 0, &log, &err);
    /* weights grow by a factor of 99 a step until a product overflows */
    assert_int_equal(st, RT_NUMERIC);
    assert_non_null(strstr(log, "left out"));
    assert_non_null(strstr(err.msg, "in a row"));
    rt_err_clear(&err);
    free(log);
    assert_ok(rt_ckpt_latest(out, NULL, &at, &err));
    assert_true(at.step >= 1);
    const char *const stop_argv[] = {"--student", files.student, "--data", files.shards, "--batch-tokens", "80", "--steps", "30", "--lr", "10", "--eps", "1e-20", "--clip", "0",
                                     "--schedule", "constant", "--warmup", "0", "--save-every", "1", "--weight-decay", "10", "--beta1", "0", "--out",
                                     test_tmp("run-nan-stop"), "--on-nan", "stop", NULL};
    assert_int_equal(train_command(stop_argv, 0, NULL, &err), RT_NUMERIC);
    assert_non_null(strstr(err.msg, "key "));
    assert_non_null(strstr(err.msg, "the checkpoint of step "));
}

/* A student whose losses are no numbers learns nothing: a run of few steps, or of many, ends with an error, and nothing looks like a model. */
static void test_all_skipped(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f;
    struct rt_ckpt at;
    const float nan_value = NAN;
    const char *student = test_tmp("run-nan-student"), *out = test_tmp("run-skipped"), *at_once = test_tmp("run-skipped-stop");
    char path[4096], *log;
    tf_open(&f, &rt_backend_ref, 1, TF_TIED, 0.2f);
    assert_ok(rt_param_upload(&f.d, rt_student_block(f.s), &f.p.at[0], 0, 1, &nan_value, &err));
    for (int64_t i = 1; i < f.p.at[0].rows; i++) /* every row of the embeddings, so that every sequence meets it */
        assert_ok(rt_param_upload(&f.d, rt_student_block(f.s), &f.p.at[0], i * f.p.at[0].cols, 1, &nan_value, &err));
    const struct rt_student_save o = {.dtype = RT_F32};
    assert_ok(rt_student_save(f.s, &o, student, &err));
    tf_close(&f);
    for (int again = 0; again < 2; again++) { /* and again from what it left */
        assert_int_equal(train_command(ARGS("--student", student, "--data", files.lines, "--batch-tokens", "60", "--steps", "2", "--save-every", "1", "--out", out), 0,
                               &log, &err), RT_NUMERIC);
        assert_non_null(strstr(err.msg, "all of 2 steps were left out"));
        assert_non_null(strstr(err.msg, "no checkpoint had been saved"));
        assert_null(strstr(log, "finished"));
        assert_null(strstr(log, "steps clipped"));
        free(log);
        rt_err_clear(&err);
    }
    snprintf(path, sizeof path, "%s/" RT_MODEL_DIR, out);
    assert_false(rt_path_exists(path));
    assert_ok(rt_ckpt_latest(out, NULL, &at, &err));
    assert_int_equal(at.step, -1);
    assert_int_equal(train_command(ARGS("--student", student, "--data", files.lines, "--batch-tokens", "60", "--steps", "30", "--save-every", "1", "--out",
                                test_tmp("run-skipped-ten")), 0, NULL, &err), RT_NUMERIC);
    assert_non_null(strstr(err.msg, "all of 10 steps were left out"));
    rt_err_clear(&err);
    assert_int_equal(train_command(ARGS("--student", student, "--data", files.lines, "--batch-tokens", "60", "--on-nan", "stop", "--out", at_once), 0, NULL, &err),
                     RT_NUMERIC);
    assert_non_null(strstr(err.msg, "no checkpoint had been saved"));
}

/* A spike of the gradient stops a run that is to stop, with the batch named and the checkpoint before it kept; another goes on and records it. What
 * every line of the metrics holds. */
static void test_spike(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_ckpt at;
    const char *out = test_tmp("run-spike");
    char *log;
    static const char *const keys[] = {"loss", "ce", "kl", "teacher_mass", "student_mass", "agreement", "grad_norm", "clipped_steps", "lr", "tokens_per_second",
                                       "memory", "seconds_left", "data_wait"};
    /* after ten steps every norm is above a thousandth of the mean */
    const enum rt_status st = train_command(ARGS("--student", files.student, "--data", files.shards, "--batch-tokens", "80", "--steps", "30", "--w-kl", "1", "--kd-temperature", "2",
                                         "--save-every", "5", "--max-grad-spike", "0.001", "--on-nan", "stop", "--out", out), 0, NULL, &err);
    assert_int_equal(st, RT_NUMERIC);
    assert_non_null(strstr(err.msg, "step 11: "));
    assert_non_null(strstr(err.msg, "times its mean so far"));
    assert_non_null(strstr(err.msg, "key "));
    rt_err_clear(&err);
    assert_ok(rt_ckpt_latest(out, NULL, &at, &err));
    assert_int_equal(at.step, 10);
    /* as it advises: the other way, from there */
    assert_status(train_command(ARGS("--student", files.student, "--data", files.shards, "--batch-tokens", "80", "--steps", "30", "--w-kl", "1",
                             "--kd-temperature", "2", "--save-every", "5", "--max-grad-spike", "0.001", "--out", out), 0, &log, &err), NUMERIC);
    assert_non_null(strstr(log, "going on from step 10"));
    free(log);
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if (!(run_metric(out, 9, keys[i]) >= 0))
            fail_msg("metrics.jsonl: %s is %g", keys[i], run_metric(out, 9, keys[i]));
    assert_true(isnan(run_metric(out, 9, "mfu"))); /* no peak is known for a CPU */
    struct rt_buf b = tf_read(out, "metrics.jsonl");
    assert_true(b.len > 0 && rt_buf_puts(&b, "", &err) == RT_OK);
    assert_non_null(strstr(b.data, "\"spike\":true"));
    assert_non_null(strstr(b.data, "\"sequences\":["));
    rt_buf_free(&b);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup(test_nan, set_up), cmocka_unit_test_setup(test_all_skipped, set_up),
    cmocka_unit_test_setup_teardown(test_spike, set_up, tear_down),
};
RT_SUITE(train_skips, tests)
