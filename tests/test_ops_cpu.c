/* The cpu backend's products, rows and elements against the reference (see tests/ops_cpu.h); teacher operations are in
 * tests/test_ops_cpu_moe.c. */
#include "core/cpu/cpu.h"
#include "core/cpu/simd.h"
#include "tests/ops_cpu.h"

/* A sum of K products in float32 lanes: the error of a dot product of random signs grows with sqrt(K / lanes) at most. */
#define BOUND 1e-6

static const int64_t row_counts[] = {1, 3, 17, 129};

/* ---- weights of every type ---- */
struct source {
    void *data;
    float *scale;
    struct rt_weight_src src;
};

static struct source make_source(enum rt_dtype dtype, int64_t rows, int64_t cols, uint64_t stream, bool resident)
{
    struct source s = {0};
    float *v = randoms(rows * cols, stream, 1);
    s.data = malloc((size_t)(rows * cols) * rt_dtype_size(dtype) + 1);
    assert_non_null(s.data);
    if (dtype == RT_E4M3) {
        const int64_t blocks = rt_ceil_div(rows, 128) * rt_ceil_div(cols, 128);
        s.scale = malloc((size_t)blocks * sizeof *s.scale);
        assert_non_null(s.scale);
        for (int64_t i = 0; i < blocks; i++)
            s.scale[i] = (float)(0.01 + 0.02 * rt_rng_uniform(3, stream, (uint64_t)i));
        for (int64_t i = 0; i < rows * cols; i++)
            v[i] *= 60; /* codes of many exponents, subnormal ones too */
    }
    assert_true(rt_from_f32(s.data, dtype, v, (size_t)(rows * cols)));
    free(v);
    s.src = (struct rt_weight_src){"w", dtype, rows, cols, s.data, s.scale, resident, NULL, NULL};
    return s;
}

static void free_source(struct source *s)
{
    free(s->data);
    free(s->scale);
}

static struct rt_weight *load(struct rt_device *d, const struct source *s)
{
    struct rt_err err = {0};
    struct rt_weight *w = NULL;
    assert_ok(d->be->weight_load(d->dev, d->q, &s->src, &w, &err));
    return w;
}

/* ---- linear ---- */
struct linear {
    const struct source *w, *bias;
    struct rt_act x;
    const float *add;
    int64_t n, K, N, ldx, ldy;
    bool accumulate, exact;
};

static enum rt_status run_linear(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct linear *t = ctx;
    struct rt_weight *w = load(d, t->w), *bias = t->bias != NULL ? load(d, t->bias) : NULL;
    const enum rt_status st =
        RT_OP(d, linear_fwd, err, .x = t->x, .ldx = t->ldx, .w = w, .bias = bias, .add = t->add, .y = out[0], .ldy = t->ldy, .n = t->n, .K = t->K,
              .N = t->N, .accumulate = t->accumulate, .row_exact = t->exact, .y_f32 = t->accumulate);
    d->be->weight_free(d->dev, w);
    d->be->weight_free(d->dev, bias);
    return st;
}

static void hold_linear(struct devices *all, enum rt_dtype dtype, bool resident, int64_t n, int64_t K, int64_t N, int variant)
{
    char what[128];
    struct source w = make_source(dtype, N, K, 11, resident), bias = make_source(RT_BF16, 1, N, 12, false);
    struct linear t = {.w = &w, .n = n, .K = K, .N = N};
    if (variant & 1)
        t.bias = &bias, t.ldx = K + 5, t.ldy = N + 3;
    t.accumulate = (variant & 2) != 0;
    t.exact = (variant & 4) != 0;
    t.x.data = randoms(n * (K + 5), 13, 1);
    float *add = randoms(n * N, 19, 1);
    t.add = !t.accumulate && t.ldy == 0 ? add : NULL;
    snprintf(what, sizeof what, "linear_fwd %s%s n=%d K=%d N=%d variant %d", rt_dtype_name(dtype), resident ? " resident" : "", (int)n,
             (int)K, (int)N, variant);
    const int64_t size = (n - 1) * (t.ldy != 0 ? t.ldy : N) + N;
    hold(all, what, run_linear, &t, 1, &size, BOUND);
    free(t.x.data);
    free(add);
    free_source(&w);
    free_source(&bias);
}

