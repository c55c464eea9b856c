#include "student/decode.h"

#include <math.h>
#include <string.h>

#include "student/internal.h"

/* Device pointers of a decoder, cut from one block. */
struct decode_memory {
    int32_t *ids, *slot, *pos, *rows;
    void *x, *normed, *qkv, *qk, *o, *branch, *gate_up, *h;
    void *picked;   /* [rows, H] final states that get logits */
    float *logits;  /* [rows, V] */
    void **k, **v;  /* [layers] caches [slots, max_len, nkv*hd] */
};

struct rt_student_decoder {
    struct rt_student *s;
    struct rt_decoder_options o;
    int rows;               /* most rows of logits in a step */
    struct rt_arena arena;  /* base NULL: suspended */
    struct decode_memory m;
    int32_t *host;          /* [4][budget] ids, slots, positions, rows on their way */
    float *logits;          /* [rows, V] host */
};

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

static int max_rows(const struct rt_decoder_options *o)
{
    return o->slots < o->budget ? o->slots : o->budget;
}

/* k and v of m: arrays of `layers` where the arena is cut, of 1 where bytes are counted. */
static void take_all(struct cut *k, const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act,
                     struct decode_memory *m)
{
    const size_t n = (size_t)o->budget, rows = (size_t)max_rows(o), H = (size_t)c->hidden, I = (size_t)c->intermediate;
    const size_t q = (size_t)rt_student_q_dim(c), kv = (size_t)rt_student_kv_dim(c);
    take(k, n, 1, sizeof(int32_t), &m->ids);
    take(k, n, 1, sizeof(int32_t), &m->slot);
    take(k, n, 1, sizeof(int32_t), &m->pos);
    take(k, rows, 1, sizeof(int32_t), &m->rows);
    take(k, n, H, act, &m->x);
    take(k, n, H, act, &m->normed);
    take(k, n, q + 2 * kv, act, &m->qkv);
    m->qk = NULL;
    if (c->qk_norm)
        take(k, n, q + kv, act, &m->qk);
    take(k, n, q, act, &m->o);
    take(k, n, H, act, &m->branch);
    take(k, n, 2 * I, act, &m->gate_up);
    take(k, n, I, act, &m->h);
    take(k, rows, H, act, &m->picked);
    take(k, rows, (size_t)c->vocab_size, sizeof(float), &m->logits);
    for (int l = 0; l < c->layers; l++) {
        const int i = k->arena == NULL ? 0 : l;
        take(k, (size_t)o->slots, (size_t)o->max_len * kv, act, &m->k[i]);
        take(k, (size_t)o->slots, (size_t)o->max_len * kv, act, &m->v[i]);
    }
}

size_t rt_student_decoder_bytes(const struct rt_student_config *c, const struct rt_decoder_options *o, size_t act_size)
{
    void *kc = NULL, *vc = NULL;
    struct decode_memory m = {.k = &kc, .v = &vc};
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
out:
    if (st != RT_OK)
        rt_student_decoder_suspend(d);
    return st;
}

void rt_student_decoder_suspend(struct rt_student_decoder *d)
{
    rt_device_arena_free(d->s->d, &d->arena);
}

enum rt_status rt_student_decoder_create(struct rt_student *s, const struct rt_decoder_options *o, struct rt_student_decoder **out,
                                         struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_decoder *d = NULL;
    if (o->slots < 1 || o->budget < 1 || o->max_len < 1 || o->max_len > s->max_length)
        RT_FAIL(err, USAGE, "generation in %d slots of %lld tokens, %d a step: expected 1 or more, and at most %lld tokens", o->slots,
                (long long)o->max_len, o->budget, (long long)s->max_length);
    RT_TRY(rt_alloc(1, sizeof *d, "the decoder", &d, err));
    *d = (struct rt_student_decoder){.s = s, .o = *o, .rows = max_rows(o)};
    RT_TRY(rt_alloc((size_t)s->c->layers, sizeof *d->m.k, "the decoder", &d->m.k, err));
    RT_TRY(rt_alloc((size_t)s->c->layers, sizeof *d->m.v, "the decoder", &d->m.v, err));
    RT_TRY(rt_alloc((size_t)o->budget, 4 * sizeof *d->host, "entries of a step", &d->host, err));
    RT_TRY(rt_alloc((size_t)d->rows * (size_t)s->c->vocab_size, sizeof *d->logits, "logits of a step", &d->logits, err));
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
    rt_student_decoder_suspend(d);
    rt_free(d->m.k);
    rt_free(d->m.v);
    rt_free(d->host);
    rt_free(d->logits);
    rt_free(d);
}

