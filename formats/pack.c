#include "formats/pack.h"

#include <msgpack.h>
#include <string.h>

static int append(void *self, const char *data, size_t n)
{
    struct rt_pack *p = self;
    if (p->st == RT_OK)
        p->st = rt_buf_append(p->out, data, n, p->err);
    return p->st == RT_OK ? 0 : -1;
}

/* A packer of msgpack-c is a pair of pointers: made for each object. Its error is p->st. */
#define WITH_PACKER(call) \
    do { \
        msgpack_packer pk; \
        msgpack_packer_init(&pk, p, append); \
        (void)(call); \
    } while (0)

void rt_pack_map(struct rt_pack *p, size_t n)
{
    WITH_PACKER(msgpack_pack_map(&pk, n));
}

void rt_pack_array(struct rt_pack *p, size_t n)
{
    WITH_PACKER(msgpack_pack_array(&pk, n));
}

void rt_pack_str(struct rt_pack *p, const char *s)
{
    const size_t n = strlen(s);
    WITH_PACKER(msgpack_pack_str(&pk, n) == 0 && msgpack_pack_str_body(&pk, s, n));
}

void rt_pack_bin(struct rt_pack *p, const void *data, size_t n)
{
    WITH_PACKER(msgpack_pack_bin(&pk, n) == 0 && n > 0 && msgpack_pack_bin_body(&pk, data, n));
}

void rt_pack_uint(struct rt_pack *p, uint64_t v)
{
    WITH_PACKER(msgpack_pack_uint64(&pk, v));
}

void rt_pack_int(struct rt_pack *p, int64_t v)
{
    WITH_PACKER(msgpack_pack_int64(&pk, v));
}

void rt_pack_u64(struct rt_pack *p, uint64_t v)
{
    WITH_PACKER(msgpack_pack_fix_uint64(&pk, v));
}

void rt_pack_f64(struct rt_pack *p, double v)
{
    WITH_PACKER(msgpack_pack_double(&pk, v));
}

void rt_pack_f32(struct rt_pack *p, float v)
{
    WITH_PACKER(msgpack_pack_float(&pk, v));
}

void rt_pack_bool(struct rt_pack *p, bool v)
{
    WITH_PACKER(v ? msgpack_pack_true(&pk) : msgpack_pack_false(&pk));
}

void rt_unpack_init(struct rt_unpack *u, const void *data, size_t n, const char *path, uint64_t base)
{
    u->at = u->start = data;
    u->end = u->start + n;
    u->base = base;
    u->path = path;
}

enum rt_status rt_unpack_fail(const struct rt_unpack *u, const char *what, struct rt_err *err)
{
    return rt_fail(err, RT_FORMAT, "%s: byte %llu: expected %s", u->path, (unsigned long long)(u->base + (uint64_t)(u->at - u->start)), what);
}

/* Big-endian number of n bytes; false past the end. */
static bool number(struct rt_unpack *u, size_t n, uint64_t *out)
{
    uint64_t v = 0;
    if ((size_t)(u->end - u->at) < n)
        return false;
    for (size_t i = 0; i < n; i++)
        v = v << 8 | u->at[i];
    u->at += n;
    *out = v;
    return true;
}

/* The count or length of an object whose small form is `fix` under `mask`, and whose larger ones have the tags first
 * (8 bits of count, 0: there is no such form), first16, first32. */
static bool length(struct rt_unpack *u, uint8_t fix, uint8_t mask, uint8_t tag8, uint8_t tag16, uint8_t tag32, uint64_t *out)
{
    if (u->at == u->end)
        return false;
    const uint8_t tag = *u->at;
    if (mask != 0 && (tag & mask) == fix) {
        *out = tag & (uint8_t)~mask;
        u->at++;
        return true;
    }
    const size_t width = tag == tag8 && tag8 != 0 ? 1 : tag == tag16 ? 2 : tag == tag32 ? 4 : 0;
    if (width == 0)
        return false;
    u->at++;
    return number(u, width, out);
}

enum rt_status rt_unpack_map(struct rt_unpack *u, size_t *n, struct rt_err *err)
{
    const uint8_t *const from = u->at;
    uint64_t v;
    if (length(u, 0x80, 0xf0, 0, 0xde, 0xdf, &v) && v <= (uint64_t)(u->end - u->at) / 2) {
        *n = (size_t)v;
        return RT_OK;
    }
    u->at = from;
    return rt_unpack_fail(u, "a map whose members are in the file", err);
}

enum rt_status rt_unpack_array(struct rt_unpack *u, size_t *n, struct rt_err *err)
{
    const uint8_t *const from = u->at;
    uint64_t v;
    if (length(u, 0x90, 0xf0, 0, 0xdc, 0xdd, &v) && v <= (uint64_t)(u->end - u->at)) {
        *n = (size_t)v;
        return RT_OK;
    }
    u->at = from;
    return rt_unpack_fail(u, "an array whose items are in the file", err);
}

