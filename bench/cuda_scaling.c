/* What several GPUs give a training step: the trainer's own steps (forward, loss, backward, sum of gradients, AdamW on each rank's part, gathering) over random
 * sequences, on 1 GPU and on N of this machine, each rank a process of its own.
 *
 *     bench_cuda_scaling [--shape 1.5b|0.5b] [--gpus 2] [--tokens 524288,65536] [--micro 32768] [--length 1024] [--seconds 12]
 *                        [--buckets 0] [--ways 0123]
 *
 * tokens: of a global batch, the same on every number of GPUs. Each line: the time of a step, the mean over as many as fit into --seconds (two at least, after
 * some that warm up); tokens a second of all GPUs; and the ratio to one GPU. ways: 0 one GPU; 1 the sums begin when backward is done, and one thing follows
 * another; 2 parameters are gathered while the next bucket is updated; 3 the sums, too, begin while backward runs. buckets: elements of a bucket at least, each measured;
 * 0: as `train` takes them. The losses of the last step are printed, too: the ways give the same bits, but for the order in which norms are summed over buckets.
 * The last line is what the exchange of a whole block takes by itself.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/backend.h"
#include "core/collective.h"
#include "core/log.h"
#include "core/net.h"
#include "core/rng.h"
#include "distill/trainer.h"

#ifdef RT_CUDA

enum { SEQUENCES = 2048, MAX_LIST = 8, MAX_CASES = 64, LEAST = 2 };

static const struct shape {
    const char *name, *config;
} shapes[] = {
    {"0.5b", "{\"model_type\": \"qwen2\", \"vocab_size\": 151936, \"hidden_size\": 896, \"intermediate_size\": 4864, \"num_hidden_layers\": 24, "
             "\"num_attention_heads\": 14, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, "
             "\"tie_word_embeddings\": true, \"rope_theta\": 1000000.0, \"torch_dtype\": \"bfloat16\"}"},
    {"1.5b", "{\"model_type\": \"qwen2\", \"vocab_size\": 151936, \"hidden_size\": 1536, \"intermediate_size\": 8960, \"num_hidden_layers\": 28, "
             "\"num_attention_heads\": 12, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, "
             "\"tie_word_embeddings\": true, \"rope_theta\": 1000000.0, \"torch_dtype\": \"bfloat16\"}"},
};

struct job {
    const struct shape *shape;
    int gpus;
    int64_t tokens[MAX_LIST], buckets[MAX_LIST], micro, length;
    int n_tokens, n_buckets;
    const char *ways;
    double seconds;
};

struct result {
    double seconds, loss, norm, sum, gather; /* sum, gather: seconds of a whole block's */
    int steps;
};

/* What is measured on one number of GPUs. */
struct plan {
    struct one_case {
        int way;
        int64_t tokens, bucket;
    } at[MAX_CASES];
    int n;
};

/* ---- a rank ---- */

struct rank {
    const struct job *job;
    const struct plan *plan;
    int rank, size, port;
    struct rt_comm *comm;
    struct rt_device d;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_arena weights;
    struct rt_student *s;
    struct rt_row_identity id;
    uint32_t *ids;
    uint8_t *mask;
    struct rt_train_set *set;
};

/* Sequence i: random ids, the same on every rank. */
static enum rt_status get_rows(void *self, int64_t i, struct rt_rows *out, bool *end, struct rt_err *err)
{
    struct rank *r = self;
    (void)err;
    *end = false;
    for (int64_t t = 0; t < r->job->length; t++)
        r->ids[t] = (uint32_t)(rt_rng_u64(7, (uint64_t)i, (uint64_t)t) % (uint64_t)r->c.vocab_size);
    *out = (struct rt_rows){.source_line = i + 1, .n_tokens = r->job->length, .ids = r->ids, .loss_mask = r->mask};
    rt_rows_key(r->ids, out->n_tokens, out->key);
    return RT_OK;
}

