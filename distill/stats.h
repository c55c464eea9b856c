/* Statistics of evaluations and comparisons: means, spreads, 95 % intervals over clusters, pass@k.
 *
 * A cluster is what was drawn independently: a sequence (losses), a problem (pass@1). A mean over tokens is a ratio of sums: with x_c the
 * sum and n_c the count of cluster c, m = sum x / sum n, and ss = sum (x_c - m n_c)^2.
 *   a loss     m +- 1.96 s, s^2 = C/(C-1) ss / (sum n)^2
 *   a share    Wilson's score interval of m among m (1 - m) (sum n)^2 / ss draws, but no more than were made: the independent draws that
 *              would scatter as the clusters do. Within [0, 1], and plain Wilson where a cluster is one draw. At 0 and 1, where nothing
 *              shows how draws of one cluster hang together, a cluster counts as one draw.
 *   a paired difference    percentile bootstrap: n of n clusters with replacement, `resamples` times, 2.5 % and 97.5 % quantiles; draws
 *              depend on (seed, n) alone, so a repeated analysis gives the same digits
 * One cluster alone has no interval (NaN).
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

/* A mean with its interval, over clusters that are added one after the other. */
struct rt_ratio {
    double sx, sn, sxx, sxn, snn;
    int64_t clusters;
};
void rt_ratio_add(struct rt_ratio *r, double x, double n);
/* Of a loss. NaN where there is nothing. */
void rt_ratio_result(const struct rt_ratio *r, double *mean, double *lo, double *hi);
/* Of a share, x_c in [0, n_c]; draws: how many were made (tokens, samples). */
void rt_ratio_share(const struct rt_ratio *r, double draws, double *mean, double *lo, double *hi);

/* m_b - m_a over the same clusters: a draw takes a cluster from both. Clusters in which either den is 0 are left out. */
enum rt_status rt_stats_difference(const double *num_a, const double *den_a, const double *num_b, const double *den_b, int64_t n,
                                   int resamples, uint64_t seed, struct rt_interval *out, struct rt_err *err);

/* Wilson's 95 % score interval of a share p among n draws; NaN for n <= 0. */
void rt_stats_wilson(double p, double n, double *lo, double *hi);

/* 1 - C(n-c, k) / C(n, k): chance that one of k of n samples, c of them correct, is correct. NaN for k > n. */
double rt_stats_pass_at_k(int64_t n, int64_t c, int64_t k);

#endif
