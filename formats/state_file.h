/* Files of work under way: a header of JSON and a stream of bytes, every bit under a checksum; there whole, or not at all.
 *
 *     "RTSTATE1" | u32 n | u32 crc32 of the n bytes | n bytes of JSON | block 0 | block 1 | ..
 *     block i: RT_STATE_BLOCK bytes (the last one: what is left) | u32 crc32 of these bytes, continued from i as its start
 *
 * The header's members "kind", "version" and "bytes" (length of the stream) are the file's own: the size of the file follows from
 * them and is checked before anything is taken from it. crc32 is zlib's. A block that stands at another's place is found, because
 * its number is its checksum's start.
 */
#ifndef RT_FORMATS_STATE_FILE_H
#define RT_FORMATS_STATE_FILE_H

#include <stdint.h>

#include "core/status.h"
#include "formats/json.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_STATE_BLOCK = 1 << 18, RT_STATE_MAX_HEADER = 1 << 20, RT_STATE_VERSION = 1 };

/* Writes path: header is an object of the caller's members (copied); exactly `bytes` bytes follow with put, in pieces of any size. */
struct rt_state_writer;
enum rt_status rt_state_create(const char *path, const char *kind, const struct rt_json *header, uint64_t bytes, struct rt_state_writer **out,
                               struct rt_err *err);
enum rt_status rt_state_put(struct rt_state_writer *w, const void *data, uint64_t n, struct rt_err *err);
/* Syncs and publishes. USAGE where bytes are missing. */
enum rt_status rt_state_commit(struct rt_state_writer *w, struct rt_err *err);
void rt_state_writer_free(struct rt_state_writer *w); /* NULL is fine; what was not committed is removed */

/* Opens path: FORMAT where header or size are wrong, or the kind is another; IO where it cannot be opened. */
struct rt_state_reader;
enum rt_status rt_state_open(const char *path, const char *kind, struct rt_state_reader **out, struct rt_err *err);
const struct rt_json *rt_state_header(const struct rt_state_reader *r);
uint64_t rt_state_bytes(const struct rt_state_reader *r);
/* The next n bytes of the stream, whose blocks are checked before a byte of them is handed out. dst NULL: only checked. FORMAT where a
 * block is damaged (names file and offset) or the stream ends before. */
enum rt_status rt_state_read(struct rt_state_reader *r, void *dst, uint64_t n, struct rt_err *err);
void rt_state_reader_free(struct rt_state_reader *r); /* NULL is fine */

#ifdef __cplusplus
}
#endif
#endif
