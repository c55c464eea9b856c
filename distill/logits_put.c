/* Rows of scored windows on their way to the shards: a thread of its own, so that devices go on with the next window. */
#include <signal.h>
#include <string.h>

#include "core/pool.h"
#include "distill/logits.h"

/* The rows, then what was counted, are made to last; then the window's state is not needed any more. */
static enum rt_status put_window(struct rt_logits_job *j, struct rt_logits_window *w, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_scored_put(w->scored, w->skip, &j->sink, err));
    if (j->load.window != NULL)
        memcpy(j->load.window, w->load, (size_t)j->config.layers * (size_t)j->config.experts * sizeof *w->load);
    RT_TRY(rt_expert_load_save(&j->load, w->number, err));
    RT_TRY(rt_shard_sink_hold(j->shards, err));
    RT_TRY(rt_score_drop(w->dir, err));
out:
    return st;
}

static void *writer_main(void *self)
{
    struct rt_logits_job *j = self;
    struct rt_logits_writer *p = &j->writer;
    pthread_mutex_lock(&j->lock);
    for (;;) {
        while (p->n == 0 && !p->closing)
            pthread_cond_wait(&j->changed, &j->lock);
        if (p->n == 0)
            break;
        struct rt_logits_window *w = p->queue[0];
        enum rt_status st = p->st;
        pthread_mutex_unlock(&j->lock);
        const double t0 = rt_now();
        struct rt_err err = {0};
        if (st == RT_OK)
            st = put_window(j, w, &err);
        rt_scored_free(w->scored);
        w->scored = NULL;
        pthread_mutex_lock(&j->lock);
        if (p->st == RT_OK && st != RT_OK) {
            p->st = st;
            p->err = err;
        }
        p->busy += rt_now() - t0;
        p->tokens += st == RT_OK ? w->w.tokens : 0;
        memmove(p->queue, p->queue + 1, (size_t)--p->n * sizeof *p->queue);
        w->queued = false;
        pthread_cond_broadcast(&j->changed);
    }
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

enum rt_status rt_logits_put_start(struct rt_logits_job *j, struct rt_err *err)
{
    struct rt_logits_writer *p = &j->writer;
    sigset_t all, old;
    enum rt_status st;
    RT_TRY(rt_alloc(2 * (size_t)j->lanes, sizeof *p->queue, "windows", &p->queue, err));
    if (j->put_threads > 1)
        RT_TRY(rt_pool_create(j->put_threads, &p->pool, err));
    rt_shard_sink_threads(j->shards, p->pool);
    /* Signals are for the main thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    p->started = pthread_create(&p->thread, NULL, writer_main, j) == 0;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!p->started)
        RT_FAIL(err, NOMEM, "cannot start a thread that writes rows");
out:
    return st;
}

/* Under the lock. */
static enum rt_status wait_put(struct rt_logits_job *j, const struct rt_logits_window *w, struct rt_err *err)
{
    struct rt_logits_writer *p = &j->writer;
    const double t0 = rt_now();
    while (w->queued)
        pthread_cond_wait(&j->changed, &j->lock);
    p->waited += (rt_now() - t0) / j->lanes;
    return p->st == RT_OK ? RT_OK : rt_fail(err, p->st, "%s", p->err.msg);
}

enum rt_status rt_logits_put_push(struct rt_logits_job *j, struct rt_logits_window *w, struct rt_err *err)
{
    struct rt_logits_writer *p = &j->writer;
    pthread_mutex_lock(&j->lock);
    RT_ASSERT(p->n < 2 * j->lanes);
    w->queued = true;
    p->queue[p->n++] = w;
    pthread_cond_broadcast(&j->changed);
    const enum rt_status st = j->overlap ? RT_OK : wait_put(j, w, err);
    pthread_mutex_unlock(&j->lock);
    return st;
}

enum rt_status rt_logits_put_wait(struct rt_logits_job *j, struct rt_logits_window *w, struct rt_err *err)
{
    pthread_mutex_lock(&j->lock);
    const enum rt_status st = wait_put(j, w, err);
    pthread_mutex_unlock(&j->lock);
    return st;
}

enum rt_status rt_logits_put_end(struct rt_logits_job *j, struct rt_err *err)
{
    struct rt_logits_writer *p = &j->writer;
    const double t0 = rt_now();
    if (p->started) {
        pthread_mutex_lock(&j->lock);
        p->closing = true;
        pthread_cond_broadcast(&j->changed);
        pthread_mutex_unlock(&j->lock);
        pthread_join(p->thread, NULL);
        p->waited += rt_now() - t0;
        p->started = false;
    }
    rt_shard_sink_threads(j->shards, NULL);
    rt_pool_free(p->pool);
    rt_free(p->queue);
    p->pool = NULL;
    p->queue = NULL;
    return p->st == RT_OK ? RT_OK : rt_fail(err, p->st, "%s", p->err.msg);
}
