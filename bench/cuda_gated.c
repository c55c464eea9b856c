/* A student's MLP on the GPU: our own products against the library's, in turns of 0.3 s each (the card runs at its power limit then), after a comparison of
 * the results. With the gating in them: against the product and the operation behind it. plain: against what was chosen by measurements, which may be ours.
 *
 *     bench_cuda_gated [forward|backward|plain] [0.5b] [1.5b] [7b]          forward, all of them without an argument
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/backend.h"
#include "core/mem.h"
#include "core/rng.h"

#ifdef RT_CUDA
#include "bench/cuda_parts.h"
#include "core/cuda/gated_sm90.h"
#include "core/cuda/product_sm90.h"

enum { BLOCK = 1048573 /* odd: rows of a matrix differ */, ROWS_BEHIND = 64 };

struct product;
struct mlp {
    const struct rt_device *d;
    int64_t n, H, I;
    struct rt_weight *gate_up_w, *down_w;
    char *w1, *w2, *x, *gate_up, *h, *dy, *dh, *d_gate_up;      /* of the pair */
    char *gate_up2, *h2, *d_gate_up2;                           /* of the one */
    struct rt_cuda_gated one;
    bool back, product_alone;
    struct product *product;
};

static enum rt_status fill(const struct rt_device *d, double scale, size_t elements, char **out, struct rt_err *err)
{
    static uint16_t block[BLOCK];
    const size_t bytes = elements * 2, some = sizeof block;
    enum rt_status st;
    for (int i = 0; i < BLOCK; i++)
        block[i] = rt_f32_to_bf16((float)scale * rt_rng_normal(1, elements, (uint64_t)i));
    RT_TRY(d->be->alloc(d->dev, bytes, (void **)out, err));
    RT_TRY(rt_device_upload(d, *out, block, bytes < some ? bytes : some, err));
    for (size_t have = some; have < bytes; have *= 2)
        RT_TRY(d->be->copy(d->dev, d->q, *out + have, *out, bytes - have < have ? bytes - have : have, err));
    RT_TRY(rt_device_sync(d, err));
out:
    return st;
}

static enum rt_status pair(struct mlp *m, struct rt_err *err)
{
    enum rt_status st;
    const int64_t n = m->n, H = m->H, I = m->I;
    if (m->back) {
        RT_TRY(RT_OP(m->d, linear_dgrad, err, .dy = m->dy, .w = m->down_w, .dx = m->dh, .n = n, .K = I, .N = H));
        if (!m->product_alone)
            RT_TRY(RT_OP(m->d, swiglu_bwd, err, .gate = m->gate_up, .up = m->gate_up + 2 * I, .dh = m->dh, .ld = 2 * I, .dgate = m->d_gate_up,
                         .dup = m->d_gate_up + 2 * I, .h = m->h, .n = n, .I = I));
    } else {
        RT_TRY(RT_OP(m->d, linear_fwd, err, .x = {.data = m->x}, .w = m->gate_up_w, .y = m->gate_up, .n = n, .K = H, .N = 2 * I));
        if (!m->product_alone)
            RT_TRY(RT_OP(m->d, swiglu_fwd, err, .gate = m->gate_up, .up = m->gate_up + 2 * I, .ld = 2 * I, .h = m->h, .n = n, .I = I));
    }
out:
    return st;
}

static enum rt_status one(struct mlp *m, struct rt_err *err)
{
    return rt_cuda_gated(m->d->q, &m->one, err);
}

typedef enum rt_status (*call)(struct mlp *, struct rt_err *);

static enum rt_status turn(struct mlp *m, call f, double seconds, double *ms, struct rt_err *err)
{
    cudaEvent_t from, to;
    float t = 0;
    int repeat = 4;
    enum rt_status st = RT_OK;
    (void)cudaEventCreate(&from);
    (void)cudaEventCreate(&to);
    for (int round = 0; round < 2; round++) {
        (void)cudaEventRecord(from, m->d->q->stream);
        for (int i = 0; i < repeat; i++)
            RT_TRY(f(m, err));
        (void)cudaEventRecord(to, m->d->q->stream);
        RT_TRY(rt_device_sync(m->d, err));
        (void)cudaEventElapsedTime(&t, from, to);
        *ms = (double)t / repeat;
        repeat = (int)(seconds * 1e3 / *ms) + 1;
    }
out:
    (void)cudaEventDestroy(from);
    (void)cudaEventDestroy(to);
    return st;
}

