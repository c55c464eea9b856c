/* Mode alm: which spans are made of two tokenisations and a teacher's realised log-probabilities; the whole way from a teacher's shards. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "distill/retarget_alm.h"
#include "distill/spans.h"
#include "formats/shard.h"
#include "tests/run_command.h"
#include "tests/suite.h"

static void near_to(double a, double b, double bound)
{
    if (!(fabs(a - b) <= bound))
        fail_msg("%.12g, expected %.12g within %g", a, b, bound);
}

/* ---- one sequence, by hand ---- */

enum { N = 12 };
/* Teacher: prompt token 0, then ab|cd|ef|gh|END; student: prompt tokens 0 and 1, then a|bc|d|ef|g|h|END. END is one unit. */
struct by_hand {
    uint32_t t_ids[N], s_ids[N], position[N], next[N], rank[N];
    uint8_t digits[64];
    float logp[N], boundary[N], lse[N];
    struct rt_rows rows;
    struct rt_row_identity id;
    struct rt_vocab_map map;
    struct rt_place place[N];
    struct rt_retarget_in in;
    struct rt_retarget_out out;
    struct rt_rows made;
    struct rt_retarget_counts counts;
};

static const uint32_t t_end[] = {0, 2, 4, 6, 8, 9}, s_end[] = {0, 0, 1, 3, 4, 6, 7, 8, 9};
static const uint8_t t_mask[] = {0, 1, 1, 1, 1, 1}, s_mask[] = {0, 0, 1, 1, 1, 1, 1, 1, 1};
enum { T = 6, S = 9 };

static void set_up(struct by_hand *h, bool boundary)
{
    *h = (struct by_hand){.boundary = {-0.1f, -0.2f, -0.3f, -0.4f, -0.5f, NAN}};
    for (uint32_t i = 0; i < N; i++) {
        h->t_ids[i] = i;
        h->s_ids[i] = 20 + i;
        h->position[i] = i;
        h->next[i] = i + 1;
        h->logp[i] = -(float)(1 << i); /* of token i + 1 */
    }
    h->id.boundary = boundary;
    h->map.digits = h->digits;
    h->rows = (struct rt_rows){.n_tokens = T, .ids = h->t_ids, .loss_mask = t_mask, .n_rows = T - 1, .n_lse = 1, .position = h->position, .lse = h->lse,
                               .next_id = h->next, .next_logprob = h->logp, .next_rank = h->rank, .boundary_logp = boundary ? h->boundary : NULL};
    h->in = (struct rt_retarget_in){.map = &h->map, .id = &h->id, .rows = &h->rows, .place = h->place, .gamma = RT_SPAN_GAMMA,
                                    .teacher = {.ids = h->t_ids, .end = t_end, .target = t_mask, .first = 1, .n = T},
                                    .student = {.ids = h->s_ids, .end = s_end, .target = s_mask, .first = 2, .n = S}};
}

static void make(struct by_hand *h)
{
    struct rt_err err = {0};
    rt_align(&h->in.teacher, &h->in.student, h->place);
    assert_ok(rt_retarget_alm(&h->in, &h->out, &h->counts, &err));
}

static void expect(const struct by_hand *h, int row, uint32_t span, double logp, double whole)
{
    assert_int_equal(((const uint32_t *)(const void *)h->out.span.data)[row], span);
    near_to(((const float *)(const void *)h->out.next_logprob.data)[row], logp, 1e-5);
    near_to(((const float *)(const void *)h->out.span_logp.data)[row], whole, 1e-5);
}

static void tear_down(struct by_hand *h)
{
    rt_retarget_out_free(&h->out);
}

static void spans_of_a_turn(void **state)
{
    (void)state;
    struct by_hand h;
    set_up(&h, false);
    make(&h);
    assert_int_equal(h.out.n_rows, 7);
    assert_int_equal(h.out.k, 0);
    assert_int_equal(((const uint32_t *)(const void *)h.out.position.data)[0], 1);
    expect(&h, 0, 0, 0, 0);
    expect(&h, 2, 3, -1 - 2, -1 - 2);
    expect(&h, 3, 1, -4, -4);
    expect(&h, 5, 2, -8, -8);
    expect(&h, 6, 1, -16, -16); /* the ends of the turn */
    assert_int_equal(h.counts.spans, 4);
    assert_int_equal(h.counts.targets, 7);
    tear_down(&h);
    /* boundaries: the row at position p says that of token p; the last token has none behind it */
    set_up(&h, true);
    make(&h);
    expect(&h, 2, 3, -3, -3 - 0.3);
    expect(&h, 3, 1, -4, -4 - 0.4);
    expect(&h, 5, 2, -8, -8 - 0.5);
    expect(&h, 6, 1, -16, -16);
    tear_down(&h);
    /* little mass behind ef: the span goes on */
    set_up(&h, true);
    h.boundary[3] = -5;
    make(&h);
    expect(&h, 3, 0, 0, 0);
    expect(&h, 5, 3, -12, -12 - 0.5);
    tear_down(&h);
}

