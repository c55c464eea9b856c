/* What memory a run takes: the plan of its cuts (distill/train_cuts.h) with what the run knows, and the error where none fits. */
#include <stdio.h>
#include <string.h>

#include "distill/run_record.h"
#include "distill/train_run.h"

size_t rt_train_memory_planned(const struct rt_train_run *r)
{
    return rt_trainer_memory_on_device(&r->memory) + r->memory.host;
}

/* Micro-batches of an earlier part of the run are kept, and what operations may take: sums depend on the cuts. 0: there was none. */
static enum rt_status earlier_cuts(const struct rt_train_run *r, int64_t *micro, int64_t *operations, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *was = NULL;
    *micro = *operations = 0;
    RT_TRY(rt_record_run(r->v->out, &was, err));
    if (was == NULL)
        goto out;
    RT_TRY(rt_json_int_or(was, "micro_tokens", 1, INT64_MAX, 0, micro, err));
    RT_TRY(rt_json_int_or(was, "operations", 0, INT64_MAX, 0, operations, err));
out:
    rt_json_free(was);
    return st;
}

/* ---- the data ---- */

/* What the data take in any case. */
static size_t data_held(const struct rt_train_run *r)
{
    size_t n = 0;
    for (int i = 0; i < r->n_sets + r->n_eval; i++)
        n += rt_train_set_info(rt_train_set_at(r, i))->held;
    return n;
}

/* Decoded sequences stay in memory that nothing else needs, up to a quarter of all; each set has the same share. need: what the plan takes of the limit. */
static void plan_caches(struct rt_train_run *r, size_t need, size_t limit)
{
    const int n = r->n_sets + r->n_eval;
    const size_t quarter = (size_t)rt_command_memory(&r->v->common) / 4, left = limit > need ? limit - need : 0,
                 share = (r->device.be->own_memory || quarter < left ? quarter : left) / (size_t)n;
    for (int i = 0; i < n; i++) {
        const size_t all = rt_train_set_info(rt_train_set_at(r, i))->decoded;
        rt_train_set_cache(rt_train_set_at(r, i), share);
        r->memory.host += all < share ? all : share;
    }
}

/* ---- what would do where nothing fits ---- */

/* Options that a run could take instead; a run that goes on has most of them fixed. */
enum { RECOMPUTE = 1, MICRO = 2, MOMENTS = 4, MASTER = 8, ALL = 16 };

static unsigned open_options(const struct rt_train_run *r, const struct rt_train_plan *t, bool goes_on)
{
    const bool gpu = r->device.be->own_memory && r->device.be->act == RT_BF16;
    const unsigned again = t->recompute >= 0 && t->recompute < 3 ? RECOMPUTE : 0;
    if (goes_on)
        return again;
    return again | (t->fixed && t->micro_tokens > t->longest ? MICRO : 0) | (gpu && !t->o->adamw.bf16_moments ? MOMENTS : 0) |
           (gpu && !t->o->adamw.no_master ? MASTER : 0);
}

/* Plans with the options in `with`. *micro = tokens of a micro-batch then. */
static bool would_fit(const struct rt_train_plan *t, unsigned with, size_t limit, int64_t *micro)
{
    struct rt_train_plan x = *t;
    struct rt_trainer_options o = *t->o;
    x.o = &o;
    x.recompute = (with & RECOMPUTE) != 0 ? 3 : t->recompute;
    x.fixed = t->fixed && (with & MICRO) == 0;
    o.adamw.bf16_moments |= (with & MOMENTS) != 0;
    o.adamw.no_master |= (with & MASTER) != 0;
    const bool fit = rt_train_plan_fit(&x, limit);
    *micro = o.micro_tokens;
    return fit;
}

static size_t name_options(unsigned with, int64_t micro, const char *between, char *out, size_t cap)
{
    char tokens[40];
    snprintf(tokens, sizeof tokens, "--micro-tokens %ld", (long)micro);
    const char *const names[] = {"--recompute 3", tokens, "--moments bf16", "--master none"};
    size_t at = 0;
    for (unsigned i = 0; (1u << i) < ALL; i++)
        if ((with & 1u << i) != 0 && at + 48 < cap)
            at += (size_t)snprintf(out + at, cap - at, "%s%s", at > 0 ? between : "", names[i]);
    return at;
}

