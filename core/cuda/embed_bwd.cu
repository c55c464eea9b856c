/* Gradient of the embedding table: rows of dy added up by id.
 *
 * Tokens are sorted by (id, place) (a stable radix sort, DIGIT bits a pass), then runs of one id are summed in float32, in ascending place:
 * a block takes CHUNK sorted rows, adds runs that lie inside them to the table, and leaves the pieces of runs that cross its borders in `piece`; a
 * second kernel adds those of a run in order. Every row of the table is rounded once.
 */
#include <cuda_bf16.h>

#include "core/cuda/cuda.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/vec8.cuh"

namespace {

using vec8::load_packed;
using vec8::packed;
typedef __nv_bfloat16 bf16;

enum { CHUNK = 32, THREADS = 64, AHEAD = 4 };

struct embed {
    const uint32_t *id;  /* [n] sorted */
    const int32_t *from; /* [n] their places */
    const bf16 *dy;
    bf16 *table;
    float *piece;        /* [chunks][2][cols]: of the run that came in, of the run that goes on and began here */
    int64_t n, cols;
};

/* ---- sort ---- */

enum { DIGIT = 9, BINS = 1 << DIGIT, WARPS = 8, PER_WARP = 256, TILE = WARPS * PER_WARP };

/* One pass: pairs from (key, place) to (key_to, place_to) by the digit at `shift`. place NULL: the index itself. */
struct pass {
    const uint32_t *key;
    const int32_t *place;
    uint32_t *key_to;
    int32_t *place_to;
    int32_t *count; /* [BINS][tiles]: how many; then where they begin */
    int64_t n;
    int shift, tiles;
};

__device__ int digit_of(const struct pass &p, int64_t i)
{
    return (int)(p.key[i] >> p.shift & (BINS - 1));
}

__global__ void __launch_bounds__(256) count_kernel(const struct pass p)
{
    __shared__ int32_t count[BINS];
    launch_after();
    for (int b = (int)threadIdx.x; b < BINS; b += 256)
        count[b] = 0;
    __syncthreads();
    const int64_t first = (int64_t)blockIdx.x * TILE;
    for (int i = (int)threadIdx.x; i < TILE && first + i < p.n; i += 256)
        atomicAdd(&count[digit_of(p, first + i)], 1); /* integers: any order gives the same */
    __syncthreads();
    for (int b = (int)threadIdx.x; b < BINS; b += 256)
        p.count[(int64_t)b * p.tiles + blockIdx.x] = count[b];
}

/* x [n] = sums of what stands before; one block. */
__global__ void __launch_bounds__(1024) scan_kernel(int32_t *x, int64_t n)
{
    __shared__ int32_t warp_total[32], carry;
    launch_after();
    if (threadIdx.x == 0)
        carry = 0;
    for (int64_t first = 0; first < n; first += 1024) {
        const int64_t i = first + threadIdx.x;
        const int lane = (int)threadIdx.x % 32;
        const int32_t own = i < n ? x[i] : 0;
        int32_t sum = own;
        for (int d = 1; d < 32; d *= 2) {
            const int32_t below = __shfl_up_sync(0xffffffffu, sum, (unsigned)d);
            sum += lane >= d ? below : 0;
        }
        if (lane == 31)
            warp_total[threadIdx.x / 32] = sum;
        __syncthreads();
        int32_t before = carry;
        for (unsigned w = 0; w < threadIdx.x / 32; w++)
            before += warp_total[w];
        if (i < n)
            x[i] = before + sum - own;
        __syncthreads();
        if (threadIdx.x == 1023)
            carry = before + sum;
    }
}

/* Each warp takes PER_WARP keys in a row, 32 at a time: once to count its digits, once to place them behind those of the warps before it. */
__global__ void __launch_bounds__(WARPS * 32) place_kernel(const struct pass p)
{
    __shared__ int32_t at[WARPS][BINS];
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int64_t first = (int64_t)blockIdx.x * TILE + warp * PER_WARP;
    launch_after();
    for (int b = lane; b < BINS; b += 32)
        at[warp][b] = 0;
    __syncwarp();
    for (int r = lane; r < PER_WARP && first + r < p.n; r += 32)
        atomicAdd(&at[warp][digit_of(p, first + r)], 1);
    __syncthreads();
    for (int b = (int)threadIdx.x; b < BINS; b += WARPS * 32) {
        int32_t next = p.count[(int64_t)b * p.tiles + blockIdx.x];
        for (int w = 0; w < WARPS; w++) {
            const int32_t own = at[w][b];
            at[w][b] = next;
            next += own;
        }
    }
    __syncthreads();
    for (int r = 0; r < PER_WARP; r += 32) {
        const int64_t i = first + r + lane;
        const int digit = i < p.n ? digit_of(p, i) : BINS; /* lanes beyond the end have a digit of their own */
        const uint32_t same = __match_any_sync(0xffffffffu, digit);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int32_t to = i < p.n ? at[warp][digit] + rank : 0;
        __syncwarp();
        if (i < p.n) {
            p.key_to[to] = p.key[i];
            p.place_to[to] = p.place != NULL ? p.place[i] : (int32_t)i;
            if (rank == 0)
                at[warp][digit] += __popc(same);
        }
        __syncwarp();
    }
}

/* ---- sums ---- */

template <int N> __device__ bf16 *table_at(const struct embed &a, uint32_t id, int64_t col)
{
    return a.table + (int64_t)id * a.cols + col;
}

/* old: what stands there. */
template <int N> __device__ void add_to_table(bf16 *at, const struct packed<N> &old, const float *sum)
{
    float x[N];
    old.unpack(x);
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] += sum[i];
    vec8::store<N>(at, x);
}

