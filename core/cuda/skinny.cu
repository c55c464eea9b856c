/* Products of few rows with many weights (skinny.h).
 *
 * A block holds 128 rows of weights (of a gate and an up: 64 and 64) against 8 to 64 tokens, 16 rows a warp, and walks along the columns 128 bytes
 * of a weight row at a time, `stages` of them on their way through cp.async. Where a weight alone has too few rows to fill the GPU, the columns
 * are cut as well and a second kernel adds the parts in ascending order. Experts are rows of a table in device memory: one launch for all of them.
 *
 * Shared memory of a stage: weights [128][128 bytes], then tokens [8 * octets][x_row bytes], then the tokens' scales. 16-byte pieces lie where
 * eight consecutive lanes reach all 32 banks: piece c of row r at c ^ 4 (r odd) where rows have 128 bytes, at c ^ 1 (r odd) where they have 256.
 */
#include "core/cuda/skinny_product.h"

#include "core/cuda/mma.cuh"
#include "core/cuda/vec8.cuh"

namespace {

enum { THREADS = 256, TILE = 128, ROW = 128 /* bytes of a weight row in a stage */ };

typedef struct rt_skinny_group group;
typedef struct rt_skinny_product product;

/* Sizes by element bytes of weights (W) and tokens (X), and octets of tokens. */
template <int W, int X, int OCT>
struct sizes {
    enum {
        columns = ROW / W, x_row = columns * X, x_at = TILE * ROW, scale_at = x_at + OCT * 8 * x_row,
        stage = scale_at + (X == 1 ? OCT * 8 * 4 : 0),
        stages = OCT == 2 ? (x_row == 256 ? 4 : 5) : OCT == 4 ? 4 : (x_row == 256 ? 3 : 4),
        total = stage * stages
    };
};

template <class T>
__device__ __forceinline__ T pick(T const (&of)[3], int i)
{
    return i == 0 ? of[0] : i == 1 ? of[1] : of[2];
}

__device__ __forceinline__ uint32_t piece(int row, int c, int row_bytes)
{
    return (uint32_t)(row * row_bytes + ((row_bytes == 256 ? c ^ (row & 1) : c ^ ((row & 1) << 2)) << 4));
}

/* Where a thread's copies of weights come from: row and piece of each of its four. */
struct source {
    const uint8_t *w[4];
    int64_t row_bytes;
    int c16; /* its piece of every 128 bytes */
};

template <int W, int X, int OCT>
__device__ __forceinline__ void load_stage(const product &p, const group &e, const source &s, const int32_t *token, int chunk, uint32_t at)
{
    typedef sizes<W, X, OCT> Z;
    const int64_t off = (int64_t)chunk * ROW + s.c16 * 16;
    const bool valid = off < s.row_bytes;
    const int r0 = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < 4; i++)
        mma::copy16(at + piece(r0 + 32 * i, s.c16, ROW), valid ? s.w[i] + off : s.w[i], valid);
    const int pieces = Z::x_row / 16, octets = (e.rows + 7) / 8;
    const int64_t x_bytes = p.K * X, first = (int64_t)chunk * Z::x_row;
    for (int i = threadIdx.x; i < octets * 8 * pieces; i += THREADS) {
        const int r = i / pieces, c = i % pieces;
        const uint8_t *row = (const uint8_t *)p.x + (int64_t)token[r] * p.ldx * X;
        const bool in = first + c * 16 < x_bytes;
        mma::copy16(at + Z::x_at + piece(r, c, Z::x_row), in ? row + first + c * 16 : row, in);
    }
    if (X == 1 && (int)threadIdx.x < octets * 8)
        mma::copy4(at + Z::scale_at + threadIdx.x * 4, p.x_scale + chunk * p.x_scale_ld + token[threadIdx.x]);
}

/* sum += the 16 rows of this warp times the tokens of one stage, 64 bytes of the weights' rows. half: which 64. */
template <int W, int X, int OCT>
__device__ __forceinline__ void multiply(float (&sum)[OCT][4], uint32_t at, int half, int octets)
{
    typedef sizes<W, X, OCT> Z;
    enum { STEPS = W == 1 ? 4 : 2 }; /* products of 16 columns */
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16 + g;
    const uint4 w0 = mma::load16(at + piece(row, half * 4 + t, ROW)), w1 = mma::load16(at + piece(row + 8, half * 4 + t, ROW));
    const uint32_t r0[4] = {w0.x, w0.y, w0.z, w0.w}, r1[4] = {w1.x, w1.y, w1.z, w1.w};
    uint32_t a[STEPS][4];
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        if (W == 2) {
            a[i][0] = r0[2 * i % 4], a[i][1] = r1[2 * i % 4], a[i][2] = r0[(2 * i + 1) % 4], a[i][3] = r1[(2 * i + 1) % 4];
        } else if (X == 2) {
            mma::e4m3_to_bf16(r0[i], a[i][0], a[i][2]);
            mma::e4m3_to_bf16(r1[i], a[i][1], a[i][3]);
        } else {
            mma::e4m3_to_f16(r0[i], a[i][0], a[i][2]);
            mma::e4m3_to_f16(r1[i], a[i][1], a[i][3]);
        }
    }
