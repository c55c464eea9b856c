/* The cpu backend's teacher operations against the reference (see tests/ops_cpu.h): router, experts, head, latent attention. */
#include <sys/mman.h>

#include "core/cpu/cpu.h"
#include "tests/ops_cpu.h"

#define BOUND 1e-6

static struct rt_weight *bf16(struct rt_device *d, const uint16_t *data, int64_t rows, int64_t cols, bool resident)
{
    struct rt_err err = {0};
    struct rt_weight *w = NULL;
    const struct rt_weight_src src = {"w", RT_BF16, rows, cols, data, NULL, resident, NULL, NULL};
    assert_ok(d->be->weight_load(d->dev, d->q, &src, &w, &err));
    return w;
}

static void *coded(enum rt_dtype dtype, int64_t n, uint64_t stream, double scale)
{
    float *v = randoms(n, stream, scale);
    void *data = malloc((size_t)n * rt_dtype_size(dtype));
    assert_non_null(data);
    assert_true(rt_from_f32(data, dtype, v, (size_t)n));
    free(v);
    return data;
}

static void shared_max(struct devices *all, size_t bytes)
{
    for (int c = 0; c < CPUS; c++)
        all->cpu[c].dev->shared_max = bytes;
}

/* ---- route ---- */
struct route {
    struct rt_route_args a;
    uint16_t *w;
    float *bias;
};

static enum rt_status run_route(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct route *t = ctx;
    struct rt_route_args a = t->a;
    const int64_t places = a.n * a.k;
    int32_t *ids = malloc((size_t)(places + GUARD) * sizeof *ids), *perm = malloc((size_t)(places + GUARD) * sizeof *perm);
    int32_t *offset = malloc((size_t)(a.E + 2) * sizeof *offset);
    memset(ids, 0x5a, (size_t)(places + GUARD) * sizeof *ids);
    memset(perm, 0x5a, (size_t)(places + GUARD) * sizeof *perm);
    offset[a.E + 1] = 77;
    struct rt_weight *w = bf16(d, t->w, a.E, a.H, false), *bias = t->bias != NULL ? ops_param(d, t->bias, 1, a.E) : NULL;
    a.w = w;
    a.bias = bias;
    a.ids = ids;
    a.weight = out[0];
    enum rt_status st = d->be->route(d->dev, d->q, &a, err);
    if (st == RT_OK)
        st = RT_OP(d, moe_sort, err, .ids = ids, .perm = perm, .offset = offset, .n = a.n, .k = a.k, .E = a.E);
    for (int i = 0; i < GUARD; i++)
        assert_true(ids[places + i] == 0x5a5a5a5a && perm[places + i] == 0x5a5a5a5a);
    assert_int_equal(offset[a.E + 1], 77);
    for (int64_t i = 0; i < places; i++) {
        out[1][i] = (float)ids[i];
        out[2][i] = (float)perm[i];
    }
    for (int e = 0; e <= a.E; e++)
        out[3][e] = (float)offset[e];
    d->be->weight_free(d->dev, w);
    d->be->weight_free(d->dev, bias);
    free(ids), free(perm), free(offset);
    return st;
}

static void routing(void **state)
{
    static const struct rt_route_args forms[] = {
        {.H = 64, .E = 16, .k = 4, .n_group = 4, .topk_group = 2, .sigmoid = true, .group_top2 = true, .norm = true, .scale = 2.5f},
        {.H = 48, .E = 12, .k = 3, .n_group = 3, .topk_group = 2, .scale = 16},
        {.H = 70, .E = 9, .k = 9, .n_group = 1, .topk_group = 1, .norm = true, .scale = 1},
        {.H = 144, .E = 150, .k = 8, .sigmoid = true, .norm = true, .scale = 1.8f},
    };
    static const int64_t rows[] = {1, 3, 17, 129};
    for (int64_t f = 0; f < COUNT(forms); f++)
        for (int64_t r = 0; r < COUNT(rows); r++) {
            struct route t = {.a = forms[f]};
            const int64_t n = rows[r], sizes[4] = {n * t.a.k, n * t.a.k, n * t.a.k, t.a.E + 1};
            float *x = randoms(n * t.a.H, 31, 1);
            t.a.n = n;
            t.a.x = x;
            t.w = coded(RT_BF16, t.a.E * t.a.H, 32, 0.1);
            t.bias = f % 2 == 0 ? randoms(t.a.E, 33, 0.1) : NULL;
            hold(*state, "route, moe_sort", run_route, &t, 4, sizes, BOUND);
            free(x), free(t.w), free(t.bias);
        }
}

