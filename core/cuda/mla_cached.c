#include "core/cuda/mla_cached.h"

static bool aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

static enum rt_status plain(struct rt_queue *q, const struct rt_mla_cached_args *a, int64_t q_pe_ld, int64_t q_pe_head, struct rt_err *err)
{
    const struct rt_cached_plain p = {
        .q1 = a->q_lat, .q2 = a->q_pe, .q1_ld = (int64_t)a->nh * a->R, .q1_head = a->R, .q2_ld = q_pe_ld, .q2_head = q_pe_head, .k = a->cache,
        .v = a->cache, .capacity = a->capacity, .width = a->R + a->dr, .slot = a->slot, .pos = a->pos, .o = a->o, .n = a->n, .nh = a->nh, .nkv = 1,
        .d1 = a->R, .d2 = a->dr, .dv = a->R, .scale = a->scale};
    return rt_cuda_cached_plain(q, &p, err);
}

/* Tokens as many at a time as their parts fit into the scratch. */
static enum rt_status tiled(struct rt_dev *dev, struct rt_queue *q, const struct rt_mla_cached_args *a, int64_t q_pe_ld, int64_t q_pe_head,
                            bool wgmma, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    void *temp = NULL;
    struct rt_cuda_mla w = {.cache = a->cache, .q_pe_ld = q_pe_ld, .q_pe_head = q_pe_head, .capacity = a->capacity, .nh = a->nh, .R = a->R,
                            .dr = a->dr, .head_tiles = (a->nh + 63) / 64, .scale = a->scale * 1.44269504088896341f};
    w.parts.length = RT_CUDA_MLA_SPLIT;
    w.parts.splits = (int)((a->capacity + RT_CUDA_MLA_SPLIT - 1) / RT_CUDA_MLA_SPLIT);
    const int64_t chunk = rt_cuda_cached_chunk(dev, a->n, a->nh, a->R, w.parts.splits), row = (int64_t)a->nh * a->R;
    RT_TRY(rt_cuda_cached_parts(q, chunk, a->nh, a->R, &w.parts, &temp, err));
    for (int64_t i = 0; i < a->n; i += chunk) {
        w.n = a->n - i < chunk ? a->n - i : chunk;
        w.q_lat = (const uint16_t *)a->q_lat + i * row;
        w.q_pe = (const uint16_t *)a->q_pe + i * q_pe_ld;
        w.o = (uint16_t *)a->o + i * row;
        w.slot = a->slot + i;
        w.pos = a->pos + i;
        RT_TRY(wgmma ? rt_cuda_mla_sm90(q, &w, err) : rt_cuda_mla_sync(q, &w, err));
        RT_TRY(rt_cuda_cached_merge(q, &w.parts, w.pos, w.o, w.n, a->nh, a->R, err));
    }
out:
    rt_cuda_temp_free(q, temp);
    return st;
}

enum rt_status rt_cuda_mla_by(struct rt_dev *dev, struct rt_queue *q, const struct rt_mla_cached_args *a, enum rt_cuda_mla_kernel kernel,
                              struct rt_err *err)
{
    const int64_t head = a->q_pe_head != 0 ? a->q_pe_head : a->dr, ld = a->q_pe_ld != 0 ? a->q_pe_ld : a->nh * head;
    const bool fits = aligned(a->q_lat) && aligned(a->q_pe) && aligned(a->cache) && aligned(a->o) && head % 8 == 0 && ld % 8 == 0;
    const bool wgmma = fits && kernel == RT_CUDA_MLA_FASTEST && rt_cuda_mla_sm90_takes(dev, a->R, a->dr);
    if (a->n < 1 || a->nh < 1)
        return RT_OK;
    if (wgmma || (fits && kernel != RT_CUDA_MLA_PLAIN && rt_cuda_mla_sync_takes(dev, a->R, a->dr)))
        return tiled(dev, q, a, ld, head, wgmma, err);
    if (kernel == RT_CUDA_MLA_SYNC)
        return rt_fail(err, RT_UNSUPPORTED, "mla_cached: no tensor core kernel for a latent of %d and %d", a->R, a->dr);
    return plain(q, a, ld, head, err);
}

enum rt_status rt_cuda_mla_cached(struct rt_dev *dev, struct rt_queue *q, const struct rt_mla_cached_args *a, struct rt_err *err)
{
    return rt_cuda_mla_by(dev, q, a, RT_CUDA_MLA_FASTEST, err);
}
