/* The engine of `retort retarget` on one sequence: teacher rows in, rows over the student's vocabulary out.
 *
 * Teacher token j covers the units [T_j, T_j+1) (distill/retarget_align.h), student token i covers [a, b), q_j is the stored row that
 * predicts teacher token j, rho_j its mass outside the stored ids, phi the map of distill/retarget_vocab.h. The row that predicts i:
 *
 *   exact   a = T_j, b <= T_j+1      t(u) = sum of q_j(w) over phi(w, 0) = u; residual 1 - sum t, which holds rho_j and what maps to nothing
 *           T_j < a, b <= T_j+1      given that token j begins with the r = a - T_j bytes that the student has said:
 *                                    t(u) = sum of q_j(w) over w that extend r, phi(w, r) = u, divided by M + rho_j, M = sum of q_j(w) over
 *                                    these w. residual rho_j / (M + rho_j): what is not stored may extend r or not, so with rho_j > 0 it is an upper
 *                                    bound (counted). No row where M < RT_LITTLE_MASS or token j itself is not stored, nor where rho_j > M: a
 *                                    bound above one half would teach the student little but not to trust what is listed.
 *           b > T_j+1                no row: the label stays for the cross-entropy
 *   strict  a = T_j, b = T_j+1       t(u) = q_j(w) where w and u are the same bytes, divided by M + rho_j, M = sum of q_j over shared w; else no
 *                                    row. The others are part of the bucket in training.
 *   alm     likelihoods of spans in place of distributions (distill/retarget_alm.h)
 *
 * The realised token wins its row: q_j of teacher token j goes to student token i, whatever phi says. A target that is white space
 * alone, a special token that the student lacks, and a target without a stored row have no row. Rows hold at T = 1 alone,
 * since adding probabilities and changing their temperature do not commute. Logits stay raw: an id that one teacher token maps to keeps its bits,
 * an id of several has the log-sum-exp of theirs; lse is the teacher's, or at INSIDE and strict log((M + rho_j)) + lse. With one tokenizer on
 * both sides a row is the same bits; where they end turns by different tokens, these alone are mapped, and lse stays the teacher's.
 *
 * A mode is one function on the aligned sequence (rt_retarget_mode_fn), listed in rt_retarget_rows; states are paired behind it, the same for all.
 */
#ifndef RT_DISTILL_RETARGET_H
#define RT_DISTILL_RETARGET_H

#include "core/mem.h"
#include "distill/retarget_align.h"
#include "distill/retarget_report.h"
#include "distill/retarget_vocab.h"
#include "formats/rows.h"

enum rt_retarget_mode { RT_RETARGET_EXACT, RT_RETARGET_STRICT, RT_RETARGET_ALM, RT_RETARGET_MODES };
const char *rt_retarget_mode_name(enum rt_retarget_mode mode); /* "exact", "strict", "alm" */

#define RT_LITTLE_MASS 1e-3

/* A sequence with both tokenisations. All borrowed. */
struct rt_retarget_in {
    const struct rt_vocab_map *map;
    const struct rt_row_identity *id; /* of rows */
    const struct rt_rows *rows;       /* the teacher's sequence */
    struct rt_side teacher, student;
    const struct rt_place *place;     /* [student.n], of rt_align */
    const char *text;                 /* what all student tokens decode to, and where each ends */
    int64_t text_len;
    const uint32_t *byte_end;         /* [student.n] */
    double gamma;                     /* alm: least mass of a boundary at which a span is cut */
};

/* Columns of the sequence that is made; used again for the next one. A zeroed struct is empty. */
struct rt_retarget_out {
    struct rt_buf position, topk_ids, topk_logits, lse, next_id, next_logprob, next_rank; /* row-major, as in rt_rows */
    struct rt_buf span, span_logp;    /* alm; else never touched */
    struct rt_buf feature[RT_MAX_FEATURES], scale[RT_MAX_FEATURES], feature_mask;
    struct rt_buf scratch;
    int64_t n_rows;
    int k, n_lse;                     /* k = min(top_k, student's ids) */
};
void rt_retarget_out_free(struct rt_retarget_out *o);

/* Fills the columns of rows, n_rows, k and n_lse (= : buffers are emptied first, and have memory even where they stay empty), and counts
 * targets, rows, masses and masks. */
typedef enum rt_status rt_retarget_mode_fn(const struct rt_retarget_in *in, struct rt_retarget_out *out, struct rt_retarget_counts *counts,
                                           struct rt_err *err);
/* Counts target i of the student by how it lies: += targets, kind, boundary, digits, crossing. */
void rt_retarget_count_target(const struct rt_retarget_in *in, int64_t i, struct rt_retarget_counts *counts);

/* The identity of the set that is made of `id`: the student's tokenizer, template and vocabulary, origin.mode and the original's (see
 * formats/rows.h). same: both have one tokenizer and one template. */
void rt_retarget_identity(const struct rt_row_identity *id, const struct rt_model_dir *student, int64_t student_vocab, enum rt_retarget_mode mode,
                          bool same, struct rt_row_identity *out);

/* = *out, and *rows points into it and into `in` (ids, mask, text); key made, occurrence left 0, source_line kept. counts +=, of
 * this sequence's targets, rows and states. NOMEM. */
enum rt_status rt_retarget_rows(const struct rt_retarget_in *in, enum rt_retarget_mode mode, struct rt_retarget_out *out, struct rt_rows *rows,
                                struct rt_retarget_counts *counts, struct rt_err *err);

#endif
