/* cuDNN, opened at run time. */
#include <stdio.h>

#include "core/cuda/cuda.h"

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
