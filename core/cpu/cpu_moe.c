/* Mixture of experts: route, sort, expert products.
 *
 * moe_ffn works through the listed runs in batches of as many rows as the shared scratch holds. A batch is gathered into dense
 * rows X; items (segment, column panel, row chunk) make H = silu(X gate^T) * (X up^T), then H down^T over X, which is done with; items
 * (columns of y) then walk over all rows in order and add weight times that: so each element of y gets its experts in the order given,
 * whichever thread adds. Products are cut from an expert's own rows alone: how many experts a list holds changes no bit.
 */
#include "core/cpu/cpu.h"
#include "core/cpu/simd.h"
#include "core/mem.h"

#define UNUSED __attribute__((unused))

/* ---- route ---- */
enum { MAX_EXPERTS = 4096 };

RT_SIMD static void sigmoid_row(float *z, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        z[j] = rt_sigmoid(z[j]);
}

RT_SIMD static void softmax_row(float *z, int64_t n)
{
    const float top = rt_max(z, n);
    for (int64_t j = 0; j < n; j++)
        z[j] = rt_exp(z[j] - top);
    const float sum = rt_sum(z, n);
    for (int64_t j = 0; j < n; j++)
        z[j] /= sum;
}

/* out[0..k) = the indices of the k greatest of v, ties to the smaller, in descending order. A NaN is less than everything. */
static void greatest(const float *v, int n, int k, int32_t *out)
{
    int have = 0;
    for (int i = 0; i < n; i++) {
        const float x = v[i];
        if (have == k && !(x > v[out[k - 1]]) && !isnan(v[out[k - 1]]))
            continue;
        int p = have < k ? have++ : k - 1;
        for (; p > 0 && (x > v[out[p - 1]] || (isnan(v[out[p - 1]]) && !isnan(x))); p--)
            out[p] = out[p - 1];
        out[p] = i;
    }
}

static void keep_groups(const struct rt_route_args *a, float *choice, float *group, int32_t *kept)
{
    const int size = a->E / a->n_group;
    for (int g = 0; g < a->n_group; g++) {
        float best = -INFINITY, second = -INFINITY;
        for (int i = g * size; i < (g + 1) * size; i++) {
            if (choice[i] > best) {
                second = best;
                best = choice[i];
            } else if (choice[i] > second) {
                second = choice[i];
            }
        }
        group[g] = a->group_top2 ? best + second : best;
    }
    greatest(group, a->n_group, a->topk_group, kept);
    for (int g = 0; g < a->n_group; g++) {
        bool stays = false;
        for (int j = 0; j < a->topk_group; j++)
            stays = stays || kept[j] == g;
        for (int i = g * size; i < (g + 1) * size && !stays; i++)
            choice[i] = -INFINITY;
    }
}

enum { ROUTE_ROWS = 32 };

struct route_job {
    struct rt_dev *dev;
    const struct rt_route_args *a;
};

static void route_rows(void *ctx, int64_t row0, int64_t row1, int worker)
{
    const struct route_job *job = ctx;
    const struct rt_route_args *a = job->a;
    float *score = rt_cpu_tile(job->dev, worker), *choice = score + (int64_t)ROUTE_ROWS * a->E, *group = choice + a->E;
    int32_t kept[MAX_EXPERTS];
    for (int64_t e = 0; e < a->E; e += 128)
        rt_cpu_weight_product(a->w, e, rt_min64(128, a->E - e), (const float *)a->x + row0 * a->H, a->H, row1 - row0, true, false,
                              rt_cpu_panel(job->dev, worker), score + e, a->E);
    for (int64_t t = row0; t < row1; t++) {
        float *s = score + (t - row0) * a->E, *weight = a->weight + t * a->k;
        int32_t *ids = a->ids + t * a->k;
        if (a->sigmoid)
            sigmoid_row(s, a->E);
        else
            softmax_row(s, a->E);
        bool sound = true;
        for (int e = 0; e < a->E; e++) {
            choice[e] = a->bias != NULL ? s[e] + a->bias->f32[e] : s[e];
            sound = sound && isfinite(choice[e]);
        }
        if (a->n_group > 1)
            keep_groups(a, choice, group, kept);
        greatest(choice, a->E, a->k, ids);
        float sum = 0;
        for (int j = 0; j < a->k; j++)
            sum += s[ids[j]];
        for (int j = 0; j < a->k; j++)
            weight[j] = !sound ? NAN : (a->norm ? s[ids[j]] / (sum + 1e-20f) : s[ids[j]]) * a->scale;
    }
}

