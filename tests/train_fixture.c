#include "tests/train_fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/rng.h"

static const char *const configs[] = {
    "{\"model_type\": \"qwen2\", \"vocab_size\": 61, \"hidden_size\": 32, \"intermediate_size\": 40, \"num_hidden_layers\": 2, "
    "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 64, "
    "\"tie_word_embeddings\": true, \"rope_theta\": 10000.0, \"torch_dtype\": \"float32\", \"initializer_range\": 0.2}",
    "{\"model_type\": \"llama\", \"vocab_size\": 61, \"hidden_size\": 24, \"intermediate_size\": 28, \"num_hidden_layers\": 2, "
    "\"num_attention_heads\": 6, \"num_key_value_heads\": 3, \"rms_norm_eps\": 1e-5, \"max_position_embeddings\": 64, "
    "\"tie_word_embeddings\": false, \"dtype\": \"float32\", \"initializer_range\": 0.2}",
    "{\"model_type\": \"qwen2\", \"vocab_size\": 331, \"hidden_size\": 64, \"intermediate_size\": 160, \"num_hidden_layers\": 3, "
    "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 64, "
    "\"tie_word_embeddings\": true, \"rope_theta\": 10000.0, \"torch_dtype\": \"float32\", \"initializer_range\": 0.2}",
};

const char *tf_config(int config)
{
    return configs[config];
}

void tf_data(struct tf_data *t, int64_t vocab, uint64_t seed)
{
    memset(t, 0, sizeof *t);
    for (int s = 0; s < TF_SEQS; s++) {
        t->len[s] = 8 + (int64_t)(rt_rng_u64(seed, 1, (uint64_t)s) % 16);
        for (int64_t i = 0; i < t->len[s]; i++) {
            t->ids[s][i] = (uint32_t)(rt_rng_u64(seed, 2, (uint64_t)(s * TF_LEN + i)) % (uint64_t)vocab);
            t->mask[s][i] = i >= t->len[s] / 3;
        }
        for (int i = 0; i < TF_LEN * TF_DIM; i++)
            t->state[s][i] = rt_f32_to_bf16(rt_rng_normal(seed, 3, (uint64_t)(s * TF_LEN * TF_DIM + i)));
    }
    t->id = (struct rt_row_identity){.vocab_size = vocab, .n_ids = vocab, .top_k = TF_K, .n_lse = 2, .lse_temperature = {1, 2}, .n_features = 2,
                                     .feature = {{1, TF_DIM, RT_BF16, false}, {RT_LAYER_FINAL, TF_DIM, RT_BF16, false}}};
    memset(t->id.teacher_sha256, 'a', 64);
    strcpy(t->id.teacher_name, "itself");
    strcpy(t->id.mode, "f32");
}

void tf_open(struct tf *f, const struct rt_backend *be, int threads, int config, float scale)
{
    tf_open_on(f, be, &(struct rt_dev_options){.threads = threads}, config, scale);
}

void tf_open_on(struct tf *f, const struct rt_backend *be, const struct rt_dev_options *o, int config, float scale)
{
    struct rt_err err = {0};
    memset(f, 0, sizeof *f);
    assert_ok(rt_device_open(be, o, &f->d, &err));
    assert_ok(rt_student_config_parse(configs[config], strlen(configs[config]), "fixture", &f->c, &err));
    assert_ok(rt_params_create(&f->c, &f->p, &err));
    const size_t act = rt_device_act_size(&f->d);
    assert_ok(rt_device_arena(&f->d, rt_student_weight_bytes(&f->c, &f->p, 64, act), "weights", &f->weights, &err));
    assert_ok(rt_student_create(&f->d, &f->c, &f->p, 64, &f->weights, &f->s, &err));
    assert_ok(rt_student_init(f->s, 5, &err));
    for (int i = 0; i < f->p.n && scale > 0; i++) {
        const struct rt_param *p = &f->p.at[i];
        const int64_t n = rt_param_elements(p);
        float *x = malloc((size_t)n * sizeof *x);
        for (int64_t j = 0; j < n; j++)
            x[j] = (p->kind == RT_PARAM_NORM ? 1.0f : 0.0f) + scale * rt_rng_normal(7, rt_rng_stream(p->name), (uint64_t)j);
        assert_ok(rt_param_upload(&f->d, rt_student_block(f->s), p, 0, n, x, &err));
        free(x);
    }
    if (scale <= 0)
        assert_ok(rt_device_zero(&f->d, rt_student_block(f->s), (size_t)f->p.elements * act, &err));
}

