/* Copies of rows, rope, keys, axpy and sums of squares on the GPU. Copies are exact; so is what lies between and behind the rows. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "core/rng.h"
#include "tests/cuda_ops.h"

/* dev [n] act holds exactly want. */
static void check_exact(struct cuda_pair *p, const char *what, const void *dev, const float *want, int64_t n)
{
    float *got = cuda_floats(n);
    cuda_get_act(p, got, dev, n);
    for (int64_t i = 0; i < n; i++)
        if (!(got[i] == want[i]))
            fail_msg("%s: element %lld is %g, expected %g", what, (long long)i, (double)got[i], (double)want[i]);
    rt_free(got);
}

/* n distinct numbers below rows, in no order */
static void distinct(int32_t *to, int64_t n, int64_t rows)
{
    struct rt_err err = {0};
    int64_t *perm;
    assert_ok(rt_alloc((size_t)rows, sizeof *perm, "test", &perm, &err));
    rt_rng_permutation(9, (uint64_t)rows, rows, perm);
    for (int64_t i = 0; i < n; i++)
        to[i] = (int32_t)perm[i];
    rt_free(perm);
}

/* ---- copies ---- */
enum { ROWS = 301, N = 77 };

static void copies(struct cuda_pair *p, int64_t cols)
{
    struct rt_err err = {0};
    int32_t index[N];
    float *x = cuda_floats(ROWS * cols), *y = cuda_floats(N * cols), *want = cuda_floats(ROWS * cols);
    distinct(index, N, ROWS);
    cuda_random(x, ROWS * cols, 1, 1.0f);
    cuda_random(y, N * cols, 2, 1.0f);
    void *dx = cuda_act(p, x, ROWS * cols), *dy = cuda_act(p, y, N * cols), *out = cuda_act(p, NULL, N * cols);
    int32_t *di = cuda_bytes(p, index, sizeof index);

    assert_ok(RT_OP(&p->ref, gather, &err, .x = x, .index = index, .out = want, .n = N, .cols = cols));
    assert_ok(RT_OP(&p->gpu, gather, &err, .x = dx, .index = di, .out = out, .n = N, .cols = cols));
    check_exact(p, "gather", out, want, N * cols);
    for (int add = 0; add < 2; add++) { /* a sum of two is rounded once, as here */
        assert_ok(RT_OP(&p->ref, scatter, &err, .y = y, .index = index, .x = x, .n = N, .cols = cols, .accumulate = add));
        cuda_round(x, ROWS * cols);
        assert_ok(RT_OP(&p->gpu, scatter, &err, .y = dy, .index = di, .x = dx, .n = N, .cols = cols, .accumulate = add));
        check_exact(p, add ? "scatter +=" : "scatter", dx, x, ROWS * cols);
    }
    struct cuda_weight table = cuda_weight_bf16(p, ROWS, cols, 3, 1.0f);
    index[1] = index[0]; /* an id may come twice */
    cuda_free(p, di);
    di = cuda_bytes(p, index, sizeof index);
    assert_ok(RT_OP(&p->ref, embed_fwd, &err, .ids = index, .table = table.ref, .out = want, .n = N, .cols = cols));
    assert_ok(RT_OP(&p->gpu, embed_fwd, &err, .ids = di, .table = table.gpu, .out = out, .n = N, .cols = cols));
    check_exact(p, "embed_fwd", out, want, N * cols);
    cuda_weight_free(p, &table);
    cuda_free(p, dx);
    cuda_free(p, dy);
    cuda_free(p, out);
    cuda_free(p, di);
    rt_free(x);
    rt_free(y);
    rt_free(want);
}

static void test_copies(void **state)
{
    static const int64_t cols[] = {8, 64, 512, 896, 7168, 8200, 33, 1, 2051};
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cols / sizeof cols[0]; i++)
        copies(&p, cols[i]);
    cuda_pair_close(&p);
}

