/* Element-wise rows with an e4m3 form: quant, swiglu_fwd, and the gating of a group of experts (moe_rows.h).
 *
 * A block takes up to 256 vectors of 4 rows, each thread the same vector of all four: four or eight loads in flight, and the four scales of a
 * column block are one store of 16 bytes (rows of scales lie a multiple of 4 apart). Rows behind the last are written as zeros without reading.
 * Codes are made of the bf16-rounded value (quant.cuh).
 */
#include "core/cuda/cuda.h"
#include "core/cuda/moe_rows.h"
#include "core/cuda/quant.cuh"

namespace {

enum { ROWS = 4, SLOW_WARPS = 8 };

struct gate {
    const bf16 *x, *up;    /* up: swiglu alone */
    bf16 *h;               /* may be NULL */
    uint8_t *code;         /* may be NULL */
    float *scale;
    const int4 *group;     /* rows of a group (struct rt_cuda_moe_group), or NULL */
    int64_t n, rows, ld;   /* h has n rows; codes have `rows`, a multiple of 4 */
    int cols, turns;       /* turns: blocks that share 4 rows */
    bool pow2;
};

/* Where a row's scales begin, and how far apart they are. */
struct place {
    float *scale;
    int64_t ld;
    bool live;
};

__device__ __forceinline__ struct place place_of(const struct gate &p, int64_t row)
{
    struct place at;
    if (p.group != NULL) {
        const int4 g = __ldg(p.group + row);
        at.scale = p.scale + (int64_t)g.y * (p.cols / QBLOCK) + (row - g.y);
        at.ld = g.z;
        at.live = g.x >= 0;
    } else {
        at.scale = p.scale + row;
        at.ld = p.rows;
        at.live = row < p.n;
    }
    return at;
}

/* silu(g) * u */
__device__ __forceinline__ float gated(float g, float u)
{
    return __fdividef(g, 1.0f + __expf(-g)) * u;
}

template <bool GLU>
__device__ __forceinline__ void load_rows(const struct gate &p, int64_t row0, int c, unsigned live, uint4 (&x)[ROWS], uint4 (&u)[GLU ? ROWS : 1])
{
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int64_t at = (row0 + r) * p.ld + (int64_t)c * VEC;
        x[r] = live >> r & 1 ? load_stream(p.x + at) : make_uint4(0, 0, 0, 0);
        if (GLU)
            u[r] = live >> r & 1 ? load_stream(p.up + at) : make_uint4(0, 0, 0, 0);
    }
}

template <bool GLU, bool Q>
__global__ void __launch_bounds__(256) tile_kernel(const __grid_constant__ struct gate p)
{
    const unsigned tile = blockIdx.x / (unsigned)p.turns, turn = blockIdx.x - tile * (unsigned)p.turns;
    const int64_t row0 = (int64_t)tile * ROWS;
    const int nv = p.cols / VEC, c = (int)(turn * blockDim.x + threadIdx.x);
    unsigned live = 0;
    uint4 x[ROWS], u[GLU ? ROWS : 1];
    float scale[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        live |= (row0 + r < p.rows && place_of(p, row0 + r).live ? 1u : 0u) << r;
    const struct place at = place_of(p, row0);
    load_rows<GLU>(p, row0, c, c < nv ? live : 0, x, u);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float v[VEC], w[VEC];
        if (GLU) {
            unpack(x[r], v);
            unpack(u[r], w);
#pragma unroll
            for (int j = 0; j < VEC; j++)
                v[j] = gated(v[j], w[j]);
            x[r] = pack(v);
            if (p.h != NULL && c < nv && row0 + r < p.n)
                *(uint4 *)(p.h + (row0 + r) * p.cols + (int64_t)c * VEC) = x[r];
        }
        if (!Q)
            continue;
        unpack(x[r], v);
        const struct qscale q = quant_scale(block_amax(vector_amax(v)), p.pow2);
        scale[r] = live >> r & 1 ? q.s : 0.0f;
        if (c < nv)
            *(uint2 *)(p.code + (row0 + r) * p.cols + (int64_t)c * VEC) = code8(v, q); /* of zeros: zeros */
    }
    if (Q && c < nv && c % QLANES == 0)
        *(float4 *)(at.scale + (int64_t)(c / QLANES) * at.ld) = make_float4(scale[0], scale[1], scale[2], scale[3]);
}

