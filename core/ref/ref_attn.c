/* Attention: packed sequences, forward and backward, and over the caches of generation. */
#include "core/ref/ref.h"

/* p[0..m) from scores to probabilities; returns log sum exp. */
static double softmax(double *p, int64_t m)
{
    double top = p[0], sum = 0;
    for (int64_t j = 1; j < m; j++)
        top = fmax(top, p[j]);
    for (int64_t j = 0; j < m; j++) {
        p[j] = exp(p[j] - top);
        sum += p[j];
    }
    for (int64_t j = 0; j < m; j++)
        p[j] /= sum;
    return top + log(sum);
}

static enum rt_status check_shape(const struct rt_attn_shape *s, const char *op, int64_t *longest, struct rt_err *err)
{
    *longest = 0;
    if (s->nkv <= 0 || s->nh % s->nkv != 0)
        return rt_fail(err, RT_SHAPE, "%s: %d query heads over %d key heads; expected a multiple", op, s->nh, s->nkv);
    for (int64_t i = 0; i < s->n_seq; i++) {
        const int64_t len = (int64_t)s->cu_seqlens[i + 1] - s->cu_seqlens[i];
        if (len < 0)
            return rt_fail(err, RT_SHAPE, "%s: sequence %lld has length %lld", op, (long long)i, (long long)len);
        *longest = len > *longest ? len : *longest;
    }
    if (s->cu_seqlens[0] != 0 || s->cu_seqlens[s->n_seq] != s->n)
        return rt_fail(err, RT_SHAPE, "%s: sequences span rows %d .. %d, expected 0 .. %lld", op, (int)s->cu_seqlens[0],
                       (int)s->cu_seqlens[s->n_seq], (long long)s->n);
    return RT_OK;
}

/* A strided array of heads. */
struct view {
    real *data;
    int64_t ld, head;
};
static struct view view_of(const void *data, int64_t ld, int64_t head, int heads, int d)
{
    const int64_t head_ld = ref_ld(head, d);
    return (struct view){(real *)data, ref_ld(ld, heads * head_ld), head_ld};
}
static real *at(struct view v, int64_t row, int h)
{
    return v.data + row * v.ld + h * v.head;
}

REF_OP(attn_fwd)
{
    enum rt_status st;
    double *p = NULL, *sum = NULL;
    int64_t longest;
    const struct rt_attn_shape *s = &a->s;
    const int dr = a->k_pe != NULL ? a->dr : 0, dn = s->dqk - dr;
    const struct view q = view_of(a->q, a->q_ld, a->q_head, s->nh, s->dqk), k = view_of(a->k, a->k_ld, a->k_head, s->nkv, dn),
                      v = view_of(a->v, a->v_ld, a->v_head, s->nkv, s->dv), o = view_of(a->o, 0, 0, s->nh, s->dv),
                      pe = view_of(a->k_pe, a->k_pe_ld, 0, 1, dr);

    RT_TRY(check_shape(s, "attn_fwd", &longest, err));
    if (dr < 0 || dn < 1)
        RT_FAIL(err, SHAPE, "attn_fwd: %d elements of a key of %d lie apart", dr, s->dqk);
    if (a->cos != NULL)
        RT_TRY(REF(rope)(dev, queue, &(const struct rt_rope_args){.x = at(q, 0, 0) + (s->dqk - a->dr), .ld = q.ld, .head_ld = q.head, .cos = a->cos,
                         .sin = a->sin, .position = a->position, .n = s->n, .heads = s->nh, .dim = a->dr, .interleaved = true}, err));
    RT_TRY(rt_alloc((size_t)longest, sizeof *p, "a row of scores", &p, err));
    RT_TRY(rt_alloc((size_t)s->dv, sizeof *sum, "a row of sums", &sum, err));
    for (int64_t i_seq = 0; i_seq < s->n_seq; i_seq++)
        for (int h = 0; h < s->nh; h++) {
            const int64_t first = s->cu_seqlens[i_seq], end = s->cu_seqlens[i_seq + 1];
            const int hk = h / (s->nh / s->nkv);
            for (int64_t i = first; i < end; i++) {
                const int64_t m = i - first + 1;
                for (int64_t j = 0; j < m; j++)
                    p[j] = s->scale * (ref_dot(at(q, i, h), at(k, first + j, hk), dn) + ref_dot(at(q, i, h) + dn, at(pe, first + j, 0), dr));
                const double lse = softmax(p, m);
                if (a->lse != NULL)
                    a->lse[h * s->n + i] = (float)lse;
                memset(sum, 0, (size_t)s->dv * sizeof *sum);
                for (int64_t j = 0; j < m; j++)
                    for (int d = 0; d < s->dv; d++)
                        sum[d] += p[j] * at(v, first + j, hk)[d];
                for (int d = 0; d < s->dv; d++)
                    at(o, i, h)[d] = (real)sum[d];
            }
        }
    if (a->oq.data != NULL)
        st = REF(quant)(dev, queue, &(const struct rt_quant_args){.x = a->o, .q = a->oq, .n = s->n, .cols = (int64_t)s->nh * s->dv, .pow2 = a->pow2}, err);
out:
    rt_free(p);
    rt_free(sum);
    return st;
}

