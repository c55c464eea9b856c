/* The head of a scored window: top-k, log sum exp, the realised token. */
#include "core/ref/ref.h"

enum { TILE = 16 }; /* tokens that share one conversion of the head's rows */

static double log_sum_exp(const float *z, int64_t n, double inv_temp)
{
    double top = -INFINITY, sum = 0;
    for (int64_t v = 0; v < n; v++)
        top = fmax(top, z[v] * inv_temp);
    for (int64_t v = 0; v < n; v++)
        sum += exp(z[v] * inv_temp - top);
    return top + log(sum);
}

/* By descending logit, then ascending id: a later id of an equal logit comes after. */
static void top_k(const float *z, int64_t n, int k, uint32_t *ids, float *logits)
{
    int have = 0;
    for (int64_t v = 0; v < n; v++) {
        if (have == k && !(z[v] > logits[k - 1]))
            continue;
        int p = have < k ? have++ : k - 1;
        for (; p > 0 && z[v] > logits[p - 1]; p--) {
            logits[p] = logits[p - 1];
            ids[p] = ids[p - 1];
        }
        logits[p] = z[v];
        ids[p] = (uint32_t)v;
    }
}

static void head_row(const struct rt_head_topk_args *a, int64_t t, const float *z)
{
    if (a->topk_ids != NULL)
        top_k(z, a->n_ids, a->k, a->topk_ids + t * a->k, a->topk_logits + t * a->k);
    for (int i = 0; i < a->n_lse; i++)
        a->lse[t * a->n_lse + i] = (float)log_sum_exp(z, a->n_ids, a->inv_temp[i]);
    if (a->next == NULL)
        return;
    const int32_t next = a->next[t];
    const bool exists = next >= 0 && next < a->n_ids;
    if (a->next_logprob != NULL)
        a->next_logprob[t] = exists ? (float)(z[next] - log_sum_exp(z, a->n_ids, 1)) : -INFINITY;
    if (a->next_rank != NULL) {
        int64_t rank = exists ? 0 : a->n_ids;
        for (int64_t v = 0; v < a->n_ids && exists; v++)
            rank += z[v] > z[next] || (z[v] == z[next] && v < next);
        a->next_rank[t] = (uint32_t)rank;
    }
}

REF_OP(head_topk)
{
    enum rt_status st;
    real *tmp = NULL;
    float *z = NULL;

    RT_TRY(REF(weight_check)(a->w, "head_topk", a->w->rows, a->H, err));
    if (a->n_ids <= 0 || a->n_ids > a->w->rows || a->k < 0 || a->k > a->n_ids)
        RT_FAIL(err, SHAPE, "head_topk: the best %d of %lld ids from a head of %lld rows", a->k, (long long)a->n_ids,
                (long long)a->w->rows);
    RT_TRY(rt_alloc((size_t)a->H, sizeof(real), "a row of weights", &tmp, err));
    RT_TRY(rt_alloc((size_t)a->n_ids * TILE, sizeof *z, "a tile of logits", &z, err));
    for (int64_t t0 = 0; t0 < a->n; t0 += TILE) {
        const int64_t rows = a->n - t0 < TILE ? a->n - t0 : TILE;
        for (int64_t v = 0; v < a->n_ids; v++) {
            const real *w_row = REF(weight_row)(a->w, v, tmp);
            for (int64_t t = 0; t < rows; t++)
                z[t * a->n_ids + v] = (float)ref_dot((const real *)a->x + (t0 + t) * a->H, w_row, a->H);
        }
        for (int64_t t = 0; t < rows; t++)
            head_row(a, t0 + t, z + t * a->n_ids);
    }
out:
    rt_free(tmp);
    rt_free(z);
    return st;
}

REF_OP(sample)
{
    enum rt_status st;
    struct rt_sampler *s = NULL;
    RT_TRY(rt_sampler_create(a->n_ids, &a->params, &s, err));
    for (int64_t i = 0; i < a->n; i++)
        RT_TRY(rt_sampler_draw(s, a->z + i * a->ld, a->seed, a->stream[i], (uint64_t)a->position[i], &a->id[i], &a->logprob[i], err));
out:
    rt_sampler_free(s);
    return st;
}
