#include "distill/train_cuts.h"

#include <math.h>

#include "core/pool.h"
#include "student/describe.h"

enum { MICRO_TOKENS = 4096, MICRO_TOKENS_GPU = 32768, MICRO_LEAST = 256 };

int64_t rt_train_usual_micro(const struct rt_device *d, int64_t batch_tokens)
{
    const int64_t usual = d->be->own_memory ? MICRO_TOKENS_GPU : MICRO_TOKENS;
    return batch_tokens < usual ? batch_tokens : usual;
}

/* A twelfth of the GPU's memory (at 80 GB, logits of 16000 rows of 150,000 ids). It decides how operations divide their work, so it depends on the machine
 * alone, not on what happens to be free; unless the model leaves less than that. */
enum { OPERATIONS_STEP = 256 << 20, OPERATIONS_LEAST = 1 << 30 };
enum rt_status rt_train_operations(const struct rt_device *d, size_t *out, struct rt_err *err)
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
static void plan_loader(struct rt_train_plan *t)
{
    const int cores = t->threads > 0 ? t->threads : rt_cpu_count();
    const size_t room = (size_t)t->host / 8;
    const struct rt_micro_options o = {.k = t->o->k, .map = &t->o->map, .spans = t->o->boundary != NULL};
    if (t->loader_threads >= 0)
        t->o->loader_threads = t->loader_threads;
    else if (cores > 1)
        t->o->loader_threads = !t->d->be->own_memory ? 1 : cores / 2 > 8 ? 8 : cores / 2;
    const size_t two = rt_loader_bytes(&o, t->o->batch_tokens);
    t->o->loader_bytes = two < room ? two : room;
}

size_t rt_train_plan_need(const struct rt_train_plan *t)
{
    return rt_trainer_memory_on_device(&t->memory) + (t->d->be->own_memory ? 0 : t->memory.host);
}

/* ---- how a step is cut ---- */

/* What a product does while memory moves a byte (H100 and H200 in long runs: 650 TFLOP/s, 3 to 4 TB/s; two cores: 100 GFLOP/s, 15 GB/s), what it does for a
 * byte that moves beside it, what it does while an operation begins and ends, and the rows that a product's last wave of tiles wastes. The last three are
 * from steps of 16,384 tokens on an H200: in two micro-batches they take 1.1 % longer (1.5B) and 5 % (0.5B), in eight 7 % (1.5B); at level 1 1.2 % (1.5B).
 * An operation's beginning and end last 5 microseconds; where products are wide the GPU is at its power limit, and makes most of them up by its clock. */
static const struct pace {
    double byte, beside, begin, rows;
} paces[2] = {{7, 7, 0, 16}, {180, 20, 3.3e9, 32}};
enum { OPERATIONS_OF_A_LAYER = 32, NARROW = 896 /* hidden_size up to which they count in full */ };

double rt_train_cuts_cost(const struct rt_student_config *c, const struct rt_params *p, int64_t longest, bool gpu, const struct rt_train_cuts *x)
{
    const struct pace *pace = &paces[gpu];
    const double L = c->layers, H = (double)c->hidden, I = (double)c->intermediate, V = (double)c->vocab_size, m = (double)x->micro_tokens, act = gpu ? 2 : 4,
                 len = (double)longest, head = V * H, all = (double)p->matmul, operations = (double)x->operations;
    /* of a token: two normed states and SwiGLU's output written once more; gate and up; all else of the layers */
    const double again[] = {pace->byte * act * L * (2 * H + I), 4 * H * I * L + pace->byte * act * L * 2 * I,
                            2 * (all - head) - 4 * H * I * L + 2 * L * c->heads * c->head_dim * len + pace->byte * act * L * (8 * H + 3 * I)};
    const double narrow = fmin(1, NARROW / H), begin = pace->begin * narrow * narrow;
    double a_token = rt_student_flops_per_token(c, p, len), a_micro;
    for (int i = 0; i < x->recompute; i++)
        a_token += again[i] * (i == x->recompute - 1 ? (L - x->less) / L : 1);
    a_token *= 1 + pace->rows / m;
    /* weights are read twice, gradients read and written once a micro-batch */
    a_micro = pace->beside * (double)p->count * 4 * act + begin * OPERATIONS_OF_A_LAYER * L;
    if (gpu) { /* head_loss.c: the head's gradient is added to once a chunk, in float32 where that has room; logits are float32 where its copy has none */
        const bool f32 = 2 * head > operations / 4;
        const double room = operations - (f32 ? 0 : 2 * head), rows = (room > 8 * head ? room - 4 * head : room) / (2 * V);
        const double chunks = rows < m ? ceil(m / rows) : 0;
        a_micro += pace->byte * head * 8 * chunks;
        a_token += f32 ? pace->byte * 4 * V : 0;
    }
    return a_token + a_micro / m;
}

