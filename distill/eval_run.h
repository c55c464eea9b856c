/* One evaluation of a student on one argument: losses, answers, or both; a line of eval.jsonl. */
#ifndef RT_DISTILL_EVAL_RUN_H
#define RT_DISTILL_EVAL_RUN_H

#include "distill/evaluate.h"

struct rt_eval_run_options {
    const char *data;
    double T;
    int64_t max_length, micro_tokens; /* 0: the student's maximum; planned */
    int64_t memory;
    struct rt_eval_sampling sampling;
    struct rt_log *log;
    bool (*stop)(void *);
    void *stop_self;
};
/* l is opened, its weights are created here where they are not yet. Members of eval.jsonl are added to line, lines of the per-sequence
 * file to rows. */
enum rt_status rt_eval_run(struct rt_loaded_student *l, const struct rt_device *d, const struct rt_eval_run_options *o, struct rt_json *line,
                           struct rt_buf *rows, struct rt_err *err);
/* Adds `line` of rt_eval_run, and rows, to the run's record as "by": "eval" (rt_record_eval): beside what training measured, and in place of a line of the
 * same step alone that measures the same. */
enum rt_status rt_eval_record(const char *run, int64_t step, struct rt_json *line, const struct rt_buf *rows, struct rt_err *err);
/* Whether RUN/eval.jsonl has a line of this step and path of data, by `eval`. */
enum rt_status rt_eval_recorded(const char *run, int64_t step, const char *data, bool *yes, struct rt_err *err);
/* A finished run's last step; -1: path is no run. */
enum rt_status rt_eval_run_step(const char *path, int64_t *step, struct rt_err *err);

#endif
