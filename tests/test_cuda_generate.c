/* The cuda backend: what generation adds to the caches' attention. Sampling, pages, the way from a projection to the caches, recorded work. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#include "tests/cuda_ops.h"

static void *room(size_t n, size_t size)
{
    struct rt_err err = {0};
    void *x;
    assert_ok(rt_alloc(n, size, "test", &x, &err));
    return x;
}

/* ---- sampling ---- */

enum { ROWS = 24 };

struct sample_case {
    int64_t n_ids, ld;
    double spread; /* of the logits; 0: all equal */
    double temperature, top_p;
};

static void one_sample(struct cuda_pair *p, const struct sample_case *c)
{
    struct rt_err err = {0};
    float *z = room((size_t)(ROWS * c->ld), sizeof *z), want_lp[ROWS], got_lp[ROWS], again_lp;
    uint64_t stream[ROWS];
    int64_t position[ROWS];
    int32_t want[ROWS], got[ROWS], again;
    int other = 0;
    for (int64_t i = 0; i < ROWS * c->ld; i++)
        z[i] = i % c->ld >= c->n_ids ? 1e9f : (float)c->spread * rt_rng_normal(5, (uint64_t)(i / c->ld), (uint64_t)(i % c->ld)) - 3.0f;
    for (int i = 0; i < ROWS; i++) {
        stream[i] = (uint64_t)i << 33;
        position[i] = 1000 + i;
    }
    struct rt_sample_args a = {.z = z, .ld = c->ld, .n = ROWS, .n_ids = c->n_ids, .params = {c->temperature, 0, c->top_p}, .seed = 77, .stream = stream,
                               .position = position, .id = want, .logprob = want_lp};
    assert_ok(p->ref.be->sample(p->ref.dev, p->ref.q, &a, &err));
    float *gz = cuda_bytes(p, z, (size_t)(ROWS * c->ld) * sizeof *z), *lp = cuda_bytes(p, NULL, sizeof got_lp);
    uint64_t *gs = cuda_bytes(p, stream, sizeof stream);
    int64_t *gp = cuda_bytes(p, position, sizeof position);
    int32_t *id = cuda_bytes(p, NULL, sizeof got);
    a.z = gz, a.stream = gs, a.position = gp, a.id = id, a.logprob = lp;
    assert_ok(p->gpu.be->sample(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get(p, got, id, sizeof got);
    cuda_get(p, got_lp, lp, sizeof got_lp);
    for (int i = 0; i < ROWS; i++) {
        assert_true(got[i] >= 0 && got[i] < c->n_ids);
        other += got[i] != want[i];
        if (got[i] == want[i] && !(fabsf(got_lp[i] - want_lp[i]) < 2e-5f * (1 + fabsf(want_lp[i])))) /* float32 sums of up to 150,000 terms */
            fail_msg("row %d: log-probability %g, expected %g", i, (double)got_lp[i], (double)want_lp[i]);
    }
    /* the sum where the draw lies is off by some 1e-7 of the whole; each id there is one n-th of it. Greedy: nothing is */
    const double expected = c->temperature == 0 ? 0 : 4e-7 * (double)c->n_ids * ROWS;
    print_message("    %ld ids, spread %g, T %g, top-p %g: %d of %d rows take another id\n", (long)c->n_ids, c->spread, c->temperature, c->top_p, other, ROWS);
    assert_true(other <= (c->temperature == 0 ? 0 : 1 + (int)(3 * expected)));
    /* a row alone, and the same bits */
    a.n = 1;
    a.z = gz + (ROWS - 1) * c->ld, a.stream = gs + ROWS - 1, a.position = gp + ROWS - 1;
    assert_ok(p->gpu.be->sample(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get(p, &again, id, sizeof again);
    cuda_get(p, &again_lp, lp, sizeof again_lp);
    assert_int_equal(again, got[ROWS - 1]);
    assert_true(again_lp == got_lp[ROWS - 1]);
    void *const device[] = {gz, lp, gs, gp, id};
    for (int i = 0; i < 5; i++)
        cuda_free(p, device[i]);
    rt_free(z);
}

static void test_sample(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    static const struct sample_case cases[] = {
        {61, 64, 2, 0.6, 0.95},        {61, 61, 2, 0, 1},           {1, 1, 1, 1, 0.5},          {1003, 1003, 3, 1, 1},         {1003, 1004, 3, 0.6, 0.95},
        {151936, 151936, 3, 0.6, 0.95}, {151936, 151936, 1, 1, 0.95}, {151936, 151936, 0.7, 0.6, 1}, {151665, 151936, 5, 1, 0.9},  {4096, 4096, 0, 1, 0.5},
        {151936, 151936, 0, 0, 1},     {5000, 5000, 2, 100, 0.9},   {5000, 5000, 4, 0.01, 0.99}, {151936, 151936, 2, 0, 0.95}, {700, 704, 1, 1, 0.001},
        {600001, 600004, 1, 0.8, 0.9},  {8192, 8192, 3, 0.6, 0.95},  {100000, 100001, 2, 0.6, 0.95}, {151936, 151936, 0, 1, 0.3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        one_sample(&p, &cases[i]);
    /* what is no number is named, the first of a row */
    enum { IDS = 700 };
    static float z[3 * IDS];
    uint64_t stream[3] = {0};
    int64_t position[3] = {0};
    int32_t got[3];
    z[IDS + 300] = INFINITY, z[IDS + 299] = NAN, z[2 * IDS + 699] = -INFINITY;
    float *gz = cuda_bytes(&p, z, sizeof z), *lp = cuda_bytes(&p, NULL, 12);
    uint64_t *gs = cuda_bytes(&p, stream, sizeof stream);
    int64_t *gp = cuda_bytes(&p, position, sizeof position);
    int32_t *id = cuda_bytes(&p, NULL, 12);
    struct rt_sample_args a = {.z = gz, .ld = IDS, .n = 3, .n_ids = IDS, .params = {0.6, 0, 0.95}, .stream = gs, .position = gp, .id = id, .logprob = lp};
    assert_ok(p.gpu.be->sample(p.gpu.dev, p.gpu.q, &a, &err));
    cuda_get(&p, got, id, sizeof got);
    assert_true(got[0] >= 0);
    assert_int_equal(got[1], -300);
    assert_int_equal(got[2], -700);
    a.params.top_k = 5;
    assert_status(p.gpu.be->sample(p.gpu.dev, p.gpu.q, &a, &err), UNSUPPORTED);
    void *const device[] = {gz, lp, gs, gp, id};
    for (int i = 0; i < 5; i++)
        cuda_free(&p, device[i]);
    cuda_pair_close(&p);
}

/* ---- pages ---- */

enum { SLOTS = 5, LEN = 128, COLS = 10, CAPACITY = LEN * COLS, TOKENS = 37 };

/* A table of shuffled pages in which slots 0 and 1 share their first three. */
static void make_table(int32_t *table)
{
    int64_t order[SLOTS * COLS];
    rt_rng_permutation(3, 3, SLOTS * COLS, order);
    for (int i = 0; i < SLOTS * COLS; i++)
        table[i] = (int32_t)order[i];
    memcpy(table + COLS, table, 3 * sizeof *table);
}

static void one_paged(struct cuda_pair *p, int nh, int nkv, int d)
{
    struct rt_err err = {0};
    const int64_t width = (int64_t)nkv * d, size = SLOTS * CAPACITY * width, out = (int64_t)TOKENS * nh * d;
    static const int32_t special[] = {0, 15, 16, 63, 64, 127, 128, 383, 384, 511, 512, 700, 1279};
    int32_t table[SLOTS * COLS], slot[TOKENS], pos[TOKENS];
    float *k = room((size_t)size, sizeof *k), *v = room((size_t)size, sizeof *v), *pk = room((size_t)size, sizeof *k), *pv = room((size_t)size, sizeof *v),
          *q = room((size_t)out, sizeof *q), *want = room((size_t)out, sizeof *q), *got = room((size_t)out, sizeof *q), *host = room((size_t)out, sizeof *q);
    make_table(table);
    cuda_random(pk, size, 61, 1.0f);
    cuda_random(pv, size, 62, 1.0f);
    cuda_random(q, out, 63, 1.0f);
    for (int64_t r = 0; r < SLOTS * CAPACITY; r++) { /* the same without pages */
        const int64_t at = (int64_t)table[r / LEN] * LEN + r % LEN;
        memcpy(k + r * width, pk + at * width, (size_t)width * sizeof *k);
        memcpy(v + r * width, pv + at * width, (size_t)width * sizeof *v);
    }
    for (int i = 0; i < TOKENS; i++) {
        slot[i] = i % SLOTS;
        pos[i] = special[i % 13];
    }
    void *gk = cuda_act(p, k, size), *gv = cuda_act(p, v, size), *gpk = cuda_act(p, pk, size), *gpv = cuda_act(p, pv, size), *gq = cuda_act(p, q, out),
         *o = cuda_act(p, NULL, out);
    int32_t *gt = cuda_bytes(p, table, sizeof table), *gs = cuda_bytes(p, slot, sizeof slot), *gpos = cuda_bytes(p, pos, sizeof pos);
    struct rt_attn_cached_args a = {.q = gq, .k_cache = gk, .v_cache = gv, .slot = gs, .pos = gpos, .o = o, .n = TOKENS, .capacity = CAPACITY, .nh = nh,
                                    .nkv = nkv, .d = d, .scale = 0.1f};
    assert_ok(p->gpu.be->attn_cached(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, want, o, out);
    a.k_cache = gpk, a.v_cache = gpv, a.pages = (struct rt_cache_pages){gt, LEN};
    assert_ok(p->gpu.be->attn_cached(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, got, o, out);
    assert_memory_equal(got, want, (size_t)out * sizeof *got);
    struct rt_attn_cached_args h = {.q = q, .k_cache = pk, .v_cache = pv, .slot = slot, .pos = pos, .o = host, .n = TOKENS, .capacity = CAPACITY, .nh = nh,
                                    .nkv = nkv, .d = d, .scale = 0.1f, .pages = {table, LEN}};
    assert_ok(p->ref.be->attn_cached(p->ref.dev, p->ref.q, &h, &err));
    cuda_close("attention over pages", got, host, (int64_t)TOKENS * nh, d, 1.42 * CUDA_BF16_ONCE, 3.6 * CUDA_BF16_ONCE); /* probabilities and results */
    /* rows that are nobody's stay as they are, the others too */
    for (int i = 0; i < TOKENS; i += 3)
        pos[i] = -1;
    int32_t *skipped = cuda_bytes(p, pos, sizeof pos);
    a.pos = skipped;
    a.o = cuda_act(p, NULL, out);
    assert_ok(p->gpu.be->attn_cached(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, got, a.o, out);
    for (int64_t i = 0; i < out; i++)
        assert_true(pos[i / (nh * d)] < 0 ? isnan(got[i]) : got[i] == want[i]);
    a.pages.len = 48;
    assert_status(p->gpu.be->attn_cached(p->gpu.dev, p->gpu.q, &a, &err), SHAPE);
    void *const device[] = {gk, gv, gpk, gpv, gq, o, gt, gs, gpos, skipped, a.o};
    for (int i = 0; i < 11; i++)
        cuda_free(p, device[i]);
    float *const all[] = {k, v, pk, pv, q, want, got, host};
    for (int i = 0; i < 8; i++)
        rt_free(all[i]);
}

static void test_pages(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    one_paged(&p, 12, 2, 128);
    one_paged(&p, 9, 3, 64);
    one_paged(&p, 4, 2, 16);
    cuda_pair_close(&p);
}

/* ---- from the projection to the caches ---- */

/* K > 0: with the projection before it. */
static void one_put(struct cuda_pair *p, int nh, int nkv, int d, bool norm, int64_t K)
{
    struct rt_err err = {0};
    char what[64];
    const int64_t q = (int64_t)nh * d, kv = (int64_t)nkv * d, n = TOKENS, in = n * (K > 0 ? K : q + 2 * kv), size = SLOTS * CAPACITY * kv, turns = (int64_t)CAPACITY * d / 2;
    int32_t table[SLOTS * COLS], slot[TOKENS], pos[TOKENS];
    float *x = room((size_t)in, 4), *want = room((size_t)(n * q), 4), *got = room((size_t)(n * q), 4), *k = room((size_t)size, 4), *v = room((size_t)size, 4),
          *gotk = room((size_t)size, 4), *gotv = room((size_t)size, 4), *cos = room((size_t)turns, 4), *sin = room((size_t)turns, 4);
    struct cuda_weight wq = {0}, wk = {0}, w = {0}, b = {0};
    float *tmp = room((size_t)(n * (q + 2 * kv)), 4);
    make_table(table);
    cuda_random(x, in, 71, 1.5f);
    if (K > 0) {
        w = cuda_weight_bf16(p, q + 2 * kv, K, 74, 0.05f);
        b = cuda_weight_bf16(p, 1, q + 2 * kv, 75, 1.0f);
    }
    for (int64_t i = 0; i < turns; i++) {
        const float angle = (float)(i / (d / 2)) * powf(1000.0f, -2.0f * (float)(i % (d / 2)) / (float)d);
        cos[i] = cosf(angle);
        sin[i] = sinf(angle);
    }
    for (int i = 0; i < TOKENS; i++) { /* each place once; shared pages are not written to by two */
        slot[i] = i % SLOTS;
        pos[i] = i % 7 == 3 ? -1 : 3 * LEN + 17 * (i / SLOTS) + i % 3;
    }
    if (norm) {
        wq = cuda_weight_bf16(p, 1, d, 72, 1.0f);
        wk = cuda_weight_bf16(p, 1, d, 73, 1.0f);
    }
    for (int64_t i = 0; i < size; i++)
        k[i] = v[i] = NAN;
    for (int64_t i = 0; i < n * q; i++)
        want[i] = NAN;
    void *gx = cuda_act(p, x, in), *gq = cuda_act(p, NULL, n * q), *gk = cuda_act(p, NULL, size), *gv = cuda_act(p, NULL, size);
    float *gc = cuda_bytes(p, cos, (size_t)turns * 4), *gsin = cuda_bytes(p, sin, (size_t)turns * 4);
    int32_t *gt = cuda_bytes(p, table, sizeof table), *gs = cuda_bytes(p, slot, sizeof slot), *gpos = cuda_bytes(p, pos, sizeof pos);
    struct rt_rope_put_args a = {.qkv = x, .q_norm = wq.ref, .k_norm = wk.ref, .q = want, .k_cache = k, .v_cache = v, .cos = cos, .sin = sin, .slot = slot, .pos = pos,
                                 .pages = {table, LEN}, .n = n, .capacity = CAPACITY, .nh = nh, .nkv = nkv, .d = d, .eps = 1e-6f};
    struct rt_linear_rope_put_args l = {.x = x, .w = w.ref, .bias = b.ref, .tmp = tmp, .K = K, .put = a};
    assert_ok(K > 0 ? p->ref.be->linear_rope_put(p->ref.dev, p->ref.q, &l, &err) : p->ref.be->rope_put(p->ref.dev, p->ref.q, &a, &err));
    a.qkv = gx, a.q_norm = wq.gpu, a.k_norm = wk.gpu, a.q = gq, a.k_cache = gk, a.v_cache = gv, a.cos = gc, a.sin = gsin, a.slot = gs, a.pos = gpos;
    a.pages.table = gt;
    void *gtmp = cuda_act(p, NULL, n * (q + 2 * kv));
    l = (struct rt_linear_rope_put_args){.x = gx, .w = w.gpu, .bias = b.gpu, .tmp = gtmp, .K = K, .put = a};
    assert_ok(K > 0 ? p->gpu.be->linear_rope_put(p->gpu.dev, p->gpu.q, &l, &err) : p->gpu.be->rope_put(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, got, gq, n * q);
    cuda_get_act(p, gotk, gk, size);
    cuda_get_act(p, gotv, gv, size);
    for (int64_t i = 0; i < n * q; i++) { /* what one side left alone the other did too */
        assert_true(isnan(got[i]) == isnan(want[i]));
        got[i] = isnan(got[i]) ? 0 : got[i];
        want[i] = isnan(want[i]) ? 0 : want[i];
    }
    for (int64_t i = 0; i < size; i++) {
        assert_true(isnan(gotk[i]) == isnan(k[i]) && isnan(gotv[i]) == isnan(v[i]) && (isnan(v[i]) || K > 0 || gotv[i] == v[i]));
        gotk[i] = isnan(gotk[i]) ? 0 : gotk[i];
        k[i] = isnan(k[i]) ? 0 : k[i];
        gotv[i] = isnan(gotv[i]) ? 0 : gotv[i];
        v[i] = isnan(v[i]) ? 0 : v[i];
    }
    snprintf(what, sizeof what, "%srope_put %d/%d of %d%s", K > 0 ? "linear_" : "", nh, nkv, d, norm ? " norm" : "");
    /* where the projection is an operation of its own, its result is rounded too */
    const double bound = K > 0 && (norm || d < 64) ? 1.42 * CUDA_BF16_ONCE : CUDA_BF16_ONCE, row = K > 0 ? 0x1p-7 : 0x1p-8;
    cuda_close(what, got, want, n * nh, d, bound, row);
    cuda_close("  keys", gotk, k, SLOTS * CAPACITY * nkv, d, bound, row);
    cuda_close("  values", gotv, v, SLOTS * CAPACITY * nkv, d, bound, row);
    if (K > 0) {
        cuda_weight_free(p, &w);
        cuda_weight_free(p, &b);
    }
    cuda_free(p, gtmp);
    rt_free(tmp);
    if (norm) {
        cuda_weight_free(p, &wq);
        cuda_weight_free(p, &wk);
    }
    void *const device[] = {gx, gq, gk, gv, gc, gsin, gt, gs, gpos};
    for (int i = 0; i < 9; i++)
        cuda_free(p, device[i]);
    float *const all[] = {x, want, got, k, v, gotk, gotv, cos, sin};
    for (int i = 0; i < 9; i++)
        rt_free(all[i]);
}

static void test_put(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    one_put(&p, 12, 2, 128, false, 0);
    one_put(&p, 14, 2, 64, false, 0);
    one_put(&p, 16, 8, 128, true, 0);
    one_put(&p, 5, 1, 16, true, 0);
    one_put(&p, 4, 2, 10, true, 0);
    one_put(&p, 3, 1, 24, false, 0);
    one_put(&p, 12, 2, 128, false, 1536);
    one_put(&p, 14, 2, 64, false, 896);
    one_put(&p, 3, 2, 64, false, 72); /* half a tile is left over */
    one_put(&p, 4, 2, 128, true, 256);
    one_put(&p, 3, 1, 16, false, 64);
    cuda_pair_close(&p);
}

/* ---- recorded work ---- */

static void test_graph(void **state)
{
    enum { N = 1000 };
    struct cuda_pair p;
    struct rt_err err = {0};
    struct rt_graph *g = NULL;
    static float x[N], y[N], want[N];
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct rt_backend *be = p.gpu.be;
    cuda_random(x, N, 81, 1.0f);
    cuda_random(y, N, 82, 1.0f);
    void *gx = cuda_act(&p, x, N), *gy = cuda_act(&p, y, N);
    assert_ok(be->graph_begin(p.gpu.dev, p.gpu.q, &err));
    assert_ok(RT_OP(&p.gpu, axpy, &err, .x = gx, .y = gy, .n = N, .a = 1));
    assert_ok(be->graph_end(p.gpu.dev, p.gpu.q, &g, &err));
    assert_non_null(g);
    cuda_get_act(&p, want, gy, N);
    assert_memory_equal(want, y, sizeof y); /* recorded, not run */
    for (int i = 0; i < 2; i++) {
        assert_ok(be->graph_run(p.gpu.dev, p.gpu.q, g, &err));
        for (int j = 0; j < N; j++)
            want[j] = y[j] + x[j];
        cuda_round(want, N);
        cuda_get_act(&p, y, gy, N);
        assert_memory_equal(y, want, sizeof y);
    }
    be->graph_free(p.gpu.dev, g);
    be->graph_free(p.gpu.dev, NULL);
    /* what may not be recorded fails, and the queue goes on */
    assert_ok(be->graph_begin(p.gpu.dev, p.gpu.q, &err));
    assert_int_equal(be->queue_sync(p.gpu.dev, p.gpu.q, &err), RT_DEVICE);
    rt_err_clear(&err);
    assert_int_equal(be->graph_end(p.gpu.dev, p.gpu.q, &g, &err), RT_DEVICE);
    assert_null(g);
    rt_err_clear(&err);
    assert_ok(RT_OP(&p.gpu, axpy, &err, .x = gx, .y = gy, .n = N, .a = 1));
    assert_ok(rt_device_sync(&p.gpu, &err));
    cuda_free(&p, gx);
    cuda_free(&p, gy);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_sample),
    cmocka_unit_test(test_pages),
    cmocka_unit_test(test_put),
    cmocka_unit_test(test_graph),
};
RT_SUITE(cuda_generate, tests)
