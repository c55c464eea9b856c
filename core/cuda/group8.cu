#include "core/cuda/group8.h"

#include <cuda_bf16.h>
#include <string.h>

#include "core/cuda/hopper.cuh"
#include "core/cuda/quant.cuh"
#include "core/cuda/tensor_map.cuh"
#include "core/mem.h"

/* A block makes 128 rows x 256 columns (gated: 128 columns of the gate and of up), as two consumer warpgroups of 64 rows each; a producer
 * thread fills a ring of stages of 128 columns of K. Two blocks of a cluster take the two halves of 256 rows and share the weight's tile: each
 * loads one half of it into both, which brings what the L2 must deliver to 32 KB for 2 x 128^3 multiplications: 5 TB/s at the full rate.
 *
 * Rows that lie where their tokens do are copied by all threads of the producer's warpgroup, 16 bytes at a time, to where a bulk copy puts them. */
namespace {

enum {
    BM = 128, BN = 128, BK = 128, /* a tile of each operand: 128 rows of 128 bytes */
    TILE = BM * BK,
    STAGE = 3 * TILE,             /* x, and both tiles of the weight */
    SCALES = BM * 4,              /* beside them: the scales of x */
    STAGES = 4,
    CLUSTER = 2,
    CONSUMERS = 2,                /* warpgroups */
    THREADS = 128 * (CONSUMERS + 1),
    RASTER = 8,                   /* row pairs that run side by side over all columns: the rows they need stay in the L2 */
    SHARED = STAGES * (STAGE + SCALES) + 1024 + 2 * STAGES * 8,
};

struct expert {
    int32_t tile0, base, padded, pairs; /* first tile; first row; rows; pairs of row blocks */
};

struct params {
    const struct expert *expert; /* [n + 1]: the last one holds the number of tiles */
    const CUtensorMap *wmap;     /* [n] or [2 n]: gate, up */
    const float *const *wscale;  /* the same: [N/128][K/128] */
    const float *xscale;
    const uint8_t *x;            /* gathered: codes of tokens, row r is that of token row[r].x / k; a negative one: zeros */
    const int4 *row;
    int k;
    int n_experts, K, columns;   /* column blocks of a row: N/256, gated N/128 */
    __nv_bfloat16 *y;
    int64_t ldy, rows;
    int accumulate;
    uint8_t *hcode;
    float *hscale;
    int N;
    bool pow2;
};

struct tile {
    int e, row, column; /* row: of the cluster's pair, within the expert */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Tile t of the launch; *e is where the last one was found. */
__device__ __forceinline__ struct tile find_tile(const struct params &p, int t, int *e)
{
    struct tile out;
    while (t >= p.expert[*e + 1].tile0)
        (*e)++;
    const struct expert x = p.expert[*e];
    const int at = t - x.tile0, band = at / (RASTER * p.columns), within = at - band * RASTER * p.columns;
    const int left = x.pairs - band * RASTER, high = left < RASTER ? left : RASTER;
    out.e = *e;
    out.column = within / high;
    out.row = (band * RASTER + within % high) * CLUSTER * BM;
    return out;
}

/* What goes with the rows of x of a stage: their scales and this block's half of the weight's tile. One thread; more: bytes of x that bulk copies bring. */
struct source {
    const CUtensorMap *map;
    const float *scale;
    int padded, scales, wrow; /* scales: bytes of a column block's */
};

template <bool GATED>
__device__ __forceinline__ struct source source_of(const struct params &p, const struct tile &w, const struct expert &x, uint32_t rank)
{
    const int in_expert = w.row + (int)rank * BM, left = x.padded - in_expert;
    struct source s;
    s.map = GATED ? p.wmap + 2 * w.e + rank : p.wmap + w.e;
    s.scale = p.xscale + (int64_t)x.base * (p.K / BK) + in_expert;
    s.padded = x.padded;
    s.scales = (left < 0 ? 0 : left < BM ? left : BM) * 4;
    s.wrow = GATED ? w.column * BN : (w.column * 2 + (int)rank) * BN;
    return s;
}

__device__ __forceinline__ void load_others(const struct source &s, int k, uint32_t ring, int stage, uint32_t rank, uint32_t bar, int more)
{
    hopper::barrier_expect(bar, 2 * TILE + s.scales + more);
    if (s.scales > 0)
        hopper::load_bytes(ring + STAGES * STAGE + stage * SCALES, s.scale + (int64_t)k * s.padded, s.scales, bar);
    hopper::load_box_multicast(ring + stage * STAGE + (1 + rank) * TILE, s.map, k * BK, s.wrow, bar, (uint16_t)((1 << CLUSTER) - 1));
}

/* One thread. */
template <bool GATED>
__device__ __forceinline__ void produce(const struct params &p, const CUtensorMap *xmap, uint32_t ring, uint32_t full, uint32_t empty, uint32_t rank)
{
    const int blocks = p.K / BK, tiles = p.expert[p.n_experts].tile0;
    int stage = 0, e = 0, seen = -1;
    uint32_t phase = 0;
    for (int t = blockIdx.x / CLUSTER; t < tiles; t += gridDim.x / CLUSTER) {
        const struct tile w = find_tile(p, t, &e);
        const struct expert x = p.expert[w.e];
        const struct source s = source_of<GATED>(p, w, x, rank);
        if (w.e != seen) {
            hopper::tensormap_acquire(s.map);
            seen = w.e;
        }
        for (int k = 0; k < blocks; k++) {
            const uint32_t bar = full + 8 * stage;
            hopper::barrier_wait(empty + 8 * stage, phase ^ 1);
            load_others(s, k, ring, stage, rank, bar, TILE);
            hopper::load_box(ring + stage * STAGE, xmap, k * BK, x.base + w.row + (int)rank * BM, bar);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            phase ^= stage == 0;
        }
    }
}

/* The same with rows from their tokens, by a warpgroup: a thread copies the same 16 of each 128 bytes of every 16th row. */
template <bool GATED>
__device__ __forceinline__ void produce_gathered(const struct params &p, uint32_t ring, uint32_t full, uint32_t empty, uint32_t rank)
{
    enum { EACH = BM * BK / 16 / 128 };
    const int blocks = p.K / BK, tiles = p.expert[p.n_experts].tile0, me = threadIdx.x % 128, first = me / 8, piece = me % 8;
    const uint32_t at = first * BK + ((piece ^ first % 8) * 16); /* in the 128-byte swizzle */
    int stage = 0, e = 0, seen = -1;
    uint32_t phase = 0;
    for (int t = blockIdx.x / CLUSTER; t < tiles; t += gridDim.x / CLUSTER) {
        const struct tile w = find_tile(p, t, &e);
        const struct expert x = p.expert[w.e];
        const struct source s = source_of<GATED>(p, w, x, rank);
        uint32_t token[EACH]; /* -1: none */
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int r = w.row + (int)rank * BM + first + 16 * i, flat = r < x.padded ? __ldg(&p.row[x.base + r].x) : -1;
            token[i] = flat < 0 ? ~0u : (uint32_t)flat / (uint32_t)p.k;
        }
        if (me == 0 && w.e != seen)
            hopper::tensormap_acquire(s.map);
        seen = w.e;
        for (int k = 0; k < blocks; k++) {
            const uint32_t bar = full + 8 * stage, to = ring + stage * STAGE + at;
            const uint8_t *from = p.x + k * BK + piece * 16;
            hopper::barrier_wait(empty + 8 * stage, phase ^ 1);
            if (me == 0)
                load_others(s, k, ring, stage, rank, bar, 0);
#pragma unroll
            for (int i = 0; i < EACH; i++)
                hopper::copy16(to + i * 16 * BK, from + (token[i] != ~0u ? (int64_t)token[i] * p.K : 0), token[i] != ~0u);
            hopper::barrier_arrive_after_copies(bar);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            phase ^= stage == 0;
        }
    }
}

/* 64 x 128 sums of one stage, scaled into acc. */
__device__ __forceinline__ void multiply(float (&acc)[64], uint32_t x, uint32_t w, float low, float high)
{
    float part[64];
    hopper::mma_fence();
#pragma unroll
    for (int i = 0; i < BK / 32; i++)
        hopper::mma_e4m3_64x128x32(part, hopper::descriptor(x + 32 * i), hopper::descriptor(w + 32 * i), i > 0);
    hopper::mma_commit();
    hopper::mma_wait<0>();
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
        acc[i] += part[i] * low;
        acc[i + 1] += part[i + 1] * low;
        acc[i + 2] += part[i + 2] * high;
        acc[i + 3] += part[i + 3] * high;
    }
}

