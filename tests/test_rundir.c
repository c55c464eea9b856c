#include "tests/suite.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/io.h"
#include "core/rng.h"
#include "formats/checkpoint.h"
#include "formats/rundir.h"

enum { N = 600 };

/* A checkpoint whose contents are a function of its step. */
static enum rt_status save(const char *dir, int64_t step, int keep, struct rt_err *err)
{
    enum rt_status st;
    struct rt_ckpt_writer *w = NULL;
    struct rt_json *v = NULL;
    const struct rt_tensor_decl decl[] = {{"w", RT_F32, 2, {N / 2, 2}}, {"b", RT_U8, 1, {4}}};
    float data[N];
    for (int i = 0; i < N; i++)
        data[i] = (float)(step * 1000 + i);
    RT_TRY(rt_ckpt_begin(dir, step, &w, err));
    RT_TRY(rt_ckpt_tensors(w, "model.safetensors", decl, 2, err));
    RT_TRY(rt_ckpt_put(w, data, sizeof data, err));
    RT_TRY(rt_ckpt_put(w, data, 4, err));
    RT_TRY(rt_ckpt_tensors(w, "optimizer.safetensors", decl, 1, err));
    RT_TRY(rt_ckpt_put(w, data, sizeof data, err));
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_int(v, "step", step, err));
    RT_TRY(rt_ckpt_json(w, "state.json", v, err));
    RT_TRY(rt_ckpt_commit(w, keep, err));
out:
    rt_json_free(v);
    rt_ckpt_writer_free(w);
    return st;
}

static void check_contents(const struct rt_ckpt *c)
{
    struct rt_err err = {0};
    struct rt_tensors *t = NULL;
    struct rt_json *v = NULL;
    char path[4200];
    float data[N];
    int64_t step;
    snprintf(path, sizeof path, "%s/model.safetensors", c->path);
    assert_ok(rt_tensors_open(path, &t, &err));
    assert_ok(rt_tensors_read(t, rt_tensors_find(t, "w"), data, &err));
    assert_true(data[7] == (float)(c->step * 1000 + 7));
    rt_tensors_free(t);
    snprintf(path, sizeof path, "%s/state.json", c->path);
    assert_ok(rt_json_load(path, 1000, &v, &err));
    assert_ok(rt_json_int(v, "step", c->step, c->step, &step, &err));
    rt_json_free(v);
}

static void checkpoints(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_ckpt c;
    char **names;
    size_t n;
    const char *dir = test_tmp("rd-ckpt");
    assert_ok(rt_ckpt_latest(dir, NULL, &c, &err));
    assert_int_equal(c.step, -1);
    for (int step = 10; step <= 40; step += 10)
        assert_ok(save(dir, step, 2, &err));
    assert_ok(rt_ckpt_latest(dir, NULL, &c, &err));
    assert_int_equal(c.step, 40);
    check_contents(&c);
    assert_ok(rt_list_dir(dir, &names, &n, &err));
    assert_int_equal(n, 2); /* two are kept, no temporary */
    assert_string_equal(names[0], "ckpt-00000030");
    rt_names_free(names, n);
    assert_ok(save(dir, 40, 1, &err)); /* replaced; fewer than two are never kept */
    assert_ok(rt_ckpt_latest(dir, NULL, &c, &err));
    check_contents(&c);
    assert_ok(save(dir, 35, 2, &err)); /* a resume from 30 gave up 40 */
    assert_ok(rt_list_dir(dir, &names, &n, &err));
    assert_int_equal(n, 2);
    assert_string_equal(names[1], "ckpt-00000035");
    rt_names_free(names, n);
    assert_ok(save(dir, 123456789, 2, &err)); /* more digits than the name is padded to */
    assert_ok(rt_ckpt_latest(dir, NULL, &c, &err));
    assert_int_equal(c.step, 123456789);
    struct rt_ckpt_writer *w = NULL;
    assert_ok(rt_ckpt_begin(dir, 50, &w, &err));
    assert_ok(rt_ckpt_bytes(w, "a", "x", 1, &err));
    assert_status(rt_ckpt_bytes(w, "a", "x", 1, &err), USAGE);
    assert_status(rt_ckpt_bytes(w, "../a", "x", 1, &err), USAGE);
    assert_status(rt_ckpt_bytes(w, "MANIFEST", "x", 1, &err), USAGE);
    assert_status(rt_ckpt_put(w, "x", 1, &err), USAGE);
    rt_ckpt_writer_free(w); /* not committed: leaves nothing */
    assert_ok(rt_list_dir(dir, &names, &n, &err));
    assert_int_equal(n, 2);
    rt_names_free(names, n);
}

