/* Sets of shards rewritten for another tokenizer: the same bytes whatever threads and interruptions, damage, refusals, the report. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "distill/retarget_run.h"
#include "distill/source.h"
#include "tests/ops.h"
#include "tests/retarget_fixture.h"

enum { SEQUENCES = 24, NFD = 5, K = 16 };

static const char *const completions[] = {"So x = 42</think>\n\nThe answer is 42", "first, 12 and 201</think>\n\n\\boxed{3}", "the\r\n  lazy fox \xf0\x9f\x98\x80 \xe5\xad\xa6\xe4\xb9\xa0",
                                          "def f(x):\n    return x</think>ok", ""};

/* rows_per_shard 0: the default. */
static void put_set(const char *dir, const struct rf_rows *r, int n, int64_t rows_per_shard)
{
    struct rt_err err = {0};
    struct rt_shard_sink *shards = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    assert_ok(rt_shard_sink_open(dir, &r[0].id, &(struct rt_shard_options){.rows_per_shard = rows_per_shard}, &shards, &sink, &resume, &err));
    for (int i = 0; i < n; i++)
        assert_ok(sink.put(sink.self, &r[i].rows, &err));
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(shards);
}

/* A set of SEQUENCES conversations in shards of few rows; sequence NFD is not in NFC. */
static void write_set(const char *dir, const struct rt_model_dir *teacher)
{
    struct rf_rows r[SEQUENCES];
    for (int i = 0; i < SEQUENCES; i++) {
        char prompt[64], completion[256];
        snprintf(prompt, sizeof prompt, "Question %d?", i / 2);
        snprintf(completion, sizeof completion, "%s%s", completions[i % 5], i == NFD ? " e\xcc\x81" : "");
        r[i] = rf_render(teacher, prompt, completion, K);
        r[i].rows.source_line = i + 1;
    }
    put_set(dir, r, SEQUENCES, 90);
    for (int i = 0; i < SEQUENCES; i++)
        rf_rows_free(&r[i]);
}

struct stopper {
    int left;
};
static bool stop_after(void *self)
{
    struct stopper *s = self;
    return s->left-- <= 0;
}

struct run_options {
    int threads, stop; /* stop: asked so often before it says yes; 0: never */
    enum rt_retarget_mode mode;
    int64_t memory;
};

static enum rt_status run(const char *shards, struct rt_model_dir *t, struct rt_model_dir *s, const char *out, struct run_options o,
                          struct rt_retarget_counts *counts, struct rt_err *err)
{
    enum rt_status st;
    struct rt_pool *pool = NULL;
    struct rt_retarget_run *r = NULL;
    struct stopper stopper = {o.stop};
    assert_int_equal(rt_pool_create(o.threads > 0 ? o.threads : 1, &pool, err), RT_OK);
    const struct rt_retarget_options ro = {.shards = shards, .out = out, .teacher = t, .student = s, .student_vocab = rt_tokenizer_n_ids(s->tok) + 5,
                                           .mode = o.mode, .rows_per_shard = 60, .memory = o.memory, .pool = pool, .stop = o.stop > 0 ? stop_after : NULL, .stop_self = &stopper};
    RT_TRY(rt_retarget_run_open(&ro, &r, err));
    rt_retarget_counts_clear(counts);
    RT_TRY(rt_retarget_run_all(r, counts, err));
out:
    rt_retarget_run_close(r);
    rt_pool_free(pool);
    return st;
}

static void same_files(const char *a, const char *b)
{
    struct rt_err err = {0};
    char **names, path[4096];
    size_t n, shards = 0;
    assert_ok(rt_list_dir(a, &names, &n, &err));
    for (size_t i = 0; i < n; i++) {
        struct rt_buf x = {0}, y = {0};
        if (names[i][0] != '.') {
            assert_ok(rt_path_join(path, sizeof path, a, names[i], &err));
            assert_ok(rt_file_read_all(path, 1 << 24, &x, &err));
            assert_ok(rt_path_join(path, sizeof path, b, names[i], &err));
            assert_ok(rt_file_read_all(path, 1 << 24, &y, &err));
            assert_int_equal(x.len, y.len);
            assert_memory_equal(x.data, y.data, x.len);
            shards += strncmp(names[i], "rows-", 5) == 0;
        }
        rt_buf_free(&x);
        rt_buf_free(&y);
    }
    assert_true(shards > 2);
    rt_names_free(names, n);
}

