/* Writes a synthetic teacher: a checkpoint in the published layout with random weights, of any geometry.
 *
 *     bench_make_teacher --out DIR [options]          --help lists them
 *
 * Deviations are 1/sqrt(inputs), so that activations stay of order one. FP8: e4m3 codes with one float32 scale for each block of
 * 128x128, in the order and the types of the releases (embeddings, head, router and norms in BF16). Memory is one row block a thread,
 * whatever the size; tensors depend on the seed and their names alone. --geometry v3 is DeepSeek-V3's, with as many layers as asked.
 */
#include <math.h>

#include "bench/bench.h"
#include "bench/command.h"
#include "core/io.h"
#include "core/pool.h"
#include "formats/safetensors.h"

struct values {
    const char *out, *dtype, *geometry;
    int64_t vocab, hidden, layers, dense_first, heads, q_lora, kv_lora, dn, dr, dv, inter, moe_inter, experts, shared, top_k, n_group, topk_group,
        max_position, mtp, shard_bytes, seed, threads;
    bool help;
};

#define V(field) offsetof(struct values, field)
#define INT(name, field, def, max, help) {name, RT_OPT_INT, V(field), def, 0, max, NULL, "N", help, false, false}
static const struct rt_opt options[] = {
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "DIR", "where the checkpoint goes", true, false},
    {"geometry", RT_OPT_CHOICE, V(geometry), "free", 0, 0, "free|v3", NULL, "v3: all sizes but the layers are DeepSeek-V3's", false, false},
    {"dtype", RT_OPT_CHOICE, V(dtype), "fp8", 0, 0, "fp8|bf16", NULL, "of the matrices", false, false},
    INT("vocab", vocab, "16384", 1e7, "vocabulary"),
    INT("hidden", hidden, "1024", 1e6, "hidden_size"),
    INT("layers", layers, "9", 1e4, "all layers"),
    INT("dense-first", dense_first, "1", 1e4, "layers with a dense MLP"),
    INT("heads", heads, "16", 1e4, "attention heads"),
    INT("q-lora", q_lora, "512", 1e6, "rank of the queries' projection, 0: none"),
    INT("kv-lora", kv_lora, "256", 1e6, "rank of keys and values"),
    INT("dn", dn, "64", 1e5, "head size without positions"),
    INT("dr", dr, "32", 1e5, "head size with positions"),
    INT("dv", dv, "64", 1e5, "head size of values"),
    INT("inter", inter, "2816", 1e6, "width of the dense MLP"),
    INT("moe-inter", moe_inter, "512", 1e6, "width of an expert"),
    INT("experts", experts, "64", 4096, "routed experts"),
    INT("shared", shared, "1", 64, "shared experts"),
    INT("top-k", top_k, "8", 256, "experts of a token"),
    INT("n-group", n_group, "8", 256, "expert groups"),
    INT("topk-group", topk_group, "4", 256, "groups that a token keeps"),
    INT("mtp", mtp, "0", 8, "MTP layers"),
    INT("max-position", max_position, "8192", 1e9, "longest sequence"),
    {"shard-bytes", RT_OPT_BYTES, V(shard_bytes), "512M", 0, 0, NULL, "4G", "most bytes of a file", false, false},
    INT("seed", seed, "1", 1e15, "of the weights"),
    INT("threads", threads, "0", 1024, "files written at a time, 0: as many as cores"),
    {"help", RT_OPT_FLAG, V(help), NULL, 0, 0, NULL, NULL, "this text", false, false},
    {0},
};

enum source { SOURCE_NORMAL, SOURCE_SCALE, SOURCE_ONES };

/* What a tensor is filled with; decl holds its name, type and shape. */
struct tensor {
    enum source source;
    double sd;
};

struct model {
    struct values v;
    struct rt_tensor_decl *decl;
    struct tensor *tensor;
    int64_t n, cap;
    char (*name)[128];
};

