/* What memory a run takes, and how its steps are cut so that it has it: micro-batches, what is computed again, what operations may take. */
#include <math.h>
#include <string.h>

#include "core/io.h"
#include "core/pool.h"
#include "distill/run_record.h"
#include "distill/train_run.h"

enum { MICRO_TOKENS = 4096, MICRO_TOKENS_GPU = 32768 };

static size_t on_device(const struct rt_trainer_memory *m)
{
    return m->weights + m->grads + m->moments + m->activations + m->losses + m->projectors + m->operations;
}

size_t rt_train_memory_planned(const struct rt_train_run *r)
{
    return on_device(&r->memory) + r->memory.host;
}

/* Micro-batches of an earlier part of the run are kept, and what operations may take: sums depend on the cuts. 0: there was none. */
static enum rt_status earlier_cuts(const struct rt_train_run *r, int64_t *micro, int64_t *operations, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *was = NULL;
    char path[4096];
    *micro = *operations = 0;
    RT_TRY(rt_path_join(path, sizeof path, r->v->out, RT_RUN_FILE, err));
    if (!rt_path_exists(path))
        goto out;
    RT_TRY(rt_json_load(path, 64 << 20, &was, err));
    RT_TRY(rt_json_int_or(was, "micro_tokens", 1, INT64_MAX, 0, micro, err));
    RT_TRY(rt_json_int_or(was, "operations", 0, INT64_MAX, 0, operations, err));
out:
    rt_json_free(was);
    return st;
}

/* *out = what operations of a GPU may take beside their arguments: a twelfth of its memory (at 80 GB, logits of 16000 rows of 150,000 ids). It
 * decides how they divide their work, so it depends on the machine alone, not on what happens to be free; unless the model leaves less than that. */
enum { OPERATIONS_STEP = 256 << 20, OPERATIONS_LEAST = 1 << 30 };
static enum rt_status operations_room(const struct rt_device *d, size_t *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const uint64_t least = OPERATIONS_STEP, most = (uint64_t)7 << 30;
    struct rt_dev_memory m = {0};
    *out = 0;
    if (!d->be->own_memory)
        goto out;
    RT_TRY(d->be->memory(d->dev, &m, err));
    const uint64_t room = m.total / 12 / least * least;
    *out = (size_t)(room < least ? least : room > most ? most : room);
out:
    return st;
}

/* Decoding takes a small part of a core beside a CPU's training, some cores beside a GPU's. */
static void plan_loader(struct rt_train_run *r)
{
    const int cores = r->v->common.threads > 0 ? (int)r->v->common.threads : rt_cpu_count();
    const size_t room = (size_t)rt_command_memory(&r->v->common) / 8;
    struct rt_micro_options o = {.k = r->o.k, .map = &r->o.map, .spans = r->o.boundary != NULL};
    size_t two;
    if (r->v->loader_threads >= 0)
        r->o.loader_threads = (int)r->v->loader_threads;
    else if (cores > 1)
        r->o.loader_threads = !r->device.be->own_memory ? 1 : cores / 2 > 8 ? 8 : cores / 2;
    two = rt_loader_bytes(&o, r->o.batch_tokens);
    r->o.loader_bytes = two < room ? two : room;
}

/* What has to fit into the limit: all of it where device and host share memory. */
static size_t need(const struct rt_train_run *r)
{
    return r->device.be->own_memory ? on_device(&r->memory) : rt_train_memory_planned(r);
}

/* Micro-batches are halved down to this many tokens before more is computed again: smaller ones cost more than a level does. */
enum { MICRO_FLOOR = 512, MICRO_FLOOR_GPU = 8192 };

static void plan_micro(struct rt_train_run *r, size_t operations)
{
    rt_trainer_plan(&r->student.c, &r->student.p, &r->o, rt_train_longest(r), rt_device_act_size(&r->device), &r->memory);
    r->memory.operations = operations;
}

/* Micro-batches of n tokens or of half of it, and so on, at the level asked for; or at the least level from 1 on at which they fit, and at 0 where a
 * device with memory of its own has room for that too. A resumed run may have another level: the bits are the same. */
