/* Linear layers on the GPU against ref: the product and its two gradients, and what adding up gradients in BF16 costs. */
#include <stdio.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "tests/cuda_ops.h"

#ifdef RT_CUDA
#include "core/cuda/gemm.h"

/* Float32 results differ from the reference by the rounding of their sums alone: tensor cores cut each of up to 100 partial sums of 16 terms at
 * 2^-23 of its size. */
#define F32_SUMS 5e-6
/* Two roundings to bfloat16 on the way (tests/test_cuda_gemm.c). */
#define BF16_TWICE 3.5e-3

struct linear {
    int64_t n, K, N, ldx, ldy;
    bool accumulate, y_f32, bias, quantised, e4m3, add;
};

static void linear_case(struct cuda_pair *p, const struct linear *l)
{
    struct rt_err err = {0};
    const int64_t ldx = l->ldx > 0 ? l->ldx : l->K, ldy = l->ldy > 0 ? l->ldy : l->N, nx = l->n * ldx, ny = l->n * ldy;
    float *x = cuda_floats(nx), *y = cuda_floats(ny), *got = cuda_floats(ny);
    char what[112];
    cuda_random(x, nx, 21, 2.0f);
    cuda_random(y, ny, 22, 30.0f);
    if (!l->accumulate)
        cuda_poison(y, l->n, l->N, ldy);
    float *add = cuda_floats(ny);
    cuda_random(add, ny, 25, 20.0f);
    void *dadd = cuda_act(p, add, ny);
    struct cuda_weight w = l->e4m3 ? cuda_weight_e4m3(p, l->N, l->K, 23, 1.0f) : cuda_weight_bf16(p, l->N, l->K, 23, 1.0f);
    struct cuda_weight b = l->bias ? cuda_weight_bf16(p, 1, l->N, 24, 20.0f) : (struct cuda_weight){0};
    struct cuda_quantised q = {{NULL, NULL}, {NULL, NULL}};
    struct rt_act dx = {NULL, NULL};
    if (l->quantised) {
        q = cuda_quantise(p, x, l->n, l->K);
        dx = q.gpu;
    } else {
        dx.data = cuda_act(p, x, nx);
    }
    void *dy = l->y_f32 ? cuda_bytes(p, y, (size_t)ny * 4) : cuda_act(p, y, ny);
    assert_ok(RT_OP(&p->gpu, linear_fwd, &err, .x = dx, .ldx = l->ldx, .w = w.gpu, .bias = b.gpu, .add = l->add ? dadd : NULL, .y = dy, .ldy = l->ldy, .n = l->n,
                    .K = l->K, .N = l->N, .accumulate = l->accumulate, .y_f32 = l->y_f32));
    assert_ok(RT_OP(&p->ref, linear_fwd, &err, .x = l->quantised ? q.ref : (struct rt_act){x, NULL}, .ldx = l->ldx, .w = w.ref, .bias = b.ref,
                    .add = l->add ? add : NULL, .y = y, .ldy = l->ldy, .n = l->n, .K = l->K, .N = l->N, .accumulate = l->accumulate));
    if (l->y_f32)
        cuda_get(p, got, dy, (size_t)ny * 4);
    else
        cuda_get_act(p, got, dy, ny);
    snprintf(what, sizeof what, "linear_fwd %lldx%lldx%lld%s%s%s%s%s", (long long)l->n, (long long)l->N, (long long)l->K,
             l->quantised ? " w8a8" : l->e4m3 ? " w8a16" : "", l->accumulate ? " +=" : "", l->y_f32 ? " f32" : "", l->bias ? " bias" : "",
             l->add ? " add" : "");
    cuda_close(what, got, y, l->n, ldy, l->y_f32 && !l->e4m3 ? F32_SUMS : BF16_TWICE, 0);
    cuda_free(p, dy);
    if (l->quantised)
        cuda_quantised_free(p, &q);
    else
        cuda_free(p, dx.data);
    if (l->bias)
        cuda_weight_free(p, &b);
    cuda_weight_free(p, &w);
    cuda_free(p, dadd);
    rt_free(add);
    rt_free(x);
    rt_free(y);
    rt_free(got);
}

