/* Rows of a shard set computed again by their teacher, on the device at hand, and held against what is stored: is the signal right?
 *
 * Rows are picked evenly over the set; a row needs its sequence up to its own token. Nothing of what made the stored rows is used but the engine: the
 * final states' logits over the whole vocabulary are taken to the host, and first choice, log-sum-exps, log-probability and divergence
 * are computed there from all of them.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/dtype.h"
#include "distill/doctor.h"
#include "teacher/score.h"

enum {
    ROWS = 64,        /* where nobody says how many */
    A_SEQUENCE = 8,   /* rows of one sequence, where there are sequences enough */
    LOGIT_ROWS = 64,  /* rows of logits held at a time */
};

/* What may differ, by how both sides were computed. Logits and log-sum-exps (times T) in units of the spread (standard deviation) of a row's logits. */
struct bound {
    const char *why;
    double kl, logits, sure; /* mean; what 95 % of rows stay within; share of sure first choices that agree */
};
static const struct bound bounds[] = {
    /* sums in another order: 1e-4 of a state's norm (what references are held to) through the head, with room for a row near a tie of two experts */
    {"float32 on both sides", 1e-4, 1e-3, 0.99},
    /* roundings of 2^-9 at each of some dozen operations a layer, and experts chosen otherwise near ties */
    {"bfloat16 rounds every operation", 0.03, 0.1, 0.99},
    /* a changed e4m3 code is a step of 1/16 in its factor, and moves its row and those after it by percents */
    {"activations in FP8", 0.15, 0.25, 0.95},
};

struct picked {
    int64_t n, n_seqs, tokens, longest, k, n_lse;
    struct rt_rows *seq;    /* [n_seqs] beginnings of sequences */
    uint32_t *ids;          /* [tokens], theirs */
    int32_t *token;         /* [n] flat token of each row */
    uint32_t *top, *next, *rank; /* as stored: [n, k], [n], [n] */
    float *logit, *lse, *next_logprob;
};

struct found {
    double kl, kl_worst, *logits, *sums; /* [n]: of each row */
    int64_t first, sure, sure_first, rank;
};

static void drop(struct picked *p)
{
    rt_free(p->seq);
    rt_free(p->ids);
    rt_free(p->token);
    rt_free(p->top);
    rt_free(p->next);
    rt_free(p->rank);
    rt_free(p->logit);
    rt_free(p->lse);
    rt_free(p->next_logprob);
}

/* ---- picking ---- */

/* Rows of a sequence that are short enough. */
static int64_t usable(const struct rt_doctor *d, const struct rt_rows *r)
{
    int64_t n = r->n_rows;
    while (d->max_length > 0 && n > 0 && r->position[n - 1] >= (uint64_t)d->max_length)
        n--;
    return n;
}

static enum rt_status room(const struct rt_row_identity *id, int64_t rows, int64_t seqs, int64_t tokens, struct picked *p, struct rt_err *err)
{
    enum rt_status st;
    const size_t n = (size_t)rows, k = (size_t)id->top_k, l = (size_t)id->n_lse;
    *p = (struct picked){.k = id->top_k, .n_lse = id->n_lse};
    RT_TRY(rt_alloc((size_t)seqs, sizeof *p->seq, "sequences", &p->seq, err));
    RT_TRY(rt_alloc((size_t)tokens, sizeof *p->ids, "ids", &p->ids, err));
    RT_TRY(rt_alloc(n, sizeof *p->token, "rows", &p->token, err));
    RT_TRY(rt_alloc(n * k, sizeof *p->top, "rows", &p->top, err));
    RT_TRY(rt_alloc(n, sizeof *p->next, "rows", &p->next, err));
    RT_TRY(rt_alloc(n, sizeof *p->rank, "rows", &p->rank, err));
    RT_TRY(rt_alloc(n * k, sizeof *p->logit, "rows", &p->logit, err));
    RT_TRY(rt_alloc(n * l, sizeof *p->lse, "rows", &p->lse, err));
    RT_TRY(rt_alloc(n, sizeof *p->next_logprob, "rows", &p->next_logprob, err));
out:
    return st;
}

