/* Speed of training a student on the GPU: forward, loss, backward over micro-batches, and the optimiser's step.
 *
 *     bench_cuda_train [options]          --help lists them; without --model, the table of the README
 *
 * Each line: shape of the model (Qwen2.5), tokens of a micro-batch and the length of its documents, the loss (CE, or CE and KL over 64 ids), what is kept
 * for backward (train --recompute), times of a micro-batch's parts and of the optimiser (medians), tokens a second with one optimiser step for 524,288
 * tokens, the part of 989 TFLOP/s by 6 N + 6 L (nh hd) T operations a token (N: parameters that a token is multiplied with, head included; causal attention
 * counted half), and the peak of the device's memory, all of the process.
 * With --profile, for one step, the time of each operation by itself.
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/command.h"
#include "bench/median.h"
#include "core/backend.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/options.h"
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
    {"7b", "{\"model_type\": \"qwen2\", \"vocab_size\": 152064, \"hidden_size\": 3584, \"intermediate_size\": 18944, \"num_hidden_layers\": 28, "
           "\"num_attention_heads\": 28, \"num_key_value_heads\": 4, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, "
           "\"tie_word_embeddings\": false, \"rope_theta\": 1000000.0, \"torch_dtype\": \"bfloat16\"}"},
};

struct values {
    const char *model, *moments, *tune;
    int64_t tokens, length, recompute, memory, scratch;
    double temperature;
    bool profile, ce_only, first, help;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"model", RT_OPT_CHOICE, V(model), NULL, 0, 0, "0.5b|1.5b|7b", "NAME", "geometry of Qwen2.5", false, false},
    {"tokens", RT_OPT_INT, V(tokens), "16384", 1, 1e7, NULL, "N", "tokens of a micro-batch", false, false},
    {"length", RT_OPT_INT, V(length), "1024", 1, 32768, NULL, "N", "tokens of a document", false, false},
    {"recompute", RT_OPT_INT, V(recompute), "0", 0, 3, NULL, "LEVEL", "what backward computes again (retort train --recompute)", false, false},
    {"moments", RT_OPT_CHOICE, V(moments), "f32", 0, 0, "f32|bf16", "TYPE", "AdamW's moments", false, false},
    {"kd-temperature", RT_OPT_FLOAT, V(temperature), "1", 0.01, 100, NULL, "T", "of the KL", false, false},
    {"gpu-memory", RT_OPT_BYTES, V(memory), "0", 0, 0, NULL, "80G", "act as if the card had this much: the rest is taken first; 0: all there is", false, false},
    {"scratch", RT_OPT_BYTES, V(scratch), "6656M", 0, 0, NULL, "BYTES", "what operations may take for themselves", false, false},
    {"tune", RT_OPT_STRING, V(tune), NULL, 0, 0, NULL, "FILE", "measured products, kept in FILE; default: in memory", false, false},
    {"first-choices", RT_OPT_FLAG, V(first), NULL, 0, 0, NULL, NULL, "products are not measured: the library's first choices", false, false},
    {"ce-only", RT_OPT_FLAG, V(ce_only), NULL, 0, 0, NULL, NULL, "leave out the line with KL", false, false},
    {"profile", RT_OPT_FLAG, V(profile), NULL, 0, 0, NULL, NULL, "then the time of each operation", false, false},
    {"help", RT_OPT_FLAG, V(help), NULL, 0, 0, NULL, NULL, "this text", false, false},
    {0},
};

/* The table of the README. Batches of 8 x 2048 are cut so that they stay within half of what transformers takes for them (42.5 and 75.1 GiB). */
static const struct values table[] = {
    {.model = "0.5b", .tokens = 16384, .length = 1024, .profile = true},
    {.model = "0.5b", .tokens = 16384, .length = 8192},
    {.model = "0.5b", .tokens = 8192, .length = 2048, .temperature = 2, .scratch = (int64_t)3 << 30},
    {.model = "1.5b", .tokens = 16384, .length = 1024, .profile = true},
    {.model = "1.5b", .tokens = 16384, .length = 8192},
    {.model = "1.5b", .tokens = 8192, .length = 2048, .recompute = 1, .temperature = 2, .scratch = (int64_t)3 << 30},
    {.model = "7b", .tokens = 16384, .length = 1024, .recompute = 1, .moments = "bf16", .profile = true},
    {.model = "7b", .tokens = 8192, .length = 8192, .recompute = 3, .moments = "bf16", .memory = (int64_t)79 << 30, .scratch = (int64_t)1 << 30},
};

