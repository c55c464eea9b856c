#include "core/dtype.h"

#include <string.h>

/* Two builds of each bulk loop where the processor may have AVX2; the loops are integer arithmetic and exact float
 * operations, so that both give the same bits. */
#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE __attribute__((target("avx2")))
#define HAVE_WIDE() __builtin_cpu_supports("avx2")
#else
#define WIDE
#define HAVE_WIDE() 0
#endif
#define INLINE static inline __attribute__((always_inline))

enum { RUN = 64 }; /* elements of one inner loop: a fixed count, which the compiler vectorises without remainders */

static const struct {
    const char *name;
    size_t size;
} types[RT_DTYPE_COUNT] = {
#define ROW(id, text, bytes) [RT_##id] = {text, bytes},
    RT_DTYPE_LIST(ROW)
#undef ROW
};

/* Row e: sign and exponent e; column m: mantissa. */
#define E4M3_8(s, unit) \
    s 8 * unit, s 9 * unit, s 10 * unit, s 11 * unit, s 12 * unit, s 13 * unit, s 14 * unit, s 15 * unit
#define E4M3_HALF(s) \
    s 0x0p-9f, s 0x1p-9f, s 0x2p-9f, s 0x3p-9f, s 0x4p-9f, s 0x5p-9f, s 0x6p-9f, s 0x7p-9f, \
    E4M3_8(s, 0x1p-9f), E4M3_8(s, 0x1p-8f), E4M3_8(s, 0x1p-7f), E4M3_8(s, 0x1p-6f), E4M3_8(s, 0x1p-5f), \
    E4M3_8(s, 0x1p-4f), E4M3_8(s, 0x1p-3f), E4M3_8(s, 0x1p-2f), E4M3_8(s, 0x1p-1f), E4M3_8(s, 0x1p0f), \
    E4M3_8(s, 0x1p1f), E4M3_8(s, 0x1p2f), E4M3_8(s, 0x1p3f), E4M3_8(s, 0x1p4f), \
    s 256.0f, s 288.0f, s 320.0f, s 352.0f, s 384.0f, s 416.0f, s 448.0f, s __builtin_nanf("")
const float rt_e4m3_table[256] = {E4M3_HALF(+), E4M3_HALF(-)};

size_t rt_dtype_size(enum rt_dtype t)
{
    return (unsigned)t < RT_DTYPE_COUNT ? types[t].size : 0;
}

const char *rt_dtype_name(enum rt_dtype t)
{
    return (unsigned)t < RT_DTYPE_COUNT ? types[t].name : "unknown";
}

bool rt_dtype_from_name(const char *name, size_t len, enum rt_dtype *out)
{
    for (int t = 0; t < RT_DTYPE_COUNT; t++) {
        if (strlen(types[t].name) == len && memcmp(types[t].name, name, len) == 0) {
            *out = (enum rt_dtype)t;
            return true;
        }
    }
    return false;
}

