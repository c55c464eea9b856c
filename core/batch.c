/* Requests form a list; each holds the next sample to start. Slots hold running sequences. A request leaves the list when its
 * last sample has started and is freed when its last sample has ended.
 */
#include "core/batch.h"

#include <stdlib.h>
#include <string.h>

#include "core/mem.h"

struct request {
    struct request *next;
    int32_t *prompt, *stop_ids;
    int64_t n_prompt, max_new, first_index;
    uint64_t stream;
    int n_samples, started, ended, n_stop;
    void *user;
};

/* What a slot holds stays there when its sequence has ended: a prefix that a sibling may copy. */
struct slot {
    bool busy;
    struct request *of;
    int sample;
    int64_t prompt;   /* whose prompt it holds: 1 + first_index, 0: none */
    int64_t held;     /* tokens in the engine's cache */
    int64_t n_new;    /* sampled tokens */
    int quota;        /* entries in this step */
    int row;          /* logits row in this step, -1: none */
    struct rt_buf ids, logprobs; /* int32_t and float, [n_new] */
};

/* One row to sample in this step. */
struct draw {
    int slot;
    int32_t id;
    float logprob;
    enum rt_status st;
    struct rt_err err;
};

struct rt_batch {
    struct rt_batch_options o;
    struct rt_batch_step step;
    struct slot *slots;             /* [o.slots] */
    int *order;                     /* [o.slots] busy slots by index of their sequence */
    struct rt_batch_entry *entries; /* [o.budget] */
    struct draw *draws;             /* [o.slots] */
    struct rt_sampler **samplers;   /* [threads] */
    int threads, n_busy;
    struct request *head, **tail;   /* those with samples not yet started */
    struct request *detached;       /* all samples started, some running */
    struct rt_batch_stats stats;
    const float *logits;
    int64_t stride;
};

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
    RT_TRY(rt_alloc((size_t)o->slots, sizeof *b->draws, "the batch", &b->draws, err));
    RT_TRY(rt_alloc((size_t)o->budget, sizeof *b->entries, "the batch", &b->entries, err));
    const int threads = o->pool != NULL ? rt_pool_threads(o->pool) : 1;
    RT_TRY(rt_alloc((size_t)threads, sizeof(struct rt_sampler *), "the batch", &b->samplers, err));
    for (; b->threads < threads; b->threads++)
        RT_TRY(rt_sampler_create(o->n_ids, &o->sample, &b->samplers[b->threads], err));
    *out = b;
out:
    if (st != RT_OK)
        rt_batch_free(b);
    return st;
}

static void request_free(struct request *r)
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
        request_free(r);
        r = next;
    }
}

void rt_batch_free(struct rt_batch *b)
{
    if (b == NULL)
        return;
    list_free(b->head);
    list_free(b->detached);
    for (int s = 0; b->slots != NULL && s < b->o.slots; s++) {
        rt_buf_free(&b->slots[s].ids);
        rt_buf_free(&b->slots[s].logprobs);
    }
    for (int i = 0; i < b->threads; i++)
        rt_sampler_free(b->samplers[i]);
    rt_free(b->samplers);
    rt_free(b->slots);
    rt_free(b->order);
    rt_free(b->draws);
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
        request_free(r);
    return st;
}

/* Takes r out of the list that starts at *head. */
static void unlink_request(struct rt_batch *b, struct request **head, struct request *r)
{
    struct request **at = head;
    while (*at != r)
        at = &(*at)->next;
    *at = r->next;
    if (head == &b->head && b->tail == &r->next)
        b->tail = at;
    r->next = NULL;
}

/* Reports one ended sequence, and lets go of its request after the last. */
static enum rt_status finish(struct rt_batch *b, struct request *r, int sample, const struct slot *s, enum rt_finish why,
                             struct rt_err *err)
{
    const struct rt_batch_result result = {
        .index = r->first_index + sample,
        .sample = sample,
        .user = r->user,
        .prompt = r->prompt,
        .n_prompt = r->n_prompt,
        .ids = s != NULL ? (const int32_t *)(const void *)s->ids.data : NULL,
        .logprobs = s != NULL ? (const float *)(const void *)s->logprobs.data : NULL,
        .n = s != NULL ? s->n_new : 0,
        .finish = why,
    };
    b->stats.finished++;
    r->ended++;
    const enum rt_status st = b->o.on_finish(b->o.ctx, &result, err);
    if (r->ended == r->n_samples) {
        unlink_request(b, &b->detached, r);
        request_free(r);
    }
    return st;
}