static void caches(struct cuda_pair *p, int64_t width, int64_t ldx)
{
    enum { SLOTS = 5, CAPACITY = 11, TOKENS = 6 };
    static const int32_t slot[TOKENS] = {4, 0, 4, 2, 0, 1}, pos[TOKENS] = {10, 3, 0, 7, 4, 0};
    struct rt_err err = {0};
    const int64_t size = SLOTS * CAPACITY * width;
    float *cache = cuda_floats(size), *x = cuda_floats(TOKENS * ldx);
    cuda_random(cache, size, 1, 1.0f);
    cuda_random(x, TOKENS * ldx, 2, 1.0f);
    void *dc = cuda_act(p, cache, size), *dx = cuda_act(p, x, TOKENS * ldx);
    int32_t *ds = cuda_bytes(p, slot, sizeof slot), *dp = cuda_bytes(p, pos, sizeof pos);
    assert_ok(RT_OP(&p->ref, cache_put, &err, .x = x, .ldx = ldx, .cache = cache, .slot = slot, .pos = pos, .n = TOKENS, .capacity = CAPACITY,
                    .width = width));
    assert_ok(RT_OP(&p->gpu, cache_put, &err, .x = dx, .ldx = ldx, .cache = dc, .slot = ds, .pos = dp, .n = TOKENS, .capacity = CAPACITY,
                    .width = width));
    check_exact(p, "cache_put", dc, cache, size);
    for (int src = 2; src <= 3; src++) { /* slot 3 onto itself: nothing */
        assert_ok(RT_OP(&p->ref, cache_copy, &err, .cache = cache, .capacity = CAPACITY, .width = width, .n = 9, .src = src, .dst = 3));
        assert_ok(RT_OP(&p->gpu, cache_copy, &err, .cache = dc, .capacity = CAPACITY, .width = width, .n = 9, .src = src, .dst = 3));
    }
    check_exact(p, "cache_copy", dc, cache, size);
    cuda_free(p, dc);
    cuda_free(p, dx);
    cuda_free(p, ds);
    cuda_free(p, dp);
    rt_free(cache);
    rt_free(x);
}

static void test_caches(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    caches(&p, 576, 576);
    caches(&p, 1024, 4608);
    caches(&p, 40, 44);
    caches(&p, 7, 7);
    cuda_pair_close(&p);
}

/* ---- rope ---- */
struct rope {
    int64_t n, ld, head_ld, first; /* first: of the rotated elements within a row */
    int heads, dim;
    bool interleaved, inverse;
};

static void rope_case(struct cuda_pair *p, const struct rope *c)
{
    enum { POSITIONS = 50 };
    struct rt_err err = {0};
    char what[80];
    const int64_t head_ld = c->head_ld ? c->head_ld : c->dim, ld = c->ld ? c->ld : c->heads * head_ld, size = c->n * ld, half = c->dim / 2;
    float *x = cuda_floats(size), *was = cuda_floats(size), *got = cuda_floats(size), *table = cuda_floats(2 * POSITIONS * half);
    int32_t *position = (int32_t *)cuda_floats(c->n);
    for (int64_t i = 0; i < POSITIONS * half; i++) {
        const double angle = (double)(i / half) * pow(10000, -(double)(i % half) / (double)half);
        table[i] = (float)cos(angle);
        table[POSITIONS * half + i] = (float)sin(angle);
    }
    for (int64_t t = 0; t < c->n; t++)
        position[t] = (int32_t)((t * 7 + 3) % POSITIONS);
    cuda_random(x, size, 1, 1.0f);
    memcpy(was, x, (size_t)size * sizeof *x);
    char *dx = cuda_act(p, x, size);
    float *dt = cuda_bytes(p, table, (size_t)(2 * POSITIONS * half) * sizeof *table);
    int32_t *dp = cuda_bytes(p, position, (size_t)c->n * sizeof *position);
    assert_ok(RT_OP(&p->ref, rope, &err, .x = x + c->first, .ld = c->ld, .head_ld = c->head_ld, .cos = table, .sin = table + POSITIONS * half,
                    .position = position, .n = c->n, .heads = c->heads, .dim = c->dim, .interleaved = c->interleaved, .inverse = c->inverse));
    assert_ok(RT_OP(&p->gpu, rope, &err, .x = dx + 2 * c->first, .ld = c->ld, .head_ld = c->head_ld, .cos = dt, .sin = dt + POSITIONS * half,
                    .position = dp, .n = c->n, .heads = c->heads, .dim = c->dim, .interleaved = c->interleaved, .inverse = c->inverse));
    cuda_get_act(p, got, dx, size);
    for (int64_t i = 0; i < size; i++) {
        const int64_t in_row = i % ld - c->first, in_head = in_row >= 0 ? in_row % head_ld : -1;
        if ((in_row < 0 || in_row / head_ld >= c->heads || in_head >= c->dim) && got[i] != was[i])
            fail_msg("rope wrote element %lld, which is no part of a head", (long long)i);
    }
    snprintf(what, sizeof what, "rope %d heads of %d%s%s", c->heads, c->dim, c->interleaved ? ", pairs" : "", c->inverse ? ", inverse" : "");
    cuda_close(what, got, x, c->n, ld, CUDA_BF16_ONCE, 2 * CUDA_BF16_ONCE);
    cuda_free(p, dx);
    cuda_free(p, dt);
    cuda_free(p, dp);
    rt_free(x);
    rt_free(was);
    rt_free(got);
    rt_free(table);
    rt_free(position);
}