/* ---- the table of tensors ---- */
static struct rt_tensor_decl *add_tensor(struct model *m, enum rt_dtype dtype, enum source source, double sd, const char *name, int64_t rows,
                                         int64_t cols)
{
    if (m->n < m->cap) {
        snprintf(m->name[m->n], sizeof m->name[m->n], "%s", name);
        m->decl[m->n] = (struct rt_tensor_decl){.name = m->name[m->n], .dtype = dtype, .ndim = rows > 0 ? 2 : 1,
                                                .ne = {rows > 0 ? rows : cols, cols}};
        m->tensor[m->n] = (struct tensor){source, sd};
    }
    return m->n < m->cap ? &m->decl[m->n++] : (m->n++, NULL); /* without a table only counts */
}

/* A matrix of the layers: with its scales in FP8. */
static void matrix(struct model *m, const char *name, int64_t rows, int64_t cols)
{
    char full[160];
    const double sd = 1 / sqrt((double)cols);
    const bool fp8 = strcmp(m->v.dtype, "fp8") == 0;
    snprintf(full, sizeof full, "%s.weight", name);
    add_tensor(m, fp8 ? RT_E4M3 : RT_BF16, SOURCE_NORMAL, sd, full, rows, cols);
    snprintf(full, sizeof full, "%s.weight_scale_inv", name);
    if (fp8)
        add_tensor(m, RT_F32, SOURCE_SCALE, sd, full, (rows + 127) / 128, (cols + 127) / 128);
}

static void plain(struct model *m, const char *name, enum source source, double sd, int64_t rows, int64_t cols)
{
    char full[160];
    snprintf(full, sizeof full, "%s.weight", name);
    add_tensor(m, RT_BF16, source, sd, full, rows, cols);
}

static void mlp(struct model *m, const char *prefix, int64_t inter)
{
    char name[128];
    snprintf(name, sizeof name, "%s.gate_proj", prefix);
    matrix(m, name, inter, m->v.hidden);
    snprintf(name, sizeof name, "%s.up_proj", prefix);
    matrix(m, name, inter, m->v.hidden);
    snprintf(name, sizeof name, "%s.down_proj", prefix);
    matrix(m, name, m->v.hidden, inter);
}

#define NAME(...) (snprintf(name, sizeof name, __VA_ARGS__), name)

static void layer(struct model *m, long l)
{
    const struct values *v = &m->v;
    char name[128];
    plain(m, NAME("model.layers.%ld.input_layernorm", l), SOURCE_ONES, 0, 0, v->hidden);
    if (v->q_lora > 0) {
        matrix(m, NAME("model.layers.%ld.self_attn.q_a_proj", l), v->q_lora, v->hidden);
        plain(m, NAME("model.layers.%ld.self_attn.q_a_layernorm", l), SOURCE_ONES, 0, 0, v->q_lora);
        matrix(m, NAME("model.layers.%ld.self_attn.q_b_proj", l), v->heads * (v->dn + v->dr), v->q_lora);
    } else {
        matrix(m, NAME("model.layers.%ld.self_attn.q_proj", l), v->heads * (v->dn + v->dr), v->hidden);
    }
    matrix(m, NAME("model.layers.%ld.self_attn.kv_a_proj_with_mqa", l), v->kv_lora + v->dr, v->hidden);
    plain(m, NAME("model.layers.%ld.self_attn.kv_a_layernorm", l), SOURCE_ONES, 0, 0, v->kv_lora);
    matrix(m, NAME("model.layers.%ld.self_attn.kv_b_proj", l), v->heads * (v->dn + v->dv), v->kv_lora);
    matrix(m, NAME("model.layers.%ld.self_attn.o_proj", l), v->hidden, v->heads * v->dv);
    plain(m, NAME("model.layers.%ld.post_attention_layernorm", l), SOURCE_ONES, 0, 0, v->hidden);
    if (l < v->dense_first || v->experts == 0) {
        mlp(m, NAME("model.layers.%ld.mlp", l), v->inter);
        return;
    }
    plain(m, NAME("model.layers.%ld.mlp.gate", l), SOURCE_NORMAL, 1 / sqrt((double)v->hidden), v->experts, v->hidden);
    add_tensor(m, RT_F32, SOURCE_NORMAL, 0.01, NAME("model.layers.%ld.mlp.gate.e_score_correction_bias", l), 0, v->experts);
    for (long e = 0; e < v->experts; e++)
        mlp(m, NAME("model.layers.%ld.mlp.experts.%ld", l, e), v->moe_inter);
    if (v->shared > 0)
        mlp(m, NAME("model.layers.%ld.mlp.shared_experts", l), v->shared * v->moe_inter);
}

