/* head_likelihood: against its definition and finite differences in float64, the cpu backend against the reference. */
#include "tests/ops_cpu.h"

enum { N = 5, H = 4, ROWS = 11, IDS = 9 };

struct likelihood_case {
    struct rt_device *d;
    struct rt_weight *w;
    double x[N * H], wt[ROWS * H], dx[N * H], dw[ROWS * H], label_logp[N], set_logp[N];
    float w_label[N], w_set[N];
    int32_t label[N];
    uint8_t in_set[IDS];
};

static void run(struct likelihood_case *c, bool grads)
{
    struct rt_err err = {0};
    assert_ok(RT_OP(c->d, head_likelihood, &err, .x = c->x, .w = c->w, .dx = grads ? c->dx : NULL, .dw = grads ? c->dw : NULL, .n = N,
                    .H = H, .n_ids = IDS, .label = c->label, .in_set = c->in_set, .w_label = c->w_label, .w_set = c->w_set,
                    .label_logp = c->label_logp, .set_logp = c->set_logp));
}

static double total(void *ctx)
{
    struct likelihood_case *c = ctx;
    double sum = 0;
    run(c, false);
    for (int i = 0; i < N; i++)
        sum -= c->w_label[i] * c->label_logp[i] + c->w_set[i] * c->set_logp[i];
    return sum;
}

static void make_case(struct likelihood_case *c, struct rt_device *d)
{
    *c = (struct likelihood_case){.d = d, .label = {3, -1, 0, 8, 5}, .w_label = {0.7f, 0.5f, 0, -0.3f, 1.5f},
                                  .w_set = {0.4f, 0.9f, -0.6f, 0, 0.2f}, .in_set = {1, 0, 0, 1, 0, 0, 1, 0, 0}};
    ops_fill(c->x, N * H, 1);
    ops_fill(c->wt, ROWS * H, 2);
    c->w = ops_param(d, c->wt, ROWS, H);
}

static void values_match_definitions(void **state)
{
    (void)state;
    struct rt_device d = ops_open(&rt_backend_ref64);
    struct likelihood_case c;
    make_case(&c, &d);
    run(&c, false);
    for (int i = 0; i < N; i++) {
        double all = 0, set = 0;
        for (int v = 0; v < IDS; v++) {
            const double e = exp(ops_dot(c.x + i * H, c.wt + v * H, H));
            all += e;
            set += c.in_set[v] ? e : 0;
        }
        assert_near(c.set_logp[i], log(set / all), 1e-12);
        assert_near(c.label_logp[i], c.label[i] >= 0 ? ops_dot(c.x + i * H, c.wt + c.label[i] * H, H) - log(all) : 0, 1e-12);
    }
    d.be->weight_free(d.dev, c.w);
    rt_device_close(&d);
}

static void gradients_match_differences(void **state)
{
    (void)state;
    struct rt_device d = ops_open(&rt_backend_ref64);
    struct likelihood_case c;
    make_case(&c, &d);
    for (int i = 0; i < N * H; i++)
        c.dx[i] = NAN; /* = : every element is written */
    run(&c, true);
    double dx[N * H], dw[ROWS * H];
    memcpy(dx, c.dx, sizeof dx);
    memcpy(dw, c.dw, sizeof dw);
    ops_check_grad("likelihood dx", total, &c, c.x, N * H, dx);
    ops_check_grad("likelihood dw", total, &c, c.wt, ROWS * H, dw);
    for (int i = IDS * H; i < ROWS * H; i++) /* rows without an id take no part */
        assert_true(dw[i] == 0);
    run(&c, true); /* dw += */
    for (int i = 0; i < ROWS * H; i++)
        assert_near(c.dw[i], 2 * dw[i], 1e-12);
    d.be->weight_free(d.dev, c.w);
    rt_device_close(&d);
}

