#include "teacher/feature_way.h"

#include <string.h>

#include "core/dtype.h"

/* Elements of a feature that are taken at a time: what a device with memory of its own computes at its full rate; rows, so that their scales are bounded; bytes
 * that a thread copies. */
enum { PIECE = 1 << 19, PIECE_FAR = 1 << 22, ROWS_MOST = 1 << 14, GRAIN = 1 << 18 };

/* Rows on their way to the host. */
struct slot {
    char *host;           /* where copies do not wait: `bytes`, and scales behind them */
    size_t bytes;
    struct rt_event *done;
    int feature;
    int64_t rows;         /* 0: free */
    void *out;
    float *scale;         /* NULL: none */
};

struct rt_feature_way {
    struct rt_teacher *t;
    int n;
    struct rt_feature_spec feature[RT_MAX_FEATURES];
    uint64_t seed;
    bool far;
    void *matrix[RT_MAX_FEATURES];     /* device [dim, H]: projection */
    struct rt_weight *weight[RT_MAX_FEATURES];
    float *projected;                  /* device [rows, dim]; NULL where no feature needs it */
    char *codes;                       /* far: device [rows, dim], scales behind them; or NULL */
    struct slot slot[2];               /* far: one crosses while the other is put in place */
    int turn;                          /* the next one */
};

/* The projection as a device weight in act elements. */
static enum rt_status make_projection(struct rt_feature_way *w, const struct rt_score_options *o, int i, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    const struct rt_feature_spec *s = &w->feature[i];
    const int64_t H = w->t->c.hidden, n = s->dim * H;
    float *made = NULL;
    const float *host = o->projection[i];
    void *act = NULL;
    enum rt_status st;
    if (host == NULL) {
        RT_TRY(rt_alloc((size_t)n, sizeof *made, "projection", &made, err));
        RT_TRY(rt_projection_matrix(o->projection_seed, s->layer, s->dim, H, made, err));
        host = made;
    }
    RT_TRY(d->be->alloc(d->dev, (size_t)n * rt_device_act_size(d), &w->matrix[i], err));
    RT_TRY(d->be->alloc(d->dev, (size_t)n * sizeof(float), &act, err));
    RT_TRY(rt_device_upload(d, act, host, (size_t)n * sizeof(float), err));
    RT_TRY(RT_OP(d, convert, err, .src = act, .dst = w->matrix[i], .n = n));
    RT_TRY(rt_device_sync(d, err));
    RT_TRY(d->be->weight_param(d->dev, w->matrix[i], s->dim, H, &w->weight[i], err));
out:
    if (act != NULL)
        d->be->free(d->dev, act);
    rt_free(made);
    return st;
}

int64_t rt_feature_way_rows(const struct rt_feature_way *w, int i)
{
    const int64_t n = (w->far ? PIECE_FAR : PIECE) / w->feature[i].dim;
    return n < 1 ? 1 : n > ROWS_MOST ? ROWS_MOST : n;
}

uint64_t rt_feature_way_bytes(bool far) /* near: floats of a piece; far: two pieces, at most as floats */
{
    return far ? 2 * sizeof(float) * (uint64_t)(PIECE_FAR + ROWS_MOST) : sizeof(float) * (uint64_t)PIECE;
}

/* Whole states in the device's own type need no conversion on the way. */
static bool as_it_is(const struct rt_feature_way *w, int i)
{
    return !w->feature[i].projected && w->t->o.device->be->act == w->feature[i].dtype;
}

static size_t row_bytes(const struct rt_feature_way *w, int i)
{
    return (size_t)w->feature[i].dim * rt_dtype_size(w->feature[i].dtype);
}

static enum rt_status make_slots(struct rt_feature_way *w, size_t bytes, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    enum rt_status st = RT_OK;
    for (int i = 0; i < 2; i++) {
        void *p;
        w->slot[i].bytes = rt_arena_round(bytes);
        RT_TRY(d->be->host_alloc(d->dev, w->slot[i].bytes + ROWS_MOST * sizeof(float), &p, err));
        w->slot[i].host = p;
        RT_TRY(d->be->event_create(d->dev, &w->slot[i].done, err));
    }
out:
    return st;
}

