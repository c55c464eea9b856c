#include <math.h>

#include "student/internal.h"

static void *grad_at(const struct rt_student *s, int64_t offset)
{
    return offset < 0 ? NULL : rt_student_at(s, s->grads, offset);
}

/* dx += each extra gradient at hidden state l. */
static enum rt_status add_extra(struct rt_student *s, int l, const struct rt_student_extra *extra, int n_extra, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int i = 0; i < n_extra; i++)
        if (extra[i].layer == l)
            RT_TRY(RT_OP(s->d, axpy, err, .x = extra[i].grad, .y = s->a.dx, .n = s->a.batch.n * s->c->hidden, .a = 1));
out:
    return st;
}

/* What layer i did not keep of its own: the way from its input to mid, and gate and up from there; leaves the normed mid of which those are in the scratch.
 * (A normed state alone is made again with the norm's gradient, which has its input at hand.) */
static enum rt_status compute_again(struct rt_student *s, int i, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student_layer *l = &s->layer[i];
    const struct rt_student_acts *a = &s->a;
    const struct rt_student_saved *v = &a->saved[i];
    const int64_t n = a->batch.n, H = s->c->hidden;
    const float eps = (float)s->c->eps;
    const enum rt_student_keep keep = rt_student_layer_keep(&a->kept, i);
    if (keep == RT_KEEP_LAYERS) {
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = a->hidden[i], .w = l->norm1, .y = a->normed, .rstd = v->rstd1, .n = n, .cols = H, .eps = eps));
        RT_TRY(rt_student_attention(s, i, err));
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = v->mid, .w = l->norm2, .y = a->normed, .rstd = v->rstd2, .n = n, .cols = H, .eps = eps));
    } else if (keep == RT_KEEP_ATTENTION) {
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = v->mid, .w = l->norm2, .y = a->normed, .n = n, .cols = H, .eps = eps));
    }
    if (keep <= RT_KEEP_ATTENTION)
        RT_TRY(rt_student_gate_up(s, i, NULL, true, err));
out:
    return st;
}

/* dx (gradient at the layer's output, and at mid through the residual) += the path through the MLP. */
static enum rt_status mlp_backward(struct rt_student *s, int i, bool first, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student_layer *l = &s->layer[i];
    const struct rt_param_layer *p = &s->p->layer[i];
    const struct rt_student_acts *a = &s->a;
    const struct rt_student_saved *v = &a->saved[i];
    const int64_t n = a->batch.n, H = s->c->hidden, I = s->c->intermediate;
    const float eps = (float)s->c->eps;
    void *again = rt_student_layer_keep(&a->kept, i) == RT_KEEP_ALL ? a->normed : NULL;
    RT_TRY(RT_OP(s->d, gated_bwd, err, .dy = a->dx, .w = l->down, .gate_up = v->gate_up, .dh = a->h, .d_gate_up = v->gate_up,
                 .h = v->h == NULL ? a->h : NULL, .n = n, .N = H, .I = I));
    RT_TRY(RT_OP(s->d, linear_wgrad, err, .dy = a->dx, .x = rt_student_own(v->h, a->h), .dw = grad_at(s, p->down), .db = grad_at(s, p->down_bias), .n = n,
                 .K = I, .N = H, .first = first));
    RT_TRY(RT_OP(s->d, linear_dgrad, err, .dy = v->gate_up, .w = l->gate_up, .dx = a->d_normed, .n = n, .K = H, .N = 2 * I));
    RT_TRY(RT_OP(s->d, norm_bwd, err, .dy = a->d_normed, .x = v->mid, .w = l->norm2, .rstd = v->rstd2, .dx = a->dx,
                 .dw = grad_at(s, p->norm2), .y = again, .n = n, .cols = H, .eps = eps, .accumulate = true, .first = first));
    RT_TRY(RT_OP(s->d, linear_wgrad, err, .dy = v->gate_up, .x = rt_student_own(v->normed2, a->normed), .dw = grad_at(s, p->gate_up),
                 .db = grad_at(s, p->gate_up_bias), .n = n, .K = H, .N = 2 * I, .first = first));
out:
    return st;
}

