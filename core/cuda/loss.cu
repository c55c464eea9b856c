/* Cross entropy and KL of rows of logits, with their gradient.
 *
 * One block a row. The entries of the stored ids K are taken out first (their logits kept, -inf in their place), so that the walk over the row
 * sums the complement itself, whatever share of the mass it has; the parts on and off K are then put together in float64. A second walk writes
 *   dz_i = c_off exp(z_i/T - lse_off) + w_ce exp(z_i - lse_1)   off K,  c_off = w_kl T (M Q_R - P_R)   (bucket; 0 for renorm)
 * and the entries on K and the label are written behind it, from float32. (core/ref/ref_loss.c has the formulas.) As much of the row as shared
 * memory holds is read once.
 */
#include "core/cuda/loss.h"
#include "core/cuda/loss_cluster.h"
#include "core/cuda/loss_row.cuh"
#include "core/cuda/loss_terms.cuh"

namespace {

using namespace loss_row;
typedef __nv_bfloat16 bf16;

enum { THREADS = 512 }; /* of likelihoods */

struct loss_shared {
    struct stat slot[33];
    double sum[2][32];
    struct coefficients c;
};

/* Takes the ids of K out of the row: their logits to zk [k]; their sums. T == 1 leaves sum_T for the caller to copy. */
template <class Z>
__device__ struct on_k take_k(const struct rt_head_loss_args &a, int64_t i, Z *z, float *zk, float scale, struct loss_shared *s)
{
    const float *logp = a.top_logp + i * a.k;
    struct on_k r = {empty(), 0, 0};
    const double inv = 1 / a.T;
    for (int j = (int)threadIdx.x; j < a.k; j += (int)blockDim.x) {
        const int32_t id = rt_head_loss_id(&a, i, j);
        zk[j] = id >= 0 ? element(z + id) : -CUDART_INF_F;
        if (id < 0)
            continue;
        const struct stat one = {zk[j], 1, 1, id};
        r.z = join(r.z, one, scale);
        const double lp = logp[j], p = exp(lp);
        r.mass += p;
        r.cross += p > 0 ? p * (lp - (double)zk[j] * inv) : 0;
    }
    r.z = block_join(r.z, s->slot, scale); /* and every logit of K, and the label's, has been read */
    r.mass = vec8::block_sum(r.mass, s->sum[0]);
    r.cross = vec8::block_sum(r.cross, s->sum[1]);
    for (int j = (int)threadIdx.x; j < a.k; j += (int)blockDim.x) {
        const int32_t id = rt_head_loss_id(&a, i, j);
        if (id >= 0)
            set_element(z + id, -CUDART_INF_F);
    }
    __syncthreads();
    return r;
}

/* The entries on K and the label's. */
__device__ void fix_entries(const struct rt_head_loss_args &a, int64_t i, int32_t label, float z_label, bool has_kl, const float *zk,
                            const struct coefficients &c, float scale, bf16 *dz)
{
    __shared__ int label_in_k;
    if (threadIdx.x == 0)
        label_in_k = 0;
    __syncthreads(); /* and the second walk is done */
    for (int j = (int)threadIdx.x; has_kl && j < a.k; j += (int)blockDim.x) {
        const int32_t id = rt_head_loss_id(&a, i, j);
        if (id < 0)
            continue;
        float g = c.on * exp2_fast(zk[j] * scale - c.on_at) - c.p * expf(a.top_logp[i * a.k + j]);
        g += c.ce * exp2_fast(zk[j] * LOG2E - c.ce_at);
        if (id == label) {
            g -= c.ce;
            label_in_k = 1;
        }
        dz[id] = __float2bfloat16_rn(g);
    }
    __syncthreads();
    if (threadIdx.x == 0 && label >= 0 && !label_in_k)
        dz[label] = __float2bfloat16_rn(gradient_off(c, z_label, scale) - c.ce);
}

template <class Z, bool TWO, int T>
__global__ void __launch_bounds__(T) loss_kernel(const struct rt_head_loss_args a, const struct rt_cuda_logits t, int64_t cached)
{
    extern __shared__ uint4 shared[]; /* [cached / 8], then float [k] */
    float *zk = (float *)(void *)(shared + cached / 8);
    const struct cache kept = {shared, cached};
    __shared__ struct loss_shared s;
    const int64_t i = t.row0 + blockIdx.x;
    Z *z = (Z *)t.z + (int64_t)blockIdx.x * t.ldz;
    const int32_t label = a.label[i];
    const bool has_kl = a.k > 0 && a.kl_mask != NULL && a.kl_mask[i] != 0;
    const float scale = (float)(1.4426950408889634 / a.T), z_label = label >= 0 ? element(z + label) : 0;
    struct on_k k = {empty(), 0, 0};
    struct stat off = empty();
    if (has_kl)
        k = take_k(a, i, z, zk, scale, &s);
    for (int64_t at = (int64_t)threadIdx.x * 8; at < a.V; at += T * 8) {
        float x[8];
        load_row<false>(z, at, a.V, kept, x);
        add8<TWO>(&off, x, (int32_t)at, scale);
    }
    off = block_join(off, s.slot, scale);
    if (!TWO)
        off.sum_T = off.sum;
    if (threadIdx.x == 0)
        finish_row(a, i, label, z_label, has_kl, off, k, true, &s.c);
    if (t.dz == NULL)
        return;
    __syncthreads();
    const struct coefficients c = s.c;
    bf16 *dz = (bf16 *)t.dz + (int64_t)blockIdx.x * t.ldz;
    const bool none = c.off == 0 && c.ce == 0;
    for (int64_t at = (int64_t)threadIdx.x * 8; at < a.V; at += T * 8) {
        float x[8] = {};
        if (!none) {
            load_row<true>(z, at, a.V, kept, x);
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[j] = gradient_off(c, x[j], scale);
        }
        vec8::store<8>(dz + at, x);
    }
    fix_entries(a, i, label, z_label, has_kl, zk, c, scale, dz);
}

/* ---- likelihoods ---- */

template <bool IN> __device__ void keep_set(float x[8], const uint8_t *in_set, int64_t at, int64_t V)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (at + j >= V || (in_set[at + j] != 0) != IN)
            x[j] = -CUDART_INF_F;
}

