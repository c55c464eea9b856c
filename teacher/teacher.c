#include "teacher/teacher.h"

#include <string.h>

#include "teacher/feature_way.h"

const enum rt_op *rt_teacher_score_ops(int *n)
{
    static const enum rt_op ops[] = {RT_OP_norm_fwd, RT_OP_quant, RT_OP_linear_fwd, RT_OP_rope, RT_OP_attn_fwd,
                                     RT_OP_route, RT_OP_moe_sort, RT_OP_moe_ffn, RT_OP_head_topk, RT_OP_gather, RT_OP_embed_fwd, RT_OP_convert};
    *n = sizeof ops / sizeof *ops;
    return ops;
}

const enum rt_op *rt_teacher_decode_ops(int *n)
{
    static const enum rt_op ops[] = {RT_OP_norm_fwd, RT_OP_quant, RT_OP_linear_fwd, RT_OP_rope, RT_OP_route, RT_OP_moe_sort, RT_OP_moe_ffn,
                                     RT_OP_head_matmul, RT_OP_cache_put, RT_OP_cache_copy, RT_OP_mla_cached, RT_OP_gather, RT_OP_embed_fwd, RT_OP_convert};
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
    const int width[] = {c->hidden, c->q_lora, c->kv_lora, c->heads * c->dv, c->inter, c->moe_inter};
    for (size_t i = 0; i < sizeof width / sizeof *width; i++)
        if (width[i] % 128 != 0)
            return rt_fail(err, RT_UNSUPPORTED, "%s: --numerics w8a8 quantises runs of 128 columns; a width of %d is no multiple: use w8a16",
                           o->dir, width[i]);
    return RT_OK;
}

/* The weights of a checkpoint, with their headers checked, and its configuration. */
static enum rt_status open_weights(const struct rt_teacher_options *o, struct rt_teacher_config *c, struct rt_weights **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_weights_options wo = {.dir = o->dir, .config = c, .device = o->device, .resident = o->slots > 0, .threads = o->readers,
                                    .with = o->with != NULL ? o->with->w : NULL};
    RT_TRY(rt_teacher_config_load(o->dir, c, err));
    wo.mtp = o->mtp && c->mtp_layers > 0;
    RT_TRY(check_options(o, c, err));
    RT_TRY(rt_weights_open(&wo, out, err));
out:
    return st;
}

static void take_sizes(const struct rt_weights *w, const struct rt_teacher_config *c, struct rt_teacher_sizes *out)
{
    *out = (struct rt_teacher_sizes){.config = *c, .largest_part = rt_weights_largest_part(w), .largest_expert = rt_weights_largest_expert(w),
                                     .model_bytes = rt_weights_model_bytes(w), .model_room = rt_weights_model_room(w), .staging = rt_weights_staging(w)};
}

enum rt_status rt_teacher_measure(const struct rt_teacher_options *o, struct rt_teacher_sizes *out, struct rt_err *err)
{
    struct rt_weights *w = NULL;
    const enum rt_status st = open_weights(o, &out->config, &w, err);
    if (st == RT_OK)
        take_sizes(w, &out->config, out);
    rt_weights_free(w);
    return st;
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
    const size_t n = (size_t)t->plan.window, act = rt_device_act_size(d), total = rt_teacher_state_bytes(&t->o, &t->c, t->plan.chunk, t->plan.window);
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
    struct rt_teacher_sizes sizes;
    struct rt_weights_budget budget;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *t, "teacher", &t, err));
    t->o = *o;
    RT_TRY(open_weights(o, &t->c, &t->w, err));
    take_sizes(t->w, &t->c, &sizes);
    RT_TRY(rt_teacher_plan_sizes(o, &sizes, &t->plan, err));
    if (o->device->be->set_scratch != NULL)
        o->device->be->set_scratch(o->device->dev, t->plan.gpu_scratch);
    budget = (struct rt_weights_budget){.host = t->plan.weight_budget, .device = t->plan.gpu_weight_budget, .ring = t->plan.gpu_ring};
    RT_TRY(rt_weights_set_budget(t->w, &budget, err));
    if (o->device->be->own_memory) /* elsewhere the device's threads have the host's cores */
        RT_TRY(rt_pool_create(0, &t->pool, err));
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
    rt_teacher_embed_free(t);
    rt_feature_way_free(t->way);
    rt_pool_free(t->pool);
    rt_weights_free(t->w);
    if (t->block != NULL)
        t->o.device->be->free(t->o.device->dev, t->block);
    rt_free(t->pass);
    rt_free(t);
}

void rt_teacher_expect(struct rt_teacher *t, bool expected)
{
    rt_weights_expect(t->w, expected);
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