/* An empty set has no gradient, a set of all ids no loss; ids outside are refused. */
static void edges(void **state)
{
    (void)state;
    const struct rt_backend *const tables[] = {&rt_backend_ref, &rt_backend_cpu};
    for (int b = 0; b < 2; b++) {
        struct rt_err err = {0};
        struct rt_device d = ops_open(tables[b]);
        float x[2] = {1, 1}, wt[4] = {500, 0, -500, 0}, dx[2] = {NAN, NAN}, one[2] = {1, 1};
        struct rt_weight *w = ops_param(&d, wt, 4, 1);
        uint8_t set[4] = {0};
        int32_t label[2] = {0, 2};
        double label_logp[2], set_logp[2];
        assert_ok(RT_OP(&d, head_likelihood, &err, .x = x, .w = w, .dx = dx, .n = 2, .H = 1, .n_ids = 4, .in_set = set, .w_set = one,
                        .label_logp = label_logp, .set_logp = set_logp));
        assert_true(set_logp[0] == -INFINITY && label_logp[0] == 0 && dx[0] == 0 && dx[1] == 0);
        memset(set, 1, sizeof set);
        assert_ok(RT_OP(&d, head_likelihood, &err, .x = x, .w = w, .dx = dx, .n = 2, .H = 1, .n_ids = 4, .label = label, .in_set = set,
                        .w_label = one, .w_set = one, .label_logp = label_logp, .set_logp = set_logp));
        assert_near(set_logp[0], 0, 1e-6);
        assert_near(label_logp[0], 0, 1e-6);
        assert_near(label_logp[1], -1000, 1e-3);
        assert_near(dx[0], 0, 1e-4);
        assert_near(dx[1], 1000, 1e-2); /* the label pulls from -500 to 500 */
        memset(set, 0, sizeof set);
        set[2] = 1; /* all mass is elsewhere: the gradient is that of the label 2 */
        assert_ok(RT_OP(&d, head_likelihood, &err, .x = x, .w = w, .dx = dx, .n = 1, .H = 1, .n_ids = 4, .in_set = set, .w_set = one,
                        .set_logp = set_logp));
        assert_near(set_logp[0], -1000, 1e-3);
        assert_near(dx[0], 1000, 1e-2);
        label[0] = 4;
        assert_status(RT_OP(&d, head_likelihood, &err, .x = x, .w = w, .n = 1, .H = 1, .n_ids = 4, .label = label), SHAPE);
        assert_status(RT_OP(&d, head_likelihood, &err, .x = x, .w = w, .n = 1, .H = 1, .n_ids = 5), SHAPE);
        d.be->weight_free(d.dev, w);
        rt_device_close(&d);
    }
}

/* cpu against ref in float32, with the bound of the other losses: sums over V terms in another order. */
static void cpu_is_the_reference(void **state)
{
    struct devices *all = *state;
    enum { n = 70, h = 48, rows = 3000, ids = 2777 };
    float *x = randoms(n * h, 1, 1), *wt = randoms(rows * h, 2, 0.3), *wl = randoms(n, 3, 1), *ws = randoms(n, 4, 1);
    float *dx[1 + CPUS], *dw[1 + CPUS];
    double logp[1 + CPUS][2][n];
    int32_t label[n];
    uint8_t set[ids];
    struct rt_err err = {0};
    for (int i = 0; i < n; i++)
        label[i] = i % 7 == 3 ? -1 : i * 39 % ids;
    for (int v = 0; v < ids; v++)
        set[v] = v % 5 == 1;
    for (int b = 0; b <= CPUS; b++) {
        struct rt_device *d = b == 0 ? &all->ref : &all->cpu[b - 1];
        struct rt_weight *w = ops_param(d, wt, rows, h);
        dx[b] = randoms(n * h, 5, 1);
        dw[b] = calloc(rows * h, sizeof(float));
        assert_ok(RT_OP(d, head_likelihood, &err, .x = x, .w = w, .dx = dx[b], .dw = dw[b], .n = n, .H = h, .n_ids = ids, .label = label,
                        .in_set = set, .w_label = wl, .w_set = ws, .label_logp = logp[b][0], .set_logp = logp[b][1]));
        d->be->weight_free(d->dev, w);
    }
    assert_true(test_rel_error(dx[1], dx[0], n * h) < 2e-6);
    assert_true(test_rel_error(dw[1], dw[0], rows * h) < 2e-6);
    for (int i = 0; i < n; i++) {
        assert_near(logp[1][0][i], logp[0][0][i], 1e-5);
        assert_near(logp[1][1][i], logp[0][1][i], 1e-5);
    }
    for (int b = 2; b <= CPUS; b++) { /* whatever the threads */
        assert_memory_equal(dx[1], dx[b], n * h * sizeof(float));
        assert_memory_equal(dw[1], dw[b], rows * h * sizeof(float));
        assert_memory_equal(logp[1], logp[b], sizeof logp[1]);
    }
    for (int b = 0; b <= CPUS; b++)
        free(dx[b]), free(dw[b]);
    free(x), free(wt), free(wl), free(ws);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(values_match_definitions),
    cmocka_unit_test(gradients_match_differences),
    cmocka_unit_test(edges),
    cmocka_unit_test_setup_teardown(cpu_is_the_reference, cpu_open_all, cpu_close_all),
};
RT_SUITE(ops_likelihood, tests)
