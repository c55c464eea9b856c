#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "core/sha256.h"
#include "formats/json.h"
#include "formats/safetensors_header.h"

struct item {
    struct rt_tensor_decl decl; /* name is owned */
    uint64_t bytes;
    int shard;
};

struct rt_tensor_writer {
    bool model;
    char *path; /* of the file, or the directory */
    struct item *items;
    int64_t n, next; /* next: the first item that is not yet in a file */
    int shards, shard; /* shard: the one that is open, or comes next */
    uint64_t left;   /* data bytes that the open shard lacks */
    bool open;
    struct rt_publish out;
    struct rt_sha256 sha;
    uint64_t size; /* of the open or last file */
    char digest[65];
};

void rt_tensor_writer_free(struct rt_tensor_writer *w)
{
    if (w == NULL)
        return;
    if (w->open)
        rt_publish_abort(&w->out);
    for (int64_t i = 0; w->items != NULL && i < w->n; i++)
        free((char *)(uintptr_t)w->items[i].decl.name);
    rt_free(w->items);
    free(w->path);
    rt_free(w);
}

static int item_by_name(const void *a, const void *b)
{
    return strcmp((*(const struct item *const *)a)->decl.name, (*(const struct item *const *)b)->decl.name);
}

static enum rt_status check_unique(const struct rt_tensor_writer *w, struct rt_err *err)
{
    const struct item **sorted = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)w->n, sizeof *sorted, "names of tensors", &sorted, err));
    for (int64_t i = 0; i < w->n; i++)
        sorted[i] = &w->items[i];
    qsort(sorted, (size_t)w->n, sizeof *sorted, item_by_name);
    for (int64_t i = 1; i < w->n; i++)
        if (strcmp(sorted[i - 1]->decl.name, sorted[i]->decl.name) == 0)
            RT_FAIL(err, USAGE, "%s: two tensors are declared as '%s'", w->path, sorted[i]->decl.name);
out:
    rt_free(sorted);
    return st;
}

static enum rt_status new_writer(const char *path, const struct rt_tensor_decl *decl, int64_t n, struct rt_tensor_writer **out,
                                 struct rt_err *err)
{
    enum rt_status st;
    struct rt_tensor_writer *w = NULL;
    RT_TRY(rt_alloc(1, sizeof *w, "a writer of tensors", &w, err));
    w->path = strdup(path);
    w->n = n;
    w->out.fd = -1;
    RT_TRY(rt_alloc((size_t)n, sizeof *w->items, "a writer of tensors", &w->items, err));
    if (w->path == NULL)
        RT_FAIL(err, NOMEM, "out of memory for a path");
    if (n > RT_MAX_TENSORS)
        RT_FAIL(err, USAGE, "%s: %" PRId64 " tensors, expected at most %d", path, n, RT_MAX_TENSORS);
    for (int64_t i = 0; i < n; i++) {
        struct item *it = &w->items[i];
        const size_t len = strlen(decl[i].name);
        it->decl = decl[i];
        it->decl.name = strdup(decl[i].name);
        if (it->decl.name == NULL)
            RT_FAIL(err, NOMEM, "out of memory for the names of tensors");
        if (len == 0 || len > RT_MAX_TENSOR_NAME || strcmp(decl[i].name, "__metadata__") == 0)
            RT_FAIL(err, USAGE, "%s: '%.80s' cannot be the name of a tensor", path, decl[i].name);
        if (decl[i].ndim < 0 || decl[i].ndim > RT_MAX_NDIM || !rt_st_bytes(decl[i].dtype, decl[i].ndim, decl[i].ne, &it->bytes))
            RT_FAIL(err, USAGE, "%s: tensor '%s' has dimensions that cannot be stored", path, decl[i].name);
    }
    RT_TRY(check_unique(w, err));
    *out = w;
    w = NULL;
out:
    rt_tensor_writer_free(w);
    return st;
}

static enum rt_status shard_path(const struct rt_tensor_writer *w, int shard, char *name, size_t name_cap, char *path, size_t cap,
                                 struct rt_err *err)
{
    if (!w->model) {
        snprintf(path, cap, "%s", w->path);
        return strlen(w->path) < cap ? RT_OK : rt_fail(err, RT_USAGE, "%.80s...: the path is too long", w->path);
    }
    if (w->shards == 1)
        snprintf(name, name_cap, "model.safetensors");
    else
        snprintf(name, name_cap, "model-%05d-of-%05d.safetensors", shard + 1, w->shards);
    return rt_path_join(path, cap, w->path, name, err);
}

