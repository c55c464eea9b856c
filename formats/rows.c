#include "formats/rows.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/row_loops.h"
#include "core/mem.h"
#include "core/sha256.h"

void rt_rows_key(const uint32_t *ids, int64_t n, uint8_t key[RT_KEY_BYTES])
{
    uint8_t digest[32];
    rt_sha256(ids, (size_t)n * sizeof *ids, digest);
    memcpy(key, digest, RT_KEY_BYTES);
}

/* What the probabilities of a row may sum to above 1: float32 rounding of lse near 100 is 8e-6, so this is roomy for any
 * order of summation and far below what a wrong lse gives. */
static const double MASS_SLACK = 1e-3;

static enum rt_status check_tokens(const struct rt_rows *r, const struct rt_row_identity *id, const char *where, struct rt_err *err)
{
    uint8_t key[RT_KEY_BYTES];
    uint32_t end = 0;
    if (r->n_tokens < 1 || r->n_tokens > INT32_MAX || r->n_rows < 0 || r->n_rows > r->n_tokens - 1)
        return rt_fail(err, RT_FORMAT, "%s: %" PRId64 " rows of %" PRId64 " tokens: expected at most tokens - 1", where, r->n_rows,
                       r->n_tokens);
    if (r->text_len < 0 || (r->text == NULL) != (r->byte_end == NULL) || (r->text == NULL && r->text_len != 0))
        return rt_fail(err, RT_FORMAT, "%s: text and the tokens' ends in it have to come together", where);
    for (int64_t i = 0; i < r->n_tokens; i++) {
        if (r->ids[i] >= id->n_ids)
            return rt_fail(err, RT_FORMAT, "%s: token %" PRId64 " has id %u, expected below %" PRId64, where, i, r->ids[i], id->n_ids);
        if (r->loss_mask[i] > 1)
            return rt_fail(err, RT_FORMAT, "%s: token %" PRId64 " has loss mask %u, expected 0 or 1", where, i, r->loss_mask[i]);
        if (r->byte_end != NULL && r->byte_end[i] < end)
            return rt_fail(err, RT_FORMAT, "%s: token %" PRId64 " ends at byte %u of the text, the one before at %u", where, i,
                           r->byte_end[i], end);
        end = r->byte_end != NULL ? r->byte_end[i] : 0;
    }
    if ((int64_t)end != r->text_len)
        return rt_fail(err, RT_FORMAT, "%s: the last token ends at byte %u, the text has %" PRId64, where, end, r->text_len);
    rt_rows_key(r->ids, r->n_tokens, key);
    if (memcmp(key, r->key, sizeof key) != 0)
        return rt_fail(err, RT_FORMAT, "%s: the key is not that of the token ids", where);
    return RT_OK;
}

/* Ids of a row that were met: an open table of four slots an id or more. A slot holds the row, from 1 on, above the id: it needs no clearing. */
struct seen {
    uint64_t *slot;
    size_t mask;
};

static enum rt_status seen_make(struct seen *s, int k, struct rt_err *err)
{
    size_t n = 64;
    while (n < 4 * (size_t)k)
        n *= 2;
    s->mask = n - 1;
    return rt_alloc(n, sizeof *s->slot, "ids of a row", &s->slot, err);
}

/* Takes id of row i; whether it was there. */
static bool seen_before(const struct seen *s, int64_t i, uint32_t id)
{
    const uint64_t row = (uint64_t)i + 1, it = row << 32 | id;
    size_t at = (size_t)(id * 0x9e3779b1u >> 8) & s->mask;
    while (s->slot[at] >> 32 == row) {
        if (s->slot[at] == it)
            return true;
        at = (at + 1) & s->mask;
    }
    s->slot[at] = it;
    return false;
}

