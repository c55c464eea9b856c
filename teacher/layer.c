#include "teacher/layer.h"

#include <string.h>

/* Both projections inside attention are normalised with this epsilon whatever rms_norm_eps says (published modelling code). */
#define LATENT_EPS 1e-6f

struct sizes {
    int64_t H, ql, dq, q, R, ckv, kv, o, k;
};

static struct sizes sizes_of(const struct rt_teacher_config *c)
{
    const int64_t dq = c->dn + c->dr;
    return (struct sizes){.H = c->hidden, .ql = c->q_lora, .dq = dq, .q = c->heads * dq, .R = c->kv_lora, .ckv = c->kv_lora + c->dr,
                          .kv = (int64_t)c->heads * (c->dn + c->dv), .o = (int64_t)c->heads * c->dv, .k = c->top_k > 0 ? c->top_k : 1};
}

/* Takes, or with a NULL arena only counts, one block. */
static enum rt_status cut(struct rt_arena *a, size_t bytes, void *ptr_to_ptr, size_t *total, struct rt_err *err)
{
    *total += rt_arena_round(bytes);
    return a != NULL ? rt_arena_alloc(a, bytes, ptr_to_ptr, err) : RT_OK;
}

static enum rt_status cut_act(struct rt_arena *a, int64_t n, int64_t cols, struct rt_act *out, size_t *total, struct rt_err *err)
{
    const int64_t rows = rt_act_rows(n);
    enum rt_status st = cut(a, (size_t)(rows * cols), &out->data, total, err);
    if (st == RT_OK)
        st = cut(a, (size_t)(rows * ((cols + 127) / 128)) * sizeof(float), &out->scale, total, err);
    return st;
}

static enum rt_status cut_all(struct rt_layer_ctx *x, struct rt_arena *a, bool cached, size_t act, size_t *total, struct rt_err *err)
{
    const struct sizes s = sizes_of(x->c);
    const size_t C = (size_t)x->chunk * act, W = (size_t)x->window;
    enum rt_status st;
    RT_TRY(cut(a, C * (size_t)s.H, &x->xn, total, err));
    RT_TRY(cut(a, C * (size_t)s.ql, &x->qa, total, err));
    RT_TRY(cut(a, C * (size_t)s.ql, &x->qan, total, err));
    RT_TRY(cut(a, C * (size_t)s.q, &x->q, total, err));
    RT_TRY(cut(a, C * (size_t)s.ckv, &x->ckv, total, err));
    RT_TRY(cut(a, C * (size_t)s.R, &x->latent, total, err));
    RT_TRY(cut(a, C * (size_t)s.o, &x->o, total, err));
    if (cached) {
        RT_TRY(cut(a, C * (size_t)(x->c->heads * s.R), &x->q_lat, total, err));
        RT_TRY(cut(a, C * (size_t)(x->c->heads * s.R), &x->o_lat, total, err));
    } else {
        RT_TRY(cut(a, C * (size_t)s.kv, &x->kv, total, err));
    }
    RT_TRY(cut(a, W * (size_t)s.H * act, &x->fx, total, err));
    RT_TRY(cut(a, W * (size_t)s.k * sizeof(int32_t), &x->route_ids, total, err));
    RT_TRY(cut(a, W * (size_t)s.k * sizeof(int32_t), &x->perm, total, err));
    RT_TRY(cut(a, W * (size_t)s.k * sizeof(float), &x->route_weight, total, err));
    if (x->w8a8) {
        RT_TRY(cut_act(a, x->chunk, s.H, &x->xq, total, err));
        RT_TRY(cut_act(a, x->chunk, s.ql, &x->qaq, total, err));
        RT_TRY(cut_act(a, x->chunk, s.R, &x->latq, total, err));
        RT_TRY(cut_act(a, x->chunk, s.o, &x->oq, total, err));
        RT_TRY(cut_act(a, x->window, s.H, &x->fxq, total, err));
    }
out:
    return st;
}

size_t rt_layer_bytes(const struct rt_teacher_config *c, const struct rt_device *d, bool w8a8, bool cached, int64_t chunk, int64_t window)
{
    struct rt_layer_ctx x = {.c = c, .w8a8 = w8a8, .chunk = chunk, .window = window};
    size_t total = 0;
    (void)cut_all(&x, NULL, cached, rt_device_act_size(d), &total, NULL);
    return total;
}