/* ---- a step ---- */

static enum rt_status upload_entries(struct rt_student_decoder *d, const struct rt_batch_entry *e, int n, int n_rows, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *dev = d->s->d;
    int32_t *ids = d->host, *slot = ids + d->o.budget, *pos = slot + d->o.budget, *rows = pos + d->o.budget;
    if (d->arena.base == NULL)
        RT_FAIL(err, USAGE, "generation is suspended");
    if (n < 1 || n > d->o.budget || n_rows < 0 || n_rows > d->rows)
        RT_FAIL(err, USAGE, "a step of %d entries and %d rows, expected at most %d and %d", n, n_rows, d->o.budget, d->rows);
    int seen = 0;
    for (int i = 0; i < n; i++) {
        if (e[i].slot < 0 || e[i].slot >= d->o.slots || e[i].position < 0 || e[i].position >= d->o.max_len || e[i].token < 0 ||
            e[i].token >= d->s->c->vocab_size)
            RT_FAIL(err, USAGE, "entry %d of a step: slot %d, position %lld, id %d, expected below %d, %lld, %lld", i, (int)e[i].slot,
                    (long long)e[i].position, (int)e[i].token, d->o.slots, (long long)d->o.max_len, (long long)d->s->c->vocab_size);
        ids[i] = e[i].token;
        slot[i] = e[i].slot;
        pos[i] = (int32_t)e[i].position;
        if (e[i].row < 0)
            continue;
        if (e[i].row != seen || seen >= n_rows)
            RT_FAIL(err, USAGE, "entry %d of a step wants row %d of %d, expected row %d", i, (int)e[i].row, n_rows, seen);
        rows[seen++] = i;
    }
    if (seen != n_rows)
        RT_FAIL(err, USAGE, "a step of %d rows has entries for %d", n_rows, seen);
    const size_t bytes = (size_t)n * sizeof *ids;
    RT_TRY(rt_device_upload(dev, d->m.ids, ids, bytes, err));
    RT_TRY(rt_device_upload(dev, d->m.slot, slot, bytes, err));
    RT_TRY(rt_device_upload(dev, d->m.pos, pos, bytes, err));
    if (n_rows > 0)
        RT_TRY(rt_device_upload(dev, d->m.rows, rows, (size_t)n_rows * sizeof *rows, err));
out:
    return st;
}

/* branch = attention over the caches after normed. */
static enum rt_status attention(struct rt_student_decoder *d, int i, int64_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = d->s;
    const struct rt_student_config *c = s->c;
    const struct rt_student_layer *l = &s->layer[i];
    const struct decode_memory *m = &d->m;
    const int64_t q = rt_student_q_dim(c), kv = rt_student_kv_dim(c), ld = q + 2 * kv, ld_qk = m->qk == NULL ? ld : q + kv;
    const void *qk = m->qk == NULL ? m->qkv : m->qk;
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = m->normed}, .w = l->qkv, .bias = l->qkv_bias, .y = m->qkv, .n = n, .K = c->hidden,
                 .N = ld, .row_exact = true));
    RT_TRY(rt_student_rotate(s, l, m->qkv, m->qk, m->pos, n, NULL, NULL, err));
    RT_TRY(RT_OP(s->d, cache_put, err, .x = rt_student_at(s, qk, q), .ldx = ld_qk, .cache = m->k[i], .slot = m->slot, .pos = m->pos,
                 .n = n, .capacity = d->o.max_len, .width = kv));
    RT_TRY(RT_OP(s->d, cache_put, err, .x = rt_student_at(s, m->qkv, q + kv), .ldx = ld, .cache = m->v[i], .slot = m->slot, .pos = m->pos,
                 .n = n, .capacity = d->o.max_len, .width = kv));
    RT_TRY(RT_OP(s->d, attn_cached, err, .q = qk, .q_ld = ld_qk, .k_cache = m->k[i], .v_cache = m->v[i], .slot = m->slot, .pos = m->pos,
                 .o = m->o, .n = n, .capacity = d->o.max_len, .nh = c->heads, .nkv = c->kv_heads, .d = c->head_dim,
                 .scale = (float)(1 / sqrt(c->head_dim))));
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = m->o}, .w = l->o, .bias = l->o_bias, .y = m->branch, .n = n, .K = q,
                 .N = c->hidden, .row_exact = true));
