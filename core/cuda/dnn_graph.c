#include "core/cuda/cuda.h"

#if __has_include(<cudnn.h>)

#include <stdio.h>
#include <string.h>

#include "core/cuda/dnn_graph.h"

static bool ok(struct rt_dnn_graph *g, cudnnStatus_t s, const char *what)
{
    if (s == CUDNN_STATUS_SUCCESS)
        return true;
    if (g->why[0] == '\0')
        snprintf(g->why, sizeof g->why, "%s: %s", what, g->api->cudnnGetErrorString(s));
    return false;
}

static cudnnBackendDescriptor_t create(struct rt_dnn_graph *g, cudnnBackendDescriptorType_t type, const char *what)
{
    cudnnBackendDescriptor_t d = NULL;
    if (g->why[0] != '\0' || !ok(g, g->api->cudnnBackendCreateDescriptor(type, &d), what))
        return NULL;
    return d;
}

static void set(struct rt_dnn_graph *g, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n,
                const void *value, const char *what)
{
    if (g->why[0] == '\0')
        (void)ok(g, g->api->cudnnBackendSetAttribute(d, name, type, n, value), what);
}

static void set_desc(struct rt_dnn_graph *g, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendDescriptor_t value,
                     const char *what)
{
    set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value, what);
}

static void finish(struct rt_dnn_graph *g, cudnnBackendDescriptor_t d, const char *what)
{
    if (g->why[0] == '\0')
        (void)ok(g, g->api->cudnnBackendFinalize(d), what);
}

/* Keeps d until the graph ends. */
static void keep(struct rt_dnn_graph *g, cudnnBackendDescriptor_t *list, int *n, int cap, cudnnBackendDescriptor_t d)
{
    if (d == NULL)
        return;
    if (*n == cap) {
        (void)ok(g, CUDNN_STATUS_INTERNAL_ERROR, "a graph with too many operations");
        g->api->cudnnBackendDestroyDescriptor(d);
        return;
    }
    list[(*n)++] = d;
}

void rt_dnn_graph_begin(struct rt_dnn_graph *g, const struct rt_dnn_api *api)
{
    memset(g, 0, sizeof *g);
    g->api = api;
    g->next_uid = 100;
}

void rt_dnn_graph_end(struct rt_dnn_graph *g)
{
    for (int i = 0; i < g->n_op; i++)
        g->api->cudnnBackendDestroyDescriptor(g->op[i]);
    for (int i = 0; i < g->n_extra; i++)
        g->api->cudnnBackendDestroyDescriptor(g->extra[i]);
    for (int i = 0; i < g->n_tensor; i++)
        if (g->tensor[i].desc != NULL)
            g->api->cudnnBackendDestroyDescriptor(g->tensor[i].desc);
    g->n_op = g->n_extra = g->n_tensor = 0;
}

static struct rt_dnn_tensor *add_tensor(struct rt_dnn_graph *g, int64_t uid, cudnnDataType_t type, const int64_t dim[4], const int64_t stride[4],
                                        rt_dnn_t ragged, bool is_virtual, bool by_value)
{
    static const char what[] = "a tensor";
    const int64_t align = 16;
    if (g->n_tensor == RT_DNN_TENSORS) {
        (void)ok(g, CUDNN_STATUS_INTERNAL_ERROR, "a graph with too many tensors");
        return &g->tensor[0];
    }
    struct rt_dnn_tensor *t = &g->tensor[g->n_tensor++];
    memcpy(t->dim, dim, sizeof t->dim);
    memcpy(t->stride, stride, sizeof t->stride);
    t->desc = create(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR, what);
    set(g, t->desc, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid, what);
    set(g, t->desc, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type, what);
    set(g, t->desc, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &align, what);
    set(g, t->desc, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dim, what);
    set(g, t->desc, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, stride, what);
    set(g, t->desc, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual, what);
    set(g, t->desc, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value, what);
    if (ragged != NULL)
        set_desc(g, t->desc, CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, ragged->desc, what);
    finish(g, t->desc, what);
    return t;
}

rt_dnn_t rt_dnn_tensor(struct rt_dnn_graph *g, int64_t uid, cudnnDataType_t type, const int64_t dim[4], const int64_t stride[4], rt_dnn_t ragged)
{
    return add_tensor(g, uid, type, dim, stride, ragged, false, false);
}

rt_dnn_t rt_dnn_scalar(struct rt_dnn_graph *g, int64_t uid)
{
    const int64_t one[4] = {1, 1, 1, 1};
    return add_tensor(g, uid, CUDNN_DATA_FLOAT, one, one, NULL, false, true);
}

