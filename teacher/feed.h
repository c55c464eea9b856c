/* A checkpoint's bytes on their way through host memory that devices copy from (pinned): read once for all devices of a machine.
 *
 * Members, one a device, ask for the chunks of a pass, by any number of threads. Whoever asks first reads; the others get the same bytes. A chunk lies in a
 * block until every member that is to ask for it has; one of a part that is kept, in memory of its own, pinned when its first bytes come. Blocks count for the member that read them:
 * one that runs ahead waits for those behind, never the other way round, because what it waits for lies before what they wait for.
 * A file is read past the page cache where it lets itself. Internal to the weights files.
 */
#ifndef RT_TEACHER_FEED_H
#define RT_TEACHER_FEED_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "teacher/part_table.h"
#include "teacher/weights.h"

enum {
    RT_FEED_CHUNK = 8 << 20, /* bytes of one read: large enough for a disk's full rate, small enough to spread a tensor over threads */
    RT_FEED_SLOTS = 2,       /* blocks of each thread: one is read while another is copied */
    RT_FEED_MEMBERS = 32,
};

/* A part of the checkpoint, and its pieces (piece 2 i is weight i, 2 i + 1 its scale) in the order of files and offsets. */
struct rt_entry {
    struct rt_part_id id;
    struct rt_part_plan plan;
    size_t extra;         /* what the backend takes beyond the bytes as stored */
    struct rt_part *kept; /* ready for use, on the device: never read again; or NULL */
    uint64_t stored, room; /* bytes of all pieces; and what they take in memory of their own */
    int8_t n_pieces, order[2 * RT_PART_WEIGHTS];
};
void rt_entry_order(struct rt_entry *e);
/* The tensor of a piece, and where it lies in the part's block. */
const struct rt_tensor *rt_entry_piece(const struct rt_entry *e, int piece, size_t *at);

struct rt_feed_chunk {
    int64_t entry;
    int no;            /* of the entry's chunks, from 0 in the order of pieces */
    int file;
    uint64_t offset, bytes;
};
struct rt_feed_ref {
    const char *data;
    bool read;                 /* by this call */
    struct rt_feed_block *block; /* NULL: memory that stays */
};

struct rt_feed;
/* entry [n] and ts are borrowed: of the first member, and used as long as passes run. One reference. */
enum rt_status rt_feed_create(const struct rt_device *d, const struct rt_tensors *ts, const struct rt_entry *entry, int64_t n, struct rt_feed **out,
                              struct rt_err *err);
/* Another reference; *member is its number. threads: that ask for it. USAGE beyond RT_FEED_MEMBERS. */
enum rt_status rt_feed_join(struct rt_feed *f, int threads, int *member, struct rt_err *err);
/* Drops a reference, by a thread that may use d; the last one frees all. */
void rt_feed_drop(struct rt_feed *f, const struct rt_device *d);
/* Bytes that a member of so many threads needs. */
uint64_t rt_feed_staging(int threads);
/* More memory for parts that are kept. */
void rt_feed_allow(struct rt_feed *f, uint64_t bytes);
/* Keeps the entry's bytes if there is room for them; nothing where they are kept already. */
void rt_feed_keep(struct rt_feed *f, int64_t entry);

/* A pass of the member is about to begin: what others read from now on waits for it. */
void rt_feed_expect(struct rt_feed *f, int member);
/* It begins at entry `first`. */
void rt_feed_begin(struct rt_feed *f, int member, int64_t first);
/* It is over, or will not begin; threads of the member that wait get INTERRUPTED. */
void rt_feed_end(struct rt_feed *f, int member);

/* The chunk's bytes, once for each member and pass. The device's context is the calling thread's. */
enum rt_status rt_feed_get(struct rt_feed *f, const struct rt_device *d, int member, const struct rt_feed_chunk *c, struct rt_feed_ref *out,
                           struct rt_err *err);
/* The bytes are not needed any more. */
void rt_feed_put(struct rt_feed *f, struct rt_feed_ref *r);

#endif
