/* Every backward operation against central finite differences in float64, and in float against float64. */
#include "tests/ops.h"

/* The scalar that is differentiated: c . output, for a fixed random c, which is then the gradient at the output. */
enum { N = 5, COLS = 6, OUT = 4, ROPE_POS = 8 };

/* ---- norm ---- */
struct norm_case {
    struct rt_device *d;
    struct rt_weight *w;
    double *x, *c, *y;
};
static double norm_loss(void *ctx)
{
    struct rt_err err = {0};
    struct norm_case *k = ctx;
    assert_ok(RT_OP(k->d, norm_fwd, &err, .x = k->x, .w = k->w, .y = k->y, .n = N, .cols = COLS, .eps = 1e-3f));
    return ops_dot(k->y, k->c, N * COLS);
}

static void norm_backward(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    double x[N * COLS], w[COLS], c[N * COLS], y[N * COLS], dx[N * COLS], dw[COLS] = {0}, plus[N * COLS];
    ops_fill(x, COUNT(x), 1);
    ops_fill(w, COUNT(w), 2);
    ops_fill(c, COUNT(c), 3);
    struct norm_case k = {&d, ops_param(&d, w, 1, COLS), x, c, y};
    /* a saved rstd of garbage: float64 recomputes */
    const float rstd[N] = {0};
    assert_ok(RT_OP(&d, norm_bwd, &err, .dy = c, .x = x, .w = k.w, .rstd = rstd, .dx = dx, .dw = dw, .n = N, .cols = COLS,
                    .eps = 1e-3f));
    ops_check_grad("norm dx", norm_loss, &k, x, COUNT(x), dx);
    ops_check_grad("norm dw", norm_loss, &k, w, COUNT(w), dw);

    /* += of both */
    for (int i = 0; i < COUNT(plus); i++)
        plus[i] = i;
    assert_ok(RT_OP(&d, norm_bwd, &err, .dy = c, .x = x, .w = k.w, .dx = plus, .dw = dw, .n = N, .cols = COLS, .eps = 1e-3f,
                    .accumulate = true));
    for (int i = 0; i < COUNT(plus); i++)
        assert_near(plus[i], i + dx[i], 1e-12);
    for (int j = 0; j < COLS; j++)
        dw[j] /= 2;
    ops_check_grad("norm dw +=", norm_loss, &k, w, COUNT(w), dw);

    d.be->weight_free(d.dev, k.w);
    k.w = NULL;
    assert_ok(RT_OP(&d, norm_bwd, &err, .dy = c, .x = x, .dx = dx, .n = N, .cols = COLS, .eps = 1e-3f));
    ops_check_grad("norm dx without weight", norm_loss, &k, x, COUNT(x), dx);
    rt_device_close(&d);
}

/* ---- heads: norm and rope ---- */
enum { HEADS = 2, D = 6, LDX = HEADS * D + 3 };
struct head_case {
    struct rt_device *d;
    struct rt_weight *w;
    double *x, *c, *y;
    const float *cos, *sin;
    const int32_t *position;
};
static double head_loss_of(void *ctx)
{
    struct rt_err err = {0};
    struct head_case *k = ctx;
    assert_ok(RT_OP(k->d, headnorm_rope_fwd, &err, .x = k->x, .ldx = LDX, .w = k->w, .y = k->y, .cos = k->cos, .sin = k->sin,
                    .position = k->position, .n = N, .heads = HEADS, .d = D, .eps = 1e-3f));
    return ops_dot(k->y, k->c, N * HEADS * D);
}

