/* Attention backward for compute capability 9.0, the warpgroup for dQ (attn_bwd_sm90.cu): dQ = dS K of a tile of queries, in two parts, from what the
 * warpgroups for the keys leave in shared memory. It follows them by a step, two at most: what it waits for holds up no product of theirs.
 */
#ifndef RT_CORE_CUDA_ATTN_BWD_QUERIES_CUH
#define RT_CORE_CUDA_ATTN_BWD_QUERIES_CUH

#include "core/cuda/attn_bwd_sm90.cuh"

namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ int own_lane() { return threadIdx.x % 32; }
__device__ __forceinline__ bool first_of_wg() { return threadIdx.x % 128 == 0; }

template <int D>
struct queries_pass {
    typedef layout<D> L;
    enum { QT = L::QT };
    const rt_attn_bwd_call &c;

    __device__ __forceinline__ barriers bar() const { return {pool_at() + L::bar_from}; }

    /* Operands of part p of step n. */
    __device__ __forceinline__ uint64_t ds_at(uint32_t n, int p) const
    {
        return hopper::descriptor_t(pool_at() + L::ds_from + n % 2 * L::ds + (D == 64 ? p * ROWS * 128 : 0), ROWS * 128);
    }
    __device__ __forceinline__ uint64_t keys_at(int p) const { return hopper::descriptor_t(pool_at() + (D == 64 ? 0 : p * ROWS * 128), ROWS * 128); }
    __device__ __forceinline__ void ds_read(uint32_t n)
    {
        if (first_of_wg())
            hopper::barrier_arrive(bar().ds_empty(n));
    }

    /* Part p of dQ of step n; its operands have been read. */
    __device__ __forceinline__ void product(float (&dq)[32], uint32_t n, int p)
    {
        const uint64_t x = ds_at(n, p), y = keys_at(p);
        hopper::mma_fence();
#pragma unroll
        for (int k = 0; k < ROWS / 16; k++)
            mma_tt(dq, x + k * 16 * 8, y + k * 16 * 8, k > 0);
        hopper::mma_commit();
        hopper::mma_wait<0>();
        pin(dq);
    }
    /* A thread's share of a part, in the place of the i-th step's p-th, when what was there has been brought away. */
    __device__ __forceinline__ uint32_t place_of_part(int p, uint32_t i) const
    {
        return pool_at() + L::dq_from + (p * STAGES + i % STAGES) * L::part + threadIdx.x % 128 * 16;
    }
    __device__ __forceinline__ void put_down(const float (&dq)[32], int p, uint32_t i)
    {
        const uint32_t to = place_of_part(p, i);
        if (i >= STAGES)
            hopper::wait_or_trap(bar().dq_empty(p, i), (i / STAGES - 1) & 1);
#pragma unroll
        for (int j = 0; j < 8; j++)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + j * 2048), "f"(dq[4 * j]), "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]),
                         "f"(dq[4 * j + 3]) : "memory");
    }
    __device__ __forceinline__ void pick_up(float (&dq)[32], int p, uint32_t i)
    {
        const uint32_t from = place_of_part(p, i);
#pragma unroll
        for (int j = 0; j < 8; j++)
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(dq[4 * j]), "=f"(dq[4 * j + 1]), "=f"(dq[4 * j + 2]), "=f"(dq[4 * j + 3])
                         : "r"(from + j * 2048) : "memory");
    }

    /* Of step n, whose queries come behind the block's keys: to the thread that brings it, as the i-th. */
    __device__ __forceinline__ void part_out(uint32_t n, int p, uint32_t i)
    {
        float dq[32];
        product(dq, n, p);
        if (p == PARTS - 1)
            ds_read(n);
        put_down(dq, p, i);
        hopper::barrier_arrive_warp(bar().dq_full(p, i));
    }
    /* Part p of the block's own queries, `ahead` of its first: no key block comes after this one, so the sum is rounded and leaves. */
    __device__ __forceinline__ void last_part(float (&dq)[32], int p, const rt_attn_bwd_item &item, int ahead)
    {
        const int level = item.row / ROWS;
        const int row = item.row + ahead + (D == 64 ? 64 * p : 0) + threadIdx.x % 128 / 32 * 16 + own_lane() / 4, column = D == 64 ? 0 : 64 * p;
        const int64_t part = part_of<D>(c, item, (item.row + ahead) / QT, p);
        const float factor[2] = {c.scale, c.scale};
        if (level > 0) {
            wait_added(c.added + part, level);
            const float4 *from = (const float4 *)(c.sums + part * PART) + threadIdx.x % 128;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float4 before = __ldcg(from + j * 128);
                dq[4 * j] += before.x;
                dq[4 * j + 1] += before.y;
                dq[4 * j + 2] += before.z;
                dq[4 * j + 3] += before.w;
            }
        }
        sums_out<64>(dq, factor, c.dq + item.first * c.q_ld + item.head * c.q_head, c.q_ld, c.dqk, row, item.len, own_lane(), column);
    }
    /* Part p of step n, of the block's own queries. All but the last one are put down, where the parts after the `given`th would be, so that keys and dS may be
     * replaced before the key blocks before this one have added theirs. */
    __device__ __forceinline__ void own_part(uint32_t n, int p, const rt_attn_bwd_item &item, int ahead, uint32_t given)
    {
        float dq[32];
        product(dq, n, p);
        if (p == PARTS - 1)
            ds_read(n);
        if (p < PARTS - 1 || ahead > 0) {
            put_down(dq, p, given + (uint32_t)(ROWS / QT - 1 - ahead / QT));
            return;
        }
        if (first_of_wg())
            hopper::barrier_arrive(bar().k_empty());
        last_part(dq, p, item, 0);
        for (int a = ahead_of_own(item); a >= 0; a -= QT)
            for (int i = 0; i < (a > 0 ? PARTS : PARTS - 1); i++) {
                pick_up(dq, i, given + (uint32_t)(ROWS / QT - 1 - a / QT));
                last_part(dq, i, item, a);
            }
    }
    /* How far ahead of the first the last tile of the block's own queries is. */
    static __device__ __forceinline__ int ahead_of_own(const rt_attn_bwd_item &item)
    {
        return min((tiles_of(item.len, QT) - 1) * QT - item.row, ROWS - QT);
    }
};

template <int D>
__device__ __forceinline__ void follow(const rt_attn_bwd_call &c)
{
    typedef layout<D> L;
    queries_pass<D> q = {c};
    const barriers bar = q.bar();
    uint32_t n = 0, given = 0; /* steps; those whose parts went out */
    for (int it = 0;; it++) {
        hopper::wait_or_trap(bar.item_full(it), it / 2 & 1);
        const rt_attn_bwd_item &item = *work_at<D>(it);
        if (uniform(item.head) < 0)
            break;
        hopper::wait_or_trap(bar.k_full(), it & 1);
        for (int ahead = uniform((tiles_of(item.len, L::QT) - 1) * L::QT - item.row); ahead >= 0; ahead -= L::QT, n++) {
            hopper::wait_or_trap(bar.ds_full(n), n / 2 & 1);
            hopper::fence_async(); /* what both warpgroups wrote */
            if (ahead >= ROWS) {
                q.part_out(n, 0, given);
                q.part_out(n, 1, given++);
            } else {
                q.own_part(n, 0, item, ahead, given);
                q.own_part(n, 1, item, ahead, given);
            }
        }
        hopper::barrier_arrive_warp(bar.item_empty(it));
    }
}

#endif

}

#endif
