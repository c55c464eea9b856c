/* gated_sm90.h: a product of product_sm90.cuh whose tiles are gated while the next one is multiplied. Forward, a tile is 128 columns of the gate and the same 128
 * of up: they go out by bulk copies, h from the registers of the warps that take tiles. Backward, what belongs to dh in gate_up comes in, and both
 * gradients (and h) go out. */
#include "core/cuda/gated_sm90.h"

#include "core/cuda/product_sm90.cuh"

namespace {

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

/* In one piece: left to the compiler, some of these become four. */
__device__ __forceinline__ void put(bf16 *p, const uint4 &v)
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

#endif

/* ---- forward ---- */

struct forward {
    enum { ARRIVALS = TAKERS, SPLIT = 0, SHARED = 0, GROUP = 4 }; /* rows that a warp gates together */
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

/* Rows of gate_up come in by asynchronous copies, two rows a group: each lane brings 16 bytes of each half of a row, and reads those alone. Three groups a warp
 * are on their way or in use; what comes after them is asked for into the L2. (Loads into registers would share one scoreboard, so that each waited for
 * all of them.) */
struct backward {
    enum { ARRIVALS = TAKERS, SPLIT = 0, PAIR = 2, GROUPS = 3, AHEAD = 8, GROUP_BYTES = PAIR * 2 * BN * 2, SHARED = TAKERS * GROUPS * GROUP_BYTES };
    int64_t I;
    const bf16 *gate_up;
    bf16 *d_gate_up, *h; /* h NULL: not wanted */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    /* Where a warp is in its rows: it takes every third pair of a tile, tile after tile. */
    struct cursor {
        int t, in_tile, left; /* left: rows from this pair on that exist */
        int64_t at, h;        /* elements of gate_up and of h where the pair's columns begin */
    };
    static __device__ __forceinline__ void enter(cursor &c, const walk &w, const backward &p, uint32_t rank, int warp)
    {
        const place at = place_of(w, c.t, rank);
        c.in_tile = warp * PAIR;
        c.left = c.t < w.tiles ? w.rows - at.row - c.in_tile : 0;
        c.h = (int64_t)(at.row + c.in_tile) * p.I + at.column * BN;
        c.at = c.h + (int64_t)(at.row + c.in_tile) * p.I;
    }
    static __device__ __forceinline__ void next(cursor &c, const walk &w, const backward &p, uint32_t rank, int warp)
    {
        c.in_tile += TAKERS * PAIR;
        c.left -= TAKERS * PAIR;
        c.at += TAKERS * PAIR * 2 * p.I;
        c.h += TAKERS * PAIR * p.I;
        if (c.in_tile >= BM) {
            c.t += tile_step();
            enter(c, w, p, rank, warp);
        }
    }

    /* 128 bytes a lane. */
    static __device__ __forceinline__ void ask_for(const cursor &c, const backward &p, int lane)
    {
        const int row = lane / 8, piece = lane % 8;
        if (row < PAIR && row < c.left)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(p.gate_up + c.at + row * 2 * p.I + piece / 4 * p.I + piece % 4 * 64));
    }
    /* mine: the lane's place in the group. */
    static __device__ __forceinline__ void fetch(const cursor &c, const backward &p, uint32_t mine, int lane)
    {
#pragma unroll
        for (int i = 0; i < PAIR * 2; i++) {
            const bf16 *x = i / 2 < c.left ? p.gate_up + c.at + i * p.I + lane * 8 : p.gate_up;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(mine + i * (BN * 2)), "l"(x) : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    static __device__ __forceinline__ uint4 fetched(uint32_t mine, int i)
    {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(mine + i * (BN * 2)) : "memory");
        return v;
    }

    /* Eight elements: dg, du, h from dh, g, u and s = sigmoid(g), in the form of swiglu_bwd (student_rows.cu). */
    static __device__ __forceinline__ void gradients(const uint4 &dh4, const float *g, const float *s, const uint4 &u4, uint4 &dg4, uint4 &du4, uint4 &h4)
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
        du4 = pack(u);
        h4 = pack(h);
    }

    static __device__ __forceinline__ void gate(const cursor &c, const backward &p, uint32_t tile, uint32_t mine, int lane)
    {
        float g[8 * PAIR], s[8 * PAIR];
#pragma unroll
        for (int i = 0; i < PAIR; i++)
            unpack(fetched(mine, 2 * i), g + 8 * i);
        sigmoids(g, s);
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
            uint4 dg, du, h;
            gradients(from_tile(tile, c.in_tile + i, lane / 8, lane % 8), g + 8 * i, s + 8 * i, fetched(mine, 2 * i + 1), dg, du, h);
            if (i < c.left) {
                const int64_t at = c.at + i * 2 * p.I + lane * 8;
                put(p.d_gate_up + at, dg);
                put(p.d_gate_up + at + p.I, du);
                if (p.h != NULL)
                    put(p.h + c.h + i * p.I + lane * 8, h);
            }
        }
    }

    static __device__ __forceinline__ void take(const walk &w, const maps &, const backward &p, uint32_t base, uint32_t rank, int warp)
    {
        const barriers bar = {base + BARS_AT};
        const int lane = threadIdx.x % 32;
        const uint32_t tile = base + TILE_AT, mine = base + PRODUCT_SHARED + warp * (GROUPS * GROUP_BYTES) + lane * 16;
        cursor here = {first_tile(), 0, 0, 0, 0}, coming, asked;
        uint32_t done = 0, slot = 0, free_slot = GROUPS - 1; /* of the group here, and of the next one to come */
        enter(here, w, p, rank, warp);
        coming = asked = here;
        for (int i = 0; i < AHEAD; i++, next(asked, w, p, rank, warp))
            ask_for(asked, p, lane);
        for (int i = 0; i < GROUPS - 1; i++, next(coming, w, p, rank, warp))
            fetch(coming, p, mine + i * GROUP_BYTES, lane);
        while (here.t < w.tiles) {
            const int t = here.t;
            wait(bar.tile_full(), done++ & 1);
#pragma unroll 1
            while (here.t == t) {
                ask_for(asked, p, lane);
                next(asked, w, p, rank, warp);
                fetch(coming, p, mine + free_slot * GROUP_BYTES, lane);
                next(coming, w, p, rank, warp);
                asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS - 1) : "memory");
                gate(here, p, tile, mine + slot * GROUP_BYTES, lane);
                next(here, w, p, rank, warp);
                free_slot = slot;
                slot = slot + 1 == GROUPS ? 0 : slot + 1;
            }
            __syncwarp();
            if (lane == 0)
                arrive(bar.tile_empty());
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
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
