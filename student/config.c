#include "student/config.h"

#include <math.h>
#include <string.h>

#include "core/io.h"
#include "formats/json.h"

enum { MAX_CONFIG_BYTES = 1 << 20 };

static const struct family {
    const char *model_type, *architecture;
    int default_head_dim; /* 0: hidden / heads */
} families[] = {
    [RT_STUDENT_QWEN2] = {"qwen2", "Qwen2ForCausalLM", 0},
    [RT_STUDENT_QWEN3] = {"qwen3", "Qwen3ForCausalLM", 128},
    [RT_STUDENT_LLAMA] = {"llama", "LlamaForCausalLM", 0},
};
enum { N_FAMILIES = (int)(sizeof families / sizeof families[0]) };

const char *rt_student_family_name(enum rt_student_family f)
{
    return families[f].model_type;
}

void rt_student_config_free(struct rt_student_config *c)
{
    rt_free(c->text);
    c->text = NULL;
    c->text_len = 0;
}

static bool is_set(const struct rt_json *v)
{
    return v != NULL && rt_json_typeof(v) != RT_JSON_NULL;
}

/* A real number in [min, max], or def where absent. def outside the range: the key is required. */
static enum rt_status number(const struct rt_json *o, const char *key, double min, double max, double def, double *out,
                             struct rt_err *err)
{
    enum rt_status st = def >= min && def <= max ? rt_json_double_or(o, key, def, out, err) : rt_json_double(o, key, out, err);
    if (st == RT_OK && !(*out >= min && *out <= max))
        st = rt_fail(err, RT_FORMAT, "%s: %s is %g, expected %g to %g", rt_json_source(o), key, *out, min, max);
    return st;
}

static enum rt_status read_family(const struct rt_json *o, struct rt_student_config *c, struct rt_err *err)
{
    const char *type = NULL;
    enum rt_status st = rt_json_string(o, "model_type", &type, err);
    if (st != RT_OK)
        return st;
    int f = 0;
    while (f < N_FAMILIES && strcmp(type, families[f].model_type) != 0)
        f++;
    if (f == N_FAMILIES)
        return rt_fail(err, RT_UNSUPPORTED, "%s: model_type is '%.64s'; students are qwen2, qwen3 or llama", rt_json_source(o), type);
    c->family = (enum rt_student_family)f;
    const struct rt_json *a = rt_json_at(rt_json_get(o, "architectures"), 0);
    const char *name = a == NULL ? NULL : rt_json_as_string(a, NULL);
    if (name != NULL && strcmp(name, families[f].architecture) != 0)
        return rt_fail(err, RT_UNSUPPORTED, "%s: architectures is '%.64s', expected %s", rt_json_source(o), name,
                       families[f].architecture);
    return RT_OK;
}

static enum rt_status read_sizes(const struct rt_json *o, struct rt_student_config *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int64_t v = 0;
    RT_TRY(rt_json_int(o, "vocab_size", 1, 1 << 24, &c->vocab_size, err));
    RT_TRY(rt_json_int(o, "hidden_size", 1, 1 << 16, &c->hidden, err));
    RT_TRY(rt_json_int(o, "intermediate_size", 1, 1 << 20, &c->intermediate, err));
    RT_TRY(rt_json_int(o, "num_hidden_layers", 1, RT_STUDENT_MAX_LAYERS, &v, err));
    c->layers = (int)v;
    RT_TRY(rt_json_int(o, "num_attention_heads", 1, 1024, &v, err));
    c->heads = (int)v;
    RT_TRY(rt_json_int_or(o, "num_key_value_heads", 1, 1024, c->heads, &v, err));
    c->kv_heads = (int)v;
    if (c->heads % c->kv_heads != 0)
        RT_FAIL(err, FORMAT, "%s: num_attention_heads %d is no multiple of num_key_value_heads %d", rt_json_source(o), c->heads,
                c->kv_heads);
    int64_t def = families[c->family].default_head_dim;
    if (def == 0 && !is_set(rt_json_get(o, "head_dim"))) {
        if (c->hidden % c->heads != 0)
            RT_FAIL(err, FORMAT, "%s: head_dim is absent and hidden_size %lld is no multiple of num_attention_heads %d",
                    rt_json_source(o), (long long)c->hidden, c->heads);
        def = c->hidden / c->heads;
    }
    RT_TRY(rt_json_int_or(o, "head_dim", 2, 1024, def, &v, err));
    if (v < 2 || v > 1024 || v % 2 != 0)
        RT_FAIL(err, FORMAT, "%s: head_dim is %lld, expected an even number from 2 to 1024", rt_json_source(o), (long long)v);
    c->head_dim = (int)v;
    RT_TRY(rt_json_int_or(o, "max_position_embeddings", 1, 1 << 24, c->family == RT_STUDENT_LLAMA ? 2048 : 32768, &c->max_position,
                          err));
    RT_TRY(number(o, "rms_norm_eps", 0, 1, 1e-6, &c->eps, err));
    RT_TRY(number(o, "initializer_range", 0, 10, 0.02, &c->initializer_range, err));
out:
    return st;
}