__device__ __forceinline__ uint32_t pack(float a, float b)
{
    const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}

__device__ __forceinline__ float2 unpack(uint32_t u)
{
    __nv_bfloat162 h;
    memcpy(&h, &u, sizeof h);
    return __bfloat1622float2(h);
}

/* Of four lanes, lane i holds word i of rows 0..3 (v[r]); afterwards it holds the four words of row i. */
__device__ __forceinline__ void transpose4(uint32_t (&v)[4], int lane)
{
    const bool odd = lane & 1, upper = lane & 2;
    uint32_t a = odd ? v[0] : v[1], b = odd ? v[2] : v[3];
    a = __shfl_xor_sync(0xffffffffu, a, 1);
    b = __shfl_xor_sync(0xffffffffu, b, 1);
    if (odd) {
        v[0] = a;
        v[2] = b;
    } else {
        v[1] = a;
        v[3] = b;
    }
    uint32_t c = upper ? v[0] : v[2], d = upper ? v[1] : v[3];
    c = __shfl_xor_sync(0xffffffffu, c, 2);
    d = __shfl_xor_sync(0xffffffffu, d, 2);
    if (upper) {
        v[0] = c;
        v[1] = d;
    } else {
        v[2] = c;
        v[3] = d;
    }
}

/* What a row of y holds: the pieces that store_row is about to overwrite. Asked for before any is needed: a tile waits once for memory. */
__device__ __forceinline__ void load_row(uint4 (&old)[4], const __nv_bfloat16 *y, int lane, bool inside)
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        old[j] = inside ? *(const uint4 *)(y + 8 * (4 * j + lane)) : make_uint4(0, 0, 0, 0);
}

