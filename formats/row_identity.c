/* Who made the rows: comparing, and the way to JSON and back. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/row_identity.h"
#include "formats/shard.h"

static enum rt_status differ(const char *where, const char *field, const char *have, const char *want, struct rt_err *err)
{
    return rt_fail(err, RT_REFUSED, "%s: made with another %s: found '%s', expected '%s'", where, field, have[0] != '\0' ? have : "(none)",
                   want[0] != '\0' ? want : "(none)");
}

/* One line for each field, so that two identities are compared, and shown, field by field. */
enum { FIELD = 640 };
static const char *const field_names[] = {
    "teacher_sha256", "tokenizer_sha256", "template_sha256", "mode",       "vocab_size",      "n_ids",
    "top_k",          "temperatures",     "completion_only", "max_length", "projection_seed", "features",
    "teacher_layers", "origin",          "boundary",
};
enum { N_FIELDS = sizeof field_names / sizeof field_names[0] };

static void field_text(const struct rt_row_identity *id, int f, char out[FIELD])
{
    size_t n = 0;
    out[0] = '\0';
    switch (f) {
    case 0: snprintf(out, FIELD, "%s", id->teacher_sha256); break;
    case 1: snprintf(out, FIELD, "%s", id->tokenizer_sha256); break;
    case 2: snprintf(out, FIELD, "%s", id->template_sha256); break;
    case 3: snprintf(out, FIELD, "%s", id->mode); break;
    case 4: snprintf(out, FIELD, "%" PRId64, id->vocab_size); break;
    case 5: snprintf(out, FIELD, "%" PRId64, id->n_ids); break;
    case 6: snprintf(out, FIELD, "%d", id->top_k); break;
    case 7:
        for (int i = 0; i < id->n_lse && n < FIELD; i++) {
            char number[32]; /* the short form where it is exact: 0.6, not 0.59999999999999998 */
            snprintf(number, sizeof number, "%.15g", id->lse_temperature[i]);
            if (strtod(number, NULL) != id->lse_temperature[i])
                snprintf(number, sizeof number, "%.17g", id->lse_temperature[i]);
            n += (size_t)snprintf(out + n, FIELD - n, "%s%s", i > 0 ? ", " : "", number);
        }
        break;
    case 8: snprintf(out, FIELD, "%s", id->completion_only ? "true" : "false"); break;
    case 9: snprintf(out, FIELD, "%" PRId64, id->max_length); break;
    case 10: snprintf(out, FIELD, "%" PRIu64, id->projection_seed); break;
    case 12: snprintf(out, FIELD, "%d", id->teacher_layers); break;
    case 14: snprintf(out, FIELD, "%s", id->boundary ? "true" : "false"); break;
    case 13:
        if (id->origin.mode[0] != '\0')
            snprintf(out, FIELD, "%s from tokenizer %s, template %s, %" PRId64 " ids of %" PRId64 "%s", id->origin.mode, id->origin.tokenizer_sha256,
                     id->origin.template_sha256, id->origin.n_ids, id->origin.vocab_size, id->origin.completion_only ? ", completions" : "");
        break;
    case 11:
        for (int i = 0; i < id->n_features && n < FIELD; i++)
            n += (size_t)snprintf(out + n, FIELD - n, "%slayer %d, %d x %s%s", i > 0 ? "; " : "", id->feature[i].layer, id->feature[i].dim,
                                  rt_dtype_name(id->feature[i].dtype), id->feature[i].projected ? " projected" : "");
        break;
    }
}

enum rt_status rt_row_identity_match(const struct rt_row_identity *have, const struct rt_row_identity *want, const char *where,
                                     struct rt_err *err)
{
    char a[FIELD], b[FIELD];
    for (int f = 0; f < N_FIELDS; f++) {
        field_text(have, f, a);
        field_text(want, f, b);
        if (strcmp(a, b) != 0)
            return differ(where, field_names[f], a, b, err);
    }
    return RT_OK;
}

