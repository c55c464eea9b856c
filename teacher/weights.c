#include "teacher/weights.h"

#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "teacher/part_table.h"
#include "teacher/weights_stream.h"

struct rt_weights {
    struct rt_weights_options o;
    struct rt_teacher_config c;
    struct rt_tensors *ts;
    struct rt_entry *entry;
    int64_t n_entries;
    int64_t *layer_base; /* entry of a layer's attention; [layers + mtp_layers + 1] */
    uint64_t model_bytes, model_room, largest, largest_expert;
    int64_t resident_left; /* bytes that may still be kept on the device */
    double waited;
    struct rt_stream stream;
    struct rt_item *item;
    int64_t n_items, next, released;
    bool in_pass;
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

static struct rt_entry *find_entry(struct rt_weights *w, struct rt_part_id id)
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

/* The tensor inside a block of device memory (NULL: its description alone). */
static struct rt_weight_src source_of(const struct rt_weights *w, const struct rt_part_tensor *t, const char *block)
{
    struct rt_weight_src src = {.name = t->weight->name, .dtype = t->weight->dtype, .rows = t->rows, .cols = t->cols,
                                .resident = w->o.resident};
    const void *data = block != NULL ? block + t->at : NULL;
    const float *scale = block != NULL && t->scale != NULL ? (const float *)(const void *)(block + t->scale_at) : NULL;
    if (w->o.device->be->own_memory) {
        src.device_data = data;
        src.device_scale = scale;
    } else {
        src.data = data;
        src.scale_inv = scale;
    }
    return src;
}

/* Each part has a tensor at least: a configuration that needs more than there are is not for this checkpoint, whose size then bounds the table. */
static enum rt_status check_count(const struct rt_weights *w, int all, struct rt_err *err)
{
    const struct rt_teacher_config *c = &w->c;
    const int64_t there = rt_tensors_count(w->ts);
    int64_t n = 1 + all - c->layers; /* the head, MTP matrices */
    for (int l = 0; l < all && n <= there; l++)
        n += rt_weights_layer_parts(c, l, NULL);
    if (n > there)
        return rt_fail(err, RT_FORMAT, "%s: config.json says %d layers (%d of MTP) with %d experts each, far more than the %ld tensors there are",
                       w->o.dir, all, all - c->layers, c->experts, (long)there);
    return RT_OK;
}

static enum rt_status plan_entries(struct rt_weights *w, struct rt_err *err)
{
    const struct rt_teacher_config *c = &w->c;
    const int all = c->layers + (w->o.mtp ? c->mtp_layers : 0);
    enum rt_status st;
    int64_t n = 0;
    RT_TRY(check_count(w, all, err));
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
        struct rt_entry *e = &w->entry[i];
        RT_TRY(rt_part_plan(w->ts, c, e->id, &e->plan, err));
        rt_entry_order(e);
        for (int t = 0; t < e->plan.n; t++) {
            const struct rt_weight_src src = source_of(w, &e->plan.t[t], NULL);
            e->extra += w->o.device->be->weight_bytes(&src);
        }
        w->largest = e->plan.bytes > w->largest ? e->plan.bytes : w->largest;
        if (e->id.kind == RT_PART_EXPERT && e->plan.bytes > w->largest_expert)
            w->largest_expert = e->plan.bytes;
        if (e->id.kind != RT_PART_MTP && e->id.layer < c->layers) {
            w->model_bytes += e->plan.bytes;
            w->model_room += e->room + 4096; /* to begin at a page */
        }
    }
out:
    return st;
}

/* A ring from `budget` bytes; what is left of them is for parts that stay. */
static enum rt_status make_ring(struct rt_weights *w, uint64_t budget, uint64_t wanted, const char *option, struct rt_err *err)
{
    char have[32], need[32];
    struct rt_stream *s = &w->stream;
    if (budget < w->largest)
        return rt_fail(err, RT_NOMEM, "%s: the weights need a budget of at least %s (its largest part), %s are left for them; raise %s", w->o.dir,
                       rt_human_bytes(need, w->largest), rt_human_bytes(have, budget), option);
    s->ring_size = wanted > w->largest ? wanted : w->largest;
    if (s->ring_size > budget)
        s->ring_size = budget;
    s->ring_size = s->ring_size / 64 * 64;
    if (s->ring_size < w->largest)
        s->ring_size = rt_arena_round(w->largest);
    w->resident_left = (int64_t)(budget - (s->ring_size < budget ? s->ring_size : budget));
    return w->o.device->be->alloc(w->o.device->dev, s->ring_size, (void **)&s->ring, err);
}

