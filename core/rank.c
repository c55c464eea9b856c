#include "core/rank.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

enum { MAX_RANKS = 1 << 20 };

/* *out is left alone where the variable is not set. */
static enum rt_status number(const char *name, int *out, struct rt_err *err)
{
    const char *text = getenv(name);
    char *end;
    if (text == NULL)
        return RT_OK;
    errno = 0;
    const long v = strtol(text, &end, 10);
    if (end == text || *end != '\0' || errno != 0 || v < 0 || v > MAX_RANKS)
        return rt_fail(err, RT_USAGE, "environment variable %s is '%.40s', expected a number from 0 to %d", name, text, MAX_RANKS);
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
    if (r.size < 1 || r.rank >= r.size || r.local_rank >= r.size)
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
