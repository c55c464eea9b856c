/* Memory runs out at each allocation in turn: parsers, files, scheduler. The engines are in test_faults_engines.c.
 *
 * For each piece of work: the n-th allocation fails, once or for good, for n = 1, 2, ... Then the answer is NOMEM with a message
 * (or, where a way round exists, the very same result), the next try works, and under the sanitizers nothing has leaked.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/batch.h"
#include "core/io.h"
#include "core/options.h"
#include "distill/source.h"
#include "formats/checkpoint.h"
#include "formats/dataset.h"
#include "formats/rundir.h"
#include "tests/faults.h"

#define TOKENIZERS "tests/data/tokenizers/"

void fault_digest(uint64_t *d, const void *data, size_t n)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++)
        *d = (*d ^ p[i]) * 0x100000001b3u; /* FNV-1a */
}

static int64_t count(fault_work work, void *ctx, uint64_t *digest)
{
    struct rt_err err = {0};
    *digest = 0;
    fault_arm(0, false);
    const enum rt_status st = work(ctx, digest, &err);
    const int64_t n = fault_disarm();
    if (st != RT_OK)
        fail_msg("without a fault: status %d (%s)", (int)st, err.msg);
    return n;
}

static void one_fault(fault_work work, void *ctx, int64_t at, bool sticky, uint64_t want)
{
    struct rt_err err = {0};
    uint64_t got = 0;
    fault_arm(at, sticky);
    const enum rt_status st = work(ctx, &got, &err);
    fault_disarm();
    if (st == RT_OK ? got != want || (sticky && fault_fired()) : st != RT_NOMEM || err.msg[0] == '\0')
        fail_msg("allocation %ld %s: status %d, '%s', result %s", (long)at, sticky ? "and all later ones" : "alone", (int)st, err.msg,
                 got == want ? "as without" : "another one");
}

void fault_each(fault_work work, void *ctx, int64_t most)
{
    uint64_t want, got;
    const int64_t n = count(work, ctx, &want);
    if (n == 0)
        fail_msg("no allocation passes the wrapper: is the binary linked with --wrap?");
    const int64_t step = (n + most - 1) / most;
    for (int64_t at = 1; at <= n; at += step) {
        one_fault(work, ctx, at, false, want);
        one_fault(work, ctx, at + (step > 1 ? step / 2 : 0), true, want);
        if (at % (8 * step) == 1) {
            count(work, ctx, &got);
            assert_int_equal(got, want);
        }
    }
    count(work, ctx, &got);
    assert_int_equal(got, want);
}

/* What a file holds does not reach a terminal as commands to it. */
static void messages(void **state)
{
    (void)state;
    struct rt_err err = {0};
    rt_fail(&err, RT_FORMAT, "key '%s'\n\tand '%s'", "\x1b[31m", "a\x7f b\r");
    assert_string_equal(err.msg, "key '?[31m'\n\tand 'a? b?'");
    rt_err_context(&err, "%s", "f\x1b");
    assert_string_equal(err.msg, "f?: key '?[31m'\n\tand 'a? b?'");
    rt_err_clear(&err);
}

/* ---- text ---- */
static enum rt_status tokenizer_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    static const char text[] = "The <|im_start|>quick 12345 br\xc3\xb6wn e\xcc\x81 fox\n\n\tint main(void) { return 0; } \xe4\xb8\xad\xe6\x96\x87";
    struct rt_tokenizer *tok = NULL;
    struct rt_encoding e = {0};
    struct rt_buf back = {0};
    enum rt_status st;
    RT_TRY(rt_tokenizer_load(ctx, &tok, err));
    RT_TRY(rt_tokenizer_encode(tok, text, sizeof text - 1, &e, err));
    RT_TRY(rt_tokenizer_decode(tok, e.ids, e.n, false, &back, err));
    fault_digest(digest, e.ids, e.n * sizeof *e.ids);
    fault_digest(digest, back.data, back.len);
