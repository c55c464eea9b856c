/* The grammar is small and fixed, so it is read by hand: no tree is built, memory is bounded by the number of tensors that
 * fit in the text, and names stay in the text. */
#include "formats/safetensors_header.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "formats/utf8.h"

struct cursor {
    char *text, *at, *end;
    const char *path;
    struct rt_err *err;
};

static enum rt_status bad(struct cursor *c, const char *expected)
{
    return rt_fail(c->err, RT_FORMAT, "%s: header, byte %zu: expected %s", c->path, (size_t)(c->at - c->text) + 8, expected);
}

static char peek(struct cursor *c)
{
    while (c->at < c->end && (*c->at == ' ' || *c->at == '\t' || *c->at == '\n' || *c->at == '\r'))
        c->at++;
    return c->at < c->end ? *c->at : '\0';
}

static bool take(struct cursor *c, char want)
{
    if (peek(c) != want || c->at == c->end)
        return false;
    c->at++;
    return true;
}

static int hex4(const char *s)
{
    int v = 0;
    for (int i = 0; i < 4; i++) {
        const char h = s[i];
        const int d = h >= '0' && h <= '9' ? h - '0' : h >= 'a' && h <= 'f' ? h - 'a' + 10 : h >= 'A' && h <= 'F' ? h - 'A' + 10 : -1;
        if (d < 0)
            return -1;
        v = v * 16 + d;
    }
    return v;
}

static char *put_utf8(char *w, unsigned cp)
{
    if (cp < 0x80) {
        *w++ = (char)cp;
    } else if (cp < 0x800) {
        *w++ = (char)(0xc0 | cp >> 6);
        *w++ = (char)(0x80 | (cp & 63));
    } else if (cp < 0x10000) {
        *w++ = (char)(0xe0 | cp >> 12);
        *w++ = (char)(0x80 | (cp >> 6 & 63));
        *w++ = (char)(0x80 | (cp & 63));
    } else {
        *w++ = (char)(0xf0 | cp >> 18);
        *w++ = (char)(0x80 | (cp >> 12 & 63));
        *w++ = (char)(0x80 | (cp >> 6 & 63));
        *w++ = (char)(0x80 | (cp & 63));
    }
    return w;
}

/* c->at behind "\u": the code point, a surrogate pair joined; 0 where it is none (0 itself is refused too). */
static unsigned unicode_escape(struct cursor *c)
{
    int u = c->end - c->at >= 4 ? hex4(c->at) : -1;
    if (u <= 0 || (u >= 0xdc00 && u <= 0xdfff))
        return 0;
    c->at += 4;
    if (u < 0xd800 || u > 0xdbff)
        return (unsigned)u;
    const int lo = c->end - c->at >= 6 && c->at[0] == '\\' && c->at[1] == 'u' ? hex4(c->at + 2) : -1;
    if (lo < 0xdc00 || lo > 0xdfff)
        return 0;
    c->at += 6;
    return 0x10000 + ((unsigned)(u - 0xd800) << 10) + (unsigned)(lo - 0xdc00);
}

/* A string, unescaped in place and terminated; no 0 inside. */
static enum rt_status string(struct cursor *c, char **out, size_t *len)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (!take(c, '"'))
        return bad(c, "a string");
    char *w = c->at;
    *out = w;
    for (;;) {
        if (c->at == c->end)
            return bad(c, "the end of a string");
        const char ch = *c->at;
        if (ch == '"')
            break;
        if (ch == '\\') {
            c->at++;
            if (c->at == c->end)
                return bad(c, "the end of a string");
            if (*c->at == 'u') {
                c->at++;
                const unsigned cp = unicode_escape(c);
                if (cp == 0)
                    return bad(c, "a code point other than 0 behind \\u");
                w = put_utf8(w, cp); /* at most 3 bytes for 6, 4 for 12 */
            } else {
                const char *p = *c->at != '\0' ? strchr(from, *c->at) : NULL;
                if (p == NULL)
                    return bad(c, "an escape of JSON");
                *w++ = to[p - from];
                c->at++;
            }
            continue;
        }
        const size_t n = rt_utf8_char(c->at, (size_t)(c->end - c->at));
        if (n == 0 || (unsigned char)ch < 32)
            return bad(c, "UTF-8 without control characters");
        memmove(w, c->at, n);
        w += n;
        c->at += n;
    }
    c->at++;
    *w = '\0'; /* at the closing quote at the latest */
    *len = (size_t)(w - *out);
    return RT_OK;
}

