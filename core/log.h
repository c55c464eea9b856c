/* Log and progress: product goes to stdout, chat to stderr. Owned by main, passed down; NULL is a silent log.
 *
 * On a terminal long work shows one live line (done/total, rate, time left); elsewhere plain lines, at most one each 10 s.
 */
#ifndef RT_CORE_LOG_H
#define RT_CORE_LOG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

enum rt_log_level { RT_LOG_ERROR, RT_LOG_WARN, RT_LOG_INFO, RT_LOG_DEBUG };

struct rt_log {
    enum rt_log_level level;
    FILE *out;     /* usually stderr */
    FILE *copy;    /* NULL, or a run's log file: gets every line, without the live one */
    bool tty;
    bool live;     /* a live line is on the screen */
};

void rt_log_init(struct rt_log *log, FILE *out, enum rt_log_level level);
/* One line (fmt ends without a newline); warnings and errors say so in front. Control characters of outside text become '?'. */
void rt_log(struct rt_log *log, enum rt_log_level level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
#define rt_info(log, ...) rt_log((log), RT_LOG_INFO, __VA_ARGS__)
#define rt_warn(log, ...) rt_log((log), RT_LOG_WARN, __VA_ARGS__)

struct rt_progress {
    struct rt_log *log;
    const char *what, *unit; /* "scoring", "tokens" */
    int64_t done, total;     /* total 0: unknown */
    int64_t first;           /* done before t_start (a resume; set after _begin): not counted in the rate */
    double t_start, t_last;  /* seconds, rt_now */
};
void rt_progress_begin(struct rt_progress *p, struct rt_log *log, const char *what, const char *unit, int64_t total);
/* note: NULL or a few words shown after the numbers ("layer 3/61"). Cheap to call often. */
void rt_progress_update(struct rt_progress *p, int64_t done, const char *note);
void rt_progress_end(struct rt_progress *p);

double rt_now(void); /* seconds of a monotonic clock */
/* "1.2 GB", "34.5k", "2h03m": into buf, returned. */
const char *rt_human_bytes(char buf[32], uint64_t n);
const char *rt_human_count(char buf[32], double n);
const char *rt_human_time(char buf[32], double seconds);

#ifdef __cplusplus
}
#endif
#endif
