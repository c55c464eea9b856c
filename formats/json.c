/* Parsing (jansson) and reading of JSON values. */
#include "formats/json.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "formats/json_node.h"

/* Values of a document, and arrays and objects among them: bounds the memory that a dense hostile text can ask for
 * (about 150 bytes an empty array of 3 characters). The largest tokenizer.json has 2 M merges, each an array of two. */
enum { MAX_VALUES = 1 << 24, MAX_BOXES = 1 << 22 };

struct scan {
    size_t big; /* integers outside int64 */
    size_t values, boxes;
};

static bool number_char(char c)
{
    return (c >= '0' && c <= '9') || c == '+' || c == '-' || c == '.' || c == 'e' || c == 'E';
}

/* Length of the number at s; *big: an integer that int64 does not hold. */
static size_t scan_number(const char *s, size_t len, bool *big)
{
    size_t n = 0;
    bool integer = true, over = false;
    uint64_t v = 0;
    for (; n < len && number_char(s[n]); n++) {
        if (s[n] >= '0' && s[n] <= '9')
            over |= __builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, (uint64_t)(s[n] - '0'), &v);
        else if (n > 0 || s[n] != '-')
            integer = false;
    }
    *big = integer && n > 0 && (over || v > (uint64_t)INT64_MAX + (s[0] == '-'));
    return n;
}

/* "line 3" and what is to follow it; nothing where the text is one line, which its source names already where it is a line of a file. */
static const char *in_line(const char *text, size_t len, size_t line, const char *then, char out[40])
{
    out[0] = '\0';
    if (len > 0 && memchr(text, '\n', len) != NULL)
        snprintf(out, 40, "line %zu%s", line, then);
    return out;
}

/* Depth and counts outside strings; the grammar is jansson's business. */
static enum rt_status scan_text(const char *text, size_t len, const char *source, struct scan *scan, struct rt_err *err)
{
    size_t depth = 0, line = 1;
    char at[40];
    for (size_t i = 0; i < len; i++) {
        const char c = text[i];
        if (c == '"') {
            for (i++; i < len && text[i] != '"'; i++)
                i += text[i] == '\\';
        } else if (c == '[' || c == '{') {
            scan->boxes++;
            scan->values++;
            if (++depth > RT_JSON_DEPTH)
                return rt_fail(err, RT_FORMAT, "%s: %snested deeper than %d", source, in_line(text, len, line, ": ", at), RT_JSON_DEPTH);
        } else if (c == ']' || c == '}') {
            depth -= depth > 0;
        } else if (c == ',') {
            scan->values++;
        } else if (c == '\n') {
            line++;
        } else if (number_char(c)) {
            bool big;
            i += scan_number(text + i, len - i, &big) - 1;
            scan->big += big;
        }
        if (scan->values > MAX_VALUES || scan->boxes > MAX_BOXES)
            return rt_fail(err, RT_FORMAT, "%s: %smore than %d values or %d arrays and objects", source, in_line(text, len, line, ": ", at),
                           MAX_VALUES, MAX_BOXES);
    }
    return RT_OK;
}

/* Integers outside int64 become reals ("model_max_length": 1000000000000000019884624838656 is common): "e0" behind each. */
static enum rt_status widen(const char *text, size_t len, struct rt_buf *out, struct rt_err *err)
{
    size_t from = 0;
    enum rt_status st = RT_OK;
    for (size_t i = 0; i < len && st == RT_OK; i++) {
        if (text[i] == '"') {
            for (i++; i < len && text[i] != '"'; i++)
                i += text[i] == '\\';
        } else if (number_char(text[i])) {
            bool big;
            i += scan_number(text + i, len - i, &big) - 1;
            if (big) {
                st = rt_buf_append(out, text + from, i + 1 - from, err);
                from = i + 1;
                if (st == RT_OK)
                    st = rt_buf_append(out, "e0", 2, err);
            }
        }
    }
    return st == RT_OK ? rt_buf_append(out, text + from, len - from, err) : st;
}

/* Where an allocation of its own fails, jansson aborts, cuts a string short or calls it a syntax error. So all that it may take
 * (2.14, measured: at most 200 bytes an array or object, 130 a value, and the text three times) is asked for before it starts. */
