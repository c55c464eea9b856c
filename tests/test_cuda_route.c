/* The router, the sort by expert, and the rows of a group of experts on the GPU. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "core/rng.h"
#include "tests/cuda_ops.h"

#ifdef RT_CUDA
#include "core/cuda/moe_rows.h"

static int32_t *ints(int64_t n)
{
    return (int32_t *)cuda_floats(n);
}

/* ---- route ---- */
struct route {
    int64_t n;
    int H, E, k, n_group, topk_group;
    bool sigmoid, group_top2, norm, bias;
    bool ties; /* scores from a short list of numbers, each expert twice, products exact: every id is known */
};

static void route_inputs(struct cuda_pair *p, const struct route *c, float *x, struct cuda_weight *w, struct cuda_weight *bias)
{
    struct rt_err err = {0};
    cuda_random(x, c->n * c->H, 1, 1.0f);
    *w = (struct cuda_weight){0};
    *bias = (struct cuda_weight){0};
    if (c->bias)
        *bias = cuda_weight_f32(p, 1, c->E, 4, 0.1f);
    if (!c->ties) {
        *w = cuda_weight_bf16(p, c->E, c->H, 2, 1.5f / sqrtf((float)c->H));
        return;
    }
    uint16_t *data;
    assert_ok(rt_alloc((size_t)c->E * (size_t)c->H, sizeof *data, "test", &data, &err));
    for (int64_t i = 0; i < c->n * c->H; i++)
        x[i] = x[i] > 0.5f ? 1.0f : x[i] < -0.5f ? -1.0f : 0.0f;
    for (int64_t e = 0; e < c->E; e++)
        for (int64_t j = 0; j < c->H; j++)
            data[e * c->H + j] = rt_f32_to_bf16(((float)(rt_rng_u64(3, (uint64_t)(e % ((c->E + 1) / 2)), (uint64_t)j) % 7) - 3) / 64);
    const struct rt_weight_src src = {.name = "w", .dtype = RT_BF16, .rows = c->E, .cols = c->H, .data = data};
    assert_ok(p->ref.be->weight_load(p->ref.dev, p->ref.q, &src, &w->ref, &err));
    assert_ok(p->gpu.be->weight_load(p->gpu.dev, p->gpu.q, &src, &w->gpu, &err));
    w->data = data;
}

/* How many rows chose otherwise than ref; the weights of the others are compared. */
static int64_t compare_routes(const struct route *c, const int32_t *ids, const float *weight, const int32_t *want_ids, const float *want)
{
    int64_t differ = 0;
    double worst = 0;
    for (int64_t t = 0; t < c->n; t++) {
        const int32_t *row = ids + t * c->k;
        for (int j = 0; j < c->k; j++) {
            assert_in_range(row[j], 0, c->E - 1);
            for (int i = 0; i < j; i++)
                assert_int_not_equal(row[i], row[j]);
        }
        if (memcmp(row, want_ids + t * c->k, (size_t)c->k * sizeof *row) != 0) {
            differ++;
            continue;
        }
        for (int j = 0; j < c->k; j++)
            worst = fmax(worst, fabs((double)weight[t * c->k + j] / (double)want[t * c->k + j] - 1));
    }
    print_message("    route %d of %d, %d of %d groups, H %d: %d of %d rows differ, weights %.1e\n", c->k, c->E, c->topk_group, c->n_group, c->H,
                  (int)differ, (int)c->n, worst);
    assert_true(worst <= 2e-5); /* float32 sums of H products, z to 6, then exp: 4e-6 was seen */
    return differ;
}

