#include "formats/safetensors.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "core/sha256.h"
#include "formats/json.h"
#include "formats/safetensors_header.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little-endian");

struct file {
    char *path;
    const char *name; /* the last part of path */
    int fd;
    uint64_t size;
    char *text; /* header, holds the names */
    size_t text_len;
    struct rt_st_list list;
};

struct rt_tensors {
    char *path;
    struct file *files;
    int n_files;
    struct rt_tensor *at;
    int64_t n;
    const struct rt_tensor **by_name; /* [n] ascending */
    uint64_t total;
    char sha[65];
};

static enum rt_status copy_string(const char *s, char **out, struct rt_err *err)
{
    *out = strdup(s);
    return *out != NULL ? RT_OK : rt_fail(err, RT_NOMEM, "out of memory for a path");
}

void rt_tensors_free(struct rt_tensors *t)
{
    if (t == NULL)
        return;
    for (int i = 0; i < t->n_files; i++) {
        rt_file_close(t->files[i].fd);
        free(t->files[i].path);
        rt_free(t->files[i].text);
        rt_free(t->files[i].list.at);
    }
    rt_free(t->files);
    rt_free(t->at);
    rt_free(t->by_name);
    free(t->path);
    rt_free(t);
}

static bool is_lfs_pointer(const struct file *f)
{
    static const char begin[] = "version https://git-lfs";
    char head[sizeof begin - 1];
    return f->size >= sizeof head && rt_file_pread(f->fd, f->path, head, sizeof head, 0, NULL) == RT_OK && memcmp(head, begin, sizeof head) == 0;
}

/* f->path is set: opens it and reads its header; sha gets the header's bytes unless NULL. */
static enum rt_status open_file(struct file *f, struct rt_sha256 *sha, struct rt_err *err)
{
    enum rt_status st;
    uint64_t n;
    RT_TRY(rt_file_open(f->path, &f->fd, &f->size, err));
    if (f->size < 8)
        RT_FAIL(err, FORMAT, "%s: not a safetensors file: %" PRIu64 " bytes, expected at least 8", f->path, f->size);
    RT_TRY(rt_file_pread(f->fd, f->path, &n, 8, 0, err));
    if (is_lfs_pointer(f))
        RT_FAIL(err, FORMAT, "%s: a git-lfs pointer, expected the tensors that it stands for: `git lfs pull` in its repository fetches them", f->path);
    if (n > RT_ST_MAX_HEADER || n > f->size - 8)
        RT_FAIL(err, FORMAT, "%s: not a safetensors file, or cut: a header of %" PRIu64 " bytes in a file of %" PRIu64
                " (the limit is %d)", f->path, n, f->size, RT_ST_MAX_HEADER);
    f->text_len = (size_t)n;
    RT_TRY(rt_alloc(f->text_len + 1, 1, "a safetensors header", &f->text, err));
    RT_TRY(rt_file_pread(f->fd, f->path, f->text, f->text_len, 8, err));
    if (sha != NULL)
        rt_sha256_update(sha, f->text, f->text_len);
    RT_TRY(rt_st_header_parse(f->text, f->text_len, f->size - 8 - n, f->path, &f->list, err));
    for (int64_t i = 0; i < f->list.n; i++)
        f->list.at[i].offset += 8 + n;
out:
    return st;
}

static enum rt_status add_file(struct rt_tensors *t, const char *dir, const char *name, struct rt_sha256 *sha, struct rt_err *err)
{
    struct file *f = &t->files[t->n_files++];
    char path[4096];
    enum rt_status st;
    f->fd = -1;
    if (dir != NULL) {
        RT_TRY(rt_path_join(path, sizeof path, dir, name, err));
        name = path;
    }
    RT_TRY(copy_string(name, &f->path, err));
    const char *slash = strrchr(f->path, '/');
    f->name = slash != NULL ? slash + 1 : f->path;
    RT_TRY(open_file(f, sha, err));
out:
    return st;
}

