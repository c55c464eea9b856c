/* Rows of one tokenizer rewritten for another: against marginals by brute force on toy vocabularies, the same tokenizer, masses. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/rng.h"
#include "distill/retarget_row.h"
#include "tests/ops.h"
#include "tests/retarget_fixture.h"

/* ---- brute force ----
 * The toy teacher speaks tokens that begin with a capital, and no student token has a capital inside: so the student's tokens never cross
 * the teacher's, and what the student says first of a long continuation can be summed up over all continuations. */

static bool capital(char c)
{
    return c >= 'A' && c <= 'C';
}

static double markov(const void *ctx, int64_t i, uint32_t prev, uint32_t w, uint32_t next)
{
    const struct rt_tokenizer *tok = ctx;
    const char *bytes = "";
    size_t n = 0;
    (void)i;
    (void)next;
    rt_tokenizer_bytes(tok, w, &bytes, &n);
    return n > 0 && n < 16 && capital(bytes[0]) ? rf_hash_logit(NULL, 0, prev, w, UINT32_MAX) : -60; /* e^-60: no part of any sum */
}

/* n random merges of a vocabulary over A B C (only as first byte) and a b c. */
static int random_merges(uint64_t seed, char out[][32], const char **list, int n)
{
    char token[64][16] = {"A", "B", "C", "a", "b", "c"};
    int tokens = 6, made = 0;
    for (uint64_t tries = 0; made < n && tries < 1000; tries++) {
        const char *l = token[(int)(rt_rng_uniform(seed, 2 * tries, 0) * tokens)], *r = token[(int)(rt_rng_uniform(seed, 2 * tries + 1, 0) * tokens)];
        char joined[16];
        if (capital(r[0]) || strlen(l) + strlen(r) > 5)
            continue;
        snprintf(joined, sizeof joined, "%.5s%.5s", l, r);
        bool known = false;
        for (int i = 0; i < tokens; i++)
            known |= strcmp(token[i], joined) == 0;
        if (known)
            continue;
        snprintf(out[made], 32, "%.5s %.5s", l, r);
        list[made] = out[made];
        made++;
        strcpy(token[tokens++], joined);
    }
    return made;
}

struct toy {
    struct rt_model_dir teacher, student;
    uint32_t spoken[64]; /* the teacher's tokens that begin with a capital */
    int n;
};

static double probability(const struct toy *t, uint32_t prev, uint32_t w)
{
    double sum = 0;
    for (int i = 0; i < t->n; i++)
        sum += exp(markov(t->teacher.tok, 0, prev, t->spoken[i], 0));
    return exp(markov(t->teacher.tok, 0, prev, w, 0)) / sum;
}

static uint32_t first_of(struct toy *t, const char *text, size_t n)
{
    struct rt_err err = {0};
    struct rt_encoding e = {0};
    assert_ok(rt_tokenizer_encode(t->student.tok, text, n, &e, &err));
    const uint32_t id = e.ids[0];
    rt_encoding_free(&e);
    return id;
}

/* want[u] = probability that the student's next token is u, over all continuations by two teacher tokens, given that the first one begins with
 * the `said` bytes of the realised token. */
static void brute_force(struct toy *t, uint32_t prev, uint32_t realised, size_t said, uint32_t student_said, double *want, uint32_t n_student)
{
    const char *prefix = "", *a = "", *b = "";
    size_t np = 0, na = 0, nb = 0;
    double given = 0;
    char text[64];
    memset(want, 0, n_student * sizeof *want);
    rt_tokenizer_bytes(t->teacher.tok, realised, &prefix, &np);
    for (int i = 0; i < t->n; i++) {
        const uint32_t w = t->spoken[i];
        rt_tokenizer_bytes(t->teacher.tok, w, &a, &na);
        if (na <= said || memcmp(a, prefix, said) != 0)
            continue;
        const double p = probability(t, prev, w);
        given += p;
        for (int j = 0; j < t->n; j++) {
            rt_tokenizer_bytes(t->teacher.tok, t->spoken[j], &b, &nb);
            memcpy(text, a + said, na - said);
            memcpy(text + na - said, b, nb);
            want[w == realised ? student_said : first_of(t, text, na - said + nb)] += p * probability(t, w, t->spoken[j]);
        }
    }
    for (uint32_t u = 0; u < n_student; u++)
        want[u] /= given;
}

