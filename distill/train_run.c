#include "distill/train_run.h"

#include <string.h>

#include "core/collective.h"
#include "core/io.h"
#include "core/sha256.h"
#include "distill/run_record.h"
#include "student/save.h"

enum { MAX_SKIPPED = 10 }; /* steps in a row that may be left out */
static const double log_seconds = 10;

void rt_train_release(struct rt_train_run *r)
{
    rt_trainer_close(&r->trainer);
    for (int i = 0; i < r->n_eval; i++)
        rt_train_set_free(r->eval_set[i]);
    for (int i = 0; r->set != NULL && i < r->v->data.n; i++)
        rt_train_set_free(r->set[i]);
    for (int i = 0; r->path != NULL && i < r->v->data.n; i++)
        rt_free(r->path[i]);
    rt_free(r->set);
    rt_free(r->eval_set);
    rt_free(r->weight);
    rt_free(r->path);
    rt_free(r->boundary);
    rt_loaded_student_close(&r->student);
    rt_device_close(&r->device);
    rt_comm_free(r->comm);
    r->comm = NULL;
}

/* st, err: what the run came to. */
static void close_run(struct rt_train_run *r, enum rt_status st, const struct rt_err *err)
{
    rt_train_give_up(r, st, err); /* before anything that would wait for the other ranks */
    rt_train_release(r);
    if (r->ctx->log != NULL && r->ctx->log->copy == r->dir.log_file)
        r->ctx->log->copy = NULL;
    rt_rundir_close(&r->dir);
}

/* ---- the directory ---- */

/* Was RUN begun before contents of the data were kept in config.json? */
static enum rt_status begun_without_contents(const struct rt_train_run *r, bool *yes, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *was = NULL;
    char path[4096];
    *yes = false;
    RT_TRY(rt_path_join(path, sizeof path, r->v->out, "config.json", err));
    if (!rt_path_exists(path))
        goto out;
    RT_TRY(rt_json_load(path, 16 << 20, &was, err));
    *yes = rt_json_get(was, "content_sha256") == NULL;
out:
    rt_json_free(was);
    return st;
}

/* The configuration that a resume must agree with: options and the identity of what was read. */
static enum rt_status open_dir(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *config = NULL;
    bool without;
    if (r->rank.rank > 0)
        return RT_OK;
    RT_TRY(rt_command_config(&rt_cmd_train, r->v, &config, err));
    RT_TRY(begun_without_contents(r, &without, err));
    if (!without)
        RT_TRY(rt_train_contents(r, config, err));
    RT_TRY(rt_json_set_string(config, "order_sha256", r->order_sha256, err));
    RT_TRY(rt_json_set_string(config, "init_sha256", r->init_sha256, err));
    RT_TRY(rt_rundir_open(r->v->out, config, &r->dir, err));
    if (r->ctx->log != NULL)
        r->ctx->log->copy = r->dir.log_file;
out:
    rt_json_free(config);
    return st;
}

/* Is RUN/run.json of a finished run, and its model still there? */
static enum rt_status is_finished(const struct rt_train_run *r, bool *yes, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    char model[4096];
    *yes = false;
    if (r->rank.rank > 0)
        return rt_train_from_first(r, yes, sizeof *yes, err);
    RT_TRY(rt_record_run(r->v->out, &v, err));
    if (v == NULL)
        goto out;
    RT_TRY(rt_json_bool_or(v, "finished", false, yes, err));
    RT_TRY(rt_path_join(model, sizeof model, r->v->out, RT_MODEL_DIR, err));
    if (*yes && !(rt_path_has(model, "config.json") && (rt_path_has(model, "model.safetensors") || rt_path_has(model, "model.safetensors.index.json")))) {
        rt_warn(r->ctx->log, "%s was finished, but its model is gone: training goes on from the last checkpoint, or anew", r->v->out);
        *yes = false;
    }
out:
    rt_json_free(v);
    return st == RT_OK ? rt_train_from_first(r, yes, sizeof *yes, err) : st;
}

