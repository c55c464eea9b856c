/* The backend tables and their selection, memory, queues and weights. */
#include "tests/ops.h"

static const struct rt_backend *const tables[] = {&rt_backend_ref, &rt_backend_ref64, &rt_backend_cpu};

static void every_entry_is_there(void **state)
{
    (void)state;
    for (int i = 0; i < COUNT(tables); i++) {
        const struct rt_backend *be = tables[i];
#define HAS(entry) \
        if (be->entry == NULL) \
            fail_msg("the %s backend lacks %s", be->name, #entry);
        RT_BACKEND_OPS(HAS)
        HAS(available) HAS(open) HAS(close) HAS(describe) HAS(alloc) HAS(free) HAS(queue_create) HAS(queue_free) HAS(queue_sync)
        HAS(event_create) HAS(event_free) HAS(event_record) HAS(event_wait) HAS(upload) HAS(download) HAS(copy) HAS(zero)
        HAS(all_reduce) HAS(reduce_scatter) HAS(all_gather) HAS(broadcast) HAS(weight_load) HAS(weight_param) HAS(weight_free) HAS(weight_bytes)
#undef HAS
    }
    assert_int_equal(rt_backend_ref.act, RT_F32);
    assert_int_equal(rt_backend_ref64.act, RT_F64);
    assert_int_equal(rt_backend_cpu.act, RT_F32);
}

static void selection(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_backend *be = NULL;
    enum rt_op all[RT_OP_COUNT];
    for (int i = 0; i < RT_OP_COUNT; i++)
        all[i] = (enum rt_op)i;

    assert_ok(rt_backend_select("ref", all, RT_OP_COUNT, &be, &err));
    assert_ptr_equal(be, &rt_backend_ref);
    assert_ok(rt_backend_select("cpu", all, RT_OP_COUNT, &be, &err));
    assert_ptr_equal(be, &rt_backend_cpu);
    assert_ok(rt_backend_select("auto", NULL, 0, &be, &err));
    assert_ptr_not_equal(be, &rt_backend_ref);
    assert_status(rt_backend_select("gpu", NULL, 0, &be, &err), USAGE);
    assert_status(rt_backend_select("ref64", NULL, 0, &be, &err), USAGE);

    const struct rt_backend *const *list = rt_backend_list();
    bool cuda = false;
    for (int i = 0; list[i] != NULL; i++)
        cuda |= strcmp(list[i]->name, "cuda") == 0;
    if (!cuda) {
        const enum rt_status st = rt_backend_select("cuda", NULL, 0, &be, &err);
        assert_int_equal(st, RT_DEVICE);
        assert_non_null(strstr(err.msg, "cuda"));
    }
}

static void a_missing_operation_is_named(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_backend be = rt_backend_ref;
    be.head_loss = NULL;
    struct rt_device d = ops_open(&be);
    assert_int_equal(RT_OP(&d, head_loss, &err, .n = 0), RT_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "head_loss"));
    assert_non_null(strstr(err.msg, "ref"));
    rt_device_close(&d);
}

static void memory_and_queues(void **state)
{
    (void)state;
    for (int i = 0; i < COUNT(tables); i++) {
        struct rt_err err = {0};
        struct rt_device d = ops_open(tables[i]);
        assert_non_null(d.be->describe(d.dev));
        char *p, *r;
        assert_ok(d.be->alloc(d.dev, 100, (void **)&p, &err));
        assert_ok(d.be->alloc(d.dev, 100, (void **)&r, &err));
        assert_int_equal((uintptr_t)p % 64, 0);
        char host[100], back[100];
        for (int j = 0; j < 100; j++) {
            assert_int_equal(p[j], 0);
            host[j] = (char)j;
        }
        assert_ok(rt_device_upload(&d, p, host, 100, &err));
        assert_ok(d.be->copy(d.dev, d.q, r, p, 100, &err));
        assert_ok(rt_device_zero(&d, r + 50, 50, &err));
        assert_ok(rt_device_download(&d, back, r, 100, &err));
        assert_memory_equal(back, host, 50);
        for (int j = 50; j < 100; j++)
            assert_int_equal(back[j], 0);

        struct rt_event *e;
        assert_ok(d.be->event_create(d.dev, &e, &err));
        assert_ok(d.be->event_record(d.dev, d.q, e, &err));
        assert_ok(d.be->event_wait(d.dev, d.q, e, &err));
        d.be->event_free(d.dev, e);
        assert_ok(d.be->all_reduce(d.dev, d.q, p, 4, &err));
        assert_ok(d.be->reduce_scatter(d.dev, d.q, p, 4, &err));
        assert_ok(d.be->all_gather(d.dev, d.q, p, 4, &err));
        assert_ok(d.be->broadcast(d.dev, d.q, p, 4, 0, &err));
        assert_ok(rt_device_sync(&d, &err));
        assert_memory_equal(p, host, 100);
        d.be->free(d.dev, p);
        d.be->free(d.dev, r);
        d.be->weight_free(d.dev, NULL);
        rt_device_close(&d);
        rt_device_close(&d);
    }
}

static void bad_weights_are_refused(void **state)
{
    (void)state;
    const float data[4] = {0}, scale[1] = {1};
    for (int i = 0; i < COUNT(tables); i++) {
        struct rt_err err = {0};
        struct rt_device d = ops_open(tables[i]);
        struct rt_weight *w = NULL;
        struct rt_weight_src src = {"model.norm.weight", RT_I64, 1, 2, data, NULL, false, NULL, NULL};
        assert_int_equal(d.be->weight_load(d.dev, d.q, &src, &w, &err), RT_UNSUPPORTED);
        assert_non_null(strstr(err.msg, "model.norm.weight"));
        rt_err_clear(&err);
        src = (struct rt_weight_src){"w", RT_E4M3, 2, 2, data, NULL, false, NULL, NULL};
        assert_int_not_equal(d.be->weight_load(d.dev, d.q, &src, &w, &err), RT_OK);
        rt_err_clear(&err);
        src = (struct rt_weight_src){"w", RT_E4M3, 2, 2, data, scale, false, NULL, NULL};
        assert_ok(d.be->weight_load(d.dev, d.q, &src, &w, &err));
        d.be->weight_free(d.dev, w);
        rt_device_close(&d);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(every_entry_is_there),
    cmocka_unit_test(selection),
    cmocka_unit_test(a_missing_operation_is_named),
    cmocka_unit_test(memory_and_queues),
    cmocka_unit_test(bad_weights_are_refused),
};
RT_SUITE(backend, tests)
