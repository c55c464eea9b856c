#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/compare.h"
#include "distill/jsonl.h"
#include "distill/run_record.h"

enum { PATH_CAP = 4096 };
static const size_t max_record = (size_t)64 << 20;

const struct rt_cmp_metric_info rt_cmp_metric_info[RT_CMP_METRICS] = {
    {"ce", "Cross-entropy", "cross-entropy", "nats a target", true, false},
    {"kl", "KL to the teacher", "KL to the teacher", "nats a row", true, false},
    {"agreement", "Agreement with the teacher", "agreement with the teacher", "rows with the teacher's argmax", false, true},
    {"accuracy", "Next-token accuracy", "next-token accuracy", "targets", false, true},
    {"pass1", "pass@1", "pass@1", "problems", false, true},
};
const struct rt_cmp_curve_info rt_cmp_curve_info[RT_CURVES] = {
    {"loss", "Training loss", "nats"},  {"ce", "Cross-entropy", "nats a target"}, {"kl", "KL to the teacher", "nats a row, times T²"},
    {"feature", "Feature loss", "as configured"}, {"grad_norm", "Gradient norm", "before clipping"},
};

static void copy(char *out, size_t cap, const char *s)
{
    snprintf(out, cap, "%s", s);
}

/* ---- the sums of one evaluation ---- */
static bool share(struct rt_cmp_unit *u, int metric, double num, double den)
{
    if (!(den > 0) || isnan(num))
        return false;
    u->num[metric] = num;
    u->den[metric] = den;
    return true;
}

static enum rt_status unit_of(const struct rt_json *v, struct rt_cmp_unit *u, struct rt_err *err)
{
    enum rt_status st;
    const char *kind;
    *u = (struct rt_cmp_unit){0};
    RT_TRY(rt_json_string(v, "kind", &kind, err));
    if (strcmp(kind, "problem") == 0) {
        int64_t line;
        RT_TRY(rt_json_int(v, "line", 0, INT64_MAX, &line, err));
        snprintf(u->id, sizeof u->id, "p%" PRId64, line);
        const double n = rt_eval_number(v, "samples");
        share(u, RT_CMP_PASS1, rt_eval_number(v, "correct"), n);
    } else {
        const char *key;
        int64_t occurrence;
        RT_TRY(rt_json_string(v, "key", &key, err));
        RT_TRY(rt_json_int(v, "occurrence", 0, UINT32_MAX, &occurrence, err));
        snprintf(u->id, sizeof u->id, "s%.32s %" PRId64, key, occurrence);
        share(u, RT_CMP_CE, rt_eval_number(v, "ce"), rt_eval_number(v, "targets"));
        share(u, RT_CMP_ACCURACY, rt_eval_number(v, "correct"), rt_eval_number(v, "targets"));
        share(u, RT_CMP_KL, rt_eval_number(v, "kl"), rt_eval_number(v, "kl_rows"));
        share(u, RT_CMP_AGREEMENT, rt_eval_number(v, "agree"), rt_eval_number(v, "kl_rows"));
    }
out:
    return st;
}

static int by_id(const void *a, const void *b)
{
    return strcmp(((const struct rt_cmp_unit *)a)->id, ((const struct rt_cmp_unit *)b)->id);
}

/* A path that a run's own file names: inside the run, so without a part "..". */
static bool inside(const char *path)
{
    bool up = path[0] == '/' || path[0] == '\0';
    for (const char *p = path; p != NULL && !up; p = strchr(p, '/') != NULL ? strchr(p, '/') + 1 : NULL)
        up = strncmp(p, "..", 2) == 0 && (p[2] == '/' || p[2] == '\0');
    return !up;
}

