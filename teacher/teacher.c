#include "teacher/teacher.h"

#include <string.h>

enum {
    CHUNK_TOKENS = 4096,      /* attention buffers are sized for so many tokens, or for the longest sequence */
    WINDOW_MOST = 1 << 20,
    WINDOW_UNKNOWN = 1 << 17, /* where the amount of data is not known */
};
const enum rt_op *rt_teacher_score_ops(int *n)
{
    static const enum rt_op ops[] = {RT_OP_norm_fwd, RT_OP_quant, RT_OP_linear_fwd, RT_OP_rope, RT_OP_attn_fwd, RT_OP_mla_concat_k,
                                     RT_OP_route, RT_OP_moe_sort, RT_OP_moe_ffn, RT_OP_head_topk, RT_OP_gather, RT_OP_convert};
    *n = sizeof ops / sizeof *ops;
    return ops;
}

const enum rt_op *rt_teacher_decode_ops(int *n)
{
    static const enum rt_op ops[] = {RT_OP_norm_fwd, RT_OP_quant, RT_OP_linear_fwd, RT_OP_rope, RT_OP_route, RT_OP_moe_sort, RT_OP_moe_ffn,
                                     RT_OP_head_matmul, RT_OP_cache_put, RT_OP_cache_copy, RT_OP_mla_cached, RT_OP_gather, RT_OP_convert};
    *n = sizeof ops / sizeof *ops;
    return ops;
}

static enum rt_status check_options(const struct rt_teacher_options *o, const struct rt_teacher_config *c, struct rt_err *err)
{
    if (o->max_length < 1 || o->max_length > c->max_position)
        return rt_fail(err, RT_USAGE, "%s: sequences of %ld tokens, but max_position_embeddings is %ld", o->dir, (long)o->max_length,
                       (long)c->max_position);
    if (!o->w8a8)
        return RT_OK;
    if (!c->fp8)
        return rt_fail(err, RT_UNSUPPORTED, "%s: --numerics w8a8 needs an FP8 checkpoint; this one has none: use w8a16", o->dir);
    if (c->ue8m0)
        return rt_fail(err, RT_UNSUPPORTED, "%s: --numerics w8a8 with scale_fmt ue8m0 is not supported: use w8a16", o->dir);
    const int width[] = {c->hidden, c->q_lora, c->kv_lora, c->heads * c->dv, c->inter, c->moe_inter};
    for (size_t i = 0; i < sizeof width / sizeof *width; i++)
        if (width[i] % 128 != 0)
            return rt_fail(err, RT_UNSUPPORTED, "%s: --numerics w8a8 quantises runs of 128 columns; a width of %d is no multiple: use w8a16",
                           o->dir, width[i]);
    return RT_OK;
}

/* Device bytes of everything but weights for a window of n tokens. */
static uint64_t state_bytes(const struct rt_teacher_options *o, const struct rt_teacher_config *c, int64_t chunk, int64_t n)
{
    const size_t act = rt_device_act_size(o->device);
    const bool cached = o->slots > 0;
    uint64_t b = rt_layer_bytes(c, o->device, o->w8a8, cached, chunk, n);
    b += 2 * rt_arena_round((size_t)(o->max_length * (c->dr / 2)) * sizeof(float));
    b += rt_arena_round((size_t)n * (size_t)c->hidden * act) + 2 * rt_arena_round((size_t)n * sizeof(int32_t));
    if (cached)
        b += rt_arena_round((size_t)c->layers * (size_t)o->slots * (size_t)o->max_length * (size_t)(c->kv_lora + c->dr) * act);
    return b + 64;
}

