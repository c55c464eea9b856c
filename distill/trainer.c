#include "distill/trainer.h"

#include <math.h>
#include <string.h>

#include "core/collective.h"
#include "core/io.h"
#include "formats/json.h"
#include "student/save.h"

#define STATE_FILE "state.json"

static struct rt_micro_options micro_options(const struct rt_trainer_options *o, int64_t vocab)
{
    return (struct rt_micro_options){.tokens = o->micro_tokens, .k = o->k, .use = o->use_k, .teacher_T = o->teacher_T, .tail = o->w.tail, .vocab = vocab,
                                     .map = &o->map, .ce_rest = o->ce_rest, .spans = o->boundary != NULL};
}

static struct rt_student_kept kept(const struct rt_trainer_options *o)
{
    return (struct rt_student_kept){rt_student_recompute(o->recompute), o->recompute_less};
}

static bool records(const struct rt_student_config *c, const struct rt_params *p, const struct rt_trainer_options *o)
{
    return o->record && o->map.n == 0 && o->boundary == NULL && rt_recorded_gains(c, p, o->micro_tokens);
}

void rt_trainer_plan(const struct rt_student_config *c, const struct rt_params *p, const struct rt_trainer_options *o, int64_t max_length,
                     size_t act_size, struct rt_trainer_memory *out)
{
    const struct rt_micro_options mo = micro_options(o, c->vocab_size);
    const int ranks = o->ranks > 1 ? o->ranks : 1;
    const struct rt_student_kept k = kept(o);
    *out = (struct rt_trainer_memory){
        .weights = rt_student_weight_bytes(c, p, max_length, act_size),
        .grads = rt_params_bytes(p, act_size),
        .moments = rt_optimizer_shard_bytes(p, ranks, o->bucket, act_size, o->adamw.bf16_moments) -
                   (o->adamw.no_master ? rt_optimizer_master_bytes(p, ranks, o->bucket, act_size) : 0),
        .activations = rt_student_kept_bytes(c, o->micro_tokens, &k, act_size),
        .losses = rt_losses_bytes(o->micro_tokens, c->hidden, c->vocab_size, o->k, &o->map, act_size, true) +
                  (o->boundary != NULL ? rt_span_losses_bytes(o->micro_tokens, c->vocab_size) : 0),
        .recorded = records(c, p, o) ? rt_recorded_bytes(c, o->micro_tokens, act_size) : 0,
        .projectors = o->map.n > 0 ? rt_projectors_bytes(&o->map, c->hidden, act_size, o->adamw.bf16_moments) : 0,
        .host = RT_LOSS_SLOTS * rt_micro_bytes(&mo) + (o->loader_threads > 0 ? o->loader_bytes : 0),
    };
}

