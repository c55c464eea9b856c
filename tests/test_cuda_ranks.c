/* Several ranks on GPUs, a thread each: collectives against sums made here, training on two GPUs against one, and no wait without an end. What needs two GPUs
 * is skipped where there is one. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/collective.h"
#include "core/log.h"
#include "core/rng.h"
#include "tests/rank_trainer.h"

static const struct rt_backend *gpu(int least)
{
    char why[128];
    for (int i = 0; rt_backend_list()[i] != NULL; i++) {
        const struct rt_backend *be = rt_backend_list()[i];
        if (strcmp(be->name, "cuda") == 0 && be->available(why, sizeof why) && be->count() >= least)
            return be;
    }
    return NULL;
}

#define CHECK(cond) \
    do { \
        if (!(cond)) \
            RT_FAIL(err, INTERNAL, "%s (n %ld)", #cond, (long)n); \
    } while (0)

/* ---- collectives ---- */

static float value(int rank, int64_t i)
{
    return rt_bf16_to_f32(rt_f32_to_bf16((float)rt_rng_normal(3, (uint64_t)rank, (uint64_t)i) * (rank == 1 ? 30.0f : 1.0f)));
}

struct block {
    struct rt_device *d;
    uint16_t *dev, *host;
};

static enum rt_status fill(struct block *b, int rank, int64_t n, struct rt_err *err)
{
    for (int64_t i = 0; i < n; i++)
        b->host[i] = rt_f32_to_bf16(value(rank, i));
    return rt_device_upload(b->d, b->dev, b->host, (size_t)n * 2, err);
}

/* Two ranks: the float32 sum of two BF16 numbers, rounded once. */
static uint16_t sum(int64_t i)
{
    return rt_f32_to_bf16(value(0, i) + value(1, i));
}

static enum rt_status exchange_once(struct block *b, int rank, int64_t n, struct rt_queue *q, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_backend *be = b->d->be;
    struct rt_dev *dev = b->d->dev;
    int64_t first, count;
    rt_comm_shard(n, rank, 2, &first, &count);
    RT_TRY(fill(b, rank, n, err));
    RT_TRY(rt_device_sync(b->d, err));
    RT_TRY(be->reduce_scatter(dev, q, b->dev, n, err));
    RT_TRY(be->queue_sync(dev, q, err));
    RT_TRY(rt_device_download(b->d, b->host, b->dev, (size_t)n * 2, err));
    for (int64_t i = first; i < first + count; i++)
        CHECK(b->host[i] == sum(i));
    RT_TRY(be->all_gather(dev, q, b->dev, n, err));
    RT_TRY(be->queue_sync(dev, q, err));
    RT_TRY(rt_device_download(b->d, b->host, b->dev, (size_t)n * 2, err));
    for (int64_t i = 0; i < n; i++)
        CHECK(b->host[i] == sum(i));
    RT_TRY(fill(b, rank, n, err));
    RT_TRY(rt_device_sync(b->d, err));
    RT_TRY(be->all_reduce(dev, q, b->dev, n, err));
    RT_TRY(be->queue_sync(dev, q, err));
    RT_TRY(rt_device_download(b->d, b->host, b->dev, (size_t)n * 2, err));
    for (int64_t i = 0; i < n; i++)
        CHECK(b->host[i] == sum(i));
    for (int root = 0; root < 2; root++) {
        RT_TRY(fill(b, rank, n, err));
        RT_TRY(be->broadcast(dev, b->d->q, b->dev, n, root, err));
        RT_TRY(rt_device_download(b->d, b->host, b->dev, (size_t)n * 2, err));
        for (int64_t i = 0; i < n; i++)
            CHECK(b->host[i] == rt_f32_to_bf16(value(root, i)));
    }
out:
    return st;
}

