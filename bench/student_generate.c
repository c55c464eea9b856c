/* Speed of sampling a student, through the decoder and the batch scheduler that eval and traces run.
 *
 *     bench_student_generate [--device auto|cpu|cuda] [--model 1.5b|0.5b|tiny|FILE] [CASE ...] [--eager] [--profile] [--peer SCRIPT]
 *
 * A case is SEQUENCESxCONTEXT (each sequence with keys of its own; the rate of steps in which each of them gets a token, at CONTEXT tokens in the mean),
 * SEQUENCESxCONTEXTs (samples of one prompt, which is stored once), or SLOTSm (a mixed load of 4 SLOTS sequences: prompts of 64 to 320
 * tokens with 4 samples each, 32 to 512 new tokens, so that they join and leave all the time).
 *
 * The bound of a step is what has to be read once: all weights but the embedding's other rows, and the keys and values of each sequence up to its last token;
 * over the rate of a large copy on this device (bytes read and written), measured first, and over --rate where it is given. Weights are random numbers of
 * the model's geometry; sampling is 0.6 / 0.95. --peer runs SCRIPT SEQUENCES CONTEXT MODEL for each case of the first kind and prints its rate beside ours.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/command.h"
#include "bench/profile.h"
#include "core/mem.h"
#include "core/options.h"
#include "core/rng.h"
#include "student/decode.h"
#include "student/internal.h"

enum { NEW = 128, MIXED_PROMPT = 320, MIXED_NEW = 512, MIXED_SAMPLES = 4, STEPS = 1 << 16 };

struct values {
    const char *device, *model, *peer;
    int64_t threads;
    double rate;
    bool profile, eager, help;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"device", RT_OPT_STRING, V(device), "auto", 0, 0, NULL, "NAME", "auto, cpu, cuda or ref", false, false},
    {"model", RT_OPT_STRING, V(model), NULL, 0, 0, NULL, "1.5b|0.5b|tiny|FILE", "geometry: Qwen2.5, a small one, or a config.json; default 1.5b on cuda, else tiny", false, false},
    {"peer", RT_OPT_STRING, V(peer), NULL, 0, 0, NULL, "SCRIPT", "a program that measures another implementation", false, false},
    {"threads", RT_OPT_INT, V(threads), "0", 0, 1024, NULL, "N", "0 takes all", false, false},
    {"rate", RT_OPT_FLOAT, V(rate), "0", 0, 1e6, NULL, "GB/S", "also state the share of this rate", false, false},
    {"eager", RT_OPT_FLAG, V(eager), NULL, 0, 0, NULL, NULL, "no recorded work: each step's operations are enqueued one by one", false, false},
    {"profile", RT_OPT_FLAG, V(profile), NULL, 0, 0, NULL, NULL, "the time of each operation of some steps, without recorded work", false, false},
    {"help", RT_OPT_FLAG, V(help), NULL, 0, 0, NULL, NULL, "this text", false, false},
    {0},
};

#define QWEN(h, i, l, nh) \
    "{\"model_type\": \"qwen2\", \"vocab_size\": 151936, \"hidden_size\": " #h ", \"intermediate_size\": " #i ", \"num_hidden_layers\": " #l \
    ", \"num_attention_heads\": " #nh ", \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, " \
    "\"tie_word_embeddings\": true, \"rope_theta\": 1000000.0, \"torch_dtype\": \"bfloat16\"}"
static const struct {
    const char *name, *config;
} models[] = {
    {"1.5b", QWEN(1536, 8960, 28, 12)},
    {"0.5b", QWEN(896, 4864, 24, 14)},
    {"tiny", "{\"model_type\": \"qwen2\", \"vocab_size\": 4096, \"hidden_size\": 256, \"intermediate_size\": 768, \"num_hidden_layers\": 4, "
             "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 4096, "
             "\"tie_word_embeddings\": true, \"rope_theta\": 10000.0, \"torch_dtype\": \"bfloat16\"}"},
};

struct bench {
    struct values v;
    struct rt_backend be;       /* the true one, or a timed one */
    struct rt_device d;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_arena weights;
    struct rt_student *s;
    double copy_rate;
    /* one run */
    struct rt_student_decoder *decoder;
    struct rt_batch *batch;
    int sequences;
    int64_t prompt_tokens, n_steps;
    double *at;                 /* [STEPS] when each step was known */
    int64_t *tokens;            /* [STEPS] new tokens until then */
    int64_t first, last;        /* steps between which all sequences ran */
    bool profiling;
};