static void route_case(struct cuda_pair *p, const struct route *c)
{
    struct rt_err err = {0};
    struct cuda_weight w, bias;
    const int64_t n = c->n, size = n * c->k;
    float *x = cuda_floats(n * c->H), *want = cuda_floats(size), *weight = cuda_floats(size);
    int32_t *want_ids = ints(size), *ids = ints(size);
    route_inputs(p, c, x, &w, &bias);
    void *dx = cuda_act(p, x, n * c->H);
    int32_t *di = cuda_bytes(p, NULL, (size_t)size * sizeof *di);
    float *dw = cuda_bytes(p, NULL, (size_t)size * sizeof *dw);
    assert_ok(RT_OP(&p->ref, route, &err, .x = x, .w = w.ref, .bias = bias.ref, .ids = want_ids, .weight = want, .n = n, .H = c->H, .E = c->E,
                    .k = c->k, .n_group = c->n_group, .topk_group = c->topk_group, .sigmoid = c->sigmoid, .group_top2 = c->group_top2,
                    .norm = c->norm, .scale = 2.5f));
    assert_ok(RT_OP(&p->gpu, route, &err, .x = dx, .w = w.gpu, .bias = bias.gpu, .ids = di, .weight = dw, .n = n, .H = c->H, .E = c->E, .k = c->k,
                    .n_group = c->n_group, .topk_group = c->topk_group, .sigmoid = c->sigmoid, .group_top2 = c->group_top2, .norm = c->norm,
                    .scale = 2.5f));
    cuda_get(p, ids, di, (size_t)size * sizeof *ids);
    cuda_get(p, weight, dw, (size_t)size * sizeof *weight);
    const int64_t differ = compare_routes(c, ids, weight, want_ids, want);
    /* neighbours among 256 choices lie 4e-3 apart; an error of 1e-6 turns one of a token's dozen decisions once in 300 tokens */
    assert_true(differ <= (c->ties ? 0 : 1 + n / 300));
    cuda_weight_free(p, &w);
    cuda_weight_free(p, &bias);
    cuda_free(p, dx);
    cuda_free(p, di);
    cuda_free(p, dw);
    rt_free(x);
    rt_free(want);
    rt_free(weight);
    rt_free(want_ids);
    rt_free(ids);
}

static void test_route(void **state)
{
    static const struct route cases[] = {
        {67, 7168, 256, 8, 8, 4, true, true, true, true, false}, {300, 512, 256, 8, 8, 4, true, true, true, true, false},
        {200, 512, 160, 6, 8, 3, false, false, false, false, false}, {100, 512, 64, 6, 1, 1, false, false, false, false, false},
        {100, 640, 384, 8, 1, 1, true, false, true, true, false}, {50, 512, 64, 4, 1, 1, true, false, true, true, false},
        {1, 512, 256, 8, 8, 4, true, true, true, true, false}, {40, 128, 12, 3, 3, 2, true, true, true, true, false},
        {40, 128, 48, 5, 3, 1, false, true, true, true, false}, {40, 72, 600, 32, 6, 3, true, true, false, true, false},
        {30, 64, 1, 1, 1, 1, true, false, true, false, false}, {20000, 64, 8, 2, 1, 1, true, false, true, false, false},
        /* ties: between experts of one lane, of two lanes, and between groups */
        {300, 256, 256, 8, 1, 1, true, false, true, false, true}, {300, 256, 256, 8, 8, 4, false, false, true, false, true},
        {300, 256, 64, 6, 8, 3, false, false, true, false, true}, {300, 256, 40, 7, 5, 2, false, false, false, false, true},
        {300, 256, 6, 6, 1, 1, true, false, true, false, true},
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        route_case(&p, &cases[i]);
    cuda_pair_close(&p);
}

static void test_route_errors(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    struct cuda_weight w = cuda_weight_bf16(&p, 12, 64, 1, 1.0f);
    void *x = cuda_act(&p, NULL, 64);
    int32_t *ids = cuda_bytes(&p, NULL, 64);
    float *weight = cuda_bytes(&p, NULL, 64);
#define ROUTE(...) RT_OP(&p.gpu, route, &err, .x = x, .w = w.gpu, .ids = ids, .weight = weight, .n = 1, .H = 64, __VA_ARGS__)
    assert_status(ROUTE(.E = 12, .k = 13, .n_group = 1), SHAPE);
    assert_status(ROUTE(.E = 12, .k = 2, .n_group = 5, .topk_group = 2), SHAPE);
    assert_status(ROUTE(.E = 12, .k = 5, .n_group = 3, .topk_group = 1), SHAPE);
    assert_status(ROUTE(.E = 12, .k = 1, .n_group = 12, .topk_group = 2, .group_top2 = true), SHAPE);
    assert_status(ROUTE(.E = 11, .k = 1, .n_group = 1), SHAPE);
    assert_status(ROUTE(.E = 2048, .k = 1, .n_group = 1), UNSUPPORTED);
#undef ROUTE
    cuda_weight_free(&p, &w);
    cuda_free(&p, x);
    cuda_free(&p, ids);
    cuda_free(&p, weight);
    cuda_pair_close(&p);
}

/* One choice that is not finite: the weights of the tokens that it is about are NaN, and of no others. */
static void not_finite_case(struct cuda_pair *p, const struct route *c, float bad, int at, bool in_bias)
{
    struct rt_err err = {0};
    struct rt_weight *b = NULL;
    struct cuda_weight w = cuda_weight_bf16(p, c->E, c->H, 2, 0.1f);
    const int64_t size = c->n * c->k;
    float *x = cuda_floats(c->n * c->H), *bias = cuda_floats(c->E), *weight = cuda_floats(size);
    int32_t *ids = ints(size);
    cuda_random(x, c->n * c->H, 1, 1.0f);
    cuda_random(bias, c->E, 4, 0.1f);
    *(in_bias ? &bias[at] : &x[c->H]) = bad; /* x: of the second token */
    const struct rt_weight_src src = {.name = "bias", .dtype = RT_F32, .rows = 1, .cols = c->E, .data = bias};
    assert_ok(p->gpu.be->weight_load(p->gpu.dev, p->gpu.q, &src, &b, &err));
    void *dx = cuda_act(p, x, c->n * c->H);
    int32_t *di = cuda_bytes(p, NULL, (size_t)size * sizeof *di);
    float *dw = cuda_bytes(p, NULL, (size_t)size * sizeof *dw);
    assert_ok(RT_OP(&p->gpu, route, &err, .x = dx, .w = w.gpu, .bias = b, .ids = di, .weight = dw, .n = c->n, .H = c->H, .E = c->E, .k = c->k,
                    .n_group = c->n_group, .topk_group = c->topk_group, .sigmoid = c->sigmoid, .group_top2 = c->group_top2, .norm = c->norm, .scale = 2.5f));
    cuda_get(p, ids, di, (size_t)size * sizeof *ids);
    cuda_get(p, weight, dw, (size_t)size * sizeof *weight);
    for (int64_t i = 0; i < size; i++) {
        assert_in_range(ids[i], 0, c->E - 1);
        if ((isnan(weight[i]) != 0) != (in_bias || i / c->k == 1))
            fail_msg("%g in %s %d of %d: weight %d of token %d is %g", (double)bad, in_bias ? "bias" : "x", at, c->E, (int)(i % c->k), (int)(i / c->k),
                     (double)weight[i]);
    }
    p->gpu.be->weight_free(p->gpu.dev, b);
    cuda_weight_free(p, &w);
    cuda_free(p, dx);
    cuda_free(p, di);
    cuda_free(p, dw);
    rt_free(x);
    rt_free(bias);
    rt_free(weight);
    rt_free(ids);
}

static void test_route_not_finite(void **state)
{
    static const struct route cases[] = {
        {5, 512, 256, 8, 8, 4, true, true, true, true, false}, {5, 128, 12, 3, 3, 2, true, true, true, true, false},
        {5, 512, 160, 6, 8, 3, false, false, false, true, false}, {5, 64, 8, 2, 1, 1, true, false, true, true, false},
    };
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (int j = 0; j < 8; j++)
            not_finite_case(&p, &cases[i], bad[j % 4], j < 4 ? 0 : cases[i].E - 1 - j, true);
        not_finite_case(&p, &cases[i], bad[i % 2], 0, false);
    }
    cuda_pair_close(&p);
}

