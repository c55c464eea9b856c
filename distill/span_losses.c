#include "distill/span_losses.h"

#include <string.h>

#include "distill/spans.h"

size_t rt_span_losses_bytes(int64_t tokens, int64_t V)
{
    const size_t n = (size_t)tokens;
    return rt_arena_round((size_t)V) + 2 * rt_arena_round(n * sizeof(float)) + 2 * rt_arena_round(n * sizeof(double));
}

enum rt_status rt_span_losses_create(struct rt_span_losses *l, const struct rt_device *d, int64_t tokens, int64_t V, const uint8_t *boundary,
                                     struct rt_arena *arena, struct rt_err *err)
{
    enum rt_status st;
    const size_t n = (size_t)tokens;
    *l = (struct rt_span_losses){.d = d, .tokens = tokens, .V = V};
    RT_TRY(rt_arena_alloc(arena, (size_t)V, &l->set, err));
    RT_TRY(rt_device_upload(d, l->set, boundary, (size_t)V, err));
    RT_TRY(rt_device_sync(d, err));
    RT_TRY(rt_arena_alloc(arena, n * sizeof(float), &l->dev_label, err));
    RT_TRY(rt_arena_alloc(arena, n * sizeof(float), &l->dev_set, err));
    RT_TRY(rt_alloc(n, sizeof(float), "losses of spans", &l->w_label, err));
    RT_TRY(rt_alloc(n, sizeof(float), "losses of spans", &l->w_set, err));
    for (int i = 0; i < 2; i++) {
        RT_TRY(rt_arena_alloc(arena, n * sizeof(double), &l->dev_logp[i], err));
        RT_TRY(rt_alloc(n, sizeof(double), "losses of spans", &l->logp[i], err));
    }
out:
    if (st != RT_OK)
        rt_span_losses_free(l);
    return st;
}

void rt_span_losses_free(struct rt_span_losses *l)
{
    rt_free(l->w_label);
    rt_free(l->w_set);
    for (int i = 0; i < 2; i++)
        rt_free(l->logp[i]);
    *l = (struct rt_span_losses){0};
}

/* Losses of the spans from the likelihoods; weights of the rows are those of L = - sum w logp. */
static void weigh(struct rt_span_losses *l, const struct rt_micro *p, double tau, double scale, struct rt_span_sums *sums)
{
    memset(l->w_label, 0, (size_t)p->rows * sizeof *l->w_label);
    memset(l->w_set, 0, (size_t)p->rows * sizeof *l->w_set);
    for (int64_t r = 0; r < p->rows; r++) {
        const int64_t n = p->span[r];
        double y = 0, dy;
        if (n == 0)
            continue;
        for (int64_t i = r + 1 - n; i <= r; i++)
            y += l->logp[0][i];
        if (p->span_boundary[r])
            y += l->logp[1][r + 1];
        sums->loss += rt_span_loss(p->span_logp[r], y, tau, &dy);
        sums->teacher += p->span_logp[r];
        sums->student += y;
        sums->spans++;
        sums->rows += n;
        for (int64_t i = r + 1 - n; i <= r; i++)
            l->w_label[i] = (float)(-scale * dy);
        if (p->span_boundary[r])
            l->w_set[r + 1] = (float)(-scale * dy);
    }
}

enum rt_status rt_span_losses_run(struct rt_span_losses *l, const struct rt_student_head *head, const struct rt_micro *p, const void *x, const int32_t *label,
                                  double tau, double scale, void *dx, bool *any, struct rt_span_sums *sums, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *d = l->d;
    const size_t n = (size_t)p->rows;
    *any = p->n_spans > 0;
    if (!*any)
        return RT_OK;
    RT_TRY(RT_OP(d, head_likelihood, err, .x = x, .w = head->w, .n = p->rows, .H = head->H, .n_ids = l->V, .label = label, .in_set = l->set,
                 .label_logp = l->dev_logp[0], .set_logp = l->dev_logp[1]));
    for (int i = 0; i < 2; i++)
        RT_TRY(rt_device_download(d, l->logp[i], l->dev_logp[i], n * sizeof(double), err));
    weigh(l, p, tau, scale, sums);
    if (dx == NULL)
        goto out;
    RT_TRY(rt_device_upload(d, l->dev_label, l->w_label, n * sizeof(float), err));
    RT_TRY(rt_device_upload(d, l->dev_set, l->w_set, n * sizeof(float), err));
    RT_TRY(RT_OP(d, head_likelihood, err, .x = x, .w = head->w, .dx = dx, .dw = head->dw, .n = p->rows, .H = head->H, .n_ids = l->V, .label = label,
                 .in_set = l->set, .w_label = l->dev_label, .w_set = l->dev_set));
out:
    return st;
}
