/* How a training step is cut so that it fits into memory: micro-batches, what backward computes again, what a GPU's operations may take. `train` and `doctor`
 * plan with the same functions. */
#ifndef RT_DISTILL_TRAIN_CUTS_H
#define RT_DISTILL_TRAIN_CUTS_H

#include "distill/trainer.h"

/* Tokens of a micro-batch, what backward computes again (0 .. 3; of `less` layers the level below), bytes that a GPU's operations may take for themselves. */
struct rt_train_cuts {
    int64_t micro_tokens;
    int recompute, less;
    size_t operations;
};
/* Estimated work of a token in FLOPs, moved bytes and begun operations counted as what products do in that time: for comparing cuts, not for planning hours.
 * longest: tokens of a document. */
double rt_train_cuts_cost(const struct rt_student_config *c, const struct rt_params *p, int64_t longest, bool gpu, const struct rt_train_cuts *x);

/* What a plan rests on, and the plan. Everything that is pointed to is borrowed. */
struct rt_train_plan {
    const struct rt_student_config *c;
    const struct rt_params *p;
    const struct rt_device *d;
    struct rt_trainer_options *o;    /* of the losses, the optimiser, ranks; the plan sets micro_tokens, recompute, recompute_less, record, loader_* */
    int64_t longest;                 /* tokens of the longest sequence, of evaluation too */
    int64_t micro_tokens;            /* of a micro-batch at most, */
    bool fixed;                      /* or exactly so many, where sequences are no longer */
    int recompute;                   /* level; -1: as memory needs */
    int threads, loader_threads;     /* as asked for; 0, -1: by the machine */
    int64_t host;                    /* bytes of the host's memory: an eighth of it may hold sequences that are decoded ahead */
    size_t data;                     /* bytes that the data take of that in any case */
    size_t operations;               /* of a GPU; rt_train_operations */
    bool shrinks;                    /* they may take less where nothing else helps */
    struct rt_trainer_memory memory; /* the plan's */
};

/* Tokens of a micro-batch where nothing is asked for. */
int64_t rt_train_usual_micro(const struct rt_device *d, int64_t batch_tokens);
/* *out = bytes that operations of a GPU may take beside their arguments; 0 where the memory is the host's. */
enum rt_status rt_train_operations(const struct rt_device *d, size_t *out, struct rt_err *err);
/* Plans the cuts of the least cost within `limit` bytes of the memory that is computed in; false, and the plan that needs least, where none fits. */
bool rt_train_plan_fit(struct rt_train_plan *t, size_t limit);
/* Bytes of the memory that is computed in: what has to fit. */
size_t rt_train_plan_need(const struct rt_train_plan *t);
/* MiB of that memory with which rt_train_plan_fit succeeds, other things as they are; *need = bytes that its plan takes. held: what a GPU's libraries hold. */
int64_t rt_train_plan_enough(const struct rt_train_plan *t, size_t held, size_t *need);
/* A half, a quarter, ... of t->longest with which it fits; 0: with none. */
int64_t rt_train_plan_shorter(const struct rt_train_plan *t, size_t limit);

#endif
