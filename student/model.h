/* The dense student: forward over a packed batch with all that backward needs, and backward.
 *
 * Invariants
 *   1. Everything on the device lies in arenas of the caller: weights (parameters, rope tables), gradients, activations.
 *      A forward cuts the activation arena anew; what it left there is valid until the next forward on this student.
 *   2. A batch is n tokens of n_seq documents behind each other; positions begin at 0 in each, attention stays inside.
 *   3. Backward accumulates (+=) into the gradients: zero them once, then run as many batches as the step has. Or zero only the outer ones, and let the
 *      first batch's backward write (=) those of the layers.
 *   4. The loss is the caller's: op head_loss takes rt_student_head's weight and gradient over rows of the final states, and
 *      its dx comes back to rt_student_backward. Run it before backward; a tied head's gradient is the embedding's buffer.
 *   5. Same inputs, same bytes, whatever the number of threads.
 * Kept for backward, in elements a token and layer, by recompute level (some layers may be a level below the others):
 *   0  4H + (nh+2nkv)hd + nh hd + 3I, and (nh+nkv)hd with q/k norms, as in 1 and 2: nothing is computed again
 *   1  2H + (nh+2nkv)hd + nh hd + 2I: norms and silu*up are
 *   2  2H + (nh+2nkv)hd + nh hd: gate and up too, one product of three of the MLP
 *   3  H: the layer, but for its last product
 */
#ifndef RT_STUDENT_MODEL_H
#define RT_STUDENT_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/mem.h"
#include "formats/rows.h"
#include "student/params.h"

struct rt_student;

/* ---- memory ---- */
/* Device memory of `bytes` as an arena; release with rt_device_arena_free (a zeroed arena is fine). */
enum rt_status rt_device_arena(const struct rt_device *d, size_t bytes, const char *name, struct rt_arena *out, struct rt_err *err);
void rt_device_arena_free(const struct rt_device *d, struct rt_arena *a);

/* One block of parameters, gradients or moments: bytes in an arena. */
size_t rt_params_bytes(const struct rt_params *p, size_t act_size);
/* Arena bytes of rt_student_create: parameters and rope tables for max_length positions. NOMEM where they exceed size_t. */
size_t rt_student_weight_bytes(const struct rt_student_config *c, const struct rt_params *p, int64_t max_length, size_t act_size);

/* Cuts parameters and rope tables from `weights`. d, c and p are borrowed for the student's life. Parameters are undefined until
 * rt_student_load, rt_student_init or rt_params_load into rt_student_block. max_length: of a document; 1 .. max_position. */
enum rt_status rt_student_create(const struct rt_device *d, const struct rt_student_config *c, const struct rt_params *p,
                                 int64_t max_length, struct rt_arena *weights, struct rt_student **out, struct rt_err *err);
void rt_student_free(struct rt_student *s); /* NULL is fine; arenas stay the caller's */
/* Cuts and zeroes a block of gradients. */
enum rt_status rt_student_attach_grads(struct rt_student *s, struct rt_arena *grads, struct rt_err *err);
enum rt_status rt_student_zero_grads(struct rt_student *s, struct rt_err *err);
/* Of embeddings, final norm and head alone. Those of the layers are undefined until a backward with `first` has written them. */
enum rt_status rt_student_zero_outer_grads(struct rt_student *s, struct rt_err *err);

const struct rt_device *rt_student_device(const struct rt_student *s);
const struct rt_student_config *rt_student_config(const struct rt_student *s);
const struct rt_params *rt_student_params(const struct rt_student *s);
int64_t rt_student_max_length(const struct rt_student *s);
void *rt_student_block(const struct rt_student *s); /* parameters, act [p->elements] */
void *rt_student_grads(const struct rt_student *s); /* gradients, likewise; NULL before attach */

/* ---- forward ---- */
struct rt_student_batch {
    const int32_t *ids;        /* [host] [n] */
    const int32_t *cu_seqlens; /* [host] [n_seq + 1], 0 first, n last, ascending */
    int64_t n, n_seq;
};
/* The batch's ids and each token's place in its document, where they lie on the device already: a forward of them waits for nothing. */
struct rt_student_sent {
    const int32_t *ids, *pos; /* [n] */
};

