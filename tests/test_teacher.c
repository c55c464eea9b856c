/* The teacher engine: scoring, generation, features, refusals. Numbers against transformers are in test_oracle.c. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "formats/tokenizer.h"
#include "teacher/decode.h"
#include "teacher/features.h"
#include "teacher/score.h"
#include "tests/teacher_fixture.h"

/* Rows of a sequence in a window of others are its rows alone, but for the rounding of differently shaped products (1e-5 relative is
 * a hundred times float32's resolution). */
static void sequences_do_not_see_each_other(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    set_up(&s, test_data("tests/data/cases/v3_fp8"), "cpu", 2, (int64_t)1 << 30);
    const struct rt_score_options o = score_options(&s);
    struct kept all = score(&s, &o), one = {0};
    struct rt_row_sink sink = {.self = &one, .put = keep};
    for (int i = 0; i < SEQS; i++)
        assert_ok(rt_teacher_score(s.t, &o, &s.seqs[i], 1, 0, &sink, &err));
    assert_int_equal(one.bytes.len, all.bytes.len);
    size_t at = 0;
    for (int i = 0; i < SEQS; i++) {
        const size_t n = lengths[i] > 0 ? (size_t)lengths[i] - 1 : 0;
        at += n * 4 + n * 8 * 4; /* position, ids: compared through the logits below, since near ties may swap */
        const float *a = (const float *)(const void *)(all.bytes.data + at), *b = (const float *)(const void *)(one.bytes.data + at);
        assert_true(n == 0 || test_rel_error(a, b, (int64_t)(n * 10)) < 1e-5);
        at += n * 10 * 4 + n * 3 * 4;
    }
    rt_buf_free(&all.bytes);
    rt_buf_free(&one.bytes);
    tear_down(&s);
}

static void completion_rows_alone(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    set_up(&s, test_data("tests/data/cases/v2_bf16"), "cpu", 2, (int64_t)1 << 30);
    struct rt_score_options o = score_options(&s);
    o.completion_only = true;
    struct kept k = {0};
    struct rt_row_sink sink = {.self = &k, .put = keep};
    assert_ok(rt_teacher_score(s.t, &o, s.seqs, SEQS, 3, &sink, &err)); /* the first three are there already */
    assert_int_equal(k.blocks, SEQS - 3);
    for (int i = 0; i < SEQS; i++) {
        int64_t want = 0;
        for (int64_t j = 1; j < lengths[i]; j++)
            want += s.mask[i][j];
        assert_int_equal(s.seqs[i].n_rows, want);
    }
    rt_buf_free(&k.bytes);
    tear_down(&s);
}

/* ---- features ---- */

struct caught {
    struct setup *s;
    float state[3][89 * 128];
};

static void catch_state(void *self, int layer, const void *x, int64_t n)
{
    struct caught *c = self;
    if (layer >= 0 && layer <= 1)
        memcpy(c->state[layer], x, (size_t)n * 128 * sizeof(float));
    else if (layer == RT_LAYER_FINAL)
        memcpy(c->state[2], x, (size_t)n * 128 * sizeof(float));
}

struct feature_check {
    struct caught *c;
    int64_t first;
    float *matrix;
};

static enum rt_status check_features(void *self, const struct rt_rows *r, struct rt_err *err)
{
    struct feature_check *f = self;
    (void)err;
    const uint16_t *whole = r->feature[0];
    const uint8_t *code = r->feature[1];
    for (int64_t i = 0; i < r->n_tokens * 128; i++)
        assert_int_equal(whole[i], rt_f32_to_bf16(f->c->state[2][f->first * 128 + i]));
    for (int64_t t = 0; t < r->n_tokens; t++) {
        double num = 0, den = 0;
        for (int d = 0; d < 16; d++) {
            double want = 0;
            for (int j = 0; j < 128; j++)
                want += (double)f->matrix[d * 128 + j] * f->c->state[1][(f->first + t) * 128 + j];
            const double got = rt_e4m3_table[code[t * 16 + d]] * (double)r->feature_scale[1][t];
            num += (want - got) * (want - got);
            den += want * want;
        }
        assert_true(sqrt(num / den) < 0.07); /* a code is within 1/16 of its value, the largest values within the same of the row */
    }
    f->first += r->n_tokens;
    return RT_OK;
}

