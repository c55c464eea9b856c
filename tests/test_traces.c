/* The trace pipeline: trace files that survive kills, and the commands on the embedded teacher. */
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "core/rng.h"
#include "distill/command.h"
#include "distill/lines.h"
#include "distill/model_dir.h"
#include "distill/trace_file.h"
#include "formats/dataset.h"
#include "formats/shard.h"
#include "tests/run_command.h"
#include "tests/suite.h"

#define TEACHER "examples/tiny_teacher"

/* ---- the trace file ---- */

static void read_file(const char *path, struct rt_buf *out)
{
    struct rt_err err = {0};
    out->len = 0;
    assert_ok(rt_file_read_all(path, 64 << 20, out, &err));
}

static void put(struct rt_trace_file *f, int64_t prompt, int sample)
{
    struct rt_err err = {0};
    char line[100];
    snprintf(line, sizeof line, "{\"index\":%d,\"sample\":%d,\"pad\":\"%.*s\"}", (int)prompt, sample, (int)(prompt % 17), "xxxxxxxxxxxxxxxxx");
    assert_ok(rt_trace_file_put(f, prompt, sample, line, strlen(line), &err));
}

/* Every order of finishing, torn at any byte of either file and opened again, ends with the same bytes. */
static void a_torn_trace_file_ends_the_same(void **state)
{
    (void)state;
    enum { PROMPTS = 12, SAMPLES = 2, WINDOW = 4 };
    struct rt_err err = {0};
    struct rt_trace_file *f;
    struct rt_buf want = {0}, got = {0};
    char path[4096], pending[4096];
    for (int round = 0; round < 40; round++) {
        char name[32];
        uint64_t r = (uint64_t)round;
        snprintf(name, sizeof name, "traces-%d", round);
        const char *dir = test_tmp(name);
        assert_ok(rt_mkdirs(dir, &err));
        snprintf(path, sizeof path, "%s/traces.jsonl", dir);
        snprintf(pending, sizeof pending, "%s/pending.jsonl", dir);
        for (int life = 0;; life++) {
            assert_ok(rt_trace_file_open(dir, SAMPLES, WINDOW, &f, &err));
            int puts = round == 0 ? 1000 : 1 + (int)(rt_rng_u64(1, r, (uint64_t)life) % 9);
            for (uint64_t tries = 0; rt_trace_file_done(f) < PROMPTS && puts > 0; tries++) {
                /* round 0 in order; else any open place */
                const uint64_t x = rt_rng_u64(2, r * 1000 + (uint64_t)life, tries);
                const int64_t p = round == 0 ? rt_trace_file_done(f) : rt_trace_file_done(f) + (int64_t)(x % WINDOW);
                const int s = round == 0 ? rt_trace_file_has(f, p, 0) : (int)(x >> 32) & 1;
                if (p >= PROMPTS || rt_trace_file_has(f, p, s))
                    continue;
                assert_true(rt_trace_file_room(f, p));
                put(f, p, s);
                puts--;
            }
            const bool over = rt_trace_file_done(f) == PROMPTS;
            if (over)
                assert_ok(rt_trace_file_sync(f, true, &err));
            rt_trace_file_close(f);
            if (over)
                break;
            const char *torn = (life & 1) ? path : pending;
            read_file(torn, &got);
            if (got.len > 0)
                assert_int_equal(truncate(torn, (off_t)(got.len - rt_rng_u64(3, r, (uint64_t)life) % (got.len < 60 ? got.len : 60))), 0);
        }
        assert_false(rt_path_exists(pending));
        read_file(path, round == 0 ? &want : &got);
        if (round > 0) {
            assert_int_equal(got.len, want.len);
            assert_memory_equal(got.data, want.data, want.len);
        }
    }
    rt_buf_free(&want);
    rt_buf_free(&got);
}

