#include "teacher/weights_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "core/mem.h"

enum {
    CHUNK = 8 << 20,  /* bytes of one read: large enough for a disk's full rate, small enough to spread a tensor over threads */
    PAGE = 4096,      /* alignment of O_DIRECT */
    SLOTS = 2,        /* of each thread: one is read while the other is copied */
    SLOT_BYTES = CHUNK + 2 * PAGE,
};

/* A thread's copies under way: each slot has at most one, so that the queue never fills up under the lock. */
struct slot {
    char *data;
    struct rt_event *copied;
    bool busy;
};

/* What a thread takes: bytes of a tensor file and where they go. */
struct chunk {
    struct rt_item *item;
    int file;
    uint64_t offset, bytes;
    char *place;       /* in the part's block */
    const char *kept;  /* own: these bytes are in pinned host memory already; or NULL */
    char *keep;        /* own: where they are to be kept; or NULL */
};

/* Piece 2 i is weight i of the part, 2 i + 1 its scale. */
static const struct rt_tensor *piece_tensor(const struct rt_part_plan *plan, int piece, size_t *at)
{
    const struct rt_part_tensor *t = &plan->t[piece / 2];
    *at = piece % 2 ? t->scale_at : t->at;
    return piece % 2 ? t->scale : t->weight;
}

/* Pieces in the order of their files and offsets: a disk that seeks is spared. */
static void order_pieces(struct rt_item *it)
{
    const struct rt_part_plan *plan = &it->e->plan;
    size_t at;
    it->n_pieces = 0;
    it->left = 0;
    for (int i = 0; i < plan->n; i++)
        for (int s = 0; s < 1 + (plan->t[i].scale != NULL); s++) {
            const struct rt_tensor *t = piece_tensor(plan, 2 * i + s, &at), *u;
            int8_t k = it->n_pieces++;
            it->left += t->bytes;
            for (; k > 0; k--) {
                u = piece_tensor(plan, it->order[k - 1], &at);
                if (u->file < t->file || (u->file == t->file && u->offset < t->offset))
                    break;
                it->order[k] = it->order[k - 1];
            }
            it->order[k] = (int8_t)(2 * i + s);
        }
}

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

enum rt_status rt_stream_init(struct rt_stream *s, const struct rt_device *d, const struct rt_tensors *ts, int threads, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    s->d = d;
    s->ts = ts;
    s->own = d->be->own_memory;
    s->threads = threads > 0 ? threads : s->own ? 8 : 1;
    if (s->threads > RT_WEIGHTS_MAX_THREADS)
        s->threads = RT_WEIGHTS_MAX_THREADS;
    if (!s->own)
        goto out;
    RT_TRY(rt_alloc((size_t)rt_tensors_n_files(ts), sizeof *s->direct, "file table", &s->direct, err));
    for (int i = 0; i < rt_tensors_n_files(ts); i++)
        s->direct[i] = open(rt_tensors_file(ts, i), O_RDONLY | O_CLOEXEC | O_DIRECT); /* -1 on a file system without: read the plain way */
    RT_TRY(d->be->queue_create(d->dev, &s->copies, err));
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
    for (int i = 0; s->direct != NULL && i < rt_tensors_n_files(s->ts); i++)
        rt_file_close(s->direct[i]);
    rt_free(s->direct);
    if (s->ring != NULL)
        s->d->be->free(s->d->dev, s->ring);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    *s = (struct rt_stream){0};
}