static enum rt_status check_route(const struct rt_route_args *a, struct rt_err *err)
{
    const int groups = a->n_group > 1 ? a->n_group : 1, stay = a->n_group > 1 ? a->topk_group : 1;
    if (a->E <= 0 || a->E > MAX_EXPERTS || a->k <= 0 || a->E % groups != 0 || stay <= 0 || stay > groups ||
        a->k > a->E / groups * stay)
        return rt_fail(err, RT_SHAPE, "route: %d of %d experts, %d of %d groups: expected at most %d experts that divide into the "
                       "groups, and as many in the kept groups as are chosen", a->k, a->E, stay, groups, MAX_EXPERTS);
    if (a->n_group > 1 && a->group_top2 && a->E / groups < 2)
        return rt_fail(err, RT_SHAPE, "route: groups of one expert have no two best");
    if (a->bias != NULL && rt_cpu_weight_vec_is(a->bias, a->E, "route", "the bias", err) != RT_OK)
        return RT_SHAPE;
    return rt_cpu_weight_is(a->w, a->E, a->H, "route", "the weight", err);
}

enum rt_status rt_cpu_route(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_route_args *a, struct rt_err *err)
{
    const enum rt_status st = check_route(a, err);
    if (st == RT_OK)
        rt_cpu_rows(dev, a->n, ROUTE_ROWS, route_rows, &(struct route_job){dev, a});
    return st;
}

enum rt_status rt_cpu_moe_sort(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_moe_sort_args *a,
                               struct rt_err *err)
{
    const int64_t total = a->n * a->k;
    for (int64_t i = 0; i < total; i++)
        if (a->ids[i] < 0 || a->ids[i] >= a->E)
            return rt_fail(err, RT_SHAPE, "moe_sort: expert %d for token %lld, expected 0 .. %d", (int)a->ids[i],
                           (long long)(i / a->k), a->E - 1);
    if (total > INT32_MAX)
        return rt_fail(err, RT_SHAPE, "moe_sort: %lld places, at most %d in a call", (long long)total, INT32_MAX);
    /* Counting sort: offset[e + 1] first counts, then is where expert e's next place lies, and so ends as its end. */
    for (int e = 0; e <= a->E; e++)
        a->offset[e] = 0;
    for (int64_t i = 0; i < total; i++)
        if (a->ids[i] + 2 <= a->E)
            a->offset[a->ids[i] + 2]++;
    for (int e = 2; e <= a->E; e++)
        a->offset[e] += a->offset[e - 1];
    for (int64_t i = 0; i < total; i++)
        a->perm[a->offset[a->ids[i] + 1]++] = (int32_t)i;
    return RT_OK;
}

/* ---- expert products ---- */
enum { CHUNK = 1024 }; /* rows of an item: a dequantised panel serves them */

/* Rows [row, row + rows) of the batch belong to one expert and are run[0..rows) of perm (or tokens first + i). */
struct segment {
    int expert;
    int64_t row, rows, first; /* first: in perm, or the first token */
    int64_t item;             /* of the first product of the stage at hand */
};

struct ffn_job {
    struct rt_dev *dev;
    const struct rt_moe_ffn_args *a;
    struct segment *segment;
    int64_t n_segments, rows, panel_in, panel_out, chunk;
    const float *x; /* [rows, H] */
    float *gathered, *h; /* [rows, I] */
};

static int64_t token_of(const struct rt_moe_ffn_args *a, const struct segment *s, int64_t i)
{
    return a->perm != NULL ? a->perm[s->first + i] / a->k : s->first + i;
}

static const struct segment *segment_of_item(const struct ffn_job *job, int64_t item)
{
    int64_t lo = 0, hi = job->n_segments;
    while (hi - lo > 1) {
        const int64_t mid = (lo + hi) / 2;
        if (job->segment[mid].item <= item)
            lo = mid;
        else
            hi = mid;
    }
    return job->segment + lo;
}

static const struct segment *segment_of_row(const struct ffn_job *job, int64_t row)
{
    int64_t lo = 0, hi = job->n_segments;
    while (hi - lo > 1) {
        const int64_t mid = (lo + hi) / 2;
        if (job->segment[mid].row <= row)
            lo = mid;
        else
            hi = mid;
    }
    return job->segment + lo;
}

