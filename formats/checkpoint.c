#include "formats/checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "core/mem.h"
#include "core/sha256.h"

enum { NAME_CAP = 128, MAX_FILES = 256, MAX_MANIFEST = 1 << 20, KEEP_AT_LEAST = 2 };

struct entry {
    char name[NAME_CAP];
    uint64_t bytes;
    char sha256[65];
};

struct rt_ckpt_writer {
    char dir[4096], tmp[4096];
    int64_t step;
    struct entry *files; /* [MAX_FILES] */
    int n;
    struct rt_tensor_writer *tensors; /* the file that is being put, of files[n] */
};

static enum rt_status dir_name(const char *dir, int64_t step, bool tmp, char *out, size_t cap, struct rt_err *err)
{
    char name[64];
    snprintf(name, sizeof name, tmp ? ".ckpt-%08" PRId64 ".tmp" : "ckpt-%08" PRId64, step);
    return rt_path_join(out, cap, dir, name, err);
}

/* A checkpoint's directory holds files only. */
static enum rt_status remove_dir(const char *path, struct rt_err *err)
{
    enum rt_status st;
    char **names = NULL, file[4096];
    size_t n = 0;
    if (!rt_path_is_dir(path))
        return RT_OK;
    RT_TRY(rt_list_dir(path, &names, &n, err));
    for (size_t i = 0; i < n; i++) {
        RT_TRY(rt_path_join(file, sizeof file, path, names[i], err));
        if (unlink(file) != 0) {
            st = rt_fail_errno(err, "cannot remove '%s'", file);
            goto out;
        }
    }
    if (rmdir(path) != 0)
        st = rt_fail_errno(err, "cannot remove '%s'", path);
out:
    rt_names_free(names, n);
    return st;
}

void rt_ckpt_writer_free(struct rt_ckpt_writer *w)
{
    if (w == NULL)
        return;
    rt_tensor_writer_free(w->tensors);
    if (w->tmp[0] != '\0')
        remove_dir(w->tmp, NULL); /* if this fails the next one removes it */
    rt_free(w->files);
    rt_free(w);
}

enum rt_status rt_ckpt_begin(const char *dir, int64_t step, struct rt_ckpt_writer **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_ckpt_writer *w = NULL;
    char **names = NULL, stale[4096], tmp[4096];
    size_t n = 0;
    RT_TRY(rt_alloc(1, sizeof *w, "a checkpoint", &w, err));
    RT_TRY(rt_alloc(MAX_FILES, sizeof *w->files, "a checkpoint", &w->files, err));
    RT_TRY(rt_path_join(w->dir, sizeof w->dir, "", dir, err));
    w->step = step;
    RT_TRY(rt_mkdirs(dir, err));
    RT_TRY(rt_list_dir(dir, &names, &n, err));
    for (size_t i = 0; i < n; i++) {
        const size_t len = strlen(names[i]);
        if (strncmp(names[i], ".ckpt-", 6) == 0 && len > 10 && strcmp(names[i] + len - 4, ".tmp") == 0) {
            RT_TRY(rt_path_join(stale, sizeof stale, dir, names[i], err));
            RT_TRY(remove_dir(stale, err));
        }
    }
    RT_TRY(dir_name(dir, step, true, tmp, sizeof tmp, err));
    RT_TRY(rt_mkdirs(tmp, err));
    memcpy(w->tmp, tmp, sizeof tmp);
    *out = w;
    w = NULL;
out:
    rt_names_free(names, n);
    rt_ckpt_writer_free(w);
    return st;
}

static enum rt_status close_tensors(struct rt_ckpt_writer *w, struct rt_err *err)
{
    if (w->tensors == NULL)
        return RT_OK;
    const enum rt_status st = rt_tensor_writer_finish(w->tensors, err);
    if (st != RT_OK)
        return st;
    rt_tensor_writer_result(w->tensors, &w->files[w->n].bytes, w->files[w->n].sha256);
    rt_tensor_writer_free(w->tensors);
    w->tensors = NULL;
    w->n++;
    return RT_OK;
}

static bool plain_name(const char *s)
{
    return s[0] != '\0' && s[0] != '.' && strlen(s) < NAME_CAP && strchr(s, '/') == NULL && strcmp(s, "MANIFEST") != 0;
}

