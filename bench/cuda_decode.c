/* Speed of generation's operations on the GPU: a layer of DeepSeek-V3 that lies in device memory, and a student of 1.5B parameters.
 *
 *     bench_cuda_decode
 *
 * Each line: the operation and how many tokens take part, its time (median of 11, by events), the bytes that have to move once (weights that
 * are touched, caches, activations), their rate, and its share of 3.0 TB/s, what a copy reaches on an H100; for attention FLOP too. Weights are
 * larger than the L2 cache, or several copies of them that take turns. Whole layers are timed by the host's clock, with what waits.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/median.h"
#include "core/backend.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/rng.h"

enum { E = 256, TOP = 8, H = 7168, I = 2048, QL = 1536, NH = 128, DN = 128, DR = 64, R = 512, DV = 128, CKV = R + DR, B = 256, CONTEXT = 4096,
       REPEATS = 11, TURNS = 16, PATTERN = 8 << 20 };
#define RATE 3.0e12

struct bench {
    struct rt_device d;
    struct rt_event *from, *to;
    unsigned char *codes;    /* PATTERN random e4m3 codes without NaN, then as many bytes of random bfloat16 */
    float *scales;
    int32_t offset[E + 1];
    struct rt_err err;
};

static void need(struct bench *b, enum rt_status st)
{
    if (st == RT_OK)
        return;
    fprintf(stderr, "bench_cuda_decode: %s\n", b->err.msg);
    exit(rt_exit_code(st));
}

/* ---- memory ---- */

static void *device(struct bench *b, size_t bytes)
{
    void *p;
    need(b, b->d.be->alloc(b->d.dev, bytes, &p, &b->err));
    return p;
}

static void fill(struct bench *b, void *p, size_t bytes, const unsigned char *from)
{
    for (size_t i = 0; i < bytes; i += PATTERN)
        need(b, rt_device_upload(&b->d, (char *)p + i, from, bytes - i < PATTERN ? bytes - i : PATTERN, &b->err));
    need(b, rt_device_sync(&b->d, &b->err));
}

/* n random bfloat16 numbers */
static void *acts(struct bench *b, int64_t n)
{
    void *p = device(b, (size_t)n * 2);
    fill(b, p, (size_t)n * 2, b->codes + PATTERN);
    return p;
}

static int32_t *ints(struct bench *b, const int32_t *x, int64_t n)
{
    int32_t *p = device(b, (size_t)n * 4);
    need(b, rt_device_upload(&b->d, p, x, (size_t)n * 4, &b->err));
    need(b, rt_device_sync(&b->d, &b->err));
    return p;
}

static void patterns(struct bench *b)
{
    uint16_t *half;
    need(b, rt_alloc(2, PATTERN, "bench", &b->codes, &b->err));
    half = (uint16_t *)(void *)(b->codes + PATTERN);
    for (int i = 0; i < PATTERN; i++) {
        const uint64_t r = rt_rng_u64(1, 1, (uint64_t)i);
        b->codes[i] = (unsigned char)(r & 0x80) | (unsigned char)(0x20 + r / 256 % 0x50);
        if (i < PATTERN / 2)
            half[i] = rt_f32_to_bf16((float)((double)(r >> 40) / (1 << 24) - 0.5));
    }
    need(b, rt_alloc(1 << 20, sizeof *b->scales, "bench", &b->scales, &b->err));
    for (int i = 0; i < 1 << 20; i++)
        b->scales[i] = 1e-4f;
}

static struct rt_weight *weight(struct bench *b, enum rt_dtype type, int64_t rows, int64_t cols)
{
    const size_t bytes = (size_t)(rows * cols) * (type == RT_E4M3 ? 1 : 2), n_scales = (size_t)((rows + 127) / 128 * ((cols + 127) / 128));
    struct rt_weight *w;
    struct rt_weight_src src = {.name = "bench", .dtype = type, .rows = rows, .cols = cols, .resident = true};
    void *p = device(b, bytes);
    fill(b, p, bytes, type == RT_E4M3 ? b->codes : b->codes + PATTERN);
    src.data = src.device_data = p;
    if (type == RT_E4M3) {
        void *s = device(b, n_scales * 4);
        need(b, rt_device_upload(&b->d, s, b->scales, n_scales * 4, &b->err));
        src.scale_inv = b->scales;
        src.device_scale = s;
    }
    need(b, b->d.be->weight_load(b->d.dev, b->d.q, &src, &w, &b->err));
    return w;
}

