/* The gated MLP of students: one kernel where the device and the shape suit it, else the product and the gating behind it. Contracts: core/backend.h. */
#include "core/cuda/gated_sm90.h"
#include "core/cuda/gemm.h"
#include "core/cuda/skinny.h"

/* Rows from which it pays: those of two blocks fill too few of the GPU's (a recorded step of 64 tokens took 11 % more for SmolLM2-135M). */
enum { FEW = 256 };

/* The kernel takes weights as they lie. */
static bool suits(const struct rt_dev *dev, const struct rt_weight *w, const struct rt_cuda_gated *g)
{
    return w->dtype == RT_BF16 && g->n > FEW && rt_cuda_gated_fits(dev, g);
}

enum rt_status rt_cuda_gated_fwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_gated_fwd_args *a, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_cuda_weight_check(a->w, "gated_fwd", 2 * a->I, a->K, false, err));
    struct rt_linear_fwd_args product = {.x = {.data = (void *)(uintptr_t)a->x}, .w = a->w, .bias = a->bias, .y = a->h, .n = a->n, .K = a->K, .N = 2 * a->I,
                                         .row_exact = a->row_exact};
    if (!a->kept && a->h != NULL && rt_cuda_skinny_hopper_fits(dev, &product))
        return rt_cuda_skinny_hopper_gated(q, &product, err);
    const struct rt_cuda_gated g = {.a = a->x, .w = a->w->data, .gate_up = a->kept ? a->gate_up : NULL, .h = a->h, .n = a->n, .K = a->K, .I = a->I};
    if (!a->row_exact && a->bias == NULL && suits(dev, a->w, &g)) {
        RT_TRY(rt_cuda_gated(q, &g, err));
        goto out;
    }
    product.y = a->gate_up;
    const struct rt_swiglu_fwd_args gate = {.gate = a->gate_up, .up = (const char *)a->gate_up + a->I * 2, .ld = 2 * a->I, .h = a->h, .n = a->n, .I = a->I};
    RT_TRY(rt_cuda_linear_fwd(dev, q, &product, err));
    if (a->h != NULL)
        RT_TRY(rt_cuda_swiglu_fwd(dev, q, &gate, err));
out:
    return st;
}

enum rt_status rt_cuda_gated_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_gated_bwd_args *a, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_cuda_weight_check(a->w, "gated_bwd", a->N, a->I, false, err));
    const struct rt_cuda_gated g = {.a = a->dy, .w = a->w->data, .gate_up = (void *)(uintptr_t)a->gate_up, .d_gate_up = a->d_gate_up, .h = a->h, .n = a->n,
                                    .K = a->N, .I = a->I, .back = true};
    if (suits(dev, a->w, &g)) {
        RT_TRY(rt_cuda_gated(q, &g, err));
        goto out;
    }
    const struct rt_linear_dgrad_args product = {.dy = a->dy, .w = a->w, .dx = a->dh, .n = a->n, .K = a->I, .N = a->N};
    const struct rt_swiglu_bwd_args gate = {.gate = a->gate_up, .up = (const char *)a->gate_up + a->I * 2, .dh = a->dh, .ld = 2 * a->I, .dgate = a->d_gate_up,
                                            .dup = (char *)a->d_gate_up + a->I * 2, .h = a->h, .n = a->n, .I = a->I};
    RT_TRY(rt_cuda_linear_dgrad(dev, q, &product, err));
    RT_TRY(rt_cuda_swiglu_bwd(dev, q, &gate, err));
out:
    return st;
}
