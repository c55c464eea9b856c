/* retort retarget while each allocation fails in turn: NOMEM, or the same bytes. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "tests/faults.h"
#include "tests/retarget_fixture.h"
#include "tests/run_command.h"
#include "formats/shard.h"

struct work {
    char shards[256];
    const char *mode;
    int runs;
};

static enum rt_status retarget_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    struct work *w = ctx;
    struct rt_buf b = {0};
    char name[64], out[256], file[512];
    snprintf(name, sizeof name, "fault-retarget-%d", w->runs++);
    snprintf(out, sizeof out, "%s", test_tmp(name));
    const char *const args[] = {"--shards", w->shards, "--teacher", "examples/tiny_teacher", "--student", "examples/crossing_student", "--mode", w->mode, "--out", out,
                                "--threads", "2", "--rows-per-shard", "12", NULL};
    enum rt_status st = test_command(&rt_cmd_retarget, args, err);
    snprintf(file, sizeof file, "%s/manifest.jsonl", out);
    if (st == RT_OK)
        st = rt_file_read_all(file, 1 << 20, &b, err);
    if (st == RT_OK)
        fault_digest(digest, b.data, b.len);
    rt_buf_free(&b);
    return st;
}

static void allocations(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct work w = {.mode = "exact"};
    struct rt_model_dir t = rf_model("examples/tiny_teacher");
    struct rt_shard_sink *shards = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    static const char *const text[] = {"Add 2 and 3", "It is 5", "A text of its own, 12 words", NULL, "Again", "Most would say so"};
    snprintf(w.shards, sizeof w.shards, "%s", test_tmp("fault-shards"));
    for (int i = 0; i < 3; i++) {
        struct rf_rows r = rf_render(&t, text[2 * i], text[2 * i + 1], 8);
        if (i == 0)
            assert_ok(rt_shard_sink_open(w.shards, &r.id, &(struct rt_shard_options){0}, &shards, &sink, &resume, &err));
        assert_ok(sink.put(sink.self, &r.rows, &err));
        rf_rows_free(&r);
    }
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(shards);
    rt_model_dir_close(&t);
    fault_each(retarget_work, &w, 60);
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(allocations)};
RT_SUITE(retarget_faults, tests)
