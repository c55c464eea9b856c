/* Speed of the student's own operations on the GPU, at the geometries of Qwen2.5, beside a plain device copy.
 *
 *     bench_cuda_student
 *
 * Each line: the operation, its time (median of 15, by events), the bytes that it has to read and write once with their rate, absolutely and as a
 * share of the copy's; for losses of the head the rate of its three products (6 n H V) as a share of 990 TFLOP/s.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/median.h"
#include "core/backend.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/rng.h"

#ifdef RT_CUDA
#include "core/cuda/loss.h"
#include "core/cuda/student_rows.h"

enum { N = 16384, REPEATS = 15, POSITIONS = 1024, LOSS_ROWS = 8192, K = 64 };
#define GIB ((size_t)1 << 30)
static const double peak = 990e12;

struct bench {
    struct rt_device d;
    struct rt_event *from, *to;
    char *a, *b, *c; /* 6 GiB, 6 GiB, 3 GiB of numbers */
    float *rstd, *cos, *sin, *logp;
    int32_t *pos, *ids, *label, *top;
    uint8_t *mask;
    double *row[4], copy_rate;
    struct rt_weight *w;
    int64_t H, I, V, n, tokens;
    int heads, head_dim, k, threads;
    enum rt_dtype moment;
    enum rt_dtype logits;
    bool norm, forward_only;
    double T;
    struct rt_err err;
};

static void need(struct bench *b, enum rt_status st)
{
    if (st == RT_OK)
        return;
    fprintf(stderr, "bench_cuda_student: %s\n", b->err.msg);
    exit(rt_exit_code(st));
}

static double timed(struct bench *b, enum rt_status (*run)(struct bench *b))
{
    const struct rt_backend *be = b->d.be;
    double t[REPEATS];
    for (int i = -3; i < REPEATS; i++) {
        double seconds = 0;
        need(b, be->event_record(b->d.dev, b->d.q, b->from, &b->err));
        need(b, run(b));
        need(b, be->event_record(b->d.dev, b->d.q, b->to, &b->err));
        need(b, be->event_elapsed(b->d.dev, b->from, b->to, &seconds, &b->err));
        if (i >= 0)
            t[i] = seconds;
    }
    qsort(t, REPEATS, sizeof *t, bench_by_value);
    return t[REPEATS / 2];
}

static void measure(struct bench *b, const char *name, double bytes, enum rt_status (*run)(struct bench *b))
{
    const double t = timed(b, run), rate = bytes / t;
    if (b->copy_rate == 0)
        b->copy_rate = rate;
    printf("%-48s %9.1f us %9.1f MB %8.0f GB/s  %4.0f%%\n", name, t * 1e6, bytes * 1e-6, rate * 1e-9, 100 * rate / b->copy_rate);
    fflush(stdout);
}

static enum rt_status copy(struct bench *b)
{
    return b->d.be->copy(b->d.dev, b->d.q, b->b, b->a, 2 * GIB, &b->err);
}

static enum rt_status norm_fwd(struct bench *b)
{
    return RT_OP(&b->d, norm_fwd, &b->err, .x = b->a, .add = b->a + GIB, .w = b->w, .sum = b->b, .y = b->b + GIB, .rstd = b->rstd, .n = b->tokens,
                 .cols = b->H, .eps = 1e-6f);
}

static enum rt_status norm_bwd(struct bench *b)
{
    return RT_OP(&b->d, norm_bwd, &b->err, .dy = b->a, .x = b->a + GIB, .w = b->w, .rstd = b->rstd, .dx = b->b, .dw = b->c, .n = b->tokens,
                 .cols = b->H, .accumulate = true);
}

static enum rt_status heads_fwd(struct bench *b)
{
    const int64_t ld = (b->heads + 4) * (int64_t)b->head_dim;
    return RT_OP(&b->d, headnorm_rope_fwd, &b->err, .x = b->a, .ldx = ld, .w = b->norm ? b->w : NULL, .y = b->norm ? b->b : b->a, .ldy = ld,
                 .rstd = b->norm ? b->rstd : NULL, .cos = b->cos, .sin = b->sin, .position = b->pos, .n = b->tokens, .heads = b->heads, .d = b->head_dim);
}

