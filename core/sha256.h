/* SHA-256 (FIPS 180-4): identities of tokenizers, configurations, sequences. */
#ifndef RT_CORE_SHA256_H
#define RT_CORE_SHA256_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct rt_sha256 {
    uint32_t h[8];
    uint64_t bytes;
    uint8_t block[64];
};
void rt_sha256_init(struct rt_sha256 *s);
void rt_sha256_update(struct rt_sha256 *s, const void *data, size_t n);
void rt_sha256_update_u32(struct rt_sha256 *s, uint32_t x); /* its four bytes, the lowest first */
void rt_sha256_final(struct rt_sha256 *s, uint8_t out[32]);
void rt_sha256_final_hex(struct rt_sha256 *s, char out[65]); /* as rt_hex writes it */
void rt_sha256(const void *data, size_t n, uint8_t out[32]);
/* h = the state after n blocks of 64 bytes, in plain C: what the processor's own instructions, where it has them, are held against. */
void rt_sha256_plain(uint32_t h[8], const uint8_t *blocks, size_t n);
/* Lower-case hexadecimal of n bytes; out holds 2n + 1. */
void rt_hex(char *out, const uint8_t *data, size_t n);

#ifdef __cplusplus
}
#endif
#endif