static enum rt_status check_topk(const struct rt_rows *r, int64_t i, const struct rt_row_identity *id, const struct seen *seen, const char *where,
                                 struct rt_err *err)
{
    const uint32_t *ids = r->topk_ids + i * r->k;
    const float *logits = r->topk_logits + i * r->k;
    const int n = id->origin.mode[0] != '\0' ? rt_row_entries(r, i) : r->k;
    for (int j = n; j < r->k; j++)
        if (!(isinf(logits[j]) && logits[j] < 0))
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": entry %d is empty and has the logit %g", where, i, j, (double)logits[j]);
    for (int j = 0; j < n; j++) {
        if (!isfinite(logits[j]))
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": logit %d is not finite", where, i, j);
        if (ids[j] >= id->n_ids)
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": id %u, expected below %" PRId64, where, i, ids[j], id->n_ids);
        if (j > 0 && !(logits[j - 1] > logits[j] || (logits[j - 1] == logits[j] && ids[j - 1] < ids[j])))
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": entries %d and %d are not by descending logit, then ascending id", where, i,
                           j - 1, j);
        if (seen_before(seen, i, ids[j]))
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": id %u is there twice", where, i, ids[j]);
    }
    return RT_OK;
}

/* What the probabilities of k logits at temperature T sum to, where it matters: where a sum in float32 shows that it is not above 1 + MASS_SLACK, that sum.
 * Exponents of up to 512 + 256 are off by 1e-4 there (those that are off by more are below -256), so half the slack is enough. */
static double mass_of(const float *logits, int k, double T, float lse)
{
    double mass = 0;
    if (k > 0 && fabsf(lse) <= 256 && fabs(logits[0] / T) <= 512) {
        mass = rt_exp_sum(logits, k, (float)(1 / T), lse);
        if (mass <= 1 + MASS_SLACK / 2)
            return mass;
        mass = 0;
    }
    for (int j = 0; j < k; j++)
        mass += exp(logits[j] / T - lse);
    return mass;
}

static enum rt_status check_row(const struct rt_rows *r, int64_t i, const struct rt_row_identity *id, const struct seen *seen, const char *where,
                                struct rt_err *err)
{
    const uint32_t pos = r->position[i];
    const float *lse = r->lse + i * r->n_lse;
    if ((int64_t)pos >= r->n_tokens - 1 || (i > 0 && pos <= r->position[i - 1]))
        return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 " has position %u: expected ascending, below %" PRId64, where, i, pos,
                       r->n_tokens - 1);
    if (r->next_id[i] != r->ids[pos + 1])
        return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": next token %u, but token %u of the sequence is %u", where, i, r->next_id[i],
                       pos + 1, r->ids[pos + 1]);
    if (id->completion_only && r->loss_mask[pos + 1] != 1)
        return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 " is of a token that is masked out", where, i);
    const enum rt_status st = check_topk(r, i, id, seen, where, err);
    if (st != RT_OK)
        return st;
    int at1 = 0;
    for (int t = 0; t < r->n_lse; t++) {
        if (!isfinite(lse[t]))
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": log-sum-exp %d is not finite", where, i, t);
        const double mass = mass_of(r->topk_logits + i * r->k, r->k, id->lse_temperature[t], lse[t]);
        if (mass > 1 + MASS_SLACK)
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": probabilities at temperature %g sum to %g", where, i,
                           id->lse_temperature[t], mass);
        if (id->lse_temperature[t] == 1)
            at1 = t;
    }
    if (!isfinite(r->next_logprob[i]) || r->next_logprob[i] > MASS_SLACK || (int64_t)r->next_rank[i] >= id->n_ids)
        return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": next token with log-probability %g and rank %u", where, i,
                       (double)r->next_logprob[i], r->next_rank[i]);
    if (r->next_rank[i] < (uint32_t)(id->origin.mode[0] != '\0' ? rt_row_entries(r, i) : r->k)) {
        const int64_t e = i * r->k + r->next_rank[i];
        const double want = (double)r->topk_logits[e] - lse[at1];
        if (r->topk_ids[e] != r->next_id[i] || fabs(want - r->next_logprob[i]) > MASS_SLACK * (1 + fabs(want)))
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": next token %u of log-probability %g and rank %u, but the entry there is id %u, %g",
                           where, i, r->next_id[i], (double)r->next_logprob[i], r->next_rank[i], r->topk_ids[e], want);
    }
    return RT_OK;
}

