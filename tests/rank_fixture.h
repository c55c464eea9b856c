/* Ranks as threads, each with a communicator of its own, for the suites of meetings and collectives. */
#ifndef RT_TESTS_RANK_FIXTURE_H
#define RT_TESTS_RANK_FIXTURE_H

#include <pthread.h>

#include "core/collective.h"
#include "core/net.h"
#include "tests/suite.h"

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
    double stop;       /* seconds of rt_now at which it is asked to stop; 0: never */
    const char *says;  /* its last words */
};

int rk_free_port(void);
enum rt_status rk_open(struct rank *r, struct rt_comm **c);
/* Ranks 0 .. size - 1 at one port, each in fn(&r[i]). */
void rk_start(struct rank *r, int size, void *(*fn)(void *));
void rk_join(struct rank *r, int size);
/* A thread of a rank: meets the others, and sums three times with them, or leaves. */
void *rk_lost(void *self);

#endif
