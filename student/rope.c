#include <math.h>

#include "student/config.h"

static const double two_pi = 6.283185307179586;

/* The dimension whose wave length fits `rotations` times into the original context (YaRN, equation 17). */
static double yarn_dim(const struct rt_student_rope *r, double hd, double rotations)
{
    return hd * log(r->original_max_position / (rotations * two_pi)) / (2 * log(r->theta));
}

static double yarn(const struct rt_student_rope *r, int hd, int j, double freq)
{
    double low = yarn_dim(r, hd, r->beta_fast), high = yarn_dim(r, hd, r->beta_slow);
    if (r->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, hd - 1);
    if (low == high)
        high += 0.001;
    const double ramp = fmin(fmax((j - low) / (high - low), 0), 1);
    return freq / r->factor * ramp + freq * (1 - ramp);
}

static double llama3(const struct rt_student_rope *r, double freq)
{
    const double wave = two_pi / freq;
    if (wave < r->original_max_position / r->high_freq_factor)
        return freq;
    if (wave > r->original_max_position / r->low_freq_factor)
        return freq / r->factor;
    const double s = (r->original_max_position / wave - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    return (1 - s) * freq / r->factor + s * freq;
}

void rt_student_rope_table(const struct rt_student_config *c, int64_t n_pos, float *cos_out, float *sin_out)
{
    const struct rt_student_rope *r = &c->rope;
    const int half = c->head_dim / 2;
    for (int j = 0; j < half; j++) {
        double freq = pow(r->theta, -2.0 * j / c->head_dim);
        switch (r->kind) {
        case RT_ROPE_DEFAULT: break;
        case RT_ROPE_LINEAR: freq /= r->factor; break;
        case RT_ROPE_LLAMA3: freq = llama3(r, freq); break;
        case RT_ROPE_YARN: freq = yarn(r, c->head_dim, j, freq); break;
        }
        const float f = (float)freq;
        for (int64_t p = 0; p < n_pos; p++) {
            const float angle = (float)p * f;
            cos_out[p * half + j] = (float)(cos((double)angle) * r->attention_factor);
            sin_out[p * half + j] = (float)(sin((double)angle) * r->attention_factor);
        }
    }
}
