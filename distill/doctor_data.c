#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/doctor.h"
#include "formats/dataset.h"

/* What reading the lines with one model found. */
struct findings {
    int64_t longest, over, without_end, masked_wrong, rendered_wrong, bos_wrong, checked;
    int64_t end_line, mask_line, render_line, bos_line, over_line; /* the first of each */
};

static void note(int64_t *count, int64_t *first, int64_t line)
{
    if ((*count)++ == 0)
        *first = line;
}

static void trim(const char **s, size_t *n)
{
    while (*n > 0 && strchr(" \n\r\t", (*s)[0]) != NULL)
        ++*s, --*n;
    while (*n > 0 && strchr(" \n\r\t", (*s)[*n - 1]) != NULL)
        --*n;
}

/* One ends with the other, white space at the ends aside: a template may have a part of the completion in its prompt. */
static bool suffix(const char *a, size_t na, const char *b, size_t nb)
{
    trim(&a, &na);
    trim(&b, &nb);
    return na >= nb ? memcmp(a + na - nb, b, nb) == 0 : memcmp(b + nb - na, a, na) == 0;
}

/* Targets decode to the completion; the last target is the end token. */
static enum rt_status check_targets(const struct rt_model_dir *m, const struct rt_sample *s, struct findings *f, struct rt_buf *text, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const uint32_t end = m->tmpl != NULL ? rt_template_end_id(m->tmpl) : UINT32_MAX;
    int64_t last = -1;
    text->len = 0;
    for (int64_t i = 0; i < s->n; i++)
        last = s->loss_mask[i] ? i : last;
    for (int64_t i = 0; i <= last; i++)
        if (s->loss_mask[i] && !(i == last && s->ids[i] == end))
            RT_TRY(rt_tokenizer_decode(m->tok, &s->ids[i], 1, false, text, err));
    if (end != UINT32_MAX && (last < 0 || s->ids[last] != end) && (last < 1 || s->ids[last - 1] != end))
        note(&f->without_end, &f->end_line, s->line);
    const bool exact = !(s->not_nfc && rt_tokenizer_normalizes(m->tok)) && rt_json_get(s->json, "messages") == NULL;
    if (exact && s->completion != NULL && !suffix(text->data != NULL ? text->data : "", text->len, s->completion, strlen(s->completion)))
        note(&f->masked_wrong, &f->mask_line, s->line);
out:
    return st;
}

/* The sample begins with the ids that a sampler would start from. */
static enum rt_status check_prompt(const struct rt_model_dir *m, const struct rt_sample *s, struct findings *f, struct rt_rendered *r, struct rt_err *err)
{
    static const enum rt_thinking modes[] = {RT_THINKING_AUTO, RT_THINKING_ON, RT_THINKING_OFF};
    enum rt_status st = RT_OK;
    size_t len;
    const char *prompt = rt_json_as_string(rt_json_get(s->json, "prompt"), &len);
    if (prompt == NULL || m->tmpl == NULL)
        return RT_OK;
    const struct rt_message turn = {.role = "user", .content = prompt, .content_len = len, .loss = -1};
    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++) {
        RT_TRY(rt_template_prompt(m->tmpl, &turn, 1, modes[i], "prompt", r, err));
        if ((int64_t)r->enc.n <= s->n && memcmp(r->enc.ids, s->ids, r->enc.n * sizeof *s->ids) == 0)
            return RT_OK;
    }
    note(&f->rendered_wrong, &f->render_line, s->line);
out:
    return st;
}

static void check_bos(const struct rt_model_dir *m, const struct rt_sample *s, struct findings *f)
{
    const int64_t bos = rt_tokenizer_bos(m->tok);
    int64_t n = 0;
    const bool text = !s->has_completion;
    for (int64_t i = 0; i < s->n; i++)
        n += s->ids[i] == bos;
    if (bos >= 0 && (n > 1 || (n == 1 && s->ids[0] != bos) || (text && (n == 1) != rt_tokenizer_add_bos(m->tok))))
        note(&f->bos_wrong, &f->bos_line, s->line);
}

