/* Devices, memory, queues, events, transfers and weights of the cuda backend. Where the host is about to wait, rt_cuda_settle sees first that what is under
 * way with other ranks can end. */
#include "core/cuda/device.h"

#include <stdio.h>
#include <string.h>

#include "core/cuda/code.h"
#include "core/cuda/convert.h"
#include "core/cuda/cuda.h"
#include "core/cuda/group8.h"
#include "core/cuda/nccl.h"
#include "core/mem.h"

#define UNUSED __attribute__((unused))

enum rt_status rt_cuda_check(cudaError_t e, const char *call, struct rt_err *err)
{
    if (e == cudaSuccess)
        return RT_OK;
    (void)cudaGetLastError(); /* an error that is not sticky must not come out of a later launch */
    const char *end = strchr(call, '(');
    const int len = end != NULL ? (int)(end - call) : (int)strlen(call);
    if (e == cudaErrorMemoryAllocation)
        return rt_fail(err, RT_NOMEM, "out of GPU memory in %.*s; use less with --gpu-memory, a smaller window or fewer slots", len, call);
    return rt_fail(err, RT_DEVICE, "GPU: %.*s: %s", len, call, cudaGetErrorString(e));
}

enum rt_status rt_cuda_launched(const char *kernel, struct rt_err *err)
{
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? RT_OK : rt_fail(err, RT_DEVICE, "GPU: cannot start kernel %s: %s", kernel, cudaGetErrorString(e));
}

int rt_cuda_count(void)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return n;
}

bool rt_cuda_available(char *why, int cap)
{
    int n = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        snprintf(why, (size_t)cap, "no usable GPU (%s)", cudaGetErrorString(e));
        return false;
    }
    if (n == 0)
        snprintf(why, (size_t)cap, "no GPU");
    return n > 0;
}

static enum rt_status open_device(struct rt_dev *dev, struct rt_err *err)
{
    struct cudaDeviceProp prop;
    uint64_t keep = UINT64_MAX;
    enum rt_status st;
    RT_CUDA_TRY(cudaSetDevice(dev->index));
    RT_CUDA_TRY(cudaGetDeviceProperties(&prop, dev->index));
    if (prop.major < 8)
        RT_FAIL(err, DEVICE, "GPU %d (%s) has compute capability %d.%d; 8.0 or later is needed", dev->index, prop.name, prop.major, prop.minor);
    RT_TRY(rt_cuda_code(&dev->cc, err));
    if (dev->cc == 0)
        RT_FAIL(err, DEVICE, "GPU %d (%s) has compute capability %d.%d, for which this program holds no code: build it with CUDA_ARCH=\"80 90a\"", dev->index,
                prop.name, prop.major, prop.minor);
    dev->sm_count = prop.multiProcessorCount;
    dev->block_shared = (int)prop.sharedMemPerBlockOptin;
    dev->l2_bytes = (size_t)prop.l2CacheSize;
    dev->scratch = (uint64_t)2 << 30;
    /* temporaries return to the pool, not to the driver */
    RT_CUDA_TRY(cudaDeviceGetDefaultMemPool(&dev->pool, dev->index));
    RT_CUDA_TRY(cudaMemPoolSetAttribute(dev->pool, cudaMemPoolAttrReleaseThreshold, &keep));
    dev->encode_map = rt_cuda_group8_driver(dev);
    RT_TRY(rt_cuda_lt_open(&dev->lt, dev->lt_why, sizeof dev->lt_why, err));
    RT_TRY(rt_cuda_dnn_open(dev, &dev->dnn, dev->dnn_why, sizeof dev->dnn_why, err));
    snprintf(dev->description, sizeof dev->description, "%s, %d multiprocessors%s%s%s", prop.name, dev->sm_count,
             prop.major == 9 && dev->cc < 90 ? ", none of its own code (CUDA_ARCH lacks 90a)" : "", dev->lt != NULL ? "" : ", no cuBLASLt",
             dev->dnn != NULL ? ", cuDNN" : ", no cuDNN");
out:
    return st;
}

enum rt_status rt_cuda_open(const struct rt_dev_options *o, struct rt_dev **out, struct rt_err *err)
{
    struct rt_dev *dev = NULL;
    char nccl[32];
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *dev, "a device", &dev, err));
    dev->index = o->index;
    RT_TRY(open_device(dev, err));
    if (o->comm != NULL) {
        const size_t used = strlen(dev->description);
        RT_TRY(rt_cuda_nccl_open(dev, o->comm, &dev->nccl, nccl, sizeof nccl, err));
        snprintf(dev->description + used, sizeof dev->description - used, ", %s", nccl);
    }
    *out = dev;
    dev = NULL;
out:
    rt_cuda_close(dev);
    return st;
}

