#include "tests/suite.h"

#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include "core/io.h"
#include "core/mem.h"
#include "core/rng.h"
#include "formats/safetensors.h"
#include "formats/shard.h"
#include "formats/shard_codec.h"
#include "formats/shard_file.h"

/* Rows as a teacher would make them: from logits over all ids that exist, by the definitions of formats/rows.h. */
enum { MAX_TOKENS = 400, MAX_K = 64, MAX_IDS = 97 };
struct made {
    struct rt_rows rows;
    uint32_t ids[MAX_TOKENS], ends[MAX_TOKENS], pos[MAX_TOKENS], topk_ids[MAX_TOKENS * MAX_K], next[MAX_TOKENS], rank[MAX_TOKENS];
    uint8_t mask[MAX_TOKENS];
    char text[MAX_TOKENS * 4];
    float logits[MAX_TOKENS * MAX_K], lse[MAX_TOKENS * RT_MAX_LSE], logprob[MAX_TOKENS], scale[MAX_TOKENS];
    uint16_t state[MAX_TOKENS * 8];
    uint8_t code[MAX_TOKENS * 4];
};

static struct rt_row_identity identity(int k)
{
    struct rt_row_identity id = {.vocab_size = 100, .n_ids = MAX_IDS, .top_k = k, .n_lse = 3, .lse_temperature = {0.6, 1, 2},
                                 .projection_seed = UINT64_MAX, .max_length = 4096};
    memset(id.teacher_sha256, 'a', 64);
    memset(id.tokenizer_sha256, 'b', 64);
    strcpy(id.teacher_name, "tiny");
    strcpy(id.mode, "w8a16/f32/ref");
    return id;
}

static void add_features(struct rt_row_identity *id)
{
    id->n_features = 2;
    id->feature[0] = (struct rt_feature_spec){3, 8, RT_BF16, false};
    id->feature[1] = (struct rt_feature_spec){RT_LAYER_FINAL, 4, RT_E4M3, true};
}

static void make_row(struct made *m, const struct rt_row_identity *id, uint64_t seed, int64_t t, int64_t i)
{
    const int k = m->rows.k;
    float all[MAX_IDS];
    uint32_t order[MAX_IDS];
    for (uint32_t v = 0; v < MAX_IDS; v++) { /* halves, so that logits tie */
        all[v] = floorf(rt_rng_normal(seed, (uint64_t)t, v) * 6) / 2;
        uint32_t at = v;
        for (; at > 0 && all[order[at - 1]] < all[v]; at--)
            order[at] = order[at - 1];
        order[at] = v;
    }
    for (int j = 0; j < k; j++) {
        m->topk_ids[i * k + j] = order[j];
        m->logits[i * k + j] = all[order[j]];
    }
    double lse1 = 0;
    for (int l = 0; l < id->n_lse; l++) {
        double sum = 0;
        for (int v = 0; v < MAX_IDS; v++)
            sum += exp(all[v] / id->lse_temperature[l]);
        m->lse[i * id->n_lse + l] = (float)log(sum);
        lse1 = id->lse_temperature[l] == 1 ? log(sum) : lse1;
    }
    m->pos[i] = (uint32_t)t;
    m->next[i] = m->ids[t + 1];
    m->logprob[i] = (float)(all[m->next[i]] - lse1);
    for (m->rank[i] = 0; order[m->rank[i]] != m->next[i];)
        m->rank[i]++;
}

static struct made *make(const struct rt_row_identity *id, int i, int64_t n_tokens)
{
    struct made *m = calloc(1, sizeof *m);
    struct rt_rows *r = &m->rows;
    const uint64_t seed = (uint64_t)i;
    assert_non_null(m);
    *r = (struct rt_rows){.occurrence = (uint32_t)i % 3, .source_line = 2 * i + 1, .n_tokens = n_tokens, .k = id->top_k < MAX_IDS ? id->top_k : MAX_IDS,
                          .n_lse = id->n_lse, .n_features = id->n_features};
    assert_true(n_tokens <= MAX_TOKENS && r->k <= MAX_K);
    for (int64_t t = 0; t < n_tokens; t++) {
        m->ids[t] = (uint32_t)(rt_rng_u64(seed, 1000, (uint64_t)t) % MAX_IDS);
        m->mask[t] = t >= n_tokens / 2;
        const int64_t len = (int64_t)(m->ids[t] % 4);
        memset(m->text + r->text_len, 'a' + (int)(m->ids[t] % 26), (size_t)len);
        r->text_len += len;
        m->ends[t] = (uint32_t)r->text_len;
        m->scale[t] = 0.5f + (float)t;
        for (int d = 0; d < 8; d++)
            m->state[t * 8 + d] = rt_f32_to_bf16(rt_rng_normal(seed, 2000, (uint64_t)(t * 8 + d)));
        for (int d = 0; d < 4; d++)
            m->code[t * 4 + d] = rt_f32_to_e4m3(rt_rng_normal(seed, 3000, (uint64_t)(t * 4 + d)));
    }
    for (int64_t t = 0; t + 1 < n_tokens; t++)
        if (!id->completion_only || m->mask[t + 1] == 1)
            make_row(m, id, seed, t, r->n_rows++);
    rt_rows_key(m->ids, n_tokens, r->key);
    r->ids = m->ids;
    r->loss_mask = m->mask;
    if (id->tokenizer_sha256[0] != '\0') {
        r->text = m->text;
        r->byte_end = m->ends;
    } else {
        r->text_len = 0;
    }
    r->position = m->pos;
    r->topk_ids = m->topk_ids;
    r->topk_logits = m->logits;
    r->lse = m->lse;
    r->next_id = m->next;
    r->next_logprob = m->logprob;
    r->next_rank = m->rank;
    if (id->n_features > 0)
        r->feature[0] = m->state;
    if (id->n_features > 1) {
        r->feature[1] = m->code;
        r->feature_scale[1] = m->scale;
    }
    return m;
}