static void linear_types_and_shapes(void **state)
{
    static const enum rt_dtype types[] = {RT_F32, RT_BF16, RT_F16, RT_E4M3};
    static const int64_t shape[][2] = {{64, 48}, {144, 129}, {192, 576}, {37, 1}, {1, 17}, {130, 1050}};
    int variant = 0;
    for (int64_t i = 0; i < COUNT(types); i++)
        for (int64_t s = 0; s < COUNT(shape); s++)
            for (int64_t r = 0; r < COUNT(row_counts); r++, variant++)
                hold_linear(*state, types[i], variant % 3 == 0, row_counts[r], shape[s][0], shape[s][1], variant % 8);
}

/* More inner columns than a panel holds, more rows than a tile. */
static void linear_large(void **state)
{
    hold_linear(*state, RT_BF16, false, 5, 8192 + 300, 20, 0);
    hold_linear(*state, RT_BF16, false, 5, 8192 + 300, 20, 6);
    hold_linear(*state, RT_F32, true, 1100, 48, 40, 1);
}

/* Unaligned float32: a tensor may begin at any byte of its file. */
static void linear_unaligned(void **state)
{
    struct devices *all = *state;
    struct source w = make_source(RT_F32, 33, 20, 11, false);
    struct linear t = {.w = &w, .n = 4, .K = 20, .N = 33, .x.data = randoms(80, 13, 1)};
    const int64_t size = 4 * 33;
    char *moved = malloc(33 * 20 * sizeof(float) + 1);
    assert_non_null(moved);
    struct rt_err err = {0};
    float a[2][4 * 33];
    assert_ok(run_linear(&all->cpu[0], &t, (float *[]){a[0]}, &err));
    memcpy(moved + 1, w.data, 33 * 20 * sizeof(float));
    w.src.data = moved + 1;
    assert_ok(run_linear(&all->cpu[0], &t, (float *[]){a[1]}, &err));
    assert_memory_equal(a[0], a[1], (size_t)size * sizeof(float));
    free(moved);
    free(t.x.data);
    free_source(&w);
}

static void linear_e4m3_activations(void **state)
{
    struct devices *all = *state;
    enum { K = 384, N = 144 };
    struct source w = make_source(RT_E4M3, N, K, 11, false);
    const size_t whole = all->cpu[0].dev->shared_max;
    for (int part = 0; part < 2; part++) /* at once, and 7 rows at a time */
        for (int64_t r = 0; r < COUNT(row_counts); r++) {
            struct rt_err err = {0};
            const int64_t n = row_counts[r], size = n * N;
            struct linear t = {.w = &w, .n = n, .K = K, .N = N, .exact = r == 1};
            float *x = randoms(n * K, 13, 1);
            t.x = (struct rt_act){malloc((size_t)(n * K)), malloc((size_t)(n * K / 128) * sizeof(float))};
            assert_ok(RT_OP(&all->ref, quant, &err, .x = x, .q = t.x, .n = n, .cols = K));
            for (int c = 0; c < CPUS; c++)
                all->cpu[c].dev->shared_max = part ? 7 * K * sizeof(float) : whole;
            hold(all, "linear_fwd of e4m3", run_linear, &t, 1, &size, BOUND);
            free(x);
            free(t.x.data);
            free(t.x.scale);
        }
    for (int c = 0; c < CPUS; c++)
        all->cpu[c].dev->shared_max = whole;
    free_source(&w);
}

