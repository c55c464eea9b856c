/* Several ranks: meeting over TCP, collectives, and what happens when one is lost, hangs, or is not who it should be. Each rank is a thread
 * with a communicator of its own. */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/backend.h"
#include "core/collective.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/net.h"
#include "core/rng.h"
#include "tests/suite.h"

enum { MAX = 5 };

struct rank {
    pthread_t thread;
    int rank, size, port;
    const char *identity;
    double timeout, join;
    int64_t n;
    enum rt_dtype dtype;
    void *x;           /* [n] */
    enum rt_status st;
    struct rt_err err;
    bool leaves;       /* opens, and is gone */
    const char *says;  /* its last words */
};

static int free_port(void)
{
    struct rt_err err = {0};
    int fd, port;
    assert_ok(rt_net_listen(0, &fd, &port, &err));
    rt_net_close(fd);
    return port;
}

static enum rt_status open_comm(struct rank *r, struct rt_comm **c)
{
    const struct rt_comm_options o = {.rank = {r->rank, r->size, r->rank}, .host = "127.0.0.1", .port = r->port,
                                      .identity = r->identity != NULL ? r->identity : "run", .join_timeout = r->join > 0 ? r->join : 20,
                                      .timeout = r->timeout > 0 ? r->timeout : 20};
    return rt_comm_open(&o, c, &r->err);
}

static void start(struct rank *r, int size, void *(*fn)(void *))
{
    const int port = free_port();
    for (int i = 0; i < size; i++) {
        r[i].rank = i;
        r[i].size = size;
        r[i].port = port;
        assert_int_equal(pthread_create(&r[i].thread, NULL, fn, &r[i]), 0);
    }
}

static void join(struct rank *r, int size)
{
    for (int i = 0; i < size; i++)
        pthread_join(r[i].thread, NULL);
}

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
    RT_TRY(open_comm(r, &c));
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
            start(r, size, collectives);
            join(r, size);
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
    RT_TRY(open_comm(r, &c));
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
    start(r, 2, on_device);
    join(r, 2);
    for (int i = 0; i < 2; i++)
        if (r[i].st != RT_OK)
            fail_msg("rank %d: %s", i, r[i].err.msg);
}

/* ---- ranks that are lost ---- */

static void *lost(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    double x = 1;
    r->st = open_comm(r, &c);
    if (r->st == RT_OK && r->leaves) {
        if (r->says != NULL)
            rt_comm_abort(c, r->says);
        rt_comm_free(c);
        return NULL;
    }
    for (int i = 0; i < 3 && r->st == RT_OK; i++)
        r->st = rt_comm_sum(c, &x, 1, &r->err);
    rt_comm_free(c);
    return NULL;
}

