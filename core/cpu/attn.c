/* Attention forward: packed sequences, and over the caches of generation.
 *
 * An item is one head of one block of queries (heavy ones first), or one key head of one token of the cache. While the keys fit one
 * block there is one softmax; beyond that the running one: greatest score m, sum l and output o of a row are rescaled by
 * exp(m_old - m_new) as key blocks pass (Milakov & Gimelshein 2018, algorithm 3).
 */
#include "core/cpu/attn.h"

#include <stdlib.h>

#include "core/cpu/exp0.h"

/* Softmax state of a block of queries. */
struct rows {
    float m[RT_ATTN_Q], c[RT_ATTN_Q]; /* greatest score so far; what the earlier output is to be multiplied by */
    double l[RT_ATTN_Q];
};

enum rt_status rt_cpu_attn_check(const struct rt_attn_shape *s, const char *op, struct rt_err *err)
{
    if (s->nh <= 0 || s->nkv <= 0 || s->nh % s->nkv != 0)
        return rt_fail(err, RT_SHAPE, "%s: %d query heads over %d key heads; expected a multiple", op, s->nh, s->nkv);
    for (int64_t i = 0; i < s->n_seq; i++)
        if (s->cu_seqlens[i + 1] < s->cu_seqlens[i])
            return rt_fail(err, RT_SHAPE, "%s: sequence %lld has length %lld", op, (long long)i,
                           (long long)s->cu_seqlens[i + 1] - s->cu_seqlens[i]);
    if (s->cu_seqlens[0] != 0 || s->cu_seqlens[s->n_seq] != s->n)
        return rt_fail(err, RT_SHAPE, "%s: sequences span rows %d .. %d, expected 0 .. %lld", op, (int)s->cu_seqlens[0],
                       (int)s->cu_seqlens[s->n_seq], (long long)s->n);
    return RT_OK;
}

/* Scores p [n, cols], rows at distance ld, to exp(p - m); columns from visible + r on (the future of row r) to 0; m, l and c are
 * brought up to date. ld is cols rounded up to 16, so that rows are worked on in whole vectors. */
RT_SIMD static void softmax_block(float *p, int64_t n, int64_t cols, int64_t ld, int64_t visible, bool first, struct rows *s)
{
    for (int64_t r = 0; r < n; r++) {
        float *row = p + r * ld;
        const int64_t seen = rt_min64(cols, rt_max64(visible + r, 0)), whole = rt_ceil_div(seen, 16) * 16;
        if (first) {
            s->m[r] = -INFINITY;
            s->l[r] = 0;
        }
        for (int64_t j = seen; j < whole; j++)
            row[j] = -INFINITY;
        const float old = s->m[r], now = rt_max(row, whole), m = now > old ? now : old;
        for (int64_t i = 0; i < whole; i += 16)
            for (int j = 0; j < 16; j++)
                row[i + j] = rt_cpu_exp_or_0(row[i + j] - m);
        for (int64_t i = whole; i < ld; i += 16)
            for (int j = 0; j < 16; j++)
                row[i + j] = 0;
        s->c[r] = seen == 0 ? 1 : first ? 0 : rt_cpu_exp_or_0(old - m);
        s->l[r] = s->l[r] * s->c[r] + rt_sum(row, whole);
        s->m[r] = m;
    }
}

/* o [n, dv] *= c (NULL: 1/l) of its row. */
RT_SIMD static void scale_rows(float *o, int64_t ld, int64_t n, int64_t dv, const struct rows *s, bool by_c)
{
    for (int64_t r = 0; r < n; r++) {
        const float c = by_c ? s->c[r] : (float)(1 / s->l[r]);
        for (int64_t j = 0; j < dv; j++)
            o[r * ld + j] *= c;
    }
}

/* A block of queries: rows first + q0 .. first + q0 + rows. */
struct block {
    int32_t first, q0, rows, index;
};

struct fwd {
    const struct rt_attn_fwd_args *a;
    struct rt_dev *dev;
    struct rt_cpu_heads q, k, v, o, pe;
    int dr; /* elements of a key that lie in pe */
    const struct block *block;
};

