#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "distill/doctor.h"
#include "distill/logits.h"

enum { LOOKED_AT = 64 }; /* sequences whose rows are looked at one by one */

void rt_row_logprob(const struct rt_rows *rows, int64_t r, int lse_one, int64_t n_ids, uint32_t id, double *most, double *about)
{
    const double lse = rows->lse[r * rows->n_lse + lse_one];
    const int k = rt_row_entries(rows, r);
    double mass = 0;
    for (int j = 0; j < k; j++) {
        const double lp = rows->topk_logits[r * rows->k + j] - lse;
        if (rows->topk_ids[r * rows->k + j] == id) {
            *most = *about = lp;
            return;
        }
        mass += exp(lp);
    }
    *most = k > 0 ? rows->topk_logits[r * rows->k + k - 1] - lse : 0;
    *about = log(fmax(1 - mass, 1e-9) / (double)(n_ids > k ? n_ids - k : 1));
    *about = fmin(*about, *most);
}

void rt_shift_add(struct rt_shift_sums *s, const struct rt_rows *rows, int lse_one, int64_t n_ids)
{
    for (int64_t r = 0; r < rows->n_rows; r++) {
        const int64_t i = rows->position[r];
        double most, about;
        if (i + 2 >= rows->n_tokens || rows->ids[i] == rows->ids[i + 1] || rows->ids[i + 1] == rows->ids[i + 2])
            continue;
        s->next += rows->next_logprob[r];
        rt_row_logprob(rows, r, lse_one, n_ids, rows->ids[i], &most, &about);
        s->current += most;
        s->current_about += about;
        rt_row_logprob(rows, r, lse_one, n_ids, rows->ids[i + 2], &most, &about);
        s->after += most;
        s->after_about += about;
        s->rows++;
    }
}

enum rt_status rt_shift_check(struct rt_doctor *d, const char *name, const struct rt_shift_sums *s, int64_t vocab, struct rt_err *err)
{
    const double n = s->rows > 0 ? (double)s->rows : 1, next = s->next / n, current = s->current_about / n, after = s->after_about / n;
    const double chance = -log((double)vocab), best = fmax(current, after);
    if (!isfinite(s->next) || !isfinite(s->current_about) || !isfinite(s->after_about))
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "log-probabilities of %" PRId64 " rows are not all finite numbers: nothing can be learnt "
                            "with this model; look at its weights", s->rows);
    if (s->rows < 8)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, name, "only %" PRId64 " rows whose neighbours differ: too few to tell", s->rows);
    if (s->next > s->current && s->next > s->after)
        return rt_check_add(&d->checks, err, RT_CHECK_PASS, name, "mean log-probability of the next token %.2f, of the current one %.2f, of the one after next %.2f (%" PRId64 " rows)",
                            next, current, after, s->rows);
    if (best > next && best > chance + 1)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, name, "another token is likelier than the next one (mean log-probabilities: next %.2f, current %.2f, after next %.2f): the rows are "
                            "shifted, or belong to other text", next, current, after);
    return rt_check_add(&d->checks, err, RT_CHECK_WARN, name, "cannot be told: mean log-probability of the next token %.2f, of the current one %.2f, of the one after next %.2f, by chance %.2f; "
                        "the model hardly knows this text", next, current, after, chance);
}