static enum rt_status load_units(const struct rt_cmp_run *r, const char *name, struct rt_cmp_eval *e, struct rt_err *err)
{
    enum rt_status st;
    char path[PATH_CAP];
    struct rt_jsonl f = {0};
    struct rt_buf units = {0};
    const struct rt_json *v;
    struct rt_cmp_unit u;
    if (!inside(name))
        RT_FAIL(err, FORMAT, "%s: \"per_sequence\" names '%.200s', which is not inside the run", r->path, name);
    RT_TRY(rt_path_join(path, sizeof path, r->path, name, err));
    if (!rt_path_exists(path))
        return RT_OK;
    RT_TRY(rt_jsonl_open(path, &f, err));
    for (;;) {
        RT_TRY(rt_jsonl_next(&f, &v, err));
        if (v == NULL)
            break;
        RT_TRY(unit_of(v, &u, err));
        RT_TRY(rt_buf_append(&units, &u, sizeof u, err));
    }
    rt_free(e->unit);
    e->unit = NULL;
    e->n_units = (int64_t)(units.len / sizeof u);
    RT_TRY(rt_alloc((size_t)e->n_units, sizeof u, "evaluation", &e->unit, err));
    if (units.len > 0)
        memcpy(e->unit, units.data, units.len);
    qsort(e->unit, (size_t)e->n_units, sizeof u, by_id);
    for (int64_t i = 1; i < e->n_units; i++)
        if (by_id(&e->unit[i - 1], &e->unit[i]) == 0)
            RT_FAIL(err, FORMAT, "%s: two lines for '%s'", path, e->unit[i].id + 1);
out:
    rt_buf_free(&units);
    rt_jsonl_close(&f);
    return st;
}

/* ---- evaluations ---- */
static void read_values(const struct rt_json *v, struct rt_cmp_eval *e)
{
    static const char *const count[RT_CMP_METRICS] = {"n_tokens", "kl_rows", "kl_rows", "n_tokens", "n_problems"};
    char key[32];
    for (int m = 0; m < RT_CMP_METRICS; m++) {
        const struct rt_json *ci;
        e->value[m] = rt_eval_number(v, rt_cmp_metric_info[m].key);
        e->count[m] = rt_eval_number(v, count[m]);
        e->lo[m] = e->hi[m] = NAN;
        snprintf(key, sizeof key, "%s_ci", rt_cmp_metric_info[m].key);
        ci = rt_json_get(v, key);
        if (rt_json_len(ci) == 2 && !(rt_json_as_double(rt_json_at(ci, 0), &e->lo[m]) && rt_json_as_double(rt_json_at(ci, 1), &e->hi[m])))
            e->lo[m] = e->hi[m] = NAN;
    }
}

static struct rt_cmp_eval *find_eval(struct rt_cmp_run *r, const struct rt_eval_key *key)
{
    for (int i = 0; i < r->n_evals; i++)
        if (rt_eval_key_same(&r->eval[i].key, key))
            return &r->eval[i];
    if (r->n_evals == RT_CMP_MAX_EVALS)
        return NULL;
    struct rt_cmp_eval *e = &r->eval[r->n_evals++];
    e->key = *key;
    e->step = -1;
    return e;
}

