#include "formats/shard_file.h"

#include <inttypes.h>
#include <string.h>
#include <zlib.h>

#include "core/io.h"
#include "formats/row_identity.h"
#include "formats/shard_block.h"

int rt_shard_version(const struct rt_row_identity *id)
{
    return id->boundary || rt_row_identity_spans(id) ? 3 : id->origin.mode[0] != '\0' ? 2 : 1;
}

static void pack_origin(struct rt_pack *p, const struct rt_row_origin *o)
{
    rt_pack_str(p, "origin");
    rt_pack_map(p, 6);
    rt_pack_str(p, "mode");
    rt_pack_str(p, o->mode);
    rt_pack_str(p, "tokenizer_sha256");
    rt_pack_str(p, o->tokenizer_sha256);
    rt_pack_str(p, "template_sha256");
    rt_pack_str(p, o->template_sha256);
    rt_pack_str(p, "vocab_size");
    rt_pack_uint(p, (uint64_t)o->vocab_size);
    rt_pack_str(p, "n_ids");
    rt_pack_uint(p, (uint64_t)o->n_ids);
    rt_pack_str(p, "completion_only");
    rt_pack_bool(p, o->completion_only);
}

static void pack_identity(struct rt_pack *p, const struct rt_row_identity *id)
{
    const int version = rt_shard_version(id);
    rt_pack_map(p, 13 + (size_t)version);
    rt_pack_str(p, "teacher_sha256");
    rt_pack_str(p, id->teacher_sha256);
    rt_pack_str(p, "tokenizer_sha256");
    rt_pack_str(p, id->tokenizer_sha256);
    rt_pack_str(p, "template_sha256");
    rt_pack_str(p, id->template_sha256);
    rt_pack_str(p, "teacher_name");
    rt_pack_str(p, id->teacher_name);
    rt_pack_str(p, "mode");
    rt_pack_str(p, id->mode);
    rt_pack_str(p, "vocab_size");
    rt_pack_uint(p, (uint64_t)id->vocab_size);
    rt_pack_str(p, "teacher_layers");
    rt_pack_uint(p, (uint64_t)id->teacher_layers);
    rt_pack_str(p, "n_ids");
    rt_pack_uint(p, (uint64_t)id->n_ids);
    rt_pack_str(p, "top_k");
    rt_pack_uint(p, (uint64_t)id->top_k);
    rt_pack_str(p, "temperatures");
    rt_pack_array(p, (size_t)id->n_lse);
    for (int i = 0; i < id->n_lse; i++)
        rt_pack_f64(p, id->lse_temperature[i]);
    rt_pack_str(p, "completion_only");
    rt_pack_bool(p, id->completion_only);
    rt_pack_str(p, "max_length");
    rt_pack_uint(p, (uint64_t)id->max_length);
    rt_pack_str(p, "projection_seed");
    rt_pack_uint(p, id->projection_seed);
    rt_pack_str(p, "features");
    rt_pack_array(p, (size_t)id->n_features);
    for (int i = 0; i < id->n_features; i++) {
        rt_pack_array(p, 4);
        rt_pack_int(p, id->feature[i].layer);
        rt_pack_uint(p, (uint64_t)id->feature[i].dim);
        rt_pack_str(p, rt_dtype_name(id->feature[i].dtype));
        rt_pack_bool(p, id->feature[i].projected);
    }
    if (version > 1)
        pack_origin(p, &id->origin);
    if (version > 2) {
        rt_pack_str(p, "boundary");
        rt_pack_bool(p, id->boundary);
    }
}

enum rt_status rt_shard_header_pack(const struct rt_shard_header *h, struct rt_buf *out, struct rt_err *err)
{
    struct rt_pack p = {out, RT_OK, err};
    const int version = rt_shard_version(&h->id);
    rt_pack_map(&p, version > 1 ? 7 : 6);
    rt_pack_str(&p, "format");
    rt_pack_str(&p, "retort-rows");
    rt_pack_str(&p, "version");
    rt_pack_uint(&p, (uint64_t)version);
    rt_pack_str(&p, "kind");
    rt_pack_str(&p, rt_row_identity_dense(&h->id) ? "dense" : "sparse");
    rt_pack_str(&p, "part");
    rt_pack_array(&p, 2);
    rt_pack_uint(&p, (uint64_t)h->part);
    rt_pack_uint(&p, (uint64_t)h->n_parts);
    rt_pack_str(&p, "first");
    rt_pack_uint(&p, (uint64_t)h->first);
    rt_pack_str(&p, "identity");
    pack_identity(&p, &h->id);
    if (version > 1) {
        rt_pack_str(&p, "report");
        rt_pack_bin(&p, h->report.len > 0 ? h->report.data : "", h->report.len);
    }
    return p.st;
}