/* One row's 128 columns, spread over four lanes (c[2 j], c[2 j + 1] at column 8 j + 2 lane), to y in 16-byte pieces. */
__device__ __forceinline__ void store_row(__nv_bfloat16 *y, const float (&acc)[64], const uint4 (&old)[4], int half, int lane, bool inside, bool accumulate)
{
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = pack(acc[4 * (j + i) + 2 * half], acc[4 * (j + i) + 2 * half + 1]);
        if (accumulate) { /* rounded once: the old values come to the sums */
            uint32_t o[4] = {old[j / 4].x, old[j / 4].y, old[j / 4].z, old[j / 4].w};
            transpose4(o, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 f = unpack(o[i]);
                v[i] = pack(f.x + acc[4 * (j + i) + 2 * half], f.y + acc[4 * (j + i) + 2 * half + 1]);
            }
        }
        transpose4(v, lane);
        if (inside)
            *(uint4 *)(y + 8 * (j + lane)) = make_uint4(v[0], v[1], v[2], v[3]);
    }
}

/* One row of silu(gate) * up, 128 columns over four lanes: codes and their scale. */
__device__ __forceinline__ void store_gated(uint8_t *code, float *scale, const float (&gate)[64], const float (&up)[64], int half, int lane, bool inside, bool pow2)
{
    float h[32], amax = 0;
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float g = gate[4 * j + 2 * half + i], v = __bfloat162float(__float2bfloat16_rn(__fdividef(g, 1.0f + __expf(-g)) * up[4 * j + 2 * half + i]));
            h[2 * j + i] = v;
            amax = fmaxf(amax, fabsf(v));
        }
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
    const struct qscale q = quant_scale(amax, pow2);
    if (inside && lane == 0)
        *scale = q.s;
