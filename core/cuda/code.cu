/* Which of the program's kernels a GPU runs: a fat binary holds code for several, and the driver takes what fits. */
#include "core/cuda/code.h"

#include "core/cuda/cuda.h"

namespace {

__global__ void code_kernel(int *out)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    *out = 90;
#elif defined(__CUDA_ARCH__)
    *out = __CUDA_ARCH__ / 10 < 90 ? __CUDA_ARCH__ / 10 : 89;
#endif
}

}

enum rt_status rt_cuda_code(int *out, struct rt_err *err)
{
    int *dev = NULL;
    cudaError_t e;
    enum rt_status st;
    *out = 0;
    RT_CUDA_TRY(cudaMalloc((void **)&dev, sizeof *dev));
    code_kernel<<<1, 1>>>(dev);
    e = cudaGetLastError();
    if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorUnsupportedPtxVersion)
        goto out;
    RT_TRY(rt_cuda_check(e, "a first kernel", err));
    RT_CUDA_TRY(cudaMemcpy(out, dev, sizeof *dev, cudaMemcpyDeviceToHost));
out:
    (void)cudaFree(dev);
    return st;
}
