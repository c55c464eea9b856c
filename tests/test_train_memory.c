/* How steps are cut: which of two plans costs less, and what is advised where none fits. Wall times of these plans on a GPU are bench_student_train's. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/run_record.h"
#include "tests/train_command.h"

/* Qwen2.5-1.5B and 0.5B. */
#define QWEN(hidden, intermediate, layers, heads) \
    "{\"model_type\": \"qwen2\", \"vocab_size\": 151936, \"hidden_size\": " hidden ", \"intermediate_size\": " intermediate ", \"num_hidden_layers\": " layers \
    ", \"num_attention_heads\": " heads ", \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, " \
    "\"tie_word_embeddings\": true, \"rope_theta\": 1000000.0}"
static const char qwen[] = QWEN("1536", "8960", "28", "12"), small[] = QWEN("896", "4864", "24", "14");

struct costs {
    struct rt_student_config c;
    struct rt_params p;
    bool gpu;
};

static double cost(const struct costs *k, int64_t micro, int level, double gib)
{
    const struct rt_train_cuts x = {micro, level, 0, (size_t)(gib * (1 << 30))};
    return rt_train_cuts_cost(&k->c, &k->p, 2048, k->gpu, &x);
}

static void costs_open(struct costs *k, const char *config)
{
    struct rt_err err = {0};
    *k = (struct costs){.gpu = true};
    assert_ok(rt_student_config_parse(config, strlen(config), "qwen", &k->c, &err));
    assert_ok(rt_params_create(&k->c, &k->p, &err));
}

static void costs_close(struct costs *k)
{
    rt_params_free(&k->p);
    rt_student_config_free(&k->c);
}

static void test_cost(void **state)
{
    struct costs k;
    (void)state;
    costs_open(&k, qwen);
    for (int gpu = 0; gpu < 2; gpu++) {
        k.gpu = gpu == 1;
        for (int level = 0; level < 3; level++)
            assert_true(cost(&k, 8192, level, 6) < cost(&k, 8192, level + 1, 6));
        for (int64_t m = 32768; m > 512; m /= 2)
            assert_true(cost(&k, m, 1, 6) < cost(&k, m / 2, 1, 6));
    }
    assert_true(cost(&k, 16384, 0, 1) > cost(&k, 16384, 0, 3) && cost(&k, 16384, 0, 3) > cost(&k, 16384, 0, 6));
    /* gate and up again are 15 % of a step's products, what level 1 writes again 1.2 %, half the micro-batch 1.1 % at 8,192 tokens, a quarter 3.4 % */
    assert_true(cost(&k, 8192, 1, 3) < cost(&k, 16384, 2, 6) && cost(&k, 8192, 0, 6) < cost(&k, 16384, 1, 6) && cost(&k, 16384, 1, 6) < cost(&k, 4096, 0, 6));
    assert_true(cost(&k, 512, 2, 6) > cost(&k, 16384, 3, 6)); /* micro-batches of 512 would be the worst of all */
    for (int level = 1; level < 4; level++) { /* layers a level below: from one level's cost to the other's in equal parts */
        const double below = cost(&k, 8192, level - 1, 6), whole = cost(&k, 8192, level, 6);
        for (int less = 0; less <= k.c.layers; less++) {
            const struct rt_train_cuts x = {8192, level, less, (size_t)6 << 30};
            const double mixed = rt_train_cuts_cost(&k.c, &k.p, 2048, k.gpu, &x), want = whole + (below - whole) * less / k.c.layers;
            assert_true(mixed > want * (1 - 1e-12) && mixed < want * (1 + 1e-12));
        }
    }
    costs_close(&k);
    costs_open(&k, small); /* half the micro-batch 5 %, what level 1 writes again and the logits in two parts 2.7 % */
    assert_true(cost(&k, 16384, 1, 3) < cost(&k, 8192, 0, 6));
    costs_close(&k);
}

/* The number behind a word of the error; -1: it is not there. */
static long advised(const struct rt_err *err, const char *word)
{
    const char *at = strstr(err->msg, word);
    return at != NULL ? strtol(at + strlen(word), NULL, 10) : -1;
}

/* What the error of a run without enough memory advises does: so much and no less, or another option alone. A run that goes on is not told what it
 * cannot change. */
static void test_memory_advice(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *deep = tf_write_student("run-advised", TF_WIDE, 3), *none = test_tmp("run-advised-none"), *out = test_tmp("run-advised-part");
    char text[32], other[32], run[4096];
    struct tf_files files = {0};
    tf_files_make(&files, "memory");
#define DEEP "--device", "cpu", "--student", deep, "--data", files.lines, "--batch-tokens", "4000"
#define PLAN(...) test_command(&rt_cmd_train, ARGS(DEEP, "--out", none, "--threads", "2", "--dry-run", __VA_ARGS__), &err)
#define ASKED "--micro-tokens", "4000", "--recompute", "1"
    for (int i = 0; i < 2; i++) {
        rt_err_clear(&err);
        assert_int_equal(i == 0 ? PLAN("--memory", "8") : PLAN("--memory", "8", ASKED), RT_NOMEM);
        const long enough = advised(&err, "--memory ");
        assert_true(enough > 1);
        for (int less = 0; less < 2; less++) {
            snprintf(text, sizeof text, "%ldM", enough - less);
            rt_err_clear(&err);
            assert_int_equal(i == 0 ? PLAN("--memory", text) : PLAN("--memory", text, ASKED), less == 0 ? RT_OK : RT_NOMEM);
        }
        if (i == 0)
            continue;
        const long micro = advised(&err, "--micro-tokens ");
        assert_true(micro > 0 && micro < 4000);
        assert_int_equal(advised(&err, "--recompute "), 1); /* what was asked for, */
        assert_non_null(strstr(err.msg, "or --recompute 3")); /* and what would do */
        snprintf(other, sizeof other, "%ld", micro);
        rt_err_clear(&err);
        assert_ok(PLAN("--memory", text, "--recompute", "1", "--micro-tokens", other));
        assert_ok(PLAN("--memory", text, "--recompute", "3", "--micro-tokens", "4000"));
    }
    snprintf(run, sizeof run, "%s/" RT_RUN_FILE, out);
    assert_ok(rt_mkdirs(out, &err));
    assert_ok(rt_publish_bytes(run, "{\"micro_tokens\": 400}", 21, &err));
    assert_int_equal(test_command(&rt_cmd_train, ARGS(DEEP, "--out", out, "--dry-run", "--memory", "8"), &err), RT_NOMEM);
    assert_true(advised(&err, "--memory ") > 1);
    assert_null(strstr(err.msg, "--micro-tokens"));
    assert_null(strstr(err.msg, "--max-length"));
    tf_files_free(&files);
}
#undef PLAN
#undef DEEP
#undef ASKED

static const struct CMUnitTest tests[] = {cmocka_unit_test(test_cost), cmocka_unit_test(test_memory_advice)};

RT_SUITE(train_memory, tests)
