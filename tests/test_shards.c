/* Shards written, resumed and read: every row comes back, and a writer that was killed goes on to the same bytes. */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/io.h"
#include "core/pool.h"
#include "core/rng.h"
#include "formats/safetensors.h"
#include "tests/shard_fixture.h"

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
        struct sf_made *m = sf_make(id, i, sf_length_of(i));
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

static void round_trip(void **state)
{
    (void)state;
    struct rt_err err = {0};
    for (int variant = 0; variant < 4; variant++) {
        struct rt_row_identity id = sf_identity(variant == 3 ? 0 : 8);
        char name[32];
        snprintf(name, sizeof name, "sh-set%d", variant);
        const char *dir = test_tmp(name);
        if (variant >= 1)
            sf_add_features(&id);
        id.completion_only = variant == 2;
        if (variant == 2)
            id.tokenizer_sha256[0] = '\0';
        assert_ok(sf_write_set(dir, &id, &sf_small, 40, -1, &err));
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
    struct rt_row_identity id = sf_identity(4);
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
    struct sf_made *m = sf_make(&id, 1, TOKENS);
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
    m = sf_make(&id, 1, 1);
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

/* Sequences at once by any number of threads: the set of one put after the other; what is before a bad sequence is put, nothing behind it. */
static void together(void **state)
{
    (void)state;
    enum { N = 90, BAD = 70, DIM = 65536, TOKENS = 300 }; /* one of three blocks among them */
    static const int threads[] = {0, 1, 2, 5};
    struct rt_err err = {0};
    struct rt_row_identity id = sf_identity(8);
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct sf_made *made[N];
    struct rt_rows rows[N];
    char first[512];
    int64_t before = 0;
    uint16_t *states = calloc((size_t)DIM * TOKENS, 2);
    id.n_features = 1;
    id.feature[0] = (struct rt_feature_spec){RT_LAYER_FINAL, DIM, RT_BF16, false};
    for (int i = 0; i < N; i++) {
        made[i] = sf_make(&id, i, i == 40 ? TOKENS : sf_length_of(i));
        made[i]->rows.feature[0] = states + 13 * (int64_t)i;
        rows[i] = made[i]->rows;
    }
    for (int64_t i = 0; i < (int64_t)DIM * TOKENS; i += 97)
        states[i] = (uint16_t)(0x3f80 + i % 100);
    made[40]->rows.feature[0] = rows[40].feature[0] = states;
    snprintf(first, sizeof first, "%s", test_tmp("sh-together0"));
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) {
        struct rt_pool *pool = NULL;
        char name[32], dir[512];
        snprintf(name, sizeof name, "sh-together%d", threads[t]);
        snprintf(dir, sizeof dir, "%s", test_tmp(name));
        assert_ok(rt_shard_sink_open(dir, &id, &sf_small, &s, &sink, &resume, &err));
        for (int i = 0; i < N && threads[t] == 0; i++)
            assert_ok(sink.put(sink.self, &rows[i], &err));
        if (threads[t] > 0) {
            assert_ok(rt_pool_create(threads[t], &pool, &err));
            rt_shard_sink_threads(s, pool);
            assert_ok(sink.put_all(sink.self, rows, 3, &err)); /* the cuts do not lie where shards end */
            assert_ok(sink.put_all(sink.self, rows + 3, N - 3, &err));
        }
        assert_ok(sink.finish(sink.self, &err));
        rt_shard_sink_free(s);
        if (t > 0)
            same_dirs(first, dir);
        /* a bad one */
        snprintf(name, sizeof name, "sh-together-bad%d", threads[t]);
        snprintf(dir, sizeof dir, "%s", test_tmp(name));
        rows[BAD].lse = rows[BAD].topk_logits; /* too small */
        assert_ok(rt_shard_sink_open(dir, &id, &sf_small, &s, &sink, &resume, &err));
        rt_shard_sink_threads(s, pool);
        assert_int_equal(sink.put_all(sink.self, rows, N, &err), RT_FORMAT);
        assert_non_null(strstr(err.msg, "sequence 70 "));
        rt_err_clear(&err);
        rt_shard_sink_free(s);
        assert_ok(rt_shard_sink_open(dir, &id, &sf_small, &s, &sink, &resume, &err));
        before = t == 0 ? resume.sequences : before;
        assert_true(resume.sequences > BAD - 20 && resume.sequences <= BAD && resume.sequences == before); /* 60 rows are under 20 of these sequences */
        rt_shard_sink_free(s);
        rows[BAD] = made[BAD]->rows;
        rt_pool_free(pool);
    }
    for (int i = 0; i < N; i++)
        free(made[i]);
    free(states);
}

/* A dense set: no top-k, whole final states, the head once. */
static void dense(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_row_identity id = sf_identity(0);
    struct rt_tensors *t = NULL;
    struct rt_buf bytes = {0};
    char path[4200];
    id.n_features = 1;
    id.feature[0] = (struct rt_feature_spec){RT_LAYER_FINAL, 8, RT_BF16, false};
    const char *dir = test_tmp("sh-dense");
    static const float head[100 * 8] = {1, 2};
    const struct rt_tensor_decl decl = {"lm_head.weight", RT_F32, 2, {100, 8}};
    struct rt_tensor_writer *w = NULL;
    float kept[2];
    assert_ok(sf_write_set(dir, &id, &sf_small, 10, -1, &err));
    snprintf(path, sizeof path, "%s", test_tmp("sh-dense-head.safetensors"));
    assert_ok(rt_tensor_writer_file(path, &decl, 1, &w, &err));
    assert_ok(rt_tensor_writer_put(w, head, sizeof head, &err));
    assert_ok(rt_tensor_writer_finish(w, &err));
    rt_tensor_writer_free(w);
    assert_ok(rt_tensors_open(path, &t, &err));
    assert_ok(rt_shard_keep_head(dir, t, &err));
    rt_tensors_free(t);
    check_set(dir, &id, 10);
    snprintf(path, sizeof path, "%s/rows-000000.msgpack", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, &bytes, &err));
    assert_non_null(memmem(bytes.data, 60, "dense", 5));
    rt_buf_free(&bytes);
    snprintf(path, sizeof path, "%s/head.safetensors", dir);
    assert_ok(rt_tensors_open(path, &t, &err));
    assert_ok(rt_tensors_read_f32(t, rt_tensors_find(t, "lm_head.weight"), 0, 2, kept, &err));
    assert_memory_equal(kept, head, sizeof kept);
    rt_tensors_free(t);
}

