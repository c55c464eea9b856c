/* Students: states, logits, losses, every gradient, and the losses of AdamW steps. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/json.h"
#include "student/optimizer.h"
#include "tests/oracle.h"

/* float32 against float32 of another implementation: sums of up to a few thousand terms agree to about 1e-6. */
#define BOUND 1e-4
/* bfloat16: a rounding of 1.1e-3 (root mean square) at each of some dozen operations a layer, 4e-3 of a state a layer, and what three layers add up to.
 * Losses are means over many rows, whose errors largely cancel. Gradients go through all of it twice: their directions are held (the cosine for every
 * tensor that is more than a hundredth of the whole gradient), and their norm. The losses of training steps part slowly from float32's: weights begin
 * as rounded. */
#define BF16_STATE 2e-2
#define BF16_LOSS 1e-2
#define BF16_COSINE 0.999
#define BF16_NORM 2e-2
#define BF16_STEPS 2e-2

struct run {
    struct oracle *o;
    const struct rt_device *d;
    bool bf16;
    const struct rt_tensors *ex;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_arena weights, grads, moments, acts, rows;
    struct rt_student *s;
    int64_t n, n_seq, k, targets;
    int32_t *ids, *cu, *label, *top_ids, *d_label, *d_top;
    float *top_logp, *d_logp;
    uint8_t *mask, *d_mask;
    void *d_final;
    double *ce, *kl, *d_ce, *d_kl;
};

/* The expected batch: ids, shifted labels (-100 ignored), teacher rows as log-probabilities at T = 2. */
static bool load_batch(struct run *r)
{
    int64_t n, n_k, n_l;
    const struct rt_tensor *shape = rt_tensors_find(r->ex, "input_ids");
    int64_t *ids = oracle_expected_ints(r->ex, "input_ids", &n), *labels = oracle_expected_ints(r->ex, "labels", &n_l);
    int64_t *top = oracle_expected_ints(r->ex, "topk_ids", &n_k);
    float *logits = oracle_expected(r->ex, "topk_logits", &n_k), *lse = oracle_expected(r->ex, "lse_T2", &n_l);
    const bool good = ids && labels && top && logits && lse && shape->ndim == 2 && n_l == n && n_k % n == 0;
    if (good) {
        r->n = n;
        r->n_seq = shape->ne[0];
        r->k = n_k / n;
        r->ids = malloc((size_t)n * 4);
        r->label = malloc((size_t)n * 4);
        r->mask = malloc((size_t)n);
        r->cu = malloc((size_t)(r->n_seq + 1) * 4);
        r->top_ids = malloc((size_t)n_k * 4);
        r->top_logp = malloc((size_t)n_k * 4);
        r->ce = malloc((size_t)n * sizeof(double));
        r->kl = malloc((size_t)n * sizeof(double));
        for (int64_t i = 0; i < n; i++) {
            r->ids[i] = (int32_t)ids[i];
            r->label[i] = labels[i] < 0 ? -1 : (int32_t)labels[i];
            r->mask[i] = labels[i] >= 0;
            r->targets += r->mask[i];
        }
        for (int64_t i = 0; i <= r->n_seq; i++)
            r->cu[i] = (int32_t)(i * shape->ne[1]);
        for (int64_t i = 0; i < n_k; i++) {
            r->top_ids[i] = (int32_t)top[i];
            r->top_logp[i] = logits[i] / 2 - lse[i / r->k];
        }
    }
    free(ids);
    free(labels);
    free(top);
    free(logits);
    free(lse);
    return good;
}

