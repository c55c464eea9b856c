/* Training speed of a student on the CPU beside the same multiplications by plain OpenBLAS.
 *
 *     bench_student_sgemm --model 10m|135m|FILE [options]          --help lists them
 *
 * Ours is one optimiser step: forward, cross-entropy and KL over the stored top k (bucket tail, T 2), backward, AdamW, with random
 * parameters and rows. The plain side runs the products of that step at their real shapes: forward, both gradients of each matrix,
 * causal attention forward and backward, the head's three products. It does no norm, loss, activation, optimiser.
 */
#include <math.h>

#include "bench/bench.h"
#include "bench/command.h"
#include "core/io.h"
#include "student/optimizer.h"

struct values {
    const char *model;
    int64_t sequences, length, pairs, threads, top_k;
    bool json, list, help, no_plain;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"model", RT_OPT_STRING, V(model), NULL, 0, 0, NULL, "10m|135m|FILE", "geometry: 10 million parameters, SmolLM2-135M, or a config.json", true, false},
    {"sequences", RT_OPT_INT, V(sequences), "4", 1, 1e6, NULL, "N", "sequences of a step", false, false},
    {"length", RT_OPT_INT, V(length), "512", 2, 1e6, NULL, "N", "tokens of a sequence", false, false},
    {"pairs", RT_OPT_INT, V(pairs), "7", 1, BENCH_PAIRS, NULL, "N", "pairs of timings", false, false},
    {"threads", RT_OPT_INT, V(threads), "2", 0, 1024, NULL, "N", "threads of both sides, 0 takes all", false, false},
    {"top-k", RT_OPT_INT, V(top_k), "64", 0, 4096, NULL, "N", "teacher's entries of a row, 0: cross-entropy alone", false, false},
    {"alone", RT_OPT_FLAG, V(no_plain), NULL, 0, 0, NULL, NULL, "ours only, for a profiler", false, false},
    {"list", RT_OPT_FLAG, V(list), NULL, 0, 0, NULL, NULL, "also print the speed of each plain product", false, false},
    {"json", RT_OPT_FLAG, V(json), NULL, 0, 0, NULL, NULL, "one JSON object a case", false, false},
    {"help", RT_OPT_FLAG, V(help), NULL, 0, 0, NULL, NULL, "this text", false, false},
    {0},
};

static const char config_10m[] =
    "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":8192,\"hidden_size\":256,\"intermediate_size\":1024,"
    "\"num_hidden_layers\":8,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":64,\"hidden_act\":\"silu\","
    "\"max_position_embeddings\":8192,\"rms_norm_eps\":1e-05,\"rope_theta\":10000.0,\"tie_word_embeddings\":true,\"initializer_range\":0.02,"
    "\"torch_dtype\":\"bfloat16\"}";
static const char config_135m[] =
    "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":49152,\"hidden_size\":576,\"intermediate_size\":1536,"
    "\"num_hidden_layers\":30,\"num_attention_heads\":9,\"num_key_value_heads\":3,\"head_dim\":64,\"hidden_act\":\"silu\","
    "\"max_position_embeddings\":8192,\"rms_norm_eps\":1e-05,\"rope_theta\":100000.0,\"tie_word_embeddings\":true,\"initializer_range\":0.02,"
    "\"torch_dtype\":\"bfloat16\"}";

struct run {
    struct values v;
    struct rt_device d;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_student *s;
    struct rt_optimizer opt;
    struct rt_arena weights, grads, moments, acts, rows;
    int32_t *ids, *cu;          /* host */
    int32_t *label, *top_ids;   /* device */
    float *logp;
    uint8_t *mask;
    void *d_final;
    double *ce, *kl;            /* host */
};

static void linear(struct bench_list *l, const char *name, int64_t n, int64_t out, int64_t in)
{
    bench_add(l, name, BENCH_NT, n, out, in, 1, true);  /* forward */
    bench_add(l, name, BENCH_NN, n, in, out, 1, true);  /* gradient at the input */
    bench_add(l, name, BENCH_TN, out, in, n, 1, false); /* gradient of the weight */
}

static void products(const struct run *r, struct bench_list *l)
{
    const struct rt_student_config *c = &r->c;
    const int64_t n = r->v.sequences * r->v.length, H = c->hidden, q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    for (int i = 0; i < c->layers; i++) {
        linear(l, "qkv", n, q + 2 * kv, H);
        bench_add_causal(l, "attention", r->v.length, c->head_dim, c->head_dim, r->v.sequences * c->heads, true);
        linear(l, "o", n, H, q);
        linear(l, "gate, up", n, 2 * c->intermediate, H);
        linear(l, "down", n, H, c->intermediate);
    }
    for (int64_t at = 0; at < n; at += 1024) /* logits of a whole batch would not fit memory */
        linear(l, "head", rt_min64(1024, n - at), c->vocab_size, H);
}

