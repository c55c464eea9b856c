/* The decoder: memory and callbacks (decode_internal.h). */
#include "student/decode.h"

#include <string.h>

#include "student/decode_internal.h"

/* Positions of a page: on the host a block of keys of its attention, so that sums are those of a cache in one piece; else few, so that little is
 * left over at the end of a sequence. */
enum { PAGE = 64, PAGE_HOST = 512 };

static int64_t ceil_to(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit * unit;
}

/* ---- memory: the same walk counts and cuts ---- */

struct cut {
    struct rt_arena *arena; /* NULL: count only */
    size_t bytes;
    bool overflow;
    enum rt_status st;
    struct rt_err *err;
};

static void take(struct cut *k, size_t a, size_t b, size_t size, void *out_ptr_to_ptr)
{
    size_t bytes = 0;
    if (!rt_mul_size(a, b, &bytes) || !rt_mul_size(bytes, size, &bytes) || bytes > SIZE_MAX / 2 ||
        !rt_add_size(k->bytes, rt_arena_round(bytes), &k->bytes)) {
        k->overflow = true;
        return;
    }
    if (k->arena != NULL && k->st == RT_OK)
        k->st = rt_arena_alloc(k->arena, rt_arena_round(bytes), out_ptr_to_ptr, k->err);
}

/* What follows from the options. act 2: the device's own memory. */
struct sizes {
    int n, rows, len;
    int64_t capacity, pages;
};

static struct sizes sizes_of(const struct rt_decoder_options *o, size_t act)
{
    struct sizes z;
    const int len = act == 2 ? PAGE : PAGE_HOST;
    z.rows = rt_decode_round(o->slots < o->budget ? o->slots : o->budget);
    z.n = o->budget > z.rows ? o->budget : z.rows;
    z.len = o->max_len < len ? (int)ceil_to(o->max_len, PAGE) : len;
    z.capacity = ceil_to(o->max_len, z.len);
    z.pages = z.capacity / z.len * o->slots;
    if (o->tokens > 0 && ceil_to(o->tokens, z.len) / z.len < z.pages)
        z.pages = ceil_to(o->tokens, z.len) / z.len;
    if (z.pages < z.capacity / z.len)
        z.pages = z.capacity / z.len;
    return z;
}

size_t rt_decode_input_bytes(int n, int rows)
{
    return 3 * rt_arena_round((size_t)n * sizeof(int32_t)) + rt_arena_round((size_t)rows * sizeof(int32_t)) + 2 * rt_arena_round((size_t)rows * 8);
}

void rt_decode_input_cut(void *block, int n, int rows, struct rt_decode_input *out)
{
    char *at = block;
    const size_t entry = rt_arena_round((size_t)n * sizeof(int32_t)), wide = rt_arena_round((size_t)rows * 8);
    out->ids = (int32_t *)(void *)at;
    out->slot = (int32_t *)(void *)(at += entry);
    out->pos = (int32_t *)(void *)(at += entry);
    out->rows = (int32_t *)(void *)(at += entry);
    out->stream = (uint64_t *)(void *)(at += rt_arena_round((size_t)rows * sizeof(int32_t)));
    out->position = (int64_t *)(void *)(at += wide);
}

/* k and v of m: arrays of `layers` where the arena is cut, of 1 where bytes are counted. */
static void take_all(struct cut *k, const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act, struct rt_decode_memory *m)
{
    const struct sizes z = sizes_of(o, act);
    const size_t n = (size_t)z.n, rows = (size_t)z.rows, H = (size_t)c->hidden, I = (size_t)c->intermediate;
    const size_t q = (size_t)rt_student_q_dim(c), kv = (size_t)rt_student_kv_dim(c);
    void *input = NULL;
    take(k, rt_decode_input_bytes(z.n, z.rows), 1, 1, &input);
    if (input != NULL)
        rt_decode_input_cut(input, z.n, z.rows, &m->in);
    take(k, (size_t)o->slots, (size_t)(z.capacity / z.len), sizeof(int32_t), &m->table);
    take(k, rows, 1, sizeof(int32_t), &m->drawn);
    take(k, rows, 1, sizeof(float), &m->logprob);
    take(k, n, H, act, &m->x);
    take(k, n, H, act, &m->normed);
    take(k, n, q + 2 * kv, act, &m->qkv);
    take(k, n, q, act, &m->q);
    take(k, n, q, act, &m->o);
    take(k, n, H, act, &m->branch);
    take(k, n, 2 * I, act, &m->gate_up);
    take(k, n, I, act, &m->h);
    take(k, rows, H, act, &m->picked);
    take(k, rows, (size_t)c->vocab_size, sizeof(float), &m->logits);
    for (int l = 0; l < c->layers; l++) {
        const int i = k->arena == NULL ? 0 : l;
        take(k, (size_t)z.pages, (size_t)z.len * kv, act, &m->k[i]);
        take(k, (size_t)z.pages, (size_t)z.len * kv, act, &m->v[i]);
    }
}

