/* Chat templates: recognition, text, ids and targets of each family. Expected texts were made by Jinja from the same templates. */
#include "tests/suite.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "core/io.h"
#include "formats/template.h"

#define DATA "tests/data/tokenizers/"
#define M(r, c) {.role = r, .content = c, .content_len = sizeof(c) - 1, .loss = -1}
#define COUNT(a) (sizeof(a) / sizeof(a)[0])

struct fixture {
    struct rt_tokenizer *tok;
    struct rt_template *tmpl;
    struct rt_rendered r;
    struct rt_err err;
};

/* name NULL: the directory's own template. */
static void open_kind(struct fixture *f, const char *kind, const char *name)
{
    struct rt_err err = {0};
    char dir[256];
    memset(f, 0, sizeof *f);
    snprintf(dir, sizeof dir, DATA "%s", kind);
    assert_ok(rt_tokenizer_load(test_data(dir), &f->tok, &err));
    assert_ok(rt_template_load(test_data(dir), name, f->tok, &f->tmpl, &err));
    assert_non_null(f->tmpl);
}

static void shut(struct fixture *f)
{
    rt_rendered_free(&f->r);
    rt_template_free(f->tmpl);
    rt_tokenizer_free(f->tok);
}

/* The rendered text, what the ids decode to (no kind here normalises these texts), and the targets' text. */
static void check_text(struct fixture *f, const char *text, const char *targets)
{
    struct rt_err err = {0};
    struct rt_buf all = {0}, got = {0};
    assert_ok(rt_tokenizer_decode(f->tok, f->r.enc.ids, f->r.enc.n, false, &all, &err));
    assert_ok(rt_buf_puts(&all, "", &err));
    assert_string_equal(all.data, text);
    assert_int_equal(f->r.text.len, strlen(text));
    assert_memory_equal(f->r.text.data, text, strlen(text));
    size_t n = 0;
    for (size_t i = 0; i < f->r.enc.n; i++)
        if (f->r.loss_mask[i]) {
            if (n++ == 0)
                assert_int_equal(f->r.target_start, i);
            assert_ok(rt_tokenizer_decode(f->tok, &f->r.enc.ids[i], 1, false, &got, &err));
        }
    assert_int_equal(n, f->r.n_targets);
    assert_ok(rt_buf_puts(&got, "", &err));
    assert_string_equal(got.data, targets);
    rt_buf_free(&all);
    rt_buf_free(&got);
}

/* The ids are those of the whole text at once. */
static void check_whole(struct fixture *f)
{
    struct rt_err err = {0};
    struct rt_encoding e = {0};
    assert_ok(rt_tokenizer_encode(f->tok, f->r.text.data, f->r.text.len, &e, &err));
    assert_int_equal(e.n, f->r.enc.n);
    assert_memory_equal(e.ids, f->r.enc.ids, e.n * sizeof *e.ids);
    rt_encoding_free(&e);
}

static void render(struct fixture *f, const struct rt_message *m, size_t n, const char *text, const char *targets)
{
    struct rt_err err = {0};
    assert_ok(rt_template_render(f->tmpl, m, n, "test", &f->r, &err));
    check_text(f, text, targets);
    check_whole(f);
}

static void prompt(struct fixture *f, const struct rt_message *m, size_t n, enum rt_thinking thinking, const char *text)
{
    struct rt_err err = {0};
    assert_ok(rt_template_prompt(f->tmpl, m, n, thinking, "test", &f->r, &err));
    check_text(f, text, "");
    check_whole(f);
}

static void complete(struct fixture *f, const char *completion, const char *text, const char *targets)
{
    static const struct rt_message m = M("user", "Q");
    struct rt_err err = {0};
    assert_ok(rt_template_completion(f->tmpl, &m, 1, completion, strlen(completion), "test", &f->r, &err));
    check_text(f, text, targets);
}

#define BOS "<｜begin▁of▁sentence｜>"
#define EOS "<｜end▁of▁sentence｜>"
#define USER "<｜User｜>"
#define ASSISTANT "<｜Assistant｜>"

