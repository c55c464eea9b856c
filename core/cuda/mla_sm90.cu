/* Absorbed latent attention with wgmma (compute capability 9.0), R 512 and dr 64.
 *
 * A block has one token and 64 of its heads; tiles of 32 cache rows arrive in a ring of four. Two warpgroups hold one half each of the output of all
 * heads, in registers, and take the tiles' scores in turn: while one makes probabilities of tile i, the other multiplies the scores of tile i + 1,
 * then both add tile i to their output. A step is bound by shared memory, from which wgmma reads the queries again for each tile. Everything that
 * wgmma reads lies in columns of 64 elements: [rows][128 bytes], 16-byte piece c of row r at c ^ (r % 8), which is the 128-byte swizzle; a tile is
 * read along its rows for the scores, across them for the output.
 */
#include <math.h>

#include "core/cuda/mla_cached.h"
#include "core/cuda/mma.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum {
    THREADS = 256, HEADS = 64, KEYS = 32, RING = 4, R = 512, DR = 64, WIDTH = R + DR, PIECES = WIDTH / 8, Q_COLUMN = HEADS * 128 /* bytes */,
    K_COLUMN = KEYS * 128, TILE = WIDTH / 64 * K_COLUMN, K_AT = WIDTH / 64 * Q_COLUMN, P_AT = K_AT + RING * TILE, STAT_AT = P_AT + Q_COLUMN,
    BYTES = STAT_AT + 4 * HEADS * 4 + 1024 /* to align */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Piece c of row r, of columns of so many bytes. */
template <int COLUMN>
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
        mma::copy16(to + at_piece<Q_COLUMN>(h, c), from, valid);
    }
}

/* A tile from `key` on; what lies behind `last` is read from there. */
__device__ __forceinline__ void load_keys(const bf16 *cache, int key, int last, uint32_t to)
{
#pragma unroll 3
    for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
        const int r = i / PIECES, c = i % PIECES;
        mma::copy16(to + at_piece<K_COLUMN>(r, c), cache + (int64_t)min(key + r, last) * WIDTH + c * 8, true);
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

/* In shared memory, [HEADS] each. */
struct stats {
    float *top, *factor; /* the maximum in use, and what o was to be multiplied with when it became that */
    float *last, *sum;   /* at the end: each warpgroup's sum, and the maximum that it is of */
};

/* What a thread knows of its two rows, row and row + 8 of the block's 64 heads: the sum of its own keys, relative to the maximum `top`. */
struct softmax {
    float top[2], sum[2];
};

/* Results below 2^-126 are 0. */
__device__ __forceinline__ float power_of_2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Scores to probabilities in shared memory. A maximum stays in use until one that is 2^SLACK times as large comes: both make the same quotient in
 * the end, and o is rarely multiplied. */
__device__ __forceinline__ void probabilities(float (&s)[16], softmax &x, const stats &t, uint32_t p, int row)
{
    enum { SLACK = 8 };
    const int lane = threadIdx.x % 4;
    float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 16; i++)
        m[i / 2 % 2] = fmaxf(m[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float before = t.top[row + 8 * r];
        m[r] = fmaxf(m[r], __shfl_xor_sync(0xffffffffu, m[r], 1));
        m[r] = fmaxf(m[r], __shfl_xor_sync(0xffffffffu, m[r], 2));
        const float now = m[r] > before + SLACK ? m[r] : before;
        __syncwarp(); /* all have read the maximum */
        if (lane == 0) {
            t.top[row + 8 * r] = now;
            t.factor[row + 8 * r] = power_of_2(before - now);
        }
        x.sum[r] *= power_of_2(x.top[r] - now);
        x.top[r] = now;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float p0 = power_of_2(s[4 * j + 2 * r] - now), p1 = power_of_2(s[4 * j + 2 * r + 1] - now);
            x.sum[r] += p0 + p1;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(p + at_piece<Q_COLUMN>(row + 8 * r, j) + lane * 4), "r"(mma::pack_bf16(p0, p1)) : "memory");
        }
    }
}

__device__ __forceinline__ void rescale(float (&o)[128], const stats &t, int row)
{
    const float factor[2] = {t.factor[row], t.factor[row + 8]};
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < 128; i++)
            o[i] *= factor[i / 2 % 2];
    }
}

