#include "teacher/weights.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/log.h"
#include "core/mem.h"
#include "teacher/part_table.h"

/* A part of the checkpoint and, once a pass has kept it, its loaded form. */
struct entry {
    struct rt_part_id id;
    struct rt_part_plan plan;
    size_t extra;         /* what the backend takes beyond the bytes as stored */
    struct rt_part *kept; /* loaded and resident, or NULL */
};

enum item_state { ITEM_WAITING, ITEM_READ, ITEM_DONE };

/* One step of a pass. */
struct item {
    struct entry *e;
    struct rt_part *part; /* being filled or in use; NULL for a kept one */
    size_t ring_bytes;    /* taken from the ring, with what was skipped at its end; 0: own memory */
    enum item_state state;
};

struct rt_weights {
    struct rt_weights_options o;
    struct rt_teacher_config c;
    struct rt_tensors *ts;
    struct entry *entry;
    int64_t n_entries;
    int64_t *layer_base; /* entry of a layer's attention; [layers + mtp_layers + 1] */
    uint64_t model_bytes, largest, read_bytes;
    int64_t resident_left; /* bytes that may still be kept */
    double waited;

    char *ring;
    size_t ring_size, head, used;

    struct item *item;
    int64_t n_items, next, released, reading;
    pthread_t reader;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool reader_runs, cancel, in_pass;
    struct rt_err reader_err;
};

int64_t rt_weights_layer_parts(const struct rt_teacher_config *c, int layer, struct rt_part_id *parts)
{
    const bool dense = layer < c->dense_first;
    const int64_t n = dense ? 2 : 2 + c->experts;
    if (parts == NULL)
        return n;
    parts[0] = (struct rt_part_id){RT_PART_ATTN, layer, 0};
    parts[1] = (struct rt_part_id){dense ? RT_PART_DENSE : RT_PART_ROUTER, layer, 0};
    for (int e = 0; !dense && e < c->experts; e++)
        parts[2 + e] = (struct rt_part_id){RT_PART_EXPERT, layer, e};
    return n;
}

static struct entry *find_entry(struct rt_weights *w, struct rt_part_id id)
{
    const int all = w->c.layers + (w->o.mtp ? w->c.mtp_layers : 0);
    int64_t at = -1;
    if (id.kind == RT_PART_HEAD)
        at = w->layer_base[all];
    else if (id.layer >= 0 && id.layer < all)
        at = id.kind == RT_PART_MTP ? w->layer_base[all] + 1 + id.layer - w->c.layers
                                    : w->layer_base[id.layer] + (id.kind == RT_PART_ATTN ? 0 : id.kind == RT_PART_EXPERT ? 2 + id.expert : 1);
    RT_ASSERT(at >= 0 && at < w->n_entries && w->entry[at].id.kind == id.kind);
    return &w->entry[at];
}

static struct rt_weight_src source_of(const struct rt_weights *w, const struct rt_part_tensor *t, const char *block, size_t *at)
{
    struct rt_weight_src src = {.name = t->weight->name, .dtype = t->weight->dtype, .rows = t->rows, .cols = t->cols,
                                .resident = w->o.resident};
    src.data = block != NULL ? block + *at : NULL;
    *at += rt_arena_round(t->weight->bytes);
    if (t->scale != NULL) {
        src.scale_inv = block != NULL ? (const float *)(const void *)(block + *at) : NULL;
        *at += rt_arena_round(t->scale->bytes);
    }
    return src;
}