uint64_t rt_stream_staging(const struct rt_stream *s)
{
    return s->own ? (uint64_t)s->threads * SLOTS * SLOT_BYTES : 0;
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

static void hand_out(struct rt_item *it, struct chunk *c)
{
    size_t at;
    const struct rt_tensor *t = piece_tensor(&it->e->plan, it->order[it->piece], &at);
    const uint64_t left = t->bytes - it->piece_at, bytes = left < CHUNK ? left : CHUNK;
    *c = (struct chunk){.item = it, .file = t->file, .offset = t->offset + it->piece_at, .bytes = bytes};
    at += it->piece_at;
    c->place = (char *)it->part->block + at;
    if (it->e->host != NULL && it->e->host_full)
        c->kept = (const char *)it->e->host + at;
    else if (it->e->host != NULL)
        c->keep = (char *)it->e->host + at;
    it->piece_at += bytes;
    if (it->piece_at == t->bytes) {
        it->piece_at = 0;
        it->piece++;
    }
}

/* The next chunk of the pass, waiting for space; false: no more, or an error is set. Under the lock. */
static bool take(struct rt_stream *s, struct chunk *c)
{
    for (;;) {
        if (s->cancel || s->err.status != RT_OK)
            return false;
        while (s->reading < s->n_items && (s->item[s->reading].part == NULL || s->item[s->reading].state != RT_ITEM_WAITING ||
                                           (s->item[s->reading].placed && s->item[s->reading].piece == s->item[s->reading].n_pieces)))
            s->reading++;
        if (s->reading == s->n_items)
            return false;
        struct rt_item *it = &s->item[s->reading];
        if (it->n_pieces == 0)
            order_pieces(it);
        if (!it->placed) {
            it->placed = it->part->block != NULL;
            if (!it->placed && place(s, it, &s->err) != RT_OK)
                return false;
            if (!it->placed) {
                pthread_cond_wait(&s->changed, &s->lock);
                continue;
            }
        }
        hand_out(it, c);
        return true;
    }
}

/* dst = the chunk's bytes, through O_DIRECT into a slot where it works; *data points at them. */
static enum rt_status read_slot(struct rt_stream *s, const struct chunk *c, struct slot *slot, const char **data, struct rt_err *err)
{
    const char *path = rt_tensors_file(s->ts, c->file);
    const uint64_t skip = c->offset % PAGE, want = skip + c->bytes;
    if (s->direct[c->file] >= 0) {
        const size_t whole = (size_t)((want + PAGE - 1) / PAGE * PAGE);
        size_t done = 0;
        while (done < want) { /* the file may end within the last page */
            const ssize_t got = pread(s->direct[c->file], slot->data + done, whole - done, (off_t)(c->offset - skip + done));
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0 || (done + (size_t)got < want && got % PAGE != 0))
                break; /* a real error comes out of the plain read below, with its words */
            done += (size_t)got;
        }
        if (done >= want) {
            *data = slot->data + skip;
            return RT_OK;
        }
    }
    *data = slot->data;
    return rt_file_pread(rt_tensors_fd(s->ts, c->file), path, slot->data, (size_t)c->bytes, c->offset, err);
}

/* Under the lock: the chunk is on its way; the last one of an item makes it READ. */
static enum rt_status arrived(struct rt_stream *s, const struct chunk *c, const char *from, struct slot *slot, struct rt_err *err)
{
    const struct rt_backend *be = s->d->be;
    struct rt_item *it = c->item;
    enum rt_status st = RT_OK;
    if (s->own) {
        RT_TRY(be->upload(s->d->dev, s->copies, c->place, from, (size_t)c->bytes, err));
        RT_TRY(be->event_record(s->d->dev, s->copies, slot->copied, err));
        slot->busy = true;
    }
    it->left -= c->bytes;
    if (c->kept == NULL)
        s->read_bytes += c->bytes;
    if (it->left > 0)
        goto out;
    if (s->own) {
        it->e->host_full = it->e->host != NULL;
        RT_TRY(get_event(s, &it->copied, err));
        RT_TRY(be->event_record(s->d->dev, s->copies, it->copied, err));
    }
    it->state = RT_ITEM_READ;
    pthread_cond_broadcast(&s->changed);
out:
    return st;
}

