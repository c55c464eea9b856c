/* The cuda backend: AdamW with split parameters, moments in bfloat16, stochastic rounding. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/dtype.h"
#include "core/rng.h"
#include "tests/cuda_ops.h"

static float joined(uint16_t high, int16_t low)
{
    const uint32_t u = ((uint32_t)high << 16) + (uint32_t)(int32_t)low;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

enum { N = 100003, STEPS = 4 };
static const int64_t ends[] = {5, 64, 1000, 1003, 50000, N - 3};

/* Arrays one element behind an aligned address: the path of single elements. */
static void split_master(struct cuda_pair *p, int shift)
{
    struct rt_err err = {0};
    const struct rt_adamw_args base = {.n = N, .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .grad_scale = 0.5, .decay_end = ends,
                                       .n_decay = 6};
    float *x = malloc(N * 4), *g = malloc(N * 4), *m = calloc(N, 4), *v = calloc(N, 4), *got = malloc(N * 4), *moved = malloc(N * 4), *zero = calloc(N + 1, 4);
    uint16_t *high = malloc(N * 2);
    int16_t *low = malloc(N * 2);
    cuda_random(x, N, 1, 1.0f);
    x[7] = 0;
    memcpy(moved, x, N * 4);
    float *padded = calloc(N + 1, 4);
    memcpy(padded + shift, x, N * 4);
    char *gp = cuda_act(p, padded, N + shift), *glow = cuda_bytes(p, zero, (size_t)(N + shift) * 2);
    char *gm = cuda_bytes(p, zero, (size_t)(N + shift) * 4), *gv = cuda_bytes(p, zero, (size_t)(N + shift) * 4);
    for (int step = 1; step <= STEPS; step++) {
        cuda_random(g, N, 10 + (uint64_t)step, 0.01f);
        memcpy(padded + shift, g, N * 4);
        char *gg = cuda_act(p, padded, N + shift);
        struct rt_adamw_args a = base;
        a.p = x, a.grad = g, a.m = m, a.v = v, a.step = step;
        assert_ok(p->ref.be->adamw(p->ref.dev, p->ref.q, &a, &err));
        a.p = gp + shift * 2, a.grad = gg + shift * 2, a.low = glow + shift * 2, a.m = gm + shift * 4, a.v = gv + shift * 4;
        assert_ok(p->gpu.be->adamw(p->gpu.dev, p->gpu.q, &a, &err));
        cuda_free(p, gg);
    }
    cuda_get(p, high, gp + shift * 2, N * 2);
    cuda_get(p, low, glow + shift * 2, N * 2);
    for (int i = 0; i < N; i++) {
        got[i] = joined(high[i], low[i]);
        uint32_t u;
        memcpy(&u, &got[i], 4);
        assert_int_equal(high[i], (uint16_t)((u + 0x8000) >> 16));
    }
    cuda_close("parameters", got, x, 1, N, 1e-6, 0);
    for (int i = 0; i < N; i++) {
        got[i] -= moved[i];
        moved[i] = x[i] - moved[i];
    }
    cuda_close("  how far they moved", got, moved, 1, N, 1e-3, 0); /* 4e-3 of numbers around 1: float32 holds 1e-5 of it */
    cuda_get(p, got, gm + shift * 4, N * 4);
    cuda_close("  first moments", got, m, 1, N, 1e-6, 0);
    cuda_get(p, got, gv + shift * 4, N * 4);
    cuda_close("  second moments", got, v, 1, N, 1e-6, 0);
    void *const dev[] = {gp, glow, gm, gv}, *const host[] = {x, g, m, v, got, moved, zero, high, low, padded};
    for (size_t i = 0; i < sizeof dev / sizeof dev[0]; i++)
        cuda_free(p, dev[i]);
    for (size_t i = 0; i < sizeof host / sizeof host[0]; i++)
        free(host[i]);
}

static void test_split_master(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    split_master(&p, 0);
    split_master(&p, 1);
    cuda_pair_close(&p);
}