static void need(enum rt_status st, const struct rt_err *err)
{
    if (st == RT_OK)
        return;
    fprintf(stderr, "bench_student_generate: %s\n", err->msg);
    exit(rt_exit_code(st));
}

/* ---- the model ---- */

/* One block of numbers again and again; vectors are ones (norms) or small (biases). */
static enum rt_status fill(struct bench *b, struct rt_err *err)
{
    enum { BLOCK = 1 << 22 };
    enum rt_status st = RT_OK;
    const size_t act = rt_device_act_size(&b->d);
    char *block = rt_student_block(b->s), *host = NULL;
    RT_TRY(rt_alloc(BLOCK, act, "numbers", &host, err));
    for (int i = 0; i < BLOCK; i++) {
        const float x = 0.02f * rt_rng_normal(1, 1, (uint64_t)i);
        if (act == 2)
            ((uint16_t *)(void *)host)[i] = rt_f32_to_bf16(x);
        else
            ((float *)(void *)host)[i] = x;
    }
    for (int64_t i = 0; i < b->p.elements; i += BLOCK)
        RT_TRY(rt_device_upload(&b->d, block + (size_t)i * act, host, (size_t)(b->p.elements - i < BLOCK ? b->p.elements - i : BLOCK) * act, err));
    RT_TRY(rt_device_sync(&b->d, err));
    for (int i = 0; i < b->p.n; i++) {
        const struct rt_param *w = &b->p.at[i];
        if (w->kind != RT_PARAM_NORM || rt_param_elements(w) > BLOCK)
            continue;
        for (int64_t j = 0; j < rt_param_elements(w); j++) {
            if (act == 2)
                ((uint16_t *)(void *)host)[j] = 0x3f80;
            else
                ((float *)(void *)host)[j] = 1;
        }
        RT_TRY(rt_device_upload(&b->d, block + (size_t)w->offset * act, host, (size_t)rt_param_elements(w) * act, err));
        RT_TRY(rt_device_sync(&b->d, err));
    }
out:
    rt_free(host);
    return st;
}

static enum rt_status measure_copy(struct bench *b, struct rt_err *err)
{
    enum { TIMES = 5 };
    enum rt_status st = RT_OK;
    const size_t bytes = b->d.be->own_memory ? (size_t)2 << 30 : (size_t)256 << 20;
    void *from = NULL, *to = NULL;
    RT_TRY(b->d.be->alloc(b->d.dev, bytes, &from, err));
    RT_TRY(b->d.be->alloc(b->d.dev, bytes, &to, err));
    for (int i = -1; i < TIMES; i++) {
        const double t0 = rt_now();
        for (int j = 0; j < 8; j++)
            RT_TRY(b->d.be->copy(b->d.dev, b->d.q, to, from, bytes, err));
        RT_TRY(rt_device_sync(&b->d, err));
        const double rate = 16 * (double)bytes / (rt_now() - t0);
        if (i >= 0 && rate > b->copy_rate)
            b->copy_rate = rate;
    }
out:
    if (from != NULL)
        b->d.be->free(b->d.dev, from);
    if (to != NULL)
        b->d.be->free(b->d.dev, to);
    return st;
}

