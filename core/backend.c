#include "core/backend.h"

#include <string.h>

/* The one place that knows which backends this build has. */
static const struct rt_backend *const backends[] = {
#ifdef RT_CUDA
    &rt_backend_cuda,
#endif
    &rt_backend_cpu,
    &rt_backend_ref,
    NULL,
};

static const char *const op_name[RT_OP_COUNT] = {
#define OP_NAME(op) #op,
    RT_BACKEND_OPS(OP_NAME)
#undef OP_NAME
};

const struct rt_backend *const *rt_backend_list(void)
{
    return backends;
}

enum rt_status rt_op_missing(const struct rt_backend *be, const char *op, struct rt_err *err)
{
    return rt_fail(err, RT_UNSUPPORTED, "the %s backend has no operation '%s'; try another --device", be->name, op);
}

static bool has_op(const struct rt_backend *be, enum rt_op op)
{
    switch (op) {
#define HAS_OP(name) case RT_OP_##name: return be->name != NULL;
        RT_BACKEND_OPS(HAS_OP)
#undef HAS_OP
    case RT_OP_COUNT: break;
    }
    return false;
}

static const char *first_missing(const struct rt_backend *be, const enum rt_op *need, int n_need)
{
    for (int i = 0; i < n_need; i++)
        if (!has_op(be, need[i]))
            return op_name[need[i]];
    return NULL;
}

enum rt_status rt_backend_select(const char *name, const enum rt_op *need, int n_need, const struct rt_backend **out,
                                 struct rt_err *err)
{
    const bool automatic = strcmp(name, "auto") == 0;
    char why[128] = "";
    const struct rt_backend *lacking = NULL;
    const char *lacked = NULL;
    for (int i = 0; backends[i] != NULL; i++) {
        const struct rt_backend *be = backends[i];
        if (automatic ? be == &rt_backend_ref : strcmp(name, be->name) != 0)
            continue;
        if (!be->available(why, sizeof why)) {
            if (automatic)
                continue;
            return rt_fail(err, RT_DEVICE, "--device %s: %s", name, why);
        }
        const char *missing = first_missing(be, need, n_need);
        if (missing == NULL) {
            *out = be;
            return RT_OK;
        }
        if (!automatic)
            return rt_op_missing(be, missing, err);
        if (lacking == NULL) {
            lacking = be;
            lacked = missing;
        }
    }
    if (lacking != NULL)
        return rt_op_missing(lacking, lacked, err);
    if (automatic)
        return rt_fail(err, RT_DEVICE, "--device auto: no device for this build's backends; use --device ref (slow)");
    if (strcmp(name, "cuda") == 0)
        return rt_fail(err, RT_DEVICE, "--device cuda: this build has no cuda backend; use --device cpu");
    return rt_fail(err, RT_USAGE, "--device %s: unknown; expected auto, cpu, cuda or ref", name);
}

enum rt_status rt_device_open(const struct rt_backend *be, const struct rt_dev_options *o, struct rt_device *out,
                              struct rt_err *err)
{
    *out = (struct rt_device){.be = be};
    enum rt_status st = be->open(o, &out->dev, err);
    if (st == RT_OK)
        st = be->queue_create(out->dev, &out->q, err);
    if (st != RT_OK)
        rt_device_close(out);
    return st;
}

void rt_device_close(struct rt_device *d)
{
    if (d->q != NULL)
        d->be->queue_free(d->dev, d->q);
    if (d->dev != NULL)
        d->be->close(d->dev);
    *d = (struct rt_device){0};
}

enum rt_status rt_device_upload(const struct rt_device *d, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    return d->be->upload(d->dev, d->q, dst, src, bytes, err);
}

enum rt_status rt_device_download(const struct rt_device *d, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    const enum rt_status st = d->be->download(d->dev, d->q, dst, src, bytes, err);
    return st == RT_OK ? rt_device_sync(d, err) : st;
}

enum rt_status rt_device_zero(const struct rt_device *d, void *dst, size_t bytes, struct rt_err *err)
{
    return d->be->zero(d->dev, d->q, dst, bytes, err);
}

enum rt_status rt_device_sync(const struct rt_device *d, struct rt_err *err)
{
    return d->be->queue_sync(d->dev, d->q, err);
}

size_t rt_device_act_size(const struct rt_device *d)
{
    return rt_dtype_size(d->be->act);
}
