#include "teacher/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "formats/json.h"

enum { DIM_MAX = 1 << 24 };

/* Keys whose presence with another value would change the computation. */
static enum rt_status refuse_unknown(const struct rt_json *j, struct rt_err *err)
{
    const char *src = rt_json_source(j), *act, *type;
    bool bias, interleave;
    enum rt_status st;
    RT_TRY(rt_json_string_or(j, "hidden_act", "silu", &act, err));
    if (strcmp(act, "silu") != 0)
        RT_FAIL(err, UNSUPPORTED, "%s: hidden_act is '%s', expected silu", src, act);
    RT_TRY(rt_json_bool_or(j, "attention_bias", false, &bias, err));
    if (bias)
        RT_FAIL(err, UNSUPPORTED, "%s: attention_bias is true, expected false", src);
    RT_TRY(rt_json_bool_or(j, "rope_interleave", true, &interleave, err));
    if (!interleave)
        RT_FAIL(err, UNSUPPORTED, "%s: rope_interleave is false, expected true", src);
    if (rt_json_get(j, "index_topk") != NULL)
        RT_FAIL(err, UNSUPPORTED, "%s: index_topk: sparse-attention models (V3.2 and later) are not supported", src);
    RT_TRY(rt_json_string_or(j, "model_type", "", &type, err));
    static const char *const known[] = {"deepseek_v2", "deepseek_v3", "kimi_k2", "moonlight"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(type, known[i]) == 0)
            return RT_OK;
    RT_FAIL(err, UNSUPPORTED, "%s: model_type is '%s'; a teacher is one of deepseek_v2, deepseek_v3, kimi_k2, moonlight", src, type);
out:
    return st;
}

static enum rt_status read_int(const struct rt_json *j, const char *key, int64_t min, int *out, struct rt_err *err)
{
    int64_t v;
    const enum rt_status st = rt_json_int(j, key, min, DIM_MAX, &v, err);
    if (st == RT_OK)
        *out = (int)v;
    return st;
}

static enum rt_status read_int_or(const struct rt_json *j, const char *key, int64_t min, int64_t def, int *out, struct rt_err *err)
{
    int64_t v;
    const enum rt_status st = rt_json_int_or(j, key, min, DIM_MAX, def, &v, err);
    if (st == RT_OK)
        *out = (int)v;
    return st;
}

static double yarn_mscale(double factor, double m)
{
    return factor <= 1 || m == 0 ? 1.0 : 0.1 * m * log(factor) + 1.0;
}

/* What cosines and sines are multiplied by. */
static double rope_amplitude(const struct rt_teacher_config *c)
{
    return c->yarn ? yarn_mscale(c->yarn_factor, c->mscale) / yarn_mscale(c->yarn_factor, c->mscale_all_dim) : 1.0;
}

/* The first of the three that says rope_theta: newer files have it beside the scaling, older ones outside. */
static enum rt_status read_theta(const struct rt_json *const at[3], double *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *out = 10000;
    for (int i = 0; i < 3; i++) {
        const struct rt_json *v = rt_json_get(at[i], "rope_theta");
        if (v == NULL || rt_json_typeof(v) == RT_JSON_NULL)
            continue;
        RT_TRY(rt_json_double(at[i], "rope_theta", out, err));
        if (!(*out > 1))
            RT_FAIL(err, FORMAT, "%s: rope_theta is %g, expected more than 1", rt_json_source(at[i]), *out);
        break;
    }
out:
    return st;
}

/* What transformers reads beside the published keys, where it would change the table. */
static enum rt_status refuse_rope(const struct rt_json *r, const struct rt_teacher_config *c, struct rt_err *err)
{
    const char *src = rt_json_source(r);
    const double ours = rope_amplitude(c);
    double factor;
    bool truncate;
    enum rt_status st;
    RT_TRY(rt_json_double_or(r, "attention_factor", ours, &factor, err));
    if (!(fabs(factor - ours) <= 1e-6 * ours))
        RT_FAIL(err, UNSUPPORTED, "%s: rope_scaling: attention_factor is %g, expected none, or the %g of factor, mscale and mscale_all_dim", src, factor, ours);
    RT_TRY(rt_json_bool_or(r, "truncate", true, &truncate, err));
    if (!truncate)
        RT_FAIL(err, UNSUPPORTED, "%s: rope_scaling: truncate is false, expected true", src);
out:
    return st;
}

