/* Route, sort and expert products of the reference backend. */
#include "tests/ops.h"

static void route_by_hand(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    /* H = 1, x = 1: the scores are sigmoid(w). Four experts in two groups. */
    float x[1] = {1}, w[4] = {2, -3, 1, 0.5f}, bias[4] = {0, 0, 0, 0};
    int32_t ids[2];
    float weight[2];
    struct rt_weight *p = ops_param(&d, w, 4, 1), *b = ops_param(&d, bias, 1, 4);
    const double s0 = 1 / (1 + exp(-2)), s2 = 1 / (1 + exp(-1)), s3 = 1 / (1 + exp(-0.5));

    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .bias = b, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 1,
                    .sigmoid = true, .norm = true, .scale = 2.5f));
    assert_true(ids[0] == 0 && ids[1] == 2);
    assert_near(weight[0], 2.5 * s0 / (s0 + s2), 1e-6);
    assert_near(weight[1], 2.5 * s2 / (s0 + s2), 1e-6);

    /* group sums .88 + .05 < .73 + .62: the group of the best expert goes; by maximum it stays */
    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 2,
                    .topk_group = 1, .sigmoid = true, .group_top2 = true, .scale = 1));
    assert_true(ids[0] == 2 && ids[1] == 3);
    assert_near(weight[1], s3, 1e-6);
    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 2,
                    .topk_group = 1, .sigmoid = true, .scale = 1));
    assert_true(ids[0] == 0 && ids[1] == 1);

    /* the bias chooses and orders, and does not weigh; negative choices of a kept group beat a group that went */
    bias[1] = 2;
    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .bias = b, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 1,
                    .sigmoid = true, .scale = 1));
    assert_true(ids[0] == 1 && ids[1] == 0);
    assert_near(weight[0], 1 / (1 + exp(3)), 1e-6);
    bias[0] = 4;
    bias[1] = -6;
    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .bias = b, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 2,
                    .topk_group = 1, .sigmoid = true, .scale = 1));
    assert_true(ids[0] == 0 && ids[1] == 1);
    assert_near(weight[0], s0, 1e-6);

    /* softmax over all, not renormalised over the chosen */
    const double sum = exp(2) + exp(-3) + exp(1) + exp(0.5);
    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 1,
                    .scale = 16));
    assert_true(ids[0] == 0 && ids[1] == 2);
    assert_near(weight[1], 16 * exp(1) / sum, 1e-5);

    /* ties: the smaller id, the smaller group */
    memset(w, 0, sizeof w);
    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 2,
                    .topk_group = 1, .sigmoid = true, .group_top2 = true, .scale = 1));
    assert_true(ids[0] == 0 && ids[1] == 1);
    w[0] = w[1] = w[2] = w[3] = NAN; /* no order, but valid ids */
    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 2,
                    .topk_group = 1, .sigmoid = true, .group_top2 = true, .scale = 1));
    assert_true(isnan(weight[0]) && isnan(weight[1]));
    assert_true(ids[0] >= 0 && ids[0] < 4 && ids[1] >= 0 && ids[1] < 4 && ids[0] != ids[1]);
    assert_status(RT_OP(&d, route, &err, .x = x, .w = p, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 3, .n_group = 2,
                        .topk_group = 1, .sigmoid = true, .scale = 1), SHAPE);
    d.be->weight_free(d.dev, p);
    d.be->weight_free(d.dev, b);
    rt_device_close(&d);
}

/* Random tokens: each choice is the best of what its groups leave, by exhaustive comparison. */
static void route_takes_the_best(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    enum { N = 20, H = 6, E = 16, K = 4, G = 4, KEEP = 2 };
    float x[N * H], w[E * H], bias[E], weight[N * K];
    int32_t ids[N * K];
    ops_fill32(x, COUNT(x), 1);
    ops_fill32(w, COUNT(w), 2);
    ops_fill32(bias, COUNT(bias), 3);
    for (int e = 0; e < E; e++)
        bias[e] *= 0.1f; /* less than the scores differ, so that the groups vary with the token */
    struct rt_weight *p = ops_param(&d, w, E, H), *b = ops_param(&d, bias, 1, E);
    assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .bias = b, .ids = ids, .weight = weight, .n = N, .H = H, .E = E, .k = K, .n_group = G,
                    .topk_group = KEEP, .sigmoid = true, .group_top2 = true, .norm = true, .scale = 2.5f));
    for (int t = 0; t < N; t++) {
        double choice[E], group[G] = {0}, sum = 0;
        for (int e = 0; e < E; e++) {
            double z = 0;
            for (int j = 0; j < H; j++)
                z += (double)x[t * H + j] * w[e * H + j];
            choice[e] = 1 / (1 + exp(-z)) + bias[e];
        }
        for (int g = 0; g < G; g++)
            for (int i = 0; i < E / G; i++)
                for (int j = 0; j < i; j++) {
                    const double two = choice[g * E / G + i] + choice[g * E / G + j];
                    group[g] = (i == 1 && j == 0) || two > group[g] ? two : group[g];
                }
        for (int g = 0; g < G; g++) { /* kept: fewer than KEEP groups are better */
            int better = 0;
            for (int o = 0; o < G; o++)
                better += group[o] > group[g];
            for (int i = 0; i < E / G && better >= KEEP; i++)
                choice[g * E / G + i] = -INFINITY;
        }
        for (int j = 0; j < K; j++) {
            int better = 0;
            for (int e = 0; e < E; e++)
                better += choice[e] > choice[ids[t * K + j]];
            assert_int_equal(better, j);
            sum += weight[t * K + j];
        }
        assert_near(sum, 2.5, 1e-5);
    }
    d.be->weight_free(d.dev, p);
    d.be->weight_free(d.dev, b);
    rt_device_close(&d);
}

