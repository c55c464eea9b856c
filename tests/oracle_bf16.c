/* Teachers on a backend of bfloat16: each layer from its expected input, with the experts that its tokens chose; then the head, and the whole model.
 *
 * Bounds. bfloat16 rounds to 2^-9 at most, 1.1e-3 on average (root mean square), and a layer has about a dozen roundings behind one another (states,
 * norms, low ranks, queries and keys, probabilities, products, the sum with the stream): 4e-3 of a state, 1e-2 where they add up. FP8 activations are made
 * from such values: 4e-3 of a value is a twentieth of e4m3's step, so that one code in twenty is its neighbour, a tenth away: 2e-2 in each product's
 * result, 5e-2 behind the five of a layer, twice that in rows that have bad luck. (One wrong scale of a block of 128x128 in one expert: 0.25, and 0.7.)
 * A token near a tie chooses another expert than in float32: its state then differs by that expert's share. Such rows are told by the experts themselves
 * (those of `ref` from the same input) and are held to a bound of their own; how many choices agree is a check. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "teacher/score.h"
#include "tests/oracle.h"

struct limits {
    double tensor, row, changed, routing;
};
static const struct limits w8a16_limits = {1e-2, 2e-2, 0.6, 0.95}, w8a8_limits = {0.1, 0.15, 0.7, 0.95};
/* The head is one product of rounded states and BF16 weights, summed and given out in float32. */
#define HEAD_TENSOR 5e-3
/* Logits of the whole model: most rows within some hundredths of their size. A row near a tie of experts in any layer, and by attention those behind it a
 * little, differs by a third: some such rows among a few dozen make the mean divergence, and change first choices. */
#define MODEL_MEDIAN 5e-2
#define MODEL_KL 0.2
#define MODEL_FIRST 0.8

struct run {
    struct oracle *o;
    const struct rt_device *d, *ref;
    struct rt_teacher *t, *t_ref;
    const struct rt_tensors *ex;
    const char *mode;
    const uint32_t *ids;
    int64_t n, H;
    const struct limits *limits;
    float *final;
};

static bool run_layer(struct oracle *o, struct rt_teacher *t, const struct rt_device *d, int l, const float *in, int64_t n, float *out, int32_t *routes)
{
    const struct rt_teacher_config *c = rt_teacher_config(t);
    struct rt_err err = {0};
    void *x = NULL;
    enum rt_status st = d->be->alloc(d->dev, (size_t)(n * c->hidden) * rt_device_act_size(d), &x, &err);
    if (st == RT_OK) {
        oracle_upload(d, x, in, n * c->hidden);
        st = rt_teacher_run_layer(t, l, x, n, &err);
    }
    if (st == RT_OK) {
        oracle_download(d, out, x, n * c->hidden);
        if (l >= c->dense_first)
            st = rt_device_download(d, routes, t->ctx.route_ids, (size_t)(n * c->top_k) * sizeof *routes, &err);
    }
    if (x != NULL)
        d->be->free(d->dev, x);
    if (st != RT_OK)
        oracle_fail(o, "layer", err.msg);
    return st == RT_OK;
}

/* Experts of a that b has, too. */
static int common(const int32_t *a, const int32_t *b, int k)
{
    int n = 0;
    for (int i = 0; i < k; i++)
        for (int j = 0; j < k; j++)
            n += a[i] == b[j];
    return n;
}

struct split {
    double num, den, worst, changed_worst; /* rows that chose the same experts; others */
    int64_t same, agree, all;
};

static void add_row(struct split *s, const float *a, const float *b, int64_t cols, bool changed)
{
    const double e = oracle_row_error(a, b, cols);
    if (changed) {
        s->changed_worst = fmax(s->changed_worst, e);
        return;
    }
    for (int64_t j = 0; j < cols; j++) {
        s->num += ((double)a[j] - b[j]) * ((double)a[j] - b[j]);
        s->den += (double)b[j] * b[j];
    }
    s->worst = isfinite(e) ? fmax(s->worst, e) : INFINITY;
    s->same++;
}

static void check_split(struct run *r, const char *name, const struct split *s, int64_t rows)
{
    char other[96];
    oracle_check(r->o, name, s->same > 0 ? sqrt(s->num / s->den) : INFINITY, r->limits->tensor, false);
    snprintf(other, sizeof other, "%s/worst_row", name);
    oracle_check(r->o, other, s->worst, r->limits->row, false);
    if (s->all == 0)
        return;
    snprintf(other, sizeof other, "%s/routing_agreement", name);
    oracle_check(r->o, other, (double)s->agree / (double)s->all, r->limits->routing, true);
    if (s->same == rows)
        return;
    snprintf(other, sizeof other, "%s/%ld_rows_of_other_experts", name, (long)(rows - s->same));
    oracle_check(r->o, other, s->changed_worst, r->limits->changed, false);
}