/* The result of a row is the same bytes whoever is in the call. */
static void linear_row_exact(void **state)
{
    struct devices *all = *state;
    static const enum rt_dtype types[] = {RT_F32, RT_BF16, RT_E4M3};
    static const int64_t shape[][2] = {{144, 100}, {300, 576}, {2100, 50}};
    for (int64_t i = 0; i < COUNT(types); i++)
        for (int64_t s = 0; s < COUNT(shape); s++) {
            const int64_t K = shape[s][0], N = shape[s][1];
            struct rt_err err = {0};
            struct source w = make_source(types[i], N, K, 11, i == 1 && s == 1);
            float *x = randoms(64 * K, 13, 1), *y = malloc((size_t)(64 * N) * sizeof *y), *one = malloc((size_t)N * sizeof *one);
            for (int64_t n = 1; n <= 64; n = n == 1 ? 2 : n == 2 ? 7 : n == 7 ? 64 : 65) {
                struct linear t = {.w = &w, .x.data = x, .n = n, .K = K, .N = N, .exact = true};
                assert_ok(run_linear(&all->cpu[1], &t, &y, &err));
                for (int64_t r = 0; r < n; r++) {
                    t.x.data = x + r * K;
                    t.n = 1;
                    assert_ok(run_linear(&all->cpu[1], &t, &one, &err));
                    assert_memory_equal(one, y + r * N, (size_t)N * sizeof *one);
                }
            }
            free(x), free(y), free(one);
            free_source(&w);
        }
}

struct grad {
    const struct source *w;
    float *dy, *x;
    int64_t n, K, N, lddy, ldx;
    bool accumulate;
};

static enum rt_status run_dgrad(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct grad *t = ctx;
    struct rt_weight *w = load(d, t->w);
    const enum rt_status st = RT_OP(d, linear_dgrad, err, .dy = t->dy, .lddy = t->lddy, .w = w, .dx = out[0], .n = t->n, .K = t->K,
                                    .N = t->N, .accumulate = t->accumulate);
    d->be->weight_free(d->dev, w);
    return st;
}

static enum rt_status run_wgrad(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct grad *t = ctx;
    return RT_OP(d, linear_wgrad, err, .dy = t->dy, .x = t->x, .lddy = t->lddy, .ldx = t->ldx, .dw = out[0],
                 .db = t->accumulate ? out[1] : NULL, .n = t->n, .K = t->K, .N = t->N);
}

static void linear_gradients(void **state)
{
    static const enum rt_dtype types[] = {RT_F32, RT_BF16, RT_E4M3};
    static const int64_t shape[][2] = {{64, 48}, {144, 129}, {37, 300}, {2100, 20}, {16, 4100}};
    for (int64_t s = 0; s < COUNT(shape); s++)
        for (int64_t r = 0; r < COUNT(row_counts); r++) {
            const int64_t n = row_counts[r], K = shape[s][0], N = shape[s][1], sizes[2] = {N * K, N}, dx = n * K;
            struct source w = make_source(types[(s + r) % 3], N, K, 11, false);
            struct grad t = {.w = &w, .n = n, .K = K, .N = N, .accumulate = (s + r) % 2 == 0};
            if (r == 2)
                t.lddy = N + 7, t.ldx = K + 2;
            t.dy = randoms(n * (N + 7), 14, 1);
            t.x = randoms(n * (K + 2), 15, 1);
            hold(*state, "linear_dgrad", run_dgrad, &t, 1, &dx, N > 4000 ? 4 * BOUND : BOUND); /* OpenBLAS sums N one by one */
            hold(*state, "linear_wgrad", run_wgrad, &t, 2, sizes, BOUND);
            free(t.dy), free(t.x);
            free_source(&w);
        }
}

/* ---- rows ---- */
struct rows {
    int64_t n, cols, ld;
    int variant;
    bool pow2;
    float *x, *add, *cos, *sin;
    int32_t *index, *slot;
    const struct source *w;
};

