/* The way of hidden states from the device to the host, where a scoring pass lets them out: projected and encoded on the device. What it takes there, and
 * the pinned memory that pieces cross through, stays from one window to the next. Internal to scoring; one thread at a time. */
#ifndef RT_TEACHER_FEATURE_WAY_H
#define RT_TEACHER_FEATURE_WAY_H

#include "teacher/score.h"

struct rt_feature_way;
/* For the features of o, whose layers and dimensions exist. */
enum rt_status rt_feature_way_open(struct rt_teacher *t, const struct rt_score_options *o, struct rt_feature_way **out, struct rt_err *err);
void rt_feature_way_free(struct rt_feature_way *w); /* NULL is fine */
/* Was it opened for features like o's? */
bool rt_feature_way_suits(const struct rt_feature_way *w, const struct rt_score_options *o);
/* Host bytes that it takes, but for the matrices. far: the device has memory of its own. */
uint64_t rt_feature_way_bytes(bool far);

/* Rows of feature i that may be taken together. */
int64_t rt_feature_way_rows(const struct rt_feature_way *w, int i);
/* m rows of states `rows` (device, [m, H] act) to out [m, dim] of feature i's type, and of e4m3 their scales: scale = max(amax, 1e-12)/448 of the row, code =
 * rne(y/scale). On a device with memory of its own they are on their way when it returns, in the order of the device's queue; out and scale are
 * written by a later call of take or settle. */
enum rt_status rt_feature_way_take(struct rt_feature_way *w, int i, const void *rows, int64_t m, void *out, float *scale, struct rt_err *err);
/* Everything that was taken is where it belongs. */
enum rt_status rt_feature_way_settle(struct rt_feature_way *w, struct rt_err *err);
/* What is still on its way is wanted no more. */
void rt_feature_way_forget(struct rt_feature_way *w);

#endif