enum rt_status rt_row_identity_valid(const struct rt_row_identity *id, const char *where, struct rt_err *err)
{
    bool one = false, good = id->n_lse >= 1 && id->n_lse <= RT_MAX_LSE && id->n_features >= 0 && id->n_features <= RT_MAX_FEATURES;
    for (int i = 0; good && i < id->n_lse; i++) {
        const double t = id->lse_temperature[i];
        good = isfinite(t) && t > 0 && (i == 0 || t > id->lse_temperature[i - 1]);
        one |= t == 1;
    }
    if (!good || !one)
        return rt_fail(err, RT_FORMAT, "%s: expected 1 to %d ascending temperatures, 1 among them, and at most %d features", where,
                       RT_MAX_LSE, RT_MAX_FEATURES);
    if (id->vocab_size < 1 || id->vocab_size > RT_MAX_VOCAB || id->n_ids < 1 || id->n_ids > id->vocab_size || id->top_k < 0 ||
        id->top_k > RT_MAX_TOPK || id->max_length < 0)
        return rt_fail(err, RT_FORMAT, "%s: vocab_size %" PRId64 ", n_ids %" PRId64 ", top_k %d, max_length %" PRId64
                       ": expected n_ids <= vocab_size <= %d, top_k <= %d", where, id->vocab_size, id->n_ids, id->top_k, id->max_length,
                       RT_MAX_VOCAB, RT_MAX_TOPK);
    for (int i = 0; i < id->n_features; i++) {
        const struct rt_feature_spec *f = &id->feature[i];
        if (f->layer < RT_LAYER_FINAL || f->dim < 1 || f->dim > RT_MAX_FEATURE_DIM || (f->dtype != RT_BF16 && f->dtype != RT_E4M3))
            return rt_fail(err, RT_FORMAT, "%s: feature %d of layer %d, %d x %s: expected BF16 or F8_E4M3, at most %d wide", where, i,
                           f->layer, f->dim, rt_dtype_name(f->dtype), RT_MAX_FEATURE_DIM);
    }
    if (rt_row_identity_spans(id) && id->top_k > 0)
        return rt_fail(err, RT_FORMAT, "%s: spans with top_k %d: expected 0", where, id->top_k);
    const struct rt_row_origin *o = &id->origin;
    if (o->mode[0] != '\0' && (o->vocab_size < 1 || o->vocab_size > RT_MAX_VOCAB || o->n_ids < 1 || o->n_ids > o->vocab_size))
        return rt_fail(err, RT_FORMAT, "%s: made of %" PRId64 " ids of %" PRId64 ": expected n_ids <= vocab_size <= %d", where, o->n_ids, o->vocab_size,
                       RT_MAX_VOCAB);
    return RT_OK;
}

bool rt_row_identity_spans(const struct rt_row_identity *id)
{
    return strcmp(id->origin.mode, "alm") == 0;
}

int rt_row_identity_k(const struct rt_row_identity *id)
{
    return id->top_k < id->n_ids ? id->top_k : (int)id->n_ids;
}

void rt_row_identity_temperatures(const struct rt_row_identity *id, char out[128])
{
    size_t at = 0;
    out[0] = '\0';
    for (int i = 0; i < id->n_lse && at + 16 < 128; i++)
        at += (size_t)snprintf(out + at, 128 - at, "%s%g", i > 0 ? ", " : "", id->lse_temperature[i]);
}

bool rt_row_identity_dense(const struct rt_row_identity *id)
{
    if (rt_row_identity_spans(id))
        return false;
    for (int i = 0; id->top_k == 0 && i < id->n_features; i++)
        if (id->feature[i].layer == RT_LAYER_FINAL && id->feature[i].dtype == RT_BF16 && !id->feature[i].projected)
            return true;
    return false;
}

