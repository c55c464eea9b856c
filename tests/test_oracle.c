/* The shipped cases (what transformers computes with small random models) hold in every backend; and each kind of fault that the checks
 * are there for makes them fail. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "teacher/score.h"
#include "tests/oracle.h"
#include "tests/suite.h"

static void expect(const char *dir, const char *backends, bool fails, const char *fault)
{
    struct oracle o = {.quiet = true};
    oracle_case(&o, dir, backends);
    if (fails && o.failed == 0)
        fail_msg("%s: %s was not noticed by %d checks", dir, fault, o.passed);
    if (!fails && (o.failed > 0 || o.passed == 0)) {
        o.quiet = false;
        oracle_case(&o, dir, backends);
        fail_msg("%s: %d checks fail", dir, o.failed);
    }
}

static void shipped_cases_hold(void **state)
{
    (void)state;
    static const char *const cases[] = {"v3_fp8", "v2_bf16", "qwen2", "qwen3", "llama3"};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[256];
        snprintf(dir, sizeof dir, "%s/%s", test_data("tests/data/cases"), cases[i]);
        expect(dir, "ref cpu", false, "");
    }
}

/* ---- faults: a copy of a case with one thing broken ---- */

static void copy_case(const char *name, const char *to)
{
    struct rt_err err = {0};
    char dir[256], from[600], dst[600];
    char **names;
    size_t n;
    snprintf(dir, sizeof dir, "%s/%s", test_data("tests/data/cases"), name);
    assert_ok(rt_mkdirs(to, &err));
    assert_ok(rt_list_dir(dir, &names, &n, &err));
    for (size_t i = 0; i < n; i++) {
        struct rt_buf b = {0};
        snprintf(from, sizeof from, "%s/%s", dir, names[i]);
        snprintf(dst, sizeof dst, "%s/%s", to, names[i]);
        assert_ok(rt_file_read_all(from, (size_t)64 << 20, &b, &err));
        FILE *f = fopen(dst, "wb");
        assert_non_null(f);
        assert_int_equal(fwrite(b.data, 1, b.len, f), b.len);
        fclose(f);
        rt_buf_free(&b);
    }
    rt_names_free(names, n);
}

/* Replaces `was` by `now` (same length, so that offsets stay) wherever it stands in a file. */
static void edit(const char *dir, const char *file, const char *was, const char *now)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char path[600];
    size_t done = 0;
    assert_int_equal(strlen(was), strlen(now));
    snprintf(path, sizeof path, "%s/%s", dir, file);
    assert_ok(rt_file_read_all(path, (size_t)64 << 20, &b, &err));
    for (char *at = b.data; (at = memmem(at, (size_t)(b.data + b.len - at), was, strlen(was))) != NULL; at += strlen(was), done++)
        memcpy(at, now, strlen(now));
    assert_true(done > 0);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fwrite(b.data, 1, b.len, f);
    fclose(f);
    rt_buf_free(&b);
}

/* The bytes of one tensor through a function. */
static void change(const char *dir, const char *tensor, void (*f)(uint8_t *bytes, const struct rt_tensor *t))
{
    struct rt_err err = {0};
    struct rt_tensors *ts;
    char path[600];
    /* expected.safetensors lies in the same directory: open the file by itself */
    const bool expected = strncmp(tensor, "labels", 6) == 0 || strncmp(tensor, "topk", 4) == 0;
    snprintf(path, sizeof path, expected ? "%s/expected.safetensors" : "%s", dir);
    assert_ok(rt_tensors_open(path, &ts, &err));
    const struct rt_tensor *t = rt_tensors_find(ts, tensor);
    assert_non_null(t);
    uint8_t *bytes = malloc(t->bytes);
    assert_ok(rt_tensors_read(ts, t, bytes, &err));
    f(bytes, t);
    FILE *out = fopen(rt_tensors_file(ts, t->file), "r+b");
    assert_non_null(out);
    fseek(out, (long)t->offset, SEEK_SET);
    fwrite(bytes, 1, t->bytes, out);
    fclose(out);
    free(bytes);
    rt_tensors_free(ts);
}

static void double_first_scale(uint8_t *bytes, const struct rt_tensor *t)
{
    float v;
    (void)t;
    memcpy(&v, bytes, 4);
    v *= 2;
    memcpy(bytes, &v, 4);
}

static void scales_of_one(uint8_t *bytes, const struct rt_tensor *t)
{
    const float one = 1;
    for (uint64_t i = 0; i < t->bytes; i += 4)
        memcpy(bytes + i, &one, 4);
}

static void two_experts_swapped(void **state)
{
    (void)state;
    const char *dir = test_tmp("experts");
    copy_case("v2_bf16", dir);
    static const char *const files[] = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"};
    for (int i = 0; i < 3; i++) {
        edit(dir, files[i], "experts.0.", "experts.X.");
        edit(dir, files[i], "experts.1.", "experts.0.");
        edit(dir, files[i], "experts.X.", "experts.1.");
    }
    expect(dir, "cpu", true, "two experts swapped");
}

