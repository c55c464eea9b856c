/* Teachers: w8a16 end to end; w8a8 layer by layer, each from its expected input. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "teacher/score.h"
#include "tests/oracle.h"

enum {
    RETRIES = 64, /* a row with six near ties takes the expected side of all with even odds */
};

struct run {
    struct oracle *o;
    const struct rt_device *d;
    const struct rt_tensors *ex;
    struct rt_teacher *t;
    const char *mode;
    int64_t n, H;
    float *final;
};

static void compare_state(void *self, int layer, const void *x, int64_t n)
{
    struct run *r = self;
    char name[64];
    int64_t count;
    float *a = malloc((size_t)(n * r->H) * sizeof *a);
    if (layer == RT_LAYER_FINAL)
        snprintf(name, sizeof name, "%s.final", r->mode);
    else
        snprintf(name, sizeof name, "%s.hidden_%d", r->mode, layer);
    float *b = oracle_expected(r->ex, name, &count);
    oracle_download(r->d, a, x, n * r->H);
    if (layer == RT_LAYER_FINAL)
        memcpy(r->final, a, (size_t)(n * r->H) * sizeof *a);
    if (b != NULL && count == n * r->H)
        oracle_tensor(r->o, name, a, b, n, r->H, 1e-4);
    else
        oracle_fail(r->o, name, "expected tensor is missing or of another size");
    free(a);
    free(b);
}

static void compare_logits(struct run *r, const char *what, const void *final, const uint32_t *ids, double bound)
{
    char name[64];
    int64_t count;
    struct rt_err err = {0};
    const bool mtp = strcmp(what, "mtp_logits") == 0;
    const int64_t rows = mtp ? r->n - 1 : r->n, V = rt_teacher_config(r->t)->vocab_size;
    snprintf(name, sizeof name, "%s.%s", r->mode, what);
    float *b = oracle_expected(r->ex, name, &count), *a = malloc((size_t)(rows * V) * sizeof *a);
    if (b == NULL || count != rows * V)
        oracle_fail(r->o, name, "expected tensor is missing or of another size");
    else if ((mtp ? rt_teacher_mtp_logits(r->t, ids, final, r->n, a, &err) : rt_teacher_logits(r->t, -1, final, r->n, a, &err)) != RT_OK)
        oracle_fail(r->o, name, err.msg);
    else
        oracle_tensor(r->o, name, a, b, rows, V, bound);
    free(a);
    free(b);
}

static void w8a16(struct run *r, const uint32_t *ids)
{
    const struct rt_score_options so = {.tap = compare_state, .tap_self = r};
    struct rt_rows seq = {.n_tokens = r->n, .ids = ids};
    struct rt_err err = {0};
    void *final;
    if (rt_teacher_score(r->t, &so, &seq, 1, 0, NULL, &err) != RT_OK) {
        oracle_fail(r->o, "w8a16", err.msg);
        return;
    }
    if (r->d->be->alloc(r->d->dev, (size_t)(r->n * r->H) * rt_device_act_size(r->d), &final, &err) != RT_OK)
        return;
    oracle_upload(r->d, final, r->final, r->n * r->H);
    compare_logits(r, "logits", final, ids, 1e-4);
    if (rt_teacher_config(r->t)->mtp_layers > 0)
        compare_logits(r, "mtp_logits", final, ids, 1e-4);
    r->d->be->free(r->d->dev, final);
}

/* A backend that moves what goes into the e4m3 quantiser by the size of float32's rounding in the sums before it: row t by a function of
 * seed[t], rows with seed 0 not at all. See layer_rows. */
static struct {
    const struct rt_backend *inner;
    const uint64_t *seed;
    uint64_t call; /* counts quantisers since the run began, so that each draws its own numbers */
} noise;
#define NOISE 1e-6 /* of the row's root mean square: sqrt(256 terms) * 2^-24 */

