/* One input line -> ids and targets. */
#include <string.h>

#include "formats/dataset_internal.h"
#include "formats/unicode.h"

static enum rt_status check_nfc(struct rt_dataset *d, const char *s, size_t len, bool *not_nfc, struct rt_err *err)
{
    bool yes = true;
    const enum rt_status st = *not_nfc ? RT_OK : rt_is_nfc(s, len, &yes, err);
    *not_nfc |= !yes;
    if (st != RT_OK)
        rt_err_context(err, "%s", d->where);
    return st;
}

static enum rt_status read_answer(struct rt_dataset *d, const char **answer, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_json *v = rt_json_get(d->json, "answer");
    *answer = NULL;
    if (v == NULL || rt_json_typeof(v) == RT_JSON_NULL)
        return RT_OK;
    *answer = rt_json_as_string(v, NULL);
    if (*answer == NULL) {
        d->answer.len = 0;
        RT_TRY(rt_json_dump(v, 0, &d->answer, err));
        RT_TRY(rt_buf_puts(&d->answer, "", err));
        *answer = d->answer.data;
    }
out:
    return st;
}

static enum rt_status need_text(const struct rt_dataset *d, bool template, const char *form, struct rt_err *err)
{
    if (d->opt.tok == NULL)
        return rt_fail(err, RT_UNSUPPORTED, "%s: a line with \"%s\" needs a tokenizer: the model directory has no tokenizer.json; copy one "
                       "there, or for train, eval and experiment name another directory with --tokenizer DIR", d->where, form);
    if (template && d->opt.tmpl == NULL)
        return rt_fail(err, RT_UNSUPPORTED, "%s: a line with \"%s\" needs a chat template: the model has none; give one with --template %s",
                       d->where, form, rt_template_names());
    return RT_OK;
}

static enum rt_status text_member(struct rt_dataset *d, const struct rt_json *obj, const char *key, const char **s, size_t *len,
                                  bool *not_nfc, struct rt_err *err)
{
    const struct rt_json *v = rt_json_get(obj, key);
    *s = rt_json_as_string(v, len);
    if (*s == NULL)
        return rt_fail(err, RT_FORMAT, "%s: \"%s\" %s: expected a text", d->where, key, v == NULL ? "is missing" : "is no text");
    return check_nfc(d, *s, *len, not_nfc, err);
}

static enum rt_status read_message(struct rt_dataset *d, const struct rt_json *v, struct rt_message *m, bool *not_nfc,
                                   struct rt_err *err)
{
    enum rt_status st = RT_OK;
    size_t role_len;
    bool loss, ignored = true;
    memset(m, 0, sizeof *m);
    if (rt_json_typeof(v) != RT_JSON_OBJECT)
        RT_FAIL(err, FORMAT, "%s: a message is no object with \"role\" and \"content\"", d->where);
    if (rt_json_len(rt_json_get(v, "tool_calls")) > 0)
        RT_FAIL(err, UNSUPPORTED, "%s: a message has \"tool_calls\": tool turns are not rendered, leave such lines out", d->where);
    RT_TRY(text_member(d, v, "role", &m->role, &role_len, &ignored, err));
    RT_TRY(text_member(d, v, "content", &m->content, &m->content_len, not_nfc, err));
    const struct rt_json *reasoning = rt_json_get(v, "reasoning_content");
    if (reasoning != NULL && rt_json_typeof(reasoning) != RT_JSON_NULL)
        RT_TRY(text_member(d, v, "reasoning_content", &m->reasoning, &m->reasoning_len, not_nfc, err));
    m->loss = -1;
    if (rt_json_get(v, "loss") != NULL) {
        if (!rt_json_as_bool(rt_json_get(v, "loss"), &loss))
            RT_FAIL(err, FORMAT, "%s: the \"loss\" of a message is neither true nor false", d->where);
        m->loss = loss;
    }
out:
    return st;
}

static enum rt_status read_messages(struct rt_dataset *d, size_t *n, bool *not_nfc, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_json *list = rt_json_get(d->json, "messages");
    *n = rt_json_len(list);
    if (rt_json_typeof(list) != RT_JSON_ARRAY || *n == 0)
        RT_FAIL(err, FORMAT, "%s: \"messages\" is no list of messages", d->where);
    if (rt_json_len(rt_json_get(d->json, "tools")) > 0)
        RT_FAIL(err, UNSUPPORTED, "%s: \"tools\" are not rendered, leave such lines out", d->where);
    if (*n > d->message_cap) {
        rt_free(d->message);
        d->message = NULL;
        d->message_cap = 0;
        RT_TRY(rt_alloc(*n, sizeof *d->message, "messages", &d->message, err));
        d->message_cap = *n;
    }
    for (size_t i = 0; i < *n; i++)
        RT_TRY(read_message(d, rt_json_at(list, i), &d->message[i], not_nfc, err));
out:
    return st;
}

