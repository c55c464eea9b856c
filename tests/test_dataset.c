/* Input lines: every form, its ids and targets, limits, and lines that are refused with file and line. */
#include "tests/suite.h"

#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "formats/dataset.h"

#define DATA "tests/data/tokenizers/"

struct fixture {
    struct rt_tokenizer *tok;
    struct rt_template *tmpl;
    struct rt_dataset *d;
    struct rt_dataset_options opt;
};

static void open_kind(struct fixture *f, const char *kind)
{
    struct rt_err err = {0};
    char dir[256];
    memset(f, 0, sizeof *f);
    snprintf(dir, sizeof dir, DATA "%s", kind);
    assert_ok(rt_tokenizer_load(test_data(dir), &f->tok, &err));
    assert_ok(rt_template_load(test_data(dir), NULL, f->tok, &f->tmpl, &err));
    f->opt = (struct rt_dataset_options){.tok = f->tok, .tmpl = f->tmpl};
}

static void shut(struct fixture *f)
{
    rt_dataset_close(f->d);
    rt_template_free(f->tmpl);
    rt_tokenizer_free(f->tok);
}

static void open_text(struct fixture *f, const char *lines)
{
    struct rt_err err = {0};
    const char *path = test_tmp("lines.jsonl");
    rt_dataset_close(f->d);
    f->d = NULL;
    assert_ok(rt_publish_bytes(path, lines, strlen(lines), &err));
    assert_ok(rt_dataset_open(path, &f->opt, &f->d, &err));
}

static void check_bytes(struct fixture *f, const uint32_t *ids, int64_t n, const char *text)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    assert_ok(rt_tokenizer_decode(f->tok, ids, (size_t)n, false, &b, &err));
    assert_ok(rt_buf_puts(&b, "", &err));
    assert_string_equal(b.data, text);
    rt_buf_free(&b);
}

/* The next sample's text and the text from its first target on. */
static struct rt_sample check_next(struct fixture *f, const char *text, const char *from)
{
    struct rt_err err = {0};
    struct rt_sample s;
    bool end;
    assert_ok(rt_dataset_next(f->d, &s, &end, &err));
    assert_false(end);
    check_bytes(f, s.ids, s.n, text);
    check_bytes(f, s.ids + s.completion_start, s.n - s.completion_start, from);
    return s;
}

static void check_end(struct fixture *f)
{
    struct rt_err err = {0};
    struct rt_sample s;
    bool end = false;
    assert_ok(rt_dataset_next(f->d, &s, &end, &err));
    assert_true(end);
}

#define BOS "<｜begin▁of▁sentence｜>"
#define EOS "<｜end▁of▁sentence｜>"
#define ASK(q) BOS "<｜User｜>" q "<｜Assistant｜>"

