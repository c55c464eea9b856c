#include "distill/verify.h"

#include <stdint.h>
#include <string.h>

#include "distill/verify_value.h"

enum { MAX_ITEMS = 128, MAX_NESTING = 4 };

static const char *const verdict_name[] = {"correct", "wrong", "unparsed"};

const char *rt_verdict_name(enum rt_verdict v)
{
    return verdict_name[v];
}

enum rt_verify_mode rt_verify_mode_of(const char *name)
{
    return strcmp(name, "boxed") == 0 ? RT_VERIFY_BOXED : strcmp(name, "exact") == 0 ? RT_VERIFY_EXACT : RT_VERIFY_NONE;
}

/* ---- where the answer stands ---- */

/* RT_SET_OPEN and its kind are no white space. */
static bool white(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static bool at(const char *s, size_t n, size_t i, const char *what)
{
    const size_t k = strlen(what);
    return n - i >= k && memcmp(s + i, what, k) == 0;
}

void rt_verify_conclusion(const char *text, size_t len, const char **out, size_t *out_len)
{
    *out = text;
    *out_len = len;
    for (size_t i = len; i-- > 0;)
        if (text[i] == '<' && at(text, len, i, "</think>")) {
            const size_t from = i + strlen("</think>");
            *out = text + from;
            *out_len = len - from;
            return;
        }
    while (len > 0 && white(*text))
        text++, len--;
    if (at(text, len, 0, "<think>")) /* a thought without end concludes nothing */
        *out_len = 0;
}

/* What a box at `i` (behind \boxed) holds. */
static bool box(const char *s, size_t n, size_t i, const char **out, size_t *out_len)
{
    while (i < n && white(s[i]))
        i++;
    const size_t from = i;
    if (i < n && s[i] == '{') {
        int64_t depth = 0;
        for (; i < n; i++) {
            if (s[i] == '\\')
                i++; /* \{ and \} count for nothing */
            else if (s[i] == '{')
                depth++;
            else if (s[i] == '}' && --depth == 0) {
                *out = s + from + 1;
                *out_len = i - from - 1;
                return true;
            }
        }
        return false;
    }
    while (i < n && (unsigned char)s[i] > ' ' && s[i] != '$') /* "\boxed 5" */
        i++;
    if (i == from)
        return false;
    *out = s + from;
    *out_len = i - from;
    return true;
}

/* Whether \boxed that ends at `end` holds something: a group, also on the next line, or what TeX takes without braces. */
static bool holds(const char *text, size_t len, size_t end)
{
    size_t i = end;
    if (i == len || strchr(" {\\-+", text[i]) != NULL || rt_answer_digit(text[i]))
        return true;
    while (i < len && white(text[i]))
        i++;
    return i > end && i < len && text[i] == '{';
}

bool rt_verify_boxed(const char *text, size_t len, const char **out, size_t *out_len)
{
    for (size_t i = len; i-- > 0;) {
        if (text[i] != '\\')
            continue;
        const char *const names[] = {"\\boxed", "\\fbox"};
        for (int k = 0; k < 2; k++) {
            const size_t end = i + strlen(names[k]);
            if (at(text, len, i, names[k]) && holds(text, len, end))
                return box(text, len, end, out, out_len);
        }
    }
    return false;
}

static void strip(const char **s, size_t *n)
{
    while (*n > 0 && white((*s)[*n - 1]))
        --*n;
    while (*n > 0 && white(**s))
        ++*s, --*n;
}

/* ---- comparison ---- */

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c + 32) : c;
}

/* Moves *i over spaces and text marks; whether they part two numbers: "2 34" is not "23 4", "1 000" is one number. */
static bool skip_marks(const char *s, size_t n, size_t *i)
{
    const size_t from = *i;
    while (*i < n && (s[*i] == ' ' || s[*i] == RT_TEXT_OPEN || s[*i] == RT_TEXT_CLOSE || s[*i] == RT_DOLLAR))
        ++*i;
    if (*i == from || from == 0 || *i == n || !rt_answer_digit(s[from - 1]) || !rt_answer_digit(s[*i]))
        return false;
    size_t k = 0;
    while (*i + k < n && rt_answer_digit(s[*i + k]))
        k++;
    return k != 3;
}

