/* The root mean square of a row in float32, bit for bit the same in every backend whose elements are float32.
 *
 * Why bits matter here: the embedding and the norm's weight are bfloat16, so s * w is a short number, and s * w / amax * 448 lies
 * exactly halfway between two e4m3 codes for a few elements of every thousand. Which code is taken is decided by the roundings of
 * the norm alone, and one changed code in a key changes every later row of the sequence.
 */
#ifndef RT_CORE_RMS_H
#define RT_CORE_RMS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* sqrt(sum(x^2) / n + eps) in float32, rounded after each operation (no contraction). The sum is pairwise: a run of more than 128
 * is cut into halves, the first rounded down to a multiple of 8; a run of at most 128 has 8 running sums over i mod 8, added as
 * ((0+1)+(2+3))+((4+5)+(6+7)), then what is left over from a multiple of 8; a run of less than 8 is summed in order. */
float rt_rms_f32(const float *x, int64_t n, float eps);

#ifdef __cplusplus
}
#endif
#endif
