/* cuBLASLt, opened at run time. */
#include "core/cuda/lt.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "core/cuda/device.h"
#include "core/cuda/product_sm90.h"
#include "core/cuda/race.h"
#include "core/cuda/tune.h"
#include "core/mem.h"

int64_t rt_cuda_lt_bucket(int64_t n)
{
    int64_t step = 16;
    while (step * 16 < n)
        step *= 2;
    return (n + step - 1) / step * step;
}

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>

/* name without the prefix, arguments: the types are the header's */
#define LT_FUNCTIONS(X) \
    X(Create) X(Destroy) X(GetVersion) X(Matmul) X(MatmulAlgoGetHeuristic) X(MatmulDescCreate) X(MatmulDescDestroy) X(MatmulDescSetAttribute) \
    X(MatrixLayoutCreate) X(MatrixLayoutDestroy) X(MatrixLayoutSetAttribute) X(MatmulPreferenceCreate) X(MatmulPreferenceDestroy) \
    X(MatmulPreferenceSetAttribute) X(MatmulAlgoCheck) X(MatmulAlgoConfigGetAttribute)

enum { OLDEST = 120000, BLOCK_SCALED = 120900, ENTRIES = 1024, CANDIDATES = RT_RACE_MOST, PROPOSED = 8 };
/* Of a key's flags, those that say which types are multiplied. */
enum { FLAG_F32 = 1 << 3, FLAG_E4M3 = 1 << 5, FLAG_F16 = 1 << 6, FLAG_TYPES = FLAG_F32 | FLAG_E4M3 | FLAG_F16 };
_Static_assert(sizeof(cublasLtMatmulAlgo_t) == RT_ALGO_WORDS * sizeof(uint64_t), "an algorithm of another size");

struct entry {
    struct rt_product_key key;
    bool used, found; /* found: the library has an algorithm */
    cublasLtMatmulAlgo_t algo;
};

struct rt_cuda_lt {
    void *lib;
    cublasLtHandle_t handle;
    size_t version;
#define LT_POINTER(name) __typeof__(&cublasLt##name) name;
    LT_FUNCTIONS(LT_POINTER)
#undef LT_POINTER
    pthread_mutex_t lock; /* of what follows */
    int n;
    struct entry table[ENTRIES];
    struct rt_tune *tune;   /* NULL: the library's first choice is taken */
    bool warm;              /* a product was measured already */
    double ran_long;        /* seconds of long runs so far */
};

/* The descriptors of one call. */
struct plan {
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, d;
};

static bool load(struct rt_cuda_lt *lt, const char **missing)
{
#define LT_LOAD(name) \
    *(void **)&lt->name = dlsym(lt->lib, "cublasLt" #name); \
    if (lt->name == NULL) { \
        *missing = "cublasLt" #name; \
        return false; \
    }
    LT_FUNCTIONS(LT_LOAD)
#undef LT_LOAD
    return true;
}

enum rt_status rt_cuda_lt_open(struct rt_cuda_lt **out, char *why, int cap, struct rt_err *err)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", NULL};
    struct rt_cuda_lt *lt = NULL;
    const char *missing = NULL;
    enum rt_status st;
    *out = NULL;
    RT_TRY(rt_alloc(1, sizeof *lt, "the table of products", &lt, err));
    (void)pthread_mutex_init(&lt->lock, NULL);
    lt->lib = rt_cuda_dlopen(names);
    if (lt->lib == NULL) {
        snprintf(why, (size_t)cap, "libcublasLt.so.13 and .12 were not found");
    } else if (!load(lt, &missing)) {
        snprintf(why, (size_t)cap, "%s is missing from libcublasLt", missing);
    } else if ((lt->version = lt->GetVersion()) < OLDEST) {
        snprintf(why, (size_t)cap, "cuBLASLt %zu is older than %d", lt->version, OLDEST);
    } else if (lt->Create(&lt->handle) != CUBLAS_STATUS_SUCCESS) {
        lt->handle = NULL;
        snprintf(why, (size_t)cap, "cublasLtCreate failed");
    } else {
        *out = lt;
        lt = NULL;
    }
out:
    rt_cuda_lt_close(lt);
    return st;
}

