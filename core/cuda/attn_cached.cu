/* Grouped-head attention over the caches of generation.
 *
 * A block has one token, one key head and up to 16 of its query heads: the 16 rows of a tensor core's tile, so that every key and value is read
 * once. Its four warps take 16 keys in turn and never wait for each other: each has stages of its own, a running maximum, a sum and an output; the
 * four are merged at the end. Keys are cut every SPLIT; bytes a block moves: SPLIT * d * 4. The block that is the last to have done its parts of a token and
 * key head merges them.
 */
#include <math.h>

#include "core/cuda/cached.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum { SPLIT = 512, WARPS = 4, THREADS = 32 * WARPS, KEYS = 16, STAGES = 3, MERGED_HERE = 256 /* parts: 16 shares of each lie over the stages */ };

struct work {
    const bf16 *q, *k, *v;
    bf16 *o;
    const int32_t *slot, *pos;
    struct rt_cache_pages pages;
    int64_t q_ld, capacity, width;
    int nh, nkv, heads, head_tiles; /* heads: query heads of a key head */
    float scale;                    /* times log2 e */
    struct rt_cached_parts parts;
    int32_t *tickets;               /* [tokens * key heads * head_tiles] parts that are done, 0 between calls; NULL: merged by a kernel of its own */
};

/* Piece c (16 bytes) of row r of a tile of D elements a row: eight rows of one column lie in eight different places of 128 bytes. */
template <int D>
__device__ __forceinline__ uint32_t at_piece(int r, int c)
{
    return (uint32_t)(r * D * 2 + ((c ^ (r & 7)) << 4));
}

/* Where the keys of a part lie: without pages from one row on; else lane i of a warp holds the row of its i-th run of RUN keys, which lie together. */
enum { RUN = 64 /* divides the length of pages and SPLIT */ };
struct part_rows {
    int64_t row0;
    int32_t run; /* in units of RUN rows */
};
static_assert(SPLIT / RUN <= 32 && RUN % KEYS == 0, "a lane for each run of a part");

__device__ __forceinline__ struct part_rows find_rows(const work &w, int64_t slot, int key0, int last, int lane)
{
    struct part_rows r = {slot * w.capacity + key0, 0};
    const int key = key0 + lane * RUN;
    if (w.pages.table != NULL && key <= last)
        r.run = w.pages.table[slot * (w.capacity / w.pages.len) + key / w.pages.len] * (w.pages.len / RUN) + key % w.pages.len / RUN;
    return r;
}

/* Row of key key0 + at, at a multiple of 16; for all lanes of a warp. */
__device__ __forceinline__ int64_t row_of(const work &w, const struct part_rows &r, int at)
{
    if (w.pages.table == NULL)
        return r.row0 + at;
    return (int64_t)__shfl_sync(0xffffffffu, r.run, at / RUN) * RUN + at % RUN;
}

/* 16 keys and values from row `row` on, `count` of which are wanted: in place of the others the last of these. */
template <int D>
__device__ __forceinline__ void load_keys(const work &w, const bf16 *k, const bf16 *v, int64_t row, int count, uint32_t to, int lane)
{
    enum { PIECES = D / 8, ROWS = 32 / PIECES };
    const int c = lane % PIECES;
#pragma unroll
    for (int i = 0; i < KEYS / ROWS; i++) {
        const int r = i * ROWS + lane / PIECES;
        const int64_t from = (row + min(r, count - 1)) * w.width + c * 8;
        mma::copy16(to + at_piece<D>(r, c), k + from, true);
        mma::copy16(to + KEYS * D * 2 + at_piece<D>(r, c), v + from, true);
    }
}

/* The fragments of 16 queries; those of heads that do not exist are 0. */
template <int D>
__device__ __forceinline__ void load_queries(uint32_t (&q)[D / 16][4], const bf16 *from, int heads, int lane)
{
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int h = g + (j & 1) * 8, c = i * 16 + t * 2 + (j >> 1) * 8;
            q[i][j] = h < heads ? *(const uint32_t *)(const void *)(from + h * D + c) : 0u;
        }
}

/* s = scaled scores of 16 heads with 16 keys; keys behind `last` -inf. */
template <int D>
__device__ __forceinline__ void scores(float (&s)[2][4], const uint32_t (&q)[D / 16][4], uint32_t k, int key, int last, float scale, int lane)
{
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[j][i] = 0;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t b[4];
        mma::ldsm(b, k + at_piece<D>((lane & 7) + (lane >> 4) * 8, i * 2 + (lane >> 3 & 1)));
        mma::bf16(s[0], q[i][0], q[i][1], q[i][2], q[i][3], b[0], b[1]);
        mma::bf16(s[1], q[i][0], q[i][1], q[i][2], q[i][3], b[2], b[3]);
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[j][i] = key + 8 * j + lane % 4 * 2 + (i & 1) <= last ? s[j][i] * scale : -INFINITY;
}