/* out = ", or --recompute 3, or ...": each was planned and fits; all of them together where none does alone; the longest --max-length of those tried. */
static void instead(const struct rt_train_plan *t, unsigned open, bool goes_on, size_t limit, char *out, size_t cap)
{
    size_t at = 0;
    int64_t micro = 0;
    out[0] = '\0';
    for (unsigned one = 1; one < ALL; one <<= 1)
        if ((open & one) != 0 && would_fit(t, one, limit, &micro) && at + 64 < cap) {
            at += (size_t)snprintf(out + at, cap - at, ", or ");
            at += name_options(one, micro, "", out + at, cap - at);
        }
    if (at == 0 && open != 0 && would_fit(t, open, limit, &micro)) {
        at += (size_t)snprintf(out + at, cap - at, ", or ");
        at += name_options(open, micro, " with ", out + at, cap - at);
    }
    const int64_t shorter = goes_on ? 0 : rt_train_plan_shorter(t, limit);
    if (shorter > 0)
        snprintf(out + at, cap - at, ", or --max-length %ld", (long)shorter);
}

/* The error of a run that needs more than `limit`, with what would do. */
static enum rt_status too_little(const struct rt_train_run *r, const struct rt_train_plan *t, bool goes_on, uint64_t limit, struct rt_err *err)
{
    const struct rt_backend *be = r->device.be;
    struct rt_dev_memory m = {0};
    char a[32], b[32], others[256];
    size_t need;
    enum rt_status st;
    if (be->own_memory)
        RT_TRY(be->memory(r->device.dev, &m, err));
    const int64_t enough = rt_train_plan_enough(t, m.held, &need);
    instead(t, open_options(r, t, goes_on), goes_on, (size_t)limit, others, sizeof others);
    RT_FAIL(err, NOMEM, "training needs %s with micro-batches of %ld tokens (the longest sequence has %ld) and --recompute %d; there are %s: "
            "--%s %ldM or more%s", rt_human_bytes(a, need), (long)r->o.micro_tokens, (long)t->longest, r->o.recompute, rt_human_bytes(b, limit),
            be->own_memory ? "gpu-memory" : "memory", (long)enough, others);
out:
    return st;
}

enum rt_status rt_train_plan_memory(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_backend *be = r->device.be;
    const struct rt_train_values *v = r->v;
    int64_t n, limit, was;
    size_t operations;
    RT_TRY(rt_command_room(&v->common, &r->device, &limit, err));
    RT_TRY(earlier_cuts(r, &n, &was, err));
    RT_TRY(rt_train_agree_room(r, &limit, &n, err));
    RT_TRY(rt_train_operations(&r->device, &operations, err));
    const bool goes_on = n > 0;
    struct rt_train_plan t = {
        .c = &r->student.c, .p = &r->student.p, .d = &r->device, .o = &r->o, .longest = rt_train_longest(r),
        .micro_tokens = goes_on ? n : v->micro_tokens > 0 ? v->micro_tokens : rt_train_usual_micro(&r->device, v->batch_tokens),
        .fixed = goes_on || v->micro_tokens > 0,
        .recompute = strcmp(v->recompute, "auto") == 0 ? -1 : v->recompute[0] - '0',
        .threads = (int)v->common.threads, .loader_threads = (int)v->loader_threads, .host = rt_command_memory(&v->common), .data = data_held(r),
        .operations = was > 0 && be->own_memory ? (size_t)was : operations, .shrinks = be->own_memory && was == 0,
    };
    const bool fit = rt_train_plan_fit(&t, (size_t)limit);
    r->memory = t.memory;
    if (be->own_memory)
        be->set_scratch(r->device.dev, r->memory.operations);
    if (!fit)
        RT_TRY(too_little(r, &t, goes_on, (uint64_t)limit, err));
    plan_caches(r, rt_train_plan_need(&t), (size_t)limit);
out:
    return st;
}