/* Where products are measured, a rank's choices are kept in RUN: with them a resumed run goes on with the same bytes. */
static enum rt_status measure_products(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *d = &r->device;
    char path[4096], name[64] = "products.txt", note[512] = "";
    if (d->be->tune == NULL)
        goto out;
    if (r->rank.rank > 0)
        snprintf(name, sizeof name, "products-%d.txt", r->rank.rank);
    RT_TRY(rt_path_join(path, sizeof path, r->v->out, name, err));
    RT_TRY(d->be->tune(d->dev, path, note, sizeof note, err));
    if (note[0] != 0)
        rt_warn(r->ctx->log, "%s", note);
out:
    return st;
}

/* ---- the loop ---- */

/* Returns on every rank when rank 0 has the checkpoint in place: none says "saved" or ends before that. */
static enum rt_status save(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    double in_place = 1;
    if (r->rank.rank == 0)
        RT_TRY(rt_rundir_sync(&r->dir, err));
    RT_TRY(rt_trainer_checkpoint(&r->trainer, r->v->out, (int)r->v->keep, r->seconds, err));
    RT_TRY(rt_comm_sum(r->comm, &in_place, 1, err));
    r->saved = r->trainer.step;
out:
    return st;
}

static enum rt_status resume(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    struct rt_ckpt at;
    memset(&at, 0, sizeof at);
    if (r->rank.rank == 0)
        RT_TRY(rt_ckpt_latest(r->v->out, r->ctx->log, &at, err));
    RT_TRY(rt_train_from_first(r, &at, sizeof at, err));
    if (at.step >= 0) {
        st = rt_trainer_restore(&r->trainer, at.path, &r->seconds, err);
        if (st != RT_OK && r->rank.rank > 0)
            rt_err_context(err, "rank %d reads the checkpoint of rank 0", r->rank.rank);
        RT_TRY(st);
        r->saved = at.step;
        rt_info(r->ctx->log, "going on from step %ld of %ld", (long)r->trainer.step, (long)r->total_steps);
    }
    if (r->rank.rank > 0)
        goto out;
    RT_TRY(rt_rundir_truncate(&r->dir, r->trainer.step, err));
    RT_TRY(rt_record_eval_truncate(r->v->out, r->trainer.step, err));
out:
    return st;
}

/* What is left of a run that ends here. */
static const char *kept(const struct rt_train_run *r, char out[64])
{
    if (r->saved < 0)
        return "no checkpoint had been saved";
    snprintf(out, 64, "the checkpoint of step %ld is kept", (long)r->saved);
    return out;
}

/* No step has changed a parameter: what the student was given as has losses that are no numbers. */
static enum rt_status none_taken(const struct rt_train_run *r, struct rt_err *err)
{
    char left[64];
    return rt_fail(err, RT_NUMERIC, "all of %ld steps were left out: losses or gradients of the student as it was given are not finite; nothing was learnt, "
                   "no model is written (%s); `retort doctor --student DIR --data FILE` looks at it, metrics.jsonl names the data", (long)r->trainer.step,
                   kept(r, left));
}

