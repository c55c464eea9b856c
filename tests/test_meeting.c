/* How ranks meet: who may come in, what strangers, liars and lost ranks do to the others, and when a wait ends. */
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/log.h"
#include "core/rng.h"
#include "tests/rank_fixture.h"

/* Two ranks of which one is of another run: it is told so, and the other gives up when its time is over. */
static void test_identity(void **state)
{
    (void)state;
    struct rank r[2] = {{0}};
    r[0].join = 1;
    r[1].identity = "another";
    rk_start(r, 2, rk_lost);
    rk_join(r, 2);
    assert_int_equal(r[1].st, RT_REFUSED);
    assert_non_null(strstr(r[1].err.msg, "another run"));
    assert_int_equal(r[0].st, RT_IO);
    assert_non_null(strstr(r[0].err.msg, "rank 1 of 2 did not come"));
    assert_non_null(strstr(r[0].err.msg, "another run"));
}

static void test_nobody(void **state)
{
    (void)state;
    struct rank r = {.rank = 1, .size = 2, .port = rk_free_port(), .join = 0.2};
    rk_lost(&r);
    assert_int_equal(r.st, RT_IO);
    assert_non_null(strstr(r.err.msg, "no connection"));
    struct rank alone = {.rank = 0, .size = 1};
    rk_lost(&alone);
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
    struct stranger s = {.port = rk_free_port()};
    for (int i = 0; i < 2; i++)
        r[i] = (struct rank){.rank = i, .size = 2, .port = s.port};
    assert_int_equal(pthread_create(&r[0].thread, NULL, rk_lost, &r[0]), 0);
    assert_int_equal(pthread_create(&s.thread, NULL, knock, &s), 0);
    usleep(200000);
    assert_int_equal(pthread_create(&r[1].thread, NULL, rk_lost, &r[1]), 0);
    rk_join(r, 2);
    pthread_join(s.thread, NULL);
    for (int i = 0; i < 2; i++)
        if (r[i].st != RT_OK)
            fail_msg("rank %d: %s", i, r[i].err.msg);
}

static int knock_at(const struct rank *r)
{
    struct rt_err err = {0};
    int fd;
    assert_ok(rt_net_connect("127.0.0.1", r->port, rt_net_deadline(5), &fd, &err));
    return fd;
}

/* A hello of rank 1, of the run that open_comm names. */
static void say_hello(int fd, uint32_t size)
{
    struct rt_err err = {0};
    unsigned char hello[128] = "RETORT\1\n";
    const uint32_t says[4] = {1, 1, size, 4};
    memcpy(hello + 8, says, sizeof says);
    memcpy(hello + 24, "run", 3);
    assert_ok(rt_net_send(fd, hello, sizeof hello, rt_net_deadline(5), &err));
}

/* A byte now and then, and a new stranger now and then: the end of the meeting stays where it is. */
static void test_deadline(void **state)
{
    (void)state;
    struct rank r = {.rank = 0, .size = 2, .port = rk_free_port(), .join = 0.5};
    struct rt_err err = {0};
    int fd[30], n = 1;
    char byte;
    const double start = rt_now();
    assert_int_equal(pthread_create(&r.thread, NULL, rk_lost, &r), 0);
    fd[0] = knock_at(&r);
    for (; n < 30 && rt_now() < start + 3; usleep(100000)) {
        if (rt_net_send(fd[0], "R", 1, rt_net_deadline(1), &err) != RT_OK || rt_net_connect("127.0.0.1", r.port, rt_net_deadline(0), &fd[n], &err) != RT_OK)
            break;
        n++;
    }
    rk_join(&r, 1);
    const double took = rt_now() - start;
    assert_int_equal(r.st, RT_IO);
    assert_non_null(strstr(r.err.msg, "rank 1 of 2 did not come within 0.5 seconds"));
    if (took > 2)
        fail_msg("the meeting took %g seconds", took);
    for (int i = 0; i < n; i++)
        rt_net_close(fd[i]);
    /* of one peer's bytes likewise */
    int pair[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair), 0);
    assert_int_equal(write(pair[1], "R", 1), 1);
    rt_err_clear(&err);
    assert_int_equal(rt_net_recv(pair[0], (char[2]){0}, 2, rt_net_deadline(-1), &err), RT_IO);
    assert_non_null(strstr(err.msg, "1 of 2 bytes"));
    assert_int_equal(write(pair[1], "R", 1), 1);
    assert_int_equal(rt_net_recv(pair[0], &byte, 1, rt_net_deadline(0), NULL), RT_OK);
    close(pair[0]);
    close(pair[1]);
}