static void one_scale_wrong(void **state)
{
    (void)state;
    const char *dir = test_tmp("scale");
    copy_case("v3_fp8", dir);
    change(dir, "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv", double_first_scale);
    expect(dir, "cpu", true, "one block scale doubled");
}

static void scales_dropped(void **state)
{
    (void)state;
    const char *dir = test_tmp("noscale");
    copy_case("v3_fp8", dir);
    change(dir, "model.layers.0.self_attn.o_proj.weight_scale_inv", scales_of_one);
    expect(dir, "cpu", true, "scales of a matrix dropped");
}

static void other_rope(void **state)
{
    (void)state;
    const char *dir = test_tmp("rope");
    copy_case("v3_fp8", dir);
    edit(dir, "config.json", "\"factor\": 4", "\"factor\": 3");
    expect(dir, "cpu", true, "another YaRN factor");
}

static void other_gating(void **state)
{
    (void)state;
    const char *dir = test_tmp("gating");
    copy_case("v3_fp8", dir);
    edit(dir, "config.json", "\"topk_group\": 2", "\"topk_group\": 4");
    expect(dir, "cpu", true, "no limit on groups");
}

static void half_rope(uint8_t *bytes, const struct rt_tensor *t)
{
    /* rows of k_pe from interleaved pairs to halves: what a loader with the other layout would read */
    const uint64_t row = (uint64_t)t->ne[1], dr = 16, r0 = (uint64_t)t->ne[0] - dr;
    uint8_t *copy = malloc(dr * row);
    memcpy(copy, bytes + r0 * row, dr * row);
    for (uint64_t i = 0; i < dr; i++)
        memcpy(bytes + (r0 + i) * row, copy + (i % 2 == 0 ? i / 2 : dr / 2 + i / 2) * row, row);
    free(copy);
}

