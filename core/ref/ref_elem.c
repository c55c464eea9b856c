/* Rows and elements: embedding, gating, gather and scatter, optimiser. */
#include "core/ref/ref.h"

static enum rt_status check_rows(const char *op, const int32_t *ids, int64_t n, int64_t rows, struct rt_err *err)
{
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= rows)
            return rt_fail(err, RT_SHAPE, "%s: id %d at row %lld, expected 0 .. %lld", op, (int)ids[i], (long long)i,
                           (long long)rows - 1);
    return RT_OK;
}

REF_OP(embed_fwd)
{
    enum rt_status st = REF(weight_check)(a->table, "embed_fwd", a->table->rows, a->cols, err);
    for (int64_t i = 0; st == RT_OK && i < a->n; i++) {
        const int32_t id = a->ids[i] < 0 && a->drawn != NULL ? a->drawn[-1 - a->ids[i]] : a->ids[i];
        st = check_rows("embed_fwd", &id, 1, a->table->rows, err);
        if (st != RT_OK)
            break;
        real *out = (real *)a->out + i * a->cols;
        const real *row = REF(weight_row)(a->table, id, out);
        if (row != out)
            memcpy(out, row, (size_t)a->cols * sizeof *out);
    }
    return st;
}

REF_OP(embed_bwd)
{
    const enum rt_status st = check_rows("embed_bwd", a->ids, a->n, a->rows, err);
    if (st != RT_OK)
        return st;
    for (int64_t i = 0; i < a->n; i++)
        for (int64_t j = 0; j < a->cols; j++)
            ((real *)a->dtable)[a->ids[i] * a->cols + j] += ((const real *)a->dy)[i * a->cols + j];
    return RT_OK;
}

REF_OP(swiglu_fwd)
{
    enum rt_status st;
    real *h = NULL;
    const int64_t ld = ref_ld(a->ld, a->I);

    if (a->hq.data != NULL && a->I % REF_BLOCK != 0)
        RT_FAIL(err, SHAPE, "swiglu_fwd: %lld columns; the e4m3 form needs a multiple of %d", (long long)a->I, REF_BLOCK);
    RT_TRY(rt_alloc((size_t)a->I, sizeof(real), "scratch of swiglu_fwd", &h, err));
    for (int64_t t = 0; t < a->n; t++) {
        const real *gate = (const real *)a->gate + t * ld, *up = (const real *)a->up + t * ld;
        for (int64_t j = 0; j < a->I; j++)
            h[j] = (real)(gate[j] * ref_sigmoid(gate[j]) * up[j]);
        if (a->h != NULL)
            memcpy((real *)a->h + t * a->I, h, (size_t)a->I * sizeof *h);
        if (a->hq.data != NULL)
            REF(quant_row)(h, &a->hq, t, a->n, a->I, a->pow2);
    }
out:
    rt_free(h);
    return st;
}

REF_OP(swiglu_bwd)
{
    const int64_t ld = ref_ld(a->ld, a->I);
    for (int64_t t = 0; t < a->n; t++)
        for (int64_t j = 0; j < a->I; j++) {
            const double g = ((const real *)a->gate)[t * ld + j], u = ((const real *)a->up)[t * ld + j];
            const double dh = ((const real *)a->dh)[t * a->I + j], s = ref_sigmoid(g);
            ((real *)a->dgate)[t * ld + j] = (real)(dh * u * s * (1 + g * (1 - s)));
            ((real *)a->dup)[t * ld + j] = (real)(dh * g * s);
            if (a->h != NULL) /* may be dh */
                ((real *)a->h)[t * a->I + j] = (real)(g * s * u);
        }
    return RT_OK;
}

REF_OP(gated_fwd)
{
    const struct rt_linear_fwd_args product = {.x = {.data = (void *)(uintptr_t)a->x}, .w = a->w, .bias = a->bias, .y = a->gate_up, .n = a->n, .K = a->K,
                                               .N = 2 * a->I, .row_exact = a->row_exact};
    const struct rt_swiglu_fwd_args gate = {.gate = a->gate_up, .up = (const real *)a->gate_up + a->I, .ld = 2 * a->I, .h = a->h, .n = a->n, .I = a->I};
    const enum rt_status st = REF(linear_fwd)(dev, queue, &product, err);
    return st == RT_OK && a->h != NULL ? REF(swiglu_fwd)(dev, queue, &gate, err) : st;
}

REF_OP(gated_bwd)
{
    const struct rt_linear_dgrad_args product = {.dy = a->dy, .w = a->w, .dx = a->dh, .n = a->n, .K = a->I, .N = a->N};
    const struct rt_swiglu_bwd_args gate = {.gate = a->gate_up, .up = (const real *)a->gate_up + a->I, .dh = a->dh, .ld = 2 * a->I, .dgate = a->d_gate_up,
                                            .dup = (real *)a->d_gate_up + a->I, .h = a->h, .n = a->n, .I = a->I};
    const enum rt_status st = REF(linear_dgrad)(dev, queue, &product, err);
    return st == RT_OK ? REF(swiglu_bwd)(dev, queue, &gate, err) : st;
}

REF_OP(gather)
{
    for (int64_t i = 0; i < a->n; i++)
        memcpy((real *)a->out + i * a->cols, (const real *)a->x + a->index[i] * a->cols, (size_t)a->cols * sizeof(real));
    return RT_OK;
}

REF_OP(scatter)
{
    for (int64_t i = 0; i < a->n; i++)
        for (int64_t j = 0; j < a->cols; j++) {
            real *x = (real *)a->x + a->index[i] * a->cols + j;
            const real y = ((const real *)a->y)[i * a->cols + j];
            *x = a->accumulate ? *x + y : y;
        }
    return RT_OK;
}

REF_OP(sumsq)
{
    *a->out = ref_dot(a->x, a->x, a->n);
    return RT_OK;
}

REF_OP(axpy)
{
    const real *x = a->x;
    real *y = a->y;
    for (int64_t i = 0; i < a->n; i++)
        y[i] = (real)(x != NULL ? y[i] + a->a * x[i] : a->a * y[i]);
    return RT_OK;
}

REF_OP(adamw)
{
    real *p = a->p, *m = a->m, *v = a->v;
    const real *grad = a->grad;
    const double c1 = 1 - pow(a->beta1, (double)a->step), c2 = 1 - pow(a->beta2, (double)a->step);
    int run = 0;
    if (a->low != NULL || a->moment != REF_ACT)
        return rt_fail(err, RT_UNSUPPORTED, "adamw: moments of type %s%s; this backend's are %s", rt_dtype_name(a->moment),
                       a->low != NULL ? " and split parameters" : "", rt_dtype_name(REF_ACT));
    for (int64_t i = 0; i < a->n; i++) {
        const double g = grad[i] * a->grad_scale;
        while (run < a->n_decay && i >= a->decay_end[run])
            run++;
        const double decay = a->decay_end == NULL || (run < a->n_decay && run % 2 == 0) ? a->decay : 0;
        m[i] = (real)(a->beta1 * m[i] + (1 - a->beta1) * g);
        v[i] = (real)(a->beta2 * v[i] + (1 - a->beta2) * g * g);
        p[i] = (real)(p[i] - a->lr * (m[i] / c1 / (sqrt(v[i] / c2) + a->eps) + decay * p[i]));
    }
    return RT_OK;
}

REF_OP(convert)
{
    for (int64_t i = 0; i < a->n; i++) {
        if (a->to_f32)
            ((float *)a->dst)[i] = (float)((const real *)a->src)[i];
        else
            ((real *)a->dst)[i] = ((const float *)a->src)[i];
    }
    return RT_OK;
}
