#include "formats/pretokenizer.h"

#include <string.h>

#include "core/mem.h"
#include "formats/pattern.h"
#include "formats/unicode.h"

enum { MAX_STEPS = 16, MAX_DEPTH = 8 };

/* ByteLevel's own pattern (GPT-2) */
#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

enum behaviour { ISOLATED, REMOVED, CONTIGUOUS, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT };
static const char *const behaviour_name[] = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"};

struct step {
    struct rt_pattern *pattern;
    enum behaviour behaviour;
    bool invert;
};

struct rt_pretokenizer {
    struct step step[MAX_STEPS];
    int n_steps;
    bool byte_level;
    struct rt_pieces a, b;
};

void rt_pieces_free(struct rt_pieces *p)
{
    rt_free(p->at);
    memset(p, 0, sizeof *p);
}

static enum rt_status push(struct rt_pieces *p, size_t begin, size_t end, struct rt_err *err)
{
    if (begin == end)
        return RT_OK;
    if (p->n == p->cap) {
        struct rt_piece *more;
        const size_t cap = p->cap ? p->cap * 2 : 256;
        const enum rt_status st = rt_alloc(cap, sizeof *more, "pieces of text", &more, err);
        if (st != RT_OK)
            return st;
        if (p->n > 0)
            memcpy(more, p->at, p->n * sizeof *more);
        rt_free(p->at);
        p->at = more;
        p->cap = cap;
    }
    p->at[p->n++] = (struct rt_piece){begin, end};
    return RT_OK;
}

static enum rt_status add_step(struct rt_pretokenizer *p, const char *pattern, size_t len, bool literal, enum behaviour behaviour,
                               bool invert, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf pcre = {0};
    if (p->n_steps == MAX_STEPS)
        return rt_fail(err, RT_UNSUPPORTED, "a pre-tokenizer of more than %d steps", (int)MAX_STEPS);
    if (len == 0)
        return rt_fail(err, RT_UNSUPPORTED, "a Split by an empty pattern");
    RT_TRY(literal ? rt_pattern_quote(pattern, len, &pcre, err) : rt_pattern_translate(pattern, len, &pcre, err));
    struct step *s = &p->step[p->n_steps];
    RT_TRY(rt_pattern_create(pcre.data, pcre.len, &s->pattern, err));
    s->behaviour = behaviour;
    s->invert = invert;
    p->n_steps++;
out:
    rt_buf_free(&pcre);
    return st;
}

static enum rt_status parse_split(struct rt_pretokenizer *p, const struct rt_json *v, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *name;
    bool invert, literal = false;
    size_t len = 0, b = 0;
    const struct rt_json *pattern = rt_json_get(v, "pattern");
    const char *text = rt_json_as_string(rt_json_get(pattern, "Regex"), &len);
    if (text == NULL) {
        text = rt_json_as_string(rt_json_get(pattern, "String"), &len);
        literal = true;
    }
    if (text == NULL)
        RT_FAIL(err, FORMAT, "%s: a Split without \"pattern\": {\"Regex\" or \"String\": text}", rt_json_source(v));
    RT_TRY(rt_json_string(v, "behavior", &name, err));
    RT_TRY(rt_json_bool_or(v, "invert", false, &invert, err));
    while (b < sizeof behaviour_name / sizeof behaviour_name[0] && strcmp(name, behaviour_name[b]) != 0)
        b++;
    if (b == sizeof behaviour_name / sizeof behaviour_name[0])
        RT_FAIL(err, UNSUPPORTED, "the Split behaviour '%.40s' is not known", name);
    RT_TRY(add_step(p, text, len, literal, (enum behaviour)b, invert, err));
out:
    return st;
}

static enum rt_status parse(struct rt_pretokenizer *p, const struct rt_json *v, int depth, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *type;
    bool flag;
    RT_TRY(rt_json_string(v, "type", &type, err));
    if (p->byte_level)
        RT_FAIL(err, UNSUPPORTED, "a pre-tokenizer step '%.40s' after ByteLevel", type);
    if (strcmp(type, "Sequence") == 0 && depth < MAX_DEPTH) {
        const struct rt_json *list = rt_json_get(v, "pretokenizers");
        if (list == NULL || rt_json_typeof(list) != RT_JSON_ARRAY)
            RT_FAIL(err, FORMAT, "%s: a Sequence without \"pretokenizers\"", rt_json_source(v));
        for (size_t i = 0; i < rt_json_len(list); i++)
            RT_TRY(parse(p, rt_json_at(list, i), depth + 1, err));
    } else if (strcmp(type, "Split") == 0) {
        RT_TRY(parse_split(p, v, err));
    } else if (strcmp(type, "Digits") == 0) {
        /* Rust's is_numeric: Nd, Nl, No. Runs of digits are one piece each, as Contiguous would leave them. */
        RT_TRY(rt_json_bool_or(v, "individual_digits", false, &flag, err));
        const char *pattern = flag ? "\\p{N}" : "\\p{N}+";
        RT_TRY(add_step(p, pattern, strlen(pattern), false, ISOLATED, false, err));
    } else if (strcmp(type, "ByteLevel") == 0) {
        RT_TRY(rt_json_bool_or(v, "add_prefix_space", true, &flag, err));
        if (flag)
            RT_FAIL(err, UNSUPPORTED, "ByteLevel with add_prefix_space: text would not come back as it was");
        RT_TRY(rt_json_bool_or(v, "use_regex", true, &flag, err));
        if (flag)
            RT_TRY(add_step(p, GPT2_PATTERN, strlen(GPT2_PATTERN), false, ISOLATED, false, err));
        p->byte_level = true;
    } else {
        RT_FAIL(err, UNSUPPORTED, "the pre-tokenizer '%.40s' is not known: Sequence, Split, Digits and ByteLevel are", type);
    }
out:
    return st;
}

