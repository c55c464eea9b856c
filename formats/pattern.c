#include "formats/pattern.h"

#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* The patterns of the known families take a few steps a character; one search walks at most a whole text. */
enum { STEPS_BASE = 1000000, STEPS_A_BYTE = 16, JIT_STACK_MIN = 32 << 10, JIT_STACK_MAX = 4 << 20, NESTING = 64 };

struct rt_pattern {
    pcre2_code *code;
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    char head[81]; /* for messages */
};

struct reader {
    const char *s;
    size_t len, at;
    int depth;
    struct rt_err *err;
};

static bool is_alnum(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static bool is_hex(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

static char peek(const struct reader *r, size_t ahead)
{
    return r->len - r->at > ahead ? r->s[r->at + ahead] : '\0';
}

static enum rt_status refuse(struct reader *r, const char *what)
{
    return rt_fail(r->err, RT_UNSUPPORTED, "the pattern '%.*s' has %s at byte %zu, which is not known to mean the same here",
                   (int)(r->len < 120 ? r->len : 120), r->s, what, r->at);
}

static enum rt_status put(struct reader *r, struct rt_buf *out, const char *s, size_t n)
{
    return rt_buf_append(out, s, n, r->err);
}

static enum rt_status put_text(struct reader *r, struct rt_buf *out, const char *s)
{
    return put(r, out, s, strlen(s));
}

/* At a backslash: an escape, inside a class or outside. */
static enum rt_status escape(struct reader *r, struct rt_buf *out)
{
    enum rt_status st = RT_OK;
    const char c = peek(r, 1);
    size_t n = 2;
    if (r->len - r->at < 2)
        return refuse(r, "a backslash at its end");
    switch (c) {
    case 's': RT_TRY(put_text(r, out, "\\p{White_Space}")); break;
    case 'S': RT_TRY(put_text(r, out, "\\P{White_Space}")); break;
    case 'd': RT_TRY(put_text(r, out, "\\p{Nd}")); break;
    case 'D': RT_TRY(put_text(r, out, "\\P{Nd}")); break;
    case 'v': RT_TRY(put_text(r, out, "\\x0b")); break;
    case 'r': case 'n': case 't': case 'f': case 'a': case 'e':
        RT_TRY(put(r, out, r->s + r->at, 2));
        break;
    case 'p': case 'P':
        if (peek(r, 2) != '{')
            return refuse(r, "a property without braces");
        for (n = 3; peek(r, n) != '}'; n++)
            if (!is_alnum(peek(r, n)) && !strchr("^_ -", peek(r, n) ? peek(r, n) : '!'))
                return refuse(r, "a property that is not closed");
        n++;
        RT_TRY(put(r, out, r->s + r->at, n));
        break;
    case 'x':
        if (peek(r, 2) == '{') {
            for (n = 3; is_hex(peek(r, n)); n++)
                ;
            if (n == 3 || peek(r, n) != '}')
                return refuse(r, "a bad \\x");
            n++;
        } else if (is_hex(peek(r, 2)) && is_hex(peek(r, 3))) {
            n = 4;
        } else {
            return refuse(r, "a bad \\x");
        }
        RT_TRY(put(r, out, r->s + r->at, n));
        break;
    case 'u':
        for (n = 2; n < 6; n++)
            if (!is_hex(peek(r, n)))
                return refuse(r, "a bad \\u");
        RT_TRY(put_text(r, out, "\\x{"));
        RT_TRY(put(r, out, r->s + r->at + 2, 4));
        RT_TRY(put_text(r, out, "}"));
        break;
    default:
        if (is_alnum(c))
            return refuse(r, "an escape");
        /* a character beyond ASCII needs no backslash */
        RT_TRY(put(r, out, r->s + r->at + ((unsigned char)c < 0x80 ? 0 : 1), (unsigned char)c < 0x80 ? 2 : 1));
    }
    r->at += n;
out:
    return st;
}

/* At '[': the class with its brackets, as one atom. */
static enum rt_status class(struct reader *r, struct rt_buf *out)
{
    enum rt_status st = RT_OK;
    struct rt_buf left = {0}, right = {0};
    bool first = true, negated = false;
    if (++r->depth > NESTING) {
        st = refuse(r, "classes nested too deep");
        goto out;
    }
    RT_TRY(put_text(r, &left, "["));
    r->at++;
    if (peek(r, 0) == '^') {
        negated = true;
        RT_TRY(put_text(r, &left, "^"));
        r->at++;
    }
    for (;; first = false) {
        const char c = peek(r, 0);
        if (r->at >= r->len)
            RT_TRY(refuse(r, "a class that is not closed"));
        if (c == ']' && !first)
            break;
        if (c == '[' || c == ']') {
            RT_TRY(refuse(r, "a bracket inside a class"));
        } else if (c == '\\') {
            RT_TRY(escape(r, &left));
        } else if (c == '&' && peek(r, 1) == '&') {
            /* [A&&[B]]: a character of A that is one of B */
            if (negated || first || peek(r, 2) != '[')
                RT_TRY(refuse(r, "an intersection of this form"));
            r->at += 2;
            RT_TRY(put_text(r, &right, "(?:(?="));
            RT_TRY(class(r, &right));
            RT_TRY(put_text(r, &right, ")"));
            if (peek(r, 0) != ']')
                RT_TRY(refuse(r, "an intersection of this form"));
            break;
        } else {
            RT_TRY(put(r, &left, &c, 1));
            r->at++;
        }
    }
    r->at++;
    RT_TRY(put_text(r, &left, "]"));
    RT_TRY(put(r, out, right.len ? right.data : "", right.len));
    RT_TRY(put(r, out, left.data, left.len));
    if (right.len > 0)
        RT_TRY(put_text(r, out, ")"));
out:
    r->depth--;
    rt_buf_free(&left);
    rt_buf_free(&right);
    return st;
}

/* At '{': an interval {n}, {n,} or {n,m}. */
static enum rt_status interval(struct reader *r, struct rt_buf *out)
{
    enum rt_status st = RT_OK;
    size_t n = 1;
    while (peek(r, n) >= '0' && peek(r, n) <= '9')
        n++;
    const bool lower = n > 1;
    if (peek(r, n) == ',')
        for (n++; peek(r, n) >= '0' && peek(r, n) <= '9'; n++)
            ;
    if (!lower || peek(r, n) != '}' || peek(r, n + 1) == '+')
        return refuse(r, "an interval of this form");
    RT_TRY(put(r, out, r->s + r->at, n + 1));
    r->at += n + 1;
out:
    return st;
}

/* At '(': the opening of a group. */
static enum rt_status group(struct reader *r, struct rt_buf *out)
{
    static const char *const known[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"};
    enum rt_status st = RT_OK;
    size_t n = 1;
    if (peek(r, 1) == '*')
        return refuse(r, "a verb");
    if (peek(r, 1) == '?') {
        n = 0;
        for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
            if (r->len - r->at >= strlen(known[i]) && memcmp(r->s + r->at, known[i], strlen(known[i])) == 0)
                n = strlen(known[i]);
        if (n == 0)
            return refuse(r, "a group of this kind");
    }
    RT_TRY(put(r, out, r->s + r->at, n));
    r->at += n;
out:
    return st;
}

enum rt_status rt_pattern_translate(const char *text, size_t len, struct rt_buf *out, struct rt_err *err)
{
    struct reader r = {.s = text, .len = len, .err = err};
    enum rt_status st = RT_OK;
    if (len > RT_PATTERN_MAX)
        return rt_fail(err, RT_UNSUPPORTED, "a pattern of %zu bytes: at most %d are read", len, (int)RT_PATTERN_MAX);
    while (r.at < len) {
        const char c = text[r.at];
        switch (c) {
        case '\\': RT_TRY(escape(&r, out)); break;
        case '[': RT_TRY(class(&r, out)); break;
        case '{': RT_TRY(interval(&r, out)); break;
        case '(': RT_TRY(group(&r, out)); break;
        case '^': case '$': case '\0':
            RT_TRY(refuse(&r, "an anchor or a zero byte"));
            break;
        default:
            RT_TRY(put(&r, out, &c, 1));
            r.at++;
        }
    }
out:
    return st;
}

enum rt_status rt_pattern_quote(const char *text, size_t len, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (len > RT_PATTERN_MAX)
        return rt_fail(err, RT_UNSUPPORTED, "a pattern of %zu bytes: at most %d are read", len, (int)RT_PATTERN_MAX);
    for (size_t i = 0; i < len; i++) {
        if ((unsigned char)text[i] < 0x80 && !is_alnum(text[i]))
            RT_TRY(rt_buf_printf(out, err, "\\x{%x}", text[i]));
        else
            RT_TRY(rt_buf_append(out, text + i, 1, err));
    }
out:
    return st;
}

enum rt_status rt_pattern_create(const char *pcre, size_t len, struct rt_pattern **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_pattern *p = NULL;
    int code = 0;
    PCRE2_SIZE at = 0;
    pcre2_compile_context *cc = pcre2_compile_context_create(NULL);
    RT_TRY(rt_alloc(1, sizeof *p, "pattern", &p, err));
    memcpy(p->head, pcre, len < sizeof p->head - 1 ? len : sizeof p->head - 1);
    if (cc == NULL)
        RT_FAIL(err, NOMEM, "out of memory compiling a pattern");
    pcre2_set_newline(cc, PCRE2_NEWLINE_LF);
    pcre2_set_parens_nest_limit(cc, NESTING);
    p->code = pcre2_compile((PCRE2_SPTR)pcre, len, PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &at, cc);
    if (p->code == NULL && code == PCRE2_ERROR_HEAP_FAILED)
        RT_FAIL(err, NOMEM, "out of memory compiling a pattern");
    if (p->code == NULL) {
        PCRE2_UCHAR why[128];
        pcre2_get_error_message(code, why, sizeof why);
        RT_FAIL(err, UNSUPPORTED, "the pattern '%s' cannot be compiled: %s at byte %zu", p->head, (const char *)why, (size_t)at);
    }
    /* Without a JIT compiler the same pattern runs interpreted. */
    pcre2_jit_compile(p->code, PCRE2_JIT_COMPLETE);
    p->match = pcre2_match_data_create(1, NULL);
    p->context = pcre2_match_context_create(NULL);
    p->stack = pcre2_jit_stack_create(JIT_STACK_MIN, JIT_STACK_MAX, NULL);
    if (p->match == NULL || p->context == NULL || p->stack == NULL)
        RT_FAIL(err, NOMEM, "out of memory compiling a pattern");
    pcre2_jit_stack_assign(p->context, NULL, p->stack);
    pcre2_set_heap_limit(p->context, 64 << 10); /* KiB */
    *out = p;
    p = NULL;
out:
    if (cc != NULL)
        pcre2_compile_context_free(cc);
    rt_pattern_free(p);
    return st;
}

void rt_pattern_free(struct rt_pattern *p)
{
    if (p == NULL)
        return;
    pcre2_code_free(p->code);
    pcre2_match_data_free(p->match);
    pcre2_match_context_free(p->context);
    pcre2_jit_stack_free(p->stack);
    rt_free(p);
}

enum rt_status rt_pattern_find(struct rt_pattern *p, const char *s, size_t len, size_t from, bool *found, size_t *begin,
                               size_t *end, struct rt_err *err)
{
    const size_t left = len - from;
    pcre2_set_match_limit(p->context, (uint32_t)(left < (size_t)100 << 20 ? STEPS_BASE + left * STEPS_A_BYTE : UINT32_MAX / 2));
    const int rc = pcre2_match(p->code, (PCRE2_SPTR)s, len, from, PCRE2_NO_UTF_CHECK, p->match, p->context);
    *found = rc >= 0;
    if (rc >= 0) {
        const PCRE2_SIZE *v = pcre2_get_ovector_pointer(p->match);
        *begin = v[0];
        *end = v[1];
        return RT_OK;
    }
    if (rc == PCRE2_ERROR_NOMATCH)
        return RT_OK;
    if (rc == PCRE2_ERROR_NOMEMORY)
        return rt_fail(err, RT_NOMEM, "out of memory matching a pattern");
    PCRE2_UCHAR why[128];
    pcre2_get_error_message(rc, why, sizeof why);
    return rt_fail(err, RT_UNSUPPORTED, "the pattern '%s' cannot be matched in bounded effort: %s", p->head, (const char *)why);
}