static void print_line(const char *name, int64_t n, double seconds, double bytes, double flop)
{
    printf("%-34s %5lld %9.1f us %9.1f MB %7.0f GB/s %4.0f%%", name, (long long)n, seconds * 1e6, bytes * 1e-6, bytes / seconds * 1e-9,
           100 * bytes / seconds / RATE);
    if (flop > 0)
        printf(" %6.0f TFLOP/s", flop / seconds * 1e-12);
    printf("\n");
    fflush(stdout);
}

/* Median seconds of run(ctx, turn), enqueued TURNS times between two events. */
typedef enum rt_status (*run_fn)(struct bench *, const void *ctx, int64_t n, int turn);
static double measure(struct bench *b, run_fn run, const void *ctx, int64_t n, int turns)
{
    const struct rt_backend *be = b->d.be;
    double t[REPEATS];
    for (int i = -2; i < REPEATS; i++) {
        double seconds = 0;
        need(b, be->event_record(b->d.dev, b->d.q, b->from, &b->err));
        for (int turn = 0; turn < turns; turn++)
            need(b, run(b, ctx, n, turn));
        need(b, be->event_record(b->d.dev, b->d.q, b->to, &b->err));
        need(b, be->event_elapsed(b->d.dev, b->from, b->to, &seconds, &b->err));
        if (i >= 0)
            t[i] = seconds / turns;
    }
    qsort(t, REPEATS, sizeof *t, bench_by_value);
    return t[REPEATS / 2];
}

/* ---- products of one weight ---- */

struct linear {
    struct rt_weight *w[TURNS];
    int copies;
    int64_t N, K;
    struct rt_act x;
    void *y;
    bool f32;
};

static enum rt_status run_linear(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct linear *l = ctx;
    return RT_OP(&b->d, linear_fwd, &b->err, .x = l->x, .w = l->w[turn % l->copies], .y = l->y, .n = n, .K = l->K, .N = l->N, .y_f32 = l->f32,
                 .row_exact = true);
}

/* w8a8: operands quantised too. */
static void linears(struct bench *b, const char *name, enum rt_dtype type, int64_t N, int64_t K, bool f32, bool w8a8)
{
    static const int64_t rows[] = {1, 16, 64, 256};
    const size_t bytes = (size_t)(N * K) * (type == RT_E4M3 ? 1 : 2);
    struct linear l = {.copies = (int)((300u << 20) / bytes) + 1, .N = N, .K = K, .f32 = f32};
    char what[64];
    l.copies = l.copies < TURNS ? l.copies : TURNS;
    for (int i = 0; i < l.copies; i++)
        l.w[i] = weight(b, type, N, K);
    void *x = acts(b, B * K);
    l.y = device(b, (size_t)(B * N) * 4);
    for (int quantised = 0; quantised <= w8a8; quantised++)
        for (int i = 0; i < 4; i++) {
            const int64_t n = rows[i];
            l.x = (struct rt_act){x, NULL};
            if (quantised) {
                l.x = (struct rt_act){device(b, (size_t)(B * K)), device(b, (size_t)(B * K / 128) * 4)};
                need(b, RT_OP(&b->d, quant, &b->err, .x = x, .q = l.x, .n = n, .cols = K));
            }
            snprintf(what, sizeof what, "%s%s %lldx%lld", name, quantised ? " w8a8" : "", (long long)N, (long long)K);
            print_line(what, n, measure(b, run_linear, &l, n, l.copies), (double)bytes + (double)(n * (K * (quantised ? 1 : 2) + N * (f32 ? 4 : 2))), 0);
            if (quantised) {
                b->d.be->free(b->d.dev, l.x.data);
                b->d.be->free(b->d.dev, l.x.scale);
            }
        }
    for (int i = 0; i < l.copies; i++)
        b->d.be->weight_free(b->d.dev, l.w[i]); /* the bytes stay: a bench ends soon */
    b->d.be->free(b->d.dev, l.y);
    b->d.be->free(b->d.dev, x);
}

