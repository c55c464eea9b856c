#include "teacher/weights_stream.h"

#include <string.h>

#include "core/io.h"
#include "core/log.h"
#include "core/mem.h"

/* A thread's copies under way: each slot has at most one, so that the queue never fills up under the lock. */
struct slot {
    struct rt_feed_ref ref;
    struct rt_event *copied;
    bool busy;
};

/* What a thread takes, and where it goes in the part's block. */
struct chunk {
    struct rt_item *item;
    struct rt_feed_chunk c;
    const char *tensor;
    char *place;
};

static enum rt_status get_event(struct rt_stream *s, struct rt_event **out, struct rt_err *err)
{
    if (s->n_spare > 0) {
        *out = s->spare[--s->n_spare];
        return RT_OK;
    }
    return s->d->be->event_create(s->d->dev, out, err);
}

/* Back to the spare ones; there is room for all that a pass can hold. */
static void put_event(struct rt_stream *s, struct rt_event **e)
{
    if (*e != NULL)
        s->spare[s->n_spare++] = *e;
    *e = NULL;
}

enum rt_status rt_stream_init(struct rt_stream *s, const struct rt_device *d, const struct rt_tensors *ts, const struct rt_entry *entry, int64_t n,
                              int threads, const struct rt_stream *with, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    s->d = d;
    s->ts = ts;
    s->entry = entry;
    s->own = d->be->own_memory;
    s->threads = threads > 0 ? threads : s->own ? 8 : 1;
    if (s->threads > RT_WEIGHTS_MAX_THREADS)
        s->threads = RT_WEIGHTS_MAX_THREADS;
    if (!s->own)
        goto out;
    struct rt_feed *feed = with != NULL ? with->feed : NULL;
    if (feed == NULL)
        RT_TRY(rt_feed_create(d, ts, entry, n, &feed, err));
    st = rt_feed_join(feed, s->threads, &s->member, err);
    if (st == RT_OK)
        s->feed = feed;
    if (with == NULL) /* the reference of its making */
        rt_feed_drop(feed, d);
    if (st == RT_OK)
        st = d->be->queue_create(d->dev, &s->copies, err);
out:
    return st;
}

void rt_stream_free(struct rt_stream *s)
{
    if (s->d == NULL)
        return;
    for (int64_t i = 0; i < s->n_spare; i++)
        s->d->be->event_free(s->d->dev, s->spare[i]);
    rt_free(s->spare);
    if (s->copies != NULL)
        s->d->be->queue_free(s->d->dev, s->copies);
    rt_feed_drop(s->feed, s->d);
    if (s->ring != NULL)
        s->d->be->free(s->d->dev, s->ring);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    *s = (struct rt_stream){0};
}

uint64_t rt_stream_staging(const struct rt_stream *s)
{
    return s->own ? rt_feed_staging(s->threads) : 0;
}

/* ---- the threads ---- */

/* The copy queue waits for the use of released items whose space reaches below v1 - ring_size. */
static enum rt_status fence(struct rt_stream *s, uint64_t v1, struct rt_err *err)
{
    struct rt_item *last = NULL;
    enum rt_status st = RT_OK;
    for (; s->fenced < s->released; s->fenced++) {
        struct rt_item *it = &s->item[s->fenced];
        if (it->v0 < it->v1) {
            if (it->v0 + s->ring_size >= v1)
                break;
            last = it;
        }
    }
    if (last != NULL)
        RT_TRY(s->d->be->event_wait(s->d->dev, s->copies, last->used, err));
out:
    return st;
}

/* Space in the ring for the item; *placed false: not yet. Under the lock. */
static enum rt_status place(struct rt_stream *s, struct rt_item *it, struct rt_err *err)
{
    const uint64_t bytes = it->e->plan.bytes, at = s->head % s->ring_size;
    const uint64_t v0 = at + bytes <= s->ring_size ? s->head : s->head + (s->ring_size - at);
    enum rt_status st = RT_OK;
    if (s->tail == s->head && v0 > s->head)
        s->tail = s->head = v0; /* an empty ring has no end to skip */
    if (v0 + bytes - s->tail > s->ring_size)
        return RT_OK;
    it->v0 = v0;
    it->v1 = s->head = v0 + bytes;
    it->part->block = s->ring + v0 % s->ring_size;
    it->placed = true;
    if (s->own)
        RT_TRY(fence(s, it->v1, err));
out:
    return st;
}

static void hand_out(const struct rt_stream *s, struct rt_item *it, struct chunk *c)
{
    size_t at;
    const struct rt_tensor *t = rt_entry_piece(it->e, it->e->order[it->piece], &at);
    const uint64_t left = t->bytes - it->piece_at, bytes = left < RT_FEED_CHUNK ? left : RT_FEED_CHUNK;
    c->item = it;
    c->tensor = t->name;
    c->c = (struct rt_feed_chunk){.entry = it->e - s->entry, .no = it->chunk++, .file = t->file, .offset = t->offset + it->piece_at, .bytes = bytes};
    c->place = (char *)it->part->block + at + it->piece_at;
    it->piece_at += bytes;
    if (it->piece_at == t->bytes) {
        it->piece_at = 0;
        it->piece++;
    }
}

