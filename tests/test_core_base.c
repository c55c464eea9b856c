/* Random numbers, SHA-256, ranks, log, packed ids. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/log.h"
#include "core/rank.h"
#include "core/rng.h"
#include "core/sha256.h"
#include "core/top_ids.h"
#include "tests/suite.h"

static void philox_known_answers(void **state)
{
    (void)state;
    /* The first two of the four words of each known answer of Philox-4x32-10 (Random123, kat_vectors). */
    assert_true(rt_rng_u64(0, 0, 0) == 0xe169c58d6627e8d5u);
    assert_true(rt_rng_u64(UINT64_MAX, UINT64_MAX, UINT64_MAX) == 0x41c83b0e408f276du);
    assert_true(rt_rng_u64(0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3243f6a88u) == 0x94fdccebd16cfe09u);
}

static void uniform_and_normal_moments(void **state)
{
    enum { N = 20000 };
    double u1 = 0, u2 = 0, n1 = 0, n2 = 0, n4 = 0, cross = 0;
    (void)state;
    for (int i = 0; i < N; i++) {
        const double u = rt_rng_uniform(7, 1, (uint64_t)i), v = rt_rng_uniform(7, 2, (uint64_t)i);
        const double z = rt_rng_normal(7, 3, (uint64_t)i);
        assert_true(u >= 0 && u < 1);
        u1 += u, u2 += u * u, cross += (u - 0.5) * (v - 0.5);
        n1 += z, n2 += z * z, n4 += z * z * z * z;
    }
    /* Five standard errors of each mean over N draws: sqrt(variance / N). */
    assert_true(fabs(u1 / N - 0.5) < 5 * sqrt(1.0 / 12 / N));
    assert_true(fabs(u2 / N - 1.0 / 3) < 5 * sqrt(4.0 / 45 / N));
    assert_true(fabs(cross / N) < 5 * sqrt(1.0 / 144 / N));
    assert_true(fabs(n1 / N) < 5 * sqrt(1.0 / N));
    assert_true(fabs(n2 / N - 1) < 5 * sqrt(2.0 / N));
    assert_true(fabs(n4 / N - 3) < 5 * sqrt(96.0 / N));
}

static void permutations(void **state)
{
    int64_t p[100], q[100];
    int seen[100] = {0}, first[4] = {0};
    (void)state;
    rt_rng_permutation(1, 2, 100, p);
    rt_rng_permutation(1, 2, 100, q);
    assert_memory_equal(p, q, sizeof p);
    for (int i = 0; i < 100; i++)
        seen[p[i]]++;
    for (int i = 0; i < 100; i++)
        assert_int_equal(seen[i], 1);
    rt_rng_permutation(1, 3, 100, q);
    assert_memory_not_equal(p, q, sizeof p);
    for (uint64_t s = 0; s < 4000; s++) {
        rt_rng_permutation(s, 0, 4, p);
        first[p[0]]++;
    }
    for (int i = 0; i < 4; i++) /* 1000 expected, deviation sqrt(4000 * 1/4 * 3/4) = 27 */
        assert_true(abs(first[i] - 1000) < 5 * 28);
    rt_rng_permutation(1, 2, 0, p);
    rt_rng_permutation(1, 2, 1, p);
    assert_int_equal(p[0], 0);
}

static void streams(void **state)
{
    (void)state;
    /* FNV-1a, 64 bits. */
    assert_true(rt_rng_stream("") == 0xcbf29ce484222325u);
    assert_true(rt_rng_stream("a") == 0xaf63dc4c8601ec8cu);
    assert_true(rt_rng_stream("foobar") == 0x85944171f73967e8u);
}

static void sha256_known_answers(void **state)
{
    static const struct {
        const char *text;
        int times;
        const char *hex;
    } cases[] = {
        {"", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"a", 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct rt_sha256 s;
        uint8_t out[32];
        char hex[65];
        rt_sha256_init(&s);
        for (int k = 0; k < cases[i].times; k++)
            rt_sha256_update(&s, cases[i].text, strlen(cases[i].text));
        rt_sha256_final(&s, out);
        rt_hex(hex, out, 32);
        assert_string_equal(hex, cases[i].hex);
    }
}

static void sha256_in_pieces(void **state)
{
    uint8_t data[300], whole[32], parts[32];
    (void)state;
    for (int i = 0; i < 300; i++)
        data[i] = (uint8_t)(i * 7);
    for (size_t n = 0; n <= 300; n++) { /* every length around the padding, cut at a place that moves */
        struct rt_sha256 s;
        const size_t cut = n * 13 % (n + 1);
        rt_sha256(data, n, whole);
        rt_sha256_init(&s);
        rt_sha256_update(&s, data, cut);
        rt_sha256_update(&s, data + cut, n - cut);
        rt_sha256_final(&s, parts);
        assert_memory_equal(whole, parts, 32);
    }
}

/* The processor's instructions and plain C: the same state, from blocks that lie anywhere. */
static void sha256_either_way(void **state)
{
    uint8_t data[64 * 9 + 15];
    (void)state;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i * i + (i >> 3));
    for (size_t at = 0; at < 16; at++)
        for (size_t n = 0; n < 9; n++) {
            struct rt_sha256 s, plain;
            rt_sha256_init(&s);
            plain = s;
            rt_sha256_update(&s, data + at, 64 * n);
            rt_sha256_plain(plain.h, data + at, n);
            assert_memory_equal(s.h, plain.h, sizeof s.h);
        }
}

