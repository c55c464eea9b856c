/* Building and printing of JSON values. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/json_node.h"
#include "formats/utf8.h"

static enum rt_status new_root(enum rt_json_type type, struct rt_json **out, struct rt_err *err)
{
    struct rt_json_doc *doc = NULL;
    enum rt_status st;
    RT_TRY(rt_json_doc_new("(built in memory)", &doc, err));
    RT_TRY(rt_json_node_new(doc, type, &doc->root, err));
    *out = doc->root;
    doc = NULL;
out:
    rt_json_doc_free(doc);
    return st;
}

enum rt_status rt_json_new_object(struct rt_json **out, struct rt_err *err)
{
    return new_root(RT_JSON_OBJECT, out, err);
}

enum rt_status rt_json_new_array(struct rt_json **out, struct rt_err *err)
{
    return new_root(RT_JSON_ARRAY, out, err);
}

/* A new node of `type` as box[key], or appended. */
static enum rt_status add(struct rt_json *box, const char *key, enum rt_json_type type, struct rt_json **out, struct rt_err *err)
{
    enum rt_status st;
    RT_ASSERT(box->type == (key != NULL ? RT_JSON_OBJECT : RT_JSON_ARRAY));
    const int64_t at = key != NULL ? rt_json_box_find(box, key) : -1;
    struct rt_json *node = NULL;
    char *copy = NULL;
    RT_TRY(rt_json_node_new(box->doc, type, &node, err));
    if (at >= 0) {
        box->u.box.at[at] = node;
    } else {
        if (key != NULL)
            RT_TRY(rt_json_doc_string(box->doc, key, strlen(key), &copy, err));
        if (box->u.box.n == box->u.box.cap)
            RT_TRY(rt_json_box_reserve(box, box->u.box.cap == 0 ? 8 : (size_t)box->u.box.cap * 2, err));
        rt_json_box_push(box, copy, node);
    }
    *out = node;
out:
    return st;
}

enum rt_status rt_json_set_int(struct rt_json *v, const char *key, int64_t value, struct rt_err *err)
{
    struct rt_json *node;
    const enum rt_status st = add(v, key, RT_JSON_INT, &node, err);
    if (st == RT_OK)
        node->u.i = value;
    return st;
}

enum rt_status rt_json_set_double(struct rt_json *v, const char *key, double value, struct rt_err *err)
{
    struct rt_json *node;
    const enum rt_status st = add(v, key, RT_JSON_REAL, &node, err);
    if (st == RT_OK) {
        node->u.real.d = value;
        node->u.real.text = NULL;
    }
    return st;
}

enum rt_status rt_json_set_bool(struct rt_json *v, const char *key, bool value, struct rt_err *err)
{
    struct rt_json *node;
    const enum rt_status st = add(v, key, RT_JSON_BOOL, &node, err);
    if (st == RT_OK)
        node->u.b = value;
    return st;
}

enum rt_status rt_json_set_null(struct rt_json *v, const char *key, struct rt_err *err)
{
    struct rt_json *node;
    return add(v, key, RT_JSON_NULL, &node, err);
}

enum rt_status rt_json_set_string(struct rt_json *v, const char *key, const char *s, struct rt_err *err)
{
    return rt_json_set_string_n(v, key, s, strlen(s), err);
}

enum rt_status rt_json_set_string_n(struct rt_json *v, const char *key, const char *s, size_t n, struct rt_err *err)
{
    struct rt_json *node;
    char *copy;
    enum rt_status st;
    RT_TRY(rt_json_doc_string(v->doc, s, n, &copy, err));
    RT_TRY(add(v, key, RT_JSON_STRING, &node, err));
    node->u.str.s = copy;
    node->u.str.n = n;
out:
    return st;
}

enum rt_status rt_json_set_object(struct rt_json *v, const char *key, struct rt_json **child, struct rt_err *err)
{
    return add(v, key, RT_JSON_OBJECT, child, err);
}

enum rt_status rt_json_set_array(struct rt_json *v, const char *key, struct rt_json **child, struct rt_err *err)
{
    return add(v, key, RT_JSON_ARRAY, child, err);
}

static enum rt_status copy_real(struct rt_json *v, const char *key, const struct rt_json *value, struct rt_err *err)
{
    struct rt_json *node;
    char *text = NULL;
    enum rt_status st;
    if (value->u.real.text != NULL)
        RT_TRY(rt_json_doc_string(v->doc, value->u.real.text, strlen(value->u.real.text), &text, err));
    RT_TRY(add(v, key, RT_JSON_REAL, &node, err));
    node->u.real.d = value->u.real.d;
    node->u.real.text = text;
out:
    return st;
}