static int64_t length_of(int i)
{
    return 1 + (i * 7) % 20; /* a sequence of one token has no rows */
}

/* Writes sequences up to n, from wherever the set stands; status of the first thing that fails. stop: kill -9 after that put. */
static enum rt_status write_set(const char *dir, const struct rt_row_identity *id, const struct rt_shard_options *opt, int n, int stop,
                                struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct made *m = NULL;
    RT_TRY(rt_shard_sink_open(dir, id, opt, &s, &sink, &resume, err));
    for (int i = (int)resume.sequences; i < n; i++) {
        m = make(id, i, length_of(i));
        RT_TRY(sink.put(sink.self, &m->rows, err));
        free(m);
        m = NULL;
        if (i == stop)
            kill(getpid(), SIGKILL);
    }
    RT_TRY(sink.finish(sink.self, err));
out:
    free(m);
    rt_shard_sink_free(s);
    return st;
}

static void same_rows(const struct rt_rows *a, const struct rt_rows *b, const struct rt_row_identity *id)
{
    const size_t n = (size_t)a->n_tokens, rows = (size_t)a->n_rows;
    assert_memory_equal(a->key, b->key, RT_KEY_BYTES);
    assert_int_equal(a->occurrence, b->occurrence);
    assert_int_equal(a->source_line, b->source_line);
    assert_int_equal(a->n_tokens, b->n_tokens);
    assert_int_equal(a->n_rows, b->n_rows);
    assert_int_equal(a->k, b->k);
    assert_int_equal(a->text_len, b->text_len);
    assert_memory_equal(a->ids, b->ids, n * 4);
    assert_memory_equal(a->loss_mask, b->loss_mask, n);
    assert_true((a->text == NULL) == (b->text == NULL));
    if (a->text != NULL) {
        assert_memory_equal(a->text, b->text, (size_t)a->text_len);
        assert_memory_equal(a->byte_end, b->byte_end, n * 4);
    }
    assert_memory_equal(a->position, b->position, rows * 4);
    assert_memory_equal(a->topk_ids, b->topk_ids, rows * (size_t)a->k * 4);
    assert_memory_equal(a->topk_logits, b->topk_logits, rows * (size_t)a->k * 4);
    assert_memory_equal(a->lse, b->lse, rows * (size_t)a->n_lse * 4);
    assert_memory_equal(a->next_id, b->next_id, rows * 4);
    assert_memory_equal(a->next_logprob, b->next_logprob, rows * 4);
    assert_memory_equal(a->next_rank, b->next_rank, rows * 4);
    assert_int_equal(a->n_features, b->n_features);
    for (int f = 0; f < a->n_features; f++) {
        assert_memory_equal(a->feature[f], b->feature[f], n * (size_t)id->feature[f].dim * rt_dtype_size(id->feature[f].dtype));
        if (id->feature[f].dtype == RT_E4M3)
            assert_memory_equal(a->feature_scale[f], b->feature_scale[f], n * 4);
    }
}

/* The set holds sequences 0 .. n-1, or those of one part after the other. */
static void check_set(const char *dir, const struct rt_row_identity *id, int n)
{
    struct rt_err err = {0};
    struct rt_shard_set *s = NULL;
    struct rt_rows rows;
    assert_ok(rt_shard_set_open(dir, &s, &err));
    assert_int_equal(rt_shard_set_info(s)->sequences, n);
    for (int j = 0; j < n; j++) {
        const int i = (j * 7 + 3) % n; /* not in order */
        struct made *m = make(id, i, length_of(i));
        assert_ok(rt_shard_set_get(s, i, &rows, &err));
        same_rows(&m->rows, &rows, id);
        free(m);
    }
    rt_shard_set_free(s);
}

static void same_dirs(const char *a, const char *b)
{
    struct rt_err err = {0};
    char **x, **y, p[4200];
    size_t n, m;
    assert_ok(rt_list_dir(a, &x, &n, &err));
    assert_ok(rt_list_dir(b, &y, &m, &err));
    assert_int_equal(n, m);
    for (size_t i = 0; i < n; i++) {
        struct rt_buf fa = {0}, fb = {0};
        assert_string_equal(x[i], y[i]);
        snprintf(p, sizeof p, "%s/%s", a, x[i]);
        assert_ok(rt_file_read_all(p, 1 << 26, &fa, &err));
        snprintf(p, sizeof p, "%s/%s", b, x[i]);
        assert_ok(rt_file_read_all(p, 1 << 26, &fb, &err));
        if (fa.len != fb.len || memcmp(fa.data, fb.data, fa.len) != 0)
            fail_msg("%s differs between %s and %s", x[i], a, b);
        rt_buf_free(&fa);
        rt_buf_free(&fb);
    }
    rt_names_free(x, n);
    rt_names_free(y, m);
}

static const struct rt_shard_options small = {.rows_per_shard = 60};

