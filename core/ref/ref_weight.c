/* Weights: borrowed bytes, converted row by row. */
#include <stdio.h>

#include "core/ref/ref.h"

static bool is_real(const struct rt_weight *w)
{
    return w->dtype == REF_ACT;
}

const real *REF(weight_row)(const struct rt_weight *w, int64_t row, real *tmp)
{
    const int64_t at = row * w->cols;
    if (is_real(w))
        return (const real *)w->data + at;
    for (int64_t j = 0; j < w->cols; j++) {
        float v = 0;
        switch (w->dtype) {
        case RT_F32: v = ((const float *)w->data)[at + j]; break;
        case RT_F16: v = rt_f16_to_f32(((const uint16_t *)w->data)[at + j]); break;
        case RT_BF16: v = rt_bf16_to_f32(((const uint16_t *)w->data)[at + j]); break;
        default: { /* E4M3: weight_load lets no other in */
            const int64_t blocks = (w->cols + REF_BLOCK - 1) / REF_BLOCK;
            v = rt_e4m3_table[((const uint8_t *)w->data)[at + j]] * w->scale_inv[row / REF_BLOCK * blocks + j / REF_BLOCK];
        }
        }
        tmp[j] = v;
    }
    return tmp;
}

enum rt_status REF(weight_vec)(const struct rt_weight *w, int64_t n, const real **out, real **own, struct rt_err *err)
{
    *out = NULL;
    *own = NULL;
    if (w == NULL)
        return RT_OK;
    if (w->rows * w->cols != n || (w->rows != 1 && w->cols != 1))
        return rt_fail(err, RT_SHAPE, "weight '%s' is [%lld, %lld], expected a vector of %lld", w->name, (long long)w->rows,
                       (long long)w->cols, (long long)n);
    if (is_real(w)) {
        *out = w->data;
        return RT_OK;
    }
    const enum rt_status st = rt_alloc((size_t)n, sizeof(real), "a vector of weights", own, err);
    if (st != RT_OK)
        return st;
    for (int64_t row = 0; row < w->rows; row++)
        REF(weight_row)(w, row, *own + row * w->cols);
    *out = *own;
    return RT_OK;
}

enum rt_status REF(weight_check)(const struct rt_weight *w, const char *op, int64_t rows, int64_t cols, struct rt_err *err)
{
    if (w->rows == rows && w->cols == cols)
        return RT_OK;
    return rt_fail(err, RT_SHAPE, "%s: weight '%s' is [%lld, %lld], expected [%lld, %lld]", op, w->name, (long long)w->rows,
                   (long long)w->cols, (long long)rows, (long long)cols);
}

enum rt_status REF(act_check)(const struct rt_act *x, const struct rt_weight *w, const char *op, int64_t K, struct rt_err *err)
{
    if (x->scale == NULL)
        return RT_OK;
    if (w->dtype != RT_E4M3)
        return rt_fail(err, RT_UNSUPPORTED, "%s: weight '%s' is %s; a product with e4m3 activations needs an e4m3 weight", op,
                       w->name, rt_dtype_name(w->dtype));
    if (K % REF_BLOCK != 0)
        return rt_fail(err, RT_SHAPE, "%s: weight '%s' has %lld columns; e4m3 activations need a multiple of %d", op, w->name,
                       (long long)K, REF_BLOCK);
    return RT_OK;
}
