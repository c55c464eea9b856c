/* What a training run writes: run.json, metrics.jsonl, eval.jsonl (distill/run_record.h). */
#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <sys/resource.h>

#include "core/io.h"
#include "core/sha256.h"
#include "distill/run_record.h"
#include "distill/train_run.h"
#include "student/describe.h"

/* ---- run.json ---- */

static enum rt_status add_data(const struct rt_train_run *r, int i, struct rt_json *list, struct rt_err *err)
{
    enum rt_status st;
    static const char *const kinds[] = {"shards", "jsonl", "memory"};
    const struct rt_train_info *info = rt_train_set_info(r->set[i]);
    struct rt_json *v, *mass;
    char T[32];
    RT_TRY(rt_json_set_object(list, NULL, &v, err));
    RT_TRY(rt_json_set_string(v, "path", info->path, err));
    RT_TRY(rt_json_set_string(v, "kind", kinds[info->kind], err));
    RT_TRY(rt_json_set_double(v, "weight", r->weight[i], err));
    RT_TRY(rt_json_set_int(v, "sequences", info->sequences, err));
    RT_TRY(rt_json_set_int(v, "tokens", info->tokens, err));
    RT_TRY(rt_json_set_string(v, "sha256", info->sha256, err));
    RT_TRY(rt_json_set_string(v, "content_sha256", info->content_sha256, err));
    if (info->identity == NULL || info->shards == NULL)
        goto out;
    RT_TRY(rt_json_set_string(v, "teacher", info->identity->teacher_name, err));
    RT_TRY(rt_json_set_string(v, "teacher_sha256", info->identity->teacher_sha256, err));
    RT_TRY(rt_json_set_string(v, "mode", info->identity->mode, err));
    RT_TRY(rt_json_set_int(v, "top_k", info->identity->top_k, err));
    RT_TRY(rt_json_set_object(v, "mass", &mass, err));
    for (int j = 0; j < info->n_lse; j++) {
        snprintf(T, sizeof T, "%g", info->identity->lse_temperature[j]);
        RT_TRY(rt_json_set_double(mass, T, info->shards->mass[j], err));
    }
out:
    return st;
}

static enum rt_status add_what(const struct rt_train_run *r, struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_train_values *o = r->v;
    struct rt_json *w, *init, *data, *student, *config = NULL;
    char name[128];
    rt_record_name(o->out, name);
    RT_TRY(rt_json_set_int(v, "version", 1, err));
    RT_TRY(rt_json_set_string(v, "name", o->name != NULL ? o->name : name, err));
    RT_TRY(o->arm != NULL ? rt_json_set_string(v, "arm", o->arm, err) : rt_json_set_null(v, "arm", err));
    RT_TRY(rt_json_set_int(v, "seed", o->common.seed, err));
    RT_TRY(rt_command_config(&rt_cmd_train, o, &config, err));
    RT_TRY(rt_json_set_copy(v, "options", rt_json_get(config, "options"), err));
    RT_TRY(rt_json_set_object(v, "weights", &w, err));
    RT_TRY(rt_json_set_double(w, "ce", r->o.w.ce, err));
    RT_TRY(rt_json_set_double(w, "kl", r->o.w.kl, err));
    RT_TRY(rt_json_set_double(w, "feature", r->o.w.feature, err));
    if (r->o.w.alm > 0) {
        RT_TRY(rt_json_set_double(w, "alm", r->o.w.alm, err));
        RT_TRY(rt_json_set_double(v, "alm_tau", r->o.w.tau, err));
    }
    RT_TRY(rt_json_set_double(v, "kd_temperature", r->o.w.T, err));
    RT_TRY(rt_json_set_double(v, "teacher_temperature", r->o.teacher_T, err));
    RT_TRY(rt_json_set_string(v, "tail", o->tail, err));
    RT_TRY(rt_json_set_object(v, "init", &init, err));
    RT_TRY(o->student != NULL ? rt_json_set_string(init, "student", o->student, err) : rt_json_set_null(init, "student", err));
    RT_TRY(o->init_config != NULL ? rt_json_set_string(init, "config", o->init_config, err) : rt_json_set_null(init, "config", err));
    RT_TRY(rt_json_set_string(init, "sha256", r->init_sha256, err));
    RT_TRY(rt_json_set_array(v, "data", &data, err));
    for (int i = 0; i < r->n_sets; i++)
        RT_TRY(add_data(r, i, data, err));
    RT_TRY(rt_json_set_string(v, "order_sha256", r->order_sha256, err));
    RT_TRY(rt_json_set_object(v, "student", &student, err));
    RT_TRY(rt_student_describe(&r->student.c, &r->student.p, false, student, err));
    RT_TRY(rt_json_set_int(v, "parameters", r->student.p.count, err));
    RT_TRY(rt_json_set_int(v, "planned_steps", r->total_steps, err));
    RT_TRY(rt_json_set_int(v, "micro_tokens", r->o.micro_tokens, err));
    RT_TRY(rt_json_set_int(v, "operations", (int64_t)r->memory.operations, err));
    RT_TRY(rt_json_set_string(v, "device", r->device.be->name, err));
    RT_TRY(rt_json_set_int(v, "ranks", r->rank.size, err));
out:
    rt_json_free(config);
    return st;
}

