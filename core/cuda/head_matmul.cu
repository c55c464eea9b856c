/* Products of each head with its own rows of a weight (head_matmul): kv_b absorbed into queries and outputs.
 *
 * A block has one head, 64 tokens and 64 columns of the result, and walks along the summed index 64 at a time; E4M3 weights become BF16 on their
 * way into shared memory (code times scale, rounded once). The order of sums depends on d and R alone. Bytes: x, y and the head's rows once for
 * each 64 tokens (from the L2 cache after the first).
 */
#include "core/cuda/cuda.h"
#include "core/cuda/mma.cuh"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

enum { THREADS = 128, TOKENS = 64, COLUMNS = 64, STEP = 64, LD = STEP + 8 /* eight rows in eight places of 128 bytes */ };

struct work {
    const bf16 *x;
    bf16 *y;
    const void *w;
    const float *scale; /* E4M3 weights, else NULL */
    int64_t x_ld, x_head, y_ld, y_head, n, scale_cols;
    int head_rows, row0, d, R, token_tiles, column_tiles;
    bool vec;           /* eight elements at a time: everything is a multiple of 8 and aligned */
};

/* N elements of the weight as floats. */
template <int N>
__device__ __forceinline__ void weight_at(const work &a, int64_t row, int col, float v[N])
{
    const int64_t at = row * a.R + col;
    if (a.scale == NULL) {
        vec8::load<N>((const bf16 *)a.w + at, v);
        return;
    }
    const float scale = a.scale[row / 128 * a.scale_cols + col / 128];
    const uint8_t *code = (const uint8_t *)a.w + at;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        uint32_t lo, hi;
        mma::e4m3_to_bf16(N == 8 ? ((const uint32_t *)(const void *)code)[i / 4] : (uint32_t)code[0], lo, hi);
        const uint32_t pair[2] = {lo, hi};
#pragma unroll
        for (int j = i; j < N && j < i + 4; j++)
            v[j] = __uint_as_float(j & 1 ? pair[j / 2 % 2] & 0xffff0000u : pair[j / 2 % 2] << 16) * scale;
    }
}

/* 64 x 64 elements of x: tokens by the summed index; 0 outside. */
template <int N>
__device__ __forceinline__ void load_x(const work &a, bf16 *to, int head, int64_t token0, int k0, int K)
{
    for (int i = threadIdx.x; i < TOKENS * STEP / N; i += THREADS) {
        const int r = i / (STEP / N), c = i % (STEP / N) * N;
        float v[N] = {};
        if (token0 + r < a.n && k0 + c < K)
            vec8::load<N>(a.x + (token0 + r) * a.x_ld + head * a.x_head + k0 + c, v);
        vec8::store<N>(to + r * LD + c, v);
    }
}

/* 64 x 64 elements of the head's rows, from (row, col); 0 outside. */
template <int N>
__device__ __forceinline__ void load_w(const work &a, bf16 *to, int head, int row, int col)
{
    for (int i = threadIdx.x; i < 64 * 64 / N; i += THREADS) {
        const int r = i / (64 / N), c = i % (64 / N) * N;
        float v[N] = {};
        if (row + r < a.d && col + c < a.R)
            weight_at<N>(a, (int64_t)head * a.head_rows + a.row0 + row + r, col + c, v);
        vec8::store<N>(to + r * LD + c, v);
    }
}

/* grid: heads * token tiles * column tiles */
template <bool TRANSPOSE>
__global__ void __launch_bounds__(THREADS) head_kernel(const __grid_constant__ work a)
{
    __shared__ __align__(16) bf16 xs[TOKENS * LD], ws[64 * LD];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = blockIdx.x % a.column_tiles;
    const int head = blockIdx.x / a.column_tiles / a.token_tiles, n0 = tile * COLUMNS, K = TRANSPOSE ? a.R : a.d, N = TRANSPOSE ? a.d : a.R;
    const int64_t token0 = (int64_t)(blockIdx.x / a.column_tiles % a.token_tiles) * TOKENS;
    float acc[8][4] = {};
    for (int k0 = 0; k0 < K; k0 += STEP) {
        __syncthreads();
        if (a.vec) {
            load_x<8>(a, xs, head, token0, k0, K);
            load_w<8>(a, ws, head, TRANSPOSE ? n0 : k0, TRANSPOSE ? k0 : n0);
        } else {
            load_x<1>(a, xs, head, token0, k0, K);
            load_w<1>(a, ws, head, TRANSPOSE ? n0 : k0, TRANSPOSE ? k0 : n0);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STEP; i += 16) {
            uint32_t x[4], b[4];
            mma::ldsm(x, mma::shared_at(xs + (warp * 16 + (lane & 15)) * LD + i + (lane >> 4) * 8));
#pragma unroll
            for (int j = 0; j < COLUMNS; j += 16) {
                if (TRANSPOSE)
                    mma::ldsm(b, mma::shared_at(ws + (j + (lane & 7) + (lane >> 4) * 8) * LD + i + (lane >> 3 & 1) * 8));
                else
                    mma::ldsm_t(b, mma::shared_at(ws + (i + (lane & 15)) * LD + j + (lane >> 4) * 8));
                mma::bf16(acc[j / 8], x[0], x[1], x[2], x[3], b[0], b[1]);
                mma::bf16(acc[j / 8 + 1], x[0], x[1], x[2], x[3], b[2], b[3]);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            xs[(warp * 16 + lane / 4 + i / 2 * 8) * LD + j * 8 + lane % 4 * 2 + i % 2] = __float2bfloat16_rn(acc[j][i]);
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * COLUMNS / 8; i += THREADS) {
        const int r = i / 8, c = i % 8 * 8;
        bf16 *to = a.y + (token0 + r) * a.y_ld + head * a.y_head + n0 + c;
        if (token0 + r >= a.n || n0 + c >= N)
            continue;
        if (a.vec)
            *(uint4 *)(void *)to = *(const uint4 *)(const void *)(xs + r * LD + c);
        else
            for (int j = 0; j < 8 && n0 + c + j < N; j++)
                to[j] = xs[r * LD + c + j];
    }
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
    w.vec = (a->d | a->R | w.x_head | w.y_head | w.x_ld | w.y_ld) % 8 == 0 && vec8::aligned16(a->x) && vec8::aligned16(a->y) && vec8::aligned16(w.w);
    const unsigned blocks = (unsigned)((int64_t)a->nh * w.token_tiles * w.column_tiles);
    if (a->transpose)
        head_kernel<true><<<blocks, THREADS, 0, q->stream>>>(w);
    else
        head_kernel<false><<<blocks, THREADS, 0, q->stream>>>(w);
    return rt_cuda_launched("products of heads", err);
}
