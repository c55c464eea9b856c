/* The cuda backend: what the student's forward and backward do to rows. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "core/mem.h"
#include "tests/cuda_ops.h"

/* Elements between the rows of an output keep the poison that they had. */
static void expect_gaps(const float *x, int64_t rows, int64_t cols, int64_t ld)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = cols; c < ld; c++)
            if (!isnan(x[r * ld + c]))
                fail_msg("row %ld: column %ld behind the row was written", (long)r, (long)c);
}

/* Rows of distance ld to dense ones. */
static void dense_rows(float *x, int64_t rows, int64_t cols, int64_t ld)
{
    for (int64_t r = 1; r < rows; r++)
        memmove(x + r * cols, x + r * ld, (size_t)cols * sizeof *x);
}

/* ---- heads ---- */
enum { POSITIONS = 50 };

struct rope {
    float *cos, *sin, *dev_cos, *dev_sin;
    int32_t *pos, *dev_pos;
};

static struct rope make_rope(struct cuda_pair *p, int64_t n, int d)
{
    struct rope r;
    const size_t bytes = (size_t)(POSITIONS * d / 2) * sizeof(float);
    r.cos = malloc(bytes);
    r.sin = malloc(bytes);
    r.pos = malloc((size_t)n * sizeof *r.pos);
    for (int t = 0; t < POSITIONS; t++)
        for (int j = 0; j < d / 2; j++) {
            r.cos[t * (d / 2) + j] = cosf((float)t * powf(100.0f, -2.0f * (float)j / (float)d));
            r.sin[t * (d / 2) + j] = sinf((float)t * powf(100.0f, -2.0f * (float)j / (float)d));
        }
    for (int64_t i = 0; i < n; i++)
        r.pos[i] = (int32_t)(rt_rng_u64(3, 9, (uint64_t)i) % POSITIONS);
    r.dev_cos = cuda_bytes(p, r.cos, bytes);
    r.dev_sin = cuda_bytes(p, r.sin, bytes);
    r.dev_pos = cuda_bytes(p, r.pos, (size_t)n * sizeof *r.pos);
    return r;
}

static void free_rope(struct cuda_pair *p, struct rope *r)
{
    free(r->cos);
    free(r->sin);
    free(r->pos);
    cuda_free(p, r->dev_cos);
    cuda_free(p, r->dev_sin);
    cuda_free(p, r->dev_pos);
}

struct head_case {
    int64_t n;
    int heads, d;
    bool norm;
    int64_t gap; /* elements behind the heads of a token */
};
static const struct head_case head_cases[] = {
    {37, 3, 128, true, 0}, {65, 14, 64, false, 256}, {301, 5, 64, true, 16}, {9, 5, 10, true, 0}, {9, 4, 10, false, 3}, {33, 2, 96, true, 8},
    {17, 4, 16, true, 0},  {40, 2, 256, true, 0},    {5, 1, 512, false, 0},  {7, 3, 24, true, 2}, {1, 1, 2, true, 0},   {4100, 3, 32, true, 0},
};

