/* What writing rows costs: microseconds a token of a sink's put, from rows in memory to synced files.
 *
 *     bench_shards_put DIR [K [TOKENS [STATES]]]
 *
 * DIR: where the sets go (removed). K: entries a row (64). TOKENS: of each of the sequences (2048). STATES: whole BF16 states of so many
 * dimensions a token (0). Rows are drawn so that they compress as a teacher's do: ids by a power law out of 129280, logits that fall ever more slowly,
 * labels that are mostly the first entry. The same rows go through put one by one, then all at once with 1, 2, 4, ... threads, up to the cores.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/pool.h"
#include "core/rng.h"
#include "formats/shard.h"

enum { N_IDS = 129280, ALL_TOKENS = 1 << 16 };

struct made {
    struct rt_row_identity id;
    struct rt_rows *rows;
    int64_t n;
    uint64_t drawn;
};

static double uniform(struct made *m)
{
    return rt_rng_uniform(7, 1, m->drawn++);
}

static void must(enum rt_status st, const struct rt_err *err)
{
    if (st == RT_OK)
        return;
    fprintf(stderr, "shards_put: %s\n", err->msg);
    exit(rt_exit_code(st));
}

static void *take(size_t n, size_t size)
{
    struct rt_err err = {0};
    void *p;
    must(rt_alloc(n, size, "rows", &p, &err), &err);
    return p;
}

static bool among(const uint32_t *ids, int n, uint32_t id)
{
    for (int i = 0; i < n; i++)
        if (ids[i] == id)
            return true;
    return false;
}

/* Row i of a sequence whose next token is `next`. */
static void draw_row(struct made *m, int k, uint32_t next, uint32_t *ids, float *logits, float *lse, float *logprob, uint32_t *rank)
{
    double x = 18 + 8 * uniform(m), sum = 0;
    int at = uniform(m) < 0.7 ? 0 : (int)(k * uniform(m) * uniform(m));
    for (int j = 0; j < k; j++) {
        ids[j] = next;
        while (j != at && (ids[j] == next || among(ids, j, ids[j])))
            ids[j] = (uint32_t)(N_IDS * pow(uniform(m), 3));
        logits[j] = (float)x;
        sum += exp((double)logits[j]);
        x -= -log(1 - uniform(m)) * 4 / (j + 1) + 1e-4;
    }
    *lse = (float)log(sum * (1.01 + 0.1 * uniform(m)));
    *rank = (uint32_t)at;
    *logprob = logits[at] - *lse;
}

static void draw_sequence(struct made *m, struct rt_rows *r, int64_t n, int k, int states)
{
    uint32_t *ids = take((size_t)n, 4), *pos = take((size_t)n, 4), *top = take((size_t)(n * k), 4), *next = take((size_t)n, 4), *rank = take((size_t)n, 4);
    float *logits = take((size_t)(n * k), 4), *lse = take((size_t)n, 4), *logprob = take((size_t)n, 4);
    uint8_t *mask = take((size_t)n, 1);
    for (int64_t i = 0; i < n; i++)
        ids[i] = (uint32_t)(N_IDS * pow(uniform(m), 3));
    for (int64_t i = 0; i < n - 1; i++) {
        mask[i + 1] = 1;
        pos[i] = (uint32_t)i;
        next[i] = ids[i + 1];
        draw_row(m, k, next[i], top + i * k, logits + i * k, lse + i, logprob + i, rank + i);
    }
    *r = (struct rt_rows){.n_tokens = n, .ids = ids, .loss_mask = mask, .n_rows = n - 1, .k = k, .n_lse = 1, .position = pos, .topk_ids = top,
                          .topk_logits = logits, .lse = lse, .next_id = next, .next_logprob = logprob, .next_rank = rank};
    rt_rows_key(ids, n, r->key);
    if (states == 0)
        return;
    uint16_t *state = take((size_t)(n * states), 2);
    for (int64_t i = 0; i < n * states; i++) {
        const float x = (float)rt_rng_normal(9, 1, (uint64_t)i);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        state[i] = (uint16_t)(bits >> 16);
    }
    r->feature[0] = state;
    r->n_features = 1;
}

/* Puts everything and says how long that took; threads 0: one by one. */
static void put_all(const struct made *m, const char *dir, int threads)
{
    struct rt_err err = {0};
    struct rt_shard_sink *s;
    struct rt_row_sink sink;
    struct rt_shard_resume was;
    char cmd[4200];
    const struct rt_shard_options so = {0};
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    if (system(cmd) != 0)
        exit(1);
    must(rt_shard_sink_open(dir, &m->id, &so, &s, &sink, &was, &err), &err);
    struct rt_pool *pool = NULL;
    char label[64] = "one by one";
    if (threads > 0) {
        snprintf(label, sizeof label, "together, %d thread%s", threads, threads > 1 ? "s" : "");
        must(rt_pool_create(threads, &pool, &err), &err);
        rt_shard_sink_threads(s, pool);
    }
    const double t0 = rt_now();
    for (int64_t i = 0; i < m->n && threads == 0; i++)
        must(sink.put(sink.self, &m->rows[i], &err), &err);
    if (threads > 0)
        must(sink.put_all(sink.self, m->rows, m->n, &err), &err);
    must(sink.finish(sink.self, &err), &err);
    const double t = rt_now() - t0;
    printf("  %-24s %8.2f us a token, %.1f bytes\n", label, t / (double)(m->n * m->rows[0].n_tokens) * 1e6,
           (double)rt_shard_sink_bytes(s) / (double)(m->n * m->rows[0].n_tokens));
    rt_shard_sink_free(s);
    rt_pool_free(pool);
    if (system(cmd) != 0)
        exit(1);
}

int main(int argc, char **argv)
{
    struct made m = {0};
    const int k = argc > 2 ? atoi(argv[2]) : 64, states = argc > 4 ? atoi(argv[4]) : 0;
    const int64_t tokens = argc > 3 ? atoi(argv[3]) : 2048;
    if (argc < 2 || k < 1 || k > 1024 || tokens < 2 || tokens > ALL_TOKENS || states < 0)
        return fprintf(stderr, "usage: bench_shards_put DIR [K [TOKENS [STATES]]]\n"), 2;
    m.id = (struct rt_row_identity){.teacher_name = "drawn", .mode = "w8a16/f32/cpu", .vocab_size = N_IDS, .n_ids = N_IDS, .top_k = k, .n_lse = 1, .lse_temperature = {1},
                                    .teacher_layers = 2, .n_features = states > 0};
    memset(m.id.teacher_sha256, '0', 64);
    m.id.feature[0] = (struct rt_feature_spec){.layer = RT_LAYER_FINAL, .dim = states, .dtype = RT_BF16};
    m.n = ALL_TOKENS / tokens;
    m.rows = take((size_t)m.n, sizeof *m.rows);
    for (int64_t i = 0; i < m.n; i++)
        draw_sequence(&m, &m.rows[i], tokens, k, states);
    printf("%ld sequences of %ld tokens, k %d, states of %d\n", (long)m.n, (long)tokens, k, states);
    put_all(&m, argv[1], 0);
    for (int threads = 1; threads <= rt_cpu_count(); threads *= 2)
        put_all(&m, argv[1], threads);
    return 0;
}
