#include "student/optimizer.h"

#include <math.h>
#include <string.h>

#include "core/collective.h"
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

/* ---- what it keeps ---- */

static size_t moment_bytes(int64_t n, size_t size)
{
    return rt_arena_round((size_t)n * size);
}

size_t rt_adamw_state_bytes(int64_t n, size_t act_size, bool bf16_moments)
{
    const bool split = act_size == rt_dtype_size(RT_BF16);
    const size_t size = !split ? act_size : bf16_moments ? rt_dtype_size(RT_BF16) : sizeof(float);
    return 2 * moment_bytes(n, size) + (split ? moment_bytes(n, sizeof(int16_t)) : 0);
}

size_t rt_optimizer_bytes(const struct rt_params *p, size_t act_size, bool bf16_moments)
{
    return rt_adamw_state_bytes(p->elements, act_size, bf16_moments);
}

size_t rt_optimizer_shard_bytes(const struct rt_params *p, int ranks, size_t act_size, bool bf16_moments)
{
    int64_t first, n;
    rt_comm_shard(p->elements, 0, ranks, &first, &n);
    return rt_adamw_state_bytes(n, act_size, bf16_moments);
}

struct rt_param_block rt_adamw_master(const struct rt_adamw_state *state, const struct rt_device *d, const void *block)
{
    struct rt_param_block b = rt_param_block(d, block);
    if (state->low == NULL)
        return b;
    b.low = state->low;
    b.shard = state->shard;
    b.data = (char *)b.data + (size_t)b.shard.first * rt_device_act_size(d);
    return b;
}

enum rt_status rt_adamw_state_init(struct rt_adamw_state *state, const struct rt_device *d, int64_t n, const struct rt_adamw *o, struct rt_arena *arena,
                                   struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const bool split = d->be->act == RT_BF16;
    *state = (struct rt_adamw_state){.moment = !split ? d->be->act : o->bf16_moments ? RT_BF16 : RT_F32};
    if (!(o->beta1 >= 0 && o->beta1 < 1 && o->beta2 >= 0 && o->beta2 < 1 && o->eps > 0 && o->decay >= 0 && o->clip >= 0))
        RT_FAIL(err, USAGE, "AdamW with betas %g and %g, eps %g, decay %g, clip %g: expected betas in [0, 1), eps above 0, the others "
                "0 or more", o->beta1, o->beta2, o->eps, o->decay, o->clip);
    if (o->bf16_moments && !split)
        RT_FAIL(err, USAGE, "moments in bfloat16 are for devices that hold parameters in bfloat16; %s holds them as %s", d->be->name,
                rt_dtype_name(d->be->act));
    const size_t moment = moment_bytes(n, rt_dtype_size(state->moment)), low = moment_bytes(n, sizeof(int16_t));
    RT_TRY(rt_arena_alloc(arena, moment, &state->m, err));
    RT_TRY(rt_arena_alloc(arena, moment, &state->v, err));
    RT_TRY(rt_device_zero(d, state->m, moment, err));
    RT_TRY(rt_device_zero(d, state->v, moment, err));
    if (!split)
        goto out;
    RT_TRY(rt_arena_alloc(arena, low, &state->low, err));
    RT_TRY(rt_device_zero(d, state->low, low, err));
out:
    return st;
}

enum rt_status rt_optimizer_init(struct rt_optimizer *opt, struct rt_student *s, const struct rt_adamw *o, struct rt_arena *arena,
                                 struct rt_err *err)
{
    return rt_optimizer_init_shard(opt, s, o, NULL, arena, err);
}

enum rt_status rt_optimizer_init_shard(struct rt_optimizer *opt, struct rt_student *s, const struct rt_adamw *o, struct rt_comm *comm,
                                       struct rt_arena *arena, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_param_shard shard = rt_param_shard(s->p, comm);
    *opt = (struct rt_optimizer){.s = s, .o = *o};
    RT_TRY(rt_adamw_state_init(&opt->state, s->d, shard.n, o, arena, err));
    opt->state.shard = shard;
out:
    return st;
}

/* ---- ranks ---- */

