/* Generation: per-head products, caches, sampling, attention over latents. Every row is exact. */
#include "core/cpu/cpu.h"
#include "core/cpu/simd.h"
#include "core/mem.h"

#define UNUSED __attribute__((unused))

static int64_t ld_or(int64_t ld, int64_t dense)
{
    return ld != 0 ? ld : dense;
}

/* ---- per-head products ---- */
enum { HEAD_ROWS = 64 };

struct head_job {
    struct rt_dev *dev;
    const struct rt_head_matmul_args *a;
    int64_t x_ld, x_head, y_ld, y_head, run; /* run: rows of w in a panel */
};

static void head_item(void *ctx, int64_t item, int worker)
{
    const struct head_job *job = ctx;
    const struct rt_head_matmul_args *a = job->a;
    const int64_t h = item % a->nh, t = item / a->nh * HEAD_ROWS, rows = rt_min64(HEAD_ROWS, a->n - t);
    const float *x = (const float *)a->x + t * job->x_ld + h * job->x_head;
    float *y = (float *)a->y + t * job->y_ld + h * job->y_head;
    for (int64_t i = 0; i < a->d; i += job->run) {
        const int64_t d = rt_min64(job->run, a->d - i);
        int64_t ldb;
        const float *w = rt_cpu_weight_panel(a->w, h * a->head_rows + a->row0 + i, d, 0, a->R, rt_cpu_panel(job->dev, worker), &ldb);
        if (a->transpose)
            rt_cpu_exact_nt(rows, d, a->R, x, job->x_ld, w, ldb, false, y + i, job->y_ld);
        else
            rt_cpu_exact_nn(rows, a->R, d, x + i, job->x_ld, w, ldb, i > 0, y, job->y_ld);
    }
}

enum rt_status rt_cpu_head_matmul(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_head_matmul_args *a,
                                  struct rt_err *err)
{
    enum rt_status st;
    const int64_t dx = a->transpose ? a->R : a->d, dy = a->transpose ? a->d : a->R;
    struct head_job job = {.dev = dev, .a = a, .x_head = ld_or(a->x_head, dx), .y_head = ld_or(a->y_head, dy)};

    RT_TRY(rt_cpu_weight_is(a->w, (int64_t)a->nh * a->head_rows, a->R, "head_matmul", "the weight", err));
    if (a->row0 < 0 || a->d <= 0 || a->row0 + a->d > a->head_rows || a->R > RT_CPU_PANEL)
        RT_FAIL(err, SHAPE, "head_matmul: rows %d .. %d of a head that has %d", a->row0, a->row0 + a->d, a->head_rows);
    job.x_ld = ld_or(a->x_ld, a->nh * job.x_head);
    job.y_ld = ld_or(a->y_ld, a->nh * job.y_head);
    job.run = RT_CPU_PANEL / a->R;
    rt_pool_run(dev->pool, a->nh * rt_ceil_div(a->n, HEAD_ROWS), head_item, &job);
out:
    return st;
}

/* ---- caches ---- */
static enum rt_status check_places(const char *op, const int32_t *slot, const int32_t *pos, int64_t n, int64_t capacity,
                                   struct rt_err *err)
{
    for (int64_t i = 0; i < n; i++)
        if (slot[i] < 0 || pos[i] < 0 || pos[i] >= capacity)
            return rt_fail(err, RT_SHAPE, "%s: row %lld at slot %d, position %d; a slot holds %lld positions", op, (long long)i,
                           (int)slot[i], (int)pos[i], (long long)capacity);
    return RT_OK;
}

static void put_rows(void *ctx, int64_t row0, int64_t row1, UNUSED int worker)
{
    const struct rt_cache_put_args *a = ctx;
    const int64_t ldx = ld_or(a->ldx, a->width);
    for (int64_t i = row0; i < row1; i++)
        memcpy((float *)a->cache + (a->slot[i] * a->capacity + a->pos[i]) * a->width, (const float *)a->x + i * ldx,
               (size_t)a->width * sizeof(float));
}

enum rt_status rt_cpu_cache_put(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_cache_put_args *a, struct rt_err *err)
{
    const enum rt_status st = check_places("cache_put", a->slot, a->pos, a->n, a->capacity, err);
    struct rt_cache_put_args job = *a;
    if (st == RT_OK)
        rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, a->width), put_rows, &job);
    return st;
}

