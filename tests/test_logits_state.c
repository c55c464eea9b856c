/* The state of a window under way: stopped, failed or damaged, a window ends with the bytes of one that was never touched. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "core/mem.h"
#include "teacher/score.h"
#include "tests/far_device.h"
#include "tests/suite.h"

enum { SEQS = 4, MOST = 30, LAYERS = 4, EXPERTS = 12 };
static const int64_t lengths[SEQS] = {30, 2, 17, 25};

/* The embedded teacher: one dense layer and three with experts. Weights are streamed, so that files can fail in the middle of a pass. */
struct setup {
    char dir[512], keep[512];
    struct rt_device d;
    struct rt_teacher *t;
    uint32_t ids[SEQS][MOST];
    uint8_t mask[SEQS][MOST];
    struct rt_rows seqs[SEQS];
    int64_t load[LAYERS * EXPERTS];
    int asked, stop_at;       /* the stop that answers yes, 0: none */
    int first_seen;           /* the first layer whose states were shown */
    int broken_after;         /* a layer after which `damage` is run */
    char damage[700];
    struct rt_buf notes;
    bool far;                 /* the device has memory of its own */
};

static void open_teacher(struct setup *s)
{
    static struct rt_backend far; /* devices borrow their table */
    struct rt_err err = {0};
    const struct rt_backend *be;
    far = far_backend();
    far_memory((uint64_t)4 << 30);
    assert_ok(rt_backend_select("cpu", NULL, 0, &be, &err));
    be = s->far ? &far : be;
    assert_ok(rt_device_open(be, &(const struct rt_dev_options){.threads = 2}, &s->d, &err));
    const struct rt_teacher_options o = {.dir = s->dir, .device = &s->d, .memory = s->far ? (int64_t)4 << 30 : (int64_t)RT_TEACHER_FIXED_BYTES + 5000000, .max_length = MOST,
                                         .window = 80, .data_tokens = 80, .token_bytes = 500};
    assert_ok(rt_teacher_open(&o, &s->t, &err));
    assert_int_equal(rt_teacher_plan(s->t)->resident, s->far);
}

static void set_up(struct setup *s, const char *name)
{
    memset(s, 0, sizeof *s);
    snprintf(s->keep, sizeof s->keep, "%s", test_tmp(name));
    snprintf(s->dir, sizeof s->dir, "%s", test_data("examples/tiny_teacher"));
    for (int i = 0; i < SEQS; i++) {
        for (int64_t j = 0; j < lengths[i]; j++) {
            s->ids[i][j] = (uint32_t)((i * 131 + j * 17 + j * j) % 900);
            s->mask[i][j] = 1;
        }
        s->seqs[i] = (struct rt_rows){.n_tokens = lengths[i], .ids = s->ids[i], .loss_mask = s->mask[i], .source_line = i + 1};
        rt_rows_key(s->ids[i], lengths[i], s->seqs[i].key);
    }
    open_teacher(s);
}

static void close_teacher(struct setup *s)
{
    rt_teacher_close(s->t);
    rt_device_close(&s->d);
    s->t = NULL;
}

static void tear_down(struct setup *s)
{
    close_teacher(s);
    rt_buf_free(&s->notes);
}

/* A copy of the teacher that may be harmed. */
static void copy_teacher(struct setup *s, const char *name)
{
    char cmd[2200], dir[512];
    snprintf(dir, sizeof dir, "%s", test_tmp(name));
    snprintf(cmd, sizeof cmd, "mkdir -p '%s' && cp '%s'/*.json '%s'/*.safetensors '%s'/", dir, s->dir, s->dir, dir);
    assert_int_equal(system(cmd), 0);
    strcpy(s->dir, dir);
    close_teacher(s);
    open_teacher(s);
}

/* ---- what scoring asks and tells ---- */

static enum rt_status keep_rows(void *self, const struct rt_rows *r, struct rt_err *err)
{
    struct rt_buf *b = self;
    const size_t n = (size_t)r->n_rows;
    enum rt_status st;
    RT_TRY(rt_buf_append(b, r->topk_ids, n * (size_t)r->k * 4, err));
    RT_TRY(rt_buf_append(b, r->topk_logits, n * (size_t)r->k * 4, err));
    RT_TRY(rt_buf_append(b, r->lse, n * (size_t)r->n_lse * 4, err));
    RT_TRY(rt_buf_append(b, r->next_logprob, n * 4, err));
    RT_TRY(rt_buf_append(b, r->feature[0], (size_t)r->n_tokens * 256 * 2, err));
    RT_TRY(rt_buf_append(b, r->feature[1], (size_t)r->n_tokens * 16, err));
    RT_TRY(rt_buf_append(b, r->feature_scale[1], (size_t)r->n_tokens * 4, err));
    RT_TRY(rt_buf_append(b, r->feature[2], (size_t)r->n_tokens * 256 * 2, err));
out:
    return st;
}