rt_dnn_t rt_dnn_virtual(struct rt_dnn_graph *g, cudnnDataType_t type, const int64_t dim[4], const int64_t stride[4], rt_dnn_t ragged)
{
    const int64_t dense[4] = {dim[1] * dim[2] * dim[3], dim[2] * dim[3], dim[3], 1};
    return add_tensor(g, g->next_uid++, type, dim, stride != NULL ? stride : dense, ragged, true, false);
}

void rt_dnn_pointwise(struct rt_dnn_graph *g, cudnnPointwiseMode_t mode, cudnnDataType_t math, int64_t axis, rt_dnn_t x, rt_dnn_t b, rt_dnn_t t,
                      rt_dnn_t y)
{
    static const char what[] = "a pointwise operation";
    const float one = 1.0f;
    cudnnBackendDescriptor_t d = create(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR, what);
    keep(g, g->extra, &g->n_extra, RT_DNN_OPS, d);
    set(g, d, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode, what);
    set(g, d, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &math, what);
    if (mode == CUDNN_POINTWISE_GEN_INDEX)
        set(g, d, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis, what);
    finish(g, d, what);
    cudnnBackendDescriptor_t op = create(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, what);
    keep(g, g->op, &g->n_op, RT_DNN_OPS, op);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, d, what);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x->desc, what);
    if (b != NULL)
        set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b->desc, what);
    if (t != NULL)
        set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t->desc, what);
    set_desc(g, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y->desc, what);
    set(g, op, CUDNN_ATTR_OPERATION_POINTWISE_ALPHA1, CUDNN_TYPE_FLOAT, 1, &one, what);
    set(g, op, CUDNN_ATTR_OPERATION_POINTWISE_ALPHA2, CUDNN_TYPE_FLOAT, 1, &one, what);
    finish(g, op, what);
}

void rt_dnn_matmul(struct rt_dnn_graph *g, rt_dnn_t a, rt_dnn_t b, rt_dnn_t c, rt_dnn_t m, rt_dnn_t n, rt_dnn_t k)
{
    static const char what[] = "a product";
    const cudnnDataType_t math = CUDNN_DATA_FLOAT;
    cudnnBackendDescriptor_t d = create(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR, what);
    keep(g, g->extra, &g->n_extra, RT_DNN_OPS, d);
    set(g, d, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &math, what);
    finish(g, d, what);
    cudnnBackendDescriptor_t op = create(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, what);
    keep(g, g->op, &g->n_op, RT_DNN_OPS, op);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a->desc, what);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b->desc, what);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c->desc, what);
    set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, d, what);
    if (m != NULL)
        set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, m->desc, what);
    if (n != NULL)
        set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, n->desc, what);
    if (k != NULL)
        set_desc(g, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, k->desc, what);
    finish(g, op, what);
}

void rt_dnn_reduction(struct rt_dnn_graph *g, cudnnReduceTensorOp_t reduce, rt_dnn_t x, rt_dnn_t y)
{
    static const char what[] = "a reduction";
    const cudnnDataType_t math = CUDNN_DATA_FLOAT;
    cudnnBackendDescriptor_t d = create(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR, what);
    keep(g, g->extra, &g->n_extra, RT_DNN_OPS, d);
    set(g, d, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &math, what);
    set(g, d, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &reduce, what);
    finish(g, d, what);
    cudnnBackendDescriptor_t op = create(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, what);
    keep(g, g->op, &g->n_op, RT_DNN_OPS, op);
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, d, what);
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x->desc, what);
    set_desc(g, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y->desc, what);
    finish(g, op, what);
}

void rt_dnn_reshape(struct rt_dnn_graph *g, rt_dnn_t x, rt_dnn_t y)
{
    static const char what[] = "a reshape";
    cudnnBackendDescriptor_t op = create(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, what);
    keep(g, g->op, &g->n_op, RT_DNN_OPS, op);
    set_desc(g, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x->desc, what);
    set_desc(g, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y->desc, what);
    finish(g, op, what);
}

/* Does the engine of a configuration give the same bytes each time? */
static bool is_deterministic(const struct rt_dnn_api *api, cudnnBackendDescriptor_t config)
{
    cudnnBackendDescriptor_t engine = NULL;
    cudnnBackendNumericalNote_t note[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
    int64_t n = 0;
    bool yes = false;
    if (api->cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINE_DESCRIPTOR, &engine) != CUDNN_STATUS_SUCCESS)
        return false;
    if (api->cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &n, &engine) == CUDNN_STATUS_SUCCESS &&
        api->cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE, CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &n,
                                      note) == CUDNN_STATUS_SUCCESS) {
        yes = true;
        for (int64_t i = 0; i < n && i < CUDNN_NUMERICAL_NOTE_TYPE_COUNT; i++)
            yes = yes && note[i] != CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC;
    }
    api->cudnnBackendDestroyDescriptor(engine);
    return yes;
}