static void test_rope(void **state)
{
    static const struct rope cases[] = {
        {9, 128 * 192, 192, 128, 128, 64, true, false}, {70, 576, 0, 512, 1, 64, true, false}, {5, 16 * 192, 192, 128, 16, 64, true, true},
        {9, 0, 0, 0, 14, 64, false, false}, {6, 0, 160, 32, 5, 128, false, true}, {133, 0, 0, 0, 1, 128, false, false},
        {4, 0, 0, 0, 3, 96, true, false}, {1, 0, 0, 0, 300, 8, true, false},
        /* no vectors: dims, distances, beginnings */
        {7, 0, 0, 0, 3, 6, true, false}, {7, 0, 0, 0, 3, 20, false, false}, {7, 41, 0, 0, 2, 16, false, true}, {7, 0, 72, 1, 2, 64, true, false},
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        rope_case(&p, &cases[i]);
    cuda_pair_close(&p);
}

/* ---- elements ---- */
static void elements(struct cuda_pair *p, int64_t n, int64_t skip) /* skip: elements left out in front, so that no vectors fit */
{
    struct rt_err err = {0};
    char what[80];
    float *x = cuda_floats(n), *y = cuda_floats(n), *got = cuda_floats(n);
    double want, sum, again;
    cuda_random(x, n, 1, 1.0f);
    cuda_random(y, n, 2, 1.0f);
    char *dx = cuda_act(p, x, n), *dy = cuda_act(p, y, n);
    snprintf(what, sizeof what, "axpy of %lld from %lld", (long long)n, (long long)skip);
    assert_ok(RT_OP(&p->ref, axpy, &err, .x = x + skip, .y = y + skip, .n = n - skip, .a = -0.37));
    assert_ok(RT_OP(&p->gpu, axpy, &err, .x = dx + 2 * skip, .y = dy + 2 * skip, .n = n - skip, .a = -0.37));
    cuda_get_act(p, got, dy, n);
    cuda_close(what, got, y, 1, n, CUDA_BF16_ONCE, 0);
    memcpy(y, got, (size_t)n * sizeof *y);
    assert_ok(RT_OP(&p->ref, sumsq, &err, .x = y + skip, .n = n - skip, .out = &want));
    assert_ok(RT_OP(&p->gpu, sumsq, &err, .x = dy + 2 * skip, .n = n - skip, .out = &sum));
    assert_ok(RT_OP(&p->gpu, sumsq, &err, .x = dy + 2 * skip, .n = n - skip, .out = &again));
    assert_true(sum == again);
    if (!(fabs(sum - want) <= 1e-12 * want)) /* both in float64: the order of n sums */
        fail_msg("sumsq of %lld: %.17g, expected %.17g", (long long)n, sum, want);
    assert_ok(RT_OP(&p->ref, axpy, &err, .y = y + skip, .n = n - skip, .a = 0.125)); /* a power of two: exact */
    assert_ok(RT_OP(&p->gpu, axpy, &err, .y = dy + 2 * skip, .n = n - skip, .a = 0.125));
    check_exact(p, "scale", dy, y, n);
    cuda_free(p, dx);
    cuda_free(p, dy);
    rt_free(x);
    rt_free(y);
    rt_free(got);
}

static void test_elements(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    elements(&p, 1, 0);
    elements(&p, 8, 0);
    elements(&p, 8191, 0);
    elements(&p, 100000, 3);
    elements(&p, 3000007, 0);
    elements(&p, 9000000, 8);
    cuda_pair_close(&p);
}

/* More than 2^31 elements: what lies at the end is found, read and written there. */
static void test_long(void **state)
{
    enum { MANY = 310000, H = 7168, MARKED = 4 };
    static const int32_t index[MARKED] = {MANY - 1, 0, 299594, 150001}; /* 299594 * 7168 > 2^31 */
    const int64_t size = (int64_t)MANY * H;
    struct rt_dev_memory memory;
    struct cuda_pair p;
    struct rt_err err = {0};
    char *x = NULL, *q = NULL;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    assert_ok(p.gpu.be->memory(p.gpu.dev, &memory, &err));
    if (memory.free < (uint64_t)8 << 30) {
        cuda_pair_close(&p);
        TEST_SKIP("less than 8 GiB of GPU memory are free");
    }
    float *y = cuda_floats(MARKED * H), *scale = cuda_floats(56 * (int64_t)MANY);
    double want, sum;
    cuda_random(y, MARKED * H, 1, 1.0f);
    void *dy = cuda_act(&p, y, MARKED * H), *out = cuda_act(&p, NULL, MARKED * H);
    int32_t *di = cuda_bytes(&p, index, sizeof index);
    assert_ok(p.gpu.be->alloc(p.gpu.dev, (size_t)size * 2, (void **)&x, &err)); /* zeros */
    assert_ok(p.gpu.be->alloc(p.gpu.dev, (size_t)size + 56 * (size_t)MANY * 4, (void **)&q, &err));
    assert_ok(RT_OP(&p.gpu, scatter, &err, .y = dy, .index = di, .x = x, .n = MARKED, .cols = H));
    assert_ok(RT_OP(&p.gpu, axpy, &err, .y = x, .n = size, .a = 2));
    assert_ok(RT_OP(&p.ref, axpy, &err, .y = y, .n = MARKED * H, .a = 2));
    assert_ok(RT_OP(&p.gpu, gather, &err, .x = x, .index = di, .out = out, .n = MARKED, .cols = H));
    check_exact(&p, "rows far away", out, y, MARKED * H);
    assert_ok(RT_OP(&p.ref, sumsq, &err, .x = y, .n = MARKED * H, .out = &want));
    assert_ok(RT_OP(&p.gpu, sumsq, &err, .x = x, .n = size, .out = &sum));
    assert_true(fabs(sum - want) <= 1e-12 * want);

    float *norm = cuda_floats(MARKED * H), *got = cuda_floats(MARKED * H), *scale_dev = (float *)(void *)(q + size);
    uint8_t *code = (uint8_t *)cuda_floats(H / 4), *code_want = (uint8_t *)cuda_floats(H / 4);
    float one[56];
    assert_ok(RT_OP(&p.ref, norm_fwd, &err, .x = y, .y = norm, .n = MARKED, .cols = H, .eps = 1e-6f));
    assert_ok(RT_OP(&p.gpu, norm_fwd, &err, .x = x, .y = x, .yq = {q, scale_dev}, .n = MANY, .cols = H, .eps = 1e-6f));
    assert_ok(RT_OP(&p.gpu, gather, &err, .x = x, .index = di, .out = out, .n = MARKED, .cols = H));
    cuda_get_act(&p, got, out, MARKED * H);
    cuda_close("norm of rows far away", got, norm, MARKED, H, CUDA_BF16_ONCE, CUDA_BF16_ONCE);
    cuda_get(&p, scale, scale_dev, 56 * (size_t)MANY * 4);
    for (int i = 0; i < MARKED; i++) {
        assert_ok(RT_OP(&p.ref, quant, &err, .x = got + (int64_t)i * H, .q = {code_want, one}, .n = 1, .cols = H));
        cuda_get(&p, code, q + (size_t)index[i] * H, H);
        assert_memory_equal(code, code_want, H);
        for (int b = 0; b < 56; b++)
            assert_true(scale[(int64_t)b * MANY + index[i]] == one[b]);
    }
    p.gpu.be->free(p.gpu.dev, x);
    p.gpu.be->free(p.gpu.dev, q);
    cuda_free(&p, dy);
    cuda_free(&p, out);
    cuda_free(&p, di);
    void *own[] = {y, scale, norm, got, code, code_want};
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
        rt_free(own[i]);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_copies),
    cmocka_unit_test(test_caches),
    cmocka_unit_test(test_rope),
    cmocka_unit_test(test_elements),
    cmocka_unit_test(test_long),
};
RT_SUITE(cuda_rows, tests)
