#include "tests/suite.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/rng.h"
#include "distill/command.h"
#include "distill/compare.h"
#include "distill/jsonl.h"
#include "distill/report.h"
#include "distill/report_svg.h"

/* ---- runs on disk ---- */
static void put(const char *dir, const char *name, const char *text)
{
    char path[4096], parent[4096];
    struct rt_err err = {0};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    snprintf(parent, sizeof parent, "%s", path);
    *strrchr(parent, '/') = '\0';
    assert_ok(rt_mkdirs(parent, &err));
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fwrite(text, 1, strlen(text), f) == strlen(text));
    assert_int_equal(fclose(f), 0);
}

struct fake {
    const char *arm, *order, *init;
    int64_t seed, tokens;
    double kl, noise; /* mean, and what is added and taken away on every other sequence */
    double T;
    int correct;      /* of 4 samples of each problem */
    bool reversed;    /* lines of the evaluation in another order */
    double alm;       /* weight; 0: run.json does not name it */
    const char *lr, *data; /* as recorded */
};

static void make_run(const char *dir, const struct fake *f)
{
    char text[8192], *p;
    enum { SEQUENCES = 24, PROBLEMS = 12 };
    char alm[32] = "";
    if (f->alm > 0)
        snprintf(alm, sizeof alm, ",\"alm\":%g", f->alm);
    snprintf(text, sizeof text, "{\"version\":1,\"name\":\"n\",\"arm\":\"%s\",\"seed\":%lld,\"finished\":true,\"options\":{\"w-kl\":\"%d\",\"lr\":\"%s\",\"device\":\"%s\",\"out\":\"%s\"},"
             "\"weights\":{\"ce\":0,\"kl\":1,\"feature\":0%s},\"init\":{\"sha256\":\"%s\"},\"order_sha256\":\"%s\",\"tokens\":%lld,\"steps\":3,\"seconds\":5.5,"
             "\"final\":{\"ce\":2.5,\"kl\":0.5}}", f->arm, (long long)f->seed, strcmp(f->arm, "hard") != 0, f->lr,
             f->seed == 0 ? "cpu" : "cuda", dir, alm, f->init, f->order, (long long)f->tokens);
    put(dir, "run.json", text);
    put(dir, "metrics.jsonl", "{\"step\":1,\"loss\":3,\"ce\":3,\"kl\":1}\n{\"step\":2,\"skipped\":true,\"loss\":null}\n{\"step\":3,\"loss\":2,\"ce\":2,\"kl\":0.5}\n{\"step\":4,\"lo");
    snprintf(text, sizeof text, "{\"step\":0,\"name\":\"h\",\"data\":\"%s\",\"ce\":5,\"kl\":9,\"kd_temperature\":%g}\n{\"step\":3,\"name\":\"h\",\"data\":\"%s\",\"ce\":null,\"kl\":%g,\"kl_rows\":240,\"kd_temperature\":%g,"
             "\"agreement\":0.7,\"pass1\":%g,\"n_problems\":12,\"per_sequence\":\"eval/h.jsonl\"}\n", f->data, f->T, f->data, f->kl, f->T, f->correct / 4.0);
    put(dir, "eval.jsonl", text);
    p = text;
    *p = '\0';
    for (int k = 0; k < SEQUENCES; k++) {
        const int i = f->reversed ? SEQUENCES - 1 - k : k;
        const double shared = rt_rng_normal(1, 0, (uint64_t)i), own = i % 2 ? f->noise : -f->noise;
        p += sprintf(p, "{\"kind\":\"sequence\",\"key\":\"%032d\",\"occurrence\":0,\"targets\":0,\"kl_rows\":10,\"kl\":%.9g,\"agree\":7}\n", i, 10 * (f->kl + shared + own));
    }
    for (int i = 0; i < PROBLEMS; i++)
        p += sprintf(p, "{\"kind\":\"problem\",\"line\":%d,\"samples\":4,\"correct\":%d}\n", i + 1, f->correct);
    put(dir, "eval/h.jsonl", text);
}

