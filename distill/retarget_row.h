/* One row of retargeting: entries of a teacher's row in, entries over the student's ids out. */
#ifndef RT_DISTILL_RETARGET_ROW_H
#define RT_DISTILL_RETARGET_ROW_H

#include "distill/retarget.h"

/* Scratch of a row; in the caller's memory, sized once for k. */
struct rt_row_work {
    int k;          /* entries that it can hold */
    int n;          /* entries that it holds */
    double kept;    /* sum of exp(logit - lse) over everything that was added */
    uint32_t *id;   /* [k] */
    double *sum;    /* [k] of exp(logit - the first one's): at least 1, however far below others of the row */
    float *logit;   /* [k] of the first one added, then (rt_row_close) of the sum */
    int32_t *count; /* [k] how many were added */
    uint32_t *slot; /* [slots] entry + 1 by hash of its id; 0: free. A power of two, at least 2 k */
    uint32_t slots;
};
size_t rt_row_work_bytes(int k);
void rt_row_work_init(struct rt_row_work *w, int k, void *memory); /* zeroed memory of rt_row_work_bytes(k), 8-byte aligned */

void rt_row_begin(struct rt_row_work *w); /* an empty row */
/* t(id) += exp(logit), by descending logit. p = exp(logit - lse). RT_NO_ID is left out. */
void rt_row_add(struct rt_row_work *w, uint32_t id, float logit, double p);
/* Sorts by descending logit, then ascending id; an id that one entry was added to keeps its bits. */
void rt_row_close(struct rt_row_work *w);
/* Place of id after rt_row_close, -1: not there. */
int rt_row_find(const struct rt_row_work *w, uint32_t id);

#endif
