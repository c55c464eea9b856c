/* Absorbed latent attention with wgmma (compute capability 9.0), R 512 and dr 64.
 *
 * A block has one token and 64 of its heads; tiles of 64 cache rows arrive in two buffers. Two warpgroups: for the scores each takes 32 keys, for
 * the output each takes half of the latent for all heads, so that a tile is read from shared memory once for either. Only the maxima (float) and
 * the probabilities (BF16) pass between them. Everything that wgmma reads lies in columns of 64 elements: [rows][128 bytes], 16-byte piece c of row
 * r at c ^ (r % 8), which is the 128-byte swizzle; as operand of the scores a tile is read along its rows, as operand of the output across them.
 */
#include <math.h>

#include "core/cuda/mla_cached.h"
#include "core/cuda/mma.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum {
    THREADS = 256, HEADS = 64, KEYS = 64, R = 512, DR = 64, WIDTH = R + DR, PIECES = WIDTH / 8, COLUMN = 64 * 128 /* bytes */,
    TILE = WIDTH / 64 * COLUMN, P_AT = 3 * TILE, STAT_AT = P_AT + COLUMN, BYTES = STAT_AT + 2 * HEADS * 4 + 1024 /* to align */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Piece c of row r of a tile of 64 rows. */
__device__ __forceinline__ uint32_t at_piece(int r, int c)
{
    return (uint32_t)(c / 8 * COLUMN + r * 128 + (((c ^ r) & 7) << 4));
}

__device__ __forceinline__ void load_queries(const struct rt_cuda_mla &a, int64_t token, int head0, uint32_t to)
{
    for (int i = threadIdx.x; i < HEADS * PIECES; i += THREADS) {
        const int h = i / PIECES, c = i % PIECES;
        const bool valid = head0 + h < a.nh;
        const int64_t head = valid ? head0 + h : 0;
        const bf16 *from = c < R / 8 ? (const bf16 *)a.q_lat + (token * a.nh + head) * R + c * 8
                                     : (const bf16 *)a.q_pe + token * a.q_pe_ld + head * a.q_pe_head + (c * 8 - R);
        mma::copy16(to + at_piece(h, c), from, valid);
    }
}

/* 64 rows from `key` on; what lies behind `last` is read from there. */
__device__ __forceinline__ void load_keys(const bf16 *cache, int key, int last, uint32_t to)
{
#pragma unroll 6
    for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
        const int r = i / PIECES, c = i % PIECES;
        mma::copy16(to + at_piece(r, c), cache + (int64_t)min(key + r, last) * WIDTH + c * 8, true);
    }
}

/* What wgmma is told of an operand: where it lies, and the distances in bytes of its columns of 64 (lead; unused along rows) and of eight rows. */
__device__ __forceinline__ uint64_t operand(uint32_t at, int lead)
{
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)(lead >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
/* The sums are in their registers before the first product. */
template <int N>
__device__ __forceinline__ void products_begin(float (&sum)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(sum[i])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Sums may be read from here on. */
template <int N>
__device__ __forceinline__ void products_end(float (&sum)[N])
{
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(sum[i])::"memory");
}
/* What was written to shared memory becomes visible to wgmma. */
__device__ __forceinline__ void written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* s [64, 32] (+)= q k^T over 16 columns, both along their rows */
__device__ __forceinline__ void score_product(float (&s)[16], uint64_t q, uint64_t k, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, "
                 "p, 1, 1, 0, 0;\n}"
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]), "+f"(s[8]), "+f"(s[9]),
                   "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15])
                 : "l"(q), "l"(k), "r"(add));
}

#define F4(i) "+f"(o[i]), "+f"(o[i + 1]), "+f"(o[i + 2]), "+f"(o[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
/* o [64, 256] += p v over 16 keys: p along its rows, v across them */
__device__ __forceinline__ void output_product(float (&o)[128], uint64_t p, uint64_t v)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
                 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
                 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"
                 "%122,%123,%124,%125,%126,%127}, %128, %129, 1, 1, 1, 0, 1;"
                 : F16(0), F16(16), F16(32), F16(48), F16(64), F16(80), F16(96), F16(112) : "l"(p), "l"(v));
}

/* This thread's two rows (row, row + 8 of the block's 64 heads). */
struct softmax {
    float top[2], sum[2]; /* sum: of this thread's keys */
};

/* Scores to probabilities in shared memory, with the other warpgroup's maxima; o and sums by the factor that the new maximum asks for. */
__device__ __forceinline__ void probabilities(float (&s)[16], float (&o)[128], softmax &x, float *maxima, uint32_t p, int row, int group)
{
    const int t = threadIdx.x % 4;
    float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 16; i++)
        m[i / 2 % 2] = fmaxf(m[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        m[r] = fmaxf(m[r], __shfl_xor_sync(0xffffffffu, m[r], 1));
        m[r] = fmaxf(m[r], __shfl_xor_sync(0xffffffffu, m[r], 2));
        if (t == 0)
            maxima[group * HEADS + row + 8 * r] = m[r];
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float now = fmaxf(x.top[r], fmaxf(m[r], maxima[(group ^ 1) * HEADS + row + 8 * r]));
        factor[r] = exp2f(x.top[r] - now);
        x.top[r] = now;
        x.sum[r] *= factor[r];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float p0 = exp2f(s[4 * j + 2 * r] - now), p1 = exp2f(s[4 * j + 2 * r + 1] - now);
            x.sum[r] += p0 + p1;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(p + at_piece(row + 8 * r, group * 4 + j) + t * 4), "r"(mma::pack_bf16(p0, p1)) : "memory");
        }
    }