static int by_string(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool plain_name(const char *s, size_t n)
{
    return n > 0 && n < 256 && strlen(s) == n && strchr(s, '/') == NULL && strcmp(s, ".") != 0 && strcmp(s, "..") != 0;
}

/* The distinct files of weight_map, by name, are opened. */
static enum rt_status open_shards(struct rt_tensors *t, const char *dir, const struct rt_json *map, struct rt_err *err)
{
    const char **names = NULL, *key;
    const struct rt_json *v;
    const size_t n = rt_json_len(map);
    size_t n_files = 0;
    enum rt_status st;
    RT_TRY(rt_alloc(n, sizeof *names, "the index of tensors", &names, err));
    for (size_t i = 0; i < n; i++) {
        size_t len = 0;
        rt_json_member(map, i, &key, &v);
        names[i] = rt_json_as_string(v, &len);
        if (names[i] == NULL || !plain_name(names[i], len))
            RT_FAIL(err, FORMAT, "%s: weight_map of '%.80s': expected the plain name of a file in the same directory, found '%.80s'",
                    rt_json_source(map), key, names[i] != NULL ? names[i] : "no string");
    }
    qsort(names, n, sizeof *names, by_string);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(names[i], names[n_files - 1]) != 0)
            names[n_files++] = names[i];
    RT_TRY(rt_alloc(n_files, sizeof *t->files, "the list of shards", &t->files, err));
    for (size_t i = 0; i < n_files; i++)
        RT_TRY(add_file(t, dir, names[i], NULL, err));
out:
    rt_free(names);
    return st;
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const struct rt_tensor *const *)a)->name, (*(const struct rt_tensor *const *)b)->name);
}

/* One list of all files; with an index, what its weight_map names and no more. */
static enum rt_status gather(struct rt_tensors *t, const struct rt_json *map, struct rt_err *err)
{
    enum rt_status st;
    int64_t n = 0;
    for (int f = 0; f < t->n_files; f++)
        n += t->files[f].list.n;
    if (n > RT_MAX_TENSORS)
        RT_FAIL(err, FORMAT, "%s: %" PRId64 " tensors, expected at most %d", t->path, n, RT_MAX_TENSORS);
    RT_TRY(rt_alloc((size_t)n, sizeof *t->at, "the index of tensors", &t->at, err));
    RT_TRY(rt_alloc((size_t)n, sizeof *t->by_name, "the index of tensors", &t->by_name, err));
    for (int f = 0; f < t->n_files; f++) {
        struct rt_st_list *l = &t->files[f].list;
        for (int64_t i = 0; i < l->n; i++) {
            const char *home = map != NULL ? rt_json_as_string(rt_json_get(map, l->at[i].name), NULL) : NULL;
            if (map != NULL && (home == NULL || strcmp(home, t->files[f].name) != 0))
                continue;
            t->at[t->n] = l->at[i];
            t->at[t->n].file = f;
            t->by_name[t->n] = &t->at[t->n];
            t->total += l->at[i].bytes;
            t->n++;
        }
        rt_free(l->at);
        *l = (struct rt_st_list){0};
    }
    qsort(t->by_name, (size_t)t->n, sizeof *t->by_name, by_name);
    for (int64_t i = 1; i < t->n; i++)
        if (strcmp(t->by_name[i - 1]->name, t->by_name[i]->name) == 0)
            RT_FAIL(err, FORMAT, "%s: two tensors have the name '%s'", t->files[t->by_name[i]->file].path, t->by_name[i]->name);
    const char *key;
    const struct rt_json *v;
    for (size_t i = 0; map != NULL && (size_t)t->n != rt_json_len(map) && rt_json_member(map, i, &key, &v); i++)
        if (rt_tensors_find(t, key) == NULL)
            RT_FAIL(err, FORMAT, "%s: tensor '%s' should be in '%s', and is not: the index and the shards do not belong together, or a "
                    "shard is of another download", rt_json_source(map), key, rt_json_as_string(v, NULL));
out:
    return st;
}

static enum rt_status hash_file(struct rt_sha256 *sha, const char *dir, const char *name, struct rt_buf *bytes, struct rt_err *err)
{
    char path[4096];
    enum rt_status st;
    bytes->len = 0;
    RT_TRY(rt_path_join(path, sizeof path, dir, name, err));
    if (!rt_path_exists(path))
        return RT_OK;
    RT_TRY(rt_file_read_all(path, RT_ST_MAX_HEADER, bytes, err));
    rt_sha256_update(sha, bytes->data, bytes->len);
out:
    return st;
}

