/* Generation by the student's decoder under the batch scheduler: pages, shared prompts, sequences that wait, recorded steps; on every backend. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#include "student/decode.h"
#include "tests/student_fixture.h"

enum { MAX_LEN = 700, REQUESTS = 4, SAMPLES = 3, SEQUENCES = REQUESTS * SAMPLES, MAX_NEW = 100, VOCAB = 67 };

static const char config[] = "{\"model_type\": \"qwen2\", \"vocab_size\": 67, \"hidden_size\": 64, \"intermediate_size\": 96, \"num_hidden_layers\": 2, "
                             "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 1024, "
                             "\"tie_word_embeddings\": true, \"rope_theta\": 10000.0, \"torch_dtype\": \"bfloat16\"}";

struct model {
    struct rt_backend be;
    struct rt_device d;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_arena weights;
    struct rt_student *s;
};

static void open_model(struct model *m, const struct rt_backend *be, bool record)
{
    struct rt_err err = {0};
    memset(m, 0, sizeof *m);
    m->be = *be;
    if (!record)
        m->be.graph_begin = NULL;
    assert_ok(rt_device_open(&m->be, &(struct rt_dev_options){.threads = 2}, &m->d, &err));
    assert_ok(rt_student_config_parse(config, strlen(config), "test", &m->c, &err));
    assert_ok(rt_params_create(&m->c, &m->p, &err));
    assert_ok(rt_device_arena(&m->d, rt_student_weight_bytes(&m->c, &m->p, MAX_LEN, rt_device_act_size(&m->d)), "weights", &m->weights, &err));
    assert_ok(rt_student_create(&m->d, &m->c, &m->p, MAX_LEN, &m->weights, &m->s, &err));
    for (int i = 0; i < m->p.n; i++) {
        const struct rt_param *p = &m->p.at[i];
        const int64_t n = rt_param_elements(p);
        float *x = malloc((size_t)n * sizeof *x);
        for (int64_t j = 0; j < n; j++)
            x[j] = (p->kind == RT_PARAM_NORM ? 1.0f : 0.0f) + 0.2f * rt_rng_normal(7, rt_rng_stream(p->name), (uint64_t)j);
        assert_ok(rt_param_upload(&m->d, rt_student_block(m->s), p, 0, n, x, &err));
        free(x);
    }
}

static void close_model(struct model *m)
{
    rt_student_free(m->s);
    rt_device_arena_free(&m->d, &m->weights);
    rt_params_free(&m->p);
    rt_student_config_free(&m->c);
    rt_device_close(&m->d);
}

struct outcome {
    int64_t n[SEQUENCES];
    int32_t ids[SEQUENCES][MAX_NEW];
    float logprobs[SEQUENCES][MAX_NEW];
};

static enum rt_status keep(void *ctx, const struct rt_batch_result *r, struct rt_err *err)
{
    struct outcome *o = ctx;
    (void)err;
    o->n[r->index] = r->n;
    memcpy(o->ids[r->index], r->ids, (size_t)r->n * sizeof *r->ids);
    memcpy(o->logprobs[r->index], r->logprobs, (size_t)r->n * sizeof *r->logprobs);
    return RT_OK;
}

struct way {
    int slots, budget;
    int64_t tokens;
    bool own_prefix;
    double temperature;
};

/* Prompts of 1, 100, 440 and 500 tokens; some samples end by a stop id. */
static struct rt_batch_stats generate(struct model *m, const struct way *w, struct outcome *out)
{
    static const int64_t lens[REQUESTS] = {500, 1, 440, 100};
    static const int32_t stops[] = {5};
    struct rt_err err = {0};
    struct rt_student_decoder *d = NULL;
    struct rt_batch *b = NULL;
    struct rt_batch_stats stats;
    const struct rt_decoder_options o = {.slots = w->slots, .budget = w->budget, .max_len = MAX_LEN, .tokens = w->tokens, .own_prefix = w->own_prefix};
    assert_ok(rt_student_decoder_create(m->s, &o, &d, &err));
    const struct rt_batch_step step = rt_student_decoder_step(d);
    const struct rt_batch_options bo = {.slots = w->slots, .budget = w->budget, .max_len = MAX_LEN, .n_ids = VOCAB, .seed = 9,
                                        .sample = {w->temperature, 0, 0.95}, .on_finish = keep, .ctx = out};
    assert_ok(rt_batch_create(&bo, &step, &b, &err));
    memset(out, 0, sizeof *out);
    for (int i = 0; i < REQUESTS; i++) {
        int32_t prompt[512];
        for (int64_t j = 0; j < lens[i]; j++)
            prompt[j] = (int32_t)(rt_rng_u64(21, (uint64_t)i, (uint64_t)j) % VOCAB);
        const struct rt_batch_request q = {.prompt = prompt, .n_prompt = lens[i], .stream = (uint64_t)(i * SAMPLES), .n_samples = SAMPLES,
                                           .max_new = MAX_NEW - 7 * i, .stop_ids = stops, .n_stop = i % 2};
        assert_ok(rt_batch_add(b, &q, NULL, &err));
    }
    assert_ok(rt_batch_run(b, &err));
    rt_batch_stats(b, &stats);
    assert_int_equal(stats.finished, SEQUENCES);
    rt_batch_free(b);
    rt_student_decoder_free(d);
    return stats;
}