size_t rt_student_decoder_bytes(const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act_size)
{
    void *kc = NULL, *vc = NULL;
    struct rt_decode_memory m = {.k = &kc, .v = &vc};
    struct cut k = {0};
    take_all(&k, c, o, act_size, &m);
    return k.overflow ? 0 : k.bytes;
}

int rt_student_decoder_slots(const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act_size, size_t bytes)
{
    int low = 0, high = o->slots;
    while (low < high) {
        const int mid = low + (high - low + 1) / 2;
        struct rt_decoder_options try = *o;
        try.slots = mid;
        const size_t need = rt_student_decoder_bytes(c, &try, act_size);
        if (need != 0 && need <= bytes)
            low = mid;
        else
            high = mid - 1;
    }
    return low;
}

int64_t rt_student_decoder_tokens(const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act_size, size_t bytes)
{
    int64_t low = o->max_len - 1, high = (int64_t)o->slots * o->max_len;
    while (low < high) {
        const int64_t mid = low + (high - low + 1) / 2;
        struct rt_decoder_options try = *o;
        try.tokens = mid;
        const size_t need = rt_student_decoder_bytes(c, &try, act_size);
        if (need != 0 && need <= bytes)
            low = mid;
        else
            high = mid - 1;
    }
    return low < o->max_len ? 0 : low;
}

/* ---- life ---- */

enum rt_status rt_student_decoder_resume(struct rt_student_decoder *d, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = d->s;
    const size_t act = rt_device_act_size(s->d), bytes = rt_student_decoder_bytes(s->c, &d->o, act);
    if (d->arena.base != NULL)
        return RT_OK;
    if (bytes == 0)
        RT_FAIL(err, NOMEM, "caches of %d slots of %lld tokens do not fit into memory", d->o.slots, (long long)d->o.max_len);
    RT_TRY(rt_device_arena(s->d, bytes, "caches of generation", &d->arena, err));
    struct cut k = {.arena = &d->arena, .err = err};
    take_all(&k, s->c, &d->o, act, &d->m);
    RT_TRY(k.st);
    for (int i = 0; i < d->o.slots; i++)
        d->pages.changed[i] = true;
out:
    if (st != RT_OK)
        rt_student_decoder_suspend(d);
    return st;
}

void rt_student_decoder_suspend(struct rt_student_decoder *d)
{
    if (d->arena.base != NULL) {
        (void)rt_device_sync(d->s->d, NULL);
        rt_decode_forget_graphs(d);
    }
    d->submitted = d->collected = 0;
    rt_device_arena_free(d->s->d, &d->arena);
}

static enum rt_status make_flights(struct rt_student_decoder *d, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *dev = d->s->d;
    const size_t in = rt_decode_input_bytes(d->n, d->rows), table = rt_arena_round((size_t)d->pages.slots * (size_t)d->pages.cols * sizeof(int32_t)),
                 row = rt_arena_round((size_t)d->rows * sizeof(int32_t)), one = in + table + 2 * row;
    RT_TRY(dev->be->host_alloc(dev->dev, RT_DECODE_FLIGHTS * one, &d->staging, err));
    memset(d->staging, 0, RT_DECODE_FLIGHTS * one);
    for (int i = 0; i < RT_DECODE_FLIGHTS; i++) {
        struct rt_decode_flight *f = &d->flight[i];
        char *at = (char *)d->staging + (size_t)i * one;
        rt_decode_input_cut(at, d->n, d->rows, &f->in);
        f->table = (int32_t *)(void *)(at += in);
        f->drawn = (int32_t *)(void *)(at += table);
        f->logprob = (float *)(void *)(at += row);
        RT_TRY(dev->be->event_create(dev->dev, &f->done, err));
    }
out:
    return st;
}

