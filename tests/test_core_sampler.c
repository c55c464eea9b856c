#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#include "core/sampler.h"
#include "tests/suite.h"

enum { MAX_N = 5000 };

struct pair {
    double logit;
    int id;
};

static int descending(const void *a, const void *b)
{
    const struct pair *x = a, *y = b;
    return x->logit != y->logit ? (x->logit > y->logit ? -1 : 1) : x->id - y->id;
}

/* p[i] = probability of id i, by sorting everything. */
static void expected(const float *l, int n, const struct rt_sample_params *q, double *p)
{
    static struct pair s[MAX_N];
    double sum = 0, mass = 0;
    int kept = n;
    for (int i = 0; i < n; i++)
        s[i] = (struct pair){(double)l[i], i};
    qsort(s, (size_t)n, sizeof s[0], descending);
    memset(p, 0, (size_t)n * sizeof *p);
    if (q->temperature == 0) {
        p[s[0].id] = 1;
        return;
    }
    if (q->top_k > 0 && q->top_k < n)
        kept = (int)q->top_k;
    for (int i = 0; i < kept; i++)
        sum += exp((s[i].logit - s[0].logit) / q->temperature);
    if (q->top_p < 1) {
        int i = 0;
        while (i < kept && mass < q->top_p * sum)
            mass += exp((s[i++].logit - s[0].logit) / q->temperature);
        kept = i;
        sum = mass;
    }
    for (int i = 0; i < kept; i++)
        p[s[i].id] = exp((s[i].logit - s[0].logit) / q->temperature) / sum;
}

/* The id whose share of the cumulated probabilities, in ascending id, holds u, by `expected`. */
static int by_inverse(const double *p, int n, double u)
{
    double below = 0;
    int last = 0;
    for (int i = 0; i < n; i++) {
        if (p[i] == 0)
            continue;
        last = i;
        below += p[i];
        if (below > u)
            break;
    }
    return last;
}

static void random_logits(float *l, int n, double scale, uint64_t stream)
{
    for (int i = 0; i < n; i++)
        l[i] = (float)scale * rt_rng_normal(11, stream, (uint64_t)i);
}

static double log_prob(const float *l, int n, int id)
{
    double sum = 0, max = (double)l[0];
    for (int i = 0; i < n; i++)
        max = fmax(max, (double)l[i]);
    for (int i = 0; i < n; i++)
        sum += exp((double)l[i] - max);
    return (double)l[id] - max - log(sum);
}

static void agrees_with_full_sort(void **state)
{
    static const struct rt_sample_params params[] = {
        {1, 0, 1}, {0.6, 0, 0.95}, {1, 5, 1}, {0.7, 40, 0.9}, {2, 0, 0.5}, {1, 0, 0.001}, {1, 1, 1}, {0, 0, 1},
        {1e-3, 0, 0.9}, {100, 0, 0.99}, {1, 4999, 0.999999}, {1, 100000, 1},
    };
    static const int sizes[] = {1, 2, 17, 300, MAX_N};
    static float l[MAX_N];
    static double p[MAX_N];
    (void)state;
    for (size_t k = 0; k < sizeof params / sizeof params[0]; k++) {
        for (int z = 0; z < 10; z++) {
            const int n = sizes[z / 2];
            struct rt_err err = {0};
            struct rt_sampler *s;
            random_logits(l, n, z % 2 ? 1 : 6, (uint64_t)z);
            expected(l, n, &params[k], p);
            assert_ok(rt_sampler_create(n, &params[k], &s, &err));
            for (uint64_t pos = 0; pos < 60; pos++) {
                int32_t id = -1;
                float lp;
                assert_ok(rt_sampler_pick(s, l, 5, 6, pos, &id, &lp, &err));
                const int want = by_inverse(p, n, rt_rng_uniform(5, 6, pos));
                if (id != want)
                    fail_msg("T %g k %lld p %g n %d position %d: id %d, expected %d", params[k].temperature, (long long)params[k].top_k,
                             params[k].top_p, n, (int)pos, id, want);
                /* float has 24 bits; values go to some 40 nats, so half a last bit is 2e-6 */
                assert_true(fabs((double)lp - log_prob(l, n, id)) < 2e-6);
            }
            rt_sampler_free(s);
        }
    }
}

/* Which ids ever come out, as bits. */
static unsigned support(const float *l, int n, struct rt_sample_params q)
{
    struct rt_err err = {0};
    struct rt_sampler *s;
    unsigned seen = 0;
    assert_ok(rt_sampler_create(n, &q, &s, &err));
    for (uint64_t pos = 0; pos < 500; pos++) {
        int32_t id;
        float lp;
        assert_ok(rt_sampler_pick(s, l, 1, 1, pos, &id, &lp, &err));
        assert_in_range(id, 0, n - 1);
        seen |= 1u << id;
    }
    rt_sampler_free(s);
    return seen;
}

