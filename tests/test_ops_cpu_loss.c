/* The cpu backend's losses against the reference (see tests/ops_cpu.h). */
#include "tests/ops_cpu.h"
#include "tests/pack_ids.h"

/* ---- head ---- */
struct head {
    float *x, *w, *logp;
    int32_t *label, *ids;
    uint8_t *mask;
    int64_t n, H, V;
    int k;
    enum rt_tail tail;
    double w_ce, w_kl, T;
    double dw_before, dx_bound; /* deviation of what dw is added to; 0: the bound of everything else */
};

struct head_out {
    float *dx, *dw;
    double *row[4]; /* ce, kl, teacher_mass, student_mass */
    uint8_t *hit;
};

/* The reference takes the ids as they are, the others packed. */
static void run_head(struct rt_device *d, const struct head *t, const struct head_out *o, struct rt_err *err)
{
    struct rt_weight *w = ops_param(d, t->w, t->V, t->H);
    uint32_t *packed = d->be == &rt_backend_ref ? NULL : pack_ids(t->ids, t->n, t->k, t->V);
    const enum rt_status st = RT_OP(d, head_loss, err, .x = t->x, .w = w, .dx = o->dx, .dw = o->dw, .n = t->n, .H = t->H, .V = t->V,
                                    .label = t->label, .k = t->k, .id_bits = packed != NULL ? rt_top_ids_bits(t->V) : 0,
                                    .top_ids = packed != NULL ? (const void *)packed : t->ids, .top_logp = t->logp, .kl_mask = t->mask,
                                    .tail = t->tail, .w_ce = t->w_ce, .w_kl = t->w_kl, .T = t->T, .ce = o->row[0], .kl = o->row[1],
                                    .teacher_mass = o->row[2], .student_mass = o->row[3], .hit = o->hit);
    d->be->weight_free(d->dev, w);
    free(packed);
    if (st != RT_OK)
        fail_msg("%s", err->msg);
}

static struct head_out make_out(const struct head *t)
{
    struct head_out o = {randoms(t->n * t->H + GUARD, 1, 1), randoms(t->V * t->H + GUARD, 2, t->dw_before), {0}, NULL};
    for (int i = 0; i < 4; i++) {
        o.row[i] = calloc((size_t)t->n + 1, sizeof(double));
        assert_non_null(o.row[i]);
        o.row[i][t->n] = 12345;
    }
    o.hit = calloc((size_t)t->n + 1, 1);
    assert_non_null(o.hit);
    o.hit[t->n] = 77;
    return o;
}

static void free_out(struct head_out *o)
{
    free(o->dx), free(o->dw), free(o->hit);
    for (int i = 0; i < 4; i++)
        free(o->row[i]);
}

static void near_rows(const char *what, const char *name, const double *a, const double *b, int64_t n, double bound)
{
    for (int64_t i = 0; i < n; i++)
        if (!(fabs(a[i] - b[i]) <= bound * (1 + fabs(b[i]))))
            fail_msg("%s: %s of row %d is %.12g, expected %.12g", what, name, (int)i, a[i], b[i]);
}

