/* Rows leave while the next window is scored: on a device with memory of its own, with everything that can end a run meanwhile. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/io.h"
#include "distill/logits.h"
#include "tests/far_device.h"
#include "tests/suite.h"

#define CASE "tests/data/cases/v3_fp8"
enum { LINES = 12, LENGTH = 9, WINDOW = 18, WINDOWS = LINES / 2 }; /* two sequences a window */

enum { END_AT = 1 };
enum end { NOTHING, FAIL, STOP, KILL };
struct run {
    struct rt_logits_values v;
    struct rt_logits_job j;
    struct rt_context ctx;
    struct rt_log log;
    FILE *chat;
    struct rt_model_dir model;
    struct rt_row_sink real;
    char out[512];
    enum end end;          /* what happens while the rows of window END_AT are put */
    int puts;              /* windows whose rows came */
    bool waits;            /* a window's rows are not put before the next window is under way */
    bool alone;            /* it never was */
    atomic_int asked;      /* how often lanes asked whether to stop: at least once a layer */
};

static const char *data_file(void)
{
    static char path[512];
    struct rt_buf text = {0};
    struct rt_err err = {0};
    for (int i = 0; i < LINES; i++) {
        assert_ok(rt_buf_puts(&text, "{\"input_ids\": [", &err));
        for (int j = 0; j < LENGTH; j++)
            assert_ok(rt_buf_printf(&text, &err, "%s%d", j > 0 ? ", " : "", (i * 13 + j * j + 1) % 96));
        assert_ok(rt_buf_puts(&text, "]}\n", &err));
    }
    snprintf(path, sizeof path, "%s", test_tmp("logits-put.jsonl"));
    assert_ok(rt_publish_bytes(path, text.data, text.len, &err));
    rt_buf_free(&text);
    return path;
}

/* Asks until the window behind number `at` has gone through a layer, and its state is saved: a window asks before each layer, and at its end. */
static int asks(const struct run *r, int at)
{
    return (at + 1) * (r->j.config.layers + 1) + 2;
}

static bool asked(void *self)
{
    struct run *r = self;
    return atomic_fetch_add(&r->asked, 1) + 1 >= asks(r, END_AT) && r->end == STOP;
}

/* 20 seconds are as long as anyone waits. */
static void wait_for_the_next_window(struct run *r, int at)
{
    for (int i = 0; i < 20000 && atomic_load(&r->asked) < asks(r, at); i++)
        usleep(1000);
    r->alone |= atomic_load(&r->asked) < asks(r, at);
}

static enum rt_status put_all(void *self, const struct rt_rows *rows, int64_t n, struct rt_err *err)
{
    struct run *r = self;
    const int at = r->puts++;
    if (r->waits && at < WINDOWS - 1)
        wait_for_the_next_window(r, at);
    if (r->end == FAIL && at == END_AT)
        return rt_fail(err, RT_IO, "no space left for the rows of this test");
    const enum rt_status st = r->real.put_all(r->real.self, rows, n, err);
    if (r->end == KILL && at == END_AT)
        raise(SIGKILL); /* the rows are written, and nothing says so */
    return st;
}

static enum rt_status put(void *self, const struct rt_rows *rows, struct rt_err *err)
{
    return put_all(self, rows, 1, err);
}

static enum rt_status finish(void *self, struct rt_err *err)
{
    struct run *r = self;
    return r->real.finish(r->real.self, err);
}

