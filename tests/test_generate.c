/* Generation over a toy engine, and the text of what was generated. */
#include <string.h>

#include "core/rng.h"
#include "distill/generate.h"
#include "distill/lines.h"
#include "tests/suite.h"

enum { TOY_IDS = 16, TOY_LEN = 24, TOY_SLOTS = 5, TOY_STOP = 3 };

/* Logits are a function of the token and its position. */
struct toy {
    float logits[TOY_SLOTS * TOY_IDS];
    int64_t fail_at, steps;
};

static enum rt_status toy_step(void *ctx, const struct rt_batch_entry *e, int n, int n_rows, const float **logits, int64_t *stride, struct rt_err *err)
{
    struct toy *t = ctx;
    if (t->steps++ == t->fail_at)
        return rt_fail(err, RT_DEVICE, "the toy is broken");
    for (int i = 0; i < n; i++)
        for (int v = 0; e[i].row >= 0 && v < TOY_IDS; v++)
            t->logits[e[i].row * TOY_IDS + v] = rt_rng_normal(7, (uint64_t)e[i].token, (uint64_t)(e[i].position * TOY_IDS + v));
    (void)n_rows;
    *logits = t->logits;
    *stride = TOY_IDS;
    return RT_OK;
}

/* 20 prompts of 3 samples; holds back prompts more than `ahead` beyond those that have ended. */
struct source {
    int64_t next, prompts, ended, ahead;
    int samples;
    bool waited, single;
    uint64_t hash[32][4];
    uint32_t ids[4];
};

static enum rt_status source_next(void *self, struct rt_generate_prompt *out, bool *end, bool *wait, struct rt_err *err)
{
    struct source *s = self;
    (void)err;
    if (s->next == s->prompts) {
        *end = true;
        return RT_OK;
    }
    if (s->ahead > 0 && s->next >= s->ended / s->samples + s->ahead) {
        s->waited = *wait = true;
        return RT_OK;
    }
    const int64_t p = s->single ? s->next / s->samples : s->next;
    for (int i = 0; i < 4; i++)
        s->ids[i] = (uint32_t)(p + i) % TOY_IDS;
    *out = (struct rt_generate_prompt){.ids = s->ids, .n = 1 + p % 4, .line = 10 + p, .first_sample = s->single ? (int)(s->next % s->samples) : 0,
                                       .n_samples = s->single ? 1 : s->samples, .user = s};
    s->next++;
    return RT_OK;
}

static enum rt_status source_done(void *self, const struct rt_generated *g, struct rt_err *err)
{
    struct source *s = self;
    uint64_t h = (uint64_t)g->n * 31 + (uint64_t)g->finish;
    (void)err;
    assert_ptr_equal(g->user, s);
    assert_int_equal(g->n_prompt, 1 + (g->line - 10) % 4);
    for (int64_t i = 0; i < g->n; i++)
        h = h * 1000003 + g->ids[i];
    assert_true((g->ids[g->n - 1] == TOY_STOP) == (g->finish == RT_FINISH_STOP));
    assert_int_equal(s->hash[g->line - 10][g->sample], 0); /* once each */
    s->hash[g->line - 10][g->sample] = h;
    s->ended++;
    return RT_OK;
}

static enum rt_status toy_run(struct source *s, int slots, int64_t fail_at, struct rt_err *err)
{
    static const int32_t stop[] = {TOY_STOP};
    struct toy toy = {.fail_at = fail_at};
    struct rt_generator g = {.step = {.ctx = &toy, .step = toy_step}, .slots = slots, .budget = slots + 3, .max_len = TOY_LEN, .vocab = TOY_IDS};
    const struct rt_generate_options o = {.seed = 5, .sample = {.temperature = 1, .top_p = 1}, .max_new = 15, .n_ids = TOY_IDS, .stop_ids = stop, .n_stop = 1,
                                          .next = source_next, .done = source_done, .self = s};
    return rt_generate(&g, &o, NULL, err);
}

static void text_depends_on_line_and_sample_alone(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct source a = {.prompts = 20, .samples = 3}, b = {.prompts = 20, .samples = 3, .ahead = 2}, c = {.prompts = 60, .samples = 3, .single = true}, d = a;
    assert_ok(toy_run(&a, TOY_SLOTS, -1, &err));
    assert_int_equal(a.ended, 60);
    assert_ok(toy_run(&b, 2, -1, &err)); /* fewer slots, a source that holds back */
    assert_true(b.waited);
    assert_ok(toy_run(&c, 3, -1, &err)); /* samples asked for one by one */
    assert_memory_equal(a.hash, b.hash, sizeof a.hash);
    assert_memory_equal(a.hash, c.hash, sizeof a.hash);
    assert_true(a.hash[0][0] != a.hash[0][1] && a.hash[0][0] != a.hash[16][0]); /* the same prompt, other streams */
    assert_status(toy_run(&d, TOY_SLOTS, 4, &err), DEVICE);
}

static void a_source_may_not_wait_for_nothing(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct source s = {.prompts = 2, .samples = 1000, .ahead = 1, .single = true}; /* the second prompt waits for 1000 samples of which one comes */
    assert_status(toy_run(&s, 2, -1, &err), INTERNAL);
}

static void cut_characters_are_replaced(void **state)
{
    (void)state;
    static const char *const cases[][2] = {{"abc", "abc"}, {"", ""}, {"a\xC3", "a\xEF\xBF\xBD"}, {"\xE2\x82z", "\xEF\xBF\xBD\xEF\xBF\xBDz"}, {"\xC3\xA9!", "\xC3\xA9!"}};
    struct rt_err err = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct rt_buf b = {0};
        bool lossy = false;
        assert_ok(rt_buf_puts(&b, "", &err));
        assert_ok(rt_put_utf8(cases[i][0], strlen(cases[i][0]), &b, &lossy, &err));
        assert_int_equal(b.len, strlen(cases[i][1]));
        assert_memory_equal(b.data, cases[i][1], b.len);
        assert_int_equal(lossy, strcmp(cases[i][0], cases[i][1]) != 0);
        rt_buf_free(&b);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(text_depends_on_line_and_sample_alone),
    cmocka_unit_test(a_source_may_not_wait_for_nothing),
    cmocka_unit_test(cut_characters_are_replaced),
};
RT_SUITE(generate, tests)
