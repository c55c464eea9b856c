#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/inspect.h"
#include "formats/safetensors.h"
#include "student/describe.h"
#include "student/params.h"
#include "teacher/config.h"
#include "teacher/part_table.h"

enum { PATH_CAP = 4096, MAX_LAYERS = 4096 };

struct layer_sum {
    int64_t parameters;
    uint64_t bytes;
};

/* ---- weights ---- */
static bool is_scale(const char *name)
{
    return strstr(name, "_scale") != NULL;
}

/* -1: not of a layer */
static int layer_of(const char *name)
{
    int layer, used = 0;
    return sscanf(name, "model.layers.%d.%n", &layer, &used) == 1 && used > 0 && layer >= 0 && layer < MAX_LAYERS ? layer : -1;
}

static enum rt_status dtypes_json(const struct rt_tensors *t, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list, *o;
    struct {
        int64_t tensors, elements, scales;
        uint64_t bytes;
    } sum[RT_DTYPE_COUNT] = {0};
    for (int64_t i = 0; i < rt_tensors_count(t); i++) {
        const struct rt_tensor *x = rt_tensors_at(t, i);
        sum[x->dtype].tensors++;
        sum[x->dtype].elements += rt_tensor_elements(x);
        sum[x->dtype].bytes += x->bytes;
    }
    RT_TRY(rt_json_set_array(obj, "types", &list, err));
    for (int d = 0; d < RT_DTYPE_COUNT; d++) {
        if (sum[d].tensors == 0)
            continue;
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_string(o, "dtype", rt_dtype_name((enum rt_dtype)d), err));
        RT_TRY(rt_json_set_int(o, "tensors", sum[d].tensors, err));
        RT_TRY(rt_json_set_int(o, "elements", sum[d].elements, err));
        RT_TRY(rt_json_set_int(o, "bytes", (int64_t)sum[d].bytes, err));
    }
out:
    return st;
}

static enum rt_status weights_json(const struct rt_tensors *t, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *w;
    RT_TRY(rt_json_set_object(obj, "weights", &w, err));
    RT_TRY(rt_json_set_int(w, "files", rt_tensors_n_files(t), err));
    RT_TRY(rt_json_set_int(w, "tensors", rt_tensors_count(t), err));
    RT_TRY(rt_json_set_int(w, "bytes", (int64_t)rt_tensors_total_bytes(t), err));
    RT_TRY(rt_json_set_string(w, "sha256", rt_tensors_sha256(t), err));
    RT_TRY(dtypes_json(t, obj, err));
out:
    return st;
}

static enum rt_status list_tensors(const struct rt_tensors *t, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list, *o;
    char shape[160];
    RT_TRY(rt_json_set_array(obj, "tensors", &list, err));
    for (int64_t i = 0; i < rt_tensors_count(t); i++) {
        const struct rt_tensor *x = rt_tensors_at(t, i);
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_string(o, "name", x->name, err));
        RT_TRY(rt_json_set_string(o, "type", rt_tensor_describe(x, shape), err));
        RT_TRY(rt_json_set_int(o, "bytes", (int64_t)x->bytes, err));
    }
out:
    return st;
}

/* Opens the weights of a model directory; *t NULL where it holds none. */
static enum rt_status open_weights(const char *dir, struct rt_tensors **t, struct rt_err *err)
{
    *t = NULL;
    return rt_path_has(dir, "model.safetensors") || rt_path_has(dir, "model.safetensors.index.json") ? rt_tensors_open(dir, t, err) : RT_OK;
}

static void sum_layers(const struct rt_tensors *t, struct layer_sum *sum, int n)
{
    for (int64_t i = 0; i < rt_tensors_count(t); i++) {
        const struct rt_tensor *x = rt_tensors_at(t, i);
        const int l = layer_of(x->name);
        if (l < 0 || l >= n)
            continue;
        sum[l].bytes += x->bytes;
        if (!is_scale(x->name))
            sum[l].parameters += rt_tensor_elements(x);
    }
}