/* ---- the time of each operation ---- */
enum { MARKS = 2048, LABELS = 64 };
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
    } else if (op == RT_OP_gated_fwd) {
        const struct rt_gated_fwd_args *a = args;
        snprintf(out, 48, "%s %ld -> 2 x %ld%s", name, (long)a->K, (long)a->I, a->kept ? "" : ", not kept");
    } else if (op == RT_OP_gated_bwd) {
        const struct rt_gated_bwd_args *a = args;
        snprintf(out, 48, "%s %ld <- %ld%s", name, (long)a->I, (long)a->N, a->h != NULL ? ", h again" : "");
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
    struct values v;
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
    void *d_final, *ballast;
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

static struct rt_dev_memory memory(struct bench *b)
{
    struct rt_dev_memory m;
    need(b, b->d.be->memory(b->d.dev, &m, &b->err));
    return m;
}

static void open_device(struct bench *b)
{
    char note[256] = "";
    need(b, rt_device_open(&rt_backend_cuda, &(struct rt_dev_options){0}, &b->d, &b->err));
    b->d.be->set_scratch(b->d.dev, (uint64_t)b->v.scratch);
    if (!b->v.first)
        need(b, b->d.be->tune(b->d.dev, b->v.tune, note, sizeof note, &b->err));
    if (note[0] != 0)
        fprintf(stderr, "bench_cuda_train: %s\n", note);
    b->d.be = watched();
    for (int i = 0; i < MARKS; i++) {
        need(b, b->d.be->event_create(b->d.dev, &profile.begin[i], &b->err));
        need(b, b->d.be->event_create(b->d.dev, &profile.end[i], &b->err));
    }
    const struct rt_dev_memory m = memory(b);
    if (b->v.memory > 0 && m.total > (uint64_t)b->v.memory)
        b->ballast = alloc(b, m.total - (uint64_t)b->v.memory);
}

static void close_device(struct bench *b)
{
    for (int i = 0; i < MARKS; i++) {
        b->d.be->event_free(b->d.dev, profile.begin[i]);
        b->d.be->event_free(b->d.dev, profile.end[i]);
    }
    b->d.be->free(b->d.dev, b->ballast);
    rt_device_close(&b->d);
}

static void open_model(struct bench *b, const struct shape *s)
{
    const bool bf16 = strcmp(b->v.moments, "bf16") == 0;
    const struct rt_adamw o = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = 1.0, .decay_matrices_only = true, .bf16_moments = bf16};
    struct rt_err *err = &b->err;
    b->n = b->v.tokens;
    b->len = b->v.length;
    need(b, rt_student_config_parse(s->config, strlen(s->config), s->name, &b->c, err));
    need(b, rt_params_create(&b->c, &b->p, err));
    need(b, rt_device_arena(&b->d, rt_student_weight_bytes(&b->c, &b->p, b->len, 2), "weights", &b->weights, err));
    need(b, rt_device_arena(&b->d, rt_params_bytes(&b->p, 2), "gradients", &b->grads, err));
    need(b, rt_device_arena(&b->d, rt_optimizer_bytes(&b->p, 2, bf16), "moments", &b->moments, err));
    need(b, rt_device_arena(&b->d, rt_student_activation_bytes(&b->c, b->n, rt_student_recompute((int)b->v.recompute), 2), "activations", &b->acts, err));
    need(b, rt_student_create(&b->d, &b->c, &b->p, b->len, &b->weights, &b->s, err));
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
    need(b, rt_student_forward(b->s, &batch, rt_student_recompute((int)b->v.recompute), &b->acts, &b->err));
    mark(b, 1);
    const struct rt_student_head head = rt_student_head(b->s);
    need(b, RT_OP(&b->d, head_loss, &b->err, .x = rt_student_hidden(b->s, RT_LAYER_FINAL), .w = head.w, .dx = b->d_final, .dw = head.dw, .n = b->n, .H = head.H,
                  .V = head.V, .label = b->label, .k = kl ? K : 0, .top_ids = b->top, .top_logp = b->logp, .kl_mask = kl ? b->mask : NULL, .tail = RT_TAIL_BUCKET,
                  .w_ce = 1.0 / STEP_TOKENS, .w_kl = kl ? 1.0 / STEP_TOKENS : 0, .T = kl ? b->v.temperature : 1, .ce = b->row[0], .kl = b->row[1]));
    mark(b, 2);
    need(b, rt_student_backward(b->s, b->d_final, NULL, 0, false, &b->err));
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
    const struct rt_dev_memory m = memory(b);
    char loss[32] = "CE";
    if (kl)
        snprintf(loss, sizeof loss, "CE + KL T %g", b->v.temperature);
    printf("%-4s %6ld x %-6ld %-11s recompute %d forward %7.2f ms, loss %7.2f, backward %7.2f, optimiser %6.2f: %9.0f tokens/s, %.1f%%, peak %.1f GiB\n", name,
           (long)b->n, (long)b->len, loss, (int)b->v.recompute, median[0] * 1e3, median[1] * 1e3, median[2] * 1e3, median[3] * 1e3, 1 / per_token,
           100 * flop / per_token / 989e12, (double)(m.total - m.free - (b->ballast != NULL ? m.total - (uint64_t)b->v.memory : 0)) / (1 << 30));
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

static void run(const struct values *v)
{
    struct bench b = {.v = *v};
    const struct shape *s = shapes;
    while (strcmp(s->name, v->model) != 0)
        s++;
    b.v.moments = v->moments != NULL ? v->moments : "f32";
    b.v.scratch = v->scratch > 0 ? v->scratch : (int64_t)13 << 29;
    b.v.temperature = v->temperature > 0 ? v->temperature : 1;
    open_device(&b);
    open_model(&b, s);
    make_batch(&b);
    measure(&b, s->name, false);
    if (!v->ce_only)
        measure(&b, s->name, true);
    if (v->profile)
        print_profile(&b, s->name);
    close_model(&b);
    close_device(&b);
}

int main(int argc, char **argv)
{
    struct values v = {0};
    struct rt_err err = {0};
    char why[128];
    enum rt_status st = bench_command(options, argc, argv, &v, &v.help, NULL, &err);
    if (st == RT_OK && v.help)
        return 0;
    if (st == RT_OK && !rt_backend_cuda.available(why, sizeof why))
        st = rt_fail(&err, RT_DEVICE, "%s", why);
    if (st != RT_OK)
        goto done;
    if (v.model != NULL)
        run(&v);
    for (size_t i = 0; v.model == NULL && i < sizeof table / sizeof table[0]; i++)
        run(&table[i]);
done:
    if (st != RT_OK)
        fprintf(stderr, "bench_cuda_train: %s\n", err.msg);
    return rt_exit_code(st);
}
#else
int main(void)
{
    fprintf(stderr, "bench_cuda_train: built without CUDA\n");
    return 5;
}
#endif
