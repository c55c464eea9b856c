/* Attention backward for compute capability 9.0, the main kernel (attn_bwd.h: what is around it). One pass:
 *
 *   a block keeps 128 keys of one query head and walks over the tiles of queries, the last first; for each
 *   S^T = K Q^T, dP^T = V dO^T, P = exp(scale S - lse), dS = P (dP - delta):    dV += P^T dO,  dK += dS^T Q  in registers,
 *   dQ = dS K  to device memory.
 *
 * Two warpgroups have 64 keys each, with P^T and dS^T as operands in registers. A step leaves dS to the next one, whose exponentials fall beside its
 * product for dK; nothing is in flight across a loop's end: the compiler would serialise it. dS^T also goes to shared memory, where a third warpgroup
 * takes it for dQ, a step or two behind (attn_bwd_queries.cuh): neither its waits nor the registers of dQ are in the way of the other two.
 * One warp keeps rings of queries and of dO filled by bulk copies; two others bring the parts of dQ to device memory by bulk additions, and a fourth
 * counts them there (attn_bwd_sm90.cuh).
 *
 * Order: a part of dQ gets its sums in ascending order of the key blocks, each after the one before has counted itself in `added`. All blocks walk
 * from the last queries to the first, so that a block follows the one before it a step behind. Blocks stay and take work by a ticket: a block only
 * waits for work with a smaller ticket, which another block already has, so waiting ends, however many blocks run at a time.
 *
 * What limits heads of 128 is the way of dQ's parts to device memory: of 370 KB that a step moves through shared memory (2,900 cycles, where tensor cores
 * need 2,560) 64 are theirs; their additions and the tiles keep the L2 busy; and a block that has just begun waits for the one before it. In long runs
 * the GPU is at its power limit. Slower: dQ by vector reductions out of registers; a part counted a step later; a part counted by the thread that brings
 * it; sums of their own for every other key block; a block for several heads of a key head. Two blocks of a cluster
 * that share what they load and add up have little to gain: without half of the loads and additions, and without waits, it takes over nine tenths of the time.
 */
#include "core/cuda/attn_bwd_queries.cuh"

namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ float2 load_float2(uint32_t at)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ float low(uint32_t bf16s) { return __uint_as_float(bf16s << 16); }
__device__ __forceinline__ float high(uint32_t bf16s) { return __uint_as_float(bf16s & 0xffff0000u); }

/* lse2 or delta of a thread's queries 8 j + 2 (lane % 4) and the next, in shared memory. */
struct stats_at {
    uint32_t at;
    __device__ __forceinline__ float2 operator[](int j) const { return load_float2(at + 32 * j); }
};

/* What a warpgroup carries from step to step; little else is left of its registers. Accumulators as a product leaves them: element 4 j + 2 half + e is
 * key row + 8 half, query 8 j + e of the thread's. */
template <int D>
struct keys_pass {
    typedef layout<D> L;
    enum { QT = L::QT };
    const rt_attn_bwd_call &c;
    int wg; /* which one this is */
    float scale_log2;
    float dk[D / 2], dv[D / 2];
    uint32_t a[QT / 16][4]; /* P^T, then dS^T, which stays for the next step */

    __device__ __forceinline__ barriers bar() const { return {pool_at() + L::bar_from}; }

    __device__ __forceinline__ stats_at lse_of(uint32_t n) const { return {pool_at() + L::lse_from + n % STAGES * L::stat + own_lane() % 4 * 8}; }
    __device__ __forceinline__ stats_at delta_of(uint32_t n) const { return {pool_at() + L::delta_from + n % STAGES * L::stat + own_lane() % 4 * 8}; }

