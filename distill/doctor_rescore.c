/* Rows of a shard set computed again by their teacher, on the device at hand, and held against what is stored: is the signal right?
 *
 * Rows are picked evenly over the set; a row needs its sequence up to its own token. What picks and sums the stored rows is not used: the
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
    SURE_LEAD = 6,    /* a first choice is sure where it leads by so many bounds of the logits: those are roots of mean squares over ids, the difference of two
                         ids' errors has sqrt(2) of it, and 4 times that is reached by one of ten thousand */
};

/* What may differ, by how both sides were computed. Logits and log-sum-exps (times T) in units of the spread (standard deviation) of a row's logits. */
struct bound {
    const char *why;
    double kl, logits, first; /* mean; what 95 % of rows stay within; share of sure first choices that agree */
};
static const struct bound bounds[] = {
    /* sums in another order: 1e-4 of a state's norm (what references are held to) through the head, with room for a row near a tie of two experts */
    {"float32 on both sides", 1e-4, 1e-3, 0.99},
    /* roundings of 2^-9 at each of some dozen operations a layer, and experts chosen otherwise near ties */
    {"bfloat16 rounds every operation", 0.03, 0.1, 0.99},
};
/* Where bfloat16 goes beyond its bound on a checkpoint of FP8, the logits are held to what FP8 activations would do to this model instead, as below: random
 * weights choose their experts by a hair, and one chosen otherwise moves a row by a quarter of its spread.
 * w8a8: what rounding activations to FP8 does to this model on this text is computed here, too, as the distance between w8a8 and w8a16. Two sides that
 * round from different last bits are two draws of it, up to twice as far apart (with some slack; errors grow by the root). A set of nonsense is at 1.4. */
#define DRAWS_KL 2.5
#define DRAWS_LOGITS 2
static const struct bound fp8_least = {"", 1e-3, 0.02, 0.95}, fp8_most = {"", 1, 1, 0.95};

struct picked {
    int64_t n, n_seqs, tokens, longest, k, n_lse;
    struct rt_rows *seq;    /* [n_seqs] beginnings of sequences */
    uint32_t *ids;          /* [tokens], theirs */
    int32_t *token;         /* [n] flat token of each row */
    uint32_t *top, *next, *rank; /* as stored: [n, k], [n], [n] */
    float *logit, *lse, *next_logprob;
};

