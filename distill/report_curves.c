#include <math.h>
#include <stdio.h>
#include <string.h>

#include "distill/report_parts.h"

/* Curves of all arms, each cut into the same buckets of steps: mean over a run's points in a bucket, then mean, least and greatest over
 * the arm's runs. */
struct curves {
    double x[RT_SVG_POINTS], y[RT_CMP_MAX_ARMS][RT_SVG_POINTS], lo[RT_CMP_MAX_ARMS][RT_SVG_POINTS], hi[RT_CMP_MAX_ARMS][RT_SVG_POINTS];
    int n;
};

static const double *doubles(const struct rt_buf *b, size_t *n)
{
    *n = b->len / sizeof(double);
    return (const double *)(const void *)b->data;
}

static bool range(const struct rt_comparison *c, double *first, double *last)
{
    size_t n;
    *first = INFINITY;
    *last = -INFINITY;
    for (int r = 0; r < c->n_runs; r++) {
        const double *step = doubles(&c->run[r].step, &n);
        for (size_t i = 0; i < n; i++) {
            *first = fmin(*first, step[i]);
            *last = fmax(*last, step[i]);
        }
    }
    return *last >= *first && *last - *first < 1e15;
}

static void add_run(const struct rt_cmp_run *r, int which, double first, double last, const struct curves *k, double *sum, double *count)
{
    size_t n;
    const double *step = doubles(&r->step, &n), *y = doubles(&r->curve[which], &n);
    memset(sum, 0, RT_SVG_POINTS * sizeof *sum);
    memset(count, 0, RT_SVG_POINTS * sizeof *count);
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(y[i]))
            continue;
        int b = (int)((step[i] - first) / (last - first + 1) * k->n);
        b = b < 0 ? 0 : b >= k->n ? k->n - 1 : b;
        sum[b] += y[i];
        count[b]++;
    }
}

static bool fill(const struct rt_comparison *c, int which, struct curves *k)
{
    double first, last, sum[RT_SVG_POINTS], count[RT_SVG_POINTS];
    bool any = false;
    if (!range(c, &first, &last))
        return false;
    const double steps = last - first + 1;
    k->n = steps < RT_SVG_POINTS ? (int)steps : RT_SVG_POINTS;
    for (int b = 0; b < k->n; b++)
        k->x[b] = k->n == (int)steps ? first + b : first + (b + 0.5) * steps / k->n;
    for (int a = 0; a < c->n_arms; a++) {
        int runs[RT_SVG_POINTS] = {0};
        for (int b = 0; b < k->n; b++)
            k->y[a][b] = 0;
        for (int r = 0; r < c->arm[a].n_runs; r++) {
            add_run(&c->run[c->arm[a].run[r]], which, first, last, k, sum, count);
            for (int b = 0; b < k->n; b++) {
                if (count[b] == 0)
                    continue;
                const double v = sum[b] / count[b];
                k->lo[a][b] = runs[b] > 0 ? fmin(k->lo[a][b], v) : v;
                k->hi[a][b] = runs[b] > 0 ? fmax(k->hi[a][b], v) : v;
                k->y[a][b] += v;
                runs[b]++;
                any = true;
            }
        }
        for (int b = 0; b < k->n; b++)
            if (runs[b] == 0)
                k->y[a][b] = k->lo[a][b] = k->hi[a][b] = NAN;
            else
                k->y[a][b] /= runs[b];
    }
    return any;
}

/* A loss that no arm has: all of it 0 or absent. */
static bool all_zero(const struct rt_comparison *c, const struct curves *k)
{
    for (int a = 0; a < c->n_arms; a++)
        for (int b = 0; b < k->n; b++)
            if (isfinite(k->y[a][b]) && k->y[a][b] != 0)
                return false;
    return true;
}

static enum rt_status training(const struct rt_comparison *c, struct curves *k, int which, bool *drawn, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_svg_line line[RT_CMP_MAX_ARMS];
    const struct rt_cmp_curve_info *info = &rt_cmp_curve_info[which];
    char id[32];
    int n = 0;
    if (!fill(c, which, k) || all_zero(c, k))
        return RT_OK;
    for (int a = 0; a < c->n_arms; a++) {
        const bool spread = c->arm[a].n_runs > 1;
        line[n++] = (struct rt_svg_line){c->arm[a].name, a, k->x, k->y[a], spread ? k->lo[a] : NULL, spread ? k->hi[a] : NULL, k->n, false};
    }
    snprintf(id, sizeof id, "t%d", which);
    const struct rt_svg_figure f = {.id = id, .title = info->title, .desc = "One line for each arm over the optimiser steps of training; the means of the last tenth are in the table below.",
                                    .x_label = "optimiser step"};
    if (!*drawn)
        RT_TRY(rt_buf_puts(out, "<h2>Curves</h2>\n<div class=\"figures\">\n", err));
    *drawn = true;
    RT_TRY(rt_figure_open(out, info->title, info->unit, err));
    RT_TRY(rt_svg_lines(out, &f, line, n, err));
    RT_TRY(rt_figure_close(out, err));
out:
    return st;
}