uint64_t rt_weights_staging(const struct rt_weights *w)
{
    return rt_stream_staging(&w->stream);
}

enum rt_status rt_weights_set_budget(struct rt_weights *w, const struct rt_weights_budget *b, struct rt_err *err)
{
    const bool own = w->o.device->be->own_memory;
    const uint64_t staging = rt_stream_staging(&w->stream), place = own ? b->device : b->host;
    uint64_t all = 0;
    char have[32], need[32];
    for (int64_t i = 0; i < w->n_entries; i++)
        all += w->entry[i].plan.bytes + w->entry[i].extra;
    if (own && b->host < staging)
        return rt_fail(err, RT_NOMEM, "%s: reading weights takes %s of host memory, %s are left for it; raise --memory", w->o.dir,
                       rt_human_bytes(need, staging), rt_human_bytes(have, b->host));
    if (all <= place) {
        w->resident_left = (int64_t)all;
        return RT_OK;
    }
    if (own)
        rt_feed_allow(w->stream.feed, b->host - staging);
    return make_ring(w, place, own && b->ring > 0 ? b->ring : 4 * w->largest, own ? "--gpu-memory" : "--memory", err);
}

enum rt_status rt_weights_open(const struct rt_weights_options *o, struct rt_weights **out, struct rt_err *err)
{
    struct rt_weights *w;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *w, "weights", &w, err));
    w->o = *o;
    w->c = *o->config;
    st = rt_tensors_open(o->dir, &w->ts, err);
    if (st == RT_OK)
        st = plan_entries(w, err);
    if (st == RT_OK)
        st = rt_stream_init(&w->stream, o->device, w->ts, w->entry, w->n_entries, o->threads, o->with != NULL ? &o->with->stream : NULL, err);
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
        w->o.device->be->free(w->o.device->dev, p->block);
    rt_free(p);
}

void rt_weights_free(struct rt_weights *w)
{
    if (w == NULL)
        return;
    rt_weights_end(w);
    for (int64_t i = 0; w->entry != NULL && i < w->n_entries; i++)
        free_part(w, w->entry[i].kept);
    rt_stream_free(&w->stream);
    rt_free(w->entry);
    rt_free(w->layer_base);
    rt_tensors_free(w->ts);
    rt_free(w);
}

/* ---- passes ---- */

/* Decides which parts of the pass are kept, on the device (makes their blocks) or as bytes beside it. */
static enum rt_status prepare_item(struct rt_weights *w, struct rt_item *it, struct rt_err *err)
{
    const struct rt_backend *be = w->o.device->be;
    struct rt_entry *e = it->e;
    enum rt_status st;
    if (e->kept != NULL) {
        it->state = RT_ITEM_READ;
        return RT_OK;
    }
    RT_TRY(rt_alloc(1, sizeof *it->part, "part", &it->part, err));
    it->part->id = e->id;
    it->part->bytes = e->plan.bytes;
    const int64_t cost = (int64_t)(e->plan.bytes + e->extra);
    if (cost <= w->resident_left) {
        RT_TRY(be->alloc(w->o.device->dev, e->plan.bytes, &it->part->block, err));
        it->part->resident = true;
        w->resident_left -= cost;
    } else if (w->stream.own) {
        rt_feed_keep(w->stream.feed, e - w->entry);
    }
out:
    return st;
}

enum rt_status rt_weights_begin(struct rt_weights *w, const struct rt_part_id *parts, int64_t n, struct rt_err *err)
{
    enum rt_status st;
    RT_ASSERT(!w->in_pass);
    RT_TRY(rt_alloc((size_t)n, sizeof *w->item, "pass over the weights", &w->item, err));
    w->n_items = n;
    w->next = w->released = 0;
    w->in_pass = true;
    for (int64_t i = 0; i < n; i++) {
        w->item[i].e = find_entry(w, parts[i]);
        RT_TRY(prepare_item(w, &w->item[i], err));
    }
    RT_TRY(rt_stream_begin(&w->stream, w->item, n, err));
out:
    if (st != RT_OK && w->in_pass)
        rt_weights_end(w);
    return st;
}

