/* The backend table: every operation that the engines call, in three instances.
 *
 *   ref    plain loops in fixed order: the specification. Also built with double as element type ("ref64") for finite
 *          differences: same source, act == RT_F64.
 *   cpu    OpenBLAS and SIMD, tiles cut from shapes alone.
 *   cuda   its own files; absent from builds without it.
 *
 * Conventions, for all operations:
 *   - Memory is the backend's: pointers come from be->alloc (or an arena over such a block) and are never dereferenced by an
 *     engine; bytes cross by upload and download. Arrays marked [host] are ordinary memory of the caller.
 *   - "act" is the element type of activations, parameters and gradients, be->act: F32 for ref and cpu, BF16 for cuda.
 *     Matrices are row-major; ld* is the distance of rows in elements, 0 meaning dense.
 *   - Every call is ordered on its queue. An error leaves outputs unspecified. Results depend on shapes and inputs alone,
 *     never on the number of threads. Inputs and outputs do not overlap unless an entry says "in place".
 *   - `=` overwrites, `+=` accumulates; each output says which.
 *   - Ids, labels, positions, slots and indices are the caller's to check: they come from files. ref answers SHAPE for those that
 *     it can see are outside, cpu may, cuda does not.
 *   - An entry that a backend lacks is NULL; RT_OP answers with an error that names it, never with a fallback.
 * Symbols: n tokens (rows), H hidden_size, I intermediate, E experts, k top-k, nh/nkv heads, T temperature.
 */
#ifndef RT_CORE_BACKEND_H
#define RT_CORE_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/dtype.h"
#include "core/sampler.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_dev;    /* device context of a backend */
struct rt_comm;   /* core/collective.h */
struct rt_queue;  /* order of execution */
struct rt_event;
struct rt_graph;  /* recorded work */
struct rt_weight; /* a matrix or vector prepared for use as weight; what it holds is the backend's business */

/* A matrix as operand of a product: act elements (scale NULL), or e4m3 codes [rows, cols] with one scale for each run of 128
 * columns, scale[cols/128][rows] (column block major; rows is the n of the call that made it, and of the call that reads it):
 * value = code * scale. pow2 of what makes it: scales are powers of two (quant). cuda puts its rows of scales rt_act_rows(n) apart and may write codes and scales of the rows added: owners make room
 * for rt_act_rows(n) rows of both. Made by quant, norm_fwd, swiglu_fwd, attn_fwd. A product takes it with E4M3 weights only (else UNSUPPORTED); an act operand
 * takes any weight, E4M3 ones dequantised (float32 product of code and scale). */
struct rt_act {
    void *data;
    float *scale;
};
static inline int64_t rt_act_rows(int64_t n)
{
    return (n + 3) / 4 * 4;
}

/* ---- weights ---- */
struct rt_weight_src {
    const char *name;         /* for messages */
    enum rt_dtype dtype;      /* F32, F16, BF16, E4M3 */
    int64_t rows, cols;       /* [out, in]; a vector has rows 1 */
    const void *data;         /* [host] */
    const float *scale_inv;   /* [host] [ceil(rows/128), ceil(cols/128)] for E4M3, multiplied; required there, else NULL */
    bool resident;            /* used many times: a faster, larger copy pays */
    /* NULL, or where the same bytes lie in device memory already (own_memory backends): borrowed instead of data and scale_inv */
    const void *device_data;
    const float *device_scale;
};

struct rt_dev_options {
    int threads;              /* 0: all */
    int index;                /* which GPU */
    struct rt_comm *comm;     /* NULL: this process is alone; else the ranks that the collectives run over, borrowed until close */
};
struct rt_dev_memory {
    uint64_t free, total;     /* bytes of device memory now */
    uint64_t held;            /* what a process takes there beside its allocations, about: context, the libraries' kernels */
};

/* ---- forward, shared ---- */
/* out[i,:] = table[ids[i],:]; an id below 0 stands for drawn[-1 - id] (drawn NULL: there is none). */
struct rt_embed_fwd_args { const int32_t *ids; const struct rt_weight *table; void *out; int64_t n, cols; const int32_t *drawn; };

/* s = x (+ add); y = s / rms * w, rms = sqrt(mean(s^2) + eps), rstd = 1/rms. Where act is F32 these bits are fixed, because e4m3
 * codes depend on them (core/rms.h): rms = rt_rms_f32, and y is rounded after the division and again after the product. Outputs,
 * each may be NULL: sum = s (may alias x or add), y = (may be x with ldy == ldx), yq = the e4m3 form of y, rstd [n] float. w NULL:
 * all ones. add and sum are dense (so ldx is dense where sum is x). */
