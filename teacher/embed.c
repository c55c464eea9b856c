/* Embeddings of a teacher's tokens. Contract: rt_teacher_embed. */
#include <string.h>

#include "teacher/teacher.h"

/* Rows of a work item; rows that go up at once, where one block is filled while the other does; elsewhere one, of fewer rows. */
enum { GRAIN = 16, BLOCK = 2048, BLOCKS = 2, BLOCK_HOST = 256 };

struct rows_job {
    struct rt_teacher *t;
    int layer;
    const uint32_t *ids; /* NULL: rows first, first + 1, .. of the table */
    int64_t first, n;
    char *to;
    struct rt_err err[BLOCK / GRAIN];
};

static void rows_item(void *ctx, int64_t item, __attribute__((unused)) int worker)
{
    struct rows_job *j = ctx;
    const int64_t at = item * GRAIN, n = j->n - at < GRAIN ? j->n - at : GRAIN;
    const enum rt_dtype act = j->t->o.device->be->act;
    uint32_t table[GRAIN];
    for (int64_t i = 0; j->ids == NULL && i < n; i++)
        table[i] = (uint32_t)(j->first + at + i);
    (void)rt_weights_embed(j->t->w, j->layer, j->ids != NULL ? j->ids + at : table, n, act,
                           j->to + (size_t)(at * j->t->c.hidden) * rt_dtype_size(act), &j->err[item]);
}

static enum rt_status fill_block(struct rows_job *j, struct rt_err *err)
{
    const int64_t items = (j->n + GRAIN - 1) / GRAIN;
    memset(j->err, 0, sizeof j->err);
    if (j->t->pool != NULL)
        rt_pool_run(j->t->pool, items, rows_item, j);
    for (int64_t k = 0; k < items; k++) {
        if (j->t->pool == NULL)
            rows_item(j, k, 0);
        if (j->err[k].status != RT_OK)
            return rt_fail(err, j->err[k].status, "%s", j->err[k].msg);
    }
    return RT_OK;
}

/* Rows of ids [n], or the first n of the table, to x on the device: read by the host's threads while the block before goes up. */
static enum rt_status stage_rows(struct rt_teacher *t, int layer, const uint32_t *ids, int64_t n, void *x, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    const size_t row = (size_t)t->c.hidden * rt_device_act_size(d);
    const int blocks = d->be->own_memory ? BLOCKS : 1;
    const int64_t fit = d->be->own_memory ? BLOCK : BLOCK_HOST, most = n < fit ? n : fit;
    struct rows_job *j = NULL;
    struct rt_event *up[BLOCKS] = {NULL};
    char *block[BLOCKS] = {NULL};
    int b = 0;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *j, "embedding rows", &j, err));
    for (int i = 0; i < blocks; i++) {
        RT_TRY(d->be->host_alloc(d->dev, (size_t)most * row, (void **)&block[i], err));
        RT_TRY(d->be->event_create(d->dev, &up[i], err));
    }
    for (int64_t i = 0; i < n; i += most, b = (b + 1) % blocks) {
        j->t = t;
        j->layer = layer;
        j->ids = ids != NULL ? ids + i : NULL;
        j->first = i;
        j->n = n - i < most ? n - i : most;
        j->to = block[b];
        if (i >= blocks * most)
            RT_TRY(d->be->event_sync(d->dev, up[b], err));
        RT_TRY(fill_block(j, err));
        RT_TRY(rt_device_upload(d, (char *)x + (size_t)i * row, block[b], (size_t)j->n * row, err));
        RT_TRY(d->be->event_record(d->dev, d->q, up[b], err));
    }
out:
    if (rt_device_sync(d, st == RT_OK ? err : NULL) != RT_OK && st == RT_OK)
        st = RT_DEVICE;
    for (int i = 0; i < BLOCKS; i++) {
        if (up[i] != NULL)
            d->be->event_free(d->dev, up[i]);
        if (block[i] != NULL)
            d->be->host_free(d->dev, block[i]);
    }
    rt_free(j);
    return st;
}

static enum rt_status load_table(struct rt_teacher *t, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    enum rt_status st;
    RT_TRY(d->be->alloc(d->dev, (size_t)t->plan.gpu_embed, &t->embed_block, err));
    RT_TRY(stage_rows(t, -1, NULL, t->c.vocab_size, t->embed_block, err));
    RT_TRY(d->be->weight_param(d->dev, t->embed_block, t->c.vocab_size, t->c.hidden, &t->embed_table, err));
out:
    if (st != RT_OK)
        rt_teacher_embed_free(t);
    return st;
}

void rt_teacher_embed_free(struct rt_teacher *t)
{
    const struct rt_device *d = t->o.device;
    if (t->embed_table != NULL)
        d->be->weight_free(d->dev, t->embed_table);
    if (t->embed_block != NULL)
        d->be->free(d->dev, t->embed_block);
    t->embed_table = NULL;
    t->embed_block = NULL;
}

static enum rt_status from_table(struct rt_teacher *t, const uint32_t *ids, int64_t n, void *x, struct rt_err *err)
{
    const struct rt_device *d = t->o.device;
    const size_t row = (size_t)t->c.hidden * rt_device_act_size(d);
    int32_t *dev_ids = (int32_t *)(void *)((char *)t->embed_block + (size_t)t->c.vocab_size * row);
    enum rt_status st = RT_OK;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] >= t->c.vocab_size)
            RT_FAIL(err, FORMAT, "token id %u is outside the teacher's vocabulary of %ld", ids[i], (long)t->c.vocab_size);
    for (int64_t i = 0; i < n; i += RT_TEACHER_EMBED_IDS) {
        const int64_t m = n - i < RT_TEACHER_EMBED_IDS ? n - i : RT_TEACHER_EMBED_IDS;
        RT_TRY(rt_device_upload(d, dev_ids, ids + i, (size_t)m * sizeof *ids, err));
        RT_TRY(RT_OP(d, embed_fwd, err, .ids = dev_ids, .table = t->embed_table, .out = (char *)x + (size_t)i * row, .n = m, .cols = t->c.hidden));
    }
    RT_TRY(rt_device_sync(d, err)); /* the ids are the caller's */
out:
    return st;
}

enum rt_status rt_teacher_embed(struct rt_teacher *t, int layer, const uint32_t *ids, int64_t n, void *x, struct rt_err *err)
{
    enum rt_status st;
    if (layer >= 0 || t->plan.gpu_embed == 0)
        return stage_rows(t, layer, ids, n, x, err);
    if (t->embed_table == NULL)
        RT_TRY(load_table(t, err));
    RT_TRY(from_table(t, ids, n, x, err));
out:
    return st;
}