static void refused(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = sf_identity(8);
    const char *dir = test_tmp("sh-refused");
    assert_ok(sf_write_set(dir, &id, &sf_small, 10, -1, &err));
    struct {
        struct rt_row_identity id;
        struct rt_shard_options opt;
        const char *a, *b;
    } other[8];
    for (int i = 0; i < 8; i++) {
        other[i].id = id;
        other[i].opt = sf_small;
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
        if (sf_write_set(dir, &other[i].id, &other[i].opt, 10, -1, &err) != RT_REFUSED || strstr(err.msg, other[i].a) == NULL ||
            strstr(err.msg, other[i].b) == NULL)
            fail_msg("case %d: '%s', expected %s and %s in it", i, err.msg, other[i].a, other[i].b);
        rt_err_clear(&err);
    }
    struct rt_row_identity renamed = id;
    strcpy(renamed.teacher_name, "elsewhere"); /* for people only */
    assert_ok(sf_write_set(dir, &renamed, &sf_small, 10, -1, &err));
    /* one writer at a time */
    struct rt_shard_sink *a = NULL, *b = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    assert_ok(rt_shard_sink_open(dir, &id, &sf_small, &a, &sink, &resume, &err));
    assert_true(resume.finished && resume.sequences == 10 && resume.source_line == 19);
    assert_status(rt_shard_sink_open(dir, &id, &sf_small, &b, &sink, &resume, &err), REFUSED);
    rt_shard_sink_free(a);
    assert_status(rt_shard_set_open(test_tmp(""), NULL, &err), FORMAT);
}

