/* Teacher-forced scoring, layer-major: a window of whole sequences goes through a layer before the next layer's weights arrive, so
 * that the weights are read once a window. Rows leave through a sink, in input order; hidden states of chosen layers in the same pass.
 */
#ifndef RT_TEACHER_SCORE_H
#define RT_TEACHER_SCORE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "formats/rows.h"
#include "teacher/teacher.h"

/* Where a window's state is kept while it is under way, so that a restart goes on behind its last complete layer. */
struct rt_score_keep {
    const char *dir;             /* of this window alone; made when first needed. NULL: nothing is kept */
    int64_t window;              /* the window's number, from 0 */
    double every;                /* seconds of work after which the end of a layer saves; 0: each layer does; INFINITY: only a stop does. Saves that
                                  * take more than a fiftieth of that time come more seldom */
    bool spill;                  /* features leave for files in dir as they are taken, instead of staying in memory */
    void (*note)(void *self, const char *text); /* NULL, or told what a person should know: where it goes on, what could not be used or saved */
    void *note_self;
};

struct rt_score_options {
    int top_k;                   /* 0: no entries; without boundary and temperatures the head is not computed either (a tap alone) */
    const uint8_t *boundary;     /* NULL, or [n_ids] 1: rows say the mass of these ids (boundary_logp) */
    int64_t n_ids;               /* ids that exist */
    int n_lse;
    double lse_temperature[RT_MAX_LSE];
    bool completion_only;
    int n_features;
    struct rt_feature_spec feature[RT_MAX_FEATURES];
    uint64_t projection_seed;
    const float *projection[RT_MAX_FEATURES]; /* NULL: made for the call; or rt_projection_matrix of the feature, for many calls */
    struct rt_score_keep keep;

    int64_t *load;               /* NULL, or [layers, experts] += tokens routed */
    bool (*stop)(void *self);    /* asked between layers; true saves where keep says so, and ends with RT_INTERRUPTED */
    void *stop_self;
    void (*progress)(void *self, int layers_done, int layers);
    void *progress_self;
    /* NULL, or called with the state after each layer: 0 embeddings, l the output of layer l-1, RT_LAYER_FINAL normalised. x is a device
     * pointer [n, hidden] act, valid during the call. Layers behind a saved state are not shown again. */
    void (*tap)(void *self, int layer, const void *x, int64_t n);
    void *tap_self;
};

/* Scores one window: seqs [n_seqs] hold ids, loss_mask, key and the other members that describe a sequence; their row members are filled
 * and each is put into the sink, except the first `skip` ones (already there); by put_all where the sink has it. Sum of n_tokens <= plan.window, each n_tokens in
 * [1, max_length]. sink NULL: nothing is put. NUMERIC names the layer after which a state was not finite, and the damaged tensor.
 *
 * With keep.dir: goes on from the state there, if it is this window's own and whole, with the same bytes as without a stop. After an error
 * the state that was saved last stays; after success the caller removes it (rt_score_drop) once the rows are safe. A sink that answers
 * INTERRUPTED is a stop: the state after the last layer is saved. */
enum rt_status rt_teacher_score(struct rt_teacher *t, const struct rt_score_options *o, struct rt_rows *seqs, int64_t n_seqs, int64_t skip,
                                struct rt_row_sink *sink, struct rt_err *err);

/* rt_teacher_score in two halves, so that a window's rows can be put, by another thread, while the teacher goes through the next window.
 *
 * rt_teacher_score_window: the first half; *out holds the rows in host memory (rt_score_token_bytes a token). seqs and what they hold, o's boundary,
 * projections and keep.dir are borrowed until rt_scored_free. Errors as above; then *out is untouched.
 * rt_scored_put: the second half, by any thread, once. The device is not used. keep.dir stays.
 * rt_scored_stop: instead of putting, before another window begins on the teacher and by a thread that may use the device: saves the state after the
 * last layer where keep says so; always INTERRUPTED, with the text for people. */
struct rt_scored;
enum rt_status rt_teacher_score_window(struct rt_teacher *t, const struct rt_score_options *o, struct rt_rows *seqs, int64_t n_seqs,
                                       struct rt_scored **out, struct rt_err *err);
enum rt_status rt_scored_put(struct rt_scored *w, int64_t skip, struct rt_row_sink *sink, struct rt_err *err);
enum rt_status rt_scored_stop(struct rt_scored *w, struct rt_err *err);
void rt_scored_free(struct rt_scored *w); /* NULL is fine */

/* What passes have read of the checkpoint so far, in how many seconds (rt_weights_read_seconds), and those for which there was nothing to do but to wait
 * for that. */
void rt_score_reading(const struct rt_teacher *t, uint64_t *bytes, double *seconds, double *waited);

/* Layers behind the state that dir holds, by its header alone; 0: none. */
int rt_score_saved_layer(const char *dir);
/* Removes dir and what was kept in it; nothing where there is no dir. */
enum rt_status rt_score_drop(const char *dir, struct rt_err *err);
/* Bytes on disk that keeping a window of n tokens takes at most: the state twice (the one before stays until the next is whole), and the
 * features. */
uint64_t rt_score_keep_bytes(const struct rt_score_options *o, const struct rt_teacher_config *c, size_t act_size, int64_t n);

/* Host bytes a token of the window that the outputs take: for rt_teacher_options.token_bytes. And those that keeping and features take
 * whatever the window is, for sequences up to `longest`: not to be planned with. far: the device has memory of its own. */
int64_t rt_score_token_bytes(const struct rt_score_options *o);
uint64_t rt_score_fixed_bytes(const struct rt_score_options *o, const struct rt_teacher_config *c, int64_t longest, bool far);

/* out [dim, H] float32: orthonormal rows, a function of (seed, layer, dim, H) alone: Gram-Schmidt, twice, over normal draws. */
enum rt_status rt_projection_matrix(uint64_t seed, int layer, int64_t dim, int64_t H, float *out, struct rt_err *err);

/* Logits [n, vocab_size] float32 [host] of normalised states x [n, H] device (mtp_layer >= 0: through that MTP layer's head). Runs its own
 * pass over the head's weights. */
enum rt_status rt_teacher_logits(struct rt_teacher *t, int mtp_layer, const void *x, int64_t n, float *out, struct rt_err *err);

/* One layer alone over one sequence [n, H] act device, in place, positions from 0. For checks against references. */
enum rt_status rt_teacher_run_layer(struct rt_teacher *t, int layer, void *x, int64_t n, struct rt_err *err);

/* logits [n-1, vocab_size] float32 [host] of the first MTP layer: row i predicts token i+2 from `final` [n, H] act device, the main model's
 * normalised state, and token i+1 (DeepSeek-V3 report 2.2; embedding first in the concatenation, as published checkpoints have it).
 * The teacher was opened with mtp. */
enum rt_status rt_teacher_mtp_logits(struct rt_teacher *t, const uint32_t *ids, const void *final, int64_t n, float *out, struct rt_err *err);

#endif