static void test_linear_fwd(void **state)
{
    static const struct linear cases[] = {
        {1, 64, 48, 0, 0, false, false, true, false, false, false}, {77, 100, 131, 0, 0, false, false, true, false, false, false},
        {130, 136, 200, 144, 208, true, false, true, false, false, false}, {130, 136, 200, 137, 201, false, true, false, false, false, false},
        {200, 512, 96, 0, 0, true, true, true, false, false, false}, {33, 256, 576, 0, 0, false, false, false, false, true, false},
        {300, 192, 130, 200, 0, true, false, false, false, true, false}, {300, 256, 256, 0, 264, false, true, false, false, true, false},
        {1, 128, 128, 0, 0, false, false, false, true, true, false}, {66, 256, 576, 0, 0, true, false, false, true, true, false},
        {131, 512, 200, 0, 208, false, false, true, true, true, false}, {132, 384, 256, 0, 0, true, true, true, true, true, false},
    };
    static const struct linear adding[] = {
        /* by the library or our own, by products of few rows, of codes */
        {300, 136, 200, 0, 0, false, false, true, false, false, true}, {257, 100, 131, 0, 0, false, false, false, false, false, true},
        {5, 256, 128, 0, 0, false, false, true, false, false, true}, {131, 512, 200, 0, 0, false, false, true, true, true, true},
        {300, 256, 256, 0, 0, false, false, false, false, true, true},
    };
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        linear_case(&p, &cases[i]);
    for (size_t i = 0; i < sizeof adding / sizeof *adding; i++)
        linear_case(&p, &adding[i]);
    struct cuda_weight w = cuda_weight_bf16(&p, 8, 128, 1, 1.0f);
    struct rt_act x = {w.data, w.scale};
    float scale;
    assert_status(RT_OP(&p.gpu, linear_fwd, &err, .x = x, .w = w.gpu, .y = NULL, .n = 1, .K = 64, .N = 8), SHAPE);
    x.scale = &scale;
    assert_status(RT_OP(&p.gpu, linear_fwd, &err, .x = x, .w = w.gpu, .y = NULL, .n = 1, .K = 128, .N = 8), UNSUPPORTED);
    assert_ok(RT_OP(&p.gpu, linear_fwd, &err, .x = {NULL, NULL}, .w = w.gpu, .y = NULL, .n = 0, .K = 128, .N = 8));
    cuda_weight_free(&p, &w);
    cuda_pair_close(&p);
}

static void dgrad_case(struct cuda_pair *p, int64_t n, int64_t K, int64_t N, int64_t lddy, bool accumulate)
{
    struct rt_err err = {0};
    const int64_t ld = lddy > 0 ? lddy : N;
    float *dy = cuda_floats(n * ld), *dx = cuda_floats(n * K), *got = cuda_floats(n * K);
    cuda_random(dy, n * ld, 31, 1.0f);
    cuda_random(dx, n * K, 32, 20.0f);
    if (!accumulate)
        cuda_poison(dx, n, K, K);
    struct cuda_weight w = cuda_weight_bf16(p, N, K, 33, 1.0f);
    void *ddy = cuda_act(p, dy, n * ld), *ddx = cuda_act(p, dx, n * K);
    assert_ok(RT_OP(&p->gpu, linear_dgrad, &err, .dy = ddy, .lddy = lddy, .w = w.gpu, .dx = ddx, .n = n, .K = K, .N = N, .accumulate = accumulate));
    assert_ok(RT_OP(&p->ref, linear_dgrad, &err, .dy = dy, .lddy = lddy, .w = w.ref, .dx = dx, .n = n, .K = K, .N = N, .accumulate = accumulate));
    cuda_get_act(p, got, ddx, n * K);
    cuda_close(accumulate ? "linear_dgrad +=" : "linear_dgrad", got, dx, n, K, BF16_TWICE, 0);
    cuda_free(p, ddy);
    cuda_free(p, ddx);
    cuda_weight_free(p, &w);
    rt_free(dy);
    rt_free(dx);
    rt_free(got);
}