static enum rt_status build(struct run *r, const char *dir, struct rt_err *err)
{
    const struct rt_device *d = r->d;
    const size_t act = rt_device_act_size(d), n = (size_t)r->n, nk = (size_t)(r->n * r->k);
    struct rt_tensors *t = NULL;
    enum rt_status st;
    RT_TRY(rt_student_config_load(dir, &r->c, err));
    RT_TRY(rt_tensors_open(dir, &t, err));
    RT_TRY(rt_params_check_model(&r->c, t, false, NULL, err));
    RT_TRY(rt_params_create(&r->c, &r->p, err));
    RT_TRY(rt_device_arena(d, rt_student_weight_bytes(&r->c, &r->p, r->n, act), "weights", &r->weights, err));
    RT_TRY(rt_student_create(d, &r->c, &r->p, r->n, &r->weights, &r->s, err));
    RT_TRY(rt_student_load(r->s, t, err));
    RT_TRY(rt_device_arena(d, rt_params_bytes(&r->p, act), "gradients", &r->grads, err));
    RT_TRY(rt_student_attach_grads(r->s, &r->grads, err));
    RT_TRY(rt_device_arena(d, rt_optimizer_bytes(&r->p, act, false), "moments", &r->moments, err));
    RT_TRY(rt_device_arena(d, rt_student_activation_bytes(&r->c, r->n, RT_KEEP_ALL, act), "activations", &r->acts, err));
    const size_t rows = 2 * rt_arena_round(n * sizeof(double)) + rt_arena_round(n * 4) + 2 * rt_arena_round(nk * 4) + rt_arena_round(n) + rt_arena_round(n * (size_t)r->c.hidden * act);
    RT_TRY(rt_device_arena(d, rows, "rows", &r->rows, err));
    RT_TRY(rt_arena_alloc(&r->rows, n * 4, &r->d_label, err));
    RT_TRY(rt_arena_alloc(&r->rows, nk * 4, &r->d_top, err));
    RT_TRY(rt_arena_alloc(&r->rows, nk * 4, &r->d_logp, err));
    RT_TRY(rt_arena_alloc(&r->rows, n, &r->d_mask, err));
    RT_TRY(rt_arena_alloc(&r->rows, n * sizeof(double), &r->d_ce, err));
    RT_TRY(rt_arena_alloc(&r->rows, n * sizeof(double), &r->d_kl, err));
    RT_TRY(rt_arena_alloc(&r->rows, n * (size_t)r->c.hidden * act, &r->d_final, err));
    RT_TRY(rt_device_upload(d, r->d_label, r->label, n * 4, err));
    RT_TRY(rt_device_upload(d, r->d_top, r->top_ids, nk * 4, err));
    RT_TRY(rt_device_upload(d, r->d_logp, r->top_logp, nk * 4, err));
    RT_TRY(rt_device_upload(d, r->d_mask, r->mask, n, err));
    RT_TRY(rt_device_sync(d, err));
out:
    rt_tensors_free(t);
    return st;
}

static void tear_down(struct run *r)
{
    rt_student_free(r->s);
    rt_device_arena_free(r->d, &r->weights);
    rt_device_arena_free(r->d, &r->grads);
    rt_device_arena_free(r->d, &r->moments);
    rt_device_arena_free(r->d, &r->acts);
    rt_device_arena_free(r->d, &r->rows);
    rt_params_free(&r->p);
    rt_student_config_free(&r->c);
    void *const host[] = {r->ids, r->cu, r->label, r->top_ids, r->top_logp, r->mask, r->ce, r->kl};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        free(host[i]);
}

static enum rt_status forward(struct run *r, struct rt_err *err)
{
    const struct rt_student_batch b = {.ids = r->ids, .cu_seqlens = r->cu, .n = r->n, .n_seq = r->n_seq};
    return rt_student_forward(r->s, &b, RT_KEEP_ALL, &r->acts, err);
}

/* Mean losses over the targets; with `grad` also gradients of w_ce ce + w_kl kl. */
static enum rt_status losses(struct run *r, enum rt_tail tail, double w_ce, double w_kl, bool grad, double *ce, double *kl, struct rt_err *err)
{
    const struct rt_student_head h = rt_student_head(r->s);
    const double per = 1.0 / (double)r->targets;
    enum rt_status st;
    RT_TRY(RT_OP(r->d, head_loss, err, .x = rt_student_hidden(r->s, RT_LAYER_FINAL), .w = h.w, .dx = grad ? r->d_final : NULL,
                 .dw = grad ? h.dw : NULL, .n = r->n, .H = h.H, .V = h.V, .label = r->d_label, .k = (int)r->k, .top_ids = r->d_top,
                 .top_logp = r->d_logp, .kl_mask = r->d_mask, .tail = tail, .w_ce = w_ce * per, .w_kl = w_kl * per, .T = 2, .ce = r->d_ce,
                 .kl = r->d_kl));
    RT_TRY(rt_device_download(r->d, r->ce, r->d_ce, (size_t)r->n * sizeof *r->ce, err));
    RT_TRY(rt_device_download(r->d, r->kl, r->d_kl, (size_t)r->n * sizeof *r->kl, err));
    *ce = *kl = 0;
    for (int64_t i = 0; i < r->n; i++)
        if (r->mask[i]) {
            *ce += r->ce[i] * per;
            *kl += r->kl[i] * per;
        }
out:
    return st;
}

