#include "distill/report_parts.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"

enum rt_status rt_figure_open(struct rt_buf *out, const char *title, const char *unit, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_puts(out, "<figure><figcaption>", err));
    RT_TRY(rt_html_text(out, title, err));
    RT_TRY(rt_buf_puts(out, " <span>", err));
    RT_TRY(rt_html_text(out, unit, err));
    RT_TRY(rt_buf_puts(out, "</span></figcaption>\n", err));
out:
    return st;
}

enum rt_status rt_figure_close(struct rt_buf *out, struct rt_err *err)
{
    return rt_buf_puts(out, "</figure>\n", err);
}

enum rt_status rt_cell_head(struct rt_buf *out, const char *text, bool number, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_puts(out, number ? "<th scope=\"col\" class=\"n\">" : "<th scope=\"col\">", err));
    RT_TRY(rt_html_text(out, text, err));
    RT_TRY(rt_buf_puts(out, "</th>", err));
out:
    return st;
}

enum rt_status rt_cell_row(struct rt_buf *out, const char *text, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_puts(out, "<tr><th scope=\"row\">", err));
    RT_TRY(rt_html_text(out, text, err));
    RT_TRY(rt_buf_puts(out, "</th>", err));
out:
    return st;
}

enum rt_status rt_cell_number(struct rt_buf *out, const char *text, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_puts(out, "<td class=\"n\">", err));
    RT_TRY(rt_html_text(out, text, err));
    RT_TRY(rt_buf_puts(out, "</td>", err));
out:
    return st;
}

static enum rt_status interval_cell(struct rt_buf *out, const struct rt_interval *v, bool share, bool sign, struct rt_err *err)
{
    char x[32], lo[32], hi[32];
    const char *(*text)(char[32], double, bool) = sign ? rt_cmp_signed : rt_cmp_number;
    if (isnan(v->lo))
        return rt_buf_printf(out, err, "<td class=\"n\">%s</td>", text(x, v->mean, share));
    return rt_buf_printf(out, err, "<td class=\"n\">%s <span class=\"ci\">[%s, %s]</span></td>", text(x, v->mean, share), text(lo, v->lo, share),
                         text(hi, v->hi, share));
}

/* ---- held-out results ---- */
static enum rt_status results_table(const struct rt_comparison *c, int e, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_puts(out, "<div class=\"scroll\"><table><thead><tr>", err));
    RT_TRY(rt_cell_head(out, "arm", false, err));
    for (int m = 0; m < RT_CMP_METRICS; m++)
        if (c->has[e][m])
            RT_TRY(rt_cell_head(out, rt_cmp_metric_info[m].title, true, err));
    RT_TRY(rt_buf_puts(out, "</tr></thead><tbody>\n", err));
    for (int a = 0; a < c->n_arms; a++) {
        RT_TRY(rt_cell_row(out, c->arm[a].name, err));
        for (int m = 0; m < RT_CMP_METRICS; m++)
            if (c->has[e][m])
                RT_TRY(interval_cell(out, &c->result[e][a][m].value, rt_cmp_metric_info[m].share, false, err));
        RT_TRY(rt_buf_puts(out, "</tr>\n", err));
    }
    RT_TRY(rt_buf_puts(out, "</tbody></table></div>\n", err));
out:
    return st;
}

static enum rt_status results_figure(const struct rt_comparison *c, int e, int m, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_cmp_metric_info *info = &rt_cmp_metric_info[m];
    struct rt_svg_bar bar[RT_CMP_MAX_ARMS];
    char id[32], desc[256], unit[64];
    snprintf(id, sizeof id, "r%d-%d", e, m);
    snprintf(desc, sizeof desc, "One bar for each arm with its 95 %% interval; the numbers are in the table above. %s is better.", info->lower_is_better ? "Lower" : "Higher");
    snprintf(unit, sizeof unit, "%s", info->lower_is_better ? "lower is better" : "higher is better");
    for (int a = 0; a < c->n_arms; a++) {
        const struct rt_interval *v = &c->result[e][a][m].value;
        bar[a] = (struct rt_svg_bar){c->arm[a].name, a, v->mean, v->lo, v->hi};
    }
    const struct rt_svg_figure f = {.id = id, .title = info->title, .desc = desc, .x_label = info->unit, .percent = info->share};
    RT_TRY(rt_figure_open(out, info->title, unit, err));
    RT_TRY(rt_svg_bars(out, &f, bar, c->n_arms, err));
    RT_TRY(rt_figure_close(out, err));
out:
    return st;
}

