/* Linear layers: y = x w^T, its gradients. A product is cut into tiles, each a call of OpenBLAS with all of the inner dimension, or
 * of the exact kernel. */
#include "core/cpu/cpu.h"
#include "core/cpu/simd.h"

#define UNUSED __attribute__((unused))

static int64_t ld_or(int64_t ld, int64_t dense)
{
    return ld != 0 ? ld : dense;
}

/* Tiles over an [m, n] result. */
struct grid {
    int64_t m, n, tm, tn, rows; /* rows: row tiles */
};

static int64_t grid_items(const struct grid *g)
{
    return g->rows * rt_ceil_div(g->n, g->tn);
}

/* Row tiles as tall as leaves 16 items to share out, if they then have 128 rows at least: taller ones are faster, and a
 * dequantised panel serves a whole tile. */
static struct grid make_grid(int64_t m, int64_t n, int64_t tn, int64_t tallest)
{
    struct grid g = {.m = m, .n = n, .tn = tn};
    const int64_t want = rt_ceil_div(16, rt_ceil_div(n, tn));
    const int64_t tm = rt_max64(128, rt_min64(tallest, rt_ceil_div(rt_ceil_div(m, want), 64) * 64));
    g.tm = rt_min64(tm, rt_max64(m, 1));
    g.rows = rt_ceil_div(m, g.tm);
    return g;
}

struct tile {
    int64_t i, m, j, n;
};

static struct tile grid_tile(const struct grid *g, int64_t item)
{
    const int64_t i = item % g->rows * g->tm, j = item / g->rows * g->tn;
    return (struct tile){i, rt_min64(g->tm, g->m - i), j, rt_min64(g->tn, g->n - j)};
}

/* ---- forward ---- */
RT_SIMD static void add_bias(float *restrict y, int64_t ldy, int64_t m, int64_t n, const float *restrict bias)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            y[i * ldy + j] += bias[j];
}

RT_SIMD static void add_rows(float *restrict y, const float *restrict add, int64_t ld, int64_t m, int64_t n)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            y[i * ld + j] += add[i * ld + j];
}

struct fwd_job {
    struct rt_dev *dev;
    const struct rt_linear_fwd_args *a;
    const float *x; /* of row `row0` of the operand, float32 */
    float *decoded; /* the same, where x is in e4m3 form */
    int64_t row0, ldx, ldy;
    struct grid g;
};

static void decode_rows(void *ctx, int64_t row0, int64_t row1, UNUSED int worker)
{
    const struct fwd_job *job = ctx;
    for (int64_t i = row0; i < row1; i++)
        rt_cpu_dequant_row(job->decoded + i * job->a->K, &job->a->x, job->row0 + i, job->a->n, job->a->K);
}

static void fwd_item(void *ctx, int64_t item, int worker)
{
    const struct fwd_job *job = ctx;
    const struct rt_linear_fwd_args *a = job->a;
    const struct tile t = grid_tile(&job->g, item);
    float *y = (float *)a->y + (job->row0 + t.i) * job->ldy + t.j;
    rt_cpu_weight_product(a->w, t.j, t.n, job->x + t.i * job->ldx, job->ldx, t.m, a->row_exact, a->accumulate,
                          rt_cpu_panel(job->dev, worker), y, job->ldy);
    if (a->bias != NULL)
        add_bias(y, job->ldy, t.m, t.n, a->bias->f32 + t.j);
    if (a->add != NULL)
        add_rows(y, (const float *)a->add + (y - (const float *)a->y), a->N, t.m, t.n);
}

/* Exact products serve few rows, so the columns alone are shared out: tiles of 16 to 256. */
static int64_t exact_cols(int64_t N)
{
    return rt_max64(16, rt_min64(256, N / 32 / 16 * 16));
}

enum rt_status rt_cpu_linear_fwd(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err)
{
    enum rt_status st;
    struct fwd_job job = {.dev = dev, .a = a, .ldx = ld_or(a->ldx, a->K), .ldy = ld_or(a->ldy, a->N)};

    RT_TRY(rt_cpu_weight_is(a->w, a->N, a->K, "linear_fwd", "the weight", err));
    RT_TRY(rt_cpu_act_check(&a->x, a->w, "linear_fwd", a->K, err));
    if (a->bias != NULL)
        RT_TRY(rt_cpu_weight_vec_is(a->bias, a->N, "linear_fwd", "the bias", err));
    int64_t step = a->n;
    if (a->x.scale != NULL) {
        job.ldx = a->K;
        step = rt_max64(1, rt_min64(a->n, (int64_t)(dev->shared_max / sizeof(float)) / a->K));
        RT_TRY(rt_cpu_shared(dev, (size_t)(step * a->K) * sizeof(float), &job.decoded, err));
    }
    for (int64_t row = 0; row < a->n; row += step) {
        const int64_t m = rt_min64(step, a->n - row);
        job.row0 = row;
        job.x = (const float *)a->x.data + row * job.ldx;
        if (a->x.scale != NULL) {
            rt_cpu_rows(dev, m, rt_cpu_grain(m, a->K), decode_rows, &job);
            job.x = job.decoded;
        }
        job.g = a->row_exact ? make_grid(m, a->N, exact_cols(a->N), 1024)
                             : make_grid(m, a->N, rt_cpu_tile_cols(a->w, a->N), a->w->f32 != NULL ? 512 : 2048);
        rt_pool_run(dev->pool, grid_items(&job.g), fwd_item, &job);
    }
out:
    return st;
}

