#include "teacher/features.h"

#include <math.h>

#include "core/dtype.h"
#include "core/rng.h"

enum { ROWS = 512 };

enum rt_status rt_projection_matrix(uint64_t seed, int layer, int64_t dim, int64_t H, float *out, struct rt_err *err)
{
    double *m = NULL;
    const enum rt_status st = rt_alloc((size_t)(dim * H), sizeof *m, "projection", &m, err);
    if (st != RT_OK)
        return st;
    for (int64_t i = 0; i < dim; i++) {
        double *v = m + i * H;
        for (int64_t j = 0; j < H; j++)
            v[j] = rt_rng_normal(seed, (uint64_t)(layer + 2), (uint64_t)(i * H + j));
        for (int pass = 0; pass < 2; pass++) /* twice: once leaves errors that grow with dim */
            for (int64_t p = 0; p < i; p++) {
                double dot = 0;
                for (int64_t j = 0; j < H; j++)
                    dot += v[j] * m[p * H + j];
                for (int64_t j = 0; j < H; j++)
                    v[j] -= dot * m[p * H + j];
            }
        double norm = 0;
        for (int64_t j = 0; j < H; j++)
            norm += v[j] * v[j];
        for (int64_t j = 0; j < H; j++)
            v[j] /= sqrt(norm);
    }
    for (int64_t i = 0; i < dim * H; i++)
        out[i] = (float)m[i];
    rt_free(m);
    return RT_OK;
}

/* The projection as a device weight in act elements. */
static enum rt_status make_projection(struct rt_features *f, int i, struct rt_err *err)
{
    const struct rt_device *d = f->t->o.device;
    const struct rt_feature_spec *s = &f->o->feature[i];
    const int64_t H = f->t->c.hidden, n = s->dim * H;
    float *host = NULL;
    void *act = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)n, sizeof *host, "projection", &host, err));
    RT_TRY(rt_projection_matrix(f->o->projection_seed, s->layer, s->dim, H, host, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)n * rt_device_act_size(d), &f->matrix[i], err));
    RT_TRY(d->be->alloc(d->dev, (size_t)n * sizeof(float), &act, err));
    RT_TRY(rt_device_upload(d, act, host, (size_t)n * sizeof(float), err));
    RT_TRY(RT_OP(d, convert, err, .src = act, .dst = f->matrix[i], .n = n));
    RT_TRY(rt_device_sync(d, err));
    RT_TRY(d->be->weight_param(d->dev, f->matrix[i], s->dim, H, &f->weight[i], err));
out:
    if (act != NULL)
        d->be->free(d->dev, act);
    rt_free(host);
    return st;
}

enum rt_status rt_features_init(struct rt_features *f, struct rt_teacher *t, const struct rt_score_options *o, int64_t n, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    enum rt_status st = RT_OK;
    int64_t widest = 0;
    *f = (struct rt_features){.t = t, .o = o};
    for (int i = 0; i < o->n_features; i++) {
        const struct rt_feature_spec *s = &o->feature[i];
        if (s->layer != RT_LAYER_FINAL && (s->layer < 0 || s->layer > t->c.layers))
            RT_FAIL(err, USAGE, "--features: layer %d does not exist; the teacher has states 0 (embeddings) to %d, and final", s->layer, t->c.layers);
        if (s->dim < 1 || s->dim > t->c.hidden || (!s->projected && s->dim != t->c.hidden))
            RT_FAIL(err, USAGE, "--features: %d dimensions of a state of %d", s->dim, t->c.hidden);
        RT_TRY(rt_alloc((size_t)n * (size_t)s->dim, rt_dtype_size(s->dtype), "features", &f->data[i], err));
        widest = s->dim > widest ? s->dim : widest;
        if (!s->projected)
            continue;
        RT_TRY(rt_alloc((size_t)n, sizeof(float), "feature scales", &f->scale[i], err));
        RT_TRY(make_projection(f, i, err));
    }
    if (widest > 0)
        RT_TRY(d->be->alloc(d->dev, (size_t)(ROWS * widest) * sizeof(float), &f->projected, err));
out:
    return st;
}

void rt_features_free(struct rt_features *f)
{
    if (f->t == NULL)
        return;
    const struct rt_device *d = f->t->o.device;
    for (int i = 0; i < RT_MAX_FEATURES; i++) {
        d->be->weight_free(d->dev, f->weight[i]);
        if (f->matrix[i] != NULL)
            d->be->free(d->dev, f->matrix[i]);
        rt_free(f->data[i]);
        rt_free(f->scale[i]);
    }
    if (f->projected != NULL)
        d->be->free(d->dev, f->projected);
    *f = (struct rt_features){0};
}

static void encode(const float *y, int64_t n, int64_t dim, uint8_t *code, float *scale)
{
    for (int64_t i = 0; i < n; i++) {
        float amax = 1e-12f;
        for (int64_t j = 0; j < dim; j++)
            amax = fmaxf(amax, fabsf(y[i * dim + j]));
        scale[i] = amax / 448.0f;
        for (int64_t j = 0; j < dim; j++)
            code[i * dim + j] = rt_f32_to_e4m3(y[i * dim + j] / scale[i]);
    }
}

static enum rt_status take_one(struct rt_features *f, int i, const void *x, int64_t n, struct rt_err *err)
{
    const struct rt_device *d = f->t->o.device;
    const struct rt_feature_spec *s = &f->o->feature[i];
    const int64_t H = f->t->c.hidden;
    float *host = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)(ROWS * s->dim), sizeof *host, "features", &host, err));
    for (int64_t r = 0; r < n; r += ROWS) {
        const int64_t m = n - r < ROWS ? n - r : ROWS;
        const char *rows = (const char *)x + (size_t)(r * H) * rt_device_act_size(d);
        if (s->projected)
            RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = (void *)(uintptr_t)rows}, .w = f->weight[i], .y = f->projected, .n = m, .K = H,
                         .N = s->dim, .y_f32 = true));
        else
            RT_TRY(RT_OP(d, convert, err, .src = rows, .dst = f->projected, .n = m * H, .to_f32 = true));
        RT_TRY(rt_device_download(d, host, f->projected, (size_t)(m * s->dim) * sizeof *host, err));
        if (s->projected)
            encode(host, m, s->dim, (uint8_t *)f->data[i] + r * s->dim, f->scale[i] + r);
        else
            rt_from_f32((uint16_t *)f->data[i] + r * s->dim, RT_BF16, host, (size_t)(m * s->dim));
    }
out:
    rt_free(host);
    return st;
}

enum rt_status rt_features_take(struct rt_features *f, int layer, const void *x, int64_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int i = 0; i < f->o->n_features; i++)
        if (f->o->feature[i].layer == layer)
            RT_TRY(take_one(f, i, x, n, err));
out:
    return st;
}

void rt_features_attach(const struct rt_features *f, int64_t first, struct rt_rows *rows)
{
    rows->n_features = f->o->n_features;
    for (int i = 0; i < f->o->n_features; i++) {
        const struct rt_feature_spec *s = &f->o->feature[i];
        rows->feature[i] = (const char *)f->data[i] + (size_t)(first * s->dim) * rt_dtype_size(s->dtype);
        rows->feature_scale[i] = f->scale[i] != NULL ? f->scale[i] + first : NULL;
    }
}