enum rt_status rt_json_set_copy(struct rt_json *v, const char *key, const struct rt_json *value, struct rt_err *err)
{
    struct rt_json *child;
    enum rt_status st = RT_OK;
    switch (value->type) {
    case RT_JSON_NULL: return rt_json_set_null(v, key, err);
    case RT_JSON_BOOL: return rt_json_set_bool(v, key, value->u.b, err);
    case RT_JSON_INT: return rt_json_set_int(v, key, value->u.i, err);
    case RT_JSON_REAL: return copy_real(v, key, value, err);
    case RT_JSON_STRING: return rt_json_set_string_n(v, key, value->u.str.s, value->u.str.n, err);
    case RT_JSON_ARRAY:
    case RT_JSON_OBJECT: break;
    }
    RT_TRY(add(v, key, value->type, &child, err));
    for (uint32_t i = 0; i < value->u.box.n; i++)
        RT_TRY(rt_json_set_copy(child, value->type == RT_JSON_OBJECT ? value->u.box.key[i] : NULL, value->u.box.at[i], err));
out:
    return st;
}

/* Bytes that are no UTF-8 (text cut inside a character) come out as U+FFFD: what is printed always parses. */
static enum rt_status dump_string(const char *s, size_t n, struct rt_buf *out, struct rt_err *err)
{
    static const char shorthand[128] = {['\b'] = 'b', ['\f'] = 'f', ['\n'] = 'n', ['\r'] = 'r', ['\t'] = 't', ['"'] = '"', ['\\'] = '\\'};
    enum rt_status st;
    size_t from = 0;
    RT_TRY(rt_buf_append(out, "\"", 1, err));
    for (size_t i = 0; i < n;) {
        const unsigned char c = (unsigned char)s[i];
        const size_t len = rt_utf8_char(s + i, n - i);
        if (len > 1 || (len == 1 && c >= 32 && c != '"' && c != '\\' && c != 127)) {
            i += len;
            continue;
        }
        RT_TRY(rt_buf_append(out, s + from, i - from, err));
        if (len == 0)
            RT_TRY(rt_buf_append(out, "\xef\xbf\xbd", 3, err));
        else if (shorthand[c] != '\0')
            RT_TRY(rt_buf_printf(out, err, "\\%c", shorthand[c]));
        else
            RT_TRY(rt_buf_printf(out, err, "\\u%04x", c));
        from = ++i;
    }
    RT_TRY(rt_buf_append(out, s + from, n - from, err));
    RT_TRY(rt_buf_append(out, "\"", 1, err));
out:
    return st;
}

/* Up to 15 digits always survive decimal -> double -> decimal, so %.15g is the shortest form wherever it reads back equal. */
static enum rt_status dump_real(double d, struct rt_buf *out, struct rt_err *err)
{
    char text[40];
    if (!isfinite(d))
        return rt_buf_append(out, "null", 4, err);
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, d);
        if (strtod(text, NULL) == d)
            break;
    }
    if (text[strcspn(text, ".e")] == '\0')
        strcat(text, ".0"); /* stays a real when read again */
    return rt_buf_append(out, text, strlen(text), err);
}

static enum rt_status line_break(int indent, int depth, struct rt_buf *out, struct rt_err *err)
{
    return indent > 0 ? rt_buf_printf(out, err, "\n%*s", indent * depth, "") : RT_OK;
}

static enum rt_status dump(const struct rt_json *v, int indent, int depth, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    switch (v->type) {
    case RT_JSON_NULL: return rt_buf_append(out, "null", 4, err);
    case RT_JSON_BOOL: return rt_buf_append(out, v->u.b ? "true" : "false", v->u.b ? 4 : 5, err);
    case RT_JSON_INT: return rt_buf_printf(out, err, "%" PRId64, v->u.i);
    case RT_JSON_REAL:
        return v->u.real.text != NULL ? rt_buf_append(out, v->u.real.text, strlen(v->u.real.text), err) : dump_real(v->u.real.d, out, err);
    case RT_JSON_STRING: return dump_string(v->u.str.s, v->u.str.n, out, err);
    case RT_JSON_ARRAY:
    case RT_JSON_OBJECT: break;
    }
    const bool object = v->type == RT_JSON_OBJECT;
    RT_TRY(rt_buf_append(out, object ? "{" : "[", 1, err));
    for (uint32_t i = 0; i < v->u.box.n; i++) {
        if (i > 0)
            RT_TRY(rt_buf_append(out, ",", 1, err));
        RT_TRY(line_break(indent, depth + 1, out, err));
        if (object) {
            RT_TRY(dump_string(v->u.box.key[i], strlen(v->u.box.key[i]), out, err));
            RT_TRY(rt_buf_append(out, ": ", indent > 0 ? 2 : 1, err));
        }
        RT_TRY(dump(v->u.box.at[i], indent, depth + 1, out, err));
    }
    if (v->u.box.n > 0)
        RT_TRY(line_break(indent, depth, out, err));
    RT_TRY(rt_buf_append(out, object ? "}" : "]", 1, err));
out:
    return st;
}

enum rt_status rt_json_dump(const struct rt_json *v, int indent, struct rt_buf *out, struct rt_err *err)
{
    return dump(v, indent, 0, out, err);
}