/* Scratch of a backward over one sequence and head, in double: gradients that other rows and heads add to. */
struct bwd {
    double *p, *dk, *dv; /* [longest], [longest, dqk], [longest, dv] */
};

/* Row i of query head h: dq = ; adds to w->dk, w->dv. P = exp(score - lse), dS = P (dO v - delta). */
static void attn_row_bwd(const struct rt_attn_bwd_args *a, const struct bwd *w, int64_t first, int64_t i, int h, int hk)
{
    const struct rt_attn_shape *s = &a->s;
    const struct view q = view_of(a->q, a->q_ld, a->q_head, s->nh, s->dqk), k = view_of(a->k, a->k_ld, a->k_head, s->nkv, s->dqk),
                      v = view_of(a->v, a->v_ld, a->v_head, s->nkv, s->dv), o = view_of(a->o, 0, 0, s->nh, s->dv),
                      dout = view_of(a->dout, 0, 0, s->nh, s->dv), dq = view_of(a->dq, a->q_ld, a->q_head, s->nh, s->dqk);
    const int64_t m = i - first + 1;
    for (int64_t j = 0; j < m; j++)
        w->p[j] = s->scale * ref_dot(at(q, i, h), at(k, first + j, hk), s->dqk);
    if (REF_IS64)
        softmax(w->p, m);
    else
        for (int64_t j = 0; j < m; j++)
            w->p[j] = exp(w->p[j] - a->lse[h * s->n + i]);
    const double delta = ref_dot(at(dout, i, h), at(o, i, h), s->dv);
    a->delta[h * s->n + i] = (float)delta;
    for (int64_t j = 0; j < m; j++) {
        const double dp = ref_dot(at(dout, i, h), at(v, first + j, hk), s->dv);
        for (int d = 0; d < s->dv; d++)
            w->dv[j * s->dv + d] += w->p[j] * at(dout, i, h)[d];
        w->p[j] *= (dp - delta) * s->scale;
        for (int d = 0; d < s->dqk; d++)
            w->dk[j * s->dqk + d] += w->p[j] * at(q, i, h)[d];
    }
    for (int d = 0; d < s->dqk; d++) {
        double sum = 0;
        for (int64_t j = 0; j < m; j++)
            sum += w->p[j] * at(k, first + j, hk)[d];
        at(dq, i, h)[d] = (real)sum;
    }
}

