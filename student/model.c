#include "student/model.h"

#include <string.h>

#include "student/internal.h"

enum rt_status rt_device_arena(const struct rt_device *d, size_t bytes, const char *name, struct rt_arena *out, struct rt_err *err)
{
    void *base = NULL;
    const enum rt_status st = d->be->alloc(d->dev, bytes, &base, err);
    if (st == RT_OK)
        rt_arena_init(out, base, bytes, name);
    else
        rt_err_context(err, "%s", name);
    return st;
}

void rt_device_arena_free(const struct rt_device *d, struct rt_arena *a)
{
    if (a->base != NULL)
        d->be->free(d->dev, a->base);
    *a = (struct rt_arena){0};
}

size_t rt_params_bytes(const struct rt_params *p, size_t act_size)
{
    return rt_arena_round((size_t)p->elements * act_size);
}

static size_t rope_bytes(const struct rt_student_config *c, int64_t max_length)
{
    return (size_t)max_length * (size_t)(c->head_dim / 2) * sizeof(float);
}

size_t rt_student_weight_bytes(const struct rt_student_config *c, const struct rt_params *p, int64_t max_length, size_t act_size)
{
    return rt_params_bytes(p, act_size) + 2 * rt_arena_round(rope_bytes(c, max_length));
}

static enum rt_status handle(struct rt_student *s, int64_t offset, int64_t rows, int64_t cols, struct rt_weight **out,
                             struct rt_err *err)
{
    *out = NULL;
    return offset < 0 ? RT_OK : s->d->be->weight_param(s->d->dev, rt_student_at(s, s->block, offset), rows, cols, out, err);
}

static enum rt_status make_handles(struct rt_student *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student_config *c = s->c;
    const int64_t H = c->hidden, I = c->intermediate, qkv = rt_student_qkv_dim(c);
    RT_TRY(handle(s, s->p->embed, c->vocab_size, H, &s->embed, err));
    RT_TRY(handle(s, s->p->head, c->vocab_size, H, &s->head, err));
    RT_TRY(handle(s, s->p->final_norm, 1, H, &s->final_norm, err));
    for (int i = 0; i < c->layers; i++) {
        const struct rt_param_layer *p = &s->p->layer[i];
        struct rt_student_layer *l = &s->layer[i];
        RT_TRY(handle(s, p->norm1, 1, H, &l->norm1, err));
        RT_TRY(handle(s, p->qkv, qkv, H, &l->qkv, err));
        RT_TRY(handle(s, p->qkv_bias, 1, qkv, &l->qkv_bias, err));
        RT_TRY(handle(s, p->q_norm, 1, c->head_dim, &l->q_norm, err));
        RT_TRY(handle(s, p->k_norm, 1, c->head_dim, &l->k_norm, err));
        RT_TRY(handle(s, p->o, H, rt_student_q_dim(c), &l->o, err));
        RT_TRY(handle(s, p->o_bias, 1, H, &l->o_bias, err));
        RT_TRY(handle(s, p->norm2, 1, H, &l->norm2, err));
        RT_TRY(handle(s, p->gate_up, 2 * I, H, &l->gate_up, err));
        RT_TRY(handle(s, p->gate_up_bias, 1, 2 * I, &l->gate_up_bias, err));
        RT_TRY(handle(s, p->down, H, I, &l->down, err));
        RT_TRY(handle(s, p->down_bias, 1, H, &l->down_bias, err));
    }
out:
    return st;
}

static enum rt_status fill_rope(struct rt_student *s, struct rt_arena *weights, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t bytes = rope_bytes(s->c, s->max_length);
    float *host = NULL;
    RT_TRY(rt_arena_alloc(weights, bytes, &s->cos, err));
    RT_TRY(rt_arena_alloc(weights, bytes, &s->sin, err));
    RT_TRY(rt_alloc(2, bytes, "the rope table", &host, err));
    float *host_sin = host + bytes / sizeof *host;
    rt_student_rope_table(s->c, s->max_length, host, host_sin);
    RT_TRY(rt_device_upload(s->d, s->cos, host, bytes, err));
    RT_TRY(rt_device_upload(s->d, s->sin, host_sin, bytes, err));
    RT_TRY(rt_device_sync(s->d, err));
out:
    rt_free(host);
    return st;
}

enum rt_status rt_student_create(const struct rt_device *d, const struct rt_student_config *c, const struct rt_params *p,
                                 int64_t max_length, struct rt_arena *weights, struct rt_student **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student *s = NULL;
    if (max_length < 1 || max_length > c->max_position)
        RT_FAIL(err, USAGE, "a length of %lld tokens: this student takes 1 to %lld (max_position_embeddings)", (long long)max_length,
                (long long)c->max_position);
    RT_TRY(rt_alloc(1, sizeof *s, "the student", &s, err));
    *s = (struct rt_student){.d = d, .c = c, .p = p, .max_length = max_length};
    RT_TRY(rt_alloc((size_t)c->layers, sizeof *s->layer, "layers of the student", &s->layer, err));
    RT_TRY(rt_alloc((size_t)c->layers, sizeof *s->a.saved, "layers of the student", &s->a.saved, err));
    RT_TRY(rt_alloc((size_t)c->layers + 1, sizeof *s->a.hidden, "layers of the student", &s->a.hidden, err));
    RT_TRY(rt_arena_alloc(weights, rt_params_bytes(p, rt_device_act_size(d)), &s->block, err));
    RT_TRY(fill_rope(s, weights, err));
    RT_TRY(make_handles(s, err));
    *out = s;
    s = NULL;
out:
    rt_student_free(s);
    return st;
}