static void what_is_not_known_is_in_no_span(void **state)
{
    (void)state;
    struct by_hand h;
    /* the row of cd is missing: bc crosses into it and d is of it */
    set_up(&h, false);
    memmove(h.position + 1, h.position + 2, (T - 3) * sizeof *h.position);
    memmove(h.logp + 1, h.logp + 2, (T - 3) * sizeof *h.logp);
    h.rows.n_rows = T - 2;
    make(&h);
    for (int i = 0; i < 3; i++)
        expect(&h, i, 0, 0, 0);
    expect(&h, 3, 1, -4, -4);
    assert_int_equal(h.counts.masked[RT_MASK_UNSTORED], 2);
    assert_int_equal(h.counts.masked[RT_MASK_CROSSING], 1); /* a: nothing behind it ends on both sides */
    tear_down(&h);
    /* a boundary that the teacher does not say, where the student's text goes on: a reader would count it */
    set_up(&h, true);
    h.rows.n_rows = T - 2; /* gh is the last that is stored; the row behind it, at position 4, is not */
    make(&h);
    expect(&h, 3, 1, -4, -4 - 0.4);
    expect(&h, 5, 0, 0, 0);
    tear_down(&h);
    /* the student's last token is no target: nothing of the student's would say the boundary */
    static const uint8_t mask[] = {0, 0, 1, 1, 1, 1, 1, 1, 0};
    set_up(&h, true);
    h.in.student.target = mask;
    make(&h);
    assert_int_equal(h.out.n_rows, 6);
    expect(&h, 5, 2, -8, -8);
    tear_down(&h);
    /* the student says first what the teacher was made to say (two units): no teacher token there */
    set_up(&h, false);
    static const uint32_t later[] = {2, 4, 6, 8, 10, 11};
    static const uint32_t own[] = {0, 0, 2, 3, 5, 6, 8, 10, 11};
    h.in.teacher.end = later;
    h.in.teacher.begin = 2;
    h.in.student.end = own;
    make(&h);
    expect(&h, 0, 0, 0, 0);
    expect(&h, 3, 3, -1 - 2, -1 - 2);
    assert_int_equal(h.counts.masked[RT_MASK_FORCED], 1);
    tear_down(&h);
    /* nothing at all */
    set_up(&h, false);
    h.rows.n_rows = 0;
    make(&h);
    assert_int_equal(h.counts.spans, 0);
    tear_down(&h);
}

/* ---- the whole way ---- */

static const char *teacher_shards(const char *name, const char *cache, bool boundary)
{
    struct rt_err err = {0};
    static const char lines[] = "{\"prompt\":\"What is 2 + 3?\",\"completion\":\"2 + 3 = 5.\\n</think>\\n\\nAnswer: \\\\boxed{5}\"}\n"
                                "{\"prompt\":\"Observed: hum. What is the cause?\",\"completion\":\"Tally: hum 1.\\nMost likely pump, fuse or cable.\\n</think>\\n\\nI would "
                                "say \\\\boxed{pump}\"}\n{\"text\":\" bapa bapa nisa\"}\n";
    const char *data = test_tmp("alm.jsonl"), *dir = test_tmp(name);
    assert_ok(rt_publish_bytes(data, lines, sizeof lines - 1, &err));
    assert_ok(test_command(&rt_cmd_logits, (const char *[]){"--teacher", "examples/tiny_teacher", "--data", data, "--out", dir, "--cache", cache,
                                                            boundary ? "--boundary" : "--no-boundary", "--threads", "1", NULL}, &err));
    return dir;
}

static struct rt_shard_set *retargeted(const char *shards, const char *student, const char *name, const char *gamma)
{
    struct rt_err err = {0};
    struct rt_shard_set *set = NULL;
    const char *dir = test_tmp(name);
    assert_ok(test_command(&rt_cmd_retarget, (const char *[]){"--shards", shards, "--student", student, "--out", dir, "--mode", "alm", "--gamma", gamma,
                                                              "--threads", "2", NULL}, &err));
    assert_ok(rt_shard_set_open(dir, &set, &err));
    return set;
}

