/* Micro-batches on their way to a device and back, two at a time: with copies as late as a device may make them a step gives the same bits; and a
 * training on a GPU follows the one on the CPU. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/far_device.h"
#include "tests/train_fixture.h"

/* ---- a device that copies late ---- */
/* Uploads on a queue of their own happen when somebody waits for their event; downloads when the host waits. Nothing else is put off: what the engine
 * overwrites too early, or reads too early, is wrong then. */
enum { LATE = 64 };
static struct {
    struct {
        void *dst;
        const void *src;
        size_t bytes;
        struct rt_queue *q;
        bool up;
    } copy[LATE];
    int n;
    struct rt_queue *own; /* the device's: uploads on it are not put off */
    int most;
} late;

static void run_copies(bool up)
{
    int left = 0;
    for (int i = 0; i < late.n; i++) {
        if (late.copy[i].up == up)
            memcpy(late.copy[i].dst, late.copy[i].src, late.copy[i].bytes);
        else
            late.copy[left++] = late.copy[i];
    }
    late.n = left;
}

static enum rt_status put_off(struct rt_queue *q, void *dst, const void *src, size_t bytes, bool up)
{
    assert_true(late.n < LATE);
    late.copy[late.n].dst = dst;
    late.copy[late.n].src = src;
    late.copy[late.n].bytes = bytes;
    late.copy[late.n].q = q;
    late.copy[late.n].up = up;
    late.n++;
    late.most = late.n > late.most ? late.n : late.most;
    return RT_OK;
}

static enum rt_status upload(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    return q == late.own ? rt_backend_cpu.upload(dev, q, dst, src, bytes, err) : put_off(q, dst, src, bytes, true);
}

static enum rt_status download(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    (void)dev;
    (void)err;
    return put_off(q, dst, src, bytes, false);
}

static enum rt_status event_wait(struct rt_dev *dev, struct rt_queue *q, struct rt_event *e, struct rt_err *err)
{
    run_copies(true);
    return rt_backend_cpu.event_wait(dev, q, e, err);
}

static enum rt_status event_sync(struct rt_dev *dev, struct rt_event *e, struct rt_err *err)
{
    run_copies(false);
    return rt_backend_cpu.event_sync(dev, e, err);
}

static enum rt_status queue_sync(struct rt_dev *dev, struct rt_queue *q, struct rt_err *err)
{
    run_copies(false);
    return rt_backend_cpu.queue_sync(dev, q, err);
}

/* The first one is the device's. */
static enum rt_status queue_create(struct rt_dev *dev, struct rt_queue **out, struct rt_err *err)
{
    const enum rt_status st = rt_backend_cpu.queue_create(dev, out, err);
    late.own = late.own == NULL ? *out : late.own;
    return st;
}

static struct rt_backend late_backend(void)
{
    struct rt_backend be = far_backend();
    be.queue_create = queue_create;
    be.upload = upload;
    be.download = download;
    be.event_wait = event_wait;
    be.event_sync = event_sync;
    be.queue_sync = queue_sync;
    memset(&late, 0, sizeof late);
    return be;
}

/* ---- */

enum { STEPS = 5 };
struct result {
    double loss[STEPS], norm[STEPS], kl[STEPS];
    float *param;
    int64_t n, micros;
};

/* STEPS steps in micro-batches of one or two sequences; features: with states of the final norm. */
static struct result run_steps(const struct rt_backend *be, struct tf_data *data, bool features)
{
    struct rt_err err = {0};
    struct tf f;
    struct rt_trainer t;
    struct rt_step_result r;
    struct result out = {0};
    const double weight = 1;
    struct rt_trainer_options o = tf_options();
    tf_open(&f, be, 1, TF_TIED, 0.1f);
    o.micro_tokens = 40;
    o.batch_tokens = 120;
    if (features) {
        o.w.feature = 0.3;
        o.map = (struct rt_feature_map){.n = 2, .pair = {{RT_LAYER_FINAL, RT_LAYER_FINAL, TF_DIM}, {1, 1, TF_DIM}}};
    }
    struct rt_train_set *set = tf_set(data, &f, features);
    assert_ok(rt_trainer_open(&t, f.s, &set, &weight, 1, &o, &err));
    for (int i = 0; i < STEPS; i++) {
        assert_ok(rt_trainer_step(&t, 1e-2, false, &r, &err));
        assert_false(r.skipped || r.end);
        out.loss[i] = r.loss;
        out.norm[i] = r.grad_norm;
        out.kl[i] = r.sums.kl;
    }
    out.n = f.p.elements;
    out.param = tf_params(&f);
    rt_trainer_close(&t);
    rt_train_set_free(set);
    tf_close(&f);
    return out;
}

static struct tf_data *made_data(void)
{
    struct tf f;
    struct tf_data *data = malloc(sizeof *data);
    tf_open(&f, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    tf_data(data, f.c.vocab_size, 11);
    tf_score(data, &f);
    tf_close(&f);
    return data;
}

static void test_late_copies(void **state)
{
    (void)state;
    struct tf_data *data = made_data();
    for (int features = 0; features < 2; features++) {
        struct result want = run_steps(&rt_backend_cpu, data, features != 0);
        const struct rt_backend be = late_backend();
        struct result got = run_steps(&be, data, features != 0);
        assert_true(late.most > 8); /* copies were put off */
        assert_memory_equal(want.loss, got.loss, sizeof want.loss);
        assert_memory_equal(want.norm, got.norm, sizeof want.norm);
        assert_memory_equal(want.kl, got.kl, sizeof want.kl);
        assert_memory_equal(want.param, got.param, (size_t)want.n * sizeof *want.param);
        free(want.param);
        free(got.param);
    }
    free(data);
}

/* BF16 beside float32 over a few steps at a high rate: losses within 2 %. The same again is the same bits. */
static void test_gpu_follows(void **state)
{
    (void)state;
#ifdef RT_CUDA
    char why[160];
    if (!rt_backend_cuda.available(why, sizeof why))
        TEST_SKIP("no GPU");
    struct tf_data *data = made_data();
    for (int features = 0; features < 2; features++) {
        struct result cpu = run_steps(&rt_backend_cpu, data, features != 0), gpu = run_steps(&rt_backend_cuda, data, features != 0),
                      again = run_steps(&rt_backend_cuda, data, features != 0);
        double worst = 0;
        for (int i = 0; i < STEPS; i++)
            worst = fmax(worst, fabs(gpu.loss[i] / cpu.loss[i] - 1));
        print_message("losses of %d steps%s: %.4f relative at most\n", STEPS, features ? " with states" : "", worst);
        assert_true(worst < 0.02);
        assert_memory_equal(gpu.loss, again.loss, sizeof gpu.loss);
        assert_memory_equal(gpu.param, again.param, (size_t)gpu.n * sizeof *gpu.param);
        free(cpu.param);
        free(gpu.param);
        free(again.param);
    }
    free(data);
#else
    TEST_SKIP("built without CUDA");
#endif
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_late_copies),
    cmocka_unit_test(test_gpu_follows),
};
RT_SUITE(train_slots, tests)