/* Everything up to the plan. */
static enum rt_status plan(struct run *r, const char *out, int lanes, int64_t memory, struct rt_err *err)
{
    static struct rt_backend far; /* devices borrow their table */
    struct rt_logits_job *j = &r->j;
    enum rt_status st;
    memset(r, 0, sizeof *r);
    far = far_backend();
    far_memory((uint64_t)4 << 30);
    snprintf(r->out, sizeof r->out, "%s", out);
    r->chat = fopen("/dev/null", "w");
    rt_log_init(&r->log, r->chat, RT_LOG_INFO);
    r->ctx = (struct rt_context){.log = &r->log, .stop = asked, .stop_self = r};
    r->v = (struct rt_logits_values){.common = {.threads = 2, .memory = memory, .gpus = lanes, .quiet = true}, .teacher = test_data(CASE), .data = data_file(),
                                     .out = r->out, .cache = "topk=4", .lse = "1,2", .features = "1,final:128", .numerics = "w8a16", .overlong = "drop", .rows = "all",
                                     .part = "0/1", .save_state = "layer", .window = WINDOW, .rows_per_shard = 20};
    *j = (struct rt_logits_job){.ctx = &r->ctx, .v = &r->v, .lanes = lanes};
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->changed, NULL);
    RT_TRY(rt_teacher_config_load(r->v.teacher, &j->config, err));
    RT_TRY(rt_logits_options(j, err));
    j->so.n_ids = 96;
    RT_TRY(rt_alloc((size_t)lanes, sizeof *j->lane, "devices", &j->lane, err));
    for (int i = 0; i < lanes; i++) {
        j->lane[i].j = j;
        j->lane[i].index = i;
        RT_TRY(rt_device_open(&far, &(const struct rt_dev_options){.threads = 1}, &j->lane[i].device, err));
    }
    const struct rt_corpus_options co = {.data = r->v.data, .model = &r->model, .n_ids = j->so.n_ids, .max_length = 64, .n_parts = 1};
    RT_TRY(rt_corpus_open(&co, &j->corpus, err));
    RT_TRY(rt_corpus_survey(j->corpus, &j->survey, err));
    RT_TRY(rt_logits_make_plan(j, err));
out:
    return st;
}

static enum rt_status open_set(struct run *r, struct rt_err *err)
{
    struct rt_logits_job *j = &r->j;
    const struct rt_shard_options so = {.rows_per_shard = r->v.rows_per_shard};
    enum rt_status st;
    RT_TRY(rt_logits_open_teachers(j, err));
    j->id = (struct rt_row_identity){.teacher_name = "far", .mode = "w8a16/f32/far", .vocab_size = j->config.vocab_size, .teacher_layers = j->config.layers, .n_ids = j->so.n_ids,
                                     .top_k = j->so.top_k, .n_lse = j->so.n_lse, .n_features = j->so.n_features};
    snprintf(j->id.teacher_sha256, sizeof j->id.teacher_sha256, "%s", rt_teacher_sha256(j->lane[0].teacher));
    memcpy(j->id.lse_temperature, j->so.lse_temperature, sizeof j->id.lse_temperature);
    memcpy(j->id.feature, j->so.feature, sizeof j->id.feature);
    RT_TRY(rt_shard_sink_open(r->out, &j->id, &so, &j->shards, &r->real, &j->resume, err));
    RT_TRY(rt_expert_load_open(&j->load, r->out, 0, 1, j->config.layers, j->config.experts, err));
    j->sink = (struct rt_row_sink){.self = r, .put = put, .finish = finish, .put_all = put_all};
out:
    return st;
}

static void close_run(struct run *r)
{
    struct rt_logits_job *j = &r->j;
    rt_shard_sink_free(j->shards);
    rt_logits_close(j);
    rt_corpus_close(j->corpus);
    rt_expert_load_close(&j->load);
    pthread_mutex_destroy(&j->lock);
    pthread_cond_destroy(&j->changed);
    fclose(r->chat);
}

enum { PLENTY = 2000 << 20 };

/* One whole attempt; the run is left open where keep says so. */
static enum rt_status attempt(struct run *r, const char *out, int lanes, bool overlap, enum end end, struct rt_err *err)
{
    const bool fresh = !rt_path_is_dir(out); /* what asks are counted from */
    enum rt_status st;
    RT_TRY(plan(r, out, lanes, PLENTY, err));
    assert_true(r->j.overlap); /* the host holds two windows, and there is more than one a device */
    r->j.overlap = overlap;
    r->end = end;
    r->waits = fresh && overlap && lanes == 1; /* several devices' windows are under way at any time */
    st = open_set(r, err);
    if (st == RT_OK)
        st = rt_logits_score(&r->j, err);
out:
    close_run(r);
    return st;
}

static const char *one_after_the_other(void)
{
    static char dir[512];
    struct rt_err err = {0};
    struct run r;
    if (dir[0] != '\0')
        return dir;
    snprintf(dir, sizeof dir, "%s", test_tmp("put-plain"));
    assert_ok(attempt(&r, dir, 1, false, NOTHING, &err));
    assert_int_equal(r.puts, WINDOWS);
    return dir;
}

static void assert_same_set(const char *a, const char *b)
{
    char cmd[2200];
    snprintf(cmd, sizeof cmd, "diff -r -x .lock '%s' '%s'", a, b);
    assert_int_equal(system(cmd), 0);
}

static bool is_there(const char *dir, const char *name)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return rt_path_exists(path);
}

