/* Reading a set of row shards. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <zlib.h>

#include "core/io.h"
#include "core/sha256.h"
#include "formats/manifest.h"
#include "formats/row_identity.h"
#include "formats/shard_block.h"
#include "formats/shard_file.h"

enum { OPEN_FILES = 32 };

struct shard {
    char *path;
    struct rt_buf report;
    char sha256[65]; /* "" where there is no manifest */
    uint64_t size;
    int fd; /* -1: closed */
};

struct rt_shard_set {
    struct rt_row_identity id;
    struct rt_shard_info info;
    struct rt_buf shards; /* of struct shard */
    struct rt_buf seq;    /* of struct rt_seq_info */
    bool borrowed;        /* seq is another set's */
    int open[OPEN_FILES]; /* shards whose file is open, a ring; -1: none */
    int next_open;
    struct rt_block_store store;
    struct rt_buf bytes; /* of the sequence that was read last */
    int64_t held;        /* which one is decoded in rows, -1: none */
    struct rt_rows rows;
};

static struct shard *shard_at(const struct rt_shard_set *s, int i)
{
    return (struct shard *)(void *)s->shards.data + i;
}

void rt_shard_set_free(struct rt_shard_set *s)
{
    if (s == NULL)
        return;
    for (int i = 0; i < (int)(s->shards.len / sizeof(struct shard)); i++) {
        rt_file_close(shard_at(s, i)->fd);
        rt_free(shard_at(s, i)->path);
        rt_buf_free(&shard_at(s, i)->report);
    }
    rt_buf_free(&s->shards);
    if (!s->borrowed)
        rt_buf_free(&s->seq);
    rt_buf_free(&s->bytes);
    rt_block_store_free(&s->store);
    rt_free(s);
}

const struct rt_row_identity *rt_shard_set_identity(const struct rt_shard_set *s)
{
    return &s->id;
}

const struct rt_shard_info *rt_shard_set_info(const struct rt_shard_set *s)
{
    return &s->info;
}

const struct rt_seq_info *rt_shard_set_seq(const struct rt_shard_set *s, int64_t i)
{
    RT_ASSERT(i >= 0 && i < s->info.sequences);
    return (const struct rt_seq_info *)(const void *)s->seq.data + i;
}

const char *rt_shard_set_file(const struct rt_shard_set *s, int shard)
{
    return shard_at(s, shard)->path;
}

const char *rt_shard_set_report(const struct rt_shard_set *s, int shard)
{
    const struct rt_buf *b = &shard_at(s, shard)->report;
    return b->len > 0 ? b->data : "";
}

/* The shard's file, opened if need be; the one that was opened longest ago makes room. */
static enum rt_status shard_fd(struct rt_shard_set *s, int i, int *fd, struct rt_err *err)
{
    struct shard *sh = shard_at(s, i);
    if (sh->fd < 0) {
        uint64_t size;
        const enum rt_status st = rt_file_open(sh->path, &sh->fd, &size, err);
        if (st != RT_OK)
            return st;
        const int old = s->open[s->next_open];
        if (old >= 0 && old != i) {
            rt_file_close(shard_at(s, old)->fd);
            shard_at(s, old)->fd = -1;
        }
        s->open[s->next_open] = i;
        s->next_open = (s->next_open + 1) % OPEN_FILES;
        if (size != sh->size)
            return rt_fail(err, RT_FORMAT, "%s: %" PRIu64 " bytes, expected %" PRIu64 ": it changed while in use, or was replaced", sh->path,
                           size, sh->size);
    }
    *fd = sh->fd;
    return RT_OK;
}

