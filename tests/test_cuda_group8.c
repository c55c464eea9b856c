/* Products of e4m3 codes by the kernel of compute capability 9.0, alone and in groups of experts: sizes that its tiles do not divide.
 * On other GPUs the same calls take the library's way, and must give the same. */
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#include "tests/cuda_ops.h"

/* Sums of 128 columns come from the tensor cores, which keep some 14 bits of each e4m3 product's sum: errors of about 2^-13 of the terms' size,
 * which random signs make small beside the rounding to bfloat16. */
#define CODES CUDA_BF16_ONCE
#define CODES_ROW 6e-3

static void linear(struct cuda_pair *p, int64_t n, int64_t K, int64_t N, bool accumulate)
{
    struct rt_err err = {0};
    struct cuda_weight w = cuda_weight_e4m3(p, N, K, (uint64_t)(N + K), 0.05f);
    float *x, *want, *got;
    char what[96];
    assert_ok(rt_alloc((size_t)(n * K), sizeof *x, "x", &x, &err));
    assert_ok(rt_alloc((size_t)(n * N), sizeof *want, "want", &want, &err));
    assert_ok(rt_alloc((size_t)(n * N), sizeof *got, "got", &got, &err));
    cuda_random(x, n * K, 5, 2.0f);
    cuda_random(want, n * N, 6, 1.0f);
    struct cuda_quantised q = cuda_quantise(p, x, n, K);
    void *y = cuda_act(p, accumulate ? want : NULL, n * N);
    assert_ok(RT_OP(&p->ref, linear_fwd, &err, .x = q.ref, .w = w.ref, .y = want, .n = n, .K = K, .N = N, .accumulate = accumulate));
    assert_ok(RT_OP(&p->gpu, linear_fwd, &err, .x = q.gpu, .w = w.gpu, .y = y, .n = n, .K = K, .N = N, .accumulate = accumulate));
    cuda_get_act(p, got, y, n * N);
    snprintf(what, sizeof what, "%ld x %ld x %ld%s", (long)n, (long)N, (long)K, accumulate ? " +=" : "");
    cuda_close(what, got, want, n, N, CODES, CODES_ROW);
    cuda_free(p, y);
    cuda_quantised_free(p, &q);
    cuda_weight_free(p, &w);
    rt_free(x);
    rt_free(want);
    rt_free(got);
}

static void test_linear(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    linear(&p, 128, 128, 256, false);
    linear(&p, 256, 128, 256, false);
    linear(&p, 65, 256, 256, false);
    linear(&p, 300, 1024, 512, false);
    linear(&p, 515, 384, 768, true);
    linear(&p, 2049, 640, 1280, true);
    linear(&p, 5000, 256, 2560, false);
    cuda_pair_close(&p);
}

/* counts: rows of each expert; -1 ends. perm is a fixed shuffle, k choices a token. */
static void mixture(struct cuda_pair *p, const int64_t *counts, int k, int H, int I)
{
    enum { MAX = 16 };
    struct rt_err err = {0};
    struct cuda_weight gate[MAX], up[MAX], down[MAX];
    const struct rt_weight *g[2][MAX], *u[2][MAX], *d[2][MAX];
    int32_t offset[MAX + 1] = {0}, *perm;
    float *x, *want, *got, *weight;
    int E = 0;
    for (; counts[E] >= 0; E++)
        offset[E + 1] = offset[E] + (int32_t)counts[E];
    const int64_t rows = offset[E], n = rows / k;
    assert_int_equal(n * k, rows);
    for (int e = 0; e < E; e++) {
        gate[e] = cuda_weight_e4m3(p, I, H, (uint64_t)(3 * e), 0.05f);
        up[e] = cuda_weight_e4m3(p, I, H, (uint64_t)(3 * e + 1), 0.05f);
        down[e] = cuda_weight_e4m3(p, H, I, (uint64_t)(3 * e + 2), 0.05f);
        for (int s = 0; s < 2; s++) {
            g[s][e] = s ? gate[e].gpu : gate[e].ref;
            u[s][e] = s ? up[e].gpu : up[e].ref;
            d[s][e] = s ? down[e].gpu : down[e].ref;
        }
    }
    assert_ok(rt_alloc((size_t)(n * H), sizeof *x, "x", &x, &err));
    assert_ok(rt_alloc((size_t)(n * H), sizeof *want, "want", &want, &err));
    assert_ok(rt_alloc((size_t)(n * H), sizeof *got, "got", &got, &err));
    assert_ok(rt_alloc((size_t)rows, sizeof *weight, "weight", &weight, &err));
    assert_ok(rt_alloc((size_t)rows, sizeof *perm, "perm", &perm, &err));
    cuda_random(x, n * H, 7, 1.0f);
    cuda_random(want, n * H, 8, 1.0f);
    for (int64_t i = 0; i < rows; i++) {
        weight[i] = 0.1f + 0.8f * (float)(rt_rng_u64(4, 1, (uint64_t)i) % 1000) / 1000.0f;
        perm[i] = (int32_t)i;
    }
    for (int64_t i = rows - 1; i > 0; i--) { /* any order: the operations do not need sorted tokens */
        const int64_t j = (int64_t)(rt_rng_u64(4, 2, (uint64_t)i) % (uint64_t)(i + 1));
        const int32_t t = perm[i];
        perm[i] = perm[j];
        perm[j] = t;
    }
    struct cuda_quantised q = cuda_quantise(p, x, n, H);
    void *y = cuda_act(p, want, n * H);
    int32_t *dev_perm = cuda_bytes(p, perm, (size_t)rows * sizeof *perm);
    float *dev_weight = cuda_bytes(p, weight, (size_t)rows * sizeof *weight);
    assert_ok(RT_OP(&p->ref, moe_ffn, &err, .x = q.ref, .perm = perm, .weight = weight, .offset = offset, .gate = g[0], .up = u[0], .down = d[0],
                    .y = want, .n = n, .n_experts = E, .k = k, .H = H, .I = I));
    assert_ok(RT_OP(&p->gpu, moe_ffn, &err, .x = q.gpu, .perm = dev_perm, .weight = dev_weight, .offset = offset, .gate = g[1], .up = u[1],
                    .down = d[1], .y = y, .n = n, .n_experts = E, .k = k, .H = H, .I = I));
    cuda_get_act(p, got, y, n * H);
    /* the codes of silu * up: a value on the edge between two codes may fall to either side, 2^-4 of it */
    cuda_close("experts", got, want, n, H, 2e-2, 4e-2);
    cuda_free(p, y);
    cuda_free(p, dev_perm);
    cuda_free(p, dev_weight);
    cuda_quantised_free(p, &q);
    for (int e = 0; e < E; e++) {
        cuda_weight_free(p, &gate[e]);
        cuda_weight_free(p, &up[e]);
        cuda_weight_free(p, &down[e]);
    }
    rt_free(x);
    rt_free(want);
    rt_free(got);
    rt_free(weight);
    rt_free(perm);
}