static void open_toy(struct toy *t, uint64_t seed)
{
    char a[24][32], b[24][32];
    const char *la[24], *lb[24];
    char name[64];
    snprintf(name, sizeof name, "toy-teacher-%d", (int)seed);
    const int n = random_merges(2 * seed, a, la, 20);
    t->teacher = rf_model(rf_tokenizer(name, la, n, false));
    snprintf(name, sizeof name, "toy-student-%d", (int)seed);
    const int m = random_merges(2 * seed + 1, b, lb, 12);
    t->student = rf_model(rf_tokenizer(name, lb, m, false));
    t->n = 0;
    for (uint32_t w = 0; w < rt_tokenizer_n_ids(t->teacher.tok); w++)
        if (markov(t->teacher.tok, 0, 0, w, 0) > -50)
            t->spoken[t->n++] = w;
    assert_true(t->n > 4);
}

/* KL of a row against a student that says `q`. */
static double kl_against(const struct rf_made *m, int64_t row, const double *q)
{
    double kl = 0;
    for (uint32_t u = 0; u < m->map.n_student; u++) {
        const double t = rf_prob(m, row, u);
        kl += t > 0 ? t * log(t / fmax(q[u], 1e-9)) : 0;
    }
    return kl;
}

/* Cases 1 and 2: every row equals the marginal to 1e-6 (float32 logits of at most 6: the rounding of a logit and of lse is 5e-7). */
static void equals_brute_force(void **state)
{
    (void)state;
    int64_t head = 0, inside = 0;
    double kl = 0, shifted = 0;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        struct toy t;
        open_toy(&t, seed);
        uint32_t ids[40];
        uint8_t mask[40];
        for (int i = 0; i < 40; i++) {
            ids[i] = t.spoken[(int)(rt_rng_uniform(seed, 500 + (uint64_t)i, 1) * t.n)];
            mask[i] = 1;
        }
        struct rf_rows r = rf_rows(&t.teacher, ids, mask, 40, 100000, markov, t.teacher.tok);
        struct rf_made m = rf_make(&t.teacher, &t.student, &r, RT_RETARGET_EXACT);
        assert_int_equal(m.reject, RT_REJECT_NONE);
        double want[512], before[512];
        bool have = false;
        assert_true(m.map.n_student <= 512);
        for (int64_t i = 1; i < m.text.student.n; i++) {
            const struct rt_place *p = &m.place[i];
            const int64_t row = rf_row_of(&m, i);
            double sum = 0;
            assert_true(p->kind != RT_PLACE_CROSSING);
            if (p->teacher < 1)
                continue;
            assert_true(row >= 0);
            brute_force(&t, ids[p->teacher - 1], ids[p->teacher], p->offset, m.text.enc.ids[i], want, m.map.n_student);
            for (uint32_t u = 0; u < m.map.n_student; u++) {
                assert_near(rf_prob(&m, row, u), want[u], 1e-6);
                sum += rf_prob(&m, row, u);
            }
            assert_near(sum, 1, 1e-6); /* the teacher's whole vocabulary is stored: nothing is left */
            assert_true(want[m.text.enc.ids[i]] > 0);
            kl += kl_against(&m, row, want); /* of a student that is right everywhere, and of one whose rows are one too late */
            shifted += have ? kl_against(&m, row, before) : 0;
            memcpy(before, want, sizeof before);
            have = true;
            head += p->kind != RT_PLACE_INSIDE;
            inside += p->kind == RT_PLACE_INSIDE;
        }
        assert_int_equal(m.counts.rows[RT_PLACE_WHOLE] + m.counts.rows[RT_PLACE_HEAD] + m.counts.rows[RT_PLACE_INSIDE], m.rows.n_rows);
        rf_made_free(&m);
        rf_rows_free(&r);
        rt_model_dir_close(&t.teacher);
        rt_model_dir_close(&t.student);
    }
    assert_true(head > 100 && inside > 50);
    assert_true(kl < 1e-5 * (double)(head + inside)); /* a row's ids are wrong by 1e-6 at most, its logarithms by not much more */
    assert_true(shifted > 0.5 * (double)(head + inside));
}

