#include "tests/suite.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/doctor.h"
#include "formats/shard.h"
#include "tests/run_command.h"

#define TEACHER test_data("examples/tiny_teacher")
#define STUDENT test_data("examples/tiny_student")

static const char lines[] =
    "{\"prompt\":\"What is 22 * 6?\",\"completion\":\"<think>\\n22 times 6 is 132.\\n</think>\\n\\nThe answer is 132.\"}\n"
    "{\"messages\":[{\"role\":\"user\",\"content\":\"Add 62 and 41.\"},{\"role\":\"assistant\",\"content\":\"103\",\"reasoning_content\":\"62 + 41 = 103.\"}]}\n"
    "{\"text\":\" kopi daso gasa mito nepe kero fipo geta loso dapa bapi lasa lasi fisa liri kiti fapa dite miti bese gara\"}\n";

static const char *put(const char *dir, const char *name, const char *text, size_t n)
{
    static char path[4096];
    struct rt_err err = {0};
    assert_ok(rt_mkdirs(dir, &err));
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_ok(rt_publish_bytes(path, text, n, &err));
    return path;
}

static void copy_file(const char *from_dir, const char *to_dir, const char *name)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", from_dir, name);
    assert_ok(rt_file_read_all(path, 64 << 20, &b, &err));
    put(to_dir, name, b.data, b.len);
    rt_buf_free(&b);
}

static void open_doctor_on(struct rt_doctor *d, const char *backend, int64_t memory, int64_t batch_tokens)
{
    struct rt_err err = {0};
    const struct rt_backend *be;
    const struct rt_dev_options o = {.threads = 1};
    d->out = ".";
    d->memory = memory;
    d->batch_tokens = batch_tokens;
    d->top_k = 64;
    assert_ok(rt_backend_select(backend, NULL, 0, &be, &err));
    assert_ok(rt_device_open(be, &o, &d->device, &err));
    assert_ok(rt_doctor_run(d, &err));
}

static void open_doctor(struct rt_doctor *d)
{
    open_doctor_on(d, "ref", (int64_t)2 << 30, 1024);
}

static void close_doctor(struct rt_doctor *d)
{
    rt_doctor_close(d);
    rt_device_close(&d->device);
}

static const struct rt_check *find(const struct rt_doctor *d, const char *name)
{
    for (int i = 0; i < d->checks.n; i++)
        if (strcmp(d->checks.at[i].name, name) == 0)
            return &d->checks.at[i];
    return NULL;
}

/* Checks `name` as expected, and its text holds `words`. */
static void expect(const struct rt_doctor *d, enum rt_check_level level, const char *name, const char *words)
{
    const struct rt_check *k = find(d, name);
    if (k == NULL)
        fail_msg("no check %s", name);
    if (k->level != level || strstr(k->detail, words) == NULL)
        fail_msg("%s %s: %s; expected %s with '%s'", rt_check_level_name(k->level), name, k->detail, rt_check_level_name(level), words);
}

static void expect_crossing(const char *data, size_t n, enum rt_check_level level, const char *words)
{
    struct rt_doctor d = {.teacher = TEACHER, .student = test_data("examples/crossing_student"), .data = put(test_tmp("crossing"), "data.jsonl", data, n)};
    open_doctor(&d);
    expect(&d, level, "pair.crossing", words);
    close_doctor(&d);
}

/* What `retarget` would make of the data: white space alone has no row wherever it lies, and what is not in NFC is left out, prompts too. */
static void what_retargeting_would_leave(void **state)
{
    (void)state;
    static const char tally[] = "{\"text\":\"Tally 37\"}\n", nfd[] = "{\"prompt\":\"Say it.\",\"completion\":\"cafe\\u0301\"}\n",
                      some[] = "{\"prompt\":\"Say e\\u0301.\",\"completion\":\"37\"}\n{\"prompt\":\"Say it.\",\"completion\":\"37\"}\n";
    /* the student's tokens: one that crosses, a blank, two digits */
    expect_crossing(tally, sizeof tally - 1, RT_CHECK_WARN, "of 4 target tokens of the student bytes decide the rows of 50.0 %");
    expect_crossing(nfd, sizeof nfd - 1, RT_CHECK_WARN, "would leave out all of 1 lines");
    expect_crossing(some, sizeof some - 1, RT_CHECK_WARN, "of 2 target tokens of the student bytes decide the rows of 100.0 %");
    expect_crossing(some, sizeof some - 1, RT_CHECK_WARN, "; 1 of 2 lines are left out");
}

