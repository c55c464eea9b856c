#include "distill/trace_line.h"

#include <stdio.h>
#include <string.h>

#include "formats/dataset.h"

void rt_trace_format_free(struct rt_trace_format *f)
{
    rt_buf_free(&f->text);
    rt_rendered_free(&f->rendered);
    rt_encoding_free(&f->encoding);
}

static bool same_ids(const uint32_t *a, size_t n, const struct rt_generated *g)
{
    const size_t p = (size_t)g->n_prompt, m = (size_t)g->n;
    /* an unfinished completion gets an end token when it is read: that one aside */
    if (n != p + m && !(g->finish == RT_FINISH_LENGTH && n == p + m + 1))
        return false;
    return memcmp(a, g->prompt, p * sizeof *a) == 0 && memcmp(a + p, g->ids, m * sizeof *a) == 0;
}

/* "messages" without a last one of the assistant's, then the completion as one. */
static enum rt_status put_messages(struct rt_trace_format *f, const struct rt_json *prompt, const struct rt_generated *g, struct rt_json *to, bool *exact,
                                   struct rt_err *err)
{
    const struct rt_json *list = rt_json_get(prompt, "messages");
    struct rt_json *out, *reply;
    struct rt_message *m = NULL;
    enum rt_status st;
    size_t n = rt_json_len(list);
    const char *role = n > 0 ? rt_json_as_string(rt_json_get(rt_json_at(list, n - 1), "role"), NULL) : NULL;
    if (n > 1 && role != NULL && strcmp(role, "assistant") == 0)
        n--;
    RT_TRY(rt_json_set_array(to, "messages", &out, err));
    RT_TRY(rt_alloc(n + 1, sizeof *m, "messages", &m, err));
    for (size_t i = 0; i < n; i++) {
        const struct rt_json *v = rt_json_at(list, i);
        RT_TRY(rt_json_set_copy(out, NULL, v, err));
        m[i] = (struct rt_message){.role = rt_json_as_string(rt_json_get(v, "role"), NULL), .loss = -1};
        m[i].content = rt_json_as_string(rt_json_get(v, "content"), &m[i].content_len);
        m[i].reasoning = rt_json_as_string(rt_json_get(v, "reasoning_content"), &m[i].reasoning_len);
    }
    RT_TRY(rt_json_set_object(out, NULL, &reply, err));
    RT_TRY(rt_json_set_string(reply, "role", "assistant", err));
    RT_TRY(rt_json_set_string_n(reply, "content", f->text.data, f->text.len, err));
    m[n] = (struct rt_message){.role = "assistant", .content = f->text.data, .content_len = f->text.len, .loss = -1};
    RT_TRY(rt_template_render(f->tmpl, m, n + 1, "a trace", &f->rendered, err));
    *exact = same_ids(f->rendered.enc.ids, f->rendered.enc.n, g);
out:
    rt_free(m);
    return st;
}

static enum rt_status put_prompt(struct rt_trace_format *f, const struct rt_json *prompt, const struct rt_generated *g, struct rt_json *to, bool *exact,
                                 struct rt_err *err)
{
    struct rt_message m = {.role = "user", .loss = -1};
    enum rt_status st;
    m.content = rt_json_as_string(rt_json_get(prompt, "prompt"), &m.content_len);
    RT_TRY(rt_json_set_string_n(to, "prompt", m.content, m.content_len, err));
    RT_TRY(rt_json_set_string_n(to, "completion", f->text.data, f->text.len, err));
    RT_TRY(rt_template_completion(f->tmpl, &m, 1, f->text.data, f->text.len, "a trace", &f->rendered, err));
    *exact = same_ids(f->rendered.enc.ids, f->rendered.enc.n, g);
out:
    return st;
}

static enum rt_status put_text(struct rt_trace_format *f, const struct rt_json *prompt, const struct rt_generated *g, struct rt_json *to, bool *exact,
                               struct rt_err *err)
{
    struct rt_buf whole = {0};
    enum rt_status st;
    size_t n;
    const char *text = rt_json_as_string(rt_json_get(prompt, "text"), &n);
    RT_TRY(rt_buf_append(&whole, text, n, err));
    RT_TRY(rt_buf_append(&whole, f->text.data, f->text.len, err));
    RT_TRY(rt_json_set_string_n(to, "text", whole.data, whole.len, err));
    f->encoding.n = 0;
    RT_TRY(rt_tokenizer_encode(f->tok, whole.data, whole.len, &f->encoding, err));
    /* the reader puts BOS in front as it did for the prompt, and no end behind */
    const size_t bos = (size_t)(g->n_prompt > 0 && f->encoding.n > 0 && g->prompt[0] != f->encoding.ids[0]);
    const size_t p = (size_t)g->n_prompt - bos, m = (size_t)g->n - (g->finish == RT_FINISH_STOP && g->n > 0);
    *exact = f->encoding.n == p + m && memcmp(f->encoding.ids, g->prompt + bos, p * sizeof(uint32_t)) == 0 &&
             memcmp(f->encoding.ids + p, g->ids, m * sizeof(uint32_t)) == 0;
out:
    rt_buf_free(&whole);
    return st;
}