/* ---- moe_sort ---- */
/* ids [n,k]: distinct within a row, as a router chooses; skewed: many of the same. */
static void choices(int32_t *ids, int64_t n, int k, int E, bool skewed)
{
    for (int64_t t = 0; t < n; t++) {
        const int first = skewed ? 0 : (int)(rt_rng_u64(1, (uint64_t)E, (uint64_t)t) % (uint64_t)E);
        const int step = 1 + (int)(rt_rng_u64(2, (uint64_t)E, (uint64_t)t) % 3);
        for (int j = 0; j < k; j++)
            ids[t * k + j] = (first + (skewed ? j : j * step)) % E;
        if (k > 1) {
            const int32_t last = ids[t * k]; /* not ascending */
            ids[t * k] = ids[t * k + k - 1];
            ids[t * k + k - 1] = last;
        }
    }
}

static void test_sort(void **state)
{
    static const int cases[][4] = {{1, 1, 1, 0}, {5, 3, 7, 0}, {512, 8, 256, 0}, {513, 8, 256, 0}, {6001, 8, 256, 0}, {6001, 8, 256, 1},
                                   {3000, 6, 64, 0}, {2000, 8, 384, 0}, {700, 9, 1000, 0}, {0, 8, 256, 0}, {33, 1, 2, 0}, {70000, 4, 60, 0}};
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const int64_t n = cases[i][0];
        const int k = cases[i][1], E = cases[i][2];
        int32_t *ids = ints(n * k), *want = ints(n * k), *perm = ints(n * k), want_offset[1001], offset[1002];
        choices(ids, n, k, E, cases[i][3]);
        offset[E + 1] = 12345;
        int32_t *di = cuda_bytes(&p, ids, (size_t)(n * k) * sizeof *ids), *dp = cuda_bytes(&p, NULL, (size_t)(n * k) * sizeof *ids);
        assert_ok(RT_OP(&p.ref, moe_sort, &err, .ids = ids, .perm = want, .offset = want_offset, .n = n, .k = k, .E = E));
        assert_ok(RT_OP(&p.gpu, moe_sort, &err, .ids = di, .perm = dp, .offset = offset, .n = n, .k = k, .E = E));
        assert_memory_equal(offset, want_offset, ((size_t)E + 1) * sizeof *offset);
        assert_int_equal(offset[E + 1], 12345);
        cuda_get(&p, perm, dp, (size_t)(n * k) * sizeof *perm);
        assert_memory_equal(perm, want, (size_t)(n * k) * sizeof *perm);
        cuda_free(&p, di);
        cuda_free(&p, dp);
        rt_free(ids);
        rt_free(want);
        rt_free(perm);
    }
    cuda_pair_close(&p);
}

