/* The optimiser step: alignment of rows and labels, normalisation, packing, exact repetition, states, steps that are not finite. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/rng.h"
#include "core/top_ids.h"
#include "tests/train_fixture.h"

static void open_trainer(struct rt_trainer *t, struct tf *f, struct rt_train_set **set, const struct rt_trainer_options *o)
{
    static const double weight[1] = {1};
    struct rt_err err = {0};
    assert_ok(rt_trainer_open(t, f->s, set, weight, 1, o, &err));
}

/* A student that scores itself learns nothing: KL 0, its mass and choices are the teacher's. Shifted by one row it is not 0. */
static void test_canary(void **state)
{
    (void)state;
    for (int config = TF_TIED; config <= TF_UNTIED; config++) {
        struct rt_err err = {0};
        struct tf f;
        struct tf_data *data = malloc(sizeof *data);
        struct rt_trainer t;
        struct rt_step_result r;
        struct rt_trainer_options o = tf_options();
        o.w.ce = 0;
        o.w.kl = 1;
        tf_open(&f, &rt_backend_cpu, 2, config, 0.3f);
        tf_data(data, f.c.vocab_size, 1);
        tf_score(data, &f);
        struct rt_train_set *set = tf_set(data, &f, false);
        open_trainer(&t, &f, &set, &o);
        assert_ok(rt_trainer_step(&t, 0, false, &r, &err));
        assert_true(r.sums.kl_rows == r.items && r.items > 20);
        /* float32 logits and log-sum-exps: 1e-6 a row */
        assert_true(fabs(r.sums.kl) / (double)r.items < 1e-5);
        assert_true(r.grad_norm < 1e-4);
        assert_int_equal(r.sums.agree, r.sums.kl_rows);
        assert_true(fabs(r.sums.teacher_mass - r.sums.student_mass) / (double)r.items < 1e-5);
        rt_trainer_close(&t);
        for (int s = 0; s < TF_SEQS; s++) { /* row i says what row i+1 should */
            memmove(data->top_ids[s], data->top_ids[s] + TF_K, (TF_LEN - 1) * TF_K * 4);
            memmove(data->logits[s], data->logits[s] + TF_K, (TF_LEN - 1) * TF_K * 4);
            memmove(data->lse[s], data->lse[s] + 2, (TF_LEN - 1) * 2 * 4);
            for (int64_t i = data->len[s] - 2; i < data->len[s] - 1; i++)
                data->mask[s][i + 1] = 0;
        }
        rt_train_set_free(set);
        set = tf_set(data, &f, false);
        open_trainer(&t, &f, &set, &o);
        assert_ok(rt_trainer_step(&t, 0, false, &r, &err));
        assert_true(r.sums.kl / (double)r.items > 0.05);
        rt_trainer_close(&t);
        rt_train_set_free(set);
        tf_close(&f);
        free(data);
    }
}

/* Which rows a sequence has: the first target of the completion is predicted at the prompt's last token, the last token predicts
 * nothing, a teacher row without a target is not used, a target without a row takes no KL. */