static void a_foreign_trace_file_is_refused(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_trace_file *f;
    char path[4096];
    const char *dir = test_tmp("traces-foreign");
    static const char *const texts[] = {"{\"index\":5,\"sample\":0}\n", "{\"prompt\":\"x\"}\n", "{\"index\":0 \"sample\":0}\n"};
    assert_ok(rt_mkdirs(dir, &err));
    snprintf(path, sizeof path, "%s/traces.jsonl", dir);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        assert_ok(rt_publish_bytes(path, texts[i], strlen(texts[i]), &err));
        assert_status(rt_trace_file_open(dir, 1, 4, &f, &err), FORMAT);
    }
    /* saved with other ends of lines: refused, and nothing of it is cut */
    static const char changed[] = "{\"index\":0,\"sample\":0}\r\n{\"index\":1,\"sample\":0}\r\n";
    struct rt_buf text = {0};
    assert_ok(rt_publish_bytes(path, changed, strlen(changed), &err));
    assert_status(rt_trace_file_open(dir, 1, 4, &f, &err), FORMAT);
    read_file(path, &text);
    assert_int_equal(text.len, strlen(changed));
    /* zeros behind whole lines are what a crash leaves */
    static const char zeros[] = "{\"index\":0,\"sample\":0}\n\0\0\0\0{\"index\":1}\n";
    assert_ok(rt_publish_bytes(path, zeros, sizeof zeros - 1, &err));
    assert_ok(rt_trace_file_open(dir, 1, 4, &f, &err));
    assert_int_equal(rt_trace_file_done(f), 1);
    rt_trace_file_close(f);
    rt_buf_free(&text);
}

/* ---- the commands ---- */

struct stopper {
    int64_t left; /* stop at this many questions; -1: never */
};

static bool stop(void *self)
{
    struct stopper *s = self;
    return s->left >= 0 && s->left-- == 0;
}

/* Runs a command as main does, its stdin from and its stdout into files (NULL: left alone). */
static enum rt_status command(const struct rt_command *cmd, const char *args, int64_t stop_after, const char *in, const char *out, struct rt_err *err)
{
    const struct rt_opt *const tables[] = {cmd->options, rt_common_options()};
    char text[8192], *argv[64], *rest;
    int argc = 0, saved[2] = {-1, -1};
    struct rt_positionals pos = {0};
    struct stopper stopper = {stop_after};
    struct rt_log log;
    FILE *quiet = fopen("/dev/null", "w");
    void *values = calloc(1, cmd->values_size);
    assert_true(values != NULL && quiet != NULL && strlen(args) < sizeof text);
    rt_log_init(&log, quiet, RT_LOG_ERROR);
    strcpy(text, args);
    for (char *w = strtok_r(text, " ", &rest); w != NULL; w = strtok_r(NULL, " ", &rest))
        argv[argc++] = w;
    fflush(stdout);
    const char *const files[2] = {in, out};
    for (int i = 0; i < 2; i++)
        if (files[i] != NULL) {
            const int fd = open(files[i], i == 0 ? O_RDONLY : O_WRONLY | O_CREAT | O_TRUNC, 0666);
            assert_true(fd >= 0);
            saved[i] = dup(i);
            dup2(fd, i);
            close(fd);
        }
    enum rt_status st = rt_options_parse(tables, 2, argc, argv, values, &pos, NULL, err);
    if (st == RT_OK)
        st = rt_options_check(tables, 2, values, err);
    test_on_cpu(values);
    struct rt_context ctx = {.log = &log, .command = cmd, .stop = stop, .stop_self = &stopper, .argc = argc, .argv = argv};
    if (st == RT_OK)
        st = cmd->run(&ctx, values, &pos, err);
    fflush(stdout);
    for (int i = 0; i < 2; i++)
        if (saved[i] >= 0) {
            dup2(saved[i], i);
            close(saved[i]);
        }
    rt_options_free(tables, 2, values, &pos);
    free(values);
    fclose(quiet);
    return st;
}

static const char *write_tmp(const char *name, const char *text)
{
    struct rt_err err = {0};
    const char *path = test_tmp(name);
    assert_ok(rt_publish_bytes(path, text, strlen(text), &err));
    return path;
}

static const char prompts[] = "{\"prompt\":\"Add 12 and 7.\",\"answer\":\"19\",\"family\":\"sum\"}\n\n"
                              "{\"messages\":[{\"role\":\"user\",\"content\":\"What is 5 * 3?\"},{\"role\":\"assistant\",\"content\":\"old\"}],\"answer\":15,\"id\":\"m\"}\n"
                              "{\"input_ids\":[0,300,301],\"x\":{\"y\":[1]}}\n"
                              "{\"text\":\" boro bori mira\",\"answer\":null}\n";

/* expected: RT_STATUS_COUNT for any. */
static enum rt_status traces(const char *out, const char *more, int64_t stop_after, enum rt_status expected)
{
    struct rt_err err = {0};
    char args[9000];
    snprintf(args, sizeof args, "--teacher %s --prompts %s --out %s --samples 2 --max-tokens 60 --verify boxed --device cpu --threads 1 --memory 512M %s", test_data(TEACHER),
             write_tmp("prompts.jsonl", prompts), out, more);
    const enum rt_status st = command(&rt_cmd_traces, args, stop_after, NULL, "/dev/null", &err);
    if (st != expected && expected != RT_STATUS_COUNT)
        fail_msg("traces %s: status %d (%s), expected %d", more, (int)st, err.msg, (int)expected);
    return st;
}

