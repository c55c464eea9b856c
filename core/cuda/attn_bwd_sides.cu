/* Attention backward for compute capability 9.0, around the main kernel (attn_bwd.h): the kernels before and after it, both bound by memory; the
 * scratch, the order of the work, and the call. */
#include "core/cuda/attn_bwd.h"
#include "core/cuda/attn_sm90.cuh"
#include "core/cuda/vec8.cuh"

namespace {

enum { ROWS = RT_ATTN_BWD_ROWS, THREADS = 256, AFTER_THREADS = 128 };

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

/* A warpgroup's keys of a tile and a key head: the sum of what its query heads left, in ascending order. */
template <int D>
__global__ __launch_bounds__(AFTER_THREADS) void attn_bwd_after_kernel(const __grid_constant__ rt_attn_bwd_call c, const __grid_constant__ rt_cuda_seqs seqs)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const int t = blockIdx.x / c.nkv, hk = blockIdx.x % c.nkv, wg = blockIdx.z, lane = threadIdx.x % 32;
    const bool keys = blockIdx.y == 0;
    const place at = place_of(seqs, t, ROWS);
    const int row = at.row + wg * (ROWS / 2) + threadIdx.x / 32 * 16 + lane / 4, d = keys ? c.dqk : c.dv;
    const float one[2] = {1, 1};
    float sum[D / 2] = {};
    if (at.row + wg * (ROWS / 2) >= at.len)
        return;
#pragma unroll 2
    for (int h = hk * c.group; h < (hk + 1) * c.group; h++) {
        const uint4 *from = (keys ? c.dk_head : c.dv_head) + (((int64_t)h * c.n_tile + t) * 2 + wg) * (D / 16 * AFTER_THREADS) + threadIdx.x;
        uint4 part[D / 16];
#pragma unroll
        for (int v = 0; v < D / 16; v++)
            part[v] = from[v * AFTER_THREADS];
#pragma unroll
        for (int v = 0; v < D / 16; v++) {
            float x[8];
            vec8::unpack(part[v], x);
#pragma unroll
            for (int e = 0; e < 8; e++)
                sum[8 * v + e] += x[e];
        }
    }
    bf16 *to = keys ? c.dk + hk * c.k_head + at.first * c.k_ld : c.dv_out + hk * c.v_head + at.first * c.v_ld;
    sums_out<D>(sum, one, to, keys ? c.k_ld : c.v_ld, d, row, at.len, lane);
#endif
}

enum rt_status before(struct rt_queue *q, const struct rt_attn_bwd_call *c, const struct rt_cuda_seqs *seqs, struct rt_err *err)
{
    const unsigned blocks = (unsigned)(c->n_tile * c->nh);
    if (c->D == 64)
        attn_bwd_before_kernel<64><<<blocks, THREADS, 0, q->stream>>>(*c, *seqs);
    else
        attn_bwd_before_kernel<128><<<blocks, THREADS, 0, q->stream>>>(*c, *seqs);
    return rt_cuda_launched("attn_bwd_before", err);
}
enum rt_status after(struct rt_queue *q, const struct rt_attn_bwd_call *c, const struct rt_cuda_seqs *seqs, struct rt_err *err)
{
    const dim3 blocks((unsigned)(c->n_tile * c->nkv), 2, 2); /* keys and values; warpgroups */
    if (c->D == 64)
        attn_bwd_after_kernel<64><<<blocks, AFTER_THREADS, 0, q->stream>>>(*c, *seqs);
    else
        attn_bwd_after_kernel<128><<<blocks, AFTER_THREADS, 0, q->stream>>>(*c, *seqs);
    return rt_cuda_launched("attn_bwd_after", err);
}

/* Scratch of a call: bytes for all of it, and the pointers into them from `at`. */
size_t carve(struct rt_attn_bwd_call *c, char *at)
{
    const size_t rows = (size_t)c->n_tile * ROWS, nh = (size_t)c->nh, parts = rows * (size_t)c->D / RT_ATTN_BWD_PART;
    const size_t sizes[] = {nh * rows * (size_t)c->D * 4, nh * rows * (size_t)c->D * 2, nh * rows * (size_t)c->D * 2, nh * rows * 4, nh * rows * 4,
                            nh * (size_t)c->n_tile * sizeof *c->items, nh * parts * 4, 4};
    char *p[8];
    size_t all = 0;
    for (int i = 0; i < 8; i++) {
        p[i] = at + all;
        all += (sizes[i] + 255) / 256 * 256;
    }
    c->sums = (float *)p[0], c->dk_head = (uint4 *)p[1], c->dv_head = (uint4 *)p[2], c->lse2 = (float *)p[3], c->delta = (float *)p[4];
    c->items = (struct rt_attn_bwd_item *)p[5], c->added = (int32_t *)p[6], c->ticket = (int32_t *)p[7];
    return all;
}

/* Of `all`, at most `most` at a time, evenly: how many. */
int even_share(int all, int64_t most)
{
    const int shares = (int)((all + most - 1) / most);
    return (all + shares - 1) / shares;
}

/* How many of all key heads go together: as the scratch has room for. */
int key_heads(struct rt_attn_bwd_call c, int all, const struct rt_dev *dev)
{
    c.nkv = 1, c.nh = c.group;
    const size_t fit = (size_t)dev->scratch / carve(&c, NULL);
    return even_share(all, fit < 1 ? 1 : fit > (size_t)all ? all : (int64_t)fit);
}