REF_OP(attn_bwd)
{
    enum rt_status st;
    struct bwd w = {0};
    int64_t longest;
    const struct rt_attn_shape *s = &a->s;
    const struct view dk = view_of(a->dk, a->k_ld, a->k_head, s->nkv, s->dqk), dv = view_of(a->dv, a->v_ld, a->v_head, s->nkv, s->dv);

    RT_TRY(check_shape(s, "attn_bwd", &longest, err));
    RT_TRY(rt_alloc((size_t)longest, sizeof *w.p, "a row of scores", &w.p, err));
    RT_TRY(rt_alloc((size_t)(longest * s->dqk), sizeof *w.dk, "gradients of keys", &w.dk, err));
    RT_TRY(rt_alloc((size_t)(longest * s->dv), sizeof *w.dv, "gradients of values", &w.dv, err));
    for (int64_t i_seq = 0; i_seq < s->n_seq; i_seq++)
        for (int hk = 0; hk < s->nkv; hk++) {
            const int64_t first = s->cu_seqlens[i_seq], end = s->cu_seqlens[i_seq + 1];
            memset(w.dk, 0, (size_t)((end - first) * s->dqk) * sizeof *w.dk);
            memset(w.dv, 0, (size_t)((end - first) * s->dv) * sizeof *w.dv);
            for (int h = hk * (s->nh / s->nkv); h < (hk + 1) * (s->nh / s->nkv); h++)
                for (int64_t i = first; i < end; i++)
                    attn_row_bwd(a, &w, first, i, h, hk);
            for (int64_t j = first; j < end; j++) {
                for (int d = 0; d < s->dqk; d++)
                    at(dk, j, hk)[d] = (real)w.dk[(j - first) * s->dqk + d];
                for (int d = 0; d < s->dv; d++)
                    at(dv, j, hk)[d] = (real)w.dv[(j - first) * s->dv + d];
            }
        }
out:
    rt_free(w.p);
    rt_free(w.dk);
    rt_free(w.dv);
    return st;
}

static enum rt_status check_places(const char *op, const int32_t *slot, const int32_t *pos, int64_t n, int64_t capacity,
                                   int64_t *longest, struct rt_err *err)
{
    *longest = 0;
    for (int64_t i = 0; i < n; i++) {
        if (slot[i] < 0 || pos[i] < 0 || pos[i] >= capacity)
            return rt_fail(err, RT_SHAPE, "%s: token %lld at slot %d, position %d; a slot holds %lld positions", op, (long long)i,
                           (int)slot[i], (int)pos[i], (long long)capacity);
        *longest = pos[i] + 1 > *longest ? pos[i] + 1 : *longest;
    }
    return RT_OK;
}

REF_OP(cache_put)
{
    int64_t longest;
    const enum rt_status st = check_places("cache_put", a->slot, a->pos, a->n, a->capacity, &longest, err);
    if (st != RT_OK)
        return st;
    const int64_t ldx = ref_ld(a->ldx, a->width);
    for (int64_t i = 0; i < a->n; i++)
        memcpy((real *)a->cache + (a->slot[i] * a->capacity + a->pos[i]) * a->width, (const real *)a->x + i * ldx,
               (size_t)a->width * sizeof(real));
    return RT_OK;
}

REF_OP(cache_copy)
{
    if (a->n < 0 || a->n > a->capacity || a->src < 0 || a->dst < 0)
        return rt_fail(err, RT_SHAPE, "cache_copy: %lld positions of slot %d to slot %d; a slot holds %lld", (long long)a->n,
                       (int)a->src, (int)a->dst, (long long)a->capacity);
    memmove((real *)a->cache + a->dst * a->capacity * a->width, (const real *)a->cache + a->src * a->capacity * a->width,
            (size_t)(a->n * a->width) * sizeof(real));
    return RT_OK;
}

/* o[0..dv) = sum_j p_j v_j, value rows at distance ld. */
static void weighted(real *o, const double *p, int64_t m, const real *v, int64_t ld, int dv)
{
    for (int d = 0; d < dv; d++) {
        double sum = 0;
        for (int64_t j = 0; j < m; j++)
            sum += p[j] * v[j * ld + d];
        o[d] = (real)sum;
    }
}

REF_OP(mla_cached)
{
    double *p;
    int64_t longest;
    const int64_t width = a->R + a->dr, pe_head = ref_ld(a->q_pe_head, a->dr), pe_ld = ref_ld(a->q_pe_ld, a->nh * pe_head);
    enum rt_status st = check_places("mla_cached", a->slot, a->pos, a->n, a->capacity, &longest, err);
    if (st == RT_OK)
        st = rt_alloc((size_t)longest, sizeof *p, "a row of scores", &p, err);
    if (st != RT_OK)
        return st;
    for (int64_t i = 0; i < a->n; i++) {
        const real *cache = (const real *)a->cache + a->slot[i] * a->capacity * width;
        const int64_t m = (int64_t)a->pos[i] + 1;
        for (int h = 0; h < a->nh; h++) {
            const real *q_lat = (const real *)a->q_lat + (i * a->nh + h) * a->R;
            const real *q_pe = (const real *)a->q_pe + i * pe_ld + h * pe_head;
            for (int64_t j = 0; j < m; j++)
                p[j] = a->scale * (ref_dot(q_lat, cache + j * width, a->R) + ref_dot(q_pe, cache + j * width + a->R, a->dr));
            softmax(p, m);
            weighted((real *)a->o + (i * a->nh + h) * a->R, p, m, cache, width, a->R);
        }
    }
    rt_free(p);
    return RT_OK;
}

