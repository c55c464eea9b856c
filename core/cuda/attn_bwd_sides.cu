/* Attention backward for compute capability 9.0: the kernels before and after the main one (attn_bwd.h). Both are bound by memory. */
#include "core/cuda/attn_bwd.h"
#include "core/cuda/attn_tile.cuh"
#include "core/cuda/vec8.cuh"

namespace {

enum { ROWS = RT_ATTN_BWD_ROWS, THREADS = 256 };

/* Places of the work of tile t in the list. Each lane looks at some of the sequences. */
__device__ __forceinline__ void list_work(const rt_attn_bwd_call &c, const rt_cuda_seqs &seqs, int t, int lane)
{
    const int32_t *cu = seqs.dev != NULL ? seqs.dev : seqs.held, *first_tile = cu + seqs.n_seq + 1;
    const place at = place_of(seqs, t, ROWS);
    const int own = (int)at.first / c.window, level = at.row / ROWS;
    int before = 0, tiles = 0, rank = 0; /* tiles of the windows before, of this one, and of it before this tile */
    for (int s = lane; s < seqs.n_seq; s += 32) {
        const int n = first_tile[s + 1] - first_tile[s], window = cu[s] / c.window;
        if (n == 0)
            continue;
        before += window < own ? n : 0;
        if (window == own) {
            tiles += n;
            rank += min(n, level) + (cu[s] < at.first && n > level);
        }
    }
    for (int m = 16; m > 0; m /= 2) {
        before += __shfl_xor_sync(~0u, before, m);
        tiles += __shfl_xor_sync(~0u, tiles, m);
        rank += __shfl_xor_sync(~0u, rank, m);
    }
    for (int h = lane; h < c.nh; h += 32) {
        const int from = h / c.heads * c.heads, many = min(c.heads, c.nh - from);
        const rt_attn_bwd_item item = {(int32_t)at.first, at.len, at.row, t - level, h, {0, 0, 0}};
        c.items[(int64_t)before * c.nh + (int64_t)from * tiles + (int64_t)rank * many + h - from] = item;
    }
}

/* A block for a tile and a head, a few lanes for a row. */
template <int D>
__global__ __launch_bounds__(THREADS) void attn_bwd_before_kernel(const __grid_constant__ rt_attn_bwd_call c, const __grid_constant__ rt_cuda_seqs seqs)
{
    enum { LANES = D / 8, AT_ONCE = 32 / LANES, WARP_ROWS = ROWS / (THREADS / 32), PARTS = ROWS * D / RT_ATTN_BWD_PART };
    __shared__ float sum[ROWS];
    const int t = blockIdx.x / c.nh, h = blockIdx.x % c.nh, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const place at = place_of(seqs, t, ROWS);
    const int col = lane % LANES * 8;
    uint4 o[WARP_ROWS / AT_ONCE], d[WARP_ROWS / AT_ONCE];
    if (h == 0 && warp == 0)
        list_work(c, seqs, t, lane);
    if (threadIdx.x < PARTS)
        c.added[((int64_t)h * c.n_tile + t) * PARTS + threadIdx.x] = 0;
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *c.ticket = 0;
#pragma unroll
    for (int i = 0; i < WARP_ROWS / AT_ONCE; i++) {
        const int row = at.row + warp * WARP_ROWS + i * AT_ONCE + lane / LANES;
        const int64_t from = (at.first + row) * c.o_ld + h * c.dv + col;
        const bool valid = row < at.len && col < c.dv;
        o[i] = valid ? *(const uint4 *)(c.o + from) : make_uint4(0, 0, 0, 0);
        d[i] = valid ? *(const uint4 *)(c.dout + from) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < WARP_ROWS / AT_ONCE; i++) {
        float x[8], y[8], add = 0;
        vec8::unpack(o[i], x);
        vec8::unpack(d[i], y);
#pragma unroll
        for (int e = 0; e < 8; e++)
            add += x[e] * y[e];
#pragma unroll
        for (int m = LANES / 2; m > 0; m /= 2)
            add += __shfl_xor_sync(~0u, add, m);
        if (lane % LANES == 0)
            sum[warp * WARP_ROWS + i * AT_ONCE + lane / LANES] = add;
    }
    __syncthreads();
    const int r = threadIdx.x % ROWS;
    const int64_t to = ((int64_t)h * c.n_tile + t) * ROWS + r;
    const bool valid = at.row + r < at.len;
    if (threadIdx.x < ROWS)
        c.delta[to] = valid ? sum[r] : 0;
    else
        c.lse2[to] = valid ? c.lse[h * c.n + at.first + at.row + r] * 1.4426950408889634f : INFINITY;
}

template <int D>
__device__ __forceinline__ void round_dq(const rt_attn_bwd_call &c, const place &at, int t, int h)
{
    enum { PARTS = ROWS * D / RT_ATTN_BWD_PART };
    const int j = threadIdx.x % 8, warp = threadIdx.x / 64, r8 = threadIdx.x / 8 % 8; /* columns 8 j .., rows 16 warp + r8 and 8 further */
    const float4 *from = (const float4 *)(c.sums + ((int64_t)h * c.n_tile + t) * ROWS * D) + j * 128 + warp * 32 + r8 * 4;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int row = (D == 64 ? part : part / 2) * 64 + 16 * warp + r8, col = (D == 64 ? 0 : part % 2 * 64) + 8 * j;
        float x[2][8];
        if (col >= c.dqk || at.row + row >= at.len)
            continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 v = from[part * (RT_ATTN_BWD_PART / 4) + i];
            x[0][2 * i] = v.x * c.scale, x[0][2 * i + 1] = v.y * c.scale;
            x[1][2 * i] = v.z * c.scale, x[1][2 * i + 1] = v.w * c.scale;
        }
        __nv_bfloat16 *to = c.dq + (at.first + at.row + row) * c.q_ld + h * c.q_head + col;
        *(uint4 *)to = vec8::pack(x[0]);
        if (at.row + row + 8 < at.len)
            *(uint4 *)(to + 8 * c.q_ld) = vec8::pack(x[1]);
    }
}