static void fwd_item(void *ctx, int64_t item, int worker)
{
    const struct fwd *f = ctx;
    const struct rt_attn_shape *s = &f->a->s;
    const struct block *b = &f->block[item / s->nh];
    const int h = (int)(item % s->nh), hk = h / (s->nh / s->nkv);
    const int64_t row0 = (int64_t)b->first + b->q0, keys = (int64_t)b->q0 + b->rows;
    float *p = rt_cpu_tile(f->dev, worker), *o = rt_cpu_head_at(f->o, row0, h);
    struct rows st;
    for (int64_t k0 = 0; k0 < keys; k0 += RT_ATTN_K) {
        const int64_t cols = rt_min64(RT_ATTN_K, keys - k0), ld = rt_ceil_div(cols, 16) * 16;
        const float *query = rt_cpu_head_at(f->q, row0, h);
        rt_cpu_gemm_nt(b->rows, cols, s->dqk - f->dr, s->scale, query, f->q.ld, rt_cpu_head_at(f->k, b->first + k0, hk), f->k.ld, 0, p, ld);
        if (f->dr > 0)
            rt_cpu_gemm_nt(b->rows, cols, f->dr, s->scale, query + s->dqk - f->dr, f->q.ld, rt_cpu_head_at(f->pe, b->first + k0, 0), f->pe.ld, 1, p, ld);
        softmax_block(p, b->rows, cols, ld, b->q0 - k0 + 1, k0 == 0, &st);
        if (k0 > 0)
            scale_rows(o, f->o.ld, b->rows, s->dv, &st, true);
        rt_cpu_gemm_nn(b->rows, s->dv, cols, 1, p, ld, rt_cpu_head_at(f->v, b->first + k0, hk), f->v.ld, k0 > 0, o, f->o.ld);
    }
    scale_rows(o, f->o.ld, b->rows, s->dv, &st, false);
    for (int64_t r = 0; r < b->rows && f->a->lse != NULL; r++)
        f->a->lse[h * s->n + row0 + r] = (float)(st.m[r] + log(st.l[r]));
}

/* Most keys times queries first. */
static int by_cost(const void *x, const void *y)
{
    const struct block *a = x, *b = y;
    const int64_t ca = (int64_t)a->rows * (a->q0 + a->rows), cb = (int64_t)b->rows * (b->q0 + b->rows);
    return ca != cb ? (ca < cb) - (ca > cb) : (a->index > b->index) - (a->index < b->index);
}

enum rt_status rt_cpu_attn_fwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_attn_fwd_args *a, struct rt_err *err)
{
    const struct rt_attn_shape *s = &a->s;
    const int dr = a->k_pe != NULL ? a->dr : 0;
    struct fwd f = {.a = a, .dev = dev, .dr = dr, .pe = rt_cpu_heads(a->k_pe, a->k_pe_ld, 0, 1, dr),
                    .q = rt_cpu_heads(a->q, a->q_ld, a->q_head, s->nh, s->dqk),
                    .k = rt_cpu_heads(a->k, a->k_ld, a->k_head, s->nkv, s->dqk - dr),
                    .v = rt_cpu_heads(a->v, a->v_ld, a->v_head, s->nkv, s->dv),
                    .o = rt_cpu_heads(a->o, 0, 0, s->nh, s->dv)};
    struct block *block;
    int32_t count = 0;
    enum rt_status st = rt_cpu_attn_check(s, "attn_fwd", err);
    if (st == RT_OK && (dr < 0 || dr >= s->dqk))
        st = rt_fail(err, RT_SHAPE, "attn_fwd: %d elements of a key of %d lie apart", dr, s->dqk);
    if (st == RT_OK)
        st = rt_cpu_shared(dev, ((size_t)s->n / 8 + (size_t)s->n_seq + 1) * sizeof *block, &block, err);
    if (st == RT_OK && a->cos != NULL)
        st = rt_cpu_rope(dev, queue, &(const struct rt_rope_args){.x = f.q.data + (s->dqk - a->dr), .ld = f.q.ld, .head_ld = f.q.head_ld, .cos = a->cos,
                                                                  .sin = a->sin, .position = a->position, .n = s->n, .heads = s->nh, .dim = a->dr,
                                                                  .interleaved = true}, err);
    if (st != RT_OK)
        return st;
    for (int64_t i = 0; i < s->n_seq; i++) {
        const int32_t first = s->cu_seqlens[i], len = s->cu_seqlens[i + 1] - first;
        const int32_t step = len > 0 ? (int32_t)rt_cpu_attn_rows(len) : 1;
        for (int32_t q0 = 0; q0 < len; q0 += step, count++)
            block[count] = (struct block){first, q0, (int32_t)rt_min64(step, len - q0), count};
    }
    qsort(block, (size_t)count, sizeof *block, by_cost);
    f.block = block;
    rt_pool_run(dev->pool, (int64_t)count * s->nh, fwd_item, &f);
    if (a->oq.data == NULL)
        return RT_OK;
    return rt_cpu_quant(dev, queue, &(const struct rt_quant_args){.x = a->o, .q = a->oq, .n = s->n, .cols = (int64_t)s->nh * s->dv, .pow2 = a->pow2}, err);
}