static enum rt_status plan(const struct rt_teacher_options *o, const struct rt_teacher_config *c, uint64_t largest, uint64_t model,
                           struct rt_teacher_plan *p, struct rt_err *err)
{
    char need[32], have[32];
    const uint64_t memory = o->memory > 0 ? (uint64_t)o->memory : 0;
    *p = (struct rt_teacher_plan){.model_bytes = model, .largest_part = largest};
    if (o->slots > 0) {
        p->window = p->chunk = o->batch_tokens;
        p->cache_bytes = (uint64_t)c->layers * (uint64_t)o->slots * (uint64_t)o->max_length * (uint64_t)(c->kv_lora + c->dr) *
                         rt_device_act_size(o->device);
    } else {
        p->chunk = o->max_length > CHUNK_TOKENS ? o->max_length : CHUNK_TOKENS;
        int64_t most = o->window > 0 ? o->window : o->data_tokens > 0 && o->data_tokens < WINDOW_MOST ? o->data_tokens
                       : o->data_tokens > 0 ? WINDOW_MOST : WINDOW_UNKNOWN;
        if (most < o->max_length)
            most = o->max_length;
        if (p->chunk > most)
            p->chunk = most;
        if (o->chunk > 0)
            p->chunk = o->chunk > o->max_length ? o->chunk : o->max_length;
        const uint64_t one = state_bytes(o, c, p->chunk, 1), two = state_bytes(o, c, p->chunk, 1025);
        const uint64_t a_token = (two - one) / 1024 + (uint64_t)o->token_bytes + 1;
        /* two of the largest part: one in use, one on its way */
        const uint64_t fixed = one + RT_TEACHER_FIXED_BYTES + 2 * largest;
        int64_t fits = memory > fixed ? (int64_t)((memory - fixed) / a_token) : 0;
        if (fits < o->max_length && p->chunk > o->max_length && o->chunk == 0) { /* a smaller chunk may do */
            p->chunk = o->max_length;
            const uint64_t small = state_bytes(o, c, p->chunk, 1) + RT_TEACHER_FIXED_BYTES + 2 * largest;
            fits = memory > small ? (int64_t)((memory - small) / a_token) : 0;
        }
        p->window = fits < most ? fits : most;
        if (p->window < o->max_length || (o->window > 0 && p->window < o->window))
            return rt_fail(err, RT_NOMEM, "%s: a window of %ld tokens needs %s of memory, --memory gives %s; raise it, or shorten sequences with --max-length",
                           o->dir, (long)(o->window > 0 ? o->window : o->max_length),
                           rt_human_bytes(need, state_bytes(o, c, p->chunk, o->window > 0 ? o->window : o->max_length) + RT_TEACHER_FIXED_BYTES + 2 * largest),
                           rt_human_bytes(have, memory));
    }
    p->window_bytes = state_bytes(o, c, p->chunk, p->window) + (uint64_t)(p->window * o->token_bytes);
    if (p->window_bytes + RT_TEACHER_FIXED_BYTES + largest > memory)
        return rt_fail(err, RT_NOMEM, "%s: states of %ld tokens and caches need %s, --memory gives %s; use fewer slots or shorter sequences", o->dir,
                       (long)p->window, rt_human_bytes(need, p->window_bytes + RT_TEACHER_FIXED_BYTES + largest), rt_human_bytes(have, memory));
    p->weight_budget = memory - p->window_bytes - RT_TEACHER_FIXED_BYTES;
    p->resident = p->weight_budget >= model;
    return RT_OK;
}

/* The weights of a checkpoint, with their headers checked, and its configuration. */
static enum rt_status open_weights(const struct rt_teacher_options *o, struct rt_teacher_config *c, struct rt_weights **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_weights_options wo = {.dir = o->dir, .config = c, .device = o->device, .resident = o->slots > 0};
    RT_TRY(rt_teacher_config_load(o->dir, c, err));
    wo.mtp = o->mtp && c->mtp_layers > 0;
    RT_TRY(check_options(o, c, err));
    RT_TRY(rt_weights_open(&wo, out, err));
out:
    return st;
}

enum rt_status rt_teacher_measure(const struct rt_teacher_options *o, struct rt_teacher_sizes *out, struct rt_err *err)
{
    struct rt_weights *w = NULL;
    const enum rt_status st = open_weights(o, &out->config, &w, err);
    if (st == RT_OK) {
        out->largest_part = rt_weights_largest_part(w);
        out->model_bytes = rt_weights_model_bytes(w);
    }
    rt_weights_free(w);
    return st;
}

enum rt_status rt_teacher_plan_sizes(const struct rt_teacher_options *o, const struct rt_teacher_sizes *sizes, struct rt_teacher_plan *out,
                                     struct rt_err *err)
{
    return plan(o, &sizes->config, sizes->largest_part, sizes->model_bytes, out, err);
}

enum rt_status rt_teacher_plan_memory(const struct rt_teacher_options *o, struct rt_teacher_plan *out, struct rt_err *err)
{
    struct rt_teacher_sizes sizes;
    const enum rt_status st = rt_teacher_measure(o, &sizes, err);
    return st == RT_OK ? rt_teacher_plan_sizes(o, &sizes, out, err) : st;
}

static enum rt_status make_rope(struct rt_teacher *t, struct rt_err *err)
{
    const size_t n = (size_t)t->o.max_length * (size_t)(t->c.dr / 2);
    float *host = NULL, *dev[2];
    enum rt_status st;
    RT_TRY(rt_alloc(2 * n, sizeof *host, "rope tables", &host, err));
    rt_teacher_rope_table(&t->c, t->o.max_length, host, host + n);
    for (int i = 0; i < 2; i++) {
        RT_TRY(rt_arena_alloc(&t->arena, n * sizeof(float), &dev[i], err));
        RT_TRY(rt_device_upload(t->o.device, dev[i], host + (size_t)i * n, n * sizeof(float), err));
    }
    t->ctx.rope_cos = dev[0];
    t->ctx.rope_sin = dev[1];
    RT_TRY(rt_device_sync(t->o.device, err));
out:
    rt_free(host);
    return st;
}

