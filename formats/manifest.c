#include "formats/manifest.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <zlib.h>

#include "core/io.h"
#include "formats/json.h"

enum { MAX_MANIFEST = 1 << 29, MAX_LINE = 4096 };
/* ,"crc":"01234567"} */
enum { CRC_TAIL = 18 };

void rt_manifest_name(int part, int n_parts, char out[RT_NAME_CAP])
{
    if (n_parts == 1)
        snprintf(out, RT_NAME_CAP, "manifest.jsonl");
    else
        snprintf(out, RT_NAME_CAP, "manifest-%04d-of-%04d.jsonl", part, n_parts);
}

void rt_shard_name(int part, int n_parts, int64_t i, char out[RT_NAME_CAP])
{
    if (n_parts == 1)
        snprintf(out, RT_NAME_CAP, "rows-%06" PRId64 ".msgpack", i);
    else
        snprintf(out, RT_NAME_CAP, "rows-%04d-of-%04d-%06" PRId64 ".msgpack", part, n_parts, i);
}

void rt_manifest_free(struct rt_manifest *m)
{
    rt_free(m->line);
    memset(m, 0, sizeof *m);
}

static enum rt_status check_crc(const char *line, size_t len, const char *where, struct rt_err *err)
{
    char want[CRC_TAIL + 1];
    if (len > CRC_TAIL) {
        snprintf(want, sizeof want, ",\"crc\":\"%08x\"}", (unsigned)crc32(0, (const Bytef *)line, (uInt)(len - CRC_TAIL)));
        if (memcmp(line + len - CRC_TAIL, want, CRC_TAIL) == 0)
            return RT_OK;
    }
    return rt_fail(err, RT_FORMAT, "%s: damaged: the crc does not agree with the line; restore the manifest, or remove it and score again", where);
}

static enum rt_status parse_line(struct rt_manifest *m, const char *text, size_t len, const char *where, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    struct rt_manifest_line *l = &m->line[m->n];
    const char *file, *sha;
    char name[RT_NAME_CAP];
    bool end;
    int64_t bytes, n, rows;
    RT_TRY(check_crc(text, len, where, err));
    RT_TRY(rt_json_parse(text, len, where, &v, err));
    if (m->finished)
        RT_FAIL(err, FORMAT, "%s: a line after the one that ends the set", where);
    RT_TRY(rt_json_bool_or(v, "end", false, &end, err));
    RT_TRY(rt_json_int(v, "sequences", 0, INT64_MAX, &n, err));
    RT_TRY(rt_json_int(v, "rows", 0, INT64_MAX, &rows, err));
    if (end) {
        if (n != m->sequences || rows != m->rows)
            RT_FAIL(err, FORMAT, "%s: the set ends with %" PRId64 " sequences and %" PRId64 " rows, its shards have %" PRId64
                    " and %" PRId64, where, n, rows, m->sequences, m->rows);
        m->finished = true;
        goto out;
    }
    RT_TRY(rt_json_string(v, "file", &file, err));
    RT_TRY(rt_json_string(v, "sha256", &sha, err));
    RT_TRY(rt_json_int(v, "bytes", 0, INT64_MAX, &bytes, err));
    RT_TRY(rt_json_int(v, "tokens", 0, INT64_MAX, &l->tokens, err));
    RT_TRY(rt_json_int(v, "first", m->sequences, m->sequences, &l->first, err));
    if (n < 1 || __builtin_add_overflow(m->sequences, n, &m->sequences) || __builtin_add_overflow(m->rows, rows, &m->rows))
        RT_FAIL(err, FORMAT, "%s: key 'sequences': %" PRId64 " sequences, expected at least 1", where, n);
    RT_TRY(rt_json_int(v, "last", m->sequences - 1, m->sequences - 1, &l->last, err));
    RT_TRY(rt_json_int(v, "last_line", 0, INT64_MAX, &l->last_line, err));
    rt_shard_name(m->part, m->n_parts, m->n, name);
    if (strcmp(file, name) != 0 || strlen(sha) != 64)
        RT_FAIL(err, FORMAT, "%s: file '%.80s', expected '%s' and a sha256", where, file, name);
    strcpy(l->file, name);
    strcpy(l->sha256, sha);
    l->bytes = (uint64_t)bytes;
    l->sequences = n;
    l->rows = rows;
    m->bytes += l->bytes;
    m->n++;
out:
    rt_json_free(v);
    return st;
}

