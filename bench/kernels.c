/* Speed of the cpu backend's products beside plain OpenBLAS.
 *
 *     bench_kernels [THREADS [REPEATS]]
 *
 * Each line: an operation and its shape, its GFLOP/s (best and median of the repeats), and what plain sgemm reaches on the same
 * multiplications from float32 operands: one call for each thread and matrix, over an equal share of the larger side. Both are timed
 * in turn in the same process.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/median.h"
#include "core/cpu/cpu.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/rng.h"

enum { MOST_REPEATS = 100, EXPERTS = 32, TOP = 4 };

struct bench {
    struct rt_device d;
    int threads, repeats;
    float *x, *y, *z; /* operands of any product here */
    uint16_t *w16;
    uint8_t *w8;
    float *scale, *wf;
    int32_t *ids, *perm, offset[EXPERTS + 1];
    uint32_t *top;
    struct rt_err err;
};

static void fatal(const struct bench *b)
{
    fprintf(stderr, "bench_kernels: %s\n", b->err.msg);
    exit(1);
}

/* ---- plain sgemm ---- */
struct product {
    int64_t m, n, k;
    const float *a, *b;
    float *c;
    int parts;
};

static void product_part(void *ctx, int64_t part, __attribute__((unused)) int worker)
{
    const struct product *p = ctx;
    if (p->m >= p->n) {
        const int64_t i0 = p->m * part / p->parts, i1 = p->m * (part + 1) / p->parts;
        rt_cpu_gemm_nt(i1 - i0, p->n, p->k, 1, p->a + i0 * p->k, p->k, p->b, p->k, 0, p->c + i0 * p->n, p->n);
    } else {
        const int64_t j0 = p->n * part / p->parts, j1 = p->n * (part + 1) / p->parts;
        rt_cpu_gemm_nt(p->m, j1 - j0, p->k, 1, p->a, p->k, p->b + j0 * p->k, p->k, 0, p->c + j0, p->n);
    }
}

static void plain(struct bench *b, int64_t m, int64_t n, int64_t k)
{
    struct product p = {m, n, k, b->x, b->wf, b->z, b->threads};
    rt_pool_run(b->d.dev->pool, p.parts, product_part, &p);
}

/* ---- timing ---- */
struct work {
    const char *name;
    int64_t m, n, k;  /* one product; `times` of them make the operation's multiplications */
    int64_t times;
    enum rt_status (*run)(struct bench *b, const struct work *w);
    const struct rt_weight *weight[3 * EXPERTS];
    bool exact;
};

static void measure(struct bench *b, const struct work *w)
{
    double ours[MOST_REPEATS], theirs[MOST_REPEATS];
    const double flop = 2.0 * (double)w->m * (double)w->n * (double)w->k * (double)w->times;
    for (int r = -1; r < b->repeats; r++) { /* the first round warms up */
        const double t0 = rt_now();
        if (w->run(b, w) != RT_OK)
            fatal(b);
        const double t1 = rt_now();
        for (int64_t i = 0; i < w->times; i++)
            plain(b, w->m, w->n, w->k);
        const double t2 = rt_now();
        if (r >= 0) {
            ours[r] = flop / (t1 - t0) * 1e-9;
            theirs[r] = flop / (t2 - t1) * 1e-9;
        }
    }
    qsort(ours, (size_t)b->repeats, sizeof *ours, bench_by_value);
    qsort(theirs, (size_t)b->repeats, sizeof *theirs, bench_by_value);
    const double best = ours[b->repeats - 1], mid = ours[b->repeats / 2], ref = theirs[b->repeats - 1],
                 ref_mid = theirs[b->repeats / 2];
    printf("%-24s %6lld %6lld %6lld x%-4lld  %7.1f %7.1f   %7.1f %7.1f   %5.0f%% %5.0f%%\n", w->name, (long long)w->m, (long long)w->n,
           (long long)w->k, (long long)w->times, best, mid, ref, ref_mid, 100 * best / ref, 100 * mid / ref_mid);
}

/* ---- operations ---- */
static enum rt_status linear(struct bench *b, const struct work *w)
{
    return RT_OP(&b->d, linear_fwd, &b->err, .x.data = b->x, .w = w->weight[0], .y = b->y, .n = w->m, .K = w->k, .N = w->n,
                 .row_exact = w->exact);
}