int64_t rt_train_peak_memory(void)
{
    struct rusage usage = {0};
    char line[256];
    int64_t kib = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "VmHWM: %" SCNd64 " kB", &kib) == 1)
            break;
    if (f != NULL)
        fclose(f);
    getrusage(RUSAGE_SELF, &usage);
    return (kib > 0 ? kib : (int64_t)usage.ru_maxrss) * 1024;
}

void rt_train_peak_reset(void)
{
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (f == NULL)
        return; /* the peak is that of the process then */
    fputs("5", f);
    fclose(f);
}

/* Means over the last tenth of the steps, from metrics.jsonl: what a resumed run and an uninterrupted one agree on. */
static enum rt_status add_final(const struct rt_train_run *r, struct rt_json *final, struct rt_err *err)
{
    enum rt_status st;
    static const struct {
        const char *key, *count;
    } mean[] = {{"loss", "targets"}, {"ce", "ce_rows"}, {"kl", "kl_rows"}, {"feature", "feature_rows"}, {"teacher_mass", "kl_rows"},
                {"student_mass", "kl_rows"}, {"alm", "spans"}, {"agreement", "kl_rows"}, {"accuracy", "ce_rows"}};
    enum { N = sizeof mean / sizeof mean[0] };
    double sum[N] = {0}, count[N] = {0}, x;
    int64_t step, n;
    struct rt_buf text = {0};
    struct rt_json *line = NULL;
    char path[4096];
    RT_TRY(rt_path_join(path, sizeof path, r->v->out, "metrics.jsonl", err));
    RT_TRY(rt_file_read_all(path, (size_t)1 << 30, &text, err));
    for (size_t at = 0; at < text.len;) {
        const char *end = memchr(text.data + at, '\n', text.len - at);
        const size_t len = end != NULL ? (size_t)(end - text.data) - at : text.len - at;
        rt_json_free(line);
        line = NULL;
        RT_TRY(rt_json_parse(text.data + at, len, path, &line, err));
        at += len + 1;
        RT_TRY(rt_json_int(line, "step", 0, INT64_MAX, &step, err));
        if (step <= r->trainer.step - (r->trainer.step + 9) / 10 || rt_json_get(line, "skipped") != NULL)
            continue;
        for (int i = 0; i < N; i++)
            if (rt_json_as_double(rt_json_get(line, mean[i].key), &x) && rt_json_as_int(rt_json_get(line, mean[i].count), &n)) {
                sum[i] += x * (double)n;
                count[i] += (double)n;
            }
    }
    for (int i = 0; i < N; i++)
        RT_TRY(rt_json_set_double(final, mean[i].key, sum[i] / count[i], err));
out:
    rt_json_free(line);
    rt_buf_free(&text);
    return st;
}

static enum rt_status add_result(const struct rt_train_run *r, struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_trainer *t = &r->trainer;
    struct rt_json *final;
    RT_TRY(rt_json_set_int(v, "steps", t->step, err));
    RT_TRY(rt_json_set_int(v, "tokens", t->tokens, err));
    RT_TRY(rt_json_set_int(v, "targets", t->targets, err));
    RT_TRY(rt_json_set_int(v, "skipped_steps", t->skipped, err));
    RT_TRY(rt_json_set_int(v, "clipped_steps", t->clipped, err));
    RT_TRY(rt_json_set_double(v, "seconds", r->seconds, err));
    RT_TRY(rt_json_set_double(v, "tokens_per_second", (double)t->tokens / r->seconds, err));
    RT_TRY(rt_json_set_int(v, "peak_memory", rt_train_peak_memory(), err));
    RT_TRY(rt_json_set_double(v, "flops", (double)t->tokens * rt_student_flops_per_token(&r->student.c, &r->student.p, r->document_length), err));
    RT_TRY(rt_json_set_object(v, "final", &final, err));
    RT_TRY(add_final(r, final, err));
out:
    return st;
}

