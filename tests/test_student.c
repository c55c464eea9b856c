/* The student as a whole: gradients, packing, accumulation, backends, threads, optimiser. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "tests/student_fixture.h"

static const int lens[] = {9, 1, 14, 5, 2, 11, 3, 7};
enum { N_DOCS = 8 };

/* Every gradient of a against b, each within bound. */
static void compare_grads(const struct fx *a, const struct fx *b, double bound)
{
    for (int i = 0; i < a->p.n; i++) {
        float *x = fx_grad(a, i), *y = fx_grad(b, i);
        const double e = test_rel_error(x, y, rt_param_elements(&a->p.at[i]));
        if (!(e <= bound))
            fail_msg("%s: gradient differs by %g, bound %g", a->p.at[i].name, e, bound);
        free(x);
        free(y);
    }
}

/* f(block + eps * direction of entry i), in double */
static double moved_loss(struct fx *f, const struct fx_docs *docs, const struct rt_param *p, const double *base, double eps)
{
    struct rt_err err = {0};
    const int64_t n = rt_param_elements(p);
    double *x = malloc((size_t)n * sizeof *x), *at = (double *)rt_student_block(f->s) + p->offset;
    for (int64_t j = 0; j < n; j++)
        x[j] = base[j] + eps * rt_rng_normal(3, rt_rng_stream(p->name), (uint64_t)j);
    assert_ok(rt_device_upload(&f->d, at, x, (size_t)n * sizeof *x, &err));
    assert_ok(rt_device_sync(&f->d, &err));
    free(x);
    return fx_loss(f, docs, false);
}

/* The gradient of each tensor along a random direction against central differences in float64. */
static void finite_differences(void **state)
{
    struct rt_err err = {0};
    for (int kind = 0; kind < FX_N; kind++) {
        struct fx f;
        struct fx_docs docs;
        fx_open(&f, &rt_backend_ref64, 1, fx_config[kind]);
        fx_docs(&docs, &f, 5, (const int[]){5, 1, 4}, 3);
        fx_loss(&f, &docs, true);
        for (int i = 0; i < f.p.n; i++) {
            const struct rt_param *p = &f.p.at[i];
            const size_t n = (size_t)rt_param_elements(p);
            double *base = malloc(n * sizeof *base), *grad = malloc(n * sizeof *grad), dot = 0;
            assert_ok(rt_device_download(&f.d, base, (double *)rt_student_block(f.s) + p->offset, n * sizeof *base, &err));
            assert_ok(rt_device_download(&f.d, grad, (double *)rt_student_grads(f.s) + p->offset, n * sizeof *grad, &err));
            for (size_t j = 0; j < n; j++)
                dot += grad[j] * rt_rng_normal(3, rt_rng_stream(p->name), j);
            const double h = 1e-5, up = moved_loss(&f, &docs, p, base, h), down = moved_loss(&f, &docs, p, base, -h);
            const double slope = (up - down) / (2 * h);
            moved_loss(&f, &docs, p, base, 0);
            /* Truncation is of order h^2 times the third derivative, rounding 1e-16 * loss / h: both below 1e-8 of a slope near 1. */
            if (!(fabs(slope - dot) <= 1e-6 * (fabs(slope) + 1e-2)))
                fail_msg("%s %s: slope %.12g, gradient %.12g", rt_student_family_name(f.c.family), p->name, slope, dot);
            free(base);
            free(grad);
        }
        fx_close(&f);
    }
    (void)state;
}

/* Documents packed together, one by one, and in two batches: the same loss and gradients. */
static void packing_and_accumulation(void **state)
{
    const char *const names[] = {"ref", "cpu"};
    for (int b = 0; b < 2; b++)
        for (int kind = 0; kind < FX_N && fx_backend(names[b]) != NULL; kind++) {
            struct fx whole, parts;
            struct fx_docs docs;
            struct rt_err err = {0};
            fx_open(&whole, fx_backend(names[b]), 2, fx_config[kind]);
            fx_open(&parts, fx_backend(names[b]), 2, fx_config[kind]);
            fx_docs(&docs, &whole, 5, lens, N_DOCS);
            const double loss = fx_loss(&whole, &docs, true);
            double sum = 0;
            for (int i = 0; i < N_DOCS; i++) {
                const struct fx_docs one = fx_one(&docs, i);
                sum += fx_loss(&parts, &one, true);
            }
            /* float32 sums in another order: rounding of 1e-7 a term over some hundred terms */
            assert_true(fabs(sum - loss) <= 1e-5 * fabs(loss));
            compare_grads(&whole, &parts, 1e-5);
            /* += : a second pass without zeroing doubles. */
            fx_loss(&whole, &docs, true);
            float *twice = fx_grad(&whole, 0), *once = fx_grad(&parts, 0);
            for (int64_t j = 0; j < rt_param_elements(&whole.p.at[0]); j++)
                twice[j] /= 2;
            assert_true(test_rel_error(twice, once, rt_param_elements(&whole.p.at[0])) <= 1e-5);
            free(twice);
            free(once);
            assert_ok(rt_student_zero_grads(parts.s, &err));
            float *zero = fx_grad(&parts, 0);
            assert_true(zero[0] == 0);
            free(zero);
            fx_close(&whole);
            fx_close(&parts);
        }
    (void)state;
}

