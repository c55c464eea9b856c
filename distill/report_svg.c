#include "distill/report_svg.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "distill/compare.h"
#include "formats/utf8.h"

/* Sizes in user units, close to pixels on a page whose figures are 340 to 500 wide. */
enum { W = 380, H = 230, LEFT = 50, NAME_MOST = 22, RIGHT = 12, TOP = 14, BOTTOM = 40, ROW = 34, HEAD = 8, FOOT = 34, SIDE = 22, MAX_TICKS = 12 };

enum rt_status rt_html_text(struct rt_buf *out, const char *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (size_t left = strlen(s); left > 0;) {
        const size_t n = rt_utf8_char(s, left);
        const char *entity = *s == '&' ? "&amp;" : *s == '<' ? "&lt;" : *s == '>' ? "&gt;" : *s == '"' ? "&quot;" : *s == '\'' ? "&#39;" : NULL;
        if (n == 0 || (unsigned char)*s < 0x20 || *s == 0x7f)
            entity = "?";
        if (entity != NULL)
            RT_TRY(rt_buf_puts(out, entity, err));
        else
            RT_TRY(rt_buf_append(out, s, n, err));
        s += n > 0 ? n : 1;
        left -= n > 0 ? n : 1;
    }
out:
    return st;
}

/* ---- axes ---- */
struct axis {
    double lo, hi;
    bool log;
    double tick[MAX_TICKS];
    int ticks;
};

static double place(const struct axis *a, double v)
{
    return a->log ? (log10(v) - log10(a->lo)) / (log10(a->hi) - log10(a->lo)) : (v - a->lo) / (a->hi - a->lo);
}

/* 1, 2 or 5 times a power of ten, at least x. */
static double round_step(double x)
{
    const double p = pow(10, floor(log10(x)));
    return x <= p ? p : x <= 2 * p ? 2 * p : x <= 5 * p ? 5 * p : 10 * p;
}

/* Widens [lo, hi] to whole ticks. */
static struct axis make_axis(double lo, double hi, bool allow_log, int wanted)
{
    struct axis a = {lo, hi, false, {0}, 0};
    if (!(hi > lo)) {
        const double pad = fabs(lo) > 0 ? fabs(lo) * 0.1 : 1;
        a.lo = lo - pad;
        a.hi = hi + pad;
    }
    if (allow_log && lo > 0 && hi / lo > 100) {
        a.log = true;
        const int first = (int)floor(log10(lo)), last = (int)ceil(log10(hi));
        a.lo = pow(10, first);
        a.hi = pow(10, last);
        const int step = (last - first + 5) / 6;
        for (int e = first; e <= last && a.ticks < MAX_TICKS; e += step)
            a.tick[a.ticks++] = pow(10, e);
        return a;
    }
    const double step = round_step((a.hi - a.lo) / wanted);
    a.lo = floor(a.lo / step + 1e-9) * step;
    a.hi = ceil(a.hi / step - 1e-9) * step;
    for (int i = 0; i < MAX_TICKS && a.lo + i * step <= a.hi + step / 1e6; i++)
        a.tick[a.ticks++] = fabs(a.lo + i * step) < step / 1e6 ? 0 : a.lo + i * step;
    return a;
}

static const char *tick_text(char buf[32], const struct axis *a, double v, bool percent)
{
    const double step = a->ticks > 1 && !a->log ? (a->tick[1] - a->tick[0]) * (percent ? 100 : 1) : 1;
    const int digits = step < 1 ? (int)ceil(-log10(step) - 1e-9) : 0;
    if (a->log)
        snprintf(buf, 32, "%g", v);
    else if (percent)
        snprintf(buf, 32, "%.*f %%", digits > 3 ? 3 : digits, v * 100);
    else if (fabs(v) >= 1e6)
        snprintf(buf, 32, "%gM", v / 1e6);
    else if (fabs(v) >= 10000)
        snprintf(buf, 32, "%gk", v / 1e3);
    else
        snprintf(buf, 32, "%.*f", digits > 6 ? 6 : digits, v);
    return buf;
}