void rt_cuda_lt_close(struct rt_cuda_lt *lt)
{
    if (lt == NULL)
        return;
    if (lt->handle != NULL)
        (void)lt->Destroy(lt->handle);
    if (lt->lib != NULL)
        (void)dlclose(lt->lib);
    (void)pthread_mutex_destroy(&lt->lock);
    rt_tune_close(lt->tune);
    rt_free(lt);
}

enum rt_status rt_cuda_tune(struct rt_dev *dev, const char *path, char *note, int cap, struct rt_err *err)
{
    struct rt_cuda_lt *lt = dev->lt;
    struct rt_tune *tune = NULL;
    struct cudaDeviceProp prop;
    char gpu[sizeof prop.name + 32];
    enum rt_status st = RT_OK;
    note[0] = 0;
    if (lt == NULL) {
        snprintf(note, (size_t)cap, "products are not measured: %s", dev->lt_why);
        return RT_OK;
    }
    RT_CUDA_TRY(cudaGetDeviceProperties(&prop, dev->index));
    snprintf(gpu, sizeof gpu, "%s, %d multiprocessors", prop.name, prop.multiProcessorCount);
    RT_TRY(rt_tune_open(path, gpu, lt->version, RT_CUDA_WORKSPACE, &tune, note, cap, err));
    (void)pthread_mutex_lock(&lt->lock);
    rt_tune_close(lt->tune);
    lt->tune = tune;
    memset(lt->table, 0, sizeof lt->table); /* what was chosen before this may not be what the file says */
    lt->n = 0;
    (void)pthread_mutex_unlock(&lt->lock);
out:
    return st;
}

bool rt_cuda_lt_block_scaled(const struct rt_dev *dev)
{
    return dev->lt != NULL && dev->cc == 90 && dev->lt->version >= BLOCK_SCALED;
}

/* ---- descriptors ---- */

static bool make_layout(const struct rt_cuda_lt *lt, cublasLtMatrixLayout_t *out, cudaDataType_t type, int64_t rows, int64_t cols, int64_t ld,
                        int64_t batch, int64_t stride)
{
    const int32_t count = (int32_t)batch;
    if (lt->MatrixLayoutCreate(out, type, (uint64_t)rows, (uint64_t)cols, ld) != CUBLAS_STATUS_SUCCESS)
        return false;
    return batch == 1 || (lt->MatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count) == CUBLAS_STATUS_SUCCESS &&
                          lt->MatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride) ==
                              CUBLAS_STATUS_SUCCESS);
}

static bool set(const struct rt_cuda_lt *lt, const struct plan *p, cublasLtMatmulDescAttributes_t name, const void *value, size_t size)
{
    return lt->MatmulDescSetAttribute(p->op, name, value, size) == CUBLAS_STATUS_SUCCESS;
}

static bool set_scales(const struct rt_cuda_lt *lt, const struct plan *p, const struct rt_lt_call *c)
{
    const int32_t block = CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F, run = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    return set(lt, p, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &block, sizeof block) && set(lt, p, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &run, sizeof run) &&
           set(lt, p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &c->a_scale, sizeof c->a_scale) &&
           set(lt, p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &c->b_scale, sizeof c->b_scale);
}

/* M, N, K: of the call, or of its bucket. */
static bool make_plan(const struct rt_cuda_lt *lt, const struct rt_lt_call *c, int64_t N, int64_t K, struct plan *p)
{
    const cudaDataType_t half = c->f16 ? CUDA_R_16F : CUDA_R_16BF, in = c->a_scale != NULL ? CUDA_R_8F_E4M3 : half, to = c->d_f32 ? CUDA_R_32F : half;
    const int32_t ta = c->ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb = c->tb ? CUBLAS_OP_T : CUBLAS_OP_N, type = to;
    const uint32_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    if (lt->MatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F) != CUBLAS_STATUS_SUCCESS)
        return false;
    if (!set(lt, p, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta) || !set(lt, p, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb))
        return false;
    if (c->a_scale != NULL && !set_scales(lt, p, c))
        return false;
    if (c->bias != NULL && (!set(lt, p, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) ||
                            !set(lt, p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &c->bias, sizeof c->bias) ||
                            !set(lt, p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type)))
        return false;
    return make_layout(lt, &p->a, in, c->ta ? K : c->M, c->ta ? c->M : K, c->lda, c->batch, c->a_stride) &&
           make_layout(lt, &p->b, in, c->tb ? N : K, c->tb ? K : N, c->ldb, c->batch, c->b_stride) &&
           make_layout(lt, &p->d, to, c->M, N, c->ldd, c->batch, c->d_stride);
}