template <int N> __device__ void put_piece(const struct embed &a, int64_t chunk, int slot, int64_t col, const float *sum)
{
    for (int i = 0; i < N; i++)
        a.piece[(chunk * 2 + slot) * a.cols + col + i] = sum[i];
}

/* The sorted rows [first, first + rows) at columns col .. col + N. came: the first run began before; goes: the last one goes on. Rows of the table are on
 * their way together with those that are added to them: no other block writes them. */
template <int N>
__device__ void sum_chunk(const struct embed &a, int64_t chunk, int rows, const uint32_t *id, const int32_t *from, bool came, bool goes, int64_t col)
{
    float sum[N] = {};
    bool whole = !came;
    for (int r0 = 0; r0 < rows; r0 += AHEAD) {
        struct packed<N> x[AHEAD], old[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int r = r0 + k;
            if (r >= rows)
                break;
            x[k] = load_packed<N>(a.dy + (int64_t)from[r] * a.cols + col);
            if (r + 1 == rows || id[r + 1] != id[r])
                old[k] = load_packed<N>(table_at<N>(a, id[r], col));
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int r = r0 + k;
            float v[N];
            if (r >= rows)
                break;
            x[k].unpack(v);
#pragma unroll
            for (int i = 0; i < N; i++)
                sum[i] += v[i];
            const bool last = r + 1 == rows;
            if (!last && id[r + 1] == id[r])
                continue;
            if (!whole)
                put_piece<N>(a, chunk, 0, col, sum);
            else if (last && goes)
                put_piece<N>(a, chunk, 1, col, sum);
            else
                add_to_table<N>(table_at<N>(a, id[r], col), old[k], sum);
            whole = true;
#pragma unroll
            for (int i = 0; i < N; i++)
                sum[i] = 0;
        }
    }
}

template <int N> __global__ void __launch_bounds__(THREADS) chunk_kernel(const struct embed a)
{
    __shared__ uint32_t id[CHUNK];
    __shared__ int32_t from[CHUNK];
    const int64_t chunk = blockIdx.x, first = chunk * CHUNK;
    launch_after();
    const int rows = (int)vec8::smaller(CHUNK, a.n - first);
    if ((int)threadIdx.x < rows) {
        id[threadIdx.x] = a.id[first + threadIdx.x];
        from[threadIdx.x] = a.from[first + threadIdx.x];
    }
    __syncthreads();
    const bool came = first > 0 && a.id[first - 1] == id[0], goes = first + rows < a.n && a.id[first + rows] == id[rows - 1];
    const int64_t col = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * N;
    if (col < a.cols)
        sum_chunk<N>(a, chunk, rows, id, from, came, goes, col);
}

