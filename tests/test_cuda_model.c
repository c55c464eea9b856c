/* The cuda backend: whole students against the cpu backend in float32, from the same parameters rounded to bfloat16. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "student/decode.h"
#include "student/save.h"
#include "tests/cuda_ops.h"
#include "tests/student_fixture.h"

static const char *const configs[] = {
    "{\"model_type\": \"qwen2\", \"vocab_size\": 331, \"hidden_size\": 64, \"intermediate_size\": 256, \"num_hidden_layers\": 3, "
    "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 64, "
    "\"tie_word_embeddings\": true, \"rope_theta\": 10000.0, \"torch_dtype\": \"bfloat16\"}",
    "{\"model_type\": \"qwen3\", \"vocab_size\": 253, \"hidden_size\": 48, \"intermediate_size\": 72, \"num_hidden_layers\": 2, "
    "\"num_attention_heads\": 3, \"num_key_value_heads\": 1, \"head_dim\": 32, \"rms_norm_eps\": 1e-6, "
    "\"max_position_embeddings\": 64, \"tie_word_embeddings\": true, \"attention_bias\": false, \"torch_dtype\": \"bfloat16\"}",
    "{\"model_type\": \"llama\", \"vocab_size\": 203, \"hidden_size\": 96, \"intermediate_size\": 128, \"num_hidden_layers\": 2, "
    "\"num_attention_heads\": 6, \"num_key_value_heads\": 3, \"rms_norm_eps\": 1e-5, \"max_position_embeddings\": 64, "
    "\"attention_bias\": true, \"mlp_bias\": true, \"dtype\": \"bfloat16\", \"rope_parameters\": {\"rope_type\": \"llama3\", "
    "\"rope_theta\": 500.0, \"factor\": 4.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
    "\"original_max_position_embeddings\": 32}}",
};
enum { N_CONFIGS = sizeof configs / sizeof configs[0] };
static const int lens[] = {17, 1, 30, 16};

/* Matrices of the layers take 0.4 of what the fixture gives them: sizes of trained models. With all of it softmaxes are saturated, and rounding anywhere
 * decides between answers. */
static void calm(struct fx *f)
{
    struct rt_err err = {0};
    for (int i = 0; i < f->p.n; i++) {
        const int64_t n = rt_param_elements(&f->p.at[i]);
        if (f->p.at[i].kind != RT_PARAM_MATRIX)
            continue;
        float *x = malloc((size_t)n * sizeof *x);
        assert_ok(rt_param_download(&f->d, rt_student_block(f->s), &f->p.at[i], 0, n, x, &err));
        for (int64_t j = 0; j < n; j++)
            x[j] *= 0.4f;
        assert_ok(rt_param_upload(&f->d, rt_student_block(f->s), &f->p.at[i], 0, n, x, &err));
        free(x);
    }
}

/* to's parameters = from's, which the narrower of the two has rounded. */
static void copy_parameters(struct fx *to, const struct fx *from)
{
    struct rt_err err = {0};
    for (int i = 0; i < to->p.n; i++) {
        const int64_t n = rt_param_elements(&to->p.at[i]);
        float *x = malloc((size_t)n * sizeof *x);
        assert_ok(rt_param_download(&from->d, rt_student_block(from->s), &from->p.at[i], 0, n, x, &err));
        assert_ok(rt_param_upload(&to->d, rt_student_block(to->s), &to->p.at[i], 0, n, x, &err));
        free(x);
    }
}

static bool open_both(struct fx *gpu, struct fx *cpu, const char *config)
{
    const struct rt_backend *be = fx_backend("cuda");
    if (be == NULL)
        return false;
    fx_open(gpu, be, 1, config);
    calm(gpu);
    fx_open(cpu, fx_backend("cpu") != NULL ? fx_backend("cpu") : &rt_backend_ref, 1, config);
    copy_parameters(cpu, gpu);
    return true;
}

struct angle {
    double aa, ab, bb;
};

static struct angle compare(const float *a, const float *b, int64_t n)
{
    struct angle s = {0};
    for (int64_t j = 0; j < n; j++) {
        s.aa += (double)a[j] * a[j];
        s.ab += (double)a[j] * b[j];
        s.bb += (double)b[j] * b[j];
    }
    return s;
}

