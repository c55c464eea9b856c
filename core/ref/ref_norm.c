/* Normalisation, quantisation, rotary positions. */
#include "core/ref/ref.h"
#include "core/rms.h"

/* The least power of two that is not below s, a positive normal number. */
static float power_above(float s)
{
    int e;
    const float m = frexpf(s, &e); /* s = m 2^e, 0.5 <= m < 1 */
    return ldexpf(1, m > 0.5f ? e : e - 1);
}

float REF(quant_block)(const real *x, bool pow2, uint8_t *code)
{
    float amax = 0;
    for (int j = 0; j < REF_BLOCK; j++)
        amax = fmaxf(amax, fabsf((float)x[j]));
    const float exact = fmaxf(amax, 1e-12f) / 448.0f, s = pow2 ? power_above(exact) : exact;
    for (int j = 0; j < REF_BLOCK; j++)
        code[j] = rt_f32_to_e4m3((float)x[j] / s);
    return s;
}

void REF(quant_row)(const real *x, const struct rt_act *q, int64_t row, int64_t n, int64_t cols, bool pow2)
{
    for (int64_t b = 0; b < cols / REF_BLOCK; b++)
        q->scale[b * n + row] = REF(quant_block)(x + b * REF_BLOCK, pow2, (uint8_t *)q->data + row * cols + b * REF_BLOCK);
}

static enum rt_status check_blocks(const char *op, int64_t cols, struct rt_err *err)
{
    if (cols % REF_BLOCK == 0)
        return RT_OK;
    return rt_fail(err, RT_SHAPE, "%s: %lld columns; the e4m3 form needs a multiple of %d", op, (long long)cols, REF_BLOCK);
}

REF_OP(quant)
{
    const enum rt_status st = check_blocks("quant", a->cols, err);
    if (st != RT_OK)
        return st;
    const int64_t ldx = ref_ld(a->ldx, a->cols);
    for (int64_t t = 0; t < a->n; t++)
        REF(quant_row)((const real *)a->x + t * ldx, &a->q, t, a->n, a->cols, a->pow2);
    return RT_OK;
}

REF_OP(encode_rows)
{
    for (int64_t t = 0; t < a->n; t++) {
        const float *x = a->x + t * a->cols;
        float amax = 1e-12f;
        for (int64_t j = 0; j < a->cols; j++)
            amax = fmaxf(amax, fabsf(x[j]));
        a->scale[t] = amax / 448.0f;
        for (int64_t j = 0; j < a->cols; j++)
            a->code[t * a->cols + j] = rt_f32_to_e4m3(x[j] / a->scale[t]);
    }
    return RT_OK;
}

/* sqrt(mean(x^2) + eps): the float32 one has the rounding that e4m3 codes depend on. */
static real rms_of(const real *x, int64_t n, float eps)
{
    if (REF_IS64)
        return (real)sqrt(ref_dot(x, x, n) / (double)n + eps);
    return rt_rms_f32((const void *)x, n, eps);
}

static double rstd_of(const real *s, int64_t cols, float eps)
{
    return 1 / (double)rms_of(s, cols, eps);
}

REF_OP(norm_fwd)
{
    enum rt_status st;
    const real *w = NULL;
    real *w_own = NULL, *s = NULL, *y = NULL;
    const int64_t ldx = ref_ld(a->ldx, a->cols), ldy = ref_ld(a->ldy, a->cols);

    if (a->yq.data != NULL)
        RT_TRY(check_blocks("norm_fwd", a->cols, err));
    RT_TRY(REF(weight_vec)(a->w, a->cols, &w, &w_own, err));
    RT_TRY(rt_alloc((size_t)a->cols, sizeof(real), "scratch of norm_fwd", &s, err));
    RT_TRY(rt_alloc((size_t)a->cols, sizeof(real), "scratch of norm_fwd", &y, err));
    for (int64_t t = 0; t < a->n; t++) {
        const real *x = (const real *)a->x + t * ldx;
        const real *add = a->add != NULL ? (const real *)a->add + t * a->cols : NULL;
        for (int64_t j = 0; j < a->cols; j++)
            s[j] = add != NULL ? x[j] + add[j] : x[j];
        const real rms = rms_of(s, a->cols, a->eps);
        for (int64_t j = 0; j < a->cols; j++)
            y[j] = w != NULL ? s[j] / rms * w[j] : s[j] / rms;
        if (a->sum != NULL)
            memcpy((real *)a->sum + t * a->cols, s, (size_t)a->cols * sizeof *s);
        if (a->y != NULL)
            memcpy((real *)a->y + t * ldy, y, (size_t)a->cols * sizeof *y);
        if (a->yq.data != NULL)
            REF(quant_row)(y, &a->yq, t, a->n, a->cols, a->pow2);
        if (a->rstd != NULL)
            a->rstd[t] = (float)(1 / (double)rms);
    }
out:
    rt_free(w_own);
    rt_free(s);
    rt_free(y);
    return st;
}

/* dx (= or +=) r (g - x r^2 mean(g x)) with g = dy w; dw += dy x r. dx may be dy. */
static void norm_row_bwd(const real *dy, const real *x, const real *w, double r, real *dx, real *dw, int64_t cols, bool accumulate)
{
    double gx = 0;
    for (int64_t j = 0; j < cols; j++)
        gx += (double)dy[j] * (w != NULL ? (double)w[j] : 1.0) * x[j];
    const double c = r * r * gx / (double)cols;
    for (int64_t j = 0; j < cols; j++) {
        const double g = (double)dy[j] * (w != NULL ? (double)w[j] : 1.0);
        if (dw != NULL)
            dw[j] = (real)(dw[j] + dy[j] * r * x[j]);
        dx[j] = (real)((accumulate ? (double)dx[j] : 0.0) + r * (g - x[j] * c));
    }
}

