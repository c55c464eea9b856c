/* Answers as values: LaTeX normalised to plain text, and numbers read exactly. Internal to verify.
 *
 * Normalised text: spaces single, math delimiters, spacing commands, \left, \right, degrees and currency gone but for \$ (RT_DOLLAR); \frac{a}{b} stays, its other
 * spellings become it; \text{...} is put between RT_TEXT_OPEN and RT_TEXT_CLOSE; \{ \} become RT_SET_OPEN, RT_SET_CLOSE; \cdot and \times
 * become *, \div /, \pi pi, \infty inf, \cup RT_UNION; trailing . , ; go.
 */
#ifndef RT_DISTILL_VERIFY_VALUE_H
#define RT_DISTILL_VERIFY_VALUE_H

#include <stdbool.h>
#include <stddef.h>

enum { RT_ANSWER_MAX = 4096 };
enum { RT_TEXT_OPEN = 1, RT_TEXT_CLOSE = 2, RT_SET_OPEN = 3, RT_SET_CLOSE = 4, RT_UNION = 5, RT_DOLLAR = 6 };

static inline bool rt_answer_digit(char c)
{
    return c >= '0' && c <= '9';
}
/* A letter, or a byte of a character beyond ASCII. */
static inline bool rt_answer_letter(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (unsigned char)c >= 0x80;
}

struct rt_answer_text {
    char s[RT_ANSWER_MAX + 64];
    size_t n;
};

/* false: longer than RT_ANSWER_MAX. */
bool rt_answer_normalise(const char *s, size_t n, struct rt_answer_text *out);

struct rt_value {
    bool exact;           /* num/den, den > 0, lowest terms; else only approx is known */
    bool decimal;         /* written with a decimal point: compared with the tolerance */
    bool rounded;         /* an integer too large for exactness is in it: near is not equal */
    bool dollars;         /* a dollar sign is in it */
    bool percent;         /* followed by %, which num/den and approx do not count */
    __int128 num, den;
    double approx;
    double step;          /* one in the last place of its decimals: no two numbers further apart are the same */
    const char *unit;     /* what follows the number: "cm", "square units"; inside the text */
    size_t n_unit;
};

/* Reads all of s[0 .. n) (normalised) as one number: literals with thousands commas or an exponent (1e-5), + - * / ^, parentheses, \frac, \sqrt, pi, mixed
 * numbers, a percent sign, a unit in words behind it. false where it is none. Depth at most 64. */
bool rt_value_read(const char *s, size_t n, struct rt_value *v);

/* Is s[0 .. n) a unit in words? In \text{} they are any words. glued: no space stands before it. */
bool rt_unit_read(const char *s, size_t n, bool glued);
/* Whether what follows the number is no unit, but says more than the number or another: "5 million", "6 or more". */
bool rt_unit_doubtful(const struct rt_value *v);
/* Not what a dollar sign can stand beside: another unit than dollars. */
bool rt_unit_no_dollars(const struct rt_value *v);
/* The same unit, but for case and marks. */
bool rt_unit_same(const struct rt_value *a, const struct rt_value *b);

enum rt_value_relation { RT_VALUE_EQUAL, RT_VALUE_DIFFER, RT_VALUE_UNSURE };
/* UNSURE: units differ, one says more than a unit does ("5 million"), or numbers too large for exactness are near each other. */
enum rt_value_relation rt_value_compare(const struct rt_value *a, const struct rt_value *b);

#endif
