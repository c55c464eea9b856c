/* What the training benches train on: geometries, sequences of random tokens, and rows of a made-up teacher, written as a run would find them.
 *
 * Rows are drawn so that they compress as a teacher's do: ids by a power law, logits that fall ever more slowly, labels that are mostly the first entry.
 * Lengths: `length` each, or with `mixed` documents between a sixteenth of it and all of it, uniform in the logarithm.
 */
#ifndef RT_BENCH_TRAIN_DATA_H
#define RT_BENCH_TRAIN_DATA_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "core/pool.h"
#include "core/rng.h"
#include "formats/shard.h"
#include "student/config.h"

struct train_data_geometry {
    const char *name, *config;
};

#define TRAIN_DATA_QWEN(H, I, L, NH, NKV, V, TIED) \
    "{\"model_type\": \"qwen2\", \"architectures\": [\"Qwen2ForCausalLM\"], \"vocab_size\": " #V ", \"hidden_size\": " #H ", \"intermediate_size\": " #I ", " \
    "\"num_hidden_layers\": " #L ", \"num_attention_heads\": " #NH ", \"num_key_value_heads\": " #NKV ", \"hidden_act\": \"silu\", " \
    "\"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 32768, \"tie_word_embeddings\": " #TIED ", \"rope_theta\": 1000000.0, " \
    "\"initializer_range\": 0.02, \"torch_dtype\": \"bfloat16\"}\n"
#define TRAIN_DATA_LLAMA(H, I, L, NH, NKV, V) \
    "{\"model_type\": \"llama\", \"architectures\": [\"LlamaForCausalLM\"], \"vocab_size\": " #V ", \"hidden_size\": " #H ", \"intermediate_size\": " #I ", " \
    "\"num_hidden_layers\": " #L ", \"num_attention_heads\": " #NH ", \"num_key_value_heads\": " #NKV ", \"head_dim\": 64, \"hidden_act\": \"silu\", " \
    "\"rms_norm_eps\": 1e-5, \"max_position_embeddings\": 32768, \"tie_word_embeddings\": true, \"rope_theta\": 100000.0, " \
    "\"initializer_range\": 0.02, \"torch_dtype\": \"bfloat16\"}\n"

/* 10m: ten million parameters; 135m: SmolLM2; the others: Qwen2.5. */
static const struct train_data_geometry train_data_geometries[] = {
    {"10m", TRAIN_DATA_LLAMA(256, 1024, 8, 4, 2, 8192)},
    {"135m", TRAIN_DATA_LLAMA(576, 1536, 30, 9, 3, 49152)},
    {"0.5b", TRAIN_DATA_QWEN(896, 4864, 24, 14, 2, 151936, true)},
    {"1.5b", TRAIN_DATA_QWEN(1536, 8960, 28, 12, 2, 151936, true)},
    {"7b", TRAIN_DATA_QWEN(3584, 18944, 28, 28, 4, 152064, false)},
};

struct train_data_options {
    int64_t tokens, length, vocab; /* tokens: at least so many */
    bool mixed;
    int k;                         /* entries a row */
    uint64_t seed;
};

/* Numbers of stream `s`, one after the other. */
struct train_data_draw {
    uint64_t seed, s, n;
};

static inline double train_data_uniform(struct train_data_draw *d)
{
    return rt_rng_uniform(d->seed, d->s, d->n++);
}

static inline int64_t train_data_length(const struct train_data_options *o, int64_t i)
{
    const double u = rt_rng_uniform(o->seed, 1, (uint64_t)i);
    return o->mixed ? (int64_t)((double)o->length * pow(16, u - 1)) : o->length;
}

static inline uint32_t train_data_id(struct train_data_draw *d, int64_t vocab)
{
    const double u = train_data_uniform(d);
    return (uint32_t)((double)vocab * u * u * u);
}

