/* Loops of reading stored rows that take most of its time beside decompression (cpu/row_loops.c: vector code, compiled as the kernels are). */
#ifndef RT_CORE_ROW_LOOPS_H
#define RT_CORE_ROW_LOOPS_H

#include <stddef.h>
#include <stdint.h>

/* sum_j e^(x[j] * scale - shift) over n numbers, none of them NaN: for checks that leave room for what it is off by. Each term is off by what float32 makes
 * of its exponent, and the sum by n 2^-24. */
float rt_exp_sum(const float *x, int64_t n, float scale, float shift);

/* out[j] = (float)(z[j] / T - norm), in float64 before it is rounded; 0 where z[j] is -inf. */
void rt_row_logp(const float *z, int64_t n, double T, double norm, float *out);

/* dst [4 n] = elements of four bytes from planes: byte b of element i is planes[b * n + i]. */
void rt_join_planes4(uint8_t *dst, const uint8_t *planes, size_t n);

#endif
