/* Shards that are damaged: cut at any byte, any bit flipped, hostile files, indexes forged with good checksums. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>

#include "core/io.h"
#include "core/rng.h"
#include "formats/shard_codec.h"
#include "formats/shard_file.h"
#include "tests/shard_fixture.h"

/* One shard with a few short sequences, as bytes. */
static void small_shard(const char *name, struct rt_buf *bytes)
{
    struct rt_err err = {0};
    struct rt_row_identity id = sf_identity(2);
    char path[4200];
    sf_add_features(&id);
    const char *dir = test_tmp(name);
    assert_ok(sf_write_set(dir, &id, &(struct rt_shard_options){.rows_per_shard = 1000}, 2, -1, &err));
    snprintf(path, sizeof path, "%s/rows-000000.msgpack", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, bytes, &err));
}

static void damage(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf bytes = {0};
    small_shard("sh-damage", &bytes);
    const char *path = test_tmp("sh-damaged.msgpack");
    const int fd = open(path, O_RDWR | O_CREAT, 0666);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, bytes.data, bytes.len, 0), bytes.len);
    for (size_t n = bytes.len; n-- > 0;) { /* downwards: growing a file from 0 makes some file systems write it out */
        assert_int_equal(ftruncate(fd, (off_t)n), 0);
        const enum rt_status st = sf_read_whole(path, &err);
        if (st != RT_FORMAT)
            fail_msg("cut at %zu of %zu: status %d, '%s'", n, bytes.len, st, err.msg);
        rt_err_clear(&err);
    }
    assert_int_equal(pwrite(fd, bytes.data, bytes.len, 0), bytes.len);
    assert_ok(sf_read_whole(path, &err));
    for (size_t bit = 0; bit < bytes.len * 8; bit++) {
        const char c = (char)(bytes.data[bit / 8] ^ 1 << bit % 8);
        assert_int_equal(pwrite(fd, &c, 1, (off_t)(bit / 8)), 1);
        if (sf_read_whole(path, &err) == RT_OK)
            fail_msg("bit %zu of byte %zu flipped: not noticed", bit % 8, bit / 8);
        rt_err_clear(&err);
        assert_int_equal(pwrite(fd, &bytes.data[bit / 8], 1, (off_t)(bit / 8)), 1);
    }
    assert_int_equal(pwrite(fd, "x", 1, (off_t)bytes.len), 1);
    assert_status(sf_read_whole(path, &err), FORMAT);
    close(fd);
    rt_buf_free(&bytes);
}

static uint64_t big_endian(const char *p, int n)
{
    uint64_t v = 0;
    for (int i = 0; i < n; i++)
        v = v << 8 | (uint8_t)p[i];
    return v;
}

/* Where the inner index of a shard lies, and its length. */
static size_t inner_of(const struct rt_buf *b, size_t *n)
{
    const size_t at = (size_t)big_endian(b->data + b->len - 8, 8);
    const char *p = b->data + at + 7;
    assert_memory_equal(b->data + at, "\x83\xa5index", 7);
    const int width = *p == (char)0xc4 ? 1 : *p == (char)0xc5 ? 2 : 4;
    *n = (size_t)big_endian(p + 1, width);
    return at + 7 + 1 + (size_t)width;
}

static void put_be32(char *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (char)(v >> (24 - 8 * i));
}

/* The file with its checksums made right again, as an attacker would: what is left are the checks of structure. */
static void forge(struct rt_buf *b, const struct rt_buf *original, size_t from, size_t to)
{
    size_t n;
    const size_t inner = inner_of(original, &n);
    const uint32_t old = (uint32_t)crc32(0, (const Bytef *)original->data + from, (uInt)(to - from));
    char be[4];
    put_be32(be, old);
    char *at = memmem(b->data + inner, n, be, 4);
    if (at != NULL)
        put_be32(at, (uint32_t)crc32(0, (const Bytef *)b->data + from, (uInt)(to - from)));
    char *crc = b->data + inner + n + 4; /* behind a3 "crc" */
    if (*crc == (char)0xce)
        put_be32(crc + 1, (uint32_t)crc32(0, (const Bytef *)b->data + inner, (uInt)n));
}

