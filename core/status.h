/* Error values.
 *
 * A function that can fail returns enum rt_status and takes struct rt_err *err last. The first error wins: rt_fail writes
 * the message only if err holds none yet. err is untouched on success and may be NULL. A message is complete enough to
 * print as it is: what was wrong, in which file and where, what was expected, what to do; lower case, no full stop.
 */
#ifndef RT_CORE_STATUS_H
#define RT_CORE_STATUS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* name, exit code of a command that ends with it, text */
#define RT_STATUS_LIST(X) \
    X(OK, 0, "ok") \
    X(IO, 1, "input/output error") \
    X(REFUSED, 1, "refused") \
    X(USAGE, 2, "wrong usage") \
    X(FORMAT, 3, "bad input file") \
    X(SHAPE, 3, "wrong shape") \
    X(UNSUPPORTED, 3, "not supported") \
    X(NUMERIC, 4, "numeric failure") \
    X(NOMEM, 5, "out of memory") \
    X(DEVICE, 5, "device failure") \
    X(INTERRUPTED, 130, "interrupted") \
    X(INTERNAL, 1, "internal error")

enum rt_status {
#define RT_STATUS_ENUM(name, code, text) RT_##name,
    RT_STATUS_LIST(RT_STATUS_ENUM)
#undef RT_STATUS_ENUM
    RT_STATUS_COUNT
};

struct rt_err {
    enum rt_status status; /* RT_OK: holds no error */
    char msg[508];         /* always terminated; longer messages are cut; no control characters but line feed and tab */
};

/* Records status and message in err (unless err is NULL or holds an error already) and returns status. */
enum rt_status rt_fail(struct rt_err *err, enum rt_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* rt_fail(IO) for a failed system call: appends strerror(errno). ENOMEM becomes RT_NOMEM. */
enum rt_status rt_fail_errno(struct rt_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* "what: " put in front of the message that err holds (to say in which file or layer a deeper error arose). */
void rt_err_context(struct rt_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

void rt_err_clear(struct rt_err *err);
const char *rt_status_text(enum rt_status status);
/* 0 done, 1 failed at run time, 2 usage, 3 bad input file, 4 numeric failure, 5 memory or device, 130 interrupted */
int rt_exit_code(enum rt_status status);

/* In a function with a local `enum rt_status st` and one label `out:`. */
#define RT_TRY(expr) \
    do { \
        st = (expr); \
        if (st != RT_OK) \
            goto out; \
    } while (0)

/* Like RT_TRY(rt_fail(...)): RT_FAIL(err, FORMAT, "fmt", ...) */
#define RT_FAIL(err, name, ...) \
    do { \
        st = rt_fail((err), RT_##name, __VA_ARGS__); \
        goto out; \
    } while (0)

/* Programmer errors only, never input: prints the place and traps; stays on in release builds. */
#define RT_ASSERT(cond) \
    do { \
        if (!(cond)) \
            rt_assert_failed(#cond, __FILE__, __LINE__); \
    } while (0)
void rt_assert_failed(const char *cond, const char *file, int line);

#ifdef __cplusplus
}
#endif
#endif
