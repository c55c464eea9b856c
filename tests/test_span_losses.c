/* Training on likelihoods of spans: what a micro-batch packs, the gradient against finite differences, a student that is its own teacher,
 * and what `train` refuses. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "distill/spans.h"
#include "tests/train_fixture.h"

/* Spans of 1, 2, 3, 1, .. targets over the sequences of the fixture; the last target is in none. */
struct spans_data {
    struct tf_data *t;
    struct rt_row_identity id;
    uint32_t position[TF_SEQS][TF_LEN], next[TF_SEQS][TF_LEN], rank[TF_SEQS][TF_LEN], span[TF_SEQS][TF_LEN];
    float logp[TF_SEQS][TF_LEN], span_logp[TF_SEQS][TF_LEN], lse[TF_SEQS][TF_LEN];
    int64_t rows[TF_SEQS];
    bool unchecked; /* hands out what rt_rows_check would refuse */
};

static struct spans_data *make_spans(const struct tf *f, bool boundary)
{
    struct spans_data *d = calloc(1, sizeof *d);
    d->t = calloc(1, sizeof *d->t);
    tf_data(d->t, f->c.vocab_size, 5);
    d->id = d->t->id;
    d->id.top_k = d->id.n_features = 0;
    d->id.n_lse = 1;
    d->id.lse_temperature[0] = 1;
    d->id.completion_only = true;
    d->id.boundary = boundary;
    strcpy(d->id.origin.mode, "alm");
    d->id.origin.vocab_size = d->id.origin.n_ids = 7;
    for (int s = 0; s < TF_SEQS; s++) {
        int64_t n = 0, open = 0, want = 1;
        for (int64_t i = 0; i + 1 < d->t->len[s]; i++) {
            if (d->t->mask[s][i + 1] == 0)
                continue;
            d->position[s][n] = (uint32_t)i;
            d->next[s][n] = d->t->ids[s][i + 1];
            if (++open == want && i + 2 < d->t->len[s]) {
                d->span[s][n] = (uint32_t)open;
                d->span_logp[s][n] = -2.5f * (float)want + 0.3f * (float)rt_rng_normal(1, (uint64_t)s, (uint64_t)i);
                want = want % 3 + 1;
                open = 0;
            }
            n++;
        }
        d->rows[s] = n;
    }
    return d;
}

static void free_spans(struct spans_data *d)
{
    free(d->t);
    free(d);
}

static enum rt_status get_spans(void *self, int64_t i, struct rt_rows *out, bool *end, struct rt_err *err)
{
    struct spans_data *d = self;
    (void)err;
    *end = false;
    *out = (struct rt_rows){.source_line = i + 1, .n_tokens = d->t->len[i], .ids = d->t->ids[i], .loss_mask = d->t->mask[i], .n_rows = d->rows[i], .n_lse = 1,
                            .position = d->position[i], .lse = d->lse[i], .next_id = d->next[i], .next_logprob = d->logp[i], .next_rank = d->rank[i],
                            .span = d->span[i], .span_logp = d->span_logp[i]};
    rt_rows_key(out->ids, out->n_tokens, out->key);
    return d->unchecked ? RT_OK : rt_rows_check(out, &d->id, "spans", err);
}

static struct rt_train_set *open_set(struct spans_data *d, struct tf *f)
{
    struct rt_err err = {0};
    struct rt_train_set *set = NULL;
    const struct rt_row_source source = {.self = d, .count = TF_SEQS, .identity = &d->id, .get = get_spans};
    const struct rt_train_set_options o = {.model = &f->model, .vocab = f->c.vocab_size, .max_length = 64, .cache_bytes = 1 << 20};
    assert_ok(rt_train_set_memory(&source, &o, &set, &err));
    return set;
}

/* Everything that a pass over all sequences at once takes. */
struct pass {
    struct tf f;
    struct spans_data *data;
    struct rt_train_set *set;
    struct rt_arena acts, grads, scratch;
    struct rt_micro micro;
    struct rt_losses losses;
    struct rt_span_losses spans;
    struct rt_loss_weights w;
    struct rt_loss_sums sums;
    uint8_t boundary[4096];
};

static void pack(struct pass *p)
{
    struct rt_err err = {0};
    bool full;
    rt_micro_clear(&p->micro);
    for (int i = 0; i < TF_SEQS; i++)
        assert_ok(rt_micro_add(&p->micro, p->set, &(struct rt_order_item){0, i}, &full, &err));
}

