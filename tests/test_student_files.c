/* The student and its files: config.json, names and shapes, tied heads, saving and loading. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/rng.h"
#include "formats/json.h"
#include "student/describe.h"
#include "student/save.h"
#include "tests/student_fixture.h"

/* BASE with `extra` members behind it. */
#define BASE \
    "\"hidden_size\": 32, \"intermediate_size\": 40, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"vocab_size\": 50, " \
    "\"max_position_embeddings\": 8192"
#define LLAMA(extra) "{\"model_type\": \"llama\", " BASE extra "}"
#define QWEN2(extra) "{\"model_type\": \"qwen2\", " BASE extra "}"
#define QWEN3(extra) "{\"model_type\": \"qwen3\", " BASE extra "}"

static struct rt_student_config parse(const char *text)
{
    struct rt_err err = {0};
    struct rt_student_config c = {0};
    assert_ok(rt_student_config_parse(text, strlen(text), "config.json", &c, &err));
    return c;
}

static void config_defaults(void **state)
{
    struct rt_student_config c = parse(LLAMA(""));
    assert_true(c.kv_heads == 4 && c.head_dim == 8 && !c.tied && !c.qkv_bias && !c.o_bias && !c.mlp_bias && !c.qk_norm);
    assert_true(c.rope.kind == RT_ROPE_DEFAULT && c.rope.theta == 10000 && c.eps == 1e-6 && c.initializer_range == 0.02);
    assert_true(c.bos == -1 && c.n_eos == 0 && c.dtype == RT_F32);
    rt_student_config_free(&c);
    c = parse(QWEN2(", \"attention_bias\": true, \"use_sliding_window\": false, \"sliding_window\": 4096, \"torch_dtype\": \"bfloat16\", "
                    "\"eos_token_id\": [7, 9], \"bos_token_id\": 3"));
    assert_true(c.qkv_bias && !c.o_bias && c.dtype == RT_BF16 && c.bos == 3 && c.n_eos == 2 && c.eos[1] == 9);
    rt_student_config_free(&c);
    c = parse(QWEN3(", \"attention_bias\": true, \"num_key_value_heads\": 2, \"eos_token_id\": 5, \"dtype\": \"float16\", "
                    "\"layer_types\": [\"full_attention\", \"full_attention\"]"));
    assert_true(c.head_dim == 128 && c.qk_norm && c.qkv_bias && c.o_bias && c.kv_heads == 2 && c.eos[0] == 5 && c.dtype == RT_F16);
    rt_student_config_free(&c);
    /* A window that no position reaches beyond changes nothing. */
    c = parse(QWEN2(", \"use_sliding_window\": true, \"sliding_window\": 8192, \"max_window_layers\": 0"));
    rt_student_config_free(&c);
    c = parse(QWEN2(", \"use_sliding_window\": true, \"sliding_window\": 64, \"max_window_layers\": 2"));
    rt_student_config_free(&c);
    (void)state;
}

