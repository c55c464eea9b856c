#include "tests/suite.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/io.h"
#include "formats/json.h"
#include "formats/safetensors.h"

/* PATH = u64 len, header, `data` zero bytes. */
static void craft(const char *path, uint64_t len, const char *header, size_t header_len, size_t data)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char zero[64] = {0};
    assert_true(data <= sizeof zero);
    assert_ok(rt_buf_append(&b, &len, 8, &err));
    assert_ok(rt_buf_append(&b, header, header_len, &err));
    assert_ok(rt_buf_append(&b, zero, data, &err));
    assert_ok(rt_publish_bytes(path, b.data, b.len, &err));
    rt_buf_free(&b);
}

static const struct rt_tensor_decl decls[] = {
    {"a.weight", RT_BF16, 2, {3, 5}},
    {"a.weight_scale_inv", RT_F32, 2, {1, 1}},
    {"empty", RT_F32, 2, {0, 4}},
    {"scalar", RT_I64, 0, {0}},
    {"caf\xc3\xa9 \"q\"", RT_E4M3, 1, {7}},
};
enum { N = 5, BYTES = 30 + 4 + 8 + 7 };

static void fill(uint8_t *data)
{
    for (int i = 0; i < BYTES; i++)
        data[i] = (uint8_t)(i * 5 + 1);
}

static void write_file(const char *path)
{
    struct rt_err err = {0};
    struct rt_tensor_writer *w = NULL;
    uint8_t data[BYTES];
    fill(data);
    assert_ok(rt_tensor_writer_file(path, decls, N, &w, &err));
    assert_ok(rt_tensor_writer_put(w, data, 3, &err)); /* pieces need not match tensors */
    assert_ok(rt_tensor_writer_put(w, data + 3, 40, &err));
    assert_ok(rt_tensor_writer_put(w, data + 43, BYTES - 43, &err));
    assert_ok(rt_tensor_writer_finish(w, &err));
    rt_tensor_writer_free(w);
}

static void check_contents(struct rt_tensors *t)
{
    struct rt_err err = {0};
    uint8_t data[BYTES], got[BYTES];
    size_t at = 0;
    fill(data);
    assert_int_equal(rt_tensors_count(t), N);
    assert_int_equal(rt_tensors_total_bytes(t), BYTES);
    for (int i = 0; i < N; i++) {
        const struct rt_tensor *x = rt_tensors_find(t, decls[i].name);
        assert_non_null(x);
        assert_int_equal(x->dtype, decls[i].dtype);
        assert_int_equal(x->ndim, decls[i].ndim);
        for (int d = 0; d < x->ndim; d++)
            assert_int_equal(x->ne[d], decls[i].ne[d]);
        assert_ok(rt_tensors_read(t, x, got, &err));
        assert_memory_equal(got, data + at, x->bytes);
        at += x->bytes;
    }
    assert_null(rt_tensors_find(t, "a"));
    assert_null(rt_tensors_find(t, "zzz"));
}

static void round_trip(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tensors *t = NULL;
    const char *path = test_tmp("st-one.safetensors");
    write_file(path);
    assert_ok(rt_tensors_open(path, &t, &err));
    check_contents(t);
    assert_int_equal(rt_tensors_at(t, 0)->offset % 8, 0);
    const struct rt_tensor *x = NULL;
    const int64_t dims[] = {3, -1}, wrong[] = {3, 6};
    assert_ok(rt_tensors_get(t, "a.weight", RT_DT(RT_BF16) | RT_DT(RT_E4M3), 2, dims, &x, &err));
    assert_int_equal(rt_tensors_get(t, "a.weight", RT_DT(RT_F32) | RT_DT(RT_E4M3), 2, wrong, &x, &err), RT_SHAPE);
    assert_non_null(strstr(err.msg, "tensor 'a.weight': expected F32 or F8_E4M3 [3, 6], found BF16 [3, 5]"));
    rt_err_clear(&err);
    assert_status(rt_tensors_get(t, "a.weight", 0, 3, NULL, &x, &err), SHAPE);
    assert_status(rt_tensors_get(t, "a.weigh", 0, -1, NULL, &x, &err), FORMAT);
    uint8_t part[4], data[BYTES];
    fill(data);
    assert_ok(rt_tensors_read_range(t, x, 26, 4, part, &err));
    assert_memory_equal(part, data + 26, 4);
    assert_status(rt_tensors_read_range(t, x, 27, 4, part, &err), USAGE);
    assert_status(rt_tensors_read_range(t, x, UINT64_MAX, 4, part, &err), USAGE);
    float f[2];
    uint16_t bits;
    assert_ok(rt_tensors_read_f32(t, x, 13, 2, f, &err));
    memcpy(&bits, data + 28, 2);
    assert_true(f[1] == rt_bf16_to_f32(bits));
    assert_status(rt_tensors_read_f32(t, x, 14, 2, f, &err), USAGE);
    assert_status(rt_tensors_read_f32(t, rt_tensors_find(t, "scalar"), 0, 1, f, &err), UNSUPPORTED);
    rt_tensors_free(t);
    rt_tensors_free(NULL);
}