static enum rt_status heads_bwd(struct bench *b)
{
    const int64_t ld = (b->heads + 4) * (int64_t)b->head_dim;
    return RT_OP(&b->d, headnorm_rope_bwd, &b->err, .dy = b->a, .lddy = ld, .x = b->a + GIB, .ldx = ld, .w = b->norm ? b->w : NULL,
                 .rstd = b->norm ? b->rstd : NULL, .dx = b->norm ? b->b : b->a, .lddx = ld, .dw = b->norm ? b->c : NULL, .cos = b->cos, .sin = b->sin,
                 .position = b->pos, .n = b->tokens, .heads = b->heads, .d = b->head_dim);
}

static enum rt_status swiglu_bwd(struct bench *b)
{
    return RT_OP(&b->d, swiglu_bwd, &b->err, .gate = b->a, .up = b->a + b->I * 2, .ld = 2 * b->I, .dh = b->a + 2 * GIB, .dgate = b->b,
                 .dup = b->b + b->I * 2, .h = b->b + 2 * GIB, .n = N, .I = b->I);
}

static enum rt_status embed_bwd(struct bench *b)
{
    return RT_OP(&b->d, embed_bwd, &b->err, .ids = b->ids, .dy = b->a, .dtable = b->b, .n = N, .cols = b->H, .rows = b->V);
}

static enum rt_status sumsq(struct bench *b)
{
    double sum;
    return RT_OP(&b->d, sumsq, &b->err, .x = b->a, .n = b->n, .out = &sum);
}

static enum rt_status adamw(struct bench *b)
{
    static const int64_t ends[] = {1 << 20, (1 << 20) + 896};
    return RT_OP(&b->d, adamw, &b->err, .p = b->a, .low = b->a + 2 * GIB, .grad = b->c, .m = b->b, .v = b->b + 3 * GIB, .moment = b->moment, .n = b->n,
                 .step = 10, .lr = 1e-5, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .grad_scale = 1, .decay_end = ends, .n_decay = 2);
}

static enum rt_status feature(struct bench *b)
{
    return RT_OP(&b->d, feature_loss, &b->err, .a = b->a, .b = (float *)(void *)b->b, .da = b->c, .loss = b->row[0], .w = 1, .n = N, .cols = b->H,
                 .cosine = true);
}

static struct rt_head_loss_args loss_args(const struct bench *b)
{
    const bool back = !b->forward_only;
    return (struct rt_head_loss_args){.x = b->a, .w = b->w, .dx = back ? b->b : NULL, .dw = back ? b->b + GIB : NULL, .n = LOSS_ROWS, .H = b->H, .V = b->V,
                                      .label = b->label, .k = b->k, .top_ids = b->top, .top_logp = b->logp, .kl_mask = b->k > 0 ? b->mask : NULL,
                                      .tail = RT_TAIL_BUCKET, .w_ce = 1e-4, .w_kl = b->k > 0 ? 1e-4 : 0, .T = b->T, .ce = b->row[0], .kl = b->row[1],
                                      .teacher_mass = b->row[2], .student_mass = b->row[3], .hit = b->mask + LOSS_ROWS};
}

static enum rt_status head_loss(struct bench *b)
{
    const struct rt_head_loss_args a = loss_args(b);
    return rt_cuda_head_loss_as(b->d.dev, b->d.q, &a, b->logits, &b->err);
}

/* The row kernel alone, on what happens to lie there: 1024 rows. */
static enum rt_status loss_rows(struct bench *b)
{
    const struct rt_head_loss_args a = loss_args(b);
    const int64_t ldz = (b->V + 7) / 8 * 8;
    const struct rt_cuda_logits t = {.z = b->b, .dz = b->logits == RT_F32 ? b->a + GIB : b->b, .ldz = ldz, .row0 = 0, .rows = 1024, .type = b->logits, .threads = b->threads};
    return rt_cuda_loss_rows(b->d.q, &a, &t, &b->err);
}

static void measure_loss(struct bench *b, const char *name)
{
    const double t = timed(b, head_loss), flop = (b->forward_only ? 2.0 : 6.0) * LOSS_ROWS * (double)b->H * (double)b->V;
    printf("%-48s %9.1f us %9.2f us/row %7.1f TFLOP/s %4.0f%%\n", name, t * 1e6, t * 1e6 / LOSS_ROWS, flop / t * 1e-12, 100 * flop / t / peak);
    fflush(stdout);
}

