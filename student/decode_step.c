/* A step of generation on the device. */
#include <math.h>
#include <string.h>

#include "student/decode_internal.h"

int rt_decode_round(int n)
{
    const int unit = n <= 16 ? 4 : n <= 64 ? 8 : n <= 256 ? 16 : 64;
    return (n + unit - 1) / unit * unit;
}

/* branch = attention over the caches after normed. */
static enum rt_status attention(struct rt_student_decoder *d, int i, int64_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = d->s;
    const struct rt_student_config *c = s->c;
    const struct rt_student_layer *l = &s->layer[i];
    const struct rt_decode_memory *m = &d->m;
    const int64_t q = rt_student_q_dim(c);
    const struct rt_cache_pages pages = {m->table, d->pages.len};
    RT_TRY(RT_OP(s->d, linear_rope_put, err, .x = m->normed, .w = l->qkv, .bias = l->qkv_bias, .tmp = m->qkv, .K = c->hidden,
                 .put = {.q_norm = l->q_norm, .k_norm = l->k_norm, .q = m->q, .k_cache = m->k[i], .v_cache = m->v[i], .cos = s->cos, .sin = s->sin,
                         .slot = m->in.slot, .pos = m->in.pos, .pages = pages, .n = n, .capacity = d->capacity, .nh = c->heads, .nkv = c->kv_heads,
                         .d = c->head_dim, .eps = (float)c->eps}));
    RT_TRY(RT_OP(s->d, attn_cached, err, .q = m->q, .k_cache = m->k[i], .v_cache = m->v[i], .slot = m->in.slot, .pos = m->in.pos, .pages = pages,
                 .o = m->o, .n = n, .capacity = d->capacity, .nh = c->heads, .nkv = c->kv_heads, .d = c->head_dim,
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
    const struct rt_decode_memory *m = &d->m;
    const int64_t H = s->c->hidden, I = s->c->intermediate;
    RT_TRY(RT_OP(s->d, gated_fwd, err, .x = m->normed, .w = l->gate_up, .bias = l->gate_up_bias, .gate_up = m->gate_up, .h = m->h, .n = n, .K = H, .I = I,
                 .row_exact = true));
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = m->h}, .w = l->down, .bias = l->down_bias, .y = m->branch, .n = n, .K = I, .N = H,
                 .row_exact = true));
out:
    return st;
}

enum rt_status rt_decode_enqueue(struct rt_student_decoder *d, int n, int n_rows, const struct rt_batch_law *law, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_student *s = d->s;
    const struct rt_decode_memory *m = &d->m;
    const int64_t H = s->c->hidden, V = s->c->vocab_size;
    const float eps = (float)s->c->eps;
    RT_TRY(RT_OP(s->d, embed_fwd, err, .ids = m->in.ids, .table = s->embed, .out = m->x, .n = n, .cols = H, .drawn = m->drawn));
    for (int i = 0; i < s->c->layers; i++) {
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = m->x, .add = i == 0 ? NULL : m->branch, .w = s->layer[i].norm1,
                     .sum = i == 0 ? NULL : m->x, .y = m->normed, .n = n, .cols = H, .eps = eps));
        RT_TRY(attention(d, i, n, err));
        RT_TRY(RT_OP(s->d, norm_fwd, err, .x = m->x, .add = m->branch, .w = s->layer[i].norm2, .sum = m->x, .y = m->normed, .n = n,
                     .cols = H, .eps = eps));
        RT_TRY(mlp(d, i, n, err));
    }
    if (n_rows == 0)
        goto out;
    RT_TRY(RT_OP(s->d, norm_fwd, err, .x = m->x, .add = m->branch, .w = s->final_norm, .y = m->normed, .n = n, .cols = H, .eps = eps));
    RT_TRY(RT_OP(s->d, gather, err, .x = m->normed, .index = m->in.rows, .out = m->picked, .n = n_rows, .cols = H));
    RT_TRY(RT_OP(s->d, linear_fwd, err, .x = {.data = m->picked}, .w = s->head, .y = m->logits, .n = n_rows, .K = H, .N = V,
                 .y_f32 = true, .row_exact = true));
    if (law != NULL)
        RT_TRY(RT_OP(s->d, sample, err, .z = m->logits, .ld = V, .n = n_rows, .n_ids = law->n_ids, .params = law->sample, .seed = law->seed,
                     .stream = m->in.stream, .position = m->in.position, .id = m->drawn, .logprob = m->logprob));
out:
    return st;
}

/* ---- recorded steps ---- */

void rt_decode_forget_graphs(struct rt_student_decoder *d)
{
    const struct rt_device *dev = d->s->d;
    for (int i = 0; i < RT_DECODE_GRAPHS; i++) {
        if (d->graph[i].graph != NULL)
            dev->be->graph_free(dev->dev, d->graph[i].graph);
        d->graph[i] = (struct rt_decode_graph){0};
    }
}

static bool same_law(const struct rt_batch_law *a, const struct rt_batch_law *b)
{
    return a->seed == b->seed && a->n_ids == b->n_ids && a->sample.temperature == b->sample.temperature && a->sample.top_k == b->sample.top_k &&
           a->sample.top_p == b->sample.top_p;
}

/* Of steps of n entries; NULL: there are too many sizes already. */
static struct rt_decode_graph *graph_of(struct rt_student_decoder *d, int n)
{
    for (int i = 0; i < RT_DECODE_GRAPHS; i++) {
        if (d->graph[i].n == 0)
            d->graph[i].n = n;
        if (d->graph[i].n == n)
            return &d->graph[i];
    }
    return NULL;
}

static enum rt_status record(struct rt_student_decoder *d, int n, const struct rt_batch_law *law, struct rt_graph **out, struct rt_err *err)
{
    const struct rt_device *dev = d->s->d;
    enum rt_status st;
    RT_TRY(dev->be->graph_begin(dev->dev, dev->q, err));
    st = rt_decode_enqueue(d, n, n, law, err);
    const enum rt_status end = dev->be->graph_end(dev->dev, dev->q, out, err);
    if (st == RT_OK)
        st = end;
    if (st != RT_OK) {
        dev->be->graph_free(dev->dev, *out);
        *out = NULL;
    }
out:
    return st;
}

enum rt_status rt_decode_enqueue_recorded(struct rt_student_decoder *d, int n, const struct rt_batch_law *law, struct rt_err *err)
{
    const struct rt_device *dev = d->s->d;
    enum rt_status st = RT_OK;
    if (!same_law(law, &d->law)) {
        RT_TRY(rt_device_sync(dev, err));
        rt_decode_forget_graphs(d);
        d->law = *law;
    }
    struct rt_decode_graph *g = graph_of(d, n);
    if (g == NULL || !g->met) {
        RT_TRY(rt_decode_enqueue(d, n, n, law, err));
        if (g != NULL)
            g->met = true;
        goto out;
    }
    if (g->graph == NULL)
        RT_TRY(record(d, n, law, &g->graph, err));
    RT_TRY(dev->be->graph_run(dev->dev, dev->q, g->graph, err));
out:
    return st;
}
