/* The cuda backend: products of few rows with a weight, linear_fwd and moe_ffn as generation calls them, against ref from the same rounded
 * inputs. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#ifdef RT_CUDA
#include "core/cuda/skinny.h"
#endif
#include "tests/cuda_ops.h"

/* Operands are exact on both sides and sums float32, some of whose 24 bits the tensor cores lose where they align the terms of a step: from 5e-8 to
 * 5e-7 on an H100 for sums of up to 7168 terms. An operand or a scale that was rounded to bfloat16 would be 1e-3. */
#define F32_SUMS 2e-6

enum kind { W16, W8A16, W8A8 };
static const char *const kind_name[] = {"bf16", "w8a16", "w8a8"};

static struct cuda_weight weight(struct cuda_pair *p, enum kind kind, int64_t N, int64_t K, uint64_t stream)
{
    return kind == W16 ? cuda_weight_bf16(p, N, K, stream, 0.1f) : cuda_weight_e4m3(p, N, K, stream, 0.1f);
}

struct linear_case {
    enum kind kind;
    int64_t n, N, K, ldx, ldy;
    bool bias, accumulate, f32;
};

/* The products of few rows themselves: which operation asks for them up to how many rows is a question of speed. */
static void run_linear(struct cuda_pair *p, const struct rt_linear_fwd_args *a)
{
#ifdef RT_CUDA
    struct rt_err err = {0};
    if (a->n <= RT_CUDA_SKINNY_ROWS)
        assert_true(rt_cuda_skinny_linear_fits(a));
    assert_ok(rt_cuda_skinny_linear(p->gpu.dev, p->gpu.q, a, &err));
#else
    (void)p;
    (void)a;
#endif
}

