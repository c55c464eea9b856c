#include "core/rank.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_NUMBER = 1 << 30, MAX_RANKS = 1 << 16 };

/* *out is left alone where the variable is not set. */
static enum rt_status number(const char *name, int *out, struct rt_err *err)
{
    const char *text = getenv(name);
    char *end;
    if (text == NULL)
        return RT_OK;
    errno = 0;
    const long v = strtol(text, &end, 10);
    if (end == text || *end != '\0' || errno != 0 || v < 0 || v > MAX_NUMBER)
        return rt_fail(err, RT_USAGE, "environment variable %s is '%.40s', expected a number from 0 to %d", name, text, MAX_NUMBER);
    *out = (int)v;
    return RT_OK;
}

static enum rt_status from(const char *rank, const char *size, const char *local, struct rt_rank *out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_rank r = {-1, -1, -1};
    RT_TRY(number(rank, &r.rank, err));
    RT_TRY(number(size, &r.size, err));
    RT_TRY(number(local, &r.local_rank, err));
    if (r.rank < 0 || r.size < 0)
        RT_FAIL(err, USAGE, "environment variable %s is set without %s; set both, as the launcher does, or neither",
                r.rank < 0 ? size : rank, r.rank < 0 ? rank : size);
    if (r.local_rank < 0 && r.size == 1)
        r.local_rank = 0;
    if (r.local_rank < 0)
        RT_FAIL(err, USAGE, "environment variable %s is not set, with %s at %d", local, size, r.size);
    if (r.size < 1 || r.size > MAX_RANKS || r.rank >= r.size || r.local_rank >= r.size)
        RT_FAIL(err, USAGE, "environment variables contradict each other: %s=%d, %s=%d, %s=%d", rank, r.rank, size, r.size, local,
                r.local_rank);
    *out = r;
out:
    return st;
}

/* Inside sbatch or salloc, but not started by srun, a process is alone although SLURM_NTASKS counts many: only srun sets
 * the variables of a step, and only srun gives out a rank above 0. */
static bool srun_started_us(void)
{
    const char *id = getenv("SLURM_PROCID");
    return id != NULL && (getenv("SLURM_STEP_NUM_TASKS") != NULL || id[0] != '0');
}

enum rt_status rt_rank_from_env(struct rt_rank *out, struct rt_err *err)
{
    *out = (struct rt_rank){0, 1, 0};
    if (getenv("RANK") != NULL || getenv("WORLD_SIZE") != NULL)
        return from("RANK", "WORLD_SIZE", "LOCAL_RANK", out, err);
    if (getenv("OMPI_COMM_WORLD_RANK") != NULL || getenv("OMPI_COMM_WORLD_SIZE") != NULL)
        return from("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", out, err);
    if (srun_started_us())
        return from("SLURM_PROCID", getenv("SLURM_STEP_NUM_TASKS") != NULL ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS",
                    "SLURM_LOCALID", out, err);
    return RT_OK;
}

bool rt_rank_first_host(const char *list, char host[RT_RANK_HOST])
{
    const size_t name = strcspn(list, "[,");
    const char *in = list[name] == '[' ? list + name + 1 : "";
    const size_t number = strcspn(in, "-,]");
    if (name == 0 || name + number >= RT_RANK_HOST || (list[name] == '[' && number == 0))
        return false;
    snprintf(host, RT_RANK_HOST, "%.*s%.*s", (int)name, list, (int)number, in);
    return true;
}

/* The last three digits of a job's number, however long it is; 0 without one. */
static enum rt_status job_modulo_1000(int *out, struct rt_err *err)
{
    const char *text = getenv("SLURM_JOB_ID");
    *out = 0;
    if (text == NULL)
        return RT_OK;
    const size_t n = strlen(text);
    if (n == 0 || strspn(text, "0123456789") != n)
        return rt_fail(err, RT_USAGE, "environment variable SLURM_JOB_ID is '%.40s', expected a number; MASTER_PORT says where to meet without it", text);
    *out = (int)strtol(n > 3 ? text + n - 3 : text, NULL, 10);
    return RT_OK;
}

static enum rt_status meeting_port(int *port, struct rt_err *err)
{
    enum rt_status st;
    int job;
    const char *store = getenv("TORCHELASTIC_USE_AGENT_STORE");
    *port = -1;
    RT_TRY(number("MASTER_PORT", port, err));
    if (*port < 0) {
        RT_TRY(job_modulo_1000(&job, err));
        *port = 29500 + job;
    } else if (store != NULL && strcmp(store, "True") == 0)
        ++*port;
    if (*port < 1 || *port > 65535)
        RT_FAIL(err, USAGE, "environment variable MASTER_PORT: port %d, expected 1 to 65535", *port);
out:
    return st;
}

enum rt_status rt_rank_meeting(const struct rt_rank *rank, char host[RT_RANK_HOST], int *port, struct rt_err *err)
{
    enum rt_status st;
    const char *address = getenv("MASTER_ADDR"), *nodes = getenv("SLURM_STEP_NODELIST");
    int local = 0;
    nodes = nodes != NULL ? nodes : getenv("SLURM_NODELIST");
    RT_TRY(meeting_port(port, err));
    RT_TRY(number("OMPI_COMM_WORLD_LOCAL_SIZE", &local, err));
    if (address != NULL && address[0] != '\0' && strlen(address) < RT_RANK_HOST)
        snprintf(host, RT_RANK_HOST, "%s", address);
    else if (local == rank->size)
        snprintf(host, RT_RANK_HOST, "127.0.0.1");
    else if (getenv("SLURM_PROCID") == NULL || nodes == NULL || !rt_rank_first_host(nodes, host))
        RT_FAIL(err, USAGE, "rank %d of %d does not know where to meet the others: set MASTER_ADDR to the machine of rank 0, and MASTER_PORT to a free port",
                rank->rank, rank->size);
out:
    return st;
}
