/* One row of the head's loss. Formulas as in core/backend.h; s = z/T, q = softmax(s), K the stored ids, M the teacher's mass over its
 * buckets.
 *
 * The few ids that have a correction of their own, S = K and the label, are taken out of the row before anything is summed, and put
 * back in double: the sums over the rest lose nothing to cancellation, however confident the student is. Over the rest
 *     dz = A exp((z - m)/T) + B exp(z - m),  m the greatest logit of the rest,
 * and where one of the two is missing, or T = 1, the exponentials of the sum are kept in place and only scaled.
 */
#include "core/cpu/loss.h"

#include <math.h>

#include "core/cpu/exp0.h"

#define P_R_MIN 1e-7 /* a smaller teacher tail is rounding of the stored float32 log-probabilities */

enum { RUN = 1024 }; /* floats summed in float32 lanes before they go to the double sum */

/* dL/dz below this is 0: next to nothing, and products run a hundred times slower over subnormal numbers. */
#define TINY 1e-30f

/* What is known of a row. */
struct row {
    const int32_t *ids;
    const float *logp;
    int k;                       /* 0: no KL */
    bool has_ce, has_kl, apart;  /* apart: the label is not in K, so it has its own term */
    double z_label, *z_k, *p;    /* logits and teacher's probabilities (as stored) of K */
    double *e_T, *e_1;           /* K: exp(z_k/T - lse_on), exp(z_k - its log-sum-exp over K) */
    float top_rest, m;           /* greatest logit off S; the same, or 0 where that is -inf */
    double lse_rest_1, lse_rest_T, lse_1, lse_T, lse_on, lse_off, lse_on_1; /* on K, off K: at T */
    double log_mass, P_R, M;     /* the p of the gradient is p / exp(log_mass) */
    bool kl_gradient;
};

RT_SIMD static float greatest(const float *z, int64_t n)
{
    return rt_max(z, n);
}

/* Sum of exp((z - m) inv); kept in z where `keep`. */
RT_SIMD static double exp_sum(float *restrict z, int64_t n, float m, float inv, bool keep)
{
    float e[RUN];
    double sum = 0;
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t len = rt_min64(RUN, n - i);
        for (int64_t j = 0; j < len; j++)
            e[j] = rt_cpu_exp_or_0((z[i + j] - m) * inv);
        sum += rt_sum(e, len);
        if (keep)
            memcpy(z + i, e, (size_t)len * sizeof *e);
    }
    return sum;
}

/* c e for e >= 0, or 0 where that is below TINY in size; least = TINY / |c| */
RT_INLINE float times(float c, float e, float least)
{
    return c * (e < least ? 0.0f : e);
}

RT_SIMD static void scale(float *z, int64_t n, float c)
{
    const float least = TINY / fabsf(c);
    for (int64_t i = 0; i < n; i++)
        z[i] = times(c, z[i], least);
}

/* z = A exp((z - m) inv) + B exp(z - m) */
RT_SIMD static void two_exps(float *z, int64_t n, float m, float inv, float A, float B)
{
    const float least_a = TINY / fabsf(A), least_b = TINY / fabsf(B);
    for (int64_t i = 0; i < n; i++)
        z[i] = times(A, rt_cpu_exp_or_0((z[i] - m) * inv), least_a) + times(B, rt_cpu_exp_or_0(z[i] - m), least_b);
}

/* First index in [0, n) with z == m; n for none. */
RT_SIMD static int64_t index_of(const float *z, int64_t n, float m)
{
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t len = rt_min64(RUN, n - i);
        int found = 0;
        for (int64_t j = 0; j < len; j++)
            found |= z[i + j] == m;
        for (int64_t j = 0; found && j < len; j++)
            if (z[i + j] == m)
                return i + j;
    }
    return n;
}

static double log_add(double a, double b)
{
    const double hi = a > b ? a : b, lo = a > b ? b : a;
    return lo == -INFINITY ? hi : hi + log1p(exp(lo - hi));
}

