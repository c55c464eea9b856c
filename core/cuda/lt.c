/* cuBLASLt, opened at run time. */
#include "core/cuda/lt.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

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
    X(MatmulPreferenceSetAttribute)

enum { OLDEST = 120000, BLOCK_SCALED = 120900, ENTRIES = 1024 };

/* What an algorithm depends on; compared as bytes, so made from zeroed memory. */
struct key {
    int64_t M, N, K, lda, ldb, ldd, batch, a_stride, b_stride, d_stride;
    int32_t align_a, align_b, align_d, flags;
};

struct entry {
    struct key key;
    bool used, found; /* found: the library has an algorithm */
    cublasLtMatmulAlgo_t algo;
};

struct rt_cuda_lt {
    void *lib;
    cublasLtHandle_t handle;
    size_t version;
    int cc;
#define LT_POINTER(name) __typeof__(&cublasLt##name) name;
    LT_FUNCTIONS(LT_POINTER)
#undef LT_POINTER
    pthread_mutex_t lock; /* of what follows */
    int n;
    struct entry table[ENTRIES];
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

enum rt_status rt_cuda_lt_open(struct rt_dev *dev, struct rt_cuda_lt **out, char *why, int cap, struct rt_err *err)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", NULL};
    struct rt_cuda_lt *lt = NULL;
    const char *missing = NULL;
    enum rt_status st;
    *out = NULL;
    RT_TRY(rt_alloc(1, sizeof *lt, "the table of products", &lt, err));
    (void)pthread_mutex_init(&lt->lock, NULL);
    lt->cc = dev->cc;
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
    rt_free(lt);
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

static struct key key_of(const struct rt_lt_call *c, int64_t N, int64_t K)
{
    struct key k;
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
    k.align_d = alignment(c->d, c->ldd, k.d_stride, c->d_f32 ? 4 : 2);
    k.flags = c->ta | c->tb << 1 | c->accumulate << 2 | c->d_f32 << 3 | (c->bias != NULL) << 4 | (c->a_scale != NULL) << 5 | c->f16 << 6;
    return k;
}

static bool ask(const struct rt_cuda_lt *lt, const struct plan *p, const struct key *k, cublasLtMatmulAlgo_t *out)
{
    const uint64_t space = RT_CUDA_WORKSPACE;
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint32_t a = (uint32_t)k->align_a, b = (uint32_t)k->align_b, d = (uint32_t)k->align_d;
    cublasLtMatmulPreference_t pref = NULL;
    cublasLtMatmulHeuristicResult_t found;
    int n = 0;
    bool ok = lt->MatmulPreferenceCreate(&pref) == CUBLAS_STATUS_SUCCESS;
#define PREFER(name, value) ok = ok && lt->MatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_##name, &value, sizeof value) == CUBLAS_STATUS_SUCCESS
    PREFER(MAX_WORKSPACE_BYTES, space);
    PREFER(REDUCTION_SCHEME_MASK, reduction);
    PREFER(MIN_ALIGNMENT_A_BYTES, a);
    PREFER(MIN_ALIGNMENT_B_BYTES, b);
    PREFER(MIN_ALIGNMENT_C_BYTES, d);
    PREFER(MIN_ALIGNMENT_D_BYTES, d);
#undef PREFER
    ok = ok && lt->MatmulAlgoGetHeuristic(lt->handle, p->op, p->a, p->b, p->d, p->d, pref, 1, &found, &n) == CUBLAS_STATUS_SUCCESS && n == 1 &&
         found.state == CUBLAS_STATUS_SUCCESS;
    if (ok)
        *out = found.algo;
    if (pref != NULL)
        (void)lt->MatmulPreferenceDestroy(pref);
    return ok;
}

static uint64_t hash(const struct key *k)
{
    const unsigned char *p = (const unsigned char *)k;
    uint64_t h = 1469598103934665603u;
    for (size_t i = 0; i < sizeof *k; i++)
        h = (h ^ p[i]) * 1099511628211u;
    return h ^ h >> 29;
}

/* The entry of k, or the free one where it belongs. */
static struct entry *find(struct rt_cuda_lt *lt, const struct key *k)
{
    struct entry *e = &lt->table[hash(k) % ENTRIES];
    while (e->used && memcmp(&e->key, k, sizeof *k) != 0)
        e = e + 1 < lt->table + ENTRIES ? e + 1 : lt->table;
    return e;
}

/* The algorithm for c with N tokens' columns and K as given; false: there is none. */
static bool choose(struct rt_cuda_lt *lt, const struct rt_lt_call *c, int64_t N, int64_t K, cublasLtMatmulAlgo_t *out)
{
    const struct key k = key_of(c, N, K);
    struct plan p = {0};
    (void)pthread_mutex_lock(&lt->lock);
    struct entry *e = find(lt, &k);
    if (!e->used) {
        if (lt->n >= ENTRIES * 3 / 4) { /* many shapes: begin again */
            memset(lt->table, 0, sizeof lt->table);
            lt->n = 0;
            e = find(lt, &k);
        }
        e->key = k;
        e->used = true;
        e->found = make_plan(lt, c, N, K, &p) && ask(lt, &p, &k, &e->algo);
        lt->n++;
        free_plan(lt, &p);
    }
    const bool found = e->found;
    *out = e->algo;
    (void)pthread_mutex_unlock(&lt->lock);
    return found;
}

static enum rt_status run(struct rt_queue *q, const struct rt_lt_call *c, int64_t N, int64_t K, bool *done, struct rt_err *err)
{
    struct rt_cuda_lt *lt = q->dev->lt;
    const float one = 1.0f, beta = c->accumulate ? 1.0f : 0.0f;
    cublasLtMatmulAlgo_t algo;
    struct plan p = {0};
    enum rt_status st = RT_OK;
    *done = false;
    if (!choose(lt, c, N, K, &algo))
        return RT_OK;
    if (!make_plan(lt, c, c->N, c->K, &p))
        RT_FAIL(err, INTERNAL, "cuBLASLt refuses a description of a product of %ld x %ld x %ld", (long)c->N, (long)c->M, (long)c->K);
    const cublasStatus_t s = lt->Matmul(lt->handle, p.op, &one, c->a, p.a, c->b, p.b, &beta, c->d, p.d, c->d, p.d, &algo, q->workspace,
                                        RT_CUDA_WORKSPACE, q->stream);
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
    const int64_t N = c->bucket_n ? rt_cuda_lt_bucket(c->N) : c->N, K = c->bucket_k ? rt_cuda_lt_bucket(c->K) : c->K;
    RT_TRY(run(q, &one, N, K, done, err));
    if (!*done && (N != c->N || K != c->K)) /* what suits the bucket's end may not suit every size in it */
        RT_TRY(run(q, &one, c->N, c->K, done, err));
out:
    return st;
}

#else

enum rt_status rt_cuda_lt_open(__attribute__((unused)) struct rt_dev *dev, struct rt_cuda_lt **out, char *why, int cap,
                               __attribute__((unused)) struct rt_err *err)
{
    *out = NULL;
    snprintf(why, (size_t)cap, "built without cublasLt.h");
    return RT_OK;
}

void rt_cuda_lt_close(__attribute__((unused)) struct rt_cuda_lt *lt)
{
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
