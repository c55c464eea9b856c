/* Files of work under way: whole or refused; and what a sink of shards holds over a crash. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/io.h"
#include "core/rng.h"
#include "formats/state_file.h"
#include "tests/shard_fixture.h"

/* Two blocks and a rest, put in uneven pieces. */
enum { BYTES = 2 * RT_STATE_BLOCK + 12345 };

static char *some_bytes(void)
{
    char *data = malloc(BYTES);
    assert_non_null(data);
    for (int i = 0; i < BYTES; i++)
        data[i] = (char)rt_rng_u64(7, 0, (uint64_t)i / 8 * 8 + (uint64_t)(i % 3));
    return data;
}

static enum rt_status write_state(const char *path, const char *data, uint64_t bytes, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    struct rt_state_writer *w = NULL;
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_int(v, "layer", 12, err));
    RT_TRY(rt_state_create(path, "test", v, bytes, &w, err));
    for (uint64_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < 1000003 ? bytes - at : 1000003;
        RT_TRY(rt_state_put(w, data + at, n, err));
    }
    RT_TRY(rt_state_commit(w, err));
out:
    rt_state_writer_free(w);
    rt_json_free(v);
    return st;
}

static enum rt_status read_state(const char *path, char *out, uint64_t bytes, struct rt_err *err)
{
    enum rt_status st;
    struct rt_state_reader *r = NULL;
    int64_t layer;
    RT_TRY(rt_state_open(path, "test", &r, err));
    RT_TRY(rt_json_int(rt_state_header(r), "layer", 12, 12, &layer, err));
    RT_TRY(rt_state_read(r, out, bytes / 3, err));
    RT_TRY(rt_state_read(r, out + bytes / 3, bytes - bytes / 3, err));
out:
    rt_state_reader_free(r);
    return st;
}

static void what_was_put_comes_back(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char *data = some_bytes(), *back = malloc(BYTES);
    const char *path = test_tmp("whole.state");
    static const uint64_t sizes[] = {0, 1, RT_STATE_BLOCK - 1, RT_STATE_BLOCK, RT_STATE_BLOCK + 1, BYTES};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        assert_ok(write_state(path, data, sizes[i], &err));
        assert_ok(read_state(path, back, sizes[i], &err));
        assert_memory_equal(data, back, sizes[i]);
        assert_status(read_state(path, back, sizes[i] + 3, &err), FORMAT); /* more than there is */
    }
    struct rt_state_reader *r;
    assert_status(rt_state_open(path, "another", &r, &err), FORMAT);
    free(data);
    free(back);
}

static void poke(const char *path, uint64_t at, int flip)
{
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    fseek(f, (long)at, SEEK_SET);
    const int c = fgetc(f);
    fseek(f, (long)at, SEEK_SET);
    fputc(c ^ flip, f);
    fclose(f);
}

/* A bit anywhere, a byte less, a byte more, two blocks in each other's place: never taken. */
static void damage_is_found(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char *data = some_bytes(), *back = malloc(BYTES), path[512];
    uint64_t size;
    int fd;
    snprintf(path, sizeof path, "%s", test_tmp("bad.state"));
    assert_ok(write_state(path, data, BYTES, &err));
    assert_ok(rt_file_open(path, &fd, &size, &err));
    rt_file_close(fd);
    const uint64_t places[] = {0, 7, 8, 12, 20, 60, 100, 5000, RT_STATE_BLOCK + 60, size / 2, size - 5, size - 1};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        poke(path, places[i], 1 << (i % 8));
        assert_status(read_state(path, back, BYTES, &err), FORMAT);
        poke(path, places[i], 1 << (i % 8));
    }
    assert_ok(read_state(path, back, BYTES, &err));
    const uint64_t block0 = size - BYTES - 3 * 4, block1 = block0 + RT_STATE_BLOCK + 4; /* three blocks, a checksum each */
    char *one = malloc(RT_STATE_BLOCK + 4), *two = malloc(RT_STATE_BLOCK + 4);
    FILE *f = fopen(path, "r+b");
    fseek(f, (long)block0, SEEK_SET);
    assert_int_equal(fread(one, 1, RT_STATE_BLOCK + 4, f), RT_STATE_BLOCK + 4);
    fseek(f, (long)block1, SEEK_SET);
    assert_int_equal(fread(two, 1, RT_STATE_BLOCK + 4, f), RT_STATE_BLOCK + 4);
    fseek(f, (long)block0, SEEK_SET);
    fwrite(two, 1, RT_STATE_BLOCK + 4, f);
    fwrite(one, 1, RT_STATE_BLOCK + 4, f);
    fclose(f);
    assert_status(read_state(path, back, BYTES, &err), FORMAT);
    assert_int_equal(truncate(path, (off_t)size - 1), 0);
    assert_status(read_state(path, back, BYTES, &err), FORMAT);
    assert_int_equal(truncate(path, (off_t)size + 1), 0);
    assert_status(read_state(path, back, BYTES, &err), FORMAT);
    assert_int_equal(truncate(path, 3), 0);
    assert_status(read_state(path, back, BYTES, &err), FORMAT);
    free(one);
    free(two);
    free(data);
    free(back);
}

