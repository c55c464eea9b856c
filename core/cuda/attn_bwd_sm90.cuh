/* Attention backward for compute capability 9.0, what its warpgroups share (attn_bwd_sm90.cu): a block's shared memory and barriers, the thread that fills
 * its rings, and those that bring its parts of dQ to device memory.
 */
#ifndef RT_CORE_CUDA_ATTN_BWD_SM90_CUH
#define RT_CORE_CUDA_ATTN_BWD_SM90_CUH

#include "core/cuda/attn_bwd.h"
#include "core/cuda/attn_sm90.cuh"

namespace {

enum {
    CONSUMERS = 2,                 /* warpgroups for the keys; another is for dQ, and one of warps that move data */
    THREADS = 128 * (CONSUMERS + 2),
    ROWS = RT_ATTN_BWD_ROWS, PART = RT_ATTN_BWD_PART,
    STAGES = 2, PARTS = 2,         /* of rings; of dQ in a step */
    READERS = 4 * (CONSUMERS + 1) + 3 /* of a work: warps that multiply, threads that bring and count */
};

struct maps {
    CUtensorMap q, k, v, dout;
};

/* Shared memory: keys, values; rings of queries, dO, dS^T (128 x QT), parts of dQ, lse2 and delta; barriers; the work. */
template <int D>
struct layout {
    enum {
        QT = D == 64 ? 128 : 64, ROWS_PARTS = ROWS * D / PART, /* of dQ, for 128 rows */
        k = ROWS * D * 2, q = QT * D * 2, ds = ROWS * QT * 2, part = PART * 4, stat = QT * 4, /* bytes */
        v_from = k, q_from = v_from + k, do_from = q_from + STAGES * q, ds_from = do_from + STAGES * q, dq_from = ds_from + 2 * ds,
        lse_from = dq_from + STAGES * PARTS * part, delta_from = lse_from + STAGES * stat, bar_from = delta_from + STAGES * stat,
        item_from = bar_from + (4 + 4 * STAGES + 3 * STAGES * PARTS + 8) * 8, bytes = item_from + 2 * sizeof(rt_attn_bwd_item),
    };
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct barriers {
    uint32_t at;
    __device__ __forceinline__ uint32_t k_full() const { return at; }
    __device__ __forceinline__ uint32_t k_empty() const { return at + 8; }
    __device__ __forceinline__ uint32_t v_full() const { return at + 16; }
    __device__ __forceinline__ uint32_t v_empty() const { return at + 24; }
    __device__ __forceinline__ uint32_t q_full(uint32_t i) const { return at + 32 + i % STAGES * 8; }
    __device__ __forceinline__ uint32_t q_empty(uint32_t i) const { return at + 32 + (STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t do_full(uint32_t i) const { return at + 32 + (2 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t do_empty(uint32_t i) const { return at + 32 + (3 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t dq_full(int p, uint32_t i) const { return at + 32 + (4 * STAGES + p * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t dq_empty(int p, uint32_t i) const { return at + 32 + (6 * STAGES + p * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t dq_there(uint32_t i) const { return at + 32 + (8 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t dq_counted(uint32_t i) const { return at + 32 + (9 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t ds_full(uint32_t i) const { return at + 32 + (10 * STAGES + i % 2) * 8; }
    __device__ __forceinline__ uint32_t ds_empty(uint32_t i) const { return at + 32 + (10 * STAGES + 2 + i % 2) * 8; }
    __device__ __forceinline__ uint32_t item_full(int i) const { return at + 32 + (10 * STAGES + 4 + i % 2) * 8; }
    __device__ __forceinline__ uint32_t item_empty(int i) const { return at + 32 + (10 * STAGES + 6 + i % 2) * 8; }
};

/* Shared memory begins where tiles may (the kernel looks): its address is a constant, and takes no register. */
extern __shared__ __align__(1024) char pool[];
__device__ __forceinline__ uint32_t pool_at() { return hopper::smem(pool); }

/* The it-th work of this block; who has read it says so. */
template <int D>
__device__ __forceinline__ rt_attn_bwd_item *work_at(int it)
{
    return (rt_attn_bwd_item *)(pool + layout<D>::item_from) + it % 2;
}
__device__ __forceinline__ int tiles_of(int rows, int of) { return (rows + of - 1) / of; }

/* Step n's queries with lse2, and dO with delta, when the stage of each is empty. stat: the first row's place in those. */
template <int D>
__device__ __forceinline__ void load_step(const rt_attn_bwd_call &c, const maps &m, uint32_t n, int head, int row, int stat)
{
    typedef layout<D> L;
    const uint32_t base = pool_at(), stage = n % STAGES;
    const barriers bar = {base + L::bar_from};
    if (n >= STAGES)
        hopper::wait_or_trap(bar.q_empty(n), (n / STAGES - 1) & 1);
    hopper::barrier_expect(bar.q_full(n), L::q + L::stat);
    load_tile<D, L::QT>(base + L::q_from + stage * L::q, &m.q, head, row, bar.q_full(n));
    hopper::load_bytes(base + L::lse_from + stage * L::stat, c.lse2 + stat, L::stat, bar.q_full(n));
    if (n >= STAGES)
        hopper::wait_or_trap(bar.do_empty(n), (n / STAGES - 1) & 1);
    hopper::barrier_expect(bar.do_full(n), L::q + L::stat);
    load_tile<D, L::QT>(base + L::do_from + stage * L::q, &m.dout, head, row, bar.do_full(n));
    hopper::load_bytes(base + L::delta_from + stage * L::stat, c.delta + stat, L::stat, bar.do_full(n));
}
/* One thread: takes work and keeps the rings filled. Of new work the first queries come before values and keys, whose places are given back later. */
template <int D>
__device__ __forceinline__ void produce(const rt_attn_bwd_call &c, const maps &m)
{
    typedef layout<D> L;
    const uint32_t base = pool_at();
    const barriers bar = {base + L::bar_from};
    uint32_t n = 0; /* steps of all work so far */
    for (int it = 0;; it++) {
        const int ticket = atomicAdd(c.ticket, 1), all = c.n_tile * c.nh;
        rt_attn_bwd_item item = {0, 0, 0, 0, -1, {0, 0, 0}};
        if (ticket < all)
            item = c.items[ticket];
        if (it >= 2)
            hopper::wait_or_trap(bar.item_empty(it), (it / 2 - 1) & 1);
        *work_at<D>(it) = item;
        hopper::barrier_arrive(bar.item_full(it));
        if (item.head < 0)
            break;
        const int last = tiles_of(item.len, L::QT) - 1, key = item.first + item.row, hk = item.head / c.group;
        int left = last - item.row / L::QT + 1, row = item.first + last * L::QT;
        int stat = (item.head * c.n_tile + item.tile) * ROWS + last * L::QT; /* sums are at least 256 bytes for each: they end before int does */
        load_step<D>(c, m, n, item.head, row, stat);
        if (it > 0)
            hopper::wait_or_trap(bar.v_empty(), (it - 1) & 1);
        hopper::barrier_expect(bar.v_full(), L::k);
        load_tile<D, ROWS>(base + L::v_from, &m.v, hk, key, bar.v_full());
        if (it > 0)
            hopper::wait_or_trap(bar.k_empty(), (it - 1) & 1);
        hopper::barrier_expect(bar.k_full(), L::k);
        load_tile<D, ROWS>(base, &m.k, hk, key, bar.k_full());
        for (n++; --left > 0; n++) {
            row -= L::QT, stat -= L::QT;
            load_step<D>(c, m, n, item.head, row, stat);
        }
    }
}

/* ---- dQ to device memory ---- */

/* Of query tile t of a sequence, part p of its two: 64 columns, or with heads of 64 its rows. */
template <int D>
__device__ __forceinline__ int64_t part_of(const rt_attn_bwd_call &c, const rt_attn_bwd_item &item, int t, int p)
{
    return ((int64_t)item.head * c.n_tile + item.tile) * layout<D>::ROWS_PARTS + 2 * t + p;
}
__device__ __forceinline__ bool is_added(const int32_t *count, int want)
{
    int32_t is;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(is) : "l"(count) : "memory");
    return is == want;
}
__device__ __forceinline__ void wait_added(const int32_t *count, int want)
{
#pragma unroll 1
    for (uint32_t tries = 0; tries < 1u << 28; tries++) /* minutes: see hopper::wait_or_trap */
        if (is_added(count, want))
            return;
    __trap();
}
__device__ __forceinline__ void put_part(float *to, uint32_t from, bool add)
{
    if (add)
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "n"(PART * 4) : "memory");
    else
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "n"(PART * 4) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* The it-th work, for a thread that keeps a copy of it. */
template <int D>
__device__ __forceinline__ rt_attn_bwd_item next_work(const barriers &bar, int it)
{
    hopper::wait_or_trap(bar.item_full(it), it / 2 & 1);
    const rt_attn_bwd_item item = *work_at<D>(it);
    hopper::barrier_arrive(bar.item_empty(it));
    return item;
}
/* One thread for the parts of every STAGES-th step, but for the block's own rows: the first key block stores, the others add. An addition takes longer than a
 * step; whether the thread's next parts may be added to is asked while these are on their way. */
template <int D>
__device__ __forceinline__ void bring_dq(const rt_attn_bwd_call &c, uint32_t stage)
{
    typedef layout<D> L;
    const uint32_t base = pool_at();
    const barriers bar = {base + L::bar_from};
    uint32_t n = 0;
    for (int it = 0;; it++) {
        const rt_attn_bwd_item item = next_work<D>(bar, it);
        if (item.head < 0)
            break;
        const int level = item.row / ROWS, t_last = (item.row + ROWS) / L::QT;
        bool may = level == 0;
        for (int t = tiles_of(item.len, L::QT) - 1; t >= t_last; t--, n++) {
            if (n % STAGES != stage)
                continue;
            const int64_t part = part_of<D>(c, item, t, 0); /* both lie side by side, and are counted together */
            if (!may)
                wait_added(c.added + part, level);
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                hopper::wait_or_trap(bar.dq_full(p, n), n / STAGES & 1);
                /* between what the warpgroup wrote, or other blocks added, and the bulk addition; here, since four warps would wait for it there */
                asm volatile("fence.proxy.async.shared::cta;\nfence.proxy.async.global;" ::: "memory");
                put_part(c.sums + (part + p) * PART, base + L::dq_from + (p * STAGES + stage) * L::part, level > 0);
            }
            may = level == 0 || (t - STAGES >= t_last && is_added(c.added + part - STAGES * PARTS, level));
            asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
            hopper::barrier_arrive(bar.dq_empty(0, n));
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            hopper::barrier_arrive(bar.dq_empty(1, n));
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
            if (n >= STAGES)
                hopper::wait_or_trap(bar.dq_counted(n), (n / STAGES - 1) & 1); /* dq_there is never two phases ahead */
            hopper::barrier_arrive(bar.dq_there(n));
        }
    }
}
/* One thread: counts the parts of a step that are in device memory. The release takes as long as an addition: the threads that bring them go on
 * meanwhile. */
template <int D>
__device__ __forceinline__ void count_dq(const rt_attn_bwd_call &c)
{
    typedef layout<D> L;
    const barriers bar = {pool_at() + L::bar_from};
    uint32_t n = 0;
    for (int it = 0;; it++) {
        const rt_attn_bwd_item item = next_work<D>(bar, it);
        if (item.head < 0)
            break;
        for (int t = tiles_of(item.len, L::QT) - 1; t >= (item.row + ROWS) / L::QT; t--, n++) {
            const uint64_t level = (uint64_t)(item.row / ROWS + 1); /* of both parts, which lie side by side at an even place */
            hopper::wait_or_trap(bar.dq_there(n), n / STAGES & 1);
            hopper::barrier_arrive(bar.dq_counted(n));
            asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(c.added + part_of<D>(c, item, t, 0)), "l"(level << 32 | level) : "memory");
        }
    }
}

#endif

}

#endif
