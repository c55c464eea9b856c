/* The cuda backend: a gated MLP's products with the gating in them. Shapes that the kernel of compute capability 9.0 takes, and others. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "tests/cuda_ops.h"

struct shape {
    int64_t n, K, I;
    bool bias;
};
static const struct shape shapes[] = {
    {300, 192, 256, false},  {1, 64, 256, false},  {641, 896, 256, false}, {257, 320, 384, false},              /* backward: not a multiple of 256 */
    {2100, 64, 5120, false}, /* three tiles a block, and an odd number of row blocks */
    {130, 64, 1024, true},   {33, 40, 24, false}, {7, 13, 11, true},      {520, 96, 256, false},
};

/* Bytes of n elements on the device. */
static uint16_t *bits(struct cuda_pair *p, const void *dev, int64_t n)
{
    uint16_t *x = malloc((size_t)n * sizeof *x);
    assert_non_null(x);
    cuda_get(p, x, dev, (size_t)n * sizeof *x);
    return x;
}

static void expect_bits(struct cuda_pair *p, const void *dev, const uint16_t *want, int64_t n)
{
    uint16_t *x = bits(p, dev, n);
    assert_memory_equal(x, want, (size_t)n * sizeof *x);
    free(x);
}

/* gate and up [n, 2I] of the GPU, where they are; h by the way. */
static void one_forward(struct cuda_pair *p, const struct shape *c, void *gate_up, void *h)
{
    struct rt_err err = {0};
    char what[64];
    const int64_t n = c->n, K = c->K, I = c->I;
    struct cuda_weight w = cuda_weight_bf16(p, 2 * I, K, 2, 0.1f), b = {0};
    float *x = cuda_numbers(n * K, 1, 1.0f), *want = malloc((size_t)(n * 2 * I) * sizeof *want), *want_h = malloc((size_t)(n * I) * sizeof *want_h);
    float *got = malloc((size_t)(n * 2 * I) * sizeof *got);
    if (c->bias)
        b = cuda_weight_bf16(p, 1, 2 * I, 3, 1.0f);
    void *dx = cuda_act(p, x, n * K), *scratch = cuda_act(p, NULL, n * 2 * I), *again = cuda_act(p, NULL, n * I);
    assert_ok(RT_OP(&p->ref, gated_fwd, &err, .x = x, .w = w.ref, .bias = b.ref, .gate_up = want, .h = want_h, .n = n, .K = K, .I = I, .kept = true));
    assert_ok(RT_OP(&p->gpu, gated_fwd, &err, .x = dx, .w = w.gpu, .bias = b.gpu, .gate_up = gate_up, .h = h, .n = n, .K = K, .I = I, .kept = true));
    snprintf(what, sizeof what, "gated %ld x %ld -> 2 x %ld%s", (long)n, (long)K, (long)I, c->bias ? ", bias" : "");
    cuda_get_act(p, got, gate_up, n * 2 * I);
    cuda_close(what, got, want, n, 2 * I, cuda_once(n * 2 * I) * (c->bias ? 1.5 : 1), c->bias ? 0x3p-8 : 0x1p-8); /* cuBLASLt rounds before it adds a bias */
    /* silu from what was rounded */
    assert_ok(RT_OP(&p->ref, swiglu_fwd, &err, .gate = got, .up = got + I, .ld = 2 * I, .h = want_h, .n = n, .I = I));
    cuda_get_act(p, got, h, n * I);
    cuda_close("  h", got, want_h, n, I, cuda_once(n * I), 0x1p-8);
    /* the same bits where less is asked for */
    uint16_t *h_bits = bits(p, h, n * I), *gu_bits = bits(p, gate_up, n * 2 * I);
    assert_ok(RT_OP(&p->gpu, gated_fwd, &err, .x = dx, .w = w.gpu, .bias = b.gpu, .gate_up = scratch, .h = again, .n = n, .K = K, .I = I));
    expect_bits(p, again, h_bits, n * I);
    assert_ok(RT_OP(&p->gpu, gated_fwd, &err, .x = dx, .w = w.gpu, .bias = b.gpu, .gate_up = scratch, .n = n, .K = K, .I = I, .kept = true));
    expect_bits(p, scratch, gu_bits, n * 2 * I);
    cuda_free(p, dx);
    cuda_free(p, scratch);
    cuda_free(p, again);
    cuda_weight_free(p, &w);
    if (c->bias)
        cuda_weight_free(p, &b);
    free(h_bits);
    free(gu_bits);
    rt_free(x);
    free(want);
    free(want_h);
    free(got);
}

