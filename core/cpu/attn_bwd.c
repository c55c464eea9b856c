/* Attention backward over packed sequences.
 *
 *   delta = rowsum(dO O);  P = exp(scale q k^T - lse);  dV += P^T dO;  dS = P (dO V^T - delta) scale;  dQ = dS K;  dK += dS^T Q
 *
 * An item is one key head of one sequence and owns dq, dk and dv of it: query heads of the group, blocks of queries and blocks of
 * keys are added in ascending order, by one thread.
 */
#include "core/cpu/attn.h"

#include <stdlib.h>

#include "core/cpu/exp0.h"

struct bwd {
    const struct rt_attn_bwd_args *a;
    struct rt_dev *dev;
    struct rt_cpu_heads q, k, v, o, dout, dq, dk, dv;
    const int32_t *order; /* sequences, longest first */
};

/* delta[r] = dout_r . o_r */
RT_SIMD static void row_dots(const float *x, const float *y, int64_t ld, int64_t n, int64_t d, float *out)
{
    for (int64_t r = 0; r < n; r++)
        out[r] = rt_dot(x + r * ld, y + r * ld, d);
}

/* Scores p to P, and dp = dO V^T to dS; both [n, cols] with rows at distance ld, cols rounded up to 16; columns from visible + r on
 * (the future of row r) to 0. */
RT_SIMD static void scores_bwd(float *restrict p, float *restrict dp, int64_t n, int64_t cols, int64_t ld, int64_t visible,
                               const float *lse, const float *delta, float scale)
{
    for (int64_t r = 0; r < n; r++) {
        float *restrict pr = p + r * ld, *restrict dr = dp + r * ld;
        const int64_t seen = rt_min64(cols, rt_max64(visible + r, 0)), whole = rt_ceil_div(seen, 16) * 16;
        const float l = lse[r], d = delta[r];
        for (int64_t j = cols; j < whole; j++)
            pr[j] = dr[j] = 0;
        for (int64_t i = 0; i < whole; i += 16)
            for (int j = 0; j < 16; j++) {
                pr[i + j] = rt_cpu_exp_or_0(pr[i + j] - l);
                dr[i + j] = pr[i + j] * (dr[i + j] - d) * scale;
            }
        for (int64_t j = seen; j < whole; j++)
            pr[j] = dr[j] = 0;
        for (int64_t i = whole; i < ld; i += 16)
            for (int j = 0; j < 16; j++)
                pr[i + j] = dr[i + j] = 0;
    }
}

/* One query head, queries row0 .. row0 + rows of the sequence from `first`; the first touch of a gradient overwrites. */
static void bwd_block(const struct bwd *b, int64_t first, int64_t q0, int64_t rows, int h, bool first_head, float *p)
{
    const struct rt_attn_shape *s = &b->a->s;
    const int hk = h / (s->nh / s->nkv);
    const int64_t row0 = first + q0, keys = q0 + rows, done = first_head ? q0 : keys;
    const float *q = rt_cpu_head_at(b->q, row0, h), *dout = rt_cpu_head_at(b->dout, row0, h);
    const float *lse = b->a->lse + h * s->n + row0;
    float *delta = b->a->delta + h * s->n + row0;
    row_dots(dout, rt_cpu_head_at(b->o, row0, h), b->o.ld, rows, s->dv, delta);
    for (int64_t k0 = 0; k0 < keys; k0 += RT_ATTN_K) {
        const int64_t cols = rt_min64(RT_ATTN_K, keys - k0), ld = rt_ceil_div(cols, 16) * 16, row_k = first + k0;
        float *dp = p + rows * ld, *dk = rt_cpu_head_at(b->dk, row_k, hk), *dv = rt_cpu_head_at(b->dv, row_k, hk);
        const float *k = rt_cpu_head_at(b->k, row_k, hk), *v = rt_cpu_head_at(b->v, row_k, hk);
        rt_cpu_gemm_nt(rows, cols, s->dqk, s->scale, q, b->q.ld, k, b->k.ld, 0, p, ld);
        rt_cpu_gemm_nt(rows, cols, s->dv, 1, dout, b->dout.ld, v, b->v.ld, 0, dp, ld);
        scores_bwd(p, dp, rows, cols, ld, q0 - k0 + 1, lse, delta, s->scale);
        /* Keys before `done` hold sums already; those of the diagonal of the group's first head do not. */
        const int64_t old = rt_max64(0, rt_min64(cols, done - k0));
        if (old > 0) {
            rt_cpu_gemm_tn(old, s->dv, rows, 1, p, ld, dout, b->dout.ld, 1, dv, b->dv.ld);
            rt_cpu_gemm_tn(old, s->dqk, rows, 1, dp, ld, q, b->q.ld, 1, dk, b->dk.ld);
        }
        if (old < cols) {
            rt_cpu_gemm_tn(cols - old, s->dv, rows, 1, p + old, ld, dout, b->dout.ld, 0, dv + old * b->dv.ld, b->dv.ld);
            rt_cpu_gemm_tn(cols - old, s->dqk, rows, 1, dp + old, ld, q, b->q.ld, 0, dk + old * b->dk.ld, b->dk.ld);
        }
        rt_cpu_gemm_nn(rows, s->dqk, cols, 1, dp, ld, k, b->k.ld, k0 > 0, rt_cpu_head_at(b->dq, row0, h), b->dq.ld);
    }
}