/* One tile of rows and a key head: the sum of what its query heads left, in ascending order. */
__device__ __forceinline__ void sum_heads(const rt_attn_bwd_call &c, const place &at, int hk, const bf16 *from, int d, bf16 *to, int64_t ld)
{
    const int chunks = d / 8, rows = min(ROWS, at.len - at.row);
    for (int i = threadIdx.x; i < rows * chunks; i += THREADS) {
        const int64_t row = at.first + at.row + i / chunks;
        const int col = i % chunks * 8;
        float x[8] = {};
#pragma unroll 4
        for (int g = 0; g < c.group; g++) {
            float y[8];
            vec8::unpack(*(const uint4 *)(from + ((g * c.n + row) * c.nkv + hk) * d + col), y);
#pragma unroll
            for (int e = 0; e < 8; e++)
                x[e] += y[e];
        }
        *(uint4 *)(to + row * ld + col) = vec8::pack(x);
    }
}

template <int D>
__global__ __launch_bounds__(THREADS) void attn_bwd_after_kernel(const __grid_constant__ rt_attn_bwd_call c, const __grid_constant__ rt_cuda_seqs seqs)
{
    const int of_dq = c.n_tile * c.nh;
    if ((int)blockIdx.x < of_dq) {
        const int t = blockIdx.x / c.nh;
        round_dq<D>(c, place_of(seqs, t, ROWS), t, blockIdx.x % c.nh);
    } else {
        const int i = blockIdx.x - of_dq, hk = i % c.nkv;
        const place at = place_of(seqs, i / c.nkv, ROWS);
        sum_heads(c, at, hk, c.dk_head, c.dqk, c.dk + hk * c.k_head, c.k_ld);
        sum_heads(c, at, hk, c.dv_head, c.dv, c.dv_out + hk * c.v_head, c.v_ld);
    }
}

}

enum rt_status rt_cuda_attn_bwd_before(struct rt_queue *q, const struct rt_attn_bwd_call *c, const struct rt_cuda_seqs *seqs, struct rt_err *err)
{
    const unsigned blocks = (unsigned)(c->n_tile * c->nh);
    if (c->D == 64)
        attn_bwd_before_kernel<64><<<blocks, THREADS, 0, q->stream>>>(*c, *seqs);
    else
        attn_bwd_before_kernel<128><<<blocks, THREADS, 0, q->stream>>>(*c, *seqs);
    return rt_cuda_launched("attn_bwd_before", err);
}

enum rt_status rt_cuda_attn_bwd_after(struct rt_queue *q, const struct rt_attn_bwd_call *c, const struct rt_cuda_seqs *seqs, struct rt_err *err)
{
    const unsigned blocks = (unsigned)(c->n_tile * (c->nh + (c->group > 1 ? c->nkv : 0)));
    if (c->D == 64)
        attn_bwd_after_kernel<64><<<blocks, THREADS, 0, q->stream>>>(*c, *seqs);
    else
        attn_bwd_after_kernel<128><<<blocks, THREADS, 0, q->stream>>>(*c, *seqs);
    return rt_cuda_launched("attn_bwd_after", err);
}
