/* Memory runs out at each allocation in turn: the engines of teacher and student. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "student/decode.h"
#include "student/save.h"
#include "teacher/decode.h"
#include "teacher/score.h"
#include "tests/faults.h"

enum { SEQS = 2, TOKENS = 12 };

static struct rt_device open_device(void)
{
    struct rt_err err = {0};
    const struct rt_backend *be;
    struct rt_device d;
    assert_ok(rt_backend_select("cpu", NULL, 0, &be, &err));
    assert_ok(rt_device_open(be, &(const struct rt_dev_options){.threads = 2}, &d, &err));
    return d;
}

static enum rt_status device_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    const struct rt_backend *be;
    struct rt_device d = {0};
    void *p = NULL;
    enum rt_status st;
    (void)digest;
    RT_TRY(rt_backend_select(ctx, NULL, 0, &be, err));
    RT_TRY(rt_device_open(be, &(const struct rt_dev_options){.threads = 2}, &d, err));
    RT_TRY(d.be->alloc(d.dev, 1000, &p, err));
    d.be->free(d.dev, p);
out:
    rt_device_close(&d);
    return st;
}

static void devices(void **state)
{
    (void)state;
    fault_each(device_work, (void *)(uintptr_t)"ref", 1000);
    fault_each(device_work, (void *)(uintptr_t)"cpu", 1000);
}

/* ---- teacher ---- */
static enum rt_status take_rows(void *self, const struct rt_rows *r, struct rt_err *err)
{
    (void)err;
    fault_digest(self, r->topk_ids, (size_t)(r->n_rows * r->k) * sizeof *r->topk_ids);
    fault_digest(self, r->topk_logits, (size_t)(r->n_rows * r->k) * sizeof *r->topk_logits);
    return RT_OK;
}

struct teacher_case {
    struct rt_device d;
    const char *dir;
    int64_t memory;
    bool w8a8;
};

static enum rt_status score_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    const struct teacher_case *c = ctx;
    const struct rt_teacher_options o = {.dir = c->dir, .device = &c->d, .memory = c->memory, .max_length = TOKENS, .data_tokens = SEQS * TOKENS,
                                         .w8a8 = c->w8a8};
    struct rt_score_options so = {.top_k = 5, .n_lse = 2, .lse_temperature = {1, 2}};
    struct rt_teacher *t = NULL;
    struct rt_rows seqs[SEQS] = {0};
    struct rt_row_sink sink = {.self = digest, .put = take_rows};
    uint32_t ids[SEQS][TOKENS];
    uint8_t mask[TOKENS];
    enum rt_status st;
    memset(mask, 1, sizeof mask);
    RT_TRY(rt_teacher_open(&o, &t, err));
    so.n_ids = rt_teacher_config(t)->vocab_size;
    for (int i = 0; i < SEQS; i++) {
        for (int j = 0; j < TOKENS; j++)
            ids[i][j] = (uint32_t)((i * 31 + j * 17) % so.n_ids);
        seqs[i] = (struct rt_rows){.n_tokens = TOKENS, .ids = ids[i], .loss_mask = mask};
    }
    RT_TRY(rt_teacher_score(t, &so, seqs, SEQS, 0, &sink, err));
out:
    rt_teacher_close(t);
    return st;
}

/* The least memory with which the teacher opens: its weights are read ahead by a thread into a ring. */
static int64_t least_memory(const struct teacher_case *c)
{
    struct rt_teacher_plan plan;
    for (int64_t m = 16 << 20;; m += 1 << 18) {
        struct rt_err err = {0};
        const struct rt_teacher_options o = {.dir = c->dir, .device = &c->d, .memory = m, .max_length = TOKENS, .data_tokens = SEQS * TOKENS};
        const enum rt_status st = rt_teacher_plan_memory(&o, &plan, &err);
        if (st == RT_OK && !plan.resident)
            return m;
        if (st != RT_NOMEM)
            fail_msg("%d MB: %s", (int)(m >> 20), st == RT_OK ? "all weights fit" : err.msg);
    }
}