static enum rt_status read_rope(const struct rt_json *j, struct rt_teacher_config *c, struct rt_err *err)
{
    enum rt_status st;
    const char *src = rt_json_source(j), *type;
    const struct rt_json *r = rt_json_get(j, "rope_scaling");
    const struct rt_json *params = rt_json_get(j, "rope_parameters");
    RT_TRY(read_theta((const struct rt_json *const[]){params, r, j}, &c->rope_theta, err));
    if (r == NULL || rt_json_typeof(r) == RT_JSON_NULL)
        r = params;
    if (r == NULL || rt_json_typeof(r) == RT_JSON_NULL)
        return RT_OK;
    RT_TRY(rt_json_string_or(r, "type", NULL, &type, err));
    if (type == NULL)
        RT_TRY(rt_json_string_or(r, "rope_type", "default", &type, err));
    if (strcmp(type, "default") == 0)
        return RT_OK;
    if (strcmp(type, "yarn") != 0)
        RT_FAIL(err, UNSUPPORTED, "%s: rope_scaling type is '%s', expected yarn", src, type);
    c->yarn = true;
    RT_TRY(rt_json_double(r, "factor", &c->yarn_factor, err));
    RT_TRY(rt_json_int(r, "original_max_position_embeddings", 1, (int64_t)1 << 40, &c->yarn_original, err));
    RT_TRY(rt_json_double_or(r, "beta_fast", 32, &c->beta_fast, err));
    RT_TRY(rt_json_double_or(r, "beta_slow", 1, &c->beta_slow, err));
    RT_TRY(rt_json_double_or(r, "mscale", 1, &c->mscale, err));
    RT_TRY(rt_json_double_or(r, "mscale_all_dim", 0, &c->mscale_all_dim, err));
    if (!(c->yarn_factor >= 1) || !(c->beta_fast > 0) || !(c->beta_slow > 0))
        RT_FAIL(err, FORMAT, "%s: rope_scaling: factor must be at least 1, beta_fast and beta_slow positive", src);
    RT_TRY(refuse_rope(r, c, err));
out:
    return st;
}

static enum rt_status read_experts(const struct rt_json *j, struct rt_teacher_config *c, struct rt_err *err)
{
    enum rt_status st;
    const char *src = rt_json_source(j), *score, *method;
    int freq;
    RT_TRY(read_int_or(j, "n_routed_experts", 0, 0, &c->experts, err));
    if (c->experts == 0) {
        c->dense_first = c->layers;
        return RT_OK;
    }
    RT_TRY(read_int_or(j, "first_k_dense_replace", 0, 0, &c->dense_first, err));
    RT_TRY(read_int(j, "moe_intermediate_size", 1, &c->moe_inter, err));
    RT_TRY(read_int_or(j, "n_shared_experts", 0, 0, &c->shared, err));
    RT_TRY(read_int(j, "num_experts_per_tok", 1, &c->top_k, err));
    RT_TRY(read_int_or(j, "n_group", 1, 1, &c->n_group, err));
    RT_TRY(read_int_or(j, "topk_group", 1, 1, &c->topk_group, err));
    RT_TRY(read_int_or(j, "moe_layer_freq", 1, 1, &freq, err));
    RT_TRY(rt_json_string_or(j, "scoring_func", strcmp(c->model_type, "deepseek_v2") == 0 ? "softmax" : "sigmoid", &score, err));
    RT_TRY(rt_json_string_or(j, "topk_method", strcmp(c->model_type, "deepseek_v2") == 0 ? "greedy" : "noaux_tc", &method, err));
    RT_TRY(rt_json_bool_or(j, "norm_topk_prob", strcmp(c->model_type, "deepseek_v2") != 0, &c->norm_topk, err));
    RT_TRY(rt_json_double_or(j, "routed_scaling_factor", 1.0, &c->routed_scale, err));
    c->sigmoid = strcmp(score, "sigmoid") == 0;
    c->bias = c->group_top2 = strcmp(method, "noaux_tc") == 0;
    if (!c->sigmoid && strcmp(score, "softmax") != 0)
        RT_FAIL(err, UNSUPPORTED, "%s: scoring_func is '%s', expected sigmoid or softmax", src, score);
    if (!c->bias && strcmp(method, "greedy") != 0 && strcmp(method, "group_limited_greedy") != 0)
        RT_FAIL(err, UNSUPPORTED, "%s: topk_method is '%s', expected noaux_tc, greedy or group_limited_greedy", src, method);
    if (strcmp(method, "greedy") == 0)
        c->n_group = c->topk_group = 1;
    if (freq != 1)
        RT_FAIL(err, UNSUPPORTED, "%s: moe_layer_freq is %d, expected 1", src, freq);
    if (c->top_k > c->experts || c->experts % c->n_group != 0 || c->topk_group > c->n_group ||
        c->top_k > c->experts / c->n_group * c->topk_group)
        RT_FAIL(err, FORMAT, "%s: %d experts in %d groups, %d groups kept, %d a token: these do not fit together", src, c->experts,
                c->n_group, c->topk_group, c->top_k);
    if (c->n_group > 1 && c->group_top2 && c->experts / c->n_group < 2)
        RT_FAIL(err, FORMAT, "%s: groups of one expert have no two best", src);
    if (c->dense_first > c->layers)
        RT_FAIL(err, FORMAT, "%s: first_k_dense_replace %d exceeds num_hidden_layers %d", src, c->dense_first, c->layers);
out:
    return st;
}