/* Row whose next token is `next`: distinct ids, descending logits; lse at T = 1 and 2 with some mass beside them. */
static inline void train_data_row(struct train_data_draw *d, const struct train_data_options *o, uint32_t next, uint32_t *ids, float *logits, float lse[2],
                                  float *logprob, uint32_t *rank)
{
    enum { SLOTS = 1024 }; /* of a table of ids that are there: four times RT k of 256 */
    uint32_t seen[SLOTS];
    double x = 18 + 8 * train_data_uniform(d), sum[2] = {0};
    const int at = train_data_uniform(d) < 0.7 ? 0 : (int)(o->k * train_data_uniform(d) * train_data_uniform(d));
    memset(seen, 0xff, sizeof seen);
    seen[next % SLOTS] = next;
    for (int j = 0; j < o->k; j++) {
        uint32_t id = next;
        for (bool taken = j != at; taken;) {
            id = train_data_id(d, o->vocab);
            uint32_t slot = id % SLOTS;
            while (seen[slot] != UINT32_MAX && seen[slot] != id)
                slot = (slot + 1) % SLOTS;
            taken = seen[slot] == id;
            seen[slot] = id;
        }
        ids[j] = id;
        logits[j] = (float)x;
        sum[0] += exp((double)logits[j]);
        sum[1] += exp((double)logits[j] / 2);
        x -= -log(1 - train_data_uniform(d)) * 4 / (j + 1) + 1e-4;
    }
    const double tail = 0.01 + 0.1 * train_data_uniform(d);
    lse[0] = (float)log(sum[0] * (1 + tail));
    lse[1] = (float)log(sum[1] * (1 + 5 * tail));
    *rank = (uint32_t)at;
    *logprob = logits[at] - lse[0];
}

/* One sequence and what it lies in. */
struct train_data_seq {
    struct rt_rows rows;
    uint32_t *ids, *pos, *top, *next, *rank;
    float *logits, *lse, *logprob;
    uint8_t *mask;
};

static inline void train_data_seq_free(struct train_data_seq *q)
{
    void *const all[] = {q->ids, q->pos, q->top, q->next, q->rank, q->logits, q->lse, q->logprob, q->mask};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
}

static inline bool train_data_seq_take(struct train_data_seq *q, size_t n, size_t k)
{
    *q = (struct train_data_seq){.ids = malloc(n * 4), .pos = malloc(n * 4), .top = malloc(n * k * 4 + 4), .next = malloc(n * 4), .rank = malloc(n * 4),
                                 .logits = malloc(n * k * 4 + 4), .lse = malloc(n * 8), .logprob = malloc(n * 4), .mask = malloc(n)};
    return q->ids != NULL && q->pos != NULL && q->top != NULL && q->next != NULL && q->rank != NULL && q->logits != NULL && q->lse != NULL &&
           q->logprob != NULL && q->mask != NULL;
}

static inline void train_data_sequence(const struct train_data_options *o, int64_t i, struct train_data_seq *q)
{
    struct train_data_draw d = {.seed = o->seed, .s = 2 + (uint64_t)i};
    const int64_t n = train_data_length(o, i);
    for (int64_t t = 0; t < n; t++) {
        q->ids[t] = train_data_id(&d, o->vocab);
        q->mask[t] = t > 0;
    }
    for (int64_t t = 0; t + 1 < n; t++) {
        q->pos[t] = (uint32_t)t;
        q->next[t] = q->ids[t + 1];
        train_data_row(&d, o, q->next[t], q->top + t * o->k, q->logits + t * o->k, q->lse + 2 * t, &q->logprob[t], &q->rank[t]);
    }
    q->rows = (struct rt_rows){.source_line = i + 1, .n_tokens = n, .ids = q->ids, .loss_mask = q->mask, .n_rows = n - 1, .k = o->k, .n_lse = 2,
                               .position = q->pos, .topk_ids = q->top, .topk_logits = q->logits, .lse = q->lse, .next_id = q->next,
                               .next_logprob = q->logprob, .next_rank = q->rank};
    rt_rows_key(q->ids, n, q->rows.key);
}

