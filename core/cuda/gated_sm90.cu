/* gated_sm90.h: a product of product_sm90.cuh whose tiles are gated while the next one is multiplied. Forward, a tile is 128 columns of the gate and the same 128
 * of up: they go out by bulk copies, h from the registers of the warps that take tiles. Backward, what belongs to dh in gate_up comes in, and both
 * gradients (and h) go out. */
#include "core/cuda/gated_sm90.h"

#include "core/cuda/product_sm90.cuh"

namespace {

enum { GROUP = 4 }; /* rows that a warp gates one behind the other */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* s = sigmoid(g), in the bits of 1 / (1 + __expf(-g)) by __fdividef: what is too small to be normal is nothing beside 1. The steps of all elements one
 * behind the other (volatile): each would wait for the one before. silu is g s, as __fdividef(g, 1 + __expf(-g)) has it. */
template <int N> __device__ __forceinline__ void sigmoids(const float (&g)[N], float (&s)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(s[i]) : "f"(-g[i] * 1.4426950408889634f));
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("div.approx.f32 %0, %1, %2;" : "=f"(s[i]) : "f"(1.0f), "f"(1 + s[i]));
}

__device__ __forceinline__ uint4 load_once(const bf16 *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ void put(bf16 *p, const uint4 &v)
{
    *(uint4 *)p = v;
}

#endif

/* ---- forward ---- */

struct forward {
    enum { ARRIVALS = TAKERS };
    int64_t I;
    bf16 *h; /* NULL: not wanted */
    bool store; /* gate and up are wanted: m.out */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    /* Rows of a tile by one warp: half a warp a row, two rows a lane. at: the lane's columns of h in the tile's first row. */
    static __device__ __forceinline__ void gate(uint32_t tile, int warp, int lane, bf16 *at, int64_t I, int left)
    {
#pragma unroll 1
        for (int i = warp * GROUP; i < BM; i += TAKERS * GROUP) {
            const int row = i + lane / 16, block = lane % 16 / 8;
            float g[16], u[16], s[16];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                unpack(from_tile(tile, row + 2 * half, block, lane % 8), g + 8 * half);
                unpack(from_tile(tile, row + 2 * half, block + 2, lane % 8), u + 8 * half);
            }
            sigmoids(g, s);
#pragma unroll
            for (int j = 0; j < 16; j++)
                g[j] = g[j] * s[j] * u[j];
            if (row < left)
                put(at + row * I, pack(g));
            if (row + 2 < left)
                put(at + (row + 2) * I, pack(g + 8));
        }
    }

    static __device__ __forceinline__ void take(const walk &w, const maps &m, const forward &p, uint32_t base, uint32_t rank, int warp)
    {
        const barriers bar = {base + BARS_AT};
        const uint32_t tile = base + TILE_AT;
        const int lane = threadIdx.x % 32;
        const bool leads = warp == 0 && lane == 0 && p.store;
        uint32_t done = 0;
        for (int t = first_tile(); t < w.tiles; t += tile_step(), done++) {
            const place at = place_of(w, t, rank);
            const int column = at.column * (BN / 2);
            wait(bar.tile_full(), done & 1);
            if (leads && at.row < w.rows) {
#pragma unroll
                for (int b = 0; b < 4; b++)
                    store_box(&m.out, tile + b * BLOCK, (b < 2 ? 0 : (int)p.I) + column + b % 2 * 64, at.row);
                boxes_commit();
            }
            if (p.h != NULL)
                gate(tile, warp, lane, p.h + (int64_t)at.row * p.I + column + lane % 16 * 8, p.I, w.rows - at.row);
            __syncwarp();
            if (leads)
                boxes_read();
            if (lane == 0)
                arrive(bar.tile_empty());
        }
        if (leads)
            boxes_written();
    }
#endif
};

/* ---- backward ---- */

struct backward {
    enum { ARRIVALS = TAKERS };
    int64_t I;
    const bf16 *gate_up;
    bf16 *d_gate_up, *h; /* h NULL: not wanted */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    /* A lane's columns of a group of rows: a warp holds whole rows of a tile. */
    struct rows {
        uint4 g[GROUP], u[GROUP];
    };

