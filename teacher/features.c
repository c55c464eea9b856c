#include "teacher/features.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/dtype.h"
#include "core/io.h"
#include "core/rng.h"
#include "teacher/feature_way.h"

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

uint64_t rt_score_fixed_bytes(const struct rt_score_options *o, const struct rt_teacher_config *c, int64_t longest, bool far)
{
    uint64_t b = 0;
    if (o->keep.dir != NULL || o->keep.spill) /* a writer, and what goes to it */
        b += RT_STATE_BLOCK + ((uint64_t)4 << 20);
    for (int i = 0; i < o->n_features; i++) {
        const struct rt_feature_spec *s = &o->feature[i];
        if (i == 0)
            b += rt_feature_way_bytes(far) * (o->keep.spill ? 2 : 1); /* and a piece for the file */
        if (o->keep.spill)
            b += (uint64_t)longest * (uint64_t)s->dim * rt_dtype_size(s->dtype) + RT_STATE_BLOCK;
        if (s->projected) /* the matrix, here and on its way to the device */
            b += 3 * (uint64_t)s->dim * (uint64_t)c->hidden * sizeof(float);
    }
    return b;
}

static size_t row_bytes(const struct rt_features *f, int i)
{
    return (size_t)f->o->feature[i].dim * rt_dtype_size(f->o->feature[i].dtype);
}

static enum rt_status check(const struct rt_teacher_config *c, const struct rt_feature_spec *s, struct rt_err *err)
{
    if (s->layer != RT_LAYER_FINAL && (s->layer < 0 || s->layer > c->layers))
        return rt_fail(err, RT_USAGE, "--features: layer %d does not exist; the teacher has states 0 (embeddings) to %d, and final", s->layer, c->layers);
    if (s->dim < 1 || s->dim > c->hidden || (!s->projected && s->dim != c->hidden))
        return rt_fail(err, RT_USAGE, "--features: %d dimensions of a state of %d", s->dim, c->hidden);
    return RT_OK;
}

enum rt_status rt_features_init(struct rt_features *f, struct rt_teacher *t, const struct rt_score_options *o, int64_t n, int64_t longest,
                                struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int64_t piece = 0;
    *f = (struct rt_features){.t = t, .o = o, .n = n, .spill = o->keep.dir != NULL && o->keep.spill};
    for (int i = 0; i < o->n_features; i++)
        RT_TRY(check(&t->c, &o->feature[i], err));
    if (o->n_features == 0)
        goto out;
    if (t->way != NULL && !rt_feature_way_suits(t->way, o)) {
        rt_feature_way_free(t->way);
        t->way = NULL;
    }
    if (t->way == NULL)
        RT_TRY(rt_feature_way_open(t, o, &t->way, err));
    for (int i = 0; i < o->n_features; i++) {
        const int64_t held = f->spill ? longest : n, bytes = rt_feature_way_rows(t->way, i) * (int64_t)row_bytes(f, i);
        RT_TRY(rt_feature_way_lend(t->way, (size_t)(held > 0 ? held : 1), row_bytes(f, i), &f->data[i], err));
        if (o->feature[i].projected)
            RT_TRY(rt_feature_way_lend(t->way, (size_t)n, sizeof(float), &f->scale[i], err));
        piece = bytes > piece ? bytes : piece;
    }
    if (f->spill)
        RT_TRY(rt_feature_way_lend(t->way, (size_t)piece, 1, &f->piece, err));
out:
    return st;
}

void rt_features_free(struct rt_features *f)
{
    if (f->t == NULL)
        return;
    for (int i = 0; i < f->o->n_features && f->t->way != NULL; i++) {
        rt_feature_way_back(f->t->way, f->data[i]);
        rt_feature_way_back(f->t->way, f->scale[i]);
    }
    if (f->piece != NULL)
        rt_feature_way_back(f->t->way, f->piece);
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
    RT_TRY(rt_device_sync(f->t->o.device, err)); /* copies of states may be under way */
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

static enum rt_status take_one(struct rt_features *f, int i, const void *x, int64_t n, struct rt_err *err)
{
    const int64_t most = rt_feature_way_rows(f->t->way, i);
    enum rt_status st = RT_OK;
    if (f->spill)
        RT_TRY(begin_file(f, i, err));
    for (int64_t r = 0; r < n; r += most) {
        const int64_t m = n - r < most ? n - r : most;
        const char *rows = (const char *)x + (size_t)(r * f->t->c.hidden) * rt_device_act_size(f->t->o.device);
        char *out = f->spill ? f->piece : (char *)f->data[i] + (size_t)r * row_bytes(f, i);
        RT_TRY(rt_feature_way_take(f->t->way, i, rows, m, out, f->scale[i] != NULL ? f->scale[i] + r : NULL, err));
        if (!f->spill)
            continue;
        RT_TRY(rt_device_sync(f->t->o.device, err));
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
