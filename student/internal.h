/* Shared by the files of the student; not for others. */
#ifndef RT_STUDENT_INTERNAL_H
#define RT_STUDENT_INTERNAL_H

#include "student/model.h"

struct rt_student_layer {
    struct rt_weight *norm1, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *norm2, *gate_up, *gate_up_bias, *down, *down_bias;
};

/* What a layer leaves for backward. Those of RT_KEEP_LAYERS and below share one set, and these and those of RT_KEEP_ATTENTION gate_up. */
struct rt_student_saved {
    void *qkv;  /* [n, (nh+2nkv)hd] q, k, v; q and k rotated in place where there are no q/k norms */
    void *qk;   /* [n, (nh+nkv)hd] normalised and rotated q, k; NULL where they lie in qkv */
    void *o;    /* [n, nh*hd] */
    void *mid;  /* [n, H] residual after attention */
    void *gate_up; /* [n, 2I] */
    void *normed1, *normed2, *h; /* [n, H] [n, H] [n, I] of RT_KEEP_MORE; NULL: in the scratch that layers share */
    float *lse, *rstd1, *rstd2, *rstd_q, *rstd_k;
};

struct rt_student_acts {
    struct rt_student_batch batch;
    struct rt_student_kept kept;
    bool done;            /* a forward filled it and no backward used it */
    const int32_t *ids, *pos;     /* device: the caller's, or what follows */
    int32_t *own_ids, *own_pos;
    void **hidden;        /* [layers + 1] */
    struct rt_student_saved *saved; /* [layers] */
    void *final;
    float *rstd_final;
    void *gate_up;                      /* [n, 2I] of the layers that have none of their own */
    void *normed, *h;                   /* [n, H] [n, I] shared by the layers; in backward h is that of dh, too */
    void *d_normed, *dx, *d_qkv, *d_qk, *d_o;      /* backward; the gradient at gate and up takes their place */
    float *delta;
};

struct rt_student {
    const struct rt_device *d;
    const struct rt_student_config *c;
    const struct rt_params *p;
    int64_t max_length;
    char *block, *grads;
    float *cos, *sin;               /* device */
    struct rt_student_layer *layer; /* [layers] */
    struct rt_weight *embed, *final_norm, *head;
    struct rt_student_acts a;
    rt_student_grads_fn watch;      /* NULL: nobody */
    void *watcher;
    int32_t *staging;               /* [host] ids and positions on their way to the device */
    int64_t staging_cap;            /* tokens */
};

static inline int64_t rt_student_q_dim(const struct rt_student_config *c) { return (int64_t)c->heads * c->head_dim; }
static inline int64_t rt_student_kv_dim(const struct rt_student_config *c) { return (int64_t)c->kv_heads * c->head_dim; }
static inline int64_t rt_student_qkv_dim(const struct rt_student_config *c)
{
    return rt_student_q_dim(c) + 2 * rt_student_kv_dim(c);
}

static inline bool rt_student_normed_heads(const struct rt_student_layer *l) { return l->q_norm != NULL || l->k_norm != NULL; }

/* What the layer keeps for itself, or else the shared scratch. */
static inline void *rt_student_own(void *own, void *shared)
{
    return own != NULL ? own : shared;
}

/* p + elements of act; NULL stays NULL. */
static inline void *rt_student_at(const struct rt_student *s, const void *p, int64_t elements)
{
    return p == NULL ? NULL : (char *)(uintptr_t)p + (size_t)elements * rt_device_act_size(s->d);
}

/* q and k of n tokens behind the projection: norm (where the model has one) and rotation. qk NULL: in place. */
enum rt_status rt_student_rotate(const struct rt_student *s, const struct rt_student_layer *l, void *qkv, void *qk,
                                 const int32_t *pos, int64_t n, float *rstd_q, float *rstd_k, struct rt_err *err);

/* Of the last forward: attention of layer i from its normed input, into what the layer saves, mid at last; gate and up (and h, or NULL) from the normed mid. */
enum rt_status rt_student_attention(struct rt_student *s, int i, struct rt_err *err);
enum rt_status rt_student_gate_up(struct rt_student *s, int i, void *h, bool kept, struct rt_err *err);

#endif