static const struct fake base = {"hard", "o", "i", 0, 100, 3, 0, 1, 4, false, 0, "0.001", "d/h.jsonl"};

static bool said(const struct rt_comparison *c, const char *list, const char *words)
{
    const struct rt_json *l = rt_json_get(c->report, list);
    for (size_t i = 0; i < rt_json_len(l); i++)
        if (strstr(rt_json_as_string(rt_json_at(l, i), NULL), words) != NULL)
            return true;
    return false;
}

static struct rt_comparison *compare_two(const char *where, const struct fake *a, const struct fake *b)
{
    struct rt_err err = {0};
    struct rt_comparison *c = NULL;
    char x[4096], y[4096];
    snprintf(x, sizeof x, "%s/a", test_tmp(where));
    snprintf(y, sizeof y, "%s/b", test_tmp(where));
    make_run(x, a);
    make_run(y, b);
    const char *const paths[] = {x, y};
    assert_ok(rt_compare(paths, 2, NULL, &c, &err));
    return c;
}

static void a_difference_that_can_be_told(void **state)
{
    (void)state;
    struct fake soft = base;
    soft.arm = "soft";
    soft.kl = 2.5;
    soft.noise = 0.05;
    soft.reversed = true; /* paired by key, whatever the order of lines */
    soft.correct = 2;
    struct rt_comparison *c = compare_two("told", &base, &soft);
    const struct rt_cmp_difference *d = &c->diff[0][1][RT_CMP_KL];
    assert_int_equal(c->n_arms, 2);
    assert_string_equal(c->arm[0].name, "hard");
    assert_true(d->told && d->value.n == 24 && d->seeds == 1 && d->same_sign == 1);
    /* noise of 0.05 on 24 sequences: 0.01 of standard error; unpaired, the shared spread of 1 would give 0.28 */
    assert_true(fabs(d->value.mean + 0.5) < 0.05 && d->value.hi - d->value.lo < 0.08);
    assert_true(said(c, "verdict", "soft is better than hard in KL to the teacher"));
    assert_int_equal(rt_json_len(rt_json_get(c->report, "warnings")), 0);
    assert_true(c->diff[0][1][RT_CMP_PASS1].value.mean == -0.5 && said(c, "verdict", "soft is worse than hard in pass@1"));
    /* all right: n / (n + z^2) */
    assert_true(fabs(c->result[0][0][RT_CMP_PASS1].value.lo - 12 / (12 + 3.8415)) < 1e-4 && c->result[0][0][RT_CMP_PASS1].value.hi == 1);
    assert_true(said(c, "verdict", "One seed"));
    assert_false(c->has[0][RT_CMP_CE]); /* null at the end, though there was one at step 0 */
    assert_int_equal(c->run[0].step.len / sizeof(double), 2); /* neither the skipped step nor the torn line */
    const struct rt_json *differs = rt_json_get(c->report, "differs");
    assert_int_equal(rt_json_len(differs), 1);
    assert_string_equal(rt_json_as_string(rt_json_get(rt_json_at(differs, 0), "option"), NULL), "w-kl");
    rt_comparison_free(c);
}

/* The table of arms: what each was trained with stands in the arm's own row; likelihoods of spans only where an arm has them. */
static void arms_are_a_table(void **state)
{
    (void)state;
    for (int with = 0; with < 2; with++) {
        struct rt_err err = {0};
        struct fake spans = base;
        struct rt_buf out = {0};
        char arm[16], head[160], row[160];
        spans.arm = "spans";
        spans.alm = with ? 0.5 : 0;
        struct rt_comparison *c = compare_two(with ? "table-1" : "table-0", &base, &spans);
        assert_ok(rt_compare_print(c, &out, &err));
        assert_ok(rt_buf_puts(&out, "", &err));
        assert_int_equal(sscanf(out.data, "%15s %159[^\n] %15s", arm, head, row), 3);
        assert_string_equal(arm, "arm");
        assert_string_equal(row, "hard");
        assert_true((strstr(head, "w_alm") != NULL) == (with == 1));
        assert_non_null(strstr(head, "peak memory"));
        const char *line = strstr(out.data, "\n  spans ");
        assert_non_null(line);
        float w[6];
        assert_int_equal(sscanf(line, " spans %f %f %f %f %f %f", &w[0], &w[1], &w[2], &w[3], &w[4], &w[5]), 6);
        assert_true(w[0] == 1 && w[1] == 0 && w[2] == 1 && w[3] == 0 && w[4] == (with ? 0.5f : 2.5f) && w[5] == (with ? 2.5f : 0.5f));
        rt_buf_free(&out);
        rt_comparison_free(c);
    }
}

