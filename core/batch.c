/* The batch scheduler: requests and steps (batch_internal.h). */
#include <string.h>

#include "core/batch_internal.h"

enum rt_status rt_batch_create(const struct rt_batch_options *o, const struct rt_batch_step *step, struct rt_batch **out,
                               struct rt_err *err)
{
    enum rt_status st;
    struct rt_batch *b = NULL;
    *out = NULL;
    if (o->slots < 1 || o->budget < 1 || o->max_len < 1)
        return rt_fail(err, RT_USAGE, "a batch of %d slots of %lld tokens with %d entries a step: each must be 1 or more", o->slots,
                       (long long)o->max_len, o->budget);
    RT_TRY(rt_alloc(1, sizeof *b, "the batch", &b, err));
    b->o = *o;
    b->step = *step;
    b->tail = &b->head;
    RT_TRY(rt_alloc((size_t)o->slots, sizeof *b->slots, "the batch", &b->slots, err));
    RT_TRY(rt_alloc((size_t)o->slots, sizeof *b->order, "the batch", &b->order, err));
    for (int i = 0; i < FLIGHTS; i++)
        RT_TRY(rt_alloc((size_t)o->slots, sizeof *b->flight[i].draws, "the batch", &b->flight[i].draws, err));
    RT_TRY(rt_alloc((size_t)o->slots, sizeof *b->places, "the batch", &b->places, err));
    RT_TRY(rt_alloc((size_t)o->slots, sizeof *b->ids, "the batch", &b->ids, err));
    RT_TRY(rt_alloc((size_t)o->slots, sizeof *b->logprobs, "the batch", &b->logprobs, err));
    RT_TRY(rt_alloc((size_t)o->budget, sizeof *b->entries, "the batch", &b->entries, err));
    /* made for an engine that draws too: they check the parameters */
    const int threads = o->pool != NULL && step->submit == NULL ? rt_pool_threads(o->pool) : 1;
    RT_TRY(rt_alloc((size_t)threads, sizeof(struct rt_sampler *), "the batch", &b->samplers, err));
    for (; b->threads < threads; b->threads++)
        RT_TRY(rt_sampler_create(o->n_ids, &o->sample, &b->samplers[b->threads], err));
    for (int s = 0; step->drop != NULL && s < o->slots; s++)
        step->drop(step->ctx, s, 0); /* what another batch left */
    *out = b;
out:
    if (st != RT_OK)
        rt_batch_free(b);
    return st;
}

void rt_batch_request_free(struct request *r)
{
    if (r != NULL) {
        rt_free(r->prompt);
        rt_free(r->stop_ids);
        rt_free(r);
    }
}

static void list_free(struct request *r)
{
    while (r != NULL) {
        struct request *next = r->next;
        rt_batch_request_free(r);
        r = next;
    }
}

void rt_batch_parked_free(struct parked *p)
{
    if (p == NULL)
        return;
    rt_buf_free(&p->ids);
    rt_buf_free(&p->logprobs);
    rt_free(p);
}

void rt_batch_free(struct rt_batch *b)
{
    if (b == NULL)
        return;
    list_free(b->head);
    list_free(b->detached);
    while (b->parked != NULL) {
        struct parked *next = b->parked->next;
        rt_batch_parked_free(b->parked);
        b->parked = next;
    }
    for (int s = 0; b->slots != NULL && s < b->o.slots; s++) {
        rt_buf_free(&b->slots[s].ids);
        rt_buf_free(&b->slots[s].logprobs);
    }
    for (int i = 0; i < b->threads; i++)
        rt_sampler_free(b->samplers[i]);
    rt_free(b->samplers);
    rt_free(b->slots);
    rt_free(b->order);
    for (int i = 0; i < FLIGHTS; i++)
        rt_free(b->flight[i].draws);
    rt_free(b->places);
    rt_free(b->ids);
    rt_free(b->logprobs);
    rt_free(b->entries);
    rt_free(b);
}