static void hostile(void **state)
{
    (void)state;
    struct rt_err err = {0};
    static const struct {
        const char *bytes;
        size_t n;
    } bombs[] = {
        {"", 0}, {"\xdd\xff\xff\xff\xff", 5}, {"\xdf\xff\xff\xff\xff", 5}, {"\xdb\xff\xff\xff\xff", 5}, {"\xc6\xff\xff\xff\xff", 5},
        {"\xc9\xff\xff\xff\xff\x01", 6}, {"\x86\xa6" "format\xdb\xff\xff\xff\xff", 13}, {"\x86\xa6" "format\xac" "retort-rows\0", 21},
    };
    const char *path = test_tmp("sh-hostile.msgpack");
    for (size_t i = 0; i < sizeof bombs / sizeof bombs[0]; i++) {
        assert_ok(rt_publish_bytes(path, bombs[i].bytes, bombs[i].n, &err));
        assert_status(sf_read_whole(path, &err), FORMAT);
    }
    char *nested = malloc(1 << 20);
    memset(nested, 0x91, 1 << 20);
    assert_ok(rt_publish_bytes(path, nested, 1 << 20, &err));
    assert_status(sf_read_whole(path, &err), FORMAT);
    free(nested);

    struct rt_buf bytes = {0}, copy = {0};
    size_t n;
    small_shard("sh-forged", &bytes);
    const size_t inner = inner_of(&bytes, &n), index_at = (size_t)big_endian(bytes.data + bytes.len - 8, 8);
    struct rt_shard_set *s = NULL;
    char shard[4200];
    snprintf(shard, sizeof shard, "%s/rows-000000.msgpack", test_tmp("sh-forged"));
    assert_ok(rt_shard_set_open(shard, &s, &err));
    const struct rt_seq_info second = *rt_shard_set_seq(s, 1);
    rt_shard_set_free(s);
    assert_int_equal(second.offset + second.bytes, index_at);
    const int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    assert_int_equal(ftruncate(fd, (off_t)bytes.len), 0);
    assert_ok(rt_buf_append(&copy, bytes.data, bytes.len, &err));
    int accepted = 0;
    for (int i = 0; i < 6000; i++) {
        memcpy(copy.data, bytes.data, bytes.len);
        const bool in_index = i % 2 == 0;
        const size_t lo = in_index ? inner : (size_t)second.offset, size = in_index ? n : (size_t)second.bytes;
        for (uint64_t e = 0; e <= rt_rng_u64(7, 1, (uint64_t)i) % 3; e++) {
            const uint64_t r = rt_rng_u64(7, 2 + e, (uint64_t)i);
            const uint64_t span = in_index || r % 4 == 0 ? size : 160; /* mostly the frame: the first columns */
            copy.data[lo + (r >> 8) % (span < size ? span : size)] = (char)(r % 8 < 4 ? r >> 40 : 0xff);
        }
        forge(&copy, &bytes, second.offset, index_at);
        assert_int_equal(pwrite(fd, copy.data, copy.len, 0), copy.len);
        const enum rt_status st = sf_read_whole(path, &err);
        if (st != RT_OK && st != RT_FORMAT)
            fail_msg("mutation %d: status %d, '%s'", i, st, err.msg);
        accepted += st == RT_OK;
        rt_err_clear(&err);
    }
    assert_true(accepted > 0); /* line numbers, occurrences: the forging gets past the checksums */
    close(fd);
    rt_buf_free(&copy);
    rt_buf_free(&bytes);
}

