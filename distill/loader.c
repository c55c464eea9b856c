#include "distill/loader.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"

enum { AHEAD = 64 }; /* batches that are looked at before the current one is done */

/* A sequence of this rank's share. */
struct slot {
    struct rt_order_item item;
    size_t charge;      /* of `bytes` while it is packed */
    int64_t targets;    /* -1: not known yet */
    bool busy;          /* a thread is at it */
    struct rt_micro *packed; /* NULL: not yet, or no more */
    enum rt_status st;  /* of its decoding */
    struct rt_err err;
};

struct batch {
    struct rt_order_item *items;
    struct slot *slot;
    int64_t n, own, tokens;
    double epoch;
    struct batch *next;
};

struct worker {
    struct rt_loader *l;
    struct rt_train_reader **reader; /* [n_sets] */
    pthread_t thread;
};

struct rt_loader {
    struct rt_loader_options o;
    struct rt_order order;
    bool end;              /* of the order */
    struct worker *worker;
    int started;
    pthread_mutex_t lock;  /* of everything below */
    pthread_cond_t work, done;
    struct batch *head, *tail; /* head: the current batch */
    int64_t batches, at;   /* in the list; the share's sequences before `at` are copied */
    struct batch *scan_in; /* where a thread begins to look for work: slots before are packed or taken */
    int64_t scan_at;
    size_t listed, used;   /* bytes: of all slots in the list, of those that are packed */
    bool counting, stop;   /* counting: the caller waits for the targets of head */
    double waited;
};

static void free_packed(struct rt_micro *p)
{
    if (p == NULL)
        return;
    rt_micro_free(p);
    rt_free(p);
}

static void drop(struct rt_loader *l, struct slot *s)
{
    if (s->packed == NULL)
        return;
    free_packed(s->packed);
    s->packed = NULL;
    l->used -= s->charge;
}

static void free_batch(struct rt_loader *l, struct batch *b)
{
    for (int64_t i = 0; b->slot != NULL && i < b->own; i++) {
        drop(l, &b->slot[i]);
        l->listed -= b->slot[i].charge;
    }
    rt_free(b->items);
    rt_free(b->slot);
    rt_free(b);
}

size_t rt_loader_bytes(const struct rt_micro_options *o, int64_t batch_tokens)
{
    struct rt_micro_options two = *o;
    size_t bytes;
    two.tokens = batch_tokens;
    return rt_mul_size(rt_micro_bytes(&two), 2, &bytes) ? bytes : SIZE_MAX;
}

double rt_loader_waited(const struct rt_loader *l)
{
    return l->waited;
}

/* ---- decoding ---- */

static enum rt_status pack_one(const struct rt_loader *l, const struct rt_order_item *item, const struct rt_rows *rows, struct rt_micro **out,
                               struct rt_err *err)
{
    enum rt_status st;
    struct rt_micro *p = NULL;
    struct rt_micro_options o = l->o.micro;
    bool full;
    o.tokens = rows->n_tokens;
    RT_TRY(rt_alloc(1, sizeof *p, "a packed sequence", &p, err));
    RT_TRY(rt_micro_create(p, &o, err));
    RT_TRY(rt_micro_put(p, l->o.set[item->set], item, rows, &full, err));
    *out = p;
    p = NULL;
out:
    free_packed(p);
    return st;
}

/* Back to the first slot that is still to be copied. */
static void rescan(struct rt_loader *l)
{
    l->scan_in = l->head;
    l->scan_at = l->at;
    pthread_cond_broadcast(&l->work);
}

