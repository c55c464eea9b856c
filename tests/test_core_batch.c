#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/batch.h"
#include "core/mem.h"
#include "core/rng.h"
#include "tests/suite.h"

enum { IDS = 40, STRIDE = 48, MAX_LEN = 60, MAX_SLOTS = 8, MAX_BUDGET = 64, MAX_SEQ = 64, UNIT = 8 /* of a slot's memory */ };

/* An engine whose cache holds, for each slot, the hash of each prefix; logits are a function of the whole prefix. It checks
 * the order that the scheduler promises. */
struct toy {
    uint64_t hash[MAX_SLOTS][MAX_LEN];
    int64_t held[MAX_SLOTS]; /* what may be read: positions below */
    int slots, budget;
    int64_t fed, copied, steps;
    int fail_at_step, nan_at_step; /* -1: never */
    float logits[MAX_SLOTS * STRIDE];
    /* as an engine that draws: steps under way, the first of them the oldest */
    int ahead, under_way, rows[2];
    int32_t ids[2][MAX_SLOTS], last[MAX_SLOTS];
    float logprobs[2][MAX_SLOTS];
    /* as one whose slots share memory: units in all (0: they do not), and of each slot its own and those that it shares */
    int64_t units, own[MAX_SLOTS], shared[MAX_SLOTS];
    char fault[100];
};

static void fault(struct toy *t, const char *what)
{
    if (t->fault[0] == '\0')
        strcpy(t->fault, what);
}

static enum rt_status toy_step(void *ctx, const struct rt_batch_entry *e, int n, int n_rows, const float **logits, int64_t *stride,
                               struct rt_err *err)
{
    struct toy *t = ctx;
    int row = 0;
    if (t->steps == t->fail_at_step)
        return rt_fail(err, RT_DEVICE, "the toy is broken");
    if (n < 1 || n > t->budget)
        fault(t, "entries beyond the budget");
    for (int i = 0; i < n; i++) {
        const int s = e[i].slot;
        const int64_t p = e[i].position;
        if (s < 0 || s >= t->slots || p < 0 || p >= MAX_LEN || e[i].token < 0 || e[i].token >= IDS) {
            fault(t, "an entry out of range");
            break;
        }
        if (i > 0 && (s < e[i - 1].slot || (s == e[i - 1].slot && p != e[i - 1].position + 1)))
            fault(t, "entries out of order");
        if (p > t->held[s])
            fault(t, "a gap in a slot");
        if (t->units > 0 && p >= (t->own[s] + t->shared[s]) * UNIT)
            fault(t, "no room for an entry");
        t->hash[s][p] = rt_rng_u64(p == 0 ? 99 : t->hash[s][p - 1], (uint64_t)e[i].token, (uint64_t)p);
        t->held[s] = p + 1;
        t->fed++;
        if (e[i].row < 0)
            continue;
        if (e[i].row != row || row >= t->slots) {
            fault(t, "rows out of order");
            break;
        }
        for (int k = 0; k < STRIDE; k++) /* those past IDS would win if they were looked at */
            t->logits[row * STRIDE + k] = k < IDS ? 2 * rt_rng_normal(t->hash[s][p], 1, (uint64_t)k) : 1e9f;
        row++;
    }
    if (row != n_rows)
        fault(t, "rows do not add up");
    if (t->steps == t->nan_at_step)
        t->logits[3] = NAN;
    t->steps++;
    *logits = t->logits;
    *stride = STRIDE;
    return RT_OK;
}

static enum rt_status toy_copy(void *ctx, int src, int dst, int64_t n, struct rt_err *err)
{
    struct toy *t = ctx;
    (void)err;
    if (src == dst || n < 1 || n > t->held[src])
        fault(t, "a copy of what is not there");
    memcpy(t->hash[dst], t->hash[src], (size_t)n * sizeof t->hash[0][0]);
    t->held[dst] = n;
    t->copied += n;
    if (t->units > 0 && (t->own[dst] != 1 || t->shared[dst] != 0))
        fault(t, "a copy to a slot that is not empty");
    t->shared[dst] = n / UNIT;
    return RT_OK;
}

