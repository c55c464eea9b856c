/* moe_ffn: the products of the experts over sorted rows (core/cuda/moe_rows.h), or of one MLP over all rows. Contract: core/backend.h.
 *
 * Experts are taken in groups whose rows fit the scratch; an expert with more rows than that is cut. Padding rows belong to the group's own
 * matrices, so that each product may run over a multiple of 4 rows. */
#include "core/cuda/gemm.h"
#include "core/cuda/gemm_kernels.h"
#include "core/cuda/group8.h"
#include "core/cuda/lt.h"
#include "core/cuda/moe_rows.h"
#include "core/cuda/skinny.h"
#include "core/mem.h"

enum { BLOCK = 128, PAD = 4, LEAST_ROWS = 256 };

/* Memory of one group or chunk. */
struct rows {
    struct rt_act x, h; /* x: gathered, or the scales of a chunk */
    char *gate_up, *out;
};

static void free_rows(struct rt_queue *q, struct rows *r)
{
    rt_cuda_temp_free(q, r->x.data);
    rt_cuda_temp_free(q, r->x.scale);
    rt_cuda_temp_free(q, r->h.data);
    rt_cuda_temp_free(q, r->h.scale);
    rt_cuda_temp_free(q, r->gate_up);
    rt_cuda_temp_free(q, r->out);
    *r = (struct rows){0};
}

/* One operand of `rows` rows: codes and scales, or bf16. */
static enum rt_status alloc_act(struct rt_queue *q, bool quantised, int64_t rows, int64_t cols, struct rt_act *out, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_cuda_temp(q, (size_t)(rows * cols) * (quantised ? 1 : 2), &out->data, err));
    if (quantised)
        RT_TRY(rt_cuda_temp(q, (size_t)(rows * (cols / BLOCK)) * sizeof(float), &out->scale, err));
out:
    return st;
}

static size_t act_bytes(bool quantised, int64_t cols)
{
    return quantised ? (size_t)cols + (size_t)cols / BLOCK * sizeof(float) : (size_t)cols * 2;
}

/* How many rows of `per_row` bytes fit the scratch beside `fixed` bytes: a multiple of PAD. */
static int64_t rows_that_fit(const struct rt_dev *dev, size_t fixed, size_t per_row)
{
    const uint64_t left = dev->scratch > fixed ? dev->scratch - fixed : 0;
    const uint64_t rows = left / per_row < INT32_MAX ? left / per_row : INT32_MAX;
    return rows < LEAST_ROWS ? LEAST_ROWS : (int64_t)rows / PAD * PAD;
}

/* y [rows, w->rows] at distance ldy = x w^T, or +=. x.scale: [K/128][scale_ld]. padded: gemm.h. */
static enum rt_status product(struct rt_queue *q, struct rt_act x, int64_t scale_ld, const struct rt_weight *w, void *y, int64_t rows, int64_t ldy,
                              bool accumulate, bool padded, struct rt_err *err)
{
    const void *data = NULL;
    void *temp = NULL;
    enum rt_status st;
    if (x.scale != NULL) {
        const struct rt_cuda_gemm8_args g = {.x = x, .w = w, .y = y, .n = rows, .K = w->cols, .N = w->rows, .x_scale_ld = scale_ld, .ldy = ldy,
                                             .accumulate = accumulate, .padded = padded};
        return rt_cuda_gemm8(q, &g, err);
    }
    RT_TRY(rt_cuda_weight_bf16(q, w, &data, &temp, err));
    const struct rt_cuda_gemm_args g = {.a = x.data, .b = data, .d = y, .m = rows, .n = w->rows, .k = w->cols, .ldd = ldy, .b_t = true,
                                        .accumulate = accumulate};
    RT_TRY(rt_cuda_gemm(q, &g, err));
out:
    rt_cuda_temp_free(q, temp);
    return st;
}