/* The next slot to pack, NULL where there is none or no room; and the next to count, where the caller waits for that. */
static struct slot *pick(struct rt_loader *l, bool *count)
{
    *count = false;
    for (; l->scan_in != NULL; l->scan_in = l->scan_in->next, l->scan_at = 0)
        for (; l->scan_at < l->scan_in->own; l->scan_at++) {
            struct slot *s = &l->scan_in->slot[l->scan_at];
            if (s->packed != NULL || s->busy || s->st != RT_OK)
                continue;
            for (int64_t i = 0; l->used + s->charge > l->o.bytes && i < l->at; i++)
                drop(l, &l->head->slot[i]);
            if (l->used + s->charge <= l->o.bytes || (l->scan_in == l->head && l->scan_at == l->at))
                return s;
            goto full;
        }
full:
    *count = true;
    for (int64_t i = 0; l->counting && i < l->head->own; i++)
        if (l->head->slot[i].targets < 0 && !l->head->slot[i].busy && l->head->slot[i].st == RT_OK)
            return &l->head->slot[i];
    return NULL;
}

/* Called and left with the lock. */
static void work_on(struct worker *w, struct slot *s, bool count)
{
    struct rt_loader *l = w->l;
    struct rt_micro *packed = NULL;
    struct rt_rows rows;
    struct rt_err err = {0};
    s->busy = true;
    l->used += count ? 0 : s->charge;
    pthread_mutex_unlock(&l->lock);
    enum rt_status st = rt_train_reader_get(w->reader[s->item.set], s->item.seq, &rows, &err);
    if (st == RT_OK && !count)
        st = pack_one(l, &s->item, &rows, &packed, &err);
    const int64_t targets = rt_train_set_known_targets(l->o.set[s->item.set], s->item.seq);
    pthread_mutex_lock(&l->lock);
    s->busy = false;
    s->st = st;
    s->err = err;
    s->targets = st == RT_OK ? targets : -1;
    s->packed = packed;
    if (!count && packed == NULL)
        l->used -= s->charge;
    if (count)
        rescan(l);
    pthread_cond_broadcast(&l->done);
}