#pragma unroll
    for (int j = 0; j < 16; j += 8) { /* v[i] holds codes of column blocks j + 2 i and the next: words of two lanes each */
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = code2(quotient(h[2 * (j + 2 * i)], q), quotient(h[2 * (j + 2 * i) + 1], q)) |
                   code2(quotient(h[2 * (j + 2 * i) + 2], q), quotient(h[2 * (j + 2 * i) + 3], q)) << 16;
        transpose4(v, lane); /* lane i: blocks j + 2 i (low halves) and j + 2 i + 1 (high halves) of lanes 0..3 */
        const uint4 out = make_uint4(__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410), __byte_perm(v[0], v[1], 0x7632),
                                     __byte_perm(v[2], v[3], 0x7632));
        if (inside)
            *(uint4 *)(code + 8 * j + 16 * lane) = out;
    }
}

template <bool GATED, bool GATHER>
__device__ __forceinline__ void consume(const struct params &p, uint32_t ring, uint32_t full, uint32_t empty, uint32_t rank, int group)
{
    const int blocks = p.K / BK, tiles = p.expert[p.n_experts].tile0, lane = threadIdx.x % 4, in_tile = group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    int stage = 0, e = 0;
    uint32_t phase = 0;
    for (int t = blockIdx.x / CLUSTER; t < tiles; t += gridDim.x / CLUSTER) {
        const struct tile w = find_tile(p, t, &e);
        const struct expert x = p.expert[w.e];
        const int row = w.row + (int)rank * BM + in_tile, left = x.padded - row;
        const float *ws0 = GATED ? p.wscale[2 * w.e] + (int64_t)w.column * blocks : p.wscale[w.e] + (int64_t)w.column * 2 * blocks;
        const float *ws1 = GATED ? p.wscale[2 * w.e + 1] + (int64_t)w.column * blocks : ws0 + blocks;
        float acc0[64], acc1[64];
#pragma unroll
        for (int i = 0; i < 64; i++)
            acc0[i] = acc1[i] = 0;
        float s0 = ws0[0], s1 = ws1[0];
        for (int k = 0; k < blocks; k++) {
            const uint32_t at = ring + stage * STAGE, scales = ring + STAGES * STAGE + stage * SCALES + 4 * in_tile;
            const float c = s0, d = s1;
            if (k + 1 < blocks) { /* on their way while this block is multiplied */
                s0 = ws0[k + 1];
                s1 = ws1[k + 1];
            }
            hopper::barrier_wait(full + 8 * stage, phase);
            if (GATHER)
                hopper::fence_async(); /* rows that threads copied, before the tensor cores read them */
            const float a = hopper::load_float(scales), b = hopper::load_float(scales + 32);
            multiply(acc0, at + group * (TILE / 2), at + TILE, a * c, b * c);
            multiply(acc1, at + group * (TILE / 2), at + 2 * TILE, a * d, b * d);
            if (threadIdx.x % 32 < CLUSTER)
                hopper::barrier_arrive_at(empty + 8 * stage, threadIdx.x % 32);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            phase ^= stage == 0;
        }
        const int64_t at = (int64_t)x.base + row;
        if (GATED) {
            float *hs = p.hscale + (int64_t)x.base * (p.N / BN) + (int64_t)w.column * x.padded + row;
            store_gated(p.hcode + at * p.N + w.column * BN, hs, acc0, acc1, 0, lane, left > 0, p.pow2);
            store_gated(p.hcode + (at + 8) * p.N + w.column * BN, hs + 8, acc0, acc1, 1, lane, left > 8, p.pow2);
        } else {
            const int64_t to = p.rows - at; /* rows from here on that exist */
            __nv_bfloat16 *y = p.y + at * p.ldy + (int64_t)w.column * 2 * BN;
            const bool first = left > 0 && to > 0, second = left > 8 && to > 8;
            uint4 left_half[4], right_half[4];
            if (p.accumulate) {
                load_row(left_half, y, lane, first);
                load_row(right_half, y + BN, lane, first);
            }
            store_row(y, acc0, left_half, 0, lane, first, p.accumulate);
            store_row(y + BN, acc1, right_half, 0, lane, first, p.accumulate);
            y += 8 * p.ldy;
            if (p.accumulate) {
                load_row(left_half, y, lane, second);
                load_row(right_half, y + BN, lane, second);
            }
            store_row(y, acc0, left_half, 1, lane, second, p.accumulate);
            store_row(y + BN, acc1, right_half, 1, lane, second, p.accumulate);
        }
    }
}
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900 /* an empty kernel there, which nothing starts */
#define CLUSTERED
#else
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#endif