enum rt_status rt_report_results(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_puts(out, "<h2>Held-out results</h2>\n", err));
    if (c->n_evals == 0)
        RT_TRY(rt_buf_puts(out, "<p>The runs hold no evaluation.</p>\n", err));
    for (int e = 0; e < c->n_evals; e++) {
        RT_TRY(rt_buf_puts(out, "<h3>", err));
        RT_TRY(rt_html_text(out, c->eval[e], err));
        RT_TRY(rt_buf_puts(out, "</h3>\n", err));
        RT_TRY(results_table(c, e, out, err));
        RT_TRY(rt_buf_puts(out, "<div class=\"figures\">\n", err));
        for (int m = 0; m < RT_CMP_METRICS; m++)
            if (c->has[e][m])
                RT_TRY(results_figure(c, e, m, out, err));
        RT_TRY(rt_buf_puts(out, "</div>\n", err));
    }
out:
    return st;
}

/* ---- paired differences ---- */
static bool paired(const struct rt_comparison *c, int e, int m)
{
    for (int a = 1; a < c->n_arms; a++)
        if (c->diff[e][a][m].value.n > 0)
            return true;
    return false;
}

static enum rt_status difference_row(const struct rt_comparison *c, int e, int a, int m, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_cmp_difference *d = &c->diff[e][a][m];
    const struct rt_cmp_metric_info *info = &rt_cmp_metric_info[m];
    char text[64];
    RT_TRY(rt_cell_row(out, c->arm[a].name, err));
    RT_TRY(rt_buf_puts(out, "<td>", err));
    RT_TRY(rt_html_text(out, c->eval[e], err));
    RT_TRY(rt_buf_printf(out, err, "</td><td>%s</td>", info->title));
    RT_TRY(interval_cell(out, &d->value, info->share, true, err));
    snprintf(text, sizeof text, "%" PRId64, d->value.n);
    RT_TRY(rt_cell_number(out, text, err));
    snprintf(text, sizeof text, "%d of %d", d->same_sign, d->seeds);
    RT_TRY(rt_cell_number(out, text, err));
    RT_TRY(rt_buf_printf(out, err, "<td>%s</td></tr>\n", !d->told ? "not told apart" : (d->value.mean < 0) == info->lower_is_better ? "better" : "worse"));
out:
    return st;
}

static enum rt_status difference_figure(const struct rt_comparison *c, int e, int m, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_cmp_metric_info *info = &rt_cmp_metric_info[m];
    struct rt_svg_bar bar[RT_CMP_MAX_ARMS];
    char id[32], title[256], unit[160];
    snprintf(id, sizeof id, "d%d-%d", e, m);
    snprintf(title, sizeof title, "%s, %.100s", info->title, c->eval[e]);
    snprintf(unit, sizeof unit, "minus %.100s; %s is better", c->arm[0].name, info->lower_is_better ? "below 0" : "above 0");
    for (int a = 1; a < c->n_arms; a++) {
        const struct rt_interval *v = &c->diff[e][a][m].value;
        bar[a - 1] = (struct rt_svg_bar){c->arm[a].name, a, v->mean, v->lo, v->hi};
    }
    const struct rt_svg_figure f = {.id = id, .title = title, .desc = "Paired difference of each arm from the first, with its 95 % interval; the numbers are in the table below.",
                                    .x_label = info->unit, .percent = info->share};
    RT_TRY(rt_figure_open(out, title, unit, err));
    RT_TRY(rt_svg_forest(out, &f, bar, c->n_arms - 1, err));
    RT_TRY(rt_figure_close(out, err));
out:
    return st;
}