static void one_heads_fwd(struct cuda_pair *p, const struct head_case *c)
{
    struct rt_err err = {0};
    char what[64];
    const int64_t cols = (int64_t)c->heads * c->d, ld = cols + c->gap, n = c->n;
    float *x = cuda_numbers(n * ld, 1, 1.5f), *y = malloc((size_t)(n * ld) * sizeof *y), *want = malloc((size_t)(n * cols) * sizeof *want);
    float *rstd = malloc((size_t)(n * c->heads) * sizeof *rstd), *got_rstd = malloc((size_t)(n * c->heads) * sizeof *rstd);
    struct cuda_weight w = {0};
    struct rope r = make_rope(p, n, c->d);
    if (c->norm)
        w = cuda_weight_bf16(p, 1, c->d, 4, 1.0f);
    void *dx = cuda_act(p, x, n * ld), *dy = cuda_act(p, NULL, n * ld);
    float *drstd = cuda_bytes(p, NULL, (size_t)(n * c->heads) * sizeof(float));
    assert_ok(RT_OP(&p->ref, headnorm_rope_fwd, &err, .x = x, .ldx = ld, .w = w.ref, .y = want, .rstd = c->norm ? rstd : NULL, .cos = r.cos,
                    .sin = r.sin, .position = r.pos, .n = n, .heads = c->heads, .d = c->d, .eps = 1e-6f));
    assert_ok(RT_OP(&p->gpu, headnorm_rope_fwd, &err, .x = dx, .ldx = ld, .w = w.gpu, .y = dy, .ldy = ld, .rstd = c->norm ? drstd : NULL,
                    .cos = r.dev_cos, .sin = r.dev_sin, .position = r.dev_pos, .n = n, .heads = c->heads, .d = c->d, .eps = 1e-6f));
    cuda_get_act(p, y, dy, n * ld);
    expect_gaps(y, n, cols, ld);
    dense_rows(y, n, cols, ld);
    snprintf(what, sizeof what, "heads forward %ld x %d x %d%s", (long)n, c->heads, c->d, c->norm ? " norm" : "");
    cuda_close(what, y, want, n * c->heads, c->d, cuda_once(n * cols), 0x1p-8);
    if (c->norm) {
        cuda_get(p, got_rstd, drstd, (size_t)(n * c->heads) * sizeof *rstd);
        cuda_close("  rstd", got_rstd, rstd, n, c->heads, 1e-6, 2e-6); /* float32 sums */
    } else {
        /* in place */
        assert_ok(RT_OP(&p->gpu, headnorm_rope_fwd, &err, .x = dx, .ldx = ld, .y = dx, .ldy = ld, .cos = r.dev_cos, .sin = r.dev_sin,
                        .position = r.dev_pos, .n = n, .heads = c->heads, .d = c->d, .eps = 1e-6f));
        float *again = malloc((size_t)(n * ld) * sizeof *again);
        cuda_get_act(p, again, dx, n * ld);
        dense_rows(again, n, cols, ld);
        assert_memory_equal(again, y, (size_t)(n * cols) * sizeof *y);
        free(again);
    }
    cuda_free(p, dx);
    cuda_free(p, dy);
    cuda_free(p, drstd);
    cuda_weight_free(p, &w);
    free_rope(p, &r);
    rt_free(x);
    free(y);
    free(want);
    free(rstd);
    free(got_rstd);
}

