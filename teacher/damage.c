#include "teacher/damage.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "teacher/part_table.h"

enum { PIECE = 1 << 20 }; /* elements read at a time */

struct search {
    const struct rt_tensors *ts;
    uint8_t *bytes;              /* [PIECE * 8] */
    float *values;               /* [PIECE] */
    const struct rt_tensor *bad; /* the first one, and its first bad element */
    int64_t element;
    int64_t more;                /* bad tensors after it */
    const struct rt_tensor *greatest;
    double most;
};

/* The first code of e4m3 that is no number: sign and all other bits set. -1: none. */
static int64_t nan_code(const uint8_t *p, int64_t n)
{
    const uint8_t *a = memchr(p, 0x7f, (size_t)n), *b = memchr(p, 0xff, a != NULL ? (size_t)(a - p) : (size_t)n);
    return b != NULL ? b - p : a != NULL ? a - p : -1;
}

/* The first value that is not finite, -1: none; *most = the greatest magnitude so far. */
static int64_t not_finite(const float *v, int64_t n, double *most)
{
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(v[i]))
            return i;
        *most = fabs((double)v[i]) > *most ? fabs((double)v[i]) : *most;
    }
    return -1;
}

static enum rt_status search_tensor(struct search *s, const struct rt_tensor *t, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const int64_t all = rt_tensor_elements(t);
    double most = 0;
    for (int64_t at = 0; at < all; at += PIECE) {
        const int64_t n = all - at < PIECE ? all - at : PIECE;
        int64_t found;
        if (t->dtype == RT_E4M3) {
            RT_TRY(rt_tensors_read_range(s->ts, t, (uint64_t)at, (uint64_t)n, s->bytes, err));
            found = nan_code(s->bytes, n);
        } else {
            RT_TRY(rt_tensors_read_f32(s->ts, t, at, n, s->values, err));
            found = not_finite(s->values, n, &most);
        }
        if (found < 0)
            continue;
        if (s->bad == NULL) {
            s->bad = t;
            s->element = at + found;
        } else {
            s->more++;
        }
        return RT_OK;
    }
    if (most > s->most) {
        s->most = most;
        s->greatest = t;
    }
out:
    return st;
}

static void describe(const struct search *s, char text[RT_DAMAGE_TEXT])
{
    char shape[160], more[64] = "";
    if (s->bad == NULL && s->greatest == NULL) {
        snprintf(text, RT_DAMAGE_TEXT, "no damaged tensor: overflow");
        return;
    }
    if (s->bad == NULL) {
        snprintf(text, RT_DAMAGE_TEXT, "no damaged tensor: overflow (the greatest value is %.3g, in %.120s)", s->most, s->greatest->name);
        return;
    }
    if (s->more > 0)
        snprintf(more, sizeof more, ", and %" PRId64 " more tensors", s->more);
    const char *path = rt_tensors_file(s->ts, s->bad->file), *base = strrchr(path, '/');
    const uint64_t offset = s->bad->offset + (uint64_t)s->element * rt_dtype_size(s->bad->dtype);
    snprintf(text, RT_DAMAGE_TEXT, "damaged tensor %.120s, %s: element %" PRId64 " (%.80s, offset %" PRIu64 ") is no number%s; restore the file",
             s->bad->name, rt_tensor_describe(s->bad, shape), s->element, base != NULL ? base + 1 : path, offset, more);
}

static enum rt_status open_search(struct search *s, const struct rt_tensors *ts, struct rt_err *err)
{
    enum rt_status st;
    *s = (struct search){.ts = ts};
    RT_TRY(rt_alloc(PIECE, sizeof *s->bytes, "a search for damage", &s->bytes, err));
    RT_TRY(rt_alloc(PIECE, sizeof *s->values, "a search for damage", &s->values, err));
out:
    return st;
}

static void close_search(struct search *s, enum rt_status st, const struct rt_err *err, char text[RT_DAMAGE_TEXT])
{
    if (st == RT_OK || s->bad != NULL)
        describe(s, text);
    else
        snprintf(text, RT_DAMAGE_TEXT, "its tensors could not be looked through: %.300s", err->msg);
    rt_free(s->bytes);
    rt_free(s->values);
}

void rt_damage_find(const struct rt_tensors *ts, const struct rt_teacher_config *c, const struct rt_part_id *parts, int64_t n,
                    char text[RT_DAMAGE_TEXT])
{
    struct search s;
    struct rt_part_plan plan;
    struct rt_err err = {0};
    enum rt_status st;
    RT_TRY(open_search(&s, ts, &err));
    for (int64_t i = 0; i < n; i++) {
        RT_TRY(rt_part_plan(ts, c, parts[i], &plan, &err));
        for (int k = 0; k < plan.n; k++) {
            if (plan.t[k].weight == NULL)
                continue;
            RT_TRY(search_tensor(&s, plan.t[k].weight, &err));
            if (plan.t[k].scale != NULL)
                RT_TRY(search_tensor(&s, plan.t[k].scale, &err));
        }
    }
out:
    close_search(&s, st, &err, text);
}

void rt_damage_find_in(const struct rt_tensors *ts, const char *name, char text[RT_DAMAGE_TEXT])
{
    struct search s;
    struct rt_err err = {0};
    const struct rt_tensor *t;
    enum rt_status st;
    RT_TRY(open_search(&s, ts, &err));
    RT_TRY(rt_tensors_get(ts, name, 0, -1, NULL, &t, &err));
    RT_TRY(search_tensor(&s, t, &err));
out:
    close_search(&s, st, &err, text);
}
