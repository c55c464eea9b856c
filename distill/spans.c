#include "distill/spans.h"

#include <math.h>

void rt_boundary_ids(const struct rt_tokenizer *tok, int64_t n, uint8_t *set)
{
    for (int64_t v = 0; v < n; v++) {
        const char *bytes;
        size_t len;
        set[v] = 0;
        if (!rt_tokenizer_bytes(tok, (uint32_t)v, &bytes, &len))
            continue;
        set[v] = rt_tokenizer_is_added(tok, (uint32_t)v) ||
                 (len > 0 && (bytes[0] == ' ' || bytes[0] == '\t' || bytes[0] == '\n' || bytes[0] == '\r'));
    }
}

double rt_span_loss(double x, double y, double tau, double *dy)
{
    const double u = fmin(x, 0) / tau - RT_SPAN_CERTAIN, v = fmin(y, 0) / tau - RT_SPAN_CERTAIN;
    const double not_p = -expm1(u), not_q = -expm1(v); /* 1 - p, 1 - q */
    *dy = (not_p - not_q) / not_q;
    return tau * (exp(u) * (u - v) + not_p * (log(not_p) - log(not_q)));
}

void rt_spans_cut(const struct rt_span_side *t, const struct rt_span_side *s, const float *logp, const float *boundary, double gamma,
                  struct rt_span *span, int64_t *n_spans)
{
    struct rt_span now = {0}, end = {.teacher = -1}; /* what is gathered; the last common end where it could have been cut */
    int64_t j = 0, first = 0;                        /* student tokens taken; the first of the span */
    uint32_t te = 0, se = 0;
    for (int64_t i = 0; i < t->n; i++) {
        const bool empty = i > 0 && t->end[i] == te;
        now.logp += (double)logp[i];
        te = t->end[i];
        while (j < s->n && s->end[j] <= te && (se < te || j == 0))
            se = s->end[j++];
        if (empty || j == 0 || se != te)
            continue;
        const bool known = boundary != NULL && !isnan(boundary[i]);
        now.teacher = i;
        now.student = j - 1;
        now.rows = j - first;
        now.boundary = known;
        end = now;
        if (known && !(exp((double)boundary[i]) > gamma))
            continue;
        span[(*n_spans)++] = now;
        now = (struct rt_span){0};
        end.teacher = -1;
        first = j;
    }
    if (end.teacher >= 0)
        span[(*n_spans)++] = end;
}
