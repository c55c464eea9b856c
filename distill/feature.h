/* Feature distillation: which teacher state is held against which student state, and the projectors between them.
 *
 * F = mean over pairs of  1/N sum_rows f(h_s W^T, h_t),  f: mse mean_d (a-b)^2, or cosine 1 - a.b/(|a||b|); rows are the training
 * rows of sequences that have states, N the training rows of the global batch. W [D_t, H_s] is trained with the student (AdamW, a
 * clip of its own), kept in checkpoints and never exported.
 */
#ifndef RT_DISTILL_FEATURE_H
#define RT_DISTILL_FEATURE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/mem.h"
#include "formats/checkpoint.h"
#include "formats/rows.h"
#include "student/optimizer.h"

struct rt_feature_pair {
    int teacher, student; /* hidden states: 0 embeddings, l after layer l, RT_LAYER_FINAL */
    int dim;              /* of the stored states */
};
struct rt_feature_map {
    struct rt_feature_pair pair[RT_MAX_FEATURES];
    int n;
};

/* text: "auto" or "t:s,t:s" with layers or "final"; NULL: nothing was given. auto pairs every stored state: t with round(t Ls / Lt), final with final.
 * USAGE: nothing, a layer that is not stored (names those that are), a student layer beyond student_layers, a pair twice, auto with teacher_layers 0
 * where the teacher's depth is needed. */
enum rt_status rt_feature_map_parse(const char *text, const struct rt_row_identity *id, int student_layers, int teacher_layers,
                                    struct rt_feature_map *out, struct rt_err *err);
/* The column of rows.feature for pair p in a set of this identity; -1: it has none. SHAPE where the dimension differs. */
enum rt_status rt_feature_column(const struct rt_feature_pair *p, const struct rt_row_identity *id, const char *path, int *column,
                                 struct rt_err *err);

/* Projectors: a block of parameters and one of gradients, act elements, and what AdamW keeps. */
struct rt_projectors {
    const struct rt_device *d;
    struct rt_feature_map map;
    struct rt_params table;
    struct rt_param entry[RT_MAX_FEATURES];
    int64_t H;
    char *w, *grad;
    struct rt_adamw_state state;
    struct rt_weight *weight[RT_MAX_FEATURES];
};
size_t rt_projectors_bytes(const struct rt_feature_map *map, int64_t hidden, size_t act_size, bool bf16_moments);
/* W = N(0, 1/H) by seed. map copied. */
enum rt_status rt_projectors_create(struct rt_projectors *p, const struct rt_device *d, const struct rt_feature_map *map, int64_t hidden,
                                    const struct rt_adamw *o, uint64_t seed, struct rt_arena *arena, struct rt_err *err);
void rt_projectors_free(struct rt_projectors *p); /* zeroed is fine */
enum rt_status rt_projectors_zero_grads(struct rt_projectors *p, struct rt_err *err);
/* Global norm of the gradients; 0 without projectors. */
enum rt_status rt_projectors_norm(const struct rt_projectors *p, double *norm, struct rt_err *err);
/* One AdamW step; step counts from 1. Decay and clip as o says, the clip over the projectors alone. */
enum rt_status rt_projectors_step(struct rt_projectors *p, const struct rt_adamw *o, double lr, int64_t step, double norm, struct rt_err *err);
/* projector.safetensors, projector_m.safetensors, projector_v.safetensors of a checkpoint; nothing where there are none. */
enum rt_status rt_projectors_checkpoint(const struct rt_projectors *p, struct rt_ckpt_writer *w, struct rt_err *err);
enum rt_status rt_projectors_restore(struct rt_projectors *p, const char *dir, struct rt_err *err);

#endif
