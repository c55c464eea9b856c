#include "student/optimizer.h"

#include <math.h>
#include <string.h>

#include "student/internal.h"

bool rt_schedule_from_name(const char *name, enum rt_schedule_kind *out)
{
    static const char *const names[] = {"constant", "linear", "cosine"};
    for (int i = 0; i < 3; i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (enum rt_schedule_kind)i;
            return true;
        }
    return false;
}

double rt_schedule_lr(const struct rt_schedule *s, int64_t step)
{
    if (step < s->warmup)
        return s->lr * (double)step / (double)s->warmup;
    const double span = (double)(s->total - s->warmup);
    const double x = span > 0 ? fmin((double)(step - s->warmup) / span, 1) : 1;
    switch (s->kind) {
    case RT_SCHEDULE_LINEAR: return s->lr * (1 - (1 - s->min_ratio) * x);
    case RT_SCHEDULE_COSINE: return s->lr * (s->min_ratio + (1 - s->min_ratio) * (1 + cos(3.14159265358979324 * x)) / 2);
    case RT_SCHEDULE_CONSTANT: break;
    }
    return s->lr;
}

size_t rt_optimizer_bytes(const struct rt_params *p, size_t act_size)
{
    return 2 * rt_params_bytes(p, act_size);
}

enum rt_status rt_optimizer_init(struct rt_optimizer *opt, struct rt_student *s, const struct rt_adamw *o, struct rt_arena *arena,
                                 struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t bytes = rt_params_bytes(s->p, rt_device_act_size(s->d));
    if (!(o->beta1 >= 0 && o->beta1 < 1 && o->beta2 >= 0 && o->beta2 < 1 && o->eps > 0 && o->decay >= 0 && o->clip >= 0))
        RT_FAIL(err, USAGE, "AdamW with betas %g and %g, eps %g, decay %g, clip %g: expected betas in [0, 1), eps above 0, the others "
                "0 or more", o->beta1, o->beta2, o->eps, o->decay, o->clip);
    *opt = (struct rt_optimizer){.s = s, .o = *o};
    RT_TRY(rt_arena_alloc(arena, bytes, &opt->m, err));
    RT_TRY(rt_arena_alloc(arena, bytes, &opt->v, err));
    RT_TRY(rt_device_zero(s->d, opt->m, bytes, err));
    RT_TRY(rt_device_zero(s->d, opt->v, bytes, err));
out:
    return st;
}

static bool decays(const struct rt_optimizer *opt, const struct rt_param *p)
{
    return !opt->o.decay_matrices_only || (p->kind != RT_PARAM_NORM && p->kind != RT_PARAM_BIAS);
}

/* Elements [first, end) of the block. */
static enum rt_status update(struct rt_optimizer *opt, int64_t first, int64_t end, double lr, double decay, double scale,
                             struct rt_err *err)
{
    const struct rt_student *s = opt->s;
    return RT_OP(s->d, adamw, err, .p = rt_student_at(s, s->block, first), .grad = rt_student_at(s, s->grads, first),
                 .m = rt_student_at(s, opt->m, first), .v = rt_student_at(s, opt->v, first), .moment = s->d->be->act, .n = end - first, .step = opt->step + 1,
                 .lr = lr, .beta1 = opt->o.beta1, .beta2 = opt->o.beta2, .eps = opt->o.eps, .decay = decay, .grad_scale = scale);
}

enum rt_status rt_optimizer_step(struct rt_optimizer *opt, double lr, double grad_scale, struct rt_step_report *report,
                                 struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = opt->s;
    const struct rt_params *p = s->p;
    double sum = 0;
    if (s->grads == NULL)
        RT_FAIL(err, USAGE, "an optimiser step without a block of gradients");
    RT_TRY(RT_OP(s->d, sumsq, err, .x = s->grads, .n = p->elements, .out = &sum));
    *report = (struct rt_step_report){.grad_norm = sqrt(sum) * fabs(grad_scale), .scale = 1};
    if (!isfinite(report->grad_norm)) {
        report->skipped = true;
        goto out;
    }
    if (opt->o.clip > 0)
        report->scale = fmin(1, opt->o.clip / (report->grad_norm + 1e-6));
    /* Runs of entries with the same decay are one call. */
    for (int i = 0, j; i < p->n; i = j) {
        const bool decay = decays(opt, &p->at[i]);
        for (j = i + 1; j < p->n && decays(opt, &p->at[j]) == decay; j++)
            ;
        const int64_t end = j < p->n ? p->at[j].offset : p->elements;
        RT_TRY(update(opt, p->at[i].offset, end, lr, decay ? opt->o.decay : 0, report->scale * grad_scale, err));
    }
    opt->step++;
out:
    return st;
}