/* e4m3 form into out: values, and scales behind them; the guard of the codes is checked here. */
static void unpack(const struct rt_act *q, int64_t n, int64_t cols, float *out)
{
    const uint8_t *code = q->data;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < cols; j++)
            out[i * cols + j] = rt_e4m3_table[code[i * cols + j]] * q->scale[j / 128 * n + i];
    for (int i = 0; i < GUARD; i++)
        assert_int_equal(code[n * cols + i], 0xa5);
}

static struct rt_act codes_for(float *scale, int64_t n, int64_t cols)
{
    struct rt_act q = {malloc((size_t)(n * cols + GUARD)), scale};
    assert_non_null(q.data);
    memset(q.data, 0xa5, (size_t)(n * cols + GUARD));
    return q;
}

static enum rt_status run_norm(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    struct rt_weight *w = t->variant & 1 ? load(d, t->w) : NULL;
    const enum rt_status st = RT_OP(d, norm_fwd, err, .x = t->x, .ldx = t->ld, .add = t->variant & 2 ? t->add : NULL, .w = w,
                                    .sum = t->variant & 4 ? out[1] : NULL, .y = out[0], .ldy = t->ld, .rstd = out[2], .n = t->n,
                                    .cols = t->cols, .eps = 1e-6f);
    d->be->weight_free(d->dev, w);
    return st;
}

static enum rt_status run_norm_quant(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    struct rt_act q = codes_for(out[1], t->n, t->cols);
    const enum rt_status st = RT_OP(d, norm_fwd, err, .x = t->x, .add = t->add, .yq = q, .n = t->n, .cols = t->cols, .eps = 1e-6f, .pow2 = t->pow2);
    unpack(&q, t->n, t->cols, out[0]);
    free(q.data);
    return st;
}

static enum rt_status run_quant(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    struct rt_act q = codes_for(out[1], t->n, t->cols);
    const enum rt_status st = RT_OP(d, quant, err, .x = t->x, .q = q, .n = t->n, .cols = t->cols, .ldx = t->ld, .pow2 = t->pow2);
    unpack(&q, t->n, t->cols, out[0]);
    free(q.data);
    return st;
}

static enum rt_status run_encode_rows(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    uint8_t *code = malloc((size_t)(t->n * t->cols));
    const enum rt_status st = RT_OP(d, encode_rows, err, .x = t->x, .code = code, .scale = out[1], .n = t->n, .cols = t->cols);
    for (int64_t i = 0; i < t->n * t->cols; i++)
        out[0][i] = code[i];
    free(code);
    return st;
}

static enum rt_status run_swiglu(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    if (t->variant == 0)
        return RT_OP(d, swiglu_fwd, err, .gate = t->x, .up = t->add, .ld = t->ld, .h = out[0], .n = t->n, .I = t->cols);
    struct rt_act q = codes_for(out[1], t->n, t->cols);
    const enum rt_status st = RT_OP(d, swiglu_fwd, err, .gate = t->x, .up = t->add, .ld = t->ld, .hq = q, .n = t->n, .I = t->cols, .pow2 = t->pow2);
    unpack(&q, t->n, t->cols, out[0]);
    free(q.data);
    return st;
}

