/* Ascending order of doubles, for qsort. */
#ifndef RT_BENCH_MEDIAN_H
#define RT_BENCH_MEDIAN_H

#include <string.h>

static inline int bench_by_value(const void *a, const void *b)
{
    double x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return (x > y) - (x < y);
}

#endif