/* Header of the shard whose items are [first, end). */
static enum rt_status header(const struct rt_tensor_writer *w, int64_t first, int64_t end, struct rt_buf *text, struct rt_err *err)
{
    struct rt_json *root = NULL, *t, *list;
    enum rt_status st;
    uint64_t at = 0;
    RT_TRY(rt_json_new_object(&root, err));
    RT_TRY(rt_json_set_object(root, "__metadata__", &t, err));
    RT_TRY(rt_json_set_string(t, "format", "pt", err)); /* transformers refuses a file without it */
    for (int64_t i = first; i < end; i++) {
        const struct item *it = &w->items[i];
        RT_TRY(rt_json_set_object(root, it->decl.name, &t, err));
        RT_TRY(rt_json_set_string(t, "dtype", rt_dtype_name(it->decl.dtype), err));
        RT_TRY(rt_json_set_array(t, "shape", &list, err));
        for (int d = 0; d < it->decl.ndim; d++)
            RT_TRY(rt_json_set_int(list, NULL, it->decl.ne[d], err));
        RT_TRY(rt_json_set_array(t, "data_offsets", &list, err));
        RT_TRY(rt_json_set_int(list, NULL, (int64_t)at, err));
        at += it->bytes;
        RT_TRY(rt_json_set_int(list, NULL, (int64_t)at, err));
    }
    text->len = 0;
    RT_TRY(rt_buf_append(text, "\0\0\0\0\0\0\0\0", 8, err));
    RT_TRY(rt_json_dump(root, 0, text, err));
    while (text->len % 8 != 0)
        RT_TRY(rt_buf_append(text, " ", 1, err));
    const uint64_t len = text->len - 8;
    memcpy(text->data, &len, 8);
    if (len > RT_ST_MAX_HEADER)
        RT_FAIL(err, USAGE, "%s: a header of %" PRIu64 " bytes, the format allows %d", w->path, len, RT_ST_MAX_HEADER);
out:
    rt_json_free(root);
    return st;
}

static enum rt_status write_bytes(struct rt_tensor_writer *w, const void *data, size_t n, struct rt_err *err)
{
    if (!w->model)
        rt_sha256_update(&w->sha, data, n);
    w->size += n;
    return rt_publish_write(&w->out, data, n, err);
}

static enum rt_status close_shard(struct rt_tensor_writer *w, struct rt_err *err)
{
    const enum rt_status st = rt_publish_commit(&w->out, err);
    w->open = false;
    if (st != RT_OK)
        return st;
    w->shard++;
    rt_sha256_final_hex(&w->sha, w->digest);
    return RT_OK;
}

static enum rt_status open_shard(struct rt_tensor_writer *w, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf text = {0};
    char name[64], path[4096];
    const int64_t first = w->next;
    w->left = 0;
    for (; w->next < w->n && w->items[w->next].shard == w->shard; w->next++)
        w->left += w->items[w->next].bytes;
    RT_TRY(header(w, first, w->next, &text, err));
    RT_TRY(shard_path(w, w->shard, name, sizeof name, path, sizeof path, err));
    RT_TRY(rt_publish_open(&w->out, path, err));
    w->open = true;
    w->size = 0;
    rt_sha256_init(&w->sha);
    RT_TRY(write_bytes(w, text.data, text.len, err));
out:
    rt_buf_free(&text);
    return st;
}

/* Files that hold no (more) data are finished, and the next one is opened. */
static enum rt_status advance(struct rt_tensor_writer *w, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    while (st == RT_OK && w->open && w->left == 0) {
        st = close_shard(w, err);
        if (st == RT_OK && w->shard < w->shards)
            st = open_shard(w, err);
    }
    return st;
}

enum rt_status rt_tensor_writer_file(const char *path, const struct rt_tensor_decl *decl, int64_t n, struct rt_tensor_writer **out,
                                     struct rt_err *err)
{
    struct rt_tensor_writer *w = NULL;
    enum rt_status st;
    RT_TRY(new_writer(path, decl, n, &w, err));
    w->shards = 1;
    RT_TRY(open_shard(w, err));
    *out = w;
    w = NULL;
out:
    rt_tensor_writer_free(w);
    return st;
}

