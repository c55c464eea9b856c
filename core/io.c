#include "core/io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

/* One system call moves at most this: below the kernel's own limit of 2 GiB. */
#define CHUNK ((size_t)1 << 30)

static int open_retry(const char *path, int flags, mode_t mode)
{
    int fd;
    do
        fd = open(path, flags | O_CLOEXEC, mode);
    while (fd < 0 && errno == EINTR);
    return fd;
}

enum rt_status rt_file_open(const char *path, int *fd, uint64_t *size, struct rt_err *err)
{
    struct stat sb;
    *fd = -1;
    const int f = open_retry(path, O_RDONLY | O_NONBLOCK, 0); /* O_NONBLOCK: a fifo must not hang us */
    if (f < 0)
        return rt_fail_errno(err, "cannot open '%s'", path);
    if (fstat(f, &sb) != 0) {
        const enum rt_status st = rt_fail_errno(err, "cannot read the size of '%s'", path);
        close(f);
        return st;
    }
    if (!S_ISREG(sb.st_mode)) {
        close(f);
        return rt_fail(err, RT_IO, "cannot read '%s': %s, expected a regular file", path,
                       S_ISDIR(sb.st_mode) ? "it is a directory" : "it is a device, pipe or socket");
    }
    *fd = f;
    *size = (uint64_t)sb.st_size;
    return RT_OK;
}

void rt_file_close(int fd)
{
    if (fd >= 0)
        close(fd);
}

