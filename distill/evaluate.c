#include "distill/evaluate.h"

#include <math.h>
#include <string.h>

#include "core/io.h"
#include "core/sha256.h"
#include "distill/run_record.h"
#include "formats/dataset.h"

/* ---- room ---- */

size_t rt_eval_own_bytes(const struct rt_student_config *c, int64_t micro_tokens, int k, size_t act_size)
{
    return rt_student_activation_bytes(c, micro_tokens, RT_KEEP_FINAL, act_size) +
           rt_losses_bytes(micro_tokens, c->hidden, c->vocab_size, k, NULL, act_size, false);
}

enum rt_status rt_eval_own_create(struct rt_eval_own *e, struct rt_student *s, int64_t micro_tokens, int k, double T, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_student_config *c = rt_student_config(s);
    const struct rt_device *d = rt_student_device(s);
    const size_t act = rt_device_act_size(d);
    const struct rt_micro_options mo = {.tokens = micro_tokens, .k = k, .teacher_T = T, .tail = RT_TAIL_BUCKET, .vocab = c->vocab_size};
    *e = (struct rt_eval_own){0};
    RT_TRY(rt_device_arena(d, rt_student_activation_bytes(c, micro_tokens, RT_KEEP_FINAL, act), "activations", &e->acts, err));
    RT_TRY(rt_device_arena(d, rt_losses_bytes(micro_tokens, c->hidden, c->vocab_size, k, NULL, act, false), "losses", &e->scratch, err));
    RT_TRY(rt_losses_create(&e->losses, d, micro_tokens, c->hidden, c->vocab_size, k, NULL, false, &e->scratch, err));
    RT_TRY(rt_micro_create(&e->micro, &mo, err));
out:
    if (st != RT_OK)
        rt_eval_own_free(e, d);
    return st;
}

void rt_eval_own_free(struct rt_eval_own *e, const struct rt_device *d)
{
    rt_micro_free(&e->micro);
    rt_losses_free(&e->losses);
    rt_device_arena_free(d, &e->scratch);
    rt_device_arena_free(d, &e->acts);
    *e = (struct rt_eval_own){0};
}

/* ---- losses ---- */

struct sequence_sums {
    double ce, kl;
    int64_t rows, kl_rows, correct, agree;
};

static struct sequence_sums sum_sequence(const struct rt_losses *l, const struct rt_micro *p, const struct rt_micro_seq *q)
{
    struct sequence_sums s = {.rows = q->rows};
    for (int32_t i = q->row0; i < q->row0 + q->rows; i++) {
        s.ce += l->ce[i];
        s.correct += l->hit[i] & 1;
        if (p->kl_mask[i] == 0)
            continue;
        s.kl += l->kl[i];
        s.agree += l->hit[i] >> 1 & 1;
        s.kl_rows++;
    }
    return s;
}

static enum rt_status take_micro(const struct rt_eval_room *room, struct rt_buf *rows, struct rt_eval_losses *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_micro *p = room->micro;
    char key[2 * RT_KEY_BYTES + 1];
    for (int64_t i = 0; i < p->n_seq; i++) {
        const struct sequence_sums s = sum_sequence(room->losses, p, &p->seq[i]);
        rt_ratio_add(&out->ce, s.ce, (double)s.rows);
        rt_ratio_add(&out->accuracy, (double)s.correct, (double)s.rows);
        if (s.kl_rows > 0) {
            rt_ratio_add(&out->kl, s.kl, (double)s.kl_rows);
            rt_ratio_add(&out->agreement, (double)s.agree, (double)s.kl_rows);
        }
        if (rows == NULL)
            continue;
        rt_hex(key, p->seq[i].key, RT_KEY_BYTES);
        RT_TRY(rt_buf_printf(rows, err, "{\"kind\":\"sequence\",\"key\":\"%s\",\"occurrence\":%u,\"line\":%ld,\"targets\":%ld,\"ce\":%.17g,\"correct\":%ld",
                             key, p->seq[i].occurrence, (long)p->seq[i].line, (long)s.rows, s.ce, (long)s.correct));
        if (s.kl_rows > 0)
            RT_TRY(rt_buf_printf(rows, err, ",\"kl_rows\":%ld,\"kl\":%.17g,\"agree\":%ld", (long)s.kl_rows, s.kl, (long)s.agree));
        RT_TRY(rt_buf_printf(rows, err, "}\n"));
    }
    out->n_sequences += p->n_seq;
out:
    return st;
}