/* ---- cache ---- */
struct cached {
    const struct rt_attn_cached_args *a;
    struct rt_dev *dev;
};

/* All query heads of one key head of one token, at most RT_ATTN_Q at a time. */
static void cached_item(void *ctx, int64_t item, int worker)
{
    const struct cached *c = ctx;
    const struct rt_attn_cached_args *a = c->a;
    const int64_t i = item / a->nkv, hk = item % a->nkv, width = (int64_t)a->nkv * a->d, group = a->nh / a->nkv;
    const int64_t q_ld = a->q_ld != 0 ? a->q_ld : (int64_t)a->nh * a->d, keys = (int64_t)a->pos[i] + 1;
    /* of a block of keys that lie together; where blocks end depends on positions alone */
    const int64_t block = a->pages.table != NULL && a->pages.len < RT_ATTN_K ? a->pages.len : RT_ATTN_K;
    float *p = rt_cpu_tile(c->dev, worker), *scaled = rt_cpu_panel(c->dev, worker);
    struct rows st;
    if (a->pages.table != NULL && a->pos[i] == -1)
        return;
    for (int64_t h0 = 0; h0 < group; h0 += RT_ATTN_Q) {
        const int64_t h = hk * group + h0, n = rt_min64(RT_ATTN_Q, group - h0);
        const float *q = (const float *)a->q + i * q_ld + h * a->d;
        float *o = (float *)a->o + (i * a->nh + h) * a->d;
        for (int64_t j = 0; j < n * a->d; j++)
            scaled[j] = q[j] * a->scale;
        for (int64_t k0 = 0; k0 < keys; k0 += block) {
            const int64_t cols = rt_min64(block, keys - k0), ld = rt_ceil_div(cols, 16) * 16;
            const int64_t at = rt_cache_row(&a->pages, a->capacity, a->slot[i], k0) * width + hk * a->d;
            rt_cpu_exact_nt(n, cols, a->d, scaled, a->d, (const float *)a->k_cache + at, width, false, p, ld);
            softmax_block(p, n, cols, ld, cols, k0 == 0, &st);
            if (k0 > 0)
                scale_rows(o, a->d, n, a->d, &st, true);
            rt_cpu_exact_nn(n, a->d, cols, p, ld, (const float *)a->v_cache + at, width, k0 > 0, o, a->d);
        }
        scale_rows(o, a->d, n, a->d, &st, false);
    }
}

enum rt_status rt_cpu_attn_cached(struct rt_dev *dev, struct rt_queue *queue, const struct rt_attn_cached_args *a,
                                  struct rt_err *err)
{
    struct cached c = {a, dev};
    (void)queue;
    if (a->nh <= 0 || a->nkv <= 0 || a->nh % a->nkv != 0 || a->d <= 0 || a->d > RT_CPU_PANEL / RT_ATTN_Q)
        return rt_fail(err, RT_SHAPE, "attn_cached: %d query heads of %d over %d key heads", a->nh, a->d, a->nkv);
    for (int64_t i = 0; i < a->n; i++)
        if (a->slot[i] < 0 || a->pos[i] < (a->pages.table != NULL ? -1 : 0) || a->pos[i] >= a->capacity)
            return rt_fail(err, RT_SHAPE, "attn_cached: token %lld at slot %d, position %d; a slot holds %lld positions",
                           (long long)i, (int)a->slot[i], (int)a->pos[i], (long long)a->capacity);
    rt_pool_run(dev->pool, a->n * a->nkv, cached_item, &c);
    return RT_OK;
}
