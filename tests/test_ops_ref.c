/* The forward operations of the reference backend: cases worked by hand, definitions written out, and identities. */
#include "core/rms.h"
#include "tests/ops.h"

/* ---- embedding, norm, quantisation ---- */
static void embedding_reads_every_type(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    const float values[4] = {1, -2, 0.5f, 448};
    const int32_t ids[3] = {1, 0, 1};
    const float one[1] = {1};
    static const enum rt_dtype types[] = {RT_F32, RT_F16, RT_BF16, RT_E4M3};
    for (int i = 0; i < COUNT(types); i++) {
        uint8_t raw[16];
        float out[6];
        assert_true(rt_from_f32(raw, types[i], values, 4));
        struct rt_weight *w = ops_load(&d, types[i], raw, types[i] == RT_E4M3 ? one : NULL, 2, 2);
        assert_ok(RT_OP(&d, embed_fwd, &err, .ids = ids, .table = w, .out = out, .n = 3, .cols = 2));
        const float expected[6] = {0.5f, 448, 1, -2, 0.5f, 448};
        assert_memory_equal(out, expected, sizeof out);
        d.be->weight_free(d.dev, w);
    }
    rt_device_close(&d);
}

static void norm_by_hand(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    /* rows (1,3) and (0,2) plus (2,1) and (0,-2): sums (3,4) and (0,0); mean square 12.5 */
    float x[6] = {1, 3, 99, 0, 2, 99}, dense[4] = {1, 3, 0, 2}, add[4] = {2, 1, 0, -2}, w[2] = {2, -1}, sum[4], y[6], rstd[2];
    struct rt_weight *p = ops_param(&d, w, 1, 2);
    assert_ok(RT_OP(&d, norm_fwd, &err, .x = x, .ldx = 3, .add = add, .w = p, .sum = sum, .y = y, .ldy = 3, .rstd = rstd, .n = 2,
                    .cols = 2, .eps = 1e-6f));
    assert_true(sum[0] == 3 && sum[1] == 4 && sum[2] == 0 && sum[3] == 0);
    assert_near(rstd[0], 1 / sqrt(12.5), 1e-7);
    assert_near(rstd[1], 1000, 1e-3); /* 1/sqrt(eps) */
    assert_near(y[0], 6 / sqrt(12.5), 1e-6);
    assert_near(y[1], -4 / sqrt(12.5), 1e-6);
    assert_true(y[3] == 0 && y[4] == 0);
    /* the sum in place of x */
    assert_ok(RT_OP(&d, norm_fwd, &err, .x = dense, .add = add, .sum = dense, .y = y, .n = 2, .cols = 2, .eps = 0));
    assert_true(dense[0] == 3 && dense[1] == 4);
    assert_near(y[0], 3 / sqrt(12.5), 1e-6);
    d.be->weight_free(d.dev, p);
    struct rt_weight *wrong = ops_param(&d, w, 2, 1);
    assert_status(RT_OP(&d, norm_fwd, &err, .x = x, .w = wrong, .y = y, .n = 1, .cols = 3), SHAPE);
    d.be->weight_free(d.dev, wrong);
    rt_device_close(&d);
}

/* One 4096 (its square is 2^24, where float32 counts by twos) and ones: each order of summing loses other ones. */
static void the_rounding_of_the_norm(void **state)
{
    (void)state;
    /* 100: running sums 2^24 and 7 of 12, 84 in all, and 4 lost. 128: 7 of 16. 200: 96 + 104, 84 and 104. 256: 112 and 128. 300: 144 + 156,
     * the first of which is 72 + 72: 62 (9 rounds to 8) + 72. 7: in order, all lost. */
    static const struct { int n; float sum; } cases[] = {{7, 0}, {100, 84}, {128, 112}, {200, 188}, {256, 240}, {300, 290}};
    float x[300] = {4096};
    for (int i = 1; i < 300; i++)
        x[i] = 1;
    for (int i = 0; i < COUNT(cases); i++)
        assert_true(rt_rms_f32(x, cases[i].n, 0.25f) == sqrtf((16777216 + cases[i].sum) / (float)cases[i].n + 0.25f));

    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    enum { N = 8, COLS = 256 };
    float s[N * COLS], w[COLS], y[N * COLS];
    int differ = 0;
    ops_fill32(s, COUNT(s), 1);
    ops_fill32(w, COUNT(w), 2);
    struct rt_weight *p = ops_param(&d, w, 1, COLS);
    assert_ok(RT_OP(&d, norm_fwd, &err, .x = s, .w = p, .y = y, .n = N, .cols = COLS, .eps = 1e-6f));
    for (int i = 0; i < COUNT(y); i++) {
        const float rms = rt_rms_f32(s + i / COLS * COLS, COLS, 1e-6f), unit = s[i] / rms;
        assert_true(y[i] == unit * w[i % COLS]);
        differ += y[i] != s[i] * (1 / rms) * w[i % COLS];
    }
    assert_true(differ > 0); /* the other way to write it is not the same */
    d.be->weight_free(d.dev, p);
    rt_device_close(&d);
}