static const char *last_user(const struct rt_message *m, size_t n)
{
    while (n-- > 0)
        if (strcmp(m[n].role, "user") == 0)
            return m[n].content;
    return NULL;
}

/* The ids of a line that brings its own: into d->rendered. */
static enum rt_status read_ids(struct rt_dataset *d, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rendered *r = &d->rendered;
    const struct rt_json *list = rt_json_get(d->json, "input_ids"), *mask = rt_json_get(d->json, "loss_mask");
    const size_t n = rt_json_len(list);
    const bool masked = mask != NULL && rt_json_typeof(mask) != RT_JSON_NULL;
    if (rt_json_typeof(list) != RT_JSON_ARRAY || n == 0)
        RT_FAIL(err, FORMAT, "%s: \"input_ids\" is no list of ids", d->where);
    if (masked && (rt_json_typeof(mask) != RT_JSON_ARRAY || rt_json_len(mask) != n))
        RT_FAIL(err, FORMAT, "%s: \"loss_mask\" is no list of %zu, as long as \"input_ids\"", d->where, n);
    if (r->enc.cap < n) {
        rt_encoding_free(&r->enc);
        RT_TRY(rt_alloc(n, sizeof *r->enc.ids, "ids", &r->enc.ids, err));
        RT_TRY(rt_alloc(n, sizeof *r->enc.byte_end, "ids", &r->enc.byte_end, err));
        r->enc.cap = n;
    }
    if (r->mask_cap < n) {
        rt_free(r->loss_mask);
        r->loss_mask = NULL;
        r->mask_cap = 0;
        RT_TRY(rt_alloc(n, 1, "loss mask", &r->loss_mask, err));
        r->mask_cap = n;
    }
    for (size_t i = 0; i < n; i++) {
        int64_t id, on = 1;
        bool flag;
        if (!rt_json_as_int(rt_json_at(list, i), &id) || id < 0 || id >= d->opt.n_ids)
            RT_FAIL(err, FORMAT, "%s: item %zu of \"input_ids\" is no id in 0..%lld", d->where, i, (long long)d->opt.n_ids - 1);
        if (masked && rt_json_as_bool(rt_json_at(mask, i), &flag))
            on = flag;
        else if (masked && (!rt_json_as_int(rt_json_at(mask, i), &on) || on < 0 || on > 1))
            RT_FAIL(err, FORMAT, "%s: item %zu of \"loss_mask\" is neither 0 nor 1", d->where, i);
        r->enc.ids[i] = (uint32_t)id;
        r->loss_mask[i] = (uint8_t)on;
    }
    r->enc.n = n;
    d->whole.has_completion = masked;
out:
    return st;
}

/* BOS where the tokenizer adds it and the text does not bring it, then the text; everything a target. */
static enum rt_status read_text(struct rt_dataset *d, const char *text, size_t len, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rendered *r = &d->rendered;
    struct rt_tokenizer *tok = d->opt.tok;
    const char *bos;
    size_t n;
    r->enc.n = 0;
    if (rt_tokenizer_add_bos(tok) && rt_tokenizer_bytes(tok, (uint32_t)rt_tokenizer_bos(tok), &bos, &n) &&
        !(len >= n && memcmp(text, bos, n) == 0))
        RT_TRY(rt_encoding_push(&r->enc, tok, (uint32_t)rt_tokenizer_bos(tok), err));
    st = rt_tokenizer_encode(tok, text, len, &r->enc, err);
    if (st != RT_OK)
        rt_err_context(err, "%s", d->where);
    RT_TRY(st);
    if (r->mask_cap < r->enc.n || r->loss_mask == NULL) {
        rt_free(r->loss_mask);
        r->loss_mask = NULL;
        r->mask_cap = 0;
        RT_TRY(rt_alloc(r->enc.n + 1, 1, "loss mask", &r->loss_mask, err));
        r->mask_cap = r->enc.n + 1;
    }
    memset(r->loss_mask, 1, r->enc.n);
out:
    return st;
}

static bool has(const struct rt_dataset *d, const char *key)
{
    return rt_json_get(d->json, key) != NULL;
}

static enum rt_status no_form(const struct rt_dataset *d, struct rt_err *err)
{
    return rt_fail(err, RT_FORMAT, "%s: expected an object with \"prompt\" and \"completion\", \"messages\", \"text\" or \"input_ids\"",
                   d->where);
}

