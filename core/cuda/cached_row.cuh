/* Rows of caches on the device (struct rt_cache_pages, core/backend.h). */
#ifndef RT_CORE_CUDA_CACHED_ROW_CUH
#define RT_CORE_CUDA_CACHED_ROW_CUH

#include "core/backend.h"
#include "core/cuda/vec8.cuh"

/* Queries, caches and angles of a put may be taken 16 bytes at a time. */
static inline bool put_aligned(const struct rt_rope_put_args *a)
{
    return vec8::aligned16(a->q) && vec8::aligned16(a->k_cache) && vec8::aligned16(a->v_cache) && vec8::aligned16(a->cos) && vec8::aligned16(a->sin);
}

__device__ __forceinline__ int64_t cached_row(const struct rt_cache_pages &p, int64_t capacity, int64_t slot, int pos)
{
    if (p.table == NULL)
        return slot * capacity + pos;
    return (int64_t)p.table[slot * (capacity / p.len) + pos / p.len] * p.len + pos % p.len;
}

#endif