static void config_refusals(void **state)
{
    static const struct {
        const char *text;
        enum rt_status status;
        const char *says;
    } bad[] = {
        {"[]", RT_FORMAT, "object"},
        {"{", RT_FORMAT, "config.json"},
        {"{" BASE "}", RT_FORMAT, "model_type"},
        {"{\"model_type\": \"mistral\", " BASE "}", RT_UNSUPPORTED, "mistral"},
        {LLAMA(", \"architectures\": [\"LlamaForSequenceClassification\"]"), RT_UNSUPPORTED, "LlamaForCausalLM"},
        {"{\"model_type\": \"llama\"}", RT_FORMAT, "vocab_size"},
        {LLAMA(", \"num_key_value_heads\": 3"), RT_FORMAT, "num_key_value_heads"},
        {LLAMA(", \"num_key_value_heads\": 0"), RT_FORMAT, "num_key_value_heads"},
        {LLAMA(", \"num_key_value_heads\": \"4\""), RT_FORMAT, "num_key_value_heads"},
        {LLAMA(", \"head_dim\": 7"), RT_FORMAT, "head_dim"},
        {LLAMA(", \"head_dim\": 4000"), RT_FORMAT, "head_dim"},
        {LLAMA(", \"rms_norm_eps\": -1"), RT_FORMAT, "rms_norm_eps"},
        {LLAMA(", \"hidden_act\": \"gelu\""), RT_UNSUPPORTED, "gelu"},
        {LLAMA(", \"attention_dropout\": 0.1"), RT_UNSUPPORTED, "attention_dropout"},
        {QWEN2(", \"mlp_bias\": true"), RT_UNSUPPORTED, "mlp_bias"},
        {LLAMA(", \"partial_rotary_factor\": 0.5"), RT_UNSUPPORTED, "partial_rotary_factor"},
        {LLAMA(", \"rope_interleaved\": true"), RT_UNSUPPORTED, "rope_interleaved"},
        {QWEN2(", \"use_mrope\": true"), RT_UNSUPPORTED, "use_mrope"},
        {LLAMA(", \"quantization_config\": {}"), RT_UNSUPPORTED, "quantization_config"},
        {LLAMA(", \"torch_dtype\": \"float8\""), RT_UNSUPPORTED, "float8"},
        {LLAMA(", \"eos_token_id\": 50"), RT_FORMAT, "eos_token_id"},
        {LLAMA(", \"eos_token_id\": [1, \"2\"]"), RT_FORMAT, "eos_token_id"},
        {LLAMA(", \"eos_token_id\": [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]"), RT_FORMAT, "eos_token_id"},
        {LLAMA(", \"bos_token_id\": 3000000000"), RT_FORMAT, "bos_token_id"},
        {QWEN2(", \"use_sliding_window\": true, \"sliding_window\": 64, \"max_window_layers\": 1"), RT_UNSUPPORTED, "use_sliding_window"},
        {QWEN3(", \"sliding_window\": 64, \"layer_types\": [\"full_attention\", \"sliding_attention\"]"), RT_UNSUPPORTED, "layer_types[1]"},
        {QWEN3(", \"layer_types\": [\"full_attention\"]"), RT_FORMAT, "layer_types"},
        {LLAMA(", \"rope_theta\": 1"), RT_FORMAT, "rope_theta"},
        {LLAMA(", \"rope_scaling\": 3"), RT_FORMAT, "rope_scaling"},
        {LLAMA(", \"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}"), RT_UNSUPPORTED, "dynamic"},
        {LLAMA(", \"rope_scaling\": {\"rope_type\": \"longrope\"}"), RT_UNSUPPORTED, "longrope"},
        {LLAMA(", \"rope_scaling\": {\"type\": \"linear\"}"), RT_FORMAT, "factor"},
        {LLAMA(", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 0.5}"), RT_FORMAT, "factor"},
        {LLAMA(", \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, \"high_freq_factor\": 4}"), RT_FORMAT,
         "high_freq_factor"},
        {LLAMA(", \"rope_parameters\": {\"rope_type\": \"llama3\", \"factor\": 8, \"high_freq_factor\": 4}"), RT_FORMAT, "low_freq_factor"},
    };
    struct rt_student_config c = {0};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct rt_err err = {0};
        const enum rt_status st = rt_student_config_parse(bad[i].text, strlen(bad[i].text), "config.json", &c, &err);
        if (st != bad[i].status || strstr(err.msg, bad[i].says) == NULL || strstr(err.msg, "config.json") == NULL)
            fail_msg("%s: status %d '%s', expected %d naming '%s'", bad[i].text, (int)st, err.msg, (int)bad[i].status, bad[i].says);
    }
    assert_null(c.text);
    (void)state;
}