/* Adds a shard; line NULL: a file on its own. The first one gives the identity where there is none yet. */
static enum rt_status add_shard(struct rt_shard_set *s, const char *path, const struct rt_manifest *m, const struct rt_manifest_line *line,
                                bool have_identity, struct rt_err *err)
{
    enum rt_status st;
    struct shard sh = {.fd = -1};
    struct rt_shard_contents c = {0};
    int fd = -1;
    int64_t tokens = 0, rows = 0;
    RT_TRY(rt_alloc(strlen(path) + 1, 1, "a path", &sh.path, err));
    strcpy(sh.path, path);
    if (line != NULL && !rt_path_exists(path))
        RT_FAIL(err, IO, "%s: not there, and the manifest names it: restore the file, or score again into another directory", path);
    RT_TRY(rt_file_open(path, &fd, &sh.size, err));
    if (line != NULL && sh.size != line->bytes)
        RT_FAIL(err, FORMAT, "%s: %" PRIu64 " bytes, the manifest says %" PRIu64, path, sh.size, line->bytes);
    RT_TRY(rt_shard_read(fd, path, sh.size, &c, err));
    if (have_identity)
        RT_TRY(rt_row_identity_match(&c.header.id, &s->id, path, err));
    else
        s->id = c.header.id;
    for (int64_t i = 0; i < c.n; i++) {
        c.seq[i].shard = (int)s->info.shards;
        tokens += c.seq[i].n_tokens;
        rows += c.seq[i].n_rows;
    }
    if (line != NULL) {
        if (c.header.part != m->part || c.header.n_parts != m->n_parts || c.header.first != line->first || c.n != line->sequences ||
            tokens != line->tokens || rows != line->rows)
            RT_FAIL(err, FORMAT, "%s: holds other sequences than the manifest says: the file is of another set", path);
        strcpy(sh.sha256, line->sha256);
    }
    RT_TRY(rt_buf_append(&s->seq, c.seq, (size_t)c.n * sizeof *c.seq, err));
    if (c.header.report.len > 0)
        RT_TRY(rt_buf_append(&sh.report, c.header.report.data, c.header.report.len, err));
    RT_TRY(rt_buf_puts(&sh.report, "", err));
    RT_TRY(rt_buf_append(&s->shards, &sh, sizeof sh, err));
    sh.path = NULL;
    sh.report = (struct rt_buf){0};
    s->info.shards++;
    s->info.sequences += c.n;
    s->info.tokens += tokens;
    s->info.rows += rows;
    s->info.bytes += sh.size;
out:
    rt_free(sh.path);
    rt_buf_free(&sh.report);
    rt_buf_free(&c.header.report);
    rt_free(c.seq);
    rt_file_close(fd);
    return st;
}

/* "part 2 of 8 is missing, part 5 is unfinished, ..." */
static void name_missing(struct rt_shard_set *s, int part, const char *what)
{
    char *text = s->info.missing, total[24] = "", one[64];
    const size_t at = strlen(text), room = sizeof s->info.missing - at;
    if (at == 0)
        snprintf(total, sizeof total, " of %d", s->info.n_parts);
    const int n = s->info.n_parts == 1 ? snprintf(one, sizeof one, "the set is %s", what)
                                       : snprintf(one, sizeof one, "%spart %d%s is %s", at > 0 ? ", " : "", part, total, what);
    if ((size_t)n + 5 < room)
        memcpy(text + at, one, (size_t)n + 1);
    else if (strcmp(text + at - 3, "...") != 0)
        memcpy(text + at, " ...", 5);
}

static enum rt_status add_part(struct rt_shard_set *s, const char *dir, int part, int n_parts, struct rt_err *err)
{
    enum rt_status st;
    struct rt_manifest m = {0};
    char path[4096];
    RT_TRY(rt_manifest_read(dir, part, n_parts, &m, err));
    for (int64_t i = 0; i < m.n; i++) {
        RT_TRY(rt_path_join(path, sizeof path, dir, m.line[i].file, err));
        RT_TRY(add_shard(s, path, &m, &m.line[i], true, err));
    }
    if (!m.finished)
        name_missing(s, part, "unfinished");
    s->info.finished &= m.finished;
out:
    rt_manifest_free(&m);
    return st;
}

