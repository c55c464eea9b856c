/* Shared by the suites of the teacher engine: a teacher over a few sequences of a test case, and a sink that keeps all bytes of their rows. */
#ifndef RT_TESTS_TEACHER_FIXTURE_H
#define RT_TESTS_TEACHER_FIXTURE_H

#include <string.h>

#include "core/mem.h"
#include "teacher/score.h"
#include "tests/suite.h"

enum { SEQS = 5, MOST = 40 };
static const int64_t lengths[SEQS] = {17, 1, 40, 2, 29};

struct setup {
    struct rt_device d;
    struct rt_teacher *t;
    uint32_t ids[SEQS][MOST];
    uint8_t mask[SEQS][MOST];
    struct rt_rows seqs[SEQS];
};

static inline void fill_sequences(struct setup *s, int64_t n_ids)
{
    for (int i = 0; i < SEQS; i++) {
        for (int64_t j = 0; j < lengths[i]; j++) {
            s->ids[i][j] = (uint32_t)(((uint64_t)(i + 1) * 7919 + (uint64_t)j * 104729 + (uint64_t)(j * j)) % (uint64_t)n_ids);
            s->mask[i][j] = j >= lengths[i] / 2;
        }
        s->seqs[i] = (struct rt_rows){.n_tokens = lengths[i], .ids = s->ids[i], .loss_mask = s->mask[i], .source_line = i + 1};
        rt_rows_key(s->ids[i], lengths[i], s->seqs[i].key);
    }
}

static inline void open_device(struct rt_device *d, const char *backend, int threads)
{
    struct rt_err err = {0};
    const struct rt_backend *be;
    assert_ok(rt_backend_select(backend, NULL, 0, &be, &err));
    assert_ok(rt_device_open(be, &(const struct rt_dev_options){.threads = threads}, d, &err));
}

static inline void set_up(struct setup *s, const char *dir, const char *backend, int threads, int64_t memory)
{
    struct rt_err err = {0};
    memset(s, 0, sizeof *s);
    open_device(&s->d, backend, threads);
    const struct rt_teacher_options o = {.dir = dir, .device = &s->d, .memory = memory, .max_length = MOST, .data_tokens = 89};
    assert_ok(rt_teacher_open(&o, &s->t, &err));
    fill_sequences(s, rt_teacher_config(s->t)->vocab_size);
}

static inline void tear_down(struct setup *s)
{
    rt_teacher_close(s->t);
    rt_device_close(&s->d);
}

/* A sink that keeps every byte of every block. */
struct kept {
    struct rt_buf bytes;
    int64_t blocks;
    const struct rt_score_options *o; /* NULL: no features are kept */
};

static inline enum rt_status keep(void *self, const struct rt_rows *r, struct rt_err *err)
{
    struct kept *k = self;
    const size_t n = (size_t)r->n_rows;
    enum rt_status st;
    k->blocks++;
    RT_TRY(rt_buf_append(&k->bytes, r->position, n * 4, err));
    RT_TRY(rt_buf_append(&k->bytes, r->topk_ids, n * (size_t)r->k * 4, err));
    RT_TRY(rt_buf_append(&k->bytes, r->topk_logits, n * (size_t)r->k * 4, err));
    RT_TRY(rt_buf_append(&k->bytes, r->lse, n * (size_t)r->n_lse * 4, err));
    RT_TRY(rt_buf_append(&k->bytes, r->next_id, n * 4, err));
    RT_TRY(rt_buf_append(&k->bytes, r->next_logprob, n * 4, err));
    RT_TRY(rt_buf_append(&k->bytes, r->next_rank, n * 4, err));
    for (int i = 0; k->o != NULL && i < k->o->n_features; i++) {
        const struct rt_feature_spec *f = &k->o->feature[i];
        RT_TRY(rt_buf_append(&k->bytes, r->feature[i], (size_t)(r->n_tokens * f->dim) * rt_dtype_size(f->dtype), err));
        if (f->dtype == RT_E4M3)
            RT_TRY(rt_buf_append(&k->bytes, r->feature_scale[i], (size_t)r->n_tokens * sizeof(float), err));
    }
out:
    return st;
}

static inline struct rt_score_options score_options(const struct setup *s)
{
    return (struct rt_score_options){.top_k = 8, .n_ids = rt_teacher_config(s->t)->vocab_size, .n_lse = 2, .lse_temperature = {1, 2}};
}

static inline struct kept score(struct setup *s, const struct rt_score_options *o)
{
    struct kept k = {.o = o};
    struct rt_err err = {0};
    struct rt_row_sink sink = {.self = &k, .put = keep};
    assert_ok(rt_teacher_score(s->t, o, s->seqs, SEQS, 0, &sink, &err));
    return k;
}

#endif