static void quantisation_of_blocks(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    enum { N = 2, COLS = 256 };
    float x[N * COLS] = {0}, scale[2 * N];
    uint8_t code[N * COLS];
    x[0] = -448;  /* row 0, block 0: scale 1, values round as e4m3 */
    x[1] = 17;    /* between 16 and 18: to the even code 16 */
    x[2] = 19;    /* between 18 and 20: to the even code 20 */
    x[128] = 7;   /* row 0, block 1: scale 7/448 = 1/64 */
    x[129] = 3.5;
    x[COLS] = 1e-13f; /* row 1, block 0: below the floor of amax */
    assert_ok(RT_OP(&d, quant, &err, .x = x, .q = {code, scale}, .n = N, .cols = COLS));
    assert_true(scale[0] == 1 && scale[2] == 1 / 64.0f);
    assert_true(scale[1] == 1e-12f / 448 && scale[3] == 1e-12f / 448);
    assert_true(rt_e4m3_to_f32(code[0]) == -448 && rt_e4m3_to_f32(code[1]) == 16 && rt_e4m3_to_f32(code[2]) == 20);
    assert_true(rt_e4m3_to_f32(code[128]) == 448 && rt_e4m3_to_f32(code[129]) == 224 && code[130] == 0);
    assert_near(rt_e4m3_to_f32(code[COLS]), 44, 0); /* 1e-13 * 448e12 = 44.8, between 44 and 48 */

    /* powers of two, not below the exact scale: 1 stays, 1.25/448 becomes 1/256 (448/256 = 1.75), the floor 2^-48 */
    x[128] = 1.25f;
    assert_ok(RT_OP(&d, quant, &err, .x = x, .q = {code, scale}, .n = N, .cols = COLS, .pow2 = true));
    assert_true(scale[0] == 1 && scale[2] == 1 / 128.0f && scale[1] == 0x1p-48f && scale[3] == 0x1p-48f);
    assert_true(rt_e4m3_to_f32(code[0]) == -448 && rt_e4m3_to_f32(code[128]) == 160 && rt_e4m3_to_f32(code[129]) == 448);
    /* norm and swiglu give the e4m3 form of what they give in act elements */
    float y[N * COLS], gate[N * COLS], s1[2 * N], s2[2 * N];
    uint8_t c1[N * COLS], c2[N * COLS];
    ops_fill32(x, COUNT(x), 1);
    ops_fill32(gate, COUNT(gate), 2);
    assert_ok(RT_OP(&d, norm_fwd, &err, .x = x, .y = y, .yq = {c1, s1}, .n = N, .cols = COLS, .eps = 1e-6f));
    assert_ok(RT_OP(&d, quant, &err, .x = y, .q = {c2, s2}, .n = N, .cols = COLS));
    assert_memory_equal(c1, c2, sizeof c1);
    assert_memory_equal(s1, s2, sizeof s1);
    assert_ok(RT_OP(&d, swiglu_fwd, &err, .gate = gate, .up = x, .h = y, .hq = {c1, s1}, .n = N, .I = COLS));
    assert_ok(RT_OP(&d, quant, &err, .x = y, .q = {c2, s2}, .n = N, .cols = COLS));
    assert_memory_equal(c1, c2, sizeof c1);
    assert_memory_equal(s1, s2, sizeof s1);
    assert_status(RT_OP(&d, quant, &err, .x = x, .q = {code, scale}, .n = 1, .cols = 100), SHAPE);
    rt_device_close(&d);
}