static void bwd_item(void *ctx, int64_t item, int worker)
{
    const struct bwd *b = ctx;
    const struct rt_attn_shape *s = &b->a->s;
    const int32_t seq = b->order[item / s->nkv];
    const int group = s->nh / s->nkv, h0 = (int)(item % s->nkv) * group;
    const int64_t first = s->cu_seqlens[seq], len = s->cu_seqlens[seq + 1] - first;
    if (len == 0)
        return;
    const int64_t step = rt_cpu_attn_rows(len);
    for (int h = h0; h < h0 + group; h++)
        for (int64_t q0 = 0; q0 < len; q0 += step)
            bwd_block(b, first, q0, rt_min64(step, len - q0), h, h == h0, rt_cpu_tile(b->dev, worker));
}

struct length {
    int32_t len, seq;
};

static int longest_first(const void *x, const void *y)
{
    const struct length *a = x, *b = y;
    return a->len != b->len ? (a->len < b->len) - (a->len > b->len) : (a->seq > b->seq) - (a->seq < b->seq);
}

enum rt_status rt_cpu_attn_bwd(struct rt_dev *dev, struct rt_queue *queue, const struct rt_attn_bwd_args *a, struct rt_err *err)
{
    const struct rt_attn_shape *s = &a->s;
    struct bwd b = {.a = a, .dev = dev,
                    .q = rt_cpu_heads(a->q, a->q_ld, a->q_head, s->nh, s->dqk),
                    .k = rt_cpu_heads(a->k, a->k_ld, a->k_head, s->nkv, s->dqk),
                    .v = rt_cpu_heads(a->v, a->v_ld, a->v_head, s->nkv, s->dv),
                    .o = rt_cpu_heads(a->o, 0, 0, s->nh, s->dv),
                    .dout = rt_cpu_heads(a->dout, 0, 0, s->nh, s->dv),
                    .dq = rt_cpu_heads(a->dq, a->q_ld, a->q_head, s->nh, s->dqk),
                    .dk = rt_cpu_heads(a->dk, a->k_ld, a->k_head, s->nkv, s->dqk),
                    .dv = rt_cpu_heads(a->dv, a->v_ld, a->v_head, s->nkv, s->dv)};
    struct length *l;
    enum rt_status st = rt_cpu_attn_check(s, "attn_bwd", err);
    if (st == RT_OK)
        st = rt_cpu_shared(dev, ((size_t)s->n_seq + 1) * (sizeof *l + sizeof *b.order), &l, err);
    if (st != RT_OK)
        return st;
    (void)queue;
    int32_t *order = (int32_t *)(l + s->n_seq + 1);
    for (int32_t i = 0; i < s->n_seq; i++)
        l[i] = (struct length){s->cu_seqlens[i + 1] - s->cu_seqlens[i], i};
    qsort(l, (size_t)s->n_seq, sizeof *l, longest_first);
    for (int32_t i = 0; i < s->n_seq; i++)
        order[i] = l[i].seq;
    b.order = order;
    rt_pool_run(dev->pool, s->n_seq * s->nkv, bwd_item, &b);
    return RT_OK;
}
