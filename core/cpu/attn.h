/* What the attention operations of the cpu backend share: checks, strided heads, blocks of queries.
 *
 * Scores are made in blocks of at most RT_ATTN_Q queries by RT_ATTN_K keys in the worker's tile, by products on the strided arrays
 * themselves; key blocks that lie wholly after the queries are never made.
 */
#ifndef RT_CORE_CPU_ATTN_H
#define RT_CORE_CPU_ATTN_H

#include "core/cpu/cpu.h"

enum {
    RT_ATTN_Q = 64,
    RT_ATTN_K = 512, /* 64 x 512 scores are 128 KiB: they stay in the second-level cache */
};

/* Rows of heads: element (row, head, j) at data[row * ld + head * head_ld + j]. */
struct rt_cpu_heads {
    float *data;
    int64_t ld, head_ld;
};

static inline struct rt_cpu_heads rt_cpu_heads(const void *data, int64_t ld, int64_t head_ld, int heads, int d)
{
    const int64_t h = head_ld != 0 ? head_ld : d;
    return (struct rt_cpu_heads){(float *)(uintptr_t)data, ld != 0 ? ld : heads * h, h};
}

static inline float *rt_cpu_head_at(struct rt_cpu_heads v, int64_t row, int64_t head)
{
    return v.data + row * v.ld + head * v.head_ld;
}

/* Queries in a block of a sequence of len tokens: equal blocks of at most RT_ATTN_Q, so that no sliver is left at the end. */
static inline int64_t rt_cpu_attn_rows(int64_t len)
{
    const int64_t blocks = rt_ceil_div(len, RT_ATTN_Q);
    return rt_min64(RT_ATTN_Q, rt_ceil_div(rt_ceil_div(len, blocks), 8) * 8);
}

/* Sequence boundaries and head counts; SHAPE. */
enum rt_status rt_cpu_attn_check(const struct rt_attn_shape *s, const char *op, struct rt_err *err);

#endif