static void all_tensors(struct model *m)
{
    const struct values *v = &m->v;
    const double head_sd = 2 / sqrt((double)v->hidden); /* logits of deviation 2 */
    char name[128];
    m->n = 0;
    plain(m, "model.embed_tokens", SOURCE_NORMAL, 1, v->vocab, v->hidden);
    for (long l = 0; l < v->layers + v->mtp; l++) {
        layer(m, l);
        if (l < v->layers)
            continue;
        plain(m, NAME("model.layers.%ld.embed_tokens", l), SOURCE_NORMAL, 1, v->vocab, v->hidden);
        plain(m, NAME("model.layers.%ld.enorm", l), SOURCE_ONES, 0, 0, v->hidden);
        plain(m, NAME("model.layers.%ld.hnorm", l), SOURCE_ONES, 0, 0, v->hidden);
        plain(m, NAME("model.layers.%ld.eh_proj", l), SOURCE_NORMAL, 1 / sqrt(2 * (double)v->hidden), v->hidden, 2 * v->hidden);
        plain(m, NAME("model.layers.%ld.shared_head.norm", l), SOURCE_ONES, 0, 0, v->hidden);
        plain(m, NAME("model.layers.%ld.shared_head.head", l), SOURCE_NORMAL, head_sd, v->vocab, v->hidden);
    }
    plain(m, "model.norm", SOURCE_ONES, 0, 0, v->hidden);
    plain(m, "lm_head", SOURCE_NORMAL, head_sd, v->vocab, v->hidden);
}

/* ---- values ---- */
enum { TABLE = 1 << 16, PIECE = 1 << 20 };

struct tables {
    float normal[TABLE];  /* quantiles: a uniform index gives N(0, 1) */
    uint8_t code[256];    /* the same for codes, deviation CODE_SD */
    uint16_t bf16[TABLE]; /* normal * sd of the tensor at hand */
    uint8_t bytes[4 * PIECE];
    uint8_t pool[4 * PIECE]; /* codes of which those of a tensor are pieces: drawing each would take minutes at full width */
};
#define CODE_SD 128.0 /* 2.9 deviations, the last of 256 quantiles, are below 448 */

/* Inverse of the normal distribution by bisection of erfc. */
static double quantile(double p)
{
    double lo = -9, hi = 9;
    while (hi - lo > 1e-9) {
        const double mid = (lo + hi) / 2;
        *(erfc(-mid / sqrt(2)) / 2 < p ? &lo : &hi) = mid;
    }
    return lo;
}

static void make_tables(struct tables *t, int64_t seed)
{
    float codes[256];
    for (int i = 0; i < TABLE; i++)
        t->normal[i] = (float)quantile((i + 0.5) / TABLE);
    for (int i = 0; i < 256; i++)
        codes[i] = (float)(CODE_SD * quantile((i + 0.5) / 256));
    rt_from_f32(t->code, RT_E4M3, codes, 256);
    for (int i = 0; i < 4 * PIECE; i += 8) {
        const uint64_t r = rt_rng_u64((uint64_t)seed, 77, (uint64_t)i);
        for (int j = 0; j < 8; j++)
            t->pool[i + j] = t->code[r >> 8 * j & 255];
    }
}

