/* linear_fwd and moe_ffn of few rows (skinny.h): what fits, and the arguments of the kernel. */
#include "core/cuda/skinny.h"

#include "core/cuda/mma.cuh"
#include "core/cuda/skinny_product.h"
#include "core/cuda/vec8.cuh"
#include "core/mem.h"

namespace {

typedef struct rt_skinny_product product;

enum { COMBINE = 256 /* threads */ };

bool weight_fits(const struct rt_weight *w, int64_t N, int64_t K)
{
    const int64_t size = w->dtype == RT_E4M3 ? 1 : 2;
    return (w->dtype == RT_E4M3 || w->dtype == RT_BF16) && w->rows == N && w->cols == K && K * size % 16 == 0 && vec8::aligned16(w->data);
}

bool operand_fits(const struct rt_act *x, int64_t ldx, int64_t K)
{
    return vec8::aligned16(x->data) && (x->scale != NULL ? K % 128 == 0 : K % 8 == 0 && ldx % 8 == 0);
}

void set_weight(struct rt_skinny_group *e, int i, const struct rt_weight *w)
{
    e->w[i] = (const uint8_t *)w->data;
    e->scale[i] = w->scale;
}

}

bool rt_cuda_skinny_linear_fits(const struct rt_linear_fwd_args *a)
{
    const bool quantised = a->x.scale != NULL;
    if (a->n < 1 || a->K < 1 || a->N < 1 || !weight_fits(a->w, a->N, a->K) || !operand_fits(&a->x, quantised ? 0 : a->ldx, a->K))
        return false;
    if (quantised && a->w->dtype != RT_E4M3)
        return false;
    if (a->bias != NULL && ((a->bias->dtype != RT_BF16 && a->bias->dtype != RT_F32) || a->bias->rows * a->bias->cols != a->N))
        return false;
    return a->n <= (a->w->dtype == RT_E4M3 && !quantised ? RT_CUDA_SKINNY_ROWS_W8A16 : RT_CUDA_SKINNY_ROWS);
}

enum rt_status rt_cuda_skinny_linear(struct rt_dev *, struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err)
{
    product p = {};
    set_weight(&p.one, 2, a->w);
    p.one.rows = (int32_t)a->n;
    p.first = p.second = 2;
    p.x = a->x.data;
    p.x_scale = a->x.scale;
    p.x_scale_ld = rt_act_rows(a->n);
    p.ldx = a->x.scale != NULL || a->ldx == 0 ? a->K : a->ldx;
    p.N = a->N;
    p.K = a->K;
    p.out = a->y_f32 ? RT_SKINNY_F32 : RT_SKINNY_BF16;
    p.y = a->y;
    p.ldy = a->ldy != 0 ? a->ldy : a->N;
    p.bias = a->bias != NULL ? a->bias->data : NULL;
    p.bias_f32 = a->bias != NULL && a->bias->dtype == RT_F32;
    p.accumulate = a->accumulate;
    return rt_skinny_single(q, &p, a->w->dtype == RT_E4M3, err);
}

/* ---- experts ---- */

