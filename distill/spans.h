/* Likelihoods of spans: what a teacher with another tokenizer says of a text when its distributions are left aside.
 *
 * A span is a run of student tokens whose bytes are those of a run of teacher tokens; its probability is the product over the run, on
 * either side. With x = log p_T(span), y = log p_S(span) the loss of a span is that of two coins, tempered by tau:
 *
 *   f(x, y) = tau (p (u - v) + (1 - p) (log(1 - p) - log(1 - q))),  u = x/tau - RT_SPAN_CERTAIN, v = y/tau - RT_SPAN_CERTAIN, p = e^u, q = e^v
 *   df/dy   = (q - p) / (1 - q)                                      (tau f: the gradient keeps its scale at any tau, as T^2 KL does)
 *
 * With a great tau it tends to a log(a/b) - a + b of the surprises a = -x, b = -y: zero where both sides are surprised alike. RT_SPAN_CERTAIN
 * keeps a certain side from being a division by zero. (Minixhofer et al. 2025, arXiv 2503.20083; there without the factor tau, and tau = 100.)
 *
 * Where a word may end within a token's reach, the teacher's last token says also that the word ends there, and the student's may not. So the
 * probability of a span is multiplied, on both sides, by that of a boundary id coming next: where the teacher's is
 * at most gamma, the span goes on to the next common end. Sets whose teacher does not say it (an endpoint that gives realised
 * log-probabilities alone) do without.
 */
#ifndef RT_DISTILL_SPANS_H
#define RT_DISTILL_SPANS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "formats/rows.h"
#include "formats/tokenizer.h"

#define RT_SPAN_TAU 100.0
#define RT_SPAN_GAMMA 0.1
#define RT_SPAN_CERTAIN 1e-6

/* set [n] = 1 for the ids at which text may go on behind a whole word: bytes that begin with space, tab, line feed or carriage return, and added
 * tokens. Ids that no token has are 0. */
void rt_boundary_ids(const struct rt_tokenizer *tok, int64_t n, uint8_t *set);

/* f(x, y) and df/dy; tau > 0; x and y at most 0 (what rounding puts above counts as 0). */
double rt_span_loss(double x, double y, double tau, double *dy);

/* One text in two tokenisations, targets only. Units are any that both sides count alike (distill/retarget_align.h). */
struct rt_span_side {
    int64_t n;
    const uint32_t *end;  /* [n] ascending; an end that repeats is a token without units: it never closes a span */
};
struct rt_span {
    int64_t teacher, student; /* the last token of each side */
    int64_t rows;             /* student tokens */
    double logp;              /* sum over the teacher's tokens */
    bool boundary;            /* the boundary behind it is counted: add it, on both sides */
};
/* Cuts two runs of tokens that begin at the same unit into spans, += span [*n_spans], room for t->n. logp [t->n]: of each teacher token.
 * boundary [t->n]: log mass of a boundary behind each, or NULL (then gamma is not used); NAN where it is not known: the span ends there, and
 * none is counted. What is behind the last common end is in no span. A span ends at the last common end whatever its boundary. */
void rt_spans_cut(const struct rt_span_side *t, const struct rt_span_side *s, const float *logp, const float *boundary, double gamma,
                  struct rt_span *span, int64_t *n_spans);

#endif
