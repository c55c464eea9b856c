/* Ranks that share a block by buckets: the parts cover it, the bits do not depend on the buckets or on what overlaps, sums begin while backward runs, and a
 * checkpoint serves any number of ranks. */
#include <stdlib.h>
#include <string.h>

#include "core/collective.h"
#include "core/cpu/cpu.h"
#include "tests/rank_trainer.h"

static void test_parts(void **state)
{
    (void)state;
    static const int64_t buckets[] = {0, 1, 5000, 20000, 1 << 30};
    for (int config = 0; config <= TF_WIDE; config++)
        for (int size = 1; size <= 5; size++)
            for (size_t k = 0; k < sizeof buckets / sizeof buckets[0]; k++) {
                struct tf f;
                tf_open(&f, &rt_backend_cpu, 1, config, 0);
                int64_t held[5] = {0}, sum = 0;
                const struct rt_param_shard s = rt_param_shard_of(&f.p, 0, size, buckets[k]);
                assert_true(s.start[0] == 0 && s.start[s.n_buckets] == f.p.elements);
                assert_true(buckets[k] == 1 ? s.n_buckets > f.c.layers - (size > 2) : s.n_buckets <= 1 + f.p.elements / (buckets[k] > 0 ? buckets[k] : f.p.elements));
                for (int b = 0; b < s.n_buckets; b++) {
                    int64_t at = s.start[b];
                    assert_true(at % (64 * size) == 0 && at < s.start[b + 1]);
                    for (int r = 0; r < size; r++) {
                        const struct rt_param_part part = rt_param_part(&s, r, b);
                        assert_true(part.n == 0 || (part.first == at && part.at == held[r]));
                        at += part.n;
                        held[r] += part.n;
                    }
                    assert_int_equal(at, s.start[b + 1]);
                }
                for (int r = 0; r < size; r++) {
                    assert_int_equal(held[r], rt_param_shard_of(&f.p, r, size, buckets[k]).n);
                    assert_true(held[r] <= held[0]);
                    sum += held[r];
                }
                assert_int_equal(sum, f.p.elements);
                tf_close(&f);
            }
}

/* Host backends add in rank order wherever an element lies; without a clip nothing else depends on the parts. */
static void test_same_bits(void **state)
{
    (void)state;
    struct tf_data *data = rank_data(TF_WIDE);
    for (int size = 2; size <= 4; size++) {
        struct rank_run r[4];
        for (int i = 0; i < 4; i++) {
            r[i] = (struct rank_run){.be = &rt_backend_cpu, .data = data, .size = size, .config = TF_WIDE, .steps = 6, .states = true, .bucket = i == 0 ? 0 : i == 1 ? 1 : 40000,
                                     .overlap = i % 2 == 1, .early = i == 1};
            rank_run(&r[i]);
            assert_memory_equal(r[i].loss, r[0].loss, sizeof r[0].loss);
            assert_memory_equal(r[i].block, r[0].block, (size_t)r[0].elements * sizeof(float));
        }
        for (int i = 0; i < 4; i++)
            free(r[i].block);
    }
    free(data);
}

/* ---- when ---- */

static _Thread_local struct {
    int sums, before_embedding;
} seen;
static struct {
    int sums, before_embedding;
} most;

static enum rt_status count_sum(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err)
{
    seen.sums++;
    return rt_backend_cpu.reduce_scatter(dev, q, x, n, err);
}

static enum rt_status count_embed(struct rt_dev *dev, struct rt_queue *q, const struct rt_embed_bwd_args *a, struct rt_err *err)
{
    seen.before_embedding = seen.sums;
    return rt_backend_cpu.embed_bwd(dev, q, a, err);
}

static enum rt_status train_counted(void *self, int rank, struct rt_comm *comm, struct rt_err *err)
{
    const struct rank_run *r = self;
    static const double weight[1] = {1};
    struct rt_trainer_options o = tf_options();
    struct rt_trainer t = {0};
    struct rt_step_result x;
    struct tf f;
    enum rt_status st;
    o.comm = comm;
    o.bucket = r->bucket;
    o.overlap = r->overlap;
    o.early = r->early;
    tf_open_on(&f, r->be, &(struct rt_dev_options){.threads = 1, .comm = comm}, r->config, 0.3f);
    struct rt_train_set *set = tf_set(r->data, &f, false);
    RT_TRY(rt_trainer_open(&t, f.s, &set, weight, 1, &o, err));
    RT_TRY(rt_trainer_step(&t, 1e-2, false, &x, err));
    if (rank == 0) {
        most.sums = seen.sums;
        most.before_embedding = seen.before_embedding;
    }
out:
    rt_trainer_close(&t);
    rt_train_set_free(set);
    tf_close(&f);
    return st;
}

/* Where sums are early, all but the embedding's bucket are under way when the embedding's gradient is computed; else none is. */
static void test_when(void **state)
{
    (void)state;
    struct tf_data *data = rank_data(TF_WIDE);
    struct rt_backend be = rt_backend_cpu;
    struct rt_err err[RANK_TRAINERS];
    enum rt_status st[RANK_TRAINERS];
    be.reduce_scatter = count_sum;
    be.embed_bwd = count_embed;
    for (int way = 0; way < 3; way++) {
        struct rank_run r = {.be = &be, .data = data, .size = 2, .config = TF_WIDE, .bucket = 1, .overlap = way > 0, .early = way > 1};
        assert_int_equal(rank_threads(2, 20, train_counted, &r, err, st), RT_OK);
        assert_int_equal(most.sums, 4); /* three layers, the last with the final norm, and the embedding */
        assert_int_equal(most.before_embedding, way > 1 ? 3 : 0);
    }
    free(data);
}

/* ---- checkpoints ---- */

/* What two ranks left behind goes on with one, and with three under other buckets: the losses are those of a run that was not stopped. */
static void test_checkpoint(void **state)
{
    (void)state;
    struct tf_data *data = rank_data(TF_WIDE);
    char dir[512], end[2][512];
    snprintf(dir, sizeof dir, "%s", test_tmp("exchange-two"));
    struct rank_run whole = {.be = &rt_backend_cpu, .data = data, .size = 2, .config = TF_WIDE, .steps = 12, .bucket = 1, .overlap = true, .early = true, .states = true, .clip = 1};
    struct rank_run first = whole;
    first.steps = 5;
    first.to = dir;
    rank_run(&whole);
    rank_run(&first);
    for (int i = 0; i < 2; i++) {
        snprintf(end[i], sizeof end[i], "%s", test_tmp(i == 0 ? "exchange-one" : "exchange-three"));
        struct rank_run rest = {.be = &rt_backend_cpu, .data = data, .size = i == 0 ? 1 : 3, .config = TF_WIDE, .steps = 7, .bucket = i == 0 ? 0 : 20000, .states = true,
                                .clip = 1, .from = dir, .to = end[i]};
        rank_run(&rest);
        for (int s = 0; s < 7; s++)
            if (!(rest.loss[s] - whole.loss[5 + s] < 1e-4 * whole.loss[5 + s] && whole.loss[5 + s] - rest.loss[s] < 1e-4 * whole.loss[5 + s]))
                fail_msg("step %d: loss %g on %d ranks, %g on the two that began", 6 + s, rest.loss[s], rest.size, whole.loss[5 + s]);
        free(rest.block);
    }
    free(whole.block);
    free(first.block);
    free(data);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_parts),
    cmocka_unit_test(test_same_bits),
    cmocka_unit_test(test_when),
    cmocka_unit_test(test_checkpoint),
};
RT_SUITE(exchange, tests)