static void gather_rows(void *ctx, int64_t row0, int64_t row1, UNUSED int worker)
{
    const struct ffn_job *job = ctx;
    const struct rt_moe_ffn_args *a = job->a;
    for (int64_t r = row0; r < row1; r++) {
        const struct segment *s = segment_of_row(job, r);
        const int64_t t = token_of(a, s, r - s->row);
        float *to = job->gathered + r * a->H;
        if (a->x.scale != NULL)
            rt_cpu_dequant_row(to, &a->x, t, a->n, a->H);
        else
            memcpy(to, (const float *)a->x.data + t * a->H, (size_t)a->H * sizeof *to);
    }
}

/* The part of a segment that an item multiplies. */
struct piece {
    const struct segment *s;
    int64_t col, cols, row, rows;
};

static struct piece piece_of(const struct ffn_job *job, int64_t item, int64_t width, int64_t panel)
{
    const struct segment *s = segment_of_item(job, item);
    const int64_t panels = rt_ceil_div(width, panel), at = item - s->item, col = at % panels * panel, row = at / panels * job->chunk;
    return (struct piece){s, col, rt_min64(panel, width - col), row, rt_min64(job->chunk, s->rows - row)};
}

static void inner_item(void *ctx, int64_t item, int worker)
{
    const struct ffn_job *job = ctx;
    const struct rt_moe_ffn_args *a = job->a;
    const struct piece p = piece_of(job, item, a->I, job->panel_in);
    const float *x = job->x + (p.s->row + p.row) * a->H;
    float *h = job->h + (p.s->row + p.row) * a->I + p.col, *both = rt_cpu_tile(job->dev, worker);
    const struct rt_weight *const w[2] = {a->gate[p.s->expert], a->up[p.s->expert]};
    rt_cpu_weight_products(w, 2, p.col, p.cols, x, a->H, p.rows, a->row_exact, false, rt_cpu_panel(job->dev, worker), both, 2 * p.cols);
    for (int64_t i = 0; i < p.rows; i++) {
        rt_cpu_swiglu_row(h + i * a->I, both + i * 2 * p.cols, both + (i * 2 + 1) * p.cols, p.cols);
        if (a->x.scale != NULL)
            rt_cpu_quant_round(h + i * a->I, p.cols, a->pow2);
    }
}

static void outer_item(void *ctx, int64_t item, int worker)
{
    const struct ffn_job *job = ctx;
    const struct rt_moe_ffn_args *a = job->a;
    const struct piece p = piece_of(job, item, a->H, job->panel_out);
    const int64_t row = p.s->row + p.row;
    rt_cpu_weight_product(a->down[p.s->expert], p.col, p.cols, job->h + row * a->I, a->I, p.rows, a->row_exact, false,
                          rt_cpu_panel(job->dev, worker), job->gathered + row * a->H + p.col, a->H);
}

RT_SIMD static void add_weighted(float *restrict y, const float *restrict x, float w, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        y[j] += w * x[j];
}

enum { ADD_COLS = 256 };

static void add_item(void *ctx, int64_t item, UNUSED int worker)
{
    const struct ffn_job *job = ctx;
    const struct rt_moe_ffn_args *a = job->a;
    const int64_t col = item * ADD_COLS, cols = rt_min64(ADD_COLS, a->H - col);
    for (const struct segment *s = job->segment; s < job->segment + job->n_segments; s++)
        for (int64_t r = 0; r < s->rows; r++) {
            const int32_t at = a->perm[s->first + r];
            add_weighted((float *)a->y + (int64_t)(at / a->k) * a->H + col, job->gathered + (s->row + r) * a->H + col, a->weight[at], cols);
        }
}

/* One expert for all rows: straight into y. */
static void dense_item(void *ctx, int64_t item, int worker)
{
    const struct ffn_job *job = ctx;
    const struct rt_moe_ffn_args *a = job->a;
    const struct piece p = piece_of(job, item, a->H, job->panel_out);
    rt_cpu_weight_product(a->down[0], p.col, p.cols, job->h + p.row * a->I, a->I, p.rows, a->row_exact, true,
                          rt_cpu_panel(job->dev, worker), (float *)a->y + (p.s->first + p.row) * a->H + p.col, a->H);
}

/* Numbers the items of a stage whose products are `width` wide. */
static int64_t number_items(struct ffn_job *job, int64_t width, int64_t panel)
{
    int64_t items = 0;
    for (int64_t i = 0; i < job->n_segments; i++) {
        job->segment[i].item = items;
        items += rt_ceil_div(width, panel) * rt_ceil_div(job->segment[i].rows, job->chunk);
    }
    return items;
}