static enum rt_status make(struct rt_feature_way *w, const struct rt_score_options *o, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    size_t floats = 0, codes = 0, crosses = 0;
    void *p;
    enum rt_status st = RT_OK;
    for (int i = 0; i < w->n; i++) {
        const size_t elements = (size_t)(rt_feature_way_rows(w, i) * w->feature[i].dim), float_bytes = elements * sizeof(float);
        const size_t bytes = as_it_is(w, i) || w->feature[i].projected ? elements * rt_dtype_size(w->feature[i].dtype) : float_bytes;
        crosses = bytes > crosses ? bytes : crosses;
        floats = float_bytes > floats && !as_it_is(w, i) ? float_bytes : floats;
        if (!w->feature[i].projected)
            continue;
        codes = elements > codes ? elements : codes;
        RT_TRY(make_projection(w, o, i, err));
    }
    if (floats > 0) {
        RT_TRY(d->be->alloc(d->dev, floats, &p, err));
        w->projected = p;
    }
    if (w->far && codes > 0) {
        RT_TRY(d->be->alloc(d->dev, rt_arena_round(codes) + ROWS_MOST * sizeof(float), &p, err));
        w->codes = p;
    }
    if (w->far && crosses > 0)
        RT_TRY(make_slots(w, crosses, err));
out:
    return st;
}

enum rt_status rt_feature_way_open(struct rt_teacher *t, const struct rt_score_options *o, struct rt_feature_way **out, struct rt_err *err)
{
    struct rt_feature_way *w = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *w, "the way of features", &w, err));
    w->t = t;
    w->n = o->n_features;
    memcpy(w->feature, o->feature, sizeof w->feature);
    w->seed = o->projection_seed;
    w->far = t->o.device->be->own_memory;
    RT_TRY(make(w, o, err));
    *out = w;
    w = NULL;
out:
    rt_feature_way_free(w);
    return st;
}

void rt_feature_way_free(struct rt_feature_way *w)
{
    if (w == NULL)
        return;
    const struct rt_device *d = w->t->o.device;
    for (int i = 0; i < 2; i++) {
        if (w->slot[i].host != NULL) /* waits for copies */
            d->be->host_free(d->dev, w->slot[i].host);
        if (w->slot[i].done != NULL)
            d->be->event_free(d->dev, w->slot[i].done);
    }
    for (int i = 0; i < w->n; i++) {
        if (w->weight[i] != NULL)
            d->be->weight_free(d->dev, w->weight[i]);
        if (w->matrix[i] != NULL)
            d->be->free(d->dev, w->matrix[i]);
    }
    if (w->projected != NULL)
        d->be->free(d->dev, w->projected);
    if (w->codes != NULL)
        d->be->free(d->dev, w->codes);
    rt_free(w);
}

bool rt_feature_way_suits(const struct rt_feature_way *w, const struct rt_score_options *o)
{
    bool same = w->n == o->n_features && w->seed == o->projection_seed;
    for (int i = 0; same && i < w->n; i++) {
        const struct rt_feature_spec *a = &w->feature[i], *b = &o->feature[i];
        same = a->layer == b->layer && a->dim == b->dim && a->dtype == b->dtype && a->projected == b->projected;
    }
    return same;
}

/* ---- taking ---- */

/* m rows at `rows` into out, [m, dim] of the feature's type, where the device's memory is the host's. */
static enum rt_status take_near(struct rt_feature_way *w, int i, const void *rows, int64_t m, void *out, float *scale, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    const struct rt_feature_spec *s = &w->feature[i];
    const int64_t H = w->t->c.hidden;
    enum rt_status st;
    if (as_it_is(w, i))
        return rt_device_download(d, out, rows, (size_t)m * row_bytes(w, i), err);
    if (s->projected) {
        RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = (void *)(uintptr_t)rows}, .w = w->weight[i], .y = w->projected, .n = m, .K = H, .N = s->dim, .y_f32 = true));
        RT_TRY(RT_OP(d, encode_rows, err, .x = w->projected, .code = out, .scale = scale, .n = m, .cols = s->dim));
    } else {
        RT_TRY(RT_OP(d, convert, err, .src = rows, .dst = w->projected, .n = m * H, .to_f32 = true));
        rt_from_f32(out, RT_BF16, w->projected, (size_t)(m * s->dim));
    }
