/* The sections of the report. */
#ifndef RT_DISTILL_REPORT_PARTS_H
#define RT_DISTILL_REPORT_PARTS_H

#include "distill/compare.h"
#include "distill/report_svg.h"

enum rt_status rt_report_results(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err);
enum rt_status rt_report_differences(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err);
enum rt_status rt_report_costs(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err);
enum rt_status rt_report_seeds(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err);
/* report_curves.c: losses over steps, and held-out losses over steps. */
enum rt_status rt_report_curves(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err);

/* <figure> with its caption; the drawing follows, then close. */
enum rt_status rt_figure_open(struct rt_buf *out, const char *title, const char *unit, struct rt_err *err);
enum rt_status rt_figure_close(struct rt_buf *out, struct rt_err *err);
/* "<th ...>text</th>", numeric ones right-aligned; "<td class=n>text</td>". */
enum rt_status rt_cell_head(struct rt_buf *out, const char *text, bool number, struct rt_err *err);
enum rt_status rt_cell_row(struct rt_buf *out, const char *text, struct rt_err *err);
enum rt_status rt_cell_number(struct rt_buf *out, const char *text, struct rt_err *err);

#endif