/* All logits equal: the smaller ids win, in groups and among groups. */
static void routing_ties(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    float x[8] = {0}, w[8 * 8] = {0}, weight[4];
    int32_t ids[4];
    struct rt_device *d = &all->cpu[0];
    struct rt_weight *h = ops_param(d, w, 8, 8);
    assert_ok(RT_OP(d, route, &err, .x = x, .w = h, .ids = ids, .weight = weight, .n = 1, .H = 8, .E = 8, .k = 4, .n_group = 4,
                    .topk_group = 2, .sigmoid = true, .group_top2 = true, .norm = true, .scale = 1));
    assert_memory_equal(ids, ((const int32_t[]){0, 1, 2, 3}), sizeof ids);
    d->be->weight_free(d->dev, h);
}

/* One bad number in the router or its bias: the weights of the tokens that it is about are NaN, and of no others. */
static void routing_of_what_is_not_finite(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    enum { N = 3, H = 8, E = 16, K = 2 };
    for (int i = 0; i < 3 * E; i++) {
        float *x = randoms(N * H, 34, 1), *w = randoms(E * H, 35, 1), *bias = randoms(E, 36, 0.1), weight[N * K];
        int32_t ids[N * K];
        struct rt_device *d = &all->cpu[i % CPUS];
        struct rt_weight *p = ops_param(d, w, E, H), *b = ops_param(d, bias, 1, E);
        if (i < E)
            bias[i] = NAN;
        else if (i < 2 * E)
            w[(i - E) * H] = -NAN;
        else
            x[H + i % H] = NAN; /* of the second token */
        assert_ok(RT_OP(d, route, &err, .x = x, .w = p, .bias = b, .ids = ids, .weight = weight, .n = N, .H = H, .E = E, .k = K, .n_group = 4,
                        .topk_group = 2, .sigmoid = true, .group_top2 = true, .norm = true, .scale = 1));
        for (int j = 0; j < N * K; j++) {
            assert_true(ids[j] >= 0 && ids[j] < E);
            assert_true((isnan(weight[j]) != 0) == (i < 2 * E || j / K == 1));
        }
        d->be->weight_free(d->dev, p);
        d->be->weight_free(d->dev, b);
        free(x), free(w), free(bias);
    }
}

/* ---- experts ---- */
struct ffn {
    enum rt_dtype dtype;
    int64_t n;
    int experts, k, H, I;
    bool exact, dense, pow2;
    struct rt_act x;
    int32_t *perm, *offset;
    float *weight, *scale;
    void **data; /* gate, up, down of each expert */
};

static enum rt_status run_ffn(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    enum { MOST = 64 };
    const struct ffn *t = ctx;
    struct rt_weight *w[3][MOST];
    for (int e = 0; e < t->experts; e++)
        for (int i = 0; i < 3; i++)
            w[i][e] = ops_load(d, t->dtype, t->data[3 * e + i], t->dtype == RT_E4M3 ? t->scale : NULL, i < 2 ? t->I : t->H,
                               i < 2 ? t->H : t->I);
    const enum rt_status st =
        RT_OP(d, moe_ffn, err, .x = t->x, .perm = t->dense ? NULL : t->perm, .weight = t->weight, .offset = t->offset,
              .gate = (const struct rt_weight *const *)w[0], .up = (const struct rt_weight *const *)w[1],
              .down = (const struct rt_weight *const *)w[2], .y = out[0], .n = t->n, .n_experts = t->experts, .k = t->k, .H = t->H,
              .I = t->I, .row_exact = t->exact, .pow2 = t->pow2);
    for (int e = 0; e < t->experts; e++)
        for (int i = 0; i < 3; i++)
            d->be->weight_free(d->dev, w[i][e]);
    return st;
}