static enum rt_status open_svg(struct rt_buf *out, const struct rt_svg_figure *f, int h, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_printf(out, err, "<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-labelledby=\"%s-t %s-d\"><title id=\"%s-t\">", W, h, f->id, f->id, f->id));
    RT_TRY(rt_html_text(out, f->title, err));
    RT_TRY(rt_buf_printf(out, err, "</title><desc id=\"%s-d\">", f->id));
    RT_TRY(rt_html_text(out, f->desc, err));
    RT_TRY(rt_buf_puts(out, "</desc>\n", err));
out:
    return st;
}

/* ---- lines ---- */
struct frame {
    struct axis x, y;
};

static double px(const struct frame *f, double x)
{
    return LEFT + place(&f->x, x) * (W - LEFT - RIGHT);
}

static double py(const struct frame *f, double y)
{
    return H - BOTTOM - place(&f->y, y) * (H - TOP - BOTTOM);
}

struct extent {
    double x0, x1, y0, y1;
    int points;
};

/* Of what lies at or behind x = from. */
static struct extent extent_of(const struct rt_svg_line *line, int n, double from)
{
    struct extent e = {INFINITY, -INFINITY, INFINITY, -INFINITY, 0};
    for (int i = 0; i < n; i++)
        for (int k = 0; k < line[i].n; k++) {
            const double y = line[i].y[k];
            if (!isfinite(y) || line[i].x[k] < from)
                continue;
            e.points++;
            e.x0 = fmin(e.x0, line[i].x[k]);
            e.x1 = fmax(e.x1, line[i].x[k]);
            e.y0 = fmin(e.y0, line[i].lo != NULL && isfinite(line[i].lo[k]) ? line[i].lo[k] : y);
            e.y1 = fmax(e.y1, line[i].hi != NULL && isfinite(line[i].hi[k]) ? line[i].hi[k] : y);
        }
    return e;
}

/* The axes. Where the first tenth of the steps takes more than half of the height, it goes beyond the top: what the arms differ in comes
 * later. *cut says so. */
static bool frame_of(const struct rt_svg_line *line, int n, bool zero, struct frame *f, bool *cut)
{
    const struct extent all = extent_of(line, n, -INFINITY), late = extent_of(line, n, all.x0 + 0.1 * (all.x1 - all.x0));
    const double x0 = all.x0, x1 = all.x1;
    double y0 = all.y0, y1 = all.y1;
    if (!(x1 >= x0))
        return false;
    *cut = late.points >= 2 * n && late.y1 > late.y0 && all.y1 - late.y1 > late.y1 - late.y0;
    if (*cut)
        y1 = late.y1 + 0.1 * (late.y1 - late.y0);
    if (zero && y0 > 0 && y0 < 0.35 * y1)
        y0 = 0;
    f->x = make_axis(x0, x1, false, 5);
    if (x1 > x0) { /* curves fill the width; ticks outside go */
        f->x.lo = x0;
        f->x.hi = x1;
    }
    f->y = make_axis(y0, y1, true, 5);
    return true;
}

