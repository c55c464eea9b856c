#include "distill/command.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "formats/rundir.h"

#define COMMON(field) offsetof(struct rt_common, field)

static const struct rt_opt common_options[] = {
    {"device", RT_OPT_CHOICE, COMMON(device), "auto", 0, 0, "auto|cpu|cuda|ref", NULL,
     "where to compute; auto is the first of cuda, cpu that can", false, false},
    {"threads", RT_OPT_INT, COMMON(threads), "0", 0, 4096, NULL, "N", "threads; 0 takes every core; results do not depend on it", false, true},
    {"seed", RT_OPT_INT, COMMON(seed), "0", 0, 9e15, NULL, "N", "seed of everything random", false, false},
    {"memory", RT_OPT_BYTES, COMMON(memory), "0", 0, 9e18, NULL, "8G", "host memory to stay within; 0 takes 3/4 of what is free", false, true},
    {"gpu-memory", RT_OPT_BYTES, COMMON(gpu_memory), "0", 0, 9e18, NULL, "24G", "memory of each GPU to stay within; 0 takes what is free", false, true},
    {"gpus", RT_OPT_INT, COMMON(gpus), "1", 1, 1024, NULL, "N", "GPUs to use; with --device cpu as many parts of the cores", false, true},
    {"config", RT_OPT_STRING, COMMON(config), NULL, 0, 0, NULL, "FILE", "JSON object of option names and values (lists for what may be repeated), or the config.json of a run; the command line wins", false, true},
    {"json", RT_OPT_FLAG, COMMON(json), NULL, 0, 0, NULL, NULL, "answer in JSON where a program may read it", false, true},
    {"dry-run", RT_OPT_FLAG, COMMON(dry_run), NULL, 0, 0, NULL, NULL, "print the plan and stop: tokens, bytes, memory, time", false, true},
    {"verbose", RT_OPT_FLAG, COMMON(verbose), NULL, 0, 0, NULL, NULL, "say more on stderr", false, true},
    {"quiet", RT_OPT_FLAG, COMMON(quiet), NULL, 0, 0, NULL, NULL, "only warnings and errors on stderr", false, true},
    {"help", RT_OPT_FLAG, COMMON(help), NULL, 0, 0, NULL, NULL, "this text", false, true},
    {0},
};

/* One bit an option, in the order of the table; 0: every command takes it. */
static const unsigned common_takes[] = {RT_TAKES_DEVICE, RT_TAKES_THREADS, RT_TAKES_SEED, RT_TAKES_MEMORY, RT_TAKES_GPU_MEMORY, RT_TAKES_GPUS, 0, RT_TAKES_JSON,
                                        RT_TAKES_DRY_RUN, 0, 0, 0};
_Static_assert(sizeof common_takes / sizeof *common_takes + 1 == sizeof common_options / sizeof *common_options, "a bit an option");

const struct rt_opt *rt_common_options(void)
{
    return common_options;
}

int rt_command_own_options(const struct rt_command *cmd)
{
    int own = 0;
    while (cmd->options[own].name != NULL)
        own++;
    return own;
}

bool rt_command_takes(const struct rt_command *cmd, int index)
{
    return common_takes[index] == 0 || (cmd->takes & common_takes[index]) != 0;
}

enum rt_status rt_command_not_taken(const struct rt_command *cmd, int index, const char *source, struct rt_err *err)
{
    return rt_fail(err, RT_USAGE, "%sunknown option '--%s': retort %s %s", source, common_options[index].name, cmd->name,
                   common_takes[index] == RT_TAKES_GPUS && (cmd->takes & RT_TAKES_DEVICE) != 0 ? "computes on one GPU" : "has no use for it");
}

enum rt_status rt_command_device(struct rt_context *ctx, const struct rt_common *common, const enum rt_op *need, int n_need,
                                 struct rt_device *out, struct rt_err *err)
{
    return rt_command_device_with(ctx, common, need, n_need, &(struct rt_dev_options){0}, out, err);
}