/* ---- products ---- */
static void linear_by_hand(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    float x[8] = {1, 2, 3, 99, 4, 5, 6, 99}, w[6] = {1, 0, -1, 2, 1, 0}, b[2] = {10, 20}, y[6] = {0};
    struct rt_weight *p = ops_param(&d, w, 2, 3), *pb = ops_param(&d, b, 1, 2);
    assert_ok(RT_OP(&d, linear_fwd, &err, .x = {x, NULL}, .ldx = 4, .w = p, .bias = pb, .y = y, .ldy = 3, .n = 2, .K = 3, .N = 2));
    assert_true(y[0] == 8 && y[1] == 24 && y[2] == 0 && y[3] == 8 && y[4] == 33);
    assert_ok(RT_OP(&d, linear_fwd, &err, .x = {x, NULL}, .ldx = 4, .w = p, .y = y, .ldy = 3, .n = 2, .K = 3, .N = 2, .accumulate = true));
    assert_true(y[0] == 6 && y[1] == 28 && y[3] == 6 && y[4] == 46);
    const float add[4] = {100, 200, 300, 400};
    assert_ok(RT_OP(&d, linear_fwd, &err, .x = {x, NULL}, .ldx = 4, .w = p, .bias = pb, .add = add, .y = y, .n = 2, .K = 3, .N = 2));
    assert_true(y[0] == 108 && y[1] == 224 && y[2] == 308 && y[3] == 433);
    assert_status(RT_OP(&d, linear_fwd, &err, .x = {x, NULL}, .w = p, .y = y, .n = 1, .K = 2, .N = 3), SHAPE);
    d.be->weight_free(d.dev, p);
    d.be->weight_free(d.dev, pb);
    rt_device_close(&d);

    struct rt_device e = ops_open(&rt_backend_ref64);
    double x64[3] = {1, 2, 3}, w64[6] = {1, 0, -1, 2, 1, 0};
    float y32[2] = {1, 1};
    p = ops_param(&e, w64, 2, 3);
    assert_ok(RT_OP(&e, linear_fwd, &err, .x = {x64, NULL}, .w = p, .y = y32, .n = 1, .K = 3, .N = 2, .y_f32 = true, .accumulate = true));
    assert_true(y32[0] == -1 && y32[1] == 5);
    e.be->weight_free(e.dev, p);
    rt_device_close(&e);
}

/* 130 rows: the second block of rows has 2. Scales differ by block, so that a wrong one shows. */
static void e4m3_product_with_a_ragged_block(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    enum { N = 3, K = 256, OUT = 130, RAGGED = 200 };
    static float x[N * K], w[OUT * K], y[N * OUT], expected[N * OUT];
    static uint8_t codes[OUT * K], xq[N * K];
    float xs[2 * N];
    const float ws[4] = {0.5f, 3, 0.01f, 70};
    ops_fill32(x, COUNT(x), 1);
    ops_fill32(w, COUNT(w), 2);
    assert_true(rt_from_f32(codes, RT_E4M3, w, OUT * K));
    struct rt_weight *p = ops_load(&d, RT_E4M3, codes, ws, OUT, K);

    assert_ok(RT_OP(&d, linear_fwd, &err, .x = {x, NULL}, .w = p, .y = y, .n = N, .K = K, .N = OUT));
    for (int t = 0; t < N; t++)
        for (int o = 0; o < OUT; o++) {
            double sum = 0;
            for (int j = 0; j < K; j++)
                sum += (double)x[t * K + j] * rt_e4m3_to_f32(codes[o * K + j]) * ws[o / 128 * 2 + j / 128];
            expected[t * OUT + o] = (float)sum;
        }
    assert_true(test_rel_error(y, expected, COUNT(y)) < 1e-6); /* float32 rounding of code * scale and of the store */

    assert_ok(RT_OP(&d, quant, &err, .x = x, .q = {xq, xs}, .n = N, .cols = K));
    assert_ok(RT_OP(&d, linear_fwd, &err, .x = {xq, xs}, .w = p, .y = y, .n = N, .K = K, .N = OUT));
    for (int t = 0; t < N; t++)
        for (int o = 0; o < OUT; o++) {
            double sum = 0;
            for (int j = 0; j < K; j++)
                sum += (double)rt_e4m3_to_f32(xq[t * K + j]) * xs[j / 128 * N + t] * rt_e4m3_to_f32(codes[o * K + j]) *
                       ws[o / 128 * 2 + j / 128];
            expected[t * OUT + o] = (float)sum;
        }
    assert_true(test_rel_error(y, expected, COUNT(y)) < 1e-6);
    d.be->weight_free(d.dev, p);

    /* a ragged last block of columns, act elements */
    p = ops_load(&d, RT_E4M3, codes, ws, OUT, RAGGED);
    assert_ok(RT_OP(&d, linear_fwd, &err, .x = {x, NULL}, .ldx = K, .w = p, .y = y, .n = N, .K = RAGGED, .N = OUT));
    for (int t = 0; t < N; t++)
        for (int o = 0; o < OUT; o++) {
            double sum = 0;
            for (int j = 0; j < RAGGED; j++)
                sum += (double)x[t * K + j] * rt_e4m3_to_f32(codes[o * RAGGED + j]) * ws[o / 128 * 2 + j / 128];
            expected[t * OUT + o] = (float)sum;
        }
    assert_true(test_rel_error(y, expected, COUNT(y)) < 1e-6);
    assert_status(RT_OP(&d, linear_fwd, &err, .x = {xq, xs}, .w = p, .y = y, .n = N, .K = RAGGED, .N = OUT), SHAPE);
    d.be->weight_free(d.dev, p);
    p = ops_load(&d, RT_F32, w, NULL, OUT, K);
    assert_status(RT_OP(&d, linear_fwd, &err, .x = {xq, xs}, .w = p, .y = y, .n = N, .K = K, .N = OUT), UNSUPPORTED);
    d.be->weight_free(d.dev, p);
    rt_device_close(&d);
}