/* Every file of the newest checkpoint damaged in turn: the one before is used, and a warning names the file. */
static void fall_back(void **state)
{
    (void)state;
    static const char *const files[] = {"model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST"};
    struct rt_err err = {0};
    struct rt_ckpt c;
    char path[4200], other[4200];
    const char *dir = test_tmp("rd-fall");
    assert_ok(save(dir, 1, 2, &err));
    assert_ok(save(dir, 2, 2, &err));
    for (int f = 0; f < 4; f++)
        for (int how = 0; how < 5; how++) {
            struct rt_buf whole = {0};
            char *said = NULL;
            size_t said_len;
            struct rt_log log;
            snprintf(path, sizeof path, "%s/ckpt-00000002/%s", dir, files[f]);
            snprintf(other, sizeof other, "%s/ckpt-00000001/%s", dir, files[f]);
            assert_ok(rt_file_read_all(path, 1 << 20, &whole, &err));
            if (how == 0) { /* a bit */
                whole.data[whole.len / 2] ^= 4;
                assert_ok(rt_publish_bytes(path, whole.data, whole.len, &err));
                whole.data[whole.len / 2] ^= 4;
            } else if (how == 1) { /* cut */
                assert_ok(rt_publish_bytes(path, whole.data, whole.len - 1, &err));
            } else if (how == 2) { /* longer */
                assert_int_equal(truncate(path, (off_t)whole.len + 1), 0);
            } else if (how == 3) { /* gone */
                assert_int_equal(unlink(path), 0);
            } else { /* that of another step */
                struct rt_buf old = {0};
                assert_ok(rt_file_read_all(other, 1 << 20, &old, &err));
                assert_ok(rt_publish_bytes(path, old.data, old.len, &err));
                rt_buf_free(&old);
            }
            FILE *out = open_memstream(&said, &said_len);
            rt_log_init(&log, out, RT_LOG_WARN);
            assert_ok(rt_ckpt_latest(dir, &log, &c, &err));
            fclose(out);
            if (c.step != 1 || strstr(said, how == 4 && f == 3 ? "model.safetensors" : files[f]) == NULL)
                fail_msg("%s damaged (%d): step %d, '%s'", files[f], how, (int)c.step, said);
            check_contents(&c);
            free(said);
            assert_ok(rt_publish_bytes(path, whole.data, whole.len, &err));
            rt_buf_free(&whole);
        }
    assert_ok(rt_ckpt_latest(dir, NULL, &c, &err));
    assert_int_equal(c.step, 2);
    /* whole checkpoints that changed places, and no good one at all */
    snprintf(path, sizeof path, "mv %s/ckpt-00000001 %s/x && mv %s/ckpt-00000002 %s/ckpt-00000001 && mv %s/x %s/ckpt-00000002", dir, dir, dir,
             dir, dir, dir);
    assert_int_equal(system(path), 0);
    assert_status(rt_ckpt_latest(dir, NULL, &c, &err), FORMAT);
}

static void manifest_bits(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf whole = {0};
    char path[4300], dir[4200];
    int64_t step;
    assert_ok(save(test_tmp("rd-bits"), 3, 2, &err));
    snprintf(dir, sizeof dir, "%s/ckpt-00000003", test_tmp("rd-bits"));
    snprintf(path, sizeof path, "%s/MANIFEST", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, &whole, &err));
    const int fd = open(path, O_RDWR);
    for (size_t bit = 0; bit < whole.len * 8; bit++) {
        const char c = (char)(whole.data[bit / 8] ^ 1 << bit % 8);
        assert_int_equal(pwrite(fd, &c, 1, (off_t)(bit / 8)), 1);
        assert_status(rt_ckpt_verify(dir, &step, &err), FORMAT);
        assert_int_equal(pwrite(fd, &whole.data[bit / 8], 1, (off_t)(bit / 8)), 1);
    }
    assert_ok(rt_ckpt_verify(dir, &step, &err));
    for (size_t n = whole.len; n-- > 0;) {
        assert_int_equal(ftruncate(fd, (off_t)n), 0);
        assert_status(rt_ckpt_verify(dir, &step, &err), FORMAT);
    }
    close(fd);
    rt_buf_free(&whole);
}