enum rt_status rt_batch_add(struct rt_batch *b, const struct rt_batch_request *q, int64_t *index, struct rt_err *err)
{
    enum rt_status st;
    struct request *r = NULL;
    if (q->n_prompt < 1)
        return rt_fail(err, RT_USAGE, "an empty prompt: generation needs at least one token to start from");
    if (q->n_samples < 1 || q->max_new < 0 || q->n_stop < 0)
        return rt_fail(err, RT_USAGE, "%d samples of %lld tokens: expected 1 or more samples, 0 or more tokens", q->n_samples,
                       (long long)q->max_new);
    for (int64_t i = 0; i < q->n_prompt; i++)
        if (q->prompt[i] < 0 || q->prompt[i] >= b->o.n_ids)
            return rt_fail(err, RT_USAGE, "prompt token %lld is id %d, expected 0 to %lld; is this the model's own tokenizer?",
                           (long long)i, (int)q->prompt[i], (long long)b->o.n_ids - 1);
    RT_TRY(rt_alloc(1, sizeof *r, "a prompt", &r, err));
    RT_TRY(rt_alloc((size_t)q->n_prompt, sizeof *r->prompt, "a prompt", &r->prompt, err));
    memcpy(r->prompt, q->prompt, (size_t)q->n_prompt * sizeof *r->prompt);
    if (q->n_stop > 0) {
        RT_TRY(rt_alloc((size_t)q->n_stop, sizeof *r->stop_ids, "a prompt", &r->stop_ids, err));
        memcpy(r->stop_ids, q->stop_ids, (size_t)q->n_stop * sizeof *r->stop_ids);
    }
    r->n_prompt = q->n_prompt;
    r->max_new = q->n_prompt >= b->o.max_len ? 0 : b->o.max_len - q->n_prompt;
    if (q->max_new < r->max_new)
        r->max_new = q->max_new;
    r->first_index = b->stats.added;
    r->stream = q->stream;
    r->n_samples = q->n_samples;
    r->n_stop = q->n_stop;
    r->user = q->user;
    *b->tail = r;
    b->tail = &r->next;
    if (index != NULL)
        *index = b->stats.added;
    b->stats.added += q->n_samples;
out:
    if (st != RT_OK)
        rt_batch_request_free(r);
    return st;
}

/* ---- a step ---- */

/* Tokens of a sequence that its slot still lacks: the rest of the prompt, or the token sampled last. */
static int64_t lacking(const struct slot *s)
{
    return s->of->n_prompt + s->drawn + s->under_way - s->held;
}

/* Nothing is left to ask for: its last token is on its way. */
static bool complete(const struct slot *s)
{
    return s->drawn + s->under_way >= s->of->max_new;
}

/* Shares out the budget. Where memory is short the youngest sequences give up theirs. */
static enum rt_status share_budget(struct rt_batch *b, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int left = b->o.budget;
    for (int i = 0; i < b->n_busy; i++)
        b->slots[b->order[i]].quota = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < b->n_busy && left > 0; i++) {
            const int slot = b->order[i];
            struct slot *s = &b->slots[slot];
            const int64_t want = lacking(s);
            if (complete(s) || (want > 1) != (pass == 1))
                continue;
            const int quota = want < left ? (int)want : left;
            while (b->n_busy > i && !rt_batch_room(b, slot, s->held + quota, 0)) {
                left += b->slots[b->order[b->n_busy - 1]].quota;
                RT_TRY(rt_batch_park(b, err));
            }
            if (b->n_busy <= i)
                break; /* it was the youngest itself */
            s->quota = quota;
            left -= quota;
        }
    }
out:
    return st;
}

/* Lists the entries, and the draws of f; returns how many entries. */
static int plan(struct rt_batch *b, struct flight *f)
{
    int n = 0;
    f->n_rows = 0;
    for (int i = 0; i < b->o.slots; i++) {
        struct slot *s = &b->slots[i];
        if (!s->busy || s->quota == 0)
            continue;
        const int32_t *ids = (const int32_t *)(const void *)s->ids.data;
        const int64_t p = s->of->n_prompt, end = p + s->drawn + s->under_way;
        const int before = s->row;
        s->row = -1;
        for (int k = 0; k < s->quota; k++) {
            const int64_t pos = s->held + k;
            const int32_t id = pos < p ? s->of->prompt[pos] : pos - p < s->drawn ? ids[pos - p] : -1 - before;
            if (pos + 1 == end) {
                s->row = f->n_rows++;
                f->draws[s->row] = (struct draw){.slot = i, .turn = s->turn};
                b->places[s->row] = (struct rt_batch_draw){s->of->stream + (uint64_t)s->sample, end};
            }
            b->entries[n++] = (struct rt_batch_entry){i, id, pos, pos + 1 == end ? s->row : -1};
        }
    }
    return n;
}

static void sample_row(void *ctx, int64_t row, int worker)
{
    const struct rt_batch *b = ctx;
    struct draw *d = &b->flight[b->submitted % FLIGHTS].draws[row];
    const struct rt_batch_draw *at = &b->places[row];
    rt_err_clear(&d->err);
    d->st = rt_sampler_pick(b->samplers[worker], b->logits + row * b->stride, b->o.seed, at->stream, (uint64_t)at->position, &d->id,
                            &d->logprob, &d->err);
}