static enum rt_status toy_submit(void *ctx, const struct rt_batch_entry *e, int n, int n_rows, const struct rt_batch_draw *draws,
                                 const struct rt_batch_law *law, struct rt_err *err)
{
    struct toy *t = ctx;
    struct rt_batch_entry known[MAX_BUDGET];
    struct rt_sampler *s = NULL;
    const float *logits = NULL;
    int64_t stride = 0;
    enum rt_status st;
    const int at = t->under_way++;
    if (t->under_way > 1 + t->ahead) {
        fault(t, "too many steps under way");
        return RT_OK;
    }
    for (int i = 0; i < n && i < MAX_BUDGET; i++) {
        known[i] = e[i];
        if (e[i].token < 0)
            known[i].token = t->last[-1 - e[i].token];
    }
    RT_TRY(toy_step(t, known, n, n_rows, &logits, &stride, err));
    RT_TRY(rt_sampler_create(law->n_ids, &law->sample, &s, err));
    t->rows[at] = n_rows;
    for (int i = 0; i < MAX_SLOTS; i++)
        t->last[i] = -100;
    for (int i = 0; i < n_rows; i++) {
        RT_TRY(rt_sampler_draw(s, logits + i * stride, law->seed, draws[i].stream, (uint64_t)draws[i].position, &t->ids[at][i], &t->logprobs[at][i], err));
        t->last[i] = t->ids[at][i] < 0 ? 0 : t->ids[at][i];
    }
out:
    if (st != RT_OK)
        t->under_way--;
    rt_sampler_free(s);
    return st;
}

static enum rt_status toy_collect(void *ctx, int32_t *ids, float *logprobs, struct rt_err *err)
{
    struct toy *t = ctx;
    (void)err;
    if (t->under_way < 1)
        fault(t, "nothing to collect");
    memcpy(ids, t->ids[0], (size_t)t->rows[0] * sizeof *ids);
    memcpy(logprobs, t->logprobs[0], (size_t)t->rows[0] * sizeof *logprobs);
    t->under_way--;
    t->rows[0] = t->rows[1];
    memcpy(t->ids[0], t->ids[1], sizeof t->ids[0]);
    memcpy(t->logprobs[0], t->logprobs[1], sizeof t->logprobs[0]);
    return RT_OK;
}

static bool toy_room(void *ctx, int slot, int64_t tokens, int spare)
{
    struct toy *t = ctx;
    int64_t left = t->units;
    const int64_t more = (tokens + UNIT - 1) / UNIT - t->own[slot] - t->shared[slot];
    for (int s = 0; s < t->slots; s++)
        left -= t->own[s];
    if (more > 0 && more + spare > left)
        return false;
    t->own[slot] += more > 0 ? more : 0;
    return true;
}

static void toy_drop(void *ctx, int slot, int64_t keep)
{
    struct toy *t = ctx;
    const int64_t units = (keep + UNIT - 1) / UNIT;
    t->shared[slot] = t->shared[slot] < units ? t->shared[slot] : units;
    t->own[slot] = t->own[slot] + t->shared[slot] > units ? units - t->shared[slot] : t->own[slot];
    t->held[slot] = t->held[slot] < keep ? t->held[slot] : keep;
}

struct got {
    int times, sample;
    int64_t n, n_prompt;
    enum rt_finish finish;
    int32_t prompt0, ids[MAX_LEN];
    float logprobs[MAX_LEN];
    const void *user;
};

struct run {
    struct toy toy;
    struct rt_batch *batch;
    struct got got[MAX_SEQ];
    int n_got, stop_after, progress_calls, added_late;
    enum rt_status finish_status;
};

static void add_late(struct run *r);

static enum rt_status on_finish(void *ctx, const struct rt_batch_result *q, struct rt_err *err)
{
    struct run *r = ctx;
    struct got *g = &r->got[q->index];
    g->times++;
    g->sample = q->sample;
    g->n = q->n;
    g->n_prompt = q->n_prompt;
    g->finish = q->finish;
    g->prompt0 = q->prompt[0];
    g->user = q->user;
    if (q->n > 0) {
        memcpy(g->ids, q->ids, (size_t)q->n * sizeof g->ids[0]);
        memcpy(g->logprobs, q->logprobs, (size_t)q->n * sizeof g->logprobs[0]);
    }
    r->n_got++;
    if (r->added_late > 0)
        add_late(r);
    return r->finish_status == RT_OK ? RT_OK : rt_fail(err, r->finish_status, "the disk is full");
}

