/* Products on the GPU at the geometry of DeepSeek-V3 (H 7168, 256 experts of 2048) and of students: linear layers, a group of experts, the head.
 *
 *     bench_cuda_gemm [linear] [experts] [head] [student]          all of them without an argument
 *
 * Median of calls between CUDA events, random numbers. Limits: what the tensor cores do at most, 1979 TFLOP/s of e4m3 and 990 of bfloat16.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/backend.h"
#include "core/mem.h"
#include "core/rng.h"

#ifdef RT_CUDA
#include "bench/cuda_parts.h"
#include "core/cuda/gemm.h"
#include "core/cuda/group8.h"
#include "core/cuda/moe_rows.h"

enum { REPEAT = 10, BLOCK = 1048573 /* odd: rows of a matrix differ */, H = 7168, I = 2048, TOP_K = 8, GROUP = 16 };

static int compare(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

typedef enum rt_status (*call)(const struct rt_device *d, void *ctx, struct rt_err *err);

static enum rt_status measure(const struct rt_device *d, call f, void *ctx, double *ms, struct rt_err *err)
{
    float all[REPEAT];
    cudaEvent_t from, to;
    enum rt_status st = RT_OK;
    (void)cudaEventCreate(&from);
    (void)cudaEventCreate(&to);
    for (int i = -3; i < REPEAT; i++) {
        (void)cudaEventRecord(from, d->q->stream);
        RT_TRY(f(d, ctx, err));
        (void)cudaEventRecord(to, d->q->stream);
        RT_TRY(rt_device_sync(d, err));
        if (i >= 0)
            (void)cudaEventElapsedTime(&all[i], from, to);
    }
    qsort(all, REPEAT, sizeof *all, compare);
    *ms = (double)all[REPEAT / 2];
out:
    (void)cudaEventDestroy(from);
    (void)cudaEventDestroy(to);
    return st;
}

enum kind { NUMBERS, CODES, SCALES, KINDS };

/* One block of random elements of each kind: bf16 numbers, codes, scales near 0.01. */
static enum rt_status make_blocks(char *block[KINDS], struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int kind = 0; kind < KINDS; kind++) {
        RT_TRY(rt_alloc(BLOCK, 4, "numbers", &block[kind], err));
        for (int i = 0; i < BLOCK; i++) {
            const float x = rt_rng_normal(1, (uint64_t)kind, (uint64_t)i);
            if (kind == NUMBERS)
                ((uint16_t *)(void *)block[kind])[i] = rt_f32_to_bf16(x);
            else if (kind == CODES)
                ((uint8_t *)block[kind])[i] = rt_f32_to_e4m3(100.0f * x);
            else
                ((float *)(void *)block[kind])[i] = 0.01f * (1.0f + 0.1f * x);
        }
    }
out:
    return st;
}

/* bytes of device memory: the block of this kind, over and over. */
static enum rt_status fill(const struct rt_device *d, enum kind kind, size_t bytes, void *out_ptr, struct rt_err *err)
{
    static char *block[KINDS]; /* made once, kept to the end */
    const size_t one = (size_t)BLOCK * (kind == NUMBERS ? 2 : kind == CODES ? 1 : 4);
    char *p;
    enum rt_status st;
    if (block[KINDS - 1] == NULL)
        RT_TRY(make_blocks(block, err));
    RT_TRY(d->be->alloc(d->dev, bytes, (void **)&p, err));
    RT_TRY(rt_device_upload(d, p, block[kind], bytes < one ? bytes : one, err));
    for (size_t have = one; have < bytes; have *= 2)
        RT_TRY(d->be->copy(d->dev, d->q, p + have, p, bytes - have < have ? bytes - have : have, err));
    RT_TRY(rt_device_sync(d, err));
    memcpy(out_ptr, &p, sizeof p);
out:
    return st;
}

struct weight {
    struct rt_weight *w;
    void *data, *scale;
};

