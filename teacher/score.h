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

struct rt_score_options {
    int top_k;                   /* 0: no entries; without boundary no rows are computed at all (features alone) */
    const uint8_t *boundary;     /* NULL, or [n_ids] 1: rows say the mass of these ids (boundary_logp) */
    int64_t n_ids;               /* ids that exist */
    int n_lse;
    double lse_temperature[RT_MAX_LSE];
    bool completion_only;
    int n_features;
    struct rt_feature_spec feature[RT_MAX_FEATURES];
    uint64_t projection_seed;

    int64_t *load;               /* NULL, or [layers, experts] += tokens routed */
    bool (*stop)(void *self);    /* asked between layers; true ends with RT_INTERRUPTED */
    void *stop_self;
    void (*progress)(void *self, int layers_done, int layers);
    void *progress_self;
    /* NULL, or called with the state after each layer: 0 embeddings, l the output of layer l-1, RT_LAYER_FINAL normalised. x is a device
     * pointer [n, hidden] act, valid during the call. */
    void (*tap)(void *self, int layer, const void *x, int64_t n);
    void *tap_self;
};

/* Scores one window: seqs [n_seqs] hold ids, loss_mask, key and the other members that describe a sequence; their row members are filled and
 * each is put into the sink, except the first `skip` ones (already there). Sum of n_tokens <= plan.window, each n_tokens in
 * [1, max_length]. sink NULL: nothing is put. NUMERIC names the layer after which a state was not finite. */
enum rt_status rt_teacher_score(struct rt_teacher *t, const struct rt_score_options *o, struct rt_rows *seqs, int64_t n_seqs, int64_t skip,
                                struct rt_row_sink *sink, struct rt_err *err);

/* Host bytes a token of the window that the outputs take: for rt_teacher_options.token_bytes. hidden: of the teacher. */
int64_t rt_score_token_bytes(const struct rt_score_options *o);

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
