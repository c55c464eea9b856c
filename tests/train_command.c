#include "tests/train_command.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"

enum rt_status train_command(const char *const *args, int stop_at, char **logged, struct rt_err *err)
{
    return test_command_logged(&rt_cmd_train, args, stop_at, logged, err);
}

void train_refused(const char *const *args, enum rt_status expected, const char *says)
{
    struct rt_err err = {0};
    const enum rt_status st = train_command(args, 0, NULL, &err);
    if (st != expected || strstr(err.msg, says) == NULL)
        fail_msg("status %d, message '%s'; expected %d and '%s'", (int)st, err.msg, (int)expected, says);
}

struct rt_json *run_json(const char *run, const char *name)
{
    struct rt_err err = {0};
    struct rt_json *v = NULL;
    char path[4096];
    assert_ok(rt_path_join(path, sizeof path, run, name, &err));
    assert_ok(rt_json_load(path, 1 << 20, &v, &err));
    return v;
}

double run_metric(const char *run, int64_t line, const char *key)
{
    struct rt_buf b = tf_read(run, "metrics.jsonl");
    char *save = NULL, *p = strtok_r(b.data, "\n", &save);
    struct rt_err err = {0};
    struct rt_json *v = NULL;
    double x = NAN;
    for (; p != NULL && line > 0; line--)
        p = strtok_r(NULL, "\n", &save);
    assert_non_null(p);
    assert_ok(rt_json_parse(p, strlen(p), run, &v, &err));
    rt_json_as_double(rt_json_get(v, key), &x);
    rt_json_free(v);
    rt_buf_free(&b);
    return x;
}
