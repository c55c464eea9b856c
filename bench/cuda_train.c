/* Speed of training a student on the GPU: forward, loss, backward over micro-batches, and the optimiser's step.
 *
 *     bench_cuda_train [0.5b|1.5b [TOKENS LENGTH]]
 *
 * Each line: shape of the model (Qwen2.5), tokens of a micro-batch and the length of its documents, the loss (CE, or CE and KL over 64 ids), times of
 * a micro-batch's parts and of the optimiser (medians), tokens a second with one optimiser step for 524,288 tokens, and the part of 989 TFLOP/s by
 * 6 N + 6 L (nh hd) T operations a token (N: parameters that a token is multiplied with, head included; causal attention counted half).
 * Then, for one step, the time of each operation by itself.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/median.h"
#include "core/backend.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/rng.h"
#include "student/optimizer.h"

#ifdef RT_CUDA

enum { REPEATS = 7, K = 64, STEP_TOKENS = 524288 };

static const struct shape {
    const char *name;
    const char *config;
} shapes[] = {
    {"0.5b", "{\"model_type\": \"qwen2\", \"vocab_size\": 151936, \"hidden_size\": 896, \"intermediate_size\": 4864, \"num_hidden_layers\": 24, "
             "\"num_attention_heads\": 14, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, "
             "\"tie_word_embeddings\": true, \"rope_theta\": 1000000.0, \"torch_dtype\": \"bfloat16\"}"},
    {"1.5b", "{\"model_type\": \"qwen2\", \"vocab_size\": 151936, \"hidden_size\": 1536, \"intermediate_size\": 8960, \"num_hidden_layers\": 28, "
             "\"num_attention_heads\": 12, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, "
             "\"tie_word_embeddings\": true, \"rope_theta\": 1000000.0, \"torch_dtype\": \"bfloat16\"}"},
};

/* ---- the time of each operation ---- */
enum { MARKS = 4096, LABELS = 64 };
static struct {
    bool on;
    int n;
    struct rt_event *begin[MARKS], *end[MARKS];
    char label[MARKS][48];
} profile;

static void label_of(enum rt_op op, const char *name, const void *args, char out[48])
{
    if (op == RT_OP_linear_fwd) {
        const struct rt_linear_fwd_args *a = args;
        snprintf(out, 48, "%s %ld -> %ld", name, (long)a->K, (long)a->N);
    } else if (op == RT_OP_linear_dgrad) {
        const struct rt_linear_dgrad_args *a = args;
        snprintf(out, 48, "%s %ld <- %ld", name, (long)a->K, (long)a->N);
    } else if (op == RT_OP_linear_wgrad) {
        const struct rt_linear_wgrad_args *a = args;
        snprintf(out, 48, "%s %ld x %ld%s", name, (long)a->N, (long)a->K, a->db != NULL ? " + bias" : "");
    } else {
        snprintf(out, 48, "%s", name);
    }
}

