/* Operations on rows and elements: embedding, norm, gating, rotary positions, gather and scatter, sums. */
#include "core/cpu/cpu.h"
#include "core/rms.h"
#include "core/cpu/simd.h"

#define UNUSED __attribute__((unused))

static int64_t ld_or(int64_t ld, int64_t dense)
{
    return ld != 0 ? ld : dense;
}

/* ---- embedding ---- */
static int32_t embed_id(const struct rt_embed_fwd_args *a, int64_t i)
{
    return a->ids[i] < 0 && a->drawn != NULL ? a->drawn[-1 - a->ids[i]] : a->ids[i];
}

static void embed_rows(void *ctx, int64_t row0, int64_t row1, UNUSED int worker)
{
    const struct rt_embed_fwd_args *a = ctx;
    for (int64_t i = row0; i < row1; i++) {
        float *out = (float *)a->out + i * a->cols;
        int64_t ld;
        const float *row = rt_cpu_weight_panel(a->table, embed_id(a, i), 1, 0, a->cols, out, &ld);
        if (row != out)
            memcpy(out, row, (size_t)a->cols * sizeof *out);
    }
}

enum rt_status rt_cpu_embed_fwd(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_embed_fwd_args *a, struct rt_err *err)
{
    const enum rt_status st = rt_cpu_weight_is(a->table, a->table->rows, a->cols, "embed_fwd", "the table", err);
    if (st != RT_OK)
        return st;
    for (int64_t i = 0; i < a->n; i++)
        if (embed_id(a, i) < 0 || embed_id(a, i) >= a->table->rows)
            return rt_fail(err, RT_SHAPE, "embed_fwd: id %d at row %lld, expected 0 .. %lld", (int)embed_id(a, i), (long long)i,
                           (long long)a->table->rows - 1);
    struct rt_embed_fwd_args job = *a;
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->cols), embed_rows, &job);
    return RT_OK;
}

/* ---- norm ---- */
RT_SIMD static void add_rows(float *s, const float *x, const float *add, int64_t n)
{
    for (int64_t j = 0; j < n; j++) /* s may be x or add */
        s[j] = x[j] + add[j];
}

/* y may be s. Rounded after the division and after the product: see core/rms.h. */
RT_SIMD static void scale_row(float *y, const float *s, float rms, const float *w, int64_t n)
{
    if (w == NULL)
        for (int64_t j = 0; j < n; j++)
            y[j] = s[j] / rms;
    else
        for (int64_t j = 0; j < n; j++)
            y[j] = s[j] / rms * w[j];
}

struct norm_job {
    struct rt_dev *dev;
    const struct rt_norm_fwd_args *a;
};

static void norm_rows(void *ctx, int64_t row0, int64_t row1, int worker)
{
    const struct norm_job *job = ctx;
    const struct rt_norm_fwd_args *a = job->a;
    const int64_t ldx = ld_or(a->ldx, a->cols), ldy = ld_or(a->ldy, a->cols);
    float *tile = rt_cpu_tile(job->dev, worker);
    for (int64_t i = row0; i < row1; i++) {
        const float *s = (const float *)a->x + i * ldx;
        if (a->add != NULL || a->sum != NULL) {
            float *sum = a->sum != NULL ? (float *)a->sum + i * a->cols : tile;
            if (a->add != NULL)
                add_rows(sum, s, (const float *)a->add + i * a->cols, a->cols);
            else
                memmove(sum, s, (size_t)a->cols * sizeof *sum);
            s = sum;
        }
        const float rms = rt_rms_f32(s, a->cols, a->eps);
        if (a->y != NULL || a->yq.data != NULL) {
            float *y = a->y != NULL ? (float *)a->y + i * ldy : tile + a->cols;
            scale_row(y, s, rms, a->w != NULL ? a->w->f32 : NULL, a->cols);
            if (a->yq.data != NULL)
                rt_cpu_quant_row(y, &a->yq, i, a->n, a->cols, a->pow2);
        }
        if (a->rstd != NULL)
            a->rstd[i] = 1 / rms;
    }
}

