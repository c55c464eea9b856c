#include "distill/feature.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"

/* ---- which state against which ---- */

static void layer_name(char out[16], int layer)
{
    if (layer == RT_LAYER_FINAL)
        snprintf(out, 16, "final");
    else
        snprintf(out, 16, "%d", layer);
}

static void stored_layers(const struct rt_row_identity *id, char out[128])
{
    size_t at = 0;
    char name[16];
    out[0] = '\0';
    for (int i = 0; i < id->n_features && at + 20 < 128; i++) {
        layer_name(name, id->feature[i].layer);
        at += (size_t)snprintf(out + at, 128 - at, "%s%s", i > 0 ? "," : "", name);
    }
}

static const struct rt_feature_spec *find_spec(const struct rt_row_identity *id, int layer, int *column)
{
    for (int i = 0; i < id->n_features; i++)
        if (id->feature[i].layer == layer) {
            *column = i;
            return &id->feature[i];
        }
    return NULL;
}

static enum rt_status map_auto(const struct rt_row_identity *id, int student_layers, int teacher_layers, struct rt_feature_map *out,
                               struct rt_err *err)
{
    for (int i = 0; i < id->n_features; i++) {
        const int t = id->feature[i].layer;
        int s = t;
        if (t > 0 && teacher_layers <= 0)
            return rt_fail(err, RT_USAGE, "--layer-map auto needs the number of the teacher's layers, which these shards do not tell: "
                           "give --teacher-layers, or pairs as in --layer-map %d:%d", t, student_layers);
        if (t > teacher_layers && t > 0)
            return rt_fail(err, RT_USAGE, "--teacher-layers %d: a state of layer %d is stored", teacher_layers, t);
        if (t > 0)
            s = (int)floor((double)t * student_layers / teacher_layers + 0.5);
        out->pair[out->n++] = (struct rt_feature_pair){t, s, id->feature[i].dim};
    }
    return RT_OK;
}

static bool read_layer(const char **text, int *layer)
{
    char *end;
    if (strncmp(*text, "final", 5) == 0) {
        *layer = RT_LAYER_FINAL;
        *text += 5;
        return true;
    }
    const long v = strtol(*text, &end, 10);
    if (end == *text || v < 0 || v > 1 << 20)
        return false;
    *layer = (int)v;
    *text = end;
    return true;
}

enum rt_status rt_feature_map_parse(const char *text, const struct rt_row_identity *id, int student_layers, int teacher_layers,
                                    struct rt_feature_map *out, struct rt_err *err)
{
    char stored[128], name[16];
    *out = (struct rt_feature_map){0};
    stored_layers(id, stored);
    if (id->n_features == 0)
        return rt_fail(err, RT_USAGE, "--w-feature: the data hold no hidden states; `retort logits --features` stores them");
    if (text == NULL) /* --layer-map "" */
        return rt_fail(err, RT_USAGE, "--layer-map: expected auto or pairs as in 20:8,40:16,final:final, found nothing");
    if (strcmp(text, "auto") == 0)
        return map_auto(id, student_layers, teacher_layers, out, err);
    while (*text != '\0') {
        struct rt_feature_pair p;
        const char *begin = text;
        int column;
        bool ok = out->n < RT_MAX_FEATURES && read_layer(&text, &p.teacher) && *text == ':';
        if (ok)
            text++;
        if (!ok || !read_layer(&text, &p.student) || (*text != ',' && *text != '\0'))
            return rt_fail(err, RT_USAGE, "--layer-map: expected auto or at most %d pairs as in 20:8,40:16,final:final, found '%s'",
                           RT_MAX_FEATURES, begin);
        const struct rt_feature_spec *spec = find_spec(id, p.teacher, &column);
        layer_name(name, p.teacher);
        if (spec == NULL)
            return rt_fail(err, RT_USAGE, "--layer-map: no state of teacher layer %s is stored; stored are %s", name, stored);
        if (p.student > student_layers)
            return rt_fail(err, RT_USAGE, "--layer-map: student layer %d; it has %d", p.student, student_layers);
        for (int i = 0; i < out->n; i++)
            if (out->pair[i].teacher == p.teacher && out->pair[i].student == p.student)
                return rt_fail(err, RT_USAGE, "--layer-map: the pair '%.*s' is there twice: one projector belongs to it", (int)(text - begin), begin);
        p.dim = spec->dim;
        out->pair[out->n++] = p;
        text += *text == ',';
    }
    return RT_OK;
}

enum rt_status rt_feature_column(const struct rt_feature_pair *p, const struct rt_row_identity *id, const char *path, int *column,
                                 struct rt_err *err)
{
    *column = -1;
    const struct rt_feature_spec *spec = id != NULL ? find_spec(id, p->teacher, column) : NULL;
    if (spec != NULL && spec->dim != p->dim)
        return rt_fail(err, RT_SHAPE, "%s: states of layer %d have %d numbers, those of the other data %d", path, p->teacher, spec->dim, p->dim);
    return RT_OK;
}

