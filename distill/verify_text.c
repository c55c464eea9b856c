/* LaTeX answers -> plain text (see verify_value.h). Each replacement is no longer than what it replaces. */
#include <string.h>

#include "distill/verify_value.h"

enum { MAX_TEXTS = 16 };

struct rewriting {
    const char *s;
    size_t n, i;
    struct rt_answer_text *out;
    int depth, texts;
    int text_depth[MAX_TEXTS]; /* brace depth inside each open \text{ */
};

static const struct {
    const char *name, *to; /* to NULL: goes */
} commands[] = {
    {"dfrac", "\\frac"}, {"tfrac", "\\frac"}, {"cfrac", "\\frac"}, {"left", NULL}, {"right", NULL}, {"big", NULL}, {"Big", NULL}, {"bigl", NULL},
    {"bigr", NULL}, {"Bigl", NULL}, {"Bigr", NULL}, {"bigg", NULL}, {"Bigg", NULL}, {"displaystyle", NULL}, {"textstyle", NULL}, {"limits", NULL},
    {"quad", " "}, {"qquad", " "}, {"cdot", "*"}, {"times", "*"}, {"div", "/"}, {"pi", "pi"}, {"infty", "inf"}, {"degree", NULL}, {"le", "<="},
    {"leq", "<="}, {"ge", ">="}, {"geq", ">="}, {"ne", "!="}, {"neq", "!="}, {"lbrace", "\3"}, {"rbrace", "\4"}, {"cup", "\5"}, {"lt", "<"},
    {"gt", ">"}, {"lparen", "("}, {"rparen", ")"}, {"lbrack", "["}, {"rbrack", "]"}, {"colon", ":"}, {"euro", NULL}, {"pounds", NULL},
};
static const char *const texts[] = {"text", "textbf", "textit", "textrm", "texttt", "textnormal", "mathrm", "mathbf", "mathit", "mathsf", "mbox",
                                    "hbox", "operatorname", "emph", "rm"};
static const struct {
    const char *utf8, *to;
} symbols[] = {
    {"\xC2\xB0", ""}, {"\xC2\xA0", " "}, {"\xC2\xA3", ""}, {"\xCF\x80", "pi"}, {"\xC3\x97", "*"}, {"\xC3\xB7", "/"}, {"\xC2\xB7", "*"},
    {"\xE2\x88\x92", "-"}, {"\xE2\x80\x93", "-"}, {"\xE2\x88\x9E", "inf"}, {"\xE2\x82\xAC", ""}, {"\xE2\x89\xA4", "<="}, {"\xE2\x89\xA5", ">="},
    {"\xE2\x88\xAA", "\5"}, {"\xE2\x80\x89", ""}, {"\xE2\x80\xAF", ""},
};

static void put(struct rt_answer_text *o, const char *s)
{
    for (; *s != '\0'; s++) {
        if (*s == ' ' && (o->n == 0 || o->s[o->n - 1] == ' '))
            continue;
        o->s[o->n++] = *s;
    }
}

