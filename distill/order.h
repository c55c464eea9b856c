/* The order of training: a function of the seed and the sets alone.
 *
 * Epoch e takes from each set the sequences floor(e w n) .. floor((e+1) w n) of an endless stream that runs through the set's n
 * sequences again and again, each time in a new permutation (w: the set's weight, so 0.5 is half of it an epoch, 2 all of it
 * twice). What an epoch takes is shuffled together. A global batch is the next sequences until one more would exceed the token
 * budget; it may begin in one epoch and end in the next.
 */
#ifndef RT_DISTILL_ORDER_H
#define RT_DISTILL_ORDER_H

#include <stdbool.h>
#include <stdint.h>

#include "distill/source.h"

struct rt_order_item {
    int set;
    int64_t seq;
};

struct rt_order {
    struct rt_train_set *const *set; /* [n_sets], borrowed */
    const double *weight;            /* [n_sets], borrowed */
    int n_sets;
    uint64_t seed;
    int64_t epochs;  /* 0: no end */
    int64_t epoch;   /* that `item` holds */
    struct rt_order_item *item;
    int64_t n, at;   /* items of the epoch, the next one */
    int64_t cap;
    struct rt_order_item *batch; /* what rt_order_next hands out */
    int64_t batch_cap;
};

/* At the beginning. USAGE for weights that give no sequence. */
enum rt_status rt_order_open(struct rt_order *o, struct rt_train_set *const *set, const double *weight, int n_sets, uint64_t seed,
                             int64_t epochs, struct rt_err *err);
void rt_order_close(struct rt_order *o); /* zeroed is fine */
/* The next global batch: *items [n] valid until the next call, n 0 after the last epoch. A sequence longer than the budget is a batch
 * of its own. */
enum rt_status rt_order_next(struct rt_order *o, int64_t batch_tokens, const struct rt_order_item **items, int64_t *n, struct rt_err *err);
/* owner[i] = the rank of [0, size) that takes item i: the longest first, each to the rank with the fewest tokens (ties: the earlier item, the
 * lower rank). A function of the lengths alone. */
enum rt_status rt_order_share(const struct rt_order *o, const struct rt_order_item *items, int64_t n, int size, int *owner, struct rt_err *err);
/* Epochs behind what was handed out, as a fraction. */
double rt_order_epoch(const struct rt_order *o);

#endif
