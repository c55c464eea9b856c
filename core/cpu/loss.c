/* Losses of the head over tiles of rows: z = x w^T by panels of ids, each row on its own (loss_row.c, likelihood_row.c), dx and dw from dz.
 *
 * dx is summed over DX_PARTS runs of ids, then over the runs in ascending order; dw adds the tiles in ascending order. The cuts
 * depend on n, V and H alone.
 */
#include "core/cpu/loss.h"

#include "core/cpu/simd.h"

enum {
    DX_PARTS = 8,
    ROWS_MIN = 16,
    ROWS_MAX = 512,
    PANEL_IDS = 1024,
};

struct job {
    const struct rt_cpu_head_tiles *a;
    struct rt_dev *dev;
    float *z, *part;         /* [rows, ld], [parts, rows, H] */
    int64_t ld, row0, rows;  /* the tile */
    int64_t panel, panels;   /* ids of a panel; how many */
    int64_t parts, dx_items; /* runs of panels that dx is summed over */
};

static int64_t panel_size(const struct job *j, int64_t p)
{
    return rt_min64(j->panel, j->a->V - p * j->panel);
}

static const float *panel_of(const struct job *j, int64_t p, int worker, int64_t *ld)
{
    return rt_cpu_weight_panel(j->a->w, p * j->panel, panel_size(j, p), 0, j->a->H, rt_cpu_panel(j->dev, worker), ld);
}

static void logits_item(void *ctx, int64_t p, int worker)
{
    const struct job *j = ctx;
    int64_t ld;
    const float *w = panel_of(j, p, worker, &ld);
    rt_cpu_gemm_nt(j->rows, panel_size(j, p), j->a->H, 1, (const float *)j->a->x + j->row0 * j->a->H, j->a->H, w, ld, 0,
                   j->z + p * j->panel, j->ld);
}

static void row_item(void *ctx, int64_t row, int worker)
{
    const struct job *j = ctx;
    const bool gradient = j->a->dx != NULL || j->a->dw != NULL;
    j->a->row(j->a->args, j->row0 + row, j->z + row * j->ld, gradient, (double *)rt_cpu_tile(j->dev, worker));
}

/* The first dx_items items are runs of dx, the others panels of dw. */
static void gradient_item(void *ctx, int64_t item, int worker)
{
    const struct job *j = ctx;
    const int64_t H = j->a->H;
    if (item >= j->dx_items) {
        const int64_t p = item - j->dx_items;
        rt_cpu_gemm_tn(panel_size(j, p), H, j->rows, 1, j->z + p * j->panel, j->ld, (const float *)j->a->x + j->row0 * H, H, 1,
                       (float *)j->a->dw + p * j->panel * H, H);
        return;
    }
    float *out = j->part + item * j->rows * H;
    const int64_t first = item * j->panels / j->parts, end = (item + 1) * j->panels / j->parts;
    for (int64_t p = first; p < end; p++) {
        int64_t ld;
        const float *w = panel_of(j, p, worker, &ld);
        rt_cpu_gemm_nn(j->rows, H, panel_size(j, p), 1, j->z + p * j->panel, j->ld, w, ld, p > first, out, H);
    }
}

RT_SIMD static void sum_parts(float *out, const float *part, int64_t n, int64_t stride, int64_t parts)
{
    for (int64_t i = 0; i < n; i++) {
        float s = part[i];
        for (int64_t p = 1; p < parts; p++)
            s += part[p * stride + i];
        out[i] = s;
    }
}

static void dx_rows(void *ctx, int64_t row0, int64_t row1, int worker)
{
    const struct job *j = ctx;
    const int64_t H = j->a->H;
    (void)worker;
    sum_parts((float *)j->a->dx + (j->row0 + row0) * H, j->part + row0 * H, (row1 - row0) * H, j->rows * H, j->parts);
}

