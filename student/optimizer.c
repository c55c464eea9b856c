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
    return 2 * moment_bytes(n, size) + rt_adamw_master_bytes(n, act_size);
}

size_t rt_adamw_master_bytes(int64_t n, size_t act_size)
{
    return act_size == rt_dtype_size(RT_BF16) ? moment_bytes(n, sizeof(int16_t)) : 0;
}

size_t rt_optimizer_bytes(const struct rt_params *p, size_t act_size, bool bf16_moments)
{
    return rt_adamw_state_bytes(p->elements, act_size, bf16_moments);
}

size_t rt_optimizer_shard_bytes(const struct rt_params *p, int ranks, int64_t bucket, size_t act_size, bool bf16_moments)
{
    return rt_adamw_state_bytes(rt_param_shard_of(p, 0, ranks, ranks > 1 ? bucket : 0).n, act_size, bf16_moments);
}

size_t rt_optimizer_master_bytes(const struct rt_params *p, int ranks, int64_t bucket, size_t act_size)
{
    return rt_adamw_master_bytes(rt_param_shard_of(p, 0, ranks, ranks > 1 ? bucket : 0).n, act_size);
}

struct rt_param_block rt_adamw_master(const struct rt_adamw_state *state, const struct rt_device *d, const void *block)
{
    struct rt_param_block b = rt_param_block(d, block);
    if (state->low == NULL)
        return b;
    b.low = state->low;
    b.shard = state->shard;
    b.whole = true;
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
    if (o->no_master && !split)
        RT_FAIL(err, USAGE, "parameters without float32 masters are for devices that hold them in bfloat16; %s holds them as %s", d->be->name,
                rt_dtype_name(d->be->act));
    const size_t moment = moment_bytes(n, rt_dtype_size(state->moment)), low = moment_bytes(n, sizeof(int16_t));
    RT_TRY(rt_arena_alloc(arena, moment, &state->m, err));
    RT_TRY(rt_arena_alloc(arena, moment, &state->v, err));
    RT_TRY(rt_device_zero(d, state->m, moment, err));
    RT_TRY(rt_device_zero(d, state->v, moment, err));
    if (!split || o->no_master)
        goto out;
    RT_TRY(rt_arena_alloc(arena, low, &state->low, err));
    RT_TRY(rt_device_zero(d, state->low, low, err));
out:
    return st;
}

enum rt_status rt_optimizer_init(struct rt_optimizer *opt, struct rt_student *s, const struct rt_adamw *o, struct rt_arena *arena,
                                 struct rt_err *err)
{
    return rt_optimizer_init_shard(opt, s, o, &(struct rt_optimizer_ranks){0}, arena, err);
}

enum rt_status rt_optimizer_init_shard(struct rt_optimizer *opt, struct rt_student *s, const struct rt_adamw *o, const struct rt_optimizer_ranks *ranks,
                                       struct rt_arena *arena, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_param_shard shard = rt_param_shard(s->p, ranks->comm, ranks->bucket);
    *opt = (struct rt_optimizer){.s = s, .o = *o, .early = ranks->overlap && ranks->early};
    RT_TRY(rt_adamw_state_init(&opt->state, s->d, shard.n, o, arena, err));
    opt->state.shard = shard;
    RT_TRY(rt_exchange_open(&opt->exchange, s->d, &opt->state.shard, ranks->overlap, err));
out:
    return st;
}

void rt_optimizer_close(struct rt_optimizer *opt)
{
    if (opt->s != NULL)
        rt_student_watch_grads(opt->s, NULL, NULL);
    rt_exchange_close(&opt->exchange);
}

/* ---- ranks ---- */

static enum rt_status sum_from(void *self, int64_t from, struct rt_err *err)
{
    struct rt_optimizer *opt = self;
    if (from > 0 && !opt->early)
        return RT_OK;
    return rt_exchange_sum(&opt->exchange, opt->s->grads, from, err);
}

void rt_optimizer_reduce_begin(struct rt_optimizer *opt)
{
    if (opt->state.shard.comm == NULL)
        return;
    rt_exchange_begin(&opt->exchange);
    rt_student_watch_grads(opt->s, sum_from, opt);
}

enum rt_status rt_optimizer_reduce(struct rt_optimizer *opt, struct rt_err *err)
{
    if (opt->state.shard.comm == NULL)
        return RT_OK;
    rt_student_watch_grads(opt->s, NULL, NULL);
    return rt_exchange_sum_rest(&opt->exchange, opt->s->grads, err);
}

/* Element `first` of a block of act elements. */
static char *at(const struct rt_optimizer *opt, char *block, int64_t first)
{
    return block + (size_t)first * rt_device_act_size(opt->s->d);
}

