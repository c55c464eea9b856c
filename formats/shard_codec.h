/* One column of a block: an array of elements, split into byte planes where they are wide, differences taken where
 * neighbours are near, then zlib. On disk: [width, stride, raw bytes, crc32 of the compressed bytes, compressed bytes].
 *
 *   stride > 0: elements are u32; within each run of `stride` of them, all but the first are replaced by the difference to
 *               their predecessor, modulo 2^32
 *   width > 1:  plane b holds byte b of every element, planes follow each other from the lowest byte
 */
#ifndef RT_FORMATS_SHARD_CODEC_H
#define RT_FORMATS_SHARD_CODEC_H

#include <stdint.h>
#include <zlib.h>

#include "core/mem.h"
#include "formats/pack.h"

enum { RT_BLOCK_RAW = 16 << 20 }; /* most raw bytes of a block */
enum { RT_ZLIB_RATIO = 1040 };    /* deflate expands at most 1032 : 1, zlib's frame not counted */

struct rt_codec {
    z_stream deflate, inflate;
    bool deflating, inflating;
    struct rt_buf planes, packed;
};
void rt_codec_free(struct rt_codec *c); /* a zeroed struct is ready for use */

/* Appends a column of n elements of `width` (1, 2, 4) bytes. text: strings of them come again, which is then looked for. */
enum rt_status rt_codec_pack(struct rt_codec *c, int level, const void *data, size_t n, int width, size_t stride, bool text,
                             struct rt_pack *out, struct rt_err *err);

struct rt_column {
    size_t width, stride, raw, size;
    uint32_t crc;
    const uint8_t *data; /* [size] compressed, inside the unpacked bytes */
};
/* Reads a column's frame: raw is a multiple of width, at most RT_BLOCK_RAW and what `size` bytes can expand to. */
enum rt_status rt_column_read(struct rt_unpack *u, struct rt_column *out, struct rt_err *err);
/* dst [raw] = the column decoded; crc checked first. `where` is for messages. */
enum rt_status rt_codec_unpack(struct rt_codec *c, const struct rt_column *col, void *dst, const char *where, struct rt_err *err);

#endif