/* The float that a forward saved; what it stands for where there is none, and in float64. */
static double saved_rstd(const float *rstd, int64_t at, const real *x, int64_t cols, float eps)
{
    return rstd != NULL && !REF_IS64 ? rstd[at] : rstd_of(x, cols, eps);
}

static void begin_dw(real *dw, int64_t n, bool first)
{
    if (dw != NULL && first)
        memset(dw, 0, (size_t)n * sizeof *dw);
}

REF_OP(norm_bwd)
{
    const real *w;
    real *w_own;
    enum rt_status st = REF(weight_vec)(a->w, a->cols, &w, &w_own, err);
    if (st == RT_OK && a->y != NULL)
        st = REF(norm_fwd)(dev, queue, &(struct rt_norm_fwd_args){.x = a->x, .w = a->w, .y = a->y, .n = a->n, .cols = a->cols, .eps = a->eps}, err);
    if (st != RT_OK) {
        rt_free(w_own);
        return st;
    }
    begin_dw(a->dw, a->cols, a->first);
    for (int64_t t = 0; t < a->n; t++) {
        const real *x = (const real *)a->x + t * a->cols;
        norm_row_bwd((const real *)a->dy + t * a->cols, x, w, saved_rstd(a->rstd, t, x, a->cols, a->eps),
                     (real *)a->dx + t * a->cols, a->dw, a->cols, a->accumulate);
    }
    rt_free(w_own);
    return RT_OK;
}

/* x[lo], x[hi] turned by the angle of (cos, sin). */
static void turn(real *x, int64_t lo, int64_t hi, double c, double s)
{
    const double u = x[lo], v = x[hi];
    x[lo] = (real)(u * c - v * s);
    x[hi] = (real)(u * s + v * c);
}

static void turn_row(real *x, const float *cos_t, const float *sin_t, int dim, bool interleaved, bool inverse)
{
    for (int i = 0; i < dim / 2; i++) {
        const double s = inverse ? -(double)sin_t[i] : (double)sin_t[i];
        if (interleaved)
            turn(x, 2 * i, 2 * i + 1, cos_t[i], s);
        else
            turn(x, i, i + dim / 2, cos_t[i], s);
    }
}

REF_OP(rope)
{
    const int64_t head_ld = ref_ld(a->head_ld, a->dim), ld = ref_ld(a->ld, a->heads * head_ld);
    for (int64_t t = 0; t < a->n; t++) {
        const int64_t at = (int64_t)a->position[t] * (a->dim / 2);
        for (int h = 0; h < a->heads; h++)
            turn_row((real *)a->x + t * ld + h * head_ld, a->cos + at, a->sin + at, a->dim, a->interleaved, a->inverse);
    }
    return RT_OK;
}

REF_OP(headnorm_rope_fwd)
{
    const real *w;
    real *w_own;
    const enum rt_status st = REF(weight_vec)(a->w, a->d, &w, &w_own, err);
    if (st != RT_OK)
        return st;
    const int64_t ldx = ref_ld(a->ldx, (int64_t)a->heads * a->d), ldy = ref_ld(a->ldy, (int64_t)a->heads * a->d);
    for (int64_t t = 0; t < a->n; t++) {
        const int64_t at = (int64_t)a->position[t] * (a->d / 2);
        for (int h = 0; h < a->heads; h++) {
            const real *x = (const real *)a->x + t * ldx + (int64_t)h * a->d;
            real *y = (real *)a->y + t * ldy + (int64_t)h * a->d;
            const double rstd = w != NULL ? rstd_of(x, a->d, a->eps) : 1;
            for (int j = 0; j < a->d; j++)
                y[j] = w != NULL ? (real)(x[j] * rstd * w[j]) : x[j];
            turn_row(y, a->cos + at, a->sin + at, a->d, false, false);
            if (a->rstd != NULL)
                a->rstd[t * a->heads + h] = (float)rstd;
        }
    }
    rt_free(w_own);
    return RT_OK;
}

REF_OP(headnorm_rope_bwd)
{
    const real *w;
    real *w_own;
    const enum rt_status st = REF(weight_vec)(a->w, a->d, &w, &w_own, err);
    if (st != RT_OK)
        return st;
    const int64_t dense = (int64_t)a->heads * a->d;
    const int64_t lddy = ref_ld(a->lddy, dense), ldx = ref_ld(a->ldx, dense), lddx = ref_ld(a->lddx, dense);
    begin_dw(w != NULL ? a->dw : NULL, a->d, a->first);
    for (int64_t t = 0; t < a->n; t++) {
        const int64_t at = (int64_t)a->position[t] * (a->d / 2);
        for (int h = 0; h < a->heads; h++) {
            const real *dy = (const real *)a->dy + t * lddy + (int64_t)h * a->d;
            real *dx = (real *)a->dx + t * lddx + (int64_t)h * a->d;
            memmove(dx, dy, (size_t)a->d * sizeof *dx);
            turn_row(dx, a->cos + at, a->sin + at, a->d, false, true);
            if (w == NULL)
                continue;
            const real *x = (const real *)a->x + t * ldx + (int64_t)h * a->d;
            norm_row_bwd(dx, x, w, saved_rstd(a->rstd, t * a->heads + h, x, a->d, a->eps), dx, a->dw, a->d, false);
        }
    }
    begin_dw(a->db, a->n_db, a->first);
    for (int64_t j = 0; a->db != NULL && j < a->n_db; j++) {
        double sum = ((real *)a->db)[j];
        for (int64_t t = 0; t < a->n; t++)
            sum += ((const real *)a->dx)[t * lddx + j];
        ((real *)a->db)[j] = (real)sum;
    }
    rt_free(w_own);
    return RT_OK;
}
