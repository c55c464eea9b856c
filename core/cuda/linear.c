/* Linear layers: forward and the two gradients. Contracts: core/backend.h. */
#include "core/cuda/gemm.h"
#include "core/cuda/gemm_kernels.h"
#include "core/cuda/skinny.h"
#include "core/cuda/student_rows.h"

#define UNUSED __attribute__((unused))

/* SHAPE or UNSUPPORTED unless bias is NULL or a vector of N that the kernels know. */
static enum rt_status check_bias(const struct rt_weight *bias, int64_t N, struct rt_err *err)
{
    if (bias == NULL || (bias->rows * bias->cols == N && (bias->dtype == RT_BF16 || bias->dtype == RT_F32)))
        return RT_OK;
    return rt_fail(err, RT_SHAPE, "linear_fwd: a bias of %ld values of %s, expected %ld of BF16 or F32", (long)(bias->rows * bias->cols),
                   rt_dtype_name(bias->dtype), (long)N);
}

static enum rt_status quantised(struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err)
{
    struct rt_cuda_gemm8_args g = {.x = a->x, .w = a->w, .y = a->y, .n = a->n, .K = a->K, .N = a->N, .ldy = a->ldy, .accumulate = a->accumulate,
                                   .y_f32 = a->y_f32};
    enum rt_status st;
    if (a->bias != NULL) { /* first, so that the product rounds the sum of both */
        RT_TRY(rt_cuda_fill_bias(q, a->y, a->y_f32, a->ldy > 0 ? a->ldy : a->N, a->n, a->N, a->bias->data, a->bias->dtype == RT_F32, a->accumulate, err));
        g.accumulate = true;
    }
    RT_TRY(rt_cuda_gemm8(q, &g, err));
out:
    return st;
}

/* add to y, and the product to that. */
static enum rt_status add_first(struct rt_dev *dev, struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_linear_fwd_args onto = *a;
    RT_CUDA_TRY(cudaMemcpyAsync(a->y, a->add, (size_t)(a->n * a->N) * 2, cudaMemcpyDeviceToDevice, q->stream));
    onto.add = NULL;
    onto.accumulate = true;
    RT_TRY(rt_cuda_linear_fwd(dev, q, &onto, err));
out:
    return st;
}

enum rt_status rt_cuda_linear_fwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err)
{
    const void *w = NULL;
    void *temp = NULL;
    enum rt_status st;
    RT_TRY(rt_cuda_weight_check(a->w, "linear_fwd", a->N, a->K, a->x.scale != NULL, err));
    RT_TRY(check_bias(a->bias, a->N, err));
    if (a->add != NULL && (a->x.scale != NULL || rt_cuda_skinny_hopper_fits(dev, a) || rt_cuda_skinny_linear_fits(a)))
        return add_first(dev, q, a, err);
    if (rt_cuda_skinny_hopper_fits(dev, a))
        return rt_cuda_skinny_hopper(q, a, err);
    if (rt_cuda_skinny_linear_fits(a))
        return rt_cuda_skinny_linear(dev, q, a, err);
    if (a->x.scale != NULL) {
        RT_TRY(quantised(q, a, err));
        goto out;
    }
    RT_TRY(rt_cuda_weight_bf16(q, a->w, &w, &temp, err));
    const struct rt_cuda_gemm_args g = {.a = a->x.data, .b = w, .d = a->y, .bias = a->bias != NULL ? a->bias->data : NULL, .add = a->add, .m = a->n, .n = a->N,
                                        .k = a->K, .lda = a->ldx, .ldd = a->ldy, .b_t = true, .accumulate = a->accumulate, .d_f32 = a->y_f32,
                                        .bias_f32 = a->bias != NULL && a->bias->dtype == RT_F32};
    RT_TRY(rt_cuda_gemm(q, &g, err));
out:
    rt_cuda_temp_free(q, temp);
    return st;
}

enum rt_status rt_cuda_linear_rope_put(struct rt_dev *dev, struct rt_queue *q, const struct rt_linear_rope_put_args *a, struct rt_err *err)
{
    struct rt_rope_put_args put = a->put;
    const struct rt_linear_fwd_args product = {.x = {(void *)(uintptr_t)a->x, NULL}, .w = a->w, .bias = a->bias, .y = a->tmp, .n = put.n, .K = a->K,
                                               .N = (int64_t)(put.nh + 2 * put.nkv) * put.d, .row_exact = true};
    enum rt_status st;
    RT_TRY(rt_cuda_weight_check(a->w, "linear_rope_put", product.N, a->K, false, err));
    RT_TRY(check_bias(a->bias, product.N, err));
    if (rt_cuda_skinny_hopper_heads_fit(dev, &product, &put))
        return rt_cuda_skinny_hopper_heads(q, &product, &put, err);
    put.qkv = a->tmp;
    RT_TRY(rt_cuda_linear_fwd(dev, q, &product, err));
    RT_TRY(rt_cuda_rope_put(dev, q, &put, err));
out:
    return st;
}

enum rt_status rt_cuda_linear_dgrad(UNUSED struct rt_dev *dev, struct rt_queue *q, const struct rt_linear_dgrad_args *a, struct rt_err *err)
{
    const void *w = NULL;
    void *temp = NULL;
    enum rt_status st;
    RT_TRY(rt_cuda_weight_check(a->w, "linear_dgrad", a->N, a->K, false, err));
    RT_TRY(rt_cuda_weight_bf16(q, a->w, &w, &temp, err));
    const struct rt_cuda_gemm_args g = {.a = a->dy, .b = w, .d = a->dx, .m = a->n, .n = a->K, .k = a->N, .lda = a->lddy, .accumulate = a->accumulate};
    RT_TRY(rt_cuda_gemm(q, &g, err));
out:
    rt_cuda_temp_free(q, temp);
    return st;
}

enum rt_status rt_cuda_linear_wgrad(UNUSED struct rt_dev *dev, struct rt_queue *q, const struct rt_linear_wgrad_args *a, struct rt_err *err)
{
    const struct rt_cuda_gemm_args g = {.a = a->dy, .b = a->x, .d = a->dw, .m = a->N, .n = a->K, .k = a->n, .lda = a->lddy > 0 ? a->lddy : a->N,
                                        .ldb = a->ldx, .a_t = true, .accumulate = !a->first};
    enum rt_status st = RT_OK;
    if (a->n <= 0)
        return RT_OK;
    RT_TRY(rt_cuda_gemm(q, &g, err));
    if (a->db != NULL)
        RT_TRY(rt_cuda_column_sums(q, a->dy, g.lda, a->n, a->N, a->db, a->first, err));
out:
    return st;
}