#define WRAP(op) \
    static enum rt_status wrap_##op(struct rt_dev *dev, struct rt_queue *q, const struct rt_##op##_args *a, struct rt_err *err) \
    { \
        const bool on = profile.on && profile.n < MARKS; \
        const int i = profile.n; \
        enum rt_status st = RT_OK; \
        if (on) { \
            profile.n++; \
            label_of(RT_OP_##op, #op, a, profile.label[i]); \
            RT_TRY(rt_backend_cuda.event_record(dev, q, profile.begin[i], err)); \
        } \
        RT_TRY(rt_backend_cuda.op(dev, q, a, err)); \
        if (on) \
            RT_TRY(rt_backend_cuda.event_record(dev, q, profile.end[i], err)); \
    out: \
        return st; \
    }
RT_BACKEND_OPS(WRAP)

static const struct rt_backend *watched(void)
{
    static struct rt_backend be;
    be = rt_backend_cuda;
#define PUT(op) be.op = be.op != NULL ? wrap_##op : NULL;
    RT_BACKEND_OPS(PUT)
    return &be;
}

struct bench {
    struct rt_device d;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_arena weights, grads, moments, acts;
    struct rt_student *s;
    struct rt_optimizer opt;
    struct rt_event *at[5];
    int32_t *ids, *cu, *label, *top; /* ids, cu: host */
    float *logp;
    uint8_t *mask;
    double *row[2];
    void *d_final;
    int64_t n, len;
    struct rt_err err;
};

static void need(struct bench *b, enum rt_status st)
{
    if (st == RT_OK)
        return;
    fprintf(stderr, "bench_cuda_train: %s\n", b->err.msg);
    exit(rt_exit_code(st));
}

static void *alloc(struct bench *b, size_t bytes)
{
    void *p;
    need(b, b->d.be->alloc(b->d.dev, bytes, &p, &b->err));
    return p;
}

static void put(struct bench *b, void *to, const void *from, size_t bytes)
{
    need(b, rt_device_upload(&b->d, to, from, bytes, &b->err));
    need(b, rt_device_sync(&b->d, &b->err));
}

/* Random parameters: one block of numbers again and again; norms are ones. */
static void fill(struct bench *b)
{
    enum { BLOCK = 1 << 22 };
    static uint16_t host[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        host[i] = rt_f32_to_bf16(0.02f * (float)rt_rng_normal(1, 1, (uint64_t)i));
    char *block = rt_student_block(b->s);
    for (int64_t i = 0; i < b->p.elements; i += BLOCK)
        put(b, block + i * 2, host, (size_t)(b->p.elements - i < BLOCK ? b->p.elements - i : BLOCK) * 2);
    for (int i = 0; i < 8192; i++)
        host[i] = rt_f32_to_bf16(1.0f);
    for (int i = 0; i < b->p.n; i++)
        if (b->p.at[i].kind == RT_PARAM_NORM)
            put(b, block + b->p.at[i].offset * 2, host, (size_t)b->p.at[i].cols * 2);
}

static void open_model(struct bench *b, const struct shape *s, int64_t n, int64_t len)
{
    const struct rt_adamw o = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = 1.0, .decay_matrices_only = true};
    struct rt_err *err = &b->err;
    b->n = n;
    b->len = len;
    need(b, rt_student_config_parse(s->config, strlen(s->config), s->name, &b->c, err));
    need(b, rt_params_create(&b->c, &b->p, err));
    need(b, rt_device_arena(&b->d, rt_student_weight_bytes(&b->c, &b->p, len, 2), "weights", &b->weights, err));
    need(b, rt_device_arena(&b->d, rt_params_bytes(&b->p, 2), "gradients", &b->grads, err));
    need(b, rt_device_arena(&b->d, rt_optimizer_bytes(&b->p, 2, false), "moments", &b->moments, err));
    need(b, rt_device_arena(&b->d, rt_student_activation_bytes(&b->c, n, RT_KEEP_MORE, 2), "activations", &b->acts, err));
    need(b, rt_student_create(&b->d, &b->c, &b->p, len, &b->weights, &b->s, err));
    need(b, rt_student_attach_grads(b->s, &b->grads, err));
    need(b, rt_optimizer_init(&b->opt, b->s, &o, &b->moments, err));
    fill(b);
    for (int i = 0; i < 5; i++)
        need(b, b->d.be->event_create(b->d.dev, &b->at[i], err));
}

static void make_batch(struct bench *b)
{
    const size_t n = (size_t)b->n;
    int32_t *top;
    float *logp;
    need(b, rt_alloc(n, sizeof *b->ids, "ids", &b->ids, &b->err));
    need(b, rt_alloc(n / (size_t)b->len + 1, sizeof *b->cu, "documents", &b->cu, &b->err));
    need(b, rt_alloc(n * K, sizeof *top, "rows", &top, &b->err));
    need(b, rt_alloc(n * K, sizeof *logp, "rows", &logp, &b->err));
    for (size_t i = 0; i < n; i++)
        b->ids[i] = (int32_t)(rt_rng_u64(2, 1, i) % 151000);
    for (int64_t i = 0; i <= b->n / b->len; i++)
        b->cu[i] = (int32_t)(i * b->len);
    for (size_t i = 0; i < n * K; i++) {
        top[i] = (int32_t)((rt_rng_u64(2, 2, i / K) + i % K * 2039) % 151000);
        logp[i] = -2.0f - 0.1f * (float)(i % K);
    }
    b->label = alloc(b, n * sizeof *b->label);
    b->top = alloc(b, n * K * sizeof *top);
    b->logp = alloc(b, n * K * sizeof *logp);
    b->mask = alloc(b, n);
    b->row[0] = alloc(b, n * sizeof(double));
    b->row[1] = alloc(b, n * sizeof(double));
    b->d_final = alloc(b, n * (size_t)b->c.hidden * 2);
    put(b, b->label, b->ids, n * sizeof *b->ids);
    put(b, b->top, top, n * K * sizeof *top);
    put(b, b->logp, logp, n * K * sizeof *logp);
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)logp)[i] = 1;
    put(b, b->mask, logp, n);
    rt_free(top);
    rt_free(logp);
}