static struct ffn make_ffn(enum rt_dtype dtype, int64_t n, int experts, int k, int H, int I)
{
    struct ffn t = {.dtype = dtype, .n = n, .experts = experts, .k = k, .H = H, .I = I, .dense = experts == 1};
    const int64_t blocks = ((H + 127) / 128) * ((I + 127) / 128);
    t.x.data = randoms(n * H, 41, 1);
    t.weight = randoms(n * k, 42, 0.4);
    t.scale = malloc((size_t)blocks * sizeof *t.scale);
    for (int64_t i = 0; i < blocks; i++)
        t.scale[i] = (float)(0.002 + 0.001 * rt_rng_uniform(5, 1, (uint64_t)i));
    t.data = malloc((size_t)experts * 3 * sizeof *t.data);
    for (int i = 0; i < 3 * experts; i++)
        t.data[i] = coded(dtype, (int64_t)H * I, 43 + (uint64_t)i, dtype == RT_E4M3 ? 40 : 0.1);
    /* k distinct experts a token, unevenly: expert 1 gets nobody. */
    t.perm = malloc((size_t)(n * k) * sizeof *t.perm);
    t.offset = malloc((size_t)(experts + 1) * sizeof *t.offset);
    int32_t at = 0;
    for (int e = 0; e < experts; e++) {
        t.offset[e] = at;
        for (int32_t i = 0; i < n * k && experts > 1; i++) {
            const int first = (i / k * 7 + i / k / 3) % (experts - 1), pick = (first + i % k) % (experts - 1);
            if (pick + (pick >= 1) == e)
                t.perm[at++] = i;
        }
    }
    t.offset[experts] = experts > 1 ? at : (int32_t)n;
    return t;
}

static void free_ffn(struct ffn *t)
{
    for (int i = 0; i < 3 * t->experts; i++)
        free(t->data[i]);
    free(t->data), free(t->perm), free(t->offset), free(t->x.data), free(t->x.scale), free(t->weight), free(t->scale);
}

static void experts(void **state)
{
    struct devices *all = *state;
    static const int64_t rows[] = {1, 3, 17, 129};
    static const struct { enum rt_dtype dtype; int experts, k, H, I; } form[] = {
        {RT_BF16, 5, 2, 64, 48}, {RT_E4M3, 4, 3, 192, 144}, {RT_F32, 7, 6, 33, 17}, {RT_BF16, 1, 1, 96, 130}, {RT_E4M3, 1, 1, 320, 64},
    };
    for (int64_t f = 0; f < COUNT(form); f++)
        for (int64_t r = 0; r < COUNT(rows); r++) {
            struct ffn t = make_ffn(form[f].dtype, rows[r], form[f].experts, form[f].k, form[f].H, form[f].I);
            const int64_t size = t.n * t.H;
            for (int part = 0; part < 2; part++) { /* at once, and in batches of 10 rows that cut through experts */
                shared_max(all, part ? (size_t)(10 * (t.H + t.I)) * sizeof(float) : RT_CPU_SHARED_MAX);
                t.exact = (f + r + part) % 2 == 0;
                hold(all, "moe_ffn", run_ffn, &t, 1, &size, BOUND);
            }
            free_ffn(&t);
        }
    shared_max(all, RT_CPU_SHARED_MAX);
}

/* The same bytes whether one list holds all experts or several calls do, as they come when weights are streamed. */
static void experts_in_groups(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    struct ffn t = make_ffn(RT_BF16, 300, 6, 3, 160, 144);
    const int64_t size = t.n * t.H;
    float *whole = calloc((size_t)size, sizeof *whole), *parts = calloc((size_t)size, sizeof *parts);
    int32_t *offset = t.offset;
    void **data = t.data;
    shared_max(all, (size_t)(400 * (t.H + t.I)) * sizeof(float)); /* some experts share a batch, and more than one is needed */
    assert_ok(run_ffn(&all->cpu[1], &t, &whole, &err));
    for (int step = 1; step < 6; step++) {
        memset(parts, 0, (size_t)size * sizeof *parts);
        for (int e = 0; e < 6; e += step) {
            t.experts = e + step <= 6 ? step : 6 - e;
            t.offset = offset + e;
            t.data = data + (ptrdiff_t)(3 * e);
            assert_ok(run_ffn(&all->cpu[1], &t, &parts, &err));
        }
        assert_memory_equal(parts, whole, (size_t)size * sizeof *parts);
    }
    t.experts = 6, t.offset = offset, t.data = data;
    shared_max(all, RT_CPU_SHARED_MAX);
    free(whole), free(parts), free_ffn(&t);
}

