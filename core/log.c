#include "core/log.h"

#include <math.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define LIVE_EVERY 0.1  /* seconds between two live lines */
#define PLAIN_EVERY 10.0

double rt_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void rt_log_init(struct rt_log *log, FILE *out, enum rt_log_level level)
{
    *log = (struct rt_log){.level = level, .out = out, .tty = isatty(fileno(out)) == 1};
}

static void clear_live(struct rt_log *log)
{
    if (log->live)
        fputs("\r\033[K", log->out);
    log->live = false;
}

/* Names and texts out of files must not steer the terminal. */
static void defuse(char *s)
{
    for (; *s != '\0'; s++)
        if (((unsigned char)*s < 0x20 && *s != '\n' && *s != '\t') || *s == 0x7f)
            *s = '?';
}

void rt_log(struct rt_log *log, enum rt_log_level level, const char *fmt, ...)
{
    static const char *const head[] = {"error: ", "warning: ", "", ""};
    char text[4096];
    va_list ap;
    if (log == NULL || (level > log->level && (log->copy == NULL || level > RT_LOG_INFO)))
        return;
    va_start(ap, fmt);
    const int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (n < 0)
        return;
    if ((size_t)n >= sizeof text)
        strcpy(text + sizeof text - 4, "...");
    defuse(text);
    if (level <= log->level) {
        clear_live(log);
        fprintf(log->out, "%s%s\n", head[level], text);
        fflush(log->out);
    }
    if (log->copy != NULL) {
        fprintf(log->copy, "%s%s\n", head[level], text);
        fflush(log->copy);
    }
}

void rt_progress_begin(struct rt_progress *p, struct rt_log *log, const char *what, const char *unit, int64_t total)
{
    const double now = rt_now();
    *p = (struct rt_progress){.log = log, .what = what, .unit = unit, .total = total, .t_start = now, .t_last = now};
}

/* "scoring 12.0k/50.0k tokens (24%), 310/s, 2m03s left, layer 3/61" */
static void progress_text(const struct rt_progress *p, double now, const char *note, char *out, size_t cap)
{
    char a[32], b[32];
    size_t at = 0;
    const double elapsed = now - p->t_start;
    const double rate = elapsed > 0 ? (double)(p->done - p->first) / elapsed : 0;
#define ADD(...) \
    do { \
        if (at < cap) \
            at += (size_t)snprintf(out + at, cap - at, __VA_ARGS__); \
    } while (0)
    ADD("%s %s", p->what, rt_human_count(a, (double)p->done));
    if (p->total > 0)
        ADD("/%s", rt_human_count(a, (double)p->total));
    ADD(" %s", p->unit);
    if (p->total > 0)
        ADD(" (%d%%)", (int)(100.0 * (double)p->done / (double)p->total));
    if (rate > 0)
        ADD(", %s/s", rt_human_count(a, rate));
    if (rate > 0 && p->total > p->done)
        ADD(", %s left", rt_human_time(b, (double)(p->total - p->done) / rate));
    if (note != NULL && note[0] != '\0')
        ADD(", %s", note);
#undef ADD
}

void rt_progress_update(struct rt_progress *p, int64_t done, const char *note)
{
    char text[256];
    struct rt_log *log = p->log;
    p->done = done;
    if (log == NULL || log->level < RT_LOG_INFO)
        return;
    const double now = rt_now();
    if (now - p->t_last < (log->tty ? LIVE_EVERY : PLAIN_EVERY))
        return;
    p->t_last = now;
    progress_text(p, now, note, text, sizeof text);
    if (!log->tty) {
        rt_log(log, RT_LOG_INFO, "%s", text);
        return;
    }
    defuse(text);
    struct winsize ws; /* a line that wraps could not be overwritten */
    if (ioctl(fileno(log->out), TIOCGWINSZ, &ws) == 0 && ws.ws_col > 1 && strlen(text) >= ws.ws_col)
        text[ws.ws_col - 1] = '\0';
    fprintf(log->out, "\r%s\033[K", text);
    fflush(log->out);
    log->live = true;
}

void rt_progress_end(struct rt_progress *p)
{
    char a[32], b[32], c[32];
    const double elapsed = rt_now() - p->t_start;
    const double work = (double)(p->done - p->first);
    if (p->log == NULL)
        return;
    if (p->log->level < RT_LOG_INFO)
        clear_live(p->log);
    rt_log(p->log, RT_LOG_INFO, "%s: %s %s in %s (%s/s)", p->what, rt_human_count(a, work), p->unit, rt_human_time(b, elapsed),
           rt_human_count(c, elapsed > 0 ? work / elapsed : 0));
}

/* Three figures; the unit is the largest that leaves at least 1 before the point, after rounding. */
static void scaled(char buf[32], double v, double base, const char *const *units, int n_units, const char *gap)
{
    int u = 0;
    while (u + 1 < n_units && v >= base - 0.5) {
        v /= base;
        u++;
    }
    if (u == 0 && v == floor(v))
        snprintf(buf, 32, "%.0f%s%s", v, gap, units[u]);
    else
        snprintf(buf, 32, "%.*f%s%s", v < 9.995 ? 2 : v < 99.95 ? 1 : 0, v, gap, units[u]);
}

const char *rt_human_bytes(char buf[32], uint64_t n)
{
    static const char *const units[] = {"B", "KB", "MB", "GB", "TB", "PB", "EB"};
    scaled(buf, (double)n, 1000, units, 7, " ");
    return buf;
}

const char *rt_human_count(char buf[32], double n)
{
    static const char *const units[] = {"", "k", "M", "G", "T", "P"};
    if (!isfinite(n) || n < 0)
        snprintf(buf, 32, "%g", n);
    else
        scaled(buf, n, 1000, units, 6, "");
    return buf;
}

const char *rt_human_time(char buf[32], double seconds)
{
    if (!(seconds >= 0 && seconds < 1e12)) {
        snprintf(buf, 32, "?");
        return buf;
    }
    const long long s = (long long)(seconds + 0.5);
    if (seconds < 9.95)
        snprintf(buf, 32, "%.1fs", seconds);
    else if (s < 60)
        snprintf(buf, 32, "%llds", s);
    else if (s < 3600)
        snprintf(buf, 32, "%lldm%02llds", s / 60, s % 60);
    else if (s < 86400)
        snprintf(buf, 32, "%lldh%02lldm", s / 3600, s / 60 % 60);
    else
        snprintf(buf, 32, "%lldd%02lldh", s / 86400, s / 3600 % 24);
    return buf;
}
