/* Losses of the head in tiles of rows: logits by one product, the row kernel, and two products for the gradients.
 *
 *   z [tile, V] = x w^T;  dz [chunk, V] by the row kernel, tile by tile;  dx = dz w;  dw += dz^T x.
 * A chunk's dz is held whole, because dw is read and written once a chunk. With more than one chunk dw is summed in float32 and added
 * once, where that fits the scratch; else once a chunk. Sizes depend on shapes and scratch alone.
 *
 * Logits are F32, or, where there are rows enough to pay for a copy of the head and room for it, F16: x and w are converted (exactly, but for elements
 * below 6e-5, which lose 3e-8 at most), the sum is rounded to 11 bits instead of BF16's 8, and dz takes its place in memory. That is
 * half of F32's traffic; at |z| = 20 its error is 4e-3 where BF16's is 3e-2.
 */
#include "core/cuda/gemm.h"
#include "core/cuda/loss.h"

enum {
    TILE_ROWS = 1024,  /* of float32 logits: a product of this height runs at full rate */
    CHUNK_ROWS = 16384, /* more rows would not make the products faster */
    ALIGN_ROWS = 64,
    F16_ROWS = 1024,   /* fewer gain less than the copy of the head costs */
};

struct head {
    const void *x;
    const struct rt_weight *w;
    void *dx, *dw;
    int64_t n, H, V;
    enum rt_dtype type; /* of the logits */
    const struct rt_head_loss_args *loss;             /* one of the two */
    const struct rt_head_likelihood_args *likelihood;
};

struct plan {
    int64_t ldz, tile, chunk;
    bool sum; /* dw in float32 */
};

/* What a call works with. */
struct work {
    const void *w;      /* [V, H] BF16 */
    void *w16, *x16;    /* as FP16, x for a tile; NULL: not needed */
    void *z, *dz;       /* z NULL: logits lie where dz will */
    float *sum;
    void *temp;         /* what w is a copy in */
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
    const int64_t head = h->V * h->H, given = (int64_t)(dev->scratch < INT64_MAX ? dev->scratch : INT64_MAX);
    const int64_t scratch = h->type == RT_F16 && head * 2 < given / 2 ? given - head * 2 : given; /* without the copy of the head */
    const bool backward = h->dx != NULL || h->dw != NULL, f32 = h->type == RT_F32;
    const int64_t z_row = p.ldz * 4, dz_row = p.ldz * 2;
    if (!backward) {
        p.tile = p.chunk = rows_in(scratch, f32 ? z_row : dz_row, TILE_ROWS * 4, h->n);
        return p;
    }
    const int64_t tile = smaller(TILE_ROWS, h->n) * z_row, for_z = f32 ? smaller(tile, scratch / 2) : 0;
    p.chunk = rows_in(scratch - for_z, dz_row, CHUNK_ROWS, h->n);
    if (h->dw != NULL && p.chunk < h->n && head * 4 <= scratch / 2) {
        p.chunk = rows_in(scratch - head * 4 - smaller(for_z, scratch / 4), dz_row, CHUNK_ROWS, h->n);
        p.sum = p.chunk < h->n;
    }
    p.tile = f32 ? rows_in(p.sum ? scratch / 4 : scratch / 2, z_row, TILE_ROWS, p.chunk) : p.chunk;
    return p;
}

static void *rows_at(const void *x, int64_t row, int64_t cols, size_t size)
{
    return x == NULL ? NULL : (char *)(uintptr_t)x + (size_t)(row * cols) * size;
}

/* Logits and row kernel of rows [row0, row0 + rows), dz at their place in the chunk (NULL: forward only). */
static enum rt_status run_tile(struct rt_queue *q, const struct head *h, const struct plan *p, const struct work *k, void *dz, int64_t row0,
                               int64_t rows, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const bool f16 = h->type == RT_F16;
    const void *x = rows_at(h->x, row0, h->H, 2);
    const struct rt_cuda_logits t = {.z = k->z != NULL ? k->z : dz, .dz = dz, .ldz = p->ldz, .row0 = row0, .rows = rows, .type = h->type};
    const struct rt_cuda_gemm_args g = {.a = f16 ? k->x16 : x, .b = f16 ? k->w16 : k->w, .d = t.z, .m = rows, .n = h->V, .k = h->H,
                                        .ldd = p->ldz, .b_t = true, .d_f32 = h->type == RT_F32, .f16 = f16};
    if (f16)
        RT_TRY(rt_cuda_bf16_to_f16(q, x, k->x16, rows * h->H, err));
    RT_TRY(rt_cuda_gemm(q, &g, err));
    RT_TRY(h->loss != NULL ? rt_cuda_loss_rows(q, h->loss, &t, err) : rt_cuda_likelihood_rows(q, h->likelihood, &t, err));
out:
    return st;
}