static enum rt_status read_lines(struct rt_doctor *d, const struct rt_model_dir *m, int64_t limit, struct findings *f, struct rt_dataset_counts *counts,
                                 int64_t n_ids, struct rt_err *err)
{
    enum rt_status st;
    struct rt_dataset *set = NULL;
    struct rt_sample s;
    struct rt_buf text = {0};
    struct rt_rendered r = {0};
    bool end = false;
    const struct rt_dataset_options o = {.tok = m->tok, .tmpl = m->tmpl, .n_ids = m->tok == NULL ? n_ids : 0};
    RT_TRY(rt_dataset_open(d->data, &o, &set, err));
    for (;;) {
        RT_TRY(rt_dataset_next(set, &s, &end, err));
        if (end)
            break;
        f->longest = s.n > f->longest ? s.n : f->longest;
        if (limit > 0 && s.n > limit)
            note(&f->over, &f->over_line, s.line);
        const bool own_ids = rt_json_get(s.json, "input_ids") != NULL;
        if (m->tok == NULL || own_ids || (d->lines > 0 && f->checked >= d->lines))
            continue;
        f->checked++;
        check_bos(m, &s, f);
        if (!s.has_completion)
            continue;
        RT_TRY(check_targets(m, &s, f, &text, err));
        RT_TRY(check_prompt(m, &s, f, &r, err));
    }
    *counts = rt_dataset_counts(set);
out:
    rt_rendered_free(&r);
    rt_buf_free(&text);
    rt_dataset_close(set);
    return st;
}

/* Is there something to learn from in the line, as `train` reads it? */
static bool teaches(const struct rt_json *line)
{
    const struct rt_json *messages = rt_json_get(line, "messages");
    const size_t n = rt_json_len(messages);
    if (rt_json_get(line, "input_ids") != NULL)
        return true;
    if (messages != NULL) {
        const char *role = n > 0 ? rt_json_as_string(rt_json_get(rt_json_at(messages, n - 1), "role"), NULL) : NULL;
        return role != NULL && strcmp(role, "assistant") == 0;
    }
    return rt_json_get(line, "prompt") != NULL ? rt_json_get(line, "completion") != NULL : rt_json_get(line, "text") != NULL;
}

/* Prompts without completions: what `traces` and `eval` read. *alone: no line has more than a prompt. */
static enum rt_status read_prompts(struct rt_doctor *d, const struct rt_model_dir *m, bool *alone, int64_t *n, int64_t *longest, struct rt_err *err)
{
    enum rt_status st;
    struct rt_dataset *set = NULL;
    struct rt_prompt p;
    bool end = false;
    const struct rt_dataset_options o = {.tok = m->tok, .tmpl = m->tmpl};
    *n = *longest = 0;
    *alone = true;
    RT_TRY(rt_dataset_open(d->data, &o, &set, err));
    for (;; ++*n) {
        RT_TRY(rt_dataset_next_prompt(set, &p, &end, err));
        if (end)
            break;
        *longest = p.n > *longest ? p.n : *longest;
        *alone &= !teaches(p.json);
    }
out:
    rt_dataset_close(set);
    return st;
}

/* Sequences over the limit: of a student `train` and `eval` refuse them unless --max-length leaves them out, of a teacher `logits` leaves them out or cuts
 * them. */
static enum rt_status check_length(struct rt_doctor *d, const char *who, const struct findings *f, int64_t limit, struct rt_err *err)
{
    const bool student = who[0] == 's', refused = student && d->max_length == 0;
    char what[96] = "with --max-length `train` and `eval` leave them out";
    if (refused)
        snprintf(what, sizeof what, "`train` and `eval` refuse them; --max-length %" PRId64 " leaves them out", limit);
    else if (!student)
        snprintf(what, sizeof what, "`logits` leaves them out, or cuts them with --overlong split");
    if (f->over == 0)
        return rt_check_add(&d->checks, err, RT_CHECK_PASS, "data.length", "longest %" PRId64 " of %" PRId64 " tokens (by the %s)", f->longest, limit, who);
    return rt_check_add(&d->checks, err, refused ? RT_CHECK_FAIL : RT_CHECK_WARN, "data.length", "%" PRId64 " sequences are longer than %" PRId64
                        " tokens (by the %s; the first: line %" PRId64 ", longest %" PRId64 "): %s", f->over, limit, who, f->over_line, f->longest, what);
}