/* Cosine above 0.999 for each tensor whose gradient is more than a hundredth of the whole; for the whole likewise, and its norm within 1 %. */
static void compare_gradients(const struct fx *gpu, const struct fx *cpu)
{
    struct angle each[256], all = {0};
    assert_true(gpu->p.n <= 256);
    for (int i = 0; i < gpu->p.n; i++) {
        float *a = fx_grad(gpu, i), *b = fx_grad(cpu, i);
        each[i] = compare(a, b, rt_param_elements(&gpu->p.at[i]));
        all = (struct angle){all.aa + each[i].aa, all.ab + each[i].ab, all.bb + each[i].bb};
        free(a);
        free(b);
    }
    double worst = 1;
    int at = -1, n = 0;
    for (int i = 0; i < gpu->p.n; i++) {
        const double cosine = each[i].ab / sqrt(each[i].aa * each[i].bb);
        if (!(sqrt(each[i].bb) > 1e-2 * sqrt(all.bb)))
            continue;
        n++;
        if (!(cosine >= worst)) {
            worst = cosine;
            at = i;
        }
        if (!(cosine > 0.999))
            fail_msg("%s: cosine of the gradients %.6f", gpu->p.at[i].name, cosine);
    }
    print_message("    %d of %d gradients, worst cosine %.6f (%s), norm %.6g against %.6g\n", n, gpu->p.n, worst, at >= 0 ? gpu->p.at[at].name : "",
                  sqrt(all.aa), sqrt(all.bb));
    assert_true(n > gpu->p.n / 4);
    assert_true(all.ab / sqrt(all.aa * all.bb) > 0.999 && fabs(sqrt(all.aa / all.bb) - 1) < 1e-2);
}

static void test_loss_and_gradients(void **state)
{
    (void)state;
    for (int c = 0; c < N_CONFIGS; c++) {
        struct fx gpu, cpu;
        struct fx_docs docs;
        struct rt_err err = {0};
        if (!open_both(&gpu, &cpu, configs[c]))
            TEST_SKIP("no GPU");
        fx_docs(&docs, &gpu, 3, lens, 4);
        const double want = fx_loss(&cpu, &docs, true), got = fx_loss(&gpu, &docs, true);
        print_message("    loss %.6f, in float32 %.6f\n", got, want);
        assert_true(fabs(got - want) < 3e-3 * fabs(want)); /* activations of 8 bits, a few thousand rows and columns averaged */
        compare_gradients(&gpu, &cpu);
        /* the same bits again */
        const size_t bytes = (size_t)gpu.p.elements * 2;
        uint16_t *once = malloc(bytes), *again = malloc(bytes);
        assert_ok(rt_device_download(&gpu.d, once, rt_student_grads(gpu.s), bytes, &err));
        assert_ok(rt_student_zero_grads(gpu.s, &err));
        assert_true(fx_loss(&gpu, &docs, true) == got);
        assert_ok(rt_device_download(&gpu.d, again, rt_student_grads(gpu.s), bytes, &err));
        assert_memory_equal(once, again, bytes);
        free(once);
        free(again);
        fx_close(&gpu);
        fx_close(&cpu);
    }
}

static void test_first_backward(void **state)
{
    (void)state;
    if (fx_backend("cuda") == NULL)
        TEST_SKIP("no GPU");
    for (int c = 0; c < N_CONFIGS; c++)
        fx_first_backward(fx_backend("cuda"), configs[c], lens, 4);
}

/* What is kept instead of computed again changes no bit. */
static void test_keep(void **state)
{
    (void)state;
    for (int c = 0; c < N_CONFIGS; c++) {
        struct fx f;
        struct fx_docs docs;
        struct rt_err err = {0};
        struct rt_arena acts;
        uint16_t *got[2];
        if (fx_backend("cuda") == NULL)
            TEST_SKIP("no GPU");
        fx_open(&f, fx_backend("cuda"), 1, configs[c]);
        fx_docs(&docs, &f, 3, lens, 4);
        const struct rt_student_batch b = fx_batch(&docs);
        const size_t bytes = (size_t)f.p.elements * 2;
        fx_loss(&f, &docs, true); /* labels and the rest lie in f */
        for (int i = 0; i < 2; i++) {
            const enum rt_student_keep keep = i == 0 ? RT_KEEP_ALL : RT_KEEP_MORE;
            const struct rt_student_head head = rt_student_head(f.s);
            assert_ok(rt_device_arena(&f.d, rt_student_activation_bytes(&f.c, docs.n, keep, 2), "activations", &acts, &err));
            assert_ok(rt_student_zero_grads(f.s, &err));
            assert_ok(rt_student_forward(f.s, &b, keep, &acts, &err));
            assert_ok(RT_OP(&f.d, head_loss, &err, .x = rt_student_hidden(f.s, RT_LAYER_FINAL), .w = head.w, .dx = f.dx, .dw = head.dw, .n = docs.n,
                            .H = f.c.hidden, .V = head.V, .label = f.label, .w_ce = 1, .T = 1));
            assert_ok(rt_student_backward(f.s, f.dx, NULL, 0, false, &err));
            got[i] = malloc(bytes);
            assert_ok(rt_device_download(&f.d, got[i], rt_student_grads(f.s), bytes, &err));
            rt_device_arena_free(&f.d, &acts);
        }
        assert_memory_equal(got[0], got[1], bytes);
        free(got[0]);
        free(got[1]);
        fx_close(&f);
    }
}