enum rt_status rt_cpu_cache_copy(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_cache_copy_args *a,
                                 struct rt_err *err)
{
    if (a->n < 0 || a->n > a->capacity || a->src < 0 || a->dst < 0)
        return rt_fail(err, RT_SHAPE, "cache_copy: %lld positions of slot %d to slot %d; a slot holds %lld", (long long)a->n,
                       (int)a->src, (int)a->dst, (long long)a->capacity);
    memmove((float *)a->cache + a->dst * a->capacity * a->width, (const float *)a->cache + a->src * a->capacity * a->width,
            (size_t)(a->n * a->width) * sizeof(float));
    return RT_OK;
}

static void put_heads(void *ctx, int64_t row0, int64_t row1, UNUSED int worker)
{
    const struct rt_rope_put_args *a = ctx;
    const int64_t q = (int64_t)a->nh * a->d, kv = (int64_t)a->nkv * a->d;
    for (int64_t i = row0; i < row1; i++) {
        const float *x = (const float *)a->qkv + i * (q + 2 * kv);
        if (a->pages.table != NULL && a->pos[i] == -1)
            continue;
        const int64_t row = rt_cache_row(&a->pages, a->capacity, a->slot[i], a->pos[i]);
        struct rt_headnorm_rope_fwd_args r = {.x = x, .w = a->q_norm, .y = (float *)a->q + i * q, .cos = a->cos, .sin = a->sin, .position = a->pos + i,
                                              .n = 1, .heads = a->nh, .d = a->d, .eps = a->eps};
        rt_cpu_heads_fwd(&r, 0, 1);
        r.x = x + q;
        r.w = a->k_norm;
        r.y = (float *)a->k_cache + row * kv;
        r.heads = a->nkv;
        rt_cpu_heads_fwd(&r, 0, 1);
        memcpy((float *)a->v_cache + row * kv, x + q + kv, (size_t)kv * sizeof *x);
    }
}

enum rt_status rt_cpu_rope_put(struct rt_dev *dev, UNUSED struct rt_queue *queue, const struct rt_rope_put_args *a, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rope_put_args job = *a;
    const struct rt_weight *const norms[] = {a->q_norm, a->k_norm};
    for (int i = 0; i < 2; i++)
        if (norms[i] != NULL)
            RT_TRY(rt_cpu_weight_is(norms[i], 1, a->d, "rope_put", "a norm", err));
    if (a->d < 2 || a->d % 2 != 0)
        RT_FAIL(err, SHAPE, "rope_put: heads of %d elements, expected an even number", a->d);
    for (int64_t i = 0; i < a->n; i++)
        if (a->pages.table == NULL || a->pos[i] != -1)
            RT_TRY(check_places("rope_put", a->slot + i, a->pos + i, 1, a->capacity, err));
    rt_cpu_rows(dev, a->n, rt_cpu_grain(a->n, ((int64_t)a->nh + 2 * a->nkv) * a->d), put_heads, &job);
out:
    return st;
}

enum rt_status rt_cpu_linear_rope_put(struct rt_dev *dev, struct rt_queue *queue, const struct rt_linear_rope_put_args *a, struct rt_err *err)
{
    struct rt_rope_put_args put = a->put;
    const struct rt_linear_fwd_args product = {.x = {.data = (void *)(uintptr_t)a->x}, .w = a->w, .bias = a->bias, .y = a->tmp, .n = put.n, .K = a->K,
                                               .N = (int64_t)(put.nh + 2 * put.nkv) * put.d, .row_exact = true};
    const enum rt_status st = rt_cpu_linear_fwd(dev, queue, &product, err);
    put.qkv = a->tmp;
    return st == RT_OK ? rt_cpu_rope_put(dev, queue, &put, err) : st;
}

/* ---- sampling ---- */
struct sample_job {
    const struct rt_sample_args *a;
    struct rt_sampler **sampler; /* one a worker */
    struct rt_err *row_err;      /* [n] */
};

static void sample_row(void *ctx, int64_t i, int worker)
{
    const struct sample_job *j = ctx;
    const struct rt_sample_args *a = j->a;
    (void)rt_sampler_draw(j->sampler[worker], a->z + i * a->ld, a->seed, a->stream[i], (uint64_t)a->position[i], &a->id[i], &a->logprob[i],
                          &j->row_err[i]);
}

