#include "distill/retarget_text.h"

#include <stdio.h>
#include <string.h>

#include "formats/unicode.h"

void rt_retarget_text_free(struct rt_retarget_text *t)
{
    rt_buf_free(&t->text);
    rt_encoding_free(&t->enc);
    rt_buf_free(&t->target);
    rt_buf_free(&t->teacher_end);
    rt_buf_free(&t->student_end);
    rt_buf_free(&t->whole);
    rt_prompt_read_free(&t->prompt);
    rt_rendered_free(&t->rendered);
    *t = (struct rt_retarget_text){0};
}

static uint32_t begin_of(const struct rt_rows *r, int64_t i)
{
    return i > 0 ? r->byte_end[i - 1] : 0;
}

/* The tokens' bytes are the text's. */
static bool reassembles(const struct rt_tokenizer *tok, const struct rt_rows *r)
{
    for (int64_t i = 0; i < r->n_tokens; i++) {
        const char *bytes;
        size_t n;
        const uint32_t at = begin_of(r, i);
        if (!rt_tokenizer_bytes(tok, r->ids[i], &bytes, &n) || r->byte_end[i] - at != n || memcmp(r->text + at, bytes, n) != 0)
            return false;
    }
    return true;
}

static enum rt_status check_text(const struct rt_retarget_pair *p, const struct rt_rows *r, enum rt_reject *reject, struct rt_err *err)
{
    bool nfc = true;
    enum rt_status st = RT_OK;
    *reject = RT_REJECT_NONE;
    if (r->text == NULL || !reassembles(p->teacher->tok, r)) {
        *reject = RT_REJECT_BYTES;
    } else if (rt_utf8_prefix(r->text, (size_t)r->text_len) != (size_t)r->text_len) {
        *reject = RT_REJECT_UTF8;
    } else {
        RT_TRY(rt_is_nfc(r->text, (size_t)r->text_len, &nfc, err));
        *reject = nfc ? RT_REJECT_NONE : RT_REJECT_NFC;
    }
out:
    return st;
}

static enum rt_status put_u32(struct rt_buf *b, uint32_t v, struct rt_err *err)
{
    return rt_buf_append(b, &v, sizeof v, err);
}

/* Units of the teacher's tokens below `to`; those of [first, to) count from `begin`. */
static enum rt_status teacher_units(const struct rt_rows *r, int64_t first, int64_t to, uint32_t begin,
                                    const uint8_t *structural, struct rt_retarget_text *t, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    uint32_t at = begin;
    for (int64_t i = 0; i < to; i++) {
        if (i >= first)
            at += structural != NULL && structural[i] ? 1 : r->byte_end[i] - begin_of(r, i);
        RT_TRY(put_u32(&t->teacher_end, at, err));
    }
    t->teacher = (struct rt_side){.ids = r->ids, .target = r->loss_mask, .first = first, .n = to, .begin = begin};
    t->teacher.end = (const uint32_t *)(const void *)t->teacher_end.data;
out:
    return st;
}

/* Mask, text and side of the student, whose tokens are in t->enc and units in t->student_end. */
static enum rt_status student_side(const struct rt_retarget_pair *p, int64_t first, uint32_t begin, struct rt_retarget_text *t, enum rt_reject *reject,
                                   struct rt_err *err)
{
    enum rt_status st;
    const uint8_t *mask;
    int64_t targets = 0;
    RT_TRY(rt_tokenizer_decode(p->student->tok, t->enc.ids, t->enc.n, false, &t->text, err));
    RT_TRY(rt_buf_reserve(&t->text, 1, err));
    t->student = (struct rt_side){.ids = t->enc.ids, .first = first, .n = (int64_t)t->enc.n, .begin = begin};
    t->student.end = (const uint32_t *)(const void *)t->student_end.data;
    t->student.target = mask = (const uint8_t *)t->target.data;
    for (int64_t i = 1; i < t->student.n; i++)
        targets += mask[i];
    *reject = targets == 0 ? RT_REJECT_EMPTY : RT_REJECT_NONE;
out:
    return st;
}

/* ---- plain text ---- */