INLINE uint32_t bits_of(float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

INLINE float of_bits(uint32_t u)
{
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

/* All bits of yes where cond is 1, of no where it is 0: a select that vectorises. */
INLINE uint32_t pick(uint32_t cond, uint32_t yes, uint32_t no)
{
    const uint32_t mask = 0u - cond;
    return (yes & mask) | (no & ~mask);
}

INLINE float bf16_up(uint16_t v)
{
    return of_bits((uint32_t)v << 16);
}

INLINE uint16_t bf16_down(float v)
{
    const uint32_t u = bits_of(v);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40;
    return (uint16_t)pick((u & 0x7fffffffu) > 0x7f800000u, quiet, rounded);
}

INLINE float f16_up(uint16_t h)
{
    const uint32_t a = (uint32_t)(h & 0x7fff) << 13, e = a & 0x0f800000u;
    const uint32_t normal = a + (112u << 23);
    const uint32_t special = (a + (224u << 23)) | ((uint32_t)(a > 0x0f800000u) << 22); /* infinity; NaN made quiet */
    /* 2^-14 (1 + m/1024) - 2^-14: exact. */
    const uint32_t tiny = bits_of(of_bits(a + (113u << 23)) - 0x1p-14f);
    return of_bits(pick(e == 0, tiny, pick(e == 0x0f800000u, special, normal)) | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t f16_down(float v)
{
    const uint32_t u = bits_of(v), a = u & 0x7fffffffu;
    const uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1)) >> 13;
    /* Next to 0.5 a float's last bit is worth 2^-24, f16's smallest step: the addition rounds. */
    const uint32_t tiny = bits_of(of_bits(pick(a < 0x38800000u, a, 0)) + 0.5f) - 0x3f000000u;
    const uint32_t finite = pick(a < 0x38800000u, tiny, normal);
    const uint32_t over = pick(a > 0x7f800000u, 0x7e00u | ((a >> 13) & 0x3ffu), 0x7c00u);
    return (uint16_t)(pick(a >= 0x477ff000u, over, finite) | (u >> 16 & 0x8000u));
}

INLINE float e4m3_up(uint8_t c)
{
    const uint32_t a = c & 0x7fu;
    const uint32_t normal = (a << 20) + (120u << 23);
    const uint32_t tiny = bits_of(of_bits((a << 20) + (121u << 23)) - 0x1p-6f);
    return of_bits(pick(a < 8, tiny, pick(a == 0x7f, 0x7fc00000u, normal)) | (uint32_t)(c & 0x80) << 24);
}

INLINE uint8_t e4m3_down(float v)
{
    const uint32_t u = bits_of(v), a = u & 0x7fffffffu;
    const uint32_t normal = ((a + 0x7ffffu + ((a >> 20) & 1)) >> 20) - (120u << 3);
    /* Next to 2^14 a float's last bit is worth 2^-9, e4m3's smallest step: the addition rounds. */
    const uint32_t tiny = bits_of(of_bits(pick(a < 0x3c800000u, a, 0)) + 0x1p14f) - 0x46800000u;
    const uint32_t finite = pick(a < 0x3c800000u, tiny, normal);
    const uint32_t over = pick(a > 0x7f800000u, 0x7f, 0x7e);
    return (uint8_t)(pick(a > 0x43e00000u, over, finite) | (u >> 24 & 0x80u));
}

float rt_bf16_to_f32(uint16_t v) { return bf16_up(v); }
uint16_t rt_f32_to_bf16(float v) { return bf16_down(v); }
float rt_f16_to_f32(uint16_t v) { return f16_up(v); }
uint16_t rt_f32_to_f16(float v) { return f16_down(v); }
float rt_e4m3_to_f32(uint8_t v) { return rt_e4m3_table[v]; }
uint8_t rt_f32_to_e4m3(float v) { return e4m3_down(v); }

INLINE float f64_up(double v) { return (float)v; }

/* Bytes of a file may lie at any address: elements go through local arrays. */
#define BULK(name, from, to, convert) \
    INLINE void name##_body(unsigned char *restrict dst, const unsigned char *restrict src, size_t n) \
    { \
        size_t i = 0; \
        for (; i + RUN <= n; i += RUN) { \
            from in[RUN]; \
            to out[RUN]; \
            memcpy(in, src + i * sizeof(from), sizeof in); \
            for (int k = 0; k < RUN; k++) \
                out[k] = convert(in[k]); \
            memcpy(dst + i * sizeof(to), out, sizeof out); \
        } \
        for (; i < n; i++) { \
            from in; \
            memcpy(&in, src + i * sizeof in, sizeof in); \
            const to out = convert(in); \
            memcpy(dst + i * sizeof out, &out, sizeof out); \
        } \
    } \
    WIDE static void name##_wide(void *dst, const void *src, size_t n) { name##_body(dst, src, n); } \
    static void name##_plain(void *dst, const void *src, size_t n) { name##_body(dst, src, n); }

BULK(up_bf16, uint16_t, float, bf16_up)
BULK(up_f16, uint16_t, float, f16_up)
BULK(up_e4m3, uint8_t, float, e4m3_up)
BULK(up_f64, double, float, f64_up)
BULK(down_bf16, float, uint16_t, bf16_down)
BULK(down_f16, float, uint16_t, f16_down)
BULK(down_e4m3, float, uint8_t, e4m3_down)

bool rt_to_f32(float *dst, const void *src, enum rt_dtype t, size_t n)
{
    const bool wide = HAVE_WIDE();
    switch (t) {
    case RT_F32:
        if (n > 0)
            memcpy(dst, src, n * sizeof *dst);
        return true;
    case RT_F16: (wide ? up_f16_wide : up_f16_plain)(dst, src, n); return true;
    case RT_BF16: (wide ? up_bf16_wide : up_bf16_plain)(dst, src, n); return true;
    case RT_E4M3: (wide ? up_e4m3_wide : up_e4m3_plain)(dst, src, n); return true;
    case RT_F64: (wide ? up_f64_wide : up_f64_plain)(dst, src, n); return true;
    default: return false;
    }
}

bool rt_from_f32(void *dst, enum rt_dtype t, const float *src, size_t n)
{
    const bool wide = HAVE_WIDE();
    switch (t) {
    case RT_F32:
        if (n > 0)
            memcpy(dst, src, n * sizeof *src);
        return true;
    case RT_F16: (wide ? down_f16_wide : down_f16_plain)(dst, src, n); return true;
    case RT_BF16: (wide ? down_bf16_wide : down_bf16_plain)(dst, src, n); return true;
    case RT_E4M3: (wide ? down_e4m3_wide : down_e4m3_plain)(dst, src, n); return true;
    default: return false;
    }
}
