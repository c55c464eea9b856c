/* Fuzz targets: JSON, tensors, rows, configurations, what a run keeps, arguments. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "core/options.h"
#include "core/sha256.h"
#include "formats/checkpoint.h"
#include "formats/manifest.h"
#include "formats/rundir.h"
#include "formats/shard.h"
#include "student/params.h"
#include "teacher/config.h"
#include "tests/fuzz.h"

#define CASES "tests/data/cases/"

/* ---- JSON ---- */
static const char *const json_words[] = {"{", "}", "[", "]", ",", ":", "\"", "\\u0000", "\\ud800", "\\udc00", "null", "true", "[[[[[[[[[[[[[[[[[[",
                                         "{\"\":", "1e999", "-0", "\xff", "\xf4\x90\x80\x80", "\"a\":1,\"a\":2", "//", "\n", NULL};

static void json_begin(struct fuzz_seeds *s)
{
    static const char text[] = "{\"a\": [1, -2.5e3, \"x\\u00e9\\n\", {\"b\": null, \"c\": 123456789012345678901234567890}], \"d\": true, \"e\": {}}";
    fuzz_seed(s, text, sizeof text - 1);
    fuzz_seed_file(s, CASES "v3_fp8/config.json");
}

/* What was read, written and read again is the same text. */
static enum rt_status json_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    struct rt_json *v = NULL, *w = NULL;
    struct rt_buf a = {0}, b = {0};
    enum rt_status st;
    RT_TRY(rt_json_parse((const char *)data, n, "input", &v, err));
    RT_TRY(rt_json_dump(v, 0, &a, err));
    if (rt_json_parse(a.data, a.len, "dump", &w, err) != RT_OK)
        fuzz_fail("its own dump is refused: %s", err->msg);
    else if (rt_json_dump(w, 0, &b, err) == RT_OK && (a.len != b.len || memcmp(a.data, b.data, a.len) != 0))
        fuzz_fail("dump, parse and dump: another text");
out:
    rt_buf_free(&a);
    rt_buf_free(&b);
    rt_json_free(w);
    rt_json_free(v);
    return st;
}

/* ---- safetensors ---- */
static const char *const tensor_words[] = {"\"shape\":", "\"data_offsets\":", "\"dtype\":\"BF16\"", "[4194305,4194305,211106198978564]", "[0]", "[]",
                                           "\"F64\"", "\"__metadata__\"", "[0,0]", "\"../x\"", "{", "}", ",", "\"a.weight\"", NULL};

static void tensors_begin(struct fuzz_seeds *s)
{
    static const struct rt_tensor_decl decl[] = {{"a.weight", RT_F32, 2, {4, 3}}, {"b", RT_BF16, 1, {5}}, {"c.empty", RT_U8, 2, {0, 7}}, {"d", RT_I64, 0, {0}}};
    struct rt_tensor_writer *w = NULL;
    struct rt_err err = {0};
    const char zeros[48 + 10 + 8] = {1, 2, 3};
    fuzz_dir("fuzz-tensors");
    fuzz_must(rt_tensor_writer_file(fuzz_at("model.safetensors"), decl, 4, &w, &err), &err);
    fuzz_must(rt_tensor_writer_put(w, zeros, sizeof zeros, &err), &err);
    fuzz_must(rt_tensor_writer_finish(w, &err), &err);
    rt_tensor_writer_free(w);
    fuzz_seed_file(s, fuzz_at("model.safetensors"));
}

static enum rt_status read_tensors(const char *path, struct rt_err *err)
{
    struct rt_tensors *t = NULL;
    float x[8];
    enum rt_status st;
    RT_TRY(rt_tensors_open(path, &t, err));
    for (int64_t i = 0; i < rt_tensors_count(t); i++) {
        const struct rt_tensor *k = rt_tensors_at(t, i);
        const int64_t n = rt_tensor_elements(k);
        const enum rt_status one = rt_tensors_read_f32(t, k, n > 8 ? n - 8 : 0, n > 8 ? 8 : n, x, err);
        if (one == RT_UNSUPPORTED)
            rt_err_clear(err);
        else if (one != RT_OK)
            RT_TRY(one);
    }
out:
    rt_tensors_free(t);
    return st;
}

static enum rt_status tensors_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    fuzz_put(fuzz_at("model.safetensors"), data, n);
    return read_tensors(fuzz_at("model.safetensors"), err);
}