/* ---- the shard under way ---- */

/* Puts sequences up to n, held after each of `hold` (0: never); ends by kill -9 (stop), or by freeing the sink. Returns where it began. */
static int64_t put_some(const char *dir, int n, int hold, bool crash)
{
    struct rt_err err = {0};
    struct rt_shard_sink *s;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    const struct rt_row_identity id = sf_identity(8);
    assert_ok(rt_shard_sink_open(dir, &id, &sf_small, &s, &sink, &resume, &err));
    for (int i = (int)resume.sequences; i < n; i++) {
        struct sf_made *m = sf_make(&id, i, sf_length_of(i));
        assert_ok(sink.put(sink.self, &m->rows, &err));
        free(m);
        if (hold > 0 && (i + 1) % hold == 0)
            assert_ok(rt_shard_sink_hold(s, &err));
    }
    if (crash)
        kill(getpid(), SIGKILL);
    rt_shard_sink_free(s);
    return resume.sequences;
}

static void crash_after(const char *dir, int n, int hold)
{
    int status;
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        put_some(dir, n, hold, true);
        _exit(1);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status));
}

static void assert_same_set(const char *a, const char *b)
{
    char cmd[2200];
    snprintf(cmd, sizeof cmd, "diff -r -x .lock '%s' '%s' >/dev/null", a, b);
    assert_int_equal(system(cmd), 0);
}

enum { SEQUENCES = 40 };

static void held_sequences_survive(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char whole[512], dir[512], cmd[2200];
    const struct rt_row_identity id = sf_identity(8);
    snprintf(whole, sizeof whole, "%s", test_tmp("hold-whole"));
    snprintf(dir, sizeof dir, "%s", test_tmp("hold-crash"));
    assert_ok(sf_write_set(whole, &id, &sf_small, SEQUENCES, -1, &err));
    crash_after(dir, 9, 3);
    assert_int_equal(put_some(dir, 10, 0, false), 9); /* all nine; the tenth is dropped with the sink */
    crash_after(dir, 11, 0);
    assert_int_equal(put_some(dir, 12, 4, false), 9); /* neither the tenth nor the eleventh was held */
    assert_int_equal(put_some(dir, 12, 0, false), 12);
    crash_after(dir, 30, 7);
    assert_true(put_some(dir, 30, 0, false) >= 28);
    assert_ok(sf_write_set(dir, &id, &sf_small, SEQUENCES, -1, &err));
    assert_same_set(whole, dir);
    /* killed behind a shard's line: its hold is still there, and goes */
    snprintf(cmd, sizeof cmd, "touch \"$(ls '%s'/rows-*.msgpack | tail -n 1).hold\"", dir);
    assert_int_equal(system(cmd), 0);
    put_some(dir, SEQUENCES, 0, false);
    assert_same_set(whole, dir);
}

/* A hold that does not verify is not used: its sequences are asked for again. */
static void a_bad_hold_is_dropped(void **state)
{
    (void)state;
    struct rt_err err = {0};
    char whole[512], dir[512], cmd[2200];
    const struct rt_row_identity id = sf_identity(8);
    static const char *const harm[] = {
        "printf Q | dd of='%s/rows-000000.msgpack.tmp' bs=1 seek=700 conv=notrunc 2>/dev/null",
        "truncate -s -1 '%s/rows-000000.msgpack.tmp'",
        "rm '%s/rows-000000.msgpack.tmp'",
        "printf Q | dd of='%s/rows-000000.msgpack.hold' bs=1 seek=200 conv=notrunc 2>/dev/null",
        "truncate -s 10 '%s/rows-000000.msgpack.hold'",
        "cp '%s/rows-000000.msgpack.hold' '%s/rows-000001.msgpack.hold'; rm '%s/rows-000000.msgpack.hold'",
    };
    snprintf(whole, sizeof whole, "%s", test_tmp("harm-whole"));
    assert_ok(sf_write_set(whole, &id, &sf_small, SEQUENCES, -1, &err));
    for (size_t i = 0; i < sizeof harm / sizeof *harm; i++) {
        char name[32];
        snprintf(name, sizeof name, "harm-%zu", i);
        snprintf(dir, sizeof dir, "%s", test_tmp(name));
        assert_int_equal(put_some(dir, 3, 1, false), 0);
        snprintf(cmd, sizeof cmd, harm[i], dir, dir, dir);
        assert_int_equal(system(cmd), 0);
        assert_int_equal(put_some(dir, 3, 0, false), 0);
        assert_ok(sf_write_set(dir, &id, &sf_small, SEQUENCES, -1, &err));
        snprintf(cmd, sizeof cmd, "rm -f '%s'/rows-*.hold", dir);
        assert_int_equal(i < 5 ? 0 : system(cmd), 0); /* the foreign one stays until its shard's turn */
        assert_same_set(whole, dir);
    }
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(what_was_put_comes_back), cmocka_unit_test(damage_is_found),
                                          cmocka_unit_test(held_sequences_survive), cmocka_unit_test(a_bad_hold_is_dropped)};
RT_SUITE(state_file, tests)