/* Entry for a new file, and its path. */
static enum rt_status add(struct rt_ckpt_writer *w, const char *name, char *path, size_t cap, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(close_tensors(w, err));
    if (!plain_name(name) || w->n == MAX_FILES)
        RT_FAIL(err, USAGE, "'%.200s' cannot be file %d of a checkpoint", name, w->n);
    for (int i = 0; i < w->n; i++)
        if (strcmp(w->files[i].name, name) == 0)
            RT_FAIL(err, USAGE, "a checkpoint with two files '%s'", name);
    strcpy(w->files[w->n].name, name);
    RT_TRY(rt_path_join(path, cap, w->tmp, name, err));
out:
    return st;
}

enum rt_status rt_ckpt_tensors(struct rt_ckpt_writer *w, const char *name, const struct rt_tensor_decl *decl, int64_t n,
                               struct rt_err *err)
{
    enum rt_status st;
    char path[4096];
    RT_TRY(add(w, name, path, sizeof path, err));
    RT_TRY(rt_tensor_writer_file(path, decl, n, &w->tensors, err));
out:
    return st;
}

enum rt_status rt_ckpt_put(struct rt_ckpt_writer *w, const void *data, uint64_t bytes, struct rt_err *err)
{
    if (w->tensors == NULL)
        return rt_fail(err, RT_USAGE, "no file of tensors is open in the checkpoint of step %" PRId64, w->step);
    return rt_tensor_writer_put(w->tensors, data, bytes, err);
}

enum rt_status rt_ckpt_bytes(struct rt_ckpt_writer *w, const char *name, const void *data, size_t n, struct rt_err *err)
{
    enum rt_status st;
    char path[4096];
    uint8_t digest[32];
    RT_TRY(add(w, name, path, sizeof path, err));
    RT_TRY(rt_publish_bytes(path, data, n, err));
    rt_sha256(data, n, digest);
    rt_hex(w->files[w->n].sha256, digest, sizeof digest);
    w->files[w->n].bytes = n;
    w->n++;
out:
    return st;
}

enum rt_status rt_ckpt_json(struct rt_ckpt_writer *w, const char *name, const struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf text = {0};
    RT_TRY(rt_json_dump(v, 2, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    RT_TRY(rt_ckpt_bytes(w, name, text.data, text.len, err));
out:
    rt_buf_free(&text);
    return st;
}

static enum rt_status write_manifest(const struct rt_ckpt_writer *w, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL, *list, *o;
    struct rt_buf text = {0};
    char path[4096], sum[65];
    uint8_t digest[32];
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_int(v, "version", 1, err));
    RT_TRY(rt_json_set_int(v, "step", w->step, err));
    RT_TRY(rt_json_set_array(v, "files", &list, err));
    for (int i = 0; i < w->n; i++) {
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_string(o, "name", w->files[i].name, err));
        RT_TRY(rt_json_set_int(o, "bytes", (int64_t)w->files[i].bytes, err));
        RT_TRY(rt_json_set_string(o, "sha256", w->files[i].sha256, err));
    }
    /* The manifest vouches for itself too: SHA-256 of its first line is its second. */
    RT_TRY(rt_json_dump(v, 0, &text, err));
    rt_sha256(text.data, text.len, digest);
    rt_hex(sum, digest, sizeof digest);
    RT_TRY(rt_buf_printf(&text, err, "\n%s\n", sum));
    RT_TRY(rt_path_join(path, sizeof path, w->tmp, "MANIFEST", err));
    RT_TRY(rt_publish_bytes(path, text.data, text.len, err));
out:
    rt_buf_free(&text);
    rt_json_free(v);
    return st;
}