/* A plan of one configuration; takes it over where it succeeds. */
static bool plan_of(const struct rt_dnn_api *api, cudnnBackendDescriptor_t config, struct rt_dnn_plan *out)
{
    cudnnBackendDescriptor_t plan = NULL;
    int64_t n = 0, workspace = 0;
    if (api->cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &plan) != CUDNN_STATUS_SUCCESS)
        return false;
    cudnnStatus_t s = api->cudnnBackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &config);
    if (s == CUDNN_STATUS_SUCCESS)
        s = api->cudnnBackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &api->handle);
    if (s == CUDNN_STATUS_SUCCESS)
        s = api->cudnnBackendFinalize(plan);
    if (s == CUDNN_STATUS_SUCCESS)
        s = api->cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &n, &workspace);
    if (s != CUDNN_STATUS_SUCCESS) {
        api->cudnnBackendDestroyDescriptor(plan);
        return false;
    }
    *out = (struct rt_dnn_plan){plan, config, workspace, is_deterministic(api, config)};
    return true;
}

enum { CONFIGS = 16 };

/* Tries the configurations that the library proposes for the graph, in its order. */
static bool first_plan(struct rt_dnn_graph *g, cudnnBackendDescriptor_t heuristics, bool deterministic, struct rt_dnn_plan *out, char *why, int cap)
{
    const struct rt_dnn_api *api = g->api;
    cudnnBackendDescriptor_t config[CONFIGS] = {0};
    int64_t n = 0;
    bool found = false;
    for (int i = 0; i < CONFIGS; i++)
        config[i] = create(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, "an engine's configuration");
    if (g->why[0] == '\0')
        (void)ok(g, api->cudnnBackendGetAttribute(heuristics, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, CONFIGS, &n, config),
                 "engines for the graph");
    for (int i = 0; g->why[0] == '\0' && i < n && i < CONFIGS && !found; i++) {
        if (deterministic && !is_deterministic(api, config[i]))
            continue;
        found = plan_of(api, config[i], out);
        if (found)
            config[i] = NULL;
    }
    for (int i = 0; i < CONFIGS; i++)
        if (config[i] != NULL)
            api->cudnnBackendDestroyDescriptor(config[i]);
    if (!found)
        snprintf(why, (size_t)cap, "%s", g->why[0] != '\0' ? g->why : n == 0 ? "no engine for the shape" : "no engine could be planned");
    return found;
}

bool rt_dnn_plan_make(struct rt_dnn_graph *g, bool deterministic, struct rt_dnn_plan *out, char *why, int cap)
{
    static const char what[] = "the graph";
    const struct rt_dnn_api *api = g->api;
    const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    bool found = false;
    cudnnBackendDescriptor_t graph = create(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, what);
    keep(g, g->extra, &g->n_extra, RT_DNN_OPS, graph);
    set(g, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g->n_op, g->op, what);
    set(g, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &api->handle, what);
    finish(g, graph, what);
    cudnnBackendDescriptor_t heuristics = create(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, what);
    keep(g, g->extra, &g->n_extra, RT_DNN_OPS, heuristics);
    set_desc(g, heuristics, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph, what);
    set(g, heuristics, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode, what);
    finish(g, heuristics, "engines for the graph");
    if (g->why[0] == '\0')
        found = first_plan(g, heuristics, deterministic, out, why, cap);
    else
        snprintf(why, (size_t)cap, "%s", g->why);
    return found;
}

void rt_dnn_plan_free(const struct rt_dnn_api *api, struct rt_dnn_plan *p)
{
    if (p->plan != NULL)
        api->cudnnBackendDestroyDescriptor(p->plan);
    if (p->config != NULL)
        api->cudnnBackendDestroyDescriptor(p->config);
    *p = (struct rt_dnn_plan){0};
}

enum rt_status rt_dnn_plan_run(const struct rt_dnn_api *api, const struct rt_dnn_plan *p, int n, const int64_t *uid, void **data, void *workspace,
                               struct rt_err *err)
{
    cudnnBackendDescriptor_t pack = NULL;
    cudnnStatus_t s = api->cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
    if (s == CUDNN_STATUS_SUCCESS)
        s = api->cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, data);
    if (s == CUDNN_STATUS_SUCCESS)
        s = api->cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, uid);
    if (s == CUDNN_STATUS_SUCCESS)
        s = api->cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    if (s == CUDNN_STATUS_SUCCESS)
        s = api->cudnnBackendFinalize(pack);
    if (s == CUDNN_STATUS_SUCCESS)
        s = api->cudnnBackendExecute(api->handle, p->plan, pack);
    if (pack != NULL)
        api->cudnnBackendDestroyDescriptor(pack);
    return s == CUDNN_STATUS_SUCCESS ? RT_OK : rt_fail(err, RT_DEVICE, "cuDNN: a plan failed: %s", api->cudnnGetErrorString(s));
}

#endif
