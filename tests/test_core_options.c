#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/options.h"
#include "tests/suite.h"

struct values {
    int64_t steps, seed, memory;
    double lr;
    const char *out, *device;
    bool json, shuffle;
    struct rt_str_list data;
};

#define AT(member) offsetof(struct values, member)
static const struct rt_opt common[] = {
    {.name = "device", .type = RT_OPT_CHOICE, .offset = AT(device), .def = "auto", .choices = "auto|cpu|cuda|ref", .help = "backend"},
    {.name = "memory", .type = RT_OPT_BYTES, .offset = AT(memory), .def = "8G", .arg = "8G", .help = "bytes that may be used", .runtime = true},
    {.name = "seed", .type = RT_OPT_INT, .offset = AT(seed), .help = "of all random numbers"},
    {0},
};
static const struct rt_opt own[] = {
    {.name = "steps", .type = RT_OPT_INT, .offset = AT(steps), .def = "100", .min = 1, .max = 1e9, .arg = "N", .help = "optimiser steps"},
    {.name = "lr", .type = RT_OPT_FLOAT, .offset = AT(lr), .def = "1e-4", .min = 0, .max = 1, .help = "learning rate"},
    {.name = "out", .type = RT_OPT_STRING, .offset = AT(out), .arg = "DIR", .help = "where the run goes", .required = true},
    {.name = "data", .type = RT_OPT_LIST, .offset = AT(data), .arg = "DIR[:WEIGHT]", .help = "training data"},
    {.name = "json", .type = RT_OPT_FLAG, .offset = AT(json), .help = "for programs"},
    {.name = "shuffle", .type = RT_OPT_FLAG, .offset = AT(shuffle), .def = "true",
     .help = "a text that is long enough to be wrapped somewhere, since it has many words, more than one line of a hundred columns holds"},
    {0},
};
static const struct rt_opt *const tables[] = {common, own};

/* Parses a line cut at blanks, "_" standing for an empty argument. */
static enum rt_status parse(const char *line, struct values *v, struct rt_positionals *pos, bool *seen, struct rt_err *err)
{
    static char text[8][256]; /* values point into it: a ring */
    static int at;
    char *argv[32], *save = NULL, *copy = text[at++ % 8];
    int argc = 0;
    snprintf(copy, sizeof text[0], "%s", line);
    for (char *w = strtok_r(copy, " ", &save); w != NULL; w = strtok_r(NULL, " ", &save))
        argv[argc++] = strcmp(w, "_") == 0 ? w + 1 : w;
    *v = (struct values){0};
    return rt_options_parse(tables, 2, argc, argv, v, pos, seen, err);
}

static void defaults(void **state)
{
    struct rt_err err = {0};
    struct rt_positionals pos;
    struct values v;
    (void)state;
    assert_ok(parse("", &v, &pos, NULL, &err));
    assert_int_equal(v.steps, 100);
    assert_int_equal(v.seed, 0);
    assert_true(v.memory == (int64_t)8 << 30);
    assert_true(v.lr == 1e-4);
    assert_null(v.out);
    assert_string_equal(v.device, "auto");
    assert_false(v.json);
    assert_true(v.shuffle);
    assert_int_equal(v.data.n + pos.n, 0);
    assert_int_equal(rt_options_check(tables, 2, &v, &err), RT_USAGE);
    assert_non_null(strstr(err.msg, "--out"));
    rt_options_free(tables, 2, &v, &pos);
}

static void every_spelling(void **state)
{
    struct rt_err err = {0};
    struct rt_positionals pos;
    struct values v;
    bool seen[128];
    (void)state;
    assert_ok(parse("a --steps 5 --lr=0.5 b --no-shuffle --json --data x:2 --out=o=p - --data=y -- --steps c", &v, &pos, seen, &err));
    assert_int_equal(v.steps, 5);
    assert_true(v.lr == 0.5);
    assert_true(v.json);
    assert_false(v.shuffle);
    assert_string_equal(v.out, "o=p");
    assert_int_equal(v.data.n, 2);
    assert_string_equal(v.data.items[0], "x:2");
    assert_string_equal(v.data.items[1], "y");
    assert_int_equal(pos.n, 5);
    assert_string_equal(pos.items[0], "a");
    assert_string_equal(pos.items[2], "-");
    assert_string_equal(pos.items[3], "--steps");
    assert_ok(rt_options_check(tables, 2, &v, &err));
    static const bool want[] = {false, false, false, true, true, true, true, true, true};
    for (size_t i = 0; i < 128; i++)
        assert_int_equal(seen[i], i < 9 && want[i]);
    rt_options_free(tables, 2, &v, &pos);
    assert_null(v.data.items);
    assert_status(parse("--steps 5 a", &v, NULL, NULL, &err), USAGE); /* where there may be no others */
    rt_options_free(tables, 2, &v, NULL);
    assert_ok(parse("--json=no --shuffle=1 --steps 7 --steps 8 --seed -3", &v, &pos, NULL, &err));
    assert_false(v.json);
    assert_true(v.shuffle);
    assert_int_equal(v.steps, 8); /* the last one counts */
    assert_int_equal(v.seed, -3);
    rt_options_free(tables, 2, &v, &pos);
}

