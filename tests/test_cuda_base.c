/* The cuda backend: device, memory, weights, conversions. Everything here needs a GPU and says SKIP without one. */
#include <string.h>

#include "core/dtype.h"
#include "tests/cuda_ops.h"

static void test_memory(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    print_message("    %s\n", p.gpu.be->describe(p.gpu.dev));
    struct rt_dev_memory m;
    assert_ok(p.gpu.be->memory(p.gpu.dev, &m, &err));
    assert_true(m.free > 0 && m.free <= m.total);
    void *none;
    assert_status(p.gpu.be->alloc(p.gpu.dev, (size_t)1 << 44, &none, &err), NOMEM);
    assert_ok(p.gpu.be->alloc(p.gpu.dev, 1000, &none, &err)); /* the failure left nothing behind */
    unsigned char zero[1000];
    cuda_get(&p, zero, none, sizeof zero);
    for (size_t i = 0; i < sizeof zero; i++)
        assert_int_equal(zero[i], 0);
    p.gpu.be->free(p.gpu.dev, none);
    cuda_pair_close(&p);
}

/* Host memory that copies reach: small blocks, and large ones with ends within a page. */
static void test_pinned(void **state)
{
    static const size_t sizes[] = {1, 5000, ((size_t)4 << 20) - 1, (size_t)4 << 20, ((size_t)44 << 20) + 12345};
    enum { N = sizeof sizes / sizeof *sizes };
    struct cuda_pair p;
    struct rt_err err = {0};
    unsigned char *block[N];
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct rt_backend *be = p.gpu.be;
    for (int i = 0; i < N; i++) {
        assert_ok(be->host_alloc(p.gpu.dev, sizes[i], (void **)&block[i], &err));
        assert_int_equal((uintptr_t)block[i] % 64, 0);
        memset(block[i], i + 1, sizes[i]);
    }
    for (int i = 0; i < N; i++) {
        void *dev;
        assert_ok(be->alloc(p.gpu.dev, sizes[i], &dev, &err));
        assert_ok(be->upload(p.gpu.dev, p.gpu.q, dev, block[i], sizes[i], &err));
        assert_ok(be->queue_sync(p.gpu.dev, p.gpu.q, &err));
        memset(block[i], 0, sizes[i]);
        assert_ok(be->download(p.gpu.dev, p.gpu.q, block[i], dev, sizes[i], &err));
        assert_ok(be->queue_sync(p.gpu.dev, p.gpu.q, &err));
        for (size_t j = 0; j < sizes[i]; j += j + 4096 < sizes[i] ? 4096 : 1)
            assert_int_equal(block[i][j], i + 1);
        be->free(p.gpu.dev, dev);
    }
    for (int i = 0; i < N; i++)
        be->host_free(p.gpu.dev, block[i]);
    be->host_free(p.gpu.dev, NULL);
    cuda_pair_close(&p);
}

static void test_convert(void **state)
{
    enum { N = 100003 };
    static float x[N], back[N];
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    cuda_random(x, N, 1, 3.0f);
    for (int i = 0; i < N; i++)
        x[i] += x[i] * 1e-3f; /* no bfloat16 numbers any more */
    x[0] = 0.0f;
    x[1] = 1e-40f;
    x[2] = 3.3e38f;
    float *src = cuda_bytes(&p, x, sizeof x), *wide = cuda_bytes(&p, NULL, sizeof x);
    void *act = cuda_act(&p, NULL, N);
    assert_ok(RT_OP(&p.gpu, convert, &err, .src = src, .dst = act, .n = N));
    assert_ok(RT_OP(&p.gpu, convert, &err, .src = act, .dst = wide, .n = N, .to_f32 = true));
    cuda_get(&p, back, wide, sizeof back);
    cuda_round(x, N);
    assert_memory_equal(back, x, sizeof x);
    cuda_free(&p, src);
    cuda_free(&p, wide);
    cuda_free(&p, act);
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_memory),
    cmocka_unit_test(test_pinned),
    cmocka_unit_test(test_convert),
};
RT_SUITE(cuda_base, tests)