enum rt_status rt_report_differences(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    static const char *const heads[] = {"arm", "evaluation", "metric", "difference", "pairs", "seeds that agree", ""};
    enum rt_status st = RT_OK;
    bool any = false;
    for (int e = 0; e < c->n_evals; e++)
        for (int m = 0; m < RT_CMP_METRICS; m++)
            any |= c->has[e][m] && paired(c, e, m);
    if (!any)
        return RT_OK;
    RT_TRY(rt_buf_puts(out, "<h2>Paired differences from <q>", err));
    RT_TRY(rt_html_text(out, c->arm[0].name, err));
    RT_TRY(rt_buf_puts(out, "</q></h2>\n<div class=\"figures\">\n", err));
    for (int e = 0; e < c->n_evals; e++)
        for (int m = 0; m < RT_CMP_METRICS; m++)
            if (c->has[e][m] && paired(c, e, m))
                RT_TRY(difference_figure(c, e, m, out, err));
    RT_TRY(rt_buf_puts(out, "</div>\n<div class=\"scroll\"><table><thead><tr>", err));
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++)
        RT_TRY(rt_cell_head(out, heads[i], i >= 3 && i < 6, err));
    RT_TRY(rt_buf_puts(out, "</tr></thead><tbody>\n", err));
    for (int e = 0; e < c->n_evals; e++)
        for (int m = 0; m < RT_CMP_METRICS; m++)
            for (int a = 1; a < c->n_arms && c->has[e][m] && paired(c, e, m); a++)
                RT_TRY(difference_row(c, e, a, m, out, err));
    RT_TRY(rt_buf_puts(out, "</tbody></table></div>\n", err));
out:
    return st;
}

/* ---- costs ---- */
static const char *maybe(char buf[32], double v, const char *(*text)(char[32], double))
{
    if (isnan(v) || v < 0)
        snprintf(buf, 32, "-");
    else
        text(buf, v);
    return buf;
}

static const char *bytes_text(char buf[32], double v)
{
    return rt_human_bytes(buf, (uint64_t)v);
}

static const char *flops_text(char buf[32], double v)
{
    snprintf(buf, 32, "%.3g", v);
    return buf;
}

/* What the arm was trained on: the sets of its first run. */
static enum rt_status data_cell(const struct rt_comparison *c, const struct rt_cmp_arm *a, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_json *data = rt_json_get(c->run[a->run[0]].run, "data");
    char text[160], count[32];
    RT_TRY(rt_buf_puts(out, "<td class=\"wrap\">", err));
    for (size_t i = 0; i < rt_json_len(data); i++) {
        const struct rt_json *d = rt_json_at(data, i);
        const char *kind = rt_json_as_string(rt_json_get(d, "kind"), NULL), *path = rt_json_as_string(rt_json_get(d, "path"), NULL);
        double tokens = NAN;
        const struct rt_json *t = rt_json_get(d, "tokens");
        if (t != NULL)
            rt_json_as_double(t, &tokens);
        snprintf(text, sizeof text, " (%.20s, %s tokens)", kind != NULL ? kind : "?", maybe(count, tokens, rt_human_count));
        RT_TRY(rt_buf_puts(out, i > 0 ? ", <code>" : "<code>", err));
        RT_TRY(rt_html_text(out, path != NULL ? path : "?", err));
        RT_TRY(rt_buf_puts(out, "</code>", err));
        RT_TRY(rt_html_text(out, text, err));
    }
    RT_TRY(rt_buf_puts(out, "</td>", err));
out:
    return st;
}