enum rt_status rt_file_pread(int fd, const char *path, void *dst, size_t n, uint64_t off, struct rt_err *err)
{
    size_t done = 0;
    if (off > INT64_MAX || n > INT64_MAX - off)
        return rt_fail(err, RT_FORMAT, "'%s': %zu bytes expected at offset %llu, past the end of any file", path, n,
                       (unsigned long long)off);
    while (done < n) {
        const size_t want = n - done < CHUNK ? n - done : CHUNK;
        const ssize_t got = pread(fd, (char *)dst + done, want, (off_t)(off + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return rt_fail_errno(err, "cannot read '%s' at offset %llu", path, (unsigned long long)(off + done));
        if (got == 0)
            return rt_fail(err, RT_FORMAT, "'%s' is cut short: %zu bytes expected at offset %llu, %zu found", path, n,
                           (unsigned long long)off, done);
        done += (size_t)got;
    }
    return RT_OK;
}

enum rt_status rt_file_hash(int fd, const char *path, uint64_t n, struct rt_sha256 *sha, struct rt_err *err)
{
    enum rt_status st;
    const size_t piece = 1 << 20;
    char *buf = NULL;
    RT_TRY(rt_alloc(piece, 1, "a read buffer", &buf, err));
    for (uint64_t at = 0; at < n; at += piece) {
        const size_t take = n - at < piece ? (size_t)(n - at) : piece;
        RT_TRY(rt_file_pread(fd, path, buf, take, at, err));
        rt_sha256_update(sha, buf, take);
    }
out:
    rt_free(buf);
    return st;
}

enum rt_status rt_file_read_all(const char *path, size_t max, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    int fd = -1;
    uint64_t size = 0;
    const size_t before = out->len;
    RT_TRY(rt_file_open(path, &fd, &size, err));
    if (size > max)
        RT_FAIL(err, FORMAT, "'%s' has %llu bytes; at most %zu are expected of such a file", path, (unsigned long long)size, max);
    RT_TRY(rt_buf_reserve(out, (size_t)size + 2, err));
    /* Until its end rather than up to its size: files of /proc say 0, and a log may grow meanwhile. One byte of room stays
     * for the read that finds the end, one for the terminating 0. */
    for (;;) {
        const size_t have = out->len - before;
        const size_t room = out->cap - out->len - 1;
        const ssize_t got = read(fd, out->data + out->len, room < CHUNK ? room : CHUNK);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            st = rt_fail_errno(err, "cannot read '%s' at offset %zu", path, have);
            goto out;
        }
        if (got == 0 && room > 0)
            break;
        if ((size_t)got > max - have)
            RT_FAIL(err, FORMAT, "'%s' has more than the %zu bytes that are expected of such a file", path, max);
        out->len += (size_t)got;
        if (out->cap - out->len <= 1)
            RT_TRY(rt_buf_reserve(out, 4096, err));
    }
    out->data[out->len] = '\0';
out:
    if (st != RT_OK)
        out->len = before;
    rt_file_close(fd);
    return st;
}

static enum rt_status write_all(int fd, const char *path, const void *data, size_t n, struct rt_err *err)
{
    size_t done = 0;
    while (done < n) {
        const size_t want = n - done < CHUNK ? n - done : CHUNK;
        const ssize_t put = write(fd, (const char *)data + done, want);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return rt_fail_errno(err, "cannot write '%s'", path);
        done += (size_t)put;
    }
    return RT_OK;
}

static enum rt_status sync_fd(int fd, const char *path, struct rt_err *err)
{
    int rc;
    do
        rc = fsync(fd);
    while (rc != 0 && errno == EINTR);
    /* Some file systems cannot sync a directory, and devices neither. */
    if (rc != 0 && errno != EINVAL && errno != ENOTSUP)
        return rt_fail_errno(err, "cannot write '%s' to disk", path);
    return RT_OK;
}

/* The directory that holds path: "." for a bare name. */
static enum rt_status parent_of(const char *path, char *out, size_t cap, struct rt_err *err)
{
    const char *slash = strrchr(path, '/');
    const size_t n = slash == NULL ? 1 : slash == path ? 1 : (size_t)(slash - path);
    if (n >= cap)
        return rt_fail(err, RT_USAGE, "path is too long: '%.200s...'", path);
    memcpy(out, slash == NULL ? "." : path, n);
    out[n] = '\0';
    return RT_OK;
}

static enum rt_status sync_parent(const char *path, struct rt_err *err)
{
    char dir[4096];
    const enum rt_status st = parent_of(path, dir, sizeof dir, err);
    return st != RT_OK ? st : rt_fsync_dir(dir, err);
}

enum rt_status rt_fsync_dir(const char *path, struct rt_err *err)
{
    const int fd = open_retry(path, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        return rt_fail_errno(err, "cannot open directory '%s'", path);
    const enum rt_status st = sync_fd(fd, path, err);
    close(fd);
    return st;
}

static enum rt_status open_tmp(struct rt_publish *p, const char *path, int flags, struct rt_err *err)
{
    p->fd = -1;
    p->written = 0;
    if (strlen(path) >= sizeof p->path)
        return rt_fail(err, RT_USAGE, "path is too long: '%.200s...'", path);
    strcpy(p->path, path);
    snprintf(p->tmp, sizeof p->tmp, "%s.tmp", path);
    p->fd = open_retry(p->tmp, O_WRONLY | O_NOFOLLOW | flags, 0666);
    if (p->fd < 0)
        return rt_fail_errno(err, "cannot create '%s'", p->tmp);
    return RT_OK;
}

enum rt_status rt_publish_open(struct rt_publish *p, const char *path, struct rt_err *err)
{
    return open_tmp(p, path, O_CREAT | O_TRUNC, err);
}

enum rt_status rt_publish_reopen(struct rt_publish *p, const char *path, uint64_t bytes, struct rt_err *err)
{
    const enum rt_status st = open_tmp(p, path, 0, err);
    if (st != RT_OK)
        return st;
    if (ftruncate(p->fd, (off_t)bytes) != 0 || lseek(p->fd, (off_t)bytes, SEEK_SET) != (off_t)bytes) {
        const enum rt_status failed = rt_fail_errno(err, "cannot go on with '%s'", p->tmp);
        close(p->fd);
        p->fd = -1;
        return failed;
    }
    p->written = bytes;
    return RT_OK;
}

enum rt_status rt_publish_write(struct rt_publish *p, const void *data, size_t n, struct rt_err *err)
{
    RT_ASSERT(p->fd >= 0);
    const enum rt_status st = write_all(p->fd, p->tmp, data, n, err);
    if (st == RT_OK)
        p->written += n;
    return st;
}

enum rt_status rt_publish_commit(struct rt_publish *p, struct rt_err *err)
{
    enum rt_status st;
    RT_ASSERT(p->fd >= 0);
    RT_TRY(sync_fd(p->fd, p->tmp, err));
    const int rc = close(p->fd);
    p->fd = -1;
    if (rc != 0 && errno != EINTR) {
        st = rt_fail_errno(err, "cannot write '%s'", p->tmp);
        unlink(p->tmp);
        goto out;
    }
    if (rename(p->tmp, p->path) != 0) {
        st = rt_fail_errno(err, "cannot rename '%s' to '%s'", p->tmp, p->path);
        unlink(p->tmp);
        goto out;
    }
    RT_TRY(sync_parent(p->path, err));
out:
    if (st != RT_OK)
        rt_publish_abort(p);
    return st;
}

void rt_publish_abort(struct rt_publish *p)
{
    if (p->fd < 0)
        return;
    close(p->fd);
    p->fd = -1;
    unlink(p->tmp);
}

enum rt_status rt_publish_bytes(const char *path, const void *data, size_t n, struct rt_err *err)
{
    enum rt_status st;
    struct rt_publish p = {.fd = -1};
    RT_TRY(rt_publish_open(&p, path, err));
    RT_TRY(rt_publish_write(&p, data, n, err));
    RT_TRY(rt_publish_commit(&p, err));
out:
    rt_publish_abort(&p);
    return st;
}

/* *end = where the whole lines of a file of `size` bytes end. */
static enum rt_status whole_lines(int fd, const char *path, uint64_t size, uint64_t *end, struct rt_err *err)
{
    char block[4096];
    while (size > 0) {
        const size_t n = size < sizeof block ? (size_t)size : sizeof block;
        const enum rt_status st = rt_file_pread(fd, path, block, n, size - n, err);
        if (st != RT_OK)
            return st;
        const char *nl = memrchr(block, '\n', n);
        if (nl != NULL) {
            *end = size - n + (uint64_t)(nl - block) + 1;
            return RT_OK;
        }
        size -= n;
    }
    *end = 0;
    return RT_OK;
}

enum rt_status rt_file_append_sync(const char *path, const void *data, size_t n, struct rt_err *err)
{
    enum rt_status st;
    struct stat sb;
    const bool existed = rt_path_exists(path);
    const int fd = open_retry(path, O_RDWR | O_APPEND | O_CREAT, 0666);
    if (fd < 0)
        return rt_fail_errno(err, "cannot open '%s' for appending", path);
    if (fstat(fd, &sb) != 0) {
        st = rt_fail_errno(err, "cannot read the size of '%s'", path);
        goto out;
    }
    uint64_t end = (uint64_t)sb.st_size;
    if (S_ISREG(sb.st_mode) && n > 0 && ((const char *)data)[n - 1] == '\n') {
        RT_TRY(whole_lines(fd, path, (uint64_t)sb.st_size, &end, err));
        if (end != (uint64_t)sb.st_size && ftruncate(fd, (off_t)end) != 0) {
            st = rt_fail_errno(err, "cannot cut the torn last line of '%s'", path);
            goto out;
        }
    }
    st = write_all(fd, path, data, n, err);
    if (st != RT_OK) {
        if (S_ISREG(sb.st_mode) && ftruncate(fd, (off_t)end) != 0)
            rt_err_context(err, "a part of a record is left at offset %llu", (unsigned long long)end);
        goto out;
    }
    RT_TRY(sync_fd(fd, path, err));
    if (!existed)
        RT_TRY(sync_parent(path, err));
out:
    close(fd);
    return st;
}

enum rt_status rt_mkdirs(const char *path, struct rt_err *err)
{
    char part[4096];
    const size_t n = strlen(path);
    if (n == 0 || n >= sizeof part)
        return rt_fail(err, RT_USAGE, "not a usable directory name: '%.200s'", path);
    memcpy(part, path, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (part[i] != '/' && part[i] != '\0')
            continue;
        const char kept = part[i];
        part[i] = '\0';
        if (mkdir(part, 0777) != 0) {
            const int code = errno;
            if (!rt_path_is_dir(part)) {
                errno = code;
                return rt_fail_errno(err, "cannot create directory '%s'", part);
            }
        }
        part[i] = kept;
    }
    return RT_OK;
}

bool rt_path_exists(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0;
}

bool rt_path_is_dir(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
}

enum rt_status rt_path_join(char *out, size_t cap, const char *dir, const char *name, struct rt_err *err)
{
    const size_t d = strlen(dir), s = strlen(name);
    const size_t slash = d > 0 && dir[d - 1] != '/';
    if (s >= cap || d >= cap - s || slash >= cap - s - d)
        return rt_fail(err, RT_USAGE, "path is too long: '%.200s/%.200s'", dir, name);
    memmove(out, dir, d);
    if (slash)
        out[d] = '/';
    memcpy(out + d + slash, name, s + 1);
    return RT_OK;
}

bool rt_path_has(const char *dir, const char *name)
{
    char path[4096];
    return rt_path_join(path, sizeof path, dir, name, NULL) == RT_OK && rt_path_exists(path);
}

enum rt_status rt_disk_free(const char *path, uint64_t *bytes, struct rt_err *err)
{
    char at[4096];
    struct statvfs vfs;
    if (strlen(path) >= sizeof at)
        return rt_fail(err, RT_USAGE, "path is too long: '%.200s...'", path);
    strcpy(at, path[0] == '\0' ? "." : path);
    while (statvfs(at, &vfs) != 0) {
        const bool top = strcmp(at, "/") == 0 || strcmp(at, ".") == 0;
        if (errno == EINTR)
            continue;
        if ((errno != ENOENT && errno != ENOTDIR) || top)
            return rt_fail_errno(err, "cannot read the free space at '%s'", path);
        char up[sizeof at];
        const enum rt_status st = parent_of(at, up, sizeof up, err);
        if (st != RT_OK)
            return st;
        strcpy(at, up);
    }
    *bytes = (uint64_t)vfs.f_bavail * vfs.f_frsize;
    return RT_OK;
}

enum rt_status rt_lock_dir(const char *dir, int *fd, struct rt_err *err)
{
    char path[4096];
    *fd = -1;
    enum rt_status st = rt_path_join(path, sizeof path, dir, ".lock", err);
    if (st != RT_OK)
        return st;
    const int f = open_retry(path, O_RDWR | O_CREAT, 0666);
    if (f < 0)
        return rt_fail_errno(err, "cannot open the lock '%s'", path);
    int rc;
    do
        rc = flock(f, LOCK_EX | LOCK_NB);
    while (rc != 0 && errno == EINTR);
    if (rc != 0) {
        st = errno == EWOULDBLOCK
                 ? rt_fail(err, RT_REFUSED, "'%s' is in use: another process holds '%s'; wait for it or choose another directory",
                           dir, path)
                 : rt_fail_errno(err, "cannot lock '%s'", path);
        close(f);
        return st;
    }
    *fd = f;
    return RT_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

enum rt_status rt_list_dir(const char *dir, char ***names, size_t *n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char **list = NULL;
    size_t len = 0, cap = 0;
    DIR *d = opendir(dir);
    if (d == NULL)
        return rt_fail_errno(err, "cannot list directory '%s'", dir);
    for (;;) {
        errno = 0;
        const struct dirent *e = readdir(d);
        if (e == NULL)
            break;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        if (len == cap) {
            const size_t grown = cap == 0 ? 64 : cap * 2;
            char **more = realloc(list, grown * sizeof *list);
            if (more == NULL)
                RT_FAIL(err, NOMEM, "out of memory: %zu names of directory '%s'", grown, dir);
            list = more;
            cap = grown;
        }
        list[len] = strdup(e->d_name);
        if (list[len] == NULL)
            RT_FAIL(err, NOMEM, "out of memory: the names of directory '%s'", dir);
        len++;
    }
    if (errno != 0) {
        st = rt_fail_errno(err, "cannot list directory '%s'", dir);
        goto out;
    }
    if (len > 0)
        qsort(list, len, sizeof *list, by_name);
    *names = list;
    *n = len;
out:
    if (st != RT_OK)
        rt_names_free(list, len);
    closedir(d);
    return st;
}

void rt_names_free(char **names, size_t n)
{
    for (size_t i = 0; names != NULL && i < n; i++)
        free(names[i]);
    free(names);
}
