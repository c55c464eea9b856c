/* Attention on the GPU: the own kernels and cuDNN, at the teacher's and the students' shapes.
 *
 *     bench_cuda_attn [--path own|hopper|cudnn] [--shape teacher|MLA|MLA+|0.5B|1.5B|7B] [--long]        all of them without these
 *
 * MLA is the teacher's attention: keys in two parts, codes instead of the output (and what a path needs for that); MLA+ rotates queries as well, as
 * its layer calls it.
 * TFLOP/s count the causal half alone: 2 (dqk + dv) len^2 / 2 multiply-adds of two operations a head and sequence forward, 2.5 times that
 * backward (dqk = dv). Median of the calls' times between CUDA events; with --long the mean of calls in a row for half a second, after a fifth of a
 * second of them: what a GPU at its power limit keeps up, as it must in training. The limit is 990 TFLOP/s, what the chip's tensor cores do in bfloat16.
 */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/command.h"
#include "core/backend.h"
#include "core/mem.h"
#include "core/rng.h"

#ifdef RT_CUDA
#include "core/cuda/attn.h"

enum { REPEAT = 12 };
static const float WARM_MS = 200, LONG_MS = 500;

struct shape {
    const char *name;
    int nh, nkv, dqk, dv;
    int64_t len, n_seq;
    bool ragged, backward; /* ragged: lengths differ by a row */
    int mla; /* 1: MLA, 2: MLA+ */
};

static const struct shape shapes[] = {
    {"teacher", 128, 128, 192, 128, 2048, 4, false, false, 0}, {"MLA", 128, 128, 192, 128, 2048, 4, false, false, 1}, {"MLA+", 128, 128, 192, 128, 2048, 4, false, false, 2},
    {"teacher", 128, 128, 192, 128, 4096, 2, false, false, 0}, {"MLA", 128, 128, 192, 128, 4096, 2, false, false, 1}, {"MLA+", 128, 128, 192, 128, 4096, 2, false, false, 2},
    {"teacher", 128, 128, 192, 128, 8192, 1, false, false, 0}, {"MLA", 128, 128, 192, 128, 8192, 1, false, false, 1}, {"MLA+", 128, 128, 192, 128, 8192, 1, false, false, 2},
    {"teacher", 128, 128, 192, 128, 2048, 4, true, false, 0},  {"0.5B", 14, 2, 64, 64, 1024, 16, false, true, 0},
    {"0.5B", 14, 2, 64, 64, 8192, 2, false, true, 0},          {"1.5B", 12, 2, 128, 128, 1024, 16, false, true, 0},
    {"1.5B", 12, 2, 128, 128, 8192, 2, false, true, 0},        {"7B", 28, 4, 128, 128, 2048, 8, false, true, 0},
    {"7B", 28, 4, 128, 128, 32768, 1, false, true, 0},         {"7B", 28, 4, 128, 128, 2048, 8, true, true, 0},
};

struct values {
    const char *path, *shape;
    bool long_run, help;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"path", RT_OPT_CHOICE, V(path), NULL, 0, 0, "own|hopper|cudnn", NULL, "these kernels alone", false, false},
    {"shape", RT_OPT_CHOICE, V(shape), NULL, 0, 0, "teacher|MLA|MLA+|0.5B|1.5B|7B", NULL, "these shapes alone", false, false},
    {"long", RT_OPT_FLAG, V(long_run), NULL, 0, 0, NULL, NULL, "calls in a row for half a second", false, false},
    {"help", RT_OPT_FLAG, V(help), NULL, 0, 0, NULL, NULL, "this text", false, false},
    {0},
};

static int compare(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

struct buffers {
    void *q, *k, *v, *o, *dout, *dq, *dk, *dv, *lse, *delta, *code, *scale, *angle, *position;
};

static enum rt_status random_act(const struct rt_device *d, int64_t n, void **out, struct rt_err *err)
{
    enum { BLOCK = 1 << 20 };
    uint16_t *host = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc(BLOCK, sizeof *host, "numbers", &host, err));
    for (int64_t i = 0; i < BLOCK; i++)
        host[i] = rt_f32_to_bf16(rt_rng_normal(1, (uint64_t)n, (uint64_t)i));
    RT_TRY(d->be->alloc(d->dev, (size_t)n * 2, out, err));
    for (int64_t i = 0; i < n; i += BLOCK)
        RT_TRY(rt_device_upload(d, (uint16_t *)*out + i, host, (size_t)(n - i < BLOCK ? n - i : BLOCK) * 2, err));
    RT_TRY(rt_device_sync(d, err));
out:
    rt_free(host);
    return st;
}