void rt_cuda_close(struct rt_dev *dev)
{
    if (dev == NULL)
        return;
    rt_cuda_nccl_close(dev->nccl);
    rt_cuda_dnn_close(dev->dnn);
    rt_cuda_lt_close(dev->lt);
    if (dev->pool != NULL)
        (void)cudaMemPoolTrimTo(dev->pool, 0); /* what temporaries left there */
    rt_free(dev);
}

enum rt_status rt_cuda_attach(struct rt_dev *dev, struct rt_err *err)
{
    return rt_cuda_check(cudaSetDevice(dev->index), "cudaSetDevice", err);
}

const char *rt_cuda_describe(const struct rt_dev *dev)
{
    return dev->description;
}

/* ---- memory ---- */

/* An H200 with CUDA 13, cuBLASLt and cuDNN: a training that had allocated 41.3 GB held 42.2. */
enum { HELD = 900 << 20 };

enum rt_status rt_cuda_alloc(UNUSED struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err)
{
    void *p = NULL;
    const cudaError_t e = cudaMalloc(&p, bytes > 0 ? bytes : 1);
    enum rt_status st;
    if (e == cudaErrorMemoryAllocation) {
        size_t left = 0, total = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&left, &total);
        RT_FAIL(err, NOMEM, "out of GPU memory: %.1f GiB asked for, %.1f of %.1f GiB free; lower --gpu-memory or the window", (double)bytes / (1 << 30),
                (double)left / (1 << 30), (double)total / (1 << 30));
    }
    RT_CUDA_TRY(e);
    st = rt_cuda_check(cudaMemset(p, 0, bytes), "cudaMemset", err);
    if (st == RT_OK) /* memset returns before it is done, and the queues' streams do not wait for the one it runs on */
        st = rt_cuda_check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize", err);
    if (st != RT_OK) {
        (void)cudaFree(p);
        goto out;
    }
    *out = p;
out:
    return st;
}

void rt_cuda_free(struct rt_dev *dev, void *p)
{
    (void)rt_cuda_settle(dev, NULL);
    (void)cudaFree(p);
}

enum rt_status rt_cuda_host_alloc(UNUSED struct rt_dev *dev, size_t bytes, void **out, struct rt_err *err)
{
    const cudaError_t e = cudaMallocHost(out, bytes > 0 ? bytes : 1);
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return rt_fail(err, RT_NOMEM, "cannot pin %.1f GiB of host memory; lower --memory", (double)bytes / (1 << 30));
    }
    return rt_cuda_check(e, "cudaMallocHost", err);
}

void rt_cuda_host_free(struct rt_dev *dev, void *p)
{
    (void)rt_cuda_settle(dev, NULL);
    (void)cudaFreeHost(p);
}

enum rt_status rt_cuda_memory(UNUSED struct rt_dev *dev, struct rt_dev_memory *out, struct rt_err *err)
{
    size_t left, total;
    enum rt_status st;
    RT_CUDA_TRY(cudaMemGetInfo(&left, &total));
    *out = (struct rt_dev_memory){.free = left, .total = total, .held = HELD};
out:
    return st;
}

void rt_cuda_set_scratch(struct rt_dev *dev, uint64_t bytes)
{
    dev->scratch = bytes;
}

enum rt_status rt_cuda_temp(struct rt_queue *q, size_t bytes, void *out_ptr_to_ptr, struct rt_err *err)
{
    void *p = NULL;
    enum rt_status st;
    RT_CUDA_TRY(cudaMallocAsync(&p, bytes > 0 ? bytes : 1, q->stream));
    memcpy(out_ptr_to_ptr, &p, sizeof p);
out:
    return st;
}

void rt_cuda_temp_free(struct rt_queue *q, void *p)
{
    if (p != NULL)
        (void)cudaFreeAsync(p, q->stream);
}

/* ---- order ---- */

enum rt_status rt_cuda_queue_create(struct rt_dev *dev, struct rt_queue **out, struct rt_err *err)
{
    struct rt_queue *q = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *q, "a queue", &q, err));
    q->dev = dev;
    RT_CUDA_TRY(cudaSetDevice(dev->index)); /* a queue is used by the thread that makes it */
    RT_CUDA_TRY(cudaStreamCreateWithFlags(&q->stream, cudaStreamNonBlocking));
    RT_CUDA_TRY(cudaMalloc(&q->workspace, RT_CUDA_WORKSPACE));
    RT_CUDA_TRY(cudaMalloc((void **)&q->tickets, RT_CUDA_TICKETS * sizeof *q->tickets));
    RT_CUDA_TRY(cudaMemset(q->tickets, 0, RT_CUDA_TICKETS * sizeof *q->tickets));
    RT_CUDA_TRY(cudaStreamSynchronize(NULL)); /* the queue's stream does not wait for that one */
    *out = q;
    q = NULL;
