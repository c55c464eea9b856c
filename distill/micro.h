/* Micro-batches: sequences behind each other with block-diagonal attention, and what the teacher says about their training rows.
 *
 * Rows are compacted: only rows whose next token is a target are there, in order of tokens. Labels are shifted here and nowhere
 * else: row of token i has label ids[i+1] where loss_mask[i+1] is 1. The last token of a sequence has no row.
 */
#ifndef RT_DISTILL_MICRO_H
#define RT_DISTILL_MICRO_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "distill/feature.h"
#include "distill/order.h"

struct rt_micro_options {
    int64_t tokens;  /* room; at least the longest sequence */
    int k;           /* ids a row; rows with fewer are filled with empty entries. 0: no teacher rows are packed */
    int use;         /* of a row's ids only the first so many are packed: the likeliest; 0: all of them */
    double teacher_T;/* log p = logit/teacher_T - lse */
    enum rt_tail tail; /* RENORM: a set without lse at teacher_T is normalised over its stored ids */
    int64_t vocab;
    const struct rt_feature_map *map; /* NULL: no states */
    bool ce_rest;    /* rows with a teacher's row take no cross-entropy: their label is -1 */
    bool spans;      /* spans of sets that hold them are packed */
    const struct rt_device *d; /* its arrays lie where copies to this device do not wait (rt_backend.host_alloc); NULL: in ordinary memory */
};

struct rt_micro_seq {
    struct rt_order_item item;
    uint8_t key[RT_KEY_BYTES];
    uint32_t occurrence;
    int64_t line;
    int32_t row0, rows; /* its rows */
};

struct rt_micro {
    struct rt_micro_options o;
    int64_t n, n_seq, rows, kl_rows, feature_rows, n_spans;
    int32_t *ids, *cu;       /* [tokens], [n_seq + 1] */
    struct rt_micro_seq *seq; /* [n_seq] */
    int32_t *index, *label;  /* [rows] token, next token (-1: no cross-entropy) */
    uint8_t *kl_mask;        /* [rows] */
    int id_bits;             /* of a teacher's id: as many as o.vocab needs */
    uint32_t *top_ids;       /* [rows] of k ids, id_bits each (core/top_ids.h) */
    float *top_logp;         /* [rows, k] */
    int32_t *span;           /* [rows] rows of the span that ends here, 0: none; NULL without o.spans, as the next two */
    float *span_logp;        /* [rows] the teacher's */
    uint8_t *span_boundary;  /* [rows] 1: it counts a boundary coming next, which row + 1 predicts */
    int32_t *feature_index;  /* [feature_rows] token */
    float *feature[RT_MAX_FEATURES]; /* [feature_rows, dim] of pair p */
};

/* Host memory for o->tokens tokens. map is borrowed. */
enum rt_status rt_micro_create(struct rt_micro *p, const struct rt_micro_options *o, struct rt_err *err);
void rt_micro_free(struct rt_micro *p); /* zeroed is fine */
size_t rt_micro_bytes(const struct rt_micro_options *o);
void rt_micro_clear(struct rt_micro *p);
/* Appends a sequence. *full: it does not fit, nothing was changed. REFUSED: an id beyond the vocabulary, more ids a row than k. */
enum rt_status rt_micro_add(struct rt_micro *p, struct rt_train_set *set, const struct rt_order_item *item, bool *full, struct rt_err *err);
/* The same from rows that were read already; the set's own description is all that is read of it, so that any thread may. */
enum rt_status rt_micro_put(struct rt_micro *p, const struct rt_train_set *set, const struct rt_order_item *item, const struct rt_rows *rows, bool *full,
                            struct rt_err *err);
/* Appends what was packed elsewhere, with the same options but for tokens: the bytes that putting its sequences here would give. */
void rt_micro_append(struct rt_micro *p, const struct rt_micro *part, bool *full);

#endif