static enum rt_status make_states(struct rt_teacher *t, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    const size_t n = (size_t)t->plan.window, act = rt_device_act_size(d), total = state_bytes(&t->o, &t->c, t->plan.chunk, t->plan.window);
    enum rt_status st;
    RT_TRY(d->be->alloc(d->dev, total, &t->block, err));
    rt_arena_init(&t->arena, t->block, total, "teacher states");
    t->ctx = (struct rt_layer_ctx){.c = &t->c, .d = d, .w = t->w, .w8a8 = t->o.w8a8, .attn_scale = (float)rt_teacher_attn_scale(&t->c),
                                   .chunk = t->plan.chunk, .window = t->plan.window};
    RT_TRY(make_rope(t, err));
    RT_TRY(rt_layer_init(&t->ctx, &t->arena, t->o.slots > 0, err));
    RT_TRY(rt_arena_alloc(&t->arena, n * (size_t)t->c.hidden * act, &t->hidden, err));
    RT_TRY(rt_arena_alloc(&t->arena, n * sizeof(int32_t), &t->position, err));
    RT_TRY(rt_arena_alloc(&t->arena, n * sizeof(int32_t), &t->slot, err));
    if (t->o.slots > 0)
        RT_TRY(rt_arena_alloc(&t->arena, t->plan.cache_bytes, &t->cache, err));
out:
    return st;
}

static enum rt_status make_pass(struct rt_teacher *t, struct rt_err *err)
{
    enum rt_status st;
    int64_t n = 1;
    for (int l = 0; l < t->c.layers; l++)
        n += rt_weights_layer_parts(&t->c, l, NULL);
    RT_TRY(rt_alloc((size_t)n, sizeof *t->pass, "pass", &t->pass, err));
    t->n_pass = n;
    n = 0;
    for (int l = 0; l < t->c.layers; l++)
        n += rt_weights_layer_parts(&t->c, l, t->pass + n);
    t->pass[n] = (struct rt_part_id){.kind = RT_PART_HEAD};
out:
    return st;
}

enum rt_status rt_teacher_open(const struct rt_teacher_options *o, struct rt_teacher **out, struct rt_err *err)
{
    struct rt_teacher *t = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *t, "teacher", &t, err));
    t->o = *o;
    RT_TRY(open_weights(o, &t->c, &t->w, err));
    RT_TRY(plan(o, &t->c, rt_weights_largest_part(t->w), rt_weights_model_bytes(t->w), &t->plan, err));
    RT_TRY(rt_weights_set_budget(t->w, t->plan.weight_budget, err));
    RT_TRY(make_states(t, err));
    RT_TRY(make_pass(t, err));
    *out = t;
    t = NULL;
out:
    rt_teacher_close(t);
    return st;
}

void rt_teacher_close(struct rt_teacher *t)
{
    if (t == NULL)
        return;
    rt_layer_release(&t->ctx);
    rt_weights_free(t->w);
    if (t->block != NULL)
        t->o.device->be->free(t->o.device->dev, t->block);
    rt_free(t->pass);
    rt_free(t);
}

const struct rt_teacher_config *rt_teacher_config(const struct rt_teacher *t)
{
    return &t->c;
}

const struct rt_teacher_plan *rt_teacher_plan(const struct rt_teacher *t)
{
    return &t->plan;
}

const char *rt_teacher_sha256(const struct rt_teacher *t)
{
    return rt_tensors_sha256(rt_weights_tensors(t->w));
}

enum rt_status rt_teacher_embed(struct rt_teacher *t, int layer, const uint32_t *ids, int64_t n, void *x, struct rt_err *err)
{
    const int64_t most = n < 256 ? n : 256; /* rows at a time */
    const struct rt_device *d = t->o.device;
    const size_t H = (size_t)t->c.hidden, act = rt_device_act_size(d);
    float *rows = NULL;
    void *converted = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)most * H, sizeof *rows, "embedding rows", &rows, err));
    RT_TRY(rt_alloc((size_t)most * H, act, "embedding rows", &converted, err));
    for (int64_t i = 0; i < n; i += most) {
        const int64_t m = n - i < most ? n - i : most;
        RT_TRY(rt_weights_embed(t->w, layer, ids + i, m, rows, err));
        if (d->be->act == RT_F64)
            for (size_t j = 0; j < (size_t)m * H; j++)
                ((double *)converted)[j] = rows[j];
        else
            rt_from_f32(converted, d->be->act, rows, (size_t)m * H);
        RT_TRY(rt_device_upload(d, (char *)x + (size_t)i * H * act, converted, (size_t)m * H * act, err));
        RT_TRY(rt_device_sync(d, err));
    }
out:
    rt_free(rows);
    rt_free(converted);
    return st;
}