enum rt_status rt_trainer_open(struct rt_trainer *t, struct rt_student *s, struct rt_train_set *const *set, const double *weight, int n_sets,
                               const struct rt_trainer_options *o, struct rt_err *err)
{
    enum rt_status st;
    struct rt_trainer_memory mem;
    const struct rt_student_config *c = rt_student_config(s);
    *t = (struct rt_trainer){.o = *o, .d = rt_student_device(s), .s = s, .set = set};
    for (int i = 0; i < n_sets; i++)
        if (rt_train_set_info(set[i])->longest > o->micro_tokens)
            RT_FAIL(err, USAGE, "micro-batches of %ld tokens: a sequence has %ld", (long)o->micro_tokens, (long)rt_train_set_info(set[i])->longest);
    rt_trainer_plan(c, rt_student_params(s), o, rt_student_max_length(s), rt_device_act_size(t->d), &mem);
    RT_TRY(rt_device_arena(t->d, mem.grads, "gradients", &t->grads, err));
    RT_TRY(rt_student_attach_grads(s, &t->grads, err));
    RT_TRY(rt_device_arena(t->d, mem.moments, "moments", &t->moments, err));
    RT_TRY(rt_optimizer_init_shard(&t->opt, s, &o->adamw, &(struct rt_optimizer_ranks){o->comm, o->bucket, o->overlap, o->early}, &t->moments, err));
    RT_TRY(rt_device_arena(t->d, mem.activations, "activations", &t->acts, err));
    RT_TRY(rt_device_arena(t->d, mem.losses + mem.projectors, "losses", &t->scratch, err));
    RT_TRY(rt_losses_create(&t->losses, t->d, o->micro_tokens, c->hidden, c->vocab_size, o->k, &t->o.map, true, &t->scratch, err));
    if (o->boundary != NULL) {
        RT_TRY(rt_span_losses_create(&t->spans, t->d, o->micro_tokens, c->vocab_size, o->boundary, &t->scratch, err));
        t->losses.spans = &t->spans;
    }
    if (records(c, rt_student_params(s), o) && t->d->be->graph_begin != NULL)
        rt_recorded_init(&t->recorded, t->d);
    RT_TRY(rt_projectors_create(&t->proj, t->d, &t->o.map, c->hidden, &o->adamw, o->seed, &t->scratch, err));
    const struct rt_micro_options mo = micro_options(&t->o, c->vocab_size);
    struct rt_micro_options own = mo;
    own.d = t->d->be->own_memory ? t->d : NULL;
    for (int i = 0; i < RT_LOSS_SLOTS; i++)
        RT_TRY(rt_micro_create(&t->micro[i], &own, err));
    const struct rt_loader_options lo = {.set = set, .weight = weight, .n_sets = n_sets, .seed = o->seed, .epochs = o->epochs,
                                         .batch_tokens = o->batch_tokens, .micro = mo, .threads = o->loader_threads, .bytes = o->loader_bytes,
                                         .rank = rt_comm_rank(o->comm), .size = rt_comm_size(o->comm)};
    RT_TRY(rt_loader_open(&lo, &t->loader, err));
out:
    if (st != RT_OK)
        rt_trainer_close(t);
    return st;
}

void rt_trainer_close(struct rt_trainer *t)
{
    if (t->d == NULL)
        return;
    rt_loader_free(t->loader);
    rt_recorded_free(&t->recorded);
    rt_losses_free(&t->losses);
    for (int i = 0; i < RT_LOSS_SLOTS; i++)
        rt_micro_free(&t->micro[i]);
    rt_span_losses_free(&t->spans);
    rt_projectors_free(&t->proj);
    rt_optimizer_close(&t->opt);
    rt_device_arena_free(t->d, &t->scratch);
    rt_device_arena_free(t->d, &t->acts);
    rt_device_arena_free(t->d, &t->moments);
    rt_device_arena_free(t->d, &t->grads);
    *t = (struct rt_trainer){0};
}

/* Before a step: a rank that has something of the batch writes those of the layers with its first micro-batch. */
static enum rt_status zero_grads(struct rt_trainer *t, struct rt_err *err)
{
    const enum rt_status st = t->own > 0 ? rt_student_zero_outer_grads(t->s, err) : rt_student_zero_grads(t->s, err);
    return st != RT_OK ? st : rt_projectors_zero_grads(&t->proj, err);
}

/* Sums of this rank become those of all. */
static enum rt_status add_ranks(struct rt_trainer *t, struct rt_loss_sums *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    double *const real[] = {&s->ce, &s->kl, &s->feature, &s->teacher_mass, &s->student_mass, &s->spans.loss, &s->spans.teacher, &s->spans.student};
    int64_t *const whole[] = {&s->rows, &s->kl_rows, &s->feature_rows, &s->correct, &s->agree, &s->spans.spans, &s->spans.rows};
    enum { R = sizeof real / sizeof real[0], W = sizeof whole / sizeof whole[0] };
    double x[R + W];
    if (t->o.comm == NULL)
        return RT_OK;
    /* first: a rank without sequences would otherwise wait for ranks that wait for its part of the sums */
    RT_TRY(rt_optimizer_reduce(&t->opt, err));
    if (t->proj.grad != NULL)
        RT_TRY(t->d->be->all_reduce(t->d->dev, t->d->q, t->proj.grad, t->proj.table.elements, err));
    for (int i = 0; i < R + W; i++)
        x[i] = i < R ? *real[i] : (double)*whole[i - R];
    RT_TRY(rt_comm_sum(t->o.comm, x, R + W, err));
    for (int i = 0; i < R + W; i++) {
        if (i < R)
            *real[i] = x[i];
        else
            *whole[i - R] = (int64_t)x[i];
    }
out:
    return st;
}