static void same_traces(const char *a, const char *b)
{
    struct rt_buf x = {0}, y = {0};
    char path[2][4096];
    snprintf(path[0], sizeof path[0], "%s/traces.jsonl", a);
    snprintf(path[1], sizeof path[1], "%s/traces.jsonl", b);
    read_file(path[0], &x);
    read_file(path[1], &y);
    assert_int_equal(x.len, y.len);
    assert_memory_equal(x.data, y.data, x.len);
    rt_buf_free(&x);
    rt_buf_free(&y);
}

/* One line a sample in prompt order, whole completions, passed-through members; read again they give the ids that were sampled. */
static void traces_are_whole_and_in_order(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_lines in = {0};
    struct rt_json *v = NULL;
    struct rt_model_dir m;
    struct rt_dataset *d;
    struct rt_sample s;
    static const char *const ids[] = {"1-0", "1-1", "m-0", "m-1", "4-0", "4-1", "5-0", "5-1"};
    static const char *const extra[] = {"family", "id", "x", "text"};
    char path[4096];
    const char *id, *text;
    bool end = false, exact;
    size_t n;
    int64_t n_prompt, n_new, count = 0;
    const char *out = test_tmp("traces-order");
    traces(out, "", -1, RT_OK);
    snprintf(path, sizeof path, "%s/traces.jsonl", out);
    assert_ok(rt_lines_open(path, &in, &err));
    for (;; count++) {
        assert_ok(rt_lines_next_json(&in, &v, &end, &err));
        if (end)
            break;
        assert_true(count < 8);
        assert_ok(rt_json_string(v, "id", &id, &err));
        assert_string_equal(id, ids[count]);
        assert_non_null(rt_json_get(v, extra[count / 2]));
        assert_ok(rt_json_bool_or(rt_json_get(v, "tokens"), "exact", false, &exact, &err));
        assert_true(exact);
        if (count < 2) {
            text = rt_json_as_string(rt_json_get(v, "completion"), &n);
            assert_true(n > 8 && memcmp(text, "<think>\n", 8) == 0);
            assert_non_null(rt_json_get(v, "verdict"));
        } else if (count < 4) {
            assert_int_equal(rt_json_len(rt_json_get(v, "messages")), 2);
            text = rt_json_as_string(rt_json_get(rt_json_at(rt_json_get(v, "messages"), 1), "content"), &n);
            assert_true(n > 8 && memcmp(text, "<think>\n", 8) == 0);
        }
        rt_json_free(v);
        v = NULL;
    }
    assert_int_equal(count, 8);
    rt_lines_close(&in);

    assert_ok(rt_model_dir_open(test_data(TEACHER), NULL, NULL, &m, &err));
    assert_ok(rt_dataset_open(out, &(struct rt_dataset_options){.tok = m.tok, .tmpl = m.tmpl}, &d, &err));
    for (count = 0;; count++) {
        assert_ok(rt_dataset_next(d, &s, &end, &err));
        if (end)
            break;
        const struct rt_json *tokens = rt_json_get(s.json, "tokens");
        assert_ok(rt_json_int(tokens, "prompt", 1, 1000, &n_prompt, &err));
        assert_ok(rt_json_int(tokens, "completion", 1, 1000, &n_new, &err));
        assert_ok(rt_json_string(s.json, "finish_reason", &text, &err));
        /* an unfinished chat turn gets an end when it is read; plain text never has one */
        const bool stopped = strcmp(text, "stop") == 0, chat = count < 4, plain = count >= 6;
        assert_int_equal(s.n, n_prompt + n_new + (chat && !stopped) - (plain && stopped));
    }
    assert_int_equal(count, 8);
    rt_dataset_close(d);
    rt_model_dir_close(&m);
}

