/* How large a window is, and who gets which memory. */
#include "teacher/teacher.h"

enum {
    CHUNK_TOKENS = 4096,      /* attention buffers are sized for so many tokens, or for the longest sequence */
    CHUNK_GPU = 8192,         /* there: enough rows for a product's full rate */
    WINDOW_MOST = 1 << 20,
    WINDOW_UNKNOWN = 1 << 17, /* where the amount of data is not known */
    GROUP = 32,               /* experts whose rows are worked on together */
    HEAD_ROWS = 1024,         /* rows of logits that the head holds at a time */
};
#define MIB ((uint64_t)1 << 20)
/* Libraries' workspaces, modules and what fragments. */
#define GPU_FIXED (768 * MIB)
#define GPU_SCRATCH_MOST (6144 * MIB)

/* Of generation: [layers][slots][max_length] rows of the compressed cache. */
static uint64_t cache_bytes(const struct rt_teacher_options *o, const struct rt_teacher_config *c)
{
    return (uint64_t)c->layers * (uint64_t)o->slots * (uint64_t)o->max_length * (uint64_t)(c->kv_lora + c->dr) * rt_device_act_size(o->device);
}

/* As large as a window may become where memory does not matter. */
static int64_t largest_useful(const struct rt_teacher_options *o)
{
    const int64_t data = o->data_tokens > 0 ? o->data_tokens : WINDOW_UNKNOWN, most = o->window > 0 ? o->window : data < WINDOW_MOST ? data : WINDOW_MOST;
    return most > o->max_length ? most : o->max_length;
}

/* Device bytes of everything but weights for a window of n tokens. */
uint64_t rt_teacher_state_bytes(const struct rt_teacher_options *o, const struct rt_teacher_config *c, int64_t chunk, int64_t n)
{
    const size_t act = rt_device_act_size(o->device);
    const bool cached = o->slots > 0;
    uint64_t b = rt_layer_bytes(c, o->device, o->w8a8, cached, chunk, n);
    b += 2 * rt_arena_round((size_t)(o->max_length * (c->dr / 2)) * sizeof(float));
    b += rt_arena_round((size_t)n * (size_t)c->hidden * act) + 2 * rt_arena_round((size_t)n * sizeof(int32_t));
    if (cached)
        b += rt_arena_round(cache_bytes(o, c));
    return b + 64;
}

static enum rt_status plan_host(const struct rt_teacher_options *o, const struct rt_teacher_config *c, uint64_t largest, uint64_t model,
                           struct rt_teacher_plan *p, struct rt_err *err)
{
    char need[32], have[32];
    const uint64_t memory = o->memory > 0 ? (uint64_t)o->memory : 0;
    const uint64_t process = RT_TEACHER_PROCESS_BYTES + (uint64_t)(o->threads > 0 ? o->threads : 2) * RT_TEACHER_THREAD_BYTES;
    *p = (struct rt_teacher_plan){.model_bytes = model, .largest_part = largest};
    if (o->slots > 0) {
        p->window = p->chunk = o->batch_tokens;
        p->cache_bytes = cache_bytes(o, c);
    } else {
        p->chunk = o->max_length > CHUNK_TOKENS ? o->max_length : CHUNK_TOKENS;
        const int64_t most = largest_useful(o);
        if (p->chunk > most)
            p->chunk = most;
        if (o->chunk > 0)
            p->chunk = o->chunk > o->max_length ? o->chunk : o->max_length;
        const uint64_t one = rt_teacher_state_bytes(o, c, p->chunk, 1), two = rt_teacher_state_bytes(o, c, p->chunk, 1025);
        const uint64_t a_token = (two - one) / 1024 + (uint64_t)o->token_bytes + 1;
        /* two of the largest part: one in use, one on its way */
        const uint64_t fixed = one + process + 2 * largest;
        int64_t fits = memory > fixed ? (int64_t)((memory - fixed) / a_token) : 0;
        const int64_t least = o->window > 0 ? o->window : o->max_length;
        if (fits < least && p->chunk > o->max_length && o->chunk == 0) { /* a smaller chunk may do */
            p->chunk = o->max_length;
            const uint64_t small = rt_teacher_state_bytes(o, c, p->chunk, 1) + process + 2 * largest;
            fits = memory > small ? (int64_t)((memory - small) / a_token) : 0;
        }
        p->window = fits < most ? fits : most;
        if (p->window < o->max_length || (o->window > 0 && p->window < o->window))
            return rt_fail(err, RT_NOMEM, "%s: a window of %ld tokens needs %s of memory, --memory gives %s; raise it, use fewer --threads, or shorten sequences with --max-length",
                           o->dir, (long)(o->window > 0 ? o->window : o->max_length),
                           rt_human_bytes(need, rt_teacher_state_bytes(o, c, p->chunk, o->window > 0 ? o->window : o->max_length) + process + 2 * largest),
                           rt_human_bytes(have, memory));
    }
    p->window_bytes = rt_teacher_state_bytes(o, c, p->chunk, p->window) + (uint64_t)(p->window * o->token_bytes);
    if (p->window_bytes + process + largest > memory)
        return rt_fail(err, RT_NOMEM, "%s: states of %ld tokens and caches need %s, --memory gives %s; use fewer slots or shorter sequences", o->dir,
                       (long)p->window, rt_human_bytes(need, p->window_bytes + process + largest), rt_human_bytes(have, memory));
    p->weight_budget = memory - p->window_bytes - process;
    p->resident = p->weight_budget >= model;
    return RT_OK;
}