/* Error of b beside a, relative to the norm of a, and how many elements differ, over the first and the last 2^24 elements. */
static enum rt_status compare(const struct rt_device *d, const char *what, const char *a, const char *b, int64_t elements, int64_t columns, struct rt_err *err)
{
    const int64_t most = 1 << 24, part = elements < most ? elements : most;
    uint16_t *x = NULL, *y = NULL;
    double num = 0, den = 0;
    int64_t differ = 0, seen = 0;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)part, 2, "numbers", &x, err));
    RT_TRY(rt_alloc((size_t)part, 2, "numbers", &y, err));
    for (int end = 0; end < (part < elements ? 2 : 1); end++) {
        const int64_t at = end == 0 ? 0 : (elements - part) * 2;
        RT_TRY(rt_device_download(d, x, a + at, (size_t)part * 2, err));
        RT_TRY(rt_device_download(d, y, b + at, (size_t)part * 2, err));
        for (int64_t i = 0; i < part; i++) {
            const double p = (double)rt_bf16_to_f32(x[i]), q = (double)rt_bf16_to_f32(y[i]);
            differ += x[i] != y[i];
            num += (p - q) * (p - q);
            den += p * p;
        }
        seen += part;
    }
    printf("    %-12s error %.2e, %.4f %% of %lld elements differ%s\n", what, sqrt(num / den), 1e2 * (double)differ / (double)seen, (long long)seen,
           sqrt(num / den) < 5e-3 ? "" : "   WRONG");
    for (int64_t i = 0, told = 0; i < part && told < 12 && !(sqrt(num / den) < 5e-3); i++) { /* of the last part */
        const double p = (double)rt_bf16_to_f32(x[i]), q = (double)rt_bf16_to_f32(y[i]);
        const int64_t at = elements - part + i;
        if (!(fabs(p - q) < 0.02 + 0.02 * fabs(p))) {
            printf("      row %lld column %lld: %g, %g\n", (long long)(at / columns), (long long)(at % columns), p, q);
            told++;
            i += told % 4 == 0 ? 37 * columns : 0;
        }
    }
out:
    rt_free(x);
    rt_free(y);
    return st;
}

/* Rows behind the last one are as they were. */
static enum rt_status untouched(const struct rt_device *d, const char *what, const char *p, size_t bytes, struct rt_err *err)
{
    unsigned char *x = NULL;
    enum rt_status st;
    size_t changed = 0;
    RT_TRY(rt_alloc(bytes, 1, "bytes", &x, err));
    RT_TRY(rt_device_download(d, x, p, bytes, err));
    for (size_t i = 0; i < bytes; i++)
        changed += x[i] != 0x5a;
    if (changed > 0)
        printf("    %s: %zu bytes behind the end changed   WRONG\n", what, changed);
out:
    rt_free(x);
    return st;
}

static enum rt_status check(struct mlp *m, int64_t n, struct rt_err *err)
{
    const int64_t I = m->I, all = m->n;
    const size_t behind = ROWS_BEHIND;
    const bool back = m->back;
    char *wide = back ? m->d_gate_up2 : m->gate_up2;
    enum rt_status st;
    m->n = n;
    m->product_alone = false;
    printf("  %s, n %lld\n", back ? "backward" : "forward", (long long)n);
    (void)cudaMemset(wide, 0x5a, (size_t)(n * 2 * I) * 2 + behind * (size_t)I * 4);
    (void)cudaMemset(m->h2, 0x5a, (size_t)(n * I) * 2 + behind * (size_t)I * 2);
    (void)cudaDeviceSynchronize(); /* queues do not wait for the default stream */
    m->back = false;
    RT_TRY(pair(m, err));
    m->back = back;
    m->one = (struct rt_cuda_gated){.a = back ? m->dy : m->x, .w = back ? m->w2 : m->w1, .gate_up = back ? m->gate_up : m->gate_up2,
                                    .d_gate_up = m->d_gate_up2, .h = m->h2, .n = n, .K = m->H, .I = I, .back = back};
    RT_TRY(pair(m, err));
    RT_TRY(one(m, err));
    RT_TRY(rt_device_sync(m->d, err));
    RT_TRY(compare(m->d, back ? "d gate, d up" : "gate, up", back ? m->d_gate_up : m->gate_up, wide, n * 2 * I, 2 * I, err));
    RT_TRY(untouched(m->d, "gate, up", wide + n * I * 4, behind * (size_t)I * 4, err));
    RT_TRY(compare(m->d, "h", m->h, m->h2, n * I, I, err));
    RT_TRY(untouched(m->d, "h", m->h2 + n * I * 2, behind * (size_t)I * 2, err));
    fflush(stdout);
out:
    m->n = all;
    return st;
}

