/* The reference backend: core/backend.h in plain loops, the specification that the other backends are held against.
 *
 *   - Every file here is compiled twice: elements float (rt_backend_ref), and double with -DRT_REF_REAL64 (rt_backend_ref64).
 *   - One thread, loops in the order of the formulas, sums in double rounded once at the store, except where the contract fixes
 *     float32 (e4m3 forms and products, the router's scores).
 *   - Weights are borrowed and converted row by row; an op takes scratch of a row or a tile, never of a whole weight.
 *   - rt_backend_ref64 recomputes what a forward saved as float (rstd, lse), so that finite differences stay sharp.
 *   - Ids, labels, indices and positions are checked against the shapes that the arguments tell; SHAPE names the row.
 */
#ifndef RT_CORE_REF_REF_H
#define RT_CORE_REF_REF_H

#include <math.h>
#include <string.h>

#include "core/host_device.h"
#include "core/mem.h"

#ifdef RT_REF_REAL64
typedef double real;
#define REF(name) rt_ref64_##name
#define REF_ACT RT_F64
#else
typedef float real;
#define REF(name) rt_ref_##name
#define REF_ACT RT_F32
#endif

enum {
    REF_IS64 = sizeof(real) == sizeof(double),
    REF_BLOCK = 128, /* columns of one activation scale, rows and columns of one weight scale */
};

struct rt_dev {
    struct rt_host_dev host;
    int threads_asked; /* ignored: one thread */
};

/* A borrowed matrix; dtype REF_ACT where it is a parameter in device memory. */
struct rt_weight {
    enum rt_dtype dtype;
    int64_t rows, cols;
    const void *data;
    const float *scale_inv; /* E4M3 only */
    char name[96];
};

/* Row `row` as real: the borrowed row itself, or converted into tmp [cols]. */
const real *REF(weight_row)(const struct rt_weight *w, int64_t row, real *tmp);
/* *out = a vector (rows 1, or cols 1) of n reals for the length of an op: w NULL gives NULL. *own is freed by the caller. */
enum rt_status REF(weight_vec)(const struct rt_weight *w, int64_t n, const real **out, real **own, struct rt_err *err);
/* SHAPE unless w is [rows, cols]. */
enum rt_status REF(weight_check)(const struct rt_weight *w, const char *op, int64_t rows, int64_t cols, struct rt_err *err);

/* e4m3 form of one block of 128 values; returns its scale. float32 throughout. */
float REF(quant_block)(const real *x, bool pow2, uint8_t *code);
/* code [n, cols] and scale [cols/128][n] of row `row` from x [cols]. */
void REF(quant_row)(const real *x, const struct rt_act *q, int64_t row, int64_t n, int64_t cols, bool pow2);

/* Row `row` (of n) of an operand, dot row `out` of w. w_row is weight_row's answer, for act elements; e4m3 operands take the codes. */
double REF(dot_row)(const struct rt_act *x, int64_t ldx, int64_t row, int64_t n, const struct rt_weight *w, int64_t out,
                    const real *w_row, int64_t K);
/* UNSUPPORTED where x is in e4m3 form and w is not, SHAPE where K does not divide into blocks. */
enum rt_status REF(act_check)(const struct rt_act *x, const struct rt_weight *w, const char *op, int64_t K, struct rt_err *err);

static inline int64_t ref_ld(int64_t ld, int64_t dense)
{
    return ld != 0 ? ld : dense;
}

static inline double ref_sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static inline double ref_dot(const real *a, const real *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

#define REF_OP(op) \
    enum rt_status REF(op)(__attribute__((unused)) struct rt_dev *dev, __attribute__((unused)) struct rt_queue *queue, \
                           const struct rt_##op##_args *a, __attribute__((unused)) struct rt_err *err)
#define REF_DECLARE(op) REF_OP(op);
RT_BACKEND_OPS(REF_DECLARE)
#undef REF_DECLARE

#endif
