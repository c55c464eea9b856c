/* The fastest of several ways to do the same work on a queue, by events. */
#ifndef RT_CORE_CUDA_RACE_H
#define RT_CORE_CUDA_RACE_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_RACE_MOST = 16 };
struct rt_race_rules {
    double warm_up; /* seconds of work before it, of the first candidate that does not refuse */
    /* 0, or seconds that each of the fastest three, and candidate `also` (-1: none), then runs by itself, twice, the second time in reverse order; the best of
     * these is chosen. At the power limit an algorithm that takes more energy is slower, but not within the fractions of a millisecond of a turn. */
    double alone;
    int also;
};
struct rt_race_result {
    int best;                  /* 0 unless another takes at least 1 % less time, which is what measurements differ by */
    int64_t first_ns, best_ns; /* medians of candidate 0 (0: it refuses) and of the best; 0 where all refuse */
};
/* run(ctx, i) enqueues candidate i of n (1 .. RT_RACE_MOST) once on q; false: it refuses, and is out. Each runs a dozen times or more. Waits. */
enum rt_status rt_cuda_race(struct rt_queue *q, int n, bool (*run)(void *ctx, int i), void *ctx, const struct rt_race_rules *rules,
                            struct rt_race_result *out, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
