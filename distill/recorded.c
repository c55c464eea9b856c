#include "distill/recorded.h"

#include <string.h>

_Static_assert(sizeof(struct rt_recorded_key) == 72, "a key is compared as bytes: no padding");

struct rt_recorded_key rt_recorded_key(const struct rt_losses *l, int slot, const struct rt_loss_weights *w, int64_t items,
                                       enum rt_losses_grads grads)
{
    const struct rt_micro *p = l->slot[slot].p;
    struct rt_recorded_key k;
    memset(&k, 0, sizeof k);
    k.slot = slot;
    k.n_seq = (int32_t)p->n_seq;
    k.n = p->n;
    k.rows = p->rows;
    k.items = items;
    k.ce = w->ce;
    k.kl = w->kl;
    k.T = w->T;
    k.tail = w->tail;
    k.teacher = p->kl_rows > 0;
    k.grads = grads;
    return k;
}

bool rt_recorded_gains(const struct rt_student_config *c, const struct rt_params *p, int64_t tokens)
{
    /* Some 45 launches a layer at 4 us, and 6e14 FLOP/s: launches above a twentieth of the arithmetic. */
    const double launches = 45 * 4e-6 * c->layers, arithmetic = 6.0 * (double)p->matmul * (double)tokens / 6e14;
    return launches > arithmetic / 20;
}

size_t rt_recorded_bytes(const struct rt_student_config *c, int64_t tokens, size_t act_size)
{
    /* The head's temporaries (core/cuda/head_loss.c: a copy of the head, a chunk's gradients, a tile of float32 logits); attention's backward holds float32
     * gradients of its heads; a launch takes some 5 kB. */
    const size_t n = (size_t)tokens, V = (size_t)c->vocab_size, chunk = n < 16384 ? n : 16384, tile = n < 1024 ? n : 1024;
    const size_t head = V * (size_t)c->hidden * act_size + chunk * V * act_size + tile * V * sizeof(float), heads = 4 * n * (size_t)(c->heads * c->head_dim) * sizeof(float);
    return head + heads + (size_t)RT_RECORDED * 64 * (size_t)c->layers * 5120;
}

void rt_recorded_init(struct rt_recorded *r, const struct rt_device *d)
{
    *r = (struct rt_recorded){.d = d};
}

static void drop(struct rt_recorded *r, struct rt_recorded_shape *s)
{
    if (s->graph != NULL)
        r->d->be->graph_free(r->d->dev, s->graph);
    s->graph = NULL;
    s->used = 0;
}

void rt_recorded_free(struct rt_recorded *r)
{
    if (r->d == NULL)
        return;
    (void)rt_device_sync(r->d, NULL);
    for (int i = 0; i < RT_RECORDED; i++)
        drop(r, &r->at[i]);
    *r = (struct rt_recorded){0};
}

static struct rt_recorded_shape *find(struct rt_recorded_shape *list, int n, const struct rt_recorded_key *k, const int32_t *cu)
{
    for (int i = 0; i < n; i++)
        if (list[i].used > 0 && memcmp(&list[i].key, k, sizeof *k) == 0 && memcmp(list[i].cu, cu, ((size_t)k->n_seq + 1) * sizeof *cu) == 0)
            return &list[i];
    return NULL;
}

static struct rt_recorded_shape *oldest(struct rt_recorded_shape *list, int n)
{
    struct rt_recorded_shape *s = list;
    for (int i = 1; i < n; i++)
        s = list[i].used < s->used ? &list[i] : s;
    return s;
}

static void remember(struct rt_recorded_shape *s, const struct rt_recorded_key *k, const int32_t *cu, int64_t now)
{
    s->key = *k;
    memcpy(s->cu, cu, ((size_t)k->n_seq + 1) * sizeof *cu);
    s->used = now;
}

/* *out NULL: it cannot be recorded, or there is no memory for it. */
static enum rt_status record(struct rt_recorded *r, enum rt_status (*enqueue)(void *self, struct rt_err *), void *self, struct rt_graph **out, struct rt_err *err)
{
    const struct rt_device *d = r->d;
    struct rt_err why = {0};
    enum rt_status st;
    *out = NULL;
    RT_TRY(d->be->graph_begin(d->dev, d->q, err));
    st = enqueue(self, &why);
    const enum rt_status end = d->be->graph_end(d->dev, d->q, out, &why);
    if (st == RT_OK && end == RT_OK) {
        r->recordings++;
        return RT_OK;
    }
    d->be->graph_free(d->dev, *out);
    *out = NULL;
    if (st == RT_UNSUPPORTED || (st == RT_OK && end == RT_NOMEM))
        return RT_OK;
    st = rt_fail(err, st != RT_OK ? st : end, "recording a micro-step: %s", why.msg);
out:
    return st;
}

/* Records into a place for k, and enqueues. The device gives a recording its memory when it is run for the first time. */
static enum rt_status record_and_run(struct rt_recorded *r, struct rt_recorded_shape *s, const struct rt_recorded_key *k, const int32_t *cu,
                                     enum rt_status (*enqueue)(void *self, struct rt_err *), void *self, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_err why = {0};
    if (s->graph != NULL)
        RT_TRY(rt_device_sync(r->d, err)); /* it may be under way */
    drop(r, s);
    RT_TRY(record(r, enqueue, self, &s->graph, err));
    remember(s, k, cu, r->clock);
    if (s->graph == NULL)
        return enqueue(self, err);
    st = r->d->be->graph_run(r->d->dev, r->d->q, s->graph, &why);
    r->runs += st == RT_OK;
    if (st == RT_NOMEM) { /* without it the run can go on */
        r->d->be->graph_free(r->d->dev, s->graph);
        s->graph = NULL;
        st = enqueue(self, err);
    } else if (st != RT_OK) {
        st = rt_fail(err, st, "%s", why.msg);
    }
out:
    return st;
}

enum rt_status rt_recorded_run(struct rt_recorded *r, const struct rt_recorded_key *k, const int32_t *cu, enum rt_status (*enqueue)(void *self, struct rt_err *),
                               void *self, struct rt_err *err)
{
    if (r->d == NULL || k->n_seq > RT_RECORDED_SEQS)
        return enqueue(self, err);
    r->clock++;
    struct rt_recorded_shape *s = find(r->at, RT_RECORDED, k, cu), *met = s != NULL ? NULL : find(r->met, RT_RECORDED_MET, k, cu);
    if (s != NULL) {
        s->used = r->clock;
        if (s->graph == NULL)
            return enqueue(self, err);
        r->runs++;
        return r->d->be->graph_run(r->d->dev, r->d->q, s->graph, err);
    }
    s = oldest(r->at, RT_RECORDED);
    if (met != NULL && (s->used == 0 || r->clock - s->used >= RT_RECORDED_IDLE)) {
        met->used = 0;
        return record_and_run(r, s, k, cu, enqueue, self, err);
    }
    remember(met != NULL ? met : oldest(r->met, RT_RECORDED_MET), k, cu, r->clock);
    return enqueue(self, err);
}