/* kill -9 at any time: the newest that is there verifies, steps never go back, nothing is left behind in the end. */
static void killed(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_ckpt c;
    const char *dir = test_tmp("rd-kill");
    int64_t before = -1;
    char **names;
    size_t n;
    for (int i = 0; i < 30; i++) {
        const pid_t child = fork();
        if (child == 0) {
            for (int64_t step = before + 1;; step++)
                if (save(dir, step, 2, NULL) != RT_OK)
                    _exit(1);
        }
        usleep((useconds_t)(rt_rng_u64(11, 0, (uint64_t)i) % 6000));
        kill(child, SIGKILL);
        int status = 0;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status));
        assert_ok(rt_ckpt_latest(dir, NULL, &c, &err));
        assert_true(c.step >= before);
        before = c.step;
        if (c.step >= 0)
            check_contents(&c);
    }
    assert_ok(save(dir, before + 1, 2, &err));
    assert_ok(rt_list_dir(dir, &names, &n, &err));
    assert_true(n <= 2 && strncmp(names[0], "ckpt-", 5) == 0);
    rt_names_free(names, n);
}

static void full_disk(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_ckpt c;
    const char *dir = test_tmp("rd-full");
    assert_ok(save(dir, 1, 2, &err));
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit limit = {1500, 1500};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        _exit(save(dir, 2, 2, &err) == RT_IO ? 0 : 1);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_ok(rt_ckpt_latest(dir, NULL, &c, &err));
    assert_int_equal(c.step, 1);
    char **names;
    size_t n;
    assert_ok(rt_list_dir(dir, &names, &n, &err));
    assert_int_equal(n, 1); /* the temporary is gone */
    rt_names_free(names, n);
}

struct values {
    double lr;
    int64_t steps, threads;
};
static const struct rt_opt table[] = {
    {.name = "lr", .type = RT_OPT_FLOAT, .offset = offsetof(struct values, lr), .def = "0.001"},
    {.name = "steps", .type = RT_OPT_INT, .offset = offsetof(struct values, steps), .def = "6"},
    {.name = "threads", .type = RT_OPT_INT, .offset = offsetof(struct values, threads), .def = "0", .runtime = true},
    {0},
};

static struct rt_json *config(double lr, int64_t steps, int64_t threads)
{
    struct rt_err err = {0};
    struct rt_json *v = NULL;
    const struct rt_opt *const tables[] = {table};
    const struct values values = {lr, steps, threads};
    assert_ok(rt_run_config("train", tables, 1, &values, &v, &err));
    return v;
}