#pragma unroll
    for (int o = 0; o < OCT; o++) {
        if (o >= octets)
            break;
        uint32_t b[8];
        const int token = 8 * o + g, c = Z::x_row == 256 ? half * 8 + t * 2 : half * 4 + t;
        const uint4 x0 = mma::load16(at + Z::x_at + piece(token, c, Z::x_row));
        const uint4 x1 = Z::x_row == 256 ? mma::load16(at + Z::x_at + piece(token, c + 1, Z::x_row)) : x0;
        const uint32_t x[8] = {x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w};
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (X == 1)
                mma::e4m3_to_f16(x[i], b[2 * i], b[2 * i + 1]);
            else
                b[2 * i] = x[2 * i], b[2 * i + 1] = x[2 * i + 1];
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (X == 1)
                mma::f16(sum[o], a[i][0], a[i][1], a[i][2], a[i][3], b[2 * i], b[2 * i + 1]);
            else
                mma::bf16(sum[o], a[i][0], a[i][1], a[i][2], a[i][3], b[2 * i], b[2 * i + 1]);
        }
    }
}

/* One stage into acc: E4M3 weights by way of the sum of these 128 columns, which takes their scales. */
template <int W, int X, int OCT>
__device__ __forceinline__ void compute(float (&acc)[OCT][4], uint32_t at, float w_scale, int octets)
{
    typedef sizes<W, X, OCT> Z;
    if (W == 2) {
        multiply<W, X, OCT>(acc, at, 0, octets);
        multiply<W, X, OCT>(acc, at, 1, octets);
        return;
    }
    float sum[OCT][4] = {};
    multiply<W, X, OCT>(sum, at, 0, octets);
    multiply<W, X, OCT>(sum, at, 1, octets);
#pragma unroll
    for (int o = 0; o < OCT; o++) {
        float s0 = w_scale, s1 = w_scale;
        if (X == 1 && o < octets) {
            float2 s;
            asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(s.x), "=f"(s.y)
                         : "r"(at + Z::scale_at + (8 * o + threadIdx.x % 4 * 2) * 4) : "memory");
            sum[o][0] *= s.x, sum[o][1] *= s.y, sum[o][2] *= s.x, sum[o][3] *= s.y;
        }
        acc[o][0] += sum[o][0] * s0, acc[o][1] += sum[o][1] * s1, acc[o][2] += sum[o][2] * s0, acc[o][3] += sum[o][3] * s1;
    }
}

__device__ __forceinline__ float silu_times(float g, float u)
{
    return g / (1.0f + __expf(-g)) * u;
}
__device__ __forceinline__ float bias_at(const void *bias, bool f32, int64_t i)
{
    return bias == NULL ? 0.0f : f32 ? ((const float *)bias)[i] : __bfloat162float(((const __nv_bfloat16 *)bias)[i]);
}

__device__ __forceinline__ void store(void *y, int64_t i, bool f32, bool accumulate, float v)
{
    if (f32)
        ((float *)y)[i] = accumulate ? ((float *)y)[i] + v : v;
    else
        ((__nv_bfloat16 *)y)[i] = __float2bfloat16_rn(accumulate ? __bfloat162float(((__nv_bfloat16 *)y)[i]) + v : v);
}

/* The tile's sums to memory by way of shared memory: tile [tokens][TILE + 4]. */
template <int OCT>
__device__ void finish(const product &p, const group &e, const float (&acc)[OCT][4], float *tile, int64_t n0, int split)
{
    enum { LD = TILE + 4 };
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, t = lane % 4 * 2;
#pragma unroll
    for (int o = 0; o < OCT; o++) {
        tile[(8 * o + t) * LD + row] = acc[o][0];
        tile[(8 * o + t + 1) * LD + row] = acc[o][1];
        tile[(8 * o + t) * LD + row + 8] = acc[o][2];
        tile[(8 * o + t + 1) * LD + row + 8] = acc[o][3];
    }
    __syncthreads();
    if (p.out == RT_SKINNY_SWIGLU) {
        for (int i = threadIdx.x; i < e.rows * 64; i += THREADS) {
            const int r = i / 64, c = i % 64;
            if (n0 + c < p.N)
                ((__nv_bfloat16 *)p.y)[(e.row0 + r) * p.ldy + n0 + c] =
                    __float2bfloat16_rn(silu_times(tile[r * LD + c], tile[r * LD + c + 64]));
        }
        return;
    }
    const bool pair = p.first != p.second; /* parts of gate and up: [I gate | I up] */
    for (int i = threadIdx.x; i < e.rows * TILE; i += THREADS) {
        const int r = i / TILE, c = i % TILE;
        const int64_t n = pair ? n0 + c % 64 : n0 + c;
        if (n >= p.N)
            continue;
        const float v = tile[r * LD + c];
        if (p.out == RT_SKINNY_PARTS)
            ((float *)p.y)[(split * p.parts_rows + e.row0 + r) * p.ldy + n + (pair && c >= 64 ? p.N : 0)] = v;
        else
            store(p.y, (e.row0 + r) * p.ldy + n, p.out == RT_SKINNY_F32, p.accumulate, v + bias_at(p.bias, p.bias_f32, n));
    }
}

