/* Attention backward, own kernels: no atomics, so that the same call gives the same bytes.
 *
 *   delta = rowsum(dO * O)
 *   a pass over the keys for each tile of queries:    dQ = scale * dS K
 *   a pass over the queries for each tile of keys, of all query heads of the key head:    dV = P^T dO,  dK = scale * dS^T Q
 *   with P = exp(scale Q K^T - lse), dS = P (dO V^T - delta), recomputed in both.
 *
 * The passes are one kernel: rows that stay (X: queries, or keys) against tiles that stream by (Y: keys, or queries); x1 and y1 have dqk elements,
 * x2 and y2 dv. acc1 = dS y1, acc2 = P y2.
 */
#include "core/cuda/attn_tile.cuh"

namespace {

struct bwd_params {
    head_rows q, k, v, dout;
    int64_t q_head, k_head, v_head, n;
    const float *lse, *delta;
    bf16 *dq, *dk, *dv;
    int n_tile, nh, group;
    float scale, scale_log2; /* scale / ln 2 */
    bool dq_vec, dk_vec, dv_vec;
};

/* A warp for each row and head. */
__global__ __launch_bounds__(256) void attn_delta_kernel(const bf16 *__restrict__ o, const bf16 *__restrict__ dout, float *__restrict__ delta, int64_t n,
                                                         int nh, int dv, bool vec)
{
    const int lane = threadIdx.x % 32;
    const int64_t step = (int64_t)gridDim.x * 8;
    for (int64_t i = (int64_t)blockIdx.x * 8 + threadIdx.x / 32; i < n * nh; i += step) {
        float sum = 0;
        if (vec) {
            for (int c = lane * 2; c < dv; c += 64) {
                const float2 a = __bfloat1622float2(*(const __nv_bfloat162 *)(o + i * dv + c));
                const float2 b = __bfloat1622float2(*(const __nv_bfloat162 *)(dout + i * dv + c));
                sum += a.x * b.x + a.y * b.y;
            }
        } else {
            for (int c = lane; c < dv; c += 32)
                sum += __bfloat162float(o[i * dv + c]) * __bfloat162float(dout[i * dv + c]);
        }
        for (int m = 16; m > 0; m /= 2)
            sum += __shfl_xor_sync(~0u, sum, m);
        if (lane == 0)
            delta[i % nh * n + i / nh] = sum;
    }
}

/* What stays and what streams in a pass, for one block. */
struct sides {
    head_rows x1, x2, y1, y2;
    int64_t y1_head, y2_head; /* from one query head of the group to the next; 0 where keys stream */
};

template <int D1, int D2, int COLS, int WARPS, int WM>
struct bwd_shape {
    enum {
        threads = WARPS * 32, rows = WARPS * WM * 16,
        y2_from = COLS * tile<D1>::stride, stage = y2_from + COLS * tile<D2>::stride, /* elements of one stage of Y */
        x2_from = rows * tile<D1>::stride, y_from = x2_from + rows * tile<D2>::stride,
    };
    static constexpr int shared = (y_from + 2 * stage) * 2 + 2 * 2 * COLS * 4; /* with lse and delta of both stages */
};

/* One tile of Y on its way; lse and delta with it where queries stream (stat != NULL: lse at 0, delta at COLS). */
template <class S, int D1, int D2, int COLS>
__device__ __forceinline__ void stream_load(bf16 *y, float *stat, const sides &e, int g, int col, int len, const float *lse, const float *delta,
                                            int64_t n)
{
    head_rows y1 = e.y1, y2 = e.y2;
    y1.data += g * e.y1_head;
    y2.data += g * e.y2_head;
    tile_load<D1, COLS, S::threads>(y, y1, col, len);
    tile_load<D2, COLS, S::threads>(y + S::y2_from, y2, col, len);
    if (stat != NULL)
        for (int i = threadIdx.x; i < 2 * COLS; i += S::threads) {
            const int c = i % COLS;
            const float *from = (i < COLS ? lse : delta) + g * n;
            const bool valid = col + c < len;
            copy4(shared_at(stat + i), valid ? from + col + c : lse, valid);
        }
    copies_commit();
}

/* p: scores to P; dp: to dS without scale. Row r of the warp's 16 and column c are a pair of (query, key), or of (key, query) where queries
 * stream (ByKey); own: lse / ln 2 and delta of the rows, stat: of the columns. */
template <int N8, bool ByKey>
__device__ __forceinline__ void weigh(float (&p)[N8][4], float (&dp)[N8][4], const float (&own)[2][2], const float *stat, int row, int col0, int len,
                                      bool edge, float scale_log2, int lane)
{
#pragma unroll
    for (int j = 0; j < N8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int c = 8 * j + lane % 4 * 2 + (e & 1), r = row + (e >> 1) * 8;
            const float base = ByKey ? stat[c] * 1.4426950408889634f : own[0][e >> 1], delta = ByKey ? stat[8 * N8 + c] : own[1][e >> 1];
            float w = exp2_fast(fmaf(p[j][e], scale_log2, -base));
            if (edge && (ByKey ? col0 + c < r || col0 + c >= len : col0 + c > r))
                w = 0;
            p[j][e] = w;
            dp[j][e] = w * (dp[j][e] - delta);
        }
}

template <int D1, int D2, int COLS, int WARPS, int WM, bool ByKey, bool Acc1, bool Acc2>
__global__ __launch_bounds__(WARPS * 32) void attn_bwd_kernel(const __grid_constant__ bwd_params p, const __grid_constant__ rt_cuda_seqs seqs)
{
    typedef bwd_shape<D1, D2, COLS, WARPS, WM> S;
    extern __shared__ __align__(16) bf16 pool[];
    bf16 *sx1 = pool, *sx2 = pool + S::x2_from, *sy = pool + S::y_from;
    float *stat = (float *)(sy + 2 * S::stage);
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WM * 16, h = blockIdx.x / p.n_tile, tile_at = blockIdx.x % p.n_tile;
    /* the longest first: the last queries, the first keys */
    const place at = place_of(seqs, ByKey ? tile_at : p.n_tile - 1 - tile_at, S::rows);
    const int hq = ByKey ? h * p.group : h, hk = ByKey ? h : h / p.group, row0 = at.row + warp_row;
    sides e = {ByKey ? p.k : p.q, ByKey ? p.v : p.dout, ByKey ? p.q : p.k, ByKey ? p.dout : p.v, 0, 0};
    e.x1.data += at.first * e.x1.ld + (ByKey ? hk * p.k_head : hq * p.q_head);
    e.x2.data += at.first * e.x2.ld + (ByKey ? hk * p.v_head : hq * (int64_t)p.v.d);
    e.y1.data += at.first * e.y1.ld + (ByKey ? hq * p.q_head : hk * p.k_head);
    e.y2.data += at.first * e.y2.ld + (ByKey ? hq * (int64_t)p.v.d : hk * p.v_head);
    if (ByKey)
        e.y1_head = p.q_head, e.y2_head = p.v.d;
    const float *lse = p.lse + hq * p.n + at.first, *delta = p.delta + hq * p.n + at.first;

    /* tiles of Y: of each head of the group from the diagonal to the end, or up to the diagonal */
    const int from = ByKey ? at.row / COLS * COLS : 0, to = ByKey ? at.len : min(at.row + S::rows, at.len);
    const int per_head = (to - from + COLS - 1) / COLS, n_step = per_head * (ByKey ? p.group : 1);
    float acc1[WM][Acc1 ? D1 / 8 : 1][4] = {}, acc2[WM][Acc2 ? D2 / 8 : 1][4] = {}, own[WM][2][2] = {};
    if (!ByKey)
        for (int i = 0; i < WM; i++)
            for (int half = 0; half < 2; half++) {
                const int row = row0 + 16 * i + 8 * half + lane / 4;
                own[i][0][half] = row < at.len ? lse[row] * 1.4426950408889634f : 0;
                own[i][1][half] = row < at.len ? delta[row] : 0;
            }
    tile_load<D1, S::rows, S::threads>(sx1, e.x1, at.row, at.len);
    tile_load<D2, S::rows, S::threads>(sx2, e.x2, at.row, at.len);
    stream_load<S, D1, D2, COLS>(sy, ByKey ? stat : NULL, e, 0, from, at.len, lse, delta, p.n);
    for (int step = 0; step < n_step; step++) {
        const int next = step + 1, stage = step & 1, col = from + step % per_head * COLS;
        if (next < n_step)
            stream_load<S, D1, D2, COLS>(sy + (next & 1) * S::stage, ByKey ? stat + (next & 1) * 2 * COLS : NULL, e, next / per_head,
                                         from + next % per_head * COLS, at.len, lse, delta, p.n);
        else
            copies_commit();
        copies_wait<1>();
        __syncthreads();
        const bf16 *y1 = sy + stage * S::stage, *y2 = y1 + S::y2_from;
        const bool busy = ByKey ? col + COLS > row0 : col < row0 + WM * 16; /* else masked for all rows of this warp */
        if (busy) {
            float s[WM][COLS / 8][4] = {}, ds[WM][COLS / 8][4] = {};
            product_nt<D1, WM, COLS / 8>(s, sx1, warp_row, y1, lane);
            if (Acc1)
                product_nt<D2, WM, COLS / 8>(ds, sx2, warp_row, y2, lane);
#pragma unroll
            for (int i = 0; i < WM; i++) {
                const int r = row0 + 16 * i;
                weigh<COLS / 8, ByKey>(s[i], ds[i], own[i], stat + stage * 2 * COLS, r + lane / 4, col, at.len,
                                       ByKey ? col < r + 16 || col + COLS > at.len : col + COLS > r, p.scale_log2, lane);
            }
            if constexpr (Acc2)
                product_nn<D2, WM, COLS / 8>(acc2, s, y2, lane);
            if constexpr (Acc1)
                product_nn<D1, WM, COLS / 8>(acc1, ds, y1, lane);
        }
        __syncthreads();
    }
    float f1[WM][2], f2[WM][2];
    for (int i = 0; i < WM; i++) {
        f1[i][0] = f1[i][1] = p.scale;
        f2[i][0] = f2[i][1] = 1;
    }
    copies_wait<0>();
    const head_rows &x1 = ByKey ? p.k : p.q;
    if constexpr (Acc1)
        rows_store<D1, tile<D1>::stride, WM>(sx1 + warp_row * tile<D1>::stride, acc1, f1,
                                             (ByKey ? p.dk + hk * p.k_head : p.dq + hq * p.q_head) + (at.first + row0) * x1.ld, x1.ld, x1.d,
                                             ByKey ? p.dk_vec : p.dq_vec, at.len - row0, lane);
    if constexpr (Acc2)
        rows_store<D2, tile<D2>::stride, WM>(sx2 + warp_row * tile<D2>::stride, acc2, f2, p.dv + hk * p.v_head + (at.first + row0) * p.v.ld, p.v.ld,
                                             p.v.d, p.dv_vec, at.len - row0, lane);
}

template <int D1, int D2, int COLS, int WARPS, int WM, bool ByKey, bool Acc1, bool Acc2>
enum rt_status launch(struct rt_queue *queue, const struct rt_attn_bwd_args *a, int shared, bwd_params p, struct rt_err *err)
{
    typedef bwd_shape<D1, D2, COLS, WARPS, WM> S;
    struct rt_cuda_seqs seqs;
    int64_t n_tile;
    enum rt_status st = shared_fits("attn_bwd", S::shared, shared, &a->s, err);
    if (st == RT_OK)
        st = rt_cuda_seqs_make(queue, &a->s, S::rows, &seqs, &n_tile, err);
    if (st != RT_OK)
        return st;
    p.n_tile = (int)n_tile;
    st = rt_cuda_check(cudaFuncSetAttribute(attn_bwd_kernel<D1, D2, COLS, WARPS, WM, ByKey, Acc1, Acc2>,
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared), "cudaFuncSetAttribute", err);
    if (st == RT_OK) {
        const int64_t blocks = n_tile * (ByKey ? a->s.nkv : a->s.nh);
        attn_bwd_kernel<D1, D2, COLS, WARPS, WM, ByKey, Acc1, Acc2><<<(unsigned)blocks, S::threads, S::shared, queue->stream>>>(p, seqs);
        st = rt_cuda_launched("attn_bwd", err);
    }
    rt_cuda_temp_free(queue, (void *)seqs.dev);
    return st;
}

/* Tiles: what the registers of a thread hold of the sums (D1 + D2 elements of WM 16 rows), and two stages of Y beside X in shared memory. */
enum rt_status launch_sized(struct rt_queue *q, const struct rt_attn_bwd_args *a, int shared, const bwd_params &p, struct rt_err *err)
{
    const int d = a->s.dqk > a->s.dv ? a->s.dqk : a->s.dv;
    const bool small = shared < 160 << 10;
    enum rt_status st;
    if (d <= 64) {
        RT_TRY((launch<64, 64, 64, 4, 2, false, true, false>(q, a, shared, p, err)));
        RT_TRY((launch<64, 64, 32, 4, 2, true, true, true>(q, a, shared, p, err)));
    } else if (d <= 128 && small) {
        RT_TRY((launch<128, 128, 32, 2, 2, false, true, false>(q, a, shared, p, err)));
        RT_TRY((launch<128, 128, 32, 4, 1, true, true, true>(q, a, shared, p, err)));
    } else if (d <= 96) {
        RT_TRY((launch<96, 96, 32, 4, 2, false, true, false>(q, a, shared, p, err)));
        RT_TRY((launch<96, 96, 64, 8, 1, true, true, true>(q, a, shared, p, err)));
    } else if (d <= 128) {
        RT_TRY((launch<128, 128, 32, 4, 2, false, true, false>(q, a, shared, p, err)));
        RT_TRY((launch<128, 128, 64, 8, 1, true, true, true>(q, a, shared, p, err)));
    } else if (d <= 192 && a->s.dv <= 128) {
        RT_TRY((launch<192, 128, 32, 8, 1, false, true, false>(q, a, shared, p, err)));
        RT_TRY((launch<192, 128, 32, 8, 1, true, true, true>(q, a, shared, p, err)));
    } else if (d <= 256) {
        RT_TRY((launch<256, 256, 16, 4, 1, false, true, false>(q, a, shared, p, err)));
        RT_TRY((launch<256, 256, 16, 4, 1, true, true, false>(q, a, shared, p, err)));
        RT_TRY((launch<256, 256, 16, 4, 1, true, false, true>(q, a, shared, p, err)));
    } else {
        RT_FAIL(err, UNSUPPORTED, "attn_bwd: heads of %d and %d elements; the GPU's kernels go to 256", a->s.dqk, a->s.dv);
    }
out:
    return st;
}

}