static enum rt_status make_weight(const struct rt_device *d, bool e4m3, int64_t rows, int64_t cols, struct weight *out, struct rt_err *err)
{
    const size_t blocks = (size_t)((rows + 127) / 128 * ((cols + 127) / 128));
    enum rt_status st;
    RT_TRY(fill(d, e4m3 ? CODES : NUMBERS, (size_t)(rows * cols) * (e4m3 ? 1 : 2), &out->data, err));
    if (e4m3)
        RT_TRY(fill(d, SCALES, blocks * 4, &out->scale, err));
    const struct rt_weight_src src = {.name = "w", .dtype = e4m3 ? RT_E4M3 : RT_BF16, .rows = rows, .cols = cols, .device_data = out->data,
                                      .device_scale = out->scale};
    RT_TRY(d->be->weight_load(d->dev, d->q, &src, &out->w, err));
out:
    return st;
}

static void free_weight(const struct rt_device *d, struct weight *w)
{
    d->be->weight_free(d->dev, w->w);
    d->be->free(d->dev, w->data);
    d->be->free(d->dev, w->scale);
    *w = (struct weight){0};
}

/* ---- linear layers ---- */

static enum rt_status call_forward(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    return d->be->linear_fwd(d->dev, d->q, ctx, err);
}
static enum rt_status call_dgrad(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    return d->be->linear_dgrad(d->dev, d->q, ctx, err);
}
static enum rt_status call_wgrad(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    return d->be->linear_wgrad(d->dev, d->q, ctx, err);
}

static void report(const char *what, int64_t n, int64_t N, int64_t K, double flop, double ms, double limit)
{
    printf("  %-34s %7lld x %6lld x %6lld  %8.3f ms  %6.0f TFLOP/s  %3.0f%%\n", what, (long long)n, (long long)N, (long long)K, ms, flop / ms * 1e-9,
           flop / ms * 1e-9 / limit * 100);
}

static enum rt_status teacher_linear(const struct rt_device *d, const char *name, int64_t n, int64_t N, int64_t K, struct rt_err *err)
{
    struct rt_dev *dev = d->dev;
    struct rt_cuda_lt *lt = dev->lt;
    struct weight w = {0};
    struct rt_act x = {NULL, NULL};
    void *act = NULL, *y = NULL;
    char what[64];
    double ms;
    const double flop = 2.0 * (double)n * (double)N * (double)K;
    enum rt_status st;
    RT_TRY(make_weight(d, true, N, K, &w, err));
    RT_TRY(fill(d, CODES, (size_t)(rt_act_rows(n) * K), &x.data, err));
    RT_TRY(fill(d, SCALES, (size_t)(rt_act_rows(n) * (K / 128)) * 4, &x.scale, err));
    RT_TRY(fill(d, NUMBERS, (size_t)(n * K) * 2, &act, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)(n * N) * 2, &y, err));
    for (int way = 0; way < 2; way++) {
        struct rt_linear_fwd_args a = {.x = x, .w = w.w, .y = y, .n = n, .K = K, .N = N};
        if (way == 0 && !rt_cuda_group8_fits(dev, K, N, false))
            continue;
        dev->lt = way == 0 ? NULL : lt; /* our own kernel stands in where the library is missing */
        st = measure(d, call_forward, &a, &ms, err);
        dev->lt = lt;
        RT_TRY(st);
        snprintf(what, sizeof what, "%s w8a8 %s", name, way == 0 ? "own" : "library");
        report(what, n, N, K, flop, ms, 1979);
    }
    struct rt_linear_fwd_args a = {.x = {act, NULL}, .w = w.w, .y = y, .n = n, .K = K, .N = N};
    RT_TRY(measure(d, call_forward, &a, &ms, err));
    snprintf(what, sizeof what, "%s w8a16", name);
    report(what, n, N, K, flop, ms, 990);
out:
    free_weight(d, &w);
    d->be->free(d->dev, x.data);
    d->be->free(d->dev, x.scale);
    d->be->free(d->dev, act);
    d->be->free(d->dev, y);
    return st;
}

