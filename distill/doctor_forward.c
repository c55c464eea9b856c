#include <inttypes.h>
#include <string.h>

#include "distill/doctor.h"
#include "formats/dataset.h"
#include "student/model.h"
#include "teacher/score.h"

enum { SEQUENCES = 8, TOKENS = 192, LEAST = 4 };

/* Some text in ids: the beginnings of the first sequences. */
struct sample {
    uint32_t ids[SEQUENCES][TOKENS];
    int64_t len[SEQUENCES];
    int n;
};

static void take(struct sample *s, const uint32_t *ids, int64_t n, int64_t n_ids)
{
    n = n < TOKENS ? n : TOKENS;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] >= n_ids)
            return;
    if (n < LEAST)
        return;
    memcpy(s->ids[s->n], ids, (size_t)n * sizeof *ids);
    s->len[s->n++] = n;
}

static enum rt_status sample_lines(const struct rt_doctor *d, const struct rt_model_dir *m, int64_t n_ids, struct sample *s, struct rt_err *err)
{
    enum rt_status st;
    struct rt_dataset *set = NULL;
    struct rt_sample x;
    bool end = false;
    const struct rt_dataset_options o = {.tok = m->tok, .tmpl = m->tmpl, .n_ids = m->tok == NULL ? n_ids : 0};
    RT_TRY(rt_dataset_open(d->data, &o, &set, err));
    while (s->n < SEQUENCES) {
        RT_TRY(rt_dataset_next(set, &x, &end, err));
        if (end)
            break;
        take(s, x.ids, x.n, n_ids);
    }
out:
    rt_dataset_close(set);
    return st;
}

/* From shards that have the model's tokenizer, else from data; n 0 where there is neither. */
static enum rt_status sample_text(const struct rt_doctor *d, const struct rt_model_dir *m, int64_t n_ids, struct sample *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rows rows;
    s->n = 0;
    const char *sha = m->tok != NULL ? rt_tokenizer_sha256(m->tok) : "";
    if (d->set != NULL && strcmp(rt_shard_set_identity(d->set)->tokenizer_sha256, sha) == 0)
        for (int64_t i = 0; i < rt_shard_set_info(d->set)->sequences && s->n < SEQUENCES; i++) {
            RT_TRY(rt_shard_set_get(d->set, i, &rows, err));
            take(s, rows.ids, rows.n_tokens, n_ids);
        }
    if (s->n == 0 && d->data != NULL)
        RT_TRY(sample_lines(d, m, n_ids, s, err));
out:
    return st;
}

/* ---- the teacher: as `logits` scores ---- */
struct adding {
    struct rt_shift_sums *sums;
    int64_t n_ids;
};

static enum rt_status add_rows(void *self, const struct rt_rows *rows, struct rt_err *err)
{
    const struct adding *a = self;
    (void)err;
    rt_shift_add(a->sums, rows, 0, a->n_ids);
    return RT_OK;
}

static enum rt_status no_finish(void *self, struct rt_err *err)
{
    (void)self;
    (void)err;
    return RT_OK;
}

static enum rt_status score_teacher(struct rt_doctor *d, const struct sample *s, struct rt_shift_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    struct rt_teacher *t = NULL;
    struct rt_rows seqs[SEQUENCES] = {0};
    uint8_t mask[TOKENS];
    int64_t total = 0, longest = 0;
    const int64_t n_ids = d->tm.tok != NULL ? rt_tokenizer_n_ids(d->tm.tok) : d->tc.vocab_size;
    struct adding adding = {sums, n_ids};
    struct rt_row_sink sink = {.self = &adding, .put = add_rows, .finish = no_finish};
    const struct rt_score_options so = {.top_k = n_ids < 64 ? (int)n_ids : 64, .n_ids = n_ids, .n_lse = 1, .lse_temperature = {1}};
    memset(mask, 1, sizeof mask);
    for (int i = 0; i < s->n; i++) {
        const int64_t len = s->len[i] < d->tc.max_position ? s->len[i] : d->tc.max_position;
        seqs[i].n_tokens = len;
        seqs[i].ids = s->ids[i];
        seqs[i].loss_mask = mask;
        total += len;
        longest = len > longest ? len : longest;
    }
    const struct rt_teacher_options to = {.dir = d->teacher, .device = &d->device, .memory = d->memory, .max_length = longest, .window = total, .data_tokens = total,
                                          .token_bytes = rt_score_token_bytes(&so)};
    RT_TRY(rt_teacher_open(&to, &t, err));
    RT_TRY(rt_teacher_score(t, &so, seqs, s->n, 0, &sink, err));
out:
    rt_teacher_close(t);
    return st;
}

static enum rt_status teacher_forward(struct rt_doctor *d, struct sample *s, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    struct rt_shift_sums sums = {0};
    char bytes[32];
    if (d->teacher_bytes > (uint64_t)d->memory / 2)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "teacher.shift", "not checked: %s of weights are too many for a quick look; score a few lines and check their --shards",
                            rt_human_bytes(bytes, d->teacher_bytes));
    const int64_t max = d->tc.vocab_size;
    st = sample_text(d, &d->tm, max, s, &bad);
    if (st == RT_OK && s->n == 0)
        return RT_OK;
    const double start = rt_now();
    if (st == RT_OK)
        st = score_teacher(d, s, &sums, &bad);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "teacher.shift", "%s", bad.msg);
    rt_info(d->log, "the teacher scored %" PRId64 " rows in %.2f s", sums.rows, rt_now() - start);
    return rt_shift_check(d, "teacher.shift", &sums, max, err);
}

/* ---- the student ---- */
struct probe {
    struct rt_student *s;
    struct rt_arena weights, acts, rows;
    int32_t *next;       /* device [TOKENS] */
    float *lse, *logprob;
};

