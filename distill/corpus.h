/* A dataset as windows of sequences for scoring: keys, occurrence numbers, texts, shares of a corpus.
 *
 * Sequences are numbered in input order; share `part` of n_parts has those whose number is part modulo n_parts. The occurrence of
 * a key counts over the whole input, so that shares agree.
 */
#ifndef RT_DISTILL_CORPUS_H
#define RT_DISTILL_CORPUS_H

#include <stdbool.h>
#include <stdint.h>

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
    char sha256[65];                 /* over the keys of the share in order: the identity of the data */
};

struct rt_corpus;
enum rt_status rt_corpus_open(const struct rt_corpus_options *o, struct rt_corpus **out, struct rt_err *err);
void rt_corpus_close(struct rt_corpus *c); /* NULL is fine */
/* Reads everything once and rewinds. */
enum rt_status rt_corpus_survey(struct rt_corpus *c, struct rt_corpus_survey *out, struct rt_err *err);
/* The next window: sequences until the next one would exceed `tokens`, with ids, mask, key, text. *seqs and what they point at are the
 * corpus's, valid until the next call. *n 0 after the last. USAGE where one sequence alone exceeds it. */
enum rt_status rt_corpus_window(struct rt_corpus *c, int64_t tokens, struct rt_rows **seqs, int64_t *n, int64_t *n_tokens, struct rt_err *err);

#endif