/* A call on a path; f or b. */
struct call {
    enum rt_cuda_attn_path path;
    const struct rt_attn_fwd_args *f;
    const struct rt_attn_bwd_args *b;
    cudaEvent_t from, to;
};
/* Milliseconds of `times` calls in a row. */
static enum rt_status in_a_row(const struct rt_device *d, const struct call *c, int times, float *ms, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    cudaEventRecord(c->from, d->q->stream);
    for (int i = 0; i < times; i++)
        RT_TRY(c->b != NULL ? rt_cuda_attn_bwd_by(c->path, d->dev, d->q, c->b, err) : rt_cuda_attn_fwd_by(c->path, d->dev, d->q, c->f, err));
    cudaEventRecord(c->to, d->q->stream);
    RT_TRY(rt_device_sync(d, err));
    cudaEventElapsedTime(ms, c->from, c->to);
out:
    return st;
}
/* Median of the milliseconds of a call, or in a long run their mean; an error where the path has not got the shape. */
static enum rt_status measure(const struct rt_device *d, struct call *c, bool long_run, float *ms, struct rt_err *err)
{
    float all[REPEAT];
    enum rt_status st;
    cudaEventCreate(&c->from);
    cudaEventCreate(&c->to);
    for (int i = -3; i < REPEAT; i++)
        RT_TRY(in_a_row(d, c, 1, &all[i < 0 ? 0 : i], err));
    qsort(all, REPEAT, sizeof *all, compare);
    *ms = all[REPEAT / 2];
    if (long_run) {
        const int times = (int)(LONG_MS / *ms) + 1;
        RT_TRY(in_a_row(d, c, (int)(WARM_MS / *ms) + 1, ms, err));
        RT_TRY(in_a_row(d, c, times, ms, err));
        *ms /= (float)times;
    }
out:
    cudaEventDestroy(c->from);
    cudaEventDestroy(c->to);
    return st;
}

static void line(const struct shape *s, const char *op, const char *path, double flop, bool ok, float ms, struct rt_err *err)
{
    char where[64];
    snprintf(where, sizeof where, "%d/%d x %d/%d", s->nh, s->nkv, s->dqk, s->dv);
    if (ok)
        printf("%-8s %-4s %-6s %-18s %6lld x %-3lld%-7s %9.3f ms %7.1f TFLOP/s %5.1f %%\n", s->name, op, path, where, (long long)s->len,
               (long long)s->n_seq, s->ragged ? " ragged" : "", (double)ms, flop / ms * 1e-9, flop / ms * 1e-9 / 9.9);
    else
        printf("%-8s %-4s %-6s %-18s %6lld x %-3lld%-7s %s\n", s->name, op, path, where, (long long)s->len, (long long)s->n_seq,
               s->ragged ? " ragged" : "", err->msg);
    rt_err_clear(err);
    fflush(stdout);
}