static void experts_e4m3_activations(void **state)
{
    struct devices *all = *state;
    for (int dense = 0; dense < 2; dense++) {
        struct rt_err err = {0};
        struct ffn t = make_ffn(RT_E4M3, 17, dense ? 1 : 4, dense ? 1 : 2, 256, 384);
        const int64_t size = t.n * t.H;
        float *x = t.x.data;
        t.x = (struct rt_act){malloc((size_t)size), malloc((size_t)size / 128 * sizeof(float))};
        assert_ok(RT_OP(&all->ref, quant, &err, .x = x, .q = t.x, .n = t.n, .cols = t.H));
        /* The gated states are rounded to e4m3 inside: where a last bit tips one over, a term of 384 changes by 1/8. */
        hold(all, "moe_ffn of e4m3", run_ffn, &t, 1, &size, 5e-3);
        t.pow2 = true; /* coarser scales: steps of up to 1/4 */
        hold(all, "moe_ffn of e4m3, scales powers of two", run_ffn, &t, 1, &size, 1e-2);
        free(x);
        free_ffn(&t);
    }
}

static void experts_row_exact(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    enum { N = 64, H = 144, I = 80 };
    struct ffn t = make_ffn(RT_BF16, N, 6, 3, H, I);
    float *y = calloc(N * H, sizeof *y), one[H], *x = t.x.data;
    t.exact = true;
    assert_ok(run_ffn(&all->cpu[1], &t, &y, &err));
    /* Each token alone: its places, in the experts' order. */
    int32_t *perm = t.perm, *offset = t.offset, own[3], own_offset[7];
    float own_weight[3], *weight = t.weight;
    for (int64_t i = 0; i < N; i++) {
        int32_t at = 0;
        for (int e = 0; e < 6; e++) {
            own_offset[e] = at;
            for (int32_t r = offset[e]; r < offset[e + 1]; r++)
                if (perm[r] / 3 == i) {
                    own[at] = at;
                    own_weight[at++] = weight[perm[r]];
                }
        }
        own_offset[6] = at;
        assert_int_equal(at, 3);
        t.x.data = x + i * H, t.n = 1, t.perm = own, t.offset = own_offset, t.weight = own_weight;
        memset(one, 0, sizeof one);
        assert_ok(run_ffn(&all->cpu[1], &t, (float *[]){one}, &err));
        assert_memory_equal(one, y + i * H, sizeof one);
    }
    t.x.data = x, t.perm = perm, t.offset = offset, t.weight = weight;
    free(y);
    free_ffn(&t);
}

/* ---- head ---- */
struct head {
    const float *x;
    const uint16_t *w;
    const int32_t *next;
    int64_t n, H, rows, n_ids;
    int k, n_lse;
    bool resident, sums; /* sums: answers lse and log-probability, else ids, logits and ranks */
};

static const float inv_temp[] = {1.0f / 0.6f, 1, 0.5f};