/* Rows of equal layers are one: {"layers": "3-60", "kind", "parameters", "bytes"} of one layer each. */
static enum rt_status layers_json(const struct layer_sum *sum, const char *const *kind, int n, bool bytes, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list, *o;
    RT_TRY(rt_json_set_array(obj, "layers", &list, err));
    for (int first = 0, last; first < n; first = last + 1) {
        char range[32];
        for (last = first; last + 1 < n && sum[last + 1].parameters == sum[first].parameters && sum[last + 1].bytes == sum[first].bytes &&
                           strcmp(kind[last + 1], kind[first]) == 0;)
            last++;
        snprintf(range, sizeof range, last > first ? "%d-%d" : "%d", first, last);
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_string(o, "layer", range, err));
        RT_TRY(rt_json_set_string(o, "kind", kind[first], err));
        RT_TRY(rt_json_set_int(o, "parameters", sum[first].parameters, err));
        if (bytes)
            RT_TRY(rt_json_set_int(o, "bytes", (int64_t)sum[first].bytes, err));
    }
out:
    return st;
}

/* ---- tokenizer and template ---- */
static enum rt_status id_json(struct rt_json *o, const char *key, const struct rt_tokenizer *t, int64_t id, struct rt_err *err)
{
    const char *bytes;
    size_t len;
    char text[RT_TOKEN_MAX_BYTES + 32];
    if (id < 0 || !rt_tokenizer_bytes(t, (uint32_t)id, &bytes, &len) || len > RT_TOKEN_MAX_BYTES)
        return rt_json_set_null(o, key, err);
    snprintf(text, sizeof text, "%" PRId64 " %.*s", id, (int)len, bytes);
    return rt_json_set_string(o, key, text, err);
}

static enum rt_status tokenizer_json(const struct rt_tokenizer *t, struct rt_json *o, struct rt_err *err)
{
    enum rt_status st;
    int64_t used = 0, added = 0, special = 0;
    for (uint32_t id = 0; id < rt_tokenizer_n_ids(t); id++) {
        const char *b;
        size_t n;
        used += rt_tokenizer_bytes(t, id, &b, &n);
        added += rt_tokenizer_is_added(t, id);
        special += rt_tokenizer_is_special(t, id);
    }
    RT_TRY(rt_json_set_int(o, "ids", rt_tokenizer_n_ids(t), err));
    RT_TRY(rt_json_set_int(o, "used_ids", used, err));
    RT_TRY(rt_json_set_int(o, "added_tokens", added, err));
    RT_TRY(rt_json_set_int(o, "special_tokens", special, err));
    RT_TRY(id_json(o, "bos", t, rt_tokenizer_bos(t), err));
    RT_TRY(id_json(o, "eos", t, rt_tokenizer_eos(t), err));
    RT_TRY(id_json(o, "pad", t, rt_tokenizer_pad(t), err));
    RT_TRY(rt_json_set_bool(o, "text_begins_with_bos", rt_tokenizer_add_bos(t), err));
    RT_TRY(rt_json_set_bool(o, "normalizes_to_nfc", rt_tokenizer_normalizes(t), err));
    RT_TRY(rt_json_set_string(o, "sha256", rt_tokenizer_sha256(t), err));
out:
    return st;
}

static enum rt_status template_json(const char *dir, struct rt_tokenizer *tok, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_template *t = NULL;
    struct rt_err bad = {0};
    struct rt_json *o;
    st = rt_template_load(dir, NULL, tok, &t, &bad);
    if (st == RT_OK && t == NULL)
        return rt_json_set_null(obj, "template", err);
    RT_TRY(rt_json_set_object(obj, "template", &o, err));
    if (t == NULL) {
        RT_TRY(rt_json_set_string(o, "problem", bad.msg, err));
        goto out;
    }
    RT_TRY(rt_json_set_string(o, "family", rt_template_name(t), err));
    const uint32_t end = rt_template_end_id(t);
    RT_TRY(id_json(o, "end_token", tok, end == UINT32_MAX ? -1 : (int64_t)end, err));
    RT_TRY(rt_json_set_string(o, "answer_begins_with", rt_template_forced(t, RT_THINKING_AUTO), err));
    RT_TRY(rt_json_set_string(o, "sha256", rt_template_sha256(t), err));
out:
    rt_template_free(t);
    return st;
}

