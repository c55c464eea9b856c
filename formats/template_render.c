/* Messages -> text, one function a family. */
#include <string.h>

#include "formats/template_internal.h"
#include "formats/unicode.h"

struct text {
    const char *s;
    size_t n;
};

struct writer {
    const struct rt_template *t;
    const struct rt_message *m;
    size_t n;
    bool keep_last;
    struct rt_buf *out;
    struct rt_spans *spans;
    size_t special;  /* end of the last special token written */
    struct rt_err *err;
};

#define LITERAL(s) ((struct text){s, sizeof(s) - 1})
static const struct text THINK = {"<think>", 7}, UNTHINK = {"</think>", 8};

static struct text content_of(const struct rt_message *m)
{
    return (struct text){m->content, m->content_len};
}

static bool is_role(const struct rt_message *m, const char *role)
{
    return strcmp(m->role, role) == 0;
}

static bool starts(struct text a, struct text b)
{
    return a.n >= b.n && memcmp(a.s, b.s, b.n) == 0;
}

/* First (or last) place of b in a; a.n where it is not there. */
static size_t find_first(struct text a, struct text b)
{
    for (size_t i = 0; i + b.n <= a.n; i++)
        if (memcmp(a.s + i, b.s, b.n) == 0)
            return i;
    return a.n;
}

static size_t find_last(struct text a, struct text b)
{
    for (size_t i = a.n >= b.n ? a.n - b.n + 1 : 0; i-- > 0;)
        if (memcmp(a.s + i, b.s, b.n) == 0)
            return i;
    return a.n;
}

static struct text skip(struct text a, size_t n)
{
    return (struct text){a.s + n, a.n - n};
}

static struct text strip_newlines(struct text a, bool left, bool right)
{
    while (left && a.n > 0 && a.s[0] == '\n')
        a = skip(a, 1);
    while (right && a.n > 0 && a.s[a.n - 1] == '\n')
        a.n--;
    return a;
}

/* Python's str.strip(): White_Space and the separators U+001C..U+001F. */
static bool is_strip(uint32_t c)
{
    return rt_is_space(c) || (c >= 0x1c && c <= 0x1f);
}

static struct text trim(struct text a)
{
    size_t n;
    while (a.n > 0 && is_strip(rt_utf8_next(a.s, a.n, &n)))
        a = skip(a, n);
    while (a.n > 0 && is_strip(rt_utf8_last(a.s, a.n, &n)))
        a.n -= n;
    return a;
}

static enum rt_status put(struct writer *w, struct text a)
{
    return rt_buf_append(w->out, a.s, a.n, w->err);
}

static enum rt_status special(struct writer *w, struct text a)
{
    const enum rt_status st = put(w, a);
    w->special = w->out->len;
    return st;
}

static enum rt_status put_bos(struct writer *w)
{
    return w->t->bos ? special(w, (struct text){w->t->bos_text.data, w->t->bos_text.len}) : RT_OK;
}

/* The end of an assistant turn whose targets begin at `begin`, with the special token before them at `cut`. */
static enum rt_status finish(struct writer *w, size_t i, size_t cut, size_t begin)
{
    const enum rt_status st = special(w, (struct text){w->t->end_text.data, w->t->end_text.len});
    const bool last = w->keep_last && i + 1 == w->n;
    if (st == RT_OK && (last ? w->m[i].loss != 0 : w->m[i].loss == 1))
        w->spans->at[w->spans->n++] = (struct rt_span){cut, begin, w->out->len};
    return st;
}

/* "<think>\n" thought "\n</think>\n\n" content */
static enum rt_status put_thought(struct writer *w, struct text thought, struct text content)
{
    enum rt_status st = RT_OK;
    RT_TRY(put(w, LITERAL("<think>\n")));
    RT_TRY(put(w, strip_newlines(thought, true, true)));
    RT_TRY(put(w, LITERAL("\n</think>\n\n")));
    RT_TRY(put(w, strip_newlines(content, true, false)));
out:
    return st;
}

static bool has_reasoning(const struct writer *w, size_t i)
{
    return w->m[i].reasoning != NULL && w->m[i].reasoning_len > 0;
}

