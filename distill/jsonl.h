/* JSON lines, one at a time, from files that may still be written.
 *
 * Memory is bounded by the longest line (RT_JSONL_MAX). Blank lines are skipped. A last line without its newline that is no
 * JSON is a torn write: it ends the file, and `torn` says so. Any other line that is no JSON object is FORMAT.
 */
#ifndef RT_DISTILL_JSONL_H
#define RT_DISTILL_JSONL_H

#include <stdbool.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"
#include "formats/json.h"

enum { RT_JSONL_MAX = 16 << 20 };

struct rt_jsonl {
    char path[4096];
    int fd;
    uint64_t size, read; /* bytes of the file, and of them in or before the window */
    struct rt_buf window;
    size_t at;
    int64_t line;         /* of the last value, from 1 */
    bool torn;
    struct rt_json *value;
};

enum rt_status rt_jsonl_open(const char *path, struct rt_jsonl *out, struct rt_err *err);
void rt_jsonl_close(struct rt_jsonl *f); /* a zeroed one is fine */
/* *v: the next line, valid until the next call; NULL after the last. */
enum rt_status rt_jsonl_next(struct rt_jsonl *f, const struct rt_json **v, struct rt_err *err);

#endif
