/* Measured products: the file that keeps them, whole, damaged and foreign; then on the GPU that a measured product is right, that its output is added to
 * once, and that a run with the file has the same bytes. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "tests/cuda_ops.h"

#ifdef RT_CUDA
#include "core/cuda/cuda.h"
#include "core/cuda/race.h"
#include "core/cuda/tune.h"

static const char gpu[] = "Some GPU, 132 multiprocessors";
enum { LIBRARY = 130100, SPACE = 1 << 26 };

static struct rt_product_choice choice(int i)
{
    struct rt_product_choice c;
    memset(&c, 0, sizeof c);
    c.key = (struct rt_product_key){.M = 1024 + i, .N = (int64_t)1 << 40, .K = 7, .lda = 1, .ldb = 2, .ldd = 3, .batch = 1, .align_a = 16, .align_b = 2,
                                    .align_d = 4, .flags = 5 + i};
    for (int w = 0; w < RT_ALGO_WORDS; w++)
        c.algo[w] = 0xfedcba9876543210u * (uint64_t)(w + i + 1);
    c.rank = i;
    c.first_ns = 1000 + i;
    c.best_ns = 900 + i;
    return c;
}

static struct rt_tune *opened(const char *path, char note[256])
{
    struct rt_err err = {0};
    struct rt_tune *t = NULL;
    assert_ok(rt_tune_open(path, gpu, LIBRARY, SPACE, &t, note, 256, &err));
    return t;
}

static void fill(struct rt_tune *t, int n)
{
    struct rt_err err = {0};
    for (int i = 0; i < n; i++) {
        const struct rt_product_choice c = choice(i);
        assert_null(rt_tune_find(t, &c.key));
        assert_ok(rt_tune_add(t, &c, &err));
    }
}

static void test_kept(void **state)
{
    enum { N = 70 };
    const char *path = test_tmp("products");
    char note[256];
    (void)state;
    struct rt_tune *t = opened(path, note);
    assert_int_equal(note[0], 0);
    fill(t, N);
    rt_tune_close(t);
    t = opened(path, note);
    assert_int_equal(note[0], 0);
    for (int i = 0; i < N; i++) {
        const struct rt_product_choice c = choice(i), *got = rt_tune_find(t, &c.key);
        assert_non_null(got);
        assert_memory_equal(got, &c, sizeof c);
    }
    rt_tune_close(t);
    t = opened(NULL, note); /* in memory */
    fill(t, 3);
    assert_string_equal(rt_tune_path(t), "memory");
    rt_tune_close(t);
}

/* The choice of the fewest tokens above, where all else is equal. */
static void test_wider(void **state)
{
    static const int64_t tokens[] = {16384, 2048, 4096};
    struct rt_err err = {0};
    char note[256];
    struct rt_tune *t = opened(NULL, note);
    (void)state;
    for (int in_k = 0; in_k < 2; in_k++) {
        struct rt_product_choice c = choice(in_k), more = choice(in_k);
        for (int i = 0; i < 3; i++) {
            *(in_k ? &more.key.K : &more.key.N) = tokens[i];
            assert_ok(rt_tune_add(t, &more, &err));
        }
        for (int i = 0; i < 5; i++) {
            static const int64_t asked[] = {1024, 2047, 2048, 8192, 16384}, found[] = {2048, 2048, 4096, 16384, 0};
            *(in_k ? &c.key.K : &c.key.N) = asked[i];
            const struct rt_product_choice *got = rt_tune_find_wider(t, &c.key, in_k);
            assert_int_equal(got == NULL ? 0 : in_k ? got->key.K : got->key.N, found[i]);
            assert_null(rt_tune_find_wider(t, &c.key, !in_k));
        }
        c.key.M++;
        *(in_k ? &c.key.K : &c.key.N) = 1024;
        assert_null(rt_tune_find_wider(t, &c.key, in_k));
    }
    rt_tune_close(t);
}

/* Every byte changed, every length: refused, and never a choice taken from it. */
static void test_damaged(void **state)
{
    const char *path = test_tmp("damaged"), *copy = test_tmp("damaged.copy");
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char note[256];
    (void)state;
    struct rt_tune *t = opened(path, note);
    fill(t, 2);
    rt_tune_close(t);
    assert_ok(rt_file_read_all(path, 1 << 20, &b, &err));
    for (size_t i = 0; i < b.len; i++) {
        b.data[i] ^= 1;
        assert_ok(rt_publish_bytes(copy, b.data, b.len, &err));
        assert_status(rt_tune_open(copy, gpu, LIBRARY, SPACE, &t, note, sizeof note, &err), FORMAT);
        b.data[i] ^= 1;
        if (i % 16 != 0)
            continue;
        assert_ok(rt_publish_bytes(copy, b.data, i, &err));
        assert_status(rt_tune_open(copy, gpu, LIBRARY, SPACE, &t, note, sizeof note, &err), FORMAT);
    }
    rt_buf_free(&b);
}

