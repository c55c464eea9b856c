/* Attention as graphs of cuDNN. Internal to dnn*.c. */
#ifndef RT_CORE_CUDA_DNN_ATTN_H
#define RT_CORE_CUDA_DNN_ATTN_H

#include "core/cuda/dnn_graph.h"

/* What a plan is for; compared as bytes, so made from zero. Strides in elements. */
struct rt_dnn_attn {
    int64_t batch, heads, kv_heads, rows; /* rows: of each batch entry, or the most where ragged */
    int64_t dqk, dv;
    int64_t q_ld, q_head, k_ld, k_head, v_ld, v_head, o_ld;
    bool backward;
    bool stats;  /* forward: the log-sum-exp is wanted */
    bool padded; /* each entry has its own number of rows, LEN */
    bool ragged; /* and its own place, OFF_* (padded too) */
};

/* Tensors in memory. Statistics (LSE, DELTA): float [batch, heads, rows], or [row, heads] where ragged. OFF_*: int64 [batch + 1], in elements of the
 * tensor that each names; OFF_S of the statistics. LEN: int32 [batch]. SCALE, ONE, NEVER: scalars, the last minus infinity. */
enum rt_dnn_uid {
    RT_DNN_Q = 1, RT_DNN_K, RT_DNN_V, RT_DNN_O, RT_DNN_LSE, RT_DNN_DO, RT_DNN_DQ, RT_DNN_DK, RT_DNN_DV, RT_DNN_DELTA,
    RT_DNN_OFF_Q, RT_DNN_OFF_K, RT_DNN_OFF_V, RT_DNN_OFF_O, RT_DNN_OFF_S, RT_DNN_LEN, RT_DNN_SCALE, RT_DNN_ONE, RT_DNN_NEVER, RT_DNN_UIDS
};

/* The graph of s into g (begun). */
void rt_dnn_attn_graph(struct rt_dnn_graph *g, const struct rt_dnn_attn *s);

#endif
