/* gated_sm90.h: a product of taken_sm90.cuh whose tiles are gated while the next one is multiplied. Forward, a tile is 128 columns of the gate and the same 128
 * of up: they go out by bulk copies, h from the registers of the warps that take tiles. Backward, what belongs to dh in gate_up comes in, and both
 * gradients (and h) go out. */
#include "core/cuda/gated_sm90.h"

#include "core/cuda/taken_sm90.cuh"

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

/* What the L2 is told, as createpolicy would encode it: the first to go. */
enum : uint64_t { EVICT_FIRST = 0x12f0000000000000 };

/* In one piece: left to the compiler, some of these become four. */
__device__ __forceinline__ void put(bf16 *p, const uint4 &v)
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

#endif

/* ---- forward ---- */

struct forward {
    enum { WARPS = 3, ARRIVALS = WARPS, SHARED = 0, GROUP = 4 }; /* rows that a warp gates together */
    int64_t I;
    bf16 *h; /* NULL: not wanted */
    bool store; /* gate and up are wanted: m.out */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static __device__ __forceinline__ void init(uint32_t) {}
    /* Rows of a tile by one warp: half a warp a row, two rows a lane. at: the lane's columns of h in the tile's first row. */
    static __device__ __forceinline__ void gate(uint32_t tile, int warp, int lane, bf16 *at, int64_t I, int left)
    {
#pragma unroll 1
        for (int i = warp * GROUP; i < BM; i += WARPS * GROUP) {
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
            const place at = place_of<BM>(w, t, rank);
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
                boxes_read<0>();
            if (lane == 0)
                hopper::barrier_arrive(bar.tile_empty());
        }
        if (leads)
            boxes_written();
    }
#endif
};

/* ---- backward ---- */

/* Six warps gate a tile, a row each of the six that make a group. The seventh has what belongs to a group in gate_up brought by a bulk copy, round SLOTS
 * places in shared memory. Without h, both gradients take the place of gate and up, and leave by a bulk copy as well: stores of the warps' own hold up
 * what the products wait for. With h there are such stores anyhow, and a place is better free once it is read. gate_up is not met again, and the gradients
 * not soon: they are the first to leave the L2, where a and w stay, which every wave of tiles would read from memory again otherwise. */
struct backward {
    enum {
        WARPS = 7, GROUP = 6, ARRIVALS = GROUP,
        GROUPS = (BM + GROUP - 1) / GROUP, LAST = BM - (GROUPS - 1) * GROUP, /* of a tile; rows of its last one */
        ROW = 2 * BN * 2, SLOT = GROUP * ROW, SLOTS = 3, /* bytes; for which there is room */
        SLOT_BARS = TAKEN_SHARED, SLOTS_AT = (SLOT_BARS + 2 * SLOTS * 8 + 127) / 128 * 128, SHARED = SLOTS_AT + SLOTS * SLOT - TAKEN_SHARED
    };
    CUtensorMap in, in_last, out, out_last; /* [n][2][I]: gate_up and d_gate_up by groups, and by the last ones */
    int64_t I;
    bf16 *d_gate_up, *h; /* h NULL: not wanted */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    /* A slot's barriers: what belongs to a group is there; all six have done with it. */
    static __device__ __forceinline__ uint32_t full(uint32_t base, int slot) { return base + SLOT_BARS + 8 * slot; }
    static __device__ __forceinline__ uint32_t done(uint32_t base, int slot) { return base + SLOT_BARS + 8 * (SLOTS + slot); }
    static __device__ __forceinline__ void init(uint32_t base)
    {
        for (int i = 0; i < SLOTS; i++) {
            hopper::barrier_init(full(base, i), 1);
            hopper::barrier_init(done(base, i), GROUP);
        }
    }