static void round_trip(void **state)
{
    (void)state;
    struct rt_err err = {0};
    for (int variant = 0; variant < 4; variant++) {
        struct rt_row_identity id = identity(variant == 3 ? 0 : 8);
        char name[32];
        snprintf(name, sizeof name, "sh-set%d", variant);
        const char *dir = test_tmp(name);
        if (variant >= 1)
            add_features(&id);
        id.completion_only = variant == 2;
        if (variant == 2)
            id.tokenizer_sha256[0] = '\0';
        assert_ok(write_set(dir, &id, &small, 40, -1, &err));
        check_set(dir, &id, 40);
    }
    /* what the index knows is what the rows say */
    struct rt_shard_set *s = NULL;
    struct rt_rows rows;
    bool end;
    double mass = 0, nll = 0;
    assert_ok(rt_shard_set_open(test_tmp("sh-set1"), &s, &err));
    const struct rt_shard_info *info = rt_shard_set_info(s);
    const struct rt_row_source source = rt_shard_set_source(s);
    assert_int_equal(source.count, 40);
    assert_true(info->finished && info->shards > 3 && info->n_parts == 1);
    int64_t n_rows = 0;
    for (int64_t i = 0; i < source.count; i++) {
        double one = 0;
        assert_ok(source.get(source.self, i, &rows, &end, &err));
        assert_false(end);
        for (int64_t r = 0; r < rows.n_rows; r++) {
            for (int j = 0; j < rows.k; j++)
                one += exp(rows.topk_logits[r * rows.k + j] / 2.0 - rows.lse[r * 3 + 2]);
            nll -= rows.next_logprob[r];
        }
        const struct rt_seq_info *q = rt_shard_set_seq(s, i);
        assert_int_equal(q->n_rows, rows.n_rows);
        if (rows.n_rows > 0) /* stored in float32 */
            assert_true(fabs(q->mass[2] - one / (double)rows.n_rows) < 1e-6);
        mass += one;
        n_rows += rows.n_rows;
    }
    assert_ok(source.get(source.self, 40, &rows, &end, &err));
    assert_true(end);
    assert_status(rt_shard_set_get(s, 40, &rows, &err), USAGE);
    assert_int_equal(n_rows, info->rows);
    assert_true(fabs(info->mass[2] - mass / (double)n_rows) < 1e-6 && info->mass_min[2] <= info->mass[2] && info->mass[0] > info->mass[2]);
    assert_true(fabs(info->nll - nll / (double)n_rows) < 1e-5);
    assert_ok(rt_shard_set_verify(s, NULL, &err));
    rt_shard_set_free(s);
}

/* 300 tokens of 128 KiB: three blocks; and the zeros compress a thousandfold, which a reader has to accept. */
static void long_sequence(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_row_identity id = identity(4);
    enum { DIM = 65536, TOKENS = 300 };
    id.n_features = 1;
    id.feature[0] = (struct rt_feature_spec){RT_LAYER_FINAL, DIM, RT_BF16, false};
    const struct rt_shard_options opt = {0};
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_shard_set *set = NULL;
    struct rt_rows rows;
    uint16_t *states = calloc((size_t)DIM * TOKENS, 2);
    for (int t = 0; t < TOKENS; t++)
        states[(int64_t)t * DIM + t] = (uint16_t)(0x3f80 + t % 100);
    struct made *m = make(&id, 1, TOKENS);
    m->rows.feature[0] = states;
    const char *dir = test_tmp("sh-long");
    assert_ok(rt_shard_sink_open(dir, &id, &opt, &s, &sink, &resume, &err));
    assert_ok(sink.put(sink.self, &m->rows, &err));
    assert_ok(sink.finish(sink.self, &err));
    assert_status(sink.put(sink.self, &m->rows, &err), REFUSED);
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(s);
    assert_ok(rt_shard_set_open(dir, &set, &err));
    assert_ok(rt_shard_set_get(set, 0, &rows, &err));
    same_rows(&m->rows, &rows, &id);
    rt_shard_set_free(set);
    free(m);
    free(states);
    id.feature[0].dim = 1 << 20; /* eight of these, a token: more than a block holds */
    for (int f = 1; f < RT_MAX_FEATURES; f++)
        id.feature[f] = id.feature[0];
    id.n_features = RT_MAX_FEATURES;
    m = make(&id, 1, 1);
    uint16_t *wide = calloc(1 << 20, 2);
    for (int f = 0; f < RT_MAX_FEATURES; f++) {
        m->rows.feature[f] = wide;
        m->rows.feature_scale[f] = NULL;
    }
    assert_ok(rt_shard_sink_open(test_tmp("sh-wide"), &id, &opt, &s, &sink, &resume, &err));
    assert_status(sink.put(sink.self, &m->rows, &err), USAGE);
    rt_shard_sink_free(s);
    free(wide);
    free(m);
}

/* A dense set: no top-k, whole final states, the head once. */
static void dense(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_row_identity id = identity(0);
    struct rt_tensors *t = NULL;
    struct rt_buf bytes = {0};
    char path[4200];
    id.n_features = 1;
    id.feature[0] = (struct rt_feature_spec){RT_LAYER_FINAL, 8, RT_BF16, false};
    const char *dir = test_tmp("sh-dense");
    static const float head[100 * 8] = {1, 2};
    assert_ok(write_set(dir, &id, &small, 10, -1, &err));
    assert_ok(rt_shard_put_head(dir, RT_F32, 100, 8, head, &err));
    check_set(dir, &id, 10);
    snprintf(path, sizeof path, "%s/rows-000000.msgpack", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, &bytes, &err));
    assert_non_null(memmem(bytes.data, 60, "dense", 5));
    rt_buf_free(&bytes);
    snprintf(path, sizeof path, "%s/head.safetensors", dir);
    assert_ok(rt_tensors_open(path, &t, &err));
    assert_non_null(rt_tensors_find(t, "lm_head.weight"));
    rt_tensors_free(t);
}