#pragma unroll
    for (int i = 0; i < 128; i++)
        o[i] *= factor[i / 2 % 2];
}

/* The rows' sums over both warpgroups, then o / sum to where it belongs. */
__device__ __forceinline__ void write(const struct rt_cuda_mla &a, const float (&o)[128], softmax &x, float *sums, int64_t token, int head0, int split,
                                      int row, int group, bool cut)
{
    const int t = threadIdx.x % 4;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        x.sum[r] += __shfl_xor_sync(0xffffffffu, x.sum[r], 1);
        x.sum[r] += __shfl_xor_sync(0xffffffffu, x.sum[r], 2);
        if (t == 0)
            sums[group * HEADS + row + 8 * r] = x.sum[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int h = head0 + row + 8 * r;
        const float total = sums[row + 8 * r] + sums[HEADS + row + 8 * r], inverse = 1.0f / total;
        if (h >= a.nh)
            continue;
        const int64_t line = cut ? (token * a.parts.splits + split) * a.nh + h : token * a.nh + h, at = line * R + group * (R / 2) + t * 2;
        if (cut && group == 0 && t == 0)
            a.parts.lse[line] = x.top[r] + log2f(total);
#pragma unroll
        for (int j = 0; j < 32; j++) {
            const float u = o[4 * j + 2 * r] * inverse, v = o[4 * j + 2 * r + 1] * inverse;
            if (cut)
                *(float2 *)(void *)(a.parts.o + at + j * 8) = make_float2(u, v);
            else
                *(uint32_t *)(void *)((bf16 *)a.o + at + j * 8) = mma::pack_bf16(u, v);
        }
    }
}

/* One part of a token's keys: key0 .. last. */
__device__ __forceinline__ void part(const struct rt_cuda_mla &a, uint32_t base, float *stat, const bf16 *cache, int key0, int last, int64_t token,
                                     int head0, int split, bool cut)
{
    const int steps = (last - key0) / KEYS + 1;
    const int group = threadIdx.x / 128, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    float o[128] = {};
    softmax x = {{-INFINITY, -INFINITY}, {0, 0}};
    load_keys(cache, key0, last, base + TILE);
    mma::copies_commit();
    for (int i = 0; i < steps; i++) {
        const uint32_t tile = base + TILE + (i & 1) * TILE;
        float s[16] = {};
        mma::copies_wait<0>();
        written();
        __syncthreads(); /* the tile is here, and nobody reads the other one or the probabilities any more */
        products_begin(s);
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++)
            score_product(s, operand(base + k / 4 * COLUMN + k % 4 * 32, 16), operand(tile + group * 4096 + k / 4 * COLUMN + k % 4 * 32, 16), k > 0);
        products_commit();
        if (i + 1 < steps)
            load_keys(cache, key0 + (i + 1) * KEYS, last, base + TILE + (~i & 1) * TILE);
        mma::copies_commit();
        products_end(s);
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const int key = key0 + i * KEYS + group * 32 + j / 4 * 8 + threadIdx.x % 4 * 2 + j % 2;
            s[j] = key <= last ? s[j] * a.scale : -INFINITY;
        }
        probabilities(s, o, x, stat, base + P_AT, row, group);
        written();
        __syncthreads();
        products_begin(o);
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
            output_product(o, operand(base + P_AT + k * 32, 16), operand(tile + group * 4 * COLUMN + k * 2048, COLUMN));
        products_commit();
        products_end(o);
    }
    write(a, o, x, stat, token, head0, split, row, group, cut);
    __syncthreads();
}

#endif

/* grid: tokens * tiles of 64 heads, blocks that take the parts in turn */
__global__ void __launch_bounds__(THREADS, 1) mla_sm90_kernel(const __grid_constant__ struct rt_cuda_mla a)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    enum { SPLIT = RT_CUDA_MLA_SPLIT };
    extern __shared__ uint8_t raw[];
    const uint32_t base = (mma::shared_at(raw) + 1023) & ~1023u;
    float *stat = (float *)(void *)(raw + (base - mma::shared_at(raw)) + STAT_AT);
    const int64_t token = blockIdx.x / a.head_tiles;
    const int head0 = blockIdx.x % a.head_tiles * HEADS, pos = a.pos[token];
    const bf16 *cache = (const bf16 *)a.cache + a.slot[token] * a.capacity * WIDTH;
    if ((int)blockIdx.y * SPLIT > pos)
        return;
    load_queries(a, token, head0, base);
    for (int split = blockIdx.y; split * SPLIT <= pos; split += gridDim.y)
        part(a, base, stat, cache, split * SPLIT, min(pos, split * SPLIT + SPLIT - 1), token, head0, split, pos >= SPLIT);
#endif
}

}

bool rt_cuda_mla_sm90_takes(const struct rt_dev *dev, int R_, int dr)
{
    return dev->cc == 90 && R_ == R && dr == DR;
}

enum rt_status rt_cuda_mla_sm90(struct rt_queue *q, const struct rt_cuda_mla *a, struct rt_err *err)
{
    const int64_t blocks = a->n * a->head_tiles;
    enum rt_status st;
    RT_CUDA_TRY(cudaFuncSetAttribute(mla_sm90_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    mla_sm90_kernel<<<dim3((unsigned)blocks, (unsigned)rt_cuda_cached_blocks(q->dev, &a->parts, blocks, 4)), THREADS, BYTES, q->stream>>>(*a);
    st = rt_cuda_launched("latent attention over a cache", err);
out:
    return st;
}