static enum rt_status student_linear(const struct rt_device *d, const char *name, int64_t n, int64_t N, int64_t K, struct rt_err *err)
{
    struct weight w = {0};
    void *x = NULL, *y = NULL, *dw = NULL, *db = NULL;
    char what[64];
    double ms;
    const double flop = 2.0 * (double)n * (double)N * (double)K;
    enum rt_status st;
    RT_TRY(make_weight(d, false, N, K, &w, err));
    RT_TRY(fill(d, NUMBERS, (size_t)(n * K) * 2, &x, err));
    RT_TRY(fill(d, NUMBERS, (size_t)(n * N) * 2, &y, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)(N * K) * 2, &dw, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)N * 2, &db, err));
    struct rt_linear_wgrad_args g = {.dy = y, .x = x, .dw = dw, .n = n, .K = K, .N = N};
    RT_TRY(measure(d, call_wgrad, &g, &ms, err));
    snprintf(what, sizeof what, "%s wgrad", name);
    report(what, n, N, K, flop, ms, 990);
    g.db = db;
    RT_TRY(measure(d, call_wgrad, &g, &ms, err));
    snprintf(what, sizeof what, "%s wgrad, bias", name);
    report(what, n, N, K, flop, ms, 990);
    struct rt_linear_dgrad_args b = {.dy = y, .w = w.w, .dx = x, .n = n, .K = K, .N = N};
    RT_TRY(measure(d, call_dgrad, &b, &ms, err));
    snprintf(what, sizeof what, "%s dgrad", name);
    report(what, n, N, K, flop, ms, 990);
    struct rt_linear_fwd_args a = {.x = {x, NULL}, .w = w.w, .y = y, .n = n, .K = K, .N = N};
    RT_TRY(measure(d, call_forward, &a, &ms, err));
    snprintf(what, sizeof what, "%s forward", name);
    report(what, n, N, K, flop, ms, 990);
out:
    free_weight(d, &w);
    d->be->free(d->dev, x);
    d->be->free(d->dev, y);
    d->be->free(d->dev, dw);
    d->be->free(d->dev, db);
    return st;
}

/* ---- a group of experts ---- */

struct group {
    struct rt_moe_ffn_args a;
    struct rt_cuda_moe_group t;
    struct rt_act xg, h;
    char *gate_up, *out;
    int64_t base[GROUP + 1];
    int32_t offset[GROUP + 1];
    struct weight w[3][GROUP];
    const struct rt_weight *list[3][GROUP];
};

static enum rt_status call_moe(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    return d->be->moe_ffn(d->dev, d->q, &((struct group *)ctx)->a, err);
}
static enum rt_status call_tables(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    rt_cuda_moe_group_release(d->q, &g->t);
    return rt_cuda_moe_group_make(d->q, g->a.perm, g->offset, GROUP, 4, g->a.n, TOP_K, true, &g->t, err);
}
static enum rt_status call_gather(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    return rt_cuda_moe_gather(d->q, &g->t, g->a.x, g->xg, H, err);
}
static enum rt_status call_scales(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    return rt_cuda_moe_gather(d->q, &g->t, g->a.x, (struct rt_act){NULL, g->xg.scale}, H, err);
}
static enum rt_status call_swiglu(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    return rt_cuda_moe_swiglu(d->q, &g->t, g->gate_up, g->gate_up + I * 2, 2 * I, g->h, I, false, err);
}
static enum rt_status call_combine(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    return rt_cuda_moe_combine(d->q, &g->t, g->out, g->a.weight, g->a.y, H, err);
}
static enum rt_status call_library(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    enum rt_status st = RT_OK;
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < GROUP; e++) {
            const int64_t base = g->base[e], rows = g->base[e + 1] - base, K = m < 2 ? H : I;
            const struct rt_act from = m < 2 ? g->xg : g->h;
            const struct rt_cuda_gemm8_args p = {.x = {(char *)from.data + base * K, from.scale + base * (K / 128)}, .w = g->list[m][e],
                                                 .y = m < 2 ? g->gate_up + base * 2 * I * 2 + m * I * 2 : g->out + base * H * 2, .n = rows, .K = K,
                                                 .N = m < 2 ? I : H, .ldy = m < 2 ? 2 * I : H, .x_scale_ld = rows, .padded = true};
            RT_TRY(rt_cuda_gemm8(d->q, &p, err));
        }