/* A special token that has a role on both sides and another name: one unit, whatever it is called. */
static bool is_structural(const struct rt_vocab_map *m, uint32_t w)
{
    const char *a, *b;
    size_t na, nb;
    if (!m->opaque[w] || m->equal[w] == RT_NO_ID || !rt_tokenizer_bytes(m->teacher, w, &a, &na) ||
        !rt_tokenizer_bytes(m->student, m->equal[w], &b, &nb))
        return false;
    return na != nb || memcmp(a, b, na) != 0;
}

static enum rt_status push_token(const struct rt_retarget_pair *p, uint32_t id, uint32_t unit, uint8_t target, struct rt_retarget_text *t, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_encoding_push(&t->enc, p->student->tok, id, err));
    RT_TRY(put_u32(&t->student_end, unit, err));
    RT_TRY(rt_buf_append(&t->target, &target, 1, err));
out:
    return st;
}

/* What a tokenizer or a template says of one text concerns that text alone. */
static enum rt_status of_one_sequence(enum rt_status st, const struct rt_err *bad, enum rt_reject *reject, struct rt_err *err)
{
    if (st == RT_OK)
        return RT_OK;
    if (st != RT_FORMAT && st != RT_UNSUPPORTED)
        return rt_fail(err, st, "%s", bad->msg);
    *reject = RT_REJECT_RENDER;
    return RT_OK;
}

/* Bytes [from, to) of the text as student tokens that begin at unit *at. */
static enum rt_status push_text(const struct rt_retarget_pair *p, const struct rt_rows *r, uint32_t from, uint32_t to, uint32_t *at,
                                struct rt_retarget_text *t, enum rt_reject *reject, struct rt_err *err)
{
    enum rt_status st;
    const size_t first = t->enc.n;
    const uint32_t base = first > 0 ? t->enc.byte_end[first - 1] : 0;
    const uint8_t one = 1;
    struct rt_err bad = {0};
    st = rt_tokenizer_encode(p->student->tok, r->text + from, to - from, &t->enc, &bad);
    RT_TRY(of_one_sequence(st, &bad, reject, err));
    if (*reject != RT_REJECT_NONE)
        goto out;
    if ((t->enc.n > first ? t->enc.byte_end[t->enc.n - 1] : base) - base != to - from)
        *reject = RT_REJECT_RENDER;
    for (size_t i = first; i < t->enc.n; i++) {
        RT_TRY(put_u32(&t->student_end, *at + t->enc.byte_end[i] - base, err));
        RT_TRY(rt_buf_append(&t->target, &one, 1, err));
    }
    *at += to - from;
out:
    return st;
}

static enum rt_status make_plain(const struct rt_retarget_pair *p, const struct rt_rows *r, struct rt_retarget_text *t, enum rt_reject *reject,
                                 struct rt_err *err)
{
    enum rt_status st;
    const struct rt_vocab_map *m = p->map;
    const int64_t bos = rt_tokenizer_bos(p->teacher->tok), own = rt_tokenizer_bos(p->student->tok);
    const bool put = bos >= 0 && (rt_tokenizer_add_bos(p->teacher->tok) || m->equal[bos] == RT_NO_ID); /* BOS at the front is no text */
    const int64_t first = put && r->ids[0] == (uint32_t)bos ? 1 : 0;
    uint8_t *structural = NULL;
    uint32_t at = 0, from = begin_of(r, first);
    RT_TRY(rt_alloc((size_t)r->n_tokens, 1, "special tokens of a text", &structural, err));
    if (own >= 0 && rt_tokenizer_add_bos(p->student->tok))
        RT_TRY(push_token(p, (uint32_t)own, 0, 1, t, err));
    const int64_t student_first = (int64_t)t->enc.n;
    for (int64_t i = first; i < r->n_tokens && *reject == RT_REJECT_NONE; i++) {
        structural[i] = is_structural(m, r->ids[i]);
        if (!structural[i])
            continue;
        RT_TRY(push_text(p, r, from, begin_of(r, i), &at, t, reject, err));
        RT_TRY(push_token(p, m->equal[r->ids[i]], ++at, 1, t, err));
        from = r->byte_end[i];
    }
    if (*reject == RT_REJECT_NONE)
        RT_TRY(push_text(p, r, from, (uint32_t)r->text_len, &at, t, reject, err));
    if (*reject != RT_REJECT_NONE)
        goto out;
    RT_TRY(teacher_units(r, first, r->n_tokens, 0, structural, t, err));
    RT_TRY(student_side(p, student_first, 0, t, reject, err));
out:
    rt_free(structural);
    return st;
}

