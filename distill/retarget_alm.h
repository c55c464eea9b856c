/* Mode alm of retargeting: spans (formats/rows.h, distill/spans.h). */
#ifndef RT_DISTILL_RETARGET_ALM_H
#define RT_DISTILL_RETARGET_ALM_H

#include "distill/retarget.h"

/* A row for each target of the student; spans over the targets whose bytes the teacher's stored realised log-probabilities cover, cut at ends
 * that both sides have in common and, where the teacher says boundaries, at those with more than in->gamma. A target in no span counts as
 * masked: forced (no teacher token there), unstored (a log-probability is missing), or crossing (nothing behind it ends on both sides). */
enum rt_status rt_retarget_alm(const struct rt_retarget_in *in, struct rt_retarget_out *out, struct rt_retarget_counts *counts, struct rt_err *err);

#endif