/* A slot that holds r's prompt, -1: none. The last prompt token is fed all the same, for its logits; so a prompt of one
 * token has nothing to copy. */
static int find_donor(const struct rt_batch *b, const struct request *r)
{
    for (int s = 0; b->step.copy_slot != NULL && r->n_prompt > 1 && s < b->o.slots; s++)
        if (b->slots[s].prompt == r->first_index + 1)
            return s;
    return -1;
}

/* A sibling is on its way through the prompt: waiting for it is cheaper than feeding the prompt twice. */
static bool sibling_feeds(const struct rt_batch *b, const struct request *r)
{
    for (int s = 0; b->step.copy_slot != NULL && s < b->o.slots; s++)
        if (b->slots[s].busy && b->slots[s].of == r && b->slots[s].held < r->n_prompt - 1)
            return true;
    return false;
}

/* The preferred one if it is free: it needs no copy. */
static int free_slot(const struct rt_batch *b, int preferred)
{
    if (preferred >= 0 && !b->slots[preferred].busy)
        return preferred;
    int s = 0;
    while (b->slots[s].busy)
        s++;
    return s;
}

/* Gives the next sample of r a free slot. */
static enum rt_status start(struct rt_batch *b, struct request *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const int sample = r->started++;
    if (r->started == r->n_samples) {
        unlink_request(b, &b->head, r);
        r->next = b->detached;
        b->detached = r;
    }
    if (r->max_new == 0)
        return finish(b, r, sample, NULL, RT_FINISH_LENGTH, err);
    const int donor = find_donor(b, r), to = free_slot(b, donor);
    const int64_t held = donor >= 0 ? r->n_prompt - 1 : 0;
    struct slot *s = &b->slots[to];
    RT_ASSERT(donor < 0 || b->slots[donor].held >= held); /* else sibling_feeds */
    if (donor >= 0 && donor != to)
        RT_TRY(b->step.copy_slot(b->step.ctx, donor, to, held, err));
    s->busy = true;
    s->of = r;
    s->prompt = r->first_index + 1;
    s->sample = sample;
    s->held = held;
    s->n_new = 0;
    s->ids.len = s->logprobs.len = 0;
    /* Indices of running sequences ascend along `order`. */
    int at = b->n_busy++;
    for (; at > 0; at--) {
        const struct slot *before = &b->slots[b->order[at - 1]];
        if (before->of->first_index + before->sample < r->first_index + sample)
            break;
        b->order[at] = b->order[at - 1];
    }
    b->order[at] = to;
out:
    return st;
}

/* Fills free slots from the queue; sequences without room for a token end here. */
static enum rt_status admit(struct rt_batch *b, struct rt_err *err)
{
    struct request *r = b->head;
    while (r != NULL && b->n_busy < b->o.slots) {
        if (r->max_new > 0 && sibling_feeds(b, r)) {
            r = r->next;
            continue;
        }
        const enum rt_status st = start(b, r, err);
        if (st != RT_OK)
            return st;
        r = b->head; /* on_finish may have changed the list */
    }
    return RT_OK;
}

/* Tokens of a sequence that its slot still lacks: the rest of the prompt, or the token sampled last. */
static int64_t lacking(const struct slot *s)
{
    return s->of->n_prompt + s->n_new - s->held;
}

