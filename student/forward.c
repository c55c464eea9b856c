#include <math.h>
#include <string.h>

#include "student/internal.h"

/* ---- memory of one batch: the same walk counts the bytes and cuts the arena ---- */

struct cut {
    struct rt_arena *arena; /* NULL: count only */
    size_t bytes, act;
    enum rt_status st;
    struct rt_err *err;
};

static void take(struct cut *k, size_t elements, size_t size, void *out_ptr_to_ptr)
{
    const size_t bytes = rt_arena_round(elements * size); /* a config's limits keep one product far below 2^64 */
    if (!rt_add_size(k->bytes, bytes, &k->bytes))
        k->bytes = SIZE_MAX / 2; /* no device has that: the allocation says so */
    if (k->arena != NULL && k->st == RT_OK)
        k->st = rt_arena_alloc(k->arena, bytes, out_ptr_to_ptr, k->err);
}

static void take_layer(struct cut *k, const struct rt_student_config *c, size_t n, enum rt_student_keep keep, struct rt_student_saved *s)
{
    const size_t H = (size_t)c->hidden, q = (size_t)rt_student_q_dim(c), kv = (size_t)rt_student_kv_dim(c);
    take(k, n * (q + 2 * kv), k->act, &s->qkv);
    s->qk = NULL;
    s->rstd_q = s->rstd_k = NULL;
    if (c->qk_norm) {
        take(k, n * (q + kv), k->act, &s->qk);
        take(k, n * (size_t)c->heads, sizeof(float), &s->rstd_q);
        take(k, n * (size_t)c->kv_heads, sizeof(float), &s->rstd_k);
    }
    take(k, n * q, k->act, &s->o);
    take(k, n * H, k->act, &s->mid);
    s->gate_up = NULL;
    if (keep >= RT_KEEP_ALL)
        take(k, n * 2 * (size_t)c->intermediate, k->act, &s->gate_up);
    take(k, n * (size_t)c->heads, sizeof(float), &s->lse);
    take(k, n, sizeof(float), &s->rstd1);
    take(k, n, sizeof(float), &s->rstd2);
    s->normed1 = s->normed2 = s->h = NULL;
    if (keep != RT_KEEP_MORE)
        return;
    take(k, n * H, k->act, &s->normed1);
    take(k, n * H, k->act, &s->normed2);
    take(k, n * (size_t)c->intermediate, k->act, &s->h);
}

/* Of all layers; saved [layers], or [1] where bytes are counted only. */
static void take_layers(struct cut *k, const struct rt_student_config *c, size_t n, const struct rt_student_kept *kept, struct rt_student_acts *a,
                        struct rt_student_saved *saved)
{
    const bool cuts = k->arena != NULL;
    for (int l = 0; l < c->layers; l++) { /* of which none keeps more than the one before it */
        if (l == 0 || rt_student_layer_keep(kept, l - 1) >= RT_KEEP_ATTENTION)
            take_layer(k, c, n, rt_student_layer_keep(kept, l), &saved[cuts ? l : 0]);
        else if (cuts)
            saved[l] = saved[l - 1];
    }
    a->gate_up = NULL;
    if (rt_student_layer_keep(kept, c->layers - 1) < RT_KEEP_ALL)
        take(k, n * 2 * (size_t)c->intermediate, k->act, &a->gate_up);
    for (int l = 0; cuts && l < c->layers; l++)
        saved[l].gate_up = rt_student_own(saved[l].gate_up, a->gate_up);
}

static void take_all(struct cut *k, const struct rt_student_config *c, size_t n, const struct rt_student_kept *kept, struct rt_student_acts *a,
                     void **hidden, struct rt_student_saved *saved)
{
    const size_t H = (size_t)c->hidden, I = (size_t)c->intermediate, q = (size_t)rt_student_q_dim(c), kv = (size_t)rt_student_kv_dim(c);
    take(k, n, sizeof(int32_t), &a->own_ids);
    take(k, n, sizeof(int32_t), &a->own_pos);
    for (int l = 0; l <= c->layers; l++) {
        if (l == 0 || kept->keep != RT_KEEP_FINAL)
            take(k, n * H, k->act, &hidden[k->arena == NULL ? 0 : l]);
        else if (k->arena != NULL)
            hidden[l] = hidden[0];
    }
    take_layers(k, c, n, kept, a, saved);
    take(k, n * H, k->act, &a->final);
    take(k, n, sizeof(float), &a->rstd_final);
    take(k, n * H, k->act, &a->normed);
    take(k, n * I, k->act, &a->h);
    a->d_qk = NULL;
    if (kept->keep < RT_KEEP_LAYERS)
        return;
    take(k, n * H, k->act, &a->d_normed);
    take(k, n * H, k->act, &a->dx);
    take(k, n * (q + 2 * kv), k->act, &a->d_qkv);
    if (c->qk_norm)
        take(k, n * (q + kv), k->act, &a->d_qk);
    take(k, n * q, k->act, &a->d_o);
    take(k, n * (size_t)c->heads, sizeof(float), &a->delta);
}

