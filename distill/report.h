/* The comparison as one HTML file: inline SVG, no script, nothing loaded from elsewhere, light and dark by prefers-color-scheme.
 * Every figure has a title, a description, and its numbers in a table. Names from files are escaped. */
#ifndef RT_DISTILL_REPORT_H
#define RT_DISTILL_REPORT_H

#include "distill/compare.h"

/* Appends the page. Errors: NOMEM. */
enum rt_status rt_report_html(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err);

#endif