enum rt_status rt_train_record_run(struct rt_train_run *r, bool finished, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    if (r->rank.rank > 0)
        return RT_OK;
    RT_TRY(rt_json_new_object(&v, err));
    RT_TRY(rt_json_set_bool(v, "finished", finished, err));
    RT_TRY(add_what(r, v, err));
    if (finished)
        RT_TRY(add_result(r, v, err));
    RT_TRY(finished ? rt_json_set_string(v, "model", RT_MODEL_DIR, err) : rt_json_set_null(v, "model", err));
    RT_TRY(rt_record_publish(r->v->out, RT_RUN_FILE, v, err));
out:
    rt_json_free(v);
    return st;
}

/* ---- metrics.jsonl ---- */

static enum rt_status name_sequences(const struct rt_train_run *r, const struct rt_step_result *s, struct rt_json *line, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list;
    RT_TRY(rt_json_set_bool(line, "skipped", true, err));
    RT_TRY(rt_json_set_array(line, "sequences", &list, err));
    for (int64_t i = 0; i < s->n; i++) {
        uint8_t key[RT_KEY_BYTES];
        uint32_t occurrence;
        int64_t at;
        char text[4400];
        struct rt_train_set *set = r->set[s->batch[i].set];
        rt_train_set_key(set, s->batch[i].seq, key, &occurrence, &at);
        rt_hex(text, key, sizeof key);
        snprintf(text + 2 * RT_KEY_BYTES, sizeof text - 2 * RT_KEY_BYTES, " %s:%ld", rt_train_set_info(set)->path, (long)at);
        RT_TRY(rt_json_set_string(list, NULL, text, err));
    }
out:
    return st;
}

static enum rt_status set_mean(struct rt_json *line, const char *key, double sum, int64_t n, struct rt_err *err)
{
    return rt_json_set_double(line, key, n > 0 ? sum / (double)n : NAN, err);
}

enum rt_status rt_train_record_step(struct rt_train_run *r, const struct rt_step_result *s, double lr, double seconds, struct rt_err *err)
{
    enum rt_status st;
    static const char *const terms[] = {"grad_norm_ce", "grad_norm_kl", "grad_norm_feature", "grad_norm_alm"};
    struct rt_json *line = NULL;
    const struct rt_loss_sums *m = &s->sums;
    if (r->rank.rank > 0)
        return RT_OK;
    RT_TRY(rt_json_new_object(&line, err));
    RT_TRY(rt_json_set_int(line, "step", r->trainer.step, err));
    RT_TRY(rt_json_set_double(line, "loss", s->loss, err));
    RT_TRY(set_mean(line, "ce", m->ce, m->rows, err));
    RT_TRY(set_mean(line, "kl", m->kl, m->kl_rows, err));
    RT_TRY(set_mean(line, "feature", m->feature, m->feature_rows, err));
    RT_TRY(set_mean(line, "teacher_mass", m->teacher_mass, m->kl_rows, err));
    RT_TRY(set_mean(line, "student_mass", m->student_mass, m->kl_rows, err));
    RT_TRY(set_mean(line, "agreement", (double)m->agree, m->kl_rows, err));
    RT_TRY(set_mean(line, "accuracy", (double)m->correct, m->rows, err));
    RT_TRY(rt_json_set_double(line, "grad_norm", s->grad_norm, err));
    if (m->spans.spans > 0) {
        RT_TRY(set_mean(line, "alm", m->spans.loss, m->spans.spans, err));
        RT_TRY(set_mean(line, "span_logp_teacher", m->spans.teacher, m->spans.spans, err));
        RT_TRY(set_mean(line, "span_logp_student", m->spans.student, m->spans.spans, err));
        RT_TRY(rt_json_set_int(line, "spans", m->spans.spans, err));
    }
    for (int i = 0; i < 4; i++)
        if (!isnan(s->term_norm[i]))
            RT_TRY(rt_json_set_double(line, terms[i], s->term_norm[i], err));
    RT_TRY(rt_json_set_double(line, "clipped", 1 - s->scale, err));
    RT_TRY(rt_json_set_double(line, "clipped_steps", rt_trainer_clipped(&r->trainer), err));
    RT_TRY(rt_json_set_double(line, "lr", lr, err));
    RT_TRY(rt_json_set_int(line, "tokens", r->trainer.tokens, err));
    RT_TRY(rt_json_set_int(line, "targets", s->items, err));
    RT_TRY(rt_json_set_int(line, "ce_rows", m->rows, err));
    RT_TRY(rt_json_set_int(line, "kl_rows", m->kl_rows, err));
    RT_TRY(rt_json_set_int(line, "feature_rows", m->feature_rows, err));
    RT_TRY(rt_json_set_double(line, "epoch", s->epoch, err));
    RT_TRY(rt_json_set_double(line, "seconds", r->seconds, err));
    RT_TRY(rt_json_set_double(line, "tokens_per_second", (double)s->tokens / seconds, err));
    RT_TRY(rt_json_set_double(line, "mfu", rt_train_mfu(r, s, seconds), err));
    RT_TRY(rt_json_set_int(line, "memory", rt_train_memory(r), err));
    RT_TRY(rt_json_set_double(line, "seconds_left", rt_train_seconds_left(r), err));
    RT_TRY(rt_json_set_double(line, "data_wait", rt_loader_waited(r->trainer.loader), err));
    if (s->spike)
        RT_TRY(rt_json_set_bool(line, "spike", true, err));
    if (s->skipped)
        RT_TRY(name_sequences(r, s, line, err));
    RT_TRY(rt_rundir_metric(&r->dir, line, err));
out:
    rt_json_free(line);
    return st;
}

