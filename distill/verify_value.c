#include "distill/verify_value.h"

#include <math.h>
#include <string.h>

#include "distill/verify.h"

enum { MAX_DEPTH = 64, MAX_POWER = 200 };
#define EXACT_LIMIT ((__int128)1 << 126) /* exact numbers stay inside (-2^126, 2^126): negation and absolute values are safe */

struct number {
    bool exact, decimal, rounded;
    __int128 num, den;
    double approx;
    double step; /* one in the last place of the decimals that it is made of */
};

struct reader {
    const char *s;
    size_t n, i;
    int depth;
};

/* ---- arithmetic ---- */

static struct number inexact(double v, const struct number *a, const struct number *b)
{
    const bool decimal = a->decimal || b->decimal;
    return (struct number){.decimal = decimal, .rounded = a->rounded || b->rounded, .approx = v, .step = decimal ? INFINITY : 0};
}

static struct number ratio(__int128 num, __int128 den, bool decimal)
{
    __int128 a = num < 0 ? -num : num, b = den < 0 ? -den : den;
    while (b != 0) {
        const __int128 r = a % b;
        a = b;
        b = r;
    }
    if (den < 0)
        a = -a;
    if (a != 0) {
        num /= a;
        den /= a;
    }
    return (struct number){.exact = true, .decimal = decimal, .num = num, .den = den, .approx = (double)num / (double)den};
}

static bool in_range(__int128 v)
{
    return v > -EXACT_LIMIT && v < EXACT_LIMIT;
}

/* Products past the range of exact numbers become inexact; `rounded` tells integers that lost digits from decimals. */
static struct number overflowed(double v, const struct number *a, const struct number *b)
{
    struct number r = inexact(v, a, b);
    r.rounded |= !r.decimal;
    return r;
}

static struct number product(const struct number *a, const struct number *b)
{
    __int128 num, den;
    if (!a->exact || !b->exact)
        return inexact(a->approx * b->approx, a, b);
    if (__builtin_mul_overflow(a->num, b->num, &num) || __builtin_mul_overflow(a->den, b->den, &den) || !in_range(num) || !in_range(den))
        return overflowed(a->approx * b->approx, a, b);
    return ratio(num, den, a->decimal || b->decimal);
}

static struct number multiply(const struct number *a, const struct number *b)
{
    struct number r = product(a, b);
    r.step = a->step * fabs(b->approx) + b->step * fabs(a->approx);
    return r;
}

static struct number sum(const struct number *a, const struct number *b, bool minus)
{
    __int128 x, y, num, den;
    const double v = minus ? a->approx - b->approx : a->approx + b->approx;
    if (!a->exact || !b->exact)
        return inexact(v, a, b);
    if (__builtin_mul_overflow(a->num, b->den, &x) || __builtin_mul_overflow(b->num, a->den, &y) ||
        (minus ? __builtin_sub_overflow(x, y, &num) : __builtin_add_overflow(x, y, &num)) || __builtin_mul_overflow(a->den, b->den, &den) ||
        !in_range(num) || !in_range(den))
        return overflowed(v, a, b);
    return ratio(num, den, a->decimal || b->decimal);
}

static struct number add(const struct number *a, const struct number *b, bool minus)
{
    struct number r = sum(a, b, minus);
    r.step = a->step + b->step;
    return r;
}

static bool divide(struct number *a, const struct number *b)
{
    struct number inverse = {.exact = b->exact, .decimal = b->decimal, .rounded = b->rounded, .num = b->den, .den = b->num, .approx = 1 / b->approx,
                             .step = b->step / (b->approx * b->approx)};
    if (b->exact ? b->num == 0 : b->approx == 0)
        return false;
    if (inverse.exact && inverse.den < 0) {
        inverse.num = -inverse.num;
        inverse.den = -inverse.den;
    }
    *a = multiply(a, &inverse);
    return true;
}

static bool power(struct number *a, const struct number *e)
{
    if (e->exact && e->den == 1 && e->num >= -MAX_POWER && e->num <= MAX_POWER) {
        struct number r = {.exact = true, .num = 1, .den = 1, .approx = 1};
        const int k = (int)(e->num < 0 ? -e->num : e->num);
        for (int i = 0; i < k; i++)
            r = multiply(&r, a);
        if (e->num >= 0) {
            *a = r;
            return true;
        }
        struct number one = {.exact = true, .num = 1, .den = 1, .approx = 1};
        if (!divide(&one, &r))
            return false;
        *a = one;
        return true;
    }
    *a = inexact(pow(a->approx, e->approx), a, e);
    a->rounded |= e->exact && e->den == 1 && !a->decimal;
    return !isnan(a->approx);
}