/* `want` rows of r, evenly, the last one among them. */
static void take(struct picked *p, const struct rt_rows *r, int64_t have, int64_t want)
{
    struct rt_rows *q = &p->seq[p->n_seqs++];
    int64_t last = 0;
    for (int64_t i = 0; i < want; i++) {
        const int64_t row = (i + 1) * have / want - 1;
        const size_t k = (size_t)p->k, l = (size_t)p->n_lse, at = (size_t)p->n++;
        last = r->position[row];
        p->token[at] = (int32_t)(p->tokens + last);
        memcpy(p->top + at * k, r->topk_ids + (size_t)row * k, k * sizeof *p->top);
        memcpy(p->logit + at * k, r->topk_logits + (size_t)row * k, k * sizeof *p->logit);
        memcpy(p->lse + at * l, r->lse + (size_t)row * l, l * sizeof *p->lse);
        p->next[at] = r->next_id[row];
        p->rank[at] = r->next_rank[row];
        p->next_logprob[at] = r->next_logprob[row];
    }
    q->n_tokens = last + 1;
    q->ids = p->ids + p->tokens;
    memcpy(p->ids + p->tokens, r->ids, (size_t)q->n_tokens * sizeof *p->ids);
    p->tokens += q->n_tokens;
    p->longest = q->n_tokens > p->longest ? q->n_tokens : p->longest;
}

static enum rt_status pick(struct rt_doctor *d, struct picked *p, struct rt_err *err)
{
    enum rt_status st;
    struct rt_rows rows;
    const struct rt_row_identity *id = rt_shard_set_identity(d->set);
    const int64_t all = rt_shard_set_info(d->set)->sequences, want = d->rescore > 0 ? d->rescore : ROWS;
    int64_t n_seqs = (want + A_SEQUENCE - 1) / A_SEQUENCE, tokens = 0;
    if (n_seqs > all)
        n_seqs = all;
    for (int64_t s = 0; s < n_seqs; s++) {
        const int64_t n = rt_shard_set_seq(d->set, s * all / n_seqs)->n_tokens;
        tokens += d->max_length > 0 && n > d->max_length ? d->max_length : n;
    }
    RT_TRY(room(id, want, n_seqs, tokens, p, err));
    for (int64_t s = 0; s < n_seqs && p->n < want; s++) {
        const int64_t fair = (want - p->n + n_seqs - s - 1) / (n_seqs - s);
        RT_TRY(rt_shard_set_get(d->set, s * all / n_seqs, &rows, err));
        const int64_t have = usable(d, &rows);
        if (have > 0)
            take(p, &rows, have, have < fair ? have : fair);
    }
out:
    return st;
}

/* ---- one row ---- */

static double log_sum_exp(const float *z, int64_t n, double most, double T)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += exp((z[i] - most) / T);
    return most / T + log(sum);
}

/* KL(stored || here) at T = 1 over the stored ids and one bucket for all others. */
static double divergence(const uint32_t *ids, const float *logit, int64_t k, double lse, const float *z, double lse_here)
{
    double kl = 0, mass = 0, here = 0;
    for (int64_t j = 0; j < k; j++) {
        const double lp = logit[j] - lse, lq = z[ids[j]] - lse_here;
        kl += exp(lp) * (lp - lq);
        mass += exp(lp);
        here += exp(lq);
    }
    if (1 - mass > 1e-6)
        kl += (1 - mass) * log((1 - mass) / fmax(1 - here, 1e-12));
    return kl;
}

/* Row `i` as stored against all logits z [n] computed here. */
static void compare(const struct picked *p, const struct rt_row_identity *id, const struct bound *b, int64_t i, const float *z, struct found *f)
{
    const int64_t n = id->n_ids, k = p->k;
    const uint32_t *ids = p->top + i * k;
    int64_t first = 0, rank = 0;
    double mean = 0, var = 0, off = 0, sums, second = -INFINITY, one = 0;
    for (int64_t v = 0; v < n; v++) {
        mean += z[v] / (double)n;
        if (z[v] > z[first])
            first = v;
    }
    for (int64_t v = 0; v < n; v++) {
        var += (z[v] - mean) * (z[v] - mean) / (double)n;
        second = v != first && z[v] > second ? z[v] : second;
        rank += z[v] > z[p->next[i]] || (z[v] == z[p->next[i]] && v < (int64_t)p->next[i]);
    }
    const double spread = sqrt(var) > 0 ? sqrt(var) : 1;
    for (int64_t j = 0; j < k; j++) {
        const double e = p->logit[i * k + j] - z[ids[j]];
        off += e * e / (double)k;
    }
    const double here = log_sum_exp(z, n, z[first], 1);
    sums = fabs(p->next_logprob[i] - (z[p->next[i]] - here));
    for (int64_t l = 0; l < p->n_lse; l++) {
        const double T = id->lse_temperature[l];
        sums = fmax(sums, T * fabs(p->lse[i * p->n_lse + l] - log_sum_exp(z, n, z[first], T)));
        if (T == 1)
            one = p->lse[i * p->n_lse + l];
    }
    const double kl = divergence(ids, p->logit + i * k, k, one, z, here);
    const bool same = ids[0] == first, sure = z[first] - second > 2 * b->logits * spread;
    f->kl += kl / (double)p->n;
    f->kl_worst = fmax(f->kl_worst, kl);
    f->logits[i] = isfinite(off) ? sqrt(off) / spread : INFINITY;
    f->sums[i] = isfinite(sums) ? sums / spread : INFINITY;
    f->first += same;
    f->sure += sure;
    f->sure_first += sure && same;
    f->rank += rank == (int64_t)p->rank[i];
}

