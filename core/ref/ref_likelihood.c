/* Likelihoods of the head: log-probabilities of a label and of a set of ids, and the gradient of their weighted sum,
 *   dL/dz_v = (w_label + w_set) q_v - w_label [v = label] - w_set [v in set] q_v / q(set).
 */
#include "core/ref/ref.h"

static double lse_over(const double *z, int64_t n, const uint8_t *in_set)
{
    double top = -INFINITY, sum = 0;
    for (int64_t v = 0; v < n; v++)
        if (in_set == NULL || in_set[v] != 0)
            top = fmax(top, z[v]);
    if (top == -INFINITY)
        return top;
    for (int64_t v = 0; v < n; v++)
        if (in_set == NULL || in_set[v] != 0)
            sum += exp(z[v] - top);
    return top + log(sum);
}

/* z becomes dL/dz of the row. */
static void likelihood_row(const struct rt_head_likelihood_args *a, int64_t i, double *z)
{
    const int64_t label = a->label != NULL ? a->label[i] : -1;
    const double lse = lse_over(z, a->n_ids, NULL), lse_set = a->in_set != NULL ? lse_over(z, a->n_ids, a->in_set) : lse;
    const bool has_set = a->in_set != NULL && lse_set > -INFINITY;
    const double w_label = label >= 0 && a->w_label != NULL ? a->w_label[i] : 0, w_set = has_set && a->w_set != NULL ? a->w_set[i] : 0;
    if (a->label_logp != NULL)
        a->label_logp[i] = label >= 0 ? z[label] - lse : 0;
    if (a->set_logp != NULL)
        a->set_logp[i] = lse_set - lse;
    for (int64_t v = 0; v < a->n_ids; v++) {
        const double set = has_set && a->in_set[v] != 0 ? w_set * exp(z[v] - lse_set) : 0;
        z[v] = (w_label + w_set) * exp(z[v] - lse) - set;
    }
    if (label >= 0)
        z[label] -= w_label;
}

static enum rt_status check(const struct rt_head_likelihood_args *a, struct rt_err *err)
{
    if (a->n_ids < 1 || a->n_ids > a->w->rows)
        return rt_fail(err, RT_SHAPE, "head_likelihood: %lld ids from a head of %lld rows", (long long)a->n_ids, (long long)a->w->rows);
    for (int64_t i = 0; a->label != NULL && i < a->n; i++)
        if (a->label[i] >= a->n_ids)
            return rt_fail(err, RT_SHAPE, "head_likelihood: label %d at row %lld, expected below %lld", (int)a->label[i], (long long)i,
                           (long long)a->n_ids);
    return REF(weight_check)(a->w, "head_likelihood", a->w->rows, a->H, err);
}

REF_OP(head_likelihood)
{
    enum rt_status st;
    real *w_row = NULL;
    double *z = NULL, *dx = NULL;
    RT_TRY(check(a, err));
    RT_TRY(rt_alloc((size_t)a->H, sizeof *w_row, "a row of weights", &w_row, err));
    RT_TRY(rt_alloc((size_t)a->n_ids, sizeof *z, "a row of logits", &z, err));
    RT_TRY(rt_alloc((size_t)a->H, sizeof *dx, "a row of gradients", &dx, err));
    for (int64_t i = 0; i < a->n; i++) {
        const real *x = (const real *)a->x + i * a->H;
        for (int64_t v = 0; v < a->n_ids; v++)
            z[v] = ref_dot(x, REF(weight_row)(a->w, v, w_row), a->H);
        likelihood_row(a, i, z);
        if (a->dx == NULL && a->dw == NULL)
            continue;
        memset(dx, 0, (size_t)a->H * sizeof *dx);
        for (int64_t v = 0; v < a->n_ids; v++) {
            const real *w = REF(weight_row)(a->w, v, w_row);
            real *dw = a->dw != NULL ? (real *)a->dw + v * a->H : NULL;
            for (int64_t h = 0; h < a->H; h++) {
                dx[h] += z[v] * w[h];
                if (dw != NULL)
                    dw[h] = (real)(dw[h] + z[v] * x[h]);
            }
        }
        for (int64_t h = 0; h < a->H && a->dx != NULL; h++)
            ((real *)a->dx)[i * a->H + h] = (real)dx[h];
    }
out:
    rt_free(w_row);
    rt_free(z);
    rt_free(dx);
    return st;
}
