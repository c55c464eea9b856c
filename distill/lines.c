#include "distill/lines.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "formats/dataset.h"
#include "formats/utf8.h"

enum { CHUNK = 1 << 18 };

enum rt_status rt_lines_open(const char *path, struct rt_lines *out, struct rt_err *err)
{
    uint64_t size;
    *out = (struct rt_lines){.fd = STDIN_FILENO};
    if (path != NULL && strlen(path) >= sizeof out->path)
        return rt_fail(err, RT_USAGE, "a path of %zu bytes is too long", strlen(path));
    strcpy(out->path, path != NULL ? path : "stdin");
    return path != NULL ? rt_file_open(path, &out->fd, &size, err) : RT_OK;
}

void rt_lines_close(struct rt_lines *l)
{
    if (l->fd != STDIN_FILENO)
        rt_file_close(l->fd);
    rt_buf_free(&l->window);
    *l = (struct rt_lines){0};
}

static enum rt_status more(struct rt_lines *l, struct rt_err *err)
{
    enum rt_status st;
    ssize_t n;
    if (l->at > 0) {
        memmove(l->window.data, l->window.data + l->at, l->window.len - l->at);
        l->window.len -= l->at;
        l->at = 0;
    }
    RT_TRY(rt_buf_reserve(&l->window, CHUNK, err));
    do
        n = read(l->fd, l->window.data + l->window.len, CHUNK);
    while (n < 0 && errno == EINTR);
    if (n < 0) {
        st = rt_fail_errno(err, "cannot read '%s'", l->path);
        goto out;
    }
    l->window.len += (size_t)n;
    l->all = n == 0;
out:
    return st;
}

static bool blank(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (s[i] != ' ' && s[i] != '\t' && s[i] != '\r')
            return false;
    return true;
}

enum rt_status rt_lines_next(struct rt_lines *l, const char **s, size_t *n, bool *end, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    size_t seen = 0;
    *end = false;
    for (;;) {
        const size_t have = l->window.len - l->at;
        const char *from = l->window.data != NULL ? l->window.data + l->at : "";
        const char *newline = have > seen ? memchr(from + seen, '\n', have - seen) : NULL;
        *n = newline != NULL ? (size_t)(newline - from) : have;
        if (*n > RT_LINE_MAX)
            RT_FAIL(err, FORMAT, "%s:%lld: a line of more than %d MiB", l->path, (long long)l->line + 1, RT_LINE_MAX >> 20);
        if (newline == NULL && !l->all) {
            seen = have;
            RT_TRY(more(l, err));
            continue;
        }
        *end = newline == NULL && have == 0;
        if (*end)
            break;
        const size_t whole = newline != NULL ? *n + 1 : *n;
        l->torn = newline == NULL;
        l->at += whole;
        l->end_offset += whole;
        l->line++;
        seen = 0;
        if (!blank(from, *n)) {
            *s = from;
            snprintf(l->where, sizeof l->where, "%s:%lld", l->path, (long long)l->line);
            break;
        }
    }
out:
    return st;
}

enum rt_status rt_lines_next_json(struct rt_lines *l, struct rt_json **out, bool *end, struct rt_err *err)
{
    enum rt_status st;
    const char *s = NULL;
    size_t n = 0;
    struct rt_json *v = NULL;
    RT_TRY(rt_lines_next(l, &s, &n, end, err));
    if (*end)
        goto out;
    RT_TRY(rt_json_parse(s, n, l->where, &v, err));
    if (rt_json_typeof(v) != RT_JSON_OBJECT)
        RT_FAIL(err, FORMAT, "%s: expected a JSON object", l->where);
    *out = v;
    v = NULL;
out:
    rt_json_free(v);
    return st;
}

enum rt_status rt_put_utf8(const char *s, size_t n, struct rt_buf *out, bool *lossy, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (size_t i = 0, from = 0; n > 0 && i <= n;) {
        const size_t k = i < n ? rt_utf8_char(s + i, n - i) : 0;
        if (k > 0) {
            i += k;
            continue;
        }
        RT_TRY(rt_buf_append(out, s + from, i - from, err));
        if (i < n) {
            RT_TRY(rt_buf_append(out, "\xEF\xBF\xBD", 3, err));
            *lossy = true;
        }
        from = ++i;
    }
out:
    return st;
}