    /* Products of step n, asked for. */
    __device__ __forceinline__ void ask_s(float (&s)[QT / 2], uint32_t n)
    {
        hopper::wait_or_trap(bar().q_full(n), n / STAGES & 1);
        hopper::mma_fence();
        scores<D, ROWS, QT>(s, pool_at() + wg * 64 * 128, pool_at() + L::q_from + n % STAGES * L::q);
        hopper::mma_commit();
    }
    /* first: of the work `it`, which waits for its values. */
    __device__ __forceinline__ void ask_dp(float (&dp)[QT / 2], uint32_t n, bool first, int it)
    {
        if (first)
            hopper::wait_or_trap(bar().v_full(), it & 1);
        hopper::wait_or_trap(bar().do_full(n), n / STAGES & 1);
        hopper::mma_fence();
        scores<D, ROWS, QT>(dp, pool_at() + L::v_from + wg * 64 * 128, pool_at() + L::do_from + n % STAGES * L::q);
        hopper::mma_commit();
    }
    __device__ __forceinline__ void ask_dv(uint32_t n)
    {
        weighted_sum<D, QT>(dv, a, pool_at() + L::do_from + n % STAGES * L::q);
        hopper::mma_commit();
    }
    __device__ __forceinline__ void ask_dk(uint32_t n)
    {
        weighted_sum<D, QT>(dk, a, pool_at() + L::q_from + n % STAGES * L::q);
        hopper::mma_commit();
    }
    /* Tiles of step n have been read by this warpgroup. */
    __device__ __forceinline__ void q_read(uint32_t n)
    {
        if (first_of_wg())
            hopper::barrier_arrive(bar().q_empty(n));
    }
    __device__ __forceinline__ void do_read(uint32_t n)
    {
        if (first_of_wg())
            hopper::barrier_arrive(bar().do_empty(n));
    }
    /* Keys and values, in the work's last step. */
    __device__ __forceinline__ void k_read(int ahead)
    {
        if (ahead == 0 && first_of_wg())
            hopper::barrier_arrive(bar().k_empty());
    }
    __device__ __forceinline__ void v_read(int ahead)
    {
        if (ahead == 0 && first_of_wg())
            hopper::barrier_arrive(bar().v_empty());
    }
    /* Of the eights From .. To - 1 of queries. ahead: of the block's first key, the tile's first query is. */
    template <int From, int To>
    __device__ __forceinline__ void to_weights(float (&s)[QT / 2], const stats_at &lse2, int ahead)
    {
        if (From == 0 && ahead < 64 * wg + 64) { /* queries before a key; those beyond the sequence have lse2 inf */
            const int key = threadIdx.x / 32 * 16 + own_lane() / 4 - own_lane() % 4 * 2 - ahead;
#pragma unroll
            for (int i = 0; i < QT / 2; i++)
                if (i / 4 * 8 + i % 2 - i / 2 % 2 * 8 < key)
                    s[i] = -INFINITY;
        }
#pragma unroll
        for (int j = From; j < To; j++) {
            const float2 b = lse2[j];
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[4 * j + i] = exp2_fast(fmaf(s[4 * j + i], scale_log2, i & 1 ? -b.y : -b.x));
        }
    }
    __device__ __forceinline__ void minus_delta(float (&dp)[QT / 2], const stats_at &delta)
    {
#pragma unroll
        for (int j = 0; j < QT / 8; j++) {
            const float2 b = delta[j];
#pragma unroll
            for (int i = 0; i < 4; i++)
                dp[4 * j + i] -= i & 1 ? b.y : b.x;
        }
    }
    /* P, as the product for dV had it (there are no registers for it in float32), times dP - delta: dS^T, in its place. */
    __device__ __forceinline__ void to_ds(const float (&dp)[QT / 2])
    {
#pragma unroll
        for (int k = 0; k < QT / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[k][i] = pack(low(a[k][i]) * dp[8 * k + 2 * i], high(a[k][i]) * dp[8 * k + 2 * i + 1]);
    }
    /* dS^T [128 keys x QT] in blocks of 64 queries, rows of 128 bytes in the 128-byte swizzle. */
    __device__ __forceinline__ void ds_out(uint32_t n)
    {
        if (n >= 2)
            hopper::wait_or_trap(bar().ds_empty(n), (n / 2 - 1) & 1);
        const int key = threadIdx.x / 32 * 16 + own_lane() % 16; /* matrices 0 and 2: the first 8 keys */
        const uint32_t to = pool_at() + L::ds_from + n % 2 * L::ds + key * 128;
#pragma unroll
        for (int k = 0; k < QT / 16; k++) {
            const uint32_t at = to + k / 4 * ROWS * 128 + ((2 * (k % 4) + own_lane() / 16) ^ (key & 7)) * 16;
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a[k][0]), "r"(a[k][1]), "r"(a[k][2]),
                         "r"(a[k][3]) : "memory");
        }
        hopper::barrier_arrive_warp(bar().ds_full(n));
    }

    /* Step n where all queries come before the warpgroup's keys: dS is 0. (The other one waits for the tiles.) */
    __device__ __forceinline__ void none_left(uint32_t n)
    {
        hopper::mma_fence();
        ask_dk(n - 1);
        k_read(0);
        v_read(0);
        hopper::mma_wait<0>();
        pin(dk);
        q_read(n - 1);
#pragma unroll
        for (int k = 0; k < QT / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[k][i] = 0;
        ds_out(n);
        do_read(n);
    }

    /* Step n of all. Nothing ties the warpgroups to each other: they may drift apart. */
    template <bool First>
    __device__ __forceinline__ void step(uint32_t n, int ahead, int it)
    {
        if constexpr (!First)
            if (ahead == 0 && wg * 64 >= QT) {
                none_left(n);
                return;
            }
        float s[QT / 2], dp[QT / 2];
        ask_s(s, n);
        if constexpr (!First)
            ask_dk(n - 1);
        hopper::mma_wait<First ? 0 : 1>();
        pin(s);
        k_read(ahead);
        to_weights<0, QT / 16>(s, lse_of(n), ahead); /* half of them: by then dK is there, and the next queries may come */
        if constexpr (!First) {
            hopper::mma_wait<0>();
            pin(dk);
            q_read(n - 1);
        }
        to_weights<QT / 16, QT / 8>(s, lse_of(n), ahead);
        pack_all<QT / 2>(a, s);
        ask_dp(dp, n, First, it);
        ask_dv(n);
        hopper::mma_wait<1>();
        pin(dp);
        v_read(ahead);
        minus_delta(dp, delta_of(n));
        hopper::mma_wait<0>();
        pin(dv);
        do_read(n);
        to_ds(dp);
        ds_out(n);
    }
    /* dK or dV of the warpgroup's keys times a factor, as the kernel after reads it. */
    __device__ __forceinline__ void sum_out(const float (&sum)[D / 2], float factor, const rt_attn_bwd_item &item, uint4 *heads)
    {
        const int64_t part = ((int64_t)item.head * c.n_tile + item.tile + item.row / ROWS) * CONSUMERS + wg;
        uint4 *to = heads + part * (D / 16 * 128) + threadIdx.x % 128;
#pragma unroll
        for (int v = 0; v < D / 16; v++)
            to[v * 128] = make_uint4(pack(sum[8 * v] * factor, sum[8 * v + 1] * factor), pack(sum[8 * v + 2] * factor, sum[8 * v + 3] * factor),
                                     pack(sum[8 * v + 4] * factor, sum[8 * v + 5] * factor), pack(sum[8 * v + 6] * factor, sum[8 * v + 7] * factor));
    }
    /* After the last step n. */
    __device__ __forceinline__ void last(uint32_t n, int it)
    {
        const rt_attn_bwd_item &item = *work_at<D>(it);
        hopper::mma_fence();
        ask_dk(n);
        sum_out(dv, 1, item, c.dv_head); /* meanwhile */
        hopper::mma_wait<0>();
        pin(dk);
        q_read(n);
        sum_out(dk, c.scale, item, c.dk_head);
    }
};