/* Rows that break a rule do not get in. */
static void bad_rows(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_row_identity id = sf_identity(8);
    sf_add_features(&id);
    id.completion_only = true;
    for (int c = -1; c < 24; c++) {
        struct sf_made *m = sf_make(&id, 5, 20);
        struct rt_rows *r = &m->rows;
        switch (c) {
        case 0: m->ids[0] = SF_MAX_IDS; rt_rows_key(m->ids, 20, r->key); break;
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
        case 11: m->topk_ids[8 + 3] = SF_MAX_IDS; break;
        case 12: m->logits[8 + 3] = m->logits[8 + 2] + 1; break;
        case 13: m->topk_ids[8 + 7] = m->topk_ids[8]; m->logits[8 + 7] -= 1; break;
        case 14: m->lse[4] = INFINITY; break;
        case 15: m->lse[4] -= 20; break;
        case 16: m->logprob[1] = NAN; break;
        case 17: m->logprob[1] = 0.5f; break;
        case 18: m->rank[1] = SF_MAX_IDS; break;
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
    struct rt_row_identity id = sf_identity(8);
    sf_add_features(&id);
    enum { N = 40 };
    const char *reference = test_tmp("sh-whole"), *dir = test_tmp("sh-killed");
    assert_ok(sf_write_set(reference, &id, &sf_small, N, -1, &err));
    int kills = 0;
    for (int i = 0; i < N; i += 3) { /* after a put: a resume that goes on and is killed again */
        const pid_t child = fork();
        if (child == 0) {
            const enum rt_status st = sf_write_set(dir, &id, &sf_small, N, i, NULL);
            _exit(st == RT_OK ? 0 : 1);
        }
        kills += WIFSIGNALED(child_status(child));
        assert_ok(sf_read_whole(dir, &err));
    }
    assert_true(kills > 5);
    for (int i = 0; i < 25; i++) { /* at any time */
        const pid_t child = fork();
        if (child == 0) {
            const enum rt_status st = sf_write_set(test_tmp("sh-killed2"), &id, &sf_small, N, -1, NULL);
            _exit(st == RT_OK ? 0 : 1);
        }
        usleep((useconds_t)(rt_rng_u64(9, 0, (uint64_t)i) % 4000));
        kill(child, SIGKILL);
        child_status(child);
    }
    assert_ok(sf_write_set(dir, &id, &sf_small, N, -1, &err));
    same_dirs(reference, dir);
    assert_ok(sf_write_set(test_tmp("sh-killed2"), &id, &sf_small, N, -1, &err));
    same_dirs(reference, test_tmp("sh-killed2"));
    check_set(dir, &id, N);
}

/* Files may not grow past a limit: the error comes out, what is published stays, no temporary is left, and it goes on. */
static void full_disk(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = sf_identity(8);
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
            _exit(sf_write_set(dir, &id, &sf_small, 40, -1, &e) == RT_IO && e.msg[0] != '\0' ? 0 : 1);
        }
        assert_int_equal(child_status(child), 0);
        assert_ok(rt_list_dir(dir, &names, &n, &err));
        for (size_t i = 0; i < n; i++)
            assert_null(strstr(names[i], ".tmp"));
        rt_names_free(names, n);
    }
    assert_ok(sf_write_set(dir, &id, &sf_small, 40, -1, &err));
    assert_ok(sf_write_set(test_tmp("sh-roomy"), &id, &sf_small, 40, -1, &err));
    same_dirs(dir, test_tmp("sh-roomy"));
}

/* Two machines, one share each; copied into one directory they are one set. */
static void parts(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = sf_identity(8);
    const struct rt_shard_options half[2] = {{.rows_per_shard = 60, .part = 0, .n_parts = 2}, {.rows_per_shard = 60, .part = 1, .n_parts = 2}};
    char cmd[4200];
    const char *a = test_tmp("sh-part0"), *b = test_tmp("sh-part1");
    assert_ok(sf_write_set(a, &id, &half[0], 12, -1, &err));
    assert_ok(sf_write_set(b, &id, &half[1], 9, -1, &err));
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
        struct sf_made *m = sf_make(&id, i < 12 ? i : i - 12, sf_length_of(i < 12 ? i : i - 12));
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
    snprintf(cmd, sizeof cmd, "rm %s/manifest.jsonl %s/rows-0001-of-0002-000000.msgpack", a, a);
    assert_int_equal(system(cmd), 0);
    assert_int_equal(rt_shard_set_open(a, &s, &err), RT_IO);
    assert_non_null(strstr(err.msg, "rows-0001-of-0002-000000.msgpack: not there, and the manifest names it: restore"));
    rt_err_clear(&err);
    assert_int_equal(rt_shard_sink_open(a, &id, &half[1], &x, &sink, &resume, &err), RT_IO);
    assert_non_null(strstr(err.msg, "not there, and the manifest names it: restore"));
    rt_err_clear(&err);
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
    struct rt_row_identity id = sf_identity(8);
    char cmd[8192];
    sf_add_features(&id);
    const char *dir = test_tmp("sh-readers"), *want = test_tmp("sh-want.jsonl"), *got = test_tmp("sh-got.jsonl"), *exe = test_tmp("sh-read_shards");
    assert_ok(sf_write_set(dir, &id, &(struct rt_shard_options){.rows_per_shard = 1000}, 12, -1, &err));
    FILE *f = fopen(want, "w");
    for (int i = 0; i < 12; i++) {
        struct sf_made *m = sf_make(&id, i, sf_length_of(i));
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
    cmocka_unit_test(round_trip), cmocka_unit_test(long_sequence), cmocka_unit_test(together), cmocka_unit_test(dense), cmocka_unit_test(refused), cmocka_unit_test(bad_rows),
    cmocka_unit_test(killed),     cmocka_unit_test(full_disk),     cmocka_unit_test(parts), cmocka_unit_test(readers),
};
RT_SUITE(shards, tests)
