/* Rows of bf16 in 16-byte vectors: what the memory-bound kernels share. For .cu files alone. */
#ifndef RT_CORE_CUDA_ROWS_CUH
#define RT_CORE_CUDA_ROWS_CUH

#include "core/cuda/vec8.cuh"

namespace {

using vec8::aligned16;
using vec8::pack;
using vec8::unpack;
using vec8::warp_sum;

typedef __nv_bfloat16 bf16;
enum { VEC = 8 }; /* elements of a vector */

__device__ __forceinline__ float round_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

/* Read once, or written and not read again soon: the caches are for others. */
__device__ __forceinline__ uint4 load_stream(const uint4 *p) { return __ldcs(p); }
__device__ __forceinline__ uint16_t load_stream(const uint16_t *p) { return __ldcs(p); }
__device__ __forceinline__ uint4 load_stream(const bf16 *p) { return __ldcs((const uint4 *)p); }

__device__ __forceinline__ float warp_max(float v)
{
    for (int d = 16; d > 0; d >>= 1)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}

/* A row of nv vectors among `lanes` threads, a multiple of 32, each with at most `each` vectors (1 .. 4); `rows` rows a block, so that blockDim
 * is {lanes, rows}. each 0: the row is too long for one block. */
struct row_shape {
    unsigned lanes, rows;
    int each;
};

static inline struct row_shape row_shape_of(int64_t nv, int most_lanes)
{
    struct row_shape best = {0, 0, 0};
    int64_t least = INT64_MAX;
    nv = nv < 1 ? 1 : nv;
    for (int each = 1; each <= 4; each++) {
        const int64_t lanes = ((nv + each - 1) / each + 31) / 32 * 32;
        if (lanes > most_lanes || lanes * each > least)
            continue;
        least = lanes * each; /* the fewest idle places, then the most loads in flight */
        best.lanes = (unsigned)lanes;
        best.rows = lanes <= 128 ? (unsigned)(256 / lanes) : 1;
        best.each = each;
    }
    return best;
}

static inline int64_t ld_or(int64_t ld, int64_t dense)
{
    return ld != 0 ? ld : dense;
}

}

#endif
