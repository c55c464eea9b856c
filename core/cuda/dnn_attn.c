/* The graphs: scaled causal attention from products, pointwise operations and reductions, in the order and with the element types that the
 * library's fused engines recognise (NVIDIA's cudnn-frontend documents them by building them; cuDNN 9.14 and 9.19 take these). */
#include "core/cuda/cuda.h"

#if __has_include(<cudnn.h>)

#include "core/cuda/dnn_attn.h"

#define F32 CUDNN_DATA_FLOAT
#define BF16 CUDNN_DATA_BFLOAT16
#define I32 CUDNN_DATA_INT32
#define BOOL CUDNN_DATA_BOOLEAN

/* Tensors and sizes that the steps share. */
struct attn {
    struct rt_dnn_graph *g;
    const struct rt_dnn_attn *s;
    rt_dnn_t len, never;
    int64_t score[4], stat[4]; /* dimensions of scores and of one number a row */
};

static struct attn attn_begin(struct rt_dnn_graph *g, const struct rt_dnn_attn *s)
{
    const int64_t one[4] = {1, 1, 1, 1}, batch[4] = {s->batch, 1, 1, 1};
    struct attn a = {.g = g, .s = s, .score = {s->batch, s->heads, s->rows, s->rows}, .stat = {s->batch, s->heads, s->rows, 1}};
    a.len = s->padded ? rt_dnn_tensor(g, RT_DNN_LEN, I32, batch, one, NULL) : NULL;
    a.never = rt_dnn_scalar(g, RT_DNN_NEVER);
    return a;
}

static rt_dnn_t offsets(const struct attn *a, int64_t uid)
{
    const int64_t one[4] = {1, 1, 1, 1}, dim[4] = {a->s->batch + 1, 1, 1, 1};
    return a->s->ragged ? rt_dnn_tensor(a->g, uid, CUDNN_DATA_INT64, dim, one, NULL) : NULL;
}

/* [batch, heads, rows, d] in memory */
static rt_dnn_t rows_of(const struct attn *a, int64_t uid, int64_t heads, int64_t d, int64_t ld, int64_t head, rt_dnn_t off)
{
    const int64_t dim[4] = {a->s->batch, heads, a->s->rows, d}, stride[4] = {a->s->rows * ld, head, ld, 1};
    return rt_dnn_tensor(a->g, uid, BF16, dim, stride, off);
}

/* The same with rows and elements exchanged: the second factor of Q K^T. */
static rt_dnn_t columns_of(const struct attn *a, int64_t uid, int64_t heads, int64_t d, int64_t ld, int64_t head, rt_dnn_t off)
{
    const int64_t dim[4] = {a->s->batch, heads, d, a->s->rows}, stride[4] = {a->s->rows * ld, head, 1, ld};
    return rt_dnn_tensor(a->g, uid, BF16, dim, stride, off);
}

/* One float for each row and head. */
static rt_dnn_t stat_of(const struct attn *a, int64_t uid, rt_dnn_t off)
{
    const int64_t H = a->s->heads, R = a->s->rows, dense[4] = {H * R, R, 1, 1}, by_row[4] = {H * R, 1, H, 1};
    return rt_dnn_tensor(a->g, uid, F32, a->stat, a->s->ragged ? by_row : dense, off);
}

static rt_dnn_t inner(const struct attn *a, cudnnDataType_t type, const int64_t dim[4])
{
    return rt_dnn_virtual(a->g, type, dim, NULL, NULL);
}

static rt_dnn_t binary(const struct attn *a, cudnnPointwiseMode_t mode, rt_dnn_t x, rt_dnn_t b, const int64_t dim[4])
{
    rt_dnn_t y = inner(a, F32, dim);
    rt_dnn_pointwise(a->g, mode, F32, 0, x, b, NULL, y);
    return y;
}

/* x where row < LEN and column < LEN, else never. */
static rt_dnn_t mask_padding(const struct attn *a, rt_dnn_t x)
{
    rt_dnn_t row = inner(a, I32, a->score), col = inner(a, I32, a->score), row_in = inner(a, BOOL, a->score), col_in = inner(a, BOOL, a->score),
             both = inner(a, BOOL, a->score), y = inner(a, F32, a->score);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_GEN_INDEX, I32, 2, x, NULL, NULL, row);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_GEN_INDEX, I32, 3, x, NULL, NULL, col);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_CMP_LT, BOOL, 0, row, a->len, NULL, row_in);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_CMP_LT, BOOL, 0, col, a->len, NULL, col_in);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_LOGICAL_AND, BOOL, 0, row_in, col_in, NULL, both);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_BINARY_SELECT, F32, 0, x, a->never, both, y);
    return y;
}