/* Frequencies were computed from the published formulas by an independent program, to 9 digits. */
static void rope_frequencies(void **state)
{
    static const struct {
        const char *text;
        double factor, freq[8];
    } rows[] = {
        {LLAMA(", \"head_dim\": 16"), 1, {1, 0.316227766, 0.1, 0.0316227766, 0.01, 0.00316227766, 0.001, 0.000316227766}},
        {LLAMA(", \"head_dim\": 16, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}"), 1,
         {0.5, 0.158113883, 0.05, 0.0158113883, 0.005, 0.00158113883, 0.0005, 0.000158113883}},
        {LLAMA(", \"head_dim\": 16, \"rope_theta\": 500000.0, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, "
               "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192}"), 1,
         {1, 0.193922745, 0.0376060309, 0.00729266474, 0.000524846161, 3.4281022e-05, 6.64786987e-06, 1.28917317e-06}},
        {LLAMA(", \"head_dim\": 16, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 2048}"),
         1.138629436111989, {1, 0.316227766, 0.1, 0.025693506, 0.00625, 0.00138349648, 0.00025, 7.90569415e-05}},
        {LLAMA(", \"head_dim\": 16, \"rope_parameters\": {\"rope_type\": \"yarn\", \"rope_theta\": 10000.0, \"factor\": 4.0, "
               "\"original_max_position_embeddings\": 2048, \"truncate\": false, \"attention_factor\": 1.5}"),
         1.5, {1, 0.316227766, 0.1, 0.0238701923, 0.00505697152, 0.000811290382, 0.00025, 7.90569415e-05}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct rt_student_config c = parse(rows[i].text);
        float cosine[3 * 8], sine[3 * 8];
        rt_student_rope_table(&c, 3, cosine, sine);
        for (int p = 0; p < 3; p++)
            for (int j = 0; j < 8; j++) {
                const double angle = p * rows[i].freq[j];
                /* float32 of values up to 1.5, and of angles up to 2 */
                assert_true(fabs(cosine[p * 8 + j] - rows[i].factor * cos(angle)) < 3e-7);
                assert_true(fabs(sine[p * 8 + j] - rows[i].factor * sin(angle)) < 3e-7);
            }
        rt_student_config_free(&c);
    }
    (void)state;
}

static void text_patch(void **state)
{
    static const struct {
        const char *text, *key, *value, *out;
    } rows[] = {
        {"{\"a\": 1, \"b\": {\"a\": 2}}", "a", "7", "{\"a\": 7, \"b\": {\"a\": 2}}"},
        {"{\"b\": {\"a\": [2, \"}\\\"\"]},\n \"a\" :  \"x\\\\\" }\n", "a", "null", "{\"b\": {\"a\": [2, \"}\\\"\"]},\n \"a\" :  null }\n"},
        {"{\"b\": 1.50e3}", "a", "true", "{\n  \"a\": true,\"b\": 1.50e3}"},
        {" { } ", "a", "1", " {\n  \"a\": 1\n } "},
        {"{\"ab\": 1, \"a\":[1,[2]]}", "a", "[]", "{\"ab\": 1, \"a\":[]}"},
    };
    struct rt_err err = {0};
    struct rt_buf out = {0};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        out.len = 0;
        assert_ok(rt_json_text_patch(rows[i].text, strlen(rows[i].text), rows[i].key, rows[i].value, &out, &err));
        assert_int_equal(out.len, strlen(rows[i].out));
        assert_memory_equal(out.data, rows[i].out, out.len);
    }
    /* Every cut of a text is refused or handled, never read beyond. */
    const char *text = "{\"b\": {\"a\": [2, \"}\\\"\"]}, \"c\": \"\\";
    for (size_t n = 0; n <= strlen(text); n++) {
        char *exact = malloc(n + 1);
        memcpy(exact, text, n);
        assert_status(rt_json_text_patch(exact, n, "z", "1", &out, &err), FORMAT);
        free(exact);
    }
    rt_buf_free(&out);
    (void)state;
}

