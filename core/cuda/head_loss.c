/* Losses of the head in tiles of rows: logits by one product, the row kernel, and two products for the gradients.
 *
 *   z [tile, V] = x w^T;  dz [chunk, V] by the row kernel, tile by tile;  dx = dz w;  dw += dz^T x.
 * A chunk's dz is held whole, because dw is read and written once a chunk. With more than one chunk dw is summed in float32 and added once, where
 * that fits the scratch; else once a chunk. Sizes depend on shapes and scratch alone.
 */
#include "core/cuda/gemm.h"
#include "core/cuda/loss.h"

enum {
    TILE_ROWS = 1024,  /* of float32 logits: a product of this height runs at full rate */
    CHUNK_ROWS = 8192, /* more rows would not make the products faster */
    ALIGN_ROWS = 64,
};

struct head {
    const void *x;
    const struct rt_weight *w;
    void *dx, *dw;
    int64_t n, H, V;
    bool f32; /* logits */
    const struct rt_head_loss_args *loss;             /* one of the two */
    const struct rt_head_likelihood_args *likelihood;
};

struct plan {
    int64_t ldz, tile, chunk;
    bool sum; /* dw in float32 */
};

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The most rows that `bytes` hold, at least ALIGN_ROWS, in equal parts of n. */
static int64_t rows_in(int64_t bytes, int64_t row, int64_t most, int64_t n)
{
    int64_t rows = smaller(bytes / row, most);
    if (rows < ALIGN_ROWS)
        rows = ALIGN_ROWS;
    const int64_t parts = (n + rows - 1) / rows;
    rows = ((n + parts - 1) / parts + ALIGN_ROWS - 1) / ALIGN_ROWS * ALIGN_ROWS;
    return smaller(rows, n);
}

static struct plan make_plan(const struct rt_dev *dev, const struct head *h)
{
    struct plan p = {.ldz = (h->V + 7) / 8 * 8};
    const int64_t scratch = (int64_t)(dev->scratch < INT64_MAX ? dev->scratch : INT64_MAX), acc = h->V * h->H * 4;
    const bool backward = h->dx != NULL || h->dw != NULL;
    const int64_t z_row = p.ldz * 4, dz_row = p.ldz * 2;
    if (!backward) {
        p.tile = p.chunk = rows_in(scratch, h->f32 ? z_row : dz_row, TILE_ROWS * 4, h->n);
        return p;
    }
    const int64_t tile = smaller(TILE_ROWS, h->n) * z_row, for_z = h->f32 ? smaller(tile, scratch / 2) : 0;
    p.chunk = rows_in(scratch - for_z, dz_row, CHUNK_ROWS, h->n);
    if (h->dw != NULL && p.chunk < h->n && acc <= scratch / 2) {
        p.sum = true;
        p.chunk = rows_in(scratch - acc - smaller(for_z, scratch / 4), dz_row, CHUNK_ROWS, h->n);
        p.sum = p.chunk < h->n;
    }
    p.tile = h->f32 ? rows_in(p.sum ? scratch / 4 : scratch / 2, z_row, TILE_ROWS, p.chunk) : p.chunk;
    return p;
}

static void *rows_at(const void *x, int64_t row, int64_t cols, size_t size)
{
    return x == NULL ? NULL : (char *)(uintptr_t)x + (size_t)(row * cols) * size;
}

/* Logits and row kernel of rows [row0, row0 + rows), dz at their place in the chunk (NULL: forward only). */
static enum rt_status run_tile(struct rt_queue *q, const struct head *h, const struct plan *p, const void *w, void *z, void *dz, int64_t row0,
                               int64_t rows, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_cuda_logits t = {.z = z, .dz = dz, .ldz = p->ldz, .row0 = row0, .rows = rows, .f32 = h->f32};
    const struct rt_cuda_gemm_args g = {.a = rows_at(h->x, row0, h->H, 2), .b = w, .d = z, .m = rows, .n = h->V, .k = h->H, .ldd = p->ldz, .b_t = true,
                                        .d_f32 = h->f32};
    RT_TRY(rt_cuda_gemm(q, &g, err));
    RT_TRY(h->loss != NULL ? rt_cuda_loss_rows(q, h->loss, &t, err) : rt_cuda_likelihood_rows(q, h->likelihood, &t, err));
out:
    return st;
}

