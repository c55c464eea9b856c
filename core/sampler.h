/* One token from a row of logits.
 *
 * With l the logits of ids [0, n_ids) (float32, natural logarithms up to a constant):
 *   1. temperature T: weight w_i = exp((l_i - max l) / T); T = 0 takes the greatest logit, the lowest id among equals;
 *   2. top_k > 0 keeps the k ids with the greatest logits, the lower id first among equals; 0 keeps all;
 *   3. top_p < 1 keeps, of these, the fewest ids in the same order whose share of the kept weight reaches p (the id that
 *      crosses p is the last);
 *   4. the id whose part of the cumulated weights of the kept ids, in ascending id, holds u * their sum,
 *      u = rt_rng_uniform(seed, stream, position).
 * So the choice is a function of (seed, stream, position) and of the row alone. Weights below e^-64 of the greatest are 0.
 * Time is O(n_ids): a histogram finds where a prefix ends, and only the ids of that bucket are sorted.
 */
#ifndef RT_CORE_SAMPLER_H
#define RT_CORE_SAMPLER_H

#include <stdint.h>

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_sample_params {
    double temperature; /* >= 0 */
    int64_t top_k;      /* 0: off */
    double top_p;       /* (0, 1]; 1: off */
};

/* Parameters and scratch (10 bytes an id); one for each thread that samples. */
struct rt_sampler;

/* Ids from n_ids on are never sampled, nor read. USAGE for parameters out of range. */
enum rt_status rt_sampler_create(int64_t n_ids, const struct rt_sample_params *params, struct rt_sampler **out,
                                 struct rt_err *err);
void rt_sampler_free(struct rt_sampler *s); /* NULL is fine */

/* logits [n_ids or more]. *logprob = log of the id's probability under the unrestricted distribution at T = 1 (nats).
 * NUMERIC where a logit below n_ids is NaN or infinite, with its id. */
enum rt_status rt_sampler_pick(struct rt_sampler *s, const float *logits, uint64_t seed, uint64_t stream, uint64_t position,
                               int32_t *id, float *logprob, struct rt_err *err);

/* The same, but a logit that is NaN or infinite is no error: *id = -1 - its id (the first such), *logprob NaN. */
enum rt_status rt_sampler_draw(struct rt_sampler *s, const float *logits, uint64_t seed, uint64_t stream, uint64_t position,
                               int32_t *id, float *logprob, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
