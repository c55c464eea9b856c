/* Candidates take turns, round after round and without a pause, so that clocks and heat are the same for all; those near the fastest run on.
 * A round's times come from one event between neighbours. Finalists then run by themselves, each for long. Contract: race.h. */
#include "core/cuda/race.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/cuda/nccl.h"

enum { ROUNDS = 3, FINAL_ROUNDS = 8, FINALISTS = 3 };
static const float near_best = 1.05f;  /* how far from the fastest a candidate may be after the first rounds */
static const float in_a_row = 200e3f;  /* ns of work between two events, which take some 2000 by themselves */

struct trial {
    float ns[ROUNDS + FINAL_ROUNDS], median;
    int n; /* -1: out */
};

struct race {
    struct rt_queue *q;
    bool (*run)(void *ctx, int i);
    void *ctx;
    cudaEvent_t at[RT_RACE_MOST + 1];
    int n;
    struct trial t[RT_RACE_MOST];
};

/* Candidate i `times` times in a row; false: it refuses. */
static bool run_row(const struct race *r, int i, int times)
{
    bool ok = true;
    for (int k = 0; ok && k < times; k++)
        ok = r->run(r->ctx, i);
    return ok;
}

/* *ns of one run of candidate i, of `times` in a row; negative where it refuses. */
static enum rt_status time_one(const struct race *r, int i, int times, float *ns, struct rt_err *err)
{
    enum rt_status st;
    float ms = 0;
    RT_CUDA_TRY(cudaEventRecord(r->at[0], r->q->stream));
    const bool ok = run_row(r, i, times);
    RT_CUDA_TRY(cudaEventRecord(r->at[1], r->q->stream));
    RT_CUDA_TRY(cudaEventSynchronize(r->at[1]));
    RT_CUDA_TRY(cudaEventElapsedTime(&ms, r->at[0], r->at[1]));
    *ns = ok ? ms * 1e6f / (float)times : -1;
out:
    return st;
}

static int by_float(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void take_median(struct trial *t)
{
    float sorted[ROUNDS + FINAL_ROUNDS];
    memcpy(sorted, t->ns, sizeof sorted);
    qsort(sorted, (size_t)t->n, sizeof *sorted, by_float);
    t->median = sorted[t->n / 2];
}

/* One round over those of `in`, without a pause between them. */
static enum rt_status round_of(struct race *r, const bool in[RT_RACE_MOST], int times, struct rt_err *err)
{
    enum rt_status st;
    RT_CUDA_TRY(cudaEventRecord(r->at[0], r->q->stream));
    for (int i = 0; i < r->n; i++) {
        if (in[i] && !run_row(r, i, times))
            r->t[i].n = -1;
        RT_CUDA_TRY(cudaEventRecord(r->at[i + 1], r->q->stream));
    }
    RT_CUDA_TRY(cudaEventSynchronize(r->at[r->n]));
    for (int i = 0; i < r->n; i++) {
        float ms = 0;
        if (!in[i] || r->t[i].n < 0)
            continue;
        RT_CUDA_TRY(cudaEventElapsedTime(&ms, r->at[i], r->at[i + 1]));
        r->t[i].ns[r->t[i].n++] = ms * 1e6f / (float)times;
    }
out:
    return st;
}

/* `count` rounds over the candidates whose median is at most `most` ns, and over the first. */
static enum rt_status rounds(struct race *r, int times, int count, float most, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int k = 0; k < count; k++) {
        bool in[RT_RACE_MOST];
        for (int i = 0; i < r->n; i++)
            in[i] = r->t[i].n >= 0 && (i == 0 || r->t[i].median <= most);
        RT_TRY(round_of(r, in, times, err));
    }
    for (int i = 0; i < r->n; i++)
        if (r->t[i].n > 0)
            take_median(&r->t[i]);
out:
    return st;
}

/* The candidate of the least median, -1 for none. */
static int fastest(const struct race *r)
{
    int best = -1;
    for (int i = 0; i < r->n; i++)
        if (r->t[i].n > 0 && (best < 0 || r->t[i].median < r->t[best].median))
            best = i;
    return best;
}