/* Nothing in place of a text: a value where there is no default, else refused with what is expected. */
static void nothing(void **state)
{
    struct rt_err err = {0};
    struct rt_positionals pos;
    struct values v;
    (void)state;
    assert_ok(parse("--out _", &v, &pos, NULL, &err));
    assert_null(v.out);
    rt_options_free(tables, 2, &v, &pos);
    assert_int_equal(parse("--device _", &v, &pos, NULL, &err), RT_USAGE);
    assert_string_equal(err.msg, "option --device: expected auto|cpu|cuda|ref, found nothing; without the option it is auto");
    rt_options_free(tables, 2, &v, NULL);
}

static void numbers(void **state)
{
    static const struct {
        const char *line;
        int64_t seed, memory; /* of those given */
    } good[] = {
        {"--seed 3k", 3000, 0},
        {"--seed 2M", 2000000, 0},
        {"--seed 1.5M", 1500000, 0},
        {"--seed -4G", -4000000000, 0},
        {"--seed 1e3", 1000, 0},
        {"--seed 9223372036854775807", INT64_MAX, 0},
        {"--memory 0", 0, 0},
        {"--memory 123", 0, 123},
        {"--memory 4K", 0, 4096},
        {"--memory 512M", 0, 512 << 20},
        {"--memory 1.5g", 0, 3 << 29},
        {"--memory 2GiB", 0, (int64_t)2 << 30},
        {"--memory 3TB", 0, (int64_t)3 << 40},
        {"--memory 10B", 0, 10},
    };
    static const char *const bad[] = {
        "--seed x", "--seed 1x", "--seed 1m", "--seed 1kk", "--seed 1.5", "--seed 0.0001k", "--seed nan", "--seed 1e400",
        "--seed 9223372036854775808", "--seed 10000000000000000G", "--seed _", "--seed 3B", "--seed k", "--memory -1",
        "--memory 1Q", "--memory 9999999999T", "--memory 1.3", "--lr nan", "--lr inf", "--lr 1.5", "--lr -0.1", "--lr 0.1x", "--lr _",
        "--steps 0", "--steps 1000000001", "--device gpu", "--device cp", "--device auto|cpu", "--json=maybe",
    };
    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        struct rt_err err = {0};
        struct rt_positionals pos;
        struct values v;
        assert_ok(parse(good[i].line, &v, &pos, NULL, &err));
        const bool mem = strncmp(good[i].line, "--memory", 8) == 0;
        if ((mem ? v.memory : v.seed) != (mem ? good[i].memory : good[i].seed))
            fail_msg("%s: %lld", good[i].line, (long long)(mem ? v.memory : v.seed));
        rt_options_free(tables, 2, &v, &pos);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct rt_err err = {0};
        struct rt_positionals pos;
        struct values v;
        char name[32];
        if (parse(bad[i], &v, &pos, NULL, &err) != RT_USAGE)
            fail_msg("%s was accepted", bad[i]);
        snprintf(name, sizeof name, "%.*s", (int)strcspn(bad[i], " ="), bad[i]);
        assert_non_null(strstr(err.msg, name)); /* the message says which option */
        rt_options_free(tables, 2, &v, &pos);
    }
}

static void check_message(const char *line, const char *part)
{
    struct rt_err err = {0};
    struct rt_positionals pos;
    struct values v;
    if (parse(line, &v, &pos, NULL, &err) != RT_USAGE || strstr(err.msg, part) == NULL)
        fail_msg("'%s': '%s', expected '%s'", line, err.msg, part);
    rt_options_free(tables, 2, &v, &pos);
}

static void messages_help(void **state)
{
    (void)state;
    check_message("--stpes 3", "unknown option '--stpes'; did you mean '--steps'?");
    check_message("--mem=3", "did you mean '--memory'?");
    check_message("--no-josn", "unknown option '--no-josn'");
    check_message("--zzzzzz", "--help lists the options");
    check_message("--=3", "unknown option");
    check_message("-o x", "unknown option '-o'");
    check_message("--out", "option --out needs a value: --out DIR");
    check_message("--out --json", "option --out needs a value");
    check_message("--device", "--device auto|cpu|cuda|ref");
    check_message("--no-out x", "only a switch");
    check_message("--no-json=1", "takes no value");
    check_message("--steps 0", "'0' is not a whole number from 1 to 1000000000");
    check_message("--device gpu", "'gpu' is not one of auto|cpu|cuda|ref");
}

