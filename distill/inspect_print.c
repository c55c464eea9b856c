#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "distill/inspect.h"

enum { CELL = 600, MAX_COLUMNS = 16, LABEL = 24 };

static bool ends(const char *s, const char *suffix)
{
    const size_t n = strlen(s), m = strlen(suffix);
    return n >= m && strcmp(s + n - m, suffix) == 0;
}

static void separated(char out[64], int64_t v)
{
    char digits[32];
    size_t at = 0;
    const int n = snprintf(digits, sizeof digits, "%" PRId64, v);
    for (int i = 0; i < n; i++) {
        out[at++] = digits[i];
        if (digits[i] != '-' && i + 1 < n && (n - 1 - i) % 3 == 0)
            out[at++] = ',';
    }
    out[at] = '\0';
}

/* Outside text on a terminal: line breaks and tabs are shown as escapes, other control characters as '?'. */
static void plain(char out[CELL], const char *s)
{
    size_t at = 0;
    for (; *s != '\0' && at + 3 < CELL; s++) {
        const char *escape = *s == '\n' ? "\\n" : *s == '\t' ? "\\t" : NULL;
        if (escape != NULL) {
            out[at++] = escape[0];
            out[at++] = escape[1];
        } else {
            out[at++] = (unsigned char)*s < 0x20 || *s == 0x7f ? '?' : *s;
        }
    }
    out[at] = '\0';
}

/* A scalar as text; false: an object or a list. */
static bool scalar(const char *key, const struct rt_json *v, bool units, char out[CELL])
{
    int64_t i;
    double d;
    bool b;
    char unit[64];
    switch (rt_json_typeof(v)) {
    case RT_JSON_NULL: snprintf(out, CELL, "none"); return true;
    case RT_JSON_BOOL:
        rt_json_as_bool(v, &b);
        snprintf(out, CELL, b ? "yes" : "no");
        return true;
    case RT_JSON_INT:
        rt_json_as_int(v, &i);
        separated(unit, i);
        if (units && ends(key, "bytes") && i >= 1000) {
            char human[32];
            snprintf(out, CELL, "%s (%s)", unit, rt_human_bytes(human, (uint64_t)i));
        } else {
            snprintf(out, CELL, "%s", unit);
        }
        return true;
    case RT_JSON_REAL:
        rt_json_as_double(v, &d);
        snprintf(out, CELL, "%.5g", d);
        return true;
    case RT_JSON_STRING:
        plain(out, rt_json_as_string(v, NULL));
        return true;
    default: return false;
    }
}

static void label_of(const char *key, char out[LABEL * 2])
{
    snprintf(out, LABEL * 2, "%s", key);
    for (char *p = out; *p != '\0'; p++)
        *p = *p == '_' ? ' ' : *p;
}

/* Columns on a terminal, counting characters, not bytes. */
static int width(const char *s)
{
    int n = 0;
    for (; *s != '\0'; s++)
        n += ((unsigned char)*s & 0xc0) != 0x80;
    return n;
}

static enum rt_status pad(struct rt_buf *out, const char *s, int to, bool right, struct rt_err *err)
{
    enum rt_status st;
    const int fill = to > width(s) ? to - width(s) : 0;
    if (right)
        RT_TRY(rt_buf_printf(out, err, "%*s", fill, ""));
    RT_TRY(rt_buf_puts(out, s, err));
    if (!right)
        RT_TRY(rt_buf_printf(out, err, "%*s", fill, ""));
out:
    return st;
}

struct column {
    const char *key;
    int width;
    bool right;
};

/* A cell of a table: as scalar, but hashes are cut. False: no text. */
static bool cell_text(const struct rt_json *row, const char *key, char out[CELL])
{
    const struct rt_json *v = rt_json_get(row, key);
    if (v == NULL || !scalar(key, v, false, out))
        return false;
    if (strlen(out) == 64 && strspn(out, "0123456789abcdef") == 64)
        out[12] = '\0';
    return true;
}