enum rt_status rt_command_device_with(struct rt_context *ctx, const struct rt_common *common, const enum rt_op *need, int n_need,
                                      const struct rt_dev_options *options, struct rt_device *out, struct rt_err *err)
{
    const struct rt_backend *be;
    struct rt_dev_options o = *options;
    enum rt_status st = rt_backend_select(common->device, need, n_need, &be, err);
    if (st != RT_OK)
        return st;
    if (common->gpu_memory > 0 && !be->own_memory)
        rt_warn(ctx->log, "--gpu-memory bounds nothing: the device is %s, whose memory is the host's (--memory)", be->name);
    const int have = be->count != NULL ? be->count() : 1;
    if (have > 1 && o.index >= have)
        return rt_fail(err, RT_DEVICE, "local rank %d (counted from 0) has no GPU: %d are visible on this machine; start at most one rank a GPU", o.index, have);
    o.threads = (int)common->threads;
    o.index = have > 1 ? o.index : 0; /* a launcher may show each rank one GPU alone */
    st = rt_device_open(be, &o, out, err);
    if (st == RT_OK)
        rt_info(ctx->log, "device %s: %s", be->name, be->describe(out->dev));
    return st;
}

enum rt_status rt_command_gpus(const struct rt_common *common, const struct rt_backend *be, struct rt_err *err)
{
    const int n = (int)common->gpus, have = be->count != NULL ? be->count() : 1;
    if (n > 1 && !be->own_memory && strcmp(common->device, "auto") == 0)
        return rt_fail(err, RT_DEVICE, "--gpus %d: found no GPU here; --device cpu --gpus %d takes as many parts of this machine's cores instead", n, n);
    if (n > 1 && be->own_memory && have < n)
        return rt_fail(err, RT_DEVICE, "--gpus %d: this machine has %d", n, have);
    return RT_OK;
}

static int64_t available_memory(void)
{
    FILE *f = fopen("/proc/meminfo", "r");
    char line[256];
    int64_t kib = 0;
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "MemAvailable: %ld kB", &kib) == 1)
            break;
    if (f != NULL)
        fclose(f);
    return kib > 0 ? kib * 1024 : (int64_t)1 << 31;
}

int64_t rt_command_memory(const struct rt_common *common)
{
    return common->memory > 0 ? common->memory : available_memory() / 4 * 3;
}

enum rt_status rt_command_room(const struct rt_common *common, const struct rt_device *d, int64_t *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_dev_memory m = {0};
    *out = rt_command_memory(common);
    if (!d->be->own_memory)
        goto out;
    RT_TRY(d->be->memory(d->dev, &m, err));
    const int64_t held = (int64_t)m.held, asked = common->gpu_memory;
    *out = asked == 0 ? (int64_t)(m.free / 10 * 9) : asked > held ? asked - held : 0;
out:
    return st;
}

enum rt_status rt_command_config(const struct rt_command *cmd, const void *values, struct rt_json **out, struct rt_err *err)
{
    const struct rt_opt *const tables[] = {cmd->options, common_options};
    return rt_run_config(cmd->name, tables, 2, values, out, err);
}

enum rt_status rt_parse_doubles(const char *option, const char *text, double *out, int cap, int *n, struct rt_err *err)
{
    const char *p = text;
    *n = 0;
    while (*p != '\0') {
        char *end;
        const double v = strtod(p, &end);
        if (end == p || (*end != '\0' && *end != ','))
            return rt_fail(err, RT_USAGE, "--%s %s: expected numbers with commas between them, found '%s'", option, text, p);
        if (*n == cap)
            return rt_fail(err, RT_USAGE, "--%s %s: more than %d numbers", option, text, cap);
        out[(*n)++] = v;
        p = *end == ',' ? end + 1 : end;
    }
    return RT_OK;
}

enum rt_status rt_command_print_json(const struct rt_json *v, struct rt_err *err)
{
    struct rt_buf text = {0};
    const enum rt_status st = rt_json_dump(v, 0, &text, err);
    if (st == RT_OK) {
        printf("%.*s\n", (int)text.len, text.data);
        fflush(stdout);
    }
    rt_buf_free(&text);
    return st;
}
