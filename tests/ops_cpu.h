/* The cpu backend held against the reference on the same inputs: normalised error, sentinels behind every output, and the same
 * bytes from 1, 2 and 3 threads.
 *
 * Bounds: float32 rounds at 6e-8; a sum of a few hundred products in blocks, and an exponential of arguments up to about 10,
 * bring 3e-7 to 1e-6. A wrong index, mask or factor gives 1e-2 and more.
 */
#ifndef RT_TESTS_OPS_CPU_H
#define RT_TESTS_OPS_CPU_H

#include <stdio.h>
#include <stdlib.h>

#include "tests/ops.h"

enum {
    CPUS = 3,
    OUTS = 4,
    GUARD = 48, /* elements behind an output */
};

struct devices {
    struct rt_device ref, cpu[CPUS];
};

static inline int cpu_open_all(void **state)
{
    static struct devices all;
    struct rt_err err = {0};
    all.ref = ops_open(&rt_backend_ref);
    for (int i = 0; i < CPUS; i++)
        assert_ok(rt_device_open(&rt_backend_cpu, &(struct rt_dev_options){.threads = i + 1}, &all.cpu[i], &err));
    *state = &all;
    return 0;
}

static inline int cpu_close_all(void **state)
{
    struct devices *all = *state;
    rt_device_close(&all->ref);
    for (int i = 0; i < CPUS; i++)
        rt_device_close(&all->cpu[i]);
    return 0;
}

static inline float *randoms(int64_t n, uint64_t stream, double scale)
{
    float *x = malloc((size_t)(n + 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(scale * rt_rng_normal(2, stream, (uint64_t)i));
    return x;
}

/* One operation: runs on d with its outputs in out. Outputs start from random values, so `+=` and gaps of strides are compared too. */
typedef enum rt_status (*run_op)(struct rt_device *d, const void *ctx, float **out, struct rt_err *err);

static inline void hold(struct devices *all, const char *what, run_op run, const void *ctx, int n_out, const int64_t *size, double bound)
{
    struct rt_err err = {0};
    float *out[1 + CPUS][OUTS];
    for (int b = 0; b <= CPUS; b++) {
        for (int o = 0; o < n_out; o++)
            out[b][o] = randoms(size[o] + GUARD, 900 + (uint64_t)o, 0.5);
        if (run(b == 0 ? &all->ref : &all->cpu[b - 1], ctx, out[b], &err) != RT_OK)
            fail_msg("%s: %s", what, err.msg);
    }
    for (int o = 0; o < n_out; o++) {
        float *guard = randoms(size[o] + GUARD, 900 + (uint64_t)o, 0.5);
        for (int b = 0; b <= CPUS; b++)
            if (memcmp(out[b][o] + size[o], guard + size[o], GUARD * sizeof(float)) != 0)
                fail_msg("%s: output %d, device %d: written past its end", what, o, b);
        const double rel = test_rel_error(out[1][o], out[0][o], size[o]);
        if (!(rel <= bound))
            fail_msg("%s: output %d: relative error %g, bound %g", what, o, rel, bound);
        for (int b = 2; b <= CPUS; b++)
            if (memcmp(out[1][o], out[b][o], (size_t)size[o] * sizeof(float)) != 0)
                fail_msg("%s: output %d differs between 1 and %d threads", what, o, b);
        free(guard);
    }
    for (int b = 0; b <= CPUS; b++)
        for (int o = 0; o < n_out; o++)
            free(out[b][o]);
}

#endif