static void deepseek_r1(void **state)
{
    (void)state;
    struct fixture f;
    open_kind(&f, "deepseek", NULL);
    assert_string_equal(rt_template_name(f.tmpl), "deepseek_r1");
    assert_string_equal(rt_template_forced(f.tmpl, RT_THINKING_AUTO), "<think>\n");
    const struct rt_message m[] = {M("system", "S"), M("user", "Q"), M("assistant", "<think>\nold\n</think>\n\nA"), M("system", "T"),
                                   M("user", "R"), M("assistant", "<think>\nnew\n</think>\n\nB")};
    /* earlier thoughts are cut, the last turn is whole, and what generation forces is no target */
    render(&f, m, COUNT(m), BOS "S\n\nT" USER "Q" ASSISTANT "\n\nA" EOS USER "R" ASSISTANT "<think>\nnew\n</think>\n\nB" EOS,
           "new\n</think>\n\nB" EOS);
    prompt(&f, m, 5, RT_THINKING_AUTO, BOS "S\n\nT" USER "Q" ASSISTANT "\n\nA" EOS USER "R" ASSISTANT "<think>\n");
    const struct rt_message sampled[] = {M("user", "Q"), M("assistant", "hm\n</think>\n\nB")};
    render(&f, sampled, 2, BOS USER "Q" ASSISTANT "<think>\nhm\n</think>\n\nB" EOS, "hm\n</think>\n\nB" EOS);
    const struct rt_message plain[] = {M("user", "Q"), M("assistant", "B")};
    render(&f, plain, 2, BOS USER "Q" ASSISTANT "B" EOS, "B" EOS);
    struct rt_message apart[] = {M("user", "Q"), M("assistant", "\nB")};
    apart[1].reasoning = "\nhm\n";
    apart[1].reasoning_len = 4;
    render(&f, apart, 2, BOS USER "Q" ASSISTANT "<think>\nhm\n</think>\n\nB" EOS, "hm\n</think>\n\nB" EOS);
    shut(&f);
}

static void completion_follows_prompt(void **state)
{
    (void)state;
    static const struct rt_message m = M("user", "Q");
    static const char *const same[] = {"hm\n</think>\n\nB", "<think>\nhm\n</think>\n\nB", "<think>hm\n</think>\n\nB",
                                       "<think>\nhm\n</think>\n\nB" EOS};
    struct rt_err err = {0};
    struct fixture f;
    struct rt_rendered p = {0};
    struct rt_encoding sampled = {0};
    open_kind(&f, "deepseek", NULL);
    for (size_t i = 0; i < COUNT(same); i++)
        complete(&f, same[i], BOS USER "Q" ASSISTANT "<think>\nhm\n</think>\n\nB" EOS, "hm\n</think>\n\nB" EOS);
    /* the ids are those of the prompt, then those that a sampler would have given, though the text at once would merge the
     * newlines on both sides of the seam */
    complete(&f, "<think>\n\n</think>\n\nB", BOS USER "Q" ASSISTANT "<think>\n\n</think>\n\nB" EOS, "\n</think>\n\nB" EOS);
    assert_ok(rt_template_prompt(f.tmpl, &m, 1, RT_THINKING_AUTO, "test", &p, &err));
    assert_ok(rt_tokenizer_encode(f.tok, "\n</think>\n\nB", 12, &sampled, &err));
    assert_int_equal(f.r.enc.n, p.enc.n + sampled.n + 1);
    assert_memory_equal(f.r.enc.ids, p.enc.ids, p.enc.n * sizeof *p.enc.ids);
    assert_memory_equal(f.r.enc.ids + p.enc.n, sampled.ids, sampled.n * sizeof *sampled.ids);
    assert_int_equal(f.r.enc.ids[f.r.enc.n - 1], rt_template_end_id(f.tmpl));
    assert_int_equal(f.r.target_start, p.enc.n);
    complete(&f, "", BOS USER "Q" ASSISTANT "<think>\n" EOS, EOS);
    rt_rendered_free(&p);
    rt_encoding_free(&sampled);
    shut(&f);
}

