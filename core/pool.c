/* One job at a time. A worker enters a job by raising `active` and then finding the job still open; the caller closes the
 * job and then waits for `active` to fall to 0. Both orders are sequentially consistent, so that a worker which the caller
 * does not see has not read the job's fields, and a late one goes away again. Nobody has to wait for a sleeper: the caller
 * finishes a job alone if no worker comes in time.
 */
#include "core/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/mem.h"

enum {
    SPIN_NS = 40000, /* operations of 20-50 us follow each other at about this distance */
    MAX_THREADS = 4096,
};

struct worker {
    struct rt_pool *pool;
    pthread_t thread;
    int index;
};

struct rt_pool {
    int threads, started;
    int64_t spin_ns;
    struct worker *workers; /* [threads]; 0 is the caller and has no thread */

    void (*fn)(void *, int64_t, int);
    void *ctx;
    int64_t n;

    _Alignas(64) atomic_ullong job; /* 2 * number of the job + 1 while it is open */
    atomic_bool quit, busy;
    _Alignas(64) atomic_llong next;
    _Alignas(64) atomic_int active;
    atomic_int sleepers;
    atomic_bool caller_sleeps;

    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static bool job_waits(struct rt_pool *p, unsigned long long seen)
{
    const unsigned long long job = atomic_load(&p->job);
    return ((job & 1) != 0 && job != seen) || atomic_load(&p->quit);
}

static bool nobody_active(struct rt_pool *p, unsigned long long unused)
{
    (void)unused;
    return atomic_load(&p->active) == 0;
}

/* True as soon as the condition holds, false once the time is up. */
static bool spin(struct rt_pool *p, bool (*cond)(struct rt_pool *, unsigned long long), unsigned long long arg)
{
    if (cond(p, arg))
        return true;
    if (p->spin_ns == 0)
        return false;
    for (const int64_t end = now_ns() + p->spin_ns; now_ns() < end;) {
        for (int i = 0; i < 8; i++) {
            relax();
            if (cond(p, arg))
                return true;
        }
    }
    return false;
}

static void do_items(struct rt_pool *p, int worker)
{
    const int64_t n = p->n;
    for (;;) {
        const int64_t item = atomic_fetch_add(&p->next, 1);
        if (item >= n)
            return;
        p->fn(p->ctx, item, worker);
    }
}

static void leave(struct rt_pool *p)
{
    if (atomic_fetch_sub(&p->active, 1) == 1 && atomic_load(&p->caller_sleeps)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_signal(&p->idle);
        pthread_mutex_unlock(&p->lock);
    }
}

static void *work(void *arg)
{
    const struct worker *w = arg;
    struct rt_pool *p = w->pool;
    unsigned long long seen = 0;
    while (!atomic_load(&p->quit)) {
        if (!spin(p, job_waits, seen)) {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->sleepers, 1);
            while (!job_waits(p, seen))
                pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->sleepers, 1);
            pthread_mutex_unlock(&p->lock);
        }
        atomic_fetch_add(&p->active, 1);
        const unsigned long long job = atomic_load(&p->job);
        if ((job & 1) != 0) {
            seen = job;
            do_items(p, w->index);
        }
        leave(p);
    }
    return NULL;
}

int rt_cpu_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set);
    const long n = sysconf(_SC_NPROCESSORS_ONLN); /* more cores than the set has room for */
    return n > 0 && n <= MAX_THREADS ? (int)n : 1;
}

enum rt_status rt_pool_create(int threads, struct rt_pool **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_pool *p = NULL;
    sigset_t all, old;
    *out = NULL;
    if (threads < 0 || threads > MAX_THREADS)
        return rt_fail(err, RT_USAGE, "%d threads: expected 0 (all cores) to %d", threads, MAX_THREADS);
    const int cores = rt_cpu_count();
    if (threads == 0)
        threads = cores;
    RT_TRY(rt_alloc(1, sizeof *p, "a thread pool", &p, err));
    p->threads = threads;
    p->spin_ns = threads <= cores ? SPIN_NS : 0; /* more threads than cores: a spinning one would hold up a working one */
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->idle, NULL);
    RT_TRY(rt_alloc((size_t)threads, sizeof *p->workers, "a thread pool", &p->workers, err));
    p->started = 1;
    /* Signals are for the main thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (int i = 1; i < threads && st == RT_OK; i++) {
        p->workers[i] = (struct worker){.pool = p, .index = i};
        const int rc = pthread_create(&p->workers[i].thread, NULL, work, &p->workers[i]);
        if (rc == 0)
            p->started = i + 1;
        else
            st = rt_fail(err, RT_NOMEM, "cannot start thread %d of %d: %s; use fewer --threads", i + 1, threads, strerror(rc));
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
out:
    if (st == RT_OK)
        *out = p;
    else
        rt_pool_free(p);
    return st;
}

void rt_pool_free(struct rt_pool *p)
{
    if (p == NULL)
        return;
    atomic_store(&p->quit, true);
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->started; i++)
        pthread_join(p->workers[i].thread, NULL);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->idle);
    pthread_mutex_destroy(&p->lock);
    rt_free(p->workers);
    rt_free(p);
}

int rt_pool_threads(const struct rt_pool *p)
{
    return p->threads;
}

static int own_index(const struct rt_pool *p)
{
    const pthread_t self = pthread_self();
    for (int i = 1; i < p->started; i++)
        if (pthread_equal(p->workers[i].thread, self))
            return i;
    return 0;
}

static void open_job(struct rt_pool *p)
{
    atomic_store(&p->next, 0);
    atomic_fetch_add(&p->job, 1);
    const int asleep = atomic_load(&p->sleepers);
    if (asleep == 0)
        return;
    pthread_mutex_lock(&p->lock);
    if (p->n - 1 < asleep)
        for (int64_t i = 1; i < p->n; i++)
            pthread_cond_signal(&p->wake);
    else
        pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void close_job(struct rt_pool *p)
{
    atomic_fetch_add(&p->job, 1);
    if (spin(p, nobody_active, 0))
        return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_sleeps, true);
    while (!nobody_active(p, 0))
        pthread_cond_wait(&p->idle, &p->lock);
    atomic_store(&p->caller_sleeps, false);
    pthread_mutex_unlock(&p->lock);
}

void rt_pool_run(struct rt_pool *p, int64_t n, void (*fn)(void *ctx, int64_t item, int worker), void *ctx)
{
    if (n <= 0)
        return;
    if (atomic_load(&p->busy)) {
        const int worker = own_index(p);
        for (int64_t i = 0; i < n; i++)
            fn(ctx, i, worker);
        return;
    }
    atomic_store(&p->busy, true);
    if (p->threads == 1 || n == 1) {
        for (int64_t i = 0; i < n; i++)
            fn(ctx, i, 0);
    } else {
        p->fn = fn;
        p->ctx = ctx;
        p->n = n;
        open_job(p);
        do_items(p, 0);
        close_job(p);
    }
    atomic_store(&p->busy, false);
}
