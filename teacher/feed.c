#include "teacher/feed.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"
#include "core/mem.h"

enum { PAGE = 4096 }; /* alignment of O_DIRECT */
#define BLOCK_BYTES ((uint64_t)RT_FEED_CHUNK + 3 * PAGE) /* a page before and one behind, and one to begin at a page */

enum chunk_state { ABSENT, READING, READY };

struct rt_feed_block {
    void *memory;          /* pinned when first used */
    const char *data;
    int64_t chunk;         /* over all entries; -1: free */
    enum chunk_state state;
    uint32_t wanted;       /* members that are to ask for it */
    int refs, owner;
};

struct member {
    bool expected, cancel;
    int64_t first;
    uint8_t *got;          /* bits: chunks of this pass that it has */
    int quota, held;       /* blocks that it may read into; and does */
};

struct kept {
    bool keep, making;
    void *memory;          /* pinned */
    char *base;            /* in it, at a page: each chunk at a multiple of a page plus what its offset lies behind one, with room for whole pages */
};

struct rt_feed {
    const struct rt_tensors *ts;
    const struct rt_entry *entry;
    int64_t n, n_chunks;
    int64_t *base;         /* [n + 1] chunks before an entry's */
    uint8_t *state;        /* [chunks] of parts that are kept */
    struct kept *kept;     /* [n] */
    uint64_t left;         /* bytes that may still be kept */
    struct rt_feed_block *block;
    int n_blocks, refs, n_members;
    struct member member[RT_FEED_MEMBERS];
    int *direct;           /* [files] descriptors opened with O_DIRECT, -1: none */
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

const struct rt_tensor *rt_entry_piece(const struct rt_entry *e, int piece, size_t *at)
{
    const struct rt_part_tensor *t = &e->plan.t[piece / 2];
    *at = piece % 2 ? t->scale_at : t->at;
    return piece % 2 ? t->scale : t->weight;
}

static uint64_t pages(uint64_t bytes)
{
    return (bytes + PAGE - 1) / PAGE * PAGE;
}

/* Chunks of the entry; *place = where chunk `no` begins in memory of its own, *bytes = what all take there. */
static int walk(const struct rt_entry *e, int no, uint64_t *place, uint64_t *bytes)
{
    uint64_t at = 0;
    int n = 0;
    size_t unused;
    for (int i = 0; i < e->n_pieces; i++) {
        const struct rt_tensor *t = rt_entry_piece(e, e->order[i], &unused);
        for (uint64_t done = 0; done < t->bytes; n++) {
            const uint64_t left = t->bytes - done, take = left < RT_FEED_CHUNK ? left : RT_FEED_CHUNK;
            if (n == no)
                *place = at;
            at += pages((t->offset + done) % PAGE + take);
            done += take;
        }
    }
    *bytes = at;
    return n;
}

void rt_entry_order(struct rt_entry *e)
{
    size_t at;
    uint64_t place;
    e->n_pieces = 0;
    e->stored = 0;
    for (int i = 0; i < e->plan.n; i++)
        for (int s = 0; s < 1 + (e->plan.t[i].scale != NULL); s++) {
            const struct rt_tensor *t = rt_entry_piece(e, 2 * i + s, &at), *u;
            int8_t k = e->n_pieces++;
            e->stored += t->bytes;
            for (; k > 0; k--) {
                u = rt_entry_piece(e, e->order[k - 1], &at);
                if (u->file < t->file || (u->file == t->file && u->offset < t->offset))
                    break;
                e->order[k] = e->order[k - 1];
            }
            e->order[k] = (int8_t)(2 * i + s);
        }
    (void)walk(e, -1, &place, &e->room);
}

enum rt_status rt_feed_create(const struct rt_device *d, const struct rt_tensors *ts, const struct rt_entry *entry, int64_t n, struct rt_feed **out,
                              struct rt_err *err)
{
    struct rt_feed *f = NULL;
    uint64_t place, bytes;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *f, "the reader", &f, err));
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->changed, NULL);
    f->refs = 1;
    f->ts = ts;
    f->entry = entry;
    f->n = n;
    RT_TRY(rt_alloc((size_t)rt_tensors_n_files(ts), sizeof *f->direct, "file table", &f->direct, err));
    for (int i = 0; i < rt_tensors_n_files(ts); i++)
        f->direct[i] = open(rt_tensors_file(ts, i), O_RDONLY | O_CLOEXEC | O_DIRECT); /* -1 on a file system without: read the plain way */
    RT_TRY(rt_alloc((size_t)n + 1, sizeof *f->base, "chunks", &f->base, err));
    RT_TRY(rt_alloc((size_t)n, sizeof *f->kept, "parts", &f->kept, err));
    for (int64_t i = 0; i < n; i++)
        f->base[i + 1] = f->base[i] + walk(&entry[i], -1, &place, &bytes);
    f->n_chunks = f->base[n];
    RT_TRY(rt_alloc((size_t)f->n_chunks, 1, "chunks", &f->state, err));
    *out = f;
    f = NULL;
