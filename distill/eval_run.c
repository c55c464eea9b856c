#include "distill/eval_run.h"

#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/eval_key.h"
#include "distill/jsonl.h"
#include "distill/run_record.h"

enum { MICRO_TOKENS = 4096 };

static enum rt_status create(struct rt_loaded_student *l, const struct rt_device *d, struct rt_err *err)
{
    return l->s != NULL ? RT_OK : rt_loaded_student_create(l, d, l->c.max_position, 0, err);
}

/* Why there is no KL, and at which temperatures there would be one. */
static void warn_temperature(const struct rt_eval_run_options *o, const struct rt_row_identity *id)
{
    char stored[128];
    rt_row_identity_temperatures(id, stored);
    rt_warn(o->log, "%s: the log-sum-exp at T = %g is not stored (stored: %s): no KL; --kd-temperature takes one of these", o->data, o->T, stored);
}

static enum rt_status losses(struct rt_loaded_student *l, const struct rt_device *d, const struct rt_eval_run_options *o, struct rt_json *line,
                             struct rt_buf *rows, struct rt_err *err)
{
    enum rt_status st;
    struct rt_train_set *set = NULL;
    struct rt_eval_own own = {0};
    struct rt_eval_losses e;
    const struct rt_train_set_options so = {.model = &l->model, .vocab = l->c.vocab_size, .drop_long = o->max_length > 0,
                                            .max_length = rt_length_limit(o->max_length, l->c.max_position)};
    RT_TRY(rt_train_set_open(o->data, &so, o->log, &set, err));
    const struct rt_train_info *info = rt_train_set_info(set);
    if (info->top_k > 0 && rt_train_set_lse(set, o->T) < 0)
        warn_temperature(o, info->identity);
    int64_t micro = o->micro_tokens > 0 ? o->micro_tokens : MICRO_TOKENS;
    while (micro > info->longest && o->micro_tokens == 0 &&
           rt_eval_own_bytes(&l->c, micro, info->top_k, rt_device_act_size(d)) > (size_t)o->memory)
        micro /= 2;
    micro = micro > info->longest ? micro : info->longest;
    RT_TRY(create(l, d, err));
    RT_TRY(rt_eval_own_create(&own, l->s, micro, info->top_k, o->T, err));
    const struct rt_eval_room room = {l->s, &own.acts, &own.losses, &own.micro};
    RT_TRY(rt_eval_losses(&room, set, o->T, rows, o->stop, o->stop_self, &e, err));
    RT_TRY(rt_json_set_string(line, "kind", info->kind == RT_TRAIN_LINES ? "jsonl" : "shards", err));
    RT_TRY(rt_json_set_string(line, "data_sha256", info->sha256, err));
    RT_TRY(rt_eval_losses_json(&e, o->T, line, err));
out:
    rt_eval_own_free(&own, d);
    rt_train_set_free(set);
    return st;
}

enum rt_status rt_eval_run(struct rt_loaded_student *l, const struct rt_device *d, const struct rt_eval_run_options *o, struct rt_json *line,
                           struct rt_buf *rows, struct rt_err *err)
{
    enum rt_status st;
    bool score, answer;
    struct rt_eval_answers a;
    char name[128];
    const double start = rt_now();
    rt_eval_name(o->data, name);
    RT_TRY(rt_json_set_string(line, "name", name, err));
    RT_TRY(rt_json_set_string(line, "data", o->data, err));
    RT_TRY(rt_json_set_string(line, "kind", "jsonl", err));
    RT_TRY(rt_eval_kind(o->data, &l->model, &score, &answer, err));
    if (score)
        RT_TRY(losses(l, d, o, line, rows, err));
    if (answer) {
        RT_TRY(create(l, d, err));
        RT_TRY(rt_eval_answers(l, o->data, &o->sampling, o->log, o->stop, o->stop_self, rows, &a, err));
        RT_TRY(rt_eval_answers_json(&a, &o->sampling, line, err));
    }
    RT_TRY(rt_json_set_double(line, "seconds", rt_now() - start, err));
out:
    return st;
}

enum rt_status rt_eval_recorded(const char *run, int64_t step, const char *data, bool *yes, struct rt_err *err)
{
    enum rt_status st;
    struct rt_jsonl f = {0};
    const struct rt_json *v;
    struct rt_eval_key key;
    char path[4096];
    *yes = false;
    RT_TRY(rt_path_join(path, sizeof path, run, RT_EVAL_FILE, err));
    if (!rt_path_exists(path))
        return RT_OK;
    RT_TRY(rt_jsonl_open(path, &f, err));
    for (;;) {
        int64_t s;
        RT_TRY(rt_jsonl_next(&f, &v, err));
        if (v == NULL)
            break;
        RT_TRY(rt_json_int(v, "step", 0, INT64_MAX, &s, err));
        rt_eval_key_read(v, &key);
        *yes |= s == step && strcmp(key.data, data) == 0 && strcmp(key.by, "train") != 0;
    }
out:
    rt_jsonl_close(&f);
    return st;
}

enum rt_status rt_eval_record(const char *run, int64_t step, struct rt_json *line, const struct rt_buf *rows, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_json_set_string(line, "by", "eval", err));
    RT_TRY(rt_json_set_int(line, "step", step, err));
    RT_TRY(rt_record_eval(run, line, rows, err));
out:
    return st;
}

enum rt_status rt_eval_run_step(const char *path, int64_t *step, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    *step = -1;
    RT_TRY(rt_record_run(path, &v, err));
    if (v != NULL)
        RT_TRY(rt_json_int_or(v, "steps", 0, INT64_MAX, -1, step, err));
out:
    rt_json_free(v);
    return st;
}