/* ---- rotary positions, gating ---- */
static void rope_by_hand(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    /* position 1: the first pair turns by a quarter, the second by a half */
    const float cs[4] = {1, 1, 0, -1}, sn[4] = {0, 0, 1, 0};
    const int32_t position[2] = {0, 1};
    const float start[2][10] = {{1, 2, 3, 4, 9, 5, 6, 7, 8, 9}, {1, 2, 3, 4, 9, 5, 6, 7, 8, 9}};
    float x[2][10];
    memcpy(x, start, sizeof x);
    assert_ok(RT_OP(&d, rope, &err, .x = x, .ld = 10, .head_ld = 5, .cos = cs, .sin = sn, .position = position, .n = 2, .heads = 2,
                    .dim = 4, .interleaved = true));
    const float pairs[10] = {-2, 1, -3, -4, 9, -6, 5, -7, -8, 9};
    assert_memory_equal(x[0], start[0], sizeof x[0]);
    assert_memory_equal(x[1], pairs, sizeof x[1]);
    assert_ok(RT_OP(&d, rope, &err, .x = x, .ld = 10, .head_ld = 5, .cos = cs, .sin = sn, .position = position, .n = 2, .heads = 2,
                    .dim = 4, .interleaved = true, .inverse = true));
    assert_memory_equal(x, start, sizeof x);
    assert_ok(RT_OP(&d, rope, &err, .x = x, .ld = 10, .head_ld = 5, .cos = cs, .sin = sn, .position = position, .n = 2, .heads = 2,
                    .dim = 4));
    const float halves[10] = {-3, -2, 1, -4, 9, -7, -6, 5, -8, 9};
    assert_memory_equal(x[1], halves, sizeof x[1]);
    rt_device_close(&d);
}

/* headnorm_rope is norm of each head, then rope; without a weight it turns in place. */
static void headnorm_rope_is_norm_then_rope(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    enum { N = 3, HEADS = 2, D = 4 };
    double x[N * HEADS * D], w[D], y[N * HEADS * D], expected[N * HEADS * D];
    float cs[2 * 8], sn[2 * 8], rstd[N * HEADS], rstd_each[N * HEADS];
    const int32_t position[N] = {0, 5, 7};
    for (int i = 0; i < COUNT(cs); i++) {
        cs[i] = cosf((float)i);
        sn[i] = sinf((float)i);
    }
    ops_fill(x, COUNT(x), 1);
    ops_fill(w, COUNT(w), 2);
    struct rt_weight *p = ops_param(&d, w, 1, D);
    assert_ok(RT_OP(&d, headnorm_rope_fwd, &err, .x = x, .w = p, .y = y, .rstd = rstd, .cos = cs, .sin = sn, .position = position,
                    .n = N, .heads = HEADS, .d = D, .eps = 1e-3f));
    assert_ok(RT_OP(&d, norm_fwd, &err, .x = x, .w = p, .y = expected, .rstd = rstd_each, .n = N * HEADS, .cols = D, .eps = 1e-3f));
    assert_ok(RT_OP(&d, rope, &err, .x = expected, .cos = cs, .sin = sn, .position = position, .n = N, .heads = HEADS, .dim = D));
    assert_close(y, expected, COUNT(y), 1e-15);
    assert_memory_equal(rstd, rstd_each, sizeof rstd);
    memcpy(expected, x, sizeof x);
    assert_ok(RT_OP(&d, rope, &err, .x = expected, .cos = cs, .sin = sn, .position = position, .n = N, .heads = HEADS, .dim = D));
    assert_ok(RT_OP(&d, headnorm_rope_fwd, &err, .x = x, .y = x, .cos = cs, .sin = sn, .position = position, .n = N, .heads = HEADS,
                    .d = D));
    assert_close(x, expected, COUNT(x), 0);
    d.be->weight_free(d.dev, p);
    rt_device_close(&d);
}

static void swiglu_by_hand(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    const float gu[8] = {0, 1, 5, 3, -1000, 1000, 2, 2};
    float h[4];
    assert_ok(RT_OP(&d, swiglu_fwd, &err, .gate = gu, .up = gu + 2, .ld = 4, .h = h, .n = 2, .I = 2));
    assert_near(h[0], 0, 0);
    assert_near(h[1], 3 / (1 + exp(-1)), 1e-6);
    assert_near(h[2], 0, 0); /* the exponential overflows, the quotient does not */
    assert_near(h[3], 2000, 0);
    rt_device_close(&d);
}

/* ---- attention ---- */
enum { NH = 4, NKV = 2, DQK = 3, DV = 2, TOK = 7 };
static const int32_t cu[] = {0, 1, 4, 4, TOK};