    static __device__ __forceinline__ uint4 fetched(uint32_t at)
    {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
        return v;
    }
    static __device__ __forceinline__ void replace(uint32_t at, const uint4 &v)
    {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    }
    static __device__ __forceinline__ void put_once(bf16 *p, const uint4 &v)
    {
        asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "l"(EVICT_FIRST) : "memory");
    }

    /* A group of the block's, those of one tile behind those of the other. */
    struct group {
        int t, i; /* tile; of the tile */
        place at;
    };
    static __device__ __forceinline__ void next(group &g, const walk &w, uint32_t rank)
    {
        if (++g.i < GROUPS)
            return;
        g.i = 0;
        g.t += tile_step();
        g.at = place_of<BM>(w, g.t, rank);
    }
    static __device__ __forceinline__ void load(const backward &p, const group &g, uint32_t to, uint32_t bar)
    {
        const bool whole = g.i + 1 < GROUPS;
        hopper::barrier_expect(bar, whole ? +SLOT : LAST * ROW);
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;"
                     ::"r"(to), "l"(whole ? &p.in : &p.in_last), "r"(bar), "r"(g.at.column * BN), "r"(0), "r"(g.at.row + g.i * GROUP), "l"(EVICT_FIRST)
                     : "memory");
    }
    static __device__ __forceinline__ void store(const backward &p, const group &g, uint32_t from)
    {
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], [%1], %5;"
                     ::"l"(g.i + 1 < GROUPS ? &p.out : &p.out_last), "r"(from), "r"(g.at.column * BN), "r"(0), "r"(g.at.row + g.i * GROUP), "l"(EVICT_FIRST)
                     : "memory");
        boxes_commit();
    }
    /* One thread. */
    template <bool H> static __device__ __forceinline__ void serve(const walk &w, const backward &p, uint32_t base, uint32_t rank)
    {
        group in = {first_tile(), 0, place_of<BM>(w, first_tile(), rank)}, out = in;
        int slot = 0;
        uint32_t parity = 1; /* of what was done before in the slot */
#pragma unroll 1
        for (int i = 0; (H ? in.t : out.t) < w.tiles; i++) {
            const uint32_t at = base + SLOTS_AT + slot * SLOT;
            if (i >= SLOTS) {
                hopper::wait_or_trap(done(base, slot), parity);
                if (!H) {
                    store(p, out, at);
                    next(out, w, rank);
                    if (in.t < w.tiles)
                        boxes_read<0>();
                }
            }
            if (in.t < w.tiles) {
                load(p, in, at, full(base, slot));
                next(in, w, rank);
            }
            slot = slot + 1 == SLOTS ? 0 : slot + 1;
            parity ^= slot == 0;
        }
        if (!H)
            boxes_written();
    }

    /* dg, du, h, in the form of swiglu_bwd (student_rows.cu). */
    static __device__ __forceinline__ void gate(const uint4 &xg, const uint4 &xu, const uint4 &xdh, uint4 *dg, uint4 *du, uint4 *h)
    {
        float g[8], u[8], dh[8], s[8], silu_u[8];
        unpack(xg, g);
        unpack(xu, u);
        unpack(xdh, dh);
        sigmoids(g, s);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float silu = g[j] * s[j];
            silu_u[j] = silu * u[j];
            g[j] = dh[j] * u[j] * s[j] * (1 + g[j] * (1 - s[j]));
            u[j] = dh[j] * silu;
        }
        *dg = pack(g);
        *du = pack(u);
        *h = pack(silu_u);
    }

    template <bool H>
    static __device__ __forceinline__ void gate_all(const walk &w, const backward &p, uint32_t base, uint32_t rank, int warp)
    {
        const barriers bar = {base + BARS_AT};
        const int lane = threadIdx.x % 32;
        const uint32_t I = (uint32_t)p.I;
        int slot = 0;
        uint32_t parity = 0, tiles = 0;
        for (int t = first_tile(); t < w.tiles; t += tile_step()) {
            const place here = place_of<BM>(w, t, rank);
            int row = warp;
            uint32_t to_h = (uint32_t)(here.row + row) * I + (uint32_t)here.column * BN + lane * 8, to = to_h + (uint32_t)(here.row + row) * I;
            hopper::wait_or_trap(bar.tile_full(), tiles++ & 1);
#pragma unroll 1
            for (int i = 0; i < GROUPS; i++, row += GROUP) {
                const uint32_t at = base + SLOTS_AT + slot * SLOT + warp * ROW + lane * 16, over = done(base, slot);
                hopper::wait_or_trap(full(base, slot), parity);
                slot = slot + 1 == SLOTS ? 0 : slot + 1;
                parity ^= slot == 0;
                if (row >= BM) {
                    if (lane == 0)
                        hopper::barrier_arrive(over);
                    break;
                }
                const uint4 g = fetched(at), u = fetched(at + BN * 2), dh = from_tile(base + TILE_AT, row, lane / 8, lane % 8);
                uint4 dg, du, h;
                __syncwarp();
                if (H && lane == 0)
                    hopper::barrier_arrive(over);
                if (lane == 0 && row + GROUP >= BM)
                    hopper::barrier_arrive(bar.tile_empty());
                gate(g, u, dh, &dg, &du, &h);
                if (!H) {
                    replace(at, dg);
                    replace(at + BN * 2, du);
                    hopper::fence_async();
                    __syncwarp();
                    if (lane == 0)
                        hopper::barrier_arrive(over);
                } else if (row < w.rows - here.row) {
                    put_once(p.d_gate_up + to, dg);
                    put_once(p.d_gate_up + (to + I), du);
                    put_once(p.h + to_h, h);
                }
                to += GROUP * 2 * I;
                to_h += GROUP * I;
            }
        }
    }

    template <bool H>
    static __device__ __forceinline__ void take_all(const walk &w, const backward &p, uint32_t base, uint32_t rank, int warp)
    {
        if (warp < GROUP)
            gate_all<H>(w, p, base, rank, warp);
        else if (threadIdx.x % 32 == 0)
            serve<H>(w, p, base, rank);
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
    st = taken_launch<forward, false>(q, &m, &w, &f, "gated forward", err);
out:
    return st;
}

/* [n][2][I] in boxes of so many rows of BN columns. */
enum rt_status rows_map(struct rt_queue *q, CUtensorMap *map, const struct rt_cuda_gated *g, const void *data, int rows, struct rt_err *err)
{
    const cuuint64_t size[3] = {(cuuint64_t)g->I, 2, (cuuint64_t)g->n}, stride[2] = {(cuuint64_t)g->I * 2, (cuuint64_t)g->I * 4};
    const cuuint32_t box[3] = {BN, 2, (cuuint32_t)rows};
    return tensor_map(q->dev, map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, data, size, stride, box, CU_TENSOR_MAP_SWIZZLE_NONE, err);
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
    RT_TRY(rows_map(q, &b.in, g, g->gate_up, backward::GROUP, err));
    RT_TRY(rows_map(q, &b.in_last, g, g->gate_up, backward::LAST, err));
    RT_TRY(rows_map(q, &b.out, g, g->d_gate_up, backward::GROUP, err));
    RT_TRY(rows_map(q, &b.out_last, g, g->d_gate_up, backward::LAST, err));
    b.I = g->I;
    b.d_gate_up = (bf16 *)g->d_gate_up;
    b.h = (bf16 *)g->h;
    st = taken_launch<backward, true>(q, &m, &w, &b, "gated backward", err);
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
