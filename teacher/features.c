#include "teacher/features.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/dtype.h"
#include "core/io.h"
#include "core/rng.h"

/* Elements of a feature that are taken at a time: what a device of its own memory computes at its full rate, and their scales' most; bytes that a thread copies. */
enum { PIECE = 1 << 19, PIECE_FAR = 1 << 22, ROWS_MOST = 1 << 14, GRAIN = 1 << 18 };

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
    float *made = NULL;
    const float *host = f->o->projection[i];
    void *act = NULL;
    enum rt_status st;
    if (host == NULL) {
        RT_TRY(rt_alloc((size_t)n, sizeof *made, "projection", &made, err));
        RT_TRY(rt_projection_matrix(f->o->projection_seed, s->layer, s->dim, H, made, err));
        host = made;
    }
    RT_TRY(d->be->alloc(d->dev, (size_t)n * rt_device_act_size(d), &f->matrix[i], err));
    RT_TRY(d->be->alloc(d->dev, (size_t)n * sizeof(float), &act, err));
    RT_TRY(rt_device_upload(d, act, host, (size_t)n * sizeof(float), err));
    RT_TRY(RT_OP(d, convert, err, .src = act, .dst = f->matrix[i], .n = n));
    RT_TRY(rt_device_sync(d, err));
    RT_TRY(d->be->weight_param(d->dev, f->matrix[i], s->dim, H, &f->weight[i], err));
out:
    if (act != NULL)
        d->be->free(d->dev, act);
    rt_free(made);
    return st;
}

/* Rows of a feature that are taken together. */
static int64_t rows_of(const struct rt_feature_spec *s, bool far)
{
    const int64_t n = (far ? PIECE_FAR : PIECE) / s->dim;
    return n < 1 ? 1 : n > ROWS_MOST ? ROWS_MOST : n;
}

uint64_t rt_score_fixed_bytes(const struct rt_score_options *o, const struct rt_teacher_config *c, int64_t longest, bool far)
{
    const uint64_t piece = far ? PIECE_FAR : PIECE;
    uint64_t b = 0;
    if (o->keep.dir != NULL || o->keep.spill) /* a writer, and what goes to it */
        b += RT_STATE_BLOCK + ((uint64_t)4 << 20);
    for (int i = 0; i < o->n_features; i++) {
        const struct rt_feature_spec *s = &o->feature[i];
        if (i == 0) /* near: floats of a piece; far: two pieces on their way, at most as floats */
            b += piece * sizeof(float) + (far ? piece * sizeof(float) + 2 * ROWS_MOST * sizeof(float) : 0) + (o->keep.spill ? piece * sizeof(uint16_t) : 0);
        if (o->keep.spill)
            b += (uint64_t)longest * (uint64_t)s->dim * rt_dtype_size(s->dtype) + RT_STATE_BLOCK;
        if (s->projected) /* the matrix, here and on its way to the device */
            b += 3 * (uint64_t)s->dim * (uint64_t)c->hidden * sizeof(float);
    }
    return b;
}

/* Whole states in the device's own type need no conversion on the way. */
static bool as_it_is(const struct rt_features *f, int i)
{
    return !f->o->feature[i].projected && f->t->o.device->be->act == f->o->feature[i].dtype;
}

