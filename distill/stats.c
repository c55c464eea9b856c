#include "distill/stats.h"

#include <math.h>
#include <stdlib.h>

#include "core/mem.h"
#include "core/rng.h"

double rt_stats_mean(const double *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i];
    return n > 0 ? sum / (double)n : NAN;
}

double rt_stats_sd(const double *x, int64_t n)
{
    const double mean = rt_stats_mean(x, n);
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (x[i] - mean) * (x[i] - mean);
    return n > 1 ? sqrt(sum / (double)(n - 1)) : NAN;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Quantile q of sorted x, between neighbours linearly. */
static double quantile(const double *x, int n, double q)
{
    const double at = q * (n - 1);
    const int i = (int)at;
    return i + 1 < n ? x[i] + (at - i) * (x[i + 1] - x[i]) : x[n - 1];
}

/* A uniform draw of [0, n), n < 2^32. */
static int64_t draw(uint64_t seed, uint64_t stream, uint64_t i, int64_t n)
{
    return (int64_t)((rt_rng_u64(seed, stream, i) >> 32) * (uint64_t)n >> 32);
}

void rt_ratio_add(struct rt_ratio *r, double x, double n)
{
    r->sx += x;
    r->sn += n;
    r->sxx += x * x;
    r->sxn += x * n;
    r->snn += n * n;
    r->clusters++;
}

static double squares(const struct rt_ratio *r, double m)
{
    return fmax(0, r->sxx - 2 * m * r->sxn + m * m * r->snn);
}

void rt_ratio_result(const struct rt_ratio *r, double *mean, double *lo, double *hi)
{
    *mean = *lo = *hi = NAN;
    if (!(r->sn > 0))
        return;
    const double m = r->sx / r->sn, C = (double)r->clusters;
    *mean = m;
    if (r->clusters < 2)
        return;
    const double half = 1.96 * sqrt(C / (C - 1) * squares(r, m)) / r->sn;
    *lo = m - half;
    *hi = m + half;
}

void rt_ratio_share(const struct rt_ratio *r, double draws, double *mean, double *lo, double *hi)
{
    *mean = *lo = *hi = NAN;
    if (!(r->sn > 0))
        return;
    const double m = fmin(1, fmax(0, r->sx / r->sn));
    *mean = m;
    if (r->clusters < 2)
        return;
    const double among = m > 0 && m < 1 ? m * (1 - m) * r->sn * r->sn / squares(r, m) : (double)r->clusters;
    rt_stats_wilson(m, fmin(among, draws), lo, hi);
}

/* Over the clusters of `use` [m]. */
static enum rt_status bootstrap(const double *num_a, const double *den_a, const double *num_b, const double *den_b, const int64_t *use, int64_t m,
                                int resamples, uint64_t seed, struct rt_interval *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    double *value = NULL, na = 0, da = 0, nb = 0, db = 0;
    *out = (struct rt_interval){NAN, NAN, NAN, m};
    for (int64_t i = 0; i < m; i++) {
        na += num_a[use[i]];
        da += den_a[use[i]];
        nb += num_b[use[i]];
        db += den_b[use[i]];
    }
    if (m == 0)
        return RT_OK;
    out->mean = nb / db - na / da;
    if (m < 2)
        return RT_OK;
    RT_TRY(rt_alloc((size_t)resamples, sizeof *value, "bootstrap", &value, err));
    for (int r = 0; r < resamples; r++) {
        na = da = nb = db = 0;
        for (int64_t i = 0; i < m; i++) {
            const int64_t c = use[draw(seed, (uint64_t)r, (uint64_t)i, m)];
            na += num_a[c];
            da += den_a[c];
            nb += num_b[c];
            db += den_b[c];
        }
        value[r] = nb / db - na / da;
    }
    qsort(value, (size_t)resamples, sizeof *value, ascending);
    out->lo = quantile(value, resamples, 0.025);
    out->hi = quantile(value, resamples, 0.975);
out:
    rt_free(value);
    return st;
}

enum rt_status rt_stats_difference(const double *num_a, const double *den_a, const double *num_b, const double *den_b, int64_t n,
                                   int resamples, uint64_t seed, struct rt_interval *out, struct rt_err *err)
{
    enum rt_status st;
    int64_t *use = NULL, m = 0;
    if (n < 0 || n > (int64_t)UINT32_MAX)
        RT_FAIL(err, USAGE, "a bootstrap over %lld clusters", (long long)n);
    RT_TRY(rt_alloc((size_t)n, sizeof *use, "clusters", &use, err));
    for (int64_t i = 0; i < n; i++)
        if (den_a[i] > 0 && den_b[i] > 0)
            use[m++] = i;
    RT_TRY(bootstrap(num_a, den_a, num_b, den_b, use, m, resamples, seed, out, err));
out:
    rt_free(use);
    return st;
}

void rt_stats_wilson(double p, double n, double *lo, double *hi)
{
    const double z = 1.959963984540054, z2 = z * z;
    if (!(n > 0)) {
        *lo = *hi = NAN;
        return;
    }
    const double centre = (p + z2 / (2 * n)) / (1 + z2 / n);
    const double half = z * sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n);
    *lo = p > 0 ? fmax(0, centre - half) : 0; /* exactly, whatever rounding does */
    *hi = p < 1 ? fmin(1, centre + half) : 1;
}

double rt_stats_pass_at_k(int64_t n, int64_t c, int64_t k)
{
    double miss = 1;
    if (k < 1 || k > n || c < 0 || c > n)
        return NAN;
    for (int64_t i = 0; i < k; i++)
        miss *= (double)(n - c - i > 0 ? n - c - i : 0) / (double)(n - i);
    return 1 - miss;
}
