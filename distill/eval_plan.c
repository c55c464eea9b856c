#include "distill/eval_plan.h"

#include "formats/dataset.h"
#include "student/describe.h"

/* A training step's count is forward and backward, twice as much again. */
static double forward_flops(const struct rt_loaded_student *l, double length)
{
    return rt_student_flops_per_token(&l->c, &l->p, length) / 3;
}

static enum rt_status scoring(const struct rt_loaded_student *l, const struct rt_eval_run_options *o, struct rt_eval_plan *p, struct rt_err *err)
{
    enum rt_status st;
    struct rt_train_set *set = NULL;
    const struct rt_train_set_options so = {.model = &l->model, .vocab = l->c.vocab_size, .drop_long = o->max_length > 0,
                                            .max_length = rt_length_limit(o->max_length, l->c.max_position)};
    RT_TRY(rt_train_set_open(o->data, &so, o->log, &set, err));
    const struct rt_train_info *info = rt_train_set_info(set);
    p->sequences = info->sequences;
    p->tokens = info->tokens;
    p->left_out = info->left_out;
    for (int64_t i = 0; i < info->sequences; i++) {
        const double n = (double)rt_train_set_length(set, i);
        p->flops += n * forward_flops(l, n);
    }
out:
    rt_train_set_free(set);
    return st;
}

static enum rt_status answering(const struct rt_loaded_student *l, const struct rt_eval_run_options *o, struct rt_eval_plan *p, struct rt_err *err)
{
    enum rt_status st;
    struct rt_dataset *data = NULL;
    struct rt_eval_prompts prompts;
    struct rt_buf lengths = {0};
    const int64_t most = l->c.max_position;
    const struct rt_dataset_options d = {.tok = l->model.tok, .tmpl = l->model.tmpl};
    RT_TRY(rt_dataset_open(o->data, &d, &data, err));
    RT_TRY(rt_eval_measure_prompts(data, most - 1, &prompts, &lengths, err));
    p->prompts = prompts.problems;
    p->dropped = prompts.dropped;
    for (int64_t i = 0; i < p->prompts; i++) {
        const int64_t len = ((const int64_t *)(const void *)lengths.data)[i];
        const int64_t n = o->sampling.max_tokens < most - len ? o->sampling.max_tokens : most - len, all = n * o->sampling.samples;
        p->prompt_tokens += len;
        p->new_tokens += all;
        p->flops += (double)len * forward_flops(l, (double)len) + (double)all * forward_flops(l, (double)(2 * len + n));
    }
    p->samples = p->prompts * o->sampling.samples;
out:
    rt_dataset_close(data);
    rt_buf_free(&lengths);
    return st;
}

enum rt_status rt_eval_make_plan(const struct rt_loaded_student *l, const struct rt_eval_run_options *o, struct rt_eval_plan *out, struct rt_err *err)
{
    enum rt_status st;
    *out = (struct rt_eval_plan){0};
    RT_TRY(rt_eval_kind(o->data, &l->model, &out->score, &out->answer, err));
    if (out->score)
        RT_TRY(scoring(l, o, out, err));
    if (out->answer)
        RT_TRY(answering(l, o, out, err));
out:
    return st;
}
