/* A training sequence in one block of memory: what training uses of its rows. */
#ifndef RT_DISTILL_SOURCE_ROWS_H
#define RT_DISTILL_SOURCE_ROWS_H

#include <stdbool.h>

#include "core/status.h"
#include "formats/rows.h"

/* Where each array begins in the block, and its bytes. */
struct rt_rows_layout {
    size_t ids, mask, position, top_ids, top_logits, lse, feature[RT_MAX_FEATURES], scale[RT_MAX_FEATURES], paired, span, span_logp, bytes;
};

/* For r's sizes, and for the arrays that r has (pointers that may be missing are looked at, nothing is read through them). id: NULL for lines. features:
 * hidden states are used. false: larger than memory can be. */
bool rt_rows_lay_out(const struct rt_rows *r, const struct rt_row_identity *id, bool features, struct rt_rows_layout *l);
/* *out = a copy of r laid out so, whose pointers lie in its own block: rt_free. The text and what training does not use are left out. */
enum rt_status rt_rows_copy(const struct rt_rows *r, const struct rt_row_identity *id, bool features, const struct rt_rows_layout *l, struct rt_rows **out,
                            struct rt_err *err);
/* Bytes of memory that such a copy takes. */
size_t rt_rows_in_memory(const struct rt_rows_layout *l);

#endif