static enum rt_status check(const struct rt_head_loss_args *a, struct rt_err *err)
{
    if (!(a->T > 0))
        return rt_fail(err, RT_SHAPE, "head_loss: temperature %g, expected above 0", a->T);
    if (a->k < 0 || a->k > RT_CPU_LOSS_IDS)
        return rt_fail(err, RT_SHAPE, "head_loss: %d ids a row, expected 0 .. %d", a->k, RT_CPU_LOSS_IDS);
    for (int64_t i = 0; i < a->n; i++) {
        if (a->label[i] >= a->V)
            return rt_fail(err, RT_SHAPE, "head_loss: label %d at row %lld, expected below %lld", (int)a->label[i], (long long)i,
                           (long long)a->V);
        for (int j = 0; j < a->k && a->kl_mask != NULL && a->kl_mask[i] != 0; j++)
            if (rt_head_loss_id(a, i, j) >= a->V)
                return rt_fail(err, RT_SHAPE, "head_loss: teacher id %d at row %lld, expected below %lld", (int)rt_head_loss_id(a, i, j),
                               (long long)i, (long long)a->V);
    }
    return rt_cpu_weight_is(a->w, a->V, a->H, "head_loss", "w", err);
}

static enum rt_status run_tiles(struct rt_dev *dev, const struct rt_cpu_head_tiles *a, struct rt_err *err)
{
    struct job j = {.a = a, .dev = dev, .ld = rt_ceil_div(a->V, 16) * 16};
    if (a->n == 0)
        return RT_OK;
    j.panel = rt_max64(16, rt_min64(PANEL_IDS, RT_CPU_PANEL / a->H));
    j.panels = rt_ceil_div(a->V, j.panel);
    j.parts = rt_min64(DX_PARTS, j.panels);
    const int64_t part = a->dx != NULL ? j.parts * a->H : 0;
    int64_t tile = (int64_t)(RT_CPU_SHARED_MAX / sizeof(float)) / (j.ld + part) / ROWS_MIN * ROWS_MIN;
    tile = rt_min64(rt_max64(rt_min64(tile, ROWS_MAX), ROWS_MIN), a->n);
    const enum rt_status st = rt_cpu_shared(dev, (size_t)tile * (size_t)(j.ld + part) * sizeof(float), &j.z, err);
    if (st != RT_OK)
        return st;
    j.part = j.z + tile * j.ld;
    j.dx_items = a->dx != NULL ? j.parts : 0;
    for (j.row0 = 0; j.row0 < a->n; j.row0 += tile) {
        j.rows = rt_min64(tile, a->n - j.row0);
        rt_pool_run(dev->pool, j.panels, logits_item, &j);
        rt_pool_run(dev->pool, j.rows, row_item, &j);
        rt_pool_run(dev->pool, j.dx_items + (a->dw != NULL ? j.panels : 0), gradient_item, &j);
        if (a->dx != NULL)
            rt_cpu_rows(dev, j.rows, rt_cpu_grain(j.rows, a->H * j.parts), dx_rows, &j);
    }
    return RT_OK;
}

static void loss_row(const void *args, int64_t i, float *z, bool gradient, double *scratch)
{
    rt_cpu_loss_row(args, i, z, gradient, scratch);
}

enum rt_status rt_cpu_head_loss(struct rt_dev *dev, struct rt_queue *queue, const struct rt_head_loss_args *a, struct rt_err *err)
{
    const struct rt_cpu_head_tiles t = {a->x, a->w, a->dx, a->dw, a->n, a->H, a->V, loss_row, a};
    const enum rt_status checked = check(a, err);
    (void)queue;
    return checked != RT_OK ? checked : run_tiles(dev, &t, err);
}

static void likelihood_row(const void *args, int64_t i, float *z, bool gradient, double *scratch)
{
    (void)scratch;
    rt_cpu_likelihood_row(args, i, z, gradient);
}

enum rt_status rt_cpu_head_likelihood(struct rt_dev *dev, struct rt_queue *queue, const struct rt_head_likelihood_args *a, struct rt_err *err)
{
    const struct rt_cpu_head_tiles t = {a->x, a->w, a->dx, a->dw, a->n, a->H, a->n_ids, likelihood_row, a};
    (void)queue;
    if (a->n_ids < 1 || a->n_ids > a->w->rows)
        return rt_fail(err, RT_SHAPE, "head_likelihood: %lld ids from a head of %lld rows", (long long)a->n_ids, (long long)a->w->rows);
    for (int64_t i = 0; a->label != NULL && i < a->n; i++)
        if (a->label[i] >= a->n_ids)
            return rt_fail(err, RT_SHAPE, "head_likelihood: label %d at row %lld, expected below %lld", (int)a->label[i], (long long)i,
                           (long long)a->n_ids);
    const enum rt_status st = rt_cpu_weight_is(a->w, a->w->rows, a->H, "head_likelihood", "w", err);
    return st != RT_OK ? st : run_tiles(dev, &t, err);
}
