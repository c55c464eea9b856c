/* JSON values (jansson behind an opaque type): configuration files, JSON lines, reports.
 *
 * Parsing refuses: more than the given bytes, duplicate keys, depth over 64, invalid UTF-8, trailing bytes. Errors are FORMAT
 * with source, line and column. Getters name source and key, what was expected and what was found. Numbers that a file
 * writes as reals are accepted as integers only if they are whole. A value stays valid as long as its root.
 */
#ifndef RT_FORMATS_JSON_H
#define RT_FORMATS_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_json; /* a value inside a document, or a root */

/* Roots: free with rt_json_free. `source` (a path, or "PATH:LINE") is kept for messages. */
enum rt_status rt_json_parse(const char *text, size_t len, const char *source, struct rt_json **out, struct rt_err *err);
enum rt_status rt_json_load(const char *path, size_t max_bytes, struct rt_json **out, struct rt_err *err);
void rt_json_free(struct rt_json *root); /* NULL is fine */

enum rt_json_type { RT_JSON_NULL, RT_JSON_BOOL, RT_JSON_INT, RT_JSON_REAL, RT_JSON_STRING, RT_JSON_ARRAY, RT_JSON_OBJECT };
enum rt_json_type rt_json_typeof(const struct rt_json *v);
const char *rt_json_source(const struct rt_json *v);

/* Member of an object; NULL where absent, or v is no object. */
const struct rt_json *rt_json_get(const struct rt_json *v, const char *key);
/* Length of an array or object, 0 else; item i of an array. */
size_t rt_json_len(const struct rt_json *v);
const struct rt_json *rt_json_at(const struct rt_json *v, size_t i);
/* Members in file order: i-th key and value of an object. O(1) amortised over ascending i. */
bool rt_json_member(const struct rt_json *v, size_t i, const char **key, const struct rt_json **value);

/* Value itself. Strings may hold 0 bytes: use the length. */
bool rt_json_as_int(const struct rt_json *v, int64_t *out);
bool rt_json_as_double(const struct rt_json *v, double *out);
bool rt_json_as_bool(const struct rt_json *v, bool *out);
const char *rt_json_as_string(const struct rt_json *v, size_t *len); /* NULL if it is none; len may be NULL */

/* Required members: FORMAT where absent or of another type or (int) outside [min, max]. */
enum rt_status rt_json_int(const struct rt_json *obj, const char *key, int64_t min, int64_t max, int64_t *out, struct rt_err *err);
enum rt_status rt_json_double(const struct rt_json *obj, const char *key, double *out, struct rt_err *err);
enum rt_status rt_json_string(const struct rt_json *obj, const char *key, const char **out, struct rt_err *err);
/* Optional members: `def` where absent or null; else as above. */
enum rt_status rt_json_int_or(const struct rt_json *obj, const char *key, int64_t min, int64_t max, int64_t def, int64_t *out, struct rt_err *err);
enum rt_status rt_json_double_or(const struct rt_json *obj, const char *key, double def, double *out, struct rt_err *err);
enum rt_status rt_json_bool_or(const struct rt_json *obj, const char *key, bool def, bool *out, struct rt_err *err);
enum rt_status rt_json_string_or(const struct rt_json *obj, const char *key, const char *def, const char **out, struct rt_err *err);

/* Building. The root owns what is added; adders return NOMEM only. A number that is not finite is written as null. */
enum rt_status rt_json_new_object(struct rt_json **out, struct rt_err *err);
enum rt_status rt_json_new_array(struct rt_json **out, struct rt_err *err);
/* obj[key] = value, replacing. For arrays key is NULL: appends. */
enum rt_status rt_json_set_int(struct rt_json *v, const char *key, int64_t value, struct rt_err *err);
enum rt_status rt_json_set_double(struct rt_json *v, const char *key, double value, struct rt_err *err);
enum rt_status rt_json_set_bool(struct rt_json *v, const char *key, bool value, struct rt_err *err);
enum rt_status rt_json_set_null(struct rt_json *v, const char *key, struct rt_err *err);
enum rt_status rt_json_set_string(struct rt_json *v, const char *key, const char *s, struct rt_err *err);
enum rt_status rt_json_set_string_n(struct rt_json *v, const char *key, const char *s, size_t n, struct rt_err *err);
enum rt_status rt_json_set_copy(struct rt_json *v, const char *key, const struct rt_json *value, struct rt_err *err); /* deep copy */
enum rt_status rt_json_set_object(struct rt_json *v, const char *key, struct rt_json **child, struct rt_err *err);
enum rt_status rt_json_set_array(struct rt_json *v, const char *key, struct rt_json **child, struct rt_err *err);

/* Appends the text. indent 0: one line, no spaces after separators; else pretty. Member order is kept; reals that were parsed are
 * printed as they were written (integers outside int64 with all their digits), others with the fewest digits (up to 17) that read back equal. */
enum rt_status rt_json_dump(const struct rt_json *v, int indent, struct rt_buf *out, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
