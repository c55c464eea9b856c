#include "tests/suite.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "distill/inspect.h"
#include "formats/checkpoint.h"
#include "formats/shard.h"

static void put(const char *dir, const char *name, const char *text)
{
    char path[4096];
    struct rt_err err = {0};
    assert_ok(rt_mkdirs(dir, &err));
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_ok(rt_publish_bytes(path, text, strlen(text), &err));
}

static struct rt_json *look(const char *path, const char *kind, const struct rt_inspect_options *o)
{
    struct rt_err err = {0};
    struct rt_json *obj = NULL;
    struct rt_buf text = {0};
    const struct rt_inspect_options none = {0};
    assert_ok(rt_json_new_object(&obj, &err));
    assert_ok(rt_inspect(path, o != NULL ? o : &none, obj, &err));
    assert_string_equal(rt_json_as_string(rt_json_get(obj, "kind"), NULL), kind);
    assert_ok(rt_inspect_print(obj, &text, &err));
    assert_true(text.len > 20 && text.data[text.len - 1] == '\n');
    rt_buf_free(&text);
    return obj;
}

static int64_t at(const struct rt_json *v, const char *object, const char *key)
{
    struct rt_err err = {0};
    int64_t n;
    assert_ok(rt_json_int(object != NULL ? rt_json_get(v, object) : v, key, 0, INT64_MAX, &n, &err));
    return n;
}

static void a_teacher(void **state)
{
    (void)state;
    struct rt_json *v = look(test_data("examples/tiny_teacher"), "teacher", NULL);
    /* by hand from its config.json: vocab 1024, H 256, 4 layers of which 1 dense, 12 experts of 128, 3 a token */
    const int64_t attention = 256 * 128 + 128 + 128 * 8 * 48 + 256 * (128 + 16) + 128 + 128 * 8 * 64 + 8 * 32 * 256 + 2 * 256;
    const int64_t expert = 3 * 256 * 128, router = 12 * 256 + 12;
    const int64_t total = 2 * 1024 * 256 + 256 + 4 * attention + 3 * 256 * 384 + 3 * (router + expert + 12 * expert);
    assert_int_equal(at(v, "parameters", "total"), total);
    assert_int_equal(at(v, "parameters", "active"), total - 1024 * 256 - 3 * 9 * expert);
    assert_int_equal(at(v, "parameters", "total_with_mtp"), total + at(v, "parameters", "mtp") - 2 * 1024 * 256);
    assert_int_equal(at(v, "config", "context"), 1024);
    /* what the tensors hold, scales aside, is what the configuration promises: layers 1-3 are alike */
    const struct rt_json *layers = rt_json_get(v, "layers");
    assert_int_equal(rt_json_len(layers), 3);
    assert_string_equal(rt_json_as_string(rt_json_get(rt_json_at(layers, 1), "layer"), NULL), "1-3");
    assert_int_equal(at(rt_json_at(layers, 1), NULL, "parameters"), attention + router + 13 * expert);
    assert_int_equal(at(v, "parameters", "mtp"), at(rt_json_at(layers, 2), NULL, "parameters"));
    int64_t bytes = 0;
    for (size_t i = 0; i < rt_json_len(rt_json_get(v, "types")); i++)
        bytes += at(rt_json_at(rt_json_get(v, "types"), i), NULL, "bytes");
    assert_int_equal(bytes, at(v, "weights", "bytes"));
    assert_string_equal(rt_json_as_string(rt_json_get(rt_json_get(v, "template"), "family"), NULL), "deepseek_r1");
    assert_int_equal(at(v, "tokenizer", "ids"), 1016);
    rt_json_free(v);
}

static void a_student(void **state)
{
    (void)state;
    const struct rt_inspect_options o = {.tensors = true};
    struct rt_json *v = look(test_data("examples/tiny_student"), "student", &o);
    /* vocab 1024 tied, H 64, 4 layers, 4 heads of 16, 2 kv heads, I 256, biases of q, k, v */
    const int64_t layer = 64 * 64 + 2 * 64 * 32 + 64 + 2 * 32 + 64 * 64 + 3 * 64 * 256 + 2 * 64;
    assert_int_equal(at(v, "parameters", "total"), 1024 * 64 + 64 + 4 * layer);
    assert_int_equal(rt_json_len(rt_json_get(v, "tensors")), at(v, "weights", "tensors"));
    assert_int_equal(at(rt_json_at(rt_json_get(v, "layers"), 0), NULL, "parameters"), layer);
    assert_int_equal(at(rt_json_at(rt_json_get(v, "layers"), 0), NULL, "bytes"), 2 * layer); /* BF16 */
    rt_json_free(v);
}

