#include "tests/student_fixture.h"

#include <stdlib.h>
#include <string.h>

#include "core/rng.h"

const char *const fx_config[FX_N] = {
    [FX_QWEN2] = "{\"model_type\": \"qwen2\", \"vocab_size\": 61, \"hidden_size\": 32, \"intermediate_size\": 40, \"num_hidden_layers\": 2, "
                 "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 64, "
                 "\"tie_word_embeddings\": true, \"rope_theta\": 10000.0, \"torch_dtype\": \"float32\"}",
    [FX_QWEN3] = "{\"model_type\": \"qwen3\", \"vocab_size\": 53, \"hidden_size\": 24, \"intermediate_size\": 36, \"num_hidden_layers\": 2, "
                 "\"num_attention_heads\": 4, \"num_key_value_heads\": 1, \"head_dim\": 10, \"rms_norm_eps\": 1e-6, "
                 "\"max_position_embeddings\": 64, \"tie_word_embeddings\": true, \"attention_bias\": false, \"torch_dtype\": \"float32\"}",
    [FX_LLAMA] = "{\"model_type\": \"llama\", \"vocab_size\": 47, \"hidden_size\": 24, \"intermediate_size\": 28, \"num_hidden_layers\": 2, "
                 "\"num_attention_heads\": 6, \"num_key_value_heads\": 3, \"rms_norm_eps\": 1e-5, \"max_position_embeddings\": 64, "
                 "\"attention_bias\": true, \"mlp_bias\": true, \"dtype\": \"float32\", \"rope_parameters\": {\"rope_type\": \"llama3\", "
                 "\"rope_theta\": 500.0, \"factor\": 4.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
                 "\"original_max_position_embeddings\": 32}}",
};

const struct rt_backend *fx_backend(const char *name)
{
    const struct rt_backend *const *list = rt_backend_list();
    char why[128];
    for (; *list != NULL; list++)
        if (strcmp((*list)->name, name) == 0 && (*list)->available(why, sizeof why))
            return *list;
    return NULL;
}

static void *take(struct fx *f, size_t bytes)
{
    struct rt_err err = {0};
    void *p = NULL;
    assert_ok(rt_arena_alloc(&f->loss, bytes, &p, &err));
    return p;
}

static void randomise(struct fx *f)
{
    struct rt_err err = {0};
    for (int i = 0; i < f->p.n; i++) {
        const struct rt_param *p = &f->p.at[i];
        const int64_t n = rt_param_elements(p);
        float *x = malloc((size_t)n * sizeof *x);
        const bool norm = p->kind == RT_PARAM_NORM;
        for (int64_t j = 0; j < n; j++)
            x[j] = (norm ? 1.0f : 0.0f) + 0.25f * rt_rng_normal(7, rt_rng_stream(p->name), (uint64_t)j);
        assert_ok(rt_param_upload(&f->d, rt_student_block(f->s), p, 0, n, x, &err));
        free(x);
    }
}

void fx_open(struct fx *f, const struct rt_backend *be, int threads, const char *config)
{
    struct rt_err err = {0};
    memset(f, 0, sizeof *f);
    assert_ok(rt_device_open(be, &(struct rt_dev_options){.threads = threads}, &f->d, &err));
    assert_ok(rt_student_config_parse(config, strlen(config), "fixture", &f->c, &err));
    assert_ok(rt_params_create(&f->c, &f->p, &err));
    const size_t act = rt_device_act_size(&f->d);
    assert_ok(rt_device_arena(&f->d, rt_student_weight_bytes(&f->c, &f->p, FX_TOKENS, act), "weights", &f->weights, &err));
    assert_ok(rt_device_arena(&f->d, rt_params_bytes(&f->p, act), "gradients", &f->grads, &err));
    assert_ok(rt_device_arena(&f->d, rt_student_activation_bytes(&f->c, FX_TOKENS, RT_KEEP_ALL, act), "activations", &f->acts, &err));
    assert_ok(rt_device_arena(&f->d, rt_optimizer_bytes(&f->p, act, false), "moments", &f->moments, &err));
    assert_ok(rt_device_arena(&f->d, 1 << 20, "loss", &f->loss, &err));
    assert_ok(rt_student_create(&f->d, &f->c, &f->p, FX_TOKENS, &f->weights, &f->s, &err));
    assert_ok(rt_student_attach_grads(f->s, &f->grads, &err));
    randomise(f);
    const size_t n = FX_TOKENS, H = (size_t)f->c.hidden;
    f->dx = take(f, n * H * act);
    f->dh = take(f, 3 * n * H * act);
    f->label = take(f, n * sizeof *f->label);
    f->top = take(f, n * FX_TOP * sizeof *f->top);
    f->logp = take(f, n * FX_TOP * sizeof *f->logp);
    f->target = take(f, n * H * sizeof *f->target);
    f->mask = take(f, n);
    f->ce = take(f, n * sizeof *f->ce);
    f->kl = take(f, n * sizeof *f->kl);
    f->feature = take(f, n * sizeof *f->feature);
}