static enum rt_status room_for_jansson(const struct scan *scan, size_t len, const char *source, struct rt_err *err)
{
    const size_t bytes = 4096 + scan->boxes * 200 + scan->values * 130 + len * 3;
    void *room = malloc(bytes);
    if (room == NULL)
        return rt_fail(err, RT_NOMEM, "out of memory for the JSON of %s (%zu bytes)", source, bytes);
    free(room);
    return RT_OK;
}

/* Numbers of a text, in the order in which values are converted. */
struct numbers {
    const char *at, *end;
};

static const char *next_number(struct numbers *from, size_t *n)
{
    const char *s = from->at;
    while (s < from->end && *s != '-' && !(*s >= '0' && *s <= '9')) {
        if (*s++ != '"')
            continue;
        while (s < from->end && *s != '"')
            s += *s == '\\' ? 2 : 1;
        s++;
    }
    *n = 0;
    while (s < from->end && (size_t)(from->end - s) > *n && number_char(s[*n]))
        ++*n;
    from->at = s + *n;
    return s;
}

static enum rt_status convert(struct rt_json_doc *doc, struct numbers *numbers, json_t *j, struct rt_json **out, struct rt_err *err)
{
    static const enum rt_json_type types[] = {
        [JSON_OBJECT] = RT_JSON_OBJECT, [JSON_ARRAY] = RT_JSON_ARRAY, [JSON_STRING] = RT_JSON_STRING,
        [JSON_INTEGER] = RT_JSON_INT,   [JSON_REAL] = RT_JSON_REAL,   [JSON_TRUE] = RT_JSON_BOOL,
        [JSON_FALSE] = RT_JSON_BOOL,    [JSON_NULL] = RT_JSON_NULL,
    };
    enum rt_status st;
    struct rt_json *v, *item;
    const char *number;
    char *copy;
    size_t n;
    RT_TRY(rt_json_node_new(doc, types[json_typeof(j)], &v, err));
    switch (v->type) {
    case RT_JSON_NULL: break;
    case RT_JSON_BOOL: v->u.b = json_is_true(j); break;
    case RT_JSON_INT:
        v->u.i = json_integer_value(j);
        next_number(numbers, &n);
        break;
    case RT_JSON_REAL:
        v->u.real.d = json_real_value(j);
        number = next_number(numbers, &n);
        RT_TRY(rt_json_doc_string(doc, number, n, &copy, err));
        v->u.real.text = copy;
        break;
    case RT_JSON_STRING:
        v->u.str.n = json_string_length(j);
        RT_TRY(rt_json_doc_string(doc, json_string_value(j), v->u.str.n, &v->u.str.s, err));
        break;
    case RT_JSON_ARRAY:
        RT_TRY(rt_json_box_reserve(v, json_array_size(j), err));
        for (size_t i = 0; i < json_array_size(j); i++) {
            RT_TRY(convert(doc, numbers, json_array_get(j, i), &item, err));
            rt_json_box_push(v, NULL, item);
        }
        break;
    case RT_JSON_OBJECT:
        RT_TRY(rt_json_box_reserve(v, json_object_size(j), err));
        for (void *it = json_object_iter(j); it != NULL; it = json_object_iter_next(j, it)) {
            const char *key = json_object_iter_key(it);
            RT_TRY(rt_json_doc_string(doc, key, strlen(key), &copy, err));
            RT_TRY(convert(doc, numbers, json_object_iter_value(it), &item, err));
            rt_json_box_push(v, copy, item);
        }
        break;
    }
    *out = v;
out:
    return st;
}

/* What the parser says, with bytes of the file fit for a terminal. */
static enum rt_status syntax_error(const char *text, size_t len, const char *source, json_error_t *je, struct rt_err *err)
{
    static const char file_end[] = " near end of file";
    char at[40];
    const size_t n = strlen(je->text), tail = sizeof file_end - 1;
    const char *where = in_line(text, len, (size_t)je->line, ", ", at);
    if (len >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0)
        return rt_fail(err, RT_FORMAT, "%s: begins with a byte order mark (the bytes EF BB BF): take it away", source);
    const bool ends = n >= tail && strcmp(je->text + n - tail, file_end) == 0;
    for (char *p = je->text; *p != '\0'; p++)
        if ((unsigned char)*p < 32 || *p == 127)
            *p = '?';
    return rt_fail(err, RT_FORMAT, "%s: %scolumn %d: %.*s%s", source, where, je->column, (int)(ends ? n - tail : n), je->text,
                   !ends ? "" : where[0] != '\0' ? file_end : " at the end");
}

