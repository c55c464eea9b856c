/* Answers: extraction, normalisation, comparison in three values, hostile input. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "distill/verify.h"
#include "distill/verify_value.h"
#include "tests/suite.h"

static const char *judge(const char *gold, const char *given)
{
    return rt_verdict_name(rt_verify_answers(gold, strlen(gold), given, strlen(given)));
}

static void check_all(const char *const (*pairs)[2], size_t n, const char *verdict)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(judge(pairs[i][0], pairs[i][1]), verdict) != 0)
            fail_msg("gold '%s', given '%s': %s, expected %s", pairs[i][0], pairs[i][1], judge(pairs[i][0], pairs[i][1]), verdict);
        if (strcmp(judge(pairs[i][1], pairs[i][0]), verdict) != 0)
            fail_msg("gold '%s', given '%s': %s, expected %s (exchanged)", pairs[i][1], pairs[i][0], judge(pairs[i][1], pairs[i][0]), verdict);
    }
}
#define CHECK_ALL(pairs, verdict) check_all(pairs, sizeof(pairs) / sizeof(pairs)[0], verdict)

static void equal_answers(void **state)
{
    (void)state;
    static const char *const pairs[][2] = {
        {"108", "108"}, {"108", " 108. "}, {"108", "108.0"}, {"108", "$108$"}, {"108", "\\(108\\)"}, {"108", "+108"}, {"-3", "\xE2\x88\x92" "3"},
        {"1/2", "0.5"}, {"1/2", "\\frac{1}{2}"}, {"1/2", "\\dfrac12"}, {"1/2", "\\frac 1 2"}, {"1/2", "\\tfrac{2}{4}"}, {"1/2", "50\\%"}, {"50", "50\\%"},
        {"-\\frac{3}{4}", "\\frac{-3}{4}"}, {"-\\frac{3}{4}", "-0.75"}, {"1\\frac{1}{2}", "\\frac{3}{2}"}, {"1 1/2", "1.5"}, {"-1\\frac12", "-1.5"},
        {"1,234,567", "1234567"}, {"1{,}000", "1000"}, {"10\\,000", "10,000"}, {"\\$1,250.50", "1250.5"},
        {"90", "90^\\circ"}, {"90", "90^{\\circ}"}, {"90", "90\xC2\xB0"}, {"5", "5 \\text{ cm}"}, {"5", "5\\ \\mathrm{cm}"}, {"5", "5 cm"}, {"5 cm", "5cm"},
        {"12", "12 square units"}, {"12", "12 \\text{ units}^2"}, {"40", "40 km/h"}, {"5", "5 m/s"},
        {"3.14159265", "3.14159266"}, {"\\pi", "3.14159265"}, {"2\\pi", "2 \\cdot \\pi"}, {"2\\sqrt{2}", "\\sqrt{8}"}, {"\\sqrt{16}", "4"}, {"\\sqrt[3]{27}", "3"},
        {"2^{10}", "1024"}, {"2^10", "1024"}, {"10^{-3}", "0.001"}, {"(3)(4)", "12"}, {"3\\times 4", "12"}, {"\\infty", "\\infty"}, {"-\\infty", "- \\infty"},
        {"x = 5", "5"}, {"x=5", "y = 5"}, {"(1,2)", "(1, 2)"}, {"(1/2, 3)", "(0.5,3)"}, {"\\left(1,2\\right)", "(1,2)"}, {"\\{1,2,3\\}", "\\{3, 1, 2\\}"},
        {"1,2", "2, 1"}, {"1, 2", "\\{2,1\\}"}, {"1 \\text{ and } 2", "2,1"}, {"1, 2, \\text{ and } 3", "3,2,1"}, {"x=1, x=2", "2, 1"}, {"(0,1]", "(0, 1.0]"}, {"[0,1)\\cup(2,3)", "(2,3) \\cup [0,1)"},
        {"\\{5\\}", "\\{ 5 \\}"}, {"\\{(1,2),(3,4)\\}", "\\{(3,4),(1,2)\\}"},
        {"pump", "pump"}, {"pump", "Pump"}, {"pump", "\\text{pump}"}, {"fuse", "\\textbf{Fuse}."}, {"New York", "new york"}, {"Yes", "yes"}, {"no", "No"},
        {"B", "(B)"}, {"B", "\\text{(B)}"}, {"B", "B."}, {"b", "B) 12"}, {"B", "\\textbf{(B)} 12"},
        {"\\{5\\}", "5"}, {"\\$5", "5 dollars"}, {"-\\$5", "-5"}, {"\\$5", "5\\$"}, {"\\{1,2\\}", "2, 1"}, {"(0,100)", "(0, 100.0)"}, {"0.00001", "1e-05"}, {"1e5", "100000"}, {"6.02e23", "6.02\\times10^{23}"},
        {"x=5, y=3", "y = 3, x = 5"}, {"x=5, y=3", "5, 3"}, {"x=1, x=2", "x=2, x=1"}, {"1 000 000", "1000000"},
        {"5 \\text{ million}", "5 million"},
        {"12", "12\\text{ cm}^2"}, {"5", "5\\text{ m}/s"}, {"10", "10\\,\\text{N}\\cdot\\text{m}"}, {"A", "(A) 5"}, {"A", "A. pump"}, {"A", "A. a fuse"},
        {"x+1", "x + 1"}, {"\\frac{x}{2}", "\\dfrac{x}{2}"}, {"\\boxed{7}", "7"}, {"123456789012345678901234567890", "123456789012345678901234567890"},
        {"123456789012345678901234567890123456789012345678901234567890", "123456789012345678901234567890123456789012345678901234567890"},
    };
    CHECK_ALL(pairs, "correct");
}

static void different_answers(void **state)
{
    (void)state;
    static const char *const pairs[][2] = {
        {"108", "109"}, {"108", "-108"}, {"1/3", "0.333"}, {"1/2", "1/3"}, {"50\\%", "0.51"}, {"1,234", "1.234"}, {"\\sqrt{2}", "1.41"}, {"2\\pi", "6.28"},
        {"(1,2)", "(2,1)"}, {"(1,2)", "[1,2]"}, {"(0,1]", "(0,1)"}, {"\\{1,2\\}", "\\{1,3\\}"}, {"\\{1,2\\}", "\\{1,2,3\\}"},
        {"\\{1,1\\}", "\\{1,2\\}"}, {"1,2", "3"},
        {"pump", "fuse"}, {"pump", "pumps"}, {"pump", "42"}, {"Yes", "No"}, {"A", "B"}, {"A", "\\text{(C)}"}, {"x", "y"}, {"5 cm", "6 cm"}, {"0", "\\infty"},
        {"99999999999999999999", "100000000000000000000"}, {"123456789012345678901234567890", "123456789012345678901234567891"},
        {"2^{100}", "2^{100}+1"},
        {"x=5, y=3", "x=3, y=5"}, {"x=1,y=-1", "x=-1,y=1"}, {"2 3/4", "23/4"}, {"\\{1,234\\}", "\\{1234\\}"}, {"\\{1,2\\}", "(1,2)"}, {"(0,100)", "100"},
        {"12345678", "12345679.0"}, {"1000000", "1000000.5"}, {"1234567.89", "1234567.00"},
    };
    CHECK_ALL(pairs, "wrong");
}

static void undecided_answers(void **state)
{
    (void)state;
    static const char *const pairs[][2] = {
        {"x+1", "1+x"}, {"2xy", "2yx"}, {"\\frac{x}{2}", "x/2"}, {"5 m", "5 cm"}, {"5 \\text{ m}", "5 \\text{ cm}"}, {"108", ""}, {"108", "  "},
        {"108", "$$"}, {"ab", "ba"},
        {"10^{400}", "10^{500}"}, {"3:4", "0.75"}, {"5", "5 million"}, {"\\$5", "5 cents"}, {"\\$0.50", "50 cents"}, {"\\$5", "\\$5 \\text{ billion}"},
        {"10", "10 \\text{ to } 20"}, {"2", "2 \\text{ hours } 30 \\text{ minutes}"},
        {"3", "3 \\text{ remainder } 1"}, {"5", "5 \\text{ or more}"}, {"5", "5 \\text{ if } x > 0"}, {"8", "2^3^2"},
        {"5", "5m/n"}, {"5", "5 \xE2\x88\x9Ax"}, {"2.5 hours", "2 hours 30 minutes"},
        {"A", "A) or C)"}, {"(A)", "(A), (C)"}, {"B", "B. C."}, {"A", "A: yes, B: no"},
        {"(x)(y)", "(x)(z)"}, {"(x)^2", "(x)^3"}, {"x.y", "x.z"}, {"x=5, y=3", "3, 5"},
        {"x=5, y=3", "a=5, b=3"}, {"\\begin{pmatrix}12\\\\3\\end{pmatrix}", "\\begin{pmatrix}1\\\\23\\end{pmatrix}"}, {"\\sin x", "\\cos x"}, {"x=", "5"},
        {"123456789012345678901234567890123456789012345678901234567890", "123456789012345678901234567890123456789012345678901234567891"},
    };
    CHECK_ALL(pairs, "unparsed");
}

static void expect(enum rt_verify_mode mode, const char *text, const char *answer, const char *verdict, const char *found)
{
    const char *s;
    size_t n;
    const enum rt_verdict v = rt_verify(mode, text, strlen(text), answer, strlen(answer), &s, &n);
    if (strcmp(rt_verdict_name(v), verdict) != 0)
        fail_msg("'%s' against '%s': %s, expected %s", text, answer, rt_verdict_name(v), verdict);
    if (found == NULL)
        assert_null(s);
    else if (s == NULL || n != strlen(found) || memcmp(s, found, n) != 0)
        fail_msg("'%s': found '%.*s', expected '%s'", text, s == NULL ? 0 : (int)n, s == NULL ? "" : s, found);
}

static void where_the_answer_stands(void **state)
{
    (void)state;
    expect(RT_VERIFY_BOXED, "<think>\n\\boxed{1}</think>\nIt is \\boxed{2}.", "2", "correct", "2");
    expect(RT_VERIFY_BOXED, "<think>\n\\boxed{2}</think>\nIt is two.", "2", "unparsed", NULL);
    expect(RT_VERIFY_BOXED, "<think>\nIs it \\boxed{2}? Let me", "2", "unparsed", NULL);
    expect(RT_VERIFY_EXACT, "<think>\npump", "pump", "unparsed", "");
    expect(RT_VERIFY_BOXED, "<think>a</think>\\boxed{1}</think> so \\boxed{3}", "3", "correct", "3");
    expect(RT_VERIFY_BOXED, "\\boxed{1}, no: \\boxed{ \\frac{1}{2} }", "0.5", "correct", "\\frac{1}{2}");
    expect(RT_VERIFY_BOXED, "\\fbox{3}", "3", "correct", "3");
    expect(RT_VERIFY_BOXED, "$\\boxed 7$", "7", "correct", "7");
    expect(RT_VERIFY_BOXED, "\\boxed{\\{1, 2\\}}", "\\{2,1\\}", "correct", "\\{1, 2\\}");
    expect(RT_VERIFY_BOXED, "\\boxed{1} then \\boxed{2", "1", "unparsed", NULL);
    expect(RT_VERIFY_BOXED, "\\boxedness{1}", "1", "unparsed", NULL);
    expect(RT_VERIFY_BOXED, "\\boxed{1}, no: \\boxed\\frac{1}{2}", "0.5", "correct", "\\frac{1}{2}");
    expect(RT_VERIFY_BOXED, "\\boxed{1}, no: \\boxed\n{2}", "1", "wrong", "2");
    expect(RT_VERIFY_BOXED, "\\boxed{1}, no: \\boxed-2", "1", "wrong", "-2");
    expect(RT_VERIFY_BOXED, "\\boxed{1}, in `\\boxed`", "1", "correct", "1");
    expect(RT_VERIFY_BOXED, "\\boxed{}", "1", "unparsed", "");
    expect(RT_VERIFY_BOXED, "\\boxed", "1", "unparsed", NULL);
    expect(RT_VERIFY_BOXED, "\\boxed{5\\", "5", "unparsed", NULL);
    expect(RT_VERIFY_EXACT, "<think>x</think>\n pump \n", "pump", "correct", "pump");
    expect(RT_VERIFY_EXACT, "<think>x</think>\n Pump", "pump", "wrong", "Pump");
    expect(RT_VERIFY_EXACT, "<think>x</think>\n", "pump", "unparsed", "");
    expect(RT_VERIFY_NONE, "anything", "pump", "correct", NULL);
    assert_int_equal(rt_verify_mode_of("boxed"), RT_VERIFY_BOXED);
    assert_int_equal(rt_verify_mode_of("exact"), RT_VERIFY_EXACT);
    assert_int_equal(rt_verify_mode_of("none"), RT_VERIFY_NONE);
}

/* Each of these took quadratic or exponential time, or too deep a stack, in one careless design or another; the size makes that show. */
static void bombs_are_unparsed(void **state)
{
    (void)state;
    static const char *const unit[] = {"\\boxed{", "{", "\\", "\\boxed", "</think", "<", "\\boxed{}</think>", "\\boxed{{}"};
    const size_t size = 8 << 20;
    char *s = malloc(size);
    assert_non_null(s);
    for (size_t k = 0; k < sizeof unit / sizeof *unit; k++) {
        const size_t m = strlen(unit[k]);
        for (size_t i = 0; i < size; i++)
            s[i] = unit[k][i % m];
        assert_int_equal(rt_verify(RT_VERIFY_BOXED, s, size, "1", 1, NULL, NULL), RT_VERDICT_UNPARSED);
    }
    memset(s, '7', size);
    memcpy(s, "\\boxed{", 7);
    s[size - 1] = '}';
    assert_int_equal(rt_verify(RT_VERIFY_BOXED, s, size, "7", 1, NULL, NULL), RT_VERDICT_UNPARSED);
    free(s);
}