static void headnorm_rope_backward(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    double x[N * LDX], w[D], c[N * HEADS * D], y[N * HEADS * D], dx[N * LDX] = {0}, dw[D] = {0};
    float cs[ROPE_POS * D / 2], sn[ROPE_POS * D / 2];
    const int32_t position[N] = {0, 1, 2, 0, 7};
    for (int i = 0; i < COUNT(cs); i++) {
        cs[i] = cosf((float)i);
        sn[i] = sinf((float)i);
    }
    ops_fill(x, COUNT(x), 1);
    ops_fill(w, COUNT(w), 2);
    ops_fill(c, COUNT(c), 3);
    struct head_case k = {&d, ops_param(&d, w, 1, D), x, c, y, cs, sn, position};
    assert_ok(RT_OP(&d, headnorm_rope_bwd, &err, .dy = c, .x = x, .ldx = LDX, .w = k.w, .dx = dx, .lddx = LDX, .dw = dw, .cos = cs,
                    .sin = sn, .position = position, .n = N, .heads = HEADS, .d = D, .eps = 1e-3f));
    ops_check_grad("headnorm_rope dx", head_loss_of, &k, x, COUNT(x), dx);
    ops_check_grad("headnorm_rope dw", head_loss_of, &k, w, COUNT(w), dw);

    /* dx in place of dy */
    double in_place[N * HEADS * D];
    memcpy(in_place, c, sizeof c);
    assert_ok(RT_OP(&d, headnorm_rope_bwd, &err, .dy = in_place, .x = x, .ldx = LDX, .w = k.w, .dx = in_place, .cos = cs, .sin = sn,
                    .position = position, .n = N, .heads = HEADS, .d = D, .eps = 1e-3f));
    for (int t = 0; t < N; t++)
        assert_close(in_place + t * HEADS * D, dx + t * LDX, HEADS * D, 0);

    d.be->weight_free(d.dev, k.w);
    k.w = NULL;
    assert_ok(RT_OP(&d, headnorm_rope_bwd, &err, .dy = c, .x = x, .ldx = LDX, .dx = dx, .lddx = LDX, .cos = cs, .sin = sn,
                    .position = position, .n = N, .heads = HEADS, .d = D));
    ops_check_grad("rope dx", head_loss_of, &k, x, COUNT(x), dx);

    /* the columns of dx, and of what lies behind the heads, are summed: onto what was there, or anew */
    double db[LDX], sum[LDX] = {0};
    for (int first = 0; first < 2; first++) {
        for (int j = 0; j < LDX; j++) {
            db[j] = j;
            sum[j] = first ? 0 : j;
            for (int t = 0; t < N; t++) {
                dx[t * LDX + j] = j < HEADS * D ? dx[t * LDX + j] : t - j;
                sum[j] += dx[t * LDX + j];
            }
        }
        assert_ok(RT_OP(&d, headnorm_rope_bwd, &err, .dy = c, .x = x, .ldx = LDX, .dx = dx, .lddx = LDX, .db = db, .n_db = LDX, .cos = cs, .sin = sn,
                        .position = position, .n = N, .heads = HEADS, .d = D, .first = first != 0));
        assert_close(db, sum, LDX, 1e-12);
    }
    rt_device_close(&d);
}

/* ---- linear ---- */
struct linear_case {
    struct rt_device *d;
    struct rt_weight *w, *b;
    double *x, *c, *y;
};
static double linear_loss(void *ctx)
{
    struct rt_err err = {0};
    struct linear_case *k = ctx;
    assert_ok(RT_OP(k->d, linear_fwd, &err, .x = {k->x, NULL}, .w = k->w, .bias = k->b, .y = k->y, .n = N, .K = COLS, .N = OUT));
    return ops_dot(k->y, k->c, N * OUT);
}

static void linear_backward(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    enum { LDDY = OUT + 3 };
    double x[N * COLS], w[OUT * COLS], b[OUT], c[N * OUT], y[N * OUT], dy[N * LDDY], dx[N * COLS], dw[OUT * COLS] = {0}, db[OUT] = {0};
    ops_fill(x, COUNT(x), 1);
    ops_fill(w, COUNT(w), 2);
    ops_fill(b, COUNT(b), 4);
    ops_fill(c, COUNT(c), 3);
    ops_fill(dy, COUNT(dy), 9);
    for (int t = 0; t < N; t++)
        memcpy(dy + t * LDDY, c + t * OUT, OUT * sizeof *c);
    struct linear_case k = {&d, ops_param(&d, w, OUT, COLS), ops_param(&d, b, 1, OUT), x, c, y};
    assert_ok(RT_OP(&d, linear_dgrad, &err, .dy = dy, .lddy = LDDY, .w = k.w, .dx = dx, .n = N, .K = COLS, .N = OUT));
    ops_check_grad("linear dx", linear_loss, &k, x, COUNT(x), dx);
    double twice[N * COLS];
    memcpy(twice, dx, sizeof dx);
    assert_ok(RT_OP(&d, linear_dgrad, &err, .dy = c, .w = k.w, .dx = twice, .n = N, .K = COLS, .N = OUT, .accumulate = true));
    for (int i = 0; i < COUNT(dx); i++)
        assert_near(twice[i], 2 * dx[i], 1e-12);

    assert_ok(RT_OP(&d, linear_wgrad, &err, .dy = dy, .lddy = LDDY, .x = x, .dw = dw, .db = db, .n = N, .K = COLS, .N = OUT));
    ops_check_grad("linear dw", linear_loss, &k, w, COUNT(w), dw);
    ops_check_grad("linear db", linear_loss, &k, b, COUNT(b), db);
    double dw2[OUT * COLS], db2[OUT];
    memcpy(dw2, dw, sizeof dw);
    memcpy(db2, db, sizeof db);
    assert_ok(RT_OP(&d, linear_wgrad, &err, .dy = c, .x = x, .dw = dw2, .n = N, .K = COLS, .N = OUT));
    for (int i = 0; i < COUNT(dw); i++)
        assert_near(dw2[i], 2 * dw[i], 1e-12);
    assert_ok(RT_OP(&d, linear_wgrad, &err, .dy = c, .x = x, .dw = dw2, .db = db2, .n = N, .K = COLS, .N = OUT));
    for (int i = 0; i < OUT; i++)
        assert_near(db2[i], 2 * db[i], 1e-12);
    d.be->weight_free(d.dev, k.w);
    d.be->weight_free(d.dev, k.b);
    rt_device_close(&d);
}