/* What changed is patched under the spelling that is there; a head that was tied on loading is said to be tied. */
static void config_text(void **state)
{
    static const struct {
        const char *text, *out;
        bool tie;
    } rows[] = {
        {LLAMA(", \"torch_dtype\": \"float32\""), LLAMA(", \"torch_dtype\": \"bfloat16\""), false},
        {LLAMA(", \"dtype\": \"float32\", \"tie_word_embeddings\": false"), LLAMA(", \"dtype\": \"bfloat16\", \"tie_word_embeddings\": true"),
         true},
        {LLAMA(", \"dtype\": \"float32\", \"torch_dtype\": null"), LLAMA(", \"dtype\": \"bfloat16\", \"torch_dtype\": \"bfloat16\""), false},
        {LLAMA(""), "{\n  \"tie_word_embeddings\": true,\n  \"torch_dtype\": \"bfloat16\",\"model_type\": \"llama\", " BASE "}", true},
    };
    struct rt_err err = {0};
    struct rt_buf out = {0};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct rt_student_config c = parse(rows[i].text);
        c.tied = c.tied || rows[i].tie;
        out.len = 0;
        assert_ok(rt_student_config_text(&c, RT_BF16, &out, &err));
        assert_int_equal(out.len, strlen(rows[i].out));
        assert_memory_equal(out.data, rows[i].out, out.len);
        assert_status(rt_student_config_text(&c, RT_E4M3, &out, &err), USAGE);
        rt_student_config_free(&c);
    }
    struct rt_student_config c = parse(LLAMA(", \"\\u0064type\": \"float32\""));
    assert_status(rt_student_config_text(&c, RT_BF16, &out, &err), FORMAT);
    rt_student_config_free(&c);
    rt_buf_free(&out);
    (void)state;
}

/* Parameter counts that the publishers state, from the shapes alone. */
static void published_sizes(void **state)
{
    static const struct {
        const char *text;
        int64_t count, matmul;
    } rows[] = {
        {"{\"model_type\": \"qwen2\", \"hidden_size\": 896, \"num_hidden_layers\": 24, \"num_attention_heads\": 14, \"num_key_value_heads\": "
         "2, \"intermediate_size\": 4864, \"vocab_size\": 151936, \"tie_word_embeddings\": true}", 494032768, 493961216},
        {"{\"model_type\": \"qwen2\", \"hidden_size\": 3584, \"num_hidden_layers\": 28, \"num_attention_heads\": 28, \"num_key_value_heads\": "
         "4, \"intermediate_size\": 18944, \"vocab_size\": 152064}", 7615616512, 7070285824},
        {"{\"model_type\": \"qwen3\", \"hidden_size\": 1024, \"num_hidden_layers\": 28, \"num_attention_heads\": 16, \"num_key_value_heads\": "
         "8, \"head_dim\": 128, \"intermediate_size\": 3072, \"vocab_size\": 151936, \"tie_word_embeddings\": true}", 596049920, 595984384},
        {"{\"model_type\": \"llama\", \"hidden_size\": 576, \"num_hidden_layers\": 30, \"num_attention_heads\": 9, \"num_key_value_heads\": "
         "3, \"intermediate_size\": 1536, \"vocab_size\": 49152, \"tie_word_embeddings\": true}", 134515008, 134479872},
    };
    struct rt_err err = {0};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct rt_student_config c = parse(rows[i].text);
        struct rt_params p = {0};
        struct rt_json *o = NULL;
        struct rt_buf text = {0};
        int64_t count = 0;
        assert_ok(rt_params_create(&c, &p, &err));
        assert_true(p.count == rows[i].count && p.matmul == rows[i].matmul);
        assert_ok(rt_json_new_object(&o, &err));
        assert_ok(rt_student_describe(&c, &p, true, o, &err));
        assert_ok(rt_json_int(o, "parameters", 0, INT64_MAX, &count, &err));
        assert_true(count == rows[i].count && rt_json_len(rt_json_get(o, "tensors")) == (size_t)p.n);
        assert_ok(rt_student_describe_text(&c, &p, true, &text, &err));
        assert_non_null(strstr(text.data, "model.layers.23.mlp.down_proj.weight"));
        assert_true(rt_student_flops_per_token(&c, &p, 0) == 6.0 * (double)p.matmul);
        assert_true(rt_student_flops_per_token(&c, &p, 100) - 6.0 * (double)p.matmul ==
                    6.0 * c.layers * c.heads * c.head_dim * 100);
        for (int j = 1; j < p.n; j++)
            assert_true(p.at[j].offset >= p.at[j - 1].offset + rt_param_elements(&p.at[j - 1]));
        /* 64 elements are a cache line or more: vectors of a group begin on one. */
        for (int j = 0; j < c.layers; j++)
            assert_true(p.layer[j].qkv % 64 == 0 && p.layer[j].norm2 % 64 == 0 && p.layer[j].gate_up % 64 == 0 &&
                        p.layer[j].down % 64 == 0);
        rt_json_free(o);
        rt_buf_free(&text);
        rt_params_free(&p);
        rt_student_config_free(&c);
    }
    (void)state;
}

