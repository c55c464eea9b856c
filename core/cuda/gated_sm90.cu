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
            hopper::wait_or_trap(bar.tile_full(), done & 1);
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
                hopper::barrier_arrive(bar.tile_empty());
        }
        if (leads)
            boxes_written();
    }
#endif
};

/* ---- backward ---- */

/* A warp takes every third pair of rows of a tile. Its rows of gate_up come in by asynchronous copies, each lane bringing 16 bytes of each half of a row for itself:
 * three pairs are on their way while one is gated, whose numbers are in registers already. (Loads into registers would share one scoreboard, so that each
 * waited for all of them.) What comes after those is asked for into the L2. */
struct backward {
    enum { ARRIVALS = TAKERS, SPLIT = 0, PAIR = 2, STEP = TAKERS * PAIR, SLOTS = 3, AHEAD = 10, SLOT = PAIR * 2 * BN * 2, SHARED = TAKERS * SLOTS * SLOT };
    int64_t I;
    const bf16 *gate_up;
    bf16 *d_gate_up, *h; /* h NULL: not wanted */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    /* Where the warp's rows of a tile begin, in elements of gate_up and of h, and how many rows there are from there on. */
    struct start {
        uint32_t at, h;
        int left;
    };
    static __device__ __forceinline__ start start_of(const walk &w, uint32_t I, int t, uint32_t rank, int warp)
    {
        const place at = place_of(w, t, rank);
        const int row = at.row + warp * PAIR;
        const uint32_t h = (uint32_t)row * I + (uint32_t)at.column * BN;
        return {h + (uint32_t)row * I, h, t < w.tiles ? w.rows - row : 0};
    }