/* ---- all of them ---- */

/* The normalised states of the picked rows, taken as they pass. */
struct taken {
    const struct rt_device *d;
    const struct picked *p;
    int64_t H;
    void *x;        /* device [rows, H] */
    int32_t *index; /* device [rows] */
    enum rt_status st;
    struct rt_err err;
};

static void take_states(void *self, int layer, const void *x, __attribute__((unused)) int64_t n)
{
    struct taken *t = self;
    if (layer != RT_LAYER_FINAL)
        return;
    t->st = rt_device_upload(t->d, t->index, t->p->token, (size_t)t->p->n * sizeof *t->index, &t->err);
    if (t->st == RT_OK)
        t->st = RT_OP(t->d, gather, &t->err, .x = x, .index = t->index, .out = t->x, .n = t->p->n, .cols = t->H);
    if (t->st == RT_OK)
        t->st = rt_device_sync(t->d, &t->err);
}

static enum rt_status states(struct rt_doctor *d, struct rt_teacher *t, struct picked *p, struct taken *x, struct rt_err *err)
{
    const struct rt_backend *be = d->device.be;
    const struct rt_score_options so = {.tap = take_states, .tap_self = x};
    enum rt_status st;
    RT_TRY(be->alloc(d->device.dev, (size_t)(p->n * x->H) * rt_device_act_size(&d->device), &x->x, err));
    RT_TRY(be->alloc(d->device.dev, (size_t)p->n * sizeof *x->index, (void **)&x->index, err));
    RT_TRY(rt_teacher_score(t, &so, p->seq, p->n_seqs, 0, NULL, err));
    if (x->st != RT_OK)
        RT_TRY(rt_fail(err, x->st, "%s", x->err.msg));
out:
    return st;
}

static enum rt_status rescore(struct rt_doctor *d, struct picked *p, const struct bound *b, bool w8a8, struct found *f, struct rt_err *err)
{
    struct rt_teacher *t = NULL;
    struct taken x = {.d = &d->device, .p = p, .H = d->tc.hidden};
    float *z = NULL;
    const int64_t V = d->tc.vocab_size, block = p->n < LOGIT_ROWS ? p->n : LOGIT_ROWS;
    const size_t row = (size_t)x.H * rt_device_act_size(&d->device);
    enum rt_status st;
    /* logits here and, where the device is the host, there */
    const int64_t logits = 2 * block * V * (int64_t)sizeof *z;
    const struct rt_teacher_options o = {.dir = d->teacher, .device = &d->device, .w8a8 = w8a8, .memory = d->memory - logits, .max_length = p->longest,
                                         .window = p->tokens, .data_tokens = p->tokens};
    RT_TRY(rt_alloc((size_t)p->n, sizeof *f->logits, "rows", &f->logits, err));
    RT_TRY(rt_alloc((size_t)p->n, sizeof *f->sums, "rows", &f->sums, err));
    RT_TRY(rt_alloc((size_t)(block * V), sizeof *z, "logits", &z, err));
    RT_TRY(rt_teacher_open(&o, &t, err));
    RT_TRY(states(d, t, p, &x, err));
    for (int64_t i = 0; i < p->n; i += block) {
        const int64_t n = p->n - i < block ? p->n - i : block;
        RT_TRY(rt_teacher_logits(t, -1, (const char *)x.x + (size_t)i * row, n, z, err));
        for (int64_t r = 0; r < n; r++)
            compare(p, rt_shard_set_identity(d->set), b, i + r, z + r * V, f);
    }
out:
    if (x.x != NULL)
        d->device.be->free(d->device.dev, x.x);
    if (x.index != NULL)
        d->device.be->free(d->device.dev, x.index);
    rt_teacher_close(t);
    rt_free(z);
    return st;
}

/* ---- the findings ---- */

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sorts v; what 95 % of its values stay within. */
static double most_of(double *v, int64_t n)
{
    qsort(v, (size_t)n, sizeof *v, ascending);
    return v[(n * 95 + 99) / 100 - 1];
}