static void dense_answers_end_soon(void **state)
{
    (void)state;
    static const char *const unit[] = {"(", "{", "\\{", "[", "1\\frac{", "\\frac{", "\\sqrt{", "1^{", "2^", "-", "1,", "{1},", "\\{1\\},", "\\{\\{1,2\\},\\{3\\}\\},", "1/", "\\text{",
                                       "1+", "\\cup", "x=", "1^{99}+", "\\frac1", "9", "(1,", "\\{x,", "1/3+", "\xE2\x88\x92", "\xFF", "\1\2\3\4\5", "^\\circ", "^{\\circ"};
    char a[RT_ANSWER_MAX], b[RT_ANSWER_MAX];
    for (size_t k = 0; k < sizeof unit / sizeof *unit; k++) {
        const size_t m = strlen(unit[k]);
        for (size_t i = 0; i < sizeof a; i++)
            a[i] = b[i] = unit[k][i % m];
        b[sizeof b - 1] = '2';
        rt_verify_answers(a, sizeof a, b, sizeof b);
        for (size_t i = 0; i < sizeof b; i++) /* opened by the first half, closed by the second */
            b[i] = i < sizeof b / 2 ? unit[k][i % m] : strchr(unit[k], '(') ? ')' : '}';
        rt_verify_answers(a, sizeof a, b, sizeof b);
        rt_verify_answers("1", 1, b, sizeof b);
    }
    assert_int_equal(rt_verify_answers("1", 1, a, sizeof a + 0), RT_VERDICT_UNPARSED);
}