static void mark(struct bench *b, int i)
{
    need(b, b->d.be->event_record(b->d.dev, b->d.q, b->at[i], &b->err));
}

/* t[0..3]: forward, loss, backward, optimiser. */
static void one_step(struct bench *b, bool kl, double t[4])
{
    struct rt_step_report report;
    const struct rt_student_batch batch = {b->ids, b->cu, b->n, b->n / b->len};
    mark(b, 0);
    need(b, rt_student_forward(b->s, &batch, RT_KEEP_MORE, &b->acts, &b->err));
    mark(b, 1);
    const struct rt_student_head head = rt_student_head(b->s);
    need(b, RT_OP(&b->d, head_loss, &b->err, .x = rt_student_hidden(b->s, RT_LAYER_FINAL), .w = head.w, .dx = b->d_final, .dw = head.dw, .n = b->n, .H = head.H,
                  .V = head.V, .label = b->label, .k = kl ? K : 0, .top_ids = b->top, .top_logp = b->logp, .kl_mask = kl ? b->mask : NULL, .tail = RT_TAIL_BUCKET,
                  .w_ce = 1.0 / STEP_TOKENS, .w_kl = kl ? 1.0 / STEP_TOKENS : 0, .T = 1, .ce = b->row[0], .kl = b->row[1]));
    mark(b, 2);
    need(b, rt_student_backward(b->s, b->d_final, NULL, 0, &b->err));
    mark(b, 3);
    need(b, rt_optimizer_step(&b->opt, 1e-6, 1, &report, &b->err));
    mark(b, 4);
    for (int i = 0; i < 4; i++)
        need(b, b->d.be->event_elapsed(b->d.dev, b->at[i], b->at[i + 1], &t[i], &b->err));
    if (report.skipped)
        need(b, rt_fail(&b->err, RT_NUMERIC, "the norm of the gradients is not finite"));
}

static void measure(struct bench *b, const char *name, bool kl)
{
    double t[4][REPEATS], one[4], median[4];
    for (int i = -2; i < REPEATS; i++) {
        one_step(b, kl, one);
        for (int j = 0; j < 4 && i >= 0; j++)
            t[j][i] = one[j];
    }
    for (int j = 0; j < 4; j++) {
        qsort(t[j], REPEATS, sizeof t[j][0], bench_by_value);
        median[j] = t[j][REPEATS / 2];
    }
    const double micro = median[0] + median[1] + median[2], per_token = micro / (double)b->n + median[3] / STEP_TOKENS;
    const double flop = 6.0 * (double)b->p.matmul + 6.0 * b->c.layers * (double)b->c.heads * b->c.head_dim * (double)b->len;
    printf("%s %6ld x %-6ld %-8s forward %7.2f ms, loss %7.2f, backward %7.2f, optimiser %6.2f: %9.0f tokens/s, %.1f%%\n", name, (long)b->n, (long)b->len,
           kl ? "CE + KL" : "CE", median[0] * 1e3, median[1] * 1e3, median[2] * 1e3, median[3] * 1e3, 1 / per_token, 100 * flop / per_token / 989e12);
    fflush(stdout);
}

struct line {
    const char *label;
    double seconds;
    int calls;
};

static int by_seconds(const void *a, const void *b)
{
    const struct line *x = a, *y = b;
    return (x->seconds < y->seconds) - (x->seconds > y->seconds);
}

