/* Attention forward, own kernel: tiles of queries against tiles of keys with an online softmax (Dao, FlashAttention-2, arXiv 2307.08691), for
 * packed sequences, grouped heads and value heads of another size. mma.sync and cp.async: every GPU from compute capability 8.0 on.
 *
 * A block owns WARPS * WM * 16 queries of one head. While the scores of a tile of keys are computed, its values are on their way; while the
 * output is summed, the next keys. Blocks of one head lie beside each other in the grid, the longest first, so that its keys stay in L2.
 */
#include "core/cuda/attn_tile.cuh"

namespace {

struct fwd_params {
    head_rows q, k, v;
    int64_t q_head, k_head, v_head, n;
    bf16 *o;
    float *lse;
    int n_tile, nh, group;
    float scale_log2; /* scale / ln 2 */
    bool o_vec;
};

template <int N8>
__device__ __forceinline__ void mask_causal(float (&s)[N8][4], int row, int col0, int lane)
{
#pragma unroll
    for (int j = 0; j < N8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (col0 + 8 * j + lane % 4 * 2 + (e & 1) > row + (e >> 1) * 8)
                s[j][e] = -INFINITY;
}

/* Scores to weights relative to the running maximum; returns in shrink what earlier sums are to be multiplied by. Columns [0, j] of every row
 * hold a score from the first tile on, so top is finite. */
template <int N8>
__device__ __forceinline__ void softmax_step(float (&s)[N8][4], float (&top)[2], float (&sum)[2], float (&shrink)[2], float scale_log2)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = top[half];
#pragma unroll
        for (int j = 0; j < N8; j++)
            m = fmaxf(m, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        shrink[half] = exp2_fast((top[half] - m) * scale_log2);
        top[half] = m;
        const float base = m * scale_log2;
        float add = 0;
#pragma unroll
        for (int j = 0; j < N8; j++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                s[j][e] = exp2_fast(fmaf(s[j][e], scale_log2, -base));
                add += s[j][e];
            }
        sum[half] = sum[half] * shrink[half] + add;
    }
}

template <int DQK, int DV, int BN, int WARPS, int WM>
struct fwd_shape {
    enum { threads = WARPS * 32, rows = WARPS * WM * 16 };
    static constexpr int shared = tile<DQK>::bytes(rows + BN) + tile<DV>::bytes(BN);
};

template <int DQK, int DV, int BN, int WARPS, int WM>
__global__ __launch_bounds__(WARPS * 32) void attn_fwd_kernel(const __grid_constant__ fwd_params p, const __grid_constant__ rt_cuda_seqs seqs)
{
    typedef fwd_shape<DQK, DV, BN, WARPS, WM> shape;
    extern __shared__ __align__(16) bf16 pool[];
    bf16 *sq = pool, *sk = sq + shape::rows * tile<DQK>::stride, *sv = sk + BN * tile<DQK>::stride;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WM * 16, h = blockIdx.x / p.n_tile;
    const place at = place_of(seqs, p.n_tile - 1 - blockIdx.x % p.n_tile, shape::rows);
    head_rows q = p.q, k = p.k, v = p.v;
    q.data += at.first * q.ld + h * p.q_head;
    k.data += at.first * k.ld + h / p.group * p.k_head;
    v.data += at.first * v.ld + h / p.group * p.v_head;
    const int row0 = at.row + warp_row, last = row0 + WM * 16 - 1; /* of this warp */
    const int end = min(at.row + shape::rows, at.len);
    float o[WM][DV / 8][4] = {}, top[WM][2], sum[WM][2] = {};
    for (int i = 0; i < WM; i++)
        top[i][0] = top[i][1] = -INFINITY;

    tile_load<DQK, shape::rows, shape::threads>(sq, q, at.row, at.len);
    tile_load<DQK, BN, shape::threads>(sk, k, 0, at.len);
    copies_commit();
    for (int col = 0; col < end; col += BN) {
        copies_wait<0>();
        __syncthreads();
        tile_load<DV, BN, shape::threads>(sv, v, col, at.len);
        copies_commit();
        const bool busy = col <= last; /* a later tile is masked for all rows of this warp */
        float s[WM][BN / 8][4] = {};
        if (busy)
            product_nt<DQK, WM, BN / 8>(s, sq, warp_row, sk, lane);
        copies_wait<0>();
        __syncthreads();
        if (col + BN < end)
            tile_load<DQK, BN, shape::threads>(sk, k, col + BN, at.len);
        copies_commit();
        if (busy) {
#pragma unroll
            for (int i = 0; i < WM; i++) {
                float shrink[2];
                if (col + BN - 1 > row0 + 16 * i)
                    mask_causal<BN / 8>(s[i], row0 + 16 * i + lane / 4, col, lane);
                softmax_step<BN / 8>(s[i], top[i], sum[i], shrink, p.scale_log2);
#pragma unroll
                for (int j = 0; j < DV / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        o[i][j][e] *= shrink[e / 2];
            }
            product_nn<DV, WM, BN / 8>(o, s, sv, lane);
        }
    }
    float factor[WM][2];
#pragma unroll
    for (int i = 0; i < WM; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[i][half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            factor[i][half] = 1.0f / total;
            const int row = row0 + 16 * i + 8 * half + lane / 4;
            if (p.lse != NULL && lane % 4 == 0 && row < at.len)
                p.lse[h * p.n + at.first + row] = (top[i][half] * p.scale_log2 + log2f(total)) * 0.6931471805599453f;
        }
    bf16 *out = p.o + (at.first + row0) * (int64_t)p.nh * p.v.d + (int64_t)h * p.v.d;
    rows_store<DV, tile<DQK>::stride, WM>(sq + warp_row * tile<DQK>::stride, o, factor, out, (int64_t)p.nh * p.v.d, p.v.d, p.o_vec, at.len - row0,
                                          lane);
}

template <int DQK, int DV, int BN, int WARPS, int WM>
enum rt_status launch(struct rt_queue *queue, const struct rt_attn_fwd_args *a, int shared, fwd_params p, struct rt_err *err)
{
    typedef fwd_shape<DQK, DV, BN, WARPS, WM> shape;
    struct rt_cuda_seqs seqs;
    int64_t n_tile;
    enum rt_status st = shared_fits("attn_fwd", shape::shared, shared, &a->s, err);
    if (st == RT_OK)
        st = rt_cuda_seqs_make(queue, &a->s, shape::rows, &seqs, &n_tile, err);
    if (st != RT_OK)
        return st;
    p.n_tile = (int)n_tile;
    st = rt_cuda_check(cudaFuncSetAttribute(attn_fwd_kernel<DQK, DV, BN, WARPS, WM>, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::shared),
                       "cudaFuncSetAttribute", err);
    if (st == RT_OK) {
        attn_fwd_kernel<DQK, DV, BN, WARPS, WM><<<(unsigned)(n_tile * a->s.nh), shape::threads, shape::shared, queue->stream>>>(p, seqs);
        st = rt_cuda_launched("attn_fwd", err);
    }
    rt_cuda_temp_free(queue, (void *)seqs.dev);
    return st;
}

}

enum rt_status rt_cuda_attn_fwd_own(struct rt_queue *queue, const struct rt_attn_fwd_args *a, int shared, struct rt_err *err)
{
    const struct rt_attn_shape *s = &a->s;
    fwd_params p = {};
    p.q = {(const bf16 *)a->q, a->q_ld, s->dqk, aligned16(a->q, a->q_ld, a->q_head, s->dqk)};
    p.k = {(const bf16 *)a->k, a->k_ld, s->dqk, aligned16(a->k, a->k_ld, a->k_head, s->dqk)};
    p.v = {(const bf16 *)a->v, a->v_ld, s->dv, aligned16(a->v, a->v_ld, a->v_head, s->dv)};
    p.q_head = a->q_head, p.k_head = a->k_head, p.v_head = a->v_head, p.n = s->n;
    p.o = (bf16 *)a->o, p.lse = a->lse, p.nh = s->nh, p.group = s->nh / s->nkv;
    p.scale_log2 = (float)(s->scale * 1.4426950408889634);
    p.o_vec = aligned16(a->o, 0, 0, s->dv);
    const int d = s->dqk > s->dv ? s->dqk : s->dv;
    if (d <= 64)
        return launch<64, 64, 64, 4, 2>(queue, a, shared, p, err);
    if (d <= 96)
        return launch<96, 96, 64, 4, 2>(queue, a, shared, p, err);
    if (d <= 128)
        return launch<128, 128, 64, 4, 2>(queue, a, shared, p, err);
    if (d <= 192 && s->dv <= 128)
        return launch<192, 128, 64, 4, 2>(queue, a, shared, p, err);
    if (d <= 256 && shared < 160 << 10)
        return launch<256, 256, 32, 4, 1>(queue, a, shared, p, err);
    if (d <= 256)
        return launch<256, 256, 64, 8, 1>(queue, a, shared, p, err);
    return rt_fail(err, RT_UNSUPPORTED, "attn_fwd: heads of %d and %d elements; the GPU's kernels go to 256", s->dqk, s->dv);
}
