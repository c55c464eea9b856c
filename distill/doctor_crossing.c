#include <inttypes.h>
#include <string.h>

#include "distill/doctor.h"
#include "distill/overlap.h"
#include "formats/dataset.h"
#include "formats/unicode.h"

/* Below this share of a student's tokens, soft labels would say little of the text. */
static const double enough = 0.8;

/* The targets' text of one line, BOS and the end of the turn left out. A line is left out for all of its text, as the teacher's tokens spell it. */
static enum rt_status add_targets(const struct rt_model_dir *m, const struct rt_sample *s, struct rt_overlap *o, struct rt_buf *text, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const uint32_t end = m->tmpl != NULL ? rt_template_end_id(m->tmpl) : UINT32_MAX;
    const int64_t bos = rt_tokenizer_bos(m->tok);
    bool nfc = false;
    text->len = 0;
    RT_TRY(rt_tokenizer_decode(m->tok, s->ids, (size_t)s->n, false, text, err));
    if (rt_utf8_prefix(text->data, text->len) == text->len)
        RT_TRY(rt_is_nfc(text->data, text->len, &nfc, err));
    if (!nfc) {
        o->c.left_out++;
        goto out;
    }
    text->len = 0;
    for (int64_t i = 0; i < s->n; i++)
        if (s->loss_mask[i] && s->ids[i] != end && (i > 0 || (int64_t)s->ids[i] != bos))
            RT_TRY(rt_tokenizer_decode(m->tok, &s->ids[i], 1, false, text, err));
    if (text->len > 0)
        RT_TRY(rt_overlap_add(o, text->data, text->len, err));
out:
    return st;
}

static enum rt_status add_lines(struct rt_doctor *d, struct rt_overlap *o, struct rt_err *err)
{
    enum rt_status st;
    struct rt_dataset *set = NULL;
    struct rt_sample s;
    struct rt_buf text = {0};
    bool end = false;
    const struct rt_dataset_options options = {.tok = d->tm.tok, .tmpl = d->tm.tmpl};
    RT_TRY(rt_dataset_open(d->data, &options, &set, err));
    for (int64_t n = 0; d->lines == 0 || n < d->lines; n++) {
        RT_TRY(rt_dataset_next(set, &s, &end, err));
        if (end)
            break;
        if (rt_json_get(s.json, "input_ids") == NULL)
            RT_TRY(add_targets(&d->tm, &s, o, &text, err));
    }
out:
    rt_buf_free(&text);
    rt_dataset_close(set);
    return st;
}

/* "'boxed' 905, 'x' 3"; tokens that are no text are left out. */
static void commonest(const struct rt_overlap *o, char out[160])
{
    uint32_t ids[RT_OVERLAP_TOP];
    const int n = rt_overlap_top(o, ids);
    size_t at = 0, len;
    const char *bytes;
    out[0] = '\0';
    for (int i = 0; i < n; i++)
        if (rt_tokenizer_bytes(o->student, ids[i], &bytes, &len) && len < 24 && rt_utf8_prefix(bytes, len) == len && memchr(bytes, '\n', len) == NULL &&
            at + len + 24 < 160)
            at += (size_t)snprintf(out + at, 160 - at, "%s'%.*s' %" PRIu32, at > 0 ? ", " : "", (int)len, bytes, o->crossing[ids[i]]);
}

static enum rt_status report(struct rt_doctor *d, const struct rt_overlap *o, struct rt_err *err)
{
    const struct rt_overlap_counts *c = &o->c;
    const int64_t lines = c->texts + c->left_out;
    const bool many = (double)c->left_out > (1 - enough) * (double)lines;
    char names[160], lost[160] = "";
    if (c->texts == 0)
        return rt_check_add(&d->checks, err, RT_CHECK_WARN, "pair.crossing", "`retort retarget` would leave out all of %" PRId64 " lines: their text is not in NFC, or a tokenizer "
                            "changes it", lines);
    const double n = (double)c->student, rows = (double)(rt_overlap_exact(c) - c->blank_exact) / n;
    commonest(o, names);
    if (c->left_out > 0)
        snprintf(lost, sizeof lost, "; %" PRId64 " of %" PRId64 " lines are left out: not in NFC, or changed by a tokenizer", c->left_out, lines);
    return rt_check_add(&d->checks, err, rows >= enough && !many ? RT_CHECK_PASS : RT_CHECK_WARN, "pair.crossing",
                        "of %" PRId64 " target tokens of the student bytes decide the rows of %.1f %% after `retort retarget`: they lie inside one teacher token (%.1f %% of all are "
                        "one); %.1f %% reach over the end of one, %.1f %% are white space alone: labels alone%s%s%s", c->student, 100 * rows,
                        100 * (double)c->kind[RT_PLACE_WHOLE] / n, 100 * (double)c->kind[RT_PLACE_CROSSING] / n, 100 * (double)c->blank / n,
                        lost, names[0] != '\0' ? "; commonest to cross: " : "", names);
}

enum rt_status rt_doctor_crossing(struct rt_doctor *d, struct rt_err *err)
{
    enum rt_status st;
    struct rt_overlap o = {0};
    struct rt_err bad = {0};
    if (d->tm.tok == NULL || d->sm.tok == NULL || strcmp(rt_tokenizer_sha256(d->tm.tok), rt_tokenizer_sha256(d->sm.tok)) == 0)
        return RT_OK;
    RT_TRY(rt_overlap_open(&o, d->tm.tok, d->sm.tok, err));
    st = add_lines(d, &o, &bad);
    if (st == RT_NOMEM)
        RT_TRY(rt_fail(err, st, "%s", bad.msg));
    if (st != RT_OK || o.c.texts + o.c.left_out == 0) { /* data.lines has said why */
        st = RT_OK;
        goto out;
    }
    RT_TRY(report(d, &o, err));
out:
    rt_overlap_close(&o);
    return st;
}
