/* Norms, e4m3 forms and gating on the GPU. Every subset of the outputs must have the bits of all of them together. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "tests/cuda_ops.h"

/* A few numbers rounded once; two roundings, of a sum and of what is made of it: sqrt(2) times 1.66e-3 in the mean square. */
#define FEW 4e-3
#define TWICE 3.5e-3

/* Room for the e4m3 form of [n, cols] on the GPU, poisoned. */
static struct rt_act room(struct cuda_pair *p, int64_t n, int64_t cols)
{
    return (struct rt_act){cuda_bytes(p, NULL, (size_t)(rt_act_rows(n) * cols)),
                           cuda_bytes(p, NULL, (size_t)(rt_act_rows(n) * (cols / 128)) * sizeof(float))};
}

static void room_free(struct cuda_pair *p, struct rt_act q)
{
    cuda_free(p, q.data);
    cuda_free(p, q.scale);
}

/* q on the GPU is the e4m3 form that ref makes of x [n, cols], bit for bit; the rows added are zeros. */
static void check_form(struct cuda_pair *p, struct rt_act q, const float *x, int64_t n, int64_t cols, bool pow2)
{
    struct rt_err err = {0};
    const int64_t rows = rt_act_rows(n), blocks = cols / 128;
    uint8_t *code = (uint8_t *)cuda_floats(rows * cols / 4 + 1);
    struct rt_act want = {cuda_floats(n * cols / 4 + 1), cuda_floats(n * blocks)};
    float *scale = cuda_floats(rows * blocks);
    assert_ok(RT_OP(&p->ref, quant, &err, .x = x, .q = want, .n = n, .cols = cols, .pow2 = pow2));
    cuda_get(p, code, q.data, (size_t)(rows * cols));
    cuda_get(p, scale, q.scale, (size_t)(rows * blocks) * sizeof *scale);
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t b = 0; b < blocks; b++) {
            const float s = t < n ? want.scale[b * n + t] : 0;
            if (!(scale[b * rows + t] == s))
                fail_msg("row %d, block %d: scale %g, expected %g", (int)t, (int)b, (double)scale[b * rows + t], (double)s);
        }
        for (int64_t j = 0; j < cols; j++) {
            const uint8_t c = t < n ? ((uint8_t *)want.data)[t * cols + j] : 0;
            if (code[t * cols + j] != c)
                fail_msg("row %d, column %d: code %d, expected %d (x %g, scale %g)", (int)t, (int)j, code[t * cols + j], c,
                         t < n ? (double)x[t * cols + j] : 0.0, (double)scale[j / 128 * rows + t]);
        }
    }
    rt_free(code);
    rt_free(scale);
    rt_free(want.data);
    rt_free(want.scale);
}

/* x [n, cols] out of rows at distance ld */
static void dense(float *to, const float *x, int64_t n, int64_t cols, int64_t ld)
{
    for (int64_t t = 0; t < n; t++)
        memcpy(to + t * cols, x + t * ld, (size_t)cols * sizeof *to);
}

/* ---- norm_fwd ---- */
enum which { SUM = 1, Y = 2, YQ = 4, RSTD = 8, SUM_OVER_X = 16, SUM_OVER_ADD = 32, Y_OVER_X = 64 };
enum weight { NONE, BF16_W, F32_W };

struct norm {
    int64_t n, cols, ldx, ldy;
    bool add;
    enum weight weight;
};

struct norm_data {
    float *x, *add, *sum, *y, *rstd; /* sum .. rstd: of the GPU, all outputs asked for */
    struct cuda_weight w;
};