/* ---- dx = dy w ---- */
struct dgrad_job {
    struct rt_dev *dev;
    const struct rt_linear_dgrad_args *a;
    int64_t lddy;
    struct grid g;
};

static void dgrad_item(void *ctx, int64_t item, int worker)
{
    const struct dgrad_job *job = ctx;
    const struct rt_linear_dgrad_args *a = job->a;
    const struct tile t = grid_tile(&job->g, item);
    const float *dy = (const float *)a->dy + t.i * job->lddy;
    const int64_t run = a->w->f32 != NULL ? a->N : RT_CPU_PANEL / t.n;
    for (int64_t o = 0; o < a->N; o += run) {
        const int64_t k = rt_min64(run, a->N - o);
        int64_t ldb;
        const float *b = rt_cpu_weight_panel(a->w, o, k, t.j, t.n, rt_cpu_panel(job->dev, worker), &ldb);
        rt_cpu_gemm_nn(t.m, t.n, k, 1, dy + o, job->lddy, b, ldb, a->accumulate || o > 0 ? 1 : 0,
                       (float *)a->dx + t.i * a->K + t.j, a->K);
    }
}

enum rt_status rt_cpu_linear_dgrad(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_linear_dgrad_args *a,
                                   struct rt_err *err)
{
    const enum rt_status st = rt_cpu_weight_is(a->w, a->N, a->K, "linear_dgrad", "the weight", err);
    if (st != RT_OK)
        return st;
    struct dgrad_job job = {dev, a, ld_or(a->lddy, a->N),
                            make_grid(a->n, a->K, a->K >= 4 * 256 ? 256 : 128, a->w->f32 != NULL ? 512 : 2048)};
    rt_pool_run(dev->pool, grid_items(&job.g), dgrad_item, &job);
    return RT_OK;
}

/* ---- dw += (or =) dy^T x ---- */
/* In double, so that the error does not grow with the rows. */
RT_SIMD static void column_sums(float *restrict db, const float *restrict dy, int64_t lddy, int64_t m, int64_t n)
{
    enum { WIDE = 64 };
    for (int64_t j0 = 0; j0 < n; j0 += WIDE) {
        const int64_t w = n - j0 < WIDE ? n - j0 : WIDE;
        double sum[WIDE] = {0};
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < w; j++)
                sum[j] += (double)dy[i * lddy + j0 + j];
        for (int64_t j = 0; j < w; j++)
            db[j0 + j] += (float)sum[j];
    }
}

void rt_cpu_column_sums(float *db, const float *dy, int64_t lddy, int64_t rows, int64_t cols, bool first)
{
    if (first)
        memset(db, 0, (size_t)cols * sizeof *db);
    column_sums(db, dy, lddy, rows, cols);
}

struct wgrad_job {
    const struct rt_linear_wgrad_args *a;
    int64_t lddy, ldx;
    struct grid g;
};

static void wgrad_item(void *ctx, int64_t item, UNUSED int worker)
{
    const struct wgrad_job *job = ctx;
    const struct rt_linear_wgrad_args *a = job->a;
    const struct tile t = grid_tile(&job->g, item);
    const float *dy = (const float *)a->dy + t.i;
    rt_cpu_gemm_tn(t.m, t.n, a->n, 1, dy, job->lddy, (const float *)a->x + t.j, job->ldx, a->first ? 0 : 1, (float *)a->dw + t.i * a->K + t.j,
                   a->K);
    if (a->db != NULL && t.j == 0)
        rt_cpu_column_sums((float *)a->db + t.i, dy, job->lddy, a->n, t.m, a->first);
}

enum rt_status rt_cpu_linear_wgrad(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_linear_wgrad_args *a,
                                   UNUSED struct rt_err *err)
{
    if (a->n == 0)
        return RT_OK;
    struct wgrad_job job = {a, ld_or(a->lddy, a->N), ld_or(a->ldx, a->K),
                            make_grid(a->N, a->K, a->K >= 4 * 256 ? 256 : 128, 512)};
    rt_pool_run(dev->pool, grid_items(&job.g), wgrad_item, &job);
    return RT_OK;
}
