#include "distill/retarget_prompt.h"

#include <string.h>

void rt_prompt_read_free(struct rt_prompt_read *p)
{
    rt_buf_free(&p->messages);
    rt_rendered_free(&p->rendered);
    *p = (struct rt_prompt_read){0};
}

struct text {
    const char *s;
    size_t n;
};

static bool take(struct text *t, const char *mark)
{
    const size_t n = strlen(mark);
    if (t->n < n || memcmp(t->s, mark, n) != 0)
        return false;
    t->s += n;
    t->n -= n;
    return true;
}

/* Place of mark in t; t.n where it is not. */
static size_t find(struct text t, const char *mark)
{
    const char *at = t.n > 0 ? memmem(t.s, t.n, mark, strlen(mark)) : NULL;
    return at != NULL ? (size_t)(at - t.s) : t.n;
}

static struct text cut(struct text *t, size_t n)
{
    const struct text head = {t->s, n};
    t->s += n;
    t->n -= n;
    return head;
}

static enum rt_status add(struct rt_prompt_read *p, const char *role, struct text content, struct rt_err *err)
{
    const struct rt_message m = {.role = role, .content = content.s, .content_len = content.n, .loss = -1};
    const enum rt_status st = rt_buf_append(&p->messages, &m, sizeof m, err);
    p->m = (const struct rt_message *)(const void *)p->messages.data;
    p->n = p->messages.len / sizeof m;
    return st;
}

enum rt_status rt_prompt_read_answer(struct rt_prompt_read *p, const struct rt_template *tmpl, const char *answer, size_t len, const char *where,
                                     struct rt_rendered *out, struct rt_err *err)
{
    enum rt_status st;
    const size_t n = p->n, skipped = p->messages.len / sizeof *p->m - n;
    RT_TRY(add(p, "assistant", (struct text){answer, len}, err));
    p->messages.len -= sizeof *p->m;
    p->m += skipped;
    p->n = n;
    RT_TRY(rt_template_render(tmpl, p->m, n + 1, where, out, err));
out:
    return st;
}

static void force(struct rt_prompt_read *p, struct text t)
{
    p->forced = t.s;
    p->forced_len = t.n;
}

/* system (<User> text | <Assistant> text EOS)* <Assistant> forced */
static enum rt_status read_deepseek(struct rt_prompt_read *p, struct text t, struct text end, bool tagged, bool *ok, struct rt_err *err)
{
    static const char user[] = "<｜User｜>", assistant[] = "<｜Assistant｜>";
    enum rt_status st = RT_OK;
    size_t u = find(t, user), a = find(t, assistant);
    const struct text system = cut(&t, u < a ? u : a);
    if (system.n > 0)
        RT_TRY(add(p, "system", system, err));
    while (t.n > 0) {
        const bool is_user = take(&t, user);
        if (!is_user)
            take(&t, assistant);
        u = find(t, user);
        a = find(t, assistant);
        const size_t n = u < a ? u : a;
        if (!is_user && n == t.n) {
            force(p, t);
            *ok = true;
            goto out;
        }
        struct text c = cut(&t, n);
        if (is_user) {
            RT_TRY(add(p, "user", c, err));
            continue;
        }
        if (end.n == 0 || c.n < end.n || memcmp(c.s + c.n - end.n, end.s, end.n) != 0)
            goto out;
        c.n -= end.n;
        if (tagged)
            take(&c, "</think>");
        RT_TRY(add(p, "assistant", c, err));
    }
out:
    return st;
}

/* (open role middle text close)* open assistant middle forced */
static enum rt_status read_marked(struct rt_prompt_read *p, struct text t, const char *open, const char *middle, const char *close, bool *ok,
                                  struct rt_err *err)
{
    static const char *const roles[] = {"system", "user", "assistant"};
    enum rt_status st = RT_OK;
    while (take(&t, open)) {
        const char *role = NULL;
        for (size_t i = 0; role == NULL && i < sizeof roles / sizeof roles[0]; i++)
            role = take(&t, roles[i]) ? roles[i] : NULL;
        if (role == NULL || !take(&t, middle))
            break;
        const size_t n = find(t, close);
        if (n == t.n) {
            force(p, t);
            *ok = strcmp(role, "assistant") == 0;
            break;
        }
        RT_TRY(add(p, role, cut(&t, n), err));
        take(&t, close);
    }
out:
    return st;
}

