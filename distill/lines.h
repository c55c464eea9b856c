/* Lines of a file or of stdin, read front to back: JSON lines that need no tokenizer. */
#ifndef RT_DISTILL_LINES_H
#define RT_DISTILL_LINES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"
#include "formats/json.h"

struct rt_lines {
    int fd;
    bool all;             /* the end of the file was met */
    struct rt_buf window; /* read and not yet handed out from `at` on */
    size_t at;
    int64_t line;         /* of the last one, 1-based */
    uint64_t end_offset;  /* bytes up to and with its newline */
    bool torn;            /* the last one had no newline */
    char path[4096], where[4096 + 32]; /* "FILE:LINE" */
};

/* path NULL: stdin. IO names the path. */
enum rt_status rt_lines_open(const char *path, struct rt_lines *out, struct rt_err *err);
void rt_lines_close(struct rt_lines *l); /* a zeroed one is fine */
/* The next line that is not blank, without its newline, valid until the next call. FORMAT over RT_LINE_MAX bytes. */
enum rt_status rt_lines_next(struct rt_lines *l, const char **s, size_t *n, bool *end, struct rt_err *err);
/* The same as a JSON object; the caller frees it. FORMAT "FILE:LINE: ...". */
enum rt_status rt_lines_next_json(struct rt_lines *l, struct rt_json **out, bool *end, struct rt_err *err);

/* Appends s with each byte that starts no well-formed character replaced by U+FFFD; *lossy is set where there is one, else left. */
enum rt_status rt_put_utf8(const char *s, size_t n, struct rt_buf *out, bool *lossy, struct rt_err *err);

#endif