static enum rt_status read_quantization(const struct rt_json *j, struct rt_teacher_config *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *src = rt_json_source(j), *method, *fmt, *scale;
    const struct rt_json *q = rt_json_get(j, "quantization_config");
    if (q == NULL || rt_json_typeof(q) == RT_JSON_NULL)
        return RT_OK;
    RT_TRY(rt_json_string_or(q, "quant_method", "", &method, err));
    RT_TRY(rt_json_string_or(q, "fmt", "e4m3", &fmt, err));
    RT_TRY(rt_json_string_or(q, "scale_fmt", "", &scale, err));
    if (strcmp(method, "fp8") != 0 || strcmp(fmt, "e4m3") != 0)
        RT_FAIL(err, UNSUPPORTED, "%s: quantization_config is %s/%s, expected fp8/e4m3", src, method, fmt);
    const struct rt_json *block = rt_json_get(q, "weight_block_size");
    int64_t b0 = 128, b1 = 128;
    if (block != NULL && (rt_json_len(block) != 2 || !rt_json_as_int(rt_json_at(block, 0), &b0) || !rt_json_as_int(rt_json_at(block, 1), &b1)))
        RT_FAIL(err, FORMAT, "%s: weight_block_size: expected two integers", src);
    if (b0 != 128 || b1 != 128)
        RT_FAIL(err, UNSUPPORTED, "%s: weight_block_size is [%ld, %ld], expected [128, 128]", src, (long)b0, (long)b1);
    c->fp8 = true;
    c->ue8m0 = strcmp(scale, "ue8m0") == 0;
out:
    return st;
}

static enum rt_status parse(const struct rt_json *j, struct rt_teacher_config *c, struct rt_err *err)
{
    enum rt_status st;
    const char *type;
    RT_TRY(refuse_unknown(j, err));
    RT_TRY(rt_json_string(j, "model_type", &type, err));
    snprintf(c->model_type, sizeof c->model_type, "%s", type);
    RT_TRY(rt_json_int(j, "vocab_size", 2, DIM_MAX, &c->vocab_size, err));
    RT_TRY(rt_json_int_or(j, "max_position_embeddings", 1, (int64_t)1 << 32, 163840, &c->max_position, err));
    RT_TRY(read_int(j, "hidden_size", 1, &c->hidden, err));
    RT_TRY(read_int(j, "num_hidden_layers", 1, &c->layers, err));
    RT_TRY(read_int(j, "num_attention_heads", 1, &c->heads, err));
    RT_TRY(read_int_or(j, "q_lora_rank", 0, 0, &c->q_lora, err));
    RT_TRY(read_int(j, "kv_lora_rank", 1, &c->kv_lora, err));
    RT_TRY(read_int(j, "qk_nope_head_dim", 1, &c->dn, err));
    RT_TRY(read_int(j, "qk_rope_head_dim", 2, &c->dr, err));
    RT_TRY(read_int(j, "v_head_dim", 1, &c->dv, err));
    RT_TRY(read_int_or(j, "intermediate_size", 1, 1, &c->inter, err));
    RT_TRY(read_int_or(j, "num_nextn_predict_layers", 0, 0, &c->mtp_layers, err));
    RT_TRY(rt_json_double_or(j, "rms_norm_eps", 1e-6, &c->eps, err));
    if (!(c->eps >= 0 && c->eps < 1))
        RT_FAIL(err, FORMAT, "%s: rms_norm_eps is %g, expected a number in [0, 1)", rt_json_source(j), c->eps);
    RT_TRY(rt_json_int_or(j, "bos_token_id", -1, DIM_MAX, -1, &c->bos, err));
    const struct rt_json *eos = rt_json_get(j, "eos_token_id");
    c->eos = -1;
    if (eos != NULL && !rt_json_as_int(rt_json_typeof(eos) == RT_JSON_ARRAY ? rt_json_at(eos, 0) : eos, &c->eos))
        c->eos = -1;
    RT_TRY(read_experts(j, c, err));
    RT_TRY(read_rope(j, c, err));
    RT_TRY(read_quantization(j, c, err));
    if (c->dr % 2 != 0)
        RT_FAIL(err, FORMAT, "%s: qk_rope_head_dim is %d, expected an even number", rt_json_source(j), c->dr);
out:
    return st;
}