out:
    return st;
}
static enum rt_status call_own_wide(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    const struct rt_cuda_group8 wide = {.x = g->xg, .base = g->base, .n_experts = GROUP, .K = H, .N = I, .w = g->list[0], .up = g->list[1], .hq = g->h};
    return rt_cuda_group8(d->q, &wide, err);
}
static enum rt_status call_own_gather(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    const struct rt_cuda_group8 wide = {.x = {g->a.x.data, g->xg.scale}, .row = g->t.row, .k = TOP_K, .base = g->base, .n_experts = GROUP, .K = H, .N = I,
                                        .w = g->list[0], .up = g->list[1], .hq = g->h};
    return rt_cuda_group8(d->q, &wide, err);
}
static enum rt_status call_own_down(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    struct group *g = ctx;
    const struct rt_cuda_group8 back = {.x = g->h, .base = g->base, .n_experts = GROUP, .K = I, .N = H, .w = g->list[2], .y = g->out};
    return rt_cuda_group8(d->q, &back, err);
}

/* 16 of 256 experts, each chosen by every 32nd token. */
static enum rt_status make_group(const struct rt_device *d, struct group *g, int64_t each, bool quantised, struct rt_err *err)
{
    const int64_t n = each * 32, rows = each * GROUP;
    int32_t *perm = NULL, *device_perm = NULL;
    float *weight = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)rows, sizeof *perm, "rows", &perm, err));
    for (int e = 0; e < GROUP; e++) {
        g->offset[e + 1] = (int32_t)((e + 1) * each);
        for (int64_t i = 0; i < each; i++)
            perm[e * each + i] = (int32_t)((i * 32 + 2 * e) * TOP_K + e % TOP_K);
        for (int m = 0; m < 3; m++) {
            RT_TRY(make_weight(d, true, m < 2 ? I : H, m < 2 ? H : I, &g->w[m][e], err));
            g->list[m][e] = g->w[m][e].w;
        }
    }
    RT_TRY(d->be->alloc(d->dev, (size_t)rows * 4, (void **)&device_perm, err));
    RT_TRY(rt_device_upload(d, device_perm, perm, (size_t)rows * 4, err));
    RT_TRY(fill(d, SCALES, (size_t)(n * TOP_K) * 4, &weight, err));
    g->a = (struct rt_moe_ffn_args){.perm = device_perm, .weight = weight, .offset = g->offset, .gate = g->list[0], .up = g->list[1], .down = g->list[2],
                                    .n = n, .n_experts = GROUP, .k = TOP_K, .H = H, .I = I};
    RT_TRY(fill(d, quantised ? CODES : NUMBERS, (size_t)(n * H) * (quantised ? 1 : 2), &g->a.x.data, err));
    if (quantised)
        RT_TRY(fill(d, SCALES, (size_t)(n * (H / 128)) * 4, &g->a.x.scale, err));
    RT_TRY(fill(d, NUMBERS, (size_t)(n * H) * 2, &g->a.y, err));
    if (quantised) {
        RT_TRY(fill(d, CODES, (size_t)(rows * H), &g->xg.data, err));
        RT_TRY(fill(d, SCALES, (size_t)(rows * (H / 128)) * 4, &g->xg.scale, err));
        RT_TRY(fill(d, CODES, (size_t)(rows * I), &g->h.data, err));
        RT_TRY(fill(d, SCALES, (size_t)(rows * (I / 128)) * 4, &g->h.scale, err));
        RT_TRY(fill(d, NUMBERS, (size_t)(rows * I) * 4, &g->gate_up, err));
        RT_TRY(fill(d, NUMBERS, (size_t)(rows * H) * 2, &g->out, err));
    }
    (void)rt_cuda_moe_place(g->offset, GROUP, 4, g->base);
out:
    rt_free(perm);
    return st;
}

static void free_group(const struct rt_device *d, struct group *g)
{
    void *const all[] = {(void *)(uintptr_t)g->a.perm, (void *)(uintptr_t)g->a.weight, g->a.x.data, g->a.x.scale, g->a.y, g->xg.data, g->xg.scale,
                         g->h.data, g->h.scale, g->gate_up, g->out};
    rt_cuda_moe_group_release(d->q, &g->t);
    (void)rt_device_sync(d, NULL);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        d->be->free(d->dev, all[i]);
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < GROUP; e++)
            free_weight(d, &g->w[m][e]);
}

