/* Threads: one pool, created explicitly, owned by a backend's device context.
 *
 * Work is cut into items from shapes alone, never from the number of threads, and an item writes its own outputs; so results
 * are the same bytes whatever --threads. Items are claimed in ascending order by whichever thread is free.
 */
#ifndef RT_CORE_POOL_H
#define RT_CORE_POOL_H

#include <stdint.h>

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_pool;

/* threads >= 1 counts the calling thread; 0 means all cores that this process may run on. */
enum rt_status rt_pool_create(int threads, struct rt_pool **out, struct rt_err *err);
void rt_pool_free(struct rt_pool *p); /* NULL is fine */
int rt_pool_threads(const struct rt_pool *p);

/* fn(ctx, item, worker) for item in [0, n), then returns. worker in [0, threads) names a private scratch slot. A call from
 * inside an item runs serially in that item's worker. One caller at a time. */
void rt_pool_run(struct rt_pool *p, int64_t n, void (*fn)(void *ctx, int64_t item, int worker), void *ctx);

int rt_cpu_count(void);

#ifdef __cplusplus
}
#endif
#endif