static void set_from_a_file(void **state)
{
    struct rt_err err = {0};
    struct rt_positionals pos;
    struct values v;
    (void)state;
    assert_ok(parse("", &v, &pos, NULL, &err));
    assert_ok(rt_options_set(tables, 2, "lr", "0.25", "c.json", &v, &err));
    assert_ok(rt_options_set(tables, 2, "shuffle", "false", "c.json", &v, &err));
    assert_ok(rt_options_set(tables, 2, "data", "a\nb", "c.json", &v, &err));
    assert_ok(rt_options_set(tables, 2, "data", "c", "c.json", &v, &err));
    assert_true(v.lr == 0.25);
    assert_false(v.shuffle);
    assert_int_equal(v.data.n, 3);
    assert_string_equal(v.data.items[1], "b");
    assert_int_equal(rt_options_set(tables, 2, "lrr", "1", "c.json", &v, &err), RT_USAGE);
    assert_string_equal(err.msg, "c.json: unknown option '--lrr'; did you mean '--lr'?");
    rt_err_clear(&err);
    assert_int_equal(rt_options_set(tables, 2, "lr", "2", "c.json", &v, &err), RT_USAGE);
    assert_string_equal(err.msg, "c.json: option --lr: '2' is not a number from 0 to 1");
    rt_options_free(tables, 2, &v, &pos);
}

/* Every value, written and read again, is the same. */
static void values_round_trip(void **state)
{
    struct rt_err err = {0};
    struct rt_positionals pos;
    struct values v, w = {0};
    struct rt_buf text[9] = {{0}};
    int n = 0;
    (void)state;
    assert_ok(parse("--lr 0.1 --seed -7 --memory 3M --out o --no-shuffle --json --data a --data b:0.5 --device ref", &v, &pos, NULL, &err));
    for (int t = 0; t < 2; t++) {
        for (const struct rt_opt *o = tables[t]; o->name != NULL; o++, n++) {
            assert_ok(rt_options_value(o, &v, &text[n], &err));
            assert_ok(rt_options_set(tables, 2, o->name, text[n].data, "x", &w, &err));
        }
    }
    assert_true(w.lr == v.lr && w.seed == -7 && w.memory == v.memory && w.steps == 100 && w.json && !w.shuffle);
    assert_string_equal(w.out, "o");
    assert_string_equal(w.device, "ref");
    assert_int_equal(w.data.n, 2);
    assert_string_equal(w.data.items[1], "b:0.5");
    assert_string_equal(text[4].data, "0.1"); /* the shortest that reads back */
    text[0].len = 0;
    v.lr = 1.0 / 3;
    assert_ok(rt_options_value(&own[1], &v, &text[0], &err));
    assert_true(strtod(text[0].data, NULL) == 1.0 / 3);
    text[0].len = 0;
    v.out = NULL;
    assert_ok(rt_options_value(&own[2], &v, &text[0], &err));
    assert_string_equal(text[0].data, "");
    assert_ok(rt_options_set(tables, 2, "out", "", "x", &w, &err));
    assert_null(w.out);
    for (int i = 0; i < 9; i++)
        rt_buf_free(&text[i]);
    rt_options_free(tables, 2, &w, NULL);
    rt_options_free(tables, 2, &v, &pos);
}

static void help_lists_and_wraps(void **state)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    (void)state;
    assert_ok(rt_options_help(tables, 2, &b, &err));
    for (int t = 0; t < 2; t++) {
        for (const struct rt_opt *o = tables[t]; o->name != NULL; o++) {
            char name[32];
            snprintf(name, sizeof name, "  --%s", o->name);
            assert_non_null(strstr(b.data, name));
        }
    }
    for (const char *line = b.data; *line != '\0';) {
        const size_t n = strcspn(line, "\n");
        assert_true(n <= 100);
        assert_true(n == 0 || line[n - 1] != ' ');
        line += n + 1;
    }
    assert_non_null(strstr(b.data, "  --steps N                   optimiser steps (1 to 1000000000, default 100)\n"));
    assert_non_null(strstr(b.data, "  --device auto|cpu|cuda|ref  backend (default auto)\n"));
    assert_non_null(strstr(b.data, "where the run goes (required)"));
    assert_non_null(strstr(b.data, "training data (may be repeated)"));
    assert_non_null(strstr(b.data, "--no-shuffle"));
    rt_buf_free(&b);
}

static void nearest_words(void **state)
{
    static const char *const words[] = {"steps", "seed", "temperature", "teacher-temperature", "lr"};
    char far[200];
    (void)state;
    assert_string_equal(rt_nearest("setps", words, 5), "steps");
    assert_string_equal(rt_nearest("sead", words, 5), "seed");
    assert_string_equal(rt_nearest("temperatur", words, 5), "temperature");
    assert_string_equal(rt_nearest("temp", words, 5), "temperature");
    assert_null(rt_nearest("qqqq", words, 5));
    assert_null(rt_nearest("", words, 5));
    assert_null(rt_nearest("steps", words, 0));
    memset(far, 's', sizeof far - 1);
    far[sizeof far - 1] = '\0';
    assert_null(rt_nearest(far, words, 5));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(defaults),        cmocka_unit_test(every_spelling),    cmocka_unit_test(nothing), cmocka_unit_test(numbers),
    cmocka_unit_test(messages_help),   cmocka_unit_test(set_from_a_file),   cmocka_unit_test(values_round_trip),
    cmocka_unit_test(help_lists_and_wraps), cmocka_unit_test(nearest_words),
};
RT_SUITE(core_options, tests)