static const char *const rank_names[] = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS",
};

/* The values of rank_names, NULL: not set. */
static enum rt_status rank_with(const char *const values[10], struct rt_rank *r, struct rt_err *err)
{
    for (int i = 0; i < 10; i++) {
        if (values[i] != NULL)
            setenv(rank_names[i], values[i], 1);
        else
            unsetenv(rank_names[i]);
    }
    const enum rt_status st = rt_rank_from_env(r, err);
    for (int i = 0; i < 10; i++)
        unsetenv(rank_names[i]);
    return st;
}

static void ranks(void **state)
{
    static const struct {
        const char *values[10];
        int rank, size, local; /* size 0: USAGE */
    } cases[] = {
        {{NULL}, 0, 1, 0},
        {{"3", "8", "1"}, 3, 8, 1},
        {{"0", "1"}, 0, 1, 0},
        {{"3", "8"}, 0, 0, 0},
        {{"3"}, 0, 0, 0},
        {{NULL, "3"}, 0, 0, 0},
        {{"8", "8", "0"}, 0, 0, 0},
        {{"-1", "8", "0"}, 0, 0, 0},
        {{"1x", "8", "0"}, 0, 0, 0},
        {{"", "8", "0"}, 0, 0, 0},
        {{"99999999999999999999", "8", "0"}, 0, 0, 0},
        {{"0", "0", "0"}, 0, 0, 0},
        {{"1", "2", "2"}, 0, 0, 0},
        {{NULL, NULL, "5"}, 0, 1, 0},
        {{NULL, NULL, NULL, "5", "6", "2"}, 5, 6, 2},
        {{"1", "2", "1", "5", "6", "2"}, 1, 2, 1},
        {{[6] = "2", "4", "0", "3"}, 2, 3, 0},
        {{[6] = "2", "4", "0"}, 2, 4, 0},
        {{[6] = "0", "4", "0", "4"}, 0, 4, 0},
        {{[6] = "0", "4", "0"}, 0, 1, 0}, /* a batch script, not a task of srun */
        {{[7] = "4"}, 0, 1, 0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct rt_err err = {0};
        struct rt_rank r;
        const enum rt_status st = rank_with(cases[i].values, &r, &err);
        if (st != (cases[i].size == 0 ? RT_USAGE : RT_OK))
            fail_msg("case %zu: status %d (%s)", i, (int)st, err.msg);
        if (st == RT_OK && (r.rank != cases[i].rank || r.size != cases[i].size || r.local_rank != cases[i].local))
            fail_msg("case %zu: %d/%d/%d", i, r.rank, r.size, r.local_rank);
    }
}

static const char *read_back(FILE *f)
{
    static char text[8192];
    rewind(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    return text;
}

static void log_lines(void **state)
{
    struct rt_log log;
    FILE *out = tmpfile(), *copy = tmpfile();
    char big[6000];
    (void)state;
    assert_non_null(out);
    assert_non_null(copy);
    rt_log_init(&log, out, RT_LOG_WARN);
    assert_false(log.tty);
    log.copy = copy;
    rt_info(&log, "loaded %d", 3);
    rt_warn(&log, "tensor '%s' is strange", "a\033[2Jb");
    rt_log(&log, RT_LOG_ERROR, "no");
    rt_log(&log, RT_LOG_DEBUG, "detail");
    rt_info(NULL, "silent");
    assert_string_equal(read_back(out), "warning: tensor 'a?[2Jb' is strange\nerror: no\n");
    assert_string_equal(read_back(copy), "loaded 3\nwarning: tensor 'a?[2Jb' is strange\nerror: no\n");
    memset(big, 'x', sizeof big - 1);
    big[sizeof big - 1] = '\0';
    rt_warn(&log, "%s", big);
    const char *text = read_back(out);
    assert_string_equal(text + strlen(text) - 5, "x...\n");
    fclose(out);
    fclose(copy);
}

static void progress_lines(void **state)
{
    struct rt_log log;
    struct rt_progress p;
    FILE *out = tmpfile();
    (void)state;
    rt_log_init(&log, out, RT_LOG_INFO);
    rt_progress_begin(&p, &log, "scoring", "tokens", 2000);
    for (int i = 0; i < 1000; i++)
        rt_progress_update(&p, i, NULL);
    assert_string_equal(read_back(out), ""); /* plain lines: one each 10 s at most */
    p.t_start -= 10;
    p.t_last -= 20;
    rt_progress_update(&p, 1000, "layer 3/61");
    const char *text = read_back(out);
    assert_non_null(strstr(text, "scoring 1.00k/2.00k tokens (50%), "));
    assert_non_null(strstr(text, "/s, 10s left, layer 3/61\n"));
    log.tty = true; /* the live line is cleared before another is printed */
    p.t_last -= 20;
    rt_progress_update(&p, 1500, NULL);
    assert_true(log.live);
    rt_info(&log, "other");
    assert_false(log.live);
    assert_non_null(strstr(read_back(out), "\033[K\r\033[Kother\n"));
    rt_progress_end(&p);
    assert_non_null(strstr(read_back(out), "scoring: 1.50k tokens in 10s ("));
    rt_progress_begin(&p, NULL, "x", "y", 0);
    rt_progress_update(&p, 1, NULL);
    rt_progress_end(&p);
    fclose(out);
}

static void human_numbers(void **state)
{
    char b[32];
    (void)state;
    assert_string_equal(rt_human_bytes(b, 0), "0 B");
    assert_string_equal(rt_human_bytes(b, 999), "999 B");
    assert_string_equal(rt_human_bytes(b, 1000), "1.00 KB");
    assert_string_equal(rt_human_bytes(b, 999999), "1.00 MB");
    assert_string_equal(rt_human_bytes(b, 1234567890), "1.23 GB");
    assert_string_equal(rt_human_bytes(b, UINT64_MAX), "18.4 EB");
    assert_string_equal(rt_human_count(b, 34512), "34.5k");
    assert_string_equal(rt_human_count(b, 0.25), "0.25");
    assert_string_equal(rt_human_count(b, 671e9), "671G");
    assert_string_equal(rt_human_time(b, 0.04), "0.0s");
    assert_string_equal(rt_human_time(b, 9.96), "10s");
    assert_string_equal(rt_human_time(b, 59.6), "1m00s");
    assert_string_equal(rt_human_time(b, 7380), "2h03m");
    assert_string_equal(rt_human_time(b, 90000), "1d01h");
    assert_string_equal(rt_human_time(b, NAN), "?");
    assert_true(rt_now() <= rt_now());
}

static void packed_ids(void **state)
{
    enum { ROWS = 3, MOST = 70 };
    uint32_t at[ROWS * MOST + 1];
    struct rt_top_ids_row w;
    (void)state;
    assert_int_equal(rt_top_ids_bits(1), 1);
    assert_int_equal(rt_top_ids_bits(3), 2);
    assert_int_equal(rt_top_ids_bits(4), 3); /* all ones is none of them */
    assert_int_equal(rt_top_ids_bits(151936), 18);
    assert_int_equal(rt_top_ids_bits(INT32_MAX), 31);
    assert_int_equal(rt_top_ids_words(64, 18), 36);
    assert_int_equal(rt_top_ids_words(3, 0), 3);
    rt_top_ids_begin(&w, at, 3, 3, 0);
    for (int j = 0; j < 3; j++)
        rt_top_ids_add(&w, (const int32_t[]){5, -1, 2}[j]);
    rt_top_ids_end(&w);
    assert_true(at[0] == (5 | 7 << 3 | 2 << 6));
    for (int bits = 0; bits <= 32; bits++)
        for (int k = 1; k <= MOST; k += 23) {
            const int64_t words = rt_top_ids_words(k, bits), most = ((int64_t)1 << (bits == 0 || bits == 32 ? 31 : bits)) - 1;
            memset(at, 0xa5, sizeof at);
            for (int pass = 0; pass < 2; pass++)
                for (int i = 0; i < ROWS; i++) {
                    rt_top_ids_begin(&w, at, k, bits, i);
                    for (int j = 0; j < k; j++) {
                        const uint64_t x = rt_rng_u64(11, (uint64_t)bits, (uint64_t)(i * k + j));
                        const int32_t id = x % 5 == 0 ? -1 : (int32_t)(x / 8 % (uint64_t)most);
                        if (pass == 0)
                            rt_top_ids_add(&w, id);
                        else
                            assert_int_equal(rt_top_ids_get(at, k, bits, i, j), id);
                    }
                    if (pass == 0)
                        rt_top_ids_end(&w);
                }
            assert_true(at[ROWS * words] == 0xa5a5a5a5);
        }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(philox_known_answers), cmocka_unit_test(uniform_and_normal_moments), cmocka_unit_test(permutations),
    cmocka_unit_test(streams),              cmocka_unit_test(sha256_known_answers),       cmocka_unit_test(sha256_in_pieces), cmocka_unit_test(sha256_either_way),
    cmocka_unit_test(ranks),                cmocka_unit_test(log_lines),                  cmocka_unit_test(progress_lines),
    cmocka_unit_test(human_numbers),        cmocka_unit_test(packed_ids),
};
RT_SUITE(core_base, tests)