static void refused(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = identity(8);
    const char *dir = test_tmp("sh-refused");
    assert_ok(write_set(dir, &id, &small, 10, -1, &err));
    struct {
        struct rt_row_identity id;
        struct rt_shard_options opt;
        const char *a, *b;
    } other[8];
    for (int i = 0; i < 8; i++) {
        other[i].id = id;
        other[i].opt = small;
    }
    other[0].id.teacher_sha256[0] = 'c', other[0].a = "'aaaa", other[0].b = "'caaa";
    other[1].id.top_k = 9, other[1].a = "'8'", other[1].b = "'9'";
    other[2].id.lse_temperature[0] = 0.5, other[2].a = "0.6", other[2].b = "0.5,";
    strcpy(other[3].id.mode, "w8a8/f32/ref"), other[3].a = "w8a16/f32/ref", other[3].b = "w8a8/f32/ref";
    other[4].id.tokenizer_sha256[0] = '\0', other[4].a = "'bbb", other[4].b = "(none)";
    other[5].opt.rows_per_shard = 61, other[5].a = "rows_per_shard 60", other[5].b = "61";
    other[6].opt.n_parts = 2, other[6].a = "parts 1", other[6].b = "2";
    other[7].id.projection_seed = 1, other[7].a = "18446744073709551615", other[7].b = "'1'";
    for (int i = 0; i < 8; i++) {
        if (write_set(dir, &other[i].id, &other[i].opt, 10, -1, &err) != RT_REFUSED || strstr(err.msg, other[i].a) == NULL ||
            strstr(err.msg, other[i].b) == NULL)
            fail_msg("case %d: '%s', expected %s and %s in it", i, err.msg, other[i].a, other[i].b);
        rt_err_clear(&err);
    }
    struct rt_row_identity renamed = id;
    strcpy(renamed.teacher_name, "elsewhere"); /* for people only */
    assert_ok(write_set(dir, &renamed, &small, 10, -1, &err));
    /* one writer at a time */
    struct rt_shard_sink *a = NULL, *b = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    assert_ok(rt_shard_sink_open(dir, &id, &small, &a, &sink, &resume, &err));
    assert_true(resume.finished && resume.sequences == 10 && resume.source_line == 19);
    assert_status(rt_shard_sink_open(dir, &id, &small, &b, &sink, &resume, &err), REFUSED);
    rt_shard_sink_free(a);
    assert_status(rt_shard_set_open(test_tmp(""), NULL, &err), FORMAT);
}

/* Rows that break a rule do not get in. */
static void bad_rows(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_row_identity id = identity(8);
    add_features(&id);
    id.completion_only = true;
    for (int c = -1; c < 24; c++) {
        struct made *m = make(&id, 5, 20);
        struct rt_rows *r = &m->rows;
        switch (c) {
        case 0: m->ids[0] = MAX_IDS; rt_rows_key(m->ids, 20, r->key); break;
        case 1: r->key[3] ^= 1; break;
        case 2: m->mask[3] = 2; break;
        case 3: m->ends[4] += 100; break;
        case 4: r->text_len++; break;
        case 5: r->byte_end = NULL; break;
        case 6: m->pos[3] = m->pos[2]; break;
        case 7: m->pos[r->n_rows - 1] = 19; break;
        case 8: m->next[2]++; break;
        case 9: m->mask[m->pos[1] + 1] = 0; break;
        case 10: m->logits[8 + 3] = NAN; break;
        case 11: m->topk_ids[8 + 3] = MAX_IDS; break;
        case 12: m->logits[8 + 3] = m->logits[8 + 2] + 1; break;
        case 13: m->topk_ids[8 + 7] = m->topk_ids[8]; m->logits[8 + 7] -= 1; break;
        case 14: m->lse[4] = INFINITY; break;
        case 15: m->lse[4] -= 20; break;
        case 16: m->logprob[1] = NAN; break;
        case 17: m->logprob[1] = 0.5f; break;
        case 18: m->rank[1] = MAX_IDS; break;
        case 19: m->rank[1] = m->rank[1] == 0 ? 1 : 0; break;
        case 20: m->state[9] = 0x7f80; break;
        case 21: m->code[9] = 0xff; break;
        case 22: r->feature_scale[1] = NULL; break;
        case 23: r->k = 7; break;
        default: break;
        }
        const enum rt_status st = rt_rows_check(r, &id, "here", &err);
        if (st != (c < 0 ? RT_OK : RT_FORMAT))
            fail_msg("case %d: status %d, %s", c, st, err.msg);
        rt_err_clear(&err);
        free(m);
    }
}

/* One shard with a few short sequences, as bytes. */
static void small_shard(const char *name, struct rt_buf *bytes)
{
    struct rt_err err = {0};
    struct rt_row_identity id = identity(2);
    char path[4200];
    add_features(&id);
    const char *dir = test_tmp(name);
    assert_ok(write_set(dir, &id, &(struct rt_shard_options){.rows_per_shard = 1000}, 2, -1, &err));
    snprintf(path, sizeof path, "%s/rows-000000.msgpack", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, bytes, &err));
}

static enum rt_status read_whole(const char *path, struct rt_err *err)
{
    struct rt_shard_set *s = NULL;
    struct rt_rows rows;
    enum rt_status st = rt_shard_set_open(path, &s, err);
    for (int64_t i = 0; st == RT_OK && i < rt_shard_set_info(s)->sequences; i++)
        st = rt_shard_set_get(s, i, &rows, err);
    rt_shard_set_free(s);
    return st;
}