enum rt_status rt_student_decoder_create(struct rt_student *s, const struct rt_decoder_options *o, struct rt_student_decoder **out,
                                         struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_decoder *d = NULL;
    if (o->slots < 1 || o->budget < 1 || o->max_len < 1 || o->max_len > s->max_length || (o->tokens != 0 && o->tokens < o->max_len))
        RT_FAIL(err, USAGE, "generation in %d slots of %lld tokens (%lld together), %d a step: expected 1 or more, and at most %lld tokens", o->slots,
                (long long)o->max_len, (long long)o->tokens, o->budget, (long long)s->max_length);
    const struct sizes z = sizes_of(o, rt_device_act_size(s->d));
    if (z.pages > INT32_MAX / z.len || z.capacity > INT32_MAX)
        RT_FAIL(err, USAGE, "generation in %d slots of %lld tokens: more than 2^31 together", o->slots, (long long)o->max_len);
    RT_TRY(rt_alloc(1, sizeof *d, "the decoder", &d, err));
    *d = (struct rt_student_decoder){.s = s, .o = *o, .n = z.n, .rows = z.rows, .capacity = z.capacity};
    RT_TRY(rt_pages_create(o->slots, (int)(z.capacity / z.len), z.len, (int32_t)z.pages, &d->pages, err));
    RT_TRY(rt_alloc((size_t)s->c->layers, sizeof *d->m.k, "the decoder", &d->m.k, err));
    RT_TRY(rt_alloc((size_t)s->c->layers, sizeof *d->m.v, "the decoder", &d->m.v, err));
    RT_TRY(make_flights(d, err));
    RT_TRY(rt_student_decoder_resume(d, err));
    *out = d;
    d = NULL;
out:
    rt_student_decoder_free(d);
    return st;
}

void rt_student_decoder_free(struct rt_student_decoder *d)
{
    if (d == NULL)
        return;
    const struct rt_device *dev = d->s->d;
    rt_student_decoder_suspend(d);
    for (int i = 0; i < RT_DECODE_FLIGHTS; i++)
        if (d->flight[i].done != NULL)
            dev->be->event_free(dev->dev, d->flight[i].done);
    if (d->staging != NULL)
        dev->be->host_free(dev->dev, d->staging);
    rt_pages_free(&d->pages);
    rt_free(d->m.k);
    rt_free(d->m.v);
    rt_free(d->logits);
    rt_free(d);
}

/* ---- a step ---- */

static enum rt_status check_entries(struct rt_student_decoder *d, const struct rt_batch_entry *e, int n, int n_rows, bool drawn, struct rt_err *err)
{
    int seen = 0;
    if (d->arena.base == NULL)
        return rt_fail(err, RT_USAGE, "generation is suspended");
    if (n < 1 || n > d->o.budget || n_rows < 0 || n_rows > d->rows)
        return rt_fail(err, RT_USAGE, "a step of %d entries and %d rows, expected at most %d and %d", n, n_rows, d->o.budget, d->rows);
    const int before = drawn && d->submitted > 0 ? d->flight[(d->submitted - 1) % RT_DECODE_FLIGHTS].n_rows : 0;
    for (int i = 0; i < n; i++) {
        if (e[i].slot < 0 || e[i].slot >= d->o.slots || e[i].position < 0 || e[i].position >= d->o.max_len || e[i].token < -before ||
            e[i].token >= d->s->c->vocab_size)
            return rt_fail(err, RT_USAGE, "entry %d of a step: slot %d, position %lld, id %d, expected below %d, %lld, %lld", i, (int)e[i].slot,
                           (long long)e[i].position, (int)e[i].token, d->o.slots, (long long)d->o.max_len, (long long)d->s->c->vocab_size);
        if (e[i].row >= 0 && (e[i].row != seen || seen++ >= n_rows))
            return rt_fail(err, RT_USAGE, "entry %d of a step wants row %d of %d, expected row %d", i, (int)e[i].row, n_rows, seen);
        if (!rt_pages_room(&d->pages, e[i].slot, e[i].position + 1, 0))
            return rt_fail(err, RT_NOMEM, "generation: no page is left for position %lld of slot %d", (long long)e[i].position, (int)e[i].slot);
    }
    return seen == n_rows ? RT_OK : rt_fail(err, RT_USAGE, "a step of %d rows has entries for %d", n_rows, seen);
}

