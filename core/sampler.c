#include "core/sampler.h"

#include <math.h>
#include <stdlib.h>

#include "core/mem.h"
#include "core/rng.h"

/* Bucket b holds the ids with (max - l) / T in [b, b + 1) / PER_UNIT. */
enum {
    REACH = 64, /* weights below e^-REACH count as 0 */
    PER_UNIT = 64,
    BUCKETS = REACH * PER_UNIT,
    DROPPED = UINT16_MAX,
};

struct candidate {
    float logit;
    int32_t id;
};

struct rt_sampler {
    int64_t n;
    struct rt_sample_params params;
    double *weight;    /* [n]; 0: not kept */
    uint16_t *bucket;  /* [n]; DROPPED where the weight is 0 */
    double mass[BUCKETS];
    int64_t count[BUCKETS];
    struct candidate *sorted; /* of one bucket, grown when needed */
    int64_t cap;
};

enum rt_status rt_sampler_create(int64_t n_ids, const struct rt_sample_params *params, struct rt_sampler **out,
                                 struct rt_err *err)
{
    enum rt_status st;
    struct rt_sampler *s = NULL;
    *out = NULL;
    if (n_ids < 1 || n_ids > INT32_MAX)
        return rt_fail(err, RT_USAGE, "cannot sample from %lld ids", (long long)n_ids);
    if (!(params->temperature >= 0 && isfinite(params->temperature)))
        return rt_fail(err, RT_USAGE, "temperature is %g, expected 0 (greedy) or more", params->temperature);
    if (params->top_k < 0)
        return rt_fail(err, RT_USAGE, "top-k is %lld, expected 0 (off) or more", (long long)params->top_k);
    if (!(params->top_p > 0 && params->top_p <= 1))
        return rt_fail(err, RT_USAGE, "top-p is %g, expected more than 0 and at most 1 (off)", params->top_p);
    RT_TRY(rt_alloc(1, sizeof *s, "a sampler", &s, err));
    s->n = n_ids;
    s->params = *params;
    if (params->temperature > 0) {
        RT_TRY(rt_alloc((size_t)n_ids, sizeof *s->weight, "a sampler", &s->weight, err));
        RT_TRY(rt_alloc((size_t)n_ids, sizeof *s->bucket, "a sampler", &s->bucket, err));
    }
    *out = s;
out:
    if (st != RT_OK)
        rt_sampler_free(s);
    return st;
}

void rt_sampler_free(struct rt_sampler *s)
{
    if (s == NULL)
        return;
    rt_free(s->weight);
    rt_free(s->bucket);
    rt_free(s->sorted);
    rt_free(s);
}

/* *best = the lowest id with the greatest logit. */
static enum rt_status find_max(const float *logits, int64_t n, int32_t *best, struct rt_err *err)
{
    int64_t at = 0;
    float sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += logits[i] * 0.0f; /* stays 0 unless a logit is NaN or infinite */
        if (logits[i] > logits[at])
            at = i;
    }
    if (!(sum == 0)) {
        for (int64_t i = 0; i < n; i++)
            if (!isfinite(logits[i]))
                return rt_fail(err, RT_NUMERIC, "the logit of id %lld is %g", (long long)i, (double)logits[i]);
    }
    *best = (int32_t)at;
    return RT_OK;
}

/* sum of exp(l - max); what lies 64 below the maximum is beyond a double's last bit. */
static double sum_exp(const float *logits, int64_t n, float max)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double x = (double)logits[i] - max;
        if (x > -REACH)
            sum += exp(x);
    }
    return sum;
}

/* Fills weight and bucket; returns the sum of the weights. */
static double weigh(struct rt_sampler *s, const float *logits, float max)
{
    const double t = s->params.temperature;
    double sum = 0;
    for (int64_t i = 0; i < s->n; i++) {
        const double x = ((double)max - logits[i]) / t;
        const int kept = x < REACH;
        s->weight[i] = kept ? exp(-x) : 0;
        s->bucket[i] = kept ? (uint16_t)(x * PER_UNIT) : DROPPED;
        sum += s->weight[i];
    }
    return sum;
}