enum rt_status rt_features_init(struct rt_features *f, struct rt_teacher *t, const struct rt_score_options *o, int64_t n, int64_t longest,
                                struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    enum rt_status st = RT_OK;
    const bool far = d->be->own_memory;
    int64_t floats = 0, codes = 0;
    size_t piece = 0, slot = 0;
    *f = (struct rt_features){.t = t, .o = o, .n = n, .spill = o->keep.dir != NULL && o->keep.spill};
    for (int i = 0; i < o->n_features; i++) {
        const struct rt_feature_spec *s = &o->feature[i];
        if (s->layer != RT_LAYER_FINAL && (s->layer < 0 || s->layer > t->c.layers))
            RT_FAIL(err, USAGE, "--features: layer %d does not exist; the teacher has states 0 (embeddings) to %d, and final", s->layer, t->c.layers);
        if (s->dim < 1 || s->dim > t->c.hidden || (!s->projected && s->dim != t->c.hidden))
            RT_FAIL(err, USAGE, "--features: %d dimensions of a state of %d", s->dim, t->c.hidden);
        const int64_t held = f->spill ? longest : n;
        RT_TRY(rt_alloc((size_t)(held > 0 ? held : 1) * (size_t)s->dim, rt_dtype_size(s->dtype), "features", &f->data[i], err));
        const int64_t elements = rows_of(s, far) * s->dim;
        const size_t bytes = (size_t)elements * rt_dtype_size(s->dtype), crosses = as_it_is(f, i) || s->projected ? bytes : (size_t)elements * sizeof(float);
        floats = elements > floats && !as_it_is(f, i) ? elements : floats;
        piece = bytes > piece ? bytes : piece;
        slot = crosses > slot ? crosses : slot;
        if (!s->projected)
            continue;
        codes = elements > codes ? elements : codes;
        RT_TRY(rt_alloc((size_t)n, sizeof(float), "feature scales", &f->scale[i], err));
        RT_TRY(make_projection(f, i, err));
    }
    if (f->spill)
        RT_TRY(rt_alloc(piece, 1, "features", &f->piece, err));
    if (floats > 0)
        RT_TRY(d->be->alloc(d->dev, (size_t)floats * sizeof(float), &f->projected, err));
    if (!far)
        goto out;
    if (codes > 0)
        RT_TRY(d->be->alloc(d->dev, rt_arena_round((size_t)codes) + ROWS_MOST * sizeof(float), &f->codes, err));
    for (int i = 0; i < 2 && slot > 0; i++) {
        f->slot[i].bytes = rt_arena_round(slot);
        RT_TRY(d->be->host_alloc(d->dev, f->slot[i].bytes + ROWS_MOST * sizeof(float), &f->slot[i].host, err));
        RT_TRY(d->be->event_create(d->dev, &f->slot[i].done, err));
    }
out:
    return st;
}

void rt_features_leave_device(struct rt_features *f)
{
    const struct rt_device *d = f->t->o.device;
    for (int i = 0; i < RT_MAX_FEATURES; i++) {
        if (f->weight[i] != NULL)
            d->be->weight_free(d->dev, f->weight[i]);
        if (f->matrix[i] != NULL)
            d->be->free(d->dev, f->matrix[i]);
        f->weight[i] = NULL;
        f->matrix[i] = NULL;
    }
    if (f->projected != NULL)
        d->be->free(d->dev, f->projected);
    if (f->codes != NULL)
        d->be->free(d->dev, f->codes);
    for (int i = 0; i < 2; i++) {
        if (f->slot[i].host != NULL) /* waits for copies */
            d->be->host_free(d->dev, f->slot[i].host);
        if (f->slot[i].done != NULL)
            d->be->event_free(d->dev, f->slot[i].done);
        f->slot[i] = (struct rt_feature_slot){0};
    }
    f->projected = f->codes = NULL;
    rt_free(f->piece);
    f->piece = NULL;
}

void rt_features_free(struct rt_features *f)
{
    if (f->t == NULL)
        return;
    rt_features_leave_device(f);
    for (int i = 0; i < RT_MAX_FEATURES; i++) {
        rt_free(f->data[i]);
        rt_free(f->scale[i]);
    }
    rt_state_writer_free(f->writer);
    for (int i = 0; i < RT_MAX_FEATURES; i++)
        rt_state_reader_free(f->reader[i]);
    *f = (struct rt_features){0};
}

/* ---- files ---- */

#define KIND "retort-feature"

void rt_features_keep(struct rt_features *f, const char *dir, const char *identity)
{
    f->dir = dir;
    f->identity = identity;
}

static size_t row_bytes(const struct rt_features *f, int i)
{
    return (size_t)f->o->feature[i].dim * rt_dtype_size(f->o->feature[i].dtype);
}

static uint64_t scale_bytes(const struct rt_features *f, int i)
{
    return f->scale[i] != NULL ? (uint64_t)f->n * sizeof(float) : 0;
}

static enum rt_status file_path(const struct rt_features *f, int i, char path[4096], struct rt_err *err)
{
    char name[32];
    snprintf(name, sizeof name, "feature-%d", i);
    return rt_path_join(path, 4096, f->dir, name, err);
}

static enum rt_status begin_file(struct rt_features *f, int i, struct rt_err *err)
{
    struct rt_json *v = NULL;
    char path[4096];
    enum rt_status st;
    RT_TRY(rt_mkdirs(f->dir, err));
    RT_TRY(file_path(f, i, path, err));
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_string(v, "identity", f->identity, err));
    RT_TRY(rt_json_set_int(v, "feature", i, err));
    RT_TRY(rt_state_create(path, KIND, v, (uint64_t)f->n * row_bytes(f, i) + scale_bytes(f, i), &f->writer, err));
out:
    rt_json_free(v);
    return st;
}

static enum rt_status end_file(struct rt_features *f, int i, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_state_put(f->writer, f->scale[i], scale_bytes(f, i), err));
    RT_TRY(rt_state_commit(f->writer, err));
    f->filed[i] = true;