static enum rt_status one(const struct rt_device *d, const struct shape *s, const char *only, bool long_run, struct rt_err *err)
{
    int32_t cu[64] = {0};
    struct buffers x = {0};
    int32_t *position = NULL;
    const bool packed = s->dqk == s->dv; /* q, k and v in one row, as the students have them */
    enum rt_status st;
    double flop = 0;
    for (int64_t i = 0; i < s->n_seq; i++) {
        const int64_t len = s->len - (s->ragged ? i : 0);
        cu[i + 1] = cu[i] + (int32_t)len;
        flop += 2.0 * s->nh * (s->dqk + s->dv) * (double)len * (double)len / 2;
    }
    const int64_t n = cu[s->n_seq], row = packed ? (int64_t)(s->nh + 2 * s->nkv) * s->dqk : s->nh * s->dqk;
    RT_TRY(random_act(d, n * row, &x.q, err));
    RT_TRY(random_act(d, n * s->nh * s->dv, &x.o, err));
    RT_TRY(d->be->alloc(d->dev, (size_t)(n * s->nh) * 4, &x.lse, err));
    const struct rt_attn_shape shape = {.cu_seqlens = cu, .n = n, .n_seq = s->n_seq, .nh = s->nh, .nkv = s->nkv, .dqk = s->dqk, .dv = s->dv,
                                        .scale = (float)(1 / sqrt(s->dqk))};
    struct rt_attn_fwd_args f = {.s = shape, .q = x.q, .q_ld = row, .k_ld = row, .v_ld = row, .o = x.o, .lse = s->backward ? x.lse : NULL};
    f.k = (uint16_t *)x.q + s->nh * s->dqk;
    f.v = (uint16_t *)x.q + (s->nh + s->nkv) * s->dqk;
    if (!packed) {
        RT_TRY(random_act(d, n * row, &x.k, err));
        RT_TRY(random_act(d, n * s->nh * 256, &x.v, err));
        f.k = x.k, f.v = (uint16_t *)x.v + 128, f.v_ld = s->nh * 256, f.v_head = 256;
    }
    if (s->mla > 0) {
        RT_TRY(d->be->alloc(d->dev, (size_t)(rt_act_rows(n) * s->nh * s->dv), &x.code, err));
        RT_TRY(d->be->alloc(d->dev, (size_t)(rt_act_rows(n) * s->nh) * 4, &x.scale, err));
        f.k = x.v, f.k_ld = f.v_ld, f.k_head = f.v_head;
        f.k_pe = x.k, f.k_pe_ld = 576, f.dr = 64, f.oq = (struct rt_act){x.code, x.scale};
    }
    if (s->mla > 1) { /* angles of 0 */
        RT_TRY(rt_alloc((size_t)n, sizeof *position, "positions", &position, err));
        for (int64_t i = 0; i < n; i++)
            position[i] = (int32_t)(i % s->len);
        RT_TRY(d->be->alloc(d->dev, (size_t)n * 4, &x.position, err));
        RT_TRY(rt_device_upload(d, x.position, position, (size_t)n * 4, err));
        RT_TRY(rt_device_sync(d, err));
        RT_TRY(d->be->alloc(d->dev, (size_t)s->len * 32 * 4, &x.angle, err));
        f.cos = f.sin = x.angle, f.position = x.position;
    }
    for (int path = RT_CUDA_ATTN_OWN; path <= RT_CUDA_ATTN_CUDNN; path++) {
        float ms = 0;
        const char *name = path == RT_CUDA_ATTN_OWN ? "own" : path == RT_CUDA_ATTN_HOPPER ? "hopper" : "cudnn";
        if (only != NULL && strcmp(only, name) != 0)
            continue;
        bool ok = measure(d, &(struct call){.path = (enum rt_cuda_attn_path)path, .f = &f}, long_run, &ms, err) == RT_OK;
        line(s, "fwd", name, flop, ok, ms, err);
        if (!ok) /* the backward reads the forward's statistics */
            RT_TRY(rt_cuda_attn_fwd_by(RT_CUDA_ATTN_OWN, d->dev, d->q, &f, err));
        if (!s->backward)
            continue;
        if (x.dq == NULL) {
            RT_TRY(d->be->alloc(d->dev, (size_t)(n * row) * 2, &x.dq, err));
            RT_TRY(random_act(d, n * s->nh * s->dv, &x.dout, err));
            RT_TRY(d->be->alloc(d->dev, (size_t)(n * s->nh) * 4, &x.delta, err));
        }
        const struct rt_attn_bwd_args b = {.s = shape, .q = f.q, .k = f.k, .v = f.v, .q_ld = row, .k_ld = row, .v_ld = row, .o = x.o, .dout = x.dout,
                                           .lse = x.lse, .dq = x.dq, .dk = (uint16_t *)x.dq + s->nh * s->dqk,
                                           .dv = (uint16_t *)x.dq + (s->nh + s->nkv) * s->dqk, .delta = x.delta};
        ok = measure(d, &(struct call){.path = (enum rt_cuda_attn_path)path, .b = &b}, long_run, &ms, err) == RT_OK;
        line(s, "bwd", name, 2.5 * flop, ok, ms, err);
    }
out:
    for (size_t i = 0; i < sizeof x / sizeof(void *); i++)
        d->be->free(d->dev, ((void **)(void *)&x)[i]);
    rt_free(position);
    return st;
}

int main(int argc, char **argv)
{
    struct values v = {0};
    struct rt_err err = {0};
    struct rt_device d = {0};
    char why[128];
    enum rt_status st = bench_command(options, argc, argv, &v, &v.help, NULL, &err);
    if (st == RT_OK && v.help)
        return 0;
    if (st == RT_OK && !rt_backend_cuda.available(why, sizeof why))
        st = rt_fail(&err, RT_DEVICE, "%s", why);
    RT_TRY(st);
    RT_TRY(rt_device_open(&rt_backend_cuda, &(struct rt_dev_options){0}, &d, &err));
    d.be->set_scratch(d.dev, (uint64_t)4 << 30);
    printf("%s%s%s\n", d.be->describe(d.dev), d.dev->dnn == NULL ? "; " : "", d.dev->dnn == NULL ? d.dev->dnn_why : "");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (v.shape == NULL || strcmp(v.shape, shapes[i].name) == 0)
            RT_TRY(one(&d, &shapes[i], v.path, v.long_run, &err));
out:
    if (st != RT_OK)
        fprintf(stderr, "bench_cuda_attn: %s\n", err.msg);
    rt_device_close(&d);
    return rt_exit_code(st);
}

#else

int main(void)
{
    fprintf(stderr, "bench_cuda_attn: built without CUDA\n");
    return 5;
}

#endif
