/* Means, spreads, intervals over clusters, pass@k. */
#include "tests/suite.h"

#include <math.h>

#include "core/rng.h"
#include "distill/stats.h"

static void means_and_spreads(void **state)
{
    (void)state;
    const double x[] = {1, 2, 3, 6};
    assert_true(rt_stats_mean(x, 4) == 3);
    assert_true(fabs(rt_stats_sd(x, 4) - sqrt(14.0 / 3)) < 1e-15); /* (4 + 1 + 0 + 9) / 3 */
    assert_true(isnan(rt_stats_sd(x, 1)) && isnan(rt_stats_mean(x, 0)));
}

static void pass_at_k(void **state)
{
    (void)state;
    assert_true(rt_stats_pass_at_k(4, 1, 1) == 0.25);
    assert_true(fabs(rt_stats_pass_at_k(4, 2, 2) - 5.0 / 6) < 1e-15);    /* 1 - C(2,2)/C(4,2) */
    assert_true(fabs(rt_stats_pass_at_k(10, 3, 5) - 11.0 / 12) < 1e-15); /* 1 - C(7,5)/C(10,5) = 1 - 21/252 */
    assert_true(rt_stats_pass_at_k(4, 4, 3) == 1 && rt_stats_pass_at_k(4, 0, 3) == 0);
    assert_true(isnan(rt_stats_pass_at_k(4, 1, 5)) && isnan(rt_stats_pass_at_k(4, 5, 1)));
}

static void wilson(void **state)
{
    (void)state;
    double lo, hi;
    rt_stats_wilson(0.5, 10, &lo, &hi);
    assert_true(fabs(lo - 0.2366) < 1e-4 && fabs(hi - 0.7634) < 1e-4); /* published table */
    rt_stats_wilson(0, 20, &lo, &hi);
    assert_true(lo == 0 && fabs(hi - 3.8415 / (20 + 3.8415)) < 1e-4); /* z^2 / (n + z^2) */
}

/* Clusters of unequal size: the bootstrap of a ratio of sums has the width that theory gives, which is that of the normal interval. */
static void bootstrap_of_a_ratio(void **state)
{
    (void)state;
    enum { N = 400 };
    static double num[N], den[N], zero[N];
    struct rt_err err = {0};
    struct rt_interval v, again;
    struct rt_ratio r = {0};
    double mean, lo, hi;
    for (int i = 0; i < N; i++) {
        den[i] = 1 + i % 7;
        num[i] = den[i] * (2 + rt_rng_normal(3, 0, (uint64_t)i));
        rt_ratio_add(&r, num[i], den[i]);
    }
    rt_ratio_result(&r, &mean, &lo, &hi);
    assert_ok(rt_stats_difference(zero, den, num, den, N, 2000, 1, &v, &err));
    assert_true(fabs(v.mean - mean) < 1e-12 && v.n == N);
    /* 2,000 draws know an end to about 6 % of the half width */
    assert_true(fabs((v.mean - v.lo) / (mean - lo) - 1) < 0.15 && fabs((v.hi - v.mean) / (hi - mean) - 1) < 0.15);
    assert_ok(rt_stats_difference(zero, den, num, den, N, 2000, 1, &again, &err));
    assert_true(v.lo == again.lo && v.hi == again.hi);
    den[0] = 0; /* left out */
    assert_ok(rt_stats_difference(zero, den, num, den, N, 200, 1, &v, &err));
    assert_int_equal(v.n, N - 1);
    assert_ok(rt_stats_difference(zero, den + 1, num, den + 1, 1, 200, 1, &v, &err));
    assert_true(isnan(v.lo) && v.n == 1);
    assert_ok(rt_stats_difference(zero, den, num, den, 0, 200, 1, &v, &err));
    assert_true(isnan(v.mean) && v.n == 0);
}

/* Within [0, 1]; Wilson's where a cluster is one draw; between one draw a cluster and all draws independent where it is more. */
static void intervals_of_shares(void **state)
{
    (void)state;
    double mean, lo, hi, wlo, whi;
    struct rt_ratio one = {0}, none = {0}, apart = {0}, alike = {0}, rare = {0};
    for (int i = 0; i < 10; i++) {
        rt_ratio_add(&one, i < 3, 1);
        rt_ratio_add(&none, 0, 4);
        rt_ratio_add(&apart, i < 3 ? 4 : 0, 4); /* samples of a problem agree: ten draws */
        rt_ratio_add(&alike, 2, 4);             /* nothing but the draws scatters, and these no more than 40 can */
        rt_ratio_add(&rare, i == 0, 300);
    }
    rt_ratio_share(&one, 10, &mean, &lo, &hi);
    rt_stats_wilson(0.3, 10, &wlo, &whi);
    assert_true(mean == 0.3 && fabs(lo - wlo) < 1e-12 && fabs(hi - whi) < 1e-12);
    rt_ratio_share(&apart, 40, &mean, &lo, &hi);
    assert_true(fabs(lo - wlo) < 1e-12 && fabs(hi - whi) < 1e-12);
    rt_ratio_share(&none, 40, &mean, &lo, &hi);
    assert_true(mean == 0 && lo == 0 && fabs(hi - 3.8415 / (10 + 3.8415)) < 1e-4);
    rt_ratio_share(&alike, 40, &mean, &lo, &hi);
    rt_stats_wilson(0.5, 40, &wlo, &whi);
    assert_true(fabs(lo - wlo) < 1e-12 && fabs(hi - whi) < 1e-12);
    rt_ratio_share(&rare, 3000, &mean, &lo, &hi);
    assert_true(lo > 0 && lo < mean && hi > mean && hi < 0.01);
}

/* A large spread that both arms share drops out of a paired difference. */
static void pairing_takes_out_what_is_shared(void **state)
{
    (void)state;
    enum { N = 100 };
    double a[N], b[N], one[N];
    struct rt_err err = {0};
    struct rt_interval d;
    struct rt_ratio ra = {0};
    double mean, lo, hi;
    for (int i = 0; i < N; i++) {
        const double shared = 10 * rt_rng_normal(5, 0, (uint64_t)i);
        one[i] = 1;
        a[i] = shared;
        b[i] = shared + 0.5 + 0.1 * rt_rng_normal(5, 1, (uint64_t)i);
    }
    for (int i = 0; i < N; i++)
        rt_ratio_add(&ra, a[i], 1);
    rt_ratio_result(&ra, &mean, &lo, &hi);
    assert_ok(rt_stats_difference(a, one, b, one, N, 1000, 1, &d, &err));
    assert_true(hi - lo > 2);                             /* 2 * 1.96 * 10 / sqrt(100) is near 4 */
    assert_true(d.hi - d.lo < 0.08);                      /* 2 * 1.96 * 0.1 / 10 is near 0.04 */
    assert_true(d.lo < 0.5 && d.hi > 0.5 && d.lo > 0.4);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(means_and_spreads), cmocka_unit_test(pass_at_k), cmocka_unit_test(wilson), cmocka_unit_test(bootstrap_of_a_ratio),
    cmocka_unit_test(intervals_of_shares), cmocka_unit_test(pairing_takes_out_what_is_shared),
};
RT_SUITE(stats, tests)
