/* AdamW over all parameters of a student, clipping by the global norm, learning-rate schedules. */
#ifndef RT_STUDENT_OPTIMIZER_H
#define RT_STUDENT_OPTIMIZER_H

#include <stdbool.h>
#include <stdint.h>

#include "formats/checkpoint.h"
#include "student/exchange.h"
#include "student/model.h"

enum rt_schedule_kind { RT_SCHEDULE_CONSTANT, RT_SCHEDULE_LINEAR, RT_SCHEDULE_COSINE };

struct rt_schedule {
    enum rt_schedule_kind kind;
    double lr;        /* peak */
    double min_ratio; /* lr at the end / peak, for linear and cosine */
    int64_t warmup;   /* steps; step w of them has lr * w / warmup */
    int64_t total;    /* steps; beyond them the last value stays */
};
/* "constant", "linear", "cosine"; false for another name. */
bool rt_schedule_from_name(const char *name, enum rt_schedule_kind *out);
/* Learning rate of optimiser step `step`, counted from 1. After warm-up, with x = (step - warmup)/(total - warmup) in [0, 1]:
 * constant: lr; linear: lr (1 - (1 - r) x); cosine: lr (r + (1 - r) (1 + cos(pi x))/2). */
double rt_schedule_lr(const struct rt_schedule *s, int64_t step);

struct rt_adamw {
    double beta1, beta2, eps, decay;
    double clip;          /* greatest global norm of the gradient; 0: none */
    bool decay_matrices_only; /* norms and biases take no decay (the embedding and the head do) */
    bool bf16_moments;    /* where act is BF16 (else USAGE): moments in BF16, rounded stochastically by `seed`; false: in F32 */
    uint64_t seed;
    bool no_master;       /* where act is BF16 (else USAGE): parameters are BF16 alone, rounded stochastically by `seed`; false: float32 masters */
};

/* What AdamW keeps beside a block of n parameters, in device memory. Where act is BF16 the parameters are the upper halves of float32 masters
 * whose lower halves lie here, so that no step is lost to rounding (but for no_master); elsewhere low is NULL, and the moments are of act. */
struct rt_adamw_state {
    char *low, *m, *v;
    enum rt_dtype moment;
    struct rt_param_shard shard; /* several ranks: what this one keeps */
};
size_t rt_adamw_state_bytes(int64_t n, size_t act_size, bool bf16_moments);
/* Of them, what no_master leaves out. */
size_t rt_adamw_master_bytes(int64_t n, size_t act_size);
/* Cuts and zeroes. USAGE for values of o outside their ranges. */
enum rt_status rt_adamw_state_init(struct rt_adamw_state *state, const struct rt_device *d, int64_t n, const struct rt_adamw *o, struct rt_arena *arena,
                                   struct rt_err *err);
/* The block with its lower halves; this rank's part of it where these are one. */
struct rt_param_block rt_adamw_master(const struct rt_adamw_state *state, const struct rt_device *d, const void *block);

/* All of the next two is called by every rank, where there are several; rank 0 alone writes (w NULL elsewhere), each reads.
 * The files of a checkpoint: parameters as float32 where they are split (else of act), and moments, each under the published names and exact
 * (F64 excepted: F32). files: names of the three. state NULL: the parameters alone. */
enum rt_status rt_adamw_checkpoint(const struct rt_params *p, const struct rt_device *d, const void *block, const struct rt_adamw_state *state,
                                   const char *const files[3], struct rt_ckpt_writer *w, struct rt_err *err);
enum rt_status rt_adamw_restore(const struct rt_params *p, const struct rt_device *d, void *block, const struct rt_adamw_state *state,
                                const char *const files[3], const char *dir, struct rt_err *err);
/* Element type of the parameters in those files. */
enum rt_dtype rt_adamw_file_dtype(const struct rt_device *d, const struct rt_adamw_state *state);

struct rt_optimizer {
    struct rt_student *s;
    struct rt_adamw o;
    struct rt_adamw_state state; /* cut from the caller's arena */
    struct rt_exchange exchange; /* with the other ranks */
    bool early;
    int64_t step;  /* steps taken; part of a checkpoint with the state */
};

/* How several ranks share the work (ZeRO stage 1, Rajbhandari et al. 2020): each keeps moments and lower halves of its own parts alone. */
struct rt_optimizer_ranks {
    struct rt_comm *comm; /* borrowed; the one that the student's device was opened with. NULL: one rank */
    int64_t bucket;       /* elements of rt_param_shard */
    bool overlap;         /* parameters are gathered while the next bucket is updated; the same bits */
    bool early;           /* with overlap: sums begin while backward runs; the same bits */
};

/* Bytes of the arena for rt_optimizer_init; of rank 0's shard, the largest, where there are several ranks. */
size_t rt_optimizer_bytes(const struct rt_params *p, size_t act_size, bool bf16_moments);
size_t rt_optimizer_shard_bytes(const struct rt_params *p, int ranks, int64_t bucket, size_t act_size, bool bf16_moments);
size_t rt_optimizer_master_bytes(const struct rt_params *p, int ranks, int64_t bucket, size_t act_size);
/* As rt_adamw_state_init. s is borrowed. */
enum rt_status rt_optimizer_init(struct rt_optimizer *opt, struct rt_student *s, const struct rt_adamw *o, struct rt_arena *arena,
                                 struct rt_err *err);

/* The same for several ranks. A step then updates this rank's part and gathers the parameters of all. Close it before the device. */
enum rt_status rt_optimizer_init_shard(struct rt_optimizer *opt, struct rt_student *s, const struct rt_adamw *o, const struct rt_optimizer_ranks *ranks,
                                       struct rt_arena *arena, struct rt_err *err);
void rt_optimizer_close(struct rt_optimizer *opt); /* zeroed is fine; nothing for one rank */
/* For several ranks, else nothing: gradients = sum over ranks, of this rank's parts alone; between the last backward and the step. After `begin`, called
 * before that backward, the sums are handed out as backward leaves the layers (early), or when it ends; else all of them here. */
void rt_optimizer_reduce_begin(struct rt_optimizer *opt);
enum rt_status rt_optimizer_reduce(struct rt_optimizer *opt, struct rt_err *err);
/* Global norm of the (reduced) gradients, summed over the whole block in one fixed order. USAGE before attach. */
enum rt_status rt_optimizer_norm(const struct rt_optimizer *opt, double *norm, struct rt_err *err);

struct rt_step_report {
    double grad_norm; /* before clipping */
    double scale;     /* that the gradient took: min(1, clip / (norm + 1e-6)) */
    bool skipped;     /* the norm is not finite: nothing was changed, step was not counted */
};
/* One step from the student's (reduced) gradients (times grad_scale, 1 usually); they stay as they are. */
enum rt_status rt_optimizer_step(struct rt_optimizer *opt, double lr, double grad_scale, struct rt_step_report *report,
                                 struct rt_err *err);
/* The same where the caller has their norm already, from rt_optimizer_norm. */
enum rt_status rt_optimizer_step_of(struct rt_optimizer *opt, double lr, double grad_scale, double norm, struct rt_step_report *report,
                                    struct rt_err *err);

#endif
