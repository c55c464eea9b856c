/* What ranks that share a block exchange during a step: gradients are summed and parameters gathered bucket by bucket, on a queue of their own, beside what
 * the device computes (student/params.h says what a bucket is). Where a queue orders nothing (host devices) each call does its work at once. The bits do
 * not depend on what runs beside what.
 *
 * A step is
 *   rt_exchange_begin;  rt_exchange_sum as often as gradients become complete;  rt_exchange_sum_rest;  then, on the device's queue, whatever reads the sums;
 *   for each bucket, ascending: the update of this rank's part, rt_exchange_mark;  rt_exchange_gather;  and the next forward on the device's queue.
 * Every rank makes the same exchanges in the same order: from the last bucket down, then from the first one up.
 */
#ifndef RT_STUDENT_EXCHANGE_H
#define RT_STUDENT_EXCHANGE_H

#include "core/backend.h"
#include "student/params.h"

struct rt_exchange {
    const struct rt_device *d;
    const struct rt_param_shard *shard;
    struct rt_queue *q;                     /* NULL: one rank */
    struct rt_event *done[RT_PARAM_BUCKETS]; /* on the device's queue: a bucket's gradients are complete, or its parameters updated */
    struct rt_event *joined;
    bool overlap;
    bool begun;                             /* sums were, and not all of them are handed out */
    int left;                               /* buckets that are not summed yet */
};
/* shard is borrowed. overlap false: everything on the device's queue, bucket by bucket. Nothing is made for one rank. */
enum rt_status rt_exchange_open(struct rt_exchange *x, const struct rt_device *d, const struct rt_param_shard *shard, bool overlap, struct rt_err *err);
void rt_exchange_close(struct rt_exchange *x); /* zeroed is fine */

void rt_exchange_begin(struct rt_exchange *x);
/* grads: gradients from element `from` on are complete on the device's queue. Sums the buckets that lie behind it and were not summed yet. */
enum rt_status rt_exchange_sum(struct rt_exchange *x, void *grads, int64_t from, struct rt_err *err);
/* The other buckets (all, where nothing was begun); the device's queue then waits for all sums. This rank's parts hold them, what else is in grads is unspecified. */
enum rt_status rt_exchange_sum_rest(struct rt_exchange *x, void *grads, struct rt_err *err);
/* This rank's part of bucket b is updated, once the device's queue is there. */
enum rt_status rt_exchange_mark(struct rt_exchange *x, int b, struct rt_err *err);
/* block = every rank's parts to all, each bucket behind its mark; the device's queue waits for them. */
enum rt_status rt_exchange_gather(struct rt_exchange *x, void *block, struct rt_err *err);

#endif
