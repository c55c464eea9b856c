/* Products of each head with its own rows of a weight (head_matmul): kv_b absorbed into queries and outputs.
 *
 * A block has one head, 64 tokens and 128 columns of the result, and walks along the summed index 64 at a time: while one step is multiplied, the
 * next one's tokens come through cp.async and its weights through registers, where E4M3 becomes BF16 (code times scale, rounded once). The order of
 * sums depends on d and R alone. Bytes: x, y, and the head's rows once for each 64 tokens (from the L2 cache after the first).
 */
#include "core/cuda/cuda.h"
#include "core/cuda/mma.cuh"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum { THREADS = 256, TOKENS = 64, COLUMNS = 128, STEP = 64, LD = STEP + 8 /* eight rows in eight places of 128 bytes */ };

struct work {
    const bf16 *x;
    bf16 *y;
    const void *w;
    const float *scale; /* E4M3 weights, else NULL */
    int64_t x_ld, x_head, y_ld, y_head, n, scale_cols;
    int head_rows, row0, d, R, token_tiles, column_tiles;
};

/* The weights of a step: [STEP][COLUMNS], or [COLUMNS][STEP] transposed; eight neighbours at a time, `PARTS` of them a thread. */
template <bool TRANSPOSE>
struct tile {
    enum { cols = TRANSPOSE ? STEP : COLUMNS, ld = cols + 8, rows = TRANSPOSE ? COLUMNS : STEP, PARTS = rows * cols / 8 / THREADS };
};

/* One weight as a float. */
__device__ __forceinline__ float weight_at(const work &a, int64_t row, int col)
{
    const int64_t at = row * a.R + col;
    uint32_t lo, hi;
    if (a.scale == NULL)
        return __bfloat162float(((const bf16 *)a.w)[at]);
    mma::e4m3_to_bf16(((const uint8_t *)a.w)[at], lo, hi);
    return __uint_as_float(lo << 16) * a.scale[row / 128 * a.scale_cols + col / 128];
}

/* Eight weights in a register on their way: as they are in memory. */
struct raw {
    uint4 v;
    float scale;
};
__device__ __forceinline__ raw fetch(const work &a, int64_t row, int col)
{
    const int64_t at = row * a.R + col;
    raw r;
    if (a.scale == NULL) {
        r.v = *(const uint4 *)(const void *)((const bf16 *)a.w + at);
        return r;
    }
    const uint2 codes = *(const uint2 *)(const void *)((const uint8_t *)a.w + at);
    r.v = make_uint4(codes.x, codes.y, 0, 0);
    r.scale = a.scale[row / 128 * a.scale_cols + col / 128];
    return r;
}
__device__ __forceinline__ uint32_t scaled(uint32_t pair, float scale)
{
    return mma::pack_bf16(__uint_as_float(pair << 16) * scale, __uint_as_float(pair & 0xffff0000u) * scale);
}
__device__ __forceinline__ uint4 widened(const work &a, const raw &r)
{
    uint4 v;
    if (a.scale == NULL)
        return r.v;
    mma::e4m3_to_bf16(r.v.x, v.x, v.y);
    mma::e4m3_to_bf16(r.v.y, v.z, v.w);
    return make_uint4(scaled(v.x, r.scale), scaled(v.y, r.scale), scaled(v.z, r.scale), scaled(v.w, r.scale));
}

/* The weights from (row, col) of the head's rows into registers; 0 outside. */
template <bool TRANSPOSE>
__device__ __forceinline__ void fetch_w(const work &a, raw (&w)[tile<TRANSPOSE>::PARTS], int head, int row, int col)
{
    typedef tile<TRANSPOSE> T;
#pragma unroll
    for (int i = 0; i < T::PARTS; i++) {
        const int at = i * THREADS + threadIdx.x, r = row + at / (T::cols / 8), c = col + at % (T::cols / 8) * 8;
        w[i].v = make_uint4(0, 0, 0, 0);
        w[i].scale = 0;
        if (r < a.d && c < a.R)
            w[i] = fetch(a, (int64_t)head * a.head_rows + a.row0 + r, c);
    }
}

/* 64 x 64 elements of x: tokens by the summed index; 0 outside. */
__device__ __forceinline__ void load_x(const work &a, uint32_t to, int head, int64_t token0, int k0, int K)
{
    for (int i = threadIdx.x; i < TOKENS * STEP / 8; i += THREADS) {
        const int r = i / (STEP / 8), c = i % (STEP / 8) * 8;
        const bool valid = token0 + r < a.n && k0 + c < K;
        mma::copy16(to + (r * LD + c) * 2, valid ? a.x + (token0 + r) * a.x_ld + head * a.x_head + k0 + c : a.x, valid);
    }
}

