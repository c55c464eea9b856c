/* Time of each operation of a run on its device: a backend table whose entries record an event before and behind the true ones.
 *
 *     struct rt_backend timed = profile_wrap(be);   use &timed in place of be
 *     profile_start();  ...the run...;  profile_print(&device, "title");
 */
#ifndef RT_BENCH_PROFILE_H
#define RT_BENCH_PROFILE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/backend.h"
#include "core/log.h"

enum { PROFILE_CALLS = 1 << 15, PROFILE_ROWS = 64 };

struct profile_call {
    struct rt_event *from, *to;
    char what[48];
    double flop, bytes; /* as far as the arguments say: 0 unknown */
    double t0, t1;      /* where calls are done when they return */
};

/* Operations have no argument for a caller's context: one profile a program. */
static struct {
    struct rt_backend base;
    struct profile_call *call;
    int n, made;
    bool on;
} profile;

static inline double profile_attn_flop(const struct rt_attn_shape *s)
{
    double pairs = 0;
    for (int64_t i = 0; i < s->n_seq; i++) {
        const double l = s->cu_seqlens[i + 1] - s->cu_seqlens[i];
        pairs += l * (l + 1) / 2;
    }
    return 2 * pairs * s->nh * (s->dqk + s->dv);
}

/* What a call is, in the table's terms. Bytes: each input read once, each output written once. */
static inline void profile_describe(enum rt_op op, const void *args, struct profile_call *c)
{
    c->flop = c->bytes = 0;
    if (op == RT_OP_linear_fwd) {
        const struct rt_linear_fwd_args *a = args;
        snprintf(c->what, sizeof c->what, "linear %ld x %ld", (long)a->N, (long)a->K);
        c->flop = 2.0 * (double)a->n * (double)a->N * (double)a->K;
    } else if (op == RT_OP_linear_rope_put) {
        const struct rt_linear_rope_put_args *a = args;
        const long N = (long)(a->put.nh + 2 * a->put.nkv) * a->put.d;
        snprintf(c->what, sizeof c->what, "linear %ld x %ld, rope, put", N, (long)a->K);
        c->flop = 2.0 * (double)a->put.n * (double)N * (double)a->K;
    } else if (op == RT_OP_gated_fwd) {
        const struct rt_gated_fwd_args *a = args;
        snprintf(c->what, sizeof c->what, "linear 2 x %ld x %ld, silu", (long)a->I, (long)a->K);
        c->flop = 4.0 * (double)a->n * (double)a->I * (double)a->K;
    } else if (op == RT_OP_moe_ffn) {
        const struct rt_moe_ffn_args *a = args;
        snprintf(c->what, sizeof c->what, a->perm != NULL ? "routed experts" : "MLP of %d", a->I);
        c->flop = 6.0 * (double)(a->offset[a->n_experts] - a->offset[0]) * a->H * a->I;
    } else if (op == RT_OP_attn_fwd) {
        const struct rt_attn_fwd_args *a = args;
        snprintf(c->what, sizeof c->what, "attention %d/%d%s", a->s.dqk, a->s.dv, a->oq.data != NULL ? " -> codes" : "");
        c->flop = profile_attn_flop(&a->s);
    } else if (op == RT_OP_head_topk) {
        const struct rt_head_topk_args *a = args;
        snprintf(c->what, sizeof c->what, "head, top %d", a->k);
        c->flop = 2.0 * (double)a->n * (double)a->n_ids * (double)a->H;
    } else if (op == RT_OP_norm_fwd) {
        const struct rt_norm_fwd_args *a = args;
        snprintf(c->what, sizeof c->what, "norm %ld%s%s", (long)a->cols, a->y != NULL ? " -> y" : "", a->yq.data != NULL ? " -> codes" : "");
        c->bytes = (double)a->n * (double)a->cols * (2 + 2 * (a->y != NULL) + (a->yq.data != NULL) * (1 + 4.0 / 128));
    } else if (op == RT_OP_quant) {
        const struct rt_quant_args *a = args;
        snprintf(c->what, sizeof c->what, "quantise %ld", (long)a->cols);
        c->bytes = (double)a->n * (double)a->cols * (3 + 4.0 / 128);
    } else if (op == RT_OP_rope) {
        const struct rt_rope_args *a = args;
        snprintf(c->what, sizeof c->what, "rope, %d heads", a->heads);
        c->bytes = 4.0 * (double)a->n * a->heads * a->dim;
    } else if (op == RT_OP_route) {
        const struct rt_route_args *a = args;
        snprintf(c->what, sizeof c->what, "route");
        c->bytes = 2.0 * (double)a->n * a->H;
    } else if (op == RT_OP_sumsq) {
        snprintf(c->what, sizeof c->what, "finite?");
        c->bytes = 2.0 * (double)((const struct rt_sumsq_args *)args)->n;
    } else {
        static const char *const name[] = {
#define PROFILE_NAME(o) #o,
            RT_BACKEND_OPS(PROFILE_NAME)
#undef PROFILE_NAME
        };
        snprintf(c->what, sizeof c->what, "%s", name[op]);
    }
}

