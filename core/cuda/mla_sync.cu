/* Absorbed latent attention with mma.sync.
 *
 * A block has one token and 64 of its heads, which share every key: tiles of KEYS cache rows arrive in two buffers. Eight warps: for the scores they
 * divide heads by keys, for the output two halves of the heads by four quarters of the latent, whose sums stay in registers. Between the two lie, in
 * shared memory, each tile's maxima and the probabilities (BF16). Work: 2 * 64 * keys * (2 R + dr) a block; bytes: keys * (R + dr) * 2, which
 * the blocks of a token's other heads find in the L2 cache.
 */
#include <math.h>

#include "core/cuda/mla_cached.h"
#include "core/cuda/mma.cuh"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum { THREADS = 256, HEADS = 64 };

/* Rows of W elements: where W / 8 pieces divide by 8 they are permuted within each 8, else rows are a piece longer; either way eight rows of one
 * column lie in eight different places of 128 bytes. */
template <int W>
struct rows {
    enum { pieces = W / 8, permuted = pieces % 8 == 0, bytes = W * 2 + (permuted ? 0 : 16) };
    static __device__ __forceinline__ uint32_t at(int r, int c)
    {
        return (uint32_t)(r * bytes + ((permuted ? c ^ (r & 7) : c) << 4));
    }
};

template <int R, int DR, int KEYS>
struct shape {
    enum {
        width = R + DR, key_warps = KEYS / 16, head_warps = 8 / key_warps, m_tiles = HEADS / head_warps / 16,
        q_bytes = HEADS * rows<width>::bytes, k_bytes = KEYS * rows<width>::bytes, p_bytes = HEADS * rows<KEYS>::bytes,
        k_at = q_bytes, p_at = k_at + 2 * k_bytes, max_at = p_at + p_bytes, stat_at = max_at + key_warps * HEADS * 4,
        total = stat_at + 4 * HEADS * 4
    };
};

/* The block's statistics in shared memory. */
struct stats {
    float *tile_max;  /* [key_warps][HEADS] */
    float *top;       /* [2][HEADS] running maximum, before and after a tile in turn */
    float *factor;    /* what the tile makes of earlier sums */
    float *sum;
};

template <int R, int DR>
__device__ __forceinline__ void load_queries(const struct rt_cuda_mla &a, int64_t token, int head0, uint32_t to)
{
    typedef rows<R + DR> Q;
    for (int i = threadIdx.x; i < HEADS * Q::pieces; i += THREADS) {
        const int h = i / Q::pieces, c = i % Q::pieces;
        const bool valid = head0 + h < a.nh;
        const int64_t head = valid ? head0 + h : 0;
        const bf16 *from = c < R / 8 ? (const bf16 *)a.q_lat + (token * a.nh + head) * R + c * 8
                                     : (const bf16 *)a.q_pe + token * a.q_pe_ld + head * a.q_pe_head + (c * 8 - R);
        mma::copy16(to + Q::at(h, c), from, valid);
    }
}

/* KEYS rows from `key` on; what lies behind `last` is read from there. */
template <int W, int KEYS>
__device__ __forceinline__ void load_keys(const bf16 *cache, int key, int last, uint32_t to)
{
    typedef rows<W> K;
#pragma unroll 6
    for (int i = threadIdx.x; i < KEYS * K::pieces; i += THREADS) {
        const int r = i / K::pieces, c = i % K::pieces;
        mma::copy16(to + K::at(r, c), cache + (int64_t)min(key + r, last) * W + c * 8, true);
    }
}

/* s = scaled scores of this warp's heads and 16 keys of a tile; keys behind `last` -inf. */
template <int R, int DR, int KEYS>
__device__ __forceinline__ void scores(float (&s)[shape<R, DR, KEYS>::m_tiles][2][4], uint32_t q, uint32_t k, int head_row, int key_row, int key,
                                       int last, float scale)
{
    typedef shape<R, DR, KEYS> S;
    typedef rows<S::width> Q;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            s[m][i / 4][i % 4] = 0;
#pragma unroll 4
    for (int c = 0; c < Q::pieces; c += 2) {
        uint32_t b[4];
        mma::ldsm(b, k + Q::at(key_row + (lane & 7) + (lane >> 4) * 8, c + (lane >> 3 & 1)));
#pragma unroll
        for (int m = 0; m < S::m_tiles; m++) {
            uint32_t x[4];
            mma::ldsm(x, q + Q::at(head_row + 16 * m + (lane & 15), c + (lane >> 4)));
            mma::bf16(s[m][0], x[0], x[1], x[2], x[3], b[0], b[1]);
            mma::bf16(s[m][1], x[0], x[1], x[2], x[3], b[2], b[3]);
        }
    }
#pragma unroll
    for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[m][j][i] = key + key_row + 8 * j + lane % 4 * 2 + (i & 1) <= last ? s[m][j][i] * scale : -INFINITY;
}