/* A router that is damaged in one place shows it, although the expert there is not chosen. */
static void route_shows_what_is_not_finite(void **state)
{
    (void)state;
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    float x[1] = {1}, w[4], bias[4], weight[2];
    int32_t ids[2];
    struct rt_weight *p = ops_param(&d, w, 4, 1), *b = ops_param(&d, bias, 1, 4);
    for (int i = 0; i < 4 * 4 * 2; i++) {
        const int at = i / 4 % 4;
        for (int e = 0; e < 4; e++) {
            w[e] = 1 - (float)e;
            bias[e] = 0;
        }
        if (i < 16)
            bias[at] = bad[i % 4];
        else
            w[at] = bad[i % 2];
        assert_ok(RT_OP(&d, route, &err, .x = x, .w = p, .bias = b, .ids = ids, .weight = weight, .n = 1, .H = 1, .E = 4, .k = 2, .n_group = 2,
                        .topk_group = 1, .sigmoid = true, .group_top2 = true, .norm = true, .scale = 2.5f));
        assert_true(isnan(weight[0]) && isnan(weight[1]));
        assert_true(ids[0] >= 0 && ids[0] < 4 && ids[1] >= 0 && ids[1] < 4 && ids[0] != ids[1]);
    }
    d.be->weight_free(d.dev, p);
    d.be->weight_free(d.dev, b);
    rt_device_close(&d);
}

static void sort_is_by_expert_then_token(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    enum { N = 30, K = 3, E = 7 };
    int32_t ids[N * K], perm[N * K], offset[E + 1];
    bool seen[N * K] = {false};
    for (int t = 0; t < N; t++)
        for (int j = 0; j < K; j++) /* expert 5 gets nothing */
            ids[t * K + j] = (int32_t)((rt_rng_u64(1, 1, (uint64_t)t) + (uint64_t)(j * 2)) % 5);
    assert_ok(RT_OP(&d, moe_sort, &err, .ids = ids, .perm = perm, .offset = offset, .n = N, .k = K, .E = E));
    assert_int_equal(offset[0], 0);
    assert_int_equal(offset[E], N * K);
    for (int e = 0; e < E; e++)
        for (int i = offset[e]; i < offset[e + 1]; i++) {
            assert_int_equal(ids[perm[i]], e);
            assert_true(i == offset[e] || perm[i] > perm[i - 1]);
            assert_false(seen[perm[i]]);
            seen[perm[i]] = true;
        }
    assert_int_equal(offset[5], offset[6]);
    ids[3] = E;
    assert_status(RT_OP(&d, moe_sort, &err, .ids = ids, .perm = perm, .offset = offset, .n = N, .k = K, .E = E), SHAPE);
    rt_device_close(&d);
}

enum { N = 5, K = 2, E = 3, H = 128, I = 256 };
struct experts {
    float gate[E][I * H], up[E][I * H], down[E][H * I];
    uint8_t cg[E][I * H], cu[E][I * H], cd[E][H * I];
    struct rt_weight *wg[E], *wu[E], *wd[E];
};
static const float block_scale[E][2] = {{0.5f, 2}, {1, 0.25f}, {3, 0.1f}};

static void make_experts(struct rt_device *d, struct experts *x, bool e4m3)
{
    for (int e = 0; e < E; e++) {
        ops_fill32(x->gate[e], I * H, 10 + (uint64_t)e);
        ops_fill32(x->up[e], I * H, 20 + (uint64_t)e);
        ops_fill32(x->down[e], I * H, 30 + (uint64_t)e);
        assert_true(rt_from_f32(x->cg[e], RT_E4M3, x->gate[e], I * H) && rt_from_f32(x->cu[e], RT_E4M3, x->up[e], I * H) &&
                    rt_from_f32(x->cd[e], RT_E4M3, x->down[e], I * H));
        x->wg[e] = e4m3 ? ops_load(d, RT_E4M3, x->cg[e], block_scale[e], I, H) : ops_param(d, x->gate[e], I, H);
        x->wu[e] = e4m3 ? ops_load(d, RT_E4M3, x->cu[e], block_scale[e], I, H) : ops_param(d, x->up[e], I, H);
        x->wd[e] = e4m3 ? ops_load(d, RT_E4M3, x->cd[e], block_scale[e], H, I) : ops_param(d, x->down[e], H, I);
    }
}

