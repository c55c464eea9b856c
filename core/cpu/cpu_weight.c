/* Weights: borrowed bytes, a float32 copy where it pays, and panels dequantised into scratch. */
#include <stdio.h>

#include "core/cpu/cpu.h"
#include "core/cpu/simd.h"
#include "core/mem.h"

/* dst[i] = (float)src[i], and times s */
RT_SIMD static void from_bf16(float *restrict dst, const void *restrict src, int64_t n)
{
    const char *p = src;
    for (int64_t i = 0; i < n; i++) {
        uint16_t v;
        memcpy(&v, p + 2 * i, sizeof v);
        dst[i] = rt_from_bits((uint32_t)v << 16);
    }
}

/* Exponents differ by 120 in bias; a subnormal (magnitude < 8) is a multiple of 2^-9; magnitude 127 is NaN. */
RT_SIMD static void from_e4m3(float *restrict dst, const uint8_t *restrict src, int64_t n, float s)
{
    for (int64_t i = 0; i < n; i++) {
        const uint32_t c = src[i], mag = c & 0x7f;
        const uint32_t sub = rt_to_bits((float)(int32_t)mag * 0x1p-9f);
        uint32_t bits = mag < 8 ? sub : (mag << 20) + (120u << 23);
        bits = mag == 0x7f ? 0x7fc00000u : bits;
        dst[i] = rt_from_bits(bits | (c & 0x80) << 24) * s;
    }
}

static void dequant(float *dst, const struct rt_weight *w, int64_t row, int64_t col0, int64_t cols)
{
    const size_t at = (size_t)row * (size_t)w->cols + (size_t)col0;
    switch (w->dtype) {
    case RT_E4M3: {
        const float *scale = w->scale_inv + row / RT_CPU_BLOCK * rt_ceil_div(w->cols, RT_CPU_BLOCK);
        for (int64_t j = col0; j < col0 + cols;) {
            const int64_t block = j / RT_CPU_BLOCK, end = rt_min64((block + 1) * RT_CPU_BLOCK, col0 + cols);
            from_e4m3(dst + (j - col0), (const uint8_t *)w->data + at + (j - col0), end - j, scale[block]);
            j = end;
        }
        break;
    }
    case RT_BF16: from_bf16(dst, (const char *)w->data + at * 2, cols); break;
    case RT_F32: memcpy(dst, (const char *)w->data + at * 4, (size_t)cols * 4); break;
    default: rt_to_f32(dst, (const char *)w->data + at * 2, RT_F16, (size_t)cols);
    }
}

const float *rt_cpu_weight_panel(const struct rt_weight *w, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float *scratch,
                                 int64_t *ld)
{
    if (w->f32 != NULL) {
        *ld = w->cols;
        return w->f32 + row0 * w->cols + col0;
    }
    for (int64_t r = 0; r < rows; r++)
        dequant(scratch + r * cols, w, row0 + r, col0, cols);
    *ld = cols;
    return scratch;
}

void rt_cpu_dequant_row(float *dst, const struct rt_act *x, int64_t row, int64_t n, int64_t cols)
{
    const uint8_t *codes = (const uint8_t *)x->data + row * cols;
    for (int64_t b = 0; b * RT_CPU_BLOCK < cols; b++)
        from_e4m3(dst + b * RT_CPU_BLOCK, codes + b * RT_CPU_BLOCK, rt_min64(RT_CPU_BLOCK, cols - b * RT_CPU_BLOCK),
                  x->scale[b * n + row]);
}

/* float32 data that is aligned is used where it lies; resident matrices and all vectors are float32. */
static bool needs_copy(const struct rt_weight_src *src)
{
    const bool in_place = src->dtype == RT_F32 && (uintptr_t)src->data % _Alignof(float) == 0;
    return !in_place && (src->resident || src->rows == 1 || src->cols == 1);
}

size_t rt_cpu_weight_bytes(const struct rt_weight_src *src)
{
    const size_t handle = rt_arena_round(sizeof(struct rt_weight));
    return needs_copy(src) ? handle + rt_arena_round((size_t)src->rows * (size_t)src->cols * sizeof(float)) : handle;
}

struct copy_job {
    struct rt_weight *w;
};

static void copy_rows(void *ctx, int64_t row0, int64_t row1, __attribute__((unused)) int worker)
{
    const struct copy_job *job = ctx;
    for (int64_t r = row0; r < row1; r++)
        dequant(job->w->copy + r * job->w->cols, job->w, r, 0, job->w->cols);
}

static enum rt_status check_src(const struct rt_weight_src *src, struct rt_err *err)
{
    const char *name = src->name != NULL ? src->name : "unnamed";
    size_t elements;
    if (src->dtype != RT_F32 && src->dtype != RT_F16 && src->dtype != RT_BF16 && src->dtype != RT_E4M3)
        return rt_fail(err, RT_UNSUPPORTED, "weight '%s' is %s; expected F32, F16, BF16 or F8_E4M3", name,
                       rt_dtype_name(src->dtype));
    if (src->rows <= 0 || src->cols <= 0 || src->rows > INT32_MAX || src->cols > INT32_MAX || src->data == NULL ||
        !rt_mul_size((size_t)src->rows, (size_t)src->cols, &elements) || elements > SIZE_MAX / 2 / sizeof(float))
        return rt_fail(err, RT_SHAPE, "weight '%s' is [%lld, %lld]: expected both in 1 .. %d, and data", name,
                       (long long)src->rows, (long long)src->cols, INT32_MAX);
    if ((src->dtype == RT_E4M3) != (src->scale_inv != NULL))
        return rt_fail(err, RT_FORMAT, "weight '%s' is %s and %s; scales belong to F8_E4M3 and to it alone", name,
                       rt_dtype_name(src->dtype), src->scale_inv != NULL ? "has block scales" : "has no block scales");
    return RT_OK;
}