/* ---- on disk ---- */

static void read_whole(const char *dir, const char *name, struct rt_buf *out)
{
    struct rt_err err = {0};
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    out->len = 0;
    assert_ok(rt_file_read_all(path, 1 << 24, out, &err));
}

static bool there(const char *dir, const char *name)
{
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return rt_path_exists(path);
}

static void put_file(const char *dir, const char *name, const char *text)
{
    struct rt_err err = {0};
    char path[600];
    assert_ok(rt_mkdirs(dir, &err));
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_ok(rt_publish_bytes(path, text, strlen(text), &err));
}

/* A fixture opened from a directory. */
static void reopen(struct fx *f, const char *dir, const char *config)
{
    struct rt_err err = {0};
    struct rt_tensors *t = NULL;
    fx_open(f, &rt_backend_ref, 1, config);
    assert_ok(rt_device_zero(&f->d, rt_student_block(f->s), (size_t)f->p.elements * sizeof(float), &err));
    assert_ok(rt_tensors_open(dir, &t, &err));
    assert_ok(rt_params_check_model(&f->c, t, false, NULL, &err));
    assert_ok(rt_student_load(f->s, t, &err));
    rt_tensors_free(t);
}

static void save_and_load(void **state)
{
    static const char *const dirs[FX_N] = {"save_qwen2", "save_qwen3", "save_llama"};
    for (int kind = 0; kind < FX_N; kind++) {
        struct fx f, g, h;
        struct rt_err err = {0};
        struct rt_buf a = {0}, b = {0};
        char config[1200], source[512], out[512], half[512], again[512];
        /* A key that nothing here knows, at the end. */
        snprintf(config, sizeof config, "%.*s, \"unknown_key\": {\"x\": 1.50}}", (int)strlen(fx_config[kind]) - 1, fx_config[kind]);
        snprintf(source, sizeof source, "%s_source", test_tmp(dirs[kind]));
        snprintf(out, sizeof out, "%s", test_tmp(dirs[kind]));
        snprintf(half, sizeof half, "%s_half", test_tmp(dirs[kind]));
        snprintf(again, sizeof again, "%s_again", test_tmp(dirs[kind]));
        put_file(source, "tokenizer.json", "{\"not\": \"touched\" }\n");
        put_file(source, "generation_config.json", "{}");
        put_file(source, "other.txt", "stays");
        fx_open(&f, &rt_backend_ref, 1, config);
        assert_ok(rt_student_save(f.s, &(struct rt_student_save){source, RT_F32, 0, NULL}, out, &err));
        read_whole(out, "config.json", &a);
        assert_int_equal(a.len, strlen(config));
        assert_memory_equal(a.data, config, a.len); /* nothing changed, so not a byte does */
        read_whole(out, "tokenizer.json", &a);
        read_whole(source, "tokenizer.json", &b);
        assert_true(a.len == b.len && memcmp(a.data, b.data, a.len) == 0);
        assert_true(there(out, "generation_config.json") && !there(out, "other.txt"));
        reopen(&g, out, config);
        assert_memory_equal(rt_student_block(f.s), rt_student_block(g.s), (size_t)f.p.elements * sizeof(float));
        fx_close(&g);
        /* BF16 in shards: rounding once; saved again the same bytes. */
        assert_ok(rt_student_save(f.s, &(struct rt_student_save){NULL, RT_BF16, 9000, NULL}, half, &err));
        assert_true(there(half, "model.safetensors.index.json") && !there(half, "model.safetensors"));
        read_whole(half, "config.json", &a);
        assert_non_null(strstr(a.data, "dtype\": \"bfloat16\""));
        assert_non_null(strstr(a.data, "\"unknown_key\": {\"x\": 1.50}"));
        read_whole(half, "model.safetensors.index.json", &a);
        assert_true((strstr(a.data, "lm_head.weight") == NULL) == f.c.tied);
        reopen(&g, half, config);
        assert_ok(rt_student_save(g.s, &(struct rt_student_save){NULL, RT_BF16, 0, NULL}, again, &err));
        reopen(&h, again, config);
        assert_memory_equal(rt_student_block(g.s), rt_student_block(h.s), (size_t)f.p.elements * sizeof(float));
        float x = 0, y = 0;
        for (int i = 0; i < f.p.n; i++) {
            assert_ok(rt_param_download(&f.d, rt_student_block(f.s), &f.p.at[i], 3, 1, &x, &err));
            assert_ok(rt_param_download(&g.d, rt_student_block(g.s), &f.p.at[i], 3, 1, &y, &err));
            assert_true(y == rt_bf16_to_f32(rt_f32_to_bf16(x)));
        }
        /* A loader would take the other form first. */
        assert_status(rt_student_save(f.s, &(struct rt_student_save){NULL, RT_F32, 0, NULL}, half, &err), REFUSED);
        assert_status(rt_student_save(f.s, &(struct rt_student_save){NULL, RT_F32, 9000, NULL}, out, &err), REFUSED);
        fx_close(&f);
        fx_close(&g);
        fx_close(&h);
        rt_buf_free(&a);
        rt_buf_free(&b);
    }
    (void)state;
}