enum rt_status rt_optimizer_norm(const struct rt_optimizer *opt, double *norm, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = opt->s;
    const struct rt_param_shard *shard = &opt->state.shard;
    double sum = 0;
    if (s->grads == NULL)
        RT_FAIL(err, USAGE, "a norm of gradients without a block of them");
    for (int b = 0; b < shard->n_buckets; b++) {
        const struct rt_param_part part = rt_param_part(shard, shard->rank, b);
        double one;
        if (part.n == 0)
            continue;
        RT_TRY(RT_OP(s->d, sumsq, err, .x = at(opt, s->grads, part.first), .n = part.n, .out = &one));
        sum += one;
    }
    RT_TRY(rt_comm_sum(shard->comm, &sum, 1, err));
    *norm = sqrt(sum);
out:
    return st;
}

/* ---- a step ---- */

static bool decays(const struct rt_optimizer *opt, const struct rt_param *p)
{
    return !opt->o.decay_matrices_only || (p->kind != RT_PARAM_NORM && p->kind != RT_PARAM_BIAS);
}

/* ends [n] of a whole block become cut [*n_cut] of a part: a run of no length goes, and its two neighbours become one. */
static void cut_runs(const struct rt_param_part *part, const int64_t *ends, int n, int64_t *cut, int *n_cut)
{
    int kept = 0;
    for (int i = 0; i < n; i++) {
        const int64_t end = ends[i] - part->first;
        cut[kept++] = end < 0 ? 0 : end < part->n ? end : part->n;
        if (cut[kept - 1] == part->n)
            break;
        if (kept >= 2 && cut[kept - 1] == cut[kept - 2])
            kept -= 2;
    }
    *n_cut = kept;
}

static char *at_moment(const struct rt_adamw_state *s, char *moments, int64_t at_element)
{
    return moments + (size_t)at_element * rt_dtype_size(s->moment);
}

/* One call over this rank's part of a bucket: runs of entries with and without decay by turns, the first of them with. */
static enum rt_status update_part(struct rt_optimizer *opt, const struct rt_param_part *part, const int64_t *ends, int n, double lr, double scale,
                                  struct rt_err *err)
{
    const struct rt_student *s = opt->s;
    const struct rt_adamw_state *a = &opt->state;
    return RT_OP(s->d, adamw, err, .p = at(opt, s->block, part->first), .low = a->low != NULL ? a->low + (size_t)part->at * sizeof(int16_t) : NULL,
                 .grad = at(opt, s->grads, part->first), .m = at_moment(a, a->m, part->at), .v = at_moment(a, a->v, part->at), .moment = a->moment, .n = part->n,
                 .step = opt->step + 1, .lr = lr, .beta1 = opt->o.beta1, .beta2 = opt->o.beta2, .eps = opt->o.eps, .decay = opt->o.decay, .grad_scale = scale,
                 .seed = opt->o.seed + (uint64_t)part->first, .decay_end = ends, .n_decay = n);
}

/* Updates what this rank keeps; the other ranks' parts come as they are updated. */
static enum rt_status update(struct rt_optimizer *opt, double lr, double scale, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_params *p = opt->s->p;
    const struct rt_param_shard *shard = &opt->state.shard;
    int64_t *ends = NULL;
    int n = 0, n_cut;
    RT_TRY(rt_alloc(2 * ((size_t)p->n + 1), sizeof *ends, "runs of parameters", &ends, err));
    int64_t *cut = ends + p->n + 1;
    for (int i = 0; i < p->n; i++)
        if (decays(opt, &p->at[i]) != (n % 2 == 0))
            ends[n++] = p->at[i].offset;
    ends[n++] = p->elements;
    for (int b = 0; b < shard->n_buckets; b++) {
        const struct rt_param_part part = rt_param_part(shard, shard->rank, b);
        cut_runs(&part, ends, n, cut, &n_cut);
        if (part.n > 0)
            RT_TRY(update_part(opt, &part, cut, n_cut, lr, scale, err));
        RT_TRY(rt_exchange_mark(&opt->exchange, b, err));
    }
    RT_TRY(rt_exchange_gather(&opt->exchange, opt->s->block, err));
out:
    rt_free(ends);
    return st;
}

enum rt_status rt_optimizer_step_of(struct rt_optimizer *opt, double lr, double grad_scale, double norm, struct rt_step_report *report,
                                    struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (opt->s->grads == NULL)
        RT_FAIL(err, USAGE, "an optimiser step without a block of gradients");
    *report = (struct rt_step_report){.grad_norm = norm * fabs(grad_scale), .scale = 1};
    if (!isfinite(report->grad_norm)) {
        report->skipped = true;
        goto out;
    }
    if (opt->o.clip > 0)
        report->scale = fmin(1, opt->o.clip / (report->grad_norm + 1e-6));
    RT_TRY(update(opt, lr, report->scale * grad_scale, err));
    opt->step++;
out:
    return st;
}

enum rt_status rt_optimizer_step(struct rt_optimizer *opt, double lr, double grad_scale, struct rt_step_report *report,
                                 struct rt_err *err)
{
    enum rt_status st;
    double norm;
    RT_TRY(rt_optimizer_norm(opt, &norm, err));
    RT_TRY(rt_optimizer_step_of(opt, lr, grad_scale, norm, report, err));
out:
    return st;
}
