/* Unicode text: well-formedness, NFC, and the few classes of characters that added tokens ask for. */
#ifndef RT_FORMATS_UNICODE_H
#define RT_FORMATS_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Length of the longest well-formed prefix of s: len where all of it is UTF-8. */
size_t rt_utf8_prefix(const char *s, size_t len);
/* The character at s[0] of valid UTF-8; *n = its bytes. len > 0. */
uint32_t rt_utf8_next(const char *s, size_t len, size_t *n);
/* The character that ends at s[len]; *n = its bytes. len > 0. */
uint32_t rt_utf8_last(const char *s, size_t len, size_t *n);

bool rt_is_space(uint32_t c); /* White_Space */
bool rt_is_word(uint32_t c);  /* Alphabetic, M, Nd, Pc or Join_Control: \w of UTS 18 */

/* Appends NFC(s), s valid UTF-8 of at most 1 GiB. */
enum rt_status rt_nfc(const char *s, size_t len, struct rt_buf *out, struct rt_err *err);
/* *yes: s (valid UTF-8) is in NFC. */
enum rt_status rt_is_nfc(const char *s, size_t len, bool *yes, struct rt_err *err);
/* No character of s can be changed by NFC, seen without normalising (all below U+0300). */
bool rt_nfc_trivially(const char *s, size_t len);

#ifdef __cplusplus
}
#endif
#endif
