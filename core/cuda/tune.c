/* The file of measured choices. Format and rules: tune.h. */
#include "core/cuda/tune.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "core/sha256.h"

_Static_assert(sizeof(struct rt_product_key) == 10 * 8 + 4 * 4, "a key has padding");

/* A choice is about 300 bytes: some 3000 of them, hundreds of times what a run meets. */
enum { MOST_BYTES = 1 << 20, HEADER = 512 };

struct rt_tune {
    char *path;          /* NULL: in memory alone */
    char header[HEADER]; /* its first lines */
    struct rt_product_choice *at;
    size_t n, cap;
};

void rt_tune_close(struct rt_tune *t)
{
    if (t == NULL)
        return;
    rt_free(t->path);
    rt_free(t->at);
    rt_free(t);
}

const char *rt_tune_path(const struct rt_tune *t)
{
    return t->path != NULL ? t->path : "memory";
}

const struct rt_product_choice *rt_tune_find(const struct rt_tune *t, const struct rt_product_key *key)
{
    for (size_t i = 0; i < t->n; i++)
        if (memcmp(&t->at[i].key, key, sizeof *key) == 0)
            return &t->at[i];
    return NULL;
}

const struct rt_product_choice *rt_tune_find_wider(const struct rt_tune *t, const struct rt_product_key *key, bool in_k)
{
    const struct rt_product_choice *best = NULL;
    struct rt_product_key like = *key;
    int64_t *const tokens = in_k ? &like.K : &like.N;
    for (size_t i = 0; i < t->n; i++) {
        const struct rt_product_key *k = &t->at[i].key;
        const int64_t n = in_k ? k->K : k->N, most = best == NULL ? INT64_MAX : in_k ? best->key.K : best->key.N;
        *tokens = n;
        if (n > (in_k ? key->K : key->N) && n < most && memcmp(k, &like, sizeof like) == 0)
            best = &t->at[i];
    }
    return best;
}

static enum rt_status keep(struct rt_tune *t, const struct rt_product_choice *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (t->n == t->cap) {
        struct rt_product_choice *more = NULL;
        const size_t cap = t->cap > 0 ? 2 * t->cap : 32;
        RT_TRY(rt_alloc(cap, sizeof *more, "choices of products", &more, err));
        if (t->n > 0)
            memcpy(more, t->at, t->n * sizeof *more);
        rt_free(t->at);
        t->at = more;
        t->cap = cap;
    }
    t->at[t->n++] = *c;
out:
    return st;
}

/* ---- reading ---- */

/* Reads `n` numbers in the base given, one blank before each. */
static bool numbers(const char **at, int n, int base, uint64_t *out)
{
    for (int i = 0; i < n; i++) {
        const char *p = *at;
        const int most = base == 16 ? 16 : 18; /* digits that fit */
        int digits = 0;
        if (*p++ != ' ')
            return false;
        for (out[i] = 0; digits <= most; digits++, p++) {
            const int d = *p >= '0' && *p <= '9' ? *p - '0' : base == 16 && *p >= 'a' && *p <= 'f' ? *p - 'a' + 10 : -1;
            if (d < 0)
                break;
            out[i] = out[i] * (uint64_t)base + (uint64_t)d;
        }
        if (digits == 0 || digits > most)
            return false;
        *at = p;
    }
    return true;
}

/* One line "product ...", with its end. */
static bool read_choice(const char **at, struct rt_product_choice *c)
{
    static const char word[] = "product";
    uint64_t v[17];
    memset(c, 0, sizeof *c);
    if (strncmp(*at, word, sizeof word - 1) != 0)
        return false;
    *at += sizeof word - 1;
    if (!numbers(at, 17, 10, v) || !numbers(at, RT_ALGO_WORDS, 16, c->algo) || *(*at)++ != '\n')
        return false;
    for (int i = 10; i < 15; i++)
        if (v[i] > INT32_MAX)
            return false;
    c->key = (struct rt_product_key){(int64_t)v[0], (int64_t)v[1], (int64_t)v[2], (int64_t)v[3], (int64_t)v[4], (int64_t)v[5], (int64_t)v[6],
                                     (int64_t)v[7], (int64_t)v[8], (int64_t)v[9], (int32_t)v[10], (int32_t)v[11], (int32_t)v[12], (int32_t)v[13]};
    c->rank = (int32_t)v[14];
    c->first_ns = (int64_t)v[15];
    c->best_ns = (int64_t)v[16];
    return true;
}