/* y [rows, 2I] = x [gate | up]^T. Weights that must be dequantised lie side by side then, and make one product. */
static enum rt_status product_pair(struct rt_queue *q, struct rt_act x, int64_t scale_ld, const struct rt_weight *gate, const struct rt_weight *up,
                                   char *y, int64_t rows, struct rt_err *err)
{
    const int64_t I = gate->rows, K = gate->cols;
    char *both = NULL;
    enum rt_status st;
    if (x.scale != NULL || gate->dtype != RT_E4M3 || up->dtype != RT_E4M3) {
        RT_TRY(product(q, x, scale_ld, gate, y, rows, 2 * I, false, true, err));
        RT_TRY(product(q, x, scale_ld, up, y + I * 2, rows, 2 * I, false, true, err));
        goto out;
    }
    RT_TRY(rt_cuda_temp(q, (size_t)(2 * I * K) * 2, &both, err));
    RT_TRY(rt_cuda_dequant(q, gate, 0, I, both, err));
    RT_TRY(rt_cuda_dequant(q, up, 0, I, both + I * K * 2, err));
    const struct rt_cuda_gemm_args g = {.a = x.data, .b = both, .d = y, .m = rows, .n = 2 * I, .k = K, .b_t = true};
    RT_TRY(rt_cuda_gemm(q, &g, err));
out:
    rt_cuda_temp_free(q, both);
    return st;
}

static struct rt_act rows_from(struct rt_act x, int64_t row, int64_t cols)
{
    if (x.scale == NULL)
        return (struct rt_act){(char *)x.data + row * cols * 2, NULL};
    return (struct rt_act){(char *)x.data + row * cols, x.scale + row * (cols / BLOCK)};
}

/* ---- experts over sorted rows ---- */

/* A group: experts first .. first + n - 1 of the list, with the rows of perm that offset [n + 1] says. */
struct group {
    int first, n;
    int32_t *offset; /* [n_experts + 1] */
    int64_t *base;   /* [n_experts + 1] */
};

/* The next experts and rows from *row on, at most `most` rows with padding; *row behind them. false: nothing is left. */
static bool next_group(const struct rt_moe_ffn_args *a, struct group *g, int *expert, int32_t *row, int64_t most)
{
    int64_t have = 0;
    while (*expert < a->n_experts && a->offset[*expert + 1] <= *row)
        (*expert)++;
    g->first = *expert;
    g->n = 0;
    g->offset[0] = *row;
    for (int e = *expert; e < a->n_experts && have < most; e++) {
        const int64_t left = a->offset[e + 1] - *row, room = most - have; /* both multiples of PAD but for left */
        const int64_t take = left <= room ? left : g->n == 0 ? room : 0; /* an expert is cut only where it is alone */
        if (take == 0 && left > 0)
            break;
        *row += (int32_t)take;
        have += (take + PAD - 1) / PAD * PAD;
        g->offset[++g->n] = *row;
    }
    return have > 0;
}

static enum rt_status run_products(struct rt_queue *q, const struct rt_moe_ffn_args *a, const struct group *g, const struct rt_cuda_moe_group *t,
                                   struct rows *r, struct rt_err *err)
{
    const bool quantised = a->x.scale != NULL;
    const int64_t H = a->H, I = a->I;
    enum rt_status st = RT_OK;
    for (int j = 0; j < g->n; j++) {
        const int64_t base = g->base[j], padded = g->base[j + 1] - base, count = g->offset[j + 1] - g->offset[j];
        const struct rt_act x = rows_from(r->x, base, H);
        if (count > 0)
            RT_TRY(product_pair(q, x, padded, a->gate[g->first + j], a->up[g->first + j], r->gate_up + base * 2 * I * 2, count, err));
    }
    RT_TRY(rt_cuda_moe_swiglu(q, t, r->gate_up, r->gate_up + I * 2, 2 * I, r->h, a->I, a->pow2, err));
    for (int j = 0; j < g->n; j++) {
        const int64_t base = g->base[j], padded = g->base[j + 1] - base, count = g->offset[j + 1] - g->offset[j];
        if (count > 0)
            RT_TRY(product(q, rows_from(r->h, base, I), padded, a->down[g->first + j], r->out + base * H * 2, count, H, false, quantised, err));
    }
out:
    return st;
}

/* Whether both products of a quantised MLP have the form that gates and quantises as it goes. */
static bool own_form(const struct rt_dev *dev, const struct rt_moe_ffn_args *a)
{
    return a->x.scale != NULL && rt_cuda_group8_fits(dev, a->H, a->I, true) && rt_cuda_group8_fits(dev, a->I, a->H, false);
}

/* h = the e4m3 form of silu(gate x) * up x, for the n experts from `first` on. row: the table of rows whose codes lie with their tokens, or NULL. */
static enum rt_status own_gated(struct rt_queue *q, const struct rt_moe_ffn_args *a, int first, int n, const int64_t *base, const void *row,
                                struct rt_act x, struct rt_act h, struct rt_err *err)
{
    const struct rt_cuda_group8 g = {.x = x, .row = row, .k = a->k, .base = base, .n_experts = n, .K = a->H, .N = a->I, .w = a->gate + first,
                                     .up = a->up + first, .hq = h, .pow2 = a->pow2};
    return rt_cuda_group8(q, &g, err);
}