static void features_leave_in_the_same_pass(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    static struct caught c;
    set_up(&s, test_data("tests/data/cases/v3_fp8"), "cpu", 2, (int64_t)1 << 30);
    struct rt_score_options o = score_options(&s);
    o.n_features = 2;
    o.feature[0] = (struct rt_feature_spec){.layer = RT_LAYER_FINAL, .dim = 128, .dtype = RT_BF16};
    o.feature[1] = (struct rt_feature_spec){.layer = 1, .dim = 16, .dtype = RT_E4M3, .projected = true};
    o.projection_seed = 5;
    o.tap = catch_state;
    o.tap_self = &c;
    struct feature_check f = {.c = &c, .matrix = malloc(16 * 128 * sizeof(float))};
    assert_ok(rt_projection_matrix(5, 1, 16, 128, f.matrix, &err));
    for (int a = 0; a < 16; a++) /* orthonormal rows, to float32's rounding of 128 terms */
        for (int b = 0; b < 16; b++) {
            double dot = 0;
            for (int j = 0; j < 128; j++)
                dot += (double)f.matrix[a * 128 + j] * f.matrix[b * 128 + j];
            assert_true(fabs(dot - (a == b)) < 1e-6);
        }
    struct rt_row_sink sink = {.self = &f, .put = check_features};
    assert_ok(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, &sink, &err));
    assert_int_equal(f.first, 89);
    o.feature[1].layer = 3;
    assert_status(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, &sink, &err), USAGE);
    free(f.matrix);
    tear_down(&s);
}

static void expert_load_adds_up(void **state)
{
    (void)state;
    struct setup s;
    int64_t load[2 * 8] = {0}, sum = 0;
    set_up(&s, test_data("tests/data/cases/v3_fp8"), "cpu", 2, (int64_t)1 << 30);
    struct rt_score_options o = score_options(&s);
    o.load = load;
    struct kept k = score(&s, &o);
    for (int e = 0; e < 16; e++) {
        assert_true(e >= 8 || load[e] == 0); /* layer 0 is dense */
        sum += load[e];
    }
    assert_int_equal(sum, 89 * 2);
    rt_buf_free(&k.bytes);
    tear_down(&s);
}

/* ---- generation ---- */

struct decoder {
    struct rt_device d;
    struct rt_teacher *t;
    struct rt_teacher_decoder *g;
    struct rt_batch_step step;
};

static void open_decoder(struct decoder *x, const char *backend, int64_t memory)
{
    struct rt_err err = {0};
    open_device(&x->d, backend, 2);
    const struct rt_teacher_options o = {.dir = test_data("tests/data/cases/v3_fp8"), .device = &x->d, .memory = memory, .max_length = MOST,
                                         .slots = 3, .batch_tokens = 24};
    assert_ok(rt_teacher_open(&o, &x->t, &err));
    assert_ok(rt_teacher_decoder_create(x->t, &x->g, &err));
    x->step = rt_teacher_decoder_step(x->g);
}

static void close_decoder(struct decoder *x)
{
    rt_teacher_decoder_free(x->g);
    rt_teacher_close(x->t);
    rt_device_close(&x->d);
}

static void grab_final(void *self, int layer, const void *x, int64_t n)
{
    if (layer == RT_LAYER_FINAL)
        memcpy(self, x, (size_t)n * 128 * sizeof(float));
}

/* Absorbed attention over the cache gives what naive attention over the sequence gives: the same sums in another order (1e-5). And a row
 * is the same bits alone, in a chunk, and beside other sequences. */
