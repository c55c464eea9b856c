/* What the filter finds in texts: words, loops, scripts, shared phrases. Internal to filter. */
#ifndef RT_DISTILL_FILTER_TEXT_H
#define RT_DISTILL_FILTER_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

enum { RT_LOOP_WORDS = 32, RT_LOOP_TIMES = 8, RT_PHRASE_WORDS = 13 };

/* = the hashes of all runs of k words, uint64_t in *out. Words end at white space; a character from U+2E80 on is a word; what is longer
 * than 32 bytes is cut into pieces of 8. folded: letters in lower case, punctuation left out. *words = their number. */
enum rt_status rt_word_grams(const char *s, size_t n, int k, bool folded, struct rt_buf *out, size_t *words, struct rt_err *err);
/* How often the most frequent run of RT_LOOP_WORDS words occurs. scratch is reused. */
enum rt_status rt_most_repeated(const char *s, size_t n, struct rt_buf *scratch, size_t *times, struct rt_err *err);

/* Whether completion is in another language than prompt, judged by scripts (filter.h); *percent is what gave it away. Formulas'
 * commands (\frac) and digits count for nothing. */
bool rt_foreign_script(const char *prompt, size_t n_prompt, const char *completion, size_t n, int *percent);

/* Appends s in lower case (ASCII) with runs of white space as one space, none at the ends. */
enum rt_status rt_fold_text(const char *s, size_t n, struct rt_buf *out, struct rt_err *err);

/* Texts that were seen before. A zeroed struct is empty. */
struct rt_seen {
    uint64_t (*keys)[2];
    size_t n, cap;
};
/* Adds the SHA-256 (its first half) of two folded texts; *was: it was there already. */
enum rt_status rt_seen_add(struct rt_seen *s, const char *a, size_t n, const char *b, size_t m, struct rt_buf *scratch, bool *was, struct rt_err *err);
void rt_seen_free(struct rt_seen *s);

/* Prompts that must not be trained on. */
struct rt_against {
    struct rt_buf grams;  /* uint64_t, sorted */
    struct rt_buf texts;  /* folded texts with fewer than RT_PHRASE_WORDS words, each ended by 0 */
};
enum rt_status rt_against_load(const char *path, struct rt_against *out, struct rt_err *err);
void rt_against_free(struct rt_against *a);
/* *hit says how, NULL where it does not: "13 words in a row", "95 % similar". */
enum rt_status rt_against_check(const struct rt_against *a, const char *prompt, size_t n, struct rt_buf *scratch, const char **hit, struct rt_err *err);

#endif
