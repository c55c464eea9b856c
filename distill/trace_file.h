/* OUT/traces.jsonl in prompt order, whatever the order of finishing, and nothing lost that had finished.
 *
 * Sample s of prompt p (both from 0) has place p * samples + s. traces.jsonl holds the places 0 .. n-1, whole prompts only, appended in
 * order. What finishes earlier than its turn waits in memory and, for the case of a kill, in OUT/pending.jsonl, which is
 * rewritten when it gets long and removed at the end. After a kill only sequences that were running are generated again.
 */
#ifndef RT_DISTILL_TRACE_FILE_H
#define RT_DISTILL_TRACE_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

struct rt_trace_file;

/* window: prompts that may be open at a time (memory). Reads what an earlier run left: cuts a torn tail off traces.jsonl, takes what
 * pending.jsonl holds. FORMAT where traces.jsonl is not what such a run writes; it is left as it is. */
enum rt_status rt_trace_file_open(const char *dir, int samples, int64_t window, struct rt_trace_file **out, struct rt_err *err);
void rt_trace_file_close(struct rt_trace_file *f); /* NULL is fine */

int64_t rt_trace_file_done(const struct rt_trace_file *f);                /* prompts wholly in traces.jsonl */
int64_t rt_trace_file_kept(const struct rt_trace_file *f);                /* samples on disk, in either file */
bool rt_trace_file_has(const struct rt_trace_file *f, int64_t prompt, int sample);
/* May prompt p be started? Not so far ahead of the first unfinished one that its line could not wait. */
bool rt_trace_file_room(const struct rt_trace_file *f, int64_t prompt);
/* The line (without newline; it must hold "index": p and "sample": s) of a sample that is not there yet. */
enum rt_status rt_trace_file_put(struct rt_trace_file *f, int64_t prompt, int sample, const char *line, size_t n, struct rt_err *err);
/* What was put is on the disk. With finished, pending.jsonl goes. */
enum rt_status rt_trace_file_sync(struct rt_trace_file *f, bool finished, struct rt_err *err);

#endif