static enum rt_status plan_entries(struct rt_weights *w, struct rt_err *err)
{
    const struct rt_teacher_config *c = &w->c;
    const int all = c->layers + (w->o.mtp ? c->mtp_layers : 0);
    enum rt_status st;
    int64_t n = 0;
    RT_TRY(rt_alloc((size_t)all + 1, sizeof *w->layer_base, "layer table", &w->layer_base, err));
    for (int l = 0; l < all; l++) {
        w->layer_base[l] = n;
        n += rt_weights_layer_parts(c, l, NULL);
    }
    w->layer_base[all] = n;
    w->n_entries = n + 1 + (w->o.mtp ? c->mtp_layers : 0);
    RT_TRY(rt_alloc((size_t)w->n_entries, sizeof *w->entry, "part table", &w->entry, err));
    struct rt_part_id *ids;
    RT_TRY(rt_alloc((size_t)(2 + c->experts), sizeof *ids, "part table", &ids, err));
    for (int l = 0; l < all; l++) {
        const int64_t m = rt_weights_layer_parts(c, l, ids);
        for (int64_t i = 0; i < m; i++)
            w->entry[w->layer_base[l] + i].id = ids[i];
    }
    rt_free(ids);
    w->entry[n].id = (struct rt_part_id){RT_PART_HEAD, 0, 0};
    for (int64_t i = n + 1; i < w->n_entries; i++)
        w->entry[i].id = (struct rt_part_id){RT_PART_MTP, c->layers + (int)(i - n - 1), 0};
    for (int64_t i = 0; i < w->n_entries; i++) {
        struct entry *e = &w->entry[i];
        size_t at = 0;
        RT_TRY(rt_part_plan(w->ts, c, e->id, &e->plan, err));
        for (int t = 0; t < e->plan.n; t++) {
            const struct rt_weight_src src = source_of(w, &e->plan.t[t], NULL, &at);
            e->extra += w->o.device->be->weight_bytes(&src);
        }
        w->largest = e->plan.bytes > w->largest ? e->plan.bytes : w->largest;
        if (e->id.kind != RT_PART_MTP && e->id.layer < c->layers)
            w->model_bytes += e->plan.bytes;
    }
out:
    return st;
}

enum rt_status rt_weights_set_budget(struct rt_weights *w, uint64_t budget, struct rt_err *err)
{
    uint64_t all = 0;
    char have[32], need[32];
    for (int64_t i = 0; i < w->n_entries; i++)
        all += w->entry[i].plan.bytes + w->entry[i].extra;
    if (all <= budget) {
        w->resident_left = (int64_t)all;
        return RT_OK;
    }
    if (budget < w->largest)
        return rt_fail(err, RT_NOMEM, "%s: the weights need a budget of at least %s (its largest part), %s are left for them; raise --memory",
                       w->o.dir, rt_human_bytes(need, w->largest), rt_human_bytes(have, budget));
    w->ring_size = 4 * w->largest;
    if (w->ring_size > budget)
        w->ring_size = budget;
    w->ring_size = w->ring_size / 64 * 64;
    if (w->ring_size < w->largest)
        w->ring_size = rt_arena_round(w->largest);
    w->resident_left = (int64_t)(budget - (w->ring_size < budget ? w->ring_size : budget));
    return rt_alloc(w->ring_size, 1, "ring of weights", &w->ring, err);
}

enum rt_status rt_weights_open(const struct rt_weights_options *o, struct rt_weights **out, struct rt_err *err)
{
    struct rt_weights *w;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *w, "weights", &w, err));
    w->o = *o;
    w->c = *o->config;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, NULL);
    st = rt_tensors_open(o->dir, &w->ts, err);
    if (st == RT_OK)
        st = plan_entries(w, err);
    if (st != RT_OK) {
        rt_weights_free(w);
        return st;
    }
    *out = w;
out:
    return st;
}

static void unload(struct rt_weights *w, struct rt_part *p)
{
    for (int i = 0; i < RT_PART_WEIGHTS; i++) {
        w->o.device->be->weight_free(w->o.device->dev, p->w[i]);
        p->w[i] = NULL;
    }
}

static void free_part(struct rt_weights *w, struct rt_part *p)
{
    if (p == NULL)
        return;
    unload(w, p);
    if (p->resident)
        rt_free(p->host);
    rt_free(p);
}

void rt_weights_free(struct rt_weights *w)
{
    if (w == NULL)
        return;
    rt_weights_end(w);
    for (int64_t i = 0; w->entry != NULL && i < w->n_entries; i++)
        free_part(w, w->entry[i].kept);
    rt_free(w->entry);
    rt_free(w->layer_base);
    rt_free(w->ring);
    rt_tensors_free(w->ts);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->changed);
    rt_free(w);
}

/* ---- the reader ---- */

static enum rt_status read_part(struct rt_weights *w, const struct entry *e, char *block, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char name[64];
    size_t at = 0;
    for (int i = 0; i < e->plan.n; i++) {
        const struct rt_part_tensor *t = &e->plan.t[i];
        RT_TRY(rt_tensors_read(w->ts, t->weight, block + at, err));
        at += rt_arena_round(t->weight->bytes);
        if (t->scale == NULL)
            continue;
        RT_TRY(rt_tensors_read(w->ts, t->scale, block + at, err));
        at += rt_arena_round(t->scale->bytes);
    }
out:
    if (st != RT_OK)
        rt_err_context(err, "%s", rt_part_name(e->id, name));
    return st;
}

