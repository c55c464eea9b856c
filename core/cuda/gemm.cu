/* What surrounds products: dequantisation, scales in another layout, bias, column sums. */
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "core/cuda/gemm_kernels.h"
#include "core/cuda/student_rows.h"

namespace {

enum { THREADS = 256, BLOCK = 128 /* columns of one scale */, WIDE = 16 /* codes of one 16-byte load */ };

unsigned blocks_for(int64_t items, int64_t each)
{
    const int64_t n = (items + each - 1) / each;
    return (unsigned)(n < 1 ? 1 : n > (1 << 30) ? 1 << 30 : n);
}

__device__ float e4m3(uint8_t code)
{
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

/* Two codes (the lower byte first) times scale, rounded to bfloat16. */
__device__ uint32_t pair(uint16_t codes, float scale)
{
    const __half2 h = __half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3));
    const float2 f = __half22float2(h);
    const __nv_bfloat162 r = __floats2bfloat162_rn(f.x * scale, f.y * scale);
    return *reinterpret_cast<const uint32_t *>(&r);
}

__device__ void store16(__nv_bfloat16 *out, uint4 v, float scale)
{
    uint4 lo, hi;
    lo.x = pair((uint16_t)v.x, scale);
    lo.y = pair((uint16_t)(v.x >> 16), scale);
    lo.z = pair((uint16_t)v.y, scale);
    lo.w = pair((uint16_t)(v.y >> 16), scale);
    hi.x = pair((uint16_t)v.z, scale);
    hi.y = pair((uint16_t)(v.z >> 16), scale);
    hi.z = pair((uint16_t)v.w, scale);
    hi.w = pair((uint16_t)(v.w >> 16), scale);
    reinterpret_cast<uint4 *>(out)[0] = lo;
    reinterpret_cast<uint4 *>(out)[1] = hi;
}

/* The scale of element (row, col): scale[(row / row_block) * row_step + (col / 128) * col_step]. A weight: row_block 128, row_step its blocks in
 * a row, col_step 1. An operand: row_block 1, row_step 1, col_step the distance of its rows of scales. */
struct scales {
    const float *at;
    int64_t row_step, col_step;
    int row_block;
};

__device__ float scale_of(const scales &s, int64_t row, int64_t col)
{
    return s.at[row / s.row_block * s.row_step + col / BLOCK * s.col_step];
}

/* cols % 16 == 0 and 16-byte aligned */
__global__ void __launch_bounds__(THREADS) dequant_wide(const uint8_t *__restrict__ codes, scales s, __nv_bfloat16 *__restrict__ out, int64_t row0,
                                                        int64_t rows, int64_t cols)
{
    const uint32_t in_row = (uint32_t)(cols / WIDE);
    const int64_t total = rows * in_row, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < total; i += step) {
        const int64_t row = i / in_row, col = (i - row * in_row) * WIDE;
        const uint4 v = __ldcs(reinterpret_cast<const uint4 *>(codes) + i);
        store16(out + i * WIDE, v, scale_of(s, row0 + row, col));
    }
}

__global__ void __launch_bounds__(THREADS) dequant_any(const uint8_t *__restrict__ codes, scales s, __nv_bfloat16 *__restrict__ out, int64_t row0,
                                                       int64_t rows, int64_t cols)
{
    const int64_t total = rows * cols, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < total; i += step) {
        const int64_t row = i / cols, col = i - row * cols;
        out[i] = __float2bfloat16_rn(e4m3(codes[i]) * scale_of(s, row0 + row, col));
    }
}