/* ---- eval.jsonl ---- */

static enum rt_status evaluate_one(struct rt_train_run *r, int i, struct rt_err *err)
{
    enum rt_status st;
    struct rt_trainer *t = &r->trainer;
    const struct rt_eval_room room = {t->s, &t->acts, &t->losses, &t->micro[0]};
    const struct rt_train_info *info = rt_train_set_info(r->eval_set[i]);
    const double T = r->o.w.T, start = rt_now();
    struct rt_eval_losses e;
    struct rt_buf rows = {0};
    struct rt_json *line = NULL;
    char name[128];
    double ce, kl, lo, hi;
    /* every rank does it, so that none waits; several would not be interrupted at one place */
    RT_TRY(rt_eval_losses(&room, r->eval_set[i], T, &rows, r->comm == NULL ? r->ctx->stop : NULL, r->ctx->stop_self, &e, err));
    if (r->rank.rank > 0)
        goto out;
    rt_eval_name(info->path, name);
    RT_TRY(rt_json_new_object(&line, err));
    RT_TRY(rt_json_set_int(line, "step", t->step, err));
    RT_TRY(rt_json_set_string(line, "name", name, err));
    RT_TRY(rt_json_set_string(line, "data", info->path, err));
    RT_TRY(rt_json_set_string(line, "by", "train", err));
    RT_TRY(rt_json_set_string(line, "kind", info->kind == RT_TRAIN_LINES ? "jsonl" : "shards", err));
    RT_TRY(rt_json_set_string(line, "data_sha256", info->sha256, err));
    RT_TRY(rt_eval_losses_json(&e, T, line, err));
    RT_TRY(rt_json_set_double(line, "seconds", rt_now() - start, err));
    RT_TRY(rt_record_eval(r->v->out, line, &rows, err));
    rt_ratio_result(&e.ce, &ce, &lo, &hi);
    rt_ratio_result(&e.kl, &kl, &lo, &hi);
    if (e.sums.kl_rows > 0)
        rt_info(r->ctx->log, "eval step %ld %s: ce %.4f, kl %.4f, agreement %.3f over %ld targets", (long)t->step, info->path, ce, kl,
                (double)e.sums.agree / (double)e.sums.kl_rows, (long)e.sums.rows);
    else
        rt_info(r->ctx->log, "eval step %ld %s: ce %.4f, accuracy %.3f over %ld targets", (long)t->step, info->path, ce,
                (double)e.sums.correct / (double)e.sums.rows, (long)e.sums.rows);
out:
    rt_json_free(line);
    rt_buf_free(&rows);
    return st;
}

enum rt_status rt_train_evaluate(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (r->n_eval == 0)
        return RT_OK;
    if (r->rank.rank == 0) /* lines of this step, of a part that was cut off in between, are made again */
        RT_TRY(rt_record_eval_truncate(r->v->out, r->trainer.step - 1, err));
    for (int i = 0; i < r->n_eval; i++)
        RT_TRY(evaluate_one(r, i, err));
out:
    return st;
}