static void choose_micro(struct rt_train_run *r, int64_t n, bool fixed, size_t operations, size_t limit)
{
    const int64_t longest = rt_train_longest(r), least = r->device.be->own_memory ? MICRO_FLOOR_GPU : MICRO_FLOOR;
    const bool automatic = strcmp(r->v->recompute, "auto") == 0;
    const int from = automatic ? 1 : r->v->recompute[0] - '0', to = automatic ? 3 : from;
    for (r->o.recompute = from;; r->o.recompute++) {
        const int64_t low = r->o.recompute < to && least > longest ? least : longest;
        for (int64_t m = n;; m /= 2) {
            r->o.micro_tokens = m > longest ? m : longest;
            plan_micro(r, operations);
            if (need(r) <= limit || fixed || m <= low)
                break;
        }
        if (need(r) <= limit || r->o.recompute == to)
            break;
    }
    if (!automatic || r->o.recompute > 1 || !r->device.be->own_memory)
        return;
    r->o.recompute = 0;
    plan_micro(r, operations);
    if (need(r) <= limit)
        return;
    r->o.recompute = 1;
    plan_micro(r, operations);
}

/* Micro-batches, level and the room of operations, which an earlier part of the run may have fixed. A large model on a small card: less room for operations,
 * down to OPERATIONS_LEAST, costs less than computing layers again, and more than that only where nothing else fits. *operations: the most of them. */
static void choose_cuts(struct rt_train_run *r, int64_t n, bool fixed, bool was, size_t *operations, size_t limit)
{
    const bool shrinks = r->device.be->own_memory && !was;
    const size_t most = *operations;
    for (int level = 2; level <= 3; level++)
        for (*operations = most;; *operations -= OPERATIONS_STEP) {
            choose_micro(r, n, fixed, *operations, limit);
            if (need(r) <= limit && r->o.recompute <= level)
                return;
            if (!shrinks || *operations < (size_t)OPERATIONS_LEAST + OPERATIONS_STEP)
                break;
        }
}

/* Options that take less, where they are not given yet. */
static const char *cheaper(const struct rt_train_run *r)
{
    const bool gpu = r->device.be->own_memory && r->device.be->act == RT_BF16, f32 = gpu && !r->o.adamw.bf16_moments, master = gpu && !r->o.adamw.no_master;
    if (r->o.recompute < 3)
        return f32 ? ", --recompute 3, --moments bf16" : ", --recompute 3";
    return f32 ? master ? ", --moments bf16, --master none" : ", --moments bf16" : master ? ", --master none" : "";
}

enum rt_status rt_train_plan_memory(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_backend *be = r->device.be;
    const int64_t longest = rt_train_longest(r), usual = be->own_memory ? MICRO_TOKENS_GPU : MICRO_TOKENS;
    int64_t n, limit, was;
    size_t operations;
    char a[32], b[32];
    RT_TRY(rt_command_room(&r->v->common, &r->device, &limit, err));
    plan_loader(r);
    RT_TRY(earlier_cuts(r, &n, &was, err));
    RT_TRY(rt_train_agree_room(r, &limit, &n, err));
    const bool fixed = n > 0 || r->v->micro_tokens > 0;
    RT_TRY(operations_room(&r->device, &operations, err));
    if (n == 0)
        n = r->v->micro_tokens > 0 ? r->v->micro_tokens : r->v->batch_tokens < usual ? r->v->batch_tokens : usual;
    operations = was > 0 && be->own_memory ? (size_t)was : operations;
    choose_cuts(r, n, fixed, was > 0, &operations, (size_t)limit);
    if (be->own_memory)
        be->set_scratch(r->device.dev, operations);
    if (need(r) > (size_t)limit)
        RT_FAIL(err, NOMEM, "training needs %s with micro-batches of %ld tokens (the longest sequence has %ld) and --recompute %d; there are %s: --%s %.0fM or more%s%s, "
                "or a --max-length below %ld", rt_human_bytes(a, need(r)), (long)r->o.micro_tokens, (long)longest, r->o.recompute, rt_human_bytes(b, (uint64_t)limit),
                be->own_memory ? "gpu-memory" : "memory", ceil((double)need(r) / (1 << 20)), r->o.micro_tokens > longest ? ", smaller --micro-tokens" : "",
                cheaper(r), (long)longest);
out:
    return st;
}
