/* Speed of training a student along the way that `retort train` takes: shards on disk, loader, packing, micro-batches, losses, optimiser.
 *
 *     bench_student_train --model 10m|135m|0.5b|1.5b|7b|FILE [options] [-- options of train]          --help lists them
 *
 * Parameters, tokens and rows are random; nothing is kept decoded between epochs, as in a set that memory does not hold. A line a loss: tokens a second over
 * the timed steps, what part of the peak that is (the formula that `train` names), how much of the time the step waited for data, device memory in use, and
 * beside it the rate of the parts alone: the last micro-batch again and again, packed and uploaded once, and the optimiser's step.
 *
 * --loader measures the loader without a device: tokens a second and thread. --peer runs bench/student_peer.py beside it, where python3 has PyTorch
 * and transformers, and prints the ratio.
 */
#include <math.h>
#include <unistd.h>

#include "bench/command.h"
#include "bench/median.h"
#include "bench/train_data.h"
#include "core/io.h"
#include "core/log.h"
#include "core/options.h"
#include "distill/train_run.h"

struct values {
    const char *model, *device, *loss, *dir, *tune, *peer_options;
    int64_t length, batch_tokens, micro_tokens, top_k, steps, threads, loader_threads, gpu_memory, data_tokens, warm_up;
    bool mixed, loader, parts, peer, eager, in_turns, verbose, json, help;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"model", RT_OPT_STRING, V(model), NULL, 0, 0, NULL, "10m|135m|0.5b|1.5b|7b|FILE", "geometry: ten million parameters, SmolLM2-135M, Qwen2.5, or a config.json", true, false},
    {"device", RT_OPT_CHOICE, V(device), "auto", 0, 0, "auto|cpu|cuda|ref", NULL, "where to train", false, false},
    {"loss", RT_OPT_CHOICE, V(loss), "both", 0, 0, "both|ce|kd", NULL, "cross-entropy on plain token ids; half of it and half KL to stored rows at T = 2", false, false},
    {"length", RT_OPT_INT, V(length), "1024", 2, 1e6, NULL, "N", "tokens of a sequence", false, false},
    {"mixed", RT_OPT_FLAG, V(mixed), NULL, 0, 0, NULL, NULL, "documents of a sixteenth of --length up to all of it, packed", false, false},
    {"batch-tokens", RT_OPT_INT, V(batch_tokens), "524288", 2, 1e9, NULL, "N", "tokens of an optimiser step", false, false},
    {"micro-tokens", RT_OPT_INT, V(micro_tokens), "0", 0, 1e9, NULL, "N", "tokens of a micro-batch, 0: planned from memory as `train` does", false, false},
    {"top-k", RT_OPT_INT, V(top_k), "64", 1, 256, NULL, "N", "teacher's entries of a row", false, false},
    {"steps", RT_OPT_INT, V(steps), "3", 1, 1e6, NULL, "N", "timed steps", false, false},
    {"warm-up", RT_OPT_INT, V(warm_up), "1", 1, 1e6, NULL, "N", "steps before them", false, false},
    {"eager", RT_OPT_FLAG, V(eager), NULL, 0, 0, NULL, NULL, "micro-steps are not recorded", false, false},
    {"in-turns", RT_OPT_FLAG, V(in_turns), NULL, 0, 0, NULL, NULL, "after the timed steps, as many in turns with recorded micro-steps and without, and a check that their gradients are the same bytes", false, false},
    {"data-tokens", RT_OPT_INT, V(data_tokens), "0", 0, 1e9, NULL, "N", "tokens on disk, 0: as many as a step has", false, false},
    {"threads", RT_OPT_INT, V(threads), "0", 0, 1024, NULL, "N", "threads that compute on a CPU, 0 takes all", false, false},
    {"loader-threads", RT_OPT_INT, V(loader_threads), "-1", -1, 256, NULL, "N", "threads that decode ahead, -1: as `train` chooses", false, false},
    {"gpu-memory", RT_OPT_BYTES, V(gpu_memory), "0", 0, 9e18, NULL, "24G", "GPU memory to stay within, 0: what is free", false, false},
    {"tune", RT_OPT_STRING, V(tune), NULL, 0, 0, NULL, "FILE", "measured products, kept in FILE; default: in memory", false, false},
    {"loader", RT_OPT_FLAG, V(loader), NULL, 0, 0, NULL, NULL, "the loader alone", false, false},
    {"parts", RT_OPT_FLAG, V(parts), "yes", 0, 0, NULL, NULL, "also measure the parts alone", false, false},
    {"peer", RT_OPT_FLAG, V(peer), NULL, 0, 0, NULL, NULL, "then run bench/student_peer.py, where python3 has torch and transformers, and print the ratio", false, false},
    {"peer-options", RT_OPT_STRING, V(peer_options), NULL, 0, 0, NULL, "OPTIONS", "of that program: --peer-options=\"--compile whole\"", false, false},
    {"dir", RT_OPT_STRING, V(dir), NULL, 0, 0, NULL, "DIR", "where the data go, under a name of their own; default: $TMPDIR or /tmp", false, false},
    {"verbose", RT_OPT_FLAG, V(verbose), NULL, 0, 0, NULL, NULL, "the log of planning", false, false},
    {"json", RT_OPT_FLAG, V(json), NULL, 0, 0, NULL, NULL, "one JSON object a line", false, false},
    {"help", RT_OPT_FLAG, V(help), NULL, 0, 0, NULL, NULL, "this text", false, false},
    {0},
};