static enum rt_status step(void *self, struct rt_err *err)
{
    struct run *r = self;
    const int64_t n = r->v.sequences * r->v.length;
    const struct rt_student_batch b = {.ids = r->ids, .cu_seqlens = r->cu, .n = n, .n_seq = r->v.sequences};
    const struct rt_student_head h = rt_student_head(r->s);
    const int k = (int)r->v.top_k;
    struct rt_step_report report;
    double loss = 0;
    enum rt_status st;
    RT_TRY(rt_student_zero_grads(r->s, err));
    RT_TRY(rt_student_forward(r->s, &b, RT_KEEP_ALL, &r->acts, err));
    RT_TRY(RT_OP(&r->d, head_loss, err, .x = rt_student_hidden(r->s, RT_LAYER_FINAL), .w = h.w, .dx = r->d_final, .dw = h.dw, .n = n,
                 .H = h.H, .V = h.V, .label = r->label, .k = k, .top_ids = k > 0 ? r->top_ids : NULL, .top_logp = k > 0 ? r->logp : NULL,
                 .kl_mask = k > 0 ? r->mask : NULL, .tail = RT_TAIL_BUCKET, .w_ce = 0.5 / (double)n, .w_kl = k > 0 ? 0.5 / (double)n : 0,
                 .T = 2, .ce = r->ce, .kl = r->kl));
    RT_TRY(rt_student_backward(r->s, r->d_final, NULL, 0, false, err));
    RT_TRY(rt_optimizer_step(&r->opt, 1e-4, 1.0, &report, err));
    for (int64_t i = 0; i < n; i++)
        loss += r->ce[i] + r->kl[i];
    if (!isfinite(loss) || report.skipped)
        RT_FAIL(err, NUMERIC, "the loss or the gradient is not finite");
out:
    return st;
}

static enum rt_status make_rows(struct run *r, struct rt_err *err)
{
    const int64_t n = r->v.sequences * r->v.length, V = r->c.vocab_size, k = r->v.top_k;
    const size_t row = rt_arena_round((size_t)n * 4), top = rt_arena_round((size_t)(n * k) * 4), dx = rt_arena_round((size_t)(n * r->c.hidden) * 4);
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)n, sizeof *r->ids, "ids", &r->ids, err));
    RT_TRY(rt_alloc((size_t)r->v.sequences + 1, sizeof *r->cu, "sequence ends", &r->cu, err));
    RT_TRY(rt_alloc((size_t)n, sizeof *r->ce, "losses", &r->ce, err));
    RT_TRY(rt_alloc((size_t)n, sizeof *r->kl, "losses", &r->kl, err));
    RT_TRY(rt_device_arena(&r->d, 2 * row + 2 * top + dx, "rows", &r->rows, err));
    RT_TRY(rt_arena_alloc(&r->rows, (size_t)n * 4, &r->label, err));
    RT_TRY(rt_arena_alloc(&r->rows, (size_t)n, &r->mask, err));
    RT_TRY(rt_arena_alloc(&r->rows, (size_t)(n * k) * 4, &r->top_ids, err));
    RT_TRY(rt_arena_alloc(&r->rows, (size_t)(n * k) * 4, &r->logp, err));
    RT_TRY(rt_arena_alloc(&r->rows, (size_t)(n * r->c.hidden) * 4, &r->d_final, err));
    memset(r->mask, 1, (size_t)n);
    for (int64_t i = 0; i <= r->v.sequences; i++)
        r->cu[i] = (int32_t)(i * r->v.length);
    for (int64_t i = 0; i < n; i++) {
        r->ids[i] = (int32_t)(rt_rng_u64(1, 2, (uint64_t)i) % (uint64_t)V);
        r->label[i] = (int32_t)(rt_rng_u64(1, 3, (uint64_t)i) % (uint64_t)V);
        const int64_t first = (int64_t)(rt_rng_u64(1, 4, (uint64_t)i) % (uint64_t)V), stride = V / k > 0 && k > 0 ? V / k : 1;
        for (int64_t j = 0; j < k; j++) { /* distinct ids, geometric masses with 5 % left for the tail */
            r->top_ids[i * k + j] = (int32_t)((first + j * stride) % V);
            r->logp[i * k + j] = (float)log(0.95 * (1 - 0.9) * pow(0.9, (double)j));
        }
    }