/* Gradients within `bound` of the reference in norm, values of rows within `bound` of 1 + their size. */
static void hold_head(struct devices *all, const char *what, const struct head *t, double bound)
{
    static const char *const row_name[4] = {"ce", "kl", "teacher mass", "student mass"};
    struct rt_err err = {0};
    struct head_out o[1 + CPUS], alone = {0};
    const size_t dx = (size_t)(t->n * t->H) * sizeof(float), dw = (size_t)(t->V * t->H) * sizeof(float);
    float *base = randoms(t->V * t->H + GUARD, 2, t->dw_before);
    for (int b = 0; b <= CPUS; b++) {
        o[b] = make_out(t);
        run_head(b == 0 ? &all->ref : &all->cpu[b - 1], t, &o[b], &err);
        assert_memory_equal((char *)o[b].dw + dw, (char *)base + dw, GUARD * sizeof(float));
        assert_true(o[b].row[0][t->n] == 12345 && o[b].row[3][t->n] == 12345 && o[b].hit[t->n] == 77);
    }
    for (int i = 0; i < 4; i++)
        near_rows(what, row_name[i], o[1].row[i], o[0].row[i], t->n, bound);
    assert_memory_equal(o[1].hit, o[0].hit, (size_t)t->n);
    for (int b = 0; b <= 1; b++) /* what was added, not what it was added to */
        for (int64_t i = 0; i < t->V * t->H; i++)
            o[b].dw[i] -= base[i];
    for (int b = 2; b <= CPUS; b++) {
        assert_memory_equal(o[2].dw, o[b].dw, dw);
        assert_memory_equal(o[1].dx, o[b].dx, dx);
        for (int i = 0; i < 4; i++)
            assert_memory_equal(o[1].row[i], o[b].row[i], (size_t)t->n * sizeof(double));
    }
    const double rel_x = test_rel_error(o[1].dx, o[0].dx, t->n * t->H), rel_w = test_rel_error(o[1].dw, o[0].dw, t->V * t->H);
    if (!(rel_x <= (t->dx_bound > 0 ? t->dx_bound : bound) && rel_w <= bound))
        fail_msg("%s: relative error of dx %g, of dw %g, bound %g", what, rel_x, rel_w, bound);
    /* Each output on its own: the same values. */
    alone.dx = randoms(t->n * t->H + GUARD, 1, 1);
    run_head(&all->cpu[1], t, &alone, &err);
    assert_memory_equal(alone.dx, o[1].dx, dx + GUARD * sizeof(float));
    alone = (struct head_out){.dx = alone.dx, .row = {o[2].row[0], o[2].row[1]}};
    free(alone.dx);
    alone.dx = NULL;
    run_head(&all->cpu[0], t, &alone, &err);
    near_rows(what, "ce without gradients", o[2].row[0], o[1].row[0], t->n, 0);
    near_rows(what, "kl without gradients", o[2].row[1], o[1].row[1], t->n, 0);
    for (int b = 0; b <= CPUS; b++)
        free_out(&o[b]);
    free(base);
}

/* Logits of the teacher are normal with deviation `sharp`; ids are its k greatest in an order of their own. */
static struct head make_head(int64_t n, int64_t H, int64_t V, int k, double T, double sharp)
{
    struct head t = {.n = n, .H = H, .V = V, .k = k, .T = T, .w_ce = 0.3 / (double)n, .w_kl = 0.7 / (double)n, .dw_before = 1e-3};
    t.x = randoms(n * H, 11, 1);
    t.w = randoms(V * H, 12, 2 / sqrt((double)H));
    t.label = malloc((size_t)n * sizeof *t.label);
    t.ids = malloc((size_t)(n * k + 1) * sizeof *t.ids);
    t.logp = malloc((size_t)(n * k + 1) * sizeof *t.logp);
    t.mask = malloc((size_t)n);
    bool *taken = malloc((size_t)V * sizeof *taken);
    for (int64_t i = 0; i < n; i++) {
        float *z = randoms(V, 100 + (uint64_t)i, sharp);
        double sum = 0;
        for (int64_t v = 0; v < V; v++)
            sum += exp(z[v] / T);
        memset(taken, 0, (size_t)V);
        for (int j = 0; j < k; j++) {
            int64_t best = -1;
            for (int64_t v = 0; v < V; v++)
                if (!taken[v] && (best < 0 || z[v] > z[best]))
                    best = v;
            taken[best] = true;
            t.ids[i * k + j] = (int32_t)best;
            t.logp[i * k + j] = (float)(z[best] / T - log(sum));
        }
        t.mask[i] = i % 5 != 3;
        /* among the teacher's ids, anywhere, or none */
        t.label[i] = i % 4 == 0 && k > 0 ? t.ids[i * k + (i / 4) % k] : i % 4 == 1 ? -100 : (int32_t)(i * 37 % V);
        free(z);
    }
    free(taken);
    return t;
}