static void a_difference_that_cannot(void **state)
{
    (void)state;
    struct fake soft = base;
    soft.arm = "soft";
    soft.kl = 2.99;
    soft.noise = 0.5;
    struct rt_comparison *c = compare_two("untold", &base, &soft);
    assert_false(c->diff[0][1][RT_CMP_KL].told);
    assert_true(said(c, "verdict", "No difference between soft and hard can be told in") && said(c, "verdict", "KL to the teacher ("));
    assert_true(said(c, "verdict", "pass@1 ("));
    assert_false(said(c, "verdict", "better") || said(c, "verdict", "worse"));
    rt_comparison_free(c);
}

static void what_is_not_comparable_is_said(void **state)
{
    (void)state;
    struct fake soft = base;
    soft.arm = "soft";
    soft.kl = 2;
    soft.order = "other";
    soft.init = "other";
    soft.tokens = 90;
    soft.T = 2;
    struct rt_comparison *c = compare_two("unfair", &base, &soft);
    assert_true(said(c, "warnings", "saw other sequences") && said(c, "warnings", "began from other parameters") && said(c, "warnings", "90 tokens"));
    assert_true(said(c, "verdict", "differ in more than their treatment"));
    /* KL at another temperature is another quantity */
    assert_true(said(c, "warnings", "T = 2") && c->diff[0][1][RT_CMP_KL].value.n == 0 && !said(c, "verdict", "KL"));
    assert_int_equal(c->diff[0][1][RT_CMP_AGREEMENT].value.n, 24);
    rt_comparison_free(c);
}

/* Two seeds an arm, one of which goes the other way: not told, whatever the pooled interval says. */
static void seeds_must_agree(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_comparison *c = NULL;
    char path[4][4096];
    const char *paths[4];
    for (int i = 0; i < 4; i++) {
        struct fake f = base;
        f.arm = i < 2 ? "hard" : "soft";
        f.seed = i % 2;
        f.kl = i == 2 ? 1 : i == 3 ? 3.1 : 3;
        snprintf(path[i], sizeof path[i], "%s/r%d", test_tmp("seeds"), i);
        make_run(path[i], &f);
        paths[i] = path[i];
    }
    assert_ok(rt_compare(paths, 4, NULL, &c, &err));
    const struct rt_cmp_difference *d = &c->diff[0][1][RT_CMP_KL];
    assert_true(c->n_arms == 2 && c->arm[1].n_runs == 2);
    assert_true(d->value.hi < 0 && d->seeds == 2 && d->same_sign == 1 && !d->told);
    const struct rt_cmp_result *r = &c->result[0][1][RT_CMP_KL];
    assert_true(r->seeds == 2 && fabs(r->seed_mean - 2.05) < 1e-12 && fabs(r->seed_sd - 2.1 / sqrt(2)) < 1e-12);
    rt_comparison_free(c);
}

/* Runs f[i] at PLACE/x<i>/final, compared in this order. */
static struct rt_comparison *compare_at(const char *place, const struct fake *f, int n)
{
    struct rt_err err = {0};
    struct rt_comparison *c = NULL;
    static char path[4][4096];
    const char *paths[4];
    for (int i = 0; i < n; i++) {
        snprintf(path[i], sizeof path[i], "%s/x%d/final", test_tmp(place), i);
        make_run(path[i], &f[i]);
        paths[i] = path[i];
    }
    assert_ok(rt_compare(paths, n, NULL, &c, &err));
    return c;
}