static void forms(void **state)
{
    (void)state;
    struct fixture f;
    struct rt_sample s;
    open_kind(&f, "deepseek");
    open_text(&f, "{\"prompt\":\"Q\",\"completion\":\"hm</think>A\",\"answer\":\"4\",\"id\":7}\n"
                  "  \r\n"
                  "{\"messages\":[{\"role\":\"user\",\"content\":\"R\"},{\"role\":\"assistant\",\"content\":\"B\"}],\"answer\":12.5}\r\n"
                  "{\"text\":\"some text\"}\n"
                  "{\"input_ids\":[5,6,7,8],\"loss_mask\":[0,0,true,1]}\n"
                  "{\"input_ids\":[5,6]}"); /* the last line needs no newline */
    s = check_next(&f, ASK("Q") "<think>\nhm</think>A" EOS, "hm</think>A" EOS);
    assert_string_equal(s.prompt, "Q");
    assert_string_equal(s.completion, "hm</think>A");
    assert_string_equal(s.answer, "4");
    assert_true(s.has_completion);
    assert_int_equal(s.line, 1);
    assert_non_null(rt_json_get(s.json, "id"));
    s = check_next(&f, ASK("R") "B" EOS, "B" EOS);
    assert_string_equal(s.prompt, "R");
    assert_string_equal(s.completion, "B");
    assert_string_equal(s.answer, "12.5");
    assert_int_equal(s.line, 3);
    s = check_next(&f, BOS "some text", BOS "some text");
    assert_false(s.has_completion);
    assert_null(s.prompt);
    assert_null(s.answer);
    assert_int_equal(s.n_targets, s.n - 1);
    struct rt_err err = {0};
    bool end;
    assert_ok(rt_dataset_next(f.d, &s, &end, &err));
    assert_int_equal(s.n, 4);
    assert_int_equal(s.ids[3], 8);
    assert_int_equal(s.n_targets, 2);
    assert_int_equal(s.completion_start, 2);
    assert_true(s.has_completion);
    assert_ok(rt_dataset_next(f.d, &s, &end, &err));
    assert_int_equal(s.n_targets, 1);
    assert_false(s.has_completion);
    assert_int_equal(s.line, 6);
    check_end(&f);
    check_end(&f);
    const struct rt_dataset_counts c = rt_dataset_counts(f.d);
    assert_int_equal(c.lines, 5);
    assert_int_equal(c.samples, 5);
    assert_ok(rt_dataset_rewind(f.d, &err));
    check_next(&f, ASK("Q") "<think>\nhm</think>A" EOS, "hm</think>A" EOS);
    assert_int_equal(rt_dataset_counts(f.d).lines, 1);
    shut(&f);
}

static void bos_rules(void **state)
{
    (void)state;
    struct fixture f;
    open_kind(&f, "deepseek");
    open_text(&f, "{\"text\":\"" BOS "x\"}\n{\"text\":\"x\"}\n");
    check_next(&f, BOS "x", BOS "x"); /* never twice */
    check_next(&f, BOS "x", BOS "x");
    shut(&f);
    open_kind(&f, "qwen");
    open_text(&f, "{\"text\":\"x y\"}\n");
    check_next(&f, "x y", "x y");
    shut(&f);
}

static void prompts(void **state)
{
    (void)state;
    struct fixture f;
    struct rt_err err = {0};
    struct rt_prompt p;
    bool end;
    open_kind(&f, "deepseek");
    open_text(&f, "{\"prompt\":\"Q\",\"answer\":\"4\"}\n{\"prompt\":\"Q\",\"completion\":\"A\"}\n"
                  "{\"messages\":[{\"role\":\"user\",\"content\":\"R\"}]}\n"
                  "{\"messages\":[{\"role\":\"user\",\"content\":\"R\"},{\"role\":\"assistant\",\"content\":\"B\"}]}\n"
                  "{\"text\":\"Once\"}\n{\"input_ids\":[9]}\n");
    const char *expected[] = {ASK("Q") "<think>\n", ASK("Q") "<think>\n", ASK("R") "<think>\n", ASK("R") "<think>\n", BOS "Once"};
    for (size_t i = 0; i < 5; i++) {
        assert_ok(rt_dataset_next_prompt(f.d, &p, &end, &err));
        check_bytes(&f, p.ids, p.n, expected[i]);
        assert_string_equal(p.text, i < 2 ? "Q" : i < 4 ? "R" : "Once");
        assert_int_equal(p.line, i + 1);
    }
    assert_ok(rt_dataset_next_prompt(f.d, &p, &end, &err));
    assert_int_equal(p.ids[0], 9);
    assert_null(p.text);
    assert_ok(rt_dataset_next_prompt(f.d, &p, &end, &err));
    assert_true(end);
    shut(&f);
}

