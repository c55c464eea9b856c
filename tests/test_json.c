#include "tests/suite.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "formats/json.h"

static struct rt_json *parse(const char *text)
{
    struct rt_err err = {0};
    struct rt_json *v = NULL;
    assert_ok(rt_json_parse(text, strlen(text), "here.json", &v, &err));
    return v;
}

static void values(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_json *v = parse("{\"z\": 1, \"a\": [true, null, 2.5, \"x\\u0000y\"], \"whole\": 3.0, \"b\": {\"c\": -7},"
                              " \"huge\": 1000000000000000019884624838656, \"min\": -9223372036854775808, \"s\": \"10e99999\"}");
    const char *key;
    const struct rt_json *m;
    int64_t i;
    double d;
    bool b;
    size_t n;
    assert_true(rt_json_member(v, 0, &key, &m));
    assert_string_equal(key, "z"); /* file order */
    assert_true(rt_json_member(v, 1, &key, &m));
    assert_string_equal(key, "a");
    assert_false(rt_json_member(v, 7, &key, &m));
    assert_int_equal(rt_json_len(v), 7);
    assert_int_equal(rt_json_len(m), 4);
    assert_true(rt_json_as_bool(rt_json_at(m, 0), &b) && b);
    assert_int_equal(rt_json_typeof(rt_json_at(m, 1)), RT_JSON_NULL);
    assert_true(rt_json_as_double(rt_json_at(m, 2), &d) && d == 2.5);
    assert_false(rt_json_as_int(rt_json_at(m, 2), &i));
    assert_memory_equal(rt_json_as_string(rt_json_at(m, 3), &n), "x\0y", 4);
    assert_int_equal(n, 3);
    assert_null(rt_json_at(m, 4));
    assert_true(rt_json_as_int(rt_json_get(v, "whole"), &i) && i == 3);
    assert_true(rt_json_as_int(rt_json_get(v, "min"), &i) && i == INT64_MIN);
    assert_true(rt_json_as_double(rt_json_get(v, "huge"), &d) && d == 1000000000000000019884624838656.0);
    assert_false(rt_json_as_int(rt_json_get(v, "huge"), &i));
    assert_ok(rt_json_int(rt_json_get(v, "b"), "c", -10, 10, &i, &err));
    assert_int_equal(i, -7);
    assert_string_equal(rt_json_source(rt_json_get(v, "b")), "here.json");
    assert_status(rt_json_int(v, "z", 2, 10, &i, &err), FORMAT);
    assert_int_equal(rt_json_int(v, "nope", 2, 10, &i, &err), RT_FORMAT);
    assert_string_equal(err.msg, "here.json: key 'nope': expected an integer in [2, 10], found none: the key is missing");
    rt_err_clear(&err);
    assert_ok(rt_json_int_or(v, "nope", 2, 10, 42, &i, &err));
    assert_int_equal(i, 42);
    assert_status(rt_json_int_or(v, "a", 2, 10, 42, &i, &err), FORMAT);
    assert_status(rt_json_string(v, "z", &key, &err), FORMAT);
    assert_status(rt_json_double(v, "s", &d, &err), FORMAT);
    assert_status(rt_json_bool_or(v, "z", true, &b, &err), FORMAT);
    rt_json_free(v);
    rt_json_free(NULL);
}

/* Numbers come out with the digits that they went in with, wherever they stand, and through a copy. */
static void numbers_as_they_were_written(void **state)
{
    (void)state;
    static const char text[] = "{\"a1\":[1,-2.50,true,1E5,\"7\\\"8.0\\\\\",18446744073709551616],\"2.0\":{\"e\":false,\"f\":123456789012345678901.0e-3,\"g\":[]},"
                               "\"x\":-99999999999999999999,\"s\":\"-1\",\"n\":null,\"y\":3.14159265358979323846,\"z\":1e-05}";
    struct rt_err err = {0};
    struct rt_buf out = {0};
    struct rt_json *v = parse(text), *to = NULL;
    const char *key;
    const struct rt_json *m;
    double d;
    assert_ok(rt_json_new_object(&to, &err));
    for (size_t i = 0; rt_json_member(v, i, &key, &m); i++)
        assert_ok(rt_json_set_copy(to, key, m, &err));
    assert_true(rt_json_as_double(rt_json_get(v, "z"), &d) && d == 1e-5);
    rt_json_free(v);
    assert_ok(rt_json_dump(to, 0, &out, &err));
    assert_int_equal(out.len, sizeof text - 1);
    assert_memory_equal(out.data, text, out.len);
    out.len = 0;
    assert_ok(rt_json_set_double(to, "y", 0.5, &err)); /* one that is set is printed anew */
    assert_ok(rt_json_dump(to, 0, &out, &err));
    assert_non_null(memmem(out.data, out.len, "\"y\":0.5,", 8));
    rt_json_free(to);
    rt_buf_free(&out);
    assert_status(rt_json_parse("\xEF\xBB\xBF{}", 5, "here.json", &v, &err), FORMAT);
}