/* The run that begins in this chunk and goes on behind it, if there is one: the sum of its pieces. */
template <int N> __global__ void __launch_bounds__(THREADS) border_kernel(const struct embed a)
{
    const int64_t chunk = blockIdx.x, first = chunk * CHUNK, end = first + CHUNK;
    launch_after();
    if (end >= a.n || a.id[end] != a.id[end - 1] || (first > 0 && a.id[first - 1] == a.id[end - 1]))
        return;
    const uint32_t id = a.id[end - 1];
    int64_t last = chunk + 1; /* where the run ends */
    while ((last + 1) * CHUNK < a.n && a.id[(last + 1) * CHUNK] == id)
        last++;
    const int64_t col = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * N;
    if (col < a.cols) {
        float sum[N];
#pragma unroll
        for (int i = 0; i < N; i++)
            sum[i] = a.piece[(chunk * 2 + 1) * a.cols + col + i];
#pragma unroll 4
        for (int64_t c = chunk + 1; c <= last; c++)
            for (int i = 0; i < N; i++)
                sum[i] += a.piece[c * 2 * a.cols + col + i];
        bf16 *at = table_at<N>(a, id, col);
        add_to_table<N>(at, load_packed<N>(at), sum);
    }
}

}

/* Sorted ids and their places in key[*last], place[*last]; two buffers of each, all [n] temporaries of the caller. */
static enum rt_status sort_ids(struct rt_queue *q, const int32_t *ids, int64_t n, int64_t rows, uint32_t *key[2], int32_t *place[2], int *last,
                               struct rt_err *err)
{
    enum rt_status st;
    struct pass p = {};
    p.n = n;
    p.tiles = (int)((n + TILE - 1) / TILE);
    p.key = (const uint32_t *)ids;
    RT_TRY(rt_cuda_temp(q, (size_t)BINS * (size_t)p.tiles * sizeof *p.count, &p.count, err));
    *last = 1;
    for (p.shift = 0; p.shift == 0 || (rows - 1) >> p.shift > 0; p.shift += DIGIT) {
        *last ^= 1;
        p.key_to = key[*last];
        p.place_to = place[*last];
        RT_CUDA_TRY(launch(q, count_kernel, (unsigned)p.tiles, 256, 0, 1, p));
        RT_CUDA_TRY(launch(q, scan_kernel, 1, 1024, 0, 1, p.count, (int64_t)BINS * p.tiles));
        RT_CUDA_TRY(launch(q, place_kernel, (unsigned)p.tiles, WARPS * 32, 0, 1, p));
        p.key = p.key_to;
        p.place = p.place_to;
    }
out:
    rt_cuda_temp_free(q, p.count);
    return st;
}

enum rt_status rt_cuda_embed_bwd(struct rt_dev *, struct rt_queue *q, const struct rt_embed_bwd_args *a, struct rt_err *err)
{
    enum rt_status st;
    struct embed k = {};
    uint32_t *key[2] = {};
    int32_t *place[2] = {};
    int last;
    bool wide;
    dim3 grid;
    const int64_t chunks = (a->n + CHUNK - 1) / CHUNK;
    if (a->n <= 0)
        return RT_OK;
    if (a->n > INT32_MAX / 2 || a->rows > INT32_MAX)
        return rt_fail(err, RT_SHAPE, "embed_bwd: %ld tokens, %ld ids", (long)a->n, (long)a->rows);
    for (int i = 0; i < 2; i++) {
        RT_TRY(rt_cuda_temp(q, (size_t)a->n * sizeof(uint32_t), &key[i], err));
        RT_TRY(rt_cuda_temp(q, (size_t)a->n * sizeof(int32_t), &place[i], err));
    }
    RT_TRY(rt_cuda_temp(q, (size_t)(chunks * 2 * a->cols) * sizeof(float), &k.piece, err));
    RT_TRY(sort_ids(q, a->ids, a->n, a->rows, key, place, &last, err));
    k.id = key[last];
    k.from = place[last];
    k.dy = (const bf16 *)a->dy;
    k.table = (bf16 *)a->dtable;
    k.n = a->n;
    k.cols = a->cols;
    wide = a->cols % 8 == 0 && vec8::aligned16(a->dy) && vec8::aligned16(a->dtable);
    grid = dim3((unsigned)chunks, (unsigned)((a->cols + THREADS * (wide ? 8 : 1) - 1) / (THREADS * (wide ? 8 : 1))));
    RT_CUDA_TRY(launch(q, wide ? chunk_kernel<8> : chunk_kernel<1>, grid, THREADS, 0, 1, k));
    RT_CUDA_TRY(launch(q, wide ? border_kernel<8> : border_kernel<1>, grid, THREADS, 0, 1, k));
out:
    for (int i = 0; i < 2; i++) {
        rt_cuda_temp_free(q, key[i]);
        rt_cuda_temp_free(q, place[i]);
    }
    rt_cuda_temp_free(q, k.piece);
    return st;
}
