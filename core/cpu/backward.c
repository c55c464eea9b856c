/* Backward of the element operations of the student, and its heads' norm with rotary positions.
 *
 * Gradients of norm weights are summed within runs of rows cut from n alone, then over the runs in ascending order.
 */
#include "core/cpu/cpu.h"

#include "core/cpu/simd.h"

enum {
    DW_ROWS = 16,  /* least rows of a run */
    DW_RUNS = 128, /* most runs */
};

/* w, or NULL */
static const float *vec_of(const struct rt_weight *w)
{
    return w != NULL ? w->f32 : NULL;
}

static enum rt_status check_vec(const struct rt_weight *w, int64_t n, const char *op, struct rt_err *err)
{
    return w != NULL ? rt_cpu_weight_is(w, 1, n, op, "w", err) : RT_OK;
}

RT_INLINE float rstd_of(const float *x, int64_t n, float eps)
{
    return 1.0f / sqrtf(rt_dot(x, x, n) / (float)n + eps);
}

/* dx (= or +=) r (g - x r^2 mean(g x)), g = dy w; dw += dy x r. dx may be dy. */
RT_INLINE void norm_row_bwd(const float *dy, const float *x, const float *w, float r, float *dx, float *dw, int64_t n, bool accumulate)
{
    rt_v16 acc = {0};
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        acc += rt_v16_load(dy + j) * rt_v16_load(x + j) * (w != NULL ? rt_v16_load(w + j) : (rt_v16){0} + 1.0f);
    float gx = rt_v16_sum(&acc);
    for (; j < n; j++)
        gx += dy[j] * x[j] * (w != NULL ? w[j] : 1.0f);
    const float c = r * r * r * gx / (float)n;
    if (dw != NULL)
        for (j = 0; j < n; j++)
            dw[j] += dy[j] * x[j] * r;
    if (w != NULL && accumulate)
        for (j = 0; j < n; j++)
            dx[j] += r * dy[j] * w[j] - x[j] * c;
    else if (w != NULL)
        for (j = 0; j < n; j++)
            dx[j] = r * dy[j] * w[j] - x[j] * c;
    else if (accumulate)
        for (j = 0; j < n; j++)
            dx[j] += r * dy[j] - x[j] * c;
    else
        for (j = 0; j < n; j++)
            dx[j] = r * dy[j] - x[j] * c;
}

/* ---- partial sums of dw ---- */
struct partial {
    float *part, *dw; /* [runs, cols], [cols] */
    int64_t rows, runs, cols;
};

/* Runs for n rows; part NULL without dw, which is zeroed where this is its first sum. */
static enum rt_status partial_begin(struct rt_dev *dev, struct partial *p, void *dw, bool first, int64_t n, int64_t cols, struct rt_err *err)
{
    *p = (struct partial){.dw = dw, .rows = rt_max64(DW_ROWS, rt_ceil_div(n, DW_RUNS)), .cols = cols};
    if (dw != NULL && first)
        memset(dw, 0, (size_t)cols * sizeof(float));
    p->runs = rt_ceil_div(n, p->rows);
    return dw != NULL ? rt_cpu_shared(dev, (size_t)p->runs * (size_t)cols * sizeof(float), &p->part, err) : RT_OK;
}

RT_SIMD static void add_runs(float *dw, const float *part, int64_t n, int64_t stride, int64_t runs)
{
    float sum[64];
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t len = rt_min64(64, n - i);
        for (int64_t j = 0; j < len; j++)
            sum[j] = part[i + j];
        for (int64_t r = 1; r < runs; r++)
            for (int64_t j = 0; j < len; j++)
                sum[j] += part[r * stride + i + j];
        for (int64_t j = 0; j < len; j++)
            dw[i + j] += sum[j];
    }
}

static void add_cols(void *ctx, int64_t c0, int64_t c1, int worker)
{
    const struct partial *p = ctx;
    (void)worker;
    add_runs(p->dw + c0, p->part + c0, c1 - c0, p->cols, p->runs);
}

static void partial_end(struct rt_dev *dev, struct partial *p)
{
    if (p->dw != NULL && p->runs > 0)
        rt_cpu_rows(dev, p->cols, rt_max64(64, rt_cpu_grain(p->cols, p->runs)), add_cols, p);
}