/* grid: tiles * groups, splits */
template <int W, int X, int OCT>
__global__ void __launch_bounds__(THREADS, 2) skinny_kernel(const __grid_constant__ product p)
{
    typedef sizes<W, X, OCT> Z;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int32_t token[RT_SKINNY_MOST];
    const int which = p.groups_first ? blockIdx.x % p.n_groups : blockIdx.x / p.tiles;
    const int tile = p.groups_first ? blockIdx.x / p.n_groups : blockIdx.x % p.tiles;
    group e = p.groups != NULL ? p.groups[which] : p.one;
    if (p.groups == NULL) {
        e.row0 = which * RT_SKINNY_MOST;
        e.rows = min(p.one.rows - e.row0, (int)RT_SKINNY_MOST);
    }
    const bool pair = p.first != p.second;
    const int64_t n0 = (int64_t)tile * (pair ? 64 : TILE);
    if ((int)threadIdx.x < RT_SKINNY_MOST) {
        const int r = e.row0 + min((int)threadIdx.x, e.rows - 1);
        token[threadIdx.x] = p.perm != NULL ? p.perm[r] / p.k : r;
        if (p.inverse != NULL && tile == 0 && (int)threadIdx.x < e.rows)
            p.inverse[p.perm[r]] = r;
    }
    source s;
    s.row_bytes = p.K * W;
    s.c16 = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int64_t r = n0 + (pair ? threadIdx.x / 8 + 32 * i % 64 : threadIdx.x / 8 + 32 * i);
        s.w[i] = pick(e.w, i < 2 ? p.first : p.second) + (r < p.N ? r : p.N - 1) * s.row_bytes;
    }
    const int chunks = (int)((p.K + Z::columns - 1) / Z::columns), octets = (e.rows + 7) / 8;
    const int c0 = blockIdx.y * p.split_chunks, c1 = min(chunks, c0 + p.split_chunks);
    const float *scale = W == 1 ? pick(e.scale, threadIdx.x < THREADS / 2 ? p.first : p.second) + n0 / 128 * chunks : NULL;
    const uint32_t base = mma::shared_at(shared);
    float acc[OCT][4] = {}, next_scale = W == 1 && c0 < c1 ? scale[c0] : 0.0f;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Z::stages - 1; i++) {
        if (c0 + i < c1)
            load_stage<W, X, OCT>(p, e, s, token, c0 + i, base + i * Z::stage);
        mma::copies_commit();
    }
    int at = 0, to = Z::stages - 1;
    for (int c = c0; c < c1; c++) {
        const float w_scale = next_scale;
        mma::copies_wait<Z::stages - 2>();
        __syncthreads();
        if (c + Z::stages - 1 < c1)
            load_stage<W, X, OCT>(p, e, s, token, c + Z::stages - 1, base + to * Z::stage);
        mma::copies_commit();
        if (W == 1 && c + 1 < c1)
            next_scale = scale[c + 1];
        compute<W, X, OCT>(acc, base + at * Z::stage, w_scale, octets);
        at = at + 1 == Z::stages ? 0 : at + 1;
        to = to + 1 == Z::stages ? 0 : to + 1;
    }
    mma::copies_wait<0>();
    __syncthreads();
    finish<OCT>(p, e, acc, (float *)shared, n0, blockIdx.y);
}