static void deepseek_v3(void **state)
{
    (void)state;
    struct fixture f;
    open_kind(&f, "deepseek", "deepseek_v3");
    const struct rt_message m[] = {M("user", "Q"), M("assistant", "<think>x</think>A"), M("user", "R"), M("assistant", "B")};
    render(&f, m, 4, BOS USER "Q" ASSISTANT "<think>x</think>A" EOS USER "R" ASSISTANT "B" EOS, "B" EOS);
    prompt(&f, m, 3, RT_THINKING_ON, BOS USER "Q" ASSISTANT "<think>x</think>A" EOS USER "R" ASSISTANT);
    complete(&f, "<think>\nhm</think>B", BOS USER "Q" ASSISTANT "<think>\nhm</think>B" EOS, "<think>\nhm</think>B" EOS);
    shut(&f);
}

static void deepseek_v3_1(void **state)
{
    (void)state;
    struct fixture f;
    open_kind(&f, "deepseek", "deepseek_v3_1");
    struct rt_message m[] = {M("user", "Q"), M("assistant", "<think>x</think>A"), M("user", "R"), M("assistant", "B")};
    render(&f, m, 4, BOS USER "Q" ASSISTANT "</think>A" EOS USER "R" ASSISTANT "</think>B" EOS, "B" EOS);
    render(&f, m, 2, BOS USER "Q" ASSISTANT "<think>x</think>A" EOS, "x</think>A" EOS);
    m[3].reasoning = "y";
    m[3].reasoning_len = 1;
    render(&f, m + 2, 2, BOS USER "R" ASSISTANT "<think>y</think>B" EOS, "y</think>B" EOS);
    prompt(&f, m, 3, RT_THINKING_AUTO, BOS USER "Q" ASSISTANT "</think>A" EOS USER "R" ASSISTANT "</think>");
    prompt(&f, m, 1, RT_THINKING_ON, BOS USER "Q" ASSISTANT "<think>");
    complete(&f, "B", BOS USER "Q" ASSISTANT "</think>B" EOS, "B" EOS);
    complete(&f, "</think>B", BOS USER "Q" ASSISTANT "</think>B" EOS, "B" EOS);
    complete(&f, "y</think>B", BOS USER "Q" ASSISTANT "<think>y</think>B" EOS, "y</think>B" EOS);
    complete(&f, "<think>y</think>B", BOS USER "Q" ASSISTANT "<think>y</think>B" EOS, "y</think>B" EOS);
    shut(&f);
}

#define TURN(r, c) "<|im_start|>" r "\n" c "<|im_end|>\n"
#define OPEN "<|im_start|>assistant\n"

static void qwen3(void **state)
{
    (void)state;
    struct fixture f;
    open_kind(&f, "qwen", NULL);
    assert_string_equal(rt_template_name(f.tmpl), "qwen3");
    struct rt_message m[] = {M("user", "Q"), M("assistant", "<think>\nx\n</think>\n\nA"), M("user", "R"),
                             M("assistant", "<think>\ny\n</think>\n\nB")};
    render(&f, m, 4, TURN("user", "Q") TURN("assistant", "A") TURN("user", "R") TURN("assistant", "<think>\ny\n</think>\n\nB"),
           "<think>\ny\n</think>\n\nB<|im_end|>");
    /* an empty thought is the template's doing */
    const struct rt_message plain[] = {M("user", "Q"), M("assistant", "B")};
    render(&f, plain, 2, TURN("user", "Q") TURN("assistant", "<think>\n\n</think>\n\nB"), "B<|im_end|>");
    prompt(&f, m, 1, RT_THINKING_AUTO, TURN("user", "Q") OPEN);
    prompt(&f, m, 1, RT_THINKING_OFF, TURN("user", "Q") OPEN "<think>\n\n</think>\n\n");
    complete(&f, "<think>\nz</think>B", TURN("user", "Q") OPEN "<think>\nz</think>B<|im_end|>", "<think>\nz</think>B<|im_end|>");
    complete(&f, "<think>\n\n</think>\n\nB", TURN("user", "Q") OPEN "<think>\n\n</think>\n\nB<|im_end|>", "B<|im_end|>");
    complete(&f, "B", TURN("user", "Q") OPEN "B<|im_end|>", "B<|im_end|>");
    m[1].loss = 1;
    m[3].loss = 0;
    render(&f, m, 4, TURN("user", "Q") TURN("assistant", "A") TURN("user", "R") TURN("assistant", "<think>\ny\n</think>\n\nB"), "A<|im_end|>");
    shut(&f);
}