static void move_rows(struct rt_dev *dev, struct rt_queue *q, float *x, int64_t n, int64_t cols)
{
    struct rt_err err = {0};
    float *host = malloc((size_t)(n * cols) * sizeof *host);
    noise.inner->download(dev, q, host, x, (size_t)(n * cols) * sizeof *host, &err);
    noise.inner->queue_sync(dev, q, &err);
    noise.call++;
    for (int64_t t = 0; t < n; t++) {
        double sum = 0;
        for (int64_t j = 0; j < cols; j++)
            sum += (double)host[t * cols + j] * host[t * cols + j];
        const double size = noise.seed[t] != 0 ? NOISE * sqrt(sum / (double)cols) : 0;
        for (int64_t j = 0; size > 0 && j < cols; j++)
            host[t * cols + j] += (float)(size * rt_rng_normal(noise.seed[t], noise.call, (uint64_t)j));
    }
    noise.inner->upload(dev, q, x, host, (size_t)(n * cols) * sizeof *host, &err);
    noise.inner->queue_sync(dev, q, &err);
    free(host);
}

/* q = e4m3 form of the moved x; float32 backends. */
static enum rt_status noisy_quant(struct rt_dev *dev, struct rt_queue *q, const struct rt_quant_args *a, struct rt_err *err)
{
    struct rt_quant_args moved = *a;
    void *x;
    const size_t bytes = (size_t)(a->n * a->cols) * sizeof(float);
    enum rt_status st = noise.inner->alloc(dev, bytes, &x, err);
    if (st != RT_OK)
        return st;
    st = noise.inner->copy(dev, q, x, a->x, bytes, err);
    move_rows(dev, q, x, a->n, a->cols);
    moved.x = x;
    if (st == RT_OK)
        st = noise.inner->quant(dev, q, &moved, err);
    noise.inner->free(dev, x);
    return st;
}

static enum rt_status noisy_norm(struct rt_dev *dev, struct rt_queue *q, const struct rt_norm_fwd_args *a, struct rt_err *err)
{
    struct rt_norm_fwd_args plain = *a;
    void *own = NULL; /* where the engine does not want the row itself */
    enum rt_status st = RT_OK;
    plain.yq = (struct rt_act){0};
    if (a->y == NULL && a->yq.data != NULL)
        st = noise.inner->alloc(dev, (size_t)(a->n * a->cols) * sizeof(float), &own, err);
    plain.y = own != NULL ? own : a->y;
    if (st == RT_OK)
        st = noise.inner->norm_fwd(dev, q, &plain, err);
    if (st == RT_OK && a->yq.data != NULL)
        st = noisy_quant(dev, q, &(const struct rt_quant_args){.x = plain.y, .q = a->yq, .n = a->n, .cols = a->cols, .pow2 = a->pow2}, err);
    if (own != NULL)
        noise.inner->free(dev, own);
    return st;
}

/* The quantiser between the two products of an expert is inside the operation: its input moves with the scales of x. */
static enum rt_status noisy_ffn(struct rt_dev *dev, struct rt_queue *q, const struct rt_moe_ffn_args *a, struct rt_err *err)
{
    struct rt_moe_ffn_args moved = *a;
    if (a->x.scale == NULL)
        return noise.inner->moe_ffn(dev, q, a, err);
    const int64_t blocks = a->H / 128, n = blocks * a->n;
    float *host = malloc((size_t)n * sizeof *host);
    void *scale;
    enum rt_status st = noise.inner->alloc(dev, (size_t)n * sizeof *host, &scale, err);
    if (st == RT_OK) {
        noise.call++;
        noise.inner->download(dev, q, host, a->x.scale, (size_t)n * sizeof *host, err);
        noise.inner->queue_sync(dev, q, err);
        for (int64_t i = 0; i < n; i++)
            if (noise.seed[i % a->n] != 0)
                host[i] *= (float)(1 + NOISE * rt_rng_normal(noise.seed[i % a->n], noise.call, (uint64_t)(i / a->n)));
        noise.inner->upload(dev, q, scale, host, (size_t)n * sizeof *host, err);
        moved.x.scale = scale;
        st = noise.inner->moe_ffn(dev, q, &moved, err);
        noise.inner->free(dev, scale);
    }
    free(host);
    return st;
}