out:
    rt_buf_free(&back);
    rt_encoding_free(&e);
    rt_tokenizer_free(tok);
    return st;
}

static void tokenizer(void **state)
{
    (void)state;
    fault_each(tokenizer_work, (void *)(uintptr_t)TOKENIZERS "deepseek", 150);
    fault_each(tokenizer_work, (void *)(uintptr_t)TOKENIZERS "qwen", 60); /* NFC */
    fault_each(tokenizer_work, (void *)(uintptr_t)TOKENIZERS "llama3", 60);
}

/* A tokenizer and its template, loaded where nothing fails. */
struct text_side {
    struct rt_tokenizer *tok;
    struct rt_template *tmpl;
    const char *path;
};

static void text_open(struct text_side *t, const char *dir)
{
    struct rt_err err = {0};
    *t = (struct text_side){.path = dir};
    assert_ok(rt_tokenizer_load(test_data(dir), &t->tok, &err));
    assert_ok(rt_template_load(test_data(dir), NULL, t->tok, &t->tmpl, &err));
}

static void text_close(struct text_side *t)
{
    rt_template_free(t->tmpl);
    rt_tokenizer_free(t->tok);
}

static enum rt_status template_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    struct text_side *t = ctx;
    static const struct rt_message m[] = {
        {"system", "be short", NULL, 8, 0, -1}, {"user", "17+5?", NULL, 5, 0, -1}, {"assistant", "22", "17+5=22", 2, 7, -1}};
    struct rt_template *tmpl = NULL;
    struct rt_rendered r = {0};
    enum rt_status st;
    RT_TRY(rt_template_load(t->path, NULL, t->tok, &tmpl, err));
    RT_TRY(rt_template_render(tmpl, m, 3, "case", &r, err));
    fault_digest(digest, r.enc.ids, r.enc.n * sizeof *r.enc.ids);
    fault_digest(digest, r.loss_mask, r.enc.n);
    RT_TRY(rt_template_completion(tmpl, m, 2, "<think>\nx</think>22", 19, "case", &r, err));
    fault_digest(digest, r.enc.ids, r.enc.n * sizeof *r.enc.ids);
out:
    rt_rendered_free(&r);
    rt_template_free(tmpl);
    return st;
}

static void templates(void **state)
{
    (void)state;
    static const char *const kinds[] = {TOKENIZERS "deepseek", TOKENIZERS "qwen", TOKENIZERS "llama3"};
    for (size_t i = 0; i < 3; i++) {
        struct text_side t;
        text_open(&t, kinds[i]);
        fault_each(template_work, &t, 60);
        text_close(&t);
    }
}

static enum rt_status dataset_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    struct text_side *t = ctx;
    const struct rt_dataset_options o = {.tok = t->tok, .tmpl = t->tmpl, .max_length = 40, .overlong = RT_OVERLONG_SPLIT};
    struct rt_dataset *d = NULL;
    struct rt_sample s;
    struct rt_prompt p;
    bool end = false;
    enum rt_status st;
    RT_TRY(rt_dataset_open(t->path, &o, &d, err));
    for (;;) {
        RT_TRY(rt_dataset_next(d, &s, &end, err));
        if (end)
            break;
        fault_digest(digest, s.ids, (size_t)s.n * sizeof *s.ids);
        fault_digest(digest, s.loss_mask, (size_t)s.n);
    }
    RT_TRY(rt_dataset_rewind(d, err));
    for (end = false;;) {
        RT_TRY(rt_dataset_next_prompt(d, &p, &end, err));
        if (end)
            break;
        fault_digest(digest, p.ids, (size_t)p.n * sizeof *p.ids);
    }
out:
    rt_dataset_close(d);
    return st;
}

