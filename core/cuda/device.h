/* Entries of the table that core/cuda/device.c holds. Contracts: core/backend.h. */
#ifndef RT_CORE_CUDA_DEVICE_H
#define RT_CORE_CUDA_DEVICE_H

#include "core/backend.h"

int rt_cuda_count(void);
bool rt_cuda_available(char *why, int cap);
enum rt_status rt_cuda_open(const struct rt_dev_options *o, struct rt_dev **out, struct rt_err *err);
void rt_cuda_close(struct rt_dev *dev);
const char *rt_cuda_describe(const struct rt_dev *dev);
enum rt_status rt_cuda_alloc(struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err);
void rt_cuda_free(struct rt_dev *dev, void *p);
enum rt_status rt_cuda_host_alloc(struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err);
void rt_cuda_host_free(struct rt_dev *dev, void *p);
enum rt_status rt_cuda_memory(struct rt_dev *dev, struct rt_dev_memory *out, struct rt_err *err);
void rt_cuda_set_scratch(struct rt_dev *dev, uint64_t bytes);
enum rt_status rt_cuda_tune(struct rt_dev *dev, const char *path, char *note, int cap, struct rt_err *err); /* lt.c */
enum rt_status rt_cuda_queue_create(struct rt_dev *dev, struct rt_queue **out, struct rt_err *err);
void rt_cuda_queue_free(struct rt_dev *dev, struct rt_queue *q);
enum rt_status rt_cuda_queue_sync(struct rt_dev *dev, struct rt_queue *q, struct rt_err *err);
enum rt_status rt_cuda_event_create(struct rt_dev *dev, struct rt_event **out, struct rt_err *err);
void rt_cuda_event_free(struct rt_dev *dev, struct rt_event *e);
enum rt_status rt_cuda_event_record(struct rt_dev *dev, struct rt_queue *q, struct rt_event *e, struct rt_err *err);
enum rt_status rt_cuda_event_wait(struct rt_dev *dev, struct rt_queue *q, struct rt_event *e, struct rt_err *err);
enum rt_status rt_cuda_attach(struct rt_dev *dev, struct rt_err *err);
enum rt_status rt_cuda_event_elapsed(struct rt_dev *dev, struct rt_event *from, struct rt_event *to, double *seconds, struct rt_err *err);
enum rt_status rt_cuda_event_sync(struct rt_dev *dev, struct rt_event *e, struct rt_err *err);
enum rt_status rt_cuda_upload(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err);
enum rt_status rt_cuda_download(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err);
enum rt_status rt_cuda_copy(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err);
enum rt_status rt_cuda_zero(struct rt_dev *dev, struct rt_queue *q, void *dst, size_t bytes, struct rt_err *err);
enum rt_status rt_cuda_graph_begin(struct rt_dev *dev, struct rt_queue *q, struct rt_err *err);
enum rt_status rt_cuda_graph_end(struct rt_dev *dev, struct rt_queue *q, struct rt_graph **out, struct rt_err *err);
enum rt_status rt_cuda_graph_run(struct rt_dev *dev, struct rt_queue *q, struct rt_graph *g, struct rt_err *err);
void rt_cuda_graph_free(struct rt_dev *dev, struct rt_graph *g);
enum rt_status rt_cuda_all_reduce(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
enum rt_status rt_cuda_reduce_scatter(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
enum rt_status rt_cuda_all_gather(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
enum rt_status rt_cuda_broadcast(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, int root, struct rt_err *err);

#endif
