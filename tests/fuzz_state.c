/* Fuzz targets: files of work under way. What a restart finds is used whole or not at all. */
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "core/io.h"
#include "formats/state_file.h"
#include "tests/fuzz.h"
#include "tests/shard_fixture.h"

/* Checksums of header and blocks, for inputs that have the shape. */
static void state_repair(uint8_t *data, size_t n)
{
    uint32_t len, crc;
    if (n < 16)
        return;
    memcpy(&len, data + 8, sizeof len);
    if (len > n - 16)
        return;
    crc = (uint32_t)crc32(0, data + 16, len);
    memcpy(data + 12, &crc, sizeof crc);
    const size_t at = 16 + len;
    if (n - at < sizeof crc)
        return;
    crc = (uint32_t)crc32(0, data + at, (uInt)(n - at - sizeof crc)); /* inputs are smaller than a block */
    memcpy(data + n - sizeof crc, &crc, sizeof crc);
}

static void state_begin(struct fuzz_seeds *s)
{
    struct rt_err err = {0};
    struct rt_json *v;
    struct rt_state_writer *w;
    char bytes[3000];
    fuzz_dir("fuzz-state");
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (char)(i * i / 7);
    for (uint64_t n = 0; n <= sizeof bytes; n += 1500) {
        fuzz_must(rt_json_new_object(&v, &err), &err);
        fuzz_must(rt_json_set_int(v, "layer", 3, &err), &err);
        fuzz_must(rt_state_create(fuzz_at("state"), "test", v, n, &w, &err), &err);
        fuzz_must(rt_state_put(w, bytes, n, &err), &err);
        fuzz_must(rt_state_commit(w, &err), &err);
        rt_state_writer_free(w);
        rt_json_free(v);
        fuzz_seed_file(s, fuzz_at("state"));
    }
}

static enum rt_status state_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    struct rt_state_reader *r = NULL;
    char piece[256];
    enum rt_status st;
    fuzz_put(fuzz_at("state"), data, n);
    RT_TRY(rt_state_open(fuzz_at("state"), "test", &r, err));
    for (uint64_t left = rt_state_bytes(r), take; left > 0; left -= take) {
        take = left < sizeof piece ? left : sizeof piece;
        RT_TRY(rt_state_read(r, piece, take, err));
    }
out:
    rt_state_reader_free(r);
    return st;
}

/* ---- the shard under way ---- */

static struct rt_buf unfinished; /* rows-000000.msgpack.tmp as it was held */

static void hold_begin(struct fuzz_seeds *s)
{
    struct rt_err err = {0};
    struct rt_shard_sink *sink;
    struct rt_row_sink rows;
    struct rt_shard_resume resume;
    const struct rt_row_identity id = sf_identity(4);
    fuzz_dir("fuzz-hold");
    fuzz_must(rt_shard_sink_open(fuzz_place(), &id, &sf_small, &sink, &rows, &resume, &err), &err);
    for (int i = 0; i < 3; i++) {
        struct sf_made *m = sf_make(&id, i, sf_length_of(i));
        fuzz_must(rows.put(rows.self, &m->rows, &err), &err);
        free(m);
    }
    fuzz_must(rt_shard_sink_hold(sink, &err), &err);
    rt_shard_sink_free(sink);
    unfinished.len = 0;
    fuzz_must(rt_file_read_all(fuzz_at("rows-000000.msgpack.tmp"), 1 << 20, &unfinished, &err), &err);
    fuzz_seed_file(s, fuzz_at("rows-000000.msgpack.hold"));
}

static enum rt_status hold_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    struct rt_shard_sink *sink = NULL;
    struct rt_row_sink rows;
    struct rt_shard_resume resume;
    const struct rt_row_identity id = sf_identity(4);
    fuzz_put(fuzz_at("rows-000000.msgpack.hold"), data, n);
    fuzz_put(fuzz_at("rows-000000.msgpack.tmp"), (const uint8_t *)unfinished.data, unfinished.len);
    const enum rt_status st = rt_shard_sink_open(fuzz_place(), &id, &sf_small, &sink, &rows, &resume, err);
    if (st == RT_OK && (resume.sequences < 0 || resume.sequences > 3))
        fuzz_fail("%lld sequences of a hold of 3", (long long)resume.sequences);
    rt_shard_sink_free(sink);
    return st;
}

static void hold_end(void)
{
    rt_buf_free(&unfinished);
}

static const char *const words[] = {"\"bytes\":9223372036854775807", "\"sequences\":", "\"size\":", "\"kind\":\"test\"", "{", "}", NULL};
const struct fuzz_target fuzz_state = {"state", 2000, words, 0, state_begin, state_repair, state_run, NULL};
const struct fuzz_target fuzz_hold = {"hold", 1000, words, FUZZ_READER, hold_begin, state_repair, hold_run, hold_end};
