/* What a GPU gives: products in a burst and in a long run, and copies. A card at its power limit lowers its clock within a second under load, so the rate
 * that training and scoring can be measured by is that of the long run.
 *
 *     bench_cuda_limit [SECONDS]          default 3, of each kind
 *
 * Products are 8192 x 8192 x 8192 of random numbers, by the library: bfloat16, and e4m3 codes with block scales where the card has them. Burst: the median
 * of the first ten behind a pause. Long run: the last third of SECONDS. Copies: 2 GB from device memory to device memory, bytes read and written.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/median.h"
#include "core/backend.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/rng.h"

#ifdef RT_CUDA

enum { SIDE = 8192, BURST = 10, BLOCK = 1048573 /* odd: rows differ */, COPY = 1 << 30 };

enum kind { BF16, E4M3, SCALES };

/* bytes of device memory: one block of random elements of the kind, again and again. */
static enum rt_status fill(const struct rt_device *d, enum kind kind, size_t bytes, void *out_ptr, struct rt_err *err)
{
    const size_t size = kind == BF16 ? 2 : kind == E4M3 ? 1 : 4, one = BLOCK * size;
    char *host = NULL, *p;
    enum rt_status st;
    RT_TRY(rt_alloc(BLOCK, size, "numbers", &host, err));
    for (int i = 0; i < BLOCK; i++) {
        const float x = rt_rng_normal(1, (uint64_t)kind, (uint64_t)i);
        if (kind == BF16)
            ((uint16_t *)(void *)host)[i] = rt_f32_to_bf16(x);
        else if (kind == E4M3)
            ((uint8_t *)host)[i] = rt_f32_to_e4m3(100.0f * x);
        else
            ((float *)(void *)host)[i] = 0.01f * (1.0f + 0.1f * x);
    }
    RT_TRY(d->be->alloc(d->dev, bytes, (void **)&p, err));
    RT_TRY(rt_device_upload(d, p, host, bytes < one ? bytes : one, err));
    for (size_t have = one; have < bytes; have *= 2)
        RT_TRY(d->be->copy(d->dev, d->q, p + have, p, bytes - have < have ? bytes - have : have, err));
    RT_TRY(rt_device_sync(d, err));
    memcpy(out_ptr, &p, sizeof p);
out:
    rt_free(host);
    return st;
}

struct work {
    struct rt_linear_fwd_args product; /* w NULL: a copy instead */
    void *from, *to;
};

static enum rt_status once(const struct rt_device *d, const struct work *w, struct rt_err *err)
{
    return w->product.w != NULL ? d->be->linear_fwd(d->dev, d->q, &w->product, err) : d->be->copy(d->dev, d->q, w->to, w->from, COPY, err);
}

/* Seconds of one in a burst, and in the last third of a long run. */
static enum rt_status measure(const struct rt_device *d, const struct work *w, double seconds, double *burst, double *run, struct rt_err *err)
{
    enum { TOGETHER = 20 };
    double t[BURST], last = 0;
    int64_t n = 0;
    enum rt_status st;
    for (int i = -2; i < BURST; i++) { /* the first two make the choice and load the kernel */
        if (i == 0)
            (void)sleep(1);
        const double start = rt_now();
        RT_TRY(once(d, w, err));
        RT_TRY(rt_device_sync(d, err));
        if (i >= 0)
            t[i] = rt_now() - start;
    }
    qsort(t, BURST, sizeof *t, bench_by_value);
    *burst = t[BURST / 2];
    for (const double start = rt_now(); n == 0 || rt_now() - start < seconds;) {
        const double from = rt_now();
        for (int i = 0; i < TOGETHER; i++)
            RT_TRY(once(d, w, err));
        RT_TRY(rt_device_sync(d, err));
        if (from - start < seconds * 2 / 3)
            continue;
        last += rt_now() - from;
        n += TOGETHER;
    }
    *run = last / (double)n;
out:
    return st;
}

