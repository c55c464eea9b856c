/* A dataset as windows of sequences for scoring: keys, occurrence numbers, texts, shares of a corpus.
 *
 * A window takes the next sequences in input order until one more would exceed it, so that every sequence ends inside its window and
 * rows leave in input order (shards are cut by it). No other way to cut the input into runs of that size has fewer windows; what
 * stays empty is less than the sequence that did not fit. Sequences are numbered in input order; share `part` of n_parts has those whose number is part modulo n_parts. The occurrence of
 * a key counts over the whole input, so that shares agree.
 */
#ifndef RT_DISTILL_CORPUS_H
#define RT_DISTILL_CORPUS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/mem.h"
#include "distill/model_dir.h"
#include "formats/dataset.h"
#include "formats/rows.h"

struct rt_corpus_options {
    const char *data;
    const struct rt_model_dir *model;
    int64_t n_ids, max_length;
    enum rt_overlong overlong;
    int part, n_parts;
};

/* What a first reading finds. */
struct rt_corpus_survey {
    struct rt_dataset_counts counts; /* of the whole input */
    int64_t sequences, tokens, targets, longest; /* of this share */
    char sha256[65];                 /* over keys and masks of the whole input in order: the identity of the data, which shares agree on */
};

struct rt_corpus;
enum rt_status rt_corpus_open(const struct rt_corpus_options *o, struct rt_corpus **out, struct rt_err *err);
void rt_corpus_close(struct rt_corpus *c); /* NULL is fine */
/* Reads everything once and rewinds. */
enum rt_status rt_corpus_survey(struct rt_corpus *c, struct rt_corpus_survey *out, struct rt_err *err);
/* After a survey: how many windows of `tokens` it makes, at least as long as the longest sequence; and the smallest window that makes no
 * more of them: windows of even size hide reading better than full ones and a small last one. */
int64_t rt_corpus_windows(const struct rt_corpus *c, int64_t tokens);
int64_t rt_corpus_even_window(const struct rt_corpus *c, int64_t tokens);

/* Sequences of a window, with ids, mask, key, text. Zeroed at first; released with rt_corpus_window_free. */
struct rt_corpus_window {
    struct rt_rows *seqs;  /* [n] */
    int64_t n, tokens;
    struct rt_buf bytes, rows, places; /* where it lies: the corpus's business */
};
/* The next window replaces what w held; n 0 after the last. USAGE where one sequence alone exceeds it; REFUSED, with the last window, where a survey saw
 * other sequences than were read since. */
enum rt_status rt_corpus_next(struct rt_corpus *c, int64_t tokens, struct rt_corpus_window *w, struct rt_err *err);
void rt_corpus_window_free(struct rt_corpus_window *w);

#endif