void fx_close(struct fx *f)
{
    rt_student_free(f->s);
    rt_device_arena_free(&f->d, &f->weights);
    rt_device_arena_free(&f->d, &f->grads);
    rt_device_arena_free(&f->d, &f->acts);
    rt_device_arena_free(&f->d, &f->moments);
    rt_device_arena_free(&f->d, &f->loss);
    rt_params_free(&f->p);
    rt_student_config_free(&f->c);
    rt_device_close(&f->d);
}

void fx_docs(struct fx_docs *docs, const struct fx *f, uint64_t seed, const int *lens, int n_seq)
{
    memset(docs, 0, sizeof *docs);
    docs->n_seq = n_seq;
    for (int i = 0; i < n_seq; i++)
        docs->cu[i + 1] = docs->cu[i] + lens[i];
    docs->n = docs->cu[n_seq];
    assert_true(docs->n <= FX_TOKENS);
    for (int64_t i = 0; i < docs->n; i++)
        docs->ids[i] = (int32_t)(rt_rng_u64(seed, 1, (uint64_t)i) % (uint64_t)f->c.vocab_size);
}

struct fx_docs fx_one(const struct fx_docs *docs, int i)
{
    struct fx_docs one = {.n = docs->cu[i + 1] - docs->cu[i], .n_seq = 1, .first = docs->first + docs->cu[i]};
    memcpy(one.ids, docs->ids + docs->cu[i], (size_t)one.n * sizeof *one.ids);
    one.cu[1] = (int32_t)one.n;
    return one;
}

struct rt_student_batch fx_batch(const struct fx_docs *docs)
{
    return (struct rt_student_batch){docs->ids, docs->cu, docs->n, docs->n_seq};
}

/* Targets of the row that stands at `place` in the whole. */
static void fill_targets(struct fx *f, const struct fx_docs *docs)
{
    struct rt_err err = {0};
    int32_t label[FX_TOKENS], top[FX_TOKENS * FX_TOP];
    float logp[FX_TOKENS * FX_TOP], *target = malloc((size_t)(FX_TOKENS * f->c.hidden) * sizeof *target);
    uint8_t mask[FX_TOKENS];
    const int64_t V = f->c.vocab_size, H = f->c.hidden;
    for (int64_t i = 0; i < docs->n; i++) {
        const uint64_t place = (uint64_t)(docs->first + i);
        label[i] = place % 5 == 4 ? -100 : (int32_t)(rt_rng_u64(11, 2, place) % (uint64_t)V);
        mask[i] = place % 7 != 3;
        for (int j = 0; j < FX_TOP; j++) {
            top[i * FX_TOP + j] = (int32_t)((rt_rng_u64(11, 3, place) + (uint64_t)j * 5) % (uint64_t)V);
            logp[i * FX_TOP + j] = -1.2f - (float)j - (float)rt_rng_uniform(11, 4, place);
        }
        for (int64_t j = 0; j < H; j++)
            target[i * H + j] = rt_rng_normal(11, 5, place * (uint64_t)H + (uint64_t)j);
    }
    const size_t n = (size_t)docs->n;
    assert_ok(rt_device_upload(&f->d, f->label, label, n * sizeof *label, &err));
    assert_ok(rt_device_upload(&f->d, f->top, top, n * FX_TOP * sizeof *top, &err));
    assert_ok(rt_device_upload(&f->d, f->logp, logp, n * FX_TOP * sizeof *logp, &err));
    assert_ok(rt_device_upload(&f->d, f->target, target, n * (size_t)H * sizeof *target, &err));
    assert_ok(rt_device_upload(&f->d, f->mask, mask, n, &err));
    assert_ok(rt_device_sync(&f->d, &err));
    free(target);
}

static double sum_rows(const struct fx *f, const double *rows, int64_t n)
{
    struct rt_err err = {0};
    double host[FX_TOKENS], sum = 0;
    assert_ok(rt_device_download(&f->d, host, rows, (size_t)n * sizeof *host, &err));
    for (int64_t i = 0; i < n; i++)
        sum += host[i];
    return sum;
}

