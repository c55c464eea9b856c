/* The loops of reading rows against plain ones, and the checks that are made of them. */
#include "core/row_loops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "formats/rows.h"
#include "tests/suite.h"

enum { K = 64 };

static double uniform(uint64_t i)
{
    return rt_rng_uniform(7, 1, i);
}

static void test_planes(void **state)
{
    enum { MOST = 150 };
    uint8_t planes[4 * MOST] = {0}, got[4 * MOST + 1], want[4 * MOST];
    (void)state;
    for (size_t n = 0; n <= MOST; n++) {
        for (size_t i = 0; i < 4 * n; i++)
            planes[i] = (uint8_t)rt_rng_u64(1, n, i);
        for (size_t i = 0; i < n; i++)
            for (size_t b = 0; b < 4; b++)
                want[4 * i + b] = planes[b * n + i];
        memset(got, 0xa5, sizeof got);
        rt_join_planes4(got, planes, n);
        assert_memory_equal(got, want, 4 * n);
        assert_int_equal(got[4 * n], 0xa5);
    }
}

/* The same bits, in every vector and behind the last one. */
static void test_logp(void **state)
{
    const double T[] = {1, 2, 0.6, 3.7};
    float z[K], got[K];
    (void)state;
    for (int c = 0; c < 400; c++) {
        const double norm = 40 * uniform((uint64_t)(1000 + c));
        const int n = c % (K + 1);
        for (int j = 0; j < n; j++)
            z[j] = j % 11 == 10 ? -INFINITY : (float)(60 * uniform((uint64_t)(c * K + j)) - 20);
        rt_row_logp(z, n, T[c % 4], norm, got);
        for (int j = 0; j < n; j++) {
            volatile double q = z[j] / T[c % 4];
            const float want = z[j] == -INFINITY ? 0 : (float)(q - norm);
            assert_memory_equal(&got[j], &want, sizeof want);
        }
    }
}

/* One row of K entries, its two log-sum-exps at T 1 and 2. */
struct one {
    struct rt_row_identity id;
    struct rt_rows rows;
    uint32_t ids[2], pos, top[K], next, rank;
    uint8_t mask[2];
    float z[K], lse[2], logprob;
};

static void make_one(struct one *o, double top, double spread, uint64_t seed)
{
    memset(o, 0, sizeof *o);
    o->id = (struct rt_row_identity){.vocab_size = 1 << 20, .n_ids = 1 << 20, .top_k = K, .n_lse = 2, .lse_temperature = {1, 2}};
    double sum[2] = {0};
    for (int j = 0; j < K; j++) {
        o->top[j] = (uint32_t)(j * 4096 + 5); /* all in one place of a table */
        o->z[j] = (float)top;
        top -= spread * uniform(seed * K + (uint64_t)j) + 1e-3;
    }
    for (int t = 0; t < 2; t++) {
        for (int j = 0; j < K; j++)
            sum[t] += exp(((double)o->z[j] - o->z[0]) / (t + 1));
        o->lse[t] = (float)((double)o->z[0] / (t + 1) + log(sum[t]) + 0.01);
    }
    o->ids[0] = 3;
    o->ids[1] = o->next = 77;
    o->mask[1] = 1;
    o->rank = K;
    o->logprob = -9;
    o->rows = (struct rt_rows){.n_tokens = 2, .ids = o->ids, .loss_mask = o->mask, .n_rows = 1, .k = K, .n_lse = 2, .position = &o->pos, .topk_ids = o->top,
                               .topk_logits = o->z, .lse = o->lse, .next_id = &o->next, .next_logprob = &o->logprob, .next_rank = &o->rank};
    rt_rows_key(o->ids, 2, o->rows.key);
}

static double mass(const struct one *o, int t)
{
    double sum = 0;
    for (int j = 0; j < K; j++)
        sum += exp(o->z[j] / (double)(t + 1) - o->lse[t]);
    return sum;
}

/* What rows may sum to is what a sum in float64 says, however close. */
static void test_mass(void **state)
{
    static const double above[] = {-0.5, 0, 4e-4, 4.9e-4, 5.1e-4, 6e-4, 9e-4, 9.9e-4, 1.01e-3, 1.1e-3, 2e-3, 0.1, 1e6};
    static const double tops[] = {0, 25, -180, 230, -600, 700, 1e4, -1e4};
    struct rt_err err = {0};
    struct one o;
    int refused = 0, n = 0;
    (void)state;
    for (size_t a = 0; a < sizeof above / sizeof above[0]; a++)
        for (size_t c = 0; c < sizeof tops / sizeof tops[0]; c++)
            for (int t = 0; t < 2; t++)
                for (int spread = 0; spread < 2; spread++) {
                    make_one(&o, tops[c], spread == 0 ? 0.01 : 1, a * 10 + c);
                    o.lse[t] += (float)(log(mass(&o, t)) - log(1 + above[a]));
                    const bool bad = mass(&o, t) > 1 + 1e-3;
                    const enum rt_status st = rt_rows_check(&o.rows, &o.id, "here", &err);
                    if (st != (bad ? RT_FORMAT : RT_OK))
                        fail_msg("1 + %g at %g, T %d: status %d, %s", above[a], tops[c], t + 1, st, err.msg);
                    refused += bad;
                    n++;
                    rt_err_clear(&err);
                }
    assert_true(refused > n / 4 && refused < n / 2);
}

static void test_twice(void **state)
{
    struct rt_err err = {0};
    struct one o;
    (void)state;
    for (int i = 0; i < K; i++)
        for (int j = 0; j < K; j++) {
            make_one(&o, 10, 1, 3);
            o.top[j] = o.top[i];
            const enum rt_status st = rt_rows_check(&o.rows, &o.id, "here", &err);
            if (st != (i == j ? RT_OK : RT_FORMAT) || (i != j && strstr(err.msg, "there twice") == NULL))
                fail_msg("entries %d and %d: status %d, %s", i, j, st, err.msg);
            rt_err_clear(&err);
        }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_planes),
    cmocka_unit_test(test_logp),
    cmocka_unit_test(test_mass),
    cmocka_unit_test(test_twice),
};
RT_SUITE(row_loops, tests)
