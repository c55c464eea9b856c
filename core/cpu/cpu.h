/* The cpu backend inside: device context, scratch, weights and products that its operations share. Not included outside core/cpu.
 *
 * Products run on OpenBLAS, single-threaded, called on tiles from our own pool; where the result of a row must not depend on the
 * other rows (row_exact, router, caches) on our own kernels, which sum each element in an order that depends on K alone.
 * Tiles are cut from shapes alone. An operation may use the whole scratch; nothing in it outlives the call.
 */
#ifndef RT_CORE_CPU_CPU_H
#define RT_CORE_CPU_CPU_H

#include <stdbool.h>
#include <stdint.h>

#include "core/host_device.h"
#include "core/pool.h"
#include "core/status.h"

/* Scratch of each worker, in floats: a panel of dequantised weight and a region for tiles of results. */
enum {
    RT_CPU_PANEL = 1 << 20,
    RT_CPU_TILE = 1 << 19,
    RT_CPU_WIDE = 512, /* most columns of a dequantised panel */
    RT_CPU_BLOCK = 128, /* columns that share a scale of e4m3, rows as well in a weight */
};
/* Bytes of shared scratch that an operation cuts its rows for; one row alone may need more. */
#define RT_CPU_SHARED_MAX ((size_t)48 << 20)

struct rt_dev {
    struct rt_host_dev host;
    struct rt_pool *pool;
    int threads;
    float **panel, **tile; /* [threads] */
    void *shared;          /* grows to the largest request */
    size_t shared_size;
    size_t shared_max;     /* RT_CPU_SHARED_MAX; less in tests */
    char description[96];
};

struct rt_weight {
    enum rt_dtype dtype;
    int64_t rows, cols;
    const void *data;       /* borrowed, [rows, cols] of dtype, any alignment */
    const float *scale_inv; /* borrowed, [ceil(rows/128), ceil(cols/128)], or NULL */
    const float *f32;       /* [rows, cols] where kept as float32: data itself, or `copy`; else NULL */
    float *copy;            /* owned, or NULL */
};

/* Worker's scratch: RT_CPU_PANEL and RT_CPU_TILE floats, 64-byte aligned. */
static inline float *rt_cpu_panel(const struct rt_dev *dev, int worker) { return dev->panel[worker]; }
static inline float *rt_cpu_tile(const struct rt_dev *dev, int worker) { return dev->tile[worker]; }

/* *out = one block of at least `bytes` for the current operation, not zeroed, 64-byte aligned; dev's. Error NOMEM. */
enum rt_status rt_cpu_shared(struct rt_dev *dev, size_t bytes, void *out_ptr_to_ptr, struct rt_err *err);

/* Rows of an item when n rows are shared out and each costs about `cost` simple element operations: >= 1. */
int64_t rt_cpu_grain(int64_t n, int64_t cost);
/* fn(ctx, row0, row1, worker) over [0, n) in runs of `grain` rows. */
typedef void rt_cpu_rows_fn(void *ctx, int64_t row0, int64_t row1, int worker);
void rt_cpu_rows(struct rt_dev *dev, int64_t n, int64_t grain, rt_cpu_rows_fn *fn, void *ctx);

static inline int64_t rt_min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rt_max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t rt_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- weights (cpu_weight.c) ---- */
enum rt_status rt_cpu_weight_load(struct rt_dev *dev, struct rt_queue *q, const struct rt_weight_src *src, struct rt_weight **out,
                                  struct rt_err *err);
enum rt_status rt_cpu_weight_param(struct rt_dev *dev, void *p, int64_t rows, int64_t cols, struct rt_weight **out,
                                   struct rt_err *err);
void rt_cpu_weight_free(struct rt_dev *dev, struct rt_weight *w);
size_t rt_cpu_weight_bytes(const struct rt_weight_src *src);
/* float32 values of w[row0 .. +rows, col0 .. +cols], row distance *ld: w's own where it has them, else dequantised into scratch
 * [rows, cols]. A vector (rows or cols 1) always has w->f32. */
const float *rt_cpu_weight_panel(const struct rt_weight *w, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float *scratch,
                                 int64_t *ld);
/* SHAPE unless w is [rows, cols]; op and which are for the message. */
enum rt_status rt_cpu_weight_is(const struct rt_weight *w, int64_t rows, int64_t cols, const char *op, const char *which,
                                struct rt_err *err);
