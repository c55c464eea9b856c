/* `train` inside the test binary, and what it left. */
#ifndef RT_TESTS_TRAIN_COMMAND_H
#define RT_TESTS_TRAIN_COMMAND_H

#include "tests/run_command.h"
#include "tests/train_fixture.h"

#define ARGS(...) ((const char *const[]){__VA_ARGS__, NULL})

/* test_command_logged of `train`. */
enum rt_status train_command(const char *const *args, int stop_at, char **logged, struct rt_err *err);
/* It ends with this status, and says so. */
void train_refused(const char *const *args, enum rt_status expected, const char *says);
/* A file of JSON in a run directory, to be freed. */
struct rt_json *run_json(const char *run, const char *name);
/* A number of a line (from 0) of metrics.jsonl; NaN where it is none. */
double run_metric(const char *run, int64_t line, const char *key);

#endif
