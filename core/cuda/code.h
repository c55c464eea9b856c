/* What a GPU runs of this program. */
#ifndef RT_CORE_CUDA_CODE_H
#define RT_CORE_CUDA_CODE_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of the code that the current device runs, *out: 90 with all that compute capability 9.0 has (CUDA_ARCH 90a), else the compute capability it was
 * compiled for, 89 at most; 0: the program holds nothing that this GPU runs. A newer GPU runs what was made for an older one, so this is what chooses
 * kernels, not the GPU's own number. DEVICE. */
enum rt_status rt_cuda_code(int *out, struct rt_err *err);

#ifdef __cplusplus
}
#endif

#endif
