/* What the parts of a comparison share beside distill/compare.h. */
#ifndef RT_DISTILL_COMPARE_PARTS_H
#define RT_DISTILL_COMPARE_PARTS_H

#include "distill/compare.h"

/* A text member of v, or of its member `object`; "" where there is none. */
const char *rt_cmp_text(const struct rt_json *v, const char *object, const char *key);
/* The last `most` bytes of a text at most, beginning with a whole character. */
const char *rt_cmp_tail(const char *text, size_t most);
/* Appends a sentence to a list. */
enum rt_status rt_cmp_say(struct rt_json *list, struct rt_err *err, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* What an option of `train` is in a comparison: what arms may differ in, what says where and how it ran, or the recipe that all share. */
enum rt_cmp_role { RT_CMP_TREATMENT, RT_CMP_INCIDENTAL, RT_CMP_RECIPE };
enum rt_cmp_role rt_cmp_role(const char *option);
/* The next option, from *at on, that both runs recorded with other values; false: no more. */
bool rt_cmp_option_differs(const struct rt_cmp_run *a, const struct rt_cmp_run *b, size_t *at, const char **option, const char **x, const char **y);
enum { RT_CMP_WHY = 512 };
/* Whether the two are one treatment under two seeds; else why says what tells them apart. */
bool rt_cmp_replicates(const struct rt_cmp_run *a, const struct rt_cmp_run *b, char why[RT_CMP_WHY]);

/* Runs into arms: those of one name that are replicates; where runs of a name are not, each set of replicates by the path of its first. */
enum rt_status rt_compare_group(struct rt_comparison *c, struct rt_err *err);
/* report.warnings and report.controlled. */
enum rt_status rt_compare_check(struct rt_comparison *c, struct rt_err *err);

#endif
