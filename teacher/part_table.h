/* Which tensors make up a part, and where they lie: the gate through which a checkpoint enters. Internal to teacher/weights.c. */
#ifndef RT_TEACHER_PART_TABLE_H
#define RT_TEACHER_PART_TABLE_H

#include "formats/safetensors.h"
#include "teacher/config.h"
#include "teacher/weights.h"

struct rt_part_tensor {
    int slot;                       /* index into rt_part.w */
    const struct rt_tensor *weight; /* NULL: absent in this model */
    const struct rt_tensor *scale;  /* weight_scale_inv, or NULL */
    int64_t rows, cols;
    size_t at, scale_at;            /* where both lie in the part's block */
};
struct rt_part_plan {
    struct rt_part_tensor t[RT_PART_WEIGHTS];
    int n;
    size_t bytes; /* of a block that holds all tensors, each 64-byte aligned */
};

/* Looks up and checks every tensor of the part: names, types, shapes, shape of the scale. */
enum rt_status rt_part_plan(const struct rt_tensors *ts, const struct rt_teacher_config *c, struct rt_part_id id, struct rt_part_plan *out,
                            struct rt_err *err);
/* "layer 3 expert 17" into buf, returned. */
const char *rt_part_name(struct rt_part_id id, char buf[64]);

#endif