/* ---- attention: q, k, v in one packed projection, two query heads to a key head ---- */
enum { NH = 4, NKV = 2, DQK = 3, DV = 2, TOK = 6, QKV = NH * DQK + NKV * DQK + NKV * DV };
static const int32_t cu[] = {0, 2, 2, TOK}; /* one sequence is empty */
struct attn_case {
    struct rt_device *d;
    double *qkv, *c, *o;
};
static const struct rt_attn_shape attn_shape = {cu, TOK, 3, NH, NKV, DQK, DV, 0.7f};
static double attn_loss(void *ctx)
{
    struct rt_err err = {0};
    struct attn_case *k = ctx;
    assert_ok(RT_OP(k->d, attn_fwd, &err, .s = attn_shape, .q = k->qkv, .k = k->qkv + NH * DQK, .v = k->qkv + (NH + NKV) * DQK,
                    .q_ld = QKV, .k_ld = QKV, .v_ld = QKV, .o = k->o));
    return ops_dot(k->o, k->c, TOK * NH * DV);
}

static void attention_backward(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    double qkv[TOK * QKV], c[TOK * NH * DV], o[TOK * NH * DV], dqkv[TOK * QKV];
    float delta[NH * TOK];
    ops_fill(qkv, COUNT(qkv), 1);
    ops_fill(c, COUNT(c), 2);
    for (int i = 0; i < COUNT(dqkv); i++)
        dqkv[i] = NAN; /* every element is written */
    struct attn_case k = {&d, qkv, c, o};
    attn_loss(&k);
    assert_ok(RT_OP(&d, attn_bwd, &err, .s = attn_shape, .q = qkv, .k = qkv + NH * DQK, .v = qkv + (NH + NKV) * DQK, .q_ld = QKV,
                    .k_ld = QKV, .v_ld = QKV, .o = o, .dout = c, .dq = dqkv, .dk = dqkv + NH * DQK, .dv = dqkv + (NH + NKV) * DQK,
                    .delta = delta));
    ops_check_grad("attention dqkv", attn_loss, &k, qkv, COUNT(qkv), dqkv);
    rt_device_close(&d);
}

/* ---- swiglu, embedding ---- */
struct swiglu_case {
    struct rt_device *d;
    double *gu, *c, *h;
};
static double swiglu_loss(void *ctx)
{
    struct rt_err err = {0};
    struct swiglu_case *k = ctx;
    assert_ok(RT_OP(k->d, swiglu_fwd, &err, .gate = k->gu, .up = k->gu + COLS, .ld = 2 * COLS, .h = k->h, .n = N, .I = COLS));
    return ops_dot(k->h, k->c, N * COLS);
}

static void swiglu_backward(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    double gu[N * 2 * COLS], c[N * COLS], h[N * COLS], dgu[N * 2 * COLS], again[N * COLS];
    ops_fill(gu, COUNT(gu), 1);
    ops_fill(c, COUNT(c), 2);
    struct swiglu_case k = {&d, gu, c, h};
    assert_ok(RT_OP(&d, swiglu_bwd, &err, .gate = gu, .up = gu + COLS, .dh = c, .ld = 2 * COLS, .dgate = dgu, .dup = dgu + COLS,
                    .h = again, .n = N, .I = COLS));
    ops_check_grad("swiglu", swiglu_loss, &k, gu, COUNT(gu), dgu);
    swiglu_loss(&k);
    assert_close(again, h, COUNT(h), 1e-15); /* the same product in another order */
    rt_device_close(&d);
}