/* m rows, n inputs, k outputs: the same multiplications as the forward of [m, k] to n */
static enum rt_status dgrad(struct bench *b, const struct work *w)
{
    return RT_OP(&b->d, linear_dgrad, &b->err, .dy = b->x, .w = w->weight[0], .dx = b->y, .n = w->m, .K = w->k, .N = w->n);
}

static enum rt_status wgrad(struct bench *b, const struct work *w)
{
    return RT_OP(&b->d, linear_wgrad, &b->err, .dy = b->x, .x = b->wf, .dw = b->y, .n = w->m, .K = w->k, .N = w->n);
}

static enum rt_status head(struct bench *b, const struct work *w)
{
    static const float inv_temp[] = {1.0f / 0.6f, 1, 0.5f};
    return RT_OP(&b->d, head_topk, &b->err, .x = b->x, .w = w->weight[0], .next = b->ids, .n = w->m, .H = w->k, .n_ids = w->n, .k = 64,
                 .n_lse = 3, .inv_temp = inv_temp, .topk_ids = b->top, .topk_logits = b->y, .lse = b->z, .next_logprob = b->z + 3 * w->m,
                 .next_rank = (uint32_t *)(void *)(b->z + 4 * w->m));
}

/* times = 3 * experts, of m rows each: gate, up, down */
static enum rt_status experts(struct bench *b, const struct work *w)
{
    const int n = (int)(w->times / 3);
    return RT_OP(&b->d, moe_ffn, &b->err, .x.data = b->x, .perm = n > 1 ? b->perm : NULL, .weight = b->scale, .offset = b->offset,
                 .gate = w->weight, .up = w->weight + EXPERTS, .down = w->weight + 2 * EXPERTS, .y = b->y,
                 .n = n > 1 ? w->m * n / TOP : w->m, .n_experts = n, .k = TOP, .H = (int)w->k, .I = (int)w->n, .row_exact = w->exact);
}

static const struct rt_weight *weight(struct bench *b, enum rt_dtype t, int64_t rows, int64_t cols)
{
    struct rt_weight *w = NULL;
    const void *data = t == RT_F32 ? (void *)b->wf : t == RT_BF16 ? (void *)b->w16 : (void *)b->w8;
    const struct rt_weight_src src = {"w", t, rows, cols, data, t == RT_E4M3 ? b->scale : NULL, false, NULL, NULL};
    if (b->d.be->weight_load(b->d.dev, b->d.q, &src, &w, &b->err) != RT_OK)
        fatal(b);
    return w;
}

static void one(struct bench *b, const char *name, enum rt_status (*run)(struct bench *, const struct work *), enum rt_dtype t, int64_t m,
                int64_t n, int64_t k, bool exact)
{
    struct work w = {.name = name, .m = m, .n = n, .k = k, .times = 1, .run = run, .exact = exact};
    w.weight[0] = weight(b, t, n, k);
    measure(b, &w);
    b->d.be->weight_free(b->d.dev, (struct rt_weight *)w.weight[0]);
}

static void moe(struct bench *b, const char *name, enum rt_dtype t, int n, int64_t rows, int64_t I, int64_t H)
{
    struct work w = {.name = name, .m = rows, .n = I, .k = H, .times = 3 * n, .run = experts};
    for (int e = 0; e < n; e++) {
        w.weight[e] = weight(b, t, I, H);
        w.weight[EXPERTS + e] = weight(b, t, I, H);
        w.weight[2 * EXPERTS + e] = weight(b, t, H, I);
        b->offset[e] = (int32_t)(e * rows);
    }
    b->offset[n] = (int32_t)(n * rows);
    for (int32_t i = 0; i < n * rows; i++) /* expert e: tokens of its quarter, in order */
        b->perm[i] = (int32_t)((i % (n * rows / TOP)) * TOP + i / (n * rows / TOP));
    measure(b, &w);
    for (int i = 0; i < 3 * EXPERTS; i++)
        b->d.be->weight_free(b->d.dev, (struct rt_weight *)w.weight[i]);
}

static void *block(struct bench *b, size_t bytes)
{
    void *p;
    if (rt_alloc(bytes, 1, "an operand", &p, &b->err) != RT_OK)
        fatal(b);
    return p;
}