/* With k entries stored: case 1 keeps what maps, tail exact; case 2's residual is an upper bound of what the whole vocabulary gives. */
static void truncated_rows_keep_their_mass(void **state)
{
    (void)state;
    struct toy t;
    int64_t bounded = 0;
    open_toy(&t, 3);
    uint32_t ids[60];
    uint8_t mask[60];
    for (int i = 0; i < 60; i++) {
        ids[i] = t.spoken[(int)(rt_rng_uniform(9, 500 + (uint64_t)i, 1) * t.n)];
        mask[i] = 1;
    }
    struct rf_rows all = rf_rows(&t.teacher, ids, mask, 60, 100000, markov, t.teacher.tok), few = rf_rows(&t.teacher, ids, mask, 60, 5, markov, t.teacher.tok);
    struct rf_made whole = rf_make(&t.teacher, &t.student, &all, RT_RETARGET_EXACT), cut = rf_make(&t.teacher, &t.student, &few, RT_RETARGET_EXACT);
    for (int64_t i = 1; i < cut.text.student.n; i++) {
        const int64_t a = rf_row_of(&whole, i), b = rf_row_of(&cut, i);
        const struct rt_place *p = &cut.place[i];
        double stored = 0, mass = 0;
        if (b < 0)
            continue;
        for (int j = 0; j < 5; j++)
            stored += exp((double)few.rows.topk_logits[(p->teacher - 1) * 5 + j] - (double)few.rows.lse[(p->teacher - 1) * 2]);
        for (int j = 0; j < cut.rows.k; j++) {
            const uint32_t u = cut.rows.topk_ids[b * cut.rows.k + j];
            if (u == RT_NO_ID)
                continue;
            mass += rf_prob(&cut, b, u);
            assert_true(rf_prob(&cut, b, u) <= rf_prob(&whole, a, u) + 1e-6);
        }
        if (p->kind != RT_PLACE_INSIDE)
            assert_near(mass, stored, 1e-6); /* every listed token maps: the tail is the teacher's */
        else
            bounded++;
        assert_true(mass <= 1 + 1e-6 && mass >= 0.5 - 1e-6); /* above one half by the rule of RT_MASK_LOOSE */
    }
    assert_true(bounded > 5);
    assert_int_equal(cut.counts.bounded, bounded);
    const struct rt_retarget_counts *c = &cut.counts;
    for (int k = 0; k < RT_PLACE_KINDS; k++)
        assert_near(c->mass[k] + c->residual[k], (double)c->rows[k], 1e-6 * (double)(c->rows[k] + 1));
    int64_t masked = 0;
    for (int k = 0; k < RT_MASK_COUNT; k++)
        masked += c->masked[k];
    assert_int_equal(masked + cut.rows.n_rows, c->targets);
    rf_made_free(&whole);
    rf_made_free(&cut);
    rf_rows_free(&all);
    rf_rows_free(&few);
    rt_model_dir_close(&t.teacher);
    rt_model_dir_close(&t.student);
}

/* ---- one tokenizer on both sides ---- */
static void same_tokenizer_same_bits(void **state)
{
    (void)state;
    struct rt_model_dir a = rf_model(test_data("tests/data/tokenizers/deepseek")), b = rf_model(test_data("tests/data/tokenizers/deepseek"));
    struct rf_rows r = rf_render(&a, "What is 42 times 3?", "First, 42 times 3\r\n is 126 \\boxed{126} \xf0\x9f\x98\x80</think>\n\n126", 12);
    for (int mode = RT_RETARGET_EXACT; mode <= RT_RETARGET_STRICT; mode++) {
        struct rf_made m = rf_make(&a, &b, &r, (enum rt_retarget_mode)mode);
        assert_int_equal(m.rows.n_rows, r.rows.n_rows);
        assert_int_equal(m.rows.n_tokens, r.rows.n_tokens);
        const size_t n = (size_t)r.rows.n_rows, k = (size_t)r.rows.k;
        assert_memory_equal(m.rows.ids, r.rows.ids, (size_t)r.rows.n_tokens * 4);
        assert_memory_equal(m.rows.loss_mask, r.rows.loss_mask, (size_t)r.rows.n_tokens);
        assert_memory_equal(m.rows.position, r.rows.position, n * 4);
        assert_memory_equal(m.rows.topk_ids, r.rows.topk_ids, n * k * 4);
        assert_memory_equal(m.rows.topk_logits, r.rows.topk_logits, n * k * 4);
        assert_memory_equal(m.rows.lse, r.rows.lse, n * 8);
        assert_memory_equal(m.rows.next_logprob, r.rows.next_logprob, n * 4);
        assert_memory_equal(m.rows.next_rank, r.rows.next_rank, n * 4);
        assert_int_equal(m.id.n_lse, 2);
        rf_made_free(&m);
    }
    rf_rows_free(&r);
    rt_model_dir_close(&a);
    rt_model_dir_close(&b);
}

