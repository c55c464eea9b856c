/* A training run: options, data, plan, the loop with its records, and the finished model. */
#ifndef RT_DISTILL_TRAIN_RUN_H
#define RT_DISTILL_TRAIN_RUN_H

#include "core/rank.h"
#include "distill/command.h"
#include "distill/evaluate.h"
#include "distill/train_cuts.h"
#include "formats/rundir.h"

struct rt_train_values {
    struct rt_common common;
    const char *student, *init_config, *tokenizer, *template_name, *out, *name, *arm;
    struct rt_str_list data, eval_data;
    double w_ce, w_kl, w_feature, w_alm, alm_tau, kd_temperature, teacher_temperature;
    const char *divergence, *tail, *feature_loss, *layer_map, *schedule, *on_nan, *dtype, *ce, *moments, *master, *recompute;
    double lr, min_lr, warmup, weight_decay, beta1, beta2, eps, clip, max_grad_spike;
    int64_t top_k, teacher_layers, epochs, steps, tokens, batch_tokens, micro_tokens, max_length, eval_every, save_every, keep, grad_norms, loader_threads, rank_timeout;
};
/* The options of `train`, ended by a NULL name. */
extern const struct rt_opt rt_train_options[];

/* What the run came to, where it ran to its end or had been finished before. */
struct rt_train_outcome {
    bool finished;
    int64_t steps, tokens;
};
/* Errors: USAGE and REFUSED before the first step; NUMERIC (--on-nan stop, too many steps skipped in a row, or every one: then no model is
 * written), INTERRUPTED after a checkpoint was saved. outcome may be NULL. */
enum rt_status rt_train(struct rt_context *ctx, const struct rt_train_values *v, struct rt_train_outcome *outcome, struct rt_err *err);

/* Every refusal that can be made before the first step; writes nothing. */
enum rt_status rt_train_check(struct rt_context *ctx, const struct rt_train_values *v, struct rt_err *err);

/* ---- shared by the files of a run ---- */
struct rt_train_run {
    struct rt_context *ctx;
    const struct rt_train_values *v;
    struct rt_rank rank;
    struct rt_comm *comm;                  /* NULL for one rank */
    struct rt_device device;
    struct rt_loaded_student student;
    struct rt_train_set **set, **eval_set; /* [n] */
    double *weight;                        /* [v->data.n] */
    char **path;                           /* [v->data.n] without their weights */
    int n_sets, n_eval;
    struct rt_trainer_options o;
    uint8_t *boundary;                     /* [vocab] of o; NULL without --w-alm */
    struct rt_schedule schedule;
    struct rt_trainer_memory memory;
    struct rt_trainer trainer;
    int64_t total_steps, total_tokens;     /* of the plan */
    double document_length;                /* of the plan: of the document that a token lies in, its mean over tokens, which attention's work goes by */
    char order_sha256[65], init_sha256[65];
    struct rt_rundir dir;
    double seconds;                        /* of training so far, earlier parts included, evaluation left out */
    int64_t saved;                         /* step of the last checkpoint, -1: there is none */
};

/* train_plan.c: opens student and data, checks what can be checked, plans memory and steps. Nothing is trained or written. */
enum rt_status rt_train_prepare(struct rt_train_run *r, struct rt_err *err);
/* train_run.c: gives back what rt_train_prepare opened, whether it succeeded or not, and the trainer; not the directory. */
void rt_train_release(struct rt_train_run *r);
/* Prints the plan on stdout (--dry-run). */
enum rt_status rt_train_print_plan(const struct rt_train_run *r, struct rt_err *err);
/* Adds "content_sha256" to v: {"data 1": "SHA-256 PATH", ..., "eval-data 1": ...}, rt_train_info.content_sha256 of each set. */
enum rt_status rt_train_contents(const struct rt_train_run *r, struct rt_json *v, struct rt_err *err);
/* Sequences over the lengths that --max-length and the model allow: the longest to be met. */
int64_t rt_train_longest(const struct rt_train_run *r);
/* Data i: the n_sets of training, then those of evaluation. */
struct rt_train_set *rt_train_set_at(const struct rt_train_run *r, int i);

/* train_memory.c: decides r->o's micro-batches, level and loader, and r->memory. NOMEM: what would fit is said. */
enum rt_status rt_train_plan_memory(struct rt_train_run *r, struct rt_err *err);
/* Bytes of r->memory, on device and host. */
size_t rt_train_memory_planned(const struct rt_train_run *r);

/* train_ranks.c: every one of them is called by all ranks; with one rank they do nothing. */
/* Meets the other ranks (r->comm), once data and order are known. */
enum rt_status rt_train_join(struct rt_train_run *r, struct rt_err *err);
/* *limit = the least of all ranks (what is free on a machine counts once for all its ranks), *micro = that of rank 0: all plan alike. */
enum rt_status rt_train_agree_room(const struct rt_train_run *r, int64_t *limit, int64_t *micro, struct rt_err *err);
/* *n = machines that the ranks run on. */
enum rt_status rt_train_machines(const struct rt_train_run *r, int *n, struct rt_err *err);
/* REFUSED where a rank begins with other parameters. */
enum rt_status rt_train_same_start(const struct rt_train_run *r, struct rt_err *err);
/* data = that of rank 0 */
enum rt_status rt_train_from_first(const struct rt_train_run *r, void *data, size_t bytes, struct rt_err *err);
/* Has any rank been asked to stop? */
enum rt_status rt_train_stop_asked(const struct rt_train_run *r, bool *yes, struct rt_err *err);
/* Where the run failed the others are told why; nothing is waited for any more. */
void rt_train_give_up(struct rt_train_run *r, enum rt_status st, const struct rt_err *err);

/* train_rate.c */
/* What MFU will be measured by. */
void rt_train_log_rate(const struct rt_train_run *r);
/* Operations of the step over those of all ranks' devices at their peak; NaN where the peak is not known. */
double rt_train_mfu(const struct rt_train_run *r, const struct rt_step_result *s, double seconds);
/* Bytes in use: of the device where it has memory of its own (by anybody), else the process's peak. */
int64_t rt_train_memory(const struct rt_train_run *r);
/* At the rate so far; NaN before the first step. */
double rt_train_seconds_left(const struct rt_train_run *r);
void rt_train_log_step(const struct rt_train_run *r, const struct rt_step_result *s, double lr, double seconds);

/* train_record.c: rank 0 alone writes */
/* Greatest resident memory since rt_train_peak_reset, else of the process's life. */
int64_t rt_train_peak_memory(void);
/* Begins a new peak of memory, so that arms of one process each have their own. */
void rt_train_peak_reset(void);
enum rt_status rt_train_record_run(struct rt_train_run *r, bool finished, struct rt_err *err);
enum rt_status rt_train_record_step(struct rt_train_run *r, const struct rt_step_result *s, double lr, double seconds, struct rt_err *err);
/* Evaluates on every --eval-data and appends to eval.jsonl. */
enum rt_status rt_train_evaluate(struct rt_train_run *r, struct rt_err *err);

#endif
