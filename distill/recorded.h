/* Micro-steps as recorded work (rt_backend.graph_begin): what one enqueues, forward to backward, is a thousand launches and more, which cost the host more
 * time than a small student's arithmetic takes. A micro-batch of a shape that was met before is recorded, and one like it is enqueued by a single call.
 *
 * What a micro-step enqueues depends on the host through the key below and its sequences' lengths alone; ids, labels and the teacher's rows are read from
 * the slot's memory on the device. Only equal keys share a recording, so that the bytes are those of calls one by one. A shape's first micro-step is not
 * recorded: products are measured in it. Shapes that do not come again are never recorded: documents of all lengths, packed.
 */
#ifndef RT_DISTILL_RECORDED_H
#define RT_DISTILL_RECORDED_H

#include "distill/losses.h"

enum {
    RT_RECORDED = 10,       /* recordings kept, of 3 to 10 MB of launches each: the first micro-batch of a step, and for both slots the usual and the last one, twice */
    RT_RECORDED_MET = 16,   /* shapes remembered that came once */
    RT_RECORDED_SEQS = 256, /* sequences of a micro-batch that may be recorded: as many as the launch of a GPU's attention carries (core/cuda/attn.h) */
    RT_RECORDED_IDLE = 512, /* micro-steps without a use after which a recording makes room for another: making one takes as long as some ten of them gain */
};

struct rt_recorded_key {
    int32_t slot, n_seq;
    int64_t n, rows, items;
    double ce, kl, T;
    int32_t tail, teacher; /* teacher: there are rows that take KL */
    int64_t grads;         /* enum rt_losses_grads */
};
/* Of the micro-batch in the slot. Compared as bytes: made from zeroed memory, without padding. */
struct rt_recorded_key rt_recorded_key(const struct rt_losses *l, int slot, const struct rt_loss_weights *w, int64_t items,
                                       enum rt_losses_grads grads);

struct rt_recorded_shape {
    struct rt_recorded_key key;
    int32_t cu[RT_RECORDED_SEQS + 1];
    int64_t used;           /* 0: free; else when it was asked for last */
    struct rt_graph *graph; /* NULL: it cannot be recorded */
};

struct rt_recorded {
    const struct rt_device *d; /* NULL: nothing is recorded */
    int64_t clock, recordings, runs; /* shapes asked for; recordings made; micro-steps enqueued by one */
    struct rt_recorded_shape at[RT_RECORDED], met[RT_RECORDED_MET];
};

/* Does recording gain for micro-batches of `tokens`, where the backend can? True where the launches of a micro-step take more than a few hundredths of its
 * arithmetic. Of the model and tokens alone: what it says is part of a plan. */
bool rt_recorded_gains(const struct rt_student_config *c, const struct rt_params *p, int64_t tokens);
/* Device memory that recordings of such micro-steps take for temporaries and launches, at most. */
size_t rt_recorded_bytes(const struct rt_student_config *c, int64_t tokens, size_t act_size);

void rt_recorded_init(struct rt_recorded *r, const struct rt_device *d);
void rt_recorded_free(struct rt_recorded *r); /* waits for the device; zeroed is fine */

/* enqueue(self) enqueues the micro-step on the device's queue, and is called or replaced by what it enqueued under the same key. cu [n_seq + 1]. */
enum rt_status rt_recorded_run(struct rt_recorded *r, const struct rt_recorded_key *k, const int32_t *cu, enum rt_status (*enqueue)(void *self, struct rt_err *),
                               void *self, struct rt_err *err);

#endif
