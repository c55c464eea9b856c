/* Products: cuBLASLt where it can, else kernels of our own. Contracts: gemm.h. */
#include "core/cuda/gemm.h"

#include "core/cuda/convert.h"
#include "core/cuda/gemm_kernels.h"
#include "core/cuda/group8.h"
#include "core/cuda/lt.h"
#include "core/cuda/skinny.h"

enum { BLOCK = 128 };

static int64_t dense(int64_t ld, int64_t cols)
{
    return ld > 0 ? ld : cols;
}

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ---- BF16 ---- */

/* The library takes a bias of the result's type alone: *temp is one, or NULL where g->bias will do. */
static enum rt_status bias_of_type(struct rt_queue *q, const struct rt_cuda_gemm_args *g, void **temp, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (g->bias == NULL || g->bias_f32 == g->d_f32)
        return RT_OK;
    RT_TRY(rt_cuda_temp(q, (size_t)g->n * 4, temp, err));
    RT_TRY(rt_cuda_convert_dtype(q, g->bias, g->bias_f32 ? RT_F32 : RT_BF16, *temp, g->d_f32 ? RT_F32 : RT_BF16, g->n, err));
out:
    return st;
}

enum rt_status rt_cuda_gemm(struct rt_queue *q, const struct rt_cuda_gemm_args *args, struct rt_err *err)
{
    struct rt_cuda_gemm_args g = *args;
    void *bias = NULL;
    bool done = false;
    enum rt_status st = RT_OK;
    if (g.m <= 0 || g.n <= 0 || g.batch < 0)
        return RT_OK;
    g.batch = g.batch > 0 ? g.batch : 1;
    g.lda = dense(g.lda, g.a_t ? g.m : g.k);
    g.ldb = dense(g.ldb, g.b_t ? g.k : g.n);
    g.ldd = dense(g.ldd, g.n);
    if (g.k > 0 && q->dev->lt != NULL) {
        RT_TRY(bias_of_type(q, &g, &bias, err));
        /* row-major d = a b is column-major d^T = b^T a^T */
        const struct rt_lt_call c = {.a = g.b, .b = g.a, .bias = bias != NULL ? bias : g.bias, .add = g.add, .d = g.d, .M = g.n, .N = g.m, .K = g.k,
                                     .lda = g.ldb, .ldb = g.lda, .ldd = g.ldd, .batch = g.batch, .a_stride = g.b_stride, .b_stride = g.a_stride,
                                     .d_stride = g.d_stride, .ta = g.b_t, .tb = g.a_t, .accumulate = g.accumulate, .d_f32 = g.d_f32, .f16 = g.f16,
                                     .bucket_n = !g.a_t, .bucket_k = g.a_t && !g.b_t};
        RT_TRY(rt_cuda_lt_matmul(q, &c, &done, err));
    }
    if (!done && g.f16)
        RT_FAIL(err, UNSUPPORTED, "no product of FP16 matrices %ld x %ld x %ld without cuBLASLt", (long)g.m, (long)g.n, (long)g.k);
    if (!done && g.add != NULL) {
        const size_t size = g.d_f32 ? 4 : 2, row = (size_t)g.ldd * size;
        RT_CUDA_TRY(cudaMemcpy2DAsync(g.d, row, g.add, row, (size_t)g.n * size, (size_t)g.m, cudaMemcpyDeviceToDevice, q->stream));
        g.accumulate = true;
    }
    if (!done)
        RT_TRY(rt_cuda_gemm_mma(q, &g, err));
out:
    rt_cuda_temp_free(q, bias);
    return st;
}

enum rt_status rt_cuda_weight_bf16(struct rt_queue *q, const struct rt_weight *w, const void **data, void **temp, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *temp = NULL;
    *data = w->data;
    if (w->dtype == RT_BF16)
        return RT_OK;
    RT_TRY(rt_cuda_temp(q, (size_t)(w->rows * w->cols) * 2, temp, err));
    *data = *temp;
    if (w->dtype == RT_E4M3)
        RT_TRY(rt_cuda_dequant(q, w, 0, w->rows, *temp, err));
    else
        RT_TRY(rt_cuda_convert_dtype(q, w->data, w->dtype, *temp, RT_BF16, w->rows * w->cols, err));
out:
    return st;
}

