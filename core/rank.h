/* Which of several cooperating processes this one is. size 1 until several GPUs or machines are used.
 * Read from the variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK), Open MPI or srun, in this order. */
#ifndef RT_CORE_RANK_H
#define RT_CORE_RANK_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_rank {
    int rank, size, local_rank;
};
/* USAGE if the variables contradict each other or are no numbers. */
enum rt_status rt_rank_from_env(struct rt_rank *out, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