/* ---- rows of a group of experts ---- */
struct group {
    int64_t n;
    int k, E, first, count, pad, H, I; /* experts first .. first+count-1 */
    int cut;                           /* rows left out of the first and of the last expert */
};

struct group_data {
    int32_t *perm, *offset;            /* of the group: offset[0 .. count] */
    int64_t *base, rows;
    struct rt_cuda_moe_group g;
    int32_t *dperm;
};

static void group_make(struct cuda_pair *p, const struct group *c, struct group_data *d)
{
    struct rt_err err = {0};
    const int64_t total = c->n * c->k;
    int32_t *ids = ints(total), *all = ints(c->E + 1);
    d->perm = ints(total);
    d->offset = ints(c->count + 1);
    d->base = (int64_t *)(void *)cuda_floats(2 * (c->count + 1));
    choices(ids, c->n, c->k, c->E, false);
    assert_ok(RT_OP(&p->ref, moe_sort, &err, .ids = ids, .perm = d->perm, .offset = all, .n = c->n, .k = c->k, .E = c->E));
    memcpy(d->offset, all + c->first, (size_t)(c->count + 1) * sizeof *all);
    if (d->offset[1] - d->offset[0] > c->cut)
        d->offset[0] += c->cut;
    if (d->offset[c->count] - d->offset[c->count - 1] > c->cut)
        d->offset[c->count] -= c->cut;
    d->rows = rt_cuda_moe_place(d->offset, c->count, c->pad, d->base);
    d->dperm = cuda_bytes(p, d->perm, (size_t)total * sizeof *d->perm);
    assert_ok(rt_cuda_moe_group_make(p->gpu.q, d->dperm, d->offset, c->count, c->pad, c->n, c->k, true, &d->g, &err));
    assert_int_equal(d->g.rows, d->rows);
    rt_free(ids);
    rt_free(all);
}

static void group_free(struct cuda_pair *p, struct group_data *d)
{
    struct rt_err err = {0};
    rt_cuda_moe_group_release(p->gpu.q, &d->g);
    assert_ok(rt_device_sync(&p->gpu, &err));
    cuda_free(p, d->dperm);
    rt_free(d->perm);
    rt_free(d->offset);
    rt_free(d->base);
}

/* flat index of row r of expert j of the group, or -1: padding */
static int32_t flat_of(const struct group_data *d, int j, int64_t r)
{
    return r < d->offset[j + 1] - d->offset[j] ? d->perm[d->offset[j] + r] : -1;
}