namespace {

/* y[t,:] += sum over the token's rows, in ascending order, of weight * out[row,:]; float32, rounded once. A block: 1024 columns of a token. */
__global__ void combine_kernel(const float *__restrict__ out, const int32_t *__restrict__ inverse, const float *__restrict__ weight,
                               __nv_bfloat16 *__restrict__ y, int k, int64_t H)
{
    __shared__ int32_t rows[32];
    __shared__ float weights[32];
    __shared__ int count;
    const int64_t t = blockIdx.x, c = ((int64_t)blockIdx.y * COMBINE + threadIdx.x) * 4;
    if (threadIdx.x == 0) {
        int n = 0;
        for (int j = 0; j < k; j++) {
            const int32_t r = inverse[t * k + j];
            int at = n;
            if (r < 0)
                continue;
            for (; at > 0 && rows[at - 1] > r; at--) {
                rows[at] = rows[at - 1];
                weights[at] = weights[at - 1];
            }
            rows[at] = r;
            weights[at] = weight[t * k + j];
            n++;
        }
        count = n;
    }
    __syncthreads();
    if (count == 0 || c >= H)
        return;
    __nv_bfloat16 *to = y + t * H + c;
    float4 sum = make_float4(__bfloat162float(to[0]), __bfloat162float(to[1]), __bfloat162float(to[2]), __bfloat162float(to[3]));
    for (int j = 0; j < count; j++) {
        const float4 v = *(const float4 *)(const void *)(out + rows[j] * H + c);
        sum.x += weights[j] * v.x, sum.y += weights[j] * v.y, sum.z += weights[j] * v.z, sum.w += weights[j] * v.w;
    }
    *(uint2 *)(void *)to = make_uint2(mma::pack_bf16(sum.x, sum.y), mma::pack_bf16(sum.z, sum.w));
}

/* What a call over experts works with beside its arguments. */
struct experts {
    struct rt_skinny_group *host, *table; /* host and device: experts that have rows, cut into blocks of RT_SKINNY_MOST */
    int n_groups, most;         /* most: rows of the largest block */
    int64_t first, rows;        /* rows of the sorted order */
    void *h, *h_codes, *h_scale;
    float *out;                 /* [rows, H] */
    int32_t *inverse;           /* [n * k] */
};

/* The rows of expert e: first and count. */
int64_t expert_rows(const struct rt_moe_ffn_args *a, int e, int64_t *first)
{
    *first = a->perm != NULL ? a->offset[e] : 0;
    return a->perm != NULL ? (int64_t)a->offset[e + 1] - a->offset[e] : a->n;
}

enum rt_status make_groups(struct rt_queue *q, const struct rt_moe_ffn_args *a, struct experts *x, struct rt_err *err)
{
    int64_t first, blocks = 0;
    enum rt_status st;
    for (int e = 0; e < a->n_experts; e++)
        blocks += (expert_rows(a, e, &first) + RT_SKINNY_MOST - 1) / RT_SKINNY_MOST;
    RT_TRY(rt_alloc((size_t)blocks, sizeof *x->host, "a list of experts", &x->host, err));
    for (int e = 0; e < a->n_experts; e++) {
        const int64_t rows = expert_rows(a, e, &first);
        for (int64_t r = 0; r < rows; r += RT_SKINNY_MOST) {
            struct rt_skinny_group *g = &x->host[x->n_groups++];
            set_weight(g, 0, a->gate[e]);
            set_weight(g, 1, a->up[e]);
            set_weight(g, 2, a->down[e]);
            g->row0 = (int32_t)(first - x->first + r);
            g->rows = (int32_t)vec8::smaller(RT_SKINNY_MOST, rows - r);
            x->most = g->rows > x->most ? g->rows : x->most;
        }
    }
    RT_TRY(rt_cuda_not_recorded(q, "a group of products", err));
    RT_TRY(rt_cuda_temp(q, (size_t)blocks * sizeof *x->host, &x->table, err));
    RT_CUDA_TRY(cudaMemcpyAsync(x->table, x->host, (size_t)blocks * sizeof *x->host, cudaMemcpyHostToDevice, q->stream));
out:
    return st;
}

/* h = silu(gate x) up x of all rows; quantised too where x is. */
enum rt_status gate_up(struct rt_dev *dev, struct rt_queue *q, const struct rt_moe_ffn_args *a, struct experts *x, struct rt_err *err)
{
    const bool w8 = a->gate[0]->dtype == RT_E4M3;
    product p = {};
    struct rt_quant_args quant = {};
    enum rt_status st;
    RT_TRY(rt_cuda_temp(q, (size_t)(x->rows * a->I) * 2, &x->h, err));
    p.first = 0;
    p.second = 1;
    p.x = a->x.data;
    p.x_scale = a->x.scale;
    p.x_scale_ld = rt_act_rows(a->n);
    p.ldx = p.K = a->H;
    p.N = p.ldy = a->I;
    p.out = RT_SKINNY_SWIGLU;
    p.y = x->h;
    p.k = a->k;
    if (a->perm == NULL) {
        set_weight(&p.one, 0, a->gate[0]);
        set_weight(&p.one, 1, a->up[0]);
        p.one.rows = (int32_t)a->n;
        RT_TRY(rt_skinny_single(q, &p, w8, err));
    } else {
        p.perm = a->perm + x->first;
        p.inverse = x->inverse;
        p.groups = x->table;
        p.n_groups = x->n_groups;
        RT_TRY(rt_skinny_grouped(q, &p, w8, x->most, err));
    }
    if (a->x.scale != NULL) {
        RT_TRY(rt_cuda_temp(q, (size_t)(rt_act_rows(x->rows) * a->I), &x->h_codes, err));
        RT_TRY(rt_cuda_temp(q, (size_t)(rt_act_rows(x->rows) * (a->I / 128)) * sizeof(float), &x->h_scale, err));
        quant.x = x->h;
        quant.q.data = x->h_codes;
        quant.q.scale = (float *)x->h_scale;
        quant.n = x->rows;
        quant.cols = a->I;
        quant.pow2 = a->pow2;
        RT_TRY(rt_cuda_quant(dev, q, &quant, err));
    }
out:
    return st;
}

/* out [rows, H] float = down h, or y += down h where there is one expert of all rows. */
enum rt_status down(struct rt_queue *q, const struct rt_moe_ffn_args *a, struct experts *x, struct rt_err *err)
{
    const bool w8 = a->down[0]->dtype == RT_E4M3;
    product p = {};
    p.first = p.second = 2;
    p.x = a->x.scale != NULL ? x->h_codes : x->h;
    p.x_scale = (const float *)x->h_scale;
    p.x_scale_ld = rt_act_rows(x->rows);
    p.ldx = p.K = a->I;
    p.N = p.ldy = a->H;
    if (a->perm == NULL) {
        set_weight(&p.one, 2, a->down[0]);
        p.one.rows = (int32_t)a->n;
        p.y = a->y;
        p.out = RT_SKINNY_BF16;
        p.accumulate = true;
        return rt_skinny_single(q, &p, w8, err);
    }
    p.groups = x->table;
    p.n_groups = x->n_groups;
    p.y = x->out;
    p.out = RT_SKINNY_F32;
    return rt_skinny_grouped(q, &p, w8, x->most, err);
}

}