/* The last line holds the hash of what is before it: *end = where it begins. */
static bool check_hash(const struct rt_buf *b, size_t *end)
{
    enum { LINE = 7 + 64 + 1 };
    uint8_t digest[32];
    char line[LINE + 1] = "sha256 ";
    if (b->len < LINE)
        return false;
    *end = b->len - LINE;
    rt_sha256(b->data, *end, digest);
    rt_hex(line + 7, digest, sizeof digest);
    line[LINE - 1] = '\n';
    return memcmp(b->data + *end, line, LINE) == 0;
}

static enum rt_status read_file(struct rt_tune *t, char *note, int cap, struct rt_err *err)
{
    static const char magic[] = "retort products ";
    struct rt_buf b = {0};
    size_t end = 0;
    struct rt_product_choice c;
    enum rt_status st;
    RT_TRY(rt_file_read_all(t->path, MOST_BYTES, &b, err));
    if (b.len < sizeof magic - 1 || memcmp(b.data, magic, sizeof magic - 1) != 0 || !check_hash(&b, &end))
        RT_FAIL(err, FORMAT, "%s: a damaged file of measured products; without it this run cannot go on with the same bytes: put it back, or delete it "
                "and they are measured again", t->path);
    const char *at = b.data + strlen(t->header);
    if (end < strlen(t->header) || memcmp(b.data, t->header, strlen(t->header)) != 0) {
        snprintf(note, (size_t)cap, "%s was made by another GPU, library or version: products are measured again, and results may differ in their last bits", t->path);
        goto out;
    }
    while (at < b.data + end) {
        if (!read_choice(&at, &c) || rt_tune_find(t, &c.key) != NULL)
            RT_FAIL(err, FORMAT, "%s: measured product %zu is not what this program writes; delete the file and products are measured again", t->path, t->n);
        RT_TRY(keep(t, &c, err));
    }
out:
    rt_buf_free(&b);
    return st;
}

enum rt_status rt_tune_open(const char *path, const char *gpu, uint64_t library, uint64_t workspace, struct rt_tune **out, char *note, int cap,
                            struct rt_err *err)
{
    struct rt_tune *t = NULL;
    enum rt_status st;
    note[0] = 0;
    RT_TRY(rt_alloc(1, sizeof *t, "measured products", &t, err));
    const int n = snprintf(t->header, sizeof t->header, "retort products 1\ngpu %s\nlibrary %" PRIu64 " workspace %" PRIu64 "\n", gpu, library, workspace);
    if (n < 0 || n >= HEADER)
        RT_FAIL(err, INTERNAL, "a GPU's name of more than %d characters", HEADER);
    if (path != NULL) {
        RT_TRY(rt_alloc(strlen(path) + 1, 1, "a path", &t->path, err));
        memcpy(t->path, path, strlen(path));
        if (rt_path_exists(path))
            RT_TRY(read_file(t, note, cap, err));
    }
    *out = t;
    t = NULL;
out:
    rt_tune_close(t);
    return st;
}

/* ---- writing ---- */

static enum rt_status put_choice(struct rt_buf *b, const struct rt_product_choice *c, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_product_key *k = &c->key;
    RT_TRY(rt_buf_printf(b, err, "product %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld %d %d %d %d %d %ld %ld", (long)k->M, (long)k->N, (long)k->K, (long)k->lda,
                         (long)k->ldb, (long)k->ldd, (long)k->batch, (long)k->a_stride, (long)k->b_stride, (long)k->d_stride, (int)k->align_a,
                         (int)k->align_b, (int)k->align_d, (int)k->flags, (int)c->rank, (long)c->first_ns, (long)c->best_ns));
    for (int i = 0; i < RT_ALGO_WORDS; i++)
        RT_TRY(rt_buf_printf(b, err, " %016" PRIx64, c->algo[i]));
    RT_TRY(rt_buf_puts(b, "\n", err));
out:
    return st;
}

static enum rt_status write_file(const struct rt_tune *t, struct rt_err *err)
{
    struct rt_buf b = {0};
    uint8_t digest[32];
    char hex[65];
    enum rt_status st;
    RT_TRY(rt_buf_puts(&b, t->header, err));
    for (size_t i = 0; i < t->n; i++)
        RT_TRY(put_choice(&b, &t->at[i], err));
    rt_sha256(b.data, b.len, digest);
    rt_hex(hex, digest, sizeof digest);
    RT_TRY(rt_buf_printf(&b, err, "sha256 %s\n", hex));
    RT_TRY(rt_publish_bytes(t->path, b.data, b.len, err));
out:
    rt_buf_free(&b);
    return st;
}

enum rt_status rt_tune_add(struct rt_tune *t, const struct rt_product_choice *c, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(keep(t, c, err));
    if (t->path != NULL)
        RT_TRY(write_file(t, err));
out:
    return st;
}