out:
    return st;
}

static enum rt_status prepare(struct run *r, struct rt_err *err)
{
    const struct rt_adamw adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = 1.0};
    const int64_t n = r->v.sequences * r->v.length;
    enum rt_status st;
    RT_TRY(rt_device_open(&rt_backend_cpu, &(struct rt_dev_options){.threads = (int)r->v.threads}, &r->d, err));
    const size_t act = rt_device_act_size(&r->d);
    const char *text = strcmp(r->v.model, "10m") == 0 ? config_10m : strcmp(r->v.model, "135m") == 0 ? config_135m : NULL;
    if (text != NULL)
        RT_TRY(rt_student_config_parse(text, strlen(text), r->v.model, &r->c, err));
    else
        RT_TRY(rt_student_config_load(r->v.model, &r->c, err));
    if (r->v.top_k > r->c.vocab_size)
        RT_FAIL(err, USAGE, "--top-k %ld of %ld ids", (long)r->v.top_k, (long)r->c.vocab_size);
    RT_TRY(rt_params_create(&r->c, &r->p, err));
    RT_TRY(rt_device_arena(&r->d, rt_student_weight_bytes(&r->c, &r->p, r->v.length, act), "weights", &r->weights, err));
    RT_TRY(rt_device_arena(&r->d, rt_arena_round(rt_params_bytes(&r->p, act)), "gradients", &r->grads, err));
    RT_TRY(rt_device_arena(&r->d, rt_arena_round(rt_optimizer_bytes(&r->p, act, false)) + 128, "moments", &r->moments, err));
    RT_TRY(rt_device_arena(&r->d, rt_student_activation_bytes(&r->c, n, RT_KEEP_ALL, act), "activations", &r->acts, err));
    RT_TRY(rt_student_create(&r->d, &r->c, &r->p, r->v.length, &r->weights, &r->s, err));
    RT_TRY(rt_student_init(r->s, 1, err));
    RT_TRY(rt_student_attach_grads(r->s, &r->grads, err));
    RT_TRY(rt_optimizer_init(&r->opt, r->s, &adamw, &r->moments, err));
    RT_TRY(make_rows(r, err));
out:
    return st;
}

static void tear_down(struct run *r)
{
    struct rt_arena *const arenas[] = {&r->weights, &r->grads, &r->moments, &r->acts, &r->rows};
    void *const host[] = {r->ids, r->cu, r->ce, r->kl};
    rt_student_free(r->s);
    for (size_t i = 0; i < sizeof arenas / sizeof *arenas; i++)
        rt_device_arena_free(&r->d, arenas[i]);
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        rt_free(host[i]);
    rt_params_free(&r->p);
    rt_student_config_free(&r->c);
    rt_device_close(&r->d);
}

int main(int argc, char **argv)
{
    struct run r = {.s = NULL};
    struct bench_list l = {.n = 0};
    struct bench_result result = {.pairs = 0};
    struct rt_err err = {0};
    char what[512];
    enum rt_status st = bench_command(options, argc, argv, &r.v, &r.v.help, NULL, &err);
    if (st == RT_OK && r.v.help)
        return 0;
    if (st == RT_OK)
        st = prepare(&r, &err);
    for (int64_t i = 0; i < r.v.pairs && st == RT_OK && r.v.no_plain; i++) {
        const double t0 = rt_now();
        st = step(&r, &err);
        printf("%.3f s\n", rt_now() - t0);
    }
    if (st == RT_OK && !r.v.no_plain) {
        products(&r, &l);
        st = bench_calibrate(&l, rt_max64(1, r.v.threads > 0 ? r.v.threads : rt_cpu_count()), (size_t)512 << 20, &err);
        if (st == RT_OK)
            st = bench_pairs(&l, (int)r.v.pairs, step, &r, &result, &err);
    }
    if (st != RT_OK)
        bench_fatal("bench_student_sgemm", &err);
    if (!r.v.no_plain) {
        snprintf(what, sizeof what, "training, %s (%.1fM parameters), %ld x %ld tokens a step, top %ld", r.v.model, (double)r.p.count * 1e-6,
                 (long)r.v.sequences, (long)r.v.length, (long)r.v.top_k);
        bench_report(r.v.json, argc, argv, what, &l, &result, (double)(r.v.sequences * r.v.length));
        if (r.v.list)
            bench_print_list(&l);
        bench_list_free(&l);
    }
    tear_down(&r);
    return 0;
}