static enum rt_status load_evals(struct rt_cmp_run *r, struct rt_err *err)
{
    enum rt_status st;
    char path[PATH_CAP], *units[RT_CMP_MAX_EVALS] = {0};
    struct rt_jsonl f = {0};
    const struct rt_json *v;
    RT_TRY(rt_alloc(RT_CMP_MAX_EVALS, sizeof *r->eval, "evaluations", &r->eval, err));
    RT_TRY(rt_path_join(path, sizeof path, r->path, RT_EVAL_FILE, err));
    if (!rt_path_exists(path))
        return RT_OK;
    RT_TRY(rt_jsonl_open(path, &f, err));
    for (;;) {
        const char *name, *file;
        int64_t step;
        struct rt_eval_key key;
        struct rt_cmp_point p;
        RT_TRY(rt_jsonl_next(&f, &v, err));
        if (v == NULL)
            break;
        RT_TRY(rt_json_string(v, "name", &name, err));
        RT_TRY(rt_json_int(v, "step", 0, INT64_MAX, &step, err));
        RT_TRY(rt_json_string_or(v, "per_sequence", "", &file, err));
        rt_eval_key_read(v, &key);
        struct rt_cmp_eval *e = find_eval(r, &key);
        if (e == NULL)
            RT_FAIL(err, FORMAT, "%s: more than %d different evaluations", path, RT_CMP_MAX_EVALS);
        if (step < e->step)
            continue;
        e->step = step;
        read_values(v, e);
        p.step = (double)step;
        memcpy(p.value, e->value, sizeof p.value);
        RT_TRY(rt_buf_append(&e->history, &p, sizeof p, err));
        free(units[e - r->eval]);
        units[e - r->eval] = file[0] != '\0' ? strdup(file) : NULL;
    }
    for (int i = 0; i < r->n_evals; i++)
        if (units[i] != NULL)
            RT_TRY(load_units(r, units[i], &r->eval[i], err));
out:
    for (int i = 0; i < RT_CMP_MAX_EVALS; i++)
        free(units[i]);
    rt_jsonl_close(&f);
    return st;
}

/* ---- curves ---- */
static enum rt_status load_curves(struct rt_cmp_run *r, struct rt_err *err)
{
    enum rt_status st;
    char path[PATH_CAP];
    struct rt_jsonl f = {0};
    const struct rt_json *v;
    RT_TRY(rt_path_join(path, sizeof path, r->path, "metrics.jsonl", err));
    if (!rt_path_exists(path))
        return RT_OK;
    RT_TRY(rt_jsonl_open(path, &f, err));
    for (;;) {
        RT_TRY(rt_jsonl_next(&f, &v, err));
        if (v == NULL)
            break;
        const double step = rt_eval_number(v, "step");
        bool skipped = false;
        if (isnan(step))
            RT_FAIL(err, FORMAT, "%s: \"step\" is missing: expected a number", rt_json_source(v));
        RT_TRY(rt_json_bool_or(v, "skipped", false, &skipped, err));
        if (skipped)
            continue;
        RT_TRY(rt_buf_append(&r->step, &step, sizeof step, err));
        for (int c = 0; c < RT_CURVES; c++) {
            const double y = rt_eval_number(v, rt_cmp_curve_info[c].key);
            RT_TRY(rt_buf_append(&r->curve[c], &y, sizeof y, err));
        }
    }
out:
    rt_jsonl_close(&f);
    return st;
}

/* ---- runs ---- */
/* A run twice would be an arm of two seeds, or paired with itself. */
static enum rt_status resolve(struct rt_comparison *c, struct rt_cmp_run *r, struct rt_err *err)
{
    if (realpath(r->path, r->real) == NULL)
        copy(r->real, sizeof r->real, r->path);
    for (const struct rt_cmp_run *other = c->run; other < r; other++)
        if (strcmp(other->real, r->real) == 0)
            return rt_fail(err, RT_USAGE, "%.1000s: this run is there already, as %.1000s: expected another one, or the run once", r->path, other->path);
    return RT_OK;
}

static enum rt_status add_run(struct rt_comparison *c, const char *path, const char *arm, const char *description, struct rt_err *err)
{
    enum rt_status st;
    char base[128];
    const char *name, *own;
    if (c->n_runs == RT_CMP_MAX_RUNS)
        RT_FAIL(err, USAGE, "more than %d runs", RT_CMP_MAX_RUNS);
    struct rt_cmp_run *r = &c->run[c->n_runs++];
    if (strlen(path) >= sizeof r->path)
        RT_FAIL(err, USAGE, "%.200s...: the path is too long", path);
    copy(r->path, sizeof r->path, path);
    for (size_t n = strlen(r->path); n > 1 && r->path[n - 1] == '/';)
        r->path[--n] = '\0';
    RT_TRY(resolve(c, r, err));
    rt_record_name(r->path, base);
    RT_TRY(rt_record_run(r->path, &r->run, err));
    if (r->run == NULL)
        RT_FAIL(err, IO, "%s: expected " RT_RUN_FILE " there", r->path);
    RT_TRY(rt_json_string_or(r->run, "name", base, &name, err));
    RT_TRY(rt_json_string_or(r->run, "arm", name, &own, err));
    RT_TRY(rt_json_int_or(r->run, "seed", INT64_MIN, INT64_MAX, 0, &r->seed, err));
    RT_TRY(rt_json_bool_or(r->run, "finished", false, &r->finished, err));
    copy(r->arm, sizeof r->arm, arm != NULL ? arm : own);
    if (description != NULL)
        r->description = strdup(description);
    RT_TRY(load_curves(r, err));
    RT_TRY(load_evals(r, err));
out:
    return st;
}

