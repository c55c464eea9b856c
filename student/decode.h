/* Generation with a student: the engine of core/batch.h over caches of keys and values.
 *
 * A row of logits depends on its own slot's tokens alone, bit for bit, whatever else is in the step (rows are exact in every
 * product). Caches and scratch are taken from the device when the decoder is made or resumed and given back by suspend, so
 * that generation and training can share one memory budget.
 *
 * Caches are cut into pages: slots take them as they grow and share those of a common prompt, which is computed and stored once. Tokens are drawn on
 * the device, and the step after is handed over before they are here. Steps that feed one token to each slot are recorded where the backend can do that
 * (rounded up to a few sizes), and run again.
 */
#ifndef RT_STUDENT_DECODE_H
#define RT_STUDENT_DECODE_H

#include "core/batch.h"
#include "student/model.h"

struct rt_student_decoder;

struct rt_decoder_options {
    int slots;       /* sequences at a time */
    int budget;      /* entries of one step */
    int64_t max_len; /* tokens that a slot holds; at most the student's max_length */
    int64_t tokens;  /* that all slots hold together, at least max_len and at most slots * max_len; 0: the latter */
    bool own_prefix; /* a common prompt is copied to each slot, not shared: for measuring */
};

/* Device bytes of a decoder: caches of 2 * layers * nkv * hd elements a token (tokens rounded up to pages), and the scratch of a step of
 * `budget` entries of which `slots` or fewer want logits. 0: more than size_t holds. */
size_t rt_student_decoder_bytes(const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act_size);
/* The most `tokens` with which a decoder of o->slots slots fits into `bytes`; 0: not even max_len. */
int64_t rt_student_decoder_tokens(const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act_size, size_t bytes);
/* The most slots (at most o->slots) with which a decoder fits into `bytes`; 0: not even one. */
int rt_student_decoder_slots(const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act_size, size_t bytes);

/* s is borrowed. USAGE for options out of range, NOMEM. */
enum rt_status rt_student_decoder_create(struct rt_student *s, const struct rt_decoder_options *o, struct rt_student_decoder **out,
                                         struct rt_err *err);
void rt_student_decoder_free(struct rt_student_decoder *d); /* NULL is fine */
/* Gives the device memory back; what the caches held is lost. resume takes it again. Each does nothing where it is done. */
void rt_student_decoder_suspend(struct rt_student_decoder *d);
enum rt_status rt_student_decoder_resume(struct rt_student_decoder *d, struct rt_err *err);

/* The callbacks of core/batch.h with this decoder as ctx. A step of a suspended decoder is USAGE, as are entries outside its
 * slots, lengths or vocabulary; NOMEM where pages that nobody asked `room` for are not left. `step` may be used in place of submit and collect, not
 * between them. */
struct rt_batch_step rt_student_decoder_step(struct rt_student_decoder *d);

#endif