/* ---- held-out losses over steps ---- */
/* The arm's mean at each step of its first run's history; runs without that step count for nothing. *n points. */
static void history(const struct rt_comparison *c, int a, int eval, int m, double *x, double *y, int *n)
{
    const struct rt_cmp_eval *first = rt_cmp_eval_at(&c->run[c->arm[a].run[0]], eval);
    *n = 0;
    if (first == NULL)
        return;
    const struct rt_cmp_point *p = (const struct rt_cmp_point *)(const void *)first->history.data;
    const size_t points = first->history.len / sizeof *p, stride = points / RT_SVG_POINTS + 1;
    for (size_t i = 0; i < points && *n < RT_SVG_POINTS; i += stride) {
        double sum = 0;
        int runs = 0;
        for (int r = 0; r < c->arm[a].n_runs; r++) {
            const struct rt_cmp_eval *e = rt_cmp_eval_at(&c->run[c->arm[a].run[r]], eval);
            const struct rt_cmp_point *q = e != NULL ? (const struct rt_cmp_point *)(const void *)e->history.data : NULL;
            for (size_t j = 0; q != NULL && j < e->history.len / sizeof *q; j++)
                if (q[j].step == p[i].step && isfinite(q[j].value[m])) {
                    sum += q[j].value[m];
                    runs++;
                    break;
                }
        }
        x[*n] = p[i].step;
        y[(*n)++] = runs > 0 ? sum / runs : NAN;
    }
}

static enum rt_status held_out(const struct rt_comparison *c, struct curves *k, int e, int m, bool *drawn, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_svg_line line[RT_CMP_MAX_ARMS];
    char id[32], title[256];
    int most = 0;
    for (int a = 0; a < c->n_arms; a++) {
        int n;
        history(c, a, e, m, k->lo[a], k->y[a], &n); /* lo holds x here */
        line[a] = (struct rt_svg_line){c->arm[a].name, a, k->lo[a], k->y[a], NULL, NULL, n, n <= 20};
        most = n > most ? n : most;
    }
    if (most < 2)
        return RT_OK;
    snprintf(id, sizeof id, "h%d-%d", e, m);
    snprintf(title, sizeof title, "%s, %.100s", rt_cmp_metric_info[m].title, c->eval[e]);
    const struct rt_svg_figure f = {.id = id, .title = title, .desc = "One line for each arm over the optimiser steps, measured on held-out data; the last values are in the table of results.",
                                    .x_label = "optimiser step", .percent = rt_cmp_metric_info[m].share};
    if (!*drawn)
        RT_TRY(rt_buf_puts(out, "<h2>Curves</h2>\n<div class=\"figures\">\n", err));
    *drawn = true;
    RT_TRY(rt_figure_open(out, title, "held out", err));
    RT_TRY(rt_svg_lines(out, &f, line, c->n_arms, err));
    RT_TRY(rt_figure_close(out, err));
out:
    return st;
}

static enum rt_status final_table(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    char u[32];
    RT_TRY(rt_buf_puts(out, "<div class=\"scroll\"><table><caption>Training: means over the last tenth of the steps</caption><thead><tr>", err));
    RT_TRY(rt_cell_head(out, "arm", false, err));
    for (int i = 0; i < RT_CURVE_GRAD; i++)
        RT_TRY(rt_cell_head(out, rt_cmp_curve_info[i].title, true, err));
    RT_TRY(rt_buf_puts(out, "</tr></thead><tbody>\n", err));
    for (int a = 0; a < c->n_arms; a++) {
        RT_TRY(rt_cell_row(out, c->arm[a].name, err));
        for (int i = 0; i < RT_CURVE_GRAD; i++)
            RT_TRY(rt_cell_number(out, rt_cmp_number(u, c->arm[a].final[i], false), err));
        RT_TRY(rt_buf_puts(out, "</tr>\n", err));
    }
    RT_TRY(rt_buf_puts(out, "</tbody></table></div>\n", err));
out:
    return st;
}

enum rt_status rt_report_curves(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    struct curves *k = NULL;
    bool drawn = false;
    RT_TRY(rt_alloc(1, sizeof *k, "curves", &k, err));
    for (int e = 0; e < c->n_evals; e++)
        for (int m = 0; m < RT_CMP_METRICS; m++)
            if (c->has[e][m] && m != RT_CMP_ACCURACY)
                RT_TRY(held_out(c, k, e, m, &drawn, out, err));
    for (int i = 0; i < RT_CURVES; i++)
        RT_TRY(training(c, k, i, &drawn, out, err));
    if (!drawn)
        goto out;
    RT_TRY(rt_buf_puts(out, "</div>\n<p class=\"sub\">Lines are means over an arm's runs; a band spans its runs.</p>\n", err));
    RT_TRY(final_table(c, out, err));
out:
    rt_free(k);
    return st;
}
