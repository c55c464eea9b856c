/* Collectives of the cuda backend (core/cuda/nccl.h; contracts: core/backend.h). */
#include "core/cuda/nccl.h"

#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/collective.h"
#include "core/cuda/device.h"
#include "core/log.h"
#include "core/mem.h"

#if __has_include(<nccl.h>)
#include <nccl.h>

/* name without the prefix: the types are the header's */
#define NCCL_FUNCTIONS(X) \
    X(GetVersion) X(GetUniqueId) X(CommInitRankConfig) X(CommGetAsyncError) X(CommAbort) X(CommFinalize) X(CommDestroy) X(GetErrorString) X(GetLastError) \
    X(GroupStart) X(GroupEnd) X(AllReduce) X(ReduceScatter) X(AllGather) X(Broadcast) X(Reduce)

enum { OLDEST = 21800 }; /* 2.18: communicators that do not block, and their CommFinalize */
static const double look_seconds = 0.02; /* between looks at the other ranks while the host waits */
static const double spin_seconds = 0.01; /* of busy waiting before sleeps */
static const double grace_seconds = 2;   /* a rank may have ended after its part: what it sent is still on its way */
static const double roll_seconds = 10;   /* for the others to say that they are there */

struct rt_cuda_nccl {
    void *lib;
    struct rt_dev *dev;
    struct rt_comm *comm;
    int rank, size, version;
    ncclComm_t nccl;           /* NULL: not there yet, or aborted */
    cudaStream_t stream;
    cudaEvent_t ready, done;   /* of the queue that a collective was given; behind the last collective */
    bool pending;              /* `done` was recorded and not waited for */
    const char *doing;         /* the last collective, for messages */
#define NCCL_POINTER(name) __typeof__(&nccl##name) name;
    NCCL_FUNCTIONS(NCCL_POINTER)
#undef NCCL_POINTER
};

/* ---- waiting ---- */

struct watch {
    double begin, looked, lost; /* lost: since when a rank is known to be gone; 0: none is */
    struct rt_err who;
};

/* Ends NCCL: kernels that wait for other ranks return. */
static void end_now(struct rt_cuda_nccl *n)
{
    if (n->nccl != NULL)
        (void)n->CommAbort(n->nccl);
    n->nccl = NULL;
    n->pending = false;
}

/* Can what is waited for still come? Looks now and then; sleeps a little when it has been long. */
static enum rt_status look(struct rt_cuda_nccl *n, struct watch *w, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_err why = {0};
    ncclResult_t r = ncclSuccess;
    const double now = rt_now(), timeout = rt_comm_timeout(n->comm);
    if (w->begin <= 0)
        w->begin = w->looked = now;
    if (now - w->begin > spin_seconds)
        usleep(50);
    else
        (void)sched_yield();
    if (now - w->looked < look_seconds)
        return RT_OK;
    w->looked = now;
    if (n->nccl != NULL && n->CommGetAsyncError(n->nccl, &r) == ncclSuccess && r != ncclSuccess && r != ncclInProgress) {
        /* most often another rank is gone; its connection will say which */
        for (const double end = now + grace_seconds; rt_now() < end && rt_comm_check(n->comm, &why) == RT_OK;)
            usleep(10000);
        RT_FAIL(err, IO, "%s during %s on the GPUs (NCCL: %s)", why.msg[0] != '\0' ? why.msg : "a failure", n->doing, n->GetErrorString(r));
    }
    if (w->lost <= 0 && rt_comm_check(n->comm, &w->who) != RT_OK)
        w->lost = now;
    if (w->lost > 0 && now - w->lost > grace_seconds)
        RT_FAIL(err, IO, "%s during %s on the GPUs", w->who.msg, n->doing);
    if (w->lost <= 0 && now - w->begin > timeout) {
        if (rt_comm_roll_call(n->comm, roll_seconds, &why) == RT_OK)
            snprintf(why.msg, sizeof why.msg, "all ranks answer");
        RT_FAIL(err, IO, "%s on the GPUs did not end within %g seconds; %s", n->doing, timeout, why.msg);
    }
out:
    if (st != RT_OK)
        end_now(n);
    return st;
}