/* One step of a warp: 16 keys. top and sum: of rows g and g + 8 (sum: of this lane's keys). */
template <int D>
__device__ __forceinline__ void step(float (&o)[D / 8][4], float (&top)[2], float (&sum)[2], float (&s)[2][4], uint32_t v, int lane)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float m = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(top[r], fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2)));
        const float factor = exp2f(top[r] - m);
        top[r] = m;
        sum[r] *= factor;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                sum[r] += s[j][2 * r + i] = exp2f(s[j][2 * r + i] - m);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            o[j][2 * r] *= factor;
            o[j][2 * r + 1] *= factor;
        }
    }
    const uint32_t a0 = mma::pack_bf16(s[0][0], s[0][1]), a1 = mma::pack_bf16(s[0][2], s[0][3]), a2 = mma::pack_bf16(s[1][0], s[1][1]),
                   a3 = mma::pack_bf16(s[1][2], s[1][3]);
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
        uint32_t b[4];
        mma::ldsm_t(b, v + at_piece<D>(lane & 15, j * 2 + (lane >> 4)));
        mma::bf16(o[2 * j], a0, a1, a2, a3, b[0], b[1]);
        mma::bf16(o[2 * j + 1], a0, a1, a2, a3, b[2], b[3]);
    }
}

/* The warps' results in ascending order. shared: [WARPS][16][D + 4] sums, then [WARPS][16] maxima and sums. */
template <int D>
__device__ void merge_warps(const work &w, const float (&o)[D / 8][4], const float (&top)[2], float (&sum)[2], float *shared, int64_t token,
                            int split, int head0, int heads, bool cut)
{
    enum { LD = D + 4 };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float *tops = shared + WARPS * 16 * LD, *sums = tops + WARPS * 16;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        if (t == 0) {
            tops[warp * 16 + g + 8 * r] = top[r];
            sums[warp * 16 + g + 8 * r] = sum[r];
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *(float2 *)(void *)(shared + (warp * 16 + g + 8 * r) * LD + j * 8 + t * 2) = make_float2(o[j][2 * r], o[j][2 * r + 1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * D; i += THREADS) {
        const int h = i / D, d = i % D;
        float m = -INFINITY, total = 0, value = 0;
        for (int j = 0; j < WARPS; j++)
            m = fmaxf(m, tops[j * 16 + h]);
        for (int j = 0; j < WARPS; j++) {
            const float factor = exp2f(tops[j * 16 + h] - m);
            total += factor * sums[j * 16 + h];
            value += factor * shared[(j * 16 + h) * LD + d];
        }
        if (cut) {
            const int64_t row = (token * w.parts.splits + split) * w.nh + head0 + h;
            w.parts.o[row * D + d] = value / total;
            if (d == 0)
                w.parts.lse[row] = m + log2f(total);
        } else {
            w.o[(token * w.nh + head0 + h) * D + d] = __float2bfloat16_rn(value / total);
        }
    }
}

/* One part of a token's keys: key0 .. last. head: the first element of the key head in a row. */
template <int D>
__device__ __forceinline__ void part(const work &w, const struct part_rows &rows, const uint32_t (&q)[D / 16][4], int head, int key0, int last, uint32_t mine,
                                     float (&o)[D / 8][4], float (&top)[2], float (&sum)[2])
{
    enum { STAGE = 2 * KEYS * D * 2 };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = (last - key0) / KEYS + 1;
    const bf16 *k = w.k + head, *v = w.v + head;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        const int at = (warp + i * WARPS) * KEYS;
        if (warp + i * WARPS < steps)
            load_keys<D>(w, k, v, row_of(w, rows, at), last - key0 - at + 1, mine + i * STAGE, lane);
        mma::copies_commit();
    }
    int at = 0;
    for (int i = warp; i < steps; i += WARPS) {
        const int next = i + (STAGES - 1) * WARPS, to = at == 0 ? STAGES - 1 : at - 1;
        float s[2][4];
        __syncwarp();
        if (next < steps)
            load_keys<D>(w, k, v, row_of(w, rows, next * KEYS), last - key0 - next * KEYS + 1, mine + to * STAGE, lane);
        mma::copies_commit();
        mma::copies_wait<STAGES - 1>();
        __syncwarp();
        scores<D>(s, q, mine + at * STAGE, key0 + i * KEYS, last, w.scale, lane);
        step<D>(o, top, sum, s, mine + at * STAGE + KEYS * D * 2, lane);
        at = at + 1 == STAGES ? 0 : at + 1;
    }
    mma::copies_wait<0>();
    __syncthreads();
}

/* Whether this block, which has done `mine` parts, is the last of those that share a token's keys: all parts are visible then. */
__device__ __forceinline__ bool is_last(int32_t *ticket, int mine, int parts)
{
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, mine) + mine == parts;
        if (last)
            *ticket = 0;
    }
    __syncthreads();
    if (last)
        __threadfence();
    return last;
}