/* Any width and alignment: a warp for each row and chunk of 128 columns, four single elements a thread. */
template <bool GLU>
__global__ void __launch_bounds__(32 * SLOW_WARPS) chunk_kernel(const __grid_constant__ struct gate p)
{
    const int64_t row = (int64_t)blockIdx.x * SLOW_WARPS + threadIdx.y;
    if (row >= p.rows)
        return;
    const struct place at = place_of(p, row);
    for (int c = 0; c < p.cols; c += QBLOCK) {
        float v[QBLOCK / 32], amax = 0;
#pragma unroll
        for (int i = 0; i < QBLOCK / 32; i++) {
            const int j = c + (int)threadIdx.x + 32 * i;
            const bool in = at.live && j < p.cols;
            v[i] = in ? __bfloat162float(p.x[row * p.ld + j]) : 0.0f;
            if (GLU)
                v[i] = in ? round_bf16(gated(v[i], __bfloat162float(p.up[row * p.ld + j]))) : 0.0f;
            if (p.h != NULL && row < p.n && j < p.cols)
                p.h[row * p.cols + j] = __float2bfloat16_rn(v[i]);
            amax = fmaxf(amax, fabsf(v[i]));
        }
        if (p.code == NULL)
            continue;
        const struct qscale q = quant_scale(warp_max(amax), p.pow2);
#pragma unroll
        for (int i = 0; i < QBLOCK / 32; i++)
            p.code[row * p.cols + c + threadIdx.x + 32 * i] = code1(v[i], q);
        if (threadIdx.x == 0)
            at.scale[(int64_t)(c / QBLOCK) * at.ld] = at.live ? q.s : 0.0f;
    }
}

template <bool GLU>
enum rt_status launch(struct gate p, const char *op, cudaStream_t stream, struct rt_err *err)
{
    const bool vectors = p.cols % VEC == 0 && p.ld % VEC == 0 && aligned16(p.x) && aligned16(p.up) && aligned16(p.h) && aligned16(p.code) &&
                         aligned16(p.scale);
    if (!vectors) {
        chunk_kernel<GLU><<<(unsigned)((p.rows + SLOW_WARPS - 1) / SLOW_WARPS), dim3(32, SLOW_WARPS), 0, stream>>>(p);
        return rt_cuda_launched(op, err);
    }
    const int nv = p.cols / VEC;
    p.turns = (nv + 255) / 256;
    const unsigned threads = (unsigned)(((nv + p.turns - 1) / p.turns + 31) / 32 * 32);
    const int64_t grid = (p.rows + ROWS - 1) / ROWS * p.turns;
    if (grid > INT32_MAX)
        return rt_fail(err, RT_SHAPE, "%s: %lld rows of %d columns", op, (long long)p.rows, p.cols);
    if (!GLU || p.code != NULL)
        tile_kernel<GLU, true><<<(unsigned)grid, threads, 0, stream>>>(p);
    else
        tile_kernel<true, false><<<(unsigned)grid, threads, 0, stream>>>(p);
    return rt_cuda_launched(op, err);
}

/* A warp a row; its second reading comes from the L2 or nearer. */
__global__ void __launch_bounds__(256) encode_rows_kernel(const float *__restrict__ x, uint8_t *__restrict__ code, float *__restrict__ scale, int64_t n, int64_t cols,
                                                          bool fours)
{
    const int lane = threadIdx.x % 32;
    for (int64_t i = (int64_t)blockIdx.x * 8 + threadIdx.x / 32; i < n; i += (int64_t)gridDim.x * 8) {
        const float *row = x + i * cols;
        uint8_t *to = code + i * cols;
        float amax = 1e-12f;
        if (fours)
            for (int64_t j = lane * 4; j < cols; j += 128) {
                const float4 v = *(const float4 *)(row + j);
                amax = fmaxf(fmaxf(amax, fmaxf(fabsf(v.x), fabsf(v.y))), fmaxf(fabsf(v.z), fabsf(v.w)));
            }
        else
            for (int64_t j = lane; j < cols; j += 32)
                amax = fmaxf(amax, fabsf(row[j]));
        const float s = __fdiv_rn(warp_max(amax), 448.0f);
        if (lane == 0)
            scale[i] = s;
        if (fours)
            for (int64_t j = lane * 4; j < cols; j += 128) {
                const float4 v = *(const float4 *)(row + j);
                *(uint32_t *)(to + j) = code2(__fdiv_rn(v.x, s), __fdiv_rn(v.y, s)) | code2(__fdiv_rn(v.z, s), __fdiv_rn(v.w, s)) << 16;
            }
        else
            for (int64_t j = lane; j < cols; j += 32)
                to[j] = (uint8_t)__nv_cvt_float_to_fp8(__fdiv_rn(row[j], s), __NV_SATFINITE, __NV_E4M3);
    }
}