static void *worker_main(void *self)
{
    struct worker *w = self;
    struct rt_loader *l = w->l;
    bool count;
    pthread_mutex_lock(&l->lock);
    while (!l->stop) {
        struct slot *s = pick(l, &count);
        if (s != NULL)
            work_on(w, s, count);
        else
            pthread_cond_wait(&l->work, &l->lock);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

/* ---- batches ahead ---- */

static enum rt_status fill_slots(struct rt_loader *l, struct batch *b, const int *owner, struct rt_err *err)
{
    enum rt_status st;
    struct rt_micro_options o = l->o.micro;
    for (int64_t i = 0; i < b->n; i++)
        b->own += owner[i] == l->o.rank;
    const int64_t own = b->own;
    b->own = 0;
    RT_TRY(rt_alloc((size_t)own, sizeof *b->slot, "a batch", &b->slot, err));
    for (int64_t i = 0; i < b->n; i++) {
        const struct rt_order_item it = b->items[i];
        o.tokens = rt_train_set_length(l->o.set[it.set], it.seq);
        b->tokens += o.tokens;
        if (owner[i] == l->o.rank)
            b->slot[b->own++] = (struct slot){.item = it, .charge = rt_micro_bytes(&o), .targets = rt_train_set_known_targets(l->o.set[it.set], it.seq)};
    }
out:
    return st;
}

/* One more batch at the tail; none at the end of the order. */
static enum rt_status list_one(struct rt_loader *l, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_order_item *items;
    struct batch *b = NULL;
    int *owner = NULL;
    int64_t n;
    RT_TRY(rt_order_next(&l->order, l->o.batch_tokens, &items, &n, err));
    l->end = n == 0;
    if (l->end)
        goto out;
    RT_TRY(rt_alloc(1, sizeof *b, "a batch", &b, err));
    RT_TRY(rt_alloc((size_t)n, sizeof *b->items, "a batch", &b->items, err));
    memcpy(b->items, items, (size_t)n * sizeof *items);
    b->n = n;
    b->epoch = rt_order_epoch(&l->order);
    RT_TRY(rt_alloc((size_t)n, sizeof *owner, "shares of a batch", &owner, err));
    if (l->o.size > 1)
        RT_TRY(rt_order_share(&l->order, b->items, n, l->o.size, owner, err));
    RT_TRY(fill_slots(l, b, owner, err));
    pthread_mutex_lock(&l->lock);
    for (int64_t i = 0; i < b->own; i++)
        l->listed += b->slot[i].charge;
    if (l->tail != NULL)
        l->tail->next = b;
    else
        l->head = b;
    l->tail = b;
    l->batches++;
    pthread_mutex_unlock(&l->lock);
    b = NULL;
out:
    if (b != NULL) {
        rt_free(b->items);
        rt_free(b->slot);
        rt_free(b);
    }
    rt_free(owner);
    return st;
}

static enum rt_status list_ahead(struct rt_loader *l, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const int64_t most = l->started > 0 ? AHEAD : 1;
    while (!l->end && l->batches < most && (l->batches < 2 || l->listed < l->o.bytes))
        RT_TRY(list_one(l, err));
out:
    return st;
}

/* ---- the caller's side ---- */

static enum rt_status start(struct rt_loader *l, struct rt_err *err)
{
    enum rt_status st;
    int threads = l->o.threads;
    for (int i = 0; i < l->o.n_sets; i++)
        if (rt_train_set_info(l->o.set[i])->kind == RT_TRAIN_MEMORY)
            threads = 0;
    l->o.threads = 0;
    RT_TRY(rt_alloc((size_t)threads, sizeof *l->worker, "threads of the loader", &l->worker, err));
    for (int i = 0; i < threads; i++) {
        struct worker *w = &l->worker[i];
        w->l = l;
        l->o.threads = i + 1; /* whose readers are freed */
        RT_TRY(rt_alloc((size_t)l->o.n_sets, sizeof *w->reader, "threads of the loader", &w->reader, err));
        for (int s = 0; s < l->o.n_sets; s++)
            RT_TRY(rt_train_reader_open(l->o.set[s], &w->reader[s], err));
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0)
            break; /* fewer do it too, and so does none */
        l->started++;
    }
out:
    return st;
}

enum rt_status rt_loader_open(const struct rt_loader_options *o, struct rt_loader **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_loader *l = NULL;
    RT_TRY(rt_alloc(1, sizeof *l, "the loader", &l, err));
    l->o = *o;
    l->o.size = o->size > 0 ? o->size : 1;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->work, NULL);
    pthread_cond_init(&l->done, NULL);
    RT_TRY(rt_order_open(&l->order, o->set, o->weight, o->n_sets, o->seed, o->epochs, err));
    RT_TRY(start(l, err));
    *out = l;
    l = NULL;
out:
    rt_loader_free(l);
    return st;
}

void rt_loader_free(struct rt_loader *l)
{
    if (l == NULL)
        return;
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_broadcast(&l->work);
    pthread_mutex_unlock(&l->lock);
    for (int i = 0; i < l->started; i++)
        pthread_join(l->worker[i].thread, NULL);
    for (int i = 0; l->worker != NULL && i < l->o.threads; i++)
        for (int s = 0; l->worker[i].reader != NULL && s < l->o.n_sets; s++)
            rt_train_reader_free(l->worker[i].reader[s]);
    for (int i = 0; l->worker != NULL && i < l->o.threads; i++)
        rt_free(l->worker[i].reader);
    rt_free(l->worker);
    for (struct batch *b = l->head, *next; b != NULL; b = next) {
        next = b->next;
        free_batch(l, b);
    }
    rt_order_close(&l->order);
    pthread_cond_destroy(&l->work);
    pthread_cond_destroy(&l->done);
    pthread_mutex_destroy(&l->lock);
    rt_free(l);
}

enum rt_status rt_loader_skip(struct rt_loader *l, int64_t n, int64_t *taken, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_order_item *items;
    int64_t found;
    for (*taken = 0; *taken < n; ++*taken) {
        RT_TRY(rt_order_next(&l->order, l->o.batch_tokens, &items, &found, err));
        if (found == 0)
            break;
    }
out:
    return st;
}

