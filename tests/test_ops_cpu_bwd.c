/* The cpu backend's attention, backwards and optimiser against the reference (see tests/ops_cpu.h). */
#include "tests/ops_cpu.h"

/* ---- attention ---- */
struct attn {
    struct rt_attn_shape s;
    int64_t q_ld, q_head, k_ld, k_head, v_ld, v_head;
    float *q, *k, *v, *o, *dout, *lse, *k_pe, *cos, *sin;
    const float *given; /* not NULL: what q is before a call that rotates it */
    int32_t *position;
    int dr;
};

static enum rt_status run_attn_fwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct attn *t = ctx;
    if (t->given != NULL)
        memcpy(t->q, t->given, (size_t)(t->s.n * t->s.nh * t->s.dqk) * sizeof *t->q);
    return RT_OP(d, attn_fwd, err, .s = t->s, .q = t->q, .k = t->k, .v = t->v, .q_ld = t->q_ld, .q_head = t->q_head, .k_ld = t->k_ld,
                 .k_head = t->k_head, .v_ld = t->v_ld, .v_head = t->v_head, .o = out[0], .lse = out[1], .k_pe = t->k_pe, .k_pe_ld = t->dr + 3,
                 .dr = t->dr, .cos = t->cos, .sin = t->sin, .position = t->position);
}

static enum rt_status run_attn_bwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct attn *t = ctx;
    return RT_OP(d, attn_bwd, err, .s = t->s, .q = t->q, .k = t->k, .v = t->v, .q_ld = t->q_ld, .q_head = t->q_head, .k_ld = t->k_ld,
                 .k_head = t->k_head, .v_ld = t->v_ld, .v_head = t->v_head, .o = t->o, .dout = t->dout, .lse = t->lse, .dq = out[0],
                 .dk = out[1], .dv = out[2], .delta = out[3]);
}

/* Strided: rows and heads lie apart by more than they hold. */
static void hold_attn(struct devices *all, const int32_t *cu, int64_t n_seq, int nh, int nkv, int dqk, int dv, bool strided)
{
    struct rt_err err = {0};
    char what[96];
    struct attn t = {.s = {.cu_seqlens = cu, .n = cu[n_seq], .n_seq = n_seq, .nh = nh, .nkv = nkv, .dqk = dqk, .dv = dv,
                           .scale = (float)(1 / sqrt(dqk))}};
    const int64_t n = t.s.n, q_head = strided ? dqk + 3 : dqk, k_head = strided ? dqk + 5 : dqk, v_head = strided ? dv + 1 : dv;
    if (strided)
        t = (struct attn){.s = t.s, .q_ld = nh * q_head + 2, .q_head = q_head, .k_ld = nkv * k_head + 7, .k_head = k_head,
                          .v_ld = nkv * v_head + 1, .v_head = v_head};
    const int64_t sizes[OUTS] = {n * (strided ? t.q_ld : nh * dqk), n * (strided ? t.k_ld : nkv * dqk),
                                 n * (strided ? t.v_ld : nkv * dv), nh * n};
    t.q = randoms(sizes[0], 1, 1.5);
    t.k = randoms(sizes[1], 2, 1.5);
    t.v = randoms(sizes[2], 3, 1);
    t.dout = randoms(n * nh * dv, 4, 1);
    t.o = randoms(n * nh * dv, 5, 1);
    t.lse = randoms(nh * n, 6, 1);
    snprintf(what, sizeof what, "attn_fwd n=%d nh=%d nkv=%d dqk=%d dv=%d%s", (int)n, nh, nkv, dqk, dv, strided ? " strided" : "");
    hold(all, what, run_attn_fwd, &t, 2, (const int64_t[]){n * nh * dv, nh * n}, 2e-6);
    assert_ok(run_attn_fwd(&all->ref, &t, (float *[]){t.o, t.lse}, &err));
    /* delta and P (dP - delta) cancel where the attention is sharp: some more rounding than forward */
    what[5] = 'b', what[6] = 'w', what[7] = 'd';
    hold(all, what, run_attn_bwd, &t, 4, sizes, 5e-6);
    free(t.q), free(t.k), free(t.v), free(t.dout), free(t.o), free(t.lse);
}

