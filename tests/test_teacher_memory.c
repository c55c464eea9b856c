/* The teacher's rows whichever weights stay where: threads, memory, a device with memory of its own. */
#include "tests/far_device.h"
#include "tests/teacher_fixture.h"

/* A device with memory of its own: all weights there; a ring there and the bytes kept on the host; a ring there and everything read again. */
static void same_bytes_from_a_far_device(void **state)
{
    enum { WINDOWS = 3 };
    static const struct { uint64_t gpu; int64_t host; bool gpu_resident, resident; } runs[] = {
        {(uint64_t)8 << 30, (int64_t)4 << 30, true, true}, {0, (int64_t)4 << 30, false, true}, {0, 0, false, false},
    };
    const struct rt_backend far = far_backend();
    struct setup s;
    (void)state;
    set_up(&s, test_data("tests/data/cases/v3_fp8"), "cpu", 2, (int64_t)1 << 30);
    struct rt_score_options so = score_options(&s);
    so.n_features = 4; /* more than are on their way at a time */
    so.feature[0] = (struct rt_feature_spec){.layer = 0, .dim = 128, .dtype = RT_BF16};
    so.feature[1] = (struct rt_feature_spec){.layer = 1, .dim = 16, .dtype = RT_E4M3, .projected = true};
    so.feature[2] = (struct rt_feature_spec){.layer = 1, .dim = 30, .dtype = RT_E4M3, .projected = true};
    so.feature[3] = (struct rt_feature_spec){.layer = RT_LAYER_FINAL, .dim = 128, .dtype = RT_BF16};
    struct kept want = score(&s, &so);
    tear_down(&s);
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        struct rt_err err = {0};
        memset(&s, 0, sizeof s);
        assert_ok(rt_device_open(&far, &(const struct rt_dev_options){.threads = 2}, &s.d, &err));
        struct rt_teacher_options o = {.dir = test_data("tests/data/cases/v3_fp8"), .device = &s.d, .max_length = MOST, .data_tokens = 89};
        struct rt_teacher_sizes z;
        struct rt_teacher_plan p;
        far_memory((uint64_t)64 << 30);
        o.memory = (int64_t)4 << 30;
        assert_ok(rt_teacher_measure(&o, &z, &err));
        assert_ok(rt_teacher_plan_sizes(&o, &z, &p, &err));
        const uint64_t states = p.gpu_bytes - p.gpu_weight_budget;
        far_memory(runs[i].gpu > 0 ? runs[i].gpu : states + 2 * z.largest_part);
        o.memory = runs[i].host > 0 ? runs[i].host : (int64_t)(p.window_bytes + RT_TEACHER_DRIVER_BYTES + z.staging);
        assert_ok(rt_teacher_open(&o, &s.t, &err));
        assert_int_equal(rt_teacher_plan(s.t)->gpu_resident, runs[i].gpu_resident);
        assert_int_equal(rt_teacher_plan(s.t)->resident, runs[i].resident);
        fill_sequences(&s, rt_teacher_config(s.t)->vocab_size);
        uint64_t read = 0;
        for (int w = 0; w < WINDOWS; w++) {
            struct kept got = score(&s, &so);
            assert_int_equal(got.bytes.len, want.bytes.len);
            assert_memory_equal(got.bytes.data, want.bytes.data, want.bytes.len);
            rt_buf_free(&got.bytes);
            const uint64_t now = rt_weights_bytes_read(s.t->w);
            assert_int_equal(now > read, w == 0 || !runs[i].resident);
            read = now;
        }
        tear_down(&s);
    }
    rt_buf_free(&want.bytes);
}

