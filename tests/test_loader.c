/* The loader: with threads and without, with room for all and for one sequence, for one rank and several: the same micro-batches. */
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/sha256.h"
#include "core/top_ids.h"
#include "tests/train_fixture.h"

enum { BATCHES = 13, MICRO = 40, BATCH = 70 };

struct world {
    struct tf f;
    struct tf_data *data;
    char shards[600], lines[600];
};

/* name: of its files, one for each test. */
static void open_world(struct world *w, const char *name)
{
    char file[64];
    tf_open(&w->f, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    w->data = malloc(sizeof *w->data);
    tf_data(w->data, w->f.c.vocab_size, 4);
    tf_score(w->data, &w->f);
    snprintf(file, sizeof file, "loader-%s", name);
    snprintf(w->shards, sizeof w->shards, "%s", tf_write_shards(file, w->data));
    snprintf(file, sizeof file, "loader-%s.jsonl", name);
    snprintf(w->lines, sizeof w->lines, "%s", tf_write_lines(file, w->data));
}

static void close_world(struct world *w)
{
    free(w->data);
    tf_close(&w->f);
}

static struct rt_train_set *open_set(struct world *w, const char *path, size_t cache)
{
    struct rt_err err = {0};
    struct rt_train_set *set = NULL;
    const struct rt_train_set_options o = {.model = &w->f.model, .vocab = w->f.c.vocab_size, .max_length = 64, .features = true, .cache_bytes = cache};
    assert_ok(rt_train_set_open(path, &o, NULL, &set, &err));
    return set;
}

static void hash_micro(struct rt_sha256 *h, const struct rt_micro *p)
{
    const size_t n = (size_t)p->n, rows = (size_t)p->rows, k = (size_t)p->o.k;
    const int64_t counts[5] = {p->n, p->n_seq, p->rows, p->kl_rows, p->feature_rows};
    rt_sha256_update(h, counts, sizeof counts);
    rt_sha256_update(h, p->ids, n * 4);
    rt_sha256_update(h, p->cu, ((size_t)p->n_seq + 1) * 4);
    rt_sha256_update(h, p->index, rows * 4);
    rt_sha256_update(h, p->label, rows * 4);
    rt_sha256_update(h, p->kl_mask, rows);
    rt_sha256_update(h, p->top_ids, rows * (size_t)rt_top_ids_words(p->o.k, p->id_bits) * 4);
    rt_sha256_update(h, p->top_logp, rows * k * 4);
    rt_sha256_update(h, p->feature_index, (size_t)p->feature_rows * 4);
    for (int i = 0; i < p->o.map->n; i++)
        rt_sha256_update(h, p->feature[i], (size_t)p->feature_rows * (size_t)p->o.map->pair[i].dim * 4);
    for (int64_t i = 0; i < p->n_seq; i++) {
        const struct rt_micro_seq *q = &p->seq[i];
        const int64_t of[6] = {q->item.set, q->item.seq, q->row0, q->rows, q->line, q->occurrence};
        rt_sha256_update(h, of, sizeof of);
    }
}

struct how {
    int threads, rank, size;
    size_t bytes, cache;
    int passes; /* over each batch */
};

/* Hash over all micro-batches of BATCHES batches, each pass the same; *targets, *tokens: sums. */
static void run(struct world *w, const struct how *how, char hex[65], int64_t *targets, int64_t *tokens)
{
    static const struct rt_feature_map map = {{{1, 1, TF_DIM}, {RT_LAYER_FINAL, RT_LAYER_FINAL, TF_DIM}}, 2};
    const double weight[2] = {1, 0.5};
    struct rt_err err = {0};
    struct rt_train_set *set[2] = {open_set(w, w->shards, how->cache), open_set(w, w->lines, 1 << 20)};
    const struct rt_micro_options mo = {.tokens = MICRO, .k = TF_K, .teacher_T = 2, .tail = RT_TAIL_BUCKET, .vocab = w->f.c.vocab_size, .map = &map};
    const struct rt_loader_options o = {.set = set, .weight = weight, .n_sets = 2, .seed = 9, .batch_tokens = BATCH, .micro = mo, .threads = how->threads,
                                        .bytes = how->bytes, .rank = how->rank, .size = how->size};
    struct rt_loader *l = NULL;
    struct rt_loader_batch b;
    struct rt_micro p;
    struct rt_sha256 h;
    uint8_t digest[32], pass_digest[32], first[32];
    int64_t skipped;
    rt_sha256_init(&h);
    assert_ok(rt_micro_create(&p, &mo, &err));
    assert_ok(rt_loader_open(&o, &l, &err));
    assert_ok(rt_loader_skip(l, 2, &skipped, &err));
    assert_int_equal(skipped, 2);
    *targets = *tokens = 0;
    for (int i = 0; i < BATCHES; i++) {
        assert_ok(rt_loader_next(l, &b, &err));
        assert_true(b.n > 0 && b.own <= b.n);
        *targets += b.targets;
        *tokens += b.tokens;
        for (int pass = 0; pass < how->passes; pass++) {
            struct rt_sha256 one;
            int64_t seen = 0, rows = 0;
            rt_sha256_init(&one);
            for (int64_t at = 0;;) {
                assert_ok(rt_loader_pack(l, &p, &at, &err));
                if (p.n == 0)
                    break;
                hash_micro(&one, &p);
                seen += p.n_seq;
                rows += p.rows;
            }
            assert_int_equal(seen, b.own);
            assert_int_equal(rows, b.targets);
            rt_sha256_final(&one, pass_digest);
            if (pass == 0)
                memcpy(first, pass_digest, sizeof first);
            assert_memory_equal(first, pass_digest, sizeof first);
        }
        rt_sha256_update(&h, first, sizeof first);
    }
    rt_sha256_final(&h, digest);
    rt_hex(hex, digest, sizeof digest);
    rt_loader_free(l);
    rt_micro_free(&p);
    rt_train_set_free(set[0]);
    rt_train_set_free(set[1]);
}

static void test_same_batches(void **state)
{
    (void)state;
    /* threads, rank, size, bytes, cache, passes: without threads, then with room for all, for some sequences, for none; cached and not */
    static const struct how hows[] = {
        {0, 0, 1, 0, 0, 1}, {0, 0, 1, 0, 1 << 20, 2}, {1, 0, 1, 1 << 20, 0, 1}, {4, 0, 1, 1 << 20, 0, 2}, {4, 0, 1, 6000, 0, 2},
        {3, 0, 1, 1, 0, 3}, {2, 0, 1, 6000, 5000, 1}, {4, 0, 1, 1 << 20, 1 << 20, 1},
    };
    struct world w;
    char want[65], got[65];
    int64_t targets, tokens, t, n;
    open_world(&w, "batches");
    run(&w, &hows[0], want, &targets, &tokens);
    assert_true(targets > 100);
    for (size_t i = 1; i < sizeof hows / sizeof hows[0]; i++) {
        run(&w, &hows[i], got, &t, &n);
        assert_string_equal(got, want);
        assert_true(t == targets && n == tokens);
    }
    close_world(&w);
}

/* The shares of three ranks are the batch, each sequence in one of them; no rank has more than its share and the longest sequence. */
static void test_shares(void **state)
{
    (void)state;
    struct world w;
    char hex[65], other[65];
    int64_t targets, tokens, sum = 0, t, n;
    open_world(&w, "shares");
    run(&w, &(struct how){0, 0, 1, 0, 0, 1}, hex, &targets, &tokens);
    for (int r = 0; r < 3; r++) {
        run(&w, &(struct how){2, r, 3, 1 << 20, 0, 1}, hex, &t, &n);
        run(&w, &(struct how){0, r, 3, 0, 0, 1}, other, &t, &n);
        assert_string_equal(hex, other);
        assert_int_equal(n, tokens); /* of the whole batch */
        sum += t;
    }
    assert_int_equal(sum, targets);
    close_world(&w);
}

static void test_share_of_lengths(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    struct rt_order o = {0};
    const double weight[1] = {1};
    struct rt_order_item item[TF_SEQS];
    int owner[TF_SEQS];
    int64_t load[3] = {0}, longest = 0, all = 0;
    open_world(&w, "lengths");
    struct rt_train_set *set = open_set(&w, w.lines, 0);
    assert_ok(rt_order_open(&o, &set, weight, 1, 1, 1, &err));
    for (int i = 0; i < TF_SEQS; i++)
        item[i] = (struct rt_order_item){0, i};
    assert_ok(rt_order_share(&o, item, TF_SEQS, 3, owner, &err));
    for (int i = 0; i < TF_SEQS; i++) {
        assert_true(owner[i] >= 0 && owner[i] < 3);
        load[owner[i]] += rt_train_set_length(set, i);
        all += rt_train_set_length(set, i);
        longest = rt_train_set_length(set, i) > longest ? rt_train_set_length(set, i) : longest;
    }
    for (int r = 0; r < 3; r++) /* the longest first: no two ranks differ by more than a sequence */
        assert_true(3 * load[r] <= all + 3 * longest && 3 * load[r] >= all - 3 * longest);
    rt_order_close(&o);
    rt_train_set_free(set);
    close_world(&w);
}

/* A shard that breaks off under way is an error of the batch that has the sequence, with threads as without. */
static void test_damage(void **state)
{
    (void)state;
    struct world w;
    int at[2] = {-1, -1};
    char file[640];
    open_world(&w, "damage");
    snprintf(file, sizeof file, "%s/rows-000000.msgpack", w.shards);
    for (int threads = 0; threads < 2; threads++) {
        struct rt_err err = {0};
        const double weight[1] = {1};
        struct rt_train_set *set = open_set(&w, w.shards, 0);
        const struct rt_micro_options mo = {.tokens = MICRO, .k = TF_K, .teacher_T = 2, .vocab = w.f.c.vocab_size};
        const struct rt_loader_options o = {.set = &set, .weight = weight, .n_sets = 1, .seed = 9, .batch_tokens = 30, .micro = mo, .threads = 3 * threads,
                                            .bytes = 1 << 20};
        struct rt_loader *l = NULL;
        struct rt_loader_batch b;
        struct rt_buf whole = {0};
        enum rt_status st = RT_OK;
        assert_ok(rt_file_read_all(file, 1 << 24, &whole, &err));
        const size_t hit = whole.len / 2;
        whole.data[hit] ^= 0x55;
        assert_ok(rt_loader_open(&o, &l, &err));
        FILE *f = fopen(file, "r+b");
        fseek(f, (long)hit, SEEK_SET);
        fwrite(&whole.data[hit], 1, 1, f);
        fclose(f);
        for (int i = 0; i < TF_SEQS && st == RT_OK; i++) {
            st = rt_loader_next(l, &b, &err);
            at[threads] = i;
        }
        assert_int_equal(st, RT_FORMAT);
        assert_non_null(strstr(err.msg, "rows-000000"));
        rt_loader_free(l);
        rt_train_set_free(set);
        whole.data[hit] ^= 0x55;
        f = fopen(file, "r+b");
        fseek(f, (long)hit, SEEK_SET);
        fwrite(&whole.data[hit], 1, 1, f);
        fclose(f);
        rt_buf_free(&whole);
    }
    assert_int_equal(at[0], at[1]);
    close_world(&w);
}

/* Steps of a trainer, with norms of the terms among them: the same parameters with threads as without. */
static void test_trainer(void **state)
{
    (void)state;
    struct world w;
    struct tf f[2];
    open_world(&w, "trainer");
    for (int i = 0; i < 2; i++) {
        struct rt_err err = {0};
        const double weight[1] = {1};
        struct rt_trainer_options o = tf_options();
        struct rt_trainer t;
        struct rt_step_result r;
        struct rt_train_set *set = open_set(&w, w.shards, 0);
        o.micro_tokens = MICRO;
        o.loader_threads = 3 * i;
        o.loader_bytes = 20000;
        tf_open(&f[i], &rt_backend_cpu, 1, TF_UNTIED, 0.3f);
        assert_ok(rt_trainer_open(&t, f[i].s, &set, weight, 1, &o, &err));
        for (int s = 0; s < 6; s++)
            assert_ok(rt_trainer_step(&t, 1e-2, s == 3, &r, &err));
        rt_trainer_close(&t);
        rt_train_set_free(set);
    }
    assert_true(tf_same_block(&f[0], &f[1]));
    tf_close(&f[0]);
    tf_close(&f[1]);
    close_world(&w);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_same_batches), cmocka_unit_test(test_shares), cmocka_unit_test(test_share_of_lengths), cmocka_unit_test(test_damage),
    cmocka_unit_test(test_trainer),
};
RT_SUITE(loader, tests)
