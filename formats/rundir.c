#include "formats/rundir.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/io.h"

enum { MAX_CONFIG = 16 << 20, MAX_METRICS = 1 << 30 };

enum rt_status rt_run_config(const char *command, const struct rt_opt *const *tables, int n_tables, const void *values,
                             struct rt_json **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL, *options, *runtime;
    struct rt_buf text = {0};
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_string(v, "command", command, err));
    RT_TRY(rt_json_set_object(v, "options", &options, err));
    RT_TRY(rt_json_set_object(v, "runtime", &runtime, err));
    for (int t = 0; t < n_tables; t++)
        for (const struct rt_opt *o = tables[t]; o->name != NULL; o++) {
            text.len = 0;
            RT_TRY(rt_options_value(o, values, &text, err));
            RT_TRY(rt_json_set_string_n(o->runtime ? runtime : options, o->name, text.data != NULL ? text.data : "", text.len, err));
        }
    *out = v;
    v = NULL;
out:
    rt_buf_free(&text);
    rt_json_free(v);
    return st;
}

static enum rt_status text_of(const struct rt_json *v, struct rt_buf *out, struct rt_err *err)
{
    out->len = 0;
    enum rt_status st = v != NULL ? rt_json_dump(v, 0, out, err) : rt_buf_puts(out, "(absent)", err);
    if (st == RT_OK)
        st = rt_buf_append(out, "", 1, err); /* a terminating 0 */
    return st;
}

/* runtime: names of options that do not count. */
static enum rt_status diff(const char *path, const struct rt_json *was, const struct rt_json *now, const struct rt_json *runtime, bool *differ,
                           struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf a = {0}, b = {0};
    char below[512];
    const char *key;
    const struct rt_json *v;
    const bool top = path[0] == '\0';
    if (was != NULL && now != NULL && rt_json_typeof(was) == RT_JSON_OBJECT && rt_json_typeof(now) == RT_JSON_OBJECT) {
        for (size_t i = 0; rt_json_member(was, i, &key, &v); i++) {
            if ((top && strcmp(key, "runtime") == 0) || (strcmp(path, "options") == 0 && rt_json_get(runtime, key) != NULL))
                continue;
            snprintf(below, sizeof below, "%s%s%s", path, top ? "" : ".", key);
            RT_TRY(diff(below, v, rt_json_get(now, key), runtime, differ, out, err));
        }
        for (size_t i = 0; rt_json_member(now, i, &key, &v); i++) {
            if ((top && strcmp(key, "runtime") == 0) || rt_json_get(was, key) != NULL)
                continue;
            snprintf(below, sizeof below, "%s%s%s", path, top ? "" : ".", key);
            RT_TRY(diff(below, NULL, v, runtime, differ, out, err));
        }
        goto out;
    }
    RT_TRY(text_of(was, &a, err));
    RT_TRY(text_of(now, &b, err));
    if (strcmp(a.data, b.data) != 0) {
        RT_TRY(rt_buf_printf(out, err, "%s%s: was %.200s, now %.200s", *differ ? "\n" : "", path, a.data, b.data));
        *differ = true;
    }
out:
    rt_buf_free(&a);
    rt_buf_free(&b);
    return st;
}

enum rt_status rt_config_diff(const struct rt_json *was, const struct rt_json *now, bool *differ, struct rt_buf *out,
                              struct rt_err *err)
{
    *differ = false;
    return diff("", was, now, rt_json_get(now, "runtime"), differ, out, err);
}

/* Whole lines of `text` within `room` bytes (at least one, cut where it alone is longer); *left = lines that were left out. */
static int whole_lines(const struct rt_buf *text, size_t room, int *left)
{
    size_t n = 0;
    *left = 0;
    for (size_t at = 0; at < text->len;) {
        const char *end = memchr(text->data + at, '\n', text->len - at);
        const size_t next = end != NULL ? (size_t)(end - text->data) : text->len;
        if (next <= room)
            n = next;
        else if (at == 0)
            n = room;
        else
            ++*left;
        at = next + 1;
    }
    return (int)n;
}

static enum rt_status compare(const char *dir, const char *path, const struct rt_json *config, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *was = NULL;
    struct rt_buf lines = {0};
    char more[32] = "";
    int left;
    bool differ;
    RT_TRY(rt_json_load(path, MAX_CONFIG, &was, err));
    RT_TRY(rt_config_diff(was, config, &differ, &lines, err));
    if (differ) {
        const int n = whole_lines(&lines, 300, &left);
        if (left > 0)
            snprintf(more, sizeof more, "\nand %d more", left);
        RT_FAIL(err, REFUSED, "%s was started with other arguments or data:\n%.*s%s\nuse the same ones to resume, or another --out", dir, n, lines.data, more);
    }
out:
    rt_json_free(was);
    rt_buf_free(&lines);
    return st;
}

