/* Writing a set of row shards. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>

#include "core/io.h"
#include "core/sha256.h"
#include "formats/manifest.h"
#include "formats/row_identity.h"
#include "formats/safetensors.h"
#include "formats/shard_block.h"
#include "formats/shard_file.h"
#include "formats/shard_pack.h"
#include "formats/state_file.h"

struct rt_shard_sink {
    char dir[4096];
    int lock;
    struct rt_row_identity id;
    struct rt_shard_options opt;
    struct rt_manifest manifest; /* lines are dropped after open: counts are what is needed */
    bool broken;                 /* a write failed: the set goes on from what is published when it is opened again */
    struct rt_packer packer;
    struct rt_buf buf;           /* of one header or index */
    struct rt_buf report;        /* of the next header */
    /* the shard that is being written */
    bool open;
    struct rt_publish out;
    struct rt_sha256 sha;
    uint64_t header_bytes;
    uint32_t header_crc;
    struct rt_buf seq; /* of struct rt_seq_info */
    int64_t n_seq, tokens, rows;
    int64_t held;      /* how many of n_seq survive a crash */
};

void rt_shard_sink_free(struct rt_shard_sink *s)
{
    if (s == NULL)
        return;
    if (s->open && s->held > 0)
        rt_file_close(s->out.fd); /* the file stays: the next writer goes on with it */
    else if (s->open)
        rt_publish_abort(&s->out);
    rt_file_close(s->lock);
    rt_packer_free(&s->packer);
    rt_buf_free(&s->buf);
    rt_buf_free(&s->report);
    rt_buf_free(&s->seq);
    rt_manifest_free(&s->manifest);
    rt_free(s);
}

uint64_t rt_shard_sink_bytes(const struct rt_shard_sink *s)
{
    return s->manifest.bytes;
}

enum rt_status rt_shard_sink_report(struct rt_shard_sink *s, const char *json, size_t len, struct rt_err *err)
{
    if (len > RT_SHARD_MAX_REPORT || rt_shard_version(&s->id) < 2)
        return rt_fail(err, RT_USAGE, "%s: a report of %zu bytes: expected one of a retargeted set, of at most %d", s->dir, len, RT_SHARD_MAX_REPORT);
    s->report.len = 0;
    return rt_buf_append(&s->report, json, len, err);
}

static enum rt_status write_bytes(struct rt_shard_sink *s, const struct rt_buf *b, struct rt_err *err)
{
    rt_sha256_update(&s->sha, b->data, b->len);
    return rt_publish_write(&s->out, b->data, b->len, err);
}

static enum rt_status open_shard(struct rt_shard_sink *s, struct rt_err *err)
{
    enum rt_status st;
    char name[RT_NAME_CAP], path[4096];
    const struct rt_shard_header h = {s->opt.part, s->opt.n_parts, s->manifest.sequences, s->id, s->report};
    rt_shard_name(s->opt.part, s->opt.n_parts, s->manifest.n, name);
    RT_TRY(rt_path_join(path, sizeof path, s->dir, name, err));
    RT_TRY(rt_publish_open(&s->out, path, err));
    s->open = true;
    rt_sha256_init(&s->sha);
    s->seq.len = 0;
    s->n_seq = s->tokens = s->rows = s->held = 0;
    s->buf.len = 0;
    RT_TRY(rt_shard_header_pack(&h, &s->buf, err));
    s->header_bytes = s->buf.len;
    s->header_crc = (uint32_t)crc32(0, (const Bytef *)s->buf.data, (uInt)s->buf.len);
    RT_TRY(write_bytes(s, &s->buf, err));
out:
    return st;
}

static enum rt_status hold_path(const struct rt_shard_sink *s, int64_t shard, char path[4096], struct rt_err *err)
{
    char name[RT_NAME_CAP], hold[RT_NAME_CAP + 8];
    rt_shard_name(s->opt.part, s->opt.n_parts, shard, name);
    snprintf(hold, sizeof hold, "%s.hold", name);
    return rt_path_join(path, 4096, s->dir, hold, err);
}

