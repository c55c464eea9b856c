/* Spans: where a text is cut, the loss of a span and its derivative, boundary ids, and shards that hold spans. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/spans.h"
#include "formats/shard.h"
#include "tests/run_command.h"
#include "tests/shard_fixture.h"

static void near_to(double a, double b, double bound)
{
    if (!(fabs(a - b) <= bound))
        fail_msg("%.12g, expected %.12g within %g", a, b, bound);
}

/* ---- loss ---- */
static void loss_is_that_of_two_coins(void **state)
{
    (void)state;
    static const double logs[] = {-1e-9, -1e-3, -0.5, -3, -40, -700};
    double dy, up, down, ignore;
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++)
            for (double tau = 1; tau <= 100; tau *= 10) {
                const double x = logs[i], y = logs[j] - 1e-3, u = x / tau - RT_SPAN_CERTAIN, v = y / tau - RT_SPAN_CERTAIN, p = exp(u);
                const double f = rt_span_loss(x, y, tau, &dy), h = 1e-3 * -y;
                /* the definition, in long double where 1 - q nears 0 */
                const long double q = expl((long double)v), want = tau * (p * (u - v) + (1 - p) * (log1pl(-(long double)p) - log1pl(-q)));
                near_to(f, (double)want, 1e-8 * (1 + fabs((double)want)));
                assert_true(f >= -1e-12);
                up = rt_span_loss(x, y + h, tau, &ignore);
                down = rt_span_loss(x, y - h, tau, &ignore);
                /* f' is near 1 - x/y, so the truncation is h^2/y^2 = 1e-6 of 1 + |f'| */
                near_to(dy, (up - down) / (2 * h), 2e-6 * (1 + fabs(dy)));
            }
    assert_true(rt_span_loss(-2, -2, 100, &dy) == 0 && dy == 0);
    assert_true(isfinite(rt_span_loss(0, -5, 100, &dy)) && isfinite(dy));
    assert_true(isfinite(rt_span_loss(-5, 0, 100, &dy)) && isfinite(dy) && dy > 0); /* too sure: less is better */
    assert_true(isfinite(rt_span_loss(1e-6, 1e-6, 100, &dy)));
    near_to(rt_span_loss(-3, -2, 1e4, &dy), 3 * log(3.0 / 2) - 1, 1e-3); /* the limit of a great tau */
    rt_span_loss(-1e-7, -2, 100, &dy);
    near_to(dy, -1, 1e-3); /* a certain teacher: cross-entropy */
}

/* ---- cutting ---- */
static int64_t cut(int64_t nt, const uint32_t *te, int64_t ns, const uint32_t *se, const float *boundary, struct rt_span *out)
{
    float logp[16];
    int64_t n = 0;
    for (int i = 0; i < 16; i++)
        logp[i] = -(float)(1 << i);
    const struct rt_span_side t = {nt, te}, s = {ns, se};
    rt_spans_cut(&t, &s, logp, boundary, RT_SPAN_GAMMA, out, &n);
    return n;
}

static void same_span(const struct rt_span *s, int64_t teacher, int64_t student, int64_t rows, double logp, bool boundary)
{
    assert_int_equal(s->teacher, teacher);
    assert_int_equal(s->student, student);
    assert_int_equal(s->rows, rows);
    assert_int_equal(s->boundary, boundary);
    near_to(s->logp, logp, 0);
}

static void spans_end_together(void **state)
{
    (void)state;
    struct rt_span span[16];
    /* teacher ab|cd|efg|h, student a|bc|d|e|fg|h */
    const uint32_t te[] = {2, 4, 7, 8}, se[] = {1, 3, 4, 5, 7, 8};
    assert_int_equal(cut(4, te, 6, se, NULL, span), 3);
    same_span(&span[0], 1, 2, 3, -1 - 2, false);
    same_span(&span[1], 2, 4, 2, -4, false);
    same_span(&span[2], 3, 5, 1, -8, false);
    /* a boundary of little mass: the span goes on; one that is not known ends it and is not counted */
    const float little[] = {0, -3, -0.5f, NAN};
    assert_int_equal(cut(4, te, 6, se, little, span), 2);
    same_span(&span[0], 2, 4, 5, -1 - 2 - 4, true);
    same_span(&span[1], 3, 5, 1, -8, false);
    /* ... to the last common end at most */
    const float never[] = {-9, -9, -9, -9};
    assert_int_equal(cut(4, te, 6, se, never, span), 1);
    same_span(&span[0], 3, 5, 6, -15, true);
    /* what is behind the last common end is in no span */
    assert_int_equal(cut(4, te, 5, (const uint32_t[]){1, 3, 4, 5, 9}, NULL, span), 1);
    same_span(&span[0], 1, 2, 3, -3, false);
    assert_int_equal(cut(2, te, 2, (const uint32_t[]){3, 5}, NULL, span), 0);
    assert_int_equal(cut(0, te, 2, se, NULL, span), 0);
    assert_int_equal(cut(2, te, 0, se, NULL, span), 0);
    /* tokens without units fall to the span behind them, and close none */
    assert_int_equal(cut(4, (const uint32_t[]){2, 2, 3, 3}, 4, (const uint32_t[]){2, 2, 2, 3}, NULL, span), 2);
    same_span(&span[0], 0, 0, 1, -1, false);
    same_span(&span[1], 2, 3, 3, -2 - 4, false);
}