static void refusals(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "", "{", "{\"a\":1,\"a\":2}", "[1] x", "\"\xff\"", "\"\xed\xa0\x80\"", "[01]", "{\"a\":NaN}", "[1,]", "\"open", "\"\\",
        "{\"b\":{\"c\":1,\"c\":1}}", "nul", "-", "[1e999]", "{\"a\\u0000b\":1}",
    };
    struct rt_err err = {0};
    struct rt_json *v = NULL;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        if (rt_json_parse(bad[i], strlen(bad[i]), "bad.json", &v, &err) != RT_FORMAT || strncmp(err.msg, "bad.json: column ", 17) != 0)
            fail_msg("%s: status %d, '%s'", bad[i], err.status, err.msg);
        else
            rt_err_clear(&err);
    /* a line of a file is named by its source, so the text's own line is left out; a text of several lines names the line */
    assert_int_equal(rt_json_parse("{\"prompt\": \"x\"", 14, "d.jsonl:6", &v, &err), RT_FORMAT);
    assert_string_equal(err.msg, "d.jsonl:6: column 14: '}' expected at the end");
    rt_err_clear(&err);
    assert_int_equal(rt_json_parse("{\n\"a\": 1,\n]", 12, "a.json", &v, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "a.json: line 3, column "));
    rt_err_clear(&err);
    char deep[2 * 65 + 1] = {0};
    memset(deep, '[', 65);
    memset(deep + 65, ']', 65);
    assert_status(rt_json_parse(deep, 130, "deep", &v, &err), FORMAT);
    assert_ok(rt_json_parse(deep + 1, 128, "deep", &v, &err)); /* 64 is allowed */
    rt_json_free(v);
    /* a million opening brackets must not use the stack, nor a dense text the memory */
    const size_t n = 20 << 20;
    char *bomb = malloc(n);
    memset(bomb, '[', n);
    assert_status(rt_json_parse(bomb, n, "bomb", &v, &err), FORMAT);
    memset(bomb + 1, ',', n - 1); /* counted before anything is built */
    assert_int_equal(rt_json_parse(bomb, n, "bomb", &v, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "more than"));
    rt_err_clear(&err);
    for (size_t i = 1; i + 2 < n; i += 3)
        memcpy(bomb + i, "{},", 3);
    assert_status(rt_json_parse(bomb, n, "bomb", &v, &err), FORMAT);
    free(bomb);
    assert_ok(rt_publish_bytes(test_tmp("json-j.json"), "[1,2]", 5, &err));
    assert_status(rt_json_load(test_tmp("json-j.json"), 4, &v, &err), FORMAT);
    assert_ok(rt_json_load(test_tmp("json-j.json"), 5, &v, &err));
    assert_int_equal(rt_json_len(v), 2);
    rt_json_free(v);
    assert_status(rt_json_load(test_tmp("json-absent.json"), 5, &v, &err), IO);
}