    struct numbers {
        uint4 g[PAIR], u[PAIR], dh[PAIR];
    };
    static __device__ __forceinline__ uint4 fetched(uint32_t at)
    {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
        return v;
    }
    static __device__ __forceinline__ void read(numbers &x, uint32_t slot)
    {
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
            x.g[i] = fetched(slot + i * (BN * 4));
            x.u[i] = fetched(slot + i * (BN * 4) + BN * 2);
        }
    }
    static __device__ __forceinline__ void read_dh(numbers &x, uint32_t tile, int in_tile, int lane)
    {
#pragma unroll
        for (int i = 0; i < PAIR; i++)
            x.dh[i] = from_tile(tile, in_tile + i, lane / 8, lane % 8);
    }

    /* The pair at element `at`, of whose rows `left` exist, to the lane's place in a slot. */
    static __device__ __forceinline__ void fetch(const backward &p, uint32_t I, uint32_t at, int left, uint32_t slot, int lane)
    {
#pragma unroll
        for (int i = 0; i < PAIR * 2; i++) {
            const bf16 *x = p.gate_up + (i / 2 < left ? at + i * I + lane * 8 : 0);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot + i * (BN * 2)), "l"(x) : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    /* The same to the L2: 128 bytes a lane. */
    static __device__ __forceinline__ void ask_for(const backward &p, uint32_t I, uint32_t at, int left, int lane)
    {
        const uint32_t row = lane / 8, piece = lane % 8;
        if (row < PAIR && (int)row < left)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(p.gate_up + (at + row * 2 * I + piece / 4 * I + piece % 4 * 64)));
    }

    /* dg, du, h, in the form of swiglu_bwd (student_rows.cu), to memory. */
    template <bool H>
    static __device__ __forceinline__ void gate(const numbers &x, const backward &p, uint32_t I, uint32_t at, uint32_t at_h, int left)
    {
        float g[8 * PAIR], s[8 * PAIR];
#pragma unroll
        for (int i = 0; i < PAIR; i++)
            unpack(x.g[i], g + 8 * i);
        sigmoids(g, s);
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
            float dh[8], u[8], h[8];
            unpack(x.dh[i], dh);
            unpack(x.u[i], u);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int e = 8 * i + j;
                const float silu = g[e] * s[e];
                h[j] = silu * u[j];
                g[e] = dh[j] * u[j] * s[e] * (1 + g[e] * (1 - s[e]));
                u[j] = dh[j] * silu;
            }
            if (i < left) {
                put(p.d_gate_up + (at + i * 2 * I), pack(g + 8 * i));
                put(p.d_gate_up + (at + i * 2 * I + I), pack(u));
                if (H)
                    put(p.h + (at_h + i * I), pack(h));
            }
        }
    }

    template <bool H>
    static __device__ __forceinline__ void take_all(const walk &w, const backward &p, uint32_t base, uint32_t rank, int warp)
    {
        const barriers bar = {base + BARS_AT};
        const int lane = threadIdx.x % 32, count = (BM - warp * PAIR + STEP - 1) / STEP;
        const uint32_t tile = base + TILE_AT, mine = base + PRODUCT_SHARED + warp * (SLOTS * SLOT) + lane * 16, I = (uint32_t)p.I, stride = STEP * 2 * I;
        numbers x, next;
        uint32_t done = 0, slot = mine;
        start here = start_of(w, I, first_tile(), rank, warp);
        for (int j = SLOTS; j < AHEAD; j++)
            ask_for(p, I, here.at + j * stride, here.left - j * STEP, lane);
        for (int j = 0; j < SLOTS; j++)
            fetch(p, I, here.at + j * stride, here.left - j * STEP, mine + j * SLOT, lane);
        asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory");
        read(x, slot);
        for (int t = first_tile(); t < w.tiles; t += tile_step()) {
            const start then = start_of(w, I, t + tile_step(), rank, warp);
            uint32_t at = here.at + lane * 8, at_h = here.h + lane * 8;
            int in_tile = warp * PAIR;
            hopper::wait_or_trap(bar.tile_full(), done++ & 1);
            read_dh(x, tile, in_tile, lane);
#pragma unroll 1
            for (int j = 0; j < count; j++) {
                const int k = j + SLOTS, a = j + AHEAD;
                fetch(p, I, k < count ? here.at + k * stride : then.at + (k - count) * stride, k < count ? here.left - k * STEP : then.left - (k - count) * STEP,
                      slot, lane);
                ask_for(p, I, a < count ? here.at + a * stride : then.at + (a - count) * stride,
                        a < count ? here.left - a * STEP : then.left - (a - count) * STEP, lane);
                slot = slot + SLOT == mine + SLOTS * SLOT ? mine : slot + SLOT;
                asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory");
                read(next, slot);
                in_tile += STEP;
                if (j + 1 < count) {
                    read_dh(next, tile, in_tile, lane);
                } else { /* the tile is read */
                    __syncwarp();
                    if (lane == 0)
                        hopper::barrier_arrive(bar.tile_empty());
                }
                gate<H>(x, p, I, at, at_h, here.left - j * STEP);
                at += stride;
                at_h += STEP * I;
                x = next;
            }
            here = then;
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
    }

    static __device__ __forceinline__ void take(const walk &w, const maps &, const backward &p, uint32_t base, uint32_t rank, int warp)
    {
        if (p.h != NULL)
            take_all<true>(w, p, base, rank, warp);
        else
            take_all<false>(w, p, base, rank, warp);
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
    return dev->cc == 90 && dev->encode_map != NULL && g->n < INT32_MAX - 1024 && g->I < INT32_MAX / 4 && (g->n + 2 * BM) * 2 * g->I <= UINT32_MAX && g->K > 0 && g->K % BK == 0 && g->I > 0 &&
           g->I % (g->back ? BN : BN / 2) == 0 && aligned16(g->a) && aligned16(g->w) && aligned16(g->gate_up) && aligned16(g->d_gate_up) && aligned16(g->h);
}

enum rt_status rt_cuda_gated(struct rt_queue *q, const struct rt_cuda_gated *g, struct rt_err *err)
{
    if (g->n <= 0)
        return RT_OK;
    return g->back ? run_backward(q, g, err) : run_forward(q, g, err);
}
