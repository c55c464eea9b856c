/* The options of `retort logits` as numbers. */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "distill/logits.h"

/* A whole number from 0 to most; false where text does not begin with one. */
static bool whole(const char *text, long most, long *out, char **end)
{
    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    *out = strtol(text, end, 10);
    return errno == 0 && *out <= most;
}

static enum rt_status parse_features(const char *text, struct rt_score_options *o, int hidden, int layers, struct rt_err *err)
{
    long dim[RT_MAX_FEATURES];
    while (text != NULL && *text != '\0') {
        char *end = (char *)(uintptr_t)text;
        long layer = RT_LAYER_FINAL;
        if (o->n_features == RT_MAX_FEATURES)
            return rt_fail(err, RT_USAGE, "--features: more than %d layers", RT_MAX_FEATURES);
        struct rt_feature_spec *s = &o->feature[o->n_features];
        bool good = strncmp(text, "final", 5) == 0;
        if (good)
            end += 5;
        else
            good = whole(text, INT_MAX, &layer, &end);
        dim[o->n_features] = 0;
        if (good && *end == ':')
            good = whole(end + 1, INT_MAX, &dim[o->n_features], &end) && dim[o->n_features] > 0;
        if (!good || (*end != ',' && *end != '\0'))
            return rt_fail(err, RT_USAGE, "--features: expected layers as in 20,40,final or 20,40:512, found '%s'", text);
        s->layer = (int)layer;
        if (s->layer > layers)
            return rt_fail(err, RT_USAGE, "--features: layer %d does not exist; the teacher has states 0 (embeddings) to %d, and final", s->layer, layers);
        for (int i = 0; i < o->n_features; i++)
            if (o->feature[i].layer == s->layer)
                return rt_fail(err, RT_USAGE, "--features: '%s' names a layer again: its states would be stored twice, and only the first found", text);
        o->n_features++;
        text = *end == ',' ? end + 1 : end;
    }
    /* a dimension at the end is that of every layer that names none */
    for (int i = 0; i < o->n_features; i++) {
        const long d = dim[i] > 0 ? dim[i] : dim[o->n_features - 1];
        o->feature[i].projected = d > 0;
        o->feature[i].dim = d > 0 ? (int)d : hidden;
        o->feature[i].dtype = d > 0 ? RT_E4M3 : RT_BF16;
        if (d > hidden)
            return rt_fail(err, RT_USAGE, "--features: %ld dimensions of states of %d", d, hidden);
    }
    return RT_OK;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* auto: at least a minute of work is at stake. */
static enum rt_status parse_save_state(struct rt_logits_job *j, struct rt_err *err)
{
    const char *text = j->v->save_state;
    char *end;
    j->keep = strcmp(text, "never") != 0;
    if (strcmp(text, "auto") == 0 || !j->keep) {
        j->save_every = 60;
    } else if (strcmp(text, "layer") == 0) {
        j->save_every = 0;
    } else if (strcmp(text, "stop") == 0) {
        j->save_every = INFINITY;
    } else {
        j->save_every = 60 * strtod(text, &end);
        if (end == text || *end != '\0' || !(j->save_every > 0 && j->save_every < 1e9))
            return rt_fail(err, RT_USAGE, "--save-state %s: expected auto, layer, stop, never, or a number of minutes", text);
    }
    return RT_OK;
}

enum rt_status rt_logits_options(struct rt_logits_job *j, struct rt_err *err)
{
    const struct rt_logits_values *v = j->v;
    struct rt_score_options *o = &j->so;
    enum rt_status st;
    char tail, *end = NULL;
    long k = 0;
    if (strncmp(v->cache, "topk=", 5) != 0 || !whole(v->cache + 5, 65536, &k, &end) || *end != '\0')
        RT_FAIL(err, USAGE, "--cache %s: expected topk=K with K from 0 to 65536", v->cache);
    o->top_k = (int)k;
    if (sscanf(v->part, "%d/%d%c", &j->part, &j->n_parts, &tail) != 2 || j->n_parts < 1 || j->part < 0 || j->part >= j->n_parts)
        RT_FAIL(err, USAGE, "--part %s: expected I/N with 0 <= I < N", v->part);
    RT_TRY(rt_parse_doubles("lse", v->lse, o->lse_temperature, RT_MAX_LSE, &o->n_lse, err));
    bool one = false;
    for (int i = 0; i < o->n_lse; i++) {
        if (!(o->lse_temperature[i] >= 0.01 && o->lse_temperature[i] <= 100))
            RT_FAIL(err, USAGE, "--lse %g: temperatures go from 0.01 to 100", o->lse_temperature[i]);
        one |= o->lse_temperature[i] == 1;
    }
    if (!one && o->n_lse == RT_MAX_LSE)
        RT_FAIL(err, USAGE, "--lse: at most %d temperatures, 1 among them", RT_MAX_LSE);
    if (!one)
        o->lse_temperature[o->n_lse++] = 1;
    qsort(o->lse_temperature, (size_t)o->n_lse, sizeof(double), by_value);
    for (int i = 1; i < o->n_lse; i++)
        if (o->lse_temperature[i] == o->lse_temperature[i - 1])
            RT_FAIL(err, USAGE, "--lse: temperature %g is there twice", o->lse_temperature[i]);
    o->completion_only = strcmp(v->rows, "completion") == 0;
    o->projection_seed = (uint64_t)v->common.seed;
    RT_TRY(parse_save_state(j, err));
    RT_TRY(parse_features(v->features, o, j->config.hidden, j->config.layers, err));
    if (o->top_k == 0 && o->n_features == 0 && !v->boundary)
        RT_FAIL(err, USAGE, "--cache topk=0 without --features or --boundary would store nothing");
out:
    return st;
}
