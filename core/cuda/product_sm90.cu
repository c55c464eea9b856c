/* product_sm90.h: products of product_sm90.cuh whose tiles go out as they are, by bulk copies. */
#include "core/cuda/product_sm90.h"

#include "core/cuda/product_sm90.cuh"

namespace {

struct plain {
    enum { WARPS = 3, ARRIVALS = 1, SPLIT = 1, SHARED = 0 };
    int columns; /* that exist */
    bool accumulate;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static __device__ __forceinline__ void init(uint32_t) {}
    static __device__ __forceinline__ void take(const walk &w, const maps &m, const plain &p, uint32_t base, uint32_t rank, int warp)
    {
        const barriers bar = {base + BARS_AT};
        uint32_t done = 0;
        if (warp > 0 || threadIdx.x % 32 > 0)
            return;
        for (int t = first_tile(); t < w.items; t += tile_step()) {
            const item it = item_of<SPLIT>(w, t, rank);
            const place at = it.at;
            if (it.part < w.parts - 1)
                continue;
            hopper::wait_or_trap(bar.tile_full(), done++ & 1);
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const int column = at.column * BN + b * 64;
                if (at.row >= w.rows || column >= p.columns)
                    continue;
                if (p.accumulate)
                    add_box(&m.out, base + TILE_AT + b * BLOCK, column, at.row);
                else
                    store_box(&m.out, base + TILE_AT + b * BLOCK, column, at.row);
            }
            boxes_commit();
            boxes_read();
            hopper::barrier_arrive(bar.tile_empty());
        }
        boxes_written();
    }
#endif
};

template <bool F16, bool TA, bool TB>
enum rt_status run(struct rt_queue *q, const struct rt_cuda_gemm_args *g, struct rt_err *err)
{
    maps m;
    walk w = {};
    plain p = {};
    const int64_t a_rows = TA ? g->k : g->m, a_cols = TA ? g->m : g->k, b_rows = TB ? g->k : g->n, b_cols = TB ? g->n : g->k;
    enum rt_status st;
    RT_TRY(product_map(q, &m.a, F16, g->a, a_rows, a_cols, g->lda > 0 ? g->lda : a_cols, TA ? BK : BM, err));
    RT_TRY(product_map(q, &m.b, F16, g->b, b_rows, b_cols, g->ldb > 0 ? g->ldb : b_cols, TB ? BK : BN / 2, err));
    RT_TRY(product_map(q, &m.out, F16, g->d, g->m, g->n, g->ldd > 0 ? g->ldd : g->n, BM, err));
    w.rows = (int)g->m;
    w.k_blocks = (int)((g->k + BK - 1) / BK);
    w.columns = (int)((g->n + BN - 1) / BN);
    w.b_step = BN;
    w.b_apart = BN / 2;
    p.columns = (int)g->n;
    p.accumulate = g->accumulate;
    st = product_launch<plain, F16, TA, TB>(q, &m, &w, &p, "product", err);
out:
    return st;
}

bool even_rows(const void *p, int64_t ld, int64_t cols)
{
    return aligned16(p) && (ld > 0 ? ld : cols) % 8 == 0;
}

}

bool rt_cuda_product_sm90_fits(const struct rt_dev *dev, const struct rt_cuda_gemm_args *g)
{
    const int64_t most = INT32_MAX - 1024;
    return dev->cc == 90 && dev->encode_map != NULL && g->bias == NULL && g->add == NULL && !g->d_f32 && g->batch <= 1 && g->m > 0 && g->n > 0 &&
           g->k > 0 && g->m < most && g->n < most && g->k < most && !(g->a_t && g->b_t) && (!g->f16 || (!g->a_t && g->b_t && !g->accumulate)) &&
           even_rows(g->a, g->lda, g->a_t ? g->m : g->k) && even_rows(g->b, g->ldb, g->b_t ? g->k : g->n) && even_rows(g->d, g->ldd, g->n);
}

enum rt_status rt_cuda_product_sm90(struct rt_queue *q, const struct rt_cuda_gemm_args *g, struct rt_err *err)
{
    if (g->f16)
        return run<true, false, false>(q, g, err);
    if (g->a_t)
        return run<false, true, true>(q, g, err);
    return g->b_t ? run<false, false, false>(q, g, err) : run<false, false, true>(q, g, err);
}