static enum rt_status prepare(struct bench *b, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_backend *be;
    const char *text = NULL;
    int n;
    const enum rt_op *ops = rt_student_decode_ops(&n);
    RT_TRY(rt_backend_select(b->v.device, ops, n, &be, err));
    b->be = b->v.profile ? profile_wrap(be) : *be;
    if (b->v.profile || b->v.eager) /* events between operations cannot be recorded */
        b->be.graph_begin = NULL;
    RT_TRY(rt_device_open(&b->be, &(struct rt_dev_options){.threads = (int)b->v.threads}, &b->d, err));
    const char *name = b->v.model != NULL ? b->v.model : b->be.own_memory ? "1.5b" : "tiny";
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        text = strcmp(name, models[i].name) == 0 ? models[i].config : text;
    if (text != NULL)
        RT_TRY(rt_student_config_parse(text, strlen(text), name, &b->c, err));
    else
        RT_TRY(rt_student_config_load(name, &b->c, err));
    RT_TRY(measure_copy(b, err));
    RT_TRY(rt_params_create(&b->c, &b->p, err));
    RT_TRY(rt_device_arena(&b->d, rt_student_weight_bytes(&b->c, &b->p, b->c.max_position, rt_device_act_size(&b->d)), "weights", &b->weights, err));
    RT_TRY(rt_student_create(&b->d, &b->c, &b->p, b->c.max_position, &b->weights, &b->s, err));
    RT_TRY(fill(b, err));
    RT_TRY(rt_alloc(STEPS, sizeof *b->at, "times", &b->at, err));
    RT_TRY(rt_alloc(STEPS, sizeof *b->tokens, "times", &b->tokens, err));
    printf("%s (%s), %s of %.2fB parameters; a copy moves %.0f GB/s\n", b->d.be->name, b->d.be->describe(b->d.dev), name, (double)b->p.count * 1e-9,
           b->copy_rate * 1e-9);
out:
    return st;
}

/* ---- a run ---- */

static void progress(void *self, const struct rt_batch_stats *s)
{
    struct bench *b = self;
    if (b->n_steps < STEPS) {
        b->at[b->n_steps] = rt_now();
        b->tokens[b->n_steps] = s->new_tokens;
    }
    /* some steps for what is done once, then all of those in which nobody has ended */
    if (s->finished == 0 && s->running == b->sequences && b->prompt_tokens == s->prompt_tokens && b->n_steps < STEPS) {
        if (b->first < 0)
            b->first = b->n_steps + 5;
        b->last = b->n_steps;
        if (b->v.profile && !b->profiling && b->n_steps == b->first) {
            b->profiling = true;
            profile_start();
        }
        if (b->profiling && profile.on && b->n_steps == b->first + 4)
            profile_print(&b->d, "some steps", b->at[b->n_steps] - b->at[b->first]);
    }
    b->prompt_tokens = s->prompt_tokens;
    b->n_steps++;
}

static enum rt_status ended(void *self, const struct rt_batch_result *r, struct rt_err *err)
{
    (void)self;
    (void)r;
    (void)err;
    return RT_OK;
}

static enum rt_status open_run(struct bench *b, int slots, int budget, int64_t max_len, bool own_prefix, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_decoder_options o = {.slots = slots, .budget = budget, .max_len = max_len, .own_prefix = own_prefix};
    const struct rt_batch_options bo = {.slots = slots, .budget = budget, .max_len = max_len, .n_ids = b->c.vocab_size, .seed = 1, .sample = {0.6, 0, 0.95},
                                        .on_finish = ended, .progress = progress, .ctx = b};
    b->n_steps = b->prompt_tokens = 0;
    b->first = b->last = -1;
    b->sequences = slots;
    b->profiling = false;
    RT_TRY(rt_student_decoder_create(b->s, &o, &b->decoder, err));
    const struct rt_batch_step step = rt_student_decoder_step(b->decoder);
    RT_TRY(rt_batch_create(&bo, &step, &b->batch, err));
out:
    return st;
}

static void close_run(struct bench *b)
{
    rt_batch_free(b->batch);
    rt_student_decoder_free(b->decoder);
    b->batch = NULL;
    b->decoder = NULL;
}