/* Silent strangers that came before do not keep the ranks waiting. */
static void test_queue(void **state)
{
    (void)state;
    struct rank r[2] = {{0}};
    int fd[8];
    const int port = rk_free_port();
    for (int i = 0; i < 2; i++)
        r[i] = (struct rank){.rank = i, .size = 2, .port = port};
    assert_int_equal(pthread_create(&r[0].thread, NULL, rk_lost, &r[0]), 0);
    for (int i = 0; i < 8; i++)
        fd[i] = knock_at(&r[0]);
    const double start = rt_now();
    assert_int_equal(pthread_create(&r[1].thread, NULL, rk_lost, &r[1]), 0);
    rk_join(r, 2);
    const double took = rt_now() - start;
    for (int i = 0; i < 2; i++)
        if (r[i].st != RT_OK)
            fail_msg("rank %d: %s", i, r[i].err.msg);
    if (took > 3)
        fail_msg("the ranks met after %g seconds", took);
    for (int i = 0; i < 8; i++)
        rt_net_close(fd[i]);
}

/* Rank 1 of 3 is gone when the others meet: it is named. */
static void test_lost_meeting(void **state)
{
    (void)state;
    struct rank r[3] = {{0}};
    const int port = rk_free_port();
    const struct linger none = {.l_onoff = 1};
    for (int i = 0; i < 3; i += 2) {
        r[i] = (struct rank){.rank = i, .size = 3, .port = port};
        if (i == 2) {
            const int fd = knock_at(&r[0]);
            say_hello(fd, 3);
            usleep(200000);
            assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none), 0);
            rt_net_close(fd);
        }
        assert_int_equal(pthread_create(&r[i].thread, NULL, rk_lost, &r[i]), 0);
    }
    pthread_join(r[0].thread, NULL);
    pthread_join(r[2].thread, NULL);
    assert_int_equal(r[0].st, RT_IO);
    if (strstr(r[0].err.msg, "rank 1 is lost during the meeting: ") == NULL)
        fail_msg("rank 0 says: %s", r[0].err.msg);
    assert_int_equal(r[2].st, RT_IO);
}

/* Who is asked to stop does not wait for the others: rank 0 for rank 1, rank 1 for somebody who listens, and for an answer. */
static void test_stopped(void **state)
{
    (void)state;
    for (int what = 0; what < 3; what++) {
        struct rt_err err = {0};
        struct rank r = {.rank = what > 0, .size = 2, .port = rk_free_port(), .stop = rt_now() + 0.3};
        int listener = -1;
        if (what == 2)
            assert_ok(rt_net_listen(r.port, &listener, NULL, &err));
        const double start = rt_now();
        rk_lost(&r);
        const double took = rt_now() - start;
        assert_int_equal(r.st, RT_INTERRUPTED);
        if (took > 3)
            fail_msg("stopped after %g seconds", took);
        rt_net_close(listener);
    }
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
        bool ready;
        if (rt_net_ready(&listener, 1, rt_net_deadline(5), &ready, &err) != RT_OK || rt_net_accept(listener, &fd, host, &err) != RT_OK || fd < 0)
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
    struct stranger s = {.port = rk_free_port()};
    assert_int_equal(pthread_create(&s.thread, NULL, impostor, &s), 0);
    for (int i = 0; i < 3; i++) {
        struct rank r = {.rank = 2, .size = 3, .port = s.port, .join = 3};
        rk_lost(&r);
        assert_int_equal(r.st, i == 0 ? RT_REFUSED : RT_IO);
    }
    pthread_join(s.thread, NULL);
}

/* Somebody who says the right hello, and then sends what is no message: a length of any size is never believed. */
static void *liar(void *self)
{
    struct stranger *s = self;
    struct rt_err err = {0};
    unsigned char answer[256 + 2 * 72], bytes[400] = {0};
    int fd;
    if (rt_net_connect("127.0.0.1", s->port, rt_net_deadline(5), &fd, &err) != RT_OK)
        return NULL;
    say_hello(fd, 2);
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
        struct rank r = {.rank = 0, .size = 2, .port = rk_free_port()};
        struct stranger s = {.port = r.port, .what = what};
        assert_int_equal(pthread_create(&s.thread, NULL, liar, &s), 0);
        rk_lost(&r);
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
    rk_lost(&r);
    assert_int_equal(r.st, RT_REFUSED);
    assert_non_null(strstr(r.err.msg, "is taken"));
    rt_net_close(fd);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_identity), cmocka_unit_test(test_nobody), cmocka_unit_test(test_strangers), cmocka_unit_test(test_deadline),
    cmocka_unit_test(test_queue), cmocka_unit_test(test_lost_meeting), cmocka_unit_test(test_stopped), cmocka_unit_test(test_impostor),
    cmocka_unit_test(test_liar), cmocka_unit_test(test_taken),
};
RT_SUITE(meeting, tests)