static void overlong(void **state)
{
    (void)state;
    struct fixture f;
    struct rt_err err = {0};
    struct rt_sample s;
    bool end;
    const char *lines = "{\"input_ids\":[0,1,2,3,4,5,6,7,8],\"loss_mask\":[0,0,0,0,0,0,1,1,1]}\n{\"input_ids\":[1,2,3]}\n";
    open_kind(&f, "qwen");
    f.opt.max_length = 4;
    open_text(&f, lines);
    assert_ok(rt_dataset_next(f.d, &s, &end, &err));
    assert_int_equal(s.line, 2);
    check_end(&f);
    assert_int_equal(rt_dataset_counts(f.d).dropped, 1);

    f.opt.overlong = RT_OVERLONG_SPLIT;
    open_text(&f, lines);
    /* of the parts 0-3, 4-7 and 8, the first has no target and the last nothing that predicts its only token */
    assert_ok(rt_dataset_next(f.d, &s, &end, &err));
    assert_int_equal(s.part, 1);
    assert_int_equal(s.n_parts, 3);
    assert_int_equal(s.n, 4);
    assert_int_equal(s.ids[0], 4);
    assert_int_equal(s.n_targets, 2);
    assert_int_equal(s.completion_start, 2);
    assert_ok(rt_dataset_next(f.d, &s, &end, &err));
    assert_int_equal(s.line, 2);
    assert_int_equal(s.n_parts, 1);
    check_end(&f);
    const struct rt_dataset_counts c = rt_dataset_counts(f.d);
    assert_int_equal(c.split, 1);
    assert_int_equal(c.untargeted, 2);
    assert_int_equal(c.samples, 2);
    assert_int_equal(c.tokens, 7);
    assert_int_equal(c.targets, 4);
    shut(&f);
}

static void flags(void **state)
{
    (void)state;
    struct fixture f;
    struct rt_sample s;
    open_kind(&f, "qwen");
    open_text(&f, "{\"messages\":[{\"role\":\"user\",\"content\":\"Q\"},{\"role\":\"assistant\",\"content\":\"A\",\"loss\":false}]}\n"
                  "{\"text\":\"e\\u0301!\"}\n{\"text\":\"\\u00e9!\"}\n{\"text\":\"\"}\n");
    s = check_next(&f, "\xc3\xa9!", "\xc3\xa9!");
    assert_true(s.not_nfc); /* the ids are those of other bytes */
    s = check_next(&f, "\xc3\xa9!", "\xc3\xa9!");
    assert_false(s.not_nfc);
    check_end(&f);
    assert_int_equal(rt_dataset_counts(f.d).untargeted, 2);
    assert_int_equal(rt_dataset_counts(f.d).not_nfc, 1);
    shut(&f);
}

/* Where a completion was cut off its end is there, and no target. */
static void cut_completions(void **state)
{
    (void)state;
    static const char *const lines[] = {
        "{\"prompt\":\"a\",\"completion\":\"b\"%s}\n",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]%s}\n",
    };
    static const char *const more[] = {"", ",\"finish_reason\":\"stop\"", ",\"finish_reason\":\"length\"", ",\"sampling\":{\"finish_reason\":\"length\"}"};
    struct fixture f;
    open_kind(&f, "deepseek");
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        int64_t n = 0, targets = 0;
        for (size_t k = 0; k < sizeof more / sizeof *more; k++) {
            struct rt_err err = {0};
            struct rt_sample s;
            bool end;
            char line[300];
            snprintf(line, sizeof line, lines[i], more[k]);
            open_text(&f, line);
            assert_ok(rt_dataset_next(f.d, &s, &end, &err));
            n = k == 0 ? s.n : n;
            targets = k == 0 ? s.n_targets : targets;
            assert_int_equal(s.n, n);
            assert_int_equal(s.n_targets, targets - (k >= 2));
            assert_int_equal(s.loss_mask[s.n - 1], k < 2);
        }
    }
    shut(&f);
}

