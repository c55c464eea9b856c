/* route: scores of all experts by linear_fwd (bf16 operands, float32 sums and results), then a warp for each token that chooses.
 *
 * The router's weight is BF16 on the device (weight_load rounds an F32 one; the published checkpoints hold BF16). Tokens go in chunks, so that
 * the scores stay in the cache between the two kernels.
 *
 * Lane l holds the experts l*per .. l*per + per-1, so that among equal choices the lowest lane's, and there the first, is the smaller id. A choice
 * is compared as an integer of the same order (choice_key); 0 is a place without an expert, or one already taken.
 */
#include "core/cuda/convert.h"
#include "core/cuda/cuda.h"
#include "core/cuda/gemm.h"
#include "core/cuda/rows.cuh"

namespace {

enum { WARPS = 4, MOST_EXPERTS = 1024, MOST_GROUPS = 32, CHUNK_ROWS = 128 }; /* rows of a product's tile: a chunk is one for each multiprocessor */

struct choose {
    const float *z;
    const float *bias; /* [E] */
    int32_t *ids;
    float *weight;
    int64_t n;
    int E, k, per, n_group, topk_group;
    bool sigmoid, group_top2, norm;
    float scale;
};

__device__ __forceinline__ uint32_t choice_key(float v)
{
    const int32_t u = __float_as_int(v);
    return max((uint32_t)u ^ ((uint32_t)(u >> 31) | 0x80000000u), 1u);
}

/* 1 / v to within an ulp; 0 of infinity. */
__device__ __forceinline__ float reciprocal(float v)
{
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

/* score = sigmoid(z), or exp(z - top) * share with share = 1 / sum exp(z - top). Errors of an ulp or two, less than those of z. */
__device__ __forceinline__ float score_of(const struct choose &p, float z, float top, float share)
{
    return p.sigmoid ? reciprocal(1.0f + __expf(-z)) : __expf(z - top) * share;
}

/* x[i] = row[lane * per + i] for those that exist, else `other`. */
template <int PER>
__device__ __forceinline__ void load_lane(const struct choose &p, const float *row, float other, float (&x)[PER])
{
    const int first = (int)threadIdx.x * p.per;
    if (PER % 4 == 0 && p.per == PER && p.E == 32 * PER) { /* rows are then multiples of 16 bytes */
#pragma unroll
        for (int i = 0; i + 3 < PER; i += 4) {
            const float4 v = *(const float4 *)(row + first + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < PER; i++)
        x[i] = i < p.per && first + i < p.E ? row[first + i] : other;
}

template <int PER>
__device__ __forceinline__ void softmax_terms(const float (&z)[PER], float &top, float &share)
{
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < PER; i++)
        most = fmaxf(most, z[i]);
    top = warp_max(most);
#pragma unroll
    for (int i = 0; i < PER; i++)
        sum += __expf(z[i] - top);
    share = 1.0f / warp_sum(sum);
}

__device__ __forceinline__ void take_best(float v, float &best, float &second)
{
    second = fmaxf(second, fminf(best, v));
    best = fmaxf(best, v);
}

/* Which groups stay, a bit each. Groups of whole lanes are merged by shuffles; others (E not a multiple of 32 ..) go through shared memory. */
template <int PER>
__device__ __forceinline__ unsigned kept_groups(const struct choose &p, const float (&choice)[PER], float *row)
{
    const int lane = (int)threadIdx.x, size = p.E / p.n_group, lanes = size / p.per;
    const bool whole = p.E == 32 * p.per && size % p.per == 0 && (lanes & (lanes - 1)) == 0;
    float best = -INFINITY, second = -INFINITY;
    if (whole) {
#pragma unroll
        for (int i = 0; i < PER; i++)
            if (i < p.per)
                take_best(choice[i], best, second);
        for (int d = 1; d < lanes; d <<= 1) {
            const float b = __shfl_xor_sync(0xffffffffu, best, d), s = __shfl_xor_sync(0xffffffffu, second, d);
            second = fmaxf(fmaxf(second, s), fminf(best, b));
            best = fmaxf(best, b);
        }
        best = __shfl_sync(0xffffffffu, best, lane * lanes % 32); /* lane g holds group g */
        second = __shfl_sync(0xffffffffu, second, lane * lanes % 32);
    } else {
#pragma unroll
        for (int i = 0; i < PER; i++)
            if (i < p.per && lane * p.per + i < p.E)
                row[lane * p.per + i] = choice[i];
        __syncwarp();
        for (int i = 0; i < size && lane < p.n_group; i++)
            take_best(row[lane * size + i], best, second);
        __syncwarp();
    }
    const float mine = p.group_top2 ? best + second : best;
    int before = 0;
    for (int g = 0; g < p.n_group; g++) {
        const float other = __shfl_sync(0xffffffffu, mine, g);
        before += other > mine || (other == mine && g < lane);
    }
    return __ballot_sync(0xffffffffu, lane < p.n_group && before < p.topk_group);
}

/* id of the greatest key, the smaller id where several are: the same in all lanes. It is taken out. */
template <int PER>
__device__ __forceinline__ int take_greatest(uint32_t (&key)[PER], uint32_t &most, int per)
{
    const int lane = (int)threadIdx.x;
    const uint32_t top = __reduce_max_sync(0xffffffffu, most);
    const int holder = __ffs((int)__ballot_sync(0xffffffffu, most == top)) - 1;
    int at = 0;
    bool open = lane == holder; /* the first of equals is still to come */
    most = 0;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const bool hit = open && key[i] == top;
        open = open && key[i] != top;
        at = hit ? i : at;
        key[i] = hit ? 0 : key[i];
        most = max(most, key[i]);
    }
    return holder * per + __shfl_sync(0xffffffffu, at, holder);
}

template <int PER>
__global__ void __launch_bounds__(32 * WARPS) choose_kernel(const __grid_constant__ struct choose p)
{
    __shared__ float rows[WARPS][32 * PER];
    const int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.y;
    const int lane = (int)threadIdx.x;
    if (t >= p.n)
        return;
    const float *z = p.z + t * p.E;
    float x[PER], bias[PER], top = 0, share = 1;
    uint32_t key[PER], most = 0;
    load_lane(p, z, -INFINITY, x);
    load_lane(p, p.bias, 0.0f, bias);
    if (!p.sigmoid)
        softmax_terms(x, top, share);
    bool sound = true; /* places without an expert hold 0 */
#pragma unroll
    for (int i = 0; i < PER; i++) {
        x[i] = score_of(p, x[i], top, share) + bias[i];
        sound = sound && isfinite(x[i]);
    }
    sound = __all_sync(0xffffffffu, sound);
    const unsigned kept = p.n_group > 1 ? kept_groups(p, x, rows[threadIdx.y]) : 1;
    const int size = p.n_group > 1 ? p.E / p.n_group : p.E;
    int group = lane * p.per / size, left = (group + 1) * size - lane * p.per; /* experts up to the next group */
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const bool there = i < p.per && lane * p.per + i < p.E;
        key[i] = there ? choice_key(kept >> group & 1 ? x[i] : -INFINITY) : 0;
        most = max(most, key[i]);
        group += --left == 0;
        left = left == 0 ? size : left;
    }
    int id = 0;
    for (int j = 0; j < p.k; j++) {
        const int taken = take_greatest(key, most, p.per);
        id = lane == j ? taken : id;
    }
    const float score = lane < p.k ? score_of(p, z[id], top, share) : 0.0f;
    float sum = 0;
    for (int j = 0; j < p.k; j++)
        sum += __shfl_sync(0xffffffffu, score, j);
    if (lane < p.k) {
        p.ids[t * p.k + lane] = id;
        p.weight[t * p.k + lane] = !sound ? NAN : (p.norm ? score / (sum + 1e-20f) : score) * p.scale;
    }
}

enum rt_status launch(const struct choose &p, cudaStream_t stream, struct rt_err *err)
{
    const unsigned grid = (unsigned)((p.n + WARPS - 1) / WARPS);
    const dim3 block(32, WARPS);
    if (p.per <= 2)
        choose_kernel<2><<<grid, block, 0, stream>>>(p);
    else if (p.per <= 4)
        choose_kernel<4><<<grid, block, 0, stream>>>(p);
    else if (p.per <= 8)
        choose_kernel<8><<<grid, block, 0, stream>>>(p);
    else if (p.per <= 12)
        choose_kernel<12><<<grid, block, 0, stream>>>(p);
    else if (p.per <= 16)
        choose_kernel<16><<<grid, block, 0, stream>>>(p);
    else
        choose_kernel<32><<<grid, block, 0, stream>>>(p);
    return rt_cuda_launched("route", err);
}

enum rt_status check(const struct rt_route_args *a, struct rt_err *err)
{
    const int groups = a->n_group > 1 ? a->n_group : 1, stay = a->n_group > 1 ? a->topk_group : 1;
    if (a->E <= 0 || a->k <= 0 || a->E % groups != 0 || stay <= 0 || stay > groups || a->k > a->E / groups * stay)
        return rt_fail(err, RT_SHAPE, "route: %d of %d experts, %d of %d groups: expected experts that divide into the groups, and as many in the "
                       "kept groups as are chosen", a->k, a->E, stay, groups);
    if (a->n_group > 1 && a->group_top2 && a->E / groups < 2)
        return rt_fail(err, RT_SHAPE, "route: groups of one expert have no two best");
    if (a->E > MOST_EXPERTS || a->k > 32 || groups > MOST_GROUPS)
        return rt_fail(err, RT_UNSUPPORTED, "route: %d of %d experts in %d groups; up to 32 of %d in %d groups work on the GPU", a->k, a->E, groups,
                       (int)MOST_EXPERTS, (int)MOST_GROUPS);
    if (a->bias != NULL && (a->bias->rows * a->bias->cols != a->E || (a->bias->dtype != RT_F32 && a->bias->dtype != RT_BF16)))
        return rt_fail(err, RT_SHAPE, "route: a bias of %lld x %lld %s; expected %d of F32 or BF16", (long long)a->bias->rows,
                       (long long)a->bias->cols, rt_dtype_name(a->bias->dtype), a->E);
    return rt_cuda_weight_check(a->w, "route", a->E, a->H, false, err);
}

/* *bias = the bias as float32: as it lies there, or a temporary of its converted elements, or of zeros. */
enum rt_status bias_f32(struct rt_queue *q, const struct rt_route_args *a, const float **bias, float **temp, struct rt_err *err)
{
    const size_t bytes = (size_t)a->E * sizeof **temp;
    enum rt_status st = RT_OK;
    if (a->bias != NULL && a->bias->dtype == RT_F32 && aligned16(a->bias->data)) {
        *bias = (const float *)a->bias->data;
        goto out;
    }
    RT_TRY(rt_cuda_temp(q, bytes, temp, err));
    *bias = *temp;
    if (a->bias == NULL)
        RT_CUDA_TRY(cudaMemsetAsync(*temp, 0, bytes, q->stream));
    else
        RT_TRY(rt_cuda_convert_dtype(q, a->bias->data, a->bias->dtype, *temp, RT_F32, a->E, err));
out:
    return st;
}

}