static void free_head(struct head *t)
{
    free(t->x), free(t->w), free(t->label), free(t->ids), free(t->logp), free(t->mask);
}

static void head_loss_forms(void **state)
{
    static const double temperature[] = {1, 2, 0.7};
    for (int i = 0; i < COUNT(temperature); i++)
        for (int tail = RT_TAIL_BUCKET; tail <= RT_TAIL_RENORM; tail++) {
            char what[64];
            struct head t = make_head(33, 40, 1000, 64, temperature[i], 3);
            t.tail = (enum rt_tail)tail;
            t.ids[5] = -1; /* a shorter list */
            t.ids[2 * 64 + 63] = -1;
            snprintf(what, sizeof what, "T=%g tail=%d", temperature[i], tail);
            hold_head(*state, what, &t, 2e-6);
            t.w_ce = 0;
            hold_head(*state, "KL alone", &t, 2e-6);
            free(t.mask);
            t.mask = NULL, t.w_ce = 0.1;
            hold_head(*state, "no mask", &t, 2e-6);
            t.k = 0;
            hold_head(*state, "CE alone", &t, 2e-6);
            free_head(&t);
        }
}

/* More rows than a tile, more ids than a panel, sizes of no round number; k up to V, where nothing is left off K. */
static void head_loss_sizes(void **state)
{
    static const struct { int n, H, V, k; } shape[] = {{1, 1, 2, 1}, {1100, 5, 33, 3}, {17, 24, 2500, 7}, {6, 130, 1025, 1}, {9, 8, 19, 19}};
    for (int i = 0; i < COUNT(shape); i++)
        for (int tail = RT_TAIL_BUCKET; tail <= RT_TAIL_RENORM; tail++) {
            char what[64];
            struct head t = make_head(shape[i].n, shape[i].H, shape[i].V, shape[i].k, i % 2 != 0 ? 1 : 1.5, 2);
            t.tail = (enum rt_tail)tail;
            if (shape[i].n == 1)
                t.label[0] = 1;
            snprintf(what, sizeof what, "n=%d H=%d V=%d k=%d tail=%d", shape[i].n, shape[i].H, shape[i].V, shape[i].k, tail);
            hold_head(*state, what, &t, 2e-6);
            free_head(&t);
        }
}

/* Products over subnormal numbers run a hundred times slower. */
static void no_subnormals(struct devices *all, const struct head *t)
{
    struct rt_err err = {0};
    struct head_out o = make_out(t);
    run_head(&all->cpu[0], t, &o, &err);
    for (int64_t i = 0; i < t->V * t->H; i++)
        assert_true(o.dw[i] == 0 || isnormal(o.dw[i]));
    free_out(&o);
}

/* x picks one column of w, so that logits are exact in float32 and dw, from 0, is dL/dz: held to its own size however small. Row i is
 * ever surer of one id: 1 - q falls from 0.5 to 1e-7, where float32 would know it to 50 %. */
static void confident_student(void **state)
{
    enum { N = 12, V = 300, K = 8 };
    for (int form = 0; form < 3; form++) {
        struct head t = make_head(N, N, V, K, form == 2 ? 2 : 1, form == 1 ? 0.5 : 3);
        memset(t.x, 0, N * N * sizeof(float));
        t.dw_before = 0;
        t.dx_bound = 2e-5; /* dL/dz sums to 0 and the columns of w have a mean of up to 20 times the rest: that cancels */
        for (int i = 0; i < N; i++) {
            t.x[i * N + i] = 1;
            t.mask[i] = form > 0;
            /* sure of the label; with a teacher, of its first id; in form 1 the tail of the teacher is large all the same */
            const int32_t top = form == 0 ? t.label[i] = 2 * i : t.ids[i * K];
            for (int v = 0; v < V; v++)
                t.w[v * N + i] = 0.25f * (float)((v * 7 + i) % 9) - (v == top ? 0.0f : 6.0f + 1.5f * (float)i);
            if (form > 0)
                t.label[i] = i % 2 ? top : -1;
        }
        for (int i = 0; i < N && form != 1; i++) { /* one row at a time: its gradient is not hidden behind a larger one */
            struct head one = t;
            one.n = 1, one.x += i * N, one.label += i, one.ids += i * K, one.logp += i * K, one.mask += i;
            hold_head(*state, form == 0 ? "sure of the label" : "sure of the teacher's id", &one, 2e-6);
        }
        hold_head(*state, "sure", &t, 2e-6);
        for (int j = 0; j < V * N; j++)
            t.w[j] *= 50; /* logits 1000 apart: nothing under- or overflows into the results */
        hold_head(*state, "utterly sure", &t, 2e-6);
        no_subnormals(*state, &t);
        free_head(&t);
    }
}