/* One tokenizer on both sides: a span a token. */
static void equal_tokens_are_spans(void **state)
{
    (void)state;
    struct rt_span span[16];
    const uint32_t e[] = {1, 2, 5};
    assert_int_equal(cut(3, e, 3, e, NULL, span), 3);
    for (int i = 0; i < 3; i++)
        same_span(&span[i], i, i, 1, -(1 << i), false);
}

/* ---- boundary ids ---- */
static void boundaries_are_blank_or_added(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tokenizer *t = NULL;
    static uint8_t set[2048];
    uint32_t id;
    assert_ok(rt_tokenizer_load("examples/crossing_student", &t, &err));
    rt_boundary_ids(t, 2048, set);
    static const struct { const char *bytes; uint8_t in; } want[] = {{" ", 1}, {"\n", 1}, {"\t", 1}, {"\r", 1}, {" the", 1}, {".", 0}, {"a", 0},
                                                                     {"</think>", 1}, {"<|im_end|>", 1}};
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        assert_true(rt_tokenizer_find(t, want[i].bytes, strlen(want[i].bytes), &id));
        assert_int_equal(set[id], want[i].in);
    }
    for (uint32_t v = rt_tokenizer_n_ids(t); v < 2048; v++)
        assert_int_equal(set[v], 0);
    rt_tokenizer_free(t);
}

/* ---- shards ---- */
static struct rt_row_identity spans_identity(void)
{
    struct rt_row_identity id = sf_identity(0);
    id.n_lse = 1;
    id.lse_temperature[0] = 1;
    id.boundary = true;
    strcpy(id.origin.mode, "alm");
    memset(id.origin.tokenizer_sha256, 'c', 64);
    id.origin.vocab_size = 200;
    id.origin.n_ids = 190;
    return id;
}

enum { TOKENS = 12 };
struct columns {
    uint32_t span[TOKENS], rank[TOKENS];
    float span_logp[TOKENS], logp[TOKENS], lse[TOKENS], boundary[TOKENS];
};

static struct sf_made *make_spans(const struct rt_row_identity *id, struct columns *c)
{
    struct sf_made *m = sf_make(id, 3, TOKENS);
    *c = (struct columns){.span = {0, 0, 3, 1, 0, 2}, .span_logp = {0, 0, -3.5f, -1, 0, -0.25f}, .logp = {0, 0, -3.25f, -1, 0, 0}};
    m->rows.lse = c->lse;
    m->rows.next_logprob = c->logp;
    m->rows.next_rank = c->rank;
    m->rows.span = c->span;
    m->rows.span_logp = c->span_logp;
    return m;
}

static void write_one(const char *dir, const struct rt_row_identity *id, const struct rt_rows *rows)
{
    struct rt_err err = {0};
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    assert_ok(rt_shard_sink_open(dir, id, &sf_small, &s, &sink, &resume, &err));
    assert_ok(sink.put(sink.self, rows, &err));
    assert_ok(sink.finish(sink.self, &err));
    rt_shard_sink_free(s);
}

static void shards_hold_spans(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = spans_identity();
    struct columns c;
    struct sf_made *m = make_spans(&id, &c);
    struct rt_shard_set *set = NULL;
    struct rt_rows back;
    const char *dir = test_tmp("spans");
    write_one(dir, &id, &m->rows);
    assert_ok(rt_shard_set_open(dir, &set, &err));
    assert_ok(rt_row_identity_match(rt_shard_set_identity(set), &id, dir, &err));
    assert_true(rt_shard_set_identity(set)->boundary);
    assert_ok(rt_shard_set_get(set, 0, &back, &err));
    assert_int_equal(back.n_rows, TOKENS - 1);
    assert_memory_equal(back.span, c.span, (TOKENS - 1) * 4);
    assert_memory_equal(back.span_logp, c.span_logp, (TOKENS - 1) * 4);
    assert_null(back.boundary_logp);
    rt_shard_set_free(set);
    /* another kind of set is another identity */
    struct rt_row_identity other = id;
    other.boundary = false;
    assert_status(rt_row_identity_match(&other, &id, "x", &err), REFUSED);
    free(m);
}

