/* Micro-steps as recorded work: on a device that records calls and on a GPU, a training in which they are replayed gives the bytes of one in which none is. */
#include <stdlib.h>
#include <string.h>

#include "tests/rank_trainer.h"
#include "tests/train_fixture.h"

/* ---- a device that records ---- */
/* The cpu's operations; between graph_begin and graph_end a call is kept with its arguments by value, as a GPU keeps it, and not run. */
enum { CALLS = 1024 };
#define ARGS(op) struct rt_##op##_args op;
struct call {
    int op; /* enum rt_op, or COPY, ZERO */
    void *dst;
    const void *src;
    size_t bytes;
    union {
        RT_BACKEND_OPS(ARGS)
    } args;
};
enum { COPY = RT_OP_COUNT, ZERO };
struct rt_graph {
    int n;
    struct call call[CALLS];
};
static _Thread_local struct { /* a rank is a thread */
    struct rt_graph *now;      /* NULL: nothing is recorded */
    enum rt_status refuse;     /* what embed_bwd answers while it is recorded */
    enum rt_status no_run;     /* what a recording answers when it is run */
    int begun, freed;
} tape;

static struct call *next_call(int op)
{
    assert_true(tape.now->n < CALLS);
    struct call *c = &tape.now->call[tape.now->n++];
    c->op = op;
    return c;
}