static void one_heads_bwd(struct cuda_pair *p, const struct head_case *c, bool in_place)
{
    struct rt_err err = {0};
    char what[64];
    const int64_t cols = (int64_t)c->heads * c->d, ld = cols + c->gap, n = c->n;
    float *x = cuda_numbers(n * ld, 1, 1.5f), *dy = cuda_numbers(n * ld, 2, 0.01f), *dw = cuda_numbers(c->d, 3, 0.05f);
    float *got = malloc((size_t)(n * ld) * sizeof *got), *want = malloc((size_t)(n * cols) * sizeof *want), *got_dw = malloc((size_t)c->d * sizeof *got_dw);
    float *rstd = malloc((size_t)(n * c->heads) * sizeof *rstd), *scratch = malloc((size_t)(n * cols) * sizeof *scratch);
    struct cuda_weight w = {0};
    struct rope r = make_rope(p, n, c->d);
    if (c->norm)
        w = cuda_weight_bf16(p, 1, c->d, 4, 1.0f);
    assert_ok(RT_OP(&p->ref, headnorm_rope_fwd, &err, .x = x, .ldx = ld, .w = w.ref, .y = scratch, .rstd = rstd, .cos = r.cos, .sin = r.sin,
                    .position = r.pos, .n = n, .heads = c->heads, .d = c->d, .eps = 1e-6f));
    void *gx = cuda_act(p, x, n * ld), *gdy = cuda_act(p, dy, n * ld), *gdx = in_place ? gdy : cuda_act(p, NULL, n * ld), *gdw = cuda_act(p, dw, c->d);
    float *grstd = cuda_bytes(p, rstd, (size_t)(n * c->heads) * sizeof *rstd);
    assert_ok(RT_OP(&p->ref, headnorm_rope_bwd, &err, .dy = dy, .lddy = ld, .x = x, .ldx = ld, .w = w.ref, .rstd = c->norm ? rstd : NULL, .dx = want,
                    .dw = c->norm ? dw : NULL, .cos = r.cos, .sin = r.sin, .position = r.pos, .n = n, .heads = c->heads, .d = c->d, .eps = 1e-6f));
    assert_ok(RT_OP(&p->gpu, headnorm_rope_bwd, &err, .dy = gdy, .lddy = ld, .x = gx, .ldx = ld, .w = w.gpu, .rstd = c->norm ? grstd : NULL, .dx = gdx,
                    .lddx = ld, .dw = c->norm ? gdw : NULL, .cos = r.dev_cos, .sin = r.dev_sin, .position = r.dev_pos, .n = n, .heads = c->heads,
                    .d = c->d, .eps = 1e-6f));
    cuda_get_act(p, got, gdx, n * ld);
    if (!in_place)
        expect_gaps(got, n, cols, ld);
    dense_rows(got, n, cols, ld);
    snprintf(what, sizeof what, "heads backward %ld x %d x %d%s%s", (long)n, c->heads, c->d, c->norm ? " norm" : "", in_place ? " in place" : "");
    cuda_close(what, got, want, n * c->heads, c->d, cuda_once(n * cols), 0x1p-8);
    if (c->norm) {
        cuda_get_act(p, got_dw, gdw, c->d);
        cuda_close("  dw", got_dw, dw, 1, c->d, cuda_once(c->d), 0);
    }
    cuda_free(p, gx);
    if (!in_place)
        cuda_free(p, gdx);
    cuda_free(p, gdy);
    cuda_free(p, gdw);
    cuda_free(p, grstd);
    cuda_weight_free(p, &w);
    free_rope(p, &r);
    rt_free(x);
    rt_free(dy);
    rt_free(dw);
    free(got);
    free(want);
    free(got_dw);
    free(rstd);
    free(scratch);
}

/* A projection's gradient: heads that were rotated, and `behind` that were not; the gradient of its bias. Every other case writes it anew. */
static void one_heads_bias(struct cuda_pair *p, int i, int64_t n, int heads, int behind, int d, bool norm)
{
    struct rt_err err = {0};
    char what[64];
    const int64_t cols = (int64_t)(heads + behind) * d;
    float *x = cuda_numbers(n * cols, 1, 1.5f), *dx = cuda_numbers(n * cols, 2, 0.01f), *db = cuda_numbers(cols, 3, 0.05f), *got = cuda_floats(n * cols);
    struct cuda_weight w = {0};
    struct rope r = make_rope(p, n, d);
    if (norm)
        w = cuda_weight_bf16(p, 1, d, 4, 1.0f);
    void *gx = cuda_act(p, x, n * cols), *gdx = cuda_act(p, dx, n * cols), *gdb = cuda_act(p, db, cols);
    assert_ok(RT_OP(&p->gpu, headnorm_rope_bwd, &err, .dy = gdx, .lddy = cols, .x = gx, .ldx = cols, .w = w.gpu, .dx = gdx, .lddx = cols, .db = gdb,
                    .n_db = cols, .cos = r.dev_cos, .sin = r.dev_sin, .position = r.dev_pos, .n = n, .heads = heads, .d = d, .eps = 1e-6f,
                    .first = i % 2 == 0));
    assert_ok(RT_OP(&p->ref, headnorm_rope_bwd, &err, .dy = dx, .lddy = cols, .x = x, .ldx = cols, .w = w.ref, .dx = dx, .lddx = cols, .db = db,
                    .n_db = cols, .cos = r.cos, .sin = r.sin, .position = r.pos, .n = n, .heads = heads, .d = d, .eps = 1e-6f, .first = i % 2 == 0));
    cuda_get_act(p, got, gdx, n * cols);
    snprintf(what, sizeof what, "heads backward %ld x (%d + %d) x %d%s, bias", (long)n, heads, behind, d, norm ? " norm" : "");
    cuda_close(what, got, dx, n * (heads + behind), d, cuda_once(n * cols), 0x1p-8);
    cuda_get_act(p, got, gdb, cols);
    cuda_close("  db", got, db, 1, cols, 0x1p-8, 0); /* of rounded gradients, and rounded itself */
    cuda_free(p, gx), cuda_free(p, gdx), cuda_free(p, gdb);
    cuda_weight_free(p, &w);
    free_rope(p, &r);
    rt_free(x), rt_free(dx), rt_free(db), rt_free(got);
}