/* ---- norm ---- */
struct norm_bwd {
    const struct rt_norm_bwd_args *a;
    struct partial p;
};

RT_SIMD static void norm_rows_bwd(const struct rt_norm_bwd_args *a, int64_t t0, int64_t t1, float *dw)
{
    const float *w = vec_of(a->w);
    for (int64_t t = t0; t < t1; t++) {
        const float *x = (const float *)a->x + t * a->cols;
        const float r = a->rstd != NULL ? a->rstd[t] : rstd_of(x, a->cols, a->eps);
        norm_row_bwd((const float *)a->dy + t * a->cols, x, w, r, (float *)a->dx + t * a->cols, dw, a->cols, a->accumulate);
    }
}

static void norm_run(void *ctx, int64_t run, int worker)
{
    const struct norm_bwd *b = ctx;
    float *dw = b->p.part != NULL ? b->p.part + run * b->p.cols : NULL;
    (void)worker;
    if (dw != NULL)
        memset(dw, 0, (size_t)b->p.cols * sizeof *dw);
    norm_rows_bwd(b->a, run * b->p.rows, rt_min64(b->a->n, (run + 1) * b->p.rows), dw);
}

enum rt_status rt_cpu_norm_bwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_norm_bwd_args *a, struct rt_err *err)
{
    struct norm_bwd b = {.a = a};
    enum rt_status st = check_vec(a->w, a->cols, "norm_bwd", err);
    if (st == RT_OK)
        st = partial_begin(dev, &b.p, a->dw, a->first, a->n, a->cols, err);
    if (st == RT_OK && a->y != NULL)
        st = rt_cpu_norm_fwd(dev, queue, &(struct rt_norm_fwd_args){.x = a->x, .w = a->w, .y = a->y, .n = a->n, .cols = a->cols, .eps = a->eps}, err);
    if (st != RT_OK)
        return st;
    rt_pool_run(dev->pool, b.p.runs, norm_run, &b);
    partial_end(dev, &b.p);
    return RT_OK;
}

/* ---- heads: norm and rotary positions ---- */
/* y = x turned by the angles of (c, s), inverse with s_sign -1; halves (j, j + d/2). y may be x. */
RT_INLINE void turn(const float *x, float *y, const float *c, const float *s, float s_sign, int64_t d)
{
    const int64_t half = d / 2;
    for (int64_t j = 0; j < half; j++) {
        const float u = x[j], v = x[half + j], sn = s_sign * s[j];
        y[j] = u * c[j] - v * sn;
        y[half + j] = u * sn + v * c[j];
    }
}

RT_SIMD static void heads_fwd(const struct rt_headnorm_rope_fwd_args *a, int64_t t0, int64_t t1)
{
    const float *w = vec_of(a->w);
    const int64_t d = a->d, ldx = a->ldx != 0 ? a->ldx : a->heads * d, ldy = a->ldy != 0 ? a->ldy : a->heads * d;
    for (int64_t t = t0; t < t1; t++) {
        const float *c = a->cos + a->position[t] * (d / 2), *s = a->sin + a->position[t] * (d / 2);
        for (int64_t h = 0; h < a->heads; h++) {
            const float *x = (const float *)a->x + t * ldx + h * d;
            float *y = (float *)a->y + t * ldy + h * d, r = 1;
            if (w != NULL) {
                r = rstd_of(x, d, a->eps);
                for (int64_t j = 0; j < d; j++)
                    y[j] = x[j] * r * w[j];
                turn(y, y, c, s, 1, d);
            } else {
                turn(x, y, c, s, 1, d);
            }
            if (a->rstd != NULL)
                a->rstd[t * a->heads + h] = r;
        }
    }
}

void rt_cpu_heads_fwd(const struct rt_headnorm_rope_fwd_args *a, int64_t t0, int64_t t1)
{
    heads_fwd(a, t0, t1);
}

static void heads_fwd_rows(void *ctx, int64_t t0, int64_t t1, int worker)
{
    (void)worker;
    heads_fwd(ctx, t0, t1);
}

static enum rt_status check_heads(const struct rt_weight *w, int d, const char *op, struct rt_err *err)
{
    if (d <= 0 || d % 2 != 0 || d > RT_CPU_TILE)
        return rt_fail(err, RT_SHAPE, "%s: heads of %d elements, expected an even number", op, d);
    return check_vec(w, d, op, err);
}