struct world {
    struct rt_model_dir t, s;
    char shards[256];
    struct rt_retarget_counts counts;
};

/* Without a set. */
static void open_models(struct world *w, const char *student)
{
    struct rt_err err = {0};
    *w = (struct world){.t = rf_model(test_data(DEEPSEEK)), .s = rf_model(test_data(student))};
    assert_ok(rt_retarget_counts_init(&w->counts, rt_tokenizer_n_ids(w->s.tok), &err));
}

static void open_world(struct world *w, const char *name, const char *student)
{
    open_models(w, student);
    snprintf(w->shards, sizeof w->shards, "%s", test_tmp(name));
    write_set(w->shards, &w->t);
}

static void close_world(struct world *w)
{
    rt_retarget_counts_free(&w->counts);
    rt_model_dir_close(&w->t);
    rt_model_dir_close(&w->s);
}

static void the_same_bytes_whatever_threads_and_stops(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    open_world(&w, "source-a", QWEN);
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("one"), (struct run_options){.threads = 1}, &w.counts, &err));
    assert_int_equal(w.counts.sequences, SEQUENCES);
    assert_int_equal(w.counts.kept, SEQUENCES - 1);
    assert_int_equal(w.counts.rejected[RT_REJECT_NFC], 1);
    const int64_t targets = w.counts.targets, rows = w.counts.rows[RT_PLACE_INSIDE];
    const double mass = w.counts.mass[RT_PLACE_HEAD];
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("three"), (struct run_options){.threads = 3}, &w.counts, &err));
    same_files(test_tmp("one"), test_tmp("three"));
    int stops = 0;
    for (enum rt_status st = RT_INTERRUPTED; st == RT_INTERRUPTED; stops++) {
        assert_true(stops < 20);
        rt_err_clear(&err);
        st = run(w.shards, &w.t, &w.s, test_tmp("stopped"), (struct run_options){.threads = 2, .stop = 2}, &w.counts, &err);
        assert_true(st == RT_OK || st == RT_INTERRUPTED);
    }
    assert_true(stops > 1);
    same_files(test_tmp("one"), test_tmp("stopped"));
    assert_int_equal(w.counts.sequences, SEQUENCES); /* and the report is that of the whole set */
    assert_int_equal(w.counts.targets, targets);
    assert_int_equal(w.counts.rows[RT_PLACE_INSIDE], rows);
    assert_true(w.counts.mass[RT_PLACE_HEAD] == mass);
    close_world(&w);
}

