/* The loss on likelihoods of spans (distill/spans.h) over a packed micro-batch, and its gradient.
 *
 *   L += w/N sum over spans of f(x, y),  y = sum of log q(label) over the span's rows (+ log q(boundary) at the row behind it)
 * Two passes over the head: the likelihoods, then dL/dz with df/dy of a row's span as its weight.
 */
#ifndef RT_DISTILL_SPAN_LOSSES_H
#define RT_DISTILL_SPAN_LOSSES_H

#include "distill/micro.h"
#include "student/model.h"

struct rt_span_losses {
    const struct rt_device *d;
    int64_t tokens, V;
    uint8_t *set;                    /* device [V]: boundary ids */
    float *dev_label, *dev_set;      /* device [tokens] weights */
    double *dev_logp[2];             /* device [tokens] of label, of set */
    float *w_label, *w_set;          /* [host] [tokens] */
    double *logp[2];                 /* [host] [tokens] */
};
struct rt_span_sums {
    double loss, teacher, student;   /* sum of f, of x, of y */
    int64_t spans, rows;             /* rows: that lie in spans */
};

size_t rt_span_losses_bytes(int64_t tokens, int64_t V);
/* Cuts the device buffers from arena (rt_span_losses_bytes). boundary [host] [V], copied. */
enum rt_status rt_span_losses_create(struct rt_span_losses *l, const struct rt_device *d, int64_t tokens, int64_t V, const uint8_t *boundary,
                                     struct rt_arena *arena, struct rt_err *err);
void rt_span_losses_free(struct rt_span_losses *l); /* zeroed is fine */

/* x [rows, H] device: final states of p's rows; label [rows] device: their labels. sums +=. dx NULL: no gradient; else *any says whether there
 * was a span: then dx [rows, H] = dL/dx and the head's gradient += ; else nothing is written. scale: w/N. */
enum rt_status rt_span_losses_run(struct rt_span_losses *l, const struct rt_student_head *head, const struct rt_micro *p, const void *x, const int32_t *label,
                                  double tau, double scale, void *dx, bool *any, struct rt_span_sums *sums, struct rt_err *err);

#endif