/* Entries, and the rows of the table that changed, by way of f. Places from n to `fill` are nobody's. */
static enum rt_status upload(struct rt_student_decoder *d, struct rt_decode_flight *f, const struct rt_batch_entry *e, int n, int fill,
                             const struct rt_batch_draw *draws, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *dev = d->s->d;
    const struct rt_decode_input *in = &f->in;
    const int cols = d->pages.cols;
    int row = 0;
    for (int i = 0; i < fill; i++) {
        const bool real = i < n;
        in->ids[i] = real ? e[i].token : 0;
        in->slot[i] = real ? e[i].slot : 0;
        in->pos[i] = real ? (int32_t)e[i].position : -1;
        if (real ? e[i].row < 0 : row >= d->rows)
            continue;
        in->rows[row] = i;
        in->stream[row] = real && draws != NULL ? draws[row].stream : 0;
        in->position[row] = real && draws != NULL ? draws[row].position : 0;
        row++;
    }
    RT_TRY(dev->be->upload(dev->dev, dev->q, d->m.in.ids, in->ids, rt_decode_input_bytes(d->n, d->rows), err));
    for (int s = 0; s < d->o.slots; s++) {
        if (!d->pages.changed[s])
            continue;
        const size_t at = (size_t)s * (size_t)cols, bytes = (size_t)d->pages.used[s] * sizeof(int32_t);
        memcpy(f->table + at, d->pages.table + at, bytes);
        RT_TRY(dev->be->upload(dev->dev, dev->q, d->m.table + at, f->table + at, bytes, err));
        d->pages.changed[s] = false;
    }
out:
    return st;
}

static enum rt_status step(void *ctx, const struct rt_batch_entry *entries, int n, int n_rows, const float **logits, int64_t *row_stride,
                           struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_decoder *d = ctx;
    const int64_t V = d->s->c->vocab_size;
    RT_TRY(check_entries(d, entries, n, n_rows, false, err));
    if (d->logits == NULL)
        RT_TRY(rt_alloc((size_t)d->rows * (size_t)V, sizeof *d->logits, "logits of a step", &d->logits, err));
    *logits = d->logits;
    *row_stride = V;
    RT_TRY(upload(d, &d->flight[0], entries, n, n, NULL, err));
    RT_TRY(rt_decode_enqueue(d, n, n_rows, NULL, err));
    if (n_rows > 0)
        RT_TRY(rt_device_download(d->s->d, d->logits, d->m.logits, (size_t)n_rows * (size_t)V * sizeof(float), err));
    else
        RT_TRY(rt_device_sync(d->s->d, err)); /* the next step writes the host arrays again */
out:
    return st;
}

static enum rt_status submit(void *ctx, const struct rt_batch_entry *entries, int n, int n_rows, const struct rt_batch_draw *draws,
                             const struct rt_batch_law *law, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_decoder *d = ctx;
    const struct rt_device *dev = d->s->d;
    struct rt_decode_flight *f = &d->flight[d->submitted % RT_DECODE_FLIGHTS];
    if (d->submitted - d->collected >= RT_DECODE_FLIGHTS)
        RT_FAIL(err, USAGE, "generation: %d steps are under way and were not collected", RT_DECODE_FLIGHTS);
    RT_TRY(check_entries(d, entries, n, n_rows, true, err));
    /* entries are sorted by slot: as many rows as entries are one token for each of so many slots */
    const bool recorded = dev->be->graph_begin != NULL && n == n_rows;
    const int fill = recorded ? rt_decode_round(n) : n;
    RT_TRY(upload(d, f, entries, n, fill, draws, err));
    if (recorded)
        RT_TRY(rt_decode_enqueue_recorded(d, fill, law, err));
    else
        RT_TRY(rt_decode_enqueue(d, n, n_rows, law, err));
    if (n_rows > 0) {
        RT_TRY(dev->be->download(dev->dev, dev->q, f->drawn, d->m.drawn, (size_t)n_rows * sizeof *f->drawn, err));
        RT_TRY(dev->be->download(dev->dev, dev->q, f->logprob, d->m.logprob, (size_t)n_rows * sizeof *f->logprob, err));
    }
    RT_TRY(dev->be->event_record(dev->dev, dev->q, f->done, err));
    f->n_rows = n_rows;
    d->submitted++;
out:
    return st;
}

