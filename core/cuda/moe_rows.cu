/* Tables, gather and sum of a group of experts (moe_rows.h); the gating is quant.cu's.
 *
 * Where a group holds rows of most tokens, its rows are dealt from the tokens, so that each token is read once; where few tokens chose it, both
 * gather and sum go by the group's rows, so that a group costs what it holds and not what the window holds.
 */
#include "core/cuda/moe_rows.h"

#include "core/cuda/rows.cuh"
#include "core/mem.h"

namespace {

enum { ROWS = 4, TABLE_THREADS = 256, COMBINE_LANES = 512 };

/* ---- tables ---- */

/* offset and base [n_experts + 1]: the expert of a row by bisection of base. */
__global__ void __launch_bounds__(TABLE_THREADS) table_kernel(const int32_t *__restrict__ perm, const int32_t *__restrict__ offset,
                                                              const int32_t *__restrict__ base, int n_experts, int64_t rows, int4 *row,
                                                              int32_t *inverse)
{
    const int64_t i = (int64_t)blockIdx.x * TABLE_THREADS + threadIdx.x;
    if (i >= rows)
        return;
    int lo = 0, hi = n_experts; /* base[lo] <= i < base[hi] */
    while (hi - lo > 1) {
        const int mid = (lo + hi) / 2;
        if (base[mid] <= i)
            lo = mid;
        else
            hi = mid;
    }
    const int32_t first = base[lo], at = offset[lo] + ((int32_t)i - first);
    const int32_t flat = at < offset[lo + 1] ? perm[at] : -1;
    row[i] = make_int4(flat, first, base[lo + 1] - first, 0);
    if (inverse != NULL && flat >= 0)
        inverse[flat] = (int32_t)i;
}

/* ---- gather ---- */
struct gather {
    const char *x;
    char *to;
    const float *scale;  /* NULL: bf16 */
    float *to_scale;
    const int4 *row;
    const int32_t *inverse;
    int64_t scale_ld, n, rows; /* scale_ld: of x */
    int k, nv, blocks;         /* nv: units of a row */
    unsigned token_blocks;
};

/* v, or 0 where mask is 0: no branch, so that no store waits between the loads. */
__device__ __forceinline__ uint4 masked(const uint4 &v, uint32_t mask) { return make_uint4(v.x & mask, v.y & mask, v.z & mask, v.w & mask); }
__device__ __forceinline__ uint16_t masked(uint16_t v, uint32_t mask) { return (uint16_t)(v & mask); }

template <class Unit>
__global__ void __launch_bounds__(256) gather_kernel(const __grid_constant__ struct gather p)
{
    const int64_t row0 = (int64_t)blockIdx.x * ROWS;
    int64_t token[ROWS];
    uint32_t live[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int flat = __ldg(&p.row[row0 + r].x);
        token[r] = flat >= 0 ? flat / p.k : 0; /* padding reads token 0, so that all loads are one batch */
        live[r] = flat >= 0 ? ~0u : 0u;
    }
    for (int c = (int)threadIdx.x; c < p.nv; c += (int)blockDim.x) {
        Unit v[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            v[r] = __ldg((const Unit *)p.x + token[r] * p.nv + c);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            ((Unit *)p.to)[(row0 + r) * p.nv + c] = masked(v[r], live[r]);
    }
    if (p.scale == NULL)
        return;
    const int4 g = __ldg(p.row + row0);
    float *to = p.to_scale + (int64_t)g.y * p.blocks + (row0 - g.y);
    for (int b = (int)threadIdx.x; b < p.blocks; b += (int)blockDim.x) {
        float v[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            v[r] = __ldg(p.scale + (int64_t)b * p.scale_ld + token[r]);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            v[r] = __uint_as_float(__float_as_uint(v[r]) & live[r]);
        *(float4 *)(to + (int64_t)b * g.z) = make_float4(v[0], v[1], v[2], v[3]);
    }
}

/* The same by tokens, for groups of which most tokens have rows: each token is read once. Blocks behind token_blocks write the padding. */
enum { TOKENS = 4 };

__device__ void fill_padding(const struct gather &p, int64_t warp)
{
    const int lane = (int)threadIdx.x % 32;
    const int64_t first = warp * 32;
    const int4 own = first + lane < p.rows ? __ldg(p.row + first + lane) : make_int4(0, 0, 0, 0);
    for (unsigned left = __ballot_sync(0xffffffffu, own.x < 0); left != 0; left &= left - 1) {
        const int at = __ffs((int)left) - 1;
        const int64_t row = first + at;
        const int base = __shfl_sync(0xffffffffu, own.y, at), padded = __shfl_sync(0xffffffffu, own.z, at);
        for (int c = lane; c < p.nv; c += 32)
            ((uint4 *)p.to)[row * p.nv + c] = make_uint4(0, 0, 0, 0);
        for (int b = lane; b < p.blocks; b += 32)
            p.to_scale[(int64_t)base * p.blocks + (int64_t)b * padded + (row - base)] = 0;
    }
}

/* Scales of column block b of the block's tokens. in: which lanes hold a row of the token. */
__device__ __forceinline__ void load_scales(const struct gather &p, int64_t t0, int b, const unsigned (&in)[TOKENS], float (&s)[TOKENS])
{
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
        s[i] = in[i] != 0 && b < p.blocks ? __ldg(p.scale + (int64_t)b * p.scale_ld + t0 + i) : 0.0f;
}

/* They go to their rows. row, at: in lane j of each warp, the row of choice j and its entry of the table. */
__device__ __forceinline__ void deal_scales(const struct gather &p, int b, const int (&row)[TOKENS], const int4 (&at)[TOKENS],
                                            const unsigned (&in)[TOKENS], const float (&s)[TOKENS])
{
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
        for (unsigned left = in[i]; left != 0; left &= left - 1) {
            const int from = __ffs((int)left) - 1;
            const int r = __shfl_sync(0xffffffffu, row[i], from), base = __shfl_sync(0xffffffffu, at[i].y, from);
            const int padded = __shfl_sync(0xffffffffu, at[i].z, from);
            if (b < p.blocks)
                p.to_scale[(int64_t)base * p.blocks + (int64_t)b * padded + (r - base)] = s[i];
        }
}

__global__ void __launch_bounds__(256) deal_kernel(const __grid_constant__ struct gather p)
{
    const int lane = (int)threadIdx.x % 32;
    const int64_t t0 = (int64_t)blockIdx.x * TOKENS;
    int row[TOKENS];
    int4 at[TOKENS];
    unsigned in[TOKENS];
    float s[TOKENS];
    if (blockIdx.x >= p.token_blocks) {
        fill_padding(p, (int64_t)(blockIdx.x - p.token_blocks) * (blockDim.x / 32) + threadIdx.x / 32);
        return;
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
        row[i] = lane < p.k && t0 + i < p.n ? __ldg(p.inverse + (t0 + i) * p.k + lane) : -1;
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
        in[i] = __ballot_sync(0xffffffffu, row[i] >= 0);
    if (p.scale != NULL) { /* on their way while the codes are */
#pragma unroll
        for (int i = 0; i < TOKENS; i++)
            at[i] = row[i] >= 0 ? __ldg(p.row + row[i]) : make_int4(0, 0, 0, 0);
        load_scales(p, t0, (int)threadIdx.x, in, s);
    }
    for (int c0 = 0; c0 < p.nv; c0 += (int)blockDim.x) { /* every lane makes every turn: it holds a row for the others */
        const int c = c0 + (int)threadIdx.x;
        uint4 v[TOKENS];
#pragma unroll
        for (int i = 0; i < TOKENS; i++)
            v[i] = in[i] != 0 && c < p.nv ? load_stream((const uint4 *)p.x + (t0 + i) * p.nv + c) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < TOKENS; i++)
            for (unsigned left = in[i]; left != 0; left &= left - 1) {
                const int64_t r = __shfl_sync(0xffffffffu, row[i], __ffs((int)left) - 1);
                if (c < p.nv)
                    ((uint4 *)p.to)[r * p.nv + c] = v[i];
            }
    }
    for (int b0 = 0; b0 + (int)threadIdx.x / 32 * 32 < p.blocks; b0 += (int)blockDim.x) { /* blocks 0: no scales */
        if (b0 > 0)
            load_scales(p, t0, b0 + (int)threadIdx.x, in, s);
        deal_scales(p, b0 + (int)threadIdx.x, row, at, in, s);
    }
}

/* ---- combine ---- */
struct combine {
    const bf16 *out;
    const float *weight;
    const int32_t *inverse;
    const int4 *row; /* NULL: item i is token i; else it is row i, which stands for its token if it is the token's first */
    bf16 *y;
    int64_t n;       /* items */
    int k, H;
};

/* The token of item i and its rows in ascending order: after the call lane s < count of each warp holds the s-th row and its weight. */
__device__ __forceinline__ int token_rows(const struct combine &p, int64_t i, int64_t &t, int &row, float &weight)
{
    const int lane = (int)threadIdx.x % 32;
    t = i < p.n ? i : -1;
    if (p.row != NULL && t >= 0) {
        const int flat = __ldg(&p.row[i].x);
        t = flat >= 0 ? flat / p.k : -1;
    }
    row = lane < p.k && t >= 0 ? __ldg(p.inverse + t * p.k + lane) : -1;
    const unsigned in = __ballot_sync(0xffffffffu, row >= 0);
    const int count = __popc(in);
    if (count == 0 || (p.row != NULL && __any_sync(0xffffffffu, row >= 0 && row < i)))
        return 0;
    weight = row >= 0 ? __ldg(p.weight + t * p.k + lane) : 0.0f;
    int before = 0; /* how many rows of the token are smaller */
    for (unsigned left = in; left != 0; left &= left - 1)
        before += __shfl_sync(0xffffffffu, row, __ffs((int)left) - 1) < row;
    int from = 0;
    for (int s = 0; s < count; s++) {
        const unsigned holder = __ballot_sync(0xffffffffu, row >= 0 && before == s);
        from = lane == s ? __ffs((int)holder) - 1 : from;
    }
    row = __shfl_sync(0xffffffffu, row, from);
    weight = __shfl_sync(0xffffffffu, weight, from);
    return count;
}

template <int EACH>
__global__ void __launch_bounds__(COMBINE_LANES) combine_kernel(const __grid_constant__ struct combine p)
{
    const int nv = p.H / VEC;
    int64_t t;
    int row;
    float weight;
    const int count = token_rows(p, (int64_t)blockIdx.x * blockDim.y + threadIdx.y, t, row, weight);
    if (count == 0)
        return;
    float acc[EACH][VEC];
    uint4 *y = (uint4 *)(p.y + t * p.H);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = (int)(threadIdx.x + i * blockDim.x);
        unpack(c < nv ? load_stream(y + c) : make_uint4(0, 0, 0, 0), acc[i]);
    }
    for (int s = 0; s < count; s++) {
        const uint4 *out = (const uint4 *)(p.out + (int64_t)__shfl_sync(0xffffffffu, row, s) * p.H);
        const float w = __shfl_sync(0xffffffffu, weight, s);
        uint4 v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int c = (int)(threadIdx.x + i * blockDim.x);
            v[i] = c < nv ? load_stream(out + c) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float x[VEC];
            unpack(v[i], x);
#pragma unroll
            for (int j = 0; j < VEC; j++)
                acc[i][j] = fmaf(w, x[j], acc[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = (int)(threadIdx.x + i * blockDim.x);
        if (c < nv)
            y[c] = pack(acc[i]);
    }
}

/* Any width and alignment. */
__global__ void __launch_bounds__(128) combine_slow_kernel(const __grid_constant__ struct combine p)
{
    int64_t t;
    int row;
    float weight;
    const int count = token_rows(p, blockIdx.x, t, row, weight);
    for (int c0 = 0; c0 < p.H && count > 0; c0 += (int)blockDim.x) { /* every lane makes every turn: it holds a row for the others */
        const int c = c0 + (int)threadIdx.x;
        float acc = c < p.H ? __bfloat162float(p.y[t * p.H + c]) : 0.0f;
        for (int s = 0; s < count; s++) {
            const int64_t r = __shfl_sync(0xffffffffu, row, s);
            const float w = __shfl_sync(0xffffffffu, weight, s);
            if (c < p.H)
                acc = fmaf(w, __bfloat162float(p.out[r * p.H + c]), acc);
        }
        if (c < p.H)
            p.y[t * p.H + c] = __float2bfloat16_rn(acc);
    }
}

}

int64_t rt_cuda_moe_place(const int32_t *offset, int n_experts, int pad, int64_t *base)
{
    int64_t rows = 0;
    for (int e = 0; e < n_experts; e++) {
        if (base != NULL)
            base[e] = rows;
        rows += ((int64_t)offset[e + 1] - offset[e] + pad - 1) / pad * pad;
    }
    if (base != NULL)
        base[n_experts] = rows;
    return rows;
}

size_t rt_cuda_moe_group_bytes(int64_t rows, int64_t n, int k, bool with_inverse)
{
    return rt_arena_round((size_t)rows * sizeof(int4)) + (with_inverse ? rt_arena_round((size_t)(n * k) * sizeof(int32_t)) : 0);
}

/* offset and base as int32, one after the other in host memory. */
static enum rt_status list_on_host(const int32_t *offset, int n_experts, int pad, int32_t **out, int64_t *rows, struct rt_err *err)
{
    const size_t count = (size_t)n_experts + 1;
    enum rt_status st;
    *rows = rt_cuda_moe_place(offset, n_experts, pad, NULL);
    if (*rows > INT32_MAX)
        RT_FAIL(err, SHAPE, "a group of %d experts with %lld rows; 2^31 - 1 at most", n_experts, (long long)*rows);
    RT_TRY(rt_alloc(2 * count, sizeof **out, "a group of experts", out, err));
    (*out)[count] = 0;
    for (size_t e = 0; e < count; e++) {
        (*out)[e] = offset[e];
        if (e > 0)
            (*out)[count + e] = (*out)[count + e - 1] + (int32_t)rt_cuda_moe_place(offset + e - 1, 1, pad, NULL);
    }
out:
    return st;
}

enum rt_status rt_cuda_moe_group_make(struct rt_queue *q, const int32_t *perm, const int32_t *offset, int n_experts, int pad, int64_t n, int k,
                                      bool with_inverse, struct rt_cuda_moe_group *out, struct rt_err *err)
{
    struct rt_cuda_moe_group g = {};
    const size_t list_bytes = 2 * ((size_t)n_experts + 1) * sizeof(int32_t), inverse_bytes = (size_t)(n * k) * sizeof(int32_t);
    int32_t *host = NULL, *list = NULL;
    enum rt_status st;
    if (k < 1 || k > RT_CUDA_MOE_MAX_K)
        RT_FAIL(err, UNSUPPORTED, "%d experts a token; 1 to %d work on the GPU", k, (int)RT_CUDA_MOE_MAX_K);
    g.n = n;
    g.k = k;
    RT_TRY(list_on_host(offset, n_experts, pad, &host, &g.rows, err));
    if (g.rows > 0) {
        RT_TRY(rt_cuda_not_recorded(q, "rows of experts", err));
        RT_TRY(rt_cuda_temp(q, (size_t)g.rows * sizeof(int4), &g.row, err));
        RT_TRY(rt_cuda_temp(q, list_bytes, &list, err));
        RT_CUDA_TRY(cudaMemcpyAsync(list, host, list_bytes, cudaMemcpyHostToDevice, q->stream));
    }
    if (with_inverse) {
        RT_TRY(rt_cuda_temp(q, inverse_bytes, &g.inverse, err));
        RT_CUDA_TRY(cudaMemsetAsync(g.inverse, 0xff, inverse_bytes, q->stream));
    }
    if (g.rows > 0) {
        table_kernel<<<(unsigned)((g.rows + TABLE_THREADS - 1) / TABLE_THREADS), TABLE_THREADS, 0, q->stream>>>(
            perm, list, list + n_experts + 1, n_experts, g.rows, (int4 *)g.row, g.inverse);
        RT_TRY(rt_cuda_launched("the table of a group of experts", err));
    }
    *out = g;
    g = {};
out:
    rt_cuda_moe_group_release(q, &g);
    rt_cuda_temp_free(q, list);
    rt_free(host);
    return st;
}

void rt_cuda_moe_group_release(struct rt_queue *q, struct rt_cuda_moe_group *g)
{
    rt_cuda_temp_free(q, g->row);
    rt_cuda_temp_free(q, g->inverse);
    *g = {};
}

enum rt_status rt_cuda_moe_gather(struct rt_queue *q, const struct rt_cuda_moe_group *g, struct rt_act x, struct rt_act xg, int H,
                                  struct rt_err *err)
{
    const bool codes = x.scale != NULL;
    if (g->rows == 0)
        return RT_OK;
    if (codes && H % 128 != 0)
        return rt_fail(err, RT_SHAPE, "experts over %d columns; the e4m3 form needs a multiple of 128", H);
    const bool wide = (int64_t)H * (codes ? 1 : 2) % 16 == 0 && aligned16(x.data) && aligned16(xg.data);
    struct gather p = {};
    p.x = (const char *)x.data;
    p.to = (char *)xg.data;
    p.scale = x.scale;
    p.to_scale = xg.scale;
    p.row = (const int4 *)g->row;
    p.scale_ld = rt_act_rows(g->n);
    p.k = g->k;
    p.blocks = codes ? H / 128 : 0;
    p.nv = p.to == NULL ? 0 : wide ? H * (codes ? 1 : 2) / 16 : codes ? H / 2 : H; /* units of 16 or of 2 bytes */
    const int units = p.to == NULL ? p.blocks : p.nv, turns = (units + 255) / 256;
    const unsigned threads = (unsigned)(((units + turns - 1) / turns + 31) / 32 * 32), grid = (unsigned)(g->rows / ROWS);
    if (wide && g->inverse != NULL && g->rows >= g->n / 2) {
        const int64_t warps = (g->rows + 31) / 32, per_block = threads / 32;
        p.inverse = g->inverse;
        p.n = g->n;
        p.rows = g->rows;
        p.token_blocks = (unsigned)((g->n + TOKENS - 1) / TOKENS);
        deal_kernel<<<p.token_blocks + (unsigned)((warps + per_block - 1) / per_block), threads, 0, q->stream>>>(p);
    } else if (wide)
        gather_kernel<uint4><<<grid, threads, 0, q->stream>>>(p);
    else
        gather_kernel<unsigned short><<<grid, threads, 0, q->stream>>>(p);
    return rt_cuda_launched("the rows of a group of experts", err);
}

enum rt_status rt_cuda_moe_combine(struct rt_queue *q, const struct rt_cuda_moe_group *g, const void *out, const float *weight, void *y, int H,
                                   struct rt_err *err)
{
    struct combine p = {};
    if (g->rows == 0)
        return RT_OK;
    p.out = (const bf16 *)out;
    p.weight = weight;
    p.inverse = g->inverse;
    p.y = (bf16 *)y;
    p.row = g->rows < g->n ? (const int4 *)g->row : NULL; /* a group that few tokens chose is found by its rows */
    p.n = g->rows < g->n ? g->rows : g->n;
    p.k = g->k;
    p.H = H;
    const struct row_shape shape = row_shape_of(H / VEC, COMBINE_LANES);
    if (H % VEC != 0 || shape.each == 0 || !aligned16(out) || !aligned16(y)) {
        combine_slow_kernel<<<(unsigned)p.n, 128, 0, q->stream>>>(p);
        return rt_cuda_launched("the sum of experts", err);
    }
    const dim3 block(shape.lanes, shape.rows);
    const unsigned grid = (unsigned)((p.n + shape.rows - 1) / shape.rows);
    switch (shape.each) {
    case 1: combine_kernel<1><<<grid, block, 0, q->stream>>>(p); break;
    case 2: combine_kernel<2><<<grid, block, 0, q->stream>>>(p); break;
    case 3: combine_kernel<3><<<grid, block, 0, q->stream>>>(p); break;
    default: combine_kernel<4><<<grid, block, 0, q->stream>>>(p); break;
    }
    return rt_cuda_launched("the sum of experts", err);
}