static void one_linear(struct cuda_pair *p, const struct linear_case *c)
{
    struct rt_err err = {0};
    char what[128];
    const int64_t ldx = c->ldx != 0 ? c->ldx : c->K, ldy = c->ldy != 0 ? c->ldy : c->N;
    float *x = cuda_floats(c->n * ldx), *want = cuda_floats(c->n * ldy), *got = cuda_floats(c->n * ldy);
    struct cuda_weight w = weight(p, c->kind, c->N, c->K, 11), b = {0};
    struct cuda_quantised q = {0};
    void *gx = NULL;
    cuda_random(x, c->n * ldx, 5, 1.0f);
    cuda_random(want, c->n * ldy, 6, 1.0f);
    if (c->bias)
        b = cuda_weight_f32(p, 1, c->N, 7, 1.0f);
    if (c->kind == W8A8)
        q = cuda_quantise(p, x, c->n, c->K);
    else
        gx = cuda_act(p, x, c->n * ldx);
    void *y = c->f32 ? cuda_bytes(p, c->accumulate ? want : NULL, (size_t)(c->n * ldy) * 4) : cuda_act(p, c->accumulate ? want : NULL, c->n * ldy);
    struct rt_linear_fwd_args a = {.x = c->kind == W8A8 ? q.ref : (struct rt_act){x, NULL}, .ldx = c->ldx, .w = w.ref, .bias = b.ref, .y = want,
                                   .ldy = c->ldy, .n = c->n, .K = c->K, .N = c->N, .accumulate = c->accumulate, .y_f32 = c->f32, .row_exact = true};
    assert_ok(p->ref.be->linear_fwd(p->ref.dev, p->ref.q, &a, &err));
    a.x = c->kind == W8A8 ? q.gpu : (struct rt_act){gx, NULL};
    a.w = w.gpu;
    a.bias = b.gpu;
    a.y = y;
    run_linear(p, &a);
    if (c->f32)
        cuda_get(p, got, y, (size_t)(c->n * ldy) * 4);
    else
        cuda_get_act(p, got, y, c->n * ldy);
    if (ldy != c->N) /* what lies between rows is not compared */
        for (int64_t i = 0; i < c->n; i++) {
            memmove(got + i * c->N, got + i * ldy, (size_t)c->N * sizeof *got);
            memmove(want + i * c->N, want + i * ldy, (size_t)c->N * sizeof *want);
        }
    snprintf(what, sizeof what, "%s %lld x %lld x %lld%s%s%s", kind_name[c->kind], (long long)c->n, (long long)c->N, (long long)c->K,
             c->bias ? " bias" : "", c->accumulate ? " +=" : "", c->f32 ? " f32" : "");
    cuda_close(what, got, want, c->n, c->N, c->f32 ? F32_SUMS : CUDA_BF16_ONCE, c->f32 ? 10 * F32_SUMS : 2 * CUDA_BF16_ONCE);
    cuda_free(p, gx);
    if (c->kind == W8A8)
        cuda_quantised_free(p, &q);
    cuda_free(p, y);
    cuda_weight_free(p, &w);
    if (c->bias)
        cuda_weight_free(p, &b);
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
    static const int64_t rows[] = {1, 7, 8, 9, 16, 17, 24, 25, 32, 33, 63, 64};
    for (int kind = W16; kind <= W8A8; kind++) {
        for (int i = 0; i < (int)(sizeof rows / sizeof *rows); i++)
            one_linear(&p, &(struct linear_case){.kind = kind, .n = rows[i], .N = 200, .K = 384, .f32 = true});
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 5, .N = 128, .K = 128});
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 3, .N = 1, .K = 128, .f32 = true});
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 20, .N = 576, .K = 2048, .bias = true});          /* columns are cut */
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 64, .N = 1536, .K = 7168, .f32 = true});
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 40, .N = 300, .K = 1152, .accumulate = true, .bias = true});
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 12, .N = 131, .K = 256, .accumulate = true, .f32 = true, .ldy = 140});
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 12, .N = 40000, .K = 128, .ldy = 40001}); /* more tiles than fit at once */
        if (kind == W8A8)
            continue;
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 30, .N = 192, .K = 256, .ldx = 264, .ldy = 200, .bias = true});
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 10, .N = 256, .K = 48, .f32 = true}); /* columns that fill no step */
        one_linear(&p, &(struct linear_case){.kind = kind, .n = 10, .N = 256, .K = 400, .f32 = true});
    }
    one_linear(&p, &(struct linear_case){.kind = W8A16, .n = 65, .N = 200, .K = 384, .f32 = true});
    one_linear(&p, &(struct linear_case){.kind = W8A16, .n = 200, .N = 576, .K = 2048});
    one_linear(&p, &(struct linear_case){.kind = W8A16, .n = 256, .N = 384, .K = 256, .f32 = true});
    cuda_pair_close(&p);
}

/* A row's bits do not depend on the rows beside it. */
static void test_rows_exact(void **state)
{
    enum { MOST = 256, N = 576, K = 2048 };
    static const int64_t some[] = {1, 9, 20, 30, 64};
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    float *x = cuda_floats(MOST * K), *all = cuda_floats(MOST * N), *part = cuda_floats(MOST * N);
    cuda_random(x, MOST * K, 8, 1.0f);
    void *gx = cuda_act(&p, x, MOST * K);
    for (int kind = W16; kind <= W8A16; kind++) {
        struct cuda_weight w = weight(&p, kind, N, K, 12);
        void *y = cuda_bytes(&p, NULL, (size_t)(MOST * N) * 4);
        struct rt_linear_fwd_args a = {.x = {.data = gx}, .w = w.gpu, .y = y, .n = MOST, .K = K, .N = N, .y_f32 = true, .row_exact = true};
        run_linear(&p, &a);
        cuda_get(&p, all, y, (size_t)(MOST * N) * 4);
        for (int i = 0; i < 5; i++) {
            a.n = some[i];
            run_linear(&p, &a);
            cuda_get(&p, part, y, (size_t)(some[i] * N) * 4);
            assert_memory_equal(part, all, (size_t)(some[i] * N) * 4);
        }
        cuda_free(&p, y);
        cuda_weight_free(&p, &w);
    }
    cuda_free(&p, gx);
    rt_free(x);
    rt_free(all);
    rt_free(part);
    cuda_pair_close(&p);
}