static enum rt_status run_head(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct head *t = ctx;
    const int64_t places = t->n * t->k;
    uint32_t *ids = malloc((size_t)(places + GUARD) * sizeof *ids), *rank = malloc((size_t)(t->n + GUARD) * sizeof *rank);
    float *logits = malloc((size_t)(places + GUARD) * sizeof *logits), *lse = randoms(t->n * t->n_lse + GUARD, 53, 1);
    float *logprob = randoms(t->n + GUARD, 53, 1), guard = lse[t->n * t->n_lse], guard2 = logprob[t->n];
    memset(ids, 0x5a, (size_t)(places + GUARD) * sizeof *ids);
    memset(logits, 0x5a, (size_t)(places + GUARD) * sizeof *logits);
    memset(rank, 0x5a, (size_t)(t->n + GUARD) * sizeof *rank);
    struct rt_weight *w = bf16(d, t->w, t->rows, t->H, t->resident);
    const enum rt_status st = RT_OP(d, head_topk, err, .x = t->x, .w = w, .next = t->next, .n = t->n, .H = t->H, .n_ids = t->n_ids,
                                    .k = t->k, .n_lse = t->n_lse, .inv_temp = inv_temp, .topk_ids = ids, .topk_logits = logits,
                                    .lse = lse, .next_logprob = logprob, .next_rank = rank);
    for (int i = 0; i < GUARD; i++)
        assert_true(ids[places + i] == 0x5a5a5a5a && rank[t->n + i] == 0x5a5a5a5a &&
                    memcmp(logits + places + i, ids + places + i, sizeof *ids) == 0);
    assert_true(lse[t->n * t->n_lse] == guard && logprob[t->n] == guard2);
    for (int64_t i = 0; i < places && !t->sums; i++) {
        out[0][i] = (float)ids[i];
        out[0][places + i] = logits[i];
    }
    for (int64_t i = 0; i < t->n && !t->sums; i++)
        out[0][2 * places + i] = (float)rank[i];
    for (int64_t i = 0; i < t->n * t->n_lse && t->sums; i++)
        out[0][i] = lse[i];
    for (int64_t i = 0; i < t->n && t->sums; i++)
        out[0][t->n * t->n_lse + i] = isinf(logprob[i]) ? -10 : logprob[i];
    d->be->weight_free(d->dev, w);
    free(ids), free(rank), free(logits), free(lse), free(logprob);
    return st;
}

static void hold_head(struct devices *all, struct head t, bool whole)
{
    float *x = randoms(t.n * t.H, 51, 1);
    uint16_t *w = coded(RT_BF16, t.rows * t.H, 52, 0.3);
    int32_t *next = malloc((size_t)t.n * sizeof *next);
    if (whole) { /* small integers: logits are exact, and many are equal */
        for (int64_t i = 0; i < t.n * t.H; i++)
            x[i] = (float)((int)(rt_rng_u64(6, 1, (uint64_t)i) % 5) - 2);
        for (int64_t i = 0; i < t.rows * t.H; i++)
            w[i] = rt_f32_to_bf16((float)((int)(rt_rng_u64(6, 2, (uint64_t)i) % 5) - 2));
    }
    for (int64_t i = 0; i < t.n; i++)
        next[i] = (int32_t)(rt_rng_u64(6, 3, (uint64_t)i) % (uint64_t)(t.rows + 1)); /* some do not exist */
    t.x = x, t.w = w, t.next = next;
    if (whole)
        hold(all, "head_topk, ids and ranks", run_head, &t, 1, (const int64_t[]){t.n * (2 * t.k + 1)}, 0);
    t.sums = true;
    hold(all, "head_topk, sums", run_head, &t, 1, (const int64_t[]){t.n * (t.n_lse + 1)}, BOUND);
    free(x), free(w), free(next);
}

static void head(void **state)
{
    static const int64_t rows[] = {1, 3, 17, 129};
    for (int64_t r = 0; r < COUNT(rows); r++) {
        const struct head t = {.n = rows[r], .H = 40, .rows = 3300, .n_ids = 3217, .k = 64, .n_lse = 3, .resident = r % 2 == 1};
        hold_head(*state, t, true);
        hold_head(*state, t, false);
    }
    hold_head(*state, (struct head){.n = 5, .H = 30, .rows = 100, .n_ids = 100, .k = 100, .n_lse = 1}, true);
    hold_head(*state, (struct head){.n = 3, .H = 30, .rows = 7, .n_ids = 5, .k = 1, .n_lse = 2}, false);
    /* One slice and few distinct logits: what counts lies just above the floor of the collected ones. */
    hold_head(*state, (struct head){.n = 40, .H = 4, .rows = 1900, .n_ids = 1900, .k = 64, .n_lse = 1}, true);
    /* Few rows at a time. */
    struct devices *all = *state;
    shared_max(all, 300000);
    hold_head(all, (struct head){.n = 1100, .H = 16, .rows = 2500, .n_ids = 2500, .k = 8, .n_lse = 1}, true);
    shared_max(all, RT_CPU_SHARED_MAX);
}