static void attention_packed(void **state)
{
    const int32_t cu[] = {0, 1, 3, 20, 20, 150}; /* lengths 1, 2, 17, 0, 130 */
    hold_attn(*state, cu, 5, 2, 2, 16, 16, false);
    hold_attn(*state, cu, 5, 4, 2, 24, 24, true);
    hold_attn(*state, cu, 5, 7, 1, 64, 64, false);
    hold_attn(*state, cu, 5, 3, 3, 96, 96, true);
    hold_attn(*state, cu, 5, 2, 1, 128, 128, false);
    hold_attn(*state, cu, 5, 2, 2, 48, 32, true);
    hold_attn(*state, cu, 5, 1, 1, 192, 128, false);
}

/* MLA's keys in two parts; and codes, which are those of the output. */
static void attention_parts(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    const int32_t cu[] = {0, 1, 3, 20, 20, 750}; /* past one block of keys */
    enum { NH = 4, DN = 16, DR = 8, DV = 32, N = 750, ROW = DN + DV };
    struct attn t = {.s = {.cu_seqlens = cu, .n = N, .n_seq = 5, .nh = NH, .nkv = NH, .dqk = DN + DR, .dv = DV, .scale = 0.3f},
                     .k_ld = NH * ROW, .k_head = ROW, .v_ld = NH * ROW, .v_head = ROW, .dr = DR};
    t.q = randoms(N * NH * (DN + DR), 1, 1.5);
    t.k = randoms(N * NH * ROW, 2, 1.5);
    t.v = t.k + DN;
    t.k_pe = randoms(N * (DR + 3), 3, 1.5);
    hold(all, "attn_fwd, keys in two parts", run_attn_fwd, &t, 2, (const int64_t[]){N * NH * DV, NH * N}, 2e-6);
    struct attn r = t;
    r.cos = randoms(N * DR / 2, 4, 1), r.sin = randoms(N * DR / 2, 5, 1), r.position = malloc(N * sizeof *r.position);
    r.given = t.q, r.q = malloc(N * NH * (DN + DR) * sizeof *r.q);
    for (int i = 0; i < N; i++)
        r.position[i] = i * 7 % N;
    hold(all, "attn_fwd, queries rotated", run_attn_fwd, &r, 2, (const int64_t[]){N * NH * DV, NH * N}, 2e-6);
    free(r.cos), free(r.sin), free(r.position), free(r.q);
    for (int pow2 = 0; pow2 < 2; pow2++)
        for (int i = 0; i < 2; i++) {
            struct rt_device *d = i == 0 ? &all->ref : &all->cpu[1];
            float *o = malloc(N * NH * DV * sizeof *o), *scale = malloc(N * sizeof *scale), *want_scale = malloc(N * sizeof *scale);
            uint8_t *code = malloc(N * NH * DV), *want = malloc(N * NH * DV);
            assert_ok(RT_OP(d, attn_fwd, &err, .s = t.s, .q = t.q, .k = t.k, .v = t.v, .k_ld = t.k_ld, .k_head = t.k_head, .v_ld = t.v_ld,
                            .v_head = t.v_head, .k_pe = t.k_pe, .k_pe_ld = DR + 3, .dr = DR, .o = o));
            assert_ok(RT_OP(d, quant, &err, .x = o, .q = {want, want_scale}, .n = N, .cols = NH * DV, .pow2 = pow2 != 0));
            assert_ok(RT_OP(d, attn_fwd, &err, .s = t.s, .q = t.q, .k = t.k, .v = t.v, .k_ld = t.k_ld, .k_head = t.k_head, .v_ld = t.v_ld,
                            .v_head = t.v_head, .k_pe = t.k_pe, .k_pe_ld = DR + 3, .dr = DR, .o = o, .oq = {code, scale}, .pow2 = pow2 != 0));
            assert_memory_equal(code, want, N * NH * DV);
            assert_memory_equal(scale, want_scale, N * sizeof *scale);
            free(o), free(scale), free(want_scale), free(code), free(want);
        }
    free(t.q), free(t.k), free(t.k_pe);
}

