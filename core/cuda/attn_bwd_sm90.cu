/* Attention backward for compute capability 9.0, the main kernel (attn_bwd.h: what is around it). One pass:
 *
 *   a block keeps 128 keys of one query head and walks over the tiles of queries, the last first; for each
 *   S^T = K Q^T, dP^T = V dO^T, P = exp(scale S - lse), dS = P (dP - delta):    dV += P^T dO,  dK += dS^T Q  in registers,
 *   dQ = dS K  to device memory.
 *
 * Two warpgroups multiply, 64 keys each, with P^T and dS^T as operands in registers; dS^T also goes to shared memory, where both read it for their
 * parts of dQ. A step leaves dS to the next one, whose exponentials fall beside those products. Nothing is in flight across a loop's end: the compiler
 * would serialise it.
 * One warp keeps rings of queries and of dO filled by bulk copies; two others bring the parts of dQ to device memory by bulk additions, and a fourth
 * counts them there (attn_bwd_sm90.cuh).
 *
 * Order: a part of dQ gets its sums in ascending order of the key blocks, each after the one before has counted itself in `added`. All blocks walk
 * from the last queries to the first, so that a block follows the one before it a step behind. Blocks stay and take work by a ticket: a block only
 * waits for work with a smaller ticket, which another block already has, so waiting ends, however many blocks run at a time.
 *
 * What limits heads of 128 (bench_cuda_attn, one H200, 12/2 heads, 2 x 8,192: 590 TFLOP/s in a burst, 526 in long runs): a step takes about 4,000
 * cycles; tensor cores need 2,560 of them, and shared memory 2,940 for operands, tiles, dS and parts of dQ, whose way to device memory costs most
 * beside: its stores to shared memory wait for operands of products, and its additions and the tiles keep the L2 busy. In long runs the card is at its
 * power limit. Slower: dQ by vector reductions out of registers; the warpgroups in turns half a step apart; dV before dP; a block for several heads of a
 * key head.
 */
#include "core/cuda/attn_bwd_sm90.cuh"

namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* d [64 x 64] (+)= a b, both read transposed: tiles whose rows are summed over. */
__device__ __forceinline__ void mma_tt(float (&d)[32], uint64_t a, uint64_t b, int add)
{
#define RT_R8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 1, 1;\n}"
                 : RT_R8(0), RT_R8(8), RT_R8(16), RT_R8(24) : "l"(a), "l"(b), "r"(add));
#undef RT_R8
}

__device__ __forceinline__ void shared_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ float2 load_float2(uint32_t at)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ float low(uint32_t bf16s) { return __uint_as_float(bf16s << 16); }
__device__ __forceinline__ float high(uint32_t bf16s) { return __uint_as_float(bf16s & 0xffff0000u); }
__device__ __forceinline__ int own_lane() { return threadIdx.x % 32; }
__device__ __forceinline__ bool first_of_wg() { return threadIdx.x % 128 == 0; }

/* lse2 or delta of a thread's queries 8 j + 2 (lane % 4) and the next, in shared memory; or in registers, asked for ahead of their use: beside
 * products a load takes long. */