static void test_foreign(void **state)
{
    const char *path = test_tmp("foreign");
    static const struct {
        const char *gpu;
        uint64_t library, space;
    } others[] = {{"Another GPU", LIBRARY, SPACE}, {gpu, LIBRARY + 1, SPACE}, {gpu, LIBRARY, 2 * SPACE}};
    const struct rt_product_choice c = choice(0);
    struct rt_err err = {0};
    char note[256];
    (void)state;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        remove(path);
        struct rt_tune *t = opened(path, note);
        fill(t, 2);
        rt_tune_close(t);
        assert_ok(rt_tune_open(path, others[i].gpu, others[i].library, others[i].space, &t, note, sizeof note, &err));
        assert_non_null(strstr(note, path));
        assert_null(rt_tune_find(t, &c.key));
        fill(t, 1); /* now it is theirs */
        rt_tune_close(t);
        assert_ok(rt_tune_open(path, others[i].gpu, others[i].library, others[i].space, &t, note, sizeof note, &err));
        assert_int_equal(note[0], 0);
        assert_non_null(rt_tune_find(t, &c.key));
        rt_tune_close(t);
    }
}

/* ---- on the GPU ---- */

/* A linear layer's three products, 6.7e9 FLOPs each, so that they are measured: y = x w^T, dx = dy w, dw += dy^T x. What wins for one is a candidate of
 * the next. */
enum { TOKENS = 1300, OUT = 1600, IN = 1600, RESULT = TOKENS * OUT + TOKENS * IN + OUT * IN };
enum { MORE = 1500, FEWER = 1000 }; /* in the octave of TOKENS and below it; work enough to be measured, too */

struct product {
    float *w, *x, *dy, *got; /* got [RESULT] */
};

/* With products measured by the file (path), in memory (NULL), or as the library likes ("-"). bytes [RESULT]: the results as they lie in memory. Then
 * products of MORE and FEWER rows, whose results nobody looks at. */
static void run_product(const struct product *v, const char *path, uint16_t *bytes)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    char note[256] = "";
    assert_true(cuda_pair_open(&p));
    if (path == NULL || strcmp(path, "-") != 0)
        assert_ok(p.gpu.be->tune(p.gpu.dev, path, note, sizeof note, &err));
    assert_int_equal(note[0], 0);
    void *at = cuda_act(&p, v->w, OUT * IN), *x = cuda_act(&p, v->x, TOKENS * IN), *dy = cuda_act(&p, v->dy, TOKENS * OUT);
    void *result[3] = {cuda_act(&p, NULL, TOKENS * OUT), cuda_act(&p, NULL, TOKENS * IN), cuda_act(&p, v->w, OUT * IN)};
    const int64_t sizes[3] = {TOKENS * OUT, TOKENS * IN, OUT * IN};
    struct rt_weight *w;
    assert_ok(p.gpu.be->weight_param(p.gpu.dev, at, OUT, IN, &w, &err));
    assert_ok(RT_OP(&p.gpu, linear_fwd, &err, .x = {.data = x}, .w = w, .y = result[0], .n = TOKENS, .K = IN, .N = OUT));
    assert_ok(RT_OP(&p.gpu, linear_dgrad, &err, .dy = dy, .w = w, .dx = result[1], .n = TOKENS, .K = IN, .N = OUT));
    assert_ok(RT_OP(&p.gpu, linear_wgrad, &err, .dy = dy, .x = x, .dw = result[2], .n = TOKENS, .K = IN, .N = OUT));
    for (int64_t i = 0, first = 0; i < 3; first += sizes[i++]) {
        cuda_get_act(&p, v->got + first, result[i], sizes[i]);
        cuda_get(&p, bytes + first, result[i], (size_t)sizes[i] * sizeof *bytes);
    }
    void *more = cuda_act(&p, NULL, MORE * IN), *y = cuda_act(&p, NULL, MORE * OUT);
    assert_ok(RT_OP(&p.gpu, linear_fwd, &err, .x = {.data = more}, .w = w, .y = y, .n = MORE, .K = IN, .N = OUT));
    assert_ok(RT_OP(&p.gpu, linear_fwd, &err, .x = {.data = x}, .w = w, .y = y, .n = FEWER, .K = IN, .N = OUT));
    assert_ok(RT_OP(&p.gpu, linear_wgrad, &err, .dy = dy, .x = x, .dw = result[2], .n = FEWER, .K = IN, .N = OUT));
    cuda_free(&p, more);
    cuda_free(&p, y);
    for (int i = 0; i < 3; i++)
        cuda_free(&p, result[i]);
    p.gpu.be->weight_free(p.gpu.dev, w);
    cuda_free(&p, at);
    cuda_free(&p, x);
    cuda_free(&p, dy);
    cuda_pair_close(&p);
}