enum rt_status rt_manifest_read(const char *dir, int part, int n_parts, struct rt_manifest *out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf text = {0};
    struct rt_manifest m = {.part = part, .n_parts = n_parts};
    char name[RT_NAME_CAP], path[4096], where[4200];
    size_t lines = 0, no = 0;
    rt_manifest_name(part, n_parts, name);
    RT_TRY(rt_path_join(path, sizeof path, dir, name, err));
    if (rt_path_exists(path))
        RT_TRY(rt_file_read_all(path, MAX_MANIFEST, &text, err));
    for (size_t i = 0; i < text.len; i++)
        lines += text.data[i] == '\n';
    if (lines > text.len / 64 + 1) /* no line is that short */
        RT_FAIL(err, FORMAT, "%s: not a manifest", path);
    RT_TRY(rt_alloc(lines, sizeof *m.line, "a manifest", &m.line, err));
    for (size_t at = 0; no < lines; no++) {
        const char *start = text.data + at, *nl = memchr(start, '\n', text.len - at);
        const size_t len = (size_t)(nl - start);
        snprintf(where, sizeof where, "%s:%zu", path, no + 1);
        if (len > MAX_LINE)
            RT_FAIL(err, FORMAT, "%s: %zu bytes, expected at most %d", where, len, MAX_LINE);
        RT_TRY(parse_line(&m, start, len, where, err));
        at += len + 1;
    }
    *out = m;
    m.line = NULL;
out:
    rt_free(m.line);
    rt_buf_free(&text);
    return st;
}

/* Adds the crc to an object and appends it. */
static enum rt_status append(const char *dir, const struct rt_manifest *m, const struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf line = {0};
    char name[RT_NAME_CAP], path[4096];
    RT_TRY(rt_json_dump(v, 0, &line, err));
    line.len--; /* the closing brace */
    const unsigned crc = (unsigned)crc32(0, (const Bytef *)line.data, (uInt)line.len);
    RT_TRY(rt_buf_printf(&line, err, ",\"crc\":\"%08x\"}\n", crc));
    rt_manifest_name(m->part, m->n_parts, name);
    RT_TRY(rt_path_join(path, sizeof path, dir, name, err));
    RT_TRY(rt_file_append_sync(path, line.data, line.len, err));
out:
    rt_buf_free(&line);
    return st;
}

enum rt_status rt_manifest_append(const char *dir, const struct rt_manifest *m, const struct rt_manifest_line *l, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_string(v, "file", l->file, err));
    RT_TRY(rt_json_set_int(v, "bytes", (int64_t)l->bytes, err));
    RT_TRY(rt_json_set_string(v, "sha256", l->sha256, err));
    RT_TRY(rt_json_set_int(v, "sequences", l->sequences, err));
    RT_TRY(rt_json_set_int(v, "tokens", l->tokens, err));
    RT_TRY(rt_json_set_int(v, "rows", l->rows, err));
    RT_TRY(rt_json_set_int(v, "first", l->first, err));
    RT_TRY(rt_json_set_int(v, "last", l->last, err));
    RT_TRY(rt_json_set_int(v, "last_line", l->last_line, err));
    RT_TRY(append(dir, m, v, err));
out:
    rt_json_free(v);
    return st;
}

enum rt_status rt_manifest_end(const char *dir, const struct rt_manifest *m, int64_t sequences, int64_t rows, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_bool(v, "end", true, err));
    RT_TRY(rt_json_set_int(v, "sequences", sequences, err));
    RT_TRY(rt_json_set_int(v, "rows", rows, err));
    RT_TRY(append(dir, m, v, err));
out:
    rt_json_free(v);
    return st;
}

enum rt_status rt_manifest_find(const char *dir, int *n_parts, bool present[RT_MAX_PARTS], struct rt_err *err)
{
    enum rt_status st;
    char **names = NULL;
    size_t n = 0;
    *n_parts = 0;
    memset(present, 0, RT_MAX_PARTS * sizeof *present);
    RT_TRY(rt_list_dir(dir, &names, &n, err));
    for (size_t i = 0; i < n; i++) {
        int part = 0, parts = 1;
        char again[RT_NAME_CAP];
        if (strcmp(names[i], "manifest.jsonl") != 0 && sscanf(names[i], "manifest-%4d-of-%4d.jsonl", &part, &parts) != 2)
            continue;
        rt_manifest_name(part, parts, again);
        if (strcmp(names[i], again) != 0 || part < 0 || part >= parts || parts > RT_MAX_PARTS)
            continue; /* a copy, an editor's leftover */
        if (*n_parts != 0 && *n_parts != parts)
            RT_FAIL(err, REFUSED, "%s: manifests of sets in %d and in %d parts lie side by side: put each set in its own directory", dir,
                    *n_parts, parts);
        *n_parts = parts;
        present[part] = true;
    }
out:
    rt_names_free(names, n);
    return st;
}
