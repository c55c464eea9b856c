/* The head of a scored window: top-k, log sum exp at several temperatures, the realised token's log-probability and rank.
 *
 * Items are (id slice, row chunk): a slice's logits are made tile by tile and taken into the partial state of each row; then the
 * states of a row's slices are merged in order. Top-k works on 64-bit keys (logit in order-preserving bits, then the complement
 * of the id), whose order is the contract's: candidates above the k-th best known so far are collected and now and then cut to
 * the k best. The realised token's logit is computed first, by itself, and put in its place in its tile: so every output is made
 * of the same logits, and ranks can be counted in one pass.
 */
#include <stdatomic.h>

#include "core/cpu/cpu.h"
#include "core/cpu/simd.h"
#include "core/mem.h"

#define UNUSED __attribute__((unused))

enum { MAX_LSE = 32 };

/* Greater float first, then smaller id; NaN after everything. */
static uint64_t make_key(float z, uint32_t id)
{
    const uint32_t u = rt_to_bits(z + 0.0f); /* -0 becomes 0 */
    const uint32_t order = isnan(z) ? 0 : (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
    return (uint64_t)order << 32 | (uint32_t)~id;
}

static float key_logit(uint64_t key)
{
    const uint32_t order = (uint32_t)(key >> 32);
    if (order == 0)
        return NAN;
    return rt_from_bits((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}

static uint32_t key_id(uint64_t key)
{
    return ~(uint32_t)key;
}

/* Rearranges so that the k greatest of n come first. */
static void select_keys(uint64_t *v, int64_t n, int64_t k)
{
    int64_t lo = 0, hi = n - 1;
    while (lo < hi) {
        const uint64_t x = v[lo], y = v[(lo + hi) / 2], z = v[hi];
        const uint64_t pivot = x < y ? (y < z ? y : x < z ? z : x) : (x < z ? x : y < z ? z : y);
        int64_t i = lo, j = hi;
        while (i <= j) {
            while (v[i] > pivot)
                i++;
            while (v[j] < pivot)
                j--;
            if (i <= j) {
                const uint64_t t = v[i];
                v[i++] = v[j];
                v[j--] = t;
            }
        }
        if (k - 1 <= j)
            hi = j;
        else if (k - 1 >= i)
            lo = i;
        else
            return;
    }
}

/* In descending order (Shell's sort with the gaps of Ciura 2001, continued by 2.25). */
static void sort_keys(uint64_t *v, int64_t n)
{
    static const int64_t gaps[] = {8929, 3968, 1764, 701, 301, 132, 57, 23, 10, 4, 1};
    for (size_t g = 0; g < sizeof gaps / sizeof *gaps; g++)
        for (int64_t i = gaps[g]; i < n; i++) {
            const uint64_t x = v[i];
            int64_t j = i;
            for (; j >= gaps[g] && v[j - gaps[g]] < x; j -= gaps[g])
                v[j] = v[j - gaps[g]];
            v[j] = x;
        }
}

/* What a slice knows of a row. */
struct part {
    double sum[MAX_LSE + 1]; /* of exp((z - peak) * inv_temp); the last at temperature 1 */
    uint64_t *key;
    int64_t keys, rank;
    float peak, floor; /* floor: logit of the k-th best known; NaN before there are so many */
};

struct head_job {
    struct rt_dev *dev;
    const struct rt_head_topk_args *a;
    int64_t row0, rows, chunk, slices, slice_ids, cap, k;
    struct part *part; /* [rows, slices] */
    uint64_t *keys;    /* [rows, slices, cap] */
    float *z_next;     /* [rows] */
    atomic_uint *floor; /* [rows] the greatest floor of a slice, as in a key; 0: none yet. It only prunes: results do not depend on it */
    bool next;
    int one;           /* which sum is at temperature 1 */
};

static double inv_temp(const struct head_job *job, int i)
{
    return i < job->a->n_lse ? (double)job->a->inv_temp[i] : 1;
}

RT_SIMD static double exp_sum(const float *z, int64_t n, float peak, float it)
{
    float acc[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++)
            acc[j] += rt_exp((z[i + j] - peak) * it);
    for (int j = 0; i < n; i++, j++)
        acc[j] += rt_exp((z[i] - peak) * it);
    double sum = 0;
    for (int j = 0; j < 16; j++)
        sum += (double)acc[j];
    return sum;
}

RT_SIMD static float row_max(const float *z, int64_t n)
{
    return rt_max(z, n);
}

/* How many are above x, or equal to it where `equal`. */
RT_SIMD static int64_t count_above(const float *z, int64_t n, float x, bool equal)
{
    int32_t above = 0, same = 0;
    for (int64_t j = 0; j < n; j++) {
        above += z[j] > x;
        same += z[j] == x;
    }
    return equal ? above + same : above;
}

/* Leaves the k best keys; their least is the floor, and no logit of the row below it can be among the row's best. */
static void cut(struct part *p, int64_t k, atomic_uint *row_floor)
{
    select_keys(p->key, p->keys, k);
    p->keys = k;
    uint64_t least = p->key[0];
    for (int64_t l = 1; l < k; l++)
        least = p->key[l] < least ? p->key[l] : least;
    p->floor = key_logit(least);
    if (least >> 32 > atomic_load_explicit(row_floor, memory_order_relaxed)) /* a lost update costs time alone */
        atomic_store_explicit(row_floor, (unsigned)(least >> 32), memory_order_relaxed);
}

/* Another slice's floor. An equal logit may still win by its smaller id, so only what is below counts. */
static void take_floor(struct part *p, atomic_uint *row_floor)
{
    const unsigned order = atomic_load_explicit(row_floor, memory_order_relaxed);
    const float below = key_logit((uint64_t)(order > 0 ? order - 1 : 0) << 32);
    if (below > p->floor || (isnan(p->floor) && !isnan(below)))
        p->floor = below;
}

/* A floor that k or more of z[0..n) are above, and few more than k, where halving the range between the least and the greatest finds
 * one: what it prunes need not be collected and sorted out again. */
RT_SIMD static void raise_floor(struct part *p, const float *z, int64_t n, float top, int64_t k)
{
    const int32_t enough = (int32_t)k, few = (int32_t)(k + k / 4 + 8);
    float lo = p->floor, hi = top;
    if (isnan(lo)) {
        rt_v16 m = (rt_v16){0} - INFINITY;
        for (int64_t i = 0; i + 16 <= n; i += 16) {
            const rt_v16 v = -rt_v16_load(z + i);
            rt_v16_max(&m, &v);
        }
        lo = INFINITY;
        for (int j = 0; j < 16; j++)
            lo = -m[j] < lo ? -m[j] : lo;
    }
    for (int turn = 0; turn < 12; turn++) {
        const float mid = lo + (hi - lo) / 2;
        int32_t above = 0;
        for (int64_t j = 0; j < n; j++)
            above += z[j] > mid;
        if (above < enough) {
            hi = mid;
            continue;
        }
        lo = p->floor = mid;
        if (above <= few)
            return;
    }
}

/* Offers z[0..n), ids from id0 on. */
RT_SIMD static void offer(struct part *p, const float *z, int64_t n, uint32_t id0, int64_t k, int64_t cap, atomic_uint *row_floor)
{
    enum { RUN = 64 };
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t m = n - i < RUN ? n - i : RUN;
        const float least = p->floor;
        uint8_t keep[RUN] = {0};
        if (m == RUN)
            for (int j = 0; j < RUN; j++)
                keep[j] = !(z[i + j] <= least);
        else
            for (int j = 0; j < (int)m; j++)
                keep[j] = !(z[i + j] <= least);
        if (p->keys + RUN > cap)
            cut(p, k, row_floor);
        for (int w = 0; w < RUN; w += 8) { /* few are kept: eight flags at a time */
            uint64_t flags;
            memcpy(&flags, keep + w, sizeof flags);
            for (; flags != 0; flags &= flags - 1) {
                const int64_t j = i + w + __builtin_ctzll(flags) / 8;
                p->key[p->keys++] = make_key(z[j], id0 + (uint32_t)j);
            }
        }
    }
}

/* Takes logits [n] of the ids from id0 on into row r's part. */
static void take(const struct head_job *job, int64_t r, struct part *p, float *z, int64_t n, int64_t id0)
{
    if (job->next) {
        const int64_t next = job->a->next[job->row0 + r];
        const float zn = job->z_next[r];
        const int64_t before = rt_max64(0, rt_min64(n, next - id0)); /* ids below next: an equal logit ranks first */
        if (next >= id0 && next < id0 + n)
            z[next - id0] = zn;
        p->rank += count_above(z, before, zn, true) + count_above(z + before, n - before, zn, false);
    }
    const float top = row_max(z, n);
    if (top > p->peak) {
        for (int i = 0; i <= job->a->n_lse; i++)
            p->sum[i] *= exp(((double)p->peak - (double)top) * inv_temp(job, i));
        p->peak = top;
    }
    if (p->peak == -INFINITY) {
        for (int i = 0; i <= job->a->n_lse; i++) /* -inf adds nothing, NaN stays */
            p->sum[i] += isnan(z[0]) ? (double)NAN : 0;
    } else {
        for (int i = 0; i <= job->a->n_lse; i++) {
            if (i == job->a->n_lse && job->one != i)
                break;
            p->sum[i] += exp_sum(z, n, p->peak, (float)inv_temp(job, i));
        }
    }
    if (job->k > 0) {
        take_floor(p, job->floor + r);
        if (p->keys == 0 && n >= 2 * job->k && isfinite(top))
            raise_floor(p, z, n, top, job->k);
        if (!(top <= p->floor))
            offer(p, z, n, (uint32_t)id0, job->k, job->cap, job->floor + r);
    }
}

static void next_rows(void *ctx, int64_t row0, int64_t row1, int worker)
{
    const struct head_job *job = ctx;
    const struct rt_head_topk_args *a = job->a;
    for (int64_t r = row0; r < row1; r++) {
        const int64_t next = a->next[job->row0 + r];
        job->z_next[r] = NAN; /* no such id: nothing is above it */
        if (next < 0 || next >= a->n_ids)
            continue;
        rt_cpu_weight_product(a->w, next, 1, (const float *)a->x + (job->row0 + r) * a->H, a->H, 1, true, false,
                              rt_cpu_panel(job->dev, worker), job->z_next + r, 1);
    }
}

static void slice_item(void *ctx, int64_t item, int worker)
{
    const struct head_job *job = ctx;
    const struct rt_head_topk_args *a = job->a;
    const int64_t slice = item % job->slices, row0 = item / job->slices * job->chunk;
    const int64_t rows = rt_min64(job->chunk, job->rows - row0);
    const int64_t end = rt_min64(a->n_ids, (slice + 1) * job->slice_ids), step = RT_CPU_WIDE;
    float *z = rt_cpu_tile(job->dev, worker);
    for (int64_t r = row0; r < row0 + rows; r++) {
        struct part *p = job->part + r * job->slices + slice;
        *p = (struct part){.key = job->keys + (r * job->slices + slice) * job->cap, .peak = -INFINITY, .floor = NAN};
    }
    for (int64_t id = slice * job->slice_ids; id < end; id += step) {
        const int64_t n = rt_min64(step, end - id);
        rt_cpu_weight_product(a->w, id, n, (const float *)a->x + (job->row0 + row0) * a->H, a->H, rows, false, false,
                              rt_cpu_panel(job->dev, worker), z, n);
        for (int64_t r = 0; r < rows; r++)
            take(job, row0 + r, job->part + (row0 + r) * job->slices + slice, z + r * n, n, id);
    }
}

static float merged_lse(const struct head_job *job, const struct part *p, int i)
{
    double peak = -INFINITY, sum = 0;
    for (int64_t s = 0; s < job->slices; s++) {
        peak = (double)p[s].peak > peak ? (double)p[s].peak : peak;
        if (isnan(p[s].sum[i]))
            return NAN;
    }
    if (peak == -INFINITY)
        return -INFINITY;
    for (int64_t s = 0; s < job->slices; s++)
        sum += p[s].sum[i] * exp(((double)p[s].peak - peak) * inv_temp(job, i));
    return (float)(peak * inv_temp(job, i) + log(sum));
}

static void merge_keys(const struct head_job *job, const struct part *p, int64_t row, uint64_t *key)
{
    const struct rt_head_topk_args *a = job->a;
    int64_t n = 0;
    for (int64_t s = 0; s < job->slices; s++) {
        memcpy(key + n, p[s].key, (size_t)p[s].keys * sizeof *key);
        n += p[s].keys;
    }
    select_keys(key, n, job->k);
    sort_keys(key, job->k);
    for (int64_t j = 0; j < job->k; j++) {
        a->topk_ids[row * job->k + j] = key_id(key[j]);
        a->topk_logits[row * job->k + j] = key_logit(key[j]);
    }
}

static void merge_rows(void *ctx, int64_t row0, int64_t row1, int worker)
{
    const struct head_job *job = ctx;
    const struct rt_head_topk_args *a = job->a;
    uint64_t *key = (uint64_t *)(void *)rt_cpu_panel(job->dev, worker);
    for (int64_t r = row0; r < row1; r++) {
        const struct part *p = job->part + r * job->slices;
        const int64_t row = job->row0 + r;
        if (job->k > 0)
            merge_keys(job, p, row, key);
        for (int i = 0; i < a->n_lse; i++)
            a->lse[row * a->n_lse + i] = merged_lse(job, p, i);
        if (!job->next)
            continue;
        const bool exists = a->next[row] >= 0 && a->next[row] < a->n_ids;
        if (a->next_logprob != NULL)
            a->next_logprob[row] = exists ? job->z_next[r] - merged_lse(job, p, job->one) : -INFINITY;
        int64_t rank = exists ? 0 : a->n_ids;
        for (int64_t s = 0; s < job->slices; s++)
            rank += p[s].rank;
        if (a->next_rank != NULL)
            a->next_rank[row] = (uint32_t)rank;
    }
}

static enum rt_status check_head(const struct rt_head_topk_args *a, struct rt_err *err)
{
    if (a->n_ids <= 0 || a->n_ids > a->w->rows || a->k < 0 || a->k > a->n_ids || a->k > RT_CPU_PANEL / 128)
        return rt_fail(err, RT_SHAPE, "head_topk: the best %d (at most %d) of %lld ids from a head of %lld rows", a->k,
                       RT_CPU_PANEL / 128, (long long)a->n_ids, (long long)a->w->rows);
    if (a->n_lse < 0 || a->n_lse > MAX_LSE)
        return rt_fail(err, RT_SHAPE, "head_topk: %d temperatures, at most %d", a->n_lse, MAX_LSE);
    return rt_cpu_weight_is(a->w, a->w->rows, a->H, "head_topk", "the head", err);
}

enum rt_status rt_cpu_head_topk(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_head_topk_args *a, struct rt_err *err)
{
    enum rt_status st = check_head(a, err);
    struct head_job job = {.dev = dev, .a = a, .k = a->topk_ids != NULL ? a->k : 0, .next = a->next != NULL};
    if (st != RT_OK || a->n == 0)
        return st;
    for (job.one = 0; job.one < a->n_lse && a->inv_temp[job.one] != 1; job.one++)
        continue;
    if (!job.next)
        job.one = -1;
    /* 8 items at least: slices of 1024 ids or more (each collects its own best, so no more of them than needed), and where these do not
     * suffice lower chunks. Logits of a chunk fit the tile. */
    const int64_t most = rt_max64(1, a->n_ids / 1024), low = rt_ceil_div(rt_ceil_div(a->n, rt_ceil_div(8, most)), 64) * 64;
    job.chunk = rt_min64(rt_min64(a->n, low), a->w->f32 != NULL ? 256 : RT_CPU_TILE / RT_CPU_WIDE);
    job.slices = rt_min64(rt_ceil_div(8, rt_ceil_div(a->n, job.chunk)), most);
    job.slice_ids = rt_ceil_div(rt_ceil_div(a->n_ids, job.slices), 256) * 256;
    job.cap = 2 * job.k + 128;
    const size_t per_row = (size_t)job.slices * (sizeof *job.part + (size_t)job.cap * sizeof *job.keys) + sizeof *job.z_next +
                           sizeof *job.floor;
    const int64_t step = rt_max64(1, rt_min64(a->n, (int64_t)(dev->shared_max / per_row)));
    char *at;
    RT_TRY(rt_cpu_shared(dev, (size_t)step * per_row, &at, err));
    job.part = (struct part *)(void *)at;
    job.keys = (uint64_t *)(void *)(job.part + step * job.slices);
    job.z_next = (float *)(void *)(job.keys + step * job.slices * job.cap);
    job.floor = (atomic_uint *)(void *)(job.z_next + step);
    for (job.row0 = 0; job.row0 < a->n; job.row0 += step) {
        job.rows = rt_min64(step, a->n - job.row0);
        for (int64_t r = 0; r < job.rows; r++)
            atomic_init(job.floor + r, 0);
        if (job.next)
            rt_cpu_rows(dev, job.rows, 16, next_rows, &job);
        rt_pool_run(dev->pool, job.slices * rt_ceil_div(job.rows, job.chunk), slice_item, &job);
        rt_cpu_rows(dev, job.rows, 8, merge_rows, &job);
    }
out:
    return st;
}