enum rt_status rt_cpu_sample(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_sample_args *a, struct rt_err *err)
{
    enum rt_status st;
    struct sample_job j = {.a = a};
    const int threads = rt_pool_threads(dev->pool);
    if (a->n < 1)
        return RT_OK;
    RT_TRY(rt_alloc((size_t)threads, sizeof *j.sampler, "samplers", &j.sampler, err));
    RT_TRY(rt_alloc((size_t)a->n, sizeof *j.row_err, "samplers", &j.row_err, err));
    for (int i = 0; i < threads; i++)
        RT_TRY(rt_sampler_create(a->n_ids, &a->params, &j.sampler[i], err));
    rt_pool_run(dev->pool, a->n, sample_row, &j);
    for (int64_t i = 0; i < a->n; i++)
        if (j.row_err[i].status != RT_OK)
            RT_FAIL(err, NOMEM, "%s", j.row_err[i].msg); /* all that a row can fail of */
out:
    for (int i = 0; j.sampler != NULL && i < threads; i++)
        rt_sampler_free(j.sampler[i]);
    rt_free(j.sampler);
    rt_free(j.row_err);
    return st;
}

/* ---- attention over latents ---- */
enum {
    HEADS = 32,     /* heads of an item: they share each read of the cache */
    POSITIONS = 256 /* of a step of the running softmax; steps begin at 0, so a row's sums depend on its own length alone */
};

struct mla_job {
    struct rt_dev *dev;
    const struct rt_mla_cached_args *a;
    int64_t pe_ld, pe_head, groups;
};

/* p[0..n) = exp(p * scale - top), with the running peak and sum of a head brought up to date; answers what older sums are scaled
 * by. */
RT_SIMD static float soft_step(float *p, int64_t n, float scale, float *peak, float *sum)
{
    const float top = rt_max(p, n) * scale, now = top > *peak ? top : *peak;
    for (int64_t j = 0; j < n; j++)
        p[j] = rt_exp(p[j] * scale - now);
    const float old = *peak == -INFINITY ? 0.0f : rt_exp(*peak - now);
    *sum = *sum * old + rt_sum(p, n);
    *peak = now;
    return old;
}

RT_SIMD static void scale_by(float *x, float s, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        x[j] *= s;
}

static void mla_item(void *ctx, int64_t item, int worker)
{
    const struct mla_job *job = ctx;
    const struct rt_mla_cached_args *a = job->a;
    const int64_t i = item / job->groups, h0 = item % job->groups * HEADS, heads = rt_min64(HEADS, a->nh - h0);
    const int64_t width = a->R + a->dr, end = (int64_t)a->pos[i] + 1;
    const float *cache = (const float *)a->cache + a->slot[i] * a->capacity * width;
    float *query = rt_cpu_tile(job->dev, worker), *p = query + heads * width, *o = (float *)a->o + (i * a->nh + h0) * a->R;
    float peak[HEADS], sum[HEADS];
    for (int64_t h = 0; h < heads; h++) {
        memcpy(query + h * width, (const float *)a->q_lat + (i * a->nh + h0 + h) * a->R, (size_t)a->R * sizeof *query);
        memcpy(query + h * width + a->R, (const float *)a->q_pe + i * job->pe_ld + (h0 + h) * job->pe_head,
               (size_t)a->dr * sizeof *query);
        peak[h] = -INFINITY;
        sum[h] = 0;
    }
    for (int64_t j = 0; j < end; j += POSITIONS) {
        const int64_t n = rt_min64(POSITIONS, end - j);
        rt_cpu_exact_nt(heads, n, width, query, width, cache + j * width, width, false, p, POSITIONS);
        for (int64_t h = 0; h < heads; h++) {
            const float old = soft_step(p + h * POSITIONS, n, a->scale, &peak[h], &sum[h]);
            if (j > 0)
                scale_by(o + h * a->R, old, a->R);
        }
        rt_cpu_exact_nn(heads, a->R, n, p, POSITIONS, cache + j * width, width, j > 0, o, a->R);
    }
    for (int64_t h = 0; h < heads; h++)
        scale_by(o + h * a->R, 1 / sum[h], a->R);
}

enum rt_status rt_cpu_mla_cached(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_mla_cached_args *a,
                                 struct rt_err *err)
{
    const enum rt_status st = check_places("mla_cached", a->slot, a->pos, a->n, a->capacity, err);
    if (st != RT_OK)
        return st;
    if ((int64_t)a->R + a->dr > RT_CPU_TILE / HEADS - POSITIONS)
        return rt_fail(err, RT_SHAPE, "mla_cached: cache rows of %d, at most %d", a->R + a->dr, RT_CPU_TILE / HEADS - POSITIONS);
    struct mla_job job = {.dev = dev, .a = a, .pe_head = ld_or(a->q_pe_head, a->dr), .groups = rt_ceil_div(a->nh, HEADS)};
    job.pe_ld = ld_or(a->q_pe_ld, a->nh * job.pe_head);
    rt_pool_run(dev->pool, a->n * job.groups, mla_item, &job);
    return RT_OK;
}