static enum rt_status times(struct mlp *m, double seconds, struct rt_err *err)
{
    static const char *const name[] = {"library, pair", "library, product alone", "own, gated", "own, without h"};
    const double flop = (m->back ? 2.0 : 4.0) * (double)m->n * (double)m->H * (double)m->I;
    double ms, base = 1;
    enum rt_status st;
    m->product_alone = false;
    RT_TRY(turn(m, pair, seconds, &ms, err));
    for (int round = 0; round < 2; round++)
        for (int way = 0; way < 4; way++) {
            m->product_alone = way == 1;
            m->one.h = way == 3 ? NULL : m->h2;
            RT_TRY(turn(m, way < 2 ? pair : one, seconds, &ms, err));
            base = way == 0 ? ms : base;
            printf("  %-8s %-24s %8.4f ms  %6.1f TFLOP/s  %5.3f of the pair\n", m->back ? "backward" : "forward", name[way], ms, flop / ms * 1e-9, ms / base);
            fflush(stdout);
        }
out:
    return st;
}

/* ---- products alone ---- */

struct product {
    struct rt_cuda_gemm_args lib, own;
};
static enum rt_status by_library(struct mlp *m, struct rt_err *err)
{
    return rt_cuda_gemm(m->d->q, &m->product->lib, err);
}
static enum rt_status by_own(struct mlp *m, struct rt_err *err)
{
    return rt_cuda_product_sm90(m->d->q, &m->product->own, err);
}

static enum rt_status product(struct mlp *m, const char *name, struct rt_cuda_gemm_args g, void *own, struct rt_err *err)
{
    struct product p = {.lib = g, .own = g};
    double ms, base = 1;
    enum rt_status st;
    p.own.d = own;
    m->product = &p;
    RT_TRY(rt_device_zero(m->d, p.lib.d, (size_t)(g.m * g.n) * 2, err));
    RT_TRY(rt_device_zero(m->d, p.own.d, (size_t)(g.m * g.n) * 2, err));
    printf("  %s: [%lld, %lld] of %lld%s\n", name, (long long)g.m, (long long)g.n, (long long)g.k, g.accumulate ? ", +=" : "");
    RT_TRY(by_library(m, err)); /* measures: what it adds meanwhile does not count */
    RT_TRY(rt_device_sync(m->d, err));
    RT_TRY(rt_device_zero(m->d, p.lib.d, (size_t)(g.m * g.n) * 2, err));
    RT_TRY(by_library(m, err));
    RT_TRY(by_own(m, err));
    RT_TRY(rt_device_sync(m->d, err));
    RT_TRY(compare(m->d, name, p.lib.d, p.own.d, g.m * g.n, g.n, err));
    for (int round = 0; round < 2; round++)
        for (int way = 0; way < 2; way++) {
            RT_TRY(turn(m, way == 0 ? by_library : by_own, 0.3, &ms, err));
            base = way == 0 ? ms : base;
            printf("  %-24s %-10s %8.4f ms  %6.1f TFLOP/s  %5.3f of the choice's\n", name, way == 0 ? "choice" : "own", ms,
                   2.0 * (double)g.m * (double)g.n * (double)g.k / ms * 1e-9, ms / base);
        }
    fflush(stdout);
out:
    return st;
}