static struct text reasoning_of(const struct writer *w, size_t i)
{
    return has_reasoning(w, i) ? (struct text){w->m[i].reasoning, w->m[i].reasoning_len} : (struct text){"", 0};
}

/* What the families without thoughts put for an assistant: its content, whole, with a thought only in the turn that is kept. */
static enum rt_status put_plain_answer(struct writer *w, size_t i, struct text content)
{
    if (w->keep_last && i + 1 == w->n && has_reasoning(w, i))
        return put_thought(w, reasoning_of(w, i), content);
    return put(w, content);
}

/* DeepSeek-R1: the content of assistant i. *begin moves behind an opening that the prompt forces. */
static enum rt_status put_r1_answer(struct writer *w, size_t i, size_t *begin)
{
    enum rt_status st = RT_OK;
    const struct rt_template *t = w->t;
    struct text c = content_of(&w->m[i]);
    const struct text forced = {t->forced, strlen(t->forced)};
    const bool kept = w->keep_last && i + 1 == w->n;
    if (!kept) {
        const size_t at = find_last(c, UNTHINK);
        RT_TRY(put(w, at < c.n ? skip(c, at + UNTHINK.n) : c));
        goto out;
    }
    if (!has_reasoning(w, i) && !starts(c, THINK) && find_first(c, UNTHINK) < c.n && forced.n > 0)
        RT_TRY(put(w, forced)); /* sampled behind a forced opening, which is not part of it */
    if (has_reasoning(w, i))
        RT_TRY(put_thought(w, reasoning_of(w, i), c));
    else
        RT_TRY(put(w, c));
    if (forced.n > 0) {
        const struct text made = {w->out->data + *begin, w->out->len - *begin};
        if (starts(made, forced))
            *begin += forced.n;
        else if (starts(made, THINK))
            *begin += THINK.n;
    }
out:
    return st;
}

/* DeepSeek-V3.1: the content of assistant i, with the tag that comes before it where a user spoke last. */
static enum rt_status put_v3_1_answer(struct writer *w, size_t i, bool tag, size_t *begin)
{
    enum rt_status st = RT_OK;
    struct text c = content_of(&w->m[i]);
    const bool kept = w->keep_last && i + 1 == w->n;
    if (!kept) {
        const size_t at = find_first(c, UNTHINK);
        if (tag)
            RT_TRY(put(w, UNTHINK));
        *begin = w->out->len;
        RT_TRY(put(w, at < c.n ? skip(c, at + UNTHINK.n) : c));
        goto out;
    }
    const bool opened = starts(c, THINK) || starts(c, UNTHINK);
    const struct text opening = has_reasoning(w, i) || starts(c, THINK) || (!opened && find_first(c, UNTHINK) < c.n) ? THINK : UNTHINK;
    if (has_reasoning(w, i) || tag || opened)
        RT_TRY(put(w, opening));
    *begin = w->out->len;
    if (has_reasoning(w, i)) {
        RT_TRY(put(w, reasoning_of(w, i)));
        RT_TRY(put(w, UNTHINK));
        RT_TRY(put(w, c));
    } else {
        RT_TRY(put(w, opened ? skip(c, opening.n) : c));
    }
out:
    return st;
}

static enum rt_status write_deepseek(struct writer *w)
{
    enum rt_status st = RT_OK;
    const enum rt_family family = w->t->family;
    struct text blank = LITERAL("");
    const struct rt_message *system = NULL;
    bool after_user = false;
    RT_TRY(put_bos(w));
    for (size_t i = 0; i < w->n; i++)
        if (is_role(&w->m[i], "system")) {
            if (w->t->join_systems) {
                RT_TRY(put(w, blank));
                RT_TRY(put(w, content_of(&w->m[i])));
            }
            blank = LITERAL("\n\n");
            system = &w->m[i];
        }
    if (system != NULL && !w->t->join_systems)
        RT_TRY(put(w, content_of(system)));
    for (size_t i = 0; i < w->n; i++) {
        if (is_role(&w->m[i], "user")) {
            RT_TRY(special(w, LITERAL("<｜User｜>")));
            RT_TRY(put(w, content_of(&w->m[i])));
            after_user = true;
        } else if (is_role(&w->m[i], "assistant")) {
            if (after_user || family != RT_DEEPSEEK_V3_1)
                RT_TRY(special(w, LITERAL("<｜Assistant｜>")));
            const size_t cut = w->special;
            size_t begin = w->out->len;
            if (family == RT_DEEPSEEK_V3_1)
                RT_TRY(put_v3_1_answer(w, i, after_user, &begin));
            else if (family == RT_DEEPSEEK_R1)
                RT_TRY(put_r1_answer(w, i, &begin));
            else
                RT_TRY(put_plain_answer(w, i, content_of(&w->m[i])));
            RT_TRY(finish(w, i, cut, begin));
            after_user = false;
        }
    }
out:
    return st;
}