static bool stop(void *self)
{
    struct setup *s = self;
    return ++s->asked == s->stop_at;
}

static void seen(void *self, int layer, __attribute__((unused)) const void *x, __attribute__((unused)) int64_t n)
{
    struct setup *s = self;
    if (s->first_seen < 0)
        s->first_seen = layer;
}

static void progress(void *self, int done, __attribute__((unused)) int layers)
{
    struct setup *s = self;
    if (s->broken_after > 0 && done == s->broken_after)
        assert_int_equal(system(s->damage), 0);
}

static void take_note(void *self, const char *text)
{
    struct setup *s = self;
    assert_int_equal(rt_buf_printf(&s->notes, NULL, "%s\n", text), RT_OK);
}

static struct rt_score_options options(struct setup *s, bool spill)
{
    struct rt_score_options o = {.top_k = 5, .n_ids = rt_teacher_config(s->t)->vocab_size, .n_lse = 2, .lse_temperature = {1, 2}, .projection_seed = 3,
                                 .n_features = 3, .load = s->load, .stop = stop, .stop_self = s, .tap = seen, .tap_self = s,
                                 .progress = progress, .progress_self = s};
    o.feature[0] = (struct rt_feature_spec){.layer = 0, .dim = 256, .dtype = RT_BF16};
    o.feature[1] = (struct rt_feature_spec){.layer = 2, .dim = 16, .dtype = RT_E4M3, .projected = true};
    o.feature[2] = (struct rt_feature_spec){.layer = RT_LAYER_FINAL, .dim = 256, .dtype = RT_BF16};
    o.keep = (struct rt_score_keep){.dir = s->keep, .window = 6, .every = INFINITY, .spill = spill, .note = take_note, .note_self = s};
    return o;
}

/* One attempt; *rows gets what was put. */
static enum rt_status attempt(struct setup *s, const struct rt_score_options *o, struct rt_buf *rows, struct rt_err *err)
{
    struct rt_row_sink sink = {.self = rows, .put = keep_rows};
    rows->len = s->notes.len = 0;
    s->asked = 0;
    s->first_seen = -2;
    memset(s->load, 0, sizeof s->load);
    return rt_teacher_score(s->t, o, s->seqs, SEQS, 0, &sink, err);
}

/* What an undisturbed run gives. */
struct truth {
    struct rt_buf rows;
    int64_t load[LAYERS * EXPERTS];
};

static struct truth undisturbed(struct setup *s)
{
    struct truth t = {0};
    struct rt_err err = {0};
    struct rt_score_options o = options(s, false);
    o.keep = (struct rt_score_keep){0};
    assert_ok(attempt(s, &o, &t.rows, &err));
    assert_true(t.rows.len > 74 * (256 * 4 + 16));
    memcpy(t.load, s->load, sizeof t.load);
    return t;
}

static void assert_same(struct setup *s, const struct truth *t, const struct rt_buf *rows)
{
    assert_int_equal(rows->len, t->rows.len);
    assert_memory_equal(rows->data, t->rows.data, rows->len);
    assert_memory_equal(s->load, t->load, sizeof t->load);
}

/* ---- tests ---- */

/* Stopped before each layer and before the head, with features in memory, in files, and from a device with memory of its own: it goes on there, in another process's place (the
 * teacher is opened again). */
static void stopped_anywhere_it_goes_on(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    struct rt_buf rows = {0};
    set_up(&s, "state-stop");
    struct truth t = undisturbed(&s);
    for (int kind = 0; kind < 3; kind++)
        for (int layer = 0; layer <= LAYERS; layer++) {
            s.far = kind == 2;
            close_teacher(&s);
            open_teacher(&s);
            struct rt_score_options o = options(&s, kind != 0);
            s.stop_at = layer + 1;
            assert_status(attempt(&s, &o, &rows, &err), INTERRUPTED);
            assert_int_equal(rows.len, 0);
            assert_int_equal(rt_score_saved_layer(s.keep), layer);
            close_teacher(&s);
            open_teacher(&s);
            s.stop_at = 0;
            assert_ok(attempt(&s, &o, &rows, &err));
            assert_same(&s, &t, &rows);
            /* the layers behind the state were not computed again: the first states shown are those after the next layer */
            assert_int_equal(s.first_seen, layer == 0 ? 0 : layer == LAYERS ? RT_LAYER_FINAL : layer + 1);
            assert_ok(rt_score_drop(s.keep, &err));
            assert_false(rt_path_exists(s.keep));
        }
    rt_buf_free(&rows);
    rt_buf_free(&t.rows);
    tear_down(&s);
}