/* The whole root of v >= 0, -1 where there is none (or v is too large for this to be worth an answer). */
static __int128 whole_root(__int128 v)
{
    if (v < 0 || v > (__int128)1 << 100)
        return -1;
    __int128 r = (__int128)sqrtl((long double)v);
    while (r * r > v)
        r--;
    while ((r + 1) * (r + 1) <= v)
        r++;
    return r * r == v ? r : -1;
}

static bool root(struct number *a, const struct number *order)
{
    if (order->exact && order->num == 2 && order->den == 1 && a->exact) {
        const __int128 p = whole_root(a->num), q = whole_root(a->den);
        if (p >= 0 && q > 0) {
            *a = ratio(p, q, a->decimal);
            a->step = a->decimal ? INFINITY : 0;
            return true;
        }
    }
    if (order->approx == 3) {
        *a = inexact(cbrt(a->approx), a, order);
        return true;
    }
    if (a->approx < 0 || order->approx == 0)
        return false;
    *a = inexact(order->approx == 2 ? sqrt(a->approx) : pow(a->approx, 1 / order->approx), a, order);
    return true;
}

/* ---- grammar ---- */

static bool expression(struct reader *r, struct number *v);

static void spaces(struct reader *r)
{
    while (r->i < r->n && (r->s[r->i] == ' ' || r->s[r->i] == RT_DOLLAR))
        r->i++;
}

static bool ahead(const struct reader *r, const char *what)
{
    const size_t k = strlen(what);
    return r->n - r->i >= k && memcmp(r->s + r->i, what, k) == 0;
}

