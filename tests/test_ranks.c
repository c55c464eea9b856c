/* Several ranks: collectives, and what happens when one is lost or hangs. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/backend.h"
#include "core/collective.h"
#include "core/log.h"
#include "core/rng.h"
#include "tests/rank_fixture.h"

enum { MAX = 5 };

/* ---- what every collective gives ---- */

static double value(int rank, int64_t i)
{
    return (double)rt_rng_normal(3, (uint64_t)rank, (uint64_t)i) * (rank == 1 ? 1e4 : 1);
}

static double get(const struct rank *r, int64_t i)
{
    return r->dtype == RT_F64 ? ((double *)r->x)[i] : r->dtype == RT_F32 ? (double)((float *)r->x)[i] : (double)rt_bf16_to_f32(((uint16_t *)r->x)[i]);
}

static void set(struct rank *r, int64_t i, double v)
{
    if (r->dtype == RT_F64)
        ((double *)r->x)[i] = v;
    else if (r->dtype == RT_F32)
        ((float *)r->x)[i] = (float)v;
    else
        ((uint16_t *)r->x)[i] = rt_f32_to_bf16((float)v);
}

/* The sum over ranks of what they hold, rounded once. */
static double expected(const struct rank *r, int64_t i)
{
    struct rank one = {.dtype = r->dtype, .x = &(double){0}};
    double sum = 0;
    for (int k = 0; k < r->size; k++) {
        set(&one, 0, value(k, i));
        sum += get(&one, 0);
    }
    set(&one, 0, sum);
    return get(&one, 0);
}

static void fill(struct rank *r)
{
    for (int64_t i = 0; i < r->n; i++)
        set(r, i, value(r->rank, i));
}

