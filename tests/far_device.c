#include "tests/far_device.h"

static uint64_t total;

void far_memory(uint64_t bytes)
{
    total = bytes;
}

static enum rt_status memory(__attribute__((unused)) struct rt_dev *dev, struct rt_dev_memory *out, __attribute__((unused)) struct rt_err *err)
{
    *out = (struct rt_dev_memory){.free = total, .total = total};
    return RT_OK;
}

static void set_scratch(__attribute__((unused)) struct rt_dev *dev, __attribute__((unused)) uint64_t bytes)
{
}

/* The bytes on the device are the ones to use; those of the host are gone once they are copied. */
static enum rt_status weight_load(struct rt_dev *dev, struct rt_queue *q, const struct rt_weight_src *src, struct rt_weight **out, struct rt_err *err)
{
    struct rt_weight_src near = *src;
    if (src->device_data != NULL) {
        near.data = src->device_data;
        near.scale_inv = src->device_scale;
    }
    return rt_backend_cpu.weight_load(dev, q, &near, out, err);
}

struct rt_backend far_backend(void)
{
    struct rt_backend be = rt_backend_cpu;
    be.name = "far";
    be.own_memory = true;
    be.memory = memory;
    be.set_scratch = set_scratch;
    be.weight_load = weight_load;
    return be;
}
