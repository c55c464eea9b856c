/* Absorbed latent attention over the compressed cache: its kernels, one for each kind of GPU. */
#ifndef RT_CORE_CUDA_MLA_CACHED_H
#define RT_CORE_CUDA_MLA_CACHED_H

#include "core/cuda/cached.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_CUDA_MLA_SPLIT = 4096 }; /* keys of one part: a part costs a block's whole output, nh * R floats a token */

struct rt_cuda_mla {
    const void *q_lat, *q_pe, *cache; /* 16-byte aligned, as are all rows */
    void *o;
    const int32_t *slot, *pos;
    int64_t q_pe_ld, q_pe_head, capacity, n;
    int nh, R, dr, head_tiles;        /* head_tiles: nh / 64 rounded up */
    float scale;                      /* times log2 e */
    struct rt_cached_parts parts;
};

/* mma.sync, sm_80 and later: R 512 and dr 64, or 128 and 16. false: these sizes, or this GPU's shared memory, are not provided for. */
bool rt_cuda_mla_sync_takes(const struct rt_dev *dev, int R, int dr);
enum rt_status rt_cuda_mla_sync(struct rt_queue *q, const struct rt_cuda_mla *a, struct rt_err *err);
/* wgmma, compute capability 9.0: R 512 and dr 64. */
bool rt_cuda_mla_sm90_takes(const struct rt_dev *dev, int R, int dr);
enum rt_status rt_cuda_mla_sm90(struct rt_queue *q, const struct rt_cuda_mla *a, struct rt_err *err);

/* mla_cached by the fastest kernel that takes these sizes, by mma.sync's, or by plain loops. UNSUPPORTED: not that one. */
enum rt_cuda_mla_kernel { RT_CUDA_MLA_FASTEST, RT_CUDA_MLA_SYNC, RT_CUDA_MLA_PLAIN };
enum rt_status rt_cuda_mla_by(struct rt_dev *dev, struct rt_queue *q, const struct rt_mla_cached_args *a, enum rt_cuda_mla_kernel kernel,
                              struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