static void first_backward(void **state)
{
    const struct rt_backend *const all[] = {&rt_backend_ref, &rt_backend_ref64, fx_backend("cpu")};
    (void)state;
    for (int b = 0; b < 3 && all[b] != NULL; b++)
        for (int kind = 0; kind < FX_N; kind++)
            fx_first_backward(all[b], fx_config[kind], lens, N_DOCS);
}

/* cpu and ref from the same float32 weights; ref against its float64 self. */
static void backends_agree(void **state)
{
    const struct rt_backend *const other[] = {fx_backend("cpu"), &rt_backend_ref64};
    for (int b = 0; b < 2; b++)
        for (int kind = 0; kind < FX_N && other[b] != NULL; kind++) {
            struct fx a, r;
            struct fx_docs docs;
            float x[FX_TOKENS * 32], y[FX_TOKENS * 32];
            fx_open(&a, other[b], 2, fx_config[kind]);
            fx_open(&r, &rt_backend_ref, 1, fx_config[kind]);
            fx_docs(&docs, &a, 5, lens, N_DOCS);
            const double loss = fx_loss(&a, &docs, true), expected = fx_loss(&r, &docs, true);
            assert_true(fabs(loss - expected) <= 1e-5 * fabs(expected)); /* float32 against float32 */
            for (int l = RT_LAYER_FINAL; l <= a.c.layers; l++) {
                fx_fetch(&a, rt_student_hidden(a.s, l), docs.n * a.c.hidden, x);
                fx_fetch(&r, rt_student_hidden(r.s, l), docs.n * r.c.hidden, y);
                assert_true(test_rel_error(x, y, docs.n * a.c.hidden) <= 1e-5);
            }
            compare_grads(&a, &r, 2e-5);
            fx_close(&a);
            fx_close(&r);
        }
    (void)state;
}

/* In plain loops a document's states are the same bits packed or alone: positions begin at 0, nothing leaks in from neighbours. */
static void packed_states_exact(void **state)
{
    for (int kind = 0; kind < FX_N; kind++) {
        struct fx f;
        struct fx_docs docs;
        struct rt_err err = {0};
        float all[FX_TOKENS * 32], alone[FX_TOKENS * 32];
        fx_open(&f, &rt_backend_ref, 1, fx_config[kind]);
        fx_docs(&docs, &f, 5, lens, N_DOCS);
        const struct rt_student_batch b = fx_batch(&docs);
        assert_ok(rt_student_forward(f.s, &b, RT_KEEP_FINAL, &f.acts, &err));
        fx_fetch(&f, rt_student_hidden(f.s, RT_LAYER_FINAL), docs.n * f.c.hidden, all);
        for (int i = 0; i < N_DOCS; i++) {
            const struct fx_docs one = fx_one(&docs, i);
            const struct rt_student_batch single = fx_batch(&one);
            assert_ok(rt_student_forward(f.s, &single, RT_KEEP_FINAL, &f.acts, &err));
            fx_fetch(&f, rt_student_hidden(f.s, RT_LAYER_FINAL), one.n * f.c.hidden, alone);
            assert_memory_equal(all + docs.cu[i] * f.c.hidden, alone, (size_t)(one.n * f.c.hidden) * sizeof *alone);
        }
        fx_close(&f);
    }
    (void)state;
}