/* Qwen3: index of the last question; answers behind it keep their thoughts. n - 1 without one. */
static size_t last_query(const struct writer *w)
{
    const struct text open = LITERAL("<tool_response>"), close = LITERAL("</tool_response>");
    for (size_t i = w->n; i-- > 0;) {
        const struct text c = content_of(&w->m[i]);
        const bool response = starts(c, open) && c.n >= close.n && starts(skip(c, c.n - close.n), close);
        if (is_role(&w->m[i], "user") && !response)
            return i;
    }
    return w->n - 1;
}

static enum rt_status put_qwen3_answer(struct writer *w, size_t i, size_t query, size_t *begin)
{
    enum rt_status st = RT_OK;
    struct text c = content_of(&w->m[i]), thought = reasoning_of(w, i);
    const size_t first = find_first(c, UNTHINK);
    if (w->m[i].reasoning == NULL && first < c.n) {
        thought = strip_newlines((struct text){c.s, first}, false, true);
        const size_t open = find_last(thought, THINK);
        if (open < thought.n)
            thought = skip(thought, open + THINK.n);
        thought = strip_newlines(thought, true, false);
        c = strip_newlines(skip(c, find_last(c, UNTHINK) + UNTHINK.n), true, false);
    }
    if (i > query && (i + 1 == w->n || thought.n > 0)) {
        RT_TRY(put_thought(w, thought, c));
        /* an empty thought is the template's, and a forced opening the prompt's: no targets */
        if (thought.n == 0)
            *begin += strlen("<think>\n\n</think>\n\n");
        else
            *begin += strlen(w->t->forced);
    } else {
        RT_TRY(put(w, c));
    }
out:
    return st;
}

static enum rt_status write_chatml(struct writer *w)
{
    enum rt_status st = RT_OK;
    const size_t query = last_query(w);
    RT_TRY(put_bos(w));
    if (w->t->system.data != NULL && !is_role(&w->m[0], "system")) {
        RT_TRY(special(w, LITERAL("<|im_start|>")));
        RT_TRY(put(w, LITERAL("system\n")));
        RT_TRY(put(w, (struct text){w->t->system.data, w->t->system.len}));
        RT_TRY(special(w, LITERAL("<|im_end|>")));
        RT_TRY(put(w, LITERAL("\n")));
    }
    for (size_t i = 0; i < w->n; i++) {
        const struct rt_message *m = &w->m[i];
        RT_TRY(special(w, LITERAL("<|im_start|>")));
        const size_t cut = w->special;
        RT_TRY(put(w, (struct text){m->role, strlen(m->role)}));
        RT_TRY(put(w, LITERAL("\n")));
        if (is_role(m, "assistant")) {
            size_t begin = w->out->len;
            if (w->t->family == RT_QWEN3)
                RT_TRY(put_qwen3_answer(w, i, query, &begin));
            else
                RT_TRY(put_plain_answer(w, i, content_of(m)));
            RT_TRY(finish(w, i, cut, begin));
        } else {
            RT_TRY(put(w, content_of(m)));
            RT_TRY(special(w, LITERAL("<|im_end|>")));
        }
        RT_TRY(put(w, LITERAL("\n")));
    }
out:
    return st;
}

static enum rt_status put_llama_header(struct writer *w, const char *role)
{
    enum rt_status st = RT_OK;
    RT_TRY(special(w, LITERAL("<|start_header_id|>")));
    RT_TRY(put(w, (struct text){role, strlen(role)}));
    RT_TRY(special(w, LITERAL("<|end_header_id|>")));
    RT_TRY(put(w, LITERAL("\n\n")));
out:
    return st;
}