/* The template renders p's messages, and the forced opening, to these ids; or, where nothing is forced, any answer behind them as a conversation. */
static enum rt_status agrees(const struct rt_model_dir *model, struct rt_prompt_read *p, const uint32_t *ids, size_t n, bool *ok, struct rt_err *err)
{
    const struct rt_rendered *r = &p->rendered;
    struct rt_err bad = {0};
    *ok = p->bare = false;
    if (p->n == 0)
        return RT_OK;
    enum rt_status st = rt_template_completion(model->tmpl, p->m, p->n, p->forced, p->forced_len, "prompt", &p->rendered, &bad);
    *ok = st == RT_OK && r->target_start == n && memcmp(r->enc.ids, ids, n * sizeof *ids) == 0;
    if (st == RT_OK && !*ok && p->forced_len == 0 && rt_template_forced(model->tmpl, RT_THINKING_AUTO)[0] != '\0') {
        st = rt_prompt_read_answer(p, model->tmpl, "x", 1, "prompt", &p->rendered, &bad);
        *ok = p->bare = st == RT_OK && r->target_start == n && memcmp(r->enc.ids, ids, n * sizeof *ids) == 0;
    }
    return st == RT_NOMEM ? rt_fail(err, st, "%s", bad.msg) : RT_OK;
}

/* A first system message may be the template's own, whole (it is left out) or in front of the line's. */
static enum rt_status without_default(const struct rt_model_dir *model, struct rt_prompt_read *p, const uint32_t *ids, size_t n, bool *ok,
                                      struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (p->n < 2 || strcmp(p->m->role, "system") != 0)
        return RT_OK;
    p->m++;
    p->n--;
    RT_TRY(agrees(model, p, ids, n, ok, err));
    if (*ok)
        return RT_OK;
    p->m--;
    p->n++;
    RT_TRY(agrees(model, p, ids, n, ok, err));
    struct text t = {p->m->content, p->m->content_len};
    for (size_t at = find(t, "\n\n"); !*ok && at < t.n; at = find(t, "\n\n")) {
        cut(&t, at + 2);
        struct rt_message *const first = (struct rt_message *)(void *)p->messages.data; /* each time: it moves where a message is added */
        first->content = t.s;
        first->content_len = t.n;
        RT_TRY(agrees(model, p, ids, n, ok, err));
    }
out:
    return st;
}

enum rt_status rt_prompt_read(const struct rt_model_dir *model, const char *text, size_t len, const uint32_t *ids, size_t n_ids,
                              struct rt_prompt_read *p, bool *ok, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *family = rt_template_name(model->tmpl), *bytes;
    struct text t = {text, len}, end = {"", 0};
    const int64_t bos = rt_tokenizer_bos(model->tok);
    const uint32_t end_id = rt_template_end_id(model->tmpl);
    *ok = false;
    p->messages.len = 0;
    p->m = NULL;
    p->n = 0;
    p->forced = "";
    p->forced_len = 0;
    p->bare = false;
    if (end_id != UINT32_MAX)
        rt_tokenizer_bytes(model->tok, end_id, &end.s, &end.n);
    const bool marked = strcmp(family, "chatml") == 0 || strcmp(family, "qwen3") == 0; /* their BOS may be the mark itself */
    size_t n;
    if (!marked && bos >= 0 && n_ids > 0 && ids[0] == (uint32_t)bos && rt_tokenizer_bytes(model->tok, ids[0], &bytes, &n) && n <= t.n)
        cut(&t, n);
    if (marked && find(t, "<|im_start|>") < find(t, "\n"))
        cut(&t, find(t, "<|im_start|>"));
    if (strncmp(family, "deepseek", 8) == 0) {
        RT_TRY(read_deepseek(p, t, end, strcmp(family, "deepseek_v3_1") == 0, ok, err));
    } else if (marked) {
        RT_TRY(read_marked(p, t, "<|im_start|>", "\n", "<|im_end|>\n", ok, err));
    } else if (strcmp(family, "llama3") == 0) {
        RT_TRY(read_marked(p, t, "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", ok, err));
    } else {
        RT_TRY(add(p, "user", t, err));
        *ok = true;
    }
    if (!*ok)
        goto out;
    RT_TRY(agrees(model, p, ids, n_ids, ok, err));
    const bool plain = *ok, bare = p->bare;
    RT_TRY(without_default(model, p, ids, n_ids, ok, err));
    p->bare = *ok ? p->bare : bare;
    *ok |= plain;
out:
    return st;
}