static enum rt_status collect(void *ctx, int32_t *ids, float *logprobs, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_decoder *d = ctx;
    const struct rt_device *dev = d->s->d;
    const struct rt_decode_flight *f = &d->flight[d->collected % RT_DECODE_FLIGHTS];
    if (d->collected >= d->submitted)
        RT_FAIL(err, USAGE, "generation: no step is under way");
    d->collected++;
    RT_TRY(dev->be->event_sync(dev->dev, f->done, err));
    memcpy(ids, f->drawn, (size_t)f->n_rows * sizeof *ids);
    memcpy(logprobs, f->logprob, (size_t)f->n_rows * sizeof *logprobs);
out:
    return st;
}

/* ---- slots ---- */

static enum rt_status copy_page(struct rt_student_decoder *d, int32_t from, int32_t to, int64_t rows, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = d->s;
    for (int i = 0; i < s->c->layers; i++) {
        void *const caches[] = {d->m.k[i], d->m.v[i]};
        for (int j = 0; j < 2; j++)
            RT_TRY(RT_OP(s->d, cache_copy, err, .cache = caches[j], .capacity = d->pages.len, .width = rt_student_kv_dim(s->c), .n = rows, .src = from,
                         .dst = to));
    }
out:
    return st;
}

static enum rt_status copy_slot(void *ctx, int src, int dst, int64_t n_tokens, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_decoder *d = ctx;
    struct rt_pages *p = &d->pages;
    int32_t from, to;
    int64_t rows;
    if (d->arena.base == NULL || src < 0 || dst < 0 || src >= d->o.slots || dst >= d->o.slots || src == dst || n_tokens < 0 ||
        n_tokens > (int64_t)p->used[src] * p->len)
        RT_FAIL(err, USAGE, "copying %lld tokens of slot %d to slot %d of %d", (long long)n_tokens, src, dst, d->o.slots);
    if (d->o.own_prefix) {
        rt_pages_drop(p, dst, 0);
        if (!rt_pages_room(p, dst, n_tokens, 0))
            RT_FAIL(err, NOMEM, "generation: no pages are left for %lld tokens of slot %d", (long long)n_tokens, dst);
        for (int64_t i = 0; i * p->len < n_tokens; i++)
            RT_TRY(copy_page(d, p->table[(int64_t)src * p->cols + i], p->table[(int64_t)dst * p->cols + i],
                             n_tokens - i * p->len < p->len ? n_tokens - i * p->len : p->len, err));
        goto out;
    }
    if (!rt_pages_share(p, src, dst, n_tokens, &from, &to, &rows))
        RT_FAIL(err, NOMEM, "generation: no page is left for slot %d", dst);
    if (rows > 0)
        RT_TRY(copy_page(d, from, to, rows, err));
out:
    return st;
}

static bool room(void *ctx, int slot, int64_t tokens, int spare)
{
    struct rt_student_decoder *d = ctx;
    return rt_pages_room(&d->pages, slot, tokens, spare);
}

static void drop(void *ctx, int slot, int64_t keep)
{
    struct rt_student_decoder *d = ctx;
    rt_pages_drop(&d->pages, slot, keep);
}

struct rt_batch_step rt_student_decoder_step(struct rt_student_decoder *d)
{
    return (struct rt_batch_step){.ctx = d, .step = step, .copy_slot = copy_slot, .submit = submit, .collect = collect,
                                  .ahead = d->s->d->be->own_memory ? 1 : 0, .room = room, .drop = drop};
}
