/* One row of the head's loss in the cpu backend (loss_row.c), shared out by head_loss (loss.c). */
#ifndef RT_CORE_CPU_LOSS_H
#define RT_CORE_CPU_LOSS_H

#include "core/cpu/cpu.h"

/* Writes the outputs of row i from its logits z [V]; with `gradient` z becomes dL/dz, else its values are unspecified.
 * scratch: 4 k doubles. */
void rt_cpu_loss_row(const struct rt_head_loss_args *a, int64_t i, float *z, bool gradient, double *scratch);

#endif
