#include "tests/run_command.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/io.h"

struct asked {
    const struct test_run *run;
    int n;
};

static bool stop(void *self)
{
    struct asked *a = self;
    const struct test_run *r = a->run;
    a->n++;
    if (r->kill_at > 0 && a->n >= r->kill_at)
        raise(SIGKILL);
    if (r->block != NULL && a->n == r->stop_at)
        rt_publish_bytes(r->block, "", 0, NULL);
    return r->stop_at > 0 && a->n >= r->stop_at;
}

void test_on_cpu(struct rt_common *common)
{
    if (strcmp(common->device, "auto") == 0)
        common->device = "cpu";
}

static enum rt_status parse_and_run(const struct rt_command *c, const char *const *args, const struct test_run *run, struct rt_log *log,
                                    struct rt_err *err)
{
    const struct rt_opt *const tables[] = {c->options, rt_common_options()};
    struct rt_positionals pos = {0};
    char *argv[64];
    int argc = 0;
    bool seen[128] = {false};
    struct asked asked = {.run = run};
    enum rt_status st;
    void *values = calloc(1, c->values_size);
    if (values == NULL)
        return rt_fail(err, RT_NOMEM, "out of memory");
    for (; args[argc] != NULL; argc++)
        argv[argc] = (char *)(uintptr_t)args[argc];
    RT_TRY(rt_options_parse(tables, 2, argc, argv, values, &pos, seen, err));
    RT_TRY(rt_options_check(tables, 2, values, err));
    test_on_cpu(values);
    struct rt_context ctx = {.log = log, .command = c, .stop = stop, .stop_self = &asked, .argc = argc, .argv = argv};
    st = c->run(&ctx, values, &pos, err);
out:
    rt_options_free(tables, 2, values, &pos);
    free(values);
    return st;
}

enum rt_status test_command_with(const struct rt_command *command, const char *const *args, const struct test_run *run, struct rt_err *err)
{
    char *text = NULL;
    size_t len;
    struct rt_log log;
    fflush(stdout);
    const int keep = dup(STDOUT_FILENO), out = open(run->prints != NULL ? run->prints : "/dev/null", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    FILE *chat = run->logged != NULL ? open_memstream(&text, &len) : fopen("/dev/null", "w");
    if (keep < 0 || out < 0 || chat == NULL)
        abort();
    dup2(out, STDOUT_FILENO);
    rt_log_init(&log, chat, RT_LOG_INFO);
    const enum rt_status st = parse_and_run(command, args, run, &log, err);
    fflush(stdout);
    fclose(chat);
    if (run->logged != NULL)
        *run->logged = text;
    dup2(keep, STDOUT_FILENO);
    close(keep);
    close(out);
    return st;
}

enum rt_status test_command(const struct rt_command *command, const char *const *args, struct rt_err *err)
{
    return test_command_with(command, args, &(struct test_run){0}, err);
}

enum rt_status test_command_logged(const struct rt_command *command, const char *const *args, int stop_at, char **logged, struct rt_err *err)
{
    return test_command_with(command, args, &(struct test_run){.stop_at = stop_at, .logged = logged}, err);
}