static void interrupted_traces_end_with_the_same_bytes(void **state)
{
    (void)state;
    struct rt_buf text = {0};
    char path[4096];
    const char *full = test_tmp("traces-full");
    traces(full, "--slots 8", -1, RT_OK);
    const char *part = test_tmp("traces-part");
    int lives = 1;
    /* more steps than one sequence takes, and fewer than all: each life ends some of them */
    while (traces(part, lives & 1 ? "--slots 3 --threads 2" : "--slots 2", 70, RT_STATUS_COUNT) != RT_OK)
        assert_true(++lives < 10);
    assert_true(lives > 2);
    same_traces(full, part);
    /* complete: nothing to do; a tail that was cut off: done again */
    traces(part, "", 0, RT_OK);
    snprintf(path, sizeof path, "%s/traces.jsonl", part);
    read_file(path, &text);
    assert_int_equal(truncate(path, (off_t)text.len - 700), 0);
    traces(part, "", -1, RT_OK);
    same_traces(full, part);
    /* another run's directory */
    traces(part, "--temperature 0.7", -1, RT_REFUSED);
    rt_buf_free(&text);
}

static void traces_filter_in_the_same_run(void **state)
{
    (void)state;
    struct rt_buf a = {0}, b = {0};
    char path[4096];
    const char *out = test_tmp("traces-filter");
    traces(out, "--drop all", -1, RT_OK);
    snprintf(path, sizeof path, "%s/accepted.jsonl", out);
    read_file(path, &a);
    snprintf(path, sizeof path, "%s/rejected.jsonl", out);
    read_file(path, &b);
    int lines = 0;
    for (size_t i = 0; i < a.len; i++)
        lines += a.data[i] == '\n';
    for (size_t i = 0; i < b.len; i++)
        lines += b.data[i] == '\n';
    assert_int_equal(lines, 8);
    assert_true(b.len > 0 && memmem(b.data, b.len, "\"reason\":\"format\"", 17) != NULL); /* text and ids have no thought */
    rt_buf_free(&a);
    rt_buf_free(&b);
}

/* What a prompt's line says of an earlier completion stays behind; another answer is another run. */
static void a_line_speaks_of_its_own_completion(void **state)
{
    (void)state;
    static const char *const answers[] = {"75", "76"};
    static const char *const gone[] = {"verdict", "filter", "reasoning_content"};
    struct rt_err err = {0};
    struct rt_lines in = {0};
    struct rt_json *v = NULL;
    char line[512], args[9000], path[4096];
    bool end;
    const char *out = test_tmp("traces-again");
    for (int i = 0; i < 2; i++) {
        snprintf(line, sizeof line, "{\"prompt\":\"How much is 25 times 3?\",\"completion\":\"x\",\"reasoning_content\":\"y\",\"answer\":\"%s\",\"verdict\":\"correct\","
                 "\"filter\":{\"reason\":null},\"kept\":18446744073709551615}\n", answers[i]);
        snprintf(args, sizeof args, "--teacher %s --prompts %s --out %s --max-tokens 4", test_data(TEACHER), write_tmp("again.jsonl", line), out);
        assert_int_equal(command(&rt_cmd_traces, args, -1, NULL, NULL, &err), i == 0 ? RT_OK : RT_REFUSED);
    }
    rt_err_clear(&err);
    snprintf(path, sizeof path, "%s/traces.jsonl", out);
    assert_ok(rt_lines_open(path, &in, &err));
    assert_ok(rt_lines_next_json(&in, &v, &end, &err));
    for (size_t i = 0; i < sizeof gone / sizeof *gone; i++)
        assert_null(rt_json_get(v, gone[i]));
    assert_non_null(rt_json_get(v, "kept"));
    rt_json_free(v);
    rt_lines_close(&in);
}

static void bad_arguments_are_told(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char args[9000];
    const char *out = test_tmp("traces-bad");
    traces(out, "--drop wrong,foo", -1, RT_USAGE);
    traces(out, "--drop contaminated", -1, RT_USAGE);
    traces(out, "--thinking off", -1, RT_USAGE); /* its template always opens one */
    traces(out, "--template nothing", -1, RT_USAGE);
    traces(out, "--memory 1M", -1, RT_NOMEM);
    traces(out, "--dry-run", -1, RT_OK);
    assert_false(rt_path_exists(out));
    snprintf(args, sizeof args, "--teacher %s --prompts %s --out %s", test_data(TEACHER), write_tmp("promt.jsonl", "{\"prompt\":\"x\"}\n{\"promt\":\"x\"}\n"), out);
    assert_status(command(&rt_cmd_traces, args, -1, NULL, NULL, &err), FORMAT);
}