static bool controlled(const struct rt_comparison *c)
{
    bool yes = false;
    assert_true(rt_json_as_bool(rt_json_get(c->report, "controlled"), &yes));
    return yes;
}

/* The loss, and where the work was done, may differ between arms; the recipe may not. */
static void another_recipe_is_said(void **state)
{
    (void)state;
    struct fake f[2] = {base, base};
    f[1].arm = "soft";
    struct rt_comparison *c = compare_at("recipe-same", f, 2);
    assert_true(controlled(c) && rt_json_len(rt_json_get(c->report, "warnings")) == 0);
    rt_comparison_free(c);
    f[1].lr = "0.002";
    c = compare_at("recipe-other", f, 2);
    assert_true(!controlled(c) && said(c, "warnings", "soft seed 0 was trained with --lr 0.002, hard seed 0 with 0.001"));
    assert_true(said(c, "verdict", "differ in more than their treatment"));
    rt_comparison_free(c);
}

/* One name is one arm only where the seed alone differs; else paths name the arms. A run is one run. */
static void arms_are_replicates(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_comparison *c;
    struct fake f[4] = {base, base, base, base};
    c = compare_at("clash", f, 2); /* the same seed */
    assert_int_equal(c->n_arms, 2);
    assert_string_equal(c->arm[0].name, "x0/final");
    assert_string_equal(c->arm[1].name, "x1/final");
    assert_true(said(c, "warnings", "both called hard and are no replicates (both of seed 0)"));
    rt_comparison_free(c);
    f[1].seed = f[3].seed = 1;
    c = compare_at("seeds-alone", f, 2);
    assert_true(c->n_arms == 1 && c->arm[0].n_runs == 2 && strcmp(c->arm[0].name, "hard") == 0);
    rt_comparison_free(c);
    f[2].lr = f[3].lr = "0.002";
    c = compare_at("clash-lr", f, 4);
    assert_true(c->n_arms == 2 && c->arm[0].n_runs == 2 && c->arm[1].n_runs == 2);
    assert_string_equal(c->arm[1].name, "x2/final");
    assert_true(said(c, "warnings", "no replicates (--lr '0.001' and '0.002')") && !controlled(c));
    rt_comparison_free(c);
    f[2] = base;
    f[2].arm = "soft";
    c = compare_at("two-and-one", f, 3);
    assert_true(c->n_arms == 2 && said(c, "verdict", "soft and hard share one seed (1 and 2 runs)") && !said(c, "verdict", "One seed an arm"));
    rt_comparison_free(c);
    char again[4096];
    const char *const twice[] = {test_tmp("once"), again};
    snprintf(again, sizeof again, "%s/../once/", twice[0]);
    make_run(twice[0], &base);
    c = NULL;
    assert_status(rt_compare(twice, 2, NULL, &c, &err), USAGE);
    assert_null(c);
}

static bool has_table(const struct rt_comparison *c, const char *title)
{
    for (int e = 0; e < c->n_evals; e++)
        if (strcmp(c->eval[e], title) == 0)
            return true;
    return false;
}

