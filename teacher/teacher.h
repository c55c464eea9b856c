/* The teacher: a checkpoint directory opened for scoring (whole sequences, layer-major) or for generation (batched steps).
 *
 * Memory: options.memory bounds everything that a teacher takes on the host; on backends whose device is the host (ref, cpu) this
 * includes activations. rt_teacher_open plans it and refuses what cannot fit, with the numbers.
 */
#ifndef RT_TEACHER_TEACHER_H
#define RT_TEACHER_TEACHER_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/pool.h"
#include "core/status.h"
#include "teacher/config.h"
#include "teacher/layer.h"
#include "teacher/weights.h"

/* What the process takes beside a teacher's own buffers, counted in every plan: the program, encoders; and for each thread of a device that is the host
 * scratch and OpenBLAS's buffer. */
#define RT_TEACHER_PROCESS_BYTES ((uint64_t)48 << 20)
#define RT_TEACHER_THREAD_BYTES ((uint64_t)8 << 20)
#define RT_TEACHER_FIXED_BYTES (RT_TEACHER_PROCESS_BYTES + 2 * RT_TEACHER_THREAD_BYTES) /* with two threads */
#define RT_TEACHER_DRIVER_BYTES ((uint64_t)256 << 20) /* of a device with memory of its own: the process and what the driver and libraries hold in it */
enum { RT_TEACHER_EMBED_IDS = 1 << 16 }; /* ids that go up at a time where the embedding table is on the device */

struct rt_teacher_options {
    const char *dir;
    const struct rt_device *device;
    bool w8a8;             /* else w8a16 */
    int64_t memory;        /* bytes of host memory */
    int64_t gpu_memory;    /* bytes of a device that has memory of its own; 0: what is free */
    int threads;           /* of a device that is the host, for the plan; 0: two */
    int readers;           /* threads that read weights; 0: 8 for a device with memory of its own, else 1 */
    struct rt_teacher *with; /* NULL, or a teacher of the same options on another device with memory of its own: files are read once for both. Closed after
                            * this one */
    int devices;           /* that share files so, for the plan; 0: one. memory is this one's share */
    int64_t gpu_ring;      /* there: bytes of the ring through which weights pass; 0: planned. As much as there is: nothing stays */
    int64_t max_length;    /* longest sequence, in tokens; at most the model's maximum */
    int64_t window;        /* scoring: tokens of a window; 0: planned from memory and data_tokens */
    int64_t chunk;         /* scoring: tokens that the attention buffers hold; 0: planned. A resume gives both as they were */
    int64_t data_tokens;   /* scoring: how many there are, 0: unknown */
    int64_t token_bytes;   /* scoring: further host bytes a token of the window that the caller's outputs take */
    int64_t slots;         /* generation: sequences at a time; 0: a teacher for scoring */
    int64_t batch_tokens;  /* generation: most tokens of one step */
    bool mtp;
};

struct rt_teacher_plan {
    int64_t window, chunk;         /* tokens */
    uint64_t window_bytes, cache_bytes, weight_budget, model_bytes, largest_part;
    bool resident;                 /* all weights stay in memory after the first pass */
    /* Devices with memory of their own, else 0: gpu_bytes in all = states and outputs on the way + scratch of operations + parts. Then
     * window_bytes and weight_budget are the host's: outputs of the window, and staging and bytes kept for later windows. */
    uint64_t gpu_bytes, gpu_state, gpu_scratch, gpu_ring, gpu_weight_budget, gpu_embed; /* gpu_embed: of the embedding table, or 0 */
    bool gpu_resident;             /* all weights stay on the device */
};

/* Read by the files of teacher/; others use the functions. */
struct rt_teacher {
    struct rt_teacher_options o;
    struct rt_teacher_config c;
    struct rt_teacher_plan plan;
    struct rt_weights *w;
    struct rt_layer_ctx ctx;
    void *block;                   /* one device block: rope tables, layer buffers, states */
    struct rt_arena arena;
    void *hidden, *cache;          /* [window, H]; generation: [layers][slots][capacity][kv_lora + dr] */
    int32_t *position, *slot;      /* device [window] */
    struct rt_pool *pool;          /* reads embeddings where the device is not the host; or NULL */
    void *embed_block;             /* the embedding table on the device, once it was needed, and ids behind it */
    struct rt_weight *embed_table;
    struct rt_feature_way *way;    /* by which states leave for features, once some did; or NULL */
    struct rt_part_id *pass;       /* [host] the parts of one pass over all layers and the head */
    int64_t n_pass;
};

/* Errors of the configuration, the checkpoint (names tensor), of memory (with the numbers). *out is freed with rt_teacher_close. */
enum rt_status rt_teacher_open(const struct rt_teacher_options *o, struct rt_teacher **out, struct rt_err *err);
void rt_teacher_close(struct rt_teacher *t); /* NULL is fine */
/* What a plan needs to know of a checkpoint: its headers are read once, then any number of plans is made from them. */
struct rt_teacher_sizes {
    struct rt_teacher_config config;
    uint64_t largest_part, largest_expert, model_bytes, model_room, staging; /* model_room: as rt_weights_model_room */
};
enum rt_status rt_teacher_measure(const struct rt_teacher_options *o, struct rt_teacher_sizes *out, struct rt_err *err);
enum rt_status rt_teacher_plan_sizes(const struct rt_teacher_options *o, const struct rt_teacher_sizes *sizes, struct rt_teacher_plan *out,
                                     struct rt_err *err);
/* Device bytes of everything but weights for a window of n tokens. */
uint64_t rt_teacher_state_bytes(const struct rt_teacher_options *o, const struct rt_teacher_config *c, int64_t chunk, int64_t n);
/* Both: what open would plan. */
enum rt_status rt_teacher_plan_memory(const struct rt_teacher_options *o, struct rt_teacher_plan *out, struct rt_err *err);

/* As rt_weights_expect. */
void rt_teacher_expect(struct rt_teacher *t, bool expected);
const struct rt_teacher_config *rt_teacher_config(const struct rt_teacher *t);
const struct rt_teacher_plan *rt_teacher_plan(const struct rt_teacher *t);
/* 64 hexadecimal digits: identity of the checkpoint. */
const char *rt_teacher_sha256(const struct rt_teacher *t);

/* Copies embeddings of ids [n] to device rows x [n, H] act. layer -1: the model's, else MTP layer `layer`'s. teacher/embed.c: from a table on the
 * device where the plan has room for it (read at the first call), else row by row from the files. */
void rt_teacher_embed_free(struct rt_teacher *t);
enum rt_status rt_teacher_embed(struct rt_teacher *t, int layer, const uint32_t *ids, int64_t n, void *x, struct rt_err *err);

/* Which operations scoring and generation need, for rt_backend_select. */
const enum rt_op *rt_teacher_score_ops(int *n);
const enum rt_op *rt_teacher_decode_ops(int *n);

#endif