/* The members of all rows, in order of appearance; numbers to the right. */
static int columns_of(const struct rt_json *list, struct column c[MAX_COLUMNS])
{
    int n = 0;
    const char *key;
    const struct rt_json *v;
    char cell[CELL];
    for (size_t r = 0; r < rt_json_len(list); r++)
        for (size_t i = 0; rt_json_member(rt_json_at(list, r), i, &key, &v); i++) {
            int at = 0;
            while (at < n && strcmp(c[at].key, key) != 0)
                at++;
            if (at == MAX_COLUMNS || !cell_text(rt_json_at(list, r), key, cell))
                continue;
            if (at == n) {
                char head[LABEL * 2];
                label_of(key, head);
                c[n++] = (struct column){key, width(head), true};
            }
            const enum rt_json_type type = rt_json_typeof(v);
            c[at].right &= type == RT_JSON_INT || type == RT_JSON_REAL || type == RT_JSON_NULL;
            c[at].width = width(cell) > c[at].width ? width(cell) : c[at].width;
        }
    return n;
}

/* A list of objects. */
static enum rt_status table(const struct rt_json *list, int indent, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct column column[MAX_COLUMNS];
    const int n = columns_of(list, column);
    char cell[CELL];
    for (size_t r = 0; r <= rt_json_len(list); r++) {
        RT_TRY(rt_buf_printf(out, err, "%*s", indent, ""));
        for (int c = 0; c < n; c++) {
            cell[0] = '\0';
            if (r == 0)
                label_of(column[c].key, cell);
            else if (!cell_text(rt_json_at(list, r - 1), column[c].key, cell))
                cell[0] = '\0';
            if (c > 0)
                RT_TRY(rt_buf_puts(out, "  ", err));
            RT_TRY(pad(out, cell, c + 1 < n || column[c].right ? column[c].width : 0, column[c].right, err));
        }
        RT_TRY(rt_buf_puts(out, "\n", err));
    }
out:
    return st;
}

static enum rt_status list_of(const char *key, const struct rt_json *v, const char *label, int indent, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char cell[CELL];
    if (rt_json_len(v) > 0 && rt_json_typeof(rt_json_at(v, 0)) == RT_JSON_OBJECT) {
        RT_TRY(rt_buf_printf(out, err, "%*s%s\n", indent, "", label));
        return table(v, indent + 2, out, err);
    }
    RT_TRY(rt_buf_printf(out, err, "%*s%-*s", indent, "", LABEL + 1 - indent, label));
    for (size_t i = 0; i < rt_json_len(v); i++) {
        if (!scalar(key, rt_json_at(v, i), true, cell))
            snprintf(cell, sizeof cell, "...");
        RT_TRY(rt_buf_printf(out, err, "%s%s", i > 0 ? ", " : "", cell));
    }
    RT_TRY(rt_buf_puts(out, rt_json_len(v) == 0 ? "none\n" : "\n", err));
out:
    return st;
}

static enum rt_status members(const struct rt_json *obj, int indent, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *key;
    const struct rt_json *v;
    char cell[CELL], label[LABEL * 2];
    for (size_t i = 0; rt_json_member(obj, i, &key, &v); i++) {
        label_of(key, label);
        if (scalar(key, v, true, cell)) {
            RT_TRY(rt_buf_printf(out, err, "%*s%-*s", indent, "", LABEL - indent, label));
            RT_TRY(rt_buf_printf(out, err, " %s\n", cell));
        } else if (rt_json_typeof(v) == RT_JSON_ARRAY) {
            RT_TRY(list_of(key, v, label, indent, out, err));
        } else {
            RT_TRY(rt_buf_printf(out, err, "%*s%s\n", indent, "", label));
            if (indent < 12)
                RT_TRY(members(v, indent + 2, out, err));
        }
    }
out:
    return st;
}

enum rt_status rt_inspect_print(const struct rt_json *obj, struct rt_buf *out, struct rt_err *err)
{
    return members(obj, 0, out, err);
}
