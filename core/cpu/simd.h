/* SIMD in plain C: loops that the compiler vectorises, compiled once for each instruction set and chosen at load.
 *
 *     RT_SIMD void kernel(...) { for (...) y[i] = rt_exp(x[i]); }
 *
 * Helpers are always_inline, so they take the instruction set of the kernel they are in. A reduction needs explicit lanes
 * (struct rt_lanes, or float acc[16]), since without -ffast-math the compiler keeps the order of additions.
 */
#ifndef RT_CORE_CPU_SIMD_H
#define RT_CORE_CPU_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Function multiversioning goes through ifuncs, whose resolvers run before a sanitizer is ready. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define RT_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RT_SIMD
#endif
#define RT_INLINE static inline __attribute__((always_inline))

/* Vector types are only met inside always_inline helpers: no ABI is at stake. */
#pragma GCC diagnostic ignored "-Wpsabi"

/* 16 floats; lowered to narrower registers where there are none so wide. */
typedef float rt_v16 __attribute__((vector_size(64)));

RT_INLINE rt_v16 rt_v16_load(const float *p)
{
    rt_v16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

RT_INLINE void rt_v16_store(float *p, const rt_v16 *v)
{
    memcpy(p, v, sizeof *v);
}

/* First n (< 16) floats, others 0. */
RT_INLINE rt_v16 rt_v16_load_n(const float *p, int64_t n)
{
    float t[16] = {0};
    memcpy(t, p, (size_t)n * sizeof *t);
    return rt_v16_load(t);
}

/* Halves of a vector: narrower ones, so that a tree over lanes stays in registers. */
typedef float rt_v8 __attribute__((vector_size(32)));
typedef float rt_v4 __attribute__((vector_size(16)));

/* Sum in a fixed tree. */
RT_INLINE float rt_v16_sum(const rt_v16 *v)
{
    rt_v8 a[2];
    rt_v4 b[2];
    memcpy(a, v, sizeof a);
    a[0] += a[1];
    memcpy(b, &a[0], sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

/* Sum of n floats, sum of products: 16 lanes in a fixed order. */
RT_INLINE float rt_sum(const float *x, int64_t n)
{
    rt_v16 acc = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        acc += rt_v16_load(x + i);
    if (i < n)
        acc += rt_v16_load_n(x + i, n - i);
    return rt_v16_sum(&acc);
}

RT_INLINE float rt_dot(const float *x, const float *y, int64_t n)
{
    rt_v16 acc = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        acc += rt_v16_load(x + i) * rt_v16_load(y + i);
    if (i < n)
        acc += rt_v16_load_n(x + i, n - i) * rt_v16_load_n(y + i, n - i);
    return rt_v16_sum(&acc);
}

typedef int32_t rt_v16i __attribute__((vector_size(64)));

/* Lane by lane the greater; b where a is NaN. */
RT_INLINE void rt_v16_max(rt_v16 *b, const rt_v16 *a)
{
    const rt_v16i mask = *a > *b;
    *b = (rt_v16)(((rt_v16i)*a & mask) | ((rt_v16i)*b & ~mask));
}

/* Greatest of n floats, -inf for none; NaNs are passed over. */
RT_INLINE float rt_max(const float *x, int64_t n)
{
    rt_v16 m = (rt_v16){0} - INFINITY;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const rt_v16 v = rt_v16_load(x + i);
        rt_v16_max(&m, &v);
    }
    float t[16], top = -INFINITY;
    rt_v16_store(t, &m);
    for (; i < n; i++)
        top = x[i] > top ? x[i] : top;
    for (int j = 0; j < 8; j++)
        t[j] = t[j] > t[j + 8] ? t[j] : t[j + 8];
    for (int j = 0; j < 4; j++)
        t[j] = t[j] > t[j + 4] ? t[j] : t[j + 4];
    t[0] = t[0] > t[2] ? t[0] : t[2];
    t[1] = t[1] > t[3] ? t[1] : t[3];
    t[0] = t[0] > t[1] ? t[0] : t[1];
    return t[0] > top ? t[0] : top;
}

RT_INLINE float rt_from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

RT_INLINE uint32_t rt_to_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* e^x within 2 ulp (tests/test_ops_cpu.c measures it); 0 at -inf, inf above 88.73, NaN stays NaN, subnormal results within one
 * unit of their last place. Range reduction x = n ln 2 + r, |r| <= ln 2 / 2, then the Taylor polynomial of degree 7. */
RT_INLINE float rt_exp(float x)
{
    const float magic = 0x1.8p23f; /* adding it rounds to an integer and leaves that in the low bits */
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float z = x * 0x1.715476p0f + magic;
    const float n = z - magic;
    float r = x - n * 0x1.62e4p-1f; /* 16 bits of ln 2: exact for |n| < 256 */
    r = r - n * 0x1.7f7d1cp-20f;
    float p = 0x1.a01a02p-13f;
    p = p * r + 0x1.6c16c2p-10f;
    p = p * r + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = (p * r) * r + r;
    p = p + 1.0f;
    const uint32_t e = rt_to_bits(z) - rt_to_bits(magic); /* n as two's complement */
    const int32_t k = (int32_t)e, h = k >> 1;             /* in two steps: 2^n itself may not fit */
    return p * rt_from_bits((uint32_t)(h + 127) << 23) * rt_from_bits((uint32_t)(k - h + 127) << 23);
}

RT_INLINE float rt_sigmoid(float x)
{
    return 1.0f / (1.0f + rt_exp(-x));
}

RT_INLINE float rt_silu(float x)
{
    return x / (1.0f + rt_exp(-x));
}

#endif
