#include "tests/rank_trainer.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/collective.h"
#include "core/io.h"
#include "tests/rank_fixture.h"

struct thread {
    pthread_t thread;
    int rank, size, port;
    double timeout;
    rank_fn fn;
    void *self;
    enum rt_status st;
    struct rt_err err;
};

static void *run_thread(void *p)
{
    struct thread *t = p;
    struct rt_comm *comm = NULL;
    const struct rt_comm_options o = {.rank = {t->rank, t->size, t->rank}, .host = "127.0.0.1", .port = t->port, .identity = "threads", .join_timeout = 30,
                                      .timeout = t->timeout};
    t->st = t->size > 1 ? rt_comm_open(&o, &comm, &t->err) : RT_OK;
    if (t->st == RT_OK)
        t->st = t->fn(t->self, t->rank, comm, &t->err);
    rt_comm_free(comm);
    return NULL;
}

enum rt_status rank_threads(int size, double timeout, rank_fn fn, void *self, struct rt_err err[RANK_TRAINERS], enum rt_status st[RANK_TRAINERS])
{
    struct thread t[RANK_TRAINERS];
    enum rt_status first = RT_OK;
    const int port = rk_free_port();
    memset(t, 0, sizeof t);
    for (int i = 0; i < size; i++) {
        t[i] = (struct thread){.rank = i, .size = size, .port = port, .timeout = timeout, .fn = fn, .self = self};
        if (pthread_create(&t[i].thread, NULL, run_thread, &t[i]) != 0)
            abort();
    }
    for (int i = 0; i < size; i++) {
        pthread_join(t[i].thread, NULL);
        err[i] = t[i].err;
        st[i] = t[i].st;
        first = first == RT_OK ? st[i] : first;
    }
    return first;
}

/* ---- training ---- */

struct shared {
    struct rank_run *r;
    double loss[RANK_TRAINERS][RANK_STEPS], norm[RANK_TRAINERS][RANK_STEPS];
    float *block[RANK_TRAINERS];
    int64_t elements;
};

static struct rt_trainer_options options(const struct rank_run *r, struct rt_comm *comm)
{
    struct rt_trainer_options o = tf_options();
    o.adamw.clip = r->clip;
    o.comm = comm;
    o.ranks = r->size;
    o.bucket = r->bucket;
    o.overlap = r->overlap;
    o.early = r->early;
    o.record = r->record;
    o.micro_tokens = 30; /* several micro-batches a rank, and at times none */
    if (r->states) {
        o.w.feature = 0.3;
        o.map = (struct rt_feature_map){.pair = {{1, 1, TF_DIM}, {RT_LAYER_FINAL, RT_LAYER_FINAL, TF_DIM}}, .n = 2};
    }
    return o;
}

static enum rt_status fetch(struct shared *s, int rank, const struct tf *f, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const int64_t n = f->p.elements;
    s->elements = n;
    s->block[rank] = calloc((size_t)n, sizeof(float));
    for (int i = 0; i < f->p.n; i++)
        RT_TRY(rt_param_download(&f->d, rt_student_block(f->s), &f->p.at[i], 0, rt_param_elements(&f->p.at[i]), s->block[rank] + f->p.at[i].offset, err));
out:
    return st;
}

static enum rt_status train(void *self, int rank, struct rt_comm *comm, struct rt_err *err)
{
    struct shared *s = self;
    const struct rank_run *r = s->r;
    static const double weight[1] = {1};
    const struct rt_dev_options device = {.threads = 1, .index = r->be->own_memory ? rank : 0, .comm = comm};
    const struct rt_trainer_options o = options(r, comm);
    struct rt_trainer t = {0};
    struct rt_ckpt at;
    struct tf f;
    double seconds;
    enum rt_status st;
    tf_open_on(&f, r->be, &device, r->config, 0.3f);
    struct rt_train_set *set = tf_set(r->data, &f, r->states);
    RT_TRY(rt_trainer_open(&t, f.s, &set, weight, 1, &o, err));
    if (r->from != NULL) {
        RT_TRY(rt_ckpt_latest(r->from, NULL, &at, err));
        RT_TRY(rt_trainer_restore(&t, at.path, &seconds, err));
    }
    for (int i = 0; i < r->steps; i++) {
        struct rt_step_result x;
        RT_TRY(rt_trainer_step(&t, r->lr > 0 ? r->lr : 1e-2, false, &x, err));
        s->loss[rank][i] = x.loss;
        s->norm[rank][i] = x.grad_norm;
    }
    if (r->to != NULL)
        RT_TRY(rt_trainer_checkpoint(&t, r->to, 2, 1, err));
    s->r->recorded[rank] = t.recorded.runs;
    RT_TRY(fetch(s, rank, &f, err));
out:
    if (st != RT_OK)
        rt_comm_abort(comm, err->msg);
    rt_trainer_close(&t);
    rt_train_set_free(set);
    tf_close(&f);
    return st;
}

void rank_run(struct rank_run *r)
{
    struct shared *s = calloc(1, sizeof *s);
    struct rt_err err[RANK_TRAINERS], ok = {0};
    enum rt_status st[RANK_TRAINERS];
    s->r = r;
    if (r->to != NULL)
        assert_int_equal(rt_mkdirs(r->to, &ok), RT_OK);
    rank_threads(r->size, 60, train, s, err, st);
    for (int i = 0; i < r->size; i++)
        if (st[i] != RT_OK)
            fail_msg("rank %d of %d: %s", i, r->size, err[i].msg);
    for (int i = 1; i < r->size; i++) {
        assert_memory_equal(s->loss[i], s->loss[0], sizeof s->loss[0]);
        assert_memory_equal(s->norm[i], s->norm[0], sizeof s->norm[0]);
        assert_memory_equal(s->block[i], s->block[0], (size_t)s->elements * sizeof(float));
        free(s->block[i]);
    }
    memcpy(r->loss, s->loss[0], sizeof r->loss);
    memcpy(r->norm, s->norm[0], sizeof r->norm);
    r->block = s->block[0];
    r->elements = s->elements;
    free(s);
}

void rank_recorded(const struct rank_run *r)
{
    struct rank_run want = *r, got = *r;
    want.record = false;
    got.record = true;
    rank_run(&want);
    rank_run(&got);
    for (int i = 0; i < r->size; i++) {
        print_message("rank %d: %ld micro-steps by recordings\n", i, (long)got.recorded[i]);
        assert_true(want.recorded[i] == 0 && got.recorded[i] > 0);
    }
    assert_memory_equal(got.loss, want.loss, sizeof want.loss);
    assert_memory_equal(got.norm, want.norm, sizeof want.norm);
    assert_memory_equal(got.block, want.block, (size_t)want.elements * sizeof *want.block);
    free(got.block);
    free(want.block);
}

struct tf_data *rank_data(int config)
{
    struct tf_data *data = malloc(sizeof *data);
    struct tf f;
    tf_open(&f, &rt_backend_cpu, 1, config, 0.3f);
    tf_data(data, f.c.vocab_size, 4);
    tf_score(data, &f);
    tf_close(&f);
    return data;
}
