/* Figures of the report, as inline SVG. Colours are classes s0..s7 of the page's style sheet; arms differ in dash and marker too. */
#ifndef RT_DISTILL_REPORT_SVG_H
#define RT_DISTILL_REPORT_SVG_H

#include <stdbool.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

enum { RT_SVG_SERIES = 8, RT_SVG_POINTS = 240 };

struct rt_svg_line {
    const char *name;
    int style;        /* of the colour and dash: the arm's number */
    const double *x, *y; /* [n], ascending x; NaN y: a gap */
    const double *lo, *hi; /* [n] a band, or NULL */
    int n;
    bool marks;       /* a mark at each point */
};
struct rt_svg_bar {
    const char *name;
    int style;
    double value, lo, hi; /* NaN: not there */
};
struct rt_svg_figure {
    const char *id, *title, *desc, *x_label;
    bool percent;     /* values in [0, 1] shown in per cent */
    bool zero;        /* the axis holds 0 */
};

/* Appends text with &, <, >, " and ' escaped; control characters and bytes that are not UTF-8 become '?'. */
enum rt_status rt_html_text(struct rt_buf *out, const char *s, struct rt_err *err);

/* Lines over x. The y axis is logarithmic where all values are positive and span more than a factor of 100. */
enum rt_status rt_svg_lines(struct rt_buf *out, const struct rt_svg_figure *f, const struct rt_svg_line *line, int n, struct rt_err *err);
/* Horizontal bars from 0 with intervals and their values as text. */
enum rt_status rt_svg_bars(struct rt_buf *out, const struct rt_svg_figure *f, const struct rt_svg_bar *bar, int n, struct rt_err *err);
/* Points with intervals around a line at 0: differences. */
enum rt_status rt_svg_forest(struct rt_buf *out, const struct rt_svg_figure *f, const struct rt_svg_bar *bar, int n, struct rt_err *err);

#endif