static enum rt_status grid(struct rt_buf *out, const struct rt_svg_figure *f, const struct frame *fr, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char text[32];
    for (int i = 0; i < fr->y.ticks; i++) {
        const double y = py(fr, fr->y.tick[i]);
        RT_TRY(rt_buf_printf(out, err, "<line class=\"grid\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/><text class=\"tick\" x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n",
                             LEFT, W - RIGHT, y, y, LEFT - 7, y + 4, tick_text(text, &fr->y, fr->y.tick[i], f->percent)));
    }
    for (int i = 0; i < fr->x.ticks; i++) {
        const double v = fr->x.tick[i];
        const double slack = (fr->x.hi - fr->x.lo) * 0.01; /* the middle of the last bucket lies a little before the last step */
        if (v < fr->x.lo - slack || v > fr->x.hi + slack)
            continue;
        RT_TRY(rt_buf_printf(out, err, "<text class=\"tick\" x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", px(fr, v), H - BOTTOM + 16,
                             tick_text(text, &fr->x, v, false)));
    }
    RT_TRY(rt_buf_printf(out, err, "<line class=\"axis\" x1=\"%d\" x2=\"%d\" y1=\"%d\" y2=\"%d\"/><text class=\"label\" x=\"%d\" y=\"%d\" text-anchor=\"end\">", LEFT,
                         W - RIGHT, H - BOTTOM, H - BOTTOM, W - RIGHT, H - 6));
    RT_TRY(rt_html_text(out, f->x_label, err));
    RT_TRY(rt_buf_puts(out, "</text>\n", err));
out:
    return st;
}

/* What lies above the axis is not drawn. */
static enum rt_status clip(struct rt_buf *out, const char *id, struct rt_err *err)
{
    return rt_buf_printf(out, err, "<clipPath id=\"%s-c\"><rect x=\"0\" y=\"%d\" width=\"%d\" height=\"%d\"/></clipPath><g clip-path=\"url(#%s-c)\">\n", id, TOP - 6, W, H, id);
}

static enum rt_status band(struct rt_buf *out, const struct frame *fr, const struct rt_svg_line *l, struct rt_err *err)
{
    enum rt_status st;
    bool any = false;
    RT_TRY(rt_buf_printf(out, err, "<path class=\"band s%d\" d=\"", l->style % RT_SVG_SERIES));
    for (int k = 0; k < l->n; k++)
        if (isfinite(l->hi[k]) && isfinite(l->y[k])) {
            RT_TRY(rt_buf_printf(out, err, "%s%.1f %.1f", any ? "L" : "M", px(fr, l->x[k]), py(fr, l->hi[k])));
            any = true;
        }
    for (int k = l->n - 1; k >= 0; k--)
        if (isfinite(l->lo[k]) && isfinite(l->y[k]))
            RT_TRY(rt_buf_printf(out, err, "L%.1f %.1f", px(fr, l->x[k]), py(fr, l->lo[k])));
    RT_TRY(rt_buf_puts(out, any ? "Z\"/>\n" : "\"/>\n", err));
out:
    return st;
}

