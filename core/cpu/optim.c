/* The optimiser's step and the feature loss. */
#include "core/cpu/cpu.h"

#include <float.h>

#include "core/cpu/simd.h"

/* ---- AdamW ---- */
struct step {
    const struct rt_adamw_args *a;
    float b1, b2, n1, n2, c1, c2, lr, eps, decay, gs; /* n = 1 - b; c = 1 / (1 - b^step) */
};

RT_SIMD static void adamw_run(const struct step *s, float decay, float *restrict p, const float *restrict grad, float *restrict m,
                              float *restrict v, int64_t n)
{
    const struct step k = *s;
    for (int64_t i = 0; i < n; i++) {
        const float g = grad[i] * k.gs;
        float m1 = k.b1 * m[i] + k.n1 * g, v1 = k.b2 * v[i] + k.n2 * g * g;
        /* Moments of a parameter without gradient decay for ever: below the normal numbers each step would trap in microcode. */
        m1 = fabsf(m1) < FLT_MIN ? 0.0f : m1;
        v1 = v1 < FLT_MIN ? 0.0f : v1;
        m[i] = m1;
        v[i] = v1;
        p[i] -= k.lr * (m1 * k.c1 / (sqrtf(v1 * k.c2) + k.eps) + decay * p[i]);
    }
}

static void adamw_rows(void *ctx, int64_t i0, int64_t i1, int worker)
{
    const struct step *s = ctx;
    const struct rt_adamw_args *a = s->a;
    (void)worker;
    for (int64_t end; i0 < i1; i0 = end) {
        int run = 0;
        while (run < a->n_decay && i0 >= a->decay_end[run])
            run++;
        end = run < a->n_decay && a->decay_end[run] < i1 ? a->decay_end[run] : i1;
        adamw_run(s, a->decay_end == NULL || (run < a->n_decay && run % 2 == 0) ? s->decay : 0.0f, (float *)a->p + i0,
                  (const float *)a->grad + i0, (float *)a->m + i0, (float *)a->v + i0, end - i0);
    }
}

enum rt_status rt_cpu_adamw(struct rt_dev *dev, struct rt_queue *queue, const struct rt_adamw_args *a, struct rt_err *err)
{
    const double c1 = 1 / (1 - pow(a->beta1, (double)a->step)), c2 = 1 / (1 - pow(a->beta2, (double)a->step));
    struct step s = {a, (float)a->beta1, (float)a->beta2, (float)(1 - a->beta1), (float)(1 - a->beta2), (float)c1, (float)c2,
                     (float)a->lr, (float)a->eps, (float)a->decay, (float)a->grad_scale};
    (void)queue;
    if (a->low != NULL || a->moment != RT_F32)
        return rt_fail(err, RT_UNSUPPORTED, "adamw: moments of type %s%s; this backend's are F32", rt_dtype_name(a->moment),
                       a->low != NULL ? " and split parameters" : "");
    rt_cpu_rows(dev, a->n, 1 << 14, adamw_rows, &s);
    return RT_OK;
}

/* ---- feature loss ---- */
struct dots {
    double xx, xy, yy, dd;
};

/* Sums in double, eight lanes. */
RT_SIMD static void row_dots(const float *x, const float *y, int64_t n, struct dots *out)
{
    double xx[8] = {0}, xy[8] = {0}, yy[8] = {0}, dd[8] = {0};
    for (int64_t i = 0; i < n; i += 8) {
        const int64_t len = rt_min64(8, n - i);
        double u[8] = {0}, v[8] = {0};
        for (int64_t j = 0; j < len; j++) {
            u[j] = x[i + j];
            v[j] = y[i + j];
        }
        for (int j = 0; j < 8; j++) {
            xx[j] += u[j] * u[j];
            xy[j] += u[j] * v[j];
            yy[j] += v[j] * v[j];
            dd[j] += (u[j] - v[j]) * (u[j] - v[j]);
        }
    }
    *out = (struct dots){0};
    for (int j = 0; j < 8; j++)
        *out = (struct dots){out->xx + xx[j], out->xy + xy[j], out->yy + yy[j], out->dd + dd[j]};
}

/* da = cx x + cy y, in double: near the minimum the two cancel */
RT_SIMD static void combine(float *restrict da, const float *restrict x, const float *restrict y, double cx, double cy, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        da[j] = (float)(cx * x[j] + cy * y[j]);
}

static void feature_rows(void *ctx, int64_t i0, int64_t i1, int worker)
{
    const struct rt_feature_loss_args *a = ctx;
    (void)worker;
    for (int64_t i = i0; i < i1; i++) {
        const float *x = (const float *)a->a + i * a->cols, *y = a->b + i * a->cols;
        struct dots s;
        row_dots(x, y, a->cols, &s);
        const double norm = sqrt(s.xx) * sqrt(s.yy); /* 0: no direction to compare, loss 1 and no gradient */
        const double cosine = norm > 0 ? s.xy / norm : 0, mse = 2 * a->w / (double)a->cols;
        if (a->loss != NULL)
            a->loss[i] = a->cosine ? 1 - cosine : s.dd / (double)a->cols;
        if (a->da == NULL)
            continue;
        float *da = (float *)a->da + i * a->cols;
        if (!a->cosine)
            combine(da, x, y, mse, -mse, a->cols);
        else if (norm > 0)
            combine(da, x, y, a->w * cosine / s.xx, -a->w / norm, a->cols);
        else
            memset(da, 0, (size_t)a->cols * sizeof *da);
    }
}

enum rt_status rt_cpu_feature_loss(struct rt_dev *dev, struct rt_queue *queue, const struct rt_feature_loss_args *a,
                                   struct rt_err *err)
{
    struct rt_feature_loss_args args = *a;
    (void)queue;
    (void)err;
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->cols * 4), feature_rows, &args);
    return RT_OK;
}
