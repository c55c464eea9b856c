#include <stdio.h>
#include <string.h>

#include "distill/compare_parts.h"

/* ---- what differs between the arms' commands ---- */
/* An option that says where, or is the seed of a run: not a treatment. */
static bool incidental(const char *key)
{
    return strcmp(key, "out") == 0 || strcmp(key, "seed") == 0 || strcmp(key, "config") == 0;
}

static const char *option(const struct rt_comparison *c, int arm, const char *key)
{
    return rt_cmp_text(c->run[c->arm[arm].run[0]].run, "options", key);
}

static enum rt_status add_difference(const struct rt_comparison *c, const char *key, struct rt_json *list, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *o, *values;
    RT_TRY(rt_json_set_object(list, NULL, &o, err));
    RT_TRY(rt_json_set_string(o, "option", key, err));
    RT_TRY(rt_json_set_array(o, "values", &values, err));
    for (int a = 0; a < c->n_arms; a++)
        RT_TRY(rt_json_set_string(values, NULL, option(c, a, key), err));
out:
    return st;
}

static bool listed(const struct rt_json *list, const char *key)
{
    for (size_t i = 0; i < rt_json_len(list); i++)
        if (strcmp(rt_cmp_text(rt_json_at(list, i), NULL, "option"), key) == 0)
            return true;
    return false;
}

static enum rt_status differs(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list;
    RT_TRY(rt_json_set_array(c->report, "differs", &list, err));
    for (int a = 0; a < c->n_arms; a++) {
        const struct rt_json *options = rt_json_get(c->run[c->arm[a].run[0]].run, "options"), *v;
        const char *key;
        for (size_t i = 0; rt_json_member(options, i, &key, &v); i++) {
            bool same = true;
            for (int b = 0; b < c->n_arms; b++)
                same &= strcmp(option(c, a, key), option(c, b, key)) == 0;
            if (!same && !incidental(key) && !listed(list, key))
                RT_TRY(add_difference(c, key, list, err));
        }
    }
out:
    return st;
}

/* ---- the verdict ---- */
static const enum rt_cmp_metric judged[] = {RT_CMP_PASS1, RT_CMP_KL, RT_CMP_CE};
enum { N_JUDGED = sizeof judged / sizeof judged[0] };

/* One sentence for a difference that can be told. */
static enum rt_status told(const struct rt_comparison *c, int e, int a, int m, struct rt_json *list, struct rt_err *err)
{
    const struct rt_cmp_metric_info *info = &rt_cmp_metric_info[m];
    const struct rt_cmp_difference *d = &c->diff[e][a][m];
    char x[32], y[32], diff[32], lo[32], hi[32], seeds[64] = "";
    rt_cmp_number(x, c->result[e][a][m].value.mean, info->share);
    rt_cmp_number(y, c->result[e][0][m].value.mean, info->share);
    rt_cmp_signed(diff, d->value.mean, info->share);
    rt_cmp_signed(lo, d->value.lo, info->share);
    rt_cmp_signed(hi, d->value.hi, info->share);
    if (d->seeds > 1)
        snprintf(seeds, sizeof seeds, "; %d of %d seeds agree in sign", d->same_sign, d->seeds);
    return rt_cmp_say(list, err, "%s: %s is %s than %s in %s: %s against %s (difference %s, 95 %% interval %s to %s, %lld paired%s).", c->eval[e],
                c->arm[a].name, (d->value.mean < 0) == info->lower_is_better ? "better" : "worse", c->arm[0].name, info->word, x, y, diff, lo, hi,
                (long long)d->value.n, seeds);
}

/* What cannot be told of an arm, in one sentence: "no difference between A and B in KL to the teacher (x, y), pass@1 (z) can be told." */
static enum rt_status untold(const struct rt_comparison *c, int a, struct rt_json *list, struct rt_err *err)
{
    struct rt_buf text = {0};
    enum rt_status st = RT_OK;
    for (int i = 0; i < N_JUDGED; i++) {
        bool open = false;
        for (int e = 0; e < c->n_evals; e++) {
            const struct rt_cmp_difference *d = &c->diff[e][a][judged[i]];
            if (!c->has[e][judged[i]] || d->value.n == 0 || d->told)
                continue;
            if (text.len == 0)
                RT_TRY(rt_buf_printf(&text, err, "No difference between %s and %s can be told in ", c->arm[a].name, c->arm[0].name));
            else if (!open)
                RT_TRY(rt_buf_puts(&text, "), ", err));
            RT_TRY(rt_buf_printf(&text, err, open ? ", %s" : "%s (%s", open ? c->eval[e] : rt_cmp_metric_info[judged[i]].word, c->eval[e]));
            open = true;
        }
    }
    if (text.len > 0) {
        RT_TRY(rt_buf_puts(&text, ").", err));
        RT_TRY(rt_json_set_string_n(list, NULL, text.data, text.len, err));
    }
out:
    rt_buf_free(&text);
    return st;
}

/* What the seeds cannot show, of each arm that shares fewer than two with the first. */
static enum rt_status few_seeds(const struct rt_comparison *c, struct rt_json *list, struct rt_err *err)
{
    static const char meaning[] = "the intervals cover the evaluation data, not the spread between trainings.";
    enum rt_status st = RT_OK;
    bool single = c->arm[0].n_runs == 1, any = false;
    for (int a = 1; a < c->n_arms; a++) {
        bool paired = false;
        int shared = 0;
        for (int e = 0; e < c->n_evals; e++)
            for (int i = 0; i < N_JUDGED; i++) {
                const struct rt_cmp_difference *d = &c->diff[e][a][judged[i]];
                paired |= d->value.n > 0;
                shared = d->seeds > shared ? d->seeds : shared;
            }
        if (!paired || shared > 1)
            continue;
        any = true;
        if (c->arm[0].n_runs > 1 || c->arm[a].n_runs > 1) {
            single = false;
            RT_TRY(rt_cmp_say(list, err, "%s and %s share %s seed (%d and %d runs): %s", c->arm[a].name, c->arm[0].name, shared == 1 ? "one" : "no",
                              c->arm[a].n_runs, c->arm[0].n_runs, meaning));
        }
    }
    if (single && any)
        RT_TRY(rt_cmp_say(list, err, "One seed an arm: %s", meaning));
out:
    return st;
}

static enum rt_status verdict(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list;
    bool controlled = true;
    RT_TRY(rt_json_set_array(c->report, "verdict", &list, err));
    rt_json_as_bool(rt_json_get(c->report, "controlled"), &controlled);
    const size_t before = rt_json_len(list);
    for (int a = 1; a < c->n_arms; a++) {
        for (int i = 0; i < N_JUDGED; i++)
            for (int e = 0; e < c->n_evals; e++)
                if (c->has[e][judged[i]] && c->diff[e][a][judged[i]].value.n > 0 && c->diff[e][a][judged[i]].told)
                    RT_TRY(told(c, e, a, (int)judged[i], list, err));
        RT_TRY(untold(c, a, list, err));
    }
    if (c->n_arms > 1 && rt_json_len(list) == before)
        RT_TRY(rt_json_set_string(list, NULL, "Nothing can be said: no evaluation left sums for the same sequences or problems in two arms.", err));
    RT_TRY(few_seeds(c, list, err));
    if (!controlled)
        RT_TRY(rt_json_set_string(list, NULL, "Arms that the warnings name differ in more than their treatment: their differences need not come from it.",
                                  err));
out:
    return st;
}

enum rt_status rt_compare_words(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(differs(c, err));
    RT_TRY(verdict(c, err));
out:
    return st;
}