static enum rt_status product(const struct rt_device *d, bool e4m3, double seconds, struct rt_err *err)
{
    enum { BLOCKS = SIDE / 128 };
    const size_t all = (size_t)SIDE * SIDE, scales = (size_t)SIDE * BLOCKS * 4;
    struct rt_weight_src src = {.name = "w", .dtype = e4m3 ? RT_E4M3 : RT_BF16, .rows = SIDE, .cols = SIDE};
    struct work k = {.product = {.n = SIDE, .K = SIDE, .N = SIDE}};
    void *w = NULL, *w_scale = NULL, *x = NULL, *x_scale = NULL, *y = NULL;
    struct rt_weight *weight = NULL;
    double burst, run;
    enum rt_status st;
    RT_TRY(fill(d, e4m3 ? E4M3 : BF16, all * (e4m3 ? 1 : 2), &w, err));
    RT_TRY(fill(d, e4m3 ? E4M3 : BF16, all * (e4m3 ? 1 : 2), &x, err));
    if (e4m3) {
        RT_TRY(fill(d, SCALES, (size_t)BLOCKS * BLOCKS * 4, &w_scale, err));
        RT_TRY(fill(d, SCALES, scales, &x_scale, err));
    }
    RT_TRY(d->be->alloc(d->dev, all * 2, &y, err));
    src.device_data = w;
    src.device_scale = w_scale;
    RT_TRY(d->be->weight_load(d->dev, d->q, &src, &weight, err));
    k.product.x = (struct rt_act){x, x_scale};
    k.product.w = weight;
    k.product.y = y;
    RT_TRY(measure(d, &k, seconds, &burst, &run, err));
    const double flop = 2.0 * SIDE * SIDE * SIDE;
    printf("  %-28s %8.0f TFLOP/s in a burst, %.0f in a long run\n", e4m3 ? "e4m3, block scales" : "bfloat16", flop / burst / 1e12, flop / run / 1e12);
    fflush(stdout);
out:
    d->be->weight_free(d->dev, weight);
    void *const owned[] = {w, w_scale, x, x_scale, y};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        d->be->free(d->dev, owned[i]);
    return st;
}

static enum rt_status copies(const struct rt_device *d, double seconds, struct rt_err *err)
{
    struct work k = {0};
    double burst, run;
    enum rt_status st;
    RT_TRY(fill(d, BF16, COPY, &k.from, err));
    RT_TRY(d->be->alloc(d->dev, COPY, &k.to, err));
    RT_TRY(measure(d, &k, seconds, &burst, &run, err));
    printf("  %-28s %8.2f TB/s in a burst, %.2f in a long run\n", "copies", 2.0 * COPY / burst / 1e12, 2.0 * COPY / run / 1e12);
out:
    d->be->free(d->dev, k.from);
    d->be->free(d->dev, k.to);
    return st;
}

int main(int argc, char **argv)
{
    const double seconds = argc > 1 ? atof(argv[1]) : 3;
    struct rt_err err = {0};
    struct rt_device d = {0};
    char why[160];
    enum rt_status st;
    if (argc > 2 || !(seconds > 0 && seconds <= 600)) {
        fprintf(stderr, "usage: bench_cuda_limit [SECONDS of each kind, at most 600]\n");
        return rt_exit_code(RT_USAGE);
    }
    if (!rt_backend_cuda.available(why, sizeof why)) {
        printf("%s\n", why);
        return 0;
    }
    RT_TRY(rt_device_open(&rt_backend_cuda, &(struct rt_dev_options){0}, &d, &err));
    printf("%s\n", d.be->describe(d.dev));
    RT_TRY(product(&d, false, seconds, &err));
    RT_TRY(product(&d, true, seconds, &err));
    RT_TRY(copies(&d, seconds, &err));
out:
    rt_device_close(&d);
    if (st != RT_OK)
        fprintf(stderr, "bench_cuda_limit: %s\n", err.msg);
    return rt_exit_code(st);
}

#else

int main(void)
{
    printf("built without CUDA\n");
    return 0;
}

#endif
