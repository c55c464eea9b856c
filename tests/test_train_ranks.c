/* Training runs of several processes on one machine: the losses of one process, the same bytes after an interrupt, and no hang where one is lost. */
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/io.h"
#include "core/log.h"
#include "distill/run_record.h"
#include "tests/rank_fixture.h"
#include "tests/train_command.h"

enum { MAX_RANKS = 3 };

/* What happens to one rank. */
struct fate {
    int rank;          /* -1: to none */
    int stop_at, kill_at; /* questions whether to stop, a step each; kill_at: SIGKILL */
    const char *block;    /* a file that is made when it stops: no checkpoint can take that name */
    const char *extra[3]; /* options of that rank alone */
};

static int asked, listened; /* listened: sockets that did before the command, inherited */
static struct fate mine;

static int listening(void)
{
    int sockets = 0;
    for (int fd = 0; fd < 256; fd++) {
        int on = 0;
        socklen_t n = sizeof on;
        sockets += getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &n) == 0 && on != 0;
    }
    return sockets;
}

static bool stop(void *self)
{
    (void)self;
    if (listening() > listened) /* while the ranks meet */
        return false;
    asked++;
    if (mine.kill_at > 0 && asked == mine.kill_at)
        raise(SIGKILL);
    if (mine.block != NULL && asked == mine.stop_at)
        rt_publish_bytes(mine.block, "", 0, NULL);
    return mine.stop_at > 0 && asked >= mine.stop_at;
}

static void environment(int rank, int size, int port)
{
    char text[16];
    const char *const names[] = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"};
    const int values[] = {rank, rank, size, port};
    for (int i = 0; i < 4; i++) {
        snprintf(text, sizeof text, "%d", values[i]);
        setenv(names[i], text, 1);
    }
    setenv("MASTER_ADDR", "127.0.0.1", 1);
}

/* In a child: the command; its last words go to the file said. Does not return. */
static void be_rank(int rank, int size, int port, const char *const *args, const struct fate *fate, const char *said)
{
    const struct rt_opt *const tables[] = {rt_cmd_train.options, rt_common_options()};
    const char *all[64];
    int n = 0;
    struct rt_positionals pos = {0};
    struct rt_log log;
    struct rt_err err = {0};
    void *values = calloc(1, rt_cmd_train.values_size);
    for (; args[n] != NULL; n++)
        all[n] = args[n];
    mine = (struct fate){.rank = -1};
    asked = 0;
    listened = listening();
    if (fate != NULL && fate->rank == rank) {
        mine = *fate;
        for (int i = 0; i < 3 && fate->extra[i] != NULL; i++)
            all[n++] = fate->extra[i];
    }
    environment(rank, size, port);
    rt_log_init(&log, open_memstream(&(char *){NULL}, &(size_t){0}), RT_LOG_INFO);
    struct rt_context ctx = {.log = &log, .command = &rt_cmd_train, .stop = stop};
    enum rt_status st = rt_options_parse(tables, 2, n, (char *const *)(uintptr_t)all, values, &pos, NULL, &err);
    test_on_cpu(values);
    if (st == RT_OK)
        st = rt_cmd_train.run(&ctx, values, &pos, &err);
    rt_publish_bytes(said, err.msg, strlen(err.msg), NULL);
    _exit((int)st);
}

/* Runs `size` ranks; status [size] of each, 128 where a signal ended it, -1 where it did not end within 30 seconds; said [size] their errors. */
static void run_ranks(int size, const char *const *args, const struct fate *fate, int *status, char said[MAX_RANKS][600])
{
    struct rt_err err = {0};
    pid_t pid[MAX_RANKS];
    char file[MAX_RANKS][600];
    const int port = rk_free_port();
    int left = size;
    fflush(stdout);
    for (int i = 0; i < size; i++) {
        char name[32];
        snprintf(name, sizeof name, "ranks-said-%d", i);
        snprintf(file[i], sizeof file[i], "%s", test_tmp(name));
        unlink(file[i]);
        status[i] = -1;
        pid[i] = fork();
        if (pid[i] == 0)
            be_rank(i, size, port, args, fate, file[i]);
    }
    for (const double end = rt_now() + 30; left > 0 && rt_now() < end; usleep(2000))
        for (int i = 0; i < size; i++) {
            int how;
            if (status[i] < 0 && waitpid(pid[i], &how, WNOHANG) == pid[i]) {
                status[i] = WIFEXITED(how) ? WEXITSTATUS(how) : 128;
                left--;
            }
        }
    for (int i = 0; i < size; i++) {
        struct rt_buf b = {0};
        if (status[i] < 0) {
            kill(pid[i], SIGKILL);
            waitpid(pid[i], NULL, 0);
        }
        said[i][0] = '\0';
        if (rt_path_exists(file[i]) && rt_file_read_all(file[i], 1 << 16, &b, &err) == RT_OK)
            snprintf(said[i], 600, "%.*s", (int)b.len, b.data);
        rt_buf_free(&b);
    }
}