/* Past one block of keys: the running softmax, forward and backward. */
static void attention_long(void **state)
{
    const int32_t cu[] = {0, 700, 1260};
    hold_attn(*state, cu, 2, 2, 1, 16, 24, true);
}

/* Scores of some thousands, of one sign or the other, must not overflow: softmax of shifted scores is the same. */
static void attention_large_scores(void **state)
{
    struct devices *all = *state;
    const int32_t cu[] = {0, 600};
    enum { D = 16, L = 600 };
    struct attn t = {.s = {.cu_seqlens = cu, .n = L, .n_seq = 1, .nh = 1, .nkv = 1, .dqk = D, .dv = D, .scale = 1}};
    t.q = randoms(L * D, 1, 30);
    t.k = randoms(L * D, 2, 30);
    t.v = randoms(L * D, 3, 1);
    /* float32 scores of some thousands carry 1e-4; most rows are decided by one key alone */
    hold(all, "attn_fwd, large scores", run_attn_fwd, &t, 2, (const int64_t[]){L * D, L}, 2e-4);
    free(t.q), free(t.k), free(t.v);
}

static void attention_refuses(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    float x[64] = {0}, o[64];
    const int32_t past[] = {0, 5}, back[] = {0, 3, 2, 4}, good[] = {0, 4};
    struct rt_attn_shape s = {.cu_seqlens = past, .n = 4, .n_seq = 1, .nh = 2, .nkv = 1, .dqk = 4, .dv = 4, .scale = 1};
    assert_status(RT_OP(&all->cpu[0], attn_fwd, &err, .s = s, .q = x, .k = x, .v = x, .o = o), SHAPE);
    s.cu_seqlens = back, s.n_seq = 3;
    assert_status(RT_OP(&all->cpu[0], attn_fwd, &err, .s = s, .q = x, .k = x, .v = x, .o = o), SHAPE);
    s.cu_seqlens = good, s.n_seq = 1, s.nkv = 3;
    assert_status(RT_OP(&all->cpu[0], attn_bwd, &err, .s = s, .q = x, .k = x, .v = x, .o = o), SHAPE);
}

/* ---- attention over caches ---- */
struct cached {
    float *q, *k, *v;
    const int32_t *slot, *pos;
    int64_t n, capacity, q_ld;
    int nh, nkv, d;
};

static enum rt_status run_cached(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct cached *t = ctx;
    return RT_OP(d, attn_cached, err, .q = t->q, .q_ld = t->q_ld, .k_cache = t->k, .v_cache = t->v, .slot = t->slot, .pos = t->pos,
                 .o = out[0], .n = t->n, .capacity = t->capacity, .nh = t->nh, .nkv = t->nkv, .d = t->d, .scale = 0.2f);
}

static void attention_cached(void **state)
{
    struct devices *all = *state;
    static const struct { int nh, nkv, d; } shape[] = {{2, 2, 16}, {4, 2, 24}, {7, 1, 64}, {6, 3, 96}};
    const int32_t slot[] = {2, 0, 0, 1, 2}, pos[] = {0, 1, 16, 129, 1100};
    for (int i = 0; i < COUNT(shape); i++) {
        struct cached t = {.slot = slot, .pos = pos, .n = 5, .capacity = 1200, .nh = shape[i].nh, .nkv = shape[i].nkv, .d = shape[i].d};
        const int64_t width = t.nkv * t.d, row = t.nh * t.d;
        t.q_ld = row + 5 * (i % 2);
        t.q = randoms(5 * (row + 5), 1, 1.5);
        t.k = randoms(3 * t.capacity * width, 2, 1);
        t.v = randoms(3 * t.capacity * width, 3, 1);
        hold(all, "attn_cached", run_cached, &t, 1, &(int64_t){5 * row}, 2e-6);
        /* A token's result is the same bytes without the others. */
        struct cached one = t;
        float *whole = randoms(5 * row, 8, 1), *alone = randoms(row, 9, 1);
        struct rt_err err = {0};
        assert_ok(run_cached(&all->cpu[1], &t, &whole, &err));
        one.q += 3 * t.q_ld, one.slot += 3, one.pos += 3, one.n = 1;
        assert_ok(run_cached(&all->cpu[1], &one, &alone, &err));
        assert_memory_equal(alone, whole + 3 * row, (size_t)row * sizeof(float));
        one.pos = &(int32_t){1200};
        assert_status(run_cached(&all->cpu[1], &one, &alone, &err), SHAPE);
        free(whole), free(alone), free(t.q), free(t.k), free(t.v);
    }
}