/* ---- one MoE layer ---- */

struct layer {
    struct rt_weight *q_a, *q_b, *kv_a, *kv_b, *o, *router, *bias, *norm_h, *norm_q, *norm_kv, *shared[3], *expert[3][E];
    void *hidden, *xn, *qa, *q, *ckv, *cache, *q_lat, *o_lat, *attn, *fx;
    struct rt_act xq, qaq, oq, fxq;
    int32_t *slot, *pos, *ids, *perm;
    float *route_weight, *cos, *sin;
    bool w8a8;
};

static struct rt_act quantised(struct bench *b, int64_t n, int64_t cols)
{
    return (struct rt_act){device(b, (size_t)(n * cols)), device(b, (size_t)(n * (cols / 128)) * 4)};
}

static void layer_make(struct bench *b, struct layer *l)
{
    static int32_t slot[B], pos[B];
    for (int i = 0; i < B; i++) {
        slot[i] = i;
        pos[i] = CONTEXT - 1;
    }
    l->q_a = weight(b, RT_E4M3, QL, H);
    l->q_b = weight(b, RT_E4M3, NH * (DN + DR), QL);
    l->kv_a = weight(b, RT_E4M3, CKV, H);
    l->kv_b = weight(b, RT_E4M3, NH * (DN + DV), R);
    l->o = weight(b, RT_E4M3, H, NH * DV);
    l->router = weight(b, RT_BF16, E, H);
    l->norm_h = weight(b, RT_BF16, 1, H);
    l->norm_q = weight(b, RT_BF16, 1, QL);
    l->norm_kv = weight(b, RT_BF16, 1, R);
    for (int i = 0; i < 3; i++) {
        const int64_t rows = i == 2 ? H : I, cols = i == 2 ? I : H;
        l->shared[i] = weight(b, RT_E4M3, rows, cols);
        for (int e = 0; e < E; e++)
            l->expert[i][e] = weight(b, RT_E4M3, rows, cols);
    }
    l->hidden = acts(b, B * H);
    l->xn = acts(b, B * H);
    l->fx = acts(b, B * H);
    l->qa = acts(b, B * QL);
    l->q = acts(b, (int64_t)B * NH * (DN + DR));
    l->ckv = acts(b, B * CKV);
    l->cache = acts(b, (int64_t)B * CONTEXT * CKV);
    l->q_lat = acts(b, (int64_t)B * NH * R);
    l->o_lat = acts(b, (int64_t)B * NH * R);
    l->attn = acts(b, (int64_t)B * NH * DV);
    l->xq = quantised(b, B, H);
    l->qaq = quantised(b, B, QL);
    l->oq = quantised(b, B, NH * DV);
    l->fxq = quantised(b, B, H);
    l->slot = ints(b, slot, B);
    l->pos = ints(b, pos, B);
    l->ids = device(b, B * TOP * 4);
    l->perm = device(b, B * TOP * 4);
    l->route_weight = device(b, B * TOP * 4);
    l->cos = device(b, (size_t)CONTEXT * DR * 2);
    l->sin = device(b, (size_t)CONTEXT * DR * 2);
}

static const struct rt_act none;
static struct rt_act pick(const struct layer *l, void *plain, struct rt_act q)
{
    return l->w8a8 ? q : (struct rt_act){plain, NULL};
}

static enum rt_status run_mla(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct layer *l = ctx;
    (void)turn;
    return RT_OP(&b->d, mla_cached, &b->err, .q_lat = l->q_lat, .q_pe = (char *)l->q + DN * 2, .q_pe_ld = NH * (DN + DR), .q_pe_head = DN + DR,
                 .cache = l->cache, .slot = l->slot, .pos = l->pos, .o = l->o_lat, .n = n, .capacity = CONTEXT, .nh = NH, .R = R, .dr = DR,
                 .scale = 0.072f);
}