/* The rows' sums over both warpgroups, then o / sum to where it belongs. */
__device__ __forceinline__ void write(const struct rt_cuda_mla &a, const float (&o)[128], softmax &x, const stats &t, int64_t token, int head0,
                                      int split, int row, int group, bool cut)
{
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        x.sum[r] *= x.sum[r] > 0 ? power_of_2(x.top[r] - t.top[row + 8 * r]) : 1.0f; /* a warpgroup without a tile: 0 */
        x.sum[r] += __shfl_xor_sync(0xffffffffu, x.sum[r], 1);
        x.sum[r] += __shfl_xor_sync(0xffffffffu, x.sum[r], 2);
        if (lane == 0)
            (group == 0 ? t.last : t.sum)[row + 8 * r] = x.sum[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int h = head0 + row + 8 * r;
        const float total = t.last[row + 8 * r] + t.sum[row + 8 * r], inverse = 1.0f / total;
        if (h >= a.nh)
            continue;
        const int64_t line = cut ? (token * a.parts.splits + split) * a.nh + h : token * a.nh + h, at = line * R + group * (R / 2) + lane * 2;
        if (cut && group == 0 && lane == 0)
            a.parts.lse[line] = t.top[row + 8 * r] + log2f(total);
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

/* s = q k^T of a tile; begun, not awaited. */
__device__ __forceinline__ void scores(float (&s)[16], uint32_t q, uint32_t tile)
{
    products_begin(s);
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++)
        score_product(s, operand(q + k / 4 * Q_COLUMN + k % 4 * 32, 16), operand(tile + k / 4 * K_COLUMN + k % 4 * 32, 16), k > 0);
    products_commit();
}

/* Where a part of a token's keys is: key0 .. last, in `steps` tiles. */
struct keys {
    const bf16 *cache;
    int key0, last, steps;
    uint32_t queries, ring, p;
};

__device__ __forceinline__ void load_tile(const keys &k, int i)
{
    if (i < k.steps)
        load_keys(k.cache, k.key0 + i * KEYS, k.last, k.ring + i % RING * TILE);
    mma::copies_commit();
}

/* Tile i + 1 is here, and nobody reads tile i - 1 or its probabilities any more. */
__device__ __forceinline__ void next_step()
{
    mma::copies_wait<RING - 3>();
    written();
    __syncthreads();
}

/* o += probabilities of tile i times this warpgroup's half of the latent. */
__device__ __forceinline__ void add_tile(float (&o)[128], const keys &k, const stats &t, int i, int row, int group)
{
    rescale(o, t, row);
    products_begin(o);
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++)
        output_product(o, operand(k.p + j * 32, 16), operand(k.ring + i % RING * TILE + group * 4 * K_COLUMN + j * 2048, K_COLUMN));
    products_commit();
    products_end(o);
}

/* Step i of the warpgroup that has its scores. */
__device__ __forceinline__ void step_own(float (&o)[128], float (&s)[16], softmax &x, const keys &k, const stats &t, float scale, int i, int row,
                                         int group)
{
    next_step();
    load_tile(k, i + RING - 1);
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const int key = k.key0 + i * KEYS + j / 4 * 8 + threadIdx.x % 4 * 2 + j % 2;
        s[j] = key <= k.last ? s[j] * scale : -INFINITY;
    }
    probabilities(s, x, t, k.p, row);
    written();
    __syncthreads();
    add_tile(o, k, t, i, row, group);
}

/* Step i of the other one, which meanwhile makes the scores of tile i + 1; behind the last tile they are of whatever lies there, and not used. */
__device__ __forceinline__ void step_other(float (&o)[128], float (&s)[16], const keys &k, const stats &t, int i, int row, int group)
{
    next_step();
    scores(s, k.queries, k.ring + (i + 1) % RING * TILE);
    load_tile(k, i + RING - 1);
    __syncthreads();
    products_end(s);
    add_tile(o, k, t, i, row, group);
}

/* One part of a token's keys, by warpgroup GROUP, which has the scores of every other tile. */
template <int GROUP>
__device__ __forceinline__ void part(const struct rt_cuda_mla &a, const keys &k, const stats &t, int64_t token, int head0, int split, bool cut)
{
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    float o[128] = {}, s[16] = {};
    softmax x = {{-INFINITY, -INFINITY}, {0, 0}};
    if (GROUP == 0 && threadIdx.x < HEADS)
        t.top[threadIdx.x] = -INFINITY;
    for (int i = 0; i < RING - 1; i++)
        load_tile(k, i);
    mma::copies_wait<RING - 2>();
    written();
    __syncthreads();
    if (GROUP == 0) {
        scores(s, k.queries, k.ring);
        products_end(s);
    }
    for (int i = 0; i < k.steps; i += 2) {
        if (GROUP == 0)
            step_own(o, s, x, k, t, a.scale, i, row, GROUP);
        else
            step_other(o, s, k, t, i, row, GROUP);
        if (i + 1 == k.steps)
            break;
        if (GROUP == 0)
            step_other(o, s, k, t, i + 1, row, GROUP);
        else
            step_own(o, s, x, k, t, a.scale, i + 1, row, GROUP);
    }
    mma::copies_wait<0>();
    write(a, o, x, t, token, head0, split, row, GROUP, cut);
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
    const stats t = {stat, stat + HEADS, stat + 2 * HEADS, stat + 3 * HEADS};
    const int64_t token = blockIdx.x / a.head_tiles;
    const int head0 = blockIdx.x % a.head_tiles * HEADS, pos = a.pos[token];
    const bf16 *cache = (const bf16 *)a.cache + a.slot[token] * a.capacity * WIDTH;
    if ((int)blockIdx.y * SPLIT > pos)
        return;
    load_queries(a, token, head0, base);
    for (int split = blockIdx.y; split * SPLIT <= pos; split += gridDim.y) {
        const int last = min(pos, split * SPLIT + SPLIT - 1);
        const keys k = {cache, split * SPLIT, last, (last - split * SPLIT) / KEYS + 1, base, base + K_AT, base + P_AT};
        if (threadIdx.x < 128)
            part<0>(a, k, t, token, head0, split, pos >= SPLIT);
        else
            part<1>(a, k, t, token, head0, split, pos >= SPLIT);
    }
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