/* Stopped again and again, with features that change from memory to files and back. */
static void stopped_many_times(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    struct rt_buf rows = {0};
    set_up(&s, "state-many");
    struct truth t = undisturbed(&s);
    for (int i = 0; i < LAYERS; i++) {
        struct rt_score_options o = options(&s, i % 2 == 1);
        s.stop_at = 2; /* one layer each time */
        assert_status(attempt(&s, &o, &rows, &err), INTERRUPTED);
        assert_int_equal(rt_score_saved_layer(s.keep), i + 1);
    }
    s.stop_at = 0;
    struct rt_score_options o = options(&s, false);
    assert_ok(attempt(&s, &o, &rows, &err));
    assert_same(&s, &t, &rows);
    rt_buf_free(&rows);
    rt_buf_free(&t.rows);
    tear_down(&s);
}

/* A sink that answers INTERRUPTED is a stop behind all layers: only the head is computed again. */
static enum rt_status refuse(__attribute__((unused)) void *self, __attribute__((unused)) const struct rt_rows *r, struct rt_err *err)
{
    return rt_fail(err, RT_INTERRUPTED, "not now");
}

static void stopped_by_the_sink(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    struct rt_buf rows = {0};
    struct rt_row_sink sink = {.self = NULL, .put = refuse};
    set_up(&s, "state-sink");
    struct truth t = undisturbed(&s);
    struct rt_score_options o = options(&s, true);
    memset(s.load, 0, sizeof s.load);
    assert_status(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, &sink, &err), INTERRUPTED);
    assert_int_equal(rt_score_saved_layer(s.keep), LAYERS);
    assert_ok(attempt(&s, &o, &rows, &err));
    assert_int_equal(s.first_seen, RT_LAYER_FINAL);
    assert_same(&s, &t, &rows);
    rt_buf_free(&rows);
    rt_buf_free(&t.rows);
    tear_down(&s);
}

/* A state that is damaged, cut, of another window, numerics or text, or without its features is not used; that is said, and the window starts
 * again with the same bytes. */
static void what_is_not_its_own_is_not_used(void **state)
{
    (void)state;
    static const char *const harm[] = {
        "printf Q | dd of='%s/state' bs=1 seek=40000 conv=notrunc 2>/dev/null",
        "printf Q | dd of='%s/state' bs=1 seek=60 conv=notrunc 2>/dev/null",
        "truncate -s -1 '%s/state'",
        "truncate -s 0 '%s/state'",
        "printf Q | dd of='%s/feature-1' bs=1 seek=700 conv=notrunc 2>/dev/null",
        "truncate -s 300 '%s/feature-0'",
        "rm '%s/feature-1'",
        "cp '%s/feature-0' '%s/feature-1'",
        "cp '%s/feature-0' '%s/state'",
    };
    enum { HARMS = sizeof harm / sizeof *harm };
    struct setup s;
    struct rt_err err = {0};
    struct rt_buf rows = {0};
    char cmd[2200];
    set_up(&s, "state-harm");
    struct truth t = undisturbed(&s);
    for (int i = 0; i < HARMS + 3; i++) {
        struct rt_score_options o = options(&s, i % 2 == 0);
        s.stop_at = 4;
        if (i == HARMS)
            o.keep.window = 7;
        else if (i == HARMS + 1)
            o.projection_seed = 4;
        else if (i == HARMS + 2)
            s.seqs[1].occurrence = 1;
        assert_status(attempt(&s, &o, &rows, &err), INTERRUPTED);
        assert_int_equal(rt_score_saved_layer(s.keep), 3);
        if (i < HARMS) {
            snprintf(cmd, sizeof cmd, harm[i], s.keep, s.keep);
            assert_int_equal(system(cmd), 0);
        }
        o = options(&s, i % 2 == 0);
        s.stop_at = 0;
        s.seqs[1].occurrence = 0;
        assert_ok(attempt(&s, &o, &rows, &err));
        assert_int_equal(s.first_seen, 0);
        assert_same(&s, &t, &rows);
        assert_non_null(s.notes.data);
        assert_non_null(strstr(s.notes.data, "window 7: its saved state is not used"));
        assert_ok(rt_score_drop(s.keep, &err));
    }
    rt_buf_free(&rows);
    rt_buf_free(&t.rows);
    tear_down(&s);
}

