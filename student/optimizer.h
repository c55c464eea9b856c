/* AdamW over all parameters of a student, clipping by the global norm, learning-rate schedules. */
#ifndef RT_STUDENT_OPTIMIZER_H
#define RT_STUDENT_OPTIMIZER_H

#include <stdbool.h>
#include <stdint.h>

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
};

struct rt_optimizer {
    struct rt_student *s;
    struct rt_adamw o;
    char *m, *v;   /* act [elements], cut from the caller's arena */
    int64_t step;  /* steps taken; part of a checkpoint with m and v */
};

/* Bytes of the arena for rt_optimizer_init. */
size_t rt_optimizer_bytes(const struct rt_params *p, size_t act_size);
/* Cuts and zeroes m and v. USAGE for values outside their ranges. s is borrowed. */
enum rt_status rt_optimizer_init(struct rt_optimizer *opt, struct rt_student *s, const struct rt_adamw *o, struct rt_arena *arena,
                                 struct rt_err *err);

struct rt_step_report {
    double grad_norm; /* before clipping */
    double scale;     /* that the gradient took: min(1, clip / (norm + 1e-6)) */
    bool skipped;     /* the norm is not finite: nothing was changed, step was not counted */
};
/* One step from the student's gradients (times grad_scale, 1 usually); they stay as they are. The norm is summed over the whole
 * block in one fixed order. */
enum rt_status rt_optimizer_step(struct rt_optimizer *opt, double lr, double grad_scale, struct rt_step_report *report,
                                 struct rt_err *err);

#endif