/* Packed documents are worth what they are alone. */
static void test_packing(void **state)
{
    struct fx gpu, alone;
    struct fx_docs docs;
    double sum = 0;
    (void)state;
    if (!open_both(&gpu, &alone, configs[0]))
        TEST_SKIP("no GPU");
    fx_close(&alone);
    fx_open(&alone, fx_backend("cuda"), 1, configs[0]);
    calm(&alone);
    fx_docs(&docs, &gpu, 3, lens, 4);
    const double whole = fx_loss(&gpu, &docs, true);
    for (int i = 0; i < 4; i++) {
        const struct fx_docs one = fx_one(&docs, i);
        sum += fx_loss(&alone, &one, true);
    }
    assert_true(fabs(whole - sum) < 2e-3 * fabs(whole));
    compare_gradients(&alone, &gpu); /* gradients of four batches, rounded at each */
    fx_close(&gpu);
    fx_close(&alone);
}

static double train_step(struct fx *f, struct rt_optimizer *o, const struct fx_docs *docs)
{
    struct rt_err err = {0};
    struct rt_step_report r;
    assert_ok(rt_student_zero_grads(f->s, &err));
    const double loss = fx_loss(f, docs, true);
    assert_ok(rt_optimizer_step(o, 2e-3, 1, &r, &err));
    assert_false(r.skipped);
    return loss;
}

static void test_optimizer(void **state)
{
    const struct rt_adamw adamw = {.beta1 = .9, .beta2 = .95, .eps = 1e-8, .decay = .1, .clip = 1.0, .decay_matrices_only = true, .seed = 5};
    (void)state;
    for (int half = 0; half < 2; half++)
        for (int c = 0; c < N_CONFIGS; c++) {
            struct fx gpu, cpu;
            struct fx_docs docs;
            struct rt_err err = {0};
            struct rt_optimizer og, oc;
            struct rt_adamw narrow = adamw;
            narrow.bf16_moments = half != 0;
            if (!open_both(&gpu, &cpu, configs[c]))
                TEST_SKIP("no GPU");
            fx_docs(&docs, &gpu, 3, lens, 4);
            assert_ok(rt_optimizer_init(&og, gpu.s, &narrow, &gpu.moments, &err));
            assert_ok(rt_optimizer_init(&oc, cpu.s, &adamw, &cpu.moments, &err));
            double first = 0, got = 0, want = 0;
            for (int i = 0; i < 8; i++) {
                got = train_step(&gpu, &og, &docs);
                want = train_step(&cpu, &oc, &docs);
                first = i == 0 ? want : first;
            }
            print_message("    loss after 8 steps %.6f, in float32 %.6f, first %.6f\n", got, want, first);
            assert_true(first - want > 0.02 * first);
            assert_true(fabs(got - want) < 0.05 * (first - want)); /* of what they gained */
            fx_close(&gpu);
            fx_close(&cpu);
        }
}

static void read_state(const struct fx *f, const struct rt_optimizer *o, unsigned char *out)
{
    struct rt_err err = {0};
    const size_t n = (size_t)f->p.elements, size = o->state.moment == RT_F32 ? 4 : 2;
    assert_ok(rt_device_download(&f->d, out, rt_student_block(f->s), n * 2, &err));
    assert_ok(rt_device_download(&f->d, out + n * 2, o->state.low, n * 2, &err));
    assert_ok(rt_device_download(&f->d, out + n * 4, o->state.m, n * size, &err));
    assert_ok(rt_device_download(&f->d, out + n * 8, o->state.v, n * size, &err));
}