static void free_plan(const struct rt_cuda_lt *lt, struct plan *p)
{
    if (p->op != NULL)
        (void)lt->MatmulDescDestroy(p->op);
    if (p->a != NULL)
        (void)lt->MatrixLayoutDestroy(p->a);
    if (p->b != NULL)
        (void)lt->MatrixLayoutDestroy(p->b);
    if (p->d != NULL)
        (void)lt->MatrixLayoutDestroy(p->d);
    *p = (struct plan){0};
}

/* ---- algorithms ---- */

/* The greatest power of two, at most 16, that divides the address and every distance. */
static int32_t alignment(const void *p, int64_t ld, int64_t stride, size_t size)
{
    const uint64_t bits = (uint64_t)(uintptr_t)p | (uint64_t)ld * size | (uint64_t)stride * size | 16;
    return (int32_t)(bits & -bits);
}

static struct rt_product_key key_of(const struct rt_lt_call *c, int64_t N, int64_t K)
{
    struct rt_product_key k;
    const size_t in = c->a_scale != NULL ? 1 : 2;
    memset(&k, 0, sizeof k);
    k.M = c->M;
    k.N = N;
    k.K = K;
    k.lda = c->lda;
    k.ldb = c->ldb;
    k.ldd = c->ldd;
    k.batch = c->batch;
    if (c->batch > 1) {
        k.a_stride = c->a_stride;
        k.b_stride = c->b_stride;
        k.d_stride = c->d_stride;
    }
    k.align_a = alignment(c->a, c->lda, k.a_stride, in);
    k.align_b = alignment(c->b, c->ldb, k.b_stride, in);
    k.align_d = alignment((const char *)((uintptr_t)c->d | (uintptr_t)c->add), c->ldd, k.d_stride, c->d_f32 ? 4 : 2);
    /* what a step adds to it begins with =: one choice for both */
    k.flags = c->ta | c->tb << 1 | (c->accumulate && !c->bucket_k) << 2 | (c->d_f32 ? FLAG_F32 : 0) | (c->bias != NULL) << 4 |
              (c->a_scale != NULL ? FLAG_E4M3 : 0) | (c->f16 ? FLAG_F16 : 0) | (c->add != NULL) << 7;
    return k;
}

/* The library's candidates for k in its own order, at most `most`; returns how many there are. */
static int ask(const struct rt_cuda_lt *lt, const struct plan *p, const struct rt_product_key *k, int most, cublasLtMatmulAlgo_t *out)
{
    const uint64_t space = RT_CUDA_WORKSPACE;
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint32_t a = (uint32_t)k->align_a, b = (uint32_t)k->align_b, d = (uint32_t)k->align_d;
    cublasLtMatmulPreference_t pref = NULL;
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    int n = 0, kept = 0;
    bool ok = lt->MatmulPreferenceCreate(&pref) == CUBLAS_STATUS_SUCCESS;
#define PREFER(name, value) ok = ok && lt->MatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_##name, &value, sizeof value) == CUBLAS_STATUS_SUCCESS
    PREFER(MAX_WORKSPACE_BYTES, space);
    PREFER(REDUCTION_SCHEME_MASK, reduction);
    PREFER(MIN_ALIGNMENT_A_BYTES, a);
    PREFER(MIN_ALIGNMENT_B_BYTES, b);
    PREFER(MIN_ALIGNMENT_C_BYTES, d);
    PREFER(MIN_ALIGNMENT_D_BYTES, d);
#undef PREFER
    ok = ok && lt->MatmulAlgoGetHeuristic(lt->handle, p->op, p->a, p->b, p->d, p->d, pref, most, found, &n) == CUBLAS_STATUS_SUCCESS;
    for (int i = 0; ok && i < n; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS)
            out[kept++] = found[i].algo;
    if (pref != NULL)
        (void)lt->MatmulPreferenceDestroy(pref);
    return kept;
}