out:
    rt_state_writer_free(f->writer);
    f->writer = NULL;
    return st;
}

enum rt_status rt_features_save(struct rt_features *f, int layers, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    RT_TRY(rt_features_settle(f, err));
    for (int i = 0; i < f->o->n_features; i++) {
        const int layer = f->o->feature[i].layer;
        if (f->filed[i] || layer == RT_LAYER_FINAL || layer > layers)
            continue;
        RT_TRY(begin_file(f, i, err));
        RT_TRY(rt_state_put(f->writer, f->data[i], (uint64_t)f->n * row_bytes(f, i), err));
        RT_TRY(end_file(f, i, err));
    }
out:
    rt_state_writer_free(f->writer);
    f->writer = NULL;
    return st;
}

static enum rt_status open_file(struct rt_features *f, int i, struct rt_err *err)
{
    char path[4096];
    const char *identity;
    int64_t x;
    const uint64_t want = (uint64_t)f->n * row_bytes(f, i) + scale_bytes(f, i);
    enum rt_status st;
    RT_TRY(file_path(f, i, path, err));
    RT_TRY(rt_state_open(path, KIND, &f->reader[i], err));
    RT_TRY(rt_json_string(rt_state_header(f->reader[i]), "identity", &identity, err));
    RT_TRY(rt_json_int(rt_state_header(f->reader[i]), "feature", i, i, &x, err));
    if (strcmp(identity, f->identity) != 0 || rt_state_bytes(f->reader[i]) != want)
        RT_FAIL(err, REFUSED, "%s: it is of another window, plan, checkpoint or backend", path);
out:
    return st;
}

enum rt_status rt_features_load(struct rt_features *f, int layers, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int i = 0; i < f->o->n_features; i++) {
        const int layer = f->o->feature[i].layer;
        if (layer == RT_LAYER_FINAL || layer > layers)
            continue;
        RT_TRY(open_file(f, i, err));
        RT_TRY(rt_state_read(f->reader[i], f->spill ? NULL : f->data[i], (uint64_t)f->n * row_bytes(f, i), err));
        RT_TRY(rt_state_read(f->reader[i], f->scale[i], scale_bytes(f, i), err));
        f->filed[i] = true;
        rt_state_reader_free(f->reader[i]);
        f->reader[i] = NULL;
    }
out:
    return st;
}

void rt_features_forget(struct rt_features *f)
{
    for (int i = 0; i < RT_MAX_FEATURES; i++) {
        f->filed[i] = false;
        rt_state_reader_free(f->reader[i]);
        f->reader[i] = NULL;
    }
}

/* ---- taking ---- */

/* m rows at `rows` into out, [m, dim] of the feature's type, where the device's memory is the host's. */
static enum rt_status take_near(struct rt_features *f, int i, const char *rows, int64_t m, void *out, float *scale, struct rt_err *err)
{
    const struct rt_device *d = f->t->o.device;
    const struct rt_feature_spec *s = &f->o->feature[i];
    const int64_t H = f->t->c.hidden;
    enum rt_status st;
    if (as_it_is(f, i))
        return rt_device_download(d, out, rows, (size_t)m * row_bytes(f, i), err);
    if (s->projected) {
        RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = (void *)(uintptr_t)rows}, .w = f->weight[i], .y = f->projected, .n = m, .K = H, .N = s->dim, .y_f32 = true));
        RT_TRY(RT_OP(d, encode_rows, err, .x = f->projected, .code = out, .scale = scale, .n = m, .cols = s->dim));
    } else {
        RT_TRY(RT_OP(d, convert, err, .src = rows, .dst = f->projected, .n = m * H, .to_f32 = true));
        rt_from_f32(out, RT_BF16, f->projected, (size_t)(m * s->dim));
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
static enum rt_status collect(struct rt_features *f, struct rt_feature_slot *s, struct rt_err *err)
{
    const struct rt_device *d = f->t->o.device;
    enum rt_status st = RT_OK;
    const int64_t m = s->rows;
    if (m == 0)
        return RT_OK;
    s->rows = 0;
    RT_TRY(d->be->event_sync(d->dev, s->done, err));
    struct copying c = {s->out, s->host, (size_t)m * row_bytes(f, s->feature)};
    if (!as_it_is(f, s->feature) && !f->o->feature[s->feature].projected)
        rt_from_f32(s->out, RT_BF16, s->host, (size_t)(m * f->o->feature[s->feature].dim));
    else if (f->t->pool != NULL)
        rt_pool_run(f->t->pool, (int64_t)((c.bytes + GRAIN - 1) / GRAIN), copy_item, &c);
    else
        memcpy(s->out, s->host, c.bytes);
    if (s->scale != NULL)
        memcpy(s->scale, (const char *)s->host + s->bytes, (size_t)m * sizeof(float));
out:
    return st;
}

enum rt_status rt_features_settle(struct rt_features *f, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int i = 0; i < 2; i++)
        RT_TRY(collect(f, &f->slot[(f->turn + i) % 2], err));
out:
    return st;
}