/* A step that was left out: says so, with its batch; the end of the run by --on-nan stop, or where too many follow each other. */
static enum rt_status after_skip(struct rt_train_run *r, const struct rt_step_result *s, int *in_a_row, struct rt_err *err)
{
    uint8_t key[RT_KEY_BYTES];
    uint32_t occurrence;
    int64_t line;
    char hex[2 * RT_KEY_BYTES + 1], what[160], batch[4400], left[64];
    struct rt_train_set *set = r->set[s->batch[0].set];
    rt_train_set_key(set, s->batch[0].seq, key, &occurrence, &line);
    rt_hex(hex, key, sizeof key);
    snprintf(what, sizeof what, "step %ld: loss %g, gradient norm %g", (long)r->trainer.step, s->loss, s->grad_norm);
    if (s->spike)
        snprintf(what, sizeof what, "step %ld: loss %g, gradient norm %g, which is %.3g times its mean so far (--max-grad-spike %g)", (long)r->trainer.step,
                 s->loss, s->grad_norm, s->grad_norm / s->usual_norm, r->v->max_grad_spike);
    snprintf(batch, sizeof batch, "%ld sequences from %s line %ld (key %.12s)", (long)s->n, rt_train_set_info(set)->path, (long)line, hex);
    ++*in_a_row;
    if (r->rank.rank == 0)
        rt_warn(r->ctx->log, "%s: left out, %s; all are in metrics.jsonl", what, batch);
    if (strcmp(r->v->on_nan, "stop") == 0)
        return rt_fail(err, RT_NUMERIC, "%s, in a batch of %.300s; %s; --on-nan skip leaves such steps out", what, batch, kept(r, left));
    if (*in_a_row >= MAX_SKIPPED && r->trainer.opt.step == 0)
        return none_taken(r, err);
    if (*in_a_row >= MAX_SKIPPED)
        return rt_fail(err, RT_NUMERIC, "%d steps in a row were left out, the last one %ld; %s: a lower --lr, or look at the data that "
                       "metrics.jsonl names", *in_a_row, (long)r->trainer.step, kept(r, left));
    return RT_OK;
}

static bool due(int64_t step, int64_t every)
{
    return every > 0 && step % every == 0;
}

/* An evaluation that is interrupted is made again on resume, from a checkpoint of its step. */
static enum rt_status evaluate_between(struct rt_train_run *r, struct rt_err *err)
{
    struct rt_err why = {0};
    const enum rt_status st = rt_train_evaluate(r, err), saved = st == RT_INTERRUPTED ? save(r, &why) : RT_OK;
    if (saved == RT_OK)
        return st;
    rt_err_clear(err);
    return rt_fail(err, saved, "%s", why.msg);
}

static enum rt_status loop(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_trainer *t = &r->trainer;
    const struct rt_train_values *v = r->v;
    struct rt_progress progress;
    struct rt_step_result s;
    int skipped = 0;
    bool stop;
    double logged = rt_now();
    if (t->step == 0 || (due(t->step, v->eval_every) && t->step < r->total_steps))
        RT_TRY(evaluate_between(r, err));
    rt_progress_begin(&progress, r->ctx->log, "training", "tokens", r->total_tokens);
    progress.first = t->tokens;
    while (t->step < r->total_steps) {
        RT_TRY(rt_train_stop_asked(r, &stop, err));
        if (stop) {
            RT_TRY(save(r, err));
            RT_FAIL(err, INTERRUPTED, "interrupted after step %ld of %ld, saved in %s; the same command goes on", (long)t->step, (long)r->total_steps, v->out);
        }
        const double lr = rt_schedule_lr(&r->schedule, t->step + 1), start = rt_now();
        RT_TRY(rt_trainer_step(t, lr, due(t->step + 1, v->grad_norms), &s, err));
        if (s.end)
            RT_FAIL(err, INTERNAL, "the data end at step %ld, planned were %ld", (long)t->step, (long)r->total_steps);
        const double seconds = rt_now() - start;
        r->seconds += seconds;
        RT_TRY(rt_train_record_step(r, &s, lr, seconds, err));
        if (s.skipped)
            RT_TRY(after_skip(r, &s, &skipped, err));
        else
            skipped = 0;
        if (rt_now() - logged >= log_seconds || t->step == 1 || t->step == r->total_steps) {
            rt_train_log_step(r, &s, lr, seconds);
            logged = rt_now();
        }
        rt_progress_update(&progress, t->tokens, NULL);
        if (due(t->step, v->eval_every) && t->step < r->total_steps)
            RT_TRY(evaluate_between(r, err));
        if (t->opt.step > 0 && (due(t->step, v->save_every) || t->step == r->total_steps))
            RT_TRY(save(r, err));
    }
    rt_progress_end(&progress);
    if (t->opt.step == 0)
        RT_TRY(none_taken(r, err));
out:
    return st;
}