/* ---- heads, norm, gate, embedding ---- */
struct rows {
    float *dy, *x, *w, *rstd, *cos, *sin;
    int32_t *position;
    int64_t n, cols, ld;
    int heads, d;
    bool accumulate;
};

/* A weight for the length of one operation. */
#define WITH_WEIGHT(d, values, rows_, cols_, call) \
    struct rt_weight *w = (values) != NULL ? ops_param((d), (values), (rows_), (cols_)) : NULL; \
    const enum rt_status st = (call); \
    (d)->be->weight_free((d)->dev, w); \
    return st

static enum rt_status run_heads_fwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    WITH_WEIGHT(d, t->w, 1, t->d,
                RT_OP(d, headnorm_rope_fwd, err, .x = t->x, .ldx = t->ld, .w = w, .y = out[0], .ldy = t->ld, .rstd = out[1],
                      .cos = t->cos, .sin = t->sin, .position = t->position, .n = t->n, .heads = t->heads, .d = t->d, .eps = 1e-6f));
}

static enum rt_status run_heads_bwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    WITH_WEIGHT(d, t->w, 1, t->d,
                RT_OP(d, headnorm_rope_bwd, err, .dy = t->dy, .x = t->x, .lddy = t->ld, .ldx = t->ld, .w = w, .rstd = t->rstd,
                      .dx = out[0], .lddx = t->ld, .dw = t->w != NULL ? out[1] : NULL, .db = out[2], .n_db = t->ld != 0 ? t->ld : 3 * t->d,
                      .cos = t->cos, .sin = t->sin, .position = t->position, .n = t->n, .heads = t->heads, .d = t->d, .eps = 1e-6f));
}

static void heads_norm_rope(void **state)
{
    struct devices *all = *state;
    enum { N = 150, POSITIONS = 130 };
    static const int dims[] = {16, 24, 64, 96, 128};
    int32_t position[N];
    for (int i = 0; i < N; i++)
        position[i] = i < 20 ? i : i - 20;
    for (int i = 0; i < COUNT(dims); i++)
        for (int normed = 0; normed < 2; normed++) {
            struct rt_err err = {0};
            struct rows t = {.position = position, .n = N, .heads = 3, .d = dims[i], .ld = i % 2 != 0 ? 3 * dims[i] + 5 : 0};
            const int64_t size = N * (t.ld != 0 ? t.ld : 3 * t.d), angles = POSITIONS * t.d / 2;
            t.x = randoms(size, 1, 2);
            t.dy = randoms(size, 2, 1);
            t.w = normed ? randoms(t.d, 3, 1) : NULL;
            t.cos = randoms(angles, 4, 1);
            t.sin = randoms(angles, 5, 1);
            for (int64_t j = 0; j < angles; j++) {
                t.sin[j] = sinf(t.cos[j] * 3);
                t.cos[j] = cosf(t.cos[j] * 3);
            }
            hold(all, "headnorm_rope_fwd", run_heads_fwd, &t, 2, (const int64_t[]){size, N * 3}, 1e-6);
            hold(all, "headnorm_rope_bwd", run_heads_bwd, &t, 3, (const int64_t[]){size, t.d, size / N}, 1e-6);
            float *y = randoms(size, 6, 1);
            t.rstd = randoms(N * 3, 7, 1);
            assert_ok(run_heads_fwd(&all->ref, &t, (float *[]){y, t.rstd}, &err));
            hold(all, "headnorm_rope_bwd, saved rstd", run_heads_bwd, &t, 3, (const int64_t[]){size, t.d, size / N}, 1e-6);
            free(t.x), free(t.dy), free(t.w), free(t.cos), free(t.sin), free(t.rstd), free(y);
        }
}