static enum rt_status collectives(void *self, int rank, struct rt_comm *comm, struct rt_err *err)
{
    static const int64_t sizes[] = {1, 63, 64, 128, 129, 1000, 100032, 262144, 3000064};
    struct rt_device d = {0};
    struct block b = {.d = &d};
    struct rt_queue *q = NULL;
    enum rt_status st;
    RT_TRY(rt_device_open(self, &(struct rt_dev_options){.index = rank, .comm = comm}, &d, err));
    RT_TRY(d.be->queue_create(d.dev, &q, err));
    b.host = calloc(3000064, 2);
    RT_TRY(d.be->alloc(d.dev, 3000064 * 2, (void **)&b.dev, err));
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        RT_TRY(exchange_once(&b, rank, sizes[i], q, err));
out:
    if (st != RT_OK)
        rt_comm_abort(comm, err->msg);
    free(b.host);
    if (d.dev != NULL && b.dev != NULL)
        d.be->free(d.dev, b.dev);
    if (q != NULL)
        d.be->queue_free(d.dev, q);
    rt_device_close(&d);
    return st;
}

static void check_ranks(int size, enum rt_status first, const struct rt_err *err, const enum rt_status *st)
{
    for (int i = 0; first != RT_OK && i < size; i++)
        print_message("rank %d: status %d: %s\n", i, (int)st[i], err[i].msg);
    assert_int_equal(first, RT_OK);
}

static void test_collectives(void **state)
{
    const struct rt_backend *be = gpu(2);
    struct rt_err err[RANK_TRAINERS];
    enum rt_status st[RANK_TRAINERS];
    (void)state;
    if (be == NULL)
        TEST_SKIP("no two GPUs");
    check_ranks(2, rank_threads(2, 60, collectives, (void *)(uintptr_t)be, err, st), err, st);
}

/* ---- training ---- */

/* Two GPUs: the same bits whatever overlaps and again; losses near those of one GPU; a checkpoint of two goes on with one. The student is small and learns its
 * data by heart: what BF16 gradients in other sums do to it grows with every step, and is bounded here by a hundredth of the first loss. */
static void test_training(void **state)
{
    const struct rt_backend *be = gpu(2);
    (void)state;
    if (be == NULL)
        TEST_SKIP("no two GPUs");
    struct tf_data *data = rank_data(TF_WIDE);
    char dir[512];
    snprintf(dir, sizeof dir, "%s", test_tmp("cuda-ranks"));
    struct rank_run one = {.be = be, .data = data, .size = 1, .config = TF_WIDE, .steps = 40, .states = true, .clip = 1, .lr = 1e-3}, r[4];
    rank_run(&one);
    for (int i = 0; i < 4; i++) {
        r[i] = (struct rank_run){.be = be, .data = data, .size = 2, .config = TF_WIDE, .steps = 40, .states = true, .clip = 1, .lr = 1e-3, .bucket = 1,
                                 .overlap = i > 0, .early = i > 1, .to = i == 3 ? dir : NULL};
        if (i == 3)
            r[i].steps = 20;
        rank_run(&r[i]);
        assert_memory_equal(r[i].loss, r[0].loss, (size_t)r[i].steps * sizeof(double));
        if (i < 3)
            assert_memory_equal(r[i].block, r[0].block, (size_t)r[0].elements * sizeof(float));
    }
    struct rank_run rest = one;
    rest.from = dir;
    rest.steps = 20;
    rank_run(&rest);
    double off = 0, after = 0;
    for (int s = 0; s < 40; s++)
        off = fmax(off, fabs(r[0].loss[s] - one.loss[s]) / one.loss[0]);
    for (int s = 0; s < 20; s++)
        after = fmax(after, fabs(rest.loss[s] - r[0].loss[20 + s]) / one.loss[0]);
    print_message("losses of two GPUs against one, parts of the first loss: %.2g over 40 steps; of one that goes on from two's checkpoint: %.2g over 20\n", off,
                  after);
    assert_true(off < 1e-2 && after < 1e-2);
    for (int i = 0; i < 4; i++)
        free(r[i].block);
    free(one.block);
    free(rest.block);
    free(data);
}