/* Whether row i is nobody's. */
static bool nobody(const struct rt_cache_pages *pages, const int32_t *pos, int64_t i)
{
    return pages->table != NULL && pos[i] == -1;
}

REF_OP(attn_cached)
{
    double *p = NULL;
    enum rt_status st = RT_OK;
    const int64_t width = (int64_t)a->nkv * a->d, q_ld = ref_ld(a->q_ld, (int64_t)a->nh * a->d);
    for (int64_t i = 0; i < a->n; i++) {
        int64_t m;
        if (nobody(&a->pages, a->pos, i))
            continue;
        RT_TRY(check_places("attn_cached", a->slot + i, a->pos + i, 1, a->capacity, &m, err));
        rt_free(p);
        p = NULL;
        RT_TRY(rt_alloc((size_t)m, sizeof *p, "a row of scores", &p, err));
        for (int h = 0; h < a->nh; h++) {
            const int64_t head = (int64_t)(h / (a->nh / a->nkv)) * a->d;
            const real *q = (const real *)a->q + i * q_ld + (int64_t)h * a->d;
            real *o = (real *)a->o + (i * a->nh + h) * a->d;
            for (int64_t j = 0; j < m; j++)
                p[j] = a->scale * ref_dot(q, (const real *)a->k_cache + rt_cache_row(&a->pages, a->capacity, a->slot[i], j) * width + head, a->d);
            softmax(p, m);
            for (int d = 0; d < a->d; d++) {
                double sum = 0;
                for (int64_t j = 0; j < m; j++)
                    sum += p[j] * ((const real *)a->v_cache)[rt_cache_row(&a->pages, a->capacity, a->slot[i], j) * width + head + d];
                o[d] = (real)sum;
            }
        }
    }
out:
    rt_free(p);
    return st;
}

REF_OP(rope_put)
{
    enum rt_status st = RT_OK;
    const int64_t q = (int64_t)a->nh * a->d, kv = (int64_t)a->nkv * a->d;
    struct rt_headnorm_rope_fwd_args r = {.cos = a->cos, .sin = a->sin, .n = 1, .d = a->d, .eps = a->eps};
    for (int64_t i = 0; i < a->n; i++) {
        int64_t longest;
        const real *x = (const real *)a->qkv + i * (q + 2 * kv);
        if (nobody(&a->pages, a->pos, i))
            continue;
        RT_TRY(check_places("rope_put", a->slot + i, a->pos + i, 1, a->capacity, &longest, err));
        const int64_t row = rt_cache_row(&a->pages, a->capacity, a->slot[i], a->pos[i]);
        r.position = a->pos + i;
        r.x = x;
        r.w = a->q_norm;
        r.y = (real *)a->q + i * q;
        r.heads = a->nh;
        RT_TRY(REF(headnorm_rope_fwd)(dev, queue, &r, err));
        r.x = x + q;
        r.w = a->k_norm;
        r.y = (real *)a->k_cache + row * kv;
        r.heads = a->nkv;
        RT_TRY(REF(headnorm_rope_fwd)(dev, queue, &r, err));
        memcpy((real *)a->v_cache + row * kv, x + q + kv, (size_t)kv * sizeof *x);
    }
out:
    return st;
}

REF_OP(linear_rope_put)
{
    struct rt_rope_put_args put = a->put;
    const struct rt_linear_fwd_args product = {.x = {.data = (void *)(uintptr_t)a->x}, .w = a->w, .bias = a->bias, .y = a->tmp, .n = put.n, .K = a->K,
                                               .N = (int64_t)(put.nh + 2 * put.nkv) * put.d, .row_exact = true};
    const enum rt_status st = REF(linear_fwd)(dev, queue, &product, err);
    put.qkv = a->tmp;
    return st == RT_OK ? REF(rope_put)(dev, queue, &put, err) : st;
}