enum rt_status rt_layer_init(struct rt_layer_ctx *ctx, struct rt_arena *device_arena, bool cached, struct rt_err *err)
{
    const size_t E = (size_t)ctx->c->experts + 1;
    size_t total = 0;
    enum rt_status st;
    RT_TRY(cut_all(ctx, device_arena, cached, rt_device_act_size(ctx->d), &total, err));
    RT_TRY(rt_alloc(E, sizeof *ctx->offset, "expert offsets", &ctx->offset, err));
    RT_TRY(rt_alloc(E, sizeof *ctx->held, "expert list", &ctx->held, err));
    RT_TRY(rt_alloc(E, sizeof *ctx->wg, "expert list", &ctx->wg, err));
    RT_TRY(rt_alloc(E, sizeof *ctx->wu, "expert list", &ctx->wu, err));
    RT_TRY(rt_alloc(E, sizeof *ctx->wd, "expert list", &ctx->wd, err));
out:
    if (st != RT_OK)
        rt_layer_release(ctx);
    return st;
}

void rt_layer_release(struct rt_layer_ctx *ctx)
{
    rt_free(ctx->offset);
    rt_free(ctx->held);
    rt_free(ctx->wg);
    rt_free(ctx->wu);
    rt_free(ctx->wd);
    ctx->offset = NULL;
    ctx->held = NULL;
    ctx->wg = ctx->wu = ctx->wd = NULL;
}

static void *at(const struct rt_layer_ctx *x, void *p, int64_t elements)
{
    return (char *)p + elements * (int64_t)rt_device_act_size(x->d);
}

static struct rt_act none(void)
{
    return (struct rt_act){0};
}

/* The operand for weight `slot`: the e4m3 form where this product takes it. */
static struct rt_act operand(const struct rt_layer_ctx *x, const struct rt_part *p, int slot, void *plain, struct rt_act quantised)
{
    return x->w8a8 && p->fp8[slot] ? quantised : (struct rt_act){.data = plain};
}

static enum rt_status product(struct rt_layer_ctx *x, const struct rt_part *p, int slot, void *plain, struct rt_act quantised, int64_t n,
                              int64_t K, int64_t N, void *y, bool accumulate, bool row_exact, struct rt_err *err)
{
    return RT_OP(x->d, linear_fwd, err, .x = operand(x, p, slot, plain, quantised), .w = p->w[slot], .y = y, .n = n, .K = K, .N = N,
                 .accumulate = accumulate, .row_exact = row_exact);
}

/* The plain form of a normed operand, or NULL where every product of it takes the e4m3 one. */
static void *plain_form(const struct rt_layer_ctx *x, const struct rt_part *p, int slot, int other, void *plain)
{
    return x->w8a8 && p->fp8[slot] && p->fp8[other] ? NULL : plain;
}

/* Queries [n, nh, dn|dr] and [latent | k_pe], k_pe rotated, the latent normalised, of n tokens. */
static enum rt_status project(struct rt_layer_ctx *x, const struct rt_part *p, const int32_t *position, void *hidden, int64_t n, bool exact,
                              struct rt_err *err)
{
    const struct rt_teacher_config *c = x->c;
    const struct sizes s = sizes_of(c);
    const struct rt_act quant = x->w8a8 ? x->xq : none();
    enum rt_status st;
    RT_TRY(RT_OP(x->d, norm_fwd, err, .x = hidden, .w = p->w[RT_W_INPUT_NORM],
                 .y = plain_form(x, p, c->q_lora > 0 ? RT_W_Q_A : RT_W_Q_B, RT_W_KV_A, x->xn), .yq = quant, .n = n, .cols = s.H,
                 .eps = (float)c->eps, .pow2 = c->ue8m0));
    if (c->q_lora > 0) {
        RT_TRY(product(x, p, RT_W_Q_A, x->xn, x->xq, n, s.H, s.ql, x->qa, false, exact, err));
        RT_TRY(RT_OP(x->d, norm_fwd, err, .x = x->qa, .w = p->w[RT_W_Q_A_NORM], .y = plain_form(x, p, RT_W_Q_B, RT_W_Q_B, x->qan),
                     .yq = x->w8a8 ? x->qaq : none(), .n = n, .cols = s.ql, .eps = LATENT_EPS, .pow2 = c->ue8m0));
        RT_TRY(product(x, p, RT_W_Q_B, x->qan, x->qaq, n, s.ql, s.q, x->q, false, exact, err));
    } else {
        RT_TRY(product(x, p, RT_W_Q_B, x->xn, x->xq, n, s.H, s.q, x->q, false, exact, err));
    }
    RT_TRY(product(x, p, RT_W_KV_A, x->xn, x->xq, n, s.H, s.ckv, x->ckv, false, exact, err));
    RT_TRY(RT_OP(x->d, norm_fwd, err, .x = x->ckv, .ldx = s.ckv, .w = p->w[RT_W_KV_A_NORM], .y = x->latent,
                 .yq = x->w8a8 ? x->latq : none(), .n = n, .cols = s.R, .eps = LATENT_EPS, .pow2 = c->ue8m0));
    RT_TRY(RT_OP(x->d, rope, err, .x = at(x, x->ckv, s.R), .ld = s.ckv, .cos = x->rope_cos, .sin = x->rope_sin, .position = position,
                 .n = n, .heads = 1, .dim = c->dr, .interleaved = true));
out:
    return st;
}

