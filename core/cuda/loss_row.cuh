/* What the row kernels of the losses share: running log-sum-exp of a row that a block walks in eights.
 *
 * Sums are kept in base 2: exp(z) = 2^(z log2 e), with the hardware's 2^x (relative error 2^-22). A thread's maximum moves rarely, and its sums
 * are scaled when it does. Everything is combined in fixed order.
 */
#ifndef RT_CORE_CUDA_LOSS_ROW_CUH
#define RT_CORE_CUDA_LOSS_ROW_CUH

#include <cuda_fp16.h>
#include <float.h>
#include <math_constants.h>

#include "core/cuda/vec8.cuh"

namespace loss_row {

#define LOG2E 1.4426950408889634f

__device__ inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* max of some z; sums of exp(z - max) and of exp((z - max) / T); the smallest id that has the maximum. Empty: max -inf. */
struct stat {
    float max, sum, sum_T;
    int32_t best;
};

__device__ inline struct stat empty(void)
{
    const struct stat s = {-CUDART_INF_F, 0, 0, INT32_MAX};
    return s;
}

/* Eight values, ids first .. first + 7. scale: log2 e / T. TWO: sum_T too. */
template <bool TWO> __device__ inline void add8(struct stat *s, const float z[8], int32_t first, float scale)
{
    float top = z[0];
#pragma unroll
    for (int i = 1; i < 8; i++)
        top = fmaxf(top, z[i]);
    if (top > s->max) {
        s->sum *= exp2_fast((s->max - top) * LOG2E);
        if (TWO)
            s->sum_T *= exp2_fast((s->max - top) * scale);
        s->max = top;
#pragma unroll
        for (int i = 7; i >= 0; i--)
            s->best = z[i] == top ? first + i : s->best;
    }
    if (s->max == -CUDART_INF_F && top == -CUDART_INF_F)
        return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        s->sum += exp2_fast((z[i] - s->max) * LOG2E);
        if (TWO)
            s->sum_T += exp2_fast((z[i] - s->max) * scale);
    }
}

__device__ inline struct stat join(const struct stat &a, const struct stat &b, float scale)
{
    if (a.max == -CUDART_INF_F)
        return b;
    if (b.max == -CUDART_INF_F)
        return a;
    struct stat s;
    s.max = fmaxf(a.max, b.max);
    const float fa = a.max - s.max, fb = b.max - s.max;
    s.sum = a.sum * exp2_fast(fa * LOG2E) + b.sum * exp2_fast(fb * LOG2E);
    s.sum_T = a.sum_T * exp2_fast(fa * scale) + b.sum_T * exp2_fast(fb * scale);
    s.best = a.max > b.max ? a.best : b.max > a.max ? b.best : min(a.best, b.best);
    return s;
}

/* Over the block, to all threads. slot [33] shared. */
__device__ inline struct stat block_join(struct stat s, struct stat *slot, float scale)
{
    for (int d = 1; d < 32; d *= 2) {
        struct stat o;
        o.max = __shfl_xor_sync(0xffffffffu, s.max, d);
        o.sum = __shfl_xor_sync(0xffffffffu, s.sum, d);
        o.sum_T = __shfl_xor_sync(0xffffffffu, s.sum_T, d);
        o.best = __shfl_xor_sync(0xffffffffu, s.best, d);
        s = (threadIdx.x & d) == 0 ? join(s, o, scale) : join(o, s, scale);
    }
    if (threadIdx.x % 32 == 0)
        slot[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned w = 1; w < blockDim.x / 32; w++)
            s = join(s, slot[w], scale);
        slot[32] = s;
    }
    __syncthreads();
    s = slot[32];
    __syncthreads();
    return s;
}

/* log sum exp(z / T) from its parts; -inf for none. */
__device__ inline double lse_of(float max, float sum, double inv_T)
{
    return max == -CUDART_INF_F ? -CUDART_INF : (double)max * inv_T + log((double)sum);
}

template <class Z> __device__ inline void widen(const uint4 &v, float x[8]);
template <> __device__ inline void widen<__nv_bfloat16>(const uint4 &v, float x[8]) { vec8::unpack(v, x); }
template <> __device__ inline void widen<__half>(const uint4 &v, float x[8])
{
    const uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 f = __half22float2(*(const __half2 *)(const void *)&u[i]);
        x[2 * i] = f.x;
        x[2 * i + 1] = f.y;
    }
}

/* The first `cached` elements (of two bytes, a multiple of 8) of the row stay in shared memory; a thread finds there what it put there. */
struct cache {
    uint4 *at;
    int64_t cached;
};

/* Elements at .. at + 7 of a row of V; -inf behind its end. AGAIN: for the second time. */
template <bool AGAIN, class Z> __device__ inline void load_row(const Z *z, int64_t at, int64_t V, const struct cache &c, float x[8])
{
    if constexpr (sizeof(Z) == 2) {
        uint4 v;
        if (AGAIN && at < c.cached) {
            v = c.at[at / 8];
        } else {
            v = *(const uint4 *)(const void *)(z + at);
            if (at < c.cached)
                c.at[at / 8] = v;
        }
        widen<Z>(v, x);
    } else {
        vec8::load<8>(z + at, x);
    }
    if (at + 8 > V)
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = at + i < V ? x[i] : -CUDART_INF_F;
}

__device__ inline void set_element(float *p, float x) { *p = x; }
__device__ inline void set_element(__nv_bfloat16 *p, float x) { *p = __float2bfloat16_rn(x); }
__device__ inline void set_element(__half *p, float x) { *p = __float2half_rn(x); }
__device__ inline float element(const __half *p) { return __half2float(*p); }
__device__ inline float element(const float *p) { return *p; }
__device__ inline float element(const __nv_bfloat16 *p) { return __bfloat162float(*p); }

}

#endif
