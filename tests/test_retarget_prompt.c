/* The student's side of a prompt: conversations that are read back from the teacher's text and rendered by the student's template. */
#include <string.h>

#include "distill/retarget_prompt.h"
#include "tests/retarget_fixture.h"

static void read_back(const char *dir, const struct rt_message *m, size_t n, const char *completion, size_t expected, const char *forced)
{
    struct rt_err err = {0};
    struct rt_model_dir model = rf_model(test_data(dir));
    struct rt_rendered r = {0};
    struct rt_prompt_read p = {0};
    struct rt_buf text = {0};
    bool ok;
    assert_ok(rt_template_completion(model.tmpl, m, n, completion, strlen(completion), "test", &r, &err));
    assert_ok(rt_tokenizer_decode(model.tok, r.enc.ids, r.target_start, false, &text, &err));
    assert_ok(rt_prompt_read(&model, text.data, text.len, r.enc.ids, r.target_start, &p, &ok, &err));
    if (!ok)
        fail_msg("%s: %.*s is not read back", dir, (int)text.len, text.data);
    assert_int_equal(p.n, expected);
    assert_int_equal(p.forced_len, strlen(forced));
    assert_memory_equal(p.forced, forced, p.forced_len);
    for (size_t i = 0; i < expected; i++) {
        const struct rt_message *a = &p.m[i], *b = &m[n - expected + i];
        assert_string_equal(a->role, b->role);
        assert_int_equal(a->content_len, b->content_len);
        assert_memory_equal(a->content, b->content, b->content_len);
    }
    /* one token less is another prompt */
    assert_ok(rt_prompt_read(&model, text.data, text.len, r.enc.ids, r.target_start - 1, &p, &ok, &err));
    assert_false(ok);
    rt_prompt_read_free(&p);
    rt_rendered_free(&r);
    rt_buf_free(&text);
    rt_model_dir_close(&model);
}

#define M(r, c) {.role = r, .content = c, .content_len = sizeof(c) - 1, .loss = -1}
static void prompts_are_read_back(void **state)
{
    (void)state;
    static const struct rt_message one[] = {M("user", "What is 2+2?\n\nThink.")}, two[] = {M("system", "Be brief."), M("user", "A"), M("assistant", "B"), M("user", "C")};
    read_back(DEEPSEEK, one, 1, "x</think>y", 1, "<think>\n");
    read_back(DEEPSEEK, two, 4, "x</think>y", 4, "<think>\n");
    read_back(QWEN, one, 1, "y", 1, "");
    read_back(QWEN, two, 4, "y", 4, "");
    read_back(QWEN, one, 1, "<think>\n\n</think>\n\ny", 1, "<think>\n\n</think>\n\n");
    read_back(LLAMA, one, 1, "y", 1, "");
    read_back(LLAMA, two, 4, "y", 4, "");
    read_back(SMOLLM, one, 1, "y", 1, ""); /* a default system message is the template's */
    read_back(SMOLLM, two, 4, "y", 4, "");
}

/* An answer without a thought, out of a conversation, where a sampler's prompt would open one: the student's has none either, whether its template knows
 * empty thoughts (qwen3), opens one itself (the teacher's, the example's), or neither. */
static void an_answer_without_a_thought(void **state)
{
    (void)state;
    struct rt_err err = {0};
    static const char *const students[] = {QWEN, LLAMA, SMOLLM, DEEPSEEK, "examples/crossing_student"};
    const struct rt_message m[] = {M("system", "Be brief.\n\nPlease."), M("user", "A"), M("assistant", "the answer"), M("user", "C"), M("assistant", "So x = 42")};
    for (size_t i = 0; i < sizeof students / sizeof students[0]; i++) {
        struct rf_both b = {.t = rf_model(test_data(DEEPSEEK)), .s = rf_model(test_data(students[i]))};
        struct rt_rendered r = {0}, own = {0};
        char text[256];
        assert_ok(rt_template_render(b.t.tmpl, m, 5, "test", &r, &err));
        b.r = rf_rows(&b.t, r.enc.ids, r.loss_mask, (int64_t)r.enc.n, 8, rf_hash_logit, NULL);
        b.m = rf_make(&b.t, &b.s, &b.r, RT_RETARGET_EXACT);
        assert_int_equal(b.m.reject, RT_REJECT_NONE);
        rf_targets_of(&b.m, text, sizeof text);
        assert_string_equal(text, "So x = 42");
        assert_int_equal(b.m.counts.masked[RT_MASK_FORCED], 0);
        assert_ok(rt_template_render(b.s.tmpl, m, 5, "test", &own, &err));
        const int64_t n = b.m.rows.n_tokens;
        assert_int_equal(n, own.target_start + own.n_targets);
        assert_memory_equal(b.m.rows.ids, own.enc.ids, (size_t)n * sizeof(uint32_t));
        rt_rendered_free(&r);
        rt_rendered_free(&own);
        rf_done(&b);
    }
}

/* Only the last turn of several targets is kept. */
static void earlier_turns_are_left(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rf_both b = {.t = rf_model(test_data(DEEPSEEK)), .s = rf_model(test_data(QWEN))};
    struct rt_message m[] = {M("user", "A"), M("assistant", "the answer"), M("user", "C"), M("assistant", "So x</think>then")};
    struct rt_rendered r = {0};
    char text[256];
    m[1].loss = 1;
    assert_ok(rt_template_render(b.t.tmpl, m, 4, "test", &r, &err));
    b.r = rf_rows(&b.t, r.enc.ids, r.loss_mask, (int64_t)r.enc.n, 8, rf_hash_logit, NULL);
    b.m = rf_make(&b.t, &b.s, &b.r, RT_RETARGET_EXACT);
    assert_int_equal(b.m.reject, RT_REJECT_NONE);
    assert_true(b.m.text.earlier);
    rf_targets_of(&b.m, text, sizeof text);
    assert_non_null(strstr(text, "So x</think>"));
    assert_null(strstr(text, "the answer"));
    rt_rendered_free(&r);
    rf_done(&b);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(prompts_are_read_back), cmocka_unit_test(an_answer_without_a_thought), cmocka_unit_test(earlier_turns_are_left),
};
RT_SUITE(retarget_prompt, tests)