static enum rt_status run_heads_in_place(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    memcpy(out[0], t->x, (size_t)(t->n * t->heads * t->d) * sizeof(float));
    memcpy(out[1], t->dy, (size_t)(t->n * t->heads * t->d) * sizeof(float));
    const enum rt_status fwd = RT_OP(d, headnorm_rope_fwd, err, .x = out[0], .y = out[0], .cos = t->cos, .sin = t->sin,
                              .position = t->position, .n = t->n, .heads = t->heads, .d = t->d);
    if (fwd != RT_OK)
        return fwd;
    WITH_WEIGHT(d, t->w, 1, t->d,
                RT_OP(d, headnorm_rope_bwd, err, .dy = out[1], .x = t->x, .w = w, .dx = out[1], .dw = out[2], .cos = t->cos,
                      .sin = t->sin, .position = t->position, .n = t->n, .heads = t->heads, .d = t->d, .eps = 1e-6f));
}

/* forward without a norm in place, backward with dx in dy */
static void heads_in_place(void **state)
{
    enum { N = 40, D = 24 };
    int32_t position[N];
    struct rows t = {.position = position, .n = N, .heads = 2, .d = D};
    for (int i = 0; i < N; i++)
        position[i] = i;
    t.x = randoms(N * 2 * D, 1, 1), t.dy = randoms(N * 2 * D, 2, 1), t.w = randoms(D, 3, 1);
    t.cos = randoms(N * D / 2, 4, 1), t.sin = randoms(N * D / 2, 5, 1);
    hold(*state, "headnorm_rope in place", run_heads_in_place, &t, 3, (const int64_t[]){N * 2 * D, N * 2 * D, D}, 1e-6);
    free(t.x), free(t.dy), free(t.w), free(t.cos), free(t.sin);
}

static enum rt_status run_norm_bwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    WITH_WEIGHT(d, t->w, 1, t->cols,
                RT_OP(d, norm_bwd, err, .dy = t->dy, .x = t->x, .w = w, .rstd = t->rstd, .dx = out[0], .dw = t->w != NULL ? out[1] : NULL,
                      .y = t->rstd != NULL ? out[2] : NULL, .n = t->n, .cols = t->cols, .eps = 1e-6f, .accumulate = t->accumulate));
}

static void norm_backward(void **state)
{
    static const int64_t shape[][2] = {{1, 5}, {2, 17}, {130, 64}, {33, 130}, {2100, 24}};
    for (int i = 0; i < COUNT(shape); i++)
        for (int variant = 0; variant < 8; variant++) {
            struct rows t = {.n = shape[i][0], .cols = shape[i][1], .accumulate = variant & 1};
            t.x = randoms(t.n * t.cols, 1, 2);
            t.dy = randoms(t.n * t.cols, 2, 1);
            t.w = variant & 2 ? randoms(t.cols, 3, 1) : NULL;
            t.rstd = variant & 4 ? randoms(t.n, 4, 1) : NULL;
            hold(*state, "norm_bwd", run_norm_bwd, &t, 3, (const int64_t[]){t.n * t.cols, t.cols, t.n * t.cols}, 2e-6);
            free(t.x), free(t.dy), free(t.w), free(t.rstd);
        }
}

static enum rt_status run_swiglu_bwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    return RT_OP(d, swiglu_bwd, err, .gate = t->x, .up = t->x + t->cols, .dh = t->dy, .ld = t->ld, .dgate = out[0],
                 .dup = out[0] + t->cols, .h = t->accumulate ? out[1] : NULL, .n = t->n, .I = t->cols);
}