enum rt_status rt_eval_losses(const struct rt_eval_room *room, struct rt_train_set *set, double T, struct rt_buf *rows,
                              bool (*stop)(void *), void *stop_self, struct rt_eval_losses *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_micro *p = room->micro;
    const struct rt_loss_weights w = {.ce = 1, .kl = 1, .T = T, .tail = RT_TAIL_BUCKET};
    const struct rt_micro_options was = p->o;
    const int64_t n = rt_train_set_info(set)->sequences;
    bool full;
    *out = (struct rt_eval_losses){0};
    p->o.teacher_T = T;
    p->o.tail = RT_TAIL_BUCKET;
    p->o.use = 0;
    p->o.map = NULL;
    p->o.ce_rest = false;
    for (int64_t i = 0; i < n;) {
        if (stop != NULL && stop(stop_self))
            RT_FAIL(err, INTERRUPTED, "interrupted during an evaluation");
        rt_micro_clear(p);
        for (full = false; i < n && !full; i += !full)
            RT_TRY(rt_micro_add(p, set, &(struct rt_order_item){0, i}, &full, err));
        if (p->n_seq == 0)
            RT_FAIL(err, USAGE, "%s: sequence %ld has %ld tokens, there is room for %ld", rt_train_set_info(set)->path, (long)i,
                    (long)rt_train_set_length(set, i), (long)p->o.tokens);
        const struct rt_student_batch b = rt_losses_batch(p);
        RT_TRY(rt_student_forward(room->s, &b, RT_KEEP_FINAL, room->acts, err));
        RT_TRY(rt_losses_run(room->losses, room->s, NULL, p, &w, 1, false, &out->sums, err));
        RT_TRY(take_micro(room, rows, out, err));
    }
    if (!isfinite(out->sums.ce))
        RT_FAIL(err, NUMERIC, "%s: the student's loss is not finite", rt_train_set_info(set)->path);
out:
    p->o = was;
    return st;
}

static enum rt_status set_ratio(struct rt_json *line, const char *key, const struct rt_ratio *r, bool share, struct rt_err *err)
{
    enum rt_status st;
    char ci[64];
    double mean, lo, hi;
    if (share)
        rt_ratio_share(r, r->sn, &mean, &lo, &hi);
    else
        rt_ratio_result(r, &mean, &lo, &hi);
    snprintf(ci, sizeof ci, "%s_ci", key);
    RT_TRY(rt_json_set_double(line, key, mean, err));
    RT_TRY(rt_eval_set_interval(line, ci, lo, hi, err));
out:
    return st;
}

enum rt_status rt_eval_set_interval(struct rt_json *line, const char *key, double lo, double hi, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list;
    if (isnan(lo))
        return rt_json_set_null(line, key, err);
    RT_TRY(rt_json_set_array(line, key, &list, err));
    RT_TRY(rt_json_set_double(list, NULL, lo, err));
    RT_TRY(rt_json_set_double(list, NULL, hi, err));
out:
    return st;
}

enum rt_status rt_eval_losses_json(const struct rt_eval_losses *e, double T, struct rt_json *line, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_loss_sums *s = &e->sums;
    const double kl_rows = (double)s->kl_rows;
    RT_TRY(rt_json_set_int(line, "n_sequences", e->n_sequences, err));
    RT_TRY(rt_json_set_int(line, "n_tokens", s->rows, err));
    RT_TRY(set_ratio(line, "ce", &e->ce, false, err));
    RT_TRY(rt_json_set_double(line, "perplexity", exp(s->ce / (double)s->rows), err));
    RT_TRY(set_ratio(line, "accuracy", &e->accuracy, true, err));
    RT_TRY(rt_json_set_int(line, "kl_rows", s->kl_rows, err));
    RT_TRY(rt_json_set_double(line, "kd_temperature", s->kl_rows > 0 ? T : NAN, err));
    RT_TRY(set_ratio(line, "kl", &e->kl, false, err));
    RT_TRY(set_ratio(line, "agreement", &e->agreement, true, err));
    RT_TRY(rt_json_set_double(line, "teacher_mass", s->teacher_mass / kl_rows, err));
    RT_TRY(rt_json_set_double(line, "student_mass", s->student_mass / kl_rows, err));
out:
    return st;
}

/* ---- what a file holds ---- */

void rt_eval_name(const char *path, char out[128])
{
    static const char *const endings[] = {".jsonl", ".json", ".msgpack"};
    rt_record_name(path, out);
    if (rt_path_is_dir(path))
        return;
    const size_t n = strlen(out);
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        const size_t k = strlen(endings[i]);
        if (n > k && strcmp(out + n - k, endings[i]) == 0) {
            out[n - k] = '\0';
            return;
        }
    }
}

static bool has(const struct rt_json *line, const char *key)
{
    const struct rt_json *v = rt_json_get(line, key);
    return v != NULL && rt_json_typeof(v) != RT_JSON_NULL;
}

enum rt_status rt_eval_kind(const char *path, const struct rt_model_dir *model, bool *losses, bool *answers, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_dataset *d = NULL;
    struct rt_prompt p;
    bool end = false;
    const size_t n = strlen(path);
    *losses = true;
    *answers = false;
    if (rt_path_is_dir(path) && rt_path_has(path, "identity.json"))
        return RT_OK;
    if (n > 8 && strcmp(path + n - 8, ".msgpack") == 0)
        return RT_OK;
    const struct rt_dataset_options o = {.tok = model->tok, .tmpl = model->tmpl, .n_ids = model->tok != NULL ? 0 : INT32_MAX};
    RT_TRY(rt_dataset_open(path, &o, &d, err));
    RT_TRY(rt_dataset_next_prompt(d, &p, &end, err));
    if (end)
        RT_FAIL(err, FORMAT, "%s: no lines", path);
    *losses = has(p.json, "input_ids") || has(p.json, "messages") || has(p.json, "completion") || (has(p.json, "text") && !has(p.json, "prompt"));
    *answers = p.answer != NULL && p.text != NULL && !has(p.json, "text");
    if (!*losses && !*answers)
        RT_FAIL(err, FORMAT, "%s: line %ld has neither a completion to score nor an \"answer\" to check", path, (long)p.line);
out:
    rt_dataset_close(d);
    return st;
}
