/* The way back through a rotation, and the gradient of the bias before it, in one pass: headnorm_rope_bwd without norms, with db.
 *
 * A block has a chunk of rows of 256 columns. A thread holds eights of a pair (columns j and j + d/2 of a head) row by row, turns them back, and adds up what
 * it stores; columns behind the heads are only read. The block's threads are added in shared memory, the chunks by rt_cuda_add_columns, all in fixed
 * order. The last rows first: they were written last and lie in the L2 still.
 */
#include "core/cuda/launch.cuh"
#include "core/cuda/student_rows.h"
#include "core/cuda/turn.cuh"

namespace {

enum { SLAB = 256, LANES = SLAB / 16, STRIPS = 16, THREADS = LANES * STRIPS, AT_ONCE = 2 /* rows on their way to a thread */ };

struct turn {
    const bf16 *dy;
    bf16 *dx;
    int64_t lddy, lddx, n, chunk;
    const float *cos, *sin;
    const int32_t *position;
    float *part;               /* [chunks, columns] */
    int turned, columns, d;    /* columns of heads; of db */
    unsigned slabs;
};

/* Rounded again. */
__device__ __forceinline__ void turn_back(uint4 *lo, uint4 *hi, const struct angles<8> &by)
{
    struct halves<8> v;
    vec8::unpack(*lo, v.lo);
    vec8::unpack(*hi, v.hi);
    turn_back_by<8>(by, &v);
    *lo = vec8::pack(v.lo);
    *hi = vec8::pack(v.hi);
}

__device__ __forceinline__ void add(float *sum, const uint4 &v)
{
    float x[8];
    vec8::unpack(v, x);
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum[i] += x[i];
}

/* Read-only, so that no store is in its way. */
__device__ __forceinline__ void load_angles(const float *p, float (&x)[8])
{
    const float4 a = __ldg((const float4 *)(const void *)p), b = __ldg((const float4 *)(const void *)p + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__global__ void __launch_bounds__(THREADS, 3) turn_sums_kernel(const struct turn a)
{
    __shared__ float sums[STRIPS][SLAB];
    const int lane = (int)threadIdx.x % LANES, strip = (int)threadIdx.x / LANES, half = a.d / 2, of_head = a.d / 16, j = lane % of_head * 8;
    const int in_slab = lane / of_head * a.d + j, column = (int)(blockIdx.x % a.slabs) * SLAB + in_slab;
    const int64_t chunk = gridDim.x / a.slabs - 1 - blockIdx.x / a.slabs, end = vec8::smaller((chunk + 1) * a.chunk, a.n);
    const bool turned = column < a.turned;
    float sum[16] = {};
    launch_after();
    for (int64_t row = chunk * a.chunk + strip; column < a.columns && row < end; row += STRIPS * AT_ONCE) {
        uint4 lo[AT_ONCE] = {}, hi[AT_ONCE] = {};
        struct angles<8> by[AT_ONCE];
        int position[AT_ONCE] = {};
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (row + i * STRIPS < end) {
                const bf16 *from = turned ? a.dy + (row + i * STRIPS) * a.lddy + column : a.dx + (row + i * STRIPS) * a.lddx + column;
                position[i] = __ldg(a.position + row + i * STRIPS);
                lo[i] = *(const uint4 *)(const void *)from;
                hi[i] = *(const uint4 *)(const void *)(from + half);
            }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            load_angles(a.cos + (int64_t)position[i] * half + j, by[i].cos);
            load_angles(a.sin + (int64_t)position[i] * half + j, by[i].sin);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (turned && row + i * STRIPS < end) {
                bf16 *to = a.dx + (row + i * STRIPS) * a.lddx + column;
                turn_back(&lo[i], &hi[i], by[i]);
                *(uint4 *)(void *)to = lo[i];
                *(uint4 *)(void *)(to + half) = hi[i];
            }
            add(sum, lo[i]);
            add(sum + 8, hi[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sums[strip][in_slab + i] = sum[i];
        sums[strip][in_slab + half + i] = sum[8 + i];
    }
    __syncthreads();
    const int64_t c = (int64_t)(blockIdx.x % a.slabs) * SLAB + threadIdx.x;
    float total = 0;
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
        total += sums[s][threadIdx.x];
    if (c < a.columns)
        a.part[chunk * a.columns + c] = total;
}

}

bool rt_cuda_turn_sums_fits(const struct rt_headnorm_rope_bwd_args *a)
{
    using vec8::aligned16;
    const int64_t dense = (int64_t)a->heads * a->d;
    return a->w == NULL && a->db != NULL && a->d >= 16 && a->d <= SLAB && SLAB % a->d == 0 && a->n_db % a->d == 0 && a->n_db >= dense && a->n_db < INT32_MAX &&
           a->lddx >= a->n_db && a->lddx % 8 == 0 && a->lddy % 8 == 0 && aligned16(a->dy) && aligned16(a->dx) && aligned16(a->cos) && aligned16(a->sin);
}

enum rt_status rt_cuda_turn_sums(struct rt_queue *q, const struct rt_headnorm_rope_bwd_args *a, struct rt_err *err)
{
    const int64_t slabs = (a->n_db + SLAB - 1) / SLAB, chunk = rt_cuda_sum_rows(a->n, slabs), chunks = (a->n + chunk - 1) / chunk;
    struct turn k = {};
    enum rt_status st;
    k.dy = (const bf16 *)a->dy;
    k.dx = (bf16 *)a->dx;
    k.lddy = a->lddy > 0 ? a->lddy : (int64_t)a->heads * a->d;
    k.lddx = a->lddx;
    k.n = a->n;
    k.chunk = chunk;
    k.cos = a->cos;
    k.sin = a->sin;
    k.position = a->position;
    k.turned = a->heads * a->d;
    k.columns = (int)a->n_db;
    k.d = a->d;
    k.slabs = (unsigned)slabs;
    RT_TRY(rt_cuda_temp(q, (size_t)(chunks * a->n_db) * sizeof *k.part, &k.part, err));
    RT_CUDA_TRY(launch(q, turn_sums_kernel, (unsigned)(slabs * chunks), THREADS, 0, 1, k));
    RT_TRY(rt_cuda_add_columns(q, k.part, (int)chunks, a->n_db, a->db, a->first, err));
out:
    rt_cuda_temp_free(q, k.part);
    return st;
}