/* ---- the kernel of compute capability 9.0 ---- */

#ifdef RT_CUDA
/* As linear_fwd and gated_fwd call it; `silu`: N is of gate and up. */
static void one_hopper(struct cuda_pair *p, const struct linear_case *c, bool silu)
{
    struct rt_err err = {0};
    char what[128];
    const int64_t ldx = c->ldx != 0 ? c->ldx : c->K, cols = silu ? c->N / 2 : c->N, ldy = c->ldy != 0 ? c->ldy : cols;
    float *x = cuda_floats(c->n * ldx), *want = cuda_floats(c->n * ldy), *tmp = cuda_floats(c->n * c->N), *got = cuda_floats(c->n * ldy);
    struct cuda_weight w = cuda_weight_bf16(p, c->N, c->K, 11, 0.1f), b = {0};
    cuda_random(x, c->n * ldx, 5, 1.0f);
    cuda_random(want, c->n * ldy, 6, 1.0f);
    if (c->bias)
        b = cuda_weight_f32(p, 1, c->N, 7, 1.0f);
    void *gx = cuda_act(p, x, c->n * ldx);
    void *y = c->f32 ? cuda_bytes(p, c->accumulate ? want : NULL, (size_t)(c->n * ldy) * 4) : cuda_act(p, c->accumulate ? want : NULL, c->n * ldy);
    struct rt_linear_fwd_args a = {.x = {gx, NULL}, .ldx = c->ldx, .w = w.gpu, .bias = b.gpu, .y = y, .ldy = c->ldy, .n = c->n, .K = c->K, .N = c->N,
                                   .accumulate = c->accumulate, .y_f32 = c->f32, .row_exact = true};
    const struct rt_gated_fwd_args ga = {.x = gx, .w = w.gpu, .bias = b.gpu, .gate_up = y, .h = y, .n = c->n, .K = c->K, .I = cols, .row_exact = true};
    assert_true(rt_cuda_skinny_hopper_fits(p->gpu.dev, &a));
    if (silu)
        assert_ok(p->gpu.be->gated_fwd(p->gpu.dev, p->gpu.q, &ga, &err));
    else
        assert_ok(p->gpu.be->linear_fwd(p->gpu.dev, p->gpu.q, &a, &err));
    a.x.data = x;
    a.w = w.ref;
    a.bias = b.ref;
    a.y = want;
    const struct rt_gated_fwd_args ra = {.x = x, .w = w.ref, .bias = b.ref, .gate_up = tmp, .h = want, .n = c->n, .K = c->K, .I = cols};
    if (silu)
        assert_ok(p->ref.be->gated_fwd(p->ref.dev, p->ref.q, &ra, &err));
    else
        assert_ok(p->ref.be->linear_fwd(p->ref.dev, p->ref.q, &a, &err));
    if (c->f32)
        cuda_get(p, got, y, (size_t)(c->n * ldy) * 4);
    else
        cuda_get_act(p, got, y, c->n * ldy);
    for (int64_t i = 0; i < c->n; i++) { /* what lies between rows stays as it was; it is not compared */
        for (int64_t j = cols; j < ldy && i < c->n - 1; j++)
            assert_true(c->accumulate || isnan(got[i * ldy + j]));
        memmove(got + i * cols, got + i * ldy, (size_t)cols * sizeof *got);
        memmove(want + i * cols, want + i * ldy, (size_t)cols * sizeof *want);
    }
    snprintf(what, sizeof what, "9.0: %lld x %lld x %lld%s%s%s%s", (long long)c->n, (long long)c->N, (long long)c->K, silu ? " silu" : "", c->bias ? " bias" : "",
             c->accumulate ? " +=" : "", c->f32 ? " f32" : "");
    cuda_close(what, got, want, c->n, cols, c->f32 ? F32_SUMS : CUDA_BF16_ONCE, c->f32 ? 10 * F32_SUMS : 2 * CUDA_BF16_ONCE);
    cuda_free(p, gx);
    cuda_free(p, y);
    cuda_weight_free(p, &w);
    if (c->bias)
        cuda_weight_free(p, &b);
    rt_free(x);
    rt_free(want);
    rt_free(tmp);
    rt_free(got);
}