static const char lines[] =
    "{\"prompt\": \"1+1?\", \"completion\": \"2\", \"answer\": 2}\n"
    "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"ho\", \"reasoning_content\": \"h\"}]}\n"
    "{\"text\": \"some text that is a good deal longer than forty tokens of this small vocabulary will hold, so it is cut\"}\n"
    "{\"input_ids\": [1, 2, 3, 4], \"loss_mask\": [0, 0, 1, 1], \"other\": {\"a\": [1, 2.5, null]}}\n";

static void dataset(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct text_side t;
    text_open(&t, TOKENIZERS "qwen");
    t.path = test_tmp("fault.jsonl");
    assert_ok(rt_publish_bytes(t.path, lines, sizeof lines - 1, &err));
    fault_each(dataset_work, &t, 150);
    text_close(&t);
}

static enum rt_status train_set_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    struct text_side *t = ctx;
    const struct rt_model_dir model = {.tok = t->tok, .tmpl = t->tmpl};
    const struct rt_train_set_options o = {.model = &model, .vocab = rt_tokenizer_n_ids(t->tok), .max_length = 200, .cache_bytes = 1 << 20};
    struct rt_train_set *set = NULL;
    struct rt_rows rows;
    enum rt_status st;
    RT_TRY(rt_train_set_open(t->path, &o, NULL, &set, err));
    fault_digest(digest, rt_train_set_info(set)->sha256, 64);
    for (int64_t i = 0; i < rt_train_set_info(set)->sequences; i++) {
        RT_TRY(rt_train_set_get(set, i, &rows, err));
        fault_digest(digest, rows.ids, (size_t)rows.n_tokens * sizeof *rows.ids);
    }
out:
    rt_train_set_free(set);
    return st;
}

static void train_set(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct text_side t;
    text_open(&t, TOKENIZERS "qwen");
    t.path = test_tmp("fault-set.jsonl");
    assert_ok(rt_publish_bytes(t.path, lines, sizeof lines - 1, &err));
    fault_each(train_set_work, &t, 100);
    text_close(&t);
}

static enum rt_status json_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    static const char text[] = "{\"a\": [1, 2.5, \"x\\u00e9\", {\"b\": null, \"c\": 123456789012345678901234567890}], \"d\": true, \"e\": {}}";
    struct rt_json *v = NULL, *w = NULL, *child;
    struct rt_buf out = {0};
    enum rt_status st;
    (void)ctx;
    RT_TRY(rt_json_parse(text, sizeof text - 1, "case", &v, err));
    RT_TRY(rt_json_new_object(&w, err));
    RT_TRY(rt_json_set_copy(w, "copy", v, err));
    RT_TRY(rt_json_set_array(w, "list", &child, err));
    for (int i = 0; i < 40; i++)
        RT_TRY(rt_json_set_int(child, NULL, i, err));
    RT_TRY(rt_json_set_string(w, "copy", "replaced", err));
    RT_TRY(rt_json_dump(w, 2, &out, err));
    fault_digest(digest, out.data, out.len);
out:
    rt_buf_free(&out);
    rt_json_free(w);
    rt_json_free(v);
    return st;
}

static void json(void **state)
{
    (void)state;
    fault_each(json_work, NULL, 1000);
}

/* ---- files ---- */
static enum rt_status safetensors_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    struct rt_tensors *t = NULL;
    struct rt_tensor_writer *w = NULL;
    float row[16];
    const struct rt_tensor_decl decl[] = {{"a.weight", RT_F32, 2, {8, 2}}, {"b.weight", RT_F32, 1, {16}}};
    enum rt_status st;
    RT_TRY(rt_tensors_open("tests/data/cases/v2_bf16", &t, err));
    for (int64_t i = 0; i < rt_tensors_count(t); i += 9) {
        const struct rt_tensor *k = rt_tensors_at(t, i);
        RT_TRY(rt_tensors_read_f32(t, k, 0, rt_tensor_elements(k) < 16 ? rt_tensor_elements(k) : 16, row, err));
        fault_digest(digest, row, sizeof row);
    }
    RT_TRY(rt_tensor_writer_model(ctx, decl, 2, 64, &w, err));
    RT_TRY(rt_tensor_writer_put(w, row, sizeof row, err));
    RT_TRY(rt_tensor_writer_put(w, row, sizeof row, err));
    RT_TRY(rt_tensor_writer_finish(w, err));
    rt_tensors_free(t);
    t = NULL;
    RT_TRY(rt_tensors_open(ctx, &t, err));
    fault_digest(digest, rt_tensors_sha256(t), 64);