static void index_begin(struct fuzz_seeds *s)
{
    static const struct rt_tensor_decl decl[] = {{"a.weight", RT_F32, 2, {4, 3}}, {"b", RT_F32, 1, {12}}, {"c", RT_F32, 1, {12}}};
    struct rt_tensor_writer *w = NULL;
    struct rt_err err = {0};
    const float zeros[36] = {1};
    fuzz_dir("fuzz-index");
    fuzz_must(rt_tensor_writer_model(fuzz_place(), decl, 3, 100, &w, &err), &err);
    fuzz_must(rt_tensor_writer_put(w, zeros, sizeof zeros, &err), &err);
    fuzz_must(rt_tensor_writer_finish(w, &err), &err);
    rt_tensor_writer_free(w);
    fuzz_seed_file(s, fuzz_at("model.safetensors.index.json"));
}

static enum rt_status index_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    fuzz_put(fuzz_at("model.safetensors.index.json"), data, n);
    return read_tensors(fuzz_place(), err);
}

/* ---- rows ---- */
/* A set in the current place; spans: one of version 3, retargeted. */
static void make_set(bool spans)
{
    struct rt_row_identity id = {.vocab_size = 60, .n_ids = 50, .top_k = 3, .n_lse = 2, .lse_temperature = {1, 2}, .n_features = 1,
                                 .feature = {{RT_LAYER_FINAL, 4, RT_E4M3, true}}};
    const struct rt_shard_options o = {.rows_per_shard = 12};
    enum { N = 7 };
    uint32_t ids[N] = {4, 8, 15, 16, 23, 42, 7}, end[N] = {1, 2, 3, 4, 5, 6, 7}, pos[N], next[N], rank[N] = {0}, top[3 * N];
    uint8_t mask[N] = {1, 1, 1, 1, 1, 1, 1}, code[4 * N] = {0};
    float logit[3 * N], lse[2 * N], logprob[N], scale[N], span_logp[N] = {0, -1, 0, 0, -2.5f};
    const uint32_t span[N] = {0, 2, 0, 0, 2};
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_err err = {0};
    memset(id.teacher_sha256, 'a', 64);
    memset(id.tokenizer_sha256, 'b', 64);
    strcpy(id.teacher_name, "fuzz");
    strcpy(id.mode, "w8a16/f32/ref");
    for (int i = 0; i < N; i++) {
        pos[i] = (uint32_t)i;
        next[i] = ids[(i + 1) % N];
        logprob[i] = -0.5f;
        scale[i] = 1;
        lse[2 * i] = 2.5f;
        lse[2 * i + 1] = 3;
        for (int j = 0; j < 3; j++) {
            top[3 * i + j] = (next[i] + (uint32_t)j) % 50;
            logit[3 * i + j] = 2 - (float)j;
        }
    }
    struct rt_rows r = {.source_line = 1, .n_tokens = N, .ids = ids, .loss_mask = mask, .text = "abcdefg", .text_len = N, .byte_end = end,
                        .n_rows = N - 1, .k = 3, .n_lse = 2, .position = pos, .topk_ids = top, .topk_logits = logit, .lse = lse, .next_id = next,
                        .next_logprob = logprob, .next_rank = rank, .n_features = 1, .feature = {code}, .feature_scale = {scale}};
    rt_rows_key(ids, N, r.key);
    if (spans) {
        strcpy(id.origin.mode, "alm");
        id.origin.vocab_size = id.origin.n_ids = 40;
        id.top_k = r.k = 0;
        id.boundary = true;
        r.span = span;
        r.span_logp = span_logp;
        r.feature_mask = mask;
    }
    fuzz_must(rt_shard_sink_open(fuzz_place(), &id, &o, &s, &sink, &resume, &err), &err);
    for (r.occurrence = 0; r.occurrence < 3; r.occurrence++)
        fuzz_must(sink.put(sink.self, &r, &err), &err);
    fuzz_must(sink.finish(sink.self, &err), &err);
    rt_shard_sink_free(s);
}

static void shard_begin(struct fuzz_seeds *s)
{
    fuzz_dir("fuzz-set-spans");
    make_set(true);
    fuzz_seed_file(s, fuzz_at("rows-000000.msgpack"));
    fuzz_dir("fuzz-set");
    make_set(false);
    fuzz_seed_file(s, fuzz_at("rows-000000.msgpack"));
    fuzz_seed_file(s, fuzz_at("rows-000001.msgpack"));
}

