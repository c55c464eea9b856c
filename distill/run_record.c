#include "distill/run_record.h"

#include <string.h>

#include "core/io.h"

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

enum rt_status rt_record_eval(const char *dir, const struct rt_json *line, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    char path[PATH_CAP];
    RT_TRY(rt_path_join(path, sizeof path, dir, RT_EVAL_FILE, err));
    RT_TRY(rt_json_dump(line, 0, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    RT_TRY(rt_file_append_sync(path, text.data, text.len, err));
out:
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_record_eval_truncate(const char *dir, int64_t step, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0}, kept = {0};
    struct rt_json *line = NULL;
    char path[PATH_CAP];
    RT_TRY(rt_path_join(path, sizeof path, dir, RT_EVAL_FILE, err));
    if (!rt_path_exists(path))
        goto out;
    RT_TRY(rt_file_read_all(path, max_eval_bytes, &text, err));
    for (size_t at = 0; at < text.len;) {
        const char *end = memchr(text.data + at, '\n', text.len - at);
        int64_t s;
        if (end == NULL)
            break;
        const size_t len = (size_t)(end - text.data) - at;
        RT_TRY(rt_json_parse(text.data + at, len, path, &line, err));
        RT_TRY(rt_json_int(line, "step", 0, INT64_MAX, &s, err));
        if (s <= step)
            RT_TRY(rt_buf_append(&kept, text.data + at, len + 1, err));
        rt_json_free(line);
        line = NULL;
        at += len + 1;
    }
    if (kept.len < text.len)
        RT_TRY(rt_publish_bytes(path, kept.data, kept.len, err));
out:
    rt_json_free(line);
    rt_buf_free(&text);
    rt_buf_free(&kept);
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