/* A completion that was cut off has not ended: the end that the template puts behind it is nothing to learn. */
static void spare_false_end(struct rt_dataset *d)
{
    struct rt_rendered *r = &d->rendered;
    const char *finish = rt_json_as_string(rt_json_get(d->json, "finish_reason"), NULL);
    if (finish == NULL)
        finish = rt_json_as_string(rt_json_get(rt_json_get(d->json, "sampling"), "finish_reason"), NULL);
    if (finish == NULL || strcmp(finish, "length") != 0)
        return;
    for (size_t i = r->enc.n; i-- > 0;)
        if (r->loss_mask[i]) {
            r->loss_mask[i] = r->enc.ids[i] != rt_template_end_id(d->opt.tmpl);
            return;
        }
}

enum rt_status rt_dataset_sample(struct rt_dataset *d, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_sample *s = &d->whole;
    struct rt_rendered *r = &d->rendered;
    size_t n = 0, len = 0;
    memset(s, 0, sizeof *s);
    s->json = d->json;
    s->line = d->line;
    RT_TRY(read_answer(d, &s->answer, err));
    if (has(d, "input_ids")) {
        RT_TRY(read_ids(d, err));
    } else if (has(d, "messages")) {
        RT_TRY(need_text(d, true, "messages", err));
        RT_TRY(read_messages(d, &n, &s->not_nfc, err));
        if (strcmp(d->message[n - 1].role, "assistant") != 0)
            RT_FAIL(err, FORMAT, "%s: the last of \"messages\" is not the assistant's: there is nothing to learn from it", d->where);
        RT_TRY(rt_template_render(d->opt.tmpl, d->message, n, d->where, r, err));
        if (d->message[n - 1].loss != 0)
            spare_false_end(d);
        s->prompt = last_user(d->message, n);
        s->completion = d->message[n - 1].content;
        s->has_completion = true;
    } else if (has(d, "prompt")) {
        struct rt_message m = {.role = "user", .loss = -1};
        RT_TRY(need_text(d, true, "prompt", err));
        RT_TRY(text_member(d, d->json, "prompt", &m.content, &m.content_len, &s->not_nfc, err));
        RT_TRY(text_member(d, d->json, "completion", &s->completion, &len, &s->not_nfc, err));
        RT_TRY(rt_template_completion(d->opt.tmpl, &m, 1, s->completion, len, d->where, r, err));
        spare_false_end(d);
        s->prompt = m.content;
        s->has_completion = true;
    } else if (has(d, "text")) {
        const char *text;
        RT_TRY(need_text(d, false, "text", err));
        RT_TRY(text_member(d, d->json, "text", &text, &len, &s->not_nfc, err));
        RT_TRY(read_text(d, text, len, err));
    } else {
        RT_TRY(no_form(d, err));
    }
    s->ids = r->enc.ids;
    s->loss_mask = r->loss_mask;
    s->n = (int64_t)r->enc.n;
out:
    return st;
}

enum rt_status rt_dataset_prompt(struct rt_dataset *d, struct rt_prompt *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rendered *r = &d->rendered;
    size_t n = 0, len = 0;
    struct rt_prompt p = {.json = d->json, .line = d->line};
    RT_TRY(read_answer(d, &p.answer, err));
    if (has(d, "input_ids")) {
        RT_TRY(read_ids(d, err));
    } else if (has(d, "messages")) {
        RT_TRY(need_text(d, true, "messages", err));
        RT_TRY(read_messages(d, &n, &p.not_nfc, err));
        if (n > 1 && strcmp(d->message[n - 1].role, "assistant") == 0)
            n--;
        RT_TRY(rt_template_prompt(d->opt.tmpl, d->message, n, d->opt.thinking, d->where, r, err));
        p.text = last_user(d->message, n);
    } else if (has(d, "prompt")) {
        struct rt_message m = {.role = "user", .loss = -1};
        RT_TRY(need_text(d, true, "prompt", err));
        RT_TRY(text_member(d, d->json, "prompt", &m.content, &m.content_len, &p.not_nfc, err));
        RT_TRY(rt_template_prompt(d->opt.tmpl, &m, 1, d->opt.thinking, d->where, r, err));
        p.text = m.content;
    } else if (has(d, "text")) {
        RT_TRY(need_text(d, false, "text", err));
        RT_TRY(text_member(d, d->json, "text", &p.text, &len, &p.not_nfc, err));
        RT_TRY(read_text(d, p.text, len, err));
    } else {
        RT_TRY(no_form(d, err));
    }
    p.ids = r->enc.ids;
    p.n = (int64_t)r->enc.n;
    *out = p;
out:
    return st;
}