static void chatml(void **state)
{
    (void)state;
    struct fixture f;
    const struct rt_message m[] = {M("user", "Q"), M("assistant", "\nA")};
    const struct rt_message with[] = {M("system", ""), M("user", "Q"), M("assistant", "A")};
    open_kind(&f, "smollm2", NULL);
    assert_string_equal(rt_template_name(f.tmpl), "chatml");
    /* the template's own system prompt, out of its literal */
    render(&f, m, 2, TURN("system", "Be brief; it's \\good.") TURN("user", "Q") TURN("assistant", "\nA"), "\nA<|im_end|>");
    render(&f, with, 3, TURN("system", "") TURN("user", "Q") TURN("assistant", "A"), "A<|im_end|>");
    shut(&f);
    open_kind(&f, "smollm2", "qwen2_5");
    prompt(&f, m, 1, RT_THINKING_AUTO,
           TURN("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.") TURN("user", "Q") OPEN);
    shut(&f);
    open_kind(&f, "qwen", "chatml");
    prompt(&f, m, 1, RT_THINKING_AUTO, TURN("user", "Q") OPEN);
    /* here "\n\n" is one token, half of it the header's: no target */
    render(&f, m, 2, TURN("user", "Q") TURN("assistant", "\nA"), "A<|im_end|>");
    shut(&f);
}

#define HEAD(r) "<|start_header_id|>" r "<|end_header_id|>\n\n"

static void llama3(void **state)
{
    (void)state;
    struct fixture f;
    const struct rt_message m[] = {M("system", " S "), M("user", "\xc2\xa0Q\n"), M("assistant", " A ")};
    const char *dates = "<|begin_of_text|>" HEAD("system") "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
    char text[512];
    open_kind(&f, "llama3", NULL);
    assert_string_equal(rt_template_name(f.tmpl), "llama3");
    snprintf(text, sizeof text, "%s%s", dates, "S<|eot_id|>" HEAD("user") "Q<|eot_id|>" HEAD("assistant") "A<|eot_id|>");
    render(&f, m, 3, text, "A<|eot_id|>");
    snprintf(text, sizeof text, "%s%s", dates, "<|eot_id|>" HEAD("user") "Q<|eot_id|>" HEAD("assistant"));
    prompt(&f, m + 1, 1, RT_THINKING_AUTO, text);
    shut(&f);
    open_kind(&f, "llama3", "llama3");
    render(&f, m, 3, "<|begin_of_text|>" HEAD("system") "S<|eot_id|>" HEAD("user") "Q<|eot_id|>" HEAD("assistant") "A<|eot_id|>", "A<|eot_id|>");
    shut(&f);
    open_kind(&f, "llama3", "none");
    complete(&f, "A", "<|begin_of_text|>QA<|eot_id|>", "A<|eot_id|>");
    shut(&f);
}

static void recognise(const char *dir, const char *text, const char *family)
{
    struct rt_err err = {0};
    struct rt_tokenizer *tok;
    struct rt_template *t = NULL;
    assert_ok(rt_tokenizer_load(test_data(dir), &tok, &err));
    const enum rt_status st = rt_template_from_text(text, strlen(text), "T", tok, &t, &err);
    if (family == NULL) {
        if (st != RT_UNSUPPORTED || strstr(err.msg, "--template") == NULL)
            fail_msg("not refused: '%s' (%s)", text, err.msg);
    } else {
        if (st != RT_OK || strcmp(rt_template_name(t), family) != 0)
            fail_msg("'%s': %s %s", text, t ? rt_template_name(t) : "", err.msg);
        assert_int_equal(strlen(rt_template_sha256(t)), 64);
    }
    rt_template_free(t);
    rt_tokenizer_free(tok);
}