/* One of three goes away, with or without a word: the others end with an error that names it, at once. */
static void test_lost(void **state)
{
    (void)state;
    for (int says = 0; says < 2; says++) {
        struct rank r[3] = {{0}};
        r[1].leaves = true;
        r[1].says = says == 1 ? "the disk of rank one is full" : NULL;
        start(r, 3, lost);
        join(r, 3);
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
    r->st = open_comm(r, &c);
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
    start(r, 2, silent);
    join(r, 2);
    assert_int_equal(r[0].st, RT_IO);
    assert_non_null(strstr(r[0].err.msg, "waiting for rank 1 of 2"));
}

static void *out_of_step(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    double x[2] = {1, 1};
    r->st = open_comm(r, &c);
    if (r->st == RT_OK)
        r->st = rt_comm_sum(c, x, 1 + r->rank, &r->err);
    rt_comm_free(c);
    return NULL;
}

static void test_out_of_step(void **state)
{
    (void)state;
    struct rank r[2] = {{0}};
    start(r, 2, out_of_step);
    join(r, 2);
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
    RT_TRY(open_comm(r, &c));
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
    RT_TRY(open_comm(r, &c));
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
    start(two, 2, looked_after);
    join(two, 2);
    for (int i = 0; i < 2; i++)
        if (two[i].st != RT_OK)
            fail_msg("rank %d: %s", i, two[i].err.msg);
    start(three, 3, called);
    join(three, 3);
    for (int i = 0; i < 3; i += 2) {
        assert_int_equal(three[i].st, RT_IO);
        assert_non_null(strstr(three[i].err.msg, "rank 1 of 3"));
    }
    assert_true(rt_comm_check(NULL, NULL) == RT_OK && rt_comm_roll_call(NULL, 1, NULL) == RT_OK && rt_comm_timeout(NULL) == 0);
}

/* ---- who may come in ---- */

/* Two ranks of which one is of another run: it is told so, and the other gives up when its time is over. */
static void test_identity(void **state)
{
    (void)state;
    struct rank r[2] = {{0}};
    r[0].join = 1;
    r[1].identity = "another";
    start(r, 2, lost);
    join(r, 2);
    assert_int_equal(r[1].st, RT_REFUSED);
    assert_non_null(strstr(r[1].err.msg, "another run"));
    assert_int_equal(r[0].st, RT_IO);
    assert_non_null(strstr(r[0].err.msg, "rank 1 of 2 did not come"));
    assert_non_null(strstr(r[0].err.msg, "another run"));
}

static void test_nobody(void **state)
{
    (void)state;
    struct rank r = {.rank = 1, .size = 2, .port = free_port(), .join = 0.2};
    lost(&r);
    assert_int_equal(r.st, RT_IO);
    assert_non_null(strstr(r.err.msg, "no connection"));
    struct rank alone = {.rank = 0, .size = 1};
    lost(&alone);
    assert_int_equal(alone.st, RT_USAGE);
}

struct stranger {
    pthread_t thread;
    int port, what;
};

/* Bytes of every kind at the meeting's door, from nothing at all to hellos with damage in each field. */
static void *knock(void *self)
{
    struct stranger *s = self;
    for (int i = 0; i < 40; i++) {
        unsigned char bytes[128];
        int fd;
        struct rt_err err = {0};
        for (size_t k = 0; k < sizeof bytes; k++)
            bytes[k] = (unsigned char)rt_rng_u64(5, (uint64_t)i, k);
        if (i % 2 == 0) {
            memcpy(bytes, "RETORT\1\n", 8);
            memset(bytes + 8, 0, 16);
            bytes[8] = 1;                       /* version */
            bytes[12] = i % 4 == 0 ? 1 : 255;   /* rank */
            bytes[16] = 2;                      /* size */
        }
        if (i % 10 == 7)
            bytes[15] = 0x80; /* a rank below 0, if it were signed */
        if (rt_net_connect("127.0.0.1", s->port, rt_net_deadline(1), &fd, &err) != RT_OK)
            break;
        rt_net_send(fd, bytes, i % 5 == 0 ? 17 : sizeof bytes, rt_net_deadline(1), &err);
        rt_net_close(fd);
    }
    return NULL;
}

static void test_strangers(void **state)
{
    (void)state;
    struct rank r[2] = {{0}};
    struct stranger s = {.port = free_port()};
    for (int i = 0; i < 2; i++)
        r[i] = (struct rank){.rank = i, .size = 2, .port = s.port};
    assert_int_equal(pthread_create(&r[0].thread, NULL, lost, &r[0]), 0);
    assert_int_equal(pthread_create(&s.thread, NULL, knock, &s), 0);
    usleep(200000);
    assert_int_equal(pthread_create(&r[1].thread, NULL, lost, &r[1]), 0);
    join(r, 2);
    pthread_join(s.thread, NULL);
    for (int i = 0; i < 2; i++)
        if (r[i].st != RT_OK)
            fail_msg("rank %d: %s", i, r[i].err.msg);
}

/* Where rank 0 should be, somebody else answers, with any bytes or none. */
static void *impostor(void *self)
{
    struct stranger *s = self;
    struct rt_err err = {0};
    char host[RT_NET_HOST];
    int listener, fd;
    unsigned char bytes[1024];
    if (rt_net_listen(s->port, &listener, NULL, &err) != RT_OK)
        return NULL;
    for (int i = 0; i < 3; i++) {
        if (rt_net_accept(listener, rt_net_deadline(5), &fd, host, &err) != RT_OK || fd < 0)
            break;
        for (size_t k = 0; k < sizeof bytes; k++)
            bytes[k] = (unsigned char)rt_rng_u64(6, (uint64_t)i, k);
        if (i == 1) { /* a good answer, and places that are none */
            memset(bytes, 0, 256);
            memcpy(bytes, "RETORT\1\n", 8);
        }
        if (i < 2)
            rt_net_send(fd, bytes, sizeof bytes, rt_net_deadline(1), &err);
        rt_net_close(fd);
    }
    rt_net_close(listener);
    return NULL;
}

static void test_impostor(void **state)
{
    (void)state;
    struct stranger s = {.port = free_port()};
    assert_int_equal(pthread_create(&s.thread, NULL, impostor, &s), 0);
    for (int i = 0; i < 3; i++) {
        struct rank r = {.rank = 2, .size = 3, .port = s.port, .join = 3};
        lost(&r);
        assert_int_equal(r.st, i == 0 ? RT_REFUSED : RT_IO);
    }
    pthread_join(s.thread, NULL);
}

/* Somebody who says the right hello, and then sends what is no message: a length of any size is never believed. */
static void *liar(void *self)
{
    struct stranger *s = self;
    struct rt_err err = {0};
    unsigned char hello[128] = "RETORT\1\n", answer[256 + 2 * 72], bytes[400] = {0};
    int fd;
    const uint32_t says[4] = {1, 1, 2, 4};
    memcpy(hello + 8, says, sizeof says);
    memcpy(hello + 24, "run", 3);
    if (rt_net_connect("127.0.0.1", s->port, rt_net_deadline(5), &fd, &err) != RT_OK)
        return NULL;
    rt_net_send(fd, hello, sizeof hello, rt_net_deadline(5), &err);
    rt_net_recv(fd, answer, sizeof answer, rt_net_deadline(5), &err);
    /* 0: random; 1: last words of 2^63 bytes; 2: a sum of 2^40 bytes; 3: last words that break off */
    for (size_t k = 0; k < sizeof bytes; k++)
        bytes[k] = (unsigned char)rt_rng_u64(8, 1, k);
    const struct {
        uint32_t magic, op;
        uint64_t seq, bytes;
    } head[] = {{0x736d7472, 100, 0, (uint64_t)1 << 63}, {0x736d7472, 2, 0, (uint64_t)1 << 40}, {0x736d7472, 100, 0, 300}};
    if (s->what > 0)
        memcpy(bytes, &head[s->what - 1], sizeof head[0]);
    rt_net_send(fd, bytes, s->what == 3 ? 100 : sizeof bytes, rt_net_deadline(5), &err);
    rt_net_close(fd);
    return NULL;
}

static void test_liar(void **state)
{
    (void)state;
    for (int what = 0; what < 4; what++) {
        struct rank r = {.rank = 0, .size = 2, .port = free_port()};
        struct stranger s = {.port = r.port, .what = what};
        assert_int_equal(pthread_create(&s.thread, NULL, liar, &s), 0);
        lost(&r);
        assert_int_equal(r.st, RT_IO);
        assert_non_null(strstr(r.err.msg, what == 0 || what == 2 ? "out of step" : "it ended"));
        pthread_join(s.thread, NULL);
    }
}

/* A port that somebody has is refused at once. */
static void test_taken(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rank r = {.rank = 0, .size = 2};
    int fd;
    assert_ok(rt_net_listen(0, &fd, &r.port, &err));
    lost(&r);
    assert_int_equal(r.st, RT_REFUSED);
    assert_non_null(strstr(r.err.msg, "is taken"));
    rt_net_close(fd);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_shard),    cmocka_unit_test(test_collectives), cmocka_unit_test(test_backend),  cmocka_unit_test(test_lost),
    cmocka_unit_test(test_silent),   cmocka_unit_test(test_check), cmocka_unit_test(test_out_of_step), cmocka_unit_test(test_identity), cmocka_unit_test(test_nobody),
    cmocka_unit_test(test_strangers), cmocka_unit_test(test_impostor),   cmocka_unit_test(test_liar),        cmocka_unit_test(test_taken),
};
RT_SUITE(ranks, tests)