static enum rt_status open_dir(struct rt_shard_set *s, const char *dir, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    bool *present = NULL;
    int n_parts;
    char path[4096];
    RT_TRY(rt_path_join(path, sizeof path, dir, "identity.json", err));
    if (!rt_path_exists(path))
        RT_FAIL(err, FORMAT, "%s: no set of row shards here: expected identity.json", dir);
    RT_TRY(rt_json_load(path, 1 << 20, &v, err));
    RT_TRY(rt_row_identity_from_json(v, &s->id, err));
    RT_TRY(rt_alloc(RT_MAX_PARTS, sizeof *present, "the parts of a set", &present, err));
    RT_TRY(rt_manifest_find(dir, &n_parts, present, err));
    s->info.n_parts = n_parts > 0 ? n_parts : 1;
    s->info.finished = n_parts > 0;
    for (int p = 0; p < n_parts; p++) {
        s->info.parts_present += present[p];
        if (present[p])
            RT_TRY(add_part(s, dir, p, n_parts, err));
        else
            name_missing(s, p, "missing");
        s->info.finished &= present[p];
    }
out:
    rt_free(present);
    rt_json_free(v);
    return st;
}

static void summarize(struct rt_shard_set *s)
{
    const struct rt_seq_info *q = (const void *)s->seq.data;
    const double n = s->info.rows > 0 ? (double)s->info.rows : 1;
    for (int t = 0; t < s->id.n_lse; t++)
        s->info.mass_min[t] = s->info.rows > 0 ? INFINITY : 0;
    for (int64_t i = 0; i < s->info.sequences; i++) {
        if (q[i].n_rows == 0)
            continue;
        s->info.nll += q[i].nll * ((double)q[i].n_rows / n);
        for (int t = 0; t < s->id.n_lse; t++) {
            s->info.mass[t] += q[i].mass[t] * ((double)q[i].n_rows / n);
            if (q[i].mass[t] < s->info.mass_min[t])
                s->info.mass_min[t] = (double)q[i].mass[t];
        }
    }
}

enum rt_status rt_shard_set_open(const char *path, struct rt_shard_set **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_set *s = NULL;
    RT_TRY(rt_alloc(1, sizeof *s, "a set of row shards", &s, err));
    for (int i = 0; i < OPEN_FILES; i++)
        s->open[i] = -1;
    s->held = -1;
    if (rt_path_is_dir(path)) {
        RT_TRY(open_dir(s, path, err));
    } else {
        RT_TRY(add_shard(s, path, NULL, NULL, false, err));
        s->info.n_parts = s->info.parts_present = 1;
    }
    summarize(s);
    *out = s;
    s = NULL;
out:
    rt_shard_set_free(s);
    return st;
}

enum rt_status rt_shard_set_again(const struct rt_shard_set *s, struct rt_shard_set **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_set *t = NULL;
    RT_TRY(rt_alloc(1, sizeof *t, "a set of row shards", &t, err));
    t->borrowed = true;
    t->id = s->id;
    t->info = s->info;
    t->seq = s->seq;
    t->held = -1;
    for (int i = 0; i < OPEN_FILES; i++)
        t->open[i] = -1;
    for (int i = 0; i < (int)s->info.shards; i++) {
        const struct shard *from = shard_at(s, i);
        struct shard sh = {.size = from->size, .fd = -1};
        memcpy(sh.sha256, from->sha256, sizeof sh.sha256);
        RT_TRY(rt_buf_append(&t->shards, &sh, sizeof sh, err));
        RT_TRY(rt_alloc(strlen(from->path) + 1, 1, "a path", &shard_at(t, i)->path, err));
        strcpy(shard_at(t, i)->path, from->path);
        RT_TRY(rt_buf_puts(&shard_at(t, i)->report, from->report.data, err));
    }
    *out = t;
    t = NULL;
out:
    rt_shard_set_free(t);
    return st;
}