__global__ void __launch_bounds__(THREADS) likelihood_kernel(const struct rt_head_likelihood_args a, const struct rt_cuda_logits t)
{
    __shared__ struct stat slot[33];
    const struct cache none = {NULL, 0};
    const int64_t i = t.row0 + blockIdx.x, V = a.n_ids;
    const float *z = (const float *)t.z + (int64_t)blockIdx.x * t.ldz;
    const int32_t label = a.label != NULL ? a.label[i] : -1;
    const float z_label = label >= 0 ? z[label] : 0;
    struct stat on = empty(), off = empty();
    for (int64_t at = (int64_t)threadIdx.x * 8; at < V; at += THREADS * 8) {
        float x[8], y[8];
        load_row<false>(z, at, V, none, x);
        if (a.in_set != NULL) {
            for (int j = 0; j < 8; j++)
                y[j] = x[j];
            keep_set<true>(y, a.in_set, at, V);
            keep_set<false>(x, a.in_set, at, V);
            add8<false>(&on, y, (int32_t)at, LOG2E);
        }
        add8<false>(&off, x, (int32_t)at, LOG2E);
    }
    on = block_join(on, slot, LOG2E);
    off = block_join(off, slot, LOG2E);
    const double lse_on = lse_of(on.max, on.sum, 1), lse = lse_join(lse_on, lse_of(off.max, off.sum, 1));
    const double lse_set = a.in_set != NULL ? lse_on : lse;
    const bool has_set = a.in_set != NULL && lse_set > -CUDART_INF;
    const float w_label = label >= 0 && a.w_label != NULL ? a.w_label[i] : 0, w_set = has_set && a.w_set != NULL ? a.w_set[i] : 0;
    if (threadIdx.x == 0 && a.label_logp != NULL)
        a.label_logp[i] = label >= 0 ? (double)z_label - lse : 0;
    if (threadIdx.x == 0 && a.set_logp != NULL)
        a.set_logp[i] = lse_set - lse;
    if (t.dz == NULL)
        return;
    bf16 *dz = (bf16 *)t.dz + (int64_t)blockIdx.x * t.ldz;
    const float all = w_label + w_set, all_at = in_base_2(lse), set_at = w_set != 0 ? in_base_2(lse_set) : 0;
    for (int64_t at = (int64_t)threadIdx.x * 8; at < V; at += THREADS * 8) {
        float x[8];
        load_row<true>(z, at, V, none, x);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const bool in = w_set != 0 && at + j < V && a.in_set[at + j] != 0;
            x[j] = all * exp2_fast(x[j] * LOG2E - all_at) - (in ? w_set * exp2_fast(x[j] * LOG2E - set_at) : 0) - (at + j == label ? w_label : 0);
        }
        vec8::store<8>(dz + at, x);
    }
}