/* ---- conversations ---- */

/* What the student's completion begins with that the teacher's prompt had forced. An empty thought is one only to templates that know it, and they
 * have it in front of an answer without a thought, too. */
static const char *forced_for(const struct rt_model_dir *student, const struct rt_prompt_read *prompt, size_t *len)
{
    static const char close[] = "</think>", empty[] = "<think>\n\n</think>\n\n";
    const char *family = rt_template_name(student->tmpl);
    *len = prompt->forced_len;
    if (!prompt->bare && (*len == 0 || memmem(prompt->forced, *len, close, sizeof close - 1) == NULL))
        return prompt->forced;
    const char *text = strcmp(family, "qwen3") == 0 ? empty : strcmp(family, "deepseek_v3_1") == 0 ? close : "";
    *len = strlen(text);
    return text;
}

/* A sampler's prompt opens a thought, so that an answer without one is no completion of it. */
static bool opens_thought(const struct rt_template *t)
{
    const char *forced = rt_template_forced(t, RT_THINKING_AUTO);
    return strstr(forced, "<think>") != NULL && strstr(forced, "</think>") == NULL;
}

/* The student's rendered tokens into t, with units from the end of `whole` backwards. */
static enum rt_status take_rendered(const struct rt_retarget_pair *p, bool ended, struct rt_retarget_text *t, uint32_t *begin, enum rt_reject *reject,
                                    struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_rendered *r = &t->rendered;
    size_t n = r->target_start + r->n_targets; /* without what the template prints behind the turn */
    const size_t first = r->target_start;
    const bool has_end = n > first && r->enc.ids[n - 1] == p->map->student_end;
    if (has_end && !ended)
        n--;
    const uint32_t base = first > 0 && first <= n ? r->enc.byte_end[first - 1] : 0;
    const size_t words = has_end && ended ? n - 1 : n; /* the last one is one unit, whatever its bytes */
    const uint32_t bytes = words > first ? r->enc.byte_end[words - 1] - base : 0;
    *reject = bytes > t->whole.len ? RT_REJECT_RENDER : n < 2 || n <= first || first == 0 ? RT_REJECT_EMPTY : RT_REJECT_NONE;
    if (*reject != RT_REJECT_NONE)
        goto out;
    *begin = (uint32_t)t->whole.len - bytes;
    RT_TRY(rt_tokenizer_decode(p->student->tok, r->enc.ids + first, words - first, false, &t->text, err));
    if (t->text.len != bytes || (bytes > 0 && memcmp(t->text.data, t->whole.data + *begin, bytes) != 0))
        *reject = RT_REJECT_RENDER;
    t->text.len = 0;
    for (size_t i = 0; i < n && *reject == RT_REJECT_NONE; i++) {
        const uint32_t unit = i < first ? 0 : i < words ? *begin + r->enc.byte_end[i] - base : (uint32_t)t->whole.len + 1;
        RT_TRY(push_token(p, r->enc.ids[i], unit, r->loss_mask[i], t, err));
    }
out:
    return st;
}