/* The teacher's mass off K falls to nothing, and below nothing by rounding. */
static void teacher_without_tail(void **state)
{
    enum { N = 10, K = 5 };
    struct head t = make_head(N, 6, 40, K, 1, 1);
    for (int i = 0; i < N; i++) {
        const double tail = i == 0 ? -1e-7 : pow(10, -i); /* row 0: a mass above 1; from row 8 on the bucket is dropped */
        double mass = 0;
        t.mask[i] = 1;
        for (int j = 0; j < K; j++)
            mass += exp(t.logp[i * K + j]);
        for (int j = 0; j < K; j++)
            t.logp[i * K + j] += (float)log((1 - tail) / mass);
        t.logp[i * K + K - 1] = i == 9 ? -INFINITY : t.logp[i * K + K - 1];
    }
    hold_head(*state, "teacher without tail", &t, 2e-6);
    t.tail = RT_TAIL_RENORM;
    for (int j = 0; j < K; j++)
        t.logp[3 * K + j] = -INFINITY; /* no mass at all: no KL */
    hold_head(*state, "teacher without tail, renormalised", &t, 2e-6);
    free_head(&t);
}

static void head_loss_hits(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    enum { V = 40 };
    float w[V] = {0};
    struct head t = {.x = (float[]){1, 1, 1, -1}, .w = w, .label = (int32_t[]){7, 30, -1, 3}, .ids = (int32_t[]){7, 9, 9, 9},
                     .logp = (float[]){-1, -1, -1, -1}, .mask = (uint8_t[]){1, 1, 0, 1}, .n = 4, .H = 1, .V = V, .k = 1, .T = 1,
                     .w_ce = 1, .w_kl = 1};
    uint8_t hit[4];
    struct head_out o = {.hit = hit};
    w[7] = w[9] = w[30] = 2; /* the smallest id of equal logits; under x = -1: id 0 */
    run_head(&all->cpu[0], &t, &o, &err);
    assert_true(hit[0] == 3 && hit[1] == 0 && hit[2] == 0 && hit[3] == 0);
    t.label[0] = 30;
    t.ids[0] = 30;
    t.label[3] = 0;
    run_head(&all->cpu[0], &t, &o, &err);
    assert_true(hit[0] == 0 && hit[3] == 1);
}

static void head_loss_passes_nan_on(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    struct head t = make_head(3, 8, 50, 4, 2, 1);
    struct head_out o = make_out(&t);
    t.label[0] = t.label[1] = t.label[2] = 5;
    t.mask[0] = t.mask[1] = t.mask[2] = 1;
    t.x[8] = NAN; /* row 1 */
    run_head(&all->cpu[0], &t, &o, &err);
    assert_true(isfinite(o.row[0][0]) && isfinite(o.row[0][2]) && isnan(o.row[0][1]) && isnan(o.row[1][1]));
    assert_true(isfinite(o.dx[0]) && isnan(o.dx[8]));
    t.x[8] = 0;
    t.w[20 * 8] = INFINITY; /* an infinite logit, or 0 * inf */
    run_head(&all->cpu[0], &t, &o, &err);
    assert_true(isnan(o.row[0][0]) && isnan(o.row[0][1]));
    free_out(&o);
    free_head(&t);
}