static void swiglu_backward(void **state)
{
    static const int64_t shape[][2] = {{1, 1}, {2, 17}, {130, 96}};
    for (int i = 0; i < COUNT(shape); i++)
        for (int with_h = 0; with_h < 2; with_h++) {
            struct rows t = {.n = shape[i][0], .cols = shape[i][1], .ld = 2 * shape[i][1] + 3, .accumulate = with_h};
            t.x = randoms(t.n * t.ld, 1, 6); /* gates to +-20: both ends of the sigmoid */
            t.dy = randoms(t.n * t.cols, 2, 1);
            hold(*state, "swiglu_bwd", run_swiglu_bwd, &t, 2, (const int64_t[]){t.n * t.ld, t.n * t.cols}, 1e-6);
            free(t.x), free(t.dy);
        }
}

/* cols: I; heads: what x or dy has. */
static enum rt_status run_gated_fwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    struct rt_weight *bias = t->rstd != NULL ? ops_param(d, t->rstd, 1, 2 * t->cols) : NULL;
    struct rt_weight *w = ops_param(d, t->w, 2 * t->cols, t->heads);
    const enum rt_status st = RT_OP(d, gated_fwd, err, .x = t->x, .w = w, .bias = bias, .gate_up = out[0], .h = out[1], .n = t->n, .K = t->heads, .I = t->cols,
                                    .kept = true);
    d->be->weight_free(d->dev, w);
    d->be->weight_free(d->dev, bias);
    return st;
}
static enum rt_status run_gated_bwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    const int64_t n = t->n * t->cols;
    float *dh = randoms(n, 9, 1), *both = malloc((size_t)(2 * n) * sizeof *both);
    struct rt_weight *w = ops_param(d, t->w, t->heads, t->cols);
    enum rt_status st = RT_OP(d, gated_bwd, err, .dy = t->dy, .w = w, .gate_up = t->x, .dh = dh, .d_gate_up = out[0],
                              .h = t->accumulate ? out[1] : NULL, .n = t->n, .N = t->heads, .I = t->cols);
    memcpy(both, t->x, (size_t)(2 * n) * sizeof *both); /* the same in place */
    if (st == RT_OK)
        st = RT_OP(d, gated_bwd, err, .dy = t->dy, .w = w, .gate_up = both, .dh = dh, .d_gate_up = both, .h = t->accumulate ? dh : NULL, .n = t->n,
                   .N = t->heads, .I = t->cols);
    assert_memory_equal(both, out[0], (size_t)(2 * n) * sizeof *both);
    if (t->accumulate)
        assert_memory_equal(dh, out[1], (size_t)n * sizeof *dh);
    d->be->weight_free(d->dev, w);
    free(dh);
    free(both);
    return st;
}

static void gated(void **state)
{
    static const int64_t shape[][3] = {{1, 1, 1}, {2, 17, 5}, {130, 96, 40}}; /* n, I, K */
    for (int i = 0; i < COUNT(shape); i++)
        for (int variant = 0; variant < 2; variant++) {
            const int64_t n = shape[i][0], I = shape[i][1], K = shape[i][2];
            struct rows t = {.n = n, .cols = I, .heads = (int)K, .accumulate = variant};
            t.x = randoms(n * (K > 2 * I ? K : 2 * I), 1, 1);
            t.dy = randoms(n * K, 2, 1);
            t.w = randoms(2 * I * K, 3, 1);
            t.rstd = variant ? randoms(2 * I, 4, 1) : NULL; /* the bias */
            hold(*state, "gated_fwd", run_gated_fwd, &t, 2, (const int64_t[]){n * 2 * I, n * I}, 2e-6);
            hold(*state, "gated_bwd", run_gated_bwd, &t, 2, (const int64_t[]){n * 2 * I, n * I}, 2e-6);
            free(t.x), free(t.dy), free(t.w), free(t.rstd);
        }
}