template <int D>
__device__ __forceinline__ void consume(const rt_attn_bwd_call &c)
{
    typedef layout<D> L;
    keys_pass<D> k = {c, uniform(threadIdx.x / 128), c.scale * 1.4426950408889634f};
    const barriers bar = k.bar();
    uint32_t n = 0;
    for (int it = 0;; it++) {
        hopper::wait_or_trap(bar.item_full(it), it / 2 & 1);
        const rt_attn_bwd_item *item = work_at<D>(it);
        if (uniform(item->head) < 0)
            break;
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            k.dk[i] = k.dv[i] = 0;
        hopper::wait_or_trap(bar.k_full(), it & 1);
        int ahead = uniform((tiles_of(item->len, L::QT) - 1) * L::QT - item->row);
        k.template step<true>(n++, ahead, it);
        while ((ahead -= L::QT) >= 0)
            k.template step<false>(n++, ahead, it);
        k.last(n - 1, it);
        hopper::barrier_arrive_warp(bar.item_empty(it));
    }
}

#endif

template <int D>
__global__ __launch_bounds__(THREADS, 1) void attn_bwd_sm90_kernel(const __grid_constant__ rt_attn_bwd_call c, const __grid_constant__ maps m)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    typedef layout<D> L;
    const barriers bar = {pool_at() + L::bar_from};
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        if (pool_at() % 1024 != 0)
            __trap();
        hopper::barrier_init(bar.k_full(), 1);
        hopper::barrier_init(bar.k_empty(), CONSUMERS + 1);
        hopper::barrier_init(bar.v_full(), 1);
        hopper::barrier_init(bar.v_empty(), CONSUMERS);
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(bar.q_full(i), 1);
            hopper::barrier_init(bar.q_empty(i), CONSUMERS);
            hopper::barrier_init(bar.do_full(i), 1);
            hopper::barrier_init(bar.do_empty(i), CONSUMERS);
            for (int p = 0; p < PARTS; p++) {
                hopper::barrier_init(bar.dq_full(p, i), 4); /* warps */
                hopper::barrier_init(bar.dq_empty(p, i), 1);
            }
            hopper::barrier_init(bar.dq_there(i), 1);
            hopper::barrier_init(bar.dq_counted(i), 1);
        }
        for (int i = 0; i < 2; i++) {
            hopper::barrier_init(bar.ds_full(i), 4 * CONSUMERS);
            hopper::barrier_init(bar.ds_empty(i), 1);
            hopper::barrier_init(bar.item_full(i), 1);
            hopper::barrier_init(bar.item_empty(i), READERS);
        }
        hopper::barrier_init_fence();
    }
    __syncthreads();
    if (warp < 4 * CONSUMERS) {
        hopper::registers_more<208>(); /* 2 x 208 + 72 + 24 = 4 x 128, what the launch gives */
        consume<D>(c);
    } else if (warp < 4 * (CONSUMERS + 1)) {
        hopper::registers_fewer<72>();
        follow<D>(c);
    } else {
        hopper::registers_fewer<24>();
        const int mover = warp - 4 * (CONSUMERS + 1);
        if (own_lane() > 0)
            return;
        if (mover == 0)
            produce<D>(c, m);
        else if (mover <= STAGES)
            bring_dq<D>(c, (uint32_t)mover - 1);
        else
            count_dq<D>(c);
    }
