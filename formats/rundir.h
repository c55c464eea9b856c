/* Run directory: config.json (resolved), metrics.jsonl, log.txt, a lock; checkpoints beside them (formats/checkpoint.h).
 *
 * The same command with the same --out resumes; with changed arguments it is refused, and the difference shown. Compared is
 * every member of the configuration but "runtime" (threads, memory, log: what does not change results).
 */
#ifndef RT_FORMATS_RUNDIR_H
#define RT_FORMATS_RUNDIR_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "core/log.h"
#include "core/options.h"
#include "core/status.h"
#include "formats/json.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_rundir {
    char path[4096];
    int lock;       /* fd, -1: not open */
    int metrics;    /* fd, -1 */
    FILE *log_file; /* log.txt, appended; give it to rt_log.copy */
    bool resumed;   /* config.json was there and agreed */
};

/* {"command": command, "options": {name: text, ...}, "runtime": {name: text, ...}} from option tables and values. Free with
 * rt_json_free. The caller may add members (seeds, hashes of inputs) before rt_rundir_open. */
enum rt_status rt_run_config(const char *command, const struct rt_opt *const *tables, int n_tables, const void *values,
                             struct rt_json **out, struct rt_err *err);

/* Makes or reopens dir and locks it. REFUSED: another process has it; config.json differs (each difference: path, was, now);
 * dir is not empty and holds no config.json. */
enum rt_status rt_rundir_open(const char *dir, const struct rt_json *config, struct rt_rundir *out, struct rt_err *err);
void rt_rundir_close(struct rt_rundir *r); /* a zeroed struct that open did not fill, or closed twice: nothing happens */

/* Appends {"step": ..., ...} as one line in one write. Durable after rt_rundir_sync, which belongs before a checkpoint. */
enum rt_status rt_rundir_metric(struct rt_rundir *r, const struct rt_json *line, struct rt_err *err);
enum rt_status rt_rundir_sync(struct rt_rundir *r, struct rt_err *err);
/* Keeps the lines of metrics.jsonl with "step" <= step, and drops a torn last line. For a resume from checkpoint `step`. */
enum rt_status rt_rundir_truncate(struct rt_rundir *r, int64_t step, struct rt_err *err);

/* Appends "path: was A, now B" lines for what differs between two configurations, "runtime" left out, and options of `was` that are runtime in `now`;
 * *differ says if any. */
enum rt_status rt_config_diff(const struct rt_json *was, const struct rt_json *now, bool *differ, struct rt_buf *out,
                              struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