static void norm_swiglu_quant(void **state)
{
    static const int64_t cols[] = {1, 17, 128, 384, 1152};
    for (int64_t c = 0; c < COUNT(cols); c++)
        for (int64_t r = 0; r < (c < 2 ? COUNT(row_counts) : 3); r++) {
            const int64_t n = row_counts[r], m = cols[c], ld = r == 1 ? m + 3 : m;
            const int64_t norm_sizes[3] = {n * ld, n * m, n}, quant_sizes[2] = {n * m, n * m / 128};
            struct source w = make_source(RT_BF16, 1, m, 16, false);
            struct rows t = {.n = n, .cols = m, .ld = ld, .w = &w, .x = randoms(n * ld, 17, 2), .add = randoms(n * ld, 18, 2)};
            for (t.variant = 0; t.variant < 8; t.variant++)
                hold(*state, "norm_fwd", run_norm, &t, 3, norm_sizes, BOUND);
            t.variant = 0;
            hold(*state, "swiglu_fwd", run_swiglu, &t, 1, quant_sizes, BOUND);
            hold(*state, "encode_rows", run_encode_rows, &t, 2, (const int64_t[]){n * m, n}, 0);
            for (int pow2 = 0; pow2 < 2 && m % 128 == 0; pow2++) {
                t.pow2 = pow2;
                t.variant = 0;
                t.ld = ld;
                hold(*state, "quant", run_quant, &t, 2, quant_sizes, 0); /* from the same float32: the same codes */
                t.ld = 0;
                /* From values that differ in the last bit now and then a code does, by 1/8 of its value: of 128 or more, 1e-2. */
                hold(*state, "norm_fwd of e4m3", run_norm_quant, &t, 2, quant_sizes, 1e-2);
                t.variant = 1;
                hold(*state, "swiglu_fwd of e4m3", run_swiglu, &t, 2, quant_sizes, 1e-2);
            }
            free(t.x), free(t.add);
            free_source(&w);
        }
}

/* In place: the sum takes the place of x, or of what is added. */
static void norm_in_place(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    enum { N = 5, C = 70 };
    float *x = randoms(N * C, 17, 1), *add = randoms(N * C, 18, 1), sum[N * C], y[2][N * C];
    struct rt_device *d = &all->cpu[1];
    assert_ok(RT_OP(d, norm_fwd, &err, .x = x, .add = add, .sum = sum, .y = y[0], .n = N, .cols = C, .eps = 1e-6f));
    for (int which = 0; which < 2; which++) {
        float a[N * C], b[N * C];
        memcpy(a, x, sizeof a);
        memcpy(b, add, sizeof b);
        assert_ok(RT_OP(d, norm_fwd, &err, .x = a, .add = b, .sum = which ? b : a, .y = y[1], .n = N, .cols = C, .eps = 1e-6f));
        assert_memory_equal(which ? b : a, sum, sizeof sum);
        assert_memory_equal(y[1], y[0], sizeof sum);
    }
    free(x), free(add);
}

static enum rt_status run_rope(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    const int heads = 3, dim = (int)t->cols;
    return RT_OP(d, rope, err, .x = out[0], .ld = heads * (dim + 4) + 1, .head_ld = dim + 4, .cos = t->cos, .sin = t->sin,
                 .position = t->index, .n = t->n, .heads = heads, .dim = dim, .interleaved = t->variant & 1,
                 .inverse = (t->variant & 2) != 0);
}

static void rope_forms(void **state)
{
    enum { POSITIONS = 50 };
    static const int64_t dims[] = {2, 16, 34, 64};
    for (int64_t c = 0; c < COUNT(dims); c++)
        for (int64_t r = 0; r < COUNT(row_counts); r++) {
            const int64_t n = row_counts[r], dim = dims[c], size = n * (3 * (dim + 4) + 1);
            struct rows t = {.n = n, .cols = dim, .cos = randoms(POSITIONS * dim / 2, 19, 1), .sin = randoms(POSITIONS * dim / 2, 20, 1)};
            t.index = malloc((size_t)n * sizeof *t.index);
            for (int64_t i = 0; i < n; i++)
                t.index[i] = (int32_t)(i * 7 % POSITIONS);
            for (t.variant = 0; t.variant < 4; t.variant++)
                hold(*state, "rope", run_rope, &t, 1, &size, BOUND);
            free(t.cos), free(t.sin), free(t.index);
        }
}

static enum rt_status run_move(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    struct rt_weight *w = load(d, t->w);
    enum rt_status st = RT_OP(d, embed_fwd, err, .ids = t->index, .table = w, .out = out[0], .n = t->n, .cols = t->cols);
    d->be->weight_free(d->dev, w);
    if (st == RT_OK)
        st = RT_OP(d, gather, err, .x = t->x, .index = t->index, .out = out[1], .n = t->n, .cols = t->cols);
    if (st == RT_OK)
        st = RT_OP(d, scatter, err, .y = t->x, .index = t->index, .x = out[2], .n = t->n, .cols = t->cols,
                   .accumulate = t->variant != 0);
    if (st == RT_OK)
        st = RT_OP(d, convert, err, .src = t->x, .dst = out[3], .n = t->n * t->cols, .to_f32 = t->variant != 0);
    return st;
}