static void open_pass(struct pass *p, const struct rt_backend *be, bool boundary)
{
    struct rt_err err = {0};
    const int64_t room = TF_SEQS * TF_LEN;
    *p = (struct pass){.w = {.ce = 0.2, .alm = 0.7, .tau = 20, .T = 1}};
    tf_open(&p->f, be, 1, TF_TIED, 0.3f);
    const size_t act = rt_device_act_size(&p->f.d);
    for (int64_t v = 0; v < p->f.c.vocab_size; v++)
        p->boundary[v] = v % 3 == 0;
    p->data = make_spans(&p->f, boundary);
    p->set = open_set(p->data, &p->f);
    const struct rt_micro_options mo = {.tokens = room, .teacher_T = 1, .vocab = p->f.c.vocab_size, .spans = true};
    assert_ok(rt_micro_create(&p->micro, &mo, &err));
    assert_ok(rt_device_arena(&p->f.d, rt_params_bytes(&p->f.p, act), "grads", &p->grads, &err));
    assert_ok(rt_student_attach_grads(p->f.s, &p->grads, &err));
    assert_ok(rt_device_arena(&p->f.d, rt_student_activation_bytes(&p->f.c, room, RT_KEEP_ALL, act), "acts", &p->acts, &err));
    assert_ok(rt_device_arena(&p->f.d, rt_losses_bytes(room, p->f.c.hidden, p->f.c.vocab_size, 0, NULL, act, true) +
                              rt_span_losses_bytes(room, p->f.c.vocab_size), "losses", &p->scratch, &err));
    assert_ok(rt_losses_create(&p->losses, &p->f.d, room, p->f.c.hidden, p->f.c.vocab_size, 0, NULL, true, &p->scratch, &err));
    assert_ok(rt_span_losses_create(&p->spans, &p->f.d, room, p->f.c.vocab_size, p->boundary, &p->scratch, &err));
    p->losses.spans = &p->spans;
    pack(p);
}

static void close_pass(struct pass *p)
{
    rt_micro_free(&p->micro);
    rt_losses_free(&p->losses);
    rt_span_losses_free(&p->spans);
    rt_device_arena_free(&p->f.d, &p->scratch);
    rt_device_arena_free(&p->f.d, &p->acts);
    rt_device_arena_free(&p->f.d, &p->grads);
    rt_train_set_free(p->set);
    free_spans(p->data);
    tf_close(&p->f);
}

static double run(struct pass *p, bool backward)
{
    struct rt_err err = {0};
    const struct rt_student_batch b = rt_losses_batch(&p->micro);
    const int64_t items = 50;
    p->sums = (struct rt_loss_sums){0};
    assert_ok(rt_student_zero_grads(p->f.s, &err));
    assert_ok(rt_student_forward(p->f.s, &b, RT_KEEP_ALL, &p->acts, &err));
    assert_ok(rt_losses_run(&p->losses, p->f.s, NULL, &p->micro, &p->w, items, backward, &p->sums, &err));
    return (p->w.ce * p->sums.ce + p->w.alm * p->sums.spans.loss) / (double)items;
}

/* dL of the whole student against differences along random directions, in float64. */
static void gradients_match_differences(void **state)
{
    (void)state;
    for (int boundary = 0; boundary < 2; boundary++) {
        struct pass *p = malloc(sizeof *p);
        open_pass(p, &rt_backend_ref64, boundary != 0);
        run(p, true);
        assert_true(p->sums.spans.spans > 20 && p->sums.spans.loss > 0 && p->sums.spans.rows < p->sums.rows);
        const int64_t n = p->f.p.elements;
        double *x = rt_student_block(p->f.s), *save = malloc((size_t)n * sizeof *save), *g = malloc((size_t)n * sizeof *g), norm = 0;
        memcpy(save, x, (size_t)n * sizeof *x);
        memcpy(g, rt_student_grads(p->f.s), (size_t)n * sizeof *g);
        for (int64_t i = 0; i < n; i++)
            norm += g[i] * g[i];
        for (uint64_t dir = 0; dir < 2; dir++) {
            const double h = 1e-6; /* truncation h^2 times third derivatives of a few thousand parameters; rounding 1e-16/h */
            double got = 0, sides[2];
            for (int side = 0; side < 2; side++) {
                for (int64_t i = 0; i < n; i++)
                    x[i] = save[i] + (side == 0 ? h : -h) * rt_rng_normal(9, dir, (uint64_t)i);
                sides[side] = run(p, false);
            }
            memcpy(x, save, (size_t)n * sizeof *x);
            for (int64_t i = 0; i < n; i++)
                got += g[i] * rt_rng_normal(9, dir, (uint64_t)i);
            const double want = (sides[0] - sides[1]) / (2 * h);
            if (!(fabs(got - want) <= 1e-6 * sqrt(norm)))
                fail_msg("boundary %d: derivative %.12g, difference %.12g, |gradient| %g", boundary, got, want, sqrt(norm));
        }
        free(save);
        free(g);
        close_pass(p);
        free(p);
    }
}

