/* The parameters of a student: one block of act elements a lifetime (parameters, gradients, first and second moments), all
 * with the layout of this table.
 *
 *   - Entries carry the published names. q, k, v lie behind each other, so do gate and up: in memory they are one
 *     [(nh + 2 nkv) hd, H] and one [2I, H] matrix, and a published tensor is a run of its rows.
 *   - Groups begin at multiples of 64 elements; the gaps hold zeros and stay zero under every operation of the optimiser.
 *   - A tied head has no entry: its weight and its gradient are the embedding's.
 */
#ifndef RT_STUDENT_PARAMS_H
#define RT_STUDENT_PARAMS_H

#include <stdint.h>

#include "core/backend.h"
#include "core/log.h"
#include "formats/safetensors.h"
#include "student/config.h"

enum rt_param_kind { RT_PARAM_EMBED, RT_PARAM_HEAD, RT_PARAM_MATRIX, RT_PARAM_NORM, RT_PARAM_BIAS };

struct rt_param {
    char name[80];
    enum rt_param_kind kind;
    int layer;          /* -1: none */
    int64_t rows, cols; /* a vector has rows 1 and is stored as [cols] */
    int64_t offset;     /* elements from the start of a block */
};

/* Offsets in elements of what a layer multiplies with; -1: the model has none. */
struct rt_param_layer {
    int64_t norm1, qkv, qkv_bias, q_norm, k_norm, o, o_bias, norm2, gate_up, gate_up_bias, down, down_bias;
};

struct rt_params {
    struct rt_param *at;          /* [n] by offset */
    int n;
    struct rt_param_layer *layer; /* [layers] */
    int64_t embed, final_norm, head; /* offsets; head == embed where tied */
    int64_t elements;             /* of a block, gaps included */
    int64_t count;                /* of parameters */
    int64_t matmul;               /* parameters that a token is multiplied with: matrices, head (tied or not), biases of neither */
};

enum rt_status rt_params_create(const struct rt_student_config *c, struct rt_params *out, struct rt_err *err);
void rt_params_free(struct rt_params *p); /* zeroed is fine */
const struct rt_param *rt_params_find(const struct rt_params *p, const char *name); /* NULL where absent */
static inline int64_t rt_param_elements(const struct rt_param *p) { return p->rows * p->cols; }
/* The published form of entry i: name, shape. */
struct rt_tensor_decl rt_param_decl(const struct rt_param *p, enum rt_dtype dtype);

/* ---- a block in device memory ---- */
/* block[p] = src, converted to act; dst = elements first .. first+n of p as float. Both wait. */
enum rt_status rt_param_upload(const struct rt_device *d, void *block, const struct rt_param *p, int64_t first, int64_t n,
                               const float *src, struct rt_err *err);
enum rt_status rt_param_download(const struct rt_device *d, const void *block, const struct rt_param *p, int64_t first, int64_t n,
                                 float *dst, struct rt_err *err);

/* What one rank keeps of a block that several share (ZeRO stage 1). The block is cut into buckets, [start[b], start[b + 1]), and each bucket into a part a
 * rank (rt_comm_shard), so that a bucket is summed or gathered as soon as it is ready, whatever else is still computed. A rank keeps its parts behind
 * each other. Buckets begin at multiples of 64 x size: all parts of a bucket but the last one's are of one length. */
enum { RT_PARAM_BUCKETS = 96 };
struct rt_param_shard {
    struct rt_comm *comm; /* NULL: one rank, which holds all */
    int rank, size, n_buckets;
    int64_t n;            /* elements that this rank holds */
    int64_t start[RT_PARAM_BUCKETS + 1];
};
/* bucket: elements that a bucket should have at least (more where there would be too many of them); 0: one bucket. It ends where a layer begins, give or
 * take the rounding, and layers are taken together from the last one back, which is the order in which backward leaves them. */
struct rt_param_shard rt_param_shard(const struct rt_params *p, struct rt_comm *comm, int64_t bucket);
/* The same as another rank of `size` would have it, for plans. */
struct rt_param_shard rt_param_shard_of(const struct rt_params *p, int rank, int size, int64_t bucket);
/* Elements [first, first + n) of the block are the part of bucket b that rank r keeps, from element `at` of what it keeps on. */
struct rt_param_part {
    int64_t first, n, at;
};
struct rt_param_part rt_param_part(const struct rt_param_shard *s, int r, int b);

/* A block in device memory with the layout of a table: elements of dtype (F32, F64, BF16). low: NULL, or int16 that make BF16 elements exactly float32
 * (core/backend.h, adamw). Where several ranks share it, low holds this rank's parts alone, and so does data unless it is `whole`; what reads or writes
 * the block is then called by every rank. */
struct rt_param_block {
    void *data, *low;
    enum rt_dtype dtype;
    struct rt_param_shard shard;
    bool whole;
};
/* A block of act elements. */
static inline struct rt_param_block rt_param_block(const struct rt_device *d, const void *data)
{
    return (struct rt_param_block){.data = (void *)(uintptr_t)data, .dtype = d->be->act};
}

/* block = every entry read from t (F32, F16 or BF16). FORMAT where one is missing, SHAPE where dtype or shape differ. The
 * gaps are zeroed. */
enum rt_status rt_params_load(const struct rt_params *p, const struct rt_device *d, struct rt_param_block block, const struct rt_tensors *t,
                              struct rt_err *err);
/* block = N(0, initializer_range), rounded to BF16, for matrices, 1 for norms, 0 for biases. An element depends on (seed, name, index) alone: every
 * backend begins with the same student. */
enum rt_status rt_params_init(const struct rt_params *p, const struct rt_device *d, void *block, double initializer_range,
                              uint64_t seed, struct rt_err *err);

/* Hands each entry's bytes, in order and in pieces, as dtype (F32, F16, BF16) to put. Of a sharded block rank 0 alone is handed anything (the others'
 * put is not called and may be NULL). */
typedef enum rt_status (*rt_param_put_fn)(void *ctx, const void *data, uint64_t bytes, struct rt_err *err);
enum rt_status rt_params_put(const struct rt_params *p, const struct rt_device *d, struct rt_param_block block, enum rt_dtype dtype,
                             rt_param_put_fn put, void *ctx, struct rt_err *err);
/* decl[p->n], in order. Free with rt_free. */
enum rt_status rt_params_decl(const struct rt_params *p, enum rt_dtype dtype, struct rt_tensor_decl **decl, struct rt_err *err);

/* Holds the files of a published model against its config, before anything is allocated for it: every tensor is there with its
 * shape (else FORMAT, SHAPE). With tie_missing_head an untied config without lm_head.weight becomes tied (without it: FORMAT);
 * a tied one whose head differs from the embedding warns. Tensors that the model does not know are named in one warning
 * (rotary_emb.inv_freq excepted). log may be NULL. */
enum rt_status rt_params_check_model(struct rt_student_config *c, const struct rt_tensors *t, bool tie_missing_head,
                                     struct rt_log *log, struct rt_err *err);

#endif