static void test_alignment(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f;
    struct tf_data *data = malloc(sizeof *data);
    struct rt_micro m;
    bool full;
    tf_open(&f, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    tf_data(data, f.c.vocab_size, 2);
    tf_score(data, &f);
    struct rt_train_set *set = tf_set(data, &f, false);
    const struct rt_micro_options o = {.tokens = 100, .k = TF_K + 2, .teacher_T = 2, .tail = RT_TAIL_BUCKET, .vocab = f.c.vocab_size};
    assert_ok(rt_micro_create(&m, &o, &err));
    for (int64_t s = 0; s < 2; s++)
        assert_ok(rt_micro_add(&m, set, &(struct rt_order_item){0, s}, &full, &err));
    int64_t row = 0, targets;
    for (int s = 0; s < 2; s++) {
        const int64_t base = s == 0 ? 0 : data->len[0], first = data->len[s] / 3;
        assert_int_equal(m.seq[s].row0, row);
        for (int64_t i = first; i < data->len[s]; i++, row++) {
            assert_int_equal(m.index[row], base + i - 1);
            assert_int_equal(m.label[row], data->ids[s][i]);
            assert_int_equal(m.kl_mask[row], 1);
            for (int j = 0; j < TF_K; j++) {
                const double logp = data->logits[s][(i - 1) * TF_K + j] / 2.0 - data->lse[s][(i - 1) * 2 + 1];
                assert_int_equal(rt_top_ids_get(m.top_ids, TF_K + 2, m.id_bits, row, j), data->top_ids[s][(i - 1) * TF_K + j]);
                assert_true(fabs(m.top_logp[row * (TF_K + 2) + j] - logp) < 1e-6);
            }
            assert_int_equal(rt_top_ids_get(m.top_ids, TF_K + 2, m.id_bits, row, TF_K), -1); /* fewer ids than the widest set */
        }
        assert_ok(rt_train_set_targets(set, s, &targets, &err));
        assert_int_equal(targets, data->len[s] - first);
    }
    assert_int_equal(m.rows, row);
    assert_int_equal(m.cu[2], data->len[0] + data->len[1]);
    rt_micro_free(&m);
    rt_train_set_free(set);
    tf_close(&f);
    free(data);
}

struct two {
    struct rt_rows r;
    struct rt_row_identity id;
};

static enum rt_status get_two(void *self, int64_t i, struct rt_rows *out, bool *end, struct rt_err *err)
{
    (void)i;
    (void)err;
    *end = false;
    *out = ((struct two *)self)->r;
    return RT_OK;
}

/* Two tokens, one row; a student of zeros says 1/61 everywhere. Teacher: ids 7 and 9 with p(T=2) = 0.5 and 0.3. */
static void test_two_tokens(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f;
    struct rt_trainer t;
    struct rt_step_result r;
    const uint32_t ids[2] = {5, 9}, position[1] = {0}, top[2] = {7, 9}, rank[1] = {1};
    const uint8_t mask[2] = {0, 1};
    const float logits[2] = {2 * logf(0.5f), 2 * logf(0.3f)}, lse[2] = {1, 0}, logprob[1] = {-3};
    struct two two = {.r = {.n_tokens = 2, .ids = ids, .loss_mask = mask, .n_rows = 1, .k = 2, .n_lse = 2, .position = position, .topk_ids = top,
                            .topk_logits = logits, .lse = lse, .next_id = ids + 1, .next_logprob = logprob, .next_rank = rank},
                      .id = {.vocab_size = 61, .n_ids = 61, .top_k = 2, .n_lse = 2, .lse_temperature = {1, 2}}};
    const struct rt_row_source source = {&two, 1, &two.id, get_two};
    struct rt_train_set *set = NULL;
    struct rt_trainer_options o = tf_options();
    o.w.ce = 0.25;
    o.w.kl = 0.75;
    o.batch_tokens = 2; /* the sequence once */
    tf_open(&f, &rt_backend_ref, 1, TF_TIED, 0);
    const struct rt_train_set_options so = {.model = &f.model, .vocab = 61, .max_length = 64};
    for (int tail = 0; tail < 2; tail++) {
        o.w.tail = tail == 0 ? RT_TAIL_BUCKET : RT_TAIL_RENORM;
        assert_ok(rt_train_set_memory(&source, &so, &set, &err));
        open_trainer(&t, &f, &set, &o);
        assert_ok(rt_trainer_step(&t, 0, false, &r, &err));
        const double V = 61, ce = log(V);
        const double bucket = 4 * (0.5 * log(0.5 * V) + 0.3 * log(0.3 * V) + 0.2 * log(0.2 / (59 / V)));
        const double renorm = 4 * (0.625 * log(0.625 * 2) + 0.375 * log(0.375 * 2));
        const double kl = tail == 0 ? bucket : renorm;
        assert_true(fabs(r.sums.ce - ce) < 1e-6);
        assert_true(fabs(r.sums.kl - kl) < 1e-5);
        assert_true(fabs(r.loss - (0.25 * ce + 0.75 * kl)) < 1e-5);
        assert_true(fabs(r.sums.teacher_mass - 0.8) < 1e-6 && fabs(r.sums.student_mass - 2 / V) < 1e-6);
        assert_int_equal(r.items, 1);
        assert_int_equal(r.sums.correct, 0); /* all equal: the smaller id */
        rt_trainer_close(&t);
        rt_train_set_free(set);
    }
    tf_close(&f);
}

/* Three tokens, two targets, a row for the second one alone: with ce_rest the other has the cross-entropy for itself. */
static void test_ce_rest(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f;
    const uint32_t ids[3] = {5, 9, 8}, position[1] = {1}, top[2] = {7, 9}, rank[1] = {2};
    const uint8_t mask[3] = {0, 1, 1};
    const float logits[2] = {logf(0.5f), logf(0.3f)}, lse[1] = {0}, logprob[1] = {-3};
    struct two two = {.r = {.n_tokens = 3, .ids = ids, .loss_mask = mask, .n_rows = 1, .k = 2, .n_lse = 1, .position = position, .topk_ids = top,
                            .topk_logits = logits, .lse = lse, .next_id = ids + 2, .next_logprob = logprob, .next_rank = rank},
                      .id = {.vocab_size = 61, .n_ids = 61, .top_k = 2, .n_lse = 1, .lse_temperature = {1}, .completion_only = true}};
    const struct rt_row_source source = {&two, 1, &two.id, get_two};
    tf_open(&f, &rt_backend_ref, 1, TF_TIED, 0);
    const struct rt_train_set_options so = {.model = &f.model, .vocab = 61, .max_length = 64};
    const double V = 61, ce = log(V), kl = 0.5 * log(0.5 * V) + 0.3 * log(0.3 * V) + 0.2 * log(0.2 / (59 / V));
    for (int rest = 0; rest < 2; rest++) {
        struct rt_trainer t;
        struct rt_step_result r;
        struct rt_train_set *set = NULL;
        struct rt_trainer_options o = tf_options();
        o.w.ce = o.w.kl = o.w.T = o.teacher_T = 1;
        o.ce_rest = rest != 0;
        o.batch_tokens = 3;
        assert_ok(rt_train_set_memory(&source, &so, &set, &err));
        open_trainer(&t, &f, &set, &o);
        assert_ok(rt_trainer_step(&t, 0, false, &r, &err));
        assert_int_equal(r.items, 2);
        assert_int_equal(r.sums.rows, rest ? 1 : 2);
        assert_int_equal(r.sums.kl_rows, 1);
        assert_true(fabs(r.sums.ce - (rest ? 1 : 2) * ce) < 1e-5);
        assert_true(fabs(r.loss - ((rest ? 1 : 2) * ce + kl) / 2) < 1e-5);
        /* an evaluation with the trainer's room counts every target */
        const struct rt_eval_room room = {t.s, &t.acts, &t.losses, &t.micro[0]};
        struct rt_eval_losses e;
        assert_ok(rt_eval_losses(&room, set, 1, NULL, NULL, NULL, &e, &err));
        assert_int_equal(e.sums.rows, 2);
        assert_true(fabs(e.sums.ce - 2 * ce) < 1e-5);
        rt_trainer_close(&t);
        rt_train_set_free(set);
    }
    tf_close(&f);
}

/* Of two stored ids the likelier alone is trained on: the other is in the bucket, whose mass is still exact. */
static void test_use_k(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f;
    const uint32_t ids[2] = {5, 9}, position[1] = {0}, top[2] = {7, 9}, rank[1] = {1};
    const uint8_t mask[2] = {0, 1};
    const float logits[2] = {logf(0.5f), logf(0.3f)}, lse[1] = {0}, logprob[1] = {logf(0.3f)};
    struct two two = {.r = {.n_tokens = 2, .ids = ids, .loss_mask = mask, .n_rows = 1, .k = 2, .n_lse = 1, .position = position, .topk_ids = top,
                            .topk_logits = logits, .lse = lse, .next_id = ids + 1, .next_logprob = logprob, .next_rank = rank},
                      .id = {.vocab_size = 61, .n_ids = 61, .top_k = 2, .n_lse = 1, .lse_temperature = {1}}};
    const struct rt_row_source source = {&two, 1, &two.id, get_two};
    tf_open(&f, &rt_backend_ref, 1, TF_TIED, 0);
    const struct rt_train_set_options so = {.model = &f.model, .vocab = 61, .max_length = 64};
    const double V = 61, want[3] = {0.5 * log(0.5 * V) + 0.3 * log(0.3 * V) + 0.2 * log(0.2 / (59 / V)), 0.5 * log(0.5 * V) + 0.5 * log(0.5 / (60 / V))};
    for (int use = 0; use < 2; use++) {
        struct rt_trainer t;
        struct rt_step_result r;
        struct rt_train_set *set = NULL;
        struct rt_trainer_options o = tf_options();
        o.w.ce = o.w.kl = o.w.T = o.teacher_T = 1;
        o.use_k = use;
        o.batch_tokens = 2;
        assert_ok(rt_train_set_memory(&source, &so, &set, &err));
        open_trainer(&t, &f, &set, &o);
        assert_ok(rt_trainer_step(&t, 0, false, &r, &err));
        assert_true(fabs(r.sums.kl - want[use]) < 1e-5);
        assert_true(fabs(r.sums.teacher_mass - (use ? 0.5 : 0.8)) < 1e-6);
        /* an evaluation takes all that is stored */
        const struct rt_eval_room room = {t.s, &t.acts, &t.losses, &t.micro[0]};
        struct rt_eval_losses e;
        assert_ok(rt_eval_losses(&room, set, 1, NULL, NULL, NULL, &e, &err));
        assert_true(fabs(e.sums.kl - want[0]) < 1e-5);
        rt_trainer_close(&t);
        rt_train_set_free(set);
    }
    tf_close(&f);
}

/* Gradients of one step over the whole data, cut into micro-batches of `micro` tokens. */
static float *whole_gradient(struct tf_data *data, int config, int64_t micro, double *loss)
{
    struct rt_err err = {0};
    struct tf f;
    struct rt_trainer t;
    struct rt_step_result r;
    struct rt_trainer_options o = tf_options();
    o.micro_tokens = micro;
    tf_open(&f, &rt_backend_cpu, 2, config, 0.3f);
    struct rt_train_set *set = tf_set(data, &f, false);
    o.batch_tokens = rt_train_set_info(set)->tokens; /* an epoch a step */
    open_trainer(&t, &f, &set, &o);
    assert_ok(rt_trainer_step(&t, 0, false, &r, &err));
    assert_int_equal(r.n, TF_SEQS);
    float *g = tf_grads(&f);
    *loss = r.loss;
    rt_trainer_close(&t);
    rt_train_set_free(set);
    tf_close(&f);
    return g;
}

/* Packed or one by one, in 1 micro-batch or in many: the same loss and gradient, up to the order of float32 sums. */
static void test_packing_and_accumulation(void **state)
{
    (void)state;
    for (int config = TF_TIED; config <= TF_UNTIED; config++) {
        struct tf f;
        struct tf_data *data = malloc(sizeof *data);
        double loss[3];
        tf_open(&f, &rt_backend_cpu, 1, TF_UNTIED, 0.5f);
        tf_data(data, f.c.vocab_size, 4);
        tf_score(data, &f);
        tf_close(&f);
        tf_open(&f, &rt_backend_cpu, 1, config, 0.3f);
        float *one = whole_gradient(data, config, 1000, &loss[0]), *some = whole_gradient(data, config, 60, &loss[1]),
              *each = whole_gradient(data, config, 23, &loss[2]);
        /* sums of some hundred float32 terms in another order */
        assert_true(test_rel_error(some, one, f.p.elements) < 1e-5);
        assert_true(test_rel_error(each, one, f.p.elements) < 1e-5);
        assert_true(fabs(loss[0] - loss[1]) < 1e-6 * loss[0] && fabs(loss[0] - loss[2]) < 1e-6 * loss[0]);
        free(one);
        free(some);
        free(each);
        tf_close(&f);
        free(data);
    }
}

static struct rt_trainer_options with_states(void)
{
    struct rt_trainer_options o = tf_options();
    o.w.feature = 0.3;
    o.map = (struct rt_feature_map){{{1, 1, TF_DIM}, {RT_LAYER_FINAL, RT_LAYER_FINAL, TF_DIM}}, 2};
    return o;
}

/* Any number of threads: the same bytes after steps with every term. */
static void test_threads(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f[2];
    struct tf_data *data = malloc(sizeof *data);
    const struct rt_trainer_options o = with_states();
    for (int i = 0; i < 2; i++) {
        struct rt_trainer t;
        struct rt_step_result r;
        tf_open(&f[i], &rt_backend_cpu, i == 0 ? 1 : 3, TF_TIED, 0.3f);
        if (i == 0) {
            tf_data(data, f[0].c.vocab_size, 4);
            tf_score(data, &f[0]);
        }
        struct rt_train_set *set = tf_set(data, &f[i], true);
        open_trainer(&t, &f[i], &set, &o);
        for (int s = 0; s < 5; s++)
            assert_ok(rt_trainer_step(&t, 1e-2, s == 2, &r, &err));
        assert_true(r.sums.feature_rows > 0 && r.sums.feature > 0);
        rt_trainer_close(&t);
        rt_train_set_free(set);
    }
    assert_true(tf_same_block(&f[0], &f[1]));
    tf_close(&f[0]);
    tf_close(&f[1]);
    free(data);
}

/* Stopped after any step and gone on from the checkpoint: the same bytes, projectors and moments among them. */
static void test_resume(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f[2];
    struct tf_data *data = malloc(sizeof *data);
    const struct rt_trainer_options o = with_states();
    const int stop = 1 + (int)(rt_rng_u64(99, 1, 1) % 5);
    const char *dir = test_tmp("train-resume");
    double norm[2], seconds;
    assert_ok(rt_mkdirs(dir, &err));
    for (int i = 0; i < 2; i++) {
        struct rt_trainer t;
        struct rt_step_result r;
        struct rt_ckpt at;
        tf_open(&f[i], &rt_backend_cpu, 2, TF_UNTIED, 0.3f);
        if (i == 0) {
            tf_data(data, f[0].c.vocab_size, 4);
            tf_score(data, &f[0]);
        }
        struct rt_train_set *set = tf_set(data, &f[i], true);
        open_trainer(&t, &f[i], &set, &o);
        for (int s = 0; s < 7; s++) {
            if (i == 1 && s == stop) { /* into a trainer and a student that know nothing */
                assert_ok(rt_trainer_checkpoint(&t, dir, 2, 1.5, &err));
                rt_trainer_close(&t);
                tf_close(&f[1]);
                tf_open(&f[1], &rt_backend_cpu, 1, TF_UNTIED, 0.7f);
                rt_train_set_free(set);
                set = tf_set(data, &f[1], true);
                open_trainer(&t, &f[1], &set, &o);
                assert_ok(rt_ckpt_latest(dir, NULL, &at, &err));
                assert_int_equal(at.step, stop);
                assert_ok(rt_trainer_restore(&t, at.path, &seconds, &err));
                assert_true(seconds == 1.5);
            }
            assert_ok(rt_trainer_step(&t, 1e-2, false, &r, &err));
        }
        norm[i] = r.grad_norm;
        rt_trainer_close(&t);
        rt_train_set_free(set);
    }
    assert_true(tf_same_block(&f[0], &f[1]));
    assert_memory_equal(&norm[0], &norm[1], sizeof norm[0]);
    tf_close(&f[0]);
    tf_close(&f[1]);
    free(data);
}

/* dL/dp by finite differences in float64, through CE, KL and both feature pairs, for parameters and projectors. */
static void test_gradient(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f;
    struct tf_data *data = malloc(sizeof *data);
    struct rt_trainer t;
    struct rt_step_result r;
    struct rt_trainer_options o = with_states();
    o.micro_tokens = 60;
    tf_open(&f, &rt_backend_cpu, 1, TF_TIED, 0.5f);
    tf_data(data, f.c.vocab_size, 4);
    tf_score(data, &f);
    tf_close(&f);
    for (int cosine = 0; cosine < 2; cosine++) {
        o.w.cosine = cosine == 1;
        tf_open(&f, &rt_backend_ref64, 1, TF_TIED, 0.3f);
        struct rt_train_set *set = tf_set(data, &f, true);
        o.batch_tokens = rt_train_set_info(set)->tokens; /* every step sees the same */
        open_trainer(&t, &f, &set, &o);
        assert_ok(rt_trainer_step(&t, 0, false, &r, &err));
        double *block[2] = {rt_student_block(f.s), (double *)(void *)t.proj.w};
        const double *grads[2] = {rt_student_grads(f.s), (const double *)(const void *)t.proj.grad};
        const int64_t n[2] = {f.p.elements, t.proj.table.elements};
        double analytic[12], numeric[12];
        int64_t at[12];
        for (int c = 0; c < 12; c++) {
            at[c] = (int64_t)(rt_rng_u64(17, 1, (uint64_t)c) % (uint64_t)n[c % 2]);
            analytic[c] = grads[c % 2][at[c]];
        }
        for (int c = 0; c < 12; c++) {
            const double was = block[c % 2][at[c]], eps = 1e-5;
            double loss[2];
            for (int side = 0; side < 2; side++) {
                block[c % 2][at[c]] = was + (side == 0 ? eps : -eps);
                assert_ok(rt_trainer_step(&t, 0, false, &r, &err));
                loss[side] = r.loss;
            }
            block[c % 2][at[c]] = was;
            numeric[c] = (loss[0] - loss[1]) / (2 * eps);
            /* 1e-5^2 of the third derivative and 1e-16/1e-5 of rounding; teacher rows are float32 on both sides */
            assert_true(fabs(numeric[c] - analytic[c]) < 1e-6 + 1e-4 * fabs(analytic[c]));
        }
        rt_trainer_close(&t);
        rt_train_set_free(set);
        tf_close(&f);
    }
    free(data);
}

/* A row that is no number: the step changes nothing but the place in the data, and the next one goes on. */
static void test_nan_row(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f, g;
    struct tf_data *data = malloc(sizeof *data);
    struct rt_trainer t;
    struct rt_step_result r;
    const struct rt_trainer_options o = tf_options();
    int skipped = 0, taken = 0;
    tf_open(&f, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    tf_open(&g, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    tf_data(data, f.c.vocab_size, 4);
    tf_score(data, &f);
    for (int64_t j = 0; j < data->len[3] * TF_K; j++)
        data->logits[3][j] = NAN;
    struct rt_train_set *set = tf_set(data, &f, false);
    open_trainer(&t, &f, &set, &o);
    for (int s = 0; s < 3; s++) {
        const bool before = tf_same_block(&f, &g);
        assert_ok(rt_trainer_step(&t, 1e-2, false, &r, &err));
        bool has = false;
        for (int64_t i = 0; i < r.n; i++)
            has |= r.batch[i].seq == 3;
        assert_int_equal(r.skipped, has);
        skipped += r.skipped;
        taken += !r.skipped;
        assert_int_equal(t.opt.step, taken);
        if (r.skipped && before)
            assert_true(tf_same_block(&f, &g));
    }
    assert_true(skipped >= 1 && taken >= 1);
    assert_int_equal(t.step, 3);
    assert_int_equal(t.skipped, skipped);
    float *x = malloc((size_t)f.p.elements * sizeof *x);
    memcpy(x, rt_student_block(f.s), (size_t)f.p.elements * sizeof *x);
    for (int64_t i = 0; i < f.p.elements; i++)
        assert_true(isfinite(x[i]));
    free(x);
    rt_trainer_close(&t);
    rt_train_set_free(set);
    tf_close(&f);
    tf_close(&g);
    free(data);
}

/* Every sequence once an epoch, in another order each time; weights; the same for the same seed. */
static void test_order(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct tf f;
    struct tf_data *data = malloc(sizeof *data);
    tf_open(&f, &rt_backend_cpu, 1, TF_TIED, 0.3f);
    tf_data(data, f.c.vocab_size, 4);
    struct rt_train_set *sets[2] = {tf_set(data, &f, false), tf_set(data, &f, false)};
    const double weight[2] = {1, 0.5};
    struct rt_order o;
    const struct rt_order_item *item;
    int64_t n, all = 0, seen[2][TF_SEQS] = {{0}}, first[2 * TF_SEQS] = {0};
    assert_ok(rt_order_open(&o, sets, weight, 2, 7, 2, &err));
    for (;;) {
        assert_ok(rt_order_next(&o, 50, &item, &n, &err));
        if (n == 0)
            break;
        int64_t tokens = 0;
        for (int64_t i = 0; i < n; i++) {
            seen[item[i].set][item[i].seq]++;
            if (all + i < 2 * TF_SEQS)
                first[all + i] = item[i].set * TF_SEQS + item[i].seq;
            tokens += rt_train_set_length(sets[item[i].set], item[i].seq);
        }
        assert_true(tokens <= 50);
        all += n;
    }
    assert_int_equal(all, 2 * TF_SEQS + TF_SEQS);
    for (int i = 0; i < TF_SEQS; i++) {
        assert_int_equal(seen[0][i], 2);
        assert_int_equal(seen[1][i], 1); /* half of them in each epoch */
    }
    rt_order_close(&o);
    int64_t same = 0, other = 0;
    for (int s = 0; s < 2; s++) {
        assert_ok(rt_order_open(&o, sets, weight, 2, s == 0 ? 7 : 8, 2, &err));
        int64_t at = 0;
        for (; at < 2 * TF_SEQS;) {
            assert_ok(rt_order_next(&o, 50, &item, &n, &err));
            for (int64_t i = 0; i < n && at < 2 * TF_SEQS; i++, at++)
                *(s == 0 ? &same : &other) += first[at] == item[i].set * TF_SEQS + item[i].seq;
        }
        rt_order_close(&o);
    }
    assert_int_equal(same, 2 * TF_SEQS);
    assert_true(other < TF_SEQS);
    rt_train_set_free(sets[0]);
    rt_train_set_free(sets[1]);
    tf_close(&f);
    free(data);
}

static void test_layer_map(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_feature_map m;
    const struct rt_row_identity id = {.n_features = 4, .feature = {{0, 8, RT_BF16, false}, {20, 8, RT_BF16, false}, {61, 8, RT_BF16, false},
                                                                    {RT_LAYER_FINAL, 8, RT_BF16, false}}};
    assert_ok(rt_feature_map_parse("auto", &id, 28, 61, &m, &err));
    assert_int_equal(m.n, 4);
    assert_int_equal(m.pair[0].student, 0);
    assert_int_equal(m.pair[1].student, 9); /* 20 * 28 / 61 = 9.18 */
    assert_int_equal(m.pair[2].student, 28);
    assert_int_equal(m.pair[3].student, RT_LAYER_FINAL);
    assert_ok(rt_feature_map_parse("20:8,final:final", &id, 28, 0, &m, &err));
    assert_int_equal(m.n, 2);
    assert_int_equal(m.pair[0].student, 8);
    assert_status(rt_feature_map_parse("auto", &id, 28, 0, &m, &err), USAGE);
    assert_status(rt_feature_map_parse("21:8", &id, 28, 61, &m, &err), USAGE);
    assert_status(rt_feature_map_parse("20:29", &id, 28, 61, &m, &err), USAGE);
    assert_status(rt_feature_map_parse("20:8;61:9", &id, 28, 61, &m, &err), USAGE);
    assert_int_equal(rt_feature_map_parse("20:8,61:9,20:8", &id, 28, 61, &m, &err), RT_USAGE);
    assert_non_null(strstr(err.msg, "'20:8' is there twice"));
    rt_err_clear(&err);
    assert_ok(rt_feature_map_parse("20:8,20:9,61:8", &id, 28, 61, &m, &err)); /* a state may be held against several */
    assert_status(rt_feature_map_parse(NULL, &id, 28, 61, &m, &err), USAGE);
}

/* Means and intervals over clusters; pass@k against counting all subsets. */
static void test_statistics(void **state)
{
    (void)state;
    struct rt_ratio r = {0};
    double mean, lo, hi;
    rt_ratio_add(&r, 1, 2);
    rt_ratio_result(&r, &mean, &lo, &hi);
    assert_true(mean == 0.5 && isnan(lo));
    rt_ratio_add(&r, 4, 4);
    rt_ratio_result(&r, &mean, &lo, &hi);
    /* m = 5/6; residuals -2/3 and 2/3; s = sqrt(2 * 8/9) / 6 */
    assert_true(fabs(mean - 5.0 / 6) < 1e-12 && fabs(hi - mean - 1.96 * sqrt(16.0 / 9) / 6) < 1e-12 && fabs(hi + lo - 2 * mean) < 1e-12);
    for (int n = 1; n <= 6; n++)
        for (int c = 0; c <= n; c++)
            for (int k = 1; k <= n; k++) {
                int hit = 0, all = 0;
                for (int set = 0; set < 1 << n; set++)
                    if (__builtin_popcount((unsigned)set) == k) {
                        all++;
                        hit += (set & ((1 << c) - 1)) != 0;
                    }
                assert_true(fabs(rt_stats_pass_at_k(n, c, k) - (double)hit / all) < 1e-12);
            }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_canary),     cmocka_unit_test(test_alignment), cmocka_unit_test(test_two_tokens),
    cmocka_unit_test(test_ce_rest), cmocka_unit_test(test_use_k),
    cmocka_unit_test(test_packing_and_accumulation), cmocka_unit_test(test_threads), cmocka_unit_test(test_resume),
    cmocka_unit_test(test_gradient),   cmocka_unit_test(test_nan_row),   cmocka_unit_test(test_order),
    cmocka_unit_test(test_layer_map),  cmocka_unit_test(test_statistics),
};
RT_SUITE(train, tests)
