/* Random numbers as a function of where they are used: no state to save, so a resume is exact by construction.
 *
 * value = mix(seed, stream, counter): Philox-4x32-10 (Salmon et al., SC 2011), key = seed, counter = (counter, stream).
 */
#ifndef RT_CORE_RNG_H
#define RT_CORE_RNG_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

uint64_t rt_rng_u64(uint64_t seed, uint64_t stream, uint64_t counter);
double rt_rng_uniform(uint64_t seed, uint64_t stream, uint64_t counter); /* [0, 1), 53 bits */
float rt_rng_normal(uint64_t seed, uint64_t stream, uint64_t counter);   /* mean 0, deviation 1 (Box-Muller) */
/* perm = a permutation of [0, n) that depends on (seed, stream) alone (Fisher-Yates, unbiased). */
void rt_rng_permutation(uint64_t seed, uint64_t stream, int64_t n, int64_t *perm);
/* A stream number for a name: first 8 bytes of its FNV-1a, so that a tensor's initial values depend on its name. */
uint64_t rt_rng_stream(const char *name);

#ifdef __cplusplus
}
#endif
#endif
