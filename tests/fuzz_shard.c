/* A damaged shard with right checksums: what lies behind them is to be met too. */
#include <string.h>
#include <zlib.h>

#include "formats/pack.h"
#include "tests/fuzz.h"

/* Writes a checksum over the u32 at p, if one lies there. */
static void put_crc(const uint8_t *p, const void *data, size_t n)
{
    const uint32_t crc = (uint32_t)crc32(0, data, (uInt)n);
    uint8_t *to = (uint8_t *)(uintptr_t)p;
    if (to[0] == 0xce)
        for (int i = 0; i < 4; i++)
            to[1 + i] = (uint8_t)(crc >> (8 * (3 - i)));
}

static bool skip_key(struct rt_unpack *u)
{
    char text[64];
    return rt_unpack_text(u, text, sizeof text, NULL) == RT_OK;
}

static bool skip_uint(struct rt_unpack *u)
{
    uint64_t v;
    return rt_unpack_uint(u, UINT64_MAX, &v, NULL) == RT_OK;
}

static bool repair_column(struct rt_unpack *u)
{
    size_t n;
    const uint8_t *data, *crc;
    if (!skip_key(u) || rt_unpack_array(u, &n, NULL) != RT_OK || n != 5 || !skip_uint(u) || !skip_uint(u) || !skip_uint(u))
        return false;
    crc = u->at;
    if (!skip_uint(u) || rt_unpack_bin(u, &data, &n, NULL) != RT_OK)
        return false;
    put_crc(crc, data, n);
    return true;
}

static bool repair_block(struct rt_unpack *u)
{
    size_t n;
    if (rt_unpack_map(u, &n, NULL) != RT_OK || n != 6)
        return false;
    for (int i = 0; i < 5; i++)
        if (!skip_key(u) || !skip_uint(u))
            return false;
    if (!skip_key(u) || rt_unpack_map(u, &n, NULL) != RT_OK)
        return false;
    while (n-- > 0)
        if (!repair_column(u))
            return false;
    return true;
}

/* [key, occurrence, line, tokens, rows, offset, bytes, crc32, nll, [mass]] */
static bool repair_sequence(struct rt_unpack *u, uint8_t *file, size_t size)
{
    size_t n, masses;
    const uint8_t *key, *crc;
    uint64_t offset, bytes;
    double v;
    struct rt_unpack block;
    if (rt_unpack_array(u, &n, NULL) != RT_OK || n != 10 || rt_unpack_bin(u, &key, &n, NULL) != RT_OK || !skip_uint(u) || !skip_uint(u) ||
        !skip_uint(u) || !skip_uint(u) || rt_unpack_uint(u, size, &offset, NULL) != RT_OK ||
        rt_unpack_uint(u, size - offset, &bytes, NULL) != RT_OK)
        return false;
    crc = u->at;
    if (!skip_uint(u))
        return false;
    rt_unpack_init(&block, file + offset, bytes, "", 0);
    while (block.at < block.end && repair_block(&block))
        ;
    put_crc(crc, file + offset, bytes);
    if (rt_unpack_double(u, &v, NULL) != RT_OK || rt_unpack_array(u, &masses, NULL) != RT_OK)
        return false;
    while (masses-- > 0)
        if (rt_unpack_double(u, &v, NULL) != RT_OK)
            return false;
    return true;
}

static void repair_index(const uint8_t *bin, size_t n, uint8_t *file, size_t size)
{
    struct rt_unpack u;
    size_t count;
    uint64_t bytes;
    rt_unpack_init(&u, bin, n, "", 0);
    if (rt_unpack_map(&u, &count, NULL) != RT_OK || !skip_key(&u) || rt_unpack_array(&u, &count, NULL) != RT_OK ||
        rt_unpack_uint(&u, size, &bytes, NULL) != RT_OK)
        return;
    put_crc(u.at, file, bytes);
    if (!skip_uint(&u) || !skip_key(&u) || rt_unpack_array(&u, &count, NULL) != RT_OK)
        return;
    while (count-- > 0 && repair_sequence(&u, file, size))
        ;
}

void fuzz_repair_shard(uint8_t *data, size_t n)
{
    struct rt_unpack u;
    size_t count;
    uint64_t at;
    const uint8_t *bin;
    if (n < 9)
        return;
    rt_unpack_init(&u, data + n - 9, 9, "", 0);
    if (rt_unpack_uint(&u, n, &at, NULL) != RT_OK)
        return;
    rt_unpack_init(&u, data + at, n - at, "", 0);
    if (rt_unpack_map(&u, &count, NULL) != RT_OK || !skip_key(&u) || rt_unpack_bin(&u, &bin, &count, NULL) != RT_OK || !skip_key(&u))
        return;
    repair_index(bin, count, data, n);
    if (u.at < u.end && u.end - u.at >= 5)
        put_crc(u.at, bin, count);
}