static enum rt_status key_text(struct rt_unpack *u, const char *key, char *out, size_t cap, struct rt_err *err)
{
    const enum rt_status st = rt_unpack_key(u, key, err);
    return st != RT_OK ? st : rt_unpack_text(u, out, cap, err);
}

static enum rt_status key_uint(struct rt_unpack *u, const char *key, uint64_t max, uint64_t *out, struct rt_err *err)
{
    const enum rt_status st = rt_unpack_key(u, key, err);
    return st != RT_OK ? st : rt_unpack_uint(u, max, out, err);
}

static enum rt_status unpack_feature(struct rt_unpack *u, struct rt_feature_spec *f, struct rt_err *err)
{
    enum rt_status st;
    size_t n;
    int64_t layer;
    uint64_t dim;
    char type[16];
    RT_TRY(rt_unpack_array(u, &n, err));
    if (n != 4)
        return rt_unpack_fail(u, "the 4 items of a feature", err);
    RT_TRY(rt_unpack_int(u, RT_LAYER_FINAL, 100000, &layer, err));
    RT_TRY(rt_unpack_uint(u, RT_MAX_FEATURE_DIM, &dim, err));
    RT_TRY(rt_unpack_text(u, type, sizeof type, err));
    RT_TRY(rt_unpack_bool(u, &f->projected, err));
    if (!rt_dtype_from_name(type, strlen(type), &f->dtype))
        return rt_unpack_fail(u, "a known element type", err);
    f->layer = (int)layer;
    f->dim = (int)dim;
out:
    return st;
}

static enum rt_status unpack_origin(struct rt_unpack *u, struct rt_row_origin *o, struct rt_err *err)
{
    enum rt_status st;
    size_t n;
    uint64_t v;
    RT_TRY(rt_unpack_key(u, "origin", err));
    RT_TRY(rt_unpack_map(u, &n, err));
    if (n != 6)
        return rt_unpack_fail(u, "the 6 members of an origin", err);
    RT_TRY(key_text(u, "mode", o->mode, sizeof o->mode, err));
    RT_TRY(key_text(u, "tokenizer_sha256", o->tokenizer_sha256, sizeof o->tokenizer_sha256, err));
    RT_TRY(key_text(u, "template_sha256", o->template_sha256, sizeof o->template_sha256, err));
    RT_TRY(key_uint(u, "vocab_size", RT_MAX_VOCAB, &v, err));
    o->vocab_size = (int64_t)v;
    RT_TRY(key_uint(u, "n_ids", RT_MAX_VOCAB, &v, err));
    o->n_ids = (int64_t)v;
    RT_TRY(rt_unpack_key(u, "completion_only", err));
    RT_TRY(rt_unpack_bool(u, &o->completion_only, err));
out:
    return st;
}

static enum rt_status unpack_identity(struct rt_unpack *u, int version, struct rt_row_identity *id, struct rt_err *err)
{
    enum rt_status st;
    size_t n;
    uint64_t v;
    RT_TRY(rt_unpack_map(u, &n, err));
    if (n != 13 + (size_t)version)
        return rt_unpack_fail(u, "the members of an identity of this version", err);
    RT_TRY(key_text(u, "teacher_sha256", id->teacher_sha256, sizeof id->teacher_sha256, err));
    RT_TRY(key_text(u, "tokenizer_sha256", id->tokenizer_sha256, sizeof id->tokenizer_sha256, err));
    RT_TRY(key_text(u, "template_sha256", id->template_sha256, sizeof id->template_sha256, err));
    RT_TRY(key_text(u, "teacher_name", id->teacher_name, sizeof id->teacher_name, err));
    RT_TRY(key_text(u, "mode", id->mode, sizeof id->mode, err));
    RT_TRY(key_uint(u, "vocab_size", RT_MAX_VOCAB, &v, err));
    id->vocab_size = (int64_t)v;
    RT_TRY(key_uint(u, "teacher_layers", RT_MAX_TEACHER_LAYERS, &v, err));
    id->teacher_layers = (int)v;
    RT_TRY(key_uint(u, "n_ids", RT_MAX_VOCAB, &v, err));
    id->n_ids = (int64_t)v;
    RT_TRY(key_uint(u, "top_k", RT_MAX_TOPK, &v, err));
    id->top_k = (int)v;
    RT_TRY(rt_unpack_key(u, "temperatures", err));
    RT_TRY(rt_unpack_array(u, &n, err));
    if (n > RT_MAX_LSE)
        return rt_unpack_fail(u, "at most 8 temperatures", err);
    id->n_lse = (int)n;
    for (size_t i = 0; i < n; i++)
        RT_TRY(rt_unpack_double(u, &id->lse_temperature[i], err));
    RT_TRY(rt_unpack_key(u, "completion_only", err));
    RT_TRY(rt_unpack_bool(u, &id->completion_only, err));
    RT_TRY(key_uint(u, "max_length", INT64_MAX, &v, err));
    id->max_length = (int64_t)v;
    RT_TRY(key_uint(u, "projection_seed", UINT64_MAX, &id->projection_seed, err));
    RT_TRY(rt_unpack_key(u, "features", err));
    RT_TRY(rt_unpack_array(u, &n, err));
    if (n > RT_MAX_FEATURES)
        return rt_unpack_fail(u, "at most 8 features", err);
    id->n_features = (int)n;
    for (size_t i = 0; i < n; i++)
        RT_TRY(unpack_feature(u, &id->feature[i], err));
    if (version > 1)
        RT_TRY(unpack_origin(u, &id->origin, err));
    if (version == 2 && id->origin.mode[0] == '\0')
        return rt_unpack_fail(u, "the mode of retargeting", err);
    if (version > 2) {
        RT_TRY(rt_unpack_key(u, "boundary", err));
        RT_TRY(rt_unpack_bool(u, &id->boundary, err));
    }
    RT_TRY(rt_row_identity_valid(id, u->path, err));
out:
    return st;
}

