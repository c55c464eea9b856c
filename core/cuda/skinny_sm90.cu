/* Products of up to 64 rows with a BF16 weight on compute capability 9.0 (skinny.h).
 *
 * A block makes 64 W rows of the weight (of a gate and an up: half of each) times all tokens: a producer thread fills a ring of stages of 64 columns by
 * bulk copies, W warpgroups multiply, the weight being the first operand. Where a weight has too few rows for the GPU, the blocks of a cluster cut
 * its columns, and add up what they have (by way of L2) in ascending order, each for a share of the tokens. So the order of every sum depends on the weight's
 * shape alone: results are row_exact.
 *
 * The first weights are on their way before the kernel that makes the tokens has ended (launch.cuh).
 *
 * Shared memory: stages of [64 W rows of the weight | TOK tokens], rows of 128 bytes in the 128-byte swizzle; later the sums as float [tokens][64 W + 4]
 * over them; behind the stages the barriers.
 */
#include <cuda_bf16.h>

#include "core/cuda/cached_row.cuh"
#include "core/cuda/hopper.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/skinny.h"
#include "core/cuda/tensor_map.cuh"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum { COLS = 64 /* of a stage */, ROW = 2 * COLS, CLUSTER = 8 /* the most that every GPU schedules */ };

struct product {
    int n, out;        /* tokens; columns of y */
    int second;        /* row of the weight from which on the second half of a tile comes, behind the first's */
    int chunks, per;   /* steps along the columns; of a block */
    int parts;         /* blocks of a cluster that share a tile's columns */
    int stages;        /* of the ring: as many as there is room and need for, since what is on its way is what keeps memory busy */
    bool gated, early, accumulate, y_f32, bias_f32, wide;
    float *sums;       /* [tiles][parts][n][64 W] where parts > 1 */
    const void *bias;
    void *y;
    int64_t ldy;
    /* what rope_put is told: heads of d elements, those of a tile whole; d 0: y it is */
    int d, nh, nkv;
    bf16 *q, *k_cache, *v_cache;
    const float *cos, *sin;
    const int32_t *slot, *pos;
    struct rt_cache_pages pages;
    int64_t capacity;
};