static void run_batch(struct ffn_job *job)
{
    const struct rt_moe_ffn_args *a = job->a;
    struct rt_dev *dev = job->dev;
    /* All rows through one expert: lower chunks, so that there are items to share out. */
    job->chunk = a->perm == NULL ? rt_max64(256, rt_min64(CHUNK, rt_ceil_div(job->rows, 256) * 64)) : CHUNK;
    if (job->gathered != NULL) {
        rt_cpu_rows(dev, job->rows, rt_cpu_grain(job->rows, a->H), gather_rows, job);
        job->x = job->gathered;
    } else {
        job->x = (const float *)a->x.data + job->segment->first * a->H;
    }
    rt_pool_run(dev->pool, number_items(job, a->I, job->panel_in), inner_item, job);
    rt_pool_run(dev->pool, number_items(job, a->H, job->panel_out), a->perm == NULL ? dense_item : outer_item, job);
    if (a->perm != NULL)
        rt_pool_run(dev->pool, rt_ceil_div(a->H, ADD_COLS), add_item, job);
}

static enum rt_status check_ffn(const struct rt_moe_ffn_args *a, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (a->perm == NULL && a->n_experts != 1)
        RT_FAIL(err, SHAPE, "moe_ffn: %d experts without a permutation, expected 1", a->n_experts);
    for (int e = 0; e < a->n_experts; e++) {
        RT_TRY(rt_cpu_weight_is(a->gate[e], a->I, a->H, "moe_ffn", "a gate weight", err));
        RT_TRY(rt_cpu_weight_is(a->up[e], a->I, a->H, "moe_ffn", "an up weight", err));
        RT_TRY(rt_cpu_weight_is(a->down[e], a->H, a->I, "moe_ffn", "a down weight", err));
        RT_TRY(rt_cpu_act_check(&a->x, a->gate[e], "moe_ffn", a->H, err));
        RT_TRY(rt_cpu_act_check(&a->x, a->up[e], "moe_ffn", a->H, err));
        RT_TRY(rt_cpu_act_check(&a->x, a->down[e], "moe_ffn", a->I, err));
    }
out:
    return st;
}

enum rt_status rt_cpu_moe_ffn(struct rt_dev *dev, UNUSED struct rt_queue *q, const struct rt_moe_ffn_args *a, struct rt_err *err)
{
    enum rt_status st;
    struct ffn_job job = {.dev = dev, .a = a};

    RT_TRY(check_ffn(a, err));
    const int32_t all[2] = {0, (int32_t)rt_min64(a->n, INT32_MAX)};
    const int32_t *offset = a->perm != NULL ? a->offset : all;
    const int64_t total = (int64_t)offset[a->n_experts] - offset[0];
    if (a->n_experts == 0 || total == 0)
        return RT_OK;
    const bool gathers = a->perm != NULL || a->x.scale != NULL;
    const size_t row_bytes = ((gathers ? (size_t)a->H : 0) + (size_t)a->I) * sizeof(float);
    const int64_t most = rt_max64(1, (int64_t)(dev->shared_max / row_bytes)), held = rt_min64(total, most);
    char *at;
    RT_TRY(rt_cpu_shared(dev, rt_arena_round((size_t)a->n_experts * sizeof *job.segment) + (size_t)held * row_bytes, &at, err));
    job.segment = (struct segment *)(void *)at;
    job.h = (float *)(void *)(at + rt_arena_round((size_t)a->n_experts * sizeof *job.segment));
    job.gathered = gathers ? job.h + held * a->I : NULL;
    job.panel_in = rt_min64(RT_CPU_WIDE / 2, a->I);
    job.panel_out = rt_min64(RT_CPU_WIDE, a->H);
    for (int e = 0; e < a->n_experts; e++)
        for (int64_t r = offset[e]; r < offset[e + 1];) {
            const int64_t rows = rt_min64(offset[e + 1] - r, most);
            if (job.rows + rows > held) { /* an expert's rows are parted only where they alone are too many */
                run_batch(&job);
                job.rows = job.n_segments = 0;
            }
            job.segment[job.n_segments++] = (struct segment){.expert = e, .row = job.rows, .rows = rows, .first = r};
            job.rows += rows;
            r += rows;
        }
    if (job.rows > 0)
        run_batch(&job);
out:
    return st;
}
