#include "distill/run_record.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/eval_key.h"
#include "formats/unicode.h"

enum { PATH_CAP = 4096 };
static const size_t max_eval_bytes = (size_t)256 << 20;

enum rt_status rt_record_publish(const char *dir, const char *name, const struct rt_json *root, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    char path[PATH_CAP];
    RT_TRY(rt_path_join(path, sizeof path, dir, name, err));
    RT_TRY(rt_json_dump(root, 2, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    RT_TRY(rt_publish_bytes(path, text.data, text.len, err));
out:
    rt_buf_free(&text);
    return st;
}

/* Names of per-sequence files: the n-th that a measurement of this name and step may have. */
static void file_name(char out[256], const char *name, int64_t step, int n)
{
    if (n == 1)
        snprintf(out, 256, RT_EVAL_DIR "/%s-%" PRId64 ".jsonl", name, step);
    else
        snprintf(out, 256, RT_EVAL_DIR "/%s.%d-%" PRId64 ".jsonl", name, n, step);
}

/* What stays of DIR/eval.jsonl. */
struct stays {
    const struct rt_eval_key *key; /* all but the measurement of `key` at `step`; NULL: those of steps up to `step` */
    int64_t step;
    struct rt_buf kept;      /* lines */
    struct rt_json *files;   /* NULL, or their per-sequence files: names of an object */
    bool changed;            /* there is a line that was not kept, or a torn one */
};

static bool stays(const struct stays *o, const struct rt_json *line, int64_t step)
{
    struct rt_eval_key was;
    if (o->key == NULL)
        return step <= o->step;
    rt_eval_key_read(line, &was);
    return step != o->step || !rt_eval_key_same(&was, o->key);
}

static enum rt_status read_stays(const char *path, struct stays *o, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    struct rt_json *line = NULL;
    if (!rt_path_exists(path))
        goto out;
    RT_TRY(rt_file_read_all(path, max_eval_bytes, &text, err));
    for (size_t at = 0; at < text.len;) {
        const char *end = memchr(text.data + at, '\n', text.len - at), *file = "";
        int64_t s;
        if (end == NULL)
            break;
        const size_t len = (size_t)(end - text.data) - at;
        rt_json_free(line);
        line = NULL;
        RT_TRY(rt_json_parse(text.data + at, len, path, &line, err));
        RT_TRY(rt_json_int(line, "step", 0, INT64_MAX, &s, err));
        if (o->files != NULL)
            RT_TRY(rt_json_string_or(line, "per_sequence", "", &file, err));
        if (stays(o, line, s)) {
            RT_TRY(rt_buf_append(&o->kept, text.data + at, len + 1, err));
            if (file[0] != '\0' && rt_json_get(o->files, file) == NULL)
                RT_TRY(rt_json_set_bool(o->files, file, true, err));
        }
        at += len + 1;
    }
    o->changed = o->kept.len < text.len;
out:
    rt_json_free(line);
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_record_eval(const char *dir, struct rt_json *line, const struct rt_buf *rows, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    struct rt_eval_key key;
    struct stays o = {.key = &key};
    char path[PATH_CAP], file[256];
    rt_eval_key_read(line, &key);
    RT_TRY(rt_json_int(line, "step", 0, INT64_MAX, &o.step, err));
    RT_TRY(rt_json_new_object(&o.files, err));
    RT_TRY(rt_path_join(path, sizeof path, dir, RT_EVAL_FILE, err));
    RT_TRY(read_stays(path, &o, err));
    for (int n = 1; n == 1 || rt_json_get(o.files, file) != NULL; n++)
        file_name(file, key.name, o.step, n);
    RT_TRY(rt_json_set_string(line, "per_sequence", file, err));
    RT_TRY(rt_path_join(path, sizeof path, dir, RT_EVAL_DIR, err));
    RT_TRY(rt_mkdirs(path, err));
    RT_TRY(rt_path_join(path, sizeof path, dir, file, err));
    RT_TRY(rt_publish_bytes(path, rows->data, rows->len, err));
    RT_TRY(rt_path_join(path, sizeof path, dir, RT_EVAL_FILE, err));
    if (o.changed)
        RT_TRY(rt_publish_bytes(path, o.kept.data, o.kept.len, err));
    RT_TRY(rt_json_dump(line, 0, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    RT_TRY(rt_file_append_sync(path, text.data, text.len, err));
out:
    rt_json_free(o.files);
    rt_buf_free(&o.kept);
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_record_eval_truncate(const char *dir, int64_t step, struct rt_err *err)
{
    enum rt_status st;
    struct stays o = {.step = step};
    char path[PATH_CAP];
    RT_TRY(rt_path_join(path, sizeof path, dir, RT_EVAL_FILE, err));
    RT_TRY(read_stays(path, &o, err));
    if (o.changed)
        RT_TRY(rt_publish_bytes(path, o.kept.data, o.kept.len, err));
out:
    rt_buf_free(&o.kept);
    return st;
}

void rt_record_name(const char *path, char out[128])
{
    size_t n = strlen(path), begin, len;
    while (n > 1 && path[n - 1] == '/')
        n--;
    for (begin = n; begin > 0 && path[begin - 1] != '/';)
        begin--;
    len = n - begin;
    if ((len == 1 && path[begin] == '.') || (len == 2 && path[begin] == '.' && path[begin + 1] == '.')) {
        char *real = realpath(path, NULL);
        if (real != NULL && strcmp(real, "/") != 0)
            rt_record_name(real, out);
        else
            snprintf(out, 128, "root");
        free(real);
        return;
    }
    len = rt_utf8_prefix(path + begin, len < 120 ? len : 120);
    snprintf(out, 128, "%.*s", (int)len, path + begin);
}

enum rt_status rt_record_run(const char *run, struct rt_json **out, struct rt_err *err)
{
    enum rt_status st;
    char file[PATH_CAP];
    *out = NULL;
    RT_TRY(rt_path_join(file, sizeof file, run, RT_RUN_FILE, err));
    if (!rt_path_exists(file))
        goto out;
    RT_TRY(rt_json_load(file, (size_t)64 << 20, out, err));
    if (rt_json_typeof(*out) != RT_JSON_OBJECT)
        RT_FAIL(err, FORMAT, "%s: expected a JSON object", file);
out:
    if (st != RT_OK) {
        rt_json_free(*out);
        *out = NULL;
    }
    return st;
}

enum rt_status rt_record_student(const char *path, char *out, size_t cap, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char dir[PATH_CAP], file[PATH_CAP];
    RT_TRY(rt_path_join(file, sizeof file, path, RT_RUN_FILE, err));
    if (!rt_path_exists(file)) {
        RT_TRY(rt_path_join(out, cap, path, ".", err));
        out[strlen(out) - 2] = '\0';
        goto out;
    }
    RT_TRY(rt_path_join(dir, sizeof dir, path, RT_MODEL_DIR, err));
    RT_TRY(rt_path_join(file, sizeof file, dir, "config.json", err));
    if (!rt_path_exists(file))
        RT_FAIL(err, REFUSED, "%s: a run without a model yet: the same train command with the same --out finishes it", path);
    RT_TRY(rt_path_join(out, cap, path, RT_MODEL_DIR, err));
out:
    return st;
}
