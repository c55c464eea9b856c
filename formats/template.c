/* Templates: recognised from their text; rendered text -> ids and targets. */
#include "formats/template.h"

#include <string.h>

#include "core/io.h"
#include "core/sha256.h"
#include "formats/json.h"
#include "formats/template_internal.h"

enum { TEMPLATE_MAX = 4 << 20 };

static const char *const family_name[] = {"deepseek_v3", "deepseek_r1", "deepseek_v3_1", "chatml", "qwen3", "llama3", "none"};

#define NAMES "deepseek_v3|deepseek_r1|deepseek_v3_1|chatml|qwen2_5|smollm2|qwen3|llama3|llama3_1|none"

/* What a name given by hand stands for. */
static const struct preset {
    const char *name, *forced, *system;
    enum rt_family family;
} presets[] = {
    {"deepseek_v3", "", NULL, RT_DEEPSEEK_V3},
    {"deepseek_r1", "<think>\n", NULL, RT_DEEPSEEK_R1},
    {"deepseek_v3_1", "", NULL, RT_DEEPSEEK_V3_1},
    {"chatml", "", NULL, RT_CHATML},
    {"qwen2_5", "", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", RT_CHATML},
    {"smollm2", "", "You are a helpful AI assistant named SmolLM, trained by Hugging Face", RT_CHATML},
    {"qwen3", "", NULL, RT_QWEN3},
    {"llama3", "", NULL, RT_LLAMA3},
    {"llama3_1", "", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", RT_LLAMA3},
    {"none", "", NULL, RT_PLAIN},
};

const char *rt_template_names(void)
{
    return NAMES;
}

const char *rt_template_name(const struct rt_template *t)
{
    return family_name[t->family];
}

const char *rt_template_sha256(const struct rt_template *t)
{
    return t->sha256;
}

uint32_t rt_template_end_id(const struct rt_template *t)
{
    return t->end_id;
}

bool rt_template_can(const struct rt_template *t, enum rt_thinking thinking)
{
    const bool always = t->forced[0] != '\0', either = t->family == RT_DEEPSEEK_V3_1 || (t->family == RT_QWEN3 && !always);
    return thinking == RT_THINKING_AUTO || either || (thinking == RT_THINKING_ON && always);
}

const char *rt_template_forced(const struct rt_template *t, enum rt_thinking thinking)
{
    if (t->family == RT_DEEPSEEK_V3_1)
        return thinking == RT_THINKING_ON ? "<think>" : "</think>";
    if (t->family == RT_QWEN3 && thinking == RT_THINKING_OFF && t->forced[0] == '\0')
        return "<think>\n\n</think>\n\n";
    return t->forced;
}

/* A template's text, searched for what tells the families apart. */
struct source {
    const char *s;
    size_t n;
};

static const char *find(struct source t, const char *what)
{
    return t.n > 0 ? memmem(t.s, t.n, what, strlen(what)) : NULL;
}

static bool has(struct source t, const char *what)
{
    return find(t, what) != NULL;
}

/* A newline at s, as Jinja writes it or itself: its bytes, 0 if there is none. */
static size_t newline_at(const char *s, const char *end)
{
    return s < end && s[0] == '\n' ? 1 : end - s >= 2 && s[0] == '\\' && s[1] == 'n' ? 2 : 0;
}

/* Appends the inside of a Jinja string literal. */
static enum rt_status unescape(const char *s, const char *end, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (; s < end; s++) {
        char c = *s;
        if (c == '\\' && s + 1 < end) {
            s++;
            c = *s == 'n' ? '\n' : *s == 't' ? '\t' : *s == 'r' ? '\r' : *s;
        }
        RT_TRY(rt_buf_append(out, &c, 1, err));
    }
    RT_TRY(rt_buf_puts(out, "", err));
out:
    return st;
}

/* ChatML: the system prompt that the template puts where the messages have none: a literal of its own. *known = false where
 * it is put together in another way. */
static enum rt_status read_default_system(struct rt_template *t, struct source text, bool *known, struct rt_err *err)
{
    static const char head[] = "<|im_start|>system", tail[] = "<|im_end|>";
    const char *const end = text.s + text.n;
    const char *at = text.s;
    while ((at = memmem(at, (size_t)(end - at), head, sizeof head - 1)) != NULL) {
        const char quote = at > text.s ? at[-1] : '\0';
        at += sizeof head - 1;
        const size_t n = newline_at(at, end);
        const char *stop = memmem(at, (size_t)(end - at), tail, sizeof tail - 1);
        if (n == 0 || stop == NULL || at[n] == quote)
            continue;
        for (const char *s = at + n; s < stop; s++) {
            if (*s == quote)
                *known = false;
            s += *s == '\\';
        }
        return *known ? unescape(at + n, stop, &t->system, err) : RT_OK;
    }
    return RT_OK;
}

/* Llama 3.1 and later: the two date lines, at the template's own date. False where they are not as known. */
static enum rt_status read_dates(struct rt_template *t, struct source text, bool *known, struct rt_err *err)
{
    static const char cutting[] = "Cutting Knowledge Date: ", date[] = "date_string = \"";
    enum rt_status st = RT_OK;
    const char *const end = text.s + text.n;
    const char *c = find(text, cutting), *d = find(text, date), *cend, *dend;
    *known = false;
    if (c == NULL || d == NULL || !has(text, "\"Today Date: \" + date_string"))
        return RT_OK;
    d += sizeof date - 1;
    for (cend = c; cend < end && newline_at(cend, end) == 0; cend++)
        ;
    dend = memchr(d, '"', (size_t)(end - d));
    if (dend == NULL || cend == end)
        return RT_OK;
    RT_TRY(rt_buf_append(&t->system, c, (size_t)(cend - c), err));
    RT_TRY(rt_buf_printf(&t->system, err, "\nToday Date: %.*s\n\n", (int)(dend - d), d));
    *known = true;
out:
    return st;
}

static bool recognise_deepseek(struct rt_template *t, struct source text)
{
    const char *forced = find(text, "<｜Assistant｜><think>");
    t->bos = has(text, "bos_token");
    t->join_systems = has(text, "is_first_sp");
    if (has(text, "DSML"))
        return false;
    if (has(text, "is_last_user") && has(text, "split('</think>', 1)[1]")) {
        t->family = RT_DEEPSEEK_V3_1;
    } else if (has(text, "split('</think>')[-1]")) {
        t->family = RT_DEEPSEEK_R1;
        if (forced != NULL) {
            forced += strlen("<｜Assistant｜><think>");
            strcpy(t->forced, newline_at(forced, text.s + text.n) > 0 ? "<think>\n" : "<think>");
        }
    } else {
        t->family = RT_DEEPSEEK_V3;
        return !has(text, "think>");
    }
    return true;
}

static enum rt_status recognise_chatml(struct rt_template *t, struct source text, bool *known, struct rt_err *err)
{
    /* what other dialects have and these families do not */
    static const char *const foreign[] = {"|trim", "| trim", "<|im_sep|>", "system_message", "loop.last and add_generation_prompt"};
    *known = has(text, "<|im_end|>") && has(text, "<|im_start|>assistant") &&
             (has(text, "'<|im_start|>' + message") || has(text, "\"<|im_start|>\" + message"));
    for (size_t i = 0; i < sizeof foreign / sizeof foreign[0]; i++)
        if (has(text, foreign[i]))
            *known = false;
    t->bos = has(text, "bos_token");
    if (!has(text, "think>")) {
        t->family = RT_CHATML;
        return *known ? read_default_system(t, text, known, err) : RT_OK;
    }
    t->family = RT_QWEN3;
    *known = *known && has(text, "last_query_index") && has(text, "reasoning_content") && has(text, "'\\n</think>\\n\\n'");
    if (has(text, "'<|im_start|>assistant\\n<think>\\n'"))
        strcpy(t->forced, "<think>\n");
    return RT_OK;
}

static enum rt_status recognise(struct rt_template *t, struct source text, bool *known, struct rt_err *err)
{
    *known = false;
    if (has(text, "<|start_header_id|>") && has(text, "<|end_header_id|>") && has(text, "<|eot_id|>")) {
        t->family = RT_LLAMA3;
        t->bos = has(text, "bos_token");
        t->trim = has(text, "|trim") || has(text, "| trim");
        if (has(text, "Cutting Knowledge Date"))
            return read_dates(t, text, known, err);
        *known = !has(text, "think") && !has(text, "system_message");
    } else if (has(text, "<｜User｜>") && has(text, "<｜Assistant｜>") && has(text, "<｜end▁of▁sentence｜>")) {
        *known = recognise_deepseek(t, text);
    } else if (has(text, "<|im_start|>")) {
        return recognise_chatml(t, text, known, err);
    }
    return RT_OK;
}

/* The special tokens of the family, by id. */
static enum rt_status bind(struct rt_template *t, const char *label, struct rt_err *err)
{
    static const char *const needed[][4] = {
        [RT_DEEPSEEK_V3] = {"<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"},
        [RT_DEEPSEEK_R1] = {"<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"},
        [RT_DEEPSEEK_V3_1] = {"<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"},
        [RT_CHATML] = {"<|im_end|>", "<|im_start|>"},
        [RT_QWEN3] = {"<|im_end|>", "<|im_start|>"},
        [RT_LLAMA3] = {"<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"},
        [RT_PLAIN] = {NULL},
    };
    enum rt_status st = RT_OK;
    const char *bytes;
    size_t len;
    uint32_t id;
    const int64_t bos = rt_tokenizer_bos(t->tok), eos = rt_tokenizer_eos(t->tok);
    t->end_id = UINT32_MAX;
    for (int i = 0; i < 4 && needed[t->family][i] != NULL; i++) {
        const char *token = needed[t->family][i];
        if (!rt_tokenizer_find(t->tok, token, strlen(token), &id) || !rt_tokenizer_is_added(t->tok, id))
            RT_FAIL(err, UNSUPPORTED, "%s: the template is of the family %s, but %s has no token %s; give another with --template", label,
                    family_name[t->family], rt_tokenizer_path(t->tok), token);
        if (i == 0) {
            t->end_id = id;
            RT_TRY(rt_buf_puts(&t->end_text, token, err));
        }
    }
    if (t->family == RT_PLAIN && eos >= 0 && rt_tokenizer_bytes(t->tok, (uint32_t)eos, &bytes, &len)) {
        t->end_id = (uint32_t)eos;
        RT_TRY(rt_buf_append(&t->end_text, bytes, len, err));
    }
    if (t->bos && bos >= 0 && rt_tokenizer_bytes(t->tok, (uint32_t)bos, &bytes, &len))
        RT_TRY(rt_buf_append(&t->bos_text, bytes, len, err));
    t->bos = t->bos_text.len > 0;
out:
    return st;
}

static void hash_text(struct rt_template *t, const char *text, size_t len)
{
    uint8_t digest[32];
    rt_sha256(text, len, digest);
    rt_hex(t->sha256, digest, sizeof digest);
}

enum rt_status rt_template_from_text(const char *text, size_t len, const char *label, struct rt_tokenizer *tok,
                                     struct rt_template **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_template *t = NULL;
    bool known;
    RT_TRY(rt_alloc(1, sizeof *t, "chat template", &t, err));
    t->tok = tok;
    hash_text(t, text, len);
    RT_TRY(recognise(t, (struct source){text, len}, &known, err));
    if (!known)
        RT_FAIL(err, UNSUPPORTED, "%s: the chat template is of no known family; if it renders like one of them, say --template NAME with one of "
                NAMES, label);
    RT_TRY(bind(t, label, err));
    *out = t;
    t = NULL;
out:
    rt_template_free(t);
    return st;
}

static enum rt_status from_name(const char *name, struct rt_tokenizer *tok, struct rt_template **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_template *t = NULL;
    const struct preset *p = NULL;
    for (size_t i = 0; i < sizeof presets / sizeof presets[0]; i++)
        if (strcmp(presets[i].name, name) == 0)
            p = &presets[i];
    if (p == NULL)
        RT_FAIL(err, USAGE, "there is no chat template '%.40s': expected one of " NAMES, name);
    RT_TRY(rt_alloc(1, sizeof *t, "chat template", &t, err));
    t->tok = tok;
    t->family = p->family;
    t->join_systems = t->trim = true;
    t->bos = p->family == RT_PLAIN ? rt_tokenizer_add_bos(tok) : p->family != RT_CHATML && p->family != RT_QWEN3;
    strcpy(t->forced, p->forced);
    if (p->system != NULL)
        RT_TRY(rt_buf_puts(&t->system, p->system, err));
    hash_text(t, name, strlen(name));
    RT_TRY(bind(t, name, err));
    *out = t;
    t = NULL;
out:
    rt_template_free(t);
    return st;
}

/* The member "chat_template" of a JSON file: a text, or a list of named ones, of which "default" counts. */
static enum rt_status from_json(const char *path, struct rt_tokenizer *tok, struct rt_template **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_json *root = NULL;
    size_t len;
    RT_TRY(rt_json_load(path, 16 << 20, &root, err));
    const struct rt_json *v = rt_json_get(root, "chat_template");
    const char *text = rt_json_as_string(v, &len);
    for (size_t i = 0; text == NULL && v != NULL && rt_json_typeof(v) == RT_JSON_ARRAY && i < rt_json_len(v); i++) {
        const char *name = rt_json_as_string(rt_json_get(rt_json_at(v, i), "name"), NULL);
        if (name != NULL && strcmp(name, "default") == 0)
            text = rt_json_as_string(rt_json_get(rt_json_at(v, i), "template"), &len);
    }
    if (text != NULL)
        RT_TRY(rt_template_from_text(text, len, path, tok, out, err));
out:
    rt_json_free(root);
    return st;
}

enum rt_status rt_template_load(const char *dir, const char *name, struct rt_tokenizer *tok, struct rt_template **out,
                                struct rt_err *err)
{
    static const char *const json[] = {"chat_template.json", "tokenizer_config.json"};
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    char path[4096];
    *out = NULL;
    if (name != NULL)
        return from_name(name, tok, out, err);
    if (!rt_path_is_dir(dir))
        return RT_OK;
    RT_TRY(rt_path_join(path, sizeof path, dir, "chat_template.jinja", err));
    if (rt_path_exists(path)) {
        RT_TRY(rt_file_read_all(path, TEMPLATE_MAX, &text, err));
        RT_TRY(rt_template_from_text(text.data, text.len, path, tok, out, err));
    }
    for (int i = 0; i < 2 && *out == NULL; i++) {
        RT_TRY(rt_path_join(path, sizeof path, dir, json[i], err));
        if (rt_path_exists(path))
            RT_TRY(from_json(path, tok, out, err));
    }
out:
    rt_buf_free(&text);
    return st;
}

void rt_template_free(struct rt_template *t)
{
    if (t == NULL)
        return;
    rt_buf_free(&t->system);
    rt_buf_free(&t->bos_text);
    rt_buf_free(&t->end_text);
    rt_free(t);
}

void rt_rendered_free(struct rt_rendered *r)
{
    rt_buf_free(&r->text);
    rt_encoding_free(&r->enc);
    rt_free(r->loss_mask);
    memset(r, 0, sizeof *r);
}

static void clear(struct rt_rendered *r)
{
    r->text.len = 0;
    r->enc.n = r->n_targets = r->target_start = 0;
}

/* The mask gets as long as the ids; new places are 0. */
static enum rt_status mask_room(struct rt_rendered *r, struct rt_err *err)
{
    if (r->mask_cap < r->enc.n || r->loss_mask == NULL) {
        uint8_t *mask;
        const enum rt_status st = rt_alloc(r->enc.n * 2 + 64, 1, "loss mask", &mask, err);
        if (st != RT_OK)
            return st;
        rt_free(r->loss_mask);
        r->loss_mask = mask;
        r->mask_cap = r->enc.n * 2 + 64;
    }
    memset(r->loss_mask, 0, r->mask_cap);
    return RT_OK;
}

static void target(struct rt_rendered *r, size_t i)
{
    r->loss_mask[i] = 1;
    if (r->n_targets++ == 0)
        r->target_start = i;
}

static enum rt_status encode(const struct rt_template *t, struct rt_rendered *r, size_t begin, size_t end, const char *where,
                             struct rt_err *err)
{
    const enum rt_status st = rt_tokenizer_encode(t->tok, end > begin ? r->text.data + begin : "", end - begin, &r->enc, err);
    if (st != RT_OK)
        rt_err_context(err, "%s", where);
    return st;
}

/* First id of each span, its end, and the byte (from the first id's start) at which targets begin. */
struct window {
    size_t first, end;
    uint64_t from;
};

enum rt_status rt_template_render(const struct rt_template *t, const struct rt_message *m, size_t n, const char *where,
                                  struct rt_rendered *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_spans spans = {0};
    struct window *window = NULL;
    size_t at = 0;
    clear(r);
    RT_TRY(rt_alloc(n, sizeof *spans.at, "turns", &spans.at, err));
    RT_TRY(rt_alloc(n, sizeof *window, "turns", &window, err));
    RT_TRY(rt_template_text(t, m, n, true, where, &r->text, &spans, err));
    /* Cutting behind special tokens changes no id: they are found in the text before anything else. */
    for (size_t i = 0; i < spans.n; i++) {
        const struct rt_span *s = &spans.at[i];
        RT_TRY(encode(t, r, at, s->cut, where, err));
        window[i].first = r->enc.n;
        window[i].from = s->begin - s->cut;
        RT_TRY(encode(t, r, s->cut, s->end, where, err));
        window[i].end = r->enc.n;
        at = s->end;
    }
    RT_TRY(encode(t, r, at, r->text.len, where, err));
    RT_TRY(mask_room(r, err));
    r->target_start = r->enc.n;
    for (size_t i = 0; i < spans.n; i++) {
        const uint32_t base = window[i].first > 0 ? r->enc.byte_end[window[i].first - 1] : 0;
        for (size_t k = window[i].first; k < window[i].end; k++)
            if ((k > 0 ? r->enc.byte_end[k - 1] : 0) >= base + window[i].from)
                target(r, k);
    }
out:
    rt_free(spans.at);
    rt_free(window);
    return st;
}

static enum rt_status render_prompt(const struct rt_template *t, const struct rt_message *m, size_t n, const char *forced,
                                    const char *where, struct rt_rendered *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_spans spans = {0};
    clear(r);
    RT_TRY(rt_alloc(n, sizeof *spans.at, "turns", &spans.at, err));
    RT_TRY(rt_template_text(t, m, n, false, where, &r->text, &spans, err));
    const size_t before = r->text.len;
    RT_TRY(rt_template_opening(t, m, n, &r->text, err));
    if (r->text.len > before)
        RT_TRY(rt_buf_puts(&r->text, forced, err));
    RT_TRY(encode(t, r, 0, r->text.len, where, err));
    RT_TRY(mask_room(r, err));
    r->target_start = r->enc.n;
out:
    rt_free(spans.at);
    return st;
}

enum rt_status rt_template_prompt(const struct rt_template *t, const struct rt_message *m, size_t n, enum rt_thinking thinking,
                                  const char *where, struct rt_rendered *r, struct rt_err *err)
{
    return render_prompt(t, m, n, rt_template_forced(t, thinking), where, r, err);
}

static bool begins(struct source c, const char *what)
{
    return c.n >= strlen(what) && memcmp(c.s, what, strlen(what)) == 0;
}

/* What the prompt of this completion ends with; *c loses it where it begins with it. */
static const char *take_forced(const struct rt_template *t, struct source *c)
{
    static const char think[] = "<think>", unthink[] = "</think>";
    const char *forced = rt_template_forced(t, RT_THINKING_AUTO), *off = rt_template_forced(t, RT_THINKING_OFF);
    size_t n = 0;
    if (t->family == RT_DEEPSEEK_V3_1) {
        if (begins(*c, unthink))
            forced = unthink;
        else if (has(*c, unthink) || begins(*c, think))
            forced = think;
        n = begins(*c, forced) ? strlen(forced) : 0;
    } else if (t->family == RT_QWEN3 && off[0] != '\0' && strcmp(off, forced) != 0 && begins(*c, off)) {
        forced = off;
        n = strlen(off);
    } else if (forced[0] != '\0' && begins(*c, think)) {
        n = strlen(think);
        if (strcmp(forced, "<think>\n") == 0 && c->n > n && c->s[n] == '\n')
            n++;
    }
    c->s += n;
    c->n -= n;
    return forced;
}

enum rt_status rt_template_completion(const struct rt_template *t, const struct rt_message *m, size_t n, const char *completion,
                                      size_t completion_len, const char *where, struct rt_rendered *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct source c = {completion, completion_len};
    RT_TRY(render_prompt(t, m, n, take_forced(t, &c), where, r, err));
    const size_t first = r->enc.n, at = r->text.len;
    RT_TRY(rt_buf_append(&r->text, c.s, c.n, err));
    RT_TRY(encode(t, r, at, r->text.len, where, err));
    if (t->end_id != UINT32_MAX && (r->enc.n == first || r->enc.ids[r->enc.n - 1] != t->end_id)) {
        RT_TRY(rt_encoding_push(&r->enc, t->tok, t->end_id, err));
        RT_TRY(rt_buf_append(&r->text, t->end_text.data, t->end_text.len, err));
    }
    RT_TRY(mask_room(r, err));
    for (size_t i = first; i < r->enc.n; i++)
        target(r, i);
    if (r->n_targets == 0)
        r->target_start = r->enc.n;
out:
    return st;
}