static void other_rope_layout(void **state)
{
    (void)state;
    const char *dir = test_tmp("layout");
    copy_case("v3_fp8", dir);
    change(dir, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", half_rope);
    expect(dir, "cpu", true, "the other rope layout");
}

static void shift(uint8_t *bytes, const struct rt_tensor *t)
{
    const uint64_t row = t->bytes / (uint64_t)(t->ne[0] * t->ne[1]);
    memmove(bytes, bytes + row, t->bytes - row);
}

static void labels_shifted(void **state)
{
    (void)state;
    const char *dir = test_tmp("labels");
    copy_case("qwen2", dir);
    change(dir, "labels", shift);
    expect(dir, "cpu", true, "labels shifted by one");
}

static void rows_shifted(void **state)
{
    (void)state;
    const char *dir = test_tmp("rows");
    copy_case("llama3", dir);
    change(dir, "topk_ids", shift);
    expect(dir, "cpu", true, "teacher rows shifted by one");
}

static void other_epsilon(void **state)
{
    (void)state;
    const char *dir = test_tmp("eps");
    copy_case("qwen3", dir);
    edit(dir, "config.json", "\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-02");
    expect(dir, "cpu", true, "another epsilon");
}

/* A copy of v3_fp8 with expected states of w8a8, too, as `ref` computes them layer by layer. */
static void w8a8_case(const char *dir)
{
    enum { MOST = 16 };
    struct rt_err err = {0};
    struct rt_device d = {0};
    struct rt_tensors *ex;
    struct rt_teacher *t;
    struct rt_tensor_writer *w;
    struct rt_tensor_decl decl[3 * MOST];
    char name[MOST][32], path[600];
    float *state[MOST];
    int64_t n, count, k = 0;
    copy_case("v3_fp8", dir);
    snprintf(path, sizeof path, "%s/expected.safetensors", dir);
    assert_ok(rt_tensors_open(path, &ex, &err));
    assert_ok(rt_device_open(&rt_backend_ref, &(const struct rt_dev_options){0}, &d, &err));
    free(oracle_expected_ints(ex, "input_ids", &n));
    const struct rt_teacher_options o = {.dir = dir, .device = &d, .w8a8 = true, .memory = (int64_t)1 << 30, .max_length = n, .data_tokens = n};
    assert_ok(rt_teacher_open(&o, &t, &err));
    const int L = rt_teacher_config(t)->layers;
    const int64_t H = rt_teacher_config(t)->hidden, V = rt_teacher_config(t)->vocab_size;
    for (int64_t i = 0; i < rt_tensors_count(ex); i++) {
        const struct rt_tensor *e = rt_tensors_at(ex, i);
        decl[k] = (struct rt_tensor_decl){.name = e->name, .dtype = e->dtype, .ndim = e->ndim};
        memcpy(decl[k++].ne, e->ne, sizeof e->ne);
    }
    const int64_t old = k;
    state[0] = oracle_expected(ex, "w8a16.hidden_0", &count);
    for (int l = 0; l <= L; l++, k++) {
        snprintf(name[l], sizeof name[l], "w8a8.hidden_%d", l);
        decl[k] = (struct rt_tensor_decl){.name = name[l], .dtype = RT_F32, .ndim = 2, .ne = {n, H}};
        if (l == 0)
            continue;
        state[l] = malloc((size_t)(n * H) * sizeof(float));
        memcpy(state[l], state[l - 1], (size_t)(n * H) * sizeof(float));
        assert_ok(rt_teacher_run_layer(t, l - 1, state[l], n, &err));
    }
    state[L + 1] = oracle_expected(ex, "w8a16.final", &count);
    decl[k++] = (struct rt_tensor_decl){.name = "w8a8.final", .dtype = RT_F32, .ndim = 2, .ne = {n, H}};
    state[L + 2] = malloc((size_t)(n * V) * sizeof(float));
    decl[k++] = (struct rt_tensor_decl){.name = "w8a8.logits", .dtype = RT_F32, .ndim = 2, .ne = {n, V}};
    assert_ok(rt_teacher_logits(t, -1, state[L + 1], n, state[L + 2], &err));
    snprintf(path, sizeof path, "%s/made.safetensors", dir);
    assert_ok(rt_tensor_writer_file(path, decl, k, &w, &err));
    for (int64_t i = 0; i < old; i++) {
        const struct rt_tensor *e = rt_tensors_at(ex, i);
        char *bytes = malloc(e->bytes);
        assert_ok(rt_tensors_read(ex, e, bytes, &err));
        assert_ok(rt_tensor_writer_put(w, bytes, e->bytes, &err));
        free(bytes);
    }
    for (int l = 0; l < L + 3; l++) {
        assert_ok(rt_tensor_writer_put(w, state[l], (uint64_t)(n * (l < L + 2 ? H : V)) * sizeof(float), &err));
        free(state[l]);
    }
    assert_ok(rt_tensor_writer_finish(w, &err));
    rt_tensor_writer_free(w);
    rt_tensors_free(ex);
    rt_teacher_close(t);
    rt_device_close(&d);
    char cmd[1300];
    snprintf(cmd, sizeof cmd, "mv '%s' '%s/expected.safetensors'", path, dir);
    assert_int_equal(system(cmd), 0);
}

/* Layers in w8a8, with rows traced to the codes that rounding changes; a wrong scale is no such row. */
static void w8a8_layers_hold_and_fail(void **state)
{
    (void)state;
    const char *dir = test_tmp("w8a8");
    w8a8_case(dir);
    expect(dir, "ref cpu", false, "");
    change(dir, "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv", double_first_scale);
    expect(dir, "cpu", true, "one block scale doubled");
}

/* The checks for backends of bfloat16, on one of float32: they hold there, and see a wrong scale. */
static void bf16_checks(const char *dir, bool fails)
{
    struct rt_err err = {0};
    struct oracle o = {.quiet = true, .name = "v3_fp8", .backend = "cpu"};
    struct rt_device d = {0};
    struct rt_tensors *ex;
    char path[600];
    int64_t n;
    snprintf(path, sizeof path, "%s/expected.safetensors", dir);
    assert_ok(rt_tensors_open(path, &ex, &err));
    assert_ok(rt_device_open(&rt_backend_cpu, &(const struct rt_dev_options){0}, &d, &err));
    int64_t *wide = oracle_expected_ints(ex, "input_ids", &n);
    uint32_t *ids = malloc((size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++)
        ids[i] = (uint32_t)wide[i];
    oracle_teacher_bf16(&o, &d, dir, ex, ids, n);
    free(ids);
    free(wide);
    rt_tensors_free(ex);
    rt_device_close(&d);
    if (o.passed < 6 || (fails ? o.failed == 0 : o.failed > 0))
        fail_msg("%s: %d checks hold, %d fail", dir, o.passed, o.failed);
}

static void bf16_checks_hold_and_fail(void **state)
{
    (void)state;
    bf16_checks(test_data("tests/data/cases/v3_fp8"), false);
    const char *dir = test_tmp("bf16");
    copy_case("v3_fp8", dir);
    change(dir, "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv", double_first_scale);
    bf16_checks(dir, true);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(shipped_cases_hold), cmocka_unit_test(two_experts_swapped), cmocka_unit_test(one_scale_wrong),
    cmocka_unit_test(scales_dropped), cmocka_unit_test(other_rope), cmocka_unit_test(other_rope_layout), cmocka_unit_test(other_gating),
    cmocka_unit_test(labels_shifted), cmocka_unit_test(rows_shifted), cmocka_unit_test(other_epsilon),
    cmocka_unit_test(w8a8_layers_hold_and_fail), cmocka_unit_test(bf16_checks_hold_and_fail),
};
RT_SUITE(oracle, tests)
