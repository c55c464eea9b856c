#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/dtype.h"
#include "core/rng.h"
#include "tests/suite.h"

static uint32_t bits(float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

static float from_bits(uint32_t u)
{
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

/* The value of sign/exponent/mantissa by the definition of the format. */
static double by_definition(unsigned code, int exp_bits, int man_bits, bool has_inf)
{
    const int bias = (1 << (exp_bits - 1)) - 1, e = (int)(code >> man_bits) & ((1 << exp_bits) - 1);
    const unsigned m = code & ((1u << man_bits) - 1), all = (1u << man_bits) - 1;
    const double sign = code >> (exp_bits + man_bits) ? -1 : 1, frac = (double)m / (1 << man_bits);
    if (e == (1 << exp_bits) - 1 && has_inf)
        return m == 0 ? sign * INFINITY : NAN;
    if (e == (1 << exp_bits) - 1 && m == all)
        return NAN;
    return sign * (e == 0 ? ldexp(frac, 1 - bias) : ldexp(1 + frac, e - bias));
}

static void check_same(double want, float got, unsigned code)
{
    if (isnan(want) ? !isnan(got) : !(got == want && !signbit(got) == !signbit(want)))
        fail_msg("code %#x: %g, expected %g", code, (double)got, want);
}

static void codes_mean_what_the_format_says(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 256; c++) {
        check_same(by_definition(c, 4, 3, false), rt_e4m3_to_f32((uint8_t)c), c);
        check_same(by_definition(c, 4, 3, false), rt_e4m3_table[c], c);
    }
    assert_true(rt_e4m3_table[0x7e] == 448.0f);
    for (unsigned c = 0; c < 65536; c++) {
        check_same(by_definition(c, 5, 10, true), rt_f16_to_f32((uint16_t)c), c);
        check_same(by_definition(c, 8, 7, true), rt_bf16_to_f32((uint16_t)c), c);
    }
}

static void codes_round_trip(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 256; c++)
        assert_int_equal(rt_f32_to_e4m3(rt_e4m3_to_f32((uint8_t)c)), c);
    for (unsigned c = 0; c < 65536; c++) {
        const float h = rt_f16_to_f32((uint16_t)c), b = rt_bf16_to_f32((uint16_t)c);
        if (isnan(h))
            assert_true(isnan(rt_f16_to_f32(rt_f32_to_f16(h))));
        else
            assert_int_equal(rt_f32_to_f16(h), c);
        if (isnan(b))
            assert_true(isnan(rt_bf16_to_f32(rt_f32_to_bf16(b))));
        else
            assert_int_equal(rt_f32_to_bf16(b), c);
    }
}

/* Nearest of codes [0, last], the even one of two equally near; v >= 0. Codes ascend with their values. */
static unsigned nearest(double v, unsigned last, double (*value)(unsigned))
{
    unsigned lo = 0, hi = last;
    while (hi - lo > 1) {
        const unsigned mid = (lo + hi) / 2;
        if (value(mid) <= v)
            lo = mid;
        else
            hi = mid;
    }
    const double below = v - value(lo), above = value(hi) - v;
    return below < above || (below == above && lo % 2 == 0) ? lo : hi;
}

static double e4m3_value(unsigned c) { return by_definition(c, 4, 3, false); }
/* The code of infinity stands for the next power of two: what rounds to it overflows. */
static double f16_value(unsigned c) { return c == 0x7c00 ? 65536.0 : by_definition(c, 5, 10, true); }
static double bf16_value(unsigned c) { return c == 0x7f80 ? 0x1p128 : by_definition(c, 8, 7, true); }

static void check_nearest(float v)
{
    const unsigned s8 = signbit(v) ? 0x80 : 0, s16 = signbit(v) ? 0x8000 : 0;
    const double a = fabs((double)v);
    const unsigned e = nearest(a, 0x7e, e4m3_value) | s8, h = nearest(a, 0x7c00, f16_value) | s16,
                   b = nearest(a, 0x7f80, bf16_value) | s16;
    if (rt_f32_to_e4m3(v) != e || rt_f32_to_f16(v) != h || rt_f32_to_bf16(v) != b)
        fail_msg("%a: e4m3 %#x (expected %#x), f16 %#x (%#x), bf16 %#x (%#x)", (double)v, rt_f32_to_e4m3(v), e, rt_f32_to_f16(v), h,
                 rt_f32_to_bf16(v), b);
}

static void check_around(double v)
{
    const float f = (float)v;
    const float all[] = {f, nextafterf(f, INFINITY), nextafterf(f, -INFINITY)};
    for (int i = 0; i < 3; i++) {
        if (isfinite(all[i])) {
            check_nearest(all[i]);
            check_nearest(-all[i]);
        }
    }
}

static void rounds_to_nearest_even(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 0x7e; c++) { /* each tie and its neighbours */
        check_around(e4m3_value(c));
        check_around((e4m3_value(c) + e4m3_value(c + 1)) / 2);
    }
    check_around(448);
    check_around(464);
    check_around(480);
    for (unsigned c = 0; c < 0x7c00; c += c < 2048 || c > 0x7b00 ? 1 : 7)
        check_around((f16_value(c) + f16_value(c + 1)) / 2);
    for (unsigned c = 0; c < 0x7f80; c += 5)
        check_around((bf16_value(c) + bf16_value(c + 1)) / 2);
    for (uint64_t i = 0; i < 50000; i++) {
        const float v = from_bits((uint32_t)rt_rng_u64(1, 2, i));
        if (isfinite(v))
            check_nearest(v);
    }
}

