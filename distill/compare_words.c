#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "distill/compare.h"

/* ---- are the runs comparable? ---- */
static const char *text_at(const struct rt_json *v, const char *object, const char *key)
{
    const struct rt_json *o = object != NULL ? rt_json_get(v, object) : v;
    const char *s = rt_json_as_string(rt_json_get(o, key), NULL);
    return s != NULL ? s : "";
}

static enum rt_status warn(struct rt_json *list, struct rt_err *err, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static enum rt_status warn(struct rt_json *list, struct rt_err *err, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return rt_json_set_string(list, NULL, text, err);
}

/* The run that r is held against: the first arm's with the same seed, else its first. */
static const struct rt_cmp_run *partner(const struct rt_comparison *c, const struct rt_cmp_run *r)
{
    const struct rt_cmp_arm *a = &c->arm[0];
    for (int k = 0; k < a->n_runs; k++)
        if (c->run[a->run[k]].seed == r->seed)
            return &c->run[a->run[k]];
    return &c->run[a->run[0]];
}

static bool differ(const char *a, const char *b)
{
    return a[0] != '\0' && b[0] != '\0' && strcmp(a, b) != 0;
}

static bool number_of(const struct rt_cmp_run *r, const char *key, int64_t *v)
{
    const struct rt_json *x = rt_json_get(r->run, key);
    return x != NULL && rt_json_as_int(x, v);
}

/* *same becomes false where the two began, or went on, from something else. */
static enum rt_status check_pair(const struct rt_cmp_run *r, const struct rt_cmp_run *p, bool *same, struct rt_json *list, struct rt_err *err)
{
    static const char *const counts[] = {"tokens", "steps", "parameters"};
    enum rt_status st = RT_OK;
    int64_t a, b;
    const size_t before = rt_json_len(list);
    if (differ(text_at(r->run, NULL, "order_sha256"), text_at(p->run, NULL, "order_sha256")))
        RT_TRY(warn(list, err, "%s saw other sequences, or in another order, than %s: a difference may come from the data", r->label, p->label));
    if (differ(text_at(r->run, "init", "sha256"), text_at(p->run, "init", "sha256")))
        RT_TRY(warn(list, err, "%s began from other parameters than %s: a difference may come from the initialisation", r->label, p->label));
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        if (number_of(r, counts[i], &a) && number_of(p, counts[i], &b) && a != b)
            RT_TRY(warn(list, err, "%s has %lld %s%s, %s has %lld", r->label, (long long)a, i == 1 ? "optimiser " : "", counts[i], p->label, (long long)b));
    *same &= rt_json_len(list) == before;
out:
    return st;
}

static enum rt_status check_evals(const struct rt_comparison *c, const struct rt_cmp_run *r, const struct rt_cmp_run *p, struct rt_json *list,
                                  struct rt_err *err)
{
    static const char *const sampling[] = {"samples", "temperature", "top-p", "max-tokens"};
    enum rt_status st = RT_OK;
    for (int e = 0; e < c->n_evals; e++) {
        const struct rt_cmp_eval *x = NULL, *y = NULL;
        for (int i = 0; i < r->n_evals; i++)
            x = strcmp(r->eval[i].name, c->eval[e]) == 0 ? &r->eval[i] : x;
        for (int i = 0; i < p->n_evals; i++)
            y = strcmp(p->eval[i].name, c->eval[e]) == 0 ? &p->eval[i] : y;
        if (x == NULL && r == p)
            continue;
        if (x == NULL) {
            RT_TRY(warn(list, err, "%s was not evaluated on %s", r->label, c->eval[e]));
            continue;
        }
        if (y == NULL || x == y)
            continue;
        if (x->n_units != y->n_units)
            RT_TRY(warn(list, err, "%s: %s has sums for %lld sequences and problems, %s for %lld; only those in both are paired", c->eval[e], r->label,
                        (long long)x->n_units, p->label, (long long)y->n_units));
        if (x->T != y->T && !isnan(x->T) && !isnan(y->T))
            RT_TRY(warn(list, err, "%s: %s was evaluated at T = %g, %s at T = %g: their KL are different quantities and are not paired", c->eval[e], r->label, x->T, p->label, y->T));
        for (int i = 0; i < 4; i++)
            if (x->sampling[i] != y->sampling[i] && !isnan(x->sampling[i]) && !isnan(y->sampling[i]))
                RT_TRY(warn(list, err, "%s: %s answered with %s %g, %s with %g: their pass@1 are not paired", c->eval[e], r->label, sampling[i], x->sampling[i], p->label, y->sampling[i]));
        if (x->step != y->step)
            RT_TRY(warn(list, err, "%s: %s was last evaluated at step %lld, %s at step %lld", c->eval[e], r->label, (long long)x->step, p->label,
                        (long long)y->step));
    }
out:
    return st;
}

static enum rt_status warnings(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list;
    int64_t skipped;
    bool same = true;
    RT_TRY(rt_json_set_array(c->report, "warnings", &list, err));
    for (int i = 0; i < c->n_runs; i++) {
        const struct rt_cmp_run *r = &c->run[i], *p = partner(c, r);
        if (!r->finished)
            RT_TRY(warn(list, err, "%s is not finished: its numbers are those of its last evaluation", r->label));
        if (number_of(r, "skipped_steps", &skipped) && skipped > 0)
            RT_TRY(warn(list, err, "%s left out %lld steps (losses or gradients that were not finite, or spikes of the gradient)", r->label, (long long)skipped));
        if (r != p && strcmp(r->arm, p->arm) != 0)
            RT_TRY(check_pair(r, p, &same, list, err));
        RT_TRY(check_evals(c, r, p, list, err));
    }
    for (int a = 1; a < c->n_arms; a++)
        if (c->arm[a].n_runs != c->arm[0].n_runs)
            RT_TRY(warn(list, err, "%s has %d runs, %s has %d", c->arm[a].name, c->arm[a].n_runs, c->arm[0].name, c->arm[0].n_runs));
    RT_TRY(rt_json_set_bool(c->report, "controlled", same, err));
out:
    return st;
}

/* ---- what differs between the arms' commands ---- */
/* An option that says where, or is the seed of a run: not a treatment. */
static bool incidental(const char *key)
{
    return strcmp(key, "out") == 0 || strcmp(key, "seed") == 0 || strcmp(key, "config") == 0;
}

static const char *option(const struct rt_comparison *c, int arm, const char *key)
{
    return text_at(c->run[c->arm[arm].run[0]].run, "options", key);
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
        if (strcmp(text_at(rt_json_at(list, i), NULL, "option"), key) == 0)
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
    return warn(list, err, "%s: %s is %s than %s in %s: %s against %s (difference %s, 95 %% interval %s to %s, %lld paired%s).", c->eval[e],
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

static bool one_seed(const struct rt_comparison *c)
{
    for (int e = 0; e < c->n_evals; e++)
        for (int a = 1; a < c->n_arms; a++)
            for (int i = 0; i < N_JUDGED; i++)
                if (c->diff[e][a][judged[i]].seeds == 1)
                    return true;
    return false;
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
    if (one_seed(c))
        RT_TRY(rt_json_set_string(list, NULL, "One seed an arm: the intervals cover the evaluation data, not the spread between trainings.", err));
    if (!controlled)
        RT_TRY(rt_json_set_string(list, NULL, "Arms that the warnings name differ in more than their treatment: their differences need not come from it.", err));
out:
    return st;
}

enum rt_status rt_compare_words(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(warnings(c, err));
    RT_TRY(differs(c, err));
    RT_TRY(verdict(c, err));
out:
    return st;
}
