/* The head of a scored window on the GPU, against `ref`. Small integers make logits exact in any order of summation, so that ids, logits and
 * ranks must be equal, ties included. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#include "tests/cuda_ops.h"

/* A float32 result near 10, from sums of up to 20000 exponentials that are within 2^-22 each. */
#define LSE_BOUND 4e-6

enum { MAX_LSE = 8 };

struct head_case {
    const char *name;
    int64_t n, H, V, n_ids;
    int k, n_lse, levels; /* levels: entries of x and w are integers below this in size; 0: x is 0 */
    bool topk, logprob, rank, next;
    uint64_t scratch;
};

struct head_out {
    uint32_t *ids, *rank;
    float *logits, *lse, *logprob;
};

static void *block(int64_t n, size_t size)
{
    struct rt_err err = {0};
    void *p;
    assert_ok(rt_alloc((size_t)(n > 0 ? n : 1), size, "test", &p, &err));
    return p;
}

static void integers(float *x, int64_t n, uint64_t stream, int levels)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = levels == 0 ? 0.0f : (float)((int)(rt_rng_u64(5, stream, (uint64_t)i) % (uint64_t)(2 * levels - 1)) - (levels - 1));
}

static struct head_out alloc_out(const struct head_case *c)
{
    return (struct head_out){block(c->n * c->k, 4), block(c->n, 4), block(c->n * c->k, 4), block(c->n * c->n_lse, 4), block(c->n, 4)};
}

static void free_out(struct head_out *o)
{
    rt_free(o->ids);
    rt_free(o->rank);
    rt_free(o->logits);
    rt_free(o->lse);
    rt_free(o->logprob);
}

static void run(const struct rt_device *d, const struct head_case *c, const void *x, const struct rt_weight *w, const int32_t *next,
                const struct head_out *o)
{
    static const float inv[MAX_LSE] = {1.0f / 0.6f, 1.0f, 0.5f, 0.25f, 1.0f, 2.0f, 0.75f, 0.1f};
    struct rt_err err = {0};
    assert_ok(RT_OP(d, head_topk, &err, .x = x, .w = w, .next = c->next ? next : NULL, .n = c->n, .H = c->H, .n_ids = c->n_ids, .k = c->k,
                    .n_lse = c->n_lse, .inv_temp = inv, .topk_ids = c->topk ? o->ids : NULL, .topk_logits = c->topk ? o->logits : NULL, .lse = o->lse,
                    .next_logprob = c->logprob ? o->logprob : NULL, .next_rank = c->rank ? o->rank : NULL));
}

static void near(const char *what, const float *got, const float *want, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isinf(want[i]) && got[i] == want[i])
            continue;
        const double e = fabs((double)got[i] - (double)want[i]) / fmax(1.0, fabs((double)want[i]) / 10);
        worst = e > worst || isnan(e) ? e : worst;
    }
    print_message("    %-44s %.3e\n", what, worst);
    if (!(worst <= LSE_BOUND))
        fail_msg("%s: error %g, bound %g", what, worst, LSE_BOUND);
}

static void compare(const struct head_case *c, const struct head_out *got, const struct head_out *want)
{
    char what[80];
    for (int64_t t = 0; t < c->n && c->topk; t++)
        for (int j = 0; j < c->k; j++) {
            const int64_t i = t * c->k + j;
            if (got->ids[i] != want->ids[i] || got->logits[i] != want->logits[i])
                fail_msg("%s: row %lld, place %d: id %u (%g), expected %u (%g)", c->name, (long long)t, j, got->ids[i], (double)got->logits[i],
                         want->ids[i], (double)want->logits[i]);
        }
    for (int64_t t = 0; t < c->n && c->rank && c->next; t++)
        if (got->rank[t] != want->rank[t])
            fail_msg("%s: row %lld: rank %u, expected %u", c->name, (long long)t, got->rank[t], want->rank[t]);
    snprintf(what, sizeof what, "%s: lse", c->name);
    near(what, got->lse, want->lse, c->n * c->n_lse);
    snprintf(what, sizeof what, "%s: next_logprob", c->name);
    if (c->logprob && c->next)
        near(what, got->logprob, want->logprob, c->n);
}