static void special_values(void **state)
{
    (void)state;
    assert_int_equal(rt_f32_to_e4m3(INFINITY), 0x7e);
    assert_int_equal(rt_f32_to_e4m3(-INFINITY), 0xfe);
    assert_int_equal(rt_f32_to_e4m3(3e38f), 0x7e);
    assert_int_equal(rt_f32_to_e4m3(NAN), 0x7f);
    assert_int_equal(rt_f32_to_e4m3(-NAN), 0xff);
    assert_int_equal(rt_f32_to_e4m3(-0.0f), 0x80);
    assert_int_equal(rt_f32_to_f16(INFINITY), 0x7c00);
    assert_int_equal(rt_f32_to_f16(-INFINITY), 0xfc00);
    assert_int_equal(rt_f32_to_bf16(-INFINITY), 0xff80);
    /* A NaN whose payload lies in the bits that go away must not become an infinity. */
    const float low = from_bits(0x7f800001);
    assert_true(isnan(rt_f16_to_f32(rt_f32_to_f16(low))));
    assert_true(isnan(rt_bf16_to_f32(rt_f32_to_bf16(low))));
    assert_true(isnan(rt_bf16_to_f32(rt_f32_to_bf16(from_bits(0xffffffff)))));
    assert_int_equal(rt_f32_to_e4m3(low), 0x7f);
}

/* Every length around the inner loop's, from unaligned bytes, with a guard behind. */
static void bulk_equals_one_by_one(void **state)
{
    static const enum rt_dtype types[] = {RT_F32, RT_F16, RT_BF16, RT_E4M3};
    enum { MAX = 200 };
    static unsigned char raw[MAX * 4 + 1], packed[MAX * 4 + 2];
    float up[MAX + 1], in[MAX];
    (void)state;
    for (size_t i = 0; i < sizeof raw; i++)
        raw[i] = (unsigned char)rt_rng_u64(3, 4, i);
    for (int k = 0; k < 4; k++) {
        const enum rt_dtype t = types[k];
        const size_t size = rt_dtype_size(t);
        for (size_t n = 0; n <= MAX; n += n < 140 ? 1 : 20) {
            up[n] = 12345.0f;
            assert_true(rt_to_f32(up, raw + 1, t, n));
            assert_true(up[n] == 12345.0f);
            for (size_t i = 0; i < n; i++) {
                uint16_t h;
                memcpy(&h, raw + 1 + i * size, size < 2 ? size : 2);
                float want;
                memcpy(&want, raw + 1 + i * 4 * (t == RT_F32), sizeof want);
                if (t != RT_F32)
                    want = t == RT_F16 ? rt_f16_to_f32(h) : t == RT_BF16 ? rt_bf16_to_f32(h) : rt_e4m3_to_f32(raw[1 + i]);
                if (isnan(want))
                    assert_true(isnan(up[i]));
                else
                    assert_int_equal(bits(up[i]), bits(want));
            }
            for (size_t i = 0; i < n; i++)
                in[i] = (float)((rt_rng_uniform(5, n, i) - 0.5) * exp2((double)(i % 40) - 20));
            packed[1 + n * size] = 0x5a;
            assert_true(rt_from_f32(packed + 1, t, in, n));
            assert_int_equal(packed[1 + n * size], 0x5a);
            for (size_t i = 0; i < n; i++) {
                const uint16_t h = t == RT_F16 ? rt_f32_to_f16(in[i]) : rt_f32_to_bf16(in[i]);
                const uint8_t e = rt_f32_to_e4m3(in[i]);
                assert_memory_equal(packed + 1 + i * size, t == RT_F32 ? (const void *)&in[i] : t == RT_E4M3 ? (const void *)&e : &h, size);
            }
        }
    }
}

static void doubles_and_others(void **state)
{
    double in[100];
    float out[100];
    uint8_t raw[8] = {0};
    (void)state;
    for (int i = 0; i < 100; i++)
        in[i] = 1.0 / (i + 1);
    assert_true(rt_to_f32(out, in, RT_F64, 100));
    for (int i = 0; i < 100; i++)
        assert_true(out[i] == (float)in[i]);
    assert_false(rt_to_f32(out, raw, RT_I64, 1));
    assert_false(rt_to_f32(out, raw, RT_BOOL, 1));
    assert_false(rt_from_f32(raw, RT_F64, out, 1));
    assert_false(rt_from_f32(raw, RT_U8, out, 1));
}

static void names(void **state)
{
    enum rt_dtype t;
    (void)state;
    for (int i = 0; i < RT_DTYPE_COUNT; i++) {
        const char *name = rt_dtype_name((enum rt_dtype)i);
        assert_true(rt_dtype_from_name(name, strlen(name), &t));
        assert_int_equal(t, i);
        assert_true(rt_dtype_size(t) >= 1 && rt_dtype_size(t) <= 8);
    }
    assert_true(rt_dtype_from_name("F8_E4M3xx", 7, &t) && t == RT_E4M3);
    assert_false(rt_dtype_from_name("F8_E4M3", 6, &t));
    assert_false(rt_dtype_from_name("", 0, &t));
    assert_false(rt_dtype_from_name("f32", 3, &t));
    assert_int_equal(rt_dtype_size((enum rt_dtype)99), 0);
    assert_string_equal(rt_dtype_name((enum rt_dtype)99), "unknown");
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(codes_mean_what_the_format_says), cmocka_unit_test(codes_round_trip),
    cmocka_unit_test(rounds_to_nearest_even),          cmocka_unit_test(special_values),
    cmocka_unit_test(bulk_equals_one_by_one),          cmocka_unit_test(doubles_and_others),
    cmocka_unit_test(names),
};
RT_SUITE(core_dtype, tests)