static enum rt_status check_feature(const struct rt_rows *r, int f, const struct rt_feature_spec *spec, const char *where,
                                    struct rt_err *err)
{
    const int64_t n = r->n_tokens * spec->dim;
    int64_t at = -1;
    if (r->feature[f] == NULL || (spec->dtype == RT_E4M3) != (r->feature_scale[f] != NULL))
        return rt_fail(err, RT_FORMAT, "%s: feature %d lacks its states or its scales", where, f);
    if (spec->dtype == RT_BF16) {
        const uint16_t *v = r->feature[f];
        for (int64_t i = 0; i < n && at < 0; i++)
            at = (v[i] & 0x7f80) == 0x7f80 ? i : -1;
    } else {
        const uint8_t *v = r->feature[f];
        for (int64_t i = 0; i < n && at < 0; i++)
            at = (v[i] & 0x7f) == 0x7f || !isfinite(r->feature_scale[f][i / spec->dim]) ? i : -1;
    }
    if (at >= 0)
        return rt_fail(err, RT_FORMAT, "%s: feature %d: token %" PRId64 " is not finite", where, f, at / spec->dim);
    return RT_OK;
}

static enum rt_status check_spans(const struct rt_rows *r, const struct rt_row_identity *id, const char *where, struct rt_err *err)
{
    const bool spans = rt_row_identity_spans(id);
    int64_t free_rows = 0; /* rows since the last span */
    if ((r->boundary_logp != NULL) != (id->boundary && !spans) || (r->span != NULL) != spans || (r->span_logp != NULL) != spans)
        return rt_fail(err, RT_FORMAT, "%s: rows have boundaries, or spans, where the identity says so", where);
    for (int64_t i = 0; r->boundary_logp != NULL && i < r->n_rows; i++)
        if (!(r->boundary_logp[i] <= MASS_SLACK))
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 ": the mass of the boundary ids has the logarithm %g", where, i, (double)r->boundary_logp[i]);
    for (int64_t i = 0; r->span != NULL && i < r->n_rows; i++) {
        free_rows = i > 0 && r->position[i] == r->position[i - 1] + 1 ? free_rows + 1 : 1;
        if (r->span[i] > free_rows || !isfinite(r->span_logp[i]) || r->span_logp[i] > MASS_SLACK || (r->span[i] == 0 && r->span_logp[i] != 0))
            return rt_fail(err, RT_FORMAT, "%s: row %" PRId64 " ends a span of %u rows with log-probability %g: %" PRId64 " rows are free before it", where, i,
                           r->span[i], (double)r->span_logp[i], free_rows);
        free_rows = r->span[i] > 0 ? 0 : free_rows;
    }
    return RT_OK;
}

enum rt_status rt_rows_check(const struct rt_rows *r, const struct rt_row_identity *id, const char *where, struct rt_err *err)
{
    enum rt_status st;
    const int64_t k = rt_row_identity_k(id);
    struct seen seen = {NULL, 0};
    if (r->k != k || r->n_lse != id->n_lse || r->n_features != id->n_features)
        RT_FAIL(err, FORMAT, "%s: rows with k %d, %d temperatures, %d features, the identity has %" PRId64 ", %d, %d", where, r->k,
                r->n_lse, r->n_features, k, id->n_lse, id->n_features);
    RT_TRY(check_tokens(r, id, where, err));
    if (!id->completion_only && r->n_rows != r->n_tokens - 1)
        RT_FAIL(err, FORMAT, "%s: %" PRId64 " rows, expected all %" PRId64, where, r->n_rows, r->n_tokens - 1);
    RT_TRY(seen_make(&seen, r->k, err));
    for (int64_t i = 0; i < r->n_rows; i++)
        RT_TRY(check_row(r, i, id, &seen, where, err));
    for (int f = 0; f < r->n_features; f++)
        RT_TRY(check_feature(r, f, &id->feature[f], where, err));
    RT_TRY(check_spans(r, id, where, err));
    if ((r->feature_mask != NULL) != (id->origin.mode[0] != '\0' && r->n_features > 0))
        RT_FAIL(err, FORMAT, "%s: rows of another tokenizer say which tokens have states, others do not", where);
    for (int64_t i = 0; r->feature_mask != NULL && i < r->n_tokens; i++)
        if (r->feature_mask[i] > 1)
            RT_FAIL(err, FORMAT, "%s: token %" PRId64 " has state mask %u, expected 0 or 1", where, i, r->feature_mask[i]);
out:
    rt_free(seen.slot);
    return st;
}