/* r: what a call of NCCL returned; waits until the library is through with it. */
static enum rt_status accept(struct rt_cuda_nccl *n, ncclResult_t r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct watch w = {0};
    while (r == ncclInProgress) {
        if (n->CommGetAsyncError(n->nccl, &r) != ncclSuccess)
            r = ncclInternalError;
        if (r == ncclInProgress)
            RT_TRY(look(n, &w, err));
    }
    if (r == ncclSuccess)
        goto out;
    struct rt_err why = {0};
    for (const double end = rt_now() + grace_seconds; r == ncclRemoteError && rt_now() < end && rt_comm_check(n->comm, &why) == RT_OK;)
        usleep(10000);
    st = rt_fail(err, r == ncclRemoteError ? RT_IO : RT_DEVICE, "NCCL: %s: %s%s%.200s%s%s", n->doing, n->GetErrorString(r), n->nccl != NULL ? ": " : "",
                 n->nccl != NULL ? n->GetLastError(n->nccl) : "", why.msg[0] != '\0' ? "; " : "", why.msg);
    end_now(n);
out:
    return st;
}

enum rt_status rt_cuda_settle(struct rt_dev *dev, struct rt_err *err)
{
    struct rt_cuda_nccl *n = dev->nccl;
    enum rt_status st = RT_OK;
    struct watch w = {0};
    cudaError_t e = cudaErrorNotReady;
    if (n == NULL || !n->pending)
        return RT_OK;
    while ((e = cudaEventQuery(n->done)) == cudaErrorNotReady)
        RT_TRY(look(n, &w, err));
    n->pending = false;
    RT_CUDA_TRY(e);
out:
    return st;
}

/* ---- opening ---- */