static enum rt_status experts(const struct rt_device *d, int64_t each, bool quantised, struct rt_err *err)
{
    struct rt_dev *dev = d->dev;
    void *encode = dev->encode_map;
    static struct group g; /* large */
    const int64_t rows = each * GROUP;
    const double flop = 6.0 * (double)rows * H * I;
    const struct {
        const char *name;
        call f;
        double flop, bytes;
        bool own;
    } stages[] = {
        {"tables", call_tables, 0, (double)(each * 32 * TOP_K) * 4 + (double)rows * 20, false},
        {"gather", call_gather, 0, 2 * (double)rows * (H + H / 32), false},
        {"products, library", call_library, flop, 0, false},
        {"gate and quantise (library)", call_swiglu, 0, (double)rows * (I * 5 + I / 32), false},
        {"gather of scales", call_scales, 0, 2 * (double)rows * (H / 32), false},
        {"gate and up, quantised (own)", call_own_wide, flop * 2 / 3, 0, true},
        {"the same, rows at their tokens", call_own_gather, flop * 2 / 3, 0, true},
        {"gate and up, quantised (own)", call_own_wide, flop * 2 / 3, 0, true},
        {"the same, rows at their tokens", call_own_gather, flop * 2 / 3, 0, true},
        {"down (own)", call_own_down, flop / 3, 0, true},
        {"combine", call_combine, 0, (double)rows * H * 6, false},
    };
    double ms;
    enum rt_status st;
    memset(&g, 0, sizeof g);
    RT_TRY(make_group(d, &g, each, quantised, err));
    d->be->set_scratch(d->dev, (uint64_t)8 << 30);
    for (int way = 0; way < (quantised ? 2 : 1); way++) {
        dev->encode_map = way == 0 ? encode : NULL;
        RT_TRY(measure(d, call_moe, &g, &ms, err));
        report(!quantised ? "moe_ffn w8a16" : way == 0 ? "moe_ffn w8a8" : "moe_ffn w8a8, library", rows, I, H, flop, ms, quantised ? 1979 : 990);
    }
    for (size_t i = 0; i < sizeof stages / sizeof *stages && quantised; i++) {
        if (stages[i].own && encode == NULL)
            continue;
        dev->encode_map = stages[i].own ? encode : NULL;
        RT_TRY(measure(d, stages[i].f, &g, &ms, err));
        if (stages[i].flop > 0)
            printf("      %-30s %29s  %8.3f ms  %6.0f TFLOP/s\n", stages[i].name, "", ms, stages[i].flop / ms * 1e-9);
        else
            printf("      %-30s %29s  %8.3f ms  %6.0f GB/s\n", stages[i].name, "", ms, stages[i].bytes / ms * 1e-6);
    }
out:
    dev->encode_map = encode;
    free_group(d, &g);
    return st;
}

/* One MLP over all tokens: the shared expert, a dense layer. */
static enum rt_status mlp(const struct rt_device *d, int64_t n, int64_t inter, struct rt_err *err)
{
    static struct group g; /* large */
    const int32_t all[2] = {0, (int32_t)n};
    double ms;
    enum rt_status st;
    memset(&g, 0, sizeof g);
    for (int m = 0; m < 3; m++) {
        RT_TRY(make_weight(d, true, m < 2 ? inter : H, m < 2 ? H : inter, &g.w[m][0], err));
        g.list[m][0] = g.w[m][0].w;
    }
    RT_TRY(fill(d, CODES, (size_t)(n * H), &g.a.x.data, err));
    RT_TRY(fill(d, SCALES, (size_t)(n * (H / 128)) * 4, &g.a.x.scale, err));
    RT_TRY(fill(d, NUMBERS, (size_t)(n * H) * 2, &g.a.y, err));
    g.a.offset = all;
    g.a.gate = g.list[0];
    g.a.up = g.list[1];
    g.a.down = g.list[2];
    g.a.n = n;
    g.a.n_experts = g.a.k = 1;
    g.a.H = H;
    g.a.I = (int)inter;
    RT_TRY(measure(d, call_moe, &g, &ms, err));
    report("one MLP w8a8", n, inter, H, 6.0 * (double)n * (double)inter * H, ms, 1979);
out:
    free_group(d, &g);
    return st;
}

/* ---- the head ---- */

static enum rt_status call_head(const struct rt_device *d, void *ctx, struct rt_err *err)
{
    return d->be->head_topk(d->dev, d->q, ctx, err);
}

