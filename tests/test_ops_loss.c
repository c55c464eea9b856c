/* The losses against finite differences in float64, against their definitions, and at their edges. */
#include "tests/ops.h"
#include "tests/pack_ids.h"

enum { N = 5, H = 4, V = 9, K = 3 };

struct loss_case {
    struct rt_device *d;
    struct rt_weight *w;
    double x[N * H], wt[V * H], dx[N * H], dw[V * H];
    int32_t label[N], ids[N * K];
    float logp[N * K];
    uint8_t mask[N];
    double ce[N], kl[N], teacher[N], student[N];
    uint8_t hit[N];
    enum rt_tail tail;
    double w_ce, w_kl, T;
};

static void run(struct loss_case *c, bool grads)
{
    struct rt_err err = {0};
    uint32_t *packed = pack_ids(c->ids, N, K, V);
    assert_ok(RT_OP(c->d, head_loss, &err, .x = c->x, .w = c->w, .dx = grads ? c->dx : NULL, .dw = grads ? c->dw : NULL, .n = N, .H = H,
                    .V = V, .label = c->label, .k = K, .id_bits = rt_top_ids_bits(V), .top_ids = packed, .top_logp = c->logp, .kl_mask = c->mask,
                    .tail = c->tail, .w_ce = c->w_ce, .w_kl = c->w_kl, .T = c->T, .ce = c->ce, .kl = c->kl, .teacher_mass = c->teacher,
                    .student_mass = c->student, .hit = c->hit));
    free(packed);
}

static double total(void *ctx)
{
    struct loss_case *c = ctx;
    double sum = 0;
    run(c, false);
    for (int i = 0; i < N; i++)
        sum += c->w_ce * c->ce[i] + c->w_kl * c->kl[i];
    return sum;
}

/* A teacher of random logits at temperature T: the K greatest in an order that is not by id. */
static void make_case(struct loss_case *c, struct rt_device *d, double T)
{
    *c = (struct loss_case){.d = d, .w_ce = 0.3, .w_kl = 0.7, .T = T};
    ops_fill(c->x, N * H, 1);
    ops_fill(c->wt, V * H, 2);
    c->w = ops_param(d, c->wt, V, H);
    for (int i = 0; i < N; i++) {
        double z[V], sum = 0;
        bool taken[V] = {false};
        ops_fill(z, V, 50 + (uint64_t)i);
        for (int v = 0; v < V; v++)
            sum += exp(z[v] / T);
        for (int j = 0; j < K; j++) {
            int best = -1;
            for (int v = 0; v < V; v++)
                if (!taken[v] && (best < 0 || z[v] > z[best]))
                    best = v;
            taken[best] = true;
            c->ids[i * K + j] = best;
            c->logp[i * K + j] = (float)(z[best] / T - log(sum));
        }
        c->label[i] = (int32_t)((i * 4 + 1) % V);
        c->mask[i] = 1;
    }
    /* one row without a label, one without KL, one with neither */
    c->label[1] = -100;
    c->mask[2] = 0;
    c->label[3] = -100;
    c->mask[3] = 0;
}

static void check_gradients(struct loss_case *c, const char *what)
{
    memset(c->dw, 0, sizeof c->dw);
    for (int i = 0; i < N * H; i++)
        c->dx[i] = NAN; /* = : every element is written */
    run(c, true);
    double dx[N * H], dw[V * H];
    memcpy(dx, c->dx, sizeof dx);
    memcpy(dw, c->dw, sizeof dw);
    ops_check_grad(what, total, c, c->x, N * H, dx);
    ops_check_grad(what, total, c, c->wt, V * H, dw);
    run(c, true); /* dw += */
    for (int i = 0; i < V * H; i++)
        assert_near(c->dw[i], 2 * dw[i], 1e-12);
}

