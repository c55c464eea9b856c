/* Pages of the caches of generation: which of them a slot's positions lie in (struct rt_cache_pages, core/backend.h). Host only.
 *
 * A slot holds its first positions in pages of `len`, taken from one heap as it grows; slots may share whole pages of a common beginning. A shared
 * page is never written: who shares n positions writes from n on.
 */
#ifndef RT_CORE_PAGES_H
#define RT_CORE_PAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_pages {
    int slots, cols; /* cols: pages that a slot can have */
    int32_t len, total;
    int32_t *table;  /* [slots][cols]; columns a slot has not are 0 */
    int32_t *used;   /* [slots]: columns that it has */
    bool *changed;   /* [slots]: the row was written since somebody cleared this */
    int32_t *owners; /* [total] */
    int32_t *heap;   /* [n_free] free pages */
    int32_t n_free;
};

enum rt_status rt_pages_create(int slots, int cols, int32_t len, int32_t total, struct rt_pages *out, struct rt_err *err);
void rt_pages_free(struct rt_pages *p); /* a zeroed one is fine */

/* Gives the slot pages for `tokens` positions, if after that `spare` pages are free, or as many as the other slots that have any can still ask for; else
 * nothing happens and the answer is false. */
bool rt_pages_room(struct rt_pages *p, int slot, int64_t tokens, int spare);
/* Gives back the pages behind the first `keep` positions. */
void rt_pages_drop(struct rt_pages *p, int slot, int64_t keep);
/* dst loses its pages and has the first `tokens` positions of src: whole pages shared, the rest in a page of its own, *to, whose first *rows positions the
 * caller copies from page *from (*rows 0: nothing to copy). False: no page is left for that, and dst has none. */
bool rt_pages_share(struct rt_pages *p, int src, int dst, int64_t tokens, int32_t *from, int32_t *to, int64_t *rows);

#ifdef __cplusplus
}
#endif
#endif
