/* Recorded work: CUDA graphs of what a queue's stream was given. Contract: core/backend.h. */
#include "core/cuda/cuda.h"
#include "core/cuda/device.h"
#include "core/mem.h"

#define UNUSED __attribute__((unused))

struct rt_graph {
    cudaGraphExec_t exec;
};

enum rt_status rt_cuda_graph_begin(UNUSED struct rt_dev *dev, struct rt_queue *q, struct rt_err *err)
{
    enum rt_status st;
    RT_CUDA_TRY(cudaStreamBeginCapture(q->stream, cudaStreamCaptureModeThreadLocal));
    q->recording = true;
out:
    return st;
}

enum rt_status rt_cuda_not_recorded(const struct rt_queue *q, const char *what, struct rt_err *err)
{
    return q->recording ? rt_fail(err, RT_UNSUPPORTED, "%s cannot be recorded on a GPU", what) : RT_OK;
}

enum rt_status rt_cuda_graph_end(struct rt_dev *dev, struct rt_queue *q, struct rt_graph **out, struct rt_err *err)
{
    struct rt_graph *g = NULL;
    cudaGraph_t graph = NULL;
    enum rt_status st;
    *out = NULL;
    q->recording = false;
    RT_CUDA_TRY(cudaStreamEndCapture(q->stream, &graph));
    RT_TRY(rt_alloc(1, sizeof *g, "recorded work", &g, err));
    RT_CUDA_TRY(cudaGraphInstantiate(&g->exec, graph, 0));
    *out = g;
    g = NULL;
out:
    if (graph != NULL)
        (void)cudaGraphDestroy(graph);
    rt_cuda_graph_free(dev, g);
    return st;
}

enum rt_status rt_cuda_graph_run(UNUSED struct rt_dev *dev, struct rt_queue *q, struct rt_graph *g, struct rt_err *err)
{
    return rt_cuda_check(cudaGraphLaunch(g->exec, q->stream), "cudaGraphLaunch", err);
}

void rt_cuda_graph_free(UNUSED struct rt_dev *dev, struct rt_graph *g)
{
    if (g == NULL)
        return;
    if (g->exec != NULL)
        (void)cudaGraphExecDestroy(g->exec);
    rt_free(g);
}