/* Moments and step come back from a checkpoint, and the next steps are the same bytes. */
static void checkpoint_resume(void **state)
{
    static const int lens[] = {9, 7};
    struct fx a, b;
    struct fx_docs docs;
    struct rt_err err = {0};
    struct rt_optimizer oa, ob;
    struct rt_step_report r;
    struct rt_ckpt_writer *w = NULL;
    struct rt_ckpt ckpt;
    const struct rt_adamw adamw = {.beta1 = .9, .beta2 = .95, .eps = 1e-8, .decay = .1, .clip = 1.0};
    const char *dir = test_tmp("student_run");
    fx_open(&a, &rt_backend_ref, 1, fx_config[FX_QWEN3]);
    fx_open(&b, &rt_backend_ref, 1, fx_config[FX_QWEN3]);
    fx_docs(&docs, &a, 5, lens, 2);
    assert_ok(rt_optimizer_init(&oa, a.s, &adamw, &a.moments, &err));
    assert_ok(rt_optimizer_init(&ob, b.s, &adamw, &b.moments, &err));
    for (int i = 0; i < 4; i++) {
        if (i == 2) {
            assert_ok(rt_mkdirs(dir, &err));
            assert_ok(rt_ckpt_begin(dir, oa.step, &w, &err));
            assert_ok(rt_student_checkpoint(a.s, &oa, w, &err));
            assert_ok(rt_ckpt_commit(w, 2, &err));
            rt_ckpt_writer_free(w);
            assert_ok(rt_ckpt_latest(dir, NULL, &ckpt, &err));
            assert_ok(rt_student_restore(b.s, &ob, ckpt.path, ckpt.step, &err));
            assert_true(ob.step == 2);
        }
        assert_ok(rt_student_zero_grads(a.s, &err));
        fx_loss(&a, &docs, true);
        assert_ok(rt_optimizer_step(&oa, 1e-2, 1, &r, &err));
        if (i >= 2) {
            assert_ok(rt_student_zero_grads(b.s, &err));
            fx_loss(&b, &docs, true);
            assert_ok(rt_optimizer_step(&ob, 1e-2, 1, &r, &err));
        }
    }
    assert_memory_equal(rt_student_block(a.s), rt_student_block(b.s), (size_t)a.p.elements * sizeof(float));
    fx_close(&a);
    fx_close(&b);
    (void)state;
}