/* A directory: model.safetensors first, as transformers does, then the index. */
static enum rt_status open_dir(struct rt_tensors *t, const char *dir, struct rt_json **index, const struct rt_json **map,
                               struct rt_sha256 *sha, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf bytes = {0};
    char single[4096], path[4096];
    RT_TRY(rt_path_join(single, sizeof single, dir, "model.safetensors", err));
    RT_TRY(rt_path_join(path, sizeof path, dir, "model.safetensors.index.json", err));
    RT_TRY(hash_file(sha, dir, "config.json", &bytes, err));
    if (rt_path_exists(single)) {
        RT_TRY(rt_alloc(1, sizeof *t->files, "the list of files", &t->files, err));
        RT_TRY(add_file(t, NULL, single, sha, err));
        goto out;
    }
    if (!rt_path_exists(path))
        RT_FAIL(err, FORMAT, "%s: no model here: expected model.safetensors or model.safetensors.index.json", dir);
    RT_TRY(hash_file(sha, dir, "model.safetensors.index.json", &bytes, err));
    RT_TRY(rt_json_parse(bytes.data, bytes.len, path, index, err));
    *map = rt_json_get(*index, "weight_map");
    if (*map == NULL || rt_json_typeof(*map) != RT_JSON_OBJECT || rt_json_len(*map) == 0)
        RT_FAIL(err, FORMAT, "%s: expected an object \"weight_map\" that is not empty", path);
    if (rt_json_len(*map) > RT_MAX_TENSORS)
        RT_FAIL(err, FORMAT, "%s: %zu tensors, expected at most %d", path, rt_json_len(*map), RT_MAX_TENSORS);
    RT_TRY(open_shards(t, dir, *map, err));
out:
    rt_buf_free(&bytes);
    return st;
}

enum rt_status rt_tensors_open(const char *path, struct rt_tensors **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_tensors *t = NULL;
    struct rt_json *index = NULL;
    const struct rt_json *map = NULL;
    struct rt_sha256 sha;
    rt_sha256_init(&sha);
    RT_TRY(rt_alloc(1, sizeof *t, "an index of tensors", &t, err));
    RT_TRY(copy_string(path, &t->path, err));
    if (rt_path_is_dir(path)) {
        RT_TRY(open_dir(t, path, &index, &map, &sha, err));
    } else {
        RT_TRY(rt_alloc(1, sizeof *t->files, "the list of files", &t->files, err));
        RT_TRY(add_file(t, NULL, path, &sha, err));
    }
    RT_TRY(gather(t, map, err));
    rt_sha256_final_hex(&sha, t->sha);
    *out = t;
    t = NULL;
out:
    rt_json_free(index);
    rt_tensors_free(t);
    return st;
}

int64_t rt_tensors_count(const struct rt_tensors *t)
{
    return t->n;
}

const struct rt_tensor *rt_tensors_at(const struct rt_tensors *t, int64_t i)
{
    RT_ASSERT(i >= 0 && i < t->n);
    return &t->at[i];
}

