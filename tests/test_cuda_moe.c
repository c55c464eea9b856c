/* Experts on the GPU. The expected result is made by ref's operations, one step at a time, with the same roundings to bfloat16 between them: the
 * result of gate and up, their gated product (of which the codes are made), the result of down, and y. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#include "tests/cuda_ops.h"

/* Steps differ where a sum lies beside a boundary of bfloat16: an ulp (2^-7) in a few of a hundred elements, below 1e-3 a step, beside the rounding of
 * y (1.66e-3, where the library adds twice), and in w8a16 the rounding of weights to bfloat16 in each of three products, of which two are multiplied:
 * 1.66e-3 four times and the store, each of order one in the result. */
#define BOUND_BF16 3.5e-3
#define BOUND_W8A16 8e-3
/* The same flips change e4m3 codes (by 2^-4) in less than one of a hundred elements: sqrt(0.01) 2^-4 = 6e-3. */
#define BOUND_W8A8 1e-2
/* Without block-scaled products both operands are rounded to bfloat16 as well, which changes one code in twenty: sqrt(0.05) 2^-4 = 1.4e-2. */
#define BOUND_DEQUANTISED 2e-2

enum { MAX_EXPERTS = 8 };

#ifdef RT_CUDA
#include "core/cuda/group8.h"

/* Takes away what the ways before this one use: 0 nothing, 1 the kernel for groups of e4m3 products, 2 cuBLASLt as well. */
static void take_away(struct rt_dev *dev, int way, void **encode, struct rt_cuda_lt **lt)
{
    *encode = dev->encode_map;
    *lt = dev->lt;
    dev->encode_map = way >= 1 ? NULL : *encode;
    dev->lt = way >= 2 ? NULL : *lt;
}
static void give_back(struct rt_dev *dev, void *encode, struct rt_cuda_lt *lt)
{
    dev->encode_map = encode;
    dev->lt = lt;
}

struct moe_case {
    const char *name;
    int64_t n;
    int H, I, k, E;      /* E experts in all */
    int first, listed;   /* those of the call */
    int crowded;         /* an expert that every token chooses; -1: none */
    int empty;           /* an expert that no token chooses; -1: none */
    bool e4m3, quantised, dense;
    uint64_t scratch;
};

static void *block(int64_t n, size_t size)
{
    struct rt_err err = {0};
    void *p;
    assert_ok(rt_alloc((size_t)(n > 0 ? n : 1), size, "test", &p, &err));
    return p;
}

/* Scales that are powers of two, in every other case. */
static bool pow2_of(const struct moe_case *c)
{
    return c->n % 2 != 0;
}

/* out [n, H] = the expert over every row, rounded where the GPU rounds; fused: gate and up are not. */
static void mlp(struct cuda_pair *p, const struct moe_case *c, bool fused, struct rt_act x, const struct rt_weight *gate, const struct rt_weight *up,
                const struct rt_weight *down, float *out)
{
    struct rt_err err = {0};
    const int64_t n = c->n, H = c->H, I = c->I;
    float *g = block(n * I, 4), *u = block(n * I, 4), *h = block(n * I, 4);
    struct rt_act hq = {block(n * I, 1), block(n * (I / 128 + 1), 4)};
    assert_ok(RT_OP(&p->ref, linear_fwd, &err, .x = x, .w = gate, .y = g, .n = n, .K = H, .N = I));
    assert_ok(RT_OP(&p->ref, linear_fwd, &err, .x = x, .w = up, .y = u, .n = n, .K = H, .N = I));
    if (!fused) {
        cuda_round(g, n * I);
        cuda_round(u, n * I);
    }
    assert_ok(RT_OP(&p->ref, swiglu_fwd, &err, .gate = g, .up = u, .ld = I, .h = h, .n = n, .I = I));
    cuda_round(h, n * I);
    if (c->quantised)
        assert_ok(RT_OP(&p->ref, quant, &err, .x = h, .q = hq, .n = n, .cols = I, .pow2 = pow2_of(c)));
    assert_ok(RT_OP(&p->ref, linear_fwd, &err, .x = c->quantised ? hq : (struct rt_act){h, NULL}, .w = down, .y = out, .n = n, .K = I, .N = H));
    rt_free(g);
    rt_free(u);
    rt_free(h);
    rt_free(hq.data);
    rt_free(hq.scale);
}

