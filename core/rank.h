/* Which of several cooperating processes this one is. Size 1 where nobody started several.
 * Read from the variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK), Open MPI or srun, in this order. */
#ifndef RT_CORE_RANK_H
#define RT_CORE_RANK_H

#include <stdbool.h>

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_rank {
    int rank, size, local_rank;
};
enum { RT_RANK_HOST = 256 };

/* USAGE if the variables contradict each other or are no numbers. */
enum rt_status rt_rank_from_env(struct rt_rank *out, struct rt_err *err);
/* Where ranks meet: MASTER_ADDR and MASTER_PORT, as torchrun sets them and anybody may; the next port where torchrun's own store sits on that one
 * (TORCHELASTIC_USE_AGENT_STORE). Without them: of srun the first of SLURM_STEP_NODELIST, of mpirun this machine where all its ranks are on it;
 * port 29500 + the job's number modulo 1000. USAGE where that leaves nothing, or for a port that is none. */
enum rt_status rt_rank_meeting(const struct rt_rank *rank, char host[RT_RANK_HOST], int *port, struct rt_err *err);
/* The first name of a list as srun writes it, "gpu[003-010,012],login1": "gpu003". False where there is none or it does not fit. */
bool rt_rank_first_host(const char *list, char host[RT_RANK_HOST]);

#ifdef __cplusplus
}
#endif
#endif