out:
    return st;
}

/* branch = MLP of normed. */
static enum rt_status mlp(struct rt_student_decoder *d, int i, int64_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = d->s;
    const struct rt_student_layer *l = &s->layer[i];
    const struct decode_memory *m = &d->m;
    const int64_t H = s->c->hidden, I = s->c->intermediate;
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = m->normed}, .w = l->gate_up, .bias = l->gate_up_bias, .y = m->gate_up, .n = n,
                 .K = H, .N = 2 * I, .row_exact = true));
    RT_TRY(RT_OP(s->d, swiglu_fwd, err, .gate = m->gate_up, .up = rt_student_at(s, m->gate_up, I), .ld = 2 * I, .h = m->h, .n = n,
                 .I = I));
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = m->h}, .w = l->down, .bias = l->down_bias, .y = m->branch, .n = n, .K = I, .N = H,
                 .row_exact = true));
out:
    return st;
}

static enum rt_status step(void *ctx, const struct rt_batch_entry *entries, int n, int n_rows, const float **logits, int64_t *row_stride,
                           struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_decoder *d = ctx;
    const struct rt_student *s = d->s;
    const struct decode_memory *m = &d->m;
    const int64_t H = s->c->hidden, V = s->c->vocab_size;
    const float eps = (float)s->c->eps;
    *logits = d->logits;
    *row_stride = V;
    RT_TRY(upload_entries(d, entries, n, n_rows, err));
    RT_TRY(RT_OP(s->d, embed_fwd, err, .ids = m->ids, .table = s->embed, .out = m->x, .n = n, .cols = H));
    for (int i = 0; i < s->c->layers; i++) {
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = m->x, .add = i == 0 ? NULL : m->branch, .w = s->layer[i].norm1,
                     .sum = i == 0 ? NULL : m->x, .y = m->normed, .n = n, .cols = H, .eps = eps));
        RT_TRY(attention(d, i, n, err));
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = m->x, .add = m->branch, .w = s->layer[i].norm2, .sum = m->x, .y = m->normed, .n = n,
                     .cols = H, .eps = eps));
        RT_TRY(mlp(d, i, n, err));
    }
    if (n_rows > 0) {
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = m->x, .add = m->branch, .w = s->final_norm, .y = m->normed, .n = n, .cols = H, .eps = eps));
        RT_TRY(RT_OP(s->d, gather, err, .x = m->normed, .index = m->rows, .out = m->picked, .n = n_rows, .cols = H));
        RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = m->picked}, .w = s->head, .y = m->logits, .n = n_rows, .K = H, .N = V,
                     .y_f32 = true, .row_exact = true));
        RT_TRY(rt_device_download(s->d, d->logits, m->logits, (size_t)n_rows * (size_t)V * sizeof(float), err));
    } else {
        RT_TRY(rt_device_sync(s->d, err)); /* the next step writes the host arrays again */
    }
out:
    return st;
}

static enum rt_status copy_slot(void *ctx, int src, int dst, int64_t n_tokens, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_decoder *d = ctx;
    const struct rt_student *s = d->s;
    if (d->arena.base == NULL || src < 0 || dst < 0 || src >= d->o.slots || dst >= d->o.slots || n_tokens < 0 || n_tokens > d->o.max_len)
        RT_FAIL(err, USAGE, "copying %lld tokens of slot %d to slot %d of %d", (long long)n_tokens, src, dst, d->o.slots);
    for (int i = 0; i < s->c->layers; i++) {
        void *const caches[] = {d->m.k[i], d->m.v[i]};
        for (int j = 0; j < 2; j++)
            RT_TRY(RT_OP(s->d, cache_copy, err, .cache = caches[j], .capacity = d->o.max_len, .width = rt_student_kv_dim(s->c),
                         .n = n_tokens, .src = src, .dst = dst));
    }
out:
    return st;
}

struct rt_batch_step rt_student_decoder_step(struct rt_student_decoder *d)
{
    return (struct rt_batch_step){d, step, copy_slot};
}