/* SHAPE unless w is a vector of n. */
enum rt_status rt_cpu_weight_vec_is(const struct rt_weight *w, int64_t n, const char *op, const char *which, struct rt_err *err);
/* h = silu(gate) * up, n elements; h may be gate (cpu_rows.c) */
void rt_cpu_swiglu_row(float *h, const float *gate, const float *up, int64_t n);
/* dst[0..cols) = code * scale of row `row` of a quantised matrix with n rows (see struct rt_act). */
void rt_cpu_dequant_row(float *dst, const struct rt_act *x, int64_t row, int64_t n, int64_t cols);
/* Columns of a product's tile, out of N: 256 or 128. */
int64_t rt_cpu_tile_cols(const struct rt_weight *w, int64_t N);
/* c[m, cols] = or += a[m, K] w[col0 .. + cols, 0:K]^T on this thread, w dequantised through the worker's panel; exact:
 * by cpu_exact.c. cols <= RT_CPU_WIDE. */
void rt_cpu_weight_product(const struct rt_weight *w, int64_t col0, int64_t cols, const float *a, int64_t lda, int64_t m, bool exact,
                           bool accumulate, float *panel, float *c, int64_t ldc);
/* The same columns of `parts` weights of one shape beside each other: c[m, parts * cols]; a is packed once for all. parts * cols <=
 * RT_CPU_WIDE. */
void rt_cpu_weight_products(const struct rt_weight *const *w, int parts, int64_t col0, int64_t cols, const float *a, int64_t lda, int64_t m,
                            bool exact, bool accumulate, float *panel, float *c, int64_t ldc);

/* ---- e4m3 forms (cpu_quant.c) ---- */
/* Row `row` of the e4m3 form q (of n rows) from x [cols]; cols % 128 == 0. */
void rt_cpu_quant_row(const float *x, const struct rt_act *q, int64_t row, int64_t n, int64_t cols, bool pow2);
/* x [cols] = what its e4m3 form stands for. */
void rt_cpu_quant_round(float *x, int64_t cols, bool pow2);
/* SHAPE unless cols divides into blocks. */
enum rt_status rt_cpu_quant_check(const char *op, int64_t cols, struct rt_err *err);
/* UNSUPPORTED where x is in e4m3 form and w is not, SHAPE where K does not divide into blocks. */
enum rt_status rt_cpu_act_check(const struct rt_act *x, const struct rt_weight *w, const char *op, int64_t K, struct rt_err *err);

/* ---- products on the calling thread (cpu_blas.c); c = alpha product (beta 0) or += (beta 1); row-major, OpenBLAS ---- */
/* c[m,n] = a[m,k] b[n,k]^T */
void rt_cpu_gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                    float *c, int64_t ldc);
/* c[m,n] = a[m,k] b[k,n] */
void rt_cpu_gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                    float *c, int64_t ldc);
/* c[m,n] = a[k,m]^T b[k,n] */
void rt_cpu_gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                    float *c, int64_t ldc);

/* ---- exact products (cpu_exact.c): element (i, j) depends on row i of a and on b alone, bit for bit, whatever m and n ---- */
/* c[m,n] = a[m,k] b[n,k]^T, or += */
void rt_cpu_exact_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, bool accumulate,
                     float *c, int64_t ldc);
/* c[m,n] = a[m,k] b[k,n], or += */
void rt_cpu_exact_nn(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, bool accumulate,
                     float *c, int64_t ldc);

/* ---- OpenBLAS (cpu_blas.c) ---- */
/* One thread, a kernel that fits the processor, buffers of each worker reserved, a small product checked. Error DEVICE. */
enum rt_status rt_cpu_blas_setup(struct rt_pool *pool, struct rt_err *err);
const char *rt_cpu_blas_core(void);

/* ---- operations: each as core/backend.h says ---- */
/* db [cols] += (or, with `first`, =) the sums over the rows of dy. */
void rt_cpu_column_sums(float *db, const float *dy, int64_t lddy, int64_t rows, int64_t cols, bool first);
/* Rows t0 .. t1 of headnorm_rope_fwd, by the calling thread. */
void rt_cpu_heads_fwd(const struct rt_headnorm_rope_fwd_args *a, int64_t t0, int64_t t1);

#define RT_CPU_OP(op) \
    enum rt_status rt_cpu_##op(struct rt_dev *, struct rt_queue *, const struct rt_##op##_args *, struct rt_err *);
RT_BACKEND_OPS(RT_CPU_OP)
#undef RT_CPU_OP

#endif