/* o[i,h,d] and lse, element by element from the definition, without subtracting a maximum. */
static double attn_element(const double *q, const double *k, const double *v, int i, int h, int dim, double *lse)
{
    int first = 0;
    for (int s = 0; s + 1 < COUNT(cu); s++)
        if (cu[s] <= i)
            first = cu[s];
    double num = 0, den = 0;
    for (int j = first; j <= i; j++) {
        double score = 0;
        for (int e = 0; e < DQK; e++)
            score += q[(i * NH + h) * DQK + e] * k[(j * NKV + h / 2) * DQK + e];
        num += exp(0.7f * score) * v[(j * NKV + h / 2) * DV + dim];
        den += exp(0.7f * score);
    }
    *lse = log(den);
    return num / den;
}

static void attention_against_its_formula(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    double q[TOK * NH * DQK], k[TOK * NKV * DQK], v[TOK * NKV * DV], o[TOK * NH * DV];
    float lse[NH * TOK];
    ops_fill(q, COUNT(q), 1);
    ops_fill(k, COUNT(k), 2);
    ops_fill(v, COUNT(v), 3);
    const struct rt_attn_shape s = {cu, TOK, COUNT(cu) - 1, NH, NKV, DQK, DV, 0.7f};
    assert_ok(RT_OP(&d, attn_fwd, &err, .s = s, .q = q, .k = k, .v = v, .o = o, .lse = lse));
    for (int i = 0; i < TOK; i++)
        for (int h = 0; h < NH; h++) {
            double expected_lse = 0;
            for (int e = 0; e < DV; e++)
                assert_near(o[(i * NH + h) * DV + e], attn_element(q, k, v, i, h, e, &expected_lse), 1e-14);
            assert_near(lse[h * TOK + i], expected_lse, 1e-6); /* float */
        }
    /* one key: its value */
    assert_close(o, ((double[]){v[0], v[1], v[0], v[1], v[2], v[3], v[2], v[3]}), NH * DV, 1e-15);
    int32_t gap[] = {0, 3, TOK - 1};
    struct rt_attn_shape bad = s;
    bad.cu_seqlens = gap;
    bad.n_seq = 2;
    assert_status(RT_OP(&d, attn_fwd, &err, .s = bad, .q = q, .k = k, .v = v, .o = o), SHAPE);
    rt_device_close(&d);
}

/* A token at a time over the caches gives what the packed sequences give; so does a slot that was copied half way. */
static void cached_attention_is_packed_attention(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    enum { DIM = 3, CAP = 5, SLOTS = 3, W = NKV * DIM };
    double q[TOK * NH * DIM], kv[TOK * 2 * W], packed[TOK * NH * DIM], o[TOK * NH * DIM];
    double k_cache[SLOTS * CAP * W] = {0}, v_cache[SLOTS * CAP * W] = {0};
    ops_fill(q, COUNT(q), 1);
    ops_fill(kv, COUNT(kv), 2);
    const int32_t seq[] = {0, 4, TOK};
    const struct rt_attn_shape s = {seq, TOK, 2, NH, NKV, DIM, DIM, 0.4f};
    assert_ok(RT_OP(&d, attn_fwd, &err, .s = s, .q = q, .k = kv, .v = kv + W, .k_ld = 2 * W, .v_ld = 2 * W, .o = packed));

    /* slots 2 and 0, tokens of both interleaved; after two steps slot 2 moves to slot 1 */
    static const int order[TOK] = {0, 4, 1, 5, 2, 6, 3};
    for (int i = 0; i < TOK; i++) {
        const int t = order[i];
        const int32_t pos = t < 4 ? t : t - 4, slot = t >= 4 ? 0 : pos < 2 ? 2 : 1;
        if (t == 2) {
            assert_ok(RT_OP(&d, cache_copy, &err, .cache = k_cache, .capacity = CAP, .width = W, .n = 2, .src = 2, .dst = 1));
            assert_ok(RT_OP(&d, cache_copy, &err, .cache = v_cache, .capacity = CAP, .width = W, .n = 2, .src = 2, .dst = 1));
        }
        assert_ok(RT_OP(&d, cache_put, &err, .x = kv + t * 2 * W, .ldx = 2 * W, .cache = k_cache, .slot = &slot, .pos = &pos, .n = 1,
                        .capacity = CAP, .width = W));
        assert_ok(RT_OP(&d, cache_put, &err, .x = kv + t * 2 * W + W, .ldx = 2 * W, .cache = v_cache, .slot = &slot, .pos = &pos, .n = 1,
                        .capacity = CAP, .width = W));
        assert_ok(RT_OP(&d, attn_cached, &err, .q = q + t * NH * DIM, .k_cache = k_cache, .v_cache = v_cache, .slot = &slot, .pos = &pos,
                        .o = o + t * NH * DIM, .n = 1, .capacity = CAP, .nh = NH, .nkv = NKV, .d = DIM, .scale = 0.4f));
    }
    assert_close(o, packed, COUNT(o), 0); /* the same sums in the same order */
    const int32_t slot = 0, beyond = CAP;
    assert_status(RT_OP(&d, cache_put, &err, .x = kv, .cache = k_cache, .slot = &slot, .pos = &beyond, .n = 1, .capacity = CAP, .width = W),
                  SHAPE);
    rt_device_close(&d);
}