out:
    if (f != NULL)
        rt_feed_drop(f, d);
    return st;
}

enum rt_status rt_feed_join(struct rt_feed *f, int threads, int *member, struct rt_err *err)
{
    struct rt_feed_block *block = NULL;
    enum rt_status st;
    const int more = threads * RT_FEED_SLOTS;
    struct member *m = &f->member[f->n_members];
    if (f->n_members == RT_FEED_MEMBERS)
        RT_FAIL(err, USAGE, "more than %d devices share a checkpoint", RT_FEED_MEMBERS);
    RT_TRY(rt_alloc((size_t)(f->n_chunks + 7) / 8, 1, "chunks", &m->got, err));
    RT_TRY(rt_alloc((size_t)(f->n_blocks + more), sizeof *block, "blocks", &block, err));
    for (int i = 0; i < f->n_blocks + more; i++)
        block[i] = i < f->n_blocks ? f->block[i] : (struct rt_feed_block){.chunk = -1};
    rt_free(f->block);
    f->block = block;
    f->n_blocks += more;
    m->quota = more;
    *member = f->n_members++;
    f->refs++;
out:
    if (st != RT_OK && f->n_members < RT_FEED_MEMBERS) {
        rt_free(m->got);
        m->got = NULL;
    }
    return st;
}

void rt_feed_drop(struct rt_feed *f, const struct rt_device *d)
{
    if (f == NULL)
        return;
    pthread_mutex_lock(&f->lock);
    const int left = --f->refs;
    pthread_mutex_unlock(&f->lock);
    if (left > 0)
        return;
    for (int64_t i = 0; f->kept != NULL && i < f->n; i++)
        if (f->kept[i].memory != NULL)
            d->be->host_free(d->dev, f->kept[i].memory);
    for (int i = 0; i < f->n_blocks; i++)
        if (f->block[i].memory != NULL)
            d->be->host_free(d->dev, f->block[i].memory);
    for (int i = 0; f->direct != NULL && i < rt_tensors_n_files(f->ts); i++)
        rt_file_close(f->direct[i]);
    for (int i = 0; i < f->n_members; i++)
        rt_free(f->member[i].got);
    rt_free(f->direct);
    rt_free(f->base);
    rt_free(f->kept);
    rt_free(f->state);
    rt_free(f->block);
    pthread_mutex_destroy(&f->lock);
    pthread_cond_destroy(&f->changed);
    rt_free(f);
}

uint64_t rt_feed_staging(int threads)
{
    return (uint64_t)threads * RT_FEED_SLOTS * BLOCK_BYTES;
}

void rt_feed_allow(struct rt_feed *f, uint64_t bytes)
{
    pthread_mutex_lock(&f->lock);
    f->left += bytes;
    pthread_mutex_unlock(&f->lock);
}

void rt_feed_keep(struct rt_feed *f, int64_t entry)
{
    const uint64_t bytes = f->entry[entry].room + PAGE;
    pthread_mutex_lock(&f->lock);
    struct kept *k = &f->kept[entry];
    if (!k->keep && bytes <= f->left) {
        k->keep = true;
        f->left -= bytes;
    }
    pthread_mutex_unlock(&f->lock);
}

/* ---- members ---- */