static void head_case(struct cuda_pair *p, const struct head_case *c)
{
    struct rt_err err = {0};
    const struct rt_backend *be = p->gpu.be;
    float *x = block(c->n * c->H, 4), *w = block(c->V * c->H, 4);
    int32_t *next = block(c->n, 4);
    struct head_out want = alloc_out(c), got = alloc_out(c), gpu;
    struct rt_weight *ref_w, *gpu_w;
    integers(x, c->n * c->H, 1, c->levels);
    integers(w, c->V * c->H, 2, c->levels > 0 ? c->levels : 2);
    for (int64_t i = 0; i < c->V * c->H; i++)
        w[i] *= 0.125f;
    for (int64_t t = 0; t < c->n; t++)
        next[t] = t % 7 == 3 ? -1 : t % 7 == 5 ? (int32_t)c->n_ids : (int32_t)(rt_rng_u64(5, 3, (uint64_t)t) % (uint64_t)c->n_ids);
    assert_ok(p->ref.be->weight_load(p->ref.dev, p->ref.q, &(struct rt_weight_src){.name = "w", .dtype = RT_F32, .rows = c->V, .cols = c->H, .data = w},
                                     &ref_w, &err));
    assert_ok(be->weight_load(p->gpu.dev, p->gpu.q, &(struct rt_weight_src){.name = "w", .dtype = RT_F32, .rows = c->V, .cols = c->H, .data = w}, &gpu_w,
                              &err));
    void *dx = cuda_act(p, x, c->n * c->H);
    int32_t *dnext = cuda_bytes(p, next, (size_t)c->n * 4);
    gpu = (struct head_out){cuda_bytes(p, NULL, (size_t)(c->n * c->k) * 4), cuda_bytes(p, NULL, (size_t)c->n * 4),
                            cuda_bytes(p, NULL, (size_t)(c->n * c->k) * 4), cuda_bytes(p, NULL, (size_t)(c->n * c->n_lse) * 4),
                            cuda_bytes(p, NULL, (size_t)c->n * 4)};
    if (c->scratch > 0)
        be->set_scratch(p->gpu.dev, c->scratch);
    run(&p->gpu, c, dx, gpu_w, dnext, &gpu);
    be->set_scratch(p->gpu.dev, (uint64_t)2 << 30);
    run(&p->ref, c, x, ref_w, next, &want);
    cuda_get(p, got.ids, gpu.ids, (size_t)(c->n * c->k) * 4);
    cuda_get(p, got.rank, gpu.rank, (size_t)c->n * 4);
    cuda_get(p, got.logits, gpu.logits, (size_t)(c->n * c->k) * 4);
    cuda_get(p, got.lse, gpu.lse, (size_t)(c->n * c->n_lse) * 4);
    cuda_get(p, got.logprob, gpu.logprob, (size_t)c->n * 4);
    compare(c, &got, &want);
    cuda_free(p, dx);
    cuda_free(p, dnext);
    cuda_free(p, gpu.ids);
    cuda_free(p, gpu.rank);
    cuda_free(p, gpu.logits);
    cuda_free(p, gpu.lse);
    cuda_free(p, gpu.logprob);
    p->ref.be->weight_free(p->ref.dev, ref_w);
    be->weight_free(p->gpu.dev, gpu_w);
    free_out(&want);
    free_out(&got);
    rt_free(x);
    rt_free(w);
    rt_free(next);
}