static enum rt_status fill(struct rank *r, struct rt_err *err)
{
    enum { PIECE = 1 << 20 };
    enum rt_status st;
    float *x = NULL;
    RT_TRY(rt_alloc(PIECE, sizeof *x, "random numbers", &x, err));
    for (int i = 0; i < r->p.n; i++) {
        const struct rt_param *p = &r->p.at[i];
        if (i == 0 || (p->kind == RT_PARAM_NORM) != (r->p.at[i - 1].kind == RT_PARAM_NORM))
            for (int64_t j = 0; j < PIECE; j++)
                x[j] = p->kind == RT_PARAM_NORM ? 1 : 0.02f * (float)rt_rng_normal(1, 1, (uint64_t)j);
        for (int64_t first = 0, n; first < rt_param_elements(p); first += n) {
            n = rt_param_elements(p) - first < PIECE ? rt_param_elements(p) - first : PIECE;
            RT_TRY(rt_param_upload(&r->d, rt_student_block(r->s), p, first, n, x, err));
        }
    }
out:
    rt_free(x);
    return st;
}

static enum rt_status open_rank(struct rank *r, struct rt_err *err)
{
    enum rt_status st;
    const struct shape *s = r->job->shape;
    char note[256];
    const struct rt_comm_options o = {.rank = {r->rank, r->size, r->rank}, .host = "127.0.0.1", .port = r->port, .identity = "bench_cuda_scaling", .join_timeout = 60,
                                      .timeout = 60};
    if (r->size > 1)
        RT_TRY(rt_comm_open(&o, &r->comm, err));
    RT_TRY(rt_device_open(&rt_backend_cuda, &(struct rt_dev_options){.index = r->rank, .comm = r->comm}, &r->d, err));
    r->d.be->set_scratch(r->d.dev, (uint64_t)7 << 30);
    RT_TRY(r->d.be->tune(r->d.dev, NULL, note, sizeof note, err)); /* as `train` does */
    if (r->rank == 0)
        fprintf(stderr, "%d rank%s: %s\n", r->size, r->size > 1 ? "s" : "", r->d.be->describe(r->d.dev));
    RT_TRY(rt_student_config_parse(s->config, strlen(s->config), s->name, &r->c, err));
    RT_TRY(rt_params_create(&r->c, &r->p, err));
    RT_TRY(rt_device_arena(&r->d, rt_student_weight_bytes(&r->c, &r->p, r->job->length, 2), "weights", &r->weights, err));
    RT_TRY(rt_student_create(&r->d, &r->c, &r->p, r->job->length, &r->weights, &r->s, err));
    RT_TRY(rt_alloc((size_t)r->job->length, sizeof *r->ids, "ids", &r->ids, err));
    RT_TRY(rt_alloc((size_t)r->job->length, 1, "mask", &r->mask, err));
    memset(r->mask, 1, (size_t)r->job->length);
    r->id = (struct rt_row_identity){.vocab_size = r->c.vocab_size, .n_ids = r->c.vocab_size};
    const struct rt_row_source source = {.self = r, .count = SEQUENCES, .identity = &r->id, .get = get_rows};
    static const struct rt_model_dir none; /* no tokenizer */
    const struct rt_train_set_options so = {.model = &none, .vocab = r->c.vocab_size, .max_length = r->job->length, .cache_bytes = (size_t)1 << 30};
    RT_TRY(rt_train_set_memory(&source, &so, &r->set, err));
out:
    return st;
}

static void close_rank(struct rank *r)
{
    rt_train_set_free(r->set);
    rt_student_free(r->s);
    rt_device_arena_free(&r->d, &r->weights);
    rt_params_free(&r->p);
    rt_student_config_free(&r->c);
    rt_device_close(&r->d);
    rt_comm_free(r->comm);
    rt_free(r->ids);
    rt_free(r->mask);
}

/* Seconds that an exchange of a whole block takes by itself. */
static enum rt_status alone(struct rank *r, struct result *out, struct rt_err *err)
{
    enum { TIMES = 5 };
    enum rt_status st = RT_OK;
    const struct rt_backend *be = r->d.be;
    double *const seconds[] = {&out->sum, &out->gather};
    for (int what = 0; what < 2 && r->size > 1; what++) {
        double begin = 0;
        for (int i = -1; i < TIMES; i++) {
            if (i == 0) {
                RT_TRY(rt_device_sync(&r->d, err));
                begin = rt_now();
            }
            RT_TRY(what == 0 ? be->reduce_scatter(r->d.dev, r->d.q, rt_student_grads(r->s), r->p.elements, err)
                             : be->all_gather(r->d.dev, r->d.q, rt_student_block(r->s), r->p.elements, err));
        }
        RT_TRY(rt_device_sync(&r->d, err));
        *seconds[what] = (rt_now() - begin) / TIMES;
    }
out:
    return st;
}