enum rt_status rt_shard_header_unpack(struct rt_unpack *u, struct rt_shard_header *h, uint64_t *bytes, struct rt_err *err)
{
    enum rt_status st;
    size_t n, members;
    uint64_t v, parts, version;
    char text[32];
    const uint8_t *const from = u->at, *report;
    memset(h, 0, sizeof *h);
    RT_TRY(rt_unpack_map(u, &members, err));
    if (members != 6 && members != 7)
        return rt_unpack_fail(u, "the 6 or 7 members of a header of rows", err);
    RT_TRY(key_text(u, "format", text, sizeof text, err));
    if (strcmp(text, "retort-rows") != 0)
        return rt_unpack_fail(u, "the format \"retort-rows\"", err);
    RT_TRY(key_uint(u, "version", UINT32_MAX, &version, err));
    if (version < 1 || version > RT_SHARD_VERSION)
        return rt_fail(err, RT_UNSUPPORTED, "%s: version %" PRIu64 " of the row format, this program reads versions 1 to %d", u->path, version,
                       RT_SHARD_VERSION);
    if (members != (version > 1 ? 7 : 6))
        return rt_unpack_fail(u, "the members of a header of this version", err);
    RT_TRY(key_text(u, "kind", text, sizeof text, err));
    RT_TRY(rt_unpack_key(u, "part", err));
    RT_TRY(rt_unpack_array(u, &n, err));
    if (n != 2)
        return rt_unpack_fail(u, "[part, parts]", err);
    RT_TRY(rt_unpack_uint(u, 9998, &v, err));
    RT_TRY(rt_unpack_uint(u, 9999, &parts, err));
    if (v >= parts)
        return rt_unpack_fail(u, "a part below the number of parts", err);
    h->part = (int)v;
    h->n_parts = (int)parts;
    RT_TRY(key_uint(u, "first", INT64_MAX, &v, err));
    h->first = (int64_t)v;
    RT_TRY(rt_unpack_key(u, "identity", err));
    RT_TRY(unpack_identity(u, (int)version, &h->id, err));
    if (strcmp(text, rt_row_identity_dense(&h->id) ? "dense" : "sparse") != 0)
        RT_FAIL(err, UNSUPPORTED, "%s: rows of kind '%s', which this program does not read", u->path, text);
    if (version > 1) {
        RT_TRY(rt_unpack_key(u, "report", err));
        RT_TRY(rt_unpack_bin(u, &report, &n, err));
        if (n > RT_SHARD_MAX_REPORT)
            return rt_unpack_fail(u, "a report of at most 32 KiB", err);
        RT_TRY(rt_buf_append(&h->report, report, n, err));
    }
    *bytes = (uint64_t)(u->at - from);
out:
    return st;
}