/* x where row >= column, else never. */
static rt_dnn_t mask_causal(const struct attn *a, rt_dnn_t x)
{
    rt_dnn_t row = inner(a, I32, a->score), col = inner(a, I32, a->score), in = inner(a, BOOL, a->score), y = inner(a, F32, a->score);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_GEN_INDEX, F32, 2, x, NULL, NULL, row);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_GEN_INDEX, F32, 3, x, NULL, NULL, col);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_CMP_GE, BOOL, 0, row, col, NULL, in);
    rt_dnn_pointwise(a->g, CUDNN_POINTWISE_BINARY_SELECT, F32, 0, x, a->never, in, y);
    return y;
}

static rt_dnn_t scaled_scores(const struct attn *a, rt_dnn_t q, rt_dnn_t kt, rt_dnn_t scale)
{
    rt_dnn_t s = inner(a, F32, a->score);
    rt_dnn_matmul(a->g, q, kt, s, a->len, a->len, NULL);
    return binary(a, CUDNN_POINTWISE_MUL, s, scale, a->score);
}

static void forward(struct rt_dnn_graph *g, const struct rt_dnn_attn *s)
{
    const struct attn a = attn_begin(g, s);
    rt_dnn_t q = rows_of(&a, RT_DNN_Q, s->heads, s->dqk, s->q_ld, s->q_head, offsets(&a, RT_DNN_OFF_Q));
    rt_dnn_t kt = columns_of(&a, RT_DNN_K, s->kv_heads, s->dqk, s->k_ld, s->k_head, offsets(&a, RT_DNN_OFF_K));
    rt_dnn_t v = rows_of(&a, RT_DNN_V, s->kv_heads, s->dv, s->v_ld, s->v_head, offsets(&a, RT_DNN_OFF_V));
    rt_dnn_t o = rows_of(&a, RT_DNN_O, s->heads, s->dv, s->o_ld, s->dv, offsets(&a, RT_DNN_OFF_O));
    rt_dnn_t x = scaled_scores(&a, q, kt, rt_dnn_scalar(g, RT_DNN_SCALE));
    if (s->padded)
        x = mask_padding(&a, x);
    x = mask_causal(&a, x);
    rt_dnn_t top = inner(&a, F32, a.stat), sum = inner(&a, F32, a.stat), log = inner(&a, F32, a.stat), e = inner(&a, F32, a.score),
             p = inner(&a, BF16, a.score);
    rt_dnn_t lse = s->stats ? stat_of(&a, RT_DNN_LSE, offsets(&a, RT_DNN_OFF_S)) : inner(&a, F32, a.stat);
    rt_dnn_reduction(g, CUDNN_REDUCE_TENSOR_MAX, x, top);
    rt_dnn_pointwise(g, CUDNN_POINTWISE_EXP, F32, 0, binary(&a, CUDNN_POINTWISE_SUB, x, top, a.score), NULL, NULL, e);
    rt_dnn_reduction(g, CUDNN_REDUCE_TENSOR_ADD, e, sum);
    rt_dnn_pointwise(g, CUDNN_POINTWISE_LOG, F32, 0, sum, NULL, NULL, log);
    rt_dnn_pointwise(g, CUDNN_POINTWISE_ADD, F32, 0, top, log, NULL, lse);
    rt_dnn_pointwise(g, CUDNN_POINTWISE_DIV, F32, 0, e, sum, NULL, p);
    rt_dnn_matmul(g, p, v, o, a.len, NULL, a.len);
}

/* x [.., rows, rows] read with rows and columns exchanged, as bfloat16 */
static rt_dnn_t transposed(const struct attn *a, rt_dnn_t x)
{
    const int64_t R = a->s->rows, stride[4] = {a->s->heads * R * R, R * R, 1, R};
    rt_dnn_t y = rt_dnn_virtual(a->g, BF16, a->score, stride, NULL);
    rt_dnn_reshape(a->g, x, y);
    return y;
}

/* out [batch, kv_heads, rows, d] = xt y, summed over the query heads of each key head. */
static void grouped_product(const struct attn *a, rt_dnn_t xt, rt_dnn_t y, int64_t d, rt_dnn_t out)
{
    const int64_t dim[4] = {a->s->batch, a->s->heads, a->s->rows, d};
    if (a->s->heads == a->s->kv_heads) {
        rt_dnn_matmul(a->g, xt, y, out, a->len, NULL, a->len);
        return;
    }
    rt_dnn_t all = rt_dnn_virtual(a->g, BF16, dim, NULL, NULL);
    rt_dnn_matmul(a->g, xt, y, all, a->len, NULL, a->len);
    rt_dnn_reduction(a->g, CUDNN_REDUCE_TENSOR_ADD, all, out);
}