/* e^x in double, vectorised: x = n ln 2 + r, |r| <= ln 2 / 2, Taylor polynomial of degree 13 (the next term is below 4e-18). */
RT_INLINE double exp_double(double x)
{
    const double magic = 0x1.8p52; /* adding it rounds to an integer and leaves that in the low bits */
    const double y = x < -700 ? -700 : x > 700 ? 700 : x;
    const double z = y * 0x1.71547652b82fep0 + magic, n = z - magic;
    const double r = (y - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    static const double c[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
                               1 / 5040.0, 1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5, 1, 1};
    double p = c[0];
#pragma GCC unroll 16
    for (int i = 1; i < 14; i++)
        p = p * r + c[i];
    uint64_t u;
    double scale;
    memcpy(&u, &z, sizeof u);
    u = (u + 1023) << 52; /* the low bits of z are n */
    memcpy(&scale, &u, sizeof scale);
    return x < -700 ? 0 : p * scale;
}

/* e = exp(z inv - top) over n values */
RT_SIMD static void exps(double *e, const double *z, int n, double inv, double top)
{
    for (int j = 0; j < n; j++)
        e[j] = exp_double(z[j] * inv - top);
}

/* p = exp(logp) */
RT_SIMD static void probabilities(double *p, const float *logp, int n)
{
    for (int j = 0; j < n; j++)
        p[j] = exp_double(logp[j]);
}

/* log sum exp(z inv) over n values, -inf for none; e = exp(z inv - that). */
static double lse_of(double *e, const double *z, int n, double inv)
{
    double top = -INFINITY, sum = 0;
    for (int j = 0; j < n; j++)
        top = z[j] > top ? z[j] : top;
    top *= inv;
    exps(e, z, n, inv, top > -INFINITY ? top : 0);
    if (top == -INFINITY)
        return top;
    for (int j = 0; j < n; j++)
        sum += e[j];
    for (int j = 0; j < n; j++)
        e[j] /= sum;
    return top + log(sum);
}

/* Smallest id of the greatest logit, given that of the rest (S is -inf in z). */
static int64_t argmax_of(const struct row *r, const float *z, int64_t V, int32_t label)
{
    double top = r->top_rest;
    int64_t best = V;
    if (r->has_ce && r->z_label >= top) {
        top = r->z_label;
        best = label;
    }
    for (int j = 0; j < r->k; j++)
        if (r->ids[j] >= 0 && (r->z_k[j] > top || (r->z_k[j] == top && r->ids[j] < best))) {
            top = r->z_k[j];
            best = r->ids[j];
        }
    return top == r->top_rest ? rt_min64(best, index_of(z, V, r->top_rest)) : best;
}

/* Takes S out of z. */
static void take_out(struct row *r, float *z, int64_t V, int32_t label)
{
    r->apart = r->has_ce;
    r->z_label = r->has_ce ? z[label] : -INFINITY;
    probabilities(r->p, r->logp, r->k);
    for (int j = 0; j < r->k; j++) {
        r->z_k[j] = r->ids[j] >= 0 ? z[r->ids[j]] : -INFINITY;
        r->p[j] = r->ids[j] >= 0 ? r->p[j] : 0;
        r->apart = r->apart && r->ids[j] != label;
    }
    for (int j = 0; j < r->k; j++)
        if (r->ids[j] >= 0)
            z[r->ids[j]] = -INFINITY;
    if (r->has_ce)
        z[label] = -INFINITY;
    r->top_rest = greatest(z, V);
}

/* Sums over the rest and the log-sum-exps made of them. Returns whether z now holds exponentials, at 1/T where there is KL. */
static bool sum_up(const struct rt_head_loss_args *a, struct row *r, float *z, bool gradient)
{
    const bool two = r->has_ce && r->has_kl && a->T != 1, keep = !two || a->w_ce == 0;
    const double inv = r->has_kl ? 1 / a->T : 1;
    r->m = r->top_rest > -INFINITY ? r->top_rest : 0; /* nothing is left (sum 0), or nothing but NaN (sum NaN) */
    if (two)
        r->lse_rest_1 = r->m + log(exp_sum(z, a->V, r->m, 1, false));
    r->lse_rest_T = r->m * inv + log(exp_sum(z, a->V, r->m, (float)inv, gradient && keep));
    if (!two)
        r->lse_rest_1 = r->lse_rest_T;
    const double own = r->apart ? r->z_label : -INFINITY;
    r->lse_on = lse_of(r->e_T, r->z_k, r->k, inv);
    r->lse_off = log_add(r->lse_rest_T, own * inv);
    r->lse_T = log_add(r->lse_off, r->lse_on);
    r->lse_on_1 = two ? lse_of(r->e_1, r->z_k, r->k, 1) : r->lse_on;
    r->lse_1 = two ? log_add(log_add(r->lse_rest_1, own), r->lse_on_1) : r->lse_T;
    if (!two)
        r->e_1 = r->e_T;
    return keep;
}

/* kl without T^2, teacher's mass on K. */
static double kl_of(const struct rt_head_loss_args *a, struct row *r, double *teacher_mass)
{
    const bool renorm = a->tail == RT_TAIL_RENORM;
    const double inv = 1 / a->T, lse = renorm ? r->lse_on : r->lse_T;
    double mass = 0, kl = 0;
    for (int j = 0; j < r->k; j++)
        mass += r->p[j];
    *teacher_mass = mass;
    r->log_mass = renorm ? log(mass) : 0;
    r->kl_gradient = !renorm || mass > 0;
    const double unit = renorm ? exp(-r->log_mass) : 1;
    for (int j = 0; j < r->k && r->kl_gradient; j++)
        if (r->p[j] > 0)
            kl += r->p[j] * unit * (r->logp[j] - r->log_mass - (r->z_k[j] * inv - lse));
    r->P_R = renorm || 1 - mass < P_R_MIN || r->lse_off == -INFINITY ? 0 : 1 - mass;
    r->M = mass + r->P_R;
    if (r->P_R > 0)
        kl += r->P_R * (log(r->P_R) - (r->lse_off - r->lse_T));
    return kl;
}

/* z to dL/dz; z holds logits, or exponentials where `kept`. */
static void gradient_of(const struct rt_head_loss_args *a, const struct row *r, float *z, int32_t label, bool kept)
{
    const bool renorm = a->tail == RT_TAIL_RENORM;
    const double inv = r->has_kl ? 1 / a->T : 1, c = r->has_kl && r->kl_gradient ? a->w_kl * a->T : 0, w_ce = r->has_ce ? a->w_ce : 0;
    /* off K: T (M Q_R - P_R) exp(s - lse_off) */
    const double off = renorm ? 0 : c * (r->M * exp(r->lse_off - r->lse_T) - r->P_R);
    const bool none = r->lse_rest_T == -INFINITY; /* nothing is left off S */
    const double A = none || off == 0 ? 0 : off * exp(r->m * inv - r->lse_off), B = none ? 0 : w_ce * exp(r->m - r->lse_1);
    if (kept)
        scale(z, a->V, (float)(A + B));
    else
        two_exps(z, a->V, r->m, (float)inv, (float)A, (float)B);
    const double on_T = renorm ? 1 : r->M * exp(r->lse_on - r->lse_T), on_p = renorm ? exp(-r->log_mass) : 1;
    const double on_1 = w_ce != 0 ? w_ce * exp(r->lse_on_1 - r->lse_1) : 0;
    for (int j = 0; j < r->k; j++) {
        if (r->ids[j] < 0)
            continue;
        const double g = (c != 0 ? c * (on_T * r->e_T[j] - on_p * r->p[j]) : 0) + on_1 * r->e_1[j] -
                         (r->has_ce && r->ids[j] == label ? w_ce : 0);
        z[r->ids[j]] = fabs(g) < TINY ? 0 : (float)g;
    }
    if (r->apart) {
        const double g = w_ce * (exp(r->z_label - r->lse_1) - 1) + (off != 0 ? off * exp(r->z_label * inv - r->lse_off) : 0);
        z[label] = fabs(g) < TINY ? 0 : (float)g;
    }
}

void rt_cpu_loss_row(const struct rt_head_loss_args *a, int64_t i, float *z, bool gradient, double *scratch)
{
    const int32_t label = a->label[i];
    const bool has_kl = a->k > 0 && a->kl_mask != NULL && a->kl_mask[i] != 0;
    struct row r = {.has_ce = label >= 0, .has_kl = has_kl, .k = has_kl ? a->k : 0, .z_k = scratch, .p = scratch + a->k, .e_T = scratch + 2 * (int64_t)a->k,
                    .e_1 = scratch + 3 * (int64_t)a->k};
    double kl = 0, teacher_mass = 0, student_mass = 0;
    if (has_kl) {
        int32_t *ids = (int32_t *)(void *)(scratch + 4 * (int64_t)a->k);
        for (int j = 0; j < a->k; j++)
            ids[j] = rt_head_loss_id(a, i, j);
        r.ids = ids;
        r.logp = a->top_logp + i * a->k;
    }
    take_out(&r, z, a->V, label);
    if (a->hit != NULL) {
        const int64_t best = argmax_of(&r, z, a->V, label);
        a->hit[i] = (uint8_t)((best == label) | (has_kl && best == r.ids[0]) << 1);
    }
    const bool kept = sum_up(a, &r, z, gradient);
    if (has_kl) {
        kl = a->T * a->T * kl_of(a, &r, &teacher_mass);
        student_mass = exp(r.lse_on - r.lse_T);
    }
    if (a->ce != NULL)
        a->ce[i] = r.has_ce ? r.lse_1 - r.z_label : 0;
    if (a->kl != NULL)
        a->kl[i] = kl;
    if (a->teacher_mass != NULL)
        a->teacher_mass[i] = teacher_mass;
    if (a->student_mass != NULL)
        a->student_mass[i] = student_mass;
    if (gradient)
        gradient_of(a, &r, z, label, kept);
}