static enum rt_status refuse_sliding(const struct rt_json *o, const struct rt_student_config *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    bool use = false;
    int64_t window = 0, first = 0;
    const struct rt_json *types = rt_json_get(o, "layer_types");
    RT_TRY(rt_json_bool_or(o, "use_sliding_window", false, &use, err));
    RT_TRY(rt_json_int_or(o, "sliding_window", 0, INT64_MAX, 0, &window, err));
    RT_TRY(rt_json_int_or(o, "max_window_layers", 0, INT64_MAX, 28, &first, err));
    const bool inert = window >= c->max_position; /* no position reaches beyond the window */
    if (is_set(types)) {
        if (rt_json_typeof(types) != RT_JSON_ARRAY || rt_json_len(types) != (size_t)c->layers)
            RT_FAIL(err, FORMAT, "%s: layer_types has %zu items, expected one for each of %d layers", rt_json_source(o),
                    rt_json_len(types), c->layers);
        for (int i = 0; i < c->layers; i++) {
            const char *s = rt_json_as_string(rt_json_at(types, (size_t)i), NULL);
            if (s == NULL || (strcmp(s, "full_attention") != 0 && !(inert && strcmp(s, "sliding_attention") == 0)))
                RT_FAIL(err, UNSUPPORTED, "%s: layer_types[%d] is '%.40s'; only full_attention is supported", rt_json_source(o), i,
                        s == NULL ? "(no string)" : s);
        }
    } else if (use && window > 0 && !inert && first < c->layers) {
        RT_FAIL(err, UNSUPPORTED, "%s: use_sliding_window is true with a window of %lld from layer %lld on; expected full attention",
                rt_json_source(o), (long long)window, (long long)first);
    }
out:
    return st;
}

static enum rt_status read_flags(const struct rt_json *o, struct rt_student_config *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *s = NULL;
    bool bias = false;
    double x = 0;
    RT_TRY(rt_json_bool_or(o, "tie_word_embeddings", false, &c->tied, err));
    RT_TRY(rt_json_bool_or(o, "attention_bias", false, &bias, err));
    /* Qwen2 has no such key: q, k and v always carry a bias, o never does. */
    c->qkv_bias = c->family == RT_STUDENT_QWEN2 || bias;
    c->o_bias = c->family != RT_STUDENT_QWEN2 && bias;
    RT_TRY(rt_json_bool_or(o, "mlp_bias", false, &bias, err));
    if (bias && c->family != RT_STUDENT_LLAMA)
        RT_FAIL(err, UNSUPPORTED, "%s: mlp_bias is true, which %s does not have", rt_json_source(o), rt_student_family_name(c->family));
    c->mlp_bias = bias;
    c->qk_norm = c->family == RT_STUDENT_QWEN3;
    RT_TRY(rt_json_string_or(o, "hidden_act", "silu", &s, err));
    if (strcmp(s, "silu") != 0)
        RT_FAIL(err, UNSUPPORTED, "%s: hidden_act is '%.40s', expected silu", rt_json_source(o), s);
    RT_TRY(rt_json_double_or(o, "attention_dropout", 0, &x, err));
    if (x != 0)
        RT_FAIL(err, UNSUPPORTED, "%s: attention_dropout is %g, expected 0", rt_json_source(o), x);
    RT_TRY(rt_json_double_or(o, "partial_rotary_factor", 1, &x, err));
    if (x != 1)
        RT_FAIL(err, UNSUPPORTED, "%s: partial_rotary_factor is %g, expected 1", rt_json_source(o), x);
    for (int i = 0; i < 2; i++) {
        static const char *const other_rope[] = {"rope_interleaved", "use_mrope"};
        bool on = false;
        RT_TRY(rt_json_bool_or(o, other_rope[i], false, &on, err));
        if (on)
            RT_FAIL(err, UNSUPPORTED, "%s: %s is true, expected false", rt_json_source(o), other_rope[i]);
    }
    if (is_set(rt_json_get(o, "quantization_config")))
        RT_FAIL(err, UNSUPPORTED, "%s: quantization_config is set; a student is trained from BF16, F16 or F32 weights",
                rt_json_source(o));
    RT_TRY(refuse_sliding(o, c, err));
out:
    return st;
}

