/* The filter: each reason on lines of several forms, order of reasons, duplicates, contamination, scripts, loops, publication. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "distill/filter.h"
#include "distill/filter_text.h"
#include "distill/lines.h"
#include "tests/suite.h"

#define T "<think>\\nsome thought\\n</think>\\n\\n"

static const char *write_tmp(const char *name, const char *text, size_t n)
{
    struct rt_err err = {0};
    const char *path = test_tmp(name);
    assert_ok(rt_publish_bytes(path, text, n, &err));
    return path;
}

static struct rt_filter_options options(const char *data, const char *out)
{
    struct rt_filter_options o = {.data = data, .out = out, .verify = RT_VERIFY_BOXED};
    struct rt_err err = {0};
    assert_ok(rt_filter_parse_drop(NULL, &o.drop, &err));
    return o;
}

/* The reason that a line gets; the line must come out in the file of its kind, with everything it had. */
static const char *reason_of(const char *line, const struct rt_filter_options *base)
{
    struct rt_err err = {0};
    struct rt_filter_options o = *base;
    struct rt_filter_counts c;
    struct rt_lines in = {0};
    struct rt_json *v = NULL;
    char path[4096];
    bool end;
    const char *found = "?";
    o.data = write_tmp("one.jsonl", line, strlen(line));
    o.out = test_tmp("filter-one");
    assert_ok(rt_filter_run(&o, &c, &err));
    assert_int_equal(c.lines, 1);
    for (int r = 0; r <= RT_REJECT_COUNT; r++)
        if (c.by_reason[r] == 1)
            found = rt_filter_reason_name((enum rt_filter_reason)r);
    snprintf(path, sizeof path, "%s/%s", o.out, strcmp(found, "accepted") == 0 ? "accepted.jsonl" : "rejected.jsonl");
    assert_ok(rt_lines_open(path, &in, &err));
    assert_ok(rt_lines_next_json(&in, &v, &end, &err));
    assert_false(end);
    const char *said = rt_json_as_string(rt_json_get(rt_json_get(v, "filter"), "reason"), NULL);
    if (strcmp(found, "accepted") == 0)
        assert_null(said);
    else
        assert_string_equal(said, found);
    rt_json_free(v);
    rt_lines_close(&in);
    return found;
}

static void each_reason(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"accepted", "{\"prompt\":\"p\",\"completion\":\"" T "\\\\boxed{5}\",\"answer\":\"5\",\"finish_reason\":\"stop\"}"},
        {"accepted", "{\"prompt\":\"p\",\"completion\":\"" T "\\\\boxed{5}\",\"answer\":5}"},
        {"accepted", "{\"prompt\":\"p\",\"completion\":\"" T "free text\"}"}, /* no answer: not verified */
        {"accepted", "{\"messages\":[{\"role\":\"user\",\"content\":\"p\"},{\"role\":\"assistant\",\"reasoning_content\":\"r\",\"content\":\"\\\\boxed{5}\"}],\"answer\":\"5\"}"},
        {"accepted", "{\"messages\":[{\"role\":\"user\",\"content\":\"p\"},{\"role\":\"assistant\",\"content\":\"" T "\\\\boxed{5}\"}],\"answer\":\"5\"}"},
        {"accepted", "{\"prompt\":\"p\",\"completion\":\"</think>\\\\boxed{5}\",\"answer\":\"5\"}"}, /* forced off by the template */
        {"unfinished", "{\"prompt\":\"p\",\"completion\":\"" T "\\\\boxed{5}\",\"answer\":\"5\",\"finish_reason\":\"length\"}"},
        {"unfinished", "{\"prompt\":\"p\",\"completion\":\"" T "\\\\boxed{5}\",\"answer\":\"5\",\"sampling\":{\"finish_reason\":\"length\"}}"},
        {"unfinished", "{\"prompt\":\"p\",\"completion\":\"<think>\\nfor ever\"}"},
        {"unfinished", "{\"prompt\":\"p\",\"completion\":\" \\n\"}"},
        {"format", "{\"prompt\":\"p\",\"completion\":\"\\\\boxed{5}\",\"answer\":\"5\"}"},
        {"format", "{\"prompt\":\"p\",\"completion\":\"x " T "\\\\boxed{5}\",\"answer\":\"5\"}"},
        {"format", "{\"prompt\":\"p\",\"completion\":\"" T T "\\\\boxed{5}\",\"answer\":\"5\"}"},
        {"format", "{\"prompt\":\"p\",\"completion\":\"thought</think>\\\\boxed{5}\",\"answer\":\"5\"}"},
        {"format", "{\"prompt\":\"p\",\"completion\":\"<think>a</think>b</think>\\\\boxed{5}\",\"answer\":\"5\"}"},
        {"format", "{\"messages\":[{\"role\":\"user\",\"content\":\"p\"},{\"role\":\"assistant\",\"reasoning_content\":\"r\",\"content\":\"<think>a</think>\\\\boxed{5}\"}]}"},
        {"wrong", "{\"prompt\":\"p\",\"completion\":\"" T "\\\\boxed{6}\",\"answer\":\"5\"}"},
        {"wrong", "{\"prompt\":\"p\",\"completion\":\"<think>\\\\boxed{5}</think>\\\\boxed{6}\",\"answer\":\"5\"}"},
        {"unparsed", "{\"prompt\":\"p\",\"completion\":\"" T "five\",\"answer\":\"5\"}"},
        {"unparsed", "{\"prompt\":\"p\",\"completion\":\"<think>\\\\boxed{5}</think>five\",\"answer\":\"5\"}"},
        {"language", "{\"prompt\":\"How many apples are there?\",\"completion\":\"<think>\\u6211\\u4eec\\u6765\\u6570\\u4e00\\u6570\\u82f9\\u679c\\u7684\\u6570\\u91cf</think> there are five apples\"}"},
    };
    const struct rt_filter_options o = options(NULL, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *r = reason_of(cases[i][1], &o);
        if (strcmp(r, cases[i][0]) != 0)
            fail_msg("%s: %s, expected %s", cases[i][1], r, cases[i][0]);
    }
}

