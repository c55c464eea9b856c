/* The student's side of a teacher's sequence: its tokens, and where both sides' tokens end.
 *
 * A conversation (targets behind a prompt): the messages of the prompt are rendered by the student's own template, and the
 * completion is encoded behind it, apart; only the completion's bytes are aligned, and the ends of the turn with each other. What the
 * teacher's prompt forced ("<think>\n") and the student's does not is part of the student's completion, without rows; an answer without a
 * thought, out of a conversation, has none on the student's side. Of several target turns the last one is kept. A plain text (all targets): BOS as the student's tokenizer adds it, text encoded between special tokens of a role.
 */
#ifndef RT_DISTILL_RETARGET_TEXT_H
#define RT_DISTILL_RETARGET_TEXT_H

#include "distill/retarget_align.h"
#include "distill/retarget_prompt.h"
#include "distill/retarget_report.h"
#include "distill/retarget_vocab.h"
#include "formats/rows.h"

struct rt_retarget_pair {
    const struct rt_model_dir *teacher;
    struct rt_model_dir *student;      /* encodes: one caller at a time */
    const struct rt_vocab_map *map;
};

/* A zeroed struct is empty; it is used again for the next sequence. */
struct rt_retarget_text {
    struct rt_side teacher, student; /* of the last sequence; point into this struct and into rows */
    bool earlier;                    /* earlier targets are no longer targets */
    struct rt_buf text;              /* what the student's tokens decode to */
    struct rt_encoding enc;          /* the student's tokens and their ends in text */
    struct rt_buf target;            /* u8 [student.n] */
    struct rt_buf teacher_end, student_end; /* u32, units */
    struct rt_buf whole;             /* scratch */
    struct rt_prompt_read prompt;
    struct rt_rendered rendered;
};
void rt_retarget_text_free(struct rt_retarget_text *t);

/* UNSUPPORTED: a conversation, and one of the models has no template. */
enum rt_status rt_retarget_text_templates(const struct rt_retarget_pair *pair, const struct rt_rows *rows, struct rt_err *err);
/* = *t. *reject: why the sequence cannot be taken, RT_REJECT_NONE where it can. UNSUPPORTED: as rt_retarget_text_templates says. */
enum rt_status rt_retarget_text_make(const struct rt_retarget_pair *pair, const struct rt_rows *rows, struct rt_retarget_text *t, enum rt_reject *reject,
                                     struct rt_err *err);
/* The same for a student whose tokenizer and template are the teacher's: its tokens and targets are those of rows, whatever its text's normal form. */
enum rt_status rt_retarget_text_same(const struct rt_retarget_pair *pair, const struct rt_rows *rows, struct rt_retarget_text *t, enum rt_reject *reject,
                                     struct rt_err *err);

#endif