static void run_well(int size, const char *const *args)
{
    int status[MAX_RANKS];
    char said[MAX_RANKS][600];
    run_ranks(size, args, NULL, status, said);
    for (int i = 0; i < size; i++)
        if (status[i] != RT_OK)
            fail_msg("rank %d of %d: status %d: %s", i, size, status[i], said[i]);
}

#define RECIPE "--student", files.student, "--data", files.shards, "--data", files.lines, "--w-ce", "0.5", "--w-kl", "0.5", "--kd-temperature", "2", "--batch-tokens", "80", \
    "--lr", "3e-3", "--weight-decay", "0.1", "--w-feature", "0.1", "--layer-map", "1:1,final:final", "--rank-timeout", "20", "--threads", "1", "--grad-norms", "50"

TF_FILES("ranks")

/* The greatest relative difference of a member over the lines of two runs' metrics; *n lines. */
static double worst(const char *a, const char *b, const char *key, int *n)
{
    struct rt_buf x = tf_read(a, "metrics.jsonl"), y = tf_read(b, "metrics.jsonl");
    char *save_x = NULL, *save_y = NULL, *p = strtok_r(x.data, "\n", &save_x), *q = strtok_r(y.data, "\n", &save_y);
    double most = 0;
    for (*n = 0; p != NULL && q != NULL; ++*n, p = strtok_r(NULL, "\n", &save_x), q = strtok_r(NULL, "\n", &save_y)) {
        struct rt_err err = {0};
        struct rt_json *u = NULL, *v = NULL;
        double s = 0, t = 0;
        assert_ok(rt_json_parse(p, strlen(p), a, &u, &err));
        assert_ok(rt_json_parse(q, strlen(q), b, &v, &err));
        assert_int_equal(rt_json_as_double(rt_json_get(u, key), &s), rt_json_as_double(rt_json_get(v, key), &t));
        most = fmax(most, fabs(s - t) / fmax(fabs(s), 1e-9));
        rt_json_free(u);
        rt_json_free(v);
    }
    assert_true(p == NULL && q == NULL);
    rt_buf_free(&x);
    rt_buf_free(&y);
    return most;
}

/* 100 steps on one, two and three ranks from the same data in the same order. What differs is the order of float32 sums, which AdamW's division by
 * sqrt(v) may blow up where a gradient is near 0: the same within 1e-3. Counts are equal. */
static void test_equal(void **state)
{
    (void)state;
    static const char *const close[] = {"loss", "ce", "kl", "feature", "teacher_mass", "student_mass", "grad_norm", "grad_norm_kl"},
                             *const equal[] = {"step", "targets", "tokens", "kl_rows", "lr", "epoch"};
    const char *out[MAX_RANKS + 1] = {NULL, test_tmp("ranks-one"), test_tmp("ranks-two"), test_tmp("ranks-three")};
    int n;
    for (int size = 1; size <= MAX_RANKS; size++)
        run_well(size, ARGS(RECIPE, "--steps", "100", "--eval-data", files.lines, "--out", out[size]));
    for (int size = 2; size <= MAX_RANKS; size++) {
        for (size_t i = 0; i < sizeof close / sizeof close[0]; i++) {
            const double d = worst(out[1], out[size], close[i], &n);
            if (!(d < 1e-3))
                fail_msg("%s on %d ranks is off by %g", close[i], size, d);
        }
        for (size_t i = 0; i < sizeof equal / sizeof equal[0]; i++)
            assert_true(worst(out[1], out[size], equal[i], &n) == 0);
        assert_int_equal(n, 100);
    }
    struct rt_buf eval = tf_read(out[3], RT_EVAL_FILE);
    n = 0;
    for (size_t i = 0; i < eval.len; i++)
        n += eval.data[i] == '\n';
    assert_int_equal(n, 2); /* steps 0 and 100: one rank writes */
    rt_buf_free(&eval);
}

static void assert_same_file(const char *a, const char *b, const char *name)
{
    struct rt_buf x = tf_read(a, name), y = tf_read(b, name);
    assert_int_equal(x.len, y.len);
    assert_memory_equal(x.data, y.data, x.len);
    rt_buf_free(&x);
    rt_buf_free(&y);
}