/* ---- set up ---- */
static void *alloc(struct bench *b, size_t bytes)
{
    void *p;
    need(b, b->d.be->alloc(b->d.dev, bytes, &p, &b->err));
    return p;
}

static void *put(struct bench *b, const void *host, size_t bytes)
{
    void *p = alloc(b, bytes);
    need(b, rt_device_upload(&b->d, p, host, bytes, &b->err));
    need(b, rt_device_sync(&b->d, &b->err));
    return p;
}

static char *numbers(struct bench *b, size_t bytes, float scale)
{
    enum { BLOCK = 1 << 22 };
    static uint16_t host[BLOCK];
    char *p = alloc(b, bytes);
    for (int i = 0; i < BLOCK; i++)
        host[i] = rt_f32_to_bf16(scale * (float)rt_rng_normal(1, bytes, (uint64_t)i));
    for (size_t at = 0; at < bytes; at += sizeof host)
        need(b, rt_device_upload(&b->d, p + at, host, bytes - at < sizeof host ? bytes - at : sizeof host, &b->err));
    need(b, rt_device_sync(&b->d, &b->err));
    return p;
}

static void make_inputs(struct bench *b)
{
    static float f[LOSS_ROWS * K];
    static int32_t n[LOSS_ROWS * K];
    static uint8_t m[2 * LOSS_ROWS];
    b->a = numbers(b, 6 * GIB, 1.0f);
    b->b = numbers(b, 6 * GIB, 0.5f);
    b->c = numbers(b, 3 * GIB, 0.1f);
    for (int i = 0; i < POSITIONS * 64; i++)
        f[i] = cosf((float)i);
    b->cos = put(b, f, POSITIONS * 64 * sizeof *f);
    b->sin = put(b, f, POSITIONS * 64 * sizeof *f);
    for (int i = 0; i < N; i++)
        n[i] = i % POSITIONS;
    b->pos = put(b, n, N * sizeof *n);
    for (int i = 0; i < N; i++) /* frequencies of a text, roughly: 1/rank */
        n[i] = (int32_t)exp(rt_rng_uniform(2, 1, (uint64_t)i) * log(151900.0));
    b->ids = put(b, n, N * sizeof *n);
    for (int i = 0; i < N; i++)
        n[i] = (int32_t)(rt_rng_u64(2, 2, (uint64_t)i) % 151000);
    b->label = put(b, n, N * sizeof *n);
    for (int i = 0; i < LOSS_ROWS; i++)
        for (int j = 0; j < K; j++) {
            n[i * K + j] = (int32_t)((rt_rng_u64(2, 3, (uint64_t)i) + (uint64_t)j * 2039) % 151000);
            f[i * K + j] = -2.0f - 0.1f * (float)j;
        }
    b->top = put(b, n, sizeof n);
    b->logp = put(b, f, sizeof f);
    for (int i = 0; i < 4; i++)
        b->row[i] = alloc(b, N * sizeof(double));
    memset(m, 1, sizeof m);
    b->mask = put(b, m, sizeof m);
    for (int i = 0; i < LOSS_ROWS * K; i++)
        f[i] = 1;
    b->rstd = put(b, f, sizeof f);
}

static void weight(struct bench *b, int64_t rows, int64_t cols)
{
    b->d.be->weight_free(b->d.dev, b->w);
    need(b, b->d.be->weight_param(b->d.dev, b->c + GIB, rows, cols, &b->w, &b->err));
}

static void rows_of(struct bench *b, const char *name, int64_t H, int64_t I)
{
    char what[80];
    b->H = H;
    b->I = I;
    b->V = 151936;
    weight(b, 1, H);
    for (b->tokens = N / 2; b->tokens <= N; b->tokens *= 2) {
        snprintf(what, sizeof what, "%s add and norm %ld x %ld", name, (long)b->tokens, (long)H);
        measure(b, what, 8.0 * (double)b->tokens * (double)H, norm_fwd);
        snprintf(what, sizeof what, "%s norm backward %ld x %ld +=", name, (long)b->tokens, (long)H);
        measure(b, what, 8.0 * (double)b->tokens * (double)H, norm_bwd);
    }
    snprintf(what, sizeof what, "%s swiglu backward %d x %ld", name, N, (long)I);
    measure(b, what, 12.0 * N * (double)I, swiglu_bwd);
    snprintf(what, sizeof what, "%s embedding backward %d x %ld", name, N, (long)H);
    measure(b, what, 2.0 * N * (double)H, embed_bwd);
}

