/* What retargeting did: counts of sequences, tokens, rows and mass; as JSON in the shards' headers, as a table for people. */
#ifndef RT_DISTILL_RETARGET_REPORT_H
#define RT_DISTILL_RETARGET_REPORT_H

#include <stdio.h>

#include "core/mem.h"
#include "distill/retarget_align.h"
#include "formats/json.h"
#include "formats/tokenizer.h"

/* Why a whole sequence is left out. */
#define RT_REJECT_LIST(X) \
    X(DAMAGED, "damaged", "damaged in the shards") \
    X(BYTES, "bytes", "the tokens' bytes are not the text's") \
    X(UTF8, "utf8", "text that is not UTF-8") \
    X(NFC, "nfc", "text that is not in Unicode NFC") \
    X(PROMPT, "prompt", "a prompt that the teacher's template does not explain") \
    X(RENDER, "render", "the student's template changes the completion") \
    X(EMPTY, "empty", "no target for the student")
/* Why a target of the student has no row. */
#define RT_MASK_LIST(X) \
    X(CROSSING, "crossing", "reaches over the end of a teacher token") \
    X(BLANK, "blank", "white space alone") \
    X(UNSTORED, "unstored", "the teacher's row is not stored, or nothing was predicted there") \
    X(FORCED, "forced", "not the teacher's words, or none of its targets") \
    X(SPECIAL, "special", "a special token that the student lacks") \
    X(UNLISTED, "unlisted", "inside a teacher token that is not among the stored ids") \
    X(LITTLE, "little", "less than 0.001 of the teacher's mass left") \
    X(LOOSE, "loose", "what is not stored outweighs what agrees with the bytes said") \
    X(SPLIT, "split", "strict: not one token to one token, or no shared token")

enum rt_reject {
#define RT_REJECT_ENUM(name, key, text) RT_REJECT_##name,
    RT_REJECT_LIST(RT_REJECT_ENUM)
#undef RT_REJECT_ENUM
    RT_REJECT_COUNT,
    RT_REJECT_NONE = RT_REJECT_COUNT
};
enum rt_mask {
#define RT_MASK_ENUM(name, key, text) RT_MASK_##name,
    RT_MASK_LIST(RT_MASK_ENUM)
#undef RT_MASK_ENUM
    RT_MASK_COUNT
};

enum { RT_TOP_CROSSING = 20 };

/* Sums over sequences; adding two gives those of both. A target is a student token that training predicts. */
struct rt_retarget_counts {
    int64_t sequences, kept, rejected[RT_REJECT_COUNT];
    int64_t earlier_turns;       /* sequences whose earlier targets are no longer targets: only the last turn is aligned */
    int64_t teacher_tokens, teacher_rows; /* targets of the teacher in kept sequences, and rows stored for them */
    int64_t targets;             /* of the student in kept sequences */
    int64_t kind[RT_PLACE_KINDS];/* targets by how they lie */
    int64_t boundary;            /* targets that begin where a teacher token begins */
    int64_t rows[RT_PLACE_KINDS];/* rows written, by the same */
    double mass[RT_PLACE_KINDS]; /* sum over these rows: probability on the listed ids ... */
    double residual[RT_PLACE_KINDS]; /* ... and what is left for all others; the two sum to the number of rows */
    double evidence;             /* INSIDE rows: sum of the teacher's mass that agrees with the bytes said already */
    int64_t bounded;             /* INSIDE rows whose residual is an upper bound (the stored ids do not hold all mass) */
    int64_t masked[RT_MASK_COUNT];
    int64_t digits, digits_whole, digits_rows; /* targets of digits alone; one to one with the teacher; with a row */
    int64_t spans;               /* alm: a row is one that lies in a span, and there are no masses */
    int64_t states, states_paired; /* target positions of kept sequences; with a teacher state */
    uint32_t *crossing;          /* [n_ids] how often each student token crossed; NULL: not counted */
    uint32_t n_ids;
};

enum rt_status rt_retarget_counts_init(struct rt_retarget_counts *c, uint32_t n_ids, struct rt_err *err);
void rt_retarget_counts_free(struct rt_retarget_counts *c); /* zeroed is fine */
void rt_retarget_counts_clear(struct rt_retarget_counts *c);
void rt_retarget_counts_add(struct rt_retarget_counts *c, const struct rt_retarget_counts *more);

/* As members of object v. crossing: the commonest RT_TOP_CROSSING, with their text where student is not NULL. */
enum rt_status rt_retarget_report_json(const struct rt_retarget_counts *c, const struct rt_tokenizer *student, struct rt_json *v, struct rt_err *err);
/* += what rt_retarget_report_json wrote (a count that is not there is 0); crossing tokens beyond those listed are lost. FORMAT. */
enum rt_status rt_retarget_report_read(const struct rt_json *v, struct rt_retarget_counts *c, struct rt_err *err);
/* The table. */
enum rt_status rt_retarget_report_print(const struct rt_retarget_counts *c, const struct rt_tokenizer *student, struct rt_buf *out, struct rt_err *err);

#endif