static void a_sound_pair_passes(void **state)
{
    (void)state;
    struct rt_doctor d = {.teacher = TEACHER, .student = STUDENT, .data = put(test_tmp("sound"), "d.jsonl", lines, strlen(lines)), .forward = true};
    open_doctor(&d);
    for (int i = 0; i < d.checks.n; i++)
        if (d.checks.at[i].level != RT_CHECK_PASS)
            fail_msg("%s: %s", d.checks.at[i].name, d.checks.at[i].detail);
    expect(&d, RT_CHECK_PASS, "pair.tokenizer", "directly");
    expect(&d, RT_CHECK_PASS, "teacher.vocabulary", "8 padded rows");
    expect(&d, RT_CHECK_PASS, "data.lines", "3 sequences");
    expect(&d, RT_CHECK_PASS, "teacher.shift", "next token");
    expect(&d, RT_CHECK_PASS, "student.shift", "next token");
    expect(&d, RT_CHECK_PASS, "memory.teacher", "weights");
    close_doctor(&d);
}

/* The student's head has fewer rows than its tokenizer has ids. */
static void a_vocabulary_that_does_not_fit_fails(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf text = {0};
    char path[4096];
    const char *dir = test_tmp("vocab");
    copy_file(STUDENT, dir, "tokenizer.json");
    copy_file(STUDENT, dir, "tokenizer_config.json");
    snprintf(path, sizeof path, "%s/config.json", STUDENT);
    assert_ok(rt_file_read_all(path, 1 << 20, &text, &err));
    memcpy(strstr(text.data, "\"vocab_size\": 1024"), "\"vocab_size\": 1000", 18);
    put(dir, "config.json", text.data, text.len);
    struct rt_doctor d = {.student = dir};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "student.vocabulary", "ids up to 1015");
    expect(&d, RT_CHECK_FAIL, "student.weights", "");
    close_doctor(&d);
    rt_buf_free(&text);
}

/* Another tokenizer: traces pass, soft labels need rewriting, shards of the old one fail. */
static void another_tokenizer_is_told(void **state)
{
    (void)state;
    const char *dir = test_tmp("other");
    copy_file(STUDENT, dir, "config.json");
    copy_file(STUDENT, dir, "model.safetensors");
    copy_file(test_data("tests/data/tokenizers/qwen"), dir, "tokenizer.json");
    copy_file(test_data("tests/data/tokenizers/qwen"), dir, "tokenizer_config.json");
    struct rt_doctor d = {.teacher = TEACHER, .student = dir};
    open_doctor(&d);
    expect(&d, RT_CHECK_WARN, "pair.tokenizer", "retort retarget");
    expect(&d, RT_CHECK_PASS, "student.template", "qwen3");
    expect(&d, RT_CHECK_PASS, "student.generation", "");
    expect(&d, RT_CHECK_PASS, "student.last_turn", "");
    close_doctor(&d);
}

static void a_template_that_is_not_known_fails(void **state)
{
    (void)state;
    const char *dir = test_tmp("template");
    static const char config[] = "{\"bos_token\":null,\"eos_token\":null,\"chat_template\":\"{% for m in messages %}%%{{ m }}{% endfor %}\"}";
    copy_file(STUDENT, dir, "config.json");
    copy_file(STUDENT, dir, "model.safetensors");
    copy_file(STUDENT, dir, "tokenizer.json");
    put(dir, "tokenizer_config.json", config, strlen(config));
    struct rt_doctor d = {.student = dir};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "student.template", "");
    close_doctor(&d);
}