static enum rt_status load_part(struct rt_weights *w, struct rt_item *it, struct rt_err *err)
{
    const struct rt_device *d = w->o.device;
    struct rt_part *p = it->part;
    enum rt_status st = RT_OK;
    for (int i = 0; i < it->e->plan.n; i++) {
        const struct rt_part_tensor *t = &it->e->plan.t[i];
        const struct rt_weight_src src = source_of(w, t, p->block);
        RT_TRY(d->be->weight_load(d->dev, d->q, &src, &p->w[t->slot], err));
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
    struct rt_item *it = &w->item[w->next];
    enum rt_status st = RT_OK;
    if (it->e->kept == NULL) {
        const double t0 = rt_now();
        RT_TRY(rt_stream_wait(&w->stream, it, err));
        if (!w->stream.own)
            w->waited += rt_now() - t0;
        RT_TRY(load_part(w, it, err));
    }
    *out = it->e->kept != NULL ? it->e->kept : it->part;
    w->next++;
out:
    return st;
}

enum rt_status rt_weights_release(struct rt_weights *w, const struct rt_part *part, struct rt_err *err)
{
    struct rt_item *it = &w->item[w->released];
    RT_ASSERT(w->released < w->next && (part == it->e->kept || part == it->part));
    const enum rt_status st = rt_stream_release(&w->stream, it, err);
    if (it->part != NULL)
        unload(w, it->part);
    rt_free(it->part);
    it->part = NULL;
    w->released++;
    return st;
}

void rt_weights_expect(struct rt_weights *w, bool expected)
{
    if (!w->stream.own)
        return;
    if (expected)
        rt_feed_expect(w->stream.feed, w->stream.member);
    else
        rt_feed_end(w->stream.feed, w->stream.member);
}

void rt_weights_end(struct rt_weights *w)
{
    if (!w->in_pass)
        return;
    rt_stream_end(&w->stream, &w->waited);
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

enum rt_status rt_weights_embed(const struct rt_weights *w, int layer, const uint32_t *ids, int64_t n, enum rt_dtype act, void *out,
                                struct rt_err *err)
{
    const int64_t H = w->c.hidden, dims[2] = {w->c.vocab_size, H};
    const size_t row = (size_t)H * rt_dtype_size(act);
    const struct rt_tensor *t;
    char name[128];
    float *wide = NULL;
    enum rt_status st;
    if (layer < 0)
        snprintf(name, sizeof name, "model.embed_tokens.weight");
    else
        snprintf(name, sizeof name, "model.layers.%d.embed_tokens.weight", layer);
    RT_TRY(rt_tensors_get(w->ts, name, RT_DT(RT_F32) | RT_DT(RT_F16) | RT_DT(RT_BF16), 2, dims, &t, err));
    if (t->dtype != act)
        RT_TRY(rt_alloc((size_t)H, sizeof *wide, "embedding row", &wide, err));
    for (int64_t i = 0; i < n; i++) {
        char *to = (char *)out + (size_t)i * row;
        if (ids[i] >= w->c.vocab_size)
            RT_FAIL(err, FORMAT, "token id %u is outside the teacher's vocabulary of %ld", ids[i], (long)w->c.vocab_size);
        if (wide == NULL) {
            RT_TRY(rt_tensors_read_range(w->ts, t, (uint64_t)ids[i] * row, row, to, err));
            continue;
        }
        RT_TRY(rt_tensors_read_f32(w->ts, t, (int64_t)ids[i] * H, H, wide, err));
        for (int64_t j = 0; act == RT_F64 && j < H; j++)
            ((double *)(void *)to)[j] = wide[j];
        if (act != RT_F64)
            rt_from_f32(to, act, wide, (size_t)H);
    }
out:
    rt_free(wide);
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

uint64_t rt_weights_model_room(const struct rt_weights *w)
{
    return w->model_room;
}

uint64_t rt_weights_largest_part(const struct rt_weights *w)
{
    return w->largest;
}

uint64_t rt_weights_largest_expert(const struct rt_weights *w)
{
    return w->largest_expert;
}

uint64_t rt_weights_bytes_read(const struct rt_weights *w)
{
    return w->stream.read_bytes;
}

uint64_t rt_weights_group_limit(const struct rt_weights *w)
{
    const uint64_t ring = w->stream.ring_size, two = 2 * w->largest_expert;
    if (ring == 0)
        return UINT64_MAX;
    /* half of the ring for what comes next; and never so much that an expert, with as much unused at the ring's end, finds no place */
    return ring > two ? (ring / 2 < ring - two ? ring / 2 : ring - two) : 0;
}

double rt_weights_read_seconds(const struct rt_weights *w)
{
    return w->stream.read_seconds;
}

double rt_weights_waited(const struct rt_weights *w)
{
    return w->waited;
}
