/* Element types and their conversions.
 *
 * e4m3 is float8_e4m3fn: S.EEEE.MMM, bias 7, no infinities, S.1111.111 is NaN, largest finite 448 (OCP 8-bit formats, 5.1).
 */
#ifndef RT_CORE_DTYPE_H
#define RT_CORE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* name (as safetensors spells it), bytes */
#define RT_DTYPE_LIST(X) \
    X(F32, "F32", 4) X(F16, "F16", 2) X(BF16, "BF16", 2) X(E4M3, "F8_E4M3", 1) X(F64, "F64", 8) \
    X(I64, "I64", 8) X(I32, "I32", 4) X(I16, "I16", 2) X(I8, "I8", 1) X(U32, "U32", 4) X(U16, "U16", 2) \
    X(U8, "U8", 1) X(BOOL, "BOOL", 1)

enum rt_dtype {
#define RT_DTYPE_ENUM(name, text, bytes) RT_##name,
    RT_DTYPE_LIST(RT_DTYPE_ENUM)
#undef RT_DTYPE_ENUM
    RT_DTYPE_COUNT
};

size_t rt_dtype_size(enum rt_dtype t);
const char *rt_dtype_name(enum rt_dtype t);
bool rt_dtype_from_name(const char *name, size_t len, enum rt_dtype *out);

float rt_bf16_to_f32(uint16_t v);
uint16_t rt_f32_to_bf16(float v); /* to nearest, ties to even; NaN stays NaN */
float rt_f16_to_f32(uint16_t v);
uint16_t rt_f32_to_f16(float v);
float rt_e4m3_to_f32(uint8_t v);
uint8_t rt_f32_to_e4m3(float v); /* to nearest, ties to even, saturated to +-448; NaN -> 0x7f with v's sign */
extern const float rt_e4m3_table[256];

/* dst[i] = (float)src[i] for F32, F16, BF16, E4M3 (no scale), F64; false for another type. */
bool rt_to_f32(float *dst, const void *src, enum rt_dtype t, size_t n);
/* dst[i] = src[i] rounded; F32, F16, BF16, E4M3. */
bool rt_from_f32(void *dst, enum rt_dtype t, const float *src, size_t n);

#ifdef __cplusplus
}
#endif
#endif