static void test_experts(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    mixture(&p, (const int64_t[]){256, 256, -1}, 1, 256, 128);
    mixture(&p, (const int64_t[]){300, 0, 129, 5, 1, 257, 0, 332, -1}, 2, 512, 256);
    mixture(&p, (const int64_t[]){1000, 24, 1, 975, -1}, 4, 256, 384);
    cuda_pair_close(&p);
}

/* The dense and the shared MLP: all rows, one expert, added to y. */
static void test_one_mlp(void **state)
{
    enum { H = 512, I = 384 };
    static const int64_t sizes[] = {68, 301, 1026};
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (int s = 0; s < 3; s++) {
        const int64_t n = sizes[s];
        const int32_t all[2] = {0, (int32_t)n};
        struct cuda_weight g = cuda_weight_e4m3(&p, I, H, 1, 0.05f), u = cuda_weight_e4m3(&p, I, H, 2, 0.05f), d = cuda_weight_e4m3(&p, H, I, 3, 0.05f);
        float *x, *want, *got;
        assert_ok(rt_alloc((size_t)(n * H), sizeof *x, "x", &x, &err));
        assert_ok(rt_alloc((size_t)(n * H), sizeof *want, "want", &want, &err));
        assert_ok(rt_alloc((size_t)(n * H), sizeof *got, "got", &got, &err));
        cuda_random(x, n * H, 7, 1.0f);
        cuda_random(want, n * H, 8, 1.0f);
        struct cuda_quantised q = cuda_quantise(&p, x, n, H);
        void *y = cuda_act(&p, want, n * H);
        assert_ok(RT_OP(&p.ref, moe_ffn, &err, .x = q.ref, .offset = all, .gate = (const struct rt_weight *const[]){g.ref},
                        .up = (const struct rt_weight *const[]){u.ref}, .down = (const struct rt_weight *const[]){d.ref}, .y = want, .n = n,
                        .n_experts = 1, .k = 1, .H = H, .I = I));
        assert_ok(RT_OP(&p.gpu, moe_ffn, &err, .x = q.gpu, .offset = all, .gate = (const struct rt_weight *const[]){g.gpu},
                        .up = (const struct rt_weight *const[]){u.gpu}, .down = (const struct rt_weight *const[]){d.gpu}, .y = y, .n = n,
                        .n_experts = 1, .k = 1, .H = H, .I = I));
        cuda_get_act(&p, got, y, n * H);
        cuda_close("one MLP", got, want, n, H, 2e-2, 4e-2);
        cuda_free(&p, y);
        cuda_quantised_free(&p, &q);
        cuda_weight_free(&p, &g);
        cuda_weight_free(&p, &u);
        cuda_weight_free(&p, &d);
        rt_free(x);
        rt_free(want);
        rt_free(got);
    }
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_linear),
    cmocka_unit_test(test_experts),
    cmocka_unit_test(test_one_mlp),
};
RT_SUITE(cuda_group8, tests)