/* d_qkv = gradient at the projection's output from d_o; that of its bias where heads are not normed. */
static enum rt_status qkv_backward(struct rt_student *s, int i, bool first, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student_config *c = s->c;
    const struct rt_student_layer *l = &s->layer[i];
    const struct rt_param_layer *p = &s->p->layer[i];
    const struct rt_student_acts *a = &s->a;
    const struct rt_student_saved *v = &a->saved[i];
    const int64_t n = a->batch.n, q = rt_student_q_dim(c), kv = rt_student_kv_dim(c), ld = q + 2 * kv, hd = c->head_dim;
    const bool apart = v->qk != NULL;
    const int64_t ld_qk = apart ? q + kv : ld;
    const void *qk = apart ? v->qk : v->qkv;
    void *d_qk = apart ? a->d_qk : a->d_qkv;
    const float eps = (float)c->eps;
    RT_TRY(RT_OP(s->d, attn_bwd, err,
                 .s = {.cu_seqlens = a->batch.cu_seqlens, .n = n, .n_seq = a->batch.n_seq, .nh = c->heads, .nkv = c->kv_heads,
                       .dqk = c->head_dim, .dv = c->head_dim, .scale = (float)(1 / sqrt(c->head_dim))},
                 .q = qk, .q_ld = ld_qk, .q_head = hd, .k = rt_student_at(s, qk, q), .k_ld = ld_qk, .k_head = hd,
                 .v = rt_student_at(s, v->qkv, q + kv), .v_ld = ld, .v_head = hd, .o = v->o, .dout = a->d_o, .lse = v->lse, .dq = d_qk,
                 .dk = rt_student_at(s, d_qk, q), .dv = rt_student_at(s, a->d_qkv, q + kv), .delta = a->delta));
    if (!rt_student_normed_heads(l)) /* as in rt_student_rotate */
        return RT_OP(s->d, headnorm_rope_bwd, err, .dy = d_qk, .lddy = ld_qk, .x = v->qkv, .ldx = ld, .dx = a->d_qkv, .lddx = ld,
                     .db = grad_at(s, p->qkv_bias), .n_db = ld, .cos = s->cos, .sin = s->sin, .position = a->pos, .n = n,
                     .heads = c->heads + c->kv_heads, .d = hd, .eps = eps, .first = first);
    RT_TRY(RT_OP(s->d, headnorm_rope_bwd, err, .dy = d_qk, .lddy = ld_qk, .x = v->qkv, .ldx = ld, .w = l->q_norm, .rstd = v->rstd_q,
                 .dx = a->d_qkv, .lddx = ld, .dw = grad_at(s, p->q_norm), .cos = s->cos, .sin = s->sin, .position = a->pos, .n = n,
                 .heads = c->heads, .d = c->head_dim, .eps = eps, .first = first));
    RT_TRY(RT_OP(s->d, headnorm_rope_bwd, err, .dy = rt_student_at(s, d_qk, q), .lddy = ld_qk, .x = rt_student_at(s, v->qkv, q),
                 .ldx = ld, .w = l->k_norm, .rstd = v->rstd_k, .dx = rt_student_at(s, a->d_qkv, q), .lddx = ld,
                 .dw = grad_at(s, p->k_norm), .cos = s->cos, .sin = s->sin, .position = a->pos, .n = n, .heads = c->kv_heads,
                 .d = c->head_dim, .eps = eps, .first = first));
out:
    return st;
}

