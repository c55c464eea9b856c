#include "distill/order.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"

enum { STREAM_SET = 1 << 20, STREAM_EPOCH = 1 << 21 };

/* Sequences of the endless stream of set s before epoch e. */
static int64_t stream_at(const struct rt_order *o, int s, int64_t e)
{
    return (int64_t)floor((double)e * o->weight[s] * (double)rt_train_set_info(o->set[s])->sequences + 1e-9);
}

/* Items first .. end of the stream of set s, appended. */
static enum rt_status append(struct rt_order *o, int s, int64_t first, int64_t end, struct rt_err *err)
{
    enum rt_status st;
    int64_t *perm = NULL;
    const int64_t n = rt_train_set_info(o->set[s])->sequences;
    int64_t cycle = -1;
    RT_TRY(rt_alloc((size_t)n, sizeof *perm, "order of the training data", &perm, err));
    for (int64_t v = first; v < end; v++) {
        if (v / n != cycle) {
            cycle = v / n;
            rt_rng_permutation(o->seed, ((uint64_t)(STREAM_SET + s) << 32) + (uint64_t)cycle, n, perm);
        }
        o->item[o->n++] = (struct rt_order_item){s, perm[v % n]};
    }
out:
    rt_free(perm);
    return st;
}

static enum rt_status load_epoch(struct rt_order *o, int64_t epoch, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int64_t *perm = NULL, n = 0;
    struct rt_order_item *shuffled = NULL;
    for (int s = 0; s < o->n_sets; s++)
        n += stream_at(o, s, epoch + 1) - stream_at(o, s, epoch);
    if (n > o->cap) {
        rt_free(o->item);
        o->item = NULL;
        o->cap = 0;
        RT_TRY(rt_alloc((size_t)n, sizeof *o->item, "order of the training data", &o->item, err));
        o->cap = n;
    }
    o->n = o->at = 0;
    o->epoch = epoch;
    for (int s = 0; s < o->n_sets; s++)
        RT_TRY(append(o, s, stream_at(o, s, epoch), stream_at(o, s, epoch + 1), err));
    RT_TRY(rt_alloc((size_t)n, sizeof *perm, "order of the training data", &perm, err));
    RT_TRY(rt_alloc((size_t)n, sizeof *shuffled, "order of the training data", &shuffled, err));
    rt_rng_permutation(o->seed, ((uint64_t)STREAM_EPOCH << 32) + (uint64_t)epoch, n, perm);
    for (int64_t i = 0; i < n; i++)
        shuffled[i] = o->item[perm[i]];
    if (n > 0)
        memcpy(o->item, shuffled, (size_t)n * sizeof *shuffled);
out:
    rt_free(perm);
    rt_free(shuffled);
    return st;
}

enum rt_status rt_order_open(struct rt_order *o, struct rt_train_set *const *set, const double *weight, int n_sets, uint64_t seed,
                             int64_t epochs, struct rt_err *err)
{
    double each = 0;
    *o = (struct rt_order){.set = set, .weight = weight, .n_sets = n_sets, .seed = seed, .epochs = epochs};
    for (int s = 0; s < n_sets; s++) {
        if (!(weight[s] >= 0 && weight[s] <= 1e6))
            return rt_fail(err, RT_USAGE, "%s: weight %g, expected 0 to 1e6", rt_train_set_info(set[s])->path, weight[s]);
        each += weight[s] * (double)rt_train_set_info(set[s])->sequences;
    }
    /* below one sequence an epoch, whole epochs are empty */
    if (each < 1)
        return rt_fail(err, RT_USAGE, "--data: the weights leave %g sequences an epoch, expected 1 or more", each);
    return load_epoch(o, 0, err);
}

void rt_order_close(struct rt_order *o)
{
    rt_free(o->item);
    rt_free(o->batch);
    *o = (struct rt_order){0};
}

/* The next item, NULL after the last epoch. */
static enum rt_status peek(struct rt_order *o, const struct rt_order_item **item, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *item = NULL;
    while (o->at == o->n) {
        if (o->epochs > 0 && o->epoch + 1 >= o->epochs)
            return RT_OK;
        RT_TRY(load_epoch(o, o->epoch + 1, err));
    }
    *item = &o->item[o->at];
out:
    return st;
}

enum rt_status rt_order_next(struct rt_order *o, int64_t batch_tokens, const struct rt_order_item **items, int64_t *n, struct rt_err *err)
{
    enum rt_status st;
    int64_t tokens = 0;
    const struct rt_order_item *it;
    *n = 0;
    for (;;) {
        RT_TRY(peek(o, &it, err));
        if (it == NULL)
            break;
        const int64_t len = rt_train_set_length(o->set[it->set], it->seq);
        if (*n > 0 && tokens + len > batch_tokens)
            break;
        if (*n == o->batch_cap) {
            struct rt_order_item *bigger;
            const int64_t cap = o->batch_cap > 0 ? 2 * o->batch_cap : 64;
            RT_TRY(rt_alloc((size_t)cap, sizeof *bigger, "a batch", &bigger, err));
            if (o->batch != NULL)
                memcpy(bigger, o->batch, (size_t)*n * sizeof *bigger);
            rt_free(o->batch);
            o->batch = bigger;
            o->batch_cap = cap;
        }
        o->batch[(*n)++] = *it;
        tokens += len;
        o->at++;
    }
    *items = o->batch;
out:
    return st;
}

struct ranked {
    int64_t length, at;
};

static int longest_first(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    return x->length != y->length ? (x->length < y->length) - (x->length > y->length) : (x->at > y->at) - (x->at < y->at);
}

enum rt_status rt_order_share(const struct rt_order *o, const struct rt_order_item *items, int64_t n, int size, int *owner, struct rt_err *err)
{
    enum rt_status st;
    struct ranked *sorted = NULL;
    int64_t *tokens = NULL;
    RT_TRY(rt_alloc((size_t)n, sizeof *sorted, "shares of a batch", &sorted, err));
    RT_TRY(rt_alloc((size_t)size, sizeof *tokens, "shares of a batch", &tokens, err));
    for (int64_t i = 0; i < n; i++)
        sorted[i] = (struct ranked){rt_train_set_length(o->set[items[i].set], items[i].seq), i};
    qsort(sorted, (size_t)n, sizeof *sorted, longest_first);
    for (int64_t i = 0; i < n; i++) {
        int least = 0;
        for (int r = 1; r < size; r++)
            least = tokens[r] < tokens[least] ? r : least;
        owner[sorted[i].at] = least;
        tokens[least] += sorted[i].length;
    }
out:
    rt_free(sorted);
    rt_free(tokens);
    return st;
}

double rt_order_epoch(const struct rt_order *o)
{
    return (double)o->epoch + (o->n > 0 ? (double)o->at / (double)o->n : 0);
}