static void moving_rows(void **state)
{
    static const enum rt_dtype types[] = {RT_F32, RT_BF16, RT_F16, RT_E4M3};
    for (int64_t r = 0; r < COUNT(row_counts); r++) {
        const int64_t n = row_counts[r], cols = 150, rows = 131, sizes[4] = {n * cols, n * cols, rows * cols, n * cols};
        struct source w = make_source(types[r], rows, cols, 21, false);
        struct rows t = {.n = n, .cols = cols, .w = &w, .x = randoms(rows * cols, 22, 1), .variant = (int)r % 2};
        t.index = malloc((size_t)n * sizeof *t.index);
        for (int64_t i = 0; i < n; i++)
            t.index[i] = (int32_t)(i * 5 % rows); /* distinct: 131 is prime */
        hold(*state, "embed_fwd, gather, scatter, convert", run_move, &t, 4, sizes, 0); /* no rounding but one addition */
        free(t.x), free(t.index);
        free_source(&w);
    }
}

static enum rt_status run_sums(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    double sum = 0;
    enum rt_status st = RT_OP(d, axpy, err, .x = t->x, .y = out[0], .n = t->n, .a = 0.3);
    if (st == RT_OK)
        st = RT_OP(d, axpy, err, .y = out[1], .n = t->n, .a = -1.7);
    if (st == RT_OK)
        st = RT_OP(d, sumsq, err, .x = t->x, .n = t->n, .out = &sum);
    out[2][0] = (float)sum;
    return st;
}

static void sums(void **state)
{
    static const int64_t counts[] = {1, 15, 1000, 200001};
    for (int64_t c = 0; c < COUNT(counts); c++) {
        const int64_t n = counts[c], sizes[3] = {n, n, 1};
        struct rows t = {.n = n, .x = randoms(n, 23, 1)};
        hold(*state, "axpy, sumsq", run_sums, &t, 3, sizes, 1e-7); /* double inside: the last rounding to float32 alone */
        free(t.x);
    }
}

/* ---- the arithmetic underneath ---- */
RT_SIMD static void exp_all(float *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = rt_exp(x[i]);
}

static void exp_accuracy(__attribute__((unused)) void **state)
{
    enum { N = 1 << 12 };
    static float x[N], y[N];
    double worst = 0;
    for (int part = 0; part < 40; part++) {
        for (int i = 0; i < N; i++)
            x[i] = (float)(-87.3 + 176.0 * rt_rng_uniform(4, (uint64_t)part, (uint64_t)i) * (part < 20 ? 1 : 0.5));
        exp_all(y, x, N);
        for (int i = 0; i < N; i++) {
            const double e = exp((double)x[i]);
            const float f = (float)e;
            worst = fmax(worst, fabs((double)y[i] - e) / ((double)nextafterf(f, INFINITY) - (double)f));
        }
    }
    assert_true(worst < 2);
    const float edge[] = {-INFINITY, INFINITY, NAN, 0, -200, 1e30f, 88.7f};
    float got[COUNT(edge)];
    exp_all(got, edge, COUNT(edge));
    assert_true(got[0] == 0 && got[1] == INFINITY && isnan(got[2]) && got[3] == 1 && got[4] == 0 && got[5] == INFINITY);
    assert_true(isfinite(got[6]));
}

