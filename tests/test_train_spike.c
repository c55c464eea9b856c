/* Spikes of the gradient. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "tests/train_fixture.h"

/* A gradient a thousand times larger than before: steps are left out until the mean has learnt of it, and a resumed trainer knows as much. */
static void test_spike(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const double weight[1] = {1};
    struct tf f, before;
    struct tf_data *data = malloc(sizeof *data);
    struct rt_trainer t;
    struct rt_step_result r;
    struct rt_trainer_options o = tf_options();
    const char *dir = test_tmp("train-spike");
    double seconds, usual = 0;
    int spikes = 0;
    o.max_spike = 100;
    o.adamw.clip = 1;
    tf_open(&f, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    tf_open(&before, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    tf_data(data, f.c.vocab_size, 4);
    tf_score(data, &f);
    struct rt_train_set *set = tf_set(data, &f, false);
    assert_ok(rt_trainer_open(&t, f.s, &set, weight, 1, &o, &err));
    for (int s = 0; s < 12; s++) {
        assert_ok(rt_trainer_step(&t, 1e-4, false, &r, &err));
        assert_true(!r.spike && !r.skipped);
        usual += r.grad_norm / 12;
    }
    assert_true(fabs(t.usual_norm - usual) < 1e-9 * usual);
    assert_ok(rt_mkdirs(dir, &err));
    assert_ok(rt_trainer_checkpoint(&t, dir, 2, 1, &err));
    const double known = t.usual_norm;
    const int64_t clipped = t.clipped;
    t.o.w.ce *= 1000;
    t.o.w.kl *= 1000;
    memcpy(rt_student_block(before.s), rt_student_block(f.s), (size_t)f.p.elements * sizeof(float));
    for (int s = 0; s < 12; s++) {
        assert_ok(rt_trainer_step(&t, 1e-4, false, &r, &err));
        assert_true(r.spike == r.skipped && r.spike == !(r.grad_norm <= 100 * r.usual_norm));
        spikes += r.spike;
        if (spikes == s + 1)
            assert_true(tf_same_block(&f, &before)); /* nothing was taken yet */
    }
    assert_true(spikes >= 1 && spikes <= 5 && t.skipped == spikes && !r.spike);
    assert_int_equal(t.opt.step, 24 - spikes);
    assert_true(rt_trainer_clipped(&t) == (double)(clipped + 12 - spikes) / (double)(24 - spikes)); /* a norm of hundreds is clipped to 1 */
    rt_trainer_close(&t);
    assert_ok(rt_trainer_open(&t, f.s, &set, weight, 1, &o, &err));
    char path[600];
    snprintf(path, sizeof path, "%s/ckpt-00000012", dir);
    assert_ok(rt_trainer_restore(&t, path, &seconds, &err));
    assert_true(t.usual_norm == known && t.norms == 12 && t.clipped == clipped);
    rt_trainer_close(&t);
    rt_train_set_free(set);
    tf_close(&f);
    tf_close(&before);
    free(data);
}

/* Batches that have nothing to learn, at first and in between: the norms that follow are no spikes, and the usual one is that of the others. */
static void test_zero_norms(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const double weight[1] = {1};
    struct tf f;
    struct tf_data *data = malloc(sizeof *data);
    struct rt_trainer t;
    struct rt_step_result r;
    struct rt_trainer_options o = tf_options();
    const struct rt_loss_weights w = o.w;
    double usual = 0;
    int n = 0;
    o.max_spike = 100;
    tf_open(&f, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    tf_data(data, f.c.vocab_size, 4);
    tf_score(data, &f);
    struct rt_train_set *set = tf_set(data, &f, false);
    assert_ok(rt_trainer_open(&t, f.s, &set, weight, 1, &o, &err));
    assert_true(isnan(rt_trainer_clipped(&t)));
    for (int s = 0; s < 36; s++) {
        const bool empty = s < 12 || s % 3 == 0;
        t.o.w.ce = empty ? 0 : w.ce;
        t.o.w.kl = empty ? 0 : w.kl;
        assert_ok(rt_trainer_step(&t, 1e-4, false, &r, &err));
        assert_true((r.grad_norm > 0) == !empty && !r.spike && !r.skipped);
        usual += r.grad_norm;
        n += !empty;
    }
    assert_true(n == 16 && t.norms == n && fabs(t.usual_norm - usual / n) < 1e-9 * usual);
    rt_trainer_close(&t);
    rt_train_set_free(set);
    tf_close(&f);
    free(data);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_spike), cmocka_unit_test(test_zero_norms),
};
RT_SUITE(train_spike, tests)