__global__ void __launch_bounds__(256) add_f32_kernel(const float *__restrict__ sum, bf16 *__restrict__ dw, int64_t n)
{
    const int64_t step = (int64_t)gridDim.x * 256 * 8;
    for (int64_t at = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 8; at < n; at += step) {
        float x[8], y[8];
        if (at + 8 <= n) {
            vec8::load<8>(dw + at, x);
            vec8::load<8>(sum + at, y);
            for (int i = 0; i < 8; i++)
                x[i] += y[i];
            vec8::store<8>(dw + at, x);
        } else {
            for (int64_t i = at; i < n; i++)
                dw[i] = __float2bfloat16_rn(__bfloat162float(dw[i]) + sum[i]);
        }
    }
}

/* A number beyond what FP16 holds is its greatest; NaN stays. */
__global__ void __launch_bounds__(256) f16_kernel(const bf16 *__restrict__ x, __half *__restrict__ out, int64_t n)
{
    const int64_t step = (int64_t)gridDim.x * 256 * 8;
    for (int64_t at = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 8; at < n; at += step) {
        float v[8];
        if (at + 8 > n || ((uintptr_t)x | (uintptr_t)out) % 16 != 0) {
            for (int64_t i = at; i < at + 8 && i < n; i++) {
                const float f = __bfloat162float(x[i]);
                out[i] = __float2half_rn(f > 65504.0f ? 65504.0f : f < -65504.0f ? -65504.0f : f);
            }
            continue;
        }
        vec8::load<8>(x + at, v);
        __half2 h[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float a = v[2 * i], b = v[2 * i + 1];
            h[i] = __floats2half2_rn(a > 65504.0f ? 65504.0f : a < -65504.0f ? -65504.0f : a, b > 65504.0f ? 65504.0f : b < -65504.0f ? -65504.0f : b);
        }
        *(uint4 *)(void *)(out + at) = *(const uint4 *)(const void *)h;
    }
}

/* dw may begin anywhere: element by element where it is not 16-byte aligned. */
__global__ void __launch_bounds__(256) add_f32_any_kernel(const float *__restrict__ sum, bf16 *__restrict__ dw, int64_t n)
{
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256)
        dw[i] = __float2bfloat16_rn(__bfloat162float(dw[i]) + sum[i]);
}

}

/* As many elements of two bytes as fit beside zk, with one block of 1024 threads or two of 512 to a multiprocessor. */
static enum rt_status room_of(struct rt_queue *q, const struct rt_head_loss_args *a, int threads, int64_t *cached, struct rt_err *err)
{
    enum rt_status st;
    int64_t bytes;
    int most = 0;
    RT_CUDA_TRY(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, q->dev->index));
    bytes = (threads == 1024 ? most : most / 2 - 1024) - (int64_t)sizeof(struct loss_shared) - 1024 - (a->k > 0 ? a->k : 0) * 4;
    *cached = vec8::smaller(bytes > 0 ? bytes / 16 * 8 : 0, (a->V + 7) / 8 * 8);
out:
    return st;
}

