/* Generation by the teacher: a step for the batch scheduler, over the compressed cache (kv_lora + rope head a token and layer).
 *
 * Each row of a step depends on its own sequence alone, bit for bit: all products are row-exact. Weights that fit into memory stay
 * there; others are streamed through every step.
 */
#ifndef RT_TEACHER_DECODE_H
#define RT_TEACHER_DECODE_H

#include "core/batch.h"
#include "teacher/teacher.h"

struct rt_teacher_decoder;

/* t was opened with slots and batch_tokens: the scheduler's slots and budget; capacity of a slot is t's max_length. Logits have
 * vocab_size columns. */
enum rt_status rt_teacher_decoder_create(struct rt_teacher *t, struct rt_teacher_decoder **out, struct rt_err *err);
void rt_teacher_decoder_free(struct rt_teacher_decoder *g); /* NULL is fine */
/* The callbacks, over g. */
struct rt_batch_step rt_teacher_decoder_step(struct rt_teacher_decoder *g);

#endif
