#include "student/params.h"

#include <stdio.h>
#include <string.h>

enum { GROUP_ALIGN = 64, MAX_PER_LAYER = 19 };

struct builder {
    struct rt_params *p;
    int layer;
};

/* Starts a group: what follows without another call lies behind each other. */
static int64_t group(struct rt_params *p)
{
    p->elements = (p->elements + GROUP_ALIGN - 1) / GROUP_ALIGN * GROUP_ALIGN;
    return p->elements;
}

static void add(struct builder *b, enum rt_param_kind kind, const char *name, int64_t rows, int64_t cols)
{
    struct rt_params *p = b->p;
    struct rt_param *e = &p->at[p->n++];
    *e = (struct rt_param){.kind = kind, .layer = b->layer, .rows = rows, .cols = cols, .offset = p->elements};
    if (b->layer >= 0)
        snprintf(e->name, sizeof e->name, "model.layers.%d.%s", b->layer, name);
    else
        snprintf(e->name, sizeof e->name, "%s", name);
    p->elements += rows * cols;
    p->count += rows * cols;
    if (kind == RT_PARAM_MATRIX || kind == RT_PARAM_HEAD)
        p->matmul += rows * cols;
}

static int64_t add_norm(struct builder *b, const char *name, int64_t cols)
{
    const int64_t at = group(b->p);
    add(b, RT_PARAM_NORM, name, 1, cols);
    return at;
}

/* Matrices with the same input that lie behind each other, and their biases likewise (*bias -1 where there are none). */
static int64_t add_stack(struct builder *b, int n, const char *const *names, const int64_t *rows, int64_t cols, bool has_bias,
                         int64_t *bias)
{
    char name[64];
    const int64_t at = group(b->p);
    for (int i = 0; i < n; i++) {
        snprintf(name, sizeof name, "%s.weight", names[i]);
        add(b, RT_PARAM_MATRIX, name, rows[i], cols);
    }
    *bias = -1;
    if (has_bias) {
        *bias = group(b->p);
        for (int i = 0; i < n; i++) {
            snprintf(name, sizeof name, "%s.bias", names[i]);
            add(b, RT_PARAM_BIAS, name, 1, rows[i]);
        }
    }
    return at;
}

static void add_layer(struct builder *b, const struct rt_student_config *c, struct rt_param_layer *l)
{
    const int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    l->norm1 = add_norm(b, "input_layernorm.weight", c->hidden);
    l->qkv = add_stack(b, 3, (const char *const[]){"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
                       (const int64_t[]){q, kv, kv}, c->hidden, c->qkv_bias, &l->qkv_bias);
    l->q_norm = c->qk_norm ? add_norm(b, "self_attn.q_norm.weight", c->head_dim) : -1;
    l->k_norm = c->qk_norm ? add_norm(b, "self_attn.k_norm.weight", c->head_dim) : -1;
    l->o = add_stack(b, 1, (const char *const[]){"self_attn.o_proj"}, (const int64_t[]){c->hidden}, q, c->o_bias, &l->o_bias);
    l->norm2 = add_norm(b, "post_attention_layernorm.weight", c->hidden);
    l->gate_up = add_stack(b, 2, (const char *const[]){"mlp.gate_proj", "mlp.up_proj"},
                           (const int64_t[]){c->intermediate, c->intermediate}, c->hidden, c->mlp_bias, &l->gate_up_bias);
    l->down = add_stack(b, 1, (const char *const[]){"mlp.down_proj"}, (const int64_t[]){c->hidden}, c->intermediate, c->mlp_bias,
                        &l->down_bias);
}

enum rt_status rt_params_create(const struct rt_student_config *c, struct rt_params *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_params p = {0};
    RT_TRY(rt_alloc((size_t)c->layers * MAX_PER_LAYER + 3, sizeof *p.at, "the table of parameters", &p.at, err));
    RT_TRY(rt_alloc((size_t)c->layers, sizeof *p.layer, "the table of layers", &p.layer, err));
    struct builder b = {&p, -1};
    p.embed = group(&p);
    add(&b, RT_PARAM_EMBED, "model.embed_tokens.weight", c->vocab_size, c->hidden);
    for (b.layer = 0; b.layer < c->layers; b.layer++)
        add_layer(&b, c, &p.layer[b.layer]);
    b.layer = -1;
    p.final_norm = add_norm(&b, "model.norm.weight", c->hidden);
    p.head = p.embed;
    if (c->tied) {
        p.matmul += c->vocab_size * c->hidden;
    } else {
        p.head = group(&p);
        add(&b, RT_PARAM_HEAD, "lm_head.weight", c->vocab_size, c->hidden);
    }
    group(&p);
    *out = p;
    p = (struct rt_params){0};
out:
    rt_params_free(&p);
    return st;
}

void rt_params_free(struct rt_params *p)
{
    rt_free(p->at);
    rt_free(p->layer);
    *p = (struct rt_params){0};
}

const struct rt_param *rt_params_find(const struct rt_params *p, const char *name)
{
    for (int i = 0; i < p->n; i++)
        if (strcmp(p->at[i].name, name) == 0)
            return &p->at[i];
    return NULL;
}

struct rt_tensor_decl rt_param_decl(const struct rt_param *p, enum rt_dtype dtype)
{
    struct rt_tensor_decl d = {.name = p->name, .dtype = dtype, .ndim = 2, .ne = {p->rows, p->cols}};
    if (p->kind == RT_PARAM_NORM || p->kind == RT_PARAM_BIAS) {
        d.ndim = 1;
        d.ne[0] = p->cols;
        d.ne[1] = 1;
    }
    return d;
}

enum rt_status rt_params_decl(const struct rt_params *p, enum rt_dtype dtype, struct rt_tensor_decl **decl, struct rt_err *err)
{
    const enum rt_status st = rt_alloc((size_t)p->n, sizeof **decl, "the list of tensors", decl, err);
    for (int i = 0; st == RT_OK && i < p->n; i++)
        (*decl)[i] = rt_param_decl(&p->at[i], dtype);
    return st;
}
