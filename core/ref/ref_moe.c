/* Mixture of experts: route, sort, expert products. */
#include "core/ref/ref.h"

/* out[0..k) = the indices of the k greatest of v[0..n), ties to the smaller index, in descending order. taken [n] is scratch. */
static void greatest(const float *v, int n, int k, int32_t *out, bool *taken)
{
    memset(taken, 0, (size_t)n * sizeof *taken);
    for (int j = 0; j < k; j++) {
        int best = -1;
        for (int i = 0; i < n; i++)
            if (!taken[i] && (best < 0 || v[i] > v[best]))
                best = i;
        taken[best] = true;
        out[j] = best;
    }
}

/* Scores of one token: float32 from here on. */
static void scores(const struct rt_route_args *a, const real *x, const real *w, float *score)
{
    double top = -INFINITY, sum = 0;
    for (int e = 0; e < a->E; e++) {
        const float z = (float)ref_dot(x, w + (int64_t)e * a->H, a->H);
        score[e] = a->sigmoid ? (float)ref_sigmoid(z) : z;
        top = fmax(top, z);
    }
    if (a->sigmoid)
        return;
    for (int e = 0; e < a->E; e++)
        sum += exp(score[e] - top);
    for (int e = 0; e < a->E; e++)
        score[e] = (float)(exp(score[e] - top) / sum);
}

/* choice = -inf outside the topk_group groups of the greatest group score. */
static void keep_groups(const struct rt_route_args *a, float *choice, float *group_score, int32_t *kept, bool *taken)
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
        group_score[g] = a->group_top2 ? best + second : best;
    }
    greatest(group_score, a->n_group, a->topk_group, kept, taken);
    for (int g = 0; g < a->n_group; g++) /* taken: which groups stay */
        for (int i = g * size; i < (g + 1) * size && !taken[g]; i++)
            choice[i] = -INFINITY;
}

static enum rt_status check_route(const struct rt_route_args *a, struct rt_err *err)
{
    const int groups = a->n_group > 1 ? a->n_group : 1, stay = a->n_group > 1 ? a->topk_group : 1;
    if (a->E <= 0 || a->k <= 0 || a->E % groups != 0 || stay <= 0 || stay > groups || a->k > a->E / groups * stay)
        return rt_fail(err, RT_SHAPE, "route: %d of %d experts, %d of %d groups: expected experts that divide into the groups, and "
                       "as many in the kept groups as are chosen", a->k, a->E, stay, groups);
    if (a->n_group > 1 && a->group_top2 && a->E / groups < 2)
        return rt_fail(err, RT_SHAPE, "route: groups of one expert have no two best");
    return REF(weight_check)(a->w, "route", a->E, a->H, err);
}

REF_OP(route)
{
    enum rt_status st;
    const real *bias = NULL;
    real *bias_own = NULL, *w = NULL;
    float *score = NULL, *choice = NULL, *group_score = NULL;
    int32_t *kept = NULL;
    bool *taken = NULL;

    RT_TRY(check_route(a, err));
    RT_TRY(REF(weight_vec)(a->bias, a->E, &bias, &bias_own, err));
    RT_TRY(rt_alloc((size_t)a->E * (size_t)a->H, sizeof(real), "the router's weight", &w, err));
    RT_TRY(rt_alloc((size_t)a->E, sizeof *score, "scratch of route", &score, err));
    RT_TRY(rt_alloc((size_t)a->E, sizeof *choice, "scratch of route", &choice, err));
    RT_TRY(rt_alloc((size_t)a->E, sizeof *group_score, "scratch of route", &group_score, err));
    RT_TRY(rt_alloc((size_t)a->E, sizeof *kept, "scratch of route", &kept, err));
    RT_TRY(rt_alloc((size_t)a->E, sizeof *taken, "scratch of route", &taken, err));
    for (int e = 0; e < a->E; e++) {
        real *to = w + (int64_t)e * a->H;
        const real *row = REF(weight_row)(a->w, e, to);
        if (row != to)
            memcpy(to, row, (size_t)a->H * sizeof *to);
    }
    for (int64_t t = 0; t < a->n; t++) {
        int32_t *ids = a->ids + t * a->k;
        scores(a, (const real *)a->x + t * a->H, w, score);
        bool sound = true;
        for (int e = 0; e < a->E; e++) {
            choice[e] = bias != NULL ? score[e] + (float)bias[e] : score[e];
            sound = sound && isfinite(choice[e]);
        }
        if (a->n_group > 1)
            keep_groups(a, choice, group_score, kept, taken);
        greatest(choice, a->E, a->k, ids, taken);
        float sum = 0;
        for (int j = 0; j < a->k; j++)
            sum += score[ids[j]];
        for (int j = 0; j < a->k; j++)
            a->weight[t * a->k + j] = !sound ? NAN : (a->norm ? score[ids[j]] / (sum + 1e-20f) : score[ids[j]]) * a->scale;
    }
out:
    rt_free(bias_own);
    rt_free(w);
    rt_free(score);
    rt_free(choice);
    rt_free(group_score);
    rt_free(kept);
    rt_free(taken);
    return st;
}