/* A row's bits depend neither on the rows beside it nor on the run. */
static void same_rows(struct cuda_pair *p, int64_t N, int64_t K)
{
    enum { MOST = RT_CUDA_SKINNY_ROWS_HOPPER };
    static const int64_t some[] = {MOST, 1, 16, 17, 33};
    struct rt_err err = {0};
    float *x = cuda_floats(MOST * K), *all = cuda_floats(MOST * N), *part = cuda_floats(MOST * N);
    cuda_random(x, MOST * K, 8, 1.0f);
    struct cuda_weight w = cuda_weight_bf16(p, N, K, 12, 0.1f);
    void *gx = cuda_act(p, x, MOST * K), *y = cuda_bytes(p, NULL, (size_t)(MOST * N) * 4);
    struct rt_linear_fwd_args a = {.x = {gx, NULL}, .w = w.gpu, .y = y, .n = MOST, .K = K, .N = N, .y_f32 = true, .row_exact = true};
    assert_ok(rt_cuda_skinny_hopper(p->gpu.q, &a, &err));
    cuda_get(p, all, y, (size_t)(MOST * N) * 4);
    for (int i = 0; i < (int)(sizeof some / sizeof *some); i++) {
        a.n = some[i];
        assert_ok(rt_cuda_skinny_hopper(p->gpu.q, &a, &err));
        cuda_get(p, part, y, (size_t)(some[i] * N) * 4);
        assert_memory_equal(part, all, (size_t)(some[i] * N) * 4);
    }
    cuda_weight_free(p, &w);
    cuda_free(p, gx);
    cuda_free(p, y);
    rt_free(x);
    rt_free(all);
    rt_free(part);
}

static void test_hopper(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    if (p.gpu.dev->cc != 90) {
        cuda_pair_close(&p);
        TEST_SKIP("not of compute capability 9.0");
    }
    static const int64_t rows[] = {1, 7, 16, 17, 32, 33, 63, 64};
    for (int i = 0; i < (int)(sizeof rows / sizeof *rows); i++) {
        one_hopper(&p, &(struct linear_case){.n = rows[i], .N = 200, .K = 1152, .f32 = true}, false); /* columns are cut in three */
        one_hopper(&p, &(struct linear_case){.n = rows[i], .N = 456, .K = 712, .bias = true}, true);
    }
    one_hopper(&p, &(struct linear_case){.n = 64, .N = 1536, .K = 8960, .bias = true}, false);
    one_hopper(&p, &(struct linear_case){.n = 64, .N = 1536, .K = 1536, .f32 = true}, false);
    one_hopper(&p, &(struct linear_case){.n = 40, .N = 300, .K = 1152, .accumulate = true, .bias = true}, false);
    one_hopper(&p, &(struct linear_case){.n = 12, .N = 131, .K = 256, .accumulate = true, .f32 = true, .ldy = 140}, false);
    one_hopper(&p, &(struct linear_case){.n = 30, .N = 192, .K = 256, .ldx = 264, .ldy = 200, .bias = true}, false);
    one_hopper(&p, &(struct linear_case){.n = 50, .N = 3, .K = 8}, false);
    one_hopper(&p, &(struct linear_case){.n = 12, .N = 40000, .K = 128}, false); /* more tiles than fit at once */
    one_hopper(&p, &(struct linear_case){.n = 64, .N = 40000, .K = 72}, true);
    one_hopper(&p, &(struct linear_case){.n = 9, .N = 17920, .K = 200, .bias = true}, true); /* the larger tiles, on an H100 or H200 */
    one_hopper(&p, &(struct linear_case){.n = 30, .N = 17900, .K = 200}, true);
    one_hopper(&p, &(struct linear_case){.n = 64, .N = 17920, .K = 600}, true);
    same_rows(&p, 576, 2048);
    same_rows(&p, 17920, 512);
    cuda_pair_close(&p);
}
#endif

