/* How steps are cut: which of two plans costs less. Wall times of these plans on a GPU are bench_student_train's. */
#include <string.h>

#include "distill/train_run.h"
#include "tests/suite.h"

static const char qwen[] = "{\"model_type\": \"qwen2\", \"vocab_size\": 151936, \"hidden_size\": 1536, \"intermediate_size\": 8960, \"num_hidden_layers\": 28, "
                           "\"num_attention_heads\": 12, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, "
                           "\"tie_word_embeddings\": true, \"rope_theta\": 1000000.0}";

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

static void test_cost(void **state)
{
    struct costs k = {0};
    struct rt_err err = {0};
    (void)state;
    assert_ok(rt_student_config_parse(qwen, strlen(qwen), "qwen", &k.c, &err));
    assert_ok(rt_params_create(&k.c, &k.p, &err));
    for (int gpu = 0; gpu < 2; gpu++) {
        k.gpu = gpu == 1;
        for (int level = 0; level < 3; level++)
            assert_true(cost(&k, 8192, level, 6) < cost(&k, 8192, level + 1, 6));
        for (int64_t m = 32768; m > 512; m /= 2)
            assert_true(cost(&k, m, 1, 6) < cost(&k, m / 2, 1, 6));
    }
    assert_true(cost(&k, 16384, 0, 1) > cost(&k, 16384, 0, 3) && cost(&k, 16384, 0, 3) > cost(&k, 16384, 0, 6));
    /* gate and up again are 15 % of a step's products, half the micro-batch some 5 %, norms 2 %, less room for operations 1 % */
    assert_true(cost(&k, 8192, 1, 3) < cost(&k, 16384, 2, 6) && cost(&k, 16384, 1, 3) < cost(&k, 8192, 0, 6));
    assert_true(cost(&k, 512, 2, 6) > cost(&k, 16384, 3, 6)); /* micro-batches of 512 would be the worst of all */
    for (int level = 1; level < 4; level++) { /* layers a level below: from one level's cost to the other's in equal parts */
        const double below = cost(&k, 8192, level - 1, 6), whole = cost(&k, 8192, level, 6);
        for (int less = 0; less <= k.c.layers; less++) {
            const struct rt_train_cuts x = {8192, level, less, (size_t)6 << 30};
            const double mixed = rt_train_cuts_cost(&k.c, &k.p, 2048, k.gpu, &x), want = whole + (below - whole) * less / k.c.layers;
            assert_true(mixed > want * (1 - 1e-12) && mixed < want * (1 + 1e-12));
        }
    }
    rt_params_free(&k.p);
    rt_student_config_free(&k.c);
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(test_cost)};

RT_SUITE(train_memory, tests)