/* Every code there and back, the midpoints between codes, and what lies beyond them. */
static void e4m3_codes(__attribute__((unused)) void **state)
{
    float x[128], scale;
    uint8_t code[128];
    const struct rt_act q = {code, &scale};
    for (int c = 0; c < 126; c++) {
        for (int i = 0; i < 128; i++)
            x[i] = 0;
        x[0] = 448; /* so that the scale is 1 */
        const float a = rt_e4m3_table[c], mid = (a + rt_e4m3_table[c + 1]) / 2;
        const float v[] = {a, -a, mid, -mid, nextafterf(mid, 0), nextafterf(mid, 1000), NAN, -NAN};
        memcpy(x + 1, v, sizeof v);
        rt_cpu_quant_row(x, &q, 0, 1, 128, false);
        assert_true(scale == 1);
        for (int i = 0; i < 128; i++)
            assert_int_equal(code[i], rt_f32_to_e4m3(x[i]));
        float back[128];
        for (int i = 0; i < 128; i++)
            code[i] = (uint8_t)(2 * c + i); /* NaN codes as well */
        rt_cpu_dequant_row(back, &q, 0, 1, 128);
        for (int i = 0; i < 128; i++)
            assert_true(back[i] == rt_e4m3_table[code[i]] || (isnan(back[i]) && isnan(rt_e4m3_table[code[i]])));
    }
    memset(x, 0, sizeof x);
    rt_cpu_quant_row(x, &q, 0, 1, 128, false);
    assert_true(scale == 1e-12f / 448.0f && code[5] == 0);
}

static void bad_arguments(void **state)
{
    struct devices *all = *state;
    struct rt_device *d = &all->cpu[1];
    struct rt_err err = {0};
    float x[512] = {0}, y[512];
    struct rt_weight *w = ops_param(d, x, 4, 8), *none = NULL;
    uint8_t code[256] = {0};
    const struct rt_act q = {code, y};
    assert_status(RT_OP(d, linear_fwd, &err, .x.data = x, .w = w, .y = y, .n = 1, .K = 7, .N = 4), SHAPE);
    assert_status(RT_OP(d, linear_fwd, &err, .x = q, .w = w, .y = y, .n = 1, .K = 8, .N = 4), UNSUPPORTED);
    assert_status(RT_OP(d, linear_dgrad, &err, .dy = x, .w = w, .dx = y, .n = 1, .K = 8, .N = 5), SHAPE);
    assert_status(RT_OP(d, quant, &err, .x = x, .q = q, .n = 1, .cols = 100), SHAPE);
    assert_status(RT_OP(d, norm_fwd, &err, .x = x, .w = w, .y = y, .n = 1, .cols = 8), SHAPE);
    assert_status(RT_OP(d, embed_fwd, &err, .ids = (const int32_t[]){4}, .table = w, .out = y, .n = 1, .cols = 8), SHAPE);
    assert_status(d->be->weight_load(d->dev, d->q, &(struct rt_weight_src){"w", RT_I64, 1, 1, x, NULL, false, NULL, NULL}, &none, &err),
                  UNSUPPORTED);
    assert_status(d->be->weight_load(d->dev, d->q, &(struct rt_weight_src){"w", RT_E4M3, 1, 1, x, NULL, false, NULL, NULL}, &none, &err), FORMAT);
    assert_status(d->be->weight_load(d->dev, d->q, &(struct rt_weight_src){"w", RT_F32, 0, 1, x, NULL, false, NULL, NULL}, &none, &err), SHAPE);
    assert_null(none);
    d->be->weight_free(d->dev, w);
    assert_non_null(strstr(d->be->describe(d->dev), "OpenBLAS"));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup_teardown(linear_types_and_shapes, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(linear_large, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(linear_unaligned, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(linear_e4m3_activations, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(linear_row_exact, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(linear_gradients, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(norm_swiglu_quant, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(norm_in_place, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(rope_forms, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(moving_rows, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(sums, cpu_open_all, cpu_close_all),
    cmocka_unit_test(exp_accuracy),
    cmocka_unit_test(e4m3_codes),
    cmocka_unit_test_setup_teardown(bad_arguments, cpu_open_all, cpu_close_all),
};
RT_SUITE(ops_cpu, tests)