enum { MAX_ARGS = 64, ARG = 4200 };

struct args {
    char text[MAX_ARGS][ARG], *argv[MAX_ARGS];
    int n;
};

struct bench {
    struct values v;
    struct rt_positionals extra; /* options of train */
    char dir[4096], config[ARG], data[2][ARG]; /* data: of CE, of KD */
    struct rt_log log;
    struct rt_context ctx;
    struct rt_train_values t;
    struct rt_train_run r;
    struct rt_train_set *set; /* without a cache */
    struct args *args;
    double rate[2]; /* CE, KD */
    bool named;
};

struct measured {
    double seconds, waited, parts, mfu, turn[2]; /* turn: seconds of a step call by call, and recorded */
    int64_t tokens;
};

static const struct rt_opt *train_tables(int i)
{
    return i == 0 ? rt_train_options : rt_common_options();
}

static void add_text(struct args *a, const char *before, const char *text)
{
    if (a->n == MAX_ARGS)
        return;
    snprintf(a->text[a->n], ARG, "%s%s", before, text);
    a->argv[a->n] = a->text[a->n];
    a->n++;
}

static void add(struct args *a, const char *name, const char *text)
{
    add_text(a, "--", name);
    add_text(a, "", text);
}

static void add_number(struct args *a, const char *name, double x)
{
    char text[64];
    snprintf(text, sizeof text, "%.15g", x);
    add(a, name, text);
}

/* ---- data ---- */

static enum rt_status make_data(struct bench *b, bool kd, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct values *v = &b->v;
    struct rt_student_config c = {0};
    struct rt_pool *pool = NULL;
    const double start = rt_now();
    RT_TRY(rt_student_config_load(b->config, &c, err));
    const struct train_data_options o = {.tokens = v->data_tokens > 0 ? v->data_tokens : v->batch_tokens, .length = v->length, .vocab = c.vocab_size,
                                         .mixed = v->mixed, .k = (int)v->top_k, .seed = 5};
    if (rt_path_exists(b->data[kd]))
        goto out;
    RT_TRY(rt_pool_create(0, &pool, err));
    RT_TRY(kd ? train_data_shards(b->data[kd], &o, pool, err) : train_data_lines(b->data[kd], &o, err));
    fprintf(stderr, "%ld tokens of %s made in %.1f s\n", (long)o.tokens, kd ? "rows" : "ids", rt_now() - start);
out:
    rt_pool_free(pool);
    rt_student_config_free(&c);
    return st;
}