/* dx and dw of the chunk's rows. */
static enum rt_status run_products(struct rt_queue *q, const struct head *h, const struct plan *p, const struct work *k, int64_t row0, int64_t rows,
                                   struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_cuda_gemm_args dx = {.a = k->dz, .lda = p->ldz, .b = k->w, .d = rows_at(h->dx, row0, h->H, 2), .m = rows, .n = h->H, .k = h->V};
    const struct rt_cuda_gemm_args dw = {.a = k->dz, .lda = p->ldz, .a_t = true, .b = rows_at(h->x, row0, h->H, 2),
                                         .d = k->sum != NULL ? (void *)k->sum : h->dw, .m = h->V, .n = h->H, .k = rows, .d_f32 = k->sum != NULL,
                                         .accumulate = k->sum == NULL || row0 > 0};
    if (h->dx != NULL)
        RT_TRY(rt_cuda_gemm(q, &dx, err));
    if (h->dw != NULL)
        RT_TRY(rt_cuda_gemm(q, &dw, err));
out:
    return st;
}

static enum rt_status take(struct rt_queue *q, const struct head *h, const struct plan *p, struct work *k, struct rt_err *err)
{
    enum rt_status st;
    const bool backward = h->dx != NULL || h->dw != NULL;
    RT_TRY(rt_cuda_weight_bf16(q, h->w, &k->w, &k->temp, err));
    if (h->type == RT_F16) {
        RT_TRY(rt_cuda_temp(q, (size_t)(h->V * h->H) * 2, &k->w16, err));
        RT_TRY(rt_cuda_temp(q, (size_t)(p->tile * h->H) * 2, &k->x16, err));
        RT_TRY(rt_cuda_bf16_to_f16(q, k->w, k->w16, h->V * h->H, err));
    }
    if (backward)
        RT_TRY(rt_cuda_temp(q, (size_t)(p->chunk * p->ldz) * 2, &k->dz, err));
    if (h->type == RT_F32 || !backward)
        RT_TRY(rt_cuda_temp(q, (size_t)(p->tile * p->ldz) * rt_dtype_size(h->type), &k->z, err));
    if (p->sum)
        RT_TRY(rt_cuda_temp(q, (size_t)(h->V * h->H) * sizeof *k->sum, &k->sum, err));
out:
    return st;
}

static enum rt_status run(struct rt_dev *dev, struct rt_queue *q, const struct head *h, struct rt_err *err)
{
    enum rt_status st;
    const struct plan p = make_plan(dev, h);
    struct work k = {0};
    RT_TRY(take(q, h, &p, &k, err));
    for (int64_t c = 0; c < h->n; c += p.chunk) {
        const int64_t rows = smaller(p.chunk, h->n - c);
        for (int64_t t = 0; t < rows; t += p.tile)
            RT_TRY(run_tile(q, h, &p, &k, rows_at(k.dz, t, p.ldz, 2), c + t, smaller(p.tile, rows - t), err));
        RT_TRY(run_products(q, h, &p, &k, c, rows, err));
    }
    if (k.sum != NULL)
        RT_TRY(rt_cuda_add_f32(q, k.sum, h->dw, h->V * h->H, err));
out:
    rt_cuda_temp_free(q, k.temp);
    rt_cuda_temp_free(q, k.w16);
    rt_cuda_temp_free(q, k.x16);
    rt_cuda_temp_free(q, k.z);
    rt_cuda_temp_free(q, k.dz);
    rt_cuda_temp_free(q, k.sum);
    return st;
}

enum rt_status rt_cuda_head_loss_as(struct rt_dev *dev, struct rt_queue *q, const struct rt_head_loss_args *a, enum rt_dtype logits,
                                    struct rt_err *err)
{
    const struct head h = {.x = a->x, .w = a->w, .dx = a->dx, .dw = a->dw, .n = a->n, .H = a->H, .V = a->V, .type = logits, .loss = a};
    if (!(a->T > 0))
        return rt_fail(err, RT_SHAPE, "head_loss: temperature %g, expected above 0", a->T);
    if (a->w->rows != a->V || a->w->cols != a->H)
        return rt_fail(err, RT_SHAPE, "head_loss: a head of %ld x %ld, expected %ld x %ld", (long)a->w->rows, (long)a->w->cols, (long)a->V, (long)a->H);
    return a->n > 0 ? run(dev, q, &h, err) : RT_OK;
}

enum rt_status rt_cuda_head_loss(struct rt_dev *dev, struct rt_queue *q, const struct rt_head_loss_args *a, struct rt_err *err)
{
    const bool room = (uint64_t)(a->V * a->H) * 2 <= dev->scratch / 4, f16 = room && dev->lt != NULL && (a->dx != NULL || a->dw != NULL) && a->n >= F16_ROWS;
    return rt_cuda_head_loss_as(dev, q, a, f16 ? RT_F16 : RT_F32, err);
}

enum rt_status rt_cuda_head_likelihood(struct rt_dev *dev, struct rt_queue *q, const struct rt_head_likelihood_args *a, struct rt_err *err)
{
    const struct head h = {.x = a->x, .w = a->w, .dx = a->dx, .dw = a->dw, .n = a->n, .H = a->H, .V = a->n_ids, .type = RT_F32, .likelihood = a};
    if (a->n_ids < 1 || a->n_ids > a->w->rows || a->w->cols != a->H)
        return rt_fail(err, RT_SHAPE, "head_likelihood: %ld ids from a head of %ld x %ld, states of %ld", (long)a->n_ids, (long)a->w->rows,
                       (long)a->w->cols, (long)a->H);
    return a->n > 0 ? run(dev, q, &h, err) : RT_OK;
}
