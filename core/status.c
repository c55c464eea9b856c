#include "core/status.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Messages quote files, whose bytes are not for a terminal: control characters become '?'; lines and tabs stay. */
static void clean(char *s)
{
    for (; *s != '\0'; s++)
        if (((unsigned char)*s < 32 && *s != '\n' && *s != '\t') || *s == 127)
            *s = '?';
}

static void put(struct rt_err *err, enum rt_status status, const char *fmt, va_list ap)
{
    if (err == NULL || err->status != RT_OK)
        return;
    err->status = status;
    vsnprintf(err->msg, sizeof err->msg, fmt, ap);
    clean(err->msg);
}

enum rt_status rt_fail(struct rt_err *err, enum rt_status status, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    put(err, status, fmt, ap);
    va_end(ap);
    return status;
}

enum rt_status rt_fail_errno(struct rt_err *err, const char *fmt, ...)
{
    const int code = errno;
    const enum rt_status status = code == ENOMEM ? RT_NOMEM : RT_IO;
    if (err != NULL && err->status == RT_OK) {
        va_list ap;
        va_start(ap, fmt);
        put(err, status, fmt, ap);
        va_end(ap);
        const size_t n = strlen(err->msg);
        snprintf(err->msg + n, sizeof err->msg - n, ": %s", strerror(code));
    }
    return status;
}

void rt_err_context(struct rt_err *err, const char *fmt, ...)
{
    char head[sizeof err->msg], tail[sizeof err->msg];
    if (err == NULL || err->status == RT_OK)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(head, sizeof head, fmt, ap);
    va_end(ap);
    clean(head);
    memcpy(tail, err->msg, sizeof tail);
    const size_t n = strnlen(head, sizeof head);
    memcpy(err->msg, head, n);
    err->msg[n] = '\0';
    snprintf(err->msg + n, sizeof err->msg - n, ": %.*s", (int)sizeof tail, tail);
}

void rt_err_clear(struct rt_err *err)
{
    if (err != NULL) {
        err->status = RT_OK;
        err->msg[0] = '\0';
    }
}

const char *rt_status_text(enum rt_status status)
{
    switch (status) {
#define CASE(name, code, text) case RT_##name: return text;
        RT_STATUS_LIST(CASE)
#undef CASE
    case RT_STATUS_COUNT: break;
    }
    return "unknown status";
}

int rt_exit_code(enum rt_status status)
{
    switch (status) {
#define CASE(name, code, text) case RT_##name: return code;
        RT_STATUS_LIST(CASE)
#undef CASE
    case RT_STATUS_COUNT: break;
    }
    return 1;
}

void rt_assert_failed(const char *cond, const char *file, int line)
{
    fprintf(stderr, "retort: %s:%d: assertion failed: %s\n", file, line, cond);
    __builtin_trap();
}