static void teacher_scores(void **state)
{
    (void)state;
    struct teacher_case c = {open_device(), "tests/data/cases/v3_fp8", (int64_t)1 << 30, true};
    fault_each(score_work, &c, 60);
    c.dir = "tests/data/cases/v2_bf16";
    c.w8a8 = false;
    c.memory = least_memory(&c);
    fault_each(score_work, &c, 40);
    rt_device_close(&c.d);
}

static enum rt_status take_text(void *ctx, const struct rt_batch_result *r, struct rt_err *err)
{
    (void)err;
    fault_digest(ctx, r->ids, (size_t)r->n * sizeof *r->ids);
    return RT_OK;
}

static enum rt_status generate(struct rt_batch_step step, int64_t n_ids, uint64_t *digest, struct rt_err *err)
{
    const struct rt_batch_options o = {.slots = 2, .budget = 8, .max_len = TOKENS, .n_ids = n_ids, .sample = {1, 0, 1}, .on_finish = take_text,
                                       .ctx = digest};
    static const int32_t prompt[] = {3, 1, 4, 1, 5};
    struct rt_batch *b = NULL;
    enum rt_status st;
    RT_TRY(rt_batch_create(&o, &step, &b, err));
    RT_TRY(rt_batch_add(b, &(struct rt_batch_request){.prompt = prompt, .n_prompt = 5, .n_samples = 2, .max_new = 4}, NULL, err));
    RT_TRY(rt_batch_run(b, err));
out:
    rt_batch_free(b);
    return st;
}

static enum rt_status teacher_decode_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    const struct teacher_case *c = ctx;
    const struct rt_teacher_options o = {.dir = c->dir, .device = &c->d, .memory = c->memory, .max_length = TOKENS, .slots = 2, .batch_tokens = 8};
    struct rt_teacher *t = NULL;
    struct rt_teacher_decoder *g = NULL;
    enum rt_status st;
    RT_TRY(rt_teacher_open(&o, &t, err));
    RT_TRY(rt_teacher_decoder_create(t, &g, err));
    RT_TRY(generate(rt_teacher_decoder_step(g), rt_teacher_config(t)->vocab_size, digest, err));
out:
    rt_teacher_decoder_free(g);
    rt_teacher_close(t);
    return st;
}

static void teacher_generates(void **state)
{
    (void)state;
    struct teacher_case c = {open_device(), "tests/data/cases/v3_fp8", (int64_t)1 << 30, false};
    fault_each(teacher_decode_work, &c, 40);
    rt_device_close(&c.d);
}

/* ---- student ---- */
struct student {
    const struct rt_device *d;
    struct rt_student_config c;
    struct rt_params p;
    struct rt_tensors *files;
    struct rt_arena weights, grads, acts, moments, loss;
    struct rt_student *s;
};

static enum rt_status student_open(struct student *x, const struct rt_device *d, const char *dir, struct rt_err *err)
{
    const size_t act = rt_device_act_size(d);
    enum rt_status st;
    x->d = d;
    RT_TRY(rt_student_config_load(dir, &x->c, err));
    RT_TRY(rt_tensors_open(dir, &x->files, err));
    RT_TRY(rt_params_check_model(&x->c, x->files, true, NULL, err));
    RT_TRY(rt_params_create(&x->c, &x->p, err));
    RT_TRY(rt_device_arena(d, rt_student_weight_bytes(&x->c, &x->p, TOKENS, act), "weights", &x->weights, err));
    RT_TRY(rt_device_arena(d, rt_params_bytes(&x->p, act), "gradients", &x->grads, err));
    RT_TRY(rt_device_arena(d, rt_student_activation_bytes(&x->c, TOKENS, RT_KEEP_ALL, act), "activations", &x->acts, err));
    RT_TRY(rt_device_arena(d, rt_optimizer_bytes(&x->p, act, false), "moments", &x->moments, err));
    RT_TRY(rt_device_arena(d, 1 << 16, "loss", &x->loss, err));
    RT_TRY(rt_student_create(d, &x->c, &x->p, TOKENS, &x->weights, &x->s, err));
    RT_TRY(rt_student_load(x->s, x->files, err));
out:
    return st;
}