static void building(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_json *v, *child, *back;
    struct rt_buf out = {0};
    assert_ok(rt_json_new_object(&v, &err));
    assert_ok(rt_json_set_int(v, "i", INT64_MIN, &err));
    assert_ok(rt_json_set_double(v, "d", 0.1, &err));
    assert_ok(rt_json_set_double(v, "third", 1.0 / 3, &err));
    assert_ok(rt_json_set_double(v, "two", 2, &err));
    assert_ok(rt_json_set_double(v, "inf", INFINITY, &err));
    assert_ok(rt_json_set_string(v, "s", "a\"\\\n\x01\xc3\xa9\x7f", &err));
    assert_ok(rt_json_set_string_n(v, "cut", "\xc3\xa9\xc3", 3, &err));
    assert_ok(rt_json_set_array(v, "l", &child, &err));
    assert_ok(rt_json_set_bool(child, NULL, true, &err));
    assert_ok(rt_json_set_null(child, NULL, &err));
    assert_ok(rt_json_set_array(v, "e", &child, &err));
    assert_ok(rt_json_set_int(v, "i", 5, &err)); /* replaces, keeps its place */
    assert_ok(rt_json_dump(v, 0, &out, &err));
    const char *want = "{\"i\":5,\"d\":0.1,\"third\":0.3333333333333333,\"two\":2.0,\"inf\":null,\"s\":\"a\\\"\\\\\\n\\u0001\xc3\xa9\\u007f\","
                       "\"cut\":\"\xc3\xa9\xef\xbf\xbd\",\"l\":[true,null],\"e\":[]}";
    assert_int_equal(out.len, strlen(want));
    assert_memory_equal(out.data, want, out.len);
    assert_ok(rt_json_parse(out.data, out.len, "back", &back, &err));
    assert_ok(rt_json_set_copy(v, "copy", back, &err));
    rt_json_free(back);
    assert_string_equal(rt_json_as_string(rt_json_get(rt_json_get(v, "copy"), "s"), NULL), "a\"\\\n\x01\xc3\xa9\x7f");
    out.len = 0;
    assert_ok(rt_json_dump(rt_json_get(rt_json_get(v, "copy"), "l"), 2, &out, &err));
    assert_memory_equal(out.data, "[\n  true,\n  null\n]", out.len);
    rt_buf_free(&out);
    rt_json_free(v);
}

/* Many members: the key index while building and after parsing; reals survive print and parse. */
static void many(void **state)
{
    (void)state;
    enum { N = 20000 };
    struct rt_err err = {0};
    struct rt_json *v, *back;
    struct rt_buf out = {0};
    char key[32];
    int64_t i64;
    assert_ok(rt_json_new_object(&v, &err));
    for (int i = 0; i < N; i++) {
        snprintf(key, sizeof key, "model.layers.%d", i);
        assert_ok(rt_json_set_int(v, key, i, &err));
        if (i < 20) { /* around the size at which the index appears */
            assert_true(rt_json_as_int(rt_json_get(v, "model.layers.0"), &i64) && i64 == 0);
            assert_true(rt_json_as_int(rt_json_get(v, key), &i64) && i64 == i);
            assert_null(rt_json_get(v, "model.layers.999999"));
        }
    }
    assert_ok(rt_json_dump(v, 0, &out, &err));
    assert_ok(rt_json_parse(out.data, out.len, "back", &back, &err));
    assert_int_equal(rt_json_len(back), N);
    for (int i = 0; i < N; i++) {
        const char *k;
        const struct rt_json *m;
        snprintf(key, sizeof key, "model.layers.%d", i);
        assert_true(rt_json_as_int(rt_json_get(back, key), &i64) && i64 == i);
        assert_true(rt_json_member(back, (size_t)i, &k, &m) && strcmp(k, key) == 0);
    }
    assert_null(rt_json_get(back, "model.layers.-1"));
    rt_json_free(back);
    rt_json_free(v);
    uint64_t bits = 88172645463325252u;
    for (int i = 0; i < 2000; i++) {
        double d, e;
        bits ^= bits << 13, bits ^= bits >> 7, bits ^= bits << 17;
        memcpy(&d, &bits, 8);
        if (!isfinite(d))
            continue;
        out.len = 0;
        assert_ok(rt_json_new_array(&v, &err));
        assert_ok(rt_json_set_double(v, NULL, d, &err));
        assert_ok(rt_json_dump(v, 0, &out, &err));
        rt_json_free(v);
        assert_ok(rt_json_parse(out.data, out.len, "real", &v, &err));
        assert_int_equal(rt_json_typeof(rt_json_at(v, 0)), RT_JSON_REAL);
        assert_true(rt_json_as_double(rt_json_at(v, 0), &e) && e == d);
        rt_json_free(v);
    }
    rt_buf_free(&out);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(values), cmocka_unit_test(numbers_as_they_were_written),
    cmocka_unit_test(refusals),
    cmocka_unit_test(building),
    cmocka_unit_test(many),
};
RT_SUITE(json, tests)