bool rt_cuda_skinny_moe_fits(const struct rt_moe_ffn_args *a)
{
    int64_t rows = 0, busy = 0, first;
    const bool quantised = a->x.scale != NULL;
    if (a->n_experts < 1 || a->n < 1 || a->H < 1 || a->I < 1 || a->k > 32 || a->H % 8 != 0 || !operand_fits(&a->x, 0, a->H) ||
        !vec8::aligned16(a->y) || (quantised && a->I % 128 != 0))
        return false;
    const enum rt_dtype type = a->gate[0]->dtype;
    for (int e = 0; e < a->n_experts; e++) {
        const int64_t n = expert_rows(a, e, &first);
        if (!weight_fits(a->gate[e], a->I, a->H) || !weight_fits(a->up[e], a->I, a->H) || !weight_fits(a->down[e], a->H, a->I) ||
            a->gate[e]->dtype != type || a->up[e]->dtype != type || a->down[e]->dtype != type)
            return false;
        rows += n;
        busy += n > 0;
    }
    if (quantised && type != RT_E4M3)
        return false;
    if (type == RT_E4M3 && !quantised)
        return rows <= busy * RT_CUDA_SKINNY_ROWS_W8A16;
    return rows <= busy * (a->perm != NULL ? RT_CUDA_SKINNY_ROWS_EXPERTS : RT_CUDA_SKINNY_ROWS);
}

enum rt_status rt_cuda_skinny_moe(struct rt_dev *dev, struct rt_queue *q, const struct rt_moe_ffn_args *a, struct rt_err *err)
{
    struct experts x = {};
    enum rt_status st = RT_OK;
    x.first = a->perm != NULL ? a->offset[0] : 0;
    x.rows = a->perm != NULL ? (int64_t)a->offset[a->n_experts] - x.first : a->n;
    if (x.rows <= 0)
        return RT_OK;
    if (a->perm != NULL) {
        RT_TRY(make_groups(q, a, &x, err));
        RT_TRY(rt_cuda_temp(q, (size_t)(a->n * a->k) * sizeof *x.inverse, &x.inverse, err));
        RT_CUDA_TRY(cudaMemsetAsync(x.inverse, 0xff, (size_t)(a->n * a->k) * sizeof *x.inverse, q->stream));
        RT_TRY(rt_cuda_temp(q, (size_t)(x.rows * a->H) * sizeof *x.out, &x.out, err));
    }
    RT_TRY(gate_up(dev, q, a, &x, err));
    RT_TRY(down(q, a, &x, err));
    if (a->perm != NULL) {
        combine_kernel<<<dim3((unsigned)a->n, (unsigned)((a->H + 4 * COMBINE - 1) / (4 * COMBINE))), COMBINE, 0, q->stream>>>(
            x.out, x.inverse, a->weight, (__nv_bfloat16 *)a->y, a->k, a->H);
        RT_TRY(rt_cuda_launched("combination of experts", err));
    }
out:
    rt_free(x.host);
    rt_cuda_temp_free(q, x.table);
    rt_cuda_temp_free(q, x.inverse);
    rt_cuda_temp_free(q, x.out);
    rt_cuda_temp_free(q, x.h);
    rt_cuda_temp_free(q, x.h_codes);
    rt_cuda_temp_free(q, x.h_scale);
    return st;
}
