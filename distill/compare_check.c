/* Are the runs comparable? What differs beyond the treatment, and what was not measured. */
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "distill/compare_parts.h"
#include "formats/unicode.h"

enum rt_status rt_cmp_say(struct rt_json *list, struct rt_err *err, const char *fmt, ...)
{
    char text[20000]; /* paths are long at most; what is longer ends with a whole character */
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return rt_json_set_string_n(list, NULL, text, rt_utf8_prefix(text, n < (int)sizeof text ? (size_t)n : sizeof text - 1), err);
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

/* ---- training ---- */
static bool differ(const char *a, const char *b)
{
    return a[0] != '\0' && b[0] != '\0' && strcmp(a, b) != 0;
}

static bool number_of(const struct rt_cmp_run *r, const char *key, int64_t *v)
{
    return rt_json_as_int(rt_json_get(r->run, key), v);
}

static enum rt_status check_recipe(const struct rt_cmp_run *r, const struct rt_cmp_run *p, struct rt_json *list, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *option, *x, *y;
    for (size_t at = 0; rt_cmp_option_differs(r, p, &at, &option, &x, &y);)
        if (rt_cmp_role(option) == RT_CMP_RECIPE)
            RT_TRY(rt_cmp_say(list, err, "%s was trained with --%s %s, %s with %s: a difference may come from it", r->label, option,
                              x[0] != '\0' ? x : "(none)", p->label, y[0] != '\0' ? y : "(none)"));
out:
    return st;
}

/* *same becomes false where the two began, or went on, from something else or in another way. */
static enum rt_status check_pair(const struct rt_cmp_run *r, const struct rt_cmp_run *p, bool *same, struct rt_json *list, struct rt_err *err)
{
    static const char *const counts[] = {"tokens", "steps", "parameters"};
    enum rt_status st = RT_OK;
    int64_t a, b;
    const size_t before = rt_json_len(list);
    if (differ(rt_cmp_text(r->run, NULL, "order_sha256"), rt_cmp_text(p->run, NULL, "order_sha256")))
        RT_TRY(rt_cmp_say(list, err, "%s saw other sequences, or in another order, than %s: a difference may come from the data", r->label, p->label));
    if (differ(rt_cmp_text(r->run, "init", "sha256"), rt_cmp_text(p->run, "init", "sha256")))
        RT_TRY(rt_cmp_say(list, err, "%s began from other parameters than %s: a difference may come from the initialisation", r->label, p->label));
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        if (number_of(r, counts[i], &a) && number_of(p, counts[i], &b) && a != b)
            RT_TRY(rt_cmp_say(list, err, "%s has %" PRId64 " %s%s, %s has %" PRId64, r->label, a, i == 1 ? "optimiser " : "", counts[i], p->label, b));
    RT_TRY(check_recipe(r, p, list, err));
    *same &= rt_json_len(list) == before;
out:
    return st;
}

/* ---- evaluations ---- */
/* "`retort eval ...` adds it", from what another run has; "" where `eval` cannot. */
static void what_would_help(const struct rt_comparison *c, const struct rt_cmp_run *r, int e, char *out, size_t cap)
{
    static const char *const words[] = {" --samples %.0f", " --temperature %g", " --top-p %g", " --max-tokens %.0f"};
    const struct rt_eval_key *key = NULL;
    out[0] = '\0';
    for (int i = 0; i < c->n_runs && key == NULL; i++)
        key = c->run[i].at[e] >= 0 ? &c->run[i].eval[c->run[i].at[e]].key : NULL;
    if (!r->finished || key == NULL || key->data[0] == '\0' || c->trained[e])
        return;
    size_t at = (size_t)snprintf(out, cap, ": `retort eval --student %s --data %s", r->path, key->data);
    if (!isnan(key->T) && key->T != 1)
        at += (size_t)snprintf(out + at, cap - at, " --kd-temperature %g", key->T);
    for (int i = 0; i < RT_KEY_EXACT; i++)
        if (!isnan(key->sampling[i]))
            at += (size_t)snprintf(out + at, cap - at, words[i], key->sampling[i]);
    snprintf(out + at, cap - at, "%s` adds it", key->sampling[RT_KEY_EXACT] > 0 ? " --verify exact" : "");
}

static enum rt_status check_keys(const char *eval, const struct rt_cmp_run *r, const struct rt_eval_key *x, const struct rt_cmp_run *p,
                                 const struct rt_eval_key *y, struct rt_json *list, struct rt_err *err)
{
    static const char *const sampling[] = {"samples", "temperature", "top-p", "max-tokens", "verify exact"};
    static const char *const when[] = {"as it was saved", "in training"};
    const bool by_train = strcmp(x->by, "train") == 0;
    enum rt_status st = RT_OK;
    if (!rt_eval_key_same_data(x, y))
        RT_TRY(rt_cmp_say(list, err, "%s: the data differ, %s was evaluated on %s, %s on %s: only sequences in both are paired%s", eval, r->label,
                          x->data, p->label, y->data, strcmp(x->problems, y->problems) != 0 ? ", and no problems" : ""));
    if (differ(x->by, y->by))
        RT_TRY(rt_cmp_say(list, err, "%s: %s was evaluated %s, %s %s: elements of another type may make a small difference", eval, r->label, when[by_train],
                          p->label, when[!by_train]));
    if (!rt_eval_key_same_kl(x, y))
        RT_TRY(rt_cmp_say(list, err, "%s: %s was evaluated at T = %g, %s at T = %g: their KL are different quantities and are not paired", eval, r->label, x->T,
                          p->label, y->T));
    for (int i = 0; i < RT_KEY_SAMPLING; i++)
        if (x->sampling[i] != y->sampling[i] && !isnan(x->sampling[i]) && !isnan(y->sampling[i]))
            RT_TRY(rt_cmp_say(list, err, "%s: %s answered with %s %g, %s with %g: their pass@1 are not paired", eval, r->label, sampling[i], x->sampling[i],
                              p->label, y->sampling[i]));
out:
    return st;
}

static enum rt_status check_evals(const struct rt_comparison *c, const struct rt_cmp_run *r, const struct rt_cmp_run *p, struct rt_json *list,
                                  struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char help[9000];
    for (int e = 0; e < c->n_evals; e++) {
        const struct rt_cmp_eval *x = rt_cmp_eval_at(r, e), *y = rt_cmp_eval_at(p, e);
        if (x == NULL) {
            what_would_help(c, r, e, help, sizeof help);
            RT_TRY(rt_cmp_say(list, err, "%s was not evaluated on %s%s", r->label, c->eval[e], help));
            continue;
        }
        if (y == NULL || x == y)
            continue;
        RT_TRY(check_keys(c->eval[e], r, &x->key, p, &y->key, list, err));
        if (x->n_units != y->n_units)
            RT_TRY(rt_cmp_say(list, err, "%s: %s has sums for %" PRId64 " sequences and problems, %s for %" PRId64 "; only those in both are paired",
                              c->eval[e], r->label, x->n_units, p->label, y->n_units));
        if (x->step != y->step)
            RT_TRY(rt_cmp_say(list, err, "%s: %s was last evaluated at step %" PRId64 ", %s at step %" PRId64, c->eval[e], r->label, x->step, p->label,
                              y->step));
    }
out:
    return st;
}

/* ---- arms ---- */
static enum rt_status check_arms(const struct rt_comparison *c, struct rt_json *list, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char why[RT_CMP_WHY];
    for (int b = 1; b < c->n_arms; b++) {
        const struct rt_cmp_run *y = &c->run[c->arm[b].run[0]];
        for (int a = 0; a < b; a++) {
            const struct rt_cmp_run *x = &c->run[c->arm[a].run[0]];
            if (strcmp(x->arm, y->arm) != 0)
                continue;
            if (!rt_cmp_replicates(x, y, why))
                RT_TRY(rt_cmp_say(list, err, "%s and %s are both called %s and are no replicates (%s): they are arms of their own here, named by their "
                                  "paths", x->path, y->path, x->arm, why));
            break;
        }
        if (c->arm[b].n_runs != c->arm[0].n_runs)
            RT_TRY(rt_cmp_say(list, err, "%s has %d runs, %s has %d", c->arm[b].name, c->arm[b].n_runs, c->arm[0].name, c->arm[0].n_runs));
    }
out:
    return st;
}

enum rt_status rt_compare_check(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list;
    int64_t skipped;
    bool same = true;
    RT_TRY(rt_json_set_array(c->report, "warnings", &list, err));
    RT_TRY(check_arms(c, list, err));
    for (int a = 0; a < c->n_arms; a++)
        for (int k = 0; k < c->arm[a].n_runs; k++) {
            const struct rt_cmp_run *r = &c->run[c->arm[a].run[k]], *p = partner(c, r);
            if (!r->finished)
                RT_TRY(rt_cmp_say(list, err, "%s is not finished: its numbers are those of its last evaluation", r->label));
            if (number_of(r, "skipped_steps", &skipped) && skipped > 0)
                RT_TRY(rt_cmp_say(list, err, "%s left out %" PRId64 " steps (losses or gradients that were not finite, or spikes of the gradient)", r->label,
                                  skipped));
            if (a > 0)
                RT_TRY(check_pair(r, p, &same, list, err));
            RT_TRY(check_evals(c, r, a > 0 ? p : &c->run[c->arm[0].run[0]], list, err));
        }
    RT_TRY(rt_json_set_bool(c->report, "controlled", same, err));
out:
    return st;
}