struct rt_norm_fwd_args {
    const void *x, *add; const struct rt_weight *w; void *sum, *y; struct rt_act yq; float *rstd;
    int64_t n, cols, ldx, ldy; float eps; bool pow2; /* of yq */
};

/* q = e4m3 form of x, 1x128: s = max(amax, 1e-12)/448 (float32), with pow2 the least power of two that is not below it (ue8m0 of DeepSeek-V3.1);
 * code = rne(x/s). cols % 128 == 0. */
struct rt_quant_args { const void *x; struct rt_act q; int64_t n, cols, ldx; bool pow2; };

/* y = x w^T (+ bias) (+ add), or += with accumulate. x [n, K] dense, or ldx for act elements; w [N, K]; y [n, N] act, or float32 with y_f32.
 * x.scale given: the product of 128-column blocks is (code sum) * x scale * weight scale, summed in float32.
 * With accumulate the bias is added as well. add [n, N] act, dense; not with accumulate, y_f32 or ldy.
 * row_exact: row i depends on row i of x alone, bit for bit, whatever n is (generation needs it). cuda keeps this where its kernels for few rows
 * take the call, and otherwise for equal n: there the same batch plan gives the same text. Such a weight may be read before what was enqueued just
 * before the call has ended: no operation writes to it shortly before. */
struct rt_linear_fwd_args {
    struct rt_act x; int64_t ldx; const struct rt_weight *w, *bias; const void *add; void *y; int64_t ldy;
    int64_t n, K, N; bool accumulate, y_f32, row_exact;
};

/* In place: rotates `dim` elements of each head by angle position * frequency, from the table cos/sin [max_pos, dim/2] float.
 * interleaved: pairs (2i, 2i+1); else (i, i + dim/2). inverse: by -angle. x points at the first rotated element. */
struct rt_rope_args {
    void *x; int64_t ld, head_ld; const float *cos, *sin; const int32_t *position; int64_t n; int heads, dim; bool interleaved, inverse;
};

/* Attention over packed sequences, block-diagonal and causal: o = softmax(scale q k^T) v. Sequence s is rows cu_seqlens[s] ..
 * cu_seqlens[s+1], from 0 to n without gaps; an empty one is fine. q [n, nh, dqk], k [n, nkv, dqk], v [n, nkv, dv] with token and
 * head strides; query head h uses key head h / (nh/nkv). o [n, nh*dv] dense =. lse [nh, n] float = log sum exp of the scaled
 * scores, or NULL.
 * k_pe: NULL, or the last dr elements of every key, the same for all heads: rows [n, dr] at distance k_pe_ld; k then holds the first dqk - dr of
 * each head (MLA; V2 report, 2.1.3).
 * cos: NULL, or the last dr elements of every query are rotated first, as rope does it (interleaved); q is then scratch too.
 * oq: {NULL}, or = the e4m3 form of o (rounded to act first), nh*dv % 128 == 0; o is then scratch, whose content is unspecified. */
struct rt_attn_shape {
    const int32_t *cu_seqlens; /* [host] [n_seq + 1] */
    int64_t n, n_seq; int nh, nkv, dqk, dv; float scale;
};
struct rt_attn_fwd_args {
    struct rt_attn_shape s;
    const void *q, *k, *v; int64_t q_ld, q_head, k_ld, k_head, v_ld, v_head; void *o; float *lse;
    const void *k_pe; int64_t k_pe_ld; int dr; const float *cos, *sin; const int32_t *position; struct rt_act oq; bool pow2; /* pow2: of oq */
};

/* h = silu(gate) * up; gate and up are [n, I] with row distance ld (both halves of one [n, 2I], or two matrices). h [n, I] dense = or
 * NULL, hq its e4m3 form or {NULL}. */
struct rt_swiglu_fwd_args { const void *gate, *up; int64_t ld; void *h; struct rt_act hq; int64_t n, I; bool pow2; };

/* ---- teacher ---- */
/* Router, in float32: z = x w^T; score = sigmoid(z) or softmax(z); choice = score + bias (bias for selection only, NULL: none).
 * n_group > 1: the topk_group groups of the greatest group score stay (sum of the two best choices with group_top2, else the
 * best), others get -inf; ties to the smaller group; the kept groups hold at least k experts. ids = the k greatest choices, ties
 * to the smaller id, in descending order; weight = score[id], divided by (their sum + 1e-20) with norm, times scale. (DeepSeek-V3
 * report 2.1.2; V2: softmax, group maximum.) Where any choice of a token is not finite, its ids are some experts and its weights
 * NaN: an expert that a damaged router never chooses would leave no trace. */
