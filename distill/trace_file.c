#include "distill/trace_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/io.h"
#include "distill/lines.h"

enum { PENDING_MOST = 32 << 20 }; /* bytes of pending.jsonl beyond which it is rewritten */

struct rt_trace_file {
    char path[4096], pending_path[4096], dir[4096];
    int fd, pending_fd;
    int samples;
    int64_t window, done, waiting, kept;
    uint64_t pending_bytes, pending_limit;
    struct rt_buf *held; /* [window * samples] line of place i at i modulo its length; cap 0: none */
};

static int64_t place(const struct rt_trace_file *f, int64_t prompt, int sample)
{
    return prompt % f->window * f->samples + sample;
}

static enum rt_status write_all(int fd, const char *path, const char *s, size_t n, struct rt_err *err)
{
    for (size_t at = 0; at < n;) {
        const ssize_t k = write(fd, s + at, n - at);
        if (k < 0 && errno != EINTR)
            return rt_fail_errno(err, "cannot write '%s'", path);
        at += k > 0 ? (size_t)k : 0;
    }
    return RT_OK;
}

static enum rt_status open_rw(const char *path, int *fd, struct rt_err *err)
{
    *fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    return *fd >= 0 ? RT_OK : rt_fail_errno(err, "cannot open '%s'", path);
}

/* "index" and "sample" of a line. */
static enum rt_status places(const struct rt_json *v, int samples, int64_t *prompt, int64_t *sample, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_json_int(v, "index", 0, INT64_MAX, prompt, err));
    RT_TRY(rt_json_int(v, "sample", 0, samples - 1, sample, err));
out:
    return st;
}

/* Counts whole prompts in traces.jsonl, checks the last line, cuts the rest off. */
static enum rt_status recover(struct rt_trace_file *f, struct rt_err *err)
{
    enum rt_status st;
    struct rt_lines in = {0};
    struct rt_json *last = NULL;
    struct rt_buf text = {0};
    const char *s;
    size_t n;
    bool end = false;
    int64_t lines = 0, prompt, sample;
    uint64_t keep = 0;
    RT_TRY(rt_lines_open(f->path, &in, err));
    for (;;) {
        RT_TRY(rt_lines_next(&in, &s, &n, &end, err));
        if (end || in.torn || memchr(s, '\0', n) != NULL) /* a crash leaves half a line, or zeros */
            break;
        if (s[0] != '{' || s[n - 1] != '}')
            RT_FAIL(err, FORMAT, "%s: not the line of a trace, as it was written: the file was changed; put it back, or use another --out", in.where);
        if (++lines % f->samples == 0) {
            keep = in.end_offset;
            f->done = lines / f->samples;
            text.len = 0;
            RT_TRY(rt_buf_append(&text, s, n, err));
        }
    }
    if (f->done > 0) {
        RT_TRY(rt_json_parse(text.data, text.len, f->path, &last, err));
        RT_TRY(places(last, f->samples, &prompt, &sample, err));
        if (prompt != f->done - 1 || sample != f->samples - 1)
            RT_FAIL(err, FORMAT, "%s: line %ld is sample %ld of prompt %ld, expected sample %d of prompt %ld: the file was changed; use another --out", f->path,
                    (long)(f->done * f->samples), (long)sample, (long)prompt, f->samples - 1, (long)f->done - 1);
    }
    if (ftruncate(f->fd, (off_t)keep) != 0)
        st = rt_fail_errno(err, "cannot cut '%s' to %llu bytes", f->path, (unsigned long long)keep);
    f->kept = f->done * f->samples;
out:
    rt_json_free(last);
    rt_buf_free(&text);
    rt_lines_close(&in);
    return st;
}

static enum rt_status advance(struct rt_trace_file *f, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (;;) {
        struct rt_buf *first = &f->held[place(f, f->done, 0)];
        for (int s = 0; s < f->samples; s++)
            if (first[s].cap == 0)
                goto out;
        for (int s = 0; s < f->samples; s++) {
            RT_TRY(write_all(f->fd, f->path, first[s].data, first[s].len, err));
            rt_buf_free(&first[s]);
        }
        f->waiting -= f->samples;
        f->done++;
    }
out:
    return st;
}

/* pending.jsonl with nothing but what waits. What has left it is on the disk before. */
static enum rt_status rewrite_pending(struct rt_trace_file *f, struct rt_err *err)
{
    enum rt_status st;
    struct rt_publish p = {.fd = -1};
    if (fsync(f->fd) != 0)
        return rt_fail_errno(err, "cannot write '%s' to disk", f->path);
    rt_file_close(f->pending_fd);
    f->pending_fd = -1;
    RT_TRY(rt_publish_open(&p, f->pending_path, err));
    for (int64_t i = 0; f->waiting > 0 && i < f->window * f->samples; i++)
        if (f->held[i].cap > 0)
            RT_TRY(rt_publish_write(&p, f->held[i].data, f->held[i].len, err));
    f->pending_bytes = p.written;
    f->pending_limit = 2 * p.written + PENDING_MOST;
    RT_TRY(rt_publish_commit(&p, err));
    RT_TRY(open_rw(f->pending_path, &f->pending_fd, err));
out:
    rt_publish_abort(&p);
    return st;
}