enum rt_status rt_json_parse(const char *text, size_t len, const char *source, struct rt_json **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf wide = {0};
    struct rt_json_doc *doc = NULL;
    json_t *j = NULL;
    json_error_t je;
    struct scan scan = {0};
    struct numbers numbers = {text, text + len};

    RT_TRY(scan_text(text, len, source, &scan, err));
    if (scan.big > 0) {
        RT_TRY(widen(text, len, &wide, err));
        text = wide.data;
        len = wide.len;
    }
    RT_TRY(room_for_jansson(&scan, len, source, err));
    j = json_loadb(len > 0 ? text : "", len, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &je);
    if (j == NULL) {
        if (json_error_code(&je) == json_error_out_of_memory)
            RT_FAIL(err, NOMEM, "out of memory for the JSON of %s", source);
        st = syntax_error(text, len, source, &je, err);
        goto out;
    }
    RT_TRY(rt_json_doc_new(source, &doc, err));
    RT_TRY(convert(doc, &numbers, j, &doc->root, err));
    *out = doc->root;
    doc = NULL;
out:
    json_decref(j);
    rt_json_doc_free(doc);
    rt_buf_free(&wide);
    return st;
}

enum rt_status rt_json_load(const char *path, size_t max_bytes, struct rt_json **out, struct rt_err *err)
{
    struct rt_buf text = {0};
    enum rt_status st;
    RT_TRY(rt_file_read_all(path, max_bytes, &text, err));
    RT_TRY(rt_json_parse(text.data, text.len, path, out, err));
out:
    rt_buf_free(&text);
    return st;
}

void rt_json_free(struct rt_json *root)
{
    if (root != NULL) {
        RT_ASSERT(root == root->doc->root);
        rt_json_doc_free(root->doc);
    }
}

enum rt_json_type rt_json_typeof(const struct rt_json *v)
{
    return v->type;
}

const char *rt_json_source(const struct rt_json *v)
{
    return v->doc->source;
}

static bool is_box(const struct rt_json *v)
{
    return v != NULL && (v->type == RT_JSON_ARRAY || v->type == RT_JSON_OBJECT);
}

const struct rt_json *rt_json_get(const struct rt_json *v, const char *key)
{
    if (v == NULL || v->type != RT_JSON_OBJECT)
        return NULL;
    const int64_t i = rt_json_box_find(v, key);
    return i < 0 ? NULL : v->u.box.at[i];
}

size_t rt_json_len(const struct rt_json *v)
{
    return is_box(v) ? v->u.box.n : 0;
}

const struct rt_json *rt_json_at(const struct rt_json *v, size_t i)
{
    return is_box(v) && v->type == RT_JSON_ARRAY && i < v->u.box.n ? v->u.box.at[i] : NULL;
}

bool rt_json_member(const struct rt_json *v, size_t i, const char **key, const struct rt_json **value)
{
    if (v == NULL || v->type != RT_JSON_OBJECT || i >= v->u.box.n)
        return false;
    *key = v->u.box.key[i];
    *value = v->u.box.at[i];
    return true;
}

bool rt_json_as_int(const struct rt_json *v, int64_t *out)
{
    if (v != NULL && v->type == RT_JSON_INT) {
        *out = v->u.i;
        return true;
    }
    if (v != NULL && v->type == RT_JSON_REAL && v->u.real.d >= -0x1p63 && v->u.real.d < 0x1p63 && v->u.real.d == floor(v->u.real.d)) {
        *out = (int64_t)v->u.real.d;
        return true;
    }
    return false;
}

bool rt_json_as_double(const struct rt_json *v, double *out)
{
    if (v == NULL || (v->type != RT_JSON_INT && v->type != RT_JSON_REAL))
        return false;
    *out = v->type == RT_JSON_INT ? (double)v->u.i : v->u.real.d;
    return true;
}

bool rt_json_as_bool(const struct rt_json *v, bool *out)
{
    if (v == NULL || v->type != RT_JSON_BOOL)
        return false;
    *out = v->u.b;
    return true;
}