enum rt_status rt_report_costs(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    static const char *const heads[] = {"arm", "CE, KL, feature", "tokens", "training time", "tokens a second", "operations", "peak memory", "data"};
    enum rt_status st;
    char u[32];
    struct rt_svg_bar bar[RT_CMP_MAX_ARMS];
    RT_TRY(rt_buf_puts(out, "<h2>What each arm cost</h2>\n<div class=\"scroll\"><table><thead><tr>", err));
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++)
        RT_TRY(rt_cell_head(out, heads[i], i > 0 && i < 7, err));
    RT_TRY(rt_buf_puts(out, "</tr></thead><tbody>\n", err));
    for (int i = 0; i < c->n_arms; i++) {
        const struct rt_cmp_arm *a = &c->arm[i];
        RT_TRY(rt_cell_row(out, a->name, err));
        RT_TRY(rt_buf_puts(out, "<td class=\"n\">", err));
        for (int k = 0; k < 3; k++)
            RT_TRY(rt_buf_printf(out, err, isnan(a->weight[k]) ? "%s-" : "%s%g", k > 0 ? ", " : "", a->weight[k]));
        RT_TRY(a->weight[3] > 0 ? rt_buf_printf(out, err, ", spans %g</td>", a->weight[3]) : rt_buf_puts(out, "</td>", err));
        RT_TRY(rt_cell_number(out, maybe(u, a->tokens, rt_human_count), err));
        RT_TRY(rt_cell_number(out, maybe(u, a->seconds, rt_human_time), err));
        RT_TRY(rt_cell_number(out, maybe(u, a->tokens_per_second, rt_human_count), err));
        RT_TRY(rt_cell_number(out, maybe(u, a->flops, flops_text), err));
        RT_TRY(rt_cell_number(out, maybe(u, a->peak, bytes_text), err));
        RT_TRY(data_cell(c, a, out, err));
        RT_TRY(rt_buf_puts(out, "</tr>\n", err));
        bar[i] = (struct rt_svg_bar){a->name, i, a->seconds, NAN, NAN};
    }
    RT_TRY(rt_buf_puts(out, "</tbody></table></div>\n<p class=\"sub\">Means over the runs of an arm. Scoring by the teacher is paid once for all arms that read the same shards, "
                            "and is not in these numbers.</p>\n<div class=\"figures\">\n", err));
    const struct rt_svg_figure f = {.id = "cost", .title = "Training time", .desc = "One bar for each arm, in seconds; the numbers are in the table above.", .x_label = "seconds"};
    RT_TRY(rt_figure_open(out, "Training time", "seconds, mean over runs", err));
    RT_TRY(rt_svg_bars(out, &f, bar, c->n_arms, err));
    RT_TRY(rt_figure_close(out, err));
    RT_TRY(rt_buf_puts(out, "</div>\n", err));
out:
    return st;
}

/* ---- seeds ---- */
enum rt_status rt_report_seeds(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    static const char *const heads[] = {"arm", "evaluation", "metric", "seeds", "mean", "standard deviation"};
    enum rt_status st = RT_OK;
    char u[32];
    int most = 0;
    for (int a = 0; a < c->n_arms; a++)
        most = c->arm[a].n_runs > most ? c->arm[a].n_runs : most;
    if (most < 2)
        return RT_OK;
    RT_TRY(rt_buf_puts(out, "<h2>Spread between seeds</h2>\n<div class=\"scroll\"><table><thead><tr>", err));
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++)
        RT_TRY(rt_cell_head(out, heads[i], i >= 3, err));
    RT_TRY(rt_buf_puts(out, "</tr></thead><tbody>\n", err));
    for (int e = 0; e < c->n_evals; e++)
        for (int m = 0; m < RT_CMP_METRICS; m++)
            for (int a = 0; a < c->n_arms && c->has[e][m]; a++) {
                const struct rt_cmp_result *r = &c->result[e][a][m];
                const bool share = rt_cmp_metric_info[m].share;
                RT_TRY(rt_cell_row(out, c->arm[a].name, err));
                RT_TRY(rt_buf_puts(out, "<td>", err));
                RT_TRY(rt_html_text(out, c->eval[e], err));
                RT_TRY(rt_buf_printf(out, err, "</td><td>%s</td><td class=\"n\">%d</td>", rt_cmp_metric_info[m].title, r->seeds));
                RT_TRY(rt_cell_number(out, rt_cmp_number(u, r->seed_mean, share), err));
                RT_TRY(rt_cell_number(out, rt_cmp_number(u, r->seed_sd, share), err));
                RT_TRY(rt_buf_puts(out, "</tr>\n", err));
            }
    RT_TRY(rt_buf_puts(out, "</tbody></table></div>\n", err));
out:
    return st;
}
