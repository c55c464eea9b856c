#include "teacher/score_state.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "core/sha256.h"
#include "formats/state_file.h"

#define KIND "retort-window"
enum { PIECE = 4 << 20 };
/* Saving may take a fiftieth of the time: that much work is at stake before it is done again. */
#define COST_SHARE 50.0

static void note(const struct rt_score_state *s, const char *text)
{
    if (s->o->keep.note != NULL)
        s->o->keep.note(s->o->keep.note_self, text);
}

static enum rt_status identify(struct rt_score_state *s, const struct rt_rows *seqs, int64_t n_seqs, struct rt_err *err)
{
    const struct rt_score_options *o = s->o;
    const struct rt_teacher *t = s->t;
    struct rt_buf text = {0};
    struct rt_sha256 sha;
    enum rt_status st;
    RT_TRY(rt_buf_printf(&text, err,
                         "window %" PRId64 " tokens %" PRId64 " of %" PRId64 " chunk %" PRId64 " teacher %s %s act %d w8a8 %d load %d seed %" PRIu64,
                         o->keep.window, s->n, t->plan.window, t->plan.chunk, rt_teacher_sha256(t), t->o.device->be->name,
                         (int)t->o.device->be->act, t->o.w8a8, o->load != NULL, o->projection_seed));
    for (int i = 0; i < o->n_features; i++)
        RT_TRY(rt_buf_printf(&text, err, " feature %d %d %d %d", o->feature[i].layer, o->feature[i].dim, (int)o->feature[i].dtype,
                             o->feature[i].projected));
    rt_sha256_init(&sha);
    rt_sha256_update(&sha, text.data, text.len);
    for (int64_t i = 0; i < n_seqs; i++) {
        rt_sha256_update(&sha, seqs[i].key, sizeof seqs[i].key);
        rt_sha256_update(&sha, &seqs[i].occurrence, sizeof seqs[i].occurrence);
        rt_sha256_update(&sha, &seqs[i].n_tokens, sizeof seqs[i].n_tokens);
    }
    rt_sha256_final_hex(&sha, s->identity);
out:
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_score_state_init(struct rt_score_state *s, struct rt_teacher *t, const struct rt_score_options *o, struct rt_features *f,
                                   const struct rt_rows *seqs, int64_t n_seqs, int64_t n, struct rt_err *err)
{
    enum rt_status st;
    *s = (struct rt_score_state){.t = t, .o = o, .f = f, .n = n, .since = rt_now()};
    if (o->keep.dir == NULL)
        return RT_OK;
    RT_TRY(identify(s, seqs, n_seqs, err));
    rt_features_keep(f, o->keep.dir, s->identity);
out:
    return st;
}

static uint64_t hidden_bytes(const struct rt_score_state *s)
{
    return (uint64_t)s->n * (uint64_t)s->t->c.hidden * rt_device_act_size(s->t->o.device);
}

static uint64_t load_bytes(const struct rt_score_state *s)
{
    return s->o->load != NULL ? (uint64_t)s->t->c.layers * (uint64_t)s->t->c.experts * sizeof(int64_t) : 0;
}

/* ---- saving ---- */

bool rt_score_state_due(const struct rt_score_state *s)
{
    const double every = s->o->keep.every;
    if (s->o->keep.dir == NULL || isinf(every))
        return false;
    return every <= 0 || rt_now() - s->since >= fmax(every, COST_SHARE * s->cost);
}

static enum rt_status put_hidden(const struct rt_score_state *s, struct rt_state_writer *w, struct rt_err *err)
{
    const struct rt_device *d = s->t->o.device;
    const uint64_t all = hidden_bytes(s);
    void *piece = NULL;
    enum rt_status st;
    RT_TRY(d->be->host_alloc(d->dev, PIECE, &piece, err));
    for (uint64_t at = 0; at < all; at += PIECE) {
        const uint64_t n = all - at < PIECE ? all - at : PIECE;
        RT_TRY(rt_device_download(d, piece, (const char *)s->t->hidden + at, n, err));
        RT_TRY(rt_state_put(w, piece, n, err));
    }
out:
    if (piece != NULL)
        d->be->host_free(d->dev, piece);
    return st;
}

enum rt_status rt_score_state_save(struct rt_score_state *s, int layers, struct rt_err *err)
{
    struct rt_json *v = NULL;
    struct rt_state_writer *w = NULL;
    char path[4096];
    const double t0 = rt_now();
    enum rt_status st = RT_OK;
    if (s->o->keep.dir == NULL || layers <= s->saved)
        return RT_OK;
    RT_TRY(rt_mkdirs(s->o->keep.dir, err));
    RT_TRY(rt_features_save(s->f, layers, err)); /* first: a state says that they are there */
    RT_TRY(rt_path_join(path, sizeof path, s->o->keep.dir, "state", err));
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_string(v, "identity", s->identity, err));
    RT_TRY(rt_json_set_int(v, "window", s->o->keep.window, err));
    RT_TRY(rt_json_set_int(v, "layer", layers, err));
    RT_TRY(rt_state_create(path, KIND, v, hidden_bytes(s) + load_bytes(s), &w, err));
    RT_TRY(put_hidden(s, w, err));
    RT_TRY(rt_state_put(w, s->o->load, load_bytes(s), err));
    RT_TRY(rt_state_commit(w, err));
    s->saved = layers;
    s->since = rt_now();
    s->cost = s->since - t0;
out:
    rt_state_writer_free(w);
    rt_json_free(v);
    return st;
}