/* Steps of the checkpoints in dir, ascending; rt_free(*steps). */
static enum rt_status list_steps(const char *dir, int64_t **steps, size_t *n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char **names = NULL, again[64];
    size_t count = 0;
    *steps = NULL;
    *n = 0;
    if (!rt_path_is_dir(dir))
        return RT_OK;
    RT_TRY(rt_list_dir(dir, &names, &count, err));
    RT_TRY(rt_alloc(count, sizeof **steps, "the list of checkpoints", steps, err));
    for (size_t i = 0; i < count; i++) {
        int64_t step;
        if (sscanf(names[i], "ckpt-%" SCNd64, &step) != 1 || step < 0)
            continue;
        snprintf(again, sizeof again, "ckpt-%08" PRId64, step);
        if (strcmp(names[i], again) != 0)
            continue;
        size_t at = (*n)++; /* names ascend, numbers of more than 8 digits need not */
        for (; at > 0 && (*steps)[at - 1] > step; at--)
            (*steps)[at] = (*steps)[at - 1];
        (*steps)[at] = step;
    }
out:
    rt_names_free(names, count);
    return st;
}

/* The newest `keep` up to and with `step` stay. Later ones are of a future that a resume gave up: they go. */
static enum rt_status prune(const char *dir, int64_t step, int keep, struct rt_err *err)
{
    enum rt_status st;
    int64_t *steps = NULL;
    size_t n = 0;
    char path[4096], gone[4096];
    int newer = 0;
    RT_TRY(list_steps(dir, &steps, &n, err));
    for (size_t i = n; i-- > 0;) {
        if (steps[i] <= step && newer++ < keep)
            continue;
        RT_TRY(dir_name(dir, steps[i], false, path, sizeof path, err));
        RT_TRY(dir_name(dir, steps[i], true, gone, sizeof gone, err));
        RT_TRY(remove_dir(gone, err));
        if (rename(path, gone) != 0) { /* first out of sight, so that no half of it is ever found */
            st = rt_fail_errno(err, "cannot remove '%s'", path);
            goto out;
        }
        RT_TRY(remove_dir(gone, err));
    }
out:
    rt_free(steps);
    return st;
}

enum rt_status rt_ckpt_commit(struct rt_ckpt_writer *w, int keep, struct rt_err *err)
{
    enum rt_status st;
    char path[4096];
    RT_TRY(close_tensors(w, err));
    RT_TRY(write_manifest(w, err));
    RT_TRY(rt_fsync_dir(w->tmp, err));
    RT_TRY(dir_name(w->dir, w->step, false, path, sizeof path, err));
    if (rename(w->tmp, path) != 0) {
        /* One of the same step is there: the two change places at once, and the old one goes. */
        if ((errno != ENOTEMPTY && errno != EEXIST) || renameat2(AT_FDCWD, w->tmp, AT_FDCWD, path, RENAME_EXCHANGE) != 0) {
            st = rt_fail_errno(err, "cannot publish '%s'", path);
            goto out;
        }
        RT_TRY(remove_dir(w->tmp, err));
    }
    w->tmp[0] = '\0';
    RT_TRY(rt_fsync_dir(w->dir, err));
    RT_TRY(prune(w->dir, w->step, keep < KEEP_AT_LEAST ? KEEP_AT_LEAST : keep, err));
out:
    return st;
}

static enum rt_status check_file(const char *dir, const struct rt_json *o, struct rt_err *err)
{
    enum rt_status st;
    const char *name, *sum;
    char path[4096], hex[65];
    int64_t bytes;
    uint64_t size;
    struct rt_sha256 sha;
    int fd = -1;
    RT_TRY(rt_json_string(o, "name", &name, err));
    RT_TRY(rt_json_string(o, "sha256", &sum, err));
    RT_TRY(rt_json_int(o, "bytes", 0, INT64_MAX, &bytes, err));
    if (!plain_name(name))
        RT_FAIL(err, FORMAT, "%s: '%.80s' is no name of a file", rt_json_source(o), name);
    RT_TRY(rt_path_join(path, sizeof path, dir, name, err));
    RT_TRY(rt_file_open(path, &fd, &size, err));
    if (size != (uint64_t)bytes)
        RT_FAIL(err, FORMAT, "%s: %" PRIu64 " bytes, the checkpoint's MANIFEST says %" PRId64, path, size, bytes);
    rt_sha256_init(&sha);
    RT_TRY(rt_file_hash(fd, path, size, &sha, err));
    rt_sha256_final_hex(&sha, hex);
    if (strcmp(hex, sum) != 0)
        RT_FAIL(err, FORMAT, "%s: damaged: sha256 %s, the checkpoint's MANIFEST says %.64s", path, hex, sum);
out:
    rt_file_close(fd);
    return st;
}