static void lengths_count_characters(void **state)
{
    (void)state;
    struct rt_filter_options o = options(NULL, NULL);
    struct rt_err err = {0};
    static const char line[] = "{\"prompt\":\"p\",\"completion\":\"\\u00e9\\u00e9\\u00e9\\u00e9\"}"; /* four, of eight bytes */
    assert_ok(rt_filter_parse_drop("length", &o.drop, &err));
    o.min_length = 4;
    o.max_length = 4;
    assert_string_equal(reason_of(line, &o), "accepted");
    o.min_length = 5;
    o.max_length = 0;
    assert_string_equal(reason_of(line, &o), "length");
    o.min_length = 0;
    o.max_length = 3;
    assert_string_equal(reason_of(line, &o), "length");
    assert_ok(rt_filter_parse_drop("none", &o.drop, &err));
    assert_string_equal(reason_of(line, &o), "accepted");
}

static void drop_lists(void **state)
{
    (void)state;
    struct rt_err err = {0};
    unsigned drop;
    assert_ok(rt_filter_parse_drop("wrong,format", &drop, &err));
    assert_int_equal(drop, 1u << RT_REJECT_WRONG | 1u << RT_REJECT_FORMAT);
    assert_ok(rt_filter_parse_drop(RT_FILTER_NAMES, &drop, &err));
    assert_int_equal(drop, (1u << RT_REJECT_COUNT) - 1);
    assert_status(rt_filter_parse_drop("wrong,", &drop, &err), USAGE);
    assert_status(rt_filter_parse_drop("wrongs", &drop, &err), USAGE);
    /* a reason that nothing can be found for, and a bound that no reason stands for */
    static const struct {
        const char *list;
        struct rt_filter_options o;
        enum rt_status st;
    } checks[] = {
        {"all", {0}, RT_OK},
        {NULL, {.against = "f", .max_length = 5}, RT_OK},
        {"wrong", {.verify = RT_VERIFY_BOXED}, RT_OK},
        {"format", {.verify = RT_VERIFY_BOXED}, RT_OK},
        {"format,unparsed", {0}, RT_USAGE},
        {"contaminated", {0}, RT_USAGE},
        {"length", {.verify = RT_VERIFY_BOXED}, RT_USAGE},
        {"wrong", {.verify = RT_VERIFY_BOXED, .against = "f"}, RT_USAGE},
        {"none", {.min_length = 3}, RT_USAGE},
    };
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++) {
        struct rt_filter_options with = checks[i].o;
        assert_ok(rt_filter_parse_drop(checks[i].list, &with.drop, &err));
        assert_int_equal(rt_filter_check(&with, checks[i].list, &err), checks[i].st);
        rt_err_clear(&err);
    }
    /* what is not asked for is not a reason */
    struct rt_filter_options o = options(NULL, NULL);
    assert_ok(rt_filter_parse_drop("format,unparsed", &o.drop, &err));
    assert_string_equal(reason_of("{\"prompt\":\"p\",\"completion\":\"" T "\\\\boxed{6}\",\"answer\":\"5\",\"finish_reason\":\"length\"}", &o), "accepted");
}

static size_t repeated(const char *s, size_t n)
{
    struct rt_err err = {0};
    struct rt_buf scratch = {0};
    size_t times;
    assert_ok(rt_most_repeated(s, n, &scratch, &times, &err));
    rt_buf_free(&scratch);
    return times;
}