enum rt_status rt_cuda_weight_check(const struct rt_weight *w, const char *op, int64_t N, int64_t K, bool quantised, struct rt_err *err)
{
    if (w->rows != N || w->cols != K)
        return rt_fail(err, RT_SHAPE, "%s: a weight is [%ld, %ld], expected [%ld, %ld]", op, (long)w->rows, (long)w->cols, (long)N, (long)K);
    if (quantised && w->dtype != RT_E4M3)
        return rt_fail(err, RT_UNSUPPORTED, "%s: a weight is %s; a product with e4m3 activations needs an e4m3 weight", op, rt_dtype_name(w->dtype));
    if (quantised && K % BLOCK != 0)
        return rt_fail(err, RT_SHAPE, "%s: a weight has %ld columns; e4m3 activations need a multiple of %d", op, (long)K, BLOCK);
    return RT_OK;
}

/* ---- e4m3 ---- */

/* Both operands as BF16, as many rows at a time as the scratch holds. */
static enum rt_status product_dequantised(struct rt_queue *q, const struct rt_cuda_gemm8_args *g, struct rt_err *err)
{
    const size_t size = g->y_f32 ? 4 : 2;
    const int64_t fits = (int64_t)(q->dev->scratch / ((uint64_t)g->K * 2)), rows = min64(g->n, fits > BLOCK ? fits : BLOCK);
    const void *w = NULL;
    void *w_temp = NULL, *x = NULL;
    enum rt_status st;
    RT_TRY(rt_cuda_weight_bf16(q, g->w, &w, &w_temp, err));
    RT_TRY(rt_cuda_temp(q, (size_t)(rows * g->K) * 2, &x, err));
    for (int64_t r = 0; r < g->n; r += rows) {
        const struct rt_act part = {(char *)g->x.data + r * g->K, g->x.scale + r};
        const int64_t n = min64(rows, g->n - r);
        RT_TRY(rt_cuda_dequant_act(q, &part, g->x_scale_ld, n, g->K, x, err));
        const struct rt_cuda_gemm_args one = {.a = x, .b = w, .b_t = true, .d = (char *)g->y + (size_t)(r * g->ldy) * size, .m = n, .n = g->N, .k = g->K,
                                              .ldd = g->ldy, .accumulate = g->accumulate, .d_f32 = g->y_f32};
        RT_TRY(rt_cuda_gemm(q, &one, err));
    }
out:
    rt_cuda_temp_free(q, w_temp);
    rt_cuda_temp_free(q, x);
    return st;
}

static enum rt_status call(struct rt_queue *q, const struct rt_cuda_gemm8_args *g, const float *w_scale, const void *codes, const float *x_scale,
                           int64_t n, void *y, int64_t ldy, bool *done, struct rt_err *err)
{
    const struct rt_lt_call c = {.a = g->w->data, .b = codes, .d = y, .a_scale = w_scale, .b_scale = x_scale, .M = g->N, .N = n, .K = g->K, .lda = g->K,
                                 .ldb = g->K, .ldd = ldy, .batch = 1, .ta = true, .accumulate = g->accumulate, .d_f32 = g->y_f32, .bucket_n = true};
    return rt_cuda_lt_matmul(q, &c, done, err);
}

/* The last n % 4 rows, by the products of few rows. */
static enum rt_status tail(struct rt_queue *q, const struct rt_cuda_gemm8_args *g, int64_t first, bool *done, struct rt_err *err)
{
    const int64_t blocks = g->K / BLOCK;
    char *y = (char *)g->y + (size_t)(first * g->ldy) * (g->y_f32 ? 4 : 2);
    struct rt_linear_fwd_args a = {.x = {(char *)g->x.data + first * g->K, NULL}, .w = g->w, .y = y, .ldy = g->ldy, .n = g->n - first, .K = g->K,
                                   .N = g->N, .accumulate = g->accumulate, .y_f32 = g->y_f32};
    enum rt_status st;
    RT_TRY(rt_cuda_temp(q, (size_t)blocks * 4 * sizeof(float), &a.x.scale, err));
    RT_TRY(rt_cuda_copy_scales(q, g->x.scale + first, g->x_scale_ld, a.x.scale, 4, a.n, blocks, err));
    *done = rt_cuda_skinny_linear_fits(&a);
    if (*done)
        RT_TRY(rt_cuda_skinny_linear(q->dev, q, &a, err));
out:
    rt_cuda_temp_free(q, a.x.scale);
    return st;
}