enum rt_status dequant(struct rt_queue *q, const uint8_t *codes, const scales &s, void *out, int64_t row0, int64_t rows, int64_t cols,
                       struct rt_err *err)
{
    if (rows <= 0 || cols <= 0)
        return RT_OK;
    const unsigned most = (unsigned)q->dev->sm_count * 32;
    const bool wide = cols % WIDE == 0 && ((uintptr_t)codes | (uintptr_t)out) % 16 == 0;
    const unsigned blocks = blocks_for(rows * cols, wide ? THREADS * WIDE : THREADS);
    if (wide)
        dequant_wide<<<blocks < most ? blocks : most, THREADS, 0, q->stream>>>(codes, s, (__nv_bfloat16 *)out, row0, rows, cols);
    else
        dequant_any<<<blocks < most ? blocks : most, THREADS, 0, q->stream>>>(codes, s, (__nv_bfloat16 *)out, row0, rows, cols);
    return rt_cuda_launched("dequant", err);
}

/* blockIdx.y: block of columns */
__global__ void __launch_bounds__(THREADS) copy_scales_kernel(const float *__restrict__ src, int64_t ld_src, float *__restrict__ dst, int64_t ld_dst,
                                                              int64_t rows, int64_t blocks)
{
    for (int64_t b = blockIdx.y; b < blocks; b += gridDim.y)
        for (int64_t r = (int64_t)blockIdx.x * THREADS + threadIdx.x; r < ld_dst; r += (int64_t)gridDim.x * THREADS)
            dst[b * ld_dst + r] = r < rows ? src[b * ld_src + r] : 0.0f;
}

__device__ float load(const void *p, bool f32, int64_t i)
{
    return f32 ? ((const float *)p)[i] : __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}

__device__ void store(void *p, bool f32, int64_t i, float v)
{
    if (f32)
        ((float *)p)[i] = v;
    else
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(v);
}

__global__ void __launch_bounds__(THREADS) fill_bias_kernel(void *y, bool y_f32, int64_t ldy, int64_t n, int64_t N, const void *bias, bool bias_f32,
                                                            bool accumulate)
{
    for (int64_t i = blockIdx.y; i < n; i += gridDim.y)
        for (int64_t j = (int64_t)blockIdx.x * THREADS + threadIdx.x; j < N; j += (int64_t)gridDim.x * THREADS)
            store(y, y_f32, i * ldy + j, load(bias, bias_f32, j) + (accumulate ? load(y, y_f32, i * ldy + j) : 0.0f));
}

/* ---- column sums: each block adds a chunk of rows, then rt_cuda_add_columns adds the chunks ---- */

enum { SUM_COLS = 32, SUM_LANES = 8, SUM_WIDE = 8 };

/* WIDTH columns a thread: 8 where rows are 16-byte aligned, else 1 */
template <int WIDTH>
__global__ void __launch_bounds__(SUM_COLS *SUM_LANES) chunk_sums(const __nv_bfloat16 *__restrict__ x, int64_t ldx, int64_t n, int64_t N,
                                                                  int64_t chunk, float *__restrict__ part)
{
    __shared__ float lanes[SUM_LANES][SUM_COLS * WIDTH];
    const int64_t col = ((int64_t)blockIdx.x * SUM_COLS + threadIdx.x) * WIDTH, first = (int64_t)blockIdx.y * chunk;
    const int64_t end = first + chunk < n ? first + chunk : n;
    float sum[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; j++)
        sum[j] = 0.0f;
    if (col < N)
#pragma unroll 4
        for (int64_t i = first + threadIdx.y; i < end; i += SUM_LANES) {
            if (WIDTH == SUM_WIDE) {
                const uint4 v = *reinterpret_cast<const uint4 *>(x + i * ldx + col);
                const __nv_bfloat162 *p = reinterpret_cast<const __nv_bfloat162 *>(&v);
#pragma unroll
                for (int j = 0; j < WIDTH / 2; j++) {
                    const float2 f = __bfloat1622float2(p[j]);
                    sum[2 * j] += f.x;
                    sum[2 * j + 1] += f.y;
                }
            } else {
                sum[0] += __bfloat162float(x[i * ldx + col]);
            }
        }
#pragma unroll
    for (int j = 0; j < WIDTH; j++)
        lanes[threadIdx.y][threadIdx.x * WIDTH + j] = sum[j];
    __syncthreads();
    for (int c = threadIdx.y * SUM_COLS + threadIdx.x; c < SUM_COLS * WIDTH; c += SUM_COLS * SUM_LANES) {
        const int64_t at = (int64_t)blockIdx.x * SUM_COLS * WIDTH + c;
        float total = 0.0f;
        for (int l = 0; l < SUM_LANES; l++)
            total += lanes[l][c];
        if (at < N)
            part[(int64_t)blockIdx.y * N + at] = total;
    }
}

}