static void bad_data_fails(void **state)
{
    (void)state;
    static const char twice[] = "{\"prompt\":\"hi\",\"completion\":\"<\xef\xbd\x9c" "begin\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>ho\"}\n";
    static const char broken[] = "{\"prompt\":\"hi\"\n";
    char longest[8192] = "{\"text\":\"";
    for (int i = 0; i < 1200; i++)
        strcat(longest, " kopi");
    strcat(longest, "\"}\n");
    struct rt_doctor d = {.student = STUDENT, .data = put(test_tmp("bad"), "twice.jsonl", twice, strlen(twice))};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "data.bos", "line 1");
    close_doctor(&d);
    d = (struct rt_doctor){.student = STUDENT, .data = put(test_tmp("bad"), "broken.jsonl", broken, strlen(broken))};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "data.lines", "broken.jsonl:1");
    close_doctor(&d);
    d = (struct rt_doctor){.student = STUDENT, .data = put(test_tmp("bad"), "long.jsonl", longest, strlen(longest))};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "data.length", "1 sequences are longer than 1024 tokens");
    expect(&d, RT_CHECK_FAIL, "data.length", "--max-length 1024 leaves them out");
    close_doctor(&d);
    d = (struct rt_doctor){.student = STUDENT, .data = test_tmp("bad/long.jsonl"), .max_length = 512};
    open_doctor(&d);
    expect(&d, RT_CHECK_WARN, "data.length", "leave them out");
    close_doctor(&d);
    d = (struct rt_doctor){.teacher = TEACHER, .data = test_tmp("bad/long.jsonl"), .max_length = 512};
    open_doctor(&d);
    expect(&d, RT_CHECK_WARN, "data.length", "--overlong split");
    close_doctor(&d);
    d = (struct rt_doctor){.student = STUDENT, .data = "/nothing/there"};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "data.lines", "/nothing/there");
    close_doctor(&d);
    d = (struct rt_doctor){.teacher = "/nothing/there", .student = "/nothing/there", .shards = "/nothing/there"};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "teacher.config", "/nothing/there");
    expect(&d, RT_CHECK_FAIL, "student.config", "/nothing/there");
    expect(&d, RT_CHECK_FAIL, "shards.integrity", "/nothing/there");
    assert_int_equal(d.checks.count[RT_CHECK_FAIL], 3);
    close_doctor(&d);
    d = (struct rt_doctor){.data = "/nothing/there"};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "data.lines", "/nothing/there: no such file");
    close_doctor(&d);
    d = (struct rt_doctor){.student = "/nothing/there", .data = test_tmp("bad/long.jsonl")};
    open_doctor(&d);
    expect(&d, RT_CHECK_WARN, "data.lines", "the configuration of the model");
    close_doctor(&d);
}

/* One line without a completion among others that have one is an error, as `train` says; prompts alone are data of another kind. */
static void prompts_among_lines_fail(void **state)
{
    (void)state;
    static const char *const odd[] = {"{\"prompt\":\"x\"}\n", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}\n"};
    static const char *const says[] = {"mixed.jsonl:4: \"completion\" is missing", "mixed.jsonl:4: the last of \"messages\""};
    for (int i = 0; i < 2; i++) {
        char text[2048];
        struct rt_doctor d = {.student = STUDENT};
        snprintf(text, sizeof text, "%s%s", lines, odd[i]);
        d.data = put(test_tmp("mixed"), "mixed.jsonl", text, strlen(text));
        open_doctor(&d);
        expect(&d, RT_CHECK_FAIL, "data.lines", says[i]);
        assert_null(find(&d, "data.prompts"));
        close_doctor(&d);
        snprintf(text, sizeof text, "%s%s", odd[0], odd[1]);
        d = (struct rt_doctor){.student = STUDENT, .data = put(test_tmp("mixed"), "prompts.jsonl", text, strlen(text))};
        open_doctor(&d);
        expect(&d, RT_CHECK_PASS, "data.prompts", "2 prompts, no completions");
        close_doctor(&d);
    }
}