static bool stop(void *ctx)
{
    const struct run *r = ctx;
    return r->stop_after > 0 && r->toy.steps >= r->stop_after;
}

static void progress(void *ctx, const struct rt_batch_stats *s)
{
    struct run *r = ctx;
    r->progress_calls++;
    assert_int_equal(s->steps, r->progress_calls);
    assert_int_equal(s->finished, r->n_got);
    assert_true(s->running <= r->toy.slots && s->finished + s->running <= s->added);
}

static int32_t prompt_of(int k, int64_t i)
{
    return (int32_t)(rt_rng_u64(17, (uint64_t)k, (uint64_t)i) % IDS);
}

/* Prompt k: lengths from 1 to 23, one that fills a slot and one that leaves a single token. */
static void add(struct run *r, int k)
{
    struct rt_err err = {0};
    static const int lens[] = {5, 1, 23, 2, 60, 12, 59, 7};
    static const int samples[] = {1, 4, 5, 1, 2, 1, 1, 3};
    static const int news[] = {30, 20, 12, 0, 9, 100, 9, 1};
    static const int32_t stops[] = {3, 7};
    int32_t ids[64];
    int64_t index = -1;
    struct rt_batch_stats stats;
    for (int i = 0; i < lens[k % 8]; i++)
        ids[i] = prompt_of(k, i);
    rt_batch_stats(r->batch, &stats);
    const struct rt_batch_request q = {
        .prompt = ids, .n_prompt = lens[k % 8], .stream = (uint64_t)k << 8, .n_samples = samples[k % 8], .max_new = news[k % 8],
        .stop_ids = stops, .n_stop = k % 3, .user = &r->got[k],
    };
    assert_ok(rt_batch_add(r->batch, &q, &index, &err));
    assert_int_equal(index, stats.added);
}

static void add_late(struct run *r)
{
    add(r, 8 + --r->added_late);
}

static const struct rt_sample_params warm = {0.8, 0, 0.95};

static struct run *create(int slots, int budget, bool copy, struct rt_pool *pool, struct rt_sample_params sample)
{
    struct rt_err err = {0};
    struct run *r;
    assert_ok(rt_alloc(1, sizeof *r, "a test", &r, &err));
    r->toy.slots = slots;
    r->toy.budget = budget;
    r->toy.fail_at_step = r->toy.nan_at_step = -1;
    const struct rt_batch_options o = {
        .slots = slots, .budget = budget, .max_len = MAX_LEN, .n_ids = IDS, .seed = 4, .sample = sample, .pool = pool,
        .on_finish = on_finish, .progress = progress, .stop = stop, .ctx = r,
    };
    const struct rt_batch_step step = {.ctx = &r->toy, .step = toy_step, .copy_slot = copy ? toy_copy : NULL};
    assert_ok(rt_batch_create(&o, &step, &r->batch, &err));
    return r;
}

/* One that draws, `ahead` steps before its results are asked for; units > 0: of memory for all slots. */
static struct run *create_drawing(int slots, int budget, bool copy, int ahead, int64_t units)
{
    struct rt_err err = {0};
    struct run *r = create(slots, budget, copy, NULL, warm);
    rt_batch_free(r->batch);
    r->toy.ahead = ahead;
    r->toy.units = units;
    const struct rt_batch_options o = {
        .slots = slots, .budget = budget, .max_len = MAX_LEN, .n_ids = IDS, .seed = 4, .sample = warm, .on_finish = on_finish, .progress = progress,
        .stop = stop, .ctx = r,
    };
    const struct rt_batch_step step = {.ctx = &r->toy, .copy_slot = copy ? toy_copy : NULL, .submit = toy_submit, .collect = toy_collect, .ahead = ahead,
                                       .room = units > 0 ? toy_room : NULL, .drop = units > 0 ? toy_drop : NULL};
    assert_ok(rt_batch_create(&o, &step, &r->batch, &err));
    return r;
}

