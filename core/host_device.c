#include "core/host_device.h"

#include <stdlib.h>
#include <string.h>

#include "core/collective.h"
#include "core/mem.h"

#define UNUSED __attribute__((unused))

struct rt_queue {
    struct rt_dev *dev;
};
struct rt_event {
    struct rt_dev *dev;
};

enum rt_status rt_host_alloc(UNUSED struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err)
{
    return rt_alloc(bytes, 1, "device memory", out, err);
}

void rt_host_free(UNUSED struct rt_dev *dev, void *p)
{
    rt_free(p);
}

enum rt_status rt_host_staging(UNUSED struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err)
{
    void *p = NULL;
    if (posix_memalign(&p, 4096, bytes > 0 ? bytes : 1) != 0)
        return rt_fail(err, RT_NOMEM, "cannot take %zu bytes of host memory for transfers", bytes);
    *out = p;
    return RT_OK;
}

void rt_host_staging_free(UNUSED struct rt_dev *dev, void *p)
{
    free(p);
}

enum rt_status rt_host_queue_create(struct rt_dev *dev, struct rt_queue **out, struct rt_err *err)
{
    const enum rt_status st = rt_alloc(1, sizeof **out, "a queue", out, err);
    if (st == RT_OK)
        (*out)->dev = dev;
    return st;
}

void rt_host_queue_free(UNUSED struct rt_dev *dev, struct rt_queue *q)
{
    rt_free(q);
}

enum rt_status rt_host_queue_sync(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, UNUSED struct rt_err *err)
{
    return RT_OK;
}

enum rt_status rt_host_event_create(struct rt_dev *dev, struct rt_event **out, struct rt_err *err)
{
    const enum rt_status st = rt_alloc(1, sizeof **out, "an event", out, err);
    if (st == RT_OK)
        (*out)->dev = dev;
    return st;
}

void rt_host_event_free(UNUSED struct rt_dev *dev, struct rt_event *e)
{
    rt_free(e);
}

enum rt_status rt_host_event_nothing(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, UNUSED struct rt_event *e, UNUSED struct rt_err *err)
{
    return RT_OK;
}

enum rt_status rt_host_attach(UNUSED struct rt_dev *dev, UNUSED struct rt_err *err)
{
    return RT_OK;
}

enum rt_status rt_host_event_elapsed(UNUSED struct rt_dev *dev, UNUSED struct rt_event *from, UNUSED struct rt_event *to, double *seconds,
                                     UNUSED struct rt_err *err)
{
    *seconds = 0;
    return RT_OK;
}

enum rt_status rt_host_event_sync(UNUSED struct rt_dev *dev, UNUSED struct rt_event *e, UNUSED struct rt_err *err)
{
    return RT_OK;
}

enum rt_status rt_host_copy(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, void *dst, const void *src, size_t bytes,
                            UNUSED struct rt_err *err)
{
    if (bytes > 0)
        memmove(dst, src, bytes);
    return RT_OK;
}

enum rt_status rt_host_zero(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, void *dst, size_t bytes, UNUSED struct rt_err *err)
{
    if (bytes > 0)
        memset(dst, 0, bytes);
    return RT_OK;
}

/* ---- collectives ---- */

void rt_host_dev_init(struct rt_host_dev *dev, const struct rt_dev_options *o, enum rt_dtype act)
{
    *dev = (struct rt_host_dev){.comm = o != NULL ? o->comm : NULL, .act = act};
}

static const struct rt_host_dev *host(const struct rt_dev *dev)
{
    return (const struct rt_host_dev *)(const void *)dev;
}

enum rt_status rt_host_all_reduce(struct rt_dev *dev, UNUSED struct rt_queue *q, void *x, int64_t n, struct rt_err *err)
{
    return rt_comm_all_reduce(host(dev)->comm, x, n, host(dev)->act, err);
}

enum rt_status rt_host_reduce_scatter(struct rt_dev *dev, UNUSED struct rt_queue *q, void *x, int64_t n, struct rt_err *err)
{
    return rt_comm_reduce_scatter(host(dev)->comm, x, n, host(dev)->act, err);
}

enum rt_status rt_host_all_gather(struct rt_dev *dev, UNUSED struct rt_queue *q, void *x, int64_t n, struct rt_err *err)
{
    return rt_comm_all_gather(host(dev)->comm, x, n, host(dev)->act, err);
}

enum rt_status rt_host_broadcast(struct rt_dev *dev, UNUSED struct rt_queue *q, void *x, int64_t n, int root, struct rt_err *err)
{
    return rt_comm_broadcast(host(dev)->comm, x, (size_t)n * rt_dtype_size(host(dev)->act), root, err);
}