static enum rt_status head(const struct rt_device *d, int k, struct rt_err *err)
{
    enum { N = 1024, V = 129280 };
    static const float inv[3] = {1.0f / 0.6f, 1.0f, 0.5f};
    struct weight w = {0};
    struct rt_head_topk_args a = {.n = N, .H = H, .n_ids = V, .k = k, .n_lse = 3, .inv_temp = inv};
    void *x = NULL, *out = NULL, *z = NULL;
    double ms;
    enum rt_status st;
    RT_TRY(make_weight(d, false, V, H, &w, err));
    RT_TRY(fill(d, NUMBERS, (size_t)N * H * 2, &x, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)N * (size_t)(2 * k + 8) * 4, &out, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)N * V * 4, &z, err));
    a.w = w.w;
    a.x = x;
    a.next = (int32_t *)out; /* zeros */
    a.topk_ids = (uint32_t *)out + N;
    a.topk_logits = (float *)out + N + N * k;
    a.lse = a.topk_logits + N * k;
    a.next_logprob = a.lse + 3 * N;
    a.next_rank = (uint32_t *)(void *)(a.next_logprob + N);
    RT_TRY(measure(d, call_head, &a, &ms, err));
    printf("  head_topk, k %-21d %7d x %6d x %6d  %8.3f ms  %6.0f TFLOP/s  %.2f us a row\n", k, N, V, H, ms, 2.0 * N * V * H / ms * 1e-9, ms * 1e3 / N);
    struct rt_head_topk_args part = a;
    part.k = 0;
    part.topk_ids = NULL;
    RT_TRY(measure(d, call_head, &part, &ms, err));
    report("sums and rank alone", N, V, H, 2.0 * N * V * H, ms, 990);
    part = a;
    part.n_lse = 0;
    part.next = NULL;
    RT_TRY(measure(d, call_head, &part, &ms, err));
    report("the best alone", N, V, H, 2.0 * N * V * H, ms, 990);
    struct rt_linear_fwd_args l = {.x = {x, NULL}, .w = w.w, .y = z, .n = N, .K = H, .N = V, .y_f32 = true};
    RT_TRY(measure(d, call_forward, &l, &ms, err));
    report("its product alone", N, V, H, 2.0 * N * V * H, ms, 990);
out:
    free_weight(d, &w);
    d->be->free(d->dev, x);
    d->be->free(d->dev, out);
    d->be->free(d->dev, z);
    return st;
}

static enum rt_status run(const struct rt_device *d, char *const *list, struct rt_err *err)
{
    static const struct {
        const char *name;
        int64_t N, K;
    } teacher[] = {{"q_a", 1536, 7168}, {"q_b", 24576, 1536}, {"kv_a", 576, 7168}, {"kv_b", 32768, 512}, {"o", 7168, 16384}},
      student[] = {{"gate_up 1.5B", 17920, 1536}, {"down 1.5B", 1536, 8960}, {"qkv 7B", 4608, 3584}};
    enum rt_status st = RT_OK;
    for (size_t i = 0; i < sizeof teacher / sizeof *teacher && bench_wanted(list, "linear"); i++)
        for (int64_t n = 8192; n <= 16384; n *= 2)
            RT_TRY(teacher_linear(d, teacher[i].name, n, teacher[i].N, teacher[i].K, err));
    if (bench_wanted(list, "linear"))
        RT_TRY(teacher_linear(d, "q_b, odd", 8190, 24576, 1536, err));
    if (bench_wanted(list, "experts")) {
        for (int64_t each = 1024; each <= 8192; each *= each == 1024 ? 4 : 2)
            RT_TRY(experts(d, each, true, err));
        RT_TRY(experts(d, 4096, false, err));
        RT_TRY(mlp(d, 65536, 2048, err));
        RT_TRY(mlp(d, 16384, 18432, err));
    }
    if (bench_wanted(list, "head")) {
        RT_TRY(head(d, 64, err));
        RT_TRY(head(d, 256, err));
    }
    for (size_t i = 0; i < sizeof student / sizeof *student && bench_wanted(list, "student"); i++)
        RT_TRY(student_linear(d, student[i].name, 16384, student[i].N, student[i].K, err));
out:
    return st;
}

int main(int argc, char **argv)
{
    return bench_cuda_main("bench_cuda_gemm", run, argc, argv);
}

#else

int main(void)
{
    printf("built without CUDA\n");
    return 0;
}

#endif