static void test_heads_bias(void **state)
{
    static const int cases[][5] = { /* rows, heads, behind, elements, norm; columns in more than one block, and a part of one */
        {1, 3, 1, 128, 0}, {700, 14, 2, 128, 0}, {700, 14, 2, 128, 0}, {1000, 16, 2, 64, 0}, {65, 3, 2, 16, 0}, {130, 2, 1, 256, 0}, {2100, 17, 0, 32, 0},
        {90, 3, 1, 96, 0}, {90, 3, 1, 24, 0}, {70, 5, 1, 64, 1}, /* these in two passes */
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++)
        one_heads_bias(&p, i, cases[i][0], cases[i][1], cases[i][2], cases[i][3], cases[i][4] != 0);
    cuda_pair_close(&p);
}

static void test_heads(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof head_cases / sizeof head_cases[0]; i++) {
        one_heads_fwd(&p, &head_cases[i]);
        if (head_cases[i].d > 2) { /* two elements: the gradient through the norm is nothing but rounding */
            one_heads_bwd(&p, &head_cases[i], false);
            one_heads_bwd(&p, &head_cases[i], true);
        }
    }
    cuda_pair_close(&p);
}

/* ---- norms ---- */
static void one_norm_bwd(struct cuda_pair *p, int64_t n, int64_t cols, int weight, bool accumulate, bool saved)
{
    struct rt_err err = {0};
    char what[64];
    float *x = cuda_numbers(n * cols, 1, 2.0f), *dy = cuda_numbers(n * cols, 2, 0.02f), *dx = cuda_numbers(n * cols, 3, 0.01f), *dw = cuda_numbers(cols, 4, 0.1f);
    float *got = malloc((size_t)(n * cols) * sizeof *got), *rstd = malloc((size_t)n * sizeof *rstd), *y = malloc((size_t)(n * cols) * sizeof *y);
    struct cuda_weight w = {0};
    if (weight > 0)
        w = weight == 1 ? cuda_weight_bf16(p, 1, cols, 5, 1.0f) : cuda_weight_f32(p, 1, cols, 5, 1.0f);
    assert_ok(RT_OP(&p->ref, norm_fwd, &err, .x = x, .w = w.ref, .y = y, .rstd = rstd, .n = n, .cols = cols, .eps = 1e-6f));
    void *gx = cuda_act(p, x, n * cols), *gdy = cuda_act(p, dy, n * cols), *gdx = cuda_act(p, accumulate ? dx : NULL, n * cols), *gdw = cuda_act(p, dw, cols);
    float *grstd = cuda_bytes(p, rstd, (size_t)n * sizeof *rstd);
    void *gy[2] = {cuda_act(p, NULL, n * cols), cuda_act(p, NULL, n * cols)};
    assert_ok(RT_OP(&p->gpu, norm_fwd, &err, .x = gx, .w = w.gpu, .y = gy[0], .rstd = grstd, .n = n, .cols = cols, .eps = 1e-6f));
    assert_ok(RT_OP(&p->ref, norm_bwd, &err, .dy = dy, .x = x, .w = w.ref, .rstd = rstd, .dx = dx, .dw = weight > 0 ? dw : NULL, .n = n, .cols = cols,
                    .eps = 1e-6f, .accumulate = accumulate));
    assert_ok(RT_OP(&p->gpu, norm_bwd, &err, .dy = gdy, .x = gx, .w = w.gpu, .rstd = saved ? grstd : NULL, .dx = gdx, .dw = weight > 0 ? gdw : NULL,
                    .y = saved ? gy[1] : NULL, .n = n, .cols = cols, .eps = 1e-6f, .accumulate = accumulate));
    if (saved) { /* y again, in the bits of the forward */
        cuda_get_act(p, y, gy[0], n * cols);
        cuda_get_act(p, got, gy[1], n * cols);
        assert_memory_equal(got, y, (size_t)(n * cols) * sizeof *y);
    }
    cuda_get_act(p, got, gdx, n * cols);
    snprintf(what, sizeof what, "norm backward %ld x %ld%s", (long)n, (long)cols, accumulate ? " +=" : "");
    cuda_close(what, got, dx, n, cols, cuda_once(n * cols), 0x1p-8);
    if (weight > 0) {
        cuda_get_act(p, got, gdw, cols);
        cuda_close("  dw", got, dw, 1, cols, cuda_once(cols), 0);
    }
    cuda_free(p, gx);
    cuda_free(p, gdy);
    cuda_free(p, gdx);
    cuda_free(p, gdw);
    cuda_free(p, grstd);
    cuda_free(p, gy[0]);
    cuda_free(p, gy[1]);
    cuda_weight_free(p, &w);
    rt_free(x);
    rt_free(dy);
    rt_free(dx);
    rt_free(dw);
    free(got);
    free(rstd);
    free(y);
}