/* Measurements of one name: a table each where a run has several; one table, with what differs said, where none has. */
static void measurements_of_one_name(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_comparison *c = NULL;
    static const char more[] =
        "{\"step\":3,\"name\":\"h\",\"by\":\"train\",\"data\":\"d/h.jsonl\",\"kl\":2,\"kd_temperature\":1}\n"
        "{\"step\":3,\"name\":\"h\",\"by\":\"eval\",\"data\":\"d/h.jsonl\",\"kl\":2,\"kd_temperature\":1}\n"
        "{\"step\":3,\"name\":\"h\",\"by\":\"eval\",\"data\":\"d/h.jsonl\",\"kl\":2,\"kd_temperature\":2}\n"
        "{\"step\":3,\"name\":\"h\",\"by\":\"eval\",\"data\":\"d/h.jsonl\",\"pass1\":0.5,\"samples\":4,\"temperature\":0.6}\n"
        "{\"step\":3,\"name\":\"h\",\"by\":\"eval\",\"data\":\"d/h.jsonl\",\"pass1\":0.5,\"samples\":1,\"temperature\":0}\n";
    static const char elsewhere[] = "{\"step\":3,\"name\":\"h\",\"by\":\"eval\",\"data\":\"e/h.jsonl\",\"data_sha256\":\"77\",\"kl\":2,\"kd_temperature\":2}\n";
    struct fake f[2] = {base, base};
    char a[4096], b[4096];
    const char *const paths[] = {a, b};
    f[1].arm = "soft";
    f[1].data = "e/h.jsonl";
    c = compare_at("kinds", f, 2);
    snprintf(a, sizeof a, "%s", c->run[0].path);
    snprintf(b, sizeof b, "%s", c->run[1].path);
    assert_true(c->n_evals == 1 && has_table(c, "h"));
    assert_true(said(c, "warnings", "the data differ, soft seed 0 was evaluated on e/h.jsonl, hard seed 0 on d/h.jsonl"));
    rt_comparison_free(c);
    put(a, "eval.jsonl", more);
    put(b, "eval.jsonl", more);
    assert_ok(rt_compare(paths, 2, NULL, &c, &err));
    assert_int_equal(c->n_evals, 5);
    assert_true(has_table(c, "h (in training, T = 1)") && has_table(c, "h (T = 1)") && has_table(c, "h (T = 2)") && has_table(c, "h (no KL, samples 1, temperature 0)"));
    assert_int_equal(rt_json_len(rt_json_get(c->report, "warnings")), 0);
    rt_comparison_free(c);
    put(a, "eval.jsonl", strstr(more, "{\"step\":3,\"name\":\"h\",\"by\":\"eval\",\"data\":\"d/h.jsonl\",\"pass1\":0.5,\"samples\":4"));
    char two[1024];
    snprintf(two, sizeof two, "%s%.*s", elsewhere, (int)(strchr(more, '\n') + 1 - more), more);
    put(b, "eval.jsonl", two);
    assert_ok(rt_compare(paths, 2, NULL, &c, &err)); /* the first arm is told of too, with the command */
    assert_true(said(c, "warnings", "hard seed 0 was not evaluated on e/h.jsonl (T = 2): `retort eval --student ") && said(c, "warnings", "--data e/h.jsonl --kd-temperature 2` adds it"));
    assert_true(said(c, "warnings", "hard seed 0 was not evaluated on d/h.jsonl (T = 1): `"));
    assert_true(said(c, "warnings", "--samples 4 --temperature 0.6` adds it"));
    rt_comparison_free(c);
}