/* The same for the states alone, without features beside them: another window, another text, other counts of experts. */
static void a_foreign_state_is_not_used(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    set_up(&s, "state-foreign");
    for (int i = 0; i < 4; i++) {
        struct rt_score_options o = options(&s, false);
        o.n_features = 0;
        s.stop_at = 4;
        s.asked = 0;
        assert_status(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, NULL, &err), INTERRUPTED);
        assert_int_equal(rt_score_saved_layer(s.keep), 3);
        o.keep.window += i == 1;
        s.ids[2][5] += i == 2;
        rt_rows_key(s.ids[2], lengths[2], s.seqs[2].key);
        o.load = i == 3 ? NULL : s.load;
        s.stop_at = 0;
        s.first_seen = -2;
        s.notes.len = 0;
        assert_ok(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, NULL, &err));
        assert_int_equal(s.first_seen, i == 0 ? 4 : 0);
        assert_non_null(strstr(s.notes.data, i == 0 ? "goes on after layer 3 of 4" : "is not used"));
        assert_ok(rt_score_drop(s.keep, &err));
    }
    tear_down(&s);
}

/* A state that cannot be saved is said, and the window goes on; a stop ends all the same. */
static void a_disk_that_takes_no_state(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    struct rt_buf rows = {0};
    set_up(&s, "state-full");
    struct truth t = undisturbed(&s);
    assert_ok(rt_publish_bytes(s.keep, "", 0, &err)); /* a file where the directory should be */
    strcat(s.keep, "/below");
    struct rt_score_options o = options(&s, false);
    o.keep.every = 0;
    assert_ok(attempt(&s, &o, &rows, &err));
    assert_same(&s, &t, &rows);
    assert_non_null(strstr(s.notes.data, "after layer 1 could not be saved"));
    s.stop_at = 3;
    assert_int_equal(attempt(&s, &o, &rows, &err), RT_INTERRUPTED);
    assert_non_null(strstr(err.msg, "state-full"));
    rt_buf_free(&rows);
    rt_buf_free(&t.rows);
    tear_down(&s);
}

static const struct rt_tensor *tensor_of(struct setup *s, struct rt_tensors **ts, const char *name)
{
    struct rt_err err = {0};
    assert_ok(rt_tensors_open(s->dir, ts, &err));
    const struct rt_tensor *t = rt_tensors_find(*ts, name);
    assert_non_null(t);
    return t;
}

/* Overwrites bytes of a tensor, from element `element` on; keeps what was there in `was`. */
static void overwrite(struct setup *s, const char *name, int64_t element, const void *bytes, size_t n, void *was)
{
    struct rt_tensors *ts;
    const struct rt_tensor *t = tensor_of(s, &ts, name);
    FILE *f = fopen(rt_tensors_file(ts, t->file), "r+b");
    assert_non_null(f);
    const long at = (long)t->offset + (long)element * (long)rt_dtype_size(t->dtype);
    fseek(f, at, SEEK_SET);
    if (was != NULL)
        assert_int_equal(fread(was, 1, n, f), n);
    fseek(f, at, SEEK_SET);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
    rt_tensors_free(ts);
}

/* Which tensor is damaged is found, whatever its type and place; the state before the layer stays, and after the repair the window ends as if
 * nothing had been. */