/* The same command again ends with the set of a run that nothing stopped. */
static void ends_well(const char *out)
{
    struct rt_err err = {0};
    struct run r;
    assert_ok(attempt(&r, out, 1, true, NOTHING, &err));
    assert_true(r.puts < WINDOWS); /* something had survived */
    assert_same_set(one_after_the_other(), out);
}

static void the_next_window_goes_on_meanwhile(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct run r;
    for (int lanes = 1; lanes <= 3; lanes++) {
        char name[32], out[512];
        snprintf(name, sizeof name, "put-lanes%d", lanes);
        snprintf(out, sizeof out, "%s", test_tmp(name));
        assert_ok(attempt(&r, out, lanes, true, NOTHING, &err));
        assert_false(r.alone);
        assert_int_equal(r.puts, WINDOWS);
        assert_int_equal(r.j.writer.tokens, LINES * LENGTH);
        assert_same_set(one_after_the_other(), out);
    }
}

/* The least --memory, in MiB, with which a run is planned, or planned with two windows under way. */
static int64_t least_memory(bool overlap)
{
    int64_t no = 64, yes = 400;
    while (yes - no > 1) {
        struct rt_err err = {0};
        struct run r;
        const int64_t mid = (no + yes) / 2;
        const enum rt_status st = plan(&r, test_tmp("put-plan"), 1, mid << 20, &err);
        assert_true(st == RT_OK || st == RT_NOMEM);
        *(st == RT_OK && (!overlap || r.j.overlap) ? &yes : &no) = mid;
        rt_err_clear(&err);
        close_run(&r);
    }
    assert_in_range(yes, 65, 399);
    return yes;
}

/* Where the host has no room for a second window's rows (8 MiB and more: what spilling and saving hold), or there is no second window, one comes after
 * the other. */
static void the_plan_needs_room_for_two(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct run r;
    assert_true(least_memory(true) > least_memory(false));
    assert_ok(plan(&r, test_tmp("put-plan"), 6, PLENTY, &err)); /* a window a device */
    assert_false(r.j.overlap);
    close_run(&r);
}

static void an_error_of_the_writer_ends_the_run(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct run r;
    char out[512];
    for (int lanes = 1; lanes <= 2; lanes++)
        for (int overlap = 0; overlap < 2; overlap++) {
            snprintf(out, sizeof out, "%s", test_tmp(lanes == 1 ? overlap ? "put-fail1" : "put-fail0" : overlap ? "put-fail3" : "put-fail2"));
            assert_int_equal(attempt(&r, out, lanes, overlap, FAIL, &err), RT_IO);
            assert_string_equal(err.msg, "no space left for the rows of this test");
            assert_int_equal(r.puts, END_AT + 1); /* nothing is put behind a gap */
            rt_err_clear(&err);
            assert_false(is_there(out, ".window-000000"));
            assert_true(is_there(out, ".window-000001/state"));
            ends_well(out);
        }
}

static void a_stop_while_rows_are_put(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct run r;
    const char *out = test_tmp("put-stop");
    assert_int_equal(attempt(&r, out, 1, true, STOP, &err), RT_INTERRUPTED);
    assert_non_null(strstr(err.msg, " of window 3; the same command goes on from there"));
    assert_false(r.alone);
    assert_int_equal(r.puts, END_AT + 1); /* its rows are safe; the next window's state is */
    assert_false(is_there(out, ".window-000001"));
    assert_true(is_there(out, ".window-000002/state"));
    ends_well(out);
}

static void killed_while_rows_are_put(void **state)
{
    (void)state;
    char out[512];
    int status;
    snprintf(out, sizeof out, "%s", test_tmp("put-kill"));
    (void)one_after_the_other();
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0) {
        struct rt_err err = {0};
        struct run r;
        (void)attempt(&r, out, 1, true, KILL, &err);
        _exit(1);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    /* the states of both: of the window whose rows were not safe yet, and of the one under way */
    assert_false(is_there(out, ".window-000000"));
    assert_true(is_there(out, ".window-000001/state"));
    assert_true(is_there(out, ".window-000002/state"));
    ends_well(out);
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(the_next_window_goes_on_meanwhile), cmocka_unit_test(the_plan_needs_room_for_two),
                                          cmocka_unit_test(an_error_of_the_writer_ends_the_run), cmocka_unit_test(a_stop_while_rows_are_put),
                                          cmocka_unit_test(killed_while_rows_are_put)};
RT_SUITE(logits_put, tests)