static enum rt_status products(struct mlp *m, struct rt_err *err)
{
    const int64_t n = m->n, H = m->H, I = m->I;
    enum rt_status st;
    RT_TRY(product(m, "down", (struct rt_cuda_gemm_args){.a = m->h, .b = m->w2, .d = m->dh, .m = n, .n = H, .k = I, .b_t = true}, m->h2, err));
    RT_TRY(product(m, "dgrad of gate and up", (struct rt_cuda_gemm_args){.a = m->gate_up, .b = m->w1, .d = m->dh, .m = n, .n = H, .k = 2 * I}, m->h2, err));
    RT_TRY(product(m, "wgrad of gate and up", (struct rt_cuda_gemm_args){.a = m->gate_up, .b = m->x, .d = m->dh, .m = 2 * I, .n = H, .k = n, .a_t = true,
                                                                           .accumulate = true}, m->h2, err));
    RT_TRY(product(m, "wgrad of down", (struct rt_cuda_gemm_args){.a = m->dy, .b = m->h, .d = m->dh, .m = H, .n = I, .k = n, .a_t = true,
                                                                    .accumulate = true}, m->h2, err));
out:
    return st;
}

static enum rt_status geometry(const struct rt_device *d, const char *name, int64_t H, int64_t I, bool back, bool plain, struct rt_err *err)
{
    struct mlp m = {.d = d, .n = 16384, .H = H, .I = I};
    const size_t n = 16384, rows = n + ROWS_BEHIND, h = (size_t)H, i = (size_t)I;
    char **const all[] = {&m.w1, &m.w2, &m.x, &m.gate_up, &m.h, &m.dy, &m.dh, &m.d_gate_up, &m.gate_up2, &m.h2, &m.d_gate_up2};
    enum rt_status st;
    printf("%s: %zu tokens, %lld -> 2 x %lld\n", name, n, (long long)H, (long long)I);
    RT_TRY(fill(d, 1 / sqrt((double)H), 2 * i * h, &m.w1, err));
    RT_TRY(fill(d, 1 / sqrt((double)H), i * h, &m.w2, err));
    RT_TRY(fill(d, 1, n * h, &m.x, err));
    RT_TRY(fill(d, 1, n * h, &m.dy, err));
    char **const outs[] = {&m.gate_up, &m.d_gate_up, &m.gate_up2, &m.d_gate_up2, &m.h, &m.h2, &m.dh};
    for (size_t k = 0; k < sizeof outs / sizeof *outs; k++)
        RT_TRY(d->be->alloc(d->dev, rows * i * (k < 4 ? 4 : 2), (void **)outs[k], err));
    RT_TRY(d->be->weight_param(d->dev, m.w1, 2 * I, H, &m.gate_up_w, err));
    RT_TRY(d->be->weight_param(d->dev, m.w2, H, I, &m.down_w, err));
    if (plain) {
        RT_TRY(pair(&m, err));
        RT_TRY(products(&m, err));
        goto out;
    }
    m.back = back;
    RT_TRY(check(&m, 1000, err));
    RT_TRY(check(&m, 16384, err));
    RT_TRY(times(&m, 0.3, err));
out:
    d->be->weight_free(d->dev, m.gate_up_w);
    d->be->weight_free(d->dev, m.down_w);
    for (size_t k = 0; k < sizeof all / sizeof *all; k++)
        d->be->free(d->dev, *all[k]);
    return st;
}

static enum rt_status run(const struct rt_device *d, char *const *list, struct rt_err *err)
{
    static const struct {
        const char *name;
        int64_t H, I;
    } all[] = {{"0.5b", 896, 4864}, {"1.5b", 1536, 8960}, {"7b", 3584, 18944}};
    char note[256];
    enum rt_status st;
    const bool back = *list != NULL && strcmp(*list, "backward") == 0, plain = *list != NULL && strcmp(*list, "plain") == 0;
    list += *list != NULL && (back || plain || strcmp(*list, "forward") == 0);
    RT_TRY(d->be->tune(d->dev, NULL, note, sizeof note, err)); /* as `train` does */
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (bench_wanted(list, all[i].name))
            RT_TRY(geometry(d, all[i].name, all[i].H, all[i].I, back, plain, err));
out:
    return st;
}

int main(int argc, char **argv)
{
    return bench_cuda_main("bench_cuda_gated", run, argc, argv);
}

#else

int main(void)
{
    printf("built without CUDA\n");
    return 0;
}

#endif
