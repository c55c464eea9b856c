/* Which runs are one arm: the same treatment under other seeds. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "distill/compare_parts.h"
#include "formats/unicode.h"

const char *rt_cmp_text(const struct rt_json *v, const char *object, const char *key)
{
    const struct rt_json *o = object != NULL ? rt_json_get(v, object) : v;
    const char *s = rt_json_as_string(rt_json_get(o, key), NULL);
    return s != NULL ? s : "";
}

const char *rt_cmp_tail(const char *text, size_t most)
{
    const size_t len = strlen(text);
    const char *at = text + (len > most ? len - most : 0);
    while (((unsigned char)*at & 0xc0) == 0x80)
        at++;
    return at;
}

/* ---- options ---- */
static bool among(const char *const *list, size_t n, const char *s)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(list[i], s) == 0)
            return true;
    return false;
}

enum rt_cmp_role rt_cmp_role(const char *option)
{
    static const char *const treatment[] = {"w-ce", "w-kl", "w-feature", "w-alm", "divergence", "kd-temperature", "teacher-temperature", "tail", "top-k",
                                            "ce", "alm-tau", "feature-loss", "layer-map", "teacher-layers", "data"};
    /* paths of what began are judged by its hash, and how the work was divided does not change what it means */
    static const char *const incidental[] = {"out", "seed", "config", "name", "arm", "student", "init-config", "tokenizer", "eval-data", "eval-every",
                                             "device", "threads", "memory", "gpu-memory", "gpus", "micro-tokens", "recompute", "loader-threads",
                                             "rank-timeout", "save-every", "keep", "grad-norms"};
    return among(treatment, sizeof treatment / sizeof *treatment, option)      ? RT_CMP_TREATMENT
           : among(incidental, sizeof incidental / sizeof *incidental, option) ? RT_CMP_INCIDENTAL
                                                                               : RT_CMP_RECIPE;
}

bool rt_cmp_option_differs(const struct rt_cmp_run *a, const struct rt_cmp_run *b, size_t *at, const char **option, const char **x, const char **y)
{
    const struct rt_json *mine = rt_json_get(a->run, "options"), *others = rt_json_get(b->run, "options"), *v;
    while (rt_json_member(mine, (*at)++, option, &v)) {
        *x = rt_json_as_string(v, NULL);
        *y = rt_json_as_string(rt_json_get(others, *option), NULL);
        if (*x != NULL && *y != NULL && strcmp(*x, *y) != 0)
            return true;
    }
    return false;
}

/* ---- replicates ---- */
static bool same_data(const struct rt_cmp_run *a, const struct rt_cmp_run *b)
{
    const struct rt_json *x = rt_json_get(a->run, "data"), *y = rt_json_get(b->run, "data");
    if (rt_json_len(x) != rt_json_len(y))
        return false;
    for (size_t i = 0; i < rt_json_len(x); i++) {
        double v = 1, w = 1;
        rt_json_as_double(rt_json_get(rt_json_at(x, i), "weight"), &v);
        rt_json_as_double(rt_json_get(rt_json_at(y, i), "weight"), &w);
        if (v != w || strcmp(rt_cmp_text(rt_json_at(x, i), NULL, "sha256"), rt_cmp_text(rt_json_at(y, i), NULL, "sha256")) != 0)
            return false;
    }
    return true;
}

/* From one student; a random one is another with each seed. */
static bool same_start(const struct rt_cmp_run *a, const struct rt_cmp_run *b)
{
    const bool from = rt_cmp_text(a->run, "init", "student")[0] != '\0', other = rt_cmp_text(b->run, "init", "student")[0] != '\0';
    int64_t x, y;
    if (rt_json_as_int(rt_json_get(a->run, "parameters"), &x) && rt_json_as_int(rt_json_get(b->run, "parameters"), &y) && x != y)
        return false;
    return from == other && (!from || strcmp(rt_cmp_text(a->run, "init", "sha256"), rt_cmp_text(b->run, "init", "sha256")) == 0);
}

bool rt_cmp_replicates(const struct rt_cmp_run *a, const struct rt_cmp_run *b, char why[RT_CMP_WHY])
{
    const char *option, *x, *y;
    for (size_t at = 0; rt_cmp_option_differs(a, b, &at, &option, &x, &y);)
        if (rt_cmp_role(option) != RT_CMP_INCIDENTAL && strcmp(option, "data") != 0) {
            snprintf(why, RT_CMP_WHY, "--%s '%s' and '%s'", option, x, y);
            why[rt_utf8_prefix(why, strlen(why))] = '\0';
            return false;
        }
    if (!same_data(a, b))
        snprintf(why, RT_CMP_WHY, "other data");
    else if (!same_start(a, b))
        snprintf(why, RT_CMP_WHY, "other students to begin with");
    else if (a->seed == b->seed)
        snprintf(why, RT_CMP_WHY, "both of seed %" PRId64, a->seed);
    else
        return true;
    return false;
}

/* ---- arms ---- */
/* first[i]: the first run of the arm that run i belongs to. */
static void find_arms(const struct rt_comparison *c, int first[RT_CMP_MAX_RUNS])
{
    char why[RT_CMP_WHY];
    for (int i = 0; i < c->n_runs; i++) {
        first[i] = i;
        for (int j = 0; j < i && first[i] == i; j++) {
            bool fits = first[j] == j && strcmp(c->run[j].arm, c->run[i].arm) == 0;
            for (int k = j; k < i && fits; k++)
                fits = first[k] != j || rt_cmp_replicates(&c->run[k], &c->run[i], why);
            if (fits)
                first[i] = j;
        }
    }
}

/* Whether another arm has the name of run i's. */
static bool has_rival(const struct rt_comparison *c, const int *first, int i)
{
    for (int j = 0; j < c->n_runs; j++)
        if (first[j] == j && j != first[i] && strcmp(c->run[j].arm, c->run[i].arm) == 0)
            return true;
    return false;
}

/* The arm's name: as recorded, or where another has it too the end of its first run's path that no other run's ends with. */
static void name_arm(const struct rt_comparison *c, const int *first, int i, char out[RT_CMP_NAME])
{
    const char *real[RT_CMP_MAX_RUNS], *name = c->run[i].arm;
    if (has_rival(c, first, i)) {
        for (int j = 0; j < c->n_runs; j++)
            real[j] = c->run[j].real;
        name = rt_cmp_path_name(real, c->n_runs, i);
        for (int j = 0; j < c->n_runs; j++)
            if (!has_rival(c, first, j) && strcmp(c->run[j].arm, name) == 0)
                name = c->run[i].real;
    }
    snprintf(out, RT_CMP_NAME, "%s", rt_cmp_tail(name, RT_CMP_NAME - 1));
}

enum rt_status rt_compare_group(struct rt_comparison *c, struct rt_err *err)
{
    int first[RT_CMP_MAX_RUNS], arm[RT_CMP_MAX_RUNS];
    find_arms(c, first);
    for (int i = 0; i < c->n_runs; i++) {
        if (first[i] == i && c->n_arms == RT_CMP_MAX_ARMS)
            return rt_fail(err, RT_USAGE, "more than %d arms", RT_CMP_MAX_ARMS);
        arm[i] = first[i] == i ? c->n_arms++ : arm[first[i]];
        struct rt_cmp_arm *a = &c->arm[arm[i]];
        if (first[i] == i) {
            name_arm(c, first, i, a->name);
            a->description = c->run[i].description;
        }
        a->run[a->n_runs++] = i;
        snprintf(c->run[i].label, sizeof c->run[i].label, "%s seed %" PRId64, a->name, c->run[i].seed);
    }
    return RT_OK;
}