/* ---- experts ---- */

enum { MAX_E = 16, MAX_K = 4 };

struct moe_case {
    enum kind kind;
    int64_t n;
    int E, k, H, I, e0, e1; /* experts [e0, e1) are in the list */
    int favourite;          /* an expert that every token takes, or -1 */
};

/* k different experts for each token, their weights, and both sorted. */
static void route(const struct moe_case *c, struct cuda_pair *p, int32_t *perm, float *w, int32_t *offset)
{
    struct rt_err err = {0};
    int32_t *ids;
    assert_ok(rt_alloc((size_t)(c->n * c->k), sizeof *ids, "test", &ids, &err));
    for (int64_t t = 0; t < c->n; t++)
        for (int j = 0; j < c->k; j++) {
            int e = j == 0 && c->favourite >= 0 ? c->favourite : (int)(rt_rng_u64(3, (uint64_t)t, (uint64_t)j) % (uint64_t)c->E);
            for (int i = 0; i < j; i++)
                if (ids[t * c->k + i] == e) {
                    e = (e + 1) % c->E;
                    i = -1;
                }
            ids[t * c->k + j] = e;
            w[t * c->k + j] = 0.1f + 0.3f * (float)(rt_rng_u64(4, (uint64_t)t, (uint64_t)j) % 100) / 100.0f;
        }
    assert_ok(RT_OP(&p->ref, moe_sort, &err, .ids = ids, .perm = perm, .offset = offset, .n = c->n, .k = c->k, .E = c->E));
    rt_free(ids);
}

static void one_moe(struct cuda_pair *p, const struct moe_case *c, bool routed)
{
    struct rt_err err = {0};
    char what[128];
    struct cuda_weight w[3][MAX_E];
    const struct rt_weight *ref[3][MAX_E], *gpu[3][MAX_E];
    int32_t perm[1024 * MAX_K], offset[MAX_E + 1];
    float weights[1024 * MAX_K], *x = cuda_floats(c->n * c->H), *want = cuda_floats(c->n * c->H), *got = cuda_floats(c->n * c->H);
    struct cuda_quantised q = {0};
    const int first = routed ? c->e0 : 0, count = routed ? c->e1 - c->e0 : 1;
    for (int e = 0; e < count; e++)
        for (int i = 0; i < 3; i++) {
            w[i][e] = weight(p, c->kind, i == 2 ? c->H : c->I, i == 2 ? c->I : c->H, (uint64_t)(100 + e * 3 + i));
            ref[i][e] = w[i][e].ref;
            gpu[i][e] = w[i][e].gpu;
        }
    cuda_random(x, c->n * c->H, 21, 1.0f);
    cuda_random(want, c->n * c->H, 22, 1.0f);
    route(c, p, perm, weights, offset);
    void *gx = cuda_act(p, x, c->n * c->H), *y = cuda_act(p, want, c->n * c->H), *gperm = cuda_bytes(p, perm, (size_t)(c->n * c->k) * 4),
         *gweights = cuda_bytes(p, weights, (size_t)(c->n * c->k) * 4);
    if (c->kind == W8A8)
        q = cuda_quantise(p, x, c->n, c->H);
    struct rt_moe_ffn_args a = {.x = c->kind == W8A8 ? q.ref : (struct rt_act){x, NULL}, .perm = routed ? perm : NULL, .weight = routed ? weights : NULL,
                                .offset = offset + first, .gate = ref[0], .up = ref[1], .down = ref[2], .y = want, .n = c->n, .n_experts = count,
                                .k = c->k, .H = c->H, .I = c->I, .row_exact = true};
    assert_ok(p->ref.be->moe_ffn(p->ref.dev, p->ref.q, &a, &err));
    a.x = c->kind == W8A8 ? q.gpu : (struct rt_act){gx, NULL};
    a.perm = routed ? gperm : NULL;
    a.weight = routed ? gweights : NULL;
    a.gate = gpu[0];
    a.up = gpu[1];
    a.down = gpu[2];
    a.y = y;
#ifdef RT_CUDA
    if (c->n <= RT_CUDA_SKINNY_ROWS)
        assert_true(rt_cuda_skinny_moe_fits(&a));
    assert_ok(rt_cuda_skinny_moe(p->gpu.dev, p->gpu.q, &a, &err));
#endif
    cuda_get_act(p, got, y, c->n * c->H);
    snprintf(what, sizeof what, "%s %lld tokens, %d of experts %d..%d, %d x %d", routed ? kind_name[c->kind] : "plain", (long long)c->n, c->k, c->e0,
             c->e1, c->H, c->I);
    /* h is rounded to bfloat16 on the GPU: as large as the rounding of y. w8a8: where that rounding moves h over the middle of two codes, an
     * element changes by a code's step, 6 % in the mean; one of some twenty does, which makes 1.5e-2 of h. */
    const double bound = c->kind == W8A8 ? 2e-2 : 1.5 * CUDA_BF16_ONCE;
    cuda_close(what, got, want, c->n, c->H, bound, 3 * bound);
    for (int e = 0; e < count; e++)
        for (int i = 0; i < 3; i++)
            cuda_weight_free(p, &w[i][e]);
    if (c->kind == W8A8)
        cuda_quantised_free(p, &q);
    cuda_free(p, gx);
    cuda_free(p, y);
    cuda_free(p, gperm);
    cuda_free(p, gweights);
    rt_free(x);
    rt_free(want);
    rt_free(got);
}

