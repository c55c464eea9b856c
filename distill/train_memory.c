/* What memory a run takes, and how its steps are cut so that it has it: micro-batches, what is computed again, what operations may take. */
#include <math.h>
#include <string.h>

#include "core/io.h"
#include "core/pool.h"
#include "distill/run_record.h"
#include "distill/train_run.h"
#include "student/describe.h"

enum { MICRO_TOKENS = 4096, MICRO_TOKENS_GPU = 32768, MICRO_LEAST = 256 };

static size_t on_device(const struct rt_trainer_memory *m)
{
    return m->weights + m->grads + m->moments + m->activations + m->losses + m->projectors + m->operations + m->recorded + m->measured;
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

/* ---- how a step is cut ---- */

/* What a product does while memory moves a byte (H100 and H200 in long runs: 650 TFLOP/s, 3 to 4 TB/s; two cores: 100 GFLOP/s, 15 GB/s), what it does while
 * an operation begins, and the rows that a product's last wave of tiles wastes. */
static const struct pace {
    double byte, begin, rows;
} paces[2] = {{7, 0, 16}, {180, 6e8, 256}};
enum { OPERATIONS_OF_A_LAYER = 32 };

double rt_train_cuts_cost(const struct rt_student_config *c, const struct rt_params *p, int64_t longest, bool gpu, const struct rt_train_cuts *x)
{
    const struct pace *pace = &paces[gpu];
    const double L = c->layers, H = (double)c->hidden, I = (double)c->intermediate, V = (double)c->vocab_size, m = (double)x->micro_tokens, act = gpu ? 2 : 4,
                 len = (double)longest, head = V * H, all = (double)p->matmul, operations = (double)x->operations;
    /* of a token: two norms, and SwiGLU's output written once more; gate and up; all else of the layers */
    const double again[] = {pace->byte * act * L * (4 * H + I), 4 * H * I * L + pace->byte * act * L * 2 * I,
                            2 * (all - head) - 4 * H * I * L + 2 * L * c->heads * c->head_dim * len + pace->byte * act * L * (8 * H + 3 * I)};
    double a_token = rt_student_flops_per_token(c, p, len), a_micro;
    for (int i = 0; i < x->recompute; i++)
        a_token += again[i] * (i == x->recompute - 1 ? (L - x->less) / L : 1);
    a_token *= 1 + pace->rows / m;
    /* weights are read twice, gradients read and written once a micro-batch */
    a_micro = pace->byte * (double)p->count * 4 * act + pace->begin * OPERATIONS_OF_A_LAYER * L;
    if (gpu) { /* head_loss.c: the head's gradient is added to once a chunk, in float32 where that has room; logits are float32 where its copy has none */
        const bool f32 = 2 * head > operations / 4;
        const double room = operations - (f32 ? 0 : 2 * head), rows = (room > 8 * head ? room - 4 * head : room) / (2 * V), chunks = rows < m ? ceil(m / rows) : 0;
        a_micro += pace->byte * head * 8 * chunks;
        a_token += f32 ? pace->byte * 4 * V : 0;
    }
    return a_token + a_micro / m;
}

static void plan_cuts(struct rt_train_run *r, const struct rt_train_cuts *x)
{
    r->o.micro_tokens = x->micro_tokens;
    r->o.recompute = x->recompute;
    r->o.recompute_less = x->less;
    rt_trainer_plan(&r->student.c, &r->student.p, &r->o, rt_train_longest(r), rt_device_act_size(&r->device), &r->memory);
    r->memory.operations = x->operations;
    const size_t copy = (size_t)(r->student.c.vocab_size * r->student.c.hidden) * rt_device_act_size(&r->device);
    r->memory.measured = r->device.be->tune != NULL && copy <= x->operations ? copy : 0;
}

/* Of the operations' room as much as the limit leaves, in steps; where it shrinks, down to OPERATIONS_LEAST. */
static bool fits(struct rt_train_run *r, struct rt_train_cuts *x, bool shrinks, size_t limit)
{
    plan_cuts(r, x);
    if (need(r) <= limit)
        return true;
    const size_t over = (need(r) - limit + OPERATIONS_STEP - 1) / OPERATIONS_STEP * OPERATIONS_STEP;
    if (!shrinks || x->operations < over + OPERATIONS_LEAST)
        return false;
    x->operations -= over;
    plan_cuts(r, x);
    return true;
}

struct chosen {
    struct rt_train_cuts best;
    double cost; /* INFINITY: none yet */
};
/* Does x fit? It is the best so far where it costs less. */
static bool consider(struct rt_train_run *r, struct rt_train_cuts x, bool shrinks, size_t limit, struct chosen *to)
{
    if (!fits(r, &x, shrinks, limit))
        return false;
    const double now = rt_train_cuts_cost(&r->student.c, &r->student.p, rt_train_longest(r), r->device.be->own_memory, &x);
    if (now < to->cost)
        *to = (struct chosen){x, now};
    return true;
}

/* The cuts of the least cost that fit; else those that need least. most: micro-batches of so many tokens or halves of it (fixed: exactly so many); level as
 * asked for, or at least 1 where the memory is everybody's, and then as many layers as fit a level below. shrinks: operations may take less than they
 * would. A resumed run may have another level: the bits are the same. */
static void choose_cuts(struct rt_train_run *r, int64_t most, bool fixed, bool shrinks, size_t operations, size_t limit)
{
    const int64_t longest = rt_train_longest(r);
    const bool gpu = r->device.be->own_memory, automatic = strcmp(r->v->recompute, "auto") == 0;
    const int from = automatic ? gpu ? 0 : 1 : r->v->recompute[0] - '0', to = automatic ? 3 : from;
    struct chosen chosen = {.cost = INFINITY};
    struct rt_train_cuts least = {0};
    for (int level = from; level <= to; level++)
        for (int64_t m = most;; m /= 2) {
            struct rt_train_cuts x = {m > longest ? m : longest, level, 0, operations};
            least = x;
            if (shrinks && operations > OPERATIONS_LEAST)
                least.operations = OPERATIONS_LEAST;
            const int most_less = level == from ? 0 : r->student.c.layers - 1;
            while (consider(r, x, shrinks, limit, &chosen) && x.less < most_less)
                x.less++;
            if (fixed || m <= longest || m <= MICRO_LEAST)
                break;
        }
    plan_cuts(r, chosen.cost < INFINITY ? &chosen.best : &least);
}

/* Micro-steps are recorded with memory that is left over, or that layers kept more in than they must: neither changes bits, so neither may change the other
 * cuts. */
static void choose_record(struct rt_train_run *r, size_t limit)
{
    struct rt_train_cuts x = {r->o.micro_tokens, r->o.recompute, r->o.recompute_less, r->memory.operations};
    const int less = x.less;
    r->o.record = r->device.be->graph_begin != NULL;
    for (; x.less >= 0; x.less--) {
        plan_cuts(r, &x);
        if (need(r) <= limit)
            return;
    }
    r->o.record = false;
    x.less = less;
    plan_cuts(r, &x);
}

/* Options that take less, where they are not given yet. */
static const char *cheaper(const struct rt_train_run *r)
{
    const bool gpu = r->device.be->own_memory && r->device.be->act == RT_BF16, f32 = gpu && !r->o.adamw.bf16_moments, master = gpu && !r->o.adamw.no_master;
    if (r->o.recompute < 3)
        return f32 ? ", --recompute 3, --moments bf16" : ", --recompute 3";
    return f32 ? master ? ", --moments bf16, --master none" : ", --moments bf16" : master ? ", --master none" : "";
}

/* The error of a run that needs more than `limit`, with what would do. */
static enum rt_status too_little(const struct rt_train_run *r, uint64_t limit, struct rt_err *err)
{
    const struct rt_backend *be = r->device.be;
    const int64_t longest = rt_train_longest(r);
    struct rt_dev_memory m = {0};
    char a[32], b[32];
    enum rt_status st;
    if (be->own_memory)
        RT_TRY(be->memory(r->device.dev, &m, err));
    RT_FAIL(err, NOMEM, "training needs %s with micro-batches of %ld tokens (the longest sequence has %ld) and --recompute %d; there are %s: --%s %.0fM or more%s%s, "
            "or a --max-length below %ld", rt_human_bytes(a, need(r)), (long)r->o.micro_tokens, (long)longest, r->o.recompute, rt_human_bytes(b, limit),
            be->own_memory ? "gpu-memory" : "memory", ceil((double)(need(r) + m.held) / (1 << 20)), r->o.micro_tokens > longest ? ", smaller --micro-tokens" : "",
            cheaper(r), (long)longest);
out:
    return st;
}

enum rt_status rt_train_plan_memory(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_backend *be = r->device.be;
    const int64_t usual = be->own_memory ? MICRO_TOKENS_GPU : MICRO_TOKENS;
    int64_t n, limit, was;
    size_t operations;
    RT_TRY(rt_command_room(&r->v->common, &r->device, &limit, err));
    plan_loader(r);
    RT_TRY(earlier_cuts(r, &n, &was, err));
    RT_TRY(rt_train_agree_room(r, &limit, &n, err));
    const bool fixed = n > 0 || r->v->micro_tokens > 0;
    RT_TRY(operations_room(&r->device, &operations, err));
    if (n == 0)
        n = r->v->micro_tokens > 0 ? r->v->micro_tokens : r->v->batch_tokens < usual ? r->v->batch_tokens : usual;
    operations = was > 0 && be->own_memory ? (size_t)was : operations;
    choose_cuts(r, n, fixed, be->own_memory && was == 0, operations, (size_t)limit);
    choose_record(r, (size_t)limit);
    if (be->own_memory)
        be->set_scratch(r->device.dev, r->memory.operations);
    if (need(r) > (size_t)limit)
        st = too_little(r, (uint64_t)limit, err);
out:
    return st;
}
