/* Memory, queues and events of backends whose device is the host (ref, cpu): calls are done when they return, so queues and events order
 * nothing. Contracts: core/backend.h. */
#ifndef RT_CORE_HOST_DEVICE_H
#define RT_CORE_HOST_DEVICE_H

#include "core/backend.h"

/* What struct rt_dev of such a backend begins with. */
struct rt_host_dev {
    struct rt_comm *comm; /* borrowed; NULL: one rank */
    enum rt_dtype act;
};
/* o NULL: no options. */
void rt_host_dev_init(struct rt_host_dev *dev, const struct rt_dev_options *o, enum rt_dtype act);

enum rt_status rt_host_alloc(struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err);
void rt_host_free(struct rt_dev *dev, void *p);
enum rt_status rt_host_staging(struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err);
void rt_host_staging_free(struct rt_dev *dev, void *p);
enum rt_status rt_host_queue_create(struct rt_dev *dev, struct rt_queue **out, struct rt_err *err);
void rt_host_queue_free(struct rt_dev *dev, struct rt_queue *q);
enum rt_status rt_host_queue_sync(struct rt_dev *dev, struct rt_queue *q, struct rt_err *err);
enum rt_status rt_host_event_create(struct rt_dev *dev, struct rt_event **out, struct rt_err *err);
void rt_host_event_free(struct rt_dev *dev, struct rt_event *e);
enum rt_status rt_host_event_nothing(struct rt_dev *dev, struct rt_queue *q, struct rt_event *e, struct rt_err *err);
enum rt_status rt_host_attach(struct rt_dev *dev, struct rt_err *err);
enum rt_status rt_host_event_elapsed(struct rt_dev *dev, struct rt_event *from, struct rt_event *to, double *seconds, struct rt_err *err);
enum rt_status rt_host_event_sync(struct rt_dev *dev, struct rt_event *e, struct rt_err *err);
enum rt_status rt_host_copy(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err);
enum rt_status rt_host_zero(struct rt_dev *dev, struct rt_queue *q, void *dst, size_t bytes, struct rt_err *err);
enum rt_status rt_host_all_reduce(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
enum rt_status rt_host_reduce_scatter(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
enum rt_status rt_host_all_gather(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
enum rt_status rt_host_broadcast(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, int root, struct rt_err *err);

/* Their entries in a table. */
#define RT_HOST_DEVICE_ENTRIES \
    .alloc = rt_host_alloc, .free = rt_host_free, .host_alloc = rt_host_staging, .host_free = rt_host_staging_free, .queue_create = rt_host_queue_create, .queue_free = rt_host_queue_free, \
    .queue_sync = rt_host_queue_sync, .event_create = rt_host_event_create, .event_free = rt_host_event_free, \
    .event_record = rt_host_event_nothing, .event_wait = rt_host_event_nothing, .event_sync = rt_host_event_sync, .event_elapsed = rt_host_event_elapsed, .attach = rt_host_attach, .upload = rt_host_copy, .download = rt_host_copy, \
    .copy = rt_host_copy, .zero = rt_host_zero, .all_reduce = rt_host_all_reduce, .reduce_scatter = rt_host_reduce_scatter, .all_gather = rt_host_all_gather, \
    .broadcast = rt_host_broadcast

#endif