static void model_dirs(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tensor_writer *w = NULL;
    struct rt_tensors *t = NULL;
    uint8_t data[BYTES];
    char path[4200], first[65];
    const char *dir = test_tmp("st-model");
    fill(data);
    /* 32 bytes a shard: a.weight alone, then the scale, empty, scalar and the E4M3 (19 bytes) */
    assert_ok(rt_tensor_writer_model(dir, decls, N, 32, &w, &err));
    for (int i = 0; i < BYTES; i++)
        assert_ok(rt_tensor_writer_put(w, data + i, 1, &err));
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    assert_ok(rt_tensor_writer_finish(w, &err));
    assert_true(rt_path_exists(path));
    assert_status(rt_tensor_writer_put(w, data, 1, &err), USAGE);
    rt_tensor_writer_free(w);
    assert_ok(rt_tensors_open(dir, &t, &err));
    assert_int_equal(rt_tensors_n_files(t), 2);
    assert_int_equal(rt_tensors_find(t, "a.weight")->file, 0);
    assert_int_equal(rt_tensors_find(t, "a.weight_scale_inv")->file, 1);
    check_contents(t);
    strcpy(first, rt_tensors_sha256(t));
    rt_tensors_free(t);
    struct rt_json *index = NULL;
    int64_t total;
    assert_ok(rt_json_load(path, 1 << 20, &index, &err));
    assert_ok(rt_json_int(rt_json_get(index, "metadata"), "total_size", BYTES, BYTES, &total, &err));
    rt_json_free(index);
    /* the configuration is part of the identity */
    snprintf(path, sizeof path, "%s/config.json", dir);
    assert_ok(rt_publish_bytes(path, "{}", 2, &err));
    assert_ok(rt_tensors_open(dir, &t, &err));
    assert_string_not_equal(first, rt_tensors_sha256(t));
    rt_tensors_free(t);
    /* a single file beside the index would hide it */
    assert_status(rt_tensor_writer_model(dir, decls, N, 0, &w, &err), REFUSED);
    dir = test_tmp("st-single");
    assert_ok(rt_tensor_writer_model(dir, decls, N, 0, &w, &err));
    assert_ok(rt_tensor_writer_put(w, data, BYTES - 1, &err));
    assert_status(rt_tensor_writer_finish(w, &err), USAGE);
    rt_tensor_writer_free(w);
    assert_status(rt_tensors_open(dir, &t, &err), FORMAT); /* nothing was published */
    assert_ok(rt_tensor_writer_model(dir, decls, N, 0, &w, &err));
    assert_ok(rt_tensor_writer_put(w, data, BYTES, &err));
    assert_ok(rt_tensor_writer_finish(w, &err));
    rt_tensor_writer_free(w);
    assert_ok(rt_tensors_open(dir, &t, &err));
    check_contents(t);
    rt_tensors_free(t);
}