static enum rt_status natural(struct cursor *c, int64_t *out)
{
    int64_t v = 0;
    const char first = peek(c);
    const char *const from = c->at;
    for (; c->at < c->end && *c->at >= '0' && *c->at <= '9'; c->at++)
        if (__builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, *c->at - '0', &v))
            return bad(c, "a whole number below 2^63");
    if (c->at == from || (first == '0' && c->at - from > 1))
        return bad(c, "a whole number");
    if (c->at < c->end && (*c->at == '.' || *c->at == 'e' || *c->at == 'E'))
        return bad(c, "a whole number, not a real");
    *out = v;
    return RT_OK;
}

/* [a, b, ...] of at most max. */
static enum rt_status naturals(struct cursor *c, int64_t *out, int max, int *n)
{
    *n = 0;
    if (!take(c, '['))
        return bad(c, "'['");
    if (take(c, ']'))
        return RT_OK;
    do {
        if (*n == max)
            return rt_fail(c->err, RT_FORMAT, "%s: header, byte %zu: expected at most %d numbers in this array", c->path,
                           (size_t)(c->at - c->text) + 8, max);
        const enum rt_status st = natural(c, &out[*n]);
        if (st != RT_OK)
            return st;
        ++*n;
    } while (take(c, ','));
    return take(c, ']') ? RT_OK : bad(c, "',' or ']'");
}

bool rt_st_bytes(enum rt_dtype dtype, int ndim, const int64_t *ne, uint64_t *bytes)
{
    int64_t n = (int64_t)rt_dtype_size(dtype);
    bool over = false, zero = false;
    for (int i = 0; i < ndim; i++) {
        if (ne[i] < 0)
            return false;
        zero |= ne[i] == 0;
        over |= __builtin_mul_overflow(n, ne[i], &n);
    }
    *bytes = zero ? 0 : (uint64_t)n;
    return !over || zero;
}

static enum rt_status tensor(struct cursor *c, struct rt_tensor *t, uint64_t data_bytes)
{
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4 };
    enum rt_status st;
    unsigned seen = 0;
    int64_t off[2];
    int n_off;
    if (!take(c, '{'))
        return bad(c, "'{' after the name of a tensor");
    do {
        char *key, *text;
        size_t n;
        unsigned bit = 0;
        RT_TRY(string(c, &key, &n));
        if (!take(c, ':'))
            return bad(c, "':'");
        if (strcmp(key, "dtype") == 0) {
            bit = DTYPE;
            RT_TRY(string(c, &text, &n));
            if (!rt_dtype_from_name(text, n, &t->dtype))
                return rt_fail(c->err, RT_UNSUPPORTED, "%s: tensor '%s' has the element type '%.40s', which is not supported",
                               c->path, t->name, text);
        } else if (strcmp(key, "shape") == 0) {
            bit = SHAPE;
            RT_TRY(naturals(c, t->ne, RT_MAX_NDIM, &t->ndim));
        } else if (strcmp(key, "data_offsets") == 0) {
            bit = OFFSETS;
            RT_TRY(naturals(c, off, 2, &n_off));
            if (n_off != 2)
                return bad(c, "two data_offsets");
        }
        if (bit == 0 || (seen & bit) != 0)
            return rt_fail(c->err, RT_FORMAT, "%s: tensor '%s' has an unknown or repeated member '%.40s'", c->path, t->name, key);
        seen |= bit;
    } while (take(c, ','));
    if (!take(c, '}'))
        return bad(c, "',' or '}'");
    if (seen != (DTYPE | SHAPE | OFFSETS))
        return rt_fail(c->err, RT_FORMAT, "%s: tensor '%s' lacks dtype, shape or data_offsets", c->path, t->name);
    if (!rt_st_bytes(t->dtype, t->ndim, t->ne, &t->bytes))
        return rt_fail(c->err, RT_FORMAT, "%s: tensor '%s': its dimensions multiply to more than 2^63 bytes", c->path, t->name);
    if (off[0] > off[1] || (uint64_t)off[1] > data_bytes || (uint64_t)(off[1] - off[0]) != t->bytes)
        return rt_fail(c->err, RT_FORMAT,
                       "%s: tensor '%s': its shape asks for %" PRIu64 " bytes, its data_offsets are [%" PRId64 ", %" PRId64
                       "], the file holds %" PRIu64 " bytes of data",
                       c->path, t->name, t->bytes, off[0], off[1], data_bytes);
    t->offset = (uint64_t)off[0];
    for (int i = t->ndim; i < RT_MAX_NDIM; i++)
        t->ne[i] = 1;