static enum rt_status report(struct rt_doctor *d, const char *who, const struct findings *f, const struct rt_dataset_counts *c, int64_t limit,
                             const struct rt_model_dir *m, struct rt_err *err)
{
    enum rt_status st;
    struct rt_checks *k = &d->checks;
    char suffix_text[32];
    snprintf(suffix_text, sizeof suffix_text, " (by the %s)", who);
    RT_TRY(rt_check_add(k, err, c->samples > 0 ? RT_CHECK_PASS : RT_CHECK_FAIL, "data.lines", "%" PRId64 " lines, %" PRId64 " sequences, %" PRId64 " tokens, %" PRId64
                        " targets%s", c->lines, c->samples, c->tokens, c->targets, suffix_text));
    if (c->untargeted > 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_WARN, "data.targets", "%" PRId64 " sequences have nothing to learn from and are left out", c->untargeted));
    RT_TRY(check_length(d, who, f, limit, err));
    if (m->tok == NULL || f->checked == 0)
        goto out;
    if (c->not_nfc > 0 && rt_tokenizer_normalizes(m->tok))
        RT_TRY(rt_check_add(k, err, RT_CHECK_WARN, "data.nfc", "%" PRId64 " lines are not in NFC: their tokens stand for other bytes than the text; normalise them first", c->not_nfc));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "data.nfc", c->not_nfc > 0 ? "%" PRId64 " lines are not in NFC, and the tokenizer leaves them so" : "all of it", c->not_nfc));
    if (f->bos_wrong > 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "data.bos", "%" PRId64 " of %" PRId64 " sequences have BOS twice, in the middle, or not where it belongs (the first: line %" PRId64
                            "): take special tokens out of the text", f->bos_wrong, f->checked, f->bos_line));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "data.bos", "right in all of %" PRId64 " sequences", f->checked));
    if (f->masked_wrong > 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "data.mask", "the targets' text is not the completion in %" PRId64 " of %" PRId64 " sequences (the first: line %" PRId64 ")",
                            f->masked_wrong, f->checked, f->mask_line));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "data.mask", "the targets' text is the completion in all of %" PRId64 " sequences", f->checked));
    if (f->without_end > 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_WARN, "data.end_token", "%" PRId64 " of %" PRId64 " answers do not end with the end token as a target (the first: line %" PRId64 ")",
                            f->without_end, f->checked, f->end_line));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "data.end_token", "is the last target of every answer"));
    if (f->rendered_wrong > 0)
        RT_TRY(rt_check_add(k, err, RT_CHECK_FAIL, "data.generation", "%" PRId64 " of %" PRId64 " sequences do not begin with the prompt that a sampler starts from (the first: line %" PRId64 ")",
                            f->rendered_wrong, f->checked, f->render_line));
    else
        RT_TRY(rt_check_add(k, err, RT_CHECK_PASS, "data.generation", "every sequence begins with the prompt that a sampler starts from"));
out:
    return st;
}

/* The lines by one model; who they are read for. */
static enum rt_status by_model(struct rt_doctor *d, const char *who, const struct rt_model_dir *m, int64_t max_position, int64_t n_ids, struct rt_err *err)
{
    enum rt_status st;
    struct rt_err bad = {0}, worse = {0};
    struct findings f = {0};
    struct rt_dataset_counts c = {0};
    const int64_t limit = rt_length_limit(d->max_length, max_position);
    int64_t prompts, longest;
    bool alone;
    st = read_lines(d, m, limit, &f, &c, n_ids, &bad);
    if (st == RT_NOMEM)
        return rt_fail(err, st, "%s", bad.msg);
    if (st != RT_OK && read_prompts(d, m, &alone, &prompts, &longest, &worse) == RT_OK && alone)
        return rt_check_add(&d->checks, err, longest <= limit ? RT_CHECK_PASS : RT_CHECK_FAIL, "data.prompts", "%" PRId64 " prompts, no completions: for traces and eval; longest %" PRId64
                            " of %" PRId64 " tokens (by the %s)", prompts, longest, limit, who);
    if (st != RT_OK)
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "data.lines", "%s (by the %s)", bad.msg, who);
    d->tokens = c.tokens;
    d->sequences = c.samples;
    d->longest = f.longest;
    return report(d, who, &f, &c, limit, m, err);
}

enum rt_status rt_doctor_data(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (d->data == NULL)
        return RT_OK;
    if (!rt_path_exists(d->data))
        return rt_check_add(&d->checks, err, RT_CHECK_FAIL, "data.lines", "%s: no such file or directory", d->data);
    if (!d->have_teacher && !d->have_student)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "data.lines", d->teacher == NULL && d->student == NULL ?
                            "not read: give --teacher or --student too, whose tokenizer and template read it" :
                            "not read: the configuration of the model whose tokenizer and template would read it cannot be read");
    /* the same tokenizer and template read the same: once is enough */
    const bool same = d->tm.tok != NULL && d->sm.tok != NULL && strcmp(rt_tokenizer_sha256(d->tm.tok), rt_tokenizer_sha256(d->sm.tok)) == 0 && d->tm.tmpl != NULL &&
                      d->sm.tmpl != NULL && strcmp(rt_template_sha256(d->tm.tmpl), rt_template_sha256(d->sm.tmpl)) == 0;
    if (d->have_student)
        RT_TRY(by_model(d, "student", &d->sm, d->sc.max_position, d->sc.vocab_size, err));
    if (d->have_teacher && (!same || !d->have_student || d->tc.max_position < d->sc.max_position))
        RT_TRY(by_model(d, "teacher", &d->tm, d->tc.max_position, d->tc.vocab_size, err));
    RT_TRY(rt_doctor_crossing(d, err));
out:
    return st;
}
