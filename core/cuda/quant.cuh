/* The e4m3 form of activations on the device: blocks of 128 columns, scale = max(amax, 1e-12)/448, code = rne(x / scale). Bit for bit what the
 * reference makes of the same x. For .cu files alone.
 *
 * With pow2 the scale is the least power of two that is not below that.
 *
 * Operations that make a row and its e4m3 form (norm_fwd, swiglu_fwd) make the codes of the row rounded to bf16, whether the row is stored or
 * not: what a product sees does not depend on which outputs were asked for.
 */
#ifndef RT_CORE_CUDA_QUANT_CUH
#define RT_CORE_CUDA_QUANT_CUH

#include <cuda_fp8.h>

#include "core/cuda/rows.cuh"

namespace {

enum { QBLOCK = 128, QLANES = QBLOCK / VEC }; /* threads that share a block, a vector each */

struct qscale {
    float s, inverse; /* inverse: to within an ulp */
};

/* Quotients are vec8::divided, which for a of bf16 and b = 448 or amax/448 was checked against all pairs of mantissas, with the inverse up to 3 ulps off;
 * where a remainder leaves the range of normal numbers the code is 0 anyway. */

/* amax: the absolute value of a bf16 number. pow2: the least power of two that is not below amax/448. */
__device__ __forceinline__ struct qscale quant_scale(float amax, bool pow2)
{
    struct qscale q;
    q.s = vec8::divided(fmaxf(amax, 1e-12f), 448.0f, 1.0f / 448.0f);
    if (pow2)
        q.s = __uint_as_float((__float_as_uint(q.s) + 0x7fffff) & 0x7f800000);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(q.inverse) : "f"(q.s));
    return q;
}

/* x / s */
__device__ __forceinline__ float quotient(float x, const struct qscale &q)
{
    return vec8::divided(x, q.s, q.inverse);
}

__device__ __forceinline__ uint32_t code2(float low, float high)
{
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint8_t code1(float x, const struct qscale &q)
{
    return (uint8_t)__nv_cvt_float_to_fp8(quotient(x, q), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint2 code8(const float (&x)[VEC], const struct qscale &q)
{
    uint32_t c[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        c[i] = code2(quotient(x[2 * i], q), quotient(x[2 * i + 1], q));
    return make_uint2(c[0] | c[1] << 16, c[2] | c[3] << 16);
}

__device__ __forceinline__ float vector_amax(const float (&x)[VEC])
{
    float m = 0;
#pragma unroll
    for (int i = 0; i < VEC; i++)
        m = fmaxf(m, fabsf(x[i]));
    return m;
}

/* Of the QLANES threads that share a block; every thread of the warp calls it. */
__device__ __forceinline__ float block_amax(float m)
{
#pragma unroll
    for (int d = QLANES / 2; d > 0; d >>= 1)
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, d));
    return m;
}

}

#endif
