/* The manifest of a part: JSON lines, one a published shard, in order, and one that says that the part is complete.
 *
 *     {"file":..,"bytes":..,"sha256":..,"sequences":..,"tokens":..,"rows":..,"first":..,"last":..,"last_line":..,"crc":".."}
 *     {"end":true,"sequences":..,"rows":..,"crc":".."}
 *
 * crc: zlib crc32, 8 hexadecimal digits, of the line up to and without the comma before "crc". A last line without its
 * newline is a torn write and does not exist; anything else that is wrong is FORMAT.
 */
#ifndef RT_FORMATS_MANIFEST_H
#define RT_FORMATS_MANIFEST_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

enum { RT_MAX_PARTS = 9999, RT_NAME_CAP = 80 };

struct rt_manifest_line {
    char file[RT_NAME_CAP];
    char sha256[65];
    uint64_t bytes;
    int64_t sequences, tokens, rows;
    int64_t first, last; /* ordinals of sequences within the part */
    int64_t last_line;   /* source_line of the last sequence */
};
struct rt_manifest {
    int part, n_parts;
    struct rt_manifest_line *line; /* [n] rt_manifest_free */
    int64_t n;
    int64_t sequences, rows;
    uint64_t bytes;
    bool finished;
};

/* "manifest.jsonl", or "manifest-0002-of-0008.jsonl" for part 2 (0-based) of 8; "rows-000005.msgpack", or
 * "rows-0002-of-0008-000005.msgpack". */
void rt_manifest_name(int part, int n_parts, char out[RT_NAME_CAP]);
void rt_shard_name(int part, int n_parts, int64_t i, char out[RT_NAME_CAP]);

/* OK and empty where there is no such file. */
enum rt_status rt_manifest_read(const char *dir, int part, int n_parts, struct rt_manifest *out, struct rt_err *err);
void rt_manifest_free(struct rt_manifest *m);
/* Appends durably. */
enum rt_status rt_manifest_append(const char *dir, const struct rt_manifest *m, const struct rt_manifest_line *line, struct rt_err *err);
enum rt_status rt_manifest_end(const char *dir, const struct rt_manifest *m, int64_t sequences, int64_t rows, struct rt_err *err);

/* Which parts have a manifest in dir: n_parts of all (0: there is none), present[part]. REFUSED where manifests of
 * different numbers of parts lie side by side. */
enum rt_status rt_manifest_find(const char *dir, int *n_parts, bool present[RT_MAX_PARTS], struct rt_err *err);

#endif