namespace {

__global__ __launch_bounds__(256) void attn_stats_kernel(rt_cuda_stats s)
{
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < s.n * s.heads; i += step) {
        const int64_t h = i / s.n, t = i % s.n, at = s.rows == 0 ? t * s.heads + h : (t / s.rows * s.heads + h) * s.rows + t % s.rows;
        if (s.to_lse)
            s.lse[h * s.lse_ld + t] = s.packed[at];
        else
            s.packed[at] = s.lse[h * s.lse_ld + t];
    }
}

}

enum rt_status rt_cuda_attn_stats(struct rt_queue *q, const struct rt_cuda_stats *s, struct rt_err *err)
{
    const int64_t blocks = (s->n * s->heads + 255) / 256, most = 16 * (int64_t)q->dev->sm_count;
    attn_stats_kernel<<<(unsigned)(blocks < most ? blocks : most), 256, 0, q->stream>>>(*s);
    return rt_cuda_launched("attn_stats", err);
}

static enum rt_status delta_of(struct rt_queue *queue, const struct rt_attn_bwd_args *a, struct rt_err *err)
{
    const struct rt_attn_shape *s = &a->s;
    const int64_t blocks = (s->n * s->nh + 7) / 8, most = 32 * (int64_t)queue->dev->sm_count;
    const bool vec = s->dv % 2 == 0 && (uintptr_t)a->o % 4 == 0 && (uintptr_t)a->dout % 4 == 0;
    attn_delta_kernel<<<(unsigned)(blocks < most ? blocks : most), 256, 0, queue->stream>>>((const bf16 *)a->o, (const bf16 *)a->dout, a->delta,
                                                                                            s->n, s->nh, s->dv, vec);
    return rt_cuda_launched("attn_delta", err);
}