/* Maxima of this warp's rows over its 16 keys. */
template <int M>
__device__ __forceinline__ void row_maxima(const float (&s)[M][2][4], float *tile_max, int head_row)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float x = fmaxf(fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]), fmaxf(s[m][1][2 * r], s[m][1][2 * r + 1]));
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
            if (lane % 4 == 0)
                tile_max[head_row + 16 * m + 8 * r + lane / 4] = x;
        }
}

/* Probabilities of the tile to shared memory; sum += this lane's. The warps of the first keys write the new maxima and factors. */
template <int KEYS, int M>
__device__ __forceinline__ void probabilities(float (&s)[M][2][4], float (&sum)[M][2], const stats &t, int step, uint32_t p, int head_row, int key_row)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int h = head_row + 16 * m + 8 * r + lane / 4;
            const float before = t.top[(step & 1) * HEADS + h];
            float now = before;
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++)
                now = fmaxf(now, t.tile_max[j * HEADS + h]);
            const float factor = exp2f(before - now);
            if (key_row == 0 && lane % 4 == 0) {
                t.top[(~step & 1) * HEADS + h] = now;
                t.factor[h] = factor;
            }
            sum[m][r] *= factor;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float p0 = exp2f(s[m][j][2 * r] - now), p1 = exp2f(s[m][j][2 * r + 1] - now);
                sum[m][r] += p0 + p1;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(p + rows<KEYS>::at(h, key_row / 8 + j) + lane % 4 * 4), "r"(mma::pack_bf16(p0, p1))
                             : "memory");
            }
        }
}

/* o = o * factor + P V for 32 heads and a quarter of the latent. */
template <int R, int W, int KEYS>
__device__ __forceinline__ void output(float (&o)[2][R / 32][4], const float *factor, uint32_t p, uint32_t k, int head_row, int column)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const float f0 = factor[head_row + 16 * m + lane / 4], f1 = factor[head_row + 16 * m + 8 + lane / 4];
#pragma unroll
        for (int j = 0; j < R / 32; j++) {
            o[m][j][0] *= f0, o[m][j][1] *= f0;
            o[m][j][2] *= f1, o[m][j][3] *= f1;
        }
    }
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        uint32_t x[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
            mma::ldsm(x[m], p + rows<KEYS>::at(head_row + 16 * m + (lane & 15), i * 2 + (lane >> 4)));
#pragma unroll
        for (int j = 0; j < R / 64; j++) {
            uint32_t b[4];
            mma::ldsm_t(b, k + rows<W>::at(i * 16 + (lane & 15), column / 8 + j * 2 + (lane >> 4)));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma::bf16(o[m][2 * j], x[m][0], x[m][1], x[m][2], x[m][3], b[0], b[1]);
                mma::bf16(o[m][2 * j + 1], x[m][0], x[m][1], x[m][2], x[m][3], b[2], b[3]);
            }
        }
    }
}

/* The rows' sums of all lanes and warps, to t.sum. tile_max serves as their scratch. */
template <int KEYS, int M>
__device__ __forceinline__ void row_sums(float (&sum)[M][2], const stats &t, int head_row, int key_warp)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[m][r] += __shfl_xor_sync(0xffffffffu, sum[m][r], 1);
            sum[m][r] += __shfl_xor_sync(0xffffffffu, sum[m][r], 2);
            if (lane % 4 == 0)
                t.tile_max[key_warp * HEADS + head_row + 16 * m + 8 * r + lane / 4] = sum[m][r];
        }
    __syncthreads();
    if (threadIdx.x < HEADS) {
        float x = 0;
        for (int j = 0; j < KEYS / 16; j++)
            x += t.tile_max[j * HEADS + threadIdx.x];
        t.sum[threadIdx.x] = x;
    }
    __syncthreads();
}

/* o / sum where the token has one part, else to its parts. */
template <int R>
__device__ __forceinline__ void write(const struct rt_cuda_mla &a, const float (&o)[2][R / 32][4], const stats &t, const float *top, int64_t token,
                                      int head0, int split, int head_row, int column, bool cut)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int local = head_row + 16 * m + 8 * r + lane / 4, h = head0 + local;
            if (h >= a.nh)
                continue;
            const float total = t.sum[local], inverse = 1.0f / total;
            const int64_t row = cut ? (token * a.parts.splits + split) * a.nh + h : token * a.nh + h;
            const int64_t at = row * R + column + lane % 4 * 2;
            if (cut && column == 0 && lane % 4 == 0)
                a.parts.lse[row] = top[local] + log2f(total);
#pragma unroll
            for (int j = 0; j < R / 32; j++) {
                const float x = o[m][j][2 * r] * inverse, y = o[m][j][2 * r + 1] * inverse;
                if (cut)
                    *(float2 *)(void *)(a.parts.o + at + j * 8) = make_float2(x, y);
                else
                    *(uint32_t *)(void *)((bf16 *)a.o + at + j * 8) = mma::pack_bf16(x, y);
            }
        }
}

