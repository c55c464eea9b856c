/* cuDNN's backend interface, as little of it as graphs of attention need: tensors and operations are described, the library finds an engine
 * for the whole graph and makes a plan, the plan runs. Internal to dnn*.c.
 *
 * A graph under construction keeps its first failure; calls after it do nothing, and rt_dnn_plan_make reports it.
 */
#ifndef RT_CORE_CUDA_DNN_GRAPH_H
#define RT_CORE_CUDA_DNN_GRAPH_H

#include <cudnn.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

/* The library's entries. */
#define RT_DNN_ENTRIES(X) \
    X(cudnnGetVersion) X(cudnnCreate) X(cudnnDestroy) X(cudnnSetStream) X(cudnnGetErrorString) X(cudnnGetLastErrorString) \
    X(cudnnBackendCreateDescriptor) X(cudnnBackendDestroyDescriptor) X(cudnnBackendSetAttribute) X(cudnnBackendGetAttribute) \
    X(cudnnBackendFinalize) X(cudnnBackendExecute)
struct rt_dnn_api {
#define RT_DNN_MEMBER(name) __typeof__(name) *name;
    RT_DNN_ENTRIES(RT_DNN_MEMBER)
#undef RT_DNN_MEMBER
    void *module; /* what dlopen gave */
    cudnnHandle_t handle;
    size_t version;                   /* 91400: 9.14.0 */
};

enum { RT_DNN_TENSORS = 64, RT_DNN_OPS = 48 };

struct rt_dnn_tensor {
    cudnnBackendDescriptor_t desc;
    int64_t dim[4], stride[4];
};

struct rt_dnn_graph {
    const struct rt_dnn_api *api;
    struct rt_dnn_tensor tensor[RT_DNN_TENSORS];
    cudnnBackendDescriptor_t op[RT_DNN_OPS], extra[RT_DNN_OPS];
    int n_tensor, n_op, n_extra;
    int64_t next_uid;                 /* of tensors that exist inside the graph alone */
    char why[160];                    /* the first failure; "": none */
};
typedef const struct rt_dnn_tensor *rt_dnn_t;

struct rt_dnn_plan {
    cudnnBackendDescriptor_t plan, config;
    int64_t workspace;                /* bytes */
    bool deterministic;
};

void rt_dnn_graph_begin(struct rt_dnn_graph *g, const struct rt_dnn_api *api);
/* Gives back everything but plans made of it, which must be freed before. */
void rt_dnn_graph_end(struct rt_dnn_graph *g);

/* A tensor in memory under a uid of 1 .. 99; ragged: where each batch entry begins, in elements (NULL: by its stride). */
rt_dnn_t rt_dnn_tensor(struct rt_dnn_graph *g, int64_t uid, cudnnDataType_t type, const int64_t dim[4], const int64_t stride[4], rt_dnn_t ragged);
/* One float, whose value is given when the plan runs. */
rt_dnn_t rt_dnn_scalar(struct rt_dnn_graph *g, int64_t uid);
/* A tensor inside the graph; stride NULL: dense. */
rt_dnn_t rt_dnn_virtual(struct rt_dnn_graph *g, cudnnDataType_t type, const int64_t dim[4], const int64_t stride[4], rt_dnn_t ragged);

/* y = mode(x, b, t) with arithmetic in `math`; b and t NULL where the mode has fewer operands. axis: of GEN_INDEX, else 0. */
void rt_dnn_pointwise(struct rt_dnn_graph *g, cudnnPointwiseMode_t mode, cudnnDataType_t math, int64_t axis, rt_dnn_t x, rt_dnn_t b, rt_dnn_t t,
                      rt_dnn_t y);
/* c = a b; m, n, k: the sizes of each batch entry, where they are fewer than the tensors', or NULL. */
void rt_dnn_matmul(struct rt_dnn_graph *g, rt_dnn_t a, rt_dnn_t b, rt_dnn_t c, rt_dnn_t m, rt_dnn_t n, rt_dnn_t k);
void rt_dnn_reduction(struct rt_dnn_graph *g, cudnnReduceTensorOp_t op, rt_dnn_t x, rt_dnn_t y);
void rt_dnn_reshape(struct rt_dnn_graph *g, rt_dnn_t x, rt_dnn_t y);

/* A plan for the graph: the first that the library proposes and can make, of those that are deterministic where that is asked for. false: why
 * [cap] says what failed. */
bool rt_dnn_plan_make(struct rt_dnn_graph *g, bool deterministic, struct rt_dnn_plan *out, char *why, int cap);
void rt_dnn_plan_free(const struct rt_dnn_api *api, struct rt_dnn_plan *p);
/* Enqueues the plan on the handle's stream. data[i] is device memory (a scalar's: host memory) of the tensor uid[i]. */
enum rt_status rt_dnn_plan_run(const struct rt_dnn_api *api, const struct rt_dnn_plan *p, int n, const int64_t *uid, void **data, void *workspace,
                               struct rt_err *err);

#endif