static void loops_are_found(void **state)
{
    (void)state;
    struct rt_buf b = {0};
    struct rt_err err = {0};
    for (int i = 0; i < 2000; i++)
        assert_ok(rt_buf_printf(&b, &err, "w%d ", i));
    assert_int_equal(repeated(b.data, b.len), 1); /* nothing comes twice */
    for (int i = 0; i < 39; i++)
        assert_ok(rt_buf_printf(&b, &err, "wait "));
    assert_int_equal(repeated(b.data, b.len), 39 - RT_LOOP_WORDS + 1);
    b.len = 0;
    for (int i = 0; i < 300; i++)
        assert_ok(rt_buf_printf(&b, &err, "p%d ", i % 37)); /* a period of 37 words */
    assert_int_equal(repeated(b.data, b.len), (300 - RT_LOOP_WORDS) / 37 + 1);
    b.len = 0;
    for (int i = 0; i < 1000; i++)
        assert_ok(rt_buf_printf(&b, &err, "abcd"));
    assert_true(repeated(b.data, b.len) >= RT_LOOP_TIMES); /* one endless word */
    b.len = 0;
    for (int i = 0; i < 400; i++)
        assert_ok(rt_buf_printf(&b, &err, "\xE6\x88\x91\xE4\xBB\xAC")); /* no spaces at all */
    assert_true(repeated(b.data, b.len) >= RT_LOOP_TIMES);
    b.len = 0;
    for (int i = 0; i < 1 << 20; i++) /* longer still: it is read once, not once a piece */
        assert_ok(rt_buf_append(&b, "x", 1, &err));
    assert_true(repeated(b.data, b.len) >= RT_LOOP_TIMES);
    assert_int_equal(repeated("", 0), 0);
    assert_int_equal(repeated("\xE6\x88\xFF\x80", 4), 0);
    rt_buf_free(&b);
}

static bool foreign(const char *prompt, const char *completion)
{
    int percent;
    return rt_foreign_script(prompt, strlen(prompt), completion, strlen(completion), &percent);
}

static void scripts_are_compared(void **state)
{
    (void)state;
#define ZH "\xE6\x88\x91\xE4\xBB\xAC\xE6\x9D\xA5\xE6\x95\xB0\xE4\xB8\x80\xE6\x95\xB0\xE8\x8B\xB9\xE6\x9E\x9C" /* 8 characters */
    assert_false(foreign("What is the sum of these?", "The sum is twelve, as each of them is four."));
    assert_true(foreign("What is the sum of these?", "The sum is " ZH ZH " twelve."));
    assert_false(foreign("What is the sum of these?", "The sum is twelve: \xE6\x88\x91, a single sign, is below a tenth of the letters."));
    assert_false(foreign(ZH ZH, ZH ZH ZH "= \\frac{1}{2} x + y"));
    assert_false(foreign(ZH ZH, ZH ZH ZH "\\mathrm\\mathbf\\operatorname\\displaystyle\\frac\\frac\\frac\\frac\\frac"));
    assert_true(foreign(ZH ZH, "The answer to this is twelve, of course, as each is four."));
    assert_true(foreign("\xD0\xA1\xD0\xBA\xD0\xBE\xD0\xBB\xD1\x8C\xD0\xBA\xD0\xBE", "The answer to this is twelve."));
    assert_false(foreign("2+2", ZH ZH ZH)); /* too little to tell */
    assert_false(foreign("What is " ZH ZH ZH " in English?", ZH ZH ZH " means this and that")); /* mixed from the start */
}

static void only_the_first_of_equal_ones(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf text = {0};
    struct rt_filter_counts c;
    /* 3000 different ones (the table grows), then each again with other case and space; other completions are others */
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < 3000; i++)
            assert_ok(rt_buf_printf(&text, &err, "{\"prompt\":\"%s %d\",\"completion\":\"%s\"}\n", round ? "Count  TO" : "count to", i / 2, i & 1 ? "one" : "two "));
    struct rt_filter_options o = options(write_tmp("dup.jsonl", text.data, text.len), test_tmp("filter-dup"));
    assert_ok(rt_filter_parse_drop("duplicate", &o.drop, &err));
    assert_ok(rt_filter_run(&o, &c, &err));
    assert_int_equal(c.by_reason[RT_REJECT_COUNT], 3000);
    assert_int_equal(c.by_reason[RT_REJECT_DUPLICATE], 3000);
    rt_buf_free(&text);
}