/* Steps until the time is over, by rank 0's clock. */
static enum rt_status measure(struct rank *r, const struct one_case *c, struct result *out, struct rt_err *err)
{
    enum rt_status st;
    static const double weight[1] = {1};
    struct rt_trainer t = {0};
    struct rt_step_result x;
    const struct rt_trainer_options o = {
        .w = {.ce = 1, .T = 1}, .teacher_T = 1, .adamw = {0.9, 0.95, 1e-8, 0.1, 1, true, false, 0}, .batch_tokens = c->tokens, .micro_tokens = r->job->micro, .seed = 1,
        .ranks = r->size, .comm = r->comm, .bucket = c->bucket > 0 ? c->bucket : RT_TRAINER_BUCKET, .overlap = c->way >= 2, .early = c->way >= 3};
    const int warm = (int)(c->tokens > 131072 ? 1 : (131072 + c->tokens - 1) / c->tokens + 1);
    bool more = true;
    double begin = 0;
    RT_TRY(fill(r, err));
    RT_TRY(rt_trainer_open(&t, r->s, &r->set, weight, 1, &o, err));
    for (int i = -warm; more; i++) {
        if (i == 0) {
            RT_TRY(rt_device_sync(&r->d, err));
            begin = rt_now();
        }
        RT_TRY(rt_trainer_step(&t, 1e-4, false, &x, err));
        if (i < LEAST - 1)
            continue;
        more = rt_now() - begin < r->job->seconds;
        RT_TRY(rt_comm_broadcast(r->comm, &more, sizeof more, 0, err));
        out->steps = i + 1;
    }
    RT_TRY(rt_device_sync(&r->d, err));
    out->seconds = (rt_now() - begin) / out->steps;
    out->loss = x.loss;
    out->norm = x.grad_norm;
    if (c == &r->plan->at[r->plan->n - 1])
        RT_TRY(alone(r, out, err));
out:
    rt_trainer_close(&t);
    return st;
}

/* In a child: every case; rank 0 writes what came out to fd. Does not return. */
static void be_rank(const struct job *job, const struct plan *plan, int rank, int size, int port, int fd)
{
    struct rank r = {.job = job, .rank = rank, .size = size, .port = port, .plan = plan};
    static struct result x[MAX_CASES];
    struct rt_err err = {0};
    enum rt_status st;
    RT_TRY(open_rank(&r, &err));
    for (int i = 0; i < plan->n; i++)
        RT_TRY(measure(&r, &plan->at[i], &x[i], &err));
    if (rank == 0 && write(fd, x, sizeof x) != (ssize_t)sizeof x)
        st = rt_fail_errno(&err, "a pipe");
out:
    if (st != RT_OK) {
        fprintf(stderr, "rank %d of %d: %s\n", rank, size, err.msg);
        rt_comm_abort(r.comm, err.msg);
    }
    close_rank(&r);
    _exit(rt_exit_code(st));
}

/* ---- the table ---- */

static bool run(const struct job *job, const struct plan *plan, int size, struct result x[MAX_CASES])
{
    struct rt_err err = {0};
    int fd[2], port, listener;
    bool good = true;
    if (pipe(fd) != 0 || rt_net_listen(0, &listener, &port, &err) != RT_OK)
        return false;
    rt_net_close(listener);
    for (int i = 0; i < size; i++)
        if (fork() == 0)
            be_rank(job, plan, i, size, port, fd[1]);
    close(fd[1]);
    good = read(fd[0], x, MAX_CASES * sizeof *x) == (ssize_t)(MAX_CASES * sizeof *x);
    close(fd[0]);
    for (int i = 0, how; i < size; i++)
        good = wait(&how) > 0 && WIFEXITED(how) && WEXITSTATUS(how) == 0 && good;
    return good;
}

static void print_line(const struct job *job, const struct one_case *c, const struct result *x, const struct result *one)
{
    static const char *const how[] = {"", "one after the other", "gathering overlaps", "both overlap"};
    const int size = c->way > 0 ? job->gpus : 1;
    printf("%-5s %7ld tokens a step, %d GPU%s %-20s", job->shape->name, (long)c->tokens, size, size > 1 ? "s" : " ", how[c->way]);
    if (c->bucket > 0)
        printf(" bucket %9ld", (long)c->bucket);
    printf(" %9.2f ms a step (%3d) %9.0f tokens/s", x->seconds * 1e3, x->steps, (double)c->tokens / x->seconds);
    if (size > 1 && one->seconds > 0)
        printf("  %.3f x one", one->seconds / x->seconds);
    printf("   loss %.8f norm %.8f\n", x->loss, x->norm);
}