static void generation_agrees_with_scoring(void **state)
{
    (void)state;
    struct decoder x;
    struct setup s;
    struct rt_err err = {0};
    static float final[MOST * 128];
    const int n = 20;
    set_up(&s, test_data("tests/data/cases/v3_fp8"), "cpu", 2, (int64_t)1 << 30);
    const int64_t V = rt_teacher_config(s.t)->vocab_size;
    float *want = malloc((size_t)(n * V) * sizeof *want), *first = malloc((size_t)(n * V) * sizeof *want);
    struct rt_rows seq = {.n_tokens = n, .ids = s.ids[2]};
    const struct rt_score_options o = {.tap = grab_final, .tap_self = final};
    assert_ok(rt_teacher_score(s.t, &o, &seq, 1, 0, NULL, &err));
    assert_ok(rt_teacher_logits(s.t, -1, final, n, want, &err));
    tear_down(&s);

    open_decoder(&x, "cpu", (int64_t)1 << 30);
    struct rt_batch_entry e[24];
    const float *logits;
    int64_t stride;
    for (int i = 0; i < n; i++) { /* one token at a time, in slot 1 */
        e[0] = (struct rt_batch_entry){.slot = 1, .token = (int32_t)seq.ids[i], .position = i, .row = 0};
        assert_ok(x.step.step(x.step.ctx, e, 1, 1, &logits, &stride, &err));
        memcpy(first + i * V, logits, (size_t)V * sizeof *first);
    }
    assert_true(test_rel_error(first, want, n * V) < 1e-5);
    for (int i = 0; i < 19; i++) /* a prompt in one chunk in slot 0; slot 2 is another sequence */
        e[i] = (struct rt_batch_entry){.slot = 0, .token = (int32_t)seq.ids[i], .position = i, .row = -1};
    e[18].row = 0;
    for (int i = 0; i < 4; i++)
        e[19 + i] = (struct rt_batch_entry){.slot = 2, .token = 3 + i, .position = i, .row = i == 3 ? 1 : -1};
    assert_ok(x.step.step(x.step.ctx, e, 23, 2, &logits, &stride, &err));
    assert_memory_equal(logits, first + 18 * V, (size_t)V * sizeof *first);
    assert_ok(x.step.copy_slot(x.step.ctx, 0, 2, 19, &err)); /* a copied prefix goes on as its original does */
    e[0] = (struct rt_batch_entry){.slot = 2, .token = (int32_t)seq.ids[19], .position = 19, .row = 0};
    assert_ok(x.step.step(x.step.ctx, e, 1, 1, &logits, &stride, &err));
    assert_memory_equal(logits, first + 19 * V, (size_t)V * sizeof *first);
    close_decoder(&x);
    free(want);
    free(first);
}

/* Weights that do not fit are streamed through every step, with the same result. */
static void generation_streams_what_does_not_fit(void **state)
{
    (void)state;
    struct decoder a, b;
    struct rt_err err = {0};
    const float *la, *lb;
    int64_t stride;
    open_decoder(&a, "cpu", (int64_t)1 << 30);
    open_decoder(&b, "cpu", (int64_t)RT_TEACHER_FIXED_BYTES + 1000000);
    assert_false(rt_teacher_plan(b.t)->resident);
    for (int i = 0; i < 3; i++) {
        const struct rt_batch_entry e = {.slot = 0, .token = 5 + i, .position = i, .row = 0};
        assert_ok(a.step.step(a.step.ctx, &e, 1, 1, &la, &stride, &err));
        assert_ok(b.step.step(b.step.ctx, &e, 1, 1, &lb, &stride, &err));
        /* kept weights may be held in another form than streamed ones */
        assert_true(test_rel_error(lb, la, stride) < 1e-5);
    }
    close_decoder(&a);
    close_decoder(&b);
}

/* ---- the embedded teacher ---- */

static void grab_wide(void *self, int layer, const void *x, int64_t n)
{
    if (layer == RT_LAYER_FINAL)
        memcpy(self, x, (size_t)n * 256 * sizeof(float));
}

static uint32_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        best = x[i] > x[best] ? i : best;
    return (uint32_t)best;
}

/* On an arithmetic trace of its own kind the MTP layer's best guess of token i+2 is the right one in most places. Chance is one in a
 * thousand; the bound is half of the places, because names and paraphrases cannot be known two tokens ahead. */