void rt_student_free(struct rt_student *s)
{
    if (s == NULL)
        return;
    const struct rt_backend *be = s->d->be;
    struct rt_dev *dev = s->d->dev;
    for (int i = 0; s->layer != NULL && i < s->c->layers; i++) {
        struct rt_student_layer *l = &s->layer[i];
        struct rt_weight *all[] = {l->norm1, l->qkv,   l->qkv_bias, l->q_norm,       l->k_norm, l->o,
                                   l->o_bias, l->norm2, l->gate_up, l->gate_up_bias, l->down,   l->down_bias};
        for (size_t j = 0; j < sizeof all / sizeof all[0]; j++)
            be->weight_free(dev, all[j]);
    }
    be->weight_free(dev, s->embed);
    be->weight_free(dev, s->final_norm);
    be->weight_free(dev, s->head);
    rt_free(s->layer);
    rt_free(s->a.saved);
    rt_free(s->a.hidden);
    rt_free(s->staging);
    rt_free(s);
}

enum rt_status rt_student_attach_grads(struct rt_student *s, struct rt_arena *grads, struct rt_err *err)
{
    const enum rt_status st = rt_arena_alloc(grads, rt_params_bytes(s->p, rt_device_act_size(s->d)), &s->grads, err);
    return st == RT_OK ? rt_student_zero_grads(s, err) : st;
}

enum rt_status rt_student_zero_grads(struct rt_student *s, struct rt_err *err)
{
    return rt_device_zero(s->d, s->grads, (size_t)s->p->elements * rt_device_act_size(s->d), err);
}

enum rt_status rt_student_zero_outer_grads(struct rt_student *s, struct rt_err *err)
{
    const size_t act = rt_device_act_size(s->d), layers = (size_t)s->p->layer[0].norm1 * act, behind = (size_t)s->p->final_norm * act;
    enum rt_status st;
    RT_TRY(rt_device_zero(s->d, s->grads, layers, err));
    RT_TRY(rt_device_zero(s->d, s->grads + behind, (size_t)s->p->elements * act - behind, err));
out:
    return st;
}

const struct rt_device *rt_student_device(const struct rt_student *s)
{
    return s->d;
}

const struct rt_student_config *rt_student_config(const struct rt_student *s)
{
    return s->c;
}

const struct rt_params *rt_student_params(const struct rt_student *s)
{
    return s->p;
}

int64_t rt_student_max_length(const struct rt_student *s)
{
    return s->max_length;
}

void *rt_student_block(const struct rt_student *s)
{
    return s->block;
}

void *rt_student_grads(const struct rt_student *s)
{
    return s->grads;
}

const void *rt_student_hidden(const struct rt_student *s, int layer)
{
    if (layer == RT_LAYER_FINAL)
        return s->a.final;
    return s->a.kept.keep == RT_KEEP_FINAL || layer < 0 || layer > s->c->layers ? NULL : s->a.hidden[layer];
}

struct rt_student_head rt_student_head(const struct rt_student *s)
{
    return (struct rt_student_head){s->head, rt_student_at(s, s->grads, s->p->head), s->c->vocab_size, s->c->hidden};
}

enum rt_status rt_student_load(struct rt_student *s, const struct rt_tensors *t, struct rt_err *err)
{
    return rt_params_load(s->p, s->d, rt_param_block(s->d, s->block), t, err);
}

enum rt_status rt_student_init(struct rt_student *s, uint64_t seed, struct rt_err *err)
{
    return rt_params_init(s->p, s->d, s->block, s->c->initializer_range, seed, err);
}

const enum rt_op *rt_student_train_ops(int *n)
{
    static const enum rt_op ops[] = {
        RT_OP_embed_fwd, RT_OP_norm_fwd, RT_OP_linear_fwd, RT_OP_headnorm_rope_fwd, RT_OP_attn_fwd, RT_OP_gated_fwd,
        RT_OP_embed_bwd, RT_OP_norm_bwd, RT_OP_linear_dgrad, RT_OP_linear_wgrad, RT_OP_headnorm_rope_bwd, RT_OP_attn_bwd,
        RT_OP_gated_bwd,  RT_OP_gather, RT_OP_scatter, RT_OP_head_loss, RT_OP_feature_loss, RT_OP_sumsq, RT_OP_axpy, RT_OP_adamw,
    };
    *n = (int)(sizeof ops / sizeof ops[0]);
    return ops;
}

const enum rt_op *rt_student_decode_ops(int *n)
{
    static const enum rt_op ops[] = {RT_OP_embed_fwd,  RT_OP_norm_fwd,    RT_OP_linear_fwd, RT_OP_linear_rope_put, RT_OP_gated_fwd,
                                     RT_OP_cache_copy, RT_OP_attn_cached, RT_OP_gather,     RT_OP_sample};
    *n = (int)(sizeof ops / sizeof ops[0]);
    return ops;
}
