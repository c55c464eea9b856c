/* Units behind numbers. */
#include <string.h>
#include <strings.h>

#include "distill/verify_value.h"

static bool known_unit(const char *s, size_t n)
{
    static const char *const known[] = {"cm", "mm", "km", "nm", "dm", "kg", "mg", "ml", "mL", "mi", "ft", "in", "yd", "hr", "min", "sec", "ms", "lb",
                                        "lbs", "oz", "mph", "kmh", "rpm", "Hz", "kHz", "kW", "kJ", "Pa", "am", "pm", "deg", "rad", "mol", "usd", "USD"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strlen(known[i]) == n && memcmp(known[i], s, n) == 0)
            return true;
    return false;
}

/* A run of letters outside of \text{}: three or more, a known unit, or one letter around a slash (m/s), so that 2xy and 5m/n stay products. */
static bool unit_word(const char *s, size_t n, size_t from, size_t to, bool glued)
{
    static const char single[] = "msghJNLKlC";
    const bool one = to - from == 1 && strchr(single, s[from]) != NULL, below = from > 0 && s[from - 1] == '/', above = to < n && s[to] == '/';
    if ((unsigned char)s[from] == 0xE2) /* a sign, as in "5 \xE2\x88\x9Ax" */
        return false;
    return known_unit(s + from, to - from) || (one && (below || above)) || (to - from >= 3 && !(glued && from == 0));
}

bool rt_unit_read(const char *s, size_t n, bool glued)
{
    size_t letters = 0;
    bool text = false;
    for (size_t i = 0; i < n;) {
        const char c = s[i];
        if (rt_answer_letter(c)) {
            const size_t from = i;
            while (i < n && rt_answer_letter(s[i]))
                i++;
            if (!text && !unit_word(s, n, from, i, glued))
                return false;
            letters += i - from;
            while (text && i < n && rt_answer_digit(s[i])) /* m2 */
                i++;
        } else if (c == '^' && letters > 0) {
            i++;
            while (i < n && (rt_answer_digit(s[i]) || s[i] == '{' || s[i] == '}' || s[i] == '-'))
                i++;
        } else if (c == RT_TEXT_OPEN || c == RT_TEXT_CLOSE) {
            text = c == RT_TEXT_OPEN;
            i++;
        } else if (c == ' ' || c == '.' || (letters > 0 && (c == '/' || c == '*')) || (text && strchr("/()-',%:;", c) != NULL)) {
            i++;
        } else {
            return false;
        }
    }
    return true;
}

bool rt_unit_doubtful(const struct rt_value *v)
{
    static const char *const words[] = {"thousand", "million", "billion", "trillion", "hundred", "dozen", "or", "and", "not", "to", "if", "when", "unless",
                                        "less", "more", "base", "mod", "remainder", "wrong", "incorrect"};
    for (size_t i = 0; i < v->n_unit;) {
        const size_t from = i;
        while (i < v->n_unit && rt_answer_letter(v->unit[i]))
            i++;
        for (size_t k = 0; k < sizeof words / sizeof *words; k++)
            if (strlen(words[k]) == i - from && strncasecmp(words[k], v->unit + from, i - from) == 0)
                return true;
        i += i == from;
    }
    return false;
}

bool rt_unit_no_dollars(const struct rt_value *v)
{
    static const char *const dollars[] = {"dollar", "dollars", "usd"};
    for (size_t k = 0; k < sizeof dollars / sizeof *dollars; k++)
        if (rt_unit_same(v, &(struct rt_value){.unit = dollars[k], .n_unit = strlen(dollars[k])}))
            return false;
    return v->percent || (v->n_unit > 0 && !v->dollars);
}

bool rt_unit_same(const struct rt_value *a, const struct rt_value *b)
{
    size_t i = 0, j = 0;
    for (;; i++, j++) {
        while (i < a->n_unit && !rt_answer_letter(a->unit[i]) && !rt_answer_digit(a->unit[i]) && a->unit[i] != '/')
            i++;
        while (j < b->n_unit && !rt_answer_letter(b->unit[j]) && !rt_answer_digit(b->unit[j]) && b->unit[j] != '/')
            j++;
        if (i == a->n_unit || j == b->n_unit)
            return i == a->n_unit && j == b->n_unit;
        if ((a->unit[i] | 32) != (b->unit[j] | 32))
            return false;
    }
}