static void check_states(struct run *r)
{
    const int64_t H = r->c.hidden;
    float *a = malloc((size_t)(r->n * H) * sizeof *a);
    for (int l = 0; l <= r->c.layers; l++) {
        char name[32];
        int64_t count;
        snprintf(name, sizeof name, "hidden_%d", l);
        float *b = oracle_expected(r->ex, name, &count);
        const void *x = rt_student_hidden(r->s, l == r->c.layers ? RT_LAYER_FINAL : l);
        if (b == NULL || x == NULL || count != r->n * H) {
            oracle_fail(r->o, name, "missing or of another size");
        } else {
            oracle_download(r->d, a, x, r->n * H);
            oracle_tensor(r->o, name, a, b, r->n, H, r->bf16 ? BF16_STATE : BOUND);
        }
        free(b);
    }
    free(a);
}

static void check_logits(struct run *r)
{
    const struct rt_student_head h = rt_student_head(r->s);
    int64_t count;
    struct rt_err err = {0};
    float *b = oracle_expected(r->ex, "logits", &count), *a = malloc((size_t)(r->n * h.V) * sizeof *a);
    void *y = NULL;
    if (b == NULL || count != r->n * h.V || r->d->be->alloc(r->d->dev, (size_t)(r->n * h.V) * sizeof(float), &y, &err) != RT_OK ||
        RT_OP(r->d, linear_fwd, &err, .x = {.data = (void *)(uintptr_t)rt_student_hidden(r->s, RT_LAYER_FINAL)}, .w = h.w, .y = y, .n = r->n,
              .K = h.H, .N = h.V, .y_f32 = true) != RT_OK ||
        rt_device_download(r->d, a, y, (size_t)(r->n * h.V) * sizeof(float), &err) != RT_OK)
        oracle_fail(r->o, "logits", err.msg[0] ? err.msg : "missing or of another size");
    else
        oracle_tensor(r->o, "logits", a, b, r->n, h.V, r->bf16 ? BF16_STATE : BOUND);
    if (y != NULL)
        r->d->be->free(r->d->dev, y);
    free(a);
    free(b);
}

static void check_scalar(struct run *r, const char *name, double value, double bf16)
{
    int64_t count;
    float *b = oracle_expected(r->ex, name, &count);
    if (b == NULL)
        oracle_fail(r->o, name, "missing");
    else
        oracle_check(r->o, name, fabs(value - b[0]) / fabs(b[0]), r->bf16 ? bf16 : BOUND, false);
    free(b);
}

static double cosine(const float *a, const float *b, int64_t n)
{
    double ab = 0, aa = 0, bb = 0;
    for (int64_t i = 0; i < n; i++) {
        ab += (double)a[i] * b[i];
        aa += (double)a[i] * a[i];
        bb += (double)b[i] * b[i];
    }
    return aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0;
}

static double norm_of(const float *b, int64_t n)
{
    double s = 0;
    for (int64_t i = 0; i < n; i++)
        s += (double)b[i] * b[i];
    return sqrt(s);
}