static void free_experts(struct rt_device *d, struct experts *x)
{
    for (int e = 0; e < E; e++) {
        d->be->weight_free(d->dev, x->wg[e]);
        d->be->weight_free(d->dev, x->wu[e]);
        d->be->weight_free(d->dev, x->wd[e]);
    }
}

/* out [N, H] = one expert on every token, from the ops for products and gating. */
static void one_expert(struct rt_device *d, const struct experts *x, int e, struct rt_act in, float *out)
{
    struct rt_err err = {0};
    static float g[N * I], u[N * I], h[N * I];
    static uint8_t code[N * I];
    float scale[N * I / 128];
    const bool e4m3 = in.scale != NULL;
    assert_ok(RT_OP(d, linear_fwd, &err, .x = in, .w = x->wg[e], .y = g, .n = N, .K = H, .N = I));
    assert_ok(RT_OP(d, linear_fwd, &err, .x = in, .w = x->wu[e], .y = u, .n = N, .K = H, .N = I));
    assert_ok(RT_OP(d, swiglu_fwd, &err, .gate = g, .up = u, .h = e4m3 ? NULL : h, .hq = {e4m3 ? code : NULL, e4m3 ? scale : NULL}, .n = N,
                    .I = I));
    assert_ok(RT_OP(d, linear_fwd, &err, .x = {e4m3 ? (void *)code : (void *)h, e4m3 ? scale : NULL}, .w = x->wd[e], .y = out, .n = N,
                    .K = I, .N = H));
}

static void experts_are_products_and_gates(void **state)
{
    (void)state;
    static struct experts x;
    static float in[N * H], each[E][N * H], y[N * H], expected[N * H];
    static uint8_t code[N * H];
    float scale[N];
    const int32_t ids[N * K] = {0, 2, 2, 1, 0, 2, 2, 0, 1, 0};
    float weight[N * K];
    int32_t perm[N * K], offset[E + 1];
    ops_fill32(in, N * H, 1);
    ops_fill32(weight, N * K, 2);
    for (int e4m3 = 0; e4m3 < 2; e4m3++) {
        struct rt_err err = {0};
        struct rt_device d = ops_open(&rt_backend_ref);
        struct rt_act a = {in, NULL};
        make_experts(&d, &x, e4m3 != 0);
        if (e4m3) {
            a = (struct rt_act){code, scale};
            assert_ok(RT_OP(&d, quant, &err, .x = in, .q = a, .n = N, .cols = H));
        }
        for (int e = 0; e < E; e++)
            one_expert(&d, &x, e, a, each[e]);
        assert_ok(RT_OP(&d, moe_sort, &err, .ids = ids, .perm = perm, .offset = offset, .n = N, .k = K, .E = E));
        /* experts 1 and 2 as a list of their own, then expert 0; y starts from 7 */
        for (int i = 0; i < N * H; i++)
            y[i] = expected[i] = 7;
        assert_ok(RT_OP(&d, moe_ffn, &err, .x = a, .perm = perm, .weight = weight, .offset = offset + 1,
                        .gate = (const struct rt_weight *const *)x.wg + 1, .up = (const struct rt_weight *const *)x.wu + 1,
                        .down = (const struct rt_weight *const *)x.wd + 1, .y = y, .n = N, .n_experts = 2, .k = K, .H = H, .I = I));
        assert_ok(RT_OP(&d, moe_ffn, &err, .x = a, .perm = perm, .weight = weight, .offset = offset,
                        .gate = (const struct rt_weight *const *)x.wg, .up = (const struct rt_weight *const *)x.wu,
                        .down = (const struct rt_weight *const *)x.wd, .y = y, .n = N, .n_experts = 1, .k = K, .H = H, .I = I));
        for (int t = 0; t < N; t++)
            for (int j = 0; j < K; j++)
                for (int i = 0; i < H; i++)
                    expected[t * H + i] += weight[t * K + j] * each[ids[t * K + j]][t * H + i];
        assert_true(test_rel_error(y, expected, N * H) < 1e-6); /* float32 rounding of the sums */

        /* without perm: one expert on all rows, weight 1 */
        memset(y, 0, sizeof y);
        assert_ok(RT_OP(&d, moe_ffn, &err, .x = a, .gate = (const struct rt_weight *const *)x.wg + 1,
                        .up = (const struct rt_weight *const *)x.wu + 1, .down = (const struct rt_weight *const *)x.wd + 1, .y = y, .n = N,
                        .n_experts = 1, .H = H, .I = I));
        assert_true(test_rel_error(y, each[1], N * H) < 1e-6);
        free_experts(&d, &x);
        rt_device_close(&d);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(route_by_hand),
    cmocka_unit_test(route_takes_the_best), cmocka_unit_test(route_shows_what_is_not_finite),
    cmocka_unit_test(sort_is_by_expert_then_token),
    cmocka_unit_test(experts_are_products_and_gates),
};
RT_SUITE(ops_moe, tests)