const char *rt_json_as_string(const struct rt_json *v, size_t *len)
{
    if (v == NULL || v->type != RT_JSON_STRING)
        return NULL;
    if (len != NULL)
        *len = v->u.str.n;
    return v->u.str.s;
}

/* "SOURCE: key 'KEY': expected WHAT, found ..." */
static enum rt_status mismatch(const struct rt_json *obj, const char *key, const char *what, struct rt_err *err)
{
    const struct rt_json *v = rt_json_get(obj, key);
    char found[96] = "none: the key is missing";
    if (obj == NULL) /* an item of what is no list */
        return rt_fail(err, RT_FORMAT, "key '%s': expected %s, found no object around it", key, what);
    if (obj->type != RT_JSON_OBJECT)
        snprintf(found, sizeof found, "no object around it");
    else if (v != NULL)
        switch (v->type) {
        case RT_JSON_NULL: snprintf(found, sizeof found, "null"); break;
        case RT_JSON_BOOL: snprintf(found, sizeof found, "%s", v->u.b ? "true" : "false"); break;
        case RT_JSON_INT: snprintf(found, sizeof found, "%" PRId64, v->u.i); break;
        case RT_JSON_REAL: snprintf(found, sizeof found, "%.17g", v->u.real.d); break;
        case RT_JSON_STRING: snprintf(found, sizeof found, "the string \"%.40s\"", v->u.str.s); break;
        case RT_JSON_ARRAY: snprintf(found, sizeof found, "an array of %u", v->u.box.n); break;
        case RT_JSON_OBJECT: snprintf(found, sizeof found, "an object of %u", v->u.box.n); break;
        }
    return rt_fail(err, RT_FORMAT, "%s: key '%s': expected %s, found %s", obj->doc->source, key, what, found);
}

static bool absent(const struct rt_json *obj, const char *key)
{
    const struct rt_json *v = rt_json_get(obj, key);
    return obj != NULL && obj->type == RT_JSON_OBJECT && (v == NULL || v->type == RT_JSON_NULL);
}

enum rt_status rt_json_int(const struct rt_json *obj, const char *key, int64_t min, int64_t max, int64_t *out, struct rt_err *err)
{
    int64_t v;
    if (!rt_json_as_int(rt_json_get(obj, key), &v) || v < min || v > max) {
        char what[96];
        snprintf(what, sizeof what, "an integer in [%" PRId64 ", %" PRId64 "]", min, max);
        return mismatch(obj, key, what, err);
    }
    *out = v;
    return RT_OK;
}

enum rt_status rt_json_double(const struct rt_json *obj, const char *key, double *out, struct rt_err *err)
{
    return rt_json_as_double(rt_json_get(obj, key), out) ? RT_OK : mismatch(obj, key, "a number", err);
}

enum rt_status rt_json_string(const struct rt_json *obj, const char *key, const char **out, struct rt_err *err)
{
    const char *s = rt_json_as_string(rt_json_get(obj, key), NULL);
    if (s == NULL)
        return mismatch(obj, key, "a string", err);
    *out = s;
    return RT_OK;
}

enum rt_status rt_json_int_or(const struct rt_json *obj, const char *key, int64_t min, int64_t max, int64_t def, int64_t *out,
                              struct rt_err *err)
{
    if (!absent(obj, key))
        return rt_json_int(obj, key, min, max, out, err);
    *out = def;
    return RT_OK;
}

enum rt_status rt_json_double_or(const struct rt_json *obj, const char *key, double def, double *out, struct rt_err *err)
{
    if (!absent(obj, key))
        return rt_json_double(obj, key, out, err);
    *out = def;
    return RT_OK;
}

enum rt_status rt_json_bool_or(const struct rt_json *obj, const char *key, bool def, bool *out, struct rt_err *err)
{
    if (absent(obj, key)) {
        *out = def;
        return RT_OK;
    }
    return rt_json_as_bool(rt_json_get(obj, key), out) ? RT_OK : mismatch(obj, key, "true or false", err);
}

enum rt_status rt_json_string_or(const struct rt_json *obj, const char *key, const char *def, const char **out, struct rt_err *err)
{
    if (!absent(obj, key))
        return rt_json_string(obj, key, out, err);
    *out = def;
    return RT_OK;
}
