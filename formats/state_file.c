#include "formats/state_file.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <zlib.h>

#include "core/io.h"
#include "core/mem.h"

enum { MAGIC_BYTES = 8, FRONT = MAGIC_BYTES + 8 };
static const char magic[MAGIC_BYTES] = "RTSTATE1";

struct rt_state_writer {
    struct rt_publish out;
    char *block; /* RT_STATE_BLOCK bytes and their checksum */
    size_t held;
    uint64_t bytes, put;
    uint32_t index;
};

struct rt_state_reader {
    char path[4096];
    int fd;
    struct rt_json *header;
    uint64_t bytes, left, at; /* stream: whole, not yet in block; offset in the file */
    uint32_t index;
    char *block;
    size_t held, taken;
};

static uint32_t block_crc(uint32_t index, const void *data, size_t n)
{
    return (uint32_t)crc32(index, data, (uInt)n);
}

static uint64_t file_bytes(uint64_t header, uint64_t stream)
{
    return FRONT + header + stream + (stream + RT_STATE_BLOCK - 1) / RT_STATE_BLOCK * sizeof(uint32_t);
}

/* ---- writing ---- */

static enum rt_status write_header(struct rt_state_writer *w, const char *kind, const struct rt_json *header, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    struct rt_buf text = {0};
    const char *key;
    const struct rt_json *value;
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_string(v, "kind", kind, err));
    RT_TRY(rt_json_set_int(v, "version", RT_STATE_VERSION, err));
    RT_TRY(rt_json_set_int(v, "bytes", (int64_t)w->bytes, err));
    for (size_t i = 0; rt_json_member(header, i, &key, &value); i++)
        RT_TRY(rt_json_set_copy(v, key, value, err));
    RT_TRY(rt_json_dump(v, 0, &text, err));
    if (text.len > RT_STATE_MAX_HEADER)
        RT_FAIL(err, USAGE, "%s: a header of %zu bytes, expected at most %d", w->out.path, text.len, RT_STATE_MAX_HEADER);
    const uint32_t front[2] = {(uint32_t)text.len, (uint32_t)crc32(0, (const Bytef *)text.data, (uInt)text.len)};
    RT_TRY(rt_publish_write(&w->out, magic, sizeof magic, err));
    RT_TRY(rt_publish_write(&w->out, front, sizeof front, err));
    RT_TRY(rt_publish_write(&w->out, text.data, text.len, err));
out:
    rt_buf_free(&text);
    rt_json_free(v);
    return st;
}

enum rt_status rt_state_create(const char *path, const char *kind, const struct rt_json *header, uint64_t bytes, struct rt_state_writer **out,
                               struct rt_err *err)
{
    enum rt_status st;
    struct rt_state_writer *w = NULL;
    RT_TRY(rt_alloc(1, sizeof *w, "a file of state", &w, err));
    w->out.fd = -1;
    w->bytes = bytes;
    RT_TRY(rt_alloc(RT_STATE_BLOCK + sizeof(uint32_t), 1, "a block of state", &w->block, err));
    RT_TRY(rt_publish_open(&w->out, path, err));
    RT_TRY(write_header(w, kind, header, err));
    *out = w;
    w = NULL;
out:
    rt_state_writer_free(w);
    return st;
}

static enum rt_status flush_block(struct rt_state_writer *w, struct rt_err *err)
{
    const uint32_t crc = block_crc(w->index++, w->block, w->held);
    memcpy(w->block + w->held, &crc, sizeof crc);
    const enum rt_status st = rt_publish_write(&w->out, w->block, w->held + sizeof crc, err);
    w->held = 0;
    return st;
}

enum rt_status rt_state_put(struct rt_state_writer *w, const void *data, uint64_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *p = data;
    RT_ASSERT(n <= w->bytes - w->put);
    while (n > 0) {
        const size_t room = RT_STATE_BLOCK - w->held, take = n < room ? (size_t)n : room;
        memcpy(w->block + w->held, p, take);
        w->held += take;
        w->put += take;
        p += take;
        n -= take;
        if (w->held == RT_STATE_BLOCK)
            RT_TRY(flush_block(w, err));
    }
out:
    return st;
}

enum rt_status rt_state_commit(struct rt_state_writer *w, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (w->put != w->bytes)
        RT_FAIL(err, USAGE, "%s: %" PRIu64 " bytes put, %" PRIu64 " were announced", w->out.path, w->put, w->bytes);
    if (w->held > 0)
        RT_TRY(flush_block(w, err));
    RT_TRY(rt_publish_commit(&w->out, err));
out:
    return st;
}

void rt_state_writer_free(struct rt_state_writer *w)
{
    if (w == NULL)
        return;
    if (w->out.fd >= 0)
        rt_publish_abort(&w->out);
    rt_free(w->block);
    rt_free(w);
}

/* ---- reading ---- */