enum rt_status rt_cuda_attn_bwd_own(struct rt_queue *queue, const struct rt_attn_bwd_args *a, int shared, struct rt_err *err)
{
    const struct rt_attn_shape *s = &a->s;
    bwd_params p = {};
    p.q = {(const bf16 *)a->q, a->q_ld, s->dqk, aligned16(a->q, a->q_ld, a->q_head, s->dqk)};
    p.k = {(const bf16 *)a->k, a->k_ld, s->dqk, aligned16(a->k, a->k_ld, a->k_head, s->dqk)};
    p.v = {(const bf16 *)a->v, a->v_ld, s->dv, aligned16(a->v, a->v_ld, a->v_head, s->dv)};
    p.dout = {(const bf16 *)a->dout, (int64_t)s->nh * s->dv, s->dv, aligned16(a->dout, 0, 0, s->dv)};
    p.q_head = a->q_head, p.k_head = a->k_head, p.v_head = a->v_head, p.n = s->n;
    p.lse = a->lse, p.delta = a->delta, p.dq = (bf16 *)a->dq, p.dk = (bf16 *)a->dk, p.dv = (bf16 *)a->dv;
    p.dq_vec = aligned16(a->dq, a->q_ld, a->q_head, s->dqk);
    p.dk_vec = aligned16(a->dk, a->k_ld, a->k_head, s->dqk);
    p.dv_vec = aligned16(a->dv, a->v_ld, a->v_head, s->dv);
    p.nh = s->nh, p.group = s->nh / s->nkv, p.scale = s->scale;
    p.scale_log2 = (float)(s->scale * 1.4426950408889634);
    const enum rt_status st = delta_of(queue, a, err);
    return st != RT_OK ? st : launch_sized(queue, a, shared, p, err);
}