/* Final states do not depend on what is kept. */
static void keep_modes(void **state)
{
    struct fx f;
    struct fx_docs docs;
    struct rt_err err = {0};
    float all[FX_TOKENS * 32], few[FX_TOKENS * 32];
    fx_open(&f, &rt_backend_ref, 1, fx_config[FX_QWEN3]);
    fx_docs(&docs, &f, 5, lens, N_DOCS);
    const struct rt_student_batch b = fx_batch(&docs);
    const int64_t n = docs.n * f.c.hidden;
    for (int layer = RT_LAYER_FINAL; layer <= f.c.layers; layer++)
        for (int keep = RT_KEEP_FINAL; keep <= RT_KEEP_HIDDEN; keep++) {
            assert_ok(rt_student_forward(f.s, &b, RT_KEEP_ALL, &f.acts, &err));
            fx_fetch(&f, rt_student_hidden(f.s, layer), n, all);
            assert_ok(rt_student_forward(f.s, &b, (enum rt_student_keep)keep, &f.acts, &err));
            assert_true(f.acts.used == rt_student_activation_bytes(&f.c, b.n, (enum rt_student_keep)keep, 4));
            const void *h = rt_student_hidden(f.s, layer);
            if (keep == RT_KEEP_FINAL && layer != RT_LAYER_FINAL) {
                assert_null(h);
                continue;
            }
            fx_fetch(&f, h, n, few);
            assert_memory_equal(all, few, (size_t)n * sizeof *all);
        }
    assert_null(rt_student_hidden(f.s, f.c.layers + 1));
    assert_status(rt_student_backward(f.s, NULL, NULL, 0, false, &err), USAGE);
    fx_close(&f);
    (void)state;
}

/* Gradients are the same bits whatever is kept instead of computed again, of all layers or of some, and each arena is as large as it says. */
static void recompute_levels(void **state)
{
    (void)state;
    const struct rt_backend *const backends[] = {&rt_backend_ref, &rt_backend_cpu};
    for (int t = 0; t < 2 * FX_N; t++) {
        struct fx f;
        struct fx_docs docs;
        struct rt_err err = {0};
        float *first = NULL;
        size_t room = 0;
        char deep[1024]; /* four layers: with two, what they share holds what the one that needs it left */
        snprintf(deep, sizeof deep, "%s", fx_config[t / 2]);
        strstr(deep, "layers\": 2")[strlen("layers\": ")] = '4';
        fx_open(&f, backends[t % 2], 2, deep);
        fx_docs(&docs, &f, 5, lens, N_DOCS);
        const struct rt_student_batch b = fx_batch(&docs);
        const size_t bytes = (size_t)f.p.elements * sizeof *first;
        for (int at = 0; at <= 3 * f.c.layers; at++) { /* one layer after the other a level higher */
            struct rt_arena acts = {0};
            const int level = (at + f.c.layers - 1) / f.c.layers;
            const struct rt_student_kept kept = {rt_student_recompute(level), level * f.c.layers - at};
            /* of two hidden states, so that they are there at every level */
            const struct rt_student_extra extra[2] = {{1, f.dx}, {0, f.dx}};
            for (int64_t i = 0; i < docs.n * f.c.hidden; i++)
                ((float *)f.dx)[i] = (float)(i % 7) - 3;
            const size_t need = rt_student_kept_bytes(&f.c, docs.n, &kept, sizeof *first);
            /* the first layer at level 2 brings the gate and up that those share, as large as what it saves; at level 3, the set */
            assert_true(at == 0 || need < room || (at % f.c.layers == 1 && level > 1 && need <= room + 64 * 12));
            assert_true(at % f.c.layers > 0 || need == rt_student_activation_bytes(&f.c, docs.n, rt_student_recompute(level), sizeof *first));
            room = need;
            assert_ok(rt_device_arena(&f.d, need, "activations", &acts, &err));
            assert_ok(rt_student_zero_grads(f.s, &err));
            assert_ok(rt_student_forward_sent(f.s, &b, NULL, &kept, &acts, &err));
            assert_true(acts.used == acts.size);
            assert_ok(rt_student_backward(f.s, f.dx, extra, 2, false, &err));
            if (at == 0) {
                assert_non_null(first = malloc(bytes));
                memcpy(first, rt_student_grads(f.s), bytes);
            }
            assert_memory_equal(first, rt_student_grads(f.s), bytes);
            rt_device_arena_free(&f.d, &acts);
        }
        free(first);
        fx_close(&f);
    }
}