/* Loads the kernels, finds those that refuse, and warms up. *once: ns of the fastest; negative: all refuse. */
static enum rt_status begin(struct race *r, double warm_up, float *once, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int runs = -1;
    *once = -1;
    for (int i = 0; i < r->n; i++) {
        float ns;
        RT_TRY(time_one(r, i, 1, &ns, err));
        RT_TRY(time_one(r, i, 1, &ns, err));
        r->t[i].n = ns < 0 ? -1 : 0;
        if (ns >= 0 && runs < 0)
            runs = i;
        if (ns >= 0 && (*once < 0 || ns < *once))
            *once = ns;
    }
    for (double left = warm_up; runs >= 0 && left > 0;) {
        float ns;
        const double fit = left * 1e9 / fmax(*once, 1000);
        const int times = fit < 1 ? 1 : fit > 1000 ? 1000 : (int)fit;
        RT_TRY(time_one(r, runs, times, &ns, err));
        left -= fmax(ns, 1000) * times * 1e-9;
    }
out:
    return st;
}

static enum rt_status run_all(struct race *r, double warm_up, struct rt_err *err)
{
    enum rt_status st;
    float once;
    RT_TRY(begin(r, warm_up, &once, err));
    if (once < 0)
        goto out;
    const float fit = in_a_row / fmaxf(once, 1000);
    const int times = fit < 1 ? 1 : (int)fit;
    RT_TRY(rounds(r, times, ROUNDS, 0, err));
    const int ahead = fastest(r);
    if (ahead >= 0)
        RT_TRY(rounds(r, times, FINAL_ROUNDS, r->t[ahead].median * near_best, err));
out:
    return st;
}

/* Leaves in the race those of the final alone, with the means of their long runs. */
static enum rt_status final(struct race *r, const struct rt_race_rules *rules, struct rt_err *err)
{
    int in[FINALISTS + 1], n = 0;
    float sum[FINALISTS + 1] = {0};
    enum rt_status st = RT_OK;
    for (int i; n < FINALISTS && (i = fastest(r)) >= 0; r->t[i].n = -1)
        in[n++] = i;
    for (int i = 0; i < r->n; i++) {
        if (i == rules->also && r->t[i].n > 0)
            in[n++] = i;
        r->t[i].n = -1;
    }
    for (int k = 0; k < 2 * n; k++) {
        const int j = k < n ? k : 2 * n - 1 - k;
        float ns;
        RT_TRY(time_one(r, in[j], 1 + (int)(rules->alone * 1e9 / fmax(r->t[in[j]].median, 1000)), &ns, err));
        sum[j] = ns < 0 || sum[j] < 0 ? -1 : sum[j] + ns / 2;
    }
    for (int j = 0; j < n; j++) {
        r->t[in[j]].n = sum[j] > 0 ? 1 : -1;
        r->t[in[j]].median = sum[j];
    }
out:
    return st;
}

enum rt_status rt_cuda_race(struct rt_queue *q, int n, bool (*run)(void *ctx, int i), void *ctx, const struct rt_race_rules *rules,
                            struct rt_race_result *out, struct rt_err *err)
{
    struct race r = {.q = q, .run = run, .ctx = ctx, .n = n};
    enum rt_status st;
    *out = (struct rt_race_result){0};
    RT_TRY(rt_cuda_settle(q->dev, err)); /* what is waited for below is this device's own work then */
    for (int i = 0; i <= n; i++)
        RT_CUDA_TRY(cudaEventCreate(&r.at[i]));
    RT_TRY(run_all(&r, rules->warm_up, err));
    if (fastest(&r) < 0)
        goto out;
    out->first_ns = r.t[0].n > 0 ? (int64_t)r.t[0].median : 0;
    if (rules->alone > 0 && n > 1)
        RT_TRY(final(&r, rules, err));
    const int best = fastest(&r);
    if (best < 0)
        goto out;
    out->best = r.t[0].n > 0 && r.t[best].median > 0.99f * r.t[0].median ? 0 : best;
    if (r.t[0].n > 0)
        out->first_ns = (int64_t)r.t[0].median;
    out->best_ns = (int64_t)r.t[out->best].median;
out:
    for (int i = 0; i <= n; i++)
        if (r.at[i] != NULL)
            (void)cudaEventDestroy(r.at[i]);
    return st;
}