/* Index, publish, manifest line: after the last of these the shard exists. */
static enum rt_status close_shard(struct rt_shard_sink *s, struct rt_err *err)
{
    enum rt_status st;
    char path[4096];
    const struct rt_seq_info *seq = (const void *)s->seq.data;
    struct rt_manifest_line line = {.sequences = s->n_seq, .tokens = s->tokens, .rows = s->rows};
    s->buf.len = 0;
    RT_TRY(rt_shard_index_pack(s->out.written, s->header_bytes, s->header_crc, seq, s->n_seq, s->id.n_lse, &s->buf, err));
    RT_TRY(write_bytes(s, &s->buf, err));
    rt_shard_name(s->opt.part, s->opt.n_parts, s->manifest.n, line.file);
    rt_sha256_final_hex(&s->sha, line.sha256);
    line.bytes = s->out.written;
    line.first = s->manifest.sequences;
    line.last = line.first + s->n_seq - 1;
    line.last_line = seq[s->n_seq - 1].source_line;
    s->open = false;
    RT_TRY(rt_publish_commit(&s->out, err));
    RT_TRY(rt_manifest_append(s->dir, &s->manifest, &line, err));
    s->manifest.n++;
    s->manifest.sequences += s->n_seq;
    s->manifest.rows += s->rows;
    s->manifest.bytes += line.bytes;
    if (s->held > 0) {
        RT_TRY(hold_path(s, s->manifest.n - 1, path, err));
        unlink(path); /* a leftover would not be taken, and the next writer removes it */
    }
    s->held = 0;
out:
    return st;
}

static int64_t next_ordinal(const struct rt_shard_sink *s)
{
    return s->manifest.sequences + (s->open ? s->n_seq : 0);
}

static enum rt_status check_open(const struct rt_shard_sink *s, struct rt_err *err)
{
    if (!s->broken && !s->manifest.finished)
        return RT_OK;
    return rt_fail(err, RT_REFUSED, "%s: %s", s->dir, s->broken ? "writing failed before" : "the set is complete: nothing can be added");
}

/* The sequence is in the file: it counts, and may be the shard's last. */
static enum rt_status count_in(struct rt_shard_sink *s, const struct rt_seq_info *info, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_append(&s->seq, info, sizeof *info, err));
    s->n_seq++;
    s->tokens += info->n_tokens;
    s->rows += info->n_rows;
    if (s->rows >= s->opt.rows_per_shard)
        RT_TRY(close_shard(s, err));
out:
    return st;
}

/* The next block of a sequence into the file; *info is the sequence's, filled on the way. */
static enum rt_status put_block(struct rt_shard_sink *s, const struct rt_packed_block *b, struct rt_seq_info *info, struct rt_err *err)
{
    enum rt_status st;
    if (b->st != RT_OK)
        RT_TRY(rt_fail(err, b->st, "%s", b->err.msg));
    if (b->from.token == 0) {
        *info = b->info;
        if (!s->open)
            RT_TRY(open_shard(s, err));
        info->offset = s->out.written;
        info->crc = (uint32_t)crc32(0, NULL, 0);
    }
    info->crc = (uint32_t)crc32(info->crc, (const Bytef *)b->bytes.data, (uInt)b->bytes.len);
    RT_TRY(write_bytes(s, &b->bytes, err));
    info->bytes = s->out.written - info->offset;
    if (b->last)
        RT_TRY(count_in(s, info, err));
out:
    return st;
}

static enum rt_status put_all(void *self, const struct rt_rows *rows, int64_t n, struct rt_err *err)
{
    struct rt_shard_sink *s = self;
    struct rt_seq_info info = {0};
    struct rt_pack_place at = {0};
    enum rt_status st;
    const int64_t ordinal = next_ordinal(s);
    RT_TRY(check_open(s, err));
    while (at.seq < n) {
        RT_TRY(rt_packer_run(&s->packer, s->opt.level, &s->id, rows, n, ordinal, &at, err));
        for (int64_t i = 0; i < s->packer.n; i++)
            RT_TRY(put_block(s, &s->packer.block[i], &info, err));
    }
out:
    s->broken |= st != RT_OK;
    return st;
}

static enum rt_status put(void *self, const struct rt_rows *rows, struct rt_err *err)
{
    return put_all(self, rows, 1, err);
}

void rt_shard_sink_threads(struct rt_shard_sink *s, struct rt_pool *pool)
{
    rt_packer_free(&s->packer);
    s->packer.pool = pool;
}

uint64_t rt_shard_sink_pack_bytes(const struct rt_row_identity *id, int64_t longest, int threads)
{
    return rt_pack_bytes(id, longest, threads);
}

