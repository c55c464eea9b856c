/* Products with weights. */
#include "core/ref/ref.h"

/* Sum over blocks of (code . code) * x scale * weight scale; a block's code sum is exact in double, the rest is float32. */
static float dot_e4m3(const struct rt_act *x, int64_t row, int64_t n, const struct rt_weight *w, int64_t out, int64_t K)
{
    const uint8_t *xc = (const uint8_t *)x->data + row * K, *wc = (const uint8_t *)w->data + out * K;
    const float *w_scale = w->scale_inv + out / REF_BLOCK * (K / REF_BLOCK);
    float sum = 0;
    for (int64_t b = 0; b < K / REF_BLOCK; b++) {
        double block = 0;
        for (int64_t j = b * REF_BLOCK; j < (b + 1) * REF_BLOCK; j++)
            block += (double)rt_e4m3_table[xc[j]] * (double)rt_e4m3_table[wc[j]];
        sum += (float)block * x->scale[b * n + row] * w_scale[b];
    }
    return sum;
}

double REF(dot_row)(const struct rt_act *x, int64_t ldx, int64_t row, int64_t n, const struct rt_weight *w, int64_t out,
                    const real *w_row, int64_t K)
{
    if (x->scale != NULL)
        return dot_e4m3(x, row, n, w, out, K);
    return ref_dot((const real *)x->data + row * ldx, w_row, K);
}

REF_OP(linear_fwd)
{
    enum rt_status st;
    const real *bias = NULL;
    real *bias_own = NULL, *tmp = NULL;
    const int64_t ldx = ref_ld(a->ldx, a->K), ldy = ref_ld(a->ldy, a->N);

    RT_TRY(REF(weight_check)(a->w, "linear_fwd", a->N, a->K, err));
    RT_TRY(REF(act_check)(&a->x, a->w, "linear_fwd", a->K, err));
    RT_TRY(REF(weight_vec)(a->bias, a->N, &bias, &bias_own, err));
    RT_TRY(rt_alloc((size_t)a->K, sizeof(real), "a row of weights", &tmp, err));
    for (int64_t o = 0; o < a->N; o++) {
        const real *w_row = a->x.scale == NULL ? REF(weight_row)(a->w, o, tmp) : NULL;
        for (int64_t t = 0; t < a->n; t++) {
            const double add = a->add != NULL ? (double)((const real *)a->add)[t * a->N + o] : 0.0;
            const double y = REF(dot_row)(&a->x, ldx, t, a->n, a->w, o, w_row, a->K) + (bias != NULL ? (double)bias[o] : 0.0) + add;
            if (a->y_f32) {
                float *at = (float *)a->y + t * ldy + o;
                *at = (float)(a->accumulate ? *at + y : y);
            } else {
                real *at = (real *)a->y + t * ldy + o;
                *at = (real)(a->accumulate ? *at + y : y);
            }
        }
    }
out:
    rt_free(bias_own);
    rt_free(tmp);
    return st;
}

REF_OP(linear_dgrad)
{
    enum rt_status st;
    real *tmp = NULL;
    double *sum = NULL; /* one row of dx */
    const int64_t lddy = ref_ld(a->lddy, a->N);

    RT_TRY(REF(weight_check)(a->w, "linear_dgrad", a->N, a->K, err));
    RT_TRY(rt_alloc((size_t)a->K, sizeof(real), "a row of weights", &tmp, err));
    RT_TRY(rt_alloc((size_t)a->K, sizeof *sum, "a row of sums", &sum, err));
    for (int64_t t = 0; t < a->n; t++) {
        real *dx = (real *)a->dx + t * a->K;
        for (int64_t j = 0; j < a->K; j++)
            sum[j] = a->accumulate ? (double)dx[j] : 0.0;
        for (int64_t o = 0; o < a->N; o++) {
            const real *w_row = REF(weight_row)(a->w, o, tmp);
            const double dy = ((const real *)a->dy)[t * lddy + o];
            for (int64_t j = 0; j < a->K; j++)
                sum[j] += dy * w_row[j];
        }
        for (int64_t j = 0; j < a->K; j++)
            dx[j] = (real)sum[j];
    }
out:
    rt_free(tmp);
    rt_free(sum);
    return st;
}

REF_OP(linear_wgrad)
{
    enum rt_status st;
    double *sum = NULL; /* one row of dw */
    const int64_t lddy = ref_ld(a->lddy, a->N), ldx = ref_ld(a->ldx, a->K);

    RT_TRY(rt_alloc((size_t)a->K, sizeof *sum, "a row of sums", &sum, err));
    for (int64_t o = 0; o < a->N; o++) {
        real *dw = (real *)a->dw + o * a->K;
        double bias = 0;
        for (int64_t j = 0; j < a->K; j++)
            sum[j] = a->first ? 0.0 : (double)dw[j];
        for (int64_t t = 0; t < a->n; t++) {
            const double dy = ((const real *)a->dy)[t * lddy + o];
            const real *x = (const real *)a->x + t * ldx;
            bias += dy;
            for (int64_t j = 0; j < a->K; j++)
                sum[j] += dy * x[j];
        }
        for (int64_t j = 0; j < a->K; j++)
            dw[j] = (real)sum[j];
        if (a->db != NULL)
            ((real *)a->db)[o] = (real)((a->first ? 0.0 : (double)((real *)a->db)[o]) + bias);
    }
out:
    rt_free(sum);
    return st;
}

REF_OP(head_matmul)
{
    enum rt_status st;
    real *tmp = NULL;
    double *sum = NULL;
    const int64_t dx = a->transpose ? a->R : a->d, dy = a->transpose ? a->d : a->R;
    const int64_t x_head = ref_ld(a->x_head, dx), y_head = ref_ld(a->y_head, dy);
    const int64_t x_ld = ref_ld(a->x_ld, a->nh * x_head), y_ld = ref_ld(a->y_ld, a->nh * y_head);

    RT_TRY(REF(weight_check)(a->w, "head_matmul", (int64_t)a->nh * a->head_rows, a->R, err));
    if (a->row0 < 0 || a->d < 0 || a->row0 + a->d > a->head_rows)
        RT_FAIL(err, SHAPE, "head_matmul: rows %d .. %d of a head that has %d", a->row0, a->row0 + a->d, a->head_rows);
    RT_TRY(rt_alloc((size_t)a->R, sizeof(real), "a row of weights", &tmp, err));
    RT_TRY(rt_alloc((size_t)a->R, sizeof *sum, "a row of sums", &sum, err));
    for (int64_t t = 0; t < a->n; t++)
        for (int h = 0; h < a->nh; h++) {
            const real *x = (const real *)a->x + t * x_ld + h * x_head;
            real *y = (real *)a->y + t * y_ld + h * y_head;
            memset(sum, 0, (size_t)a->R * sizeof *sum);
            for (int i = 0; i < a->d; i++) {
                const real *w_row = REF(weight_row)(a->w, (int64_t)h * a->head_rows + a->row0 + i, tmp);
                if (a->transpose)
                    y[i] = (real)ref_dot(x, w_row, a->R);
                else
                    for (int r = 0; r < a->R; r++)
                        sum[r] += (double)x[i] * w_row[r];
            }
            for (int r = 0; r < a->R && !a->transpose; r++)
                y[r] = (real)sum[r];
        }
out:
    rt_free(tmp);
    rt_free(sum);
    return st;
}