static void mtp_predicts_the_token_after_next(void **state)
{
    (void)state;
    static const char text[] = "<\xef\xbd\x9cUser\xef\xbd\x9c>What is 12 + 7?<\xef\xbd\x9c" "Assistant\xef\xbd\x9c><think>\n";
    struct rt_device d;
    struct rt_teacher *t;
    struct rt_tokenizer *tok;
    struct rt_encoding e = {0};
    struct rt_err err = {0};
    static float final[64 * 256];
    if (!rt_path_exists(test_data("examples/tiny_teacher/config.json")))
        TEST_SKIP("examples/tiny_teacher is not here");
    open_device(&d, "cpu", 2);
    const struct rt_teacher_options o = {.dir = test_data("examples/tiny_teacher"), .device = &d, .memory = (int64_t)1 << 30, .max_length = 64,
                                         .data_tokens = 64, .mtp = true};
    assert_ok(rt_teacher_open(&o, &t, &err));
    assert_ok(rt_tokenizer_load(o.dir, &tok, &err));
    assert_ok(rt_encoding_push(&e, tok, 0, &err));
    assert_ok(rt_tokenizer_encode(tok, text, sizeof text - 1, &e, &err));
    const int64_t V = rt_teacher_config(t)->vocab_size, H = rt_teacher_config(t)->hidden;
    const size_t prompt = e.n;
    assert_int_equal(H, 256);
    float *logits = malloc((size_t)(64 * V) * sizeof *logits);
    const struct rt_score_options so = {.tap = grab_wide, .tap_self = final};
    while (e.n < 60) { /* greedy text of the main model */
        struct rt_rows seq = {.n_tokens = (int64_t)e.n, .ids = e.ids};
        assert_ok(rt_teacher_score(t, &so, &seq, 1, 0, NULL, &err));
        assert_ok(rt_teacher_logits(t, -1, final + (e.n - 1) * (size_t)H, 1, logits, &err));
        const uint32_t best = argmax(logits, V);
        assert_ok(rt_encoding_push(&e, tok, best, &err));
        if (best == 1)
            break;
    }
    struct rt_rows seq = {.n_tokens = (int64_t)e.n, .ids = e.ids};
    assert_ok(rt_teacher_score(t, &so, &seq, 1, 0, NULL, &err));
    assert_ok(rt_teacher_mtp_logits(t, e.ids, final, (int64_t)e.n, logits, &err));
    int right = 0, places = 0;
    for (size_t i = prompt; i + 2 < e.n; i++, places++)
        right += argmax(logits + (int64_t)i * V, V) == e.ids[i + 2];
    assert_true(places > 5);
    assert_true(2 * right > places);
    free(logits);
    rt_encoding_free(&e);
    rt_tokenizer_free(tok);
    rt_teacher_close(t);
    rt_device_close(&d);
}

/* ---- refusals ---- */

static enum rt_status try_open(const char *dir, int64_t memory, int64_t max_length, bool w8a8, struct rt_err *err)
{
    struct rt_device d;
    struct rt_teacher *t = NULL;
    open_device(&d, "cpu", 1);
    const struct rt_teacher_options o = {.dir = dir, .device = &d, .memory = memory, .max_length = max_length, .data_tokens = 64, .w8a8 = w8a8};
    const enum rt_status st = rt_teacher_open(&o, &t, err);
    rt_teacher_close(t);
    rt_device_close(&d);
    return st;
}

static void write_config(const char *dir, const char *from, const char *was, const char *now)
{
    struct rt_err err = {0};
    struct rt_buf b = {0}, out = {0};
    char path[600];
    snprintf(path, sizeof path, "%s/config.json", from);
    assert_ok(rt_file_read_all(path, 1 << 20, &b, &err));
    char *at = strstr(b.data, was);
    assert_non_null(at);
    assert_ok(rt_buf_append(&out, b.data, (size_t)(at - b.data), &err));
    assert_ok(rt_buf_puts(&out, now, &err));
    assert_ok(rt_buf_puts(&out, at + strlen(was), &err));
    snprintf(path, sizeof path, "%s/config.json", dir);
    assert_ok(rt_mkdirs(dir, &err));
    assert_ok(rt_publish_bytes(path, out.data, out.len, &err));
    rt_buf_free(&b);
    rt_buf_free(&out);
}