enum rt_status rt_cpu_headnorm_rope_fwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_headnorm_rope_fwd_args *a,
                                        struct rt_err *err)
{
    struct rt_headnorm_rope_fwd_args args = *a;
    const enum rt_status st = check_heads(a->w, a->d, "headnorm_rope_fwd", err);
    (void)queue;
    if (st == RT_OK)
        rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, (int64_t)a->heads * a->d * 2), heads_fwd_rows, &args);
    return st;
}

struct heads_bwd {
    const struct rt_headnorm_rope_bwd_args *a;
    struct rt_dev *dev;
    struct partial p;
};

/* tmp [d]; dw NULL where w is. */
RT_SIMD static void heads_bwd(const struct rt_headnorm_rope_bwd_args *a, int64_t t0, int64_t t1, float *tmp, float *dw)
{
    const float *w = vec_of(a->w);
    const int64_t d = a->d, dense = a->heads * d;
    const int64_t ldx = a->ldx != 0 ? a->ldx : dense, lddx = a->lddx != 0 ? a->lddx : dense, lddy = a->lddy != 0 ? a->lddy : dense;
    for (int64_t t = t0; t < t1; t++) {
        const float *c = a->cos + a->position[t] * (d / 2), *s = a->sin + a->position[t] * (d / 2);
        for (int64_t h = 0; h < a->heads; h++) {
            const float *dy = (const float *)a->dy + t * lddy + h * d;
            float *dx = (float *)a->dx + t * lddx + h * d;
            if (w == NULL) {
                turn(dy, dx, c, s, -1, d);
                continue;
            }
            const float *x = (const float *)a->x + t * ldx + h * d;
            const float r = a->rstd != NULL ? a->rstd[t * a->heads + h] : rstd_of(x, d, a->eps);
            turn(dy, tmp, c, s, -1, d);
            norm_row_bwd(tmp, x, w, r, dx, dw, d, false);
        }
    }
}

static void heads_run(void *ctx, int64_t run, int worker)
{
    const struct heads_bwd *b = ctx;
    float *dw = b->p.part != NULL ? b->p.part + run * b->p.cols : NULL;
    if (dw != NULL)
        memset(dw, 0, (size_t)b->p.cols * sizeof *dw);
    heads_bwd(b->a, run * b->p.rows, rt_min64(b->a->n, (run + 1) * b->p.rows), rt_cpu_tile(b->dev, worker), dw);
}

static void sum_columns(void *ctx, int64_t c0, int64_t c1, int worker)
{
    const struct rt_headnorm_rope_bwd_args *a = ((const struct heads_bwd *)ctx)->a;
    (void)worker;
    rt_cpu_column_sums((float *)a->db + c0, (const float *)a->dx + c0, a->lddx != 0 ? a->lddx : a->heads * a->d, a->n, c1 - c0, a->first);
}

enum rt_status rt_cpu_headnorm_rope_bwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_headnorm_rope_bwd_args *a,
                                        struct rt_err *err)
{
    struct heads_bwd b = {.a = a, .dev = dev};
    enum rt_status st = check_heads(a->w, a->d, "headnorm_rope_bwd", err);
    if (st == RT_OK)
        st = partial_begin(dev, &b.p, a->w != NULL ? a->dw : NULL, a->first, a->n, a->d, err);
    if (st != RT_OK)
        return st;
    (void)queue;
    rt_pool_run(dev->pool, b.p.runs, heads_run, &b);
    partial_end(dev, &b.p);
    if (a->db != NULL && a->n > 0)
        rt_cpu_rows(dev, a->n_db, 64, sum_columns, &b);
    return RT_OK;
}

/* ---- gated unit ---- */
/* dg may be g, du u, and h dh: what a step reads is written by no other. */
RT_INLINE void swiglu_row(const float *g, const float *u, const float *dh, float *dg, float *du, float *h, int64_t n, const bool with_h)
{
#pragma GCC ivdep
    for (int64_t j = 0; j < n; j++) {
        const float gate = g[j], up = u[j], d = dh[j], s = rt_sigmoid(gate), silu = gate * s;
        dg[j] = d * up * s * (1.0f + gate * (1.0f - s));
        du[j] = d * silu;
        if (with_h)
            h[j] = rt_silu(gate) * up; /* the bits of swiglu_fwd */
    }
}