static enum rt_status run_absorb(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct layer *l = ctx;
    (void)turn;
    return RT_OP(&b->d, head_matmul, &b->err, .x = l->q, .x_ld = NH * (DN + DR), .x_head = DN + DR, .w = l->kv_b, .y = l->q_lat, .n = n, .nh = NH,
                 .head_rows = DN + DV, .row0 = 0, .d = DN, .R = R);
}

static enum rt_status run_values(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct layer *l = ctx;
    (void)turn;
    return RT_OP(&b->d, head_matmul, &b->err, .x = l->o_lat, .w = l->kv_b, .y = l->attn, .n = n, .nh = NH, .head_rows = DN + DV, .row0 = DN, .d = DV,
                 .R = R, .transpose = true);
}

static enum rt_status run_route(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct layer *l = ctx;
    (void)turn;
    return RT_OP(&b->d, route, &b->err, .x = l->fx, .w = l->router, .ids = l->ids, .weight = l->route_weight, .n = n, .H = H, .E = E, .k = TOP,
                 .n_group = 8, .topk_group = 4, .sigmoid = true, .group_top2 = true, .norm = true, .scale = 2.5f);
}

static enum rt_status run_sort(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct layer *l = ctx;
    (void)turn;
    return RT_OP(&b->d, moe_sort, &b->err, .ids = l->ids, .perm = l->perm, .offset = b->offset, .n = n, .k = TOP, .E = E);
}

static enum rt_status run_experts(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct layer *l = ctx;
    const struct rt_weight *const *w[3];
    const struct rt_weight *list[3][E];
    (void)turn;
    for (int i = 0; i < 3; i++) {
        for (int e = 0; e < E; e++)
            list[i][e] = l->expert[i][e];
        w[i] = list[i];
    }
    return RT_OP(&b->d, moe_ffn, &b->err, .x = pick(l, l->fx, l->fxq), .perm = l->perm, .weight = l->route_weight, .offset = b->offset, .gate = w[0],
                 .up = w[1], .down = w[2], .y = l->hidden, .n = n, .n_experts = E, .k = TOP, .H = H, .I = I, .row_exact = true);
}

static enum rt_status run_shared(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct layer *l = ctx;
    const struct rt_weight *g = l->shared[0], *u = l->shared[1], *w = l->shared[2];
    const int32_t all[2] = {0, (int32_t)n};
    (void)turn;
    return RT_OP(&b->d, moe_ffn, &b->err, .x = pick(l, l->fx, l->fxq), .offset = all, .gate = &g, .up = &u, .down = &w, .y = l->hidden, .n = n,
                 .n_experts = 1, .k = 1, .H = H, .I = I, .row_exact = true);
}

static enum rt_status product(struct bench *b, struct rt_act x, const struct rt_weight *w, void *y, int64_t n, int64_t K, int64_t N, bool accumulate)
{
    return RT_OP(&b->d, linear_fwd, &b->err, .x = x, .w = w, .y = y, .n = n, .K = K, .N = N, .accumulate = accumulate, .row_exact = true);
}