/* A micro-step: forward to backward of the micro-batch that was sent to the slot. last: of the batch, so that what its backward leaves may be summed over
 * ranks. */
struct micro_step {
    struct rt_trainer *t;
    int slot;
    const struct rt_loss_weights *w;
    int64_t items;
    enum rt_losses_grads grads;
    bool last;
    struct rt_loss_sums *sums;
};

static enum rt_status enqueue_step(void *self, struct rt_err *err)
{
    enum rt_status st;
    const struct micro_step *m = self;
    struct rt_trainer *t = m->t;
    const struct rt_student_batch b = rt_losses_batch(t->losses.slot[m->slot].p);
    const struct rt_student_sent sent = rt_losses_sent(&t->losses, m->slot);
    const struct rt_student_kept k = kept(&t->o);
    RT_TRY(rt_student_forward_sent(t->s, &b, &sent, &k, &t->acts, err));
    if (m->last)
        rt_optimizer_reduce_begin(&t->opt);
    RT_TRY(rt_losses_enqueue(&t->losses, m->slot, t->s, &t->proj, m->w, m->items, m->grads, m->sums, err));
out:
    return st;
}

static enum rt_status run_slot(struct rt_trainer *t, int slot, const struct rt_loss_weights *w, int64_t items, enum rt_losses_grads grads, bool last,
                               struct rt_loss_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    struct micro_step m = {t, slot, w, items, grads, last, sums};
    const bool exchanges = last && t->o.comm != NULL; /* sums over ranks begin with its backward, at the latest with its end */
    if (t->recorded.d != NULL && !exchanges && rt_losses_constant(&t->losses, slot, w)) {
        const struct rt_recorded_key k = rt_recorded_key(&t->losses, slot, w, items, grads);
        RT_TRY(rt_recorded_run(&t->recorded, &k, t->losses.slot[slot].p->cu, enqueue_step, &m, err));
    } else {
        RT_TRY(enqueue_step(&m, err));
    }
    RT_TRY(rt_losses_fetch(&t->losses, slot, err));
out:
    return st;
}

/* Forward, losses, backward over the batch in micro-batches; sums and gradients are those of the whole batch. The device is waited for where a slot
 * comes round again, so that it has the next micro-batch before it is done with one. */
static enum rt_status accumulate(struct rt_trainer *t, const struct rt_step_result *r, const struct rt_loss_weights *w, struct rt_loss_sums *sums,
                                 struct rt_err *err)
{
    enum rt_status st;
    int64_t at = 0;
    int slot = 0;
    enum rt_losses_grads grads = RT_GRADS_FIRST;
    *sums = (struct rt_loss_sums){0};
    RT_TRY(zero_grads(t, err));
    for (;; slot = (slot + 1) % RT_LOSS_SLOTS) {
        RT_TRY(rt_losses_collect(&t->losses, slot, sums, err));
        RT_TRY(rt_loader_pack(t->loader, &t->micro[slot], &at, err));
        if (t->micro[slot].n == 0)
            break;
        RT_TRY(rt_losses_send(&t->losses, slot, &t->micro[slot], err));
        RT_TRY(run_slot(t, slot, w, r->items, grads, at == t->own, sums, err));
        t->last = slot;
        grads = RT_GRADS_ADD;
    }
    for (int i = 1; i < RT_LOSS_SLOTS; i++)
        RT_TRY(rt_losses_collect(&t->losses, (slot + i) % RT_LOSS_SLOTS, sums, err));
    RT_TRY(add_ranks(t, sums, err));
out:
    return st;
}

enum rt_status rt_trainer_repeat(struct rt_trainer *t, int times, int64_t *tokens, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_loss_sums sums = {0};
    for (int i = 0; i < times; i++)
        RT_TRY(run_slot(t, t->last, &t->o.w, t->losses.slot[t->last].p->n, RT_GRADS_ADD, false, &sums, err));
    RT_TRY(rt_losses_collect(&t->losses, t->last, &sums, err));
    *tokens = t->losses.slot[t->last].p->n;
out:
    return st;
}