/* Waits, with the lock, until `ready` or an error of slot s; the time counts. */
static void wait_for(struct rt_loader *l, const struct slot *s, bool packed)
{
    double since = 0;
    while (s->st == RT_OK && (packed ? s->packed == NULL : s->targets < 0)) {
        since = since > 0 ? since : rt_now();
        pthread_cond_wait(&l->done, &l->lock);
    }
    l->waited += since > 0 ? rt_now() - since : 0;
}

static enum rt_status count_targets(struct rt_loader *l, int64_t *targets, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *targets = 0;
    pthread_mutex_lock(&l->lock);
    l->counting = true;
    rescan(l);
    for (int64_t i = 0; i < l->head->own && st == RT_OK; i++) {
        struct slot *s = &l->head->slot[i];
        if (l->started > 0)
            wait_for(l, s, false);
        else if (s->targets < 0)
            s->st = rt_train_set_targets(l->o.set[s->item.set], s->item.seq, &s->targets, &s->err);
        st = s->st != RT_OK ? rt_fail(err, s->st, "%s", s->err.msg) : RT_OK;
        *targets += s->targets;
    }
    l->counting = false;
    pthread_mutex_unlock(&l->lock);
    return st;
}

/* Nobody is at a slot of the batch that was current. */
static void leave_head(struct rt_loader *l)
{
    if (l->head == NULL)
        return;
    pthread_mutex_lock(&l->lock);
    for (int64_t i = 0; i < l->head->own; i++)
        while (l->head->slot[i].busy)
            pthread_cond_wait(&l->done, &l->lock);
    struct batch *b = l->head;
    l->head = b->next;
    l->tail = l->head == NULL ? NULL : l->tail;
    l->batches--;
    l->at = 0;
    free_batch(l, b);
    rescan(l);
    pthread_mutex_unlock(&l->lock);
}

enum rt_status rt_loader_next(struct rt_loader *l, struct rt_loader_batch *b, struct rt_err *err)
{
    enum rt_status st;
    *b = (struct rt_loader_batch){0};
    leave_head(l);
    RT_TRY(list_ahead(l, err));
    if (l->head == NULL)
        goto out;
    *b = (struct rt_loader_batch){.items = l->head->items, .n = l->head->n, .tokens = l->head->tokens, .own = l->head->own, .epoch = l->head->epoch};
    RT_TRY(count_targets(l, &b->targets, err));
out:
    return st;
}

/* Sequence *at of the share into p. */
static enum rt_status pack_next(struct rt_loader *l, struct rt_micro *p, int64_t at, bool *full, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct slot *s = &l->head->slot[at];
    *full = p->n + rt_train_set_length(l->o.set[s->item.set], s->item.seq) > p->o.tokens;
    if (*full)
        return RT_OK;
    if (l->started == 0)
        return rt_micro_add(p, l->o.set[s->item.set], &s->item, full, err);
    pthread_mutex_lock(&l->lock);
    if (at != l->at) { /* from the beginning again */
        l->at = at;
        rescan(l);
    }
    wait_for(l, s, true);
    st = s->st != RT_OK ? rt_fail(err, s->st, "%s", s->err.msg) : RT_OK;
    pthread_mutex_unlock(&l->lock);
    if (st == RT_OK)
        rt_micro_append(p, s->packed, full); /* threads let go of slots before l->at alone */
    pthread_mutex_lock(&l->lock);
    l->at = at + 1;
    pthread_cond_broadcast(&l->work); /* there may be room now */
    pthread_mutex_unlock(&l->lock);
    return st;
}

enum rt_status rt_loader_pack(struct rt_loader *l, struct rt_micro *p, int64_t *at, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    bool full = false;
    rt_micro_clear(p);
    while (l->head != NULL && *at < l->head->own) {
        RT_TRY(pack_next(l, p, *at, &full, err));
        if (full)
            break;
        ++*at;
    }
    if (p->n == 0 && full)
        RT_FAIL(err, USAGE, "micro-batches of %ld tokens: a sequence has %ld", (long)p->o.tokens,
                (long)rt_train_set_length(l->o.set[l->head->slot[*at].item.set], l->head->slot[*at].item.seq));
out:
    return st;
}