size_t rt_student_activation_bytes(const struct rt_student_config *c, int64_t n, enum rt_student_keep keep, size_t act_size)
{
    return rt_student_kept_bytes(c, n, &(struct rt_student_kept){keep, 0}, act_size);
}

size_t rt_student_kept_bytes(const struct rt_student_config *c, int64_t n, const struct rt_student_kept *kept, size_t act_size)
{
    struct cut k = {.act = act_size};
    struct rt_student_acts a = {0};
    struct rt_student_saved saved = {0};
    void *hidden = NULL;
    take_all(&k, c, (size_t)n, kept, &a, &hidden, &saved);
    return k.bytes;
}

/* ---- the batch ---- */

static enum rt_status check_batch(const struct rt_student *s, const struct rt_student_batch *b, struct rt_err *err)
{
    if (b->n < 1 || b->n > INT32_MAX || b->n_seq < 1 || b->cu_seqlens[0] != 0 || b->cu_seqlens[b->n_seq] != b->n)
        return rt_fail(err, RT_USAGE, "a batch of %lld tokens in %lld documents: their ends do not run from 0 to its length",
                       (long long)b->n, (long long)b->n_seq);
    for (int64_t i = 0; i < b->n_seq; i++) {
        const int64_t len = (int64_t)b->cu_seqlens[i + 1] - b->cu_seqlens[i];
        if (len < 1 || len > s->max_length)
            return rt_fail(err, RT_USAGE, "document %lld of the batch has %lld tokens, expected 1 to %lld", (long long)i, (long long)len,
                           (long long)s->max_length);
    }
    for (int64_t i = 0; i < b->n; i++)
        if (b->ids[i] < 0 || b->ids[i] >= s->c->vocab_size)
            return rt_fail(err, RT_USAGE, "token %lld of the batch is id %d, expected 0 to %lld (vocab_size - 1)", (long long)i,
                           (int)b->ids[i], (long long)s->c->vocab_size - 1);
    return RT_OK;
}

static enum rt_status upload_batch(struct rt_student *s, const struct rt_student_batch *b, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    RT_TRY(rt_device_sync(s->d, err)); /* the last batch may still be read from staging */
    if (s->staging_cap < b->n) {
        rt_free(s->staging);
        s->staging = NULL;
        s->staging_cap = 0;
        RT_TRY(rt_alloc((size_t)b->n, 2 * sizeof *s->staging, "ids of a batch", &s->staging, err));
        s->staging_cap = b->n;
    }
    int32_t *pos = s->staging + b->n;
    memcpy(s->staging, b->ids, (size_t)b->n * sizeof *b->ids);
    for (int64_t i = 0; i < b->n_seq; i++)
        for (int32_t t = b->cu_seqlens[i]; t < b->cu_seqlens[i + 1]; t++)
            pos[t] = t - b->cu_seqlens[i];
    RT_TRY(rt_device_upload(s->d, s->a.own_ids, s->staging, (size_t)b->n * sizeof *pos, err));
    RT_TRY(rt_device_upload(s->d, s->a.own_pos, pos, (size_t)b->n * sizeof *pos, err));
out:
    return st;
}

/* ---- the layers ---- */

enum rt_status rt_student_rotate(const struct rt_student *s, const struct rt_student_layer *l, void *qkv, void *qk,
                                 const int32_t *pos, int64_t n, float *rstd_q, float *rstd_k, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student_config *c = s->c;
    const int64_t q = rt_student_q_dim(c), kv = rt_student_kv_dim(c), ld = q + 2 * kv, ldy = qk == NULL ? ld : q + kv;
    void *y = qk == NULL ? qkv : qk;
    if (!rt_student_normed_heads(l)) /* the heads of q and k lie side by side and are treated alike */
        return RT_OP(s->d, headnorm_rope_fwd, err, .x = qkv, .ldx = ld, .y = y, .ldy = ldy, .cos = s->cos, .sin = s->sin, .position = pos, .n = n,
                     .heads = c->heads + c->kv_heads, .d = c->head_dim, .eps = (float)c->eps);
    RT_TRY(RT_OP(s->d, headnorm_rope_fwd, err, .x = qkv, .ldx = ld, .w = l->q_norm, .y = y, .ldy = ldy, .rstd = rstd_q, .cos = s->cos,
                 .sin = s->sin, .position = pos, .n = n, .heads = c->heads, .d = c->head_dim, .eps = (float)c->eps));
    RT_TRY(RT_OP(s->d, headnorm_rope_fwd, err, .x = rt_student_at(s, qkv, q), .ldx = ld, .w = l->k_norm, .y = rt_student_at(s, y, q),
                 .ldy = ldy, .rstd = rstd_k, .cos = s->cos, .sin = s->sin, .position = pos, .n = n, .heads = c->kv_heads,
                 .d = c->head_dim, .eps = (float)c->eps));
out:
    return st;
}