static enum rt_status run_embed_bwd(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    const struct rows *t = ctx;
    return RT_OP(d, embed_bwd, err, .ids = t->position, .dy = t->dy, .dtable = out[0], .n = t->n, .cols = t->cols, .rows = 50);
}

static void embedding_backward(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    int32_t ids[300];
    struct rows t = {.position = ids, .n = 300, .cols = 37};
    float *table = randoms(50 * 37, 2, 1);
    for (int i = 0; i < 300; i++)
        ids[i] = (int32_t)(rt_rng_u64(3, 1, (uint64_t)i) % (i % 3 == 0 ? 3 : 50));
    t.dy = randoms(300 * 37, 1, 1);
    /* The contract fixes the order of additions: the same bytes as the reference. */
    hold(all, "embed_bwd", run_embed_bwd, &t, 1, &(int64_t){50 * 37}, 0);
    ids[7] = 50;
    assert_status(run_embed_bwd(&all->cpu[0], &t, &table, &err), SHAPE);
    ids[7] = -1;
    assert_status(run_embed_bwd(&all->cpu[0], &t, &table, &err), SHAPE);
    free(t.dy), free(table);
}

/* ---- optimiser ---- */
struct adam {
    float *grad;
    int64_t n;
};

/* Three steps, so that the moments of one are the input of the next. */
static enum rt_status run_adamw(struct rt_device *d, const void *ctx, float **out, struct rt_err *err)
{
    static const int64_t ends[] = {5, 16384, 20001}; /* some runs without decay in one of the steps */
    const struct adam *t = ctx;
    memset(out[1], 0, (size_t)t->n * sizeof(float));
    memset(out[2], 0, (size_t)t->n * sizeof(float));
    for (int64_t step = 1; step <= 3; step++) {
        const enum rt_status st = RT_OP(d, adamw, err, .p = out[0], .grad = t->grad + step * 11, .m = out[1], .v = out[2], .n = t->n,
                                        .step = step, .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1,
                                        .grad_scale = 0.25, .decay_end = step == 2 ? ends : NULL, .n_decay = step == 2 ? 3 : 0);
        if (st != RT_OK)
            return st;
    }
    return RT_OK;
}

static void adamw_steps(void **state)
{
    static const int64_t sizes[] = {1, 17, 40000};
    for (int i = 0; i < COUNT(sizes); i++) {
        struct adam t = {.n = sizes[i]};
        t.grad = randoms(t.n + 40, 1, 1e-2);
        hold(*state, "adamw", run_adamw, &t, 3, (const int64_t[]){t.n, t.n, t.n}, 1e-6);
        free(t.grad);
    }
}

/* Moments that decay without gradient end at zero and not in the subnormal numbers, where each step is slow. */
static void adamw_moments_end_at_zero(void **state)
{
    struct devices *all = *state;
    struct rt_err err = {0};
    float p[20], grad[20] = {0}, m[20], v[20];
    for (int i = 0; i < 20; i++)
        p[i] = 1, m[i] = i % 2 ? 1.2e-38f : -1.2e-38f, v[i] = 1.2e-38f;
    assert_ok(RT_OP(&all->cpu[0], adamw, &err, .p = p, .grad = grad, .m = m, .v = v, .n = 20, .step = 9, .lr = 1e-3, .beta1 = 0.9,
                    .beta2 = 0.95, .eps = 1e-8, .grad_scale = 1));
    for (int i = 0; i < 20; i++)
        assert_true(p[i] == 1 && m[i] == 0 && v[i] == 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup_teardown(attention_packed, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(attention_long, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(attention_parts, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(attention_large_scores, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(attention_refuses, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(attention_cached, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(heads_norm_rope, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(heads_in_place, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(norm_backward, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(swiglu_backward, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(gated, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(embedding_backward, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(adamw_steps, cpu_open_all, cpu_close_all),
    cmocka_unit_test_setup_teardown(adamw_moments_end_at_zero, cpu_open_all, cpu_close_all),
};
RT_SUITE(ops_cpu_bwd, tests)
