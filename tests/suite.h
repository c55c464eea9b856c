/* Tests: cmocka suites in one binary.
 *
 * A file tests/test_NAME.c ends with
 *     static const struct CMUnitTest tests[] = { cmocka_unit_test(...), ... };
 *     RT_SUITE(NAME, tests)
 * and is found by the Makefile. `retort-tests [SUITE|SUITE.test ...]` runs all or some; `--list` names them.
 */
#ifndef RT_TESTS_SUITE_H
#define RT_TESTS_SUITE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

struct rt_suite {
    const char *name;
    const struct CMUnitTest *tests;
    size_t n;
};

#define RT_SUITE(suite, array) const struct rt_suite rt_suite_##suite = {#suite, array, sizeof(array) / sizeof((array)[0])};

/* A path inside a directory of this run that is removed at the end; name may hold '/'. Static storage, a ring of 16. */
const char *test_tmp(const char *name);
/* A file that ships with the project, found from the repository root. */
const char *test_data(const char *name);
/* Says why and skips the current test; it counts as neither passed nor failed. */
void test_skipped(const char *reason);
#define TEST_SKIP(reason) \
    do { \
        test_skipped(reason); \
        skip(); \
    } while (0)

/* |a-b|2 / |b|2 over n values; NaN anywhere gives infinity. */
double test_rel_error(const float *a, const float *b, int64_t n);

/* assert_ok(expr): fails with the message of `err`, a local struct rt_err. */
#define assert_ok(expr) \
    do { \
        if ((expr) != RT_OK) \
            fail_msg("%s: %s", #expr, err.msg); \
    } while (0)
/* assert_status(expr, FORMAT): the status is exactly this one, and a message is there. Clears err. */
#define assert_status(expr, name) \
    do { \
        const enum rt_status st_ = (expr); \
        if (st_ != RT_##name) \
            fail_msg("%s: status %d (%s), expected " #name, #expr, (int)st_, err.msg); \
        assert_true(err.msg[0] != '\0'); \
        rt_err_clear(&err); \
    } while (0)

#endif
