/* cuDNN, opened at run time: the library, its plans, and attention calls as runs of plans. */
#include "core/cuda/dnn.h"

#include <stdio.h>

#if __has_include(<cudnn.h>)

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

#include "core/cuda/attn.h"
#include "core/cuda/dnn_attn.h"
#include "core/mem.h"

enum {
    PLANS = 64,
    OLDEST = 91100, /* 9.11: what masks hold, and errors of 9.10 */
    LENGTH_STEP = 128,
    SAME_LENGTH_STEP = 256, /* sequences of one length that is a multiple of this get a plan of their own, without padding */
};
static const double worth = 4e9; /* floating-point operations of a call below which launching is what counts */

/* Sequences that have rows: their number, the greatest length, whether all have it; floating-point operations of the forward. */
struct lengths {
    int64_t n, most;
    bool same;
    double flop;
};
static struct lengths lengths_of(const struct rt_attn_shape *s)
{
    struct lengths l = {.same = true};
    for (int64_t i = 0; i < s->n_seq; i++) {
        const int64_t len = s->cu_seqlens[i + 1] - s->cu_seqlens[i];
        if (len == 0)
            continue;
        l.same = l.same && (l.n == 0 || len == l.most);
        l.n++;
        l.most = len > l.most ? len : l.most;
        l.flop += (double)s->nh * (s->dqk + s->dv) * (double)len * (double)len;
    }
    return l;
}

/* A kept plan, or why there is none. */
struct entry {
    struct rt_dnn_attn key;
    struct rt_dnn_graph *graph;
    struct rt_dnn_plan plan;
    uint64_t used; /* 0: empty */
    char why[160]; /* "": there is a plan */
};

struct rt_cuda_dnn {
    struct rt_dnn_api api;
    pthread_mutex_t lock; /* the handle has one stream at a time */
    uint64_t clock;
    struct entry entry[PLANS];
};

/* ---- the library ---- */

