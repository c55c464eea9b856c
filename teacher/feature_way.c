#include "teacher/feature_way.h"

#include <pthread.h>
#include <string.h>

#include "core/dtype.h"

/* Elements of a feature that are taken at a time: what a device with memory of its own computes at its full rate. Rows, so that their scales are bounded. */
enum { PIECE = 1 << 19, PIECE_FAR = 1 << 22, ROWS_MOST = 1 << 14 };
/* Of two windows: states and scales of each feature, and a piece for a file. */
enum { HELD = 2 * (2 * RT_MAX_FEATURES + 1) };

/* Host memory. */
struct held {
    void *p;              /* NULL: nothing */
    size_t bytes;
    bool lent;
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
    float *host;                       /* far: [rows, dim] of states that the host converts; or NULL */
    pthread_mutex_t lock;              /* of what follows */
    struct held held[HELD];
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

uint64_t rt_feature_way_bytes(bool far) /* floats of a piece; far: only where the host converts */
{
    return sizeof(float) * (uint64_t)(far ? PIECE_FAR : PIECE);
}

/* Whole states in the device's own type need no conversion on the way. */
static bool as_it_is(const struct rt_feature_way *w, int i)
{
    return !w->feature[i].projected && w->t->o.device->be->act == w->feature[i].dtype;
}

static enum rt_status make(struct rt_feature_way *w, const struct rt_score_options *o, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    size_t floats = 0, codes = 0, converts = 0;
    void *p;
    enum rt_status st = RT_OK;
    for (int i = 0; i < w->n; i++) {
        const size_t elements = (size_t)(rt_feature_way_rows(w, i) * w->feature[i].dim);
        if (as_it_is(w, i))
            continue;
        floats = elements > floats ? elements : floats;
        if (w->feature[i].projected)
            RT_TRY(make_projection(w, o, i, err));
        size_t *most = w->feature[i].projected ? &codes : &converts;
        *most = elements > *most ? elements : *most;
    }
    if (floats > 0) {
        RT_TRY(d->be->alloc(d->dev, floats * sizeof(float), &p, err));
        w->projected = p;
    }
    if (!w->far)
        goto out;
    if (codes > 0) {
        RT_TRY(d->be->alloc(d->dev, rt_arena_round(codes) + ROWS_MOST * sizeof(float), &p, err));
        w->codes = p;
    }
    if (converts > 0)
        RT_TRY(rt_alloc(converts, sizeof(float), "features", &w->host, err));
out:
    return st;
}

enum rt_status rt_feature_way_open(struct rt_teacher *t, const struct rt_score_options *o, struct rt_feature_way **out, struct rt_err *err)
{
    struct rt_feature_way *w = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *w, "the way of features", &w, err));
    pthread_mutex_init(&w->lock, NULL);
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

static void drop(struct rt_feature_way *w, struct held *h)
{
    const struct rt_device *d = w->t->o.device;
    if (h->p != NULL && w->far)
        d->be->host_free(d->dev, h->p); /* waits for copies */
    else
        rt_free(h->p);
    *h = (struct held){0};
}

void rt_feature_way_free(struct rt_feature_way *w)
{
    if (w == NULL)
        return;
    const struct rt_device *d = w->t->o.device;
    for (int i = 0; i < HELD; i++) {
        RT_ASSERT(!w->held[i].lent);
        drop(w, &w->held[i]);
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
    rt_free(w->host);
    pthread_mutex_destroy(&w->lock);
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

/* ---- host memory ---- */

/* Of what is not lent, the least that is large enough; else a free place, or the place of the least. */
static struct held *choose(struct rt_feature_way *w, size_t bytes)
{
    struct held *best = NULL;
    for (int i = 0; i < HELD; i++) {
        struct held *h = &w->held[i];
        if (h->lent)
            continue;
        const bool fits = h->bytes >= bytes, best_fits = best != NULL && best->bytes >= bytes;
        if (best == NULL || (fits && !best_fits) || (fits == best_fits && h->bytes < best->bytes))
            best = h;
    }
    return best;
}

enum rt_status rt_feature_way_lend(struct rt_feature_way *w, size_t n, size_t size, void *out_ptr_to_ptr, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    enum rt_status st = RT_OK;
    size_t bytes;
    pthread_mutex_lock(&w->lock);
    if (!rt_mul_size(n, size, &bytes))
        RT_FAIL(err, NOMEM, "features of %zu tokens, %zu bytes each", n, size);
    struct held *h = choose(w, bytes);
    RT_ASSERT(h != NULL);
    if (h->p == NULL || h->bytes < bytes) {
        drop(w, h);
        if (w->far)
            RT_TRY(d->be->host_alloc(d->dev, bytes, &h->p, err));
        else
            RT_TRY(rt_alloc(bytes, 1, "features", &h->p, err));
        h->bytes = bytes;
    }
    h->lent = true;
    memcpy(out_ptr_to_ptr, &h->p, sizeof h->p);
out:
    pthread_mutex_unlock(&w->lock);
    return st;
}

void rt_feature_way_back(struct rt_feature_way *w, void *p)
{
    pthread_mutex_lock(&w->lock);
    for (int i = 0; i < HELD && p != NULL; i++)
        if (w->held[i].p == p) {
            w->held[i].lent = false;
            if (!w->far)
                drop(w, &w->held[i]);
            break;
        }
    pthread_mutex_unlock(&w->lock);
}

/* ---- taking ---- */

static enum rt_status take_projected(struct rt_feature_way *w, int i, const void *rows, int64_t m, void *out, float *scale, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    const int64_t dim = w->feature[i].dim;
    uint8_t *codes = w->far ? (uint8_t *)w->codes : out;
    float *scales = w->far ? (float *)(void *)(codes + rt_arena_round((size_t)(m * dim))) : scale;
    enum rt_status st;
    RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = (void *)(uintptr_t)rows}, .w = w->weight[i], .y = w->projected, .n = m, .K = w->t->c.hidden, .N = dim, .y_f32 = true));
    RT_TRY(RT_OP(d, encode_rows, err, .x = w->projected, .code = codes, .scale = scales, .n = m, .cols = dim));
    if (!w->far)
        goto out;
    RT_TRY(d->be->download(d->dev, d->q, out, codes, (size_t)(m * dim), err));
    RT_TRY(d->be->download(d->dev, d->q, scale, scales, (size_t)m * sizeof(float), err));
out:
    return st;
}

/* Whole states that the host converts to BF16. */
static enum rt_status take_converted(struct rt_feature_way *w, const void *rows, int64_t m, void *out, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    const int64_t n = m * w->t->c.hidden;
    const float *from = w->far ? w->host : w->projected;
    enum rt_status st;
    RT_TRY(RT_OP(d, convert, err, .src = rows, .dst = w->projected, .n = n, .to_f32 = true));
    if (w->far)
        RT_TRY(rt_device_download(d, w->host, w->projected, (size_t)n * sizeof(float), err));
    rt_from_f32(out, RT_BF16, from, (size_t)n);
out:
    return st;
}

enum rt_status rt_feature_way_take(struct rt_feature_way *w, int i, const void *rows, int64_t m, void *out, float *scale, struct rt_err *err)
{
    const struct rt_device *d = w->t->o.device;
    if (w->feature[i].projected)
        return take_projected(w, i, rows, m, out, scale, err);
    if (as_it_is(w, i))
        return d->be->download(d->dev, d->q, out, rows, (size_t)(m * w->feature[i].dim) * rt_dtype_size(w->feature[i].dtype), err);
    return take_converted(w, rows, m, out, err);
}