/* Absorbed MLA: q' = q W_k, attention over latents, o = o' W_v^T equals attention with expanded keys and values. */
static void absorbed_mla_is_expanded_mla(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    enum { HEADS = 2, DN = 3, DR = 2, VD = 4, R = 5, T = 4, ROWS = DN + VD, QD = DN + DR };
    double row[T * (R + DR)], kv_b[HEADS * ROWS * R], q[T * HEADS * QD]; /* row: [latent | k_pe] */
    double kv[T * HEADS * ROWS], k[T * HEADS * QD], whole[T * HEADS * VD], expected[T * HEADS * VD];
    ops_fill(row, COUNT(row), 1);
    ops_fill(kv_b, COUNT(kv_b), 2);
    ops_fill(q, COUNT(q), 3);
    struct rt_weight *w = ops_param(&d, kv_b, HEADS * ROWS, R);
    const int32_t seq[] = {0, T};
    const struct rt_attn_shape s = {seq, T, 1, HEADS, HEADS, QD, VD, 0.3f};
    assert_ok(RT_OP(&d, linear_fwd, &err, .x = {row, NULL}, .ldx = R + DR, .w = w, .y = kv, .n = T, .K = R, .N = HEADS * ROWS));
    assert_ok(RT_OP(&d, attn_fwd, &err, .s = s, .q = q, .k = kv, .k_ld = HEADS * ROWS, .k_head = ROWS, .k_pe = row + R, .k_pe_ld = R + DR, .dr = DR,
                    .v = kv + DN, .v_ld = HEADS * ROWS, .v_head = ROWS, .o = expected));
    for (int i = 0; i < T * HEADS; i++) { /* the same keys in one part */
        memcpy(k + i * QD, kv + i * ROWS, DN * sizeof *k);
        memcpy(k + i * QD + DN, row + i / HEADS * (R + DR) + R, DR * sizeof *k);
    }
    assert_ok(RT_OP(&d, attn_fwd, &err, .s = s, .q = q, .k = k, .v = kv + DN, .v_ld = HEADS * ROWS, .v_head = ROWS, .o = whole));
    assert_close(expected, whole, COUNT(whole), 1e-14); /* reordered float64 sums */
    const float cos[T] = {1, 0.5f, -0.25f, 0}, sin[T] = {0, 0.75f, 1, -1}; /* DR / 2 a position */
    const int32_t at[T] = {0, 3, 1, 2};
    double turned[T * HEADS * QD], given[T * HEADS * QD];
    memcpy(turned, q, sizeof q), memcpy(given, q, sizeof q);
    assert_ok(RT_OP(&d, rope, &err, .x = turned + DN, .ld = HEADS * QD, .head_ld = QD, .cos = cos, .sin = sin, .position = at, .n = T, .heads = HEADS,
                    .dim = DR, .interleaved = true));
    assert_ok(RT_OP(&d, attn_fwd, &err, .s = s, .q = turned, .k = k, .v = kv + DN, .v_ld = HEADS * ROWS, .v_head = ROWS, .o = whole));
    double rotated[T * HEADS * VD];
    assert_ok(RT_OP(&d, attn_fwd, &err, .s = s, .q = given, .k = k, .dr = DR, .cos = cos, .sin = sin, .position = at, .v = kv + DN,
                    .v_ld = HEADS * ROWS, .v_head = ROWS, .o = rotated));
    assert_memory_equal(rotated, whole, sizeof rotated);
    assert_status(RT_OP(&d, attn_fwd, &err, .s = s, .q = q, .k = k, .k_pe = row, .dr = QD, .v = kv, .o = whole), SHAPE);

    double q_lat[T * HEADS * R], o_lat[T * HEADS * R], o[T * HEADS * VD], cache[2 * T * (R + DR)];
    const int32_t slot[T] = {1, 1, 1, 1}, pos[T] = {0, 1, 2, 3};
    assert_ok(RT_OP(&d, head_matmul, &err, .x = q, .x_ld = HEADS * QD, .x_head = QD, .w = w, .y = q_lat, .n = T, .nh = HEADS,
                    .head_rows = ROWS, .row0 = 0, .d = DN, .R = R));
    assert_ok(RT_OP(&d, cache_put, &err, .x = row, .cache = cache, .slot = slot, .pos = pos, .n = T, .capacity = T, .width = R + DR));
    assert_ok(RT_OP(&d, mla_cached, &err, .q_lat = q_lat, .q_pe = q + DN, .q_pe_ld = HEADS * QD, .q_pe_head = QD, .cache = cache,
                    .slot = slot, .pos = pos, .o = o_lat, .n = T, .capacity = T, .nh = HEADS, .R = R, .dr = DR, .scale = 0.3f));
    assert_ok(RT_OP(&d, head_matmul, &err, .x = o_lat, .w = w, .y = o, .n = T, .nh = HEADS, .head_rows = ROWS, .row0 = DN, .d = VD,
                    .R = R, .transpose = true));
    assert_close(o, expected, COUNT(o), 1e-14); /* reordered float64 sums */
    assert_status(RT_OP(&d, head_matmul, &err, .x = o_lat, .w = w, .y = o, .n = T, .nh = HEADS, .head_rows = ROWS, .row0 = DN, .d = VD + 1,
                        .R = R, .transpose = true), SHAPE);
    d.be->weight_free(d.dev, w);
    rt_device_close(&d);
}

