/* Exponentials of a softmax. */
#ifndef RT_CORE_CPU_EXP0_H
#define RT_CORE_CPU_EXP0_H

#include "core/cpu/simd.h"

/* e^x for x <= 0 or near it, 0 below -60: 1e-26 next to a greatest term of 1 is far below float32's rounding, while what it goes on
 * to be multiplied by would make it subnormal, over which products run a hundred times slower. NaN stays NaN. */
RT_INLINE float rt_cpu_exp_or_0(float x)
{
    const float e = rt_exp(x < -60.0f ? -60.0f : x);
    return x < -60.0f ? 0.0f : e;
}

#endif