/* A chunk of whole sequences, naive. */
static enum rt_status attention_packed(struct rt_layer_ctx *x, const struct rt_part *p, const struct rt_layer_batch *b, int64_t seq0,
                                       int64_t seq1, int32_t *cu, void *hidden, struct rt_err *err)
{
    const struct rt_teacher_config *c = x->c;
    const struct sizes s = sizes_of(c);
    const int64_t first = b->cu_seqlens[seq0], n = b->cu_seqlens[seq1] - first;
    void *h = at(x, hidden, first * s.H);
    enum rt_status st;
    for (int64_t i = seq0; i <= seq1; i++)
        cu[i - seq0] = b->cu_seqlens[i] - (int32_t)first;
    RT_TRY(project(x, p, b->position + first, h, n, false, err));
    RT_TRY(product(x, p, RT_W_KV_B, x->latent, x->latq, n, s.R, s.kv, x->kv, false, false, err));
    const struct rt_attn_shape shape = {.cu_seqlens = cu, .n = n, .n_seq = seq1 - seq0, .nh = c->heads, .nkv = c->heads, .dqk = (int)s.dq,
                                        .dv = c->dv, .scale = x->attn_scale};
    RT_TRY(RT_OP(x->d, attn_fwd, err, .s = shape, .q = x->q, .k = x->kv, .v = at(x, x->kv, c->dn), .q_ld = s.q, .q_head = s.dq, .k_ld = s.kv,
                 .k_head = c->dn + c->dv, .k_pe = at(x, x->ckv, s.R), .k_pe_ld = s.ckv, .dr = c->dr, .cos = x->rope_cos, .sin = x->rope_sin,
                 .position = b->position + first, .v_ld = s.kv, .v_head = c->dn + c->dv,
                 .o = x->o, .oq = x->w8a8 && p->fp8[RT_W_O] ? x->oq : none(), .pow2 = c->ue8m0));
    RT_TRY(product(x, p, RT_W_O, x->o, x->oq, n, s.o, s.H, h, true, false, err)); /* h += o_proj(o) */
out:
    return st;
}