/* ---- head ---- */
static void head_against_a_full_sort(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    enum { N = 19, H = 2, V = 40, IDS = 37, TOP = 6, N_LSE = 2 }; /* more rows than a tile; 3 rows of padding in the head */
    float x[N * H], w[V * H], logits[N * TOP], lse[N * N_LSE], logprob[N];
    uint32_t ids[N * TOP], rank[N];
    int32_t next[N];
    const float inv[N_LSE] = {1, 0.5f};
    for (int i = 0; i < N * H; i++) /* small integers: many ties */
        x[i] = (float)(rt_rng_u64(1, 1, (uint64_t)i) % 3);
    for (int i = 0; i < V * H; i++)
        w[i] = (float)(rt_rng_u64(1, 2, (uint64_t)i) % 5);
    for (int j = IDS * H; j < V * H; j++)
        w[j] = 1000; /* must not be seen */
    for (int t = 0; t < N; t++)
        next[t] = t == 4 ? IDS : (t * 7) % IDS;
    struct rt_weight *p = ops_param(&d, w, V, H);
    assert_ok(RT_OP(&d, head_topk, &err, .x = x, .w = p, .next = next, .n = N, .H = H, .n_ids = IDS, .k = TOP, .n_lse = N_LSE,
                    .inv_temp = inv, .topk_ids = ids, .topk_logits = logits, .lse = lse, .next_logprob = logprob, .next_rank = rank));
    for (int t = 0; t < N; t++) {
        float z[IDS];
        int order[IDS];
        double sum[2] = {0, 0};
        for (int v = 0; v < IDS; v++) {
            z[v] = x[t * H] * w[v * H] + x[t * H + 1] * w[v * H + 1];
            sum[0] += exp(z[v]);
            sum[1] += exp(z[v] / 2);
            int at = v; /* stable insertion: descending logit, ascending id */
            for (; at > 0 && z[order[at - 1]] < z[v]; at--)
                order[at] = order[at - 1];
            order[at] = v;
        }
        for (int j = 0; j < TOP; j++) {
            assert_int_equal(ids[t * TOP + j], order[j]);
            assert_true(logits[t * TOP + j] == z[order[j]]);
        }
        assert_near(lse[t * N_LSE], log(sum[0]), 1e-5); /* float32 of values up to 20 */
        assert_near(lse[t * N_LSE + 1], log(sum[1]), 1e-5);
        if (next[t] == IDS) {
            assert_true(isinf(logprob[t]) && logprob[t] < 0 && rank[t] == IDS);
            continue;
        }
        assert_int_equal(order[rank[t]], next[t]);
        assert_near(logprob[t], z[next[t]] - log(sum[0]), 1e-5);
    }
    assert_status(RT_OP(&d, head_topk, &err, .x = x, .w = p, .n = N, .H = H, .n_ids = V + 1, .k = TOP, .topk_ids = ids,
                        .topk_logits = logits), SHAPE);
    assert_status(RT_OP(&d, head_topk, &err, .x = x, .w = p, .n = N, .H = H, .n_ids = 5, .k = TOP, .topk_ids = ids,
                        .topk_logits = logits), SHAPE);
    d.be->weight_free(d.dev, p);
    rt_device_close(&d);
}