static void test_norm_bwd(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    one_norm_bwd(&p, 5001, 896, 1, true, true);
    one_norm_bwd(&p, 70, 1536, 1, false, true);
    one_norm_bwd(&p, 3, 896, 1, true, true); /* fewer rows than a block takes */
    one_norm_bwd(&p, 19, 5120, 1, true, false);
    one_norm_bwd(&p, 333, 4096, 2, true, true);
    one_norm_bwd(&p, 7, 7168, 0, true, true);
    one_norm_bwd(&p, 3, 16384, 1, true, true);
    one_norm_bwd(&p, 3, 16392, 1, true, true); /* more than a block holds in registers */
    one_norm_bwd(&p, 600, 64, 1, true, true);
    one_norm_bwd(&p, 130, 20, 1, true, false); /* rows that are not 16-byte aligned */
    one_norm_bwd(&p, 5, 301, 2, false, true);
    cuda_pair_close(&p);
}

/* ---- silu ---- */
static void one_swiglu_bwd(struct cuda_pair *p, int64_t n, int64_t I, bool with_h)
{
    struct rt_err err = {0};
    char what[64];
    const int64_t ld = 2 * I;
    float *gu = cuda_numbers(n * ld, 1, 3.0f), *dh = cuda_numbers(n * I, 2, 0.02f), *want = malloc((size_t)(n * ld) * sizeof *want);
    float *want_h = malloc((size_t)(n * I) * sizeof *want_h), *got = malloc((size_t)(n * ld) * sizeof *got);
    gu[0] = 100.0f; /* exp overflows one way, vanishes the other */
    gu[1] = -100.0f;
    gu[2] = -600.0f;
    void *ggu = cuda_act(p, gu, n * ld), *gdh = cuda_act(p, dh, n * I), *gd = cuda_act(p, NULL, n * ld), *gh = with_h ? cuda_act(p, NULL, n * I) : NULL;
    assert_ok(RT_OP(&p->ref, swiglu_bwd, &err, .gate = gu, .up = gu + I, .dh = dh, .ld = ld, .dgate = want, .dup = want + I, .h = want_h, .n = n, .I = I));
    assert_ok(RT_OP(&p->gpu, swiglu_bwd, &err, .gate = ggu, .up = (char *)ggu + I * 2, .dh = gdh, .ld = ld, .dgate = gd, .dup = (char *)gd + I * 2, .h = gh,
                    .n = n, .I = I));
    snprintf(what, sizeof what, "swiglu backward %ld x %ld", (long)n, (long)I);
    cuda_get_act(p, got, gd, n * ld);
    cuda_close(what, got, want, n, ld, cuda_once(n * ld), 0x1p-8);
    if (with_h) {
        cuda_get_act(p, got, gh, n * I);
        cuda_close("  h", got, want_h, n, I, cuda_once(n * I), 0x1p-8);
    }
    cuda_free(p, ggu);
    cuda_free(p, gdh);
    cuda_free(p, gd);
    cuda_free(p, gh);
    rt_free(gu);
    rt_free(dh);
    free(want);
    free(want_h);
    free(got);
}