/* One step on N equal elements with BF16 moments and, where `low` is false, a bare BF16 parameter. */
static void step_equal(struct cuda_pair *p, bool low, uint64_t seed, int64_t step, double lr, uint16_t *out_p, uint16_t *out_m, uint16_t *out_v)
{
    struct rt_err err = {0};
    float *x = malloc(N * 4), *zero = calloc(N, 4);
    for (int i = 0; i < N; i++)
        x[i] = 1.0f;
    void *gp = cuda_act(p, x, N), *gl = cuda_bytes(p, zero, N * 2), *gm = cuda_bytes(p, zero, N * 2), *gv = cuda_bytes(p, zero, N * 2);
    for (int i = 0; i < N; i++)
        x[i] = 0.015625f * 1.5f;
    void *gg = cuda_act(p, x, N);
    assert_ok(RT_OP(&p->gpu, adamw, &err, .p = gp, .low = low ? gl : NULL, .grad = gg, .m = gm, .v = gv, .moment = RT_BF16, .n = N, .step = step, .lr = lr,
                    .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .grad_scale = 1, .seed = seed));
    cuda_get(p, out_p, gp, N * 2);
    cuda_get(p, out_m, gm, N * 2);
    cuda_get(p, out_v, gv, N * 2);
    void *const dev[] = {gp, gl, gm, gv, gg};
    for (size_t i = 0; i < sizeof dev / sizeof dev[0]; i++)
        cuda_free(p, dev[i]);
    free(x);
    free(zero);
}

/* Each of the N is one of the two neighbours of `want`; their mean is it: a coin of spread ulp/2, so 6 ulp/2/sqrt(N) is one in 10^9. */
static void expect_mean(const char *what, const uint16_t *got, double want)
{
    double sum = 0, ulp = ldexp(1, ilogb(want) - 7);
    for (int i = 0; i < N; i++) {
        const double x = rt_bf16_to_f32(got[i]);
        if (!(fabs(x - want) < ulp))
            fail_msg("%s: element %d is %.9g, not a neighbour of %.9g", what, i, x, want);
        sum += x;
    }
    print_message("    %-44s %.9g, expected %.9g\n", what, sum / N, want);
    if (!(fabs(sum / N - want) < 3 * ulp / sqrt(N)))
        fail_msg("%s: mean %.9g, expected %.9g", what, sum / N, want);
}

static void test_stochastic(void **state)
{
    struct cuda_pair p;
    uint16_t *a = malloc(6 * N * 2), *b = a + 3 * N;
    (void)state;
    if (!cuda_pair_open(&p)) {
        free(a);
        TEST_SKIP("no GPU");
    }
    const double g = 0.015625 * 1.5;
    step_equal(&p, true, 3, 1, 1e-3, a, a + N, a + 2 * N);
    expect_mean("first moment", a + N, 0.1 * g);
    expect_mean("second moment", a + 2 * N, 0.05 * g * g);
    step_equal(&p, true, 3, 1, 1e-3, b, b + N, b + 2 * N);
    assert_memory_equal(a, b, 3 * N * 2);
    step_equal(&p, true, 4, 1, 1e-3, b, b + N, b + 2 * N);
    assert_memory_not_equal(a + N, b + N, N * 2);
    step_equal(&p, false, 3, 1, 1e-5, a, a + N, a + 2 * N); /* a thousandth of an ulp of the parameter */
    expect_mean("parameter alone", a, 1 - 1e-5);
    /* draws of the three are not the same draw: correlation of who was rounded up */
    int both = 0, up_m = 0, up_v = 0;
    const float lo_m = (float)(0.1 * g), lo_v = (float)(0.05 * g * g);
    for (int i = 0; i < N; i++) {
        const int m = rt_bf16_to_f32(a[N + i]) > lo_m, v = rt_bf16_to_f32(a[2 * N + i]) > lo_v;
        up_m += m, up_v += v, both += m && v;
    }
    assert_true(fabs((double)both - (double)up_m * up_v / N) < 5 * sqrt(N) / 2);
    free(a);
    cuda_pair_close(&p);
}

static void test_refusals(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    float x[4] = {0};
    int16_t low[4];
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    assert_status(RT_OP(&p.ref, adamw, &err, .p = x, .low = low, .grad = x, .m = x, .v = x, .n = 4, .step = 1), UNSUPPORTED);
    assert_status(RT_OP(&p.ref, adamw, &err, .p = x, .grad = x, .m = x, .v = x, .moment = RT_BF16, .n = 4, .step = 1), UNSUPPORTED);
    assert_status(RT_OP(&p.gpu, adamw, &err, .p = x, .grad = x, .m = x, .v = x, .moment = RT_F64, .n = 4, .step = 1), UNSUPPORTED);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_split_master),
    cmocka_unit_test(test_stochastic),
    cmocka_unit_test(test_refusals),
};
RT_SUITE(cuda_optim, tests)