static int by_logit(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static void drop(struct rt_sampler *s, int64_t id)
{
    s->weight[id] = 0;
    s->bucket[id] = DROPPED;
}

/* Keeps the shortest prefix, by descending logit, that has `most` ids or at least `need` weight; returns its weight. */
static enum rt_status keep_prefix(struct rt_sampler *s, const float *logits, int64_t most, double need, double *kept,
                                  struct rt_err *err)
{
    for (int b = 0; b < BUCKETS; b++) {
        s->mass[b] = 0;
        s->count[b] = 0;
    }
    for (int64_t i = 0; i < s->n; i++) {
        if (s->bucket[i] != DROPPED) {
            s->mass[s->bucket[i]] += s->weight[i];
            s->count[s->bucket[i]]++;
        }
    }
    double mass = 0;
    int64_t count = 0;
    int last = 0;
    while (last < BUCKETS && count + s->count[last] < most && mass + s->mass[last] < need) {
        mass += s->mass[last];
        count += s->count[last++];
    }
    const int64_t m = last < BUCKETS ? s->count[last] : 0;
    if (m > s->cap) {
        rt_free(s->sorted);
        s->sorted = NULL;
        s->cap = 0;
        const enum rt_status st = rt_alloc((size_t)m, sizeof *s->sorted, "a sampler", &s->sorted, err);
        if (st != RT_OK)
            return st;
        s->cap = m;
    }
    int64_t at = 0;
    for (int64_t i = 0; i < s->n; i++) {
        if (s->bucket[i] == DROPPED || s->bucket[i] < last)
            continue;
        if (s->bucket[i] == last)
            s->sorted[at++] = (struct candidate){logits[i], (int32_t)i};
        else
            drop(s, i);
    }
    if (m > 1)
        qsort(s->sorted, (size_t)m, sizeof *s->sorted, by_logit);
    for (at = 0; at < m && count < most && mass < need; at++, count++)
        mass += s->weight[s->sorted[at].id];
    for (; at < m; at++)
        drop(s, s->sorted[at].id);
    *kept = mass;
    return RT_OK;
}

enum rt_status rt_sampler_pick(struct rt_sampler *s, const float *logits, uint64_t seed, uint64_t stream, uint64_t position,
                               int32_t *id, float *logprob, struct rt_err *err)
{
    enum rt_status st;
    int32_t best = 0, chosen;
    RT_TRY(find_max(logits, s->n, &best, err));
    chosen = best;
    const float max = logits[best];
    double unrestricted;
    if (s->params.temperature == 0) {
        unrestricted = sum_exp(logits, s->n, max);
    } else {
        double sum = weigh(s, logits, max);
        unrestricted = s->params.temperature == 1 ? sum : sum_exp(logits, s->n, max);
        if (s->params.top_k > 0 && s->params.top_k < s->n)
            RT_TRY(keep_prefix(s, logits, s->params.top_k, INFINITY, &sum, err));
        if (s->params.top_p < 1)
            RT_TRY(keep_prefix(s, logits, INT64_MAX, s->params.top_p * sum, &sum, err));
        const double target = rt_rng_uniform(seed, stream, position) * sum;
        double below = 0;
        for (int64_t i = 0; i < s->n; i++) {
            if (s->weight[i] == 0)
                continue;
            chosen = (int32_t)i; /* the last kept id, should rounding leave the target above them all */
            below += s->weight[i];
            if (below > target)
                break;
        }
    }
    *id = chosen;
    *logprob = (float)((double)logits[chosen] - max - log(unrestricted));
out:
    return st;
}

enum rt_status rt_sampler_draw(struct rt_sampler *s, const float *logits, uint64_t seed, uint64_t stream, uint64_t position,
                               int32_t *id, float *logprob, struct rt_err *err)
{
    struct rt_err e = {0};
    const enum rt_status st = rt_sampler_pick(s, logits, seed, stream, position, id, logprob, &e);
    if (st == RT_NUMERIC) {
        *id = 0;
        while (isfinite(logits[*id]))
            ++*id;
        *id = -1 - *id;
        *logprob = NAN;
        return RT_OK;
    }
    return st == RT_OK ? st : rt_fail(err, st, "%s", e.msg);
}