enum rt_status rt_shard_sink_pack(const struct rt_shard_sink *s, const struct rt_rows *rows, int64_t ahead, struct rt_shard_packed *out,
                                  struct rt_err *err)
{
    enum rt_status st;
    struct rt_codec codec = {0};
    struct rt_block_cut from = {0, 0}, to;
    struct rt_pack p = {&out->bytes, RT_OK, err};
    out->bytes.len = 0;
    RT_TRY(check_open(s, err));
    RT_TRY(rt_pack_describe(rows, &s->id, next_ordinal(s) + ahead, &out->info, err));
    for (; from.token < rows->n_tokens; from = to) {
        RT_TRY(rt_block_next(rows, &s->id, from, &to, err));
        RT_TRY(rt_block_pack(&codec, s->opt.level, rows, &s->id, out->info.ordinal, from, to, &p, err));
    }
    uLong crc = crc32(0, NULL, 0);
    for (size_t at = 0; at < out->bytes.len; at += 1u << 30)
        crc = crc32(crc, (const Bytef *)out->bytes.data + at, (uInt)(out->bytes.len - at < 1u << 30 ? out->bytes.len - at : 1u << 30));
    out->info.crc = (uint32_t)crc;
    out->info.bytes = out->bytes.len;
out:
    rt_codec_free(&codec);
    return st;
}

enum rt_status rt_shard_sink_put_packed(struct rt_shard_sink *s, const struct rt_shard_packed *p, struct rt_err *err)
{
    enum rt_status st;
    struct rt_seq_info info = p->info;
    if (s->broken || s->manifest.finished || info.ordinal != next_ordinal(s))
        return rt_fail(err, RT_USAGE, "%s: sequence %" PRId64 " was packed, %" PRId64 " is next", s->dir, info.ordinal, next_ordinal(s));
    if (!s->open)
        RT_TRY(open_shard(s, err));
    info.offset = s->out.written;
    RT_TRY(write_bytes(s, &p->bytes, err));
    RT_TRY(count_in(s, &info, err));
out:
    s->broken |= st != RT_OK;
    return st;
}

enum rt_status rt_shard_sink_cut(struct rt_shard_sink *s, struct rt_err *err)
{
    enum rt_status st;
    if (s->broken || s->manifest.finished)
        return rt_fail(err, RT_REFUSED, "%s: %s", s->dir, s->broken ? "writing failed before" : "the set is complete: nothing can be added");
    if (!s->open || s->n_seq == 0)
        return RT_OK;
    st = close_shard(s, err);
    s->broken |= st != RT_OK;
    return st;
}

static enum rt_status finish(void *self, struct rt_err *err)
{
    struct rt_shard_sink *s = self;
    enum rt_status st = RT_OK;
    if (s->manifest.finished)
        return RT_OK;
    if (s->broken)
        return rt_fail(err, RT_REFUSED, "%s: writing failed before", s->dir);
    if (s->open && s->n_seq > 0)
        RT_TRY(close_shard(s, err));
    RT_TRY(rt_manifest_end(s->dir, &s->manifest, s->manifest.sequences, s->manifest.rows, err));
    s->manifest.finished = true;
out:
    s->broken |= st != RT_OK;
    return st;
}

static enum rt_status check_layout(const struct rt_shard_sink *s, const char *path, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    struct rt_row_identity have;
    int64_t x;
    const struct {
        const char *key;
        int64_t want;
    } layout[] = {{"version", rt_shard_version(&s->id)}, {"rows_per_shard", s->opt.rows_per_shard}, {"level", s->opt.level}, {"parts", s->opt.n_parts}};
    RT_TRY(rt_json_load(path, 1 << 20, &v, err));
    RT_TRY(rt_row_identity_from_json(v, &have, err));
    RT_TRY(rt_row_identity_match(&have, &s->id, s->dir, err));
    for (size_t i = 0; i < sizeof layout / sizeof layout[0]; i++) {
        RT_TRY(rt_json_int(v, layout[i].key, 0, INT64_MAX, &x, err));
        if (x != layout[i].want)
            RT_FAIL(err, REFUSED, "%s: written with %s %" PRId64 ", now %" PRId64 ": use the same value, or another directory", s->dir,
                    layout[i].key, x, layout[i].want);
    }
out:
    rt_json_free(v);
    return st;
}

