/* The loss of the head, and the feature loss.
 *
 * One row, s = z/T, q = softmax(s), K the stored ids, M = mass of the teacher's buckets (1, less the rounding of a dropped
 * one). Bucket:  kl/T^2 = sum_K p (log p - log q) + P_R (log P_R - log Q_R), log Q_R = lse(s off K) - lse(s);
 *                dkl/dz = T (M q - p) on K, T (M q - P_R exp(s - lse(s off K))) off it.
 * Renorm: p and q restricted to K and normalised there; dkl/dz = T (q - p) on K, 0 off it.
 * Differences of logs only, so that a confident student (q -> 1, Q_R -> 0) loses nothing to cancellation.
 */
#include "core/ref/ref.h"

#include "core/top_ids.h"

enum { TILE = 16 }; /* rows that share one conversion of the head's rows */

#define P_R_MIN 1e-7 /* a smaller teacher tail is rounding of the stored float32 log-probabilities */

struct tile {
    real *w_row;   /* [H] */
    double *z;     /* [TILE, V] logits, then dL/dz */
    double *dx;    /* [TILE, H] */
    double *dw;    /* [H] one row's share of this tile */
    uint8_t *in_k; /* [V] */
};

/* log sum exp of z * inv_temp over the ids with in_k == which; which < 0: over all. -inf for none. */
static double lse_over(const double *z, int64_t V, double inv_temp, const uint8_t *in_k, int which)
{
    double top = -INFINITY, sum = 0;
    for (int64_t v = 0; v < V; v++)
        if (which < 0 || in_k[v] == which)
            top = fmax(top, z[v] * inv_temp);
    if (top == -INFINITY)
        return top;
    for (int64_t v = 0; v < V; v++)
        if (which < 0 || in_k[v] == which)
            sum += exp(z[v] * inv_temp - top);
    return top + log(sum);
}

/* What the KL part of a row needs. Gradient: c_all exp(s - lse_all) on all ids, c_on exp(s - lse_on) on K, c_off exp(s - lse_off)
 * off K, and -c_p p on K; each times w_kl T. */
struct kl_row {
    double kl, teacher_mass, student_mass;
    double lse_all, lse_on, lse_off, c_all, c_on, c_off, c_p;
};

static void kl_of_row(const struct rt_head_loss_args *a, int64_t i, const double *z, const uint8_t *in_k, struct kl_row *r)
{
    const float *logp = a->top_logp + i * a->k;
    const double inv = 1 / a->T;
    *r = (struct kl_row){.lse_all = lse_over(z, a->V, inv, in_k, -1), .lse_on = lse_over(z, a->V, inv, in_k, 1),
                         .lse_off = lse_over(z, a->V, inv, in_k, 0)};
    for (int j = 0; j < a->k; j++)
        r->teacher_mass += rt_head_loss_id(a, i, j) >= 0 ? exp(logp[j]) : 0;
    r->student_mass = exp(r->lse_on - r->lse_all);
    const bool renorm = a->tail == RT_TAIL_RENORM;
    if (renorm && !(r->teacher_mass > 0))
        return;
    const double log_mass = renorm ? log(r->teacher_mass) : 0, lse = renorm ? r->lse_on : r->lse_all;
    for (int j = 0; j < a->k; j++) {
        const int32_t id = rt_head_loss_id(a, i, j);
        const double p = id >= 0 ? exp(logp[j] - log_mass) : 0;
        if (p > 0)
            r->kl += p * (logp[j] - log_mass - (z[id] * inv - lse));
    }
    r->c_p = 1 / exp(log_mass);
    if (renorm) {
        r->c_on = 1;
    } else {
        double P_R = 1 - r->teacher_mass;
        if (P_R < P_R_MIN || r->lse_off == -INFINITY)
            P_R = 0;
        else
            r->kl += P_R * (log(P_R) - (r->lse_off - r->lse_all));
        r->c_all = r->teacher_mass + P_R;
        r->c_off = -P_R;
    }
    r->kl *= a->T * a->T;
}

