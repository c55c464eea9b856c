/* MessagePack: writing through msgpack-c into a growing buffer, reading by a cursor over bytes in memory.
 *
 * The cursor is told what has to come next and builds nothing, so a hostile file can neither nest nor allocate: a string
 * or binary is a pointer into the bytes, and a count is never larger than the bytes that follow.
 */
#ifndef RT_FORMATS_PACK_H
#define RT_FORMATS_PACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

struct rt_pack {
    struct rt_buf *out;
    enum rt_status st; /* of the first failed append */
    struct rt_err *err;
};
void rt_pack_map(struct rt_pack *p, size_t n);
void rt_pack_array(struct rt_pack *p, size_t n);
void rt_pack_str(struct rt_pack *p, const char *s);
void rt_pack_bin(struct rt_pack *p, const void *data, size_t n);
void rt_pack_uint(struct rt_pack *p, uint64_t v);
void rt_pack_int(struct rt_pack *p, int64_t v);
void rt_pack_u64(struct rt_pack *p, uint64_t v); /* always 9 bytes */
void rt_pack_f64(struct rt_pack *p, double v);
void rt_pack_f32(struct rt_pack *p, float v);
void rt_pack_bool(struct rt_pack *p, bool v);

struct rt_unpack {
    const uint8_t *at, *end;
    const uint8_t *start;
    uint64_t base;    /* offset of start in the file, for messages */
    const char *path; /* for messages */
};
void rt_unpack_init(struct rt_unpack *u, const void *data, size_t n, const char *path, uint64_t base);
enum rt_status rt_unpack_map(struct rt_unpack *u, size_t *n, struct rt_err *err);
enum rt_status rt_unpack_array(struct rt_unpack *u, size_t *n, struct rt_err *err);
/* A string equal to key. */
enum rt_status rt_unpack_key(struct rt_unpack *u, const char *key, struct rt_err *err);
/* A string shorter than cap, copied and terminated; no 0 inside. */
enum rt_status rt_unpack_text(struct rt_unpack *u, char *out, size_t cap, struct rt_err *err);
enum rt_status rt_unpack_bin(struct rt_unpack *u, const uint8_t **data, size_t *n, struct rt_err *err);
enum rt_status rt_unpack_uint(struct rt_unpack *u, uint64_t max, uint64_t *out, struct rt_err *err);
enum rt_status rt_unpack_int(struct rt_unpack *u, int64_t min, int64_t max, int64_t *out, struct rt_err *err);
enum rt_status rt_unpack_double(struct rt_unpack *u, double *out, struct rt_err *err);
enum rt_status rt_unpack_bool(struct rt_unpack *u, bool *out, struct rt_err *err);
/* "PATH: byte N: expected WHAT" */
enum rt_status rt_unpack_fail(const struct rt_unpack *u, const char *what, struct rt_err *err);

#endif