static void hostile_indexes(void **state)
{
    (void)state;
    static const struct {
        const char *text, *why;
    } bad[] = {
        {"{\"weight_map\":{\"a\":\"../one.safetensors\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"..\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"s.safetensors\\u0000x\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":3}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"none.safetensors\"}}", "cannot open"},
        {"{\"weight_map\":{\"b\":\"s.safetensors\"}}", "'b' should be in 's.safetensors'"},
        {"{\"weight_map\":{\"a\":\"s.safetensors\",\"a\":\"s.safetensors\"}}", "duplicate"},
        {"{\"weight_map\":{}}", "weight_map"},
        {"{\"weight_map\":[]}", "weight_map"},
        {"[]", "weight_map"},
        {"{", "column 1"},
    };
    struct rt_err err = {0};
    struct rt_tensors *t = NULL;
    char path[4200];
    const char *dir = test_tmp("st-hostile");
    const char *h = "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}";
    assert_ok(rt_mkdirs(dir, &err));
    snprintf(path, sizeof path, "%s/s.safetensors", dir);
    craft(path, strlen(h), h, strlen(h), 8);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_ok(rt_publish_bytes(path, bad[i].text, strlen(bad[i].text), &err));
        if (rt_tensors_open(dir, &t, &err) == RT_OK || strstr(err.msg, bad[i].why) == NULL)
            fail_msg("%s: '%s', expected '%s' in it", bad[i].text, err.msg, bad[i].why);
        rt_err_clear(&err);
    }
    const char *good = "{\"weight_map\":{\"a\":\"s.safetensors\"}}"; /* x is in the file, and not of the model */
    assert_ok(rt_publish_bytes(path, good, strlen(good), &err));
    assert_ok(rt_tensors_open(dir, &t, &err));
    assert_int_equal(rt_tensors_count(t), 1);
    rt_tensors_free(t);
    /* a name in two shards: the index says which */
    char second[4200];
    snprintf(second, sizeof second, "%s/r.safetensors", dir);
    craft(second, strlen(h), h, strlen(h), 8);
    good = "{\"weight_map\":{\"a\":\"s.safetensors\",\"x\":\"r.safetensors\"}}";
    assert_ok(rt_publish_bytes(path, good, strlen(good), &err));
    assert_ok(rt_tensors_open(dir, &t, &err));
    assert_int_equal(rt_tensors_count(t), 2);
    assert_string_equal(rt_tensors_file(t, rt_tensors_find(t, "x")->file), second);
    assert_string_not_equal(rt_tensors_file(t, rt_tensors_find(t, "a")->file), second);
    rt_tensors_free(t);
}