static enum rt_status make_place(struct bench *b, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *tmp = b->v.dir != NULL ? b->v.dir : getenv("TMPDIR"), *config = NULL;
    snprintf(b->dir, sizeof b->dir, "%s/retort-train.XXXXXX", tmp != NULL ? tmp : "/tmp");
    if (mkdtemp(b->dir) == NULL)
        RT_FAIL(err, IO, "%s: no such directory can be made", b->dir);
    for (size_t i = 0; i < sizeof train_data_geometries / sizeof train_data_geometries[0]; i++)
        if (strcmp(b->v.model, train_data_geometries[i].name) == 0)
            config = train_data_geometries[i].config;
    snprintf(b->config, sizeof b->config, "%s/config.json", b->dir);
    snprintf(b->data[0], sizeof b->data[0], "%s/lines.jsonl", b->dir);
    snprintf(b->data[1], sizeof b->data[1], "%s/shards", b->dir);
    if (config != NULL)
        RT_TRY(rt_publish_bytes(b->config, config, strlen(config), err));
    else
        snprintf(b->config, sizeof b->config, "%s", b->v.model);
out:
    return st;
}

static void remove_place(const struct bench *b)
{
    char command[ARG + 16];
    snprintf(command, sizeof command, "rm -rf '%s'", b->dir);
    if (b->dir[0] != '\0' && system(command) != 0)
        fprintf(stderr, "bench_student_train: %s is left behind\n", b->dir);
}

/* ---- a run as `train` plans it ---- */

static enum rt_status plan(struct bench *b, bool kd, struct rt_err *err)
{
    enum rt_status st;
    const struct values *v = &b->v;
    const struct rt_opt *const tables[] = {train_tables(0), train_tables(1)};
    struct args *a = b->args;
    char out[ARG];
    a->n = 0;
    snprintf(out, sizeof out, "%s/run", b->dir);
    add(a, "device", v->device);
    add(a, "init-config", b->config);
    add(a, "data", b->data[kd]);
    add(a, "out", out);
    add_number(a, "threads", (double)v->threads);
    add_number(a, "w-ce", kd ? 0.5 : 1);
    add_number(a, "w-kl", kd ? 0.5 : 0);
    add(a, "kd-temperature", kd ? "2" : "1");
    add_number(a, "batch-tokens", (double)v->batch_tokens);
    add_number(a, "micro-tokens", (double)v->micro_tokens);
    add_number(a, "loader-threads", (double)v->loader_threads);
    add_number(a, "steps", (double)(v->steps + v->warm_up));
    add_number(a, "lr", 1e-5);
    if (v->gpu_memory > 0)
        add_number(a, "gpu-memory", (double)v->gpu_memory);
    for (int i = 0; i < b->extra.n; i++)
        add_text(a, "", b->extra.items[i]);
    memset(&b->t, 0, sizeof b->t);
    RT_TRY(rt_options_parse(tables, 2, a->n, a->argv, &b->t, NULL, NULL, err));
    b->ctx = (struct rt_context){.log = &b->log, .command = &rt_cmd_train};
    b->r = (struct rt_train_run){.ctx = &b->ctx, .v = &b->t, .rank = {0, 1, 0}, .dir = {.lock = -1, .metrics = -1}};
    RT_TRY(rt_train_prepare(&b->r, err));
    b->r.o.record = b->r.o.record && !v->eager;
    const struct rt_train_set_options so = {.model = &b->r.student.model, .vocab = b->r.student.c.vocab_size, .max_length = b->r.student.c.max_position};
    RT_TRY(rt_train_set_open(b->data[kd], &so, &b->log, &b->set, err));
out:
    return st;
}

static void unplan(struct bench *b)
{
    struct rt_train_run *r = &b->r;
    const struct rt_opt *const tables[] = {train_tables(0), train_tables(1)};
    rt_train_release(r);
    rt_train_set_free(b->set); /* behind the trainer, which reads from it */
    rt_options_free(tables, 2, &b->t, NULL);
    b->set = NULL;
    *r = (struct rt_train_run){0};
}