enum rt_status rt_inspect_text_side(const char *dir, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    char path[PATH_CAP];
    struct rt_tokenizer *tok = NULL;
    struct rt_err bad = {0};
    struct rt_json *o;
    RT_TRY(rt_path_join(path, sizeof path, dir, "tokenizer.json", err));
    if (!rt_path_exists(path)) {
        RT_TRY(rt_json_set_null(obj, "tokenizer", err));
        RT_TRY(rt_json_set_null(obj, "template", err));
        goto out;
    }
    st = rt_tokenizer_load(dir, &tok, &bad);
    RT_TRY(rt_json_set_object(obj, "tokenizer", &o, err));
    if (tok == NULL) {
        RT_TRY(rt_json_set_string(o, "problem", bad.msg, err));
        RT_TRY(rt_json_set_null(obj, "template", err));
        goto out;
    }
    RT_TRY(tokenizer_json(tok, o, err));
    RT_TRY(template_json(dir, tok, obj, err));
out:
    rt_tokenizer_free(tok);
    return st;
}

enum rt_status rt_inspect_tokenizer(const char *path, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_tokenizer *tok = NULL;
    RT_TRY(rt_tokenizer_load(path, &tok, err));
    RT_TRY(tokenizer_json(tok, obj, err));
    if (rt_path_is_dir(path))
        RT_TRY(template_json(path, tok, obj, err));
out:
    rt_tokenizer_free(tok);
    return st;
}

/* ---- the teacher ---- */
static enum rt_status teacher_config_json(const struct rt_teacher_config *c, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *o;
    char text[160];
    const struct {
        const char *key;
        int64_t value;
    } ints[] = {{"vocab_size", c->vocab_size}, {"context", c->max_position}, {"layers", c->layers}, {"dense_layers", c->dense_first},
                {"hidden_size", c->hidden}, {"intermediate_size", c->inter}, {"expert_size", c->moe_inter}, {"heads", c->heads},
                {"q_lora_rank", c->q_lora}, {"kv_lora_rank", c->kv_lora}, {"experts", c->experts}, {"shared_experts", c->shared},
                {"experts_a_token", c->top_k}, {"expert_groups", c->n_group}, {"groups_a_token", c->topk_group}, {"mtp_layers", c->mtp_layers}};
    RT_TRY(rt_json_set_object(obj, "config", &o, err));
    RT_TRY(rt_json_set_string(o, "model_type", c->model_type, err));
    for (size_t i = 0; i < sizeof ints / sizeof ints[0]; i++)
        RT_TRY(rt_json_set_int(o, ints[i].key, ints[i].value, err));
    snprintf(text, sizeof text, "%d nope + %d rope, values %d", c->dn, c->dr, c->dv);
    RT_TRY(rt_json_set_string(o, "head_dims", text, err));
    snprintf(text, sizeof text, "%s%s%s%s", c->sigmoid ? "sigmoid" : "softmax", c->bias ? ", correction bias" : "",
             c->group_top2 ? ", groups by their two best" : c->n_group > 1 ? ", groups by their best" : "", c->norm_topk ? ", normalised" : "");
    RT_TRY(rt_json_set_string(o, "gating", text, err));
    RT_TRY(rt_json_set_double(o, "routed_scaling", c->routed_scale, err));
    if (c->yarn)
        snprintf(text, sizeof text, "YaRN, factor %g from %" PRId64 " positions, theta %g", c->yarn_factor, c->yarn_original, c->rope_theta);
    else
        snprintf(text, sizeof text, "default, theta %g", c->rope_theta);
    RT_TRY(rt_json_set_string(o, "rope", text, err));
    RT_TRY(rt_json_set_string(o, "quantization", !c->fp8 ? "none" : c->ue8m0 ? "FP8 e4m3, blocks of 128x128, activation scales ue8m0" : "FP8 e4m3, blocks of 128x128", err));
out:
    return st;
}

