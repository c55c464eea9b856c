/* Well-formed UTF-8 (Unicode 15, table 3-7): no overlong forms, surrogates, or code points above U+10FFFF. */
#ifndef RT_FORMATS_UTF8_H
#define RT_FORMATS_UTF8_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes of the well-formed character at s, 0 where there is none (n == 0 included). */
static inline size_t rt_utf8_char(const char *s, size_t n)
{
    const unsigned char *u = (const unsigned char *)s;
    if (n == 0)
        return 0;
    if (u[0] < 0x80)
        return 1;
    const size_t len = u[0] >= 0xc2 && u[0] <= 0xdf ? 2 : u[0] >= 0xe0 && u[0] <= 0xef ? 3 : u[0] >= 0xf0 && u[0] <= 0xf4 ? 4 : 0;
    if (len == 0 || len > n)
        return 0;
    const unsigned lo = u[0] == 0xe0 ? 0xa0 : u[0] == 0xf0 ? 0x90 : 0x80;
    const unsigned hi = u[0] == 0xed ? 0x9f : u[0] == 0xf4 ? 0x8f : 0xbf;
    if (u[1] < lo || u[1] > hi)
        return 0;
    for (size_t i = 2; i < len; i++)
        if (u[i] < 0x80 || u[i] > 0xbf)
            return 0;
    return len;
}

static inline bool rt_utf8_valid(const char *s, size_t n)
{
    for (size_t at = 0, len; at < n; at += len)
        if ((len = rt_utf8_char(s + at, n - at)) == 0)
            return false;
    return true;
}

#endif
