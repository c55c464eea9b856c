/* Rows of the head's losses in the cpu backend (loss_row.c, likelihood_row.c), shared out over tiles (loss.c). */
#ifndef RT_CORE_CPU_LOSS_H
#define RT_CORE_CPU_LOSS_H

#include "core/cpu/cpu.h"
#include "core/top_ids.h"

enum { RT_CPU_LOSS_IDS = RT_CPU_TILE / 9 }; /* ids of a row at most: its scratch is the worker's tile */

/* What the tiles need of an operation: z = x w^T [n, V], row() on each, which leaves dL/dz in z. */
struct rt_cpu_head_tiles {
    const void *x;
    const struct rt_weight *w;
    void *dx, *dw;
    int64_t n, H, V;
    void (*row)(const void *args, int64_t i, float *z, bool gradient, double *scratch);
    const void *args;
};

/* Writes the outputs of row i from its logits z [V]; with `gradient` z becomes dL/dz, else its values are unspecified.
 * scratch: 4 k doubles, and behind them k ids. */
void rt_cpu_loss_row(const struct rt_head_loss_args *a, int64_t i, float *z, bool gradient, double *scratch);
/* The same for head_likelihood. */
void rt_cpu_likelihood_row(const struct rt_head_likelihood_args *a, int64_t i, float *z, bool gradient);

#endif