template <bool GATED, bool GATHER>
__global__ CLUSTERED __launch_bounds__(THREADS, 1) void group8_kernel(const __grid_constant__ CUtensorMap xmap, const struct params p)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ unsigned char raw[];
    const uint32_t ring = (hopper::smem(raw) + 1023) / 1024 * 1024, full = ring + STAGES * (STAGE + SCALES), empty = full + 8 * STAGES, rank = hopper::cluster_rank();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(full + 8 * i, GATHER ? 1 + 128 : 1);
            hopper::barrier_init(empty + 8 * i, 4 * CONSUMERS * CLUSTER); /* each warp, at both blocks */
        }
        hopper::barrier_init_fence();
    }
    __syncthreads();
    hopper::cluster_sync();
    const int group = threadIdx.x / 128;
    if (group == CONSUMERS) {
        hopper::registers_fewer<40>();
        if (GATHER)
            produce_gathered<GATED>(p, ring, full, empty, rank);
        else if (threadIdx.x == CONSUMERS * 128)
            produce<GATED>(p, &xmap, ring, full, empty, rank);
        __syncwarp();
    } else {
        hopper::registers_more<232>();
        consume<GATED, GATHER>(p, ring, full, empty, rank, group);
    }
    hopper::cluster_sync(); /* nobody leaves while the other may still write to it */
#endif
}

/* ---- the host's side ---- */

/* Codes [rows, cols] in boxes of 128 x 128. */
enum rt_status encode(const struct rt_dev *dev, CUtensorMap *map, const void *codes, int64_t rows, int64_t cols, struct rt_err *err)
{
    const cuuint64_t size[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)cols};
    const cuuint32_t box[2] = {BK, BM};
    return tensor_map(dev, map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, codes, size, stride, box, CU_TENSOR_MAP_SWIZZLE_128B, err);
}

/* What a launch reads from memory, in one block: maps, scales' addresses, experts. */
struct table {
    size_t maps, scales, experts, bytes;
};

struct table table_layout(int n, int forms)
{
    struct table t;
    t.maps = 0;
    t.scales = (size_t)(n * forms) * sizeof(CUtensorMap);
    t.experts = t.scales + (size_t)(n * forms) * sizeof(float *);
    t.bytes = t.experts + (size_t)(n + 1) * sizeof(struct expert);
    return t;
}

enum rt_status fill_table(const struct rt_dev *dev, const struct rt_cuda_group8 *g, const struct table *t, char *host, int *tiles, struct rt_err *err)
{
    const int forms = g->up != NULL ? 2 : 1, columns = (int)(g->N / (g->up != NULL ? BN : 2 * BN));
    CUtensorMap *maps = (CUtensorMap *)(void *)(host + t->maps);
    const float **scales = (const float **)(void *)(host + t->scales);
    struct expert *x = (struct expert *)(void *)(host + t->experts);
    enum rt_status st = RT_OK;
    *tiles = 0;
    for (int j = 0; j < g->n_experts; j++) {
        const int64_t rows = g->base[j + 1] - g->base[j];
        x[j].tile0 = *tiles;
        x[j].base = (int32_t)g->base[j];
        x[j].padded = (int32_t)rows;
        x[j].pairs = (int32_t)((rows + CLUSTER * BM - 1) / (CLUSTER * BM));
        *tiles += x[j].pairs * columns;
        for (int f = 0; f < forms; f++) {
            const struct rt_weight *w = f == 0 ? g->w[j] : g->up[j];
            RT_TRY(encode(dev, &maps[j * forms + f], w->data, w->rows, w->cols, err));
            scales[j * forms + f] = w->scale;
        }
    }
    x[g->n_experts].tile0 = *tiles;
    x[g->n_experts].base = (int32_t)g->base[g->n_experts];
    x[g->n_experts].padded = x[g->n_experts].pairs = 0;
out:
    return st;
}