static enum rt_status finish(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    char path[4096];
    enum rt_dtype dtype = r->student.c.dtype;
    static const struct {
        const char *name;
        enum rt_dtype dtype;
    } types[] = {{"bf16", RT_BF16}, {"f16", RT_F16}, {"f32", RT_F32}};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(types[i].name, r->v->dtype) == 0)
            dtype = types[i].dtype;
    RT_TRY(rt_train_evaluate(r, err));
    RT_TRY(rt_path_join(path, sizeof path, r->v->out, RT_MODEL_DIR, err));
    const struct rt_student_save o = {.source = r->student.model.path, .dtype = dtype, .state = &r->trainer.opt.state};
    RT_TRY(rt_student_save(r->trainer.s, &o, path, err));
    if (r->rank.rank > 0)
        goto out;
    RT_TRY(rt_rundir_sync(&r->dir, err));
    RT_TRY(rt_train_record_run(r, true, err));
    rt_info(r->ctx->log, "finished: %ld steps, %ld tokens; the student is in %s", (long)r->trainer.step, (long)r->trainer.tokens, path);
out:
    return st;
}

enum rt_status rt_train(struct rt_context *ctx, const struct rt_train_values *v, struct rt_train_outcome *outcome, struct rt_err *err)
{
    enum rt_status st;
    bool finished;
    struct rt_train_run r = {.ctx = ctx, .v = v, .dir = {.lock = -1, .metrics = -1}, .saved = -1};
    rt_train_peak_reset();
    RT_TRY(rt_rank_from_env(&r.rank, err));
    if (v->common.dry_run && r.rank.size == 1) /* a plan of what --gpus would start */
        r.rank.size = (int)v->common.gpus;
    else if (r.rank.size == 1 && v->common.gpus > 1)
        RT_FAIL(err, USAGE, "--gpus %d: several GPUs train one run (`retort train`); here each run takes one", (int)v->common.gpus);
    if (r.rank.rank > 0 && ctx->log != NULL && ctx->log->level > RT_LOG_WARN && !v->common.verbose) /* what is to be said, rank 0 says */
        ctx->log->level = RT_LOG_WARN;
    RT_TRY(rt_train_prepare(&r, err));
    if (v->common.dry_run) {
        RT_TRY(rt_train_print_plan(&r, err));
        goto out;
    }
    RT_TRY(rt_loaded_student_create(&r.student, &r.device, rt_train_longest(&r), (uint64_t)v->common.seed, err));
    RT_TRY(rt_loaded_student_hash(&r.student, r.init_sha256, err));
    RT_TRY(rt_train_same_start(&r, err));
    RT_TRY(open_dir(&r, err));
    RT_TRY(is_finished(&r, &finished, err));
    if (finished) {
        rt_info(ctx->log, "%s is finished already", v->out);
        if (outcome != NULL)
            *outcome = (struct rt_train_outcome){true, r.total_steps, r.total_tokens};
        goto out;
    }
    RT_TRY(measure_products(&r, err));
    RT_TRY(rt_trainer_open(&r.trainer, r.student.s, r.set, r.weight, r.n_sets, &r.o, err));
    RT_TRY(resume(&r, err));
    RT_TRY(rt_train_record_run(&r, false, err));
    rt_train_log_rate(&r);
    RT_TRY(loop(&r, err));
    RT_TRY(finish(&r, err));
    if (outcome != NULL)
        *outcome = (struct rt_train_outcome){true, r.trainer.step, r.trainer.tokens};
out:
    close_run(&r, st, err);
    return st;
}

enum rt_status rt_train_check(struct rt_context *ctx, const struct rt_train_values *v, struct rt_err *err)
{
    struct rt_train_run r = {.ctx = ctx, .v = v, .rank = {0, 1, 0}, .dir = {.lock = -1, .metrics = -1}, .saved = -1};
    const enum rt_status st = rt_train_prepare(&r, err);
    close_run(&r, st, err);
    return st;
}