out:
    return st;
}

struct copying {
    char *dst;
    const char *src;
    size_t bytes;
};

static void copy_item(void *ctx, int64_t item, __attribute__((unused)) int worker)
{
    const struct copying *c = ctx;
    const size_t from = (size_t)item * GRAIN, n = c->bytes - from < GRAIN ? c->bytes - from : GRAIN;
    memcpy(c->dst + from, c->src + from, n);
}

/* Waits for what is on its way through the slot, and puts it where it belongs. */
static enum rt_status collect(struct rt_feature_way *w, struct slot *s, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    enum rt_status st = RT_OK;
    const int64_t m = s->rows;
    if (m == 0)
        return RT_OK;
    s->rows = 0;
    RT_TRY(d->be->event_sync(d->dev, s->done, err));
    struct copying c = {s->out, s->host, (size_t)m * row_bytes(w, s->feature)};
    if (!as_it_is(w, s->feature) && !w->feature[s->feature].projected)
        rt_from_f32(s->out, RT_BF16, (const float *)(const void *)s->host, (size_t)(m * w->feature[s->feature].dim));
    else if (w->t->pool != NULL)
        rt_pool_run(w->t->pool, (int64_t)((c.bytes + GRAIN - 1) / GRAIN), copy_item, &c);
    else
        memcpy(s->out, s->host, c.bytes);
    if (s->scale != NULL)
        memcpy(s->scale, s->host + s->bytes, (size_t)m * sizeof(float));
out:
    return st;
}

enum rt_status rt_feature_way_settle(struct rt_feature_way *w, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int i = 0; i < 2; i++)
        RT_TRY(collect(w, &w->slot[(w->turn + i) % 2], err));
out:
    return st;
}

/* The same from a device of its own memory: on their way when it returns. */
static enum rt_status take_far(struct rt_feature_way *w, int i, const void *rows, int64_t m, void *out, float *scale, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    const struct rt_feature_spec *s = &w->feature[i];
    struct slot *slot = &w->slot[w->turn];
    const int64_t H = w->t->c.hidden;
    enum rt_status st;
    RT_TRY(collect(w, slot, err));
    w->turn = (w->turn + 1) % 2;
    if (as_it_is(w, i)) {
        RT_TRY(d->be->download(d->dev, d->q, slot->host, rows, (size_t)m * row_bytes(w, i), err));
    } else if (s->projected) {
        uint8_t *codes = (uint8_t *)w->codes;
        float *scales = (float *)(void *)(codes + rt_arena_round((size_t)(m * s->dim)));
        RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = (void *)(uintptr_t)rows}, .w = w->weight[i], .y = w->projected, .n = m, .K = H, .N = s->dim, .y_f32 = true));
        RT_TRY(RT_OP(d, encode_rows, err, .x = w->projected, .code = codes, .scale = scales, .n = m, .cols = s->dim));
        RT_TRY(d->be->download(d->dev, d->q, slot->host, codes, (size_t)(m * s->dim), err));
        RT_TRY(d->be->download(d->dev, d->q, slot->host + slot->bytes, scales, (size_t)m * sizeof(float), err));
    } else {
        RT_TRY(RT_OP(d, convert, err, .src = rows, .dst = w->projected, .n = m * H, .to_f32 = true));
        RT_TRY(d->be->download(d->dev, d->q, slot->host, w->projected, (size_t)(m * H) * sizeof(float), err));
    }
    RT_TRY(d->be->event_record(d->dev, d->q, slot->done, err));
    slot->feature = i;
    slot->rows = m;
    slot->out = out;
    slot->scale = scale;
out:
    return st;
}

enum rt_status rt_feature_way_take(struct rt_feature_way *w, int i, const void *rows, int64_t m, void *out, float *scale, struct rt_err *err)
{
    return (w->far ? take_far : take_near)(w, i, rows, m, out, scale, err);
}

void rt_feature_way_forget(struct rt_feature_way *w)
{
    for (int i = 0; i < 2; i++)
        w->slot[i].rows = 0;
}