/* ids [n,k]: distinct experts of each token. */
static void choose(const struct moe_case *c, int32_t *ids)
{
    for (int64_t t = 0; t < c->n; t++)
        for (int j = 0; j < c->k; j++) {
            bool taken;
            uint64_t draw = 0;
            int32_t e;
            do {
                e = (j == 0 && c->crowded >= 0) ? c->crowded : (int32_t)(rt_rng_u64(6, (uint64_t)t, (uint64_t)j * 1000 + draw++) % (uint64_t)c->E);
                taken = e == c->empty;
                for (int i = 0; i < j; i++)
                    taken = taken || ids[t * c->k + i] == e;
            } while (taken);
            ids[t * c->k + j] = e;
        }
}

static void moe_case(struct cuda_pair *p, const struct moe_case *c, int way)
{
    struct rt_err err = {0};
    const int64_t n = c->n, H = c->H, nk = n * c->k;
    float *x = block(n * H, 4), *y = block(n * H, 4), *out = block(n * H, 4), *got = block(n * H, 4), *weight = block(nk, 4);
    int32_t *ids = block(nk, 4), *perm = block(nk, 4), offset[MAX_EXPERTS + 1] = {0};
    struct cuda_weight w[3][MAX_EXPERTS];
    const struct rt_weight *list[3][MAX_EXPERTS];
    struct cuda_quantised q = {{NULL, NULL}, {NULL, NULL}};
    struct rt_act dx = {NULL, NULL};
    void *encode;
    struct rt_cuda_lt *lt;
    char what[96];
    cuda_random(x, n * H, 1, 1.0f);
    cuda_random(y, n * H, 2, 1.0f);
    for (int64_t i = 0; i < nk; i++)
        weight[i] = 0.1f + (float)rt_rng_uniform(7, 1, (uint64_t)i);
    choose(c, ids);
    if (!c->dense)
        assert_ok(RT_OP(&p->ref, moe_sort, &err, .ids = ids, .perm = perm, .offset = offset, .n = n, .k = c->k, .E = c->E));
    if (c->quantised) {
        q = cuda_quantise(p, x, n, H);
        dx = q.gpu;
    } else {
        dx.data = cuda_act(p, x, n * H);
    }
    float *dweight = cuda_bytes(p, weight, (size_t)nk * 4);
    int32_t *dperm = cuda_bytes(p, perm, (size_t)nk * 4);
    void *dy = cuda_act(p, y, n * H);
    const float size[3] = {1.0f / sqrtf((float)H), 1.0f / sqrtf((float)H), 1.0f / sqrtf((float)c->I)};
    for (int e = 0; e < c->listed; e++)
        for (int m = 0; m < 3; m++) {
            const int64_t rows = m == 2 ? H : c->I, cols = m == 2 ? c->I : H;
            const uint64_t stream = (uint64_t)(10 + 3 * (c->first + e) + m);
            w[m][e] = c->e4m3 ? cuda_weight_e4m3(p, rows, cols, stream, size[m]) : cuda_weight_bf16(p, rows, cols, stream, size[m]);
            list[m][e] = w[m][e].gpu;
        }
    if (c->scratch > 0)
        p->gpu.be->set_scratch(p->gpu.dev, c->scratch);
    take_away(p->gpu.dev, way, &encode, &lt);
    const bool grouped = rt_cuda_group8_fits(p->gpu.dev, c->H, c->I, true) && rt_cuda_group8_fits(p->gpu.dev, c->I, c->H, false);
    const bool fused = c->quantised && (nk <= 64 * c->E || grouped);
    assert_ok(RT_OP(&p->gpu, moe_ffn, &err, .x = dx, .perm = c->dense ? NULL : dperm, .weight = c->dense ? NULL : dweight,
                    .offset = c->dense ? (const int32_t[]){0, (int32_t)n} : offset + c->first, .gate = list[0], .up = list[1], .down = list[2], .y = dy,
                    .n = n, .n_experts = c->listed, .k = c->k, .H = c->H, .I = c->I, .pow2 = pow2_of(c)));
    give_back(p->gpu.dev, encode, lt);
    cuda_get_act(p, got, dy, n * H);
    p->gpu.be->set_scratch(p->gpu.dev, (uint64_t)2 << 30);
    for (int e = 0; e < c->listed; e++) {
        mlp(p, c, fused, c->quantised ? q.ref : (struct rt_act){x, NULL}, w[0][e].ref, w[1][e].ref, w[2][e].ref, out);
        if (!c->dense)
            cuda_round(out, n * H);
        const int64_t end = c->dense ? n : offset[c->first + e + 1];
        for (int64_t r = c->dense ? 0 : offset[c->first + e]; r < end; r++) {
            const int64_t t = c->dense ? r : perm[r] / c->k;
            const float s = c->dense ? 1.0f : weight[perm[r]];
            for (int64_t i = 0; i < H; i++)
                y[t * H + i] += s * out[t * H + i];
        }
    }
    snprintf(what, sizeof what, "%s%s", c->name, way == 0 ? "" : way == 1 ? " (library)" : " (neither)");
    cuda_close(what, got, y, n, H, c->quantised ? (way == 2 || p->gpu.dev->cc < 90 ? BOUND_DEQUANTISED : BOUND_W8A8) : c->e4m3 ? BOUND_W8A16 : BOUND_BF16, 0);
    for (int e = 0; e < c->listed; e++)
        for (int m = 0; m < 3; m++)
            cuda_weight_free(p, &w[m][e]);
    if (c->quantised)
        cuda_quantised_free(p, &q);
    else
        cuda_free(p, dx.data);
    cuda_free(p, dweight);
    cuda_free(p, dperm);
    cuda_free(p, dy);
    rt_free(x);
    rt_free(y);
    rt_free(out);
    rt_free(got);
    rt_free(weight);
    rt_free(ids);
    rt_free(perm);
}

