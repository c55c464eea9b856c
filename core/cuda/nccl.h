/* Several ranks on GPUs, one each, through NCCL 2.18 or later (libnccl.so.2, opened at run time).
 *
 * The ranks of a communicator (core/collective.h) tell each other over TCP whether each of them can (its GPU, its library), so that what is missing
 * anywhere is an error everywhere, and rank 0's id travels the same way. NCCL is told to use rings alone (NCCL_ALGO=Ring unless the environment says
 * otherwise): the order of a sum is then that of the ring, and does not depend on which algorithm a cost model takes for a size; and never NVLink
 * multicast (NCCL_NVLS_ENABLE=0), whose sums are made in the switch, in no order that is written down.
 *
 * Sums are of BF16, rounded once at each rank of the ring. Collectives run on a stream of their own, of high priority, ordered with the queue
 * that they are given: whoever computes on another queue meanwhile is not held up.
 *
 * No wait for the others is without end: before the host waits for the device it looks whether what is under way with other ranks can still end
 * (rt_cuda_settle). It cannot where NCCL reports an error, where a rank closed its TCP connection or said why it ends, or after the communicator's
 * timeout; NCCL is then aborted, which ends the kernels that wait, and every later collective fails.
 */
#ifndef RT_CORE_CUDA_NCCL_H
#define RT_CORE_CUDA_NCCL_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_cuda_nccl;

/* dev is open but for this; comm is borrowed until close. All ranks of comm call it. Errors: DEVICE where a rank lacks library or GPU, or shares its GPU
 * with another (both are named); IO where one is lost. text [cap]: "NCCL 2.28.9" */
enum rt_status rt_cuda_nccl_open(struct rt_dev *dev, struct rt_comm *comm, struct rt_cuda_nccl **out, char *text, int cap, struct rt_err *err);
/* NULL is fine. Ends NCCL in order where all went well, else at once. */
void rt_cuda_nccl_close(struct rt_cuda_nccl *n);
/* Waits for the collectives that were handed out; nothing for a device without other ranks. Callable wherever the host is about to wait anyway. */
enum rt_status rt_cuda_settle(struct rt_dev *dev, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
