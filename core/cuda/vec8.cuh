/* Device helpers of kernels that work on rows of bfloat16: eight elements at a time, sums over warps and blocks in fixed order. */
#ifndef RT_CORE_CUDA_VEC8_CUH
#define RT_CORE_CUDA_VEC8_CUH

#include <cuda_bf16.h>
#include <stdint.h>

#include "core/cuda/cuda.h"

namespace vec8 {

/* 16 bytes of bfloat16 as floats. */
__device__ inline void unpack(const uint4 &v, float x[8])
{
    const uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(u[i] << 16);
        x[2 * i + 1] = __uint_as_float(u[i] & 0xffff0000u);
    }
}

__device__ inline uint32_t pack2(float lo, float hi)
{
    const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
    return *(const uint32_t *)(const void *)&h;
}

__device__ inline uint4 pack(const float x[8])
{
    return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}

/* Eight ones. */
__device__ inline uint4 ones()
{
    return make_uint4(0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80);
}

/* a / b as a division rounds it, from about 1/b: one step of refinement (Markstein 1990, section 3). The signs are such that -0 stays -0. */
__device__ __forceinline__ float divided(float a, float b, float inverse)
{
    const float first = a * inverse;
    return fmaf(-fmaf(first, b, -a), inverse, first);
}

/* N = 8: p is 16-byte aligned. N = 1: one element. */
template <int N> __device__ inline void load(const __nv_bfloat16 *p, float x[N])
{
    if constexpr (N == 8)
        unpack(*(const uint4 *)(const void *)p, x);
    else
        x[0] = __bfloat162float(*p);
}
template <int N> __device__ inline void load(const float *p, float x[N])
{
    if constexpr (N == 8) {
        const float4 a = ((const float4 *)(const void *)p)[0], b = ((const float4 *)(const void *)p)[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        x[0] = *p;
    }
}
template <int N> __device__ inline void store(__nv_bfloat16 *p, const float x[N])
{
    if constexpr (N == 8)
        *(uint4 *)(void *)p = pack(x);
    else
        *p = __float2bfloat16_rn(x[0]);
}

/* N elements as they lie in memory: what is on its way takes no more registers than that. */
template <int N> struct packed {
    uint4 v;
    __device__ void unpack(float x[N]) const { vec8::unpack(v, x); }
};
template <> struct packed<1> {
    __nv_bfloat16 v;
    __device__ void unpack(float x[1]) const { x[0] = __bfloat162float(v); }
};
template <int N> __device__ inline struct packed<N> load_packed(const __nv_bfloat16 *p)
{
    return *(const struct packed<N> *)(const void *)p;
}

/* A vector that is a weight: BF16 parameters, or F32 as files have them. */
struct vector {
    const void *data;
    bool f32;
};
static inline struct vector vector_of(const struct rt_weight *w)
{
    const struct vector v = {w != NULL ? w->data : NULL, w != NULL && w->dtype == RT_F32};
    return v;
}
template <int N> __device__ inline void load_vector(struct vector w, int64_t at, float x[N])
{
    if (w.f32)
        load<N>((const float *)w.data + at, x);
    else
        load<N>((const __nv_bfloat16 *)w.data + at, x);
}

/* Over `width` lanes (a power of two), to all of them. */
template <class T> __device__ inline T warp_sum(T x, int width = 32)
{
    for (int d = width / 2; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

/* Over the block, to all threads: warps in ascending order. slot [32] in shared memory; the caller alternates between two of them, so that one
 * barrier is enough. */
template <class T> __device__ inline T block_sum(T x, T *slot)
{
    const int warps = (int)(blockDim.x + 31) / 32;
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0)
        slot[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = slot[0];
    for (int i = 1; i < warps; i++)
        sum += slot[i];
    return sum;
}

static inline bool aligned16(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

__host__ __device__ static inline int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Blocks that an SM holds at once: a grid of that many a SM runs in one wave, with one row of partial sums a block. */
static inline int resident(const void *kernel, int threads, size_t shared)
{
    int n = 0;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, threads, shared) == cudaSuccess && n > 0 ? n : 1;
}

static inline unsigned blocks_for(const struct rt_dev *dev, int64_t work, int per_block, int most_per_sm)
{
    const int64_t blocks = (work + per_block - 1) / per_block;
    return (unsigned)smaller(blocks, (int64_t)dev->sm_count * most_per_sm);
}

}

#endif
