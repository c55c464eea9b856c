/* The batch scheduler: which sequence has which slot, and whose memory it is (batch_internal.h). */
#include <string.h>

#include "core/batch_internal.h"

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

enum rt_status rt_batch_finish(struct rt_batch *b, struct request *r, int sample, const struct slot *s, enum rt_finish why,
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
        .n = s != NULL ? s->drawn : 0,
        .finish = why,
    };
    b->stats.finished++;
    r->ended++;
    const enum rt_status st = b->o.on_finish(b->o.ctx, &result, err);
    if (r->ended == r->n_samples) {
        unlink_request(b, &b->detached, r);
        rt_batch_request_free(r);
    }
    return st;
}

/* ---- places ---- */

void rt_batch_leave(struct rt_batch *b, int slot, int64_t keep)
{
    struct slot *s = &b->slots[slot];
    int at = 0;
    while (b->order[at] != slot)
        at++;
    memmove(b->order + at, b->order + at + 1, (size_t)(--b->n_busy - at) * sizeof *b->order);
    s->busy = false;
    s->of = NULL;
    s->turn++;
    s->held = keep < s->held ? keep : s->held;
    s->prompt = s->held > 0 ? s->prompt : 0;
    if (b->step.drop != NULL)
        b->step.drop(b->step.ctx, slot, s->held);
}

/* The slot that holds nothing but a prompt is emptied; false: there is none. */
static bool empty_one(struct rt_batch *b)
{
    for (int i = 0; i < b->o.slots; i++) {
        struct slot *s = &b->slots[i];
        if (s->busy || s->prompt == 0)
            continue;
        s->prompt = s->held = 0;
        b->step.drop(b->step.ctx, i, 0);
        return true;
    }
    return false;
}

bool rt_batch_room(struct rt_batch *b, int slot, int64_t tokens, int spare)
{
    if (b->step.room == NULL)
        return true;
    while (!b->step.room(b->step.ctx, slot, tokens, spare))
        if (!empty_one(b))
            return false;
    return true;
}