enum rt_status rt_cpu_weight_load(struct rt_dev *dev, __attribute__((unused)) struct rt_queue *q, const struct rt_weight_src *src,
                                  struct rt_weight **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_weight *w = NULL;

    RT_TRY(check_src(src, err));
    RT_TRY(rt_alloc(1, sizeof *w, "a weight handle", &w, err));
    *w = (struct rt_weight){.dtype = src->dtype, .rows = src->rows, .cols = src->cols, .data = src->data,
                            .scale_inv = src->scale_inv};
    if (needs_copy(src)) {
        RT_TRY(rt_alloc((size_t)w->rows * (size_t)w->cols, sizeof(float), src->name != NULL ? src->name : "a weight", &w->copy,
                        err));
        rt_cpu_rows(dev, w->rows, rt_cpu_grain(w->rows, w->cols), copy_rows, &(struct copy_job){w});
        w->f32 = w->copy;
    } else if (src->dtype == RT_F32 && (uintptr_t)src->data % _Alignof(float) == 0) {
        w->f32 = src->data;
    }
    *out = w;
    w = NULL;
out:
    rt_cpu_weight_free(dev, w);
    return st;
}

enum rt_status rt_cpu_weight_param(__attribute__((unused)) struct rt_dev *dev, void *p, int64_t rows, int64_t cols,
                                   struct rt_weight **out, struct rt_err *err)
{
    const enum rt_status st = rt_alloc(1, sizeof **out, "a weight handle", out, err);
    if (st == RT_OK)
        **out = (struct rt_weight){.dtype = RT_F32, .rows = rows, .cols = cols, .data = p, .f32 = p};
    return st;
}

void rt_cpu_weight_free(__attribute__((unused)) struct rt_dev *dev, struct rt_weight *w)
{
    if (w == NULL)
        return;
    rt_free(w->copy);
    rt_free(w);
}

enum rt_status rt_cpu_weight_is(const struct rt_weight *w, int64_t rows, int64_t cols, const char *op, const char *which,
                                struct rt_err *err)
{
    if (w->rows == rows && w->cols == cols)
        return RT_OK;
    return rt_fail(err, RT_SHAPE, "%s: %s is [%lld, %lld], expected [%lld, %lld]", op, which, (long long)w->rows,
                   (long long)w->cols, (long long)rows, (long long)cols);
}

enum rt_status rt_cpu_weight_vec_is(const struct rt_weight *w, int64_t n, const char *op, const char *which, struct rt_err *err)
{
    if ((w->rows == 1 && w->cols == n) || (w->cols == 1 && w->rows == n))
        return RT_OK;
    return rt_fail(err, RT_SHAPE, "%s: %s is [%lld, %lld], expected a vector of %lld", op, which, (long long)w->rows,
                   (long long)w->cols, (long long)n);
}

int64_t rt_cpu_tile_cols(const struct rt_weight *w, int64_t N)
{
    /* 256 wide tiles run at full speed; 128 where a panel of 256 would not fit, or there would be fewer than 4. */
    const bool panel_fits = w->f32 != NULL || w->cols <= RT_CPU_PANEL / 256;
    return panel_fits && N >= 4 * 256 ? 256 : 128;
}

enum { RUN_COLS = RT_CPU_PANEL / RT_CPU_WIDE }; /* of the inner dimension, dequantised at a time */

void rt_cpu_weight_products(const struct rt_weight *const *w, int parts, int64_t col0, int64_t cols, const float *a, int64_t lda, int64_t m,
                            bool exact, bool accumulate, float *panel, float *c, int64_t ldc)
{
    bool whole = exact || parts == 1;
    for (int i = 0; i < parts; i++)
        whole = whole || w[i]->f32 != NULL;
    if (whole) {
        for (int i = 0; i < parts; i++)
            rt_cpu_weight_product(w[i], col0, cols, a, lda, m, exact, accumulate, panel, c + i * cols, ldc);
        return;
    }
    for (int64_t k0 = 0; k0 < w[0]->cols; k0 += RUN_COLS) {
        const int64_t k = rt_min64(RUN_COLS, w[0]->cols - k0);
        int64_t ldb;
        for (int i = 0; i < parts; i++)
            rt_cpu_weight_panel(w[i], col0, cols, k0, k, panel + i * cols * k, &ldb);
        rt_cpu_gemm_nt(m, parts * cols, k, 1, a + k0, lda, panel, k, accumulate || k0 > 0 ? 1 : 0, c, ldc);
    }
}

void rt_cpu_weight_product(const struct rt_weight *w, int64_t col0, int64_t cols, const float *a, int64_t lda, int64_t m, bool exact,
                           bool accumulate, float *panel, float *c, int64_t ldc)
{
    const int64_t run = w->f32 != NULL ? w->cols : RUN_COLS;
    for (int64_t k0 = 0; k0 < w->cols; k0 += run) {
        const int64_t k = rt_min64(run, w->cols - k0);
        int64_t ldb;
        const float *b = rt_cpu_weight_panel(w, col0, cols, k0, k, panel, &ldb);
        if (exact)
            rt_cpu_exact_nt(m, cols, k, a + k0, lda, b, ldb, accumulate || k0 > 0, c, ldc);
        else
            rt_cpu_gemm_nt(m, cols, k, 1, a + k0, lda, b, ldb, accumulate || k0 > 0 ? 1 : 0, c, ldc);
    }
}