/* Under the lock. */
static void free_if_done(struct rt_feed *f, struct rt_feed_block *b)
{
    if (b->chunk < 0 || b->state != READY || b->refs > 0 || b->wanted != 0)
        return;
    b->chunk = -1;
    f->member[b->owner].held--;
    pthread_cond_broadcast(&f->changed);
}

void rt_feed_expect(struct rt_feed *f, int member)
{
    struct member *m = &f->member[member];
    pthread_mutex_lock(&f->lock);
    m->expected = true;
    m->cancel = false;
    m->first = 0;
    memset(m->got, 0, (size_t)(f->n_chunks + 7) / 8);
    pthread_mutex_unlock(&f->lock);
}

/* Blocks before entry `first` are not waited for. Under the lock. */
static void forget(struct rt_feed *f, int member, int64_t first)
{
    for (int i = 0; i < f->n_blocks; i++)
        if (f->block[i].chunk >= 0 && f->block[i].chunk < f->base[first]) {
            f->block[i].wanted &= ~(1u << member);
            free_if_done(f, &f->block[i]);
        }
}

void rt_feed_begin(struct rt_feed *f, int member, int64_t first)
{
    struct member *m = &f->member[member];
    if (!m->expected)
        rt_feed_expect(f, member);
    pthread_mutex_lock(&f->lock);
    m->first = first;
    forget(f, member, first);
    pthread_mutex_unlock(&f->lock);
}

void rt_feed_end(struct rt_feed *f, int member)
{
    struct member *m = &f->member[member];
    pthread_mutex_lock(&f->lock);
    m->expected = false;
    m->cancel = true;
    forget(f, member, f->n);
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
}

/* ---- chunks ---- */