/* out [rows, H] = down h, or += with accumulate, rounded once. rows: of out that exist, 0: all. */
static enum rt_status own_down(struct rt_queue *q, const struct rt_moe_ffn_args *a, int first, int n, const int64_t *base, struct rt_act h, void *out,
                               int64_t rows, bool accumulate, struct rt_err *err)
{
    const struct rt_cuda_group8 g = {.x = h, .base = base, .n_experts = n, .K = a->I, .N = a->H, .w = a->down + first, .y = out, .rows = rows,
                                     .accumulate = accumulate};
    return rt_cuda_group8(q, &g, err);
}

static enum rt_status run_group(struct rt_queue *q, const struct rt_moe_ffn_args *a, const struct group *g, struct rt_err *err)
{
    const bool quantised = a->x.scale != NULL, own = own_form(q->dev, a) && (uintptr_t)a->x.data % 16 == 0;
    const int64_t rows = rt_cuda_moe_place(g->offset, g->n, PAD, g->base);
    struct rt_cuda_moe_group t = {0};
    struct rows r = {0};
    enum rt_status st;
    RT_TRY(rt_cuda_moe_group_make(q, a->perm, g->offset, g->n, PAD, a->n, a->k, true, &t, err));
    if (own) /* codes stay with their tokens */
        RT_TRY(rt_cuda_temp(q, (size_t)(rows * (a->H / BLOCK)) * sizeof(float), &r.x.scale, err));
    else
        RT_TRY(alloc_act(q, quantised, rows, a->H, &r.x, err));
    RT_TRY(rt_cuda_moe_gather(q, &t, a->x, r.x, a->H, err));
    RT_TRY(alloc_act(q, quantised, rows, a->I, &r.h, err));
    RT_TRY(rt_cuda_temp(q, (size_t)(rows * a->H) * 2, &r.out, err));
    if (own) {
        RT_TRY(own_gated(q, a, g->first, g->n, g->base, t.row, (struct rt_act){a->x.data, r.x.scale}, r.h, err));
        RT_TRY(own_down(q, a, g->first, g->n, g->base, r.h, r.out, 0, false, err));
    } else {
        RT_TRY(rt_cuda_temp(q, (size_t)(rows * a->I) * 4, &r.gate_up, err));
        RT_TRY(run_products(q, a, g, &t, &r, err));
    }
    RT_TRY(rt_cuda_moe_combine(q, &t, r.out, a->weight, a->y, a->H, err));
out:
    free_rows(q, &r);
    rt_cuda_moe_group_release(q, &t);
    return st;
}

static enum rt_status experts(struct rt_queue *q, const struct rt_moe_ffn_args *a, struct rt_err *err)
{
    const bool quantised = a->x.scale != NULL, scaled = quantised && rt_cuda_lt_block_scaled(q->dev);
    const size_t count = (size_t)a->n_experts + 1;
    const int64_t wide = a->H > a->I ? a->H : a->I;
    /* what the products take beside the group: two weights, and where codes are dequantised, the operand */
    const size_t weight = scaled ? 0 : (size_t)a->H * (size_t)a->I * 4, operand = quantised && !scaled ? (size_t)wide * 2 : 0;
    const size_t gated = own_form(q->dev, a) ? 0 : (size_t)a->I * 4;
    const size_t per_row = act_bytes(quantised, a->H) + act_bytes(quantised, a->I) + gated + (size_t)a->H * 2 + operand;
    const size_t tables = rt_cuda_moe_group_bytes(1, a->n, a->k, true) - rt_cuda_moe_group_bytes(0, a->n, a->k, true);
    const int64_t most = rows_that_fit(q->dev, rt_cuda_moe_group_bytes(0, a->n, a->k, true) + weight, per_row + tables);
    struct group g = {0};
    int expert = 0;
    int32_t row = a->offset[0];
    enum rt_status st;
    RT_TRY(rt_alloc(count, sizeof *g.offset, "the rows of a group of experts", &g.offset, err));
    RT_TRY(rt_alloc(count, sizeof *g.base, "the rows of a group of experts", &g.base, err));
    while (next_group(a, &g, &expert, &row, most))
        RT_TRY(run_group(q, a, &g, err));
out:
    rt_free(g.offset);
    rt_free(g.base);
    return st;
}