out:
    rt_tensor_writer_free(w);
    rt_tensors_free(t);
    return st;
}

static void safetensors(void **state)
{
    (void)state;
    fault_each(safetensors_work, (void *)(uintptr_t)test_tmp("fault-tensors"), 80);
}

enum { SET_SEQS = 6, SET_TOKENS = 9, SET_K = 4, SET_IDS = 50 };
static struct rt_row_identity set_identity(void)
{
    struct rt_row_identity id = {.vocab_size = SET_IDS, .n_ids = SET_IDS, .top_k = SET_K, .n_lse = 1, .lse_temperature = {1}};
    memset(id.teacher_sha256, 'a', 64);
    strcpy(id.teacher_name, "faults");
    strcpy(id.mode, "w8a16/f32/ref");
    return id;
}

static enum rt_status put_sequence(struct rt_row_sink *sink, int i, struct rt_err *err)
{
    uint32_t ids[SET_TOKENS], pos[SET_TOKENS], top[SET_TOKENS * SET_K], next[SET_TOKENS], rank[SET_TOKENS];
    uint8_t mask[SET_TOKENS];
    float logit[SET_TOKENS * SET_K], lse[SET_TOKENS], logprob[SET_TOKENS];
    struct rt_rows r = {.source_line = i + 1, .n_tokens = SET_TOKENS, .ids = ids, .loss_mask = mask, .n_rows = SET_TOKENS - 1, .k = SET_K,
                        .n_lse = 1, .position = pos, .topk_ids = top, .topk_logits = logit, .lse = lse, .next_id = next,
                        .next_logprob = logprob, .next_rank = rank};
    for (int t = 0; t < SET_TOKENS; t++) {
        ids[t] = (uint32_t)(i * 5 + t * 3) % SET_IDS;
        mask[t] = 1;
    }
    for (int t = 0; t + 1 < SET_TOKENS; t++) {
        pos[t] = (uint32_t)t;
        next[t] = ids[t + 1];
        rank[t] = 0;
        logprob[t] = -0.5f;
        lse[t] = 3.5f; /* the greatest logit is that of the next token: 3 */
        for (int j = 0; j < SET_K; j++) {
            top[t * SET_K + j] = (next[t] + (uint32_t)j) % SET_IDS;
            logit[t * SET_K + j] = 3 - (float)j;
        }
    }
    rt_rows_key(ids, SET_TOKENS, r.key);
    return sink->put(sink->self, &r, err);
}

/* Goes on from wherever an earlier try ended; reads what there is. */
static enum rt_status shard_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    const struct rt_row_identity id = set_identity();
    const struct rt_shard_options o = {.rows_per_shard = 16};
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_shard_set *set = NULL;
    struct rt_rows rows;
    enum rt_status st;
    RT_TRY(rt_shard_sink_open(ctx, &id, &o, &s, &sink, &resume, err));
    if (!resume.finished) {
        for (int i = (int)resume.sequences; i < SET_SEQS; i++)
            RT_TRY(put_sequence(&sink, i, err));
        RT_TRY(sink.finish(sink.self, err));
    }
    rt_shard_sink_free(s);
    s = NULL;
    RT_TRY(rt_shard_set_open(ctx, &set, err));
    for (int64_t i = 0; i < rt_shard_set_info(set)->sequences; i++) {
        RT_TRY(rt_shard_set_get(set, i, &rows, err));
        fault_digest(digest, rows.key, sizeof rows.key);
        fault_digest(digest, rows.topk_logits, (size_t)rows.n_rows * SET_K * sizeof(float));
    }
    fault_digest(digest, &rt_shard_set_info(set)->bytes, sizeof(uint64_t));
