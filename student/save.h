/* A student on disk: a directory that transformers loads, and the blocks of a training checkpoint. */
#ifndef RT_STUDENT_SAVE_H
#define RT_STUDENT_SAVE_H

#include "formats/checkpoint.h"
#include "student/optimizer.h"

struct rt_student_save {
    const char *source;       /* directory whose tokenizer files and generation_config.json are copied byte for byte; NULL: none */
    enum rt_dtype dtype;      /* BF16, F16 or F32 */
    uint64_t max_shard_bytes; /* 0: one file */
    const struct rt_adamw_state *state; /* of the optimiser that trains s: the weights are its masters; NULL: those that s computes with */
};
/* Of several ranks every one calls it with its own state, and rank 0 alone writes.
 * Writes config.json (rt_student_config_text), the copies, and last the weights: model.safetensors, or shards and their index. A
 * tied head is not written. dir is made if absent. REFUSED, before anything is written, where dir holds weights that a loader would
 * take instead (an index beside a single file, a single file beside shards). */
enum rt_status rt_student_save(const struct rt_student *s, const struct rt_student_save *o, const char *dir, struct rt_err *err);

/* The files of a checkpoint (rt_adamw_checkpoint): model.safetensors, adam_m.safetensors, adam_v.safetensors. opt NULL: the model alone. */
enum rt_status rt_student_checkpoint(const struct rt_student *s, const struct rt_optimizer *opt, struct rt_ckpt_writer *w,
                                     struct rt_err *err);
/* Reads them back from a checkpoint's directory; step becomes opt->step. */
enum rt_status rt_student_restore(struct rt_student *s, struct rt_optimizer *opt, const char *dir, int64_t step, struct rt_err *err);

#endif