/* ---- devices with memory of their own ---- */

/* Scratch of operations: rows of a group of experts in all their forms (codes, gate and up, their product, what goes back), rows of logits, a
 * dequantised matrix. A function of the shapes alone: it divides the work, and with it where sums are rounded. */
static uint64_t scratch_bytes(const struct rt_teacher_options *o, const struct rt_teacher_config *c, int64_t n)
{
    const uint64_t H = (uint64_t)c->hidden, I = (uint64_t)c->moe_inter, rows = (uint64_t)n * (uint64_t)(c->experts > 0 ? c->top_k : 1);
    const uint64_t share = c->experts > GROUP ? (uint64_t)c->experts / GROUP : 1;
    const uint64_t group = rows / share * (5 * H + 7 * I) / 4 * 5; /* a quarter more than the mean group */
    const uint64_t head_rows = o->slots > 0 ? (uint64_t)n : HEAD_ROWS, head = 2 * head_rows * (uint64_t)c->vocab_size * sizeof(float);
    const uint64_t widest = (uint64_t)(c->inter > c->heads * c->dn ? c->inter : c->heads * c->dn), matrix = 4 * widest * H;
    uint64_t s = head > matrix ? head : matrix;
    s = group > s ? group : s;
    s = s > GPU_SCRATCH_MOST ? GPU_SCRATCH_MOST : s;
    return (s / MIB + 1) * MIB;
}

/* The ring at least: two groups of experts, one in use and one on its way, or two of the largest part. */
static uint64_t ring_bytes(const struct rt_teacher_config *c, const struct rt_teacher_sizes *z)
{
    const int group = c->experts < GROUP ? c->experts : GROUP;
    const uint64_t two = 2 * ((uint64_t)group + 2) * rt_arena_round(z->largest_expert);
    return two > 2 * z->largest_part ? two : 2 * z->largest_part;
}

/* With more memory a whole layer: what is copied while its attention is computed is then not waited for among its experts. */
static uint64_t ring_wanted(const struct rt_teacher_options *o, const struct rt_teacher_config *c, const struct rt_teacher_sizes *z, uint64_t budget)
{
    const uint64_t least = ring_bytes(c, z), layer = ((uint64_t)c->experts + 8) * rt_arena_round(z->largest_expert);
    const uint64_t most = o->gpu_ring > 0 ? (uint64_t)o->gpu_ring : layer > least ? layer : least;
    return most < budget ? most : budget;
}

static uint64_t gpu_need(const struct rt_teacher_options *o, const struct rt_teacher_config *c, int64_t chunk, int64_t n)
{
    return rt_teacher_state_bytes(o, c, chunk, n) + scratch_bytes(o, c, n) + GPU_FIXED;
}