/* A checkpoint goes on to the same bytes, masters and moments; its model is the masters. */
static void test_checkpoint(void **state)
{
    (void)state;
    for (int half = 0; half < 2; half++) {
        const struct rt_adamw adamw = {.beta1 = .9, .beta2 = .95, .eps = 1e-8, .decay = .1, .clip = 1.0, .bf16_moments = half != 0, .seed = 5};
        struct fx a, b;
        struct fx_docs docs;
        struct rt_err err = {0};
        struct rt_optimizer oa, ob;
        struct rt_ckpt_writer *w = NULL;
        struct rt_ckpt ckpt;
        const char *dir = test_tmp(half ? "cuda_run_bf16" : "cuda_run");
        if (fx_backend("cuda") == NULL)
            TEST_SKIP("no GPU");
        fx_open(&a, fx_backend("cuda"), 1, configs[1]);
        fx_open(&b, fx_backend("cuda"), 1, configs[1]);
        fx_docs(&docs, &a, 5, lens, 4);
        assert_ok(rt_optimizer_init(&oa, a.s, &adamw, &a.moments, &err));
        assert_ok(rt_optimizer_init(&ob, b.s, &adamw, &b.moments, &err));
        train_step(&a, &oa, &docs);
        train_step(&a, &oa, &docs);
        assert_ok(rt_mkdirs(dir, &err));
        assert_ok(rt_ckpt_begin(dir, oa.step, &w, &err));
        assert_ok(rt_student_checkpoint(a.s, &oa, w, &err));
        assert_ok(rt_ckpt_commit(w, 2, &err));
        rt_ckpt_writer_free(w);
        assert_ok(rt_ckpt_latest(dir, NULL, &ckpt, &err));
        assert_ok(rt_student_restore(b.s, &ob, ckpt.path, ckpt.step, &err));
        const size_t bytes = (size_t)a.p.elements * 12;
        unsigned char *x = calloc(bytes, 1), *y = calloc(bytes, 1);
        for (int i = 0; i < 2; i++) {
            read_state(&a, &oa, x);
            read_state(&b, &ob, y);
            assert_memory_equal(x, y, bytes);
            assert_true(train_step(&a, &oa, &docs) == train_step(&b, &ob, &docs));
        }
        /* something lay in the lower halves */
        int64_t n = 0;
        for (int64_t i = 0; i < a.p.elements; i++)
            n += x[a.p.elements * 2 + 2 * i] != 0;
        assert_true(n > a.p.elements / 2);
        free(x);
        free(y);
        fx_close(&a);
        fx_close(&b);
    }
}

/* Greedy text of the decoder, token by token from a prompt: each token is the greatest logit of float32 too, or one so near to it that bfloat16
 * cannot tell (a logit's error is near 1 % of the spread of logits); and the decoder's logits are the forward's. */
static void test_generation(void **state)
{
    enum { PROMPT = 7, LEN = 40 };
    (void)state;
    for (int c = 0; c < N_CONFIGS; c++) {
        struct fx gpu, cpu;
        struct fx_docs docs;
        struct rt_err err = {0};
        struct rt_student_decoder *d = NULL;
        if (!open_both(&gpu, &cpu, configs[c]))
            TEST_SKIP("no GPU");
        const int64_t V = gpu.c.vocab_size;
        int near = 0;
        float *mine = malloc((size_t)(LEN * V) * sizeof *mine);
        fx_docs(&docs, &gpu, 9, (const int[]){LEN}, 1);
        assert_ok(rt_student_decoder_create(gpu.s, &(struct rt_decoder_options){.slots = 3, .budget = 8, .max_len = LEN}, &d, &err));
        const struct rt_batch_step step = rt_student_decoder_step(d);
        for (int t = 0; t < LEN; t++) {
            const struct rt_batch_entry e = {1, docs.ids[t], t, 0};
            const float *logits;
            int64_t stride;
            assert_ok(step.step(step.ctx, &e, 1, 1, &logits, &stride, &err));
            memcpy(mine + t * V, logits, (size_t)V * sizeof *mine);
            int32_t best = 0;
            for (int64_t v = 1; v < V; v++)
                best = logits[v] > logits[best] ? (int32_t)v : best;
            if (t + 1 >= PROMPT && t + 1 < LEN)
                docs.ids[t + 1] = best;
        }
        float *want = fx_forward_logits(&cpu, &docs), *whole = fx_forward_logits(&gpu, &docs);
        cuda_close("decoder against float32", mine, want, LEN, V, 2e-2, 5e-2); /* layers of bfloat16 */
        cuda_close("decoder against the forward", mine, whole, LEN, V, 1e-2, 2e-2);
        double spread = 0;
        for (int64_t i = 0; i < LEN * V; i++)
            spread += (double)want[i] * want[i];
        spread = sqrt(spread / (double)(LEN * V));
        for (int t = PROMPT - 1; t + 1 < LEN; t++) {
            float top = want[t * V];
            for (int64_t v = 1; v < V; v++)
                top = fmaxf(top, want[t * V + v]);
            const double gap = top - want[t * V + docs.ids[t + 1]];
            near += gap > 0;
            if (!(gap < 0.05 * spread))
                fail_msg("token %d: %g below the greatest logit, spread %g", t + 1, gap, spread);
        }
        print_message("    %d of %d tokens are the second choice of float32, within 5 %% of the spread\n", near, LEN - PROMPT);
        rt_student_decoder_free(d);
        free(mine);
        free(want);
        free(whole);
        fx_close(&gpu);
        fx_close(&cpu);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_loss_and_gradients), cmocka_unit_test(test_first_backward), cmocka_unit_test(test_keep),       cmocka_unit_test(test_packing),    cmocka_unit_test(test_optimizer),
    cmocka_unit_test(test_checkpoint),         cmocka_unit_test(test_generation),
};
RT_SUITE(cuda_model, tests)