static enum rt_status read_set(const char *path, struct rt_err *err)
{
    struct rt_shard_set *set = NULL;
    struct rt_rows rows;
    enum rt_status st;
    RT_TRY(rt_shard_set_open(path, &set, err));
    for (int64_t i = 0; i < rt_shard_set_info(set)->sequences; i++)
        RT_TRY(rt_shard_set_get(set, i, &rows, err));
    RT_TRY(rt_shard_set_verify(set, NULL, err));
out:
    rt_shard_set_free(set);
    return st;
}

static enum rt_status shard_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    fuzz_put(fuzz_at("one.msgpack"), data, n);
    return read_set(fuzz_at("one.msgpack"), err);
}

static void manifest_begin(struct fuzz_seeds *s)
{
    fuzz_dir("fuzz-manifest");
    make_set(false);
    fuzz_seed_file(s, fuzz_at("manifest.jsonl"));
}

static void manifest_repair(uint8_t *data, size_t n)
{
    for (size_t start = 0; start < n;) {
        const uint8_t *nl = memchr(data + start, '\n', n - start);
        const size_t end = nl != NULL ? (size_t)(nl - data) : n;
        char hex[9];
        if (end - start > 18 && memcmp(data + end - 18, ",\"crc\":\"", 8) == 0) {
            snprintf(hex, sizeof hex, "%08x", (unsigned)crc32(0, data + start, (uInt)(end - start - 18)));
            memcpy(data + end - 10, hex, 8);
        }
        start = end + 1;
    }
}

static enum rt_status manifest_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    fuzz_put(fuzz_at("manifest.jsonl"), data, n);
    return read_set(fuzz_place(), err);
}

static void identity_begin(struct fuzz_seeds *s)
{
    fuzz_dir("fuzz-identity");
    make_set(false);
    fuzz_seed_file(s, fuzz_at("identity.json"));
}

static enum rt_status identity_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    struct rt_json *v = NULL;
    struct rt_row_identity id;
    enum rt_status st;
    RT_TRY(rt_json_parse((const char *)data, n, "identity.json", &v, err));
    RT_TRY(rt_row_identity_from_json(v, &id, err));
out:
    rt_json_free(v);
    return st;
}

/* ---- configurations ---- */
static const char *const config_words[] = {"\"hidden_size\": 9223372036854775807", "\"num_hidden_layers\": 2147483647", "\"rope_scaling\": {\"type\": \"yarn\"}",
                                           "\"n_group\": 0", "\"vocab_size\": 0", "\"rope_theta\": 0", "\"rope_theta\": 1e308", "\"rms_norm_eps\": -1",
                                           "\"qk_rope_head_dim\": 3", "\"n_routed_experts\": null", "\"eos_token_id\": [1, 2, -5]", "\"torch_dtype\": \"float16\"",
                                           "\"sliding_window\": 5", "\"model_type\": \"qwen2_moe\"", "\"factor\": 0", "\"head_dim\": 0", NULL};

static void teacher_begin(struct fuzz_seeds *s)
{
    fuzz_dir("fuzz-teacher");
    fuzz_seed_file(s, CASES "v3_fp8/config.json");
    fuzz_seed_file(s, CASES "v2_bf16/config.json");
    fuzz_seed_file(s, "examples/tiny_teacher/config.json");
}

static enum rt_status teacher_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    struct rt_teacher_config c;
    struct rt_teacher_params p;
    enum rt_status st;
    fuzz_put(fuzz_at("config.json"), data, n);
    RT_TRY(rt_teacher_config_load(fuzz_place(), &c, err));
    rt_teacher_count(&c, &p);
    if (!(rt_teacher_flops(&c, 100) > 0) || p.total < p.active || p.active < 0)
        fuzz_fail("%ld parameters, %ld active", (long)p.total, (long)p.active);
    if (c.dr <= 512) {
        float cosine[4 * 256], sine[4 * 256];
        rt_teacher_rope_table(&c, 4, cosine, sine);
    }
out:
    return st;
}

static void student_begin(struct fuzz_seeds *s)
{
    fuzz_seed_file(s, CASES "qwen2/config.json");
    fuzz_seed_file(s, CASES "qwen3/config.json");
    fuzz_seed_file(s, CASES "llama3/config.json");
    fuzz_seed_file(s, "examples/tiny_student/config.json");
}

