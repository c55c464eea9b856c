/* Comparing finished runs: what they left behind (distill/run_record.h), read, paired and judged.
 *
 * Runs form arms (same treatment, other seeds): those of one name whose options agree but for the seed. The first arm is what the others
 * are held against. Every difference is paired: the same sequences or problems in both arms, summed over seeds, resampled together
 * (distill/stats.h). Where an evaluation left no sums for each sequence, its own interval is shown and nothing is paired.
 */
#ifndef RT_DISTILL_COMPARE_H
#define RT_DISTILL_COMPARE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/status.h"
#include "distill/eval_key.h"
#include "distill/stats.h"
#include "formats/json.h"

enum { RT_CMP_MAX_RUNS = 256, RT_CMP_MAX_ARMS = 32, RT_CMP_MAX_EVALS = 32, RT_CMP_NAME = 100 };

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
struct rt_cmp_eval { /* the last evaluation of one key in one run */
    struct rt_eval_key key;
    int64_t step;
    double value[RT_CMP_METRICS], lo[RT_CMP_METRICS], hi[RT_CMP_METRICS]; /* as recorded; NaN: not there */
    double count[RT_CMP_METRICS];    /* targets, rows, problems */
    struct rt_cmp_unit *unit;        /* [n_units] by id; rt_free */
    int64_t n_units;
    struct rt_buf history;           /* struct rt_cmp_point, ascending step */
};
struct rt_cmp_run {
    char path[4096], real[4096];     /* as given; resolved */
    char label[RT_CMP_NAME + 32];    /* for messages, "ARM seed S" */
    struct rt_json *run;             /* run.json */
    char arm[RT_CMP_NAME];           /* as recorded, or as the experiment says */
    char *description;               /* the experiment's, of the arm; may be NULL; free */
    int64_t seed;
    bool finished;
    struct rt_buf step, curve[RT_CURVES]; /* doubles; NaN: not there */
    struct rt_cmp_eval *eval;        /* [n_evals] rt_free */
    int n_evals;
    int at[RT_CMP_MAX_EVALS];        /* which of eval an evaluation of the comparison is; -1: none */
};

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
    char name[RT_CMP_NAME];
    const char *description;         /* of its first run; may be NULL */
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
    char eval[RT_CMP_MAX_EVALS][320]; /* titles */
    int n_evals;
    bool trained[RT_CMP_MAX_EVALS];   /* training's own, beside what `eval` measured */
    bool has[RT_CMP_MAX_EVALS][RT_CMP_METRICS];
    struct rt_cmp_result result[RT_CMP_MAX_EVALS][RT_CMP_MAX_ARMS][RT_CMP_METRICS];
    struct rt_cmp_difference diff[RT_CMP_MAX_EVALS][RT_CMP_MAX_ARMS][RT_CMP_METRICS];
    struct rt_json *report;          /* arms, results, differences, warnings, verdict: what --json prints */
};

/* Reads and judges. paths: runs, or an experiment. Errors: IO, FORMAT of the files; REFUSED where no run has a record; USAGE for limits, and
 * a run that is there twice. */
enum rt_status rt_compare(const char *const *paths, int n, struct rt_log *log, struct rt_comparison **out, struct rt_err *err);
void rt_comparison_free(struct rt_comparison *c); /* NULL is fine */

/* Inside: runs and evaluations from disk; which evaluations stand in one table; results, warnings and sentences from them. */
enum rt_status rt_compare_load(const char *const *paths, int n, struct rt_log *log, struct rt_comparison *c, struct rt_err *err);
enum rt_status rt_compare_match(struct rt_comparison *c, struct rt_err *err);
enum rt_status rt_compare_judge(struct rt_comparison *c, struct rt_err *err);
/* report.differs, report.verdict. */
enum rt_status rt_compare_words(struct rt_comparison *c, struct rt_err *err);

/* A run's evaluation in table e; NULL: none. */
const struct rt_cmp_eval *rt_cmp_eval_at(const struct rt_cmp_run *r, int e);
/* The last parts of paths[i], as many as none of the others that are not the same text ends with. Lies in paths[i]. */
const char *rt_cmp_path_name(const char *const *paths, int n, int i);
/* KL at another temperature, answers sampled otherwise or to other problems are other quantities: neither paired nor averaged. */
bool rt_cmp_same_quantity(const struct rt_cmp_eval *a, const struct rt_cmp_eval *b, int metric);

/* Appends the terminal's tables. */
enum rt_status rt_compare_print(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err);
/* "0.1234" with digits that fit the metric, per cent for shares; NaN: "-". */
const char *rt_cmp_number(char buf[32], double v, bool share);
/* Like rt_cmp_number with a sign, for differences; shares in percentage points. */
const char *rt_cmp_signed(char buf[32], double v, bool share);

#endif
