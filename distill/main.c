/* retort COMMAND ...: finds the command, parses its options, runs it, and turns its status into the exit code. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/pool.h"
#include "distill/command.h"

static const struct rt_command *const commands[] = {
    &rt_cmd_inspect, &rt_cmd_doctor, &rt_cmd_tokenize, &rt_cmd_traces, &rt_cmd_filter, &rt_cmd_logits, &rt_cmd_retarget, &rt_cmd_train,
    &rt_cmd_eval, &rt_cmd_experiment, &rt_cmd_compare, &rt_cmd_export, &rt_cmd_cat,
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0], THREADS_A_CORE = 4 };

static volatile sig_atomic_t signals_seen; /* a signal handler has nowhere else to write */

static void on_signal(int sig)
{
    if (++signals_seen > 1) {
        signal(sig, SIG_DFL);
        raise(sig);
    }
}

static bool stop_asked(void *self)
{
    (void)self;
    return signals_seen > 0;
}

static void print_usage(FILE *out)
{
    fputs("retort distils a DeepSeek-V3/R1-class Mixture-of-Experts teacher into dense Qwen and Llama students.\n\n"
          "usage: retort COMMAND [OPTIONS]      retort COMMAND --help  lists the options      retort --version\n\n", out);
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(out, "  %-11s %s\n", commands[i]->name, commands[i]->summary);
    fputs("\nExit codes: 0 done, 1 failed at run time, 2 usage, 3 bad input file, 4 numeric failure,\n"
          "            5 out of memory or no device, 130 interrupted after saving.\n", out);
}

static const struct rt_command *find_command(const char *name)
{
    const char *names[N_COMMANDS];
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(commands[i]->name, name) == 0)
            return commands[i];
        names[i] = commands[i]->name;
    }
    const char *near = rt_nearest(name, names, N_COMMANDS);
    fprintf(stderr, "retort: '%s' is no command%s%s%s (`retort --help` lists them)\n", name, near ? "; did you mean '" : "",
            near ? near : "", near ? "'?" : "");
    return NULL;
}

static enum rt_status print_help(const struct rt_command *cmd, struct rt_err *err)
{
    const struct rt_opt *const own[] = {cmd->options};
    struct rt_buf text = {0};
    enum rt_status st;
    RT_TRY(rt_buf_printf(&text, err, "usage: retort %s %s\n%s\n", cmd->name, cmd->synopsis, cmd->summary));
    if (cmd->help != NULL)
        RT_TRY(rt_buf_printf(&text, err, "\n%s\n", cmd->help));
    if (cmd->options->name != NULL) {
        RT_TRY(rt_buf_puts(&text, "\noptions\n", err));
        RT_TRY(rt_options_help(own, 1, &text, err));
    }
    RT_TRY(rt_buf_puts(&text, "\ncommon options\n", err));
    for (int i = 0; rt_common_options()[i].name != NULL; i++) {
        const struct rt_opt one[] = {rt_common_options()[i], {0}}, *const table[] = {one};
        if (rt_command_takes(cmd, i))
            RT_TRY(rt_options_help(table, 1, &text, err));
    }
    fwrite(text.data, 1, text.len, stdout);
out:
    rt_buf_free(&text);
    return st;
}

/* Common options that were given to a command that does not take them. */
static enum rt_status check_taken(const struct rt_command *cmd, const bool *seen, struct rt_err *err)
{
    const int own = rt_command_own_options(cmd);
    for (int i = 0; rt_common_options()[i].name != NULL; i++)
        if (seen[own + i] && !rt_command_takes(cmd, i))
            return rt_command_not_taken(cmd, i, "", err);
    return RT_OK;
}

static enum rt_status check_positionals(const struct rt_command *cmd, const struct rt_positionals *pos, struct rt_err *err)
{
    if (pos->n < cmd->min_positionals)
        return rt_fail(err, RT_USAGE, "found %d arguments; usage: retort %s %s", pos->n, cmd->name, cmd->synopsis);
    if (cmd->max_positionals >= 0 && pos->n > cmd->max_positionals)
        return rt_fail(err, RT_USAGE, "found %d arguments, did not expect '%.80s'; usage: retort %s %s", pos->n, pos->items[cmd->max_positionals], cmd->name,
                       cmd->synopsis);
    return RT_OK;
}

/* Each thread has a stack and room for its results: past the cores they cost memory and gain nothing. */
static void bound_threads(struct rt_common *common, struct rt_log *log)
{
    const int most = THREADS_A_CORE * rt_cpu_count();
    if (common->threads <= most)
        return;
    rt_warn(log, "--threads %ld: this machine has %d cores; %d threads are started", (long)common->threads, rt_cpu_count(), most);
    common->threads = most;
}

static enum rt_status run(const struct rt_command *cmd, int argc, char **argv, struct rt_log *log, struct rt_err *err)
{
    const struct rt_opt *const tables[] = {cmd->options, rt_common_options()};
    struct rt_positionals pos = {0};
    bool seen[128] = {false};
    struct rt_json *config = NULL;
    enum rt_status st;
    void *values = calloc(1, cmd->values_size);
    if (values == NULL)
        return rt_fail(err, RT_NOMEM, "out of memory");
    struct rt_common *common = values;
    RT_TRY(rt_options_parse(tables, 2, argc, argv, values, &pos, seen, err));
    RT_TRY(check_taken(cmd, seen, err));
    if (common->help) {
        st = print_help(cmd, err);
        goto out;
    }
    if (common->config != NULL)
        RT_TRY(rt_command_apply_config(cmd, common->config, seen, values, &config, err));
    RT_TRY(rt_options_check(tables, 2, values, err));
    RT_TRY(check_positionals(cmd, &pos, err));
    log->level = common->quiet ? RT_LOG_WARN : common->verbose ? RT_LOG_DEBUG : RT_LOG_INFO;
    bound_threads(common, log);
    struct rt_context ctx = {.log = log, .command = cmd, .stop = stop_asked, .argc = argc, .argv = argv};
    st = cmd->run(&ctx, values, &pos, err);
out:
    rt_options_free(tables, 2, values, &pos);
    free(values);
    rt_json_free(config);
    return st;
}

static void print_version(void)
{
    printf("retort %s, backends", RT_COMMIT);
    for (const struct rt_backend *const *be = rt_backend_list(); *be != NULL; be++)
        printf(" %s", (*be)->name);
    printf("\n");
}

int main(int argc, char **argv)
{
    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        print_usage(argc < 2 ? stderr : stdout);
        return argc < 2 ? 2 : 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        print_version();
        return 0;
    }
    const struct rt_command *cmd = find_command(argv[1]);
    if (cmd == NULL)
        return 2;
    struct sigaction sa = {.sa_handler = on_signal};
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    struct rt_log log;
    struct rt_err err = {0};
    rt_log_init(&log, stderr, RT_LOG_INFO);
    enum rt_status st = run(cmd, argc - 2, argv + 2, &log, &err);
    if (st == RT_OK && (fflush(stdout) != 0 || ferror(stdout)))
        st = rt_fail_errno(&err, "cannot write to stdout");
    if (st != RT_OK && err.msg[0] != '\0')
        fprintf(stderr, "retort %s: %s\n", cmd->name, err.msg);
    else if (st != RT_OK)
        fprintf(stderr, "retort %s: %s\n", cmd->name, rt_status_text(st));
    return rt_exit_code(st);
}