/* The set is an ordinary one: who made it, whole and readable, and training takes it with the student's tokenizer alone. */
static void an_ordinary_set(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    struct rt_shard_set *set;
    struct rt_retarget_counts sum;
    open_world(&w, "source-b", LLAMA);
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("ordinary"), (struct run_options){.mode = RT_RETARGET_STRICT}, &w.counts, &err));
    assert_ok(rt_shard_set_open(test_tmp("ordinary"), &set, &err));
    assert_ok(rt_shard_set_verify(set, NULL, &err));
    const struct rt_row_identity *id = rt_shard_set_identity(set);
    assert_string_equal(id->tokenizer_sha256, rt_tokenizer_sha256(w.s.tok));
    assert_string_equal(id->template_sha256, rt_template_sha256(w.s.tmpl));
    assert_string_equal(id->origin.mode, "strict");
    assert_string_equal(id->origin.tokenizer_sha256, rt_tokenizer_sha256(w.t.tok));
    assert_int_equal(id->origin.n_ids, rt_tokenizer_n_ids(w.t.tok));
    assert_int_equal(id->n_lse, 1);
    assert_true(rt_shard_set_info(set)->finished);
    assert_int_equal(rt_shard_set_info(set)->sequences, SEQUENCES - 1);
    assert_ok(rt_retarget_counts_init(&sum, rt_tokenizer_n_ids(w.s.tok), &err));
    assert_ok(rt_retarget_set_counts(set, &sum, &err));
    assert_int_equal(sum.sequences, SEQUENCES);
    assert_int_equal(sum.masked[RT_MASK_SPLIT], w.counts.masked[RT_MASK_SPLIT]);
    assert_int_equal(rt_shard_set_info(set)->rows, sum.rows[RT_PLACE_WHOLE]);
    rt_retarget_counts_free(&sum);
    rt_shard_set_free(set);

    struct rt_train_set *ts = NULL;
    struct rt_rows rows;
    const struct rt_train_set_options o = {.model = &w.s, .vocab = rt_tokenizer_n_ids(w.s.tok) + 5, .max_length = 1000},
                                      other = {.model = &w.t, .vocab = 10000, .max_length = 1000};
    assert_ok(rt_train_set_open(test_tmp("ordinary"), &o, NULL, &ts, &err));
    assert_ok(rt_train_set_get(ts, 3, &rows, &err));
    assert_int_equal(rt_train_set_lse(ts, 1), 0);
    assert_int_equal(rt_train_set_lse(ts, 2), -1);
    rt_train_set_free(ts);
    assert_status(rt_train_set_open(test_tmp("ordinary"), &other, NULL, &ts, &err), REFUSED);
    close_world(&w);
}

/* Equal completions of equal prompts are occurrences of one key. */
static void occurrences_are_counted(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_model_dir t = rf_model(test_data(DEEPSEEK)), s = rf_model(test_data(QWEN));
    struct rt_retarget_counts counts;
    struct rt_shard_set *set;
    struct rf_rows r = rf_render(&t, "Q", "So x", K);
    struct rf_rows three[] = {r, r, r}; /* r owns what they point to */
    for (uint32_t i = 0; i < 3; i++)
        three[i].rows.occurrence = i;
    put_set(test_tmp("twice"), three, 3, 1);
    assert_ok(rt_retarget_counts_init(&counts, rt_tokenizer_n_ids(s.tok), &err));
    assert_ok(run(test_tmp("twice"), &t, &s, test_tmp("twice-out"), (struct run_options){0}, &counts, &err));
    assert_ok(rt_shard_set_open(test_tmp("twice-out"), &set, &err));
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(rt_shard_set_seq(set, i)->occurrence, i);
        assert_int_equal(rt_shard_set_seq(set, i)->source_line, 7);
    }
    rt_shard_set_free(set);
    rt_retarget_counts_free(&counts);
    rf_rows_free(&r);
    rt_model_dir_close(&t);
    rt_model_dir_close(&s);
}

/* A damaged sequence is left out and counted; the others are what they are without it. */
static void damage_does_not_spread(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    struct rt_shard_set *set, *clean, *rest;
    struct rt_rows a, b;
    open_world(&w, "source-c", LLAMA);
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("clean"), (struct run_options){0}, &w.counts, &err));
    assert_ok(rt_shard_set_open(w.shards, &set, &err));
    const struct rt_seq_info q = *rt_shard_set_seq(set, 9);
    FILE *f = fopen(rt_shard_set_file(set, q.shard), "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, (long)(q.offset + q.bytes / 2), SEEK_SET), 0);
    const int was = fgetc(f);
    assert_int_equal(fseek(f, (long)(q.offset + q.bytes / 2), SEEK_SET), 0);
    fputc(was ^ 0x10, f);
    fclose(f);
    rt_shard_set_free(set);
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("damaged"), (struct run_options){.threads = 2}, &w.counts, &err));
    assert_int_equal(w.counts.rejected[RT_REJECT_DAMAGED], 1);
    assert_int_equal(w.counts.kept, SEQUENCES - 2);
    assert_ok(rt_shard_set_open(test_tmp("clean"), &clean, &err));
    assert_ok(rt_shard_set_open(test_tmp("damaged"), &rest, &err));
    for (int64_t i = 0, j = 0; i < SEQUENCES - 1; i++) {
        assert_ok(rt_shard_set_get(clean, i, &a, &err));
        if (a.source_line == 10)
            continue;
        assert_ok(rt_shard_set_get(rest, j++, &b, &err));
        assert_int_equal(a.source_line, b.source_line);
        assert_int_equal(a.n_rows, b.n_rows);
        assert_memory_equal(a.key, b.key, sizeof a.key);
        assert_memory_equal(a.topk_logits, b.topk_logits, (size_t)(a.n_rows * a.k) * 4);
    }
    rt_shard_set_free(clean);
    rt_shard_set_free(rest);
    close_world(&w);
}