static void head_loss_refuses(void **state)
{
    struct devices *all = *state;
    struct rt_device *d = &all->cpu[0];
    struct rt_err err = {0};
    struct head t = make_head(3, 8, 50, 4, 1, 1);
    struct rt_weight *w = ops_param(d, t.w, 50, 8), *wrong = ops_param(d, t.w, 49, 8);
    struct rt_head_loss_args a = {.x = t.x, .w = w, .n = 3, .H = 8, .V = 50, .label = t.label, .k = 4, .top_ids = t.ids,
                                  .top_logp = t.logp, .kl_mask = t.mask, .T = 1, .w_ce = 1, .w_kl = 1};
    assert_ok(d->be->head_loss(d->dev, d->q, &a, &err));
    a.w = wrong;
    assert_status(d->be->head_loss(d->dev, d->q, &a, &err), SHAPE);
    a.w = w, a.T = 0;
    assert_status(d->be->head_loss(d->dev, d->q, &a, &err), SHAPE);
    a.T = 1, t.label[2] = 50;
    assert_status(d->be->head_loss(d->dev, d->q, &a, &err), SHAPE);
    t.label[2] = 0, t.ids[9] = 50, t.mask[2] = 1;
    assert_status(d->be->head_loss(d->dev, d->q, &a, &err), SHAPE);
    uint32_t *packed = pack_ids(t.ids, 3, 4, 50);
    a.top_ids = packed, a.id_bits = rt_top_ids_bits(50);
    assert_status(d->be->head_loss(d->dev, d->q, &a, &err), SHAPE);
    t.mask[2] = 0; /* not read then */
    assert_ok(d->be->head_loss(d->dev, d->q, &a, &err));
    free(packed);
    d->be->weight_free(d->dev, w);
    d->be->weight_free(d->dev, wrong);
    free_head(&t);
}

/* ---- features ---- */
struct feature {
    float *a, *b;
    int64_t n, cols;
    bool cosine;
};

/* The losses go out as pairs of floats: the reference's differ in the last bits of a double, so they are rounded first. */
static enum rt_status run_feature(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct feature *t = ctx;
    double loss[200];
    const enum rt_status st = RT_OP(d, feature_loss, err, .a = t->a, .b = t->b, .da = out[0], .loss = loss, .w = 0.3, .n = t->n,
                                    .cols = t->cols, .cosine = t->cosine);
    for (int64_t i = 0; i < t->n; i++)
        out[1][i] = (float)loss[i];
    return st;
}

static void feature_losses(void **state)
{
    static const int64_t shape[][2] = {{1, 1}, {2, 17}, {130, 96}};
    for (int i = 0; i < COUNT(shape); i++)
        for (int cosine = 0; cosine < 2; cosine++) {
            struct feature t = {.n = shape[i][0], .cols = shape[i][1], .cosine = cosine != 0};
            t.a = randoms(t.n * t.cols, 1, 1);
            t.b = randoms(t.n * t.cols, 2, 1);
            if (t.n > 2) {
                memset(t.a, 0, (size_t)t.cols * sizeof(float));           /* no direction */
                memset(t.b + t.cols, 0, (size_t)t.cols * sizeof(float));
                for (int64_t j = 2 * t.cols; j < 3 * t.cols; j++)         /* nearly there */
                    t.b[j] = t.a[j] * (1 + 1e-4f * t.b[j]);
            }
            if (t.cols > 1 || !t.cosine) /* one column has no angle: a gradient of rounding alone */
                hold(*state, cosine ? "cosine" : "mse", run_feature, &t, 2, (const int64_t[]){t.n * t.cols, t.n}, 1e-6);
            free(t.a), free(t.b);
        }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup_teardown(head_loss_forms, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(head_loss_sizes, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(confident_student, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(teacher_without_tail, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(head_loss_hits, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(head_loss_passes_nan_on, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(head_loss_refuses, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(feature_losses, cpu_open_all, cpu_close_all),
};
RT_SUITE(ops_cpu_loss, tests)