static void check_grads(struct run *r)
{
    double squares = 0, total = INFINITY;
    int64_t count;
    float *whole = oracle_expected(r->ex, "grad_norm", &count);
    if (whole != NULL)
        total = whole[0];
    free(whole);
    for (int i = 0; i < r->p.n; i++) {
        const struct rt_param *p = &r->p.at[i];
        const int64_t n = rt_param_elements(p);
        char name[128];
        struct rt_err err = {0};
        snprintf(name, sizeof name, "grad.%s", p->name);
        float *b = oracle_expected(r->ex, name, &count), *a = malloc((size_t)n * sizeof *a);
        if (b == NULL || count != n || rt_param_download(r->d, rt_student_grads(r->s), p, 0, n, a, &err) != RT_OK) {
            oracle_fail(r->o, name, err.msg[0] ? err.msg : "missing or of another size");
        } else {
            if (!r->bf16)
                oracle_check(r->o, name, oracle_row_error(a, b, n), BOUND, false);
            else if (norm_of(b, n) > 1e-2 * total)
                oracle_check(r->o, name, cosine(a, b, n), BF16_COSINE, true);
            else
                oracle_skip(r->o, name, "less than a hundredth of the gradient");
            for (int64_t j = 0; j < n; j++)
                squares += (double)a[j] * a[j];
        }
        free(a);
        free(b);
    }
    check_scalar(r, "grad_norm", sqrt(squares), BF16_NORM);
}

/* Losses before each step of AdamW: lr 1e-3, betas .9/.95, eps 1e-8, decay .1 on every tensor, clip 1. */
static void check_adamw(struct run *r)
{
    const struct rt_adamw o = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = 1.0};
    struct rt_optimizer opt;
    struct rt_step_report report;
    struct rt_err err = {0};
    int64_t count = 0;
    double ce, kl, worst = 0;
    float *b = oracle_expected(r->ex, "adamw_losses", &count);
    enum rt_status st = rt_optimizer_init(&opt, r->s, &o, &r->moments, &err);
    for (int64_t i = 0; b != NULL && st == RT_OK && i < count; i++) {
        st = rt_student_zero_grads(r->s, &err);
        if (st == RT_OK)
            st = forward(r, &err);
        if (st == RT_OK)
            st = losses(r, RT_TAIL_BUCKET, 0.5, 0.5, true, &ce, &kl, &err);
        if (st == RT_OK)
            st = rt_student_backward(r->s, r->d_final, NULL, 0, false, &err);
        if (st == RT_OK)
            st = rt_optimizer_step(&opt, 1e-3, 1.0, &report, &err);
        worst = fmax(worst, fabs((ce + kl) / 2 - b[i]) / fabs(b[i]));
    }
    if (b == NULL || st != RT_OK)
        oracle_fail(r->o, "adamw_losses", err.msg[0] ? err.msg : "missing");
    else
        oracle_check(r->o, "adamw_losses", worst, r->bf16 ? BF16_STEPS : BOUND, false);
    free(b);
}

void oracle_student(struct oracle *o, const struct rt_device *d, const char *dir, const struct rt_tensors *expected)
{
    struct run r = {.o = o, .d = d, .bf16 = d->be->act == RT_BF16, .ex = expected};
    struct rt_err err = {0};
    double ce, kl, renorm, unused;
    if (!load_batch(&r))
        oracle_fail(o, "batch", "input_ids, labels or teacher rows are missing or do not fit together");
    else if (build(&r, dir, &err) != RT_OK || rt_student_zero_grads(r.s, &err) != RT_OK || forward(&r, &err) != RT_OK ||
             losses(&r, RT_TAIL_RENORM, 0, 1, false, &unused, &renorm, &err) != RT_OK)
        oracle_fail(o, "student", err.msg);
    else {
        check_states(&r);
        check_logits(&r);
        if (losses(&r, RT_TAIL_BUCKET, 0.5, 0.5, true, &ce, &kl, &err) != RT_OK ||
            rt_student_backward(r.s, r.d_final, NULL, 0, false, &err) != RT_OK) {
            oracle_fail(o, "losses", err.msg);
        } else {
            check_scalar(&r, "ce", ce, BF16_LOSS);
            check_scalar(&r, "kl_bucket_T2", kl, BF16_LOSS);
            check_scalar(&r, "kl_renorm_T2", renorm, BF16_LOSS);
            check_scalar(&r, "loss", (ce + kl) / 2, BF16_LOSS);
            check_grads(&r);
            check_adamw(&r);
        }
    }
    tear_down(&r);
}
