/* A command of the retort program: one table of options, one run function.
 *
 * The values struct of every command begins with `struct rt_common common;`. Product goes to stdout, chat to the log.
 */
#ifndef RT_DISTILL_COMMAND_H
#define RT_DISTILL_COMMAND_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/log.h"
#include "core/options.h"
#include "core/status.h"
#include "formats/json.h"

/* The common options. Every command takes --config, --verbose, --quiet and --help; the others where it says so (rt_command.takes). */
struct rt_common {
    const char *device, *config;
    int64_t threads, seed, memory, gpu_memory, gpus;
    bool json, dry_run, verbose, quiet, help;
};

enum rt_takes {
    RT_TAKES_DEVICE = 1, RT_TAKES_THREADS = 2, RT_TAKES_SEED = 4, RT_TAKES_MEMORY = 8, RT_TAKES_GPU_MEMORY = 16, RT_TAKES_GPUS = 32, RT_TAKES_JSON = 64,
    RT_TAKES_DRY_RUN = 128,
    RT_TAKES_ROOM = RT_TAKES_DEVICE | RT_TAKES_THREADS | RT_TAKES_MEMORY | RT_TAKES_GPU_MEMORY /* what computes with a model */
};

struct rt_context {
    struct rt_log *log;
    const struct rt_command *command;
    /* True after the first SIGINT or SIGTERM: finish the unit of work, save, return RT_INTERRUPTED. */
    bool (*stop)(void *self);
    void *stop_self;
    int argc;            /* as given, for run directories */
    char *const *argv;
};

struct rt_command {
    const char *name;
    const char *synopsis;         /* "PATH", "--teacher DIR --data FILE|DIR --out DIR" */
    const char *summary;          /* one line, for the list of commands */
    const char *help;             /* more, NULL: none; ends with an example */
    const struct rt_opt *options; /* own ones, ended by a NULL name */
    unsigned takes;               /* of the common options: enum rt_takes */
    size_t values_size;
    int min_positionals, max_positionals; /* max -1: any number */
    enum rt_status (*run)(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err);
};

/* distill/cmd_*.c */
extern const struct rt_command rt_cmd_inspect, rt_cmd_doctor, rt_cmd_tokenize, rt_cmd_traces, rt_cmd_filter, rt_cmd_logits, rt_cmd_retarget,
    rt_cmd_train, rt_cmd_eval, rt_cmd_experiment, rt_cmd_compare, rt_cmd_export, rt_cmd_cat;

/* The common table, whose offsets are into struct rt_common. */
const struct rt_opt *rt_common_options(void);
/* How many options cmd has before those of the common table. */
int rt_command_own_options(const struct rt_command *cmd);
/* Does cmd take the option of the common table at `index`? Those that it does not have their defaults in its values. */
bool rt_command_takes(const struct rt_command *cmd, int index);
/* USAGE: the common option at `index`, which cmd does not take, was given. source: "" or "FILE: ". */
enum rt_status rt_command_not_taken(const struct rt_command *cmd, int index, const char *source, struct rt_err *err);

/* --device, opened with --threads; logs which one `auto` took. need as in rt_backend_select. */
enum rt_status rt_command_device(struct rt_context *ctx, const struct rt_common *common, const enum rt_op *need, int n_need,
                                 struct rt_device *out, struct rt_err *err);
/* The same with more said about the device: o's threads are --threads. */
enum rt_status rt_command_device_with(struct rt_context *ctx, const struct rt_common *common, const enum rt_op *need, int n_need,
                                      const struct rt_dev_options *o, struct rt_device *out, struct rt_err *err);
/* The members of a --config file for options that the command line left alone (seen: as rt_options_parse fills it, own options first):
 * an object of option names and values, lists for options that may be repeated; or the config.json of a run of this command, of which
 * options that cmd does not take are left out. *keep holds the texts: free it behind values, on an error too. USAGE, FORMAT. */
enum rt_status rt_command_apply_config(const struct rt_command *cmd, const char *path, const bool *seen, void *values, struct rt_json **keep,
                                       struct rt_err *err);
/* --gpus against what be has. DEVICE: fewer are here; or `auto` found no GPU, where parts of the host have to be asked for by name. */
enum rt_status rt_command_gpus(const struct rt_common *common, const struct rt_backend *be, struct rt_err *err);
/* --memory, or 3/4 of what the machine has available. */
int64_t rt_command_memory(const struct rt_common *common);
/* *out = what may lie in the memory that d computes in: rt_command_memory where that is the host's; of a GPU --gpu-memory less what
 * the process holds there anyway (rt_dev_memory.held), or nine tenths of what is free (the rest is for the libraries and what allocations lose at their
 * borders). */
enum rt_status rt_command_room(const struct rt_common *common, const struct rt_device *d, int64_t *out, struct rt_err *err);

/* rt_run_config over the command's own and the common options: what a run directory keeps and a resume is compared with. Free with
 * rt_json_free. */
enum rt_status rt_command_config(const struct rt_command *cmd, const void *values, struct rt_json **out, struct rt_err *err);
/* v as one line on stdout, at once. */
enum rt_status rt_command_print_json(const struct rt_json *v, struct rt_err *err);

/* Numbers of a comma-separated list ("0.6,1,2"), at most cap; USAGE names option and place. */
enum rt_status rt_parse_doubles(const char *option, const char *text, double *out, int cap, int *n, struct rt_err *err);

#endif