static void layer(struct run *r, int l)
{
    const struct rt_teacher_config *c = rt_teacher_config(r->t);
    const int64_t n = r->n, k = c->top_k;
    char name[64];
    int64_t n_in = 0, n_out = 0;
    struct split s = {0};
    snprintf(name, sizeof name, "%s.hidden_%d", r->mode, l);
    float *in = oracle_expected(r->ex, name, &n_in);
    snprintf(name, sizeof name, "%s.hidden_%d", r->mode, l + 1);
    float *out = oracle_expected(r->ex, name, &n_out), *y = malloc((size_t)(n * r->H) * sizeof *y), *unused = malloc((size_t)(n * r->H) * sizeof *unused);
    int32_t *a = calloc((size_t)(n * k + 1), sizeof *a), *b = calloc((size_t)(n * k + 1), sizeof *b);
    if (in == NULL || out == NULL || n_in != n * r->H || n_out != n * r->H)
        oracle_fail(r->o, name, "expected tensors are missing or of another size");
    else if (run_layer(r->o, r->t, r->d, l, in, n, y, a) && run_layer(r->o, r->t_ref, r->ref, l, in, n, unused, b)) {
        for (int64_t t = 0; t < n; t++) {
            const int same = l >= c->dense_first ? common(a + t * k, b + t * k, (int)k) : 0;
            if (l >= c->dense_first) {
                s.agree += same;
                s.all += k;
            }
            add_row(&s, y + t * r->H, out + t * r->H, r->H, l >= c->dense_first && same < k);
        }
        check_split(r, name, &s, n);
    }
    free(in);
    free(out);
    free(y);
    free(unused);
    free(a);
    free(b);
}

/* What follows from the expected final states: logits, and those of the MTP layer, of which a row near a tie may choose other experts. */
static void heads(struct run *r)
{
    const struct rt_teacher_config *c = rt_teacher_config(r->t);
    const int64_t V = c->vocab_size;
    char name[64];
    int64_t count = 0, n_b = 0;
    struct rt_err err = {0};
    void *x = NULL;
    snprintf(name, sizeof name, "%s.final", r->mode);
    float *final = oracle_expected(r->ex, name, &count), *y = malloc((size_t)(r->n * V) * sizeof *y);
    if (final == NULL || count != r->n * r->H || r->d->be->alloc(r->d->dev, (size_t)count * rt_device_act_size(r->d), &x, &err) != RT_OK) {
        oracle_fail(r->o, name, "missing or of another size");
        goto out;
    }
    oracle_upload(r->d, x, final, count);
    snprintf(name, sizeof name, "%s.logits", r->mode);
    float *b = oracle_expected(r->ex, name, &n_b);
    if (b == NULL || n_b != r->n * V || rt_teacher_logits(r->t, -1, x, r->n, y, &err) != RT_OK)
        oracle_fail(r->o, name, err.msg[0] != '\0' ? err.msg : "missing or of another size");
    else
        oracle_tensor(r->o, name, y, b, r->n, V, HEAD_TENSOR);
    free(b);
    snprintf(name, sizeof name, "%s.mtp_logits", r->mode);
    if (c->mtp_layers > 0) {
        b = oracle_expected(r->ex, name, &n_b);
        if (b == NULL || n_b != (r->n - 1) * V || rt_teacher_mtp_logits(r->t, r->ids, x, r->n, y, &err) != RT_OK) {
            oracle_fail(r->o, name, err.msg[0] != '\0' ? err.msg : "missing or of another size");
        } else {
            int64_t good = 0;
            for (int64_t i = 0; i + 1 < r->n; i++)
                good += oracle_row_error(y + i * V, b + i * V, V) <= 1.5 * r->limits->row;
            oracle_check(r->o, name, (double)good / (double)(r->n - 1), 0.85, true);
        }
        free(b);
    }
out:
    if (x != NULL)
        r->d->be->free(r->d->dev, x);
    free(final);
    free(y);
}

static void keep_final(void *self, int layer, const void *x, int64_t n)
{
    struct run *r = self;
    if (layer == RT_LAYER_FINAL)
        oracle_download(r->d, r->final, x, n * r->H);
}

