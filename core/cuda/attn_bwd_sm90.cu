/* Attention backward for compute capability 9.0, the main kernel (attn_bwd.h: what is around it). One pass:
 *
 *   a block keeps 128 keys of one query head and walks over the tiles of queries, the last first; for each
 *   S^T = K Q^T, dP^T = V dO^T, P = exp(scale S - lse), dS = P (dP - delta):    dV += P^T dO,  dK += dS^T Q  in registers,
 *   dQ = dS K  to device memory.
 *
 * Two warpgroups multiply, 64 keys each, with P^T and dS^T as operands in registers; dS^T also goes to shared memory, where both read it for their
 * parts of dQ. A step leaves dS to the next one, which asks for its products before its own scores, so that exponentials fall beside products.
 * Nothing is in flight across a loop's end: the compiler would serialise it.
 * One warp keeps rings of queries and of dO filled by bulk copies; two others bring the parts of dQ to device memory by bulk additions.
 *
 * Order: a part of dQ gets its sums in ascending order of the key blocks, each after the one before has counted itself in `added`. All blocks walk
 * from the last queries to the first, so that a block follows the one before it a step behind. Blocks stay and take work by a ticket: a block only
 * waits for work with a smaller ticket, which another block already has, so waiting ends, however many blocks run at a time.
 */
#include "core/cuda/attn_bwd.h"
#include "core/cuda/attn_sm90.cuh"

namespace {

enum { CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1), ROWS = RT_ATTN_BWD_ROWS, STAGES = 2, PART = RT_ATTN_BWD_PART, READERS = 4 * CONSUMERS + 2 };

struct maps {
    CUtensorMap q, k, v, dout;
};