/* o of some heads from their parts, in ascending order, whichever block does it. shared: [heads][parts] shares. */
template <int D>
__device__ void merge_parts(const work &w, float *shared, int64_t token, int head0, int heads, int parts)
{
    enum { AHEAD = 4 };
    const int64_t row = token * w.parts.splits * w.nh + head0;
    for (int i = threadIdx.x; i < heads * parts; i += THREADS)
        shared[i] = __ldcg(w.parts.lse + row + (int64_t)(i % parts) * w.nh + i / parts);
    __syncthreads();
    for (int h = threadIdx.x; h < heads; h += THREADS) {
        float top = -INFINITY, total = 0;
        for (int s = 0; s < parts; s++)
            top = fmaxf(top, shared[h * parts + s]);
        for (int s = 0; s < parts; s++)
            total += shared[h * parts + s] = exp2f(shared[h * parts + s] - top);
        for (int s = 0; s < parts; s++)
            shared[h * parts + s] /= total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * (D / 4); i += THREADS) {
        const int h = i / (D / 4), d = i % (D / 4) * 4;
        const float *from = w.parts.o + (row + h) * D + d;
        float4 sum = make_float4(0, 0, 0, 0), x[AHEAD];
        for (int s0 = 0; s0 < parts; s0 += AHEAD) {
#pragma unroll
            for (int s = 0; s < AHEAD; s++)
                if (s0 + s < parts)
                    x[s] = __ldcg((const float4 *)(const void *)(from + (int64_t)(s0 + s) * w.nh * D));
#pragma unroll
            for (int s = 0; s < AHEAD; s++)
                if (s0 + s < parts) {
                    const float share = shared[h * parts + s0 + s];
                    sum.x += share * x[s].x, sum.y += share * x[s].y, sum.z += share * x[s].z, sum.w += share * x[s].w;
                }
        }
        *(uint2 *)(void *)(w.o + (token * w.nh + head0 + h) * D + d) = make_uint2(mma::pack_bf16(sum.x, sum.y), mma::pack_bf16(sum.z, sum.w));
    }
}

/* grid: tokens * key heads * tiles of 16 query heads, blocks that take the parts in turn */
template <int D>
__global__ void __launch_bounds__(THREADS) attn_cached_kernel(const __grid_constant__ work w)
{
    extern __shared__ __align__(128) uint8_t shared[];
    const int64_t token = blockIdx.x / (w.nkv * w.head_tiles);
    const int which = blockIdx.x % (w.nkv * w.head_tiles), hk = which / w.head_tiles, first_head = which % w.head_tiles * 16;
    const int pos = w.pos[token], heads = min(w.heads - first_head, 16), head0 = hk * w.heads + first_head;
    const uint32_t mine = mma::shared_at(shared) + threadIdx.x / 32 * STAGES * 2 * KEYS * D * 2;
    uint32_t q[D / 16][4];
    const int64_t slot = w.slot[token];
    struct part_rows rows = find_rows(w, slot, blockIdx.y * SPLIT, pos, threadIdx.x % 32);
    launch_after(); /* entries and their pages come from the host */
    if ((int)blockIdx.y * SPLIT > pos)
        return;
    load_queries<D>(q, w.q + token * w.q_ld + (int64_t)head0 * D, heads, threadIdx.x % 32);
    int done = 0;
    for (int split = blockIdx.y; split * SPLIT <= pos; split += gridDim.y) {
        float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
        if (split != (int)blockIdx.y)
            rows = find_rows(w, slot, split * SPLIT, pos, threadIdx.x % 32);
        part<D>(w, rows, q, hk * D, split * SPLIT, min(pos, split * SPLIT + SPLIT - 1), mine, o, top, sum);
        merge_warps<D>(w, o, top, sum, (float *)shared, token, split, head0, heads, pos >= SPLIT);
        __syncthreads();
        done++;
    }
    if (w.tickets != NULL && pos >= SPLIT && is_last(w.tickets + blockIdx.x, done, pos / SPLIT + 1))
        merge_parts<D>(w, (float *)shared, token, head0, heads, pos / SPLIT + 1);
}