static enum rt_status add(struct bench *b, uint64_t key, int64_t n_prompt, int samples, int64_t max_new, struct rt_err *err)
{
    enum rt_status st;
    int32_t *ids = NULL;
    RT_TRY(rt_alloc((size_t)n_prompt, sizeof *ids, "a prompt", &ids, err));
    for (int64_t i = 0; i < n_prompt; i++)
        ids[i] = (int32_t)(rt_rng_u64(2, key, (uint64_t)i) % (uint64_t)b->c.vocab_size);
    const struct rt_batch_request q = {.prompt = ids, .n_prompt = n_prompt, .stream = key << 20, .n_samples = samples, .max_new = max_new};
    RT_TRY(rt_batch_add(b->batch, &q, NULL, err));
out:
    rt_free(ids);
    return st;
}

static double weight_bytes(const struct bench *b)
{
    const double table = (double)b->c.vocab_size * (double)b->c.hidden, all = (double)b->p.count - (b->c.tied ? 0 : table);
    return all * (double)rt_device_act_size(&b->d);
}

static double token_bytes(const struct bench *b)
{
    return 2.0 * b->c.layers * b->c.kv_heads * b->c.head_dim * (double)rt_device_act_size(&b->d);
}

static void print_share(const struct bench *b, double bytes, double seconds)
{
    printf("  %.2f GB a step: %.0f GB/s, %.1f %% of a copy's", bytes * 1e-9, bytes / seconds * 1e-9, 100 * bytes / seconds / b->copy_rate);
    if (b->v.rate > 0)
        printf(", %.1f %% of %.0f GB/s", 100 * bytes / seconds / (b->v.rate * 1e9), b->v.rate);
    printf("\n");
}

/* tokens/s of the peer, the best of its lines; 0: there is none. */
static double run_peer(const struct bench *b, int sequences, int64_t context)
{
    char command[1024], line[256];
    double rate = 0;
    snprintf(command, sizeof command, "python3 '%s' %d %ld '%s'", b->v.peer, sequences, (long)context, b->v.model != NULL ? b->v.model : "1.5b");
    FILE *f = popen(command, "r");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        printf("    peer: %s", line);
        double one = 0;
        if (sscanf(line, "tokens/s %lf", &one) == 1 && one > rate)
            rate = one;
    }
    if (f != NULL)
        (void)pclose(f);
    return rate;
}

/* shared: all of them samples of one prompt in the same pages; else its keys and values are copied to each, which takes no time to compute. */
static enum rt_status steady(struct bench *b, int sequences, int64_t context, bool shared, struct rt_err *err)
{
    enum rt_status st;
    const int64_t prompt = context - NEW / 2;
    if (prompt < 1)
        RT_FAIL(err, USAGE, "a case of %ld tokens of context; expected more than %d", (long)context, NEW / 2);
    RT_TRY(open_run(b, sequences, sequences + 512, prompt + NEW, !shared, err));
    const double t0 = rt_now();
    RT_TRY(add(b, 1, prompt, sequences, NEW, err));
    RT_TRY(rt_batch_run(b->batch, err));
    if (b->first < 0 || b->last <= b->first)
        RT_FAIL(err, INTERNAL, "no step had all %d sequences", sequences);
    const double seconds = (b->at[b->last] - b->at[b->first]) / (double)(b->last - b->first);
    /* step i draws token i of each sequence; the first of them belong to the prompt's last token */
    const double mean = (double)prompt + ((double)b->tokens[b->first + 1] + (double)b->tokens[b->last]) / 2 / sequences - 1;
    const double keys = shared ? (double)prompt + sequences * (mean - (double)prompt) : sequences * mean;
    const double rate = (double)(b->tokens[b->last] - b->tokens[b->first]) / (b->at[b->last] - b->at[b->first]);
    printf("%d sequences%s at %.0f tokens of context: %.3f ms a step, %.0f tokens/s (%ld steps, %.1f s with prompts)\n", sequences,
           shared ? " of one prompt" : "", mean, seconds * 1e3, rate, (long)(b->last - b->first), rt_now() - t0);
    print_share(b, weight_bytes(b) + keys * token_bytes(b), seconds);
    if (shared)
        printf("  (each prompt's keys counted once; once a sequence: %.0f GB/s)\n", (weight_bytes(b) + sequences * mean * token_bytes(b)) / seconds * 1e-9);
    close_run(b);
    if (b->v.peer != NULL && !shared) {
        const double peer = run_peer(b, sequences, context);
        if (peer > 0)
            printf("    peer %.0f tokens/s; ours is %.2f times as fast\n", peer, rate / peer);
    }
    fflush(stdout);
out:
    close_run(b);
    return st;
}