static void backward(struct rt_dnn_graph *g, const struct rt_dnn_attn *s)
{
    const struct attn a = attn_begin(g, s);
    const int64_t H = s->heads, Hk = s->kv_heads, R = s->rows;
    const int64_t od[4] = {s->batch, H, R, s->dv}, od_stride[4] = {H * R * s->dv, R * s->dv, H * s->dv, 1};
    rt_dnn_t off_q = offsets(&a, RT_DNN_OFF_Q), off_k = offsets(&a, RT_DNN_OFF_K), off_v = offsets(&a, RT_DNN_OFF_V);
    rt_dnn_t off_o = offsets(&a, RT_DNN_OFF_O), off_s = offsets(&a, RT_DNN_OFF_S);
    rt_dnn_t q = rows_of(&a, RT_DNN_Q, H, s->dqk, s->q_ld, s->q_head, off_q), kt = columns_of(&a, RT_DNN_K, Hk, s->dqk, s->k_ld, s->k_head, off_k);
    rt_dnn_t vt = columns_of(&a, RT_DNN_V, Hk, s->dv, s->v_ld, s->v_head, off_v), o = rows_of(&a, RT_DNN_O, H, s->dv, s->o_ld, s->dv, off_o);
    rt_dnn_t dout = rows_of(&a, RT_DNN_DO, H, s->dv, s->o_ld, s->dv, off_o), lse = stat_of(&a, RT_DNN_LSE, off_s);
    rt_dnn_t delta = stat_of(&a, RT_DNN_DELTA, off_s), dq = rows_of(&a, RT_DNN_DQ, H, s->dqk, s->q_ld, s->q_head, off_q);
    rt_dnn_t dk = rows_of(&a, RT_DNN_DK, Hk, s->dqk, s->k_ld, s->k_head, off_k), dv = rows_of(&a, RT_DNN_DV, Hk, s->dv, s->v_ld, s->v_head, off_v);
    rt_dnn_t scale = rt_dnn_scalar(g, RT_DNN_SCALE), one = rt_dnn_scalar(g, RT_DNN_ONE);

    rt_dnn_t both = rt_dnn_virtual(g, F32, od, od_stride, NULL), row = inner(&a, F32, a.stat);
    rt_dnn_pointwise(g, CUDNN_POINTWISE_MUL, F32, 0, dout, o, NULL, both);
    rt_dnn_reduction(g, CUDNN_REDUCE_TENSOR_ADD, both, row);
    rt_dnn_pointwise(g, CUDNN_POINTWISE_MUL, F32, 0, row, one, NULL, delta);

    rt_dnn_t x = scaled_scores(&a, q, kt, scale), p = inner(&a, F32, a.score);
    if (s->padded)
        x = mask_padding(&a, x);
    x = mask_causal(&a, binary(&a, CUDNN_POINTWISE_SUB, x, lse, a.score));
    rt_dnn_pointwise(g, CUDNN_POINTWISE_EXP, F32, 0, x, NULL, NULL, p);
    grouped_product(&a, transposed(&a, p), dout, s->dv, dv);

    rt_dnn_t dp = inner(&a, F32, a.score);
    rt_dnn_matmul(g, dout, vt, dp, a.len, a.len, NULL);
    rt_dnn_t ds = binary(&a, CUDNN_POINTWISE_MUL, binary(&a, CUDNN_POINTWISE_SUB, dp, delta, a.score), p, a.score);
    ds = binary(&a, CUDNN_POINTWISE_MUL, ds, scale, a.score);
    grouped_product(&a, transposed(&a, ds), q, s->dqk, dk);

    /* dS straight into the product: the engine keeps it whole in its workspace and sums dQ in a fixed order */
    const int64_t k_dim[4] = {s->batch, Hk, R, s->dqk}, k_stride[4] = {R * s->k_ld, s->k_head, s->k_ld, 1};
    rt_dnn_t k = rt_dnn_virtual(g, BF16, k_dim, k_stride, off_k);
    rt_dnn_reshape(g, kt, k);
    rt_dnn_matmul(g, ds, k, dq, a.len, NULL, a.len);
}

void rt_dnn_attn_graph(struct rt_dnn_graph *g, const struct rt_dnn_attn *s)
{
    if (s->backward)
        backward(g, s);
    else
        forward(g, s);
}

#endif