/* ---- measuring ---- */

static enum rt_status one_step(struct bench *b, struct rt_step_result *s, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_trainer_step(&b->r.trainer, 1e-5, false, s, err));
    if (s->skipped || s->end)
        RT_FAIL(err, NUMERIC, "a step was left out: loss %g, gradient norm %g", s->loss, s->grad_norm);
out:
    return st;
}

/* Seconds of a step whose micro-batches lie on the device: the last one, as often as a step has it. */
static enum rt_status time_parts(struct bench *b, double *seconds, struct rt_err *err)
{
    enum { REPEATS = 4 };
    enum rt_status st = RT_OK;
    struct rt_trainer *t = &b->r.trainer;
    struct rt_step_report report;
    int64_t tokens = 0;
    double micro = 0, start = 0;
    RT_TRY(rt_trainer_repeat(t, 2, &tokens, err)); /* the second is recorded, where that is done */
    RT_TRY(rt_device_sync(t->d, err));
    start = rt_now();
    RT_TRY(rt_trainer_repeat(t, REPEATS, &tokens, err));
    RT_TRY(rt_device_sync(t->d, err));
    micro = (rt_now() - start) / REPEATS / (double)tokens;
    start = rt_now();
    for (int i = 0; i < REPEATS; i++)
        RT_TRY(rt_optimizer_step(&t->opt, 1e-6, 1, &report, err));
    RT_TRY(rt_device_sync(t->d, err));
    *seconds = micro * (double)b->v.batch_tokens + (rt_now() - start) / REPEATS;
out:
    return st;
}

/* The student with one block of random numbers again and again, which takes no time; norms are ones. */
static enum rt_status make_student(struct rt_loaded_student *l, const struct rt_device *d, int64_t longest, struct rt_err *err)
{
    enum { BLOCK = 1 << 22 };
    enum rt_status st;
    float *x = NULL, one[1] = {1};
    l->d = d;
    RT_TRY(rt_device_arena(d, rt_student_weight_bytes(&l->c, &l->p, longest, rt_device_act_size(d)), "weights", &l->weights, err));
    RT_TRY(rt_student_create(d, &l->c, &l->p, longest, &l->weights, &l->s, err));
    RT_TRY(rt_alloc(BLOCK, sizeof *x, "random numbers", &x, err));
    for (int i = 0; i < BLOCK; i++)
        x[i] = 0.02f * rt_rng_normal(1, 1, (uint64_t)i);
    for (int i = 0; i < l->p.n; i++) {
        const struct rt_param *e = &l->p.at[i];
        const bool vector = e->kind == RT_PARAM_NORM;
        for (int64_t at = 0, n = rt_param_elements(e), part; at < n; at += part) {
            part = vector ? 1 : n - at < BLOCK ? n - at : BLOCK;
            RT_TRY(rt_param_upload(d, rt_student_block(l->s), e, at, part, vector ? one : x, err));
        }
    }
out:
    rt_free(x);
    return st;
}