static void a_damaged_tensor_is_named(void **state)
{
    (void)state;
    static const uint8_t bf16_nan[] = {0xc0, 0x7f}, e4m3_nan[] = {0xff}, f32_inf[] = {0, 0, 0x80, 0x7f}, huge[] = {0, 0, 0x7f, 0x7f};
    static const struct {
        const char *tensor;
        int64_t element;
        const uint8_t *bytes;
        size_t n;
        int kept;           /* layers behind the state that stays */
        const char *want[2];
    } cases[] = {
        {"model.layers.2.mlp.experts.7.down_proj.weight", 5, e4m3_nan, 1, 2, {"after layer 2", "damaged tensor model.layers.2.mlp.experts.7.down_proj.weight,"}},
        {"model.layers.1.self_attn.o_proj.weight_scale_inv", 1, f32_inf, 4, 1, {"after layer 1", "o_proj.weight_scale_inv, F32"}},
        {"model.layers.3.post_attention_layernorm.weight", 9, bf16_nan, 2, 3, {"after layer 3", "post_attention_layernorm.weight, BF16 [256]: element 9"}},
        {"model.layers.1.self_attn.o_proj.weight_scale_inv", 1, huge, 4, 1, {"after layer 1", "no damaged tensor: overflow (the greatest value is 3.39e+38, in model.layers.1.self_attn.o_proj.weight_scale_inv)"}},
        {"model.norm.weight", 3, bf16_nan, 2, 4, {"normalised states", "damaged tensor model.norm.weight"}},
        {"lm_head.weight", 300, bf16_nan, 2, 4, {"logits are not finite", "damaged tensor lm_head.weight"}},
        {"model.embed_tokens.weight", 0, bf16_nan, 2, 0, {"an embedding is not finite", "damaged tensor model.embed_tokens.weight"}},
    };
    struct setup s;
    struct rt_err err = {0};
    struct rt_buf rows = {0};
    uint8_t was[4];
    set_up(&s, "state-nan");
    struct truth t = undisturbed(&s);
    copy_teacher(&s, "state-nan-teacher");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct rt_score_options o = options(&s, false);
        o.keep.every = 0;
        overwrite(&s, cases[i].tensor, cases[i].element, cases[i].bytes, cases[i].n, was);
        close_teacher(&s); /* with the parts that earlier passes left in memory */
        open_teacher(&s);
        assert_int_equal(attempt(&s, &o, &rows, &err), RT_NUMERIC);
        for (int k = 0; k < 2; k++)
            if (strstr(err.msg, cases[i].want[k]) == NULL)
                fail_msg("%s: '%s' lacks '%s'", cases[i].tensor, err.msg, cases[i].want[k]);
        rt_err_clear(&err);
        assert_int_equal(rt_score_saved_layer(s.keep), cases[i].kept);
        overwrite(&s, cases[i].tensor, cases[i].element, was, cases[i].n, NULL);
        close_teacher(&s);
        open_teacher(&s);
        assert_ok(attempt(&s, &o, &rows, &err));
        assert_int_equal(s.first_seen, cases[i].kept == 0 ? 0 : cases[i].kept == LAYERS ? RT_LAYER_FINAL : cases[i].kept + 1);
        assert_same(&s, &t, &rows);
        assert_ok(rt_score_drop(s.keep, &err));
    }
    rt_buf_free(&rows);
    rt_buf_free(&t.rows);
    tear_down(&s);
}

/* A file that shrinks in the middle of a pass: an error that names layer and file, the state kept, and the same bytes once it is back. */
static void a_file_shrinks_in_the_middle(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    struct rt_buf rows = {0};
    struct rt_tensors *ts;
    char cmd[2200];
    set_up(&s, "state-shrink");
    struct truth t = undisturbed(&s);
    copy_teacher(&s, "state-shrink-teacher");
    const struct rt_tensor *last = tensor_of(&s, &ts, "model.layers.3.mlp.experts.9.up_proj.weight");
    const char *file = rt_tensors_file(ts, last->file);
    snprintf(cmd, sizeof cmd, "cp '%s' '%s.whole'", file, file);
    assert_int_equal(system(cmd), 0);
    snprintf(s.damage, sizeof s.damage, "truncate -s %lu '%s'", (unsigned long)last->offset + 10, file);
    s.broken_after = 1;
    struct rt_score_options o = options(&s, true);
    o.keep.every = 0;
    assert_int_equal(attempt(&s, &o, &rows, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "layer "));
    assert_non_null(strstr(err.msg, "model.layers."));
    assert_non_null(strstr(err.msg, file));
    rt_err_clear(&err);
    const int saved = rt_score_saved_layer(s.keep);
    assert_in_range(saved, 1, 3);
    snprintf(cmd, sizeof cmd, "cat '%s.whole' >'%s'", file, file);
    assert_int_equal(system(cmd), 0);
    s.broken_after = 0;
    assert_ok(attempt(&s, &o, &rows, &err));
    assert_int_equal(s.first_seen, saved + 1);
    assert_same(&s, &t, &rows);
    rt_tensors_free(ts);
    rt_buf_free(&rows);
    rt_buf_free(&t.rows);
    tear_down(&s);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(stopped_anywhere_it_goes_on), cmocka_unit_test(stopped_many_times), cmocka_unit_test(stopped_by_the_sink),
    cmocka_unit_test(what_is_not_its_own_is_not_used), cmocka_unit_test(a_foreign_state_is_not_used),
    cmocka_unit_test(a_disk_that_takes_no_state), cmocka_unit_test(a_damaged_tensor_is_named),
    cmocka_unit_test(a_file_shrinks_in_the_middle),
};
RT_SUITE(logits_state, tests)
