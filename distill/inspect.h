/* What a path is, recognised by content, as a JSON object; and that object as text. For `inspect`. */
#ifndef RT_DISTILL_INSPECT_H
#define RT_DISTILL_INSPECT_H

#include <stdbool.h>

#include "core/mem.h"
#include "core/status.h"
#include "formats/json.h"
#include "formats/template.h"
#include "formats/tokenizer.h"

enum rt_kind {
    RT_KIND_TEACHER, RT_KIND_STUDENT, RT_KIND_TENSORS, RT_KIND_TOKENIZER, RT_KIND_SHARDS, RT_KIND_DATASET, RT_KIND_RUN,
    RT_KIND_EXPERIMENT, RT_KIND_CHECKPOINT, RT_KIND_COUNT
};
const char *rt_kind_name(enum rt_kind k); /* "teacher", "shards", ... */

/* Looks at names and first bytes only. IO: no such path; FORMAT: nothing that is known, names what was looked for. */
enum rt_status rt_kind_of(const char *path, enum rt_kind *out, struct rt_err *err);

struct rt_inspect_options {
    const char *tokenizer; /* a model directory: counts the tokens of a dataset with it; NULL: none */
    bool tensors;          /* models: the list of tensors */
    bool verify;           /* shards, checkpoints: every byte against its checksum */
};
/* obj += {"kind","path", ...}. Errors: those of the files. */
enum rt_status rt_inspect(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err);

/* One kind each; obj gets the members behind "kind" and "path". */
enum rt_status rt_inspect_teacher(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err);
enum rt_status rt_inspect_student(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err);
enum rt_status rt_inspect_tensors(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err);
enum rt_status rt_inspect_tokenizer(const char *path, struct rt_json *obj, struct rt_err *err);
enum rt_status rt_inspect_shards(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err);
enum rt_status rt_inspect_dataset(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err);
enum rt_status rt_inspect_run(const char *path, struct rt_json *obj, struct rt_err *err);
enum rt_status rt_inspect_experiment(const char *path, struct rt_json *obj, struct rt_err *err);
enum rt_status rt_inspect_checkpoint(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err);

/* obj.state and obj.last_run of a directory of `traces`, whose traces.jsonl has so many lines. */
enum rt_status rt_inspect_traces(const char *path, int64_t lines, struct rt_json *obj, struct rt_err *err);

/* obj.tokenizer and obj.template of a model directory; null where it has none, {"problem": text} where it cannot be used. */
enum rt_status rt_inspect_text_side(const char *dir, struct rt_json *obj, struct rt_err *err);

/* Appends any such object as text: members as "name  value" lines, objects as paragraphs, lists of objects as tables with
 * right-aligned numbers. Members whose names end in "bytes" are shown in units, counts with separators. */
enum rt_status rt_inspect_print(const struct rt_json *obj, struct rt_buf *out, struct rt_err *err);

#endif