static bool letter(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static bool ahead(const struct rewriting *w, const char *what)
{
    const size_t k = strlen(what);
    return w->n - w->i >= k && memcmp(w->s + w->i, what, k) == 0;
}

/* "^\circ" and "^{\circ}" go with their caret; any other circle stays. */
static void circle(struct rewriting *w)
{
    struct rt_answer_text *o = w->out;
    while (o->n > 0 && o->s[o->n - 1] == ' ')
        o->n--;
    if (o->n >= 1 && o->s[o->n - 1] == '^') {
        o->n--;
    } else if (o->n >= 2 && o->s[o->n - 1] == '{' && o->s[o->n - 2] == '^' && ahead(w, "}")) {
        o->n -= 2;
        w->depth--;
        w->i++;
    } else {
        put(o, "\\circ");
    }
}

static void open_text(struct rewriting *w)
{
    while (w->i < w->n && w->s[w->i] == ' ')
        w->i++;
    if (!ahead(w, "{") || w->texts == MAX_TEXTS)
        return;
    w->i++;
    w->text_depth[w->texts++] = ++w->depth;
    put(w->out, (const char[]){RT_TEXT_OPEN, 0});
}

static void named(struct rewriting *w, const char *name, size_t n)
{
    for (size_t k = 0; k < sizeof texts / sizeof *texts; k++)
        if (strlen(texts[k]) == n && memcmp(texts[k], name, n) == 0) {
            open_text(w);
            return;
        }
    for (size_t k = 0; k < sizeof commands / sizeof *commands; k++)
        if (strlen(commands[k].name) == n && memcmp(commands[k].name, name, n) == 0) {
            if (commands[k].to != NULL)
                put(w->out, commands[k].to);
            return;
        }
    if (n == 4 && memcmp(name, "circ", 4) == 0) {
        circle(w);
        return;
    }
    put(w->out, "\\");
    for (size_t k = 0; k < n; k++)
        put(w->out, (const char[]){name[k], 0});
}

static void command(struct rewriting *w)
{
    w->i++; /* the backslash */
    if (w->i == w->n)
        return;
    const char c = w->s[w->i];
    if (letter(c)) {
        const size_t from = w->i;
        while (w->i < w->n && letter(w->s[w->i]))
            w->i++;
        named(w, w->s + from, w->i - from);
        return;
    }
    w->i++;
    if (c == '{' || c == '}')
        put(w->out, (const char[]){c == '{' ? RT_SET_OPEN : RT_SET_CLOSE, 0});
    else if (c == '\\') /* a row of a matrix ends */
        put(w->out, ";");
    else if (c == ' ' || c == '\n')
        put(w->out, " ");
    else if (c == '$')
        put(w->out, (const char[]){RT_DOLLAR, 0});
    else if (strchr(",;:!()[]", c) == NULL)
        put(w->out, (const char[]){c, 0});
}

static void plain(struct rewriting *w)
{
    const char c = w->s[w->i];
    if ((unsigned char)c >= 0x80)
        for (size_t k = 0; k < sizeof symbols / sizeof *symbols; k++)
            if (ahead(w, symbols[k].utf8)) {
                put(w->out, symbols[k].to);
                w->i += strlen(symbols[k].utf8);
                return;
            }
    if (ahead(w, "{,}")) {
        put(w->out, ",");
        w->i += 3;
        return;
    }
    w->i++;
    if (c == '{') {
        w->depth++;
    } else if (c == '}') {
        if (w->texts > 0 && w->text_depth[w->texts - 1] == w->depth) {
            w->texts--;
            w->depth--;
            put(w->out, (const char[]){RT_TEXT_CLOSE, 0});
            return;
        }
        w->depth--;
    } else if (c == '$') {
        return;
    }
    put(w->out, (const char[]){(unsigned char)c <= ' ' || c == '~' ? ' ' : c, 0});
}

/* "1 \text{ and } 2" is "1 , 2". */
static void conjunctions(struct rt_answer_text *o)
{
    static const char *const marks[] = {"\1and\2", "\1or\2", "\1 and \2", "\1 or \2", "\1 and\2", "\1 or\2", "\1and \2", "\1or \2"};
    for (size_t i = 0; i < o->n; i++)
        for (size_t k = 0; o->s[i] == RT_TEXT_OPEN && k < sizeof marks / sizeof *marks; k++) {
            const size_t len = strlen(marks[k]);
            if (o->n - i >= len && memcmp(o->s + i, marks[k], len) == 0) {
                o->s[i] = ',';
                memset(o->s + i + 1, ' ', len - 1);
            }
        }
}

bool rt_answer_normalise(const char *s, size_t n, struct rt_answer_text *out)
{
    struct rewriting w = {.s = s, .n = n, .out = out};
    out->n = 0;
    if (n > RT_ANSWER_MAX)
        return false;
    while (w.i < n)
        if (s[w.i] == '\\')
            command(&w);
        else
            plain(&w);
    conjunctions(out);
    while (out->n > 0 && strchr(" .,;:", out->s[out->n - 1]) != NULL)
        out->n--;
    out->s[out->n] = '\0';
    return true;
}