/* codes [rows, cols] and the experts' blocks of scales: of want(flat) where row r belongs to flat, zeros in padding. */
static void check_blocks(struct cuda_pair *p, const struct group *c, const struct group_data *d, struct rt_act q, int64_t cols,
                         const float *x, bool by_token) /* x [n, cols] by token, or [rows, cols] by row */
{
    struct rt_err err = {0};
    const int64_t blocks = cols / 128;
    uint8_t *code = (uint8_t *)cuda_floats(d->rows * cols / 4), *want = (uint8_t *)cuda_floats(cols / 4), zero[1] = {0};
    float *scale = cuda_floats(d->rows * blocks), *one = cuda_floats(blocks);
    cuda_get(p, code, q.data, (size_t)(d->rows * cols));
    cuda_get(p, scale, q.scale, (size_t)(d->rows * blocks) * sizeof *scale);
    for (int j = 0; j < c->count; j++) {
        const int64_t padded = d->base[j + 1] - d->base[j];
        for (int64_t r = 0; r < padded; r++) {
            const int32_t flat = flat_of(d, j, r);
            const int64_t row = d->base[j] + r;
            if (flat >= 0) {
                const float *from = x + (by_token ? flat / c->k : row) * cols;
                assert_ok(RT_OP(&p->ref, quant, &err, .x = from, .q = {want, one}, .n = 1, .cols = cols));
                assert_memory_equal(code + row * cols, want, (size_t)cols);
            } else {
                for (int64_t i = 0; i < cols; i++)
                    assert_memory_equal(code + row * cols + i, zero, 1);
            }
            for (int64_t b = 0; b < blocks; b++)
                assert_true(scale[d->base[j] * blocks + b * padded + r] == (flat >= 0 ? one[b] : 0));
        }
    }
    rt_free(code);
    rt_free(want);
    rt_free(scale);
    rt_free(one);
}

static void check_gather(struct cuda_pair *p, const struct group *c, const struct group_data *d)
{
    struct rt_err err = {0};
    const int64_t H = c->H;
    float *x = cuda_floats(c->n * H), *got = cuda_floats(d->rows * H);
    cuda_random(x, c->n * H, 5, 1.0f);
    void *dx = cuda_act(p, x, c->n * H);
    struct rt_act out = {cuda_act(p, NULL, d->rows * H), NULL};
    assert_ok(rt_cuda_moe_gather(p->gpu.q, &d->g, (struct rt_act){dx, NULL}, out, c->H, &err));
    cuda_get_act(p, got, out.data, d->rows * H);
    for (int j = 0; j < c->count; j++)
        for (int64_t r = 0; r < d->base[j + 1] - d->base[j]; r++)
            for (int64_t i = 0; i < H; i++) {
                const int32_t flat = flat_of(d, j, r);
                assert_true(got[(d->base[j] + r) * H + i] == (flat >= 0 ? x[flat / c->k * H + i] : 0));
            }
    cuda_free(p, out.data);
    if (H % 128 == 0) {
        struct cuda_quantised q = cuda_quantise(p, x, c->n, H);
        out = (struct rt_act){cuda_bytes(p, NULL, (size_t)(d->rows * H)), cuda_bytes(p, NULL, (size_t)(d->rows * (H / 128)) * sizeof(float))};
        assert_ok(rt_cuda_moe_gather(p->gpu.q, &d->g, q.gpu, out, c->H, &err));
        check_blocks(p, c, d, out, H, x, true);
        const size_t bytes = (size_t)(d->rows * (H / 128)) * sizeof(float);
        struct rt_act alone = {NULL, cuda_bytes(p, NULL, bytes)};
        float *scale = cuda_floats(2 * d->rows * (H / 128)), *again = scale + d->rows * (H / 128);
        assert_ok(rt_cuda_moe_gather(p->gpu.q, &d->g, q.gpu, alone, c->H, &err)); /* scales without codes */
        cuda_get(p, scale, out.scale, bytes);
        cuda_get(p, again, alone.scale, bytes);
        assert_memory_equal(again, scale, bytes);
        rt_free(scale);
        cuda_free(p, alone.scale);
        cuda_free(p, out.data);
        cuda_free(p, out.scale);
        cuda_quantised_free(p, &q);
    }
    cuda_free(p, dx);
    rt_free(x);
    rt_free(got);
}