out:
    rt_cuda_queue_free(dev, q);
    return st;
}

void rt_cuda_queue_free(struct rt_dev *dev, struct rt_queue *q)
{
    if (q == NULL)
        return;
    (void)rt_cuda_settle(dev, NULL);
    if (q->stream != NULL) {
        (void)cudaStreamSynchronize(q->stream);
        (void)cudaStreamDestroy(q->stream);
    }
    (void)cudaFree(q->workspace);
    (void)cudaFree(q->tickets);
    rt_free(q);
}

enum rt_status rt_cuda_queue_sync(struct rt_dev *dev, struct rt_queue *q, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_cuda_settle(dev, err));
    RT_CUDA_TRY(cudaStreamSynchronize(q->stream));
out:
    return st;
}

enum rt_status rt_cuda_event_create(UNUSED struct rt_dev *dev, struct rt_event **out, struct rt_err *err)
{
    struct rt_event *e = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc(1, sizeof *e, "an event", &e, err));
    RT_CUDA_TRY(cudaEventCreate(&e->event));
    *out = e;
    e = NULL;
out:
    rt_free(e);
    return st;
}

void rt_cuda_event_free(UNUSED struct rt_dev *dev, struct rt_event *e)
{
    if (e != NULL)
        (void)cudaEventDestroy(e->event);
    rt_free(e);
}

enum rt_status rt_cuda_event_record(UNUSED struct rt_dev *dev, struct rt_queue *q, struct rt_event *e, struct rt_err *err)
{
    return rt_cuda_check(cudaEventRecord(e->event, q->stream), "cudaEventRecord", err);
}

enum rt_status rt_cuda_event_wait(UNUSED struct rt_dev *dev, struct rt_queue *q, struct rt_event *e, struct rt_err *err)
{
    return rt_cuda_check(cudaStreamWaitEvent(q->stream, e->event, 0), "cudaStreamWaitEvent", err);
}

enum rt_status rt_cuda_event_elapsed(struct rt_dev *dev, struct rt_event *from, struct rt_event *to, double *seconds, struct rt_err *err)
{
    float ms = 0;
    enum rt_status st;
    RT_TRY(rt_cuda_settle(dev, err));
    RT_CUDA_TRY(cudaEventSynchronize(to->event));
    RT_CUDA_TRY(cudaEventElapsedTime(&ms, from->event, to->event));
    *seconds = ms / 1000.0;
out:
    return st;
}

enum rt_status rt_cuda_event_sync(struct rt_dev *dev, struct rt_event *e, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_cuda_settle(dev, err));
    RT_CUDA_TRY(cudaEventSynchronize(e->event));
out:
    return st;
}

/* ---- transfers ---- */

static bool is_pinned(const void *host)
{
    struct cudaPointerAttributes a;
    if (cudaPointerGetAttributes(&a, host) == cudaSuccess)
        return a.type == cudaMemoryTypeHost;
    (void)cudaGetLastError();
    return false;
}

/* Host memory that is not pinned is waited for by the call itself. */
static enum rt_status copy(struct rt_queue *q, void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind, struct rt_err *err)
{
    enum rt_status st;
    if (kind != cudaMemcpyDeviceToDevice)
        RT_TRY(rt_cuda_not_recorded(q, "a copy from or to the host", err));
    if (q->dev->nccl != NULL && kind != cudaMemcpyDeviceToDevice && !is_pinned(kind == cudaMemcpyHostToDevice ? src : dst))
        RT_TRY(rt_cuda_settle(q->dev, err));
    RT_CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, kind, q->stream));
out:
    return st;
}

enum rt_status rt_cuda_upload(UNUSED struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    return copy(q, dst, src, bytes, cudaMemcpyHostToDevice, err);
}

enum rt_status rt_cuda_download(UNUSED struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    return copy(q, dst, src, bytes, cudaMemcpyDeviceToHost, err);
}

enum rt_status rt_cuda_copy(UNUSED struct rt_dev *dev, struct rt_queue *q, void *dst, const void *src, size_t bytes, struct rt_err *err)
{
    return copy(q, dst, src, bytes, cudaMemcpyDeviceToDevice, err);
}

enum rt_status rt_cuda_zero(UNUSED struct rt_dev *dev, struct rt_queue *q, void *dst, size_t bytes, struct rt_err *err)
{
    return rt_cuda_check(cudaMemsetAsync(dst, 0, bytes, q->stream), "cudaMemsetAsync", err);
}

/* ---- weights ---- */

/* Matrices of F32 and F16 become BF16, vectors of F16 float32: these need a block of their own. */
static enum rt_dtype stored_dtype(const struct rt_weight_src *src)
{
    if (src->dtype == RT_F16)
        return src->rows > 1 ? RT_BF16 : RT_F32;
    return src->dtype == RT_F32 && src->rows > 1 ? RT_BF16 : src->dtype;
}

