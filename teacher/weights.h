/* The teacher's weights as parts, streamed in the order of a pass or kept.
 *
 * A part is what is needed at one time: the attention of a layer, its dense MLP, its router with the shared expert, one routed expert,
 * the head, an MTP layer's own matrices. Checkpoint names, shapes and types are checked once, at open, for all parts; a weight and
 * its scale may lie in different files, in any order.
 *
 * A pass hands parts out in the order in which they were asked for. Parts that fit into the budget stay in memory for later passes
 * (the first ones of a pass that fit); the others are read ahead into a ring of bytes, whose size bounds memory whatever the size
 * of the checkpoint. A device with memory of its own has a budget of its own: parts stay there or pass through a ring there, and what
 * is left of the host's budget keeps bytes for the passes to come.
 */
#ifndef RT_TEACHER_WEIGHTS_H
#define RT_TEACHER_WEIGHTS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/status.h"
#include "formats/safetensors.h"
#include "teacher/config.h"

enum rt_part_kind { RT_PART_ATTN, RT_PART_DENSE, RT_PART_ROUTER, RT_PART_EXPERT, RT_PART_HEAD, RT_PART_MTP };

/* Weights of a part, by kind. Absent ones are NULL. */
enum {
    RT_W_INPUT_NORM, RT_W_Q_A, RT_W_Q_A_NORM, RT_W_Q_B, RT_W_KV_A, RT_W_KV_A_NORM, RT_W_KV_B, RT_W_O, RT_W_POST_NORM, /* ATTN; q_proj is Q_B */
    RT_W_GATE = 0, RT_W_UP, RT_W_DOWN,              /* DENSE, EXPERT, and the shared expert of ROUTER */
    RT_W_ROUTER, RT_W_BIAS,                         /* ROUTER */
    RT_W_NORM = 0, RT_W_HEAD,                       /* HEAD */
    RT_W_ENORM = 0, RT_W_HNORM, RT_W_EH_PROJ, RT_W_MTP_NORM, RT_W_MTP_HEAD, /* MTP */
    RT_PART_WEIGHTS = 9,
};

struct rt_part_id {
    enum rt_part_kind kind;
    int layer;  /* MTP layer i is layers + i */
    int expert; /* EXPERT only */
};

struct rt_part {
    struct rt_part_id id;
    struct rt_weight *w[RT_PART_WEIGHTS];
    bool fp8[RT_PART_WEIGHTS]; /* stored as e4m3: its products may take e4m3 activations */
    size_t bytes;              /* bytes held, as stored */
    bool resident;
    void *block;               /* where they lie, in device memory; each tensor at a multiple of 64 */
};

struct rt_weights_options {
    const char *dir;
    const struct rt_teacher_config *config;
    const struct rt_device *device;
    bool resident;   /* the parts are used many times (generation): ask the backend for faster copies */
    bool mtp;        /* check and offer the MTP layers' parts */
    int threads;     /* that read; 0: 8 for a device with memory of its own, else 1 */
    struct rt_weights *with; /* NULL, or the same checkpoint for another device: files are read once for both, where these have memory of their own.
                              * Freed after this one */
};
enum { RT_WEIGHTS_MAX_THREADS = 32 };

struct rt_weights_budget {
    uint64_t host;           /* of devices that share a reader: each adds its own */
    uint64_t device, ring; /* devices with memory of their own: bytes for parts there, and how many of them make the ring (0: chosen) */
};

struct rt_weights;
/* Reads headers only. FORMAT or SHAPE names the tensor. */
enum rt_status rt_weights_open(const struct rt_weights_options *o, struct rt_weights **out, struct rt_err *err);
/* Memory for parts, rings included; once, before the first pass. NOMEM where it does not hold the largest part, with the numbers. */
enum rt_status rt_weights_set_budget(struct rt_weights *w, const struct rt_weights_budget *budget, struct rt_err *err);
/* Host bytes that reading into this device takes at least, where it has memory of its own (0 for others). */
uint64_t rt_weights_staging(const struct rt_weights *w);
void rt_weights_free(struct rt_weights *w); /* NULL is fine */

/* Identity of the checkpoint (rt_tensors_sha256), and its tensors. */
const struct rt_tensors *rt_weights_tensors(const struct rt_weights *w);
/* Bytes on disk of all parts of the main model, of the largest part, and how many bytes passes have read so far. */
uint64_t rt_weights_model_bytes(const struct rt_weights *w);
uint64_t rt_weights_model_room(const struct rt_weights *w); /* in host memory beside a device with memory of its own */
uint64_t rt_weights_largest_part(const struct rt_weights *w);
uint64_t rt_weights_largest_expert(const struct rt_weights *w); /* 0: there are none */
uint64_t rt_weights_bytes_read(const struct rt_weights *w);
/* Seconds of ended passes from their beginning to their last bytes out of a file. */
double rt_weights_read_seconds(const struct rt_weights *w);
/* Seconds for which the device had nothing to do but to wait for weights. */
double rt_weights_waited(const struct rt_weights *w);

/* Bytes of parts that may be held at once, beyond one, without a pass coming to a stop. */
uint64_t rt_weights_group_limit(const struct rt_weights *w);

/* Starts a pass over n parts (copied). One pass at a time. */
enum rt_status rt_weights_begin(struct rt_weights *w, const struct rt_part_id *parts, int64_t n, struct rt_err *err);
/* The next part of the pass; valid until it is released. Parts are released in the order in which they came. */
enum rt_status rt_weights_next(struct rt_weights *w, const struct rt_part **out, struct rt_err *err);
enum rt_status rt_weights_release(struct rt_weights *w, const struct rt_part *part, struct rt_err *err);
/* Of devices that share a reader: a pass will begin soon, and what others read until then is to be there for it; or none will after all. */
void rt_weights_expect(struct rt_weights *w, bool expected);
/* Ends a pass, also an unfinished one. Without a pass: does nothing. */
void rt_weights_end(struct rt_weights *w);

/* out [n, hidden] of type `act` (F32, F64, BF16) [host] = embedding rows of the ids, read from the checkpoint (layer < 0) or from MTP layer
 * `layer`'s copy. Any number of threads may call it. */
enum rt_status rt_weights_embed(const struct rt_weights *w, int layer, const uint32_t *ids, int64_t n, enum rt_dtype act, void *out,
                                struct rt_err *err);

/* Appends the parts of layer `layer` in the order in which rt_layer_forward asks for them: returns how many; parts may be NULL. */
int64_t rt_weights_layer_parts(const struct rt_teacher_config *c, int layer, struct rt_part_id *parts);

#endif