static enum rt_status make_turn(const struct rt_retarget_pair *p, const struct rt_rows *r, int64_t first, int64_t last, struct rt_retarget_text *t,
                                enum rt_reject *reject, struct rt_err *err)
{
    enum rt_status st;
    bool ok;
    size_t forced = 0;
    uint32_t begin = 0;
    uint8_t *structural = NULL;
    char where[64];
    struct rt_err bad = {0};
    const bool ended = r->ids[last] == p->map->teacher_end;
    const uint32_t from = begin_of(r, first), to = ended ? begin_of(r, last) : r->byte_end[last];
    RT_TRY(rt_prompt_read(p->teacher, r->text, from, r->ids, (size_t)first, &t->prompt, &ok, err));
    if (!ok) {
        *reject = RT_REJECT_PROMPT;
        goto out;
    }
    const bool answer = t->prompt.bare && opens_thought(p->student->tmpl);
    const char *prefix = answer ? "" : forced_for(p->student, &t->prompt, &forced);
    t->whole.len = 0;
    RT_TRY(rt_buf_append(&t->whole, prefix, forced, err));
    RT_TRY(rt_buf_append(&t->whole, r->text + from, to - from, err));
    RT_TRY(rt_buf_reserve(&t->whole, 1, err));
    snprintf(where, sizeof where, "line %ld", (long)r->source_line);
    if (answer)
        st = rt_prompt_read_answer(&t->prompt, p->student->tmpl, t->whole.data, t->whole.len, where, &t->rendered, &bad);
    else
        st = rt_template_completion(p->student->tmpl, t->prompt.m, t->prompt.n, t->whole.data, t->whole.len, where, &t->rendered, &bad);
    RT_TRY(of_one_sequence(st, &bad, reject, err));
    if (*reject != RT_REJECT_NONE)
        goto out;
    RT_TRY(take_rendered(p, ended, t, &begin, reject, err));
    if (*reject != RT_REJECT_NONE)
        goto out;
    RT_TRY(rt_alloc((size_t)last + 1, 1, "special tokens of a turn", &structural, err));
    structural[last] = ended;
    RT_TRY(teacher_units(r, first, last + 1, (uint32_t)forced, structural, t, err));
    RT_TRY(student_side(p, (int64_t)t->rendered.target_start, begin, t, reject, err));
out:
    rt_free(structural);
    return st;
}

static void reset(struct rt_retarget_text *t)
{
    t->text.len = t->target.len = t->teacher_end.len = t->student_end.len = t->whole.len = 0;
    t->enc.n = 0;
    t->earlier = false;
    t->teacher = t->student = (struct rt_side){0};
}

static bool is_plain(const struct rt_rows *rows)
{
    bool plain = true;
    for (int64_t i = 1; i < rows->n_tokens; i++)
        plain &= rows->loss_mask[i] == 1;
    return plain;
}

enum rt_status rt_retarget_text_templates(const struct rt_retarget_pair *pair, const struct rt_rows *rows, struct rt_err *err)
{
    if ((pair->teacher->tmpl != NULL && pair->student->tmpl != NULL) || is_plain(rows))
        return RT_OK;
    return rt_fail(err, RT_UNSUPPORTED, "line %ld is a conversation, and the %s (%s) has no chat template that is known: %s NAME says which one to take",
                   (long)rows->source_line, pair->teacher->tmpl == NULL ? "teacher" : "student",
                   pair->teacher->tmpl == NULL ? pair->teacher->path : pair->student->path, pair->teacher->tmpl == NULL ? "--teacher-template" : "--template");
}

enum rt_status rt_retarget_text_make(const struct rt_retarget_pair *pair, const struct rt_rows *rows, struct rt_retarget_text *t, enum rt_reject *reject,
                                     struct rt_err *err)
{
    enum rt_status st;
    int64_t last = rows->n_tokens - 1, first;
    reset(t);
    RT_TRY(check_text(pair, rows, reject, err));
    if (*reject != RT_REJECT_NONE)
        goto out;
    if (is_plain(rows)) {
        RT_TRY(make_plain(pair, rows, t, reject, err));
        goto out;
    }
    while (last > 0 && rows->loss_mask[last] == 0)
        last--;
    for (first = last; first > 1 && rows->loss_mask[first - 1] == 1;)
        first--;
    for (int64_t i = 1; i < first; i++)
        t->earlier |= rows->loss_mask[i] == 1;
    if (last == 0) {
        *reject = RT_REJECT_EMPTY;
        goto out;
    }
    RT_TRY(rt_retarget_text_templates(pair, rows, err));
    RT_TRY(make_turn(pair, rows, first, last, t, reject, err));
out:
    return st;
}

enum rt_status rt_retarget_text_same(const struct rt_retarget_pair *pair, const struct rt_rows *rows, struct rt_retarget_text *t, enum rt_reject *reject,
                                     struct rt_err *err)
{
    enum rt_status st = RT_OK;
    reset(t);
    *reject = rows->text == NULL || !reassembles(pair->teacher->tok, rows) ? RT_REJECT_BYTES : RT_REJECT_NONE;
    if (*reject != RT_REJECT_NONE)
        goto out;
    RT_TRY(teacher_units(rows, 0, rows->n_tokens, 0, NULL, t, err));
    t->student = t->teacher;
out:
    return st;
}