static void gradients_match_differences(void **state)
{
    (void)state;
    struct rt_device d = ops_open(&rt_backend_ref64);
    static const struct { const char *what; enum rt_tail tail; double w_ce, w_kl, T; } cases[] = {
        {"ce", RT_TAIL_BUCKET, 1, 0, 1},           {"bucket T=1", RT_TAIL_BUCKET, 0, 1, 1},
        {"bucket T=2", RT_TAIL_BUCKET, 0, 1, 2},   {"renorm T=1", RT_TAIL_RENORM, 0, 1, 1},
        {"renorm T=2", RT_TAIL_RENORM, 0, 1, 2},   {"ce + bucket T=2", RT_TAIL_BUCKET, 0.3, 0.7, 2},
        {"ce + renorm T=0.6", RT_TAIL_RENORM, 0.5, 0.5, 0.6},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        struct loss_case c;
        make_case(&c, &d, cases[i].T);
        c.tail = cases[i].tail;
        c.w_ce = cases[i].w_ce;
        c.w_kl = cases[i].w_kl;
        check_gradients(&c, cases[i].what);
        for (int j = 0; j < H; j++) /* the row that takes neither */
            assert_true(c.dx[3 * H + j] == 0);
        d.be->weight_free(d.dev, c.w);
    }
    rt_device_close(&d);
}

/* Each definition once more, from probabilities. */
static void values_match_definitions(void **state)
{
    (void)state;
    struct rt_device d = ops_open(&rt_backend_ref64);
    for (int renorm = 0; renorm < 2; renorm++) {
        struct loss_case c;
        make_case(&c, &d, 2);
        c.tail = renorm ? RT_TAIL_RENORM : RT_TAIL_BUCKET;
        run(&c, false);
        for (int v = 0, best = 0; v < V; v++) { /* the row without KL: its argmax is the teacher's, and yet no hit */
            best = ops_dot(c.x + 2 * H, c.wt + v * H, H) > ops_dot(c.x + 2 * H, c.wt + best * H, H) ? v : best;
            c.ids[2 * K] = best;
        }
        run(&c, false);
        for (int i = 0; i < N; i++) {
            double z[V], q[V], sum1 = 0, sumT = 0, P = 0, Q = 0, kl = 0;
            int best = 0;
            for (int v = 0; v < V; v++) {
                z[v] = ops_dot(c.x + i * H, c.wt + v * H, H);
                sum1 += exp(z[v]);
                sumT += exp(z[v] / 2);
                best = z[v] > z[best] ? v : best;
            }
            for (int v = 0; v < V; v++)
                q[v] = exp(z[v] / 2) / sumT;
            for (int j = 0; j < K; j++) {
                P += exp(c.logp[i * K + j]);
                Q += q[c.ids[i * K + j]];
            }
            for (int j = 0; j < K; j++) {
                const double p = exp(c.logp[i * K + j]) / (renorm ? P : 1), qj = q[c.ids[i * K + j]] / (renorm ? Q : 1);
                kl += p * log(p / qj);
            }
            if (!renorm)
                kl += (1 - P) * log((1 - P) / (1 - Q));
            const bool has_kl = c.mask[i] != 0;
            assert_near(c.ce[i], c.label[i] >= 0 ? log(sum1) - z[c.label[i]] : 0, 1e-12);
            assert_near(c.kl[i], has_kl ? 4 * kl : 0, 1e-12);
            assert_near(c.teacher[i], has_kl ? P : 0, 1e-12);
            assert_near(c.student[i], has_kl ? Q : 0, 1e-12);
            assert_int_equal(c.hit[i], (best == c.label[i]) | (has_kl && best == c.ids[i * K]) << 1);
        }
        d.be->weight_free(d.dev, c.w);
    }
    rt_device_close(&d);
}

static void without_a_teacher(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    struct loss_case c;
    make_case(&c, &d, 1);
    c.w_kl = 0;
    run(&c, true);
    double dx[N * H], ce[N];
    assert_ok(RT_OP(&d, head_loss, &err, .x = c.x, .w = c.w, .dx = dx, .n = N, .H = H, .V = V, .label = c.label, .w_ce = c.w_ce, .T = 1,
                    .ce = ce));
    assert_close(dx, c.dx, N * H, 0);
    assert_close(ce, c.ce, N, 0);
    c.label[0] = V;
    assert_status(RT_OP(&d, head_loss, &err, .x = c.x, .w = c.w, .n = N, .H = H, .V = V, .label = c.label, .T = 1), SHAPE);
    d.be->weight_free(d.dev, c.w);
    rt_device_close(&d);
}

