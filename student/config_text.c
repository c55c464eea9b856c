/* Changing single members of a JSON text while every other byte stays: a config.json that passes through must not lose keys,
 * order or the spelling of numbers. */
#include <string.h>

#include "formats/json.h"
#include "student/config.h"

static size_t skip_space(const char *t, size_t len, size_t i)
{
    while (i < len && (t[i] == ' ' || t[i] == '\t' || t[i] == '\n' || t[i] == '\r'))
        i++;
    return i;
}

/* i at the opening quote; returns the place behind the closing one, or len + 1. */
static size_t skip_string(const char *t, size_t len, size_t i)
{
    for (i++; i < len; i++) {
        if (t[i] == '\\')
            i++;
        else if (t[i] == '"')
            return i + 1;
    }
    return len + 1;
}

/* i at the first byte of a value; returns the place behind it, or len + 1. */
static size_t skip_value(const char *t, size_t len, size_t i)
{
    size_t depth = 0;
    while (i < len) {
        const char c = t[i];
        if (c == '"') {
            i = skip_string(t, len, i);
            if (depth == 0)
                return i;
            continue;
        }
        if (c == '{' || c == '[') {
            depth++;
        } else if (c == '}' || c == ']') {
            if (depth == 0)
                return i;
            if (--depth == 0)
                return i + 1;
        } else if (depth == 0 && (c == ',' || c == ' ' || c == '\t' || c == '\n' || c == '\r')) {
            return i;
        }
        i++;
    }
    return len + 1;
}

/* [*from, *to) = the value of member key of the outermost object; from == 0 where it is absent. */
static bool find_member(const char *t, size_t len, const char *key, size_t *from, size_t *to)
{
    const size_t n = strlen(key);
    size_t i = skip_space(t, len, 0);
    *from = *to = 0;
    if (i >= len || t[i] != '{')
        return false;
    i = skip_space(t, len, i + 1);
    while (i < len && t[i] != '}') {
        if (t[i] != '"')
            return false;
        const size_t name = i + 1, end = skip_string(t, len, i);
        if (end > len)
            return false;
        i = skip_space(t, len, end);
        if (i >= len || t[i] != ':')
            return false;
        i = skip_space(t, len, i + 1);
        const size_t value = i;
        i = skip_value(t, len, i);
        if (i > len)
            return false;
        if (end - 1 - name == n && memcmp(t + name, key, n) == 0) {
            *from = value;
            *to = i;
            return true;
        }
        i = skip_space(t, len, i);
        if (i < len && t[i] == ',')
            i = skip_space(t, len, i + 1);
    }
    return i < len;
}

enum rt_status rt_json_text_patch(const char *text, size_t len, const char *key, const char *value, struct rt_buf *out,
                                  struct rt_err *err)
{
    enum rt_status st = RT_OK;
    size_t from = 0, to = 0;
    if (!find_member(text, len, key, &from, &to))
        RT_FAIL(err, FORMAT, "setting '%s': the text is no JSON object", key);
    if (from > 0) {
        RT_TRY(rt_buf_append(out, text, from, err));
        RT_TRY(rt_buf_append(out, value, strlen(value), err));
        RT_TRY(rt_buf_append(out, text + to, len - to, err));
    } else {
        const size_t open = skip_space(text, len, 0) + 1;
        const bool empty = text[skip_space(text, len, open)] == '}';
        RT_TRY(rt_buf_append(out, text, open, err));
        RT_TRY(rt_buf_printf(out, err, "\n  \"%s\": %s%s", key, value, empty ? "\n" : ","));
        RT_TRY(rt_buf_append(out, text + open, len - open, err));
    }
out:
    return st;
}

enum rt_status rt_student_config_text(const struct rt_student_config *c, enum rt_dtype dtype, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf a = {0}, b = {0};
    struct rt_json *o = NULL, *check = NULL;
    const size_t start = out->len;
    bool tied = false;
    const char *name = dtype == RT_BF16 ? "\"bfloat16\"" : dtype == RT_F16 ? "\"float16\"" : dtype == RT_F32 ? "\"float32\"" : NULL;
    if (name == NULL)
        RT_FAIL(err, USAGE, "a student is saved as BF16, F16 or F32, not as %s", rt_dtype_name(dtype));
    RT_TRY(rt_json_parse(c->text, c->text_len, "config.json", &o, err));
    RT_TRY(rt_buf_append(&a, c->text, c->text_len, err));
    const bool v4 = rt_json_get(o, "torch_dtype") != NULL, v5 = rt_json_get(o, "dtype") != NULL;
    if (v5) {
        RT_TRY(rt_json_text_patch(a.data, a.len, "dtype", name, &b, err));
        rt_buf_free(&a);
        a = b;
        b = (struct rt_buf){0};
    }
    if (v4 || !v5) {
        RT_TRY(rt_json_text_patch(a.data, a.len, "torch_dtype", name, &b, err));
        rt_buf_free(&a);
        a = b;
        b = (struct rt_buf){0};
    }
    RT_TRY(rt_json_bool_or(o, "tie_word_embeddings", false, &tied, err));
    if (tied != c->tied)
        RT_TRY(rt_json_text_patch(a.data, a.len, "tie_word_embeddings", c->tied ? "true" : "false", out, err));
    else
        RT_TRY(rt_buf_append(out, a.data, a.len, err));
    /* A key that the source spells with escapes would now be there twice. */
    RT_TRY(rt_json_parse(out->data + start, out->len - start, "config.json to be written", &check, err));
out:
    rt_json_free(check);
    rt_json_free(o);
    rt_buf_free(&a);
    rt_buf_free(&b);
    return st;
}