static enum rt_status teacher_parameters_json(const struct rt_teacher_config *c, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *o;
    struct rt_teacher_params p;
    rt_teacher_count(c, &p);
    const int64_t moe = c->layers - c->dense_first;
    const struct {
        const char *key;
        int64_t value;
    } ints[] = {{"total", p.total}, {"active", p.active}, {"attention", c->layers * p.attention}, {"dense_mlp", c->dense_first * p.dense_mlp},
                {"routed_experts", moe * c->experts * p.expert}, {"shared_experts", moe * p.shared}, {"routers", moe * p.router},
                {"embedding", p.embed}, {"head", p.head}, {"mtp", p.mtp}};
    RT_TRY(rt_json_set_object(obj, "parameters", &o, err));
    for (size_t i = 0; i < sizeof ints / sizeof ints[0]; i++)
        RT_TRY(rt_json_set_int(o, ints[i].key, ints[i].value, err));
    if (c->mtp_layers > 0) /* whose embeddings and heads are the model's own, stored again */
        RT_TRY(rt_json_set_int(o, "total_with_mtp", p.total + p.mtp - c->mtp_layers * (p.embed + p.head), err));
out:
    return st;
}

/* Every tensor that the configuration asks for is there with its type and shape. */
static enum rt_status teacher_check(const struct rt_tensors *t, const struct rt_teacher_config *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_part_plan plan;
    struct rt_part_id *parts = NULL;
    for (int l = 0; l < c->layers; l++) {
        const int64_t n = rt_weights_layer_parts(c, l, NULL);
        rt_free(parts);
        parts = NULL;
        RT_TRY(rt_alloc((size_t)n, sizeof *parts, "parts", &parts, err));
        rt_weights_layer_parts(c, l, parts);
        for (int64_t i = 0; i < n; i++)
            RT_TRY(rt_part_plan(t, c, parts[i], &plan, err));
    }
    RT_TRY(rt_part_plan(t, c, (struct rt_part_id){.kind = RT_PART_HEAD}, &plan, err));
out:
    rt_free(parts);
    return st;
}

static enum rt_status teacher_layers(const struct rt_teacher_config *c, const struct rt_tensors *t, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    const int n = c->layers + c->mtp_layers;
    struct layer_sum *sum = NULL;
    const char **kind = NULL;
    struct rt_teacher_params p;
    rt_teacher_count(c, &p);
    RT_TRY(rt_alloc((size_t)n, sizeof *sum, "layers", &sum, err));
    RT_TRY(rt_alloc((size_t)n, sizeof *kind, "layers", &kind, err));
    for (int l = 0; l < n; l++) {
        const bool dense = l < c->dense_first || c->experts == 0;
        kind[l] = l >= c->layers ? "mtp" : dense ? "dense" : "moe";
        if (t == NULL)
            sum[l].parameters = l >= c->layers ? p.mtp / c->mtp_layers
                                : p.attention + (dense ? p.dense_mlp : p.router + p.shared + c->experts * p.expert);
    }
    if (t != NULL)
        sum_layers(t, sum, n);
    RT_TRY(layers_json(sum, kind, n, t != NULL, obj, err));
out:
    rt_free(sum);
    rt_free(kind);
    return st;
}

/* The directory of a config.json that was given by its file name. */
static void model_dir_of(const char *path, char out[PATH_CAP])
{
    snprintf(out, PATH_CAP, "%s", path);
    if (rt_path_is_dir(path))
        return;
    char *slash = strrchr(out, '/');
    if (slash == NULL)
        snprintf(out, PATH_CAP, ".");
    else
        slash[slash == out ? 1 : 0] = '\0';
}