/* ---- identity ---- */
static enum rt_status identity(struct rt_doctor *d, const struct rt_row_identity *id, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *student = d->sm.tok != NULL ? rt_tokenizer_sha256(d->sm.tok) : "", *teacher = d->tm.tok != NULL ? rt_tokenizer_sha256(d->tm.tok) : "";
    const bool made = id->origin.mode[0] != '\0'; /* the teacher's side of a retargeted set stands in its origin */
    const char *spoken = made ? id->origin.tokenizer_sha256 : id->tokenizer_sha256;
    struct rt_checks *k = &d->checks;
    if (d->have_student && student[0] != '\0' && id->tokenizer_sha256[0] != '\0') {
        if (strcmp(student, id->tokenizer_sha256) == 0)
            RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "shards.tokenizer", "that of the student: they can be trained on directly"));
        else
            RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "shards.tokenizer", "shards were made with tokenizer %.12s, the student has %.12s: rewrite them with `retort retarget --student`",
                                id->tokenizer_sha256, student));
    } else if (d->have_student && id->tokenizer_sha256[0] != '\0') {
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "shards.tokenizer", "shards were made with tokenizer %.12s, the student's directory has none: copy its "
                            "tokenizer.json there, or name its directory to train and eval with --tokenizer DIR", id->tokenizer_sha256));
    } else if (d->have_student && student[0] != '\0') {
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "shards.tokenizer", "shards name no tokenizer, the student has %.12s: `train` refuses them", student));
    }
    if (d->have_student && id->n_ids > d->sc.vocab_size)
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "shards.vocabulary", "rows run over %" PRId64 " ids, the student's head has %" PRId64 " rows", id->n_ids, d->sc.vocab_size));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "shards.vocabulary", "%" PRId64 " ids of %" PRId64 " rows of the %s's head", id->n_ids, id->vocab_size, made ? "student" : "teacher"));
    if (teacher[0] != '\0' && spoken[0] != '\0' && strcmp(teacher, spoken) != 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_WARN, "shards.teacher_tokenizer", "shards were made with tokenizer %.12s, the teacher has %.12s: of another teacher", spoken, teacher));
    if (d->teacher_sha256[0] != '\0' && strcmp(d->teacher_sha256, id->teacher_sha256) != 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "shards.teacher", "made by teacher %.12s (%s), not by %.12s, which --teacher is", id->teacher_sha256, id->teacher_name, d->teacher_sha256));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "shards.teacher", "%s, %s", id->teacher_name, id->mode));
    const struct rt_template *t = d->sm.tmpl != NULL ? d->sm.tmpl : d->tm.tmpl;
    const char *rendered = made && d->sm.tmpl == NULL ? id->origin.template_sha256 : id->template_sha256;
    if (t != NULL && rendered[0] != '\0' && strcmp(rt_template_sha256(t), rendered) != 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_WARN, "shards.template", "rendered by template %.12s, the %s has %.12s: the student would be prompted otherwise than trained",
                            rendered, d->sm.tmpl != NULL ? "student" : "teacher", rt_template_sha256(t)));
out:
    return st;
}

static enum rt_status contents(struct rt_doctor *d, const struct rt_row_identity *id, const struct rt_shard_info *info, struct rt_err *err)
{
    enum rt_status st;
    struct rt_checks *k = &d->checks;
    char temperatures[128];
    int64_t longest = 0;
    int one = 0;
    rt_row_identity_temperatures(id, temperatures);
    for (int i = 0; i < id->n_lse; i++)
        one = id->lse_temperature[i] == 1 ? i : one;
    if (id->top_k > 0) {
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "shards.temperatures", "exact tails at T = %s: --kd-temperature (and --teacher-temperature) must be one of these", temperatures));
        RT_TRY(rt_check_add(k, err, info->mass[one] >= 0.9 ? RT_CHECK_PASS : RT_CHECK_WARN, "shards.mass", "the %d stored ids hold %.4f of the teacher's mass at T = 1 (least sequence %.4f)%s",
                            id->top_k, info->mass[one], info->mass_min[one], info->mass[one] >= 0.9 ? "" : ": the tail is learnt as one bucket; score with a greater --cache topk="));
    }
    for (int64_t i = 0; i < info->sequences; i++)
        longest = rt_shard_set_seq(d->set, i)->n_tokens > longest ? rt_shard_set_seq(d->set, i)->n_tokens : longest;
    if (d->have_student) {
        const int64_t limit = rt_length_limit(d->max_length, d->sc.max_position);
        if (longest <= limit)
            RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "shards.length", "longest %" PRId64 " of %" PRId64 " tokens", longest, limit));
        else if (d->max_length > 0)
            RT_TRY(rt_check_add(k, err, RT_CHECK_WARN, "shards.length", "longest %" PRId64 " of %" PRId64
                                " tokens: with --max-length `train` and `eval` leave longer ones out", longest, limit));
        else
            RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "shards.length", "longest %" PRId64 " of %" PRId64
                                " tokens: `train` and `eval` refuse longer ones; --max-length %" PRId64 " leaves them out", longest, limit, limit));
    }
    if (d->tokens == 0) {
        d->tokens = info->tokens;
        d->sequences = info->sequences;
        d->longest = longest;
    }
