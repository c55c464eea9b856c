/* Helpers of the operation tests: a device of the reference backend, random arrays, finite differences.
 *
 * The reference backend's memory is the host's, so a test's own arrays serve as device memory.
 */
#ifndef RT_TESTS_OPS_H
#define RT_TESTS_OPS_H

#include <math.h>
#include <string.h>

#include "core/backend.h"
#include "core/rng.h"
#include "tests/suite.h"

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof((array)[0])))

static inline struct rt_device ops_open(const struct rt_backend *be)
{
    struct rt_err err = {0};
    struct rt_device d = {0};
    assert_ok(rt_device_open(be, &(struct rt_dev_options){.threads = 1}, &d, &err));
    return d;
}

static inline struct rt_weight *ops_param(struct rt_device *d, void *p, int64_t rows, int64_t cols)
{
    struct rt_err err = {0};
    struct rt_weight *w = NULL;
    assert_ok(d->be->weight_param(d->dev, p, rows, cols, &w, &err));
    return w;
}

static inline struct rt_weight *ops_load(struct rt_device *d, enum rt_dtype dtype, const void *data, const float *scale_inv,
                                         int64_t rows, int64_t cols)
{
    struct rt_err err = {0};
    struct rt_weight *w = NULL;
    const struct rt_weight_src src = {"w", dtype, rows, cols, data, scale_inv, false, NULL, NULL};
    assert_ok(d->be->weight_load(d->dev, d->q, &src, &w, &err));
    return w;
}

static inline void ops_fill(double *x, int64_t n, uint64_t stream)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = rt_rng_normal(1, stream, (uint64_t)i);
}

static inline void ops_fill32(float *x, int64_t n, uint64_t stream)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = rt_rng_normal(1, stream, (uint64_t)i);
}

static inline void ops_narrow(float *to, const double *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = (float)from[i];
}

static inline double ops_dot(const double *a, const double *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* |a - b|2 / |b|2; infinity for NaN. */
static inline double ops_rel(const double *a, const double *b, int64_t n)
{
    double num = 0, den = 0;
    for (int64_t i = 0; i < n; i++) {
        num += (a[i] - b[i]) * (a[i] - b[i]);
        den += b[i] * b[i];
    }
    const double r = den > 0 ? sqrt(num / den) : sqrt(num);
    return isnan(r) ? INFINITY : r;
}

#define assert_near(a, b, bound) \
    do { \
        const double a_ = (a), b_ = (b); \
        if (!(fabs(a_ - b_) <= (bound))) \
            fail_msg("%s = %.17g, expected %.17g within %g", #a, a_, b_, (double)(bound)); \
    } while (0)
#define assert_close(a, b, n, bound) \
    do { \
        const double rel_ = ops_rel((a), (b), (n)); \
        if (!(rel_ <= (bound))) \
            fail_msg("%s against %s: relative error %g, bound %g", #a, #b, rel_, (double)(bound)); \
    } while (0)

/* Holds grad [n], the gradient of f at x [n], against central differences of f in float64 along three random directions.
 * A direction has normal entries, so the expected derivative is about |grad|: the bound is relative to that. 1e-7: with
 * h = 1e-5 truncation is h^2 = 1e-10 times third derivatives of order 1 to 100, rounding 1e-16/h = 1e-11. */
typedef double (*ops_loss)(void *ctx);
static inline void ops_check_grad(const char *what, ops_loss f, void *ctx, double *x, int64_t n, const double *grad)
{
    enum { MAX = 1024 };
    const double h = 1e-5, norm = sqrt(ops_dot(grad, grad, n));
    double save[MAX], d[MAX];
    assert_true(n <= MAX);
    assert_true(norm > 1e-6); /* a gradient of nothing would pass */
    memcpy(save, x, (size_t)n * sizeof *x);
    for (uint64_t dir = 0; dir < 3; dir++) {
        ops_fill(d, n, 7000 + dir);
        for (int64_t i = 0; i < n; i++)
            x[i] = save[i] + h * d[i];
        const double up = f(ctx);
        for (int64_t i = 0; i < n; i++)
            x[i] = save[i] - h * d[i];
        const double down = f(ctx);
        memcpy(x, save, (size_t)n * sizeof *x);
        const double expected = (up - down) / (2 * h), got = ops_dot(grad, d, n);
        if (!(fabs(expected - got) <= 1e-7 * norm))
            fail_msg("%s: derivative %.12g, finite difference %.12g, |gradient| %g", what, got, expected, norm);
    }
}

#endif