static void bad_lines(void **state)
{
    (void)state;
    static const struct {
        const char *line;
        enum rt_status status;
    } bad[] = {
        {"not json", RT_FORMAT},
        {"[1]", RT_FORMAT},
        {"{}", RT_FORMAT},
        {"{\"prompt\":\"x\"", RT_FORMAT},
        {"{\"prompt\":\"x\"}", RT_FORMAT},
        {"{\"prompt\":1,\"completion\":\"x\"}", RT_FORMAT},
        {"{\"prompt\":\"x\",\"completion\":null}", RT_FORMAT},
        {"{\"text\":[\"x\"]}", RT_FORMAT},
        {"{\"text\":\"\xff\"}", RT_FORMAT},
        {"{\"messages\":[]}", RT_FORMAT},
        {"{\"messages\":\"x\"}", RT_FORMAT},
        {"{\"messages\":[3]}", RT_FORMAT},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}", RT_FORMAT},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"loss\":3}]}", RT_FORMAT},
        {"{\"messages\":[{\"content\":\"x\"}]}", RT_FORMAT},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":null}]}", RT_FORMAT},
        {"{\"messages\":[{\"role\":\"x\",\"content\":\"x\"},{\"role\":\"assistant\",\"content\":\"x\"}]}", RT_FORMAT},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"tool_calls\":[{}]}]}", RT_UNSUPPORTED},
        {"{\"tools\":[{}],\"messages\":[{\"role\":\"assistant\",\"content\":\"x\"}]}", RT_UNSUPPORTED},
        {"{\"input_ids\":[]}", RT_FORMAT},
        {"{\"input_ids\":[1,-1]}", RT_FORMAT},
        {"{\"input_ids\":[1,\"2\"]}", RT_FORMAT},
        {"{\"input_ids\":[1,1.5]}", RT_FORMAT},
        {"{\"input_ids\":[1,4294967296]}", RT_FORMAT},
        {"{\"input_ids\":[1,2],\"loss_mask\":[1]}", RT_FORMAT},
        {"{\"input_ids\":[1,2],\"loss_mask\":[1,2]}", RT_FORMAT},
    };
    struct fixture f;
    struct rt_err err = {0};
    struct rt_sample s;
    bool end;
    char text[512];
    open_kind(&f, "qwen");
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        snprintf(text, sizeof text, "{\"text\":\"fine\"}\n\n%s\n", bad[i].line);
        open_text(&f, text);
        assert_ok(rt_dataset_next(f.d, &s, &end, &err));
        const enum rt_status st = rt_dataset_next(f.d, &s, &end, &err);
        if (st != bad[i].status || strstr(err.msg, "lines.jsonl:3") == NULL)
            fail_msg("'%s': status %d: %s", bad[i].line, st, err.msg);
        rt_err_clear(&err);
    }
    snprintf(text, sizeof text, "{\"input_ids\":[1,%u]}", rt_tokenizer_n_ids(f.tok));
    open_text(&f, text);
    assert_status(rt_dataset_next(f.d, &s, &end, &err), FORMAT);
    open_text(&f, " \n\n");
    assert_status(rt_dataset_next(f.d, &s, &end, &err), FORMAT);
    shut(&f);
}