/* x -> gate and up -> h -> down: the whole MLP, with gated_fwd's own product in it. */
struct gated_case {
    struct rt_device *d;
    struct rt_weight *up, *bias, *down;
    double *x, *c, *gu, *h, *y;
};
static double gated_loss(void *ctx)
{
    struct rt_err err = {0};
    struct gated_case *k = ctx;
    assert_ok(RT_OP(k->d, gated_fwd, &err, .x = k->x, .w = k->up, .bias = k->bias, .gate_up = k->gu, .h = k->h, .n = N, .K = OUT, .I = COLS, .kept = true));
    assert_ok(RT_OP(k->d, linear_fwd, &err, .x = {.data = k->h}, .w = k->down, .y = k->y, .n = N, .K = COLS, .N = OUT));
    return ops_dot(k->y, k->c, N * OUT);
}

static void gated_backward(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    double x[N * OUT], c[N * OUT], up[2 * COLS * OUT], bias[2 * COLS], down[OUT * COLS], gu[N * 2 * COLS], h[N * COLS], y[N * OUT], dh[N * COLS],
        dgu[N * 2 * COLS], again[N * COLS], dx[N * OUT], db[2 * COLS] = {0}, dw[2 * COLS * OUT] = {0};
    ops_fill(x, COUNT(x), 1);
    ops_fill(c, COUNT(c), 2);
    ops_fill(up, COUNT(up), 3);
    ops_fill(bias, COUNT(bias), 4);
    ops_fill(down, COUNT(down), 5);
    struct gated_case k = {&d, ops_param(&d, up, 2 * COLS, OUT), ops_param(&d, bias, 1, 2 * COLS), ops_param(&d, down, OUT, COLS), x, c, gu, h, y};
    gated_loss(&k);
    assert_ok(RT_OP(&d, gated_bwd, &err, .dy = c, .w = k.down, .gate_up = gu, .dh = dh, .d_gate_up = dgu, .h = again, .n = N, .N = OUT, .I = COLS));
    assert_close(again, h, COUNT(h), 1e-15);
    assert_ok(RT_OP(&d, linear_dgrad, &err, .dy = dgu, .w = k.up, .dx = dx, .n = N, .K = OUT, .N = 2 * COLS));
    assert_ok(RT_OP(&d, linear_wgrad, &err, .dy = dgu, .x = x, .dw = dw, .db = db, .n = N, .K = OUT, .N = 2 * COLS));
    ops_check_grad("gated x", gated_loss, &k, x, COUNT(x), dx);
    ops_check_grad("gated weight", gated_loss, &k, up, COUNT(up), dw);
    ops_check_grad("gated bias", gated_loss, &k, bias, COUNT(bias), db);
    d.be->weight_free(d.dev, k.up);
    d.be->weight_free(d.dev, k.bias);
    d.be->weight_free(d.dev, k.down);
    rt_device_close(&d);
}

struct embed_case {
    struct rt_device *d;
    struct rt_weight *table;
    const int32_t *ids;
    double *c, *out;
};
static double embed_loss(void *ctx)
{
    struct rt_err err = {0};
    struct embed_case *k = ctx;
    assert_ok(RT_OP(k->d, embed_fwd, &err, .ids = k->ids, .table = k->table, .out = k->out, .n = N, .cols = COLS));
    return ops_dot(k->out, k->c, N * COLS);
}

static void embedding_backward(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    enum { ROWS = 4 };
    const int32_t ids[N] = {2, 0, 2, 3, 2}, bad[N] = {0, 0, 0, 0, ROWS};
    double table[ROWS * COLS], c[N * COLS], out[N * COLS], dtable[ROWS * COLS] = {0};
    ops_fill(table, COUNT(table), 1);
    ops_fill(c, COUNT(c), 2);
    struct embed_case k = {&d, ops_param(&d, table, ROWS, COLS), ids, c, out};
    assert_ok(RT_OP(&d, embed_bwd, &err, .ids = ids, .dy = c, .dtable = dtable, .n = N, .cols = COLS, .rows = ROWS));
    ops_check_grad("embedding", embed_loss, &k, table, COUNT(table), dtable);
    assert_status(RT_OP(&d, embed_bwd, &err, .ids = bad, .dy = c, .dtable = dtable, .n = N, .cols = COLS, .rows = ROWS), SHAPE);
    assert_status(RT_OP(&d, embed_fwd, &err, .ids = bad, .table = k.table, .out = out, .n = N, .cols = COLS), SHAPE);
    d.be->weight_free(d.dev, k.table);
    rt_device_close(&d);
}