enum rt_status rt_optimizer_reduce(struct rt_optimizer *opt, struct rt_err *err)
{
    const struct rt_device *d = opt->s->d;
    return opt->state.shard.comm == NULL ? RT_OK : d->be->reduce_scatter(d->dev, d->q, opt->s->grads, opt->s->p->elements, err);
}

/* Element `first` of the shard, of a block of act elements. */
static char *at_shard(const struct rt_optimizer *opt, char *block)
{
    return block + (size_t)opt->state.shard.first * rt_device_act_size(opt->s->d);
}

enum rt_status rt_optimizer_norm(const struct rt_optimizer *opt, double *norm, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = opt->s;
    double sum = 0;
    if (opt->state.shard.n > 0)
        RT_TRY(RT_OP(s->d, sumsq, err, .x = at_shard(opt, s->grads), .n = opt->state.shard.n, .out = &sum));
    RT_TRY(rt_comm_sum(opt->state.shard.comm, &sum, 1, err));
    *norm = sqrt(sum);
out:
    return st;
}

/* ---- a step ---- */

static bool decays(const struct rt_optimizer *opt, const struct rt_param *p)
{
    return !opt->o.decay_matrices_only || (p->kind != RT_PARAM_NORM && p->kind != RT_PARAM_BIAS);
}

/* ends [*n] of a whole block become those of the shard: a run of no length goes, and its two neighbours become one. */
static void cut_runs(const struct rt_param_shard *shard, int64_t *ends, int *n)
{
    int kept = 0;
    for (int i = 0; i < *n; i++) {
        const int64_t end = ends[i] - shard->first;
        ends[kept++] = end < 0 ? 0 : end < shard->n ? end : shard->n;
        if (ends[kept - 1] == shard->n)
            break;
        if (kept >= 2 && ends[kept - 1] == ends[kept - 2])
            kept -= 2;
    }
    *n = kept;
}

/* One call over the block: runs of entries with and without decay by turns, the first of them with. */
static enum rt_status update(struct rt_optimizer *opt, double lr, double scale, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = opt->s;
    const struct rt_params *p = s->p;
    int64_t *ends = NULL;
    int n = 0;
    RT_TRY(rt_alloc((size_t)p->n + 1, sizeof *ends, "runs of parameters", &ends, err));
    for (int i = 0; i < p->n; i++)
        if (decays(opt, &p->at[i]) != (n % 2 == 0))
            ends[n++] = p->at[i].offset;
    ends[n++] = p->elements;
    cut_runs(&opt->state.shard, ends, &n);
    if (opt->state.shard.n == 0)
        goto out;
    RT_TRY(RT_OP(s->d, adamw, err, .p = at_shard(opt, s->block), .low = opt->state.low, .grad = at_shard(opt, s->grads), .m = opt->state.m, .v = opt->state.v,
                 .moment = opt->state.moment, .n = opt->state.shard.n, .step = opt->step + 1, .lr = lr, .beta1 = opt->o.beta1, .beta2 = opt->o.beta2,
                 .eps = opt->o.eps, .decay = opt->o.decay, .grad_scale = scale, .seed = opt->o.seed + (uint64_t)opt->state.shard.first, .decay_end = ends, .n_decay = n));
out:
    rt_free(ends);
    return st;
}

enum rt_status rt_optimizer_step(struct rt_optimizer *opt, double lr, double grad_scale, struct rt_step_report *report,
                                 struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = opt->s;
    double norm = 0;
    if (s->grads == NULL)
        RT_FAIL(err, USAGE, "an optimiser step without a block of gradients");
    RT_TRY(rt_optimizer_norm(opt, &norm, err));
    *report = (struct rt_step_report){.grad_norm = norm * fabs(grad_scale), .scale = 1};
    if (!isfinite(report->grad_norm)) {
        report->skipped = true;
        goto out;
    }
    if (opt->o.clip > 0)
        report->scale = fmin(1, opt->o.clip / (report->grad_norm + 1e-6));
    RT_TRY(update(opt, lr, report->scale * grad_scale, err));
    if (opt->state.shard.comm != NULL)
        RT_TRY(s->d->be->all_gather(s->d->dev, s->d->q, s->block, s->p->elements, err));
    opt->step++;
out:
    return st;
}
