/* The losses of a packed micro-batch on the states of a forward, and their gradients.
 *
 *   L = 1/N ( w_ce sum ce_i + w_kl sum kl_i + w_feature/P sum_p sum f_p,i + w_alm sum a_s )
 * ce_i = -log q(label); kl_i = T^2 KL(P_t || Q_T) (core/backend.h, head_loss; T^2 keeps the gradient's scale at any T); f: distill/feature.h;
 * a_s of span s: distill/spans.h.
 * ce_i runs over all training rows, or over those without a teacher's row (rt_micro_options.ce_rest).
 * N is the number of training rows of the whole global batch, whatever micro-batches it is cut into.
 */
#ifndef RT_DISTILL_LOSSES_H
#define RT_DISTILL_LOSSES_H

#include "distill/feature.h"
#include "distill/micro.h"
#include "distill/span_losses.h"
#include "student/model.h"

struct rt_loss_weights {
    double ce, kl, feature, alm;
    double tau;         /* of the spans */
    double T;           /* of the student's side */
    enum rt_tail tail;
    bool cosine;
};

/* Sums over rows, +=. */
struct rt_loss_sums {
    double ce, kl, feature; /* feature: sum over pairs and rows, divided by the number of pairs */
    double teacher_mass, student_mass;
    int64_t rows, kl_rows, feature_rows, correct, agree; /* rows: that take CE */
    struct rt_span_sums spans;
};

/* What goes to the device with a micro-batch, and what comes back of its rows. Host arrays are such that copies do not wait (rt_backend.host_alloc). */
struct rt_loss_slot {
    int32_t *ids, *pos, *index, *label, *feature_index; /* device */
    uint32_t *top_ids;
    float *top_logp;
    uint8_t *kl_mask;
    double *dev_row[4], *dev_feature; /* dev_feature [pairs, tokens] */
    uint8_t *dev_hit;
    int32_t *host_pos;
    double *row[4], *feature;
    uint8_t *hit;
    struct rt_event *sent, *done;
    const struct rt_micro *p; /* what is there; borrowed */
    bool with_states;
    bool started;             /* its results are on their way, and not collected yet */
};

/* Buffers for micro-batches of `tokens`: with backward two slots, so that one is packed and sent while the other is worked on. */
enum { RT_LOSS_SLOTS = 2 };
struct rt_losses {
    const struct rt_device *d;
    int64_t tokens, H;
    int k, id_bits, slots; /* id_bits: of a teacher's id (core/top_ids.h) */
    size_t act;
    struct rt_loss_slot slot[RT_LOSS_SLOTS];
    struct rt_queue *copies; /* uploads run on it; NULL: on the device's own */
    void *x, *dx;         /* [rows, H] act */
    void *d_final;        /* [tokens, H] act */
    const double *ce, *kl, *teacher_mass, *student_mass; /* [host] [rows] of the micro-batch that was collected last */
    const uint8_t *hit;                                  /* bit 0: right, bit 1: the teacher's choice */
    /* states */
    int dim;              /* greatest of the map; 0: none */
    int pairs;
    void *a, *da;         /* [rows, dim] act */
    float *b;             /* [rows, dim] */
    void *extra[RT_MAX_FEATURES]; /* [tokens, H] act */
    struct rt_span_losses *spans; /* borrowed; NULL: w.alm is not used */
};

/* V: the vocabulary's size, that of the micro-batches (rt_micro_options). */
size_t rt_losses_bytes(int64_t tokens, int64_t H, int64_t V, int k, const struct rt_feature_map *map, size_t act_size, bool backward);
/* Cuts the device buffers from arena (rt_losses_bytes). map NULL: no states. */
enum rt_status rt_losses_create(struct rt_losses *l, const struct rt_device *d, int64_t tokens, int64_t H, int64_t V, int k,
                                const struct rt_feature_map *map, bool backward, struct rt_arena *arena, struct rt_err *err);
/* Waits for what is under way. A zeroed one is fine. */
void rt_losses_free(struct rt_losses *l);

/* What becomes of gradients: nothing; the micro-batch is a step's first, and those of the student's layers are = (rt_student_backward); all are +=. */
enum rt_losses_grads { RT_GRADS_NONE, RT_GRADS_FIRST, RT_GRADS_ADD };

/* A micro-batch goes through a slot in four steps, none of which waits for the device but the last (and states of spans, which take two passes):
 *   send     its rows and ids, on a queue of their own; what is enqueued on the device behind it finds them there. p stays as it is until collect.
 *   enqueue  behind the forward of rt_losses_batch(p), with rt_losses_sent: losses, and the gradients of student, head and projectors as `grads` says (but for
 *            NONE the forward must have kept everything). items: N. Sums of spans are added here.
 *   fetch    the rows' results, on their way to the host.
 *   collect  waits for the results; sums += this micro-batch's. Of a slot that was not fetched: nothing. */
enum rt_status rt_losses_send(struct rt_losses *l, int slot, const struct rt_micro *p, struct rt_err *err);
struct rt_student_sent rt_losses_sent(const struct rt_losses *l, int slot);
enum rt_status rt_losses_enqueue(struct rt_losses *l, int slot, struct rt_student *s, struct rt_projectors *proj, const struct rt_loss_weights *w, int64_t items,
                                 enum rt_losses_grads grads, struct rt_loss_sums *sums, struct rt_err *err);
enum rt_status rt_losses_fetch(struct rt_losses *l, int slot, struct rt_err *err);
/* Does enqueue only enqueue what the slot's sizes, weights and items say? Not with states, which it uploads, nor with spans, which it waits for. */
bool rt_losses_constant(const struct rt_losses *l, int slot, const struct rt_loss_weights *w);
enum rt_status rt_losses_collect(struct rt_losses *l, int slot, struct rt_loss_sums *sums, struct rt_err *err);

/* All three at once, in slot 0, after a forward of p's sequences (rt_losses_batch). Per-row results stay in l->ce .. l->hit until the next call. */
enum rt_status rt_losses_run(struct rt_losses *l, struct rt_student *s, struct rt_projectors *proj, const struct rt_micro *p,
                             const struct rt_loss_weights *w, int64_t items, bool backward, struct rt_loss_sums *sums, struct rt_err *err);
struct rt_student_batch rt_losses_batch(const struct rt_micro *p);

#endif