out:
    rt_shard_set_free(set);
    rt_shard_sink_free(s);
    return st;
}

static void remove_dir(const char *dir)
{
    char cmd[1024];
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    assert_int_equal(system(cmd), 0);
}

/* A set that is begun in memory that gives out at allocation n, and finished by the next try, is the set of an untroubled run. */
static void shards(void **state)
{
    (void)state;
    const char *dir = test_tmp("fault-set");
    struct rt_err err = {0};
    uint64_t want, got;
    const int64_t n = count(shard_work, (void *)(uintptr_t)dir, &want);
    for (int64_t at = 1; at <= n; at += 2) {
        remove_dir(dir);
        got = 0;
        fault_arm(at, at % 4 == 1);
        const enum rt_status st = shard_work((void *)(uintptr_t)dir, &got, &err);
        fault_disarm();
        if (st != RT_OK && st != RT_NOMEM)
            fail_msg("allocation %ld: status %d, '%s'", (long)at, (int)st, err.msg);
        rt_err_clear(&err);
        count(shard_work, (void *)(uintptr_t)dir, &got);
        assert_int_equal(got, want);
    }
    fault_each(shard_work, (void *)(uintptr_t)dir, 60); /* a finished set: the reader's allocations */
}

static enum rt_status checkpoint_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    const struct rt_tensor_decl decl[] = {{"w", RT_F32, 2, {4, 2}}};
    const float data[8] = {1, 2, 3};
    struct rt_ckpt_writer *w = NULL;
    struct rt_json *v = NULL;
    struct rt_tensors *t = NULL;
    struct rt_ckpt c;
    char path[4200];
    float back[8];
    enum rt_status st;
    RT_TRY(rt_ckpt_begin(ctx, 7, &w, err));
    RT_TRY(rt_ckpt_tensors(w, "model.safetensors", decl, 1, err));
    RT_TRY(rt_ckpt_put(w, data, sizeof data, err));
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_int(v, "step", 7, err));
    RT_TRY(rt_ckpt_json(w, "state.json", v, err));
    RT_TRY(rt_ckpt_commit(w, 2, err));
    RT_TRY(rt_ckpt_latest(ctx, NULL, &c, err));
    fault_digest(digest, &c.step, sizeof c.step);
    snprintf(path, sizeof path, "%s/model.safetensors", c.path);
    RT_TRY(rt_tensors_open(path, &t, err));
    RT_TRY(rt_tensors_read(t, rt_tensors_at(t, 0), back, err));
    fault_digest(digest, back, sizeof back);
out:
    rt_tensors_free(t);
    rt_json_free(v);
    rt_ckpt_writer_free(w);
    return st;
}

static void checkpoints(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *dir = test_tmp("fault-ckpt");
    assert_ok(rt_mkdirs(dir, &err));
    fault_each(checkpoint_work, (void *)(uintptr_t)dir, 40);
}

struct run_values {
    int64_t n;
    const char *s;
    struct rt_str_list list;
};

