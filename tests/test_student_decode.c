/* Generation: rows equal to the forward's, independent of the batch; caches copied, given back and taken again. */
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "student/decode.h"
#include "tests/student_fixture.h"

enum { MAX_NEW = 12, PROMPTS = 5, SAMPLES = 2 };

/* A document fed in chunks, interleaved with another one in a second slot: each row is the forward's. */
static void rows_equal_forward(void **state)
{
    const char *const names[] = {"ref", "cpu"};
    for (int b = 0; b < 2; b++)
        for (int kind = 0; kind < FX_N && fx_backend(names[b]) != NULL; kind++) {
            struct fx f;
            struct fx_docs docs[2];
            struct rt_err err = {0};
            struct rt_student_decoder *d = NULL;
            const struct rt_decoder_options o = {.slots = 3, .budget = 8, .max_len = 24};
            fx_open(&f, fx_backend(names[b]), 2, fx_config[kind]);
            fx_docs(&docs[0], &f, 5, (const int[]){20}, 1);
            fx_docs(&docs[1], &f, 6, (const int[]){20}, 1);
            float *whole[2] = {fx_forward_logits(&f, &docs[0]), fx_forward_logits(&f, &docs[1])};
            const int64_t V = f.c.vocab_size;
            assert_ok(rt_student_decoder_create(f.s, &o, &d, &err));
            const struct rt_batch_step step = rt_student_decoder_step(d);
            int64_t at[2] = {0, 0};
            for (int round = 0; at[0] < 20 || at[1] < 20; round++) {
                /* Runs of 1 .. 4 tokens of each; the last of each run wants logits. */
                struct rt_batch_entry e[8];
                int n = 0, rows = 0;
                for (int i = 0; i < 2; i++) {
                    const int64_t run = at[i] + 1 + (round + 2 * i) % 4;
                    for (; at[i] < run && at[i] < 20; at[i]++)
                        e[n++] = (struct rt_batch_entry){i == 0 ? 0 : 2, docs[i].ids[at[i]], at[i], -1};
                    if (n > 0 && e[n - 1].slot == (i == 0 ? 0 : 2))
                        e[n - 1].row = rows++;
                }
                const float *logits = NULL;
                int64_t stride = 0;
                assert_ok(step.step(step.ctx, e, n, rows, &logits, &stride, &err));
                for (int i = 0; i < n; i++)
                    if (e[i].row >= 0) {
                        const double gap = test_rel_error(logits + e[i].row * stride, whole[e[i].slot / 2] + e[i].position * V, V);
                        assert_true(gap <= 1e-5); /* float32, another order of sums */
                    }
            }
            rt_student_decoder_free(d);
            free(whole[0]);
            free(whole[1]);
            fx_close(&f);
        }
    (void)state;
}

struct outcome {
    int32_t ids[MAX_NEW];
    float logprobs[MAX_NEW];
    int64_t n;
};

static enum rt_status keep_result(void *ctx, const struct rt_batch_result *r, struct rt_err *err)
{
    struct outcome *o = (struct outcome *)ctx + r->index;
    (void)err;
    o->n = r->n;
    memcpy(o->ids, r->ids, (size_t)r->n * sizeof *r->ids);
    memcpy(o->logprobs, r->logprobs, (size_t)r->n * sizeof *r->logprobs);
    return RT_OK;
}

static void generate(struct fx *f, int slots, int budget, bool copies, double temperature, struct outcome *out)
{
    struct rt_err err = {0};
    struct rt_student_decoder *d = NULL;
    struct rt_batch *batch = NULL;
    const struct rt_decoder_options o = {.slots = slots, .budget = budget, .max_len = 32};
    assert_ok(rt_student_decoder_create(f->s, &o, &d, &err));
    struct rt_batch_step step = rt_student_decoder_step(d);
    if (!copies)
        step.copy_slot = NULL;
    const struct rt_batch_options bo = {.slots = slots, .budget = budget, .max_len = 32, .n_ids = f->c.vocab_size, .seed = 9,
                                        .sample = {temperature, 0, 1}, .on_finish = keep_result, .ctx = out};
    assert_ok(rt_batch_create(&bo, &step, &batch, &err));
    memset(out, 0, sizeof *out * PROMPTS * SAMPLES);
    for (int i = 0; i < PROMPTS; i++) {
        int32_t prompt[16];
        const int64_t n = 1 + 3 * i;
        for (int64_t j = 0; j < n; j++)
            prompt[j] = (int32_t)(rt_rng_u64(21, (uint64_t)i, (uint64_t)j) % (uint64_t)f->c.vocab_size);
        const struct rt_batch_request q = {.prompt = prompt, .n_prompt = n, .stream = (uint64_t)(i * SAMPLES), .n_samples = SAMPLES,
                                           .max_new = MAX_NEW};
        assert_ok(rt_batch_add(batch, &q, NULL, &err));
    }
    assert_ok(rt_batch_run(batch, &err));
    rt_batch_free(batch);
    rt_student_decoder_free(d);
}