/* Micro-steps that are replayed give the bits of those that are not, while sums of the batch's last one run beside it. */
static void test_recorded_steps(void **state)
{
    const struct rt_backend *be = gpu(2);
    (void)state;
    if (be == NULL)
        TEST_SKIP("no two GPUs");
    struct tf_data *data = rank_data(TF_WIDE);
    rank_recorded(&(struct rank_run){.be = be, .data = data, .size = 2, .config = TF_WIDE, .steps = RANK_STEPS, .clip = 1, .lr = 1e-3, .bucket = 1, .overlap = true,
                                     .early = true});
    free(data);
}

/* ---- ranks that are lost ---- */

struct fate {
    const struct rt_backend *be;
    int what; /* 0: rank 1 ends with a word, 1: without, 2: is silent */
    double seconds;
};

static enum rt_status be_lost(void *self, int rank, struct rt_comm *comm, struct rt_err *err)
{
    struct fate *fate = self;
    enum { N = 1 << 20 };
    struct rt_device d = {0};
    void *x = NULL;
    enum rt_status st;
    RT_TRY(rt_device_open(fate->be, &(struct rt_dev_options){.index = rank, .comm = comm}, &d, err));
    RT_TRY(d.be->alloc(d.dev, N * 2, &x, err));
    RT_TRY(d.be->all_reduce(d.dev, d.q, x, N, err));
    RT_TRY(rt_device_sync(&d, err));
    if (rank == 1) {
        if (fate->what == 2)
            sleep(5);
        rt_comm_abort(comm, fate->what == 0 ? "the disk of rank one is full" : "gone");
    } else {
        const double begin = rt_now();
        st = d.be->all_reduce(d.dev, d.q, x, N, err);
        if (st == RT_OK)
            st = rt_device_sync(&d, err);
        fate->seconds = rt_now() - begin;
    }
out:
    if (x != NULL)
        d.be->free(d.dev, x);
    rt_device_close(&d);
    return st;
}

static void test_lost(void **state)
{
    const struct rt_backend *be = gpu(2);
    (void)state;
    if (be == NULL)
        TEST_SKIP("no two GPUs");
    for (int what = 0; what < 3; what++) {
        struct fate fate = {.be = be, .what = what};
        struct rt_err err[RANK_TRAINERS];
        enum rt_status st[RANK_TRAINERS];
        rank_threads(2, what == 2 ? 1.5 : 60, be_lost, &fate, err, st);
        print_message("%.1f s: %s\n", fate.seconds, err[0].msg);
        assert_int_equal(st[0], RT_IO);
        assert_int_equal(st[1], RT_OK);
        assert_true(fate.seconds < 10);
        assert_non_null(strstr(err[0].msg, what == 0 ? "disk of rank one" : "rank 1"));
    }
}

/* Two ranks on one GPU are refused, and both ranks say why. */
static enum rt_status open_first(void *self, int rank, struct rt_comm *comm, struct rt_err *err)
{
    struct rt_device d = {0};
    const enum rt_status st = rt_device_open(self, &(struct rt_dev_options){.index = 0, .comm = comm}, &d, err);
    (void)rank;
    rt_device_close(&d);
    return st;
}

static void test_one_gpu(void **state)
{
    const struct rt_backend *be = gpu(1);
    struct rt_err err[RANK_TRAINERS];
    enum rt_status st[RANK_TRAINERS];
    (void)state;
    if (be == NULL)
        TEST_SKIP("no GPU");
    rank_threads(2, 20, open_first, (void *)(uintptr_t)be, err, st);
    for (int i = 0; i < 2; i++) {
        if (strstr(err[i].msg, "libnccl") != NULL)
            TEST_SKIP("no NCCL");
        assert_int_equal(st[i], RT_DEVICE);
        assert_non_null(strstr(err[i].msg, "ranks 0 and 1 are on one GPU"));
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_one_gpu),
    cmocka_unit_test(test_collectives),
    cmocka_unit_test(test_training),
    cmocka_unit_test(test_recorded_steps),
    cmocka_unit_test(test_lost),
};
RT_SUITE(cuda_ranks, tests)
