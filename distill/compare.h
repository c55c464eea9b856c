/* Comparing finished runs: what they left behind (distill/run_record.h), read, paired and judged.
 *
 * Runs form arms (same treatment, other seeds). The first arm is what the others are held against. Every difference is paired: the
 * same sequences or problems in both arms, summed over seeds, resampled together (distill/stats.h). Where an evaluation left no sums
 * for each sequence, its own interval is shown and nothing is paired.
 */
#ifndef RT_DISTILL_COMPARE_H
#define RT_DISTILL_COMPARE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/status.h"
#include "distill/stats.h"
#include "formats/json.h"

enum rt_cmp_metric { RT_CMP_CE, RT_CMP_KL, RT_CMP_AGREEMENT, RT_CMP_ACCURACY, RT_CMP_PASS1, RT_CMP_METRICS };
struct rt_cmp_metric_info {
    const char *key, *title, *word, *unit; /* word: inside a sentence */
    bool lower_is_better, share; /* share: a number in [0, 1], shown in per cent */
};
extern const struct rt_cmp_metric_info rt_cmp_metric_info[RT_CMP_METRICS];

/* Columns of metrics.jsonl that are drawn. */
enum rt_cmp_curve { RT_CURVE_LOSS, RT_CURVE_CE, RT_CURVE_KL, RT_CURVE_FEATURE, RT_CURVE_GRAD, RT_CURVES };
struct rt_cmp_curve_info {
    const char *key, *title, *unit;
};
extern const struct rt_cmp_curve_info rt_cmp_curve_info[RT_CURVES];

struct rt_cmp_unit { /* a sequence or a problem of one evaluation */
    char id[56];
    double num[RT_CMP_METRICS], den[RT_CMP_METRICS];
};
struct rt_cmp_point {
    double step, value[RT_CMP_METRICS];
};
struct rt_cmp_eval { /* the last evaluation of one name in one run */
    char name[128];
    int64_t step;
    double value[RT_CMP_METRICS], lo[RT_CMP_METRICS], hi[RT_CMP_METRICS]; /* as recorded; NaN: not there */
    double count[RT_CMP_METRICS];    /* targets, rows, problems */
    double T, sampling[4];           /* kd_temperature; samples, temperature, top_p, max_tokens: equal where results compare. NaN: not there */
    struct rt_cmp_unit *unit;        /* [n_units] by id; rt_free */
    int64_t n_units;
    struct rt_buf history;           /* struct rt_cmp_point, ascending step */
};
struct rt_cmp_run {
    char path[4096], label[200];     /* label: for messages, "ARM seed S" */
    struct rt_json *run;             /* run.json */
    char name[100], arm[100];
    int64_t seed;
    bool finished;
    struct rt_buf step, curve[RT_CURVES]; /* doubles; NaN: not there */
    struct rt_cmp_eval *eval;        /* [n_evals] rt_free */
    int n_evals;
};
enum { RT_CMP_MAX_RUNS = 256, RT_CMP_MAX_ARMS = 32, RT_CMP_MAX_EVALS = 32 };

struct rt_cmp_result { /* of one arm in one evaluation and metric */
    struct rt_interval value;
    double seed_mean, seed_sd;       /* over runs; sd NaN for one */
    int seeds;
};
struct rt_cmp_difference { /* arm minus first arm */
    struct rt_interval value;        /* n 0: nothing could be paired */
    int seeds, same_sign;            /* seeds that both arms have, and those whose difference has the sign of the mean */
    bool told;                       /* the interval is on one side of 0 and all seeds agree */
};
struct rt_cmp_arm {
    char name[100];
    char *description;               /* may be NULL; free */
    int run[RT_CMP_MAX_RUNS], n_runs;
    double tokens, targets, seconds, flops, peak, tokens_per_second; /* means over runs; NaN unknown */
    double final[RT_CURVES];         /* means of run.json "final" */
    double weight[4];                /* ce, kl, feature, alm; NaN unknown */
};
struct rt_comparison {
    char title[4096];                /* the experiment's path, or "" */
    bool experiment;
    struct rt_cmp_run *run;          /* [n_runs] */
    int n_runs;
    struct rt_cmp_arm *arm;          /* [n_arms] */
    int n_arms;
    char eval[RT_CMP_MAX_EVALS][128];
    int n_evals;
    bool has[RT_CMP_MAX_EVALS][RT_CMP_METRICS];
    struct rt_cmp_result result[RT_CMP_MAX_EVALS][RT_CMP_MAX_ARMS][RT_CMP_METRICS];
    struct rt_cmp_difference diff[RT_CMP_MAX_EVALS][RT_CMP_MAX_ARMS][RT_CMP_METRICS];
    struct rt_json *report;          /* arms, results, differences, warnings, verdict: what --json prints */
};

/* Reads and judges. paths: runs, or an experiment. Errors: IO, FORMAT of the files; REFUSED where no run has a record; USAGE for limits. */
enum rt_status rt_compare(const char *const *paths, int n, struct rt_log *log, struct rt_comparison **out, struct rt_err *err);
void rt_comparison_free(struct rt_comparison *c); /* NULL is fine */

/* Inside: runs and evaluations from disk; results, warnings and sentences from them. */
enum rt_status rt_compare_load(const char *const *paths, int n, struct rt_log *log, struct rt_comparison *c, struct rt_err *err);
enum rt_status rt_compare_judge(struct rt_comparison *c, struct rt_err *err);
/* report.warnings, report.differs, report.verdict. */
enum rt_status rt_compare_words(struct rt_comparison *c, struct rt_err *err);

/* Appends the terminal's tables. */
enum rt_status rt_compare_print(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err);
/* "0.1234" with digits that fit the metric, per cent for shares; NaN: "-". */
const char *rt_cmp_number(char buf[32], double v, bool share);
/* Like rt_cmp_number with a sign, for differences; shares in percentage points. */
const char *rt_cmp_signed(char buf[32], double v, bool share);

#endif