enum rt_status rt_pretokenizer_create(const struct rt_json *json, struct rt_pretokenizer **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_pretokenizer *p = NULL;
    if (json == NULL || rt_json_typeof(json) != RT_JSON_OBJECT)
        return rt_fail(err, RT_UNSUPPORTED, "there is no pre-tokenizer: a byte-level tokenizer has one that ends with ByteLevel");
    RT_TRY(rt_alloc(1, sizeof *p, "pre-tokenizer", &p, err));
    RT_TRY(parse(p, json, 0, err));
    if (!p->byte_level)
        RT_FAIL(err, UNSUPPORTED, "the pre-tokenizer does not end with ByteLevel: only byte-level tokenizers are read");
    *out = p;
    p = NULL;
out:
    rt_pretokenizer_free(p);
    return st;
}

void rt_pretokenizer_free(struct rt_pretokenizer *p)
{
    if (p == NULL)
        return;
    for (int i = 0; i < p->n_steps; i++)
        rt_pattern_free(p->step[i].pattern);
    rt_pieces_free(&p->a);
    rt_pieces_free(&p->b);
    rt_free(p);
}

/* Takes the alternating stretches of one piece, in order, and adds what the behaviour makes of them. */
struct cutter {
    enum behaviour behaviour;
    bool invert;
    bool open, open_match; /* a stretch is held back: it may grow */
    size_t begin, end;
    struct rt_pieces *out;
    struct rt_err *err;
};

static enum rt_status flush(struct cutter *c)
{
    const bool had = c->open;
    c->open = false;
    return had ? push(c->out, c->begin, c->end, c->err) : RT_OK;
}

static enum rt_status stretch(struct cutter *c, size_t begin, size_t end, bool matched)
{
    const bool match = matched != c->invert;
    bool grow = false;
    enum rt_status st;
    switch (c->behaviour) {
    case ISOLATED: return push(c->out, begin, end, c->err);
    case REMOVED: return match ? RT_OK : push(c->out, begin, end, c->err);
    case CONTIGUOUS: grow = c->open_match == match; break;
    case MERGED_WITH_PREVIOUS: grow = match && !c->open_match; break;
    case MERGED_WITH_NEXT: grow = !match && c->open_match; break;
    }
    if (!c->open || !grow) {
        if ((st = flush(c)) != RT_OK)
            return st;
        c->begin = begin;
        c->open = true;
    }
    c->end = end;
    c->open_match = match;
    return RT_OK;
}

/* Searches as Oniguruma's find_iter does: an empty match cuts, unless it touches the match before. */
static enum rt_status cut(const struct step *s, const char *text, struct rt_piece piece, struct rt_pieces *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *t = text + piece.begin;
    const size_t len = piece.end - piece.begin;
    size_t from = 0, prev = 0, begin, end;
    bool found, matched = false;
    struct cutter c = {.behaviour = s->behaviour, .invert = s->invert, .out = out, .err = err};
    while (from <= len) {
        RT_TRY(rt_pattern_find(s->pattern, t, len, from, &found, &begin, &end, err));
        if (!found)
            break;
        if (begin == end) {
            size_t n = 1;
            if (end < len)
                rt_utf8_next(t + end, len - end, &n);
            from = end + n;
            if (matched && begin == prev)
                continue;
        } else {
            from = end;
        }
        if (begin > prev)
            RT_TRY(stretch(&c, piece.begin + prev, piece.begin + begin, false));
        RT_TRY(stretch(&c, piece.begin + begin, piece.begin + end, true));
        prev = end;
        matched = true;
    }
    if (prev < len)
        RT_TRY(stretch(&c, piece.begin + prev, piece.end, false));
    RT_TRY(flush(&c));
out:
    return st;
}

enum rt_status rt_pretokenizer_split(struct rt_pretokenizer *p, const char *text, size_t len, const struct rt_pieces **words,
                                     struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_pieces *in = &p->a, *out = &p->b;
    in->n = 0;
    RT_TRY(push(in, 0, len, err));
    for (int i = 0; i < p->n_steps; i++) {
        out->n = 0;
        for (size_t k = 0; k < in->n; k++)
            RT_TRY(cut(&p->step[i], text, in->at[k], out, err));
        struct rt_pieces *const swap = in;
        in = out;
        out = swap;
    }
    *words = in;
out:
    return st;
}
