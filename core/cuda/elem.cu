/* Elements without rows: axpy, sumsq. */
#include "core/cuda/cuda.h"
#include "core/cuda/nccl.h"
#include "core/cuda/rows.cuh"

namespace {

enum { THREADS = 256, EACH = 4 };

/* y = a x + b y; x NULL: y = b y. y is read where b is not 0. */
template <bool HAVE_X>
__global__ void __launch_bounds__(THREADS) axpy_kernel(const uint4 *x, uint4 *y, int64_t nv, float a)
{
    const int64_t first = (int64_t)blockIdx.x * THREADS * EACH + threadIdx.x;
    uint4 u[EACH], v[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int64_t i = first + e * THREADS;
        if (i < nv)
            v[e] = y[i];
        if (HAVE_X && i < nv)
            u[e] = load_stream(x + i);
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int64_t i = first + e * THREADS;
        float p[VEC], r[VEC];
        if (i >= nv)
            break;
        unpack(v[e], r);
        if (HAVE_X)
            unpack(u[e], p);
#pragma unroll
        for (int j = 0; j < VEC; j++)
            r[j] = HAVE_X ? fmaf(a, p[j], r[j]) : a * r[j];
        y[i] = pack(r);
    }
}

/* Elements [first, n) one by one. */
__global__ void __launch_bounds__(THREADS) axpy_slow_kernel(const bf16 *x, bf16 *y, int64_t first, int64_t n, float a)
{
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = first + (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
        const float v = __bfloat162float(y[i]);
        y[i] = __float2bfloat16_rn(x != NULL ? fmaf(a, __bfloat162float(x[i]), v) : a * v);
    }
}

unsigned slow_grid(int64_t n)
{
    const int64_t blocks = (n + THREADS - 1) / THREADS;
    return (unsigned)(blocks < 4096 ? blocks : 4096);
}

/* ---- sum of squares ---- */
/* The parts' number is fixed, so that the order of the sums depends on n (and on whether x begins at a multiple of 16 bytes) alone. */
enum { PARTS = 1056 };

__device__ double block_total(double v)
{
    __shared__ double part[THREADS / 32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = v;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < THREADS / 32; i++)
        total += part[i];
    return total;
}

__device__ __forceinline__ double squares_of(const uint4 &v)
{
    float x[VEC];
    double sum = 0;
    unpack(v, x);
#pragma unroll
    for (int j = 0; j < VEC; j++)
        sum = fma((double)x[j], (double)x[j], sum);
    return sum;
}

/* vectors [0, nv), then single elements [VEC * nv, n) */
__global__ void __launch_bounds__(THREADS) sumsq_kernel(const bf16 *x, int64_t nv, int64_t n, double *part)
{
    const uint4 *v = (const uint4 *)x;
    const int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x, step = (int64_t)PARTS * THREADS;
    double sum[EACH] = {};
    int64_t i = first;
    for (; i + (EACH - 1) * step < nv; i += EACH * step) {
        uint4 u[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++)
            u[e] = load_stream(v + i + e * step);
#pragma unroll
        for (int e = 0; e < EACH; e++)
            sum[e] += squares_of(u[e]);
    }
    for (; i < nv; i += step)
        sum[0] += squares_of(load_stream(v + i));
    for (i = VEC * nv + first; i < n; i += step) {
        const double s = (double)__bfloat162float(x[i]);
        sum[1] = fma(s, s, sum[1]);
    }
    const double total = block_total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (threadIdx.x == 0)
        part[blockIdx.x] = total;
}

__global__ void __launch_bounds__(THREADS) sumsq_total_kernel(const double *part, double *out)
{
    double sum = 0;
    for (int i = (int)threadIdx.x; i < PARTS; i += THREADS)
        sum += part[i];
    const double total = block_total(sum);
    if (threadIdx.x == 0)
        *out = total;
}

}

enum rt_status rt_cuda_axpy(struct rt_dev *, struct rt_queue *q, const struct rt_axpy_args *a, struct rt_err *err)
{
    const int64_t nv = aligned16(a->x) && aligned16(a->y) ? a->n / VEC : 0, tail = VEC * nv;
    const int64_t grid = (nv + THREADS * EACH - 1) / (THREADS * EACH);
    const float f = (float)a->a;
    if (a->n <= 0)
        return RT_OK;
    if (grid > INT32_MAX)
        return rt_fail(err, RT_SHAPE, "axpy: %lld elements", (long long)a->n);
    if (nv > 0 && a->x != NULL)
        axpy_kernel<true><<<(unsigned)grid, THREADS, 0, q->stream>>>((const uint4 *)a->x, (uint4 *)a->y, nv, f);
    else if (nv > 0)
        axpy_kernel<false><<<(unsigned)grid, THREADS, 0, q->stream>>>(NULL, (uint4 *)a->y, nv, f);
    if (tail < a->n)
        axpy_slow_kernel<<<slow_grid(a->n - tail), THREADS, 0, q->stream>>>((const bf16 *)a->x, (bf16 *)a->y, tail, a->n, f);
    return rt_cuda_launched("axpy", err);
}

enum rt_status rt_cuda_sumsq(struct rt_dev *, struct rt_queue *q, const struct rt_sumsq_args *a, struct rt_err *err)
{
    double *part = NULL, total = 0;
    enum rt_status st;
    RT_TRY(rt_cuda_settle(q->dev, err));
    RT_TRY(rt_cuda_temp(q, (PARTS + 1) * sizeof *part, &part, err));
    sumsq_kernel<<<PARTS, THREADS, 0, q->stream>>>((const bf16 *)a->x, aligned16(a->x) ? a->n / VEC : 0, a->n, part);
    RT_TRY(rt_cuda_launched("sumsq", err));
    sumsq_total_kernel<<<1, THREADS, 0, q->stream>>>(part, part + PARTS);
    RT_TRY(rt_cuda_launched("sumsq", err));
    RT_CUDA_TRY(cudaMemcpyAsync(&total, part + PARTS, sizeof total, cudaMemcpyDeviceToHost, q->stream));
    RT_CUDA_TRY(cudaStreamSynchronize(q->stream));
    *a->out = total;
out:
    rt_cuda_temp_free(q, part);
    return st;
}