static enum rt_status report(struct rt_doctor *d, const struct picked *p, const struct bound *b, struct found *f, const char *mode, struct rt_err *err)
{
    enum rt_status st;
    struct rt_checks *k = &d->checks;
    const double n = (double)p->n, logits = most_of(f->logits, p->n), sums = most_of(f->sums, p->n), sure = f->sure > 0 ? (double)f->sure_first / (double)f->sure : 1;
#define LEVEL(good) ((good) ? RT_CHECK_PASS : RT_CHECK_FAIL)
    RT_TRY(rt_check_add(k, err, LEVEL(f->kl <= b->kl), "shards.rescored.kl", "%" PRId64 " rows of %" PRId64 " sequences computed again in %s (stored: %s): mean KL %.2e nats, at most %.2g (%s); worst row %.2e%s",
                        p->n, p->n_seqs, mode, rt_shard_set_identity(d->set)->mode, f->kl, b->kl, b->why, f->kl_worst,
                        f->kl <= b->kl ? "" : ": the rows are not this teacher's on this text; score it again"));
    RT_TRY(rt_check_add(k, err, LEVEL(logits <= b->logits), "shards.rescored.logits", "95 %% of rows within %.2e of the spread of a row's logits, at most %.2g; worst row %.2e", logits, b->logits,
                        f->logits[p->n - 1]));
    RT_TRY(rt_check_add(k, err, LEVEL(sums <= 2 * b->logits), "shards.rescored.sums", "log-sum-exp at every T (times T) and the next token's log-probability: 95 %% of rows within %.2e of that spread, at most %.2g; "
                        "rank the same in %.1f %%", sums, 2 * b->logits, 100 * (double)f->rank / n));
    RT_TRY(rt_check_add(k, err, LEVEL(sure >= b->sure), "shards.rescored.first", "the first choice is the same in %.1f %% of all rows, and in %.1f %% of the %" PRId64 " where it leads by more than the errors explain, at least %.0f %%",
                        100 * (double)f->first / n, 100 * sure, f->sure, 100 * b->sure));
#undef LEVEL
out:
    return st;
}

static const struct bound *bound_of(bool w8a8, const char *stored, const struct rt_device *d)
{
    return &bounds[w8a8 ? 2 : d->be->act != RT_F32 || strstr(stored, "/f32/") == NULL];
}

/* A check of that name has failed. */
static bool failed(const struct rt_doctor *d, const char *name)
{
    for (int i = 0; i < d->checks.n; i++)
        if (d->checks.at[i].level == RT_CHECK_FAIL && strcmp(d->checks.at[i].name, name) == 0)
            return true;
    return false;
}

enum rt_status rt_doctor_rescore(struct rt_doctor *d, struct rt_err *err)
{
    struct picked p = {0};
    struct found f = {0};
    struct rt_err bad = {0};
    char bytes[32], mode[64];
    enum rt_status st;
    const struct rt_row_identity *id = d->set != NULL ? rt_shard_set_identity(d->set) : NULL;
    if (id == NULL || !d->have_teacher || d->teacher_bytes == 0 || id->top_k == 0 || id->origin.mode[0] != '\0' || failed(d, "shards.teacher") ||
        failed(d, "shards.integrity"))
        return RT_OK;
    if (d->rescore == 0 && d->teacher_bytes > (uint64_t)d->memory / 2)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "shards.rescored", "not checked: it takes a pass over %s of weights; --rescore %d asks for it",
                            rt_human_bytes(bytes, d->teacher_bytes), ROWS);
    const bool w8a8 = strncmp(id->mode, "w8a8/", 5) == 0;
    const struct bound *b = bound_of(w8a8, id->mode, &d->device);
    snprintf(mode, sizeof mode, "%s/%s/%s", w8a8 ? "w8a8" : "w8a16", d->device.be->act == RT_F32 ? "f32" : "bf16", d->device.be->name);
    st = pick(d, &p, &bad);
    if (st == RT_OK && p.n == 0) {
        drop(&p);
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "shards.rescored", "not checked: no row of the sequences that were looked at lies within --max-length %" PRId64, d->max_length);
    }
    const double start = rt_now();
    if (st == RT_OK)
        st = rescore(d, &p, b, w8a8, &f, &bad);
    if (st != RT_OK) {
        st = rt_check_add(&d->checks, err, RT_CHECK_FAIL, "shards.rescored", "%s", bad.msg);
    } else {
        rt_info(d->log, "%" PRId64 " rows (%" PRId64 " tokens) were computed again in %.1f s", p.n, p.tokens, rt_now() - start);
        st = report(d, &p, b, &f, mode, err);
    }
    rt_free(f.logits);
    rt_free(f.sums);
    drop(&p);
    return st;
}