/* z becomes dL/dz of the row. */
static void gradient_of_row(const struct rt_head_loss_args *a, int64_t i, double *z, const uint8_t *in_k, double lse_1,
                            const struct kl_row *r, bool has_kl)
{
    const double c = a->w_kl * a->T, inv = 1 / a->T;
    const bool has_ce = a->label[i] >= 0;
    for (int64_t v = 0; v < a->V; v++) {
        double g = has_ce ? a->w_ce * exp(z[v] - lse_1) : 0;
        if (has_kl && r->c_all != 0)
            g += c * r->c_all * exp(z[v] * inv - r->lse_all);
        if (has_kl && in_k[v] && r->c_on != 0)
            g += c * r->c_on * exp(z[v] * inv - r->lse_on);
        if (has_kl && !in_k[v] && r->c_off != 0)
            g += c * r->c_off * exp(z[v] * inv - r->lse_off);
        z[v] = g;
    }
    if (has_ce)
        z[a->label[i]] -= a->w_ce;
    for (int j = 0; j < a->k && has_kl; j++) {
        const int32_t id = rt_head_loss_id(a, i, j);
        if (id >= 0)
            z[id] -= c * r->c_p * exp(a->top_logp[i * a->k + j]);
    }
}

static void mark(uint8_t *in_k, const struct rt_head_loss_args *a, int64_t i, uint8_t value)
{
    for (int j = 0; j < a->k; j++) {
        const int32_t id = rt_head_loss_id(a, i, j);
        if (id >= 0)
            in_k[id] = value;
    }
}

static void loss_of_row(const struct rt_head_loss_args *a, int64_t i, double *z, uint8_t *in_k)
{
    const int32_t label = a->label[i];
    const bool has_kl = a->k > 0 && a->kl_mask != NULL && a->kl_mask[i] != 0;
    const double lse_1 = lse_over(z, a->V, 1, in_k, -1);
    struct kl_row r = {0};
    int64_t best = 0;
    for (int64_t v = 1; v < a->V; v++)
        if (z[v] > z[best])
            best = v;
    if (has_kl) {
        mark(in_k, a, i, 1);
        kl_of_row(a, i, z, in_k, &r);
    }
    if (a->ce != NULL)
        a->ce[i] = label >= 0 ? lse_1 - z[label] : 0;
    if (a->kl != NULL)
        a->kl[i] = r.kl;
    if (a->teacher_mass != NULL)
        a->teacher_mass[i] = r.teacher_mass;
    if (a->student_mass != NULL)
        a->student_mass[i] = r.student_mass;
    if (a->hit != NULL)
        a->hit[i] = (uint8_t)((best == label) | (has_kl && best == rt_head_loss_id(a, i, 0)) << 1);
    gradient_of_row(a, i, z, in_k, lse_1, &r, has_kl);
    if (has_kl)
        mark(in_k, a, i, 0);
}

static enum rt_status check_ids(const struct rt_head_loss_args *a, struct rt_err *err)
{
    if (!(a->T > 0))
        return rt_fail(err, RT_SHAPE, "head_loss: temperature %g, expected above 0", a->T);
    for (int64_t i = 0; i < a->n; i++) {
        if (a->label[i] >= a->V)
            return rt_fail(err, RT_SHAPE, "head_loss: label %d at row %lld, expected below %lld", (int)a->label[i], (long long)i,
                           (long long)a->V);
        for (int j = 0; j < a->k && a->kl_mask != NULL && a->kl_mask[i] != 0; j++)
            if (rt_head_loss_id(a, i, j) >= a->V)
                return rt_fail(err, RT_SHAPE, "head_loss: teacher id %d at row %lld, expected below %lld", (int)rt_head_loss_id(a, i, j),
                               (long long)i, (long long)a->V);
    }
    return REF(weight_check)(a->w, "head_loss", a->V, a->H, err);
}

