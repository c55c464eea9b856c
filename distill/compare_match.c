/* Which evaluations of the runs stand in one table. Where no run has a name twice, those of that name: what differs between them is said
 * (distill/compare_check.c). Where one has, its measurements are told apart, and each has a table with that measurement of the other runs;
 * training's own and `eval`'s only where a run has both. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "distill/compare_parts.h"

const struct rt_cmp_eval *rt_cmp_eval_at(const struct rt_cmp_run *r, int e)
{
    return r->at[e] >= 0 ? &r->eval[r->at[e]] : NULL;
}

/* Begin of the last k parts of a path, its first byte where it has fewer. */
static const char *last_parts(const char *path, int k)
{
    const char *p = path + strlen(path);
    for (; p > path; p--)
        if (p[-1] == '/' && p[0] != '\0' && --k == 0)
            break;
    return p;
}

const char *rt_cmp_path_name(const char *const *paths, int n, int i)
{
    for (int k = 1;; k++) {
        const char *own = last_parts(paths[i], k);
        bool alone = true;
        for (int j = 0; j < n; j++)
            alone &= strcmp(paths[j], paths[i]) == 0 || strcmp(last_parts(paths[j], k), own) != 0;
        if (alone || own == paths[i])
            return own;
    }
}

/* ---- the measurements of one name ---- */
struct variants {
    const struct rt_eval_key *key[RT_CMP_MAX_EVALS];
    int n;
    bool twice; /* a run has two of this name */
};

static bool has_name(const struct rt_cmp_run *r, int i, const char *name)
{
    return strcmp(r->eval[i].key.name, name) == 0;
}

/* Whether a run has two evaluations of this name; with a key, two that are the same but for who measured. */
static bool is_twice(const struct rt_comparison *c, const char *name, const struct rt_eval_key *key)
{
    for (int r = 0; r < c->n_runs; r++) {
        int n = 0;
        for (int i = 0; i < c->run[r].n_evals; i++)
            n += has_name(&c->run[r], i, name) && (key == NULL || rt_eval_key_same_but_by(&c->run[r].eval[i].key, key));
        if (n > 1)
            return true;
    }
    return false;
}

/* Whether two evaluations of the name stand in one table. */
static bool go_together(const struct rt_comparison *c, const struct variants *v, const struct rt_eval_key *a, const struct rt_eval_key *b)
{
    if (!v->twice)
        return true;
    return is_twice(c, a->name, a) ? rt_eval_key_same(a, b) : rt_eval_key_same_but_by(a, b);
}

static enum rt_status find_variants(const struct rt_comparison *c, const char *name, struct variants *v, struct rt_err *err)
{
    *v = (struct variants){.twice = is_twice(c, name, NULL)};
    for (int r = 0; r < c->n_runs; r++)
        for (int i = 0; i < c->run[r].n_evals; i++) {
            const struct rt_eval_key *key = &c->run[r].eval[i].key;
            int k = 0;
            if (!has_name(&c->run[r], i, name))
                continue;
            while (k < v->n && !go_together(c, v, v->key[k], key))
                k++;
            if (k < v->n)
                continue;
            if (v->n == RT_CMP_MAX_EVALS)
                return rt_fail(err, RT_USAGE, "%s: more than %d different evaluations", name, RT_CMP_MAX_EVALS);
            v->key[v->n++] = key;
        }
    return RT_OK;
}

/* ---- their titles ---- */
static void add_part(char *parts, size_t cap, const char *part)
{
    const size_t at = strlen(parts);
    snprintf(parts + at, cap - at, "%s%s", at > 0 ? ", " : "", part);
}