static void tokenize_goes_both_ways(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf text = {0};
    char args[5000];
    const char *there = test_tmp("ids.jsonl"), *back = test_tmp("texts.jsonl");
    static const char lines[] = "{\"text\":\"What is 2 + 2?\"}\n{\"text\":\"\"}\n{\"text\":\"<think>\\n\xC3\xA9\\u0000\\\"\"}\n";
    snprintf(args, sizeof args, "--tokenizer %s", test_data(TEACHER));
    assert_ok(command(&rt_cmd_tokenize, args, -1, write_tmp("texts-in.jsonl", lines), there, &err));
    snprintf(args, sizeof args, "--tokenizer %s --decode", test_data(TEACHER));
    assert_ok(command(&rt_cmd_tokenize, args, -1, there, back, &err));
    read_file(back, &text);
    assert_int_equal(text.len, strlen(lines));
    assert_memory_equal(text.data, lines, text.len);
    read_file(there, &text);
    assert_non_null(memmem(text.data, text.len, "{\"ids\":[]}\n", 11));
    /* half a character is no text */
    assert_ok(command(&rt_cmd_tokenize, args, -1, write_tmp("half.jsonl", "{\"ids\":[130]}\n"), back, &err));
    read_file(back, &text);
    assert_non_null(memmem(text.data, text.len, "\"lossy\":true", 12));
    static const char *const bad[] = {"{\"ids\":[1]}\n{\"ids\":[99999]}\n", "{\"ids\":[1]}\n{\"ids\":1}\n", "{\"ids\":[1]}\n{\"ids\":[-1]}\n", "{\"ids\":[1]}\nx\n", "{\"ids\":[1]}\n[]\n"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const enum rt_status st = command(&rt_cmd_tokenize, args, -1, write_tmp("bad.jsonl", bad[i]), back, &err);
        assert_int_equal(st, RT_FORMAT);
        assert_non_null(strstr(err.msg, "stdin:2"));
        rt_err_clear(&err);
    }
    rt_buf_free(&text);
}

/* A set of two sequences of three tokens over four ids, with whole states of layer 1. */
static void make_set(const char *dir)
{
    struct rt_err err = {0};
    struct rt_shard_sink *shards;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_row_identity id = {.vocab_size = 4, .n_ids = 4, .top_k = 2, .n_lse = 2, .lse_temperature = {0.5, 1}, .n_features = 1, .feature = {{1, 2, RT_BF16, false}}};
    static const float all[4] = {0.1f, 0.25f, 1.5f, -2}; /* of every row; no short decimals in binary */
    static const uint32_t ids[3] = {3, 2, 0}, position[2] = {0, 1}, top[4] = {2, 1, 2, 1}, next[2] = {2, 0}, rank[2] = {0, 2};
    static const uint8_t mask[3] = {0, 1, 1};
    static const float logits[4] = {1.5f, 0.25f, 1.5f, 0.25f};
    uint16_t states[6];
    float lse[4], logprob[2];
    memset(id.teacher_sha256, 'a', 64);
    strcpy(id.mode, "w8a16/f32/ref");
    for (int i = 0; i < 4; i++) {
        double sum = 0;
        for (int v = 0; v < 4; v++)
            sum += exp(all[v] / id.lse_temperature[i % 2]);
        lse[i] = (float)log(sum);
    }
    for (int i = 0; i < 2; i++)
        logprob[i] = all[next[i]] - lse[1];
    for (int i = 0; i < 6; i++)
        states[i] = rt_f32_to_bf16((float)i / 4);
    assert_ok(rt_shard_sink_open(dir, &id, &(struct rt_shard_options){0}, &shards, &sink, &resume, &err));
    for (int s = 0; s < 2; s++) {
        struct rt_rows r = {.occurrence = (uint32_t)s, .source_line = s + 1, .n_tokens = 3, .ids = ids, .loss_mask = mask, .n_rows = 2, .k = 2, .n_lse = 2,
                            .position = position, .topk_ids = top, .topk_logits = logits, .lse = lse, .next_id = next, .next_logprob = logprob,
                            .next_rank = rank, .n_features = 1, .feature = {states}};
        rt_rows_key(ids, 3, r.key);
        assert_ok(sink.put(sink.self, &r, &err));
    }
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(shards);
}

static void number(const struct rt_json *v, double expected)
{
    double x;
    assert_true(rt_json_as_double(v, &x));
    assert_true((float)x == (float)expected); /* printed so that the same float32 is read */
}