/* One call with the outputs `which`; what it wrote must be what d holds, or is put there with `keep`. */
static void norm_call(struct cuda_pair *p, const struct norm *c, struct norm_data *d, unsigned which, bool keep)
{
    struct rt_err err = {0};
    const int64_t n = c->n, cols = c->cols, ldx = c->ldx ? c->ldx : cols, ldy = which & Y_OVER_X ? ldx : c->ldy ? c->ldy : cols;
    void *x = cuda_act(p, d->x, n * ldx), *add = c->add ? cuda_act(p, d->add, n * cols) : NULL;
    void *sum = which & SUM_OVER_X ? x : which & SUM_OVER_ADD ? add : which & SUM ? cuda_act(p, NULL, n * cols) : NULL;
    void *y = which & Y_OVER_X ? x : which & Y ? cuda_act(p, NULL, n * ldy) : NULL;
    float *rstd = which & RSTD ? cuda_bytes(p, NULL, (size_t)n * sizeof *rstd) : NULL;
    struct rt_act yq = {0};
    float *got = cuda_floats(n * (ldx > ldy ? ldx : ldy)), *row = cuda_floats(n * cols);
    const bool pow2 = which & RSTD;
    if (which & YQ)
        yq = room(p, n, cols);
    assert_ok(RT_OP(&p->gpu, norm_fwd, &err, .x = x, .add = add, .w = d->w.gpu, .sum = sum, .y = y, .yq = yq, .rstd = rstd, .n = n, .cols = cols,
                    .ldx = c->ldx, .ldy = which & Y_OVER_X ? c->ldx : c->ldy, .eps = 1e-6f, .pow2 = pow2));
    if (sum != NULL) {
        cuda_get_act(p, got, sum, n * cols);
        assert_memory_equal(memcpy(keep ? d->sum : row, got, (size_t)(n * cols) * sizeof *row), d->sum, (size_t)(n * cols) * sizeof *row);
    }
    if (y != NULL) {
        cuda_get_act(p, got, y, n * ldy);
        dense(keep ? d->y : row, got, n, cols, ldy);
        if (!keep)
            assert_memory_equal(row, d->y, (size_t)(n * cols) * sizeof *row);
        for (int64_t t = 0; t < n; t++) /* between the rows: as it was */
            for (int64_t j = cols; j < ldy; j++)
                assert_true(which & Y_OVER_X ? got[t * ldy + j] == d->x[t * ldx + j] : isnan(got[t * ldy + j]));
    }
    if (rstd != NULL) {
        cuda_get(p, got, rstd, (size_t)n * sizeof *got);
        assert_memory_equal(memcpy(keep ? d->rstd : row, got, (size_t)n * sizeof *row), d->rstd, (size_t)n * sizeof *row);
    }
    if (which & YQ)
        check_form(p, yq, d->y, n, cols, pow2);
    cuda_free(p, x);
    cuda_free(p, add);
    if (which & SUM)
        cuda_free(p, sum);
    if (which & Y)
        cuda_free(p, y);
    cuda_free(p, rstd);
    room_free(p, yq);
    rt_free(got);
    rt_free(row);
}

static void norm_case(struct cuda_pair *p, const struct norm *c)
{
    struct rt_err err = {0};
    char what[80];
    const int64_t n = c->n, cols = c->cols, ldx = c->ldx ? c->ldx : cols;
    struct norm_data d = {cuda_floats(n * ldx), cuda_floats(n * cols), cuda_floats(n * cols), cuda_floats(n * cols), cuda_floats(n), {0}};
    float *sum = cuda_floats(n * cols), *y = cuda_floats(n * cols), *rstd = cuda_floats(n);
    const unsigned all = SUM | Y | RSTD | (cols % 128 == 0 ? YQ : 0);
    const unsigned some[] = {SUM, Y, RSTD, Y | RSTD, Y | SUM_OVER_X, Y_OVER_X, YQ, YQ | Y, YQ | SUM_OVER_ADD, YQ | RSTD | Y_OVER_X};
    cuda_random(d.x, n * ldx, 1, 2.0f);
    cuda_random(d.add, n * cols, 2, 1.0f);
    if (n > 2)
        memset(d.x + 2 * ldx, 0, (size_t)cols * sizeof *d.x); /* a row of zeros where nothing is added */
    if (c->weight == BF16_W)
        d.w = cuda_weight_bf16(p, 1, cols, 3, 0.5f);
    else if (c->weight == F32_W)
        d.w = cuda_weight_f32(p, 1, cols, 3, 0.5f);
    norm_call(p, c, &d, all, true);
    assert_ok(RT_OP(&p->ref, norm_fwd, &err, .x = d.x, .add = c->add ? d.add : NULL, .w = d.w.ref, .sum = sum, .y = y, .rstd = rstd, .n = n,
                    .cols = cols, .ldx = c->ldx, .eps = 1e-6f));
    snprintf(what, sizeof what, "norm %d x %d%s%s", (int)n, (int)cols, c->add ? " + add" : "", c->weight == NONE ? "" : " * w");
    cuda_round(sum, n * cols);
    assert_memory_equal(d.sum, sum, (size_t)(n * cols) * sizeof *sum); /* one addition, rounded once */
    cuda_close(what, d.y, y, n, cols, c->add ? TWICE : cols < 8 ? FEW : CUDA_BF16_ONCE, c->add ? 2 * TWICE : FEW);
    cuda_close("  rstd", d.rstd, rstd, 1, n, 1e-3, 0); /* of the rounded sum: its rounding averages out but for few columns */
    for (size_t i = 0; i < sizeof some / sizeof some[0]; i++)
        if ((cols % 128 == 0 || !(some[i] & YQ)) && (c->add || !(some[i] & SUM_OVER_ADD)) && (ldx == cols || !(some[i] & SUM_OVER_X)))
            norm_call(p, c, &d, some[i], false);
    cuda_weight_free(p, &d.w);
    float *own[] = {d.x, d.add, d.sum, d.y, d.rstd, sum, y, rstd};
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
        rt_free(own[i]);
}

