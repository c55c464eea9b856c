/* Operations of generation on the host: caches in pages, from the projection to the caches, sampling; and the pages themselves. */
#include <math.h>
#include <string.h>

#include "core/backend.h"
#include "core/mem.h"
#include "core/pages.h"
#include "core/rng.h"
#include "tests/suite.h"

enum { SLOTS = 4, LEN = 64, COLS = 4, CAPACITY = LEN * COLS, N = 21, NH = 4, NKV = 2, D = 12, WIDTH = NKV * D, SIZE = SLOTS * CAPACITY * WIDTH };

static const struct rt_backend *const backends[] = {&rt_backend_ref, &rt_backend_cpu};

static void open_device(const struct rt_backend *be, struct rt_device *d)
{
    struct rt_err err = {0};
    assert_ok(rt_device_open(be, &(struct rt_dev_options){.threads = 2}, d, &err));
}

static void fill(float *x, int64_t n, uint64_t stream)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = rt_rng_normal(11, stream, (uint64_t)i);
}

/* Pages in another order; slots 0 and 1 share the first two. */
static void make_table(int32_t *table)
{
    for (int i = 0; i < SLOTS * COLS; i++)
        table[i] = (i * 7 + 3) % (SLOTS * COLS);
    memcpy(table + COLS, table, 2 * sizeof *table);
}

static void attention_over_pages(void **state)
{
    static float k[SIZE], v[SIZE], pk[SIZE], pv[SIZE], q[N * NH * D], want[N * NH * D], got[N * NH * D];
    static const int32_t special[] = {0, 15, 63, 64, 65, 127, 128, 200, 255};
    int32_t table[SLOTS * COLS], slot[N], pos[N];
    struct rt_err err = {0};
    (void)state;
    make_table(table);
    fill(pk, SIZE, 1);
    fill(pv, SIZE, 2);
    fill(q, N * NH * D, 3);
    for (int r = 0; r < SLOTS * CAPACITY; r++) {
        const int at = table[r / LEN] * LEN + r % LEN;
        memcpy(k + r * WIDTH, pk + at * WIDTH, WIDTH * sizeof *k);
        memcpy(v + r * WIDTH, pv + at * WIDTH, WIDTH * sizeof *v);
    }
    for (int i = 0; i < N; i++) {
        slot[i] = i % SLOTS;
        pos[i] = special[i % 9];
    }
    for (int b = 0; b < 2; b++) {
        struct rt_device d;
        struct rt_attn_cached_args a = {.q = q, .k_cache = k, .v_cache = v, .slot = slot, .pos = pos, .o = want, .n = N, .capacity = CAPACITY, .nh = NH,
                                        .nkv = NKV, .d = D, .scale = 0.3f};
        open_device(backends[b], &d);
        assert_ok(d.be->attn_cached(d.dev, d.q, &a, &err));
        a.k_cache = pk, a.v_cache = pv, a.o = got, a.pages = (struct rt_cache_pages){table, LEN};
        assert_ok(d.be->attn_cached(d.dev, d.q, &a, &err));
        if (b == 0)
            assert_memory_equal(got, want, sizeof want);
        else /* blocks end with pages */
            assert_true(test_rel_error(got, want, N * NH * D) < 1e-6);
        memcpy(want, got, sizeof want);
        int32_t some[N];
        for (int i = 0; i < N; i++)
            some[i] = i % 3 == 1 ? -1 : pos[i];
        for (int i = 0; i < N * NH * D; i++)
            got[i] = NAN;
        a.pos = some;
        assert_ok(d.be->attn_cached(d.dev, d.q, &a, &err));
        for (int i = 0; i < N * NH * D; i++)
            assert_true(some[i / (NH * D)] < 0 ? isnan(got[i]) : got[i] == want[i]);
        a.pages.table = NULL; /* without pages each row is somebody's */
        assert_status(d.be->attn_cached(d.dev, d.q, &a, &err), SHAPE);
        rt_device_close(&d);
    }
}