struct stats_at {
    uint32_t at;
    __device__ __forceinline__ float2 operator[](int j) const { return load_float2(at + 32 * j); }
};
template <int QT>
struct stats_held {
    float2 x[QT / 8];
    __device__ __forceinline__ explicit stats_held(stats_at from)
    {
#pragma unroll
        for (int j = 0; j < QT / 8; j++)
            x[j] = from[j];
    }
    __device__ __forceinline__ float2 operator[](int j) const { return x[j]; }
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
    uint32_t given; /* parts of dQ */
    float dk[D / 2], dv[D / 2];
    uint32_t a[QT / 16][4]; /* dS^T of the step before */

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
    __device__ __forceinline__ void ask_dv(const uint32_t (&p)[QT / 16][4], uint32_t n)
    {
        weighted_sum<D, QT>(dv, p, pool_at() + L::do_from + n % STAGES * L::q);
        hopper::mma_commit();
    }
    __device__ __forceinline__ void ask_dk(uint32_t n)
    {
        weighted_sum<D, QT>(dk, a, pool_at() + L::q_from + n % STAGES * L::q);
        hopper::mma_commit();
    }
    __device__ __forceinline__ void ask_dq(float (&dq)[32], uint32_t n)
    {
        const uint32_t wg_at = wg * ROWS * 128, ds = pool_at() + L::ds_from + n % 2 * L::ds + (D == 64 ? wg_at : 0), keys = pool_at() + (D == 64 ? 0 : wg_at);
        const uint64_t x = hopper::descriptor_t(ds, ROWS * 128), y = hopper::descriptor_t(keys, ROWS * 128);
        hopper::wait_or_trap(bar().ds_full(n), n / 2 & 1);
        shared_to_async(); /* what both warpgroups wrote */
        hopper::mma_fence();
#pragma unroll
        for (int k = 0; k < ROWS / 16; k++)
            mma_tt(dq, x + k * 16 * 8, y + k * 16 * 8, k > 0);
        hopper::mma_commit();
    }
    /* Tiles and dS of step n have been read by this warpgroup. */
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
    /* The values, in the work's last step. */
    __device__ __forceinline__ void v_read(int ahead)
    {
        if (ahead == 0 && first_of_wg())
            hopper::barrier_arrive(bar().v_empty());
    }
    __device__ __forceinline__ void ds_read(uint32_t n)
    {
        if (first_of_wg())
            hopper::barrier_arrive(bar().ds_empty(n));
    }
    __device__ __forceinline__ void dq_out(const float (&dq)[32])
    {
        const uint32_t n = given++, to = pool_at() + L::dq_from + (wg * STAGES + n % STAGES) * L::part + threadIdx.x % 128 * 16;
        if (n >= STAGES)
            hopper::wait_or_trap(bar().dq_empty(wg, n), (n / STAGES - 1) & 1);
#pragma unroll
        for (int j = 0; j < 8; j++)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + j * 2048), "f"(dq[4 * j]), "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]),
                         "f"(dq[4 * j + 3]) : "memory");
        __syncwarp();
        if (own_lane() == 0)
            hopper::barrier_arrive(bar().dq_full(wg, n));
    }
    /* The sums of the key blocks before for queries of the block's own rows, `ahead` of its first. */
    __device__ __forceinline__ void dq_before(float4 (&before)[8], const rt_attn_bwd_item &item, int ahead)
    {
        const int level = item.row / ROWS;
        const int64_t part = part_of<D>(c, item, (item.row + ahead) / QT, wg);
        if (level > 0) {
            wait_added(c.added + part, level);
#pragma unroll
            for (int j = 0; j < 8; j++)
                before[j] = __ldcg((const float4 *)(c.sums + part * PART) + j * 128 + threadIdx.x % 128);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                before[j] = make_float4(0, 0, 0, 0);
        }
    }
    /* No key block comes after this one, so the sum is rounded and leaves. */
    __device__ __forceinline__ void dq_last(float (&dq)[32], const float4 (&before)[8], const rt_attn_bwd_item &item, int ahead)
    {
        const int row = item.row + ahead + (D == 64 ? 64 * wg : 0) + threadIdx.x % 128 / 32 * 16 + own_lane() / 4, column = D == 64 ? 0 : 64 * wg;
        const float factor[2] = {c.scale, c.scale};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            dq[4 * j] += before[j].x;
            dq[4 * j + 1] += before[j].y;
            dq[4 * j + 2] += before[j].z;
            dq[4 * j + 3] += before[j].w;
        }
        sums_out<64>(dq, factor, c.dq + item.first * c.q_ld + item.head * c.q_head, c.q_ld, c.dqk, row, item.len, own_lane(),
                     [=](int g) { return column + 32 * g; });
    }
    /* The product of dQ of step n, the last but one of the work, is waited for and leaves. */
    __device__ __forceinline__ void dq_ends(float (&dq)[32], uint32_t n, int it)
    {
        float4 before[8];
        dq_before(before, *work_at<D>(it), QT);
        hopper::mma_wait<0>();
        pin(dq);
        ds_read(n);
        dq_last(dq, before, *work_at<D>(it), QT);
    }
    /* ahead: of the block's first key, the tile's first query is. */
    template <class Stats>
    __device__ __forceinline__ void to_weights(float (&s)[QT / 2], const Stats &lse2, int ahead)
    {
        if (ahead < 64 * wg + 64) { /* queries before a key; those beyond the sequence have lse2 inf */
            const int key = threadIdx.x / 32 * 16 + own_lane() / 4 - own_lane() % 4 * 2 - ahead;
#pragma unroll
            for (int i = 0; i < QT / 2; i++)
                if (i / 4 * 8 + i % 2 - i / 2 % 2 * 8 < key)
                    s[i] = -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < QT / 8; j++) {
            const float2 b = lse2[j];
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[4 * j + i] = exp2_fast(fmaf(s[4 * j + i], scale_log2, i & 1 ? -b.y : -b.x));
        }
    }
    /* P, as the product for dV has it (there are no registers for it in float32), and dP to dS^T. */
    template <class Stats>
    __device__ __forceinline__ void to_ds(const float (&dp)[QT / 2], const uint32_t (&p)[QT / 16][4], const Stats &delta)
    {
#pragma unroll
        for (int k = 0; k < QT / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const float2 b = delta[2 * k + i / 2];
                const int at = 8 * k + 2 * i;
                a[k][i] = pack(low(p[k][i]) * (dp[at] - b.x), high(p[k][i]) * (dp[at + 1] - b.y));
                a[k][i + 1] = pack(low(p[k][i + 1]) * (dp[at + 2] - b.x), high(p[k][i + 1]) * (dp[at + 3] - b.y));
            }
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
        __syncwarp();
        if (own_lane() == 0)
            hopper::barrier_arrive(bar().ds_full(n));
    }

    /* Step n where all queries come before the warpgroup's keys: dS is 0. (The other one waits for the tiles.) */
    __device__ __forceinline__ void none_left(uint32_t n, int it)
    {
        float dq[32];
        hopper::mma_fence();
        ask_dk(n - 1);
        ask_dq(dq, n - 1);
        hopper::mma_wait<1>();
        pin(dk);
        q_read(n - 1);
        v_read(0);
        dq_ends(dq, n - 1, it);
#pragma unroll
        for (int k = 0; k < QT / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[k][i] = 0;
        ds_out(n);
        do_read(n);
    }

    /* Step n of all, heads of 128. Nothing ties the warpgroups together but dS of the step before, asked for late: they may drift half a step apart. */
    template <bool First>
    __device__ __forceinline__ void step(uint32_t n, int ahead, int it)
    {
        if constexpr (!First)
            if (ahead == 0 && wg == 1) {
                none_left(n, it);
                return;
            }
        float s[QT / 2], dp[QT / 2], dq[32];
        uint32_t p[QT / 16][4];
        ask_s(s, n);
        if constexpr (!First)
            ask_dk(n - 1);
        const stats_held<QT> lse2(lse_of(n));
        hopper::mma_wait<First ? 0 : 1>();
        pin(s);
        to_weights(s, lse2, ahead);
        pack_all<QT / 2>(p, s);
        if constexpr (!First) {
            hopper::mma_wait<0>();
            pin(dk);
            q_read(n - 1);
            ask_dq(dq, n - 1);
            if (ahead == 0)
                dq_ends(dq, n - 1, it);
        }
        ask_dp(dp, n, First, it);
        if (First)
            hopper::mma_fence();
        ask_dv(p, n);
        const stats_held<QT> delta(delta_of(n));
        if constexpr (!First) {
            hopper::mma_wait<2>();
            pin(dq);
            if (ahead > 0) {
                ds_read(n - 1);
                dq_out(dq);
            }
        }
        hopper::mma_wait<1>();
        pin(dp);
        v_read(ahead);
        to_ds(dp, p, delta);
        ds_out(n);
        hopper::mma_wait<0>();
        pin(dv);
        do_read(n);
    }
    /* The same with heads of 64, whose tiles have 128 queries: there are registers for dS of the step before, or for dP. */
    template <bool First>
    __device__ __forceinline__ void step64(uint32_t n, int ahead, int it)
    {
        float s[QT / 2], dp[QT / 2];
        uint32_t p[QT / 16][4];
        if constexpr (!First) {
            float dq[32];
            ask_dq(dq, n - 1);
            ask_dk(n - 1);
            hopper::mma_wait<1>();
            pin(dq);
            ds_read(n - 1);
            dq_out(dq);
        }
        ask_s(s, n);
        if constexpr (!First) {
            hopper::mma_wait<1>();
            pin(dk);
            q_read(n - 1);
        }
        ask_dp(dp, n, First, it);
        hopper::mma_wait<1>();
        pin(s);
        to_weights(s, lse_of(n), ahead);
        pack_all<QT / 2>(p, s);
        hopper::mma_fence();
        ask_dv(p, n);
        hopper::mma_wait<1>();
        pin(dp);
        v_read(ahead);
        to_ds(dp, p, delta_of(n));
        ds_out(n);
        hopper::mma_wait<0>();
        pin(dv);
        do_read(n);
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
        float dq[32];
        float4 before[8];
        ask_dq(dq, n);
        ask_dk(n);
        hopper::mma_wait<1>();
        pin(dq);
        ds_read(n);
        if (first_of_wg())
            hopper::barrier_arrive(bar().k_empty());
        dq_before(before, item, 0);
        sum_out(dv, 1, item, c.dv_head); /* while those come */
        hopper::mma_wait<0>();
        pin(dk);
        q_read(n);
        dq_last(dq, before, item, 0);
        sum_out(dk, c.scale, item, c.dk_head);
    }
};