/* n elements of tensor i from element `first` on, into t->bytes. */
static void fill(const struct model *m, struct tables *t, int64_t i, int64_t first, int64_t n, uint64_t stream)
{
    const enum rt_dtype dtype = m->decl[i].dtype;
    const struct tensor *x = &m->tensor[i];
    uint16_t *h = (uint16_t *)(void *)t->bytes;
    float *f = (float *)(void *)t->bytes;
    /* one draw of Philox seeds a run of a cheap generator */
    uint64_t s = rt_rng_u64((uint64_t)m->v.seed, stream, (uint64_t)first) | 1;
    if (dtype == RT_E4M3) {
        memcpy(t->bytes, t->pool + s % (3 * PIECE), (size_t)n);
        return;
    }
    for (int64_t j = 0; j < n; j++) {
        if (x->source == SOURCE_ONES) {
            h[j] = 0x3f80;
            continue;
        }
        s ^= s >> 12;
        s ^= s << 25;
        s ^= s >> 27;
        const uint64_t r = s * 0x2545f4914f6cdd1dull;
        if (x->source == SOURCE_SCALE)
            f[j] = (float)(x->sd / CODE_SD * (0.75 + 0.5 * (double)(r >> 11) * 0x1p-53));
        else if (dtype == RT_F32)
            f[j] = (float)x->sd * t->normal[r >> 48];
        else
            h[j] = t->bf16[r >> 48];
    }
}

static uint64_t tensor_bytes(const struct rt_tensor_decl *d)
{
    return (uint64_t)(d->ne[0] * (d->ndim == 2 ? d->ne[1] : 1)) * rt_dtype_size(d->dtype);
}

static enum rt_status write_tensors(const struct model *m, int64_t first, int64_t n, struct rt_tensor_writer *w, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct tables *t = NULL;
    float *scaled = NULL;
    RT_TRY(rt_alloc(TABLE, sizeof *scaled, "table", &scaled, err));
    RT_TRY(rt_alloc(1, sizeof *t, "tables", &t, err));
    make_tables(t, m->v.seed);
    for (int64_t i = first; i < first + n; i++) {
        const struct rt_tensor_decl *d = &m->decl[i];
        const int64_t total = d->ne[0] * (d->ndim == 2 ? d->ne[1] : 1);
        const uint64_t stream = rt_rng_stream(d->name);
        for (int j = 0; d->dtype == RT_BF16 && j < TABLE; j++)
            scaled[j] = (float)m->tensor[i].sd * t->normal[j];
        if (d->dtype == RT_BF16)
            rt_from_f32(t->bf16, RT_BF16, scaled, TABLE);
        for (int64_t at = 0; at < total; at += PIECE) {
            const int64_t k = rt_min64(PIECE, total - at);
            fill(m, t, i, at, k, stream);
            RT_TRY(rt_tensor_writer_put(w, t->bytes, (uint64_t)k * rt_dtype_size(d->dtype), err));
        }
    }
out:
    rt_free(scaled);
    rt_free(t);
    return st;
}

/* Files: runs of tensors, each written by whichever thread is free. */
struct files {
    const struct model *m;
    int64_t *first;     /* [n + 1] */
    struct rt_err *err; /* [n] */
    int64_t n;
};

static void file_name(const struct files *f, int64_t i, char name[64])
{
    if (f->n == 1)
        snprintf(name, 64, "model.safetensors");
    else
        snprintf(name, 64, "model-%05ld-of-%05ld.safetensors", (long)(i + 1), (long)f->n);
}

static void write_file(void *ctx, int64_t i, __attribute__((unused)) int worker)
{
    struct files *f = ctx;
    struct rt_tensor_writer *w = NULL;
    struct rt_err *err = &f->err[i];
    const int64_t n = f->first[i + 1] - f->first[i];
    char name[64], path[4096];
    enum rt_status st;
    file_name(f, i, name);
    RT_TRY(rt_path_join(path, sizeof path, f->m->v.out, name, err));
    RT_TRY(rt_tensor_writer_file(path, f->m->decl + f->first[i], n, &w, err));
    RT_TRY(write_tensors(f->m, f->first[i], n, w, err));
    RT_TRY(rt_tensor_writer_finish(w, err));
out:
    rt_tensor_writer_free(w);
}