static void run_directory(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_rundir r = {0}, second = {0};
    const char *dir = test_tmp("rd-runs/a");
    struct rt_json *one = config(0.001, 6, 1), *threads = config(0.001, 6, 2), *changed = config(0.002, 7, 1), *line = NULL;
    rt_rundir_close(&r); /* was never opened */
    assert_ok(rt_rundir_open(dir, one, &r, &err));
    assert_false(r.resumed);
    assert_status(rt_rundir_open(dir, one, &second, &err), REFUSED); /* in use */
    assert_ok(rt_json_new_object(&line, &err));
    for (int step = 1; step <= 5; step++) {
        assert_ok(rt_json_set_int(line, "step", step, &err));
        assert_ok(rt_json_set_double(line, "loss", 1.0 / step, &err));
        assert_ok(rt_rundir_metric(&r, line, &err));
    }
    assert_ok(rt_rundir_sync(&r, &err));
    fprintf(r.log_file, "said\n");
    assert_int_equal(write(r.metrics, "{\"step\":6,\"lo", 13), 13); /* a crash */
    rt_rundir_close(&r);
    rt_rundir_close(&r);

    assert_ok(rt_rundir_open(dir, threads, &r, &err)); /* --threads does not count */
    assert_true(r.resumed);
    assert_ok(rt_rundir_truncate(&r, 3, &err));
    assert_ok(rt_json_set_int(line, "step", 4, &err));
    assert_ok(rt_rundir_metric(&r, line, &err));
    rt_rundir_close(&r);
    char path[4200];
    struct rt_buf text = {0};
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, &text, &err));
    assert_string_equal(text.data, "{\"step\":1,\"loss\":1.0}\n{\"step\":2,\"loss\":0.5}\n{\"step\":3,\"loss\":0.3333333333333333}\n"
                                   "{\"step\":4,\"loss\":0.2}\n");
    rt_buf_free(&text);

    assert_int_equal(rt_rundir_open(dir, changed, &r, &err), RT_REFUSED);
    assert_non_null(strstr(err.msg, "options.lr: was \"0.001\", now \"0.002\"\noptions.steps: was \"6\", now \"7\""));
    rt_err_clear(&err);
    assert_ok(rt_rundir_open(dir, one, &r, &err)); /* the refusal did not keep the lock */
    rt_rundir_close(&r);

    /* more differences than a message holds: whole lines, and how many are left out */
    struct rt_json *first = NULL, *other = NULL;
    char key[64];
    assert_ok(rt_json_new_object(&first, &err));
    assert_ok(rt_json_new_object(&other, &err));
    for (int i = 0; i < 12; i++) {
        snprintf(key, sizeof key, "option-with-a-long-name-%02d", i);
        assert_ok(rt_json_set_int(first, key, i, &err));
        assert_ok(rt_json_set_int(other, key, i + 1, &err));
    }
    assert_ok(rt_rundir_open(test_tmp("rd-many"), first, &r, &err));
    rt_rundir_close(&r);
    assert_int_equal(rt_rundir_open(test_tmp("rd-many"), other, &r, &err), RT_REFUSED);
    assert_non_null(strstr(err.msg, "name-06: was 6, now 7\nand 5 more\nuse the same ones"));
    rt_err_clear(&err);
    rt_json_free(first);
    rt_json_free(other);

    const char *home = test_tmp("rd-home");
    assert_ok(rt_mkdirs(home, &err));
    snprintf(path, sizeof path, "%s/letter.txt", home);
    assert_ok(rt_publish_bytes(path, "x", 1, &err));
    assert_status(rt_rundir_open(home, one, &r, &err), REFUSED);
    rt_json_free(one);
    rt_json_free(threads);
    rt_json_free(changed);
    rt_json_free(line);
}

static void config_diff(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_json *a, *b;
    struct rt_buf out = {0};
    bool differ = false;
    /* u was an option that counts */
    const char *x = "{\"a\":1,\"b\":{\"c\":[1,2],\"d\":\"x\"},\"runtime\":{\"t\":1},\"gone\":true,\"options\":{\"u\":1,\"v\":1}}";
    const char *y = "{\"b\":{\"c\":[1,3],\"d\":\"x\"},\"a\":1,\"runtime\":{\"t\":2,\"u\":2},\"new\":null,\"options\":{\"v\":1}}";
    assert_ok(rt_json_parse(x, strlen(x), "x", &a, &err));
    assert_ok(rt_json_parse(y, strlen(y), "y", &b, &err));
    assert_ok(rt_config_diff(a, b, &differ, &out, &err));
    assert_true(differ);
    assert_ok(rt_buf_append(&out, "", 1, &err));
    assert_string_equal(out.data, "b.c: was [1,2], now [1,3]\ngone: was true, now (absent)\nnew: was (absent), now null");
    out.len = 0;
    assert_ok(rt_config_diff(a, a, &differ, &out, &err));
    assert_true(!differ && out.len == 0);
    rt_buf_free(&out);
    rt_json_free(a);
    rt_json_free(b);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(checkpoints), cmocka_unit_test(fall_back),     cmocka_unit_test(manifest_bits), cmocka_unit_test(killed),
    cmocka_unit_test(full_disk),   cmocka_unit_test(run_directory), cmocka_unit_test(config_diff),
};
RT_SUITE(rundir, tests)
