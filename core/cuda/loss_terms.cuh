/* What a row's loss and gradient are made of, once its sums on and off K are known. (core/ref/ref_loss.c has the formulas.) */
#ifndef RT_CORE_CUDA_LOSS_TERMS_CUH
#define RT_CORE_CUDA_LOSS_TERMS_CUH

#include "core/cuda/loss_row.cuh"
#include "core/top_ids.h"

namespace loss_row {

static const double min_tail = 1e-7; /* P_R below this is rounding of the stored log-probabilities */

/* Exponents of 2 and factors of a row's gradient. */
struct coefficients {
    float off, off_at, ce, ce_at; /* off 2^(z/T log2e - off_at) + ce 2^(z log2e - ce_at) */
    float on, on_at, p;           /* on K: on 2^(z/T log2e - on_at) - p p_j, and the ce term */
};

/* What the sums over K are: teacher mass, sum p (log p - z/T). */
struct on_k {
    struct stat z;
    double mass, cross;
};

__device__ inline double lse_join(double a, double b)
{
    const double top = fmax(a, b);
    return top == -CUDART_INF ? top : top + log(exp(a - top) + exp(b - top));
}

__device__ inline float in_base_2(double lse)
{
    return (float)(lse * 1.4426950408889634);
}

/* KL of the row (without T^2) and, in c, its part of the gradient. */
__device__ inline double kl_of_row(const struct rt_head_loss_args &a, const struct on_k &k, double lse_all, double lse_on, double lse_off,
                            struct coefficients *c)
{
    const double scale = a.w_kl * a.T;
    double kl;
    if (a.tail == RT_TAIL_RENORM) {
        if (!(k.mass > 0))
            return 0;
        kl = k.cross / k.mass - log(k.mass) + lse_on;
        c->on = (float)scale;
        c->on_at = in_base_2(lse_on);
        c->p = (float)(scale / k.mass);
        return kl;
    }
    double tail = 1 - k.mass;
    kl = k.cross + k.mass * lse_all;
    if (tail < min_tail || lse_off == -CUDART_INF)
        tail = 0;
    else
        kl += tail * (log(tail) - (lse_off - lse_all));
    c->on = (float)(scale * (k.mass + tail));
    c->p = (float)scale;
    if (lse_off != -CUDART_INF)
        c->off = (float)(scale * ((k.mass + tail) * exp(lse_off - lse_all) - tail));
    return kl;
}

/* One thread: the row's outputs (where `out`), and the factors of its gradient. */
__device__ inline void finish_row(const struct rt_head_loss_args &a, int64_t i, int32_t label, float z_label, bool has_kl, const struct stat &off,
                                  const struct on_k &k, bool out, struct coefficients *c)
{
    const double inv = 1 / a.T, off_1 = lse_of(off.max, off.sum, 1), lse_off = a.T == 1 ? off_1 : lse_of(off.max, off.sum_T, inv);
    double lse_1 = off_1, lse_on = -CUDART_INF, lse_all = lse_off, kl = 0;
    if (has_kl) {
        const double on_1 = lse_of(k.z.max, k.z.sum, 1);
        lse_on = a.T == 1 ? on_1 : lse_of(k.z.max, k.z.sum_T, inv);
        lse_1 = lse_join(off_1, on_1);
        lse_all = a.T == 1 ? lse_1 : lse_join(lse_off, lse_on);
    }
    /* exponents at which no term overflows, whatever its factor */
    c->off = c->on = c->p = 0;
    c->off_at = lse_off != -CUDART_INF ? in_base_2(lse_off) : 0;
    c->on_at = in_base_2(lse_all);
    c->ce_at = in_base_2(lse_1);
    c->ce = label >= 0 ? (float)a.w_ce : 0;
    if (has_kl)
        kl = kl_of_row(a, k, lse_all, lse_on, lse_off, c);
    if (!out)
        return;
    if (a.ce != NULL)
        a.ce[i] = label >= 0 ? lse_1 - (double)z_label : 0;
    if (a.kl != NULL)
        a.kl[i] = kl * a.T * a.T;
    if (a.teacher_mass != NULL)
        a.teacher_mass[i] = has_kl ? k.mass : 0;
    if (a.student_mass != NULL)
        a.student_mass[i] = has_kl ? exp(lse_on - lse_all) : 0;
    if (a.hit != NULL) {
        const int32_t best = off.max > k.z.max ? off.best : k.z.max > off.max ? k.z.best : min(off.best, k.z.best);
        a.hit[i] = (uint8_t)((best == label) | (has_kl && best == rt_head_loss_id(&a, i, 0)) << 1);
    }
}

__device__ inline float gradient_off(const struct coefficients &c, float z, float scale)
{
    return c.off * exp2_fast(z * scale - c.off_at) + c.ce * exp2_fast(z * LOG2E - c.ce_at);
}

}

#endif
