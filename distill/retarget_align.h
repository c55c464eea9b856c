/* Two tokenisations of one text, laid over each other by the bytes at which their tokens end.
 *
 * Both sides count the same units from the same origin: bytes of the aligned text, and one unit for the token that ends a
 * turn, whatever it is called on either side. Nothing before the origin is aligned: a prompt is rendered by each side's own
 * template and has no units. Cost O(teacher tokens + student tokens).
 */
#ifndef RT_DISTILL_RETARGET_ALIGN_H
#define RT_DISTILL_RETARGET_ALIGN_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

/* One tokenisation. Token i in [first, n) covers the units [i > first ? end[i-1] : begin, end[i]). */
struct rt_side {
    const uint32_t *ids;    /* [n] of the whole sequence */
    const uint32_t *end;    /* [n]; entries below first are not read. Ascending, not strictly */
    const uint8_t *target;  /* [n] 1: the loss mask has it. NULL: all from first on */
    int64_t first, n;
    uint32_t begin;         /* unit at which token `first` begins: above 0 where the other side's text begins earlier */
};

/* How a student token [a, b) lies on the teacher's tokens; T: the bounds of the teacher token that holds unit a. */
enum rt_place_kind {
    RT_PLACE_NONE,     /* no teacher token lies there, or one that is no target */
    RT_PLACE_WHOLE,    /* a and b are the bounds of one teacher token */
    RT_PLACE_HEAD,     /* a is its beginning, b lies inside */
    RT_PLACE_INSIDE,   /* a lies inside, b inside or at its end */
    RT_PLACE_CROSSING, /* b lies in a later teacher token, or at its end */
    RT_PLACE_KINDS
};
struct rt_place {
    uint8_t kind;
    uint8_t ends;    /* 1: b is also the end of a teacher token, which is `last` */
    uint32_t offset; /* a minus the beginning of the teacher token */
    int64_t teacher; /* the token that holds a; -1: none */
    int64_t last;    /* the token that holds b - 1; -1: none */
};

/* place [s->n], = for i in [s->first, s->n), the others become NONE. A student token that is no target becomes NONE. Tokens
 * without units (empty ones) become NONE. */
void rt_align(const struct rt_side *t, const struct rt_side *s, struct rt_place *place);

#endif
