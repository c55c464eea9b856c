#include "distill/generate.h"

#include <stdio.h>
#include <string.h>

#include "distill/lines.h"

enum {
    SLOTS_RESIDENT = 64,   /* enough for the products of a step to be matrices */
    SLOTS_GPU = 256,       /* a student's on a device of its own: its weights are read once a step, however many share them */
    SLOTS_STREAMED = 1024, /* each step reads all weights: the more sequences share it, the better */
    PROMPT_CHUNK = 128,    /* entries of a step beyond one a slot: prompts go through in chunks */
    PROMPT_CHUNK_STREAMED = 512,
};

/* ---- the engine ---- */

static int chunk_of(int slots)
{
    return slots + (slots > SLOTS_RESIDENT ? PROMPT_CHUNK_STREAMED : PROMPT_CHUNK);
}

/* Whether all weights stay where they are used. */
static bool at_hand(const struct rt_teacher_options *o, const struct rt_teacher_plan *p)
{
    return o->device->be->own_memory ? p->gpu_resident : p->resident;
}

static int at_most(int slots, int64_t sequences)
{
    return sequences > 0 && sequences < slots ? (int)sequences : slots;
}

/* The most slots that fit; where weights could stay in memory with fewer, not so many that they no longer do. */
static enum rt_status plan_slots(struct rt_teacher_options *o, const struct rt_teacher_sizes *sizes, int asked, int64_t sequences,
                                 struct rt_teacher_plan *plan, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const bool planned = asked == 0;
    for (int slots = planned ? at_most(SLOTS_RESIDENT, sequences) : asked;; slots /= 2) {
        struct rt_err e = {0};
        o->slots = slots;
        o->batch_tokens = chunk_of(slots);
        st = rt_teacher_plan_sizes(o, sizes, plan, &e);
        if (planned && slots > 1 && (st == RT_NOMEM || (st == RT_OK && !at_hand(o, plan) && slots > 8)))
            continue;
        if (st != RT_OK)
            return rt_fail(err, st, "%s", e.msg);
        break;
    }
    if (!planned || at_hand(o, plan))
        return RT_OK;
    /* streamed whatever the slots: as many as half of the memory holds */
    for (int slots = at_most(SLOTS_STREAMED, sequences); slots > o->slots; slots /= 2) {
        struct rt_teacher_options more = *o;
        struct rt_teacher_plan p;
        more.slots = slots;
        more.batch_tokens = chunk_of(slots);
        if (rt_teacher_plan_sizes(&more, sizes, &p, NULL) != RT_OK)
            continue;
        if (o->device->be->own_memory ? p.gpu_state < p.gpu_bytes / 2 : p.window_bytes < (uint64_t)o->memory / 2) {
            *o = more;
            *plan = p;
            break;
        }
    }
    return RT_OK;
}

enum rt_status rt_generator_teacher(const char *dir, const struct rt_device *device, const struct rt_generator_options *o, bool plan_only,
                                    struct rt_generator *out, struct rt_err *err)
{
    struct rt_teacher_config c;
    struct rt_teacher_sizes sizes;
    struct rt_teacher_options to = {.dir = dir, .device = device, .w8a8 = o->w8a8, .memory = o->memory, .gpu_memory = o->gpu_memory,
                                    .max_length = o->max_len};
    enum rt_status st;
    *out = (struct rt_generator){0};
    RT_TRY(rt_teacher_config_load(dir, &c, err));
    if (to.max_length > c.max_position)
        to.max_length = c.max_position;
    RT_TRY(rt_teacher_measure(&to, &sizes, err));
    RT_TRY(plan_slots(&to, &sizes, o->slots, o->sequences, &out->plan, err));
    out->slots = (int)to.slots;
    out->budget = (int)to.batch_tokens;
    out->max_len = to.max_length;
    out->vocab = c.vocab_size;
    if (plan_only)
        return RT_OK;
    RT_TRY(rt_teacher_open(&to, &out->teacher, err));
    RT_TRY(rt_teacher_decoder_create(out->teacher, &out->teacher_decoder, err));
    out->step = rt_teacher_decoder_step(out->teacher_decoder);
out:
    if (st != RT_OK)
        rt_generator_close(out);
    return st;
}