/* One slot and one entry a step, or many of both: the same ids and the same bits of their probabilities. */
static void independent_of_the_batch(void **state)
{
    const char *const names[] = {"ref", "cpu"};
    for (int b = 0; b < 2; b++)
        for (int kind = 0; kind < FX_N && fx_backend(names[b]) != NULL; kind++) {
            struct fx f;
            struct outcome alone[PROMPTS * SAMPLES], many[PROMPTS * SAMPLES];
            fx_open(&f, fx_backend(names[b]), 2, fx_config[kind]);
            for (int t = 0; t < 2; t++) {
                generate(&f, 1, 1, false, t, alone);
                assert_true(alone[PROMPTS * SAMPLES - 1].n == MAX_NEW);
                generate(&f, 4, 23, true, t, many);
                assert_memory_equal(alone, many, sizeof alone);
                generate(&f, 7, 3, true, t, many);
                assert_memory_equal(alone, many, sizeof alone);
            }
            fx_close(&f);
        }
    (void)state;
}

static void memory_and_misuse(void **state)
{
    struct fx f;
    struct rt_err err = {0};
    struct rt_student_decoder *d = NULL;
    struct rt_decoder_options o = {.slots = 2, .budget = 4, .max_len = 16};
    const float *logits = NULL;
    int64_t stride = 0;
    fx_open(&f, &rt_backend_ref, 1, fx_config[FX_QWEN2]);
    const size_t two = rt_student_decoder_bytes(&f.c, &o, 4);
    o.slots = 50;
    assert_int_equal(rt_student_decoder_slots(&f.c, &o, 4, two), 2);
    assert_int_equal(rt_student_decoder_slots(&f.c, &o, 4, two - 1), 1);
    assert_int_equal(rt_student_decoder_slots(&f.c, &o, 4, 100), 0);
    o.slots = 2;
    o.max_len = FX_TOKENS + 1;
    assert_status(rt_student_decoder_create(f.s, &o, &d, &err), USAGE);
    o.max_len = 16;
    assert_ok(rt_student_decoder_create(f.s, &o, &d, &err));
    const struct rt_batch_step step = rt_student_decoder_step(d);
    const struct rt_batch_entry good = {0, 1, 0, 0};
    const struct {
        struct rt_batch_entry e;
        int n, rows;
    } bad[] = {{{2, 1, 0, 0}, 1, 1}, {{-1, 1, 0, 0}, 1, 1}, {{0, 61, 0, 0}, 1, 1}, {{0, -1, 0, 0}, 1, 1}, {{0, 1, 16, 0}, 1, 1},
               {{0, 1, -1, 0}, 1, 1}, {{0, 1, 0, 1}, 1, 1}, {{0, 1, 0, -1}, 1, 1}, {{0, 1, 0, 0}, 5, 1}, {{0, 1, 0, 0}, 1, 3}, {{0, 1, 0, 0}, 0, 0}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_status(step.step(step.ctx, &bad[i].e, bad[i].n, bad[i].rows, &logits, &stride, &err), USAGE);
    assert_ok(step.step(step.ctx, &good, 1, 1, &logits, &stride, &err));
    const float first = logits[5];
    assert_status(step.copy_slot(step.ctx, 0, 2, 1, &err), USAGE);
    rt_student_decoder_suspend(d);
    rt_student_decoder_suspend(d);
    assert_status(step.step(step.ctx, &good, 1, 1, &logits, &stride, &err), USAGE);
    assert_status(step.copy_slot(step.ctx, 0, 1, 1, &err), USAGE);
    assert_ok(rt_student_decoder_resume(d, &err));
    assert_ok(rt_student_decoder_resume(d, &err));
    assert_ok(step.step(step.ctx, &good, 1, 1, &logits, &stride, &err));
    assert_true(logits[5] == first);
    rt_student_decoder_free(d);
    fx_close(&f);
    (void)state;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(rows_equal_forward),
    cmocka_unit_test(independent_of_the_batch),
    cmocka_unit_test(memory_and_misuse),
};
RT_SUITE(student_decode, tests)