/* One tokenizer, and ends of a turn that are not the same: sums at every temperature stay the teacher's, in strict too. */
static void same_tokenizer_other_end(void **state)
{
    (void)state;
    struct rt_err err = {0};
    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json"};
    const char *dir = rf_tokenizer("end-a", NULL, 0, false), *other = test_tmp("end-b");
    struct rt_buf b = {0};
    char path[4096];
    assert_ok(rt_mkdirs(other, &err));
    for (int i = 0; i < 2; i++) {
        assert_ok(rt_path_join(path, sizeof path, dir, files[i], &err));
        b.len = 0;
        assert_ok(rt_file_read_all(path, 1 << 20, &b, &err));
        assert_ok(rt_path_join(path, sizeof path, other, files[i], &err));
        static const char no_eos[] = "{\"add_bos_token\":false}";
        assert_ok(rt_publish_bytes(path, i == 0 ? b.data : no_eos, i == 0 ? b.len : sizeof no_eos - 1, &err));
    }
    rt_buf_free(&b);
    struct rt_model_dir t = rf_model(dir), s = rf_model(other);
    const uint32_t ids[] = {'a', 'b', 'c', 'd', 'e'};
    const uint8_t mask[] = {1, 1, 1, 1, 1};
    struct rf_rows r = rf_rows(&t, ids, mask, 5, 100000, rf_hash_logit, NULL);
    for (int mode = RT_RETARGET_EXACT; mode <= RT_RETARGET_STRICT; mode++) {
        struct rf_made m = rf_make(&t, &s, &r, (enum rt_retarget_mode)mode);
        assert_true(m.map.same && m.map.teacher_end != m.map.student_end);
        assert_int_equal(m.rows.n_rows, 4);
        assert_int_equal(m.rows.n_lse, 2);
        assert_memory_equal(m.rows.lse, r.rows.lse, 4 * 2 * sizeof(float));
        assert_memory_equal(m.rows.next_logprob, r.rows.next_logprob, 4 * sizeof(float));
        rf_made_free(&m);
    }
    rf_rows_free(&r);
    rt_model_dir_close(&t);
    rt_model_dir_close(&s);
}

/* An id that one teacher token alone maps to keeps its bits; where tokens are as good as the same, so is the order. */
static void single_contributions_keep_their_bits(void **state)
{
    (void)state;
    struct rt_model_dir a = rf_model(test_data("tests/data/tokenizers/deepseek")), b = rf_model(test_data("tests/data/tokenizers/llama3"));
    struct rf_rows r = rf_render(&a, "Q", "So the answer is 42", 12);
    struct rf_made m = rf_make(&a, &b, &r, RT_RETARGET_EXACT);
    int64_t bits = 0;
    for (int64_t row = 0; row < m.rows.n_rows; row++) {
        const struct rt_place *p = &m.place[m.rows.position[row] + 1];
        if (p->kind == RT_PLACE_INSIDE)
            continue;
        for (int64_t s = 0; s < r.rows.n_rows; s++)
            for (int j = 0; r.rows.position[s] + 1 == p->teacher && j < r.rows.k; j++)
                for (int e = 0; e < m.rows.k; e++)
                    bits += memcmp(&r.rows.topk_logits[s * r.rows.k + j], &m.rows.topk_logits[row * m.rows.k + e], 4) == 0;
        assert_int_equal(m.rows.n_lse, 1);
    }
    assert_true(bits > 8 * m.rows.n_rows);
    rf_made_free(&m);
    rf_rows_free(&r);
    rt_model_dir_close(&a);
    rt_model_dir_close(&b);
}