/* What the teacher's decoder does for one layer (teacher/layer.c). */
static enum rt_status run_layer(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct layer *l = ctx;
    const struct rt_device *d = &b->d;
    struct rt_err *err = &b->err;
    enum rt_status st;
    RT_TRY(RT_OP(d, norm_fwd, err, .x = l->hidden, .w = l->norm_h, .y = l->xn, .yq = l->w8a8 ? l->xq : none, .n = n, .cols = H, .eps = 1e-6f));
    RT_TRY(product(b, pick(l, l->xn, l->xq), l->q_a, l->qa, n, H, QL, false));
    RT_TRY(RT_OP(d, norm_fwd, err, .x = l->qa, .w = l->norm_q, .y = l->qa, .yq = l->w8a8 ? l->qaq : none, .n = n, .cols = QL, .eps = 1e-6f));
    RT_TRY(product(b, pick(l, l->qa, l->qaq), l->q_b, l->q, n, QL, NH * (DN + DR), false));
    RT_TRY(product(b, pick(l, l->xn, l->xq), l->kv_a, l->ckv, n, H, CKV, false));
    RT_TRY(RT_OP(d, rope, err, .x = (char *)l->q + DN * 2, .ld = NH * (DN + DR), .head_ld = DN + DR, .cos = l->cos, .sin = l->sin, .position = l->pos,
                 .n = n, .heads = NH, .dim = DR, .interleaved = true));
    RT_TRY(RT_OP(d, rope, err, .x = (char *)l->ckv + R * 2, .ld = CKV, .cos = l->cos, .sin = l->sin, .position = l->pos, .n = n, .heads = 1, .dim = DR,
                 .interleaved = true));
    RT_TRY(RT_OP(d, norm_fwd, err, .x = l->ckv, .ldx = CKV, .w = l->norm_kv, .y = l->ckv, .ldy = CKV, .n = n, .cols = R, .eps = 1e-6f));
    RT_TRY(RT_OP(d, cache_put, err, .x = l->ckv, .cache = l->cache, .slot = l->slot, .pos = l->pos, .n = n, .capacity = CONTEXT, .width = CKV));
    RT_TRY(run_absorb(b, l, n, turn));
    RT_TRY(run_mla(b, l, n, turn));
    RT_TRY(run_values(b, l, n, turn));
    if (l->w8a8)
        RT_TRY(RT_OP(d, quant, err, .x = l->attn, .q = l->oq, .n = n, .cols = NH * DV));
    RT_TRY(product(b, pick(l, l->attn, l->oq), l->o, l->hidden, n, NH * DV, H, true));
    RT_TRY(RT_OP(d, norm_fwd, err, .x = l->hidden, .w = l->norm_h, .y = l->fx, .yq = l->w8a8 ? l->fxq : none, .n = n, .cols = H, .eps = 1e-6f));
    RT_TRY(run_route(b, l, n, turn));
    RT_TRY(run_sort(b, l, n, turn));
    RT_TRY(run_shared(b, l, n, turn));
    RT_TRY(run_experts(b, l, n, turn));
out:
    return st;
}

static double expert_bytes(const struct bench *b)
{
    int touched = 0;
    for (int e = 0; e < E; e++)
        touched += b->offset[e + 1] > b->offset[e];
    return 3.0 * touched * H * I;
}

static void teacher(struct bench *b)
{
    static struct layer l;
    static const int64_t batches[] = {1, 16, 64, 256};
    const double attention = (double)QL * H + (double)NH * (DN + DR) * QL + (double)CKV * H + (double)NH * (DN + DV) * R + (double)H * NH * DV;
    layer_make(b, &l);
    printf("a layer of DeepSeek-V3, caches of %d tokens\n", CONTEXT);
    for (int i = 0; i < 4; i++) {
        const int64_t n = batches[i];
        const double cache = (double)n * CONTEXT * CKV * 2, flop = 2.0 * (double)n * NH * CONTEXT * (2 * R + DR), states = (double)n * NH * 2;
        print_line("mla_cached", n, measure(b, run_mla, &l, n, 2), cache + states * (2 * R + DR), flop);
        print_line("head_matmul q", n, measure(b, run_absorb, &l, n, 4), (double)NH * DN * R + states * (DN + R), 2.0 * (double)n * NH * DN * R);
        print_line("head_matmul o", n, measure(b, run_values, &l, n, 4), (double)NH * DV * R + states * (DV + R), 2.0 * (double)n * NH * DV * R);
        need(b, RT_OP(&b->d, norm_fwd, &b->err, .x = l.hidden, .w = l.norm_h, .y = l.fx, .yq = l.fxq, .n = n, .cols = H, .eps = 1e-6f));
        print_line("route", n, measure(b, run_route, &l, n, 4), (double)E * H * 2 + (double)n * H * 2, 0);
        print_line("moe_sort", n, measure(b, run_sort, &l, n, 4), (double)n * TOP * 8, 0);
        for (int w8a8 = 0; w8a8 < 2; w8a8++) {
            l.w8a8 = w8a8 == 1;
            print_line(w8a8 ? "shared expert w8a8" : "shared expert", n, measure(b, run_shared, &l, n, 4), 3.0 * H * I, 0);
            print_line(w8a8 ? "experts w8a8" : "experts", n, measure(b, run_experts, &l, n, 1), expert_bytes(b), 0);
            const double t = measure(b, run_layer, &l, n, 4);
            print_line(w8a8 ? "the whole layer w8a8" : "the whole layer", n, t, expert_bytes(b) + 3.0 * H * I + attention + cache, 0);
        }
    }
}