enum taken { TAKEN, NONE_LEFT, NO_ROOM };

/* The next chunk of the pass; NONE_LEFT also where an error is set. Under the lock. */
static enum taken take(struct rt_stream *s, struct chunk *c)
{
    if (s->cancel || s->err.status != RT_OK)
        return NONE_LEFT;
    while (s->reading < s->n_items && (s->item[s->reading].part == NULL || s->item[s->reading].state != RT_ITEM_WAITING ||
                                       (s->item[s->reading].placed && s->item[s->reading].piece == s->item[s->reading].e->n_pieces)))
        s->reading++;
    if (s->reading == s->n_items)
        return NONE_LEFT;
    struct rt_item *it = &s->item[s->reading];
    if (!it->placed) {
        it->left = it->e->stored;
        it->placed = it->part->block != NULL;
        if (!it->placed && place(s, it, &s->err) != RT_OK)
            return NONE_LEFT;
        if (!it->placed)
            return NO_ROOM;
    }
    hand_out(s, it, c);
    return TAKEN;
}

/* Under the lock: the chunk is on its way; the last one of an item makes it READ. */
static enum rt_status arrived(struct rt_stream *s, const struct chunk *c, struct slot *slot, struct rt_err *err)
{
    const struct rt_backend *be = s->d->be;
    struct rt_item *it = c->item;
    enum rt_status st = RT_OK;
    if (s->own) {
        RT_TRY(be->upload(s->d->dev, s->copies, c->place, slot->ref.data, (size_t)c->c.bytes, err));
        RT_TRY(be->event_record(s->d->dev, s->copies, slot->copied, err));
        slot->busy = true;
    }
    it->left -= c->c.bytes;
    if (!s->own || slot->ref.read) {
        s->read_bytes += c->c.bytes;
        s->last_read = rt_now();
    }
    if (it->left > 0)
        goto out;
    if (s->own) {
        RT_TRY(get_event(s, &it->copied, err));
        RT_TRY(be->event_record(s->d->dev, s->copies, it->copied, err));
    }
    it->state = RT_ITEM_READ;
    pthread_cond_broadcast(&s->changed);
out:
    return st;
}

/* Waits for the slot's copy and gives its bytes back. */
static enum rt_status clear_slot(struct rt_stream *s, struct slot *slot, struct rt_err *err)
{
    const enum rt_status st = slot->busy ? s->d->be->event_sync(s->d->dev, slot->copied, err) : RT_OK;
    slot->busy = false;
    rt_feed_put(s->feed, &slot->ref);
    return st;
}

static enum rt_status fetch(struct rt_stream *s, const struct chunk *c, struct slot *slot, struct rt_err *err)
{
    char name[64];
    enum rt_status st;
    if (s->own) {
        st = clear_slot(s, slot, err);
        if (st == RT_OK)
            st = rt_feed_get(s->feed, s->d, s->member, &c->c, &slot->ref, err);
    } else {
        st = rt_file_pread(rt_tensors_fd(s->ts, c->c.file), rt_tensors_file(s->ts, c->c.file), c->place, (size_t)c->c.bytes, c->c.offset, err);
    }
    if (st != RT_OK)
        rt_err_context(err, "%s, %.150s", rt_part_name(c->item->e->id, name), c->tensor);
    return st;
}

static enum rt_status make_slots(struct rt_stream *s, struct slot *slot, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(s->d->be->attach(s->d->dev, err));
    for (int i = 0; i < RT_FEED_SLOTS && s->own; i++)
        RT_TRY(s->d->be->event_create(s->d->dev, &slot[i].copied, err));
out:
    return st;
}

static void free_slots(struct rt_stream *s, struct slot *slot)
{
    for (int i = 0; i < RT_FEED_SLOTS && s->own; i++) {
        (void)clear_slot(s, &slot[i], NULL);
        if (slot[i].copied != NULL)
            s->d->be->event_free(s->d->dev, slot[i].copied);
    }
}

static void *thread_main(void *self)
{
    struct rt_stream *s = self;
    struct slot slot[RT_FEED_SLOTS] = {0};
    struct rt_err err = {0};
    struct chunk c;
    enum rt_status st = make_slots(s, slot, &err);
    int at = 0;
    bool held = false; /* bytes of the reader that others may wait for */
    pthread_mutex_lock(&s->lock);
    while (st == RT_OK) {
        const enum taken got = take(s, &c);
        if (got == NONE_LEFT)
            break;
        if (got == NO_ROOM && !held) {
            pthread_cond_wait(&s->changed, &s->lock);
            continue;
        }
        pthread_mutex_unlock(&s->lock);
        struct slot *use = &slot[at++ % RT_FEED_SLOTS];
        if (got == TAKEN)
            st = fetch(s, &c, use, &err);
        for (int i = 0; got == NO_ROOM && st == RT_OK && i < RT_FEED_SLOTS; i++)
            st = clear_slot(s, &slot[i], &err);
        pthread_mutex_lock(&s->lock);
        if (got == TAKEN && st == RT_OK)
            st = arrived(s, &c, use, &err);
        held = s->own && got == TAKEN;
    }
    if (st != RT_OK && s->err.status == RT_OK)
        s->err = err;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    free_slots(s, slot);
    return NULL;
}