template <int TOK, int W>
struct sizes {
    enum {
        rows = 64 * W, weights = rows * ROW, stage = weights + TOK * ROW, ld = rows + 4, threads = 128 * W + 32, most = 8 /* stages */
    };
    static_assert(TOK * ld * 4 <= 2 * stage, "sums lie over the stages");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define R8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D8 "{%0, %1, %2, %3, %4, %5, %6, %7"
#define D16 D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D32 D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MMA(n, d, a, b, add) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" #add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 " d "}, %" #a ", %" #b ", p, 1, 1, 0, 0;\n}"

/* d [64 x N] (+)= a [64 x 16] b [N x 16]^T, N twice the number of d. Lane l of warp w holds row 16 w + l/4 (d[4 j + 0, 1]) and row + 8 (d[4 j + 2, 3]),
 * columns 8 j + 2 (l % 4) and the next. */
__device__ __forceinline__ void mma(float (&d)[8], uint64_t a, uint64_t b, int add)
{
    asm volatile(MMA(16, D8, 8, 9, 10) : R8(d, 0) : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void mma(float (&d)[16], uint64_t a, uint64_t b, int add)
{
    asm volatile(MMA(32, D16, 16, 17, 18) : R8(d, 0), R8(d, 8) : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void mma(float (&d)[32], uint64_t a, uint64_t b, int add)
{
    asm volatile(MMA(64, D32, 32, 33, 34) : R8(d, 0), R8(d, 8), R8(d, 16), R8(d, 24) : "l"(a), "l"(b), "r"(add));
}
#undef R8
#undef D8
#undef D16
#undef D32
#undef MMA

/* The compiler may not read (or change) accumulators on the wrong side of a wait. */
template <int N>
__device__ __forceinline__ void pin(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

/* A warp, whose first lane gives the orders. */
template <int TOK, int W>
__device__ void produce(const product &p, const CUtensorMap *w, const CUtensorMap *x, uint32_t ring, uint32_t full, uint32_t empty, int row, int c0, int count)
{
    typedef sizes<TOK, W> Z;
    const int first = min(count, p.stages);
    const bool lead = threadIdx.x % 32 == 0;
    if (!p.early)
        launch_after();
    for (int i = 0; lead && i < first; i++) {
        hopper::barrier_expect(full + 8 * i, Z::stage);
        hopper::load_box(ring + i * Z::stage, w, (c0 + i) * COLS, row, full + 8 * i);
        hopper::load_box(ring + i * Z::stage + Z::weights / 2, w, (c0 + i) * COLS, p.second + row, full + 8 * i);
    }
    __syncwarp();
    if (p.early)
        launch_after();
    for (int i = 0; lead && i < first; i++)
        hopper::load_box(ring + i * Z::stage + Z::weights, x, (c0 + i) * COLS, 0, full + 8 * i);
    int s = 0;
    uint32_t parity = 0;
    for (int i = first; lead && i < count; i++) {
        const uint32_t at = ring + s * Z::stage;
        hopper::barrier_wait(empty + 8 * s, parity);
        hopper::barrier_expect(full + 8 * s, Z::stage);
        hopper::load_box(at, w, (c0 + i) * COLS, row, full + 8 * s);
        hopper::load_box(at + Z::weights / 2, w, (c0 + i) * COLS, p.second + row, full + 8 * s);
        hopper::load_box(at + Z::weights, x, (c0 + i) * COLS, 0, full + 8 * s);
        s = s + 1 == p.stages ? 0 : s + 1;
        parity ^= s == 0;
    }
    __syncwarp();
}

/* A warpgroup's 64 rows times all tokens, then to sums [n][ld]. */
template <int TOK, int W>
__device__ void consume(const product &p, uint32_t ring, uint32_t full, uint32_t empty, float *sums, int ld, int count)
{
    typedef sizes<TOK, W> Z;
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32, row = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    float acc[TOK / 2];
    int s = 0;
    uint32_t parity = 0;
    for (int i = 0; i < count; i++) {
        const uint32_t at = ring + s * Z::stage;
        hopper::barrier_wait(full + 8 * s, parity);
        pin(acc);
        hopper::mma_fence();
#pragma unroll
        for (int k = 0; k < COLS / 16; k++)
            mma(acc, hopper::descriptor(at + group * 64 * ROW + 32 * k), hopper::descriptor(at + Z::weights + 32 * k), i + k > 0);
        hopper::mma_commit();
        hopper::mma_wait<1>(); /* the step before has read its stage */
        if (i > 0 && lane == 0)
            arrive(empty + 8 * (s == 0 ? p.stages - 1 : s - 1));
        s = s + 1 == p.stages ? 0 : s + 1;
        parity ^= s == 0;
    }
    hopper::mma_wait<0>();
    pin(acc);
    asm volatile("bar.sync 1, %0;" ::"n"(128 * W) : "memory"); /* nobody reads a stage any more */
#pragma unroll
    for (int i = 0; i < TOK / 2; i++) {
        const int t = i / 4 * 8 + lane % 4 * 2 + (i & 1);
        if (t < p.n)
            sums[t * ld + row + (i & 2) * 4] = acc[i];
    }
}

struct four {
    float v[4];
};

/* Where the sums of a tile lie: in this block's shared memory, or those of all blocks of its cluster in device memory (of which the shared memory of other
 * blocks has a quarter of the rate). */
struct sums_at {
    const float *first;
    int ld, step; /* of tokens; of parts */
};

/* Four sums from all parts, in ascending order, and `start`. */
__device__ __forceinline__ struct four total(const product &p, const sums_at &sums, int at, const struct four &start)
{
    float4 part[CLUSTER];
    struct four s = start;
    if (p.parts == 1) {
        part[0] = *(const float4 *)(const void *)(sums.first + at);
    } else {
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            if (r < p.parts) /* all are on their way at once */
                part[r] = __ldcg((const float4 *)(const void *)(sums.first + at + r * sums.step));
    }
#pragma unroll
    for (int r = 0; r < CLUSTER; r++)
        if (r < p.parts)
            s.v[0] += part[r].x, s.v[1] += part[r].y, s.v[2] += part[r].z, s.v[3] += part[r].w;
    return s;
}

/* The bias of four columns from `column` on, below `end`. */
__device__ __forceinline__ struct four bias_of(const product &p, int column, int end)
{
    struct four b = {};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (p.bias != NULL && column + i < end)
            b.v[i] = p.bias_f32 ? ((const float *)p.bias)[column + i] : __bfloat162float(((const bf16 *)p.bias)[column + i]);
    return b;
}

__device__ __forceinline__ void store4(bf16 *to, const float (&v)[4])
{
    *(uint2 *)to = make_uint2(vec8::pack2(v[0], v[1]), vec8::pack2(v[2], v[3]));
}

__device__ __forceinline__ void store(const product &p, int64_t at, const float (&v)[4], int count)
{
    if (!p.y_f32 && p.wide && !p.accumulate) {
        store4((bf16 *)p.y + at, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i >= count)
            continue;
        if (p.y_f32)
            ((float *)p.y)[at + i] = p.accumulate ? ((float *)p.y)[at + i] + v[i] : v[i];
        else
            ((bf16 *)p.y)[at + i] = __float2bfloat16_rn(p.accumulate ? __bfloat162float(((bf16 *)p.y)[at + i]) + v[i] : v[i]);
    }
}

/* The tokens of this block's share that this thread has: t, t + step, .. below end; its columns stay the same. */
template <int TOK, int W>
struct share_of {
    int t, end, step, quad;
    __device__ __forceinline__ share_of(const product &p, int quads, int rank)
    {
        const int each = (p.n + p.parts - 1) / p.parts;
        step = 128 * W / quads;
        quad = threadIdx.x % quads;
        t = rank * each + threadIdx.x / quads;
        end = min(p.n, rank * each + each);
        if ((int)threadIdx.x >= step * quads)
            t = end;
    }
};

/* What the cluster has of a share of the tokens, to y. `bias`: of this thread's columns, of gate and of up. */
template <int TOK, int W>
__device__ void finish(const product &p, const sums_at &sums, const share_of<TOK, W> &at, int n, const struct four (&bias)[2])
{
    typedef sizes<TOK, W> Z;
    if (n >= p.out)
        return;
#pragma unroll 2
    for (int t = at.t; t < at.end; t += at.step) {
        struct four s = total(p, sums, t * sums.ld + at.quad * 4, bias[0]);
        if (p.gated) {
            const struct four up = total(p, sums, t * sums.ld + at.quad * 4 + Z::rows / 2, bias[1]);
#pragma unroll
            for (int j = 0; j < 4; j++)
                s.v[j] = s.v[j] / (1.0f + __expf(-s.v[j])) * up.v[j];
        }
        store(p, t * p.ldy + n, s.v, p.out - n);
    }
}

/* The same for heads: queries and keys are turned, keys and values go to their rows of the caches. n: this thread's columns in the first half of a head */
template <int TOK, int W>
__device__ void finish_heads(const product &p, const sums_at &sums, const share_of<TOK, W> &at, int n, const struct four (&bias)[2])
{
    typedef sizes<TOK, W> Z;
    const int half = p.d / 2, head = n / p.d, j = n % p.d, kv = head - p.nh;
    bf16 *cache = kv < p.nkv ? p.k_cache : p.v_cache;
    if (n >= p.out)
        return;
#pragma unroll 2
    for (int t = at.t; t < at.end; t += at.step) {
        const int pos = p.pos[t];
        if (pos < 0)
            continue;
        struct four lo = total(p, sums, t * sums.ld + n % Z::rows, bias[0]), hi = total(p, sums, t * sums.ld + n % Z::rows + half, bias[1]);
        bf16 *to = kv < 0 ? p.q + ((int64_t)t * p.nh + head) * p.d : cache + (cached_row(p.pages, p.capacity, p.slot[t], pos) * p.nkv + kv % p.nkv) * p.d;
        if (kv < p.nkv) {
            const float4 c4 = *(const float4 *)(p.cos + (int64_t)pos * half + j), s4 = *(const float4 *)(p.sin + (int64_t)pos * half + j);
            const float co[4] = {c4.x, c4.y, c4.z, c4.w}, si[4] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const float a = lo.v[u] * co[u] - hi.v[u] * si[u];
                hi.v[u] = lo.v[u] * si[u] + hi.v[u] * co[u];
                lo.v[u] = a;
            }
        }
        store4(to + j, lo.v);
        store4(to + j + half, hi.v);
    }
}

/* A consumer's way. */
template <int TOK, int W>
__device__ void consumer(const product &p, uint32_t ring, uint32_t full, uint32_t empty, float *shared, int tile, int rank, int count)
{
    typedef sizes<TOK, W> Z;
    const bool heads = W == 2 && p.d != 0, halves = p.gated || heads;
    const share_of<TOK, W> at(p, (halves ? Z::rows / 2 : Z::rows) / 4, rank);
    int n = at.quad * 4, second = p.out + n;
    if (heads) { /* quads of the first halves of heads */
        n = tile * Z::rows + n / (p.d / 2) * p.d + n % (p.d / 2);
        second = n + p.d / 2;
    } else {
        n += tile * (p.gated ? Z::rows / 2 : Z::rows);
        second = p.out + n;
    }
    const struct four bias[2] = {bias_of(p, n, p.out), halves ? bias_of(p, second, p.gated ? 2 * p.out : p.out) : four()};
    launch_after();
    sums_at sums = {shared, Z::ld, 0};
    if (p.parts == 1) {
        consume<TOK, W>(p, ring, full, empty, shared, Z::ld, count);
        asm volatile("bar.sync 1, %0;" ::"n"(128 * W) : "memory");
    } else {
        sums.ld = Z::rows;
        sums.step = p.n * Z::rows;
        float *mine = p.sums + (int64_t)(tile * p.parts + rank) * sums.step;
        sums.first = mine - rank * sums.step;
        consume<TOK, W>(p, ring, full, empty, mine, Z::rows, count);
        hopper::cluster_sync();
    }
    if (heads)
        finish_heads<TOK, W>(p, sums, at, n, bias);
    else
        finish<TOK, W>(p, sums, at, n, bias);
}

#endif

/* grid: tiles * parts, in clusters of parts */
template <int TOK, int W>
__global__ void __launch_bounds__(sizes<TOK, W>::threads) product_kernel(const __grid_constant__ product p,
                                                                                               const __grid_constant__ CUtensorMap w,
                                                                                               const __grid_constant__ CUtensorMap x)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    typedef sizes<TOK, W> Z;
    extern __shared__ uint8_t raw[];
    const uint32_t start = hopper::smem(raw), ring = (start + 1023) / 1024 * 1024, full = ring + p.stages * Z::stage, empty = full + 8 * p.stages;
    float *sums = (float *)(void *)(raw + (ring - start));
    const int tile = blockIdx.x / p.parts, rank = blockIdx.x % p.parts, c0 = rank * p.per, left = p.chunks - c0, count = left < p.per ? left : p.per;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            hopper::barrier_init(full + 8 * i, 1);
            hopper::barrier_init(empty + 8 * i, 4 * W);
        }
        hopper::barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * W) {
        produce<TOK, W>(p, &w, &x, ring, full, empty, tile * (p.gated ? Z::rows / 2 : Z::rows), c0, count);
        if (p.parts > 1)
            hopper::cluster_sync();
    } else {
        consumer<TOK, W>(p, ring, full, empty, sums, tile, rank, count);
    }
#endif
}

enum rt_status map(struct rt_queue *q, CUtensorMap *to, const void *data, int64_t rows, int64_t cols, int64_t ld, int box, struct rt_err *err)
{
    const cuuint64_t size[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)ld * 2};
    const cuuint32_t shape[2] = {COLS, (cuuint32_t)box};
    return tensor_map(q->dev, to, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, size, stride, shape, CU_TENSOR_MAP_SWIZZLE_128B, err);
}

/* Into how many parts the columns are cut: twice as many as long as all blocks run at once and each has three steps or more. */
void cut_columns(const struct rt_queue *q, product *p, int tiles)
{
    p->parts = 1;
    while (p->parts < CLUSTER && 2 * p->parts * tiles <= q->dev->sm_count && p->chunks >= 6 * p->parts)
        p->parts *= 2;
    p->per = (p->chunks + p->parts - 1) / p->parts;
    p->parts = (p->chunks + p->per - 1) / p->per;
}

template <int TOK, int W>
enum rt_status start(struct rt_queue *q, product p, const struct rt_linear_fwd_args *a, struct rt_err *err)
{
    typedef sizes<TOK, W> Z;
    CUtensorMap w, x;
    size_t bytes;
    const int each = p.gated ? Z::rows / 2 : Z::rows, tiles = (p.out + each - 1) / each;
    enum rt_status st;
    p.second = p.gated ? p.out : Z::rows / 2;
    cut_columns(q, &p, tiles);
    p.sums = (float *)q->workspace;
    if ((int64_t)tiles * p.parts * p.n * Z::rows * 4 > RT_CUDA_WORKSPACE) {
        p.parts = 1;
        p.per = p.chunks;
    }
    RT_TRY(map(q, &w, a->w->data, a->w->rows, a->K, a->K, Z::rows / 2, err));
    /* all of a multiprocessor's, or where blocks come one after another, half of it: so that one begins while another ends */
    p.stages = ((tiles * p.parts > q->dev->sm_count ? q->dev->block_shared / 2 - 2048 : q->dev->block_shared) - 1024) / (Z::stage + 16);
    p.stages = p.stages < Z::most ? p.stages : (int)Z::most;
    p.stages = p.stages < p.per ? p.stages : p.per < 2 ? 2 : p.per;
    bytes = (size_t)p.stages * (Z::stage + 16) + 1024;
    RT_TRY(map(q, &x, a->x.data, a->n, a->K, a->ldx != 0 ? a->ldx : a->K, TOK, err));
    RT_CUDA_TRY(cudaFuncSetAttribute(product_kernel<TOK, W>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    RT_CUDA_TRY(launch(q, product_kernel<TOK, W>, dim3((unsigned)(tiles * p.parts)), Z::threads, bytes, p.parts, p, w, x));
out:
    return st;
}

/* p: what is not in the arguments of a product */
enum rt_status run(struct rt_queue *q, product p, const struct rt_linear_fwd_args *a, bool gated, struct rt_err *err)
{
    p.n = (int)a->n;
    p.out = (int)(gated ? a->N / 2 : a->N);
    p.chunks = (int)((a->K + COLS - 1) / COLS);
    p.gated = gated;
    p.early = a->row_exact;
    p.accumulate = a->accumulate;
    p.y_f32 = a->y_f32;
    p.bias = a->bias != NULL ? a->bias->data : NULL;
    p.bias_f32 = a->bias != NULL && a->bias->dtype == RT_F32;
    p.y = a->y;
    p.ldy = a->ldy != 0 ? a->ldy : p.out;
    p.wide = p.out % 4 == 0 && p.ldy % 4 == 0 && (uintptr_t)a->y % 8 == 0;
    if (gated && p.out <= 96 * q->dev->sm_count && p.out > 64 * q->dev->sm_count) /* larger tiles, where all of them can run at once, but not all small ones */
        return a->n <= 16 ? start<16, 3>(q, p, a, err) : a->n <= 32 ? start<32, 3>(q, p, a, err) : start<64, 3>(q, p, a, err);
    return a->n <= 16 ? start<16, 2>(q, p, a, err) : a->n <= 32 ? start<32, 2>(q, p, a, err) : start<64, 2>(q, p, a, err);
}

}

bool rt_cuda_skinny_hopper_fits(const struct rt_dev *dev, const struct rt_linear_fwd_args *a)
{
    return dev->cc == 90 && dev->encode_map != NULL && a->row_exact && a->n >= 1 && a->n <= RT_CUDA_SKINNY_ROWS_HOPPER && a->x.scale == NULL &&
           a->w->dtype == RT_BF16 && a->w->rows == a->N && a->w->cols == a->K && a->K >= 8 && a->K % 8 == 0 && a->ldx % 8 == 0 && vec8::aligned16(a->w->data) &&
           (a->bias == NULL || ((a->bias->dtype == RT_BF16 || a->bias->dtype == RT_F32) && a->bias->rows * a->bias->cols == a->N)) &&
           vec8::aligned16(a->x.data) && a->N <= INT32_MAX / 4 && a->K <= INT32_MAX / 4 &&
           (a->n <= 32 || a->N <= 512 * dev->sm_count); /* a head: the library reads the tokens less often, and waits less */
}

enum rt_status rt_cuda_skinny_hopper(struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err)
{
    return run(q, product(), a, false, err);
}

enum rt_status rt_cuda_skinny_hopper_gated(struct rt_queue *q, const struct rt_linear_fwd_args *a, struct rt_err *err)
{
    return run(q, product(), a, true, err);
}

bool rt_cuda_skinny_hopper_heads_fit(const struct rt_dev *dev, const struct rt_linear_fwd_args *a, const struct rt_rope_put_args *put)
{
    return rt_cuda_skinny_hopper_fits(dev, a) && (put->d == 64 || put->d == 128) && put->q_norm == NULL && put->k_norm == NULL && put_aligned(put) &&
           a->N == (int64_t)(put->nh + 2 * put->nkv) * put->d;
}

enum rt_status rt_cuda_skinny_hopper_heads(struct rt_queue *q, const struct rt_linear_fwd_args *a, const struct rt_rope_put_args *put, struct rt_err *err)
{
    product p = {};
    p.d = put->d;
    p.nh = put->nh;
    p.nkv = put->nkv;
    p.q = (bf16 *)put->q;
    p.k_cache = (bf16 *)put->k_cache;
    p.v_cache = (bf16 *)put->v_cache;
    p.cos = put->cos;
    p.sin = put->sin;
    p.slot = put->slot;
    p.pos = put->pos;
    p.pages = put->pages;
    p.capacity = put->capacity;
    return run(q, p, a, false, err);
}
