/* One row of head_likelihood (core/backend.h): log-probabilities of a label and of a set of ids, and
 *     dL/dz_v = (w_label + w_set) q_v - w_label [v = label] - w_set [v in set] q_v / q(set).
 */
#include <math.h>

#include "core/cpu/exp0.h"
#include "core/cpu/loss.h"

enum { RUN = 1024 }; /* floats summed in float32 lanes before they go to the double sum */

/* Greatest logit of the set; -inf for none. */
RT_SIMD static float set_top(const float *restrict z, const uint8_t *restrict in_set, int64_t n)
{
    float top = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        top = in_set[i] != 0 && z[i] > top ? z[i] : top;
    return top;
}

RT_SIMD static float row_top(const float *z, int64_t n)
{
    return rt_max(z, n);
}

/* Sum of exp(z - top) over all ids, or over the set. */
RT_SIMD static double exp_sum(const float *restrict z, const uint8_t *restrict in_set, int64_t n, float top)
{
    float e[RUN];
    double sum = 0;
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t len = rt_min64(RUN, n - i);
        for (int64_t j = 0; j < len; j++)
            e[j] = rt_cpu_exp_or_0(z[i + j] - top);
        for (int64_t j = 0; in_set != NULL && j < len; j++)
            e[j] = in_set[i + j] != 0 ? e[j] : 0;
        sum += rt_sum(e, len);
    }
    return sum;
}

/* z = all exp(z - top), and + own exp(z - top_set) on the set where there is one. */
RT_SIMD static void gradient_of(float *restrict z, const uint8_t *restrict in_set, int64_t n, float top, float all, float top_set, float own)
{
    if (in_set == NULL || own == 0) {
        for (int64_t i = 0; i < n; i++)
            z[i] = all * rt_cpu_exp_or_0(z[i] - top);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const float x = z[i], set = in_set[i] != 0 ? own : 0;
        /* ids off the set may lie far above its greatest logit */
        z[i] = all * rt_cpu_exp_or_0(x - top) + set * rt_cpu_exp_or_0(x < top_set ? x - top_set : 0);
    }
}

void rt_cpu_likelihood_row(const struct rt_head_likelihood_args *a, int64_t i, float *z, bool gradient)
{
    const int64_t n = a->n_ids, label = a->label != NULL ? a->label[i] : -1;
    const float top = row_top(z, n), top_set = a->in_set != NULL ? set_top(z, a->in_set, n) : -INFINITY;
    const double sum = exp_sum(z, NULL, n, top), lse = top + log(sum);
    const bool has_set = top_set > -INFINITY;
    const double sum_set = has_set ? exp_sum(z, a->in_set, n, top_set) : 0;
    const double set_logp = has_set ? fmin(top_set + log(sum_set) - lse, 0) : a->in_set != NULL ? -INFINITY : 0;
    const double label_logp = label >= 0 ? (double)z[label] - lse : 0;
    const double w_label = label >= 0 && a->w_label != NULL ? a->w_label[i] : 0, w_set = has_set && a->w_set != NULL ? a->w_set[i] : 0;
    if (a->label_logp != NULL)
        a->label_logp[i] = label_logp;
    if (a->set_logp != NULL)
        a->set_logp[i] = set_logp;
    if (!gradient)
        return;
    gradient_of(z, a->in_set, n, top, (float)((w_label + w_set) / sum), top_set, has_set ? (float)(-w_set / sum_set) : 0);
    if (label >= 0) /* in double: the label of a confident student has q near 1 */
        z[label] = (float)(w_label * expm1(label_logp) + (a->in_set != NULL && a->in_set[label] != 0 && has_set
                                                              ? w_set * (exp(label_logp) - exp(label_logp - set_logp)) : w_set * exp(label_logp)));
}