enum rt_status rt_inspect_teacher(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_teacher_config c;
    struct rt_tensors *t = NULL;
    char dir[PATH_CAP];
    model_dir_of(path, dir);
    RT_TRY(rt_teacher_config_load(dir, &c, err));
    RT_TRY(teacher_parameters_json(&c, obj, err));
    RT_TRY(teacher_config_json(&c, obj, err));
    RT_TRY(open_weights(dir, &t, err));
    if (t != NULL) {
        RT_TRY(teacher_check(t, &c, err));
        RT_TRY(weights_json(t, obj, err));
    } else {
        RT_TRY(rt_json_set_null(obj, "weights", err));
    }
    RT_TRY(teacher_layers(&c, t, obj, err));
    RT_TRY(rt_inspect_text_side(dir, obj, err));
    if (o->tensors && t != NULL)
        RT_TRY(list_tensors(t, obj, err));
out:
    rt_tensors_free(t);
    return st;
}

/* ---- the student ---- */
static enum rt_status student_layers(const struct rt_student_config *c, const struct rt_params *p, const struct rt_tensors *t, struct rt_json *obj,
                                     struct rt_err *err)
{
    enum rt_status st;
    struct layer_sum *sum = NULL;
    const char **kind = NULL;
    RT_TRY(rt_alloc((size_t)c->layers, sizeof *sum, "layers", &sum, err));
    RT_TRY(rt_alloc((size_t)c->layers, sizeof *kind, "layers", &kind, err));
    for (int l = 0; l < c->layers; l++)
        kind[l] = "dense";
    for (int i = 0; i < p->n; i++)
        if (p->at[i].layer >= 0)
            sum[p->at[i].layer].parameters += rt_param_elements(&p->at[i]);
    for (int64_t i = 0; t != NULL && i < rt_tensors_count(t); i++) {
        const struct rt_tensor *x = rt_tensors_at(t, i);
        const int l = layer_of(x->name);
        if (l >= 0 && l < c->layers)
            sum[l].bytes += x->bytes;
    }
    RT_TRY(layers_json(sum, kind, c->layers, t != NULL, obj, err));
out:
    rt_free(sum);
    rt_free(kind);
    return st;
}

enum rt_status rt_inspect_student(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_student_config c = {0};
    struct rt_params p = {0};
    struct rt_tensors *t = NULL;
    struct rt_json *config, *counts;
    char dir[PATH_CAP];
    model_dir_of(path, dir);
    RT_TRY(rt_student_config_load(path, &c, err));
    if (rt_path_is_dir(path))
        RT_TRY(open_weights(dir, &t, err));
    if (t != NULL)
        RT_TRY(rt_params_check_model(&c, t, true, NULL, err));
    RT_TRY(rt_params_create(&c, &p, err));
    RT_TRY(rt_json_set_object(obj, "parameters", &counts, err));
    RT_TRY(rt_json_set_int(counts, "total", p.count, err));
    RT_TRY(rt_json_set_int(counts, "active", p.matmul, err));
    RT_TRY(rt_json_set_int(counts, "embedding", c.vocab_size * c.hidden, err));
    RT_TRY(rt_json_set_object(obj, "config", &config, err));
    RT_TRY(rt_student_describe(&c, &p, false, config, err));
    if (t != NULL)
        RT_TRY(weights_json(t, obj, err));
    else
        RT_TRY(rt_json_set_null(obj, "weights", err));
    RT_TRY(student_layers(&c, &p, t, obj, err));
    if (rt_path_is_dir(path))
        RT_TRY(rt_inspect_text_side(dir, obj, err));
    if (o->tensors && t != NULL)
        RT_TRY(list_tensors(t, obj, err));
out:
    rt_tensors_free(t);
    rt_params_free(&p);
    rt_student_config_free(&c);
    return st;
}

/* ---- tensors alone ---- */
enum rt_status rt_inspect_tensors(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_tensors *t = NULL;
    (void)o;
    RT_TRY(rt_tensors_open(path, &t, err));
    RT_TRY(weights_json(t, obj, err));
    RT_TRY(list_tensors(t, obj, err));
out:
    rt_tensors_free(t);
    return st;
}