static void a_model_without_weights(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf text = {0};
    char path[4096];
    snprintf(path, sizeof path, "%s/config.json", test_data("examples/tiny_teacher"));
    assert_ok(rt_file_read_all(path, 1 << 20, &text, &err));
    put(test_tmp("bare"), "config.json", text.data);
    struct rt_json *v = look(test_tmp("bare"), "teacher", NULL), *full = look(test_data("examples/tiny_teacher"), "teacher", NULL);
    assert_int_equal(rt_json_typeof(rt_json_get(v, "weights")), RT_JSON_NULL);
    for (size_t i = 0; i < 3; i++) /* computed from the configuration, as counted in the files */
        assert_int_equal(at(rt_json_at(rt_json_get(v, "layers"), i), NULL, "parameters"), at(rt_json_at(rt_json_get(full, "layers"), i), NULL, "parameters"));
    rt_json_free(full);
    rt_json_free(v);
    rt_buf_free(&text);
}

static void a_teacher_that_lacks_a_tensor(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf text = {0};
    struct rt_json *obj = NULL;
    const struct rt_inspect_options o = {0};
    char path[4096], from[4096];
    static const char *const files[] = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"};
    for (int i = 0; i < 4; i++) {
        text.len = 0;
        snprintf(from, sizeof from, "%s/%s", test_data("examples/tiny_teacher"), files[i]);
        assert_ok(rt_file_read_all(from, 64 << 20, &text, &err));
        assert_ok(rt_mkdirs(test_tmp("lacks"), &err));
        char *experts = i == 3 ? strstr(text.data, "\"n_routed_experts\": 12") : NULL;
        if (experts != NULL)
            memcpy(experts, "\"n_routed_experts\": 16", 22); /* asks for experts that the files lack */
        snprintf(path, sizeof path, "%s/%s", test_tmp("lacks"), files[i]);
        assert_ok(rt_publish_bytes(path, text.data, text.len, &err));
    }
    assert_ok(rt_json_new_object(&obj, &err));
    const enum rt_status st = rt_inspect(test_tmp("lacks"), &o, obj, &err);
    assert_true(st == RT_FORMAT || st == RT_SHAPE);
    assert_int_equal(rt_exit_code(st), 3);
    rt_json_free(obj);
    rt_buf_free(&text);
}

static void a_dataset(void **state)
{
    (void)state;
    char path[4096];
    const char *dir = test_tmp("dataset");
    put(dir, "accepted.jsonl", "{\"prompt\":\"a b\",\"completion\":\"c\",\"answer\":1}\n\n{\"text\":\"x\"}\n{\"input_ids\":[3,4,5]}\n{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},"
        "{\"role\":\"assistant\",\"content\":\"r\"}]}\n{\"prompt\":\"lost");
    struct rt_json *v = look(dir, "dataset", NULL);
    assert_int_equal(at(v, NULL, "lines"), 4);
    assert_int_equal(at(v, "forms", "prompt"), 1);
    assert_int_equal(at(v, "forms", "text"), 1);
    assert_int_equal(at(v, "forms", "input_ids"), 1);
    assert_int_equal(at(v, "forms", "messages"), 1);
    assert_int_equal(at(v, NULL, "with_completion"), 1);
    assert_int_equal(at(v, NULL, "with_answer"), 1);
    assert_int_equal(at(v, NULL, "input_ids_tokens"), 3);
    assert_non_null(rt_json_get(v, "torn_last_line"));
    rt_json_free(v);
    const struct rt_inspect_options o = {.tokenizer = test_data("examples/tiny_student")};
    v = look(test_data("examples/prompts/arithmetic_train.jsonl"), "dataset", &o);
    assert_int_equal(at(v, "tokenized", "prompts"), at(v, NULL, "lines"));
    assert_true(at(v, "tokenized", "tokens") > 5 * at(v, NULL, "lines"));
    rt_json_free(v);
    put(dir, "one.jsonl", "{\"input_ids\":[5,6,7,8]}\n{\"text\":\" kopi\"}\n");
    snprintf(path, sizeof path, "%s/one.jsonl", dir);
    v = look(path, "dataset", &o);
    assert_int_equal(at(v, "tokenized", "sequences"), 2);
    assert_int_equal(at(v, "tokenized", "longest"), 4);
    rt_json_free(v);
}