static void damage(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf bytes = {0};
    small_shard("sh-damage", &bytes);
    const char *path = test_tmp("sh-damaged.msgpack");
    const int fd = open(path, O_RDWR | O_CREAT, 0666);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, bytes.data, bytes.len, 0), bytes.len);
    for (size_t n = bytes.len; n-- > 0;) { /* downwards: growing a file from 0 makes some file systems write it out */
        assert_int_equal(ftruncate(fd, (off_t)n), 0);
        const enum rt_status st = read_whole(path, &err);
        if (st != RT_FORMAT)
            fail_msg("cut at %zu of %zu: status %d, '%s'", n, bytes.len, st, err.msg);
        rt_err_clear(&err);
    }
    assert_int_equal(pwrite(fd, bytes.data, bytes.len, 0), bytes.len);
    assert_ok(read_whole(path, &err));
    for (size_t bit = 0; bit < bytes.len * 8; bit++) {
        const char c = (char)(bytes.data[bit / 8] ^ 1 << bit % 8);
        assert_int_equal(pwrite(fd, &c, 1, (off_t)(bit / 8)), 1);
        if (read_whole(path, &err) == RT_OK)
            fail_msg("bit %zu of byte %zu flipped: not noticed", bit % 8, bit / 8);
        rt_err_clear(&err);
        assert_int_equal(pwrite(fd, &bytes.data[bit / 8], 1, (off_t)(bit / 8)), 1);
    }
    assert_int_equal(pwrite(fd, "x", 1, (off_t)bytes.len), 1);
    assert_status(read_whole(path, &err), FORMAT);
    close(fd);
    rt_buf_free(&bytes);
}

static uint64_t big_endian(const char *p, int n)
{
    uint64_t v = 0;
    for (int i = 0; i < n; i++)
        v = v << 8 | (uint8_t)p[i];
    return v;
}

/* Where the inner index of a shard lies, and its length. */
static size_t inner_of(const struct rt_buf *b, size_t *n)
{
    const size_t at = (size_t)big_endian(b->data + b->len - 8, 8);
    const char *p = b->data + at + 7;
    assert_memory_equal(b->data + at, "\x83\xa5index", 7);
    const int width = *p == (char)0xc4 ? 1 : *p == (char)0xc5 ? 2 : 4;
    *n = (size_t)big_endian(p + 1, width);
    return at + 7 + 1 + (size_t)width;
}

static void put_be32(char *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (char)(v >> (24 - 8 * i));
}

/* The file with its checksums made right again, as an attacker would: what is left are the checks of structure. */
static void forge(struct rt_buf *b, const struct rt_buf *original, size_t from, size_t to)
{
    size_t n;
    const size_t inner = inner_of(original, &n);
    const uint32_t old = (uint32_t)crc32(0, (const Bytef *)original->data + from, (uInt)(to - from));
    char be[4];
    put_be32(be, old);
    char *at = memmem(b->data + inner, n, be, 4);
    if (at != NULL)
        put_be32(at, (uint32_t)crc32(0, (const Bytef *)b->data + from, (uInt)(to - from)));
    char *crc = b->data + inner + n + 4; /* behind a3 "crc" */
    if (*crc == (char)0xce)
        put_be32(crc + 1, (uint32_t)crc32(0, (const Bytef *)b->data + inner, (uInt)n));
}

static void hostile(void **state)
{
    (void)state;
    struct rt_err err = {0};
    static const struct {
        const char *bytes;
        size_t n;
    } bombs[] = {
        {"", 0}, {"\xdd\xff\xff\xff\xff", 5}, {"\xdf\xff\xff\xff\xff", 5}, {"\xdb\xff\xff\xff\xff", 5}, {"\xc6\xff\xff\xff\xff", 5},
        {"\xc9\xff\xff\xff\xff\x01", 6}, {"\x86\xa6" "format\xdb\xff\xff\xff\xff", 13}, {"\x86\xa6" "format\xac" "retort-rows\0", 21},
    };
    const char *path = test_tmp("sh-hostile.msgpack");
    for (size_t i = 0; i < sizeof bombs / sizeof bombs[0]; i++) {
        assert_ok(rt_publish_bytes(path, bombs[i].bytes, bombs[i].n, &err));
        assert_status(read_whole(path, &err), FORMAT);
    }
    char *nested = malloc(1 << 20);
    memset(nested, 0x91, 1 << 20);
    assert_ok(rt_publish_bytes(path, nested, 1 << 20, &err));
    assert_status(read_whole(path, &err), FORMAT);
    free(nested);

    struct rt_buf bytes = {0}, copy = {0};
    size_t n;
    small_shard("sh-forged", &bytes);
    const size_t inner = inner_of(&bytes, &n), index_at = (size_t)big_endian(bytes.data + bytes.len - 8, 8);
    struct rt_shard_set *s = NULL;
    char shard[4200];
    snprintf(shard, sizeof shard, "%s/rows-000000.msgpack", test_tmp("sh-forged"));
    assert_ok(rt_shard_set_open(shard, &s, &err));
    const struct rt_seq_info second = *rt_shard_set_seq(s, 1);
    rt_shard_set_free(s);
    assert_int_equal(second.offset + second.bytes, index_at);
    const int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    assert_int_equal(ftruncate(fd, (off_t)bytes.len), 0);
    assert_ok(rt_buf_append(&copy, bytes.data, bytes.len, &err));
    int accepted = 0;
    for (int i = 0; i < 6000; i++) {
        memcpy(copy.data, bytes.data, bytes.len);
        const bool in_index = i % 2 == 0;
        const size_t lo = in_index ? inner : (size_t)second.offset, size = in_index ? n : (size_t)second.bytes;
        for (uint64_t e = 0; e <= rt_rng_u64(7, 1, (uint64_t)i) % 3; e++) {
            const uint64_t r = rt_rng_u64(7, 2 + e, (uint64_t)i);
            const uint64_t span = in_index || r % 4 == 0 ? size : 160; /* mostly the frame: the first columns */
            copy.data[lo + (r >> 8) % (span < size ? span : size)] = (char)(r % 8 < 4 ? r >> 40 : 0xff);
        }
        forge(&copy, &bytes, second.offset, index_at);
        assert_int_equal(pwrite(fd, copy.data, copy.len, 0), copy.len);
        const enum rt_status st = read_whole(path, &err);
        if (st != RT_OK && st != RT_FORMAT)
            fail_msg("mutation %d: status %d, '%s'", i, st, err.msg);
        accepted += st == RT_OK;
        rt_err_clear(&err);
    }
    assert_true(accepted > 0); /* line numbers, occurrences: the forging gets past the checksums */
    close(fd);
    rt_buf_free(&copy);
    rt_buf_free(&bytes);
}