static void shards_hold_boundaries(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_row_identity id = sf_identity(4);
    id.boundary = true;
    struct sf_made *m = sf_make(&id, 3, TOKENS);
    float boundary[TOKENS];
    for (int i = 0; i < TOKENS; i++)
        boundary[i] = i == 4 ? -INFINITY : -0.1f * (float)i;
    m->rows.boundary_logp = boundary;
    struct rt_shard_set *set = NULL;
    struct rt_rows back;
    const char *dir = test_tmp("boundaries");
    write_one(dir, &id, &m->rows);
    assert_ok(rt_shard_set_open(dir, &set, &err));
    assert_ok(rt_shard_set_get(set, 0, &back, &err));
    assert_memory_equal(back.boundary_logp, boundary, (TOKENS - 1) * 4);
    assert_null(back.span);
    rt_shard_set_free(set);
    boundary[2] = 0.5f;
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    boundary[2] = NAN;
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    m->rows.boundary_logp = NULL;
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    free(m);
}

static void bad_spans_are_refused(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const struct rt_row_identity id = spans_identity();
    struct columns c;
    struct sf_made *m = make_spans(&id, &c);
    assert_ok(rt_rows_check(&m->rows, &id, "x", &err));
    c.span[5] = 3; /* one row of it is another span's */
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    c.span[5] = UINT32_MAX;
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    c.span[5] = 2;
    c.span_logp[5] = NAN;
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    c.span_logp[5] = 0.5f;
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    c.span_logp[5] = 0;
    c.span_logp[6] = -1; /* no span ends there */
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    m->rows.span = NULL;
    assert_status(rt_rows_check(&m->rows, &id, "x", &err), FORMAT);
    free(m);
}

/* `logits --boundary`, with every id stored: the mass of the boundary ids is the sum over them. Without any: the same. */
static void a_teacher_says_its_boundaries(void **state)
{
    (void)state;
    enum { IDS = 1016 };
    struct rt_err err = {0};
    const char *dir[2] = {test_tmp("teacher-all"), test_tmp("teacher-none")}, *data = test_tmp("boundary.jsonl");
    static const char *const cache[2] = {"topk=1016", "topk=0"};
    struct rt_shard_set *set[2];
    struct rt_rows rows[2];
    struct rt_tokenizer *tok = NULL;
    uint8_t in_set[IDS];
    static const char lines[] = "{\"prompt\":\"What is 2 + 3?\",\"completion\":\"2 + 3 = 5.\\n</think>\\n\\nAnswer: \\\\boxed{5}\"}\n{\"text\":\" bapa bapa nisa\"}\n";
    assert_ok(rt_publish_bytes(data, lines, sizeof lines - 1, &err));
    assert_ok(rt_tokenizer_load("examples/tiny_teacher", &tok, &err));
    rt_boundary_ids(tok, IDS, in_set);
    for (int i = 0; i < 2; i++) {
        assert_ok(test_command(&rt_cmd_logits, (const char *[]){"--teacher", "examples/tiny_teacher", "--data", data, "--out", dir[i], "--cache", cache[i],
                                                                "--boundary", "--threads", "1", NULL}, &err));
        assert_ok(rt_shard_set_open(dir[i], &set[i], &err));
    }
    for (int64_t s = 0; s < 2; s++) {
        for (int i = 0; i < 2; i++)
            assert_ok(rt_shard_set_get(set[i], s, &rows[i], &err));
        assert_true(rows[0].n_rows > 2 && rows[0].n_rows == rows[1].n_rows);
        for (int64_t r = 0; r < rows[0].n_rows; r++) {
            double sum = 0;
            for (int j = 0; j < IDS; j++)
                if (in_set[rows[0].topk_ids[r * IDS + j]])
                    sum += exp((double)rows[0].topk_logits[r * IDS + j] - (double)rows[0].lse[r]);
            /* float32 logits near 10, and sums of a thousand of their exponentials */
            near_to(rows[0].boundary_logp[r], log(sum), 2e-5 * (1 + fabs(log(sum))));
        }
        assert_memory_equal(rows[0].boundary_logp, rows[1].boundary_logp, (size_t)rows[0].n_rows * sizeof(float));
        assert_memory_equal(rows[0].next_logprob, rows[1].next_logprob, (size_t)rows[0].n_rows * sizeof(float));
    }
    for (int i = 0; i < 2; i++)
        rt_shard_set_free(set[i]);
    rt_tokenizer_free(tok);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(loss_is_that_of_two_coins), cmocka_unit_test(spans_end_together),    cmocka_unit_test(equal_tokens_are_spans),
    cmocka_unit_test(boundaries_are_blank_or_added), cmocka_unit_test(shards_hold_spans), cmocka_unit_test(shards_hold_boundaries),
    cmocka_unit_test(bad_spans_are_refused),     cmocka_unit_test(a_teacher_says_its_boundaries),
};
RT_SUITE(spans, tests)