/* What headnorm_rope_fwd and cache_put do one after the other. */
static void from_the_projection_to_the_caches(void **state)
{
    enum { Q = NH * D, IN = Q + 2 * WIDTH };
    static float x[N * IN], q[N * Q], k[SIZE], v[SIZE], want_q[N * Q], want_k[N * WIDTH], cos[CAPACITY * D / 2], sin[CAPACITY * D / 2], w[2][D];
    int32_t table[SLOTS * COLS], slot[N], pos[N], safe[N];
    struct rt_err err = {0};
    (void)state;
    make_table(table);
    fill(x, N * IN, 4);
    fill(w[0], 2 * D, 5);
    for (int i = 0; i < CAPACITY * D / 2; i++) {
        cos[i] = cosf((float)i * 0.37f);
        sin[i] = sinf((float)i * 0.37f);
    }
    for (int i = 0; i < N; i++) {
        slot[i] = i % SLOTS;
        pos[i] = i % 5 == 2 ? -1 : 2 * LEN + 9 * (i / SLOTS) + 1;
        safe[i] = pos[i] < 0 ? 0 : pos[i];
    }
    for (int b = 0; b < 2; b++)
        for (int norm = 0; norm < 2; norm++) {
            struct rt_device d;
            struct rt_weight *wq = NULL, *wk = NULL;
            open_device(backends[b], &d);
            if (norm) {
                assert_ok(d.be->weight_param(d.dev, w[0], 1, D, &wq, &err));
                assert_ok(d.be->weight_param(d.dev, w[1], 1, D, &wk, &err));
            }
            assert_ok(RT_OP(&d, headnorm_rope_fwd, &err, .x = x, .ldx = IN, .w = wq, .y = want_q, .cos = cos, .sin = sin, .position = safe, .n = N,
                            .heads = NH, .d = D, .eps = 1e-5f));
            assert_ok(RT_OP(&d, headnorm_rope_fwd, &err, .x = x + Q, .ldx = IN, .w = wk, .y = want_k, .cos = cos, .sin = sin, .position = safe, .n = N,
                            .heads = NKV, .d = D, .eps = 1e-5f));
            for (int i = 0; i < SIZE; i++)
                k[i] = v[i] = NAN;
            for (int i = 0; i < N * Q; i++)
                q[i] = NAN;
            assert_ok(RT_OP(&d, rope_put, &err, .qkv = x, .q_norm = wq, .k_norm = wk, .q = q, .k_cache = k, .v_cache = v, .cos = cos, .sin = sin, .slot = slot,
                            .pos = pos, .pages = {table, LEN}, .n = N, .capacity = CAPACITY, .nh = NH, .nkv = NKV, .d = D, .eps = 1e-5f));
            int written = 0;
            for (int i = 0; i < SIZE; i++)
                written += !isnan(k[i]) && !isnan(v[i]);
            for (int i = 0; i < N; i++) {
                if (pos[i] < 0) {
                    assert_true(isnan(q[i * Q]));
                    continue;
                }
                const int64_t row = ((int64_t)table[slot[i] * COLS + pos[i] / LEN] * LEN + pos[i] % LEN) * WIDTH;
                assert_memory_equal(q + i * Q, want_q + i * Q, Q * sizeof *q);
                assert_memory_equal(k + row, want_k + i * WIDTH, WIDTH * sizeof *k);
                assert_memory_equal(v + row, x + i * IN + Q + WIDTH, WIDTH * sizeof *v);
                written -= WIDTH;
            }
            assert_int_equal(written, 0);
            const int32_t beyond = CAPACITY;
            assert_status(RT_OP(&d, rope_put, &err, .qkv = x, .q = q, .k_cache = k, .v_cache = v, .cos = cos, .sin = sin, .slot = slot, .pos = &beyond,
                                .pages = {table, LEN}, .n = 1, .capacity = CAPACITY, .nh = NH, .nkv = NKV, .d = D),
                          SHAPE);
            d.be->weight_free(d.dev, wq);
            d.be->weight_free(d.dev, wk);
            rt_device_close(&d);
        }
}

static void sampling(void **state)
{
    enum { ROWS = 30, IDS = 200, LD = 208 };
    static float z[ROWS * LD];
    float want_lp[ROWS], lp[ROWS];
    int32_t want[ROWS], id[ROWS];
    uint64_t stream[ROWS];
    int64_t position[ROWS];
    struct rt_err err = {0};
    struct rt_sampler *s;
    const struct rt_sample_params params = {0.7, 0, 0.9};
    (void)state;
    fill(z, ROWS * LD, 6);
    for (int i = 0; i < ROWS; i++) {
        z[i * LD + IDS] = 1e9f;
        stream[i] = 100 - (uint64_t)i;
        position[i] = 3 * i;
    }
    assert_ok(rt_sampler_create(IDS, &params, &s, &err));
    for (int i = 0; i < ROWS; i++)
        assert_ok(rt_sampler_pick(s, z + i * LD, 8, stream[i], (uint64_t)position[i], &want[i], &want_lp[i], &err));
    rt_sampler_free(s);
    z[7 * LD + 50] = NAN;
    z[7 * LD + 60] = INFINITY;
    z[9 * LD] = -INFINITY;
    for (int b = 0; b < 2; b++) {
        struct rt_device d;
        open_device(backends[b], &d);
        assert_ok(RT_OP(&d, sample, &err, .z = z, .ld = LD, .n = ROWS, .n_ids = IDS, .params = params, .seed = 8, .stream = stream, .position = position,
                        .id = id, .logprob = lp));
        for (int i = 0; i < ROWS; i++)
            if (i == 7 || i == 9)
                assert_int_equal(id[i], i == 7 ? -51 : -1);
            else
                assert_true(id[i] == want[i] && lp[i] == want_lp[i]);
        rt_device_close(&d);
    }
}

