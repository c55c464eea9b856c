/* moe_sort: a stable counting sort of the chosen experts.
 *
 *   1. each tile of TILE items counts its experts: count[e][tile];
 *   2. an exclusive scan of each expert's counts, and of the experts' totals: where each tile's items of each expert begin;
 *   3. each tile places its items: warps own consecutive segments of the tile, the lanes of a round find their equals by match.
 * The only atomics add integers, so that no order matters; the ids are read twice. Few choices (a step of generation) are one tile, and one launch.
 */
#include "core/cuda/cuda.h"

namespace {

enum { WARPS = 8, THREADS = 32 * WARPS, ROUNDS = 16, SEGMENT = 32 * ROUNDS, TILE = WARPS * SEGMENT, MOST_EXPERTS = 1024 };

/* Never outside the tables, whatever the caller did not check. */
__device__ __forceinline__ int expert_of(const int32_t *ids, int64_t i, int E)
{
    return (int)min((unsigned)ids[i], (unsigned)(E - 1));
}

__global__ void __launch_bounds__(THREADS) count_kernel(const int32_t *__restrict__ ids, int64_t total, int E, int tiles, int32_t *count)
{
    __shared__ int32_t own[MOST_EXPERTS];
    for (int e = (int)threadIdx.x; e < E; e += THREADS)
        own[e] = 0;
    __syncthreads();
    const int64_t first = (int64_t)blockIdx.x * TILE;
#pragma unroll
    for (int r = 0; r < TILE / THREADS; r++) {
        const int64_t i = first + r * THREADS + threadIdx.x;
        if (i < total)
            atomicAdd(own + expert_of(ids, i, E), 1);
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < E; e += THREADS)
        count[(int64_t)e * tiles + blockIdx.x] = own[e];
}

/* Exclusive scan over the block; *total is the sum. Every thread calls it. */
__device__ int block_scan(int v, int *total)
{
    __shared__ int warp_total[32];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    int up = v;
    for (int d = 1; d < 32; d <<= 1) {
        const int other = __shfl_up_sync(0xffffffffu, up, d);
        up += lane >= d ? other : 0;
    }
    __syncthreads(); /* the last call's readers are done */
    if (lane == 31)
        warp_total[warp] = up;
    __syncthreads();
    int before = 0, all = 0;
    for (int i = 0; i < warps; i++) {
        before += i < warp ? warp_total[i] : 0;
        all += warp_total[i];
    }
    *total = all;
    return before + up - v;
}

/* One block an expert: its row of counts becomes where each tile's items begin within the expert's run; total[e] is its length. */
__global__ void __launch_bounds__(THREADS) scan_tiles_kernel(int32_t *count, int tiles, int32_t *total)
{
    int32_t *row = count + (int64_t)blockIdx.x * tiles;
    int carry = 0;
    for (int first = 0; first < tiles; first += THREADS) {
        const int i = first + (int)threadIdx.x;
        int sum;
        const int before = block_scan(i < tiles ? row[i] : 0, &sum);
        if (i < tiles)
            row[i] = carry + before;
        carry += sum;
    }
    if (threadIdx.x == 0)
        total[blockIdx.x] = carry;
}

/* offset [E + 1], one block of MOST_EXPERTS threads */
__global__ void __launch_bounds__(MOST_EXPERTS) scan_experts_kernel(const int32_t *total, int E, int32_t *offset)
{
    const int e = (int)threadIdx.x;
    int sum;
    const int before = block_scan(e < E ? total[e] : 0, &sum);
    if (e < E)
        offset[e] = before;
    if (e == 0)
        offset[E] = sum;
}

/* at [WARPS][E]: how many items of an expert each warp has become where its first one goes, the tile's first one being at `begin`. */
__device__ __forceinline__ void spread(int32_t *at, int E, int e, int begin)
{
    for (int w = 0; w < WARPS; w++) {
        const int n = at[w * E + e];
        at[w * E + e] = begin;
        begin += n;
    }
}

/* The same where the tile is the only one: offset [E + 1] is made here. */
__device__ void spread_alone(int32_t *at, int E, int32_t *offset)
{
    int carry = 0;
    for (int first = 0; first < E; first += THREADS) {
        const int e = first + (int)threadIdx.x;
        int own = 0, sum;
        for (int w = 0; w < WARPS && e < E; w++)
            own += at[w * E + e];
        const int begin = carry + block_scan(own, &sum);
        if (e < E) {
            offset[e] = begin;
            spread(at, E, e, begin);
        }
        carry += sum;
    }
    if (threadIdx.x == 0)
        offset[E] = carry;
}

/* count NULL: this tile is the only one, and offset is written; else it is read. */
__global__ void __launch_bounds__(THREADS) place_kernel(const int32_t *__restrict__ ids, int64_t total, int E, int tiles,
                                                        const int32_t *__restrict__ count, int32_t *offset, int32_t *perm)
{
    extern __shared__ int32_t at[];
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int64_t first = (int64_t)blockIdx.x * TILE + warp * SEGMENT + lane;
    int32_t *mine = at + warp * E;
    int expert[ROUNDS];
    for (int i = (int)threadIdx.x; i < WARPS * E; i += THREADS)
        at[i] = 0;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        expert[r] = first + r * 32 < total ? expert_of(ids, first + r * 32, E) : -1;
        if (expert[r] >= 0)
            atomicAdd(mine + expert[r], 1);
    }
    __syncthreads();
    if (count == NULL)
        spread_alone(at, E, offset);
    else
        for (int e = (int)threadIdx.x; e < E; e += THREADS)
            spread(at, E, e, offset[e] + count[(int64_t)e * tiles + blockIdx.x]);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const unsigned equal = __match_any_sync(0xffffffffu, expert[r]);
        const int before = __popc(equal & ((1u << lane) - 1));
        const int base = expert[r] >= 0 ? mine[expert[r]] : 0;
        if (expert[r] >= 0)
            perm[base + before] = (int32_t)(first + r * 32);
        __syncwarp();
        if (expert[r] >= 0 && before == 0)
            mine[expert[r]] = base + __popc(equal);
        __syncwarp();
    }
}