out:
    return st;
}

static enum rt_status metadata(struct cursor *c)
{
    if (!take(c, '{'))
        return bad(c, "'{' after __metadata__");
    if (take(c, '}'))
        return RT_OK;
    do {
        char *s;
        size_t n;
        enum rt_status st = string(c, &s, &n);
        if (st == RT_OK && !take(c, ':'))
            st = bad(c, "':'");
        if (st == RT_OK)
            st = string(c, &s, &n);
        if (st != RT_OK)
            return st;
    } while (take(c, ','));
    return take(c, '}') ? RT_OK : bad(c, "',' or '}'");
}

static int by_offset(const void *a, const void *b)
{
    const struct rt_tensor *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    if (x->bytes != y->bytes) /* an empty tensor sits before the one that starts where it does */
        return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* The data has to be covered from its first byte to its last, each byte once. */
static enum rt_status check_cover(const struct rt_st_list *l, uint64_t data_bytes, const char *path, struct rt_err *err)
{
    uint64_t end = 0;
    for (int64_t i = 0; i < l->n; i++) {
        const struct rt_tensor *t = &l->at[i];
        if (t->offset != end)
            return rt_fail(err, RT_FORMAT, "%s: tensor '%s' starts at byte %" PRIu64 " of the data, expected %" PRIu64 " (%s)", path,
                           t->name, t->offset, end, t->offset < end ? "it overlaps another" : "there is a hole before it");
        end += t->bytes;
    }
    if (end != data_bytes)
        return rt_fail(err, RT_FORMAT, "%s: the tensors end at byte %" PRIu64 " of the data, the file at %" PRIu64, path, end, data_bytes);
    return RT_OK;
}

static enum rt_status members(struct cursor *c, uint64_t data_bytes, struct rt_st_list *list, int64_t cap)
{
    bool have_metadata = false;
    do {
        char *name;
        size_t n;
        enum rt_status st = string(c, &name, &n);
        if (st != RT_OK)
            return st;
        if (!take(c, ':'))
            return bad(c, "':'");
        if (strcmp(name, "__metadata__") == 0) {
            if (have_metadata)
                return bad(c, "one __metadata__, not two");
            have_metadata = true;
            st = metadata(c);
        } else {
            if (n > RT_MAX_TENSOR_NAME)
                return rt_fail(c->err, RT_FORMAT, "%s: a tensor's name of %zu bytes begins '%.40s': expected at most %d bytes",
                               c->path, n, name, RT_MAX_TENSOR_NAME);
            if (list->n == cap)
                return bad(c, "fewer tensors");
            struct rt_tensor *t = &list->at[list->n];
            t->name = name;
            st = tensor(c, t, data_bytes);
            list->n++;
        }
        if (st != RT_OK)
            return st;
    } while (take(c, ','));
    return RT_OK;
}

enum rt_status rt_st_header_parse(char *text, size_t len, uint64_t data_bytes, const char *path, struct rt_st_list *out,
                                  struct rt_err *err)
{
    struct cursor c = {text, text, text + len, path, err};
    struct rt_st_list list = {0};
    enum rt_status st;
    /* The shortest tensor, "":{"dtype":"U8","shape":[],"data_offsets":[0,1]}, has one '{' and 50 characters. */
    int64_t cap = 0;
    for (size_t i = 0; i < len; i++)
        cap += text[i] == '{';
    cap = cap < (int64_t)(len / 48) + 1 ? cap : (int64_t)(len / 48) + 1;
    if (len == 0 || text[0] != '{')
        RT_FAIL(err, FORMAT, "%s: not a safetensors file: its header does not start with '{'", path);
    if (cap > RT_MAX_TENSORS)
        cap = RT_MAX_TENSORS;
    RT_TRY(rt_alloc((size_t)cap, sizeof *list.at, "the index of tensors", &list.at, err));
    c.at++;
    if (!take(&c, '}')) {
        RT_TRY(members(&c, data_bytes, &list, cap));
        if (!take(&c, '}')) {
            st = bad(&c, "',' or '}'");
            goto out;
        }
    }
    if (peek(&c) != '\0' || c.at != c.end) {
        st = bad(&c, "nothing but spaces after the last '}'");
        goto out;
    }
    qsort(list.at, (size_t)list.n, sizeof *list.at, by_offset);
    RT_TRY(check_cover(&list, data_bytes, path, err));
    *out = list;
    list.at = NULL;
out:
    rt_free(list.at);
    return st;
}