static enum rt_status fetch(struct rt_stream *s, const struct chunk *c, struct slot *slot, const char **from, struct rt_err *err)
{
    char name[64];
    enum rt_status st = RT_OK;
    *from = c->kept;
    if (s->own && slot->busy)
        st = s->d->be->event_sync(s->d->dev, slot->copied, err);
    if (s->own)
        slot->busy = false;
    if (st != RT_OK || c->kept != NULL)
        return st;
    if (!s->own) {
        st = rt_file_pread(rt_tensors_fd(s->ts, c->file), rt_tensors_file(s->ts, c->file), c->place, (size_t)c->bytes, c->offset, err);
    } else {
        st = read_slot(s, c, slot, from, err);
        if (st == RT_OK && c->keep != NULL) {
            memcpy(c->keep, *from, (size_t)c->bytes);
            *from = c->keep;
        }
    }
    if (st != RT_OK)
        rt_err_context(err, "%s", rt_part_name(c->item->e->id, name));
    return st;
}

static enum rt_status make_slots(struct rt_stream *s, struct slot *slot, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(s->d->be->attach(s->d->dev, err));
    for (int i = 0; i < SLOTS && s->own; i++) {
        RT_TRY(s->d->be->host_alloc(s->d->dev, SLOT_BYTES, (void **)&slot[i].data, err));
        RT_TRY(s->d->be->event_create(s->d->dev, &slot[i].copied, err));
    }
out:
    return st;
}

static void free_slots(struct rt_stream *s, struct slot *slot)
{
    for (int i = 0; i < SLOTS; i++) {
        if (slot[i].busy)
            (void)s->d->be->event_sync(s->d->dev, slot[i].copied, NULL);
        if (slot[i].copied != NULL)
            s->d->be->event_free(s->d->dev, slot[i].copied);
        if (slot[i].data != NULL)
            s->d->be->host_free(s->d->dev, slot[i].data);
    }
}

static void *thread_main(void *self)
{
    struct rt_stream *s = self;
    struct slot slot[SLOTS] = {{0}};
    struct rt_err err = {0};
    struct chunk c;
    enum rt_status st = make_slots(s, slot, &err);
    int at = 0;
    pthread_mutex_lock(&s->lock);
    while (st == RT_OK && take(s, &c)) {
        const char *from = NULL;
        struct slot *use = &slot[at++ % SLOTS];
        pthread_mutex_unlock(&s->lock);
        st = fetch(s, &c, use, &from, &err);
        pthread_mutex_lock(&s->lock);
        if (st == RT_OK)
            st = arrived(s, &c, from, use, &err);
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
    while (it->state == RT_ITEM_WAITING && s->err.status == RT_OK)
        pthread_cond_wait(&s->changed, &s->lock);
    if (it->state == RT_ITEM_WAITING)
        st = rt_fail(err, s->err.status, "%s", s->err.msg);
    if (st == RT_OK && s->own && it->copied != NULL) {
        st = get_event(s, &it->stall0, err);
        if (st == RT_OK)
            st = get_event(s, &it->stall1, err);
    }
    pthread_mutex_unlock(&s->lock);
    if (st != RT_OK || it->copied == NULL)
        return st;
    RT_TRY(be->event_record(s->d->dev, s->d->q, it->stall0, err));
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
    for (; s->running > 0; s->running--)
        pthread_join(s->thread[s->running - 1], NULL);
    if (s->own) {
        const struct rt_backend *be = s->d->be;
        (void)be->queue_sync(s->d->dev, s->copies, NULL);
        const bool sound = be->queue_sync(s->d->dev, s->d->q, NULL) == RT_OK;
        for (int64_t i = 0; i < s->n_items; i++) {
            struct rt_item *it = &s->item[i];
            double seconds = 0;
            if (sound && it->stall1 != NULL && be->event_elapsed(s->d->dev, it->stall0, it->stall1, &seconds, NULL) == RT_OK)
                *stalled += seconds;
            put_event(s, &it->copied);
            put_event(s, &it->used);
            put_event(s, &it->stall0);
            put_event(s, &it->stall1);
        }
    }
    s->item = NULL;
    s->n_items = 0;
}
