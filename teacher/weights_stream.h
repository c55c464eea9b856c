/* The parts of one pass on their way from the checkpoint to where they are used. Internal to the weights files.
 *
 * Threads take chunks of the pass's bytes in order. Where the device's memory is the host's, a chunk is read to its place. Elsewhere it is
 * taken from the reader (teacher/feed.h), which several devices share, and copied from its memory; the copies run on a queue of their own, beside the products. Places are
 * cut from one ring in the order of the pass; the space of a released part is taken again at once, the copy queue waiting on the
 * device until the work that used it is done.
 */
#ifndef RT_TEACHER_WEIGHTS_STREAM_H
#define RT_TEACHER_WEIGHTS_STREAM_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "teacher/feed.h"
#include "teacher/part_table.h"
#include "teacher/weights.h"

enum rt_item_state { RT_ITEM_WAITING, RT_ITEM_READ, RT_ITEM_DONE };

/* One step of a pass. */
struct rt_item {
    struct rt_entry *e;
    struct rt_part *part;          /* being filled or in use; NULL for a kept one */
    uint64_t v0, v1;               /* its space on the ring's endless line; equal: not in the ring */
    struct rt_event *copied, *used, *stall0, *stall1; /* own_memory */
    enum rt_item_state state;
    bool placed;
    int piece, chunk;              /* the next piece (a tensor or its scale), in file order; chunks handed out */
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
    double begun, last_read, read_seconds; /* when the pass began, when it last had bytes of a file; seconds of passes that read, as far as they read */
    pthread_t thread[RT_WEIGHTS_MAX_THREADS];
    int running;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool cancel;
    struct rt_err err;             /* of a thread */
    struct rt_feed *feed;          /* own: where bytes come from, */
    const struct rt_entry *entry;  /* whose entry 0 this is */
    int member;
};

/* entry [n]: of the checkpoint, borrowed. with: NULL, or a stream of the same checkpoint to another device, whose reader it shares (own). */
enum rt_status rt_stream_init(struct rt_stream *s, const struct rt_device *d, const struct rt_tensors *ts, const struct rt_entry *entry, int64_t n,
                              int threads, const struct rt_stream *with, struct rt_err *err);
void rt_stream_free(struct rt_stream *s); /* a zeroed one is fine */
/* Pinned bytes that this stream's threads need (own), else 0. */
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