/* Errors of the rows of f, where float32 rounding decides which e4m3 code a value near a tie takes.
 *
 * A changed code moves its row, and through attention every row after it, by percents. So a row that differs is traced: what its token
 * sends into the quantisers is moved by rounding-sized amounts until the row agrees; then the next one. What cannot be brought to agree
 * so was not caused by a code (or by an expert chosen after one). Rows before the moved token cannot change: attention is causal.
 * best [rows] = the errors; returns how many rows were moved. */
static int64_t layer_rows(struct run *r, const float *x, const float *expected, int64_t rows, int64_t cols,
                          bool (*f)(struct run *, const float *, float *, void *), void *arg, double *best)
{
    uint64_t *seed = calloc((size_t)r->n + 1, sizeof *seed);
    float *y = malloc((size_t)(rows * cols) * sizeof *y);
    int64_t given_up = -1, tried = 0, last = -1, moved = 0;
    struct rt_backend be = *r->d->be;
    be.quant = noisy_quant;
    be.norm_fwd = noisy_norm;
    be.moe_ffn = noisy_ffn;
    noise.inner = r->d->be;
    noise.seed = seed;
    noise.call = 0;
    struct rt_device noisy = *r->d;
    noisy.be = &be;
    r->t->ctx.d = &noisy;
    for (uint64_t k = 1; f(r, x, y, arg); k++, noise.call = 0) {
        int64_t first = -1;
        for (int64_t i = rows - 1; i >= 0; i--) {
            best[i] = oracle_row_error(y + i * cols, expected + i * cols, cols);
            if (best[i] > 1e-4 && i > given_up)
                first = i;
        }
        if (first < 0)
            break;
        tried = first == last ? tried + 1 : 0;
        last = first;
        if (tried == RETRIES)
            given_up = first; /* untraced: later rows are still worth a try */
        seed[first] = k;
    }
    for (int64_t i = 0; i < r->n; i++)
        moved += seed[i] != 0;
    r->t->ctx.d = r->d;
    free(seed);
    free(y);
    return moved;
}

static void check_rows(struct oracle *o, const char *name, const double *best, int64_t rows, int64_t moved)
{
    char other[96];
    int64_t good = 0;
    double worst = 0;
    for (int64_t i = 0; i < rows; i++) {
        good += best[i] <= 1e-4;
        worst = best[i] > 1e-4 ? fmax(worst, best[i]) : worst;
    }
    oracle_check(o, name, (double)good / (double)rows, 0.95, true);
    snprintf(other, sizeof other, "%s/other_rows", name);
    oracle_check(o, other, worst, 5e-2, false);
    snprintf(other, sizeof other, "%s/rows_traced_to_a_code", name);
    oracle_check(o, other, (double)moved, (double)rows, false);
}

static bool one_layer(struct run *r, const float *in, float *out, void *arg)
{
    struct rt_err err = {0};
    void *x;
    if (r->d->be->alloc(r->d->dev, (size_t)(r->n * r->H) * rt_device_act_size(r->d), &x, &err) != RT_OK)
        return false;
    oracle_upload(r->d, x, in, r->n * r->H);
    const bool good = rt_teacher_run_layer(r->t, *(const int *)arg, x, r->n, &err) == RT_OK;
    if (good)
        oracle_download(r->d, out, x, r->n * r->H);
    else
        oracle_fail(r->o, "w8a8", err.msg);
    r->d->be->free(r->d->dev, x);
    return good;
}

static bool mtp(struct run *r, const float *in, float *out, void *arg)
{
    struct rt_err err = {0};
    void *x;
    if (r->d->be->alloc(r->d->dev, (size_t)(r->n * r->H) * rt_device_act_size(r->d), &x, &err) != RT_OK)
        return false;
    oracle_upload(r->d, x, in, r->n * r->H);
    const bool good = rt_teacher_mtp_logits(r->t, arg, x, r->n, out, &err) == RT_OK;
    if (!good)
        oracle_fail(r->o, "w8a8.mtp_logits", err.msg);
    r->d->be->free(r->d->dev, x);
    return good;
}