/* Shared memory: keys, values; rings of queries, dO, dS^T (128 x QT), parts of dQ, lse2 and delta; barriers; the work. */
template <int D>
struct layout {
    enum {
        QT = D == 64 ? 128 : 64, PARTS = ROWS * D / PART, /* of dQ, for 128 rows */
        k = ROWS * D * 2, q = QT * D * 2, ds = ROWS * QT * 2, part = PART * 4, stat = QT * 4, /* bytes */
        v_from = k, q_from = v_from + k, do_from = q_from + STAGES * q, ds_from = do_from + STAGES * q, dq_from = ds_from + 2 * ds,
        lse_from = dq_from + STAGES * CONSUMERS * part, delta_from = lse_from + STAGES * stat, bar_from = delta_from + STAGES * stat,
        item_from = bar_from + (2 + 4 * STAGES + 2 * STAGES * CONSUMERS + 4) * 8, bytes = item_from + 2 * sizeof(rt_attn_bwd_item),
    };
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct barriers {
    uint32_t at;
    __device__ __forceinline__ uint32_t kv_full() const { return at; }
    __device__ __forceinline__ uint32_t kv_empty() const { return at + 8; }
    __device__ __forceinline__ uint32_t q_full(uint32_t i) const { return at + 16 + i % STAGES * 8; }
    __device__ __forceinline__ uint32_t q_empty(uint32_t i) const { return at + 16 + (STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t do_full(uint32_t i) const { return at + 16 + (2 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t do_empty(uint32_t i) const { return at + 16 + (3 * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t dq_full(int wg, uint32_t i) const { return at + 16 + (4 * STAGES + wg * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t dq_empty(int wg, uint32_t i) const { return at + 16 + (6 * STAGES + wg * STAGES + i % STAGES) * 8; }
    __device__ __forceinline__ uint32_t item_full(int i) const { return at + 16 + (8 * STAGES + i % 2) * 8; }
    __device__ __forceinline__ uint32_t item_empty(int i) const { return at + 16 + (8 * STAGES + 2 + i % 2) * 8; }
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

/* One thread: takes work and keeps the rings filled. */
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
        if (it > 0)
            hopper::wait_or_trap(bar.kv_empty(), (it - 1) & 1);
        hopper::barrier_expect(bar.kv_full(), 2 * L::k);
        load_tile<D, ROWS>(base, &m.k, item.head / c.group, item.first + item.row, bar.kv_full());
        load_tile<D, ROWS>(base + L::v_from, &m.v, item.head / c.group, item.first + item.row, bar.kv_full());
        int t = tiles_of(item.len, L::QT) - 1, left = t - item.row / L::QT + 1, row = item.first + t * L::QT;
        int64_t stat = ((int64_t)item.head * c.n_tile + item.tile) * ROWS + t * L::QT;
        for (; left > 0; left--, n++, row -= L::QT, stat -= L::QT) {
            const uint32_t stage = n % STAGES;
            if (n >= STAGES)
                hopper::wait_or_trap(bar.q_empty(n), (n / STAGES - 1) & 1);
            hopper::barrier_expect(bar.q_full(n), L::q + L::stat);
            load_tile<D, L::QT>(base + L::q_from + stage * L::q, &m.q, item.head, row, bar.q_full(n));
            hopper::load_bytes(base + L::lse_from + stage * L::stat, c.lse2 + stat, L::stat, bar.q_full(n));
            if (n >= STAGES)
                hopper::wait_or_trap(bar.do_empty(n), (n / STAGES - 1) & 1);
            hopper::barrier_expect(bar.do_full(n), L::q + L::stat);
            load_tile<D, L::QT>(base + L::do_from + stage * L::q, &m.dout, item.head, row, bar.do_full(n));
            hopper::load_bytes(base + L::delta_from + stage * L::stat, c.delta + stat, L::stat, bar.do_full(n));
        }
    }
}

/* ---- dQ to device memory ---- */

/* Of query tile t of a sequence, the part of a warpgroup: 64 columns, or with heads of 64 its rows. */
template <int D>
__device__ __forceinline__ int64_t part_of(const rt_attn_bwd_call &c, const rt_attn_bwd_item &item, int t, int wg)
{
    return ((int64_t)item.head * c.n_tile + item.tile) * layout<D>::PARTS + 2 * t + wg;
}
__device__ __forceinline__ void wait_added(const int32_t *count, int want)
{
#pragma unroll 1
    for (uint32_t tries = 0; tries < 1u << 28; tries++) { /* minutes: see barrier_wait */
        int32_t is;
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(is) : "l"(count) : "memory");
        if (is == want)
            return;
    }
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

/* One thread for the parts of a warpgroup, but for the block's own rows: the first key block stores, the others add. */
template <int D>
__device__ __forceinline__ void bring_dq(const rt_attn_bwd_call &c, int wg)
{
    typedef layout<D> L;
    const uint32_t base = pool_at();
    const barriers bar = {base + L::bar_from};
    const uint32_t from = base + L::dq_from + wg * STAGES * L::part;
    uint32_t n = 0;
    for (int it = 0;; it++) {
        hopper::wait_or_trap(bar.item_full(it), it / 2 & 1);
        const rt_attn_bwd_item item = *work_at<D>(it);
        hopper::barrier_arrive(bar.item_empty(it));
        if (item.head < 0)
            break;
        const int level = item.row / ROWS;
        for (int t = tiles_of(item.len, L::QT) - 1; t >= (item.row + ROWS) / L::QT; t--, n++) {
            const int64_t part = part_of<D>(c, item, t, wg);
            if (level > 0)
                wait_added(c.added + part, level);
            hopper::wait_or_trap(bar.dq_full(wg, n), n / STAGES & 1);
            asm volatile("fence.proxy.async;" ::: "memory");
            put_part(c.sums + part * PART, from + n % STAGES * L::part, level > 0);
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            hopper::barrier_arrive(bar.dq_empty(wg, n));
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
            asm volatile("fence.proxy.async;" ::: "memory");
            asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(c.added + part), "r"(level + 1) : "memory");
        }
    }
}

/* ---- products ---- */

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

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
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

    /* Asks for dQ and what dK gets of step n. */
    __device__ __forceinline__ void ask_before(float (&dq)[32], uint32_t n)
    {
        const uint32_t wg_at = wg * ROWS * 128, ds = pool_at() + L::ds_from + n % 2 * L::ds + (D == 64 ? wg_at : 0), keys = pool_at() + (D == 64 ? 0 : wg_at);
        const uint64_t x = hopper::descriptor_t(ds, ROWS * 128), y = hopper::descriptor_t(keys, ROWS * 128);
        hopper::mma_fence();
#pragma unroll
        for (int k = 0; k < ROWS / 16; k++)
            mma_tt(dq, x + k * 16 * 8, y + k * 16 * 8, k > 0);
        hopper::mma_commit();
        weighted_sum<D, QT>(dk, a, pool_at() + L::q_from + n % STAGES * L::q);
        hopper::mma_commit();
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
        shared_to_async();
        __syncwarp();
        if (own_lane() == 0)
            hopper::barrier_arrive(bar().dq_full(wg, n));
    }
    /* The queries of the block's own rows: no key block comes after this one, so the sum is rounded and leaves. Waits for the products of dQ. */
    __device__ __forceinline__ void dq_last(float (&dq)[32], const rt_attn_bwd_item &item, int ahead)
    {
        const int level = item.row / ROWS;
        const int64_t part = part_of<D>(c, item, (item.row + ahead) / QT, wg);
        float4 before[8];
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
        hopper::mma_wait<1>();
        pin(dq);
        const int row = item.row + ahead + (D == 64 ? 64 * wg : 0) + threadIdx.x % 128 / 32 * 16 + own_lane() / 4, col = (D == 64 ? 0 : 64 * wg) + own_lane() % 4 * 2;
        bf16 *to = c.dq + ((int64_t)item.first + row) * c.q_ld + item.head * c.q_head + col;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (col + 8 * j >= c.dqk)
                break;
            if (row < item.len)
                *(uint32_t *)(to + 8 * j) = pack((dq[4 * j] + before[j].x) * c.scale, (dq[4 * j + 1] + before[j].y) * c.scale);
            if (row + 8 < item.len)
                *(uint32_t *)(to + 8 * c.q_ld + 8 * j) = pack((dq[4 * j + 2] + before[j].z) * c.scale, (dq[4 * j + 3] + before[j].w) * c.scale);
        }
    }
    /* ahead: of the block's first key, the tile's first query is. */
    __device__ __forceinline__ void to_weights(float (&s)[QT / 2], uint32_t stage, int ahead)
    {
        const uint32_t lse = pool_at() + L::lse_from + stage * L::stat + own_lane() % 4 * 8;
        if (ahead < 64 * wg + 64) { /* queries before a key; those beyond the sequence have lse2 inf */
            const int key = threadIdx.x / 32 * 16 + own_lane() / 4 - own_lane() % 4 * 2 - ahead;
#pragma unroll
            for (int i = 0; i < QT / 2; i++)
                if (i / 4 * 8 + i % 2 - i / 2 % 2 * 8 < key)
                    s[i] = -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < QT / 8; j++) {
            const float2 b = load_float2(lse + 32 * j);
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[4 * j + i] = exp2_fast(fmaf(s[4 * j + i], scale_log2, i & 1 ? -b.y : -b.x));
        }
    }
    /* P, as the product for dV has it (there are no registers for it in float32), and dP to dS^T. */
    __device__ __forceinline__ void to_ds(const float (&dp)[QT / 2], const uint32_t (&p)[QT / 16][4], uint32_t stage)
    {
        const uint32_t delta = pool_at() + L::delta_from + stage * L::stat + own_lane() % 4 * 8;
#pragma unroll
        for (int k = 0; k < QT / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const float2 b = load_float2(delta + 64 * k + 16 * i);
                const int at = 8 * k + 2 * i;
                a[k][i] = pack(low(p[k][i]) * (dp[at] - b.x), high(p[k][i]) * (dp[at + 1] - b.y));
                a[k][i + 1] = pack(low(p[k][i + 1]) * (dp[at + 2] - b.x), high(p[k][i + 1]) * (dp[at + 3] - b.y));
            }
    }
    /* dS^T [128 keys x QT] in blocks of 64 queries, rows of 128 bytes in the 128-byte swizzle. */
    __device__ __forceinline__ void ds_out(uint32_t n)
    {
        const int key = threadIdx.x / 32 * 16 + own_lane() % 16; /* matrices 0 and 2: the first 8 keys */
        const uint32_t to = pool_at() + L::ds_from + n % 2 * L::ds + key * 128;
#pragma unroll
        for (int k = 0; k < QT / 16; k++) {
            const uint32_t at = to + k / 4 * ROWS * 128 + ((2 * (k % 4) + own_lane() / 16) ^ (key & 7)) * 16;
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a[k][0]), "r"(a[k][1]), "r"(a[k][2]),
                         "r"(a[k][3]) : "memory");
        }
    }

    /* The rest of step n where all queries come before the warpgroup's keys: dS is 0. (The other one waits for the tiles.) */
    __device__ __forceinline__ void none_left(uint32_t n)
    {
        hopper::mma_wait<0>();
        pin(dk);
        if (first_of_wg())
            hopper::barrier_arrive(bar().q_empty(n - 1));
#pragma unroll
        for (int k = 0; k < QT / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[k][i] = 0;
        ds_out(n);
        shared_to_async();
        consumers_sync();
        if (first_of_wg())
            hopper::barrier_arrive(bar().do_empty(n));
    }

    /* Step n of all. */
    template <bool First>
    __device__ __forceinline__ void step(uint32_t n, int ahead, int it)
    {
        const uint32_t stage = n % STAGES, x1 = pool_at() + wg * 64 * 128, x2 = x1 + L::v_from, q = pool_at() + L::q_from + stage * L::q,
                       dout = pool_at() + L::do_from + stage * L::q;
        float s[QT / 2], dp[QT / 2];
        uint32_t b[QT / 16][4];
        if constexpr (!First) {
            float dq[32];
            ask_before(dq, n - 1);
            if (D == 128 && ahead == 0) {
                dq_last(dq, *work_at<D>(it), QT);
            } else {
                hopper::mma_wait<1>();
                pin(dq);
                dq_out(dq);
            }
        }
        if constexpr (!First && D == 128)
            if (ahead == 0 && wg == 1) {
                none_left(n);
                return;
            }
        hopper::wait_or_trap(bar().q_full(n), n / STAGES & 1);
        hopper::mma_fence();
        scores<D, ROWS, QT>(s, x1, q);
        hopper::mma_commit();
        if constexpr (!First && D == 64) { /* registers: dS of the step before, or dP */
            hopper::mma_wait<1>();
            pin(dk);
        }
        hopper::wait_or_trap(bar().do_full(n), n / STAGES & 1);
        hopper::mma_fence();
        scores<D, ROWS, QT>(dp, x2, dout);
        hopper::mma_commit();
        hopper::mma_wait<1>();
        pin(s);
        if constexpr (!First) {
            pin(dk);
            if (first_of_wg())
                hopper::barrier_arrive(bar().q_empty(n - 1));
        }
        to_weights(s, stage, ahead);
        pack_all<QT / 2>(b, s);
        hopper::mma_fence();
        weighted_sum<D, QT>(dv, b, dout);
        hopper::mma_commit();
        hopper::mma_wait<1>();
        pin(dp);
        to_ds(dp, b, stage);
        ds_out(n);
        shared_to_async();
        consumers_sync(); /* two buffers of dS: nobody reads the one that the next step writes */
        hopper::mma_wait<0>();
        pin(dv);
        if (first_of_wg())
            hopper::barrier_arrive(bar().do_empty(n));
    }
    /* dK or dV of the warpgroup's keys, with d elements: to `all`, or where the group has several heads to this one's in `heads`. */
    __device__ __forceinline__ void sum_out(const float (&sum)[D / 2], float factor, const rt_attn_bwd_item &item, bf16 *all, int64_t ld, int64_t head,
                                            bf16 *heads, int d)
    {
        const int hk = item.head / c.group, g = item.head % c.group;
        const float f[2] = {factor, factor};
        bf16 *to = c.group > 1 ? heads + ((g * c.n + item.first) * c.nkv + hk) * d : all + hk * head + item.first * ld;
        sums_out<D>(sum, f, to, c.group > 1 ? (int64_t)c.nkv * d : ld, d, item.row + threadIdx.x / 32 * 16 + own_lane() / 4, item.len, own_lane());
    }
    /* After the last step n. */
    __device__ __forceinline__ void last(uint32_t n, int it)
    {
        const rt_attn_bwd_item &item = *work_at<D>(it);
        float dq[32];
        ask_before(dq, n);
        dq_last(dq, item, 0);
        if (first_of_wg())
            hopper::barrier_arrive(bar().kv_empty());
        sum_out(dv, 1, item, c.dv_out, c.v_ld, c.v_head, c.dv_head, c.dv);
        hopper::mma_wait<0>();
        pin(dk);
        if (first_of_wg())
            hopper::barrier_arrive(bar().q_empty(n));
        sum_out(dk, c.scale, item, c.dk, c.k_ld, c.k_head, c.dk_head, c.dqk);
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
        hopper::wait_or_trap(bar.kv_full(), it & 1);
        int ahead = uniform((tiles_of(item->len, L::QT) - 1) * L::QT - item->row);
        k.template step<true>(n++, ahead, it);
        while ((ahead -= L::QT) >= 0)
            k.template step<false>(n++, ahead, it);
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
        hopper::barrier_init(bar.kv_full(), 1);
        hopper::barrier_init(bar.kv_empty(), CONSUMERS);
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(bar.q_full(i), 1);
            hopper::barrier_init(bar.q_empty(i), CONSUMERS);
            hopper::barrier_init(bar.do_full(i), 1);
            hopper::barrier_init(bar.do_empty(i), CONSUMERS);
            for (int wg = 0; wg < CONSUMERS; wg++) {
                hopper::barrier_init(bar.dq_full(wg, i), 4); /* warps */
                hopper::barrier_init(bar.dq_empty(wg, i), 1);
            }
        }
        for (int i = 0; i < 2; i++) {
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
        } else if (warp <= 4 * CONSUMERS + 2 && own_lane() == 0) {
            bring_dq<D>(c, warp - 4 * CONSUMERS - 1);
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