static uint64_t hash(const struct rt_product_key *k)
{
    const unsigned char *p = (const unsigned char *)k;
    uint64_t h = 1469598103934665603u;
    for (size_t i = 0; i < sizeof *k; i++)
        h = (h ^ p[i]) * 1099511628211u;
    return h ^ h >> 29;
}

/* The entry of k, or the free one where it belongs. */
static struct entry *find(struct rt_cuda_lt *lt, const struct rt_product_key *k)
{
    struct entry *e = &lt->table[hash(k) % ENTRIES];
    while (e->used && memcmp(&e->key, k, sizeof *k) != 0)
        e = e + 1 < lt->table + ENTRIES ? e + 1 : lt->table;
    return e;
}

static cublasStatus_t multiply(struct rt_queue *q, const struct rt_lt_call *c, const struct plan *p, void *d, const cublasLtMatmulAlgo_t *algo)
{
    const struct rt_cuda_lt *lt = q->dev->lt;
    const float one = 1.0f, beta = c->accumulate || c->add != NULL ? 1.0f : 0.0f;
    const void *old = c->add != NULL ? c->add : d;
    return lt->Matmul(lt->handle, p->op, &one, c->a, p->a, c->b, p->b, &beta, old, p->d, d, p->d, algo, q->workspace, RT_CUDA_WORKSPACE, q->stream);
}

/* ---- our own product among the library's algorithms ---- */

/* What stands for it where an algorithm is kept: a name that no algorithm of the library has, and a number that changes with its results. */
static const uint64_t own[RT_ALGO_WORDS] = {0x6e776f /* "own" */, 3};

static bool is_own(const cublasLtMatmulAlgo_t *algo)
{
    return memcmp(algo, own, sizeof own) == 0;
}

/* The call as gemm.h has it. */
static struct rt_cuda_gemm_args row_major(const struct rt_lt_call *c, void *d)
{
    return (struct rt_cuda_gemm_args){.a = c->b, .b = c->a, .bias = c->bias, .add = c->add, .d = d, .m = c->N, .n = c->M, .k = c->K, .lda = c->ldb,
                                      .ldb = c->lda, .ldd = c->ldd, .a_t = c->tb, .b_t = c->ta, .accumulate = c->accumulate, .d_f32 = c->d_f32,
                                      .f16 = c->f16, .batch = c->batch};
}

static bool own_fits(const struct rt_queue *q, const struct rt_lt_call *c)
{
    const struct rt_cuda_gemm_args g = row_major(c, c->d);
    return c->a_scale == NULL && rt_cuda_product_sm90_fits(q->dev, &g);
}

/* ---- measuring ---- */

/* FLOPs from which a product is measured: some 10 microseconds; what is smaller is bound by its launch. */
static const double worth_measuring = 4e9;
/* Seconds of work before measurements: clocks fall within a second under load, and which algorithm is fastest depends on them; later products are
 * met between others, but for the writing of a file. */
static const double first_warm_up = 1.0, warm_up = 0.05;

/* FLOPs from which finalists run by themselves, how long, and how much of that there is in all: a run waits for it once. */
static const double worth_long_runs = 1e11, long_run = 0.15, long_runs = 15;

struct measure {
    struct rt_queue *q;
    const struct rt_lt_call *c;
    const cublasLtMatmulAlgo_t *algo;
    struct plan p;
    void *d; /* where products go: c->d, or a copy's place where they would be added to it */
};

static bool run_candidate(void *measure, int i)
{
    const struct measure *m = measure;
    if (is_own(&m->algo[i])) {
        const struct rt_cuda_gemm_args g = row_major(m->c, m->d);
        return rt_cuda_product_sm90(m->q, &g, NULL) == RT_OK;
    }
    return multiply(m->q, m->c, &m->p, m->d, &m->algo[i]) == CUBLAS_STATUS_SUCCESS;
}