static void same_bytes_whatever_threads_and_memory(void **state)
{
    (void)state;
    struct kept first = {0};
    /* all weights kept; too little memory for that, so that they are streamed twice; other thread counts */
    static const struct { int threads; int64_t memory; bool resident; } runs[] = {
        {1, (int64_t)1 << 30, true}, {2, (int64_t)1 << 30, true}, {3, (int64_t)1 << 30, true}, {2, (int64_t)RT_TEACHER_FIXED_BYTES + 1200000, false},
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        struct setup s;
        set_up(&s, test_data("tests/data/cases/v3_fp8"), "cpu", runs[i].threads, runs[i].memory);
        assert_int_equal(rt_teacher_plan(s.t)->resident, runs[i].resident);
        const struct rt_score_options o = score_options(&s);
        for (int pass = 0; pass < 2; pass++) {
            struct kept k = score(&s, &o);
            assert_int_equal(k.blocks, SEQS);
            if (first.blocks == 0) {
                first = k;
                continue;
            }
            assert_int_equal(k.bytes.len, first.bytes.len);
            assert_memory_equal(k.bytes.data, first.bytes.data, k.bytes.len);
            rt_buf_free(&k.bytes);
        }
        tear_down(&s);
    }
    rt_buf_free(&first.bytes);
}

/* DeepSeek-V3 on cards of several sizes, from its numbers alone: what the plan promises, and that it adds up. */
static void windows_of_the_full_model(void **state)
{
    static const struct { uint64_t gpu; int64_t data, least; } cards[] = {
        {(uint64_t)80 << 30, 1 << 24, 1 << 20}, {(uint64_t)40000 << 20, 1 << 18, 1 << 18}, {(uint64_t)24 << 30, 1 << 18, 1 << 17}, {(uint64_t)16 << 30, 1 << 18, 1 << 15},
    };
    struct rt_backend far = far_backend();
    const struct rt_device d = {.be = &far};
    struct rt_teacher_sizes z = {.largest_part = 1853500000, .largest_expert = 44056000, .model_bytes = 671000000000, .model_room = 672000000000, .staging = 128 << 20};
    z.config = (struct rt_teacher_config){.vocab_size = 129280, .hidden = 7168, .layers = 61, .dense_first = 3, .heads = 128, .q_lora = 1536, .kv_lora = 512,
                                          .dn = 128, .dr = 64, .dv = 128, .inter = 18432, .moe_inter = 2048, .experts = 256, .shared = 1, .top_k = 8,
                                          .n_group = 8, .topk_group = 4, .max_position = 163840, .fp8 = true};
    (void)state;
    far.act = RT_BF16;
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++) {
        struct rt_err err = {0};
        struct rt_teacher_plan p;
        const struct rt_teacher_options o = {.dir = "v3", .device = &d, .w8a8 = true, .memory = (int64_t)16 << 30, .gpu_memory = (int64_t)cards[i].gpu, .max_length = 4096,
                                             .data_tokens = cards[i].data, .token_bytes = 600};
        far_memory((uint64_t)80 << 30);
        assert_ok(rt_teacher_plan_sizes(&o, &z, &p, &err));
        print_message("    %2d GiB: window %ld, states %.1f, operations %.1f, weights %.1f of which ring %.1f, table %.1f GB\n", (int)(cards[i].gpu >> 30), (long)p.window,
                      (double)p.gpu_state * 1e-9, (double)p.gpu_scratch * 1e-9, (double)p.gpu_weight_budget * 1e-9, (double)p.gpu_ring * 1e-9, (double)p.gpu_embed * 1e-9);
        assert_true(p.window >= cards[i].least);
        assert_true(p.gpu_state + p.gpu_scratch + p.gpu_weight_budget + p.gpu_embed <= cards[i].gpu);
        assert_true(p.gpu_ring <= p.gpu_weight_budget && p.gpu_ring >= z.largest_part);
        assert_false(p.gpu_resident);
    }
    struct rt_err err = {0};
    struct rt_teacher_plan p;
    const struct rt_teacher_options small = {.dir = "v3", .device = &d, .w8a8 = true, .memory = (int64_t)16 << 30, .gpu_memory = (int64_t)6 << 30, .max_length = 4096};
    assert_status(rt_teacher_plan_sizes(&small, &z, &p, &err), NOMEM);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(same_bytes_whatever_threads_and_memory),
    cmocka_unit_test(same_bytes_from_a_far_device),
    cmocka_unit_test(windows_of_the_full_model),
};
RT_SUITE(teacher_memory, tests)