/* All the teacher's mass on K: the bucket goes, without a jump in the loss; empty entries and -inf count nowhere. */
static void a_vanishing_tail(void **state)
{
    (void)state;
    struct rt_device d = ops_open(&rt_backend_ref64);
    struct loss_case c;
    make_case(&c, &d, 2);
    for (int i = 0; i < N; i++) { /* P_R = 3e-7, kept */
        c.logp[i * K] = logf(0.5f);
        c.logp[i * K + 1] = logf(0.25f);
        c.logp[i * K + 2] = logf(0.25f - 3e-7f);
    }
    check_gradients(&c, "a tail of 3e-7");
    double kl = c.kl[0];
    for (int i = 0; i < N && c.mask[i] != 0; i++) { /* from the definition: the term of the tail is there */
        double z, sum = 0, off = 0, mass = 0, expected = 0;
        for (int v = 0; v < V; v++) {
            z = exp(ops_dot(c.x + i * H, c.wt + v * H, H) / 2);
            sum += z;
            off += v != c.ids[i * K] && v != c.ids[i * K + 1] && v != c.ids[i * K + 2] ? z : 0;
        }
        for (int j = 0; j < K; j++) {
            const double p = exp(c.logp[i * K + j]);
            mass += p;
            expected += p * (c.logp[i * K + j] - ops_dot(c.x + i * H, c.wt + c.ids[i * K + j] * H, H) / 2 + log(sum));
        }
        expected += (1 - mass) * log((1 - mass) / (off / sum));
        assert_near(c.kl[i], 4 * expected, 1e-12);
    }
    for (int i = 0; i < N; i++)
        c.logp[i * K + 2] = logf(0.25f);
    check_gradients(&c, "no tail");
    /* p log p of 3e-7 at both sides of the threshold: 3e-7 * (15 + a few nats), times T^2 = 4 */
    assert_near(c.kl[0], kl, 4 * 3e-7 * 25);

    for (int i = 0; i < N; i++) {
        c.ids[i * K + 1] = -1;
        c.logp[i * K + 2] = -INFINITY;
    }
    check_gradients(&c, "an empty entry and one without mass");
    assert_near(c.teacher[0], 0.5, 1e-7);
    c.tail = RT_TAIL_RENORM;
    check_gradients(&c, "the same, renormalised");
    for (int i = 0; i < N; i++)
        c.ids[i * K] = -1;
    run(&c, true); /* no mass at all */
    assert_near(c.kl[0], 0, 0);
    assert_true(isfinite(ops_dot(c.dx, c.dx, N * H)));
    d.be->weight_free(d.dev, c.w);
    rt_device_close(&d);
}

/* Logits of +-500: 1 - sum_K q is 0 or garbage in float64, the loss and its gradient are neither. */
static void a_very_confident_student(void **state)
{
    (void)state;
    const struct rt_backend *const tables[] = {&rt_backend_ref64, &rt_backend_ref};
    for (int b = 0; b < 2; b++) {
        struct rt_err err = {0};
        struct rt_device d = ops_open(tables[b]);
        const bool wide = tables[b]->act == RT_F64;
        const double x[2] = {1, 1}, w[4] = {500, 0, -500, 0}; /* H = 1, two rows; V = 4 */
        const float x32[2] = {1, 1}, w32[4] = {500, 0, -500, 0};
        double w64[4];
        float wf[4];
        memcpy(w64, w, sizeof w);
        memcpy(wf, w32, sizeof w32);
        struct rt_weight *p = ops_param(&d, wide ? (void *)w64 : (void *)wf, 4, 1);
        const int32_t label[2] = {0, 2}, ids[4] = {0, 1, 2, 3};
        const float logp[4] = {logf(0.6f), logf(0.3f), logf(0.6f), logf(0.3f)};
        const uint8_t mask[2] = {1, 1};
        double kl[2], ce[2], student[2], dx[2];
        float dx32[2];
        assert_ok(RT_OP(&d, head_loss, &err, .x = wide ? (const void *)x : (const void *)x32, .w = p,
                        .dx = wide ? (void *)dx : (void *)dx32,
                        .n = 2, .H = 1, .V = 4,
                        .label = label, .k = 2, .top_ids = ids, .top_logp = logp, .kl_mask = mask, .w_ce = 0.5, .w_kl = 0.5, .T = 1,
                        .ce = ce, .kl = kl, .student_mass = student));
        /* row 0: q = (1, e-500 | e-1000, e-500), Q_R = e-500; row 1: K = {2, 3}, q = (e-1000, e-500), Q_R = 1 */
        const double entropy = 0.6 * log(0.6) + 0.3 * log(0.3) + 0.1 * log(0.1);
        assert_near(kl[0], entropy + 0.3 * 500 + 0.1 * 500, 1e-4); /* logp is float32: 3e-8 * 500 */
        assert_near(kl[1], entropy + 0.6 * 1000 + 0.3 * 500, 1e-4);
        assert_near(ce[0], 0, 1e-12);
        assert_near(ce[1], 1000, 1e-9);
        assert_near(student[0], 1, 1e-12);
        /* dx = sum_v dz_v w_v; row 0: KL: (1 - .6) 500 on id 0, ids 1 and 3 have w = 0, id 2 has e-1000 P_R/Q_R; CE: 0 */
        const double d0 = wide ? dx[0] : dx32[0], d1 = wide ? dx[1] : dx32[1];
        assert_near(d0, 0.5 * 0.4 * 500, 1e-4);
        /* row 1: KL: id 0 has 1 - P_R = .9, id 2 has -.6; CE: id 0 has 1, id 2 has -1 */
        assert_near(d1, 0.5 * (0.9 * 500 + 0.6 * 500 + 500 + 500), 1e-4);
        d.be->weight_free(d.dev, p);
        rt_device_close(&d);
    }
}