/* Norms of the student's gradients and of the projectors'. */
static enum rt_status norms(struct rt_trainer *t, double *norm, double *proj, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_projectors_norm(&t->proj, proj, err));
    RT_TRY(rt_optimizer_norm(&t->opt, norm, err));
out:
    return st;
}

/* Norm of the student's gradient of each term alone, with its weight. */
static enum rt_status measure_terms(struct rt_trainer *t, struct rt_step_result *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_loss_weights *w = &t->o.w;
    const double each[4] = {w->ce, w->kl, w->feature, w->alm};
    struct rt_loss_sums sums;
    double proj;
    for (int i = 0; i < 4; i++) {
        struct rt_loss_weights one = *w;
        one.ce = i == 0 ? w->ce : 0;
        one.kl = i == 1 ? w->kl : 0;
        one.feature = i == 2 ? w->feature : 0;
        one.alm = i == 3 ? w->alm : 0;
        if (!(each[i] > 0))
            continue;
        RT_TRY(accumulate(t, r, &one, &sums, err));
        RT_TRY(norms(t, &r->term_norm[i], &proj, err));
    }
out:
    return st;
}

/* Decides on the norm of a step and takes it into the mean: m += (min(norm, limit) - m) / min(n, SPAN). A norm of 0 (of a batch that takes no part in what is
 * learnt) says nothing of the others. */
static bool is_spike(struct rt_trainer *t, double norm)
{
    enum { SPAN = 50, LEAST = 10 }; /* norms in the mean; before there is anything to compare with */
    if (!(norm > 0))
        return false;
    const double limit = t->o.max_spike > 0 && t->norms >= LEAST ? t->o.max_spike * t->usual_norm : INFINITY;
    t->norms++;
    t->usual_norm += (fmin(norm, limit) - t->usual_norm) / (double)(t->norms < SPAN ? t->norms : SPAN);
    return norm > limit;
}

double rt_trainer_clipped(const struct rt_trainer *t)
{
    return t->opt.step > 0 ? (double)t->clipped / (double)t->opt.step : NAN;
}

enum rt_status rt_trainer_step(struct rt_trainer *t, double lr, bool term_norms, struct rt_step_result *r, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_loss_weights *w = &t->o.w;
    struct rt_step_report report;
    struct rt_loader_batch b;
    double proj_norm;
    *r = (struct rt_step_result){.scale = 1, .term_norm = {NAN, NAN, NAN, NAN}};
    RT_TRY(rt_loader_next(t->loader, &b, err));
    r->end = b.n == 0;
    if (r->end)
        return RT_OK;
    t->own = b.own;
    r->batch = b.items;
    r->n = b.n;
    r->tokens = b.tokens;
    r->epoch = b.epoch;
    double targets = (double)b.targets;
    RT_TRY(rt_comm_sum(t->o.comm, &targets, 1, err));
    r->items = (int64_t)targets;
    if (r->items == 0)
        RT_FAIL(err, FORMAT, "a batch of %ld sequences without one target", (long)r->n);
    if (term_norms)
        RT_TRY(measure_terms(t, r, err));
    RT_TRY(accumulate(t, r, w, &r->sums, err));
    r->loss = (w->ce * r->sums.ce + w->kl * r->sums.kl + w->feature * r->sums.feature + w->alm * r->sums.spans.loss) / (double)r->items;
    t->step++;
    t->tokens += r->tokens;
    t->targets += r->items;
    RT_TRY(norms(t, &r->grad_norm, &proj_norm, err));
    r->usual_norm = t->usual_norm;
    r->skipped = !isfinite(r->loss) || !isfinite(r->grad_norm) || !isfinite(proj_norm);
    r->spike = !r->skipped && is_spike(t, r->grad_norm);
    r->skipped |= r->spike;
    t->skipped += r->skipped;
    if (r->skipped)
        goto out;
    RT_TRY(rt_optimizer_step_of(&t->opt, lr, 1, r->grad_norm, &report, err)); /* of a finite norm: it is taken */
    r->scale = report.scale;
    t->clipped += report.scale < 1;
    RT_TRY(rt_projectors_step(&t->proj, &t->o.adamw, lr, t->opt.step, proj_norm, err));
out:
    return st;
}