/* out[i] = log-probability of row i's id. */
static enum rt_status ask(struct rt_doctor *d, struct probe *p, const int32_t *ids, int64_t n, float *out, struct rt_err *err)
{
    static const float one[] = {1};
    enum rt_status st;
    const struct rt_student_head h = rt_student_head(p->s);
    RT_TRY(rt_device_upload(&d->device, p->next, ids, (size_t)n * sizeof *ids, err));
    RT_TRY(RT_OP(&d->device, head_topk, err, .x = rt_student_hidden(p->s, RT_LAYER_FINAL), .w = h.w, .next = p->next, .n = n, .H = h.H, .n_ids = h.V, .n_lse = 1,
                 .inv_temp = one, .lse = p->lse, .next_logprob = p->logprob));
    RT_TRY(rt_device_download(&d->device, out, p->logprob, (size_t)n * sizeof *out, err));
out:
    return st;
}

static enum rt_status probe_one(struct rt_doctor *d, struct probe *p, const uint32_t *ids, int64_t len, struct rt_shift_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    int32_t token[TOKENS + 2], cu[2] = {0, (int32_t)len};
    float now[TOKENS], next[TOKENS], after[TOKENS];
    for (int64_t i = 0; i < len + 2; i++)
        token[i] = i < len ? (int32_t)ids[i] : 0;
    const struct rt_student_batch b = {.ids = token, .cu_seqlens = cu, .n = len, .n_seq = 1};
    RT_TRY(rt_student_forward(p->s, &b, RT_KEEP_FINAL, &p->acts, err));
    RT_TRY(ask(d, p, token, len, now, err));
    RT_TRY(ask(d, p, token + 1, len, next, err));
    RT_TRY(ask(d, p, token + 2, len, after, err));
    for (int64_t i = 0; i + 2 < len; i++) {
        if (token[i] == token[i + 1] || token[i + 1] == token[i + 2])
            continue;
        sums->current_about += now[i];
        sums->next += next[i];
        sums->after_about += after[i];
        sums->rows++;
    }
out:
    return st;
}

static enum rt_status score_student(struct rt_doctor *d, const struct sample *s, struct rt_shift_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    struct probe p = {0};
    struct rt_tensors *t = NULL;
    const struct rt_device *dev = &d->device;
    const size_t act = rt_device_act_size(dev), rows = 3 * rt_arena_round(TOKENS * sizeof(float));
    const int64_t most = d->sc.max_position < TOKENS ? d->sc.max_position : TOKENS;
    RT_TRY(rt_tensors_open(d->student_dir, &t, err));
    RT_TRY(rt_device_arena(dev, rt_student_weight_bytes(&d->sc, &d->sp, most, act), "student", &p.weights, err));
    RT_TRY(rt_device_arena(dev, rt_student_activation_bytes(&d->sc, most, RT_KEEP_FINAL, act), "activations", &p.acts, err));
    RT_TRY(rt_device_arena(dev, rows, "rows", &p.rows, err));
    RT_TRY(rt_arena_alloc(&p.rows, TOKENS * sizeof(float), &p.next, err));
    RT_TRY(rt_arena_alloc(&p.rows, TOKENS * sizeof(float), &p.lse, err));
    RT_TRY(rt_arena_alloc(&p.rows, TOKENS * sizeof(float), &p.logprob, err));
    RT_TRY(rt_student_create(dev, &d->sc, &d->sp, most, &p.weights, &p.s, err));
    RT_TRY(rt_student_load(p.s, t, err));
    for (int i = 0; i < s->n; i++)
        RT_TRY(probe_one(d, &p, s->ids[i], s->len[i] < most ? s->len[i] : most, sums, err));
    sums->current = sums->current_about;
    sums->after = sums->after_about;
out:
    rt_student_free(p.s);
    rt_device_arena_free(dev, &p.rows);
    rt_device_arena_free(dev, &p.acts);
    rt_device_arena_free(dev, &p.weights);
    rt_tensors_free(t);
    return st;
}

static enum rt_status student_forward(struct rt_doctor *d, struct sample *s, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    struct rt_shift_sums sums = {0};
    if (rt_params_bytes(&d->sp, rt_device_act_size(&d->device)) > (size_t)d->memory / 2)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "student.shift", "not checked: the parameters are too many for --memory");
    st = sample_text(d, &d->sm, d->sc.vocab_size, s, &bad);
    if (st == RT_OK && s->n == 0)
        return RT_OK;
    if (st == RT_OK)
        st = score_student(d, s, &sums, &bad);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "student.shift", "%s", bad.msg);
    return rt_shift_check(d, "student.shift", &sums, d->sc.vocab_size, err);
}

/* A check of that name has failed: what rests on it is left out. */
static bool failed(const struct rt_doctor *d, const char *name)
{
    for (int i = 0; i < d->checks.n; i++)
        if (d->checks.at[i].level == RT_CHECK_FAIL && strcmp(d->checks.at[i].name, name) == 0)
            return true;
    return false;
}

enum rt_status rt_doctor_forward(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st;
    struct sample *s = NULL;
    RT_TRY(rt_alloc(1, sizeof *s, "sample", &s, err));
    const bool text = (d->data != NULL && d->tokens > 0 && !failed(d, "data.lines")) || (d->set != NULL && !failed(d, "shards.integrity"));
    if (text && d->have_teacher && d->teacher_bytes > 0)
        RT_TRY(teacher_forward(d, s, err));
    if (text && d->have_student && !failed(d, "student.weights"))
        RT_TRY(student_forward(d, s, err));
out:
    rt_free(s);
    return st;
}