static void w8a8(struct run *r, uint32_t *ids)
{
    const struct rt_teacher_config *c = rt_teacher_config(r->t);
    char name[64];
    int64_t count;
    double *best = malloc((size_t)r->n * sizeof *best);
    for (int l = 0; l < c->layers; l++) {
        snprintf(name, sizeof name, "w8a8.hidden_%d", l);
        float *in = oracle_expected(r->ex, name, &count);
        snprintf(name, sizeof name, "w8a8.hidden_%d", l + 1);
        float *out = oracle_expected(r->ex, name, &count);
        if (in != NULL && out != NULL && count == r->n * r->H) {
            const int64_t moved = layer_rows(r, in, out, r->n, r->H, one_layer, &l, best);
            check_rows(r->o, name, best, r->n, moved);
        } else {
            oracle_fail(r->o, name, "expected tensors are missing or of another size");
        }
        free(in);
        free(out);
    }
    float *final = oracle_expected(r->ex, "w8a8.final", &count);
    void *x;
    struct rt_err err = {0};
    if (final != NULL && r->d->be->alloc(r->d->dev, (size_t)(r->n * r->H) * rt_device_act_size(r->d), &x, &err) == RT_OK) {
        oracle_upload(r->d, x, final, r->n * r->H);
        compare_logits(r, "logits", x, ids, 1e-4);
        r->d->be->free(r->d->dev, x);
    }
    float *expected = oracle_expected(r->ex, "w8a8.mtp_logits", &count);
    if (final != NULL && expected != NULL && c->mtp_layers > 0 && count == (r->n - 1) * c->vocab_size) {
        const int64_t moved = layer_rows(r, final, expected, r->n - 1, c->vocab_size, mtp, ids, best);
        check_rows(r->o, "w8a8.mtp_logits", best, r->n - 1, moved);
    }
    free(final);
    free(expected);
    free(best);
}

static void run_mode(struct run *r, const char *dir, const char *mode, uint32_t *ids)
{
    struct rt_err err = {0};
    const struct rt_teacher_options o = {.dir = dir, .device = r->d, .w8a8 = strcmp(mode, "w8a8") == 0, .memory = (int64_t)8 << 30,
                                         .max_length = r->n, .data_tokens = r->n, .mtp = true};
    r->mode = mode;
    if (rt_teacher_open(&o, &r->t, &err) != RT_OK) {
        oracle_fail(r->o, mode, err.msg);
        return;
    }
    r->H = rt_teacher_config(r->t)->hidden;
    r->final = malloc((size_t)(r->n * r->H) * sizeof *r->final);
    if (o.w8a8)
        w8a8(r, ids);
    else
        w8a16(r, ids);
    free(r->final);
    rt_teacher_close(r->t);
}

void oracle_teacher(struct oracle *o, const struct rt_device *d, const char *dir, const struct rt_tensors *expected)
{
    struct run r = {.o = o, .d = d, .ex = expected};
    int64_t *wide = oracle_expected_ints(expected, "input_ids", &r.n);
    if (wide == NULL || r.n < 2) {
        oracle_fail(o, "input_ids", "missing, or fewer than two");
        free(wide);
        return;
    }
    uint32_t *ids = malloc((size_t)r.n * sizeof *ids);
    for (int64_t i = 0; i < r.n; i++)
        ids[i] = (uint32_t)wide[i];
    if (d->be->act == RT_BF16) {
        oracle_teacher_bf16(o, d, dir, expected, ids, r.n);
        goto out;
    }
    run_mode(&r, dir, "w8a16", ids);
    if (rt_tensors_find(expected, "w8a8.hidden_0") != NULL)
        run_mode(&r, dir, "w8a8", ids);
    else
        oracle_skip(o, "w8a8", "no FP8 checkpoint");
out:
    free(ids);
    free(wide);
}
