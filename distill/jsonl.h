/* JSON lines of files that may still be written: rt_lines, parsed.
 *
 * Blank lines are skipped. A last line without its newline that is no JSON is a torn write: it ends the file, and `torn` says so. Any
 * other line that is no JSON object is FORMAT.
 */
#ifndef RT_DISTILL_JSONL_H
#define RT_DISTILL_JSONL_H

#include "distill/lines.h"

struct rt_jsonl {
    struct rt_lines lines;
    bool torn;
    struct rt_json *value;
};

enum rt_status rt_jsonl_open(const char *path, struct rt_jsonl *out, struct rt_err *err);
void rt_jsonl_close(struct rt_jsonl *f); /* a zeroed one is fine */
/* *v: the next line, valid until the next call; NULL after the last. */
enum rt_status rt_jsonl_next(struct rt_jsonl *f, const struct rt_json **v, struct rt_err *err);

#endif