static void check_swiglu(struct cuda_pair *p, const struct group *c, const struct group_data *d)
{
    struct rt_err err = {0};
    const int64_t I = c->I, rows = d->rows;
    float *gu = cuda_floats(rows * 2 * I), *want = cuda_floats(rows * I), *h = cuda_floats(rows * I);
    cuda_random(gu, rows * 2 * I, 6, 2.0f);
    void *dev = cuda_act(p, gu, rows * 2 * I), *out = cuda_act(p, NULL, rows * I);
    assert_ok(RT_OP(&p->ref, swiglu_fwd, &err, .gate = gu, .up = gu + I, .ld = 2 * I, .h = want, .n = rows, .I = I));
    for (int j = 0; j < c->count; j++)
        for (int64_t r = 0; r < d->base[j + 1] - d->base[j]; r++)
            if (flat_of(d, j, r) < 0)
                memset(want + (d->base[j] + r) * I, 0, (size_t)I * sizeof *want);
    assert_ok(rt_cuda_moe_swiglu(p->gpu.q, &d->g, dev, (char *)dev + 2 * I, 2 * I, (struct rt_act){out, NULL}, c->I, false, &err));
    cuda_get_act(p, h, out, rows * I);
    cuda_close("swiglu of a group", h, want, rows, I, CUDA_BF16_ONCE, 2 * CUDA_BF16_ONCE);
    cuda_free(p, out);
    if (I % 128 == 0) {
        struct rt_act q = {cuda_bytes(p, NULL, (size_t)(rows * I)), cuda_bytes(p, NULL, (size_t)(rows * (I / 128)) * sizeof(float))};
        assert_ok(rt_cuda_moe_swiglu(p->gpu.q, &d->g, dev, (char *)dev + 2 * I, 2 * I, q, c->I, false, &err));
        check_blocks(p, c, d, q, I, h, false);
        cuda_free(p, q.data);
        cuda_free(p, q.scale);
    }
    cuda_free(p, dev);
    rt_free(gu);
    rt_free(want);
    rt_free(h);
}

static void check_combine(struct cuda_pair *p, const struct group *c, const struct group_data *d)
{
    struct rt_err err = {0};
    const int64_t H = c->H, n = c->n;
    float *y = cuda_floats(n * H), *out = cuda_floats(d->rows * H), *weight = cuda_floats(n * c->k), *got = cuda_floats(n * H);
    cuda_random(y, n * H, 7, 1.0f);
    cuda_random(out, d->rows * H, 8, 1.0f);
    for (int64_t i = 0; i < n * c->k; i++)
        weight[i] = (float)rt_rng_uniform(3, 1, (uint64_t)i);
    void *dy = cuda_act(p, y, n * H), *dout = cuda_act(p, out, d->rows * H);
    float *dw = cuda_bytes(p, weight, (size_t)(n * c->k) * sizeof *weight);
    for (int j = 0; j < c->count; j++)
        for (int64_t r = 0; r < d->offset[j + 1] - d->offset[j]; r++) {
            const int32_t flat = flat_of(d, j, r);
            for (int64_t i = 0; i < H; i++)
                y[flat / c->k * H + i] = fmaf(weight[flat], out[(d->base[j] + r) * H + i], y[flat / c->k * H + i]);
        }
    cuda_round(y, n * H);
    assert_ok(rt_cuda_moe_combine(p->gpu.q, &d->g, dout, dw, dy, c->H, &err));
    cuda_get_act(p, got, dy, n * H);
    assert_memory_equal(got, y, (size_t)(n * H) * sizeof *y); /* the same operations in the same order */
    cuda_free(p, dy);
    cuda_free(p, dout);
    cuda_free(p, dw);
    rt_free(y);
    rt_free(out);
    rt_free(weight);
    rt_free(got);
}

static void test_group(void **state)
{
    static const struct group cases[] = {
        {300, 8, 256, 0, 256, 4, 128, 128, 0}, {300, 8, 32, 5, 11, 16, 7168, 2048, 3}, {77, 6, 64, 60, 4, 4, 1536, 256, 1},
        {1, 2, 8, 0, 8, 16, 256, 128, 0},
        {40, 3, 5, 1, 1, 4, 512, 384, 4}, {50, 2, 6, 0, 6, 8, 100, 60, 1}, {50, 4, 6, 2, 3, 4, 72, 40, 0}, {20, 30, 40, 0, 40, 4, 64, 64, 0},
        {9, 8, 200, 100, 100, 4, 2048, 1408, 0}, {6, 2, 3, 0, 3, 4, 40960, 128, 0},
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct group_data d = {0};
        group_make(&p, &cases[i], &d);
        if (d.rows > 0) {
            check_gather(&p, &cases[i], &d);
            check_swiglu(&p, &cases[i], &d);
            check_combine(&p, &cases[i], &d);
        }
        group_free(&p, &d);
    }
    cuda_pair_close(&p);
}

#else

static void test_route(void **state)
{
    (void)state;
    TEST_SKIP("a build without CUDA");
}

#endif

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_route),
#ifdef RT_CUDA
    cmocka_unit_test(test_route_errors),
    cmocka_unit_test(test_route_not_finite),
    cmocka_unit_test(test_sort),
    cmocka_unit_test(test_group),
#endif
};
RT_SUITE(cuda_route, tests)