/* The softmax part of every row's gradient sums to zero over the vocabulary: a shift of all logits changes no loss. With
 * w = one constant column the gradient at x is that sum. */
static void a_shift_changes_nothing(void **state)
{
    (void)state;
    struct rt_device d = ops_open(&rt_backend_ref64);
    for (int renorm = 0; renorm < 2; renorm++) {
        struct loss_case c;
        make_case(&c, &d, 2);
        c.tail = renorm ? RT_TAIL_RENORM : RT_TAIL_BUCKET;
        for (int v = 0; v < V; v++)
            c.wt[v * H] = 1;
        run(&c, true);
        for (int i = 0; i < N; i++)
            assert_near(c.dx[i * H], 0, 1e-14);
        d.be->weight_free(d.dev, c.w);
    }
    rt_device_close(&d);
}

struct feature_case {
    struct rt_device *d;
    double a[N * H], da[N * H], loss[N];
    float b[N * H];
    bool cosine;
};
static double feature_total(void *ctx)
{
    struct rt_err err = {0};
    struct feature_case *c = ctx;
    double sum = 0;
    assert_ok(RT_OP(c->d, feature_loss, &err, .a = c->a, .b = c->b, .loss = c->loss, .w = 0.3, .n = N, .cols = H, .cosine = c->cosine));
    for (int i = 0; i < N; i++)
        sum += 0.3 * c->loss[i];
    return sum;
}

static void feature_losses(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    struct feature_case c = {.d = &d};
    ops_fill(c.a, N * H, 1);
    ops_fill32(c.b, N * H, 2);
    for (int cosine = 0; cosine < 2; cosine++) {
        c.cosine = cosine != 0;
        assert_ok(RT_OP(&d, feature_loss, &err, .a = c.a, .b = c.b, .da = c.da, .w = 0.3, .n = N, .cols = H, .cosine = c.cosine));
        ops_check_grad(cosine ? "cosine" : "mse", feature_total, &c, c.a, N * H, c.da);
    }
    const double a[4] = {3, 4, 0, 0};
    const float b[4] = {4, 3, 1, 2};
    double da[4], loss[2];
    assert_ok(RT_OP(&d, feature_loss, &err, .a = a, .b = b, .da = da, .loss = loss, .w = 2, .n = 2, .cols = 2));
    assert_near(loss[0], 1, 1e-15);
    assert_near(loss[1], 2.5, 1e-15);
    assert_near(da[0], -2, 1e-15);
    assert_near(da[3], -4, 1e-15);
    assert_ok(RT_OP(&d, feature_loss, &err, .a = a, .b = b, .da = da, .loss = loss, .w = 2, .n = 2, .cols = 2, .cosine = true));
    assert_near(loss[0], 1 - 24.0 / 25, 1e-15);
    assert_near(loss[1], 1, 0); /* no direction */
    assert_near(da[2], 0, 0);
    rt_device_close(&d);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(gradients_match_differences),
    cmocka_unit_test(values_match_definitions),
    cmocka_unit_test(without_a_teacher),
    cmocka_unit_test(a_vanishing_tail),
    cmocka_unit_test(a_very_confident_student),
    cmocka_unit_test(a_shift_changes_nothing),
    cmocka_unit_test(feature_losses),
};
RT_SUITE(ops_loss, tests)