enum rt_status rt_generator_student(struct rt_student *s, const struct rt_generator_options *o, struct rt_generator *out,
                                    struct rt_err *err)
{
    const struct rt_student_config *c = rt_student_config(s);
    const size_t act = rt_device_act_size(rt_student_device(s));
    const int planned = rt_student_device(s)->be->own_memory ? SLOTS_GPU : SLOTS_RESIDENT;
    struct rt_decoder_options d = {.slots = o->slots > 0 ? o->slots : at_most(planned, o->sequences), .max_len = o->max_len};
    const size_t memory = o->memory > 0 ? (size_t)o->memory : 0;
    enum rt_status st;
    *out = (struct rt_generator){0};
    if (d.max_len > rt_student_max_length(s))
        d.max_len = rt_student_max_length(s);
    /* sequences share what memory is left for their caches; fewer of them where it would not hold a fourth of their full length */
    for (;; d.slots = (d.slots + 1) / 2) {
        d.budget = chunk_of(d.slots);
        d.tokens = rt_student_decoder_tokens(c, &d, act, memory);
        if (o->slots > 0 || d.slots == 1 || d.tokens >= (int64_t)d.slots * d.max_len / 4)
            break;
    }
    if (d.tokens == 0) {
        char need[32], have[32];
        d.tokens = d.max_len;
        RT_FAIL(err, NOMEM, "generating with %d sequences of up to %ld tokens at a time needs %s, %s are left; use fewer slots or shorter sequences", d.slots,
                (long)d.max_len, rt_human_bytes(need, rt_student_decoder_bytes(c, &d, act)), rt_human_bytes(have, (uint64_t)memory));
    }
    RT_TRY(rt_student_decoder_create(s, &d, &out->student_decoder, err));
    out->slots = d.slots;
    out->budget = d.budget;
    out->max_len = d.max_len;
    out->vocab = c->vocab_size;
    out->step = rt_student_decoder_step(out->student_decoder);
out:
    if (st != RT_OK)
        rt_generator_close(out);
    return st;
}

void rt_generator_close(struct rt_generator *g)
{
    rt_teacher_decoder_free(g->teacher_decoder);
    rt_teacher_close(g->teacher);
    rt_student_decoder_free(g->student_decoder);
    *g = (struct rt_generator){0};
}

/* ---- the run ---- */

/* Of one request, until its last sample has ended. */
struct pending {
    struct pending *next, **back; /* back: what points here */
    int64_t line;
    int first_sample, left;
    void *user;
};

struct run {
    const struct rt_generate_options *o;
    struct rt_batch *batch;
    struct pending *pending;
    int64_t outstanding, enough; /* sequences added and not ended */
    bool at_end;
};

static void drop(struct pending *p)
{
    *p->back = p->next;
    if (p->next != NULL)
        p->next->back = p->back;
    rt_free(p);
}

static enum rt_status add(struct run *r, const struct rt_generate_prompt *in, struct rt_err *err)
{
    enum rt_status st;
    struct pending *p;
    if (in->line < 0 || in->line >= (int64_t)1 << 43 || in->first_sample < 0 || in->n_samples < 1 ||
        in->n_samples > RT_GENERATE_MAX_SAMPLES - in->first_sample)
        return rt_fail(err, RT_USAGE, "generation: line %ld with samples %d..%d: lines are below 2^43, samples below %d", (long)in->line,
                       in->first_sample, in->first_sample + in->n_samples, RT_GENERATE_MAX_SAMPLES);
    RT_TRY(rt_alloc(1, sizeof *p, "a prompt", &p, err));
    *p = (struct pending){.next = r->pending, .back = &r->pending, .line = in->line, .first_sample = in->first_sample, .left = in->n_samples, .user = in->user};
    if (p->next != NULL)
        p->next->back = &p->next;
    r->pending = p;
    const struct rt_batch_request q = {
        .prompt = (const int32_t *)in->ids, /* u32 in files, int32 here: ids are below 2^31 (the batch checks them) */
        .n_prompt = in->n,
        .stream = ((uint64_t)in->line << 20) + (uint64_t)in->first_sample,
        .n_samples = in->n_samples,
        .max_new = r->o->max_new,
        .stop_ids = r->o->stop_ids,
        .n_stop = r->o->n_stop,
        .user = p,
    };
    r->outstanding += in->n_samples;
    RT_TRY(rt_batch_add(r->batch, &q, NULL, err));
out:
    return st;
}

static enum rt_status refill(struct run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    while (!r->at_end && r->outstanding < r->enough) {
        struct rt_generate_prompt p = {0};
        bool wait = false;
        RT_TRY(r->o->next(r->o->self, &p, &r->at_end, &wait, err));
        if (wait && !r->at_end && r->outstanding == 0)
            RT_FAIL(err, INTERNAL, "generation: the source of prompts waits, but nothing runs");
        if (wait || r->at_end)
            break;
        RT_TRY(add(r, &p, err));
    }
out:
    return st;
}