/* The library's product. *rows: how many rows it made, from the first on. */
static enum rt_status product_scaled(struct rt_queue *q, const struct rt_cuda_gemm8_args *g, int64_t *rows, struct rt_err *err)
{
    const int64_t blocks = g->K / BLOCK, blocks4 = rt_act_rows(blocks), row_blocks = (g->N + BLOCK - 1) / BLOCK, whole = g->n / 4 * 4;
    const int64_t padded = rt_act_rows(g->n);
    const float *w_scale = g->w->scale, *x_scale = g->x.scale;
    float *w_temp = NULL, *x_temp = NULL;
    bool done = true;
    enum rt_status st = RT_OK;
    *rows = 0;
    if (blocks != blocks4 || (uintptr_t)w_scale % 16 != 0) {
        RT_TRY(rt_cuda_temp(q, (size_t)(row_blocks * blocks4) * sizeof *w_temp, &w_temp, err));
        RT_TRY(rt_cuda_copy_scales(q, g->w->scale, blocks, w_temp, blocks4, blocks, row_blocks, err));
        w_scale = w_temp;
    }
    if (g->x_scale_ld == padded && (uintptr_t)x_scale % 16 == 0 && (g->padded || padded == g->n)) {
        RT_TRY(call(q, g, w_scale, g->x.data, x_scale, padded, g->y, g->ldy, &done, err));
        *rows = done ? g->n : 0;
        goto out;
    }
    if (whole > 0) {
        RT_TRY(rt_cuda_temp(q, (size_t)(whole * blocks) * sizeof *x_temp, &x_temp, err));
        RT_TRY(rt_cuda_copy_scales(q, x_scale, g->x_scale_ld, x_temp, whole, whole, blocks, err));
        RT_TRY(call(q, g, w_scale, g->x.data, x_temp, whole, g->y, g->ldy, &done, err));
        *rows = done ? whole : 0;
    }
    if (done && whole < g->n) {
        RT_TRY(tail(q, g, whole, &done, err));
        *rows = done ? g->n : whole;
    }
out:
    rt_cuda_temp_free(q, w_temp);
    rt_cuda_temp_free(q, x_temp);
    return st;
}

/* Our own kernel, for what it takes: whole tiles of columns, scales at the distance of padded rows. Alone it reaches 0.9 of the library's rate
 * (bench/cuda_gemm.c); it wins where it saves passes over memory, in moe_ffn. */
static bool own_fits(const struct rt_queue *q, const struct rt_cuda_gemm8_args *g, uintptr_t bits)
{
    return rt_cuda_group8_fits(q->dev, g->K, g->N, false) && !g->y_f32 && g->x_scale_ld == rt_act_rows(g->n) && bits % 16 == 0 && g->ldy % 8 == 0;
}

static enum rt_status product_own(struct rt_queue *q, const struct rt_cuda_gemm8_args *g, struct rt_err *err)
{
    const int64_t base[2] = {0, rt_act_rows(g->n)};
    const struct rt_cuda_group8 one = {.x = g->x, .base = base, .n_experts = 1, .K = g->K, .N = g->N, .w = &g->w, .y = g->y, .ldy = g->ldy,
                                       .rows = g->n, .accumulate = g->accumulate};
    return rt_cuda_group8(q, &one, err);
}

enum rt_status rt_cuda_gemm8(struct rt_queue *q, const struct rt_cuda_gemm8_args *args, struct rt_err *err)
{
    struct rt_cuda_gemm8_args g = *args;
    int64_t rows = 0;
    enum rt_status st;
    RT_TRY(rt_cuda_weight_check(g.w, "a product", g.N, g.K, true, err));
    if (g.n <= 0)
        goto out;
    g.ldy = dense(g.ldy, g.N);
    g.x_scale_ld = dense(g.x_scale_ld, rt_act_rows(g.n));
    const uintptr_t bits = (uintptr_t)g.x.data | (uintptr_t)g.w->data | (uintptr_t)g.y;
    if (!rt_cuda_lt_block_scaled(q->dev) && own_fits(q, &g, bits))
        return product_own(q, &g, err);
    if (rt_cuda_lt_block_scaled(q->dev) && g.N % 4 == 0 && bits % 16 == 0 && (uint64_t)g.ldy * (g.y_f32 ? 4 : 2) % 16 == 0)
        RT_TRY(product_scaled(q, &g, &rows, err));
    if (rows < g.n) {
        g.x = (struct rt_act){(char *)g.x.data + rows * g.K, g.x.scale + rows};
        g.y = (char *)g.y + (size_t)(rows * g.ldy) * (g.y_f32 ? 4 : 2);
        g.n -= rows;
        RT_TRY(product_dequantised(q, &g, err));
    }
out:
    return st;
}