#define WRAP(op_) \
    static enum rt_status tape_##op_(struct rt_dev *dev, struct rt_queue *q, const struct rt_##op_##_args *a, struct rt_err *err) \
    { \
        if (tape.now == NULL) \
            return rt_backend_cpu.op_(dev, q, a, err); \
        if (RT_OP_##op_ == RT_OP_embed_bwd && tape.refuse != RT_OK) \
            return rt_fail(err, tape.refuse, "it will not be recorded"); \
        next_call(RT_OP_##op_)->args.op_ = *a; \
        return RT_OK; \
    }
RT_BACKEND_OPS(WRAP)

static enum rt_status tape_copy(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    if (tape.now == NULL)
        return rt_backend_cpu.copy(dev, q, dst, src, bytes, err);
    struct call *c = next_call(COPY);
    c->dst = dst;
    c->src = src;
    c->bytes = bytes;
    return RT_OK;
}

static enum rt_status tape_zero(struct rt_dev *dev, struct rt_queue *q, void *dst, size_t bytes, struct rt_err *err)
{
    if (tape.now == NULL)
        return rt_backend_cpu.zero(dev, q, dst, bytes, err);
    struct call *c = next_call(ZERO);
    c->dst = dst;
    c->bytes = bytes;
    return RT_OK;
}

static enum rt_status tape_upload(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    assert_null(tape.now); /* a recording would not see the next bytes */
    return rt_backend_cpu.upload(dev, q, dst, src, bytes, err);
}

static enum rt_status tape_download(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    assert_null(tape.now);
    return rt_backend_cpu.download(dev, q, dst, src, bytes, err);
}

static enum rt_status tape_begin(struct rt_dev *dev, struct rt_queue *q, struct rt_err *err)
{
    (void)dev, (void)q, (void)err;
    assert_null(tape.now);
    tape.now = calloc(1, sizeof *tape.now);
    tape.begun++;
    return RT_OK;
}

static enum rt_status tape_end(struct rt_dev *dev, struct rt_queue *q, struct rt_graph **out, struct rt_err *err)
{
    (void)dev, (void)q, (void)err;
    *out = tape.now;
    tape.now = NULL;
    return RT_OK;
}

static enum rt_status tape_run(struct rt_dev *dev, struct rt_queue *q, struct rt_graph *g, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (tape.no_run != RT_OK)
        return rt_fail(err, tape.no_run, "it will not be run");
    for (int i = 0; i < g->n && st == RT_OK; i++) {
        const struct call *c = &g->call[i];
        switch (c->op) {
        case COPY: st = rt_backend_cpu.copy(dev, q, c->dst, c->src, c->bytes, err); break;
        case ZERO: st = rt_backend_cpu.zero(dev, q, c->dst, c->bytes, err); break;
#define RUN(op_) case RT_OP_##op_: st = rt_backend_cpu.op_(dev, q, &c->args.op_, err); break;
        RT_BACKEND_OPS(RUN)
        default: st = RT_INTERNAL;
        }
    }
    return st;
}

static void tape_free(struct rt_dev *dev, struct rt_graph *g)
{
    (void)dev;
    tape.freed += g != NULL;
    free(g);
}

static struct rt_backend tape_backend(void)
{
    struct rt_backend be = rt_backend_cpu;
#define TAKE(op_) be.op_ = rt_backend_cpu.op_ != NULL ? tape_##op_ : NULL;
    RT_BACKEND_OPS(TAKE)
    be.copy = tape_copy;
    be.zero = tape_zero;
    be.upload = tape_upload;
    be.download = tape_download;
    be.graph_begin = tape_begin;
    be.graph_end = tape_end;
    be.graph_run = tape_run;
    be.graph_free = tape_free;
    memset(&tape, 0, sizeof tape);
    return be;
}

/* ---- trainings ---- */

enum { STEPS = 60 };
struct result {
    double loss[STEPS], norm[STEPS], kl[STEPS], term[STEPS][4];
    float *param;
    int64_t n, recordings, runs;
};

struct plan {
    int64_t batch;
    int recompute;
    bool record, features, mixed; /* mixed: the same sequences without the teacher's rows, too */
};

/* Batches of one sequence or two, and micro-batches of one or two: shapes come again, with other numbers of targets in the batch too. */
static struct result run_steps(const struct rt_backend *be, struct tf_data *data, const struct plan *plan)
{
    struct rt_err err = {0};
    struct tf f;
    struct rt_trainer t;
    struct rt_step_result r;
    struct result out;
    const double weight[2] = {1, 1};
    struct rt_train_set *set[2] = {NULL};
    struct rt_trainer_options o = tf_options();
    memset(&out, 0, sizeof out);
    tf_open(&f, be, 1, TF_WIDE, 0.1f);
    o.micro_tokens = TF_LEN;
    o.batch_tokens = plan->batch;
    o.epochs = 0;
    o.record = plan->record;
    o.recompute = plan->recompute;
    if (plan->features) {
        o.w.feature = 0.3;
        o.map = (struct rt_feature_map){.n = 1, .pair = {{1, 1, TF_DIM}}};
    }
    set[0] = tf_set(data, &f, plan->features);
    if (plan->mixed) {
        struct rt_log quiet;
        const struct rt_train_set_options text = {.model = &f.model, .vocab = f.c.vocab_size, .max_length = 64};
        rt_log_init(&quiet, stderr, RT_LOG_WARN);
        assert_ok(rt_train_set_open(tf_write_lines("recorded.jsonl", data), &text, &quiet, &set[1], &err));
    }
    assert_ok(rt_trainer_open(&t, f.s, set, weight, plan->mixed ? 2 : 1, &o, &err));
    for (int i = 0; i < STEPS; i++) {
        assert_ok(rt_trainer_step(&t, 1e-2, i % 7 == 3, &r, &err));
        assert_false(r.skipped || r.end);
        out.loss[i] = r.loss;
        out.norm[i] = r.grad_norm;
        out.kl[i] = r.sums.kl;
        memcpy(out.term[i], r.term_norm, sizeof out.term[i]);
    }
    out.recordings = t.recorded.recordings;
    out.runs = t.recorded.runs;
    out.n = f.p.elements;
    out.param = tf_params(&f);
    rt_trainer_close(&t);
    for (int i = 0; i < 2; i++)
        rt_train_set_free(set[i]);
    tf_close(&f);
    return out;
}

static void expect_same(struct result *a, struct result *b)
{
    assert_memory_equal(a->loss, b->loss, sizeof a->loss);
    assert_memory_equal(a->norm, b->norm, sizeof a->norm);
    assert_memory_equal(a->kl, b->kl, sizeof a->kl);
    assert_memory_equal(a->term, b->term, sizeof a->term);
    assert_memory_equal(a->param, b->param, (size_t)a->n * sizeof *a->param);
    free(a->param);
    free(b->param);
}

static struct tf_data *made_data(void)
{
    struct tf f;
    struct tf_data *data = malloc(sizeof *data);
    tf_open(&f, &rt_backend_cpu, 1, TF_WIDE, 0.3f);
    tf_data(data, f.c.vocab_size, 11);
    for (int s = 0; s < TF_SEQS; s += 2) /* sequences of one length have other numbers of targets */
        data->mask[s][data->len[s] - 1] = data->mask[s][data->len[s] - 2] = 0;
    tf_score(data, &f);
    tf_close(&f);
    return data;
}

static const struct plan plans[] = {{.batch = TF_LEN}, {.batch = 2 * TF_LEN}, {.batch = 2 * TF_LEN, .recompute = 2}, {.batch = TF_LEN, .features = true},
                                    {.batch = TF_LEN, .mixed = true}};

static void compare(const struct rt_backend *be, struct tf_data *data)
{
    for (size_t i = 0; i < sizeof plans / sizeof plans[0]; i++) {
        struct plan p = plans[i];
        struct result want = run_steps(be, data, &p);
        p.record = true;
        struct result got = run_steps(be, data, &p);
        print_message("batches of %ld%s: %ld recordings, %ld micro-steps by them\n", (long)p.batch, p.features ? " with states" : p.mixed ? " of two sets" : "", (long)got.recordings,
                      (long)got.runs);
        assert_int_equal(want.runs, 0);
        if (p.features) /* states are uploaded between the products */
            assert_int_equal(got.runs, 0);
        else
            assert_true(got.recordings >= 4 && got.runs > got.recordings);
        expect_same(&want, &got);
    }
}

static void test_tape(void **state)
{
    (void)state;
    struct tf_data *data = made_data();
    const struct rt_backend be = tape_backend();
    compare(&be, data);
    assert_int_equal(tape.begun, tape.freed);
    free(data);
}

/* Two ranks: each replays its own micro-steps but the last of a batch, in whose backward sums begin. */
static void test_ranks(void **state)
{
    (void)state;
    struct tf_data *data = rank_data(TF_WIDE);
    const struct rt_backend be = tape_backend();
    for (int early = 0; early < 2; early++)
        rank_recorded(&(struct rank_run){.be = &be, .data = data, .size = 2, .config = TF_WIDE, .steps = RANK_STEPS, .clip = 1, .bucket = 1, .overlap = true,
                                         .early = early});
    free(data);
}

/* What cannot be recorded is run call by call, once it was tried; another error is one. */
static void test_refused(void **state)
{
    struct rt_err err = {0};
    struct tf f;
    struct rt_trainer t;
    struct rt_step_result r;
    const double weight = 1;
    struct rt_trainer_options o = tf_options();
    (void)state;
    struct tf_data *data = made_data();
    const struct rt_backend be = tape_backend();
    struct plan p = plans[0];
    struct result want = run_steps(&be, data, &p);
    tape.refuse = RT_UNSUPPORTED;
    p.record = true;
    struct result got = run_steps(&be, data, &p);
    assert_true(tape.begun > 0 && tape.begun <= RT_RECORDED);
    assert_int_equal(got.recordings, 0);
    expect_same(&want, &got);
    want = run_steps(&be, data, &plans[0]);
    tape.refuse = RT_OK;
    tape.no_run = RT_NOMEM;
    got = run_steps(&be, data, &p);
    assert_true(got.recordings > 0 && got.runs == 0);
    assert_int_equal(tape.begun, tape.freed);
    expect_same(&want, &got);
    tape.no_run = RT_OK;
    tape.refuse = RT_DEVICE;
    tf_open(&f, &be, 1, TF_WIDE, 0.1f);
    o.micro_tokens = o.batch_tokens = TF_LEN;
    o.epochs = 0;
    o.record = true;
    struct rt_train_set *set = tf_set(data, &f, false);
    assert_ok(rt_trainer_open(&t, f.s, &set, &weight, 1, &o, &err));
    enum rt_status st = RT_OK;
    for (int i = 0; i < STEPS && st == RT_OK; i++)
        st = rt_trainer_step(&t, 1e-2, false, &r, &err);
    assert_int_equal(st, RT_DEVICE);
    assert_non_null(strstr(err.msg, "it will not be recorded"));
    rt_trainer_close(&t);
    rt_train_set_free(set);
    tf_close(&f);
    free(data);
}

/* ---- what is kept ---- */

static enum rt_status count(void *self, struct rt_err *err)
{
    (void)err;
    ++*(int *)self;
    return RT_OK;
}

static void test_kept(void **state)
{
    struct rt_err err = {0};
    struct rt_device d = {0};
    struct rt_recorded r;
    struct rt_recorded_key k;
    int eager = 0;
    (void)state;
    const struct rt_backend be = tape_backend();
    assert_ok(rt_device_open(&be, &(struct rt_dev_options){.threads = 1}, &d, &err));
    rt_recorded_init(&r, &d);
    memset(&k, 0, sizeof k);
    k.n_seq = 2;
    const int32_t a[] = {0, 3, 9}, b[] = {0, 4, 9};
    /* once call by call, then recorded: enqueue is called for that too */
    for (int i = 0; i < 3; i++)
        assert_ok(rt_recorded_run(&r, &k, a, count, &eager, &err));
    assert_int_equal(eager, 2);
    assert_int_equal(r.runs, 2);
    /* other lengths with the same sums */
    assert_ok(rt_recorded_run(&r, &k, b, count, &eager, &err));
    assert_int_equal(eager, 3);
    assert_int_equal(r.recordings, 1);
    /* as many as there is room for, and no more until one is idle; shapes that come once leave them alone */
    for (int i = 0; i < 2 * RT_RECORDED; i++)
        for (int j = 0; j < 3; j++) {
            k.rows = 1 + i;
            assert_ok(rt_recorded_run(&r, &k, a, count, &eager, &err));
        }
    assert_int_equal(r.recordings, RT_RECORDED);
    for (int i = 0; i < RT_RECORDED_IDLE; i++) {
        k.rows = 1000 + i;
        assert_ok(rt_recorded_run(&r, &k, a, count, &eager, &err));
    }
    assert_int_equal(r.recordings, RT_RECORDED);
    for (int j = 0; j < 2; j++) {
        k.rows = 999;
        assert_ok(rt_recorded_run(&r, &k, a, count, &eager, &err));
    }
    assert_int_equal(r.recordings, RT_RECORDED + 1);
    assert_int_equal(tape.begun - tape.freed, RT_RECORDED);
    /* too many sequences */
    static int32_t many[RT_RECORDED_SEQS + 2];
    k.n_seq = RT_RECORDED_SEQS + 1;
    const int64_t clock = r.clock;
    for (int j = 0; j < 3; j++)
        assert_ok(rt_recorded_run(&r, &k, many, count, &eager, &err));
    assert_int_equal(r.clock, clock);
    rt_recorded_free(&r);
    assert_int_equal(tape.begun, tape.freed);
    rt_device_close(&d);
}

static void test_gpu(void **state)
{
    (void)state;
#ifdef RT_CUDA
    char why[160];
    if (!rt_backend_cuda.available(why, sizeof why))
        TEST_SKIP("no GPU");
    struct tf_data *data = made_data();
    compare(&rt_backend_cuda, data);
    free(data);
#else
    TEST_SKIP("built without CUDA");
#endif
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_tape),
    cmocka_unit_test(test_ranks),
    cmocka_unit_test(test_refused),
    cmocka_unit_test(test_kept),
    cmocka_unit_test(test_gpu),
};
RT_SUITE(recorded, tests)