/* Options, and the run directory that keeps them. */
static enum rt_status run_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    static const struct rt_opt table[] = {
        {"n", RT_OPT_INT, offsetof(struct run_values, n), "3", 0, 10, NULL, "N", "a number", false, false},
        {"s", RT_OPT_STRING, offsetof(struct run_values, s), NULL, 0, 0, NULL, "S", "a text", false, false},
        {"list", RT_OPT_LIST, offsetof(struct run_values, list), NULL, 0, 0, NULL, "S", "texts", false, false},
        {0},
    };
    const struct rt_opt *const tables[] = {table};
    char a[] = "--n=4", b[] = "--list", c[] = "x", d[] = "--list=y", e[] = "more";
    char *const argv[] = {a, b, c, d, e};
    struct run_values v = {0};
    struct rt_positionals pos = {0};
    bool seen[128] = {false};
    struct rt_json *config = NULL;
    struct rt_rundir run = {.lock = -1, .metrics = -1};
    struct rt_buf text = {0};
    enum rt_status st;
    RT_TRY(rt_options_parse(tables, 1, 5, argv, &v, &pos, seen, err));
    RT_TRY(rt_options_help(tables, 1, &text, err));
    RT_TRY(rt_run_config("faults", tables, 1, &v, &config, err));
    RT_TRY(rt_rundir_open(ctx, config, &run, err));
    RT_TRY(rt_rundir_truncate(&run, 0, err));
    RT_TRY(rt_json_set_int(config, "step", 0, err)); /* as good a line as any */
    RT_TRY(rt_rundir_metric(&run, config, err));
    RT_TRY(rt_rundir_sync(&run, err));
    fault_digest(digest, text.data, text.len);
    fault_digest(digest, &pos.n, sizeof pos.n);
out:
    if (run.path[0] != '\0')
        rt_rundir_close(&run);
    rt_buf_free(&text);
    rt_json_free(config);
    rt_options_free(tables, 1, &v, &pos);
    return st;
}

static void runs(void **state)
{
    (void)state;
    fault_each(run_work, (void *)(uintptr_t)test_tmp("fault-run"), 60);
}

/* ---- the scheduler ---- */
struct toy {
    float logits[4][32];
    uint64_t *digest;
};

static enum rt_status toy_step(void *ctx, const struct rt_batch_entry *e, int n, int n_rows, const float **logits, int64_t *stride,
                               struct rt_err *err)
{
    struct toy *t = ctx;
    (void)err;
    (void)n_rows;
    for (int i = 0; i < n; i++)
        for (int v = 0; v < 32 && e[i].row >= 0; v++)
            t->logits[e[i].row][v] = (float)((e[i].token * 7 + v * 13 + (int)e[i].position) % 11);
    *logits = t->logits[0];
    *stride = 32;
    return RT_OK;
}

static enum rt_status toy_finish(void *ctx, const struct rt_batch_result *r, struct rt_err *err)
{
    struct toy *t = ctx;
    uint64_t one = (uint64_t)r->index;
    (void)err;
    fault_digest(&one, r->ids, (size_t)r->n * sizeof *r->ids);
    *t->digest += one;
    return RT_OK;
}

static enum rt_status batch_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    struct toy t = {.digest = digest};
    const struct rt_batch_step step = {.ctx = &t, .step = toy_step};
    const struct rt_batch_options o = {.slots = 2, .budget = 4, .max_len = 20, .n_ids = 32, .sample = {1, 8, 0.9}, .on_finish = toy_finish, .ctx = &t};
    static const int32_t prompt[] = {3, 1, 4, 1, 5}, stop[] = {9};
    struct rt_batch *b = NULL;
    enum rt_status st;
    (void)ctx;
    RT_TRY(rt_batch_create(&o, &step, &b, err));
    for (int i = 0; i < 3; i++)
        RT_TRY(rt_batch_add(b, &(struct rt_batch_request){.prompt = prompt, .n_prompt = 5 - i, .stream = (uint64_t)i * 2, .n_samples = 2,
                                                          .max_new = 6, .stop_ids = stop, .n_stop = 1}, NULL, err));
    RT_TRY(rt_batch_run(b, err));
out:
    rt_batch_free(b);
    return st;
}

static void batch(void **state)
{
    (void)state;
    fault_each(batch_work, NULL, 1000);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(messages), cmocka_unit_test(tokenizer), cmocka_unit_test(templates),   cmocka_unit_test(dataset), cmocka_unit_test(train_set), cmocka_unit_test(json),
    cmocka_unit_test(safetensors), cmocka_unit_test(shards), cmocka_unit_test(checkpoints), cmocka_unit_test(runs), cmocka_unit_test(batch),
};
RT_SUITE(faults, tests)