static enum rt_status write_layout(const struct rt_shard_sink *s, const char *path, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    struct rt_buf text = {0};
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_string(v, "format", "retort-rows", err));
    RT_TRY(rt_json_set_int(v, "version", rt_shard_version(&s->id), err));
    RT_TRY(rt_json_set_int(v, "rows_per_shard", s->opt.rows_per_shard, err));
    RT_TRY(rt_json_set_int(v, "level", s->opt.level, err));
    RT_TRY(rt_json_set_int(v, "parts", s->opt.n_parts, err));
    RT_TRY(rt_row_identity_to_json(&s->id, v, err));
    RT_TRY(rt_json_dump(v, 2, &text, err));
    RT_TRY(rt_buf_append(&text, "\n", 1, err));
    RT_TRY(rt_publish_bytes(path, text.data, text.len, err));
out:
    rt_buf_free(&text);
    rt_json_free(v);
    return st;
}

/* Parts may be written side by side in one (shared) directory: each locks a directory of its own. */
static enum rt_status lock(struct rt_shard_sink *s, struct rt_err *err)
{
    enum rt_status st;
    char name[RT_NAME_CAP], path[4096];
    if (s->opt.n_parts == 1)
        return rt_lock_dir(s->dir, &s->lock, err);
    snprintf(name, sizeof name, ".part-%04d-of-%04d", s->opt.part, s->opt.n_parts);
    RT_TRY(rt_path_join(path, sizeof path, s->dir, name, err));
    RT_TRY(rt_mkdirs(path, err));
    RT_TRY(rt_lock_dir(path, &s->lock, err));
out:
    return st;
}

static enum rt_status open_layout(struct rt_shard_sink *s, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err first = {0};
    char path[4096];
    RT_TRY(rt_path_join(path, sizeof path, s->dir, "identity.json", err));
    if (!rt_path_exists(path) && write_layout(s, path, &first) != RT_OK && !rt_path_exists(path))
        RT_TRY(rt_fail(err, first.status, "%s", first.msg)); /* where it exists now, another part was quicker */
    RT_TRY(check_layout(s, path, err));
out:
    return st;
}

/* Every shard of the manifest is there with its size: a restart must not go on behind a gap. */
static enum rt_status check_published(const struct rt_shard_sink *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char path[4096];
    for (int64_t i = 0; i < s->manifest.n; i++) {
        const struct rt_manifest_line *l = &s->manifest.line[i];
        uint64_t size;
        int fd = -1;
        RT_TRY(rt_path_join(path, sizeof path, s->dir, l->file, err));
        if (!rt_path_exists(path))
            RT_FAIL(err, IO, "%s: not there, and the manifest names it: restore the file, or remove the set", path);
        RT_TRY(rt_file_open(path, &fd, &size, err));
        rt_file_close(fd);
        if (size != l->bytes)
            RT_FAIL(err, FORMAT, "%s: %" PRIu64 " bytes, the manifest says %" PRIu64 ": restore the file, or remove the set", path, size, l->bytes);
    }
out:
    return st;
}

/* ---- what survives a crash of the shard that is being written ---- */

#define HOLD_KIND "retort-shard-hold"

enum rt_status rt_shard_sink_hold(struct rt_shard_sink *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_json *v = NULL;
    struct rt_state_writer *w = NULL;
    struct rt_sha256 sha = s->sha; /* of the bytes so far; the shard's own goes on */
    char hex[65], path[4096];
    if (s->broken || !s->open || s->n_seq == s->held)
        return s->broken ? rt_fail(err, RT_REFUSED, "%s: writing failed before", s->dir) : RT_OK;
    rt_sha256_final_hex(&sha, hex);
    if (fsync(s->out.fd) != 0)
        RT_TRY(rt_fail_errno(err, "cannot sync '%s'", s->out.tmp));
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_int(v, "shard", s->manifest.n, err));
    RT_TRY(rt_json_set_int(v, "first", s->manifest.sequences, err));
    RT_TRY(rt_json_set_int(v, "size", (int64_t)s->out.written, err));
    RT_TRY(rt_json_set_string(v, "sha256", hex, err));
    RT_TRY(rt_json_set_int(v, "header_bytes", (int64_t)s->header_bytes, err));
    RT_TRY(rt_json_set_int(v, "header_crc", (int64_t)s->header_crc, err));
    RT_TRY(rt_json_set_int(v, "sequences", s->n_seq, err));
    RT_TRY(rt_json_set_int(v, "tokens", s->tokens, err));
    RT_TRY(rt_json_set_int(v, "rows", s->rows, err));
    RT_TRY(rt_json_set_int(v, "entry", (int64_t)sizeof(struct rt_seq_info), err));
    RT_TRY(hold_path(s, s->manifest.n, path, err));
    RT_TRY(rt_state_create(path, HOLD_KIND, v, s->seq.len, &w, err));
    RT_TRY(rt_state_put(w, s->seq.data, s->seq.len, err));
    RT_TRY(rt_state_commit(w, err));
    s->held = s->n_seq;