enum rt_status rt_student_attention(struct rt_student *s, int i, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student_config *c = s->c;
    const struct rt_student_layer *l = &s->layer[i];
    const struct rt_student_acts *a = &s->a;
    const struct rt_student_saved *v = &a->saved[i];
    const int64_t n = a->batch.n, q = rt_student_q_dim(c), kv = rt_student_kv_dim(c), ld = q + 2 * kv, ld_qk = v->qk == NULL ? ld : q + kv;
    const void *qk = v->qk == NULL ? v->qkv : v->qk;
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = rt_student_own(v->normed1, a->normed)}, .w = l->qkv, .bias = l->qkv_bias, .y = v->qkv, .n = n, .K = c->hidden,
                 .N = ld));
    RT_TRY(rt_student_rotate(s, l, v->qkv, v->qk, a->pos, n, v->rstd_q, v->rstd_k, err));
    RT_TRY(RT_OP(s->d, attn_fwd, err,
                 .s = {.cu_seqlens = a->batch.cu_seqlens, .n = n, .n_seq = a->batch.n_seq, .nh = c->heads, .nkv = c->kv_heads,
                       .dqk = c->head_dim, .dv = c->head_dim, .scale = (float)(1 / sqrt(c->head_dim))},
                 .q = qk, .q_ld = ld_qk, .q_head = c->head_dim, .k = rt_student_at(s, qk, q), .k_ld = ld_qk, .k_head = c->head_dim,
                 .v = rt_student_at(s, v->qkv, q + kv), .v_ld = ld, .v_head = c->head_dim, .o = v->o, .lse = v->lse));
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = v->o}, .w = l->o, .bias = l->o_bias, .add = a->hidden[i], .y = v->mid, .n = n, .K = q,
                 .N = c->hidden));
out:
    return st;
}

enum rt_status rt_student_gate_up(struct rt_student *s, int i, void *h, bool kept, struct rt_err *err)
{
    const struct rt_student_layer *l = &s->layer[i];
    const struct rt_student_acts *a = &s->a;
    const struct rt_student_saved *v = &a->saved[i];
    return RT_OP(s->d, gated_fwd, err, .x = rt_student_own(v->normed2, a->normed), .w = l->gate_up, .bias = l->gate_up_bias, .gate_up = v->gate_up,
                 .h = h, .n = a->batch.n, .K = s->c->hidden, .I = s->c->intermediate, .kept = kept);
}

static enum rt_status mlp(struct rt_student *s, int i, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student_layer *l = &s->layer[i];
    const struct rt_student_acts *a = &s->a;
    const int64_t n = a->batch.n, H = s->c->hidden, I = s->c->intermediate;
    const struct rt_student_saved *v = &a->saved[i];
    void *h = rt_student_own(v->h, a->h);
    RT_TRY(rt_student_gate_up(s, i, h, rt_student_layer_keep(&a->kept, i) >= RT_KEEP_ALL, err));
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = h}, .w = l->down, .bias = l->down_bias, .add = v->mid, .y = a->hidden[i + 1], .n = n, .K = I, .N = H));
out:
    return st;
}

enum rt_status rt_student_forward(struct rt_student *s, const struct rt_student_batch *b, enum rt_student_keep keep,
                                  struct rt_arena *acts, struct rt_err *err)
{
    return rt_student_forward_sent(s, b, NULL, &(struct rt_student_kept){keep, 0}, acts, err);
}

enum rt_status rt_student_forward_sent(struct rt_student *s, const struct rt_student_batch *b, const struct rt_student_sent *sent,
                                       const struct rt_student_kept *kept, struct rt_arena *acts, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_acts *a = &s->a;
    const int64_t H = s->c->hidden;
    const float eps = (float)s->c->eps;
    struct cut k = {.arena = acts, .act = rt_device_act_size(s->d), .err = err};
    a->done = false;
    RT_TRY(check_batch(s, b, err));
    rt_arena_reset(acts, 0);
    take_all(&k, s->c, (size_t)b->n, kept, a, a->hidden, a->saved);
    RT_TRY(k.st);
    a->batch = *b;
    a->kept = *kept;
    a->ids = sent != NULL ? sent->ids : a->own_ids;
    a->pos = sent != NULL ? sent->pos : a->own_pos;
    if (sent == NULL)
        RT_TRY(upload_batch(s, b, err));
    RT_TRY(RT_OP(s->d, embed_fwd, err, .ids = a->ids, .table = s->embed, .out = a->hidden[0], .n = b->n, .cols = H));
    for (int i = 0; i < s->c->layers; i++) {
        const struct rt_student_saved *v = &a->saved[i];
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = a->hidden[i], .w = s->layer[i].norm1, .y = rt_student_own(v->normed1, a->normed), .rstd = v->rstd1, .n = b->n,
                     .cols = H, .eps = eps));
        RT_TRY(rt_student_attention(s, i, err));
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = v->mid, .w = s->layer[i].norm2, .y = rt_student_own(v->normed2, a->normed), .rstd = v->rstd2, .n = b->n,
                     .cols = H, .eps = eps));
        RT_TRY(mlp(s, i, err));
    }
    const int last = s->c->layers;
    RT_TRY(RT_OP(s->d, norm_fwd, err, .x = a->hidden[last], .w = s->final_norm, .y = a->final, .rstd = a->rstd_final, .n = b->n, .cols = H, .eps = eps));
    a->done = kept->keep >= RT_KEEP_LAYERS;
out:
    return st;
}