static enum rt_status read_header(struct rt_state_reader *r, uint64_t size, const char *kind, struct rt_err *err)
{
    enum rt_status st;
    char front[FRONT], *text = NULL;
    const char *found;
    uint32_t n, crc;
    int64_t version, bytes;
    if (size < FRONT)
        RT_FAIL(err, FORMAT, "%s: %" PRIu64 " bytes: no file of state", r->path, size);
    RT_TRY(rt_file_pread(r->fd, r->path, front, FRONT, 0, err));
    memcpy(&n, front + MAGIC_BYTES, sizeof n);
    memcpy(&crc, front + MAGIC_BYTES + sizeof n, sizeof crc);
    if (memcmp(front, magic, sizeof magic) != 0 || n > RT_STATE_MAX_HEADER || n > size - FRONT)
        RT_FAIL(err, FORMAT, "%s: no file of state, or one that was cut short", r->path);
    RT_TRY(rt_alloc((size_t)n + 1, 1, "a header", &text, err));
    RT_TRY(rt_file_pread(r->fd, r->path, text, n, FRONT, err));
    if (crc32(0, (const Bytef *)text, n) != crc)
        RT_FAIL(err, FORMAT, "%s: damaged: the header does not agree with its checksum", r->path);
    RT_TRY(rt_json_parse(text, n, r->path, &r->header, err));
    RT_TRY(rt_json_string(r->header, "kind", &found, err));
    if (strcmp(found, kind) != 0)
        RT_FAIL(err, FORMAT, "%s: holds '%.40s', expected '%s'", r->path, found, kind);
    RT_TRY(rt_json_int(r->header, "version", RT_STATE_VERSION, RT_STATE_VERSION, &version, err));
    RT_TRY(rt_json_int(r->header, "bytes", 0, INT64_MAX / 2, &bytes, err));
    if (size != file_bytes(n, (uint64_t)bytes))
        RT_FAIL(err, FORMAT, "%s: %" PRIu64 " bytes, its header says %" PRIu64, r->path, size, file_bytes(n, (uint64_t)bytes));
    r->bytes = r->left = (uint64_t)bytes;
    r->at = FRONT + n;
out:
    rt_free(text);
    return st;
}

enum rt_status rt_state_open(const char *path, const char *kind, struct rt_state_reader **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_state_reader *r = NULL;
    uint64_t size;
    RT_TRY(rt_alloc(1, sizeof *r, "a file of state", &r, err));
    r->fd = -1;
    RT_TRY(rt_path_join(r->path, sizeof r->path, "", path, err));
    RT_TRY(rt_file_open(path, &r->fd, &size, err));
    RT_TRY(read_header(r, size, kind, err));
    RT_TRY(rt_alloc((r->bytes < RT_STATE_BLOCK ? (size_t)r->bytes : RT_STATE_BLOCK) + sizeof(uint32_t), 1, "a block of state", &r->block, err));
    *out = r;
    r = NULL;
out:
    rt_state_reader_free(r);
    return st;
}

const struct rt_json *rt_state_header(const struct rt_state_reader *r)
{
    return r->header;
}

uint64_t rt_state_bytes(const struct rt_state_reader *r)
{
    return r->bytes;
}

static enum rt_status next_block(struct rt_state_reader *r, struct rt_err *err)
{
    enum rt_status st;
    const size_t n = r->left < RT_STATE_BLOCK ? (size_t)r->left : RT_STATE_BLOCK;
    uint32_t crc;
    RT_TRY(rt_file_pread(r->fd, r->path, r->block, n + sizeof crc, r->at, err));
    memcpy(&crc, r->block + n, sizeof crc);
    if (block_crc(r->index, r->block, n) != crc)
        RT_FAIL(err, FORMAT, "%s: damaged: the %zu bytes at offset %" PRIu64 " do not agree with their checksum", r->path, n, r->at);
    r->index++;
    r->at += n + sizeof crc;
    r->left -= n;
    r->held = n;
    r->taken = 0;
out:
    return st;
}

enum rt_status rt_state_read(struct rt_state_reader *r, void *dst, uint64_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char *p = dst;
    if (n > r->left + (r->held - r->taken))
        RT_FAIL(err, FORMAT, "%s: %" PRIu64 " bytes more were expected than it holds", r->path, n - r->left - (r->held - r->taken));
    while (n > 0) {
        if (r->taken == r->held)
            RT_TRY(next_block(r, err));
        const size_t have = r->held - r->taken, take = n < have ? (size_t)n : have;
        if (p != NULL) {
            memcpy(p, r->block + r->taken, take);
            p += take;
        }
        r->taken += take;
        n -= take;
    }
out:
    return st;
}

void rt_state_reader_free(struct rt_state_reader *r)
{
    if (r == NULL)
        return;
    rt_file_close(r->fd);
    rt_json_free(r->header);
    rt_free(r->block);
    rt_free(r);
}