void tf_close(struct tf *f)
{
    rt_student_free(f->s);
    rt_device_arena_free(&f->d, &f->weights);
    rt_params_free(&f->p);
    rt_student_config_free(&f->c);
    rt_device_close(&f->d);
}

static void score_one(struct tf_data *t, struct tf *f, struct rt_arena *acts, int s)
{
    struct rt_err err = {0};
    const int64_t n = t->len[s];
    int32_t ids[TF_LEN], cu[2] = {0, (int32_t)n}, next[TF_LEN];
    const float inv[2] = {1, 0.5f};
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)t->ids[s][i];
    for (int64_t i = 0; i + 1 < n; i++) {
        next[i] = ids[i + 1];
        t->position[s][i] = (uint32_t)i;
        t->next[s][i] = (uint32_t)ids[i + 1];
    }
    const struct rt_student_batch b = {ids, cu, n, 1};
    assert_ok(rt_student_forward(f->s, &b, RT_KEEP_FINAL, acts, &err));
    const struct rt_student_head head = rt_student_head(f->s);
    /* on ref and cpu device memory is the host's */
    assert_ok(RT_OP(&f->d, head_topk, &err, .x = rt_student_hidden(f->s, RT_LAYER_FINAL), .w = head.w, .next = next, .n = n - 1, .H = head.H,
                    .n_ids = head.V, .k = TF_K, .n_lse = 2, .inv_temp = inv, .topk_ids = t->top_ids[s], .topk_logits = t->logits[s], .lse = t->lse[s],
                    .next_logprob = t->logprob[s], .next_rank = t->rank[s]));
}

void tf_score(struct tf_data *t, struct tf *f)
{
    struct rt_err err = {0};
    struct rt_arena acts = {0};
    assert_ok(rt_device_arena(&f->d, rt_student_activation_bytes(&f->c, TF_LEN, RT_KEEP_FINAL, rt_device_act_size(&f->d)), "acts", &acts, &err));
    for (int s = 0; s < TF_SEQS; s++)
        score_one(t, f, &acts, s);
    rt_device_arena_free(&f->d, &acts);
}

static void block(const struct tf_data *t, int64_t i, struct rt_rows *r)
{
    *r = (struct rt_rows){.source_line = i + 1, .n_tokens = t->len[i], .ids = t->ids[i], .loss_mask = t->mask[i], .n_rows = t->len[i] - 1, .k = TF_K,
                          .n_lse = 2, .position = t->position[i], .topk_ids = t->top_ids[i], .topk_logits = t->logits[i], .lse = t->lse[i],
                          .next_id = t->next[i], .next_logprob = t->logprob[i], .next_rank = t->rank[i], .n_features = 2,
                          .feature = {t->state[i], t->state[i]}};
    rt_rows_key(r->ids, r->n_tokens, r->key);
}

static enum rt_status get(void *self, int64_t i, struct rt_rows *out, bool *end, struct rt_err *err)
{
    (void)err;
    *end = false;
    block(self, i, out);
    return RT_OK;
}

struct rt_row_source tf_source(struct tf_data *t)
{
    return (struct rt_row_source){.self = t, .count = TF_SEQS, .identity = &t->id, .get = get};
}

struct rt_train_set *tf_set(struct tf_data *t, struct tf *f, bool features)
{
    struct rt_err err = {0};
    struct rt_train_set *set = NULL;
    const struct rt_row_source source = tf_source(t);
    const struct rt_train_set_options o = {.model = &f->model, .vocab = f->c.vocab_size, .max_length = 64, .features = features};
    assert_ok(rt_train_set_memory(&source, &o, &set, &err));
    return set;
}

const char *tf_write_student(const char *name, int config, uint64_t seed)
{
    struct rt_err err = {0};
    struct tf f;
    const char *path = test_tmp(name);
    tf_open(&f, &rt_backend_ref, 1, config, 0.2f);
    assert_ok(rt_student_init(f.s, seed, &err));
    const struct rt_student_save o = {.dtype = RT_F32};
    assert_ok(rt_student_save(f.s, &o, path, &err));
    tf_close(&f);
    return path;
}