/* The last micro-step's gradients call by call, at the recording and recorded are the same bytes. */
static enum rt_status check_recorded(struct bench *b, struct rt_err *err)
{
    enum { TIMES = 4 }; /* call by call; the shape's first; recorded and run; run */
    enum rt_status st = RT_OK;
    struct rt_trainer *t = &b->r.trainer;
    const struct rt_device *on = t->recorded.d;
    const size_t bytes = rt_params_bytes(&b->r.student.p, rt_device_act_size(t->d));
    const int64_t runs = t->recorded.runs;
    char *grads[2] = {NULL};
    int64_t tokens;
    for (int i = 0; i < 2; i++)
        RT_TRY(rt_alloc(bytes, 1, "gradients", &grads[i], err));
    for (int i = 0; i < TIMES; i++) {
        t->recorded.d = i == 0 ? NULL : on;
        RT_TRY(rt_student_zero_grads(t->s, err));
        RT_TRY(rt_trainer_repeat(t, 1, &tokens, err));
        RT_TRY(rt_device_download(t->d, grads[i > 0], t->grads.base, bytes, err));
        if (i > 0 && memcmp(grads[0], grads[1], bytes) != 0)
            RT_FAIL(err, INTERNAL, "gradients of a recorded micro-step differ from those of its calls one by one");
    }
    if (t->recorded.runs != runs + 2)
        RT_FAIL(err, INTERNAL, "%ld of 2 micro-steps were recorded ones", (long)(t->recorded.runs - runs));
out:
    t->recorded.d = on;
    for (int i = 0; i < 2; i++)
        rt_free(grads[i]);
    return st;
}

/* TURNS times so many steps of each kind, one kind behind the other: the median round of each. */
static enum rt_status time_turns(struct bench *b, double turn[2], struct rt_err *err)
{
    enum { TURNS = 5 };
    enum rt_status st = RT_OK;
    struct rt_trainer *t = &b->r.trainer;
    const struct rt_device *on = t->recorded.d;
    const int64_t steps = b->v.steps / TURNS > 0 ? b->v.steps / TURNS : 1;
    struct rt_step_result s;
    double seconds[2][TURNS];
    for (int i = 0; i < 2 * TURNS; i++) {
        t->recorded.d = i % 2 == 0 ? NULL : on;
        const double start = rt_now();
        for (int64_t j = 0; j < steps; j++)
            RT_TRY(one_step(b, &s, err));
        RT_TRY(rt_device_sync(t->d, err));
        seconds[i % 2][i / 2] = (rt_now() - start) / (double)steps;
    }
    for (int i = 0; i < 2; i++) {
        qsort(seconds[i], TURNS, sizeof seconds[i][0], bench_by_value);
        turn[i] = seconds[i][TURNS / 2];
    }
out:
    t->recorded.d = on;
    return st;
}

static enum rt_status measure(struct bench *b, struct measured *m, struct rt_err *err)
{
    enum rt_status st;
    struct rt_train_run *r = &b->r;
    struct rt_step_result s;
    const double weight = 1;
    char note[512] = "";
    *m = (struct measured){0};
    if (r->device.be->tune != NULL) /* as `train` does */
        RT_TRY(r->device.be->tune(r->device.dev, b->v.tune, note, sizeof note, err));
    RT_TRY(make_student(&r->student, &r->device, rt_train_longest(r), err));
    RT_TRY(rt_trainer_open(&r->trainer, r->student.s, &b->set, &weight, 1, &r->o, err));
    for (int64_t i = 0; i < b->v.warm_up; i++)
        RT_TRY(one_step(b, &s, err));
    RT_TRY(rt_device_sync(&r->device, err));
    const double waited = rt_loader_waited(r->trainer.loader), start = rt_now();
    double step = start;
    for (int64_t i = 0; i < b->v.steps; i++) {
        RT_TRY(one_step(b, &s, err));
        m->tokens += s.tokens;
        m->mfu += rt_train_mfu(r, &s, 1); /* of one second: divided by all of them below */
        if (b->v.verbose)
            fprintf(stderr, "step of %ld tokens: %.3f s, loss %.4f\n", (long)s.tokens, rt_now() - step, s.loss);
        step = rt_now();
    }
    RT_TRY(rt_device_sync(&r->device, err));
    m->seconds = rt_now() - start;
    m->waited = rt_loader_waited(r->trainer.loader) - waited;
    m->mfu /= m->seconds;
    if (b->v.in_turns && r->trainer.recorded.d != NULL) {
        RT_TRY(time_turns(b, m->turn, err));
        RT_TRY(check_recorded(b, err));
    }
    if (b->v.parts)
        RT_TRY(time_parts(b, &m->parts, err));
out:
    return st;
}