/* ---- projectors ---- */

/* Offsets in elements, each block at a multiple of 64. */
static int64_t elements(const struct rt_feature_map *map, int64_t hidden, int64_t offset[RT_MAX_FEATURES])
{
    int64_t n = 0;
    for (int i = 0; i < map->n; i++) {
        offset[i] = n;
        n += (map->pair[i].dim * hidden + 63) / 64 * 64;
    }
    return n;
}

size_t rt_projectors_bytes(const struct rt_feature_map *map, int64_t hidden, size_t act_size, bool bf16_moments)
{
    int64_t offset[RT_MAX_FEATURES];
    const int64_t n = elements(map, hidden, offset);
    return 2 * rt_arena_round((size_t)n * act_size) + rt_adamw_state_bytes(n, act_size, bf16_moments);
}

enum rt_status rt_projectors_create(struct rt_projectors *p, const struct rt_device *d, const struct rt_feature_map *map, int64_t hidden,
                                    const struct rt_adamw *o, uint64_t seed, struct rt_arena *arena, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int64_t offset[RT_MAX_FEATURES];
    *p = (struct rt_projectors){.d = d, .map = *map, .H = hidden};
    if (map->n == 0)
        return RT_OK;
    p->table = (struct rt_params){.at = p->entry, .n = map->n, .elements = elements(map, hidden, offset)};
    const size_t bytes = (size_t)p->table.elements * rt_device_act_size(d);
    char **const block[] = {&p->w, &p->grad};
    for (int i = 0; i < 2; i++) {
        RT_TRY(rt_arena_alloc(arena, bytes, block[i], err));
        RT_TRY(rt_device_zero(d, *block[i], bytes, err));
    }
    RT_TRY(rt_adamw_state_init(&p->state, d, p->table.elements, o, arena, err));
    for (int i = 0; i < map->n; i++) {
        struct rt_param *e = &p->entry[i];
        char t[16], s[16];
        *e = (struct rt_param){.kind = RT_PARAM_MATRIX, .layer = -1, .rows = map->pair[i].dim, .cols = hidden, .offset = offset[i]};
        layer_name(t, map->pair[i].teacher);
        layer_name(s, map->pair[i].student);
        snprintf(e->name, sizeof e->name, "projector.%s.%s.weight", t, s);
        RT_TRY(d->be->weight_param(d->dev, p->w + (size_t)offset[i] * rt_device_act_size(d), e->rows, e->cols, &p->weight[i], err));
    }
    RT_TRY(rt_params_init(&p->table, d, p->w, 1 / sqrt((double)hidden), seed, err));
out:
    if (st != RT_OK)
        rt_projectors_free(p);
    return st;
}

void rt_projectors_free(struct rt_projectors *p)
{
    for (int i = 0; i < p->map.n; i++)
        if (p->weight[i] != NULL)
            p->d->be->weight_free(p->d->dev, p->weight[i]);
    *p = (struct rt_projectors){0};
}

enum rt_status rt_projectors_zero_grads(struct rt_projectors *p, struct rt_err *err)
{
    return p->map.n == 0 ? RT_OK : rt_device_zero(p->d, p->grad, (size_t)p->table.elements * rt_device_act_size(p->d), err);
}

enum rt_status rt_projectors_norm(const struct rt_projectors *p, double *norm, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *norm = 0;
    if (p->map.n > 0)
        RT_TRY(RT_OP(p->d, sumsq, err, .x = p->grad, .n = p->table.elements, .out = norm));
    *norm = sqrt(*norm);
out:
    return st;
}

enum rt_status rt_projectors_step(struct rt_projectors *p, const struct rt_adamw *o, double lr, int64_t step, double norm, struct rt_err *err)
{
    if (p->map.n == 0)
        return RT_OK;
    const double scale = o->clip > 0 ? fmin(1, o->clip / (norm + 1e-6)) : 1;
    return RT_OP(p->d, adamw, err, .p = p->w, .low = p->state.low, .grad = p->grad, .m = p->state.m, .v = p->state.v, .moment = p->state.moment,
                 .n = p->table.elements, .step = step, .lr = lr, .beta1 = o->beta1, .beta2 = o->beta2, .eps = o->eps, .decay = o->decay,
                 .grad_scale = scale, .seed = o->seed + 1);
}

static const char *const files[] = {"projector.safetensors", "projector_m.safetensors", "projector_v.safetensors"};

enum rt_status rt_projectors_checkpoint(const struct rt_projectors *p, struct rt_ckpt_writer *w, struct rt_err *err)
{
    return p->map.n == 0 ? RT_OK : rt_adamw_checkpoint(&p->table, p->d, p->w, &p->state, files, w, err);
}

enum rt_status rt_projectors_restore(struct rt_projectors *p, const char *dir, struct rt_err *err)
{
    return p->map.n == 0 ? RT_OK : rt_adamw_restore(&p->table, p->d, p->w, &p->state, files, dir, err);
}