static void one_tokenizer_keeps_the_set(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    struct rt_shard_set *a, *b;
    struct rt_rows x, y;
    open_world(&w, "source-d", DEEPSEEK);
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("kept"), (struct run_options){0}, &w.counts, &err));
    assert_int_equal(w.counts.kept, SEQUENCES); /* nothing is encoded: text in NFD stays */
    assert_ok(rt_shard_set_open(w.shards, &a, &err));
    assert_ok(rt_shard_set_open(test_tmp("kept"), &b, &err));
    for (int64_t i = 0; i < SEQUENCES; i++) {
        assert_ok(rt_shard_set_get(a, i, &x, &err));
        assert_ok(rt_shard_set_get(b, i, &y, &err));
        assert_int_equal(x.n_rows, y.n_rows);
        assert_memory_equal(x.ids, y.ids, (size_t)x.n_tokens * 4);
        assert_memory_equal(x.topk_ids, y.topk_ids, (size_t)(x.n_rows * x.k) * 4);
        assert_memory_equal(x.topk_logits, y.topk_logits, (size_t)(x.n_rows * x.k) * 4);
        assert_memory_equal(x.lse, y.lse, (size_t)x.n_rows * 8);
        assert_memory_equal(x.next_logprob, y.next_logprob, (size_t)x.n_rows * 4);
        assert_memory_equal(x.next_rank, y.next_rank, (size_t)x.n_rows * 4);
    }
    rt_shard_set_free(a);
    rt_shard_set_free(b);
    close_world(&w);
}

/* Text that is not there, or is not what the tokens' bytes spell, is left out and counted, with one tokenizer on both sides too. */
static void text_that_is_not_the_tokens(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    static const char *const students[] = {DEEPSEEK, QWEN};
    struct rf_rows r[3];
    open_models(&w, DEEPSEEK);
    for (int i = 0; i < 3; i++)
        r[i] = rf_render(&w.t, (const char *[]){"One?", "Two?", "Three?"}[i], "So x = 42", K);
    r[1].rows.text = NULL;
    r[1].rows.byte_end = NULL;
    r[1].rows.text_len = 0;
    ((char *)(uintptr_t)r[2].rows.text)[r[2].rows.text_len - 1] ^= 1;
    put_set(test_tmp("no-text"), r, 3, 0);
    for (int i = 0; i < 2; i++) {
        struct rt_model_dir s = rf_model(test_data(students[i]));
        assert_ok(run(test_tmp("no-text"), &w.t, &s, test_tmp(i == 0 ? "no-text-a" : "no-text-b"), (struct run_options){0}, &w.counts, &err));
        assert_int_equal(w.counts.kept, 1);
        assert_int_equal(w.counts.rejected[RT_REJECT_BYTES], 2);
        rt_model_dir_close(&s);
    }
    for (int i = 0; i < 3; i++)
        rf_rows_free(&r[i]);
    close_world(&w);
}