/* dx = and dw += of the tile's rows from dL/dz. */
static void tile_backward(const struct rt_head_loss_args *a, const struct tile *w, int64_t t0, int64_t rows)
{
    memset(w->dx, 0, (size_t)(rows * a->H) * sizeof *w->dx);
    for (int64_t v = 0; v < a->V; v++) {
        const real *w_row = REF(weight_row)(a->w, v, w->w_row);
        real *dw = a->dw != NULL ? (real *)a->dw + v * a->H : NULL;
        memset(w->dw, 0, (size_t)a->H * sizeof *w->dw);
        for (int64_t t = 0; t < rows; t++) {
            const double dz = w->z[t * a->V + v];
            const real *x = (const real *)a->x + (t0 + t) * a->H;
            for (int64_t j = 0; j < a->H; j++) {
                w->dx[t * a->H + j] += dz * w_row[j];
                w->dw[j] += dz * x[j];
            }
        }
        for (int64_t j = 0; j < a->H && dw != NULL; j++)
            dw[j] = (real)(dw[j] + w->dw[j]);
    }
    for (int64_t i = 0; i < rows * a->H && a->dx != NULL; i++)
        ((real *)a->dx)[t0 * a->H + i] = (real)w->dx[i];
}

REF_OP(head_loss)
{
    enum rt_status st;
    struct tile w = {0};

    RT_TRY(check_ids(a, err));
    RT_TRY(rt_alloc((size_t)a->H, sizeof(real), "a row of weights", &w.w_row, err));
    RT_TRY(rt_alloc((size_t)a->V * TILE, sizeof *w.z, "a tile of logits", &w.z, err));
    RT_TRY(rt_alloc((size_t)a->H * TILE, sizeof *w.dx, "a tile of gradients", &w.dx, err));
    RT_TRY(rt_alloc((size_t)a->H, sizeof *w.dw, "a row of gradients", &w.dw, err));
    RT_TRY(rt_alloc((size_t)a->V, 1, "a mask of ids", &w.in_k, err));
    for (int64_t t0 = 0; t0 < a->n; t0 += TILE) {
        const int64_t rows = a->n - t0 < TILE ? a->n - t0 : TILE;
        for (int64_t v = 0; v < a->V; v++) {
            const real *w_row = REF(weight_row)(a->w, v, w.w_row);
            for (int64_t t = 0; t < rows; t++)
                w.z[t * a->V + v] = ref_dot((const real *)a->x + (t0 + t) * a->H, w_row, a->H);
        }
        for (int64_t t = 0; t < rows; t++)
            loss_of_row(a, t0 + t, w.z + t * a->V, w.in_k);
        if (a->dx != NULL || a->dw != NULL)
            tile_backward(a, &w, t0, rows);
    }
out:
    rt_free(w.w_row);
    rt_free(w.z);
    rt_free(w.dx);
    rt_free(w.dw);
    rt_free(w.in_k);
    return st;
}

REF_OP(feature_loss)
{
    for (int64_t i = 0; i < a->n; i++) {
        const real *x = (const real *)a->a + i * a->cols;
        const float *y = a->b + i * a->cols;
        real *da = a->da != NULL ? (real *)a->da + i * a->cols : NULL;
        double xx = 0, xy = 0, yy = 0, dd = 0;
        for (int64_t j = 0; j < a->cols; j++) {
            xx += (double)x[j] * x[j];
            xy += (double)x[j] * y[j];
            yy += (double)y[j] * y[j];
            dd += ((double)x[j] - y[j]) * ((double)x[j] - y[j]);
        }
        const double norm = sqrt(xx) * sqrt(yy); /* 0: no direction to compare, loss 1 and no gradient */
        const double cosine = norm > 0 ? xy / norm : 0;
        if (a->loss != NULL)
            a->loss[i] = a->cosine ? 1 - cosine : dd / (double)a->cols;
        for (int64_t j = 0; j < a->cols && da != NULL; j++) {
            if (!a->cosine)
                da[j] = (real)(a->w * 2 * ((double)x[j] - y[j]) / (double)a->cols);
            else
                da[j] = norm > 0 ? (real)(a->w * (cosine * x[j] / xx - y[j] / norm)) : 0;
        }
    }
    return RT_OK;
}
