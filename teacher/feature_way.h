/* The way of hidden states from the device to the host, where a scoring pass lets them out: projected and encoded on the device, then copied to memory
 * that copies do not wait for. What it takes on the device, and that memory, stay from one window to the next. Internal to scoring. */
#ifndef RT_TEACHER_FEATURE_WAY_H
#define RT_TEACHER_FEATURE_WAY_H

#include "teacher/score.h"

struct rt_feature_way;
/* For the features of o, whose layers and dimensions exist. */
enum rt_status rt_feature_way_open(struct rt_teacher *t, const struct rt_score_options *o, struct rt_feature_way **out, struct rt_err *err);
void rt_feature_way_free(struct rt_feature_way *w); /* nothing is lent any more; NULL is fine */
/* Was it opened for features like o's? */
bool rt_feature_way_suits(const struct rt_feature_way *w, const struct rt_score_options *o);
/* Host bytes that it takes, but for the matrices and what is lent. far: the device has memory of its own. */
uint64_t rt_feature_way_bytes(bool far);

/* *out = host memory for n elements of `size`, of any contents, for rt_feature_way_take; by the thread that uses the device. Any thread gives it back. */
enum rt_status rt_feature_way_lend(struct rt_feature_way *w, size_t n, size_t size, void *out_ptr_to_ptr, struct rt_err *err);
void rt_feature_way_back(struct rt_feature_way *w, void *p); /* NULL is fine */

/* Rows of feature i that may be taken together. */
int64_t rt_feature_way_rows(const struct rt_feature_way *w, int i);
/* m rows of states `rows` (device, [m, H] act) to out [m, dim] of feature i's type, and of e4m3 their scales: scale = max(amax, 1e-12)/448 of the row, code =
 * rne(y/scale). out and scale are lent memory, and hold them when the device's queue is there; rows may change behind the call, on that queue. */
enum rt_status rt_feature_way_take(struct rt_feature_way *w, int i, const void *rows, int64_t m, void *out, float *scale, struct rt_err *err);

#endif