static void expect_same(const struct outcome *a, const struct outcome *b, const char *what)
{
    for (int i = 0; i < SEQUENCES; i++)
        if (a->n[i] != b->n[i] || memcmp(a->ids[i], b->ids[i], (size_t)a->n[i] * 4) != 0 || memcmp(a->logprobs[i], b->logprobs[i], (size_t)a->n[i] * 4) != 0)
            fail_msg("%s: sequence %d is another one", what, i);
}

/* On the host text depends on nothing but its own sequence: alone, together, or where memory is so short that sequences wait and are fed again. */
static void short_of_memory(void **state)
{
    static const char *const names[] = {"ref", "cpu"};
    static struct outcome alone, many;
    (void)state;
    for (int i = 0; i < 2 && fx_backend(names[i]) != NULL; i++) {
        struct model m;
        open_model(&m, fx_backend(names[i]), true);
        generate(&m, &(struct way){1, 64, 0, false, 0.8}, &alone);
        generate(&m, &(struct way){5, 300, 0, false, 0.8}, &many);
        expect_same(&alone, &many, names[i]);
        const struct rt_batch_stats s = generate(&m, &(struct way){4, 200, 3 * 512, false, 0.8}, &many);
        assert_true(s.parked > 0);
        expect_same(&alone, &many, "short of memory");
        close_model(&m);
    }
}

/* The same plan gives the same text: again, with prompts copied in place of shared, with steps that are not recorded. And a plan in which sequences
 * wait ends well. */
static void on_the_gpu(void **state)
{
    static struct outcome want, got;
    struct model m;
    int64_t fed;
    (void)state;
    if (fx_backend("cuda") == NULL)
        TEST_SKIP("no GPU");
    for (int greedy = 0; greedy < 2; greedy++) {
        struct way w = {6, 300, 0, false, greedy ? 0 : 0.8};
        open_model(&m, fx_backend("cuda"), true);
        fed = generate(&m, &w, &want).prompt_tokens;
        generate(&m, &w, &got);
        expect_same(&want, &got, "again");
        w.own_prefix = true;
        assert_true(generate(&m, &w, &got).prompt_tokens == fed);
        expect_same(&want, &got, "prompts copied");
        w = (struct way){4, 200, 768, false, greedy ? 0 : 0.8};
        const struct rt_batch_stats s = generate(&m, &w, &got);
        print_message("    %ld times a sequence waited\n", (long)s.parked);
        assert_true(s.parked > 0);
        close_model(&m);
        open_model(&m, fx_backend("cuda"), false);
        w = (struct way){6, 300, 0, false, greedy ? 0 : 0.8};
        generate(&m, &w, &got);
        expect_same(&want, &got, "not recorded");
        close_model(&m);
    }
}

/* Greedy text of the GPU against the host's, from the same parameters: until the first choice between two tokens that bfloat16 cannot tell apart. */
static void greedy_as_on_the_host(void **state)
{
    static struct outcome host, gpu;
    struct model a, b;
    struct rt_err err = {0};
    int64_t same = 0, all = 0, begun = 0;
    (void)state;
    if (fx_backend("cuda") == NULL)
        TEST_SKIP("no GPU");
    open_model(&b, fx_backend("cuda"), true);
    open_model(&a, fx_backend("cpu") != NULL ? fx_backend("cpu") : &rt_backend_ref, true);
    for (int i = 0; i < a.p.n; i++) { /* rounded as the GPU has them */
        const int64_t n = rt_param_elements(&a.p.at[i]);
        float *x = malloc((size_t)n * sizeof *x);
        assert_ok(rt_param_download(&b.d, rt_student_block(b.s), &b.p.at[i], 0, n, x, &err));
        assert_ok(rt_param_upload(&a.d, rt_student_block(a.s), &a.p.at[i], 0, n, x, &err));
        free(x);
    }
    generate(&a, &(struct way){6, 300, 0, false, 0}, &host);
    generate(&b, &(struct way){6, 300, 0, false, 0}, &gpu);
    for (int i = 0; i < SEQUENCES; i++) {
        int64_t n = 0;
        while (n < host.n[i] && n < gpu.n[i] && host.ids[i][n] == gpu.ids[i][n])
            n++;
        begun += n > 0;
        if (n > 0)
            assert_true(host.logprobs[i][0] - gpu.logprobs[i][0] < 0.2f && gpu.logprobs[i][0] - host.logprobs[i][0] < 0.2f);
        same += n;
        all += host.n[i];
    }
    print_message("    %ld of %ld tokens before the first that differs\n", (long)same, (long)all);
    assert_true(3 * begun >= 2 * SEQUENCES && 20 * same > all); /* random weights have a near tie every ten or twenty tokens */
    close_model(&a);
    close_model(&b);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(short_of_memory),
    cmocka_unit_test(on_the_gpu),
    cmocka_unit_test(greedy_as_on_the_host),
};
RT_SUITE(student_generate, tests)