static void destroy(struct run *r)
{
    assert_string_equal(r->toy.fault, "");
    rt_batch_free(r->batch);
    rt_free(r);
}

/* What a lone sequence gives: the toy and the sampler, without the scheduler. */
static void alone(struct run *r, const struct got *g, int k)
{
    struct rt_err err = {0};
    struct rt_sampler *s;
    uint64_t hash = 99;
    float l[IDS];
    assert_ok(rt_sampler_create(IDS, &warm, &s, &err));
    (void)r;
    for (int64_t i = 0; i < g->n_prompt; i++)
        hash = rt_rng_u64(hash, (uint64_t)prompt_of(k, i), (uint64_t)i);
    for (int64_t i = 0; i < g->n; i++) {
        int32_t id;
        float lp;
        for (int v = 0; v < IDS; v++)
            l[v] = 2 * rt_rng_normal(hash, 1, (uint64_t)v);
        assert_ok(rt_sampler_pick(s, l, 4, ((uint64_t)k << 8) + (uint64_t)g->sample, (uint64_t)(g->n_prompt + i), &id, &lp, &err));
        assert_int_equal(id, g->ids[i]);
        assert_true(lp == g->logprobs[i]);
        hash = rt_rng_u64(hash, (uint64_t)id, (uint64_t)(g->n_prompt + i));
    }
    rt_sampler_free(s);
}

static void run_all(struct run *r)
{
    struct rt_err err = {0};
    for (int k = 0; k < 8; k++)
        add(r, k);
    assert_ok(rt_batch_run(r->batch, &err));
    assert_int_equal(r->n_got, 18);
}

static void results_are_right(void **state)
{
    struct run *r = create(3, 10, false, NULL, warm);
    static const int first[] = {0, 1, 5, 10, 11, 13, 14, 15, 18};
    int stopped = 0;
    (void)state;
    run_all(r);
    for (int k = 0; k < 8; k++) {
        for (int i = first[k]; i < first[k + 1]; i++) {
            const struct got *g = &r->got[i];
            assert_int_equal(g->times, 1);
            assert_int_equal(g->sample, i - first[k]);
            assert_int_equal(g->prompt0, prompt_of(k, 0));
            assert_ptr_equal(g->user, &r->got[k]);
            alone(r, g, k);
            for (int64_t j = 0; j < g->n; j++) { /* a stop id ends the sequence, and is in it */
                const bool is_stop = (k % 3 > 0 && g->ids[j] == 3) || (k % 3 > 1 && g->ids[j] == 7);
                assert_int_equal(is_stop, j + 1 == g->n && g->finish == RT_FINISH_STOP);
            }
            stopped += g->finish == RT_FINISH_STOP;
        }
    }
    assert_true(stopped > 0);
    assert_int_equal(r->got[0].n, 30);  /* no stop ids: max_new */
    assert_int_equal(r->got[10].n, 0);  /* max_new 0 */
    assert_int_equal(r->got[11].n, 0);  /* no room */
    assert_int_equal(r->got[14].n, 1);  /* room for one */
    assert_true(r->got[13].n <= MAX_LEN - 12);
    struct rt_batch_stats stats;
    rt_batch_stats(r->batch, &stats);
    assert_int_equal(stats.finished, 18);
    assert_int_equal(stats.running, 0);
    assert_int_equal(stats.prompt_tokens, 5 + 4 * 1 + 5 * 23 + 12 + 59 + 3 * 7);
    assert_true(r->progress_calls > 0);
    destroy(r);
}

static void check_same(const struct run *a, const struct run *b, const char *what, int slots, int budget)
{
    for (int i = 0; i < MAX_SEQ; i++)
        if (memcmp(&a->got[i].sample, &b->got[i].sample, offsetof(struct got, user) - offsetof(struct got, sample)) != 0)
            fail_msg("sequence %d differs with %d slots, budget %d, %s", i, slots, budget, what);
}