/* Spans of a text give its log-probability, however they are cut; with gamma 1 there is one span a text. */
static void spans_add_up_to_the_text(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *shards = teacher_shards("alm-teacher", "topk=0", true);
    static const char *const gamma[] = {"0", "0.1", "1"};
    struct rt_shard_set *t = NULL, *s[3];
    struct rt_rows a, b;
    int64_t spans[3] = {0};
    assert_ok(rt_shard_set_open(shards, &t, &err));
    for (int g = 0; g < 3; g++)
        s[g] = retargeted(shards, "examples/crossing_student", (const char *[]){"alm-0", "alm-1", "alm-2"}[g], gamma[g]);
    for (int64_t i = 0; i < 3; i++) {
        double want = 0;
        assert_ok(rt_shard_set_get(t, i, &a, &err));
        for (int64_t r = 0; r < a.n_rows; r++)
            want += a.next_logprob[r];
        for (int g = 0; g < 3; g++) {
            double got = 0;
            int64_t rows = 0;
            assert_ok(rt_shard_set_get(s[g], i, &b, &err));
            for (int64_t r = 0; r < b.n_rows; r++) {
                got += b.next_logprob[r];
                rows += b.span[r];
                spans[g] += b.span[r] > 0;
                assert_true(b.span_logp[r] <= b.next_logprob[r]);
            }
            /* the text begins with a BOS that the student does not have: nothing predicts its first token, so the first word is in no span */
            assert_int_equal(rows, i < 2 ? b.n_rows : b.n_rows - 1);
            near_to(got, i < 2 ? want : want - a.next_logprob[0], 1e-4); /* float32 sums of up to 60 nats */
        }
    }
    assert_int_equal(spans[2], 3);
    assert_true(spans[0] > spans[1] && spans[1] > spans[2]);
    assert_true(rt_shard_set_identity(s[0])->boundary && rt_row_identity_spans(rt_shard_set_identity(s[0])));
    for (int g = 0; g < 3; g++)
        rt_shard_set_free(s[g]);
    rt_shard_set_free(t);
}

/* A student with the teacher's own tokenizer: a span a token, each with its own log-probability. */
static void one_tokenizer_gives_a_span_a_token(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *shards = teacher_shards("alm-same", "topk=4", false);
    struct rt_shard_set *t = NULL, *s = retargeted(shards, "examples/tiny_student", "alm-same-out", "0.1");
    struct rt_rows a, b;
    assert_false(rt_shard_set_identity(s)->boundary);
    assert_ok(rt_shard_set_open(shards, &t, &err));
    for (int64_t i = 0; i < 3; i++) {
        assert_ok(rt_shard_set_get(t, i, &a, &err));
        assert_ok(rt_shard_set_get(s, i, &b, &err));
        assert_int_equal(a.n_rows, b.n_rows);
        for (int64_t r = 0; r < b.n_rows; r++)
            assert_int_equal(b.span[r], 1);
        assert_memory_equal(a.next_logprob, b.next_logprob, (size_t)b.n_rows * sizeof(float));
        assert_memory_equal(a.next_logprob, b.span_logp, (size_t)b.n_rows * sizeof(float));
    }
    rt_shard_set_free(t);
    rt_shard_set_free(s);
}

/* What `train` takes, and what it says of the wrong loss. */
static void train_takes_spans_for_alm_alone(void **state)
{
    (void)state;
    struct rt_err err = {0};
    const char *shards = teacher_shards("alm-train", "topk=4", true), *dir = test_tmp("alm-train-out");
    struct rt_shard_set *s = retargeted(shards, "examples/crossing_student", "alm-train-out", "0.1");
    rt_shard_set_free(s);
    const char *args[] = {"--student", "examples/crossing_student", "--data", dir, "--out", test_tmp("alm-run"), "--w-ce", "0", "--w-kl", "1", "--steps", "2",
                          "--batch-tokens", "64", "--threads", "1", NULL};
    assert_status(test_command(&rt_cmd_train, args, &err), REFUSED);
    args[8] = "--w-alm";
    assert_ok(test_command(&rt_cmd_train, args, &err));
    args[3] = test_tmp("alm.jsonl");
    args[5] = test_tmp("alm-run-2");
    assert_status(test_command(&rt_cmd_train, args, &err), REFUSED);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(spans_of_a_turn),
    cmocka_unit_test(what_is_not_known_is_in_no_span),
    cmocka_unit_test(spans_add_up_to_the_text),
    cmocka_unit_test(one_tokenizer_gives_a_span_a_token),
    cmocka_unit_test(train_takes_spans_for_alm_alone),
};
RT_SUITE(retarget_alm, tests)