/* Equal but for spaces and text marks, and, with fold, for case. */
static bool same_text(const char *a, size_t n, const char *b, size_t m, bool fold)
{
    for (size_t i = 0, j = 0;; i++, j++) {
        const bool gap = skip_marks(a, n, &i);
        if (skip_marks(b, m, &j) != gap)
            return false;
        if (i == n || j == m)
            return i == n && j == m;
        if (fold ? lower(a[i]) != lower(b[j]) : a[i] != b[j])
            return false;
    }
}

enum shape { SHAPE_TEXT, SHAPE_LETTER, SHAPE_WORD };

static bool is_no(const char *s, size_t n)
{
    return n == 2 && lower(s[0]) == 'n' && lower(s[1]) == 'o';
}

/* WORD: letters, digits and the marks of names, with a run of three letters or more, or set as text; LETTER: one letter. */
static enum shape shape(const char *s, size_t n)
{
    size_t letters = 0, run = 0, longest = 0, digits = 0;
    bool text = false;
    for (size_t i = 0; i < n; i++) {
        if (rt_answer_letter(s[i])) {
            letters++;
            run++;
        } else if (strchr(" -'.&_,", s[i]) != NULL || rt_answer_digit(s[i]) || s[i] == RT_TEXT_OPEN || s[i] == RT_TEXT_CLOSE) {
            run = 0;
            digits += rt_answer_digit(s[i]);
            text |= s[i] == RT_TEXT_OPEN;
        } else {
            return SHAPE_TEXT;
        }
        longest = run > longest ? run : longest;
    }
    if (letters == 1 && digits == 0)
        return SHAPE_LETTER;
    return letters > 0 && (longest >= 3 || text || is_no(s, n)) ? SHAPE_WORD : SHAPE_TEXT;
}

/* Whether a second choice is named in s: "B) or C)", "A. B. C", "A: yes, B: no". */
static bool names_choice(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (!rt_answer_letter(s[i]) || (i > 0 && (rt_answer_letter(s[i - 1]) || rt_answer_digit(s[i - 1]))) || (i + 1 < n && (rt_answer_letter(s[i + 1]) || rt_answer_digit(s[i + 1]))))
            continue;
        if (i + 1 == n || strchr(").:,", s[i + 1]) != NULL || (s[i + 1] == RT_TEXT_CLOSE && s[i] >= 'A' && s[i] <= 'Z'))
            return true;
    }
    return false;
}

/* "(B)", "B.", "B) 12", "\text{(B)} five": the letter of a choice; 0 where it is none, or not the only one. *bare: nothing follows. */
static char choice(const char *s, size_t n, bool *bare)
{
    while (n > 0 && (*s == ' ' || *s == RT_TEXT_OPEN))
        s++, n--;
    const bool open = n > 0 && *s == '(';
    s += open;
    n -= open;
    while (n > 0 && (*s == ' ' || *s == RT_TEXT_OPEN))
        s++, n--;
    if (n == 0 || !((*s >= 'A' && *s <= 'Z') || (*s >= 'a' && *s <= 'z')))
        return 0;
    const char c = *s++;
    n--;
    if (n > 0) {
        if (open ? *s != ')' : strchr(").:", *s) == NULL && !(*s == RT_TEXT_CLOSE && n == 1))
            return 0;
        s++;
        n--;
    }
    if (n > 0 && *s != ' ' && *s != RT_TEXT_OPEN && *s != RT_TEXT_CLOSE) /* "(x)(y)", "x.y" */
        return 0;
    while (n > 0 && (*s == ' ' || *s == RT_TEXT_OPEN || *s == RT_TEXT_CLOSE))
        s++, n--;
    *bare = n == 0;
    if (n > 0 && (strchr("+*/^=<>!", *s) != NULL || (*s == '-' && c >= 'a') || names_choice(s, n)))
        return 0;
    return lower(c);
}

