#include "core/cuda/convert.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float *dst, float x) { *dst = x; }
__device__ void narrow(__nv_bfloat16 *dst, float x) { *dst = __float2bfloat16_rn(x); }

template <class From, class To>
__global__ void convert_kernel(const From *__restrict__ src, To *__restrict__ dst, int64_t n)
{
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        narrow(dst + i, widen(src[i]));
}

template <class From, class To>
void launch(struct rt_queue *q, const void *src, void *dst, int64_t n)
{
    const int64_t blocks = (n + 255) / 256, most = 16 * (int64_t)q->dev->sm_count;
    convert_kernel<<<(unsigned)(blocks < most ? blocks : most), 256, 0, q->stream>>>((const From *)src, (To *)dst, n);
}

template <class To>
bool launch_to(struct rt_queue *q, const void *src, enum rt_dtype from, void *dst, int64_t n)
{
    switch (from) {
    case RT_F32: launch<float, To>(q, src, dst, n); return true;
    case RT_F16: launch<__half, To>(q, src, dst, n); return true;
    case RT_BF16: launch<__nv_bfloat16, To>(q, src, dst, n); return true;
    default: return false;
    }
}

}

enum rt_status rt_cuda_convert_dtype(struct rt_queue *q, const void *src, enum rt_dtype from, void *dst, enum rt_dtype to, int64_t n,
                                     struct rt_err *err)
{
    if (n <= 0)
        return RT_OK;
    const bool known = to == RT_F32 ? launch_to<float>(q, src, from, dst, n)
                       : to == RT_BF16 ? launch_to<__nv_bfloat16>(q, src, from, dst, n) : false;
    if (!known)
        return rt_fail(err, RT_UNSUPPORTED, "no conversion from %s to %s on the GPU", rt_dtype_name(from), rt_dtype_name(to));
    return rt_cuda_launched("convert", err);
}

enum rt_status rt_cuda_convert(struct rt_dev *, struct rt_queue *q, const struct rt_convert_args *a, struct rt_err *err)
{
    return a->to_f32 ? rt_cuda_convert_dtype(q, a->src, RT_BF16, a->dst, RT_F32, a->n, err)
                     : rt_cuda_convert_dtype(q, a->src, RT_F32, a->dst, RT_BF16, a->n, err);
}