/* Batches that break the rules are refused before anything runs. */
static void bad_batches(void **state)
{
    struct fx f;
    struct rt_err err = {0};
    int32_t ids[80] = {0};
    fx_open(&f, &rt_backend_ref, 1, fx_config[FX_LLAMA]);
    const struct {
        int64_t n, n_seq;
        int32_t cu[4];
    } bad[] = {{0, 1, {0, 0}}, {4, 0, {0}}, {4, 1, {1, 4}}, {4, 1, {0, 3}}, {4, 2, {0, 0, 4}}, {4, 2, {0, 5, 4}}, {65, 1, {0, 65}}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_status(rt_student_forward(f.s, &(struct rt_student_batch){ids, bad[i].cu, bad[i].n, bad[i].n_seq}, RT_KEEP_FINAL, &f.acts,
                                         &err), USAGE);
    const int32_t cu[] = {0, 4};
    for (int32_t id = -1; id <= 47; id += 48) {
        ids[2] = id;
        assert_status(rt_student_forward(f.s, &(struct rt_student_batch){ids, cu, 4, 1}, RT_KEEP_FINAL, &f.acts, &err), USAGE);
    }
    ids[2] = 46;
    assert_ok(rt_student_forward(f.s, &(struct rt_student_batch){ids, cu, 4, 1}, RT_KEEP_FINAL, &f.acts, &err));
    struct rt_arena small = f.acts;
    small.size = 1000;
    assert_status(rt_student_forward(f.s, &(struct rt_student_batch){ids, cu, 4, 1}, RT_KEEP_FINAL, &small, &err), NOMEM);
    struct rt_student *s = NULL;
    assert_status(rt_student_create(&f.d, &f.c, &f.p, 65, &f.weights, &s, &err), USAGE);
    fx_close(&f);
    (void)state;
}

static void train(struct fx *f, int steps, double *losses)
{
    struct rt_err err = {0};
    struct rt_optimizer opt;
    struct rt_step_report report;
    struct fx_docs docs;
    fx_docs(&docs, f, 5, lens, N_DOCS);
    assert_ok(rt_optimizer_init(&opt, f->s, &(struct rt_adamw){.beta1 = .9, .beta2 = .95, .eps = 1e-8, .decay = .1, .clip = 1.0}, &f->moments, &err));
    for (int i = 0; i < steps; i++) {
        assert_ok(rt_student_zero_grads(f->s, &err));
        losses[i] = fx_loss(f, &docs, true);
        assert_ok(rt_optimizer_step(&opt, 1e-2, 1, &report, &err));
        assert_false(report.skipped);
    }
}

/* The number of threads changes no bit of losses and weights; the last model is wide enough to be cut into several tiles. */
static void threads_same_bytes(void **state)
{
    const struct rt_backend *be = fx_backend("cpu");
    const char *const configs[] = {
        fx_config[FX_QWEN2], fx_config[FX_QWEN3], fx_config[FX_LLAMA],
        "{\"model_type\": \"qwen3\", \"vocab_size\": 1100, \"hidden_size\": 160, \"intermediate_size\": 420, \"num_hidden_layers\": 1, "
        "\"num_attention_heads\": 5, \"head_dim\": 64, \"max_position_embeddings\": 64}",
    };
    if (be == NULL)
        be = fx_backend("ref");
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        struct fx one, two;
        double a[4], b[4];
        fx_open(&one, be, 1, configs[i]);
        fx_open(&two, be, 2, configs[i]);
        train(&one, 4, a);
        train(&two, 4, b);
        assert_memory_equal(a, b, sizeof a);
        assert_true(a[3] < a[0]); /* and it learns */
        assert_memory_equal(rt_student_block(one.s), rt_student_block(two.s), (size_t)one.p.elements * sizeof(float));
        fx_close(&one);
        fx_close(&two);
    }
    (void)state;
}