static void cat_prints_rows(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_lines in = {0};
    struct rt_json *v = NULL;
    char args[5000];
    bool end;
    int64_t seq, at;
    const char *dir = test_tmp("cat-set"), *out = test_tmp("cat.jsonl");
    make_set(dir);
    snprintf(args, sizeof args, "%s --features", dir);
    assert_ok(command(&rt_cmd_cat, args, -1, NULL, out, &err));
    assert_ok(rt_lines_open(out, &in, &err));
    for (int i = 0;; i++) {
        assert_ok(rt_lines_next_json(&in, &v, &end, &err));
        if (end) {
            assert_int_equal(i, 4);
            break;
        }
        assert_ok(rt_json_int(v, "seq", 0, 1, &seq, &err));
        assert_ok(rt_json_int(v, "pos", 0, 1, &at, &err));
        assert_true(seq == i / 2 && at == i % 2);
        number(rt_json_get(v, "token"), at == 0 ? 3 : 2);
        number(rt_json_get(v, "next"), at == 0 ? 2 : 0);
        number(rt_json_get(v, "next_rank"), at == 0 ? 0 : 2);
        const double lse = log(exp(0.1f) + exp(0.25) + exp(1.5) + exp(-2));
        number(rt_json_get(v, "next_logprob"), (at == 0 ? 1.5f : 0.1f) - (float)lse);
        number(rt_json_get(rt_json_get(v, "lse"), "1"), lse);
        number(rt_json_get(rt_json_get(v, "lse"), "0.5"), log(exp(0.1f / 0.5) + exp(0.25 / 0.5) + exp(1.5 / 0.5) + exp(-2 / 0.5)));
        number(rt_json_at(rt_json_get(v, "ids"), 1), 1);
        number(rt_json_at(rt_json_get(v, "logits"), 0), 1.5);
        number(rt_json_at(rt_json_get(rt_json_get(v, "features"), "1"), 1), (2 * (double)at + 1) / 4);
        rt_json_free(v);
        v = NULL;
    }
    rt_lines_close(&in);
    struct rt_buf text = {0};
    snprintf(args, sizeof args, "%s --seq 1 --limit 1", dir);
    assert_ok(command(&rt_cmd_cat, args, -1, NULL, out, &err));
    read_file(out, &text);
    assert_memory_equal(text.data, "{\"seq\":1,\"pos\":0,", 17);
    assert_ptr_equal(memchr(text.data, '\n', text.len), text.data + text.len - 1);
    rt_buf_free(&text);
    snprintf(args, sizeof args, "%s --seq 2", dir);
    assert_status(command(&rt_cmd_cat, args, -1, NULL, out, &err), USAGE);
}

static void lines_come_whole_across_reads(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_lines in = {0};
    struct rt_buf text = {0};
    const char *path = test_tmp("lines.txt"), *s;
    size_t n, total = 0;
    bool end = false;
    for (int i = 0; i < 3000; i++) /* beyond one read; a few lines longer than a read */
        assert_ok(rt_buf_printf(&text, &err, "%d:%0*d\n%s", i, i % 1000 == 7 ? 400000 : i % 300 + 1, 0, i % 5 == 0 ? " \t\r\n" : ""));
    assert_ok(rt_buf_printf(&text, &err, "last"));
    assert_ok(rt_publish_bytes(path, text.data, text.len, &err));
    assert_ok(rt_lines_open(path, &in, &err));
    for (int i = 0; i < 3000; i++) {
        assert_ok(rt_lines_next(&in, &s, &n, &end, &err));
        assert_false(end || in.torn);
        assert_int_equal(strtol(s, NULL, 10), i);
        total += n;
    }
    assert_ok(rt_lines_next(&in, &s, &n, &end, &err));
    assert_true(!end && in.torn && n == 4 && memcmp(s, "last", 4) == 0);
    assert_int_equal(in.end_offset, text.len);
    assert_int_equal(total + 4 + 3000 + 600 * 4, text.len);
    assert_ok(rt_lines_next(&in, &s, &n, &end, &err));
    assert_true(end);
    rt_lines_close(&in);
    rt_buf_free(&text);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(lines_come_whole_across_reads),
    cmocka_unit_test(a_torn_trace_file_ends_the_same),
    cmocka_unit_test(a_foreign_trace_file_is_refused),
    cmocka_unit_test(traces_are_whole_and_in_order),
    cmocka_unit_test(interrupted_traces_end_with_the_same_bytes),
    cmocka_unit_test(traces_filter_in_the_same_run),
    cmocka_unit_test(a_line_speaks_of_its_own_completion),
    cmocka_unit_test(bad_arguments_are_told),
    cmocka_unit_test(tokenize_goes_both_ways),
    cmocka_unit_test(cat_prints_rows),
};
RT_SUITE(traces, tests)