struct rt_route_args {
    const void *x; const struct rt_weight *w, *bias; int32_t *ids; float *weight; int64_t n; int H, E, k, n_group, topk_group;
    bool sigmoid, group_top2, norm; float scale;
};

/* perm [n*k] = the flat indices t*k+j sorted by (ids[t,j], t); offset [host] [E+1] = where each expert's run begins. Waits. */
struct rt_moe_sort_args { const int32_t *ids; int32_t *perm; int32_t *offset; int64_t n; int k, E; };

/* y[t,:] += weight * down(silu(gate x_t) * up x_t) for each listed expert in the order given and each row of its run.
 * Expert j of the list has the rows perm[offset[j]] .. perm[offset[j+1]-1], t = perm/k, weight[perm] (offset[0] need not be 0: a
 * list may be a part of the experts). perm NULL: one expert, all n rows,
 * weight 1 (dense and shared MLP). x.scale given: the e4m3 products, and silu*up is quantised too. y [n, H] act. */
struct rt_moe_ffn_args {
    struct rt_act x; const int32_t *perm; const float *weight; const int32_t *offset; /* offset: [host] [n_experts + 1] */
    const struct rt_weight *const *gate, *const *up, *const *down;                    /* [host] [n_experts] */
    void *y; int64_t n; int n_experts, k, H, I; bool row_exact, pow2; /* pow2: of what is quantised inside */
};

/* Head of a scored window: z = x w^T over the ids [0, n_ids) in tiles, never [n, V] for the window. Each output [n]: topk_ids
 * uint32 [n,k], topk_logits float [n,k] (descending logit, then ascending id), lse float [n, n_lse] = log sum exp(z *
 * inv_temp[i]), next_logprob float = z[next] - log sum exp(z), next_rank uint32 = #{v: z_v > z_next or (z_v == z_next and v <
 * next)}. z is rounded to float32 before anything is made of it. Each of the top-k pair, next_logprob and next_rank may be NULL;
 * next NULL: neither of the two. next[i] outside [0, n_ids): -inf and n_ids. */
struct rt_head_topk_args {
    const void *x; const struct rt_weight *w; const int32_t *next; int64_t n, H, n_ids; int k, n_lse; const float *inv_temp; /* [host] */
    uint32_t *topk_ids; float *topk_logits, *lse, *next_logprob; uint32_t *next_rank;
};

/* Per-head products with the rows of one weight: w [nh * head_rows, R], head h owns rows h*head_rows + row0 .. + d.
 * transpose false: y[t,h,0:R] = x[t,h,0:d] w_h; true: y[t,h,0:d] = x[t,h,0:R] w_h^T. x, y with token and head strides. Rows are exact
 * (see row_exact). Used to absorb kv_b into queries and outputs (V2 report, 2.1). */
struct rt_head_matmul_args {
    const void *x; int64_t x_ld, x_head; const struct rt_weight *w; void *y; int64_t y_ld, y_head;
    int64_t n; int nh, head_rows, row0, d, R; bool transpose;
};

/* Caches of generation: token i belongs to slot[i] at position pos[i]; row (slot, pos) of a cache is at (slot*capacity + pos)*width. Slots, positions and
 * tables of pages are uploaded: no operation enqueued just before writes them (they may be read before it has ended). */
struct rt_cache_put_args { const void *x; int64_t ldx; void *cache; const int32_t *slot, *pos; int64_t n, capacity, width; };
/* Or a slot is a row of a table of pages of `len` positions, and pages may be in several slots: row (slot, pos) is then row
 * table[slot*(capacity/len) + pos/len]*len + pos % len of the cache. table NULL: no pages. len is a multiple of 64 that divides capacity. With
 * pages a row with pos -1 is nobody's: it is skipped, and its outputs are unspecified. */
struct rt_cache_pages { const int32_t *table; int32_t len; };
static inline int64_t rt_cache_row(const struct rt_cache_pages *p, int64_t capacity, int64_t slot, int64_t pos)
{
    return p->table == NULL ? slot * capacity + pos : (int64_t)p->table[slot * (capacity / p->len) + pos / p->len] * p->len + pos % p->len;
}
/* cache rows [0, n) of slot dst = those of slot src (equal slots: nothing) */
struct rt_cache_copy_args { void *cache; int64_t capacity, width, n; int32_t src, dst; };

/* Absorbed MLA attention: query token i sees cache rows 0 .. pos[i] of its slot; a row is [latent R | k_pe dr].
 * score = (q_lat . latent + q_pe . k_pe) * scale, o[i,h,:] = softmax . latent. q_lat [n,nh,R] dense, q_pe with strides, o [n,nh,R] =. */