static void bad_records_are_refused(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_comparison *c = NULL;
    char dir[4096];
    const char *const paths[] = {dir};
    snprintf(dir, sizeof dir, "%s", test_tmp("bad"));
    assert_ok(rt_mkdirs(dir, &err));
    assert_status(rt_compare(paths, 1, NULL, &c, &err), FORMAT); /* neither run nor experiment */
    make_run(dir, &base);
    put(dir, "eval.jsonl", "{\"step\":1,\"name\":\"h\",\"kl\":1,\"per_sequence\":\"../../secret\"}\n");
    assert_status(rt_compare(paths, 1, NULL, &c, &err), FORMAT);
    put(dir, "eval.jsonl", "{\"step\":1,\"name\":\"h\",\"kl\":1,\"per_sequence\":\"eval/h.jsonl\"}\n");
    put(dir, "eval/h.jsonl", "{\"kind\":\"problem\",\"line\":1,\"samples\":1,\"correct\":1}\n{\"kind\":\"problem\",\"line\":1,\"samples\":1,\"correct\":1}\n");
    assert_status(rt_compare(paths, 1, NULL, &c, &err), FORMAT); /* one problem twice */
    put(dir, "eval/h.jsonl", "{\"kind\":\"sequence\",\"key\":7}\n");
    assert_status(rt_compare(paths, 1, NULL, &c, &err), FORMAT);
    put(dir, "eval/h.jsonl", "");
    put(dir, "metrics.jsonl", "{\"loss\":1}\n");
    assert_status(rt_compare(paths, 1, NULL, &c, &err), FORMAT);
    put(dir, "metrics.jsonl", "not json\n{\"step\":1}\n");
    assert_status(rt_compare(paths, 1, NULL, &c, &err), FORMAT);
    put(dir, "run.json", "[1]");
    assert_status(rt_compare(paths, 1, NULL, &c, &err), FORMAT);
    put(dir, "experiment.json", "{\"arms\":[{\"name\":\"x\",\"runs\":[{\"path\":\"/etc\"}]}]}");
    assert_status(rt_compare(paths, 1, NULL, &c, &err), FORMAT);
    put(dir, "experiment.json", "{\"arms\":[{\"name\":\"x\",\"runs\":[{\"path\":\"arms/none\"}]}]}");
    assert_status(rt_compare(paths, 1, NULL, &c, &err), REFUSED);
    assert_null(c);
}

/* ---- the page ---- */
/* Every tag that is opened is closed, in order; no attribute holds a '<'. */
static void assert_well_formed(const struct rt_buf *page)
{
    static const char *const empty[] = {"!doctype", "meta", "line", "rect", "circle"};
    char stack[64][32];
    int depth = 0;
    for (size_t i = 0; i < page->len; i++) {
        if (page->data[i] != '<')
            continue;
        char name[32];
        const bool closing = page->data[i + 1] == '/';
        const size_t at = i + (closing ? 2 : 1), n = strspn(page->data + at, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!");
        assert_true(n > 0 && n < sizeof name);
        memcpy(name, page->data + at, n);
        name[n] = '\0';
        const char *end = memchr(page->data + at, '>', page->len - at);
        assert_non_null(end);
        assert_null(memchr(page->data + at, '<', (size_t)(end - page->data) - at));
        bool single = end[-1] == '/';
        for (size_t k = 0; k < sizeof empty / sizeof empty[0]; k++)
            single |= strcmp(name, empty[k]) == 0;
        if (closing) {
            assert_true(depth > 0);
            assert_string_equal(name, stack[--depth]);
        } else if (!single) {
            assert_true(depth < 64);
            strcpy(stack[depth++], name);
        }
        i = (size_t)(end - page->data);
    }
    assert_int_equal(depth, 0);
}

static void page_is_self_contained(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf page = {0}, text = {0};
    struct fake soft = base;
    soft.arm = "<script>alert(1)</script>&'";
    soft.kl = 2;
    struct rt_comparison *c = compare_two("page", &base, &soft);
    assert_ok(rt_report_html(c, &page, &err));
    assert_ok(rt_buf_append(&page, "", 1, &err));
    page.len--;
    assert_null(strstr(page.data, "<script"));
    assert_non_null(strstr(page.data, "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&#39;"));
    assert_null(strstr(page.data, "http"));
    assert_null(strstr(page.data, "src="));
    assert_null(strstr(page.data, "nan"));
    assert_null(strstr(page.data, "inf\""));
    assert_non_null(strstr(page.data, "prefers-color-scheme:dark"));
    int svgs = 0, titles = 0, descs = 0;
    for (const char *p = page.data; (p = strstr(p, "<svg viewBox")) != NULL; p++)
        svgs += strncmp(p, "<svg viewBox=\"0 0 38 ", 21) != 0; /* the legend's are decoration */
    for (const char *p = page.data; (p = strstr(p, "<title id=")) != NULL; p++)
        titles++;
    for (const char *p = page.data; (p = strstr(p, "<desc id=")) != NULL; p++)
        descs++;
    assert_true(svgs > 6 && titles == svgs && descs == svgs);
    assert_well_formed(&page);
    assert_ok(rt_compare_print(c, &text, &err));
    assert_non_null(memmem(text.data, text.len, "verdict", 7));
    rt_buf_free(&text);
    rt_buf_free(&page);
    rt_comparison_free(c);
}

/* Values from a file that nobody expects draw something, or nothing, but never fail. */
static void strange_values_are_drawn(void **state)
{
    (void)state;
    struct rt_err err = {0};
    static const double strange[] = {0, -0.0, 1e308, -1e308, 5e-324, NAN, INFINITY, -INFINITY, 1, 1e-30};
    enum { N = sizeof strange / sizeof strange[0] };
    const struct rt_svg_figure f = {.id = "f", .title = "t", .desc = "d", .x_label = "x", .percent = true};
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            struct rt_buf out = {0};
            const double x[] = {0, 1}, y[] = {strange[i], strange[j]};
            const struct rt_svg_line line = {"l", 9, x, y, y, y, 2, true};
            const struct rt_svg_bar bar[] = {{"a\xff\x01", 0, strange[i], strange[j], strange[i]}, {"b", 1, strange[j], NAN, NAN}};
            assert_ok(rt_svg_lines(&out, &f, &line, 1, &err));
            assert_ok(rt_svg_bars(&out, &f, bar, 2, &err));
            assert_ok(rt_svg_forest(&out, &f, bar, 2, &err));
            assert_true(out.len < 20000);
            rt_buf_free(&out);
        }
}