/* A run stands for the model in it; one without a model is told apart from a directory that is none. */
static void a_run_is_a_student(void **state)
{
    (void)state;
    static const char *const names[] = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"};
    char model[600];
    const char *run = test_tmp("a-run");
    put(run, "run.json", "{}", 2);
    put(run, "config.json", "{\"command\": \"train\"}", 20);
    struct rt_doctor d = {.student = run};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "student.config", "a run without a model yet");
    close_doctor(&d);
    snprintf(model, sizeof model, "%s/model", run);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        copy_file(STUDENT, model, names[i]);
    d = (struct rt_doctor){.student = run, .data = put(test_tmp("sound"), "d.jsonl", lines, strlen(lines)), .forward = true};
    open_doctor(&d);
    assert_int_equal(d.checks.count[RT_CHECK_FAIL] + d.checks.count[RT_CHECK_WARN], 0);
    expect(&d, RT_CHECK_PASS, "student.shift", "next token");
    close_doctor(&d);
}

static void rescoring_needs_teacher_and_shards(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *const without_shards[] = {"--teacher", TEACHER, "--rescore", "10", NULL}, *const without_teacher[] = {"--shards", "x", "--rescore", "10", NULL};
    assert_status(test_command(&rt_cmd_doctor, without_shards, &err), USAGE);
    assert_status(test_command(&rt_cmd_doctor, without_teacher, &err), USAGE);
}

static void too_little_memory_fails(void **state)
{
    (void)state;
    struct rt_doctor d = {.teacher = TEACHER, .student = STUDENT};
    open_doctor_on(&d, "cpu", 1 << 20, 16384);
    expect(&d, RT_CHECK_FAIL, "memory.teacher", "--memory");
    expect(&d, RT_CHECK_FAIL, "memory.student", "--memory");
    close_doctor(&d);
}

/* A student's memory passes where `train --dry-run` plans, and fails where it does not. */
static void memory_is_planned_as_train_does(void **state)
{
    (void)state;
    const char *data = put(test_tmp("sound"), "d.jsonl", lines, strlen(lines));
    int level[2] = {0, 0};
    for (int64_t mib = 5; mib < 12; mib++) {
        struct rt_err err = {0};
        char memory[32];
        snprintf(memory, sizeof memory, "%ldM", (long)mib);
        const char *const train[] = {"--student", STUDENT, "--data", data, "--out", test_tmp("never"), "--device", "cpu", "--memory", memory, "--dry-run",
                                     NULL};
        const bool runs = test_command(&rt_cmd_train, train, &err) == RT_OK;
        struct rt_doctor d = {.student = STUDENT, .data = data};
        open_doctor_on(&d, "cpu", mib << 20, 16384);
        expect(&d, runs ? RT_CHECK_PASS : RT_CHECK_FAIL, "memory.student", runs ? "training takes" : "M or more");
        level[runs]++;
        close_doctor(&d);
    }
    assert_true(level[0] > 0 && level[1] > 0);
}

/* ---- shards ---- */
enum { TOKENS = 40, K = 4, IDS = 50 };
struct made {
    struct rt_rows rows;
    uint32_t ids[TOKENS], position[TOKENS], top[TOKENS * K], next[TOKENS], rank[TOKENS];
    uint8_t mask[TOKENS];
    float logits[TOKENS * K], lse[TOKENS], logprob[TOKENS];
};