/* What tells variant k from the others, but for the path of its data; *trained: that training measured it. */
static void tell_apart(const struct variants *v, int k, bool paths_do, char parts[160], bool *trained)
{
    static const char *const words[] = {"samples %g", "temperature %g", "top-p %g", "max-tokens %g"};
    const struct rt_eval_key *own = v->key[k];
    bool by = false, data = false, T = false, sampling[RT_KEY_SAMPLING] = {0};
    char text[64];
    parts[0] = '\0';
    for (int j = 0; j < v->n; j++) {
        const struct rt_eval_key *o = v->key[j];
        by |= strcmp(o->by, own->by) != 0 && rt_eval_key_same_but_by(o, own);
        data |= !rt_eval_key_same_data(o, own);
        T |= o->T != own->T && !(isnan(o->T) && isnan(own->T));
        for (int i = 0; i < RT_KEY_SAMPLING; i++)
            sampling[i] |= o->sampling[i] != own->sampling[i] && !isnan(own->sampling[i]);
    }
    *trained = by && strcmp(own->by, "train") == 0;
    if (*trained)
        add_part(parts, 160, "in training");
    if (data && !paths_do) {
        snprintf(text, sizeof text, "data %.8s", own->sequences[0] != '\0' ? own->sequences : own->problems);
        add_part(parts, 160, text);
    }
    if (T) {
        snprintf(text, sizeof text, isnan(own->T) ? "no KL" : "T = %g", own->T);
        add_part(parts, 160, text);
    }
    for (int i = 0; i < RT_KEY_EXACT; i++)
        if (sampling[i]) {
            snprintf(text, sizeof text, words[i], own->sampling[i]);
            add_part(parts, 160, text);
        }
    if (sampling[RT_KEY_EXACT])
        add_part(parts, 160, own->sampling[RT_KEY_EXACT] > 0 ? "exact" : "boxed");
}

static void set_title(struct rt_comparison *c, int e, const struct variants *v, int k)
{
    const char *paths[RT_CMP_MAX_EVALS];
    char parts[160], *title = c->eval[e];
    bool paths_do = false;
    for (int j = 0; j < v->n; j++) {
        paths[j] = v->key[j]->data;
        paths_do |= !rt_eval_key_same_data(v->key[j], v->key[k]) && strcmp(v->key[j]->data, v->key[k]->data) != 0;
    }
    tell_apart(v, k, paths_do, parts, &c->trained[e]);
    const char *name = paths_do ? rt_cmp_path_name(paths, v->n, k) : v->key[k]->name;
    snprintf(title, sizeof c->eval[e], parts[0] != '\0' ? "%s (%s)" : "%s", rt_cmp_tail(name, sizeof c->eval[e] - sizeof parts - 4), parts);
}

static enum rt_status add_name(struct rt_comparison *c, const char *name, struct rt_err *err)
{
    enum rt_status st;
    struct variants v;
    RT_TRY(find_variants(c, name, &v, err));
    for (int k = 0; k < v.n; k++) {
        if (c->n_evals == RT_CMP_MAX_EVALS)
            RT_FAIL(err, USAGE, "more than %d different evaluations", RT_CMP_MAX_EVALS);
        const int e = c->n_evals++;
        set_title(c, e, &v, k);
        for (int r = 0; r < c->n_runs; r++)
            for (int i = 0; i < c->run[r].n_evals; i++)
                if (has_name(&c->run[r], i, name) && go_together(c, &v, v.key[k], &c->run[r].eval[i].key)) {
                    c->run[r].at[e] = i;
                    for (int m = 0; m < RT_CMP_METRICS; m++)
                        c->has[e][m] |= !isnan(c->run[r].eval[i].value[m]);
                }
    }
out:
    return st;
}

/* Of run r, before evaluation i: whether an evaluation has had its name. */
static bool is_known(const struct rt_comparison *c, int r, int i)
{
    const char *name = c->run[r].eval[i].key.name;
    for (int q = 0; q <= r; q++)
        for (int j = 0; j < (q < r ? c->run[q].n_evals : i); j++)
            if (has_name(&c->run[q], j, name))
                return true;
    return false;
}

enum rt_status rt_compare_match(struct rt_comparison *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int r = 0; r < c->n_runs; r++)
        for (int e = 0; e < RT_CMP_MAX_EVALS; e++)
            c->run[r].at[e] = -1;
    for (int r = 0; r < c->n_runs; r++)
        for (int i = 0; i < c->run[r].n_evals; i++)
            if (!is_known(c, r, i))
                RT_TRY(add_name(c, c->run[r].eval[i].key.name, err));
out:
    return st;
}