static enum rt_status on_finish(void *self, const struct rt_batch_result *b, struct rt_err *err)
{
    struct run *r = self;
    struct pending *p = b->user;
    enum rt_status st;
    struct rt_generated g = {
        .line = p->line,
        .sample = p->first_sample + b->sample,
        .user = p->user,
        .prompt = (const uint32_t *)b->prompt,
        .ids = (const uint32_t *)b->ids,
        .logprobs = b->logprobs,
        .n_prompt = b->n_prompt,
        .n = b->n,
        .finish = b->finish,
    };
    for (int64_t i = 0; i < g.n; i++)
        g.logprob += g.logprobs[i];
    g.logprob /= g.n > 0 ? (double)g.n : 1;
    r->outstanding--;
    if (--p->left == 0)
        drop(p);
    RT_TRY(r->o->done(r->o->self, &g, err));
    RT_TRY(refill(r, err));
out:
    return st;
}

static void on_progress(void *self, const struct rt_batch_stats *stats)
{
    const struct run *r = self;
    if (r->o->progress != NULL)
        r->o->progress(r->o->self, stats);
}

static bool on_stop(void *self)
{
    const struct run *r = self;
    return r->o->stop != NULL && r->o->stop(r->o->stop_self);
}

enum rt_status rt_generate(const struct rt_generator *g, const struct rt_generate_options *o, struct rt_batch_stats *stats,
                           struct rt_err *err)
{
    struct run r = {.o = o, .enough = 3 * (int64_t)g->slots};
    const struct rt_batch_options bo = {.slots = g->slots, .budget = g->budget, .max_len = g->max_len, .n_ids = o->n_ids, .seed = o->seed,
                                        .sample = o->sample, .pool = o->pool, .on_finish = on_finish, .progress = on_progress,
                                        .stop = on_stop, .ctx = &r};
    enum rt_status st;
    if (o->n_ids > g->vocab)
        RT_FAIL(err, USAGE, "generation: %ld ids, but the model's vocabulary has %ld rows", (long)o->n_ids, (long)g->vocab);
    RT_TRY(rt_batch_create(&bo, &g->step, &r.batch, err));
    do {
        RT_TRY(refill(&r, err));
        RT_TRY(rt_batch_run(r.batch, err));
    } while (!r.at_end);
out:
    if (stats != NULL) {
        *stats = (struct rt_batch_stats){0};
        if (r.batch != NULL)
            rt_batch_stats(r.batch, stats);
    }
    rt_batch_free(r.batch);
    while (r.pending != NULL)
        drop(r.pending);
    return st;
}

/* ---- text ---- */

static void put_stop(int64_t id, int32_t *out, int *n)
{
    for (int i = 0; i < *n; i++)
        if (out[i] == id)
            return;
    if (id >= 0 && id <= INT32_MAX && *n < RT_GENERATE_MAX_STOP)
        out[(*n)++] = (int32_t)id;
}

int rt_generate_stop_ids(const struct rt_model_dir *m, const int32_t *eos, int n_eos, int32_t out[RT_GENERATE_MAX_STOP])
{
    int n = 0;
    if (m->tmpl != NULL && rt_template_end_id(m->tmpl) != UINT32_MAX)
        put_stop(rt_template_end_id(m->tmpl), out, &n);
    if (m->tok != NULL)
        put_stop(rt_tokenizer_eos(m->tok), out, &n);
    for (int i = 0; i < n_eos; i++)
        put_stop(eos[i], out, &n);
    return n;
}

enum rt_status rt_generated_text(const struct rt_generated *g, const struct rt_tokenizer *tok, const struct rt_template *tmpl,
                                 enum rt_thinking thinking, struct rt_buf *out, bool *lossy, struct rt_err *err)
{
    struct rt_buf raw = {0};
    enum rt_status st;
    bool bad = false;
    const size_t n = (size_t)(g->n - (g->finish == RT_FINISH_STOP && g->n > 0 ? 1 : 0));
    out->len = 0;
    if (tmpl != NULL)
        RT_TRY(rt_buf_puts(out, rt_template_forced(tmpl, thinking), err));
    RT_TRY(rt_tokenizer_decode(tok, g->ids, n, false, &raw, err));
    RT_TRY(rt_put_utf8(raw.data, raw.len, out, &bad, err));
    if (lossy != NULL)
        *lossy = bad;
    RT_TRY(rt_buf_puts(out, "", err)); /* a terminating 0 */
out:
    rt_buf_free(&raw);
    return st;
}
