#include "teacher/part_table.h"

#include <stdio.h>
#include <string.h>

#include "core/mem.h"

const char *rt_part_name(struct rt_part_id id, char buf[64])
{
    static const char *const kind[] = {"attention", "dense MLP", "router", "expert", "head", "MTP matrices"};
    if (id.kind == RT_PART_HEAD)
        snprintf(buf, 64, "head");
    else if (id.kind == RT_PART_EXPERT)
        snprintf(buf, 64, "layer %d expert %d", id.layer, id.expert);
    else
        snprintf(buf, 64, "layer %d %s", id.layer, kind[id.kind]);
    return buf;
}

/* One matrix or vector: `name`.weight with its scale where it is e4m3. optional: a missing tensor leaves the slot empty. */
static enum rt_status add(const struct rt_tensors *ts, struct rt_part_plan *p, int slot, const char *name, int64_t rows, int64_t cols,
                          struct rt_err *err)
{
    char full[512];
    enum rt_status st;
    struct rt_part_tensor *t = &p->t[p->n];
    *t = (struct rt_part_tensor){.slot = slot, .rows = rows, .cols = cols};
    const bool vector = rows == 1;
    const int64_t dims[2] = {vector ? cols : rows, cols};
    const bool bare = strstr(name, "e_score_correction_bias") != NULL;
    snprintf(full, sizeof full, bare ? "%s" : "%s.weight", name);
    unsigned dtypes = RT_DT(RT_F32) | RT_DT(RT_F16) | RT_DT(RT_BF16);
    if (!vector)
        dtypes |= RT_DT(RT_E4M3);
    RT_TRY(rt_tensors_get(ts, full, dtypes, vector ? 1 : 2, dims, &t->weight, err));
    if (t->weight->dtype == RT_E4M3) {
        const int64_t blocks[2] = {(rows + 127) / 128, (cols + 127) / 128};
        snprintf(full, sizeof full, "%s.weight_scale_inv", name);
        RT_TRY(rt_tensors_get(ts, full, RT_DT(RT_F32), 2, blocks, &t->scale, err));
    }
    t->at = p->bytes;
    t->scale_at = t->at + rt_arena_round(t->weight->bytes);
    p->bytes = t->scale_at + (t->scale != NULL ? rt_arena_round(t->scale->bytes) : 0);
    p->n++;
out:
    return st;
}

#define ADD(slot, rows, cols, ...) \
    do { \
        snprintf(name, sizeof name, __VA_ARGS__); \
        RT_TRY(add(ts, out, (slot), name, (rows), (cols), err)); \
    } while (0)

static enum rt_status attention(const struct rt_tensors *ts, const struct rt_teacher_config *c, int l, struct rt_part_plan *out,
                                struct rt_err *err)
{
    char name[256];
    enum rt_status st;
    const int64_t H = c->hidden, q = (int64_t)c->heads * (c->dn + c->dr);
    ADD(RT_W_INPUT_NORM, 1, H, "model.layers.%d.input_layernorm", l);
    if (c->q_lora > 0) {
        ADD(RT_W_Q_A, c->q_lora, H, "model.layers.%d.self_attn.q_a_proj", l);
        ADD(RT_W_Q_A_NORM, 1, c->q_lora, "model.layers.%d.self_attn.q_a_layernorm", l);
        ADD(RT_W_Q_B, q, c->q_lora, "model.layers.%d.self_attn.q_b_proj", l);
    } else {
        ADD(RT_W_Q_B, q, H, "model.layers.%d.self_attn.q_proj", l);
    }
    ADD(RT_W_KV_A, c->kv_lora + c->dr, H, "model.layers.%d.self_attn.kv_a_proj_with_mqa", l);
    ADD(RT_W_KV_A_NORM, 1, c->kv_lora, "model.layers.%d.self_attn.kv_a_layernorm", l);
    ADD(RT_W_KV_B, (int64_t)c->heads * (c->dn + c->dv), c->kv_lora, "model.layers.%d.self_attn.kv_b_proj", l);
    ADD(RT_W_O, H, (int64_t)c->heads * c->dv, "model.layers.%d.self_attn.o_proj", l);
    ADD(RT_W_POST_NORM, 1, H, "model.layers.%d.post_attention_layernorm", l);
out:
    return st;
}

static enum rt_status mlp(const struct rt_tensors *ts, const char *prefix, int64_t H, int64_t inter, struct rt_part_plan *out,
                          struct rt_err *err)
{
    char name[256];
    enum rt_status st;
    ADD(RT_W_GATE, inter, H, "%s.gate_proj", prefix);
    ADD(RT_W_UP, inter, H, "%s.up_proj", prefix);
    ADD(RT_W_DOWN, H, inter, "%s.down_proj", prefix);
out:
    return st;
}

enum rt_status rt_part_plan(const struct rt_tensors *ts, const struct rt_teacher_config *c, struct rt_part_id id, struct rt_part_plan *out,
                            struct rt_err *err)
{
    char name[256], prefix[128];
    enum rt_status st = RT_OK;
    const int l = id.layer;
    *out = (struct rt_part_plan){0};
    switch (id.kind) {
    case RT_PART_ATTN:
        RT_TRY(attention(ts, c, l, out, err));
        break;
    case RT_PART_DENSE:
        snprintf(prefix, sizeof prefix, "model.layers.%d.mlp", l);
        RT_TRY(mlp(ts, prefix, c->hidden, c->inter, out, err));
        break;
    case RT_PART_ROUTER:
        ADD(RT_W_ROUTER, c->experts, c->hidden, "model.layers.%d.mlp.gate", l);
        if (c->bias)
            ADD(RT_W_BIAS, 1, c->experts, "model.layers.%d.mlp.gate.e_score_correction_bias", l);
        snprintf(prefix, sizeof prefix, "model.layers.%d.mlp.shared_experts", l);
        if (c->shared > 0)
            RT_TRY(mlp(ts, prefix, c->hidden, (int64_t)c->shared * c->moe_inter, out, err));
        break;
    case RT_PART_EXPERT:
        snprintf(prefix, sizeof prefix, "model.layers.%d.mlp.experts.%d", l, id.expert);
        RT_TRY(mlp(ts, prefix, c->hidden, c->moe_inter, out, err));
        break;
    case RT_PART_HEAD:
        ADD(RT_W_NORM, 1, c->hidden, "model.norm");
        ADD(RT_W_HEAD, c->vocab_size, c->hidden, "lm_head");
        break;
    case RT_PART_MTP:
        ADD(RT_W_ENORM, 1, c->hidden, "model.layers.%d.enorm", l);
        ADD(RT_W_HNORM, 1, c->hidden, "model.layers.%d.hnorm", l);
        ADD(RT_W_EH_PROJ, c->hidden, 2 * (int64_t)c->hidden, "model.layers.%d.eh_proj", l);
        ADD(RT_W_MTP_NORM, 1, c->hidden, "model.layers.%d.shared_head.norm", l);
        ADD(RT_W_MTP_HEAD, c->vocab_size, c->hidden, "model.layers.%d.shared_head.head", l);
        break;
    }
out:
    return st;
}