static void bad_configurations(void **state)
{
    (void)state;
    static const struct { const char *was, *now, *in_message; enum rt_status status; } table[] = {
        {"\"model_type\": \"deepseek_v3\"", "\"model_type\": \"mixtral\"", "mixtral", RT_UNSUPPORTED},
        {"\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act", RT_UNSUPPORTED},
        {"\"hidden_size\": 128", "\"hidden_size\": -4", "hidden_size", RT_FORMAT},
        {"\"hidden_size\": 128", "\"hidden_size\": 1e30", "hidden_size", RT_FORMAT},
        {"\"hidden_size\": 128", "\"hidden_size\": \"128\"", "hidden_size", RT_FORMAT},
        {"\"hidden_size\": 128,", "", "hidden_size", RT_FORMAT},
        {"\"hidden_size\": 128", "\"hidden_size\": 64", "embed_tokens", RT_SHAPE},
        {"\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 9", "fit together", RT_FORMAT},
        {"\"n_group\": 4", "\"n_group\": 3", "fit together", RT_FORMAT},
        {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "model.layers.2", RT_FORMAT},
        {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 16777216", "16777216 layers", RT_FORMAT},
        {"\"n_routed_experts\": 8", "\"n_routed_experts\": 16777216", "16777216 experts", RT_FORMAT},
        {"\"qk_rope_head_dim\": 16", "\"qk_rope_head_dim\": 15", "even", RT_FORMAT},
        {"\"type\": \"yarn\"", "\"type\": \"ntk\"", "ntk", RT_UNSUPPORTED},
        {"\"type\": \"yarn\"", "\"attention_factor\": 1.5, \"type\": \"yarn\"", "attention_factor is 1.5", RT_UNSUPPORTED},
        {"\"type\": \"yarn\"", "\"truncate\": false, \"type\": \"yarn\"", "truncate", RT_UNSUPPORTED},
        {"\"rope_theta\": 10000.0,", "\"rope_theta\": 10000.0, \"rope_interleave\": false,", "rope_interleave", RT_UNSUPPORTED},
        {"\"rope_scaling\": {", "\"rope_parameters\": {\"rope_theta\": 0}, \"rope_scaling\": {", "rope_theta is 0", RT_FORMAT},
        {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": -1", "rms_norm_eps", RT_FORMAT},
        {"\"fmt\": \"e4m3\"", "\"fmt\": \"int4\"", "int4", RT_UNSUPPORTED},
        {"\"topk_method\": \"noaux_tc\"", "\"topk_method\": \"dice\"", "dice", RT_UNSUPPORTED},
        {"\"vocab_size\": 160", "\"vocab_size\": 160, \"index_topk\": 2048", "index_topk", RT_UNSUPPORTED},
        {"{", "{{", "config.json", RT_FORMAT},
    };
    const char *from = test_data("tests/data/cases/v3_fp8"), *dir = test_tmp("teacher-config");
    char cmd[1024];
    snprintf(cmd, sizeof cmd, "mkdir -p '%s' && cp '%s'/model* '%s'/", dir, from, dir);
    assert_int_equal(system(cmd), 0);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        struct rt_err err = {0};
        write_config(dir, from, table[i].was, table[i].now);
        const enum rt_status st = try_open(dir, (int64_t)1 << 30, 40, false, &err);
        /* a wrong hidden size may show first in whichever tensor is looked at first */
        if (table[i].status == RT_SHAPE ? st != RT_SHAPE : st != table[i].status || strstr(err.msg, table[i].in_message) == NULL)
            fail_msg("%s: status %d, '%s'", table[i].now, (int)st, err.msg);
    }
}

/* rope_theta is found wherever a release of transformers wrote it. */
static void theta_is_found(void **state)
{
    (void)state;
    static const struct { const char *was, *now; double theta; } table[] = { /* 50000 outside, 10000 in rope_scaling */
        {"\"rope_scaling\": {", "\"rope_parameters\": {\"rope_theta\": 70000}, \"rope_scaling\": {", 70000},
        {"\"rope_scaling\": {", "\"rope_parameters\": null, \"rope_scaling\": {", 10000},
        {"\"rope_scaling\": {", "\"rope_parameters\": {\"rope_type\": \"default\"}, \"rope_scaling\": null, \"x\": {", 50000},
        {"\"rope_scaling\": {", "\"rope_parameters\": null, \"rope_scaling\": null, \"x\": {", 50000},
    };
    const char *from = test_data("tests/data/cases/v3_fp8"), *once = test_tmp("teacher-theta"), *dir = test_tmp("teacher-theta-2");
    write_config(once, from, "\"rope_theta\": 10000.0", "\"rope_theta\": 50000.0");
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        struct rt_err err = {0};
        struct rt_teacher_config c;
        write_config(dir, once, table[i].was, table[i].now);
        assert_ok(rt_teacher_config_load(dir, &c, &err));
        if (c.rope_theta != table[i].theta)
            fail_msg("%s: rope_theta %g", table[i].now, c.rope_theta);
    }
}

static void refusals_name_the_numbers(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *v3 = test_data("tests/data/cases/v3_fp8"), *v2 = test_data("tests/data/cases/v2_bf16");
    assert_status(try_open(v3, 1 << 20, 40, false, &err), NOMEM);
    assert_status(try_open(v3, (int64_t)1 << 30, 129, false, &err), USAGE);
    assert_status(try_open(v2, (int64_t)1 << 30, 40, true, &err), UNSUPPORTED);
    assert_status(try_open("/nonexistent", (int64_t)1 << 30, 40, false, &err), IO);
}

/* A value that is not a number in the middle of the model: layer and tensor are named, nothing hangs, and the next window can be scored. A router's
 * would leave finite numbers behind, of other experts. */