/* ---- strict ---- */
static void strict_takes_shared_tokens_alone(void **state)
{
    (void)state;
    struct toy t;
    open_toy(&t, 5);
    uint32_t ids[60];
    uint8_t mask[60];
    for (int i = 0; i < 60; i++) {
        ids[i] = t.spoken[(int)(rt_rng_uniform(11, 500 + (uint64_t)i, 1) * t.n)];
        mask[i] = 1;
    }
    struct rf_rows r = rf_rows(&t.teacher, ids, mask, 60, 100000, markov, t.teacher.tok);
    struct rf_made m = rf_make(&t.teacher, &t.student, &r, RT_RETARGET_STRICT);
    assert_true(m.rows.n_rows > 3);
    for (int64_t row = 0; row < m.rows.n_rows; row++) {
        const int64_t i = m.rows.position[row] + 1;
        const struct rt_place *p = &m.place[i];
        double shared = 0;
        assert_int_equal(p->kind, RT_PLACE_WHOLE);
        for (int w = 0; w < t.n; w++)
            shared += m.map.equal[t.spoken[w]] != RT_NO_ID ? probability(&t, ids[p->teacher - 1], t.spoken[w]) : 0;
        for (int w = 0; w < t.n; w++)
            if (m.map.equal[t.spoken[w]] != RT_NO_ID)
                assert_near(rf_prob(&m, row, m.map.equal[t.spoken[w]]), probability(&t, ids[p->teacher - 1], t.spoken[w]) / shared, 1e-6);
        assert_near(rf_prob(&m, row, m.text.enc.ids[i]), exp((double)m.rows.next_logprob[row]), 1e-6);
    }
    assert_int_equal(m.rows.n_rows + m.counts.masked[RT_MASK_SPLIT] + m.counts.masked[RT_MASK_UNSTORED], m.counts.targets);
    rf_made_free(&m);
    rf_rows_free(&r);
    rt_model_dir_close(&t.teacher);
    rt_model_dir_close(&t.student);
}

/* ---- rows ---- */
static void rows_add_up_and_sort(void **state)
{
    (void)state;
    uint64_t memory[256] = {0};
    struct rt_row_work w;
    assert_true(rt_row_work_bytes(8) <= sizeof memory);
    rt_row_work_init(&w, 8, memory);
    for (int again = 0; again < 2; again++) {
        rt_row_begin(&w);
        rt_row_add(&w, 7, 3, 0.5);
        rt_row_add(&w, RT_NO_ID, 2.5f, 0.2);
        rt_row_add(&w, 9, 2, 0.1);
        rt_row_add(&w, 4, 2, 0.1);
        rt_row_add(&w, 9, 2, 0.1);
        rt_row_add(&w, 9, 1, 0.05);
        rt_row_close(&w);
        assert_int_equal(w.n, 3);
        assert_int_equal(w.id[0], 7);
        assert_int_equal(w.id[1], 9);
        assert_int_equal(w.id[2], 4);
        assert_near(w.logit[1], log(2 * exp(2) + exp(1)), 1e-6); /* float32 */
        assert_true(w.logit[0] == 3 && w.logit[2] == 2);
        assert_near(w.kept, 0.85, 1e-12);
        assert_int_equal(rt_row_find(&w, 4), 2);
        assert_int_equal(rt_row_find(&w, 5), -1);
    }
    rt_row_begin(&w); /* equal logits: by id */
    rt_row_add(&w, 12, 0, 0.5);
    rt_row_add(&w, 3, 0, 0.5);
    rt_row_close(&w);
    assert_int_equal(w.id[0], 3);
    rt_row_begin(&w); /* ids that a teacher masks out: no mass, and still a number */
    rt_row_add(&w, 5, 10, 1);
    rt_row_add(&w, 6, -10000, 0);
    rt_row_add(&w, 6, -10000, 0);
    rt_row_close(&w);
    assert_near(w.logit[1], -10000 + log(2), 1e-3); /* float32 */
}

/* ---- the loss on such rows ---- */
enum { H = 4, V = 300 };
struct loss_case {
    struct rt_device *d;
    struct rt_weight *w;
    double x[H], wt[V * H], dx[H], kl, student;
    int32_t ids[16];
    float logp[16];
    int k;
};

