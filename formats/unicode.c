#include "formats/unicode.h"

#include <stdlib.h>
#include <string.h>

#include <utf8proc.h>

#include "formats/utf8.h"

size_t rt_utf8_prefix(const char *s, size_t len)
{
    size_t i = 0, n;
    while (i < len && (n = rt_utf8_char(s + i, len - i)) > 0)
        i += n;
    return i;
}

uint32_t rt_utf8_next(const char *s, size_t len, size_t *n)
{
    utf8proc_int32_t c = 0;
    const utf8proc_ssize_t got = utf8proc_iterate((const utf8proc_uint8_t *)s, len > 4 ? 4 : (utf8proc_ssize_t)len, &c);
    *n = got > 0 ? (size_t)got : 1;
    return got > 0 ? (uint32_t)c : 0xfffd;
}

uint32_t rt_utf8_last(const char *s, size_t len, size_t *n)
{
    size_t i = len - 1;
    while (i > 0 && len - i < 4 && ((uint8_t)s[i] & 0xc0) == 0x80)
        i--;
    return rt_utf8_next(s + i, len - i, n);
}

bool rt_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool rt_is_word(uint32_t c)
{
    /* Join_Control, and the only Other_Alphabetic characters that are no marks: enclosed letters */
    if (c == 0x200c || c == 0x200d || (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
        (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189))
        return true;
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: return false;
    }
}

bool rt_nfc_trivially(const char *s, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if ((uint8_t)s[i] >= 0xcc) /* the first byte of U+0300 */
            return false;
    return true;
}

enum rt_status rt_nfc(const char *s, size_t len, struct rt_buf *out, struct rt_err *err)
{
    utf8proc_uint8_t *made = NULL;
    if (len == 0 || rt_nfc_trivially(s, len))
        return rt_buf_append(out, s, len, err);
    /* utf8proc takes no more than 2 GiB, and 4 bytes a character on the way */
    if (len > (size_t)1 << 30)
        return rt_fail(err, RT_FORMAT, "text of %zu bytes is too long to normalise: at most 1 GiB", len);
    const utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)len, &made,
                                            UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    enum rt_status st;
    if (n == UTF8PROC_ERROR_NOMEM)
        st = rt_fail(err, RT_NOMEM, "out of memory normalising %zu bytes of text", len);
    else if (n < 0)
        st = rt_fail(err, RT_FORMAT, "cannot normalise text: %s", utf8proc_errmsg(n));
    else
        st = rt_buf_append(out, made, (size_t)n, err);
    free(made);
    return st;
}

enum rt_status rt_is_nfc(const char *s, size_t len, bool *yes, struct rt_err *err)
{
    struct rt_buf made = {0};
    *yes = true;
    if (rt_nfc_trivially(s, len))
        return RT_OK;
    const enum rt_status st = rt_nfc(s, len, &made, err);
    if (st == RT_OK)
        *yes = made.len == len && memcmp(made.data, s, len) == 0;
    rt_buf_free(&made);
    return st;
}