struct rt_mla_cached_args {
    const void *q_lat, *q_pe; int64_t q_pe_ld, q_pe_head; const void *cache; const int32_t *slot, *pos; void *o;
    int64_t n, capacity; int nh, R, dr; float scale;
};
/* Grouped-head attention over a cache: k and v caches of width nkv*d. q [n,nh,d] with stride q_ld, o [n,nh*d] =. */
struct rt_attn_cached_args {
    const void *q; int64_t q_ld; const void *k_cache, *v_cache; const int32_t *slot, *pos; void *o;
    int64_t n, capacity; int nh, nkv, d; float scale; struct rt_cache_pages pages;
};
/* From a projection to the caches: q and k as headnorm_rope_fwd makes them (q_norm, k_norm NULL: no norm), k and v as cache_put puts them.
 * qkv [n, nh + 2 nkv, d] dense; q [n, nh*d] dense =; the caches' rows =. */
struct rt_rope_put_args {
    const void *qkv; const struct rt_weight *q_norm, *k_norm; void *q, *k_cache, *v_cache; const float *cos, *sin; const int32_t *slot, *pos;
    struct rt_cache_pages pages; int64_t n, capacity; int nh, nkv, d; float eps;
};
/* Both in one: put.qkv = x w^T (+ bias), and what rope_put makes of it. x [n, K] dense, act elements; w [(nh + 2 nkv) d, K]; tmp is put.qkv, scratch: cuda
 * rounds to act there only where it is used. Rows are exact as in linear_fwd. */
struct rt_linear_rope_put_args { const void *x; const struct rt_weight *w, *bias; void *tmp; int64_t K; struct rt_rope_put_args put; };
/* A token a row, as core/sampler.h picks it: z [n, ld] float32 logits, of which n_ids count; stream, position [n]: where its random number is
 * drawn. id [n], logprob [n] float =. id -1 - j: logit j, the first such, is NaN or infinite. (cuda: weights in units of 2^-42 of the
 * greatest; those within 2^-18 of each other count as equal; at most 2^21 ids; top_k UNSUPPORTED.) */
struct rt_sample_args {
    const float *z; int64_t ld, n, n_ids; struct rt_sample_params params; uint64_t seed; const uint64_t *stream; const int64_t *position;
    int32_t *id; float *logprob;
};

/* ---- student, forward and backward ---- */
/* `first`, of a backward over n > 0 rows: it is the first to write to dw (and db), which are = instead of +=, whatever lay there. */
/* y[t,h,:] = rope(norm(x[t,h,:]; w)), norm over d with eps; w NULL: no norm. rstd [n, heads] float = or NULL (unspecified without
 * w). May be in place (y == x) only where w is NULL. Half-split rope. */
struct rt_headnorm_rope_fwd_args {
    const void *x; int64_t ldx; const struct rt_weight *w; void *y; int64_t ldy; float *rstd;
    const float *cos, *sin; const int32_t *position; int64_t n; int heads, d; float eps;
};
/* dx = gradient at x from dy (dx may alias dy); dw += (act [d]; NULL where w is). x is the forward's input. db [n_db] += the sums over the rows of dx's
 * elements 0 .. n_db - 1 (NULL: none), n_db >= heads d, lddx >= n_db: the gradient of a projection's bias, of which what lies behind the heads is there already. */
struct rt_headnorm_rope_bwd_args {
    const void *dy, *x; int64_t lddy, ldx; const struct rt_weight *w; const float *rstd; void *dx; int64_t lddx; void *dw, *db; int64_t n_db;
    const float *cos, *sin; const int32_t *position; int64_t n; int heads, d; float eps; bool first;
};
/* dx += (or = without accumulate) gradient of norm_fwd at s, dw += (NULL where w is). x is s, the normalised sum. rstd is what
 * norm_fwd wrote, as in every backward. y = what norm_fwd made of x, again in its bits (then rstd is given), or NULL. All dense. */