static void test_experts(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (int kind = W16; kind <= W8A8; kind++) {
        one_moe(&p, &(struct moe_case){.kind = kind, .n = 40, .E = 12, .k = 3, .H = 256, .I = 128, .e1 = 12, .favourite = -1}, true);
        one_moe(&p, &(struct moe_case){.kind = kind, .n = 1, .E = 12, .k = 3, .H = 256, .I = 384, .e1 = 12, .favourite = -1}, true);
        one_moe(&p, &(struct moe_case){.kind = kind, .n = 100, .E = 16, .k = 4, .H = 1152, .I = 256, .e0 = 5, .e1 = 11, .favourite = -1}, true);
        one_moe(&p, &(struct moe_case){.kind = kind, .n = 150, .E = 16, .k = 2, .H = 128, .I = 128, .e1 = 16, .favourite = 3}, true);
        one_moe(&p, &(struct moe_case){.kind = kind, .n = 1, .E = 16, .k = 1, .H = 128, .I = 128, .e0 = 4, .e1 = 6, .favourite = 9}, true);
        one_moe(&p, &(struct moe_case){.kind = kind, .n = 1, .E = 1, .k = 1, .H = 256, .I = 384, .e1 = 1, .favourite = 0}, false);
        one_moe(&p, &(struct moe_case){.kind = kind, .n = 50, .E = 1, .k = 1, .H = 2048, .I = 1408, .e1 = 1, .favourite = 0}, false);
        if (kind != W8A8)
            one_moe(&p, &(struct moe_case){.kind = kind, .n = 33, .E = 9, .k = 2, .H = 48, .I = 80, .e1 = 9, .favourite = -1}, true);
    }
    one_moe(&p, &(struct moe_case){.kind = W8A16, .n = 1024, .E = 16, .k = 2, .H = 128, .I = 128, .e1 = 16, .favourite = -1}, true);
    one_moe(&p, &(struct moe_case){.kind = W8A16, .n = 200, .E = 1, .k = 1, .H = 256, .I = 384, .e1 = 1, .favourite = 0}, false);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_linear),
    cmocka_unit_test(test_rows_exact),
    cmocka_unit_test(test_experts),
#ifdef RT_CUDA
    cmocka_unit_test(test_hopper),
#endif
};
RT_SUITE(cuda_skinny, tests)