/* A shape for each arm, so that colour is not all that tells them apart. */
static enum rt_status mark(struct rt_buf *out, int style, double x, double y, struct rt_err *err)
{
    const int s = style % RT_SVG_SERIES;
    switch (style % 4) {
    case 0: return rt_buf_printf(out, err, "<circle class=\"mark s%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"/>", s, x, y);
    case 1: return rt_buf_printf(out, err, "<rect class=\"mark s%d\" x=\"%.1f\" y=\"%.1f\" width=\"7.4\" height=\"7.4\"/>", s, x - 3.7, y - 3.7);
    case 2: return rt_buf_printf(out, err, "<path class=\"mark s%d\" d=\"M%.1f %.1fl4.8 8.4h-9.6z\"/>", s, x, y - 5.2);
    default: return rt_buf_printf(out, err, "<path class=\"mark s%d\" d=\"M%.1f %.1fl5 5l-5 5l-5 -5z\"/>", s, x, y - 5);
    }
}

static enum rt_status curve(struct rt_buf *out, const struct frame *fr, const struct rt_svg_line *l, struct rt_err *err)
{
    enum rt_status st;
    bool down = false;
    RT_TRY(rt_buf_printf(out, err, "<path class=\"line s%d\" d=\"", l->style % RT_SVG_SERIES));
    for (int k = 0; k < l->n; k++) {
        if (!isfinite(l->y[k]) || (fr->y.log && !(l->y[k] > 0))) {
            down = false;
            continue;
        }
        RT_TRY(rt_buf_printf(out, err, "%s%.1f %.1f", down ? "L" : "M", px(fr, l->x[k]), py(fr, l->y[k])));
        down = true;
    }
    RT_TRY(rt_buf_puts(out, "\"/>\n", err));
    for (int k = 0; k < l->n && l->marks; k++)
        if (isfinite(l->y[k]))
            RT_TRY(mark(out, l->style, px(fr, l->x[k]), py(fr, l->y[k]), err));
out:
    return st;
}

enum rt_status rt_svg_lines(struct rt_buf *out, const struct rt_svg_figure *f, const struct rt_svg_line *line, int n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct frame fr;
    bool cut = false;
    if (!frame_of(line, n, f->zero, &fr, &cut))
        return RT_OK;
    RT_TRY(open_svg(out, f, H, err));
    RT_TRY(grid(out, f, &fr, err));
    if (cut)
        RT_TRY(rt_buf_printf(out, err, "<text class=\"label\" x=\"%d\" y=\"%d\" text-anchor=\"end\">the first steps lie above</text>\n", W - RIGHT, TOP + 4));
    RT_TRY(clip(out, f->id, err));
    for (int i = 0; i < n; i++)
        if (line[i].lo != NULL && line[i].hi != NULL)
            RT_TRY(band(out, &fr, &line[i], err));
    for (int i = 0; i < n; i++)
        RT_TRY(curve(out, &fr, &line[i], err));
    RT_TRY(rt_buf_puts(out, "</g></svg>\n", err));
out:
    return st;
}

/* ---- bars and differences: a row each ---- */
static double rx(const struct axis *a, double v)
{
    return SIDE + place(a, v) * (W - 2 * SIDE);
}

static enum rt_status row_axis(struct rt_buf *out, const struct rt_svg_figure *f, const struct axis *a, int h, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char text[32];
    for (int i = 0; i < a->ticks; i++) {
        const double x = rx(a, a->tick[i]);
        RT_TRY(rt_buf_printf(out, err, "<line class=\"%s\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%d\" y2=\"%d\"/><text class=\"tick\" x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n",
                             a->tick[i] == 0 ? "axis" : "grid", x, x, HEAD, h - FOOT, x, h - FOOT + 15, tick_text(text, a, a->tick[i], f->percent)));
    }
    RT_TRY(rt_buf_printf(out, err, "<text class=\"label\" x=\"%d\" y=\"%d\" text-anchor=\"end\">", W - RIGHT, h - 3));
    RT_TRY(rt_html_text(out, f->x_label, err));
    RT_TRY(rt_buf_puts(out, "</text>\n", err));
out:
    return st;
}

/* A name of at most NAME_MOST characters, the rest as an ellipsis; the whole of it is in the table. */
static enum rt_status short_name(struct rt_buf *out, const char *name, struct rt_err *err)
{
    char text[4 * NAME_MOST + 8];
    size_t at = 0;
    int chars = 0;
    for (size_t n; name[at] != '\0' && chars < NAME_MOST; at += n, chars++)
        n = rt_utf8_char(name + at, strlen(name + at)) > 0 ? rt_utf8_char(name + at, strlen(name + at)) : 1;
    snprintf(text, sizeof text, "%.*s%s", (int)at, name, name[at] != '\0' ? "\xe2\x80\xa6" : "");
    return rt_html_text(out, text, err);
}

/* The row's name at the left and its value at the right, above the mark. */
static enum rt_status row_text(struct rt_buf *out, const struct rt_svg_figure *f, const struct rt_svg_bar *b, bool sign, int y, struct rt_err *err)
{
    enum rt_status st;
    char v[32], lo[32], hi[32];
    const char *(*text)(char[32], double, bool) = sign ? rt_cmp_signed : rt_cmp_number;
    RT_TRY(rt_buf_printf(out, err, "<text class=\"name\" x=\"%d\" y=\"%d\">", SIDE + 4, y));
    RT_TRY(short_name(out, b->name, err));
    RT_TRY(rt_buf_printf(out, err, "</text><text class=\"value\" x=\"%d\" y=\"%d\" text-anchor=\"end\">%s", W - SIDE - 4, y, text(v, b->value, f->percent)));
    if (isfinite(b->lo))
        RT_TRY(rt_buf_printf(out, err, " [%s, %s]", text(lo, b->lo, f->percent), text(hi, b->hi, f->percent)));
    RT_TRY(rt_buf_puts(out, "</text>\n", err));
out:
    return st;
}

static enum rt_status whisker(struct rt_buf *out, const struct axis *a, const struct rt_svg_bar *b, double y, struct rt_err *err)
{
    if (!isfinite(b->lo) || !isfinite(b->hi))
        return RT_OK;
    const double x0 = rx(a, b->lo), x1 = rx(a, b->hi);
    return rt_buf_printf(out, err, "<path class=\"whisker\" d=\"M%.1f %.1fH%.1fM%.1f %.1fv8M%.1f %.1fv8\"/>\n", x0, y, x1, x0, y - 4, x1, y - 4);
}

static bool bar_axis(const struct rt_svg_bar *bar, int n, bool zero, struct axis *a)
{
    double lo = INFINITY, hi = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (!isfinite(bar[i].value))
            continue;
        lo = fmin(lo, isfinite(bar[i].lo) ? fmin(bar[i].lo, bar[i].value) : bar[i].value);
        hi = fmax(hi, isfinite(bar[i].hi) ? fmax(bar[i].hi, bar[i].value) : bar[i].value);
    }
    if (!(hi >= lo))
        return false;
    if (zero) {
        lo = fmin(lo, 0);
        hi = fmax(hi, 0);
    }
    *a = make_axis(lo, hi, false, 5);
    return true;
}