static void test_norm(void **state)
{
    static const struct norm cases[] = {
        {1, 7168, 0, 0, false, BF16_W}, {7, 7168, 0, 0, true, BF16_W}, {5, 7168, 0, 14336, false, F32_W}, {9, 1536, 0, 0, false, BF16_W},
        {13, 512, 576, 0, false, BF16_W}, {6, 512, 576, 576, false, BF16_W}, {3, 128, 0, 0, true, NONE}, {34, 896, 0, 0, true, BF16_W},
        {4, 2560, 0, 0, true, F32_W}, {2, 16384, 0, 0, true, NONE},
        /* enough rows that blocks stay where codes are made of x alone */
        {1101, 7168, 0, 0, false, BF16_W}, {8501, 512, 576, 0, false, BF16_W}, {8501, 384, 0, 0, false, NONE},
        /* rows that no vectors fit: odd widths, odd distances, longer than a block */
        {5, 100, 0, 0, true, BF16_W}, {5, 35, 37, 41, false, F32_W}, {5, 256, 259, 0, false, BF16_W}, {3, 1, 0, 0, false, NONE},
        {3, 40960, 0, 0, true, BF16_W}, {3, 8, 0, 0, false, BF16_W},
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        norm_case(&p, &cases[i]);
    cuda_pair_close(&p);
}

static void test_norm_errors(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    void *x = cuda_act(&p, NULL, 4 * 192);
    struct cuda_weight w = cuda_weight_bf16(&p, 1, 191, 1, 1.0f);
    struct rt_act q = room(&p, 4, 256);
    assert_status(RT_OP(&p.gpu, norm_fwd, &err, .x = x, .yq = q, .n = 4, .cols = 192, .eps = 1e-6f), SHAPE);
    assert_status(RT_OP(&p.gpu, norm_fwd, &err, .x = x, .w = w.gpu, .y = x, .n = 4, .cols = 192, .eps = 1e-6f), SHAPE);
    assert_status(RT_OP(&p.gpu, quant, &err, .x = x, .q = q, .n = 4, .cols = 192), SHAPE);
    assert_status(RT_OP(&p.gpu, swiglu_fwd, &err, .gate = x, .up = x, .hq = q, .n = 4, .I = 192), SHAPE);
    assert_ok(RT_OP(&p.gpu, norm_fwd, &err, .x = x, .y = x, .n = 0, .cols = 192, .eps = 1e-6f));
    cuda_weight_free(&p, &w);
    cuda_free(&p, x);
    room_free(&p, q);
    cuda_pair_close(&p);
}

/* ---- quant ---- */
/* Rows of every magnitude, ties of the rounding among them: x / s lands halfway between codes where x is a short multiple of amax. */
static void quant_rows(float *x, int64_t n, int64_t ld)
{
    static const float magnitude[] = {1, 1e-3f, 1e-12f, 1e-20f, 1e30f, 448, 3e38f, 0};
    cuda_random(x, n * ld, 5, 1.0f);
    for (int64_t t = 0; t < n; t++) {
        const float m = magnitude[t % 8];
        for (int64_t j = 0; j < ld; j++) {
            const float v = t % 3 == 0 ? (float)(j % 225) / 224.0f * (j % 2 ? 1.0f : -1.0f) : x[t * ld + j] / 8;
            x[t * ld + j] = fminf(fmaxf(v, -1), 1) * m;
        }
    }
    cuda_round(x, n * ld);
}

static void test_quant(void **state)
{
    static const int64_t cases[][3] = {{1, 128, 128}, {9, 7168, 7168}, {6, 1536, 1536}, {130, 512, 576}, {3, 18432, 18432}, {5, 256, 259},
                                       {8, 16384, 16384}, {37, 384, 384}};
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const int64_t n = cases[i][0], cols = cases[i][1], ld = cases[i][2];
        float *x = cuda_floats(n * ld), *rows = cuda_floats(n * cols);
        quant_rows(x, n, ld);
        dense(rows, x, n, cols, ld);
        void *dev = cuda_act(&p, x, n * ld);
        struct rt_act q = room(&p, n, cols);
        for (int pow2 = 0; pow2 < 2; pow2++) {
            assert_ok(RT_OP(&p.gpu, quant, &err, .x = dev, .q = q, .n = n, .cols = cols, .ldx = ld, .pow2 = pow2));
            check_form(&p, q, rows, n, cols, pow2);
        }
        cuda_free(&p, dev);
        room_free(&p, q);
        rt_free(x);
        rt_free(rows);
    }
    cuda_pair_close(&p);
}