#define CHECK(cond) \
    do { \
        if (!(cond)) { \
            r->st = rt_fail(&r->err, RT_INTERNAL, "%s", #cond); \
            goto out; \
        } \
    } while (0)

static void *collectives(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    enum rt_status st;
    double sums[3] = {r->rank, 1, 0.1 * r->rank};
    char word[16] = "", all[MAX * 16];
    int64_t first, count;
    RT_TRY(rk_open(r, &c));
    CHECK(rt_comm_rank(c) == r->rank && rt_comm_size(c) == r->size);
    rt_comm_shard(r->n, r->rank, r->size, &first, &count);
    fill(r);
    RT_TRY(rt_comm_reduce_scatter(c, r->x, r->n, r->dtype, &r->err));
    for (int64_t i = first; i < first + count; i++)
        CHECK(get(r, i) == expected(r, i));
    RT_TRY(rt_comm_all_gather(c, r->x, r->n, r->dtype, &r->err));
    for (int64_t i = 0; i < r->n; i++)
        CHECK(get(r, i) == expected(r, i));
    fill(r);
    RT_TRY(rt_comm_all_reduce(c, r->x, r->n, r->dtype, &r->err));
    for (int64_t i = 0; i < r->n; i++)
        CHECK(get(r, i) == expected(r, i));
    RT_TRY(rt_comm_sum(c, sums, 3, &r->err));
    CHECK(sums[0] == r->size * (r->size - 1) / 2 && sums[1] == r->size && fabs(sums[2] - 0.1 * sums[0]) < 1e-12);
    for (int root = 0; root < r->size; root++) {
        snprintf(word, sizeof word, "%d", r->rank == root ? root : -1);
        RT_TRY(rt_comm_broadcast(c, word, sizeof word, root, &r->err));
        CHECK(atoi(word) == root);
    }
    snprintf(word, sizeof word, "r%d", r->rank);
    RT_TRY(rt_comm_gather(c, word, all, sizeof word, &r->err));
    for (int k = 0; k < r->size; k++)
        CHECK(all[16 * k] == 'r' && all[16 * k + 1] == '0' + k);
    if (r->rank == r->size - 1)
        RT_TRY(rt_comm_send(c, 0, word, sizeof word, &r->err));
    if (r->rank == 0)
        RT_TRY(rt_comm_recv(c, r->size - 1, word, sizeof word, &r->err));
    CHECK(word[1] == '0' + (r->rank == 0 ? r->size - 1 : r->rank));
out:
    r->st = st != RT_OK ? st : r->st;
    rt_comm_free(c);
    return NULL;
}

static void test_collectives(void **state)
{
    (void)state;
    /* fewer elements than ranks, one shard short, shards empty, more than one piece of a sum */
    static const int64_t sizes[] = {1, 63, 64, 129, 1000, 300000};
    for (int size = 2; size <= MAX; size += size == 3 ? 2 : 1)
        for (size_t k = 0; k < sizeof sizes / sizeof sizes[0]; k++) {
            struct rank r[MAX] = {{0}};
            for (int i = 0; i < size; i++) {
                r[i].n = sizes[k] * (k == 5 && size == 2 ? 2 : 1);
                r[i].dtype = k % 3 == 0 ? RT_F32 : k % 3 == 1 ? RT_F64 : RT_BF16;
                r[i].x = calloc((size_t)r[i].n, 8);
            }
            rk_start(r, size, collectives);
            rk_join(r, size);
            for (int i = 0; i < size; i++) {
                if (r[i].st != RT_OK)
                    fail_msg("rank %d of %d, %ld elements: %s", i, size, (long)r[i].n, r[i].err.msg);
                assert_memory_equal(r[i].x, r[0].x, (size_t)r[i].n * rt_dtype_size(r[i].dtype));
            }
            for (int i = 0; i < size; i++)
                free(r[i].x);
        }
}

static void test_shard(void **state)
{
    (void)state;
    for (int size = 1; size < 9; size++)
        for (int64_t n = 0; n < 1500; n += 37) {
            int64_t at = 0, first, count;
            for (int r = 0; r < size; r++) {
                rt_comm_shard(n, r, size, &first, &count);
                assert_true(first == at && count >= 0 && (first % 64 == 0 || count == 0));
                at += count;
            }
            assert_int_equal(at, n);
        }
    double x = 2;
    assert_int_equal(rt_comm_all_reduce(NULL, &x, 1, RT_F64, NULL), RT_OK);
    assert_true(x == 2 && rt_comm_rank(NULL) == 0 && rt_comm_size(NULL) == 1);
}

/* The backends' entries are these collectives on the device's elements. */
static void *on_device(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    struct rt_device d = {0};
    enum rt_status st;
    float *x = NULL;
    RT_TRY(rk_open(r, &c));
    RT_TRY(rt_device_open(&rt_backend_ref, &(struct rt_dev_options){.comm = c}, &d, &r->err));
    RT_TRY(d.be->alloc(d.dev, 300 * sizeof *x, (void **)&x, &r->err));
    for (int i = 0; i < 300; i++)
        x[i] = (float)(i + r->rank);
    RT_TRY(d.be->all_reduce(d.dev, d.q, x, 300, &r->err));
    CHECK(x[7] == 15 && x[299] == 599);
    x[0] = (float)(10 + r->rank);
    RT_TRY(d.be->broadcast(d.dev, d.q, x, 1, 1, &r->err));
    CHECK(x[0] == 11);
    x[200] = (float)r->rank; /* of the second shard */
    RT_TRY(d.be->all_gather(d.dev, d.q, x, 300, &r->err));
    CHECK(x[200] == 1);
    RT_TRY(d.be->reduce_scatter(d.dev, d.q, x, 300, &r->err));
    CHECK(r->rank == 0 || x[200] == 2);
out:
    r->st = st != RT_OK ? st : r->st;
    if (x != NULL)
        d.be->free(d.dev, x);
    rt_device_close(&d);
    rt_comm_free(c);
    return NULL;
}

static void test_backend(void **state)
{
    (void)state;
    struct rank r[2] = {{0}};
    rk_start(r, 2, on_device);
    rk_join(r, 2);
    for (int i = 0; i < 2; i++)
        if (r[i].st != RT_OK)
            fail_msg("rank %d: %s", i, r[i].err.msg);
}

/* ---- ranks that are lost ---- */

/* One of three goes away, with or without a word: the others end with an error that names it, at once. */
static void test_lost(void **state)
{
    (void)state;
    for (int says = 0; says < 2; says++) {
        struct rank r[3] = {{0}};
        r[1].leaves = true;
        r[1].says = says == 1 ? "the disk of rank one is full" : NULL;
        rk_start(r, 3, rk_lost);
        rk_join(r, 3);
        assert_int_equal(r[1].st, RT_OK);
        for (int i = 0; i < 3; i += 2) {
            assert_int_equal(r[i].st, RT_IO);
            assert_true(strstr(r[i].err.msg, "rank 1 of 3") != NULL || strstr(r[i].err.msg, "closed the connection") != NULL);
        }
        if (says == 1)
            assert_true(strstr(r[0].err.msg, "disk of rank one") != NULL || strstr(r[2].err.msg, "disk of rank one") != NULL);
    }
}

static void *silent(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    double x = 1;
    r->st = rk_open(r, &c);
    if (r->rank == 1)
        sleep(2);
    else if (r->st == RT_OK)
        r->st = rt_comm_sum(c, &x, 1, &r->err);
    rt_comm_free(c);
    return NULL;
}

/* A rank that lives and does nothing: the wait has an end. */
static void test_silent(void **state)
{
    (void)state;
    struct rank r[2] = {{0}};
    r[0].timeout = 0.3;
    rk_start(r, 2, silent);
    rk_join(r, 2);
    assert_int_equal(r[0].st, RT_IO);
    assert_non_null(strstr(r[0].err.msg, "waiting for rank 1 of 2"));
}

static void *out_of_step(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    double x[2] = {1, 1};
    r->st = rk_open(r, &c);
    if (r->st == RT_OK)
        r->st = rt_comm_sum(c, x, 1 + r->rank, &r->err);
    rt_comm_free(c);
    return NULL;
}

static void test_out_of_step(void **state)
{
    (void)state;
    struct rank r[2] = {{0}};
    rk_start(r, 2, out_of_step);
    rk_join(r, 2);
    assert_true(r[0].st == RT_IO && r[1].st == RT_IO);
    assert_true(strstr(r[0].err.msg, "out of step") != NULL || strstr(r[1].err.msg, "out of step") != NULL);
}

/* Looking after the others takes nothing from a collective, and finds their last words. */
static void *looked_after(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    struct rt_err why = {0};
    enum rt_status st;
    double x = r->rank;
    RT_TRY(rk_open(r, &c));
    if (r->rank == 1) {
        RT_TRY(rt_comm_send(c, 0, &x, sizeof x, &r->err));
        RT_TRY(rt_comm_recv(c, 0, &x, sizeof x, &r->err));
        rt_comm_abort(c, "the disk of rank one is full");
        goto out;
    }
    for (int i = 0; i < 20; i++, usleep(5000))
        RT_TRY(rt_comm_check(c, &r->err));
    RT_TRY(rt_comm_recv(c, 1, &x, sizeof x, &r->err));
    CHECK(x == 1);
    RT_TRY(rt_comm_send(c, 1, &x, sizeof x, &r->err));
    for (const double end = rt_now() + 5; rt_now() < end && rt_comm_check(c, &why) == RT_OK;)
        usleep(1000);
    CHECK(why.status == RT_IO && strstr(why.msg, "rank 1 of 2") != NULL && strstr(why.msg, "disk of rank one") != NULL);
    CHECK(rt_comm_check(c, NULL) == RT_IO && rt_comm_sum(c, &x, 1, NULL) == RT_IO);
out:
    r->st = st != RT_OK ? st : r->st;
    rt_comm_free(c);
    return NULL;
}

static void *called(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    enum rt_status st;
    RT_TRY(rk_open(r, &c));
    RT_TRY(rt_comm_roll_call(c, 5, &r->err));
    if (r->rank == 1)
        sleep(2);
    else
        RT_TRY(rt_comm_roll_call(c, 0.3, &r->err));
out:
    r->st = st;
    rt_comm_free(c);
    return NULL;
}

static void test_check(void **state)
{
    (void)state;
    struct rank two[2] = {{0}}, three[3] = {{0}};
    rk_start(two, 2, looked_after);
    rk_join(two, 2);
    for (int i = 0; i < 2; i++)
        if (two[i].st != RT_OK)
            fail_msg("rank %d: %s", i, two[i].err.msg);
    rk_start(three, 3, called);
    rk_join(three, 3);
    for (int i = 0; i < 3; i += 2) {
        assert_int_equal(three[i].st, RT_IO);
        assert_non_null(strstr(three[i].err.msg, "rank 1 of 3"));
    }
    assert_true(rt_comm_check(NULL, NULL) == RT_OK && rt_comm_roll_call(NULL, 1, NULL) == RT_OK && rt_comm_timeout(NULL) == 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_collectives), cmocka_unit_test(test_shard), cmocka_unit_test(test_backend), cmocka_unit_test(test_lost),
    cmocka_unit_test(test_silent), cmocka_unit_test(test_out_of_step), cmocka_unit_test(test_check),
};
RT_SUITE(ranks, tests)