/* Contiguous bytes from the ring, under the lock; waits until enough parts were released. false: cancelled. */
static bool ring_take(struct rt_weights *w, struct item *it, size_t bytes, char **out)
{
    for (;;) {
        if (w->cancel)
            return false;
        if (w->used == 0)
            w->head = 0;
        const size_t to_end = w->ring_size - w->head;
        const size_t skip = bytes <= to_end ? 0 : to_end;
        if (w->used + skip + bytes <= w->ring_size) {
            w->head = skip > 0 ? 0 : w->head;
            *out = w->ring + w->head;
            w->head = (w->head + bytes) % w->ring_size;
            it->ring_bytes = skip + bytes;
            w->used += it->ring_bytes;
            return true;
        }
        pthread_cond_wait(&w->changed, &w->lock);
    }
}

static void *reader_main(void *self)
{
    struct rt_weights *w = self;
    pthread_mutex_lock(&w->lock);
    for (; w->reading < w->n_items && !w->cancel; w->reading++) {
        struct item *it = &w->item[w->reading];
        if (it->state != ITEM_WAITING) /* kept by an earlier pass, and perhaps released in this one already */
            continue;
        char *block = it->part->host;
        if (block == NULL && !ring_take(w, it, it->e->plan.bytes, &block))
            break;
        it->part->host = block;
        pthread_mutex_unlock(&w->lock);
        struct rt_err err = {0};
        const enum rt_status st = read_part(w, it->e, block, &err);
        pthread_mutex_lock(&w->lock);
        if (st != RT_OK) {
            w->reader_err = err;
            break;
        }
        w->read_bytes += it->e->plan.bytes;
        it->state = ITEM_READ;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* ---- passes ---- */

/* Decides which parts of the pass are kept, and makes the blocks of those. */
static enum rt_status prepare_item(struct rt_weights *w, struct item *it, struct rt_err *err)
{
    enum rt_status st;
    if (it->e->kept != NULL) {
        it->state = ITEM_READ;
        return RT_OK;
    }
    RT_TRY(rt_alloc(1, sizeof *it->part, "part", &it->part, err));
    it->part->id = it->e->id;
    it->part->bytes = it->e->plan.bytes;
    const int64_t cost = (int64_t)(it->e->plan.bytes + it->e->extra);
    if (cost <= w->resident_left) {
        RT_TRY(rt_alloc(it->e->plan.bytes, 1, "weights kept in memory", &it->part->host, err));
        it->part->resident = true;
        w->resident_left -= cost;
    }
out:
    return st;
}

enum rt_status rt_weights_begin(struct rt_weights *w, const struct rt_part_id *parts, int64_t n, struct rt_err *err)
{
    enum rt_status st;
    bool read = false;
    RT_ASSERT(!w->in_pass);
    RT_TRY(rt_alloc((size_t)n, sizeof *w->item, "pass over the weights", &w->item, err));
    w->n_items = n;
    w->next = w->released = w->reading = 0;
    w->head = w->used = 0;
    w->cancel = false;
    w->in_pass = true;
    rt_err_clear(&w->reader_err);
    for (int64_t i = 0; i < n; i++) {
        w->item[i].e = find_entry(w, parts[i]);
        RT_TRY(prepare_item(w, &w->item[i], err));
        read |= w->item[i].state == ITEM_WAITING;
    }
    if (read) {
        if (pthread_create(&w->reader, NULL, reader_main, w) != 0)
            RT_FAIL(err, NOMEM, "cannot start the thread that reads weights");
        w->reader_runs = true;
    }
out:
    if (st != RT_OK && w->in_pass)
        rt_weights_end(w);
    return st;
}

static enum rt_status load_part(struct rt_weights *w, struct item *it, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_part *p = it->part;
    size_t at = 0;
    for (int i = 0; i < it->e->plan.n; i++) {
        const struct rt_part_tensor *t = &it->e->plan.t[i];
        const struct rt_weight_src src = source_of(w, t, p->host, &at);
        RT_TRY(w->o.device->be->weight_load(w->o.device->dev, w->o.device->q, &src, &p->w[t->slot], err));
        p->fp8[t->slot] = src.dtype == RT_E4M3;
    }
    if (p->resident) {
        it->e->kept = p;
        it->part = NULL;
    }
out:
    return st;
}

enum rt_status rt_weights_next(struct rt_weights *w, const struct rt_part **out, struct rt_err *err)
{
    RT_ASSERT(w->in_pass && w->next < w->n_items);
    struct item *it = &w->item[w->next];
    if (w->reader_runs) {
        const double t0 = rt_now();
        pthread_mutex_lock(&w->lock);
        while (it->state == ITEM_WAITING && w->reader_err.status == RT_OK)
            pthread_cond_wait(&w->changed, &w->lock);
        const enum rt_status st = it->state == ITEM_WAITING ? rt_fail(err, w->reader_err.status, "%s", w->reader_err.msg) : RT_OK;
        pthread_mutex_unlock(&w->lock);
        w->waited += rt_now() - t0;
        if (st != RT_OK)
            return st;
    }
    if (it->e->kept == NULL) {
        const enum rt_status st = load_part(w, it, err);
        if (st != RT_OK)
            return st;
    }
    *out = it->e->kept != NULL ? it->e->kept : it->part;
    w->next++;
    return RT_OK;
}

void rt_weights_release(struct rt_weights *w, const struct rt_part *part)
{
    struct item *it = &w->item[w->released];
    RT_ASSERT(w->released < w->next && (part == it->e->kept || part == it->part));
    if (it->part != NULL)
        unload(w, it->part);
    pthread_mutex_lock(&w->lock);
    w->used -= it->ring_bytes;
    it->state = ITEM_DONE;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    rt_free(it->part);
    it->part = NULL;
    w->released++;
}

void rt_weights_end(struct rt_weights *w)
{
    if (!w->in_pass)
        return;
    if (w->reader_runs) {
        pthread_mutex_lock(&w->lock);
        w->cancel = true;
        pthread_cond_broadcast(&w->changed);
        pthread_mutex_unlock(&w->lock);
        pthread_join(w->reader, NULL);
        w->reader_runs = false;
    }
    for (int64_t i = 0; i < w->n_items; i++) {
        struct rt_part *p = w->item[i].part;
        if (p != NULL && p->resident)
            w->resident_left += (int64_t)(w->item[i].e->plan.bytes + w->item[i].e->extra);
        free_part(w, p);
    }
    rt_free(w->item);
    w->item = NULL;
    w->in_pass = false;
}

/* ---- the rest ---- */

enum rt_status rt_weights_embed(struct rt_weights *w, int layer, const uint32_t *ids, int64_t n, float *out, struct rt_err *err)
{
    char name[128];
    enum rt_status st;
    const struct rt_tensor *t;
    const int64_t dims[2] = {w->c.vocab_size, w->c.hidden};
    if (layer < 0)
        snprintf(name, sizeof name, "model.embed_tokens.weight");
    else
        snprintf(name, sizeof name, "model.layers.%d.embed_tokens.weight", layer);
    RT_TRY(rt_tensors_get(w->ts, name, RT_DT(RT_F32) | RT_DT(RT_F16) | RT_DT(RT_BF16), 2, dims, &t, err));
    for (int64_t i = 0; i < n; i++) {
        if (ids[i] >= w->c.vocab_size)
            RT_FAIL(err, FORMAT, "token id %u is outside the teacher's vocabulary of %ld", ids[i], (long)w->c.vocab_size);
        RT_TRY(rt_tensors_read_f32(w->ts, t, (int64_t)ids[i] * w->c.hidden, w->c.hidden, out + i * w->c.hidden, err));
    }
out:
    return st;
}

const struct rt_tensors *rt_weights_tensors(const struct rt_weights *w)
{
    return w->ts;
}

uint64_t rt_weights_model_bytes(const struct rt_weights *w)
{
    return w->model_bytes;
}

uint64_t rt_weights_largest_part(const struct rt_weights *w)
{
    return w->largest;
}

uint64_t rt_weights_bytes_read(const struct rt_weights *w)
{
    return w->read_bytes;
}

uint64_t rt_weights_group_limit(const struct rt_weights *w)
{
    if (w->ring == NULL)
        return UINT64_MAX;
    /* a part that is being read may need one largest part of space and leave as much unused at the ring's end */
    return w->ring_size > 2 * w->largest ? w->ring_size - 2 * w->largest : 0;
}

double rt_weights_waited(const struct rt_weights *w)
{
    return w->waited;
}