enum rt_status rt_batch_park(struct rt_batch *b, struct rt_err *err)
{
    enum rt_status st;
    struct parked *p = NULL;
    const int slot = b->order[b->n_busy - 1];
    struct slot *s = &b->slots[slot];
    RT_TRY(rt_alloc(1, sizeof *p, "a sequence that waits", &p, err));
    *p = (struct parked){.of = s->of, .sample = s->sample, .drawn = s->drawn, .ids = s->ids, .logprobs = s->logprobs};
    s->ids = s->logprobs = (struct rt_buf){0};
    struct parked **at = &b->parked;
    while (*at != NULL && (*at)->of->first_index + (*at)->sample < rt_batch_index_of(s))
        at = &(*at)->next;
    p->next = *at;
    *at = p;
    b->stats.parked++;
    s->quota = 0;
    rt_batch_leave(b, slot, 0);
out:
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

/* The preferred one if it is free: it needs no copy. Else one that holds no prompt, if there is one. */
static int free_slot(const struct rt_batch *b, int preferred)
{
    int any = -1;
    if (preferred >= 0 && !b->slots[preferred].busy)
        return preferred;
    for (int s = b->o.slots - 1; s >= 0; s--)
        if (!b->slots[s].busy && (any < 0 || b->slots[any].prompt != 0 || b->slots[s].prompt == 0))
            any = s;
    return any;
}

/* A free slot with r's prompt in it, if another has it, and room for `tokens` tokens: *out, or -1 where memory is short. */
static enum rt_status settle(struct rt_batch *b, const struct request *r, int64_t tokens, int *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int donor = find_donor(b, r);
    const int to = free_slot(b, donor), spare = b->n_busy;
    struct slot *s = &b->slots[to];
    *out = -1;
    if (donor != to) {
        s->prompt = s->held = 0;
        if (b->step.drop != NULL)
            b->step.drop(b->step.ctx, to, 0);
        if (!rt_batch_room(b, to, 1, spare))
            goto out;
        donor = find_donor(b, r); /* it may have been emptied for that */
        if (donor >= 0) {
            RT_ASSERT(b->slots[donor].held >= r->n_prompt - 1); /* else sibling_feeds */
            RT_TRY(b->step.copy_slot(b->step.ctx, donor, to, r->n_prompt - 1, err));
            s->held = r->n_prompt - 1;
        }
    } else {
        s->held = r->n_prompt - 1;
    }
    s->busy = true; /* its prompt is not to be emptied */
    const bool fits = rt_batch_room(b, to, tokens, spare);
    s->busy = false;
    if (fits) {
        s->prompt = r->first_index + 1;
        *out = to;
    } else {
        s->prompt = s->held = 0;
        b->step.drop(b->step.ctx, to, 0);
    }
out:
    return st;
}

/* The sequence (r, sample) goes on in the slot, behind `drawn` tokens. */
static void enter(struct rt_batch *b, int slot, struct request *r, int sample, int64_t drawn)
{
    struct slot *s = &b->slots[slot];
    s->busy = true;
    s->of = r;
    s->sample = sample;
    s->turn++;
    s->drawn = drawn;
    s->under_way = 0;
    s->row = -1;
    /* Indices of running sequences ascend along `order`. */
    int at = b->n_busy++;
    for (; at > 0 && rt_batch_index_of(&b->slots[b->order[at - 1]]) > rt_batch_index_of(s); at--)
        b->order[at] = b->order[at - 1];
    b->order[at] = slot;
}

/* Gives the next sample of r a free slot. *full: memory is short. */
static enum rt_status start(struct rt_batch *b, struct request *r, bool *full, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int to = -1;
    if (r->max_new > 0) {
        RT_TRY(settle(b, r, r->n_prompt + 1, &to, err));
        *full = to < 0;
        if (*full)
            goto out;
    }
    const int sample = r->started++;
    if (r->started == r->n_samples) {
        unlink_request(b, &b->head, r);
        r->next = b->detached;
        b->detached = r;
    }
    if (to < 0)
        return rt_batch_finish(b, r, sample, NULL, RT_FINISH_LENGTH, err);
    b->slots[to].ids.len = b->slots[to].logprobs.len = 0;
    enter(b, to, r, sample, 0);
out:
    return st;
}

/* The oldest of the parked sequences goes on. *full: memory is short. */
static enum rt_status resume(struct rt_batch *b, bool *full, struct rt_err *err)
{
    enum rt_status st;
    struct parked *p = b->parked;
    int to;
    RT_TRY(settle(b, p->of, p->of->n_prompt + p->drawn + 1, &to, err));
    *full = to < 0;
    if (*full)
        goto out;
    struct slot *s = &b->slots[to];
    rt_buf_free(&s->ids);
    rt_buf_free(&s->logprobs);
    s->ids = p->ids;
    s->logprobs = p->logprobs;
    p->ids = p->logprobs = (struct rt_buf){0};
    enter(b, to, p->of, p->sample, p->drawn);
    b->parked = p->next;
    rt_batch_parked_free(p);
out:
    return st;
}

enum rt_status rt_batch_admit(struct rt_batch *b, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    bool full = false;
    while (b->parked != NULL && !full && b->n_busy < b->o.slots && !sibling_feeds(b, b->parked->of))
        RT_TRY(resume(b, &full, err));
    for (struct request *r = b->head; r != NULL && !full && b->parked == NULL && b->n_busy < b->o.slots;) {
        if (r->max_new > 0 && sibling_feeds(b, r)) {
            r = r->next;
            continue;
        }
        RT_TRY(start(b, r, &full, err));
        r = b->head; /* on_finish may have changed the list */
    }
    RT_ASSERT(!full || b->n_busy > 0); /* one slot alone has room for whatever it holds */
out:
    return st;
}