enum rt_status rt_shard_index_pack(uint64_t at, uint64_t header_bytes, uint32_t header_crc, const struct rt_seq_info *seq, int64_t n,
                                   int n_lse, struct rt_buf *out, struct rt_err *err)
{
    struct rt_buf inner = {0};
    struct rt_pack p = {&inner, RT_OK, err}, o = {out, RT_OK, err};
    rt_pack_map(&p, 2);
    rt_pack_str(&p, "header");
    rt_pack_array(&p, 2);
    rt_pack_uint(&p, header_bytes);
    rt_pack_uint(&p, header_crc);
    rt_pack_str(&p, "sequences");
    rt_pack_array(&p, (size_t)n);
    for (int64_t i = 0; i < n; i++) {
        const struct rt_seq_info *s = &seq[i];
        rt_pack_array(&p, 10);
        rt_pack_bin(&p, s->key, RT_KEY_BYTES);
        rt_pack_uint(&p, s->occurrence);
        rt_pack_uint(&p, (uint64_t)s->source_line);
        rt_pack_uint(&p, (uint64_t)s->n_tokens);
        rt_pack_uint(&p, (uint64_t)s->n_rows);
        rt_pack_uint(&p, s->offset);
        rt_pack_uint(&p, s->bytes);
        rt_pack_uint(&p, s->crc);
        rt_pack_f32(&p, s->nll);
        rt_pack_array(&p, (size_t)n_lse);
        for (int t = 0; t < n_lse; t++)
            rt_pack_f32(&p, s->mass[t]);
    }
    if (p.st == RT_OK) {
        rt_pack_map(&o, 3);
        rt_pack_str(&o, "index");
        rt_pack_bin(&o, inner.data, inner.len);
        rt_pack_str(&o, "crc");
        rt_pack_uint(&o, crc32(0, (const Bytef *)inner.data, (uInt)inner.len));
        rt_pack_str(&o, "at");
        rt_pack_u64(&o, at);
    }
    rt_buf_free(&inner);
    return p.st != RT_OK ? p.st : o.st;
}

static enum rt_status unpack_seq(struct rt_unpack *u, const struct rt_row_identity *id, struct rt_seq_info *s, struct rt_err *err)
{
    enum rt_status st;
    size_t n;
    const uint8_t *key;
    uint64_t v, need = 0, part;
    double d;
    RT_TRY(rt_unpack_array(u, &n, err));
    if (n != 10)
        return rt_unpack_fail(u, "the 10 items of a sequence", err);
    RT_TRY(rt_unpack_bin(u, &key, &n, err));
    if (n != RT_KEY_BYTES)
        return rt_unpack_fail(u, "a key of 16 bytes", err);
    memcpy(s->key, key, n);
    RT_TRY(rt_unpack_uint(u, UINT32_MAX, &v, err));
    s->occurrence = (uint32_t)v;
    RT_TRY(rt_unpack_uint(u, INT64_MAX, &v, err));
    s->source_line = (int64_t)v;
    RT_TRY(rt_unpack_uint(u, INT32_MAX, &v, err));
    s->n_tokens = (int64_t)v;
    RT_TRY(rt_unpack_uint(u, v > 0 ? v - 1 : 0, &v, err));
    s->n_rows = (int64_t)v;
    RT_TRY(rt_unpack_uint(u, INT64_MAX, &s->offset, err));
    RT_TRY(rt_unpack_uint(u, INT64_MAX, &s->bytes, err));
    RT_TRY(rt_unpack_uint(u, UINT32_MAX, &v, err));
    s->crc = (uint32_t)v;
    RT_TRY(rt_unpack_double(u, &d, err));
    s->nll = (float)d;
    RT_TRY(rt_unpack_array(u, &n, err));
    if (n != (size_t)id->n_lse)
        return rt_unpack_fail(u, "a mass at each temperature", err);
    for (size_t i = 0; i < n; i++) {
        RT_TRY(rt_unpack_double(u, &d, err));
        s->mass[i] = (float)d;
    }
    const bool over = __builtin_mul_overflow((uint64_t)s->n_tokens, rt_block_token_bytes(id), &need) ||
                      __builtin_mul_overflow((uint64_t)s->n_rows, rt_block_row_bytes(id), &part) || __builtin_add_overflow(need, part, &need);
    if (over || s->n_tokens < 1 || need / RT_ZLIB_RATIO > s->bytes)
        return rt_unpack_fail(u, "a sequence whose tokens and rows its bytes can hold", err);
out:
    return st;
}