/* The largest window up to `most` for which need + `weights` stays within the memory; 0: none of max_length. */
static int64_t largest_window(const struct rt_teacher_options *o, const struct rt_teacher_config *c, int64_t chunk, uint64_t weights,
                              uint64_t memory, int64_t most)
{
    int64_t lo = o->max_length - 1, hi = most;
    while (lo < hi) {
        const int64_t mid = lo + (hi - lo + 1) / 2;
        if (gpu_need(o, c, chunk, mid) + weights <= memory)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo >= o->max_length ? lo / 4 * 4 : 0;
}

static enum rt_status gpu_memory(const struct rt_teacher_options *o, uint64_t *out, struct rt_err *err)
{
    struct rt_dev_memory m;
    char have[32], asked[32];
    enum rt_status st;
    RT_TRY(o->device->be->memory(o->device->dev, &m, err));
    *out = o->gpu_memory > 0 ? (uint64_t)o->gpu_memory : m.free;
    if (*out > m.free)
        RT_FAIL(err, NOMEM, "--gpu-memory %s: %s of the GPU's memory are free", rt_human_bytes(asked, *out), rt_human_bytes(have, m.free));
out:
    return st;
}

static enum rt_status gpu_window(const struct rt_teacher_options *o, const struct rt_teacher_sizes *z, struct rt_teacher_plan *p,
                                 struct rt_err *err)
{
    const struct rt_teacher_config *c = &z->config;
    char need[32], have[32];
    const int64_t most = rt_act_rows(largest_useful(o));
    const int64_t at_most = o->chunk > 0 ? o->chunk : most < CHUNK_GPU ? most : CHUNK_GPU;
    p->chunk = rt_act_rows(at_most > o->max_length ? at_most : o->max_length);
    /* the ring first; in little memory, one part in use and one on its way */
    p->window = largest_window(o, c, p->chunk, ring_bytes(c, z), p->gpu_bytes, most);
    if (p->window < most && p->window < 8 * p->chunk) {
        const int64_t tight = largest_window(o, c, p->chunk, 2 * z->largest_part, p->gpu_bytes, most);
        p->window = tight > p->window ? tight : p->window;
    }
    if (p->window == 0 || (o->window > 0 && p->window < o->window)) {
        const int64_t n = o->window > 0 ? o->window : o->max_length;
        return rt_fail(err, RT_NOMEM, "%s: a window of %ld tokens needs %s of GPU memory, there are %s; raise --gpu-memory, or shorten sequences with --max-length",
                       o->dir, (long)n, rt_human_bytes(need, gpu_need(o, c, p->chunk, rt_act_rows(n)) + 2 * z->largest_part), rt_human_bytes(have, p->gpu_bytes));
    }
    return RT_OK;
}

static enum rt_status plan_gpu(const struct rt_teacher_options *o, const struct rt_teacher_sizes *z, struct rt_teacher_plan *p, struct rt_err *err)
{
    const struct rt_teacher_config *c = &z->config;
    const uint64_t memory = o->memory > 0 ? (uint64_t)o->memory : 0;
    char need[32], have[32];
    enum rt_status st;
    *p = (struct rt_teacher_plan){.model_bytes = z->model_bytes, .largest_part = z->largest_part};
    RT_TRY(gpu_memory(o, &p->gpu_bytes, err));
    if (o->slots > 0) {
        p->window = p->chunk = rt_act_rows(o->batch_tokens);
        p->cache_bytes = cache_bytes(o, c);
    } else {
        RT_TRY(gpu_window(o, z, p, err));
    }
    p->gpu_state = rt_teacher_state_bytes(o, c, p->chunk, p->window);
    p->gpu_scratch = scratch_bytes(o, c, p->window);
    const uint64_t taken = p->gpu_state + p->gpu_scratch + GPU_FIXED;
    if (taken + z->largest_part > p->gpu_bytes)
        RT_FAIL(err, NOMEM, "%s: states of %ld tokens and caches need %s of GPU memory, there are %s; use fewer slots or shorter sequences", o->dir,
                (long)p->window, rt_human_bytes(need, taken + z->largest_part), rt_human_bytes(have, p->gpu_bytes));
    p->gpu_weight_budget = p->gpu_bytes - taken;
    const uint64_t least = ring_bytes(c, z);
    const uint64_t model = z->model_bytes + z->model_bytes / 64; /* rounding of small tensors */
    const uint64_t table = (uint64_t)c->vocab_size * (uint64_t)c->hidden * rt_device_act_size(o->device) + RT_TEACHER_EMBED_IDS * sizeof(int32_t);
    if (p->gpu_weight_budget >= model + table || (p->gpu_weight_budget < model && p->gpu_weight_budget >= least + table))
        p->gpu_embed = table;
    p->gpu_weight_budget -= p->gpu_embed;
    p->gpu_resident = p->gpu_weight_budget >= model;
    p->gpu_ring = ring_wanted(o, c, z, p->gpu_weight_budget);
    p->window_bytes = (uint64_t)(p->window * o->token_bytes);
    const uint64_t host = p->window_bytes + RT_TEACHER_DRIVER_BYTES + z->staging;
    if (host > memory)
        RT_FAIL(err, NOMEM, "%s: outputs of a window of %ld tokens and staging for its weights need %s of host memory, --memory gives %s", o->dir,
                (long)p->window, rt_human_bytes(need, host), rt_human_bytes(have, memory));
    p->weight_budget = memory - p->window_bytes - RT_TEACHER_DRIVER_BYTES;
    p->resident = p->gpu_resident || (p->weight_budget - z->staging) * (uint64_t)(o->devices > 1 ? o->devices : 1) >= z->model_room;
out:
    return st;
}

enum rt_status rt_teacher_plan_sizes(const struct rt_teacher_options *o, const struct rt_teacher_sizes *sizes, struct rt_teacher_plan *out,
                                     struct rt_err *err)
{
    if (o->device->be->own_memory)
        return plan_gpu(o, sizes, out, err);
    return plan_host(o, &sizes->config, sizes->largest_part, sizes->model_bytes, out, err);
}

enum rt_status rt_teacher_plan_memory(const struct rt_teacher_options *o, struct rt_teacher_plan *out, struct rt_err *err)
{
    struct rt_teacher_sizes sizes;
    const enum rt_status st = rt_teacher_measure(o, &sizes, err);
    return st == RT_OK ? rt_teacher_plan_sizes(o, &sizes, out, err) : st;
}