/* A column says by itself that it is damaged: what reads a shard front to back has nothing else. */
static void column(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_codec c = {0};
    struct rt_buf b = {0};
    struct rt_pack p = {&b, RT_OK, &err};
    struct rt_unpack u;
    struct rt_column col;
    uint32_t data[100], got[100];
    for (uint32_t i = 0; i < 100; i++)
        data[i] = i % 10 == 0 ? 0xfffffff0u + i : data[i - 1] - 7 * i;
    for (size_t stride = 0; stride <= 100; stride += 10) {
        b.len = 0;
        assert_ok(rt_codec_pack(&c, 1, data, 100, 4, stride, &p, &err));
        rt_unpack_init(&u, b.data, b.len, "column", 0);
        assert_ok(rt_column_read(&u, &col, &err));
        assert_ok(rt_codec_unpack(&c, &col, got, "here", &err));
        assert_memory_equal(got, data, sizeof data);
    }
    for (size_t bit = 0; bit < col.size * 8; bit++) {
        ((uint8_t *)(uintptr_t)col.data)[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_int_equal(rt_codec_unpack(&c, &col, got, "here", &err), RT_FORMAT);
        assert_non_null(strstr(err.msg, "here: damaged: crc32"));
        rt_err_clear(&err);
        ((uint8_t *)(uintptr_t)col.data)[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    rt_codec_free(&c);
    rt_buf_free(&b);
}

/* Indexes with good checksums that say what the file cannot hold. */
static void false_index(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_shard_header h = {0, 1, 0, identity(8)};
    struct rt_buf b = {0};
    const char *path = test_tmp("sh-false.msgpack");
    assert_ok(rt_shard_header_pack(&h, &b, &err));
    const uint64_t header = b.len, body = 1000;
    const uint32_t crc = (uint32_t)crc32(0, (const Bytef *)b.data, (uInt)header);
    char zero[1000] = {0};
    assert_ok(rt_buf_append(&b, zero, body, &err));
    for (int c = -1; c < 8; c++) {
        struct rt_seq_info q[2] = {{.n_tokens = 5, .n_rows = 4, .offset = header, .bytes = 600},
                                   {.n_tokens = 5, .n_rows = 4, .offset = header + 600, .bytes = 400}};
        struct rt_shard_set *s = NULL;
        b.len = header + body;
        switch (c) {
        case 0: q[1].n_tokens = INT32_MAX; break; /* 2^31 tokens in 400 bytes */
        case 1: q[1].n_rows = 5; break;
        case 2: q[1].n_tokens = 0, q[1].n_rows = 0; break;
        case 3: q[1].offset++; break;
        case 4: q[1].bytes = 401; break;
        case 5: q[1].bytes = INT64_MAX; break;
        case 6: q[1].bytes = 399; break;
        case 7: q[0].bytes = 601; break;
        default: break;
        }
        assert_ok(rt_shard_index_pack(header + body, header, crc, q, 2, 3, &b, &err));
        assert_ok(rt_publish_bytes(path, b.data, b.len, &err));
        const enum rt_status st = rt_shard_set_open(path, &s, &err);
        if (st != (c < 0 ? RT_OK : RT_FORMAT))
            fail_msg("case %d: status %d, '%s'", c, st, err.msg);
        rt_err_clear(&err);
        if (st == RT_OK) {
            struct rt_rows rows;
            assert_status(rt_shard_set_get(s, 0, &rows, &err), FORMAT);
            rt_shard_set_free(s);
        }
    }
    rt_buf_free(&b);
}

static int child_status(pid_t child)
{
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static void killed(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_row_identity id = identity(8);
    add_features(&id);
    enum { N = 40 };
    const char *reference = test_tmp("sh-whole"), *dir = test_tmp("sh-killed");
    assert_ok(write_set(reference, &id, &small, N, -1, &err));
    int kills = 0;
    for (int i = 0; i < N; i += 3) { /* after a put: a resume that goes on and is killed again */
        const pid_t child = fork();
        if (child == 0) {
            const enum rt_status st = write_set(dir, &id, &small, N, i, NULL);
            _exit(st == RT_OK ? 0 : 1);
        }
        kills += WIFSIGNALED(child_status(child));
        assert_ok(read_whole(dir, &err));
    }
    assert_true(kills > 5);
    for (int i = 0; i < 25; i++) { /* at any time */
        const pid_t child = fork();
        if (child == 0) {
            const enum rt_status st = write_set(test_tmp("sh-killed2"), &id, &small, N, -1, NULL);
            _exit(st == RT_OK ? 0 : 1);
        }
        usleep((useconds_t)(rt_rng_u64(9, 0, (uint64_t)i) % 4000));
        kill(child, SIGKILL);
        child_status(child);
    }
    assert_ok(write_set(dir, &id, &small, N, -1, &err));
    same_dirs(reference, dir);
    assert_ok(write_set(test_tmp("sh-killed2"), &id, &small, N, -1, &err));
    same_dirs(reference, test_tmp("sh-killed2"));
    check_set(dir, &id, N);
}

/* Files may not grow past a limit: the error comes out, what is published stays, no temporary is left, and it goes on. */
static void full_disk(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = identity(8);
    const char *dir = test_tmp("sh-full");
    char **names;
    size_t n;
    for (rlim_t bytes = 256; bytes < 6000; bytes += 700) {
        const pid_t child = fork();
        if (child == 0) {
            const struct rlimit limit = {bytes, bytes};
            struct rt_err e = {0};
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &limit);
            _exit(write_set(dir, &id, &small, 40, -1, &e) == RT_IO && e.msg[0] != '\0' ? 0 : 1);
        }
        assert_int_equal(child_status(child), 0);
        assert_ok(rt_list_dir(dir, &names, &n, &err));
        for (size_t i = 0; i < n; i++)
            assert_null(strstr(names[i], ".tmp"));
        rt_names_free(names, n);
    }
    assert_ok(write_set(dir, &id, &small, 40, -1, &err));
    assert_ok(write_set(test_tmp("sh-roomy"), &id, &small, 40, -1, &err));
    same_dirs(dir, test_tmp("sh-roomy"));
}

static void manifest_damage(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = identity(8);
    const char *dir = test_tmp("sh-manifest");
    struct rt_buf bytes = {0};
    char path[4200];
    assert_ok(write_set(dir, &id, &small, 20, -1, &err));
    snprintf(path, sizeof path, "%s/manifest.jsonl", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, &bytes, &err));
    int64_t before = 20;
    for (size_t n = bytes.len + 1; n-- > 0;) { /* a torn last line does not exist */
        struct rt_shard_set *s = NULL;
        assert_int_equal(truncate(path, (off_t)n), 0);
        assert_ok(rt_shard_set_open(dir, &s, &err));
        const int64_t count = rt_shard_set_info(s)->sequences;
        assert_true(count <= before && (n < bytes.len || count == 20));
        assert_int_equal(rt_shard_set_info(s)->finished, n == bytes.len);
        before = count;
        rt_shard_set_free(s);
    }
    assert_int_equal(before, 0);
    const int fd = open(path, O_RDWR);
    assert_int_equal(pwrite(fd, bytes.data, bytes.len, 0), bytes.len);
    for (size_t bit = 0; bit + 8 < bytes.len * 8; bit++) { /* the newline at the end is the torn case */
        const char c = (char)(bytes.data[bit / 8] ^ 1 << bit % 8);
        assert_int_equal(pwrite(fd, &c, 1, (off_t)(bit / 8)), 1);
        struct rt_shard_set *s = NULL;
        if (rt_shard_set_open(dir, &s, &err) == RT_OK)
            fail_msg("manifest, bit %zu of byte %zu flipped: not noticed", bit % 8, bit / 8);
        rt_err_clear(&err);
        assert_int_equal(pwrite(fd, &bytes.data[bit / 8], 1, (off_t)(bit / 8)), 1);
    }
    close(fd);
    /* the writer goes on over a torn line, to the same bytes */
    assert_int_equal(truncate(path, (off_t)(bytes.len / 2)), 0);
    assert_ok(write_set(dir, &id, &small, 20, -1, &err));
    struct rt_buf again = {0};
    assert_ok(rt_file_read_all(path, 1 << 20, &again, &err));
    assert_int_equal(again.len, bytes.len);
    assert_memory_equal(again.data, bytes.data, bytes.len);
    /* a shard that was cut, is gone, or is another's */
    char shard[4200], other[4200];
    snprintf(shard, sizeof shard, "%s/rows-000000.msgpack", dir);
    struct rt_buf kept = {0};
    assert_ok(rt_file_read_all(shard, 1 << 20, &kept, &err));
    assert_int_equal(truncate(shard, (off_t)kept.len - 1), 0);
    assert_status(write_set(dir, &id, &small, 20, -1, &err), FORMAT);
    assert_ok(rt_publish_bytes(shard, kept.data, kept.len, &err));
    rt_buf_free(&kept);
    snprintf(other, sizeof other, "%s/rows-000001.msgpack", dir);
    assert_int_equal(rename(shard, path), 0); /* the manifest is overwritten: not JSON */
    struct rt_shard_set *s = NULL;
    assert_status(rt_shard_set_open(dir, &s, &err), FORMAT);
    assert_ok(rt_publish_bytes(path, bytes.data, bytes.len, &err));
    assert_status(rt_shard_set_open(dir, &s, &err), IO);
    assert_status(write_set(dir, &id, &small, 20, -1, &err), IO);
    assert_int_equal(rename(other, shard), 0);
    assert_status(rt_shard_set_open(dir, &s, &err), FORMAT);
    rt_buf_free(&again);
    rt_buf_free(&bytes);
}

/* Two machines, one share each; copied into one directory they are one set. */
static void parts(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = identity(8);
    const struct rt_shard_options half[2] = {{.rows_per_shard = 60, .part = 0, .n_parts = 2}, {.rows_per_shard = 60, .part = 1, .n_parts = 2}};
    char cmd[4200];
    const char *a = test_tmp("sh-part0"), *b = test_tmp("sh-part1");
    assert_ok(write_set(a, &id, &half[0], 12, -1, &err));
    assert_ok(write_set(b, &id, &half[1], 9, -1, &err));
    struct rt_shard_set *s = NULL;
    struct rt_rows rows;
    assert_ok(rt_shard_set_open(a, &s, &err));
    assert_true(!rt_shard_set_info(s)->finished && rt_shard_set_info(s)->parts_present == 1 && rt_shard_set_info(s)->n_parts == 2);
    rt_shard_set_free(s);
    snprintf(cmd, sizeof cmd, "cp %s/*.* %s/", b, a);
    assert_int_equal(system(cmd), 0);
    assert_ok(rt_shard_set_open(a, &s, &err));
    assert_true(rt_shard_set_info(s)->finished && rt_shard_set_info(s)->parts_present == 2);
    assert_int_equal(rt_shard_set_info(s)->sequences, 21);
    for (int i = 0; i < 21; i++) {
        struct made *m = make(&id, i < 12 ? i : i - 12, length_of(i < 12 ? i : i - 12));
        assert_ok(rt_shard_set_get(s, i, &rows, &err));
        same_rows(&m->rows, &rows, &id);
        free(m);
    }
    rt_shard_set_free(s);
    /* side by side in one directory: the lock is the part's */
    struct rt_shard_sink *x = NULL, *y = NULL, *z = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    assert_ok(rt_shard_sink_open(a, &id, &half[0], &x, &sink, &resume, &err));
    assert_ok(rt_shard_sink_open(a, &id, &half[1], &y, &sink, &resume, &err));
    assert_int_equal(resume.sequences, 9);
    assert_status(rt_shard_sink_open(a, &id, &half[1], &z, &sink, &resume, &err), REFUSED);
    rt_shard_sink_free(x);
    rt_shard_sink_free(y);
    snprintf(cmd, sizeof cmd, "cp %s/manifest-0000-of-0002.jsonl %s/manifest.jsonl", a, a);
    assert_int_equal(system(cmd), 0);
    assert_status(rt_shard_set_open(a, &s, &err), REFUSED);
    assert_status(rt_shard_sink_open(a, &id, &(struct rt_shard_options){.part = 2, .n_parts = 2}, &x, &sink, &resume, &err), USAGE);
}

/* What the readers in examples/ print. */
static void print_rows(FILE *f, int i, const struct rt_rows *r)
{
    for (int64_t j = 0; j < r->n_rows; j++) {
        fprintf(f, "{\"seq\":%d,\"pos\":%u,\"token\":%u,\"next\":%u,\"next_logprob\":%.9g,\"next_rank\":%u,\"ids\":[", i, r->position[j],
                r->ids[r->position[j]], r->next_id[j], r->next_logprob[j], r->next_rank[j]);
        for (int k = 0; k < r->k; k++)
            fprintf(f, "%s%u", k > 0 ? "," : "", r->topk_ids[j * r->k + k]);
        fprintf(f, "],\"logits\":[");
        for (int k = 0; k < r->k; k++)
            fprintf(f, "%s%.9g", k > 0 ? "," : "", r->topk_logits[j * r->k + k]);
        fprintf(f, "],\"lse\":{\"0.6\":%.9g,\"1\":%.9g,\"2\":%.9g}}\n", r->lse[3 * j], r->lse[3 * j + 1], r->lse[3 * j + 2]);
    }
}

static void readers(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_row_identity id = identity(8);
    char cmd[8192];
    add_features(&id);
    const char *dir = test_tmp("sh-readers"), *want = test_tmp("sh-want.jsonl"), *got = test_tmp("sh-got.jsonl"), *exe = test_tmp("sh-read_shards");
    assert_ok(write_set(dir, &id, &(struct rt_shard_options){.rows_per_shard = 1000}, 12, -1, &err));
    FILE *f = fopen(want, "w");
    for (int i = 0; i < 12; i++) {
        struct made *m = make(&id, i, length_of(i));
        print_rows(f, i, &m->rows);
        free(m);
    }
    fclose(f);
    snprintf(cmd, sizeof cmd, "cc -Wall -Wextra -Werror %s -lmsgpackc -lz -o %s && %s %s/rows-000000.msgpack > %s && cmp %s %s",
             test_data("examples/read_shards.c"), exe, exe, dir, got, want, got);
    assert_int_equal(system(cmd), 0);
    if (system("python3 -c 'import msgpack' 2>/dev/null") != 0)
        TEST_SKIP("python3 has no msgpack: examples/read_shards.py is not run");
    snprintf(cmd, sizeof cmd, "python3 %s %s/rows-000000.msgpack > %s && cmp %s %s", test_data("examples/read_shards.py"), dir, got, want, got);
    assert_int_equal(system(cmd), 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(round_trip), cmocka_unit_test(long_sequence),   cmocka_unit_test(dense), cmocka_unit_test(refused),
    cmocka_unit_test(bad_rows),   cmocka_unit_test(damage),          cmocka_unit_test(hostile), cmocka_unit_test(killed),
    cmocka_unit_test(full_disk),  cmocka_unit_test(manifest_damage), cmocka_unit_test(parts), cmocka_unit_test(readers),
    cmocka_unit_test(column),     cmocka_unit_test(false_index),
};
RT_SUITE(shards, tests)