#define T(dtype, shape, off) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" off "}"
static const struct {
    const char *header;
    size_t data;
    const char *why; /* NULL: is good */
} headers[] = {
    {"{}", 0, NULL},
    {"{ }   ", 0, NULL},
    {"{\"a\":" T("F32", "[2]", "[0,8]") "}", 8, NULL},
    {"{ \"a\" : " T("F32", "[ ]", "[ 0 , 4 ]") " , \"__metadata__\" : { \"k\" : \"v\" } } ", 4, NULL},
    {"{\"z\":" T("F32", "[0,9223372036854775807,9]", "[0,0]") ",\"a\":" T("U8", "[1]", "[0,1]") "}", 1, NULL},
    {"{\"\\u00e9\\ud83d\\ude00\":" T("U8", "[1]", "[0,1]") "}", 1, NULL},
    {"", 8, "does not start with '{'"},
    {" {}", 0, "does not start with '{'"},
    {"{}", 1, "tensors end at byte 0 of the data, the file at 1"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") "}", 9, "the file at 9"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") "}", 7, "the file holds 7"},
    {"{\"a\":" T("F32", "[2]", "[0,4]") "}", 8, "asks for 8 bytes"},
    {"{\"a\":" T("F32", "[1]", "[8,4]") "}", 8, "data_offsets are [8, 4]"},
    {"{\"a\":" T("F32", "[1]", "[4,8]") "}", 8, "hole"},
    {"{\"a\":" T("U8", "[2]", "[0,2]") ",\"b\":" T("U8", "[2]", "[1,3]") "}", 3, "overlaps"},
    {"{\"a\":" T("U8", "[2]", "[0,2]") ",\"b\":" T("U8", "[2]", "[0,2]") "}", 2, "overlaps"},
    {"{\"a\":" T("U8", "[1]", "[0,1]") ",\"z\":" T("F32", "[0]", "[4,4]") "}", 1, "data_offsets are [4, 4]"},
    {"{\"a\":" T("U8", "[2]", "[0,2]") ",\"z\":" T("F32", "[0]", "[1,1]") "}", 2, "overlaps"},
    {"{\"a\":" T("U8", "[1]", "[0,1]") ",\"a\":" T("U8", "[1]", "[1,2]") "}", 2, "two tensors have the name 'a'"},
    {"{\"a\":" T("U8", "[1]", "[0,1]") ",\"\\u0061\":" T("U8", "[1]", "[1,2]") "}", 2, "two tensors have the name 'a'"},
    {"{\"a\":" T("F32", "[4194305,4194305,211106198978564]", "[0,16]") "}", 16, "more than 2^63"},
    {"{\"a\":" T("F32", "[9223372036854775807]", "[0,8]") "}", 8, "more than 2^63"},
    {"{\"a\":" T("F32", "[9223372036854775808]", "[0,8]") "}", 8, "whole number below 2^63"},
    {"{\"a\":" T("F32", "[-2]", "[0,8]") "}", 8, "a whole number"},
    {"{\"a\":" T("F32", "[2.0]", "[0,8]") "}", 8, "not a real"},
    {"{\"a\":" T("F32", "[2e0]", "[0,8]") "}", 8, "not a real"},
    {"{\"a\":" T("F32", "[02]", "[0,8]") "}", 8, "a whole number"},
    {"{\"a\":" T("F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]") "}", 8, "at most 8 numbers"},
    {"{\"a\":" T("F32", "[2]", "[0,8,8]") "}", 8, "at most 2 numbers"},
    {"{\"a\":" T("F32", "[2]", "[8]") "}", 8, "two data_offsets"},
    {"{\"a\":" T("C64", "[1]", "[0,8]") "}", 8, "'C64', which is not supported"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "lacks"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "repeated member 'dtype'"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":1}}", 8, "unknown or repeated member 'x'"},
    {"{\"a\":[]}", 0, "'{' after the name"},
    {"{\"a\\u0000\":" T("U8", "[1]", "[0,1]") "}", 1, "a code point other than 0"},
    {"{\"\\ud800\":" T("U8", "[1]", "[0,1]") "}", 1, "a code point other than 0"},
    {"{\"\xff\":" T("U8", "[1]", "[0,1]") "}", 1, "UTF-8"},
    {"{\"\xc0\xaf\":" T("U8", "[1]", "[0,1]") "}", 1, "UTF-8"},
    {"{\"a\n\":" T("U8", "[1]", "[0,1]") "}", 1, "UTF-8 without control"},
    {"{\"__metadata__\":{\"a\":1}}", 0, "a string"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "one __metadata__"},
    {"{\"a\":" T("U8", "[1]", "[0,1]") ",}", 1, "a string"},
    {"{\"a\":" T("U8", "[1]", "[0,1]") "} x", 1, "nothing but spaces"},
    {"{\"a\":" T("U8", "[1]", "[0,1]"), 1, "',' or '}'"},
    {"{\"a", 1, "the end of a string"},
    {"{\"a\\", 1, "the end of a string"},
    {"{\"a\\u12", 1, "a code point"},
    {"{{{{{{{{{{{{", 1, "a string"},
};

static void hostile_headers(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tensors *t = NULL;
    const char *path = test_tmp("st-h.safetensors");
    for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
        craft(path, strlen(headers[i].header), headers[i].header, strlen(headers[i].header), headers[i].data);
        const enum rt_status st = rt_tensors_open(path, &t, &err);
        if (headers[i].why == NULL ? st != RT_OK : st == RT_OK || strstr(err.msg, headers[i].why) == NULL)
            fail_msg("%s: '%s', expected '%s'", headers[i].header, err.msg, headers[i].why != NULL ? headers[i].why : "success");
        if (st == RT_OK)
            rt_tensors_free(t);
        rt_err_clear(&err);
    }
    static const uint64_t lens[] = {3, 1000, (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7, 100000001};
    for (size_t i = 0; i < sizeof lens / sizeof lens[0]; i++) {
        craft(path, lens[i], "{}", 2, 0);
        assert_status(rt_tensors_open(path, &t, &err), FORMAT);
    }
    /* name of 512 bytes is allowed, 513 not */
    for (int n = 512; n <= 513; n++) {
        char h[1024];
        const int len = snprintf(h, sizeof h, "{\"%0*d\":" T("U8", "[1]", "[0,1]") "}", n, 7);
        craft(path, (uint64_t)len, h, (size_t)len, 1);
        const enum rt_status st = rt_tensors_open(path, &t, &err);
        assert_int_equal(st, n == 512 ? RT_OK : RT_FORMAT);
        if (st == RT_OK)
            rt_tensors_free(t);
        rt_err_clear(&err);
    }
    static const char pointer[] = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 988097824\n";
    assert_ok(rt_publish_bytes(path, pointer, sizeof pointer - 1, &err));
    assert_int_equal(rt_tensors_open(path, &t, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "git-lfs"));
    rt_err_clear(&err);
    assert_status(rt_tensors_open(test_tmp("st-absent"), &t, &err), IO);
    assert_status(rt_tensors_open(test_tmp(""), &t, &err), FORMAT); /* a directory without a model */
}

