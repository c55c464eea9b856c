/* The optimiser step of a student over packed data: the same data, seed and options give the same bytes, whatever --threads and
 * wherever it was stopped and gone on.
 *
 * A step takes the next global batch of the order, counts its training rows N first, then runs micro-batches (forward, losses,
 * backward) whose gradients add up, and one AdamW step. A step whose loss or gradient norm is not finite changes nothing but the
 * place in the data. So does one whose norm is a spike, but that the running mean learns of it, cut down to what would just have passed: a
 * gradient that stays large is let through after a few steps.
 *
 * Several ranks: each runs its share of every global batch, gradients and sums are added up, and each rank updates its part of the parameters (ZeRO
 * stage 1; student/exchange.h says what passes between them, and when). Every function below is then called by all ranks alike, and gives all of them the same results; of a
 * checkpoint rank 0 alone writes. The gradient is that of one rank, but for the order of sums.
 */
#ifndef RT_DISTILL_TRAINER_H
#define RT_DISTILL_TRAINER_H

#include "distill/loaded_student.h"
#include "distill/loader.h"
#include "distill/losses.h"
#include "distill/recorded.h"

struct rt_trainer_options {
    struct rt_loss_weights w;
    double teacher_T;
    bool ce_rest;                /* cross-entropy on rows without a teacher's row alone */
    struct rt_adamw adamw;
    double max_spike;            /* 0: none. A gradient norm above max_spike times its mean so far is a spike: the step is skipped */
    struct rt_feature_map map;   /* n 0: no states */
    const uint8_t *boundary;     /* NULL, or [vocab] (distill/spans.h): the sets' spans are trained on; borrowed */
    int k;                       /* ids a row, the most of any set (evaluation included); 0: no teacher rows */
    int use_k;                   /* of them the first so many are trained on; 0: all */
    int64_t batch_tokens, micro_tokens; /* micro: at least the longest sequence */
    int recompute;               /* level 0 .. 3 (student/model.h): less memory, more work, the same bits */
    int recompute_less;          /* of so many layers the level below */
    int64_t epochs;              /* 0: no end */
    uint64_t seed;
    int loader_threads;          /* 0: sequences are decoded when they are needed */
    size_t loader_bytes;         /* of sequences decoded ahead */
    int ranks;                   /* for a plan: how many there are, or will be; 0 is 1 */
    struct rt_comm *comm;        /* NULL: one rank; else the one that the student's device was opened with, borrowed */
    int64_t bucket;              /* of several ranks: elements whose gradients are summed, and parameters gathered, at a time; 0: all */
    bool record;                 /* micro-steps are recorded where that gains and can be done (distill/recorded.h): no states, no spans, of several ranks none in
                                  * which sums begin; the same bits */
    bool overlap, early;         /* what of it runs beside the computation (student/optimizer.h); the same bits */
};

/* Bytes of each kind, for a plan. operations: what a device with memory of its own is told that operations may take (the planner's choice). measured: the
 * copy of the largest product's result, the head's gradient, while the device measures how to make it (none where operations may take less). */
struct rt_trainer_memory {
    size_t weights, grads, moments, activations, losses, projectors, operations, recorded, measured, host;
};
/* Of the kinds that lie where the student does: all but host. */
static inline size_t rt_trainer_memory_on_device(const struct rt_trainer_memory *m)
{
    return m->weights + m->grads + m->moments + m->activations + m->losses + m->projectors + m->operations + m->recorded + m->measured;
}

struct rt_trainer {
    struct rt_trainer_options o;
    const struct rt_device *d;
    struct rt_student *s;
    struct rt_train_set *const *set;
    struct rt_arena grads, moments, acts, scratch;
    struct rt_optimizer opt;
    struct rt_projectors proj;
    struct rt_losses losses;
    struct rt_span_losses spans;
    struct rt_micro micro[RT_LOSS_SLOTS]; /* one is packed while the other is worked on */
    struct rt_recorded recorded;
    int last;        /* slot of the last micro-batch */
    struct rt_loader *loader;
    int64_t own;     /* sequences of the batch under way that are this rank's */
    int64_t step;    /* batches taken; optimiser steps are opt.step */
    int64_t tokens, targets, skipped, clipped; /* so far */
    double usual_norm;                /* running mean of gradient norms above 0; what a spike is told by, part of a checkpoint */
    int64_t norms;                    /* in it */
};

struct rt_step_result {
    struct rt_loss_sums sums;
    int64_t tokens, items;     /* of this batch; items: N */
    double loss, grad_norm, scale;
    bool skipped, spike, end;  /* spike: why it was skipped; end: the order has no more data, nothing was done */
    double term_norm[4];       /* ce, kl, feature, alm; NaN unless asked for */
    const struct rt_order_item *batch; /* [n] valid until the next step */
    int64_t n;
    double epoch;              /* behind it */
    double usual_norm;         /* before it; 0: none yet */
};

/* What `bucket` should be on GPUs: a layer of 1.5B parameters and up, several layers of smaller models. */
enum { RT_TRAINER_BUCKET = 1 << 24 };
/* max_length: longest sequence, of evaluation too. */
void rt_trainer_plan(const struct rt_student_config *c, const struct rt_params *p, const struct rt_trainer_options *o, int64_t max_length,
                     size_t act_size, struct rt_trainer_memory *out);
/* s and the sets are borrowed; weights [n_sets] too. NOMEM, USAGE. */
enum rt_status rt_trainer_open(struct rt_trainer *t, struct rt_student *s, struct rt_train_set *const *set, const double *weight, int n_sets,
                               const struct rt_trainer_options *o, struct rt_err *err);
void rt_trainer_close(struct rt_trainer *t); /* zeroed is fine */
/* term_norms: gradient norms of each term too, at the cost of as many passes more. */
enum rt_status rt_trainer_step(struct rt_trainer *t, double lr, bool term_norms, struct rt_step_result *r, struct rt_err *err);
/* For measurements: the last micro-batch `times` times again, forward to backward, its gradients on top of what is there. *tokens = its tokens. */
enum rt_status rt_trainer_repeat(struct rt_trainer *t, int times, int64_t *tokens, struct rt_err *err);
/* Share of the optimiser's steps whose gradient was clipped; NaN before the first. */
double rt_trainer_clipped(const struct rt_trainer *t);
/* Model, moments, projectors and state.json into a checkpoint of dir; and back from its directory. */
enum rt_status rt_trainer_checkpoint(const struct rt_trainer *t, const char *dir, int keep, double seconds, struct rt_err *err);
enum rt_status rt_trainer_restore(struct rt_trainer *t, const char *ckpt, double *seconds, struct rt_err *err);

#endif