/* count [E][tiles] = where each tile's items begin within an expert's run; offset [E + 1]. sum [E] is scratch. */
enum rt_status count_tiles(struct rt_queue *q, const int32_t *ids, int64_t total, int E, int tiles, int32_t *count, int32_t *sum, int32_t *offset,
                           struct rt_err *err)
{
    enum rt_status st;
    count_kernel<<<(unsigned)tiles, THREADS, 0, q->stream>>>(ids, total, E, tiles, count);
    RT_TRY(rt_cuda_launched("moe_sort", err));
    scan_tiles_kernel<<<(unsigned)E, THREADS, 0, q->stream>>>(count, tiles, sum);
    RT_TRY(rt_cuda_launched("moe_sort", err));
    scan_experts_kernel<<<1, MOST_EXPERTS, 0, q->stream>>>(sum, E, offset);
    RT_TRY(rt_cuda_launched("moe_sort", err));
out:
    return st;
}

}

enum rt_status rt_cuda_moe_sort(struct rt_dev *, struct rt_queue *q, const struct rt_moe_sort_args *a, struct rt_err *err)
{
    const int64_t total = a->n * a->k;
    const int tiles = (int)((total + TILE - 1) / TILE);
    int32_t *count = NULL, *sum, *offset;
    enum rt_status st = RT_OK;
    if (a->E < 1 || a->E > MOST_EXPERTS || total > INT32_MAX - TILE)
        RT_FAIL(err, UNSUPPORTED, "moe_sort: %lld choices of %d experts; the GPU sorts up to 2^31 of %d", (long long)total, a->E,
                (int)MOST_EXPERTS);
    for (int e = 0; e <= a->E; e++)
        a->offset[e] = 0;
    if (total == 0)
        goto out;
    RT_TRY(rt_cuda_temp(q, ((size_t)a->E * (size_t)tiles + 2 * (size_t)a->E + 1) * sizeof(int32_t), &count, err));
    sum = count + (int64_t)a->E * tiles;
    offset = sum + a->E;
    if (tiles > 1)
        RT_TRY(count_tiles(q, a->ids, total, a->E, tiles, count, sum, offset, err));
    place_kernel<<<(unsigned)tiles, THREADS, (size_t)(WARPS * a->E) * sizeof(int32_t), q->stream>>>(a->ids, total, a->E, tiles,
                                                                                                  tiles > 1 ? count : NULL, offset, a->perm);
    RT_TRY(rt_cuda_launched("moe_sort", err));
    RT_CUDA_TRY(cudaMemcpyAsync(a->offset, offset, ((size_t)a->E + 1) * sizeof(int32_t), cudaMemcpyDeviceToHost, q->stream));
    RT_CUDA_TRY(cudaStreamSynchronize(q->stream));
out:
    rt_cuda_temp_free(q, count);
    return st;
}
