/* Limits and checks of an identity that the shard code shares. */
#ifndef RT_FORMATS_ROW_IDENTITY_H
#define RT_FORMATS_ROW_IDENTITY_H

#include "formats/rows.h"

enum { RT_MAX_VOCAB = 1 << 24, RT_MAX_TOPK = 1 << 16, RT_MAX_FEATURE_DIM = 1 << 20, RT_MAX_TEACHER_LAYERS = 100000 };

/* FORMAT where a number is outside its range, temperatures do not ascend or lack 1. */
enum rt_status rt_row_identity_valid(const struct rt_row_identity *id, const char *where, struct rt_err *err);
/* Rows that hold whole final states instead of a top-k. */
bool rt_row_identity_dense(const struct rt_row_identity *id);

#endif