static void test_exact(void **state)
{
    static const struct head_case cases[] = {
        {"many ties", 37, 24, 5000, 4999, 64, 3, 2, true, true, true, true, 0},
        {"few ties", 29, 96, 9000, 8190, 64, 3, 40, true, true, true, true, 0},
        {"blocks of rows", 37, 64, 3000, 2999, 5, 1, 9, true, true, true, true, 8 * 3000 * 4},
        {"all logits equal", 3, 16, 6000, 6000, 64, 2, 0, true, true, true, true, 0},
        {"all equal, few ids", 3, 16, 70, 70, 70, 2, 0, true, true, true, true, 0},
        {"more than the threads", 5, 64, 20000, 19999, 700, 1, 30, true, true, true, true, 0},
        {"all ids", 4, 32, 1001, 999, 999, 1, 4, true, true, true, true, 0},
        {"one id", 4, 8, 3, 1, 1, 1, 4, true, true, true, true, 0},
        {"best 256", 9, 64, 20000, 19999, 256, 8, 30, true, true, true, true, 0},
        {"sums alone", 9, 64, 777, 777, 0, 4, 9, false, false, false, false, 0},
        {"without next", 9, 64, 777, 777, 3, 2, 9, true, true, true, false, 0},
        {"rank alone", 9, 64, 777, 700, 0, 0, 9, false, false, true, true, 0},
        {"logprob alone", 9, 64, 777, 700, 0, 0, 9, false, true, false, true, 0},
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        head_case(&p, &cases[i]);
    cuda_pair_close(&p);
}

/* Normal numbers: logits differ in their last bits between the two, so what is chosen is checked by its logit. */
static void test_normal(void **state)
{
    enum { N = 21, H = 512, V = 9001, K = 64 };
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct head_case c = {"normal", N, H, V, V, K, 3, 0, true, true, true, true, 0};
    float *x = block(N * H, 4), *z = block(N * V, 4);
    int32_t *next = block(N, 4);
    struct cuda_weight w = cuda_weight_bf16(&p, V, H, 3, 0.1f);
    struct head_out want = alloc_out(&c), got = alloc_out(&c);
    cuda_random(x, N * H, 4, 1.0f);
    for (int t = 0; t < N; t++)
        next[t] = t * 401;
    void *dx = cuda_act(&p, x, N * H);
    int32_t *dnext = cuda_bytes(&p, next, N * 4);
    const struct head_out gpu = {cuda_bytes(&p, NULL, N * K * 4), cuda_bytes(&p, NULL, N * 4), cuda_bytes(&p, NULL, N * K * 4),
                                 cuda_bytes(&p, NULL, N * 3 * 4), cuda_bytes(&p, NULL, N * 4)};
    run(&p.gpu, &c, dx, w.gpu, dnext, &gpu);
    run(&p.ref, &c, x, w.ref, next, &want);
    assert_ok(RT_OP(&p.ref, linear_fwd, &err, .x = {x, NULL}, .w = w.ref, .y = z, .n = N, .K = H, .N = V, .y_f32 = true));
    cuda_get(&p, got.ids, gpu.ids, N * K * 4);
    cuda_get(&p, got.rank, gpu.rank, N * 4);
    cuda_get(&p, got.logits, gpu.logits, N * K * 4);
    cuda_get(&p, got.lse, gpu.lse, N * 3 * 4);
    cuda_get(&p, got.logprob, gpu.logprob, N * 4);
    cuda_close("normal: logits of the best", got.logits, want.logits, N, K, 2e-5, 0); /* F32_SUMS of test_cuda_gemm.c */
    for (int t = 0; t < N; t++)
        for (int j = 0; j < K; j++) {
            const uint32_t id = got.ids[t * K + j];
            assert_true(id < V);
            if (fabsf(z[t * V + id] - got.logits[t * K + j]) > 1e-4f)
                fail_msg("row %d, place %d: id %u has logit %g, not %g", t, j, id, (double)z[t * V + id], (double)got.logits[t * K + j]);
            if (j > 0)
                assert_true(got.logits[t * K + j] < got.logits[t * K + j - 1] ||
                            (got.logits[t * K + j] == got.logits[t * K + j - 1] && id > got.ids[t * K + j - 1]));
        }
    for (int t = 0; t < N; t++) /* logits as near as 1e-4 may change places: fewer than 4 of 9001 here */
        assert_true(got.rank[t] < want.rank[t] + 4 && want.rank[t] < got.rank[t] + 4);
    for (int i = 0; i < N * 3; i++)
        assert_true(fabsf(got.lse[i] - want.lse[i]) < 1e-4f);
    for (int i = 0; i < N; i++)
        assert_true(fabsf(got.logprob[i] - want.logprob[i]) < 1e-4f);
    cuda_free(&p, dx);
    cuda_free(&p, dnext);
    cuda_free(&p, gpu.ids);
    cuda_free(&p, gpu.rank);
    cuda_free(&p, gpu.logits);
    cuda_free(&p, gpu.lse);
    cuda_free(&p, gpu.logprob);
    cuda_weight_free(&p, &w);
    free_out(&want);
    free_out(&got);
    rt_free(x);
    rt_free(z);
    rt_free(next);
    cuda_pair_close(&p);
}

static void test_refused(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    struct cuda_weight w = cuda_weight_bf16(&p, 100, 8, 1, 1.0f);
    assert_status(RT_OP(&p.gpu, head_topk, &err, .w = w.gpu, .n = 1, .H = 8, .n_ids = 101), SHAPE);
    assert_status(RT_OP(&p.gpu, head_topk, &err, .w = w.gpu, .n = 1, .H = 8, .n_ids = 100, .k = 101), SHAPE);
    assert_status(RT_OP(&p.gpu, head_topk, &err, .w = w.gpu, .n = 1, .H = 9, .n_ids = 100), SHAPE);
    assert_status(RT_OP(&p.gpu, head_topk, &err, .w = w.gpu, .n = 1, .H = 8, .n_ids = 100, .n_lse = 9), UNSUPPORTED);
    assert_ok(RT_OP(&p.gpu, head_topk, &err, .w = w.gpu, .n = 0, .H = 8, .n_ids = 100));
    cuda_weight_free(&p, &w);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_exact),
    cmocka_unit_test(test_normal),
    cmocka_unit_test(test_refused),
};
RT_SUITE(cuda_head, tests)