/* Removes "x = " and "x \in " in front: x a letter, or a name with a subscript or an argument. The length of the name, 0 without one. */
static size_t unwrap(const char **s, size_t *n)
{
    size_t name = 0;
    strip(s, n);
    size_t i = 0;
    while (i < *n && (rt_answer_letter((*s)[i]) || (*s)[i] == '_' || (*s)[i] == '(' || (*s)[i] == ')' || (*s)[i] == ' '))
        i++;
    if (i > 0 && i <= 12 && rt_answer_letter(**s)) {
        if (i < *n && (*s)[i] == '=' && (i + 1 == *n || (*s)[i + 1] != '=')) {
            name = i;
            *s += i + 1;
            *n -= i + 1;
        } else if (at(*s, *n, i, "\\in ") || at(*s, *n, i, "\\in\3") || at(*s, *n, i, "\\in(") || at(*s, *n, i, "\\in[")) {
            *s += i + 3;
            *n -= i + 3;
        }
        strip(s, n);
    }
    return name;
}

struct item {
    const char *s, *name; /* name: of "name = s" */
    size_t n, n_name;
    bool is_value;
    struct rt_value value;
};

struct list {
    char open, close; /* 0: bare */
    char separator;   /* ',' or RT_UNION */
    int n;
    struct item items[MAX_ITEMS];
};

static bool opens(char c)
{
    return c == '(' || c == '[' || c == '{' || c == RT_SET_OPEN;
}

static bool closes(char c)
{
    return c == ')' || c == ']' || c == '}' || c == RT_SET_CLOSE;
}

/* Whether s is one bracket pair around all of it. */
static bool bracketed(const char *s, size_t n)
{
    int64_t depth = 0;
    if (n < 2 || !opens(s[0]) || !closes(s[n - 1]))
        return false;
    for (size_t i = 0; i < n; i++) {
        depth += opens(s[i]) ? 1 : closes(s[i]) ? -1 : 0;
        if (depth == 0 && i + 1 < n)
            return false;
    }
    return depth == 0;
}

static void put_item(struct list *l, const char *s, size_t n)
{
    strip(&s, &n);
    const char *const name = s;
    const size_t n_name = unwrap(&s, &n);
    if (n == 0) /* "1, 2, and 3" has one comma more */
        return;
    if (l->n < MAX_ITEMS) {
        struct item *it = &l->items[l->n];
        *it = (struct item){.s = s, .n = n, .name = name, .n_name = n_name};
        it->is_value = rt_value_read(s, n, &it->value);
    }
    l->n++;
}

/* Cuts s at separators outside of brackets. false: nothing was cut. */
static bool cut(const char *s, size_t n, char separator, struct list *l)
{
    int64_t depth = 0;
    size_t from = 0;
    l->n = 0;
    l->separator = separator;
    for (size_t i = 0; i <= n; i++) {
        if (i < n && opens(s[i]))
            depth++;
        else if (i < n && closes(s[i]))
            depth--;
        if (i == n ? from > 0 : depth == 0 && s[i] == separator) {
            put_item(l, s + from, i - from);
            from = i + 1;
        }
    }
    return l->n > 1;
}

/* Unions first, then brackets, then bare commas ("1, 2" and "1 \text{ and } 2"). A set may hold a single item. */
static bool read_list(const char *s, size_t n, struct list *l)
{
    l->open = l->close = 0;
    l->n = 0;
    if (cut(s, n, RT_UNION, l))
        return true;
    if (bracketed(s, n)) {
        l->open = s[0];
        l->close = s[n - 1];
        if (cut(s + 1, n - 2, ',', l))
            return true;
        if (l->open == RT_SET_OPEN) {
            l->n = 0;
            put_item(l, s + 1, n - 2);
            return true;
        }
        return false;
    }
    return cut(s, n, ',', l);
}

static enum rt_verdict compare(const struct item *a, const struct item *b, int nesting);

static bool ordered(const struct list *l)
{
    return l->open == '(' || l->open == '[';
}

static bool same_name(const struct item *a, const struct item *b)
{
    return same_text(a->name, a->n_name, b->name, b->n_name, false);
}