/* New tokens of running sequences over the compressed cache: kv_b is absorbed into queries and outputs. */
static enum rt_status attention_cached(struct rt_layer_ctx *x, const struct rt_part *p, const struct rt_layer_batch *b, void *hidden,
                                       struct rt_err *err)
{
    const struct rt_teacher_config *c = x->c;
    const struct sizes s = sizes_of(c);
    enum rt_status st;
    RT_ASSERT(b->n <= x->chunk);
    RT_TRY(project(x, p, b->position, hidden, b->n, true, err));
    RT_TRY(RT_OP(x->d, rope, err, .x = at(x, x->q, c->dn), .ld = s.q, .head_ld = s.dq, .cos = x->rope_cos, .sin = x->rope_sin,
                 .position = b->position, .n = b->n, .heads = c->heads, .dim = c->dr, .interleaved = true));
    /* the cache row is [latent | k_pe]: the normalised latent goes back over the raw one */
    RT_TRY(RT_OP(x->d, norm_fwd, err, .x = x->ckv, .ldx = s.ckv, .w = p->w[RT_W_KV_A_NORM], .y = x->ckv, .ldy = s.ckv, .n = b->n,
                 .cols = s.R, .eps = LATENT_EPS, .pow2 = c->ue8m0));
    RT_TRY(RT_OP(x->d, cache_put, err, .x = x->ckv, .ldx = s.ckv, .cache = b->cache, .slot = b->slot, .pos = b->position, .n = b->n,
                 .capacity = b->capacity, .width = s.ckv));
    RT_TRY(RT_OP(x->d, head_matmul, err, .x = x->q, .x_ld = s.q, .x_head = s.dq, .w = p->w[RT_W_KV_B], .y = x->q_lat,
                 .y_ld = c->heads * s.R, .y_head = s.R, .n = b->n, .nh = c->heads, .head_rows = c->dn + c->dv, .row0 = 0, .d = c->dn,
                 .R = s.R));
    RT_TRY(RT_OP(x->d, mla_cached, err, .q_lat = x->q_lat, .q_pe = at(x, x->q, c->dn), .q_pe_ld = s.q, .q_pe_head = s.dq,
                 .cache = b->cache, .slot = b->slot, .pos = b->position, .o = x->o_lat, .n = b->n, .capacity = b->capacity,
                 .nh = c->heads, .R = (int)s.R, .dr = c->dr, .scale = x->attn_scale));
    RT_TRY(RT_OP(x->d, head_matmul, err, .x = x->o_lat, .x_ld = c->heads * s.R, .x_head = s.R, .w = p->w[RT_W_KV_B], .y = x->o,
                 .y_ld = s.o, .y_head = c->dv, .n = b->n, .nh = c->heads, .head_rows = c->dn + c->dv, .row0 = c->dn, .d = c->dv, .R = s.R,
                 .transpose = true));
    if (x->w8a8 && p->fp8[RT_W_O])
        RT_TRY(RT_OP(x->d, quant, err, .x = x->o, .q = x->oq, .n = b->n, .cols = s.o, .pow2 = c->ue8m0));
    RT_TRY(product(x, p, RT_W_O, x->o, x->oq, b->n, s.o, s.H, hidden, true, true, err)); /* hidden += o_proj(o) */
out:
    return st;
}

static enum rt_status attention(struct rt_layer_ctx *x, const struct rt_part *p, const struct rt_layer_batch *b, void *hidden,
                                struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int32_t *cu = NULL;
    if (b->cached)
        return attention_cached(x, p, b, hidden, err);
    RT_TRY(rt_alloc((size_t)b->n_seq + 1, sizeof *cu, "sequence ends", &cu, err));
    for (int64_t s0 = 0, s1; s0 < b->n_seq; s0 = s1) {
        for (s1 = s0 + 1; s1 < b->n_seq && b->cu_seqlens[s1 + 1] - b->cu_seqlens[s0] <= x->chunk; s1++)
            ;
        RT_ASSERT(b->cu_seqlens[s1] - b->cu_seqlens[s0] <= x->chunk);
        RT_TRY(attention_packed(x, p, b, s0, s1, cu, hidden, err));
    }
out:
    rt_free(cu);
    return st;
}

/* hidden += an MLP over all rows: the dense one, or the shared expert. */
static enum rt_status plain_mlp(struct rt_layer_ctx *x, const struct rt_part *p, int64_t inter, void *hidden, int64_t n, bool exact,
                                struct rt_err *err)
{
    const int32_t all[2] = {0, (int32_t)n};
    return RT_OP(x->d, moe_ffn, err, .x = operand(x, p, RT_W_GATE, x->fx, x->fxq), .offset = all,
                 .gate = (const struct rt_weight *const[]){p->w[RT_W_GATE]}, .up = (const struct rt_weight *const[]){p->w[RT_W_UP]},
                 .down = (const struct rt_weight *const[]){p->w[RT_W_DOWN]}, .y = hidden, .n = n, .n_experts = 1, .k = 1,
                 .H = x->c->hidden, .I = (int)inter, .row_exact = exact, .pow2 = x->c->ue8m0);
}

/* Experts that go together where they are streamed: a routing group, because a token's rows in it are then added to its state at once. */
static int together(const struct rt_teacher_config *c)
{
    return c->n_group > 1 && c->experts / c->n_group >= 16 ? c->experts / c->n_group : 32;
}

