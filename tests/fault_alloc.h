/* Allocations that fail on request, and what the others add up to: tests only.
 *
 * The test binary is linked with --wrap for malloc, calloc, realloc, posix_memalign, aligned_alloc, strdup, free and mmap, and for
 * the entries of zlib, PCRE2 and pthread that take memory on our behalf. So every allocation that the code under test
 * asks for passes here, in every thread, with the sanitizers or without. jansson's own are counted but never fail: it would abort.
 */
#ifndef RT_TESTS_FAULT_ALLOC_H
#define RT_TESTS_FAULT_ALLOC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Counts from here on. Allocation number `fail_at` (from 1) fails, with `sticky` all later ones too; 0: none does. */
void fault_arm(int64_t fail_at, bool sticky);
/* Allocations since fault_arm; none fails any more. */
int64_t fault_disarm(void);
/* Whether one failed since fault_arm. */
bool fault_fired(void);

struct fault_use {
    size_t largest; /* bytes of the greatest single allocation that the arming thread asked for: OpenBLAS's threads take 128 MB each when they begin */
    int64_t peak;   /* most bytes held at one time, beyond those held at fault_arm */
};
struct fault_use fault_use(void);

#endif