static bool load(struct rt_cuda_nccl *n, char *why, size_t cap)
{
    static const char *const names[] = {"libnccl.so.2", NULL};
    n->lib = rt_cuda_dlopen(names);
    if (n->lib == NULL) {
        snprintf(why, cap, "libnccl.so.2 was not found (NCCL_HOME, LD_LIBRARY_PATH and the places of a CUDA installation were tried)");
        return false;
    }
#define NCCL_LOAD(name) \
    *(void **)&n->name = dlsym(n->lib, "nccl" #name); \
    if (n->name == NULL) { \
        snprintf(why, cap, "nccl" #name " is missing from libnccl.so.2"); \
        return false; \
    }
    NCCL_FUNCTIONS(NCCL_LOAD)
#undef NCCL_LOAD
    if (n->GetVersion(&n->version) != ncclSuccess || n->version < OLDEST) {
        snprintf(why, cap, "NCCL %d is older than %d", n->version, OLDEST);
        return false;
    }
    return true;
}

/* What each rank tells the others before anything that could wait for them. */
struct card {
    char uuid[16], machine[64], why[176]; /* why: empty where the rank is ready */
};

static enum rt_status agree(struct rt_cuda_nccl *n, const char *why, struct rt_err *err)
{
    enum rt_status st;
    struct card own, *all = NULL;
    struct cudaDeviceProp prop;
    RT_CUDA_TRY(cudaGetDeviceProperties(&prop, n->dev->index));
    memset(&own, 0, sizeof own);
    memcpy(own.uuid, &prop.uuid, sizeof own.uuid);
    gethostname(own.machine, sizeof own.machine - 1);
    snprintf(own.why, sizeof own.why, "%s", why);
    RT_TRY(rt_alloc((size_t)n->size, sizeof own, "GPUs of ranks", &all, err));
    RT_TRY(rt_comm_gather(n->comm, &own, all, sizeof own, err));
    for (int i = 0; i < n->size; i++) {
        all[i].machine[sizeof own.machine - 1] = all[i].why[sizeof own.why - 1] = '\0';
        if (all[i].why[0] != '\0')
            RT_FAIL(err, DEVICE, "several ranks on GPUs need NCCL, and rank %d on %s has none: %s; install it (libnccl2), train with one rank, or take --device cpu", i,
                    all[i].machine, all[i].why);
    }
    for (int i = 0; i < n->size; i++)
        for (int k = 0; k < i; k++)
            if (memcmp(all[i].uuid, all[k].uuid, sizeof own.uuid) == 0)
                RT_FAIL(err, DEVICE, "ranks %d and %d are on one GPU of %s: each rank needs a GPU of its own; start as many ranks a machine as it has GPUs", k, i,
                        all[i].machine);
out:
    rt_free(all);
    return st;
}

static enum rt_status join_ranks(struct rt_cuda_nccl *n, struct rt_err *err)
{
    enum rt_status st;
    struct {
        ncclUniqueId id;
        int32_t failed;
    } first = {.failed = 0};
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0; /* a rank that is lost meanwhile must not be waited for without end */
    n->doing = "the meeting";
    if (n->rank == 0)
        first.failed = n->GetUniqueId(&first.id) != ncclSuccess;
    RT_TRY(rt_comm_broadcast(n->comm, &first, sizeof first, 0, err));
    if (first.failed)
        RT_FAIL(err, DEVICE, "NCCL on rank 0 finds no network interface to meet on (ncclGetUniqueId failed; NCCL_DEBUG=INFO says more, NCCL_SOCKET_IFNAME names one)");
    RT_TRY(accept(n, n->CommInitRankConfig(&n->nccl, n->size, first.id, n->rank, &config), err));
out:
    return st;
}

enum rt_status rt_cuda_nccl_open(struct rt_dev *dev, struct rt_comm *comm, struct rt_cuda_nccl **out, char *text, int cap, struct rt_err *err)
{
    enum rt_status st;
    struct rt_cuda_nccl *n = NULL;
    char why[176] = "";
    int low, high;
    RT_TRY(rt_alloc(1, sizeof *n, "NCCL", &n, err));
    n->dev = dev;
    n->comm = comm;
    n->rank = rt_comm_rank(comm);
    n->size = rt_comm_size(comm);
    /* read by the library when it is first used */
    if (setenv("NCCL_NVLS_ENABLE", "0", 1) != 0 || setenv("NCCL_ALGO", "Ring", 0) != 0)
        RT_FAIL(err, NOMEM, "no room for environment variables");
    (void)load(n, why, sizeof why);
    RT_TRY(agree(n, why, err));
    RT_CUDA_TRY(cudaDeviceGetStreamPriorityRange(&low, &high));
    RT_CUDA_TRY(cudaStreamCreateWithPriority(&n->stream, cudaStreamNonBlocking, high));
    RT_CUDA_TRY(cudaEventCreateWithFlags(&n->ready, cudaEventDisableTiming));
    RT_CUDA_TRY(cudaEventCreateWithFlags(&n->done, cudaEventDisableTiming));
    RT_TRY(join_ranks(n, err));
    snprintf(text, (size_t)cap, "NCCL %d.%d.%d", n->version / 10000, n->version / 100 % 100, n->version % 100);
    *out = n;
    n = NULL;
out:
    rt_cuda_nccl_close(n);
    return st;
}

void rt_cuda_nccl_close(struct rt_cuda_nccl *n)
{
    if (n == NULL)
        return;
    if (n->nccl != NULL && rt_comm_check(n->comm, NULL) == RT_OK && rt_cuda_settle(n->dev, NULL) == RT_OK) {
        n->doing = "the end";
        if (accept(n, n->CommFinalize(n->nccl), NULL) == RT_OK) {
            (void)n->CommDestroy(n->nccl);
            n->nccl = NULL;
        }
    }
    end_now(n);
    if (n->done != NULL)
        (void)cudaEventDestroy(n->done);
    if (n->ready != NULL)
        (void)cudaEventDestroy(n->ready);
    if (n->stream != NULL)
        (void)cudaStreamDestroy(n->stream);
    rt_free(n); /* the library stays: it may keep threads */
}

/* ---- the collectives ---- */

/* The stream of collectives waits for what is on q. */
static enum rt_status begin(struct rt_cuda_nccl *n, struct rt_queue *q, const char *what, struct rt_err *err)
{
    enum rt_status st;
    n->doing = what;
    if (n->nccl == NULL)
        RT_FAIL(err, IO, "the other ranks are out of reach");
    RT_CUDA_TRY(cudaEventRecord(n->ready, q->stream));
    RT_CUDA_TRY(cudaStreamWaitEvent(n->stream, n->ready, 0));
    if (n->GroupStart() != ncclSuccess)
        RT_FAIL(err, DEVICE, "NCCL: ncclGroupStart failed");
out:
    return st;
}

/* Hands out what was grouped since begin; q waits for it. r: the first failure of a call in the group. */
static enum rt_status finish(struct rt_cuda_nccl *n, struct rt_queue *q, ncclResult_t r, struct rt_err *err)
{
    enum rt_status st;
    const ncclResult_t end = n->GroupEnd();
    RT_TRY(accept(n, r != ncclSuccess && r != ncclInProgress ? r : end, err));
    RT_CUDA_TRY(cudaEventRecord(n->done, n->stream));
    n->pending = true;
    RT_CUDA_TRY(cudaStreamWaitEvent(q->stream, n->done, 0));
out:
    return st;
}

static ncclResult_t first_of(ncclResult_t a, ncclResult_t b)
{
    return a != ncclSuccess && a != ncclInProgress ? a : b;
}

/* Rank r's shard of x. */
static uint16_t *shard(const struct rt_cuda_nccl *n, void *x, int64_t elements, int r, size_t *count)
{
    int64_t first, c;
    rt_comm_shard(elements, r, n->size, &first, &c);
    *count = (size_t)c;
    return (uint16_t *)x + first;
}

/* Are all shards of one length? Then the library's own collective takes them in place; else each shard goes by itself. */
static bool even(const struct rt_cuda_nccl *n, int64_t elements)
{
    return elements % (64 * (int64_t)n->size) == 0;
}

enum rt_status rt_cuda_all_reduce(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t elements, struct rt_err *err)
{
    struct rt_cuda_nccl *n = dev->nccl;
    enum rt_status st;
    if (n == NULL || elements <= 0)
        return RT_OK;
    RT_TRY(begin(n, q, "a sum over ranks", err));
    RT_TRY(finish(n, q, n->AllReduce(x, x, (size_t)elements, ncclBfloat16, ncclSum, n->nccl, n->stream), err));
out:
    return st;
}

enum rt_status rt_cuda_reduce_scatter(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t elements, struct rt_err *err)
{
    struct rt_cuda_nccl *n = dev->nccl;
    enum rt_status st;
    ncclResult_t r = ncclSuccess;
    size_t count;
    if (n == NULL || elements <= 0)
        return RT_OK;
    RT_TRY(begin(n, q, "a sum of gradients", err));
    if (even(n, elements)) {
        uint16_t *own = shard(n, x, elements, n->rank, &count);
        r = n->ReduceScatter(x, own, count, ncclBfloat16, ncclSum, n->nccl, n->stream);
    }
    for (int i = 0; i < n->size && !even(n, elements); i++) {
        uint16_t *part = shard(n, x, elements, i, &count);
        if (count > 0)
            r = first_of(r, n->Reduce(part, part, count, ncclBfloat16, ncclSum, i, n->nccl, n->stream));
    }
    RT_TRY(finish(n, q, r, err));
out:
    return st;
}

enum rt_status rt_cuda_all_gather(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t elements, struct rt_err *err)
{
    struct rt_cuda_nccl *n = dev->nccl;
    enum rt_status st;
    ncclResult_t r = ncclSuccess;
    size_t count;
    if (n == NULL || elements <= 0)
        return RT_OK;
    RT_TRY(begin(n, q, "a gathering of parameters", err));
    if (even(n, elements)) {
        const uint16_t *own = shard(n, x, elements, n->rank, &count);
        r = n->AllGather(own, x, count, ncclBfloat16, n->nccl, n->stream);
    }
    for (int i = 0; i < n->size && !even(n, elements); i++) {
        uint16_t *part = shard(n, x, elements, i, &count);
        if (count > 0)
            r = first_of(r, n->Broadcast(part, part, count, ncclBfloat16, i, n->nccl, n->stream));
    }
    RT_TRY(finish(n, q, r, err));
out:
    return st;
}

enum rt_status rt_cuda_broadcast(struct rt_dev *dev, struct rt_queue *q, void *x, int64_t elements, int root, struct rt_err *err)
{
    struct rt_cuda_nccl *n = dev->nccl;
    enum rt_status st;
    if (n == NULL || elements <= 0)
        return RT_OK;
    RT_TRY(begin(n, q, "a broadcast", err));
    RT_TRY(finish(n, q, n->Broadcast(x, x, (size_t)elements, ncclBfloat16, root, n->nccl, n->stream), err));
out:
    return st;
}

#else

#define UNUSED __attribute__((unused))

enum rt_status rt_cuda_nccl_open(UNUSED struct rt_dev *dev, UNUSED struct rt_comm *comm, UNUSED struct rt_cuda_nccl **out, UNUSED char *text, UNUSED int cap,
                                 struct rt_err *err)
{
    return rt_fail(err, RT_UNSUPPORTED, "several ranks on GPUs need NCCL, and this program was built without nccl.h: build it where libnccl-dev is installed, "
                                        "train with one rank, or take --device cpu");
}

void rt_cuda_nccl_close(UNUSED struct rt_cuda_nccl *n)
{
}

enum rt_status rt_cuda_settle(UNUSED struct rt_dev *dev, UNUSED struct rt_err *err)
{
    return RT_OK;
}

/* A device of this build serves one rank: nothing to do. */
enum rt_status rt_cuda_all_reduce(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, UNUSED void *x, UNUSED int64_t n, UNUSED struct rt_err *err)
{
    return RT_OK;
}

enum rt_status rt_cuda_reduce_scatter(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, UNUSED void *x, UNUSED int64_t n, UNUSED struct rt_err *err)
{
    return RT_OK;
}

enum rt_status rt_cuda_all_gather(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, UNUSED void *x, UNUSED int64_t n, UNUSED struct rt_err *err)
{
    return RT_OK;
}

enum rt_status rt_cuda_broadcast(UNUSED struct rt_dev *dev, UNUSED struct rt_queue *q, UNUSED void *x, UNUSED int64_t n, UNUSED int root,
                                 UNUSED struct rt_err *err)
{
    return RT_OK;
}

#endif