/* ---- the float backend reads what its forward saved ---- */
static void float_backwards_use_the_saved_values(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device f = ops_open(&rt_backend_ref), d = ops_open(&rt_backend_ref64);
    double qkv[TOK * QKV], c[TOK * NH * DV], o[TOK * NH * DV], dqkv[TOK * QKV];
    float qkv32[TOK * QKV], c32[TOK * NH * DV], o32[TOK * NH * DV], dqkv32[TOK * QKV], exact[TOK * QKV];
    float lse[NH * TOK], delta[NH * TOK];
    ops_fill(qkv, COUNT(qkv), 1); /* normal floats: the same values in both */
    ops_fill(c, COUNT(c), 2);
    ops_narrow(qkv32, qkv, COUNT(qkv));
    ops_narrow(c32, c, COUNT(c));
    struct attn_case k = {&d, qkv, c, o};
    attn_loss(&k);
    assert_ok(RT_OP(&d, attn_bwd, &err, .s = attn_shape, .q = qkv, .k = qkv + NH * DQK, .v = qkv + (NH + NKV) * DQK, .q_ld = QKV,
                    .k_ld = QKV, .v_ld = QKV, .o = o, .dout = c, .dq = dqkv, .dk = dqkv + NH * DQK, .dv = dqkv + (NH + NKV) * DQK,
                    .delta = delta));
    assert_ok(RT_OP(&f, attn_fwd, &err, .s = attn_shape, .q = qkv32, .k = qkv32 + NH * DQK, .v = qkv32 + (NH + NKV) * DQK,
                    .q_ld = QKV, .k_ld = QKV, .v_ld = QKV, .o = o32, .lse = lse));
    assert_ok(RT_OP(&f, attn_bwd, &err, .s = attn_shape, .q = qkv32, .k = qkv32 + NH * DQK, .v = qkv32 + (NH + NKV) * DQK,
                    .q_ld = QKV, .k_ld = QKV, .v_ld = QKV, .o = o32, .dout = c32, .lse = lse, .dq = dqkv32,
                    .dk = dqkv32 + NH * DQK, .dv = dqkv32 + (NH + NKV) * DQK, .delta = delta));
    ops_narrow(exact, dqkv, COUNT(dqkv));
    /* float32 rounding of o, lse and the stores: a few times 6e-8 */
    assert_true(test_rel_error(dqkv32, exact, COUNT(exact)) < 1e-6);

    double x[N * COLS], w[COLS], dy[N * COLS], dx[N * COLS], dw[COLS] = {0};
    float x32[N * COLS], w32[COLS], dy32[N * COLS], dx32[N * COLS], dw32[COLS] = {0}, y32[N * COLS], rstd[N];
    ops_fill(x, COUNT(x), 1);
    ops_fill(w, COUNT(w), 2);
    ops_fill(dy, COUNT(dy), 3);
    ops_narrow(x32, x, COUNT(x));
    ops_narrow(w32, w, COUNT(w));
    ops_narrow(dy32, dy, COUNT(dy));
    struct rt_weight *pw = ops_param(&d, w, 1, COLS), *pw32 = ops_param(&f, w32, 1, COLS);
    assert_ok(RT_OP(&d, norm_bwd, &err, .dy = dy, .x = x, .w = pw, .dx = dx, .dw = dw, .n = N, .cols = COLS, .eps = 1e-3f));
    assert_ok(RT_OP(&f, norm_fwd, &err, .x = x32, .w = pw32, .y = y32, .rstd = rstd, .n = N, .cols = COLS, .eps = 1e-3f));
    assert_ok(RT_OP(&f, norm_bwd, &err, .dy = dy32, .x = x32, .w = pw32, .rstd = rstd, .dx = dx32, .dw = dw32, .n = N, .cols = COLS,
                    .eps = 1e-3f));
    ops_narrow(exact, dx, COUNT(dx));
    assert_true(test_rel_error(dx32, exact, COUNT(dx)) < 1e-6);
    ops_narrow(exact, dw, COUNT(dw));
    assert_true(test_rel_error(dw32, exact, COUNT(dw)) < 1e-6);
    d.be->weight_free(d.dev, pw);
    f.be->weight_free(f.dev, pw32);
    rt_device_close(&f);
    rt_device_close(&d);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(norm_backward),
    cmocka_unit_test(headnorm_rope_backward),
    cmocka_unit_test(linear_backward),
    cmocka_unit_test(attention_backward),
    cmocka_unit_test(swiglu_backward),
    cmocka_unit_test(gated_backward),
    cmocka_unit_test(embedding_backward),
    cmocka_unit_test(float_backwards_use_the_saved_values),
};
RT_SUITE(ops_grad, tests)