static void report(struct bench *b, bool kd, const struct measured *m)
{
    const struct values *v = &b->v;
    const double rate = (double)m->tokens / m->seconds, parts = m->parts > 0 ? (double)v->batch_tokens / m->parts : NAN;
    const struct rt_trainer_options *o = &b->r.o;
    char memory[32], less[48] = "";
    struct rt_log out = b->log;
    if (!v->json && !b->named) { /* the formula of the rates, once */
        rt_log_init(&out, stdout, RT_LOG_INFO);
        rt_info(&out, "device %s: %s", b->r.device.be->name, b->r.device.be->describe(b->r.device.dev));
        b->ctx.log = &out;
        rt_train_log_rate(&b->r);
        b->ctx.log = &b->log;
        b->named = true;
    }
    b->rate[kd] = rate;
    if (o->recompute_less > 0)
        snprintf(less, sizeof less, " (%d layers %d)", o->recompute_less, o->recompute - 1);
    if (v->json) {
        printf("{\"model\":\"%s\",\"loss\":\"%s\",\"length\":%ld,\"mixed\":%s,\"micro_tokens\":%ld,\"recompute\":%d,\"recompute_less\":%d,\"tokens_per_second\":%.0f,\"mfu\":%.4f,"
               "\"waited\":%.5f,\"memory\":%ld,\"parts_tokens_per_second\":%.0f}\n", v->model, kd ? "kd" : "ce", (long)v->length, v->mixed ? "true" : "false",
               (long)o->micro_tokens, o->recompute, o->recompute_less, rate, m->mfu, m->waited / m->seconds, (long)rt_train_memory(&b->r), parts);
    } else {
        printf("%-5s %-7s %s%ld tokens, micro %ld, recompute %d%s: %9.0f tokens/s", v->model, kd ? "CE + KL" : "CE", v->mixed ? "mixed, up to " : "",
               (long)v->length, (long)o->micro_tokens, o->recompute, less, rate);
        if (!isnan(m->mfu))
            printf(" (%.1f %%)", 100 * m->mfu);
        printf(", waiting for data %.2f %%, memory %s", 100 * m->waited / m->seconds, rt_human_bytes(memory, (uint64_t)rt_train_memory(&b->r)));
        if (!isnan(parts))
            printf("; parts alone %.0f", parts);
        if (b->r.trainer.recorded.runs > 0)
            printf("; %ld micro-steps from %ld recordings", (long)b->r.trainer.recorded.runs, (long)b->r.trainer.recorded.recordings);
        if (m->turn[0] > 0)
            printf("; a step in turns: %.3f ms recorded, %.3f ms call by call (%.2f)", m->turn[1] * 1e3, m->turn[0] * 1e3, m->turn[0] / m->turn[1]);
        printf("\n");
    }
    fflush(stdout);
}

/* Packs every batch and lets it go. */
static enum rt_status measure_loader(struct bench *b, bool kd, struct rt_err *err)
{
    enum rt_status st;
    struct rt_micro p = {0};
    struct rt_loader *l = NULL;
    struct rt_loader_batch batch;
    const double weight = 1;
    double start = 0, copying = 0;
    int64_t tokens = 0;
    struct rt_loader_options o = {.set = &b->set, .weight = &weight, .n_sets = 1, .batch_tokens = b->v.batch_tokens, .threads = b->r.o.loader_threads,
                                  .bytes = b->r.o.loader_bytes, .size = 1};
    o.micro = (struct rt_micro_options){.tokens = b->r.o.micro_tokens, .k = kd ? b->r.o.k : 0, .teacher_T = b->r.o.teacher_T, .tail = RT_TAIL_BUCKET,
                                        .vocab = b->r.student.c.vocab_size};
    RT_TRY(rt_micro_create(&p, &o.micro, err));
    RT_TRY(rt_loader_open(&o, &l, err));
    start = rt_now();
    for (int64_t i = 0; i < b->v.steps; i++) {
        RT_TRY(rt_loader_next(l, &batch, err));
        const double waited = rt_loader_waited(l), before = rt_now();
        for (int64_t at = 0;;) {
            RT_TRY(rt_loader_pack(l, &p, &at, err));
            if (p.n == 0)
                break;
            tokens += p.n;
        }
        copying += rt_now() - before - (rt_loader_waited(l) - waited);
    }
    const double seconds = rt_now() - start;
    printf("%-5s %-7s loader alone, %d threads: %.0f tokens/s, %.0f a thread; copying into micro-batches %.2f us a token\n", b->v.model, kd ? "CE + KL" : "CE",
           o.threads, (double)tokens / seconds, (double)tokens / seconds / (o.threads > 0 ? o.threads : 1), copying / (double)tokens * 1e6);
    fflush(stdout);
out:
    rt_loader_free(l);
    rt_micro_free(&p);
    return st;
}