struct train_data_job {
    const struct train_data_options *o;
    struct train_data_seq *seq;
    int64_t first;
};

static inline void train_data_item(void *ctx, int64_t item, int worker)
{
    const struct train_data_job *j = ctx;
    (void)worker;
    train_data_sequence(j->o, j->first + item, &j->seq[item]);
}

/* A shard set of such rows in dir, compressed as ever; drawn and packed by the pool's threads. */
static inline enum rt_status train_data_shards(const char *dir, const struct train_data_options *o, struct rt_pool *pool, struct rt_err *err)
{
    enum { AT_ONCE = 256 };
    enum rt_status st = RT_OK;
    struct rt_row_identity id = {.teacher_name = "made up", .mode = "w8a16/f32/bench", .vocab_size = o->vocab, .teacher_layers = 1, .n_ids = o->vocab,
                                 .top_k = o->k, .n_lse = 2, .lse_temperature = {1, 2}};
    struct train_data_seq *seq = NULL;
    struct rt_rows *rows = NULL;
    struct rt_shard_sink *sink = NULL;
    struct rt_row_sink to;
    struct rt_shard_resume resume;
    int64_t done = 0;
    memset(id.teacher_sha256, 'a', 64);
    RT_TRY(rt_alloc(AT_ONCE, sizeof *seq, "sequences", &seq, err));
    RT_TRY(rt_alloc(AT_ONCE, sizeof *rows, "sequences", &rows, err));
    RT_TRY(rt_shard_sink_open(dir, &id, &(struct rt_shard_options){0}, &sink, &to, &resume, err));
    rt_shard_sink_threads(sink, pool);
    for (int64_t i = 0; done < o->tokens;) {
        int64_t n = 0, at_once = 0;
        for (; n < AT_ONCE && done < o->tokens && (n == 0 || at_once < 1 << 18); n++) {
            const int64_t len = train_data_length(o, i + n);
            if (!train_data_seq_take(&seq[n], (size_t)len, (size_t)o->k))
                RT_FAIL(err, NOMEM, "out of memory for made-up rows");
            done += len;
            at_once += len;
        }
        rt_pool_run(pool, n, train_data_item, &(struct train_data_job){o, seq, i});
        for (int64_t s = 0; s < n; s++)
            rows[s] = seq[s].rows;
        RT_TRY(to.put_all(to.self, rows, n, err));
        for (int64_t s = 0; s < n; s++) {
            train_data_seq_free(&seq[s]);
            seq[s] = (struct train_data_seq){0};
        }
        i += n;
    }
    RT_TRY(to.finish(to.self, err));
out:
    for (int64_t s = 0; seq != NULL && s < AT_ONCE; s++)
        train_data_seq_free(&seq[s]);
    rt_free(seq);
    rt_free(rows);
    rt_shard_sink_free(sink);
    return st;
}

/* The same lengths as JSON lines of random ids. */
static inline enum rt_status train_data_lines(const char *path, const struct train_data_options *o, struct rt_err *err)
{
    FILE *f = fopen(path, "w");
    int64_t done = 0;
    if (f == NULL)
        return rt_fail(err, RT_IO, "%s: cannot be written", path);
    for (int64_t i = 0; done < o->tokens; i++) {
        struct train_data_draw d = {.seed = o->seed, .s = 2 + (uint64_t)i};
        const int64_t n = train_data_length(o, i);
        fputs("{\"input_ids\":[", f);
        for (int64_t t = 0; t < n; t++)
            fprintf(f, "%s%u", t > 0 ? "," : "", train_data_id(&d, o->vocab));
        fputs("]}\n", f);
        done += n;
    }
    return fclose(f) == 0 ? RT_OK : rt_fail(err, RT_IO, "%s: cannot be written", path);
}

#endif