/* A configuration that is taken is written back so that it says the same. */
static enum rt_status student_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    struct rt_student_config c = {0}, again = {0};
    struct rt_params p = {0};
    struct rt_buf text = {0};
    enum rt_status st;
    RT_TRY(rt_student_config_parse((const char *)data, n, "input", &c, err));
    RT_TRY(rt_student_config_text(&c, RT_BF16, &text, err));
    if (rt_student_config_parse(text.data, text.len, "again", &again, err) != RT_OK)
        fuzz_fail("its own text is refused: %s", err->msg);
    else if (again.dtype != RT_BF16 || again.hidden != c.hidden || again.tied != c.tied || again.layers != c.layers)
        fuzz_fail("its own text says something else");
    if (c.layers <= 64)
        RT_TRY(rt_params_create(&c, &p, err));
    if (c.head_dim <= 512) {
        float cosine[4 * 256], sine[4 * 256];
        rt_student_rope_table(&c, 4, cosine, sine);
    }
out:
    rt_params_free(&p);
    rt_buf_free(&text);
    rt_student_config_free(&again);
    rt_student_config_free(&c);
    return st;
}

/* ---- runs ---- */
static void manifest_of_checkpoint(struct fuzz_seeds *s)
{
    struct rt_ckpt_writer *w = NULL;
    struct rt_err err = {0};
    fuzz_dir("fuzz-ckpt");
    fuzz_must(rt_ckpt_begin(fuzz_place(), 3, &w, &err), &err);
    fuzz_must(rt_ckpt_bytes(w, "a.bin", "0123456789", 10, &err), &err);
    fuzz_must(rt_ckpt_bytes(w, "b.json", "{}", 2, &err), &err);
    fuzz_must(rt_ckpt_commit(w, 2, &err), &err);
    rt_ckpt_writer_free(w);
    fuzz_seed_file(s, fuzz_at("ckpt-00000003/MANIFEST"));
}

static void checkpoint_repair(uint8_t *data, size_t n)
{
    const uint8_t *nl = memchr(data, '\n', n);
    uint8_t digest[32];
    char hex[65];
    if (nl == NULL || (size_t)(nl + 65 - data) > n)
        return;
    rt_sha256(data, (size_t)(nl - data), digest);
    rt_hex(hex, digest, sizeof digest);
    memcpy(data + (nl + 1 - data), hex, 64);
}

static enum rt_status checkpoint_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    struct rt_ckpt c;
    int64_t step;
    fuzz_put(fuzz_at("ckpt-00000003/MANIFEST"), data, n);
    const enum rt_status one = rt_ckpt_verify(fuzz_at("ckpt-00000003"), &step, err), all = rt_ckpt_latest(fuzz_place(), NULL, &c, NULL);
    if (one != RT_OK && all == RT_OK)
        fuzz_fail("taken, although it does not verify");
    return one;
}

struct some_values {
    int64_t n, bytes;
    double x;
    bool flag;
    const char *s, *choice;
    struct rt_str_list list;
};
#define SOME(type, name, ...) {#name, type, offsetof(struct some_values, name), __VA_ARGS__}
static const struct rt_opt some_options[] = {
    SOME(RT_OPT_INT, n, "3", 0, 1e6, NULL, "N", "a number", false, false),
    SOME(RT_OPT_BYTES, bytes, "1G", 0, 9e18, NULL, "8G", "bytes", false, true),
    SOME(RT_OPT_FLOAT, x, "0.5", 0, 1, NULL, "X", "a number", false, false),
    SOME(RT_OPT_FLAG, flag, NULL, 0, 0, NULL, NULL, "a flag", false, false),
    SOME(RT_OPT_STRING, s, NULL, 0, 0, NULL, "S", "a text", false, false),
    SOME(RT_OPT_CHOICE, choice, "a", 0, 0, "a|b|c", NULL, "one of three", false, false),
    SOME(RT_OPT_LIST, list, NULL, 0, 0, NULL, "S", "texts", false, false),
    {0},
};

static void run_begin(struct fuzz_seeds *s)
{
    static const char text[] = "{\"command\":\"x\",\"options\":{\"n\":\"3\",\"x\":\"0.5\",\"s\":\"y\",\"list\":\"a\\nb\"},\"runtime\":{\"bytes\":\"8G\"},\"n\":\"5k\"}";
    fuzz_seed(s, text, sizeof text - 1);
}