struct rt_norm_bwd_args {
    const void *dy, *x; const struct rt_weight *w; const float *rstd; void *dx, *dw, *y; int64_t n, cols; float eps; bool accumulate, first;
};
/* dx = dy w, or += . dy [n, N] with lddy, dx [n, K] dense. */
struct rt_linear_dgrad_args { const void *dy; int64_t lddy; const struct rt_weight *w; void *dx; int64_t n, K, N; bool accumulate; };
/* dw += dy^T x, db += column sums of dy (db NULL: none). dw [N, K] dense. */
struct rt_linear_wgrad_args { const void *dy, *x; int64_t lddy, ldx; void *dw, *db; int64_t n, K, N; bool first; };
/* dq, dk, dv = (same strides as q, k, v). delta [nh, n] float is scratch. */
struct rt_attn_bwd_args {
    struct rt_attn_shape s;
    const void *q, *k, *v; int64_t q_ld, q_head, k_ld, k_head, v_ld, v_head;
    const void *o, *dout; const float *lse; void *dq, *dk, *dv; float *delta;
};
/* dgate, dup = ; with row distance ld; dh dense. h = recomputed silu(gate)*up, or NULL. dgate may be gate, dup up, and h dh. */
struct rt_swiglu_bwd_args { const void *gate, *up, *dh; int64_t ld; void *dgate, *dup, *h; int64_t n, I; };
/* A gated MLP's first half: [gate | up] = x w^T (+ bias), h = silu(gate) * up, as linear_fwd and swiglu_fwd make them. x [n, K] dense, w [2I, K],
 * h [n, I] dense =, or NULL. gate_up [n, 2I] dense = with `kept`; else scratch, unspecified afterwards. What comes out has the same bits whatever is
 * asked for. row_exact (not with `kept`): as in linear_fwd; gate and up are rounded to act only where the scratch is used. */
struct rt_gated_fwd_args { const void *x; const struct rt_weight *w, *bias; void *gate_up, *h; int64_t n, K, I; bool kept, row_exact; };
/* The way back: dh = dy w, d_gate_up = gradient at gate_up, as linear_dgrad and swiglu_bwd make them. dy [n, N] dense, w [N, I], gate_up [n, 2I] as
 * gated_fwd leaves it, d_gate_up [n, 2I] dense =, h [n, I] = recomputed (the bits of gated_fwd), or NULL. dh [n, I] is scratch. In place: d_gate_up may be
 * gate_up, and h may be dh. */
struct rt_gated_bwd_args { const void *dy; const struct rt_weight *w; const void *gate_up; void *dh, *d_gate_up, *h; int64_t n, N, I; };
/* dtable[ids[i],:] += dy[i,:], rows in ascending i. */
struct rt_embed_bwd_args { const int32_t *ids; const void *dy; void *dtable; int64_t n, cols, rows; };
/* out[i,:] = x[index[i],:]; and x[index[i],:] (+)= y[i,:] for distinct indices. */
struct rt_gather_args { const void *x; const int32_t *index; void *out; int64_t n, cols; };
struct rt_scatter_args { const void *y; const int32_t *index; void *x; int64_t n, cols; bool accumulate; };

/* Loss of the head over compacted rows, in tiles; never [n, V] for the batch.
 *   z = x w^T [n, V];  ce = lse_1(z) - z[label];
 *   kl = T^2 * KL(P || Q) at temperature T over the stored ids K and, with RT_TAIL_BUCKET, one bucket for all others:
 *        sum_K p log(p/q) + P_R log(P_R/Q_R), q_j = exp(z_j/T - lse_T(z)), Q_R summed over the complement itself;
 *        with RT_TAIL_RENORM both sides are renormalised over K.
 *   L = sum_i w_ce ce_i + w_kl kl_i        (w_* hold 1/number of targets already)
 *   dx = dL/dx (NULL: forward only), dw += dL/dw (NULL: none).
 * Rows whose label is < 0 take no CE; rows with kl_mask 0 take no KL; what a row does not take is 0 (dx too where it takes neither).
 * Ids of a row are distinct; an entry whose id is < 0 is empty and counts nowhere; a logp of -inf adds no term, but its id is in K.
 * Renorm over no mass is no KL. P_R = 1 - sum_K p; P_R < 1e-7 drops the bucket: its term, and P_R from the gradient (as does a K
 * that holds all V ids). (Formulas: distillation at temperature, Hinton et al. 2015, section 2; gradients i in K: T (q_i - p_i);
 * else T q_i (1 - P_R/Q_R).) */
enum rt_tail { RT_TAIL_BUCKET, RT_TAIL_RENORM };
struct rt_head_loss_args {
    const void *x; const struct rt_weight *w; void *dx, *dw; int64_t n, H, V;
    const int32_t *label;                         /* [n] */
    int k, id_bits; const void *top_ids;          /* [n] rows of k ids as core/top_ids.h packs them, id_bits each (0: int32_t [n,k]), in any order */
    const float *top_logp;                        /* [n,k] log p at T (not renormalised) */
    const uint8_t *kl_mask;                       /* [n] or NULL: none takes KL */
    enum rt_tail tail; double w_ce, w_kl, T;
    /* per row, double, each may be NULL: losses without w (kl with T^2), teacher and student mass on K at T, and whether argmax z (ties to
     * the smaller id) equals the label (bit 0) and the teacher's top id top_ids[i,0] (bit 1, rows that take KL) */
    double *ce, *kl, *teacher_mass, *student_mass; uint8_t *hit;
};