RT_SIMD static void swiglu_rows(const struct rt_swiglu_bwd_args *a, int64_t t0, int64_t t1)
{
    const int64_t ld = a->ld != 0 ? a->ld : a->I;
    for (int64_t t = t0; t < t1; t++) {
        const float *g = (const float *)a->gate + t * ld, *u = (const float *)a->up + t * ld, *dh = (const float *)a->dh + t * a->I;
        float *dg = (float *)a->dgate + t * ld, *du = (float *)a->dup + t * ld;
        if (a->h != NULL)
            swiglu_row(g, u, dh, dg, du, (float *)a->h + t * a->I, a->I, true);
        else
            swiglu_row(g, u, dh, dg, du, NULL, a->I, false);
    }
}

static void swiglu_bwd_rows(void *ctx, int64_t t0, int64_t t1, int worker)
{
    (void)worker;
    swiglu_rows(ctx, t0, t1);
}

enum rt_status rt_cpu_swiglu_bwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_swiglu_bwd_args *a, struct rt_err *err)
{
    struct rt_swiglu_bwd_args args = *a;
    (void)queue;
    (void)err;
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->I * 8), swiglu_bwd_rows, &args);
    return RT_OK;
}

enum rt_status rt_cpu_gated_fwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_gated_fwd_args *a, struct rt_err *err)
{
    const struct rt_linear_fwd_args product = {.x = {.data = (void *)(uintptr_t)a->x}, .w = a->w, .bias = a->bias, .y = a->gate_up, .n = a->n, .K = a->K,
                                               .N = 2 * a->I, .row_exact = a->row_exact};
    const struct rt_swiglu_fwd_args gate = {.gate = a->gate_up, .up = (const float *)a->gate_up + a->I, .ld = 2 * a->I, .h = a->h, .n = a->n, .I = a->I};
    const enum rt_status st = rt_cpu_linear_fwd(dev, queue, &product, err);
    return st == RT_OK && a->h != NULL ? rt_cpu_swiglu_fwd(dev, queue, &gate, err) : st;
}

enum rt_status rt_cpu_gated_bwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_gated_bwd_args *a, struct rt_err *err)
{
    const struct rt_linear_dgrad_args product = {.dy = a->dy, .w = a->w, .dx = a->dh, .n = a->n, .K = a->I, .N = a->N};
    const struct rt_swiglu_bwd_args gate = {.gate = a->gate_up, .up = (const float *)a->gate_up + a->I, .dh = a->dh, .ld = 2 * a->I, .dgate = a->d_gate_up,
                                            .dup = (float *)a->d_gate_up + a->I, .h = a->h, .n = a->n, .I = a->I};
    const enum rt_status st = rt_cpu_linear_dgrad(dev, queue, &product, err);
    return st == RT_OK ? rt_cpu_swiglu_bwd(dev, queue, &gate, err) : st;
}

/* ---- embedding ---- */
enum { BUCKETS = 32 };

RT_SIMD static void add_row(float *restrict to, const float *restrict from, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        to[j] += from[j];
}

/* The rows of one residue of ids, ascending. */
static void embed_bucket(void *ctx, int64_t bucket, int worker)
{
    const struct rt_embed_bwd_args *a = ctx;
    (void)worker;
    for (int64_t i = 0; i < a->n; i++)
        if (a->ids[i] % BUCKETS == bucket)
            add_row((float *)a->dtable + a->ids[i] * a->cols, (const float *)a->dy + i * a->cols, a->cols);
}

enum rt_status rt_cpu_embed_bwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_embed_bwd_args *a, struct rt_err *err)
{
    struct rt_embed_bwd_args args = *a;
    (void)queue;
    for (int64_t i = 0; i < a->n; i++)
        if (a->ids[i] < 0 || a->ids[i] >= a->rows)
            return rt_fail(err, RT_SHAPE, "embed_bwd: id %d at row %lld, expected 0 .. %lld", (int)a->ids[i], (long long)i,
                           (long long)a->rows - 1);
    rt_pool_run(dev->pool, BUCKETS, embed_bucket, &args);
    return RT_OK;
}