static void a_shard_set(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_row_identity id = {.vocab_size = 8, .n_ids = 8, .top_k = 2, .n_lse = 1, .lse_temperature = {1}};
    memset(id.teacher_sha256, 'a', 64);
    strcpy(id.teacher_name, "t");
    strcpy(id.mode, "w8a16/f32/ref");
    const uint32_t ids[] = {1, 2, 3}, position[] = {0, 1}, top[] = {2, 0, 3, 1}, next[] = {2, 3}, rank[] = {0, 0};
    const uint8_t mask[] = {0, 1, 1};
    /* two ids with half the mass each of 0.8: logit - lse = log 0.4 */
    const float logits[] = {0, 0, 0, 0}, lse[] = {0.9162907f, 0.9162907f}, logprob[] = {-0.9162907f, -0.9162907f};
    struct rt_rows rows = {.n_tokens = 3, .ids = ids, .loss_mask = mask, .n_rows = 2, .k = 2, .n_lse = 1, .position = position, .topk_ids = top, .topk_logits = logits,
                           .lse = lse, .next_id = next, .next_logprob = logprob, .next_rank = rank, .source_line = 1};
    const uint32_t ascending[] = {0, 2, 1, 3}; /* ties go by id */
    const uint32_t second[] = {1, 1};
    rows.topk_ids = ascending;
    rows.next_rank = second;
    rt_rows_key(ids, 3, rows.key);
    const char *dir = test_tmp("shards");
    const struct rt_shard_options so = {0};
    assert_ok(rt_shard_sink_open(dir, &id, &so, &s, &sink, &resume, &err));
    assert_ok(sink.put(sink.self, &rows, &err));
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(s);
    put(dir, "expert_load.json", "{\"windows\":1,\"layers\":[[0,0,0,0],[6,2,0,0]]}");
    const struct rt_inspect_options o = {.verify = true};
    struct rt_json *v = look(dir, "shards", &o);
    assert_int_equal(at(v, NULL, "rows"), 2);
    assert_int_equal(at(v, NULL, "tokens"), 3);
    double mass, most;
    assert_ok(rt_json_double(rt_json_at(rt_json_get(v, "mass"), 0), "mean", &mass, &err));
    assert_true(mass > 0.79999 && mass < 0.80001);
    const struct rt_json *load = rt_json_get(v, "expert_load");
    assert_int_equal(rt_json_len(load), 1); /* the dense layer has none */
    assert_ok(rt_json_double(rt_json_at(load, 0), "most_to_mean", &most, &err));
    assert_true(most == 3);
    assert_int_equal(at(rt_json_at(load, 0), NULL, "idle_experts"), 2);
    rt_json_free(v);
    put(dir, "expert_load.json", "{\"layers\":[[1,2],[3,-4]]}");
    assert_ok(rt_json_new_object(&v, &err));
    assert_status(rt_inspect(dir, &o, v, &err), FORMAT);
    rt_json_free(v);
}

static void a_run_and_a_checkpoint(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_ckpt_writer *w = NULL;
    const char *dir = test_tmp("run");
    char path[4096];
    put(dir, "config.json", "{\"command\":\"train\",\"options\":{}}");
    put(dir, "metrics.jsonl", "{\"step\":1,\"loss\":3}\n{\"step\":2,\"loss\":2.5}\n{\"st");
    struct rt_json *v = look(dir, "run", NULL); /* before run.json */
    assert_int_equal(at(v, "last_step", "step"), 2);
    rt_json_free(v);
    put(dir, "run.json", "{\"version\":1,\"name\":\"r\",\"finished\":true,\"tokens\":77}");
    put(dir, "eval.jsonl", "{\"step\":1,\"name\":\"x\",\"ce\":3}\n{\"step\":2,\"name\":\"x\",\"ce\":2}\n{\"step\":2,\"name\":\"y\",\"ce\":1}\n");
    assert_ok(rt_ckpt_begin(dir, 2, &w, &err));
    assert_ok(rt_ckpt_bytes(w, "state.json", "{}", 2, &err));
    assert_ok(rt_ckpt_commit(w, 2, &err));
    rt_ckpt_writer_free(w);
    v = look(dir, "run", NULL);
    assert_string_equal(rt_json_as_string(rt_json_get(v, "state"), NULL), "finished");
    assert_int_equal(at(v, NULL, "tokens"), 77);
    assert_int_equal(rt_json_len(rt_json_get(v, "last_evaluations")), 2);
    assert_int_equal(at(rt_json_at(rt_json_get(v, "last_evaluations"), 0), NULL, "step"), 2);
    assert_int_equal(rt_json_len(rt_json_get(v, "checkpoints")), 1);
    snprintf(path, sizeof path, "%s/%s", dir, rt_json_as_string(rt_json_at(rt_json_get(v, "checkpoints"), 0), NULL));
    rt_json_free(v);
    const struct rt_inspect_options o = {.verify = true};
    v = look(path, "checkpoint", &o);
    assert_int_equal(at(v, NULL, "step"), 2);
    rt_json_free(v);
    put(path, "state.json", "{\n");
    assert_ok(rt_json_new_object(&v, &err));
    assert_status(rt_inspect(path, &o, v, &err), FORMAT);
    rt_json_free(v);
}