template <int D>
enum rt_status start(struct rt_queue *q, const work &w, int64_t n, struct rt_err *err)
{
    /* a block takes two parts, one behind the other, where there are not so many that fewer blocks are enough */
    const int all = rt_cuda_cached_blocks(q->dev, &w.parts, n * w.nkv * w.head_tiles, 16), half = (w.parts.splits + 1) / 2;
    enum { STAGED = WARPS * STAGES * 2 * KEYS * D * 2, MERGED = WARPS * 16 * (D + 4 + 2) * 4, BYTES = STAGED > MERGED ? STAGED : MERGED };
    const int64_t blocks = n * w.nkv * w.head_tiles;
    enum rt_status st;
    RT_CUDA_TRY(cudaFuncSetAttribute(attn_cached_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    RT_CUDA_TRY(launch(q, attn_cached_kernel<D>, dim3((unsigned)blocks, (unsigned)(all < half ? all : half)), THREADS, BYTES, 1, w));
out:
    return st;
}

enum rt_status run(struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_cached_args *a, int64_t q_ld, struct rt_err *err)
{
    work w = {};
    void *temp = NULL;
    enum rt_status st = RT_OK;
    w.parts.length = SPLIT;
    w.parts.splits = (int)((a->capacity + SPLIT - 1) / SPLIT);
    w.k = (const bf16 *)a->k_cache;
    w.v = (const bf16 *)a->v_cache;
    w.q_ld = q_ld;
    w.capacity = a->capacity;
    w.pages = a->pages;
    w.width = (int64_t)a->nkv * a->d;
    w.nh = a->nh;
    w.nkv = a->nkv;
    w.heads = a->nh / a->nkv;
    w.head_tiles = (w.heads + 15) / 16;
    w.scale = a->scale * 1.44269504088896341f;
    const int64_t chunk = rt_cuda_cached_chunk(dev, a->n, a->nh, a->d, w.parts.splits);
    w.tickets = chunk * a->nkv * w.head_tiles <= RT_CUDA_TICKETS && w.parts.splits <= MERGED_HERE ? q->tickets : NULL;
    RT_TRY(rt_cuda_cached_parts(q, chunk, a->nh, a->d, &w.parts, &temp, err));
    for (int64_t i = 0; i < a->n; i += chunk) {
        const int64_t n = vec8::smaller(chunk, a->n - i);
        w.q = (const bf16 *)a->q + i * q_ld;
        w.o = (bf16 *)a->o + i * a->nh * a->d;
        w.slot = a->slot + i;
        w.pos = a->pos + i;
        RT_TRY(a->d == 128 ? start<128>(q, w, n, err) : start<64>(q, w, n, err));
        if (w.tickets == NULL)
            RT_TRY(rt_cuda_cached_merge(q, &w.parts, w.pos, w.o, n, a->nh, a->d, err));
    }
out:
    rt_cuda_temp_free(q, temp);
    return st;
}

}

enum rt_status rt_cuda_attn_cached(struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_cached_args *a, struct rt_err *err)
{
    const int64_t q_ld = a->q_ld != 0 ? a->q_ld : (int64_t)a->nh * a->d;
    struct rt_cached_plain plain = {};
    if (a->nkv < 1 || a->nh % a->nkv != 0)
        return rt_fail(err, RT_SHAPE, "attn_cached: %d query heads over %d key heads; expected a multiple", a->nh, a->nkv);
    if (a->n < 1)
        return RT_OK;
    if (a->pages.table != NULL && (a->pages.len < RUN || a->pages.len % RUN != 0 || a->capacity % a->pages.len != 0))
        return rt_fail(err, RT_SHAPE, "attn_cached: pages of %d positions in slots of %ld; expected a multiple of %d that divides them", (int)a->pages.len,
                       (long)a->capacity, (int)RUN);
    if ((a->d == 128 || a->d == 64) && vec8::aligned16(a->k_cache) && vec8::aligned16(a->v_cache) && (uintptr_t)a->q % 4 == 0 && q_ld % 2 == 0 && (uintptr_t)a->o % 8 == 0)
        return run(dev, q, a, q_ld, err);
    plain.pages = a->pages;
    plain.q1 = plain.q2 = a->q;
    plain.q1_ld = q_ld;
    plain.q1_head = plain.d1 = plain.dv = a->d;
    plain.k = a->k_cache;
    plain.v = a->v_cache;
    plain.capacity = a->capacity;
    plain.width = (int64_t)a->nkv * a->d;
    plain.head = a->d;
    plain.slot = a->slot;
    plain.pos = a->pos;
    plain.o = a->o;
    plain.n = a->n;
    plain.nh = a->nh;
    plain.nkv = a->nkv;
    plain.scale = a->scale;
    return rt_cuda_cached_plain(q, &plain, err);
}