out:
    return st;
}

/* ---- canaries over the rows of some sequences ---- */
struct looked {
    struct rt_shift_sums shift;
    int64_t rows, off_target, wrong_next, sequences, without_rows;
};

static enum rt_status look(struct rt_doctor *d, const struct rt_row_identity *id, struct looked *l, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rows rows;
    const int64_t n = rt_shard_set_info(d->set)->sequences, stride = n / LOOKED_AT + 1;
    int one = 0;
    for (int i = 0; i < id->n_lse; i++)
        one = id->lse_temperature[i] == 1 ? i : one;
    for (int64_t i = 0; i < n; i += stride) {
        RT_TRY(rt_shard_set_get(d->set, i, &rows, err));
        l->sequences++;
        l->without_rows += rows.n_rows == 0;
        for (int64_t r = 0; r < rows.n_rows; r++) {
            const int64_t next = (int64_t)rows.position[r] + 1;
            l->rows++;
            l->wrong_next += rows.next_id[r] != rows.ids[next];
            l->off_target += id->completion_only && !rows.loss_mask[next];
        }
        if (id->top_k > 0)
            rt_shift_add(&l->shift, &rows, one, id->n_ids);
    }
out:
    return st;
}

static enum rt_status canaries(struct rt_doctor *d, const struct rt_row_identity *id, struct rt_err *err)
{
    enum rt_status st;
    struct looked l = {0};
    struct rt_err bad = {0};
    struct rt_checks *k = &d->checks;
    st = look(d, id, &l, &bad);
    if (st == RT_NOMEM)
        return rt_fail(err, st, "%s", bad.msg);
    if (st != RT_OK)
        return rt_check_add(k, err, RT_CHECK_FAIL, "shards.rows", "%s", bad.msg);
    if (l.wrong_next > 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "shards.next", "%" PRId64 " of %" PRId64 " rows do not name the token behind theirs", l.wrong_next, l.rows));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "shards.next", "row i names token i+1 in all of %" PRId64 " rows of %" PRId64 " sequences", l.rows, l.sequences));
    if (l.off_target > 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "shards.mask", "%" PRId64 " rows predict tokens that are no targets", l.off_target));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "shards.mask", id->completion_only ? "only targets have rows" : "every token but the first has a row"));
    if (id->top_k > 0)
        RT_TRY(rt_shift_check(d, "shards.shift", &l.shift, id->n_ids, err));
out:
    return st;
}

enum rt_status rt_doctor_shards(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0};
    char bytes[32];
    if (d->shards == NULL)
        return RT_OK;
    st = rt_shard_set_open(d->shards, &d->set, &bad);
    if (st == RT_NOMEM)
        return rt_fail(err, st, "%s", bad.msg);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "shards.integrity", "%s", bad.msg);
    const struct rt_shard_info *info = rt_shard_set_info(d->set);
    const struct rt_row_identity *id = rt_shard_set_identity(d->set);
    st = rt_shard_set_verify(d->set, d->log, &bad);
    if (st == RT_NOMEM)
        return rt_fail(err, st, "%s", bad.msg);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "shards.integrity", "%s", bad.msg);
    RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "shards.integrity", "%" PRId64 " shards, %s, %" PRId64 " sequences, %" PRId64 " rows: every byte agrees with its checksum",
                        info->shards, rt_human_bytes(bytes, info->bytes), info->sequences, info->rows));
    if (info->finished)
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_PASS, "shards.parts", "all of %d, finished", info->n_parts));
    else
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_WARN, "shards.parts", "%d of %d parts are there (%s): the same `retort logits` goes on, or copy the other parts here",
                            info->parts_present, info->n_parts, info->missing[0] != '\0' ? info->missing : "none was begun"));
    st = rt_logits_parts_agree(d->shards, info->n_parts, NULL, &bad);
    if (st == RT_NOMEM)
        return rt_fail(err, st, "%s", bad.msg);
    if (st != RT_OK)
        RT_TRY(rt_check_add(&d->checks, err, RT_CHECK_FAIL, "shards.input", "%s", bad.msg));
    RT_TRY(identity(d, id, err));
    RT_TRY(contents(d, id, info, err));
    RT_TRY(canaries(d, id, err));
out:
    return st;
}