static void json_lines(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_jsonl f;
    const struct rt_json *v;
    const char *dir = test_tmp("jsonl");
    char path[4096];
    int64_t n;
    put(dir, "x", "{\"a\":1}\n\n  \n{\"a\":2}\n{\"a\":3}");
    snprintf(path, sizeof path, "%s/x", dir);
    assert_ok(rt_jsonl_open(path, &f, &err));
    for (int i = 1; i <= 3; i++) {
        assert_ok(rt_jsonl_next(&f, &v, &err));
        assert_non_null(v);
        assert_ok(rt_json_int(v, "a", 0, 9, &n, &err));
        assert_int_equal(n, i);
    }
    assert_int_equal(f.lines.line, 5);
    assert_ok(rt_jsonl_next(&f, &v, &err));
    assert_true(v == NULL && !f.torn);
    rt_jsonl_close(&f);
    put(dir, "x", "{\"a\":1}\n{\"a\":");
    assert_ok(rt_jsonl_open(path, &f, &err));
    assert_ok(rt_jsonl_next(&f, &v, &err));
    assert_non_null(v);
    assert_ok(rt_jsonl_next(&f, &v, &err));
    assert_true(v == NULL && f.torn);
    rt_jsonl_close(&f);
    put(dir, "x", "{\"a\":\n{\"a\":1}\n");
    assert_ok(rt_jsonl_open(path, &f, &err));
    assert_status(rt_jsonl_next(&f, &v, &err), FORMAT);
    rt_jsonl_close(&f);
    put(dir, "x", " ");
    assert_ok(rt_jsonl_open(path, &f, &err));
    assert_ok(rt_jsonl_next(&f, &v, &err));
    assert_null(v);
    rt_jsonl_close(&f);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_difference_that_can_be_told), cmocka_unit_test(arms_are_a_table), cmocka_unit_test(a_difference_that_cannot),
    cmocka_unit_test(what_is_not_comparable_is_said), cmocka_unit_test(seeds_must_agree), cmocka_unit_test(another_recipe_is_said),
    cmocka_unit_test(arms_are_replicates), cmocka_unit_test(measurements_of_one_name), cmocka_unit_test(bad_records_are_refused),
    cmocka_unit_test(page_is_self_contained), cmocka_unit_test(strange_values_are_drawn), cmocka_unit_test(json_lines),
};
RT_SUITE(compare, tests)