enum rt_status rt_cuda_route(struct rt_dev *dev, struct rt_queue *q, const struct rt_route_args *a, struct rt_err *err)
{
    const int64_t chunk = (int64_t)CHUNK_ROWS * dev->sm_count < a->n ? (int64_t)CHUNK_ROWS * dev->sm_count : a->n;
    struct rt_linear_fwd_args g = {};
    struct choose p = {};
    float *z = NULL, *bias = NULL;
    enum rt_status st;
    RT_TRY(check(a, err));
    if (a->n <= 0)
        goto out;
    RT_TRY(rt_cuda_temp(q, (size_t)chunk * (size_t)a->E * sizeof *z, &z, err));
    RT_TRY(bias_f32(q, a, &p.bias, &bias, err));
    p.E = a->E;
    p.k = a->k;
    p.per = (a->E + 31) / 32;
    p.n_group = a->n_group;
    p.topk_group = a->topk_group;
    p.sigmoid = a->sigmoid;
    p.group_top2 = a->group_top2;
    p.norm = a->norm;
    p.scale = a->scale;
    p.z = z;
    g.w = a->w;
    g.y = z;
    g.K = a->H;
    g.N = a->E;
    g.y_f32 = true;
    for (int64_t t = 0; t < a->n; t += chunk) {
        p.n = g.n = t + chunk < a->n ? chunk : a->n - t;
        g.x.data = (bf16 *)a->x + t * a->H;
        p.ids = a->ids + t * a->k;
        p.weight = a->weight + t * a->k;
        RT_TRY(rt_cuda_linear_fwd(dev, q, &g, err));
        RT_TRY(launch(p, q->stream, err));
    }
out:
    rt_cuda_temp_free(q, z);
    rt_cuda_temp_free(q, bias);
    return st;
}
