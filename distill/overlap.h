/* How two tokenizers cut the same text: what of a teacher's rows a student could have, told before a teacher has scored anything. */
#ifndef RT_DISTILL_OVERLAP_H
#define RT_DISTILL_OVERLAP_H

#include "core/mem.h"
#include "distill/retarget_align.h"
#include "formats/tokenizer.h"

enum { RT_OVERLAP_TOP = 5 };

struct rt_overlap_counts {
    int64_t texts, left_out; /* left out, as `retarget` does: no text, not UTF-8, not in NFC, or changed by a tokenizer */
    int64_t bytes, teacher, student; /* tokens */
    int64_t kind[RT_PLACE_KINDS];    /* the student's tokens by how they lie (distill/retarget_align.h) */
    int64_t boundary;        /* ... that begin where a teacher token does */
    int64_t blank;           /* ... that are white space alone */
    int64_t blank_exact;     /* ... of which the place is WHOLE, HEAD or INSIDE: `retarget` makes no row of these either */
    int64_t digits, digits_whole; /* ... that are ASCII digits alone; of these WHOLE */
    int64_t longest;         /* most tokens, on either side, between two ends in common */
};

/* Borrows the tokenizers and uses them to encode (one caller at a time). A zeroed struct is closed. */
struct rt_overlap {
    struct rt_tokenizer *teacher, *student;
    struct rt_overlap_counts c;
    uint32_t *crossing;      /* [rt_tokenizer_n_ids(student)] how often each crossed */
    struct rt_encoding t, s; /* scratch */
    struct rt_buf place;     /* scratch */
};
enum rt_status rt_overlap_open(struct rt_overlap *o, struct rt_tokenizer *teacher, struct rt_tokenizer *student, struct rt_err *err);
void rt_overlap_close(struct rt_overlap *o);
void rt_overlap_clear(struct rt_overlap *o); /* counts = 0 */
/* += one text; special tokens in it are found as text has them. What the tokenizers answer. */
enum rt_status rt_overlap_add(struct rt_overlap *o, const char *text, size_t len, struct rt_err *err);
/* The student's tokens of which the rows are decided by bytes: WHOLE, HEAD and INSIDE. */
int64_t rt_overlap_exact(const struct rt_overlap_counts *c);
/* ids [RT_OVERLAP_TOP] of the commonest crossing tokens, by descending count, then ascending id; how many there are. */
int rt_overlap_top(const struct rt_overlap *o, uint32_t ids[RT_OVERLAP_TOP]);

#endif