/* dx (gradient at mid, and at the layer's input through the residual) += the path through attention. */
static enum rt_status attention_backward(struct rt_student *s, int i, bool first, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student_config *c = s->c;
    const struct rt_student_layer *l = &s->layer[i];
    const struct rt_param_layer *p = &s->p->layer[i];
    const struct rt_student_acts *a = &s->a;
    const struct rt_student_saved *v = &a->saved[i];
    const int64_t n = a->batch.n, H = c->hidden, q = rt_student_q_dim(c), qkv = rt_student_qkv_dim(c);
    const float eps = (float)c->eps;
    RT_TRY(RT_OP(s->d, linear_dgrad, err, .dy = a->dx, .w = l->o, .dx = a->d_o, .n = n, .K = q, .N = H));
    RT_TRY(RT_OP(s->d, linear_wgrad, err, .dy = a->dx, .x = v->o, .dw = grad_at(s, p->o), .db = grad_at(s, p->o_bias), .n = n, .K = q,
                 .N = H, .first = first));
    RT_TRY(qkv_backward(s, i, first, err));
    RT_TRY(RT_OP(s->d, linear_dgrad, err, .dy = a->d_qkv, .w = l->qkv, .dx = a->d_normed, .n = n, .K = H, .N = qkv));
    RT_TRY(RT_OP(s->d, norm_bwd, err, .dy = a->d_normed, .x = a->hidden[i], .w = l->norm1, .rstd = v->rstd1, .dx = a->dx,
                 .dw = grad_at(s, p->norm1), .y = v->normed1 == NULL ? a->normed : NULL, .n = n, .cols = H, .eps = eps, .accumulate = true, .first = first));
    RT_TRY(RT_OP(s->d, linear_wgrad, err, .dy = a->d_qkv, .x = rt_student_own(v->normed1, a->normed), .dw = grad_at(s, p->qkv),
                 .db = rt_student_normed_heads(l) ? grad_at(s, p->qkv_bias) : NULL, .n = n, .K = H, .N = qkv, .first = first));
out:
    return st;
}

void rt_student_watch_grads(struct rt_student *s, rt_student_grads_fn fn, void *self)
{
    s->watch = fn;
    s->watcher = self;
}

static enum rt_status tell(const struct rt_student *s, int64_t from, struct rt_err *err)
{
    return s->watch != NULL ? s->watch(s->watcher, from, err) : RT_OK;
}

enum rt_status rt_student_backward(struct rt_student *s, const void *d_final, const struct rt_student_extra *extra, int n_extra, bool first,
                                   struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_acts *a = &s->a;
    const int64_t n = a->batch.n, H = s->c->hidden;
    const int last = s->c->layers;
    if (!a->done || s->grads == NULL)
        RT_FAIL(err, USAGE, "backward without %s", s->grads == NULL ? "a block of gradients" : "a forward that kept its states");
    for (int i = 0; i < n_extra; i++)
        if (extra[i].layer < 0 || extra[i].layer > last)
            RT_FAIL(err, USAGE, "a gradient at hidden state %d, expected 0 to %d", extra[i].layer, last);
    a->done = false;
    if (d_final == NULL)
        RT_TRY(rt_device_zero(s->d, a->dx, (size_t)(n * H) * rt_device_act_size(s->d), err));
    else
        RT_TRY(RT_OP(s->d, norm_bwd, err, .dy = d_final, .x = a->hidden[last], .w = s->final_norm, .rstd = a->rstd_final, .dx = a->dx,
                     .dw = grad_at(s, s->p->final_norm), .n = n, .cols = H, .eps = (float)s->c->eps));
    RT_TRY(tell(s, s->p->final_norm, err));
    for (int i = last - 1; i >= 0; i--) {
        RT_TRY(add_extra(s, i + 1, extra, n_extra, err));
        RT_TRY(compute_again(s, i, err));
        RT_TRY(mlp_backward(s, i, first, err));
        RT_TRY(attention_backward(s, i, first, err));
        RT_TRY(tell(s, s->p->layer[i].norm1, err));
    }
    RT_TRY(add_extra(s, 0, extra, n_extra, err));
    RT_TRY(RT_OP(s->d, embed_bwd, err, .ids = a->ids, .dy = a->dx, .dtable = grad_at(s, s->p->embed), .n = n, .cols = H,
                 .rows = s->c->vocab_size));
    RT_TRY(tell(s, 0, err));
out:
    return st;
}