/* ---- going on ---- */

static enum rt_status get_hidden(struct rt_score_state *s, struct rt_state_reader *r, struct rt_err *err)
{
    const struct rt_device *d = s->t->o.device;
    const uint64_t all = hidden_bytes(s);
    void *piece = NULL;
    enum rt_status st;
    RT_TRY(d->be->host_alloc(d->dev, PIECE, &piece, err));
    for (uint64_t at = 0; at < all; at += PIECE) {
        const uint64_t n = all - at < PIECE ? all - at : PIECE;
        RT_TRY(rt_state_read(r, piece, n, err));
        RT_TRY(rt_device_upload(d, (char *)s->t->hidden + at, piece, n, err));
        RT_TRY(rt_device_sync(d, err));
    }
out:
    if (piece != NULL)
        d->be->host_free(d->dev, piece);
    return st;
}

static enum rt_status load(struct rt_score_state *s, const char *path, int *layers, struct rt_err *err)
{
    struct rt_state_reader *r = NULL;
    const char *identity;
    int64_t at;
    enum rt_status st;
    RT_TRY(rt_state_open(path, KIND, &r, err));
    RT_TRY(rt_json_string(rt_state_header(r), "identity", &identity, err));
    if (strcmp(identity, s->identity) != 0)
        RT_FAIL(err, REFUSED, "%s: it is of another window, plan, checkpoint or backend", path);
    RT_TRY(rt_json_int(rt_state_header(r), "layer", 1, s->t->c.layers, &at, err));
    if (rt_state_bytes(r) != hidden_bytes(s) + load_bytes(s))
        RT_FAIL(err, FORMAT, "%s: %" PRIu64 " bytes of states, expected %" PRIu64, path, rt_state_bytes(r), hidden_bytes(s) + load_bytes(s));
    RT_TRY(get_hidden(s, r, err));
    RT_TRY(rt_state_read(r, s->o->load, load_bytes(s), err));
    RT_TRY(rt_features_load(s->f, (int)at, err));
    *layers = (int)at;
out:
    rt_state_reader_free(r);
    return st;
}

enum rt_status rt_score_state_load(struct rt_score_state *s, int *layers, struct rt_err *err)
{
    char path[4096], text[700];
    struct rt_err why = {0};
    enum rt_status st = RT_OK;
    *layers = 0;
    if (s->o->keep.dir == NULL)
        return RT_OK;
    RT_TRY(rt_path_join(path, sizeof path, s->o->keep.dir, "state", err));
    if (!rt_path_exists(path))
        return RT_OK;
    st = load(s, path, layers, &why);
    if (st == RT_NOMEM || st == RT_DEVICE)
        RT_TRY(rt_fail(err, st, "%s", why.msg));
    if (st == RT_OK) {
        s->saved = *layers;
        snprintf(text, sizeof text, "window %" PRId64 ": goes on after layer %d of %d", s->o->keep.window + 1, *layers, s->t->c.layers);
    } else {
        unlink(path);
        rt_features_forget(s->f);
        if (s->o->load != NULL) /* what a state that was read in part left there */
            memset(s->o->load, 0, load_bytes(s));
        snprintf(text, sizeof text, "window %" PRId64 ": its saved state is not used, and it starts again: %s", s->o->keep.window + 1, why.msg);
        st = RT_OK;
    }
    note(s, text);
out:
    return st;
}

int rt_score_saved_layer(const char *dir)
{
    struct rt_state_reader *r = NULL;
    struct rt_err err = {0};
    char path[4096];
    int64_t layer = 0;
    if (rt_path_join(path, sizeof path, dir, "state", &err) == RT_OK && rt_path_exists(path) && rt_state_open(path, KIND, &r, &err) == RT_OK)
        (void)rt_json_int(rt_state_header(r), "layer", 0, INT32_MAX, &layer, &err);
    rt_state_reader_free(r);
    return (int)layer;
}

enum rt_status rt_score_drop(const char *dir, struct rt_err *err)
{
    char **names = NULL, path[4096];
    size_t n = 0;
    enum rt_status st = RT_OK;
    if (!rt_path_is_dir(dir))
        return RT_OK;
    /* the state first: it says that the features are there */
    RT_TRY(rt_path_join(path, sizeof path, dir, "state", err));
    unlink(path);
    RT_TRY(rt_list_dir(dir, &names, &n, err));
    for (size_t i = 0; i < n; i++) {
        RT_TRY(rt_path_join(path, sizeof path, dir, names[i], err));
        unlink(path);
    }
    if (rmdir(dir) != 0)
        RT_TRY(rt_fail_errno(err, "cannot remove '%s'", dir));
out:
    rt_names_free(names, n);
    return st;
}
