/* The parts of one pass on their way from the checkpoint to where they are used. Internal to the weights files.
 *
 * Threads take chunks of the pass's bytes in order. Where the device's memory is the host's, a chunk is read to its place. Elsewhere it is
 * read into a pinned slot of the thread and copied from there; the copies run on a queue of their own, beside the products. Places are
 * cut from one ring in the order of the pass; the space of a released part is taken again at once, the copy queue waiting on the
 * device until the work that used it is done.
 */
#ifndef RT_TEACHER_WEIGHTS_STREAM_H
#define RT_TEACHER_WEIGHTS_STREAM_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "teacher/part_table.h"
#include "teacher/weights.h"

/* A part of the checkpoint and where it is kept between passes. */
struct rt_entry {
    struct rt_part_id id;
    struct rt_part_plan plan;
    size_t extra;         /* what the backend takes beyond the bytes as stored */
    struct rt_part *kept; /* ready for use, on the device: never read again; or NULL */
    void *host;           /* own_memory: its bytes in pinned host memory, complete when host_full; or NULL */
    bool host_full;
};

enum rt_item_state { RT_ITEM_WAITING, RT_ITEM_READ, RT_ITEM_DONE };

/* One step of a pass. */
struct rt_item {
    struct rt_entry *e;
    struct rt_part *part;          /* being filled or in use; NULL for a kept one */
    uint64_t v0, v1;               /* its space on the ring's endless line; equal: not in the ring */
    struct rt_event *copied, *used, *stall0, *stall1; /* own_memory */
    enum rt_item_state state;
    bool placed;
    int8_t piece, n_pieces;        /* the next piece (a tensor or its scale), in file order */
    int8_t order[2 * RT_PART_WEIGHTS];
    uint64_t piece_at, left;       /* bytes of the piece handed out; bytes not arrived */
};

struct rt_stream {
    const struct rt_device *d;
    const struct rt_tensors *ts;
    bool own;                      /* the device has memory of its own */
    int threads;
    struct rt_queue *copies;       /* own */
    char *ring;
    size_t ring_size;
    uint64_t head, tail;           /* endless line: taken up to head, free below tail */

    struct rt_item *item;
    int64_t n_items, released, reading, fenced; /* fenced: the copy queue waits for the use of the items before it */
    struct rt_event **spare;       /* events to use again */
    int64_t n_spare, spare_cap;
    uint64_t read_bytes;
    pthread_t thread[RT_WEIGHTS_MAX_THREADS];
    int running;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool cancel;
    struct rt_err err;             /* of a thread */
    int *direct;                   /* [files] descriptors opened with O_DIRECT, -1: none; own only */
};

enum rt_status rt_stream_init(struct rt_stream *s, const struct rt_device *d, const struct rt_tensors *ts, int threads, struct rt_err *err);
void rt_stream_free(struct rt_stream *s); /* a zeroed one is fine */
/* Pinned bytes that the threads take (own), else 0. */
uint64_t rt_stream_staging(const struct rt_stream *s);
/* Starts the threads on items [n] whose state is WAITING; item is borrowed until rt_stream_end. */
enum rt_status rt_stream_begin(struct rt_stream *s, struct rt_item *item, int64_t n, struct rt_err *err);
/* Waits until item i is READ, or for the error of a thread; the device's queue then waits for its copy. */
enum rt_status rt_stream_wait(struct rt_stream *s, struct rt_item *it, struct rt_err *err);
/* The work enqueued so far is the last to use the item. */
enum rt_status rt_stream_release(struct rt_stream *s, struct rt_item *it, struct rt_err *err);
/* Stops the threads. own: waits for the device and adds the seconds for which its queue waited for copies to *stalled. */
void rt_stream_end(struct rt_stream *s, double *stalled);

#endif