/* Sizes as c has them, not those of its bucket: there is no memory for more. An output that is added to is left alone; where there is no room for its copy,
 * the library's first choice is kept, with times of 0. */
static enum rt_status measure_product(struct rt_queue *q, const struct rt_lt_call *c, const cublasLtMatmulAlgo_t *algo, int n,
                                      struct rt_product_choice *out, struct rt_err *err)
{
    struct rt_cuda_lt *lt = q->dev->lt;
    struct measure m = {.q = q, .c = c, .algo = algo, .d = c->d};
    struct rt_race_result r;
    const size_t size = c->d_f32 ? 4 : 2, bytes = (size_t)(c->ldd * c->N + c->d_stride * (c->batch - 1)) * size;
    const int32_t align = out->key.align_d;
    struct rt_err no_room = {0};
    void *copy = NULL;
    enum rt_status st = RT_OK;
    RT_TRY(rt_cuda_not_recorded(q, "a product that was not measured yet", err));
    memcpy(out->algo, &algo[0], sizeof out->algo);
    if (c->accumulate && bytes > q->dev->scratch) /* more than operations may take: a plan may have no room for it */
        return RT_OK;
    if (c->accumulate && rt_cuda_temp(q, bytes + 16, &copy, &no_room) != RT_OK)
        return no_room.status == RT_NOMEM ? RT_OK : rt_fail(err, no_room.status, "%s", no_room.msg);
    if (!make_plan(lt, c, c->N, c->K, &m.p))
        RT_FAIL(err, INTERNAL, "cuBLASLt refuses a description of a product of %ld x %ld x %ld", (long)c->N, (long)c->M, (long)c->K);
    if (c->accumulate) {
        m.d = (char *)copy + (align < 16 ? align : 0); /* aligned as d is */
        RT_CUDA_TRY(cudaMemcpyAsync(m.d, c->d, bytes, cudaMemcpyDeviceToDevice, q->stream));
    }
    struct rt_race_rules rules = {.warm_up = lt->warm ? warm_up : first_warm_up, .also = is_own(&algo[n - 1]) ? n - 1 : -1};
    if (2.0 * (double)c->M * (double)c->N * (double)c->K * (double)c->batch >= worth_long_runs && lt->ran_long < long_runs)
        rules.alone = long_run;
    RT_TRY(rt_cuda_race(q, n, run_candidate, &m, &rules, &r, err));
    lt->ran_long += 8 * rules.alone; /* four finalists, twice */
    lt->warm = true;
    memcpy(out->algo, &algo[r.best], sizeof out->algo);
    out->rank = r.best;
    out->first_ns = r.first_ns;
    out->best_ns = r.best_ns;
out:
    rt_cuda_temp_free(q, copy);
    free_plan(lt, &m.p);
    return st;
}

/* An algorithm from a file: does the library take it for p, and does it add split sums in a fixed order? */
static bool sound(const struct rt_cuda_lt *lt, const struct plan *p, const cublasLtMatmulAlgo_t *algo)
{
    cublasLtMatmulHeuristicResult_t result;
    uint32_t reduction = 0;
    size_t written;
    return lt->MatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction, sizeof reduction, &written) == CUBLAS_STATUS_SUCCESS &&
           (reduction & ~(uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) == 0 &&
           lt->MatmulAlgoCheck(lt->handle, p->op, p->a, p->b, p->d, p->d, algo, &result) == CUBLAS_STATUS_SUCCESS && result.state == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= RT_CUDA_WORKSPACE;
}

static bool usable(const struct rt_queue *q, const struct rt_lt_call *c, const struct plan *p, const cublasLtMatmulAlgo_t *algo)
{
    return is_own(algo) ? own_fits(q, c) : sound(q->dev->lt, p, algo);
}

/* algo[0] of the n candidates becomes the one that was measured as the fastest, now or before. p: of the key's sizes. What is left over of a batch is a
 * micro-batch of fewer tokens: it takes what won for more of them, since measuring takes longer than such products do in a run. */