static enum rt_status unpack_index(struct rt_unpack *u, const uint8_t *head, uint64_t header_bytes, uint64_t at,
                                   struct rt_shard_contents *out, struct rt_err *err)
{
    enum rt_status st;
    size_t n;
    uint64_t bytes, crc, next = header_bytes;
    RT_TRY(rt_unpack_map(u, &n, err));
    if (n != 2)
        return rt_unpack_fail(u, "the 2 members of an index", err);
    RT_TRY(rt_unpack_key(u, "header", err));
    RT_TRY(rt_unpack_array(u, &n, err));
    RT_TRY(rt_unpack_uint(u, RT_SHARD_MAX_HEADER, &bytes, err));
    RT_TRY(rt_unpack_uint(u, UINT32_MAX, &crc, err));
    if (n != 2 || bytes != header_bytes || crc != crc32(0, head, (uInt)header_bytes))
        RT_FAIL(err, FORMAT, "%s: the header is damaged: its length or crc32 is not that in the index", u->path);
    RT_TRY(rt_unpack_key(u, "sequences", err));
    RT_TRY(rt_unpack_array(u, &n, err));
    if (n > (size_t)(u->end - u->at) / 28) /* the shortest entry is 17 + 1 + 9 + 5 bytes */
        return rt_unpack_fail(u, "as many sequences as fit in the index", err);
    RT_TRY(rt_alloc(n, sizeof *out->seq, "the index of a shard", &out->seq, err));
    for (size_t i = 0; i < n; i++) {
        struct rt_seq_info *s = &out->seq[i];
        RT_TRY(unpack_seq(u, &out->header.id, s, err));
        if (s->offset != next || s->bytes > at - next)
            return rt_unpack_fail(u, "sequences that follow each other up to the index", err);
        next += s->bytes;
        s->ordinal = out->header.first + (int64_t)i;
    }
    if (u->at != u->end || next != at)
        return rt_unpack_fail(u, "sequences that end where the index starts", err);
    out->n = (int64_t)n;
out:
    return st;
}

enum rt_status rt_shard_read(int fd, const char *path, uint64_t size, struct rt_shard_contents *out, struct rt_err *err)
{
    enum rt_status st;
    uint8_t *head = NULL, *tail = NULL, last[9];
    const uint8_t *inner;
    struct rt_unpack u;
    uint64_t at = 0, header_bytes, crc, again;
    size_t n;
    memset(out, 0, sizeof *out);
    const size_t head_size = size < RT_SHARD_MAX_HEADER ? (size_t)size : RT_SHARD_MAX_HEADER;
    RT_TRY(rt_alloc(head_size, 1, "the header of a shard", &head, err));
    RT_TRY(rt_file_pread(fd, path, head, head_size, 0, err));
    rt_unpack_init(&u, head, head_size, path, 0);
    RT_TRY(rt_shard_header_unpack(&u, &out->header, &header_bytes, err));

    /* The last object of the file is the index, and its last 9 bytes the u64 that says where it starts. */
    if (size < header_bytes + sizeof last)
        RT_FAIL(err, FORMAT, "%s: cut short: %" PRIu64 " bytes, no index at the end", path, size);
    RT_TRY(rt_file_pread(fd, path, last, sizeof last, size - sizeof last, err));
    for (int i = 1; i < 9; i++)
        at = at << 8 | last[i];
    if (last[0] != 0xcf || at < header_bytes || at > size - sizeof last)
        RT_FAIL(err, FORMAT, "%s: cut short or damaged: no index at the end", path);
    RT_TRY(rt_alloc((size_t)(size - at), 1, "the index of a shard", &tail, err));
    RT_TRY(rt_file_pread(fd, path, tail, (size_t)(size - at), at, err));
    rt_unpack_init(&u, tail, (size_t)(size - at), path, at);
    RT_TRY(rt_unpack_map(&u, &n, err));
    if (n != 3)
        RT_FAIL(err, FORMAT, "%s: byte %" PRIu64 ": expected the index", path, at);
    RT_TRY(rt_unpack_key(&u, "index", err));
    RT_TRY(rt_unpack_bin(&u, &inner, &n, err));
    RT_TRY(key_uint(&u, "crc", UINT32_MAX, &crc, err));
    RT_TRY(key_uint(&u, "at", UINT64_MAX, &again, err));
    if (u.at != u.end || crc != crc32(0, inner, (uInt)n) || n > UINT32_MAX)
        RT_FAIL(err, FORMAT, "%s: the index is damaged: its crc32 does not agree", path);
    rt_unpack_init(&u, inner, n, path, at + (uint64_t)(inner - tail));
    RT_TRY(unpack_index(&u, head, header_bytes, at, out, err));
out:
    rt_free(head);
    rt_free(tail);
    if (st != RT_OK) {
        rt_free(out->seq);
        rt_buf_free(&out->header.report);
        memset(out, 0, sizeof *out);
    }
    return st;
}