static void test_product(void **state)
{
    struct cuda_pair p;
    const char *path = test_tmp("gpu.products");
    static uint16_t bytes[3][RESULT];
    struct rt_err err = {0};
    struct rt_buf first = {0}, second = {0};
    int kept = 0;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const bool library = p.gpu.dev->lt != NULL;
    cuda_pair_close(&p);
    if (!library)
        TEST_SKIP("no cuBLASLt");
    struct product v = {cuda_numbers(OUT * IN, 1, 1.0f), cuda_numbers(TOKENS * IN, 2, 1.0f), cuda_numbers(TOKENS * OUT, 3, 1.0f), cuda_numbers(RESULT, 4, 1.0f)};
    float *plain = cuda_numbers(RESULT, 5, 1.0f);
    run_product(&v, "-", bytes[0]);
    memcpy(plain, v.got, RESULT * sizeof *plain);
    run_product(&v, path, bytes[1]);
    cuda_close("y measured, against the first choice", v.got, plain, TOKENS, OUT, 3.5e-3, 0); /* BF16_TWICE of test_cuda_gemm.c */
    cuda_close("dx", v.got + TOKENS * OUT, plain + TOKENS * OUT, TOKENS, IN, 3.5e-3, 0);
    cuda_close("dw", v.got + TOKENS * (OUT + IN), plain + TOKENS * (OUT + IN), OUT, IN, 3.5e-3, 0);
    assert_ok(rt_file_read_all(path, 1 << 20, &first, &err));
    run_product(&v, path, bytes[2]);
    assert_memory_equal(bytes[1], bytes[2], sizeof bytes[1]);
    assert_ok(rt_file_read_all(path, 1 << 20, &second, &err));
    assert_int_equal(first.len, second.len);
    assert_memory_equal(first.data, second.data, first.len); /* nothing was measured again */
    for (const char *at = first.data; (at = strstr(at, "\nproduct ")) != NULL; at++)
        kept++;
    assert_int_equal(kept, 3); /* nor for other numbers of rows */
    run_product(&v, NULL, bytes[2]);
    cuda_close("measured in memory", v.got, plain, 1, RESULT, 3.5e-3, 0);
    rt_buf_free(&first);
    rt_buf_free(&second);
    rt_free(v.w);
    rt_free(v.x);
    rt_free(v.dy);
    rt_free(v.got);
    rt_free(plain);
}

/* A file with a right hash, whose algorithm the library does not know: an error that names it, before anything is multiplied. */
static void test_false_algorithm(void **state)
{
    struct cuda_pair p;
    const char *path = test_tmp("false.products"), *at;
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char note[256], header[256] = "", library[64];
    unsigned long version, space;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    if (p.gpu.dev->lt == NULL) {
        cuda_pair_close(&p);
        TEST_SKIP("no cuBLASLt");
    }
    float *zero = cuda_numbers(TOKENS * IN, 6, 1.0f), *got = cuda_numbers(OUT * IN, 7, 1.0f);
    void *dw = cuda_act(&p, got, OUT * IN), *x = cuda_act(&p, zero, TOKENS * IN), *dy = cuda_act(&p, zero, TOKENS * OUT);
    assert_ok(p.gpu.be->tune(p.gpu.dev, path, note, sizeof note, &err));
    assert_ok(RT_OP(&p.gpu, linear_wgrad, &err, .dy = dy, .x = x, .dw = dw, .n = TOKENS, .K = IN, .N = OUT));
    assert_ok(rt_file_read_all(path, 1 << 20, &b, &err));
    at = strstr(b.data, "library ");
    assert_non_null(at);
    assert_int_equal(sscanf(at, "library %lu workspace %lu", &version, &space), 2);
    snprintf(library, sizeof library, "\nlibrary %lu", version);
    const char *name = strstr(b.data, "gpu ") + 4;
    snprintf(header, sizeof header, "%.*s", (int)(strstr(b.data, library) - name), name);
    struct rt_tune *t;
    assert_ok(rt_tune_open(path, header, version, space, &t, note, sizeof note, &err));
    struct rt_product_choice c = {0};
    at = strstr(b.data, "product ");
    long v[14];
    at += strlen("product");
    for (int i = 0; i < 14; i++) {
        int n = 0;
        assert_int_equal(sscanf(at, " %ld%n", &v[i], &n), 1);
        at += n;
    }
    c.key = (struct rt_product_key){v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], (int32_t)v[10], (int32_t)v[11], (int32_t)v[12], (int32_t)v[13]};
    assert_non_null(rt_tune_find(t, &c.key));
    rt_tune_close(t);
    remove(path);
    assert_ok(rt_tune_open(path, header, version, space, &t, note, sizeof note, &err));
    memset(c.algo, 0x5a, sizeof c.algo);
    assert_ok(rt_tune_add(t, &c, &err));
    rt_tune_close(t);
    assert_ok(p.gpu.be->tune(p.gpu.dev, path, note, sizeof note, &err));
    assert_int_equal(note[0], 0);
    assert_status(RT_OP(&p.gpu, linear_wgrad, &err, .dy = dy, .x = x, .dw = dw, .n = TOKENS, .K = IN, .N = OUT), FORMAT);
    cuda_free(&p, dw);
    cuda_free(&p, x);
    cuda_free(&p, dy);
    rt_free(zero);
    rt_free(got);
    rt_buf_free(&b);
    cuda_pair_close(&p);
}