/* A set that names the teacher's tokenizer, and ids that it does not have. */
static void ids_beyond_the_tokenizer(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    open_models(&w, DEEPSEEK);
    struct rf_rows r = rf_render(&w.t, "One?", "So x = 42", K);
    r.id.n_ids = r.id.vocab_size = 1 << 20;
    const uint32_t far = (1 << 20) - 1;
    const int64_t last = r.rows.n_rows - 1, at = r.rows.position[last] + 1;
    ((uint32_t *)(uintptr_t)r.rows.ids)[at] = ((uint32_t *)(uintptr_t)r.rows.next_id)[last] = far;
    for (int j = 0; j < K; j++)
        if (j == (int)r.rows.next_rank[last])
            ((uint32_t *)(uintptr_t)r.rows.topk_ids)[last * K + j] = far;
    rt_rows_key(r.rows.ids, r.rows.n_tokens, r.rows.key);
    put_set(test_tmp("far"), &r, 1, 0);
    assert_status(run(test_tmp("far"), &w.t, &w.s, test_tmp("far-out"), (struct run_options){0}, &w.counts, &err), REFUSED);
    rf_rows_free(&r);
    close_world(&w);
}

static void what_is_refused(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    open_world(&w, "source-e", QWEN);
    assert_status(run(w.shards, &w.s, &w.t, test_tmp("no"), (struct run_options){0}, &w.counts, &err), REFUSED); /* another teacher */
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("done"), (struct run_options){0}, &w.counts, &err));
    assert_status(run(test_tmp("done"), &w.s, &w.t, test_tmp("no"), (struct run_options){0}, &w.counts, &err), REFUSED); /* twice */
    assert_status(run(w.shards, &w.t, &w.s, test_tmp("done"), (struct run_options){.mode = RT_RETARGET_STRICT}, &w.counts, &err), REFUSED); /* another mode there */
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("done"), (struct run_options){0}, &w.counts, &err)); /* done already */
    assert_int_equal(w.counts.sequences, SEQUENCES);
    close_world(&w);
}

/* A set of nothing that can be taken is an error that says why. */
static void nothing_to_take(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_model_dir t = rf_model(test_data(DEEPSEEK)), s = rf_model(test_data(QWEN));
    struct rt_retarget_counts counts;
    struct rf_rows r = rf_render(&t, "Q", "e\xcc\x81", K);
    put_set(test_tmp("nothing"), &r, 1, 0);
    assert_ok(rt_retarget_counts_init(&counts, rt_tokenizer_n_ids(s.tok), &err));
    const enum rt_status st = run(test_tmp("nothing"), &t, &s, test_tmp("nothing-out"), (struct run_options){0}, &counts, &err);
    assert_int_equal(st, RT_FORMAT);
    assert_non_null(strstr(err.msg, "1 not NFC"));
    rt_retarget_counts_free(&counts);
    rf_rows_free(&r);
    rt_model_dir_close(&t);
    rt_model_dir_close(&s);
}

/* Sequences without rows end a shard by the memory that they take, the same whatever threads and stops. */
static void sequences_without_rows(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_model_dir t = rf_model(test_data(DEEPSEEK)), s = rf_model(test_data(QWEN));
    struct rt_retarget_counts counts;
    struct rt_shard_sink *shards = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_shard_set *set;
    enum { N = 1300 }; /* of at least 2 KiB: more than two times the least that ends a shard, 1 MiB */
    struct rf_rows r = rf_render(&t, "Q", "So x = 42", K);
    r.rows.n_rows = 0;
    assert_ok(rt_shard_sink_open(test_tmp("bare"), &r.id, &(struct rt_shard_options){0}, &shards, &sink, &resume, &err));
    for (uint32_t i = 0; i < N; i++) {
        r.rows.occurrence = i;
        assert_ok(sink.put(sink.self, &r.rows, &err));
    }
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(shards);
    assert_ok(rt_retarget_counts_init(&counts, rt_tokenizer_n_ids(s.tok), &err));
    assert_ok(run(test_tmp("bare"), &t, &s, test_tmp("bare-one"), (struct run_options){0}, &counts, &err));
    assert_int_equal(counts.kept, N);
    assert_int_equal(counts.masked[RT_MASK_UNSTORED] + counts.masked[RT_MASK_BLANK] + counts.masked[RT_MASK_FORCED], counts.targets);
    assert_ok(rt_shard_set_open(test_tmp("bare-one"), &set, &err));
    assert_int_equal(rt_shard_set_info(set)->rows, 0);
    assert_true(rt_shard_set_info(set)->shards >= 3);
    int64_t in_shard = 0;
    for (int64_t i = 0; i < N; i++) {
        const bool first = i == 0 || rt_shard_set_seq(set, i)->shard != rt_shard_set_seq(set, i - 1)->shard;
        in_shard = first ? 1 : in_shard + 1;
        assert_true(in_shard <= (1 << 20) / 2048 + 1);
    }
    rt_shard_set_free(set);
    assert_ok(run(test_tmp("bare"), &t, &s, test_tmp("bare-three"), (struct run_options){.threads = 3}, &counts, &err));
    same_files(test_tmp("bare-one"), test_tmp("bare-three"));
    assert_int_equal(run(test_tmp("bare"), &t, &s, test_tmp("bare-stop"), (struct run_options){.stop = 2}, &counts, &err), RT_INTERRUPTED);
    rt_err_clear(&err);
    assert_ok(run(test_tmp("bare"), &t, &s, test_tmp("bare-stop"), (struct run_options){0}, &counts, &err));
    same_files(test_tmp("bare-one"), test_tmp("bare-stop"));
    rt_retarget_counts_free(&counts);
    rf_rows_free(&r);
    rt_model_dir_close(&t);
    rt_model_dir_close(&s);
}