template <int D>
__device__ __forceinline__ void consume(const rt_attn_bwd_call &c)
{
    typedef layout<D> L;
    keys_pass<D> k = {c, uniform(threadIdx.x / 128), c.scale * 1.4426950408889634f, 0};
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
        if constexpr (D == 64) {
            k.template step64<true>(n++, ahead, it);
            while ((ahead -= L::QT) >= 0)
                k.template step64<false>(n++, ahead, it);
        } else {
            k.template step<true>(n++, ahead, it);
            while ((ahead -= L::QT) >= 0)
                k.template step<false>(n++, ahead, it);
        }
        k.last(n - 1, it);
        __syncwarp();
        if (own_lane() == 0)
            hopper::barrier_arrive(bar.item_empty(it));
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
        hopper::barrier_init(bar.k_empty(), CONSUMERS);
        hopper::barrier_init(bar.v_full(), 1);
        hopper::barrier_init(bar.v_empty(), CONSUMERS);
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(bar.q_full(i), 1);
            hopper::barrier_init(bar.q_empty(i), CONSUMERS);
            hopper::barrier_init(bar.do_full(i), 1);
            hopper::barrier_init(bar.do_empty(i), CONSUMERS);
            for (int wg = 0; wg < CONSUMERS; wg++) {
                hopper::barrier_init(bar.dq_full(wg, i), 4); /* warps */
                hopper::barrier_init(bar.dq_there(wg, i), 1);
                hopper::barrier_init(bar.dq_empty(wg, i), 2);
            }
        }
        for (int i = 0; i < 2; i++) {
            hopper::barrier_init(bar.ds_full(i), 4 * CONSUMERS);
            hopper::barrier_init(bar.ds_empty(i), CONSUMERS);
            hopper::barrier_init(bar.item_full(i), 1);
            hopper::barrier_init(bar.item_empty(i), READERS);
        }
        hopper::barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * CONSUMERS) {
        hopper::registers_fewer<24>();
        if (warp == 4 * CONSUMERS) {
            if (own_lane() == 0)
                produce<D>(c, m);
        } else if (warp <= 4 * CONSUMERS + 2) {
            if (own_lane() == 0)
                bring_dq<D>(c, warp - 4 * CONSUMERS - 1);
        } else if (own_lane() == 0) {
            count_dq<D>(c);
        }
    } else {
        hopper::registers_more<240>();
        consume<D>(c);
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