/* Writes the tensors of f under dir, without `missing`, with `extra` and with the first vector cut by one where `cut`. */
static void write_variant(const struct fx *f, const char *dir, const char *missing, const char *extra, bool cut)
{
    struct rt_err err = {0};
    struct rt_tensor_decl decl[64];
    struct rt_tensor_writer *w = NULL;
    int64_t n = 0;
    static const float zeros[4096];
    for (int i = 0; i < f->p.n; i++)
        if (missing == NULL || strcmp(f->p.at[i].name, missing) != 0)
            decl[n++] = rt_param_decl(&f->p.at[i], RT_F32);
    if (cut)
        decl[1].ne[0]--;
    if (extra != NULL)
        decl[n++] = (struct rt_tensor_decl){extra, RT_F32, 2, {f->c.vocab_size, f->c.hidden, 1, 1, 1, 1, 1, 1}};
    assert_ok(rt_tensor_writer_model(dir, decl, n, 0, &w, &err));
    for (int64_t i = 0; i < n; i++) {
        uint64_t bytes = sizeof(float);
        for (int j = 0; j < decl[i].ndim; j++)
            bytes *= (uint64_t)decl[i].ne[j];
        assert_true(bytes <= sizeof zeros);
        assert_ok(rt_tensor_writer_put(w, zeros, bytes, &err));
    }
    assert_ok(rt_tensor_writer_finish(w, &err));
    rt_tensor_writer_free(w);
}

static void wrong_tensors(void **state)
{
    struct fx f, tied;
    struct rt_err err = {0};
    struct rt_tensors *t = NULL;
    char *said = NULL;
    size_t n_said = 0;
    FILE *sink = open_memstream(&said, &n_said);
    struct rt_log log;
    rt_log_init(&log, sink, RT_LOG_INFO);
    fx_open(&f, &rt_backend_ref, 1, fx_config[FX_LLAMA]);
    fx_open(&tied, &rt_backend_ref, 1, fx_config[FX_QWEN2]);
    const struct {
        const struct fx *f;
        const char *missing, *extra;
        bool cut, tie, head_becomes_tied;
        enum rt_status status;
        const char *says; /* in the error, or in the log */
    } rows[] = {
        {&f, NULL, NULL, false, false, false, RT_OK, NULL},
        {&f, "model.layers.1.self_attn.k_proj.weight", NULL, false, false, false, RT_FORMAT, "model.layers.1.self_attn.k_proj.weight"},
        {&f, NULL, NULL, true, false, false, RT_SHAPE, "model.layers.0.input_layernorm.weight"},
        {&f, NULL, "model.surprise", false, false, false, RT_OK, "model.surprise"},
        {&f, NULL, "model.layers.0.self_attn.rotary_emb.inv_freq", false, false, false, RT_OK, NULL},
        {&f, "lm_head.weight", NULL, false, false, false, RT_FORMAT, "lm_head.weight"},
        {&f, "lm_head.weight", NULL, false, true, true, RT_OK, "tied"},
        {&tied, NULL, "lm_head.weight", false, false, false, RT_OK, NULL},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char dir[64];
        snprintf(dir, sizeof dir, "variant_%zu", i);
        const char *path = test_tmp(dir);
        write_variant(rows[i].f, path, rows[i].missing, rows[i].extra, rows[i].cut);
        struct rt_student_config c = rows[i].f->c;
        fflush(sink);
        const size_t before = n_said;
        assert_ok(rt_tensors_open(path, &t, &err));
        const enum rt_status st = rt_params_check_model(&c, t, rows[i].tie, &log, &err);
        fflush(sink);
        const char *text = st == RT_OK ? said + before : err.msg;
        if (st != rows[i].status || (rows[i].says == NULL ? st == RT_OK && n_said != before : strstr(text, rows[i].says) == NULL))
            fail_msg("case %zu: status %d, said '%s'", i, (int)st, text);
        assert_true(c.tied == (rows[i].f->c.tied || rows[i].head_becomes_tied));
        rt_tensors_free(t);
        rt_err_clear(&err);
    }
    fclose(sink);
    free(said);
    fx_close(&f);
    fx_close(&tied);
    (void)state;
}