/* Likelihoods of the head over compacted rows, and the gradient of any weighted sum of them; in tiles, never [n, V] for the batch.
 *   z = x w^T over the ids [0, n_ids);  label_logp = z[label] - lse(z);  set_logp = lse(z over the ids of in_set) - lse(z)
 *   L = - sum_i (w_label[i] label_logp[i] + w_set[i] set_logp[i]);  dx = dL/dx (NULL: forward only), dw += dL/dw (NULL: none).
 * label NULL or label[i] < 0: label_logp 0, no gradient. in_set NULL: set_logp 0, no gradient; it holds no id: -inf, no gradient.
 * A weight array that is NULL is all 0. (The chunk likelihoods of Minixhofer et al. 2025, arXiv 2503.20083, and their debiasing.) */
struct rt_head_likelihood_args {
    const void *x; const struct rt_weight *w; void *dx, *dw; int64_t n, H, n_ids; /* w has n_ids rows or more */
    const int32_t *label; const uint8_t *in_set; /* [n], [n_ids] 0 or 1 */
    const float *w_label, *w_set;                /* [n] */
    double *label_logp, *set_logp;               /* [n] or NULL */
};

/* Feature loss, per row i with weight w: mse: w * mean_d (a-b)^2; cosine: w * (1 - a.b/(|a||b|)). da = gradient at a (NULL: none),
 * loss [n] double = without w, or NULL. a [n, cols] act, b [n, cols] float. cosine of a zero vector: loss 1, no gradient. */
struct rt_feature_loss_args { const void *a; const float *b; void *da; double *loss; double w; int64_t n, cols; bool cosine; };

/* *out [host] = sum of squares in float64, fixed order. Waits. */
struct rt_sumsq_args { const void *x; int64_t n; double *out; };
/* y += a x; y *= a (x NULL). */
struct rt_axpy_args { const void *x; void *y; int64_t n; double a; };
/* AdamW (Loshchilov & Hutter 2019), decoupled decay, bias-corrected, g = grad * grad_scale:
 * m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; p -= lr (mhat/(sqrt(vhat)+eps) + decay p). step counts from 1. p, grad [n] act, in place.
 * m, v [n] of type moment: act where act is F32 or F64; F32 or BF16 where act is BF16.
 * low: NULL, or (act BF16 only, else UNSUPPORTED) [n] int16 that makes p exactly a float32: bits = (p << 16) + low, p being the float32 rounded
 * to the nearest, halves away from zero. BF16 moments, and a BF16 p without low, are rounded
 * stochastically by a hash of (seed, step, index): the same every time, and small steps are not lost in the mean.
 * decay_end [host] [n_decay]: NULL, or ascending ends of the runs [0, e0) [e0, e1) .. of elements, of which every second one, from the first
 * on, takes the decay; what lies behind the last takes none. */
struct rt_adamw_args {
    void *p, *low; const void *grad; void *m, *v; enum rt_dtype moment; int64_t n, step; double lr, beta1, beta2, eps, decay, grad_scale;
    uint64_t seed; const int64_t *decay_end; int n_decay;
};
/* dst = src converted between act and float32 (to_f32: src act, dst float). */
struct rt_convert_args { const void *src; void *dst; int64_t n; bool to_f32; };
/* Rows as e4m3 with a scale each: scale[i] = max(amax of x[i,:], 1e-12)/448, code[i,:] = rne(x[i,:]/scale[i]). x float32 [n, cols] dense, whatever act is.
 * The same bits everywhere. */
struct rt_encode_rows_args { const float *x; uint8_t *code; float *scale; int64_t n, cols; };

#define RT_BACKEND_OPS(X) \
    X(embed_fwd) X(norm_fwd) X(quant) X(linear_fwd) X(rope) X(attn_fwd) X(swiglu_fwd) \
    X(route) X(moe_sort) X(moe_ffn) X(head_topk) X(head_matmul) X(cache_put) X(cache_copy) X(mla_cached) X(attn_cached) X(rope_put) X(linear_rope_put) X(sample) \
    X(headnorm_rope_fwd) X(headnorm_rope_bwd) X(norm_bwd) X(linear_dgrad) X(linear_wgrad) X(attn_bwd) X(swiglu_bwd) X(gated_fwd) X(gated_bwd) X(embed_bwd) \
    X(gather) X(scatter) X(head_loss) X(head_likelihood) X(feature_loss) X(sumsq) X(axpy) X(adamw) X(convert) X(encode_rows)

enum rt_op {
#define RT_OP_ENUM(op) RT_OP_##op,
    RT_BACKEND_OPS(RT_OP_ENUM)
#undef RT_OP_ENUM
    RT_OP_COUNT
};