/* A row an entry, on one axis that holds 0: bars from it with their intervals, or (forest) marks on theirs. */
static enum rt_status rows(struct rt_buf *out, const struct rt_svg_figure *f, const struct rt_svg_bar *bar, int n, bool forest, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct axis a;
    const int h = HEAD + n * ROW + FOOT;
    if (!bar_axis(bar, n, true, &a))
        return RT_OK;
    RT_TRY(open_svg(out, f, h, err));
    RT_TRY(row_axis(out, f, &a, h, err));
    for (int i = 0; i < n; i++) {
        const int y = HEAD + i * ROW;
        RT_TRY(row_text(out, f, &bar[i], forest, y + 12, err));
        if (!isfinite(bar[i].value))
            continue;
        const double x0 = rx(&a, fmin(0, bar[i].value)), x1 = rx(&a, fmax(0, bar[i].value));
        if (!forest)
            RT_TRY(rt_buf_printf(out, err, "<rect class=\"bar s%d\" x=\"%.1f\" y=\"%d\" width=\"%.1f\" height=\"11\" rx=\"1.5\"/>\n",
                                 bar[i].style % RT_SVG_SERIES, x0, y + 17, fmax(x1 - x0, 0.5)));
        RT_TRY(whisker(out, &a, &bar[i], y + 22.5, err));
        if (!forest)
            continue;
        RT_TRY(mark(out, bar[i].style, rx(&a, bar[i].value), y + 22.5, err));
        RT_TRY(rt_buf_puts(out, "\n", err));
    }
    RT_TRY(rt_buf_puts(out, "</svg>\n", err));
out:
    return st;
}

enum rt_status rt_svg_bars(struct rt_buf *out, const struct rt_svg_figure *f, const struct rt_svg_bar *bar, int n, struct rt_err *err)
{
    return rows(out, f, bar, n, false, err);
}

enum rt_status rt_svg_forest(struct rt_buf *out, const struct rt_svg_figure *f, const struct rt_svg_bar *bar, int n, struct rt_err *err)
{
    return rows(out, f, bar, n, true, err);
}