/* to, which lies as far behind a multiple of a page as the chunk does in its file and has room for whole pages around it, = its bytes. */
static enum rt_status read_chunk(const struct rt_feed *f, const struct rt_feed_chunk *c, char *to, struct rt_err *err)
{
    const uint64_t skip = c->offset % PAGE, want = skip + c->bytes;
    const size_t whole = (size_t)pages(want);
    size_t done = 0;
    while (f->direct[c->file] >= 0 && done < want) { /* the file may end within the last page */
        const ssize_t got = pread(f->direct[c->file], to - skip + done, whole - done, (off_t)(c->offset - skip + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0 || (done + (size_t)got < want && got % PAGE != 0))
            break; /* a real error comes out of the plain read below, with its words */
        done += (size_t)got;
    }
    if (done >= want)
        return RT_OK;
    return rt_file_pread(rt_tensors_fd(f->ts, c->file), rt_tensors_file(f->ts, c->file), to, (size_t)c->bytes, c->offset, err);
}

static char *first_page(void *memory)
{
    return (char *)(((uintptr_t)memory + PAGE - 1) / PAGE * PAGE);
}

/* A chunk of a part that is kept. Under the lock, which it gives up to read; *again: ask again, something has changed. */
static enum rt_status get_kept(struct rt_feed *f, const struct rt_device *d, const struct rt_feed_chunk *c, struct rt_feed_ref *out, bool *again,
                               struct rt_err *err)
{
    struct kept *k = &f->kept[c->entry];
    uint8_t *state = &f->state[f->base[c->entry] + c->no];
    uint64_t place = 0, bytes;
    enum rt_status st = RT_OK;
    *again = *state == READING || k->making;
    if (*again) {
        pthread_cond_wait(&f->changed, &f->lock);
        return RT_OK;
    }
    (void)walk(&f->entry[c->entry], c->no, &place, &bytes);
    if (k->base == NULL) {
        void *memory = NULL;
        k->making = true;
        pthread_mutex_unlock(&f->lock);
        st = d->be->host_alloc(d->dev, bytes + PAGE, &memory, err);
        pthread_mutex_lock(&f->lock);
        k->making = false;
        k->memory = memory;
        k->base = st == RT_OK ? first_page(memory) : NULL;
        pthread_cond_broadcast(&f->changed);
        if (st != RT_OK)
            return st;
    }
    char *at = k->base + place + c->offset % PAGE;
    if (*state != READY) {
        *state = READING;
        pthread_mutex_unlock(&f->lock);
        st = read_chunk(f, c, at, err);
        pthread_mutex_lock(&f->lock);
        *state = st == RT_OK ? READY : ABSENT;
        out->read = true;
        pthread_cond_broadcast(&f->changed);
    }
    out->data = at;
    return st;
}

static struct rt_feed_block *find(struct rt_feed *f, int64_t chunk)
{
    for (int i = 0; i < f->n_blocks; i++)
        if (f->block[i].chunk == chunk)
            return &f->block[i];
    return NULL;
}

static bool wants(const struct rt_feed *f, int member, const struct rt_feed_chunk *c)
{
    const struct member *m = &f->member[member];
    const int64_t id = f->base[c->entry] + c->no;
    return m->expected && c->entry >= m->first && (m->got[id / 8] >> id % 8 & 1) == 0;
}

/* Reads the chunk into a free block. As get_kept. */
static enum rt_status get_new(struct rt_feed *f, const struct rt_device *d, int member, const struct rt_feed_chunk *c, struct rt_feed_ref *out, bool *again,
                              struct rt_err *err)
{
    struct rt_feed_block *b = f->member[member].held < f->member[member].quota ? find(f, -1) : NULL;
    enum rt_status st = RT_OK;
    *again = b == NULL;
    if (*again) {
        pthread_cond_wait(&f->changed, &f->lock);
        return RT_OK;
    }
    *b = (struct rt_feed_block){.memory = b->memory, .chunk = f->base[c->entry] + c->no, .state = READING, .refs = 1, .owner = member};
    f->member[member].held++;
    for (int i = 0; i < f->n_members; i++)
        if (i != member && wants(f, i, c))
            b->wanted |= 1u << i;
    pthread_mutex_unlock(&f->lock);
    if (b->memory == NULL)
        st = d->be->host_alloc(d->dev, BLOCK_BYTES, &b->memory, err);
    if (st == RT_OK) {
        char *to = first_page(b->memory) + c->offset % PAGE;
        b->data = to;
        st = read_chunk(f, c, to, err);
    }
    pthread_mutex_lock(&f->lock);
    b->state = READY;
    if (st != RT_OK) { /* another that wants it tries again */
        b->refs = 0;
        b->wanted = 0;
        free_if_done(f, b);
        return st;
    }
    pthread_cond_broadcast(&f->changed);
    *out = (struct rt_feed_ref){.data = b->data, .read = true, .block = b};
    return st;
}

enum rt_status rt_feed_get(struct rt_feed *f, const struct rt_device *d, int member, const struct rt_feed_chunk *c, struct rt_feed_ref *out,
                           struct rt_err *err)
{
    struct member *m = &f->member[member];
    const int64_t id = f->base[c->entry] + c->no;
    enum rt_status st = RT_OK;
    bool again = true;
    *out = (struct rt_feed_ref){0};
    pthread_mutex_lock(&f->lock);
    while (st == RT_OK && again) {
        struct rt_feed_block *b = find(f, id);
        if (m->cancel) {
            st = rt_fail(err, RT_INTERRUPTED, "the pass was ended");
        } else if (f->kept[c->entry].keep) {
            if (b != NULL) { /* read before it was to be kept */
                b->wanted &= ~(1u << member);
                free_if_done(f, b);
            }
            st = get_kept(f, d, c, out, &again, err);
        } else if (b == NULL) {
            st = get_new(f, d, member, c, out, &again, err);
        } else if (b->state == READING) {
            pthread_cond_wait(&f->changed, &f->lock);
        } else {
            b->refs++;
            b->wanted &= ~(1u << member);
            *out = (struct rt_feed_ref){.data = b->data, .block = b};
            again = false;
        }
    }
    if (st == RT_OK)
        m->got[id / 8] |= (uint8_t)(1 << id % 8);
    pthread_mutex_unlock(&f->lock);
    return st;
}

void rt_feed_put(struct rt_feed *f, struct rt_feed_ref *r)
{
    if (r->block != NULL) {
        pthread_mutex_lock(&f->lock);
        r->block->refs--;
        free_if_done(f, r->block);
        pthread_mutex_unlock(&f->lock);
    }
    *r = (struct rt_feed_ref){0};
}