/* dx and dw of the chunk's rows. sum NULL: dw itself takes them. */
static enum rt_status run_products(struct rt_queue *q, const struct head *h, const struct plan *p, const void *w, const void *dz, float *sum, int64_t row0,
                                   int64_t rows, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (h->dx != NULL) {
        const struct rt_cuda_gemm_args g = {.a = dz, .lda = p->ldz, .b = w, .d = rows_at(h->dx, row0, h->H, 2), .m = rows, .n = h->H, .k = h->V};
        RT_TRY(rt_cuda_gemm(q, &g, err));
    }
    if (h->dw != NULL) {
        const struct rt_cuda_gemm_args g = {.a = dz, .lda = p->ldz, .a_t = true, .b = rows_at(h->x, row0, h->H, 2), .d = sum != NULL ? (void *)sum : h->dw,
                                            .m = h->V, .n = h->H, .k = rows, .d_f32 = sum != NULL, .accumulate = sum == NULL || row0 > 0};
        RT_TRY(rt_cuda_gemm(q, &g, err));
    }
out:
    return st;
}

static enum rt_status run(struct rt_dev *dev, struct rt_queue *q, const struct head *h, struct rt_err *err)
{
    enum rt_status st;
    const struct plan p = make_plan(dev, h);
    const bool backward = h->dx != NULL || h->dw != NULL;
    const void *w = NULL;
    void *temp = NULL, *z = NULL, *dz = NULL;
    float *sum = NULL;
    RT_TRY(rt_cuda_weight_bf16(q, h->w, &w, &temp, err));
    if (backward)
        RT_TRY(rt_cuda_temp(q, (size_t)(p.chunk * p.ldz) * 2, &dz, err));
    if (h->f32 || !backward)
        RT_TRY(rt_cuda_temp(q, (size_t)(p.tile * p.ldz) * (h->f32 ? 4 : 2), &z, err));
    if (p.sum)
        RT_TRY(rt_cuda_temp(q, (size_t)(h->V * h->H) * sizeof *sum, &sum, err));
    for (int64_t c = 0; c < h->n; c += p.chunk) {
        const int64_t rows = smaller(p.chunk, h->n - c);
        for (int64_t t = 0; t < rows; t += p.tile) {
            void *dz_tile = rows_at(dz, t, p.ldz, 2);
            RT_TRY(run_tile(q, h, &p, w, z != NULL ? z : dz_tile, dz_tile, c + t, smaller(p.tile, rows - t), err));
        }
        if (backward)
            RT_TRY(run_products(q, h, &p, w, dz, sum, c, rows, err));
    }
    if (sum != NULL)
        RT_TRY(rt_cuda_add_f32(q, sum, h->dw, h->V * h->H, err));
out:
    rt_cuda_temp_free(q, temp);
    rt_cuda_temp_free(q, z);
    rt_cuda_temp_free(q, dz);
    rt_cuda_temp_free(q, sum);
    return st;
}

enum rt_status rt_cuda_head_loss_as(struct rt_dev *dev, struct rt_queue *q, const struct rt_head_loss_args *a, bool f32, struct rt_err *err)
{
    const struct head h = {.x = a->x, .w = a->w, .dx = a->dx, .dw = a->dw, .n = a->n, .H = a->H, .V = a->V, .f32 = f32, .loss = a};
    if (!(a->T > 0))
        return rt_fail(err, RT_SHAPE, "head_loss: temperature %g, expected above 0", a->T);
    if (a->w->rows != a->V || a->w->cols != a->H)
        return rt_fail(err, RT_SHAPE, "head_loss: a head of %ld x %ld, expected %ld x %ld", (long)a->w->rows, (long)a->w->cols, (long)a->V, (long)a->H);
    return a->n > 0 ? run(dev, q, &h, err) : RT_OK;
}

/* float32 logits: BF16 ones of trained models (ulp 0.125 at 16) move a row's KL by 1e-3 and more. */
enum rt_status rt_cuda_head_loss(struct rt_dev *dev, struct rt_queue *q, const struct rt_head_loss_args *a, struct rt_err *err)
{
    return rt_cuda_head_loss_as(dev, q, a, true, err);
}

enum rt_status rt_cuda_head_likelihood(struct rt_dev *dev, struct rt_queue *q, const struct rt_head_likelihood_args *a, struct rt_err *err)
{
    const struct head h = {.x = a->x, .w = a->w, .dx = a->dx, .dw = a->dw, .n = a->n, .H = a->H, .V = a->n_ids, .f32 = true, .likelihood = a};
    if (a->n_ids < 1 || a->n_ids > a->w->rows || a->w->cols != a->H)
        return rt_fail(err, RT_SHAPE, "head_likelihood: %ld ids from a head of %ld x %ld, states of %ld", (long)a->n_ids, (long)a->w->rows,
                       (long)a->w->cols, (long)a->H);
    return a->n > 0 ? run(dev, q, &h, err) : RT_OK;
}
