/* Regular expressions of tokenizer files (Oniguruma's syntax), run by PCRE2.
 *
 * What both read alike is passed on; what they spell differently is rewritten (\s and \S as the property White_Space, \d, \v,
 * \uHHHH, a class intersection [A&&[^B]]); anything else is refused by name, so that a pattern never means something else
 * than its author meant. Each search has a step limit that grows with the text.
 */
#ifndef RT_FORMATS_PATTERN_H
#define RT_FORMATS_PATTERN_H

#include <stdbool.h>
#include <stddef.h>

#include "core/mem.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_PATTERN_MAX = 4096 }; /* bytes of a pattern */

/* Appends the pattern as PCRE2 reads it. UNSUPPORTED names what cannot be rewritten. */
enum rt_status rt_pattern_translate(const char *text, size_t len, struct rt_buf *out, struct rt_err *err);
/* Appends a pattern that matches text itself. */
enum rt_status rt_pattern_quote(const char *text, size_t len, struct rt_buf *out, struct rt_err *err);

struct rt_pattern;
/* Compiles what rt_pattern_translate or rt_pattern_quote made. */
enum rt_status rt_pattern_create(const char *pcre, size_t len, struct rt_pattern **out, struct rt_err *err);
void rt_pattern_free(struct rt_pattern *p); /* NULL is fine */
/* The first match in s[from .. len) (s: valid UTF-8; what stands before `from` can be seen by look-behind). *found false:
 * none. UNSUPPORTED where the step limit is reached. Uses scratch in p: one caller at a time. */
enum rt_status rt_pattern_find(struct rt_pattern *p, const char *s, size_t len, size_t from, bool *found, size_t *begin,
                               size_t *end, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
