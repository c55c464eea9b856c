#include "student/exchange.h"

enum rt_status rt_exchange_open(struct rt_exchange *x, const struct rt_device *d, const struct rt_param_shard *shard, bool overlap, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *x = (struct rt_exchange){.d = d, .shard = shard, .overlap = overlap};
    if (shard->comm == NULL)
        return RT_OK;
    RT_TRY(d->be->queue_create(d->dev, &x->q, err));
    RT_TRY(d->be->event_create(d->dev, &x->joined, err));
    for (int b = 0; b < shard->n_buckets; b++)
        RT_TRY(d->be->event_create(d->dev, &x->done[b], err));
out:
    if (st != RT_OK)
        rt_exchange_close(x);
    return st;
}

void rt_exchange_close(struct rt_exchange *x)
{
    if (x->d == NULL)
        return;
    const struct rt_backend *be = x->d->be;
    if (x->q != NULL)
        be->queue_free(x->d->dev, x->q);
    for (int b = 0; b < RT_PARAM_BUCKETS; b++)
        if (x->done[b] != NULL)
            be->event_free(x->d->dev, x->done[b]);
    if (x->joined != NULL)
        be->event_free(x->d->dev, x->joined);
    *x = (struct rt_exchange){0};
}

/* Bucket b of a block, and the queue that its exchange belongs on: behind its mark. */
static enum rt_status follow(struct rt_exchange *x, int b, struct rt_queue **q, struct rt_err *err)
{
    const struct rt_device *d = x->d;
    *q = x->overlap ? x->q : d->q;
    return x->overlap ? d->be->event_wait(d->dev, x->q, x->done[b], err) : RT_OK;
}

static char *at(const struct rt_exchange *x, void *block, int b, int64_t *n)
{
    *n = x->shard->start[b + 1] - x->shard->start[b];
    return (char *)block + (size_t)x->shard->start[b] * rt_device_act_size(x->d);
}

/* The device's queue goes on when the exchanges so far are done. */
static enum rt_status join(struct rt_exchange *x, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *d = x->d;
    if (!x->overlap)
        return RT_OK;
    RT_TRY(d->be->event_record(d->dev, x->q, x->joined, err));
    RT_TRY(d->be->event_wait(d->dev, d->q, x->joined, err));
out:
    return st;
}

void rt_exchange_begin(struct rt_exchange *x)
{
    x->begun = x->q != NULL;
    x->left = x->begun ? x->shard->n_buckets : 0;
}

enum rt_status rt_exchange_sum(struct rt_exchange *x, void *grads, int64_t from, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_queue *q;
    int64_t n;
    for (; x->left > 0 && x->shard->start[x->left - 1] >= from; x->left--) {
        const int b = x->left - 1;
        char *bucket = at(x, grads, b, &n);
        RT_TRY(rt_exchange_mark(x, b, err));
        RT_TRY(follow(x, b, &q, err));
        RT_TRY(x->d->be->reduce_scatter(x->d->dev, q, bucket, n, err));
    }
out:
    return st;
}

enum rt_status rt_exchange_sum_rest(struct rt_exchange *x, void *grads, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (x->q == NULL)
        return RT_OK;
    if (!x->begun)
        rt_exchange_begin(x);
    RT_TRY(rt_exchange_sum(x, grads, 0, err));
    x->begun = false;
    RT_TRY(join(x, err));
out:
    return st;
}

enum rt_status rt_exchange_mark(struct rt_exchange *x, int b, struct rt_err *err)
{
    return x->q != NULL && x->overlap ? x->d->be->event_record(x->d->dev, x->d->q, x->done[b], err) : RT_OK;
}

enum rt_status rt_exchange_gather(struct rt_exchange *x, void *block, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_queue *q;
    int64_t n;
    if (x->q == NULL)
        return RT_OK;
    for (int b = 0; b < x->shard->n_buckets; b++) {
        char *bucket = at(x, block, b, &n);
        RT_TRY(follow(x, b, &q, err));
        RT_TRY(x->d->be->all_gather(x->d->dev, q, bucket, n, err));
    }
    RT_TRY(join(x, err));
out:
    return st;
}