double fx_loss(struct fx *f, const struct fx_docs *docs, bool backward)
{
    struct rt_err err = {0};
    const double w_ce = 0.05, w_kl = 0.02, w_feature = 0.03;
    const struct rt_student_batch b = fx_batch(docs);
    const int64_t n = docs->n, H = f->c.hidden;
    fill_targets(f, docs);
    assert_ok(rt_student_forward(f->s, &b, RT_KEEP_ALL, &f->acts, &err));
    const struct rt_student_head head = rt_student_head(f->s);
    assert_ok(RT_OP(&f->d, head_loss, &err, .x = rt_student_hidden(f->s, RT_LAYER_FINAL), .w = head.w, .dx = backward ? f->dx : NULL,
                    .dw = backward ? head.dw : NULL, .n = n, .H = H, .V = head.V, .label = f->label, .k = FX_TOP, .top_ids = f->top,
                    .top_logp = f->logp, .kl_mask = f->mask, .tail = RT_TAIL_BUCKET, .w_ce = w_ce, .w_kl = w_kl, .T = 2, .ce = f->ce,
                    .kl = f->kl));
    double loss = w_ce * sum_rows(f, f->ce, n) + w_kl * sum_rows(f, f->kl, n);
    struct rt_student_extra extra[3];
    const int layers[3] = {0, 1, f->c.layers};
    for (int i = 0; i < 3; i++) {
        void *da = (char *)f->dh + (size_t)i * FX_TOKENS * (size_t)H * rt_device_act_size(&f->d);
        assert_ok(RT_OP(&f->d, feature_loss, &err, .a = rt_student_hidden(f->s, layers[i]), .b = f->target, .da = da, .loss = f->feature,
                        .w = w_feature, .n = n, .cols = H));
        loss += w_feature * sum_rows(f, f->feature, n);
        extra[i] = (struct rt_student_extra){layers[i], da};
    }
    if (backward)
        assert_ok(rt_student_backward(f->s, f->dx, extra, 3, f->first, &err));
    return loss;
}

void fx_first_backward(const struct rt_backend *be, const char *config, const int *lens, int n_seq)
{
    struct rt_err err = {0};
    struct fx f;
    struct fx_docs docs;
    fx_open(&f, be, 2, config);
    fx_docs(&docs, &f, 5, lens, n_seq);
    const size_t bytes = (size_t)f.p.elements * rt_device_act_size(&f.d);
    float **want = malloc((size_t)f.p.n * sizeof *want);
    void *nans = malloc(bytes);
    fx_loss(&f, &docs, true);
    for (int i = 0; i < f.p.n; i++)
        want[i] = fx_grad(&f, i);
    memset(nans, 0xff, bytes);
    assert_ok(rt_device_upload(&f.d, rt_student_grads(f.s), nans, bytes, &err));
    assert_ok(rt_student_zero_outer_grads(f.s, &err));
    f.first = true;
    fx_loss(&f, &docs, true);
    for (int i = 0; i < f.p.n; i++) {
        float *got = fx_grad(&f, i);
        for (int64_t j = 0; j < rt_param_elements(&f.p.at[i]); j++)
            if (!(got[j] == want[i][j])) /* which -0 and 0 are */
                fail_msg("%s %s: element %lld is %g, expected %g", be->name, f.p.at[i].name, (long long)j, (double)got[j], (double)want[i][j]);
        free(got);
        free(want[i]);
    }
    free(want);
    free(nans);
    fx_close(&f);
}

float *fx_grad(const struct fx *f, int i)
{
    struct rt_err err = {0};
    const int64_t n = rt_param_elements(&f->p.at[i]);
    float *x = malloc((size_t)n * sizeof *x);
    assert_ok(rt_param_download(&f->d, rt_student_grads(f->s), &f->p.at[i], 0, n, x, &err));
    return x;
}

void fx_fetch(const struct fx *f, const void *x, int64_t n, float *out)
{
    struct rt_err err = {0};
    void *tmp = malloc((size_t)n * rt_device_act_size(&f->d));
    assert_ok(rt_device_download(&f->d, tmp, x, (size_t)n * rt_device_act_size(&f->d), &err));
    assert_true(rt_to_f32(out, tmp, f->d.be->act, (size_t)n));
    free(tmp);
}

float *fx_forward_logits(struct fx *f, const struct fx_docs *docs)
{
    struct rt_err err = {0};
    const struct rt_student_batch b = fx_batch(docs);
    assert_ok(rt_student_forward(f->s, &b, RT_KEEP_FINAL, &f->acts, &err));
    const struct rt_student_head head = rt_student_head(f->s);
    const size_t bytes = (size_t)(docs->n * head.V) * sizeof(float);
    float *out = malloc(bytes);
    void *dev = NULL;
    assert_ok(f->d.be->alloc(f->d.dev, bytes, &dev, &err));
    assert_ok(RT_OP(&f->d, linear_fwd, &err, .x = {.data = (void *)(uintptr_t)rt_student_hidden(f->s, RT_LAYER_FINAL)}, .w = head.w, .y = dev,
                    .n = docs->n, .K = head.H, .N = head.V, .y_f32 = true));
    assert_ok(rt_device_download(&f->d, out, dev, bytes, &err));
    f->d.be->free(f->d.dev, dev);
    return out;
}