    /* What tile t needs of gate_up, on its way to the L2: 128 bytes a request. */
    static __device__ __forceinline__ void ask_for(const walk &w, const backward &p, int t, uint32_t rank, int thread)
    {
        if (t >= w.tiles)
            return;
        const place at = place_of(w, t, rank);
        for (int i = thread; i < BM * 8; i += TAKERS * 32) {
            const int row = at.row + i / 8, piece = i % 8;
            if (row < w.rows)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(p.gate_up + (int64_t)row * 2 * p.I + piece / 4 * p.I + at.column * BN + piece % 4 * 64));
        }
    }

    /* at: the lane's columns of the group's first row; left: rows from there on that exist. */
    static __device__ __forceinline__ void fetch(rows &r, const backward &p, const bf16 *at, int left)
    {
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const bf16 *x = i < left ? at + i * (2 * p.I) : p.gate_up;
            r.g[i] = load_once(x);
            r.u[i] = load_once(x + p.I);
        }
    }

    /* Eight elements: dg, du (in place of u), h from dh, g, u and s = sigmoid(g), in the form of swiglu_bwd (student_rows.cu). */
    static __device__ __forceinline__ void gradients(const uint4 &dh4, const float *g, const float *s, uint4 &u4, uint4 &dg4, uint4 &h4)
    {
        float dh[8], dg[8], u[8], h[8];
        unpack(dh4, dh);
        unpack(u4, u);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float silu = g[i] * s[i];
            h[i] = silu * u[i];
            dg[i] = dh[i] * u[i] * s[i] * (1 + g[i] * (1 - s[i]));
            u[i] = dh[i] * silu;
        }
        dg4 = pack(dg);
        u4 = pack(u);
        h4 = pack(h);
    }

    /* dh of the group is in the tile, from row in_tile on. d, h as `at` of fetch. */
    static __device__ __forceinline__ void gate(rows &r, const backward &p, uint32_t tile, int in_tile, bf16 *d, bf16 *h, int left)
    {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < GROUP; i += 2) {
            float g[16], s[16];
            unpack(r.g[i], g);
            unpack(r.g[i + 1], g + 8);
            sigmoids(g, s);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint4 dg, h4;
                gradients(from_tile(tile, in_tile + i + j, lane / 8, lane % 8), g + 8 * j, s + 8 * j, r.u[i + j], dg, h4);
                if (i + j < left) {
                    put(d + (i + j) * (2 * p.I), dg);
                    put(d + (i + j) * (2 * p.I) + p.I, r.u[i + j]);
                    if (p.h != NULL)
                        put(h + (i + j) * p.I, h4);
                }
            }
        }
    }

    static __device__ __forceinline__ void take(const walk &w, const maps &, const backward &p, uint32_t base, uint32_t rank, int warp)
    {
        const barriers bar = {base + BARS_AT};
        const uint32_t tile = base + TILE_AT;
        const int lane = threadIdx.x % 32, step = TAKERS * GROUP;
        const int64_t step_h = step * p.I, step_d = 2 * step_h;
        uint32_t done = 0;
        ask_for(w, p, first_tile(), rank, warp * 32 + lane);
        for (int t = first_tile(); t < w.tiles; t += tile_step(), done++) {
            const place at = place_of(w, t, rank);
            const int64_t first = (at.row + warp * GROUP) * p.I, column = at.column * BN + lane * 8;
            const bf16 *x = p.gate_up + 2 * first + column;
            bf16 *d = p.d_gate_up + 2 * first + column, *h = p.h + first + column;
            int left = w.rows - at.row - warp * GROUP, in_tile = warp * GROUP;
            rows one, two;
            fetch(one, p, x, left);
            ask_for(w, p, t + tile_step(), rank, warp * 32 + lane);
            wait(bar.tile_full(), done & 1);
#pragma unroll 1
            for (; in_tile < BM; in_tile += 2 * step) { /* rows of the next group are on their way while one is gated */
                const bool more = in_tile + step < BM, yet_more = in_tile + 2 * step < BM;
                if (more)
                    fetch(two, p, x + step_d, left - step);
                gate(one, p, tile, in_tile, d, h, left);
                x += 2 * step_d;
                if (yet_more)
                    fetch(one, p, x, left - 2 * step);
                if (more)
                    gate(two, p, tile, in_tile + step, d + step_d, h + step_h, left - step);
                d += 2 * step_d;
                h += 2 * step_h;
                left -= 2 * step;
            }
            __syncwarp();
            if (lane == 0)
                arrive(bar.tile_empty());
        }
    }
#endif
};

/* ---- the host's side ---- */

enum rt_status run_forward(struct rt_queue *q, const struct rt_cuda_gated *g, struct rt_err *err)
{
    maps m;
    walk w = {};
    forward f = {};
    enum rt_status st;
    RT_TRY(product_map(q, &m.a, false, g->a, g->n, g->K, g->K, BM, err));
    RT_TRY(product_map(q, &m.b, false, g->w, 2 * g->I, g->K, g->K, BN / 2, err));
    m.out = m.a;
    if (g->gate_up != NULL)
        RT_TRY(product_map(q, &m.out, false, g->gate_up, g->n, 2 * g->I, 2 * g->I, BM, err));
    w.rows = (int)g->n;
    w.k_blocks = (int)(g->K / BK);
    w.columns = (int)(g->I / (BN / 2));
    w.b_step = BN / 2;
    w.b_apart = (int)g->I;
    f.I = g->I;
    f.h = (bf16 *)g->h;
    f.store = g->gate_up != NULL;
    st = product_launch<forward, false, false, false>(q, &m, &w, &f, "gated forward", err);
out:
    return st;
}

enum rt_status run_backward(struct rt_queue *q, const struct rt_cuda_gated *g, struct rt_err *err)
{
    maps m;
    walk w = {};
    backward b = {};
    enum rt_status st;
    RT_TRY(product_map(q, &m.a, false, g->a, g->n, g->K, g->K, BM, err));
    RT_TRY(product_map(q, &m.b, false, g->w, g->K, g->I, g->I, BK, err));
    m.out = m.a;
    w.rows = (int)g->n;
    w.k_blocks = (int)(g->K / BK);
    w.columns = (int)(g->I / BN);
    b.I = g->I;
    b.gate_up = (const bf16 *)g->gate_up;
    b.d_gate_up = (bf16 *)g->d_gate_up;
    b.h = (bf16 *)g->h;
    st = product_launch<backward, false, false, true>(q, &m, &w, &b, "gated backward", err);
out:
    return st;
}

}

bool rt_cuda_gated_fits(const struct rt_dev *dev, const struct rt_cuda_gated *g)
{
    return dev->cc == 90 && dev->encode_map != NULL && g->n < INT32_MAX - 1024 && g->I < INT32_MAX / 4 && g->K > 0 && g->K % BK == 0 && g->I > 0 &&
           g->I % (g->back ? BN : BN / 2) == 0 && aligned16(g->a) && aligned16(g->w) && aligned16(g->gate_up) && aligned16(g->d_gate_up) && aligned16(g->h);
}

enum rt_status rt_cuda_gated(struct rt_queue *q, const struct rt_cuda_gated *g, struct rt_err *err)
{
    if (g->n <= 0)
        return RT_OK;
    return g->back ? run_backward(q, g, err) : run_forward(q, g, err);
}
