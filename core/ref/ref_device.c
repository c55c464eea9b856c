/* The device of the reference backend: host memory, everything done when the call returns. And the table. */
#include <stdio.h>

#include "core/host_device.h"
#include "core/ref/ref.h"

static bool available(char *why, int cap)
{
    if (cap > 0)
        why[0] = '\0';
    return true;
}

static enum rt_status dev_open(const struct rt_dev_options *o, struct rt_dev **out, struct rt_err *err)
{
    const enum rt_status st = rt_alloc(1, sizeof **out, "the ref device", out, err);
    if (st != RT_OK)
        return st;
    rt_host_dev_init(&(*out)->host, o, REF_ACT);
    (*out)->threads_asked = o != NULL ? o->threads : 0;
    return RT_OK;
}

static void dev_close(struct rt_dev *dev)
{
    rt_free(dev);
}

static const char *describe(__attribute__((unused)) const struct rt_dev *dev)
{
    return REF_IS64 ? "1 thread, plain loops in float64" : "1 thread, plain loops";
}

static enum rt_status weight_load(__attribute__((unused)) struct rt_dev *dev, __attribute__((unused)) struct rt_queue *q,
                                  const struct rt_weight_src *src, struct rt_weight **out, struct rt_err *err)
{
    const char *name = src->name != NULL ? src->name : "unnamed";
    if (src->dtype != RT_F32 && src->dtype != RT_F16 && src->dtype != RT_BF16 && src->dtype != RT_E4M3)
        return rt_fail(err, RT_UNSUPPORTED, "weight '%s' is %s; expected F32, F16, BF16 or F8_E4M3", name,
                       rt_dtype_name(src->dtype));
    if (src->rows <= 0 || src->cols <= 0 || src->data == NULL)
        return rt_fail(err, RT_SHAPE, "weight '%s' is [%lld, %lld]: expected both positive, and data", name,
                       (long long)src->rows, (long long)src->cols);
    if ((src->dtype == RT_E4M3) != (src->scale_inv != NULL))
        return rt_fail(err, RT_FORMAT, "weight '%s' is %s and %s; scales belong to F8_E4M3 and to it alone", name,
                       rt_dtype_name(src->dtype), src->scale_inv != NULL ? "has block scales" : "has no block scales");
    const enum rt_status st = rt_alloc(1, sizeof **out, "a weight handle", out, err);
    if (st != RT_OK)
        return st;
    **out = (struct rt_weight){src->dtype, src->rows, src->cols, src->data, src->scale_inv, ""};
    snprintf((*out)->name, sizeof (*out)->name, "%s", name);
    return RT_OK;
}

static enum rt_status weight_param(__attribute__((unused)) struct rt_dev *dev, void *p, int64_t rows, int64_t cols,
                                   struct rt_weight **out, struct rt_err *err)
{
    const enum rt_status st = rt_alloc(1, sizeof **out, "a weight handle", out, err);
    if (st == RT_OK)
        **out = (struct rt_weight){REF_ACT, rows, cols, p, NULL, "parameter"};
    return st;
}

static void weight_free(__attribute__((unused)) struct rt_dev *dev, struct rt_weight *w)
{
    rt_free(w);
}

static size_t weight_bytes(__attribute__((unused)) const struct rt_weight_src *src)
{
    return sizeof(struct rt_weight);
}

#ifdef RT_REF_REAL64
const struct rt_backend rt_backend_ref64 = {
    .name = "ref64",
#else
const struct rt_backend rt_backend_ref = {
    .name = "ref",
#endif
    .act = REF_ACT,
    .available = available,
    .open = dev_open,
    .close = dev_close,
    .describe = describe,
    RT_HOST_DEVICE_ENTRIES,
    .weight_load = weight_load,
    .weight_param = weight_param,
    .weight_free = weight_free,
    .weight_bytes = weight_bytes,
#define TABLE_ENTRY(op) .op = REF(op),
    RT_BACKEND_OPS(TABLE_ENTRY)
#undef TABLE_ENTRY
};