static size_t scale_count(const struct rt_weight_src *src)
{
    return src->dtype == RT_E4M3 ? (size_t)((src->rows + 127) / 128) * (size_t)((src->cols + 127) / 128) : 0;
}

size_t rt_cuda_weight_bytes(const struct rt_weight_src *src)
{
    const enum rt_dtype t = stored_dtype(src);
    return t == src->dtype ? 0 : rt_arena_round((size_t)(src->rows * src->cols) * rt_dtype_size(t));
}

static enum rt_status check_src(const struct rt_weight_src *src, struct rt_err *err)
{
    if (src->dtype != RT_F32 && src->dtype != RT_F16 && src->dtype != RT_BF16 && src->dtype != RT_E4M3)
        return rt_fail(err, RT_UNSUPPORTED, "%s: a weight of type %s; expected F32, F16, BF16 or F8_E4M3", src->name, rt_dtype_name(src->dtype));
    if (src->rows < 1 || src->cols < 1)
        return rt_fail(err, RT_SHAPE, "%s: a weight of %ld x %ld", src->name, (long)src->rows, (long)src->cols);
    if (src->dtype == RT_E4M3 && src->scale_inv == NULL && src->device_scale == NULL)
        return rt_fail(err, RT_FORMAT, "%s: an e4m3 weight without its scales (%s_scale_inv)", src->name, src->name);
    return RT_OK;
}

/* Fills w->own: the converted elements, or the elements as they are and the scales. */
static enum rt_status fill_own(struct rt_queue *q, const struct rt_weight_src *src, struct rt_weight *w, struct rt_err *err)
{
    const size_t count = (size_t)(src->rows * src->cols), raw = count * rt_dtype_size(src->dtype), scales = scale_count(src) * sizeof(float);
    const size_t own = rt_arena_round(count * rt_dtype_size(w->dtype)), total = own + scales;
    void *staged = NULL;
    enum rt_status st;
    RT_CUDA_TRY(cudaMalloc(&w->own, total));
    w->data = w->own;
    if (scales > 0) {
        w->scale = (const float *)(const void *)((const char *)w->own + own);
        RT_CUDA_TRY(cudaMemcpyAsync((char *)w->own + own, src->scale_inv, scales, cudaMemcpyHostToDevice, q->stream));
    }
    if (w->dtype == src->dtype) {
        RT_CUDA_TRY(cudaMemcpyAsync(w->own, src->data, raw, cudaMemcpyHostToDevice, q->stream));
    } else {
        const void *from = src->device_data;
        if (from == NULL) {
            RT_TRY(rt_cuda_temp(q, raw, &staged, err));
            RT_CUDA_TRY(cudaMemcpyAsync(staged, src->data, raw, cudaMemcpyHostToDevice, q->stream));
            from = staged;
        }
        RT_TRY(rt_cuda_convert_dtype(q, from, src->dtype, w->own, w->dtype, (int64_t)count, err));
    }
    if (src->device_data == NULL)
        RT_CUDA_TRY(cudaStreamSynchronize(q->stream)); /* the host bytes are the caller's again */
out:
    rt_cuda_temp_free(q, staged);
    return st;
}

enum rt_status rt_cuda_weight_load(UNUSED struct rt_dev *dev, struct rt_queue *q, const struct rt_weight_src *src, struct rt_weight **out,
                                   struct rt_err *err)
{
    struct rt_weight *w = NULL;
    enum rt_status st;
    RT_TRY(check_src(src, err));
    RT_TRY(rt_alloc(1, sizeof *w, "a weight", &w, err));
    *w = (struct rt_weight){.rows = src->rows, .cols = src->cols, .dtype = stored_dtype(src)};
    if (src->device_data != NULL && w->dtype == src->dtype) {
        w->data = src->device_data;
        w->scale = src->device_scale;
    } else {
        RT_TRY(fill_own(q, src, w, err));
    }
    *out = w;
    w = NULL;
out:
    if (w != NULL)
        rt_err_context(err, "%s", src->name);
    rt_cuda_weight_free(dev, w);
    return st;
}

enum rt_status rt_cuda_weight_param(UNUSED struct rt_dev *dev, void *p, int64_t rows, int64_t cols, struct rt_weight **out, struct rt_err *err)
{
    const enum rt_status st = rt_alloc(1, sizeof **out, "a weight", out, err);
    if (st == RT_OK)
        **out = (struct rt_weight){.rows = rows, .cols = cols, .dtype = RT_BF16, .data = p};
    return st;
}

void rt_cuda_weight_free(UNUSED struct rt_dev *dev, struct rt_weight *w)
{
    if (w == NULL)
        return;
    (void)cudaFree(w->own);
    rt_free(w);
}