/* A teacher that is sure of token i + 1 + off: 0 is right, -1 and 1 are shifted by one. */
static void make_rows(struct made *m, int off)
{
    m->rows = (struct rt_rows){.n_tokens = TOKENS, .ids = m->ids, .loss_mask = m->mask, .n_rows = TOKENS - 1, .k = K, .n_lse = 1, .position = m->position,
                               .topk_ids = m->top, .topk_logits = m->logits, .lse = m->lse, .next_id = m->next, .next_logprob = m->logprob, .next_rank = m->rank,
                               .source_line = 1};
    for (int i = 0; i < TOKENS; i++) {
        m->ids[i] = (uint32_t)(7 * i % IDS); /* neighbours differ */
        m->mask[i] = i > 0;
    }
    for (int i = 0; i + 1 < TOKENS; i++) {
        const int at = i + 1 + off;
        const uint32_t sure = m->ids[at < 0 ? 0 : at >= TOKENS ? TOKENS - 1 : at], next = m->ids[i + 1];
        /* logit 5 for the one it is sure of, 0 for all others: lse = log(e^5 + 49) */
        const float lse = logf(expf(5) + IDS - 1);
        uint32_t id = 0;
        m->top[i * K] = sure;
        m->logits[i * K] = 5;
        for (int j = 1; j < K; j++, id++) {
            id += id == sure;
            m->top[i * K + j] = id;
            m->logits[i * K + j] = 0;
        }
        m->position[i] = (uint32_t)i;
        m->lse[i] = lse;
        m->next[i] = next;
        m->logprob[i] = (next == sure ? 5 : 0) - lse;
        m->rank[i] = next == sure ? 0 : next < sure ? next + 1 : next;
    }
    rt_rows_key(m->ids, TOKENS, m->rows.key);
}

static void write_shards(const char *dir, int off, const char *tokenizer)
{
    struct rt_err err = {0};
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct made m;
    const struct rt_shard_options o = {0};
    struct rt_row_identity id = {.vocab_size = IDS, .n_ids = IDS, .top_k = K, .n_lse = 1, .lse_temperature = {1}};
    memset(id.teacher_sha256, 'a', 64);
    snprintf(id.tokenizer_sha256, sizeof id.tokenizer_sha256, "%s", tokenizer);
    strcpy(id.teacher_name, "t");
    strcpy(id.mode, "w8a16/f32/ref");
    make_rows(&m, off);
    assert_ok(rt_shard_sink_open(dir, &id, &o, &s, &sink, &resume, &err));
    assert_ok(sink.put(sink.self, &m.rows, &err));
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(s);
}

static void shards_that_are_shifted_fail(void **state)
{
    (void)state;
    const int off[] = {0, -1, 1};
    for (int i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "shift%d", i);
        const char *dir = test_tmp(name);
        write_shards(dir, off[i], "");
        struct rt_doctor d = {.shards = dir};
        open_doctor(&d);
        expect(&d, RT_CHECK_PASS, "shards.integrity", "checksum");
        expect(&d, RT_CHECK_PASS, "shards.next", "39 rows");
        expect(&d, off[i] == 0 ? RT_CHECK_PASS : RT_CHECK_FAIL, "shards.shift", off[i] == 0 ? "next token" : "shifted");
        close_doctor(&d);
    }
}

static void the_shift_check(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_doctor d = {0};
    const struct rt_shift_sums right = {-100, -500, -400, -900, -800, 100}, shifted = {-200, -100, -500, -100, -800, 100}, ignorant = {-700, -600, -600, -690, -690, 100},
                               open = {-300, -200, -400, -800, -800, 100}, few = {-1, -9, -9, -9, -9, 3},
                               none = {NAN, NAN, NAN, NAN, NAN, 100};
    assert_ok(rt_shift_check(&d, "a", &right, 1000, &err));
    assert_ok(rt_shift_check(&d, "b", &shifted, 1000, &err));
    assert_ok(rt_shift_check(&d, "c", &ignorant, 1000, &err)); /* chance is -6.9 */
    assert_ok(rt_shift_check(&d, "d", &few, 1000, &err));
    assert_ok(rt_shift_check(&d, "e", &open, 1000, &err)); /* the bound leaves it open, the estimate does not accuse */
    assert_ok(rt_shift_check(&d, "f", &none, 1000, &err));
    expect(&d, RT_CHECK_PASS, "a", "");
    expect(&d, RT_CHECK_FAIL, "b", "shifted");
    expect(&d, RT_CHECK_WARN, "c", "cannot be told");
    expect(&d, RT_CHECK_WARN, "d", "too few");
    expect(&d, RT_CHECK_WARN, "e", "cannot be told");
    expect(&d, RT_CHECK_FAIL, "f", "not all finite");
    rt_checks_free(&d.checks);
}