static void student_close(struct student *x)
{
    rt_student_free(x->s);
    rt_device_arena_free(x->d, &x->weights);
    rt_device_arena_free(x->d, &x->grads);
    rt_device_arena_free(x->d, &x->acts);
    rt_device_arena_free(x->d, &x->moments);
    rt_device_arena_free(x->d, &x->loss);
    rt_params_free(&x->p);
    rt_tensors_free(x->files);
    rt_student_config_free(&x->c);
}

static enum rt_status train_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    struct student x = {0};
    struct rt_optimizer opt;
    struct rt_step_report report;
    static const int32_t ids[TOKENS] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, cu[] = {0, 5, TOKENS};
    const struct rt_student_batch b = {ids, cu, TOKENS, 2};
    const struct rt_adamw adam = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};
    void *dx;
    int32_t *label;
    enum rt_status st;
    RT_TRY(student_open(&x, ctx, "tests/data/cases/qwen3", err));
    RT_TRY(rt_student_attach_grads(x.s, &x.grads, err));
    RT_TRY(rt_optimizer_init(&opt, x.s, &adam, &x.moments, err));
    RT_TRY(rt_arena_alloc(&x.loss, (size_t)(TOKENS * x.c.hidden) * rt_device_act_size(x.d), &dx, err));
    RT_TRY(rt_arena_alloc(&x.loss, sizeof ids, &label, err));
    RT_TRY(rt_device_upload(x.d, label, ids, sizeof ids, err));
    RT_TRY(rt_student_forward(x.s, &b, RT_KEEP_ALL, &x.acts, err));
    const struct rt_student_head head = rt_student_head(x.s);
    RT_TRY(RT_OP(x.d, head_loss, err, .x = rt_student_hidden(x.s, RT_LAYER_FINAL), .w = head.w, .dx = dx, .dw = head.dw, .n = TOKENS, .H = head.H,
                 .V = head.V, .label = label, .w_ce = 1.0 / TOKENS, .T = 1));
    RT_TRY(rt_student_backward(x.s, dx, NULL, 0, false, err));
    RT_TRY(rt_optimizer_step(&opt, 1e-3, 1, &report, err));
    fault_digest(digest, &report.grad_norm, sizeof report.grad_norm);
out:
    student_close(&x);
    return st;
}

static void student_trains(void **state)
{
    (void)state;
    struct rt_device d = open_device();
    fault_each(train_work, &d, 100);
    rt_device_close(&d);
}

struct save_case {
    const struct rt_device *d;
    const char *dir;
};

/* Generation, and the model on disk. */
static enum rt_status use_work(void *ctx, uint64_t *digest, struct rt_err *err)
{
    const struct save_case *c = ctx;
    struct student x = {0};
    struct rt_student_decoder *g = NULL;
    const struct rt_decoder_options o = {.slots = 2, .budget = 8, .max_len = TOKENS};
    const struct rt_student_save save = {.source = "tests/data/cases/llama3", .dtype = RT_BF16};
    enum rt_status st;
    RT_TRY(student_open(&x, c->d, "tests/data/cases/llama3", err));
    RT_TRY(rt_student_decoder_create(x.s, &o, &g, err));
    RT_TRY(generate(rt_student_decoder_step(g), x.c.vocab_size, digest, err));
    rt_student_decoder_suspend(g);
    RT_TRY(rt_student_decoder_resume(g, err));
    RT_TRY(generate(rt_student_decoder_step(g), x.c.vocab_size, digest, err));
    RT_TRY(rt_student_save(x.s, &save, c->dir, err));
out:
    rt_student_decoder_free(g);
    student_close(&x);
    return st;
}

static void student_generates_and_saves(void **state)
{
    (void)state;
    struct rt_device d = open_device();
    struct save_case c = {&d, test_tmp("fault-student")};
    fault_each(use_work, &c, 60);
    rt_device_close(&d);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(devices), cmocka_unit_test(teacher_scores), cmocka_unit_test(teacher_generates), cmocka_unit_test(student_trains),
    cmocka_unit_test(student_generates_and_saves),
};
RT_SUITE(faults_engines, tests)