/* Shares out the budget and lists the entries; returns how many. */
static int plan(struct rt_batch *b, int *n_rows)
{
    int left = b->o.budget, n = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < b->n_busy; i++) {
            struct slot *s = &b->slots[b->order[i]];
            if ((s->n_new == 0) != (pass == 1))
                continue;
            const int64_t want = lacking(s);
            s->quota = want < left ? (int)want : left;
            left -= s->quota;
        }
    }
    *n_rows = 0;
    for (int i = 0; i < b->o.slots; i++) {
        struct slot *s = &b->slots[i];
        s->row = -1;
        if (!s->busy)
            continue;
        const int32_t *ids = (const int32_t *)(const void *)s->ids.data;
        for (int k = 0; k < s->quota; k++) {
            const int64_t pos = s->held + k, p = s->of->n_prompt;
            const bool last = pos + 1 == p + s->n_new;
            if (last) {
                s->row = *n_rows;
                b->draws[(*n_rows)++].slot = i;
            }
            b->entries[n++] = (struct rt_batch_entry){i, pos < p ? s->of->prompt[pos] : ids[pos - p], pos, last ? s->row : -1};
        }
    }
    return n;
}

static void sample_row(void *ctx, int64_t row, int worker)
{
    const struct rt_batch *b = ctx;
    struct draw *d = &b->draws[row];
    const struct slot *s = &b->slots[d->slot];
    rt_err_clear(&d->err);
    d->st = rt_sampler_pick(b->samplers[worker], b->logits + row * b->stride, b->o.seed, s->of->stream + (uint64_t)s->sample,
                            (uint64_t)(s->of->n_prompt + s->n_new), &d->id, &d->logprob, &d->err);
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
    struct request *r = s->of;
    if (d->st != RT_OK) {
        st = rt_fail(err, d->st, "%s", d->err.msg);
        rt_err_context(err, "sequence %lld, token %lld", (long long)(r->first_index + s->sample), (long long)(r->n_prompt + s->n_new));
        return st;
    }
    RT_TRY(rt_buf_append(&s->ids, &d->id, sizeof d->id, err));
    RT_TRY(rt_buf_append(&s->logprobs, &d->logprob, sizeof d->logprob, err));
    s->n_new++;
    b->stats.new_tokens++;
    const bool stopped = is_stop(r, d->id);
    if (stopped || s->n_new == r->max_new) {
        int at = 0;
        while (b->order[at] != d->slot)
            at++;
        memmove(b->order + at, b->order + at + 1, (size_t)(--b->n_busy - at) * sizeof *b->order);
        s->busy = false;
        s->of = NULL;
        RT_TRY(finish(b, r, s->sample, s, stopped ? RT_FINISH_STOP : RT_FINISH_LENGTH, err));
    }
out:
    return st;
}

static enum rt_status one_step(struct rt_batch *b, struct rt_err *err)
{
    enum rt_status st;
    int n_rows;
    const int n = plan(b, &n_rows);
    RT_TRY(b->step.step(b->step.ctx, b->entries, n, n_rows, &b->logits, &b->stride, err));
    for (int i = 0; i < b->n_busy; i++) {
        struct slot *s = &b->slots[b->order[i]];
        if (s->n_new == 0)
            b->stats.prompt_tokens += s->quota;
        s->held += s->quota;
    }
    b->stats.steps++;
    if (b->o.pool != NULL)
        rt_pool_run(b->o.pool, n_rows, sample_row, b);
    for (int row = 0; row < n_rows; row++) {
        if (b->o.pool == NULL)
            sample_row(b, row, 0);
        RT_TRY(take(b, &b->draws[row], err));
    }
out:
    return st;
}

enum rt_status rt_batch_run(struct rt_batch *b, struct rt_err *err)
{
    enum rt_status st;
    for (;;) {
        RT_TRY(admit(b, err));
        if (b->n_busy == 0)
            break;
        if (b->o.stop != NULL && b->o.stop(b->o.ctx))
            RT_FAIL(err, INTERRUPTED, "interrupted with %lld of %lld sequences done", (long long)b->stats.finished,
                    (long long)b->stats.added);
        RT_TRY(one_step(b, err));
        b->stats.running = b->n_busy;
        if (b->o.progress != NULL)
            b->o.progress(b->o.ctx, &b->stats);
    }
out:
    b->stats.running = b->n_busy;
    return st;
}

void rt_batch_stats(const struct rt_batch *b, struct rt_batch_stats *out)
{
    *out = b->stats;
}