static void test_swiglu_bwd(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    one_swiglu_bwd(&p, 33, 4864, true);
    one_swiglu_bwd(&p, 257, 128, false);
    one_swiglu_bwd(&p, 7, 28, true);
    one_swiglu_bwd(&p, 11, 13, true);
    cuda_pair_close(&p);
}

/* ---- embedding ---- */
static void one_embed_bwd(struct cuda_pair *p, int64_t n, int64_t rows, int64_t cols, int skew)
{
    struct rt_err err = {0};
    char what[64];
    const size_t bytes = (size_t)(rows * cols) * sizeof(float);
    float *dy = cuda_numbers(n * cols, 1, 0.1f), *table = cuda_numbers(rows * cols, 2, 0.1f), *got = malloc(bytes), *again = malloc(bytes);
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++) {
        const uint64_t u = rt_rng_u64(5, 6, (uint64_t)i);
        /* skew: every other token has one of the first `skew` ids */
        ids[i] = (int32_t)(skew > 0 && u >> 60 < 8 ? (u & 0xffff) % (uint64_t)skew : (u & 0xffffffff) % (uint64_t)rows);
    }
    ids[n - 1] = (int32_t)rows - 1;
    void *gdy = cuda_act(p, dy, n * cols), *gt = cuda_act(p, table, rows * cols), *gt2 = cuda_act(p, table, rows * cols);
    int32_t *gids = cuda_bytes(p, ids, (size_t)n * sizeof *ids);
    assert_ok(RT_OP(&p->ref, embed_bwd, &err, .ids = ids, .dy = dy, .dtable = table, .n = n, .cols = cols, .rows = rows));
    assert_ok(RT_OP(&p->gpu, embed_bwd, &err, .ids = gids, .dy = gdy, .dtable = gt, .n = n, .cols = cols, .rows = rows));
    assert_ok(RT_OP(&p->gpu, embed_bwd, &err, .ids = gids, .dy = gdy, .dtable = gt2, .n = n, .cols = cols, .rows = rows));
    cuda_get_act(p, got, gt, rows * cols);
    cuda_get_act(p, again, gt2, rows * cols);
    assert_memory_equal(got, again, bytes);
    snprintf(what, sizeof what, "embedding backward %ld of %ld x %ld", (long)n, (long)rows, (long)cols);
    cuda_close(what, got, table, rows, cols, cuda_once(rows * cols), 0x1p-8);
    cuda_free(p, gdy);
    cuda_free(p, gt);
    cuda_free(p, gt2);
    cuda_free(p, gids);
    rt_free(dy);
    rt_free(table);
    free(got);
    free(again);
    free(ids);
}

static void test_embed_bwd(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    one_embed_bwd(&p, 5000, 300, 896, 2);
    one_embed_bwd(&p, 70, 3, 24, 0);
    one_embed_bwd(&p, 1025, 1, 64, 0);       /* one run through every chunk */
    one_embed_bwd(&p, 4100, 151936, 16, 5);  /* two digits of ids */
    one_embed_bwd(&p, 999, 700000, 8, 3);    /* three */
    one_embed_bwd(&p, 333, 50, 36, 4);       /* rows that are not 16-byte aligned */
    one_embed_bwd(&p, 1, 7, 8, 0);
    one_embed_bwd(&p, 32, 2, 8, 1);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_heads),
    cmocka_unit_test(test_heads_bias),
    cmocka_unit_test(test_norm_bwd),
    cmocka_unit_test(test_swiglu_bwd),
    cmocka_unit_test(test_embed_bwd),
};
RT_SUITE(cuda_student, tests)