/* Too little memory is refused with the numbers; with little the window is small, and the set the same. */
static void memory_bounds(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct world w;
    struct rt_shard_set *set;
    struct rt_retarget_plan p, q;
    open_world(&w, "source-f", QWEN);
    assert_int_equal(run(w.shards, &w.t, &w.s, test_tmp("poor"), (struct run_options){.memory = 2 << 20}, &w.counts, &err), RT_NOMEM);
    assert_non_null(strstr(err.msg, "--memory 2.10 MB: at least "));
    assert_non_null(strstr(err.msg, "for a shard of 60 rows"));
    assert_false(rt_path_exists(test_tmp("poor")));
    rt_err_clear(&err);
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("rich"), (struct run_options){0}, &w.counts, &err));
    assert_ok(rt_shard_set_open(w.shards, &set, &err));
    struct rt_row_identity id = *rt_shard_set_identity(set);
    assert_ok(rt_retarget_plan(set, &id, test_tmp("none"), 60, (int64_t)1 << 40, 1, &p, &err));
    assert_int_equal(p.window_bytes, 32 << 20);
    const int64_t tight = p.needed - 4 * (p.window_bytes - (2 << 20)); /* a window of 2 MiB, and what the process grows by meanwhile */
    assert_ok(rt_retarget_plan(set, &id, test_tmp("none"), 60, tight, 1, &q, &err));
    assert_true(q.needed <= tight && q.window_bytes <= 2 << 20 && q.window_bytes >= 1 << 20);
    assert_ok(run(w.shards, &w.t, &w.s, test_tmp("tight"), (struct run_options){.memory = tight + (4 << 20)}, &w.counts, &err));
    same_files(test_tmp("rich"), test_tmp("tight"));
    /* wide rows: a shard of a quarter of the memory; a set that was begun keeps its layout; and what would do is said */
    id.top_k = 8192;
    const int64_t a_row = 8 * 8192;
    assert_ok(rt_retarget_plan(set, &id, test_tmp("none"), 0, (int64_t)1 << 40, 1, &p, &err));
    assert_true(p.rows_per_shard * a_row > 255 << 20 && p.rows_per_shard * a_row < 256 << 20);
    assert_ok(rt_retarget_plan(set, &id, test_tmp("none"), 0, (int64_t)800 << 20, 1, &q, &err));
    assert_true(q.rows_per_shard * a_row > 199 << 20 && q.rows_per_shard * a_row < 200 << 20);
    assert_ok(rt_retarget_plan(set, &id, test_tmp("rich"), 0, (int64_t)800 << 20, 1, &q, &err));
    assert_int_equal(q.rows_per_shard, 60);
    assert_int_equal(rt_retarget_plan(set, &id, test_tmp("none"), 20000, (int64_t)1 << 30, 1, &q, &err), RT_NOMEM);
    const char *hint = strstr(err.msg, "--rows-per-shard ");
    assert_non_null(hint);
    const int64_t rows = atol(hint + strlen("--rows-per-shard "));
    assert_true(rows > 1024 && rows < 20000);
    rt_err_clear(&err);
    assert_ok(rt_retarget_plan(set, &id, test_tmp("none"), rows - 100, (int64_t)1 << 30, 1, &q, &err)); /* fewer: the process may have grown since */
    rt_shard_set_free(set);
    close_world(&w);
}