/* Any bytes give one of three verdicts; an answer equals itself unless it is nothing. */
static void any_bytes_will_do(void **state)
{
    (void)state;
    static const char alphabet[] = "\\{}()[],.^/+-*%$ 0123456789abxfrctinsqpodeuglm=<>\1\2\xC2\xB0\xE2";
    uint32_t r = 12345;
    for (int round = 0; round < 8000; round++) {
        char a[48], b[48];
        for (size_t i = 0; i < sizeof a; i++) {
            r = r * 1664525u + 1013904223u;
            a[i] = alphabet[(r >> 8) % (sizeof alphabet - 1)];
            b[i] = (r >> 28) < 2 ? '1' : a[i];
        }
        const size_t n = 1 + (r >> 4) % sizeof a;
        assert_in_range(rt_verify_answers(a, n, b, n), RT_VERDICT_CORRECT, RT_VERDICT_UNPARSED);
        assert_int_not_equal(rt_verify_answers(a, n, a, n), RT_VERDICT_WRONG);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(equal_answers),        cmocka_unit_test(different_answers),  cmocka_unit_test(undecided_answers),
    cmocka_unit_test(where_the_answer_stands), cmocka_unit_test(bombs_are_unparsed), cmocka_unit_test(dense_answers_end_soon),
    cmocka_unit_test(any_bytes_will_do),
};
RT_SUITE(verify, tests)