/* Of one row, stored against computed here. */
struct found {
    double kl, logits, sums, lead; /* lead: of the first choice here over the second, as logits are */
    double fp8_kl, fp8_logits;     /* w8a8 against w8a16, both here */
    bool first, rank;
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

/* Mean square of the differences between the row's stored ids' logits `logit` and z. */
static double apart(const uint32_t *ids, const float *logit, int64_t k, const float *z)
{
    double off = 0;
    for (int64_t j = 0; j < k; j++)
        off += (logit[j] - z[ids[j]]) * ((double)logit[j] - z[ids[j]]) / (double)k;
    return isfinite(off) ? off : INFINITY;
}

/* Row `i` as stored against all logits z [n_ids] computed here. */
static void compare(const struct picked *p, const struct rt_row_identity *id, int64_t i, const float *z, struct found *f)
{
    const int64_t n = id->n_ids, k = p->k;
    const uint32_t *ids = p->top + i * k, next = p->next[i];
    int64_t first = 0, rank = 0;
    double mean = 0, var = 0, second = -INFINITY, one = 0;
    for (int64_t v = 0; v < n; v++) {
        mean += z[v] / (double)n;
        if (z[v] > z[first])
            first = v;
    }
    for (int64_t v = 0; v < n; v++) {
        var += (z[v] - mean) * (z[v] - mean) / (double)n;
        second = v != first && z[v] > second ? z[v] : second;
        rank += z[v] > z[next] || (z[v] == z[next] && v < (int64_t)next);
    }
    const double spread = sqrt(var) > 0 ? sqrt(var) : 1, here = log_sum_exp(z, n, z[first], 1);
    double sums = fabs(p->next_logprob[i] - (z[next] - here));
    for (int64_t l = 0; l < p->n_lse; l++) {
        const double T = id->lse_temperature[l];
        sums = fmax(sums, T * fabs(p->lse[i * p->n_lse + l] - log_sum_exp(z, n, z[first], T)));
        if (T == 1)
            one = p->lse[i * p->n_lse + l];
    }
    f->kl = divergence(ids, p->logit + i * k, k, one, z, here);
    f->logits = sqrt(apart(ids, p->logit + i * k, k, z)) / spread;
    f->sums = isfinite(sums) ? sums / spread : INFINITY;
    f->lead = (z[first] - second) / spread;
    f->first = ids[0] == first;
    f->rank = rank == (int64_t)p->rank[i];
}

/* Logits of the same row in w8a16 and w8a8, over the stored ids. */
static void compare_fp8(const struct picked *p, const struct rt_row_identity *id, int64_t i, const float *plain, const float *z, struct found *f)
{
    const uint32_t *ids = p->top + i * p->k;
    double spread = 0, mean = 0, most = z[0], most_plain = plain[0];
    for (int64_t v = 0; v < id->n_ids; v++) {
        mean += z[v] / (double)id->n_ids;
        most = z[v] > most ? z[v] : most;
        most_plain = plain[v] > most_plain ? plain[v] : most_plain;
    }
    for (int64_t v = 0; v < id->n_ids; v++)
        spread += (z[v] - mean) * (z[v] - mean) / (double)id->n_ids;
    const double lse = log_sum_exp(z, id->n_ids, most, 1), lse_plain = log_sum_exp(plain, id->n_ids, most_plain, 1);
    double off = 0;
    f->fp8_kl = 0;
    for (int64_t v = 0; v < id->n_ids; v++)
        f->fp8_kl += exp(z[v] - lse) * ((z[v] - lse) - (plain[v] - lse_plain));
    for (int64_t j = 0; j < p->k; j++)
        off += ((double)z[ids[j]] - plain[ids[j]]) * ((double)z[ids[j]] - plain[ids[j]]) / (double)p->k;
    f->fp8_logits = sqrt(off) / (spread > 0 ? sqrt(spread) : 1);
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* What 95 % of rows stay within, of the member at `offset`; *worst: all. v [n] is scratch. */
static double most_of(const struct found *f, int64_t n, size_t offset, double *v, double *worst)
{
    for (int64_t i = 0; i < n; i++)
        v[i] = *(const double *)(const void *)((const char *)&f[i] + offset);
    qsort(v, (size_t)n, sizeof *v, ascending);
    *worst = v[n - 1];
    return v[(n * 95 + 99) / 100 - 1];
}

static const struct bound *plain_bound(const struct rt_doctor *d)
{
    return &bounds[d->device.be->act != RT_F32 || strstr(rt_shard_set_identity(d->set)->mode, "/f32/") == NULL];
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

/* Bytes of logits: of a block where the device is the host, and of all that are kept. */
static int64_t held_bytes(const struct rt_doctor *d, const struct picked *p)
{
    return ((p->n < LOGIT_ROWS ? p->n : LOGIT_ROWS) + 2 * p->n) * d->tc.vocab_size * (int64_t)sizeof(float);
}

/* Logits of the picked rows, [n, vocab_size], into z; takes a pass over the weights. */
static enum rt_status compute(struct rt_doctor *d, struct picked *p, bool w8a8, float *z, struct rt_err *err)
{
    struct rt_teacher *t = NULL;
    struct taken x = {.d = &d->device, .p = p, .H = d->tc.hidden};
    const int64_t V = d->tc.vocab_size;
    const size_t row = (size_t)x.H * rt_device_act_size(&d->device);
    enum rt_status st;
    const struct rt_teacher_options o = {.dir = d->teacher, .device = &d->device, .w8a8 = w8a8, .memory = d->memory - held_bytes(d, p), .max_length = p->longest,
                                         .window = p->tokens, .data_tokens = p->tokens};
    RT_TRY(rt_teacher_open(&o, &t, err));
    RT_TRY(states(d, t, p, &x, err));
    for (int64_t i = 0; i < p->n; i += LOGIT_ROWS) {
        const int64_t n = p->n - i < LOGIT_ROWS ? p->n - i : LOGIT_ROWS;
        RT_TRY(rt_teacher_logits(t, -1, (const char *)x.x + (size_t)i * row, n, z + i * V, err));
    }
out:
    if (x.x != NULL)
        d->device.be->free(d->device.dev, x.x);
    if (x.index != NULL)
        d->device.be->free(d->device.dev, x.index);
    rt_teacher_close(t);
    return st;
}

static enum rt_status rescore(struct rt_doctor *d, struct picked *p, bool w8a8, struct found *f, double *scratch, struct rt_err *err)
{
    const struct rt_row_identity *id = rt_shard_set_identity(d->set);
    const int64_t V = d->tc.vocab_size;
    float *z = NULL, *other = NULL;
    char need[32], have[32];
    enum rt_status st;
    if (held_bytes(d, p) >= d->memory)
        RT_FAIL(err, NOMEM, "logits of %" PRId64 " rows take %s of memory, --memory gives %s: ask for fewer rows with --rescore", p->n,
                rt_human_bytes(need, (uint64_t)held_bytes(d, p)), rt_human_bytes(have, (uint64_t)d->memory));
    RT_TRY(rt_alloc((size_t)(p->n * V), sizeof *z, "logits", &z, err));
    RT_TRY(compute(d, p, w8a8, z, err));
    for (int64_t i = 0; i < p->n; i++)
        compare(p, id, i, z + i * V, &f[i]);
    double worst;
    const bool beyond = !w8a8 && d->tc.fp8 && plain_bound(d) == &bounds[1] && most_of(f, p->n, offsetof(struct found, logits), scratch, &worst) > bounds[1].logits;
    if (!w8a8 && !beyond)
        goto out;
    RT_TRY(rt_alloc((size_t)(p->n * V), sizeof *other, "logits", &other, err));
    RT_TRY(compute(d, p, !w8a8, other, err));
    for (int64_t i = 0; i < p->n; i++)
        compare_fp8(p, id, i, other + i * V, z + i * V, &f[i]);
out:
    rt_free(z);
    rt_free(other);
    return st;
}

/* ---- the findings ---- */

static double clamped(double v, double least, double most)
{
    return v < least ? least : v > most ? most : v;
}

/* text: why, where it is made here. */
static struct bound bound_of(const struct rt_doctor *d, bool w8a8, const struct found *f, int64_t n, double *scratch, char text[160])
{
    double kl = 0, worst;
    const struct bound *plain = plain_bound(d);
    for (int64_t i = 0; i < n; i++)
        kl += f[i].fp8_kl / (double)n;
    const double logits = most_of(f, n, offsetof(struct found, fp8_logits), scratch, &worst);
    if (!w8a8 && logits <= plain->logits)
        return *plain;
    if (!w8a8) {
        snprintf(text, 160, "bfloat16 rounds every operation; FP8 activations would move this model by %.2e here, its logits by %.2e", kl, logits);
        return (struct bound){text, plain->kl, clamped(logits, plain->logits, fp8_most.logits), plain->first};
    }
    snprintf(text, 160, "activations in FP8, which move this model from w8a16 by %.2e here, its logits by %.2e", kl, logits);
    return (struct bound){text, clamped(DRAWS_KL * kl, fp8_least.kl, fp8_most.kl), clamped(DRAWS_LOGITS * logits, fp8_least.logits, fp8_most.logits), fp8_least.first};
}

static enum rt_status report(struct rt_doctor *d, const struct picked *p, bool w8a8, const struct found *f, double *v, struct rt_err *err)
{
    enum rt_status st;
    struct rt_checks *k = &d->checks;
    char why[160], sure[160] = "none of them leads by more than the errors may explain";
    double kl = 0, kl_worst = 0, logits_worst, sums_worst;
    int64_t first = 0, rank = 0, n_sure = 0, sure_first = 0;
    const struct bound b = bound_of(d, w8a8, f, p->n, v, why);
    const double logits = most_of(f, p->n, offsetof(struct found, logits), v, &logits_worst), sums = most_of(f, p->n, offsetof(struct found, sums), v, &sums_worst);
    for (int64_t i = 0; i < p->n; i++) {
        kl += f[i].kl / (double)p->n;
        kl_worst = fmax(kl_worst, f[i].kl);
        first += f[i].first;
        rank += f[i].rank;
        n_sure += f[i].lead > SURE_LEAD * b.logits;
        sure_first += f[i].lead > SURE_LEAD * b.logits && f[i].first;
    }
    const double share = n_sure > 0 ? (double)sure_first / (double)n_sure : 1, n = (double)p->n;
    if (n_sure > 0)
        snprintf(sure, sizeof sure, "and in %.1f %% of the %" PRId64 " where it leads by more than the errors may explain, at least %.0f %%", 100 * share, n_sure, 100 * b.first);
#define LEVEL(good) ((good) ? RT_CHECK_PASS : RT_CHECK_FAIL)
    RT_TRY(rt_check_add(k, err, LEVEL(kl <= b.kl), "shards.rescored.kl", "%" PRId64 " rows of %" PRId64 " sequences computed again in %s/%s/%s (stored: %s): mean KL %.2e nats, at most %.2g (%s); worst row %.2e%s",
                        p->n, p->n_seqs, w8a8 ? "w8a8" : "w8a16", d->device.be->act == RT_F32 ? "f32" : "bf16", d->device.be->name, rt_shard_set_identity(d->set)->mode, kl, b.kl, b.why,
                        kl_worst, kl <= b.kl ? "" : ": the rows are not this teacher's on this text; score it again"));
    RT_TRY(rt_check_add(k, err, LEVEL(logits <= b.logits), "shards.rescored.logits", "95 %% of rows within %.2e of the spread of a row's logits, at most %.2g; worst row %.2e", logits, b.logits,
                        logits_worst));
    RT_TRY(rt_check_add(k, err, LEVEL(sums <= 2 * b.logits), "shards.rescored.sums", "log-sum-exp at every T (times T) and the next token's log-probability: 95 %% of rows within %.2e of that spread, at most %.2g; "
                        "worst row %.2e; rank the same in %.1f %%", sums, 2 * b.logits, sums_worst, 100 * (double)rank / n));
    RT_TRY(rt_check_add(k, err, LEVEL(share >= b.first), "shards.rescored.first", "the first choice is the same in %.1f %% of all rows, %s", 100 * (double)first / n, sure));
#undef LEVEL
out:
    return st;
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
    struct found *f = NULL;
    double *scratch = NULL;
    struct rt_err bad = {0};
    char bytes[32];
    enum rt_status st;
    const struct rt_row_identity *id = d->set != NULL ? rt_shard_set_identity(d->set) : NULL;
    if (d->rescore > 0 && id != NULL && id->origin.mode[0] != '\0')
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "shards.rescored", "not checked: rows that are retargeted (%s) are not what a teacher computes; --shards with the set that "
                            "they were made of checks that", id->origin.mode);
    if (d->rescore > 0 && id != NULL && id->top_k == 0)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "shards.rescored", "not checked: the set holds no logits (top_k 0)");
    if (id == NULL || !d->have_teacher || d->teacher_bytes == 0 || id->top_k == 0 || id->origin.mode[0] != '\0' || failed(d, "shards.teacher") ||
        failed(d, "shards.integrity"))
        return RT_OK;
    const bool w8a8 = strncmp(id->mode, "w8a8", 4) == 0;
    if (d->rescore == 0 && d->teacher_bytes > (uint64_t)d->memory / 2)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "shards.rescored", "not checked: it takes %s over %s of weights; --rescore %d asks for it",
                            w8a8 ? "two passes" : "a pass", rt_human_bytes(bytes, d->teacher_bytes), ROWS);
    st = pick(d, &p, &bad);
    if (st == RT_OK && p.n == 0) {
        drop(&p);
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "shards.rescored", "not checked: no row of the sequences that were looked at lies within --max-length %" PRId64, d->max_length);
    }
    const double start = rt_now();
    if (st == RT_OK)
        st = rt_alloc((size_t)p.n, sizeof *f, "rows", &f, &bad);
    if (st == RT_OK)
        st = rt_alloc((size_t)p.n, sizeof *scratch, "rows", &scratch, &bad);
    if (st == RT_OK)
        st = rescore(d, &p, w8a8, f, scratch, &bad);
    if (st != RT_OK) {
        st = rt_check_add(&d->checks, err, RT_CHECK_FAIL, "shards.rescored", "%s", bad.msg);
    } else {
        rt_info(d->log, "%" PRId64 " rows (%" PRId64 " tokens) were computed again in %.1f s", p.n, p.tokens, rt_now() - start);
        st = report(d, &p, w8a8, f, scratch, err);
    }
    rt_free(f);
    rt_free(scratch);
    drop(&p);
    return st;
}