static enum rt_status read_dtype(const struct rt_json *o, struct rt_student_config *c, struct rt_err *err)
{
    static const struct {
        const char *name;
        enum rt_dtype t;
    } names[] = {{"bfloat16", RT_BF16}, {"float16", RT_F16}, {"float32", RT_F32}};
    const char *key = is_set(rt_json_get(o, "dtype")) ? "dtype" : "torch_dtype", *s = NULL;
    enum rt_status st = rt_json_string_or(o, key, "float32", &s, err);
    if (st != RT_OK)
        return st;
    for (int i = 0; i < 3; i++)
        if (strcmp(s, names[i].name) == 0) {
            c->dtype = names[i].t;
            return RT_OK;
        }
    return rt_fail(err, RT_UNSUPPORTED, "%s: %s is '%.40s', expected bfloat16, float16 or float32", rt_json_source(o), key, s);
}

static enum rt_status one_id(const struct rt_json *o, const char *key, const struct rt_json *v, const struct rt_student_config *c,
                             int32_t *out, struct rt_err *err)
{
    int64_t id = 0;
    if (v == NULL || !rt_json_as_int(v, &id) || id < -1 || id >= c->vocab_size)
        return rt_fail(err, RT_FORMAT, "%s: %s is no id below vocab_size %lld", rt_json_source(o), key, (long long)c->vocab_size);
    *out = (int32_t)id;
    return RT_OK;
}

static enum rt_status read_ids(const struct rt_json *o, struct rt_student_config *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    c->bos = -1;
    const struct rt_json *bos = rt_json_get(o, "bos_token_id"), *eos = rt_json_get(o, "eos_token_id");
    if (is_set(bos))
        RT_TRY(one_id(o, "bos_token_id", bos, c, &c->bos, err));
    if (!is_set(eos))
        goto out;
    const bool list = rt_json_typeof(eos) == RT_JSON_ARRAY;
    const size_t n = list ? rt_json_len(eos) : 1;
    if (n > RT_STUDENT_MAX_EOS)
        RT_FAIL(err, FORMAT, "%s: eos_token_id has %zu ids, expected at most %d", rt_json_source(o), n, RT_STUDENT_MAX_EOS);
    for (size_t i = 0; i < n; i++) {
        RT_TRY(one_id(o, "eos_token_id", list ? rt_json_at(eos, i) : eos, c, &c->eos[c->n_eos], err));
        c->n_eos += c->eos[c->n_eos] >= 0;
    }
out:
    return st;
}

static double mscale(double factor, double m)
{
    return factor <= 1 ? 1 : 0.1 * m * log(factor) + 1;
}

static enum rt_status read_yarn(const struct rt_json *s, const struct rt_student_config *c, struct rt_student_rope *r,
                                struct rt_err *err)
{
    enum rt_status st = RT_OK;
    double m = 0, m_all = 0;
    RT_TRY(number(s, "original_max_position_embeddings", 1, 1 << 24, (double)c->max_position, &r->original_max_position, err));
    RT_TRY(number(s, "factor", 1, 1e6, fmax(1, (double)c->max_position / r->original_max_position), &r->factor, err));
    RT_TRY(number(s, "beta_fast", 1e-3, 1e6, 32, &r->beta_fast, err));
    RT_TRY(number(s, "beta_slow", 1e-3, 1e6, 1, &r->beta_slow, err));
    RT_TRY(number(s, "mscale", 0, 100, 0, &m, err));
    RT_TRY(number(s, "mscale_all_dim", 0, 100, 0, &m_all, err));
    const double def = m != 0 && m_all != 0 ? mscale(r->factor, m) / mscale(r->factor, m_all) : mscale(r->factor, 1);
    RT_TRY(number(s, "attention_factor", 1e-3, 100, def, &r->attention_factor, err));
    RT_TRY(rt_json_bool_or(s, "truncate", true, &r->truncate, err));
out:
    return st;
}