/* "x = 1, y = 2": values of several unknowns; "x = 1, x = 2" are those of one. */
static bool assigns(const struct list *l)
{
    bool several = false;
    for (int i = 0; i < l->n; i++) {
        if (l->items[i].n_name == 0)
            return false;
        several |= !same_name(&l->items[0], &l->items[i]);
    }
    return several;
}

static enum rt_verdict compare_in_order(const struct list *a, const struct list *b, int nesting)
{
    bool unsure = false;
    for (int i = 0; i < a->n; i++) {
        const enum rt_verdict v = compare(&a->items[i], &b->items[i], nesting + 1);
        if (v == RT_VERDICT_WRONG)
            return v;
        unsure |= v == RT_VERDICT_UNPARSED;
    }
    return unsure ? RT_VERDICT_UNPARSED : RT_VERDICT_CORRECT;
}

static bool named_apart(const struct item *a, const struct item *b)
{
    return a->n_name > 0 && b->n_name > 0 && !same_name(a, b);
}

static enum rt_verdict compare_lists(const struct list *a, const struct list *b, int nesting)
{
    bool used[MAX_ITEMS] = {false}, unsure = false;
    if (a->n > MAX_ITEMS || b->n > MAX_ITEMS)
        return RT_VERDICT_UNPARSED;
    if (a->n != b->n || a->separator != b->separator)
        return RT_VERDICT_WRONG;
    const bool plain_a = a->open == 0 || a->open == '{', plain_b = b->open == 0 || b->open == '{';
    /* (1,2) is not [1,2]; a list without brackets may stand for either */
    if (!plain_a && !plain_b && (a->open != b->open || a->close != b->close))
        return RT_VERDICT_WRONG;
    if (ordered(a) || ordered(b))
        return compare_in_order(a, b, nesting);
    const bool assigned = assigns(a), both = assigned && assigns(b);
    if (assigned != assigns(b)) /* values without their names: in the same order, or unknown */
        return compare_in_order(a, b, nesting) == RT_VERDICT_CORRECT ? RT_VERDICT_CORRECT : RT_VERDICT_UNPARSED;
    for (int i = 0; i < a->n; i++) {
        bool found = false, maybe = false, namesake = !both;
        for (int j = 0; j < b->n && !found; j++) {
            const bool apart = used[j] || (both && named_apart(&a->items[i], &b->items[j]));
            const enum rt_verdict v = apart ? RT_VERDICT_WRONG : compare(&a->items[i], &b->items[j], nesting + 1);
            found = v == RT_VERDICT_CORRECT;
            maybe |= v == RT_VERDICT_UNPARSED;
            namesake |= both && same_name(&a->items[i], &b->items[j]);
            used[j] |= found;
        }
        maybe |= !namesake; /* other unknowns */
        if (!found && !maybe)
            return RT_VERDICT_WRONG;
        unsure |= !found;
    }
    return unsure ? RT_VERDICT_UNPARSED : RT_VERDICT_CORRECT;
}

static bool has_digit(const struct item *it)
{
    for (size_t i = 0; i < it->n; i++)
        if (rt_answer_digit(it->s[i]))
            return true;
    return false;
}

static enum rt_verdict compare_words(const struct item *a, const struct item *b)
{
    const enum shape x = shape(a->s, a->n), y = shape(b->s, b->n);
    const bool words = x != SHAPE_TEXT && y != SHAPE_TEXT;
    if (words && same_text(a->s, a->n, b->s, b->n, true))
        return RT_VERDICT_CORRECT;
    bool bare_a = false, bare_b = false;
    const char p = choice(a->s, a->n, &bare_a), q = choice(b->s, b->n, &bare_b);
    if (p != 0 && q != 0 && p != q)
        return RT_VERDICT_WRONG;
    if (p != 0 && q != 0)
        return bare_a || bare_b ? RT_VERDICT_CORRECT : RT_VERDICT_UNPARSED;
    /* a number and a word that has one may be the same: "2.5 hours", "2 hours 30 minutes" */
    if (a->is_value ? y != SHAPE_TEXT && !has_digit(b) : b->is_value ? x != SHAPE_TEXT && !has_digit(a) : words)
        return RT_VERDICT_WRONG;
    return RT_VERDICT_UNPARSED;
}

