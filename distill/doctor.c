#include "distill/doctor.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *rt_check_level_name(enum rt_check_level l)
{
    static const char *const names[] = {"PASS", "WARN", "FAIL"};
    return names[l];
}

enum rt_status rt_check_add(struct rt_checks *c, struct rt_err *err, enum rt_check_level level, const char *name, const char *fmt, ...)
{
    enum rt_status st = RT_OK;
    va_list ap;
    if (c->n == c->cap) {
        struct rt_check *more;
        const int cap = c->cap > 0 ? 2 * c->cap : 32;
        RT_TRY(rt_alloc((size_t)cap, sizeof *more, "checks", &more, err));
        if (c->n > 0)
            memcpy(more, c->at, (size_t)c->n * sizeof *more);
        rt_free(c->at);
        c->at = more;
        c->cap = cap;
    }
    struct rt_check *k = &c->at[c->n++];
    k->level = level;
    c->count[level]++;
    snprintf(k->name, sizeof k->name, "%s", name);
    va_start(ap, fmt);
    vsnprintf(k->detail, sizeof k->detail, fmt, ap);
    va_end(ap);
out:
    return st;
}

void rt_checks_free(struct rt_checks *c)
{
    rt_free(c->at);
    *c = (struct rt_checks){0};
}

enum rt_status rt_doctor_run(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_doctor_models(d, err));
    RT_TRY(rt_doctor_data(d, err));
    RT_TRY(rt_doctor_shards(d, err));
    RT_TRY(rt_doctor_costs(d, err));
    if (d->forward)
        RT_TRY(rt_doctor_forward(d, err));
    if (d->forward || d->rescore > 0)
        RT_TRY(rt_doctor_rescore(d, err));
out:
    return st;
}

void rt_doctor_close(struct rt_doctor *d)
{
    rt_shard_set_free(d->set);
    rt_model_dir_close(&d->tm);
    rt_model_dir_close(&d->sm);
    rt_params_free(&d->sp);
    rt_student_config_free(&d->sc);
    rt_checks_free(&d->checks);
    d->set = NULL;
}