/* The bits of the reference, for rows of every magnitude and any width. */
static void test_encode_rows(void **state)
{
    static const int64_t cases[][2] = {{1, 1}, {9, 512}, {1100, 512}, {3, 7168}, {7, 30}, {5, 130}};
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const int64_t n = cases[i][0], cols = cases[i][1];
        const size_t all = (size_t)(n * cols), floats = (size_t)n * sizeof(float);
        float *x = cuda_floats(n * cols), *scale = cuda_floats(2 * n);
        uint8_t *code = malloc(2 * all);
        quant_rows(x, n, cols);
        for (int64_t j = 0; j < n * cols; j += 3)
            x[j] *= 1.1f; /* not bfloat16 */
        void *dx = cuda_bytes(&p, x, all * sizeof *x), *dcode = cuda_bytes(&p, NULL, all), *dscale = cuda_bytes(&p, NULL, floats);
        assert_ok(RT_OP(&p.ref, encode_rows, &err, .x = x, .code = code, .scale = scale, .n = n, .cols = cols));
        assert_ok(RT_OP(&p.gpu, encode_rows, &err, .x = dx, .code = dcode, .scale = dscale, .n = n, .cols = cols));
        cuda_get(&p, code + all, dcode, all);
        cuda_get(&p, scale + n, dscale, floats);
        assert_memory_equal(scale + n, scale, floats);
        assert_memory_equal(code + all, code, all);
        cuda_free(&p, dx);
        cuda_free(&p, dcode);
        cuda_free(&p, dscale);
        rt_free(x);
        rt_free(scale);
        free(code);
    }
    cuda_pair_close(&p);
}

/* ---- swiglu_fwd ---- */
struct glu {
    int64_t n, I, ld; /* ld 0: two matrices */
};

static void glu_case(struct cuda_pair *p, const struct glu *c)
{
    struct rt_err err = {0};
    char what[80];
    const int64_t n = c->n, I = c->I, ld = c->ld ? c->ld : I, size = c->ld ? n * ld : 2 * n * I;
    float *x = cuda_floats(size), *want = cuda_floats(n * I), *h = cuda_floats(n * I), *again = cuda_floats(n * I);
    cuda_random(x, size, 7, 3.0f);
    x[0] = 90, x[1] = -90, x[2] = 300, x[3] = -300;
    const int64_t up = c->ld ? I : n * I;
    void *dev = cuda_act(p, x, size), *out = cuda_act(p, NULL, n * I);
    char *dev_up = (char *)dev + 2 * up;
    assert_ok(RT_OP(&p->ref, swiglu_fwd, &err, .gate = x, .up = x + up, .ld = ld, .h = want, .n = n, .I = I));
    assert_ok(RT_OP(&p->gpu, swiglu_fwd, &err, .gate = dev, .up = dev_up, .ld = c->ld, .h = out, .n = n, .I = I));
    cuda_get_act(p, h, out, n * I);
    snprintf(what, sizeof what, "swiglu %d x %d", (int)n, (int)I);
    cuda_close(what, h, want, n, I, FEW, FEW); /* the first row is four numbers and little else */
    cuda_free(p, out);
    for (int both = 0; both < 2 && I % 128 == 0; both++) {
        struct rt_act q = room(p, n, I);
        out = both ? cuda_act(p, NULL, n * I) : NULL;
        assert_ok(RT_OP(&p->gpu, swiglu_fwd, &err, .gate = dev, .up = dev_up, .ld = c->ld, .h = out, .hq = q, .n = n, .I = I, .pow2 = both > 0));
        check_form(p, q, h, n, I, both > 0);
        if (both) {
            cuda_get_act(p, again, out, n * I);
            assert_memory_equal(again, h, (size_t)(n * I) * sizeof *h);
        }
        cuda_free(p, out);
        room_free(p, q);
    }
    cuda_free(p, dev);
    rt_free(x);
    rt_free(want);
    rt_free(h);
    rt_free(again);
}

static void test_swiglu(void **state)
{
    static const struct glu cases[] = {{1, 2048, 4096}, {7, 2048, 0}, {3, 18432, 36864}, {5, 1408, 0}, {66, 128, 256}, {4, 4864, 9728},
                                       {5, 24, 48}, {5, 100, 0}, {3, 33, 66}, {5, 256, 515}};
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        glu_case(&p, &cases[i]);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_norm),
    cmocka_unit_test(test_norm_errors),
    cmocka_unit_test(test_quant),
    cmocka_unit_test(test_encode_rows),
    cmocka_unit_test(test_swiglu),
};
RT_SUITE(cuda_quant, tests)