enum rt_status check(const char *op, int64_t n, int64_t cols, bool quantised, struct rt_err *err)
{
    if (quantised && cols % QBLOCK != 0)
        return rt_fail(err, RT_SHAPE, "%s: %lld columns; the e4m3 form needs a multiple of %d", op, (long long)cols, (int)QBLOCK);
    if (cols < 1 || cols > INT32_MAX / 2 || n > INT32_MAX - ROWS)
        return rt_fail(err, RT_SHAPE, "%s: %lld rows of %lld columns", op, (long long)n, (long long)cols);
    return RT_OK;
}

}

enum rt_status rt_cuda_quant(struct rt_dev *, struct rt_queue *q, const struct rt_quant_args *a, struct rt_err *err)
{
    const enum rt_status st = check("quant", a->n, a->cols, true, err);
    if (st != RT_OK || a->n <= 0)
        return st;
    struct gate p = {};
    p.x = (const bf16 *)a->x;
    p.code = (uint8_t *)a->q.data;
    p.scale = a->q.scale;
    p.pow2 = a->pow2;
    p.n = a->n;
    p.rows = rt_act_rows(a->n);
    p.ld = ld_or(a->ldx, a->cols);
    p.cols = (int)a->cols;
    return launch<false>(p, "quant", q->stream, err);
}

enum rt_status rt_cuda_encode_rows(struct rt_dev *dev, struct rt_queue *q, const struct rt_encode_rows_args *a, struct rt_err *err)
{
    const int64_t blocks = (a->n + 7) / 8, most = (int64_t)dev->sm_count * 8;
    if (a->n <= 0)
        return RT_OK;
    const bool fours = a->cols % 4 == 0 && (uintptr_t)a->x % 16 == 0 && (uintptr_t)a->code % 4 == 0;
    encode_rows_kernel<<<(unsigned)(blocks < most ? blocks : most), 256, 0, q->stream>>>(a->x, a->code, a->scale, a->n, a->cols, fours);
    return rt_cuda_launched("encode_rows", err);
}

enum rt_status rt_cuda_swiglu_fwd(struct rt_dev *, struct rt_queue *q, const struct rt_swiglu_fwd_args *a, struct rt_err *err)
{
    const bool quantised = a->hq.data != NULL;
    const enum rt_status st = check("swiglu_fwd", a->n, a->I, quantised, err);
    if (st != RT_OK || a->n <= 0 || (a->h == NULL && !quantised))
        return st;
    struct gate p = {};
    p.x = (const bf16 *)a->gate;
    p.up = (const bf16 *)a->up;
    p.h = (bf16 *)a->h;
    p.code = (uint8_t *)a->hq.data;
    p.scale = a->hq.scale;
    p.pow2 = a->pow2;
    p.n = a->n;
    p.rows = quantised ? rt_act_rows(a->n) : a->n;
    p.ld = ld_or(a->ld, a->I);
    p.cols = (int)a->I;
    return launch<true>(p, "swiglu_fwd", q->stream, err);
}

enum rt_status rt_cuda_moe_swiglu(struct rt_queue *q, const struct rt_cuda_moe_group *g, const void *gate, const void *up, int64_t ld,
                                  struct rt_act h, int I, bool pow2, struct rt_err *err)
{
    const bool quantised = h.scale != NULL;
    const enum rt_status st = check("swiglu of a group of experts", g->rows, I, quantised, err);
    if (st != RT_OK || g->rows == 0)
        return st;
    struct gate p = {};
    p.x = (const bf16 *)gate;
    p.up = (const bf16 *)up;
    if (quantised)
        p.code = (uint8_t *)h.data;
    else
        p.h = (bf16 *)h.data;
    p.scale = h.scale;
    p.pow2 = pow2;
    p.group = (const int4 *)g->row;
    p.n = p.rows = g->rows;
    p.ld = ld_or(ld, I);
    p.cols = I;
    return launch<true>(p, "swiglu of a group of experts", q->stream, err);
}
