/* Memory: checked sizes, growing byte buffers, bump arenas.
 *
 * An engine borrows arenas that its caller owns, one for each lifetime (weights, activations, gradients, optimiser,
 * scratch): a size is computed first, one block is taken, and pointers are cut from it. Everything here is host memory;
 * device memory comes from a backend and is cut by the same arena (an arena never touches the bytes it hands out).
 */
#ifndef RT_CORE_MEM_H
#define RT_CORE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* a * b and a + b; false (and *out unspecified) where the result would not fit. */
bool rt_mul_size(size_t a, size_t b, size_t *out);
bool rt_add_size(size_t a, size_t b, size_t *out);

/* *out = n * size zeroed bytes, 64-byte aligned; free with rt_free. n * size == 0 gives a valid pointer.
 * Error NOMEM names `what` and the bytes. */
enum rt_status rt_alloc(size_t n, size_t size, const char *what, void *out_ptr_to_ptr, struct rt_err *err);
void rt_free(void *p); /* NULL is fine */

/* Growing bytes. A zeroed struct is an empty buffer. After a failed append the buffer is as it was. */
struct rt_buf {
    char *data; /* NULL while cap == 0 */
    size_t len, cap;
};
enum rt_status rt_buf_reserve(struct rt_buf *b, size_t extra, struct rt_err *err);
enum rt_status rt_buf_append(struct rt_buf *b, const void *data, size_t n, struct rt_err *err);
enum rt_status rt_buf_printf(struct rt_buf *b, struct rt_err *err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Appends s, and a terminating 0 that does not count in len. */
enum rt_status rt_buf_puts(struct rt_buf *b, const char *s, struct rt_err *err);
void rt_buf_free(struct rt_buf *b); /* releases and zeroes *b */

/* Bump arena over a block that somebody else owns. Blocks are 64-byte aligned if base is. */
struct rt_arena {
    char *base;
    size_t size, used, peak;
    const char *name; /* for messages */
};
void rt_arena_init(struct rt_arena *a, void *base, size_t size, const char *name);
/* *out = bytes from the arena, not zeroed. NOMEM names the arena, what was asked and what is left. */
enum rt_status rt_arena_alloc(struct rt_arena *a, size_t bytes, void *out_ptr_to_ptr, struct rt_err *err);
/* mark = a->used; rt_arena_reset(a, mark) gives back everything taken since. */
void rt_arena_reset(struct rt_arena *a, size_t mark);
/* What n bytes occupy in an arena: rounded up to 64. */
size_t rt_arena_round(size_t n);

#ifdef __cplusplus
}
#endif
#endif