enum rt_status rt_row_identity_to_json(const struct rt_row_identity *id, struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list, *o;
    char seed[32];
    RT_TRY(rt_json_set_string(v, "teacher_sha256", id->teacher_sha256, err));
    RT_TRY(rt_json_set_string(v, "tokenizer_sha256", id->tokenizer_sha256, err));
    RT_TRY(rt_json_set_string(v, "template_sha256", id->template_sha256, err));
    RT_TRY(rt_json_set_string(v, "teacher_name", id->teacher_name, err));
    RT_TRY(rt_json_set_string(v, "mode", id->mode, err));
    RT_TRY(rt_json_set_int(v, "vocab_size", id->vocab_size, err));
    RT_TRY(rt_json_set_int(v, "teacher_layers", id->teacher_layers, err));
    RT_TRY(rt_json_set_int(v, "n_ids", id->n_ids, err));
    RT_TRY(rt_json_set_int(v, "top_k", id->top_k, err));
    RT_TRY(rt_json_set_array(v, "temperatures", &list, err));
    for (int i = 0; i < id->n_lse; i++)
        RT_TRY(rt_json_set_double(list, NULL, id->lse_temperature[i], err));
    RT_TRY(rt_json_set_bool(v, "completion_only", id->completion_only, err));
    RT_TRY(rt_json_set_int(v, "max_length", id->max_length, err));
    snprintf(seed, sizeof seed, "%" PRIu64, id->projection_seed); /* text: JSON integers end at 2^63 */
    RT_TRY(rt_json_set_string(v, "projection_seed", seed, err));
    RT_TRY(rt_json_set_array(v, "features", &list, err));
    for (int i = 0; i < id->n_features; i++) {
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_int(o, "layer", id->feature[i].layer, err));
        RT_TRY(rt_json_set_int(o, "dim", id->feature[i].dim, err));
        RT_TRY(rt_json_set_string(o, "dtype", rt_dtype_name(id->feature[i].dtype), err));
        RT_TRY(rt_json_set_bool(o, "projected", id->feature[i].projected, err));
    }
    if (id->boundary)
        RT_TRY(rt_json_set_bool(v, "boundary", true, err));
    if (id->origin.mode[0] == '\0')
        goto out;
    RT_TRY(rt_json_set_object(v, "origin", &o, err));
    RT_TRY(rt_json_set_string(o, "mode", id->origin.mode, err));
    RT_TRY(rt_json_set_string(o, "tokenizer_sha256", id->origin.tokenizer_sha256, err));
    RT_TRY(rt_json_set_string(o, "template_sha256", id->origin.template_sha256, err));
    RT_TRY(rt_json_set_int(o, "vocab_size", id->origin.vocab_size, err));
    RT_TRY(rt_json_set_int(o, "n_ids", id->origin.n_ids, err));
    RT_TRY(rt_json_set_bool(o, "completion_only", id->origin.completion_only, err));
out:
    return st;
}

static enum rt_status get_text(const struct rt_json *v, const char *key, char *out, size_t cap, struct rt_err *err)
{
    const char *s;
    const enum rt_status st = rt_json_string(v, key, &s, err);
    if (st != RT_OK)
        return st;
    if (strlen(s) >= cap)
        return rt_fail(err, RT_FORMAT, "%s: key '%s': %zu bytes, expected fewer than %zu", rt_json_source(v), key, strlen(s), cap);
    strcpy(out, s);
    return RT_OK;
}

static enum rt_status get_lists(const struct rt_json *v, struct rt_row_identity *id, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_json *list = rt_json_get(v, "temperatures");
    if (rt_json_len(list) < 1 || rt_json_len(list) > RT_MAX_LSE)
        RT_FAIL(err, FORMAT, "%s: expected 1 to %d temperatures", rt_json_source(v), RT_MAX_LSE);
    for (size_t i = 0; i < rt_json_len(list); i++)
        if (!rt_json_as_double(rt_json_at(list, i), &id->lse_temperature[i]))
            RT_FAIL(err, FORMAT, "%s: temperature %zu is no number", rt_json_source(v), i);
    id->n_lse = (int)rt_json_len(list);
    list = rt_json_get(v, "features");
    if (rt_json_len(list) > RT_MAX_FEATURES)
        RT_FAIL(err, FORMAT, "%s: expected at most %d features", rt_json_source(v), RT_MAX_FEATURES);
    for (size_t i = 0; i < rt_json_len(list); i++) {
        struct rt_feature_spec *f = &id->feature[i];
        const struct rt_json *o = rt_json_at(list, i);
        const char *name = "";
        int64_t layer, dim;
        RT_TRY(rt_json_int(o, "layer", RT_LAYER_FINAL, 100000, &layer, err));
        RT_TRY(rt_json_int(o, "dim", 1, RT_MAX_FEATURE_DIM, &dim, err));
        RT_TRY(rt_json_string(o, "dtype", &name, err));
        RT_TRY(rt_json_bool_or(o, "projected", false, &f->projected, err));
        if (!rt_dtype_from_name(name, strlen(name), &f->dtype))
            RT_FAIL(err, FORMAT, "%s: feature %zu has the unknown type '%.40s'", rt_json_source(v), i, name);
        f->layer = (int)layer;
        f->dim = (int)dim;
    }
    id->n_features = (int)rt_json_len(list);
out:
    return st;
}