static enum rt_status read_rope(const struct rt_json *o, struct rt_student_config *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_student_rope *r = &c->rope;
    *r = (struct rt_student_rope){.factor = 1, .attention_factor = 1};
    const char *key = is_set(rt_json_get(o, "rope_parameters")) ? "rope_parameters" : "rope_scaling", *type = "default";
    const struct rt_json *s = rt_json_get(o, key);
    double partial = 1;
    RT_TRY(number(o, "rope_theta", 1.0001, 1e15, 10000, &r->theta, err));
    if (!is_set(s))
        goto out;
    if (rt_json_typeof(s) != RT_JSON_OBJECT)
        RT_FAIL(err, FORMAT, "%s: %s is no object", rt_json_source(o), key);
    RT_TRY(number(s, "rope_theta", 1.0001, 1e15, r->theta, &r->theta, err));
    RT_TRY(rt_json_double_or(s, "partial_rotary_factor", 1, &partial, err));
    if (partial != 1)
        RT_FAIL(err, UNSUPPORTED, "%s: %s.partial_rotary_factor is %g, expected 1", rt_json_source(o), key, partial);
    RT_TRY(rt_json_string_or(s, is_set(rt_json_get(s, "rope_type")) ? "rope_type" : "type", "default", &type, err));
    if (strcmp(type, "default") == 0) {
        r->kind = RT_ROPE_DEFAULT;
    } else if (strcmp(type, "linear") == 0) {
        r->kind = RT_ROPE_LINEAR;
        RT_TRY(number(s, "factor", 1, 1e6, 0, &r->factor, err));
    } else if (strcmp(type, "llama3") == 0) {
        r->kind = RT_ROPE_LLAMA3;
        RT_TRY(number(s, "factor", 1, 1e6, 0, &r->factor, err));
        RT_TRY(number(s, "low_freq_factor", 1e-3, 1e6, 0, &r->low_freq_factor, err));
        RT_TRY(number(s, "high_freq_factor", 1e-3, 1e6, 0, &r->high_freq_factor, err));
        RT_TRY(number(s, "original_max_position_embeddings", 1, 1 << 24, (double)c->max_position, &r->original_max_position, err));
        if (!(r->high_freq_factor > r->low_freq_factor))
            RT_FAIL(err, FORMAT, "%s: %s.high_freq_factor %g is not above low_freq_factor %g", rt_json_source(o), key,
                    r->high_freq_factor, r->low_freq_factor);
    } else if (strcmp(type, "yarn") == 0) {
        r->kind = RT_ROPE_YARN;
        RT_TRY(read_yarn(s, c, r, err));
    } else {
        RT_FAIL(err, UNSUPPORTED, "%s: %s type is '%.40s', expected default, linear, llama3 or yarn", rt_json_source(o), key, type);
    }
out:
    return st;
}

enum rt_status rt_student_config_parse(const char *text, size_t len, const char *source, struct rt_student_config *out,
                                       struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_json *o = NULL;
    struct rt_student_config c = {0};
    RT_TRY(rt_json_parse(text, len, source, &o, err));
    if (rt_json_typeof(o) != RT_JSON_OBJECT)
        RT_FAIL(err, FORMAT, "%s: expected a JSON object", source);
    RT_TRY(read_family(o, &c, err));
    RT_TRY(read_sizes(o, &c, err));
    RT_TRY(read_flags(o, &c, err));
    RT_TRY(read_dtype(o, &c, err));
    RT_TRY(read_ids(o, &c, err));
    RT_TRY(read_rope(o, &c, err));
    RT_TRY(rt_alloc(len + 1, 1, "the text of config.json", &c.text, err));
    memcpy(c.text, text, len);
    c.text_len = len;
    *out = c;
    c.text = NULL;
out:
    rt_student_config_free(&c);
    rt_json_free(o);
    return st;
}

enum rt_status rt_student_config_load(const char *path, struct rt_student_config *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    char file[4096];
    if (rt_path_is_dir(path)) {
        RT_TRY(rt_path_join(file, sizeof file, path, "config.json", err));
        path = file;
    }
    RT_TRY(rt_file_read_all(path, MAX_CONFIG_BYTES, &text, err));
    RT_TRY(rt_student_config_parse(text.data, text.len, path, out, err));
out:
    rt_buf_free(&text);
    return st;
}