enum rt_status rt_shard_set_get(struct rt_shard_set *s, int64_t i, struct rt_rows *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char where[4200];
    int fd;
    if (i < 0 || i >= s->info.sequences)
        return rt_fail(err, RT_USAGE, "sequence %" PRId64 " asked for, the set has %" PRId64, i, s->info.sequences);
    if (s->held != i) {
        const struct rt_seq_info *q = rt_shard_set_seq(s, i);
        const char *path = shard_at(s, q->shard)->path;
        s->held = -1;
        s->bytes.len = 0;
        RT_TRY(shard_fd(s, q->shard, &fd, err));
        RT_TRY(rt_buf_reserve(&s->bytes, (size_t)q->bytes + 1, err));
        RT_TRY(rt_file_pread(fd, path, s->bytes.data, (size_t)q->bytes, q->offset, err));
        uLong crc = crc32(0, NULL, 0);
        for (uint64_t at = 0; at < q->bytes; at += 1u << 30)
            crc = crc32(crc, (const Bytef *)s->bytes.data + at, (uInt)(q->bytes - at < 1u << 30 ? q->bytes - at : 1u << 30));
        if (crc != q->crc)
            RT_FAIL(err, FORMAT, "%s: sequence %" PRId64 " (bytes %" PRIu64 " to %" PRIu64 ") is damaged: crc32 %08lx, expected %08x", path,
                    q->ordinal, q->offset, q->offset + q->bytes, crc, q->crc);
        RT_TRY(rt_block_unpack(&s->store, &s->id, q->ordinal, q->n_tokens, q->n_rows, s->bytes.data, (size_t)q->bytes, path, q->offset,
                               &s->rows, err));
        memcpy(s->rows.key, q->key, sizeof s->rows.key);
        s->rows.occurrence = q->occurrence;
        s->rows.source_line = q->source_line;
        snprintf(where, sizeof where, "%s: sequence %" PRId64, path, q->ordinal);
        RT_TRY(rt_rows_check(&s->rows, &s->id, where, err));
        s->held = i;
    }
    *out = s->rows;
out:
    return st;
}

static enum rt_status source_get(void *self, int64_t i, struct rt_rows *out, bool *end, struct rt_err *err)
{
    struct rt_shard_set *s = self;
    *end = i >= s->info.sequences;
    return *end ? RT_OK : rt_shard_set_get(s, i, out, err);
}

struct rt_row_source rt_shard_set_source(struct rt_shard_set *s)
{
    return (struct rt_row_source){s, s->info.sequences, &s->id, source_get};
}

static enum rt_status check_sha(struct rt_shard_set *s, int i, struct rt_err *err)
{
    enum rt_status st;
    struct shard *sh = shard_at(s, i);
    struct rt_sha256 sha;
    char hex[65];
    int fd;
    rt_sha256_init(&sha);
    RT_TRY(shard_fd(s, i, &fd, err));
    RT_TRY(rt_file_hash(fd, sh->path, sh->size, &sha, err));
    rt_sha256_final_hex(&sha, hex);
    if (strcmp(hex, sh->sha256) != 0)
        RT_FAIL(err, FORMAT, "%s: damaged: sha256 %s, the manifest says %s", sh->path, hex, sh->sha256);
out:
    return st;
}

enum rt_status rt_shard_set_verify(struct rt_shard_set *s, struct rt_log *log, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rows rows;
    struct rt_progress progress;
    rt_progress_begin(&progress, log, "verifying", "sequences", s->info.sequences);
    for (int i = 0; i < (int)s->info.shards; i++)
        if (shard_at(s, i)->sha256[0] != '\0')
            RT_TRY(check_sha(s, i, err));
    s->held = -1;
    for (int64_t i = 0; i < s->info.sequences; i++) {
        RT_TRY(rt_shard_set_get(s, i, &rows, err));
        rt_progress_update(&progress, i + 1, NULL);
    }
out:
    rt_progress_end(&progress);
    return st;
}