/* Numbers with commas between them. */
static bool numbers(const char *text, int64_t out[MAX_LIST], int *n)
{
    char *end = NULL;
    *n = 0;
    for (const char *p = text; *n < MAX_LIST; p = end + 1) {
        out[(*n)++] = strtol(p, &end, 10);
        if (end == p || (*end != ',' && *end != '\0'))
            return false;
        if (*end == '\0')
            return true;
    }
    return false;
}

static bool options(struct job *job, int argc, char **argv)
{
    bool good = argc % 2 == 1;
    for (int i = 1; i + 1 < argc && good; i += 2) {
        const char *v = argv[i + 1];
        if (strcmp(argv[i], "--shape") == 0)
            for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
                job->shape = strcmp(shapes[s].name, v) == 0 ? &shapes[s] : job->shape;
        else if (strcmp(argv[i], "--gpus") == 0)
            job->gpus = atoi(v);
        else if (strcmp(argv[i], "--micro") == 0)
            job->micro = atol(v);
        else if (strcmp(argv[i], "--length") == 0)
            job->length = atol(v);
        else if (strcmp(argv[i], "--ways") == 0)
            job->ways = v;
        else if (strcmp(argv[i], "--seconds") == 0)
            job->seconds = atof(v);
        else if (strcmp(argv[i], "--tokens") == 0)
            good = numbers(v, job->tokens, &job->n_tokens);
        else if (strcmp(argv[i], "--buckets") == 0)
            good = numbers(v, job->buckets, &job->n_buckets);
        else
            good = false;
    }
    return good && job->micro >= job->length && job->length > 0 && job->gpus > 0;
}

/* several: on all GPUs, else on one. The cases of a number of tokens lie in one row. */
static void make_plan(const struct job *job, bool several, struct plan *p)
{
    p->n = 0;
    for (int i = 0; i < job->n_tokens; i++)
        for (int way = several ? 1 : 0; way < (several ? 4 : 1); way++)
            for (int b = 0; b < (several ? job->n_buckets : 1) && p->n < MAX_CASES; b++)
                if (strchr(job->ways, '0' + way) != NULL)
                    p->at[p->n++] = (struct one_case){way, job->tokens[i], several ? job->buckets[b] : 0};
}

int main(int argc, char **argv)
{
    struct job job = {.shape = &shapes[1], .gpus = 2, .tokens = {524288, 65536}, .n_tokens = 2, .n_buckets = 1, .micro = 32768, .length = 1024, .ways = "0123", .seconds = 12};
    static struct result one[MAX_CASES], x[MAX_CASES];
    struct plan p;
    if (!options(&job, argc, argv)) {
        fprintf(stderr, "usage: bench_cuda_scaling [--shape 1.5b|0.5b] [--gpus 2] [--tokens 524288,65536] [--micro 32768] [--length 1024] [--seconds 12]\n"
                        "                          [--buckets 0] [--ways 0123]\n");
        return 2;
    }
    for (int several = 0; several < (job.gpus > 1 ? 2 : 1); several++) { /* nothing touches a GPU before the ranks are forked */
        struct result *out = several == 1 ? x : one;
        make_plan(&job, several == 1, &p);
        if (p.n == 0)
            continue;
        if (!run(&job, &p, several == 1 ? job.gpus : 1, out)) {
            fprintf(stderr, "bench_cuda_scaling: no result on %d GPUs\n", several == 1 ? job.gpus : 1);
            return 5;
        }
        for (int i = 0, t = 0; i < p.n; i++) {
            while (job.tokens[t] != p.at[i].tokens)
                t++;
            print_line(&job, &p.at[i], &out[i], &one[t]);
        }
        if (several == 1)
            printf("a whole block's exchange by itself: sum %.2f ms, gathering %.2f ms\n", x[p.n - 1].sum * 1e3, x[p.n - 1].gather * 1e3);
        fflush(stdout);
    }
    return 0;
}
#else
int main(void)
{
    fprintf(stderr, "bench_cuda_scaling: built without CUDA\n");
    return 5;
}
#endif