/* ---- the caller's side ---- */

enum rt_status rt_stream_begin(struct rt_stream *s, struct rt_item *item, int64_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    bool any = false;
    s->item = item;
    s->n_items = n;
    s->released = s->reading = s->fenced = 0;
    s->head = s->tail = 0;
    s->cancel = false;
    s->begun = s->last_read = rt_now();
    rt_err_clear(&s->err);
    for (int64_t i = 0; i < n; i++)
        any |= item[i].state == RT_ITEM_WAITING;
    if (s->own && s->spare_cap < 4 * n) {
        struct rt_event **spare;
        RT_TRY(rt_alloc((size_t)(4 * n), sizeof *spare, "events of a pass", &spare, err));
        if (s->n_spare > 0)
            memcpy(spare, s->spare, (size_t)s->n_spare * sizeof *spare);
        rt_free(s->spare);
        s->spare = spare;
        s->spare_cap = 4 * n;
    }
    if (s->own && n > 0)
        rt_feed_begin(s->feed, s->member, item[0].e - s->entry);
    for (int i = 0; any && i < s->threads; i++) {
        if (pthread_create(&s->thread[i], NULL, thread_main, s) != 0) {
            if (i > 0)
                break; /* fewer do it too */
            RT_FAIL(err, NOMEM, "cannot start the thread that reads weights");
        }
        s->running++;
    }
out:
    return st;
}

enum rt_status rt_stream_wait(struct rt_stream *s, struct rt_item *it, struct rt_err *err)
{
    const struct rt_backend *be = s->d->be;
    enum rt_status st = RT_OK;
    pthread_mutex_lock(&s->lock);
    if (s->own && (it->state == RT_ITEM_WAITING || it->copied != NULL)) {
        st = get_event(s, &it->stall0, err);
        if (st == RT_OK)
            st = get_event(s, &it->stall1, err);
        if (st == RT_OK) /* from where the device has nothing else to do, be it that bytes have not come from the disk or that they are not copied */
            st = be->event_record(s->d->dev, s->d->q, it->stall0, err);
    }
    while (st == RT_OK && it->state == RT_ITEM_WAITING && s->err.status == RT_OK)
        pthread_cond_wait(&s->changed, &s->lock);
    if (st == RT_OK && it->state == RT_ITEM_WAITING)
        st = rt_fail(err, s->err.status, "%s", s->err.msg);
    pthread_mutex_unlock(&s->lock);
    if (st != RT_OK || it->copied == NULL)
        return st;
    RT_TRY(be->event_wait(s->d->dev, s->d->q, it->copied, err));
    RT_TRY(be->event_record(s->d->dev, s->d->q, it->stall1, err));
out:
    return st;
}

enum rt_status rt_stream_release(struct rt_stream *s, struct rt_item *it, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    pthread_mutex_lock(&s->lock);
    if (s->own && it->v0 < it->v1) {
        RT_TRY(get_event(s, &it->used, err));
        RT_TRY(s->d->be->event_record(s->d->dev, s->d->q, it->used, err));
    }
    if (it->v0 < it->v1)
        s->tail = it->v1;
    it->state = RT_ITEM_DONE;
    s->released++;
    pthread_cond_broadcast(&s->changed);
out:
    pthread_mutex_unlock(&s->lock);
    return st;
}

void rt_stream_end(struct rt_stream *s, double *stalled)
{
    pthread_mutex_lock(&s->lock);
    s->cancel = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    if (s->own)
        rt_feed_end(s->feed, s->member);
    for (; s->running > 0; s->running--)
        pthread_join(s->thread[s->running - 1], NULL);
    if (s->own) {
        const struct rt_backend *be = s->d->be;
        (void)be->queue_sync(s->d->dev, s->copies, NULL);
        const bool sound = be->queue_sync(s->d->dev, s->d->q, NULL) == RT_OK;
        for (int64_t i = 0; i < s->n_items; i++) {
            struct rt_item *it = &s->item[i];
            double seconds = 0;
            if (sound && it->stall1 != NULL && it->state != RT_ITEM_WAITING && be->event_elapsed(s->d->dev, it->stall0, it->stall1, &seconds, NULL) == RT_OK)
                *stalled += seconds;
            put_event(s, &it->copied);
            put_event(s, &it->used);
            put_event(s, &it->stall0);
            put_event(s, &it->stall1);
        }
    }
    s->read_seconds += s->last_read - s->begun;
    s->item = NULL;
    s->n_items = 0;
}