static enum rt_verdict compare(const struct item *a, const struct item *b, int nesting)
{
    struct list la, lb;
    if (a->n == 0 || b->n == 0)
        return RT_VERDICT_UNPARSED;
    if (a->is_value && b->is_value) { /* before the texts: "2 3/4" is not "23/4" */
        const enum rt_value_relation r = rt_value_compare(&a->value, &b->value);
        if (r != RT_VALUE_UNSURE)
            return r == RT_VALUE_EQUAL ? RT_VERDICT_CORRECT : RT_VERDICT_WRONG;
    }
    if (same_text(a->s, a->n, b->s, b->n, false))
        return RT_VERDICT_CORRECT;
    if (a->is_value && b->is_value)
        return RT_VERDICT_UNPARSED;
    if (nesting >= MAX_NESTING)
        return RT_VERDICT_UNPARSED;
    const bool list_a = !a->is_value && read_list(a->s, a->n, &la), list_b = !b->is_value && read_list(b->s, b->n, &lb);
    if (list_a && list_b)
        return compare_lists(&la, &lb, nesting);
    if (list_a && b->is_value) /* "\{5\}" is 5 */
        return la.n == 1 ? compare(&la.items[0], b, nesting + 1) : RT_VERDICT_WRONG;
    if (list_b && a->is_value)
        return lb.n == 1 ? compare(a, &lb.items[0], nesting + 1) : RT_VERDICT_WRONG;
    return compare_words(a, b);
}

static struct item item_of(const struct rt_answer_text *t)
{
    struct item it = {.s = t->s, .n = t->n};
    unwrap(&it.s, &it.n);
    if (memchr(it.s, '=', it.n) != NULL) { /* "x = 1, y = 2": the name is the first item's */
        it.s = t->s;
        it.n = t->n;
    }
    it.is_value = rt_value_read(it.s, it.n, &it.value);
    return it;
}

enum rt_verdict rt_verify_answers(const char *gold, size_t gold_len, const char *given, size_t given_len)
{
    struct rt_answer_text g, a;
    const char *inner;
    size_t n;
    if (rt_verify_boxed(gold, gold_len, &inner, &n)) {
        gold = inner;
        gold_len = n;
    }
    if (rt_verify_boxed(given, given_len, &inner, &n)) {
        given = inner;
        given_len = n;
    }
    strip(&gold, &gold_len);
    strip(&given, &given_len);
    if (gold_len == 0 || given_len == 0 || !rt_answer_normalise(gold, gold_len, &g) || !rt_answer_normalise(given, given_len, &a))
        return RT_VERDICT_UNPARSED;
    const struct item x = item_of(&g), y = item_of(&a);
    return compare(&x, &y, 0);
}

enum rt_verdict rt_verify(enum rt_verify_mode mode, const char *completion, size_t len, const char *answer, size_t answer_len,
                          const char **found, size_t *found_len)
{
    const char *s, *box_s = NULL;
    size_t n, box_n = 0;
    enum rt_verdict v = RT_VERDICT_CORRECT;
    rt_verify_conclusion(completion, len, &s, &n);
    if (mode == RT_VERIFY_BOXED) {
        v = RT_VERDICT_UNPARSED;
        if (rt_verify_boxed(s, n, &box_s, &box_n)) {
            strip(&box_s, &box_n);
            v = rt_verify_answers(answer, answer_len, box_s, box_n);
        }
    } else if (mode == RT_VERIFY_EXACT) {
        box_s = s;
        box_n = n;
        strip(&box_s, &box_n);
        strip(&answer, &answer_len);
        v = box_n == 0 ? RT_VERDICT_UNPARSED : box_n == answer_len && memcmp(box_s, answer, box_n) == 0 ? RT_VERDICT_CORRECT : RT_VERDICT_WRONG;
    }
    if (found != NULL) {
        *found = box_s;
        *found_len = box_n;
    }
    return v;
}