enum rt_status rt_teacher_config_load(const char *dir, struct rt_teacher_config *out, struct rt_err *err)
{
    char path[4096];
    struct rt_json *j = NULL;
    enum rt_status st;
    *out = (struct rt_teacher_config){.n_group = 1, .topk_group = 1};
    RT_TRY(rt_path_join(path, sizeof path, dir, "config.json", err));
    RT_TRY(rt_json_load(path, 1 << 20, &j, err));
    RT_TRY(parse(j, out, err));
out:
    rt_json_free(j);
    return st;
}

double rt_teacher_attn_scale(const struct rt_teacher_config *c)
{
    const double m = c->yarn ? yarn_mscale(c->yarn_factor, c->mscale_all_dim) : 1.0;
    return m * m / sqrt(c->dn + c->dr);
}

void rt_teacher_rope_table(const struct rt_teacher_config *c, int64_t n_pos, float *cos_out, float *sin_out)
{
    const int half = c->dr / 2;
    const double amp = rope_amplitude(c);
    double low = 0, high = 1;
    if (c->yarn) {
        const double orig = (double)c->yarn_original, ln = 2 * log(c->rope_theta);
        low = fmax(floor(c->dr * log(orig / (c->beta_fast * 2 * M_PI)) / ln), 0);
        high = fmin(ceil(c->dr * log(orig / (c->beta_slow * 2 * M_PI)) / ln), c->dr - 1);
        if (low == high)
            high += 0.001;
    }
    for (int i = 0; i < half; i++) {
        double f = pow(c->rope_theta, -2.0 * i / c->dr);
        if (c->yarn) {
            const double ramp = fmin(fmax((i - low) / (high - low), 0), 1);
            f = f / c->yarn_factor * ramp + f * (1 - ramp);
        }
        for (int64_t p = 0; p < n_pos; p++) {
            cos_out[p * half + i] = (float)(amp * cos((double)p * f));
            sin_out[p * half + i] = (float)(amp * sin((double)p * f));
        }
    }
}

void rt_teacher_count(const struct rt_teacher_config *c, struct rt_teacher_params *out)
{
    const int64_t H = c->hidden, q = (int64_t)c->heads * (c->dn + c->dr);
    struct rt_teacher_params p = {0};
    p.attention = (c->q_lora > 0 ? H * c->q_lora + c->q_lora + c->q_lora * q : H * q) + H * (c->kv_lora + c->dr) + c->kv_lora +
                  (int64_t)c->kv_lora * c->heads * (c->dn + c->dv) + (int64_t)c->heads * c->dv * H + 2 * H;
    p.dense_mlp = 3 * H * c->inter;
    p.router = (int64_t)c->experts * H + (c->bias ? c->experts : 0);
    p.expert = 3 * H * c->moe_inter;
    p.shared = p.expert * c->shared;
    p.embed = p.head = c->vocab_size * H;
    const int64_t moe_layer = p.attention + p.router + p.shared, moe_layers = c->layers - c->dense_first;
    p.total = p.embed + p.head + H + c->dense_first * (p.attention + p.dense_mlp) + moe_layers * (moe_layer + c->experts * p.expert);
    p.active = p.head + H + c->dense_first * (p.attention + p.dense_mlp) + moe_layers * (moe_layer + c->top_k * p.expert);
    p.mtp = c->mtp_layers * (moe_layer + c->experts * p.expert + 2 * H * H + 3 * H + p.embed + p.head);
    *out = p;
}

double rt_teacher_flops(const struct rt_teacher_config *c, double ctx)
{
    struct rt_teacher_params p;
    rt_teacher_count(c, &p);
    return 2.0 * (double)p.active + c->layers * 2.0 * c->heads * (c->dn + c->dr + c->dv) * ctx / 2;
}
