/* How many tokens went to each routed expert: expert_load.json beside the shards, for `inspect`. */
#ifndef RT_DISTILL_EXPERT_LOAD_H
#define RT_DISTILL_EXPERT_LOAD_H

#include <stdint.h>

#include "core/status.h"

struct rt_expert_load {
    char path[4096];
    int layers, experts;
    int64_t windows;  /* that are counted in total */
    int64_t *total;   /* [layers, experts] of finished windows */
    int64_t *window;  /* [layers, experts] of the window under way: what scoring adds to */
};

/* Reads what an earlier run of the same part left, if anything. A model without experts: everything here does nothing. */
enum rt_status rt_expert_load_open(struct rt_expert_load *l, const char *dir, int part, int n_parts, int layers, int experts, struct rt_err *err);
void rt_expert_load_close(struct rt_expert_load *l); /* a zeroed one is fine */
void rt_expert_load_window(struct rt_expert_load *l); /* begins a window */
/* Adds window `index` unless it was counted already, and publishes {"windows","layers":[[...]]}. */
enum rt_status rt_expert_load_save(struct rt_expert_load *l, int64_t index, struct rt_err *err);

#endif
