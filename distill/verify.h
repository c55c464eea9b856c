/* Verification of answers: is what a completion concludes the same as the reference answer?
 *
 *   boxed  the last \boxed{...} (or \fbox{...}) behind the last </think>, found by counting braces; both sides are normalised and
 *          compared, exactly where possible: numbers as rationals (1/2 = 0.5 = \frac12 = 50\%), sets and tuples item by item, words
 *          without regard to case, anything else as normalised text
 *   exact  the text behind the last </think>, white space at both ends removed, byte by byte
 *
 * CORRECT and WRONG are said only where both sides were understood. UNPARSED (no box, an unclosed one, an answer over 4 KiB, or
 * expressions that differ as text but could be equal) is for another judge; it is never a silent "wrong".
 * Time is linear in the completion and at most quadratic in the answers' 4 KiB (worst found: 26 ms); nothing is allocated; any bytes will do.
 */
#ifndef RT_DISTILL_VERIFY_H
#define RT_DISTILL_VERIFY_H

#include <stdbool.h>
#include <stddef.h>

enum rt_verdict { RT_VERDICT_CORRECT, RT_VERDICT_WRONG, RT_VERDICT_UNPARSED };
enum rt_verify_mode { RT_VERIFY_NONE, RT_VERIFY_BOXED, RT_VERIFY_EXACT };

/* "boxed|exact|none", for option tables, and the way back (NONE for anything else). */
#define RT_VERIFY_CHOICES "boxed|exact|none"
enum rt_verify_mode rt_verify_mode_of(const char *name);
const char *rt_verdict_name(enum rt_verdict v); /* "correct", "wrong", "unparsed" */

/* Relative tolerance between decimals: |a-b| <= tol * max(|a|,|b|), and no more than one in the last place of the coarser one. Rationals and
 * integers are compared exactly. */
#define RT_VERIFY_TOLERANCE 1e-6

/* The text behind the last </think>; without one all of it, or nothing of what begins with <think>: a thought that was cut off. */
void rt_verify_conclusion(const char *text, size_t len, const char **out, size_t *out_len);
/* What the last box of text holds; false where there is none that is closed. */
bool rt_verify_boxed(const char *text, size_t len, const char **out, size_t *out_len);
/* Are two answers the same, as mode boxed compares them? gold is the reference. */
enum rt_verdict rt_verify_answers(const char *gold, size_t gold_len, const char *given, size_t given_len);

/* The whole of it. found, if not NULL, gets what was compared with the answer (inside `completion`; NULL where nothing was found).
 * Mode NONE: CORRECT. */
enum rt_verdict rt_verify(enum rt_verify_mode mode, const char *completion, size_t len, const char *answer, size_t answer_len,
                          const char **found, size_t *found_len);

#endif