static void run_all(struct bench *b)
{
    static const int64_t shape[][3] = {{2048, 1024, 1024}, {2048, 4096, 1024}, {2048, 1024, 4096}, {2048, 512, 512}, {512, 512, 1024}, {64, 512, 1024}};
    static const struct { const char *name; enum rt_dtype t; } type[] = {{"linear_fwd f32", RT_F32}, {"linear_fwd bf16", RT_BF16}, {"linear_fwd e4m3", RT_E4M3}};
    for (size_t t = 0; t < sizeof type / sizeof *type; t++)
        for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
            one(b, type[t].name, linear, type[t].t, shape[s][0], shape[s][1], shape[s][2], false);
    for (int64_t m = 1; m <= 64; m *= 8)
        one(b, "linear_fwd f32 exact", linear, RT_F32, m, 1024, 1024, true);
    one(b, "linear_fwd bf16 exact", linear, RT_BF16, 8, 1024, 1024, true);
    one(b, "linear_dgrad", dgrad, RT_F32, 2048, 1024, 1024, false);
    one(b, "linear_dgrad", dgrad, RT_F32, 2048, 4096, 1024, false);
    one(b, "linear_wgrad", wgrad, RT_F32, 2048, 1024, 1024, false);
    one(b, "linear_wgrad", wgrad, RT_F32, 2048, 4096, 1024, false);
    one(b, "head_topk bf16", head, RT_BF16, 2048, 16384, 512, false);
    one(b, "head_topk f32", head, RT_F32, 512, 4096, 256, false);
    moe(b, "moe_ffn dense bf16", RT_BF16, 1, 2048, 1024, 1024);
    moe(b, "moe_ffn bf16", RT_BF16, 32, 128, 512, 1024);
    moe(b, "moe_ffn e4m3", RT_E4M3, 32, 128, 512, 1024);
    moe(b, "moe_ffn e4m3", RT_E4M3, 16, 512, 512, 1024);
    moe(b, "moe_ffn e4m3", RT_E4M3, 32, 32, 256, 512);
}

int main(int argc, char **argv)
{
    struct bench b = {.repeats = 7};
    enum { ELEMENTS = 1 << 24 };
    const int threads = argc > 1 ? atoi(argv[1]) : 0;
    if (argc > 2)
        b.repeats = atoi(argv[2]);
    if (b.repeats < 1 || b.repeats > MOST_REPEATS || threads < 0) {
        fprintf(stderr, "bench_kernels [THREADS [REPEATS 1 .. %d]]\n", MOST_REPEATS);
        return 2;
    }
    if (rt_device_open(&rt_backend_cpu, &(struct rt_dev_options){.threads = threads}, &b.d, &b.err) != RT_OK)
        fatal(&b);
    b.threads = b.d.dev->threads;
    b.x = block(&b, ELEMENTS * sizeof(float));
    b.y = block(&b, ELEMENTS * sizeof(float));
    b.z = block(&b, 3 * (size_t)ELEMENTS * sizeof(float));
    b.wf = block(&b, ELEMENTS * sizeof(float));
    b.w16 = block(&b, ELEMENTS * sizeof(uint16_t));
    b.w8 = block(&b, ELEMENTS);
    b.scale = block(&b, ELEMENTS / 64 * sizeof(float));
    b.ids = block(&b, 65536 * sizeof(int32_t));
    b.perm = block(&b, 65536 * sizeof(int32_t));
    b.top = block(&b, 65536 * 64 * sizeof(uint32_t));
    for (int64_t i = 0; i < ELEMENTS; i++) {
        b.x[i] = rt_rng_normal(1, 1, (uint64_t)(i % 1000003));
        b.wf[i] = 0.05f * rt_rng_normal(1, 2, (uint64_t)(i % 1000003));
    }
    rt_from_f32(b.w16, RT_BF16, b.wf, ELEMENTS);
    rt_from_f32(b.w8, RT_E4M3, b.x, ELEMENTS);
    for (int64_t i = 0; i < ELEMENTS / 64; i++)
        b.scale[i] = 0.05f;
    printf("%s\n%-24s %6s %6s %6s %-5s  %7s %7s   %7s %7s   %s\n", b.d.be->describe(b.d.dev), "operation", "rows", "out", "in", "times",
           "GFLOP/s", "median", "sgemm", "median", "share: best, median");
    run_all(&b);
    void *const blocks[] = {b.x, b.y, b.z, b.wf, b.w16, b.w8, b.scale, b.ids, b.perm, b.top};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        rt_free(blocks[i]);
    rt_device_close(&b.d);
    return 0;
}