enum rt_student_keep {
    RT_KEEP_FINAL,  /* final states only */
    RT_KEEP_HIDDEN, /* and every hidden state */
    RT_KEEP_LAYERS, /* and backward's scratch: level 3, from here on backward may follow; gradients are the same bits at every level */
    RT_KEEP_ATTENTION, /* and what attention leaves: level 2 */
    RT_KEEP_ALL,    /* and gate and up: level 1 */
    RT_KEEP_MORE,   /* and everything that backward would compute again: level 0 */
};
/* What is kept of each layer: of the first `more` of them what the value after `keep` says (from RT_KEEP_LAYERS on), of the others what keep says. */
struct rt_student_kept {
    enum rt_student_keep keep;
    int more;
};
static inline enum rt_student_keep rt_student_recompute(int level) { return (enum rt_student_keep)(RT_KEEP_MORE - level); } /* 0 .. 3 */
static inline enum rt_student_keep rt_student_layer_keep(const struct rt_student_kept *k, int layer)
{
    return (enum rt_student_keep)(k->keep + (layer < k->more && k->keep >= RT_KEEP_LAYERS && k->keep < RT_KEEP_MORE));
}
/* Bytes of the activation arena for n tokens. */
size_t rt_student_activation_bytes(const struct rt_student_config *c, int64_t n, enum rt_student_keep keep, size_t act_size);
size_t rt_student_kept_bytes(const struct rt_student_config *c, int64_t n, const struct rt_student_kept *kept, size_t act_size);

/* Resets and cuts `acts`. The batch's ids and cu_seqlens must stay as they are until backward is done. Errors: USAGE for a batch that
 * breaks the rules above (empty or over-long document, id outside the vocabulary), NOMEM. */
enum rt_status rt_student_forward(struct rt_student *s, const struct rt_student_batch *b, enum rt_student_keep keep,
                                  struct rt_arena *acts, struct rt_err *err);
/* The same, layer by layer; sent, unless NULL, must hold the batch's, and stay as it is until backward is done. */
enum rt_status rt_student_forward_sent(struct rt_student *s, const struct rt_student_batch *b, const struct rt_student_sent *sent,
                                       const struct rt_student_kept *kept, struct rt_arena *acts, struct rt_err *err);
/* [n, H] act of the last forward. layer 0: embeddings, l: output of layer l-1 before the final norm (RT_KEEP_HIDDEN on),
 * RT_LAYER_FINAL: after the final norm. NULL where it was not kept or there is no such layer. */
const void *rt_student_hidden(const struct rt_student *s, int layer);

struct rt_student_head {
    const struct rt_weight *w; /* [V, H] */
    void *dw;                  /* its gradient, NULL before attach */
    int64_t V, H;
};
struct rt_student_head rt_student_head(const struct rt_student *s);

/* ---- backward ---- */
struct rt_student_extra {
    int layer;        /* 0 .. layers: as rt_student_hidden; for the final states add to d_final instead */
    const void *grad; /* [n, H] act, gradient of the loss at that hidden state; several for one layer add up */
};
/* Gradients += (with `first`, those of the layers =) from d_final [n, H] act (NULL: zero). After a forward with RT_KEEP_LAYERS or more, once. USAGE otherwise. */
enum rt_status rt_student_backward(struct rt_student *s, const void *d_final, const struct rt_student_extra *extra, int n_extra, bool first,
                                   struct rt_err *err);

/* fn(self, from): backward has enqueued all that it adds to gradients from element `from` of the block on; called with smaller and smaller `from`, at last
 * with 0. An error of fn is backward's. fn NULL: nobody is told. */
typedef enum rt_status (*rt_student_grads_fn)(void *self, int64_t from, struct rt_err *err);
void rt_student_watch_grads(struct rt_student *s, rt_student_grads_fn fn, void *self);

/* ---- values ---- */
/* Parameters from a model (see rt_params_load), or N(0, initializer_range) by seed. */
enum rt_status rt_student_load(struct rt_student *s, const struct rt_tensors *t, struct rt_err *err);
enum rt_status rt_student_init(struct rt_student *s, uint64_t seed, struct rt_err *err);

/* The operations that training needs of a backend, and those of generation, for rt_backend_select. */
const enum rt_op *rt_student_train_ops(int *n);
const enum rt_op *rt_student_decode_ops(int *n);

#endif
