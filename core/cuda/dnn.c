/* cuDNN, opened at run time. */
#include <stdio.h>

#include "core/cuda/dnn.h"

enum rt_status rt_cuda_dnn_open(__attribute__((unused)) struct rt_dev *dev, struct rt_cuda_dnn **out, char *why, int cap,
                               __attribute__((unused)) struct rt_err *err)
{
    *out = NULL;
    snprintf(why, (size_t)cap, "no operation uses cuDNN yet");
    return RT_OK;
}

void rt_cuda_dnn_close(__attribute__((unused)) struct rt_cuda_dnn *dnn)
{
}

enum rt_status rt_cuda_dnn_attn_fwd(struct rt_dev *dev, __attribute__((unused)) struct rt_queue *q,
                                    __attribute__((unused)) const struct rt_attn_fwd_args *a, bool must, bool *done, struct rt_err *err)
{
    *done = false;
    return must ? rt_fail(err, RT_UNSUPPORTED, "attn_fwd: cuDNN: %s", dev->dnn_why) : RT_OK;
}

enum rt_status rt_cuda_dnn_attn_bwd(struct rt_dev *dev, __attribute__((unused)) struct rt_queue *q,
                                    __attribute__((unused)) const struct rt_attn_bwd_args *a, bool must, bool *done, struct rt_err *err)
{
    *done = false;
    return must ? rt_fail(err, RT_UNSUPPORTED, "attn_bwd: cuDNN: %s", dev->dnn_why) : RT_OK;
}