/* Hands a step over; one that does not draw is sampled at once. */
static enum rt_status submit(struct rt_batch *b, struct rt_err *err)
{
    enum rt_status st;
    struct flight *f = &b->flight[b->submitted % FLIGHTS];
    const struct rt_batch_law law = {b->o.sample, b->o.seed, b->o.n_ids};
    const int n = plan(b, f);
    if (n == 0)
        return RT_OK;
    if (b->step.submit != NULL) {
        RT_TRY(b->step.submit(b->step.ctx, b->entries, n, f->n_rows, b->places, &law, err));
    } else {
        RT_TRY(b->step.step(b->step.ctx, b->entries, n, f->n_rows, &b->logits, &b->stride, err));
        if (b->o.pool != NULL)
            rt_pool_run(b->o.pool, f->n_rows, sample_row, b);
        for (int row = 0; row < f->n_rows && b->o.pool == NULL; row++)
            sample_row(b, row, 0);
    }
    for (int i = 0; i < b->n_busy; i++) {
        struct slot *s = &b->slots[b->order[i]];
        if (s->quota == 0)
            continue;
        if (s->held < s->of->n_prompt || s->quota > 1)
            b->stats.prompt_tokens += s->quota;
        s->held += s->quota;
        s->under_way += s->row >= 0;
    }
    b->submitted++;
out:
    return st;
}

static bool is_stop(const struct request *r, int32_t id)
{
    for (int i = 0; i < r->n_stop; i++)
        if (r->stop_ids[i] == id)
            return true;
    return false;
}

/* Appends what was drawn; ends the sequence where it is to end. */
static enum rt_status take(struct rt_batch *b, const struct draw *d, struct rt_err *err)
{
    enum rt_status st;
    struct slot *s = &b->slots[d->slot];
    if (s->turn != d->turn)
        return RT_OK; /* it stopped a step ago */
    struct request *r = s->of;
    if (d->st != RT_OK) {
        st = rt_fail(err, d->st, "%s", d->err.msg);
        rt_err_context(err, "sequence %lld, token %lld", (long long)rt_batch_index_of(s), (long long)(r->n_prompt + s->drawn));
        return st;
    }
    RT_TRY(rt_buf_append(&s->ids, &d->id, sizeof d->id, err));
    RT_TRY(rt_buf_append(&s->logprobs, &d->logprob, sizeof d->logprob, err));
    s->drawn++;
    s->under_way--;
    b->stats.new_tokens++;
    const bool stopped = is_stop(r, d->id);
    if (stopped || s->drawn == r->max_new) {
        const int sample = s->sample;
        rt_batch_leave(b, d->slot, r->started < r->n_samples || b->parked != NULL || b->step.drop == NULL ? r->n_prompt : 0);
        RT_TRY(rt_batch_finish(b, r, sample, s, stopped ? RT_FINISH_STOP : RT_FINISH_LENGTH, err));
    }
out:
    return st;
}

static enum rt_status collect(struct rt_batch *b, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct flight *f = &b->flight[b->collected % FLIGHTS];
    b->collected++;
    if (b->step.submit != NULL) {
        RT_TRY(b->step.collect(b->step.ctx, b->ids, b->logprobs, err));
        for (int row = 0; row < f->n_rows; row++) {
            struct draw *d = &f->draws[row];
            d->id = b->ids[row];
            d->logprob = b->logprobs[row];
            rt_err_clear(&d->err);
            d->st = d->id >= 0 ? RT_OK : rt_fail(&d->err, RT_NUMERIC, "the logit of id %d is not a finite number", -1 - (int)d->id);
        }
    }
    b->stats.steps++;
    for (int row = 0; row < f->n_rows; row++)
        RT_TRY(take(b, &f->draws[row], err));
    b->stats.running = b->n_busy;
    if (b->o.progress != NULL)
        b->o.progress(b->o.ctx, &b->stats);
out:
    return st;
}

enum rt_status rt_batch_run(struct rt_batch *b, struct rt_err *err)
{
    enum rt_status st;
    for (;;) {
        RT_TRY(rt_batch_admit(b, err));
        if (b->n_busy == 0 && b->submitted == b->collected)
            break;
        if (b->o.stop != NULL && b->o.stop(b->o.ctx))
            RT_FAIL(err, INTERRUPTED, "interrupted with %lld of %lld sequences done", (long long)b->stats.finished,
                    (long long)b->stats.added);
        const int64_t before = b->submitted;
        RT_TRY(share_budget(b, err));
        RT_TRY(submit(b, err));
        if (b->submitted - b->collected > (b->submitted > before && b->step.submit != NULL ? b->step.ahead : 0))
            RT_TRY(collect(b, err));
    }
out:
    while (b->submitted > b->collected) { /* an engine is left without steps under way */
        b->collected++;
        if (b->step.submit != NULL)
            (void)b->step.collect(b->step.ctx, b->ids, b->logprobs, NULL);
    }
    b->stats.running = b->n_busy;
    return st;
}

void rt_batch_stats(const struct rt_batch *b, struct rt_batch_stats *out)
{
    *out = b->stats;
}
