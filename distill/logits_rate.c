/* How fast this machine multiplies and reads: what a run is held against. */
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#include "distill/logits.h"
#include "teacher/read_probe.h"

enum { WIDTH = 2048, MOST_ROWS = 1 << 14 };
#define LONG_ENOUGH 0.03 /* seconds */

struct product {
    const struct rt_device *d;
    void *x, *w, *y;            /* device: [MOST_ROWS, WIDTH], [WIDTH, WIDTH], [MOST_ROWS, WIDTH] act */
    struct rt_act xq;           /* e4m3 form of x (w8a8) */
    struct rt_weight *weight;
    uint8_t *codes;
    float *scale;
};

/* Values that are no zeros: some processors are quicker with those. */
static enum rt_status fill(const struct product *p, void *dst, int64_t n, struct rt_err *err)
{
    const size_t act = rt_device_act_size(p->d);
    float some[WIDTH];
    char row[WIDTH * sizeof(double)];
    enum rt_status st = RT_OK;
    for (int i = 0; i < WIDTH; i++)
        some[i] = rt_rng_normal(1, 2, (uint64_t)i);
    rt_from_f32(row, p->d->be->act, some, WIDTH);
    for (int64_t at = 0; at < n; at += WIDTH)
        RT_TRY(rt_device_upload(p->d, (char *)dst + (size_t)at * act, row, WIDTH * act, err));
    RT_TRY(rt_device_sync(p->d, err));
out:
    return st;
}

static enum rt_status open_product(struct product *p, bool fp8, int64_t rows, struct rt_err *err)
{
    const struct rt_device *d = p->d;
    const size_t act = rt_device_act_size(d), matrix = (size_t)WIDTH * WIDTH, tall = (size_t)rows * WIDTH;
    enum rt_status st;
    RT_TRY(d->be->alloc(d->dev, tall * act, &p->x, err));
    RT_TRY(d->be->alloc(d->dev, tall * act, &p->y, err));
    RT_TRY(fill(p, p->x, (int64_t)tall, err));
    if (!fp8) {
        RT_TRY(d->be->alloc(d->dev, matrix * act, &p->w, err));
        RT_TRY(fill(p, p->w, (int64_t)matrix, err));
        return d->be->weight_param(d->dev, p->w, WIDTH, WIDTH, &p->weight, err);
    }
    void *scales;
    RT_TRY(rt_alloc(matrix, 1, "a product to measure", &p->codes, err));
    RT_TRY(rt_alloc((WIDTH / 128) * (WIDTH / 128), sizeof(float), "a product to measure", &p->scale, err));
    for (size_t i = 0; i < matrix; i++)
        p->codes[i] = (uint8_t)(0x20 + i * 7 % 0x30);
    for (int i = 0; i < (WIDTH / 128) * (WIDTH / 128); i++)
        p->scale[i] = 0.01f;
    const struct rt_weight_src src = {.name = "a product to measure", .dtype = RT_E4M3, .rows = WIDTH, .cols = WIDTH, .data = p->codes, .scale_inv = p->scale};
    RT_TRY(d->be->weight_load(d->dev, d->q, &src, &p->weight, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)rt_act_rows(rows) * WIDTH, &p->xq.data, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)rt_act_rows(rows) * (WIDTH / 128) * sizeof(float), &scales, err));
    p->xq.scale = scales;
out:
    return st;
}

static void close_product(struct product *p)
{
    const struct rt_device *d = p->d;
    void *const block[] = {p->x, p->w, p->y, p->xq.data, p->xq.scale};
    d->be->weight_free(d->dev, p->weight);
    for (size_t i = 0; i < sizeof block / sizeof *block; i++)
        if (block[i] != NULL)
            d->be->free(d->dev, block[i]);
    rt_free(p->codes);
    rt_free(p->scale);
}

static enum rt_status time_product(const struct product *p, int64_t n, double *seconds, struct rt_err *err)
{
    enum rt_status st;
    const bool fp8 = p->xq.data != NULL;
    if (fp8)
        RT_TRY(RT_OP(p->d, quant, err, .x = p->x, .q = p->xq, .n = n, .cols = WIDTH));
    RT_TRY(rt_device_sync(p->d, err));
    const double t0 = rt_now();
    RT_TRY(RT_OP(p->d, linear_fwd, err, .x = fp8 ? p->xq : (struct rt_act){.data = p->x}, .w = p->weight, .y = p->y, .n = n, .K = WIDTH, .N = WIDTH));
    RT_TRY(rt_device_sync(p->d, err));
    *seconds = rt_now() - t0;
out:
    return st;
}

/* More rows until a product takes long enough to be timed; then the best of a few, because other programs run too. */
static enum rt_status measure_product(const struct rt_device *d, bool fp8, double *rate, struct rt_err *err)
{
    struct product p = {.d = d};
    const int64_t most = d->be->own_memory ? MOST_ROWS : 1024;
    int64_t n = 16;
    double seconds = 0, best;
    enum rt_status st;
    RT_TRY(open_product(&p, fp8, most, err));
    for (;; n *= 4) {
        RT_TRY(time_product(&p, n, &seconds, err));
        if (seconds > LONG_ENOUGH || n >= most)
            break;
    }
    best = seconds;
    for (int i = 0; i < 3 && seconds < 5 * LONG_ENOUGH; i++) {
        RT_TRY(time_product(&p, n, &seconds, err));
        best = seconds < best ? seconds : best;
    }
    *rate = 2.0 * (double)n * WIDTH * WIDTH / best;
out:
    close_product(&p);
    return st;
}

/* Each count of threads for a fifth of a second: long enough for some chunks of each on a slow disk. */
static enum rt_status measure_reading(const char *teacher, int most, bool exact, struct rt_logits_rates *out, struct rt_err *err)
{
    struct rt_tensors *ts = NULL;
    struct rt_read_probe p;
    char one[32], other[32];
    enum rt_status st;
    RT_TRY(rt_tensors_open(teacher, &ts, err));
    RT_TRY(rt_read_probe(ts, exact ? most : 1, most, 0.2, &p, err));
    if (p.best < 0)
        goto out;
    out->read = p.rate[p.best];
    out->readers = p.readers[p.best];
    if (p.n > 1)
        snprintf(out->read_name, sizeof out->read_name, "measured with %d reader%s; 1: %s/s, %d: %s/s", out->readers, out->readers > 1 ? "s" : "",
                 rt_human_bytes(one, (uint64_t)p.rate[0]), p.readers[p.n - 1], rt_human_bytes(other, (uint64_t)p.rate[p.n - 1]));
    else
        snprintf(out->read_name, sizeof out->read_name, "measured with %d reader%s", out->readers, out->readers > 1 ? "s" : "");
out:
    rt_tensors_free(ts);
    return st;
}

void rt_logits_measure(const struct rt_device *d, bool fp8, const char *teacher, int readers, bool exact, struct rt_logits_rates *out)
{
    struct rt_err none = {0};
    *out = (struct rt_logits_rates){0};
    if (measure_product(d, fp8, &out->flops, &none) != RT_OK)
        out->flops = 0;
    snprintf(out->flops_name, sizeof out->flops_name, "%s product measured here", fp8 ? "an e4m3" : d->be->act == RT_BF16 ? "a bfloat16" : "a float32");
    if (measure_reading(teacher, readers, exact, out, &none) != RT_OK)
        out->read = 0;
}