static enum rt_status hold(struct rt_trace_file *f, int64_t prompt, int sample, const char *line, size_t n, struct rt_err *err)
{
    struct rt_buf *b = &f->held[place(f, prompt, sample)];
    enum rt_status st;
    RT_TRY(rt_buf_reserve(b, n + 1, err));
    RT_TRY(rt_buf_append(b, line, n, err));
    RT_TRY(rt_buf_append(b, "\n", 1, err));
    f->waiting++;
    f->kept++;
out:
    return st;
}

/* Takes what pending.jsonl holds and still waits. */
static enum rt_status load_pending(struct rt_trace_file *f, struct rt_err *err)
{
    enum rt_status st;
    struct rt_lines in = {0};
    bool end = false;
    RT_TRY(rt_lines_open(f->pending_path, &in, err));
    for (;;) {
        const char *s;
        size_t n;
        struct rt_json *v = NULL;
        int64_t prompt, sample;
        RT_TRY(rt_lines_next(&in, &s, &n, &end, err));
        if (end || in.torn)
            break;
        st = rt_json_parse(s, n, in.where, &v, NULL);
        if (st == RT_OK)
            st = places(v, f->samples, &prompt, &sample, NULL);
        rt_json_free(v);
        if (st != RT_OK) { /* what a crash left: the sequence is generated again */
            st = RT_OK;
            continue;
        }
        if (prompt < f->done || prompt >= f->done + f->window || rt_trace_file_has(f, prompt, (int)sample))
            continue;
        RT_TRY(hold(f, prompt, (int)sample, s, n, err));
    }
out:
    rt_lines_close(&in);
    return st;
}

enum rt_status rt_trace_file_open(const char *dir, int samples, int64_t window, struct rt_trace_file **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_trace_file *f;
    size_t places_n;
    RT_TRY(rt_alloc(1, sizeof *f, "trace file", &f, err));
    f->fd = f->pending_fd = -1;
    f->samples = samples;
    f->window = window;
    if (!rt_mul_size((size_t)window, (size_t)samples, &places_n))
        RT_FAIL(err, USAGE, "--samples %d is too much", samples);
    RT_TRY(rt_alloc(places_n, sizeof *f->held, "traces that wait for their turn", &f->held, err));
    RT_TRY(rt_path_join(f->dir, sizeof f->dir, dir, ".", err));
    RT_TRY(rt_path_join(f->path, sizeof f->path, dir, "traces.jsonl", err));
    RT_TRY(rt_path_join(f->pending_path, sizeof f->pending_path, dir, "pending.jsonl", err));
    RT_TRY(open_rw(f->path, &f->fd, err));
    RT_TRY(recover(f, err));
    if (rt_path_exists(f->pending_path))
        RT_TRY(load_pending(f, err));
    RT_TRY(advance(f, err));
    RT_TRY(rewrite_pending(f, err));
    *out = f;
    f = NULL;
out:
    rt_trace_file_close(f);
    return st;
}

void rt_trace_file_close(struct rt_trace_file *f)
{
    if (f == NULL)
        return;
    rt_file_close(f->fd);
    rt_file_close(f->pending_fd);
    for (int64_t i = 0; f->held != NULL && i < f->window * f->samples; i++)
        rt_buf_free(&f->held[i]);
    rt_free(f->held);
    rt_free(f);
}

int64_t rt_trace_file_done(const struct rt_trace_file *f)
{
    return f->done;
}

int64_t rt_trace_file_kept(const struct rt_trace_file *f)
{
    return f->kept;
}

bool rt_trace_file_has(const struct rt_trace_file *f, int64_t prompt, int sample)
{
    return prompt < f->done || (prompt < f->done + f->window && f->held[place(f, prompt, sample)].cap > 0);
}

bool rt_trace_file_room(const struct rt_trace_file *f, int64_t prompt)
{
    return prompt < f->done + f->window;
}

enum rt_status rt_trace_file_put(struct rt_trace_file *f, int64_t prompt, int sample, const char *line, size_t n, struct rt_err *err)
{
    enum rt_status st;
    RT_ASSERT(rt_trace_file_room(f, prompt) && !rt_trace_file_has(f, prompt, sample));
    RT_TRY(hold(f, prompt, sample, line, n, err));
    bool complete = prompt == f->done;
    for (int s = 0; complete && s < f->samples; s++)
        complete = f->held[place(f, prompt, s)].cap > 0;
    if (!complete) {
        const struct rt_buf *b = &f->held[place(f, prompt, sample)];
        f->pending_bytes += b->len;
        RT_TRY(write_all(f->pending_fd, f->pending_path, b->data, b->len, err));
        if (f->pending_bytes > f->pending_limit)
            RT_TRY(rewrite_pending(f, err));
    } else {
        RT_TRY(advance(f, err));
    }
out:
    return st;
}

enum rt_status rt_trace_file_sync(struct rt_trace_file *f, bool finished, struct rt_err *err)
{
    if (fsync(f->fd) != 0)
        return rt_fail_errno(err, "cannot write '%s' to disk", f->path);
    if (fsync(f->pending_fd) != 0)
        return rt_fail_errno(err, "cannot write '%s' to disk", f->pending_path);
    if (finished && unlink(f->pending_path) != 0 && errno != ENOENT)
        return rt_fail_errno(err, "cannot remove '%s'", f->pending_path);
    return rt_fsync_dir(f->dir, err);
}
