#include "core/rng.h"

#include <math.h>

/* Philox-4x32-10: ten rounds of two multiplications, key raised by two odd constants (golden ratio, sqrt(3) - 1). */
static void philox(uint64_t seed, uint64_t stream, uint64_t counter, uint32_t x[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    x[0] = (uint32_t)counter;
    x[1] = (uint32_t)(counter >> 32);
    x[2] = (uint32_t)stream;
    x[3] = (uint32_t)(stream >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * x[0], b = (uint64_t)0xCD9E8D57u * x[2];
        x[0] = (uint32_t)(b >> 32) ^ x[1] ^ k0;
        x[1] = (uint32_t)b;
        x[2] = (uint32_t)(a >> 32) ^ x[3] ^ k1;
        x[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

static double unit(uint32_t lo, uint32_t hi)
{
    return (double)(((uint64_t)hi << 32 | lo) >> 11) * 0x1p-53;
}

uint64_t rt_rng_u64(uint64_t seed, uint64_t stream, uint64_t counter)
{
    uint32_t x[4];
    philox(seed, stream, counter, x);
    return (uint64_t)x[1] << 32 | x[0];
}

double rt_rng_uniform(uint64_t seed, uint64_t stream, uint64_t counter)
{
    uint32_t x[4];
    philox(seed, stream, counter, x);
    return unit(x[0], x[1]);
}

float rt_rng_normal(uint64_t seed, uint64_t stream, uint64_t counter)
{
    uint32_t x[4];
    philox(seed, stream, counter, x);
    const double u = 1.0 - unit(x[0], x[1]); /* (0, 1]: the logarithm is finite */
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586477 * unit(x[2], x[3])));
}

/* In [0, n), unbiased: the draws that would favour some values are thrown away. */
static uint64_t below(uint64_t seed, uint64_t stream, uint64_t *counter, uint64_t n)
{
    const uint64_t uneven = (0 - n) % n; /* 2^64 mod n */
    for (;;) {
        const uint64_t v = rt_rng_u64(seed, stream, (*counter)++);
        if (v >= uneven)
            return v % n;
    }
}

void rt_rng_permutation(uint64_t seed, uint64_t stream, int64_t n, int64_t *perm)
{
    uint64_t counter = 0;
    for (int64_t i = 0; i < n; i++)
        perm[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)below(seed, stream, &counter, (uint64_t)i + 1);
        const int64_t t = perm[i];
        perm[i] = perm[j];
        perm[j] = t;
    }
}

uint64_t rt_rng_stream(const char *name)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (; *name != '\0'; name++)
        h = (h ^ (unsigned char)*name) * 0x100000001b3u;
    return h;
}
