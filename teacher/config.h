/* What config.json says of a DeepSeek-class teacher: one struct for the whole family, no presets.
 *
 * Read: DeepSeek-V2/V2-Lite (deepseek_v2), V3/R1/V3.1 (deepseek_v3), Moonlight and Kimi-K2 (their releases use model_type deepseek_v3 or
 * kimi_k2). Refused by name: other model types, other activations, rope scaling other than YaRN, halves rotated as pairs (rope_interleave false),
 * attention bias, sparse indexers.
 */
#ifndef RT_TEACHER_CONFIG_H
#define RT_TEACHER_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

struct rt_teacher_config {
    char model_type[32];
    int64_t vocab_size, max_position;
    int hidden, layers, dense_first;        /* layers [0, dense_first) have a dense MLP */
    int heads, q_lora, kv_lora, dn, dr, dv; /* q_lora 0: one q_proj; dn, dr, dv: nope, rope and value head sizes */
    int inter, moe_inter;
    int experts, shared, top_k, n_group, topk_group; /* experts 0: every layer is dense; n_group 1: no groups */
    bool sigmoid;                           /* scoring_func: sigmoid, else softmax */
    bool group_top2;                        /* group score is the sum of its two best (noaux_tc), else its best */
    bool norm_topk;
    bool bias;                              /* e_score_correction_bias is there (noaux_tc) */
    double routed_scale, eps;
    double rope_theta;
    bool yarn;
    double yarn_factor, beta_fast, beta_slow, mscale, mscale_all_dim;
    int64_t yarn_original;
    int mtp_layers;
    bool fp8;                               /* quantization_config: e4m3 blocks of 128x128 */
    bool ue8m0;                             /* activation scales are powers of two (V3.1) */
    int64_t bos, eos;                       /* -1: none */
};

/* Reads DIR/config.json. FORMAT and UNSUPPORTED name the key, what was expected and what was found. */
enum rt_status rt_teacher_config_load(const char *dir, struct rt_teacher_config *out, struct rt_err *err);

/* Scale of attention scores: (dn+dr)^-0.5, times yarn_mscale(factor, mscale_all_dim)^2 (YaRN, arXiv 2309.00071, as the published
 * model applies it). */
double rt_teacher_attn_scale(const struct rt_teacher_config *c);
/* cos, sin [n_pos, dr/2]: cosine and sine of position * frequency, times mscale(factor, mscale)/mscale(factor, mscale_all_dim). */
void rt_teacher_rope_table(const struct rt_teacher_config *c, int64_t n_pos, float *cos_out, float *sin_out);

/* Parameters: of the main model and its MTP layers, and those that one token meets (head included, embedding not). */
struct rt_teacher_params {
    int64_t attention, dense_mlp, router, expert, shared, embed, head, total, active, mtp;
};
void rt_teacher_count(const struct rt_teacher_config *c, struct rt_teacher_params *out);
/* Floating-point operations to score a token at an average context of ctx tokens: 2 * active + naive causal attention. */
double rt_teacher_flops(const struct rt_teacher_config *c, double ctx);

#endif