static void heads_of(struct bench *b, int heads, int head_dim, bool norm)
{
    char what[80];
    b->heads = heads;
    b->head_dim = head_dim;
    b->norm = norm;
    weight(b, 1, head_dim);
    for (b->tokens = N / 2; b->tokens <= N; b->tokens *= 2) {
        const double elements = (double)b->tokens * heads * head_dim;
        snprintf(what, sizeof what, "%ld x %d heads of %d forward%s", (long)b->tokens, heads, head_dim, norm ? ", norm" : "");
        measure(b, what, 4.0 * elements, heads_fwd);
        snprintf(what, sizeof what, "%ld x %d heads of %d backward%s", (long)b->tokens, heads, head_dim, norm ? ", norm" : "");
        measure(b, what, (norm ? 6.0 : 4.0) * elements, heads_bwd);
    }
}

static void losses_of(struct bench *b, int64_t H)
{
    char what[80];
    b->H = H;
    b->V = 151936;
    weight(b, b->V, H);
    for (int t = 0; t < 3; t++) {
        const enum rt_dtype types[] = {RT_BF16, RT_F16, RT_F32};
        b->logits = types[t];
        for (int i = 0; i < 4; i++) {
            b->k = i > 0 ? K : 0;
            b->T = i == 2 ? 2 : 1;
            b->forward_only = i == 3;
            snprintf(what, sizeof what, "head %ld, %s logits, %s%s", (long)H, rt_dtype_name(b->logits), i == 0 ? "CE" : i == 2 ? "CE + KL T 2" : "CE + KL",
                     i == 3 ? ", forward" : "");
            measure_loss(b, what);
            for (int threads = 0; i < 3 && threads <= 512; threads += 512) {
                b->threads = threads;
                snprintf(what, sizeof what, "  its row kernel on 1024 rows%s", threads > 0 ? ", one block a row" : "");
                measure(b, what, (b->logits == RT_F32 ? 6.0 : 4.0) * 1024 * (double)b->V, loss_rows);
            }
            b->threads = 0;
        }
    }
    b->forward_only = false;
}

int main(void)
{
    static struct bench b;
    char why[128];
    if (!rt_backend_cuda.available(why, sizeof why)) {
        fprintf(stderr, "bench_cuda_student: %s\n", why);
        return 5;
    }
    need(&b, rt_device_open(&rt_backend_cuda, &(struct rt_dev_options){0}, &b.d, &b.err));
    need(&b, b.d.be->event_create(b.d.dev, &b.from, &b.err));
    need(&b, b.d.be->event_create(b.d.dev, &b.to, &b.err));
    printf("%s\n", b.d.be->describe(b.d.dev));
    make_inputs(&b);
    measure(&b, "copy 2 GiB", 2.0 * 2 * GIB, copy);
    rows_of(&b, "0.5B", 896, 4864);
    rows_of(&b, "1.5B", 1536, 8960);
    rows_of(&b, "7B", 3584, 18944);
    heads_of(&b, 16, 64, false); /* q and k together: 0.5B, 1.5B, 7B */
    heads_of(&b, 14, 128, false);
    heads_of(&b, 32, 128, false);
    heads_of(&b, 16, 128, true);
    heads_of(&b, 32, 128, true);
    b.n = 1543714304;
    measure(&b, "sum of squares, 1.5 G", 2.0 * (double)b.n, sumsq);
    b.n = 494032768;
    b.moment = RT_F32;
    measure(&b, "AdamW 494 M, split, F32 moments", 26.0 * (double)b.n, adamw);
    b.moment = RT_BF16;
    measure(&b, "AdamW 494 M, split, BF16 moments", 18.0 * (double)b.n, adamw);
    b.H = 7168;
    measure(&b, "feature loss 16384 x 7168", 8.0 * N * 7168, feature);
    losses_of(&b, 896);
    losses_of(&b, 1536);
    losses_of(&b, 3584);
    b.d.be->weight_free(b.d.dev, b.w);
    rt_device_close(&b.d);
    return 0;
}
#else
int main(void)
{
    fprintf(stderr, "bench_cuda_student: built without CUDA\n");
    return 5;
}
#endif