static double log_sum_exp(const float *z, int64_t n)
{
    double most = z[0], sum = 0;
    for (int64_t i = 1; i < n; i++)
        most = fmax(most, z[i]);
    for (int64_t i = 0; i < n; i++)
        sum += exp(z[i] - most);
    return most + log(sum);
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* From ids to logits: divergence of the two distributions, and first choices. */
static void whole(struct run *r)
{
    const struct rt_score_options so = {.tap = keep_final, .tap_self = r};
    struct rt_rows seq = {.n_tokens = r->n, .ids = r->ids};
    const int64_t V = rt_teacher_config(r->t)->vocab_size;
    struct rt_err err = {0};
    char name[64];
    int64_t count = 0, same = 0;
    double kl = 0, *row = malloc((size_t)r->n * sizeof *row);
    void *x = NULL;
    float *b, *a = malloc((size_t)(r->n * V) * sizeof *a);
    r->final = malloc((size_t)(r->n * r->H) * sizeof *r->final);
    snprintf(name, sizeof name, "%s.logits", r->mode);
    b = oracle_expected(r->ex, name, &count);
    enum rt_status st = rt_teacher_score(r->t, &so, &seq, 1, 0, NULL, &err);
    if (st == RT_OK)
        st = r->d->be->alloc(r->d->dev, (size_t)(r->n * r->H) * rt_device_act_size(r->d), &x, &err);
    if (st == RT_OK) {
        oracle_upload(r->d, x, r->final, r->n * r->H);
        st = rt_teacher_logits(r->t, -1, x, r->n, a, &err);
    }
    if (st != RT_OK || b == NULL || count != r->n * V) {
        oracle_fail(r->o, name, err.msg[0] != '\0' ? err.msg : "missing or of another size");
    } else {
        for (int64_t i = 0; i < r->n; i++) {
            const float *p = b + i * V, *q = a + i * V;
            const double lp = log_sum_exp(p, V), lq = log_sum_exp(q, V);
            int64_t top_p = 0, top_q = 0;
            for (int64_t v = 0; v < V; v++) {
                kl += exp(p[v] - lp) * ((p[v] - lp) - (q[v] - lq)) / (double)r->n;
                top_p = p[v] > p[top_p] ? v : top_p;
                top_q = q[v] > q[top_q] ? v : top_q;
            }
            same += top_p == top_q;
            row[i] = oracle_row_error(q, p, V);
        }
        qsort(row, (size_t)r->n, sizeof *row, ascending);
        snprintf(name, sizeof name, "%s.model/median_row", r->mode);
        oracle_check(r->o, name, row[r->n / 2], MODEL_MEDIAN, false);
        snprintf(name, sizeof name, "%s.model/kl", r->mode);
        oracle_check(r->o, name, kl, MODEL_KL, false);
        snprintf(name, sizeof name, "%s.model/first_choice", r->mode);
        oracle_check(r->o, name, (double)same / (double)r->n, MODEL_FIRST, true);
    }
    if (x != NULL)
        r->d->be->free(r->d->dev, x);
    free(a);
    free(b);
    free(row);
    free(r->final);
}

static void run_mode(struct run *r, const char *dir, bool w8a8)
{
    struct rt_err err = {0};
    struct rt_teacher_options o = {.dir = dir, .device = r->d, .w8a8 = w8a8, .memory = (int64_t)8 << 30, .max_length = r->n, .data_tokens = r->n, .mtp = true};
    r->mode = w8a8 ? "w8a8" : "w8a16";
    r->limits = w8a8 ? &w8a8_limits : &w8a16_limits;
    enum rt_status st = rt_teacher_open(&o, &r->t, &err);
    o.device = r->ref;
    if (st == RT_OK)
        st = rt_teacher_open(&o, &r->t_ref, &err);
    if (st != RT_OK) {
        oracle_fail(r->o, r->mode, err.msg);
    } else {
        r->H = rt_teacher_config(r->t)->hidden;
        for (int l = 0; l < rt_teacher_config(r->t)->layers; l++)
            layer(r, l);
        heads(r);
        if (!w8a8) /* there random models are chaotic: layer by layer only */
            whole(r);
    }
    rt_teacher_close(r->t);
    rt_teacher_close(r->t_ref);
    r->t = r->t_ref = NULL;
}

void oracle_teacher_bf16(struct oracle *o, const struct rt_device *d, const char *dir, const struct rt_tensors *expected, const uint32_t *ids, int64_t n)
{
    struct rt_device ref = {0};
    struct rt_err err = {0};
    struct run r = {.o = o, .d = d, .ref = &ref, .ex = expected, .ids = ids, .n = n};
    if (rt_device_open(&rt_backend_ref, &(const struct rt_dev_options){0}, &ref, &err) != RT_OK) {
        oracle_fail(o, "ref", err.msg);
        return;
    }
    run_mode(&r, dir, false);
    if (rt_tensors_find(expected, "w8a8.hidden_0") != NULL)
        run_mode(&r, dir, true);
    else
        oracle_skip(o, "w8a8", "no FP8 checkpoint");
    rt_device_close(&ref);
}