static void results_do_not_depend_on_the_batch(void **state)
{
    static const int budgets[] = {1, 2, 3, 7, MAX_BUDGET};
    struct rt_err err = {0};
    struct rt_pool *pool;
    struct run *want = create(3, 10, false, NULL, warm);
    (void)state;
    assert_ok(rt_pool_create(3, &pool, &err));
    run_all(want);
    for (int slots = 1; slots <= MAX_SLOTS; slots = slots == 1 ? 3 : slots == 3 ? 8 : 9) {
        for (size_t i = 0; i < sizeof budgets / sizeof budgets[0]; i++) {
            for (int mode = 0; mode < 4; mode++) {
                struct run *r = create(slots, budgets[i], mode & 1, mode & 2 ? pool : NULL, warm);
                run_all(r);
                check_same(want, r, mode & 1 ? "copied prefixes" : "prompts fed again", slots, budgets[i]);
                if (!(mode & 1))
                    assert_int_equal(r->toy.copied, 0);
                else /* each shared prompt is fed once but for its last token: 4 of 22 tokens, 2 of 6 less */
                    assert_int_equal(r->toy.fed, want->toy.fed - 4 * 22 - 2 * 6);
                if ((mode & 1) && slots == 8)
                    assert_true(r->toy.copied > 0);
                destroy(r);
            }
        }
    }
    rt_pool_free(pool);
    destroy(want);
}

/* An engine that draws and runs ahead, and one whose slots share memory for one of them at the least. */
static void engines_that_draw(void **state)
{
    static const int budgets[] = {1, 2, 7, MAX_BUDGET};
    struct run *want = create(3, 10, false, NULL, warm);
    int64_t parked = 0;
    (void)state;
    run_all(want);
    for (int slots = 1; slots <= MAX_SLOTS; slots = slots == 1 ? 3 : slots == 3 ? 8 : 9)
        for (size_t i = 0; i < sizeof budgets / sizeof budgets[0]; i++)
            for (int mode = 0; mode < 4; mode++)
                for (int64_t units = 0; units <= 24; units = units == 0 ? 8 : units + 4) {
                    struct rt_batch_stats stats;
                    struct run *r = create_drawing(slots, budgets[i], mode & 1, mode >> 1, units);
                    run_all(r);
                    check_same(want, r, "an engine that draws", slots, budgets[i]);
                    assert_int_equal(r->toy.under_way, 0);
                    rt_batch_stats(r->batch, &stats);
                    parked += stats.parked;
                    if (units == 0)
                        assert_int_equal(stats.parked, 0);
                    destroy(r);
                }
    assert_true(parked > 100);
    destroy(want);
}

static void engines_that_draw_fail_cleanly(void **state)
{
    struct rt_err err = {0};
    (void)state;
    for (int ahead = 0; ahead < 2; ahead++) {
        struct run *r = create_drawing(3, 10, true, ahead, 20);
        r->stop_after = 6;
        for (int k = 0; k < 8; k++)
            add(r, k);
        assert_status(rt_batch_run(r->batch, &err), INTERRUPTED);
        assert_int_equal(r->toy.under_way, 0);
        destroy(r);

        r = create_drawing(3, 10, false, ahead, 0);
        r->toy.fail_at_step = 4;
        add(r, 0);
        assert_int_equal(rt_batch_run(r->batch, &err), RT_DEVICE);
        assert_int_equal(r->toy.under_way, 0);
        rt_err_clear(&err);
        destroy(r);

        r = create_drawing(3, 10, false, ahead, 0);
        r->toy.nan_at_step = 4;
        add(r, 0);
        assert_int_equal(rt_batch_run(r->batch, &err), RT_NUMERIC);
        assert_string_equal(err.msg, "sequence 0, token 9: the logit of id 3 is not a finite number");
        assert_int_equal(r->toy.under_way, 0);
        rt_err_clear(&err);
        destroy(r);
    }
}

static void sequences_join_while_running(void **state)
{
    struct rt_err err = {0};
    struct run *at_once = create(8, 64, true, NULL, warm), *late = create(2, 5, true, NULL, warm);
    (void)state;
    add(at_once, 0);
    for (int k = 7; k >= 0; k--)
        add(at_once, 8 + k);
    assert_ok(rt_batch_run(at_once->batch, &err));
    add(late, 0);
    late->added_late = 8;
    assert_ok(rt_batch_run(late->batch, &err));
    assert_int_equal(late->n_got, 19);
    check_same(at_once, late, "late ones", 2, 5);
    for (int k = 2; k <= 12; k += 5) { /* a batch that has ended goes on, and takes no old prompt for a new one */
        const int n = late->n_got;
        add(late, k);
        assert_ok(rt_batch_run(late->batch, &err));
        assert_true(late->n_got > n);
        for (int i = n; i < late->n_got; i++)
            alone(late, &late->got[i], k);
    }
    destroy(late);
    destroy(at_once);
}