/* The routed experts, in ascending order, as many at a time as the ring holds. */
static enum rt_status routed(struct rt_layer_ctx *x, void *hidden, int64_t n, bool exact, struct rt_err *err)
{
    const struct rt_teacher_config *c = x->c;
    const uint64_t limit = rt_weights_group_limit(x->w);
    const int most = limit == UINT64_MAX ? c->experts : together(c);
    enum rt_status st = RT_OK;
    for (int e0 = 0, held = 0; e0 < c->experts; e0 += held) {
        uint64_t bytes = 0;
        for (held = 0; e0 + held < c->experts && held < most && (held == 0 || bytes + x->held[0]->bytes <= limit); held++) {
            const struct rt_part *p;
            RT_TRY(rt_weights_next(x->w, &p, err));
            x->held[held] = p;
            x->wg[held] = p->w[RT_W_GATE];
            x->wu[held] = p->w[RT_W_UP];
            x->wd[held] = p->w[RT_W_DOWN];
            bytes += p->bytes;
        }
        RT_TRY(RT_OP(x->d, moe_ffn, err, .x = operand(x, x->held[0], RT_W_GATE, x->fx, x->fxq), .perm = x->perm,
                     .weight = x->route_weight, .offset = x->offset + e0, .gate = x->wg, .up = x->wu, .down = x->wd, .y = hidden, .n = n,
                     .n_experts = held, .k = c->top_k, .H = c->hidden, .I = c->moe_inter, .row_exact = exact, .pow2 = c->ue8m0));
        for (int i = 0; i < held; i++)
            RT_TRY(rt_weights_release(x->w, x->held[i], err));
    }
out:
    return st;
}

static enum rt_status mixture(struct rt_layer_ctx *x, int layer, const struct rt_part *p, void *hidden, int64_t n, bool exact, struct rt_err *err)
{
    const struct rt_teacher_config *c = x->c;
    enum rt_status st;
    RT_TRY(RT_OP(x->d, route, err, .x = x->fx, .w = p->w[RT_W_ROUTER], .bias = p->w[RT_W_BIAS], .ids = x->route_ids,
                 .weight = x->route_weight, .n = n, .H = c->hidden, .E = c->experts, .k = c->top_k, .n_group = c->n_group,
                 .topk_group = c->topk_group, .sigmoid = c->sigmoid, .group_top2 = c->group_top2, .norm = c->norm_topk,
                 .scale = (float)c->routed_scale));
    RT_TRY(RT_OP(x->d, moe_sort, err, .ids = x->route_ids, .perm = x->perm, .offset = x->offset, .n = n, .k = c->top_k, .E = c->experts));
    for (int e = 0; x->load != NULL && layer < c->layers && e < c->experts; e++)
        x->load[(int64_t)layer * c->experts + e] += x->offset[e + 1] - x->offset[e];
    if (c->shared > 0)
        RT_TRY(plain_mlp(x, p, (int64_t)c->shared * c->moe_inter, hidden, n, exact, err));
out:
    return st;
}

enum rt_status rt_layer_forward(struct rt_layer_ctx *ctx, int layer, const struct rt_layer_batch *b, void *x, struct rt_err *err)
{
    const struct rt_teacher_config *c = ctx->c;
    const struct rt_part *p;
    enum rt_status st;
    RT_ASSERT(b->n <= ctx->window);
    RT_TRY(rt_weights_next(ctx->w, &p, err));
    RT_TRY(attention(ctx, p, b, x, err));
    RT_TRY(RT_OP(ctx->d, norm_fwd, err, .x = x, .w = p->w[RT_W_POST_NORM], .y = ctx->fx, .yq = ctx->w8a8 ? ctx->fxq : none(), .n = b->n,
                 .cols = c->hidden, .eps = (float)c->eps, .pow2 = c->ue8m0));
    RT_TRY(rt_weights_release(ctx->w, p, err));
    RT_TRY(rt_weights_next(ctx->w, &p, err));
    if (layer < c->dense_first)
        RT_TRY(plain_mlp(ctx, p, c->inter, x, b->n, b->cached, err));
    else
        RT_TRY(mixture(ctx, layer, p, x, b->n, b->cached, err));
    RT_TRY(rt_weights_release(ctx->w, p, err));
    if (layer >= c->dense_first)
        RT_TRY(routed(ctx, x, b->n, b->cached, err));
out:
    if (st != RT_OK)
        rt_err_context(err, "layer %d", layer);
    return st;
}