#endif
}

template <int D>
enum rt_status launch(struct rt_queue *q, const struct rt_attn_bwd_call *c, struct rt_err *err)
{
    typedef layout<D> L;
    const int items = c->n_tile * c->nh, blocks = items < q->dev->sm_count ? items : q->dev->sm_count;
    maps m;
    enum rt_status st;
    RT_TRY(attn_map(q, &m.q, c->q, c->n, c->nh, c->dqk, c->q_ld, c->q_head, L::QT, err));
    RT_TRY(attn_map(q, &m.dout, c->dout, c->n, c->nh, c->dv, c->o_ld, c->dv, L::QT, err));
    RT_TRY(attn_map(q, &m.k, c->k, c->n, c->nkv, c->dqk, c->k_ld, c->k_head, ROWS, err));
    RT_TRY(attn_map(q, &m.v, c->v, c->n, c->nkv, c->dv, c->v_ld, c->v_head, ROWS, err));
    RT_TRY(rt_cuda_check(cudaFuncSetAttribute(attn_bwd_sm90_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, L::bytes), "cudaFuncSetAttribute", err));
    attn_bwd_sm90_kernel<D><<<blocks, THREADS, L::bytes, q->stream>>>(*c, m);
    st = rt_cuda_launched("attn_bwd_sm90", err);
out:
    return st;
}

}

enum rt_status rt_cuda_attn_bwd_main(struct rt_queue *q, const struct rt_attn_bwd_call *c, struct rt_err *err)
{
    return c->D == 64 ? launch<64>(q, c, err) : launch<128>(q, c, err);
}