enum rt_status rt_trainer_checkpoint(const struct rt_trainer *t, const char *dir, int keep, double seconds, struct rt_err *err)
{
    enum rt_status st;
    struct rt_ckpt_writer *w = NULL;
    struct rt_json *state = NULL;
    struct rt_buf config = {0};
    if (rt_comm_rank(t->o.comm) > 0)
        return rt_student_checkpoint(t->s, &t->opt, NULL, err);
    RT_TRY(rt_ckpt_begin(dir, t->step, &w, err));
    RT_TRY(rt_student_checkpoint(t->s, &t->opt, w, err));
    RT_TRY(rt_projectors_checkpoint(&t->proj, w, err));
    /* with it the checkpoint is a model directory without a tokenizer */
    RT_TRY(rt_student_config_text(rt_student_config(t->s), rt_adamw_file_dtype(t->d, &t->opt.state), &config, err));
    RT_TRY(rt_ckpt_bytes(w, "config.json", config.data, config.len, err));
    RT_TRY(rt_json_new_object(&state, err));
    RT_TRY(rt_json_set_int(state, "step", t->step, err));
    RT_TRY(rt_json_set_int(state, "optimizer_step", t->opt.step, err));
    RT_TRY(rt_json_set_int(state, "tokens", t->tokens, err));
    RT_TRY(rt_json_set_int(state, "targets", t->targets, err));
    RT_TRY(rt_json_set_int(state, "skipped", t->skipped, err));
    RT_TRY(rt_json_set_int(state, "clipped", t->clipped, err));
    RT_TRY(rt_json_set_double(state, "usual_norm", t->usual_norm, err));
    RT_TRY(rt_json_set_int(state, "norms", t->norms, err));
    RT_TRY(rt_json_set_double(state, "seconds", seconds, err));
    RT_TRY(rt_ckpt_json(w, STATE_FILE, state, err));
    RT_TRY(rt_ckpt_commit(w, keep, err));
out:
    rt_ckpt_writer_free(w);
    rt_json_free(state);
    rt_buf_free(&config);
    return st;
}

enum rt_status rt_trainer_restore(struct rt_trainer *t, const char *ckpt, double *seconds, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *state = NULL;
    char path[4096];
    int64_t step, opt_step;
    RT_TRY(rt_path_join(path, sizeof path, ckpt, STATE_FILE, err));
    RT_TRY(rt_json_load(path, 1 << 16, &state, err));
    RT_TRY(rt_json_int(state, "step", 0, INT64_MAX, &step, err));
    RT_TRY(rt_json_int(state, "optimizer_step", 0, step, &opt_step, err));
    RT_TRY(rt_json_int(state, "tokens", 0, INT64_MAX, &t->tokens, err));
    RT_TRY(rt_json_int(state, "targets", 0, INT64_MAX, &t->targets, err));
    RT_TRY(rt_json_int(state, "skipped", 0, step, &t->skipped, err));
    RT_TRY(rt_json_int(state, "clipped", 0, step, &t->clipped, err));
    RT_TRY(rt_json_double(state, "usual_norm", &t->usual_norm, err));
    RT_TRY(rt_json_int(state, "norms", 0, step, &t->norms, err));
    RT_TRY(rt_json_double(state, "seconds", seconds, err));
    RT_TRY(rt_student_restore(t->s, &t->opt, ckpt, opt_step, err));
    RT_TRY(rt_projectors_restore(&t->proj, ckpt, err));
    /* the order is walked, not stored: lengths are all it takes */
    RT_TRY(rt_loader_skip(t->loader, step, &t->step, err));
    if (t->step < step)
        RT_FAIL(err, REFUSED, "%s: is of step %ld, the data end at step %ld", ckpt, (long)step, (long)t->step);
out:
    rt_json_free(state);
    return st;
}