/* One AdamW step by the formula: clip, decay on all or on matrices only, bias correction; and a step that is not taken. */
static void adamw_step(void **state)
{
    for (int only = 0; only < 2; only++) {
        struct fx f;
        struct fx_docs docs;
        struct rt_err err = {0};
        struct rt_optimizer opt;
        struct rt_step_report r;
        const double lr = 1e-2, decay = 0.1, eps = 1e-8;
        fx_open(&f, &rt_backend_ref64, 1, fx_config[FX_QWEN2]);
        fx_docs(&docs, &f, 5, lens, N_DOCS);
        fx_loss(&f, &docs, true);
        const size_t n = (size_t)f.p.elements;
        double *p = malloc(n * sizeof *p), *q = malloc(n * sizeof *q), *g = malloc(n * sizeof *g), sum = 0;
        assert_ok(rt_device_download(&f.d, p, rt_student_block(f.s), n * sizeof *p, &err));
        assert_ok(rt_device_download(&f.d, g, rt_student_grads(f.s), n * sizeof *g, &err));
        for (size_t i = 0; i < n; i++)
            sum += g[i] * g[i];
        assert_ok(rt_optimizer_init(&opt, f.s, &(struct rt_adamw){.9, .95, eps, decay, 1e-2, only, false, 0, false}, &f.moments, &err));
        assert_ok(rt_optimizer_step(&opt, lr, 1, &r, &err));
        assert_true(fabs(r.grad_norm - sqrt(sum)) <= 1e-12 * sqrt(sum));
        assert_true(fabs(r.scale - 1e-2 / (sqrt(sum) + 1e-6)) <= 1e-12); /* this clip bites */
        assert_true(r.scale < 1 && opt.step == 1);
        assert_ok(rt_device_download(&f.d, q, rt_student_block(f.s), n * sizeof *q, &err));
        for (int t = 0; t < f.p.n; t++) {
            const struct rt_param *e = &f.p.at[t];
            const bool vector = e->kind == RT_PARAM_NORM || e->kind == RT_PARAM_BIAS;
            for (int64_t i = e->offset; i < e->offset + rt_param_elements(e); i++) {
                /* step 1: mhat = g, vhat = g^2 */
                const double grad = g[i] * r.scale, wd = only && vector ? 0 : decay;
                assert_true(fabs(q[i] - (p[i] - lr * (grad / (fabs(grad) + eps) + wd * p[i]))) <= 1e-12);
            }
        }
        const double nan_value = NAN;
        assert_ok(rt_device_upload(&f.d, rt_student_grads(f.s), &nan_value, sizeof nan_value, &err));
        assert_ok(rt_optimizer_step(&opt, lr, 1, &r, &err));
        assert_true(r.skipped && opt.step == 1);
        assert_ok(rt_device_download(&f.d, p, rt_student_block(f.s), n * sizeof *p, &err));
        assert_memory_equal(p, q, n * sizeof *p);
        assert_status(rt_optimizer_init(&opt, f.s, &(struct rt_adamw){.9, 1, eps, decay, 0, false, false, 0, false}, &f.moments, &err), USAGE);
        free(p);
        free(q);
        free(g);
        fx_close(&f);
    }
    (void)state;
}

static void schedules(void **state)
{
    const struct {
        enum rt_schedule_kind kind;
        int64_t step;
        double lr;
    } rows[] = {
        {RT_SCHEDULE_CONSTANT, 1, 0.5}, {RT_SCHEDULE_CONSTANT, 4, 2},  {RT_SCHEDULE_CONSTANT, 99, 2},
        {RT_SCHEDULE_LINEAR, 2, 1},     {RT_SCHEDULE_LINEAR, 9, 1.1},  {RT_SCHEDULE_LINEAR, 14, 0.2}, {RT_SCHEDULE_LINEAR, 50, 0.2},
        {RT_SCHEDULE_COSINE, 4, 2},     {RT_SCHEDULE_COSINE, 9, 1.1},  {RT_SCHEDULE_COSINE, 14, 0.2}, {RT_SCHEDULE_COSINE, 50, 0.2},
        {RT_SCHEDULE_COSINE, 6, 0.2 + 0.9 * (1 + 0.80901699437494742)}, /* cos(pi/5) */
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        const struct rt_schedule s = {rows[i].kind, 2, 0.1, 4, 14};
        assert_true(fabs(rt_schedule_lr(&s, rows[i].step) - rows[i].lr) < 1e-12);
    }
    const struct rt_schedule none = {RT_SCHEDULE_COSINE, 2, 0, 0, 1};
    assert_true(rt_schedule_lr(&none, 1) == 0);
    enum rt_schedule_kind k;
    assert_true(rt_schedule_from_name("cosine", &k) && k == RT_SCHEDULE_COSINE);
    assert_false(rt_schedule_from_name("cosinus", &k));
    (void)state;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(finite_differences), cmocka_unit_test(packing_and_accumulation), cmocka_unit_test(packed_states_exact),
    cmocka_unit_test(backends_agree),     cmocka_unit_test(keep_modes),               cmocka_unit_test(bad_batches),
    cmocka_unit_test(threads_same_bytes), cmocka_unit_test(adamw_step),               cmocka_unit_test(schedules),
    cmocka_unit_test(recompute_levels),   cmocka_unit_test(first_backward),
};
RT_SUITE(student, tests)
