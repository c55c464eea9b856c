/* What an evaluation would take: sequences to score, answers to sample, tokens at most. */
#ifndef RT_DISTILL_EVAL_PLAN_H
#define RT_DISTILL_EVAL_PLAN_H

#include "distill/eval_run.h"

struct rt_eval_plan {
    bool score, answer;
    int64_t sequences, tokens, left_out;               /* to score */
    int64_t prompts, prompt_tokens, samples, new_tokens; /* to answer; of all samples, new_tokens at most */
    int64_t dropped;                                   /* prompts that the student cannot hold */
    double flops;                                      /* at most, nothing shared between the samples of a prompt but its own tokens */
};
/* Reads o->data as rt_eval_run would, with l opened and no device; the same refusals of data. */
enum rt_status rt_eval_make_plan(const struct rt_loaded_student *l, const struct rt_eval_run_options *o, struct rt_eval_plan *out, struct rt_err *err);

#endif