/* A run's config.json against another, and its members as values of options. */
static enum rt_status run_config_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    const struct rt_opt *const tables[] = {some_options};
    struct some_values v = {0}, unset = {0};
    struct rt_positionals pos = {0};
    struct rt_json *was = NULL, *now = NULL;
    struct rt_buf diff = {0}, text = {0};
    bool differ;
    const char *key;
    const struct rt_json *value;
    enum rt_status st;
    RT_TRY(rt_options_parse(tables, 1, 0, NULL, &v, &pos, NULL, err));
    RT_TRY(rt_run_config("x", tables, 1, &v, &was, err));
    RT_TRY(rt_json_parse((const char *)data, n, "config.json", &now, err));
    RT_TRY(rt_config_diff(was, now, &differ, &diff, err));
    for (size_t i = 0; rt_json_member(now, i, &key, &value); i++)
        if (rt_json_as_string(value, NULL) != NULL && strcmp(key, "command") != 0)
            RT_TRY(rt_options_set(tables, 1, key, rt_json_as_string(value, NULL), "config.json", &v, err));
    for (const struct rt_opt *o = some_options; o->name != NULL; o++) { /* what was taken is written so that it is taken again */
        text.len = 0;
        RT_TRY(rt_options_value(o, &v, &text, err));
        RT_TRY(rt_buf_puts(&text, "", err));
        if (o->type != RT_OPT_LIST && rt_options_set(tables, 1, o->name, text.data, "again", &unset, err) != RT_OK)
            fuzz_fail("--%s: its own value '%s' is refused: %s", o->name, text.data, err->msg);
    }
out:
    rt_buf_free(&diff);
    rt_buf_free(&text);
    rt_json_free(was);
    rt_json_free(now);
    rt_options_free(tables, 1, &v, &pos);
    return st;
}

static const char *const argument_words[] = {"--n=", "--no-flag", "--flag=maybe", "--list", "--", "-", "--x", "1e309", "0x10", "-1", "9G", "\n", NULL};

static void arguments_begin(struct fuzz_seeds *s)
{
    static const char text[] = "--n\n5\n--x=0.25\nfile\n--flag\n--no-flag\n--list\na\n--choice=b\n--bytes\n8G\n--\n--s";
    fuzz_seed(s, text, sizeof text - 1);
}

static enum rt_status arguments_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    const struct rt_opt *const tables[] = {some_options};
    struct some_values v = {0};
    struct rt_positionals pos = {0};
    bool seen[128];
    char *argv[64], *copy = malloc(n + 1);
    int argc = 0;
    if (copy == NULL)
        return rt_fail(err, RT_IO, "out of memory");
    memcpy(copy, data, n);
    copy[n] = '\0';
    for (char *p = strtok(copy, "\n"); p != NULL && argc < 64; p = strtok(NULL, "\n"))
        argv[argc++] = p;
    const enum rt_status st = rt_options_parse(tables, 1, argc, argv, &v, &pos, seen, err);
    rt_options_free(tables, 1, &v, &pos);
    free(copy);
    return st;
}

const struct fuzz_target fuzz_json = {"json", 3000, json_words, 0, json_begin, NULL, json_run, NULL};
const struct fuzz_target fuzz_safetensors = {"safetensors", 3000, tensor_words, 0, tensors_begin, NULL, tensors_run, NULL};
const struct fuzz_target fuzz_index = {"index", 2000, tensor_words, 0, index_begin, NULL, index_run, NULL};
const struct fuzz_target fuzz_shard = {"shard", 3000, NULL, FUZZ_READER, shard_begin, fuzz_repair_shard, shard_run, NULL};
const struct fuzz_target fuzz_manifest = {"manifest", 2000, NULL, FUZZ_READER, manifest_begin, manifest_repair, manifest_run, NULL};
const struct fuzz_target fuzz_identity = {"identity", 2000, json_words, 0, identity_begin, NULL, identity_run, NULL};
const struct fuzz_target fuzz_teacher_config = {"teacher-config", 2000, config_words, 0, teacher_begin, NULL, teacher_run, NULL};
const struct fuzz_target fuzz_student_config = {"student-config", 2000, config_words, 0, student_begin, NULL, student_run, NULL};
const struct fuzz_target fuzz_checkpoint = {"checkpoint", 2000, json_words, FUZZ_READER, manifest_of_checkpoint, checkpoint_repair, checkpoint_run, NULL};
const struct fuzz_target fuzz_run_config = {"run-config", 2000, json_words, 0, run_begin, NULL, run_config_run, NULL};
const struct fuzz_target fuzz_arguments = {"arguments", 3000, argument_words, 0, arguments_begin, NULL, arguments_run, NULL};
