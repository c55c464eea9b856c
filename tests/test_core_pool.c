#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "core/mem.h"
#include "core/pool.h"
#include "tests/suite.h"

enum { ITEMS = 1000 };

struct job {
    struct rt_pool *pool;
    atomic_int done[ITEMS];
    atomic_int inside[64]; /* by worker: two items in one scratch slot at a time would be a fault */
    atomic_int bad;
    int64_t order[ITEMS];
    int n_order;
};

static void item(void *ctx, int64_t i, int worker)
{
    struct job *j = ctx;
    if (worker < 0 || worker >= rt_pool_threads(j->pool) || atomic_fetch_add(&j->inside[worker], 1) != 0)
        atomic_fetch_add(&j->bad, 1);
    atomic_fetch_add(&j->done[i], 1);
    atomic_fetch_sub(&j->inside[worker], 1);
}

static void each_item_once(void **state)
{
    (void)state;
    for (int threads = 1; threads <= 5; threads++) {
        struct rt_err err = {0};
        struct job j = {0};
        assert_ok(rt_pool_create(threads, &j.pool, &err));
        assert_int_equal(rt_pool_threads(j.pool), threads);
        for (int round = 1; round <= 200; round++) {
            const int64_t n = round % 10 == 0 ? ITEMS : round % 7; /* also fewer items than threads, and none */
            for (int i = 0; i < ITEMS; i++)
                atomic_store(&j.done[i], 0);
            rt_pool_run(j.pool, n, item, &j);
            for (int i = 0; i < ITEMS; i++)
                assert_int_equal(atomic_load(&j.done[i]), i < n);
        }
        assert_int_equal(atomic_load(&j.bad), 0);
        rt_pool_free(j.pool);
    }
    rt_pool_free(NULL);
}

static void wakes_after_sleep(void **state)
{
    struct rt_err err = {0};
    struct job j = {0};
    (void)state;
    assert_ok(rt_pool_create(3, &j.pool, &err));
    for (int round = 1; round <= 20; round++) {
        usleep(500); /* longer than workers spin */
        rt_pool_run(j.pool, 50, item, &j);
        assert_int_equal(atomic_load(&j.done[49]), round);
    }
    assert_int_equal(atomic_load(&j.bad), 0);
    rt_pool_free(j.pool);
}

/* An item that ends only when another thread is at work on another: proof that there are two. */
static void meet(void *ctx, int64_t i, int worker)
{
    struct job *j = ctx;
    (void)worker;
    atomic_fetch_add(&j->done[i], 1);
    while (atomic_load(&j->done[1 - i]) == 0)
        usleep(10);
}

static void runs_side_by_side(void **state)
{
    struct rt_err err = {0};
    struct job j = {0};
    (void)state;
    for (int threads = 2; threads <= 3; threads++) {
        assert_ok(rt_pool_create(threads, &j.pool, &err));
        for (int round = 0; round < 5; round++) {
            atomic_store(&j.done[0], 0);
            atomic_store(&j.done[1], 0);
            rt_pool_run(j.pool, 2, meet, &j);
            usleep(500); /* the workers sleep when the next one comes */
        }
        rt_pool_free(j.pool);
    }
}

static void slow(void *ctx, int64_t i, int worker)
{
    struct job *j = ctx;
    if (worker != 0)
        usleep(3000);
    atomic_fetch_add(&j->done[i], 1);
}

static void waits_for_the_last_item(void **state)
{
    struct rt_err err = {0};
    struct job j = {0};
    (void)state;
    assert_ok(rt_pool_create(4, &j.pool, &err));
    for (int round = 1; round <= 20; round++) {
        rt_pool_run(j.pool, 8, slow, &j);
        for (int i = 0; i < 8; i++)
            assert_int_equal(atomic_load(&j.done[i]), round);
    }
    rt_pool_free(j.pool);
}

struct nest {
    struct rt_pool *pool;
    atomic_int sum, bad;
};

struct inner {
    struct nest *nest;
    int64_t outer, next;
    int worker;
};

static void inner_item(void *ctx, int64_t i, int worker)
{
    struct inner *in = ctx;
    if (worker != in->worker || i != in->next++) /* serial: same worker, ascending, and no race on next */
        atomic_fetch_add(&in->nest->bad, 1);
    atomic_fetch_add(&in->nest->sum, 1);
}

static void outer_item(void *ctx, int64_t i, int worker)
{
    struct inner in = {ctx, i, 0, worker};
    rt_pool_run(in.nest->pool, 10, inner_item, &in);
}

static void nested_calls_are_serial(void **state)
{
    (void)state;
    for (int threads = 1; threads <= 4; threads++) {
        struct rt_err err = {0};
        struct nest nest = {0};
        assert_ok(rt_pool_create(threads, &nest.pool, &err));
        rt_pool_run(nest.pool, 30, outer_item, &nest);
        rt_pool_run(nest.pool, 1, outer_item, &nest);
        assert_int_equal(atomic_load(&nest.sum), 310);
        assert_int_equal(atomic_load(&nest.bad), 0);
        rt_pool_free(nest.pool);
    }
}

static void note(void *ctx, int64_t i, int worker)
{
    struct job *j = ctx;
    (void)worker;
    j->order[j->n_order++] = i;
}

static void one_thread_goes_in_order(void **state)
{
    struct rt_err err = {0};
    struct job j = {0};
    (void)state;
    assert_ok(rt_pool_create(1, &j.pool, &err));
    rt_pool_run(j.pool, 100, note, &j);
    assert_int_equal(j.n_order, 100);
    for (int i = 0; i < 100; i++)
        assert_int_equal(j.order[i], i);
    rt_pool_free(j.pool);
}

static void thread_counts(void **state)
{
    struct rt_err err = {0};
    struct rt_pool *p;
    (void)state;
    assert_true(rt_cpu_count() >= 1);
    assert_ok(rt_pool_create(0, &p, &err));
    assert_int_equal(rt_pool_threads(p), rt_cpu_count());
    rt_pool_free(p);
    assert_status(rt_pool_create(-1, &p, &err), USAGE);
    assert_null(p);
    assert_status(rt_pool_create(1 << 20, &p, &err), USAGE);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(each_item_once),          cmocka_unit_test(wakes_after_sleep),
    cmocka_unit_test(runs_side_by_side),       cmocka_unit_test(waits_for_the_last_item),
    cmocka_unit_test(nested_calls_are_serial), cmocka_unit_test(one_thread_goes_in_order),
    cmocka_unit_test(thread_counts),
};
RT_SUITE(core_pool, tests)