static void contaminated_prompts(void **state)
{
    (void)state;
    static const char against[] = "{\"prompt\":\"A machine reports noise, heat, shake, hum, smoke, stall, drip, rust and leak. Find the cause.\"}\n"
                                  "{\"question\":\"How much is 125 times 34?\"}\n{\"messages\":[{\"role\":\"user\",\"content\":\"Who wrote Faust?\"}]}\n";
    static const char *const cases[][2] = {
        {"contaminated", "So: a MACHINE reports noise heat shake hum smoke, stall; drip, rust, and leak! What now?"},
        {"accepted", "A machine reports noise, heat, shake, hum, smoke, stall, drip, dust and leak. Find the cause."},
        {"contaminated", "how much  is 125 times 34?"},
        {"contaminated", "How much is 125 times 34"},
        {"accepted", "How much is 125 times 35?"},
        {"accepted", "How much is 215 times 34?"},
        {"accepted", "How much is 12 times 534?"},
        {"contaminated", "Who wrote Faust?"},
        {"accepted", "Who wrote Hamlet?"},
        {"accepted", ""},
    };
    struct rt_err err = {0};
    struct rt_filter_options o = options(NULL, NULL);
    char path[600], line[1000];
    snprintf(path, sizeof path, "%s", write_tmp("against.jsonl", against, strlen(against)));
    o.against = path;
    assert_ok(rt_filter_parse_drop("contaminated", &o.drop, &err));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(line, sizeof line, "{\"prompt\":\"%s\",\"completion\":\"x\"}", cases[i][1]);
        const char *r = reason_of(line, &o);
        if (strcmp(r, cases[i][0]) != 0)
            fail_msg("%s: %s, expected %s", cases[i][1], r, cases[i][0]);
        snprintf(line, sizeof line, "{\"text\":\"%s \"}", cases[i][1]);
        if (cases[i][1][0] != '\0' && strcmp(reason_of(line, &o), cases[i][0]) != 0)
            fail_msg("as text: %s, expected %s", cases[i][1], cases[i][0]);
    }
}

static bool always(void *self)
{
    (void)self;
    return true;
}

static void nothing_shows_before_the_end(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_filter_counts c;
    struct rt_buf text = {0};
    char out[600], path[700];
    static const char good[] = "{\"prompt\":\"p\",\"completion\":\"x\"}\n";
    static const char *const bad[] = {"x\n", "[]\n", "{\"prompt\":\"p\"}\n", 
                                      "{\"prompt\":[],\"completion\":\"x\"}\n", "{\"messages\":[]}\n", "{\"messages\":[{\"role\":\"user\",\"content\":\"p\"}]}\n",
                                      "{\"messages\":[{\"role\":1},{\"role\":\"assistant\",\"content\":\"p\"}]}\n", "{\"messages\":[{\"role\":\"assistant\",\"content\":1}]}\n"};
    snprintf(out, sizeof out, "%s", test_tmp("filter-bad"));
    snprintf(path, sizeof path, "%s/accepted.jsonl", out);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        text.len = 0;
        assert_ok(rt_buf_printf(&text, &err, "%s%s", good, bad[i]));
        const struct rt_filter_options o = options(write_tmp("bad.jsonl", text.data, text.len), out);
        assert_int_equal(rt_filter_run(&o, &c, &err), RT_FORMAT);
        assert_non_null(strstr(err.msg, "bad.jsonl:2"));
        rt_err_clear(&err);
        assert_false(rt_path_exists(path));
    }
    struct rt_filter_options o = options(write_tmp("good.jsonl", good, strlen(good)), out);
    o.stop = always;
    assert_status(rt_filter_run(&o, &c, &err), INTERRUPTED);
    assert_false(rt_path_exists(path));
    o.stop = NULL;
    o.dry_run = true;
    assert_ok(rt_filter_run(&o, &c, &err));
    assert_int_equal(c.lines, 1);
    assert_false(rt_path_exists(path));
    o.dry_run = false;
    o.drop = 0;
    assert_ok(rt_filter_run(&o, &c, &err));
    assert_true(rt_path_exists(path));
    /* filtered again from its own directory: what is read is not what is written over */
    o.data = out;
    assert_status(rt_filter_run(&o, &c, &err), REFUSED);
    o.data = write_tmp("empty.jsonl", "\n \n", 3);
    assert_status(rt_filter_run(&o, &c, &err), FORMAT);
    rt_buf_free(&text);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(each_reason),
    cmocka_unit_test(lengths_count_characters),
    cmocka_unit_test(drop_lists),
    cmocka_unit_test(loops_are_found),
    cmocka_unit_test(scripts_are_compared),
    cmocka_unit_test(only_the_first_of_equal_ones),
    cmocka_unit_test(contaminated_prompts),
    cmocka_unit_test(nothing_shows_before_the_end),
};
RT_SUITE(filter, tests)