/* ---- elements ---- */
static void elements(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref);
    float x[6] = {1, 2, 3, 4, 5, 6}, out[4], y[3] = {1, 1, 1};
    const int32_t index[2] = {2, 0};
    double sum;
    assert_ok(RT_OP(&d, gather, &err, .x = x, .index = index, .out = out, .n = 2, .cols = 2));
    assert_true(out[0] == 5 && out[1] == 6 && out[2] == 1 && out[3] == 2);
    assert_ok(RT_OP(&d, scatter, &err, .y = out, .index = index, .x = x, .n = 2, .cols = 2, .accumulate = true));
    assert_true(x[0] == 2 && x[1] == 4 && x[2] == 3 && x[3] == 4 && x[4] == 10 && x[5] == 12);
    assert_ok(RT_OP(&d, scatter, &err, .y = out + 2, .index = index, .x = x, .n = 1, .cols = 2));
    assert_true(x[4] == 1 && x[5] == 2 && x[0] == 2);
    assert_ok(RT_OP(&d, sumsq, &err, .x = x, .n = 6, .out = &sum));
    assert_near(sum, 4 + 16 + 9 + 16 + 1 + 4, 0);
    assert_ok(RT_OP(&d, axpy, &err, .x = x, .y = y, .n = 3, .a = -2));
    assert_true(y[0] == -3 && y[1] == -7 && y[2] == -5);
    assert_ok(RT_OP(&d, axpy, &err, .y = y, .n = 3, .a = 0.5));
    assert_true(y[0] == -1.5f && y[1] == -3.5f);
    rt_device_close(&d);

    struct rt_device e = ops_open(&rt_backend_ref64);
    double wide[2] = {1.5, -1 / 3.0};
    float narrow[2];
    assert_ok(RT_OP(&e, convert, &err, .src = wide, .dst = narrow, .n = 2, .to_f32 = true));
    assert_true(narrow[0] == 1.5f && narrow[1] == (float)(-1 / 3.0));
    assert_ok(RT_OP(&e, convert, &err, .src = narrow, .dst = wide, .n = 2));
    assert_true(wide[1] == (double)narrow[1]);
    rt_device_close(&e);
}

static void adamw_by_hand(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_device d = ops_open(&rt_backend_ref64);
    double p[1] = {2}, m[1] = {0}, v[1] = {0}, g[1] = {6};
    const double b1 = 0.9, b2 = 0.95, lr = 0.01, eps = 1e-3, decay = 0.1;
    /* g = 6/2 = 3; m = .3, v = .45; corrected 3 and 9: step 3/(3 + eps) */
    assert_ok(RT_OP(&d, adamw, &err, .p = p, .grad = g, .m = m, .v = v, .moment = RT_F64, .n = 1, .step = 1, .lr = lr, .beta1 = b1, .beta2 = b2, .eps = eps,
                    .decay = decay, .grad_scale = 0.5));
    assert_near(m[0], 0.3, 1e-15);
    assert_near(v[0], 0.45, 1e-15);
    assert_near(p[0], 2 - lr * (3 / (3 + eps) + decay * 2), 1e-15);
    const double p1 = p[0];
    g[0] = -2; /* g = -1; m = .27 - .1, v = .4275 + .05 */
    assert_ok(RT_OP(&d, adamw, &err, .p = p, .grad = g, .m = m, .v = v, .moment = RT_F64, .n = 1, .step = 2, .lr = lr, .beta1 = b1, .beta2 = b2, .eps = eps,
                    .decay = decay, .grad_scale = 0.5));
    const double mhat = 0.17 / (1 - 0.81), vhat = 0.4775 / (1 - 0.9025);
    assert_near(p[0], p1 - lr * (mhat / (sqrt(vhat) + eps) + decay * p1), 1e-15);
    /* runs: 0 and 1 decay, 2 does not, 3 does, 4 lies behind the last end; without gradient nothing else happens */
    double q[5] = {1, 1, 1, 1, 1}, zero[5] = {0}, mq[5] = {0}, vq[5] = {0};
    assert_ok(RT_OP(&d, adamw, &err, .p = q, .grad = zero, .m = mq, .v = vq, .moment = RT_F64, .n = 5, .step = 1, .lr = lr, .beta1 = b1, .beta2 = b2,
                    .eps = eps, .decay = decay, .grad_scale = 1, .decay_end = (const int64_t[]){2, 3, 4}, .n_decay = 3));
    for (int i = 0; i < 5; i++)
        assert_near(q[i], i == 2 || i == 4 ? 1 : 1 - lr * decay, 1e-15);
    rt_device_close(&d);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(embedding_reads_every_type),
    cmocka_unit_test(norm_by_hand),
    cmocka_unit_test(the_rounding_of_the_norm),
    cmocka_unit_test(quantisation_of_blocks),
    cmocka_unit_test(linear_by_hand),
    cmocka_unit_test(e4m3_product_with_a_ragged_block),
    cmocka_unit_test(rope_by_hand),
    cmocka_unit_test(headnorm_rope_is_norm_then_rope),
    cmocka_unit_test(swiglu_by_hand),
    cmocka_unit_test(attention_against_its_formula),
    cmocka_unit_test(cached_attention_is_packed_attention),
    cmocka_unit_test(absorbed_mla_is_expanded_mla),
    cmocka_unit_test(head_against_a_full_sort),
    cmocka_unit_test(elements),
    cmocka_unit_test(adamw_by_hand),
};
RT_SUITE(ops_ref, tests)
