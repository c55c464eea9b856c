#include "formats/shard_codec.h"

#include <string.h>

#include "core/row_loops.h"

void rt_codec_free(struct rt_codec *c)
{
    if (c->deflating)
        deflateEnd(&c->deflate);
    if (c->inflating)
        inflateEnd(&c->inflate);
    rt_buf_free(&c->planes);
    rt_buf_free(&c->packed);
    memset(c, 0, sizeof *c);
}

static void to_planes(uint8_t *dst, const uint8_t *src, size_t n, size_t width)
{
    for (size_t b = 0; b < width; b++)
        for (size_t i = 0; i < n; i++)
            dst[b * n + i] = src[i * width + b];
}

static void delta_planes(uint8_t *dst, const uint8_t *src, size_t n, size_t stride)
{
    uint32_t before = 0;
    for (size_t i = 0, in_run = 0; i < n; i++, in_run = in_run + 1 == stride ? 0 : in_run + 1) {
        uint32_t v;
        memcpy(&v, src + 4 * i, 4);
        const uint32_t d = in_run == 0 ? v : v - before;
        before = v;
        for (size_t b = 0; b < 4; b++)
            dst[b * n + i] = (uint8_t)(d >> (8 * b));
    }
}

enum rt_status rt_codec_pack(struct rt_codec *c, int level, const void *data, size_t n, int width, size_t stride, bool text,
                             struct rt_pack *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t raw = n * (size_t)width;
    const uint8_t *src = data;
    RT_ASSERT(raw <= RT_BLOCK_RAW && (stride == 0 || width == 4));
    if (width > 1) {
        c->planes.len = 0;
        RT_TRY(rt_buf_reserve(&c->planes, raw + 1, err));
        if (stride > 0)
            delta_planes((uint8_t *)c->planes.data, src, n, stride);
        else
            to_planes((uint8_t *)c->planes.data, src, n, (size_t)width);
        src = (uint8_t *)c->planes.data;
    }
    if (!c->deflating && deflateInit2(&c->deflate, level, Z_DEFLATED, 15, 9, Z_DEFAULT_STRATEGY) != Z_OK)
        RT_FAIL(err, NOMEM, "out of memory for compression");
    c->deflating = true;
    deflateReset(&c->deflate);
    /* Numbers are runs or noise: looking for longer matches costs half the time of planes, two thirds of FP8 codes, and finds nothing (measured). */
    deflateParams(&c->deflate, level, text ? Z_DEFAULT_STRATEGY : Z_RLE);
    const size_t bound = deflateBound(&c->deflate, raw);
    c->packed.len = 0;
    RT_TRY(rt_buf_reserve(&c->packed, bound, err));
    c->deflate.next_in = (Bytef *)(uintptr_t)(raw > 0 ? src : (const uint8_t *)"");
    c->deflate.avail_in = (uInt)raw;
    c->deflate.next_out = (Bytef *)c->packed.data;
    c->deflate.avail_out = (uInt)bound;
    if (deflate(&c->deflate, Z_FINISH) != Z_STREAM_END)
        RT_FAIL(err, INTERNAL, "zlib did not compress %zu bytes into %zu", raw, bound);
    const size_t size = bound - c->deflate.avail_out;
    rt_pack_array(out, 5);
    rt_pack_uint(out, (uint64_t)width);
    rt_pack_uint(out, stride);
    rt_pack_uint(out, raw);
    rt_pack_uint(out, crc32(0, (const Bytef *)c->packed.data, (uInt)size));
    rt_pack_bin(out, c->packed.data, size);
    st = out->st;
out:
    return st;
}

enum rt_status rt_column_read(struct rt_unpack *u, struct rt_column *out, struct rt_err *err)
{
    enum rt_status st;
    size_t n;
    uint64_t v;
    RT_TRY(rt_unpack_array(u, &n, err));
    if (n != 5)
        return rt_unpack_fail(u, "the 5 items of a column", err);
    RT_TRY(rt_unpack_uint(u, 4, &v, err));
    out->width = (size_t)v;
    RT_TRY(rt_unpack_uint(u, RT_BLOCK_RAW, &v, err));
    out->stride = (size_t)v;
    RT_TRY(rt_unpack_uint(u, RT_BLOCK_RAW, &v, err));
    out->raw = (size_t)v;
    RT_TRY(rt_unpack_uint(u, UINT32_MAX, &v, err));
    out->crc = (uint32_t)v;
    RT_TRY(rt_unpack_bin(u, &out->data, &out->size, err));
    if ((out->width != 1 && out->width != 2 && out->width != 4) || out->raw % out->width != 0 ||
        (out->stride > 0 && out->width != 4) || out->size > 2 * (size_t)RT_BLOCK_RAW || out->raw > RT_ZLIB_RATIO * out->size)
        return rt_unpack_fail(u, "a column of 1, 2 or 4-byte elements whose compressed bytes can hold what it says", err);
out:
    return st;
}

static void from_planes(uint8_t *dst, const uint8_t *src, size_t n, size_t width)
{
    if (width == 4) {
        rt_join_planes4(dst, src, n);
        return;
    }
    for (size_t b = 0; b < width; b++)
        for (size_t i = 0; i < n; i++)
            dst[i * width + b] = src[b * n + i];
}

static void undo_delta(uint8_t *dst, size_t n, size_t stride)
{
    uint32_t before = 0;
    for (size_t i = 0, in_run = 0; i < n; i++, in_run = in_run + 1 == stride ? 0 : in_run + 1) {
        uint32_t v;
        memcpy(&v, dst + 4 * i, 4);
        before = in_run == 0 ? v : before + v;
        memcpy(dst + 4 * i, &before, 4);
    }
}

enum rt_status rt_codec_unpack(struct rt_codec *c, const struct rt_column *col, void *dst, const char *where, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    uint8_t *to = dst, none;
    const uint32_t crc = (uint32_t)crc32(0, col->data, (uInt)col->size);
    if (crc != col->crc)
        RT_FAIL(err, FORMAT, "%s: damaged: crc32 %08x, expected %08x", where, crc, col->crc);
    if (col->width > 1) {
        c->planes.len = 0;
        RT_TRY(rt_buf_reserve(&c->planes, col->raw + 1, err));
        to = (uint8_t *)c->planes.data;
    }
    if (!c->inflating && inflateInit(&c->inflate) != Z_OK)
        RT_FAIL(err, NOMEM, "out of memory for decompression");
    c->inflating = true;
    inflateReset(&c->inflate);
    inflateValidate(&c->inflate, 0); /* the crc of these bytes was right: the stream's own checksum says nothing more, and takes a twentieth of reading */
    c->inflate.next_in = (Bytef *)(uintptr_t)col->data;
    c->inflate.avail_in = (uInt)col->size;
    c->inflate.next_out = col->raw > 0 ? to : &none;
    c->inflate.avail_out = (uInt)col->raw;
    if (inflate(&c->inflate, Z_FINISH) != Z_STREAM_END || c->inflate.avail_out != 0 || c->inflate.avail_in != 0)
        RT_FAIL(err, FORMAT, "%s: expected one zlib stream of %zu bytes for %zu: %s", where, col->size, col->raw,
                c->inflate.msg != NULL ? c->inflate.msg : "it is shorter or longer");
    if (col->width > 1)
        from_planes(dst, to, col->raw / col->width, col->width);
    if (col->stride > 0)
        undo_delta(dst, col->raw / 4, col->stride);
out:
    return st;
}