enum rt_status rt_cpu_norm_fwd(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_norm_fwd_args *a, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (a->cols > RT_CPU_TILE / 2)
        RT_FAIL(err, SHAPE, "norm_fwd: rows of %lld columns, at most %d", (long long)a->cols, RT_CPU_TILE / 2);
    if (a->w != NULL)
        RT_TRY(rt_cpu_weight_vec_is(a->w, a->cols, "norm_fwd", "the weight", err));
    if (a->yq.data != NULL)
        RT_TRY(rt_cpu_quant_check("norm_fwd", a->cols, err));
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->cols), norm_rows, &(struct norm_job){dev, a});
out:
    return st;
}

/* ---- swiglu ---- */
RT_SIMD void rt_cpu_swiglu_row(float *h, const float *gate, const float *up, int64_t n)
{
    for (int64_t j = 0; j < n; j++) /* h may be gate */
        h[j] = rt_silu(gate[j]) * up[j];
}

struct swiglu_job {
    struct rt_dev *dev;
    const struct rt_swiglu_fwd_args *a;
};

static void swiglu_rows(void *ctx, int64_t row0, int64_t row1, int worker)
{
    const struct swiglu_job *job = ctx;
    const struct rt_swiglu_fwd_args *a = job->a;
    const int64_t ld = ld_or(a->ld, a->I);
    for (int64_t i = row0; i < row1; i++) {
        float *h = a->h != NULL ? (float *)a->h + i * a->I : rt_cpu_tile(job->dev, worker);
        rt_cpu_swiglu_row(h, (const float *)a->gate + i * ld, (const float *)a->up + i * ld, a->I);
        if (a->hq.data != NULL)
            rt_cpu_quant_row(h, &a->hq, i, a->n, a->I, a->pow2);
    }
}

enum rt_status rt_cpu_swiglu_fwd(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_swiglu_fwd_args *a,
                                 struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (a->hq.data != NULL)
        RT_TRY(rt_cpu_quant_check("swiglu_fwd", a->I, err));
    if (a->I > RT_CPU_TILE)
        RT_FAIL(err, SHAPE, "swiglu_fwd: rows of %lld columns, at most %d", (long long)a->I, RT_CPU_TILE);
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, 4 * a->I), swiglu_rows, &(struct swiglu_job){dev, a});
out:
    return st;
}

/* ---- rope ---- */
RT_SIMD static void turn_pairs(float *restrict x, const float *restrict c, const float *restrict s, float sign, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        const float u = x[2 * i], v = x[2 * i + 1], si = sign * s[i];
        x[2 * i] = u * c[i] - v * si;
        x[2 * i + 1] = u * si + v * c[i];
    }
}

RT_SIMD static void turn_halves(float *restrict x, const float *restrict c, const float *restrict s, float sign, int64_t half)
{
    float *restrict y = x + half;
    for (int64_t i = 0; i < half; i++) {
        const float u = x[i], v = y[i], si = sign * s[i];
        x[i] = u * c[i] - v * si;
        y[i] = u * si + v * c[i];
    }
}

static void rope_rows(void *ctx, int64_t row0, int64_t row1, UNUSED int worker)
{
    const struct rt_rope_args *a = ctx;
    const int64_t head_ld = ld_or(a->head_ld, a->dim), ld = ld_or(a->ld, a->heads * head_ld), half = a->dim / 2;
    const float sign = a->inverse ? -1 : 1;
    for (int64_t i = row0; i < row1; i++) {
        const float *c = a->cos + a->position[i] * half, *s = a->sin + a->position[i] * half;
        for (int h = 0; h < a->heads; h++) {
            float *x = (float *)a->x + i * ld + h * head_ld;
            if (a->interleaved)
                turn_pairs(x, c, s, sign, half);
            else
                turn_halves(x, c, s, sign, half);
        }
    }
}

enum rt_status rt_cpu_rope(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_rope_args *a, UNUSED struct rt_err *err)
{
    struct rt_rope_args job = *a;
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, (int64_t)a->heads * a->dim), rope_rows, &job);
    return RT_OK;
}

/* ---- moving rows ---- */
static void gather_rows(void *ctx, int64_t row0, int64_t row1, UNUSED int worker)
{
    const struct rt_gather_args *a = ctx;
    for (int64_t i = row0; i < row1; i++)
        memcpy((float *)a->out + i * a->cols, (const float *)a->x + a->index[i] * a->cols, (size_t)a->cols * sizeof(float));
}

