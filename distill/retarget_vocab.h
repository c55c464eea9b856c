/* What a teacher's tokens are in a student's vocabulary: bytes, the student's first token of them, special tokens by role.
 *
 * phi(w, o) is the first token of the student's own BPE of the bytes of teacher token w from byte o on: what the student would
 * emit first, were the teacher to say w and o bytes of it said already. (Not the longest token that is a prefix: a student never emits 1 % of
 * those there.) Bytes that are no UTF-8 on their own are merged as one word. Special tokens have no bytes to a student; they
 * map by role: the end of a turn to the student's, BOS, EOS and PAD to theirs, think tags and other added tokens to the added token of
 * the same content. <think> and </think> that the student lacks are spelt in ordinary tokens, as they stand in text; what else
 * it lacks is RT_NO_ID, and its mass stays in the residual.
 */
#ifndef RT_DISTILL_RETARGET_VOCAB_H
#define RT_DISTILL_RETARGET_VOCAB_H

#include "distill/model_dir.h"
#include "formats/rows.h"

struct rt_vocab_map {
    const struct rt_tokenizer *teacher, *student;
    bool same;            /* one tokenizer.json: every token is itself */
    uint32_t n_teacher, n_student;
    uint32_t teacher_end, student_end; /* ends of a turn (the template's, else EOS); RT_NO_ID: none */
    uint32_t *at;         /* [n_teacher + 1] token w has at[w+1] - at[w] entries in first: its bytes, at least 1 */
    uint32_t *first;      /* phi(w, o) = first[at[w] + o] */
    uint32_t *equal;      /* [n_teacher] the student's token of the same bytes or role, else RT_NO_ID */
    uint8_t *opaque;      /* [n_teacher] 1: maps by role or content alone: phi(w, 0) = equal[w], and nothing lies inside it */
    uint8_t *blank;       /* [n_student] 1: white space only */
    uint8_t *digits;      /* [n_student] 1: ASCII digits only */
};

/* Borrows both models' tokenizers; the student's is used to encode (one caller at a time). Time: one short encoding for each
 * byte of the teacher's vocabulary. Memory: 4 bytes for each of them. NOMEM; what the tokenizer answers. */
enum rt_status rt_vocab_map_create(const struct rt_model_dir *teacher, struct rt_model_dir *student, struct rt_vocab_map *out, struct rt_err *err);
void rt_vocab_map_free(struct rt_vocab_map *m); /* zeroed is fine */

/* phi(w, o); RT_NO_ID where there is none. o below the number of bytes of w. */
static inline uint32_t rt_vocab_first(const struct rt_vocab_map *m, uint32_t w, uint32_t o)
{
    const uint32_t at = m->at[w] + o;
    return at < m->at[w + 1] ? m->first[at] : RT_NO_ID;
}

#endif