/* Nothing but our lock: else --out may name somebody's directory by mistake. */
static enum rt_status check_empty(const char *dir, struct rt_err *err)
{
    enum rt_status st;
    char **names = NULL;
    size_t n = 0;
    RT_TRY(rt_list_dir(dir, &names, &n, err));
    for (size_t i = 0; i < n; i++)
        if (strcmp(names[i], ".lock") != 0 && strcmp(names[i], "config.json.tmp") != 0)
            RT_FAIL(err, REFUSED, "%s is not empty ('%s' is there) and is no run directory: choose another --out", dir, names[i]);
out:
    rt_names_free(names, n);
    return st;
}

static enum rt_status write_config(const char *path, const struct rt_json *config, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf text = {0};
    RT_TRY(rt_json_dump(config, 2, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    RT_TRY(rt_publish_bytes(path, text.data, text.len, err));
out:
    rt_buf_free(&text);
    return st;
}

static enum rt_status open_append(const char *dir, const char *name, int *fd, struct rt_err *err)
{
    char path[4096];
    const enum rt_status st = rt_path_join(path, sizeof path, dir, name, err);
    if (st != RT_OK)
        return st;
    *fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    return *fd >= 0 ? RT_OK : rt_fail_errno(err, "cannot open '%s'", path);
}

enum rt_status rt_rundir_open(const char *dir, const struct rt_json *config, struct rt_rundir *out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_rundir r = {.lock = -1, .metrics = -1};
    char path[4096];
    int log_fd = -1;
    RT_TRY(rt_path_join(r.path, sizeof r.path, "", dir, err));
    RT_TRY(rt_path_join(path, sizeof path, dir, "config.json", err));
    RT_TRY(rt_mkdirs(dir, err));
    r.resumed = rt_path_exists(path);
    if (!r.resumed)
        RT_TRY(check_empty(dir, err));
    RT_TRY(rt_lock_dir(dir, &r.lock, err));
    if (r.resumed)
        RT_TRY(compare(dir, path, config, err));
    else
        RT_TRY(write_config(path, config, err));
    RT_TRY(open_append(dir, "metrics.jsonl", &r.metrics, err));
    RT_TRY(open_append(dir, "log.txt", &log_fd, err));
    r.log_file = fdopen(log_fd, "a");
    if (r.log_file == NULL) {
        st = rt_fail_errno(err, "cannot open '%s/log.txt'", dir);
        goto out;
    }
    log_fd = -1;
    setvbuf(r.log_file, NULL, _IOLBF, 0); /* what was said before a crash is there */
    *out = r;
out:
    rt_file_close(log_fd);
    if (st != RT_OK)
        rt_rundir_close(&r);
    return st;
}

void rt_rundir_close(struct rt_rundir *r)
{
    if (r->path[0] == '\0')
        return;
    if (r->log_file != NULL)
        fclose(r->log_file);
    rt_file_close(r->metrics);
    rt_file_close(r->lock);
    *r = (struct rt_rundir){.lock = -1, .metrics = -1};
}

enum rt_status rt_rundir_metric(struct rt_rundir *r, const struct rt_json *line, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf text = {0};
    RT_TRY(rt_json_dump(line, 0, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    for (size_t done = 0; done < text.len;) {
        const ssize_t n = write(r->metrics, text.data + done, text.len - done);
        if (n < 0 && errno != EINTR) {
            st = rt_fail_errno(err, "cannot write '%s/metrics.jsonl'", r->path);
            goto out;
        }
        done += n > 0 ? (size_t)n : 0;
    }
out:
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_rundir_sync(struct rt_rundir *r, struct rt_err *err)
{
    return fsync(r->metrics) == 0 ? RT_OK : rt_fail_errno(err, "cannot write '%s/metrics.jsonl' to disk", r->path);
}

enum rt_status rt_rundir_truncate(struct rt_rundir *r, int64_t step, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf text = {0}, kept = {0};
    char path[4096], where[4200];
    size_t no = 0;
    RT_TRY(rt_path_join(path, sizeof path, r->path, "metrics.jsonl", err));
    RT_TRY(rt_file_read_all(path, MAX_METRICS, &text, err));
    for (size_t at = 0; at < text.len;) {
        struct rt_json *v = NULL;
        const char *nl = memchr(text.data + at, '\n', text.len - at);
        int64_t line_step = 0;
        if (nl == NULL)
            break; /* torn */
        const size_t len = (size_t)(nl - text.data) - at;
        snprintf(where, sizeof where, "%s:%zu", path, ++no);
        st = rt_json_parse(text.data + at, len, where, &v, err);
        if (st == RT_OK)
            st = rt_json_int(v, "step", 0, INT64_MAX, &line_step, err);
        rt_json_free(v);
        RT_TRY(st);
        if (line_step <= step)
            RT_TRY(rt_buf_append(&kept, text.data + at, len + 1, err));
        at += len + 1;
    }
    if (kept.len != text.len) {
        RT_TRY(rt_publish_bytes(path, kept.data != NULL ? kept.data : "", kept.len, err));
        rt_file_close(r->metrics);
        r->metrics = -1;
        RT_TRY(open_append(r->path, "metrics.jsonl", &r->metrics, err));
    }
out:
    rt_buf_free(&text);
    rt_buf_free(&kept);
    return st;
}
