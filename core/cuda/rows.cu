/* Copies of whole rows: embed_fwd, gather, scatter, cache_put, cache_copy. Bytes alone: out[to(i), :] (+)= in[from(i), :]. */
#include "core/cuda/cuda.h"
#include "core/cuda/rows.cuh"

namespace {

struct copy {
    const void *in;
    void *out;
    const int32_t *from, *to; /* NULL: row i */
    const int32_t *drawn;     /* from[i] < 0: row drawn[-1 - from[i]] */
    const int32_t *pos;       /* not NULL: row to[i] * capacity + pos[i] */
    int64_t n, in_ld, out_ld, cols, capacity;
};

__device__ __forceinline__ uint4 sum(const uint4 &a, const uint4 &b)
{
    float x[VEC], y[VEC];
    unpack(a, x);
    unpack(b, y);
#pragma unroll
    for (int i = 0; i < VEC; i++)
        x[i] += y[i];
    return pack(x);
}

__device__ __forceinline__ bf16 sum(bf16 a, bf16 b)
{
    return __float2bfloat16_rn(__bfloat162float(a) + __bfloat162float(b));
}

/* Unit: uint4 or bf16; ld and cols count units. */
template <class Unit, int EACH, bool ADD>
__global__ void __launch_bounds__(256) copy_kernel(const __grid_constant__ struct copy p)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= p.n)
        return;
    int64_t from = p.from != NULL ? p.from[i] : i;
    if (p.drawn != NULL && from < 0)
        from = max(p.drawn[-1 - from], 0); /* what could not be drawn is the reader's to find */
    int64_t to = p.to != NULL ? p.to[i] : i;
    if (p.pos != NULL)
        to = to * p.capacity + p.pos[i];
    const Unit *in = (const Unit *)p.in + from * p.in_ld;
    Unit *out = (Unit *)p.out + to * p.out_ld;
    for (int64_t c0 = threadIdx.x; c0 < p.cols; c0 += EACH * blockDim.x) {
        Unit v[EACH], old[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int64_t c = c0 + e * blockDim.x;
            if (c < p.cols)
                v[e] = in[c];
            if (ADD && c < p.cols)
                old[e] = out[c];
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int64_t c = c0 + e * blockDim.x;
            if (c < p.cols)
                out[c] = ADD ? sum(old[e], v[e]) : v[e];
        }
    }
}

template <class Unit, bool ADD>
void launch_units(const struct copy &p, cudaStream_t stream)
{
    struct row_shape shape = row_shape_of(p.cols, 256);
    if (shape.each == 0) { /* longer than 4 x 256: several turns */
        shape.lanes = 256;
        shape.rows = 1;
        shape.each = 4;
    }
    const dim3 block(shape.lanes, shape.rows);
    const unsigned grid = (unsigned)((p.n + shape.rows - 1) / shape.rows);
    switch (shape.each) {
    case 1: copy_kernel<Unit, 1, ADD><<<grid, block, 0, stream>>>(p); break;
    case 2: copy_kernel<Unit, 2, ADD><<<grid, block, 0, stream>>>(p); break;
    case 3: copy_kernel<Unit, 3, ADD><<<grid, block, 0, stream>>>(p); break;
    default: copy_kernel<Unit, 4, ADD><<<grid, block, 0, stream>>>(p); break;
    }
}

enum rt_status copy_rows(struct rt_queue *q, const char *op, struct copy p, bool add, struct rt_err *err)
{
    if (p.n <= 0 || p.cols <= 0)
        return RT_OK;
    if (p.n > INT32_MAX)
        return rt_fail(err, RT_SHAPE, "%s: %lld rows; 2^31 - 1 at most", op, (long long)p.n);
    if (p.cols % VEC == 0 && p.in_ld % VEC == 0 && p.out_ld % VEC == 0 && aligned16(p.in) && aligned16(p.out)) {
        p.cols /= VEC;
        p.in_ld /= VEC;
        p.out_ld /= VEC;
        add ? launch_units<uint4, true>(p, q->stream) : launch_units<uint4, false>(p, q->stream);
    } else {
        add ? launch_units<bf16, true>(p, q->stream) : launch_units<bf16, false>(p, q->stream);
    }
    return rt_cuda_launched(op, err);
}

}

enum rt_status rt_cuda_embed_fwd(struct rt_dev *, struct rt_queue *q, const struct rt_embed_fwd_args *a, struct rt_err *err)
{
    if (a->table->dtype != RT_BF16 || a->table->cols != a->cols)
        return rt_fail(err, RT_SHAPE, "embed_fwd: a table of %lld x %lld %s; expected %lld columns of BF16", (long long)a->table->rows,
                       (long long)a->table->cols, rt_dtype_name(a->table->dtype), (long long)a->cols);
    struct copy p = {};
    p.in = a->table->data;
    p.out = a->out;
    p.from = a->ids;
    p.drawn = a->drawn;
    p.n = a->n;
    p.cols = p.in_ld = p.out_ld = a->cols;
    return copy_rows(q, "embed_fwd", p, false, err);
}

enum rt_status rt_cuda_gather(struct rt_dev *, struct rt_queue *q, const struct rt_gather_args *a, struct rt_err *err)
{
    struct copy p = {};
    p.in = a->x;
    p.out = a->out;
    p.from = a->index;
    p.n = a->n;
    p.cols = p.in_ld = p.out_ld = a->cols;
    return copy_rows(q, "gather", p, false, err);
}

enum rt_status rt_cuda_scatter(struct rt_dev *, struct rt_queue *q, const struct rt_scatter_args *a, struct rt_err *err)
{
    struct copy p = {};
    p.in = a->y;
    p.out = a->x;
    p.to = a->index;
    p.n = a->n;
    p.cols = p.in_ld = p.out_ld = a->cols;
    return copy_rows(q, "scatter", p, a->accumulate, err);
}

enum rt_status rt_cuda_cache_put(struct rt_dev *, struct rt_queue *q, const struct rt_cache_put_args *a, struct rt_err *err)
{
    struct copy p = {};
    p.in = a->x;
    p.out = a->cache;
    p.to = a->slot;
    p.pos = a->pos;
    p.capacity = a->capacity;
    p.n = a->n;
    p.in_ld = ld_or(a->ldx, a->width);
    p.cols = p.out_ld = a->width;
    return copy_rows(q, "cache_put", p, false, err);
}

enum rt_status rt_cuda_cache_copy(struct rt_dev *, struct rt_queue *q, const struct rt_cache_copy_args *a, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t row = (size_t)a->width * sizeof(bf16);
    char *cache = (char *)a->cache;
    if (a->src == a->dst || a->n <= 0)
        return RT_OK;
    RT_CUDA_TRY(cudaMemcpyAsync(cache + (size_t)a->dst * (size_t)a->capacity * row, cache + (size_t)a->src * (size_t)a->capacity * row,
                                (size_t)a->n * row, cudaMemcpyDeviceToDevice, q->stream));
out:
    return st;
}