/* Both, element by element: sizes, distances and addresses that are no multiples of 8. */
template <bool TRANSPOSE>
__device__ __noinline__ void load_odd(const work &a, bf16 *xs, bf16 *ws, int head, int64_t token0, int n0, int k0, int K)
{
    typedef tile<TRANSPOSE> T;
    for (int i = threadIdx.x; i < TOKENS * STEP; i += THREADS) {
        const int r = i / STEP, c = i % STEP;
        xs[r * LD + c] = token0 + r < a.n && k0 + c < K ? a.x[(token0 + r) * a.x_ld + head * a.x_head + k0 + c] : __float2bfloat16_rn(0.0f);
    }
    for (int i = threadIdx.x; i < T::rows * T::cols; i += THREADS) {
        const int r = i / T::cols, c = i % T::cols, row = (TRANSPOSE ? n0 : k0) + r, col = (TRANSPOSE ? k0 : n0) + c;
        ws[r * T::ld + c] = __float2bfloat16_rn(row < a.d && col < a.R ? weight_at(a, (int64_t)head * a.head_rows + a.row0 + row, col) : 0.0f);
    }
}

/* acc += 16 tokens times 64 columns of a step. */
template <bool TRANSPOSE>
__device__ __forceinline__ void multiply(float (&acc)[8][4], const bf16 *xs, const bf16 *ws, int token, int column)
{
    typedef tile<TRANSPOSE> T;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < STEP; i += 16) {
        uint32_t x[4], b[4];
        mma::ldsm(x, mma::shared_at(xs + (token + (lane & 15)) * LD + i + (lane >> 4) * 8));
#pragma unroll
        for (int j = 0; j < 64; j += 16) {
            if (TRANSPOSE)
                mma::ldsm(b, mma::shared_at(ws + (column + j + (lane & 7) + (lane >> 4) * 8) * T::ld + i + (lane >> 3 & 1) * 8));
            else
                mma::ldsm_t(b, mma::shared_at(ws + (i + (lane & 15)) * T::ld + column + j + (lane >> 4) * 8));
            mma::bf16(acc[j / 8], x[0], x[1], x[2], x[3], b[0], b[1]);
            mma::bf16(acc[j / 8 + 1], x[0], x[1], x[2], x[3], b[2], b[3]);
        }
    }
}

/* The block's results by way of shared memory: ys [TOKENS][COLUMNS + 8]. */
template <bool VEC>
__device__ __forceinline__ void write(const work &a, const float (&acc)[8][4], bf16 *ys, int head, int64_t token0, int n0, int N, int token, int column)
{
    enum { LDY = COLUMNS + 8 };
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            bf16 *to = ys + (token + lane / 4 + i * 8) * LDY + column + j * 8 + lane % 4 * 2;
            *(uint32_t *)(void *)to = mma::pack_bf16(acc[j][2 * i], acc[j][2 * i + 1]);
        }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * COLUMNS / 8; i += THREADS) {
        const int r = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
        bf16 *to = a.y + (token0 + r) * a.y_ld + head * a.y_head + n0 + c;
        if (token0 + r >= a.n || n0 + c >= N)
            continue;
        if (VEC)
            *(uint4 *)(void *)to = *(const uint4 *)(const void *)(ys + r * LDY + c);
        else
            for (int j = 0; j < 8 && n0 + c + j < N; j++)
                to[j] = ys[r * LDY + c + j];
    }
}