template <bool GATED, bool GATHER>
enum rt_status launch(struct rt_queue *q, const CUtensorMap *xmap, const struct params *p, int tiles, struct rt_err *err)
{
    const int most = q->dev->sm_count / CLUSTER, clusters = tiles < most ? tiles : most;
    enum rt_status st;
    RT_CUDA_TRY(cudaFuncSetAttribute(group8_kernel<GATED, GATHER>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    group8_kernel<GATED, GATHER><<<clusters * CLUSTER, THREADS, SHARED, q->stream>>>(*xmap, *p);
    RT_TRY(rt_cuda_launched("group8", err));
out:
    return st;
}

}

void *rt_cuda_group8_driver(const struct rt_dev *dev)
{
    void *fn = NULL;
    enum cudaDriverEntryPointQueryResult found;
    if (dev->cc != 90)
        return NULL;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
        (void)cudaGetLastError();
        return NULL;
    }
    return fn;
}

bool rt_cuda_group8_fits(const struct rt_dev *dev, int64_t K, int64_t N, bool gated)
{
    return dev->encode_map != NULL && K % BK == 0 && N % (gated ? BN : 2 * BN) == 0;
}

enum rt_status rt_cuda_group8(struct rt_queue *q, const struct rt_cuda_group8 *g, struct rt_err *err)
{
    const bool gated = g->up != NULL;
    const struct table t = table_layout(g->n_experts, gated ? 2 : 1);
    const int64_t rows = g->base[g->n_experts];
    char *host = NULL, *device = NULL;
    struct params p;
    CUtensorMap xmap;
    int tiles;
    enum rt_status st;
    if (rows == 0)
        return RT_OK;
    RT_ASSERT(q->dev->encode_map != NULL && (g->row == NULL || gated));
    RT_TRY(rt_cuda_not_recorded(q, "a group of products", err));
    RT_TRY(rt_alloc(t.bytes, 1, "descriptors of a group of products", &host, err));
    RT_TRY(fill_table(q->dev, g, &t, host, &tiles, err));
    memset(&xmap, 0, sizeof xmap);
    if (g->row == NULL)
        RT_TRY(encode(q->dev, &xmap, g->x.data, rows, g->K, err));
    RT_TRY(rt_cuda_temp(q, t.bytes, &device, err));
    RT_CUDA_TRY(cudaMemcpyAsync(device, host, t.bytes, cudaMemcpyHostToDevice, q->stream)); /* pageable: read before it returns */
    memset(&p, 0, sizeof p);
    p.expert = (const struct expert *)(void *)(device + t.experts);
    p.wmap = (const CUtensorMap *)(void *)(device + t.maps);
    p.wscale = (const float *const *)(void *)(device + t.scales);
    p.xscale = g->x.scale;
    p.x = (const uint8_t *)g->x.data;
    p.row = (const int4 *)g->row;
    p.k = g->k;
    p.n_experts = g->n_experts;
    p.K = (int)g->K;
    p.N = (int)g->N;
    p.columns = (int)(g->N / (gated ? BN : 2 * BN));
    p.y = (__nv_bfloat16 *)g->y;
    p.ldy = g->ldy > 0 ? g->ldy : g->N;
    p.rows = g->rows > 0 ? g->rows : rows;
    p.accumulate = g->accumulate;
    p.hcode = (uint8_t *)g->hq.data;
    p.hscale = g->hq.scale;
    p.pow2 = g->pow2;
    if (g->row != NULL)
        st = launch<true, true>(q, &xmap, &p, tiles, err);
    else
        st = gated ? launch<true, false>(q, &xmap, &p, tiles, err) : launch<false, false>(q, &xmap, &p, tiles, err);
out:
    rt_cuda_temp_free(q, device);
    rt_free(host);
    return st;
}