static void traces_that_are_made(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *dir = test_tmp("made");
    put(dir, "config.json", "{\"command\":\"traces\",\"options\":{}}");
    put(dir, ".lock", "");
    struct rt_json *v = look(dir, "dataset", NULL); /* before the first line */
    assert_int_equal(strncmp(rt_json_as_string(rt_json_get(v, "state"), NULL), "unfinished", 10), 0);
    rt_json_free(v);
    put(dir, "traces.jsonl", "{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"prompt\":\"a\",\"completion\":\"c\"}\n");
    v = look(dir, "dataset", NULL);
    assert_int_equal(strncmp(rt_json_as_string(rt_json_get(v, "state"), NULL), "unfinished", 10), 0);
    assert_int_equal(at(v, NULL, "lines"), 2);
    rt_json_free(v);
    put(dir, "metrics.jsonl", "{\"step\":2,\"traces\":2}\n");
    put(dir, "accepted.jsonl", "{\"prompt\":\"a\",\"completion\":\"b\"}\n"); /* which is what is looked at then */
    v = look(dir, "dataset", NULL);
    assert_string_equal(rt_json_as_string(rt_json_get(v, "state"), NULL), "finished");
    assert_int_equal(at(v, NULL, "lines"), 1);
    rt_json_free(v);
    int lock = -1;
    put(dir, "metrics.jsonl", "");
    assert_ok(rt_lock_dir(dir, &lock, &err));
    v = look(dir, "dataset", NULL);
    assert_string_equal(rt_json_as_string(rt_json_get(v, "state"), NULL), "running");
    rt_json_free(v);
    rt_file_close(lock);
}

static void what_is_not_known_is_said(void **state)
{
    (void)state;
    struct rt_err err = {0};
    enum rt_kind kind;
    const char *dir = test_tmp("unknown");
    char path[4096];
    put(dir, "notes.txt", "hello");
    snprintf(path, sizeof path, "%s/notes.txt", dir);
    assert_int_equal(rt_kind_of(dir, &kind, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "looked for"));
    rt_err_clear(&err);
    assert_status(rt_kind_of(path, &kind, &err), FORMAT);
    put(dir, "empty", "");
    snprintf(path, sizeof path, "%s/empty", dir);
    assert_status(rt_kind_of(path, &kind, &err), FORMAT);
    assert_status(rt_kind_of("/nothing/there", &kind, &err), IO);
    snprintf(path, sizeof path, "%s/model.safetensors", test_data("examples/tiny_student"));
    assert_ok(rt_kind_of(path, &kind, &err));
    assert_int_equal(kind, RT_KIND_TENSORS);
    snprintf(path, sizeof path, "%s/tokenizer.json", test_data("examples/tiny_student"));
    assert_ok(rt_kind_of(path, &kind, &err));
    assert_int_equal(kind, RT_KIND_TOKENIZER);
    assert_ok(rt_kind_of(test_data("tests/data/tokenizers/qwen"), &kind, &err));
    assert_int_equal(kind, RT_KIND_TOKENIZER);
}

/* Text from a file cannot write to the terminal. */
static void control_characters_are_shown(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_json *v = NULL;
    struct rt_buf out = {0};
    assert_ok(rt_json_new_object(&v, &err));
    assert_ok(rt_json_set_string(v, "name", "a\x1b[31m\nb", &err));
    assert_ok(rt_inspect_print(v, &out, &err));
    assert_null(memchr(out.data, 0x1b, out.len));
    assert_non_null(memmem(out.data, out.len, "a?[31m\\nb", 9));
    rt_buf_free(&out);
    rt_json_free(v);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_teacher), cmocka_unit_test(a_student), cmocka_unit_test(a_model_without_weights), cmocka_unit_test(a_teacher_that_lacks_a_tensor),
    cmocka_unit_test(a_dataset), cmocka_unit_test(a_shard_set), cmocka_unit_test(a_run_and_a_checkpoint), cmocka_unit_test(traces_that_are_made), cmocka_unit_test(what_is_not_known_is_said),
    cmocka_unit_test(control_characters_are_shown),
};
RT_SUITE(inspect, tests)