static enum rt_status write_index(const struct files *f, uint64_t bytes, struct rt_err *err)
{
    struct rt_buf b = {0};
    char name[64], path[4096];
    enum rt_status st;
    RT_TRY(rt_buf_printf(&b, err, "{\"metadata\":{\"total_size\":%llu},\"weight_map\":{", (unsigned long long)bytes));
    for (int64_t i = 0; i < f->n; i++) {
        file_name(f, i, name);
        for (int64_t j = f->first[i]; j < f->first[i + 1]; j++)
            RT_TRY(rt_buf_printf(&b, err, "%s\n\"%s\":\"%s\"", j > 0 ? "," : "", f->m->decl[j].name, name));
    }
    RT_TRY(rt_buf_puts(&b, "}}\n", err));
    RT_TRY(rt_path_join(path, sizeof path, f->m->v.out, "model.safetensors.index.json", err));
    RT_TRY(rt_publish_bytes(path, b.data, b.len, err));
out:
    rt_buf_free(&b);
    return st;
}

static enum rt_status write_files(const struct model *m, uint64_t *bytes, struct rt_err *err)
{
    struct files f = {.m = m};
    struct rt_pool *pool = NULL;
    uint64_t held = 0;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)m->n + 1, sizeof *f.first, "files", &f.first, err));
    for (int64_t i = 0; i < m->n; i++) {
        const uint64_t b = tensor_bytes(&m->decl[i]);
        if (i > 0 && held + b > (uint64_t)m->v.shard_bytes) {
            f.first[++f.n] = i;
            held = 0;
        }
        held += b;
        *bytes += b;
    }
    f.first[++f.n] = m->n;
    RT_TRY(rt_alloc((size_t)f.n, sizeof *f.err, "files", &f.err, err));
    RT_TRY(rt_pool_create((int)m->v.threads, &pool, err));
    rt_pool_run(pool, f.n, write_file, &f);
    for (int64_t i = 0; i < f.n; i++)
        if (f.err[i].status != RT_OK)
            RT_TRY(rt_fail(err, f.err[i].status, "%s", f.err[i].msg));
    if (f.n > 1)
        RT_TRY(write_index(&f, *bytes, err));
out:
    rt_pool_free(pool);
    rt_free(f.first);
    rt_free(f.err);
    return st;
}

/* ---- configuration ---- */
static const char yarn[] = "{\"type\":\"yarn\",\"factor\":40,\"original_max_position_embeddings\":4096,\"beta_fast\":32,\"beta_slow\":1,"
                           "\"mscale\":1.0,\"mscale_all_dim\":1.0}";

static void v3_geometry(struct values *v)
{
    v->vocab = 129280, v->hidden = 7168, v->heads = 128, v->q_lora = 1536, v->kv_lora = 512, v->dn = 128, v->dr = 64, v->dv = 128;
    v->inter = 18432, v->moe_inter = 2048, v->experts = 256, v->shared = 1, v->top_k = 8, v->n_group = 8, v->topk_group = 4;
    v->max_position = 163840;
}