/* ---- one MLP over all rows ---- */

/* y rows first .. first + n - 1; first is a multiple of PAD. */
static enum rt_status chunk(struct rt_dev *dev, struct rt_queue *q, const struct rt_moe_ffn_args *a, int e, int64_t first, int64_t n, struct rt_err *err)
{
    const bool quantised = a->x.scale != NULL;
    const int64_t H = a->H, I = a->I, padded = rt_act_rows(n), blocks = H / BLOCK;
    struct rt_act x = {(char *)a->x.data + first * H * (quantised ? 1 : 2), a->x.scale};
    struct rows r = {0};
    enum rt_status st;
    if (quantised && n < a->n) {
        RT_TRY(rt_cuda_temp(q, (size_t)(padded * blocks) * sizeof(float), &r.x.scale, err));
        RT_TRY(rt_cuda_copy_scales(q, a->x.scale + first, rt_act_rows(a->n), r.x.scale, padded, n, blocks, err));
        x.scale = r.x.scale;
    }
    RT_TRY(alloc_act(q, quantised, padded, I, &r.h, err));
    if (own_form(dev, a)) {
        const int64_t base[2] = {0, padded};
        RT_TRY(own_gated(q, a, e, 1, base, NULL, x, r.h, err));
        RT_TRY(own_down(q, a, e, 1, base, r.h, (char *)a->y + first * H * 2, n, true, err));
    } else {
        RT_TRY(rt_cuda_temp(q, (size_t)(padded * I) * 4, &r.gate_up, err));
        RT_TRY(product_pair(q, x, padded, a->gate[e], a->up[e], r.gate_up, n, err));
        const struct rt_swiglu_fwd_args s = {.gate = r.gate_up, .up = r.gate_up + I * 2, .ld = 2 * I, .h = quantised ? NULL : r.h.data,
                                             .hq = quantised ? r.h : (struct rt_act){0}, .n = n, .I = I, .pow2 = a->pow2};
        RT_TRY(rt_cuda_swiglu_fwd(dev, q, &s, err));
        RT_TRY(product(q, r.h, padded, a->down[e], (char *)a->y + first * H * 2, n, H, true, false, err));
    }
out:
    free_rows(q, &r);
    return st;
}

static enum rt_status all_rows(struct rt_dev *dev, struct rt_queue *q, const struct rt_moe_ffn_args *a, struct rt_err *err)
{
    const bool quantised = a->x.scale != NULL, scaled = quantised && rt_cuda_lt_block_scaled(dev);
    const int64_t wide = a->H > a->I ? a->H : a->I;
    const size_t weight = scaled ? 0 : (size_t)a->H * (size_t)a->I * 4, operand = quantised && !scaled ? (size_t)wide * 2 : 0;
    const size_t gated = own_form(dev, a) ? 0 : (size_t)a->I * 4;
    const size_t per_row = (quantised ? (size_t)a->H / BLOCK * sizeof(float) : 0) + gated + act_bytes(quantised, a->I) + operand;
    const int64_t most = rows_that_fit(dev, weight, per_row);
    enum rt_status st = RT_OK;
    for (int e = 0; e < a->n_experts; e++)
        for (int64_t r = 0; r < a->n; r += most)
            RT_TRY(chunk(dev, q, a, e, r, a->n - r < most ? a->n - r : most, err));
out:
    return st;
}

enum rt_status rt_cuda_moe_ffn(struct rt_dev *dev, struct rt_queue *q, const struct rt_moe_ffn_args *a, struct rt_err *err)
{
    const bool quantised = a->x.scale != NULL;
    enum rt_status st = RT_OK;
    for (int e = 0; e < a->n_experts; e++) {
        RT_TRY(rt_cuda_weight_check(a->gate[e], "moe_ffn", a->I, a->H, quantised, err));
        RT_TRY(rt_cuda_weight_check(a->up[e], "moe_ffn", a->I, a->H, quantised, err));
        RT_TRY(rt_cuda_weight_check(a->down[e], "moe_ffn", a->H, a->I, quantised, err));
    }
    if (a->n > 0 && a->n_experts > 0 && rt_cuda_skinny_moe_fits(a))
        return rt_cuda_skinny_moe(dev, q, a, err);
    if (a->n > 0 && a->n_experts > 0)
        RT_TRY(a->perm != NULL ? experts(q, a, err) : all_rows(dev, q, a, err));
out:
    return st;
}
