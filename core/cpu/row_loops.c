#include "core/row_loops.h"

#include "core/cpu/simd.h"

RT_SIMD float rt_exp_sum(const float *x, int64_t n, float scale, float shift)
{
    float lane[16] = {0}, sum = 0;
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        for (int i = 0; i < 16; i++)
            lane[i] += rt_exp(x[j + i] * scale - shift);
    for (; j < n; j++)
        sum += rt_exp(x[j] * scale - shift);
    for (int i = 0; i < 16; i++)
        sum += lane[i];
    return sum;
}

RT_SIMD void rt_row_logp(const float *z, int64_t n, double T, double norm, float *out)
{
    for (int64_t j = 0; j < n; j++) {
        const float p = (float)(z[j] / T - norm);
        out[j] = z[j] == -INFINITY ? 0 : p;
    }
}

RT_SIMD void rt_join_planes4(uint8_t *dst, const uint8_t *planes, size_t n)
{
    const uint8_t *a = planes, *b = planes + n, *c = planes + 2 * n, *d = planes + 3 * n;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        uint32_t v[16];
        for (int j = 0; j < 16; j++)
            v[j] = (uint32_t)a[i + (size_t)j] | (uint32_t)b[i + (size_t)j] << 8 | (uint32_t)c[i + (size_t)j] << 16 | (uint32_t)d[i + (size_t)j] << 24;
        memcpy(dst + 4 * i, v, sizeof v);
    }
    for (; i < n; i++) {
        dst[4 * i] = a[i];
        dst[4 * i + 1] = b[i];
        dst[4 * i + 2] = c[i];
        dst[4 * i + 3] = d[i];
    }
}