/* Another layout's files beside the new ones would be loaded in their place. */
static enum rt_status refuse_other_layout(const struct rt_tensor_writer *w, struct rt_err *err)
{
    const char *other = w->shards == 1 ? "model.safetensors.index.json" : "model.safetensors";
    char path[4096];
    const enum rt_status st = rt_path_join(path, sizeof path, w->path, other, err);
    if (st == RT_OK && rt_path_exists(path))
        return rt_fail(err, RT_REFUSED, "%s holds %s, which would hide or contradict the model to be written: remove it, or choose another directory",
                       w->path, other);
    return st;
}

enum rt_status rt_tensor_writer_model(const char *dir, const struct rt_tensor_decl *decl, int64_t n, uint64_t max_shard_bytes,
                                      struct rt_tensor_writer **out, struct rt_err *err)
{
    struct rt_tensor_writer *w = NULL;
    enum rt_status st;
    uint64_t filled = 0;
    RT_TRY(new_writer(dir, decl, n, &w, err));
    w->model = true;
    w->shards = 1;
    for (int64_t i = 0; i < n; i++) {
        struct item *it = &w->items[i];
        if (max_shard_bytes > 0 && filled > 0 && (it->bytes > max_shard_bytes || filled > max_shard_bytes - it->bytes)) {
            w->shards++;
            filled = 0;
        }
        it->shard = w->shards - 1;
        filled += it->bytes;
    }
    RT_TRY(rt_mkdirs(dir, err));
    RT_TRY(refuse_other_layout(w, err));
    RT_TRY(open_shard(w, err));
    *out = w;
    w = NULL;
out:
    rt_tensor_writer_free(w);
    return st;
}

enum rt_status rt_tensor_writer_put(struct rt_tensor_writer *w, const void *data, uint64_t bytes, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *p = data;
    while (bytes > 0) {
        if (w->left == 0)
            RT_TRY(advance(w, err));
        if (!w->open)
            RT_FAIL(err, USAGE, "%s: %" PRIu64 " bytes more than the declared tensors hold", w->path, bytes);
        const uint64_t n = bytes < w->left ? bytes : w->left;
        RT_TRY(write_bytes(w, p, (size_t)n, err));
        p += n;
        bytes -= n;
        w->left -= n;
    }
out:
    return st;
}

static enum rt_status write_index(struct rt_tensor_writer *w, struct rt_err *err)
{
    struct rt_json *root = NULL, *meta, *map;
    struct rt_buf text = {0};
    char name[64], path[4096];
    enum rt_status st;
    uint64_t total = 0;
    for (int64_t i = 0; i < w->n; i++)
        total += w->items[i].bytes;
    RT_TRY(rt_json_new_object(&root, err));
    RT_TRY(rt_json_set_object(root, "metadata", &meta, err));
    RT_TRY(rt_json_set_int(meta, "total_size", (int64_t)total, err));
    RT_TRY(rt_json_set_object(root, "weight_map", &map, err));
    for (int64_t i = 0; i < w->n; i++) {
        RT_TRY(shard_path(w, w->items[i].shard, name, sizeof name, path, sizeof path, err));
        RT_TRY(rt_json_set_string(map, w->items[i].decl.name, name, err));
    }
    RT_TRY(rt_json_dump(root, 2, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    RT_TRY(rt_path_join(path, sizeof path, w->path, "model.safetensors.index.json", err));
    RT_TRY(rt_publish_bytes(path, text.data, text.len, err));
out:
    rt_buf_free(&text);
    rt_json_free(root);
    return st;
}

enum rt_status rt_tensor_writer_finish(struct rt_tensor_writer *w, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(advance(w, err));
    if (w->open)
        RT_FAIL(err, USAGE, "%s: %" PRIu64 " bytes of the declared tensors were not put", w->out.path, w->left);
    if (w->model && w->shards > 1)
        RT_TRY(write_index(w, err));
out:
    return st;
}

void rt_tensor_writer_result(const struct rt_tensor_writer *w, uint64_t *bytes, char *sha)
{
    *bytes = w->size;
    memcpy(sha, w->digest, sizeof w->digest);
}