/* grid: heads * token tiles * column tiles. VEC: eight elements at a time. */
template <bool TRANSPOSE, bool VEC>
__global__ void __launch_bounds__(THREADS) head_kernel(const __grid_constant__ work a)
{
    typedef tile<TRANSPOSE> T;
    __shared__ __align__(16) bf16 xs[2][TOKENS * LD], ws[T::rows * T::ld];
    static_assert(sizeof ws >= TOKENS * (COLUMNS + 8) * 2, "the results lie over the weights");
    const int head = blockIdx.x / a.column_tiles / a.token_tiles, n0 = blockIdx.x % a.column_tiles * COLUMNS, K = TRANSPOSE ? a.R : a.d;
    const int64_t token0 = (int64_t)(blockIdx.x / a.column_tiles % a.token_tiles) * TOKENS;
    const int token = threadIdx.x / 32 % 4 * 16, column = threadIdx.x / 128 * 64;
    float acc[8][4] = {};
    raw w[T::PARTS];
    if (VEC) {
        load_x(a, mma::shared_at(xs[0]), head, token0, 0, K);
        mma::copies_commit();
        fetch_w<TRANSPOSE>(a, w, head, TRANSPOSE ? n0 : 0, TRANSPOSE ? 0 : n0);
    }
    for (int k0 = 0; k0 < K; k0 += STEP) {
        const int now = VEC ? k0 / STEP % 2 : 0, next = k0 + STEP;
        if (VEC) {
#pragma unroll
            for (int i = 0; i < T::PARTS; i++) {
                const int at = i * THREADS + threadIdx.x;
                *(uint4 *)(void *)(ws + at / (T::cols / 8) * T::ld + at % (T::cols / 8) * 8) = widened(a, w[i]);
            }
            mma::copies_wait<0>();
        } else {
            load_odd<TRANSPOSE>(a, xs[0], ws, head, token0, n0, k0, K);
        }
        __syncthreads();
        if (VEC && next < K) {
            load_x(a, mma::shared_at(xs[~now & 1]), head, token0, next, K);
            mma::copies_commit();
            fetch_w<TRANSPOSE>(a, w, head, TRANSPOSE ? n0 : next, TRANSPOSE ? next : n0);
        }
        multiply<TRANSPOSE>(acc, xs[now], ws, token, column);
        __syncthreads();
    }
    write<VEC>(a, acc, ws, head, token0, n0, TRANSPOSE ? a.d : a.R, token, column);
}

template <bool TRANSPOSE>
void start(struct rt_queue *q, const work &w, bool vec, int nh)
{
    const unsigned blocks = (unsigned)((int64_t)nh * w.token_tiles * w.column_tiles);
    if (vec)
        head_kernel<TRANSPOSE, true><<<blocks, THREADS, 0, q->stream>>>(w);
    else
        head_kernel<TRANSPOSE, false><<<blocks, THREADS, 0, q->stream>>>(w);
}

}

enum rt_status rt_cuda_head_matmul(struct rt_dev *, struct rt_queue *q, const struct rt_head_matmul_args *a, struct rt_err *err)
{
    const int64_t dx = a->transpose ? a->R : a->d, dy = a->transpose ? a->d : a->R;
    work w = {};
    if (a->w->rows != (int64_t)a->nh * a->head_rows || a->w->cols != a->R)
        return rt_fail(err, RT_SHAPE, "head_matmul: a weight of %lld x %lld, expected %lld x %d", (long long)a->w->rows, (long long)a->w->cols,
                       (long long)a->nh * a->head_rows, a->R);
    if (a->row0 < 0 || a->d < 0 || a->row0 + a->d > a->head_rows)
        return rt_fail(err, RT_SHAPE, "head_matmul: rows %d .. %d of a head that has %d", a->row0, a->row0 + a->d, a->head_rows);
    if (a->w->dtype != RT_BF16 && a->w->dtype != RT_E4M3)
        return rt_fail(err, RT_UNSUPPORTED, "head_matmul: a weight of type %s; expected BF16 or F8_E4M3", rt_dtype_name(a->w->dtype));
    if (a->n < 1 || a->nh < 1 || dy < 1)
        return RT_OK;
    w.x = (const bf16 *)a->x;
    w.y = (bf16 *)a->y;
    w.w = a->w->data;
    w.scale = a->w->dtype == RT_E4M3 ? a->w->scale : NULL;
    w.scale_cols = (a->R + 127) / 128;
    w.x_head = a->x_head != 0 ? a->x_head : dx;
    w.y_head = a->y_head != 0 ? a->y_head : dy;
    w.x_ld = a->x_ld != 0 ? a->x_ld : a->nh * w.x_head;
    w.y_ld = a->y_ld != 0 ? a->y_ld : a->nh * w.y_head;
    w.n = a->n;
    w.head_rows = a->head_rows;
    w.row0 = a->row0;
    w.d = a->d;
    w.R = a->R;
    w.token_tiles = (int)((a->n + TOKENS - 1) / TOKENS);
    w.column_tiles = (int)((dy + COLUMNS - 1) / COLUMNS);
    const bool vec = (a->d | a->R | w.x_head | w.y_head | w.x_ld | w.y_ld) % 8 == 0 && vec8::aligned16(a->x) && vec8::aligned16(a->y) &&
                     vec8::aligned16(w.w);
    if (a->transpose)
        start<true>(q, w, vec, a->nh);
    else
        start<false>(q, w, vec, a->nh);
    return rt_cuda_launched("products of heads", err);
}