static inline struct profile_call *profile_begin(enum rt_op op, const void *args, struct rt_dev *dev, struct rt_queue *q)
{
    if (!profile.on || profile.n == PROFILE_CALLS)
        return NULL;
    struct profile_call *c = &profile.call[profile.n++];
    c->t0 = c->t1 = rt_now();
    if (profile.base.own_memory && profile.n > profile.made) {
        if (profile.base.event_create(dev, &c->from, NULL) != RT_OK || profile.base.event_create(dev, &c->to, NULL) != RT_OK)
            return NULL;
        profile.made = profile.n;
    }
    profile_describe(op, args, c);
    if (profile.base.own_memory)
        (void)profile.base.event_record(dev, q, c->from, NULL);
    return c;
}

#define PROFILE_OP(op) \
    static inline enum rt_status profile_##op(struct rt_dev *dev, struct rt_queue *q, const struct rt_##op##_args *a, struct rt_err *err) \
    { \
        struct profile_call *c = profile_begin(RT_OP_##op, a, dev, q); \
        const enum rt_status st = profile.base.op(dev, q, a, err); \
        if (c != NULL && profile.base.own_memory) \
            (void)profile.base.event_record(dev, q, c->to, NULL); \
        else if (c != NULL) \
            c->t1 = rt_now(); \
        return st; \
    }
RT_BACKEND_OPS(PROFILE_OP)
#undef PROFILE_OP

static inline struct rt_backend profile_wrap(const struct rt_backend *be)
{
    struct rt_backend timed = *be;
    profile.base = *be;
    profile.call = calloc(PROFILE_CALLS, sizeof *profile.call);
#define PROFILE_ENTRY(op) timed.op = be->op != NULL ? profile_##op : NULL;
    RT_BACKEND_OPS(PROFILE_ENTRY)
#undef PROFILE_ENTRY
    return timed;
}

static inline void profile_start(void)
{
    profile.n = 0;
    profile.on = profile.call != NULL;
}

struct profile_row {
    const char *what;
    int calls;
    double seconds, flop, bytes;
};

static inline int profile_longest_first(const void *a, const void *b)
{
    const double x = ((const struct profile_row *)a)->seconds, y = ((const struct profile_row *)b)->seconds;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* A line for each kind of call since profile_start, the longest first; `total`: seconds of the run. */
static inline void profile_print(const struct rt_device *d, const char *title, double total)
{
    struct profile_row row[PROFILE_ROWS];
    int rows = 0;
    double sum = 0;
    profile.on = false;
    (void)rt_device_sync(d, NULL);
    for (int i = 0; i < profile.n; i++) {
        const struct profile_call *c = &profile.call[i];
        double s = c->t1 - c->t0;
        int r = 0;
        if (d->be->own_memory)
            (void)d->be->event_elapsed(d->dev, c->from, c->to, &s, NULL);
        while (r < rows && strcmp(row[r].what, c->what) != 0)
            r++;
        if (r == PROFILE_ROWS)
            continue;
        if (r == rows)
            row[rows++] = (struct profile_row){.what = c->what};
        row[r].calls++;
        row[r].seconds += s;
        row[r].flop += c->flop;
        row[r].bytes += c->bytes;
        sum += s;
    }
    qsort(row, (size_t)rows, sizeof *row, profile_longest_first);
    printf("%s: %.1f ms, %.1f%% of them in operations\n", title, total * 1e3, 100 * sum / total);
    for (int r = 0; r < rows; r++) {
        printf("    %-28s %5d calls  %9.2f ms  %5.1f%%", row[r].what, row[r].calls, row[r].seconds * 1e3, 100 * row[r].seconds / total);
        if (row[r].flop > 0)
            printf("  %7.0f TFLOP/s", row[r].flop / row[r].seconds * 1e-12);
        if (row[r].bytes > 0)
            printf("  %7.0f GB/s", row[r].bytes / row[r].seconds * 1e-9);
        printf("\n");
    }
    fflush(stdout);
}

#endif