enum rt_status rt_cpu_gather(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_gather_args *a, UNUSED struct rt_err *err)
{
    struct rt_gather_args job = *a;
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->cols), gather_rows, &job);
    return RT_OK;
}

RT_SIMD static void add_to(float *restrict y, const float *restrict x, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        y[j] += x[j];
}

static void scatter_rows(void *ctx, int64_t row0, int64_t row1, UNUSED int worker)
{
    const struct rt_scatter_args *a = ctx;
    for (int64_t i = row0; i < row1; i++) {
        const float *y = (const float *)a->y + i * a->cols;
        float *x = (float *)a->x + a->index[i] * a->cols;
        if (a->accumulate)
            add_to(x, y, a->cols);
        else
            memcpy(x, y, (size_t)a->cols * sizeof *x);
    }
}

enum rt_status rt_cpu_scatter(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_scatter_args *a,
                              UNUSED struct rt_err *err)
{
    struct rt_scatter_args job = *a;
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->cols), scatter_rows, &job);
    return RT_OK;
}

static void convert_part(void *ctx, int64_t i0, int64_t i1, UNUSED int worker)
{
    const struct rt_convert_args *a = ctx;
    memcpy((float *)a->dst + i0, (const float *)a->src + i0, (size_t)(i1 - i0) * sizeof(float));
}

enum { RUN = 1 << 16 }; /* elements of an item, and of a partial sum */

enum rt_status rt_cpu_convert(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_convert_args *a,
                              UNUSED struct rt_err *err)
{
    struct rt_convert_args job = *a;
    rt_cpu_rows(dev, a->n, RUN, convert_part, &job);
    return RT_OK;
}

/* ---- sums ---- */
/* In double, rounded once. */
RT_SIMD static void axpy_run(float *restrict y, const float *restrict x, double a, int64_t n)
{
    if (x == NULL)
        for (int64_t j = 0; j < n; j++)
            y[j] = (float)(a * (double)y[j]);
    else
        for (int64_t j = 0; j < n; j++)
            y[j] = (float)((double)y[j] + a * (double)x[j]);
}

static void axpy_part(void *ctx, int64_t i0, int64_t i1, UNUSED int worker)
{
    const struct rt_axpy_args *a = ctx;
    axpy_run((float *)a->y + i0, a->x != NULL ? (const float *)a->x + i0 : NULL, a->a, i1 - i0);
}

enum rt_status rt_cpu_axpy(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_axpy_args *a, UNUSED struct rt_err *err)
{
    struct rt_axpy_args job = *a;
    rt_cpu_rows(dev, a->n, RUN, axpy_part, &job);
    return RT_OK;
}

RT_SIMD static double sumsq_run(const float *x, int64_t n)
{
    typedef double v8d __attribute__((vector_size(64)));
    typedef float v8f __attribute__((vector_size(32)));
    v8d acc[2] = {{0}, {0}};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 2; j++) {
            v8f f;
            memcpy(&f, x + i + 8 * j, sizeof f);
            const v8d d = __builtin_convertvector(f, v8d);
            acc[j] += d * d;
        }
    double sum = 0;
    for (; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    for (int j = 0; j < 8; j++)
        sum += acc[0][j] + acc[1][j];
    return sum;
}

struct sumsq_job {
    const float *x;
    double *part;
};

static void sumsq_part(void *ctx, int64_t i0, int64_t i1, UNUSED int worker)
{
    const struct sumsq_job *job = ctx;
    job->part[i0 / RUN] = sumsq_run(job->x + i0, i1 - i0);
}

enum rt_status rt_cpu_sumsq(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_sumsq_args *a, struct rt_err *err)
{
    struct sumsq_job job = {a->x, NULL};
    const int64_t parts = rt_ceil_div(a->n, RUN);
    const enum rt_status st = rt_cpu_shared(dev, (size_t)parts * sizeof *job.part, &job.part, err);
    if (st != RT_OK)
        return st;
    rt_cpu_rows(dev, a->n, RUN, sumsq_part, &job);
    double sum = 0;
    for (int64_t i = 0; i < parts; i++)
        sum += job.part[i];
    *a->out = sum;
    return RT_OK;
}
