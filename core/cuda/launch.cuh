/* Launches that may begin before what was enqueued before them has ended. For .cu files alone.
 *
 * A kernel that is launched so (on compute capability 9.0) starts as soon as every block of the kernel before it has called launch_after or has ended; what
 * other kernels wrote is there when launch_after returns. Up to that call it may read what no kernel enqueued shortly before can have written
 * (weights of generation, for instance), and write nothing. Since a block says that it may be overtaken only once it has itself waited, nothing is ever
 * more than one kernel ahead.
 */
#ifndef RT_CORE_CUDA_LAUNCH_CUH
#define RT_CORE_CUDA_LAUNCH_CUH

#include "core/cuda/cuda.h"

namespace {

/* For every thread that reads what other kernels wrote, or writes. */
__device__ __forceinline__ void launch_after()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* kernel<<<grid, threads, shared>>>(arg...) in clusters of `cluster` blocks (1: none). early: it may begin so. */
template <class... P, class... A>
inline cudaError_t launch_as(struct rt_queue *q, bool early, void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared, int cluster, const A &...arg)
{
    cudaLaunchConfig_t c = {};
    cudaLaunchAttribute attr[2] = {};
    c.gridDim = grid;
    c.blockDim = threads;
    c.dynamicSmemBytes = shared;
    c.stream = q->stream;
    c.attrs = attr;
    if (cluster > 1) {
        attr[c.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attr[c.numAttrs].val.clusterDim.x = (unsigned)cluster;
        attr[c.numAttrs].val.clusterDim.y = attr[c.numAttrs].val.clusterDim.z = 1;
        c.numAttrs++;
    }
    if (early) {
        attr[c.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[c.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        c.numAttrs++;
    }
    return cudaLaunchKernelEx(&c, kernel, P(arg)...);
}
/* The same for a kernel that calls launch_after. */
template <class... P, class... A>
inline cudaError_t launch(struct rt_queue *q, void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared, int cluster, const A &...arg)
{
    return launch_as(q, q->dev->cc == 90, kernel, grid, threads, shared, cluster, arg...);
}

}

#endif