static enum rt_status tuned(struct rt_queue *q, const struct rt_lt_call *c, const struct rt_product_key *k, const struct plan *p, cublasLtMatmulAlgo_t *algo,
                            int n, struct rt_err *err)
{
    const struct rt_cuda_lt *lt = q->dev->lt;
    const struct rt_product_choice *known = rt_tune_find(lt->tune, k), *wider = NULL;
    struct rt_product_choice now = {.key = *k};
    enum rt_status st = RT_OK;
    cublasLtMatmulAlgo_t kept;
    if (known == NULL && (c->bucket_n || c->bucket_k))
        wider = rt_tune_find_wider(lt->tune, k, c->bucket_k);
    if (wider != NULL) {
        memcpy(&kept, wider->algo, sizeof kept);
        if (usable(q, c, p, &kept)) {
            algo[0] = kept;
            return RT_OK;
        }
    }
    if (known == NULL) {
        RT_TRY(measure_product(q, c, algo, n, &now, err));
        RT_TRY(rt_tune_add(lt->tune, &now, err));
        known = &now;
    } else {
        memcpy(&kept, known->algo, sizeof kept);
        if (!usable(q, c, p, &kept))
            RT_FAIL(err, FORMAT, "%s: the algorithm kept for a product of %ld x %ld x %ld is not one that it can be made by; delete the file and products are "
                    "measured again", rt_tune_path(lt->tune), (long)c->N, (long)c->M, (long)c->K);
    }
    memcpy(&algo[0], known->algo, sizeof algo[0]);
out:
    return st;
}

/* Behind the n candidates, as far as there is room: what won for other products of the same types, and suits this one. The heuristic proposes eight for a
 * shape and often leaves out the one that wins for its neighbours. Returns how many there are. */
static int add_winners(const struct rt_cuda_lt *lt, const struct rt_product_key *k, const struct plan *p, cublasLtMatmulAlgo_t *algo, int n, int most)
{
    for (const struct entry *e = lt->table; e < lt->table + ENTRIES && n < most; e++) {
        bool is_new = e->used && e->found && !is_own(&e->algo) && (e->key.flags & FLAG_TYPES) == (k->flags & FLAG_TYPES);
        for (int i = 0; is_new && i < n; i++)
            is_new = memcmp(&e->algo, &algo[i], sizeof algo[i]) != 0;
        if (is_new && sound(lt, p, &e->algo))
            algo[n++] = e->algo;
    }
    return n;
}

/* And our own. */
static int add_others(const struct rt_queue *q, const struct rt_lt_call *c, const struct rt_product_key *k, const struct plan *p, cublasLtMatmulAlgo_t *algo,
                      int n)
{
    const bool fits = own_fits(q, c);
    n = add_winners(q->dev->lt, k, p, algo, n, CANDIDATES - fits);
    if (fits)
        memcpy(&algo[n++], own, sizeof own);
    return n;
}

static bool measured(const struct rt_cuda_lt *lt, const struct rt_lt_call *c)
{
    return lt->tune != NULL && 2.0 * (double)c->M * (double)c->N * (double)c->K * (double)c->batch >= worth_measuring;
}

/* A measurement takes up to a second of a step, and documents of mixed lengths meet every bucket: what is measured is measured once an octave. */
static int64_t octave(int64_t n)
{
    int64_t end = 16;
    while (end < n)
        end *= 2;
    return end;
}

/* The algorithm for c with N tokens' columns and K as given. */
static enum rt_status choose(struct rt_queue *q, const struct rt_lt_call *c, int64_t N, int64_t K, cublasLtMatmulAlgo_t *out, bool *found,
                             struct rt_err *err)
{
    struct rt_cuda_lt *lt = q->dev->lt;
    const struct rt_product_key k = key_of(c, N, K);
    enum rt_status st = RT_OK;
    struct plan p = {0};
    (void)pthread_mutex_lock(&lt->lock);
    struct entry *e = find(lt, &k);
    if (!e->used) {
        cublasLtMatmulAlgo_t algo[CANDIDATES];
        if (lt->n >= ENTRIES * 3 / 4) { /* many shapes: begin again */
            memset(lt->table, 0, sizeof lt->table);
            lt->n = 0;
            e = find(lt, &k);
        }
        const int n = make_plan(lt, c, N, K, &p) ? ask(lt, &p, &k, measured(lt, c) ? PROPOSED : 1, algo) : 0;
        if (n > 0 && measured(lt, c))
            RT_TRY(tuned(q, c, &k, &p, algo, add_others(q, c, &k, &p, algo, n), err));
        e->key = k;
        e->used = true;
        e->found = n > 0;
        if (e->found)
            e->algo = algo[0];
        lt->n++;
    }
    *found = e->found;
    *out = e->algo;
out:
    free_plan(lt, &p);
    (void)pthread_mutex_unlock(&lt->lock);
    return st;
}