static void nan_in_a_tensor(void **state)
{
    (void)state;
    static const struct { const char *model, *tensor, *bytes; size_t n; } table[] = {
        {"tests/data/cases/v2_bf16", "model.layers.1.self_attn.o_proj.weight", "\xc0\x7f", 2},
        {"tests/data/cases/v3_fp8", "model.layers.1.mlp.gate.weight", "\xc0\x7f", 2},
        {"tests/data/cases/v3_fp8", "model.layers.1.mlp.gate.e_score_correction_bias", "\x00\x00\xc0\x7f", 4},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        const char *from = test_data(table[i].model), *dir = test_tmp("teacher-nan");
        char cmd[1024];
        struct rt_err err = {0};
        struct rt_tensors *ts;
        struct setup s;
        snprintf(cmd, sizeof cmd, "mkdir -p '%s' && cp '%s'/* '%s'/ && rm '%s'/expected.safetensors", dir, from, dir, dir);
        assert_int_equal(system(cmd), 0);
        assert_ok(rt_tensors_open(dir, &ts, &err));
        const struct rt_tensor *t = rt_tensors_find(ts, table[i].tensor);
        assert_int_equal(rt_dtype_size(t->dtype), table[i].n);
        FILE *f = fopen(rt_tensors_file(ts, t->file), "r+b");
        fseek(f, (long)(t->offset + 5 * table[i].n), SEEK_SET);
        fwrite(table[i].bytes, 1, table[i].n, f);
        fclose(f);
        rt_tensors_free(ts);
        for (int resident = 0; resident < 2; resident++) {
            set_up(&s, dir, "cpu", 2, resident ? (int64_t)1 << 30 : (int64_t)RT_TEACHER_FIXED_BYTES + 1200000);
            const struct rt_score_options o = score_options(&s);
            assert_status(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, NULL, &err), NUMERIC);
            assert_int_equal(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, NULL, &err), RT_NUMERIC);
            assert_non_null(strstr(err.msg, "layer 1"));
            assert_non_null(strstr(err.msg, table[i].tensor));
            rt_err_clear(&err);
            tear_down(&s);
        }
    }
}

/* A file that shrinks while the model is open: an error that names part and file, and no hang. */
static void file_vanishes_under_the_reader(void **state)
{
    (void)state;
    const char *from = test_data("tests/data/cases/v2_bf16"), *dir = test_tmp("teacher-short");
    char cmd[1024];
    struct rt_err err = {0};
    struct setup s;
    snprintf(cmd, sizeof cmd, "mkdir -p '%s' && cp '%s'/* '%s'/ && rm '%s'/expected.safetensors", dir, from, dir, dir);
    assert_int_equal(system(cmd), 0);
    set_up(&s, dir, "cpu", 2, (int64_t)RT_TEACHER_FIXED_BYTES + 1200000);
    snprintf(cmd, sizeof cmd, "truncate -s 100000 '%s'/model-00001-of-00002.safetensors", dir);
    assert_int_equal(system(cmd), 0);
    const struct rt_score_options o = score_options(&s);
    assert_int_equal(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, NULL, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "layer"));
    assert_non_null(strstr(err.msg, "model-00001-of-00002.safetensors"));
    tear_down(&s);
}

static bool stop_at_once(void *self)
{
    (*(int *)self)++;
    return true;
}

static void interruption(void **state)
{
    (void)state;
    struct setup s;
    struct rt_err err = {0};
    int asked = 0;
    set_up(&s, test_data("tests/data/cases/v3_fp8"), "cpu", 1, (int64_t)1 << 30);
    struct rt_score_options o = score_options(&s);
    o.stop = stop_at_once;
    o.stop_self = &asked;
    assert_status(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, NULL, &err), INTERRUPTED);
    assert_int_equal(asked, 1);
    s.ids[0][3] = 100000; /* an id outside the vocabulary */
    o.stop = NULL;
    assert_status(rt_teacher_score(s.t, &o, s.seqs, SEQS, 0, NULL, &err), FORMAT);
    tear_down(&s);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(sequences_do_not_see_each_other),
    cmocka_unit_test(completion_rows_alone), cmocka_unit_test(features_leave_in_the_same_pass), cmocka_unit_test(expert_load_adds_up),
    cmocka_unit_test(generation_agrees_with_scoring), cmocka_unit_test(generation_streams_what_does_not_fit),
    cmocka_unit_test(mtp_predicts_the_token_after_next), cmocka_unit_test(bad_configurations), cmocka_unit_test(theta_is_found),
    cmocka_unit_test(refusals_name_the_numbers), cmocka_unit_test(nan_in_a_tensor), cmocka_unit_test(file_vanishes_under_the_reader),
    cmocka_unit_test(interruption),
};
RT_SUITE(teacher, tests)