template <class Z, bool TWO, int T>
static enum rt_status launch_threads(struct rt_queue *q, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int64_t cached = 0;
    size_t shared;
    if (sizeof(Z) == 2 && t->dz != NULL)
        RT_TRY(room_of(q, a, T, &cached, err));
    shared = (size_t)cached * 2 + (size_t)(a->k > 0 ? a->k : 0) * sizeof(float);
    RT_CUDA_TRY(cudaFuncSetAttribute((const void *)loss_kernel<Z, TWO, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    loss_kernel<Z, TWO, T><<<(unsigned)t->rows, T, shared, q->stream>>>(*a, *t, cached);
    RT_TRY(rt_cuda_launched("loss", err));
out:
    return st;
}

template <class Z> static enum rt_status launch_loss(struct rt_queue *q, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t, struct rt_err *err)
{
    if (t->threads == 1024)
        return a->T != 1 ? launch_threads<Z, true, 1024>(q, a, t, err) : launch_threads<Z, false, 1024>(q, a, t, err);
    return a->T != 1 ? launch_threads<Z, true, 512>(q, a, t, err) : launch_threads<Z, false, 512>(q, a, t, err);
}

enum rt_status rt_cuda_loss_rows(struct rt_queue *q, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t, struct rt_err *err)
{
    if (t->rows <= 0)
        return RT_OK;
    if (a->k > RT_CUDA_LOSS_IDS)
        return rt_fail(err, RT_UNSUPPORTED, "head_loss: %d teacher ids a row, expected up to %d", a->k, (int)RT_CUDA_LOSS_IDS);
    if (t->threads == 0 && rt_cuda_loss_cluster_fits(q->dev, a, t))
        return rt_cuda_loss_cluster(q, a, t, err);
    switch (t->type) {
    case RT_F32: return launch_loss<float>(q, a, t, err);
    case RT_F16: return launch_loss<__half>(q, a, t, err);
    default: return launch_loss<bf16>(q, a, t, err);
    }
}

enum rt_status rt_cuda_likelihood_rows(struct rt_queue *q, const struct rt_head_likelihood_args *a, const struct rt_cuda_logits *t, struct rt_err *err)
{
    if (t->rows > 0)
        likelihood_kernel<<<(unsigned)t->rows, THREADS, 0, q->stream>>>(*a, *t);
    return rt_cuda_launched("likelihood", err);
}

enum rt_status rt_cuda_add_f32(struct rt_queue *q, const float *sum, void *dw, int64_t n, struct rt_err *err)
{
    const unsigned blocks = (unsigned)vec8::smaller((n + 2047) / 2048, 16 * (int64_t)q->dev->sm_count);
    if (n <= 0)
        return RT_OK;
    if (vec8::aligned16(dw))
        add_f32_kernel<<<blocks, 256, 0, q->stream>>>(sum, (bf16 *)dw, n);
    else
        add_f32_any_kernel<<<blocks, 256, 0, q->stream>>>(sum, (bf16 *)dw, n);
    return rt_cuda_launched("add_f32", err);
}

enum rt_status rt_cuda_bf16_to_f16(struct rt_queue *q, const void *x, void *out, int64_t n, struct rt_err *err)
{
    if (n <= 0)
        return RT_OK;
    f16_kernel<<<(unsigned)vec8::smaller((n + 2047) / 2048, 16 * (int64_t)q->dev->sm_count), 256, 0, q->stream>>>((const bf16 *)x, (__half *)out, n);
    return rt_cuda_launched("bf16_to_f16", err);
}

/* ---- feature loss ---- */

namespace {

template <int N> __global__ void __launch_bounds__(256) feature_kernel(const struct rt_feature_loss_args f)
{
    __shared__ double slot[4][32];
    const int64_t i = blockIdx.x;
    const bf16 *x = (const bf16 *)f.a + i * f.cols;
    const float *y = f.b + i * f.cols;
    double xx = 0, xy = 0, yy = 0, dd = 0;
    for (int64_t c = (int64_t)threadIdx.x * N; c < f.cols; c += 256 * N) {
        float u[N], v[N];
        vec8::load<N>(x + c, u);
        vec8::load<N>(y + c, v);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const double p = u[j], r = v[j];
            xx += p * p;
            xy += p * r;
            yy += r * r;
            dd += (p - r) * (p - r);
        }
    }
    xx = vec8::block_sum(xx, slot[0]);
    xy = vec8::block_sum(xy, slot[1]);
    yy = vec8::block_sum(yy, slot[2]);
    dd = vec8::block_sum(dd, slot[3]);
    const double norm = sqrt(xx) * sqrt(yy), cosine = norm > 0 ? xy / norm : 0, mse = 2 * f.w / (double)f.cols;
    if (threadIdx.x == 0 && f.loss != NULL)
        f.loss[i] = f.cosine ? 1 - cosine : dd / (double)f.cols;
    if (f.da == NULL)
        return;
    /* near the minimum the two terms cancel: in double */
    const double cx = !f.cosine ? mse : norm > 0 ? f.w * cosine / xx : 0, cy = !f.cosine ? -mse : norm > 0 ? -f.w / norm : 0;
    for (int64_t c = (int64_t)threadIdx.x * N; c < f.cols; c += 256 * N) {
        float u[N], v[N];
        vec8::load<N>(x + c, u);
        vec8::load<N>(y + c, v);
#pragma unroll
        for (int j = 0; j < N; j++)
            u[j] = cx == 0 && cy == 0 ? 0 : (float)(cx * (double)u[j] + cy * (double)v[j]);
        vec8::store<N>((bf16 *)f.da + i * f.cols + c, u);
    }
}

}

enum rt_status rt_cuda_feature_loss(struct rt_dev *, struct rt_queue *q, const struct rt_feature_loss_args *a, struct rt_err *err)
{
    if (a->n <= 0)
        return RT_OK;
    if (a->cols % 8 == 0 && vec8::aligned16(a->a) && vec8::aligned16(a->b) && vec8::aligned16(a->da))
        feature_kernel<8><<<(unsigned)a->n, 256, 0, q->stream>>>(*a);
    else
        feature_kernel<1><<<(unsigned)a->n, 256, 0, q->stream>>>(*a);
    return rt_cuda_launched("feature_loss", err);
}