enum rt_status rt_cuda_dequant(struct rt_queue *q, const struct rt_weight *w, int64_t row0, int64_t rows, void *out, struct rt_err *err)
{
    const scales s = {w->scale, (w->cols + BLOCK - 1) / BLOCK, 1, BLOCK};
    return dequant(q, (const uint8_t *)w->data + row0 * w->cols, s, out, row0, rows, w->cols, err);
}

enum rt_status rt_cuda_dequant_act(struct rt_queue *q, const struct rt_act *x, int64_t scale_ld, int64_t n, int64_t K, void *out, struct rt_err *err)
{
    const scales s = {x->scale, 1, scale_ld, 1};
    return dequant(q, (const uint8_t *)x->data, s, out, 0, n, K, err);
}

enum rt_status rt_cuda_copy_scales(struct rt_queue *q, const float *src, int64_t ld_src, float *dst, int64_t ld_dst, int64_t rows, int64_t blocks,
                                   struct rt_err *err)
{
    if (ld_dst <= 0 || blocks <= 0)
        return RT_OK;
    const dim3 grid(blocks_for(ld_dst, THREADS), (unsigned)(blocks < 65535 ? blocks : 65535));
    copy_scales_kernel<<<grid, THREADS, 0, q->stream>>>(src, ld_src, dst, ld_dst, rows, blocks);
    return rt_cuda_launched("copy_scales", err);
}

enum rt_status rt_cuda_fill_bias(struct rt_queue *q, void *y, bool y_f32, int64_t ldy, int64_t n, int64_t N, const void *bias, bool bias_f32,
                                 bool accumulate, struct rt_err *err)
{
    if (n <= 0 || N <= 0)
        return RT_OK;
    const dim3 grid(blocks_for(N, THREADS), (unsigned)(n < 65535 ? n : 65535));
    fill_bias_kernel<<<grid, THREADS, 0, q->stream>>>(y, y_f32, ldy, n, N, bias, bias_f32, accumulate);
    return rt_cuda_launched("fill_bias", err);
}

enum rt_status rt_cuda_column_sums(struct rt_queue *q, const void *x, int64_t ldx, int64_t n, int64_t N, void *out, bool first, struct rt_err *err)
{
    const bool wide = N % SUM_WIDE == 0 && ldx % SUM_WIDE == 0 && (uintptr_t)x % 16 == 0;
    const int64_t width = SUM_COLS * (wide ? SUM_WIDE : 1), tiles = (N + width - 1) / width;
    float *part = NULL;
    enum rt_status st;
    if (n <= 0 || N <= 0)
        return RT_OK;
    const int64_t chunk = rt_cuda_sum_rows(n, tiles), chunks = (n + chunk - 1) / chunk;
    const dim3 grid((unsigned)tiles, (unsigned)chunks), block(SUM_COLS, SUM_LANES);
    RT_TRY(rt_cuda_temp(q, (size_t)(chunks * N) * sizeof(float), &part, err));
    if (wide)
        chunk_sums<SUM_WIDE><<<grid, block, 0, q->stream>>>((const __nv_bfloat16 *)x, ldx, n, N, chunk, part);
    else
        chunk_sums<1><<<grid, block, 0, q->stream>>>((const __nv_bfloat16 *)x, ldx, n, N, chunk, part);
    RT_TRY(rt_cuda_launched("chunk_sums", err));
    RT_TRY(rt_cuda_add_columns(q, part, (int)chunks, N, out, first, err));
out:
    rt_cuda_temp_free(q, part);
    return st;
}