static enum rt_status write_llama3(struct writer *w)
{
    enum rt_status st = RT_OK;
    size_t i = 0;
    RT_TRY(put_bos(w));
    if (w->t->system.data != NULL) {
        RT_TRY(put_llama_header(w, "system"));
        RT_TRY(put(w, (struct text){w->t->system.data, w->t->system.len}));
        if (is_role(&w->m[0], "system"))
            RT_TRY(put(w, trim(content_of(&w->m[i++]))));
        RT_TRY(special(w, LITERAL("<|eot_id|>")));
    }
    for (; i < w->n; i++) {
        const struct rt_message *m = &w->m[i];
        const struct text c = w->t->trim ? trim(content_of(m)) : content_of(m);
        RT_TRY(put_llama_header(w, m->role));
        const size_t cut = w->special, begin = w->out->len;
        if (is_role(m, "assistant")) {
            RT_TRY(put_plain_answer(w, i, c));
            RT_TRY(finish(w, i, cut, begin));
        } else {
            RT_TRY(put(w, c));
            RT_TRY(special(w, LITERAL("<|eot_id|>")));
        }
    }
out:
    return st;
}

static enum rt_status write_plain(struct writer *w)
{
    enum rt_status st = RT_OK;
    RT_TRY(put_bos(w));
    for (size_t i = 0; i < w->n; i++) {
        const size_t cut = w->special, begin = w->out->len;
        if (!is_role(&w->m[i], "assistant")) {
            RT_TRY(put(w, content_of(&w->m[i])));
        } else {
            RT_TRY(put_plain_answer(w, i, content_of(&w->m[i])));
            RT_TRY(finish(w, i, cut, begin));
        }
    }
out:
    return st;
}

enum rt_status rt_template_text(const struct rt_template *t, const struct rt_message *m, size_t n, bool keep_last,
                                const char *where, struct rt_buf *text, struct rt_spans *spans, struct rt_err *err)
{
    struct writer w = {.t = t, .m = m, .n = n, .keep_last = keep_last, .out = text, .spans = spans, .err = err};
    if (n == 0)
        return rt_fail(err, RT_FORMAT, "%s: there are no messages", where);
    for (size_t i = 0; i < n; i++) {
        if (is_role(&m[i], "tool"))
            return rt_fail(err, RT_UNSUPPORTED, "%s: message %zu is a tool's: tool turns are not rendered, leave such lines out", where, i);
        if (!is_role(&m[i], "system") && !is_role(&m[i], "user") && !is_role(&m[i], "assistant"))
            return rt_fail(err, RT_FORMAT, "%s: message %zu has the role '%.40s': expected system, user or assistant", where, i,
                           m[i].role);
    }
    switch (t->family) {
    case RT_DEEPSEEK_V3:
    case RT_DEEPSEEK_R1:
    case RT_DEEPSEEK_V3_1: return write_deepseek(&w);
    case RT_CHATML:
    case RT_QWEN3: return write_chatml(&w);
    case RT_LLAMA3: return write_llama3(&w);
    case RT_PLAIN: return write_plain(&w);
    }
    return rt_fail(err, RT_INTERNAL, "a template of an unknown family");
}

enum rt_status rt_template_opening(const struct rt_template *t, const struct rt_message *m, size_t n, struct rt_buf *text,
                                   struct rt_err *err)
{
    switch (t->family) {
    case RT_DEEPSEEK_V3:
    case RT_DEEPSEEK_R1: return rt_buf_puts(text, "<｜Assistant｜>", err);
    case RT_DEEPSEEK_V3_1:
        /* behind an answer the template opens nothing */
        for (size_t i = n; i-- > 0;)
            if (!is_role(&m[i], "system"))
                return is_role(&m[i], "user") ? rt_buf_puts(text, "<｜Assistant｜>", err) : RT_OK;
        return RT_OK;
    case RT_CHATML:
    case RT_QWEN3: return rt_buf_puts(text, "<|im_start|>assistant\n", err);
    case RT_LLAMA3: return rt_buf_puts(text, "<|start_header_id|>assistant<|end_header_id|>\n\n", err);
    case RT_PLAIN: return RT_OK;
    }
    return rt_fail(err, RT_INTERNAL, "a template of an unknown family");
}