const char *tf_write_shards(const char *name, struct tf_data *t)
{
    struct rt_err err = {0};
    struct rt_shard_sink *sink = NULL;
    struct rt_row_sink put;
    struct rt_shard_resume resume;
    const struct rt_shard_options o = {0};
    const char *path = test_tmp(name);
    assert_ok(rt_shard_sink_open(path, &t->id, &o, &sink, &put, &resume, &err));
    for (int i = 0; i < TF_SEQS; i++) {
        struct rt_rows r;
        block(t, i, &r);
        assert_ok(put.put(put.self, &r, &err));
    }
    assert_ok(put.finish(put.self, &err));
    rt_shard_sink_free(sink);
    return path;
}

const char *tf_write_lines(const char *name, const struct tf_data *t)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    const char *path = test_tmp(name);
    for (int s = 0; s < TF_SEQS; s++) {
        for (int64_t i = 0; i < t->len[s]; i++)
            assert_ok(rt_buf_printf(&b, &err, "%s%u", i == 0 ? "{\"input_ids\": [" : ", ", t->ids[s][i]));
        for (int64_t i = 0; i < t->len[s]; i++)
            assert_ok(rt_buf_printf(&b, &err, "%s%d", i == 0 ? "], \"loss_mask\": [" : ", ", t->mask[s][i]));
        assert_ok(rt_buf_printf(&b, &err, "]}\n"));
    }
    assert_ok(rt_publish_bytes(path, b.data, b.len, &err));
    rt_buf_free(&b);
    return path;
}

float *tf_params(struct tf *f)
{
    struct rt_err err = {0};
    float *x = calloc((size_t)f->p.elements, sizeof *x);
    assert_non_null(x);
    for (int i = 0; i < f->p.n; i++)
        assert_ok(rt_param_download(&f->d, rt_student_block(f->s), &f->p.at[i], 0, rt_param_elements(&f->p.at[i]), x + f->p.at[i].offset, &err));
    return x;
}

struct rt_trainer_options tf_options(void)
{
    return (struct rt_trainer_options){.w = {.ce = 0.5, .kl = 0.5, .T = 2, .tail = RT_TAIL_BUCKET}, .teacher_T = 2,
                                       .adamw = {0.9, 0.95, 1e-8, 0.01, 1, true, false, 0}, .k = TF_K, .batch_tokens = 80, .micro_tokens = 80, .seed = 3};
}

bool tf_same_block(const struct tf *a, const struct tf *b)
{
    return memcmp(rt_student_block(a->s), rt_student_block(b->s), (size_t)a->p.elements * rt_device_act_size(&a->d)) == 0;
}

float *tf_grads(const struct tf *f)
{
    float *g = malloc((size_t)f->p.elements * sizeof *g);
    assert_true(rt_to_f32(g, rt_student_grads(f->s), f->d.be->act, (size_t)f->p.elements));
    return g;
}

void tf_files_make(struct tf_files *f, const char *suite)
{
    struct tf t;
    char name[3][64];
    if (f->data != NULL)
        return;
    f->data = malloc(sizeof *f->data);
    tf_open(&t, &rt_backend_cpu, 1, TF_UNTIED, 0.4f);
    tf_data(f->data, t.c.vocab_size, 11);
    tf_score(f->data, &t);
    tf_close(&t);
    snprintf(name[0], sizeof name[0], "%s-student", suite);
    snprintf(name[1], sizeof name[1], "%s-shards", suite);
    snprintf(name[2], sizeof name[2], "%s-lines.jsonl", suite);
    f->student = strdup(tf_write_student(name[0], TF_TIED, 1));
    f->shards = strdup(tf_write_shards(name[1], f->data));
    f->lines = strdup(tf_write_lines(name[2], f->data));
}

void tf_files_free(struct tf_files *f)
{
    free(f->data);
    free(f->student);
    free(f->shards);
    free(f->lines);
    *f = (struct tf_files){0};
}

struct rt_buf tf_read(const char *dir, const char *name)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char path[4096];
    assert_ok(rt_path_join(path, sizeof path, dir, name, &err));
    assert_ok(rt_file_read_all(path, 1 << 24, &b, &err));
    return b;
}