/* A column says by itself that it is damaged: what reads a shard front to back has nothing else. */
static void column(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_codec c = {0};
    struct rt_buf b = {0};
    struct rt_pack p = {&b, RT_OK, &err};
    struct rt_unpack u;
    struct rt_column col;
    uint32_t data[100], got[100];
    for (uint32_t i = 0; i < 100; i++)
        data[i] = i % 10 == 0 ? 0xfffffff0u + i : data[i - 1] - 7 * i;
    for (size_t stride = 0; stride <= 100; stride += 10) {
        b.len = 0;
        assert_ok(rt_codec_pack(&c, 1, data, 100, 4, stride, false, &p, &err));
        rt_unpack_init(&u, b.data, b.len, "column", 0);
        assert_ok(rt_column_read(&u, &col, &err));
        assert_ok(rt_codec_unpack(&c, &col, got, "here", &err));
        assert_memory_equal(got, data, sizeof data);
    }
    for (size_t bit = 0; bit < col.size * 8; bit++) {
        ((uint8_t *)(uintptr_t)col.data)[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_int_equal(rt_codec_unpack(&c, &col, got, "here", &err), RT_FORMAT);
        assert_non_null(strstr(err.msg, "here: damaged: crc32"));
        rt_err_clear(&err);
        ((uint8_t *)(uintptr_t)col.data)[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    rt_codec_free(&c);
    rt_buf_free(&b);
}

/* Indexes with good checksums that say what the file cannot hold. */
static void false_index(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_shard_header h = {0, 1, 0, sf_identity(8), {0}};
    struct rt_buf b = {0};
    const char *path = test_tmp("sh-false.msgpack");
    assert_ok(rt_shard_header_pack(&h, &b, &err));
    const uint64_t header = b.len, body = 1000;
    const uint32_t crc = (uint32_t)crc32(0, (const Bytef *)b.data, (uInt)header);
    char zero[1000] = {0};
    assert_ok(rt_buf_append(&b, zero, body, &err));
    for (int c = -1; c < 8; c++) {
        struct rt_seq_info q[2] = {{.n_tokens = 5, .n_rows = 4, .offset = header, .bytes = 600},
                                   {.n_tokens = 5, .n_rows = 4, .offset = header + 600, .bytes = 400}};
        struct rt_shard_set *s = NULL;
        b.len = header + body;
        switch (c) {
        case 0: q[1].n_tokens = INT32_MAX; break; /* 2^31 tokens in 400 bytes */
        case 1: q[1].n_rows = 5; break;
        case 2: q[1].n_tokens = 0, q[1].n_rows = 0; break;
        case 3: q[1].offset++; break;
        case 4: q[1].bytes = 401; break;
        case 5: q[1].bytes = INT64_MAX; break;
        case 6: q[1].bytes = 399; break;
        case 7: q[0].bytes = 601; break;
        default: break;
        }
        assert_ok(rt_shard_index_pack(header + body, header, crc, q, 2, 3, &b, &err));
        assert_ok(rt_publish_bytes(path, b.data, b.len, &err));
        const enum rt_status st = rt_shard_set_open(path, &s, &err);
        if (st != (c < 0 ? RT_OK : RT_FORMAT))
            fail_msg("case %d: status %d, '%s'", c, st, err.msg);
        rt_err_clear(&err);
        if (st == RT_OK) {
            struct rt_rows rows;
            assert_status(rt_shard_set_get(s, 0, &rows, &err), FORMAT);
            rt_shard_set_free(s);
        }
    }
    rt_buf_free(&b);
}

static void manifest_damage(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = sf_identity(8);
    const char *dir = test_tmp("sh-manifest");
    struct rt_buf bytes = {0};
    char path[4200];
    assert_ok(sf_write_set(dir, &id, &sf_small, 20, -1, &err));
    snprintf(path, sizeof path, "%s/manifest.jsonl", dir);
    assert_ok(rt_file_read_all(path, 1 << 20, &bytes, &err));
    int64_t before = 20;
    for (size_t n = bytes.len + 1; n-- > 0;) { /* a torn last line does not exist */
        struct rt_shard_set *s = NULL;
        assert_int_equal(truncate(path, (off_t)n), 0);
        assert_ok(rt_shard_set_open(dir, &s, &err));
        const int64_t count = rt_shard_set_info(s)->sequences;
        assert_true(count <= before && (n < bytes.len || count == 20));
        assert_int_equal(rt_shard_set_info(s)->finished, n == bytes.len);
        before = count;
        rt_shard_set_free(s);
    }
    assert_int_equal(before, 0);
    const int fd = open(path, O_RDWR);
    assert_int_equal(pwrite(fd, bytes.data, bytes.len, 0), bytes.len);
    for (size_t bit = 0; bit + 8 < bytes.len * 8; bit++) { /* the newline at the end is the torn case */
        const char c = (char)(bytes.data[bit / 8] ^ 1 << bit % 8);
        assert_int_equal(pwrite(fd, &c, 1, (off_t)(bit / 8)), 1);
        struct rt_shard_set *s = NULL;
        if (rt_shard_set_open(dir, &s, &err) == RT_OK)
            fail_msg("manifest, bit %zu of byte %zu flipped: not noticed", bit % 8, bit / 8);
        rt_err_clear(&err);
        assert_int_equal(pwrite(fd, &bytes.data[bit / 8], 1, (off_t)(bit / 8)), 1);
    }
    close(fd);
    /* the writer goes on over a torn line, to the same bytes */
    assert_int_equal(truncate(path, (off_t)(bytes.len / 2)), 0);
    assert_ok(sf_write_set(dir, &id, &sf_small, 20, -1, &err));
    struct rt_buf again = {0};
    assert_ok(rt_file_read_all(path, 1 << 20, &again, &err));
    assert_int_equal(again.len, bytes.len);
    assert_memory_equal(again.data, bytes.data, bytes.len);
    /* a shard that was cut, is gone, or is another's */
    char shard[4200], other[4200];
    snprintf(shard, sizeof shard, "%s/rows-000000.msgpack", dir);
    struct rt_buf kept = {0};
    assert_ok(rt_file_read_all(shard, 1 << 20, &kept, &err));
    assert_int_equal(truncate(shard, (off_t)kept.len - 1), 0);
    assert_status(sf_write_set(dir, &id, &sf_small, 20, -1, &err), FORMAT);
    assert_ok(rt_publish_bytes(shard, kept.data, kept.len, &err));
    rt_buf_free(&kept);
    snprintf(other, sizeof other, "%s/rows-000001.msgpack", dir);
    assert_int_equal(rename(shard, path), 0); /* the manifest is overwritten: not JSON */
    struct rt_shard_set *s = NULL;
    assert_status(rt_shard_set_open(dir, &s, &err), FORMAT);
    assert_ok(rt_publish_bytes(path, bytes.data, bytes.len, &err));
    assert_status(rt_shard_set_open(dir, &s, &err), IO);
    assert_status(sf_write_set(dir, &id, &sf_small, 20, -1, &err), IO);
    assert_int_equal(rename(other, shard), 0);
    assert_status(rt_shard_set_open(dir, &s, &err), FORMAT);
    rt_buf_free(&again);
    rt_buf_free(&bytes);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(damage), cmocka_unit_test(hostile), cmocka_unit_test(manifest_damage), cmocka_unit_test(column), cmocka_unit_test(false_index),
};
RT_SUITE(shard_damage, tests)