/* Any rank may be asked to stop: all save and stop, and go on to the same bytes. A checkpoint of two ranks serves one. */
static void test_resume(void **state)
{
    (void)state;
    const char *whole = test_tmp("ranks-whole"), *parts = test_tmp("ranks-parts");
    int status[MAX_RANKS], n;
    char said[MAX_RANKS][600];
    run_well(2, ARGS(RECIPE, "--steps", "12", "--save-every", "4", "--out", whole));
    run_ranks(2, ARGS(RECIPE, "--steps", "12", "--save-every", "4", "--out", parts), &(struct fate){.rank = 1, .stop_at = 6}, status, said);
    assert_true(status[0] == RT_INTERRUPTED && status[1] == RT_INTERRUPTED);
    run_well(2, ARGS(RECIPE, "--steps", "12", "--save-every", "4", "--out", parts));
    assert_same_file(whole, parts, "model/model.safetensors");
    assert_same_file(whole, parts, "ckpt-00000012/adam_v.safetensors");
    assert_same_file(whole, parts, "ckpt-00000012/projector_m.safetensors");
    assert_true(worst(whole, parts, "loss", &n) == 0 && n == 12);
    const char *fewer = test_tmp("ranks-fewer");
    run_ranks(2, ARGS(RECIPE, "--steps", "12", "--save-every", "4", "--out", fewer), &(struct fate){.rank = 0, .stop_at = 6}, status, said);
    assert_int_equal(status[0], RT_INTERRUPTED);
    run_well(1, ARGS(RECIPE, "--steps", "12", "--save-every", "4", "--out", fewer));
    assert_true(worst(whole, fewer, "loss", &n) < 1e-3 && n == 12);
}

/* No rank says that it saved before rank 0 has the checkpoint in place: where that fails last, at the name, all fail. */
static void test_unsaved(void **state)
{
    (void)state;
    const char *out = test_tmp("ranks-unsaved");
    char block[600];
    int status[MAX_RANKS];
    char said[MAX_RANKS][600];
    snprintf(block, sizeof block, "%s/ckpt-00000005", out);
    run_ranks(2, ARGS(RECIPE, "--steps", "12", "--out", out), &(struct fate){.rank = 1, .stop_at = 6, .block = block}, status, said);
    assert_true(rt_path_exists(block) && !rt_path_is_dir(block));
    assert_int_equal(status[0], RT_IO);
    assert_int_equal(status[1], RT_IO);
    assert_non_null(strstr(said[0], "ckpt-00000005"));
    assert_non_null(strstr(said[1], "rank 0 of 2"));
    assert_non_null(strstr(said[1], "it failed:"));
}

/* A rank that is killed ends the others with an error that says so; the same command goes on from the last checkpoint. */
static void test_killed(void **state)
{
    (void)state;
    const char *out = test_tmp("ranks-killed");
    int status[MAX_RANKS];
    char said[MAX_RANKS][600];
    for (int rank = 0; rank < 2; rank++) {
        run_ranks(3, ARGS(RECIPE, "--steps", "12", "--save-every", "4", "--out", out), &(struct fate){.rank = rank, .kill_at = 6 - 2 * rank}, status, said);
        for (int i = 0; i < 3; i++)
            if (i == rank)
                assert_int_equal(status[i], 128);
            else if (status[i] != RT_IO || strstr(said[i], "rank") == NULL)
                fail_msg("rank %d of 3, when rank %d is killed: status %d: %s", i, rank, status[i], said[i]);
    }
    run_well(2, ARGS(RECIPE, "--steps", "12", "--save-every", "4", "--out", out));
}

/* Refusals of one rank end all of them: another recipe, a directory of another run, more ranks than meet. */
static void test_refused(void **state)
{
    (void)state;
    const char *out = test_tmp("ranks-refused"), *whole = test_tmp("ranks-whole");
    int status[MAX_RANKS];
    char said[MAX_RANKS][600];
    run_ranks(2, ARGS(RECIPE, "--steps", "3", "--rank-timeout", "2", "--out", out), &(struct fate){.rank = 1, .extra = {"--beta2", "0.9"}}, status, said);
    assert_int_equal(status[1], RT_REFUSED);
    assert_non_null(strstr(said[1], "another run"));
    assert_int_equal(status[0], RT_IO);
    assert_non_null(strstr(said[0], "another run"));
    assert_false(rt_path_exists(out));
    run_ranks(2, ARGS(RECIPE, "--steps", "13", "--out", whole), NULL, status, said);
    assert_int_equal(status[0], RT_REFUSED);
    assert_int_equal(status[1], RT_IO);
    assert_non_null(strstr(said[1], "rank 0 of 2"));
    assert_non_null(strstr(said[1], "it failed:"));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup(test_equal, set_up), cmocka_unit_test_setup(test_resume, set_up), cmocka_unit_test_setup(test_unsaved, set_up),
    cmocka_unit_test_setup(test_killed, set_up),
    cmocka_unit_test_setup_teardown(test_refused, set_up, tear_down),
};
RT_SUITE(train_ranks, tests)