/* One part of a token's keys: key0 .. last. */
template <int R, int DR, int KEYS>
__device__ __forceinline__ void part(const struct rt_cuda_mla &a, const stats &t, uint32_t q, const bf16 *cache, int key0, int last, int64_t token,
                                     int head0, int split, bool cut)
{
    typedef shape<R, DR, KEYS> S;
    const int steps = (last - key0) / KEYS + 1, warp = threadIdx.x / 32;
    const int key_warp = warp % S::key_warps, head_row = warp / S::key_warps * (S::m_tiles * 16);
    const uint32_t k = q + S::k_at, p = q + S::p_at;
    float o[2][R / 32][4] = {}, sum[S::m_tiles][2] = {};
    load_keys<S::width, KEYS>(cache, key0, last, k);
    mma::copies_commit();
    if (threadIdx.x < HEADS)
        t.top[threadIdx.x] = -INFINITY;
    for (int i = 0; i < steps; i++) {
        const uint32_t tile = k + (i & 1) * S::k_bytes;
        float s[S::m_tiles][2][4];
        mma::copies_wait<0>();
        __syncthreads(); /* the tile is here, and nobody reads the other one or the probabilities any more */
        if (i + 1 < steps)
            load_keys<S::width, KEYS>(cache, key0 + (i + 1) * KEYS, last, k + (~i & 1) * S::k_bytes);
        mma::copies_commit();
        scores<R, DR, KEYS>(s, q, tile, head_row, key_warp * 16, key0 + i * KEYS, last, a.scale);
        row_maxima<S::m_tiles>(s, t.tile_max + key_warp * HEADS, head_row);
        __syncthreads();
        probabilities<KEYS, S::m_tiles>(s, sum, t, i, p, head_row, key_warp * 16);
        __syncthreads();
        output<R, S::width, KEYS>(o, t.factor, p, tile, warp / 4 * 32, warp % 4 * (R / 4));
    }
    row_sums<KEYS, S::m_tiles>(sum, t, head_row, key_warp);
    write<R>(a, o, t, t.top + (steps & 1) * HEADS, token, head0, split, warp / 4 * 32, warp % 4 * (R / 4), cut);
    __syncthreads();
}

/* grid: tokens * tiles of 64 heads, blocks that take the parts in turn */
template <int R, int DR, int KEYS>
__global__ void __launch_bounds__(THREADS, 1) mla_kernel(const __grid_constant__ struct rt_cuda_mla a)
{
    typedef shape<R, DR, KEYS> S;
    enum { SPLIT = RT_CUDA_MLA_SPLIT };
    extern __shared__ __align__(128) uint8_t shared[];
    const int64_t token = blockIdx.x / a.head_tiles;
    const int head0 = blockIdx.x % a.head_tiles * HEADS, pos = a.pos[token];
    const bf16 *cache = (const bf16 *)a.cache + a.slot[token] * a.capacity * S::width;
    float *stat = (float *)(void *)(shared + S::stat_at);
    const stats t = {(float *)(void *)(shared + S::max_at), stat, stat + 2 * HEADS, stat + 3 * HEADS};
    if ((int)blockIdx.y * SPLIT > pos)
        return;
    load_queries<R, DR>(a, token, head0, mma::shared_at(shared));
    for (int split = blockIdx.y; split * SPLIT <= pos; split += gridDim.y)
        part<R, DR, KEYS>(a, t, mma::shared_at(shared), cache, split * SPLIT, min(pos, split * SPLIT + SPLIT - 1), token, head0, split, pos >= SPLIT);
}

template <int R, int DR, int KEYS>
enum rt_status start(struct rt_queue *q, const struct rt_cuda_mla *a, struct rt_err *err)
{
    enum { BYTES = shape<R, DR, KEYS>::total };
    const int64_t blocks = a->n * a->head_tiles;
    enum rt_status st;
    RT_CUDA_TRY(cudaFuncSetAttribute(mla_kernel<R, DR, KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    mla_kernel<R, DR, KEYS><<<dim3((unsigned)blocks, (unsigned)rt_cuda_cached_blocks(q->dev, &a->parts, blocks, 4)), THREADS, BYTES, q->stream>>>(*a);
    st = rt_cuda_launched("latent attention over a cache", err);
out:
    return st;
}

int shared_limit(const struct rt_dev *dev)
{
    int bytes = 0;
    return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, dev->index) == cudaSuccess ? bytes : 0;
}

}

bool rt_cuda_mla_sync_takes(const struct rt_dev *dev, int R, int dr)
{
    if (R == 512 && dr == 64)
        return shared_limit(dev) >= (int)shape<512, 64, 32>::total;
    return R == 128 && dr == 16 && shared_limit(dev) >= (int)shape<128, 16, 64>::total;
}

enum rt_status rt_cuda_mla_sync(struct rt_queue *q, const struct rt_cuda_mla *a, struct rt_err *err)
{
    if (a->R == 128)
        return start<128, 16, 64>(q, a, err);
    return shared_limit(q->dev) >= (int)shape<512, 64, 64>::total ? start<512, 64, 64>(q, a, err) : start<512, 64, 32>(q, a, err);
}
