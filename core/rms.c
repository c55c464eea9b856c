#include "core/rms.h"

#include <math.h>

enum { RUN = 128, LANES = 8 };

static float sum_squares(const float *x, int64_t n)
{
    if (n > RUN) {
        const int64_t half = n / 2 - n / 2 % LANES;
        return sum_squares(x, half) + sum_squares(x + half, n - half);
    }
    int64_t i = 0;
    float sum = 0;
    if (n >= LANES) {
        float r[LANES];
        for (int j = 0; j < LANES; j++)
            r[j] = x[j] * x[j];
        for (i = LANES; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++)
                r[j] += x[i + j] * x[i + j];
        sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    }
    for (; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

float rt_rms_f32(const float *x, int64_t n, float eps)
{
    return sqrtf(sum_squares(x, n) / (float)n + eps);
}