/* Cut at every byte: refused. Every bit of the header flipped: refused, or names and shapes that still fit the file. */
static void damage(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tensors *t = NULL;
    struct rt_buf whole = {0};
    const char *path = test_tmp("st-one2.safetensors"), *cut = test_tmp("st-cut.safetensors");
    write_file(path);
    assert_ok(rt_file_read_all(path, 1 << 20, &whole, &err));
    FILE *f = fopen(cut, "wb+");
    assert_non_null(f);
    assert_int_equal(pwrite(fileno(f), whole.data, whole.len, 0), whole.len);
    for (size_t n = whole.len; n-- > 0;) {
        assert_int_equal(ftruncate(fileno(f), (off_t)n), 0);
        if (rt_tensors_open(cut, &t, &err) != RT_FORMAT)
            fail_msg("cut at byte %zu: '%s'", n, err.msg);
        rt_err_clear(&err);
    }
    assert_int_equal(pwrite(fileno(f), whole.data, whole.len, 0), whole.len);
    for (size_t bit = 0; bit < (whole.len - BYTES) * 8; bit++) {
        const char c = (char)(whole.data[bit / 8] ^ 1 << bit % 8);
        assert_int_equal(pwrite(fileno(f), &c, 1, (off_t)(bit / 8)), 1);
        if (rt_tensors_open(cut, &t, &err) == RT_OK) {
            for (int64_t i = 0; i < rt_tensors_count(t); i++) {
                const struct rt_tensor *x = rt_tensors_at(t, i);
                uint8_t *buf = malloc(x->bytes + 1);
                assert_true(x->offset + x->bytes <= whole.len);
                assert_ok(rt_tensors_read(t, x, buf, &err));
                free(buf);
            }
            rt_tensors_free(t);
        }
        rt_err_clear(&err);
        assert_int_equal(pwrite(fileno(f), &whole.data[bit / 8], 1, (off_t)(bit / 8)), 1);
    }
    fclose(f);
    rt_buf_free(&whole);
}

static void bad_declarations(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tensor_writer *w = NULL;
    const char *path = test_tmp("st-never.safetensors");
    const struct rt_tensor_decl twice[] = {{"a", RT_F32, 0, {0}}, {"b", RT_F32, 0, {0}}, {"a", RT_F32, 0, {0}}};
    const struct rt_tensor_decl negative = {"a", RT_F32, 1, {-1}}, nameless = {"", RT_F32, 0, {0}}, meta = {"__metadata__", RT_F32, 0, {0}};
    assert_status(rt_tensor_writer_file(path, twice, 3, &w, &err), USAGE);
    assert_status(rt_tensor_writer_file(path, &negative, 1, &w, &err), USAGE);
    assert_status(rt_tensor_writer_file(path, &nameless, 1, &w, &err), USAGE);
    assert_status(rt_tensor_writer_file(path, &meta, 1, &w, &err), USAGE);
    assert_false(rt_path_exists(path));
    /* a full disk: the error says so, and no file is left */
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit limit = {1024, 1024};
        const struct rt_tensor_decl big = {"a", RT_U8, 1, {4096}};
        static const uint8_t zero[4096];
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        enum rt_status st = rt_tensor_writer_file(path, &big, 1, &w, &err);
        if (st == RT_OK)
            st = rt_tensor_writer_put(w, zero, sizeof zero, &err);
        rt_tensor_writer_free(w);
        char tmp[4200];
        snprintf(tmp, sizeof tmp, "%s.tmp", path);
        _exit(st == RT_IO && !rt_path_exists(path) && !rt_path_exists(tmp) ? 0 : 1);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(round_trip),
    cmocka_unit_test(model_dirs),
    cmocka_unit_test(hostile_indexes),
    cmocka_unit_test(hostile_headers),
    cmocka_unit_test(damage),
    cmocka_unit_test(bad_declarations),
};
RT_SUITE(safetensors, tests)