static void ties_and_edges(void **state)
{
    const float flat[] = {2, 2, 2, 2}, two[] = {0, 5, 1, 5}, halves[] = {0, -0.6931472f, -50, -50};
    (void)state;
    assert_int_equal(support(flat, 4, (struct rt_sample_params){1, 0, 1}), 15);
    assert_int_equal(support(flat, 4, (struct rt_sample_params){1, 0, 0.5}), 3);    /* two quarters reach a half */
    assert_int_equal(support(flat, 4, (struct rt_sample_params){1, 0, 0.500001}), 7); /* the crossing one belongs to it */
    assert_int_equal(support(flat, 4, (struct rt_sample_params){1, 3, 1}), 7);
    assert_int_equal(support(flat, 4, (struct rt_sample_params){1, 3, 0.6}), 3); /* p counts of the three that top-k kept */
    assert_int_equal(support(two, 4, (struct rt_sample_params){0, 0, 1}), 2);
    assert_int_equal(support(two, 4, (struct rt_sample_params){0.01, 0, 1}), 10);
    assert_int_equal(support(two, 4, (struct rt_sample_params){1, 1, 1}), 2);
    assert_int_equal(support(two, 4, (struct rt_sample_params){1e-300, 3, 0.9}), 10);
    assert_int_equal(support(halves, 4, (struct rt_sample_params){1, 0, 0.66}), 1);
    assert_int_equal(support(halves, 4, (struct rt_sample_params){1, 0, 0.67}), 3);
    assert_int_equal(support(halves, 4, (struct rt_sample_params){2, 0, 0.58}), 1); /* p counts after temperature: 0.586 */
    assert_int_equal(support(halves, 4, (struct rt_sample_params){2, 0, 0.6}), 3);
}

static void ids_that_do_not_exist(void **state)
{
    struct rt_err err = {0};
    const float l[] = {0, 1, 0, NAN, INFINITY, 100};
    (void)state;
    assert_int_equal(support(l, 3, (struct rt_sample_params){1, 0, 1}), 7);
    assert_int_equal(support(l, 3, (struct rt_sample_params){0, 0, 1}), 2);
    for (int n = 4; n <= 6; n++) {
        struct rt_sampler *s;
        int32_t id;
        float lp;
        assert_ok(rt_sampler_create(n, &(struct rt_sample_params){1, 0, 1}, &s, &err));
        assert_int_equal(rt_sampler_pick(s, l, 1, 1, 1, &id, &lp, &err), RT_NUMERIC);
        assert_non_null(strstr(err.msg, "id 3"));
        rt_err_clear(&err);
        assert_status(rt_sampler_pick(s, (const float[]){0, -INFINITY, 0, 0, 0, 0}, 1, 1, 1, &id, &lp, &err), NUMERIC);
        assert_ok(rt_sampler_pick(s, (const float[]){0, 3e38f, -3e38f, 0, 0, 0}, 1, 1, 1, &id, &lp, &err));
        assert_int_equal(id, 1);
        assert_true(lp == 0);
        rt_sampler_free(s);
    }
}

static void depends_on_its_arguments_alone(void **state)
{
    static float a[300], b[300];
    struct rt_err err = {0};
    struct rt_sampler *s;
    int32_t id[4], other;
    float lp;
    int differ = 0;
    (void)state;
    random_logits(a, 300, 2, 1);
    random_logits(b, 300, 2, 2);
    assert_ok(rt_sampler_create(300, &(struct rt_sample_params){0.8, 50, 0.9}, &s, &err));
    for (uint64_t pos = 0; pos < 20; pos++) {
        assert_ok(rt_sampler_pick(s, a, 1, 2, pos, &id[0], &lp, &err));
        assert_ok(rt_sampler_pick(s, b, 1, 2, pos, &other, &lp, &err));
        assert_ok(rt_sampler_pick(s, a, 1, 2, pos, &id[1], &lp, &err));
        assert_int_equal(id[0], id[1]);
        assert_ok(rt_sampler_pick(s, a, 2, 2, pos, &id[2], &lp, &err));
        assert_ok(rt_sampler_pick(s, a, 1, 3, pos, &id[3], &lp, &err));
        differ |= (id[0] != id[2]) | (id[0] != id[3]) << 1;
    }
    assert_int_equal(differ, 3);
    rt_sampler_free(s);
    rt_sampler_free(NULL);
}

static void parameters_are_checked(void **state)
{
    static const struct rt_sample_params bad[] = {{-1, 0, 1}, {NAN, 0, 1}, {INFINITY, 0, 1}, {1, -1, 1}, {1, 0, 0}, {1, 0, 1.1}, {1, 0, NAN}};
    struct rt_err err = {0};
    struct rt_sampler *s;
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_status(rt_sampler_create(10, &bad[i], &s, &err), USAGE);
    assert_status(rt_sampler_create(0, &(struct rt_sample_params){1, 0, 1}, &s, &err), USAGE);
    assert_null(s);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(agrees_with_full_sort),          cmocka_unit_test(ties_and_edges), cmocka_unit_test(ids_that_do_not_exist),
    cmocka_unit_test(depends_on_its_arguments_alone), cmocka_unit_test(parameters_are_checked),
};
RT_SUITE(core_sampler, tests)