/* Without the parts that may be left out; logits of some thousands. */
static void head_optional(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    struct rt_device *d = &all->cpu[1];
    float x[2] = {1, -1}, w[3] = {4000, -3000, 3999}, lse[2];
    struct rt_weight *h = ops_param(d, w, 3, 1);
    assert_ok(RT_OP(d, head_topk, &err, .x = x, .w = h, .n = 2, .H = 1, .n_ids = 3, .n_lse = 1, .inv_temp = (const float[]){1}, .lse = lse));
    assert_near(lse[0], 4000 + log1p(exp(-1)), 1e-3);
    assert_near(lse[1], 3000, 1e-3);
    x[0] = NAN; /* a broken row says so, and spoils no other */
    assert_ok(RT_OP(d, head_topk, &err, .x = x, .w = h, .n = 2, .H = 1, .n_ids = 3, .n_lse = 1, .inv_temp = (const float[]){1}, .lse = lse));
    assert_true(isnan(lse[0]));
    assert_near(lse[1], 3000, 1e-3);
    assert_status(RT_OP(d, head_topk, &err, .x = x, .w = h, .n = 2, .H = 1, .n_ids = 4), SHAPE);
    assert_status(RT_OP(d, head_topk, &err, .x = x, .w = h, .n = 2, .H = 1, .n_ids = 3, .k = 4), SHAPE);
    d->be->weight_free(d->dev, h);
}

/* ---- latent attention ---- */
struct mla {
    const float *x, *pe;
    const uint16_t *w;
    const int32_t *slot, *pos;
    int64_t n, capacity;
    int nh, R, dr, d, variant;
};

static enum rt_status run_heads(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct mla *t = ctx;
    const int dx = t->variant ? t->R : t->d, dy = t->variant ? t->d : t->R;
    struct rt_weight *w = bf16(d, t->w, (int64_t)t->nh * (t->d + 9), t->R, false);
    const enum rt_status st =
        RT_OP(d, head_matmul, err, .x = t->x, .x_ld = (dx + 3) * t->nh + 1, .x_head = dx + 3, .w = w, .y = out[0],
              .y_ld = (dy + 2) * t->nh, .y_head = dy + 2, .n = t->n, .nh = t->nh, .head_rows = t->d + 9, .row0 = 5, .d = t->d, .R = t->R,
              .transpose = t->variant != 0);
    d->be->weight_free(d->dev, w);
    return st;
}

static enum rt_status run_mla(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct mla *t = ctx;
    const int width = t->R + t->dr;
    enum rt_status st = RT_OP(d, cache_put, err, .x = t->x, .ldx = width + 2, .cache = out[1], .slot = t->slot, .pos = t->pos, .n = t->n,
                              .capacity = t->capacity, .width = width);
    if (st == RT_OK)
        st = RT_OP(d, mla_cached, err, .q_lat = t->x, .q_pe = t->pe, .q_pe_ld = t->nh * (t->dr + 4) + 1, .q_pe_head = t->dr + 4,
                   .cache = out[1], .slot = t->slot, .pos = t->pos, .o = out[0], .n = t->n, .capacity = t->capacity, .nh = t->nh,
                   .R = t->R, .dr = t->dr, .scale = 0.2f);
    if (st == RT_OK)
        st = RT_OP(d, cache_copy, err, .cache = out[1], .capacity = t->capacity, .width = width, .n = t->capacity - 1, .src = 0, .dst = 1);
    return st;
}

static void latent(void **state)
{
    struct devices *all = *state;
    static const int64_t rows[] = {1, 3, 17, 129};
    for (int64_t r = 0; r < COUNT(rows); r++) {
        const int64_t n = rows[r];
        struct mla t = {.n = n, .nh = r == 2 ? 35 : 3, .R = 30 + 17 * (int)r, .dr = 6, .d = 20 + (int)r, .capacity = 600};
        const int width = t.R + t.dr;
        const int64_t most = n * (t.nh * (width + 20) + 20);
        float *x = randoms(most, 61, 1), *pe = randoms(most, 62, 1);
        int32_t *slot = malloc((size_t)n * sizeof *slot), *pos = malloc((size_t)n * sizeof *pos);
        uint16_t *w = coded(RT_BF16, (int64_t)t.nh * (t.d + 9) * t.R, 63, 1);
        for (int64_t i = 0; i < n; i++) {
            slot[i] = (int32_t)(i % 3);
            pos[i] = i == 1 ? 599 : (int32_t)(i * 37 % 600);
        }
        t.x = x, t.pe = pe, t.w = w, t.slot = slot, t.pos = pos;
        for (t.variant = 0; t.variant < 2; t.variant++) {
            const int dy = t.variant ? t.d : t.R;
            hold(all, "head_matmul", run_heads, &t, 1, (const int64_t[]){n * t.nh * (dy + 2)}, BOUND);
        }
        hold(all, "cache_put, mla_cached, cache_copy", run_mla, &t, 2, (const int64_t[]){n * t.nh * t.R, 3 * t.capacity * width}, 2e-6);
        free(x), free(pe), free(slot), free(pos), free(w);
    }
}