static enum rt_status run(struct rt_queue *q, const struct rt_lt_call *c, int64_t N, int64_t K, bool *done, struct rt_err *err)
{
    struct rt_cuda_lt *lt = q->dev->lt;
    cublasLtMatmulAlgo_t algo;
    struct plan p = {0};
    enum rt_status st = RT_OK;
    *done = false;
    RT_TRY(choose(q, c, N, K, &algo, done, err));
    if (!*done)
        return RT_OK;
    if (is_own(&algo)) {
        const struct rt_cuda_gemm_args g = row_major(c, c->d);
        return rt_cuda_product_sm90(q, &g, err);
    }
    if (!make_plan(lt, c, c->N, c->K, &p))
        RT_FAIL(err, INTERNAL, "cuBLASLt refuses a description of a product of %ld x %ld x %ld", (long)c->N, (long)c->M, (long)c->K);
    const cublasStatus_t s = multiply(q, c, &p, c->d, &algo);
    *done = s == CUBLAS_STATUS_SUCCESS;
    if (s != CUBLAS_STATUS_SUCCESS && s != CUBLAS_STATUS_NOT_SUPPORTED && s != CUBLAS_STATUS_INVALID_VALUE)
        RT_FAIL(err, DEVICE, "GPU: cublasLtMatmul, %ld x %ld x %ld: status %d", (long)c->N, (long)c->M, (long)c->K, (int)s);
out:
    free_plan(lt, &p);
    return st;
}

enum rt_status rt_cuda_lt_matmul(struct rt_queue *q, const struct rt_lt_call *c, bool *done, struct rt_err *err)
{
    struct rt_lt_call one = *c;
    enum rt_status st = RT_OK;
    *done = false;
    one.batch = c->batch > 0 ? c->batch : 1;
    if (q->dev->lt == NULL || (c->a_scale != NULL && !rt_cuda_lt_block_scaled(q->dev)))
        return RT_OK;
    int64_t (*const end)(int64_t) = measured(q->dev->lt, &one) ? octave : rt_cuda_lt_bucket;
    const int64_t N = c->bucket_n ? end(c->N) : c->N, K = c->bucket_k ? end(c->K) : c->K;
    RT_TRY(run(q, &one, N, K, done, err));
    if (!*done && (N != c->N || K != c->K)) /* what suits the bucket's end may not suit every size in it */
        RT_TRY(run(q, &one, c->N, c->K, done, err));
out:
    return st;
}

#else

enum rt_status rt_cuda_lt_open(struct rt_cuda_lt **out, char *why, int cap, __attribute__((unused)) struct rt_err *err)
{
    *out = NULL;
    snprintf(why, (size_t)cap, "built without cublasLt.h");
    return RT_OK;
}

void rt_cuda_lt_close(__attribute__((unused)) struct rt_cuda_lt *lt)
{
}

enum rt_status rt_cuda_tune(struct rt_dev *dev, __attribute__((unused)) const char *path, char *note, int cap, __attribute__((unused)) struct rt_err *err)
{
    snprintf(note, (size_t)cap, "products are not measured: %s", dev->lt_why);
    return RT_OK;
}

bool rt_cuda_lt_block_scaled(__attribute__((unused)) const struct rt_dev *dev)
{
    return false;
}

enum rt_status rt_cuda_lt_matmul(__attribute__((unused)) struct rt_queue *q, __attribute__((unused)) const struct rt_lt_call *c, bool *done,
                                 __attribute__((unused)) struct rt_err *err)
{
    *done = false;
    return RT_OK;
}

#endif