/* First position whose name is not below `name`. */
static int64_t lower_bound(const struct rt_tensors *t, const char *name)
{
    int64_t lo = 0, hi = t->n;
    while (lo < hi) {
        const int64_t mid = lo + (hi - lo) / 2;
        if (strcmp(t->by_name[mid]->name, name) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

const struct rt_tensor *rt_tensors_find(const struct rt_tensors *t, const char *name)
{
    const int64_t i = lower_bound(t, name);
    return i < t->n && strcmp(t->by_name[i]->name, name) == 0 ? t->by_name[i] : NULL;
}

uint64_t rt_tensors_total_bytes(const struct rt_tensors *t)
{
    return t->total;
}

const char *rt_tensors_path(const struct rt_tensors *t)
{
    return t->path;
}

int rt_tensors_n_files(const struct rt_tensors *t)
{
    return t->n_files;
}

const char *rt_tensors_file(const struct rt_tensors *t, int file)
{
    return t->files[file].path;
}

int rt_tensors_fd(const struct rt_tensors *t, int file)
{
    return t->files[file].fd;
}

const char *rt_tensors_sha256(const struct rt_tensors *t)
{
    return t->sha;
}

int64_t rt_tensor_elements(const struct rt_tensor *tensor)
{
    return (int64_t)(tensor->bytes / rt_dtype_size(tensor->dtype));
}

static void shape_text(char *buf, size_t cap, const char *dtype, int ndim, const int64_t *ne)
{
    size_t n = (size_t)snprintf(buf, cap, "%s [", dtype);
    for (int i = 0; i < ndim && n < cap; i++) {
        if (ne[i] < 0)
            n += (size_t)snprintf(buf + n, cap - n, "%sany", i > 0 ? ", " : "");
        else
            n += (size_t)snprintf(buf + n, cap - n, "%s%" PRId64, i > 0 ? ", " : "", ne[i]);
    }
    if (n < cap)
        snprintf(buf + n, cap - n, "]");
}

const char *rt_tensor_describe(const struct rt_tensor *tensor, char buf[160])
{
    shape_text(buf, 160, rt_dtype_name(tensor->dtype), tensor->ndim, tensor->ne);
    return buf;
}

enum rt_status rt_tensors_get(const struct rt_tensors *t, const char *name, unsigned dtypes, int ndim, const int64_t *dims,
                              const struct rt_tensor **out, struct rt_err *err)
{
    const struct rt_tensor *x = rt_tensors_find(t, name);
    if (x == NULL) {
        const int64_t at = lower_bound(t, name);
        return rt_fail(err, RT_FORMAT, "%s: there is no tensor '%s' among its %" PRId64 "%s%s", t->path, name, t->n,
                       t->n > 0 ? "; the next name in order is " : "", t->n > 0 ? t->by_name[at < t->n ? at : t->n - 1]->name : "");
    }
    bool good = (dtypes == 0 || (dtypes & RT_DT(x->dtype)) != 0) && (ndim < 0 || ndim == x->ndim);
    for (int i = 0; good && dims != NULL && i < ndim; i++)
        good = dims[i] < 0 || dims[i] == x->ne[i];
    if (good) {
        *out = x;
        return RT_OK;
    }
    char types[160] = "", want[300], found[160];
    for (int d = 0; d < RT_DTYPE_COUNT && dtypes != 0; d++)
        if ((dtypes & 1u << d) != 0)
            snprintf(types + strlen(types), sizeof types - strlen(types), "%s%s", types[0] != '\0' ? " or " : "",
                     rt_dtype_name((enum rt_dtype)d));
    static const int64_t any[RT_MAX_NDIM] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const char *type = types[0] != '\0' ? types : "any type";
    if (ndim < 0)
        snprintf(want, sizeof want, "%s of any shape", type);
    else
        shape_text(want, sizeof want, type, ndim, dims != NULL ? dims : any);
    return rt_fail(err, RT_SHAPE, "%s: tensor '%s': expected %s, found %s", t->files[x->file].path, name, want,
                   rt_tensor_describe(x, found));
}

enum rt_status rt_tensors_read(const struct rt_tensors *t, const struct rt_tensor *tensor, void *dst, struct rt_err *err)
{
    return rt_tensors_read_range(t, tensor, 0, tensor->bytes, dst, err);
}

enum rt_status rt_tensors_read_range(const struct rt_tensors *t, const struct rt_tensor *tensor, uint64_t first, uint64_t n,
                                     void *dst, struct rt_err *err)
{
    const struct file *f = &t->files[tensor->file];
    if (first > tensor->bytes || n > tensor->bytes - first)
        return rt_fail(err, RT_USAGE, "%s: tensor '%s': bytes %" PRIu64 " to %" PRIu64 " asked for, it has %" PRIu64, f->path,
                       tensor->name, first, first + n, tensor->bytes);
    return rt_file_pread(f->fd, f->path, dst, (size_t)n, tensor->offset + first, err);
}

enum rt_status rt_tensors_read_f32(const struct rt_tensors *t, const struct rt_tensor *tensor, int64_t first, int64_t n,
                                   float *dst, struct rt_err *err)
{
    enum { CHUNK = 1 << 16 };
    const size_t size = rt_dtype_size(tensor->dtype);
    const int64_t total = rt_tensor_elements(tensor);
    enum rt_status st = RT_OK;
    char *buf = NULL;
    if (first < 0 || n < 0 || first > total || n > total - first)
        RT_FAIL(err, USAGE, "tensor '%s': elements %" PRId64 " to %" PRId64 " asked for, it has %" PRId64, tensor->name, first,
                first + n, total);
    if (tensor->dtype == RT_F32)
        return rt_tensors_read_range(t, tensor, (uint64_t)first * 4, (uint64_t)n * 4, dst, err);
    RT_TRY(rt_alloc(n < CHUNK ? (size_t)n : CHUNK, size, "a read buffer", &buf, err));
    for (int64_t at = 0; at < n; at += CHUNK) {
        const int64_t m = n - at < CHUNK ? n - at : CHUNK;
        RT_TRY(rt_tensors_read_range(t, tensor, (uint64_t)(first + at) * size, (uint64_t)m * size, buf, err));
        if (!rt_to_f32(dst + at, buf, tensor->dtype, (size_t)m))
            RT_FAIL(err, UNSUPPORTED, "%s: tensor '%s' of type %s cannot be read as real numbers", t->files[tensor->file].path,
                    tensor->name, rt_dtype_name(tensor->dtype));
    }
out:
    rt_free(buf);
    return st;
}