/* Rows alone and together; the same history whatever else the caches hold. */
static void latent_row_exact(void **state)
{
    struct devices *all = *state;
    struct rt_device *d = &all->cpu[1];
    struct rt_err err = {0};
    enum { N = 64, NH = 5, R = 48, DR = 8, CAP = 300, WIDTH = R + DR };
    float *cache = randoms(4 * CAP * WIDTH, 71, 1), *q = randoms(N * NH * R, 72, 1), *pe = randoms(N * NH * DR, 73, 1);
    float *o = malloc(N * NH * R * sizeof *o), one[NH * R];
    int32_t slot[N], pos[N];
    for (int i = 0; i < N; i++)
        slot[i] = i % 4, pos[i] = i * 29 % CAP;
    assert_ok(RT_OP(d, mla_cached, &err, .q_lat = q, .q_pe = pe, .cache = cache, .slot = slot, .pos = pos, .o = o, .n = N, .capacity = CAP,
                    .nh = NH, .R = R, .dr = DR, .scale = 0.3f));
    for (int i = 0; i < N; i++) {
        assert_ok(RT_OP(d, mla_cached, &err, .q_lat = q + i * NH * R, .q_pe = pe + i * NH * DR, .cache = cache, .slot = slot + i,
                        .pos = pos + i, .o = one, .n = 1, .capacity = CAP, .nh = NH, .R = R, .dr = DR, .scale = 0.3f));
        assert_memory_equal(one, o + i * NH * R, sizeof one);
    }
    pos[3] = CAP;
    assert_status(RT_OP(d, mla_cached, &err, .q_lat = q, .q_pe = pe, .cache = cache, .slot = slot, .pos = pos, .o = o, .n = N,
                        .capacity = CAP, .nh = NH, .R = R, .dr = DR, .scale = 0.3f), SHAPE);
    free(cache), free(q), free(pe), free(o);
}

/* A window whose last states lie behind 2^31 elements: one token there is worked on as the first one is. Of the 9 GB, pages that are touched alone exist. */
static void experts_of_a_great_window(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    enum { H = 1 << 15, I = 16, AT = (1 << 16) + 3 };
    const size_t bytes = (size_t)(AT + 1) * H * sizeof(float);
    float *x = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    float *y = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (x == MAP_FAILED || y == MAP_FAILED)
        skip();
    struct ffn t = make_ffn(RT_BF16, 1, 2, 1, H, I);
    float *first = calloc(H, sizeof *first);
    assert_ok(run_ffn(&all->cpu[1], &t, &first, &err));
    memcpy(x + (size_t)AT * H, t.x.data, H * sizeof *x);
    float *const small = t.x.data, weight = t.weight[0], *weights = calloc(AT + 1, sizeof *weights), *const one = t.weight;
    t.n = AT + 1;
    t.x.data = x;
    t.perm[0] = AT;
    t.weight = weights;
    weights[AT] = weight;
    assert_ok(run_ffn(&all->cpu[1], &t, &y, &err));
    assert_memory_equal(y + (size_t)AT * H, first, H * sizeof *y);
    t.x.data = small, t.weight = one;
    free_ffn(&t), free(first), free(weights);
    munmap(x, bytes), munmap(y, bytes);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup_teardown(routing, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(routing_ties, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(routing_of_what_is_not_finite, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(experts, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(experts_in_groups, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(experts_e4m3_activations, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(experts_row_exact, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(experts_of_a_great_window, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(head, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(head_optional, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(latent, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(latent_row_exact, cpu_open_all, cpu_close_all),
};
RT_SUITE(ops_cpu_moe, tests)