out:
    rt_state_writer_free(w);
    rt_json_free(v);
    return st;
}

/* The first `size` bytes of the unfinished shard, hashed into s->sha; FORMAT where they are others. */
static enum rt_status hash_held(struct rt_shard_sink *s, const char *path, uint64_t size, const char *want, struct rt_err *err)
{
    enum rt_status st;
    char tmp[4096 + 8], hex[65];
    uint64_t have;
    int fd = -1;
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    RT_TRY(rt_file_open(tmp, &fd, &have, err));
    if (size > have)
        RT_FAIL(err, FORMAT, "%s: %" PRIu64 " bytes, %" PRIu64 " were held", tmp, have, size);
    rt_sha256_init(&s->sha);
    RT_TRY(rt_file_hash(fd, tmp, size, &s->sha, err));
    struct rt_sha256 copy = s->sha;
    rt_sha256_final_hex(&copy, hex);
    if (strcmp(hex, want) != 0)
        RT_FAIL(err, FORMAT, "%s: sha256 %s, %s was held", tmp, hex, want);
out:
    rt_file_close(fd);
    return st;
}

static enum rt_status read_held(struct rt_shard_sink *s, const char *hold, const char *path, struct rt_err *err)
{
    enum rt_status st;
    struct rt_state_reader *r = NULL;
    const char *sha;
    int64_t x, size, n, tokens, rows, header_bytes, header_crc;
    RT_TRY(rt_state_open(hold, HOLD_KIND, &r, err));
    const struct rt_json *v = rt_state_header(r);
    RT_TRY(rt_json_int(v, "shard", s->manifest.n, s->manifest.n, &x, err));
    RT_TRY(rt_json_int(v, "first", s->manifest.sequences, s->manifest.sequences, &x, err));
    RT_TRY(rt_json_int(v, "entry", sizeof(struct rt_seq_info), sizeof(struct rt_seq_info), &x, err));
    RT_TRY(rt_json_int(v, "sequences", 1, (int64_t)(rt_state_bytes(r) / sizeof(struct rt_seq_info)), &n, err));
    RT_TRY(rt_json_int(v, "size", 1, INT64_MAX, &size, err));
    RT_TRY(rt_json_int(v, "tokens", 0, INT64_MAX, &tokens, err));
    RT_TRY(rt_json_int(v, "rows", 0, s->opt.rows_per_shard - 1, &rows, err));
    RT_TRY(rt_json_int(v, "header_bytes", 1, size, &header_bytes, err));
    RT_TRY(rt_json_int(v, "header_crc", 0, UINT32_MAX, &header_crc, err));
    RT_TRY(rt_json_string(v, "sha256", &sha, err));
    RT_TRY(hash_held(s, path, (uint64_t)size, sha, err));
    s->seq.len = 0;
    RT_TRY(rt_buf_reserve(&s->seq, (size_t)n * sizeof(struct rt_seq_info), err));
    RT_TRY(rt_state_read(r, s->seq.data, (uint64_t)n * sizeof(struct rt_seq_info), err));
    s->seq.len = (size_t)n * sizeof(struct rt_seq_info);
    RT_TRY(rt_publish_reopen(&s->out, path, (uint64_t)size, err));
    s->open = true;
    s->n_seq = s->held = n;
    s->tokens = tokens;
    s->rows = rows;
    s->header_bytes = (uint64_t)header_bytes;
    s->header_crc = (uint32_t)header_crc;
out:
    rt_state_reader_free(r);
    return st;
}

/* Goes on with a shard that was held. One that does not verify is not used: its sequences are put again. */
static enum rt_status restore_held(struct rt_shard_sink *s, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err why = {0};
    char name[RT_NAME_CAP], path[4096], hold[4096];
    if (s->manifest.n > 0) { /* of a writer that ended between the shard's line and this */
        RT_TRY(hold_path(s, s->manifest.n - 1, hold, err));
        unlink(hold);
    }
    rt_shard_name(s->opt.part, s->opt.n_parts, s->manifest.n, name);
    RT_TRY(rt_path_join(path, sizeof path, s->dir, name, err));
    RT_TRY(hold_path(s, s->manifest.n, hold, err));
    if (s->manifest.finished || !rt_path_exists(hold))
        return RT_OK;
    if (read_held(s, hold, path, &why) == RT_NOMEM)
        RT_TRY(rt_fail(err, RT_NOMEM, "%s", why.msg));
    if (!s->open)
        unlink(hold);
out:
    return st;
}