/* From the forward's gate, up and h. */
static void one_backward(struct cuda_pair *p, const struct shape *c, const void *gate_up, const void *h)
{
    struct rt_err err = {0};
    char what[64];
    const int64_t n = c->n, N = c->K, I = c->I;
    struct cuda_weight w = cuda_weight_bf16(p, N, I, 5, 0.1f);
    float *dy = cuda_numbers(n * N, 4, 0.1f), *gu = malloc((size_t)(n * 2 * I) * sizeof *gu), *dh = malloc((size_t)(n * I) * sizeof *dh);
    float *want = malloc((size_t)(n * 2 * I) * sizeof *want), *got = malloc((size_t)(n * 2 * I) * sizeof *got);
    void *ddy = cuda_act(p, dy, n * N), *ddh = cuda_act(p, NULL, n * I), *d = cuda_act(p, NULL, n * 2 * I), *again = cuda_act(p, NULL, n * I);
    uint16_t *h_bits = bits(p, h, n * I);
    cuda_get_act(p, gu, gate_up, n * 2 * I);
    assert_ok(RT_OP(&p->ref, gated_bwd, &err, .dy = dy, .w = w.ref, .gate_up = gu, .dh = dh, .d_gate_up = want, .n = n, .N = N, .I = I));
    assert_ok(RT_OP(&p->gpu, gated_bwd, &err, .dy = ddy, .w = w.gpu, .gate_up = gate_up, .dh = ddh, .d_gate_up = d, .h = again, .n = n, .N = N, .I = I));
    snprintf(what, sizeof what, "gated backward %ld x %ld <- %ld", (long)n, (long)I, (long)N);
    cuda_get_act(p, got, d, n * 2 * I);
    cuda_close(what, got, want, n, 2 * I, 2 * cuda_once(n * 2 * I), 0x1p-7); /* dh is rounded, and what is made of it */
    expect_bits(p, again, h_bits, n * I);
    uint16_t *d_bits = bits(p, d, n * 2 * I);
    assert_ok(RT_OP(&p->gpu, gated_bwd, &err, .dy = ddy, .w = w.gpu, .gate_up = gate_up, .dh = ddh, .d_gate_up = d, .n = n, .N = N, .I = I));
    expect_bits(p, d, d_bits, n * 2 * I);
    cuda_get(p, gu, gate_up, (size_t)(n * 2 * I) * 2); /* the same in place */
    assert_ok(rt_device_upload(&p->gpu, d, gu, (size_t)(n * 2 * I) * 2, &err));
    assert_ok(RT_OP(&p->gpu, gated_bwd, &err, .dy = ddy, .w = w.gpu, .gate_up = d, .dh = ddh, .d_gate_up = d, .h = ddh, .n = n, .N = N, .I = I));
    expect_bits(p, d, d_bits, n * 2 * I);
    expect_bits(p, ddh, h_bits, n * I);
    cuda_free(p, ddy);
    cuda_free(p, ddh);
    cuda_free(p, d);
    cuda_free(p, again);
    cuda_weight_free(p, &w);
    free(h_bits);
    free(d_bits);
    rt_free(dy);
    free(gu);
    free(dh);
    free(want);
    free(got);
}

static void test_gated(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape *c = &shapes[i];
        void *gate_up = cuda_act(&p, NULL, c->n * 2 * c->I), *h = cuda_act(&p, NULL, c->n * c->I);
        one_forward(&p, c, gate_up, h);
        one_backward(&p, c, gate_up, h);
        cuda_free(&p, gate_up);
        cuda_free(&p, h);
    }
    cuda_pair_close(&p);
}

/* Gates at both ends of the exponential, and operands of the wrong shape. */
static void test_ends(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    enum { n = 4, K = 64, I = 256 };
    static float x[n * K], gu[n * 2 * I], h[n * I];
    static const float gate[n] = {100, -100, -600, 0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    static uint16_t host[2 * I * K]; /* a column of ones: gate and up are the first number of a row */
    for (int i = 0; i < 2 * I; i++)
        host[i * K] = 0x3f80;
    void *dw = cuda_bytes(&p, host, sizeof host);
    struct rt_weight *ones = NULL;
    assert_ok(p.gpu.be->weight_param(p.gpu.dev, dw, 2 * I, K, &ones, &err));
    for (int i = 0; i < n; i++)
        x[i * K] = gate[i];
    void *dx = cuda_act(&p, x, n * K), *dgu = cuda_act(&p, NULL, n * 2 * I), *dh = cuda_act(&p, NULL, n * I);
    assert_ok(RT_OP(&p.gpu, gated_fwd, &err, .x = dx, .w = ones, .gate_up = dgu, .h = dh, .n = n, .K = K, .I = I, .kept = true));
    cuda_get_act(&p, gu, dgu, n * 2 * I);
    cuda_get_act(&p, h, dh, n * I);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < I; j++) {
            assert_true(gu[i * 2 * I + j] == gate[i] && gu[i * 2 * I + I + j] == gate[i]);
            assert_true(gate[i] > 0 ? h[i * I + j] == 9984 : h[i * I + j] == 0); /* 100^2 in bfloat16 */
        }
    assert_status(RT_OP(&p.gpu, gated_fwd, &err, .x = dx, .w = ones, .gate_up = dgu, .h = dh, .n = n, .K = K, .I = I / 2, .kept = true), SHAPE);
    err = (struct rt_err){0};
    assert_status(RT_OP(&p.gpu, gated_bwd, &err, .dy = dx, .w = ones, .gate_up = dgu, .dh = dh, .d_gate_up = dgu, .n = n, .N = K, .I = I), SHAPE);
    p.gpu.be->weight_free(p.gpu.dev, ones);
    cuda_free(&p, dw);
    cuda_free(&p, dx);
    cuda_free(&p, dgu);
    cuda_free(&p, dh);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_gated),
    cmocka_unit_test(test_ends),
};
RT_SUITE(cuda_gated, tests)