/* y[r,n] (+)= sum of the parts in ascending order + bias[n]; or h = silu(gate) up of the sums */
__global__ void sum_parts_kernel(const float *__restrict__ parts, const __grid_constant__ product p, int64_t rows)
{
    const int64_t total = rows * p.N, ld = p.out == RT_SKINNY_SWIGLU ? 2 * p.N : p.N, part = rows * ld;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t r = i / p.N, n = i % p.N;
        const float *at = parts + r * ld + n;
        float v = 0, up = 0;
        for (int s = 0; s < p.splits; s++) {
            v += at[s * part];
            if (p.out == RT_SKINNY_SWIGLU)
                up += at[s * part + p.N];
        }
        if (p.out == RT_SKINNY_SWIGLU)
            ((__nv_bfloat16 *)p.y)[r * p.ldy + n] = __float2bfloat16_rn(silu_times(v, up));
        else
            store(p.y, r * p.ldy + n, p.out == RT_SKINNY_F32, p.accumulate, v + bias_at(p.bias, p.bias_f32, n));
    }
}

template <int W, int X, int OCT>
enum rt_status start(struct rt_queue *q, const product &p, struct rt_err *err)
{
    typedef sizes<W, X, OCT> Z;
    static_assert(Z::total >= OCT * 8 * (TILE + 4) * 4, "the tile of sums lies over the stages");
    static_assert(Z::total + RT_SKINNY_MOST * 4 <= 99 << 10, "what a block may have on compute capability 8.6, 8.9 and 12.0");
    enum rt_status st;
    RT_CUDA_TRY(cudaFuncSetAttribute(skinny_kernel<W, X, OCT>, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::total));
    skinny_kernel<W, X, OCT><<<dim3((unsigned)(p.tiles * p.n_groups), (unsigned)p.splits), THREADS, Z::total, q->stream>>>(p);
    st = rt_cuda_launched("skinny product", err);
out:
    return st;
}

template <int W, int X>
enum rt_status start_rows(struct rt_queue *q, const product &p, int rows, struct rt_err *err)
{
    return rows <= 16 ? start<W, X, 2>(q, p, err) : rows <= 32 ? start<W, X, 4>(q, p, err) : start<W, X, 8>(q, p, err);
}

/* rows: the most of a group */
enum rt_status start_types(struct rt_queue *q, const product &p, bool w8, int rows, struct rt_err *err)
{
    return !w8 ? start_rows<2, 2>(q, p, rows, err) : p.x_scale == NULL ? start_rows<1, 2>(q, p, rows, err) : start_rows<1, 1>(q, p, rows, err);
}

/* Into how many parts the columns of one weight are cut: so that its tiles fill the GPU twice, each part of 8 steps or more. */
void cut_columns(const struct rt_queue *q, product *p, bool w8)
{
    const int columns = w8 ? ROW : ROW / 2, chunks = (int)((p->K + columns - 1) / columns);
    int parts = 2 * q->dev->sm_count / p->tiles;
    parts = parts < chunks / 8 ? parts : chunks / 8;
    parts = parts > 1 ? parts : 1;
    p->split_chunks = (chunks + parts - 1) / parts;
    p->splits = (chunks + p->split_chunks - 1) / p->split_chunks;
}

}

enum rt_status rt_skinny_grouped(struct rt_queue *q, struct rt_skinny_product *p, bool w8, int rows, struct rt_err *err)
{
    const int tile = p->first != p->second ? TILE / 2 : TILE;
    p->tiles = (int)((p->N + tile - 1) / tile);
    p->splits = 1;
    p->split_chunks = INT32_MAX / 2;
    return start_types(q, *p, w8, rows, err);
}

enum rt_status rt_skinny_single(struct rt_queue *q, const struct rt_skinny_product *p, bool w8, struct rt_err *err)
{
    product parts = *p, sum = *p;
    void *sums = NULL;
    enum rt_status st;
    const int64_t rows = p->one.rows;
    const bool pair = p->first != p->second;
    const int tile = pair ? TILE / 2 : TILE, most = rows < RT_SKINNY_MOST ? (int)rows : (int)RT_SKINNY_MOST;
    parts.n_groups = (int)((rows + RT_SKINNY_MOST - 1) / RT_SKINNY_MOST);
    parts.groups_first = true;
    parts.tiles = (int)((p->N + tile - 1) / tile);
    cut_columns(q, &parts, w8);
    if (parts.splits == 1)
        return start_types(q, parts, w8, most, err);
    parts.out = RT_SKINNY_PARTS;
    parts.ldy = pair ? 2 * p->N : p->N;
    parts.parts_rows = rows;
    RT_TRY(rt_cuda_temp(q, (size_t)(parts.splits * rows * parts.ldy) * sizeof(float), &sums, err));
    parts.y = sums;
    RT_TRY(start_types(q, parts, w8, most, err));
    sum.splits = parts.splits;
    sum_parts_kernel<<<(unsigned)vec8::smaller((rows * p->N + 255) / 256, 8 * q->dev->sm_count), 256, 0, q->stream>>>((const float *)sums, sum, rows);
    st = rt_cuda_launched("sum of parts", err);
out:
    rt_cuda_temp_free(q, sums);
    return st;
}