/* A student that is its own teacher has nothing to learn; one that was shifted by a row has. */
static void own_likelihoods_teach_nothing(void **state)
{
    (void)state;
    struct pass *p = malloc(sizeof *p);
    open_pass(p, &rt_backend_cpu, true);
    p->w.ce = 0;
    run(p, true);
    const double before = p->sums.spans.loss;
    for (int64_t s = 0, row = 0; s < TF_SEQS; s++)
        for (int64_t i = 0; i < p->data->rows[s]; i++, row++) {
            double y = 0;
            for (int64_t j = 0; j < p->micro.span[row]; j++)
                y += p->spans.logp[0][row - j];
            if (p->micro.span[row] > 0) {
                assert_true(p->micro.span_boundary[row]); /* something always follows: the last target is in no span */
                p->data->span_logp[s][i] = (float)(y + p->spans.logp[1][row + 1]);
            }
        }
    rt_train_set_free(p->set);
    p->set = open_set(p->data, &p->f);
    pack(p);
    run(p, true);
    assert_true(before > 1);
    assert_true(p->sums.spans.loss < 1e-9 * before); /* squares of float32 rounding */
    assert_true(fabs(p->sums.spans.teacher - p->sums.spans.student) < 1e-4);
    float *g = tf_grads(&p->f);
    double norm = 0;
    for (int64_t i = 0; i < p->f.p.elements; i++)
        norm += (double)g[i] * g[i];
    assert_true(norm < 1e-8);
    free(g);
    close_pass(p);
    free(p);
}

static void spans_lie_on_their_rows(void **state)
{
    (void)state;
    struct rt_err err = {0};
    for (int boundary = 0; boundary < 2; boundary++) {
        struct pass *p = malloc(sizeof *p);
        bool full;
        int64_t row = 0;
        open_pass(p, &rt_backend_cpu, boundary != 0);
        for (int64_t s = 0; s < TF_SEQS; s++)
            for (int64_t i = 0; i < p->data->rows[s]; i++, row++) {
                assert_int_equal(p->micro.span[row], p->data->span[s][i]);
                assert_int_equal(p->micro.span_boundary[row], boundary != 0 && p->data->span[s][i] > 0);
                if (p->data->span[s][i] > 0)
                    assert_true(p->micro.span_logp[row] == p->data->span_logp[s][i]);
            }
        assert_int_equal(row, p->micro.rows);
        /* a span over a token that is no target */
        const int64_t last = p->data->rows[1] - 1;
        struct rt_train_set *set;
        memset(p->data->span[1], 0, sizeof p->data->span[1]);
        memset(p->data->span_logp[1], 0, sizeof p->data->span_logp[1]);
        p->data->span[1][last] = 2;
        p->data->t->mask[1][p->data->position[1][last]] = 0; /* the target of the row before */
        p->data->unchecked = true;
        set = open_set(p->data, &p->f);
        rt_micro_clear(&p->micro);
        const enum rt_status st = rt_micro_add(&p->micro, set, &(struct rt_order_item){0, 1}, &full, &err);
        assert_true(st == RT_FORMAT);
        rt_err_clear(&err);
        rt_train_set_free(set);
        close_pass(p);
        free(p);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(gradients_match_differences),
    cmocka_unit_test(own_likelihoods_teach_nothing),
    cmocka_unit_test(spans_lie_on_their_rows),
};
RT_SUITE(span_losses, tests)