static void plan_cuts(struct rt_train_plan *t, const struct rt_train_cuts *x)
{
    t->o->micro_tokens = x->micro_tokens;
    t->o->recompute = x->recompute;
    t->o->recompute_less = x->less;
    rt_trainer_plan(t->c, t->p, t->o, t->longest, rt_device_act_size(t->d), &t->memory);
    t->memory.operations = x->operations;
    t->memory.host += t->data;
    const size_t copy = (size_t)(t->c->vocab_size * t->c->hidden) * rt_device_act_size(t->d);
    t->memory.measured = t->d->be->tune != NULL && copy <= x->operations ? copy : 0;
}

/* Of the operations' room as much as the limit leaves, in steps; where it shrinks, down to OPERATIONS_LEAST. */
static bool fits(struct rt_train_plan *t, struct rt_train_cuts *x, size_t limit)
{
    plan_cuts(t, x);
    const size_t need = rt_train_plan_need(t);
    if (need <= limit)
        return true;
    const size_t over = (need - limit + OPERATIONS_STEP - 1) / OPERATIONS_STEP * OPERATIONS_STEP;
    if (!t->shrinks || x->operations < over + OPERATIONS_LEAST)
        return false;
    x->operations -= over;
    plan_cuts(t, x);
    return true;
}

struct chosen {
    struct rt_train_cuts best;
    double cost; /* INFINITY: none yet */
};
/* Does x fit? It is the best so far where it costs less. */
static bool consider(struct rt_train_plan *t, struct rt_train_cuts x, size_t limit, struct chosen *to)
{
    if (!fits(t, &x, limit))
        return false;
    const double now = rt_train_cuts_cost(t->c, t->p, t->longest, t->d->be->own_memory, &x);
    if (now < to->cost)
        *to = (struct chosen){x, now};
    return true;
}

/* The cuts of the least cost that fit; else those that need least. Micro-batches of t->micro_tokens or halves of it, unless that is fixed; the level as asked
 * for, or at least 1 where the memory is everybody's, and then as many layers as fit a level below. A resumed run may have another level: the bits are the
 * same. */
static void choose_cuts(struct rt_train_plan *t, size_t limit)
{
    const bool automatic = t->recompute < 0;
    const int from = automatic ? t->d->be->own_memory ? 0 : 1 : t->recompute, to = automatic ? 3 : from;
    struct chosen chosen = {.cost = INFINITY};
    struct rt_train_cuts least = {0};
    for (int level = from; level <= to; level++)
        for (int64_t m = t->micro_tokens;; m /= 2) {
            struct rt_train_cuts x = {m > t->longest ? m : t->longest, level, 0, t->operations};
            least = x;
            if (t->shrinks && t->operations > OPERATIONS_LEAST)
                least.operations = OPERATIONS_LEAST;
            const int most_less = level == from ? 0 : t->c->layers - 1;
            while (consider(t, x, limit, &chosen) && x.less < most_less)
                x.less++;
            if (t->fixed || m <= t->longest || m <= MICRO_LEAST)
                break;
        }
    plan_cuts(t, chosen.cost < INFINITY ? &chosen.best : &least);
}

/* Micro-steps are recorded with memory that is left over, or that layers kept more in than they must: neither changes bits, so neither may change the other
 * cuts. */
static void choose_record(struct rt_train_plan *t, size_t limit)
{
    struct rt_train_cuts x = {t->o->micro_tokens, t->o->recompute, t->o->recompute_less, t->memory.operations};
    const int less = x.less;
    t->o->record = t->d->be->graph_begin != NULL;
    for (; x.less >= 0; x.less--) {
        plan_cuts(t, &x);
        if (rt_train_plan_need(t) <= limit)
            return;
    }
    t->o->record = false;
    x.less = less;
    plan_cuts(t, &x);
}

bool rt_train_plan_fit(struct rt_train_plan *t, size_t limit)
{
    t->o->record = false;
    plan_loader(t);
    choose_cuts(t, limit);
    choose_record(t, limit);
    return rt_train_plan_need(t) <= limit;
}

/* What is decoded ahead grows with the host's memory, and what is needed with it: so it is tried. */
int64_t rt_train_plan_enough(const struct rt_train_plan *t, size_t held, size_t *need)
{
    const size_t mib = (size_t)1 << 20;
    struct rt_train_plan x = *t;
    struct rt_trainer_options o = *t->o;
    x.o = &o;
    for (size_t n = (rt_train_plan_need(t) + held) / mib + 1;;) {
        x.host = t->d->be->own_memory ? t->host : (int64_t)(n * mib);
        const bool fit = rt_train_plan_fit(&x, n * mib - held);
        *need = rt_train_plan_need(&x);
        if (fit)
            return (int64_t)n;
        const size_t next = (*need + held) / mib + 1;
        n = next > n ? next : n + 1;
    }
}

int64_t rt_train_plan_shorter(const struct rt_train_plan *t, size_t limit)
{
    struct rt_train_plan x = *t;
    struct rt_trainer_options o = *t->o;
    x.o = &o;
    for (x.longest = t->longest / 2; x.longest > 1; x.longest /= 2)
        if (rt_train_plan_fit(&x, limit))
            return x.longest;
    return 0;
}