static bool load(struct rt_dnn_api *api, char *why, int cap)
{
    static const char *const names[] = {"libcudnn.so.9", NULL};
    api->module = rt_cuda_dlopen(names);
    if (api->module == NULL) {
        snprintf(why, (size_t)cap, "libcudnn.so.9 was not found");
        return false;
    }
#define RT_DNN_LOAD(name) \
    do { \
        void *entry_ = dlsym(api->module, #name); \
        if (entry_ == NULL) { \
            snprintf(why, (size_t)cap, "libcudnn.so.9 has no " #name); \
            return false; \
        } \
        memcpy(&api->name, &entry_, sizeof entry_); \
    } while (0);
    RT_DNN_ENTRIES(RT_DNN_LOAD)
#undef RT_DNN_LOAD
    api->version = api->cudnnGetVersion();
    if (api->version < OLDEST) {
        snprintf(why, (size_t)cap, "cuDNN %zu.%zu is older than 9.11", api->version / 10000, api->version / 100 % 100);
        return false;
    }
    return true;
}

enum rt_status rt_cuda_dnn_open(__attribute__((unused)) struct rt_dev *dev, struct rt_cuda_dnn **out, char *why, int cap, struct rt_err *err)
{
    struct rt_cuda_dnn *dnn = NULL;
    enum rt_status st;
    *out = NULL;
    RT_TRY(rt_alloc(1, sizeof *dnn, "cuDNN's plans", &dnn, err));
    if (pthread_mutex_init(&dnn->lock, NULL) != 0)
        RT_FAIL(err, INTERNAL, "cannot make a lock");
    if (!load(&dnn->api, why, cap)) {
        rt_cuda_dnn_close(dnn);
        return RT_OK;
    }
    *out = dnn;
    return RT_OK;
out:
    rt_free(dnn);
    return st;
}

static void entry_clear(const struct rt_dnn_api *api, struct entry *e)
{
    rt_dnn_plan_free(api, &e->plan);
    if (e->graph != NULL)
        rt_dnn_graph_end(e->graph);
    rt_free(e->graph);
    memset(e, 0, sizeof *e);
}

void rt_cuda_dnn_close(struct rt_cuda_dnn *dnn)
{
    if (dnn == NULL)
        return;
    for (int i = 0; i < PLANS; i++)
        entry_clear(&dnn->api, &dnn->entry[i]);
    if (dnn->api.handle != NULL)
        dnn->api.cudnnDestroy(dnn->api.handle);
    if (dnn->api.module != NULL)
        dlclose(dnn->api.module);
    pthread_mutex_destroy(&dnn->lock);
    rt_free(dnn);
}

/* ---- plans ---- */

/* The entry of a shape, made if it is new; in place of the one used longest ago if need be. */
static enum rt_status entry_of(struct rt_cuda_dnn *dnn, const struct rt_dnn_attn *key, struct entry **out, struct rt_err *err)
{
    struct entry *e = &dnn->entry[0];
    enum rt_status st;
    for (int i = 0; i < PLANS; i++) {
        if (dnn->entry[i].used != 0 && memcmp(&dnn->entry[i].key, key, sizeof *key) == 0) {
            dnn->entry[i].used = ++dnn->clock;
            *out = &dnn->entry[i];
            return RT_OK;
        }
        e = dnn->entry[i].used < e->used ? &dnn->entry[i] : e;
    }
    entry_clear(&dnn->api, e);
    RT_TRY(rt_alloc(1, sizeof *e->graph, "a graph of cuDNN", &e->graph, err));
    e->key = *key;
    e->used = ++dnn->clock;
    rt_dnn_graph_begin(e->graph, &dnn->api);
    rt_dnn_attn_graph(e->graph, key);
    if (!rt_dnn_plan_make(e->graph, true, &e->plan, e->why, sizeof e->why) && e->why[0] == '\0')
        snprintf(e->why, sizeof e->why, "no plan");
    *out = e;
out:
    return st;
}

/* ---- calls ---- */

/* Few shapes for many batches: powers of two. */
static int64_t round_up(int64_t x, int64_t least)
{
    int64_t r = least;
    while (r < x)
        r *= 2;
    return r;
}

/* A call: the shape of its plan, and what runs of the plan need. */
struct call {
    struct rt_dev *dev;
    struct rt_queue *q;
    const struct rt_attn_shape *s;
    struct rt_dnn_attn key;
    struct entry *entry;
    char *lists; /* device: offsets and lengths, or NULL */
};

static struct rt_dnn_attn key_of(const struct rt_attn_shape *s, const struct lengths *l, const int64_t ld[6])
{
    struct rt_dnn_attn k;
    memset(&k, 0, sizeof k);
    k.ragged = !l->same || l->most % SAME_LENGTH_STEP != 0;
    k.padded = k.ragged;
    k.batch = k.ragged ? round_up(l->n, 1) : l->n;
    k.rows = k.ragged ? round_up(l->most, LENGTH_STEP) : l->most;
    k.heads = s->nh, k.kv_heads = s->nkv, k.dqk = s->dqk, k.dv = s->dv;
    k.q_ld = ld[0], k.q_head = ld[1], k.k_ld = ld[2], k.k_head = ld[3], k.v_ld = ld[4], k.v_head = ld[5], k.o_ld = (int64_t)s->nh * s->dv;
    return k;
}

/* c->lists = five arrays of offsets (q, k, v, o, statistics) [batch + 1], then lengths [batch]; entries without rows behind those that have some. */
static enum rt_status upload_lists(struct call *c, struct rt_err *err)
{
    const int64_t B = c->key.batch, unit[5] = {c->key.q_ld, c->key.k_ld, c->key.v_ld, c->key.o_ld, c->key.heads};
    const size_t bytes = (size_t)(5 * (B + 1)) * sizeof(int64_t) + (size_t)B * sizeof(int32_t);
    int64_t *off = NULL, at = 0;
    enum rt_status st;
    RT_TRY(rt_cuda_not_recorded(c->q, "cuDNN's attention over sequences of several lengths", err));
    RT_TRY(rt_alloc(bytes, 1, "lists of sequences", &off, err));
    int32_t *len = (int32_t *)(off + 5 * (B + 1));
    for (int64_t i = 0; i < c->s->n_seq; i++) {
        if (c->s->cu_seqlens[i + 1] == c->s->cu_seqlens[i])
            continue;
        for (int u = 0; u < 5; u++)
            off[u * (B + 1) + at] = c->s->cu_seqlens[i] * unit[u];
        len[at++] = c->s->cu_seqlens[i + 1] - c->s->cu_seqlens[i];
    }
    for (; at <= B; at++)
        for (int u = 0; u < 5; u++)
            off[u * (B + 1) + at] = c->s->n * unit[u];
    RT_TRY(rt_cuda_temp(c->q, bytes, &c->lists, err));
    RT_CUDA_TRY(cudaMemcpyAsync(c->lists, off, bytes, cudaMemcpyHostToDevice, c->q->stream)); /* pageable: read before the call returns */
out:
    rt_free(off);
    return st;
}

enum { POINTERS = RT_DNN_UIDS };
struct pack {
    int n;
    int64_t uid[POINTERS];
    void *data[POINTERS];
};
static void put(struct pack *p, enum rt_dnn_uid uid, const void *data)
{
    p->uid[p->n] = uid;
    memcpy(&p->data[p->n++], &data, sizeof data);
}

/* Runs the plan with the tensors in p, to which lists and scalars are added. */
static enum rt_status run(struct call *c, struct pack *p, struct rt_err *err)
{
    const struct rt_dnn_plan *plan = &c->entry->plan;
    const struct rt_dnn_api *api = &c->dev->dnn->api;
    const int64_t step = (c->key.batch + 1) * (int64_t)sizeof(int64_t);
    const float one = 1, never = -INFINITY, scale = c->s->scale;
    void *workspace = NULL;
    enum rt_status st;
    if (c->key.ragged) {
        put(p, RT_DNN_OFF_Q, c->lists);
        put(p, RT_DNN_OFF_K, c->lists + step);
        put(p, RT_DNN_OFF_V, c->lists + 2 * step);
        put(p, RT_DNN_OFF_O, c->lists + 3 * step);
        if (c->key.stats)
            put(p, RT_DNN_OFF_S, c->lists + 4 * step);
        put(p, RT_DNN_LEN, c->lists + 5 * step);
    }
    put(p, RT_DNN_SCALE, &scale);
    put(p, RT_DNN_NEVER, &never);
    if (c->key.backward)
        put(p, RT_DNN_ONE, &one);
    RT_TRY(rt_cuda_temp(c->q, (size_t)plan->workspace, &workspace, err));
    if (api->cudnnSetStream(api->handle, c->q->stream) != CUDNN_STATUS_SUCCESS)
        RT_FAIL(err, DEVICE, "cuDNN does not take the stream");
    st = rt_dnn_plan_run(api, plan, p->n, p->uid, p->data, workspace, err);
out:
    rt_cuda_temp_free(c->q, workspace);
    return st;
}

static enum rt_status ensure_handle(struct rt_cuda_dnn *dnn, struct rt_err *err)
{
    if (dnn->api.handle != NULL)
        return RT_OK;
    const cudnnStatus_t s = dnn->api.cudnnCreate(&dnn->api.handle);
    return s == CUDNN_STATUS_SUCCESS ? RT_OK : rt_fail(err, RT_DEVICE, "cuDNN does not start: %s", dnn->api.cudnnGetErrorString(s));
}

static enum rt_status refuse(const char *op, const char *why, bool must, struct rt_err *err)
{
    return must ? rt_fail(err, RT_UNSUPPORTED, "%s: cuDNN: %s", op, why) : RT_OK;
}

/* c->entry = the plan, or NULL where there is none (an error with `must`); and the lists. The lock is held. */
static enum rt_status prepare(struct call *c, const char *op, bool must, struct rt_err *err)
{
    struct entry *e;
    enum rt_status st;
    RT_TRY(ensure_handle(c->dev->dnn, err));
    RT_TRY(entry_of(c->dev->dnn, &c->key, &e, err));
    if (e->why[0] != '\0') {
        snprintf(c->dev->dnn_why, sizeof c->dev->dnn_why, "%s", e->why);
        return refuse(op, e->why, must, err);
    }
    c->entry = e;
    if (c->key.ragged)
        RT_TRY(upload_lists(c, err));
out:
    return st;
}

static const char *unfit(const struct rt_dev *dev, const struct rt_attn_shape *s, const struct lengths *l, const int64_t ld[6], bool must)
{
    if (dev->dnn == NULL)
        return dev->dnn_why;
    if (!must && l->flop < worth)
        return "a small call";
    if (s->dqk % 8 != 0 || s->dv % 8 != 0 || s->dqk > 256 || s->dv > 256)
        return "heads that are no multiple of 8 elements, or have more than 256";
    for (int i = 0; i < 6; i++)
        if (ld[i] % 8 != 0)
            return "rows that are not 16-byte aligned";
    return NULL;
}

static bool aligned(const void *const *p, int n)
{
    bool yes = true;
    for (int i = 0; i < n; i++)
        yes = yes && (uintptr_t)p[i] % 16 == 0;
    return yes;
}

enum rt_status rt_cuda_dnn_attn_fwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_fwd_args *a, bool must, bool *done,
                                    struct rt_err *err)
{
    const int64_t ld[6] = {a->q_ld, a->q_head, a->k_ld, a->k_head, a->v_ld, a->v_head};
    const void *const pointers[] = {a->q, a->k, a->v, a->o};
    const struct lengths l = lengths_of(&a->s);
    struct call c = {.dev = dev, .q = q, .s = &a->s, .key = key_of(&a->s, &l, ld)};
    struct pack p = {0};
    float *stats = NULL;
    enum rt_status st;
    const char *why = unfit(dev, &a->s, &l, ld, must);
    *done = false;
    if (why == NULL && !aligned(pointers, 4))
        why = "rows that are not 16-byte aligned";
    if (why != NULL)
        return refuse("attn_fwd", why, must, err);
    c.key.stats = a->lse != NULL;
    const bool direct = !c.key.ragged && c.key.batch == 1; /* [1, heads, rows] is what the caller wants */
    pthread_mutex_lock(&dev->dnn->lock);
    RT_TRY(prepare(&c, "attn_fwd", must, err));
    if (c.entry == NULL)
        goto out;
    if (c.key.stats && !direct)
        RT_TRY(rt_cuda_temp(q, (size_t)(a->s.n * a->s.nh) * sizeof *stats, &stats, err));
    put(&p, RT_DNN_Q, a->q);
    put(&p, RT_DNN_K, a->k);
    put(&p, RT_DNN_V, a->v);
    put(&p, RT_DNN_O, a->o);
    if (c.key.stats)
        put(&p, RT_DNN_LSE, direct ? a->lse : stats);
    RT_TRY(run(&c, &p, err));
    if (stats != NULL)
        RT_TRY(rt_cuda_attn_stats(q, &(struct rt_cuda_stats){.lse = a->lse, .packed = stats, .lse_ld = a->s.n, .n = a->s.n, .heads = a->s.nh,
                                                             .rows = c.key.ragged ? 0 : c.key.rows, .to_lse = true}, err));
    *done = true;
out:
    rt_cuda_temp_free(q, stats);
    rt_cuda_temp_free(q, c.lists);
    pthread_mutex_unlock(&dev->dnn->lock);
    return st;
}

/* Cuts k so that what the deterministic engines keep, dS of all its heads, stays under `bytes`: fewer batch entries, then fewer key heads, the same
 * number in every run. false: not even one will do. */
static bool divide(struct rt_dnn_attn *k, double bytes)
{
    const int64_t group = k->heads / k->kv_heads;
    const double each = 2.0 * (double)group * (double)k->rows * (double)k->rows;
    while ((double)(k->batch * k->kv_heads) * each > bytes) {
        int64_t *cut = !k->ragged && k->batch > 1 ? &k->batch : &k->kv_heads, less = *cut - 1;
        while (less > 0 && *cut % less != 0)
            less--;
        if (less <= 0)
            return false;
        *cut = less;
    }
    k->heads = k->kv_heads * group;
    return true;
}

/* One run of the plan: batch entries from b0, key heads from hk0. */
static enum rt_status backward_part(struct call *c, const struct rt_attn_bwd_args *a, float *stats, int64_t b0, int64_t hk0, struct rt_err *err)
{
    const struct rt_dnn_attn *k = &c->key;
    const int64_t row = b0 * k->rows, h0 = hk0 * (k->heads / k->kv_heads);
    const int64_t q = row * k->q_ld + h0 * k->q_head, kk = row * k->k_ld + hk0 * k->k_head, v = row * k->v_ld + hk0 * k->v_head,
                  o = row * k->o_ld + h0 * k->dv;
    typedef uint16_t act;
    const struct {
        enum rt_dnn_uid uid;
        const void *data;
    } tensors[] = {{RT_DNN_Q, (const act *)a->q + q},        {RT_DNN_K, (const act *)a->k + kk}, {RT_DNN_V, (const act *)a->v + v},
                   {RT_DNN_O, (const act *)a->o + o},        {RT_DNN_LSE, stats},                {RT_DNN_DO, (const act *)a->dout + o},
                   {RT_DNN_DQ, (act *)a->dq + q},            {RT_DNN_DK, (act *)a->dk + kk},     {RT_DNN_DV, (act *)a->dv + v},
                   {RT_DNN_DELTA, a->delta}};
    struct pack p = {0};
    const enum rt_status st =
        rt_cuda_attn_stats(c->q, &(struct rt_cuda_stats){.lse = (float *)(uintptr_t)(a->lse + h0 * c->s->n + row), .packed = stats, .lse_ld = c->s->n,
                                                         .n = k->ragged ? c->s->n : k->batch * k->rows, .heads = (int)k->heads,
                                                         .rows = k->ragged ? 0 : k->rows}, err);
    if (st != RT_OK)
        return st;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        put(&p, tensors[i].uid, tensors[i].data);
    return run(c, &p, err);
}

enum rt_status rt_cuda_dnn_attn_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_bwd_args *a, bool must, bool *done,
                                    struct rt_err *err)
{
    const int64_t ld[6] = {a->q_ld, a->q_head, a->k_ld, a->k_head, a->v_ld, a->v_head};
    const void *const pointers[] = {a->q, a->k, a->v, a->o, a->dout, a->dq, a->dk, a->dv};
    const struct lengths l = lengths_of(&a->s);
    struct call c = {.dev = dev, .q = q, .s = &a->s, .key = key_of(&a->s, &l, ld)};
    const int64_t batch = c.key.batch;
    float *stats = NULL;
    enum rt_status st;
    const char *why = unfit(dev, &a->s, &l, ld, must);
    *done = false;
    if (why == NULL && !aligned(pointers, 8))
        why = "rows that are not 16-byte aligned";
    if (why == NULL && !divide(&c.key, (double)dev->scratch))
        why = "a deterministic backward would need more than the scratch memory";
    if (why != NULL)
        return refuse("attn_bwd", why, must, err);
    c.key.stats = c.key.backward = true;
    pthread_mutex_lock(&dev->dnn->lock);
    RT_TRY(prepare(&c, "attn_bwd", must, err));
    if (c.entry == NULL)
        goto out;
    RT_TRY(rt_cuda_temp(q, (size_t)(a->s.n * a->s.nh) * sizeof *stats, &stats, err));
    for (int64_t b = 0; b < batch; b += c.key.batch) /* ragged: all entries in one run */
        for (int64_t hk = 0; hk < a->s.nkv; hk += c.key.kv_heads)
            RT_TRY(backward_part(&c, a, stats, b, hk, err));
    *done = true;
out:
    rt_cuda_temp_free(q, stats);
    rt_cuda_temp_free(q, c.lists);
    pthread_mutex_unlock(&dev->dnn->lock);
    return st;
}

