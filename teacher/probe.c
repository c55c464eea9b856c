/* Pieces of the teacher run alone: logits of given states, one layer, the MTP layer. Used by generation's drafts and by checks. */
#include "teacher/score.h"

#include <string.h>

enum rt_status rt_teacher_logits(struct rt_teacher *t, int mtp_layer, const void *x, int64_t n, float *out, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    const struct rt_part_id id = {.kind = mtp_layer >= 0 ? RT_PART_MTP : RT_PART_HEAD, .layer = mtp_layer >= 0 ? t->c.layers + mtp_layer : 0};
    const size_t bytes = (size_t)n * (size_t)t->c.vocab_size * sizeof(float);
    const struct rt_part *p;
    void *y = NULL;
    enum rt_status st;
    RT_TRY(d->be->alloc(d->dev, bytes, &y, err));
    RT_TRY(rt_weights_begin(t->w, &id, 1, err));
    RT_TRY(rt_weights_next(t->w, &p, err));
    RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = (void *)(uintptr_t)x}, .w = p->w[mtp_layer >= 0 ? RT_W_MTP_HEAD : RT_W_HEAD], .y = y, .n = n,
                 .K = t->c.hidden, .N = t->c.vocab_size, .y_f32 = true));
    RT_TRY(rt_device_download(d, out, y, bytes, err));
    RT_TRY(rt_weights_release(t->w, p, err));
out:
    rt_weights_end(t->w);
    if (y != NULL)
        d->be->free(d->dev, y);
    return st;
}

/* Positions 0 .. n-1 in t->position. */
static enum rt_status count_positions(struct rt_teacher *t, int64_t n, struct rt_err *err)
{
    int32_t *pos = NULL;
    enum rt_status st;
    RT_ASSERT(n <= t->plan.window && n <= t->plan.chunk);
    RT_TRY(rt_alloc((size_t)n, sizeof *pos, "positions", &pos, err));
    for (int64_t i = 0; i < n; i++)
        pos[i] = (int32_t)i;
    RT_TRY(rt_device_upload(t->o.device, t->position, pos, (size_t)n * sizeof *pos, err));
    RT_TRY(rt_device_sync(t->o.device, err));
out:
    rt_free(pos);
    return st;
}

enum rt_status rt_teacher_run_layer(struct rt_teacher *t, int layer, void *x, int64_t n, struct rt_err *err)
{
    const int32_t cu[2] = {0, (int32_t)n};
    const struct rt_layer_batch b = {.n = n, .position = t->position, .cu_seqlens = cu, .n_seq = 1};
    struct rt_part_id *parts = NULL;
    enum rt_status st;
    RT_TRY(count_positions(t, n, err));
    const int64_t n_parts = rt_weights_layer_parts(&t->c, layer, NULL);
    RT_TRY(rt_alloc((size_t)n_parts, sizeof *parts, "pass", &parts, err));
    rt_weights_layer_parts(&t->c, layer, parts);
    RT_TRY(rt_weights_begin(t->w, parts, n_parts, err));
    RT_TRY(rt_layer_forward(&t->ctx, layer, &b, x, err));
out:
    rt_weights_end(t->w);
    rt_free(parts);
    return st;
}

/* y [n, H] = eh_proj([enorm(embedding) | hnorm(final)]). */
static enum rt_status mtp_input(struct rt_teacher *t, const uint32_t *ids, const void *final, int64_t n, void *y, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    const int64_t H = t->c.hidden;
    const size_t act = rt_device_act_size(d);
    const struct rt_part_id id = {.kind = RT_PART_MTP, .layer = t->c.layers};
    const struct rt_part *p;
    char *both = NULL;
    enum rt_status st;
    RT_TRY(d->be->alloc(d->dev, (size_t)(2 * n * H) * act, (void **)&both, err));
    RT_TRY(rt_teacher_embed(t, t->c.layers, ids + 1, n, y, err));
    RT_TRY(rt_weights_begin(t->w, &id, 1, err));
    RT_TRY(rt_weights_next(t->w, &p, err));
    RT_TRY(RT_OP(d, norm_fwd, err, .x = y, .w = p->w[RT_W_ENORM], .y = both, .ldy = 2 * H, .n = n, .cols = H, .eps = (float)t->c.eps));
    RT_TRY(RT_OP(d, norm_fwd, err, .x = final, .w = p->w[RT_W_HNORM], .y = both + (size_t)H * act, .ldy = 2 * H, .n = n, .cols = H,
                 .eps = (float)t->c.eps));
    RT_TRY(RT_OP(d, linear_fwd, err, .x = {.data = both}, .w = p->w[RT_W_EH_PROJ], .y = y, .n = n, .K = 2 * H, .N = H));
    RT_TRY(rt_weights_release(t->w, p, err));
out:
    rt_weights_end(t->w);
    if (both != NULL)
        d->be->free(d->dev, both);
    return st;
}

enum rt_status rt_teacher_mtp_logits(struct rt_teacher *t, const uint32_t *ids, const void *final, int64_t n, float *out, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    const struct rt_part_id id = {.kind = RT_PART_MTP, .layer = t->c.layers};
    const struct rt_part *p;
    void *x = NULL;
    enum rt_status st;
    if (t->c.mtp_layers < 1 || !t->o.mtp)
        return rt_fail(err, RT_UNSUPPORTED, "%s: no MTP layer was opened", t->o.dir);
    const int64_t rows = n - 1;
    RT_TRY(d->be->alloc(d->dev, (size_t)(rows * t->c.hidden) * rt_device_act_size(d), &x, err));
    RT_TRY(mtp_input(t, ids, final, rows, x, err));
    RT_TRY(rt_teacher_run_layer(t, t->c.layers, x, rows, err));
    RT_TRY(rt_weights_begin(t->w, &id, 1, err));
    RT_TRY(rt_weights_next(t->w, &p, err));
    RT_TRY(RT_OP(d, norm_fwd, err, .x = x, .w = p->w[RT_W_MTP_NORM], .y = x, .n = rows, .cols = t->c.hidden, .eps = (float)t->c.eps));
    RT_TRY(rt_weights_release(t->w, p, err));
    rt_weights_end(t->w);
    RT_TRY(rt_teacher_logits(t, 0, x, rows, out, err));
out:
    rt_weights_end(t->w);
    if (x != NULL)
        d->be->free(d->dev, x);
    return st;
}
