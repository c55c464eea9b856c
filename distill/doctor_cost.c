#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/doctor.h"
#include "distill/train_cuts.h"
#include "student/describe.h"
#include "teacher/teacher.h"

static int64_t length_of(const struct rt_doctor *d, int64_t max_position)
{
    const int64_t n = d->longest > 0 ? d->longest : max_position;
    const int64_t limit = rt_length_limit(d->max_length, max_position);
    return n < limit ? n : limit;
}

static enum rt_status teacher_memory(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    struct rt_teacher_plan p;
    char model[32], states[32], have[32];
    const struct rt_teacher_options o = {.dir = d->teacher, .device = &d->device, .memory = d->memory, .max_length = length_of(d, d->tc.max_position),
                                         .data_tokens = d->tokens, .token_bytes = 24};
    st = rt_teacher_plan_memory(&o, &p, &bad);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "memory.teacher", "%s", bad.msg);
    const int64_t passes = d->tokens > 0 ? (d->tokens + p.window - 1) / p.window : 1;
    return rt_check_add(&d->checks, err, RT_CHECK_PASS, "memory.teacher", "%s of weights %s, windows of %" PRId64 " tokens with %s of states within %s%s", rt_human_bytes(model, p.model_bytes),
                        p.resident ? "stay in memory" : passes > 1 ? "are read anew for each window" : "are streamed once", p.window, rt_human_bytes(states, p.window_bytes),
                        rt_human_bytes(have, (uint64_t)d->memory), d->tokens == 0 ? "" : passes == 1 ? "; one pass over the data" : "; several passes over the weights");
}

/* As `train` plans: without teacher or shards it is cross-entropy on text that is planned. */
static enum rt_status student_memory(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_backend *be = d->device.be;
    char need[32], have[32], weights[32], acts[32], each[32] = "", less[40] = "";
    const int k = d->set != NULL ? rt_shard_set_identity(d->set)->top_k : d->teacher != NULL ? d->top_k : 0;
    const size_t room = (size_t)(d->room > 0 ? d->room : d->memory);
    struct rt_trainer_options o = {.w = {.ce = 0.5, .kl = 0.5, .T = 1}, .teacher_T = 1, .k = k, .batch_tokens = d->batch_tokens, .ranks = d->gpus,
                                   .bucket = be->own_memory ? RT_TRAINER_BUCKET : 0};
    struct rt_train_plan t = {.c = &d->sc, .p = &d->sp, .d = &d->device, .o = &o, .longest = length_of(d, d->sc.max_position),
                              .micro_tokens = rt_train_usual_micro(&d->device, d->batch_tokens), .recompute = -1, .threads = d->threads, .loader_threads = -1,
                              .host = d->memory, .shrinks = be->own_memory};
    const struct rt_trainer_memory *m = &t.memory;
    struct rt_dev_memory gpu = {0};
    size_t enough_takes;
    if (d->gpus > 1 && be->own_memory && be->count != NULL && be->count() < d->gpus)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "memory.student", "--gpus %d: this machine has %d", d->gpus, be->count());
    RT_TRY(rt_train_operations(&d->device, &t.operations, err));
    if (be->own_memory)
        RT_TRY(be->memory(d->device.dev, &gpu, err));
    const bool fit = rt_train_plan_fit(&t, room);
    rt_human_bytes(have, room);
    if (d->gpus > 1)
        snprintf(each, sizeof each, " on each of %d ranks", d->gpus);
    if (!fit) {
        const int64_t enough = rt_train_plan_enough(&t, gpu.held, &enough_takes), shorter = rt_train_plan_shorter(&t, room);
        if (shorter > 0)
            snprintf(less, sizeof less, ", or --max-length %" PRId64, shorter);
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, "memory.student", "training needs %s%s with sequences of %" PRId64
                            " tokens (micro-batches of %" PRId64 ", --recompute %d), there are %s: --%s %" PRId64 "M or more%s",
                            rt_human_bytes(need, enough_takes), each, t.longest, o.micro_tokens, o.recompute, have, be->own_memory ? "gpu-memory" : "memory",
                            enough, less));
        goto out;
    }
    RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "memory.student", "training takes %s%s of %s (%s parameters, gradients and moments, "
                        "%s activations), with micro-batches of %" PRId64 " tokens and --recompute %d",
                        rt_human_bytes(need, rt_train_plan_need(&t)), each, have, rt_human_bytes(weights, m->weights + m->grads + m->moments),
                        rt_human_bytes(acts, m->activations), o.micro_tokens, o.recompute));
out:
    return st;
}

/* Shards of this format take near 5.5 bytes an entry. */
static enum rt_status disk(struct rt_doctor *d, struct rt_err *err)
{
    struct rt_err bad = {0};
    uint64_t room;
    char need[32], have[32];
    const double rows = (double)d->tokens, bytes = rows * (5.5 * d->top_k + 24) + 3.0 * 4 * (d->have_student ? (double)d->sp.count : 0) * 3;
    if (rt_disk_free(d->out, &room, &bad) != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "disk", "%s", bad.msg);
    rt_human_bytes(need, (uint64_t)bytes);
    rt_human_bytes(have, room);
    return rt_check_add(&d->checks, err, bytes <= (double)room ? RT_CHECK_PASS : RT_CHECK_FAIL, "disk", "%s: about %s for shards (top-%d) and three checkpoints, %s are free%s", d->out, need, d->top_k, have,
                        bytes <= (double)room ? "" : "; give another place with --out, or a smaller --top-k");
}

static enum rt_status operations(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char a[32], b[32];
    const double tokens = (double)d->tokens, mean = d->sequences > 0 ? tokens / (double)d->sequences : tokens;
    if (d->have_teacher) {
        const double flops = tokens * rt_teacher_flops(&d->tc, mean);
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "time.teacher", "scoring takes %.3g operations: %s at 100 GFLOP/s, %s at 500 TFLOP/s", flops, rt_human_time(a, flops / 1e11),
                            rt_human_time(b, flops / 5e14)));
    }
    if (d->have_student) {
        const double flops = tokens * rt_student_flops_per_token(&d->sc, &d->sp, mean);
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "time.student", "an epoch takes %.3g operations: %s at 100 GFLOP/s, %s at 300 TFLOP/s", flops, rt_human_time(a, flops / 1e11),
                            rt_human_time(b, flops / 3e14)));
    }
out:
    return st;
}

enum rt_status rt_doctor_costs(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (d->have_teacher && d->teacher_bytes > 0)
        RT_TRY(teacher_memory(d, err));
    if (d->have_student)
        RT_TRY(student_memory(d, err));
    if (d->tokens > 0 && (d->have_teacher || d->have_student)) {
        RT_TRY(disk(d, err));
        RT_TRY(operations(d, err));
    }
out:
    return st;
}