#else

enum rt_status rt_cuda_dnn_open(__attribute__((unused)) struct rt_dev *dev, struct rt_cuda_dnn **out, char *why, int cap,
                               __attribute__((unused)) struct rt_err *err)
{
    *out = NULL;
    snprintf(why, (size_t)cap, "built without cuDNN's headers");
    return RT_OK;
}

void rt_cuda_dnn_close(__attribute__((unused)) struct rt_cuda_dnn *dnn)
{
}

enum rt_status rt_cuda_dnn_attn_fwd(struct rt_dev *dev, __attribute__((unused)) struct rt_queue *q,
                                    __attribute__((unused)) const struct rt_attn_fwd_args *a, bool must, bool *done, struct rt_err *err)
{
    *done = false;
    return must ? rt_fail(err, RT_UNSUPPORTED, "attn_fwd: cuDNN: %s", dev->dnn_why) : RT_OK;
}

enum rt_status rt_cuda_dnn_attn_bwd(struct rt_dev *dev, __attribute__((unused)) struct rt_queue *q,
                                    __attribute__((unused)) const struct rt_attn_bwd_args *a, bool must, bool *done, struct rt_err *err)
{
    *done = false;
    return must ? rt_fail(err, RT_UNSUPPORTED, "attn_bwd: cuDNN: %s", dev->dnn_why) : RT_OK;
}

#endif