static enum rt_status write_config(const struct values *v, struct rt_err *err)
{
    struct rt_buf b = {0};
    char path[4096], q[32];
    enum rt_status st;
    snprintf(q, sizeof q, v->q_lora > 0 ? "%ld" : "null", (long)v->q_lora);
    RT_TRY(rt_buf_printf(&b, err,
        "{\"architectures\":[\"DeepseekV3ForCausalLM\"],\"model_type\":\"deepseek_v3\",\"vocab_size\":%ld,\"hidden_size\":%ld,"
        "\"num_hidden_layers\":%ld,\"first_k_dense_replace\":%ld,\"num_attention_heads\":%ld,\"num_key_value_heads\":%ld,\"q_lora_rank\":%s,"
        "\"kv_lora_rank\":%ld,\"qk_nope_head_dim\":%ld,\"qk_rope_head_dim\":%ld,\"v_head_dim\":%ld,\"intermediate_size\":%ld,"
        "\"moe_intermediate_size\":%ld,\"n_routed_experts\":%ld,\"n_shared_experts\":%ld,\"num_experts_per_tok\":%ld,\"n_group\":%ld,"
        "\"topk_group\":%ld,\"num_nextn_predict_layers\":%ld,\"max_position_embeddings\":%ld,", (long)v->vocab, (long)v->hidden,
        (long)v->layers, (long)v->dense_first, (long)v->heads, (long)v->heads, q, (long)v->kv_lora, (long)v->dn, (long)v->dr, (long)v->dv,
        (long)v->inter, (long)v->moe_inter, (long)v->experts, (long)v->shared, (long)v->top_k, (long)v->n_group, (long)v->topk_group,
        (long)v->mtp, (long)v->max_position));
    RT_TRY(rt_buf_puts(&b, "\"moe_layer_freq\":1,\"norm_topk_prob\":true,\"scoring_func\":\"sigmoid\",\"topk_method\":\"noaux_tc\","
        "\"routed_scaling_factor\":2.5,\"rms_norm_eps\":1e-06,\"rope_theta\":10000,\"hidden_act\":\"silu\","
        "\"attention_bias\":false,\"tie_word_embeddings\":false,\"bos_token_id\":0,\"eos_token_id\":1,\"torch_dtype\":\"bfloat16\"", err));
    RT_TRY(rt_buf_printf(&b, err, ",\"rope_scaling\":%s", strcmp(v->geometry, "v3") == 0 ? yarn : "null"));
    if (strcmp(v->dtype, "fp8") == 0)
        RT_TRY(rt_buf_puts(&b, ",\"quantization_config\":{\"activation_scheme\":\"dynamic\",\"fmt\":\"e4m3\",\"quant_method\":\"fp8\","
                               "\"weight_block_size\":[128,128]}", err));
    RT_TRY(rt_buf_puts(&b, "}\n", err));
    RT_TRY(rt_path_join(path, sizeof path, v->out, "config.json", err));
    RT_TRY(rt_publish_bytes(path, b.data, b.len, err));
out:
    rt_buf_free(&b);
    return st;
}

static enum rt_status make(struct model *m, struct rt_err *err)
{
    uint64_t bytes = 0;
    char size[32];
    enum rt_status st;
    if (strcmp(m->v.geometry, "v3") == 0)
        v3_geometry(&m->v);
    all_tensors(m);
    RT_TRY(rt_alloc((size_t)m->n, sizeof *m->decl, "table of tensors", &m->decl, err));
    RT_TRY(rt_alloc((size_t)m->n, sizeof *m->tensor, "table of tensors", &m->tensor, err));
    RT_TRY(rt_alloc((size_t)m->n, sizeof *m->name, "table of tensors", &m->name, err));
    m->cap = m->n;
    all_tensors(m);
    RT_TRY(rt_mkdirs(m->v.out, err));
    RT_TRY(write_files(m, &bytes, err));
    RT_TRY(write_config(&m->v, err));
    printf("%s: %ld tensors, %s\n", m->v.out, (long)m->n, rt_human_bytes(size, bytes));
out:
    rt_free(m->decl);
    rt_free(m->tensor);
    rt_free(m->name);
    return st;
}

int main(int argc, char **argv)
{
    struct model m = {.n = 0};
    struct rt_err err = {0};
    enum rt_status st = bench_command(options, argc, argv, &m.v, &m.v.help, NULL, &err);
    if (st == RT_OK && m.v.help)
        return 0;
    if (st == RT_OK)
        st = make(&m, &err);
    if (st != RT_OK)
        bench_fatal("bench_make_teacher", &err);
    return 0;
}