/* The bound: what is stored is known, what is not is at most the least that is. */
static void bounds_of_log_probabilities(void **state)
{
    (void)state;
    struct made m;
    make_rows(&m, 0);
    double most, about;
    rt_row_logprob(&m.rows, 3, 0, IDS, m.ids[4], &most, &about);
    assert_true(fabs(most - m.logprob[3]) < 1e-6 && most == about);
    rt_row_logprob(&m.rows, 3, 0, IDS, 49, &most, &about); /* all unstored ids have logit 0 here, so the average is exact */
    assert_true(fabs(most + m.lse[3]) < 1e-6 && fabs(about + m.lse[3]) < 1e-5);
    struct rt_shift_sums s = {0};
    rt_shift_add(&s, &m.rows, 0, IDS);
    assert_int_equal(s.rows, TOKENS - 2); /* the last row has nothing after next */
    assert_true(s.next > s.current && s.next > s.after);
}

static void damaged_or_foreign_shards_fail(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char path[4096], other[65];
    const char *dir = test_tmp("foreign");
    memset(other, 'f', 64);
    other[64] = '\0';
    write_shards(dir, 0, other);
    struct rt_doctor d = {.student = STUDENT, .shards = dir};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "shards.tokenizer", "ffffffffffff");
    expect(&d, RT_CHECK_FAIL, "shards.tokenizer", "retort retarget");
    close_doctor(&d);
    const char *bare = test_tmp("bare");
    copy_file(STUDENT, bare, "config.json");
    copy_file(STUDENT, bare, "model.safetensors");
    d = (struct rt_doctor){.student = bare, .shards = dir};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "shards.tokenizer", "--tokenizer DIR");
    close_doctor(&d);
    write_shards(test_tmp("nameless"), 0, "");
    d = (struct rt_doctor){.student = STUDENT, .shards = test_tmp("nameless")};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "shards.tokenizer", "name no tokenizer");
    close_doctor(&d);
    d = (struct rt_doctor){.teacher = TEACHER, .shards = dir};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "shards.teacher", "aaaaaaaaaaaa");
    close_doctor(&d);
    snprintf(path, sizeof path, "%s/rows-000000.msgpack", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, &b, &err));
    b.data[b.len / 2] ^= 1;
    put(dir, "rows-000000.msgpack", b.data, b.len);
    d = (struct rt_doctor){.shards = dir};
    open_doctor(&d);
    expect(&d, RT_CHECK_FAIL, "shards.integrity", "damaged");
    close_doctor(&d);
    rt_buf_free(&b);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(what_retargeting_would_leave),
    cmocka_unit_test(a_sound_pair_passes), cmocka_unit_test(a_vocabulary_that_does_not_fit_fails), cmocka_unit_test(another_tokenizer_is_told),
    cmocka_unit_test(a_template_that_is_not_known_fails), cmocka_unit_test(bad_data_fails), cmocka_unit_test(prompts_among_lines_fail),
    cmocka_unit_test(a_run_is_a_student), cmocka_unit_test(rescoring_needs_teacher_and_shards), cmocka_unit_test(too_little_memory_fails),
    cmocka_unit_test(memory_is_planned_as_train_does),
    cmocka_unit_test(shards_that_are_shifted_fail), cmocka_unit_test(the_shift_check), cmocka_unit_test(bounds_of_log_probabilities),
    cmocka_unit_test(damaged_or_foreign_shards_fail),
};
RT_SUITE(doctor, tests)
