/* Header and index of a shard file. */
#ifndef RT_FORMATS_SHARD_FILE_H
#define RT_FORMATS_SHARD_FILE_H

#include "formats/pack.h"
#include "formats/shard.h"

enum { RT_SHARD_VERSION = 3, RT_SHARD_MAX_HEADER = 1 << 16, RT_SHARD_MAX_REPORT = 1 << 15 };

/* The version that a set is written as: the first one that has what it needs. 2: retargeted sets; 3: boundaries and spans. */
int rt_shard_version(const struct rt_row_identity *id);

struct rt_shard_header {
    int part, n_parts;
    int64_t first; /* ordinal of the first sequence within the part */
    struct rt_row_identity id;
    struct rt_buf report; /* JSON text, not empty only in retargeted sets. Whoever unpacks a header frees it */
};

enum rt_status rt_shard_header_pack(const struct rt_shard_header *h, struct rt_buf *out, struct rt_err *err);
/* bytes: how long the header was. UNSUPPORTED for another version. */
enum rt_status rt_shard_header_unpack(struct rt_unpack *u, struct rt_shard_header *h, uint64_t *bytes, struct rt_err *err);

/* at: offset of the index in its file. */
enum rt_status rt_shard_index_pack(uint64_t at, uint64_t header_bytes, uint32_t header_crc, const struct rt_seq_info *seq, int64_t n,
                                   int n_lse, struct rt_buf *out, struct rt_err *err);

struct rt_shard_contents {
    struct rt_shard_header header; /* report: rt_buf_free */
    struct rt_seq_info *seq; /* [n] rt_free; shard left 0 */
    int64_t n;
};
/* Reads and checks header and index of an open file: checksums, offsets that cover the file, counts that its bytes can hold. */
enum rt_status rt_shard_read(int fd, const char *path, uint64_t size, struct rt_shard_contents *out, struct rt_err *err);

#endif