static void stops_and_fails_cleanly(void **state)
{
    struct rt_err err = {0};
    (void)state;
    struct run *r = create(3, 10, true, NULL, warm);
    r->stop_after = 6;
    for (int k = 0; k < 8; k++)
        add(r, k);
    assert_status(rt_batch_run(r->batch, &err), INTERRUPTED);
    assert_int_equal(r->toy.steps, 6);
    destroy(r);

    r = create(3, 10, false, NULL, warm);
    r->toy.fail_at_step = 4;
    add(r, 0);
    assert_int_equal(rt_batch_run(r->batch, &err), RT_DEVICE);
    assert_string_equal(err.msg, "the toy is broken");
    rt_err_clear(&err);
    destroy(r);

    r = create(3, 10, false, NULL, warm);
    r->toy.nan_at_step = 4;
    add(r, 0);
    assert_int_equal(rt_batch_run(r->batch, &err), RT_NUMERIC);
    assert_string_equal(err.msg, "sequence 0, token 9: the logit of id 3 is nan");
    rt_err_clear(&err);
    destroy(r);

    r = create(3, 10, false, NULL, warm);
    r->finish_status = RT_IO;
    add(r, 1);
    assert_status(rt_batch_run(r->batch, &err), IO);
    assert_int_equal(r->n_got, 1);
    destroy(r);
    rt_batch_free(NULL);
}

static void requests_are_checked(void **state)
{
    struct rt_err err = {0};
    struct run *r = create(1, 1, false, NULL, warm);
    struct rt_batch *b;
    const struct rt_batch_step step = {.step = toy_step};
    const struct rt_batch_options bad[] = {
        {.slots = 0, .budget = 1, .max_len = 1, .n_ids = 1, .sample = warm},
        {.slots = 1, .budget = 0, .max_len = 1, .n_ids = 1, .sample = warm},
        {.slots = 1, .budget = 1, .max_len = 0, .n_ids = 1, .sample = warm},
        {.slots = 1, .budget = 1, .max_len = 1, .n_ids = 0, .sample = warm},
        {.slots = 1, .budget = 1, .max_len = 1, .n_ids = 1, .sample = {1, 0, 0}},
    };
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_status(rt_batch_create(&bad[i], &step, &b, &err), USAGE);
        assert_null(b);
    }
    const int32_t high[] = {0, IDS}, low[] = {-1, 0}, fine[] = {0, IDS - 1};
    struct rt_batch_request q = {.prompt = high, .n_prompt = 2, .n_samples = 1, .max_new = 1};
    assert_status(rt_batch_add(r->batch, &q, NULL, &err), USAGE);
    q.prompt = low;
    assert_status(rt_batch_add(r->batch, &q, NULL, &err), USAGE);
    q.prompt = fine;
    q.n_prompt = 0;
    assert_status(rt_batch_add(r->batch, &q, NULL, &err), USAGE);
    q.n_prompt = 2;
    q.n_samples = 0;
    assert_status(rt_batch_add(r->batch, &q, NULL, &err), USAGE);
    q.n_samples = 1;
    q.max_new = -1;
    assert_status(rt_batch_add(r->batch, &q, NULL, &err), USAGE);
    assert_ok(rt_batch_run(r->batch, &err)); /* nothing was queued */
    assert_int_equal(r->n_got, 0);
    destroy(r);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(results_are_right),          cmocka_unit_test(results_do_not_depend_on_the_batch),
    cmocka_unit_test(sequences_join_while_running), cmocka_unit_test(stops_and_fails_cleanly),
    cmocka_unit_test(engines_that_draw),          cmocka_unit_test(engines_that_draw_fail_cleanly),
    cmocka_unit_test(requests_are_checked),
};
RT_SUITE(core_batch, tests)