static void print_profile(struct bench *b, const char *name)
{
    struct line lines[LABELS] = {0};
    double t[4], all = 0;
    int n = 0;
    profile.n = 0;
    profile.on = true;
    one_step(b, true, t);
    profile.on = false;
    for (int i = 0; i < profile.n; i++) {
        double seconds;
        int at = 0;
        need(b, b->d.be->event_elapsed(b->d.dev, profile.begin[i], profile.end[i], &seconds, &b->err));
        while (at < n && strcmp(lines[at].label, profile.label[i]) != 0)
            at++;
        if (at == LABELS)
            continue;
        n = at == n ? n + 1 : n;
        lines[at].label = profile.label[i];
        lines[at].seconds += seconds;
        lines[at].calls++;
        all += seconds;
    }
    qsort(lines, (size_t)n, sizeof *lines, by_seconds);
    printf("  %s, one step of %.2f ms, operations %.2f ms\n", name, (t[0] + t[1] + t[2] + t[3]) * 1e3, all * 1e3);
    for (int i = 0; i < n; i++)
        printf("  %-40s %4d calls %9.3f ms %9.1f us each %5.1f%%\n", lines[i].label, lines[i].calls, lines[i].seconds * 1e3,
               lines[i].seconds * 1e6 / lines[i].calls, 100 * lines[i].seconds / all);
    fflush(stdout);
}

static void close_model(struct bench *b)
{
    void *const dev[] = {b->label, b->top, b->logp, b->mask, b->row[0], b->row[1], b->d_final};
    for (size_t i = 0; i < sizeof dev / sizeof dev[0]; i++)
        b->d.be->free(b->d.dev, dev[i]);
    for (int i = 0; i < 5; i++)
        b->d.be->event_free(b->d.dev, b->at[i]);
    rt_student_free(b->s);
    struct rt_arena *const arena[] = {&b->weights, &b->grads, &b->moments, &b->acts};
    for (int i = 0; i < 4; i++)
        rt_device_arena_free(&b->d, arena[i]);
    rt_params_free(&b->p);
    rt_student_config_free(&b->c);
    rt_free(b->ids);
    rt_free(b->cu);
}

static void run(const struct rt_device *d, const struct shape *s, int64_t n, int64_t len)
{
    struct bench b = {.d = *d};
    open_model(&b, s, n, len);
    make_batch(&b);
    measure(&b, s->name, false);
    measure(&b, s->name, true);
    if (len <= 1024)
        print_profile(&b, s->name);
    close_model(&b);
}

int main(int argc, char **argv)
{
    struct rt_device d;
    struct rt_err err = {0};
    char why[128];
    if (!rt_backend_cuda.available(why, sizeof why)) {
        fprintf(stderr, "bench_cuda_train: %s\n", why);
        return 5;
    }
    if (rt_device_open(&rt_backend_cuda, &(struct rt_dev_options){0}, &d, &err) != RT_OK) {
        fprintf(stderr, "bench_cuda_train: %s\n", err.msg);
        return rt_exit_code(err.status);
    }
    d.be->set_scratch(d.dev, (uint64_t)13 << 29);
    d.be = watched();
    for (int i = 0; i < MARKS; i++)
        if (d.be->event_create(d.dev, &profile.begin[i], &err) != RT_OK || d.be->event_create(d.dev, &profile.end[i], &err) != RT_OK) {
            fprintf(stderr, "bench_cuda_train: %s\n", err.msg);
            return rt_exit_code(err.status);
        }
    printf("%s\n", d.be->describe(d.dev));
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        if (argc > 1 && strcmp(argv[1], shapes[i].name) != 0)
            continue;
        if (argc > 3) {
            run(&d, &shapes[i], atol(argv[2]), atol(argv[3]));
        } else {
            run(&d, &shapes[i], 16384, 1024);
            run(&d, &shapes[i], 16384, 8192);
        }
    }
    rt_device_close(&d);
    return 0;
}
#else
int main(void)
{
    fprintf(stderr, "bench_cuda_train: built without CUDA\n");
    return 5;
}
#endif