/* More than 64 rows an expert in the mean (256 in w8a16), or the products of few rows take them. */
static void test_experts(void **state)
{
    static const struct moe_case cases[] = {
        {"bf16", 250, 256, 128, 2, 5, 0, 5, -1, 3, false, false, false, 0},
        {"bf16, a part of the experts", 301, 128, 96, 2, 6, 2, 3, -1, -1, false, false, false, 0},
        {"bf16, groups", 301, 128, 128, 2, 6, 0, 6, 4, 0, false, false, false, 1 << 20},
        {"w8a16", 601, 256, 128, 2, 4, 0, 4, -1, -1, true, false, false, 0},
        {"w8a8", 250, 256, 128, 2, 5, 0, 5, -1, 3, true, true, false, 0},
        {"w8a8, the first is empty", 251, 256, 384, 2, 5, 0, 4, 1, 0, true, true, false, 0},
        {"w8a8, groups, one expert cut", 701, 256, 256, 2, 4, 0, 4, 2, -1, true, true, false, 1 << 20},
        {"w8a8, an expert of 3 rows", 203, 512, 128, 1, 2, 0, 2, -1, -1, true, true, false, 0},
        {"few rows, w8a8", 20, 256, 128, 2, 5, 0, 5, -1, 3, true, true, false, 0},
        {"few rows, w8a8, powers of two", 21, 256, 128, 2, 5, 0, 5, -1, 3, true, true, false, 0},
        {"few rows, w8a16", 20, 256, 128, 2, 5, 1, 4, -1, 3, true, false, false, 0},
        {"few rows, bf16", 20, 256, 128, 2, 5, 1, 4, -1, 3, false, false, false, 0},
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int way = 0; way < 3; way++)
            moe_case(&p, &cases[i], way);
    cuda_pair_close(&p);
}

static void test_dense(void **state)
{
    static const struct moe_case cases[] = {
        {"dense bf16", 131, 256, 384, 1, 1, 0, 1, -1, -1, false, false, true, 0},
        {"dense bf16, chunks", 601, 256, 384, 1, 1, 0, 1, -1, -1, false, false, true, 1 << 18},
        {"dense w8a16", 301, 256, 384, 1, 1, 0, 1, -1, -1, true, false, true, 0},
        {"dense w8a8", 131, 256, 384, 1, 1, 0, 1, -1, -1, true, true, true, 0},
        {"dense w8a8, chunks", 602, 256, 512, 1, 1, 0, 1, -1, -1, true, true, true, 1 << 18},
        {"dense w8a8, 3 rows", 3, 128, 128, 1, 1, 0, 1, -1, -1, true, true, true, 0},
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int way = 0; way < 3; way++)
            moe_case(&p, &cases[i], way);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_experts),
    cmocka_unit_test(test_dense),
};

#else

static void test_absent(void **state)
{
    (void)state;
    TEST_SKIP("built without CUDA");
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(test_absent)};

#endif

RT_SUITE(cuda_moe, tests)