static enum rt_status run_case(struct bench *b, bool kd, struct rt_err *err)
{
    enum rt_status st;
    struct measured m;
    RT_TRY(make_data(b, kd, err));
    RT_TRY(plan(b, kd, err));
    if (b->v.loader) {
        RT_TRY(measure_loader(b, kd, err));
    } else {
        RT_TRY(measure(b, &m, err));
        report(b, kd, &m);
    }
out:
    unplan(b);
    return st;
}

/* The peer's lines are "CE N tokens/s, ..." and "KD N tokens/s, ..."; it has the card for itself. */
static void run_peer(const struct bench *b)
{
    char command[2 * ARG], line[512];
    double rate;
    if (system("python3 -c 'import torch, transformers' 2>/dev/null") != 0) {
        printf("no peer: python3 has no torch or transformers\n");
        return;
    }
    snprintf(command, sizeof command, "python3 bench/student_peer.py --config '%s' --length %ld --top-k %ld --loss %s %s", b->config, (long)b->v.length, (long)b->v.top_k,
             strcmp(b->v.loss, "both") == 0 ? "ce,kd" : b->v.loss, b->v.peer_options != NULL ? b->v.peer_options : "");
    FILE *f = popen(command, "r");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        const char *at = strstr(line, " tokens/s");
        const bool kd = strncmp(line, "KD ", 3) == 0, ce = strncmp(line, "CE ", 3) == 0;
        printf("peer  %s", line);
        while (at != NULL && at > line && ((at[-1] >= '0' && at[-1] <= '9') || at[-1] == '.'))
            at--;
        if ((kd || ce) && at != NULL && sscanf(at, "%lf", &rate) == 1 && b->rate[kd] > 0)
            printf("      ours is %.2f times the peer\n", b->rate[kd] / rate);
        fflush(stdout);
    }
    if (f != NULL)
        pclose(f);
}

int main(int argc, char **argv)
{
    static struct bench b;
    static struct args args;
    static const struct rt_opt *const tables[] = {options};
    struct rt_err err = {0};
    b.args = &args;
    enum rt_status st = bench_command(options, argc, argv, &b.v, &b.v.help, &b.extra, &err);
    if (st == RT_OK && b.v.help) {
        printf("  -- OPTIONS                  options of `retort train`: -- --moments bf16\n");
        return 0;
    }
    rt_log_init(&b.log, stderr, b.v.verbose ? RT_LOG_INFO : RT_LOG_WARN);
    if (st == RT_OK)
        st = make_place(&b, &err);
    for (int kd = 0; kd < 2 && st == RT_OK; kd++)
        if (strcmp(b.v.loss, "both") == 0 || (strcmp(b.v.loss, "kd") == 0) == (kd == 1))
            st = run_case(&b, kd == 1, &err);
    if (st == RT_OK && b.v.peer)
        run_peer(&b);
    remove_place(&b);
    if (st != RT_OK)
        fprintf(stderr, "bench_student_train: %s\n", err.msg);
    rt_options_free(tables, 1, &b.v, &b.extra);
    return rt_exit_code(st);
}
