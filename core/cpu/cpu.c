/* The cpu backend: device, memory and the table. Everything is done when a call returns, so queues and events hold nothing. */
#include "core/cpu/cpu.h"

#include <stdio.h>
#include <string.h>

#include "core/host_device.h"
#include "core/mem.h"

static bool available(char *why, int cap)
{
    if (cap > 0)
        why[0] = '\0';
    return true;
}

static void dev_close(struct rt_dev *dev)
{
    if (dev == NULL)
        return;
    for (int i = 0; i < dev->threads; i++) {
        if (dev->panel != NULL)
            rt_free(dev->panel[i]);
        if (dev->tile != NULL)
            rt_free(dev->tile[i]);
    }
    rt_free(dev->panel);
    rt_free(dev->tile);
    rt_free(dev->shared);
    rt_pool_free(dev->pool);
    rt_free(dev);
}

static enum rt_status dev_open(const struct rt_dev_options *o, struct rt_dev **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_dev *dev = NULL;

    RT_TRY(rt_alloc(1, sizeof *dev, "the cpu device", &dev, err));
    RT_TRY(rt_pool_create(o != NULL ? o->threads : 0, &dev->pool, err));
    const int threads = rt_pool_threads(dev->pool);
    RT_TRY(rt_alloc((size_t)threads, sizeof *dev->panel, "scratch of the cpu device", &dev->panel, err));
    RT_TRY(rt_alloc((size_t)threads, sizeof *dev->tile, "scratch of the cpu device", &dev->tile, err));
    dev->threads = threads;
    rt_host_dev_init(&dev->host, o, RT_F32);
    dev->shared_max = RT_CPU_SHARED_MAX;
    for (int i = 0; i < threads; i++) {
        RT_TRY(rt_alloc(RT_CPU_PANEL, sizeof(float), "scratch of the cpu device", &dev->panel[i], err));
        RT_TRY(rt_alloc(RT_CPU_TILE, sizeof(float), "scratch of the cpu device", &dev->tile[i], err));
    }
    RT_TRY(rt_cpu_blas_setup(dev->pool, err));
    snprintf(dev->description, sizeof dev->description, "%d thread%s, OpenBLAS %s", threads, threads == 1 ? "" : "s",
             rt_cpu_blas_core());
    *out = dev;
    dev = NULL;
out:
    dev_close(dev);
    return st;
}

static const char *describe(const struct rt_dev *dev)
{
    return dev->description;
}

enum rt_status rt_cpu_shared(struct rt_dev *dev, size_t bytes, void *out_ptr_to_ptr, struct rt_err *err)
{
    if (bytes > dev->shared_size) {
        rt_free(dev->shared);
        dev->shared = NULL;
        dev->shared_size = 0;
        const enum rt_status st = rt_alloc(bytes, 1, "shared scratch of the cpu device", &dev->shared, err);
        if (st != RT_OK)
            return st;
        dev->shared_size = bytes;
    }
    memcpy(out_ptr_to_ptr, &dev->shared, sizeof dev->shared);
    return RT_OK;
}

int64_t rt_cpu_grain(int64_t n, int64_t cost)
{
    const int64_t item = 1 << 15; /* element operations that make an item worth handing out: some microseconds */
    return rt_max64(1, rt_min64(n, item / rt_max64(cost, 1)));
}

struct rows_job {
    rt_cpu_rows_fn *fn;
    void *ctx;
    int64_t n, grain;
};

static void rows_item(void *ctx, int64_t item, int worker)
{
    const struct rows_job *job = ctx;
    job->fn(job->ctx, item * job->grain, rt_min64((item + 1) * job->grain, job->n), worker);
}

void rt_cpu_rows(struct rt_dev *dev, int64_t n, int64_t grain, rt_cpu_rows_fn *fn, void *ctx)
{
    rt_pool_run(dev->pool, rt_ceil_div(n, grain), rows_item, &(struct rows_job){fn, ctx, n, grain});
}

const struct rt_backend rt_backend_cpu = {
    .name = "cpu",
    .act = RT_F32,
    .available = available,
    .open = dev_open,
    .close = dev_close,
    .describe = describe,
    RT_HOST_DEVICE_ENTRIES,
    .weight_load = rt_cpu_weight_load,
    .weight_param = rt_cpu_weight_param,
    .weight_free = rt_cpu_weight_free,
    .weight_bytes = rt_cpu_weight_bytes,
    .embed_fwd = rt_cpu_embed_fwd,
    .norm_fwd = rt_cpu_norm_fwd,
    .quant = rt_cpu_quant,
    .encode_rows = rt_cpu_encode_rows,
    .linear_fwd = rt_cpu_linear_fwd,
    .rope = rt_cpu_rope,
    .swiglu_fwd = rt_cpu_swiglu_fwd,
    .route = rt_cpu_route,
    .moe_sort = rt_cpu_moe_sort,
    .moe_ffn = rt_cpu_moe_ffn,
    .head_topk = rt_cpu_head_topk,
    .head_matmul = rt_cpu_head_matmul,
    .cache_put = rt_cpu_cache_put,
    .cache_copy = rt_cpu_cache_copy,
    .mla_cached = rt_cpu_mla_cached,
    .linear_dgrad = rt_cpu_linear_dgrad,
    .linear_wgrad = rt_cpu_linear_wgrad,
    .gather = rt_cpu_gather,
    .scatter = rt_cpu_scatter,
    .sumsq = rt_cpu_sumsq,
    .axpy = rt_cpu_axpy,
    .convert = rt_cpu_convert,
    .attn_fwd = rt_cpu_attn_fwd,
    .attn_bwd = rt_cpu_attn_bwd,
    .attn_cached = rt_cpu_attn_cached,
    .rope_put = rt_cpu_rope_put,
    .linear_rope_put = rt_cpu_linear_rope_put,
    .sample = rt_cpu_sample,
    .headnorm_rope_fwd = rt_cpu_headnorm_rope_fwd,
    .headnorm_rope_bwd = rt_cpu_headnorm_rope_bwd,
    .norm_bwd = rt_cpu_norm_bwd,
    .swiglu_bwd = rt_cpu_swiglu_bwd,
    .gated_fwd = rt_cpu_gated_fwd,
    .gated_bwd = rt_cpu_gated_bwd,
    .embed_bwd = rt_cpu_embed_bwd,
    .head_loss = rt_cpu_head_loss,
    .head_likelihood = rt_cpu_head_likelihood,
    .feature_loss = rt_cpu_feature_loss,
    .adamw = rt_cpu_adamw,
};