static void recognition(void **state)
{
    (void)state;
#define CHATML "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'}}{{ '<|im_start|>assistant\\n' }}"
#define DEEPSEEK "{{bos_token}}{{'" USER "' + m}}{{'" ASSISTANT "' + c + '" EOS "'}}"
    recognise(DATA "smollm2", CHATML, "chatml");
    recognise(DATA "deepseek", DEEPSEEK, "deepseek_v3");
    recognise(DATA "deepseek", DEEPSEEK "{% set c = c.split('</think>')[-1] %}", "deepseek_r1");
    recognise(DATA "deepseek", DEEPSEEK "{% if ns.is_last_user %}{% set c = c.split('</think>', 1)[1] %}", "deepseek_v3_1");
    /* other dialects, a thought that nobody knows, no template at all */
    recognise(DATA "smollm2", CHATML "{{ m | trim }}", NULL);
    recognise(DATA "smollm2", CHATML "{{ '<think>' }}", NULL);
    recognise(DATA "smollm2", CHATML "{{ '<|im_start|>system\\nA' + b + '<|im_end|>' }}", NULL);
    recognise(DATA "deepseek", DEEPSEEK "{{ '<think>' }}", NULL);
    recognise(DATA "llama3", "{{ '[INST] ' + m + ' [/INST]' }}", NULL);
    recognise(DATA "llama3", "", NULL);
    /* the right template, beside a tokenizer that lacks its tokens */
    recognise(DATA "llama3", CHATML, NULL);
}

static void refusals(void **state)
{
    (void)state;
    struct fixture f;
    struct rt_err err = {0};
    struct rt_template *t;
    struct rt_rendered r = {0};
    const struct rt_message tool[] = {M("user", "Q"), M("tool", "1")}, odd = M("narrator", "x"), bad = M("user", "a\xff");
    open_kind(&f, "qwen", NULL);
    assert_status(rt_template_render(f.tmpl, tool, 2, "F:1", &r, &err), UNSUPPORTED);
    assert_status(rt_template_render(f.tmpl, &odd, 1, "F:1", &r, &err), FORMAT);
    assert_status(rt_template_render(f.tmpl, NULL, 0, "F:1", &r, &err), FORMAT);
    assert_int_equal(rt_template_prompt(f.tmpl, &bad, 1, RT_THINKING_AUTO, "F:1", &r, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "F:1"));
    rt_err_clear(&err);
    assert_status(rt_template_load("x", "mistral", f.tok, &t, &err), USAGE);
    assert_status(rt_template_load("x", "llama3", f.tok, &t, &err), UNSUPPORTED);
    rt_rendered_free(&r);
    shut(&f);
}

/* chat_template.jinja comes before tokenizer_config.json, and a list's "default" is taken. */
static void sources(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tokenizer *tok;
    struct rt_template *t;
    const char *list = "{\"chat_template\":[{\"name\":\"tool_use\",\"template\":\"x\"},{\"name\":\"default\",\"template\":"
                       "\"{{'<|im_start|>' + message['role']}}<|im_end|><|im_start|>assistant\"}]}";
    char dir[512], path[600];
    snprintf(dir, sizeof dir, "%s", test_tmp("model"));
    assert_ok(rt_mkdirs(dir, &err));
    assert_ok(rt_tokenizer_load(test_data(DATA "smollm2"), &tok, &err));
    assert_ok(rt_template_load(dir, NULL, tok, &t, &err));
    assert_null(t);
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    assert_ok(rt_publish_bytes(path, list, strlen(list), &err));
    assert_ok(rt_template_load(dir, NULL, tok, &t, &err));
    assert_string_equal(rt_template_name(t), "chatml");
    rt_template_free(t);
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    assert_ok(rt_publish_bytes(path, "unheard of", 10, &err));
    assert_status(rt_template_load(dir, NULL, tok, &t, &err), UNSUPPORTED);
    rt_tokenizer_free(tok);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(deepseek_r1), cmocka_unit_test(completion_follows_prompt), cmocka_unit_test(deepseek_v3), cmocka_unit_test(deepseek_v3_1),
    cmocka_unit_test(qwen3), cmocka_unit_test(chatml), cmocka_unit_test(llama3), cmocka_unit_test(recognition), cmocka_unit_test(refusals),
    cmocka_unit_test(sources),
};
RT_SUITE(template, tests)