/* The same from a device of its own memory: on their way when it returns. */
static enum rt_status take_far(struct rt_features *f, int i, const char *rows, int64_t m, void *out, float *scale, struct rt_err *err)
{
    const struct rt_device *d = f->t->o.device;
    const struct rt_feature_spec *s = &f->o->feature[i];
    struct rt_feature_slot *slot = &f->slot[f->turn];
    const int64_t H = f->t->c.hidden;
    enum rt_status st;
    RT_TRY(collect(f, slot, err));
    f->turn = (f->turn + 1) % 2;
    if (as_it_is(f, i)) {
        RT_TRY(d->be->download(d->dev, d->q, slot->host, rows, (size_t)m * row_bytes(f, i), err));
    } else if (s->projected) {
        uint8_t *codes = f->codes;
        float *scales = (float *)(void *)(codes + rt_arena_round((size_t)(m * s->dim)));
        RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = (void *)(uintptr_t)rows}, .w = f->weight[i], .y = f->projected, .n = m, .K = H, .N = s->dim, .y_f32 = true));
        RT_TRY(RT_OP(d, encode_rows, err, .x = f->projected, .code = codes, .scale = scales, .n = m, .cols = s->dim));
        RT_TRY(d->be->download(d->dev, d->q, slot->host, codes, (size_t)(m * s->dim), err));
        RT_TRY(d->be->download(d->dev, d->q, (char *)slot->host + slot->bytes, scales, (size_t)m * sizeof(float), err));
    } else {
        RT_TRY(RT_OP(d, convert, err, .src = rows, .dst = f->projected, .n = m * H, .to_f32 = true));
        RT_TRY(d->be->download(d->dev, d->q, slot->host, f->projected, (size_t)(m * H) * sizeof(float), err));
    }
    RT_TRY(d->be->event_record(d->dev, d->q, slot->done, err));
    slot->feature = i;
    slot->rows = m;
    slot->out = out;
    slot->scale = scale;
out:
    return st;
}

static enum rt_status take_one(struct rt_features *f, int i, const void *x, int64_t n, struct rt_err *err)
{
    const bool far = f->t->o.device->be->own_memory;
    const int64_t most = rows_of(&f->o->feature[i], far);
    enum rt_status st = RT_OK;
    if (f->spill)
        RT_TRY(begin_file(f, i, err));
    for (int64_t r = 0; r < n; r += most) {
        const int64_t m = n - r < most ? n - r : most;
        const char *rows = (const char *)x + (size_t)(r * f->t->c.hidden) * rt_device_act_size(f->t->o.device);
        char *out = f->spill ? f->piece : (char *)f->data[i] + (size_t)r * row_bytes(f, i);
        RT_TRY((far ? take_far : take_near)(f, i, rows, m, out, f->scale[i] != NULL ? f->scale[i] + r : NULL, err));
        if (!f->spill)
            continue;
        RT_TRY(rt_features_settle(f, err));
        RT_TRY(rt_state_put(f->writer, out, (uint64_t)m * row_bytes(f, i), err));
    }
    if (f->spill)
        RT_TRY(end_file(f, i, err));
out:
    rt_state_writer_free(f->writer);
    f->writer = NULL;
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

enum rt_status rt_features_attach(struct rt_features *f, int64_t first, struct rt_rows *rows, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    rows->n_features = f->o->n_features;
    for (int i = 0; i < f->o->n_features; i++) {
        rows->feature[i] = (const char *)f->data[i] + (f->spill ? 0 : (size_t)first * row_bytes(f, i));
        rows->feature_scale[i] = f->scale[i] != NULL ? f->scale[i] + first : NULL;
        if (!f->spill)
            continue;
        RT_ASSERT(first == f->read_to);
        if (f->reader[i] == NULL)
            RT_TRY(open_file(f, i, err));
        RT_TRY(rt_state_read(f->reader[i], f->data[i], (uint64_t)rows->n_tokens * row_bytes(f, i), err));
    }
    f->read_to = first + rows->n_tokens;
out:
    return st;
}
