/* Global batches of an order, decoded and packed before they are asked for.
 *
 * Threads read sequences ahead in the order of training, each with files of its own, and pack each one alone; the caller's thread only
 * copies packed sequences behind each other. What the loader hands out is a function of the order alone: with any number of threads, and with
 * none (sequences are then decoded when they are asked for), micro-batches hold the same bytes, and an error comes with the same batch.
 *
 * Of several ranks each decodes its own share of a batch (rt_order_share) and knows the others' by their lengths.
 *
 * What is packed ahead stays within `bytes`. Where a batch does not fit, its targets are counted first (each sequence is decoded for it and let
 * go), because a step needs their number before its first micro-batch.
 */
#ifndef RT_DISTILL_LOADER_H
#define RT_DISTILL_LOADER_H

#include "distill/micro.h"

struct rt_loader_options {
    struct rt_train_set *const *set; /* [n_sets], borrowed, as the next */
    const double *weight;
    int n_sets;
    uint64_t seed;
    int64_t epochs, batch_tokens;
    struct rt_micro_options micro;   /* of the micro-batches to be filled; tokens is not used */
    int threads;                     /* 0: none; a source in memory takes none either */
    size_t bytes;                    /* of packed sequences held; one is held whatever it takes */
    int rank, size;                  /* size 0 is 1 */
};

struct rt_loader_batch {
    const struct rt_order_item *items; /* [n] of the global batch, valid until the next one; n 0: the order is at its end */
    int64_t n, tokens;
    int64_t own, targets;              /* sequences of this rank's share and their targets */
    double epoch;                      /* rt_order_epoch behind it */
};

struct rt_loader;
enum rt_status rt_loader_open(const struct rt_loader_options *o, struct rt_loader **out, struct rt_err *err);
void rt_loader_free(struct rt_loader *l); /* NULL is fine */
/* Leaves out the next n batches; before the first rt_loader_next. *taken may be less at the end of the order. */
enum rt_status rt_loader_skip(struct rt_loader *l, int64_t n, int64_t *taken, struct rt_err *err);
/* The next global batch. Errors: what decoding this rank's share met, in its order. */
enum rt_status rt_loader_next(struct rt_loader *l, struct rt_loader_batch *b, struct rt_err *err);
/* Clears p and fills it with the next sequences of the batch's share, from number *at of them on; *at is moved behind them. Begin with *at 0,
 * as often as the batch is needed. */
enum rt_status rt_loader_pack(struct rt_loader *l, struct rt_micro *p, int64_t *at, struct rt_err *err);
/* Seconds that the caller waited for sequences so far. */
double rt_loader_waited(const struct rt_loader *l);
/* Bytes that `bytes` should be for two batches of batch_tokens to be held. */
size_t rt_loader_bytes(const struct rt_micro_options *o, int64_t batch_tokens);

#endif
