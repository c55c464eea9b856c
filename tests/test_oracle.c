/* The shipped cases (what transformers computes with small random models) hold in every backend; and each kind of fault that the checks
 * are there for makes them fail. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
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
    cmocka_unit_test(bf16_checks_hold_and_fail),
};
RT_SUITE(oracle, tests)