static enum rt_status get_origin(const struct rt_json *v, struct rt_row_origin *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_json *o = rt_json_get(v, "origin");
    if (o == NULL)
        return RT_OK;
    RT_TRY(get_text(o, "mode", out->mode, sizeof out->mode, err));
    RT_TRY(get_text(o, "tokenizer_sha256", out->tokenizer_sha256, sizeof out->tokenizer_sha256, err));
    RT_TRY(get_text(o, "template_sha256", out->template_sha256, sizeof out->template_sha256, err));
    RT_TRY(rt_json_int(o, "vocab_size", 1, RT_MAX_VOCAB, &out->vocab_size, err));
    RT_TRY(rt_json_int(o, "n_ids", 1, out->vocab_size, &out->n_ids, err));
    RT_TRY(rt_json_bool_or(o, "completion_only", false, &out->completion_only, err));
out:
    return st;
}

enum rt_status rt_row_identity_from_json(const struct rt_json *v, struct rt_row_identity *id, struct rt_err *err)
{
    enum rt_status st;
    struct rt_row_identity x = {0};
    char seed[32];
    int64_t top_k, layers;
    RT_TRY(get_text(v, "teacher_sha256", x.teacher_sha256, sizeof x.teacher_sha256, err));
    RT_TRY(get_text(v, "tokenizer_sha256", x.tokenizer_sha256, sizeof x.tokenizer_sha256, err));
    RT_TRY(get_text(v, "template_sha256", x.template_sha256, sizeof x.template_sha256, err));
    RT_TRY(get_text(v, "teacher_name", x.teacher_name, sizeof x.teacher_name, err));
    RT_TRY(get_text(v, "mode", x.mode, sizeof x.mode, err));
    RT_TRY(rt_json_int(v, "vocab_size", 1, RT_MAX_VOCAB, &x.vocab_size, err));
    RT_TRY(rt_json_int(v, "teacher_layers", 0, RT_MAX_TEACHER_LAYERS, &layers, err));
    RT_TRY(rt_json_int(v, "n_ids", 1, x.vocab_size, &x.n_ids, err));
    RT_TRY(rt_json_int(v, "top_k", 0, RT_MAX_TOPK, &top_k, err));
    RT_TRY(rt_json_bool_or(v, "completion_only", false, &x.completion_only, err));
    RT_TRY(rt_json_int_or(v, "max_length", 0, INT64_MAX, 0, &x.max_length, err));
    RT_TRY(get_text(v, "projection_seed", seed, sizeof seed, err));
    char extra;
    if (sscanf(seed, "%" SCNu64 "%c", &x.projection_seed, &extra) != 1)
        RT_FAIL(err, FORMAT, "%s: projection_seed '%s' is no whole number", rt_json_source(v), seed);
    x.top_k = (int)top_k;
    x.teacher_layers = (int)layers;
    RT_TRY(get_lists(v, &x, err));
    RT_TRY(get_origin(v, &x.origin, err));
    RT_TRY(rt_json_bool_or(v, "boundary", false, &x.boundary, err));
    RT_TRY(rt_row_identity_valid(&x, rt_json_source(v), err));
    *id = x;
out:
    return st;
}