static void wgrad_case(struct cuda_pair *p, int64_t n, int64_t K, int64_t N, int64_t lddy, int64_t ldx, bool bias)
{
    struct rt_err err = {0};
    const int64_t ly = lddy > 0 ? lddy : N, lx = ldx > 0 ? ldx : K;
    float *dy = cuda_floats(n * ly), *x = cuda_floats(n * lx), *dw = cuda_floats(N * K), *db = cuda_floats(N), *got = cuda_floats(N * K), *got_b = cuda_floats(N);
    cuda_random(dy, n * ly, 41, 1.0f);
    cuda_random(x, n * lx, 42, 1.0f);
    cuda_random(dw, N * K, 43, 20.0f);
    cuda_random(db, N, 44, 20.0f);
    void *ddy = cuda_act(p, dy, n * ly), *dx = cuda_act(p, x, n * lx), *ddw = cuda_act(p, dw, N * K), *ddb = bias ? cuda_act(p, db, N) : NULL;
    assert_ok(RT_OP(&p->gpu, linear_wgrad, &err, .dy = ddy, .x = dx, .lddy = lddy, .ldx = ldx, .dw = ddw, .db = ddb, .n = n, .K = K, .N = N));
    assert_ok(RT_OP(&p->ref, linear_wgrad, &err, .dy = dy, .x = x, .lddy = lddy, .ldx = ldx, .dw = dw, .db = bias ? db : NULL, .n = n, .K = K, .N = N));
    cuda_get_act(p, got, ddw, N * K);
    cuda_close("linear_wgrad", got, dw, N, K, BF16_TWICE, 0);
    if (bias) {
        cuda_get_act(p, got_b, ddb, N);
        cuda_close("linear_wgrad, bias", got_b, db, 1, N, BF16_TWICE, 0);
    }
    cuda_free(p, ddy);
    cuda_free(p, dx);
    cuda_free(p, ddw);
    cuda_free(p, ddb);
    rt_free(dy);
    rt_free(x);
    rt_free(dw);
    rt_free(db);
    rt_free(got);
    rt_free(got_b);
}

static void test_gradients(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    dgrad_case(&p, 1, 64, 48, 0, false);
    dgrad_case(&p, 77, 100, 131, 140, true);
    dgrad_case(&p, 300, 256, 136, 0, true);
    wgrad_case(&p, 1, 64, 48, 0, 0, true);
    wgrad_case(&p, 77, 100, 131, 140, 111, true);
    wgrad_case(&p, 1000, 136, 264, 272, 0, true);
    wgrad_case(&p, 515, 256, 128, 0, 0, false);
    cuda_pair_close(&p);
}

/* Gradients of a step are added up in BF16, micro-batch by micro-batch: each addition rounds at 1.7e-3 of what is there so far, which for M of them that have
 * nothing in common comes to 1.7e-3 sqrt(M/2): 7e-3 for 32, a cosine of 0.99997. Equal ones are the worst, since each is rounded alike: 1.6e-2, 0.9999. */
static void test_accumulation(void **state)
{
    enum { N = 512, K = 384, TOKENS = 512, MICRO = 32 };
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    float *x = cuda_floats(TOKENS * K), *dy = cuda_floats(TOKENS * N), *zero = cuda_floats(N * K), *half = cuda_floats(N * K), *whole = cuda_floats(N * K);
    for (int alike = 0; alike < 2; alike++) {
        void *dw = cuda_act(&p, zero, N * K), *sum = cuda_bytes(&p, zero, (size_t)N * K * 4);
        for (int m = 0; m < MICRO; m++) {
            cuda_random(x, TOKENS * K, alike ? 1 : 1000 + (uint64_t)m, 1.0f);
            cuda_random(dy, TOKENS * N, alike ? 2 : 2000 + (uint64_t)m, 1.0f);
            void *gx = cuda_act(&p, x, TOKENS * K), *gdy = cuda_act(&p, dy, TOKENS * N);
            const struct rt_cuda_gemm_args g = {.a = gdy, .b = gx, .d = sum, .m = N, .n = K, .k = TOKENS, .a_t = true, .accumulate = true, .d_f32 = true};
            assert_ok(RT_OP(&p.gpu, linear_wgrad, &err, .dy = gdy, .x = gx, .dw = dw, .n = TOKENS, .K = K, .N = N));
            assert_ok(rt_cuda_gemm((struct rt_queue *)p.gpu.q, &g, &err));
            assert_ok(rt_device_sync(&p.gpu, &err));
            cuda_free(&p, gx);
            cuda_free(&p, gdy);
        }
        cuda_get_act(&p, half, dw, N * K);
        cuda_get(&p, whole, sum, (size_t)N * K * 4);
        cuda_close(alike ? "32 equal micro-batches in BF16, against float32" : "32 micro-batches in BF16, against float32", half, whole, 1, N * K, alike ? 2.5e-2 : 1e-2, 0);
        cuda_free(&p, dw);
        cuda_free(&p, sum);
    }
    float *const host[] = {x, dy, zero, half, whole};
    for (int i = 0; i < 5; i++)
        rt_free(host[i]);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_linear_fwd),
    cmocka_unit_test(test_gradients),
    cmocka_unit_test(test_accumulation),
};

#else

static void test_absent(void **state)
{
    (void)state;
    TEST_SKIP("built without CUDA");
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(test_absent)};

#endif

RT_SUITE(cuda_linear, tests)
