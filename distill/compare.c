#include "distill/compare_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RESAMPLES = 2000, SEED = 20240917 };

/* ---- units of one evaluation, over runs ---- */
static const struct rt_cmp_unit *unit_of(const struct rt_cmp_eval *e, const char *id)
{
    int64_t lo = 0, hi = e->n_units;
    while (lo < hi) {
        const int64_t mid = lo + (hi - lo) / 2;
        const int c = strcmp(e->unit[mid].id, id);
        if (c == 0)
            return &e->unit[mid];
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

/* num[i], den[i] = sums over the arm's runs of unit i of `ref`; den 0 where a run lacks it. only: one seed's runs, or NULL for all. */
static void arm_sums(const struct rt_comparison *c, const struct rt_cmp_arm *a, int eval, const struct rt_cmp_eval *ref, int m,
                     const int64_t *only, double *num, double *den)
{
    for (int64_t i = 0; i < ref->n_units; i++) {
        num[i] = den[i] = 0;
        for (int k = 0; k < a->n_runs; k++) {
            const struct rt_cmp_run *r = &c->run[a->run[k]];
            if (only != NULL && r->seed != *only)
                continue;
            const struct rt_cmp_eval *e = rt_cmp_eval_at(r, eval);
            const struct rt_cmp_unit *u = e != NULL && rt_cmp_same_quantity(ref, e, m) ? unit_of(e, ref->unit[i].id) : NULL;
            if (u == NULL || !(u->den[m] > 0)) {
                den[i] = 0;
                break;
            }
            num[i] += u->num[m];
            den[i] += u->den[m];
        }
    }
}

/* The evaluation of the arm's first run that has sums. */
static const struct rt_cmp_eval *reference(const struct rt_comparison *c, const struct rt_cmp_arm *a, int eval)
{
    for (int k = 0; k < a->n_runs; k++) {
        const struct rt_cmp_eval *e = rt_cmp_eval_at(&c->run[a->run[k]], eval);
        if (e != NULL && e->n_units > 0)
            return e;
    }
    return NULL;
}

/* ---- one arm ---- */
static void arm_result(struct rt_comparison *c, int arm, int eval, int m, double *scratch)
{
    const struct rt_cmp_arm *a = &c->arm[arm];
    struct rt_cmp_result *out = &c->result[eval][arm][m];
    const struct rt_cmp_eval *ref = reference(c, a, eval);
    double per_seed[RT_CMP_MAX_RUNS];
    *out = (struct rt_cmp_result){.value = {NAN, NAN, NAN, 0}, .seed_mean = NAN, .seed_sd = NAN};
    for (int k = 0; k < a->n_runs; k++) {
        const struct rt_cmp_eval *e = rt_cmp_eval_at(&c->run[a->run[k]], eval);
        if (e == NULL || isnan(e->value[m]) || (ref != NULL && !rt_cmp_same_quantity(ref, e, m)))
            continue;
        per_seed[out->seeds++] = e->value[m];
        if (out->seeds == 1)
            out->value = (struct rt_interval){e->value[m], e->lo[m], e->hi[m], (int64_t)(isnan(e->count[m]) ? 0 : e->count[m])};
    }
    out->seed_mean = rt_stats_mean(per_seed, out->seeds);
    out->seed_sd = rt_stats_sd(per_seed, out->seeds);
    if (out->seeds > 1)
        out->value = (struct rt_interval){out->seed_mean, NAN, NAN, 0};
    if (out->seeds == 0 || ref == NULL)
        return;
    double *num = scratch, *den = scratch + ref->n_units;
    struct rt_ratio pooled = {0};
    arm_sums(c, a, eval, ref, m, NULL, num, den);
    for (int64_t i = 0; i < ref->n_units; i++)
        if (den[i] > 0)
            rt_ratio_add(&pooled, num[i], den[i]);
    if (pooled.clusters == 0)
        return;
    out->value.n = pooled.clusters;
    if (rt_cmp_metric_info[m].share)
        rt_ratio_share(&pooled, pooled.sn, &out->value.mean, &out->value.lo, &out->value.hi);
    else
        rt_ratio_result(&pooled, &out->value.mean, &out->value.lo, &out->value.hi);
}

/* ---- two arms ---- */
static bool has_seed(const struct rt_comparison *c, const struct rt_cmp_arm *a, int64_t seed)
{
    for (int k = 0; k < a->n_runs; k++)
        if (c->run[a->run[k]].seed == seed)
            return true;
    return false;
}

bool rt_cmp_same_quantity(const struct rt_cmp_eval *a, const struct rt_cmp_eval *b, int metric)
{
    return metric == RT_CMP_KL      ? rt_eval_key_same_kl(&a->key, &b->key)
           : metric == RT_CMP_PASS1 ? rt_eval_key_same_answers(&a->key, &b->key)
                                    : true;
}

static enum rt_status arm_difference(struct rt_comparison *c, int arm, int eval, int m, double *scratch, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_cmp_arm *a = &c->arm[0], *b = &c->arm[arm];
    struct rt_cmp_difference *out = &c->diff[eval][arm][m];
    const struct rt_cmp_eval *ref = reference(c, a, eval);
    *out = (struct rt_cmp_difference){.value = {NAN, NAN, NAN, 0}};
    const struct rt_cmp_eval *other = reference(c, b, eval);
    if (ref == NULL || other == NULL || !rt_cmp_same_quantity(ref, other, m))
        return RT_OK;
    const int64_t n = ref->n_units;
    double *na = scratch, *da = na + n, *nb = da + n, *db = nb + n;
    arm_sums(c, a, eval, ref, m, NULL, na, da);
    arm_sums(c, b, eval, ref, m, NULL, nb, db);
    RT_TRY(rt_stats_difference(na, da, nb, db, n, RESAMPLES, SEED, &out->value, err));
    for (int k = 0; k < b->n_runs && out->value.n > 0; k++) {
        const int64_t seed = c->run[b->run[k]].seed;
        double sa = 0, wa = 0, sb = 0, wb = 0;
        if (!has_seed(c, a, seed))
            continue;
        arm_sums(c, a, eval, ref, m, &seed, na, da);
        arm_sums(c, b, eval, ref, m, &seed, nb, db);
        for (int64_t i = 0; i < n; i++)
            if (da[i] > 0 && db[i] > 0) {
                sa += na[i];
                wa += da[i];
                sb += nb[i];
                wb += db[i];
            }
        if (!(wa > 0 && wb > 0))
            continue;
        out->seeds++;
        out->same_sign += (sb / wb - sa / wa > 0) == (out->value.mean > 0) && sb / wb != sa / wa;
    }
    out->told = out->value.n > 1 && (out->value.lo > 0 || out->value.hi < 0) && out->same_sign == out->seeds;
out:
    return st;
}

/* ---- arms as a whole ---- */
static double mean_of(const struct rt_comparison *c, const struct rt_cmp_arm *a, const char *object, const char *key)
{
    double sum = 0, v;
    int n = 0;
    for (int k = 0; k < a->n_runs; k++) {
        const struct rt_json *o = c->run[a->run[k]].run, *x;
        o = object != NULL ? rt_json_get(o, object) : o;
        if ((x = rt_json_get(o, key)) != NULL && rt_json_as_double(x, &v)) {
            sum += v;
            n++;
        }
    }
    return n > 0 ? sum / n : NAN;
}

static void describe_arm(const struct rt_comparison *c, struct rt_cmp_arm *a)
{
    static const char *const weight[] = {"ce", "kl", "feature", "alm"};
    a->tokens = mean_of(c, a, NULL, "tokens");
    a->targets = mean_of(c, a, NULL, "targets");
    a->seconds = mean_of(c, a, NULL, "seconds");
    a->flops = mean_of(c, a, NULL, "flops");
    a->peak = mean_of(c, a, NULL, "peak_memory");
    a->tokens_per_second = mean_of(c, a, NULL, "tokens_per_second");
    for (int i = 0; i < 4; i++)
        a->weight[i] = mean_of(c, a, "weights", weight[i]);
    for (int i = 0; i < RT_CURVES; i++)
        a->final[i] = mean_of(c, a, "final", rt_cmp_curve_info[i].key);
}

enum rt_status rt_compare_judge(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    double *scratch = NULL;
    int64_t most = 1;
    RT_TRY(rt_compare_match(c, err));
    for (int r = 0; r < c->n_runs; r++)
        for (int i = 0; i < c->run[r].n_evals; i++)
            most = c->run[r].eval[i].n_units > most ? c->run[r].eval[i].n_units : most;
    RT_TRY(rt_alloc((size_t)most, 4 * sizeof *scratch, "sums", &scratch, err));
    for (int a = 0; a < c->n_arms; a++)
        describe_arm(c, &c->arm[a]);
    for (int e = 0; e < c->n_evals; e++)
        for (int a = 0; a < c->n_arms; a++)
            for (int m = 0; m < RT_CMP_METRICS; m++) {
                if (!c->has[e][m])
                    continue;
                arm_result(c, a, e, m, scratch);
                if (a > 0)
                    RT_TRY(arm_difference(c, a, e, m, scratch, err));
            }
out:
    rt_free(scratch);
    return st;
}

/* ---- as JSON ---- */
static enum rt_status interval_json(struct rt_json *o, const struct rt_interval *v, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *ci;
    RT_TRY(rt_json_set_double(o, "value", v->mean, err));
    RT_TRY(rt_json_set_array(o, "ci", &ci, err));
    RT_TRY(rt_json_set_double(ci, NULL, v->lo, err));
    RT_TRY(rt_json_set_double(ci, NULL, v->hi, err));
    RT_TRY(rt_json_set_int(o, "n", v->n, err));
out:
    return st;
}

static enum rt_status arms_json(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list, *o, *runs, *w;
    static const char *const weight[] = {"ce", "kl", "feature", "alm"};
    RT_TRY(rt_json_set_array(c->report, "arms", &list, err));
    for (int i = 0; i < c->n_arms; i++) {
        const struct rt_cmp_arm *a = &c->arm[i];
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_string(o, "name", a->name, err));
        if (a->description != NULL)
            RT_TRY(rt_json_set_string(o, "description", a->description, err));
        RT_TRY(rt_json_set_array(o, "runs", &runs, err));
        for (int k = 0; k < a->n_runs; k++)
            RT_TRY(rt_json_set_string(runs, NULL, c->run[a->run[k]].path, err));
        RT_TRY(rt_json_set_object(o, "weights", &w, err));
        for (int k = 0; k < 4; k++) /* alm stands in run.json only where it is used */
            if (k < 3 || !isnan(a->weight[k]))
                RT_TRY(rt_json_set_double(w, weight[k], a->weight[k], err));
        RT_TRY(rt_json_set_double(o, "tokens", a->tokens, err));
        RT_TRY(rt_json_set_double(o, "targets", a->targets, err));
        RT_TRY(rt_json_set_double(o, "seconds", a->seconds, err));
        RT_TRY(rt_json_set_double(o, "tokens_per_second", a->tokens_per_second, err));
        RT_TRY(rt_json_set_double(o, "flops", a->flops, err));
        RT_TRY(rt_json_set_double(o, "peak_memory", a->peak, err));
        RT_TRY(rt_json_set_object(o, "final", &w, err));
        for (int k = 0; k < RT_CURVES; k++)
            if (!isnan(a->final[k]))
                RT_TRY(rt_json_set_double(w, rt_cmp_curve_info[k].key, a->final[k], err));
    }
out:
    return st;
}

static enum rt_status result_json(const struct rt_comparison *c, int e, int a, int m, struct rt_json *results, struct rt_json *differences,
                                  struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *o;
    const struct rt_cmp_result *r = &c->result[e][a][m];
    const struct rt_cmp_difference *d = &c->diff[e][a][m];
    RT_TRY(rt_json_set_object(results, NULL, &o, err));
    RT_TRY(rt_json_set_string(o, "eval", c->eval[e], err));
    RT_TRY(rt_json_set_string(o, "arm", c->arm[a].name, err));
    RT_TRY(rt_json_set_string(o, "metric", rt_cmp_metric_info[m].key, err));
    RT_TRY(interval_json(o, &r->value, err));
    RT_TRY(rt_json_set_int(o, "seeds", r->seeds, err));
    RT_TRY(rt_json_set_double(o, "seed_mean", r->seed_mean, err));
    RT_TRY(rt_json_set_double(o, "seed_sd", r->seed_sd, err));
    if (a == 0)
        goto out;
    RT_TRY(rt_json_set_object(differences, NULL, &o, err));
    RT_TRY(rt_json_set_string(o, "eval", c->eval[e], err));
    RT_TRY(rt_json_set_string(o, "arm", c->arm[a].name, err));
    RT_TRY(rt_json_set_string(o, "against", c->arm[0].name, err));
    RT_TRY(rt_json_set_string(o, "metric", rt_cmp_metric_info[m].key, err));
    RT_TRY(interval_json(o, &d->value, err));
    RT_TRY(rt_json_set_int(o, "seeds", d->seeds, err));
    RT_TRY(rt_json_set_int(o, "same_sign", d->same_sign, err));
    RT_TRY(rt_json_set_bool(o, "told", d->told, err));
out:
    return st;
}

static enum rt_status results_json(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *results, *differences;
    RT_TRY(rt_json_set_array(c->report, "results", &results, err));
    RT_TRY(rt_json_set_array(c->report, "differences", &differences, err));
    for (int e = 0; e < c->n_evals; e++)
        for (int m = 0; m < RT_CMP_METRICS; m++)
            for (int a = 0; a < c->n_arms && c->has[e][m]; a++)
                RT_TRY(result_json(c, e, a, m, results, differences, err));
out:
    return st;
}

enum rt_status rt_compare(const char *const *paths, int n, struct rt_log *log, struct rt_comparison **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_comparison *c = NULL;
    RT_TRY(rt_alloc(1, sizeof *c, "comparison", &c, err));
    RT_TRY(rt_compare_load(paths, n, log, c, err));
    RT_TRY(rt_compare_group(c, err));
    RT_TRY(rt_compare_judge(c, err));
    RT_TRY(rt_json_new_object(&c->report, err));
    RT_TRY(rt_json_set_int(c->report, "version", 1, err));
    RT_TRY(arms_json(c, err));
    RT_TRY(results_json(c, err));
    RT_TRY(rt_compare_check(c, err));
    RT_TRY(rt_compare_words(c, err));
    *out = c;
    c = NULL;
out:
    rt_comparison_free(c);
    return st;
}

void rt_comparison_free(struct rt_comparison *c)
{
    if (c == NULL)
        return;
    for (int i = 0; i < c->n_runs; i++) {
        struct rt_cmp_run *r = &c->run[i];
        for (int k = 0; k < r->n_evals; k++) {
            rt_free(r->eval[k].unit);
            rt_buf_free(&r->eval[k].history);
        }
        for (int k = 0; k < RT_CURVES; k++)
            rt_buf_free(&r->curve[k]);
        rt_buf_free(&r->step);
        rt_free(r->eval);
        free(r->description);
        rt_json_free(r->run);
    }
    rt_json_free(c->report);
    rt_free(c->run);
    rt_free(c->arm);
    rt_free(c);
}
