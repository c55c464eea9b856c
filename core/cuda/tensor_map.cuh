/* Descriptors of bulk tensor copies, on the host. For .cu files alone. */
#ifndef RT_CORE_CUDA_TENSOR_MAP_CUH
#define RT_CORE_CUDA_TENSOR_MAP_CUH

#include <cuda.h>

#include "core/cuda/cuda.h"

namespace {

/* *map = boxes of an array of up to 3 dimensions, the innermost first and contiguous; what lies outside comes as 0. size, box: elements; stride: bytes, of all
 * dimensions but the first. dev->encode_map is not NULL. DEVICE where the driver refuses. */
inline enum rt_status tensor_map(const struct rt_dev *dev, CUtensorMap *map, CUtensorMapDataType type, int dims, const void *data, const cuuint64_t *size,
                                 const cuuint64_t *stride, const cuuint32_t *box, CUtensorMapSwizzle swizzle, struct rt_err *err)
{
    typedef CUresult encode(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                            const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    const cuuint32_t step[3] = {1, 1, 1};
    const CUresult r = ((encode *)dev->encode_map)(map, type, (cuuint32_t)dims, (void *)data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                                   swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? RT_OK : rt_fail(err, RT_DEVICE, "GPU: cuTensorMapEncodeTiled: error %d for %lld rows, the innermost dimension %lld", (int)r,
                                               (long long)size[dims - 1], (long long)size[0]);
}

}

#endif