static enum rt_status put_ids(struct rt_trace_format *f, const struct rt_generated *g, struct rt_json *to, struct rt_err *err)
{
    struct rt_json *ids, *mask;
    enum rt_status st;
    RT_TRY(rt_json_set_array(to, "input_ids", &ids, err));
    RT_TRY(rt_json_set_array(to, "loss_mask", &mask, err));
    for (int64_t i = 0; i < g->n_prompt + g->n; i++) {
        RT_TRY(rt_json_set_int(ids, NULL, i < g->n_prompt ? g->prompt[i] : g->ids[i - g->n_prompt], err));
        RT_TRY(rt_json_set_int(mask, NULL, i >= g->n_prompt, err));
    }
    if (f->tok != NULL)
        RT_TRY(rt_json_set_string_n(to, "completion", f->text.data, f->text.len, err));
out:
    return st;
}

static enum rt_status put_id(const struct rt_json *prompt, const struct rt_generated *g, struct rt_json *to, struct rt_err *err)
{
    struct rt_buf id = {0};
    enum rt_status st;
    int64_t number;
    const struct rt_json *v = rt_json_get(prompt, "id");
    const char *s = rt_json_as_string(v, NULL);
    if (s != NULL)
        RT_TRY(rt_buf_printf(&id, err, "%s-%d", s, g->sample));
    else
        RT_TRY(rt_buf_printf(&id, err, "%lld-%d", v != NULL && rt_json_as_int(v, &number) ? (long long)number : (long long)g->line, g->sample));
    RT_TRY(rt_json_set_string_n(to, "id", id.data, id.len, err));
out:
    rt_buf_free(&id);
    return st;
}

static enum rt_status put_numbers(const struct rt_trace_format *f, int64_t index, const struct rt_generated *g, bool exact, struct rt_json *to,
                                  struct rt_err *err)
{
    struct rt_json *v;
    enum rt_status st;
    RT_TRY(rt_json_set_string(to, "finish_reason", g->finish == RT_FINISH_STOP ? "stop" : "length", err));
    RT_TRY(rt_json_set_int(to, "index", index, err));
    RT_TRY(rt_json_set_int(to, "line", g->line, err));
    RT_TRY(rt_json_set_int(to, "sample", g->sample, err));
    RT_TRY(rt_json_set_object(to, "tokens", &v, err));
    RT_TRY(rt_json_set_int(v, "prompt", g->n_prompt, err));
    RT_TRY(rt_json_set_int(v, "completion", g->n, err));
    RT_TRY(rt_json_set_bool(v, "exact", exact, err));
    RT_TRY(rt_json_set_double(to, "logprob", g->logprob, err));
    RT_TRY(rt_json_set_object(to, "sampling", &v, err));
    RT_TRY(rt_json_set_double(v, "temperature", f->temperature, err));
    RT_TRY(rt_json_set_double(v, "top_p", f->top_p, err));
    RT_TRY(rt_json_set_int(v, "top_k", f->top_k, err));
    RT_TRY(rt_json_set_int(v, "seed", f->seed, err));
    RT_TRY(rt_json_set_int(v, "max_tokens", f->max_tokens, err));
out:
    return st;
}

/* "answer" as it is; the verdict on it where it was asked for. */
static enum rt_status put_answer(struct rt_trace_format *f, const struct rt_json *prompt, struct rt_json *to, enum rt_verdict *verdict, bool *verified,
                                 struct rt_err *err)
{
    struct rt_buf text = {0};
    enum rt_status st = RT_OK;
    const struct rt_json *v = rt_json_get(prompt, "answer");
    *verified = false;
    if (v == NULL || rt_json_typeof(v) == RT_JSON_NULL)
        return RT_OK;
    RT_TRY(rt_json_set_copy(to, "answer", v, err));
    if (f->verify == RT_VERIFY_NONE || f->tok == NULL)
        goto out;
    size_t n;
    const char *s = rt_json_as_string(v, &n);
    if (s == NULL) {
        RT_TRY(rt_json_dump(v, 0, &text, err));
        s = text.data;
        n = text.len;
    }
    *verified = true;
    *verdict = rt_verify(f->verify, f->text.data, f->text.len, s, n, NULL, NULL);
    RT_TRY(rt_json_set_string(to, "verdict", rt_verdict_name(*verdict), err));
out:
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_trace_line(struct rt_trace_format *f, const struct rt_json *prompt, int64_t index, const struct rt_generated *g, struct rt_buf *out,
                             enum rt_verdict *verdict, bool *verified, struct rt_err *err)
{
    struct rt_json *to = NULL;
    enum rt_status st;
    bool exact = false, chat = rt_json_get(prompt, "input_ids") == NULL && (rt_json_get(prompt, "messages") != NULL || rt_json_get(prompt, "prompt") != NULL);
    if (f->tok != NULL)
        RT_TRY(rt_generated_text(g, f->tok, chat ? f->tmpl : NULL, f->thinking, &f->text, NULL, err));
    RT_TRY(rt_json_new_object(&to, err));
    RT_TRY(put_id(prompt, g, to, err));
    if (rt_json_get(prompt, "input_ids") != NULL) {
        exact = true;
        RT_TRY(put_ids(f, g, to, err));
    } else if (rt_json_get(prompt, "messages") != NULL) {
        RT_TRY(put_messages(f, prompt, g, to, &exact, err));
    } else if (chat) {
        RT_TRY(put_prompt(f, prompt, g, to, &exact, err));
    } else {
        RT_TRY(put_text(f, prompt, g, to, &exact, err));
    }
    RT_TRY(put_answer(f, prompt, to, verdict, verified, err));
    RT_TRY(put_numbers(f, index, g, exact, to, err));
    RT_TRY(rt_dataset_copy_extra(prompt, to, err));
    RT_TRY(rt_json_dump(to, 0, out, err));
out:
    rt_json_free(to);
    return st;
}