static void bad_files(void **state)
{
    (void)state;
    struct fixture f;
    struct rt_err err = {0};
    struct rt_sample s;
    bool end;
    const char *path = test_tmp("empty.jsonl");
    open_kind(&f, "qwen");
    assert_ok(rt_publish_bytes(path, "", 0, &err));
    assert_status(rt_dataset_open(path, &f.opt, &f.d, &err), FORMAT);
    assert_status(rt_dataset_open(test_tmp("absent.jsonl"), &f.opt, &f.d, &err), IO);
    /* a line over the limit is refused before it is all read */
    char *big;
    assert_ok(rt_alloc(RT_LINE_MAX + 100, 1, "line", &big, &err));
    memset(big, ' ', RT_LINE_MAX + 100);
    assert_ok(rt_publish_bytes(path, big, RT_LINE_MAX + 100, &err));
    rt_free(big);
    assert_ok(rt_dataset_open(path, &f.opt, &f.d, &err));
    assert_int_equal(rt_dataset_next(f.d, &s, &end, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "empty.jsonl:1"));
    rt_err_clear(&err);
    rt_dataset_close(f.d);
    f.d = NULL;
    /* a directory: accepted.jsonl comes first */
    char dir[512], file[600];
    snprintf(dir, sizeof dir, "%s", test_tmp("traces"));
    assert_ok(rt_mkdirs(dir, &err));
    assert_status(rt_dataset_open(dir, &f.opt, &f.d, &err), FORMAT);
    snprintf(file, sizeof file, "%s/traces.jsonl", dir);
    assert_ok(rt_publish_bytes(file, "{\"text\":\"t t\"}\n", 15, &err));
    assert_ok(rt_dataset_open(dir, &f.opt, &f.d, &err));
    check_next(&f, "t t", "t t");
    rt_dataset_close(f.d);
    snprintf(file, sizeof file, "%s/accepted.jsonl", dir);
    assert_ok(rt_publish_bytes(file, "{\"text\":\"a a\"}\n", 15, &err));
    assert_ok(rt_dataset_open(dir, &f.opt, &f.d, &err));
    assert_string_equal(rt_dataset_path(f.d), file);
    check_next(&f, "a a", "a a");
    shut(&f);
}

static void without_tokenizer(void **state)
{
    (void)state;
    struct fixture f = {0};
    struct rt_err err = {0};
    struct rt_sample s;
    bool end;
    f.opt.n_ids = 10;
    open_text(&f, "{\"input_ids\":[1,9]}\n{\"text\":\"x\"}\n");
    assert_ok(rt_dataset_next(f.d, &s, &end, &err));
    assert_int_equal(s.ids[1], 9);
    assert_status(rt_dataset_next(f.d, &s, &end, &err), UNSUPPORTED);
    open_text(&f, "{\"input_ids\":[1,10]}\n");
    assert_status(rt_dataset_next(f.d, &s, &end, &err), FORMAT);
    rt_dataset_close(f.d);
    f.opt.n_ids = 0;
    assert_status(rt_dataset_open("x", &f.opt, &f.d, &err), USAGE);
    f.d = NULL;
}

static void pass_through(void **state)
{
    (void)state;
    struct fixture f;
    struct rt_err err = {0};
    struct rt_prompt p;
    struct rt_json *out;
    struct rt_buf text = {0};
    bool end;
    open_kind(&f, "qwen");
    open_text(&f, "{\"id\":1,\"prompt\":\"Q\",\"answer\":\"4\",\"meta\":{\"a\":[1,2]},\"seed\":3}\n");
    assert_ok(rt_dataset_next_prompt(f.d, &p, &end, &err));
    assert_ok(rt_json_new_object(&out, &err));
    assert_ok(rt_json_set_int(out, "seed", 9, &err));
    assert_ok(rt_dataset_copy_extra(p.json, out, &err));
    assert_ok(rt_json_dump(out, 0, &text, &err));
    assert_int_equal(text.len, strlen("{\"seed\":9,\"id\":1,\"meta\":{\"a\":[1,2]}}"));
    assert_memory_equal(text.data, "{\"seed\":9,\"id\":1,\"meta\":{\"a\":[1,2]}}", text.len);
    rt_buf_free(&text);
    rt_json_free(out);
    shut(&f);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(forms), cmocka_unit_test(bos_rules), cmocka_unit_test(prompts), cmocka_unit_test(overlong), cmocka_unit_test(flags),
    cmocka_unit_test(cut_completions),
    cmocka_unit_test(bad_lines), cmocka_unit_test(bad_files), cmocka_unit_test(without_tokenizer), cmocka_unit_test(pass_through),
};
RT_SUITE(dataset, tests)
