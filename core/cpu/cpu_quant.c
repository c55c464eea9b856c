/* The e4m3 form of activations: runs of 128 columns, scale max(amax, 1e-12) / 448, codes to nearest even. */
#include "core/cpu/cpu.h"
#include "core/cpu/simd.h"

/* v to e4m3, saturated: normal numbers lose 20 bits of mantissa with the rounding carried into the exponent, whose bias differs by
 * 120; below 2^-6 the code counts multiples of 2^-9, and 8 of them are the first normal code. */
RT_INLINE uint32_t to_e4m3(float v)
{
    const uint32_t u = rt_to_bits(v), mag = u & 0x7fffffff;
    uint32_t normal = ((mag + 0x7ffff + (mag >> 20 & 1)) >> 20) - (120u << 3);
    normal = mag > 0x43e00000u ? 0x7e : normal; /* above 448 */
    const float a = rt_from_bits(mag);
    const uint32_t sub = rt_to_bits(a * 512.0f + 0x1p23f) & 0xff;
    uint32_t code = mag < 0x3c800000u ? sub : normal;
    code = mag > 0x7f800000u ? 0x7f : code;
    return code | (u >> 24 & 0x80);
}

/* The least power of two that is not below s, a positive normal number. */
RT_INLINE float power_above(float s)
{
    return rt_from_bits((rt_to_bits(s) + 0x7fffff) & 0x7f800000);
}

RT_INLINE float block_scale(const float *x, bool pow2)
{
    float m[16] = {0};
    for (int i = 0; i < RT_CPU_BLOCK; i += 16)
        for (int j = 0; j < 16; j++) {
            const float a = fabsf(x[i + j]);
            m[j] = a > m[j] ? a : m[j];
        }
    float amax = 1e-12f;
    for (int j = 0; j < 16; j++)
        amax = m[j] > amax ? m[j] : amax;
    return pow2 ? power_above(amax / 448.0f) : amax / 448.0f;
}

RT_SIMD static void quant_row(const float *restrict x, uint8_t *restrict code, float *restrict scale, int64_t scale_ld, int64_t cols, bool pow2)
{
    for (int64_t b = 0; b < cols / RT_CPU_BLOCK; b++) {
        const float *from = x + b * RT_CPU_BLOCK;
        uint8_t *to = code + b * RT_CPU_BLOCK;
        const float s = block_scale(from, pow2);
        for (int j = 0; j < RT_CPU_BLOCK; j++)
            to[j] = (uint8_t)to_e4m3(from[j] / s);
        scale[b * scale_ld] = s;
    }
}

void rt_cpu_quant_row(const float *x, const struct rt_act *q, int64_t row, int64_t n, int64_t cols, bool pow2)
{
    quant_row(x, (uint8_t *)q->data + row * cols, q->scale + row, n, cols, pow2);
}

void rt_cpu_quant_round(float *x, int64_t cols, bool pow2)
{
    uint8_t code[RT_CPU_BLOCK];
    float scale;
    const struct rt_act q = {code, &scale};
    for (int64_t j = 0; j < cols; j += RT_CPU_BLOCK) {
        quant_row(x + j, code, &scale, 1, RT_CPU_BLOCK, pow2);
        rt_cpu_dequant_row(x + j, &q, 0, 1, RT_CPU_BLOCK);
    }
}

enum rt_status rt_cpu_quant_check(const char *op, int64_t cols, struct rt_err *err)
{
    if (cols % RT_CPU_BLOCK == 0)
        return RT_OK;
    return rt_fail(err, RT_SHAPE, "%s: %lld columns; the e4m3 form needs a multiple of %d", op, (long long)cols, RT_CPU_BLOCK);
}

enum rt_status rt_cpu_act_check(const struct rt_act *x, const struct rt_weight *w, const char *op, int64_t K, struct rt_err *err)
{
    if (x->scale == NULL)
        return RT_OK;
    if (w->dtype != RT_E4M3)
        return rt_fail(err, RT_UNSUPPORTED, "%s: a product with e4m3 activations needs an e4m3 weight, not %s", op,
                       rt_dtype_name(w->dtype));
    return rt_cpu_quant_check(op, K, err);
}

struct quant_job {
    const struct rt_quant_args *a;
};

static void quant_rows(void *ctx, int64_t row0, int64_t row1, __attribute__((unused)) int worker)
{
    const struct rt_quant_args *a = ((const struct quant_job *)ctx)->a;
    const int64_t ldx = a->ldx != 0 ? a->ldx : a->cols;
    for (int64_t i = row0; i < row1; i++)
        rt_cpu_quant_row((const float *)a->x + i * ldx, &a->q, i, a->n, a->cols, a->pow2);
}

enum rt_status rt_cpu_quant(struct rt_dev *dev, __attribute__((unused)) struct rt_queue *q, const struct rt_quant_args *a,
                            struct rt_err *err)
{
    const enum rt_status st = rt_cpu_quant_check("quant", a->cols, err);
    if (st == RT_OK)
        rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->cols), quant_rows, &(struct quant_job){a});
    return st;
}

static void encode_rows(void *ctx, int64_t row0, int64_t row1, __attribute__((unused)) int worker)
{
    const struct rt_encode_rows_args *a = ctx;
    for (int64_t i = row0; i < row1; i++) {
        const float *x = a->x + i * a->cols;
        float amax = 1e-12f;
        for (int64_t j = 0; j < a->cols; j++)
            amax = fmaxf(amax, fabsf(x[j]));
        const float scale = amax / 448.0f;
        a->scale[i] = scale;
        for (int64_t j = 0; j < a->cols; j++)
            a->code[i * a->cols + j] = rt_f32_to_e4m3(x[j] / scale);
    }
}

enum rt_status rt_cpu_encode_rows(struct rt_dev *dev, __attribute__((unused)) struct rt_queue *q, const struct rt_encode_rows_args *a,
                                  __attribute__((unused)) struct rt_err *err)
{
    struct rt_encode_rows_args args = *a;
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->cols * 8), encode_rows, &args);
    return RT_OK;
}
