#include "tests/shard_fixture.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/rng.h"

struct rt_row_identity sf_identity(int k)
{
    struct rt_row_identity id = {.vocab_size = 100, .n_ids = SF_MAX_IDS, .top_k = k, .n_lse = 3, .lse_temperature = {0.6, 1, 2},
                                 .projection_seed = UINT64_MAX, .max_length = 4096};
    memset(id.teacher_sha256, 'a', 64);
    memset(id.tokenizer_sha256, 'b', 64);
    strcpy(id.teacher_name, "tiny");
    strcpy(id.mode, "w8a16/f32/ref");
    return id;
}

void sf_add_features(struct rt_row_identity *id)
{
    id->n_features = 2;
    id->feature[0] = (struct rt_feature_spec){3, 8, RT_BF16, false};
    id->feature[1] = (struct rt_feature_spec){RT_LAYER_FINAL, 4, RT_E4M3, true};
}

static void make_row(struct sf_made *m, const struct rt_row_identity *id, uint64_t seed, int64_t t, int64_t i)
{
    const int k = m->rows.k;
    float all[SF_MAX_IDS];
    uint32_t order[SF_MAX_IDS];
    for (uint32_t v = 0; v < SF_MAX_IDS; v++) { /* halves, so that logits tie */
        all[v] = floorf(rt_rng_normal(seed, (uint64_t)t, v) * 6) / 2;
        uint32_t at = v;
        for (; at > 0 && all[order[at - 1]] < all[v]; at--)
            order[at] = order[at - 1];
        order[at] = v;
    }
    for (int j = 0; j < k; j++) {
        m->topk_ids[i * k + j] = order[j];
        m->logits[i * k + j] = all[order[j]];
    }
    double lse1 = 0;
    for (int l = 0; l < id->n_lse; l++) {
        double sum = 0;
        for (int v = 0; v < SF_MAX_IDS; v++)
            sum += exp(all[v] / id->lse_temperature[l]);
        m->lse[i * id->n_lse + l] = (float)log(sum);
        lse1 = id->lse_temperature[l] == 1 ? log(sum) : lse1;
    }
    m->pos[i] = (uint32_t)t;
    m->next[i] = m->ids[t + 1];
    m->logprob[i] = (float)(all[m->next[i]] - lse1);
    for (m->rank[i] = 0; order[m->rank[i]] != m->next[i];)
        m->rank[i]++;
}

struct sf_made *sf_make(const struct rt_row_identity *id, int i, int64_t n_tokens)
{
    struct sf_made *m = calloc(1, sizeof *m);
    struct rt_rows *r = &m->rows;
    const uint64_t seed = (uint64_t)i;
    assert_non_null(m);
    *r = (struct rt_rows){.occurrence = (uint32_t)i % 3, .source_line = 2 * i + 1, .n_tokens = n_tokens, .k = id->top_k < SF_MAX_IDS ? id->top_k : SF_MAX_IDS,
                          .n_lse = id->n_lse, .n_features = id->n_features};
    assert_true(n_tokens <= SF_MAX_TOKENS && r->k <= SF_MAX_K);
    for (int64_t t = 0; t < n_tokens; t++) {
        m->ids[t] = (uint32_t)(rt_rng_u64(seed, 1000, (uint64_t)t) % SF_MAX_IDS);
        m->mask[t] = t >= n_tokens / 2;
        const int64_t len = (int64_t)(m->ids[t] % 4);
        memset(m->text + r->text_len, 'a' + (int)(m->ids[t] % 26), (size_t)len);
        r->text_len += len;
        m->ends[t] = (uint32_t)r->text_len;
        m->scale[t] = 0.5f + (float)t;
        for (int d = 0; d < 8; d++)
            m->state[t * 8 + d] = rt_f32_to_bf16(rt_rng_normal(seed, 2000, (uint64_t)(t * 8 + d)));
        for (int d = 0; d < 4; d++)
            m->code[t * 4 + d] = rt_f32_to_e4m3(rt_rng_normal(seed, 3000, (uint64_t)(t * 4 + d)));
    }
    for (int64_t t = 0; t + 1 < n_tokens; t++)
        if (!id->completion_only || m->mask[t + 1] == 1)
            make_row(m, id, seed, t, r->n_rows++);
    rt_rows_key(m->ids, n_tokens, r->key);
    r->ids = m->ids;
    r->loss_mask = m->mask;
    if (id->tokenizer_sha256[0] != '\0') {
        r->text = m->text;
        r->byte_end = m->ends;
    } else {
        r->text_len = 0;
    }
    r->position = m->pos;
    r->topk_ids = m->topk_ids;
    r->topk_logits = m->logits;
    r->lse = m->lse;
    r->next_id = m->next;
    r->next_logprob = m->logprob;
    r->next_rank = m->rank;
    if (id->n_features > 0)
        r->feature[0] = m->state;
    if (id->n_features > 1) {
        r->feature[1] = m->code;
        r->feature_scale[1] = m->scale;
    }
    return m;
}

int64_t sf_length_of(int i)
{
    return 1 + (i * 7) % 20; /* a sequence of one token has no rows */
}

const struct rt_shard_options sf_small = {.rows_per_shard = 60};

enum rt_status sf_write_set(const char *dir, const struct rt_row_identity *id, const struct rt_shard_options *opt, int n, int stop,
                            struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_sink *s = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct sf_made *m = NULL;
    RT_TRY(rt_shard_sink_open(dir, id, opt, &s, &sink, &resume, err));
    for (int i = (int)resume.sequences; i < n; i++) {
        m = sf_make(id, i, sf_length_of(i));
        RT_TRY(sink.put(sink.self, &m->rows, err));
        free(m);
        m = NULL;
        if (i == stop)
            kill(getpid(), SIGKILL);
    }
    RT_TRY(sink.finish(sink.self, err));
out:
    free(m);
    rt_shard_sink_free(s);
    return st;
}

enum rt_status sf_read_whole(const char *path, struct rt_err *err)
{
    struct rt_shard_set *s = NULL;
    struct rt_rows rows;
    enum rt_status st = rt_shard_set_open(path, &s, err);
    for (int64_t i = 0; st == RT_OK && i < rt_shard_set_info(s)->sequences; i++)
        st = rt_shard_set_get(s, i, &rows, err);
    rt_shard_set_free(s);
    return st;
}
