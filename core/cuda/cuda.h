/* The cuda backend, internal: what its files share. Contracts of the operations: core/backend.h.
 *
 * act is BF16. Sums are float32 (sumsq and losses float64); a result is rounded once where it is stored. Kernels are linked in; cuBLASLt and
 * cuDNN are opened at run time (lt.h, dnn.h) and may be missing: an operation that needs one says so.
 *
 * Every operation enqueues on its queue's stream and returns; what it needs beside its arguments it takes with rt_cuda_temp, in stream
 * order. Host arrays among the arguments are read before the operation returns. Launches are checked at once; a failure inside a kernel
 * comes out of the next call that waits.
 */
#ifndef RT_CORE_CUDA_CUDA_H
#define RT_CORE_CUDA_CUDA_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_cuda_lt;  /* gemm files */
struct rt_cuda_dnn; /* attention files */
struct rt_cuda_nccl; /* nccl.h */

struct rt_dev {
    int index, sm_count;
    int cc;                 /* of the code that it runs (code.h); 90: all that compute capability 9.0 has */
    int block_shared;       /* bytes of shared memory that a block may have */
    uint64_t scratch;       /* set_scratch: operations divide their work so that what they take stays under it */
    size_t l2_bytes;
    cudaMemPool_t pool;     /* where temporaries come from */
    void *encode_map;       /* the driver's cuTensorMapEncodeTiled, or NULL: no bulk tensor copies */
    struct rt_cuda_lt *lt;  /* opened with the device; NULL: cuBLASLt was not found, lt_why says why */
    struct rt_cuda_dnn *dnn;/* NULL: cuDNN was not found */
    struct rt_cuda_nccl *nccl; /* NULL: this process is alone */
    char lt_why[160], dnn_why[160];
    char description[384];
};

struct rt_queue {
    struct rt_dev *dev;
    cudaStream_t stream;
    void *workspace;        /* what a product, or attention over a cache, may use on this queue while it runs: RT_CUDA_WORKSPACE bytes */
    int32_t *tickets;       /* RT_CUDA_TICKETS zeros: a kernel by whose blocks they are counted up leaves them as they were */
    bool recording;         /* between graph_begin and graph_end */
};
enum { RT_CUDA_WORKSPACE = 64 << 20, RT_CUDA_TICKETS = 1 << 14 };

struct rt_event {
    cudaEvent_t event;
};

/* A weight in device memory: rows x cols of dtype (BF16, E4M3, F32), dense. F16 and F32 matrices are stored as BF16, vectors of F32 stay F32
 * (router bias, norms). scale: E4M3 only, [ceil(rows/128)][ceil(cols/128)] row-major as in the checkpoint. */
struct rt_weight {
    int64_t rows, cols;
    enum rt_dtype dtype;
    const void *data;
    const float *scale;
    void *own;              /* device block that weight_free gives back, or NULL */
};

/* RT_OK, or DEVICE (NOMEM where memory ran out) with the call's name and CUDA's text. */
enum rt_status rt_cuda_check(cudaError_t e, const char *call, struct rt_err *err);
#define RT_CUDA_TRY(call) RT_TRY(rt_cuda_check((call), #call, err))
/* After a launch: the error of its configuration. */
enum rt_status rt_cuda_launched(const char *kernel, struct rt_err *err);

/* Device memory in stream order: valid for work enqueued on q until rt_cuda_temp_free, which may be called as soon as that work is enqueued.
 * 256-byte aligned, not zeroed. temp_free(NULL) is fine. */
enum rt_status rt_cuda_temp(struct rt_queue *q, size_t bytes, void *out_ptr_to_ptr, struct rt_err *err);
void rt_cuda_temp_free(struct rt_queue *q, void *p);

/* graph.c: UNSUPPORTED while q records. In front of whatever a recording could not repeat: a copy from host memory that is gone by then, a measurement. */
enum rt_status rt_cuda_not_recorded(const struct rt_queue *q, const char *what, struct rt_err *err);

/* device.c */
enum rt_status rt_cuda_weight_load(struct rt_dev *, struct rt_queue *, const struct rt_weight_src *, struct rt_weight **, struct rt_err *);
enum rt_status rt_cuda_weight_param(struct rt_dev *, void *p, int64_t rows, int64_t cols, struct rt_weight **, struct rt_err *);
void rt_cuda_weight_free(struct rt_dev *, struct rt_weight *);
size_t rt_cuda_weight_bytes(const struct rt_weight_src *);

/* lt.c: opens cuBLASLt. *out NULL and the reason in why [cap] where there is none; fails only where memory does. */
enum rt_status rt_cuda_lt_open(struct rt_cuda_lt **out, char *why, int cap, struct rt_err *err);
void rt_cuda_lt_close(struct rt_cuda_lt *lt);
/* dnn.c: the same for cuDNN. */
enum rt_status rt_cuda_dnn_open(struct rt_dev *dev, struct rt_cuda_dnn **out, char *why, int cap, struct rt_err *err);
void rt_cuda_dnn_close(struct rt_cuda_dnn *dnn);
/* Opens a shared library by the first of the names (NULL-terminated) that loads: as the system finds it (LD_LIBRARY_PATH), from lib and lib64 of NCCL_HOME,
 * CUDA_HOME and CUDA_PATH, from the usual places of a CUDA installation, and from beside a cuBLASLt that is open already, as Python's packages lie
 * (.../nvidia/nccl/lib beside .../nvidia/cublas/lib). NULL: none. */
void *rt_cuda_dlopen(const char *const *names);

/* Every operation, as rt_cuda_NAME; those that exist are in the table (table.c). */
#define RT_CUDA_OP(op) enum rt_status rt_cuda_##op(struct rt_dev *, struct rt_queue *, const struct rt_##op##_args *, struct rt_err *);
RT_BACKEND_OPS(RT_CUDA_OP)
#undef RT_CUDA_OP

#ifdef __cplusplus
}
#endif
#endif
