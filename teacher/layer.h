/* One decoder layer of the teacher over many tokens: MLA attention and MLP or mixture of experts, added to the residual stream.
 *
 *   x += o_proj(attention(norm(x)));  x += ffn(norm(x))         (DeepSeek-V2 report 2.1, DeepSeek-V3 report 2.1)
 *
 * Attention is naive over packed sequences (scoring: fewer operations) or absorbed over a compressed cache (generation: fewer
 * bytes). Parts of the weights are taken from a pass in the order of rt_weights_layer_parts.
 */
#ifndef RT_TEACHER_LAYER_H
#define RT_TEACHER_LAYER_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/mem.h"
#include "core/status.h"
#include "teacher/config.h"
#include "teacher/weights.h"

/* What all layers share. Borrowed by calls; buffers lie in one device block. */
struct rt_layer_ctx {
    const struct rt_teacher_config *c;
    const struct rt_device *d;
    struct rt_weights *w;
    bool w8a8;                  /* products with e4m3 weights take e4m3 activations */
    const float *rope_cos, *rope_sin; /* device [max positions, dr/2] */
    float attn_scale;
    int64_t chunk, window;      /* tokens that the attention and the FFN buffers hold */

    void *xn, *qa, *qan, *q, *ckv, *latent, *kv, *o, *q_lat, *o_lat; /* [chunk, ...] */
    struct rt_act xq, qaq, latq, oq;
    void *fx;                   /* [window, H] normed input of the FFN */
    struct rt_act fxq;
    int32_t *route_ids, *perm;  /* [window, top_k], [window * top_k] */
    float *route_weight;
    int32_t *offset;            /* [host] [experts + 1] */
    int64_t *load;              /* [host] [layers, experts] += tokens routed to each; NULL: not counted */
    const struct rt_part **held;/* [host] [experts] */
    const struct rt_weight **wg, **wu, **wd; /* [host] [experts] */
};

/* Device bytes of the buffers for these sizes (cached: the absorbed path's, else the naive path's). */
size_t rt_layer_bytes(const struct rt_teacher_config *c, const struct rt_device *d, bool w8a8, bool cached, int64_t chunk, int64_t window);
/* Cuts the buffers from a device arena and takes the host arrays; rt_layer_release frees those. */
enum rt_status rt_layer_init(struct rt_layer_ctx *ctx, struct rt_arena *device_arena, bool cached, struct rt_err *err);
void rt_layer_release(struct rt_layer_ctx *ctx);

/* The tokens of a call. */
struct rt_layer_batch {
    int64_t n;
    const int32_t *position;    /* device [n] */
    /* packed sequences */
    const int32_t *cu_seqlens;  /* [host] [n_seq + 1]; each sequence at most ctx->chunk tokens */
    int64_t n_seq;
    /* cached: token i belongs to slot[i]; cache is this layer's, rows of kv_lora + dr, `capacity` a slot; n <= ctx->chunk */
    bool cached;
    const int32_t *slot;        /* device [n] */
    void *cache;
    int64_t capacity;
};

/* x [n, H] act, in place. Errors name the layer. */
enum rt_status rt_layer_forward(struct rt_layer_ctx *ctx, int layer, const struct rt_layer_batch *b, void *x, struct rt_err *err);

#endif