static enum rt_status add_experiment(struct rt_comparison *c, const char *dir, struct rt_log *log, struct rt_err *err)
{
    enum rt_status st;
    char file[PATH_CAP], path[PATH_CAP];
    struct rt_json *e = NULL;
    RT_TRY(rt_path_join(file, sizeof file, dir, RT_EXPERIMENT_FILE, err));
    RT_TRY(rt_json_load(file, max_record, &e, err));
    const struct rt_json *arms = rt_json_get(e, "arms");
    if (rt_json_len(arms) == 0)
        RT_FAIL(err, FORMAT, "%s: expected a member \"arms\", a list that is not empty", file);
    c->experiment = true;
    copy(c->title, sizeof c->title, dir);
    for (size_t i = 0; i < rt_json_len(arms); i++) {
        const struct rt_json *arm = rt_json_at(arms, i), *runs = rt_json_get(arm, "runs");
        const char *name, *description, *at;
        RT_TRY(rt_json_string(arm, "name", &name, err));
        RT_TRY(rt_json_string_or(arm, "description", "", &description, err));
        for (size_t r = 0; r < rt_json_len(runs); r++) {
            RT_TRY(rt_json_string(rt_json_at(runs, r), "path", &at, err));
            if (!inside(at))
                RT_FAIL(err, FORMAT, "%s: run '%.200s' is not inside the experiment", file, at);
            RT_TRY(rt_path_join(path, sizeof path, dir, at, err));
            RT_TRY(rt_path_join(file, sizeof file, path, RT_RUN_FILE, err));
            if (!rt_path_exists(file)) {
                rt_warn(log, "%s: arm %s has not begun there: left out", path, name);
                continue;
            }
            RT_TRY(add_run(c, path, name, description[0] != '\0' ? description : NULL, err));
        }
    }
out:
    rt_json_free(e);
    return st;
}

enum rt_status rt_compare_load(const char *const *paths, int n, struct rt_log *log, struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st;
    char file[PATH_CAP];
    RT_TRY(rt_alloc(RT_CMP_MAX_RUNS, sizeof *c->run, "runs", &c->run, err));
    RT_TRY(rt_alloc(RT_CMP_MAX_ARMS, sizeof *c->arm, "arms", &c->arm, err));
    for (int i = 0; i < n; i++) {
        RT_TRY(rt_path_join(file, sizeof file, paths[i], RT_EXPERIMENT_FILE, err));
        if (rt_path_exists(file)) {
            RT_TRY(add_experiment(c, paths[i], log, err));
            continue;
        }
        RT_TRY(rt_path_join(file, sizeof file, paths[i], RT_RUN_FILE, err));
        if (!rt_path_exists(file))
            RT_FAIL(err, FORMAT, "%s: neither a run nor an experiment: expected " RT_RUN_FILE " or " RT_EXPERIMENT_FILE " there", paths[i]);
        RT_TRY(add_run(c, paths[i], NULL, NULL, err));
    }
    if (c->n_runs == 0)
        RT_FAIL(err, REFUSED, "%s: no arm of it has begun: `retort experiment` with the same --out trains them", paths[0]);
out:
    return st;
}