/* Which work goes together: queries, dO and sums of dQ (8 D bytes a row) of as much as takes five eighths of L2; but where that is fewer than CHAINS
 * heads of sequences, CHAINS heads: the key blocks of a head and sequence each add to dQ behind the one before and hand a part on more than a step later,
 * so in a few chains blocks wait for each other. (One H200, 12 heads of 128: one head at a time takes 6 % longer at 16,384 tokens, 2 % at 32,768; three
 * 4 % longer at 8,192.) */
void order_for(struct rt_attn_bwd_call *c, const struct rt_attn_shape *s, const struct rt_dev *dev)
{
    enum { CHAINS = 6 };
    int64_t longest = 1;
    for (int64_t i = 0; i < s->n_seq; i++)
        if (s->cu_seqlens[i + 1] - s->cu_seqlens[i] > longest)
            longest = s->cu_seqlens[i + 1] - s->cu_seqlens[i];
    const int64_t rows = (int64_t)(dev->l2_bytes / 8 * 5) / (8 * c->D), fit = rows / longest, heads = fit < 1 ? 1 : fit > c->nh ? c->nh : fit;
    const int64_t begin = (rows / heads + longest - 1) / longest, seqs = begin < s->n / longest ? begin : s->n / longest; /* of the longest */
    c->heads = even_share(c->nh, heads * seqs < CHAINS ? CHAINS : heads);
    const int64_t window = rows / c->heads;
    c->window = (int)(window < longest ? longest : window > INT32_MAX ? INT32_MAX : window);
}

/* The call over key heads from .. from + c.nkv - 1. */
enum rt_status some_heads(struct rt_queue *q, const struct rt_attn_bwd_args *a, struct rt_attn_bwd_call c, int from, const struct rt_cuda_seqs *seqs,
                          struct rt_err *err)
{
    enum rt_status st;
    const int64_t hq = (int64_t)from * c.group;
    c.q = (const bf16 *)a->q + hq * a->q_head, c.dq = (bf16 *)a->dq + hq * a->q_head;
    c.k = (const bf16 *)a->k + from * a->k_head, c.dk = (bf16 *)a->dk + from * a->k_head;
    c.v = (const bf16 *)a->v + from * a->v_head, c.dv_out = (bf16 *)a->dv + from * a->v_head;
    c.o = (const bf16 *)a->o + hq * c.dv, c.dout = (const bf16 *)a->dout + hq * c.dv, c.lse = a->lse + hq * c.n;
    RT_TRY(before(q, &c, seqs, err));
    RT_TRY(rt_cuda_attn_bwd_main(q, &c, err));
    RT_TRY(after(q, &c, seqs, err));
out:
    return st;
}

bool fits(const struct rt_dev *dev, const struct rt_attn_bwd_args *a)
{
    const int d = a->s.dqk > a->s.dv ? a->s.dqk : a->s.dv;
    return dev->encode_map != NULL && d <= 128 && aligned16(a->q, a->q_ld, a->q_head, a->s.dqk) && aligned16(a->k, a->k_ld, a->k_head, a->s.dqk) &&
           aligned16(a->v, a->v_ld, a->v_head, a->s.dv) && aligned16(a->dout, 0, 0, a->s.dv) && aligned16(a->o, 0, 0, a->s.dv) &&
           aligned16(a->dq, 0, 0, 8) && aligned16(a->dk, 0, 0, 8) && aligned16(a->dv, 0, 0, 8);
}

}

enum rt_status rt_cuda_attn_bwd_hopper(struct rt_queue *q, const struct rt_attn_bwd_args *a, bool *done, struct rt_err *err)
{
    const struct rt_attn_shape *s = &a->s;
    struct rt_attn_bwd_call c = {};
    struct rt_cuda_seqs seqs;
    int64_t n_tile;
    char *scratch = NULL;
    enum rt_status st = RT_OK;
    seqs.dev = NULL;
    *done = fits(q->dev, a);
    if (!*done)
        return RT_OK;
    RT_TRY(rt_cuda_seqs_make(q, s, ROWS, &seqs, &n_tile, err));
    c.n = s->n, c.n_tile = (int)n_tile, c.group = s->nh / s->nkv, c.dqk = s->dqk, c.dv = s->dv, c.D = s->dqk <= 64 && s->dv <= 64 ? 64 : 128;
    c.scale = s->scale, c.q_ld = a->q_ld, c.q_head = a->q_head, c.k_ld = a->k_ld, c.k_head = a->k_head, c.v_ld = a->v_ld, c.v_head = a->v_head;
    c.o_ld = (int64_t)s->nh * s->dv;
    c.nkv = key_heads(c, s->nkv, q->dev), c.nh = c.nkv * c.group;
    RT_TRY(rt_cuda_temp(q, carve(&c, NULL), &scratch, err));
    for (int from = 0; from < s->nkv; from += c.nkv) {
        if (from + c.nkv > s->nkv)
            c.nkv = s->nkv - from, c.nh = c.nkv * c.group;
        order_for(&c, s, q->dev);
        (void)carve(&c, scratch);
        RT_TRY(some_heads(q, a, c, from, &seqs, err));
    }
out:
    rt_cuda_temp_free(q, scratch);
    rt_cuda_temp_free(q, (void *)seqs.dev);
    return st;
}