static bool is_among(const char *const *names, const char *name)
{
    for (; *names != NULL; names++)
        if (strcmp(*names, name) == 0)
            return true;
    return false;
}

/* names NULL: all files. */
static enum rt_status check_files(const char *path, const char *manifest, const struct rt_json *files, const char *const *names, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int missing = 0;
    for (const char *const *n = names; n != NULL && *n != NULL; n++)
        missing++;
    for (size_t i = 0; i < rt_json_len(files); i++) {
        const struct rt_json *file = rt_json_at(files, i);
        const char *name;
        RT_TRY(rt_json_string(file, "name", &name, err));
        if (names != NULL && !is_among(names, name))
            continue;
        RT_TRY(check_file(path, file, err));
        missing--;
    }
    if (names != NULL && missing > 0)
        RT_FAIL(err, FORMAT, "%s: expected %s and what goes with it among its files", manifest, names[0]);
out:
    return st;
}

enum rt_status rt_ckpt_verify(const char *path, int64_t *step, struct rt_err *err)
{
    return rt_ckpt_verify_files(path, NULL, step, err);
}

enum rt_status rt_ckpt_verify_files(const char *path, const char *const *names, int64_t *step, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf text = {0};
    struct rt_json *v = NULL;
    char manifest[4096], sum[67];
    uint8_t digest[32];
    int64_t version;
    RT_TRY(rt_path_join(manifest, sizeof manifest, path, "MANIFEST", err));
    RT_TRY(rt_file_read_all(manifest, MAX_MANIFEST, &text, err));
    const char *nl = text.len > 0 ? memchr(text.data, '\n', text.len) : NULL;
    const size_t len = nl != NULL ? (size_t)(nl - text.data) : 0;
    rt_sha256(text.data, len, digest);
    rt_hex(sum, digest, sizeof digest);
    strcat(sum, "\n");
    if (nl == NULL || text.len - len - 1 != strlen(sum) || memcmp(nl + 1, sum, strlen(sum)) != 0)
        RT_FAIL(err, FORMAT, "%s: damaged or cut: its last line is not the sha256 of its first", manifest);
    RT_TRY(rt_json_parse(text.data, len, manifest, &v, err));
    RT_TRY(rt_json_int(v, "version", 1, 1, &version, err));
    RT_TRY(rt_json_int(v, "step", 0, INT64_MAX, step, err));
    RT_TRY(check_files(path, manifest, rt_json_get(v, "files"), names, err));
out:
    rt_buf_free(&text);
    rt_json_free(v);
    return st;
}

enum rt_status rt_ckpt_latest(const char *dir, struct rt_log *log, struct rt_ckpt *out, struct rt_err *err)
{
    enum rt_status st;
    int64_t *steps = NULL, step;
    size_t n = 0;
    struct rt_err bad = {0};
    out->step = -1;
    out->path[0] = '\0';
    RT_TRY(list_steps(dir, &steps, &n, err));
    for (size_t i = n; i-- > 0;) {
        rt_err_clear(&bad);
        RT_TRY(dir_name(dir, steps[i], false, out->path, sizeof out->path, err));
        st = rt_ckpt_verify(out->path, &step, &bad);
        if (st == RT_OK && step != steps[i])
            st = rt_fail(&bad, RT_FORMAT, "%s: its MANIFEST is of step %" PRId64, out->path, step);
        if (st == RT_OK) {
            out->step = step;
            goto out;
        }
        if (st == RT_NOMEM) /* says nothing of the checkpoint */
            RT_FAIL(err, NOMEM, "%s", bad.msg);
        rt_warn(log, "checkpoint of step %" PRId64 " cannot be used: %s; %s", steps[i], bad.msg,
                i > 0 ? "falling back to the one before" : "there is none before it");
    }
    out->path[0] = '\0';
    st = n == 0 ? RT_OK : rt_fail(err, RT_FORMAT, "%s: none of its %zu checkpoints can be used; the last fault: %s", dir, n, bad.msg);
out:
    rt_free(steps);
    return st;
}