static enum rt_status resolve(const struct rt_shard_options *opt, struct rt_shard_options *out, const char *dir, struct rt_err *err)
{
    *out = *opt;
    if (out->rows_per_shard == 0)
        out->rows_per_shard = RT_SHARD_ROWS;
    if (out->level == 0)
        out->level = RT_SHARD_LEVEL;
    if (out->n_parts == 0)
        out->n_parts = 1;
    if (out->rows_per_shard < 1 || out->level < 1 || out->level > 9 || out->n_parts < 1 || out->n_parts > RT_MAX_PARTS || out->part < 0 ||
        out->part >= out->n_parts)
        return rt_fail(err, RT_USAGE, "%s: rows_per_shard %" PRId64 ", level %d, part %d of %d: expected a positive count, a level 1 to 9, a part below the number of parts",
                       dir, out->rows_per_shard, out->level, out->part, out->n_parts);
    return RT_OK;
}

enum rt_status rt_shard_sink_open(const char *dir, const struct rt_row_identity *id, const struct rt_shard_options *opt,
                                  struct rt_shard_sink **out, struct rt_row_sink *sink, struct rt_shard_resume *resume,
                                  struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_sink *s = NULL;
    struct rt_shard_options resolved;
    RT_TRY(resolve(opt, &resolved, dir, err));
    RT_TRY(rt_row_identity_valid(id, dir, err));
    RT_TRY(rt_alloc(1, sizeof *s, "a sink of row shards", &s, err));
    s->lock = s->out.fd = -1;
    s->id = *id;
    s->opt = resolved;
    RT_TRY(rt_path_join(s->dir, sizeof s->dir, "", dir, err));
    RT_TRY(rt_mkdirs(dir, err));
    RT_TRY(lock(s, err));
    RT_TRY(open_layout(s, err));
    RT_TRY(rt_manifest_read(s->dir, resolved.part, resolved.n_parts, &s->manifest, err));
    RT_TRY(check_published(s, err));
    RT_TRY(restore_held(s, err));
    const struct rt_manifest *m = &s->manifest;
    *resume = (struct rt_shard_resume){m->sequences, m->rows, m->n > 0 ? m->line[m->n - 1].last_line : 0, m->finished};
    if (s->open) {
        resume->sequences += s->n_seq;
        resume->rows += s->rows;
        resume->source_line = ((const struct rt_seq_info *)(const void *)s->seq.data)[s->n_seq - 1].source_line;
    }
    rt_free(s->manifest.line);
    s->manifest.line = NULL;
    sink->self = s;
    sink->put = put;
    sink->put_all = put_all;
    sink->finish = finish;
    *out = s;
    s = NULL;
out:
    rt_shard_sink_free(s);
    return st;
}

enum rt_status rt_shard_keep_head(const char *dir, const struct rt_tensors *model, struct rt_err *err)
{
    enum rt_status st;
    char path[4096], *piece = NULL;
    struct rt_tensor_writer *w = NULL;
    const struct rt_tensor *t;
    const uint64_t most = 4 << 20;
    RT_TRY(rt_path_join(path, sizeof path, dir, "head.safetensors", err));
    if (rt_path_exists(path))
        return RT_OK;
    RT_TRY(rt_tensors_get(model, "lm_head.weight", RT_DT(RT_BF16) | RT_DT(RT_F16) | RT_DT(RT_F32), 2, NULL, &t, err));
    const struct rt_tensor_decl decl = {"lm_head.weight", t->dtype, 2, {t->ne[0], t->ne[1]}};
    RT_TRY(rt_mkdirs(dir, err));
    RT_TRY(rt_alloc(most, 1, "a piece of the head", &piece, err));
    RT_TRY(rt_tensor_writer_file(path, &decl, 1, &w, err));
    for (uint64_t at = 0; at < t->bytes; at += most) {
        const uint64_t n = t->bytes - at < most ? t->bytes - at : most;
        RT_TRY(rt_tensors_read_range(model, t, at, n, piece, err));
        RT_TRY(rt_tensor_writer_put(w, piece, n, err));
    }
    RT_TRY(rt_tensor_writer_finish(w, err));
out:
    rt_free(piece);
    rt_tensor_writer_free(w);
    return st;
}
