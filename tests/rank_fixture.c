#include "tests/rank_fixture.h"

#include "core/log.h"

int rk_free_port(void)
{
    struct rt_err err = {0};
    int fd, port;
    assert_ok(rt_net_listen(0, &fd, &port, &err));
    rt_net_close(fd);
    return port;
}

static bool is_stopped(void *self)
{
    const struct rank *r = self;
    return r->stop > 0 && rt_now() >= r->stop;
}

enum rt_status rk_open(struct rank *r, struct rt_comm **c)
{
    const struct rt_comm_options o = {.rank = {r->rank, r->size, r->rank}, .host = "127.0.0.1", .port = r->port,
                                      .identity = r->identity != NULL ? r->identity : "run", .join_timeout = r->join > 0 ? r->join : 20,
                                      .timeout = r->timeout > 0 ? r->timeout : 20, .stop = is_stopped, .stop_self = r};
    return rt_comm_open(&o, c, &r->err);
}

void rk_start(struct rank *r, int size, void *(*fn)(void *))
{
    const int port = rk_free_port();
    for (int i = 0; i < size; i++) {
        r[i].rank = i;
        r[i].size = size;
        r[i].port = port;
        assert_int_equal(pthread_create(&r[i].thread, NULL, fn, &r[i]), 0);
    }
}

void rk_join(struct rank *r, int size)
{
    for (int i = 0; i < size; i++)
        pthread_join(r[i].thread, NULL);
}

void *rk_lost(void *self)
{
    struct rank *r = self;
    struct rt_comm *c = NULL;
    double x = 1;
    r->st = rk_open(r, &c);
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