struct rt_backend {
    const char *name;    /* "ref", "cpu", "cuda": what --device takes */
    enum rt_dtype act;
    bool own_memory;     /* device memory is not the host's: bytes cross by upload and download alone */
    int (*count)(void);  /* how many devices there are; NULL: one */
    bool (*available)(char *why, int cap); /* is the hardware there; why not */
    enum rt_status (*open)(const struct rt_dev_options *o, struct rt_dev **out, struct rt_err *err);
    void (*close)(struct rt_dev *dev);
    /* Called by every thread but the opener's before it uses the device; and by that one again after it opened another. */
    enum rt_status (*attach)(struct rt_dev *dev, struct rt_err *err);
    const char *(*describe)(const struct rt_dev *dev); /* "2 threads, OpenBLAS SkylakeX": for the log and the identity */

    enum rt_status (*alloc)(struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err); /* 64-byte aligned, zeroed */
    void (*free)(struct rt_dev *dev, void *p);
    /* Host memory that upload and download reach at full speed and without waiting (pinned); 64-byte aligned, not zeroed. Any host
     * memory may be given to upload and download. */
    enum rt_status (*host_alloc)(struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err);
    void (*host_free)(struct rt_dev *dev, void *p);
    /* own_memory only, else NULL: bytes free and in all; and the most that operations may take for themselves (they divide their work
     * by it: it is part of a plan). */
    enum rt_status (*memory)(struct rt_dev *dev, struct rt_dev_memory *out, struct rt_err *err);
    void (*set_scratch)(struct rt_dev *dev, uint64_t bytes);
    /* own_memory only, else NULL: from now on large products take the algorithm that is fastest, measured once a shape when it is first met, on the
     * operands that it comes with. Choices are part of a plan, since sums in another order differ in their last bits: they are read from the file `path`
     * and written there as they are made (NULL: kept in memory alone). Without this call a product takes the library's first choice. note [cap]: "" or a
     * sentence for the log (a file of another GPU is left aside). Errors: FORMAT a damaged file, IO. While
     * nothing else uses the device. */
    enum rt_status (*tune)(struct rt_dev *dev, const char *path, char *note, int cap, struct rt_err *err);
    enum rt_status (*queue_create)(struct rt_dev *dev, struct rt_queue **out, struct rt_err *err);
    void (*queue_free)(struct rt_dev *dev, struct rt_queue *q);
    enum rt_status (*queue_sync)(struct rt_dev *dev, struct rt_queue *q, struct rt_err *err);
    enum rt_status (*event_create)(struct rt_dev *dev, struct rt_event **out, struct rt_err *err);
    void (*event_free)(struct rt_dev *dev, struct rt_event *e);
    enum rt_status (*event_record)(struct rt_dev *dev, struct rt_queue *q, struct rt_event *e, struct rt_err *err);
    enum rt_status (*event_wait)(struct rt_dev *dev, struct rt_queue *q, struct rt_event *e, struct rt_err *err);
    /* Seconds between two recorded events of which the later is done; events of a host device: 0. */
    enum rt_status (*event_elapsed)(struct rt_dev *dev, struct rt_event *from, struct rt_event *to, double *seconds, struct rt_err *err);
    enum rt_status (*event_sync)(struct rt_dev *dev, struct rt_event *e, struct rt_err *err); /* the caller's thread waits */
    /* Asynchronous; the host block must stay valid until the queue is synchronised. */
    enum rt_status (*upload)(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err);
    enum rt_status (*download)(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err);
    enum rt_status (*copy)(struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err);
    enum rt_status (*zero)(struct rt_dev *dev, struct rt_queue *q, void *dst, size_t bytes, struct rt_err *err);
    /* Work that is enqueued again and again: what is called on q between begin and end is recorded and not run, with its arguments, host arrays by value;
     * nothing in between may wait, and temporary memory is the graph's. A call that cannot be recorded answers UNSUPPORTED (upload, download, and what has
     * too much on the host to keep), and so the work is no candidate; one that was enqueued before with the same arguments gives the same bytes. end always
     * ends it: *out NULL where a call before it failed. graph_run enqueues the recorded calls. NULL, all four: nothing would be gained. */
    enum rt_status (*graph_begin)(struct rt_dev *dev, struct rt_queue *q, struct rt_err *err);
    enum rt_status (*graph_end)(struct rt_dev *dev, struct rt_queue *q, struct rt_graph **out, struct rt_err *err);
    enum rt_status (*graph_run)(struct rt_dev *dev, struct rt_queue *q, struct rt_graph *g, struct rt_err *err);
    void (*graph_free)(struct rt_dev *dev, struct rt_graph *g); /* NULL is fine; q is done with it */
    /* Collectives over the ranks of rt_dev_options.comm, in place on x [n] act, x at a multiple of 64 bytes; every rank calls them in the same order with
     * the same n. Nothing happens for one rank. A sum is the same, bit for bit, whenever the same ranks sum the same numbers; host backends add in
     * rank order. Shards are those of rt_comm_shard. An error means that the ranks are out of reach for good.
     *   all_reduce      x = sum over ranks
     *   reduce_scatter  this rank's shard of x = sum over ranks; the rest is unspecified
     *   all_gather      every rank's shard of x to all
     *   broadcast       x = that of rank root
     * Like every operation they are ordered on the queue, which may be any of the device's (all ranks hand them out in one order, whatever the queues).
     * The communicator stays free for the caller's own collectives meanwhile. No wait of the host for the device is without end because of another rank: it
     * fails within the communicator's timeout (core/cuda/nccl.h). A backend that cannot serve several ranks refuses to open with them (UNSUPPORTED or
     * DEVICE, with what is missing where). */
    enum rt_status (*all_reduce)(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
    enum rt_status (*reduce_scatter)(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
    enum rt_status (*all_gather)(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, struct rt_err *err);
    enum rt_status (*broadcast)(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t n, int root, struct rt_err *err);

    /* Prepares a weight from host bytes. ref and cpu borrow data and scale_inv until weight_free (and copy where resident). */
    enum rt_status (*weight_load)(struct rt_dev *dev, struct rt_queue *q, const struct rt_weight_src *src, struct rt_weight **out,
                                  struct rt_err *err);
    /* A handle over act elements in device memory that may change (a parameter that is trained); borrows p. */
    enum rt_status (*weight_param)(struct rt_dev *dev, void *p, int64_t rows, int64_t cols, struct rt_weight **out, struct rt_err *err);
    void (*weight_free)(struct rt_dev *dev, struct rt_weight *w); /* NULL is fine */
    /* Device (here: heap) bytes that weight_load takes beyond the borrowed data. */
    size_t (*weight_bytes)(const struct rt_weight_src *src);

#define RT_OP_ENTRY(op) enum rt_status (*op)(struct rt_dev *, struct rt_queue *, const struct rt_##op##_args *, struct rt_err *);
    RT_BACKEND_OPS(RT_OP_ENTRY)
#undef RT_OP_ENTRY
};

/* A backend with its context and one queue: what engines pass around. */
struct rt_device {
    const struct rt_backend *be;
    struct rt_dev *dev;
    struct rt_queue *q;
};

/* RT_OP(d, norm_fwd, err, .x = x, .n = n, ...): the operation, or UNSUPPORTED naming it. */
#define RT_OP(d, op, err, ...) \
    ((d)->be->op != NULL ? (d)->be->op((d)->dev, (d)->q, &(const struct rt_##op##_args){__VA_ARGS__}, (err)) \
                         : rt_op_missing((d)->be, #op, (err)))
enum rt_status rt_op_missing(const struct rt_backend *be, const char *op, struct rt_err *err);

extern const struct rt_backend rt_backend_ref;
extern const struct rt_backend rt_backend_ref64; /* double elements: tests only */
extern const struct rt_backend rt_backend_cpu;
extern const struct rt_backend rt_backend_cuda; /* builds with CUDA only */

/* NULL-terminated, in the order in which `auto` tries them: cuda (where built), cpu; then ref, which auto never picks. */
const struct rt_backend *const *rt_backend_list(void);
/* `name`: auto, cpu, cuda, ref. auto is the first of cuda, cpu that is available and has all of `need` [n_need]. Errors: USAGE
 * unknown name, DEVICE not in this build or no hardware, UNSUPPORTED an operation is missing (named). */
enum rt_status rt_backend_select(const char *name, const enum rt_op *need, int n_need, const struct rt_backend **out, struct rt_err *err);
enum rt_status rt_device_open(const struct rt_backend *be, const struct rt_dev_options *o, struct rt_device *out, struct rt_err *err);
void rt_device_close(struct rt_device *d); /* a zeroed one is fine */

/* Shorthands on the device's queue. */
enum rt_status rt_device_upload(const struct rt_device *d, void *dst, const void *src, size_t bytes, struct rt_err *err);
/* Waits for the bytes. */
enum rt_status rt_device_download(const struct rt_device *d, void *dst, const void *src, size_t bytes, struct rt_err *err);
enum rt_status rt_device_zero(const struct rt_device *d, void *dst, size_t bytes, struct rt_err *err);
enum rt_status rt_device_sync(const struct rt_device *d, struct rt_err *err);
size_t rt_device_act_size(const struct rt_device *d);

#ifdef __cplusplus
}
#endif
#endif