REF_OP(moe_sort)
{
    const int64_t total = a->n * a->k;
    for (int64_t i = 0; i < total; i++)
        if (a->ids[i] < 0 || a->ids[i] >= a->E)
            return rt_fail(err, RT_SHAPE, "moe_sort: expert %d for token %lld, expected 0 .. %d", (int)a->ids[i],
                           (long long)(i / a->k), a->E - 1);
    int64_t at = 0;
    for (int e = 0; e < a->E; e++) {
        a->offset[e] = (int32_t)at;
        for (int64_t i = 0; i < total; i++)
            if (a->ids[i] == e)
                a->perm[at++] = (int32_t)i;
    }
    a->offset[a->E] = (int32_t)at;
    return RT_OK;
}

/* One row of one expert at a time, for its scratch. */
struct ffn {
    real *gate, *up, *down; /* the expert's rows, converted; NULL where x is in e4m3 form */
    real *h;                /* [I] */
    struct rt_act hq;       /* [1, I] */
};

static void copy_weight(real *to, const struct rt_weight *w)
{
    for (int64_t r = 0; r < w->rows; r++) {
        const real *row = REF(weight_row)(w, r, to + r * w->cols);
        if (row != to + r * w->cols)
            memcpy(to + r * w->cols, row, (size_t)w->cols * sizeof *to);
    }
}

static const real *row_of(const real *w, int64_t row, int64_t cols)
{
    return w != NULL ? w + row * cols : NULL;
}

/* y[0..H) += weight * down(silu(gate x) * up x) for token t */
static void ffn_row(const struct rt_moe_ffn_args *a, const struct ffn *f, int e, int64_t t, float weight, real *y)
{
    for (int i = 0; i < a->I; i++) {
        const real g = (real)REF(dot_row)(&a->x, a->H, t, a->n, a->gate[e], i, row_of(f->gate, i, a->H), a->H);
        const real u = (real)REF(dot_row)(&a->x, a->H, t, a->n, a->up[e], i, row_of(f->up, i, a->H), a->H);
        f->h[i] = (real)(g * ref_sigmoid(g) * u);
    }
    struct rt_act h = {.data = f->h};
    if (a->x.scale != NULL) {
        h = f->hq;
        REF(quant_row)(f->h, &h, 0, 1, a->I, a->pow2);
    }
    for (int i = 0; i < a->H; i++)
        y[i] = (real)(y[i] + weight * REF(dot_row)(&h, a->I, 0, 1, a->down[e], i, row_of(f->down, i, a->I), a->I));
}

REF_OP(moe_ffn)
{
    enum rt_status st = RT_OK;
    struct ffn f = {0};
    const size_t size = (size_t)a->H * (size_t)a->I;

    for (int e = 0; e < a->n_experts; e++) {
        RT_TRY(REF(weight_check)(a->gate[e], "moe_ffn", a->I, a->H, err));
        RT_TRY(REF(weight_check)(a->up[e], "moe_ffn", a->I, a->H, err));
        RT_TRY(REF(weight_check)(a->down[e], "moe_ffn", a->H, a->I, err));
        RT_TRY(REF(act_check)(&a->x, a->gate[e], "moe_ffn", a->H, err));
        RT_TRY(REF(act_check)(&a->x, a->up[e], "moe_ffn", a->H, err));
        RT_TRY(REF(act_check)(&a->x, a->down[e], "moe_ffn", a->I, err));
    }
    if (a->x.scale == NULL) {
        RT_TRY(rt_alloc(size, sizeof(real), "an expert", &f.gate, err));
        RT_TRY(rt_alloc(size, sizeof(real), "an expert", &f.up, err));
        RT_TRY(rt_alloc(size, sizeof(real), "an expert", &f.down, err));
    }
    RT_TRY(rt_alloc((size_t)a->I, sizeof(real), "scratch of moe_ffn", &f.h, err));
    RT_TRY(rt_alloc((size_t)a->I, 1, "scratch of moe_ffn", &f.hq.data, err));
    RT_TRY(rt_alloc((size_t)a->I / REF_BLOCK + 1, sizeof *f.hq.scale, "scratch of moe_ffn", &f.hq.scale, err));
    for (int e = 0; e < a->n_experts; e++) {
        const int64_t first = a->perm != NULL ? a->offset[e] : 0, end = a->perm != NULL ? a->offset[e + 1] : a->n;
        if (a->x.scale == NULL && end > first) {
            copy_weight(f.gate, a->gate[e]);
            copy_weight(f.up, a->up[e]);
            copy_weight(f.down, a->down[e]);
        }
        for (int64_t r = first; r < end; r++) {
            const int64_t t = a->perm != NULL ? a->perm[r] / a->k : r;
            ffn_row(a, &f, e, t, a->perm != NULL ? a->weight[a->perm[r]] : 1, (real *)a->y + t * a->H);
        }
    }
out:
    rt_free(f.gate);
    rt_free(f.up);
    rt_free(f.down);
    rt_free(f.h);
    rt_free(f.hq.data);
    rt_free(f.hq.scale);
    return st;
}