static void the_report_in_json_and_words(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_model_dir s = rf_model(test_data(QWEN));
    struct rt_retarget_counts a, b;
    struct rt_json *v;
    struct rt_buf text = {0};
    assert_ok(rt_retarget_counts_init(&a, rt_tokenizer_n_ids(s.tok), &err));
    assert_ok(rt_retarget_counts_init(&b, rt_tokenizer_n_ids(s.tok), &err));
    a.sequences = 10;
    a.kept = 8;
    a.rejected[RT_REJECT_NFC] = 2;
    a.targets = 100;
    a.kind[RT_PLACE_WHOLE] = a.rows[RT_PLACE_WHOLE] = 60;
    a.mass[RT_PLACE_WHOLE] = 59.25;
    a.residual[RT_PLACE_WHOLE] = 0.75;
    a.masked[RT_MASK_CROSSING] = 40;
    for (uint32_t i = 0; i < 40; i++)
        a.crossing[i + 100] = i % 7 + 1;
    assert_ok(rt_json_new_object(&v, &err));
    assert_ok(rt_retarget_report_json(&a, s.tok, v, &err));
    const struct rt_json *top = rt_json_get(v, "crossing_tokens");
    assert_int_equal(rt_json_len(top), RT_TOP_CROSSING);
    int64_t last = 7, id;
    for (size_t i = 0; i < RT_TOP_CROSSING; i++) { /* by count, then id */
        int64_t n;
        assert_ok(rt_json_int(rt_json_at(top, i), "count", 1, 7, &n, &err));
        assert_ok(rt_json_int(rt_json_at(top, i), "id", 100, 140, &id, &err));
        assert_true(n <= last);
        last = n;
    }
    assert_ok(rt_retarget_report_read(v, &b, &err));
    assert_int_equal(b.rejected[RT_REJECT_NFC], 2);
    assert_int_equal(b.kind[RT_PLACE_WHOLE], 60);
    assert_true(b.mass[RT_PLACE_WHOLE] == 59.25 && b.residual[RT_PLACE_WHOLE] == 0.75);
    assert_int_equal(b.masked[RT_MASK_CROSSING], 40);
    assert_ok(rt_retarget_report_print(&a, s.tok, &text, &err));
    assert_non_null(strstr(text.data, "8 of 10"));
    assert_non_null(strstr(text.data, "0.98750"));
    rt_json_free(v);
    assert_ok(rt_json_parse("{\"sequences\":-1}", 16, "damaged", &v, &err));
    assert_status(rt_retarget_report_read(v, &b, &err), FORMAT);
    rt_json_free(v);
    rt_buf_free(&text);
    rt_retarget_counts_free(&a);
    rt_retarget_counts_free(&b);
    rt_model_dir_close(&s);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(the_same_bytes_whatever_threads_and_stops),
    cmocka_unit_test(an_ordinary_set),
    cmocka_unit_test(occurrences_are_counted),
    cmocka_unit_test(damage_does_not_spread),
    cmocka_unit_test(one_tokenizer_keeps_the_set),
    cmocka_unit_test(text_that_is_not_the_tokens),
    cmocka_unit_test(ids_beyond_the_tokenizer),
    cmocka_unit_test(what_is_refused),
    cmocka_unit_test(nothing_to_take),
    cmocka_unit_test(sequences_without_rows),
    cmocka_unit_test(memory_bounds),
    cmocka_unit_test(the_report_in_json_and_words),
};
RT_SUITE(retarget_run, tests)
