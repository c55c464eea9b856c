#include "distill/jsonl.h"

#include <stdio.h>
#include <string.h>

#include "core/io.h"

enum { CHUNK = 1 << 18 };

enum rt_status rt_jsonl_open(const char *path, struct rt_jsonl *out, struct rt_err *err)
{
    *out = (struct rt_jsonl){.fd = -1};
    if (strlen(path) >= sizeof out->path)
        return rt_fail(err, RT_USAGE, "%.200s...: the path is too long", path);
    snprintf(out->path, sizeof out->path, "%s", path);
    return rt_file_open(path, &out->fd, &out->size, err);
}

void rt_jsonl_close(struct rt_jsonl *f)
{
    if (f->path[0] != '\0')
        rt_file_close(f->fd);
    rt_buf_free(&f->window);
    rt_json_free(f->value);
    *f = (struct rt_jsonl){.fd = -1};
}

/* Moves what is left to the front and reads a chunk behind it. */
static enum rt_status more(struct rt_jsonl *f, struct rt_err *err)
{
    const uint64_t left = f->size - f->read;
    const size_t n = left < CHUNK ? (size_t)left : CHUNK;
    enum rt_status st;
    if (f->at > 0) {
        memmove(f->window.data, f->window.data + f->at, f->window.len - f->at);
        f->window.len -= f->at;
        f->at = 0;
    }
    RT_TRY(rt_buf_reserve(&f->window, n, err));
    RT_TRY(rt_file_pread(f->fd, f->path, f->window.data + f->window.len, n, f->read, err));
    f->window.len += n;
    f->read += n;
out:
    return st;
}

static bool blank(const char *s, size_t n)
{
    return n == strspn(s, " \t\r") || n == 0;
}

/* The bytes of the next line; *whole says whether a newline ends it. n SIZE_MAX: there is none. */
static enum rt_status next_line(struct rt_jsonl *f, size_t *n, bool *whole, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (size_t seen = 0;;) {
        const char *start = f->window.data != NULL ? f->window.data + f->at : NULL;
        const size_t have = f->window.len - f->at;
        const char *nl = have > seen ? memchr(start + seen, '\n', have - seen) : NULL;
        if (nl != NULL || f->read == f->size) {
            *whole = nl != NULL;
            *n = nl != NULL ? (size_t)(nl - start) : have > 0 ? have : SIZE_MAX;
            return RT_OK;
        }
        if (have > RT_JSONL_MAX)
            RT_FAIL(err, FORMAT, "%s:%lld: a line of more than %d MiB", f->path, (long long)f->line + 1, RT_JSONL_MAX >> 20);
        seen = have;
        RT_TRY(more(f, err));
    }
out:
    return st;
}

enum rt_status rt_jsonl_next(struct rt_jsonl *f, const struct rt_json **v, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_err bad = {0};
    char where[sizeof f->path + 24];
    rt_json_free(f->value);
    f->value = NULL;
    *v = NULL;
    for (;;) {
        size_t n = 0;
        bool whole = true;
        RT_TRY(next_line(f, &n, &whole, err));
        if (n == SIZE_MAX)
            return RT_OK;
        f->line++;
        f->at += n;
        if (!whole)
            RT_TRY(rt_buf_append(&f->window, "", 1, err)); /* room for the 0 that ends the text */
        char *text = f->window.data + f->at - n;
        text[n] = '\0';
        if (whole)
            f->at++;
        else
            f->window.len = f->at;
        if (blank(text, n))
            continue;
        snprintf(where, sizeof where, "%s:%lld", f->path, (long long)f->line);
        st = rt_json_parse(text, n, where, &f->value, &bad);
        if (st == RT_OK && rt_json_typeof(f->value) != RT_JSON_OBJECT)
            st = rt_fail(&bad, RT_FORMAT, "%s: expected a JSON object on each line", where);
        if (st == RT_FORMAT && !whole) {
            f->torn = true;
            return RT_OK;
        }
        if (st != RT_OK)
            return rt_fail(err, st, "%s", bad.msg);
        *v = f->value;
        return RT_OK;
    }
out:
    return st;
}
