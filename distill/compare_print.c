#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "distill/compare.h"

enum { MAX_COLUMNS = 11, CELL = 112 };

const char *rt_cmp_number(char buf[32], double v, bool share)
{
    if (isnan(v))
        snprintf(buf, 32, "-");
    else if (share)
        snprintf(buf, 32, "%.1f %%", 100 * v);
    else if (v != 0 && fabs(v) < 0.001)
        snprintf(buf, 32, "%.2e", v);
    else
        snprintf(buf, 32, "%.*f", fabs(v) < 10 ? 4 : fabs(v) < 100 ? 3 : 1, v);
    return buf;
}

const char *rt_cmp_signed(char buf[32], double v, bool share)
{
    char plain[32];
    rt_cmp_number(plain, fabs(v), false);
    if (isnan(v))
        snprintf(buf, 32, "-");
    else if (share)
        snprintf(buf, 32, fabs(v) < 0.01 ? "%+.2f pp" : "%+.1f pp", 100 * v);
    else
        snprintf(buf, 32, "%c%.30s", v < 0 ? '-' : '+', plain);
    return buf;
}

/* ---- a table: first column left, others right; ASCII but for names ---- */
struct table {
    char cell[RT_CMP_MAX_ARMS + 1][MAX_COLUMNS][CELL];
    int rows, columns;
};

static int width(const char *s)
{
    int n = 0;
    for (; *s != '\0'; s++)
        n += ((unsigned char)*s & 0xc0) != 0x80;
    return n;
}

static enum rt_status put(const struct table *t, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int w[MAX_COLUMNS] = {0};
    for (int r = 0; r < t->rows; r++)
        for (int c = 0; c < t->columns; c++)
            w[c] = width(t->cell[r][c]) > w[c] ? width(t->cell[r][c]) : w[c];
    for (int r = 0; r < t->rows; r++) {
        for (int c = 0; c < t->columns; c++) {
            const int fill = w[c] - width(t->cell[r][c]);
            RT_TRY(rt_buf_printf(out, err, "%s%*s%s%*s", c == 0 ? "  " : "   ", c == 0 ? 0 : fill, "", t->cell[r][c], c == 0 ? fill : 0, ""));
        }
        RT_TRY(rt_buf_puts(out, "\n", err));
    }
out:
    return st;
}

static void column(struct table *t, const char *head)
{
    RT_ASSERT(t->columns < MAX_COLUMNS);
    snprintf(t->cell[0][t->columns++], CELL, "%s", head);
}

static char *cell(struct table *t, int arm)
{
    return t->cell[arm + 1][t->columns - 1];
}

static void begin(struct table *t, const struct rt_comparison *c, const char *head)
{
    memset(t, 0, sizeof *t);
    t->rows = c->n_arms + 1;
    column(t, head);
    for (int a = 0; a < c->n_arms; a++)
        snprintf(cell(t, a), CELL, "%s", c->arm[a].name);
}

static enum rt_status arms(const struct rt_comparison *c, struct table *t, struct rt_buf *out, struct rt_err *err)
{
    static const char *const weights[] = {"w_ce", "w_kl", "w_feat", "w_alm"};
    char u[32];
    bool alm = false;
    for (int a = 0; a < c->n_arms; a++)
        alm |= c->arm[a].weight[3] > 0;
    begin(t, c, "arm");
    column(t, "seeds");
    for (int a = 0; a < c->n_arms; a++)
        snprintf(cell(t, a), CELL, "%d", c->arm[a].n_runs);
    for (int i = 0; i < (alm ? 4 : 3); i++) {
        column(t, weights[i]);
        for (int a = 0; a < c->n_arms; a++)
            snprintf(cell(t, a), CELL, isnan(c->arm[a].weight[i]) && i < 3 ? "-" : "%g", isnan(c->arm[a].weight[i]) ? 0 : c->arm[a].weight[i]);
    }
    column(t, "train CE");
    for (int a = 0; a < c->n_arms; a++)
        snprintf(cell(t, a), CELL, "%s", rt_cmp_number(u, c->arm[a].final[RT_CURVE_CE], false));
    column(t, "train KL");
    for (int a = 0; a < c->n_arms; a++)
        snprintf(cell(t, a), CELL, "%s", rt_cmp_number(u, c->arm[a].final[RT_CURVE_KL], false));
    column(t, "tokens");
    for (int a = 0; a < c->n_arms; a++)
        snprintf(cell(t, a), CELL, "%s", isnan(c->arm[a].tokens) ? "-" : rt_human_count(u, c->arm[a].tokens));
    column(t, "time");
    for (int a = 0; a < c->n_arms; a++)
        snprintf(cell(t, a), CELL, "%s", isnan(c->arm[a].seconds) ? "-" : rt_human_time(u, c->arm[a].seconds));
    column(t, "peak memory");
    for (int a = 0; a < c->n_arms; a++)
        snprintf(cell(t, a), CELL, "%s", isnan(c->arm[a].peak) || c->arm[a].peak < 0 ? "-" : rt_human_bytes(u, (uint64_t)c->arm[a].peak));
    return put(t, out, err);
}

static enum rt_status evaluation(const struct rt_comparison *c, int e, struct table *t, struct rt_buf *out, struct rt_err *err)
{
    static const char *const head[RT_CMP_METRICS] = {"CE", "KL", "agreement", "accuracy", "pass@1"};
    enum rt_status st;
    char x[32], lo[32], hi[32];
    begin(t, c, "arm");
    for (int m = 0; m < RT_CMP_METRICS; m++) {
        if (!c->has[e][m])
            continue;
        column(t, head[m]);
        for (int a = 0; a < c->n_arms; a++) {
            const struct rt_interval *v = &c->result[e][a][m].value;
            const bool share = rt_cmp_metric_info[m].share;
            rt_cmp_number(x, v->mean, share);
            if (isnan(v->lo))
                snprintf(cell(t, a), CELL, "%s", x);
            else
                snprintf(cell(t, a), CELL, "%s [%s, %s]", x, rt_cmp_number(lo, v->lo, share), rt_cmp_number(hi, v->hi, share));
        }
    }
    RT_TRY(rt_buf_printf(out, err, "\n%s  (95 %% intervals)\n", c->eval[e]));
    RT_TRY(put(t, out, err));
out:
    return st;
}

static enum rt_status sentences(const struct rt_json *list, const char *head, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (rt_json_len(list) == 0)
        return RT_OK;
    RT_TRY(rt_buf_printf(out, err, "\n%s\n", head));
    for (size_t i = 0; i < rt_json_len(list); i++)
        RT_TRY(rt_buf_printf(out, err, "  %s\n", rt_json_as_string(rt_json_at(list, i), NULL)));
out:
    return st;
}

enum rt_status rt_compare_print(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    struct table *t = NULL;
    RT_TRY(rt_alloc(1, sizeof *t, "table", &t, err));
    RT_TRY(arms(c, t, out, err));
    for (int e = 0; e < c->n_evals; e++)
        RT_TRY(evaluation(c, e, t, out, err));
    RT_TRY(sentences(rt_json_get(c->report, "verdict"), "verdict", out, err));
    RT_TRY(sentences(rt_json_get(c->report, "warnings"), "warnings", out, err));
out:
    rt_free(t);
    return st;
}
