#include "student/describe.h"

#include <stdio.h>

static const char *rope_name(const struct rt_student_config *c)
{
    switch (c->rope.kind) {
    case RT_ROPE_DEFAULT: break;
    case RT_ROPE_LINEAR: return "linear";
    case RT_ROPE_LLAMA3: return "llama3";
    case RT_ROPE_YARN: return "yarn";
    }
    return "default";
}

static enum rt_status describe_tensors(const struct rt_params *p, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_json *list = NULL, *t = NULL, *shape = NULL;
    RT_TRY(rt_json_set_array(obj, "tensors", &list, err));
    for (int i = 0; i < p->n; i++) {
        const struct rt_tensor_decl d = rt_param_decl(&p->at[i], RT_F32);
        RT_TRY(rt_json_set_object(list, NULL, &t, err));
        RT_TRY(rt_json_set_string(t, "name", d.name, err));
        RT_TRY(rt_json_set_array(t, "shape", &shape, err));
        for (int j = 0; j < d.ndim; j++)
            RT_TRY(rt_json_set_int(shape, NULL, d.ne[j], err));
        RT_TRY(rt_json_set_int(t, "parameters", rt_param_elements(&p->at[i]), err));
    }
out:
    return st;
}

enum rt_status rt_student_describe(const struct rt_student_config *c, const struct rt_params *p, bool tensors, struct rt_json *obj,
                                   struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct {
        const char *key;
        int64_t value;
    } ints[] = {{"parameters", p->count},      {"matmul_parameters", p->matmul}, {"layers", c->layers},
                {"hidden_size", c->hidden},    {"intermediate_size", c->intermediate}, {"heads", c->heads},
                {"kv_heads", c->kv_heads},     {"head_dim", c->head_dim},        {"vocab_size", c->vocab_size},
                {"max_position", c->max_position}};
    RT_TRY(rt_json_set_string(obj, "model_type", rt_student_family_name(c->family), err));
    for (size_t i = 0; i < sizeof ints / sizeof ints[0]; i++)
        RT_TRY(rt_json_set_int(obj, ints[i].key, ints[i].value, err));
    RT_TRY(rt_json_set_bool(obj, "tied", c->tied, err));
    RT_TRY(rt_json_set_string(obj, "rope", rope_name(c), err));
    RT_TRY(rt_json_set_string(obj, "dtype", rt_dtype_name(c->dtype), err));
    if (tensors)
        RT_TRY(describe_tensors(p, obj, err));
out:
    return st;
}

enum rt_status rt_student_describe_text(const struct rt_student_config *c, const struct rt_params *p, bool tensors, struct rt_buf *out,
                                        struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char shape[64];
    RT_TRY(rt_buf_printf(out, err, "%s student, %lld parameters (%lld in products)\n", rt_student_family_name(c->family),
                         (long long)p->count, (long long)p->matmul));
    RT_TRY(rt_buf_printf(out, err, "layers %d, hidden %lld, intermediate %lld, heads %d, kv heads %d, head dim %d\n", c->layers,
                         (long long)c->hidden, (long long)c->intermediate, c->heads, c->kv_heads, c->head_dim));
    RT_TRY(rt_buf_printf(out, err, "vocabulary %lld, head %s, rope %s (theta %g), positions %lld, dtype %s\n", (long long)c->vocab_size,
                         c->tied ? "tied" : "its own", rope_name(c), c->rope.theta, (long long)c->max_position, rt_dtype_name(c->dtype)));
    for (int i = 0; tensors && i < p->n; i++) {
        const struct rt_tensor_decl d = rt_param_decl(&p->at[i], RT_F32);
        if (d.ndim == 1)
            snprintf(shape, sizeof shape, "[%lld]", (long long)d.ne[0]);
        else
            snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)d.ne[0], (long long)d.ne[1]);
        RT_TRY(rt_buf_printf(out, err, "%-56s %-18s %12lld\n", d.name, shape, (long long)rt_param_elements(&p->at[i])));
    }
out:
    return st;
}

double rt_student_flops_per_token(const struct rt_student_config *c, const struct rt_params *p, double len)
{
    return 6.0 * (double)p->matmul + 6.0 * c->layers * c->heads * c->head_dim * len;
}