struct runner {
    struct cuda_pair *p;
    void *block;
    int calls;
};

/* 0 refuses; 1 clears 256 MiB, 2 a tenth of it. */
static bool clear(void *ctx, int i)
{
    struct runner *r = ctx;
    struct rt_err err = {0};
    r->calls++;
    if (i > 0)
        assert_ok(rt_device_zero(&r->p->gpu, r->block, ((size_t)256 << 20) / (i == 1 ? 1 : 10), &err));
    return i > 0;
}

/* Two candidates: 0 is the faster one, until it has run by itself for long. */
struct tiring {
    struct cuda_pair *p;
    void *block;
    int last, in_a_row;
};
static bool tires(void *ctx, int i)
{
    struct tiring *t = ctx;
    t->in_a_row = i == t->last ? t->in_a_row + 1 : 0;
    t->last = i;
    struct rt_err err = {0};
    const bool tired = i == 0 && t->in_a_row >= 1000;
    for (int k = 0; k < (tired ? 4 : 1); k++)
        assert_ok(rt_device_zero(&t->p->gpu, t->block, (size_t)(i == 0 && !tired ? 64 : 128) << 20, &err));
    return true;
}

static void test_final(void **state)
{
    struct cuda_pair p;
    struct rt_race_result r;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    struct tiring ctx = {.p = &p, .last = -1};
    assert_ok(p.gpu.be->alloc(p.gpu.dev, (size_t)128 << 20, &ctx.block, &err));
    assert_ok(rt_cuda_race(p.gpu.q, 2, tires, &ctx, &(struct rt_race_rules){.warm_up = 0.001, .also = -1}, &r, &err));
    assert_int_equal(r.best, 0);
    assert_ok(rt_cuda_race(p.gpu.q, 2, tires, &ctx, &(struct rt_race_rules){.warm_up = 0.001, .alone = 0.05, .also = 1}, &r, &err));
    assert_int_equal(r.best, 1);
    assert_true(r.best_ns < r.first_ns);
    p.gpu.be->free(p.gpu.dev, ctx.block);
    cuda_pair_close(&p);
}

static void test_race(void **state)
{
    struct cuda_pair p;
    struct rt_race_result r;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    struct runner ctx = {.p = &p};
    assert_ok(p.gpu.be->alloc(p.gpu.dev, (size_t)256 << 20, &ctx.block, &err));
    assert_ok(rt_cuda_race(p.gpu.q, 3, clear, &ctx, &(struct rt_race_rules){.warm_up = 0.001, .also = -1}, &r, &err));
    assert_int_equal(r.best, 2);
    assert_int_equal(r.first_ns, 0);
    assert_true(r.best_ns > 0);
    assert_ok(rt_cuda_race(p.gpu.q, 1, clear, &ctx, &(struct rt_race_rules){.warm_up = 0.001, .also = -1}, &r, &err)); /* all refuse */
    assert_true(r.best == 0 && r.best_ns == 0);
    p.gpu.be->free(p.gpu.dev, ctx.block);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_kept),    cmocka_unit_test(test_wider),           cmocka_unit_test(test_damaged),         cmocka_unit_test(test_foreign),
    cmocka_unit_test(test_product), cmocka_unit_test(test_false_algorithm), cmocka_unit_test(test_race),
    cmocka_unit_test(test_final)
};

#else

static void test_absent(void **state)
{
    (void)state;
    TEST_SKIP("built without CUDA");
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(test_absent)};

#endif

RT_SUITE(cuda_tune, tests)