static double kl_of(void *ctx)
{
    struct loss_case *c = ctx;
    struct rt_err err = {0};
    const int32_t label = -100;
    const uint8_t mask = 1;
    assert_ok(RT_OP(c->d, head_loss, &err, .x = c->x, .w = c->w, .dx = c->dx, .n = 1, .H = H, .V = V, .label = &label, .k = c->k, .top_ids = c->ids,
                    .top_logp = c->logp, .kl_mask = &mask, .tail = RT_TAIL_BUCKET, .w_kl = 1, .T = 1, .kl = &c->kl, .student_mass = &c->student));
    return c->kl;
}

/* Gradients of rows with empty entries: with a residual, with one that goes to nothing, and where the student has all its mass on the listed. */
static void gradients_at_the_edges(void **state)
{
    (void)state;
    struct rt_device d = ops_open(&rt_backend_ref64);
    struct rt_model_dir a = rf_model(test_data("tests/data/tokenizers/deepseek")), b = rf_model(test_data("tests/data/tokenizers/llama3"));
    struct rf_rows r = rf_render(&a, "Q", "So x = 42", 12);
    struct rf_made m = rf_make(&a, &b, &r, RT_RETARGET_EXACT);
    struct loss_case *c = calloc(1, sizeof *c);
    assert_non_null(c);
    int64_t row = 0;
    while (row + 1 < m.rows.n_rows && rt_row_entries(&m.rows, row) == m.rows.k)
        row++;
    assert_true(rt_row_entries(&m.rows, row) < m.rows.k && rt_row_entries(&m.rows, row) > 1);
    c->d = &d;
    c->k = m.rows.k;
    ops_fill(c->x, H, 1);
    ops_fill(c->wt, V * H, 2);
    c->w = ops_param(&d, c->wt, V, H);
    double mass = 0;
    for (int j = 0; j < c->k; j++) {
        const bool entry = m.rows.topk_ids[row * c->k + j] != RT_NO_ID;
        c->ids[j] = entry ? (int32_t)m.rows.topk_ids[row * c->k + j] % V : -1;
        c->logp[j] = entry ? m.rows.topk_logits[row * c->k + j] - m.rows.lse[row] : 0;
        mass += entry ? exp((double)c->logp[j]) : 0;
    }
    kl_of(c);
    double dx[H];
    memcpy(dx, c->dx, sizeof dx);
    ops_check_grad("a row with a residual", kl_of, c, c->x, H, dx);
    for (double residual = 1e-3; residual > 1e-12; residual /= 10) { /* to nothing, across the 1e-7 at which the bucket goes */
        float was[16];
        memcpy(was, c->logp, sizeof was);
        for (int j = 0; j < c->k; j++)
            c->logp[j] += c->ids[j] >= 0 ? (float)log((1 - residual) / mass) : 0;
        kl_of(c);
        memcpy(dx, c->dx, sizeof dx);
        assert_true(isfinite(c->kl) && c->kl >= -1e-6 && isfinite(ops_dot(dx, dx, H)));
        ops_check_grad("a residual that vanishes", kl_of, c, c->x, H, dx);
        memcpy(c->logp, was, sizeof was);
    }
    for (double scale = 1; scale < 1e4; scale *= 4) { /* the student gives everything to one listed id */
        for (int h = 0; h < H; h++)
            c->wt[c->ids[0] * H + h] = scale * c->x[h];
        kl_of(c);
        assert_true(isfinite(c->kl) && isfinite(ops_dot(c->dx, c->dx, H)));
    }
    assert_near(c->student, 1, 1e-12);
    d.be->weight_free(d.dev, c->w);
    free(c);
    rf_made_free(&m);
    rf_rows_free(&r);
    rt_model_dir_close(&a);
    rt_model_dir_close(&b);
    rt_device_close(&d);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(equals_brute_force),
    cmocka_unit_test(truncated_rows_keep_their_mass),
    cmocka_unit_test(same_tokenizer_same_bits),
    cmocka_unit_test(same_tokenizer_other_end),
    cmocka_unit_test(single_contributions_keep_their_bits),
    cmocka_unit_test(strict_takes_shared_tokens_alone),
    cmocka_unit_test(rows_add_up_and_sort),
    cmocka_unit_test(gradients_at_the_edges),
};
RT_SUITE(retarget, tests)
