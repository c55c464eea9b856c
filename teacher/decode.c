#include "teacher/decode.h"

#include "core/mem.h"

struct rt_teacher_decoder {
    struct rt_teacher *t;
    int32_t *slot, *pos, *row; /* [host] [batch_tokens] */
    uint32_t *ids;             /* [host] [batch_tokens] */
    float *logits;             /* [host] [rows_cap, vocab_size] */
    int64_t rows_cap;
    int32_t *row_index;        /* device [batch_tokens] */
    void *rows;                /* device [slots, H] act, states whose logits are wanted */
    float *scores;             /* device [slots, vocab_size] */
    void *block;
};

enum rt_status rt_teacher_decoder_create(struct rt_teacher *t, struct rt_teacher_decoder **out, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    struct rt_teacher_decoder *g = NULL;
    enum rt_status st;
    RT_ASSERT(t->o.slots > 0 && t->o.batch_tokens > 0);
    RT_TRY(rt_alloc(1, sizeof *g, "decoder", &g, err));
    g->t = t;
    g->rows_cap = t->o.slots < t->o.batch_tokens ? t->o.slots : t->o.batch_tokens;
    const size_t n = (size_t)t->o.batch_tokens, rows = (size_t)g->rows_cap, V = (size_t)t->c.vocab_size;
    const size_t state = (size_t)t->c.hidden * rt_device_act_size(d);
    RT_TRY(rt_alloc(n, sizeof *g->slot, "step", &g->slot, err));
    RT_TRY(rt_alloc(n, sizeof *g->pos, "step", &g->pos, err));
    RT_TRY(rt_alloc(n, sizeof *g->row, "step", &g->row, err));
    RT_TRY(rt_alloc(n, sizeof *g->ids, "step", &g->ids, err));
    RT_TRY(rt_alloc(rows * V, sizeof *g->logits, "logits", &g->logits, err));
    const size_t bytes = rt_arena_round(n * sizeof(int32_t)) + rt_arena_round(rows * state) + rt_arena_round(rows * V * sizeof(float));
    RT_TRY(d->be->alloc(d->dev, bytes, &g->block, err));
    struct rt_arena a;
    rt_arena_init(&a, g->block, bytes, "decoder");
    RT_TRY(rt_arena_alloc(&a, n * sizeof(int32_t), &g->row_index, err));
    RT_TRY(rt_arena_alloc(&a, rows * state, &g->rows, err));
    RT_TRY(rt_arena_alloc(&a, rows * V * sizeof(float), &g->scores, err));
    *out = g;
    g = NULL;
out:
    rt_teacher_decoder_free(g);
    return st;
}

void rt_teacher_decoder_free(struct rt_teacher_decoder *g)
{
    if (g == NULL)
        return;
    if (g->block != NULL)
        g->t->o.device->be->free(g->t->o.device->dev, g->block);
    rt_free(g->slot);
    rt_free(g->pos);
    rt_free(g->row);
    rt_free(g->ids);
    rt_free(g->logits);
    rt_free(g);
}

static enum rt_status upload_entries(struct rt_teacher_decoder *g, const struct rt_batch_entry *e, int n, int n_rows, struct rt_err *err)
{
    struct rt_teacher *t = g->t;
    const struct rt_device *d = t->o.device;
    enum rt_status st;
    int rows = 0;
    RT_ASSERT(n <= t->o.batch_tokens && n_rows <= g->rows_cap);
    for (int i = 0; i < n; i++) {
        g->slot[i] = e[i].slot;
        g->pos[i] = (int32_t)e[i].position;
        g->ids[i] = (uint32_t)e[i].token;
        if (e[i].row >= 0)
            g->row[rows++] = i;
    }
    RT_ASSERT(rows == n_rows);
    RT_TRY(rt_device_upload(d, t->slot, g->slot, (size_t)n * sizeof(int32_t), err));
    RT_TRY(rt_device_upload(d, t->position, g->pos, (size_t)n * sizeof(int32_t), err));
    RT_TRY(rt_device_upload(d, g->row_index, g->row, (size_t)rows * sizeof(int32_t), err));
    RT_TRY(rt_teacher_embed(t, -1, g->ids, n, t->hidden, err));
out:
    return st;
}

static void *layer_cache(const struct rt_teacher *t, int layer)
{
    const size_t width = (size_t)(t->c.kv_lora + t->c.dr) * rt_device_act_size(t->o.device);
    return (char *)t->cache + (size_t)layer * (size_t)t->o.slots * (size_t)t->o.max_length * width;
}

static enum rt_status step(void *self, const struct rt_batch_entry *entries, int n, int n_rows, const float **logits, int64_t *stride,
                           struct rt_err *err)
{
    struct rt_teacher_decoder *g = self;
    struct rt_teacher *t = g->t;
    const struct rt_device *d = t->o.device;
    const int64_t V = t->c.vocab_size;
    struct rt_layer_batch b = {.n = n, .position = t->position, .cached = true, .slot = t->slot, .capacity = t->o.max_length};
    const struct rt_part *p;
    enum rt_status st;
    RT_TRY(upload_entries(g, entries, n, n_rows, err));
    RT_TRY(rt_weights_begin(t->w, t->pass, t->n_pass, err));
    for (int l = 0; l < t->c.layers; l++) {
        b.cache = layer_cache(t, l);
        RT_TRY(rt_layer_forward(&t->ctx, l, &b, t->hidden, err));
    }
    RT_TRY(rt_weights_next(t->w, &p, err));
    if (n_rows > 0) {
        RT_TRY(RT_OP(d, gather, err, .x = t->hidden, .index = g->row_index, .out = g->rows, .n = n_rows, .cols = t->c.hidden));
        RT_TRY(RT_OP(d, norm_fwd, err, .x = g->rows, .w = p->w[RT_W_NORM], .y = g->rows, .n = n_rows, .cols = t->c.hidden,
                     .eps = (float)t->c.eps));
        RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = g->rows}, .w = p->w[RT_W_HEAD], .y = g->scores, .n = n_rows, .K = t->c.hidden,
                     .N = V, .y_f32 = true, .row_exact = true));
        RT_TRY(rt_device_download(d, g->logits, g->scores, (size_t)(n_rows * V) * sizeof(float), err));
    }
    RT_TRY(rt_weights_release(t->w, p, err));
    *logits = g->logits;
    *stride = V;
out:
    rt_weights_end(t->w);
    return st;
}

static enum rt_status copy_slot(void *self, int src, int dst, int64_t n_tokens, struct rt_err *err)
{
    struct rt_teacher_decoder *g = self;
    struct rt_teacher *t = g->t;
    enum rt_status st = RT_OK;
    for (int l = 0; l < t->c.layers; l++)
        RT_TRY(RT_OP(t->o.device, cache_copy, err, .cache = layer_cache(t, l), .capacity = t->o.max_length,
                     .width = t->c.kv_lora + t->c.dr, .n = n_tokens, .src = src, .dst = dst));
out:
    return st;
}

struct rt_batch_step rt_teacher_decoder_step(struct rt_teacher_decoder *g)
{
    return (struct rt_batch_step){.ctx = g, .step = step, .copy_slot = copy_slot};
}