/* Values depend on seed and name alone: the same in a deeper model; another seed gives others. */
static void initial_values(void **state)
{
    struct rt_err err = {0};
    struct fx a, b;
    char deeper[1200];
    snprintf(deeper, sizeof deeper, "%s", fx_config[FX_LLAMA]);
    memcpy(strstr(deeper, "\"num_hidden_layers\": 2") + 21, "3", 1);
    fx_open(&a, &rt_backend_ref, 1, fx_config[FX_LLAMA]);
    fx_open(&b, &rt_backend_ref, 1, deeper);
    assert_int_equal(b.c.layers, 3);
    assert_ok(rt_student_init(a.s, 1, &err));
    assert_ok(rt_student_init(b.s, 1, &err));
    double sum = 0, squares = 0;
    int64_t count = 0;
    for (int i = 0; i < a.p.n; i++) {
        const struct rt_param *p = &a.p.at[i], *q = rt_params_find(&b.p, p->name);
        const int64_t n = rt_param_elements(p);
        float *x = malloc((size_t)n * sizeof *x), *y = malloc((size_t)n * sizeof *y);
        assert_non_null(q);
        assert_ok(rt_param_download(&a.d, rt_student_block(a.s), p, 0, n, x, &err));
        assert_ok(rt_param_download(&b.d, rt_student_block(b.s), q, 0, n, y, &err));
        assert_memory_equal(x, y, (size_t)n * sizeof *x);
        for (int64_t j = 0; j < n; j++) {
            if (p->kind == RT_PARAM_NORM || p->kind == RT_PARAM_BIAS) {
                assert_true(x[j] == (p->kind == RT_PARAM_NORM ? 1 : 0));
            } else {
                sum += x[j];
                squares += (double)x[j] * x[j];
                count++;
            }
        }
        free(x);
        free(y);
    }
    /* 5 standard errors of the mean, and of the variance (2/n) */
    assert_true(fabs(sum / (double)count) < 5 * 0.02 / sqrt((double)count));
    assert_true(fabs(squares / (double)count / 4e-4 - 1) < 5 * sqrt(2 / (double)count));
    assert_ok(rt_student_init(b.s, 2, &err));
    float x = 0, y = 0;
    assert_ok(rt_param_download(&a.d, rt_student_block(a.s), &a.p.at[0], 5, 1, &x, &err));
    assert_ok(rt_param_download(&b.d, rt_student_block(b.s), &b.p.at[0], 5, 1, &y, &err));
    assert_true(x != y);
    fx_close(&a);
    fx_close(&b);
    (void)state;
}

/* Tensors longer than the pieces in which values cross the border. */
static void long_tensors(void **state)
{
    struct rt_err err = {0};
    struct fx a, b;
    const char *dir = test_tmp("long");
    const char *config = "{\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 16, \"num_hidden_layers\": 1, "
                         "\"num_attention_heads\": 2, \"vocab_size\": 20000, \"tie_word_embeddings\": true}";
    fx_open(&a, &rt_backend_ref, 1, config);
    assert_ok(rt_student_init(a.s, 4, &err));
    const int64_t n = rt_param_elements(&a.p.at[0]);
    float *x = malloc((size_t)n * sizeof *x);
    assert_ok(rt_param_download(&a.d, rt_student_block(a.s), &a.p.at[0], 0, n, x, &err));
    for (int64_t i = 0; i < n; i += 997)
        assert_true(x[i] == rt_bf16_to_f32(rt_f32_to_bf16((float)(0.02 * rt_rng_normal(4, rt_rng_stream("model.embed_tokens.weight"), (uint64_t)i)))));
    assert_ok(rt_student_save(a.s, &(struct rt_student_save){NULL, RT_F32, 0, NULL}, dir, &err));
    reopen(&b, dir, config);
    assert_memory_equal(rt_student_block(a.s), rt_student_block(b.s), (size_t)a.p.elements * sizeof(float));
    free(x);
    fx_close(&a);
    fx_close(&b);
    (void)state;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(config_defaults),  cmocka_unit_test(config_refusals), cmocka_unit_test(rope_frequencies),
    cmocka_unit_test(text_patch),       cmocka_unit_test(published_sizes), cmocka_unit_test(save_and_load),
    cmocka_unit_test(checkpoint_resume), cmocka_unit_test(wrong_tensors),  cmocka_unit_test(initial_values),
    cmocka_unit_test(config_text),      cmocka_unit_test(long_tensors),
};
RT_SUITE(student_files, tests)