static enum rt_status mixed(struct bench *b, int slots, struct rt_err *err)
{
    enum rt_status st;
    struct rt_batch_stats s;
    double keys = 0;
    RT_TRY(open_run(b, slots, slots + 512, MIXED_PROMPT + MIXED_NEW, false, err));
    for (int i = 0; i < slots; i++) {
        const uint64_t r = rt_rng_u64(3, 1, (uint64_t)i);
        const int64_t prompt = 64 + (int64_t)(r % (MIXED_PROMPT - 63)), new = 32 + (int64_t)((r >> 32) % (MIXED_NEW - 31));
        RT_TRY(add(b, (uint64_t)i + 1, prompt, MIXED_SAMPLES, new, err));
        keys += (double)(new * MIXED_SAMPLES) * ((double)prompt + (double)new / 2);
    }
    const double t0 = rt_now();
    RT_TRY(rt_batch_run(b->batch, err));
    const double seconds = rt_now() - t0;
    rt_batch_stats(b->batch, &s);
    printf("%d slots, %ld sequences that join and leave: %.0f new tokens/s (%ld steps, %ld prompt tokens, %ld new, %.1f in a step)\n", slots, (long)s.added,
           (double)s.new_tokens / seconds, (long)s.steps, (long)s.prompt_tokens, (long)s.new_tokens, (double)s.new_tokens / (double)s.steps);
    print_share(b, weight_bytes(b) + keys / (double)s.steps * token_bytes(b), seconds / (double)s.steps);
    fflush(stdout);
out:
    close_run(b);
    return st;
}

static enum rt_status run_case(struct bench *b, const char *text, struct rt_err *err)
{
    int sequences = 0;
    long context = 0;
    char kind = 0;
    if (sscanf(text, "%dx%ld%c", &sequences, &context, &kind) >= 2 && sequences > 0 && (kind == 0 || kind == 's'))
        return steady(b, sequences, context, kind == 's', err);
    if (sscanf(text, "%d%c", &sequences, &kind) == 2 && sequences > 0 && kind == 'm')
        return mixed(b, sequences, err);
    return rt_fail(err, RT_USAGE, "a case '%s'; expected 256x2048, 256x2048s or 128m", text);
}

int main(int argc, char **argv)
{
    static const struct rt_opt *const tables[] = {options};
    static const char *const on_gpu[] = {"256x2048", "64x2048", "64x8192", "256x2048s", "256m"}, *const on_cpu[] = {"8x256", "8x256s", "8m"};
    static struct bench b;
    struct rt_positionals pos = {0};
    struct rt_err err = {0};
    need(bench_command(options, argc, argv, &b.v, &b.v.help, &pos, &err), &err);
    if (b.v.help)
        return 0;
    need(prepare(&b, &err), &err);
    if (pos.n > 0) {
        for (int i = 0; i < pos.n; i++)
            need(run_case(&b, pos.items[i], &err), &err);
    } else {
        for (int i = 0; i < (b.be.own_memory ? 5 : 3); i++)
            need(run_case(&b, b.be.own_memory ? on_gpu[i] : on_cpu[i], &err), &err);
    }
    rt_student_free(b.s);
    rt_device_arena_free(&b.d, &b.weights);
    rt_params_free(&b.p);
    rt_student_config_free(&b.c);
    rt_free(b.at);
    rt_free(b.tokens);
    rt_device_close(&b.d);
    rt_options_free(tables, 1, &b.v, &pos);
    return 0;
}