/* ---- a student ---- */

struct student {
    void *q, *k, *v, *o;
    int32_t *slot, *pos;
    int nh, nkv, d, context;
};

static enum rt_status run_attn(struct bench *b, const void *ctx, int64_t n, int turn)
{
    const struct student *s = ctx;
    (void)turn;
    return RT_OP(&b->d, attn_cached, &b->err, .q = s->q, .q_ld = (s->nh + 2 * s->nkv) * s->d, .k_cache = s->k, .v_cache = s->v, .slot = s->slot,
                 .pos = s->pos, .o = s->o, .n = n, .capacity = s->context, .nh = s->nh, .nkv = s->nkv, .d = s->d, .scale = 0.088f);
}

static double student_attention(struct bench *b, int nh, int nkv, int d, int context)
{
    static int32_t slot[B], pos[B];
    static const int64_t batches[] = {1, 16, 64, 256};
    struct student s = {.nh = nh, .nkv = nkv, .d = d, .context = context};
    double t = 0;
    char what[64];
    for (int i = 0; i < B; i++) {
        slot[i] = i;
        pos[i] = context - 1;
    }
    s.q = acts(b, (int64_t)B * (nh + 2 * nkv) * d);
    s.o = acts(b, (int64_t)B * nh * d);
    s.k = acts(b, (int64_t)B * context * nkv * d);
    s.v = acts(b, (int64_t)B * context * nkv * d);
    s.slot = ints(b, slot, B);
    s.pos = ints(b, pos, B);
    snprintf(what, sizeof what, "attn_cached %d/%d of %d at %d", nh, nkv, d, context);
    for (int i = 0; i < 4; i++) {
        t = measure(b, run_attn, &s, batches[i], 4);
        print_line(what, batches[i], t, (double)batches[i] * context * nkv * d * 4, 4.0 * (double)batches[i] * context * nh * d);
    }
    b->d.be->free(b->d.dev, s.k);
    b->d.be->free(b->d.dev, s.v);
    return t;
}

static void run_all(struct bench *b)
{
    printf("%s\n", b->d.be->describe(b->d.dev));
    printf("%-34s %5s %12s %12s %12s %5s\n", "", "rows", "time", "moved", "rate", "share");
    linears(b, "q_a", RT_E4M3, QL, H, false, true);
    linears(b, "q_b", RT_E4M3, NH * (DN + DR), QL, false, true);
    linears(b, "kv_a", RT_E4M3, CKV, H, false, true);
    linears(b, "o", RT_E4M3, H, NH * DV, false, true);
    printf("a student of 1.5B parameters\n");
    linears(b, "qkv", RT_BF16, 2048, 1536, false, false);
    linears(b, "gate_up", RT_BF16, 17920, 1536, false, false);
    linears(b, "down", RT_BF16, 1536, 8960, false, false);
    linears(b, "head", RT_BF16, 151936, 1536, true, false);
    student_attention(b, 12, 2, 128, 2048);
    student_attention(b, 9, 3, 64, 2048);
    student_attention(b, 32, 8, 128, 2048);
    teacher(b);
}

int main(void)
{
    static struct bench b;
    const struct rt_backend *be = NULL;
    char why[128];
    for (const struct rt_backend *const *list = rt_backend_list(); *list != NULL; list++)
        if (strcmp((*list)->name, "cuda") == 0)
            be = *list;
    if (be == NULL || !be->available(why, sizeof why)) {
        printf("SKIP no GPU\n");
        return 0;
    }
    need(&b, rt_device_open(be, &(struct rt_dev_options){0}, &b.d, &b.err));
    need(&b, be->event_create(b.d.dev, &b.from, &b.err));
    need(&b, be->event_create(b.d.dev, &b.to, &b.err));
    patterns(&b);
    run_all(&b);
    rt_device_close(&b.d);
    return 0;
}
