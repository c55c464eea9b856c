/* Statistics of comparisons: means, spreads, percentile bootstraps over clusters, pass@k.
 *
 * A cluster is what was drawn independently: a sequence (losses), a problem (pass@1). A mean over tokens is a ratio of sums,
 * R = sum num / sum den over clusters. A bootstrap draws n of n clusters with replacement, `resamples` times, and takes the 2.5 % and
 * 97.5 % quantiles; draws depend on (seed, n) alone, so a repeated analysis gives the same digits.
 */
#ifndef RT_DISTILL_STATS_H
#define RT_DISTILL_STATS_H

#include <stdint.h>

#include "core/status.h"

struct rt_interval {
    double mean, lo, hi; /* NaN: unknown. lo and hi need two clusters */
    int64_t n;           /* clusters with den > 0 */
};

double rt_stats_mean(const double *x, int64_t n); /* NaN for n 0 */
double rt_stats_sd(const double *x, int64_t n);   /* divisor n - 1; NaN for n < 2 */

/* R over n clusters; those with den 0 are left out. */
enum rt_status rt_stats_ratio(const double *num, const double *den, int64_t n, int resamples, uint64_t seed, struct rt_interval *out,
                              struct rt_err *err);
/* R_b - R_a over the same clusters: a draw takes a cluster from both. Clusters in which either den is 0 are left out. */
enum rt_status rt_stats_difference(const double *num_a, const double *den_a, const double *num_b, const double *den_b, int64_t n,
                                   int resamples, uint64_t seed, struct rt_interval *out, struct rt_err *err);

/* Wilson's 95 % score interval of a share p seen in n clusters: for shares of 0 and 1, where a bootstrap has no width. */
void rt_stats_wilson(double p, int64_t n, double *lo, double *hi);

/* 1 - C(n-c, k) / C(n, k): chance that one of k of n samples, c of them correct, is correct. NaN for k > n. */
double rt_stats_pass_at_k(int64_t n, int64_t c, int64_t k);

#endif
