/* BF16 products of a gated MLP on compute capability 9.0 with silu(gate) * up in them: what gated_fwd and gated_bwd (core/backend.h) call where the shape
 * suits. Sums are float32, in one pass over K; gate, up and dh are rounded to BF16 before silu sees them, as separate operations would have it.
 * Everything is row-major and dense, 16-byte aligned. */
#ifndef RT_CORE_CUDA_GATED_SM90_H
#define RT_CORE_CUDA_GATED_SM90_H

#include "core/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* forward:  [gate | up] = a w^T, h = silu(gate) * up.       a [n, K], w [2I, K], gate_up [n, 2I] = or NULL, h [n, I] = or NULL
 * backward: dh = a w, [d gate | d up] from it and gate_up.  a [n, K], w [K, I], gate_up [n, 2I], d_gate_up [n, 2I] =, h [n, I] = or NULL */
struct rt_cuda_gated {
    const void *a, *w;
    void *gate_up, *d_gate_up, *h;
    int64_t n, K, I;
    bool back;
};

/* The device has these instructions, and shapes and addresses suit them: K a multiple of 64, I of 128 (backward: 256). */
bool rt_cuda_gated_fits(const struct rt_dev *dev, const struct rt_cuda_gated *g);
/* For arguments that fit. */
enum rt_status rt_cuda_gated(struct rt_queue *q, const struct rt_cuda_gated *g, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