static bool bytes(struct rt_unpack *u, bool text, const uint8_t **data, size_t *n)
{
    const uint8_t *const from = u->at;
    uint64_t v;
    const bool found = text ? length(u, 0xa0, 0xe0, 0xd9, 0xda, 0xdb, &v) : length(u, 0, 0, 0xc4, 0xc5, 0xc6, &v);
    if (!found || v > (uint64_t)(u->end - u->at)) {
        u->at = from;
        return false;
    }
    *data = u->at;
    *n = (size_t)v;
    u->at += v;
    return true;
}

enum rt_status rt_unpack_key(struct rt_unpack *u, const char *key, struct rt_err *err)
{
    const uint8_t *const from = u->at, *s;
    size_t n;
    if (bytes(u, true, &s, &n) && n == strlen(key) && memcmp(s, key, n) == 0)
        return RT_OK;
    u->at = from;
    char what[80];
    snprintf(what, sizeof what, "the key \"%.40s\"", key);
    return rt_unpack_fail(u, what, err);
}

enum rt_status rt_unpack_text(struct rt_unpack *u, char *out, size_t cap, struct rt_err *err)
{
    const uint8_t *const from = u->at, *s;
    size_t n;
    if (!bytes(u, true, &s, &n) || n >= cap || memchr(s, 0, n) != NULL) {
        char what[80];
        u->at = from;
        snprintf(what, sizeof what, "a string of fewer than %zu bytes", cap);
        return rt_unpack_fail(u, what, err);
    }
    memcpy(out, s, n);
    out[n] = '\0';
    return RT_OK;
}

enum rt_status rt_unpack_bin(struct rt_unpack *u, const uint8_t **data, size_t *n, struct rt_err *err)
{
    return bytes(u, false, data, n) ? RT_OK : rt_unpack_fail(u, "binary data that end inside the file", err);
}

enum rt_status rt_unpack_uint(struct rt_unpack *u, uint64_t max, uint64_t *out, struct rt_err *err)
{
    const uint8_t *const from = u->at;
    uint64_t v = 0;
    bool good = u->at < u->end;
    if (good && *u->at < 0x80) {
        v = *u->at++;
    } else if (good) {
        const uint8_t tag = *u->at++;
        good = tag >= 0xcc && tag <= 0xcf && number(u, (size_t)1 << (tag - 0xcc), &v);
    }
    if (!good || v > max) {
        char what[80];
        u->at = from;
        snprintf(what, sizeof what, "a whole number up to %llu", (unsigned long long)max);
        return rt_unpack_fail(u, what, err);
    }
    *out = v;
    return RT_OK;
}

enum rt_status rt_unpack_int(struct rt_unpack *u, int64_t min, int64_t max, int64_t *out, struct rt_err *err)
{
    const uint8_t *const from = u->at;
    uint64_t v = 0;
    bool good = u->at < u->end;
    int64_t x = 0;
    const uint8_t tag = good ? *u->at : 0;
    if (tag >= 0xe0) {
        x = (int8_t)tag;
        u->at++;
    } else if (tag >= 0xd0 && tag <= 0xd3) {
        u->at++;
        const unsigned bits = 8u << (tag - 0xd0);
        good = good && number(u, bits / 8, &v);
        x = (int64_t)(v << (64 - bits)) >> (64 - bits);
    } else {
        return rt_unpack_uint(u, max < 0 ? 0 : (uint64_t)max, (uint64_t *)out, err);
    }
    if (!good || x < min || x > max) {
        u->at = from;
        return rt_unpack_fail(u, "a whole number in its range", err);
    }
    *out = x;
    return RT_OK;
}

enum rt_status rt_unpack_double(struct rt_unpack *u, double *out, struct rt_err *err)
{
    const uint8_t *const from = u->at;
    const uint8_t tag = u->at < u->end ? *u->at++ : 0;
    uint64_t v;
    if (tag == 0xcb && number(u, 8, &v)) {
        memcpy(out, &v, 8);
        return RT_OK;
    }
    if (tag == 0xca && number(u, 4, &v)) {
        const uint32_t w = (uint32_t)v;
        float f;
        memcpy(&f, &w, 4);
        *out = (double)f;
        return RT_OK;
    }
    u->at = from;
    return rt_unpack_fail(u, "a real number", err);
}

enum rt_status rt_unpack_bool(struct rt_unpack *u, bool *out, struct rt_err *err)
{
    if (u->at == u->end || (*u->at != 0xc2 && *u->at != 0xc3))
        return rt_unpack_fail(u, "true or false", err);
    *out = *u->at++ == 0xc3;
    return RT_OK;
}