static bool command_ahead(const struct reader *r, const char *what)
{
    const size_t k = strlen(what);
    const char c = r->n - r->i > k ? r->s[r->i + k] : ' ';
    return ahead(r, what) && !((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'));
}

/* 1,234,567: groups of three behind one to three digits. "(1,234)", all of a text, is a pair. */
static bool thousands(const struct reader *r)
{
    size_t i = r->i, lead = 0;
    while (i < r->n && rt_answer_digit(r->s[i]))
        i++, lead++;
    if (lead < 1 || lead > 3 || r->s[r->i] == '0' || i == r->n || r->s[i] != ',')
        return false;
    while (i < r->n && r->s[i] == ',') {
        for (int k = 1; k <= 3; k++)
            if (i + (size_t)k >= r->n || !rt_answer_digit(r->s[i + (size_t)k]))
                return false;
        i += 4;
    }
    if (r->i == 1 && r->s[0] == '(' && i + 1 == r->n && r->s[i] == ')')
        return false;
    return i == r->n || !rt_answer_digit(r->s[i]);
}

static void take_digit(struct number *v, char c)
{
    const int d = c - '0';
    __int128 num;
    if (v->exact && !__builtin_mul_overflow(v->num, (__int128)10, &num) && !__builtin_add_overflow(num, (__int128)d, &num) && in_range(num))
        v->num = num;
    else
        v->exact = false;
    v->approx = v->approx * 10 + d;
}

/* "e-5" behind a literal; `step` is one in its last place. */
static void scientific(struct reader *r, struct number *v, double step)
{
    size_t i = r->i;
    int e = 0;
    if (i == r->n || (r->s[i] != 'e' && r->s[i] != 'E'))
        return;
    const bool down = ++i < r->n && r->s[i] == '-';
    i += i < r->n && (r->s[i] == '-' || r->s[i] == '+');
    const size_t from = i;
    for (; i < r->n && rt_answer_digit(r->s[i]) && i - from < 4; i++)
        e = 10 * e + (r->s[i] - '0');
    if (i == from || (i < r->n && (rt_answer_digit(r->s[i]) || rt_answer_letter(r->s[i]))))
        return;
    const struct number ten = {.exact = true, .num = 10, .den = 1, .approx = 10};
    const bool decimal = v->decimal || down;
    struct number scale = {.exact = true, .num = 1, .den = 1, .approx = 1};
    for (int k = 0; k < e; k++)
        scale = multiply(&scale, &ten);
    if (down)
        divide(v, &scale);
    else
        *v = multiply(v, &scale);
    v->decimal = decimal;
    v->step = decimal ? step * pow(10, down ? -e : e) : 0;
    r->i = i;
}

static bool literal(struct reader *r, struct number *v)
{
    const bool commas = thousands(r);
    double scale = 1;
    *v = (struct number){.exact = true, .den = 1};
    const size_t from = r->i;
    for (; r->i < r->n && (rt_answer_digit(r->s[r->i]) || (commas && r->s[r->i] == ',')); r->i++)
        if (r->s[r->i] != ',')
            take_digit(v, r->s[r->i]);
    v->rounded = !v->exact;
    bool any = r->i > from;
    if (r->i + 1 < r->n && r->s[r->i] == '.' && rt_answer_digit(r->s[r->i + 1])) {
        any = v->decimal = true;
        for (r->i++; r->i < r->n && rt_answer_digit(r->s[r->i]); r->i++) {
            take_digit(v, r->s[r->i]);
            scale *= 10;
            v->exact = v->exact && !__builtin_mul_overflow(v->den, (__int128)10, &v->den) && in_range(v->den);
        }
    }
    if (!any)
        return false;
    if (v->exact)
        *v = ratio(v->num, v->den, v->decimal);
    else
        v->approx /= scale;
    v->step = v->decimal ? 1 / scale : 0;
    scientific(r, v, 1 / scale);
    return !isnan(v->approx);
}

/* {...}, or the one digit or other primary that \frac and \sqrt take without braces. */
static bool primary(struct reader *r, struct number *v);
static bool argument(struct reader *r, struct number *v)
{
    spaces(r);
    if (r->i < r->n && rt_answer_digit(r->s[r->i])) {
        *v = (struct number){.exact = true, .den = 1};
        take_digit(v, r->s[r->i++]);
        return true;
    }
    return primary(r, v);
}

static bool fraction(struct reader *r, struct number *v)
{
    struct number below;
    r->i += strlen("\\frac");
    return argument(r, v) && argument(r, &below) && divide(v, &below);
}

static bool enclosed(struct reader *r, char close, struct number *v)
{
    r->i++;
    if (!expression(r, v))
        return false;
    spaces(r);
    return r->i < r->n && r->s[r->i] == close && (r->i++, true);
}

static bool square_root(struct reader *r, struct number *v)
{
    struct number order = {.exact = true, .num = 2, .den = 1, .approx = 2};
    r->i += strlen("\\sqrt");
    spaces(r);
    if (ahead(r, "[") && !enclosed(r, ']', &order))
        return false;
    return argument(r, v) && root(v, &order);
}

/* {12} or one digit */
static bool whole_argument(struct reader *r, struct number *v)
{
    spaces(r);
    if (!ahead(r, "{"))
        return r->i < r->n && rt_answer_digit(r->s[r->i]) && argument(r, v);
    r->i++;
    return r->i < r->n && rt_answer_digit(r->s[r->i]) && literal(r, v) && !v->decimal && ahead(r, "}") && (r->i++, true);
}

/* What may follow a whole number to make a mixed one: \frac{a}{b} of whole numbers, or " a/b". Nothing nested is read here: it would
 * be read again as a factor, twice as often at each depth. */
static bool mixed(struct reader *r, struct number *v)
{
    struct reader p = *r;
    struct number part, below;
    spaces(&p);
    if (command_ahead(&p, "\\frac")) {
        p.i += strlen("\\frac");
        if (!whole_argument(&p, &part) || !whole_argument(&p, &below) || !divide(&part, &below))
            return true;
    } else if (p.i > r->i && p.i < p.n && rt_answer_digit(p.s[p.i])) {
        if (!literal(&p, &part) || !ahead(&p, "/"))
            return true;
        p.i++;
        if (!literal(&p, &below) || part.decimal || below.decimal || !divide(&part, &below))
            return true;
    } else {
        return true;
    }
    if (part.approx >= 1 || part.approx < 0)
        return true; /* a product */
    *v = add(v, &part, false);
    r->i = p.i;
    return true;
}

static bool primary(struct reader *r, struct number *v)
{
    spaces(r);
    if (r->i == r->n || ++r->depth > MAX_DEPTH)
        return false;
    const char c = r->s[r->i];
    bool ok = false;
    if (rt_answer_digit(c) || c == '.')
        ok = literal(r, v) && (v->decimal || mixed(r, v));
    else if (c == '(')
        ok = enclosed(r, ')', v);
    else if (c == '{')
        ok = enclosed(r, '}', v);
    else if (command_ahead(r, "\\frac"))
        ok = fraction(r, v);
    else if (command_ahead(r, "\\sqrt"))
        ok = square_root(r, v);
    else if (ahead(r, "\\frac") || ahead(r, "\\sqrt"))
        ok = false;
    else if (command_ahead(r, "pi"))
        ok = (r->i += 2, *v = (struct number){.approx = 3.14159265358979323846}, true);
    else if (command_ahead(r, "inf"))
        ok = (r->i += 3, *v = (struct number){.approx = INFINITY}, true);
    r->depth--;
    return ok;
}

static bool factor(struct reader *r, struct number *v)
{
    bool minus = false;
    for (spaces(r); r->i < r->n && (r->s[r->i] == '-' || r->s[r->i] == '+'); r->i++, spaces(r))
        minus ^= r->s[r->i] == '-';
    if (!primary(r, v))
        return false;
    spaces(r);
    if (ahead(r, "^") || ahead(r, "**")) {
        struct number e;
        bool down = false;
        r->i += r->s[r->i] == '^' ? 1 : 2;
        spaces(r);
        if (ahead(r, "-")) {
            down = true;
            r->i++;
        }
        if (!primary(r, &e)) /* 2^10 is 1024, whatever TeX would print */
            return false;
        if (down) {
            e.num = -e.num;
            e.approx = -e.approx;
        }
        if (!power(v, &e))
            return false;
    }
    if (minus) {
        v->num = -v->num;
        v->approx = -v->approx;
    }
    return true;
}

static bool term(struct reader *r, struct number *v)
{
    struct number b;
    if (!factor(r, v))
        return false;
    for (;;) {
        spaces(r);
        const bool times = ahead(r, "*"), over = ahead(r, "/");
        if (times || over) {
            struct reader p = *r;
            p.i++;
            if (!factor(&p, &b)) /* "3 m/s": a unit begins further on, or it is no number */
                return false;
            *r = p;
        } else if (command_ahead(r, "\\frac") || command_ahead(r, "\\sqrt") || ahead(r, "(") || command_ahead(r, "pi")) {
            if (!factor(r, &b))
                return false;
        } else {
            return true;
        }
        if (over) {
            if (!divide(v, &b))
                return false;
        } else {
            *v = multiply(v, &b);
        }
    }
}

static bool expression(struct reader *r, struct number *v)
{
    struct number b;
    if (++r->depth > MAX_DEPTH || !term(r, v))
        return false;
    for (spaces(r); r->i < r->n && (r->s[r->i] == '+' || r->s[r->i] == '-'); spaces(r)) {
        const bool minus = r->s[r->i++] == '-';
        if (!term(r, &b))
            return false;
        *v = add(v, &b, minus);
    }
    r->depth--;
    return true;
}

/* ---- values ---- */

bool rt_value_read(const char *s, size_t n, struct rt_value *v)
{
    struct reader r = {.s = s, .n = n};
    struct number x;
    *v = (struct rt_value){0};
    if (!expression(&r, &x) || isnan(x.approx))
        return false;
    const bool glued = r.i > 0 && s[r.i - 1] != ' ';
    spaces(&r);
    if (r.i < n && s[r.i] == '%') {
        v->percent = true;
        r.i++;
        spaces(&r);
    }
    v->dollars = memchr(s, RT_DOLLAR, n) != NULL;
    v->exact = x.exact;
    v->decimal = x.decimal;
    v->rounded = x.rounded || (isinf(x.approx) && memmem(s, n, "inf", 3) == NULL);
    v->num = x.num;
    v->den = x.den;
    v->approx = x.approx;
    v->step = x.step;
    v->unit = s + r.i;
    v->n_unit = n - r.i;
    return rt_unit_read(v->unit, v->n_unit, glued);
}

static bool near(double a, double b, double tolerance)
{
    return a == b || (isfinite(a) && isfinite(b) && fabs(a - b) <= tolerance);
}

/* a * scale_a against b * scale_b, scales 1 or 100. */
static bool equal(const struct rt_value *a, const struct rt_value *b, int scale_a, int scale_b)
{
    __int128 x, y;
    if (a->exact && b->exact && !__builtin_mul_overflow(a->num, (__int128)scale_a, &x) && !__builtin_mul_overflow(x, b->den, &x) &&
        !__builtin_mul_overflow(b->num, (__int128)scale_b, &y) && !__builtin_mul_overflow(y, a->den, &y)) {
        if (x == y)
            return true;
        if (!a->decimal && !b->decimal)
            return false;
    }
    const double u = a->approx * scale_a, v = b->approx * scale_b, larger = fmax(fabs(u), fabs(v));
    if (!a->decimal && !b->decimal)
        return near(u, v, 1e-12 * larger);
    return near(u, v, fmin(RT_VERIFY_TOLERANCE * larger, 1.01 * fmax(a->step * scale_a, b->step * scale_b)));
}

enum rt_value_relation rt_value_compare(const struct rt_value *a, const struct rt_value *b)
{
    bool same = equal(a, b, 1, 1);
    if (a->percent != b->percent) /* 50% is 0.5, and 50 where the reference leaves the sign out */
        same = same || equal(a, b, b->percent ? 100 : 1, a->percent ? 100 : 1);
    if ((same && (a->rounded || b->rounded)) || (a->n_unit > 0 && b->n_unit > 0 && !rt_unit_same(a, b)))
        return RT_VALUE_UNSURE;
    if ((rt_unit_doubtful(a) || rt_unit_doubtful(b)) && !(a->n_unit > 0 && b->n_unit > 0))
        return RT_VALUE_UNSURE;
    if ((a->dollars && rt_unit_no_dollars(b)) || (b->dollars && rt_unit_no_dollars(a)))
        return RT_VALUE_UNSURE;
    return same ? RT_VALUE_EQUAL : RT_VALUE_DIFFER;
}