/* Ids of which some stand for what was drawn. */
static void embedding_of_drawn_ids(void **state)
{
    enum { ROWS = 10, COLUMNS = 6 };
    float table[ROWS * COLUMNS], out[4 * COLUMNS];
    const int32_t ids[] = {3, -2, 9, -1}, drawn[] = {7, 0};
    static const int want[] = {3, 0, 9, 7};
    struct rt_err err = {0};
    (void)state;
    fill(table, ROWS * COLUMNS, 7);
    for (int b = 0; b < 2; b++) {
        struct rt_device d;
        struct rt_weight *w;
        open_device(backends[b], &d);
        assert_ok(d.be->weight_param(d.dev, table, ROWS, COLUMNS, &w, &err));
        assert_ok(RT_OP(&d, embed_fwd, &err, .ids = ids, .table = w, .out = out, .n = 4, .cols = COLUMNS, .drawn = drawn));
        for (int i = 0; i < 4; i++)
            assert_memory_equal(out + i * COLUMNS, table + want[i] * COLUMNS, COLUMNS * sizeof *out);
        assert_status(RT_OP(&d, embed_fwd, &err, .ids = ids, .table = w, .out = out, .n = 4, .cols = COLUMNS), SHAPE);
        d.be->weight_free(d.dev, w);
        rt_device_close(&d);
    }
}

/* ---- pages ---- */

/* Each page is free or in as many tables as it has owners. */
static void check_pages(const struct rt_pages *p)
{
    int32_t seen[64] = {0}, owned = 0;
    for (int s = 0; s < p->slots; s++)
        for (int i = 0; i < p->used[s]; i++)
            seen[p->table[s * p->cols + i]]++;
    for (int i = 0; i < p->total; i++) {
        assert_int_equal(seen[i], p->owners[i]);
        owned += seen[i] > 0;
    }
    assert_int_equal(owned + p->n_free, p->total);
}

static void pages(void **state)
{
    struct rt_err err = {0};
    struct rt_pages p;
    int32_t from, to;
    int64_t rows;
    (void)state;
    assert_ok(rt_pages_create(3, 4, 16, 6, &p, &err));
    assert_true(rt_pages_room(&p, 0, 17, 0)); /* two pages */
    assert_true(rt_pages_room(&p, 0, 32, 100) && p.used[0] == 2);
    assert_false(rt_pages_room(&p, 0, 65, 0)); /* longer than a slot */
    assert_false(rt_pages_room(&p, 1, 33, 2)); /* three, and slot 0 may want its other two */
    assert_int_equal(p.used[1], 0);
    assert_true(rt_pages_room(&p, 1, 33, 1));
    check_pages(&p);
    assert_true(rt_pages_room(&p, 2, 1, 0));
    assert_false(rt_pages_room(&p, 0, 33, 0)); /* none is left */
    check_pages(&p);
    /* two whole pages of slot 1 and five rows of the third */
    assert_true(rt_pages_share(&p, 1, 2, 37, &from, &to, &rows));
    assert_true(rows == 5 && from == p.table[4 + 2] && to == p.table[8 + 2] && to != from && p.table[8] == p.table[4] && p.table[9] == p.table[5]);
    check_pages(&p);
    rt_pages_drop(&p, 1, 20); /* what is shared stays with the other */
    assert_int_equal(p.used[1], 2);
    assert_int_equal(p.n_free, 1);
    check_pages(&p);
    assert_true(rt_pages_room(&p, 0, 48, 0));
    assert_false(rt_pages_share(&p, 0, 1, 5, &from, &to, &rows)); /* no page for its rows; slot 1's two are still slot 2's */
    assert_int_equal(p.used[1], 0);
    assert_true(rt_pages_share(&p, 0, 1, 32, &from, &to, &rows) && rows == 0);
    check_pages(&p);
    for (int s = 0; s < 3; s++)
        rt_pages_drop(&p, s, 0);
    assert_int_equal(p.n_free, 6);
    check_pages(&p);
    rt_pages_free(&p);
    rt_pages_free(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(attention_over_pages),   cmocka_unit_test(from_the_projection_to_the_caches), cmocka_unit_test(sampling),
    cmocka_unit_test(embedding_of_drawn_ids), cmocka_unit_test(pages),
};
RT_SUITE(ops_generate, tests)
